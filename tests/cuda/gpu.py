"""A GPU of Python: a module like CuPy whose arrays lie in host memory, and a driver that emulates what is launched."""

from __future__ import annotations

import contextlib
import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba.cuda import types
from numba.cuda.np import numpy_support

from fastconv.arrays import NumpyArrays
from fastconv.cuda.compile import CompiledKernel
from fastconv.cuda.emulator import emulate


class ndarray:
    """An array with those members of cupy.ndarray that fastconv uses; no other, so that no other is used."""

    def __init__(self, host: np.ndarray) -> None:
        self.host = host
        self.device = SimpleNamespace(id=0)
        self.data = SimpleNamespace(ptr=host.__array_interface__["data"][0], device_id=0)

    shape = property(lambda self: self.host.shape)
    ndim = property(lambda self: self.host.ndim)
    dtype = property(lambda self: self.host.dtype)
    flags = property(lambda self: SimpleNamespace(c_contiguous=self.host.flags.c_contiguous))

    def __getitem__(self, index: Any) -> ndarray:
        return ndarray(self.host[_plain(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        self.host[_plain(index)] = _plain(value)

    def __iadd__(self, other: ndarray) -> ndarray:
        self.host += other.host
        return self

    def reshape(self, shape: tuple[int, ...]) -> ndarray:
        return ndarray(self.host.reshape(shape))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value.host if isinstance(value, ndarray) else value


class Memory:
    """What has been allocated, so that an address leads to an array that ends where the allocation does."""

    def __init__(self) -> None:
        self.blocks: list[np.ndarray] = []

    def new(self, shape: tuple[int, ...], dtype: Any, offset: int = 0) -> np.ndarray:
        """Return an array that begins `offset` bytes past a multiple of 256, full of NaN bits."""
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        whole = np.full(nbytes + 512 + offset, 0xFF, np.uint8)
        start = -whole.__array_interface__["data"][0] % 256 + offset
        block = whole[start : start + nbytes]
        self.blocks.append(block)
        return block.view(dtype).reshape(shape)

    def at(self, address: int, dtype: np.dtype) -> np.ndarray:
        """Return the elements from an address on."""
        for block in self.blocks:
            inside = address - block.__array_interface__["data"][0]
            if 0 <= inside < block.nbytes:
                rest = block[inside:]
                return rest[: rest.nbytes // dtype.itemsize * dtype.itemsize].view(dtype)
        assert address == 0, f"a kernel is given the address {address}, where nothing is"
        return np.empty(0, dtype)


class Cupy:
    """A module like CuPy."""

    ndarray = ndarray

    def __init__(self) -> None:
        self.memory, self.stream = Memory(), 0
        self.fft = SimpleNamespace(rfftn=self._rfftn, irfftn=self._irfftn)
        self.cuda = SimpleNamespace(
            Device=lambda index: contextlib.nullcontext(),
            get_current_stream=lambda: SimpleNamespace(ptr=self.stream),
            runtime=SimpleNamespace(getDevice=lambda: 0),
        )

    def empty(self, shape: tuple[int, ...], dtype: Any) -> ndarray:
        return ndarray(self.memory.new(shape, dtype))

    def asarray(self, host: Any, offset: int = 0) -> ndarray:
        if hasattr(host, "__cuda_array_interface__"):
            return host.held
        fresh = self.memory.new(host.shape, host.dtype, offset)
        fresh[...] = host
        return ndarray(fresh)

    def asnumpy(self, array: ndarray) -> np.ndarray:
        return array.host.copy()

    def matmul(self, a: ndarray, b: ndarray, out: ndarray) -> None:
        # CuPy copies what is not contiguous.
        assert all(array.host.flags.c_contiguous and array.ndim == 3 for array in (a, b, out))
        NumpyArrays.matmul(a.host, b.host, out.host)

    def _rfftn(self, a: ndarray, s: Any = None, axes: Any = None) -> ndarray:
        return self.asarray(np.fft.rfftn(a.host, s, axes))

    def _irfftn(self, a: ndarray, s: Any = None, axes: Any = None) -> ndarray:
        return self.asarray(np.fft.irfftn(a.host, s, axes))

    def moveaxis(self, array: ndarray, source: int, destination: int) -> ndarray:
        return ndarray(np.moveaxis(array.host, source, destination))

    def take(self, array: ndarray, indices: ndarray, axis: int) -> ndarray:
        return self.asarray(np.take(array.host, indices.host, axis))


class Status(int):
    """An answer of the driver, 0 if all is well."""

    name = property(lambda self: "CUDA_SUCCESS" if not self else "CUDA_ERROR_ILLEGAL_ADDRESS")


class Bindings:
    """Those functions of `cuda.bindings.driver` that copy, over host memory."""

    def __init__(self, memory: Memory) -> None:
        # With a fault, the stream never comes past what is launched.
        self.memory, self.faults = memory, False

    def cuMemAlloc(self, nbytes: int) -> tuple[Status, int]:
        return Status(), self.memory.new((nbytes,), np.uint8).ctypes.data

    def cuMemcpyHtoD(self, target: int, source: int, nbytes: int) -> tuple[Status]:
        ctypes.memmove(target, source, nbytes)
        return (Status(),)

    def cuMemcpyDtoH(self, target: int, source: int, nbytes: int) -> tuple[Status]:
        return self.cuMemcpyHtoD(target, source, nbytes)

    def cuMemFree(self, address: int) -> tuple[Status]:
        self.memory.blocks = [b for b in self.memory.blocks if b.ctypes.data != address]
        return (Status(),)

    def cuStreamQuery(self, stream: int) -> tuple[Status]:
        return (Status(700 if self.faults else 0),)


class Driver:
    """A driver that emulates, and counts."""

    def __init__(self, memory: Memory, emulate: Any = emulate) -> None:
        self.memory, self.emulate = memory, emulate
        self.functions: dict[str, tuple[Any, Any, Any]] = {}
        self.loads, self.launches = 0, []

    def compile(self, function: Any, signature: Any, architecture: str, launch_bounds: Any = None) -> CompiledKernel:
        """Stand for `compile_kernel`."""
        entry = f"{function.__name__} {id(function)} {signature}"
        self.functions[entry] = function, signature, launch_bounds
        return CompiledKernel(entry.encode(), entry, function.__name__, 32, 0, 0, 0, architecture)

    def device(self) -> int:
        return 0

    def capability(self, device: int) -> int:
        return 90

    def name(self, device: int) -> str:
        return "NVIDIA Emulated"

    def load(self, cubin: bytes, entry: str) -> Any:
        self.loads += 1
        return self.functions[entry]

    def allow_shared(self, kernel: Any, nbytes: int, device: int) -> None:
        pass

    def configuration(self, grid: Any, block: Any, shared_bytes: int) -> Any:
        return grid, block, shared_bytes

    def stream(self, handle: int) -> Any:
        return handle

    def moment(self, stream: int) -> int:
        """Return the number of launches so far: that is the time of this GPU."""
        return len(self.launches)

    def elapsed(self, first: int, last: int) -> float:
        return 1e-3 * (last - first)

    def launch(self, stream: int, configuration: Any, kernel: Any, *arguments: Any) -> None:
        (function, signature, launch_bounds), (grid, block, shared_bytes) = kernel, configuration
        self.launches.append((function.__name__, stream))
        given = [
            self.memory.at(value, numpy_support.as_dtype(kind.dtype)) if isinstance(kind, types.CPointer) else value
            for value, kind in zip(arguments, signature)
        ]
        assert len(arguments) == len(signature)
        self.emulate(
            function, grid, block, *given,
            shared_bytes=shared_bytes, signature=signature, launch_bounds=launch_bounds,
        )  # fmt: skip
