"""Implicit GEMM on a GPU: the matrix product of im2col without its matrix, in float32.

Every direction is a product of tiles that are gathered through two tables while they multiply (`gemm_kernels.py`):
of pixels, and of taps and channels. Forward and input gradient are dense phases (`blocking.py`); one small launch puts
the weight of a phase into the order of tiles and tabulates its taps, the next multiplies. The weight gradient sums over
pixels: blocks share them out, and a second pass adds what each has found, in a fixed order. Running sums have at most
`CHAIN` products: deeper ones are several launches.

Nothing here has run on a GPU; times are predicted from peaks.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ..geometry import ConvGeometry
from ..registry import Buffer
from . import gemm_kernels, roofline, sums, toolchain
from .architecture import Architecture
from .blocking import Phase, phases
from .epilogue import CODES
from .gemm_kernels import NARROW, TILE, Tile
from .steps import Step

toolchain.import_cuda()

from numba.cuda.types import CPointer, float32, int32, int64  # noqa: E402

# Threads of a block of the kernels that prepare and add up.
THREADS = 128
# The most blocks of a grid's second and third dimension.
MOST_BLOCKS = 65535
# Products in one running sum: the rounding error of a float32 sum grows with its length. A longer one is cut in
# launches, each of which adds to what the one before has written.
CHAIN = 2304
# Blocks that fill a GPU twice over, and the least steps of depth that are worth a block of their own.
ENOUGH_BLOCKS, LEAST_STEPS = 264, 8
# Directions that end in bias and activation.
FUSED = ("forward", "input_grad")
# Share of the peak that the mix of the main loop allows; not measured.
SHARE = 0.8

_F32 = CPointer(float32)


def supports(geometry: ConvGeometry, direction: str) -> tuple[bool, str]:
    """Return whether it computes a case, and if not, why."""
    g = geometry
    if g.dtype != np.float32:
        return False, f"the tiles are float32, not {g.dtype}"
    lines = max(g.in_channels * math.prod(g.kernel_size), g.out_channels) // g.groups
    if g.groups > MOST_BLOCKS or _up(lines, 32) // 32 > MOST_BLOCKS:
        return False, f"a grid has {MOST_BLOCKS} blocks across; there are {g.groups} groups and {lines} filters"
    if max(math.prod(g.output_size), *g.padded_size) >= 2**31:
        return False, f"its kernels count the pixels of an image in 32 bits; it is {g.padded_size} with padding"
    return True, ""


def seconds(geometry: ConvGeometry, direction: str, architecture: str) -> float:
    """Predicted time; not measured."""
    launches = 2 if direction == "weight_grad" else 2 * len(phases(geometry, direction))
    return roofline.seconds(geometry, architecture, SHARE, launches)


def workspace(geometry: ConvGeometry, direction: str, limit: int, tile: Tile | None = None) -> dict[str, Buffer]:
    """Return the packed weight and the table of taps; of the weight gradient a table of pixels and partial sums."""
    g = geometry
    tile = tile or _tile(g, direction)
    if direction == "weight_grad":
        share = _share(g, limit, tile)
        return {
            "pixels": Buffer((4 * share.pixels,), _index_dtype(g)),
            "partial": Buffer((share.splits * math.prod(g.weight_shape),), np.dtype(np.float32)),
        }
    if g.batch == 0:
        return {}
    places = [_places(g, direction, phase, tile) for phase in phases(g, direction)]
    return {
        "packed": Buffer((sum(p.elements for p in places),), np.dtype(np.float32)),
        "taps": Buffer((sum(4 * p.entries for p in places),), _index_dtype(g)),
    }


def steps(
    geometry: ConvGeometry,
    direction: str,
    activation: str | None = None,
    bias: bool = False,
    architecture: str = "sm_90a",
    limit: int = 1 << 30,
    tile: Tile | None = None,
) -> list[Step]:
    """Return the launches of a direction; `limit` is what `workspace` was given, `tile` for tests to shrink."""
    g = geometry
    tile = tile or _tile(g, direction, architecture)
    if direction == "weight_grad":
        return _weight_steps(g, _share(g, limit, tile), architecture, tile)
    found: list[Step] = []
    packed_first = taps_first = 0
    for phase in phases(g, direction):
        if g.batch and phase.positions:
            places = _places(g, direction, phase, tile)
            if phase.taps:
                found.append(_prepare_step(g, direction, phase, places, packed_first, taps_first, tile))
            end = (CODES[activation], bias)
            found += _gather_steps(g, direction, phase, places, packed_first, taps_first, end, architecture, tile)
            packed_first, taps_first = packed_first + places.elements, taps_first + 4 * places.entries
    return found


# --- sizes -----------------------------------------------------------------------------------------------------


def _up(count: int, step: int) -> int:
    return -(-count // step) * step


@lru_cache(maxsize=1024)
def is_wide(geometry: ConvGeometry) -> bool:
    """Return whether an index could pass what 32 bits hold."""
    g = geometry
    x, y = g.batch * g.in_channels * math.prod(g.input_size), g.batch * g.out_channels * math.prod(g.output_size)
    # Beyond the arrays: pixels of the last tile, padding around an image, and the weight in whole tiles.
    halo = math.prod(n + r * d + before + after for n, r, d, (before, after) in zip(
        g.input_size, g.kernel_size, g.dilation, g.padding)) * (g.in_channels + g.out_channels)  # fmt: skip
    packed = (
        g.groups * math.prod(g.kernel_size) * _up(g.in_channels // g.groups, 128) * _up(g.out_channels // g.groups, 128)
    )
    return max(x, y, packed) + halo + THREADS >= 2**31


def _index(geometry: ConvGeometry) -> tuple[Any, Any]:
    """Return the type of indices, for Numba and for NumPy."""
    return (int64, np.int64) if is_wide(geometry) else (int32, np.int32)


def _index_dtype(geometry: ConvGeometry) -> np.dtype:
    return np.dtype(_index(geometry)[1])


def _channels(geometry: ConvGeometry, direction: str) -> tuple[int, int]:
    """Return the channels of one group that are summed over, and those that result."""
    C, K = geometry.in_channels // geometry.groups, geometry.out_channels // geometry.groups
    return (K, C) if direction == "input_grad" else (C, K)


class _Places:
    """Sizes of one phase's product: summed depth and resulting lines, in whole tiles, and entries of its table."""

    def __init__(self, geometry: ConvGeometry, direction: str, phase: Phase, tile: Tile) -> None:
        self.channels_last = geometry.data_format == "channels_last"
        self.inner, self.lines = _channels(geometry, direction)
        self.real_depth = phase.taps * self.inner
        self.k_tiles = -(-self.real_depth // tile.depth)
        self.tile_lines = tile.columns if self.channels_last else tile.rows
        self.tile_pixels = tile.rows if self.channels_last else tile.columns
        self.line_tiles = -(-self.lines // self.tile_lines)
        self.elements = geometry.groups * self.line_tiles * self.tile_lines * self.k_tiles * tile.depth
        together = 4 if self.channels_last else tile.depth
        self.run = together if self.inner % together == 0 else 1
        self.entries = self.k_tiles * tile.depth // self.run


def _tile(geometry: ConvGeometry, direction: str, architecture: str = "sm_90a") -> Tile:
    """Return the tile that loses least: half as many filters where there are few, or single elements are gathered.

    Its size does not depend on the architecture, and so neither does the workspace.
    """
    inner, lines = _channels(geometry, direction)
    channels_last = geometry.data_format == "channels_last"
    few = lines <= 64 or inner % (4 if channels_last else TILE.depth)
    tile = NARROW[channels_last] if direction != "weight_grad" and few else TILE
    return tile if _has_copies(architecture) else tile.spread


@lru_cache(maxsize=4096)
def _places(geometry: ConvGeometry, direction: str, phase: Phase, tile: Tile) -> _Places:
    return _Places(geometry, direction, phase, tile)


def _totals(geometry: ConvGeometry, direction: str) -> tuple[int, int]:
    """Return all channels of the source and of the target."""
    both = geometry.in_channels, geometry.out_channels
    return both if direction == "forward" else both[::-1]


class _Share(NamedTuple):
    """How blocks share out the pixels of a weight gradient: steps in all, and for each at a time; size of the table."""

    steps: int
    each: int
    splits: int
    pixels: int


@lru_cache(maxsize=1024)
def _share(geometry: ConvGeometry, limit: int, tile: Tile) -> _Share:
    g = geometry
    filters, columns = g.out_channels // g.groups, math.prod(g.weight_shape[1:])
    total = g.batch * math.prod(g.output_size)
    steps = -(-total // tile.depth)
    tiles = -(-filters // tile.rows) * -(-columns // tile.columns) * g.groups
    room = (limit - 4 * steps * tile.depth * _index_dtype(g).itemsize) // (4 * math.prod(g.weight_shape))
    wanted = max(-(-ENOUGH_BLOCKS // tiles), -(-total // (CHAIN * sums.CHAIN)))
    splits = min(wanted, steps // LEAST_STEPS, room, MOST_BLOCKS // g.groups)
    each = min(-(-steps // max(splits, 1)), max(CHAIN // tile.depth, 1))
    splits = max(min(-(-steps // max(each, 1)), splits), 1)
    return _Share(steps, max(each, 1), splits, steps * tile.depth)


# --- launches --------------------------------------------------------------------------------------------------


def _prepare_step(
    g: ConvGeometry, direction: str, phase: Phase, places: _Places, packed_first: int, taps_first: int, tile: Tile
) -> Step:
    index, number = _index(g)
    C, taps = g.in_channels // g.groups, math.prod(g.kernel_size)
    # Of the weight (K, C // groups, T, R, S): steps to the next line, the next summed channel and the next group.
    filters, channels = C * taps, taps
    line_step, inner_step = (filters, channels) if direction == "forward" else (channels, filters)
    H, W = phase.source[1:]
    last = places.channels_last
    source_channels = _totals(g, direction)[0]
    channel_stride, pixel_stride = (1, source_channels) if last else (math.prod(phase.source), 1)
    numbers = (
        packed_first, taps_first, places.elements, places.entries, places.k_tiles, places.real_depth, places.run,
        places.inner, places.line_tiles, places.lines, line_step, inner_step, g.out_channels // g.groups * filters,
        *phase.column("taps")[1:], *g.kernel_size[1:], *phase.column("weight_first"), *phase.column("weight_step"),
        *phase.column("tap_step"), channel_stride, H, W, pixel_stride,
    )  # fmt: skip
    return Step(
        gemm_kernels.prepare(tile, last, is_wide(g)),
        (_F32, _F32, CPointer(index), *[index] * len(numbers)),
        (-(-(places.elements + places.entries) // THREADS),),
        (THREADS,),
        ("weight", "packed", "taps", *map(number, numbers)),
    )


def _chains(steps: int, each: int) -> list[range]:
    """Return steps of a tile's depth in chains of equal length, of `each` products or less."""
    count = max(-(-steps * each // CHAIN), 1)
    length = max(-(-steps // count), 1)
    return [range(first, min(first + length, steps)) for first in range(0, max(steps, 1), length)]


def _gather_steps(
    g: ConvGeometry, direction: str, phase: Phase, places: _Places, packed_first: int, taps_first: int,
    end: tuple[int, bool], architecture: str, tile: Tile,
) -> list[Step]:  # fmt: skip
    """Return the launches of one phase, chain after chain; the last ends in activation and bias."""
    index, number = _index(g)
    last = places.channels_last
    source_channels, target_channels = _totals(g, direction)
    total = g.batch * phase.positions
    together = places.lines % 4 == 0 if last else phase.is_whole and phase.positions % 4 == 0
    source = "x" if direction == "forward" else "grad_output"
    found = []
    for chain in _chains(places.k_tiles, tile.depth):
        code, bias = end if chain.stop == places.k_tiles else (0, False)
        kernel = gemm_kernels.gather(
            tile, last, places.run, together, _has_copies(architecture), is_wide(g), chain.start > 0, bias, code
        )
        starts = (
            total, packed_first + chain.start * places.tile_lines * tile.depth,
            taps_first + 4 * chain.start * tile.depth // places.run,
        )  # fmt: skip
        numbers = (
            len(chain), places.k_tiles, places.lines, places.inner, source_channels, *phase.source, target_channels,
            *phase.target, *phase.column("extent"), *phase.column("in_first"), *phase.column("in_step"),
            *phase.column("out_first"), *phase.column("out_step"),
        )  # fmt: skip
        found.append(
            Step(
                kernel,
                (_F32, _F32, CPointer(index), _F32, _F32, *[index] * 3, *[int32] * len(numbers)),
                (-(-total // places.tile_pixels), places.line_tiles, g.groups),
                (tile.threads,),
                (source, "packed", "taps", "bias", "out", *map(number, starts), *map(np.int32, numbers)),
                tile.stages * (tile.rows + tile.columns) * tile.depth * 4,
                _launch_bounds(tile),
            )
        )
    return found


def _weight_steps(g: ConvGeometry, share: _Share, architecture: str, tile: Tile) -> list[Step]:
    index, number = _index(g)
    last, wide = g.data_format == "channels_last", is_wide(g)
    filters, inner, taps = g.out_channels // g.groups, g.in_channels // g.groups, math.prod(g.kernel_size)
    total, elements = g.batch * math.prod(g.output_size), math.prod(g.weight_shape)
    before = [-b for b, _ in g.padding]
    sizes = (g.in_channels, *g.input_size, *g.output_size, *before, *g.stride)
    table = Step(
        gemm_kernels.tabulate_pixels(last, wide),
        (CPointer(index), index, index, *[int32] * len(sizes)),
        (-(-share.pixels // THREADS),),
        (THREADS,),
        ("pixels", *map(number, (share.pixels, total)), *map(np.int32, sizes)),
    )
    filter_run, channel_run = (4 if last and lines % 4 == 0 else 1 for lines in (filters, inner))
    products = []
    for skip in range(0, max(share.steps, 1), share.each * share.splits):
        numbers = (
            skip, share.steps, share.each, g.groups, filters, g.out_channels, inner, inner * taps, g.in_channels,
            *g.input_size, math.prod(g.output_size), *g.kernel_size[1:], *g.dilation,
        )  # fmt: skip
        products.append(
            Step(
                gemm_kernels.weight_gradient(
                    tile, last, filter_run, channel_run, _has_copies(architecture), wide, skip > 0
                ),
                (_F32, _F32, CPointer(index), _F32, index, *[int32] * len(numbers)),
                (-(-filters // tile.rows), -(-inner * taps // tile.columns), g.groups * share.splits),
                (tile.threads,),
                ("x", "grad_output", "pixels", "partial", number(total), *map(np.int32, numbers)),
                tile.stages * (tile.rows + tile.columns + 2 * gemm_kernels.PAD) * tile.depth * 4,
                _launch_bounds(tile),
            )
        )
    add = Step(
        gemm_kernels.add_parts(wide),
        (_F32, _F32, index, int32, int32, int32),
        (-(-elements // THREADS),),
        (THREADS,),
        ("partial", "out", number(elements), *map(np.int32, (share.splits, inner, taps))),
    )
    return [table, *products, add] if total else [*products, add]


def _has_copies(architecture: str) -> bool:
    return Architecture.named(architecture).capability >= 80


def _launch_bounds(tile: Tile) -> tuple[int, int]:
    return tile.threads, tile.blocks
