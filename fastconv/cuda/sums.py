"""Sums over many blocks, without atomics: each block adds up a share, a second kernel what they found, always in order.

Within a block rows are added up in shared memory as a tree. Which numbers meet depends on sizes alone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from . import toolchain
from .architecture import MOST_BLOCKS
from .elements import Element
from .indices import index_type, launch
from .steps import Step

cuda = toolchain.import_cuda()

from numba.cuda.types import CPointer  # noqa: E402

# Additions in one running sum: the rounding error of a float32 sum grows with its length.
CHAIN = 512
# Additions that are worth a share of their own, a thread.
LEAST = 8
# Blocks to cut a sum for: eight for each of 132 multiprocessors.
ENOUGH_BLOCKS = 1056
# Products in one running sum of a kernel that does not cut it: a longer one is cut in launches, each of which adds to
# what the one before has written.
PRODUCTS = 2304
# Blocks of large tiles to cut a sum for, two for each of 132 multiprocessors, and the least steps of depth for one.
ENOUGH_TILES, LEAST_STEPS = 264, 8


def shares(pixels: int, blocks: int, down: int, room: int = MOST_BLOCKS) -> tuple[int, int]:
    """Return (how many shares, pixels of one) for so many pixels, blocks beside each other and rows of a block.

    There are enough shares to fill a GPU and to keep running sums short, but no more than there is `room` for. Shares
    are blocks of a grid's second dimension: beyond the most of them running sums grow longer.
    """
    wanted = max(min(-(-ENOUGH_BLOCKS // blocks), -(-pixels // (LEAST * down))), -(-pixels // (CHAIN * down)))
    share = max(-(-pixels // max(min(wanted, room, MOST_BLOCKS), 1)), 1)
    count = max(-(-pixels // share), 1)
    return count, -(-pixels // count)


def parts_of_tiles(steps: int, tiles: int, across: int, room: int, least: int = 1) -> int:
    """Return in how many parts to cut the depth, of so many steps, of so many tiles of a product.

    They fill a GPU, or are `least` for the sake of short sums, and fit a grid's dimension that has `across` blocks.
    """
    wanted = max(-(-ENOUGH_TILES // tiles), least)
    return max(min(wanted, steps // LEAST_STEPS, room, MOST_BLOCKS // across), 1)


def shares_of_tiles(steps: int, tiles: int, across: int, room: int, chain: int) -> tuple[int, int]:
    """Return (how many parts, steps of one) likewise, of launches that take at most `chain` steps for a part."""
    parts = parts_of_tiles(steps, tiles, across, room, -(-steps // (chain * CHAIN)))
    each = max(min(-(-steps // parts), chain), 1)
    return max(min(-(-steps // each), parts), 1), each


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
    return launch(add_parts(element, wide), arrays, (total, count), wide, total, threads)
