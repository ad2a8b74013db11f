"""What memory-bound kernels share: neighbours as one access, and the stretch of a row that neighbours share.

A thread has `lanes` neighbours of memory in registers: an array of `cuda.local` that is indexed by nothing but closed-
over numbers. Half types are widened on the way in and rounded on the way out.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from . import toolchain
from .elements import Element
from .indices import index_type
from .ptx import load2, load4, load8, store2, store4, store8

cuda = toolchain.import_cuda()

from numba.cuda.types import int64  # noqa: E402

# Bytes of the widest access.
WIDEST = 16
# Registers of a row's stretch: beyond that neighbours do not share one.
MOST_STRETCH = 32


def widest(dtype: np.dtype, *extents: int) -> int:
    """Return how many elements one access can have that all of these extents are whole multiples of."""
    return math.gcd(WIDEST // dtype.itemsize, *extents)


@lru_cache(maxsize=64)
def loader(element: Element, lanes: int) -> Any:
    """Return the function that loads neighbours to registers, from register `to` on."""
    widen = element.widen
    load = {1: None, 2: load2, 4: load4, 8: load8}[lanes]

    def one(memory, at, registers, to):
        registers[to] = widen(memory[at])

    def several(memory, at, registers, to):
        values = load(memory, at)
        for i in range(lanes):
            registers[to + i] = widen(values[i])

    return one if lanes == 1 else several


@lru_cache(maxsize=64)
def storer(element: Element, lanes: int) -> Any:
    """Return the function that stores neighbours from registers, from register `of` on."""
    narrow = element.narrow

    def store_1(memory, at, r, of):
        memory[at] = narrow(r[of])

    def store_2(memory, at, r, of):
        store2(memory, at, (narrow(r[of]), narrow(r[of + 1])))

    def store_4(memory, at, r, of):
        store4(memory, at, (narrow(r[of]), narrow(r[of + 1]), narrow(r[of + 2]), narrow(r[of + 3])))

    def store_8(memory, at, r, of):
        store8(memory, at, (narrow(r[of]), narrow(r[of + 1]), narrow(r[of + 2]), narrow(r[of + 3]),
                            narrow(r[of + 4]), narrow(r[of + 5]), narrow(r[of + 6]), narrow(r[of + 7])))  # fmt: skip

    return {1: store_1, 2: store_2, 4: store_4, 8: store_8}[lanes]


@lru_cache(maxsize=16)
def index_loader(wide: bool, lanes: int) -> Any:
    """Return the function that loads int64 positions to registers of the type of indices."""
    index = index_type(wide)

    def known(position):
        # What 32 bits cannot hold is nowhere, not somewhere else.
        return index(position) if wide or (position >= 0 and position < 2**31) else index(-1)

    def one(memory, at, registers, to):
        registers[to] = known(memory[at])

    def pairs(memory, at, registers, to):
        for i in range(lanes // 2):
            values = load2(memory, index(at + 2 * i))
            registers[to + 2 * i] = known(values[0])
            registers[to + 2 * i + 1] = known(values[1])

    return one if lanes == 1 else pairs


@lru_cache(maxsize=16)
def index_storer(wide: bool, lanes: int) -> Any:
    """Return the function that stores registers as int64 positions."""
    index = index_type(wide)

    def one(memory, at, registers):
        memory[at] = int64(registers[0])

    def pairs(memory, at, registers):
        for i in range(lanes // 2):
            store2(memory, index(at + 2 * i), (int64(registers[2 * i]), int64(registers[2 * i + 1])))

    return one if lanes == 1 else pairs


# --- stretches of a row ----------------------------------------------------------------------------------------


class Stretch(NamedTuple):
    """What neighbours of a row share: `vectors` aligned vectors, from `lead` elements before the first one's own on.

    Forward the vectors are of the input, and the first window begins at register `offset`. Backward they are of the
    windows, and the first element's own window is at register `lead`.
    """

    kernel: int
    stride: int
    before: int
    dilation: int
    lanes: int
    lead: int
    offset: int
    vectors: int

    @classmethod
    def forward(
        cls, kernel: int, stride: int, before: int, dilation: int, extent: int, itemsize: int, lanes: int
    ) -> Stretch:
        """Return the stretch of `lanes` windows in a row of `extent` elements."""
        load_lanes = math.gcd(WIDEST // itemsize, extent, lanes * stride)
        lead = -(-before // load_lanes) * load_lanes
        span = (lanes - 1) * stride + (kernel - 1) * dilation + 1
        vectors = -(-(lead - before + span) // load_lanes)
        return cls(kernel, stride, before, dilation, load_lanes, lead, lead - before, vectors)

    @classmethod
    def backward(cls, kernel: int, stride: int, before: int, dilation: int, lanes: int) -> Stretch:
        """Return the stretch of windows that `lanes * stride` elements of the input belong to."""
        low = -(((kernel - 1) * dilation - before) // stride)
        high = (lanes * stride - 1 + before) // stride
        lead = -(-max(-low, 0) // lanes) * lanes
        return cls(kernel, stride, before, dilation, lanes, lead, 0, (lead + high) // lanes + 1)

    @property
    def registers(self) -> int:
        """Elements of the stretch."""
        return self.vectors * self.lanes
