"""What can compute a layer: fastconv's algorithms, and the libraries they are compared with, on the CPU or a GPU.

A provider turns a problem and a direction into a callable without arguments, whose operands are ready in the memory
layout it wants, and turns that callable's result into a channels-first NumPy array. To add a library or a device,
write one class with the attributes of :class:`Provider` and yield it from :func:`providers`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import numpy as np

import fastconv
from fastconv import registry, selection
from fastconv.arrays import NumpyArrays, TorchArrays
from fastconv.cpu import threads
from fastconv.device_arrays import DeviceLibrary
from fastconv.geometry import ConvGeometry

from .check import Problem

# On threads of their own: PyTorch's spin longer, and would hold up NumPy's BLAS.
if "torch" not in sys.modules:
    threads.load_openmp()

# Where fastconv's operands are: the host, or a GPU.
Library = type[NumpyArrays] | DeviceLibrary


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
    """One of fastconv's algorithms, on arrays of a library."""

    is_peer = False

    def __init__(
        self, name: str, data_format: str, precision: str, is_auto: bool, workspace_bytes: int | None,
        library: Library = NumpyArrays,
    ) -> None:  # fmt: skip
        self.name, self.data_format, self.precision = name, data_format, precision
        self.is_auto, self.workspace_bytes, self._library = is_auto, workspace_bytes, library

    def prepare(self, problem: Problem, direction: str) -> Callable[[], Any]:
        """Return a call of the public operation."""
        how = {
            **problem.workload.arguments,
            "data_format": self.data_format,
            "algorithm": self.name,
            "precision": self.precision,
        }
        x, grad = (_in_format(a, self.data_format) for a in (problem.x, problem.grad))
        x, weight, grad = map(self._library.from_host, (x, problem.weight, grad))
        name = f"conv{problem.geometry.spatial_dims}d"
        if direction == "forward":
            return partial(getattr(fastconv, name), x, weight, **how)
        backward, need = getattr(fastconv, name + "_backward"), direction.removesuffix("_grad")
        return lambda: getattr(backward(grad, x, weight, needs=(need,), **how), need)

    def as_numpy(self, result: Any, direction: str) -> np.ndarray:
        """Return the result as a channels-first array."""
        found = self._library.to_host(result)
        moved = self.data_format == "channels_last" and direction != "weight_grad"
        return np.moveaxis(found, -1, 1) if moved else found


def _in_format(array: np.ndarray, data_format: str) -> np.ndarray:
    return array if data_format == "channels_first" else np.ascontiguousarray(np.moveaxis(array, 1, -1))


class TorchProvider:
    """PyTorch (oneDNN for most layers, cuDNN on a GPU), contiguous or with the channels last in memory.

    Operands, weight included, are in that layout beforehand, as in a model that has been converted.
    """

    name, is_peer, is_auto = "torch", True, False
    workspace_bytes: int | None = None

    def __init__(self, data_format: str, device: str = "cpu") -> None:
        self.data_format, self._device = data_format, device

    def prepare(self, problem: Problem, direction: str) -> Callable[[], Any]:
        """Return a call of PyTorch's convolution or of its gradient."""
        g = problem.geometry
        if g.padding_mode != "zeros" or any(before != after for before, after in g.padding):
            raise fastconv.UnsupportedError("PyTorch's convolution pads with zeros, the same on both sides")
        if self._device != "cpu":
            set_cudnn(tf32=False)
        return torch_convolution(g, direction, *map(self._tensor, (problem.x, problem.weight, problem.grad)))

    def _tensor(self, array: np.ndarray) -> Any:
        import torch

        tensor = TorchArrays.give_back(array).to(self._device)
        if self.data_format == "channels_last":
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            return tensor.to(memory_format=formats[tensor.ndim])
        return tensor

    def as_numpy(self, result: Any, direction: str) -> np.ndarray:
        """Return the result as a channels-first array."""
        return TorchArrays.adopt("result", result.cpu())


def torch_convolution(geometry: ConvGeometry, direction: str, x: Any, weight: Any, grad: Any) -> Callable[[], Any]:
    """Return a call of PyTorch's convolution or of its gradient; padding is the same on both sides."""
    import torch

    g = geometry
    how = [list(sizes) for sizes in (g.stride, [before for before, _ in g.padding], g.dilation)]
    if direction == "forward":
        convolve = getattr(torch.nn.functional, f"conv{g.spatial_dims}d")
        return torch.inference_mode()(partial(convolve, x, weight, None, *how, g.groups))
    mask = [direction == "input_grad", direction == "weight_grad", False]
    gradients = partial(
        torch.ops.aten.convolution_backward,
        grad, x, weight, None, *how, False, [0] * g.spatial_dims, g.groups, mask,
    )  # fmt: skip
    return torch.inference_mode()(partial(_item, gradients, mask.index(True)))


def set_cudnn(tf32: bool) -> None:
    """Let cuDNN measure which of its algorithms is the fastest, and use TF32 for float32 or not, from now on."""
    import torch

    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, tf32


def _item(call: Callable[[], Any], index: int) -> Any:
    return call()[index]


def providers(
    problem: Problem,
    direction: str,
    data_formats: Sequence[str],
    precision: str,
    algorithms: Sequence[str] | None = None,
    with_torch: bool = True,
    library: Library = NumpyArrays,
) -> Iterator[Provider]:
    """Yield what is to be measured on one layer, with arrays of a library.

    Without `algorithms`, fastconv's that support the layer (one that only lacks workspace is included: it says so);
    otherwise those named, whether they can do it or not.
    """
    for data_format in data_formats:
        yield from _fastconv(problem, direction, data_format, precision, algorithms, library)
    device = _kind(library)
    if with_torch and torch_problem(device) is None:
        yield TorchProvider("channels_first", device)
        # PyTorch has no such layout for signals.
        if problem.geometry.spatial_dims > 1:
            yield TorchProvider("channels_last", device)


def _kind(library: Library) -> str:
    return "cpu" if library.device == "cpu" else "cuda"


def _fastconv(
    problem: Problem, direction: str, data_format: str, precision: str, algorithms: Sequence[str] | None,
    library: Library,
) -> Iterator[FastconvProvider]:  # fmt: skip
    geometry, device = problem.workload.geometry(data_format, problem.dtype), library.device
    known = {c.name: c for c in selection.algorithms(geometry, device, direction=direction, precision=precision)}
    auto = selection.choose(geometry, direction, data_format, device, "auto", precision).algorithm.name
    if algorithms is None:
        names = [c.name for c in known.values() if c.supported or c.workspace_bytes is not None]
    else:
        names = list(dict.fromkeys(n for a in algorithms for n in ([auto] if a == "auto" else _variants(a, library))))
    for name in names:
        size = known[name].workspace_bytes if name in known else None
        yield FastconvProvider(name, data_format, precision, name == auto, size, library)


def _variants(algorithm: str, library: Library) -> list[str]:
    return [a.name for a in registry.named(algorithm, _kind(library))] or [algorithm]


def torch_problem(device: str = "cpu") -> str | None:
    """Return why PyTorch cannot be compared with on "cpu" or "cuda", or None if it can."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed (pip install 'fastconv[torch]')"
    try:
        import torch
    except Exception as error:
        return f"PyTorch does not load ({type(error).__name__}: {error})"
    return None if device == "cpu" or torch.cuda.is_available() else f"PyTorch {torch.__version__} sees no GPU"


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
