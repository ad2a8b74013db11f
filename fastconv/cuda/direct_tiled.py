"""Direct convolution in tiles: what many outputs share is read once, into shared memory.

Forward and input gradient are dense phases (`blocking.py`). A block computes a tile of pixels for some filters: for a
few channels at a time it stages what the pixels' windows cover, and the filters' taps, and each thread has in registers
the sums of `filters` filters for `rows` rows of four neighbours. For a row of the kernel it reads the stretch that its
four neighbours share as 128-bit vectors, and for each tap the filters', which all threads of a warp, or eight, read
together.

Staged are [channel][row][residue][place] of the source, where column = place * step + residue for outputs `step` apart,
so that neighbouring threads read neighbouring vectors whatever the stride; and [channel][row][tap][filter] of the
weight. Rows are as far apart as eight threads need to meet all banks once. Numbers are staged as float32.

Outside the image there are zeros, which an infinite weight must not meet: a result that is not a number is summed again
by `direct_taps.py`. It has run in the emulator, on no GPU.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

from ..geometry import ConvGeometry
from . import direct_taps, ptx, toolchain
from .architecture import MOST_BLOCKS
from .blocking import Axis, Phase, channels_of_group, phases, source_of
from .direct_taps import sum_of_taps
from .elements import Element
from .epilogue import activate
from .indices import divided, index_type, step
from .lanes import loader, storer, widest
from .steps import Step
from .sums import PRODUCTS

cuda = toolchain.import_cuda()

from numba.cuda.types import float32, int32  # noqa: E402

# Neighbours of a row that a thread has: what one vector of shared memory holds.
NEIGHBOURS = 4
# The most taps of a row, whose stretch is in registers, and the most bytes of shared memory: four blocks fit.
MOST_TAPS, MOST_BYTES = 11, 24 << 10
# The least share of a tile that is results: one output per thread loses more by far.
LEAST_USE = 0.2


class Tile(NamedTuple):
    """How threads lie over a block's results, and how many channels are staged at a time.

    A warp has `lanes_filters` x `lanes_rows` x `lanes_columns` = 32 threads, the block `warps_filters` x `warps_rows`
    warps. Eight threads that follow each other have the same filters.
    """

    lanes_filters: int
    lanes_rows: int
    lanes_columns: int
    warps_filters: int
    warps_rows: int
    filters: int = 8
    rows: int = 2
    channels: int = 8

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps_filters * self.warps_rows

    @property
    def results(self) -> int:
        """Results of a thread."""
        return self.filters * self.rows * NEIGHBOURS

    @property
    def block(self) -> tuple[int, int, int]:
        """Filters, rows and columns of a block's results."""
        return (
            self.filters * self.lanes_filters * self.warps_filters,
            self.rows * self.lanes_rows * self.warps_rows,
            NEIGHBOURS * self.lanes_columns,
        )


# Shapes of a warp: 8x32, 16x16 and 8x8 pixels with four times the filters; 128 and 64 of one row or few.
TILES = (
    Tile(1, 4, 8, 4, 1), Tile(1, 8, 4, 4, 1), Tile(4, 4, 2, 4, 1), Tile(1, 1, 32, 4, 1, rows=1),
    Tile(1, 1, 32, 4, 1), Tile(2, 1, 16, 4, 1, rows=1),
)  # fmt: skip


class Window(NamedTuple):
    """Taps of a phase along rows and columns: how many, from one output and from one tap to the next.

    `shift` is where the first tap of a multiple of 8 outputs lies, modulo 8: whether vectors there are aligned.
    """

    taps: tuple[int, int]
    in_step: tuple[int, int]
    tap_step: tuple[int, int]
    shift: int

    @property
    def vectors(self) -> int:
        """Vectors of the stretch of four neighbours, for each residue."""
        return ((self.taps[1] - 1) * self.tap_step[1] // self.in_step[1] + NEIGHBOURS - 1) // NEIGHBOURS + 1


class Staging(NamedTuple):
    """Sizes in shared memory: rows, columns and places of a residue, words from row to row and from tap to tap."""

    rows: int
    columns: int
    places: int
    pitch: int
    tap_pitch: int

    @classmethod
    def of(cls, tile: Tile, window: Window) -> Staging:
        """Return the sizes for a tile, with rows as far apart as `tile.lanes_columns` leave banks for."""
        filters, rows, _ = tile.block
        places = NEIGHBOURS * (tile.lanes_columns + window.vectors - 1)
        (taps, _), (tap_step, _), (down, across) = window.taps, window.tap_step, window.in_step
        columns = places * across
        apart = range(columns, columns + 32, NEIGHBOURS)
        pitch = next((p for p in apart if _without_conflicts(tile, down * p)), columns)
        return cls((rows - 1) * down + (taps - 1) * tap_step + 1, columns, places, pitch, filters + 4)

    def words(self, tile: Tile, window: Window) -> tuple[int, int]:
        """Return the words of the source and of the weight."""
        return self.rows * self.pitch * tile.channels, math.prod(window.taps) * self.tap_pitch * tile.channels


def _without_conflicts(tile: Tile, pitch: int) -> bool:
    """Return whether eight threads meet all banks once with their vectors."""
    starts = {(t // tile.lanes_columns * pitch + t % tile.lanes_columns * NEIGHBOURS) % 32 for t in range(8)}
    return len(starts) == 8


# --- the kernel ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def stage_source(element: Element, tile: Tile, window: Window, channels_last: bool, lanes: int, wide: bool) -> Any:
    """Return the function that stages `left` channels, as vectors of `lanes` along columns or channels."""
    index, split, load = index_type(wide), divided(False), loader(element, lanes)
    staging, step, threads = Staging.of(tile, window), window.in_step[1], tile.threads
    rows, places, pitch, columns = staging.rows, staging.places, staging.pitch, staging.columns
    # Columns of an aligned vector that lie before the first.
    shift = 0 if channels_last else window.shift % lanes
    inner = tile.channels // lanes if channels_last else -(-(shift + columns) // lanes)
    total = rows * columns * inner if channels_last else tile.channels * rows * inner

    def put(tiles, c, row, column, value):
        place, residue = split(column, step)
        tiles[(c * rows + row) * pitch + residue * places + place] = value

    def stage(tiles, source, thread, first, left, h0, w0, H, W, pixel, channel):
        values = cuda.local.array(lanes, float32)
        for at in range(thread, total, threads):
            rest, part = split(int32(at), inner)
            if channels_last:
                row, column = split(rest, columns)
                c = int32(part * int32(lanes))
            else:
                c, row = split(rest, rows)
                column = int32(part * int32(lanes) - int32(shift))
            h, w = index(h0 + row), index(w0 + column)
            if c < left and h >= 0 and h < H and w >= 0 and w < W:
                load(source, index(first + c * channel + (h * W + w) * pixel), values, 0)
            else:
                for i in range(lanes):
                    values[i] = float32(0)
            for i in range(lanes):
                if channels_last:
                    put(tiles, int32(c + i), row, column, values[i])
                elif column + i >= 0 and column + i < columns:
                    put(tiles, c, row, int32(column + i), values[i])

    return stage


@lru_cache(maxsize=256)
def stage_weight(element: Element, tile: Tile, window: Window, lanes: int, wide: bool) -> Any:
    """Return the function that stages the taps of `left` channels for the block's filters, from the words `to` on.

    With `lanes` all taps of a filter's channels follow each other in memory, and are read as vectors of so many: by
    threads of neighbouring filters, which write to neighbouring banks.
    """
    index, split, widen = index_type(wide), divided(False), element.widen
    tap_pitch, S, taps = Staging.of(tile, window).tap_pitch, window.taps[1], math.prod(window.taps)
    channels, filters, threads = tile.channels, tile.block[0], tile.threads
    total, load = filters * channels * taps, loader(element, max(lanes, 1))

    def stage_vectors(tiles, to, weight, thread, first, left, lines, line_step, channel_step, r_step, s_step):
        values = cuda.local.array(lanes, float32)
        for at in range(thread, total // lanes, threads):
            part, line = split(int32(at), filters)
            tap = int32(part * int32(lanes))
            if tap < left * taps and line < lines:
                load(weight, index(first + line * line_step + tap), values, 0)
            else:
                for i in range(lanes):
                    values[i] = float32(0)
            for i in range(lanes):
                tiles[to + (tap + i) * tap_pitch + line] = values[i]

    def stage_taps(tiles, to, weight, thread, first, left, lines, line_step, channel_step, r_step, s_step):
        for at in range(thread, total, threads):
            rest, tap = split(int32(at), taps)
            line, c = split(rest, channels)
            r, s = split(tap, S)
            value = float32(0)
            if c < left and line < lines:
                value = widen(weight[index(first + line * line_step + c * channel_step + r * r_step + s * s_step)])
            tiles[to + (c * taps + tap) * tap_pitch + line] = value

    return stage_vectors if lanes else stage_taps


@lru_cache(maxsize=256)
def multiply(tile: Tile, window: Window) -> Any:
    """Return the function that adds the products of `count` staged channels to sums in registers."""
    staging, (R, S), (down, across) = Staging.of(tile, window), window.taps, window.in_step
    tap_down, tap_across = window.tap_step
    filters, rows, vectors, places, pitch = tile.filters, tile.rows, window.vectors, staging.places, staging.pitch
    tap_pitch, of_residue, row_words = staging.tap_pitch, NEIGHBOURS * window.vectors, tile.lanes_rows * down * pitch
    of_row, channel, channel_taps = across * of_residue, staging.rows * pitch, R * S * staging.tap_pitch
    # What is one product for each result is written down for all channels: those beyond the last are zero.
    of_thread, channels, at_once = rows * of_row, tile.channels, R * S == 1

    def product(sums, tiles, source_at, weight_at, count):
        x, w = cuda.local.array(of_thread, float32), cuda.local.array(filters, float32)
        for _ in range(channels if at_once else count):
            for r in range(R):
                for y in range(rows):
                    for residue in range(across):
                        for v in range(vectors):
                            at = r * tap_down * pitch + y * row_words + residue * places + v * NEIGHBOURS
                            four = ptx.load4(tiles, source_at + at)
                            for e in range(NEIGHBOURS):
                                x[y * of_row + residue * of_residue + v * NEIGHBOURS + e] = four[e]
                for s in range(S):
                    for v in range(filters // 4):
                        four = ptx.load4(tiles, weight_at + (r * S + s) * tap_pitch + 4 * v)
                        for e in range(4):
                            w[4 * v + e] = four[e]
                    first = s * tap_across % across * of_residue + s * tap_across // across
                    for k in range(filters):
                        for y in range(rows):
                            for e in range(NEIGHBOURS):
                                sums[(k * rows + y) * NEIGHBOURS + e] += w[k] * x[y * of_row + first + e]
            source_at, weight_at = int32(source_at + channel), int32(weight_at + channel_taps)

    return product


@lru_cache(maxsize=256)
def tiled(
    element: Element, direction: str, tile: Tile, window: Window, channels_last: bool, lanes: int, weight_lanes: int,
    together: int, wide: bool, adds: bool, ends: bool, code: int, has_bias: bool,
) -> Any:  # fmt: skip
    """Return the kernel of one phase, or of some of its channels.

    Parameters
    ----------
    lanes, weight_lanes, together : int
        How many neighbours are read of the source and of the weight, see `stage_weight`, and written at once.
    adds, ends : bool
        Whether to add to what an earlier launch has written, and whether it is the last.
    """
    index, split, flat = index_type(wide), divided(wide), divided(False)
    widen, narrow, store = element.widen, element.narrow, storer(element, together)
    of_source = stage_source(element, tile, window, channels_last, lanes, wide)
    of_weight = stage_weight(element, tile, window, weight_lanes, wide)
    product, sum_up = multiply(tile, window), sum_of_taps(element, direction, channels_last, wide)
    (block_filters, block_rows, block_columns), channels, staging = tile.block, tile.channels, Staging.of(tile, window)
    filters, rows, lanes_rows, lanes_columns = tile.filters, tile.rows, tile.lanes_rows, tile.lanes_columns
    lanes_filters, warps_filters, (down, across) = tile.lanes_filters, tile.warps_filters, window.in_step
    weight_from, row_words = staging.words(tile, window)[0], down * staging.pitch
    of_thread = tile.results
    apart, along = (NEIGHBOURS, filters) if channels_last else (filters, NEIGHBOURS)

    def write(sums, bias, target, at, k, lines_left, rows_left, columns_left, line_step, row_step, column_step):
        """Write a thread's results, neighbours in memory together; return whether one is not a number."""
        values, bad = cuda.local.array(together, float32), False
        for y in range(rows):
            for far in range(apart):
                for v in range(along // together):
                    line, column = (v * together, far) if channels_last else (far, v * together)
                    if y * lanes_rows < rows_left and line < lines_left and column < columns_left:
                        to = index(at + line * line_step + y * row_step + column * column_step)
                        for i in range(together):
                            own, e = (line + i, column) if channels_last else (line, column + i)
                            value = sums[(own * rows + y) * NEIGHBOURS + e]
                            if adds:
                                value += widen(target[to + i])
                            bad = bad or value != value
                            if has_bias:
                                value += widen(bias[k + own])
                            values[i] = activate(value, code)
                        store(target, to, values, 0)
        return bad

    def direct_tiled(
        source, weight, bias, target, results, tiles_down, tiles_across, O, P, Q, I, J, L, targets, channel,
        channels_end, T, d_first, d_step, d_tap, h_first, w_first, i_first, j_first, l_first, i_step, j_step, l_step,
        t_first, r_first, s_first, t_step, r_step, s_step, B, D, H, W, sources, chain, all_T, all_R, all_S,
        weight_group, weight_target, weight_source, stride_d, stride_h, stride_w, pad_d, pad_h, pad_w,
        dilation_d, dilation_h, dilation_w, tap_d, tap_h, tap_w, step_d, step_h, step_w,
    ):  # fmt: skip
        tiles = ptx.pointer_to(cuda.shared.array(0, float32, alignment=128))
        thread = int32(cuda.threadIdx.x)
        # Of the block: image, plane of results, first filter, row and column.
        rest, tile_across = split(index(cuda.blockIdx.x), tiles_across)
        rest, tile_down = split(rest, tiles_down)
        n, o = split(rest, O)
        group, line = index(cuda.blockIdx.z), index(index(cuda.blockIdx.y) * index(block_filters))
        p, q = index(tile_down * index(block_rows)), index(tile_across * index(block_columns))
        h, w = index(p * down + h_first), index(q * across + w_first)
        pixel, plane = (B, index(1)) if channels_last else (index(1), index(D * H * W))
        source_at = index(n * B * D * H * W + group * sources * plane)
        weight_at = index(group * weight_group + line * weight_target + r_first * all_S + s_first)
        # Of the thread.
        rest, lane_column = flat(thread & int32(31), lanes_columns)
        lane_filter, lane_row = flat(rest, lanes_rows)
        warp_row, warp_filter = flat(thread >> int32(5), warps_filters)
        own_line = int32((warp_filter * int32(lanes_filters) + lane_filter) * int32(filters))
        own_row = int32(warp_row * int32(rows * lanes_rows) + lane_row)
        own_column = int32(lane_column * int32(NEIGHBOURS))
        x_at, w_at = int32(own_row * int32(row_words) + own_column), int32(int32(weight_from) + own_line)
        sums = cuda.local.array(of_thread, float32)
        for i in range(of_thread):
            sums[i] = float32(0)
        for t in range(T):
            d = index(d_first + o * d_step + t * d_tap)
            if d >= 0 and d < D:
                for c in range(channel, channels_end, channels):
                    left = int32(min(index(channels), index(channels_end - c)))
                    cuda.syncthreads()
                    x_from = index(source_at + c * plane + d * H * W * pixel)
                    w_from = index(weight_at + c * weight_source + (t_first + t * t_step) * all_R * all_S)
                    of_source(tiles, source, thread, x_from, left, h, w, H, W, pixel, plane)
                    of_weight(tiles, int32(weight_from), weight, thread, w_from, left, index(targets - line),
                              weight_target, weight_source, index(r_step * all_S), s_step)  # fmt: skip
                    cuda.syncthreads()
                    product(sums, tiles, x_at, w_at, left)
        line, p, q = index(line + own_line), index(p + own_row), index(q + own_column)
        i, j, l = index(i_first + o * i_step), index(j_first + p * j_step), index(l_first + q * l_step)
        k = index(group * targets + line)
        if channels_last:
            all_targets = index(targets * index(cuda.gridDim.z))
            at = index((((n * I + i) * J + j) * L + l) * all_targets + k)
            line_step, column_step = index(1), index(l_step * all_targets)
        else:
            at = index((((n * targets * index(cuda.gridDim.z) + k) * I + i) * J + j) * L + l)
            line_step, column_step = index(I * J * L), l_step
        row_step = index(lanes_rows * j_step * L * (column_step if channels_last else index(1)))
        lines_left, rows_left, columns_left = index(targets - line), index(P - p), index(Q - q)
        bad = write(sums, bias, target, at, k, lines_left, rows_left, columns_left, line_step, row_step, column_step)
        if ends and bad:
            # So many that the compiler does not know of: it would write down each.
            for number in range(int32(0), int32(results)):
                rest, e = flat(number, NEIGHBOURS)
                own, y = flat(rest, rows)
                if y * lanes_rows < rows_left and own < lines_left and e < columns_left:
                    to = index(at + own * line_step + y * row_step + e * column_step)
                    value = widen(target[to])
                    if value != value:
                        value = sum_up(
                            source, weight, n, i, index(j + y * lanes_rows * j_step), index(l + e * l_step), group,
                            index(line + own), B, D, H, W, sources, chain, all_T, all_R, all_S,
                            weight_group, weight_target, weight_source, stride_d, stride_h, stride_w, pad_d, pad_h,
                            pad_w, dilation_d, dilation_h, dilation_w, tap_d, tap_h, tap_w, step_d, step_h, step_w,
                        )  # fmt: skip
                        if has_bias:
                            value += widen(bias[k + own])
                        target[to] = narrow(activate(value, code))

    direct_tiled.__name__ = f"direct_tiled_{direction}_{element.name}_{'last' if channels_last else 'first'}"
    return direct_tiled


# --- host ------------------------------------------------------------------------------------------------------


def steps(
    g: ConvGeometry, direction: str, code: int, bias: bool, wide: bool, tile: Tile | None = None
) -> list[Step] | None:
    """Return the launches of "forward" or "input_grad"; None where one output per thread serves better."""
    plans = [Plan.of(g, direction, phase, tile) for phase in phases(g, direction) if phase.positions]
    if any(plan is None for plan in plans):
        return None
    return [made for plan in plans if plan for made in plan.steps(g, direction, code, bias, wide)]


def use(g: ConvGeometry, direction: str) -> float:
    """Return the share of tiles that is results, the least of all phases; 0 where tiles serve worse."""
    plans = [Plan.of(g, direction, phase, None) for phase in phases(g, direction) if phase.positions]
    return min((plan.use(g) if plan else 0.0 for plan in plans), default=0.0)


class Plan(NamedTuple):
    """How one phase is computed: its taps in ascending order of place, and the tile."""

    phase: Phase
    inner: int
    lines: int
    window: Window
    tile: Tile

    @classmethod
    @lru_cache(maxsize=1024)
    def of(cls, g: ConvGeometry, direction: str, phase: Phase, tile: Tile | None) -> Plan | None:
        """Return the plan of a phase, None if it gains nothing from tiles or they do not fit."""
        inner, lines = channels_of_group(g, direction)
        depth, down, across = map(_ascending, phase.axes)
        window = Window(
            (max(down.taps, 1), max(across.taps, 1)), (down.in_step, across.in_step), (down.tap_step, across.tap_step),
            across.in_first % 8,
        )  # fmt: skip
        plan = cls(phase._replace(axes=(depth, down, across)), inner, lines, window, tile or TILES[0])
        if tile:
            return plan
        if Element.of(g.dtype).sums != float32 or lines < 4 or window.taps[1] > MOST_TAPS or g.groups > MOST_BLOCKS:
            return None
        fitting = [cls(*plan[:4], t) for t in map(plan._fitted, TILES) if t]
        best = max(fitting, key=lambda p: p.use(g), default=None)
        if best is None or best.use(g) < LEAST_USE or best.grid(g)[0] >= 2**31 or best.grid(g)[1] > MOST_BLOCKS:
            return None
        return best

    def _fitted(self, shape: Tile) -> Tile | None:
        """Return a tile of this shape for what filters and rows there are, and as many channels as fit."""
        filters = 8 if self.lines > 4 else 4
        wanted = -(-self.lines // (filters * shape.lanes_filters))
        warps_filters = 4 if wanted > 2 else wanted
        warps_rows = min(4 // warps_filters, -(-self.phase.axes[1].extent // (shape.rows * shape.lanes_rows)))
        for channels in (8, 4, 2, 1):
            tile = shape._replace(
                filters=filters, warps_filters=warps_filters, warps_rows=warps_rows, channels=channels
            )
            words = sum(Staging.of(tile, self.window).words(tile, self.window))
            if 4 * words <= MOST_BYTES and (channels < 2 * self.inner or channels == 1):
                return tile
        return None

    def grid(self, g: ConvGeometry) -> tuple[int, int, int]:
        """Return the blocks: tiles of pixels, of filters, and groups."""
        filters, rows, columns = self.tile.block
        planes, P, Q = self.phase.column("extent")
        return g.batch * planes * -(-P // rows) * -(-Q // columns), -(-self.lines // filters), g.groups

    def use(self, g: ConvGeometry) -> float:
        """Return the share of the tiles that is results."""
        blocks = math.prod(self.grid(g)) * math.prod(self.tile.block)
        return g.batch * self.phase.positions * self.lines * g.groups / max(blocks, 1)

    def steps(self, g: ConvGeometry, direction: str, code: int, bias: bool, wide: bool) -> list[Step]:
        """Return the launches: one for each chain of channels, which add to each other; the last ends."""
        element, (_, rows, columns) = Element.of(g.dtype), self.tile.block
        planes, P, Q = self.phase.column("extent")
        last, taps = g.data_format == "channels_last", self.phase.taps
        lanes = widest(g.dtype, *((self.inner, self.tile.channels) if last else self.phase.source[2:]))
        follow = direction == "forward" and g.kernel_size[0] == 1
        weight_lanes = widest(g.dtype, self.inner * taps, self.tile.channels * taps) if follow else 0
        together = widest(g.dtype, self.lines, self.tile.filters) if last else 1
        if not last and self.phase.is_whole:
            together = widest(g.dtype, Q, NEIGHBOURS)
        depth, down, across = self.phase.axes
        names = (source_of(direction), "weight", "bias", "out")
        made = []
        for chain in self._chains(g):
            ends = chain.stop >= self.inner
            kernel = tiled(
                element, direction, self.tile, self.window, last, lanes, weight_lanes, together, wide, chain.start > 0,
                ends, code if ends else 0, bias and ends,
            )  # fmt: skip
            numbers = (
                self.tile.results, -(-P // rows), -(-Q // columns), planes, P, Q, *self.phase.target, self.lines,
                chain.start, chain.stop, depth.taps if taps else 0, depth.in_first, depth.in_step, depth.tap_step,
                down.in_first, across.in_first, *self.phase.column("out_first"), *self.phase.column("out_step"),
                *self.phase.column("weight_first"), *self.phase.column("weight_step"),
                *direct_taps.numbers(g, direction),
            )  # fmt: skip
            arrays = [(name, element.pointer) for name in names]
            launch = step(kernel, arrays, numbers, wide, self.grid(g), (self.tile.threads,))
            words = sum(Staging.of(self.tile, self.window).words(self.tile, self.window))
            # 128 registers for each thread.
            bounds = (self.tile.threads, 512 // self.tile.threads)
            made.append(launch._replace(shared_bytes=4 * words, launch_bounds=bounds))
        return made

    def _chains(self, g: ConvGeometry) -> list[range]:
        """Return the channels of each launch: all at once of half types, whose results are rounded by far more.

        They begin at multiples of what is staged at a time, where vectors are aligned.
        """
        channels, most = self.tile.channels, PRODUCTS // max(self.phase.taps, 1)
        most = max(most // channels, 1) * channels if g.dtype.itemsize == 4 else self.inner
        length = -(-self.inner // (-(-self.inner // most) * channels)) * channels
        return [range(first, min(first + length, self.inner)) for first in range(0, self.inner, length)]


def _ascending(axis: Axis) -> Axis:
    """Return an axis whose taps are in ascending order of their places: the same from the other end."""
    if axis.tap_step > 0:
        return axis
    more = axis.taps - 1
    return axis._replace(
        in_first=axis.in_first + more * axis.tap_step, tap_step=-axis.tap_step,
        weight_first=axis.weight_first + more * axis.weight_step, weight_step=-axis.weight_step,
    )  # fmt: skip
