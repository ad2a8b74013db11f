"""Winograd's minimal filtering, F(m x m, 3 x 3): a tile of m*m outputs for (m+2)**2 products a channel.

    y = A^T [ sum over channels  (G w G^T) * (B^T x B) ] A           x: tile of t*t, t = m + 2     (matrices: `toom_cook`)

The sum over channels is, for each of the t*t positions of a tile, a matrix product of tiles and filters, done by the
register tile of `simd.py` (Lavin & Gray, "Fast algorithms for convolutional neural networks", 2016, section 4).

A larger kernel is cut into blocks of 3x3 taps. All blocks share the sum: they are more channels of it, read from the
input 3 positions further on. A dilated one works on every dilation-th pixel. The input gradient is the same with the
taps reversed; the weight gradient sums over tiles instead,

    dw = G^T [ sum over tiles  (A dy A^T) * (B^T x B) ] G

Memory: x and y in place where channels are last, through a strip or a block where they are first or at a border.
A thread holds V (t*t, tiles, channels) and M (t*t, tiles, filters) of a block of tiles in its cache, all share
U (t*t, panels, channels, WIDTH), the transformed weight.

An infinity or a NaN in the input reaches every output of the tiles that read it.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..registry import Buffer
from . import machine, threads
from .compile import Task, device, share, task
from .epilogue import CODES, activate
from .memory import address, extent_of, layout_of
from .simd import (
    INPUT,
    OUTPUT_GRAD,
    TAPS,
    TAPS_GRAD,
    Tile,
    copy_bytes,
    finish_tile,
    integer,
    integers,
    load,
    multiply_tile,
    store,
    tile_for,
    transform_tile,
    zero_bytes,
)

# Products per running sum. The transforms amplify its rounding error: at 64 F(4x4) stays below 1e-6.
CHAIN = 64
# Tiles per running sum of a weight gradient.
TILE_CHAIN = 128
# Channels times blocks of taps up to which F(4x4) was measured to keep 1e-6.
MOST_CHANNELS = 4096
# Bytes of V and M that a thread works on: the second-level cache.
BLOCK_BYTES = 768 * 1024
STRIP_BYTES = 128 * 1024
# Bytes of workspace that a weight gradient uses for the tiles it sums at once.
ROUND_BYTES = 24 << 20
MOST_BYTES = 64 << 20
# Bytes between two tiles beyond their channels: rows a power of two apart share their cache sets.
PAD_BYTES = 64


class Problem(NamedTuple):
    """A stride-1 convolution of a source with reversed or plain taps, and how it is cut into tiles."""

    batch: int
    groups: int
    # Channels of a group that are summed over, and that result.
    inner: int
    targets: int
    size: tuple[int, int, int]
    # Source position of tap 0 for target 0.
    low: tuple[int, int, int]
    kernel: tuple[int, int, int]
    dilation: tuple[int, int, int]
    # Tiles along H and W of one dilation phase.
    tiles: tuple[int, int]

    @property
    def blocks(self) -> tuple[int, int, int]:
        """Blocks of 3x3 taps the kernel is cut into."""
        T, R, S = self.kernel
        return T, -(-R // 3), -(-S // 3)

    @property
    def depth(self) -> int:
        """Products per position of a tile: channels times blocks of taps."""
        return math.prod(self.blocks) * self.inner

    @property
    def tile_count(self) -> int:
        """Tiles of all images and dilation phases."""
        return self.batch * self.size[0] * self.dilation[1] * self.dilation[2] * self.tiles[0] * self.tiles[1]


class Blocking(NamedTuple):
    """`tiles` are multiplied together with `panels` of filters at a time; `run` of them come from one strip."""

    tile: Tile
    tiles: int
    run: int
    panels: int


def winograd(m):
    """Return the algorithm F(m x m, 3 x 3) as its module's functions."""
    return Winograd(m)


class Winograd:
    """The algorithm functions of one output tile size; see `registry`."""

    def __init__(self, m):
        self.m = m

    def supports(self, g, direction):
        """Every stride 1 and every kernel that is more than a row or a column."""
        if g.dtype.kind != "f":
            return False, f"transforms are floating-point, not {g.dtype}"
        if set(g.stride) != {1}:
            return False, f"tiles need stride 1, not {g.stride}"
        if min(g.kernel_size[1:]) < 2:
            return False, f"a kernel of one row or column, {g.kernel_size[1:]}, saves nothing"
        problem = _problem(g, direction, self.m)
        if problem.depth > MOST_CHANNELS:
            return False, f"the sum over {problem.depth} channels and blocks of taps is too long for its precision"
        if direction == "weight_grad" and _gradient_bytes(problem, self.m, _tile(g)) > MOST_BYTES - ROUND_BYTES:
            return False, "the transformed weight gradient is larger than its workspace may be"
        return True, ""

    def seconds(self, g, direction, threads_):
        """Predicted time: the products, the transforms' traffic, and the weight's."""
        p, t2 = _problem(g, direction, self.m), (self.m + 2) ** 2
        tile, constants = _tile(g), machine.constants()
        scale = g.dtype.itemsize / 4
        columns = -(-p.targets // tile.width) * tile.width
        products = 2 * t2 * p.tile_count * p.groups * p.depth * columns * scale
        moved = 2 * t2 * p.tile_count * p.groups * (p.depth + p.targets) * 4 * scale
        weight = t2 * p.groups * p.depth * columns * 4 * scale
        return (
            4 * constants.launch
            + products / (0.9 * constants.flops * threads_)
            + moved / (20e9 * threads_)
            + (g.bytes + 3 * weight) / constants.bandwidth
        )

    def workspace(self, g, direction, limit):
        """The transformed weight, and V, M, a strip and a block per thread; or V and Y of a round of tiles."""
        problem, m, count = _problem(g, direction, self.m), self.m, _chunks(g)
        if direction == "weight_grad":
            return _gradient_workspace(g, problem, m, count, limit)
        p, b, t2 = problem, _blocking(problem, m, g.dtype.itemsize, count), (m + 2) ** 2
        panels, slack = _panels(p, b.tile), b.tile.lanes
        rows = -(-b.tiles // b.tile.rows) * b.tile.rows
        pad = PAD_BYTES // g.dtype.itemsize
        return {
            "U": Buffer((t2 * p.groups * panels * p.depth * b.tile.width + 64 * b.tile.width,), g.dtype),
            "taps": Buffer((count, 9 * b.tile.width), g.dtype),
            "bias": Buffer((p.groups * panels * b.tile.width + 1,), g.dtype),
            "V": Buffer((count, t2 * rows * (max(p.depth, slack) + pad) + slack), g.dtype),
            "M": Buffer((count, t2 * rows * (b.panels * b.tile.width + pad)), g.dtype),
            "strip": Buffer((count, _strip_elements(p, m, b.run) + slack), g.dtype),
            "block": Buffer((count, b.run * m * m * b.panels * b.tile.width), g.dtype),
        }

    def forward(self, g, x, weight, bias, activation, out, workspace):
        """Write the convolution of `x` with `weight`, plus bias, through the activation, to `out`."""
        self._convolve(g, "forward", x, weight, bias, activation, out, workspace)

    def input_grad(self, g, grad_output, weight, out, workspace):
        """Write the gradient with respect to the input to `out`."""
        self._convolve(g, "input_grad", grad_output, weight, None, None, out, workspace)

    def _convolve(self, g, direction, source, weight, bias, activation, out, workspace):
        p, count = _problem(g, direction, self.m), len(workspace["V"])
        b = _blocking(p, self.m, g.dtype.itemsize, count)
        run, w = tasks(self.m, b.tile, g.dtype.itemsize), workspace
        run.transform_weight(
            count, address(weight), *weight.strides, p.groups, p.inner, p.targets, direction == "input_grad",
            *p.kernel, address(w["U"]), address(w["taps"]), w["taps"].strides[0],
            0 if bias is None else address(bias), address(w["bias"]), activation == "relu",
        )  # fmt: skip
        run.convolve(
            count, *layout_of(source, g.data_format), *layout_of(out, g.data_format),
            *extent_of(source, g.data_format), *p.size, p.batch, p.groups, p.inner, p.targets, *p.low, *p.blocks,
            *p.dilation, *p.tiles, p.tile_count, b.tiles, b.run, b.panels, CODES[activation],
            address(w["U"]), address(w["bias"]),
            *(number for name in ("V", "M", "strip", "block") for number in (address(w[name]), w[name].strides[0])),
            0,
        )  # fmt: skip


def _tile(g):
    return tile_for(g.dtype.itemsize)


def _chunks(g):
    return threads.count()


@lru_cache(maxsize=1024)
def _problem(g, direction, m):
    C, K = g.in_channels // g.groups, g.out_channels // g.groups
    before = [b for b, _ in g.padding]
    size, low = g.output_size, tuple(-b for b in before)
    if direction == "input_grad":
        C, K, size = K, C, g.input_size
        low = tuple(b - d * (k - 1) for b, d, k in zip(before, g.dilation, g.kernel_size))
    tiles = tuple(-(-(-(-n // d)) // m) for n, d in zip(size[1:], g.dilation[1:]))
    return Problem(g.batch, g.groups, C, K, size, low, g.kernel_size, g.dilation, tiles)


def _panels(problem, tile):
    return -(-problem.targets // tile.width)


def _strip_elements(p, m, run):
    _, A, B = p.blocks
    return (m + 2 + 3 * (A - 1)) * (run * m + 2 + 3 * (B - 1)) * p.inner


@lru_cache(maxsize=1024)
def _blocking(p, m, itemsize, count):
    """Choose as many tiles as the cache holds with their channels and filters, an equal number of blocks per thread."""
    tile, t2 = tile_for(itemsize), (m + 2) ** 2
    panels = min(_panels(p, tile), max(4, BLOCK_BYTES // (2 * t2 * 2 * tile.rows * tile.width * itemsize)))
    bytes_per_tile = t2 * (p.depth + panels * tile.width) * itemsize
    most = max(BLOCK_BYTES // bytes_per_tile // tile.rows, 2) * tile.rows
    blocks = max(-(-p.tile_count // most), 1)
    if blocks * p.groups % count:
        blocks += count - blocks % count
    tiles = max(-(-p.tile_count // blocks), 1)
    run = max(STRIP_BYTES // (_strip_elements(p, m, 1) * itemsize), 1)
    return Blocking(tile, tiles, min(run, p.tiles[1], tiles), panels)


class Tasks(NamedTuple):
    """The loops of one tile size."""

    transform_weight: Task
    convolve: Task


@lru_cache(maxsize=16)
def tasks(m, tile, itemsize):
    """Return the tasks for F(m x m, 3 x 3) over one register tile; all are constants in them."""
    ROWS, COLUMNS, LANES = tile
    WIDTH, SIZE, VECTOR, PIXEL = tile.width, itemsize, LANES * itemsize, tile.width * itemsize
    M, T = m, m + 2
    # The argument that is 0: the one offset of a reduction without gaps.
    ZERO = 49

    @task
    def transform_weight(arguments, chunk):
        """(G*K, C, D, R, S) -> U (t*t, G, panels, blocks, C, WIDTH); bias -> (G, panels, WIDTH), the least output."""
        chunks, weight, filter_, channel, plane, row, column = integers(arguments, 0, 7)
        G, C, K, transposed, D, R, S = integers(arguments, 7, 7)
        U, taps, taps_bytes, bias, padded_bias, relu = integers(arguments, 14, 6)
        taps += chunk * taps_bytes
        panels, A, B = (K + WIDTH - 1) // WIDTH, (R + 2) // 3, (S + 2) // 3
        group = filter_ * (C if transposed else K)
        along, across = (filter_, channel) if transposed else (channel, filter_)
        position = G * panels * D * A * B * C * PIXEL
        begin, end = share(G * panels * D * A * B, chunk, chunks)
        for job in range(begin, end):
            b, a, d = job % B, job // B % A, job // (A * B) % D
            panel, g = job // (A * B * D) % panels, job // (A * B * D * panels)
            used = min(WIDTH, K - panel * WIDTH)
            source = weight + g * group + panel * WIDTH * across + (D - 1 - d if transposed else d) * plane
            zero_bytes(taps, 9 * PIXEL)
            for c in range(C):
                for i in range(3):
                    for j in range(3):
                        r, s = 3 * a + i, 3 * b + j
                        if r < R and s < S:
                            at = (R - 1 - r if transposed else r) * row + (S - 1 - s if transposed else s) * column
                            for k in range(used):
                                place = taps + (3 * i + j) * PIXEL + k * SIZE
                                store(SIZE, place, load(SIZE, source + at + k * across + c * along))
                for k in range(COLUMNS):
                    transform_tile(
                        M, TAPS, LANES, SIZE, taps + k * VECTOR, 3 * PIXEL, PIXEL,
                        U + (job * C + c) * PIXEL + k * VECTOR, T * position, position,
                    )  # fmt: skip
        if chunk == 0:
            _pad_bias(bias, padded_bias, G, K, panels, relu)

    @device
    def _pad_bias(bias, target, G, K, panels, relu):
        zero_bytes(target, G * panels * PIXEL)
        if bias:
            for g in range(G):
                copy_bytes(target + g * panels * PIXEL, bias + g * K * SIZE, K * SIZE)
        store(SIZE, target + G * panels * PIXEL, 0.0 if relu else -np.inf)

    @task
    def convolve(arguments, chunk):
        """Transform blocks of tiles, multiply them with the weight, transform the results."""
        chunks = integer(arguments, 0)
        source, target = integers(arguments, 1, 6), integers(arguments, 7, 6)
        extent, size, (N, G, C, K) = integers(arguments, 13, 3), integers(arguments, 16, 3), integers(arguments, 19, 4)
        low, blocks, dilation = integers(arguments, 23, 3), integers(arguments, 26, 3), integers(arguments, 29, 3)
        across, (tile_count, TB, run, KP, code) = integers(arguments, 32, 2), integers(arguments, 34, 5)
        U, bias = integers(arguments, 39, 2)
        V, V_bytes, m_, m_bytes, strip, strip_bytes, block, block_bytes = integers(arguments, 41, 8)
        V, m_ = V + chunk * V_bytes, m_ + chunk * m_bytes
        strip, block = strip + chunk * strip_bytes, block + chunk * block_bytes
        depth, panels = blocks[0] * blocks[1] * blocks[2] * C, (K + WIDTH - 1) // WIDTH
        rows = (TB + ROWS - 1) // ROWS * ROWS
        V_pitch, M_pitch = max(depth, LANES) * SIZE + PAD_BYTES, KP * PIXEL + PAD_BYTES
        count = (tile_count + TB - 1) // TB
        begin, end = share(count * G, chunk, chunks)
        for job in range(begin, end):
            g, first = job // count, job % count * TB
            last = min(first + TB, tile_count)
            _transform_input(
                source, source[0] + g * C * source[2], extent, C, low, blocks, dilation, across, size[0], first, last,
                run, strip, V, V_pitch, rows * V_pitch,
            )  # fmt: skip
            for panel in range(0, panels, KP):
                some = min(KP, panels - panel)
                _multiply(
                    V, V_pitch, rows, last - first, U, G * panels, g * panels + panel, some, depth, m_, M_pitch,
                    arguments + ZERO * 8,
                )  # fmt: skip
                k = panel * WIDTH
                _transform_output(
                    target, target[0] + (g * K + k) * target[2], size, min(some * WIDTH, K - k), dilation, across,
                    first, last, run, block, m_, M_pitch, rows * M_pitch, bias + (g * panels + panel) * PIXEL,
                    bias + G * panels * PIXEL, code,
                )  # fmt: skip

    @device
    def _place(tile, across, dilation, depths):
        """(n, d, phase along H, along W, tile along H, along W) of a tile."""
        row, tw = tile // across[1], tile % across[1]
        image, th = row // across[0], row % across[0]
        image, w = image // dilation[2], image % dilation[2]
        image, h = image // dilation[1], image % dilation[1]
        return image // depths, image % depths, h, w, th, tw

    @device
    def _transform_input(
        source, base, extent, C, low, blocks, dilation, across, depths, first, last, run, strip, V, V_pitch, V_position
    ):  # fmt: skip
        """Source -> V (t*t, tiles, blocks of taps, channels), a run of neighbouring tiles at a time."""
        D, A, B = blocks
        tall, wide = T + 3 * (A - 1), T + 3 * (B - 1)
        i = first
        while i < last:
            n, d0, h0, w0, th, tw = _place(i, across, dilation, depths)
            h, w = h0 + dilation[1] * th * M + low[1], w0 + dilation[2] * tw * M + low[2]
            count = min(run, across[1] - tw, last - i)
            # Tiles wholly inside are read in place: as many as there are, or the one at the border from a strip.
            inside = (extent[2] - 1 - w) // dilation[2] + 1 - wide
            inside = min(inside // M + 1, across[1] - tw, last - i) if inside >= 0 and w >= 0 else 0
            fits = source[2] == SIZE and C >= LANES and h >= 0 and h + (tall - 1) * dilation[1] < extent[1]
            in_place = fits and inside > 0
            count = inside if in_place else min(count, 1) if fits and tw == 0 else count
            for d in range(D):
                depth = d0 + d * dilation[0] + low[0]
                if in_place and 0 <= depth < extent[0]:
                    at = base + n * source[1] + depth * source[3] + h * source[4] + w * source[5]
                    row, pixel = dilation[1] * source[4], dilation[2] * source[5]
                    _transform_tiles(
                        at, row, pixel, count, C, A, B, V + (i - first) * V_pitch + d * A * B * C * SIZE, V_pitch,
                        V_position,
                    )  # fmt: skip
                else:
                    for start in range(0, count, run):
                        some = min(run, count - start)
                        pitch = (some - 1) * M + wide
                        _fill(
                            strip, base + n * source[1], source, extent, C, depth, h, w + start * M * dilation[2],
                            dilation, tall, pitch,
                        )  # fmt: skip
                        _transform_tiles(
                            strip, pitch * C * SIZE, C * SIZE, some, C, A, B,
                            V + (i - first + start) * V_pitch + d * A * B * C * SIZE, V_pitch, V_position,
                        )  # fmt: skip
            i += count

    @device
    def _transform_tiles(source, row, pixel, count, C, A, B, V, V_pitch, V_position):
        for tile in range(count):
            for a in range(A):
                for b in range(B):
                    at = source + 3 * a * row + (tile * M + 3 * b) * pixel
                    to = V + tile * V_pitch + (a * B + b) * C * SIZE
                    for start in range(0, C, LANES):
                        # The last vector overlaps the one before it.
                        c = max(min(start, C - LANES), 0) * SIZE
                        transform_tile(M, INPUT, LANES, SIZE, at + c, row, pixel, to + c, T * V_position, V_position)

    @device
    def _fill(strip, source, layout, extent, C, d, h0, w0, dilation, rows, pitch):
        """Copy every dilation-th pixel of some rows, channels last, zeros where there is nothing."""
        for i in range(rows):
            h = h0 + i * dilation[1]
            inside = 0 <= d < extent[0] and 0 <= h < extent[1]
            for j in range(pitch):
                w = w0 + j * dilation[2]
                if inside and 0 <= w < extent[2]:
                    at = source + d * layout[3] + h * layout[4] + w * layout[5]
                    if layout[2] == SIZE:
                        copy_bytes(strip, at, C * SIZE)
                    else:
                        for c in range(C):
                            store(SIZE, strip + c * SIZE, load(SIZE, at + c * layout[2]))
                else:
                    zero_bytes(strip, C * SIZE)
                strip += C * SIZE

    @device
    def _multiply(V, V_pitch, rows, used, U, all_panels, panel, some, depth, m_, M_pitch, zero):
        """M = V @ U for each position of the tiles."""
        for position in range(T * T):
            for k in range(some):
                weights = U + ((position * all_panels) + panel + k) * depth * PIXEL
                for start in range(0, used, ROWS):
                    at = V + (position * rows + start) * V_pitch
                    to = m_ + (position * rows + start) * M_pitch + k * PIXEL
                    for c in range(0, depth, CHAIN):
                        multiply_tile(
                            ROWS, COLUMNS, LANES, SIZE, at + c * SIZE, V_pitch, SIZE, zero, 1,
                            min(CHAIN, depth - c), weights + c * PIXEL, PIXEL, to, M_pitch, c,
                        )  # fmt: skip

    @device
    def _transform_output(
        target, base, size, K, dilation, across, first, last, run, block, m_, M_pitch, M_position, bias, floor, code
    ):  # fmt: skip
        """M (t*t, tiles, filters) -> output, a run of neighbouring tiles at a time."""
        least = load(SIZE, floor)
        i = first
        while i < last:
            n, d, h0, w0, th, tw = _place(i, across, dilation, size[0])
            count = min(across[1] - tw, last - i)
            h, w = h0 + dilation[1] * th * M, w0 + dilation[2] * tw * M
            tall = min((size[1] - 1 - h) // dilation[1] + 1, M) if h < size[1] else 0
            wide = min((size[2] - 1 - w) // dilation[2] + 1, count * M) if w < size[2] else 0
            at = base + n * target[1] + d * target[3] + h * target[4] + w * target[5]
            row, pixel = dilation[1] * target[4], dilation[2] * target[5]
            whole = wide // M if target[2] == SIZE and K >= LANES and tall == M and code <= 1 else 0
            if whole:
                count = whole
                _finish_tiles(m_ + (i - first) * M_pitch, M_pitch, M_position, count, K, at, row, pixel, bias, least)
            elif tall > 0 and wide > 0:
                count = min(count, run)
                wide = min(wide, count * M)
                width = (K + LANES - 1) // LANES * VECTOR
                pitch = count * M * width
                for tile in range(count):
                    _finish_tiles(
                        m_ + (i - first + tile) * M_pitch, M_pitch, M_position, 1, width // SIZE,
                        block + tile * M * width, pitch, width, bias, least,
                    )  # fmt: skip
                for p in range(tall):
                    _emit(block + p * pitch, width, at + p * row, target[2], pixel, K, wide, code)
            i += count

    @device
    def _finish_tiles(source, M_pitch, M_position, count, K, target, row, pixel, bias, least):
        for tile in range(count):
            for start in range(0, K, LANES):
                k = min(start, K - LANES) * SIZE
                finish_tile(
                    M, LANES, SIZE, source + tile * M_pitch + k, T * M_position, M_position,
                    target + tile * M * pixel + k, row, pixel, bias + k, least,
                )  # fmt: skip

    @device
    def _emit(block, width, target, channel, pixel, K, count, code):
        """Write a row of pixels to the output, in any layout."""
        for k in range(K):
            for q in range(count):
                value = load(SIZE, block + q * width + k * SIZE)
                store(SIZE, target + k * channel + q * pixel, activate(value, code))

    return Tasks(transform_weight, convolve)


F2 = winograd(2)
F4 = winograd(4)
