"""Winograd's minimal filtering on a GPU, F(m x m, 3 x 3): a tile of m*m outputs for (m+2)**2 products a channel.

    y = A^T [ sum over channels  (G w G^T) * (B^T x B) ] A        x: tile of t*t, t = m + 2

Matrices, tiles and blocks of taps of larger kernels are those of the CPU (`minimal_filtering.py`). What is not fused
here: one launch transforms the weight to U; then, for some tiles at a time, one transforms the input to V, one
multiplies the t*t matrices side by side, M = V @ U, and one transforms M to output, through bias and activation. The
input gradient is the same with the taps reversed. The weight gradient sums over tiles instead,

    dw = G^T [ sum over tiles  (A dy A^T) * (B^T x B) ] G

blocks share them out, and a last launch adds up the parts in order (Lavin & Gray, "Fast algorithms for convolutional
neural networks", 2016).

An infinity or a NaN in the input reaches every output of the tiles that read it. Nothing here has run on a GPU; times
are predicted from peaks.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ..geometry import ConvGeometry
from ..minimal_filtering import Problem, filtering, problem, transposed
from ..registry import Buffer
from . import roofline, toolchain, winograd_kernels
from .architecture import MOST_BLOCKS, Architecture
from .elements import Element
from .epilogue import CODES
from .gemm_kernels import Tile, on_tiles
from .indices import image_strides, launch, needs_wide, round_up, step
from .steps import Step
from .sums import parts_of_tiles
from .winograd_kernels import PLAIN, Planes

toolchain.import_cuda()

from numba.cuda.types import CPointer, float32  # noqa: E402

# 8x8 sums of a thread, twice, for the chains: 255 registers for each of 256 threads on a multiprocessor.
WIDE, NARROW, SMALL = Tile(64, 128, 16, 8, 16), Tile(128, 64, 16, 16, 8), Tile(64, 64, 16, 8, 8, blocks=4)
# Products per running sum.
CHAINS = {2: 256, 4: 64}
TILE_CHAINS = {2: 128, 4: 32}
# Bytes of workspace in all, unless one tile of the product needs more, and of them those of parts of sums.
MOST_BYTES, MOST_PARTS_BYTES = 64 << 20, 16 << 20
# Share of the peak that products reach; not measured.
SHARE = 0.7

_F32 = CPointer(float32)


class Sizes(NamedTuple):
    """How a direction is cut: tiles at a time, extents of the matrices, and parts of each sum over tiles."""

    problem: Problem
    # Of the kernel that multiplies, or None: each architecture's own.
    tile: Any
    # Tiles that are transformed at a time, and depth and targets: whole tiles of the product.
    tiles: int
    depth: int
    targets: int
    parts: int = 1


class Winograd:
    """The functions of an algorithm, see `registry`, for one size of output tile.

    Parameters
    ----------
    m : int
        Rows and columns of an output tile.
    most_depth : int
        Channels times blocks of taps up to which their sum was measured to keep its promise.
    """

    FUSED = ("forward", "input_grad")

    def __init__(self, m: int, most_depth: int) -> None:
        self.m, self.positions, self.most_depth = m, (m + 2) ** 2, most_depth

    def supports(self, geometry: ConvGeometry, direction: str) -> tuple[bool, str]:
        """Every stride 1 and every kernel that is more than a row or a column."""
        g = geometry
        if g.dtype.name not in ("float32", "float16", "bfloat16"):
            return False, f"the tiles are float32, not {g.dtype}"
        if set(g.stride) != {1}:
            return False, f"tiles need stride 1, not {max(g.stride)}"
        if min(g.kernel_size[1:]) < 2:
            return False, f"a kernel of one row or column, {g.kernel_size[1:]}, saves nothing"
        p = problem(g, direction, self.m)
        if p.depth > self.most_depth and direction != "weight_grad":
            return False, f"a sum over {p.depth} channels and blocks of taps is too long for its precision"
        if self.positions * g.groups > MOST_BLOCKS:
            return False, f"a grid has {MOST_BLOCKS} blocks across; there are {g.groups} groups"
        return True, ""

    def seconds(self, geometry: ConvGeometry, direction: str, architecture: str) -> float:
        """Predicted time: the products at a share of the peak, what all launches read and write; not measured."""
        g, s = geometry, self._sizes(geometry, direction, MOST_BYTES, None)
        p, there = s.problem, roofline.peak(architecture)
        matrices, slices = self.positions * g.groups, -(-p.tile_count // s.tiles)
        products = 2 * matrices * p.tile_count * s.depth * s.targets
        moved = 4 * matrices * (2 * p.tile_count * (s.depth + s.targets) + 2 * s.parts * p.depth * s.targets)
        return (1 + 3 * slices) * roofline.LAUNCH + products / (SHARE * there.float32) + (moved + g.bytes) / there.bytes

    def workspace(self, geometry: ConvGeometry, direction: str, limit: int, tile: Any = None) -> dict[str, Buffer]:
        """U, and V and M of some tiles; of the weight gradient V and Y of some tiles, and parts of the sums."""
        s = self._sizes(geometry, direction, limit, tile)
        matrices = self.positions * geometry.groups
        V, M, U = (s.tiles, s.depth), (s.tiles, s.targets), (s.depth, s.targets)
        if direction == "weight_grad":
            shapes = {"V": (matrices, *V), "Y": (matrices, *M), "sums": (s.parts, matrices, *U)}
        else:
            shapes = {"U": (matrices, *U), "V": (matrices, *V), "M": (matrices, *M)}
        return {name: Buffer(shape, np.dtype(np.float32)) for name, shape in shapes.items()}

    def steps(
        self,
        geometry: ConvGeometry,
        direction: str,
        activation: str | None = None,
        bias: bool = False,
        architecture: str = "sm_90a",
        limit: int = 1 << 30,
        tile: Any = None,
    ) -> list[Step]:
        """Return the launches of a direction; `limit` is as for `workspace`, `tile` for tests to shrink."""
        launches = self._launches(geometry, direction, limit, tile, architecture)
        slices = range(0, launches.sizes.problem.tile_count, launches.sizes.tiles)
        if direction == "weight_grad":
            found = [made for first in slices for made in launches.gradient_of_slice(first)]
            return [*launches.before_gradient(), *found, launches.taps()]
        found = [made for first in slices for made in launches.slice(first, bias, CODES[activation])]
        return [*launches.weight(), *found]

    def _launches(self, geometry: ConvGeometry, direction: str, limit: int, tile: Any, architecture: str) -> Launches:
        return Launches(geometry, self.m, self._sizes(geometry, direction, limit, tile), architecture)

    def _sizes(self, g: ConvGeometry, direction: str, limit: int, tile: Any) -> Sizes:
        return _sizes(g, direction, self.m, min(limit, MOST_BYTES), tile)


@lru_cache(maxsize=1024)
def _sizes(g: ConvGeometry, direction: str, m: int, limit: int, tile: Any) -> Sizes:
    """Return as many tiles at a time as the limit has room for, all the same number of them."""
    p = problem(g, direction, m)
    backward = direction == "weight_grad"
    if tile is None:
        tile = WIDE if p.targets > 64 else NARROW if (p.depth if backward else p.tile_count) > 64 else SMALL
    rows, inner = (tile.depth, tile.rows) if backward else (tile.rows, tile.depth)
    depth, targets = round_up(p.depth, inner), round_up(p.targets, tile.columns)
    matrices, parts = (m + 2) ** 2 * g.groups, 1
    # Bytes of U or a part of the sums, and of a row of V and M.
    product, row = 4 * matrices * depth * targets, 4 * matrices * (depth + targets)
    if backward:
        blocks = depth // tile.rows * (targets // tile.columns) * matrices
        room = min(MOST_PARTS_BYTES, limit - rows * row) // product
        parts = parts_of_tiles(p.tile_count // tile.depth, blocks, matrices, room)
    room = (limit - parts * product) // row
    slices = -(-p.tile_count // max(room // rows * rows, rows))
    return Sizes(p, tile, round_up(-(-p.tile_count // slices), rows), depth, targets, parts)


class Launches:
    """The launches of one direction; V and Y are kept in planes."""

    def __init__(self, g: ConvGeometry, m: int, sizes: Sizes, architecture: str, planes: Planes = PLAIN) -> None:
        self.g, self.m, self.sizes, self.problem, self.planes = g, m, sizes, sizes.problem, planes
        self.element = Element.of(g.dtype)
        self.matrices, self.t2 = filtering(m), (m + 2) ** 2
        self.asynchronous = Architecture.named(architecture).copies_asynchronously
        self.last = g.data_format == "channels_last"
        s, many = sizes, self.t2 * g.groups
        self.wide = needs_wide(
            g.x_shape, g.output_shape, g.weight_shape, planes.number * many * s.tiles * max(s.depth, s.targets),
            many * s.parts * s.depth * s.targets,
        )  # fmt: skip

    def weight(self) -> list[Step]:
        """U of the weight."""
        g, p, s = self.g, self.problem, self.sizes
        channels, taps = g.in_channels // g.groups, math.prod(g.kernel_size)
        filter_, channel = channels * taps, taps
        inner_step, target_step = (filter_, channel) if p.reversed else (channel, filter_)
        low, high = 8, s.targets // 8
        total = g.groups * s.depth * s.targets
        numbers = (
            total, low, s.depth, high, p.inner, p.depth, p.targets, *self._steps(s.depth, s.targets),
            g.out_channels // g.groups * filter_, inner_step, target_step, taps - 1 if p.reversed else 0,
            *p.kernel[1:], *p.blocks[1:],
        )  # fmt: skip
        kernel = winograd_kernels.transform_weight(self.matrices.taps, self.element, self.wide)
        return [self._step(kernel, ("weight", "U"), numbers, total)]

    def before_gradient(self) -> list[Step]:
        """What all slices of a weight gradient share."""
        return []

    def slice(self, first: int, bias: bool, code: int) -> list[Step]:
        """Some tiles from `first` on: V, M and the output."""
        p, s = self.problem, self.sizes
        count = min(s.tiles, p.tile_count - first)
        rows = round_up(count, s.tile.rows)
        source = "grad_output" if p.reversed else "x"
        return [
            self._image(source, "V", first, count, s.depth),
            self._product("V", "U", "M", True, rows // s.tile.rows, s.depth, 1, False),
            self._output(first, count, bias, code),
        ]

    def gradient_of_slice(self, first: int) -> list[Step]:
        """What some tiles from `first` on add to the sums."""
        p, s = self.problem, self.sizes
        count = round_up(min(s.tiles, p.tile_count - first), s.tile.depth)
        return [
            self._image("x", "V", first, count, p.depth),
            self._image("grad_output", "Y", first, count, p.targets),
            self._product("V", "Y", "sums", False, s.depth // s.tile.rows, count, s.parts, first > 0),
        ]

    def taps(self) -> Step:
        """The weight gradient of the sums."""
        g, p, s = self.g, self.problem, self.sizes
        taps = math.prod(g.kernel_size)
        low, high = 8, -(-p.targets // 8)
        total = g.groups * p.depth * low * high
        numbers = (
            total, low, p.depth, high, s.parts, self.t2 * g.groups * s.depth * s.targets, p.inner, p.targets,
            *self._steps(s.depth, s.targets), p.targets * p.inner * taps, taps, p.inner * taps, *p.kernel[1:],
            *p.blocks[1:],
        )  # fmt: skip
        kernel = winograd_kernels.transform_sums(transposed(self.matrices.taps), self.element, self.wide)
        return self._step(kernel, ("sums", "out"), numbers, total)

    def _image(self, source: str, target: str, first: int, count: int, extent: int) -> Step:
        """V, or Y, of tiles of x or of the output gradient: `extent` elements of each row."""
        g, p, s = self.g, self.problem, self.sizes
        size, channels = (g.input_size, g.in_channels) if source == "x" else (g.output_size, g.out_channels)
        if target == "V":
            name, matrix, row, inner, blocks, low_at = "input", self.matrices.input, s.depth, p.inner, p.blocks, p.low
        else:
            name, matrix, row = "grad", transposed(self.matrices.output), s.targets
            inner, blocks, low_at = p.targets, (1, 1, 1), (0, 0, 0)
        lanes = 4 if self.last and inner % 4 == 0 else 1
        low, high = self._order(-(-extent // lanes))
        total = g.groups * count * low * high
        numbers = (
            total, low, count, high, first, p.tile_count, inner, math.prod(blocks) * inner, *self._steps_of_tiles(row),
            self.t2 * g.groups * s.tiles * row, *image_strides(channels, size, self.last), *size, *p.tiles, p.size[0],
            *blocks[1:], *p.dilation, *low_at,
        )  # fmt: skip
        kernel = winograd_kernels.transform_image(name, matrix, self.m, lanes, self.element, self.planes, self.wide)
        return self._step(kernel, (source, target), numbers, total)

    def _output(self, first: int, count: int, bias: bool, code: int) -> Step:
        g, p, s = self.g, self.problem, self.sizes
        lanes = 4 if self.last and p.targets % 4 == 0 else 1
        low, high = self._order(-(-p.targets // lanes))
        total = g.groups * count * low * high
        numbers = (
            total, low, count, high, first, p.targets, *self._steps_of_tiles(s.targets),
            *image_strides(g.groups * p.targets, p.size, self.last), *p.size[1:], *p.tiles, p.size[0], *p.dilation[1:],
        )  # fmt: skip
        across = not self.last and p.size[2] % self.m == 0 and p.dilation[2] == 1
        kernel = winograd_kernels.transform_output(
            self.matrices.output, lanes, across, self.element, self.wide, bias, code
        )
        return self._step(kernel, ("M", "bias", "out"), numbers, total)

    def _product(
        self, a: str, b: str, c: str, rows_first: bool, row_tiles: int, depth: int, parts: int, add: bool
    ) -> Step:
        s, tile, count = self.sizes, self.sizes.tile, self.t2 * self.g.groups
        steps = depth // tile.depth
        numbers = (
            steps, -(-steps // parts), int(add), count, s.depth, s.targets, s.tiles * s.depth,
            (s.depth if rows_first else s.tiles) * s.targets, (s.tiles if rows_first else s.depth) * s.targets,
        )  # fmt: skip
        chain = (CHAINS if rows_first else TILE_CHAINS)[self.m]
        kernel = winograd_kernels.batched_product(tile, rows_first, chain, self.asynchronous, self.wide)
        grid = (row_tiles, s.targets // tile.columns, count * parts)
        made = step(kernel, self._arrays(a, b, c), numbers, self.wide, grid, (tile.threads,))
        return on_tiles(made, tile, (tile.rows + tile.columns) * tile.depth)

    def _order(self, extent: int) -> tuple[int, int]:
        """Return how many channels follow each other before the next tile, and how often."""
        return (extent, 1) if self.last else (8, -(-extent // 8))

    def _steps(self, rows: int, columns: int) -> tuple[int, int, int]:
        """Return the elements from one position of a tile to the next, from a group and from a row."""
        return self.g.groups * rows * columns, rows * columns, columns

    def _steps_of_tiles(self, columns: int) -> tuple[int, int, int]:
        """Return those of V, M and Y."""
        return self._steps(self.sizes.tiles, columns)

    def _step(self, kernel: Any, names: tuple[str, ...], numbers: tuple[int, ...], total: int) -> Step:
        return launch(kernel, self._arrays(*names), numbers, self.wide, total)

    def _arrays(self, *names: str) -> list[tuple[str, Any]]:
        """Return arrays with their types: workspace is float32, or planes, the others are what is convolved."""
        types = {"V": self.planes.element.pointer, "Y": self.planes.element.pointer, "U": _F32, "M": _F32, "sums": _F32}
        return [(name, types.get(name, self.element.pointer)) for name in names]


F2 = Winograd(2, 4096)
F4 = Winograd(4, 1152)
