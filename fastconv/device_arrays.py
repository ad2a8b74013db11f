"""Arrays on a GPU: of CuPy and of PyTorch, with the words that operations and launches use.

The other half of `arrays`, loaded once an array is met that lies on a GPU, or one is wanted there. To add a library,
write one class like :class:`_CupyOnDevice`.
"""

from __future__ import annotations

import math
import sys
from functools import cache, cached_property
from importlib import import_module
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import numpy as np

from . import calls, config
from .arrays import TorchArrays, bfloat16, is_tensor, plain_tensor
from .errors import ArgumentTypeError, MissingDependencyError, UnsupportedError

# What kernels of a GPU take for granted of an address: their widest access.
ALIGNMENT = 16


class DeviceArray:
    """An array of a library on a GPU, with the words of an ndarray that operations use.

    Attributes
    ----------
    held : array of the library
    library : DeviceLibrary
    shape : tuple of int
    dtype : numpy.dtype
    """

    __slots__ = ("dtype", "held", "library", "shape")
    flags = SimpleNamespace(writeable=True)

    def __init__(self, library: DeviceLibrary, held: Any) -> None:
        self.library, self.held = library, held
        self.shape, self.dtype = tuple(held.shape), library.dtype_of(held)

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.size * self.dtype.itemsize

    @property
    def address(self) -> int:
        """Address of the first element."""
        return self.library.address_of(self.held)

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in C order without gaps."""
        return self.library.is_contiguous(self.held)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> DeviceArray:
        return DeviceArray(self.library, self.held[index])

    def take(self, indices: np.ndarray, axis: int) -> DeviceArray:
        """Return the elements at indices along an axis, as a fresh array."""
        return DeviceArray(self.library, self.library.take(self.held, indices, axis))

    def add_at(self, source: DeviceArray, indices: np.ndarray, axis: int) -> None:
        """Add an array to the elements at indices along an axis, no two the same."""
        self.library.add_at(self.held, source.held, indices, axis)

    def moved(self, source: int, destination: int) -> DeviceArray:
        """Return a view with an axis in another place."""
        return DeviceArray(self.library, self.library.moved(self.held, source, destination))

    def reshape(self, shape: tuple[int, ...]) -> DeviceArray:
        """Return a contiguous array in another shape."""
        return DeviceArray(self.library, self.held.reshape(shape))

    def fill_from(self, source: DeviceArray) -> None:
        """Copy the elements of another array of the shape, converted."""
        self.library.copy(self.held, source.held)


class DeviceLibrary:
    """A library's arrays on one GPU; a subclass per library."""

    library = ""

    def __init__(self, index: int) -> None:
        self.index = index

    @property
    def name(self) -> str:
        """Such as "cupy on GPU 0"."""
        return f"{self.library} on GPU {self.index}"

    @cached_property
    def device(self) -> str:
        """The architecture that kernels are compiled for; UnsupportedError without a driver."""
        from .cuda import launch

        with self.current():
            return launch.architecture()

    def adopt(self, name: str, value: Any) -> Any:
        """Return a DeviceArray over the memory of `value`."""
        return DeviceArray(self, value)

    def give_back(self, result: Any) -> Any:
        """Return the result as an array of this library; one that nothing was computed for is made on the host."""
        return result.held if isinstance(result, DeviceArray) else self.from_host(result)

    def empty(self, dimensions: tuple[int, ...], dtype: np.dtype) -> DeviceArray:
        """Return a fresh C-contiguous array; with the option `poison`, full of NaN."""
        held = self.new(dimensions, dtype)
        if config.get("poison"):
            held[...] = math.nan if dtype.kind not in "iu" else np.iinfo(dtype).max // 3
        return DeviceArray(self, held)

    def current(self) -> Any:
        """Return a context in which this GPU is the current one."""
        raise NotImplementedError

    def is_current(self) -> bool:
        """Return whether this GPU is the current one."""
        raise NotImplementedError

    def likeness(self, held: Any) -> Any:
        """Return what is equal for arrays that kernels cannot tell apart, None for one they do not take as it is."""
        if not self.is_contiguous(held) or self.address_of(held) % ALIGNMENT:
            return None
        return self, tuple(held.shape), held.dtype

    def new(self, dimensions: tuple[int, ...], dtype: np.dtype) -> Any:
        """Return fresh memory."""
        raise NotImplementedError

    def from_host(self, array: np.ndarray) -> Any:
        """Return a copy of a NumPy array."""
        raise NotImplementedError

    def to_host(self, held: Any) -> np.ndarray:
        """Return a copy as a NumPy array, once it has been computed."""
        raise NotImplementedError

    def dtype_of(self, held: Any) -> np.dtype:
        """Return the dtype as NumPy names it."""
        raise NotImplementedError

    def is_contiguous(self, held: Any) -> bool:
        """Return whether an array lies in C order."""
        raise NotImplementedError

    def address_of(self, held: Any) -> int:
        """Return the address of the first element."""
        raise NotImplementedError

    def moved(self, held: Any, source: int, destination: int) -> Any:
        """Return a view with an axis in another place."""
        raise NotImplementedError

    def take(self, held: Any, indices: np.ndarray, axis: int) -> Any:
        """Return the elements at indices along an axis."""
        raise NotImplementedError

    def add_at(self, held: Any, source: Any, indices: np.ndarray, axis: int) -> None:
        """Add to the elements at indices along an axis, no two the same."""
        raise NotImplementedError

    def copy(self, target: Any, source: Any) -> None:
        """Copy elements, converted, on the current stream."""
        raise NotImplementedError

    def stream(self) -> int:
        """Return the handle of the current stream; 0 is the default stream."""
        raise NotImplementedError

    # What `steps.Call` names, on the current stream; arrays are contiguous.

    def matmul(self, a: Any, b: Any, out: Any) -> None:
        """Write the products of matrices side by side, (batch, rows, depth) by (batch, depth, columns), to `out`."""
        raise NotImplementedError

    def rfftn(self, a: Any, out: Any) -> None:
        """Write the spectra of real arrays side by side, transformed along all axes but the first, to `out`."""
        raise NotImplementedError

    def irfftn(self, a: Any, out: Any) -> None:
        """Write what the spectra `a` are the spectra of to `out`."""
        raise NotImplementedError


class _CupyOnDevice(DeviceLibrary):
    """cupy.ndarray, in place, and what offers its memory by `__cuda_array_interface__`: results are CuPy's."""

    library = "cupy"

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self._cupy = cupy = sys.modules["cupy"]
        # Asked in every call.
        self._current_device, self._current_stream = cupy.cuda.runtime.getDevice, cupy.cuda.get_current_stream

    def adopt(self, name: str, value: Any) -> Any:
        # CuPy waits for the stream that the interface names.
        return DeviceArray(self, value if _is_cupy(value) else self._cupy.asarray(value))

    def current(self) -> Any:
        return self._cupy.cuda.Device(self.index)

    def is_current(self) -> bool:
        return self._current_device() == self.index

    def new(self, dimensions: tuple[int, ...], dtype: np.dtype) -> Any:
        return self._cupy.empty(dimensions, dtype)

    def from_host(self, array: np.ndarray) -> Any:
        with self.current():
            return self._cupy.asarray(array)

    def to_host(self, held: Any) -> np.ndarray:
        return self._cupy.asnumpy(held)

    def dtype_of(self, held: Any) -> np.dtype:
        return held.dtype

    # In C: they are asked of every array of every call.
    is_contiguous = staticmethod(attrgetter("flags.c_contiguous"))  # type: ignore[assignment]
    address_of = staticmethod(attrgetter("data.ptr"))  # type: ignore[assignment]

    def moved(self, held: Any, source: int, destination: int) -> Any:
        return self._cupy.moveaxis(held, source, destination)

    def take(self, held: Any, indices: np.ndarray, axis: int) -> Any:
        return self._cupy.take(held, self._cupy.asarray(indices), axis)

    def add_at(self, held: Any, source: Any, indices: np.ndarray, axis: int) -> None:
        held[(slice(None),) * axis + (self._cupy.asarray(indices),)] += source

    def copy(self, target: Any, source: Any) -> None:
        target[...] = source

    def stream(self) -> int:
        return self._current_stream().ptr

    def matmul(self, a: Any, b: Any, out: Any) -> None:
        self._cupy.matmul(a, b, out=out)

    def rfftn(self, a: Any, out: Any) -> None:
        out[...] = self._cupy.fft.rfftn(a, axes=tuple(range(1, a.ndim)))

    def irfftn(self, a: Any, out: Any) -> None:
        out[...] = self._cupy.fft.irfftn(a, out.shape[1:], axes=tuple(range(1, a.ndim)))


class _TorchOnDevice(DeviceLibrary):
    """torch.Tensor on a GPU, in place. Gradients flow through `fastconv.torch`, not here."""

    library = "torch"

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self._torch = sys.modules["torch"]

    def adopt(self, name: str, value: Any) -> Any:
        return DeviceArray(self, plain_tensor(name, value))

    def current(self) -> Any:
        return self._torch.cuda.device(self.index)

    def is_current(self) -> bool:
        return self._torch.cuda.current_device() == self.index

    def likeness(self, held: Any) -> Any:
        # Tensors that record what is done to them go the long way, where they are refused.
        if held.requires_grad or held.is_neg() or held.is_conj():
            return None
        return super().likeness(held)

    def new(self, dimensions: tuple[int, ...], dtype: np.dtype) -> Any:
        return self._torch.empty(dimensions, dtype=getattr(self._torch, dtype.name), device=f"cuda:{self.index}")

    def from_host(self, array: np.ndarray) -> Any:
        return TorchArrays.give_back(array).to(f"cuda:{self.index}")

    def to_host(self, held: Any) -> np.ndarray:
        return TorchArrays.adopt("held", held.cpu())

    def dtype_of(self, held: Any) -> np.dtype:
        name = str(held.dtype).removeprefix("torch.")
        return bfloat16() if name == "bfloat16" else np.dtype(name)

    def is_contiguous(self, held: Any) -> bool:
        return held.is_contiguous()

    def address_of(self, held: Any) -> int:
        return held.data_ptr()

    def moved(self, held: Any, source: int, destination: int) -> Any:
        return held.movedim(source, destination)

    def take(self, held: Any, indices: np.ndarray, axis: int) -> Any:
        return held.index_select(axis, self.from_host(indices))

    def add_at(self, held: Any, source: Any, indices: np.ndarray, axis: int) -> None:
        held.index_add_(axis, self.from_host(indices), source)

    def copy(self, target: Any, source: Any) -> None:
        target.copy_(source)

    def stream(self) -> int:
        return self._torch.cuda.current_stream(self.index).cuda_stream

    def matmul(self, a: Any, b: Any, out: Any) -> None:
        self._torch.bmm(a, b, out=out)

    def rfftn(self, a: Any, out: Any) -> None:
        out.copy_(self._torch.fft.rfftn(a, dim=tuple(range(1, a.ndim))))

    def irfftn(self, a: Any, out: Any) -> None:
        out.copy_(self._torch.fft.irfftn(a, out.shape[1:], dim=tuple(range(1, a.ndim))))


@cache
def _cupy_on(index: int) -> _CupyOnDevice:
    """Return the one object for CuPy on a GPU: arrays are of one library if it is the same."""
    # From now on calls with such arrays are told apart.
    calls.readers[sys.modules["cupy"].ndarray] = _cupy_likeness
    return _CupyOnDevice(index)


@cache
def _torch_on(index: int) -> _TorchOnDevice:
    """Return the one object for PyTorch on a GPU."""
    torch = sys.modules["torch"]
    for kind in (torch.Tensor, torch.nn.Parameter):
        calls.readers[kind] = _torch_likeness
    return _TorchOnDevice(index)


def _cupy_likeness(array: Any) -> Any:
    """Return what `likeness` does, in as few words as can be."""
    memory = array.data
    if memory.ptr % ALIGNMENT or not array.flags.c_contiguous:
        return None
    return memory.device_id, array.shape, array.dtype


def _torch_likeness(tensor: Any) -> Any:
    return _torch_on(tensor.device.index).likeness(tensor) if tensor.device.type == "cuda" else None


def _is_cupy(value: Any) -> bool:
    return isinstance(value, getattr(sys.modules.get("cupy"), "ndarray", ()))


def library_of(name: str, value: Any) -> DeviceLibrary | None:
    """Return the library and the GPU that `value` belongs to, None if it lies on none."""
    if is_tensor(value):
        if value.device.type != "cuda":
            raise UnsupportedError(f"{name} is a tensor on {value.device}; there are no kernels for it yet")
        return _torch_on(value.device.index)
    if _is_cupy(value):
        return _cupy_on(value.device.id)
    if hasattr(value, "__cuda_array_interface__"):
        return _cupy_on(_cupy_for(name, value).asarray(value).device.id)
    return None


def _cupy_for(name: str, value: Any) -> Any:
    """Return CuPy, which reads and allocates for the arrays of smaller libraries."""
    try:
        return import_module("cupy")
    except ImportError:
        raise MissingDependencyError(
            f"{name} is a {type(value).__name__} on a GPU, which needs CuPy: pip install 'fastconv[cuda13]' "
            f"(or 'fastconv[cuda12]')"
        ) from None


def gpu_library() -> DeviceLibrary:
    """Return a library that allocates on the current GPU: CuPy, or else PyTorch; UnsupportedError if there is none."""
    from .cuda import launch

    # Its error says most of a machine without a GPU.
    launch.driver()
    for name, on, current in (
        ("cupy", _cupy_on, lambda module: module.cuda.runtime.getDevice()),
        ("torch", _torch_on, lambda module: module.cuda.current_device() if module.cuda.is_available() else None),
    ):
        try:
            index = current(import_module(name))
        except ImportError:
            continue
        if index is not None:
            return on(index)
    raise UnsupportedError("work on a GPU needs CuPy or PyTorch there: pip install 'fastconv[cuda13]' (or [cuda12])")


def device_address(name: str, value: Any) -> int:
    """Return the address of a C-contiguous array's first element in the memory of a GPU.

    From PyTorch's `data_ptr`, `__cuda_array_interface__` (CuPy, Numba) or DLPack, in this order.
    """
    if is_tensor(value):
        if value.device.type != "cuda":
            raise ArgumentTypeError(f"{name} must be on a GPU, not on {value.device}")
        if not value.is_contiguous():
            raise ArgumentTypeError(f"{name} must be C-contiguous")
        return int(value.data_ptr())
    interface = getattr(value, "__cuda_array_interface__", None)
    if interface is not None:
        if interface.get("strides") is not None and not _is_contiguous(interface):
            raise ArgumentTypeError(f"{name} must be C-contiguous")
        return int(interface["data"][0])
    if hasattr(value, "__dlpack__") and not isinstance(value, np.ndarray):
        from cuda.core.utils import StridedMemoryView

        view = StridedMemoryView.from_dlpack(value, stream_ptr=-1)
        if not view.is_device_accessible:
            raise ArgumentTypeError(f"{name} must be on a GPU")
        if view.strides is not None and tuple(view.strides) != _strides(view.shape, 1):
            raise ArgumentTypeError(f"{name} must be C-contiguous")
        return int(view.ptr)
    raise ArgumentTypeError(f"{name} must be an array on a GPU, not {type(value).__name__}")


def _is_contiguous(interface: dict[str, Any]) -> bool:
    itemsize = np.dtype(interface["typestr"]).itemsize
    return tuple(interface["strides"]) == _strides(interface["shape"], itemsize)


def _strides(shape: Any, step: int) -> tuple[int, ...]:
    return tuple(step * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def stream_handle(value: Any) -> int:
    """Return the handle of the stream on which an array's library works at present; 0 is the default stream."""
    if is_tensor(value):
        return int(sys.modules["torch"].cuda.current_stream(value.device).cuda_stream)
    if _is_cupy(value):
        return int(sys.modules["cupy"].cuda.get_current_stream().ptr)
    # The interface's 1 is the legacy default stream, 2 the one of each thread.
    stream = getattr(value, "__cuda_array_interface__", {}).get("stream") or 0
    return 0 if stream == 1 else int(stream)
