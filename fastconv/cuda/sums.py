"""Sums over many blocks, without atomics: each block adds up a part, a second kernel the parts, always in order."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from . import toolchain
from .elements import Element
from .indices import step, whole_numbers
from .steps import Step

cuda = toolchain.import_cuda()

from numba.cuda.types import CPointer  # noqa: E402

# Products or numbers per running sum: the rounding error of a float32 sum grows with its length.
CHAIN = 512
# Blocks to cut a sum for: eight for each of 132 multiprocessors.
ENOUGH_BLOCKS = 1056


def tile(data_format: str, threads: int) -> tuple[int, int]:
    """Return (results, pixels) of a block: neighbouring threads read pixels, or where channels are last channels."""
    own = max(threads // (4 if data_format == "channels_last" else 32), 1)
    return own, threads // own


def parts(results: int, pixels: int, data_format: str, threads: int) -> int:
    """Return how many parts the pixels of a sum are cut in: enough blocks, each thread with some work."""
    own, at_once = tile(data_format, threads)
    blocks = -(-results // own)
    wanted = min(-(-ENOUGH_BLOCKS // blocks), -(-pixels // (at_once * CHAIN // 8)))
    return -(-pixels // -(-pixels // wanted))


@lru_cache(maxsize=16)
def add_parts(element: Element, wide: bool) -> Any:
    """Return the kernel that adds up sums of the same elements, one element a thread."""
    index, sums, narrow = whole_numbers(wide)[0], element.sums, element.narrow

    def add(parts, out, total, count):
        number = index(index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x))
        if number < total:
            result, at = sums(0), number
            for _ in range(count):
                result += parts[at]
                at = index(at + total)
            out[number] = narrow(result)

    add.__name__ = f"add_parts_{element.name}_{64 if wide else 32}"
    return add


def add_step(element: Element, total: int, count: int, wide: bool, threads: int) -> Step:
    """Return the launch that adds `count` parts in the buffer "parts" up to "out"."""
    arrays = [("parts", CPointer(element.sums)), ("out", element.pointer)]
    return step(add_parts(element, wide), arrays, (total, count), wide, (-(-total // threads),), (threads,))
