"""Moving pixels: between arrays of any layout and the strips, blocks and panels that register tiles work on.

    strip   (rows, pitch, C)            part of an image with its padding, channels last
    block   (pixels, WIDTH)             results of one register tile's width of filters
    panels  (G, panels, taps, C, WIDTH) the weight, in the order in which a tile reads it

Where the array has channels first, LANES x LANES elements at a time change places in registers. Everything is a byte
address, a byte stride or a size; a `layout` is (address, N, C, D, H, W byte strides).
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from .compile import device
from .epilogue import activate
from .simd import copy_bytes, copy_part, integer, load, scatter_transposed, store, transpose_block, zero_bytes


class Strips(NamedTuple):
    """Device functions for one register tile and one size of element."""

    fill: Callable[..., Any]
    copy_pixels: Callable[..., Any]
    finish: Callable[..., Any]
    emit: Callable[..., Any]
    pack: Callable[..., Any]
    unpack: Callable[..., Any]


def pack_table(channels, taps, order, width, itemsize, transposed):
    """Return where `Strips.pack` puts each row of a panel, in bytes: int64, -1 for taps that are left out.

    Parameters
    ----------
    channels : int
        Channels of one group that are summed over.
    taps : int
        Taps of the kernel, T*R*S.
    order : sequence of int
        Taps in the order in which the tile meets them; -1 is a row that stays as it is.
    width, itemsize : int
        Of the register tile.
    transposed : bool
        Whether the sum is over filters, as in the input gradient.
    """
    position = np.full(taps, -1, np.int64)
    order = np.asarray(order, np.int64)
    position[order[order >= 0]] = np.flatnonzero(order >= 0)
    rows = position * channels
    if not transposed:
        # The weight's own order is (channel, tap).
        rows = np.where(position < 0, -1, rows + np.arange(channels)[:, None]).ravel()
    return np.where(rows < 0, -1, rows * width * itemsize)


@lru_cache(maxsize=16)
def strips(tile, itemsize):
    """Return the functions for a register tile, whose shape is a constant in them."""
    WIDTH, LANES, SIZE = tile.width, tile.lanes, itemsize
    PIXEL = WIDTH * SIZE

    @device
    def copy_pixels(target, pixel, source, count, C, channel, step):
        """Copy `count` pixels of C channels from any layout to pixels that lie `pixel` bytes apart."""
        if channel == SIZE or C == 1:
            # Pixels that lie side by side are one stretch of memory.
            if step == C * SIZE and pixel == C * SIZE:
                copy_bytes(target, source, count * C * SIZE)
            elif C == WIDTH:
                for q in range(count):
                    copy_bytes(target + q * pixel, source + q * step, PIXEL)
            elif C <= LANES:
                for q in range(count):
                    copy_part(LANES, SIZE, target + q * pixel, source + q * step, C)
            else:
                for q in range(count):
                    copy_bytes(target + q * pixel, source + q * step, C * SIZE)
        elif step == SIZE and C >= 4:
            for q in range(0, count, LANES):
                for c in range(0, C, LANES):
                    transpose_block(
                        LANES, SIZE, source + c * channel + q * SIZE, channel, C - c, count - q,
                        target + q * pixel + c * SIZE, pixel,
                    )  # fmt: skip
        else:
            # A few pixels at a time, so that the lines they are written to stay in the cache for all channels.
            for start in range(0, count, LANES):
                for c in range(C):
                    for q in range(start, min(start + LANES, count)):
                        store(SIZE, target + q * pixel + c * SIZE, load(SIZE, source + c * channel + q * step))

    @device
    def fill(strip, pixel, source, layout, extent, C, depths, corner, rows, pitch):
        """Copy `rows` rows of each depth, from a corner that may lie outside, zeros for padding.

        Rows are `pitch` pixels long, which lie `pixel` bytes apart. `source` is the address of the image's first
        channel, `depths` the address and count of depths relative to the corner's.
        """
        (D, H, W), (d0, h0, w0) = extent, corner
        left = min(max(-w0, 0), pitch)
        right = max(min(W - w0, pitch), left)
        top = min(max(-h0, 0), rows)
        bottom = max(min(H - h0, rows), top)
        row = pitch * pixel
        for plane in range(depths[1]):
            d = d0 + integer(depths[0], plane)
            start = source + d * layout[3] + (h0 + top) * layout[4] + (w0 + left) * layout[5]
            if d < 0 or d >= D:
                zero_bytes(strip, rows * row)
            else:
                zero_bytes(strip, top * row)
                zero_bytes(strip + bottom * row, (rows - bottom) * row)
                if right - left == pitch and layout[4] == pitch * layout[5]:
                    # Whole rows of the image: one row.
                    copy_pixels(strip + top * row, pixel, start, (bottom - top) * pitch, C, layout[2], layout[5])
                else:
                    for h in range(top, bottom):
                        zero_bytes(strip + h * row, left * pixel)
                        zero_bytes(strip + h * row + right * pixel, (pitch - right) * pixel)
                        place = strip + h * row + left * pixel
                        copy_pixels(place, pixel, start, right - left, C, layout[2], layout[5])
                        start += layout[4]
            strip += rows * row

    @device
    def finish(block, used, pixels, code):
        """Apply the activation to a block (pixels, WIDTH), in place."""
        for pixel in range(block, block + pixels * PIXEL, PIXEL):
            for k in range(used):
                store(SIZE, pixel + k * SIZE, activate(load(SIZE, pixel + k * SIZE), code))

    @device
    def emit(block, target, channel, step, used, count):
        """Write a row of a block (count, WIDTH) to an array of any layout, `used` channels of it."""
        if channel == SIZE:
            if used == WIDTH:
                for q in range(count):
                    copy_bytes(target + q * step, block + q * PIXEL, PIXEL)
            else:
                for q in range(count):
                    for k in range(0, used, LANES):
                        copy_part(LANES, SIZE, target + q * step + k * SIZE, block + q * PIXEL + k * SIZE, used - k)
        elif step == SIZE and used >= 4:
            for k in range(0, used, LANES):
                for q in range(0, count, LANES):
                    transpose_block(
                        LANES, SIZE, block + q * PIXEL + k * SIZE, PIXEL, count - q, used - k,
                        target + k * channel + q * SIZE, channel,
                    )  # fmt: skip
        else:
            for k in range(used):
                for q in range(count):
                    store(SIZE, target + k * channel + q * step, load(SIZE, block + q * PIXEL + k * SIZE))

    @device
    def unpack(panel, weight, filter_, channel, C, taps, used):
        """Write one panel (taps, C, WIDTH) of a weight's gradient to its place (K, C, taps), `used` filters of it."""
        for k in range(0, used, LANES):
            source, target, rest = panel + k * SIZE, weight + k * filter_, used - k
            if taps == 1:
                for c in range(0, C, LANES):
                    transpose_block(
                        LANES, SIZE, source + c * PIXEL, PIXEL, C - c, rest, target + c * channel, filter_
                    )  # fmt: skip
            else:
                for c in range(C):
                    for tap in range(0, taps, LANES):
                        transpose_block(
                            LANES, SIZE, source + (tap * C + c) * PIXEL, C * PIXEL, taps - tap, rest,
                            target + c * channel + tap * SIZE, filter_,
                        )  # fmt: skip

    @device
    def pack(panel, weight, filter_, channel, inner, taps, used, table, transposed):
        """Write one panel (taps, inner, WIDTH) of the weight (K, C, taps), zeros beyond its `used` columns.

        `weight` is the address of the panel's first filter, or channel if `transposed`; taps lie side by side.
        `table` is that of `pack_table`.
        """
        for k in range(0, WIDTH, LANES):
            rows = max(min(used - k, LANES), 0)
            if transposed and taps == 1:
                for i in range(inner):
                    target = panel + i * PIXEL + k * SIZE
                    copy_bytes(target, weight + i * filter_ + k * channel, rows * SIZE)
                    zero_bytes(target + rows * SIZE, (LANES - rows) * SIZE)
            elif transposed:
                for i in range(inner):
                    source, target = weight + i * filter_ + k * channel, panel + i * PIXEL + k * SIZE
                    for j in range(0, taps, LANES):
                        scatter_transposed(
                            LANES, SIZE, source + j * SIZE, channel, rows, min(taps - j, LANES), target, table + j * 8
                        )
            else:
                source, target, length = weight + k * filter_, panel + k * SIZE, inner * taps
                for j in range(0, length, LANES):
                    scatter_transposed(
                        LANES, SIZE, source + j * SIZE, filter_, rows, min(length - j, LANES), target, table + j * 8
                    )

    return Strips(fill, copy_pixels, finish, emit, pack, unpack)
