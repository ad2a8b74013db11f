"""The loops of implicit GEMM around its register tile.

`pack` puts the weight into panels; `gather` computes results from strips and panels (forward, and each phase of the
input gradient); `reduce` sums up a weight gradient and `unpack` puts it in order. The folded twins are for phases
whose columns are several pixels of a few channels each (see `blocking.py`).

Arguments are many and all int64: those of every task over jobs begin with `implicit_gemm._numbers`. Strides, offsets
and lengths in the names of memory are bytes; inner and targets are the channels of one group that are summed over
and that result; source and target are what is read and what results.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from .blocking import CHAIN, LINE
from .compile import Task, device, share, task
from .simd import copy_part, fence, fetch, integer, integers, load, multiply_rows, store, zero_bytes
from .strips import strips

# Jobs whose float32 sums are added up in float32.
JOBS_PER_SUM = 256


class Tasks(NamedTuple):
    """The loops around a register tile."""

    pack: Task
    pack_folded: Task
    gather: Task
    gather_folded: Task
    reduce: Task
    unpack: Task


class Jobs(NamedTuple):
    """Device functions of every task over jobs."""

    line: Callable[..., Any]
    job: Callable[..., Any]
    strip: Callable[..., Any]


@lru_cache(maxsize=16)
def jobs(tile, itemsize):
    """Return what tasks over jobs have in common."""
    _fill_strip = strips(tile, itemsize).fill

    @device
    def _line(place):
        """Return the first address from `place` on that begins a cache line."""
        return (place + LINE - 1) // LINE * LINE

    @device
    def _job(job, parts, O, G, images):
        """Return the part, depth, group and first image of a job."""
        return job % parts, job // parts % O, job // (parts * O) % G, job // (parts * O * G) * images

    @device
    def _strip(arguments, source, strip, i0, held, o, p0, C):
        """Return the address of the first window of a job: in the source itself, or in a strip that is filled."""
        strides, extent, in_step = integers(arguments, 3, 5), integers(arguments, 15, 3), integers(arguments, 31, 3)
        low, depths = integers(arguments, 34, 3), integers(arguments, 45, 2)
        in_place, rows, pitch, pixel, _, image_bytes = integers(arguments, 39, 6)
        corner = (o * in_step[0], p0 * in_step[1] + low[1], low[2])
        if in_place:
            at = source + i0 * strides[0] + (corner[0] + low[0]) * strides[2] + corner[1] * strides[3]
            return at + corner[2] * strides[4]
        layout = (0, strides[0], strides[1], strides[2], strides[3], strides[4])
        for i in range(held):
            at = source + (i0 + i) * strides[0]
            _fill_strip(strip + i * image_bytes, pixel, at, layout, extent, C, depths, corner, rows, pitch)
        return strip

    return Jobs(_line, _job, _strip)


def _gather(tile, itemsize, folded):
    """Return the task for forward or one phase of the input gradient."""
    ROWS, COLUMNS, LANES = tile
    HALF = max(ROWS // 2, 1)
    WIDTH, SIZE, FOLDED = tile.width, itemsize, folded
    PIXEL = WIDTH * SIZE
    _finish, _emit = strips(tile, itemsize).finish, strips(tile, itemsize).emit
    _line, _job, _strip = jobs(tile, itemsize)

    @task
    def gather(arguments, chunk):
        """Forward, or one phase of the input gradient."""
        chunks, source, target = integers(arguments, 0, 3)
        from_, to = integers(arguments, 3, 6), integers(arguments, 9, 6)
        (N, G, C, K), (O, P, Q) = integers(arguments, 18, 4), integers(arguments, 22, 3)
        first, out_step = integers(arguments, 25, 3), integers(arguments, 28, 3)
        (images, rows), kinds, kind = integers(arguments, 37, 2), integer(arguments, 48), integer(arguments, 49)
        offsets, chains, depth, code, weights, bias, stream = integers(arguments, 50, 7)
        strips, strip_bytes, blocks, block_bytes, masks, mask_bytes = integers(arguments, 57, 6)
        fold, extent, T = integers(arguments, 63, 3), integers(arguments, 66, 3), integer(arguments, 69)
        strip, block = _line(strips + chunk * strip_bytes), _line(blocks + chunk * block_bytes)
        parts, panels, groups = (P + rows - 1) // rows, (K + WIDTH - 1) // WIDTH, (N + images - 1) // images
        target += first[0] * to[2] + first[1] * to[3] + first[2] * to[4]
        row, step = out_step[1] * to[3], out_step[2] * to[4]
        in_step = integers(arguments, 31, 3)
        dense = G == 1 and from_[4] == C * SIZE and from_[3] == integer(arguments, 17) * from_[4]
        begin, end = share(groups * G * O * parts, chunk, chunks)
        for job in range(begin, end):
            part, o, g, i0 = _job(job, parts, O, G, images)
            p0, held = part * rows, min(images, N - i0)
            lines = min(rows, P - p0)
            seen = held * lines * Q
            a = _strip(arguments, source + g * from_[5], strip, i0, held, o, p0, C)
            windows = kinds + integer(kind, part if held == images else parts + part)
            table = (seen + ROWS - 1) // ROWS * ROWS * 8
            results = target + i0 * to[0] + g * to[5] + o * out_step[0] * to[2] + p0 * row
            # Dense pixels that the next job reads are fetched while the last panel is multiplied.
            beyond = images * from_[0] if images > 1 else rows * in_step[1] * from_[3]
            place = source + i0 * from_[0] + o * in_step[0] * from_[2] + p0 * in_step[1] * from_[3] + beyond
            length = beyond * ROWS // seen if dense else 0
            for panel in range(panels):
                used = min(WIDTH, K - panel * WIDTH)
                into, k0 = results + panel * WIDTH * to[1], g * panels + panel
                straight = not FOLDED and to[1] == SIZE and used in (WIDTH, LANES) and code < 3
                _tiles(
                    a, windows, seen, offsets, chains, windows + 3 * table, weights + k0 * depth * PIXEL,
                    into if straight else block, windows + (table if straight else 2 * table), used <= LANES,
                    bias + k0 * PIXEL if bias else 0, code if code < 3 else 0, stream if straight else 0,
                    place, length if panel == panels - 1 else 0, masks + panel * mask_bytes,
                )  # fmt: skip
                if straight:
                    continue
                if code >= 3:
                    _finish(block, used, seen, code)
                if FOLDED:
                    at, corner = target + i0 * to[0] + g * to[5], (o * fold[0], p0 * fold[1])
                    _spread(block, at, to, extent, corner, (held, lines, Q), fold, T, panel * WIDTH, used)
                    continue
                # Rows that follow on each other in the output are one row.
                joined = lines == 1 or row == Q * step
                number, count = (held, lines * Q) if joined else (held * lines, Q)
                for i in range(number):
                    at = i * to[0] if joined else i // lines * to[0] + i % lines * row
                    _emit(block + i * count * PIXEL, into + at, to[1], step, used, count)
        if stream:
            fence()

    @device
    def _tiles(
        a,
        windows,
        seen,
        offsets,
        chains,
        tiles,
        weights,
        out,
        results,
        narrow,
        bias,
        code,
        stream,
        ahead,
        length,
        masks,
    ):
        """Compute the pixels of a job for one panel."""
        for start in range(0, seen, ROWS):
            here, rows = windows + start * 8, results + start * 8
            first, count = integers(tiles + start // ROWS * 16, 0, 2)
            for line in range(0, length, LINE):
                fetch(ahead + start // ROWS * length + line)
            for i in range(count):
                run, runs, steps = integers(chains + (first + i) * 24, 0, 3)
                last = i == count - 1
                b, c, taps = bias if last else 0, code if last else 0, offsets + run * 16
                past, there = stream if last else 0, masks + run * 8
                if narrow:
                    multiply_rows(
                        ROWS, 1, LANES, SIZE, FOLDED, 0,
                        a, here, SIZE, taps, runs, steps, weights, PIXEL, out, rows, i, b, c, past, there, 0, 0,
                    )  # fmt: skip
                elif seen - start > HALF:
                    multiply_rows(
                        ROWS, COLUMNS, LANES, SIZE, FOLDED, 0,
                        a, here, SIZE, taps, runs, steps, weights, PIXEL, out, rows, i, b, c, past, there, 0, 0,
                    )  # fmt: skip
                else:
                    multiply_rows(
                        HALF, COLUMNS, LANES, SIZE, FOLDED, 0,
                        a, here, SIZE, taps, runs, steps, weights, PIXEL, out, rows, i, b, c, past, there, 0, 0,
                    )  # fmt: skip

    @device
    def _spread(block, target, to, extent, corner, counts, fold, T, first, used):
        """Write a block whose columns are pixels and channels (fold, T), as far as they are in the image."""
        held, lines, Q = counts
        column = first
        while column < first + used:
            pixel, c = column // T, column % T
            # Channels of one pixel, side by side or not.
            length = min(T - c, first + used - column)
            d, h, w = pixel // (fold[1] * fold[2]), pixel // fold[2] % fold[1], pixel % fold[2]
            at, start = target + c * to[1] + (corner[0] + d) * to[2] + w * to[4], block + (column - first) * SIZE
            for line in range(held * lines if corner[0] + d < extent[0] else 0):
                row = corner[1] + line % lines * fold[1] + h
                place, there = at + line // lines * to[0] + row * to[3], start + line * Q * PIXEL
                if row < extent[1]:
                    for q in range((extent[2] - w + fold[2] - 1) // fold[2]):
                        if to[1] == SIZE:
                            copy_part(LANES, SIZE, place + q * fold[2] * to[4], there + q * PIXEL, length)
                        else:
                            for i in range(length):
                                value = load(SIZE, there + q * PIXEL + i * SIZE)
                                store(SIZE, place + q * fold[2] * to[4] + i * to[1], value)
            column += length

    return gather


@lru_cache(maxsize=16)
def tasks(tile, itemsize):
    """Return the tasks for one register tile, whose shape is a constant in them.

    Strides, offsets and lengths in the names of memory are bytes; inner and targets are the channels of one group
    that are summed over and that result.
    """
    ROWS, COLUMNS, LANES = tile
    WIDTH, SIZE = tile.width, itemsize
    PIXEL = WIDTH * SIZE
    moves = strips(tile, itemsize)
    _copy_pixels, _pack_panel, _unpack_panel = moves.copy_pixels, moves.pack, moves.unpack
    _line, _job, _strip = jobs(tile, itemsize)

    @task
    def pack(arguments, chunk):
        """(G*K, C, T, R, S) -> (G, panels, T*R*S*C, WIDTH); transposed, filters and channels change places."""
        chunks, packed, weight, filter_, channel, G, inner, targets = integers(arguments, 0, 8)
        taps, depth, table, transposed = integers(arguments, 8, 4)
        panels = (targets + WIDTH - 1) // WIDTH
        group, across = (filter_ * inner, channel) if transposed else (filter_ * targets, filter_)
        begin, end = share(G * panels, chunk, chunks)
        for job in range(begin, end):
            g, k0 = job // panels, job % panels * WIDTH
            source, target = weight + g * group + k0 * across, packed + job * depth * PIXEL
            _pack_panel(target, source, filter_, channel, inner, taps, min(WIDTH, targets - k0), table, transposed)

    @task
    def pack_folded(arguments, chunk):
        """(G*K, C, T, R, S) -> (G, panels, taps, C, WIDTH), the columns being pixels and targets."""
        chunks, packed, weight, filter_, channel, G, inner, targets = integers(arguments, 0, 8)
        taps, depth, table, transposed, pixels = integers(arguments, 8, 5)
        panels = (pixels * targets + WIDTH - 1) // WIDTH
        group, across = (filter_ * inner, channel) if transposed else (filter_ * targets, filter_)
        along = filter_ if transposed else channel
        begin, end = share(G * panels, chunk, chunks)
        for job in range(begin, end):
            g, panel, first = job // panels, packed + job * depth * PIXEL, job % panels * WIDTH
            for k in range(WIDTH):
                pixel, source = (first + k) // targets, weight + g * group + (first + k) % targets * across
                for tap in range(taps):
                    member = integer(table, tap * pixels + pixel) if pixel < pixels else -1
                    for i in range(inner):
                        value = load(SIZE, source + i * along + member * SIZE) if member >= 0 else 0.0
                        store(SIZE, panel + (tap * inner + i) * PIXEL + k * SIZE, value)

    @task
    def reduce(arguments, chunk):
        """Weight gradient: sums in the order of the packed weight, of a thread's units or of its pixels."""
        chunks, source, target = integers(arguments, 0, 3)
        from_, to = integers(arguments, 3, 6), integers(arguments, 9, 6)
        (N, G, C, K), (O, P, Q) = integers(arguments, 18, 4), integers(arguments, 22, 3)
        in_step, (images, rows) = integers(arguments, 31, 3), integers(arguments, 37, 2)
        strip_row, pixel = integer(arguments, 43), integer(arguments, 42)
        even, copies, segments, depth, partial, partial_bytes, sums, sum_bytes = integers(arguments, 47, 8)
        products, starts, joined, straight = integers(arguments, 55, 4)
        strips, strip_bytes, blocks, block_bytes = integers(arguments, 59, 4)
        strip, block = _line(strips + chunk * strip_bytes), _line(blocks + chunk * block_bytes)
        parts, panels, tiles = (P + rows - 1) // rows, (K + WIDTH - 1) // WIDTH, depth // ROWS
        jobs, units = (N + images - 1) // images * O * parts, G * panels * segments
        begin, end, u0, u1 = 0, jobs, 0, units
        if copies == 1:
            u0, u1 = share(units, chunk, chunks)
        else:
            begin, end = share(jobs, chunk, chunks)
            partial, sums = partial + chunk * partial_bytes, sums + chunk * sum_bytes
        partial = _line(partial)
        step = in_step[2] * pixel if Q > 1 else in_step[1] * strip_row
        # Pixels side by side that the next job reads are fetched while this one's are multiplied: first the target's,
        # then the source's, `stride` bytes each step.
        read = (0, 0)
        if G == 1 and from_[1] == SIZE and to[1] == SIZE:
            read = (images * to[0], images * from_[0]) if images > 1 else (rows * to[3], rows * in_step[1] * from_[3])
        stride = (read[0] + read[1]) // max((u1 - u0) * tiles // segments * images * rows * Q, 1) + 1
        fresh = True
        for job in range(begin, end):
            part, o, _, i0 = _job(job, parts, O, 1, images)
            p0, held = part * rows, min(images, N - i0)
            lines = min(rows, P - p0)
            runs, steps = (held, lines * Q) if joined else (held * lines, Q)
            g_before, panel_before, a = -1, -1, strip
            later = (
                target + i0 * to[0] + o * to[2] + p0 * to[3] + read[0],
                source + i0 * from_[0] + o * in_step[0] * from_[2] + p0 * in_step[1] * from_[3] + read[1] - read[0],
            )
            fetched = 0
            for unit in range(u0, u1):
                panel, segment = unit // segments, unit % segments
                g, k0 = panel // panels, panel % panels * WIDTH
                used = min(WIDTH, K - k0)
                if g != g_before:
                    a = _strip(arguments, source + g * from_[5], strip, i0, held, o, p0, C)
                at = target + i0 * to[0] + g * to[5] + k0 * to[1] + o * to[2] + p0 * to[3]
                if panel != panel_before and not straight:
                    for i in range(held):
                        length = lines * Q
                        _copy_pixels(block + i * length * PIXEL, PIXEL, at + i * to[0], length, used, to[1], to[4])
                g_before, panel_before = g, panel
                t0, t1 = share(tiles, segment, segments)
                _reduce_unit(
                    a, products, step, starts, runs, steps, at if straight else block, to[4] if straight else PIXEL,
                    partial + panel * depth * PIXEL, even, t0, t1, used <= LANES, not fresh,
                    later, read[0], fetched, stride,
                )  # fmt: skip
                fetched += (t1 - t0) * runs * steps * stride
            fresh = False
            if sums and ((job - begin) % JOBS_PER_SUM == JOBS_PER_SUM - 1 or job == end - 1):
                first = job - begin < JOBS_PER_SUM
                for i in range(_unit(u0, segments, tiles, depth), _unit(u1, segments, tiles, depth)):
                    before = 0.0 if first else load(8, sums + i * 8)
                    store(8, sums + i * 8, before + load(SIZE, partial + i * SIZE))
                fresh = True
        if begin == end:
            zero_bytes(partial, units // segments * depth * PIXEL)
            zero_bytes(sums, units // segments * depth * WIDTH * 8 if sums else 0)

    @device
    def _unit(unit, segments, tiles, depth):
        """Return the first element of a unit."""
        return unit // segments * depth * WIDTH + share(tiles, unit % segments, segments)[0] * ROWS * WIDTH

    @device
    def _reduce_unit(
        a,
        products,
        step,
        starts,
        runs,
        steps,
        grads,
        grad_step,
        partial,
        even,
        t0,
        t1,
        narrow,
        add,
        later,
        bound,
        fetched,
        stride,
    ):
        """Add the products of a job with one panel of gradients: the rows of a tile are taps and channels."""
        # Rows longer than a chain come one at a time, and are cut.
        for q in range(0, steps, CHAIN):
            more, here, b = 1 if add or q else 0, a + q * step, grads + q * grad_step
            length = min(CHAIN, steps - q)
            for t in range(t0, t1):
                at, out = products + t * ROWS * 8, partial + t * ROWS * PIXEL
                ahead = (later[0] if fetched < bound else later[1]) + fetched
                fetched += runs * length * stride
                if narrow:
                    multiply_rows(
                        ROWS, 1, LANES, SIZE, 0, 1,
                        here, at, step, starts, runs, length, b, grad_step, out, even, more, 0, 0, 0, 0,
                        ahead, stride,
                    )  # fmt: skip
                else:
                    multiply_rows(
                        ROWS, COLUMNS, LANES, SIZE, 0, 1,
                        here, at, step, starts, runs, length, b, grad_step, out, even, more, 0, 0, 0, 0,
                        ahead, stride,
                    )  # fmt: skip

    @task
    def unpack(arguments, chunk):
        """Add up the copies (G, panels, T*R*S*C, WIDTH) and put them in order (G*K, C, T, R, S)."""
        chunks, target, filter_, channel, G, C, K, taps = integers(arguments, 0, 8)
        copies, _, depth, partial, partial_bytes, sums, sum_bytes = integers(arguments, 8, 7)
        panels, first = (K + WIDTH - 1) // WIDTH, _line(partial)
        begin, end = share(G * panels, chunk, chunks)
        for job in range(begin, end):
            g, k0 = job // panels, job % panels * WIDTH
            if copies > 1 or sums:
                for i in range(job * depth * WIDTH, (job + 1) * depth * WIDTH):
                    total = 0.0
                    for copy in range(copies):
                        if sums:
                            total += load(8, sums + copy * sum_bytes + i * 8)
                        else:
                            total += load(SIZE, _line(partial + copy * partial_bytes) + i * SIZE)
                    store(SIZE, first + i * SIZE, total)
            _unpack_panel(
                first + job * depth * PIXEL, target + (g * K + k0) * filter_, filter_, channel, C, taps,
                min(WIDTH, K - k0),
            )  # fmt: skip

    return Tasks(pack, pack_folded, _gather(tile, itemsize, 0), _gather(tile, itemsize, 1), reduce, unpack)
