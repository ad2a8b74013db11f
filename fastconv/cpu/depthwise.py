"""Depthwise convolution: every channel by itself, one vector of channels at a time.

    forward       y[i, k]  = sum over taps  x[i*stride + tap*dilation - before, c] * w[k, tap]     k = c*multiplier + m
    input_grad    dx[i*stride + phase] = the same sum over the taps of a phase, of dy
    weight_grad   dw[k, tap] = sum over pixels  x[i*stride + tap*dilation - before, c] * dy[i, k]

There is nothing to multiply as a matrix: a loaded pixel serves the few taps that meet it. The tile is a short row of
pixels, each one vector of channels, and the taps of a kernel row slide along it in registers, so that a pixel is loaded
once per kernel row instead of once per tap (Zhang, Lo & Lu, "High performance depthwise and pointwise convolutions on
mobile devices", 2020, section 4). Taps that fall outside the image read a line of zeros: nothing is padded.

With channels last all is read and written in place, once. With channels first, or with several filters per channel, a
strip of rows of one vector of planes is transposed in the cache, and the same tile runs there. Pixels of a dilated or
strided row are taken in turns, so that those of one tile lie next to each other as the taps see them.
"""

from functools import lru_cache
from math import gcd, prod
from typing import NamedTuple

import numpy as np

from ..registry import Buffer
from . import threads
from .compile import Task, device, share, task
from .epilogue import CODES, activate
from .machine import constants
from .memory import address, extent_of, layout_of
from .simd import (
    add_doubles,
    instruction_set,
    integer,
    integers,
    load,
    slide_sums,
    slide_tile,
    store,
    tile_for,
    transpose_block,
    zero_bytes,
)

# Bytes of a phase.
PHASE = 72
# Taps of a kernel row in registers, beside the sums.
TAPS = 7
# Products per running sum: the rounding error of a float32 sum grows with its length.
CHAIN = 512
# Pixels of a weight gradient that are added in registers, and in float32 at all.
SEGMENT = 28
PIXEL_CHAIN = 2048
# Parts of a weight gradient: their number depends on sizes alone, and so does the result.
PARTS = 16
# Operations that are done before a second thread has woken.
SERIAL_FLOPS = 500_000
# Numbers of weight that are packed before a second thread has woken.
SERIAL_WEIGHTS = 16_384
# Bytes of source that one task keeps in the second-level cache, and of partial sums in the first.
STRIP_BYTES = 256 * 1024
SUMS_BYTES = 32 * 1024
# Vectors of planes that are transposed together.
GROUP = 4
# Bytes of source that stay in the first-level cache while the chunks of a wide kernel pass over them.
SWEEP_BYTES = 24 * 1024
# Bytes of source beyond which the next rows are fetched ahead.
AHEAD_BYTES = 8 << 20


class Phase(NamedTuple):
    """Along one axis: target first + i*out_step reads source i*in_step + low + j*step for each of its taps j."""

    first: int
    size: int
    out_step: int
    in_step: int
    low: int
    step: int
    taps: int
    # In the kernel, tap j is number tap + j*tap_step.
    tap: int
    tap_step: int


class Tile(NamedTuple):
    """What the machine code depends on: pixels along a row, each one vector of `lanes` channels.

    A row of kernel taps is cut into `chunks` of `taps`, or of `fewer` (0 if none is); neighbouring pixels are `stride`
    taps apart.
    """

    width: int
    taps: int
    fewer: int
    chunks: int
    stride: int
    lanes: int
    itemsize: int


class Plan(NamedTuple):
    """Everything about one direction of a geometry that depends on sizes alone."""

    tile: Tile
    axes: tuple[tuple[Phase, ...], ...]
    tables: tuple[np.ndarray, ...]
    in_place: bool
    # Channels are those of all images together if `folded`.
    folded: bool
    images: int
    channels: int
    multiplier: int
    # Target rows and columns of one task.
    rows: int
    columns: int
    strip_elements: int
    # Vectors of channels, groups of them that are worked on together, and vectors that share a pass over a row.
    vectors: int
    groups: int
    sweep: int


def supports(geometry, direction):
    """Floating-point geometries with one channel per group."""
    if geometry.dtype.kind != "f":
        return False, f"its tiles are floating-point, not {geometry.dtype}"
    per_group = geometry.in_channels // geometry.groups
    if per_group != 1:
        return False, f"it takes one channel per group, not {per_group}"
    return True, ""


def seconds(geometry, direction, threads_):
    """Predicted time: multiplications at the tile's rate, and the traffic."""
    g, machine = geometry, constants()
    plan = _plan(g, direction, threads_)
    Q = max(phase.size for phase in plan.axes[2])
    used = Q / (-(-Q // plan.tile.width) * plan.tile.width) * plan.tile.lanes / tile_for(g.dtype.itemsize).lanes
    rate = 0.7 * machine.flops * threads_ * (4 / g.dtype.itemsize) * used
    traffic = g.bytes * (1 if plan.in_place else 1.5)
    return 2 * machine.launch + g.flops / rate + traffic / (2 * machine.bandwidth)


def _axis(g, direction, axis):
    """Return the phases along one axis: one, or as many as the stride for an input gradient."""
    n, k, s, d = g.input_size[axis], g.kernel_size[axis], g.stride[axis], g.dilation[axis]
    before = g.padding[axis][0]
    if direction != "input_grad":
        return (Phase(0, g.output_size[axis], 1, s, -before, d, k, 0, 1),)
    phases, common = [], gcd(s, d)
    for first in range(min(s, n)):
        taps = [t for t in reversed(range(k)) if (first + before - t * d) % s == 0] or [0]
        low = (first + before - taps[0] * d) // s
        there = (first + before - taps[0] * d) % s == 0
        phases.append(
            Phase(first, -(-(n - first) // s), s, 1, low, d // common, there * len(taps), taps[0], -s // common)
        )
    return tuple(phases)


def _in_turns(phases):
    """Split phases so that the columns that one pixel's taps meet are no further apart than two pixels' are."""
    split = []
    for phase in phases:
        apart = phase.step // gcd(phase.in_step, phase.step)
        for turn in range(min(apart, phase.size)):
            split.append(
                phase._replace(
                    first=phase.first + turn * phase.out_step,
                    size=-(-(phase.size - turn) // apart),
                    out_step=phase.out_step * apart,
                    in_step=phase.in_step * apart,
                    low=phase.low + turn * phase.in_step,
                )
            )
    return tuple(split)


def _tile(columns, lanes, itemsize, gradient):
    """Return a tile for a row of pixels and the registers there are; a weight gradient's holds the pixels, too."""
    registers = _registers()
    counts = {phase.taps for phase in columns}
    chunks = max(-(-max(counts) // TAPS), 1)
    taps = max(-(-max(counts) // chunks), 1)
    fewer = (taps - 1) * any(count % taps for count in counts)
    stride = min(columns[0].in_step // columns[0].step, taps)
    # Wider, a gradient's tile is spilled.
    most = (5 if gradient else 8) if registers == 32 else (4 if gradient else 6)
    length = max(phase.size for phase in columns)
    # A tile costs about one pixel more than it has.
    width = min(range(4, most + 1), key=lambda width: (-(-length // width) * (width + 1), -width))
    return Tile(width, taps, fewer, chunks, stride, lanes, itemsize)


def _registers():
    return 32 if instruction_set() in ("avx512", "neon") else 16


def _reach(phases, first, last):
    """Return the source positions that targets first to last - 1 read, from the lowest to one past the highest."""
    low, high = [], []
    for phase in phases:
        begin = max(-(-(first - phase.first) // phase.out_step), 0)
        end = min(-(-(last - phase.first) // phase.out_step), phase.size)
        if begin < end and phase.taps:
            low.append(begin * phase.in_step + phase.low)
            high.append((end - 1) * phase.in_step + phase.low + (phase.taps - 1) * phase.step + 1)
    return min(low, default=0), max(high, default=0)


def _longest_reach(phases, size, part, extent):
    """Return the most source positions inside the image that a part of the targets reads."""
    spans = (_reach(phases, first, min(first + part, size)) for first in range(0, size, part))
    return max(max(min(high, extent) - max(low, 0), 0) for low, high in spans)


@lru_cache(maxsize=1024)
def _plan(g, direction, threads_):
    backward = direction == "input_grad"
    axes = [_axis(g, direction, axis) for axis in range(3)]
    axes[2] = _in_turns(axes[2])
    size, extent = (g.input_size, g.output_size) if backward else (g.output_size, g.input_size)
    C, multiplier, itemsize = g.in_channels, g.out_channels // g.in_channels, g.dtype.itemsize
    last = g.data_format == "channels_last"
    most = tile_for(itemsize).lanes
    folded = not last and (most > C if direction == "weight_grad" else C % most != 0)
    images, channels = (1, g.batch * C) if folded else (g.batch, C)
    tile = _tile(axes[2], 1 << (min(most, channels).bit_length() - 1), itemsize, direction == "weight_grad")
    lanes, chunks = tile.lanes, tile.chunks
    tables = tuple(np.array(phases, np.int64) for phases in axes)
    in_place = last and multiplier == 1
    rows, columns, strip = size[1], size[2], 0
    vectors = -(-channels // lanes)
    sums_bytes = prod(g.kernel_size) * lanes * itemsize
    # Vectors of a group may overlap, and what several filters add to must not.
    groups = 1 if in_place else vectors if multiplier > 1 else -(-vectors // GROUP)
    if direction == "weight_grad" and in_place:
        groups = -(-vectors // max(SUMS_BYTES // sums_bytes, 1))
    width = lanes * -(-vectors // groups)
    window = lanes * itemsize * min(g.kernel_size[1], extent[1]) * min(extent[2], size[2])
    sweep = vectors if chunks == 1 else max(SWEEP_BYTES // window, 1)
    if direction == "weight_grad":
        columns = min(columns, PIXEL_CHAIN)
        rows = max(PIXEL_CHAIN // columns, 1)
    elif in_place:
        # At least four tasks a thread, where the target has as many rows.
        rows = max(size[1] * size[0] * images // (4 * threads_), 1)
    if not in_place:
        planes = max(phase.taps for phase in axes[0])
        pixel = width * itemsize * planes
        least = _longest_reach(axes[1], size[1], 1, extent[1])
        columns = min(columns, max(2 * STRIP_BYTES // max(pixel * least, 1), 64))
        length = _longest_reach(axes[2], size[2], columns, extent[2])
        while rows > 1 and pixel * length * _longest_reach(axes[1], size[1], rows, extent[1]) > STRIP_BYTES:
            rows = -(-rows // 2)
        strip = width * planes * length * _longest_reach(axes[1], size[1], rows, extent[1])
    rows = -(-size[1] // -(-size[1] // min(rows, size[1])))
    return Plan(
        tile, tuple(axes), tables, in_place, folded, images, channels, multiplier, rows, columns, strip,
        vectors, groups, sweep,
    )  # fmt: skip


def _chunks(g):
    return 1 if g.flops < SERIAL_FLOPS else threads.count()


def _line(plan, channels):
    """Channels in a line of packed weights: where images are folded, a group may start at any of them."""
    vectors = -(-channels // plan.tile.lanes) + (-(-plan.vectors // plan.groups) if plan.folded else 0)
    # Lines an odd number of vectors apart do not compete for the same places in the cache.
    return (vectors | 1) * plan.tile.lanes


def workspace(geometry, direction, limit):
    """The packed weight or its gradient's sums, a line of zeros; per thread the strips of transposed planes."""
    g, chunks = geometry, _chunks(geometry)
    plan = _plan(g, direction, chunks)
    taps, lanes = prod(g.kernel_size), plan.tile.lanes
    buffers, most = {}, -(-plan.vectors // plan.groups)
    if not plan.in_place:
        strips = (chunks, plan.strip_elements)
        blocks = (chunks, plan.rows * plan.columns * most * lanes)
        buffers = {"strips": Buffer(strips, g.dtype), "blocks": Buffer(blocks, g.dtype)}
    if direction == "weight_grad":
        sums = plan.multiplier * taps * lanes
        # One more vector, should the first be repeated in part.
        buffers["partial"] = Buffer((chunks, (most + plan.in_place) * sums), g.dtype)
        buffers["sums"] = Buffer((_parts(g, plan), (plan.vectors + plan.in_place) * sums), np.dtype(np.float64))
        buffers["zeros"] = Buffer((lanes,), g.dtype)
        return buffers
    # A line of zeros and the bias come before the weight; the last 64 bytes are for alignment.
    rows = 1 + plan.multiplier * (1 + taps)
    buffers["packed"] = Buffer((rows * _line(plan, g.in_channels) + 64 // g.dtype.itemsize,), g.dtype)
    return buffers


def _lead(plan, source):
    """Return lanes of the first vector that the second repeats, so that all others are aligned with lines."""
    past = address(source) // plan.tile.itemsize % plan.tile.lanes
    worth = plan.in_place and plan.channels % plan.tile.lanes == 0 and plan.channels >= 4 * plan.tile.lanes
    return past if worth else 0


def _parts(g, plan):
    """Return how many parts the pixels of a weight gradient are cut into."""
    units = plan.images * g.output_size[0]
    units *= -(-g.output_size[1] // plan.rows) * -(-g.output_size[2] // plan.columns)
    return min(-(-PARTS // plan.groups), units)


def forward(geometry, x, weight, bias, activation, out, workspace):
    """Write the convolution of `x` with `weight`, plus bias, through the activation, to `out`."""
    _slide(geometry, "forward", x, weight, bias, activation, out, workspace)


def input_grad(geometry, grad_output, weight, out, workspace):
    """Write the gradient with respect to the input to `out`."""
    _slide(geometry, "input_grad", grad_output, weight, None, None, out, workspace)


def _view(plan, array, data_format, multiplier):
    """Return the address and the byte strides of images, channels, filters of a channel, depth, rows, columns."""
    place, image, channel, *space = layout_of(array, data_format)
    return place, image, channel * multiplier, channel, *space


def _slide(g, direction, source, weight, bias, activation, out, workspace):
    backward = direction == "input_grad"
    chunks, C = _chunks(g), g.in_channels
    plan = _plan(g, direction, chunks)
    tile, M = plan.tile, plan.multiplier
    lead = _lead(plan, source)
    line = _line(plan, C) * tile.itemsize
    packed = -(-address(workspace["packed"]) // 64) * 64
    run, taps = slides(tile), prod(g.kernel_size)
    run.pack(
        chunks if weight.size > SERIAL_WEIGHTS else 1,
        address(weight), 0 if bias is None else address(bias), packed, line, C, M, taps,
    )  # fmt: skip
    near = tile.chunks == 1 and g.kernel_size[0] == 1 and not backward
    ahead = plan.in_place and near and source.nbytes > AHEAD_BYTES
    strips, blocks = (workspace.get(name) for name in ("strips", "blocks"))
    run.slide(
        chunks, *_view(plan, source, g.data_format, M if backward else 1),
        *_view(plan, out, g.data_format, 1 if backward else M),
        *extent_of(source, g.data_format), *extent_of(out, g.data_format),
        *(number for table in plan.tables for number in (address(table), len(table))),
        plan.images, plan.groups, plan.channels, C, M, backward, plan.in_place, lead, plan.sweep,
        plan.rows, plan.columns, taps, *g.kernel_size[1:], packed, line, ahead, CODES[activation],
        *((0, 0) if strips is None else (address(strips), strips.strides[0])),
        *((0, 0) if blocks is None else (address(blocks), blocks.strides[0])),
    )  # fmt: skip


def weight_grad(geometry, grad_output, x, out, workspace):
    """Write the gradient with respect to the weight to `out`."""
    g, chunks = geometry, _chunks(geometry)
    plan = _plan(g, "weight_grad", chunks)
    tile, M, (T, R, S) = plan.tile, plan.multiplier, g.kernel_size
    parts = _parts(g, plan)
    # Sums of a tile, beside a row of gradients.
    row_chunks = -(-R // max(_registers() // 2 // tile.taps, 1))
    rows = -(-R // row_chunks)
    run = sums(tile, rows, row_chunks, (rows - 1) * (R % row_chunks > 0))
    workspace["zeros"][...] = 0
    strips, blocks, partial = (workspace.get(name) for name in ("strips", "blocks", "partial"))
    totals, lead = address(workspace["sums"]), _lead(plan, x)
    vectors = plan.vectors + (lead > 0)
    run.add(
        chunks, *_view(plan, x, g.data_format, 1), *_view(plan, grad_output, g.data_format, M),
        *extent_of(x, g.data_format), *g.output_size,
        *(number for table in plan.tables for number in (address(table), len(table))),
        plan.images, plan.channels, M, vectors, plan.groups, parts, plan.in_place, lead,
        plan.rows, plan.columns, T, R, S, address(workspace["zeros"]),
        *((0, 0) if strips is None else (address(strips), strips.strides[0])),
        *((0, 0) if blocks is None else (address(blocks), blocks.strides[0])),
        address(partial), partial.strides[0], totals,
    )  # fmt: skip
    run.finish(
        chunks if out.size > SERIAL_WEIGHTS else 1, address(out), totals, g.in_channels, plan.channels, M, vectors,
        T * R * S, parts, lead,
    )  # fmt: skip


class Slides(NamedTuple):
    """Forward and input gradient."""

    pack: Task
    slide: Task


@lru_cache(maxsize=64)
def slides(tile):
    """Return the tasks around one tile, whose shape is a constant in them.

    A `view` is (address, byte strides along N, C, filters of a channel, D, H, W); a window of one is (address, bytes
    from depth tap to depth tap, row to row and pixel to pixel, rows, first column, last column).
    """
    WIDTH, TAPS_, FEWER, CHUNKS, STRIDE, LANES, SIZE = tile
    VECTOR = LANES * SIZE
    # Kernel rows per running sum.
    ROWS = CHAIN // TAPS_
    move, lanes_of, phase, reach, inside, fill, drain = movers(LANES, SIZE)

    @task
    def pack(arguments, chunk):
        """Zeros, the bias (M, C) and the weight (M, taps, C), each a line of channels that goes round at its end."""
        chunks, weight, bias, packed, line, C, M, taps = integers(arguments, 0, 8)
        blocks = line // VECTOR
        begin, end = share(M * blocks, chunk, chunks)
        for job in range(begin, end):
            m, c = job // blocks, job % blocks * LANES
            target = packed + c * SIZE
            if m == 0:
                zero_bytes(target, VECTOR)
            _spread(bias + m * SIZE, M * SIZE, target + (1 + m) * line, line, c, C, 1 if bias else 0)
            _spread(weight + m * taps * SIZE, M * taps * SIZE, target + (1 + M + m * taps) * line, line, c, C, taps)

    @device
    def _spread(source, channel, target, line, c, C, count):
        """Transpose LANES channels from `c` on, of `count` numbers each, to lines of channels; or one line of zeros."""
        if count == 0:
            zero_bytes(target, VECTOR)
        elif c + LANES <= C:
            move(source + c * channel, channel, SIZE, target, SIZE, line, count)
        else:
            for i in range(LANES):
                for j in range(count):
                    place = source + (c + i) % C * channel + j * SIZE
                    store(SIZE, target + j * line + i * SIZE, load(SIZE, place))

    @task
    def slide(arguments, chunk):
        """Compute some rows of one image, or of one vector of planes, at a time."""
        chunks, source, target = integer(arguments, 0), integers(arguments, 1, 7), integers(arguments, 8, 7)
        (D, H, W), (O, P, Q) = integers(arguments, 15, 3), integers(arguments, 18, 3)
        depths, axes = integers(arguments, 21, 2), integers(arguments, 23, 4)
        N, groups, lanes, C, M, backward, in_place, lead, sweep = integers(arguments, 27, 9)
        rows, columns, taps, R, S, packed, line, ahead, code = integers(arguments, 36, 9)
        strips, strip_bytes, blocks, block_bytes = integers(arguments, 45, 4)
        strip, block = strips + chunk * strip_bytes, blocks + chunk * block_bytes
        row_parts, column_parts = (P + rows - 1) // rows, (Q + columns - 1) // columns
        begin, end = share(N * groups * O * row_parts * column_parts, chunk, chunks)
        for job in range(begin, end):
            q0, rest = job % column_parts * columns, job // column_parts
            p0, rest = rest % row_parts * rows, rest // row_parts
            o, group, n = rest % O, rest // O % groups, rest // (O * groups)
            p1, q1 = min(p0 + rows, P), min(q0 + columns, Q)
            part = (p0, p1, q0, q1)
            depth = integers(depths[0] + o % depths[1] * PHASE, 0, 9)
            d = o // depth[2] * depth[3] + depth[4]
            t0, t1 = inside(d, depth[5], depth[6], D)
            kernel = (t0, t1, depth[7], depth[8], R, S, line)
            at, to = source[0] + n * source[1] + d * source[4], target[0] + n * target[1] + o * target[4]
            if in_place:
                window = (at, depth[5] * source[4], source[5], source[6], H, 0, W)
                weights = (packed, packed + line, packed + (1 + M) * line)
                _rows(window, (to, target[5], target[6]), part, axes, kernel, weights, lanes, lead, sweep, 0, ahead)
                _activate(to + p0 * target[5], target[5], target[6], p1 - p0, Q, lanes, code)
                continue
            lane, width = lanes_of(group, groups, lanes)
            at, to, pixel = at + lane * source[2], to + lane * target[2], width * SIZE
            h0, h1 = reach(axes[0], axes[1], p0, p1, H)
            w0, w1 = reach(axes[2], axes[3], q0, q1, W)
            pitch, out_pitch = (w1 - w0) * pixel, (q1 - q0) * pixel
            plane = (h1 - h0) * pitch
            window = (strip - t0 * plane - h0 * pitch, plane, pitch, pixel, H, w0, w1)
            corner = (block - p0 * out_pitch - q0 * pixel, out_pitch, pixel)
            for m in range(M):
                if m == 0 or backward:
                    for t in range(t0, t1):
                        planes = at + m * source[3] + t * depth[5] * source[4]
                        fill(strip + (t - t0) * plane, width, planes, source[2], source[5], source[6], h0, h1, w0, w1)
                zeros = packed + lane % C * SIZE
                weights = (packed, zeros + (1 + m) * line, zeros + (1 + M + m * taps) * line)
                _rows(window, corner, part, axes, kernel, weights, width, 0, sweep, min(backward * m, 1), 0)
                if m == M - 1 or not backward:
                    _activate(block, out_pitch, pixel, p1 - p0, q1 - q0, width, code)
                    planes = to if backward else to + m * target[3]
                    drain(block, width, planes, target[2], target[5], target[6], p0, p1, q0, q1)

    @device
    def _rows(window, goal, part, axes, kernel, weights, lanes, lead, sweep, add, ahead):
        """Compute rows of one depth of the target; with `add`, add to what it holds.

        A running sum is CHAIN products of one depth tap, some kernel rows and one chunk of the columns.
        """
        (p0, p1, q0, q1), (target, out_pitch, out_pixel) = part, goal
        source, plane, pitch, pixel, H, w0, w1 = window
        t0, t1, t_tap, t_tap_step, R, S, line = kernel
        zeros, bias, weight = weights
        vectors = (lanes + lead + LANES - 1) // LANES
        for p in range(p0, p1):
            _, _, row_step, in_row, low_row, h_step, row_taps, r_tap, r_tap_step = integers(
                axes[0] + p % axes[1] * PHASE, 0, 9
            )
            h = p // row_step * in_row + low_row
            r0, r1 = inside(h, h_step, row_taps, H)
            for f in range(axes[3]):
                first, out_step, in_step, low, step, taps, s_tap, s_tap_step, begin, end = phase(axes[2], f, q0, q1)
                v1 = 0
                while v1 < vectors:
                    v0, v1 = v1, _pass_end(v1, vectors, lanes, lead, sweep)
                    fresh = 1 - add
                    for t in range(t0, max(t1, t0 + 1)):
                        for r in range(r0, max(r1, r0 + 1), ROWS):
                            for j in range(CHUNKS):
                                s0, s1 = share(taps, j, CHUNKS)
                                rows = min(ROWS, r1 - r) if t < t1 and s1 > s0 else 0
                                # The first writes the bias, even where no tap meets the image.
                                if rows == 0 and fresh == 0:
                                    continue
                                tap = (t_tap + t * t_tap_step) * R + r_tap + r * r_tap_step
                                tap = weight + (tap * S + s_tap + s0 * s_tap_step) * line
                                row = source + t * plane + (h + r * h_step) * pitch
                                for i in range(begin, end, WIDTH):
                                    w = i * in_step + low + s0 * step
                                    meets = w < w1 and w + (WIDTH - 1) * in_step + (s1 - s0 - 1) * step >= w0
                                    if fresh == 0 and not meets:
                                        continue
                                    place = target + p * out_pitch + (first + i * out_step) * out_pixel
                                    for v in range(v0, v1):
                                        lane = min(max(v * LANES - lead, 0), lanes - LANES) * SIZE
                                        _tile(s1 - s0, (
                                            row + lane, h_step * pitch, rows if meets else 0, (w - w0) * pixel,
                                            (w1 - w0) * pixel, in_step * pixel, step * pixel, zeros, tap + lane,
                                            r_tap_step * S * line, s_tap_step * line,
                                            (bias if fresh else place) + lane, 0 if fresh else out_step * out_pixel,
                                            place + lane, out_step * out_pixel, min(WIDTH, end - i), ahead,
                                        ))  # fmt: skip
                                fresh = 0

    @device
    def _tile(taps, numbers):
        if FEWER and taps == FEWER:
            slide_tile(WIDTH, FEWER, STRIDE, LANES, SIZE, numbers)
        else:
            slide_tile(WIDTH, TAPS_, STRIDE, LANES, SIZE, numbers)

    @device
    def _pass_end(v, vectors, lanes, lead, sweep):
        """Return where a pass over vectors from `v` on ends: those of one pass do not overlap."""
        if v == 0 and lead:
            return 1
        last = vectors - 1 if (lanes + lead) % LANES else vectors
        return min(v + sweep, last) if v < last else vectors

    @device
    def _activate(place, pitch, pixel, rows, columns, lanes, code):
        if code == 0:
            return
        for p in range(rows):
            for q in range(columns):
                at = place + p * pitch + q * pixel
                for i in range(lanes):
                    store(SIZE, at + i * SIZE, activate(load(SIZE, at + i * SIZE), code))

    return Slides(pack, slide)


class Sums(NamedTuple):
    """Weight gradient."""

    add: Task
    finish: Task


@lru_cache(maxsize=64)
def sums(tile, rows, row_chunks, fewer_rows):
    """Return the tasks around one tile of taps and kernel rows; 0 for `fewer_rows` says that no chunk has fewer."""
    WIDTH, TAPS_, FEWER, CHUNKS, STRIDE, LANES, SIZE = tile
    ROWS, ROW_CHUNKS, FEWER_ROWS = rows, row_chunks, fewer_rows
    VECTOR = LANES * SIZE
    move, lanes_of, phase, reach, inside, fill, drain = movers(LANES, SIZE)

    @task
    def add(arguments, chunk):
        """Sums (parts, vectors, M, taps, LANES) over a part of the pixels for a group of vectors at a time."""
        chunks, source, grads = integer(arguments, 0), integers(arguments, 1, 7), integers(arguments, 8, 7)
        (D, H, W), (O, P, Q) = integers(arguments, 15, 3), integers(arguments, 18, 3)
        depths, rows, columns = integers(arguments, 21, 2), integers(arguments, 23, 2), integers(arguments, 25, 2)
        N, lanes, M, vectors, groups, parts, in_place, lead = integers(arguments, 27, 8)
        part_rows, part_columns, T, R, S, zeros = integers(arguments, 35, 6)
        strips, strip_bytes, blocks, block_bytes, partials, partial_bytes, totals = integers(arguments, 41, 7)
        _, _, _, in_depth, low_depth, d_step = integers(depths[0], 0, 6)
        _, _, _, in_row, low_row, h_step = integers(rows[0], 0, 6)
        row = (in_row, low_row, h_step)
        strip, block = strips + chunk * strip_bytes, blocks + chunk * block_bytes
        partial = partials + chunk * partial_bytes
        taps = T * R * S
        row_parts, column_parts = (P + part_rows - 1) // part_rows, (Q + part_columns - 1) // part_columns
        begin, end = share(parts * groups, chunk, chunks)
        for job in range(begin, end):
            lot, group = job // groups, job % groups
            v0, v1 = share(vectors, group, groups)
            count = (v1 - v0) * M * taps * LANES
            total = totals + (lot * vectors + v0) * M * taps * LANES * 8
            zero_bytes(partial, count * SIZE)
            zero_bytes(total, count * 8)
            u0, u1 = share(N * O * row_parts * column_parts, lot, parts)
            pending = 0
            for unit in range(u0, u1):
                q0, rest = unit % column_parts * part_columns, unit // column_parts
                p0, rest = rest % row_parts * part_rows, rest // row_parts
                o, n = rest % O, rest // O
                p1, q1 = min(p0 + part_rows, P), min(q0 + part_columns, Q)
                d = o * in_depth + low_depth
                t0, t1 = inside(d, d_step, T, D)
                part, kernel = (p0, p1, q0, q1), (t0, t1, R, S, taps)
                place = source[0] + n * source[1] + d * source[4]
                grad = grads[0] + n * grads[1] + o * grads[4]
                if in_place:
                    window = (place, d_step * source[4], source[5], source[6], H, 0, W)
                    goal = (grad, grads[5], grads[6])
                    _add_rows(window, goal, part, kernel, row, columns, zeros, partial, 1, v0, v1, lanes, lead)
                else:
                    lane, width = lanes_of(group, groups, lanes)
                    place, grad, pixel = place + lane * source[2], grad + lane * grads[2], width * SIZE
                    h0, h1 = reach(rows[0], rows[1], p0, p1, H)
                    w0, w1 = reach(columns[0], columns[1], q0, q1, W)
                    pitch, out_pitch = (w1 - w0) * pixel, (q1 - q0) * pixel
                    plane = (h1 - h0) * pitch
                    for t in range(t0, t1):
                        planes = place + t * d_step * source[4]
                        fill(strip + (t - t0) * plane, width, planes, source[2], source[5], source[6], h0, h1, w0, w1)
                    window = (strip - t0 * plane - h0 * pitch, plane, pitch, pixel, H, w0, w1)
                    goal = (block - p0 * out_pitch - q0 * pixel, out_pitch, pixel)
                    for m in range(M):
                        fill(block, width, grad + m * grads[3], grads[2], grads[5], grads[6], p0, p1, q0, q1)
                        sums = partial + m * taps * VECTOR
                        _add_rows(window, goal, part, kernel, row, columns, zeros, sums, M, 0, v1 - v0, width, 0)
                pending += (p1 - p0) * (q1 - q0)
                if pending >= PIXEL_CHAIN or unit == u1 - 1:
                    for i in range(0, count, LANES):
                        add_doubles(LANES, SIZE, total + i * 8, partial + i * SIZE)
                    zero_bytes(partial, count * SIZE)
                    pending = 0

    @device
    def _add_rows(window, grads, part, kernel, row, columns, zeros, partial, M, v0, v1, lanes, lead):
        """Add the products of some rows of pixels with the gradients there to the sums of every tap."""
        source, plane, pitch, pixel, H, w0, w1 = window
        (p0, p1, q0, q1), (t0, t1, R, S, taps), (grad, grad_pitch, grad_pixel) = part, kernel, grads
        for p in range(p0, p1):
            h = p * row[0] + row[1]
            r0, r1 = inside(h, row[2], R, H)
            for f in range(columns[1]):
                first, out_step, in_step, low, step, _, _, _, begin, end = phase(columns[0], f, q0, q1)
                for chunk in range(t0 * ROW_CHUNKS * CHUNKS, t1 * ROW_CHUNKS * CHUNKS):
                    t = chunk // (ROW_CHUNKS * CHUNKS)
                    ra, rb = share(R, chunk // CHUNKS % ROW_CHUNKS, ROW_CHUNKS)
                    sa, sb = share(S, chunk % CHUNKS, CHUNKS)
                    if rb <= r0 or ra >= r1:
                        continue
                    place = source + t * plane + (h + ra * row[2]) * pitch
                    tap = partial + ((t * R + ra) * S + sa) * VECTOR
                    for i in range(begin, end, SEGMENT):
                        count = min(SEGMENT, end - i)
                        w = i * in_step + low + sa * step
                        if w >= w1 or w + (count - 1) * in_step + (sb - sa - 1) * step < w0:
                            continue
                        g = grad + p * grad_pitch + (first + i * out_step) * grad_pixel
                        for v in range(v0, v1):
                            lane = min(max(v * LANES - lead, 0), lanes - LANES) * SIZE
                            _tile(rb - ra, sb - sa, (
                                place + lane, row[2] * pitch, h + ra * row[2], row[2], H, (w - w0) * pixel,
                                (w1 - w0) * pixel, in_step * pixel, step * pixel, zeros, g + lane,
                                out_step * grad_pixel, count, tap + (v - v0) * M * taps * VECTOR, S * VECTOR, VECTOR,
                            ))  # fmt: skip

    @device
    def _tile(rows, columns, arguments):
        if FEWER_ROWS and rows == FEWER_ROWS:
            if FEWER and columns == FEWER:
                slide_sums(WIDTH, FEWER_ROWS, FEWER, STRIDE, LANES, SIZE, arguments)
            else:
                slide_sums(WIDTH, FEWER_ROWS, TAPS_, STRIDE, LANES, SIZE, arguments)
        elif FEWER and columns == FEWER:
            slide_sums(WIDTH, ROWS, FEWER, STRIDE, LANES, SIZE, arguments)
        else:
            slide_sums(WIDTH, ROWS, TAPS_, STRIDE, LANES, SIZE, arguments)

    @task
    def finish(arguments, chunk):
        """Add up the parts, and the images where lanes are planes of all of them, to (C, M, taps)."""
        chunks, target, totals, C, lanes, M, vectors, taps, parts, lead = integers(arguments, 0, 10)
        line, lot = LANES * 8, vectors * M * taps * LANES * 8
        begin, end = share(M * taps, chunk, chunks)
        for job in range(begin, end):
            m, tap = job // taps, job % taps
            for v in range(vectors):
                at = totals + (v * M * taps + job) * line
                for part in range(1, parts):
                    add_doubles(LANES, 8, at, at + part * lot)
            for c in range(C):
                lane, result = c, 0.0
                while lane < lanes:
                    v = min((lane + lead) // LANES, vectors - 1)
                    at = totals + (v * M * taps + job) * line
                    result += load(8, at + (lane - min(max(v * LANES - lead, 0), lanes - LANES)) * 8)
                    lane += C
                store(SIZE, target + ((c * M + m) * taps + tap) * SIZE, result)

    return Sums(add, finish)


@lru_cache(maxsize=16)
def movers(LANES, SIZE):
    """Return the functions that move planes to strips of channels and back, and say what part of them."""

    @device
    def move(source, plane, pixel, target, out_plane, out_pixel, count):
        """Copy `count` pixels of LANES planes to other strides: transposed where neighbours change places."""
        if pixel == SIZE and out_plane == SIZE:
            for q in range(0, count, LANES):
                transpose_block(
                    LANES, SIZE, source + q * SIZE, plane, LANES, count - q, target + q * out_pixel, out_pixel
                )
        elif plane == SIZE and out_pixel == SIZE:
            for q in range(0, count, LANES):
                transpose_block(LANES, SIZE, source + q * pixel, pixel, count - q, LANES, target + q * SIZE, out_plane)
        else:
            for q in range(count):
                for i in range(LANES):
                    value = load(SIZE, source + i * plane + q * pixel)
                    store(SIZE, target + i * out_plane + q * out_pixel, value)

    @device
    def phase(axis, number, first, last):
        """Return (first, out_step, in_step, low, step, taps, tap, tap_step) of a phase and the targets in a range."""
        at, size, out_step, in_step, low, step, taps, tap, tap_step = integers(axis + number * PHASE, 0, 9)
        begin = max(0, -((at - first) // out_step))
        return at, out_step, in_step, low, step, taps, tap, tap_step, begin, min(size, -((at - last) // out_step))

    @device
    def reach(axis, phases, first, last, size):
        """Return the range of source positions inside [0, size) that targets first to last - 1 read."""
        low, high = size, 0
        for number in range(phases):
            _, _, in_step, start, step, taps, _, _, begin, end = phase(axis, number, first, last)
            if begin < end and taps > 0:
                low = min(low, begin * in_step + start)
                high = max(high, (end - 1) * in_step + start + (taps - 1) * step + 1)
        low = min(max(low, 0), size)
        return low, max(min(high, size), low)

    @device
    def inside(low, step, taps, size):
        """Return the range of taps whose source low + tap*step is inside [0, size)."""
        begin = max(0, -(low // step))
        return begin, max(begin, min(taps, (size - low + step - 1) // step))

    @device
    def lanes_of(group, groups, lanes):
        """Return the first lane of a group of vectors, and how many it has."""
        v0, v1 = share((lanes + LANES - 1) // LANES, group, groups)
        first = min(v0 * LANES, lanes - LANES)
        return first, min(v1 * LANES, lanes) - first

    @device
    def fill(strip, lanes, source, plane, row, pixel, h0, h1, w0, w1):
        """Copy a part of some planes to a strip (rows, columns, lanes)."""
        # Rows that follow each other are one.
        rows, width = (1, (h1 - h0) * (w1 - w0)) if row == (w1 - w0) * pixel else (h1 - h0, w1 - w0)
        for h in range(rows):
            for v in range((lanes + LANES - 1) // LANES):
                lane = min(v * LANES, lanes - LANES)
                place = source + (h0 + h) * row + w0 * pixel + lane * plane
                move(place, plane, pixel, strip + (h * width * lanes + lane) * SIZE, SIZE, lanes * SIZE, width)

    @device
    def drain(strip, lanes, target, plane, row, pixel, h0, h1, w0, w1):
        """Copy a strip (rows, columns, lanes) to a part of some planes."""
        rows, width = (1, (h1 - h0) * (w1 - w0)) if row == (w1 - w0) * pixel else (h1 - h0, w1 - w0)
        for h in range(rows):
            for v in range((lanes + LANES - 1) // LANES):
                lane = min(v * LANES, lanes - LANES)
                place = target + (h0 + h) * row + w0 * pixel + lane * plane
                move(strip + (h * width * lanes + lane) * SIZE, SIZE, lanes * SIZE, place, plane, pixel, width)

    return move, lanes_of, phase, reach, inside, fill, drain
