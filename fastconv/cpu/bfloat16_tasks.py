"""The loops of split precision around `multiply_planes`, see `bfloat16.py`.

    strip    (images, depths, rows, width, blocks of 32 channels, planes, 32) bfloat16
    panels   (G, panels, blocks of 32 products, planes, 2 tiles B) bfloat16
    block    (pixels, COLUMNS) float32

Strides, offsets and lengths of memory are bytes; inner and targets are the channels of one group that are summed over
and that result.
"""

from functools import lru_cache
from typing import NamedTuple

from .compile import Task, device, share, task
from .epilogue import activate
from .simd import Tile, copy_bytes, integer, integers, load, store, zero_bytes
from .simd_bfloat16 import (
    COLUMNS,
    DEPTH,
    PLANES,
    VECTORS,
    configure_tiles,
    interleave,
    multiply_planes,
    release_tiles,
    split,
)
from .strips import strips

# Pixels whose channels are put side by side at a time.
SOME = 16


class Tasks(NamedTuple):
    """The loops over one kind of tile."""

    pack: Task
    gather: Task


@lru_cache(maxsize=16)
def tasks(unit, products, rows):
    """Return the tasks for a unit, so many products of planes and tiles of so many rows; all are constants in them.

    The arguments of `gather`:

        0 chunks              1 source layout      7 target layout        13 source extent    16 N, G, C, K
       20 first              23 O, P, Q           26 out_step             29 in_step          32 lowest row, column
       34 images and rows of a job                36 strip: gathered, depths, rows, width, pixel
       41 dense  42 flat     43 rows of a tile    44 elements of float32 to put windows together from
       45 depths, their count                     47 runs, their count    49 offsets          50 chains, their count
       52 steps  53 activation                    54 panels               55 bias
       56 strips, floats, blocks: address, bytes  62 flags                63 tile configuration
       64 rows and width of those float32         66 length of a window   67 rows, pixels of the strip from row to row
    """
    UNIT, PRODUCTS, ROWS, NP = unit, products, rows, PLANES[products]
    # Tiles that are multiplied side by side.
    TILES = 1 if unit == VECTORS else 2
    SIZE, BLOCK, PIXEL, PANEL = 4, 64 * NP, 4 * COLUMNS, 2048 * NP
    move = strips(Tile(ROWS, 2, COLUMNS // 2), SIZE)
    _fill, _copy_pixels, _emit, _pack = move.fill, move.copy_pixels, move.emit, move.pack

    @task
    def pack(arguments, chunk):
        """(G*K, C, T, R, S) -> panels; transposed, filters and channels change places."""
        chunks, packed, weight, filter_, channel, G, inner, targets, taps, transposed = integers(arguments, 0, 10)
        table, some, rows, stages, stage_bytes, flags = integers(arguments, 10, 6)
        stage = stages + chunk * stage_bytes
        panels, blocks = (targets + COLUMNS - 1) // COLUMNS, (inner + some - 1) // some
        group, across = (filter_ * inner, channel) if transposed else (filter_ * targets, filter_)
        along = filter_ if transposed else channel
        target_bytes, found = rows // DEPTH * PANEL, 0
        begin, end = share(G * panels * blocks, chunk, chunks)
        for job in range(begin, end):
            c0, k0, g = job % blocks * some, job // blocks % panels * COLUMNS, job // (blocks * panels)
            source = weight + g * group + k0 * across + c0 * along
            zero_bytes(stage, rows * PIXEL)
            used = min(COLUMNS, targets - k0)
            _pack(stage, source, filter_, channel, min(some, inner - c0), taps, used, table, transposed)
            for i in range(rows // DEPTH):
                found |= interleave(NP, stage + i * DEPTH * PIXEL, packed + job * target_bytes + i * PANEL)
        if found:
            store(8, flags + chunk * 8, 1.0)

    @task
    def gather(arguments, chunk):
        """Forward, or one phase of the input gradient."""
        chunks, target = integer(arguments, 0), integers(arguments, 7, 6)
        (N, G, _, K), (O, P, Q) = integers(arguments, 16, 4), integers(arguments, 23, 3)
        first, out_step, (images, rows) = (
            integers(arguments, 20, 3),
            integers(arguments, 26, 3),
            integers(arguments, 34, 2),
        )
        width, dense, flat = integer(arguments, 39), integer(arguments, 41), integer(arguments, 42)
        code, bias = integer(arguments, 53), integer(arguments, 55)
        block, block_bytes, flags, configuration = integers(arguments, 60, 4)
        block += chunk * block_bytes
        parts, panels, batches = (P + rows - 1) // rows, (K + COLUMNS - 1) // COLUMNS, (N + images - 1) // images
        pitch, found = width if flat else Q, 0
        row, step = out_step[1] * target[4], out_step[2] * target[5]
        configure_tiles(UNIT, configuration)
        begin, end = share(batches * G * O * parts, chunk, chunks)
        for job in range(begin, end):
            o, g, i0 = job // parts % O, job // (parts * O) % G, job // (parts * O * G) * images
            p0, held = job % parts * rows, min(images, N - i0)
            lines = min(rows, P - p0)
            found |= _fill_strip(arguments, chunk, i0, held, g, o, p0)
            if dense:
                counts = 1, 1, ((held - 1) * rows + lines) * Q
            elif flat:
                counts = held, 1, (lines - 1) * width + Q
            else:
                counts = held, lines, Q
            for panel in range(panels):
                _multiply(arguments, chunk, g * panels + panel, counts, rows * pitch, pitch)
                k0, used = g * K + panel * COLUMNS, min(COLUMNS, K - panel * COLUMNS)
                if bias or code:
                    _finish(block, bias + k0 * SIZE if bias else 0, used, held * rows * pitch, code)
                at = target[0] + i0 * target[1] + k0 * target[2] + (first[0] + o * out_step[0]) * target[3]
                at += (first[1] + p0 * out_step[1]) * target[4] + first[2] * target[5]
                # Rows that follow on each other in the output are one row.
                joined = pitch == Q and row == Q * step
                for i in range(held):
                    for p in range(1 if joined else lines):
                        source = block + (i * rows + p) * pitch * PIXEL
                        count = lines * Q if joined else Q
                        _emit(source, at + i * target[1] + p * row, target[2], step, used, count)
        release_tiles(UNIT)
        if found:
            store(8, flags + chunk * 8, 1.0)

    @device
    def _finish(block, bias, used, pixels, code):
        """Add the bias (0: none) and apply the activation to a block (pixels, COLUMNS), in place."""
        for pixel in range(block, block + pixels * PIXEL, PIXEL):
            for k in range(used):
                value = load(SIZE, pixel + k * SIZE)
                if bias:
                    value += load(SIZE, bias + k * SIZE)
                store(SIZE, pixel + k * SIZE, activate(value, code))

    @device
    def _fill_strip(arguments, chunk, i0, held, g, o, p0):
        """Split what a job reads; return whether something is not finite."""
        source, extent, C = integers(arguments, 1, 6), integers(arguments, 13, 3), integer(arguments, 18)
        in_step, low_row, low_column = integers(arguments, 29, 3), integer(arguments, 32), integer(arguments, 33)
        gathered, planes, rows, width, pixel = integers(arguments, 36, 5)
        depths = integers(arguments, 45, 2)
        strip, strip_bytes, stage, stage_bytes = integers(arguments, 56, 4)
        strip, stage = strip + chunk * strip_bytes, stage + chunk * stage_bytes
        corner, found = (o * in_step[0], p0 * in_step[1] + low_row, low_column), 0
        for i in range(held):
            at = source[0] + (i0 + i) * source[1] + g * C * source[2]
            to = strip + i * planes * rows * width * pixel
            if gathered:
                found |= _split_windows(arguments, to, at, corner, stage)
            else:
                found |= _split_rows(to, at, source, extent, C, depths, corner, rows, width, pixel, stage)
        return found

    @device
    def _split_rows(strip, source, layout, extent, C, depths, corner, rows, width, pixel, stage):
        """Split `rows` rows of each depth, from a corner that may lie outside: zeros for padding."""
        (D, H, W), (d0, h0, w0) = extent, corner
        left = min(max(-w0, 0), width)
        right = max(min(W - w0, width), left)
        found = 0
        for plane in range(depths[1]):
            d = d0 + integer(depths[0], plane)
            for h in range(h0, h0 + rows):
                if d < 0 or d >= D or h < 0 or h >= H:
                    zero_bytes(strip, width * pixel)
                else:
                    zero_bytes(strip, left * pixel)
                    zero_bytes(strip + right * pixel, (width - right) * pixel)
                    row = source + d * layout[3] + h * layout[4] + (w0 + left) * layout[5]
                    found |= _split_pixels(
                        strip + left * pixel, pixel, row, right - left, C, layout[2], layout[5], stage
                    )
                strip += width * pixel
        return found

    @device
    def _split_pixels(target, pixel, source, count, C, channel, step, stage):
        """Split the channels of each of `count` pixels; return whether something is not finite."""
        found = 0
        for start in range(0, count, SOME):
            some = min(SOME, count - start)
            at, row = source + start * step, step
            if channel != SIZE and C > 1:
                _copy_pixels(stage, C * SIZE, at, some, C, channel, step)
                at, row = stage, C * SIZE
            if row == C * SIZE and pixel * DEPTH == C * BLOCK:
                found |= split(NP, at, some * C, target + start * pixel, 64, BLOCK)
            else:
                for q in range(some):
                    found |= split(NP, at + q * row, C, target + (start + q) * pixel, 64, BLOCK)
        return found

    @device
    def _split_windows(arguments, strip, source, corner, floats):
        """Split the whole window of each pixel; return whether something is not finite."""
        layout, extent, C = integers(arguments, 1, 6), integers(arguments, 13, 3), integer(arguments, 18)
        Q, in_step, rows = integer(arguments, 25), integers(arguments, 29, 3), integer(arguments, 38)
        pixel, depths, runs = integer(arguments, 40), integers(arguments, 45, 2), integers(arguments, 47, 2)
        strip_rows, width, length = integers(arguments, 64, 3)
        stage, found = floats + integer(arguments, 44) * SIZE, 0
        _fill(floats, C * SIZE, source, layout, extent, C, depths, corner, strip_rows, width)
        for p in range(rows):
            for q in range(Q):
                window, at = floats + (p * in_step[1] * width + q * in_step[2]) * C * SIZE, stage
                for run in range(runs[1]):
                    offset, count = integers(runs[0] + run * 16, 0, 2)
                    # Whole lines: what is too much is written over by the next run.
                    for i in range(0, count * SIZE, 64):
                        copy_bytes(at + i, window + offset + i, 64)
                    at += count * SIZE
                found |= split(NP, stage, length, strip + (p * Q + q) * pixel, 64, BLOCK)
        return found

    @device
    def _multiply(arguments, chunk, panel, counts, image_pixels, pitch):
        """Compute one panel of results for all pixels of a job: (images, lines, pixels of a line)."""
        planes, rows, width, pixel = integers(arguments, 37, 4)
        held, (offsets, chains, number, steps) = integer(arguments, 43), integers(arguments, 49, 4)
        packed, (strip, strip_bytes) = integer(arguments, 54), integers(arguments, 56, 2)
        (block, block_bytes), (row_step, column_step) = integers(arguments, 60, 2), integers(arguments, 67, 2)
        strip, block = strip + chunk * strip_bytes, block + chunk * block_bytes
        image_bytes, row, a_row = planes * rows * width * pixel, row_step * width * pixel, column_step * pixel
        images, lines, pixels = counts
        # Registers hold more rows than a short line: what is beyond it is the next line's.
        last, rows_held = max(pixels - held, 0), min(held, pixels) if UNIT == VECTORS else held
        spare = block + block_bytes - 16 * PIXEL
        total = images * lines * ((pixels + held - 1) // held)
        for chain in range(number):
            start, length = integers(chains + chain * 16, 0, 2)
            table, b = offsets + start * 8, packed + (panel * steps + start) * PANEL
            i, p, q = 0, 0, 0
            for tile in range(0, total, TILES):
                at = min(q, last)
                # The first chain writes what later ones add to.
                done0 = q - at if chain else 0
                a0, out0 = strip + i * image_bytes + p * row + at * a_row, i * image_pixels + p * pitch + at
                i, p, q = _next(i, p, q + held, pixels, lines)
                at = min(q, last)
                done1 = q - at if chain else 0
                a1, out1 = strip + i * image_bytes + p * row + at * a_row, i * image_pixels + p * pitch + at
                alone = tile + 1 == total
                if TILES == 2 and not alone:
                    i, p, q = _next(i, p, q + held, pixels, lines)
                multiply_planes(
                    UNIT, PRODUCTS, ROWS, a0, a0 if alone else a1, a_row, 64, table, length, b, block + out0 * PIXEL,
                    spare if alone else block + out1 * PIXEL, PIXEL, rows_held, chain, done0, done1,
                )  # fmt: skip

    @device
    def _next(i, p, q, pixels, lines):
        """Return the tile that follows, of the next line or image after the last of one."""
        if q >= pixels:
            q, p = 0, p + 1
        if p == lines:
            p, i = 0, i + 1
        return i, p, q

    return Tasks(pack, gather)
