"""Workspace that outlives a call: fresh memory costs a page fault every few kilobytes, more than some convolutions.

Each thread keeps one block of at most `KEPT_BYTES`, from which its calls cut their buffers. A call that needs more
gets memory of its own, given back when it ends.
"""

import threading
from contextlib import contextmanager

import numpy as np

from .. import arrays, config

KEPT_BYTES = 64 << 20
# Buffers begin at a cache line of their own.
ALIGNMENT = 64

_kept = threading.local()


@contextmanager
def workspace(buffers):
    """Lend {name: array} for {name: Buffer} while the block lasts; contents are arbitrary."""
    sizes = {name: -(-b.nbytes // ALIGNMENT) * ALIGNMENT for name, b in buffers.items() if b.owned}
    total = sum(sizes.values())
    if total > KEPT_BYTES or config.get("poison"):
        yield {name: arrays.empty(buffers[name].shape, buffers[name].dtype) for name in sizes}
        return
    # Taken out while it is in use: whoever calls from here gets another.
    block, _kept.block = getattr(_kept, "block", None), None
    if block is None or block.size < total:
        block = _aligned(total)
    lent, at = {}, 0
    for name, size in sizes.items():
        b = buffers[name]
        lent[name] = np.ndarray(b.shape, b.dtype, block, at)
        at += size
    try:
        yield lent
    finally:
        _kept.block = block


def release():
    """Give back the memory that this thread keeps."""
    _kept.block = None


def _aligned(nbytes):
    block = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -block.__array_interface__["data"][0] % ALIGNMENT
    return block[start : start + nbytes]
