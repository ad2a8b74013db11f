"""Depthwise convolution: every channel by itself, one vector of channels at a time.

    forward       y[i, k]  = sum over taps  x[i*stride + tap*dilation - before, c] * w[k, tap]     k = c*multiplier + m
    input_grad    dx[i*stride + phase] = the same sum over the taps of a phase, of dy
    weight_grad   dw[k, tap] = sum over pixels  x[i*stride + tap*dilation - before, c] * dy[i, k]

There is nothing to multiply as a matrix: a product costs a load, whatever is done, and a tile is a few pixels that
share the load of a weight. It works from tables of where the rows and columns of taps are, so one loop nest serves
every kernel, stride, dilation and direction.

With channels last a small kernel reads the image in place: pixels whose taps are all inside by tiles, those at a
border one by one, with the taps that are. Elsewhere a padded strip of one vector of channels is copied to the cache
first, or transposed where channels are first, and taps are left out where all of a tile meet padding. A weight
gradient holds a few taps in registers instead of pixels; its sums are added up in float64.
"""

from functools import lru_cache
from math import prod
from typing import NamedTuple

import numpy as np

from ..activations import CODES
from ..registry import Buffer
from . import epilogue, threads
from .compile import Task, device, share, task
from .machine import constants
from .memory import address, layout_of
from .simd import Tile, integer, integers, load, store, tile_for
from .simd_depthwise import SLIDING, correlate_taps, slide_tile
from .strips import strips

IN_TASKS = True
# Products per sum: the rounding error of a float32 sum grows with its length.
MOST_TAPS = 4096
# Pixels of a weight gradient that are added up in the element's precision.
PIXEL_CHAIN = 1024
# Taps whose sums are held in registers.
TAPS = 9
# Parts of a weight gradient: their number depends on sizes alone, and so does the result.
PARTS = 16
# Pixels of a part at least, while there are vectors to share out instead.
LEAST_PIXELS = 384
# Largest kernel that reads the image in place, and rows of the target in one job of it.
MOST_IN_PLACE, ROWS_IN_PLACE = 3, 16
# Bytes of a strip, and of the sums of one job of a weight gradient.
STRIP_BYTES = 128 * 1024
SUMS_BYTES = 64 * 1024
# Columns of a strip at least, where the target has as many.
LEAST_COLUMNS = 64
# Operations that are done before a second thread has woken.
SERIAL_FLOPS = 500_000
# Numbers that are put in order, or added up, before then.
SERIAL_WEIGHT = 16 * 1024
# An entry of a table of taps, and a phase: bytes.
ENTRY, PHASE = 24, 32


class Phase(NamedTuple):
    """Targets first + i*step for i < size; tap t of their taps (t, position) reads source i*in_step + position."""

    first: int
    size: int
    step: int
    taps: tuple[tuple[int, int], ...]


class Axis(NamedTuple):
    """Phases along one axis, and the lowest and highest position of all their taps."""

    extent: int
    in_step: int
    low: int
    high: int
    phases: tuple[Phase, ...]

    @property
    def size(self) -> int:
        """Targets of the longest phase."""
        return max(phase.size for phase in self.phases)

    def span(self, count: int) -> int:
        """Source positions that `count` targets of a phase read."""
        return (count - 1) * self.in_step + self.high - self.low + 1


class Plan(NamedTuple):
    """Everything about one direction of a geometry that depends on sizes alone."""

    axes: tuple[Axis, Axis, Axis]
    lanes: int
    itemsize: int
    channels: int
    multiplier: int
    in_place: bool
    # Targets of one job, and groups of vectors of channels of a weight gradient.
    rows: int
    columns: int
    groups: int
    # A strip is (planes, strip_rows, pitch, lanes).
    planes: int
    strip_rows: int
    pitch: int

    @property
    def vectors(self) -> int:
        """Vectors of channels; the last one begins early rather than end late."""
        return -(-self.channels // self.lanes)

    @property
    def line(self) -> int:
        """Channels in a row of packed weights."""
        return max(self.channels, self.lanes)

    @property
    def apart(self) -> int:
        """Taps that neighbouring pixels are apart, where those are one or two: they share what they load."""
        taps = self.axes[2].phases[0].taps
        if len(self.axes[2].phases) > 1 or len(taps) < SLIDING:
            return 0
        apart, rest = divmod(self.axes[2].in_step, taps[1][1] - taps[0][1])
        return apart if apart in (1, 2) and not rest else 0

    @property
    def strip_elements(self) -> int:
        """Size of a strip."""
        return 0 if self.in_place else self.planes * self.strip_rows * self.pitch * self.lanes


def supports(geometry, direction):
    """Floating-point geometries with one channel per group."""
    if geometry.dtype.kind != "f":
        return False, f"its tiles are floating-point, not {geometry.dtype}"
    per_group = geometry.in_channels // geometry.groups
    if per_group != 1:
        return False, f"it takes one channel per group, not {per_group}"
    if prod(geometry.kernel_size) > MOST_TAPS:
        return False, f"its sums of products keep their precision up to {MOST_TAPS} taps"
    return True, ""


def seconds(geometry, direction, threads_):
    """Predicted time: a load per product and what copying strips adds, or moving the arrays."""
    g, machine = geometry, constants()
    plan = _plan(g, direction)
    used = plan.channels / (plan.vectors * plan.lanes)
    rate = 0.5 * machine.flops * min(threads_, _chunks(g)) * (4 / g.dtype.itemsize) * used
    last = g.data_format == "channels_last"
    copies = 0 if plan.in_place else 4 if last else 16
    work = g.flops + copies * (prod(g.x_shape) + prod(g.output_shape))
    return 20e-6 + 2 * machine.launch + max(work / rate, g.bytes / machine.bandwidth)


def _axis(g, direction, axis):
    n, k, s, d = g.input_size[axis], g.kernel_size[axis], g.stride[axis], g.dilation[axis]
    before, size = g.padding[axis][0], g.output_size[axis]
    if direction == "input_grad":
        step, extent, phases = 1, size, []
        for f in range(min(s, n)):
            taps = [(t, (f + before - t * d) // s) for t in reversed(range(k)) if (f + before - t * d) % s == 0]
            phases.append(Phase(f, -(-(n - f) // s), s, tuple(taps)))
    else:
        step, extent = s, n
        phases = [Phase(0, size, 1, tuple((t, t * d - before) for t in range(k)))]
    positions = [position for phase in phases for _, position in phase.taps]
    return Axis(extent, step, min(positions, default=0), max(positions, default=0), tuple(phases))


@lru_cache(maxsize=1024)
def _plan(g, direction):
    axes = tuple(_axis(g, direction, axis) for axis in range(3))
    depth, height, width = axes
    C, multiplier, itemsize = g.in_channels, g.out_channels // g.in_channels, g.dtype.itemsize
    lanes = tile_for(itemsize).lanes
    pixel = lanes * itemsize
    in_place = (
        direction != "weight_grad"
        and g.data_format == "channels_last"
        and multiplier == 1
        and lanes <= C
        and max(g.kernel_size) <= MOST_IN_PLACE
        and g.kernel_size[0] == 1
        and g.padding[0] == (0, 0)
    )
    planes = max(len(phase.taps) for phase in depth.phases) * (multiplier if direction == "input_grad" else 1)
    if in_place:
        rows = min(max(g.batch * height.size // 16, 1), ROWS_IN_PLACE)
        columns = width.size
    else:
        fits = STRIP_BYTES // (planes * pixel)
        columns = (fits // height.span(1) - width.span(1)) // width.in_step + 1
        columns = min(max(columns, LEAST_COLUMNS), width.size)
        rows = (fits // width.span(columns) - height.span(1)) // height.in_step + 1
        rows = min(max(rows, 1), height.size)
        if direction == "weight_grad":
            columns = min(columns, PIXEL_CHAIN)
            rows = min(rows, max(PIXEL_CHAIN // columns, 1))
    rows, columns = (-(-size // -(-size // part)) for size, part in ((height.size, rows), (width.size, columns)))
    vectors = -(-C // lanes)
    # Rather fewer vectors to a job than so few pixels that their sums are all the work.
    most_parts = max(g.batch * prod(g.output_size) // LEAST_PIXELS, 1)
    groups = max(-(-vectors * _sums_bytes(g, lanes, multiplier) // SUMS_BYTES), -(-PARTS // most_parts))
    groups = min(groups, vectors)
    return Plan(
        axes, lanes, itemsize, C, multiplier, in_place, rows, columns, groups,
        planes, height.span(rows), width.span(columns),
    )  # fmt: skip


def _sums_bytes(g, lanes, multiplier):
    """Bytes of the sums of one vector of channels."""
    return multiplier * _padded_taps(g) * lanes * 8


def _padded_taps(g):
    return -(-prod(g.kernel_size) // TAPS) * TAPS


class Tables(NamedTuple):
    """A plan, and what the tasks of `_slide` read of it.

    Phases (first, size, step, taps) of each axis, positions of the taps of each depth phase, and entries (source,
    weight, position) of taps; offsets are bytes. The rows of taps of depth phase i and height phase j are entries from
    (i*phases + j)*row_entries on, the columns of width phase i from i*column_entries.
    """

    plan: Plan
    numbers: tuple[int, ...]
    # Kept alive for the addresses among the numbers.
    arrays: tuple[np.ndarray, ...]


@lru_cache(maxsize=1024)
def _tables(g, direction):
    plan = _plan(g, direction)
    (depth, height, width), size = plan.axes, plan.itemsize
    pixel = plan.lanes * size
    row, plane = plan.pitch * pixel, plan.strip_rows * plan.pitch * pixel
    low = (0, height.low, width.low)
    if plan.in_place:
        pixel = plan.channels * size
        row, plane, low = width.extent * pixel, width.extent * height.extent * pixel, (0, 0, 0)
    T, R, S = g.kernel_size
    line, sources = plan.line * size, plan.multiplier if direction == "input_grad" else 1
    d, h, w = (np.array([(*p[:3], len(p.taps)) for p in axis.phases], np.int64) for axis in plan.axes)
    most = [max(len(p.taps) for p in axis.phases) for axis in plan.axes]
    depths = np.zeros((len(depth.phases), max(most[0], 1)), np.int64)
    rows = np.zeros((len(depth.phases), len(height.phases), sources * max(most[0] * most[1], 1), 3), np.int64)
    columns = np.zeros((len(width.phases), max(most[2], 1), 3), np.int64)
    for i, a in enumerate(depth.phases):
        depths[i, : len(a.taps)] = [position for _, position in a.taps]
        for j, b in enumerate(height.phases):
            entries = [
                (
                    (position if plan.in_place else m * len(a.taps) + number) * plane + (h - low[1]) * row,
                    ((m * T + t) * R + r) * S * line,
                    h,
                )
                for m in range(sources)
                for number, (t, position) in enumerate(a.taps)
                for r, h in b.taps
            ]
            rows[i, j, : len(entries)] = np.reshape(entries, (-1, 3))
    for i, c in enumerate(width.phases):
        entries = [((w - low[2]) * pixel, s * line, w) for s, w in c.taps]
        columns[i, : len(entries)] = np.reshape(entries, (-1, 3))
    arrays = (d, h, w, depths, rows, columns)
    numbers = (
        *_of_axes(plan), *map(address, arrays[:3]), *map(len, arrays[:3]),
        address(depths), depths.shape[1], address(rows), rows.shape[2], address(columns), columns.shape[1],
    )  # fmt: skip
    return Tables(plan, numbers, arrays)


@lru_cache(maxsize=1024)
def _tap_table(g):
    """Return, for each lot of taps of a weight gradient, their offsets in a strip and the lowest and highest positions.

    int64 (lots, TAPS + 4): offsets, the last one repeated; lowest and highest row, lowest and highest column.
    """
    plan = _plan(g, "weight_grad")
    _, height, width = plan.axes
    pixel = plan.lanes * plan.itemsize
    taps = [
        (((t * plan.strip_rows + h - height.low) * plan.pitch + w - width.low) * pixel, h, w)
        for t in range(g.kernel_size[0])
        for _, h in height.phases[0].taps
        for _, w in width.phases[0].taps
    ]
    taps += taps[-1:] * (-len(taps) % TAPS)
    lots = np.array(taps, np.int64).reshape(-1, TAPS, 3)
    extremes = [part for axis in (1, 2) for part in (lots[:, :, axis].min(1), lots[:, :, axis].max(1))]
    return np.ascontiguousarray(np.column_stack([lots[:, :, 0], *extremes]))


def _chunks(g):
    return 1 if g.flops < SERIAL_FLOPS else threads.count()


def workspace(geometry, direction, limit):
    """The packed weight, or the sums of its gradient; per thread a strip and a row of results, or of their gradient."""
    g, chunks = geometry, _chunks(geometry)
    plan = _plan(g, direction)
    lanes, taps, M = plan.lanes, prod(g.kernel_size), plan.multiplier
    buffers = {"strips": Buffer((chunks, plan.strip_elements), g.dtype)}
    if direction == "weight_grad":
        buffers["blocks"] = Buffer((chunks, plan.rows * plan.columns * lanes), g.dtype)
        most = -(-plan.vectors // plan.groups)
        buffers["partial"] = Buffer((chunks, most, M, _padded_taps(g), lanes), np.dtype(np.float64))
        buffers["sums"] = Buffer((_parts(g, plan), M, taps, plan.line), np.dtype(np.float64))
    else:
        buffers["blocks"] = Buffer((chunks, plan.columns * lanes), g.dtype)
        buffers["weights"] = Buffer((M, taps, plan.line), g.dtype)
        buffers["bias"] = Buffer((M, plan.line), g.dtype)
    return buffers


def _parts(g, plan):
    """Return how many parts the pixels of a weight gradient are cut into."""
    _, height, width = plan.axes
    units = g.batch * g.output_size[0] * -(-height.size // plan.rows) * -(-width.size // plan.columns)
    return min(-(-PARTS // plan.groups), max(units, 1))


def forward(geometry, x, weight, bias, activation, out, workspace):
    """Write the convolution of `x` with `weight`, plus bias, through the activation, to `out`."""
    code = CODES[activation]
    _slide(geometry, "forward", x, weight, bias, code if code <= 2 else 0, out, workspace)
    if code > 2:
        epilogue.apply(out, geometry.data_format, None, activation)


def input_grad(geometry, grad_output, weight, out, workspace):
    """Write the gradient with respect to the input to `out`."""
    _slide(geometry, "input_grad", grad_output, weight, None, 0, out, workspace)


def _slide(g, direction, source, weight, bias, code, out, workspace):
    plan, taps, tables = _tables(g, direction)
    C, M = plan.channels, plan.multiplier
    backward = direction == "input_grad"
    tasks, weights, number = slides(plan.lanes, plan.itemsize, plan.apart), workspace["weights"], prod(g.kernel_size)
    line = plan.line * plan.itemsize
    serial = weight.size < SERIAL_WEIGHT
    tasks.arrange(1 if serial else _chunks(g), address(weight), address(weights), C, M, number, line)
    if bias is not None:
        tasks.arrange(1, address(bias), address(workspace["bias"]), C, M, 1, line)
    shared = (
        *_view(source, g.data_format, M if backward else 1), *_view(out, g.data_format, 1 if backward else M),
        address(weights), 0 if bias is None else address(workspace["bias"]), code,
    )  # fmt: skip
    if plan.in_place:
        whole = plan.channels % plan.lanes == 0 and plan.channels >= 4 * plan.lanes
        tasks.slide_in_place(_chunks(g), *shared, g.batch, C, plan.rows, whole, *taps, held=tables)
        return
    tasks.slide(
        _chunks(g), *shared, g.batch, C, plan.rows, plan.columns, *taps,
        address(workspace["strips"]), plan.strip_elements * plan.itemsize, address(workspace["blocks"]),
        line, M if backward else 1, 1 if backward else M, number, plan.strip_rows, plan.pitch, held=tables,
    )  # fmt: skip


def _view(array, data_format, multiplier):
    """Return the address and the byte strides of images, channels, the `multiplier` filters of each, D, H, W."""
    place, image, channel, *space = layout_of(array, data_format)
    return place, image, channel * multiplier, channel, *space


def _of_axes(plan):
    """Return (extents, steps, lowest positions, sizes), of D, H and W each."""
    return [number for part in ("extent", "in_step", "low", "size") for number in (getattr(a, part) for a in plan.axes)]


def weight_grad(geometry, grad_output, x, out, workspace):
    """Write the gradient with respect to the weight to `out`."""
    g, plan = geometry, _plan(geometry, "weight_grad")
    C, M, last = plan.channels, plan.multiplier, g.data_format == "channels_last"
    sums, lots, depths = workspace["sums"], _tap_table(g), _tables(g, "weight_grad").arrays[3]
    tasks, number = slides(plan.lanes, plan.itemsize, 0), prod(g.kernel_size)
    tasks.correlate(
        min(_chunks(g), plan.groups * len(sums)),
        *_view(x, g.data_format, 1), *_view(grad_output, g.data_format, M),
        address(sums), len(sums), address(workspace["partial"]),
        g.batch, C, plan.rows, plan.columns, *_of_axes(plan),
        address(workspace["strips"]), plan.strip_elements * plan.itemsize, address(workspace["blocks"]),
        plan.line, M, number, last and M == 1 and plan.lanes <= C, plan.groups,
        plan.strip_rows, plan.pitch, address(depths), depths.shape[1], address(lots), len(lots), plan.planes,
    )  # fmt: skip
    serial = sums.size < SERIAL_WEIGHT
    tasks.add_parts(1 if serial else _chunks(g), address(sums), len(sums), address(out), C, M, number, plan.line)


class Slides(NamedTuple):
    """Tasks for vectors of some number of lanes."""

    slide_in_place: Task
    slide: Task
    correlate: Task
    arrange: Task
    add_parts: Task


@lru_cache(maxsize=8)
def slides(LANES, SIZE, APART):
    """Return the tasks for vectors of some shape, and pixels so many taps apart that share what they load; or 0."""
    PIXEL = LANES * SIZE
    move = strips(Tile(1, 1, LANES), SIZE)
    fill, emit, copy_pixels = move.fill, move.emit, move.copy_pixels

    @device
    def axes_of(place):
        """Return the extents, steps, lowest positions and sizes that `_of_axes` has put at an address."""
        return integers(place, 0, 3), integers(place, 3, 3), integers(place, 6, 3), integers(place, 9, 3)

    @device
    def first_lane(vector, channels, lead):
        """Return the first channel of a vector; all but the first begin `lead` channels early."""
        return max(min(vector * LANES - lead, channels - LANES), 0)

    @device
    def inside(table, count, low, high, extent):
        """Return the range of taps that meet the image from source positions low to high."""
        first, last = 0, count
        while first < last and high + integer(table + first * ENTRY, 2) < 0:
            first += 1
        while first < last and low + integer(table + (last - 1) * ENTRY, 2) >= extent:
            last -= 1
        return first, last

    @device
    def within(table, count, step, extent, size):
        """Return the range of targets all of whose taps meet the image: everything if there are none."""
        if count == 0:
            return 0, size
        first = min(max(-(integer(table, 2) // step), 0), size)
        beyond = extent - integer(table + (count - 1) * ENTRY, 2)
        return first, min(max((beyond + step - 1) // step, first), size)

    @device
    def stretch(
        across, count, v0, v1, C, lead, at, step, rows, r0, r1, columns, c0, c1, weights, bias, out, out_step, code
    ):
        """Compute `count` targets of all vectors, by tiles of as many as there are; `across` if along a row."""
        done = 0
        while done < count:
            room = count - done
            pixels = 8 if room > 4 else 4 if room > 2 else room
            # Rather a tile that begins early than several small ones.
            done = min(done, max(count - pixels, 0))
            if pixels > count:
                pixels //= 2
            for v in range(v0, v1):
                lane = (first_lane(v, C, lead) - first_lane(v0, C, lead)) * SIZE
                x, y = at + done * step + lane, out + done * out_step + lane
                w, b = weights + lane, bias + lane if bias != 0 else 0
                if pixels == 8:
                    if across:
                        slide_tile(
                            8, APART, LANES, SIZE, x, step, rows, r0, r1, columns, c0, c1, w, b, y, out_step, code
                        )
                    else:
                        slide_tile(8, 0, LANES, SIZE, x, step, rows, r0, r1, columns, c0, c1, w, b, y, out_step, code)
                elif pixels == 4:
                    slide_tile(4, 0, LANES, SIZE, x, step, rows, r0, r1, columns, c0, c1, w, b, y, out_step, code)
                elif pixels == 2:
                    slide_tile(2, 0, LANES, SIZE, x, step, rows, r0, r1, columns, c0, c1, w, b, y, out_step, code)
                else:
                    slide_tile(1, 0, LANES, SIZE, x, step, rows, r0, r1, columns, c0, c1, w, b, y, out_step, code)
            done += pixels

    @task
    def slide_in_place(arguments, chunk):
        """Jobs (image, depth, rows): forward and input gradient on the image itself, with channels last."""
        chunks, source, s_image, _, _, s_depth, s_row, s_pixel = integers(arguments, 0, 8)
        target, t_image, _, _, t_depth, t_row, t_pixel = integers(arguments, 8, 7)
        weights, bias, code = integers(arguments, 15, 3)
        N, C, P, whole = integers(arguments, 18, 4)
        # Vectors begin so early that all but the first are whole cache lines of the source.
        lead = source // SIZE % LANES if whole else 0
        extent, in_step, _, size = axes_of(arguments + 22 * 8)
        d_phases, h_phases, w_phases, d_count, h_count, w_count = integers(arguments, 34, 6)
        _, _, rows, most_rows, columns, most_columns = integers(arguments, 40, 6)
        bands, vectors = (size[1] + P - 1) // P, (C + lead + LANES - 1) // LANES
        begin, end = share(N * size[0] * bands * d_count * h_count * w_count, chunk, chunks)
        for job in range(begin, end):
            w_phase, h_phase, d_phase = job % w_count, job // w_count % h_count, job // (w_count * h_count) % d_count
            unit = job // (w_count * h_count * d_count)
            p0, o, n = unit % bands * P, unit // bands % size[0], unit // (bands * size[0])
            d_first, d_size, d_step, d_taps = integers(d_phases + d_phase * PHASE, 0, 4)
            h_first, h_size, h_step, h_taps = integers(h_phases + h_phase * PHASE, 0, 4)
            w_first, w_size, w_step, w_taps = integers(w_phases + w_phase * PHASE, 0, 4)
            if o >= d_size:
                continue
            down = rows + (d_phase * h_count + h_phase) * most_rows * ENTRY
            across = columns + w_phase * most_columns * ENTRY
            at = source + n * s_image + o * in_step[0] * s_depth
            to = target + n * t_image + (d_first + o * d_step) * t_depth + h_first * t_row + w_first * t_pixel
            row, pixel, out_row, out_pixel = in_step[1] * s_row, in_step[2] * s_pixel, h_step * t_row, w_step * t_pixel
            p1, h_taps = min(p0 + P, h_size), d_taps * h_taps
            top, bottom = within(down, h_taps, in_step[1], extent[1], h_size)
            left, right = within(across, w_taps, in_step[2], extent[2], w_size)
            # Between the borders along rows, the columns at the borders downwards.
            for i in range(p0, p1):
                r0, r1 = inside(down, h_taps, i * in_step[1], i * in_step[1], extent[1])
                stretch(
                    True, right - left, 0, vectors, C, lead, at + i * row + left * pixel, pixel, down, r0, r1,
                    across, 0, w_taps, weights, bias, to + i * out_row + left * out_pixel, out_pixel, code,
                )  # fmt: skip
            for column in range(w_size - (right - left)):
                q = column if column < left else column + right - left
                c0, c1 = inside(across, w_taps, q * in_step[2], q * in_step[2], extent[2])
                i = p0
                while i < p1:
                    count = min(bottom, p1) - i if top <= i < bottom else 1
                    r0, r1 = inside(down, h_taps, i * in_step[1], i * in_step[1], extent[1])
                    stretch(
                        False, count, 0, vectors, C, lead, at + i * row + q * pixel, row, down, r0, r1,
                        across, c0, c1, weights, bias, to + i * out_row + q * out_pixel, out_row, code,
                    )  # fmt: skip
                    i += count

    @task
    def slide(arguments, chunk):
        """Jobs (image, depth, rows, columns, group of vectors): forward and input gradient on strips."""
        chunks, source, s_image, s_channel, s_filter, s_depth, s_row, s_pixel = integers(arguments, 0, 8)
        target, t_image, t_channel, t_filter, t_depth, t_row, t_pixel = integers(arguments, 8, 7)
        weights, bias, code = integers(arguments, 15, 3)
        N, C, P, Q = integers(arguments, 18, 4)
        extent, in_step, low, size = axes_of(arguments + 22 * 8)
        d_phases, h_phases, w_phases, d_count, h_count, w_count = integers(arguments, 34, 6)
        depths, most_depths, rows, most_rows, columns, most_columns = integers(arguments, 40, 6)
        strip, strip_bytes, block, line, M_in, M_out, taps, strip_rows, pitch = integers(arguments, 46, 9)
        strip += chunk * strip_bytes
        block += chunk * Q * PIXEL
        bands, parts, vectors = (size[1] + P - 1) // P, (size[2] + Q - 1) // Q, (C + LANES - 1) // LANES
        used = min(C, LANES)
        direct = M_out == 1 and t_channel == SIZE and C >= LANES
        begin, end = share(N * size[0] * bands * parts * vectors * d_count, chunk, chunks)
        for job in range(begin, end):
            d_phase, v, unit = job % d_count, job // d_count % vectors, job // (d_count * vectors)
            q0, p0, o, n = (
                unit % parts * Q, unit // parts % bands * P, unit // (parts * bands) % size[0],
                unit // (parts * bands * size[0]),
            )  # fmt: skip
            d_first, d_size, d_step, d_taps = integers(d_phases + d_phase * PHASE, 0, 4)
            if o >= d_size:
                continue
            lane = first_lane(v, C, 0)
            read = source + n * s_image + lane * s_channel
            write = target + n * t_image + (d_first + o * d_step) * t_depth + lane * t_channel
            corner = (o * in_step[0], p0 * in_step[1] + low[1], q0 * in_step[2] + low[2])
            for m in range(M_in):
                fill(
                    strip + m * d_taps * strip_rows * pitch * PIXEL, PIXEL, read + m * s_filter,
                    (0, 0, s_channel, s_depth, s_row, s_pixel), extent, used,
                    (depths + d_phase * most_depths * 8, d_taps), corner, strip_rows, pitch,
                )  # fmt: skip
            for phase in range(M_out * h_count * w_count):
                m, h_phase, w_phase = phase // (h_count * w_count), phase // w_count % h_count, phase % w_count
                h_first, h_size, h_step, h_taps = integers(h_phases + h_phase * PHASE, 0, 4)
                w_first, w_size, w_step, w_taps = integers(w_phases + w_phase * PHASE, 0, 4)
                down = rows + (d_phase * h_count + h_phase) * most_rows * ENTRY
                across = columns + w_phase * most_columns * ENTRY
                left, right = within(across, w_taps, in_step[2], extent[2], w_size)
                p1, q1, out_pixel = min(p0 + P, h_size), min(q0 + Q, w_size), w_step * t_pixel
                w = weights + m * taps * line + lane * SIZE
                b = bias + m * line + lane * SIZE if bias != 0 else 0
                for i in range(p0, p1):
                    r0, r1 = 0, M_in * d_taps * h_taps
                    if M_in * d_taps == 1:
                        r0, r1 = inside(down, h_taps, i * in_step[1], i * in_step[1], extent[1])
                    at = strip + ((i - p0) * in_step[1] * pitch - q0 * in_step[2]) * PIXEL
                    place = write + m * t_filter + (h_first + i * h_step) * t_row + (w_first + q0 * w_step) * t_pixel
                    out, out_step = (place, out_pixel) if direct else (block, PIXEL)
                    for start in range(q0, q1, 8):
                        # The last pixels together with some before them.
                        q, count = max(min(start, q1 - 8), q0), min(q1 - q0, 8)
                        c0, c1 = 0, w_taps
                        if q < left or q + count > right:
                            near, far = q * in_step[2], (q + count - 1) * in_step[2]
                            c0, c1 = inside(across, w_taps, near, far, extent[2])
                        stretch(
                            True, count, v, v + 1, C, 0, at + q * in_step[2] * PIXEL, in_step[2] * PIXEL, down, r0, r1,
                            across, c0, c1, w, b, out + (q - q0) * out_step, out_step, code,
                        )  # fmt: skip
                    if not direct and q1 > q0:
                        emit(block, place, t_channel, out_pixel, used, q1 - q0)

    @task
    def correlate(arguments, chunk):
        """Jobs (part of the pixels, group of vectors): the weight gradient."""
        chunks, source, s_image, s_channel, _, s_depth, s_row, s_pixel = integers(arguments, 0, 8)
        grad, g_image, g_channel, g_filter, g_depth, g_row, g_pixel = integers(arguments, 8, 7)
        sums, parts, partial = integers(arguments, 15, 3)
        N, C, P, Q = integers(arguments, 18, 4)
        extent, in_step, low, size = axes_of(arguments + 22 * 8)
        strip, strip_bytes, block, line, M, taps, in_place, groups, strip_rows, pitch = integers(arguments, 34, 10)
        depths, _, lots, lot_count, planes = integers(arguments, 44, 5)
        vectors = (C + LANES - 1) // LANES
        used = min(C, LANES)
        lot_bytes = TAPS * LANES * 8
        most = (vectors + groups - 1) // groups
        partial += chunk * most * M * lot_count * lot_bytes
        strip += chunk * strip_bytes
        block += chunk * P * Q * PIXEL
        bands, blocks = (size[1] + P - 1) // P, (size[2] + Q - 1) // Q
        begin, end = share(parts * groups, chunk, chunks)
        for job in range(begin, end):
            v0, v1 = share(vectors, job % groups, groups)
            u0, u1 = share(N * size[0] * bands * blocks, job // groups, parts)
            for i in range((v1 - v0) * M * lot_count * TAPS * LANES):
                store(8, partial + i * 8, 0.0)
            for unit in range(u0, u1):
                q0, p0 = unit % blocks * Q, unit // blocks % bands * P
                o, n = unit // (blocks * bands) % size[0], unit // (blocks * bands * size[0])
                p1, q1 = min(p0 + P, size[1]), min(q0 + Q, size[2])
                corner = (o * in_step[0], p0 * in_step[1] + low[1], q0 * in_step[2] + low[2])
                for v in range(v0, v1):
                    c = first_lane(v, C, 0)
                    fill(
                        strip, PIXEL, source + n * s_image + c * s_channel,
                        (0, 0, s_channel, s_depth, s_row, s_pixel), extent, used, (depths, planes), corner,
                        strip_rows, pitch,
                    )  # fmt: skip
                    for m in range(M):
                        at = grad + n * g_image + c * g_channel + m * g_filter + o * g_depth + p0 * g_row + q0 * g_pixel
                        dy, row, pixel = at, g_row, g_pixel
                        if not in_place:
                            dy, row, pixel = block, Q * PIXEL, PIXEL
                            for p in range(p1 - p0):
                                copy_pixels(block + p * row, PIXEL, at + p * g_row, q1 - q0, used, g_channel, g_pixel)
                        for lot in range(lot_count):
                            table = lots + lot * (TAPS + 4) * 8
                            low_row, high_row, low_column, high_column = integers(table, TAPS, 4)
                            # Pixels that meet the image in any of the taps.
                            h0, h1 = p0, p1
                            while h0 < h1 and h0 * in_step[1] + high_row < 0:
                                h0 += 1
                            while h0 < h1 and (h1 - 1) * in_step[1] + low_row >= extent[1]:
                                h1 -= 1
                            w0, w1 = q0, q1
                            while w0 < w1 and w0 * in_step[2] + high_column < 0:
                                w0 += 1
                            while w0 < w1 and (w1 - 1) * in_step[2] + low_column >= extent[2]:
                                w1 -= 1
                            correlate_taps(
                                TAPS, LANES, SIZE,
                                strip + ((h0 - p0) * in_step[1] * pitch + (w0 - q0) * in_step[2]) * PIXEL,
                                in_step[1] * pitch * PIXEL, in_step[2] * PIXEL,
                                dy + (h0 - p0) * row + (w0 - q0) * pixel, row, pixel, h1 - h0, w1 - w0,
                                table, partial + (((v - v0) * M + m) * lot_count + lot) * lot_bytes,
                            )  # fmt: skip
            for v in range(v0, v1):
                for m in range(M):
                    found = partial + ((v - v0) * M + m) * lot_count * lot_bytes
                    for tap in range(taps):
                        place = sums + (((job // groups * M + m) * taps + tap) * line + first_lane(v, C, 0)) * 8
                        for lane in range(used):
                            store(8, place + lane * 8, load(8, found + (tap * LANES + lane) * 8))

    @task
    def arrange(arguments, chunk):
        """(C, M, taps) -> (M, taps, line)."""
        chunks, source, target, C, M, taps, line = integers(arguments, 0, 7)
        begin, end = share(C, chunk, chunks)
        for row in range(M * taps):
            for c in range(begin, end):
                store(SIZE, target + row * line + c * SIZE, load(SIZE, source + (c * M * taps + row) * SIZE))

    @task
    def add_parts(arguments, chunk):
        """Sums (parts, M, taps, line), added up in this order -> (C, M, taps)."""
        chunks, sums, parts, out, C, M, taps, line = integers(arguments, 0, 8)
        begin, end = share(M * taps, chunk, chunks)
        for row in range(begin, end):
            total = sums + row * line * 8
            for part in range(1, parts):
                other = total + part * M * taps * line * 8
                for c in range(C):
                    store(8, total + c * 8, load(8, total + c * 8) + load(8, other + c * 8))
            for c in range(C):
                place, value = out + (c * M * taps + row) * SIZE, load(8, total + c * 8)
                if SIZE == 4:
                    store(4, place, np.float32(value))
                else:
                    store(8, place, value)

    return Slides(slide_in_place, slide, correlate, arrange, add_parts)
