"""Arrays: which library one belongs to, views of it that kernels can take, and fresh ones.

This module and `device_arrays`, which is about arrays on a GPU, are the only ones that know other array libraries, and
they import none of them: an array of a library exists only where that library is imported already. To add a library,
write one class like :class:`TorchArrays`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from . import blocks, config
from .errors import ArgumentTypeError, DTypeError, MissingDependencyError

if TYPE_CHECKING:
    from .device_arrays import DeviceLibrary

HALF = ("float16", "bfloat16")
FLOATING = ("float32", "float64", *HALF)
INTEGER8 = ("int8", "uint8")
# Elements from which an array lies in a block of memory that is used again.
LARGE = 1 << 15


class NumpyArrays:
    """numpy.ndarray, in place."""

    name, device = "numpy", "cpu"

    @staticmethod
    def adopt(name: str, value: Any) -> np.ndarray:
        """Return an ndarray over the memory of `value`."""
        if type(value) is np.ndarray:
            return value
        if isinstance(value, np.ma.MaskedArray):
            raise ArgumentTypeError(f"{name} is a masked array, and its mask would be lost; pass {name}.filled(0)")
        return value.view(np.ndarray)

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

    # What the emulator does in place of a GPU's library, see `device_arrays.DeviceLibrary`.

    @staticmethod
    def matmul(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
        """Write the products of matrices side by side, summed in float32 at least."""
        np.matmul(a, b, out=out, dtype=np.result_type(out.dtype, np.float32), casting="same_kind")

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
    def adopt(name: str, value: Any) -> np.ndarray:
        """Return an ndarray over the memory of `value`."""
        torch = sys.modules["torch"]
        value = plain_tensor(name, value)
        if value.dtype == torch.bfloat16:
            return value.view(torch.uint16).numpy().view(bfloat16())
        return value.numpy()

    @staticmethod
    def give_back(result: np.ndarray) -> Any:
        """Return the result as an array of this library."""
        torch = sys.modules["torch"]
        if result.dtype.name == "bfloat16":
            return torch.from_numpy(result.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(result)


def is_tensor(value: Any) -> bool:
    """Return whether `value` is a tensor of PyTorch, on any device."""
    return isinstance(value, getattr(sys.modules.get("torch"), "Tensor", ()))


def plain_tensor(name: str, value: Any) -> Any:
    """Return a tensor whose elements are what its memory holds; refuse one that records what is done to it."""
    if value.requires_grad:
        raise ArgumentTypeError(
            f"{name} is a tensor that requires grad: fastconv.torch has the functions with gradients; "
            f"here pass {name}.detach() and use the backward functions"
        )
    return value.resolve_neg().resolve_conj()


Library: TypeAlias = "type[NumpyArrays] | type[TorchArrays] | DeviceLibrary"


def library_of(name: str, value: Any) -> Library:
    """Return the library that `value` belongs to; arrays on different GPUs count as of different ones."""
    if isinstance(value, np.ndarray):
        return NumpyArrays
    if is_tensor(value) and value.device.type == "cpu":
        return TorchArrays
    from . import device_arrays

    found = device_arrays.library_of(name, value)
    if found is None:
        of_jax = isinstance(value, getattr(sys.modules.get("jax"), "Array", ()))
        raise ArgumentTypeError(
            f"{name} must be a NumPy array, a CuPy array or a PyTorch tensor, not {type(value).__name__}"
            + (": fastconv.jax has the functions of JAX arrays" if of_jax else "")
        )
    return found


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


def bfloat16() -> np.dtype:
    """Return the dtype that `ml_dtypes` brings."""
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


def overlap(out: np.ndarray, *inputs: np.ndarray | None) -> bool:
    """Return True if `out` may share memory with an input."""
    return any(a is not None and np.may_share_memory(out, a) for a in inputs)
