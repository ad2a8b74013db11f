"""Implicit GEMM: the matrix product of im2col without its matrix.

Every direction is one loop over pixels, with a strip of the source in the cache and the register tile of `simd.py`
inside:

    forward       y[i]  = sum over taps  x[i*stride + delta]  @ w[tap]      delta = tap*dilation - before
    input_grad    dx[i*stride + phase] = sum over the phase's taps  dy[i + delta] @ w[tap]^T
    weight_grad   dw[tap] = sum over pixels  x[i*stride + delta]^T @ dy[i]

`blocking.py` cuts this into phases and jobs (after Chetlur et al., "cuDNN: efficient primitives for deep learning",
2014, section 3), `strips.py` moves pixels and weights. The weight is packed once per call, a panel of filters at a
time, in the order of the taps. Bias and activation are applied in registers, and results of whole vectors with
channels last go straight to the output; all others pass through a block in the cache.
"""

from functools import lru_cache
from math import prod
from typing import NamedTuple

import numpy as np

from ..registry import Buffer
from . import threads
from .blocking import CHAIN, LINE, plans
from .compile import Task, device, share, task
from .epilogue import CODES
from .memory import address
from .simd import fence, fetch, integer, integers, load, multiply_rows, store, tile_for, zero_bytes
from .strips import strips

# Operations that are done before a second thread has woken.
SERIAL_FLOPS = 1_000_000
# Bytes of output beyond which it is not kept in the caches: a quarter of a third-level cache.
STREAMED = 8 * 1024 * 1024
# Jobs whose float32 sums are added up in float32.
JOBS_PER_SUM = 256


def supports(geometry, direction):
    """Every floating-point geometry."""
    if geometry.dtype.kind != "f":
        return False, f"the register tile is floating-point, not {geometry.dtype}"
    return True, ""


def seconds(geometry, direction, threads_):
    """Predicted time: the tile's rate, less what its edges waste, and the traffic of packing."""
    g = geometry
    tile = tile_for(g.dtype.itemsize)
    C, K = g.in_channels // g.groups, g.out_channels // g.groups
    columns = C if direction == "input_grad" else K
    used = columns / (-(-columns // tile.width) * tile.width)
    traffic = g.bytes
    if direction == "weight_grad":
        used *= min(1.0, C * g.kernel_size[2] / tile.rows)
    rate = 90e9 * threads_ * (4 / g.dtype.itemsize) * max(used, 0.02)
    return 50e-6 + g.flops / rate + traffic / (8e9 * threads_)


def _chunks(g):
    return 1 if g.flops < SERIAL_FLOPS else threads.count()


def _plans(g, direction):
    return plans(g, direction, _chunks(g))


def _panels(g, direction, tile):
    """Return (groups, panels of a group)."""
    targets = (g.in_channels if direction == "input_grad" else g.out_channels) // g.groups
    return g.groups, -(-targets // tile.width)


def workspace(geometry, direction, limit):
    """Per thread a strip of the source and a block of the result; the packed weight or its gradient."""
    g, count = geometry, _chunks(geometry)
    found = [plan for _, plan in _plans(g, direction) if plan]
    if not found or g.batch == 0:
        return {}
    width = found[0].tile.width
    lines = LINE // g.dtype.itemsize
    strip = max(plan.strip_bytes for plan in found) // g.dtype.itemsize
    most = max(_whole(plan.most_pixels, plan.tile.rows) for plan in found)
    G, panels = _panels(g, direction, found[0].tile)
    buffers = {
        "strips": Buffer((count, strip + lines), g.dtype),
        "blocks": Buffer((count, most * width + lines), g.dtype),
    }
    if direction == "weight_grad":
        split = _split(g, found[0])
        buffers["partial"] = Buffer((split.copies, split.panels * len(found[0].products) * width + lines), g.dtype)
        if split.long:
            buffers["sums"] = Buffer(buffers["partial"].shape, np.dtype(np.float64))
    else:
        packed = G * panels * width * sum(plan.depth for plan in found)
        buffers["packed"] = Buffer((packed + 2 * lines * width,), g.dtype)
        buffers["bias"] = Buffer((G, panels * width), g.dtype)
    return buffers


def _aligned(place):
    return _whole(place, LINE)


def _whole(count, step):
    return -(-count // step) * step


class Split(NamedTuple):
    """How threads share a weight gradient: units of it, or pixels and a copy each."""

    panels: int
    segments: int
    copies: int
    long: bool


def _split(g, plan):
    """Share out a gradient larger than the input, which every thread then reads."""
    count, (G, panels) = _chunks(g), _panels(g, "weight_grad", plan.tile)
    number = G * panels
    shared = number * len(plan.products) * plan.tile.width > g.batch * g.in_channels * prod(g.input_size)
    # Few panels are cut, so that each thread has as much to do.
    segments = count if shared and number % count and number < 8 * count else 1
    jobs = plan.jobs if shared else -(-plan.jobs // count)
    return Split(number, segments, 1 if shared else count, jobs > JOBS_PER_SUM)


def forward(geometry, x, weight, bias, activation, out, workspace):
    """Write the convolution of `x` with `weight`, plus bias, through the activation, to `out`."""
    _pack(geometry, "forward", weight, workspace)
    _gather(geometry, "forward", x, bias, activation, out, workspace)


def input_grad(geometry, grad_output, weight, out, workspace):
    """Write the gradient with respect to the input to `out`."""
    _pack(geometry, "input_grad", weight, workspace)
    _gather(geometry, "input_grad", grad_output, None, None, out, workspace)


def _packed(g, direction, workspace):
    """Yield (phase, plan, address of its packed weight)."""
    place = _aligned(address(workspace["packed"])) if "packed" in workspace else 0
    for phase, plan in _plans(g, direction):
        yield phase, plan, place
        if plan is not None:
            G, panels = _panels(g, direction, plan.tile)
            place += G * panels * plan.depth * plan.tile.width * g.dtype.itemsize


def _pack(g, direction, weight, workspace):
    """Put the weight into the order in which tiles read it."""
    inner, targets = _channels(g, direction)
    for _, plan, packed in _packed(g, direction, workspace):
        if plan is not None and g.batch:
            taps = plan.depth // inner if direction == "forward" else len(plan.panel)
            tasks(plan.tile, g.dtype.itemsize).pack(
                _chunks(g), packed, address(weight), *weight.strides[:2], g.groups, inner, targets, taps, plan.depth,
                address(plan.panel), direction == "input_grad",
            )  # fmt: skip


def _channels(g, direction):
    """Return the channels of one group that are summed over, and those that result."""
    C, K = g.in_channels // g.groups, g.out_channels // g.groups
    return (K, C) if direction == "input_grad" else (C, K)


def _gather(g, direction, source, bias, activation, out, workspace):
    inner, targets = _channels(g, direction)
    if not all(plan for _, plan in _plans(g, direction)):
        out[...] = 0
    for _, plan, packed in _packed(g, direction, workspace):
        if plan is None or g.batch == 0:
            continue
        padded = 0
        if bias is not None:
            padded = address(workspace["bias"])
            workspace["bias"][:, :targets] = bias.reshape(g.groups, targets)
        strips_, blocks = workspace["strips"], workspace["blocks"]
        tasks(plan.tile, g.dtype.itemsize).gather(
            len(strips_), address(source), address(out), *_numbers(plan, g.groups, inner, targets),
            address(plan.kinds), address(plan.kind), address(plan.offsets), address(plan.chains), plan.depth,
            CODES[activation], packed, padded, _streams(plan, out),
            address(strips_), strips_.strides[0], address(blocks), blocks.strides[0],
        )  # fmt: skip


def _streams(plan, out):
    """Whether results pass the caches by: there are too many to be there when they are read."""
    lines = all(place % LINE == 0 for place in (address(out), plan.target.group, *plan.target.strides[2:]))
    return out.nbytes >= STREAMED and lines and plan.target.strides[0] % LINE == 0


def _numbers(plan, groups, inner, targets):
    """Return what every task over a plan's jobs begins with, after the addresses of source and target."""
    phase, strip = plan.phase, plan.strip
    return (
        *plan.source.strides, plan.source.group, *plan.target.strides, plan.target.group, *plan.source.extent,
        plan.source.batch, groups, inner, targets, *phase.size, *phase.first, *phase.out_step, *phase.in_step,
        *plan.corner, plan.cut.images, plan.cut.rows, strip.in_place, plan.strip_rows, strip.pitch, strip.pixel,
        strip.row, plan.image_bytes, address(plan.depths), len(plan.depths), address(plan.even),
    )  # fmt: skip


def weight_grad(geometry, grad_output, x, out, workspace):
    """Write the gradient with respect to the weight to `out`."""
    g = geometry
    if g.batch == 0:
        out[...] = 0
        return
    ((_, plan),) = _plans(g, "weight_grad")
    (C, K), split, count = _channels(g, "weight_grad"), _split(g, plan), _chunks(g)
    strips_, blocks, partial = (workspace[name] for name in ("strips", "blocks", "partial"))
    sums = workspace["sums"] if split.long else None
    run = tasks(plan.tile, g.dtype.itemsize)
    where = (
        split.copies, split.segments, len(plan.products), address(partial), partial.strides[0],
        0 if sums is None else address(sums), 0 if sums is None else sums.strides[0],
    )  # fmt: skip
    run.reduce(
        count, address(x), address(grad_output), *_numbers(plan, g.groups, C, K), *where, address(plan.products),
        address(plan.starts), plan.joined, address(strips_), strips_.strides[0], address(blocks), blocks.strides[0],
    )  # fmt: skip
    run.unpack(count, address(out), *out.strides[:2], g.groups, C, K, plan.depth // C, *where)


class Tasks(NamedTuple):
    """The loops around a register tile."""

    pack: Task
    gather: Task
    reduce: Task
    unpack: Task


@lru_cache(maxsize=16)
def tasks(tile, itemsize):
    """Return the tasks for one register tile, whose shape is a constant in them.

    Strides, offsets and lengths in the names of memory are bytes; inner and targets are the channels of one group
    that are summed over and that result.
    """
    ROWS, COLUMNS, LANES = tile
    HALF = max(ROWS // 2, 1)
    WIDTH, SIZE = tile.width, itemsize
    PIXEL = WIDTH * SIZE
    _fill_strip, _copy_pixels, _finish, _emit, _pack_panel, _unpack_panel = strips(tile, itemsize)

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
    def gather(arguments, chunk):
        """Forward, or one phase of the input gradient."""
        chunks, source, target = integers(arguments, 0, 3)
        from_, to = integers(arguments, 3, 6), integers(arguments, 9, 6)
        (N, G, C, K), (O, P, Q) = integers(arguments, 18, 4), integers(arguments, 22, 3)
        first, out_step = integers(arguments, 25, 3), integers(arguments, 28, 3)
        (images, rows), kinds, kind = integers(arguments, 37, 2), integer(arguments, 48), integer(arguments, 49)
        offsets, chains, depth, code, weights, bias, stream = integers(arguments, 50, 7)
        strips, strip_bytes, blocks, block_bytes = integers(arguments, 57, 4)
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
                straight = to[1] == SIZE and used in (WIDTH, LANES) and code < 3
                _tiles(
                    a, windows, seen, offsets, chains, windows + 3 * table, weights + k0 * depth * PIXEL,
                    into if straight else block, windows + (table if straight else 2 * table), used <= LANES,
                    bias + k0 * PIXEL if bias else 0, code if code < 3 else 0, stream if straight else 0,
                    place, length if panel == panels - 1 else 0,
                )  # fmt: skip
                if straight:
                    continue
                if code >= 3:
                    _finish(block, used, seen, code)
                # Rows that follow on each other in the output are one row.
                joined = lines == 1 or row == Q * step
                number, count = (held, lines * Q) if joined else (held * lines, Q)
                for i in range(number):
                    at = i * to[0] if joined else i // lines * to[0] + i % lines * row
                    _emit(block + i * count * PIXEL, into + at, to[1], step, used, count)
        if stream:
            fence()

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

    @device
    def _tiles(
        a, windows, seen, offsets, chains, tiles, weights, out, results, narrow, bias, code, stream, ahead, length
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
                past = stream if last else 0
                if narrow:
                    multiply_rows(
                        ROWS, 1, LANES, SIZE, a, here, SIZE, taps, runs, steps, weights, PIXEL, out, rows, i, b, c, past
                    )  # fmt: skip
                elif seen - start > HALF:
                    multiply_rows(
                        ROWS, COLUMNS, LANES, SIZE,
                        a, here, SIZE, taps, runs, steps, weights, PIXEL, out, rows, i, b, c, past,
                    )  # fmt: skip
                else:
                    multiply_rows(
                        HALF, COLUMNS, LANES, SIZE,
                        a, here, SIZE, taps, runs, steps, weights, PIXEL, out, rows, i, b, c, past,
                    )  # fmt: skip

    @task
    def reduce(arguments, chunk):
        """Weight gradient: sums in the order of the packed weight, of a thread's units or of its pixels."""
        chunks, source, target = integers(arguments, 0, 3)
        from_, to = integers(arguments, 3, 6), integers(arguments, 9, 6)
        (N, G, C, K), (O, P, Q) = integers(arguments, 18, 4), integers(arguments, 22, 3)
        in_step, (images, rows) = integers(arguments, 31, 3), integers(arguments, 37, 2)
        strip_row, pixel = integer(arguments, 43), integer(arguments, 42)
        even, copies, segments, depth, partial, partial_bytes, sums, sum_bytes = integers(arguments, 47, 8)
        products, starts, joined = integers(arguments, 55, 3)
        strips, strip_bytes, blocks, block_bytes = integers(arguments, 58, 4)
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
        fresh = True
        for job in range(begin, end):
            part, o, _, i0 = _job(job, parts, O, 1, images)
            p0, held = part * rows, min(images, N - i0)
            lines = min(rows, P - p0)
            runs, steps = (held, lines * Q) if joined else (held * lines, Q)
            g_before, panel_before, a = -1, -1, strip
            for unit in range(u0, u1):
                panel, segment = unit // segments, unit % segments
                g, k0 = panel // panels, panel % panels * WIDTH
                used = min(WIDTH, K - k0)
                if g != g_before:
                    a = _strip(arguments, source + g * from_[5], strip, i0, held, o, p0, C)
                if panel != panel_before:
                    at = target + i0 * to[0] + g * to[5] + k0 * to[1] + o * to[2] + p0 * to[3]
                    for i in range(held):
                        length = lines * Q
                        _copy_pixels(block + i * length * PIXEL, PIXEL, at + i * to[0], length, used, to[1], to[4])
                g_before, panel_before = g, panel
                t0, t1 = share(tiles, segment, segments)
                _reduce_unit(
                    a, products, step, starts, runs, steps, block, partial + panel * depth * PIXEL, even, t0, t1,
                    used <= LANES, not fresh,
                )  # fmt: skip
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
    def _reduce_unit(a, products, step, starts, runs, steps, grads, partial, even, t0, t1, narrow, add):
        """Add the products of a job with one panel of gradients: the rows of a tile are taps and channels."""
        # Rows longer than a chain come one at a time, and are cut.
        for q in range(0, steps, CHAIN):
            more, here, b = 1 if add or q else 0, a + q * step, grads + q * PIXEL
            length = min(CHAIN, steps - q)
            for t in range(t0, t1):
                at, out = products + t * ROWS * 8, partial + t * ROWS * PIXEL
                if narrow:
                    multiply_rows(
                        ROWS, 1, LANES, SIZE,
                        here, at, step, starts, runs, length, b, PIXEL, out, even, more, 0, 0, 0,
                    )  # fmt: skip
                else:
                    multiply_rows(
                        ROWS, COLUMNS, LANES, SIZE,
                        here, at, step, starts, runs, length, b, PIXEL, out, even, more, 0, 0, 0,
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

    return Tasks(pack, gather, reduce, unpack)
