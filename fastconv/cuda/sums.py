"""Sums over many blocks, without atomics: each block adds up a share, a second kernel what they found, always in order.

Within a block rows are added up in shared memory as a tree. Which numbers meet depends on sizes alone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from . import toolchain
from .elements import Element
from .indices import index_type, step
from .steps import Step

cuda = toolchain.import_cuda()

from numba.cuda.types import CPointer  # noqa: E402

# Additions in one running sum: the rounding error of a float32 sum grows with its length.
CHAIN = 512
# Additions that are worth a share of their own, a thread.
LEAST = 8
# Blocks to cut a sum for: eight for each of 132 multiprocessors.
ENOUGH_BLOCKS = 1056
# The most shares: blocks of a grid's second dimension. Beyond them running sums grow longer.
MOST_SHARES = 65535


def shares(pixels: int, blocks: int, down: int, room: int = MOST_SHARES) -> tuple[int, int]:
    """Return (how many shares, pixels of one) for so many pixels, blocks beside each other and rows of a block.

    There are enough shares to fill a GPU and to keep running sums short, but no more than there is `room` for.
    """
    wanted = max(min(-(-ENOUGH_BLOCKS // blocks), -(-pixels // (LEAST * down))), -(-pixels // (CHAIN * down)))
    share = max(-(-pixels // max(min(wanted, room, MOST_SHARES), 1)), 1)
    count = max(-(-pixels // share), 1)
    return count, -(-pixels // count)


@lru_cache(maxsize=16)
def tree(wide: bool, across: int, down: int) -> Any:
    """Return the function that adds up the rows of a block's (down, across) slots of shared memory in its first row."""
    index, half = index_type(wide), down // 2

    def add_rows(slots, column, row):
        above = index(half)
        while above > 0:
            cuda.syncthreads()
            if row < above:
                slots[row * across + column] += slots[(row + above) * across + column]
            above = index(above >> 1)

    return add_rows


@lru_cache(maxsize=16)
def chained(element: Element, wide: bool) -> Any:
    """Return the function that adds `count` numbers in order, each `step` after the last, in chains."""
    index, sums = index_type(wide), element.sums

    def add_up(parts, at, step, count):
        result = sums(0)
        for first in range(index(0), count, CHAIN):
            chain = sums(0)
            for _ in range(first, min(index(first + CHAIN), count)):
                chain += parts[at]
                at = index(at + step)
            result += chain
        return result

    return add_up


@lru_cache(maxsize=16)
def add_parts(element: Element, wide: bool) -> Any:
    """Return the kernel that adds up (count, total) sums in order and in chains, one result a thread."""
    index, narrow, add_up = index_type(wide), element.narrow, chained(element, wide)

    def sums_add_parts(parts, out, total, count):
        number = index(index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x))
        if number < total:
            out[number] = narrow(add_up(parts, number, total, count))

    sums_add_parts.__name__ = f"sums_add_parts_{element.name}_{64 if wide else 32}"
    return sums_add_parts


def second_pass(element: Element, wide: bool, total: int, count: int, threads: int) -> Step:
    """Return the launch that adds `count` sums of `total` elements in the buffer "parts" up to "out"."""
    arrays = [("parts", CPointer(element.sums)), ("out", element.pointer)]
    return step(add_parts(element, wide), arrays, (total, count), wide, (-(-total // threads),), (threads,))
