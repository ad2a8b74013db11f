"""XLA's foreign functions in Python: handlers that work on XLA's own buffers, with no compiler and no copy.

XLA calls a C function with the address of a call frame, which holds the buffers of operands and results and the named
attributes of the call. ctypes makes such functions from Python, and the frame is read here by the layout that XLA
keeps stable for as long as the major version is 0 (`xla/ffi/api/c_api.h`, which jaxlib carries). New fields come last.

A callback of JAX's own, `jax.pure_callback`, needs none of this. It takes ten times as long for a small convolution,
copies operands and results, and hands over JAX arrays, on which a callback may wait for ever.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, Structure, c_char_p, c_int, c_int64, c_size_t, c_void_p
from math import prod
from typing import Any

import numpy as np

# The oldest version with the layout below. Later minor versions of XLA are told that this is of their own.
MAJOR, MINOR = 0, 1

_INVALID_ARGUMENT = 3
_EXTENSION_METADATA = 1
_WRITABLE = 0x200

# xla::PrimitiveType
_NAMES = {
    1: "bool", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "uint8", 7: "uint16", 8: "uint32", 9: "uint64",
    10: "float16", 11: "float32", 12: "float64", 16: "bfloat16",
}  # fmt: skip
_dtypes: dict[int, np.dtype] = {}

_memory = ctypes.pythonapi.PyMemoryView_FromMemory
_memory.restype, _memory.argtypes = ctypes.py_object, (c_void_p, ctypes.c_ssize_t, c_int)


def _head(*fields: tuple[str, Any]) -> list[tuple[str, Any]]:
    """Every structure begins with its size and a list of extensions."""
    return [("struct_size", c_size_t), ("extension_start", c_void_p), *fields]


class _Version(Structure):
    _fields_ = _head(("major", c_int), ("minor", c_int))


class _Metadata(Structure):
    _fields_ = (("struct_size", c_size_t), ("version", _Version))


class _Extension(Structure):
    """Asks what version a handler is of, instead of a call."""

    _fields_ = (("struct_size", c_size_t), ("kind", c_int), ("next", c_void_p), ("metadata", POINTER(_Metadata)))


class _Error(Structure):
    _fields_ = _head(("message", c_char_p), ("code", c_int))


class _Api(Structure):
    _fields_ = _head(
        ("version", _Version),
        ("internal", c_void_p),
        ("create_error", ctypes.CFUNCTYPE(c_void_p, POINTER(_Error))),
    )


class _Buffer(Structure):
    _fields_ = _head(("dtype", c_int), ("data", c_void_p), ("rank", c_int64), ("shape", POINTER(c_int64)))


class _Text(Structure):
    _fields_ = (("start", c_void_p), ("size", c_size_t))


class _Buffers(Structure):
    _fields_ = _head(("count", c_int64), ("kinds", c_void_p), ("buffers", POINTER(POINTER(_Buffer))))


class _Attributes(Structure):
    _fields_ = _head(("count", c_int64), ("kinds", c_void_p), ("names", c_void_p), ("values", POINTER(POINTER(_Text))))


class _Frame(Structure):
    _fields_ = _head(
        ("api", POINTER(_Api)),
        ("context", c_void_p),
        ("stage", c_int),
        ("operands", _Buffers),
        ("results", _Buffers),
        ("attributes", _Attributes),
    )


def handler(function: Callable[[bytes, list[np.ndarray], list[np.ndarray]], None]) -> Any:
    """Return a C function that XLA may call, as ctypes has it; keep it for as long as XLA does.

    Parameters
    ----------
    function : callable
        Takes the call's only attribute, a text, the operands, which it must not write to, and the results, which it
        must; the arrays are C-contiguous and gone after the call. What it raises becomes an error of XLA's.
    """

    def handle(address: int) -> int | None:
        frame = _Frame.from_address(address)
        if frame.extension_start:
            _introduce(frame)
            return None
        try:
            text = frame.attributes.values[0].contents
            function(ctypes.string_at(text.start, text.size), _arrays(frame.operands), _arrays(frame.results))
        except BaseException as error:
            message = f"{type(error).__name__}: {error}".encode()
            arguments = _Error(ctypes.sizeof(_Error), None, message, _INVALID_ARGUMENT)
            return frame.api.contents.create_error(ctypes.byref(arguments))
        return None

    return ctypes.CFUNCTYPE(c_void_p, c_void_p)(handle)


def address(function: Any) -> int | None:
    """Return the address of what :func:`handler` returned."""
    return ctypes.cast(function, c_void_p).value


def _introduce(frame: _Frame) -> None:
    """Tell the version: XLA refuses one that it does not know."""
    extension = _Extension.from_address(frame.extension_start)
    if extension.kind != _EXTENSION_METADATA:
        return
    version = extension.metadata.contents.version
    version.major, version.minor = MAJOR, MINOR
    # The first versions do not show theirs here.
    if frame.api and frame.api.contents.version.major == MAJOR:
        version.minor = frame.api.contents.version.minor


def _arrays(buffers: _Buffers) -> list[np.ndarray]:
    return [_array(buffers.buffers[i].contents) for i in range(buffers.count)]


def _array(buffer: _Buffer) -> np.ndarray:
    """Return an array over the memory of a buffer."""
    shape, dtype = tuple(buffer.shape[: buffer.rank]), _dtype(buffer.dtype)
    size = prod(shape) * dtype.itemsize
    return np.ndarray(shape, dtype, _memory(buffer.data, size, _WRITABLE)) if size else np.empty(shape, dtype)


def _dtype(code: int) -> np.dtype:
    found = _dtypes.get(code)
    if found is None:
        found = _dtypes[code] = np.dtype(_NAMES[code])
    return found
