"""Winograd's minimal filtering, F(m x m, 3 x 3): a tile of m*m outputs for (m+2)**2 products a channel.

    y = A^T [ sum over channels  (G w G^T) * (B^T x B) ] A        x: tile of t*t, t = m + 2

The matrices, and how images are cut into tiles, are those of `minimal_filtering`. The sum over channels is, for each of
the t*t positions of a tile, a matrix product of tiles and filters, done by the register tile of `simd.py` (Lavin &
Gray, "Fast algorithms for convolutional neural networks", 2016, section 4).

A larger kernel is cut into blocks of 3x3 taps. All blocks share the sum: they are more channels of it, read from the
input 3 positions further on. A dilated one works on every dilation-th pixel. The input gradient is the same with the
taps reversed; the weight gradient sums over tiles instead,

    dw = G^T [ sum over tiles  (A dy A^T) * (B^T x B) ] G

Memory: U (t*t, panels, channels, WIDTH) is the transformed weight, V (t*t, tiles, channels) the input, M (t*t, tiles,
filters) their products, Y (t*t, tiles, filters) the output gradient. Where there are more tiles than filters, all
threads share U and each holds V and M of a block of tiles in its cache. Where there are more filters, they share V,
and U of a panel lives as long as it is multiplied. Images are read and written in place where channels are last,
through a strip or a block where they are first and at borders.

An infinity or a NaN in the input reaches every output of the tiles that read it.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..activations import CODES
from ..minimal_filtering import problem
from ..registry import Buffer
from . import machine, threads
from .compile import Task, device, share, task
from .epilogue import pad_bias
from .memory import address, extent_of, layout_of
from .simd import Tile, copy_bytes, integer, integers, load, multiply_tile, store, tile_for, zero_bytes
from .simd_winograd import INPUT, OUTPUT_GRAD, TAPS, TAPS_GRAD, finish_tile, transform_tile
from .strips import pack_table, strips

# Products per running sum, over channels and over tiles: the transforms amplify its rounding error. Measured, F(4x4)
# stays below 1e-6 with these.
CHAINS = {2: 256, 4: 64, 6: 256}
TILE_CHAINS = {2: 128, 4: 32, 6: 128}
# Chains of tiles that are added up before their sum is added to the weight gradient's: in float64, where more than
# this many sums are added there.
LINKS = 8
# Channels times blocks of taps up to which their sum was measured to keep its promise.
MOST_DEPTH = {2: 4096, 4: 1152, 6: 4096}
# Bytes of V and M that a thread works on: the second-level cache.
BLOCK_BYTES = 768 * 1024
# Bytes of U that a thread makes at a time, where it is made by panels.
PART_BYTES = 512 * 1024
# Seconds of a call beside its loops.
CALL_SECONDS = 70e-6
# Bytes of a strip.
STRIP_BYTES = 128 * 1024
# Bytes of V that all threads share, and the most of V and Y that a weight gradient sums at once.
SHARED_BYTES = 24 << 20
# Bytes of V and Y that a weight gradient sums at once, unless the sums, read and written each time, are half as many:
# what is written is then read from the caches. Measured, a call takes up to a quarter less than with `SHARED_BYTES`.
SUMMED_BYTES = 8 << 20
# Bytes of V and Y up to which they are read again for every panel, rather than their sums written and read.
ONCE_BYTES = 10 << 20
# Bytes of workspace in all.
MOST_BYTES = 64 << 20
# Bytes between two tiles beyond their channels: room for a whole panel, and rows off a power of two.
PAD_BYTES = 128
# Channels whose taps are put in order at a time.
STAGE = 16
# Register tiles of channels whose weight gradient is summed at once: they share what is read of Y.
SOME_TILES = 4


class Blocking(NamedTuple):
    """`tiles` are multiplied together with `panels` of filters at a time; `run` of them come from one strip."""

    tile: Tile
    tiles: int
    run: int
    panels: int
    # Channels of U at a time if it is made by panels of filters; 0 if it is made once.
    part: int = 0

    def filled(self, tiles: int) -> int:
        """Return how many tiles fill up register tiles."""
        return -(-tiles // self.tile.rows) * self.tile.rows


class Winograd:
    """The functions of an algorithm, see `registry`, for one size of output tile."""

    IN_TASKS = True

    def __init__(self, m):
        self.m = m

    def supports(self, g, direction):
        """Every stride 1 and every kernel that is more than a row or a column."""
        if g.dtype.kind != "f":
            return False, f"transforms are floating-point, not {g.dtype}"
        if set(g.stride) != {1}:
            return False, f"tiles need stride 1, not {max(g.stride)}"
        if min(g.kernel_size[1:]) < 2:
            return False, f"a kernel of one row or column, {g.kernel_size[1:]}, saves nothing"
        p = problem(g, direction, self.m)
        if p.depth > MOST_DEPTH[self.m] and direction != "weight_grad":
            return False, f"a sum over {p.depth} channels and blocks of taps is too long for its precision"
        if direction == "weight_grad" and _sums(p, self.m, g).nbytes > MOST_BYTES - SHARED_BYTES:
            return False, "the transformed weight gradient is larger than its workspace may be"
        return True, ""

    def seconds(self, g, direction, threads_):
        """Predicted time: the products, the transforms' traffic, and the weight's; fitted to the panel's layers."""
        p, t2 = problem(g, direction, self.m), (self.m + 2) ** 2
        tile, constants = tile_for(g.dtype.itemsize), machine.constants()
        scale = g.dtype.itemsize / 4
        columns = -(-p.targets // tile.width) * tile.width
        products = 2 * t2 * p.tile_count * p.groups * p.depth * columns * scale
        inner = math.prod(p.blocks) * -(-p.inner // tile.lanes) * tile.lanes
        moved = 2 * t2 * p.tile_count * p.groups * (inner + columns) * 4 * scale
        weight = t2 * p.groups * p.depth * columns * 4 * scale
        # Blocks of a wide kernel are gathered from taps that lie apart, and each reads tiles of its own.
        gathering, apart = (0.4, 1.0) if math.prod(p.blocks) == 1 else (1.6, 1.3)
        if direction == "weight_grad":
            return CALL_SECONDS + apart * (products / (0.7 * constants.flops * threads_) + moved / (20e9 * threads_))
        # Tiles of 8x8 do not fit the registers while they are transformed.
        share = 0.9 if self.m < 6 else 0.75
        return (
            CALL_SECONDS
            + products / (share * constants.flops * threads_)
            + moved / (80e9 * threads_)
            + (0.5 * g.bytes + gathering * weight) / constants.bandwidth
        )

    def workspace(self, g, direction, limit):
        """U, V, M and Y as far as they live at once; per thread a strip of input, a block of output and some taps."""
        m, t2, count = self.m, (self.m + 2) ** 2, threads.count()
        p = problem(g, direction, m)
        if direction == "weight_grad":
            return _gradient_workspace(g, p, m, count, limit)
        b, size = _blocking(p, m, g.dtype.itemsize, count), g.dtype.itemsize
        U = t2 * p.depth * b.tile.width
        pad = PAD_BYTES // size
        V = t2 * (p.groups * p.depth + pad)
        shapes = {
            "U": (count, t2 * math.prod(p.blocks) * b.part * b.tile.width)
            if b.part
            else (1, U * p.groups * _panels(p, b.tile)),
            "V": (1, V * b.filled(p.tile_count)) if b.part else (count, t2 * b.filled(b.tiles) * (p.depth + pad)),
            "M": (count, t2 * b.filled(b.tiles) * (b.panels * b.tile.width + pad)),
            "taps": (count, _tap_count(p) * STAGE * b.tile.width),
            "bias": (1, p.groups * _panels(p, b.tile) * b.tile.width + 1),
            # A pixel of fewer channels than a vector has is read with its neighbours.
            "strip": (count, _strip_elements(p, m, b.run) + b.tile.lanes),
            "block": (count, b.run * m * m * b.tile.width),
        }
        return {name: Buffer(shape, g.dtype) for name, shape in shapes.items()}

    def forward(self, g, x, weight, bias, activation, out, workspace):
        """Write the convolution of `x` with `weight`, plus bias, through the activation, to `out`."""
        self.pack(g, "forward", weight, workspace)
        self.run(g, "forward", x, weight, bias, activation, out, workspace)

    def input_grad(self, g, grad_output, weight, out, workspace):
        """Write the gradient with respect to the input to `out`."""
        self.pack(g, "input_grad", weight, workspace)
        self.run(g, "input_grad", grad_output, weight, None, None, out, workspace)

    def kept(self, g, direction):
        """Return the buffers that `pack` writes and `run` only reads: U, unless it lives a panel at a time."""
        p = problem(g, direction, self.m)
        return () if _blocking(p, self.m, g.dtype.itemsize, threads.count()).part else ("U",)

    def pack(self, g, direction, weight, workspace):
        """Transform the weight, unless `run` does it a panel at a time."""
        b, nowhere = self._blocking(g, direction, workspace), (0,) * 15
        if not b.part:
            self._start("transform_weight", g, direction, b, nowhere, weight, None, workspace)

    def run(self, g, direction, source, weight, bias, activation, out, workspace):
        """Write the convolution with the weight that `pack` has transformed to `out`."""
        b = self._blocking(g, direction, workspace)
        images = (*layout_of(source, g.data_format), *layout_of(out, g.data_format), *extent_of(source, g.data_format))
        p, least = problem(g, direction, self.m), "zero" if activation == "relu" else "-inf"
        pad_bias(bias, p.groups, p.targets, 1, workspace["bias"][0], least)
        if b.part:
            self._start("transform_source", g, direction, b, images, weight, activation, workspace)
        task = "convolve_panels" if b.part else "convolve"
        self._start(task, g, direction, b, images, weight, activation, workspace)

    def _blocking(self, g, direction, workspace):
        return _blocking(problem(g, direction, self.m), self.m, g.dtype.itemsize, len(workspace["M"]))

    def _start(self, task, g, direction, b, images, weight, activation, workspace):
        """Run one of the tasks; all have the same arguments."""
        p = problem(g, direction, self.m)
        sizes, table, blocks = _numbers(p, b, g.dtype.itemsize)
        getattr(tasks(self.m, b.tile, g.dtype.itemsize), task)(
            len(workspace["M"]), *images, *sizes, CODES[activation],
            *_places(workspace, "U", "V", "M", "taps", "bias", "strip", "block"),
            address(weight), math.prod(p.kernel), address(table), *blocks,
        )  # fmt: skip

    def weight_grad(self, g, grad_output, x, out, workspace):
        """Write the gradient with respect to the weight to `out`."""
        p, count = problem(g, "weight_grad", self.m), len(workspace["taps"])
        tile = tile_for(g.dtype.itemsize)
        tiles = workspace["V"].shape[1] // _tile_elements(p, p.depth, self.m, g)
        b = Blocking(tile, tiles, _run(p, self.m, g.dtype.itemsize, p.tile_count), 1)
        run, table = tasks(self.m, b.tile, g.dtype.itemsize), _tap_table(p, b.tile, g.dtype.itemsize)
        for first in range(0, max(p.tile_count, 1), b.tiles):
            last = min(first + b.tiles, p.tile_count)
            arguments = (
                *layout_of(x, g.data_format), *layout_of(grad_output, g.data_format),
                *extent_of(x, g.data_format), *p.size, p.batch, p.groups, p.inner, p.targets, *p.low, *p.blocks,
                *p.dilation, *p.tiles, p.tile_count, b.tiles, b.run, b.panels, 0,
                *_places(workspace, "sums", "V", "Y", "taps", "strip", "strip", "taps"),
                address(out), math.prod(p.kernel), address(table), False, workspace["sums"].itemsize, 0, first, last,
                b.tiles,
            )  # fmt: skip
            run.transform_source(count, *arguments)
            run.transform_grads(count, *arguments)
            if workspace["sums"].size:
                run.reduce(count, *arguments)
        if workspace["sums"].size:
            run.finish(count, *arguments)
        else:
            run.reduce_once(count, *arguments)


@lru_cache(maxsize=1024)
def _numbers(p, b, itemsize):
    """Return the sizes among the arguments of a convolution's tasks, the table of its taps, and the last arguments."""
    sizes = (
        *p.size, p.batch, p.groups, p.inner, p.targets, *p.low, *p.blocks,
        *p.dilation, *p.tiles, p.tile_count, b.tiles, b.run, b.panels,
    )  # fmt: skip
    blocks = p.reversed, b.part, 0, 0, p.tile_count, b.filled(p.tile_count)
    return sizes, _tap_table(p, b.tile, itemsize), blocks


def _places(workspace, *names):
    """Return address and bytes per thread of each buffer; a shared one is the same for all threads."""
    return (
        number
        for name in names
        for number in (address(workspace[name]), workspace[name].strides[0] if len(workspace[name]) > 1 else 0)
    )


def _panels(p, tile):
    return -(-p.targets // tile.width)


def _tap_count(p):
    return 9 * math.prod(p.blocks)


@lru_cache(maxsize=1024)
def _tap_table(p, tile, itemsize):
    """Where each tap goes: into a grid of whole blocks of 3x3."""
    T, R, S = p.kernel
    _, A, B = p.blocks
    order = np.arange(T * R * S).reshape(T, R, S)
    if p.reversed:
        order = order[::-1, ::-1, ::-1]
    grid = np.full((T, 3 * A, 3 * B), -1)
    grid[:, :R, :S] = order
    return pack_table(STAGE, T * R * S, grid.ravel(), tile.width, itemsize, p.reversed)


def _strip_elements(p, m, run):
    _, A, B = p.blocks
    taller, wider = m + 2 + 3 * (A - 1), run * m + 2 + 3 * (B - 1)
    return max(taller * wider * p.inner, m * run * m * p.targets)


@lru_cache(maxsize=1024)
def _blocking(p, m, itemsize, count):
    """Choose as many tiles as the cache holds with their channels and filters, an equal number of blocks per thread."""
    t2, blocks = (m + 2) ** 2, math.prod(p.blocks)
    shared = t2 * p.groups * p.depth * p.tile_count * itemsize
    if p.targets > p.tile_count and shared <= SHARED_BYTES:
        tile = _least_waste(p.tile_count, itemsize)
        channels = PART_BYTES // (t2 * blocks * tile.width * itemsize) // 64 * 64
        part = min(max(channels, 64), -(-p.inner // 64) * 64)
        return Blocking(tile, p.tile_count, _run(p, m, itemsize, p.tile_count), 1, part)
    tile = tile_for(itemsize)
    panels = min(_panels(p, tile), max(4, BLOCK_BYTES // (4 * t2 * tile.rows * tile.width * itemsize)))
    bytes_per_tile = t2 * (p.depth + panels * tile.width) * itemsize
    most = max(BLOCK_BYTES // bytes_per_tile // tile.rows, 2) * tile.rows
    parts = max(-(-p.tile_count // most), 1)
    if parts * p.groups % count:
        parts += count - parts % count
    tiles = max(-(-p.tile_count // parts), 1)
    return Blocking(_least_waste(tiles, itemsize), tiles, _run(p, m, itemsize, tiles), panels)


def _least_waste(tiles, itemsize):
    """Return the register tile that `tiles` fill best; a step costs its products and about two more."""
    both = tile_for(itemsize), tile_for(itemsize, small=True)
    return min(both, key=lambda t: -(-tiles // t.rows) * (t.rows * t.columns + 2))


def _run(p, m, itemsize, tiles):
    """Tiles of a row that are copied to a strip at a time."""
    return min(max(STRIP_BYTES // (_strip_elements(p, m, 1) * itemsize), 1), p.tiles[1], tiles)


def _sums(p, m, g):
    """The weight gradient's sums over tiles: in float64 where many float32 sums are added up."""
    tile = tile_for(g.dtype.itemsize)
    dtype = np.dtype(np.float64) if p.tile_count > TILE_CHAINS[m] * LINKS**2 else g.dtype
    return Buffer((1, (m + 2) ** 2 * p.groups * _panels(p, tile) * _rows(p, tile) * tile.width), dtype)


def _rows(p, tile):
    """Rows of a panel of sums: channels and blocks of taps that fill up register tiles."""
    return -(-p.depth // tile.rows) * tile.rows


def _tile_elements(p, channels, m, g):
    """Elements of one tile of V, or of Y."""
    return (m + 2) ** 2 * (p.groups * channels + PAD_BYTES // g.dtype.itemsize)


def _tile_bytes(p, m, g):
    """Bytes of one tile of V and Y."""
    return (_tile_elements(p, p.depth, m, g) + _tile_elements(p, p.targets, m, g)) * g.dtype.itemsize


def _gradient_workspace(g, p, m, count, limit):
    """As many tiles of V and Y as the shared memory holds."""
    tile, sums = tile_for(g.dtype.itemsize), _sums(p, m, g)
    # For some channels the taps there are; before them one channel's grid of taps, and sums to transform.
    t2 = (m + 2) ** 2
    rows = STAGE * math.prod(p.kernel) + _tap_count(p) + t2
    strip = _strip_elements(p, m, _run(p, m, g.dtype.itemsize, p.tile_count)) + tile.lanes
    shared = min(max(SUMMED_BYTES, 2 * sums.nbytes), SHARED_BYTES)
    room = min(shared, limit - sums.nbytes - count * (rows * tile.width + strip) * g.dtype.itemsize)
    most = max(room // _tile_bytes(p, m, g), 16)
    tiles = -(-p.tile_count // -(-p.tile_count // most))
    if math.prod(p.blocks) == 1 and tiles == p.tile_count and tiles * _tile_bytes(p, m, g) <= ONCE_BYTES:
        some = SOME_TILES * tile.rows
        sums, rows = sums._replace(shape=(1, 0)), some * (math.prod(p.kernel) + t2) + _tap_count(p)
    return {
        "sums": sums,
        "V": Buffer((1, tiles * _tile_elements(p, p.depth, m, g)), g.dtype),
        "Y": Buffer((1, tiles * _tile_elements(p, p.targets, m, g)), g.dtype),
        "taps": Buffer((count, rows * tile.width), g.dtype),
        "strip": Buffer((count, strip), g.dtype),
    }


class Tasks(NamedTuple):
    """The loops of one tile size."""

    transform_weight: Task
    transform_source: Task
    transform_grads: Task
    convolve: Task
    convolve_panels: Task
    reduce: Task
    finish: Task
    reduce_once: Task


@lru_cache(maxsize=16)
def tasks(m, tile, itemsize):
    """Return the tasks for F(m x m, 3 x 3) over one register tile; all are constants in them.

    They read the same arguments:

        0 chunks          1 source layout    7 target layout   13 source extent   16 target size    19 N, G, C, K
       23 low            26 blocks          29 dilation        32 tiles           34 tile count     35 tiles at a time
       36 run            37 panels          38 activation      39 U, V, M, taps, bias, strip, block: address, bytes
       53 weight         54 taps            55 table           56 reversed        57 channels of U  58 zero
       59 first tile     60 last tile       61 tiles of V
    """
    ROWS, COLUMNS, LANES = tile
    SOME = SOME_TILES * ROWS
    WIDTH, SIZE, VECTOR, PIXEL = tile.width, itemsize, LANES * itemsize, tile.width * itemsize
    M, T, CHAIN, TILE_CHAIN = m, m + 2, CHAINS[m], TILE_CHAINS[m]
    # The argument that is 0: the one offset of a reduction without gaps.
    ZERO = 58
    move = strips(tile, itemsize)
    emit, activate_block, pack = move.emit, move.finish, move.pack
    transform_input = _image_transform(m, tile, itemsize, INPUT, T)
    transform_output_grad = _image_transform(m, tile, itemsize, OUTPUT_GRAD, M)

    @task
    def transform_weight(arguments, chunk):
        """Weight -> U (t*t, G, panels, depth, WIDTH)."""
        chunks, (G, C, K), blocks = integer(arguments, 0), integers(arguments, 20, 3), integers(arguments, 26, 3)
        U, panels, parts = integer(arguments, 39), (K + WIDTH - 1) // WIDTH, (C + STAGE - 1) // STAGE
        depth = blocks[0] * blocks[1] * blocks[2] * C
        begin, end = share(G * panels * parts, chunk, chunks)
        _clear_taps(arguments, chunk)
        for job in range(begin, end):
            panel, c = job // parts, job % parts * STAGE
            _transform_panel(
                arguments, chunk, panel // panels, panel % panels, c, min(c + STAGE, C), C,
                U + (panel * depth + c) * PIXEL, G * panels * depth * PIXEL,
            )  # fmt: skip

    @device
    def _clear_taps(arguments, chunk):
        blocks, (taps, taps_bytes) = integers(arguments, 26, 3), integers(arguments, 45, 2)
        zero_bytes(taps + chunk * taps_bytes, 9 * blocks[0] * blocks[1] * blocks[2] * STAGE * PIXEL)

    @device
    def _transform_panel(arguments, chunk, g, panel, c0, c1, channels, U, position):
        """Channels c0 to c1 of the weight of a panel of filters -> U (t*t, blocks of taps, `channels`, WIDTH)."""
        (C, K), (D, A, B) = integers(arguments, 21, 2), integers(arguments, 26, 3)
        taps, taps_bytes = integers(arguments, 45, 2)
        weight, count, table, is_reversed = integers(arguments, 53, 4)
        taps += chunk * taps_bytes
        tap, step = count * SIZE, STAGE * PIXEL
        if is_reversed:
            at = weight + ((g * C + c0) * K + panel * WIDTH) * tap
        else:
            at = weight + ((g * K + panel * WIDTH) * C + c0) * tap
        used = min(WIDTH, K - panel * WIDTH)
        pack(taps, at, (K if is_reversed else C) * tap, tap, c1 - c0, count, used, table, is_reversed)
        for block in range(D * A * B):
            corner = (block // B * 3) * (3 * B) + block % B * 3
            for c in range(c0, c1):
                for k in range(0, PIXEL, VECTOR):
                    transform_tile(
                        M, TAPS, LANES, SIZE, taps + corner * step + (c - c0) * PIXEL + k, 3 * B * step, step,
                        U + (block * channels + c - c0) * PIXEL + k, T * position, position,
                    )  # fmt: skip

    @task
    def transform_source(arguments, chunk):
        """Source -> V (t*t, tiles, G, depth), shared."""
        chunks, source, extent = integer(arguments, 0), integers(arguments, 1, 6), integers(arguments, 13, 3)
        (G, C), low = integers(arguments, 20, 2), integers(arguments, 23, 3)
        blocks, dilation, across = integers(arguments, 26, 3), integers(arguments, 29, 3), integers(arguments, 32, 2)
        run, V, (strip, strip_bytes) = integer(arguments, 36), integer(arguments, 41), integers(arguments, 49, 2)
        (first, last, tiles), depth = integers(arguments, 59, 3), blocks[0] * blocks[1] * blocks[2] * C
        pitch = G * depth * SIZE + PAD_BYTES
        begin, end = share(last - first, chunk, chunks)
        for g in range(G):
            transform_input(
                source, source[0] + g * C * source[2], extent, C, low, blocks, dilation, across, integer(arguments, 16),
                first + begin, first + end, run, strip + chunk * strip_bytes,
                V + begin * pitch + g * depth * SIZE, pitch, tiles * pitch, arguments + ZERO * 8,
            )  # fmt: skip

    @task
    def transform_grads(arguments, chunk):
        """Output gradient -> Y (t*t, tiles, G, filters), shared."""
        chunks, target, size = integer(arguments, 0), integers(arguments, 7, 6), integers(arguments, 16, 3)
        G, K, dilation, across = (
            integer(arguments, 20),
            integer(arguments, 22),
            integers(arguments, 29, 3),
            integers(arguments, 32, 2),
        )
        run, Y, (strip, strip_bytes) = integer(arguments, 36), integer(arguments, 43), integers(arguments, 49, 2)
        first, last, tiles = integers(arguments, 59, 3)
        pitch = G * K * SIZE + PAD_BYTES
        begin, end = share(last - first, chunk, chunks)
        for g in range(G):
            transform_output_grad(
                target, target[0] + g * K * target[2], size, K, (0, 0, 0), (1, 1, 1), dilation, across, size[0],
                first + begin, first + end, run, strip + chunk * strip_bytes,
                Y + begin * pitch + g * K * SIZE, pitch, tiles * pitch, arguments + ZERO * 8,
            )  # fmt: skip

    @task
    def convolve(arguments, chunk):
        """Multiply blocks of tiles with all panels of filters, and transform the products to output."""
        chunks, G, (tile_count, TB) = integer(arguments, 0), integer(arguments, 20), integers(arguments, 34, 2)
        count = (tile_count + TB - 1) // TB
        begin, end = share(G * count, chunk, chunks)
        for job in range(begin, end):
            _convolve_block(arguments, chunk, job // count, job % count * TB)

    @task
    def convolve_panels(arguments, chunk):
        """Multiply all tiles with one panel of filters after the other, and transform the products to output."""
        chunks, G, K = integer(arguments, 0), integer(arguments, 20), integer(arguments, 22)
        panels = (K + WIDTH - 1) // WIDTH
        begin, end = share(G * panels, chunk, chunks)
        _clear_taps(arguments, chunk)
        for job in range(begin, end):
            _convolve_panel(arguments, chunk, job // panels, job % panels)

    @device
    def _convolve_block(arguments, chunk, g, first):
        """All filters of a block of tiles; V is this thread's."""
        source, extent = integers(arguments, 1, 6), integers(arguments, 13, 3)
        (G, C, K), low = integers(arguments, 20, 3), integers(arguments, 23, 3)
        blocks, dilation, across = integers(arguments, 26, 3), integers(arguments, 29, 3), integers(arguments, 32, 2)
        tile_count, TB, run, KP = integers(arguments, 34, 4)
        U, (V, V_bytes), (strip, strip_bytes) = (
            integer(arguments, 39),
            integers(arguments, 41, 2),
            integers(arguments, 49, 2),
        )
        panels, depth = (K + WIDTH - 1) // WIDTH, blocks[0] * blocks[1] * blocks[2] * C
        rows, pitch = (TB + ROWS - 1) // ROWS * ROWS, depth * SIZE + PAD_BYTES
        V, last = V + chunk * V_bytes, min(first + TB, tile_count)
        transform_input(
            source, source[0] + g * C * source[2], extent, C, low, blocks, dilation, across, integer(arguments, 16),
            first, last, run, strip + chunk * strip_bytes, V, pitch, rows * pitch, arguments + ZERO * 8,
        )  # fmt: skip
        for panel in range(0, panels, KP):
            some = min(KP, panels - panel)
            _multiply(
                arguments, chunk, last - first, some, V, pitch, rows * pitch, U + (g * panels + panel) * depth * PIXEL,
                G * panels * depth * PIXEL, depth * PIXEL, depth, 0,
            )  # fmt: skip
            _finish(arguments, chunk, g, panel, some, first, last)

    @device
    def _convolve_panel(arguments, chunk, g, panel):
        """One panel of filters for all tiles; V is shared, U is this thread's, of a few channels at a time."""
        (G, C), blocks = integers(arguments, 20, 2), integers(arguments, 26, 3)
        tile_count, (U, U_bytes, V) = integer(arguments, 34), integers(arguments, 39, 3)
        part, tiles = integer(arguments, 57), integer(arguments, 61)
        count = blocks[0] * blocks[1] * blocks[2]
        U, pitch = U + chunk * U_bytes, G * count * C * SIZE + PAD_BYTES
        for c0 in range(0, C, part):
            c1 = min(c0 + part, C)
            for c in range(c0, c1, STAGE):
                _transform_panel(
                    arguments, chunk, g, panel, c, min(c + STAGE, c1), part, U + (c - c0) * PIXEL, count * part * PIXEL
                )
            for block in range(count):
                _multiply(
                    arguments, chunk, tile_count, 1, V + ((g * count + block) * C + c0) * SIZE, pitch, tiles * pitch,
                    U + block * part * PIXEL, count * part * PIXEL, 0, c1 - c0, c0 + block,
                )  # fmt: skip
        _finish(arguments, chunk, g, panel, 1, 0, tile_count)

    @device
    def _multiply(
        arguments, chunk, count, some, V, V_pitch, V_position, U, U_position, U_panel, depth, add
    ):  # fmt: skip
        """M = V @ U, or with `add` M += V @ U, for each position of `count` tiles and some panels."""
        (TB, _, KP), (M_, M_bytes) = integers(arguments, 35, 3), integers(arguments, 43, 2)
        M_, rows, M_pitch = M_ + chunk * M_bytes, (TB + ROWS - 1) // ROWS * ROWS, KP * PIXEL + PAD_BYTES
        for position in range(T * T):
            for k in range(some):
                weights = U + position * U_position + k * U_panel
                for start in range(0, count, ROWS):
                    for c in range(0, depth, CHAIN):
                        multiply_tile(
                            ROWS, COLUMNS, LANES, SIZE, V + position * V_position + start * V_pitch + c * SIZE, V_pitch,
                            SIZE, arguments + ZERO * 8, 1, min(CHAIN, depth - c), weights + c * PIXEL, PIXEL,
                            M_ + (position * rows + start) * M_pitch + k * PIXEL, M_pitch, add + c,
                        )  # fmt: skip

    @device
    def _finish(arguments, chunk, g, panel, some, first, last):
        """M of some panels of a block of tiles -> output."""
        target, size, K = integers(arguments, 7, 6), integers(arguments, 16, 3), integer(arguments, 22)
        dilation, across = integers(arguments, 29, 3), integers(arguments, 32, 2)
        (TB, run, KP, code), (M_, M_bytes) = integers(arguments, 35, 4), integers(arguments, 43, 2)
        bias, (block, block_bytes) = integer(arguments, 47), integers(arguments, 51, 2)
        panels, rows, M_pitch = (K + WIDTH - 1) // WIDTH, (TB + ROWS - 1) // ROWS * ROWS, KP * PIXEL + PAD_BYTES
        k = panel * WIDTH
        _transform_output(
            target, target[0] + (g * K + k) * target[2], size, min(some * WIDTH, K - k), dilation, across, first, last,
            run, block + chunk * block_bytes, M_ + chunk * M_bytes, M_pitch, rows * M_pitch,
            bias + (g * panels + panel) * PIXEL, bias + integer(arguments, 20) * panels * PIXEL, code,
        )  # fmt: skip

    @device
    def _transform_output(
        target, base, size, K, dilation, across, first, last, run, block, M_, M_pitch, M_position, bias, floor, code
    ):  # fmt: skip
        """M (t*t, tiles, filters) -> output, a run of neighbouring tiles at a time."""
        least = load(SIZE, floor)
        i = first
        while i < last:
            n, d, h0, w0, th, tw = _place(i, across, dilation, size[0])
            h, w = h0 + dilation[1] * th * M, w0 + dilation[2] * tw * M
            count = min(across[1] - tw, last - i)
            tall = min((size[1] - 1 - h) // dilation[1] + 1, M) if h < size[1] else 0
            wide = min((size[2] - 1 - w) // dilation[2] + 1, count * M) if w < size[2] else 0
            at = base + n * target[1] + d * target[3] + h * target[4] + w * target[5]
            row, pixel, source = dilation[1] * target[4], dilation[2] * target[5], M_ + (i - first) * M_pitch
            whole = wide // M if target[2] == SIZE and K >= LANES and tall == M and code <= 1 else 0
            if whole > 0:
                count = whole
                _finish_tiles(source, M_pitch, M_position, count, K, at, row, pixel, bias, least)
            elif tall > 0 and wide > 0:
                count = min(count, run)
                wide, pitch = min(wide, count * M), count * M * PIXEL
                for k in range(0, K, WIDTH):
                    _finish_tiles(
                        source + k * SIZE,
                        M_pitch,
                        M_position,
                        count,
                        WIDTH,
                        block,
                        pitch,
                        PIXEL,
                        bias + k * SIZE,
                        least,
                    )
                    for p in range(tall):
                        if code > 1:
                            activate_block(block + p * pitch, WIDTH, wide, code)
                        emit(block + p * pitch, at + k * target[2] + p * row, target[2], pixel, min(WIDTH, K - k), wide)
            i += count

    @device
    def _finish_tiles(source, M_pitch, M_position, count, K, target, row, pixel, bias, least):
        for tile in range(count):
            for start in range(0, K, LANES):
                # The last vector overlaps the one before it.
                k = min(start, K - LANES) * SIZE
                finish_tile(
                    M, LANES, SIZE, source + tile * M_pitch + k, T * M_position, M_position,
                    target + tile * M * pixel + k, row, pixel, bias + k, least,
                )  # fmt: skip

    @task
    def reduce(arguments, chunk):
        """Add V^T @ Y to sums (t*t, G, panels, depth, WIDTH)."""
        chunks, (G, C, K), blocks = integer(arguments, 0), integers(arguments, 20, 3), integers(arguments, 26, 3)
        sums, V, Y = integer(arguments, 39), integer(arguments, 41), integer(arguments, 43)
        scratch, wide = integer(arguments, 45) + chunk * integer(arguments, 46), integer(arguments, 57)
        (first, last, tiles), depth = integers(arguments, 59, 3), blocks[0] * blocks[1] * blocks[2] * C
        V_pitch, Y_pitch = G * depth * SIZE + PAD_BYTES, G * K * SIZE + PAD_BYTES
        panels, rows = (K + WIDTH - 1) // WIDTH, (depth + ROWS - 1) // ROWS * ROWS
        begin, end = share(T * T * G * panels, chunk, chunks)
        for job in range(begin, end):
            position, g, k = job // (G * panels), job // panels % G, job % panels * PIXEL
            for start in range(0, last - first, TILE_CHAIN * LINKS):
                for c in range(0, depth, ROWS):
                    to, is_first = sums + (job * rows + c) * WIDTH * wide, first + start == 0
                    tile, count = position * tiles + start, min(TILE_CHAIN * LINKS, last - first - start)
                    _sum_tiles(
                        arguments, V + tile * V_pitch + (g * depth + c) * SIZE, V_pitch,
                        Y + tile * Y_pitch + g * K * SIZE + k, Y_pitch, count,
                        to if is_first and wide == SIZE else scratch,
                    )  # fmt: skip
                    if wide != SIZE:
                        for i in range(ROWS * WIDTH):
                            before = 0.0 if is_first else load(8, to + i * 8)
                            store(8, to + i * 8, before + load(SIZE, scratch + i * SIZE))
                    elif not is_first:
                        for i in range(0, ROWS * PIXEL, SIZE):
                            store(SIZE, to + i, load(SIZE, to + i) + load(SIZE, scratch + i))

    @device
    def _sum_tiles(arguments, V, V_pitch, Y, Y_pitch, count, target):
        """Write the sum over tiles of ROWS channels times one panel of filters, in chains."""
        for start in range(0, count, TILE_CHAIN):
            multiply_tile(
                ROWS, COLUMNS, LANES, SIZE, V + start * V_pitch, SIZE, V_pitch, arguments + ZERO * 8, 1,
                min(TILE_CHAIN, count - start), Y + start * Y_pitch, Y_pitch, target, PIXEL, start,
            )  # fmt: skip

    @task
    def finish(arguments, chunk):
        """Sums -> weight gradient (G*K, C, taps)."""
        chunks, (G, C, K), blocks = integer(arguments, 0), integers(arguments, 20, 3), integers(arguments, 26, 3)
        taps, taps_bytes = integers(arguments, 45, 2)
        count = integer(arguments, 54)
        # Of each channel t*t sums and a grid of whole blocks of taps; then the taps there are.
        tile = taps + chunk * taps_bytes
        grid = tile + T * T * PIXEL
        ready = grid + 9 * blocks[0] * blocks[1] * blocks[2] * PIXEL
        panels, parts = (K + WIDTH - 1) // WIDTH, (C + STAGE - 1) // STAGE
        begin, end = share(G * panels * parts, chunk, chunks)
        for job in range(begin, end):
            panel, c0 = job // parts, job % parts * STAGE
            c1, k = min(c0 + STAGE, C), panel % panels * WIDTH
            for c in range(c0, c1):
                for block in range(blocks[0] * blocks[1] * blocks[2]):
                    _transform_sums(arguments, panel, block, c, tile, grid)
                _take_taps(arguments, grid, ready + (c - c0) * count * PIXEL)
            _emit_taps(arguments, ready, panel // panels, k, c0, c1)

    @device
    def _transform_sums(arguments, panel, block, c, tile, grid):
        """Sums (t*t, G, panels, blocks, C, WIDTH) of one channel and block -> 3x3 taps of the grid."""
        (G, C, K), (D, A, B) = integers(arguments, 20, 3), integers(arguments, 26, 3)
        sums, wide = integer(arguments, 39), integer(arguments, 57)
        rows = (D * A * B * C + ROWS - 1) // ROWS * ROWS
        panels = G * ((K + WIDTH - 1) // WIDTH)
        source, position = sums + (panel * rows + block * C + c) * WIDTH * wide, panels * rows * WIDTH * wide
        if wide != SIZE:
            for i in range(T * T):
                for k in range(WIDTH):
                    store(SIZE, tile + i * PIXEL + k * SIZE, load(8, source + i * position + k * 8))
            source, position = tile, PIXEL
        _transform_taps(source, position, grid + ((block // B * 3) * (3 * B) + block % B * 3) * PIXEL, 3 * B * PIXEL)

    @device
    def _transform_taps(source, position, target, row):
        for k in range(0, PIXEL, VECTOR):
            transform_tile(M, TAPS_GRAD, LANES, SIZE, source + k, T * position, position, target + k, row, PIXEL)

    @device
    def _take_taps(arguments, grid, target):
        """A grid of whole blocks of taps -> the taps there are."""
        count, table = integers(arguments, 54, 2)
        for tap in range(count):
            # The table has each tap's place for STAGE channels.
            copy_bytes(target + tap * PIXEL, grid + integer(table, tap) // STAGE, PIXEL)

    @device
    def _emit_taps(arguments, taps, g, k, c0, c1):
        """Taps (C, taps, WIDTH) -> weight gradient: a filter's lie side by side, like the pixels of a plane."""
        C, K, (out, count) = integer(arguments, 21), integer(arguments, 22), integers(arguments, 53, 2)
        to, filter_ = out + ((g * K + k) * C + c0) * count * SIZE, C * count * SIZE
        emit(taps, to, filter_, SIZE, min(WIDTH, K - k), (c1 - c0) * count)

    @task
    def reduce_once(arguments, chunk):
        """Weight gradient of one block of taps where V and Y hold all tiles: its sums live as long as they grow."""
        chunks, (G, C, K) = integer(arguments, 0), integers(arguments, 20, 3)
        V, Y, (taps, taps_bytes) = integer(arguments, 41), integer(arguments, 43), integers(arguments, 45, 2)
        (last, tiles), count = integers(arguments, 60, 2), integer(arguments, 54)
        V_pitch, Y_pitch = G * C * SIZE + PAD_BYTES, G * K * SIZE + PAD_BYTES
        panels, parts = (K + WIDTH - 1) // WIDTH, (C + SOME - 1) // SOME
        sums = taps + chunk * taps_bytes
        grid = sums + T * T * SOME * PIXEL
        ready = grid + 9 * PIXEL
        begin, end = share(G * panels * parts, chunk, chunks)
        for job in range(begin, end):
            panel, c0 = job // parts, job % parts * SOME
            c1 = min(c0 + SOME, C)
            g, k = panel // panels, panel % panels * WIDTH
            for position in range(T * T):
                for c in range(c0, c1, ROWS):
                    _sum_tiles(
                        arguments, V + position * tiles * V_pitch + (g * C + c) * SIZE, V_pitch,
                        Y + position * tiles * Y_pitch + (g * K + k) * SIZE, Y_pitch, last,
                        sums + (position * SOME + c - c0) * PIXEL,
                    )  # fmt: skip
            for c in range(c0, c1):
                _transform_taps(sums + (c - c0) * PIXEL, SOME * PIXEL, grid, 3 * PIXEL)
                _take_taps(arguments, grid, ready + (c - c0) * count * PIXEL)
            _emit_taps(arguments, ready, g, k, c0, c1)

    return Tasks(
        transform_weight, transform_source, transform_grads, convolve, convolve_panels, reduce, finish, reduce_once
    )


def _image_transform(m, tile, itemsize, kind, window):
    """Return the device function that transforms tiles of `window` x `window` pixels, `m` apart."""
    LANES, SIZE = tile.lanes, itemsize
    M, T, KIND, WINDOW = m, m + 2, kind, window
    fill = strips(tile, itemsize).fill

    @device
    def transform_image(
        source, base, extent, C, low, blocks, dilation, across, depths, first, last, run, strip, V, V_pitch, V_position,
        zero,
    ):  # fmt: skip
        """Image -> V (t*t, tiles, blocks of taps, channels), a run of neighbouring tiles at a time."""
        D, A, B = blocks
        tall, wide = WINDOW + 3 * (A - 1), WINDOW + 3 * (B - 1)
        row, pixel = dilation[1] * source[4], dilation[2] * source[5]
        i = first
        while i < last:
            n, d0, h0, w0, th, tw = _place(i, across, dilation, depths)
            h, w = h0 + dilation[1] * th * M + low[1], w0 + dilation[2] * tw * M + low[2]
            count = min(across[1] - tw, last - i)
            # Tiles wholly inside are read in place; those at a border come from a strip.
            fits = source[2] == SIZE and C >= LANES and h >= 0 and h + (tall - 1) * dilation[1] < extent[1]
            spare = (extent[2] - 1 - w) // dilation[2] + 1 - wide
            in_place = fits and w >= 0 and spare >= 0
            if in_place:
                count = min(count, spare // M + 1)
            else:
                count = min(count, 1 if fits and tw == 0 else run)
            for d in range(D):
                depth, to = d0 + d * dilation[0] + low[0], V + (i - first) * V_pitch + d * A * B * C * SIZE
                if in_place and 0 <= depth < extent[0]:
                    at = base + n * source[1] + depth * source[3] + h * source[4] + w * source[5]
                    _transform_tiles(at, row, pixel, count, C, A, B, to, V_pitch, V_position)
                else:
                    for start in range(0, count, run):
                        some = min(run, count - start)
                        pitch = (some - 1) * M + wide
                        _fill(
                            strip, base + n * source[1], source, extent, C, (depth, h, w + start * M * dilation[2]),
                            dilation, tall, pitch, zero,
                        )  # fmt: skip
                        _transform_tiles(
                            strip, pitch * C * SIZE, C * SIZE, some, C, A, B, to + start * V_pitch, V_pitch, V_position
                        )
            i += count

    @device
    def _transform_tiles(source, row, pixel, count, C, A, B, V, V_pitch, V_position):
        for tile in range(count):
            for block in range(A * B):
                at = source + 3 * (block // B) * row + (tile * M + 3 * (block % B)) * pixel
                to = V + tile * V_pitch + block * C * SIZE
                for start in range(0, C, LANES):
                    # The last vector overlaps the one before it.
                    c = max(min(start, C - LANES), 0) * SIZE
                    transform_tile(M, KIND, LANES, SIZE, at + c, row, pixel, to + c, T * V_position, V_position)

    @device
    def _fill(strip, source, layout, extent, C, corner, dilation, rows, pitch, zero):
        """Fill a strip with every dilation-th pixel: those are an image of their own."""
        (d, h, w), (_, dh, dw) = corner, dilation
        h0, w0 = h % dh, w % dw
        fill(
            strip, C * SIZE, source + h0 * layout[4] + w0 * layout[5],
            (layout[0], layout[1], layout[2], layout[3], dh * layout[4], dw * layout[5]),
            (extent[0], (extent[1] - h0 + dh - 1) // dh, (extent[2] - w0 + dw - 1) // dw), C, (zero, 1),
            (d, (h - h0) // dh, (w - w0) // dw), rows, pitch,
        )  # fmt: skip

    return transform_image


@device
def _place(tile, across, dilation, depths):
    """(n, d, phase along H, along W, tile along H, along W) of a tile."""
    row, tw = tile // across[1], tile % across[1]
    image, th = row // across[0], row % across[0]
    image, w = image // dilation[2], image % dilation[2]
    image, h = image // dilation[1], image % dilation[1]
    return image // depths, image % depths, h, w, th, tw


F2 = Winograd(2)
F4 = Winograd(4)
F6 = Winograd(6)
