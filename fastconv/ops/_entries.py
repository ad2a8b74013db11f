"""One N-dimensional core per operation; its 1-D, 2-D and 3-D names are made here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from types import FunctionType
from typing import Any

from ..errors import ArgumentTypeError


def entries(
    core: Callable[..., Any], module: str = "fastconv", refused: Callable[..., Any] | None = None
) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Return `core` with its first argument, the number of spatial dimensions, set to 1, 2 and 3.

    The core's name and docstring hold "Nd" where the entries, of a public `module`, have "1d", "2d" or "3d". Of
    arguments that the core takes for no arrays, `refused` makes the result, from (entry, args, kwargs), or raises.
    """
    one, two, three = (_entry(core, dims, module, refused) for dims in (1, 2, 3))
    return one, two, three


def _entry(core: Callable[..., Any], dims: int, module: str, refused: Any) -> Callable[..., Any]:
    name = core.__name__.replace("Nd", f"{dims}d")
    # Python's own errors about missing and unknown arguments then speak of conv2d, not of convNd.
    named = FunctionType(core.__code__, core.__globals__, name, core.__defaults__, core.__closure__)
    named.__kwdefaults__, named.__qualname__ = core.__kwdefaults__, name

    def entry(*args: Any, **kwargs: Any) -> Any:
        try:
            return named(dims, *args, **kwargs)
        except ArgumentTypeError:
            if refused is None:
                raise
            return refused(entry, args, kwargs)

    signature = inspect.signature(core)
    entry.__name__ = entry.__qualname__ = name
    entry.__module__ = module
    entry.__doc__ = (core.__doc__ or "").replace("Nd", f"{dims}d")
    entry.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])  # type: ignore[attr-defined]
    entry.__wrapped__ = core  # type: ignore[attr-defined]
    return entry


def runner(device: str, module: str = "run") -> Any:
    """Return the module that runs operations on a device: the CPU, or a GPU of some architecture."""
    return import_module(f"fastconv.{'cpu' if device == 'cpu' else 'cuda'}.{module}")


def batched(array: Any, is_batched: bool) -> Any:
    """Return the array with a batch dimension."""
    return array if is_batched else array[None]


def as_given(array: Any, is_batched: bool) -> Any:
    """Return the array without the batch dimension that :func:`batched` added."""
    return array if is_batched else array[0]
