"""Arrays: which library one belongs to, views of it that kernels can take, and fresh ones.

The only module that knows other array libraries, and it imports none of them: an array of a library exists
only where that library is imported already. To add a library, write one class like :class:`TorchArrays`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import cache, cached_property, partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np

from . import blocks, calls, config
from .errors import ArgumentTypeError, DTypeError, MissingDependencyError, UnsupportedError

HALF = ("float16", "bfloat16")
FLOATING = ("float32", "float64", *HALF)
INTEGER8 = ("int8", "uint8")
# Elements from which an array lies in a block of memory that is used again.
LARGE = 1 << 15
# What kernels of a GPU take for granted of an address: their widest access.
ALIGNMENT = 16


class NumpyArrays:
    """numpy.ndarray, in place."""

    name, device = "numpy", "cpu"

    @staticmethod
    def owns(value: Any) -> bool:
        """Return True if `value` is an array of this library."""
        return isinstance(value, np.ndarray)

    @staticmethod
    def adopt(name: str, value: Any) -> np.ndarray:
        """Return an ndarray over the memory of `value`."""
        return value.view(np.ndarray) if type(value) is not np.ndarray else value

    @staticmethod
    def give_back(result: np.ndarray) -> Any:
        """Return the result as an array of this library."""
        return result

    @staticmethod
    def from_host(array: np.ndarray) -> np.ndarray:
        """Return the array."""
        return array

    @staticmethod
    def to_host(held: np.ndarray) -> np.ndarray:
        """Return the array."""
        return held

    # What the emulator does in place of a GPU's library, see `DeviceLibrary`.

    @staticmethod
    def matmul(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
        """Write the products of matrices side by side."""
        np.matmul(a, b, out=out)

    @staticmethod
    def rfftn(a: np.ndarray, out: np.ndarray) -> None:
        """Write the spectra of real planes."""
        out[...] = np.fft.rfftn(a, axes=tuple(range(1, a.ndim)))

    @staticmethod
    def irfftn(a: np.ndarray, out: np.ndarray) -> None:
        """Write the real planes of spectra."""
        out[...] = np.fft.irfftn(a, out.shape[1:], axes=tuple(range(1, a.ndim)))


class TorchArrays:
    """torch.Tensor on the CPU, sharing memory. Gradients flow through `fastconv.torch`, not here."""

    name, device = "torch", "cpu"

    @staticmethod
    def owns(value: Any) -> bool:
        """Return True if `value` is an array of this library."""
        torch = sys.modules.get("torch")
        return torch is not None and hasattr(torch, "Tensor") and isinstance(value, torch.Tensor)

    @staticmethod
    def adopt(name: str, value: Any) -> np.ndarray:
        """Return an ndarray over the memory of `value`."""
        torch = sys.modules["torch"]
        value = _plain_tensor(name, value)
        if value.dtype == torch.bfloat16:
            return value.view(torch.uint16).numpy().view(_bfloat16())
        return value.numpy()

    @staticmethod
    def give_back(result: np.ndarray) -> Any:
        """Return the result as an array of this library."""
        torch = sys.modules["torch"]
        if result.dtype.name == "bfloat16":
            return torch.from_numpy(result.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(result)


def _plain_tensor(name: str, value: Any) -> Any:
    """Return a tensor whose elements are what its memory holds; refuse one that records what is done to it."""
    if value.requires_grad:
        raise ArgumentTypeError(
            f"{name} is a tensor that requires grad; pass {name}.detach() and use the backward functions"
        )
    return value.resolve_neg().resolve_conj()


# --- arrays on a GPU -------------------------------------------------------------------------------------------


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
            held[...] = math.nan if dtype.kind != "i" else np.iinfo(dtype).max // 3
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
        self._cupy = sys.modules["cupy"]

    def adopt(self, name: str, value: Any) -> Any:
        # CuPy waits for the stream that the interface names.
        return DeviceArray(self, value if CupyArrays.owns(value) else self._cupy.asarray(value))

    def current(self) -> Any:
        return self._cupy.cuda.Device(self.index)

    def is_current(self) -> bool:
        return self._cupy.cuda.runtime.getDevice() == self.index

    def new(self, dimensions: tuple[int, ...], dtype: np.dtype) -> Any:
        return self._cupy.empty(dimensions, dtype)

    def from_host(self, array: np.ndarray) -> Any:
        with self.current():
            return self._cupy.asarray(array)

    def to_host(self, held: Any) -> np.ndarray:
        return self._cupy.asnumpy(held)

    def dtype_of(self, held: Any) -> np.dtype:
        return held.dtype

    def is_contiguous(self, held: Any) -> bool:
        return held.flags.c_contiguous

    def address_of(self, held: Any) -> int:
        return held.data.ptr

    def moved(self, held: Any, source: int, destination: int) -> Any:
        return self._cupy.moveaxis(held, source, destination)

    def take(self, held: Any, indices: np.ndarray, axis: int) -> Any:
        return self._cupy.take(held, self._cupy.asarray(indices), axis)

    def add_at(self, held: Any, source: Any, indices: np.ndarray, axis: int) -> None:
        held[(slice(None),) * axis + (self._cupy.asarray(indices),)] += source

    def copy(self, target: Any, source: Any) -> None:
        target[...] = source

    def stream(self) -> int:
        return self._cupy.cuda.get_current_stream().ptr

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
        return DeviceArray(self, _plain_tensor(name, value))

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
        return _bfloat16() if name == "bfloat16" else np.dtype(name)

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
    return _cupy_on(array.device.id).likeness(array)


def _torch_likeness(tensor: Any) -> Any:
    return _torch_on(tensor.device.index).likeness(tensor) if tensor.device.type == "cuda" else None


class CupyArrays:
    """cupy.ndarray: recognised without importing it."""

    @staticmethod
    def owns(value: Any) -> bool:
        """Return True if `value` is an array of this library."""
        cupy = sys.modules.get("cupy")
        return cupy is not None and hasattr(cupy, "ndarray") and isinstance(value, cupy.ndarray)


Library = type[NumpyArrays] | type[TorchArrays] | DeviceLibrary
LIBRARIES = (NumpyArrays, TorchArrays, CupyArrays)


def library_of(name: str, value: Any) -> Library:
    """Return the library that `value` belongs to; arrays on different GPUs count as of different ones."""
    if NumpyArrays.owns(value):
        return NumpyArrays
    if TorchArrays.owns(value):
        if value.device.type not in ("cpu", "cuda"):
            raise UnsupportedError(f"{name} is a tensor on {value.device}; there are no kernels for it yet")
        return TorchArrays if value.device.type == "cpu" else _torch_on(value.device.index)
    if CupyArrays.owns(value):
        return _cupy_on(value.device.id)
    if hasattr(value, "__cuda_array_interface__"):
        return _cupy_on(_cupy_for(name, value).asarray(value).device.id)
    raise ArgumentTypeError(
        f"{name} must be a NumPy array, a CuPy array or a PyTorch tensor, not {type(value).__name__}"
    )


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


def adopt(**named: Any) -> tuple[Library, list[Any]]:
    """Return the library that the arrays share and ndarrays over their memory; None stays None.

    Examples
    --------
    >>> library, (x, bias) = adopt(x=np.zeros(3), bias=None)
    >>> library.name, bias is None
    ('numpy', True)
    """
    library: Library | None = None
    first = ""
    for name, value in named.items():
        if value is None:
            continue
        found = library_of(name, value)
        if library is None:
            library, first = found, name
        elif library is not found:
            raise ArgumentTypeError(
                f"{name} is an array of {found.name} but {first} is one of {library.name}; use one library"
            )
    assert library is not None, "an operation takes at least one array"
    return library, [None if v is None else library.adopt(n, v) for n, v in named.items()]


def require_array(name: str, value: Any) -> Any:
    """Return `value`, or raise if an array that must be there is None."""
    if value is None:
        library_of(name, value)
    return value


def native(array: np.ndarray) -> np.ndarray:
    """Return the array in the machine's byte order, copied only if it is in the other."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def check_dtype(name: str, array: np.ndarray, allowed: tuple[str, ...]) -> None:
    """Raise DTypeError unless the array's dtype is one of `allowed`."""
    if array.dtype.name not in allowed:
        raise DTypeError(f"{name} must have dtype {', '.join(allowed)}, not {array.dtype}")


def check_same_dtype(name: str, array: np.ndarray, other: str, dtype: np.dtype) -> None:
    """Raise DTypeError unless the array has the dtype of another."""
    if array.dtype != dtype:
        raise DTypeError(f"{name} has dtype {array.dtype}, but {other} has {dtype}; they must be the same")


def compute_dtype(dtype: np.dtype) -> np.dtype:
    """Return the dtype that arithmetic is done in: float32 for half types, int32 for 8-bit integers."""
    if dtype.name in HALF:
        return np.dtype(np.float32)
    if dtype.name in INTEGER8:
        return np.dtype(np.int32)
    return dtype


def _bfloat16() -> np.dtype:
    try:
        import ml_dtypes
    except ImportError:
        raise MissingDependencyError("bfloat16 tensors need ml_dtypes: pip install 'fastconv[bfloat16]'") from None
    return np.dtype(ml_dtypes.bfloat16)


def empty(dimensions: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return a fresh C-contiguous array; with the option `poison`, full of NaN (of a large number for integers)."""
    if math.prod(dimensions) >= LARGE:
        dtype = np.dtype(dtype)
        array = blocks.take(math.prod(dimensions) * dtype.itemsize).view(dtype).reshape(dimensions)
    else:
        array = np.empty(dimensions, dtype)
    if config.get("poison"):
        array.fill(np.iinfo(array.dtype).max // 3 if array.dtype.kind in "iu" else np.nan)
    return array


def allocator(dimensions: tuple[int, ...], dtype: Any) -> Callable[[], np.ndarray]:
    """Return a function that makes such arrays as :func:`empty` does, while the options stay as they are."""
    small = math.prod(dimensions) < LARGE and not config.get("poison")
    return partial(np.empty if small else empty, dimensions, np.dtype(dtype))


def memory_format(array: np.ndarray, channel_axis_first: bool) -> str | None:
    """Return how a logically (N, C, ...) or (N, ..., C) array lies in memory, or None if neither way.

    Where both readings fit (one channel, one pixel), the array's own format wins.
    """
    formats = ("channels_first", "channels_last")
    own, other = formats if channel_axis_first else formats[::-1]
    if array.flags.c_contiguous:
        return own
    moved = np.moveaxis(array, 1, -1) if channel_axis_first else np.moveaxis(array, -1, 1)
    return other if moved.flags.c_contiguous else None


def in_format(array: np.ndarray, data_format: str, wanted: str, dtype: np.dtype) -> np.ndarray:
    """Return a batched array of `data_format` as a C-contiguous one of the `wanted` format and dtype.

    Copied only if its memory is not so already.
    """
    if data_format != wanted:
        array = np.moveaxis(array, 1, -1) if data_format == "channels_first" else np.moveaxis(array, -1, 1)
    if array.dtype == dtype and array.flags.c_contiguous and array.flags.aligned:
        return array if array.flags.writeable else _unlocked(array)
    fresh = empty(array.shape, dtype)
    np.copyto(fresh, array, casting="unsafe")
    return fresh


class _Unlocked:
    """Memory offered as writable; keeps its owner alive."""

    def __init__(self, array: np.ndarray) -> None:
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}
        self.owner = array


def _unlocked(array: np.ndarray) -> np.ndarray:
    """Return a writable view of a read-only array: kernels only read it, and compile once for both kinds."""
    return np.asarray(_Unlocked(array))


def out_format(array: np.ndarray, stored: str, data_format: str) -> np.ndarray:
    """Return a view in `data_format` of a batched array stored in another."""
    if stored == data_format:
        return array
    return np.moveaxis(array, -1, 1) if stored == "channels_last" else np.moveaxis(array, 1, -1)


def lift(array: np.ndarray, data_format: str) -> np.ndarray:
    """Return a batched C-contiguous array as one with three spatial dimensions, the missing ones of size 1."""
    missing = 5 - array.ndim
    if not missing:
        return array
    at = 2 if data_format == "channels_first" else 1
    return array.reshape(array.shape[:at] + (1,) * missing + array.shape[at:])


def device_address(name: str, value: Any) -> int:
    """Return the address of a C-contiguous array's first element in the memory of a GPU.

    From PyTorch's `data_ptr`, `__cuda_array_interface__` (CuPy, Numba) or DLPack, in this order.
    """
    if TorchArrays.owns(value):
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
    if TorchArrays.owns(value):
        return int(sys.modules["torch"].cuda.current_stream(value.device).cuda_stream)
    if CupyArrays.owns(value):
        return int(sys.modules["cupy"].cuda.get_current_stream().ptr)
    # The interface's 1 is the legacy default stream, 2 the one of each thread.
    stream = getattr(value, "__cuda_array_interface__", {}).get("stream") or 0
    return 0 if stream == 1 else int(stream)


def overlap(out: np.ndarray, *inputs: np.ndarray | None) -> bool:
    """Return True if `out` may share memory with an input."""
    return any(a is not None and np.may_share_memory(out, a) for a in inputs)
