"""Arrays as tasks see them: an address, byte strides and sizes."""

from __future__ import annotations

from ctypes import c_int64
from typing import Any

# Where an ndarray holds the address of its first element: behind the head of every object, by NumPy's binary interface.
DATA = object.__basicsize__


# While a call is recorded: the arrays whose address was taken, so that none is gone when the next one is made.
addressed: list[Any] | None = None


def address(array):
    """Return where the first element is: a sixth of the time that NumPy's attributes take to say so."""
    if (seen := addressed) is not None:
        seen.append(array)
    return c_int64.from_address(id(array) + DATA).value


def layout_of(array, data_format):
    """Return (address, and the byte strides along N, C, D, H, W) of a lifted array."""
    n, *rest = array.strides
    channel, spatial = (rest[0], rest[1:]) if data_format == "channels_first" else (rest[-1], rest[:-1])
    return address(array), n, channel, *spatial


def extent_of(array, data_format):
    """Return D, H, W of a lifted array."""
    return array.shape[2:] if data_format == "channels_first" else array.shape[1:4]
