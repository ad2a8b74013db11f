"""Workspace that outlives a call: fresh memory costs a page fault every few kilobytes, more than some convolutions.

Each thread keeps one block of at most `KEPT_BYTES`, from which its calls cut their buffers. A call that needs more
gets memory of its own, given back when it ends.
"""

import threading
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from .. import arrays, config
from .memory import address

KEPT_BYTES = 64 << 20
# Buffers begin at a cache line of their own.
ALIGNMENT = 64

_kept = threading.local()


@contextmanager
def workspace(buffers, layout=None):
    """Lend {name: array} for {name: Buffer} while the block lasts; contents are arbitrary.

    `layout` is that of the buffers, if it is known.
    """
    layout = layout or layout_of(buffers)
    if layout.total > KEPT_BYTES or config.get("poison"):
        yield fresh(buffers)
        return
    block = _take(layout.total)
    try:
        yield layout.cut(block)
    finally:
        _kept.block = block


@contextmanager
def lend_addresses(layout):
    """Lend one block as the addresses of its buffers, in the order of the layout; each begins a cache line."""
    is_kept = layout.total <= KEPT_BYTES
    block = _take(layout.total) if is_kept else _aligned(layout.total)
    if config.get("poison"):
        # NaN in every floating-point type.
        block.fill(0xFF)
    start = address(block)
    try:
        yield [start + at for _, _, _, at in layout.places]
    finally:
        if is_kept:
            _kept.block = block


def _take(nbytes):
    """Return this thread's block, taken out while it is in use: whoever calls from here gets another."""
    block, _kept.block = getattr(_kept, "block", None), None
    return _aligned(nbytes) if block is None or block.size < nbytes else block


class Layout(NamedTuple):
    """Where buffers lie in a block: (name, shape, dtype, first byte), and how many bytes there are."""

    places: tuple[tuple[str, tuple[int, ...], np.dtype, int], ...]
    total: int

    def cut(self, block):
        """Return the buffers as arrays."""
        return {name: np.ndarray(shape, dtype, block, at) for name, shape, dtype, at in self.places}


def layout_of(buffers):
    """Return where the buffers lie, each from a cache line of its own on."""
    places, total = [], 0
    for name, b in buffers.items():
        if b.owned:
            places.append((name, b.shape, b.dtype, total))
            total += -(-b.nbytes // ALIGNMENT) * ALIGNMENT
    return Layout(tuple(places), total)


def fresh(buffers):
    """Return {name: array} for {name: Buffer}, in memory of its own."""
    return {name: arrays.empty(b.shape, b.dtype) for name, b in buffers.items() if b.owned}


def release():
    """Give back the memory that this thread keeps."""
    _kept.block = None


def _aligned(nbytes):
    block = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -block.__array_interface__["data"][0] % ALIGNMENT
    return block[start : start + nbytes]
