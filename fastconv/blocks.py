"""Memory for results, used again.

The system hands out fresh memory page by page, and fills each with zeros at its first use. In a training step that
took as long as the convolutions. So when the last array over a block is gone, the block waits for the next result of
its size; what waits is bounded, and :func:`release` gives it back.
"""

from __future__ import annotations

import sys
from collections import deque
from typing import Any

import numpy as np

# Bytes that wait at most; a block that would exceed it takes the place of all others.
MOST_BYTES = 256 << 20
# Blocks begin a cache line, as no large array of NumPy's does.
ALIGNMENT = 64

_waiting: dict[int, deque[np.ndarray]] = {}


def _keep(memory: np.ndarray) -> None:
    # Without a lock: this may run in the middle of anything, when the garbage collector does.
    if memory.size > MOST_BYTES:
        return
    if waiting() + memory.size > MOST_BYTES:
        _waiting.clear()
    _waiting.setdefault(memory.size, deque()).append(memory)


class _Owner:
    """What arrays over a block refer to as their base; the last one takes it along."""

    def __init__(self, memory: np.ndarray, nbytes: int) -> None:
        self.memory = memory
        start = memory.__array_interface__["data"][0]
        data = (start + -start % ALIGNMENT, False)
        self.__array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": data, "version": 3}

    def __del__(self, keep: Any = _keep, finalizing: Any = sys.is_finalizing) -> None:
        # At the interpreter's end the names of this module may be gone.
        if not finalizing():
            keep(self.memory)


def take(nbytes: int) -> np.ndarray:
    """Return so many bytes of arbitrary contents, which begin a cache line.

    Examples
    --------
    >>> memory = take(1000)
    >>> memory.shape, memory.dtype.name
    ((1000,), 'uint8')
    """
    size = _rounded(nbytes) + ALIGNMENT
    try:
        memory = _waiting[size].pop()
    except (KeyError, IndexError):
        memory = np.empty(size, np.uint8)
    return np.asarray(_Owner(memory, nbytes))


def release() -> None:
    """Give back the memory that waits."""
    _waiting.clear()


def waiting() -> int:
    """Return how many bytes wait."""
    return sum(size * len(blocks) for size, blocks in list(_waiting.items()))


def _rounded(nbytes: int) -> int:
    """Return the next size up of those kept apart: eight to each power of two."""
    step = 1 << max(nbytes.bit_length() - 4, 6)
    return -(-nbytes // step) * step
