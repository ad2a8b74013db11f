"""Implicit GEMM: the matrix product of im2col without its matrix.

Every direction is one loop over output rows, with a strip of the source in the cache and the register tile of
`simd.py` inside:

    forward       y[i]  = sum over taps  x[i*stride + delta]  @ w[tap]      delta = tap*dilation - before
    input_grad    dx[i*stride + phase] = sum over the phase's taps  dy[i + delta] @ w[tap]^T
    weight_grad   dw[tap] = sum over pixels  x[i*stride + delta]^T @ dy[i]

A strided input gradient falls into stride**dims phases, each a dense convolution of dy with the taps that meet it
(Dumoulin & Visin 2016, section 4; Chetlur et al., "cuDNN: efficient primitives for deep learning", 2014, section 3).
The strip holds the rows of one task, padded and with channels last whatever the format, so that a row of taps is one
run of S*C numbers; the weight is packed once per call in that order, a panel of filters at a time. Bias and activation
are applied while a block of output is still in the cache.
"""

from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

import numpy as np

from ..registry import Buffer
from . import threads
from .compile import Task, device, share, task
from .epilogue import CODES
from .memory import address, extent_of, layout_of
from .simd import Tile, copy_bytes, integer, integers, load, multiply_tile, store, tile_for, zero_bytes
from .strips import pack_table, strips

# Products per running sum: the rounding error of a float32 sum grows with its length.
CHAIN = 512
# Pixels per running sum of a weight gradient, where sums over neighbouring strips are added in float32 too.
PIXEL_CHAIN = 512
# Operations that are done before a second thread has woken.
SERIAL_FLOPS = 1_000_000
# Bytes of source that one task keeps in the second-level cache.
STRIP_BYTES = 320 * 1024


class Phase(NamedTuple):
    """A dense gather: target position first + i*out_step reads source positions i*in_step + delta for each tap."""

    first: tuple[int, int, int]
    size: tuple[int, int, int]
    out_step: tuple[int, int, int]
    in_step: tuple[int, int, int]
    # Per dimension, (tap, delta) in the order of delta.
    taps: tuple[tuple[tuple[int, int], ...], ...]


class Blocking(NamedTuple):
    """How a phase is cut: strips of `rows` output rows, `plane`, `pitch` and `channels` being the strip's strides."""

    rows: int
    strip_rows: int
    pitch: int
    channels: int
    flat: bool
    tile: Tile

    @property
    def strip_elements(self) -> int:
        """Elements of one plane of the strip."""
        return self.strip_rows * self.pitch * self.channels


class Plan(NamedTuple):
    """Everything about one phase that depends on sizes alone."""

    phase: Phase
    blocking: Blocking
    # Source depth of each plane of the strip, relative to i*in_step.
    depths: np.ndarray
    # Byte offset in the strip of each run of taps, and (first run, runs, steps, panel offset) of each chain of runs.
    offsets: np.ndarray
    chains: np.ndarray
    # (offset in elements, length) of each run, in the order of the packed weight.
    runs: np.ndarray
    # Byte offset in the strip of each output row.
    row_offsets: np.ndarray
    # Where each row of a panel goes, in the weight's own order.
    table: np.ndarray

    @property
    def depth(self) -> int:
        """Products per output element: rows of the packed weight."""
        return int(self.runs[:, 1].sum())


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
        # Every strip adds to the whole gradient.
        strips = g.batch * g.output_size[0] * -(-g.output_size[1] * g.output_size[2] // PIXEL_CHAIN)
        traffic += 2 * strips * g.out_channels * g.reduction_length * g.dtype.itemsize
    else:
        Q, S = g.output_size[2], g.kernel_size[2]
        used *= min(1.0, max(Q / tile.rows, 0.8 * Q / (Q + S - 1)))
    rate = 90e9 * threads_ * (4 / g.dtype.itemsize) * max(used, 0.02)
    return 50e-6 + g.flops / rate + traffic / (8e9 * threads_)


@lru_cache(maxsize=1024)
def _phases(g, direction):
    if direction != "input_grad":
        taps = tuple(
            tuple((t, t * d - b) for t in range(k)) for k, d, (b, _) in zip(g.kernel_size, g.dilation, g.padding)
        )
        return (Phase((0, 0, 0), g.output_size, (1, 1, 1), g.stride, taps),)
    phases = []
    for first in np.ndindex(*(min(s, n) for s, n in zip(g.stride, g.input_size))):
        count = tuple(-(-(n - f) // s) for n, f, s in zip(g.input_size, first, g.stride))
        taps = tuple(
            tuple(
                sorted(
                    ((t, (f + b - t * d) // s) for t in range(k) if (f + b - t * d) % s == 0), key=lambda tap: tap[1]
                )
            )
            for f, k, d, s, (b, _) in zip(first, g.kernel_size, g.dilation, g.stride, g.padding)
        )
        phases.append(Phase(first, count, g.stride, (1, 1, 1), taps))
    return tuple(phases)


@lru_cache(maxsize=1024)
def _plans(g, direction, threads_):
    """Plans of all phases; None for a phase that no tap meets, which is zero."""
    channels = (g.out_channels if direction == "input_grad" else g.in_channels) // g.groups
    plans: list[tuple[Phase, Plan | None]] = []
    for phase in _phases(g, direction):
        if not all(phase.taps):
            plans.append((phase, None))
            continue
        blocking = _blocking(phase, channels, g.dtype.itemsize, g.batch * g.groups * phase.size[0], threads_)
        if direction == "weight_grad":
            blocking = _shorter(blocking, phase)
        runs = tuple(_runs(phase, blocking))
        offsets, chains = _chains(runs, g.dtype.itemsize)
        order = [np.ravel_multi_index(tap, g.kernel_size) for tap in product(*([t for t, _ in d] for d in phase.taps))]
        places = pack_table(
            channels, prod(g.kernel_size), order, blocking.tile.width, g.dtype.itemsize, direction == "input_grad"
        )
        depths = np.array([delta for _, delta in phase.taps[0]], np.int64)
        rows = np.arange(blocking.rows, dtype=np.int64)
        rows *= phase.in_step[1] * blocking.pitch * channels * g.dtype.itemsize
        table = np.array(runs, np.int64)
        plans.append((phase, Plan(phase, blocking, depths, offsets, chains, table, rows, places)))
    return tuple(plans)


def _chunks(g):
    return 1 if g.flops < SERIAL_FLOPS else threads.count()


def _span(taps):
    return taps[-1][1] - taps[0][1] + 1


def _blocking(phase, channels, itemsize, images, threads_):
    """Choose the tile that wastes least on rows of this length, and strips that fit the cache and feed all threads."""
    P, Q = phase.size[1:]
    width = (Q - 1) * phase.in_step[2] + _span(phase.taps[2])
    choices = []
    for small in (False, True):
        tile = tile_for(itemsize, small)
        # A step of the tile costs its multiplications and about two more for loads and the loop.
        cost = tile.rows * tile.columns + 2
        choices.append((-(-Q // tile.rows) * cost / Q, False, tile))
        if phase.in_step[1] == phase.in_step[2]:
            choices.append((width * cost / (tile.rows * Q), True, tile))
    _, flat, tile = min(choices, key=lambda choice: choice[0])
    row_bytes = width * channels * itemsize * len(phase.taps[0])
    room = max(STRIP_BYTES // row_bytes, 1)
    rows = max((room - _span(phase.taps[1])) // phase.in_step[1] + 1, 1)
    # At least four tasks a thread, where the output has as many rows.
    rows = min(rows, max(P * images // (4 * threads_), 1), P)
    rows = -(-P // -(-P // rows))
    return Blocking(rows, (rows - 1) * phase.in_step[1] + _span(phase.taps[1]), width, channels, flat, tile)


def _shorter(blocking, phase):
    """Cut the strips so that the sum over the pixels of one stays short."""
    rows = min(blocking.rows, max(PIXEL_CHAIN // phase.size[2], 1))
    return blocking._replace(rows=rows, strip_rows=(rows - 1) * phase.in_step[1] + _span(phase.taps[1]))


def _runs(phase, blocking):
    """Yield (offset, length) of each run of numbers in the strip that one pixel's window is made of."""
    planes, rows, columns = phase.taps
    joined = _span(columns) == len(columns)
    for plane in range(len(planes)):
        for _, delta in rows:
            at = plane * blocking.strip_elements + (delta - rows[0][1]) * blocking.pitch * blocking.channels
            if joined:
                yield at, len(columns) * blocking.channels
            else:
                for _, step in columns:
                    yield at + (step - columns[0][1]) * blocking.channels, blocking.channels


def _chains(runs, itemsize):
    """Cut the reduction into chains of about CHAIN products: whole runs together, or parts of one."""
    length = runs[0][1]
    offsets, chains, panel = [], [], 0
    if length <= CHAIN:
        together = CHAIN // length
        offsets = [offset for offset, _ in runs]
        for first in range(0, len(runs), together):
            count = min(together, len(runs) - first)
            chains.append((first, count, length, panel))
            panel += count * length
    else:
        parts = -(-length // CHAIN)
        for offset, _ in runs:
            for part in range(parts):
                start, end = part * length // parts, (part + 1) * length // parts
                chains.append((len(offsets), 1, end - start, panel))
                offsets.append(offset + start)
                panel += end - start
    return np.array(offsets, np.int64) * itemsize, np.array(chains, np.int64)


def workspace(geometry, direction, limit):
    """Per thread a strip of the source and a block of the result; the packed weight or its gradient."""
    g, count = geometry, _chunks(geometry)
    plans = [plan for _, plan in _plans(g, direction, count) if plan]
    if not plans:
        return {}
    C, K = g.in_channels // g.groups, g.out_channels // g.groups
    strip = max(_strip_size(plan) for plan in plans)
    if direction == "weight_grad":
        (plan,) = plans
        width = plan.blocking.tile.width
        panels = -(-K // width)
        sums = (count, g.groups * panels * plan.depth * width)
        return {
            "strips": Buffer((count, strip), g.dtype),
            "grads": Buffer((count, panels * plan.blocking.rows * plan.phase.size[2] * width), g.dtype),
            "tiles": Buffer((count, plan.blocking.tile.rows * width), g.dtype),
            "partial": Buffer(sums, g.dtype),
            "sums": Buffer(sums, np.dtype(np.float64)),
        }
    targets = C if direction == "input_grad" else K
    packed = sum(g.groups * -(-targets // p.blocking.tile.width) * p.blocking.tile.width * p.depth for p in plans)
    return {
        "strips": Buffer((count, strip), g.dtype),
        "blocks": Buffer((count, max(_block_size(plan) for plan in plans)), g.dtype),
        "packed": Buffer((packed + 64 * plans[0].blocking.tile.width,), g.dtype),
    }


def _strip_size(plan):
    """Elements of a strip, with room for the tile to run past the last pixel."""
    b = plan.blocking
    slack = (b.tile.rows * plan.phase.in_step[2] + _span(plan.phase.taps[2])) * b.channels + b.tile.rows
    return len(plan.depths) * b.strip_elements + slack


def _block_size(plan):
    """Elements of a block of results, with room for the tile to run past the last pixel."""
    b = plan.blocking
    pixels = b.rows * (b.pitch if b.flat else plan.phase.size[2])
    return (pixels + b.tile.rows) * b.tile.width


def forward(geometry, x, weight, bias, activation, out, workspace):
    """Write the convolution of `x` with `weight`, plus bias, through the activation, to `out`."""
    _gather_all(geometry, "forward", x, weight, bias, activation, out, workspace)


def input_grad(geometry, grad_output, weight, out, workspace):
    """Write the gradient with respect to the input to `out`."""
    _gather_all(geometry, "input_grad", grad_output, weight, None, None, out, workspace)


def _gather_all(g, direction, source, weight, bias, activation, out, workspace):
    transposed = direction == "input_grad"
    C, K = g.in_channels // g.groups, g.out_channels // g.groups
    inner, targets = (K, C) if transposed else (C, K)
    plans = _plans(g, direction, _chunks(g))
    if not all(plan for _, plan in plans):
        out[...] = 0
    room = workspace.get("packed")
    for phase, plan in plans:
        if plan is None:
            continue
        tile, b = plan.blocking.tile, plan.blocking
        packed = room[: g.groups * -(-targets // tile.width) * plan.depth * tile.width]
        room = room[packed.size :]
        strips, blocks = workspace["strips"], workspace["blocks"]
        run = tasks(tile, g.dtype.itemsize)
        run.pack(
            len(strips), address(packed), address(weight), *weight.strides[:2], g.groups, inner, targets,
            len(plan.table) // (1 if transposed else inner), plan.depth, address(plan.table), transposed,
        )  # fmt: skip
        run.gather(
            len(strips), *layout_of(source, g.data_format), *layout_of(out, g.data_format),
            *extent_of(source, g.data_format), g.batch, g.groups, inner, targets,
            *phase.first, *phase.size, *phase.out_step, *phase.in_step, phase.taps[1][0][1], phase.taps[2][0][1],
            b.rows, b.strip_rows, b.pitch, b.flat, address(plan.depths), len(plan.depths), address(plan.offsets),
            address(plan.chains), len(plan.chains), plan.depth, CODES[activation],
            address(packed), 0 if bias is None else address(bias),
            address(strips), strips.strides[0], address(blocks), blocks.strides[0],
        )  # fmt: skip


def weight_grad(geometry, grad_output, x, out, workspace):
    """Write the gradient with respect to the weight to `out`."""
    g = geometry
    ((phase, plan),) = _plans(g, "weight_grad", _chunks(g))
    b, C, K = plan.blocking, g.in_channels // g.groups, g.out_channels // g.groups
    buffers = [workspace[name] for name in ("strips", "grads", "tiles", "partial", "sums")]
    run = tasks(b.tile, g.dtype.itemsize)
    run.reduce(
        len(buffers[0]), *layout_of(x, g.data_format), *layout_of(grad_output, g.data_format),
        *extent_of(x, g.data_format), g.batch, g.groups, C, K, *phase.size, *phase.in_step,
        phase.taps[1][0][1], phase.taps[2][0][1], b.rows, b.strip_rows, b.pitch, address(plan.depths),
        len(plan.depths), address(plan.runs), len(plan.runs), plan.depth, address(plan.row_offsets),
        *(number for buffer in buffers for number in (address(buffer), buffer.strides[0])),
    )  # fmt: skip
    run.unpack(
        len(buffers[4]), address(out), *out.strides, *out.shape[1:], g.groups, K, plan.depth, len(buffers[4]),
        address(buffers[4]), buffers[4].strides[0],
    )  # fmt: skip


class Tasks(NamedTuple):
    """The loops around a register tile."""

    pack: Task
    gather: Task
    reduce: Task
    unpack: Task


@lru_cache(maxsize=16)
def tasks(tile, itemsize):
    """Return the tasks for one register tile, whose shape is a constant in them.

    A `layout` is (address, N, C, D, H, W byte strides); inner and targets are the channels of one group that are
    summed over and that result.
    """
    ROWS, COLUMNS, LANES = tile
    WIDTH, SIZE = tile.width, itemsize
    PIXEL = WIDTH * SIZE
    _fill_strip, _, _finish, _emit, _pack = strips(tile, itemsize)

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
            _pack(target, source, filter_, channel, inner, taps, min(WIDTH, targets - k0), table, transposed)

    @task
    def gather(arguments, chunk):
        """Forward, or one phase of the input gradient."""
        chunks = integer(arguments, 0)
        source, target = integers(arguments, 1, 6), integers(arguments, 7, 6)
        extent, (N, G, C, K) = integers(arguments, 13, 3), integers(arguments, 16, 4)
        first, (O, P, Q) = integers(arguments, 20, 3), integers(arguments, 23, 3)
        out_step, in_step = integers(arguments, 26, 3), integers(arguments, 29, 3)
        low_row, low_column, rows, strip_rows, pitch, flat = integers(arguments, 32, 6)
        depths, offsets_of_chains = integers(arguments, 38, 2), integers(arguments, 40, 3)
        depth, code, weights, bias = integers(arguments, 43, 4)
        strips, strip_bytes, blocks, block_bytes = integers(arguments, 47, 4)
        strip, block = strips + chunk * strip_bytes, blocks + chunk * block_bytes
        parts, panels = (P + rows - 1) // rows, (K + WIDTH - 1) // WIDTH
        begin, end = share(N * G * O * parts, chunk, chunks)
        for job in range(begin, end):
            o, g, n = job // parts % O, job // (parts * O) % G, job // (parts * O * G)
            p0 = job % parts * rows
            p1 = min(p0 + rows, P)
            at = source[0] + n * source[1] + g * C * source[2]
            corner = (o * in_step[0], p0 * in_step[1] + low_row, low_column)
            _fill_strip(strip, at, source, extent, C, depths, corner, strip_rows, pitch)
            # Flat, all rows of a strip are one row of pixels; those between two rows are thrown away.
            stretches, pixels = (1, (p1 - p0 - 1) * pitch + Q) if flat else (p1 - p0, Q)
            for panel in range(panels):
                for i in range(stretches):
                    _tiles(
                        strip + i * in_step[1] * pitch * C * SIZE, in_step[2] * C * SIZE, pixels, flat,
                        offsets_of_chains, weights + (g * panels + panel) * depth * PIXEL, block + i * Q * PIXEL,
                    )  # fmt: skip
                k0, used = g * K + panel * WIDTH, min(WIDTH, K - panel * WIDTH)
                if bias or code:
                    _finish(block, bias + k0 * SIZE if bias else 0, used, stretches * pixels, code)
                at = target[0] + n * target[1] + k0 * target[2]
                at += (first[0] + o * out_step[0]) * target[3] + first[2] * target[5]
                for p in range(p1 - p0):
                    row = at + (first[1] + (p0 + p) * out_step[1]) * target[4]
                    step = target[5] * out_step[2]
                    _emit(block + p * (pitch if flat else Q) * PIXEL, row, target[2], step, used, Q)

    @task
    def reduce(arguments, chunk):
        """Weight gradient: a sum per chunk, in the order of the packed weight."""
        chunks = integer(arguments, 0)
        source, grad_output = integers(arguments, 1, 6), integers(arguments, 7, 6)
        extent, (N, G, C, K) = integers(arguments, 13, 3), integers(arguments, 16, 4)
        (O, P, Q), in_step = integers(arguments, 20, 3), integers(arguments, 23, 3)
        low_row, low_column, rows, strip_rows, pitch = integers(arguments, 26, 5)
        depths, runs, depth = integers(arguments, 31, 2), integers(arguments, 33, 2), integer(arguments, 35)
        row_offsets = integer(arguments, 36)
        strips, strip_bytes, grads, grad_bytes, tiles, tile_bytes = integers(arguments, 37, 6)
        partials, partial_bytes, sums, sum_bytes = integers(arguments, 43, 4)
        strip, grad, scratch = strips + chunk * strip_bytes, grads + chunk * grad_bytes, tiles + chunk * tile_bytes
        partial, total = partials + chunk * partial_bytes, sums + chunk * sum_bytes
        zero_bytes(partial, partial_bytes)
        zero_bytes(total, sum_bytes)
        parts, panels = (P + rows - 1) // rows, (K + WIDTH - 1) // WIDTH
        begin, end = share(N * O * parts, chunk, chunks)
        for job in range(begin, end):
            o, n = job // parts % O, job // (parts * O)
            p0 = job % parts * rows
            p1 = min(p0 + rows, P)
            for g in range(G):
                at = source[0] + n * source[1] + g * C * source[2]
                corner = (o * in_step[0], p0 * in_step[1] + low_row, low_column)
                _fill_strip(strip, at, source, extent, C, depths, corner, strip_rows, pitch)
                at = grad_output[0] + n * grad_output[1] + o * grad_output[3] + p0 * grad_output[4]
                _fill_grads(grad, at + g * K * grad_output[2], grad_output, K, p1 - p0, Q)
                for panel in range(panels):
                    _reduce_panel(
                        strip, in_step[2] * C * SIZE, runs, row_offsets, p1 - p0, Q,
                        grad + panel * (p1 - p0) * Q * PIXEL, scratch,
                        partial + (g * panels + panel) * depth * PIXEL,
                    )  # fmt: skip
            # Float32 sums over jobs are kept short, like every chain.
            if (job - begin) % 64 == 63 or job == end - 1:
                for i in range(sum_bytes // 8):
                    more = load(SIZE, partial + i * SIZE)
                    store(8, total + i * 8, load(8, total + i * 8) + more)
                zero_bytes(partial, partial_bytes)

    @task
    def unpack(arguments, chunk):
        """Add up the chunks' sums (G, panels, T*R*S*C, WIDTH) and put them in order (G*K, C, T, R, S)."""
        chunks, target, filter_, channel, plane, row, column, C, T, R, S = integers(arguments, 0, 11)
        G, K, depth, parts, sums, sum_bytes = integers(arguments, 11, 6)
        panels = (K + WIDTH - 1) // WIDTH
        begin, end = share(G * K, chunk, chunks)
        for job in range(begin, end):
            g, k = job // K, job % K
            source = sums + ((g * panels + k // WIDTH) * depth * WIDTH + k % WIDTH) * 8
            for tap in range(T * R * S):
                place = target + job * filter_ + tap // (R * S) * plane + tap // S % R * row + tap % S * column
                for c in range(C):
                    total = 0.0
                    for part in range(parts):
                        total += load(8, source + part * sum_bytes + (tap * C + c) * WIDTH * 8)
                    store(SIZE, place + c * channel, total)

    @device
    def _tiles(source, step, pixels, flat, offsets_of_chains, weights, target):
        """Compute neighbouring results: the last tile overlaps the one before it, or runs past the end."""
        offsets, chains, count = offsets_of_chains
        for start in range(0, pixels, ROWS):
            q = start if flat else max(min(start, pixels - ROWS), 0)
            for i in range(count):
                run, runs, steps, panel = integers(chains + i * 32, 0, 4)
                multiply_tile(
                    ROWS, COLUMNS, LANES, SIZE, source + q * step, step, SIZE, offsets + run * 8, runs, steps,
                    weights + panel * PIXEL, PIXEL, target + q * PIXEL, PIXEL, i,
                )  # fmt: skip

    @device
    def _reduce_panel(strip, step, runs, row_offsets, rows, Q, grads, scratch, partial):
        """Add the products of the strip with one panel of gradients: a tile holds taps and channels as its rows."""
        for run in range(runs[1]):
            offset, length = integers(runs[0] + run * 16, 0, 2)
            source = strip + offset * SIZE
            # Rows longer than a chain come one at a time, and are cut.
            for q in range(0, Q, PIXEL_CHAIN):
                pixels = min(PIXEL_CHAIN, Q - q)
                for start in range(0, length, ROWS):
                    whole, target = start + ROWS <= length, partial + start * PIXEL
                    multiply_tile(
                        ROWS, COLUMNS, LANES, SIZE, source + q * step + start * SIZE, SIZE, step, row_offsets, rows,
                        pixels, grads + q * PIXEL, PIXEL, target if whole else scratch, PIXEL, 1 if whole else 0,
                    )  # fmt: skip
                    if not whole:
                        for i in range(0, (length - start) * PIXEL, SIZE):
                            store(SIZE, target + i, load(SIZE, target + i) + load(SIZE, scratch + i))
            partial += length * PIXEL

    @device
    def _fill_grads(target, source, layout, K, rows, Q):
        """Copy rows of the gradient as panels (pixels, WIDTH), with zeros beyond the last filter."""
        for start in range(0, K, WIDTH):
            used = min(WIDTH, K - start)
            for p in range(rows):
                row = source + start * layout[2] + p * layout[4]
                for q in range(Q):
                    if layout[2] == SIZE:
                        copy_bytes(target, row + q * layout[5], used * SIZE)
                    else:
                        for k in range(used):
                            store(SIZE, target + k * SIZE, load(SIZE, row + q * layout[5] + k * layout[2]))
                    zero_bytes(target + used * SIZE, (WIDTH - used) * SIZE)
                    target += PIXEL

    return Tasks(pack, gather, reduce, unpack)
