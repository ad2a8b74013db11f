"""What can compute a layer: fastconv's algorithms, and the libraries they are compared with.

A provider turns a problem and a direction into a callable without arguments, whose operands are ready in the memory
layout it wants, and turns that callable's result into a channels-first NumPy array. To add a library or a device,
write one class with the attributes of :class:`Provider` and yield it from :func:`providers`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import numpy as np

import fastconv
from fastconv import registry, selection
from fastconv.arrays import TorchArrays

from .check import Problem


class Provider(Protocol):
    """One way to compute a layer.

    Attributes
    ----------
    name : str
        An algorithm's, or the library's.
    data_format : str
        How its operands lie in memory.
    is_peer : bool
        True for another library: the fastest of them is the reference.
    is_auto : bool
        Whether fastconv would take it by itself.
    workspace_bytes : int or None
        Memory beside operands and result, where it is known.
    """

    name: str
    data_format: str
    is_peer: bool
    is_auto: bool
    workspace_bytes: int | None

    def prepare(self, problem: Problem, direction: str) -> Callable[[], Any]:
        """Return what is timed; raises UnsupportedError if it cannot do this."""
        ...

    def as_numpy(self, result: Any, direction: str) -> np.ndarray:
        """Return a result of that callable as a channels-first array."""
        ...


class FastconvProvider:
    """One of fastconv's algorithms, on NumPy arrays."""

    is_peer = False

    def __init__(self, name: str, data_format: str, precision: str, is_auto: bool, workspace_bytes: int | None) -> None:
        self.name, self.data_format, self.precision = name, data_format, precision
        self.is_auto, self.workspace_bytes = is_auto, workspace_bytes

    def prepare(self, problem: Problem, direction: str) -> Callable[[], Any]:
        """Return a call of the public operation."""
        how = {
            **problem.workload.arguments,
            "data_format": self.data_format,
            "algorithm": self.name,
            "precision": self.precision,
        }
        x, grad = (_in_format(a, self.data_format) for a in (problem.x, problem.grad))
        name = f"conv{problem.geometry.spatial_dims}d"
        if direction == "forward":
            return partial(getattr(fastconv, name), x, problem.weight, **how)
        backward, need = getattr(fastconv, name + "_backward"), direction.removesuffix("_grad")
        return lambda: getattr(backward(grad, x, problem.weight, needs=(need,), **how), need)

    def as_numpy(self, result: Any, direction: str) -> np.ndarray:
        """Return the result as a channels-first array."""
        moved = self.data_format == "channels_last" and direction != "weight_grad"
        return np.moveaxis(result, -1, 1) if moved else result


def _in_format(array: np.ndarray, data_format: str) -> np.ndarray:
    return array if data_format == "channels_first" else np.ascontiguousarray(np.moveaxis(array, 1, -1))


class TorchProvider:
    """PyTorch on the CPU (oneDNN for most layers), contiguous or with the channels last in memory.

    Operands, weight included, are in that layout beforehand, as in a model that has been converted.
    """

    name, is_peer, is_auto = "torch", True, False
    workspace_bytes: int | None = None

    def __init__(self, data_format: str) -> None:
        self.data_format = data_format

    def prepare(self, problem: Problem, direction: str) -> Callable[[], Any]:
        """Return a call of PyTorch's convolution or of its gradient."""
        import torch

        g = problem.geometry
        if g.padding_mode != "zeros" or any(before != after for before, after in g.padding):
            raise fastconv.UnsupportedError("PyTorch's convolution pads with zeros, the same on both sides")
        x, weight, grad = (self._tensor(a) for a in (problem.x, problem.weight, problem.grad))
        stride, padding, dilation = (list(s) for s in (g.stride, [b for b, _ in g.padding], g.dilation))
        if direction == "forward":
            convolve = getattr(torch.nn.functional, f"conv{g.spatial_dims}d")
            call = partial(convolve, x, weight, None, stride, padding, dilation, g.groups)
        else:
            mask = [direction == "input_grad", direction == "weight_grad", False]
            gradients = partial(
                torch.ops.aten.convolution_backward,
                grad, x, weight, None, stride, padding, dilation, False, [0] * g.spatial_dims, g.groups, mask,
            )  # fmt: skip
            call = partial(_item, gradients, mask.index(True))
        return torch.inference_mode()(call)

    def _tensor(self, array: np.ndarray) -> Any:
        import torch

        tensor = TorchArrays.give_back(array)
        if self.data_format == "channels_last":
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            return tensor.to(memory_format=formats[tensor.ndim])
        return tensor

    def as_numpy(self, result: Any, direction: str) -> np.ndarray:
        """Return the result as a channels-first array."""
        return TorchArrays.adopt("result", result)


def _item(call: Callable[[], Any], index: int) -> Any:
    return call()[index]


def providers(
    problem: Problem,
    direction: str,
    data_formats: Sequence[str],
    precision: str,
    algorithms: Sequence[str] | None = None,
    with_torch: bool = True,
) -> Iterator[Provider]:
    """Yield what is to be measured on one layer.

    Without `algorithms`, fastconv's that support the layer (one that only lacks workspace is included: it says so);
    otherwise those named, whether they can do it or not.
    """
    for data_format in data_formats:
        yield from _fastconv(problem, direction, data_format, precision, algorithms)
    if with_torch and torch_problem() is None:
        yield TorchProvider("channels_first")
        # PyTorch has no such layout for signals.
        if problem.geometry.spatial_dims > 1:
            yield TorchProvider("channels_last")


def _fastconv(
    problem: Problem, direction: str, data_format: str, precision: str, algorithms: Sequence[str] | None
) -> Iterator[FastconvProvider]:
    geometry = problem.workload.geometry(data_format, problem.dtype)
    known = {c.name: c for c in selection.algorithms(geometry, direction=direction, precision=precision)}
    auto = selection.choose(geometry, direction, data_format, "cpu", "auto", precision).algorithm.name
    if algorithms is None:
        names = [c.name for c in known.values() if c.supported or c.workspace_bytes is not None]
    else:
        names = list(dict.fromkeys(n for a in algorithms for n in ([auto] if a == "auto" else _variants(a))))
    for name in names:
        size = known[name].workspace_bytes if name in known else None
        yield FastconvProvider(name, data_format, precision, name == auto, size)


def _variants(algorithm: str) -> list[str]:
    return [a.name for a in registry.named(algorithm, "cpu")] or [algorithm]


def torch_problem() -> str | None:
    """Return why PyTorch cannot be compared with, or None if it can."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed (pip install 'fastconv[torch]')"
    try:
        import torch  # noqa: F401
    except Exception as error:
        return f"PyTorch does not load ({type(error).__name__}: {error})"
    return None


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Hold PyTorch to as many threads inside the block; None leaves it as it is."""
    if count is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
