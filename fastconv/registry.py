"""Algorithms: what can compute a convolution, on which device, for which geometry, at what cost.

To add an algorithm, write one module per device and register one record. The module defines::

    supports(geometry, direction) -> (bool, reason)
    workspace(geometry, direction, limit) -> {name: Buffer}
    seconds(geometry, direction, threads) -> float
    forward(geometry, x, weight, bias, activation, out, workspace)
    input_grad(geometry, grad_output, weight, out, workspace)
    weight_grad(geometry, grad_output, x, out, workspace)

Two more are optional. `bind` makes calls of small problems quick, where no workspace is needed::

    bind(geometry, direction, activation) -> function of (factor, factor, bias or None, out)

and `kept`, `pack` and `run`, see `cpu/plan.py`, let a plan pack the weight once.

A module for "cuda" touches no array: what it launches is data, see `cuda/steps.py`. It defines `supports`, `workspace`,
and::

    seconds(geometry, direction, architecture) -> float
    steps(geometry, direction, activation=None, bias=False, architecture="sm_90a", limit=2**30)
        -> list of Step and Call

where `limit` is the one `workspace` was given, or the total of what that stated. It has `FUSED = ("forward",
"input_grad")` if its input gradient ends in bias and activation too, as the forward pass does, and `since`, a compute
capability (ten times), if older GPUs lack instructions of it.

`geometry` is lifted: three spatial dimensions, zero padding, and `data_format` and `dtype` those of the arrays,
which are C-contiguous. `out` is fresh memory to be written whole. `workspace` holds one array per Buffer
declared, so an algorithm has the memory it stated and no other. Modules load at first use.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from . import config
from .errors import ArgumentError, ArgumentTypeError
from .geometry import ConvGeometry

FAMILIES = ("direct", "im2col", "implicit_gemm", "winograd", "fft", "depthwise")


class Buffer(NamedTuple):
    """One array of workspace.

    `owned` is False for memory that a library allocates by itself during the call: it is counted, not handed over.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    owned: bool = True

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Support(NamedTuple):
    """Whether an algorithm can compute a case, and if not, why."""

    ok: bool
    reason: str = ""


@dataclass(frozen=True)
class Algorithm:
    """One way to compute a convolution on one device.

    Attributes
    ----------
    name : str
        Such as "direct" or "winograd_f4x3"; `family` is the name without its variant.
    device : str
        "cpu" or "cuda".
    module : str
        Where its functions are: a module, or "module:name" of an object with them.
    precision : str
        The strictest promise ("highest", "high", "medium") that its float32 results keep.
    """

    name: str
    device: str
    module: str
    precision: str = "highest"

    @property
    def family(self) -> str:
        """The name users may also give: "winograd" for "winograd_f4x3"."""
        return next((f for f in FAMILIES if self.name == f or self.name.startswith(f + "_")), self.name)

    @cached_property
    def implementation(self) -> Any:
        """The loaded module, or the part of it named after a colon."""
        module, _, part = self.module.partition(":")
        return getattr(import_module(module), part) if part else import_module(module)

    def supports(self, geometry: ConvGeometry, direction: str = "forward") -> Support:
        """Return whether this algorithm computes `geometry` in `direction`, and if not, why."""
        return Support(*self.implementation.supports(geometry, direction))

    def lacking(self, units: int | str) -> str:
        """Return why a GPU of this architecture cannot run it; empty if it can, and for threads."""
        if self.device == "cpu":
            return ""
        from .cuda.architecture import Architecture

        since = getattr(self.implementation, "since", 0)
        has = Architecture.named(str(units)).capability
        return "" if has >= since else f"it needs a GPU of sm_{since} or later, not {units}"

    def keeps(self, precision: str) -> bool:
        """Return True if its results keep the promise of `precision`."""
        return config.PRECISIONS.index(self.precision) <= config.PRECISIONS.index(precision)

    def workspace(self, geometry: ConvGeometry, direction: str, limit: int) -> dict[str, Buffer]:
        """Return the buffers it needs for a lifted geometry; some algorithms make do with less under a low `limit`."""
        return self.implementation.workspace(geometry, direction, limit)

    def seconds(self, geometry: ConvGeometry, direction: str, units: int | str) -> float:
        """Return the predicted time of one call, for a lifted geometry, on so many threads or on an architecture."""
        return self.implementation.seconds(geometry, direction, units)


def workspace_bytes(buffers: dict[str, Buffer]) -> int:
    """Return the size of all buffers together."""
    return sum(buffer.nbytes for buffer in buffers.values())


_algorithms: dict[tuple[str, str], Algorithm] = {}


def register(algorithm: Algorithm) -> None:
    """Add an algorithm; one of the same name and device is replaced."""
    _algorithms[algorithm.device, algorithm.name] = algorithm
    config.changed()


def unregister(name: str, device: str) -> None:
    """Remove an algorithm."""
    _algorithms.pop((device, name), None)
    config.changed()


def on(device: str) -> list[Algorithm]:
    """Return the algorithms of a device, in order of registration."""
    return [a for a in _algorithms.values() if a.device == device]


def named(name: Any, device: str) -> list[Algorithm]:
    """Return the algorithms that `name` means on a device: all for "auto" and "tune", a family's variants, or one.

    The list is empty if the name is a known family that the device has no algorithm of.
    """
    here = on(device)
    if checked_name("algorithm", name, here) in ("auto", "tune"):
        return here
    return [a for a in here if a.name == name] or [a for a in here if a.family == name]


def checked_name(argument: str, name: Any, shown: Iterable[Algorithm] | None = None) -> str:
    """Return a name that some device knows, or raise an error that lists the names of all algorithms, or of `shown`."""
    if not isinstance(name, str):
        raise ArgumentTypeError(f"{argument} must be a string, not {name!r}")
    if name not in ("auto", "tune", *FAMILIES, *(a.name for a in _algorithms.values())):
        listed = _algorithms.values() if shown is None else shown
        names = dict.fromkeys(["auto", "tune", *FAMILIES, *(a.name for a in listed)])
        raise ArgumentError(f"{argument} must be one of {', '.join(map(repr, names))}, not {name!r}")
    return name


for _name in ("direct", "im2col", "implicit_gemm", "depthwise", "fft", "direct_small"):
    register(Algorithm(_name, "cpu", f"fastconv.cpu.{_name}"))
for _name in ("direct", "im2col", "implicit_gemm", "depthwise", "fft"):
    register(Algorithm(_name, "cuda", f"fastconv.cuda.{_name}"))
for _m, _precision in ((2, "highest"), (4, "highest"), (6, "high")):
    register(Algorithm(f"winograd_f{_m}x3", "cpu", f"fastconv.cpu.winograd:F{_m}", _precision))
for _m in (2, 4):
    register(Algorithm(f"winograd_f{_m}x3", "cuda", f"fastconv.cuda.winograd:F{_m}"))
for _m, _name, _precision in (
    (2, "tf32x3", "highest"), (2, "bf16x6", "highest"), (2, "bf16x3", "high"), (2, "tf32", "medium"),
    (4, "bf16x6", "highest"), (4, "tf32", "medium"),
):  # fmt: skip
    _object = f"fastconv.cuda.winograd_tensor_core:F{_m}_{_name.upper()}"
    register(Algorithm(f"winograd_f{_m}x3_{_name}", "cuda", _object, _precision))
register(Algorithm("implicit_gemm_mma", "cuda", "fastconv.cuda.tensor_core:MMA"))
for _name, _precision in (
    ("tf32", "medium"), ("tf32x3", "highest"), ("bf16", "medium"), ("bf16x3", "high"), ("bf16x6", "highest"),
):  # fmt: skip
    _object = f"fastconv.cuda.tensor_core:{_name.upper()}"
    register(Algorithm(f"implicit_gemm_{_name}", "cuda", _object, _precision))
for _products, _precision in ((6, "highest"), (3, "high"), (1, "medium")):
    _name = "implicit_gemm_bf16" + (f"x{_products}" if _products > 1 else "")
    register(Algorithm(_name, "cpu", f"fastconv.cpu.bfloat16:X{_products}", _precision))
