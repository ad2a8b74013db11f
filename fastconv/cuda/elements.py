"""What arrays hold and what kernels sum in: half types are float32 from the moment that they are in a register.

>>> Element.of(np.dtype(np.float16)).sums
float32
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from . import toolchain

cuda = toolchain.import_cuda()

from numba.cuda import types  # noqa: E402
from numba.cuda.types import float16, float32  # noqa: E402

from .ptx import bfloat16_float, float_bfloat16  # noqa: E402


def _same(value):
    return value


def _from_float16(value):
    return float32(value)


def _to_float16(value):
    return float16(value)


def _from_bfloat16(value):
    return bfloat16_float(value)


def _to_bfloat16(value):
    return float_bfloat16(value)


class Element(NamedTuple):
    """One dtype as kernels handle it.

    Attributes
    ----------
    stored, sums : Numba types
        Of the elements in memory, and of the arithmetic. bfloat16 is stored as uint16.
    widen, narrow : function
        From memory to arithmetic and back; kernels close over them.
    """

    name: str
    stored: Any
    sums: Any
    widen: Callable[[Any], Any]
    narrow: Callable[[Any], Any]

    @classmethod
    @lru_cache(maxsize=8)
    def of(cls, dtype: np.dtype) -> Element:
        """Return the element of a NumPy dtype."""
        return cls(dtype.name, *_ELEMENTS[dtype.name])

    @property
    def pointer(self) -> Any:
        """The type of an array's address."""
        return types.CPointer(self.stored)

    @property
    def sums_dtype(self) -> np.dtype:
        """What sums are kept in between kernels."""
        return np.dtype(self.sums.name)


_ELEMENTS = {
    "float32": (float32, float32, _same, _same),
    "float64": (types.float64, types.float64, _same, _same),
    "float16": (float16, float32, _from_float16, _to_float16),
    "bfloat16": (types.uint16, float32, _from_bfloat16, _to_bfloat16),
}
SUPPORTED = tuple(_ELEMENTS)


def _integer(stored: Any, sums: Any) -> tuple[Any, ...]:
    """Return whole numbers, in arithmetic as wide as indices at least; what does not fit wraps around."""
    return stored, sums, lambda value: sums(value), lambda value: stored(value)


# What maxima are taken of besides.
_ELEMENTS |= {
    kind.name: _integer(kind, types.int64 if kind is types.int64 else types.int32)
    for kind in (types.int8, types.uint8, types.int16, types.int32, types.int64)
}
INTEGERS = tuple(name for name in _ELEMENTS if name not in SUPPORTED)
