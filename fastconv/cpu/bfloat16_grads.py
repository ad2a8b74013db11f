"""The weight gradient in split precision, see `bfloat16.py`.

    dw[tap] = sum over pixels  x[i*stride + delta]^T @ dy[i]

The rows of a tile A are channels, and a channel is a row of pixels: each tap begins at another pixel of it. A stride
reads every second pixel, say, so that the even and the odd ones are rows of their own. Where channels are few, rows
are taps and channels, each with its own copy of the pixels.

    strip    (depths, phases along H, along W, channels, planes, pixels) bfloat16; pixels of all rows of a job in one
    panel    (steps, planes, 2 tiles B) bfloat16: 32 pixels by 32 filters; where the strip has more than dy, zeros
    partial  (G, panels, taps, channels, COLUMNS) float32, a sum per chunk of the jobs
"""

from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

import numpy as np

from .blocking import Phase
from .compile import Task, device, share, task
from .simd import copy_bytes, integer, integers, load, store, transpose_block, zero_bytes
from .simd_bfloat16 import (
    AMX,
    COLUMNS,
    DEPTH,
    EMULATED,
    PLANES,
    VECTORS,
    configure_tiles,
    interleave,
    multiply_planes,
    release_tiles,
    split,
)
from .tiles import ALIAS_BYTES, LINE, PANEL_BYTES, SPLIT_CYCLES, TILE_ROWS, VECTOR_ROWS, span, tile_cycles

# Bytes of planes that one job keeps in the second-level cache.
STRIP_BYTES = {AMX: 1200 * 1024, EMULATED: 1200 * 1024, VECTORS: 600 * 1024}
# Pixels of a job of several images.
MOST_PIXELS = 4096
# Jobs whose float32 sums are added up in float32.
JOBS_PER_SUM = 128
# Cycles to add a tile to a sum in memory, per row.
ADD_CYCLES = 8


class GradPlan(NamedTuple):
    """Everything about a weight gradient that depends on sizes alone."""

    phase: Phase
    gathered: bool
    images: int
    rows: int
    # Pixels of a row of results in the strip, and rows of an image.
    width: int
    lines: int
    # Rows of a tile, and tiles of all rows of channels.
    held: int
    tiles: int
    # Pixels and bytes of a channel's row, and bytes of the strip.
    pixels: int
    row_bytes: int
    strip_bytes: int
    # Source depth of each plane, relative to i*in_step.
    depths: np.ndarray
    # (plane, row, column) of each tap, relative to the first; byte offset of each tap's rows in the strip.
    taps: np.ndarray
    shifts: np.ndarray
    # Byte offset of each step.
    offsets: np.ndarray

    @property
    def columns(self) -> int:
        """Pixels of a row of the source, as the taps meet them."""
        return (self.phase.size[2] - 1) * self.phase.in_step[2] + span(self.phase.taps[2])

    @property
    def stage_bytes(self) -> int:
        """Bytes of a row of float32, every second pixel of one, and gradients, before they are split."""
        rows = TILE_ROWS * self.channel_floats * 4
        return rows + self.channel_floats * 4 + len(self.offsets) * DEPTH * COLUMNS * 4

    @property
    def channel_floats(self) -> int:
        """Floats of a row of one channel, whole lines."""
        return -(-self.columns // 16) * 16 + 32

    @property
    def sums(self) -> int:
        """Elements of one panel of sums."""
        return len(self.shifts) * self.tiles * self.held * COLUMNS

    def jobs(self, batch: int) -> int:
        """Return the jobs of a batch."""
        return -(-batch // self.images) * self.phase.size[0] * -(-self.phase.size[1] // self.rows)


@lru_cache(maxsize=1024)
def grad_plan(phase, batch, C, panels, unit, products, count):
    """Return the plan that takes the busiest of `count` threads least time."""
    P = phase.size[1]
    choices = [(1, -(-P // parts)) for parts in range(1, min(P, 64) + 1)] + [(1, 1)]
    choices += [(images, P) for images in range(2, min(batch, MOST_PIXELS // prod(phase.size[1:])) + 1)]
    found = []
    for gathered in (False, True) if prod(map(len, phase.taps)) > 1 else (False,):
        for images, rows in choices:
            plan = _plan(phase, gathered, images, rows, C, unit, products)
            bytes_used = plan.strip_bytes + len(plan.offsets) * 2048 * PLANES[products]
            beyond = max(bytes_used - STRIP_BYTES[unit], 0)
            cycles = -(-plan.jobs(batch) // count) * _job_cycles(plan, C, panels, unit, products)
            found.append((beyond, cycles, plan))
    return min(found, key=lambda choice: choice[:2])[2]


def _job_cycles(plan, C, panels, unit, products):
    tiles, steps = plan.tiles * len(plan.shifts), len(plan.offsets)
    work = panels * tiles * (steps * tile_cycles(unit, products, plan.held) + 2 * ADD_CYCLES * plan.held + 60)
    copies = len(plan.taps) if plan.gathered else 1
    work += (C * copies + 2 * panels * COLUMNS) * steps * SPLIT_CYCLES[products]
    # Sums are read and written.
    return work + panels * plan.sums * 8 / PANEL_BYTES


def _plan(phase, gathered, images, rows, C, unit, products):
    (depths, down, across), (_, s1, s2) = phase.taps, phase.in_step
    taps = [tuple(delta - along[0][1] for (_, delta), along in zip(tap, phase.taps)) for tap in product(*phase.taps)]
    planes = {delta: number for number, (_, delta) in enumerate(depths)}
    taps = [(planes[d + depths[0][1]], h, w) for d, h, w in taps]
    more_rows, more_columns = (0, 0) if gathered else ((span(down) - 1) // s1, (span(across) - 1) // s2)
    width, lines = phase.size[2] + more_columns, rows + more_rows
    channels = len(taps) * C if gathered else C
    held = min(VECTOR_ROWS, key=lambda n: -(-channels // n) * n) if unit == VECTORS else TILE_ROWS
    side = 1 if unit == VECTORS else 2
    tiles = -(-channels // (held * side)) * side
    steps = -(-((images - 1) * lines + rows) * width // DEPTH)
    pixels = steps * DEPTH + -(-(more_rows * width + more_columns) // DEPTH) * DEPTH + 2 * DEPTH
    row_bytes = pixels * 2 * PLANES[products]
    row_bytes += LINE if row_bytes % ALIAS_BYTES == 0 else 0
    plane_bytes = tiles * held * row_bytes
    if gathered:
        shifts, copies = [0], 1
    else:
        shifts = [((d * s1 + h % s1) * s2 + w % s2) * plane_bytes + (h // s1 * width + w // s2) * 2 for d, h, w in taps]
        copies = len(depths) * s1 * s2
    return GradPlan(
        phase, gathered, images, rows, width, lines, held, tiles, pixels, row_bytes,
        copies * plane_bytes + 4 * LINE,
        depths=np.array([delta for _, delta in depths], np.int64),
        taps=np.array(taps, np.int64),
        shifts=np.array(shifts, np.int64),
        offsets=np.arange(steps, dtype=np.int64) * 2 * DEPTH,
    )  # fmt: skip


class GradTasks(NamedTuple):
    """The loops over one kind of tile."""

    reduce: Task
    unpack: Task


@lru_cache(maxsize=16)
def grad_tasks(unit, products, rows):
    """Return the tasks for a unit, so many products of planes and tiles of so many rows; all are constants in them.

    The arguments of `reduce`:

        0 chunks              1 source layout      7 target layout        13 source extent    16 N, G, C, K
       20 O, P, Q            23 in_step           26 lowest row, column   28 gathered         29 images, rows of a job
       31 width, lines       33 tiles             34 bytes from channel to channel, from plane to plane
       36 steps              37 offsets           38 shifts, their count  40 taps, their count
       42 depths, their count                     44 floats of a channel  45 columns
       46 strips, floats, panels, partial, sums: address, bytes           56 flags            57 tile configuration
    """
    UNIT, PRODUCTS, ROWS, NP = unit, products, rows, PLANES[products]
    TILES = 1 if unit == VECTORS else 2
    SIZE, PIXEL, PANEL = 4, 4 * COLUMNS, 2048 * NP

    @task
    def reduce(arguments, chunk):
        """Weight gradient: a sum per chunk."""
        chunks, (G, _, K), (O, P) = integer(arguments, 0), integers(arguments, 17, 3), integers(arguments, 20, 2)
        N, (images, rows), (width, lines) = (
            integer(arguments, 16),
            integers(arguments, 29, 2),
            integers(arguments, 31, 2),
        )
        tiles, taps = integer(arguments, 33), integer(arguments, 39)
        strip, strip_bytes = integers(arguments, 46, 2)
        partial, partial_bytes, sums, sum_bytes = integers(arguments, 52, 4)
        flags, configuration = integers(arguments, 56, 2)
        partial, sums = partial + chunk * partial_bytes, sums + chunk * sum_bytes
        # What is left in the strip from other jobs, or was there before, meets gradients that are zero.
        zero_bytes(strip + chunk * strip_bytes, strip_bytes)
        zero_bytes(partial, partial_bytes)
        zero_bytes(sums, sum_bytes)
        parts, panels, batches = (P + rows - 1) // rows, (K + COLUMNS - 1) // COLUMNS, (N + images - 1) // images
        found = 0
        configure_tiles(UNIT, configuration)
        begin, end = share(batches * O * parts, chunk, chunks)
        for job in range(begin, end):
            o, i0, p0 = job // parts % O, job // (parts * O) * images, job % parts * rows
            held, here = min(images, N - i0), min(rows, P - p0)
            for g in range(G):
                for i in range(held):
                    found |= _split_image(arguments, chunk, i0 + i, g, o, p0, here, i * lines * width)
                for panel in range(panels):
                    found |= _interleave_grads(arguments, chunk, i0, g, o, p0, panel, held, here)
                    _multiply(arguments, chunk, partial + (g * panels + panel) * taps * tiles * ROWS * PIXEL)
            # Float32 sums over jobs are kept short, like every chain.
            if sum_bytes and ((job - begin) % JOBS_PER_SUM == JOBS_PER_SUM - 1 or job == end - 1):
                for i in range(sum_bytes // 8):
                    store(8, sums + i * 8, load(8, sums + i * 8) + load(SIZE, partial + i * SIZE))
                zero_bytes(partial, partial_bytes)
        release_tiles(UNIT)
        if found:
            store(8, flags + chunk * 8, 1.0)

    @device
    def _multiply(arguments, chunk, partial):
        """Add a job's products with one panel of gradients to their sums."""
        tiles, row_bytes, plane_bytes, steps, offsets = integers(arguments, 33, 5)
        shifts, taps, (strip, strip_bytes) = integer(arguments, 38), integer(arguments, 39), integers(arguments, 46, 2)
        panel, panel_bytes = integers(arguments, 50, 2)
        strip, panel = strip + chunk * strip_bytes, panel + chunk * panel_bytes
        for tile in range(0, tiles, TILES):
            for tap in range(taps):
                a = strip + integer(shifts, tap) + tile * ROWS * row_bytes
                out = partial + (tap * tiles + tile) * ROWS * PIXEL
                multiply_planes(
                    UNIT, PRODUCTS, ROWS, a, a + ROWS * row_bytes, row_bytes, plane_bytes, offsets, steps, panel,
                    out, out + ROWS * PIXEL, PIXEL, ROWS, 1, 0, 0,
                )  # fmt: skip

    @device
    def _split_image(arguments, chunk, n, g, o, p0, lines, first):
        """Split what one image of a job reads; its first pixel is number `first` of each channel's row."""
        source, extent, C = integers(arguments, 1, 6), integers(arguments, 13, 3), integer(arguments, 18)
        in_step, low_row, low_column = integers(arguments, 23, 3), integer(arguments, 26), integer(arguments, 27)
        depths, (row, width) = integers(arguments, 42, 2), integers(arguments, 44, 2)
        stage, stage_bytes = integers(arguments, 48, 2)
        taps, number = integers(arguments, 40, 2)
        stage += chunk * stage_bytes
        found, below = 0, 0
        for tap in range(number):
            below = max(below, integer(taps, tap * 3 + 1))
        left = min(max(-low_column, 0), width)
        right = max(min(extent[2] - low_column, width), left)
        for plane in range(depths[1]):
            d = o * in_step[0] + integer(depths[0], plane)
            for j in range((lines - 1) * in_step[1] + below + 1):
                h = p0 * in_step[1] + low_row + j
                inside = d >= 0 and d < extent[0] and h >= 0 and h < extent[1]
                at = source[0] + n * source[1] + g * C * source[2] + d * source[3] + h * source[4]
                at += (low_column + left) * source[5]
                for c0 in range(0, C, 16):
                    some = min(16, C - c0)
                    zero_bytes(stage, some * row * SIZE)
                    if inside:
                        _stage_channels(
                            stage + left * SIZE,
                            row * SIZE,
                            at + c0 * source[2],
                            some,
                            right - left,
                            source[2],
                            source[5],
                        )
                    found |= _split_row(arguments, chunk, stage, c0, some, plane, j, lines, first)
        return found

    @device
    def _stage_channels(target, row, source, C, count, channel, step):
        """Copy `count` pixels of C channels from any layout: a row for each channel."""
        if step == SIZE or count == 1:
            for c in range(C):
                copy_bytes(target + c * row, source + c * channel, count * SIZE)
        elif channel == SIZE and C >= 4:
            for q in range(0, count, 16):
                transpose_block(16, SIZE, source + q * step, step, count - q, C, target + q * SIZE, row)
        else:
            for q in range(count):
                for c in range(C):
                    store(SIZE, target + c * row + q * SIZE, load(SIZE, source + c * channel + q * step))

    @device
    def _split_row(arguments, chunk, stage, c0, some, plane, j, lines, first):
        """Split row `j` of the source, of some channels, to wherever taps read it."""
        C, Q, (_, s1, s2) = integer(arguments, 18), integer(arguments, 22), integers(arguments, 23, 3)
        gathered, width, tiles = integer(arguments, 28), integer(arguments, 31), integer(arguments, 33)
        row_bytes, plane_bytes = integers(arguments, 34, 2)
        (taps, number), (row, columns) = integers(arguments, 40, 2), integers(arguments, 44, 2)
        strip, strip_bytes, _, _ = integers(arguments, 46, 4)
        strip, found = strip + chunk * strip_bytes, 0
        for i in range(number if gathered else s2):
            if gathered:
                (t, h, w), count = integers(taps + i * 24, 0, 3), Q
                if t != plane or j < h or (j - h) % s1 or (j - h) // s1 >= lines:
                    continue
                to, p = strip + (i * C + c0) * row_bytes, (j - h) // s1
            else:
                w, p, count = i, j // s1, (columns - i + s2 - 1) // s2
                to = strip + (((plane * s1 + j % s1) * s2 + i) * tiles * ROWS + c0) * row_bytes
            to += (first + p * width) * 2
            for c in range(some):
                source = stage + (c * row + w) * SIZE
                if s2 > 1:
                    thin = stage + 16 * row * SIZE
                    for q in range(count):
                        store(SIZE, thin + q * SIZE, load(SIZE, source + q * s2 * SIZE))
                    source = thin
                found |= split(NP, source, count, to + c * row_bytes, plane_bytes, 64)
        return found

    @device
    def _interleave_grads(arguments, chunk, i0, g, o, p0, panel, held, here):
        """Interleave and split a panel of gradients of a job; where the strip has other pixels, zeros."""
        target, K, Q = integers(arguments, 7, 6), integer(arguments, 19), integer(arguments, 22)
        (width, lines), steps, row = integers(arguments, 31, 2), integer(arguments, 36), integer(arguments, 44)
        stage, stage_bytes, into, into_bytes = integers(arguments, 48, 4)
        start, into, found = stage + chunk * stage_bytes + 17 * row * SIZE, into + chunk * into_bytes, 0
        used, k0, to, done = min(COLUMNS, K - panel * COLUMNS), g * K + panel * COLUMNS, start, 0
        for i in range(held):
            at = target[0] + (i0 + i) * target[1] + k0 * target[2] + o * target[3] + p0 * target[4]
            for p in range(here):
                to = start + ((i * lines + p) * width) * PIXEL
                # Rows between two images, columns between two rows.
                zero_bytes(start + done * PIXEL, to - start - done * PIXEL)
                _stage_grads(to, at + p * target[4], used, Q, target[2], target[5])
                done = (i * lines + p) * width + Q
        zero_bytes(start + done * PIXEL, (steps * DEPTH - done) * PIXEL)
        for step in range(steps):
            found |= interleave(NP, start + step * DEPTH * PIXEL, into + step * PANEL)
        return found

    @device
    def _stage_grads(target, source, used, count, channel, step):
        """Copy `count` pixels of some channels from any layout, zeros beyond: COLUMNS for each pixel."""
        if used < COLUMNS:
            zero_bytes(target, count * PIXEL)
        if channel == SIZE:
            for q in range(count):
                copy_bytes(target + q * PIXEL, source + q * step, used * SIZE)
        elif step == SIZE and used >= 4:
            for k in range(0, used, 16):
                for q in range(0, count, 16):
                    transpose_block(
                        16, SIZE, source + k * channel + q * SIZE, channel, used - k, count - q,
                        target + q * PIXEL + k * SIZE, PIXEL,
                    )  # fmt: skip
        else:
            for k in range(used):
                for q in range(count):
                    store(SIZE, target + q * PIXEL + k * SIZE, load(SIZE, source + k * channel + q * step))

    @task
    def unpack(arguments, chunk):
        """Add up the chunks' sums and put them in order (G*K, C, taps)."""
        chunks, target, G, C, K, taps, tap_bytes, panel_bytes = integers(arguments, 0, 8)
        copies, partial, partial_bytes, sums, sum_bytes = integers(arguments, 8, 5)
        panels, filter_ = (K + COLUMNS - 1) // COLUMNS, C * taps * SIZE
        begin, end = share(G * panels, chunk, chunks)
        for job in range(begin, end):
            first = partial + job * panel_bytes
            if copies > 1 or sum_bytes:
                for i in range(0, panel_bytes, SIZE):
                    total = 0.0
                    for copy in range(copies):
                        if sum_bytes:
                            total += load(8, sums + copy * sum_bytes + (job * panel_bytes + i) * 2)
                        else:
                            total += load(SIZE, first + copy * partial_bytes + i)
                    store(SIZE, first + i, total)
            g, k0 = job // panels, job % panels * COLUMNS
            for k in range(0, min(COLUMNS, K - k0), 16):
                source, to, rest = first + k * SIZE, target + (g * K + k0 + k) * filter_, K - k0 - k
                if taps == 1:
                    for c in range(0, C, 16):
                        transpose_block(16, SIZE, source + c * PIXEL, PIXEL, C - c, rest, to + c * SIZE, filter_)
                else:
                    for c in range(C):
                        for tap in range(0, taps, 16):
                            transpose_block(
                                16, SIZE, source + c * PIXEL + tap * tap_bytes, tap_bytes, taps - tap, rest,
                                to + (c * taps + tap) * SIZE, filter_,
                            )  # fmt: skip

    return GradTasks(reduce, unpack)
