"""Implicit GEMM on a GPU: the matrix product of im2col without its matrix, in float32.

Every direction is a product of tiles that are gathered through two tables while they multiply (`gemm_kernels.py`):
of pixels, and of taps and channels. Forward and input gradient are dense phases (`blocking.py`); one small launch puts
the weight of a phase into the order of tiles and tabulates its taps, the next multiplies. The weight gradient sums over
pixels: blocks share them out, and a second pass adds what each has found, in a fixed order. Running sums have at most
`PRODUCTS` products: deeper ones are several launches.

Nothing here has run on a GPU; times are predicted from peaks.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..geometry import ConvGeometry
from ..registry import Buffer
from . import gemm_kernels, roofline, sums, toolchain
from .architecture import MOST_BLOCKS, Architecture
from .blocking import Phase, channels, channels_of_group, phases, source_of, weight_steps
from .epilogue import CODES
from .gemm_kernels import NARROW, TILE, Tile, on_tiles
from .indices import THREADS, divisor, index_dtype, index_type, launch, round_up, step
from .steps import Step
from .sums import PRODUCTS

toolchain.import_cuda()

from numba.cuda.types import CPointer, float32  # noqa: E402

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
    if g.groups > MOST_BLOCKS or -(-lines // 32) > MOST_BLOCKS:
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
            "pixels": Buffer((4 * share.pixels,), index_dtype(is_wide(g))),
            "partial": Buffer((share.splits * math.prod(g.weight_shape),), np.dtype(np.float32)),
        }
    if g.batch == 0:
        return {}
    places = [_places(g, direction, phase, tile) for phase in phases(g, direction)]
    return {
        "packed": Buffer((sum(p.elements for p in places),), np.dtype(np.float32)),
        "taps": Buffer((sum(4 * p.entries for p in places),), index_dtype(is_wide(g))),
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


@lru_cache(maxsize=1024)
def is_wide(geometry: ConvGeometry) -> bool:
    """Return whether an index could pass what 32 bits hold."""
    g = geometry
    x, y = g.batch * g.in_channels * math.prod(g.input_size), g.batch * g.out_channels * math.prod(g.output_size)
    # Beyond the arrays: pixels of the last tile, padding around an image, and the weight in whole tiles.
    halo = math.prod(n + r * d + before + after for n, r, d, (before, after) in zip(
        g.input_size, g.kernel_size, g.dilation, g.padding)) * (g.in_channels + g.out_channels)  # fmt: skip
    C, K = (round_up(n // g.groups, 128) for n in (g.in_channels, g.out_channels))
    packed = g.groups * math.prod(g.kernel_size) * C * K
    return max(x, y, packed) + halo + THREADS >= 2**31


def _is_flat(geometry: ConvGeometry) -> bool:
    """Return whether images are planes: of depth 1, with kernels and results of depth 1."""
    g = geometry
    return g.input_size[0] == g.output_size[0] == g.kernel_size[0] == 1 and g.padding[0] == (0, 0)


class _Places:
    """Sizes of one phase's product: summed depth and resulting lines, in whole tiles, and entries of its table."""

    def __init__(self, geometry: ConvGeometry, direction: str, phase: Phase, tile: Tile) -> None:
        self.channels_last = geometry.data_format == "channels_last"
        self.inner, self.lines = channels_of_group(geometry, direction)
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
    inner, lines = channels_of_group(geometry, direction)
    channels_last = geometry.data_format == "channels_last"
    few = lines <= 64 or inner % (4 if channels_last else TILE.depth)
    tile = NARROW[channels_last] if direction != "weight_grad" and few else TILE
    return tile if Architecture.named(architecture).copies_asynchronously else tile.spread


@lru_cache(maxsize=4096)
def _places(geometry: ConvGeometry, direction: str, phase: Phase, tile: Tile) -> _Places:
    return _Places(geometry, direction, phase, tile)


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
    room = (limit - 4 * steps * tile.depth * index_dtype(is_wide(g)).itemsize) // (4 * math.prod(g.weight_shape))
    splits, each = sums.shares_of_tiles(steps, tiles, g.groups, room, max(PRODUCTS // tile.depth, 1))
    return _Share(steps, each, splits, steps * tile.depth)


# --- launches --------------------------------------------------------------------------------------------------


def _prepare_step(
    g: ConvGeometry, direction: str, phase: Phase, places: _Places, packed_first: int, taps_first: int, tile: Tile
) -> Step:
    wide, last, all_channels = is_wide(g), places.channels_last, channels(g, direction)[0]
    channel_stride, pixel_stride = (1, all_channels) if last else (math.prod(phase.source), 1)
    numbers = (
        packed_first, taps_first, places.elements, places.entries, places.k_tiles, places.real_depth, places.run,
        places.inner, places.line_tiles, places.lines, *weight_steps(g, direction), *phase.column("taps")[1:],
        *g.kernel_size[1:], *phase.column("weight_first"), *phase.column("weight_step"), *phase.column("tap_step"),
        channel_stride, *phase.source[1:], pixel_stride,
    )  # fmt: skip
    arrays = [("weight", _F32), ("packed", _F32), ("taps", CPointer(index_type(wide)))]
    return launch(gemm_kernels.prepare(tile, last, wide), arrays, numbers, wide, places.elements + places.entries)


def _chains(steps: int, each: int) -> list[range]:
    """Return steps of a tile's depth in chains of equal length, of `each` products or less."""
    count = max(-(-steps * each // PRODUCTS), 1)
    length = max(-(-steps // count), 1)
    return [range(first, min(first + length, steps)) for first in range(0, max(steps, 1), length)]


def _gather_steps(
    g: ConvGeometry, direction: str, phase: Phase, places: _Places, packed_first: int, taps_first: int,
    end: tuple[int, bool], architecture: str, tile: Tile,
) -> list[Step]:  # fmt: skip
    """Return the launches of one phase, chain after chain; the last ends in activation and bias."""
    wide, last = is_wide(g), places.channels_last
    source_channels, target_channels = channels(g, direction)
    total = g.batch * phase.positions
    together = places.lines % 4 == 0 if last else phase.is_whole and phase.positions % 4 == 0
    asynchronous = Architecture.named(architecture).copies_asynchronously
    arrays = [
        (source_of(direction), _F32), ("packed", _F32), ("taps", CPointer(index_type(wide))), ("bias", _F32),
        ("out", _F32),
    ]  # fmt: skip
    grid = -(-total // places.tile_pixels), places.line_tiles, g.groups
    found = []
    for chain in _chains(places.k_tiles, tile.depth):
        code, bias = end if chain.stop == places.k_tiles else (0, False)
        kernel = gemm_kernels.gather(
            tile, last, places.run, together, asynchronous, wide, _is_flat(g), chain.start > 0, bias, code
        )
        starts = (
            packed_first + chain.start * places.tile_lines * tile.depth,
            taps_first + 4 * chain.start * tile.depth // places.run,
        )  # fmt: skip
        numbers = (
            len(chain), places.k_tiles, places.lines, places.inner, source_channels, *phase.source, target_channels,
            *phase.target, *phase.places,
        )  # fmt: skip
        made = step(kernel, arrays, (total, *starts, *map(np.int32, numbers)), wide, grid, (tile.threads,))
        found.append(on_tiles(made, tile, (tile.rows + tile.columns) * tile.depth))
    return found


def _weight_steps(g: ConvGeometry, share: _Share, architecture: str, tile: Tile) -> list[Step]:
    last, wide = g.data_format == "channels_last", is_wide(g)
    filters, inner, taps = g.out_channels // g.groups, g.in_channels // g.groups, math.prod(g.kernel_size)
    total, elements = g.batch * math.prod(g.output_size), math.prod(g.weight_shape)
    table = ("pixels", CPointer(index_type(wide)))
    arrays = [("x", _F32), ("grad_output", _F32), table, ("partial", _F32)]
    grid = -(-filters // tile.rows), -(-inner * taps // tile.columns), g.groups * share.splits
    asynchronous = Architecture.named(architecture).copies_asynchronously
    grad_run = 4 if (filters if last else math.prod(g.output_size)) % 4 == 0 else 1
    channel_run = 4 if last else tile.columns // 4
    channel_run = channel_run if inner % channel_run == 0 else 1
    products = []
    for skip in range(0, max(share.steps, 1), share.each * share.splits):
        kernel = gemm_kernels.weight_gradient(
            tile, last, grad_run, channel_run, asynchronous, wide, _is_flat(g), skip > 0
        )
        numbers = (
            skip, share.steps, share.each, g.groups, filters, g.out_channels, inner, inner * taps, g.in_channels,
            *g.input_size,
        )  # fmt: skip
        planes = *divisor(math.prod(g.output_size), wide), math.prod(g.input_size)
        numbers = total, *map(np.int32, numbers), *planes, *map(np.int32, (*g.kernel_size[1:], *g.dilation))
        made = step(kernel, arrays, numbers, wide, grid, (tile.threads,))
        words = (tile.rows + tile.columns + 2 * gemm_kernels.PAD) * tile.depth
        products.append(on_tiles(made, tile, words))
    sizes = elements, *map(np.int32, (share.splits, inner, taps))
    add = launch(gemm_kernels.add_parts(wide), [("partial", _F32), ("out", _F32)], sizes, wide, elements)
    if total == 0:
        return [*products, add]
    pixels = gemm_kernels.pixels_step(g, g.in_channels, share.pixels, last, wide)
    return [pixels, *products, add]
