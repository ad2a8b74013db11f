"""Implicit GEMM on tensor cores: float16 and bfloat16 as they are, float32 cut to tf32 or bfloat16, or split.

Forward and input gradient are dense phases (`blocking.py`), each of three launches: one packs the weight, one
multiplies, one computes again what did not come out finite, if anything (`tensor_core_staging.py`). The weight
gradient tabulates its pixels, multiplies and adds up (`tensor_core_grads.py`). A launch before them brings pixels into
chunks of 16 bytes, unless they are: channels last, a multiple of 8 of 16-bit numbers in each group (4 of tf32). How
float32 is split is in `tensor_core_units.py`. On sm_90a warpgroups multiply 16-bit numbers (wgmma).

Nothing here has run on a GPU; times are predicted from peaks.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ..geometry import ConvGeometry
from ..registry import Buffer
from . import gemm_kernels, roofline, sums, tensor_core_grads, tensor_core_kernels, tensor_core_staging, toolchain
from .architecture import MOST_BLOCKS, Architecture
from .blocking import Phase, channels, channels_of_group, phases, source_of, weight_steps
from .elements import Element
from .epilogue import CODES
from .gemm_kernels import on_tiles
from .indices import THREADS, index_dtype, index_type, launch, round_up, step
from .steps import Step
from .tensor_core_kernels import Tile
from .tensor_core_units import BFLOAT16, BFLOAT16_PLANES, FLOAT16, TF32_PLANES, Units

toolchain.import_cuda()

from numba.cuda.types import CPointer, float32, int32, uint32  # noqa: E402

# Pixels of one running sum of the weight gradient: one addition for 8 or 16 of them.
CHAIN = 8 * sums.CHAIN
# Not measured: the share of the tensor cores' peak; the newest have other instructions than mma for the whole of it.
SHARES, SHARE = {"sm_90": 0.45, "sm_100": 0.2, "sm_103": 0.2}, 0.6

_WORDS, _WORD, _FLAG = CPointer(uint32), np.dtype(np.uint32), np.dtype(np.int32)


class TensorCore:
    """The functions of an algorithm, see `registry`.

    Parameters
    ----------
    units : dict
        How the numbers of each dtype are multiplied.
    """

    FUSED = ("forward", "input_grad")
    # The lowest compute capability, ten times, that has mma of these sizes and asynchronous copies.
    since = 80

    def __init__(self, units: dict[str, Units]) -> None:
        self.units = units

    def supports(self, geometry: ConvGeometry, direction: str) -> tuple[bool, str]:
        """Return whether it computes a case, and if not, why."""
        g = geometry
        if g.dtype.name not in self.units:
            return False, f"it multiplies {' and '.join(self.units)}, not {g.dtype}"
        lines = max(g.in_channels, g.out_channels) // g.groups
        if g.groups > MOST_BLOCKS or -(-lines // 16) > MOST_BLOCKS:
            return False, f"a grid has {MOST_BLOCKS} blocks across; there are {g.groups} groups and {lines} filters"
        taps = math.prod(g.kernel_size)
        if direction == "weight_grad" and taps * round_up(g.in_channels // g.groups, 8) // 64 >= MOST_BLOCKS:
            return False, f"a grid has {MOST_BLOCKS} blocks across; there are {taps} taps"
        if max(g.padded_size) >= 2**31:
            return False, f"its kernels have places in 32 bits; the image is {g.padded_size} with padding"
        return True, ""

    def seconds(self, geometry: ConvGeometry, direction: str, architecture: str) -> float:
        """Predicted time: products of whole tiles at a share of the peak, or what all launches move; not measured."""
        g, units, there = geometry, self.units[geometry.dtype.name], roofline.peak(architecture)
        if Architecture.named(architecture).capability < self.since:
            return math.inf
        names = ("x", "grad_output") if direction == "weight_grad" else (source_of(direction),)
        moved = g.bytes + 2 * sum(b.nbytes for name in names for b in Pixels.of(g, name, units).buffers().values())
        if direction == "weight_grad":
            share = Share.of(g, units, 1 << 30, None)
            tile, products, launches = share.tile, share.products, 3
            moved += 8 * share.splits * share.part
        else:
            found = [Places.of(g, direction, phase, units, None, architecture) for phase in phases(g, direction)]
            tile, products, launches = found[0].tile, sum(p.products for p in found), 3 * len(found)
        arithmetic = seconds_of(products, units, tile, architecture)
        return (launches + len(names)) * roofline.LAUNCH + max(arithmetic, moved / there.bytes)

    def workspace(
        self, geometry: ConvGeometry, direction: str, limit: int, tile: Tile | None = None
    ) -> dict[str, Buffer]:
        """Return what all phases share, one after the other: packed weight, taps, flags; and staged pixels."""
        g, units = geometry, self.units[geometry.dtype.name]
        if g.batch == 0:
            return {}
        if direction == "weight_grad":
            return _grad_workspace(g, units, limit, tile)
        return {**product_buffers(g, direction, units, tile), **Pixels.of(g, source_of(direction), units).buffers()}

    def steps(
        self,
        geometry: ConvGeometry,
        direction: str,
        activation: str | None = None,
        bias: bool = False,
        architecture: str = "sm_90a",
        limit: int = 1 << 30,
        tile: Tile | None = None,
    ) -> list[Step]:
        """Return the launches of a direction; `limit` is what `workspace` was given, `tile` for tests to shrink."""
        g, units = geometry, self.units[geometry.dtype.name]
        if g.batch == 0:
            return []
        if direction == "weight_grad":
            return _grad_steps(g, units, limit, tile)
        ending = bias, CODES[activation]
        pixels = Pixels.of(g, source_of(direction), units)
        found = pixels.steps()
        for phase in phases(g, direction):
            if phase.positions:
                places = Places.of(g, direction, phase, units, tile, architecture)
                found.append(pack_step(g, direction, phase, pixels, places))
                found.append(product_step(g, direction, phase, pixels, places, *ending))
                found.append(_mend_step(g, direction, phase, units, places, *ending))
        return found


MMA = TensorCore({"float16": FLOAT16, "bfloat16": BFLOAT16})
TF32, TF32X3 = (TensorCore({"float32": TF32_PLANES[planes]}) for planes in (1, 2))
BF16, BF16X3, BF16X6 = (TensorCore({"float32": BFLOAT16_PLANES[planes]}) for planes in (1, 2, 3))


# --- sizes -----------------------------------------------------------------------------------------------------


def seconds_of(products: int, units: Units, tile: Tile, architecture: str) -> float:
    """Return the predicted time of so many products of whole tiles, in chunks."""
    share = SHARE if tile.warpgroups else SHARES.get(architecture.rstrip("a"), SHARE)
    return 2 * products * units.chunk * units.products / (share * getattr(roofline.peak(architecture), units.rate))


def _is_last(geometry: ConvGeometry) -> bool:
    return geometry.data_format == "channels_last"


def is_wide(geometry: ConvGeometry, units: Units) -> bool:
    """Return whether an index could pass what 32 bits hold."""
    g, taps = geometry, math.prod(geometry.kernel_size)
    C, K = (round_up(n // g.groups, units.chunk) for n in (g.in_channels, g.out_channels))
    # Beyond the arrays: pixels of the last tile, padding around an image, and the weight in whole tiles.
    around = 512 + math.prod(n + r * d + before + after + s for n, r, d, (before, after), s in zip(
        g.input_size, g.kernel_size, g.dilation, g.padding, g.stride))  # fmt: skip
    x, y = (math.prod(size) * g.groups * n for size, n in ((g.input_size, C), (g.output_size, K)))
    packed = g.groups * (taps + 1) * round_up(C, 256) * round_up(K, 256)
    return units.planes * max(g.batch * max(x, y) + around * g.groups * max(C, K), packed) + THREADS >= 2**31


class Pixels(NamedTuple):
    """How the pixels of x or of the output gradient are read: as they are, or staged, in chunks of so many elements."""

    geometry: ConvGeometry
    units: Units
    name: str
    channels: int
    extents: tuple[int, ...]
    chunks: int
    staged: bool

    @classmethod
    def of(cls, g: ConvGeometry, name: str, units: Units) -> Pixels:
        """Return how "x" or "grad_output" is read."""
        channels, extents = (g.in_channels, g.input_size) if name == "x" else (g.out_channels, g.output_size)
        of_group = channels // g.groups
        staged = not (_is_last(g) and units.plain and of_group % units.chunk == 0)
        return cls(g, units, name, channels, extents, -(-of_group // units.chunk), staged)

    @property
    def of_chunk(self) -> int:
        """Elements of a chunk: words if they are staged."""
        return 4 if self.staged else self.units.chunk

    @property
    def of_pixel(self) -> int:
        """Elements from one pixel to the next."""
        return self.geometry.groups * self.chunks * self.of_chunk

    @property
    def plane(self) -> int:
        """Elements of a plane."""
        return self.geometry.batch * math.prod(self.extents) * self.of_pixel

    @property
    def array(self) -> tuple[str, Any]:
        """Name and type of the array that is multiplied."""
        return (f"staged_{self.name}", _WORDS) if self.staged else (self.name, Element.of(self.geometry.dtype).pointer)

    def buffers(self) -> dict[str, Buffer]:
        """Return the workspace: the planes, if they are staged."""
        return {self.array[0]: Buffer((self.units.pixel_planes * self.plane,), _WORD)} if self.staged else {}

    def steps(self) -> list[Step]:
        """Return the launch that stages them, if they are."""
        if not self.staged:
            return []
        g, units, element = self.geometry, self.units, Element.of(self.geometry.dtype)
        elements, of_group, wide = self.plane // 4, self.channels // g.groups, is_wide(g, units)
        together = _is_last(g) and g.dtype == np.float32 and of_group % units.chunk == 0
        kernel = tensor_core_staging.stage(units, element, _is_last(g), together, wide)
        numbers = elements, math.prod(self.extents), self.chunks, g.groups, of_group
        arrays = [(self.name, element.pointer), self.array]
        return [launch(kernel, arrays, numbers, wide, elements)]


class Places(NamedTuple):
    """The tile of one phase's product and its sizes in whole tiles; chunks of the packed weight in one plane."""

    tile: Tile
    inner: int
    lines: int
    chunks_of_tap: int
    k_tiles: int
    grid: tuple[int, int, int]
    packed: int
    entries: int

    @classmethod
    def of(
        cls, g: ConvGeometry, direction: str, phase: Phase, units: Units, tile: Tile | None, architecture: str
    ) -> Places:
        """Return the sizes of a phase."""
        inner, lines = channels_of_group(g, direction)
        if tile is None:
            tile = tile_for(units, lines, _is_last(g))
            if architecture == "sm_90a" and units.warpgroup and lines > 64:
                tile = warpgroup_tile(units, lines if _is_last(g) else g.batch * phase.positions)
        chunks_of_tap = -(-inner // units.chunk)
        k_tiles = -(-phase.taps * chunks_of_tap // tile.chunks)
        of_pixels, of_lines = (tile.rows, tile.columns) if _is_last(g) else (tile.columns, tile.rows)
        grid = -(-g.batch * phase.positions // of_pixels), -(-lines // of_lines), g.groups
        packed = g.groups * grid[1] * k_tiles * of_lines * tile.chunks
        return cls(tile, inner, lines, chunks_of_tap, k_tiles, grid, packed, (k_tiles + 1) * tile.chunks)

    @property
    def products(self) -> int:
        """Products of whole tiles, in chunks."""
        return math.prod(self.grid) * self.tile.rows * self.tile.columns * self.k_tiles * self.tile.chunks

    @property
    def flags(self) -> int:
        """Warps of the product."""
        return math.prod(self.grid) * self.tile.threads // 32


def tile_for(units: Units, lines: int, channels_last: bool) -> Tile:
    """Return the tile: half as many filters where there are few.

    Warps of 64x64 results load less from shared memory than those of 64x32; with planes each fragment meets others.
    """
    few = lines <= 64
    shape: tuple[int, ...]
    if units.planes == 1:
        shape = (256, 64, 4, 4, 1, 3, 2) if few else (128, 128, 4, 2, 2, 4, 2)
    else:
        chunks, stages = (4, 3) if units.split else (2, 4) if units.planes == 2 else (2, 3)
        shape = (128, 64, chunks, 2, 2, stages) if few else (128, 128, chunks, 2, 4, stages)
    tile = Tile(*shape)
    return tile if channels_last or not few else tile.turned


def warpgroup_tile(units: Units, columns: int) -> Tile:
    """Return the tile of warpgroups: the wider one where it does not lie idle, and of planes all that has room."""
    if units.planes > 1:
        return Tile(128, 128, 8, 8, 1, 3 if units.planes == 2 else 2, warpgroups=True)
    if round_up(columns, 256) <= 1.1 * columns:
        return Tile(128, 256, 8, 8, 1, 4, 1, warpgroups=True)
    return Tile(128, 128, 8, 8, 1, 3, 2, warpgroups=True)


# --- forward and input gradient --------------------------------------------------------------------------------


def product_buffers(g: ConvGeometry, direction: str, units: Units, tile: Tile | None) -> dict[str, Buffer]:
    """Return packed weight, taps and flags: enough for every phase on every architecture."""
    every = ("sm_80", "sm_90a")
    found = [Places.of(g, direction, phase, units, tile, a) for phase in phases(g, direction) for a in every]
    return {
        "packed": Buffer((max(p.packed for p in found) * units.planes * 4,), _WORD),
        "taps": Buffer((max(p.entries for p in found) * 4,), index_dtype(is_wide(g, units))),
        "flags": Buffer((max(p.flags for p in found),), _FLAG),
    }


def pack_step(g: ConvGeometry, direction: str, phase: Phase, pixels: Pixels, places: Places) -> Step:
    """Return the launch that packs a phase's weight and tabulates its taps."""
    element, p, units, wide = Element.of(g.dtype), places, pixels.units, is_wide(g, pixels.units)
    kernel = tensor_core_staging.pack(p.tile, units, element, _is_last(g), wide)
    numbers = (
        p.packed, p.entries, p.k_tiles, p.chunks_of_tap, phase.taps, p.inner, p.grid[1], p.lines,
        *weight_steps(g, direction), *(max(n, 1) for n in phase.column("taps")[1:]), *g.kernel_size[1:],
        *phase.column("weight_first"), *phase.column("weight_step"), *phase.column("tap_step"), pixels.of_chunk,
        *phase.source[1:], pixels.of_pixel,
    )  # fmt: skip
    arrays = [("weight", element.pointer), ("packed", _WORDS), ("taps", CPointer(index_type(wide)))]
    return launch(kernel, arrays, numbers, wide, p.packed + p.entries)


def product_step(
    g: ConvGeometry, direction: str, phase: Phase, pixels: Pixels, places: Places, bias: bool, code: int
) -> Step:
    """Return the launch that multiplies a phase's pixels by its packed weight."""
    element, p, units, last, wide = Element.of(g.dtype), places, pixels.units, _is_last(g), is_wide(g, pixels.units)
    neighbours = p.lines if last else phase.positions if phase.is_whole else 1
    together = 16 // g.dtype.itemsize
    kernel = tensor_core_kernels.gather(
        p.tile, units, element, last, together if neighbours % together == 0 else 1, wide, bias, code
    )
    numbers = (
        g.batch * phase.positions, pixels.plane, p.k_tiles, p.lines, pixels.of_pixel // g.groups, pixels.of_pixel,
        *phase.source, channels(g, direction)[1], *phase.target, *phase.places,
    )  # fmt: skip
    arrays = [
        pixels.array, ("packed", _WORDS), ("taps", CPointer(index_type(wide))), ("bias", element.pointer),
        ("out", element.pointer), ("flags", CPointer(int32)),
    ]  # fmt: skip
    words = tensor_core_kernels.buffer_words(p.tile, units, last)[1]
    return on_tiles(step(kernel, arrays, numbers, wide, p.grid, (p.tile.threads,)), p.tile, words)


def _mend_step(
    g: ConvGeometry, direction: str, phase: Phase, units: Units, places: Places, bias: bool, code: int
) -> Step:
    element, p, wide, (C, K) = Element.of(g.dtype), places, is_wide(g, units), channels(g, direction)
    kernel = tensor_core_staging.mend(p.tile, element, _is_last(g), wide, bias, code)
    numbers = (
        g.batch * phase.positions, p.lines, p.inner, *weight_steps(g, direction), *g.kernel_size[1:],
        *phase.column("taps"), *phase.column("weight_first"), *phase.column("weight_step"), *phase.column("tap_step"),
        C, *phase.source, K, *phase.target, *phase.places,
    )  # fmt: skip
    names = source_of(direction), "weight", "bias", "out"
    arrays = [*((name, element.pointer) for name in names), ("flags", CPointer(int32))]
    return step(kernel, arrays, numbers, wide, p.grid, (p.tile.threads,))


# --- weight gradient -------------------------------------------------------------------------------------------


def grad_tile(units: Units, filters: int) -> Tile:
    """Return the tile of a weight gradient."""
    tile = tile_for(units, filters, False)
    # Not so wide that the threads copy fewer pixels at once than `correlate` takes.
    return tile if tile.columns <= 128 else Tile(64, 128, 4, 2, 2, 4, 2)


class Share(NamedTuple):
    """How blocks share out the pixels of a weight gradient: tile, chunks of all taps, steps in all and at a time."""

    tile: Tile
    columns: int
    steps: int
    each: int
    splits: int
    # Entries of the table of pixels, elements of one part, and products of whole tiles, in chunks.
    entries: int
    part: int
    products: int

    @classmethod
    def of(cls, g: ConvGeometry, units: Units, limit: int, tile: Tile | None) -> Share:
        """Return the share for what `limit` leaves to parts."""
        filters = g.out_channels // g.groups
        tile = tile or grad_tile(units, filters)
        columns = math.prod(g.kernel_size) * -(-(g.in_channels // g.groups) // units.chunk)
        depth = tile.chunks * units.chunk
        steps = -(-g.batch * math.prod(g.output_size) // depth)
        tiles = -(-filters // tile.rows) * -(-columns * units.chunk // tile.columns) * g.groups
        part = g.out_channels * columns * units.chunk
        taken = 4 * steps * depth * index_dtype(is_wide(g, units)).itemsize
        taken += sum(b.nbytes for name in ("x", "grad_output") for b in Pixels.of(g, name, units).buffers().values())
        room = (limit - taken) // (4 * part)
        splits, each = sums.shares_of_tiles(steps, tiles, g.groups, room, max(CHAIN // depth, 1))
        products = tiles * tile.rows * tile.columns * steps * tile.chunks
        return cls(tile, columns, steps, each, splits, steps * depth, part, products)


def _grad_workspace(g: ConvGeometry, units: Units, limit: int, tile: Tile | None) -> dict[str, Buffer]:
    share = Share.of(g, units, limit, tile)
    return {
        "pixels": table_buffer(g, units, share),
        "partial": Buffer((share.splits * share.part,), np.dtype(np.float32)),
        **Pixels.of(g, "x", units).buffers(),
        **Pixels.of(g, "grad_output", units).buffers(),
    }


def _grad_steps(g: ConvGeometry, units: Units, limit: int, tile: Tile | None) -> list[Step]:
    share = Share.of(g, units, limit, tile)
    x, grad = (Pixels.of(g, name, units) for name in ("x", "grad_output"))
    made = [*x.steps(), *grad.steps(), table_step(g, units, share, x)]
    for skip in range(0, max(share.steps, 1), share.each * share.splits):
        made.append(correlate_step(g, units, share, x, grad, skip > 0, skip))
    return [*made, _add_step(g, units, share)]


def table_buffer(g: ConvGeometry, units: Units, share: Share) -> Buffer:
    """Return what the table of pixels takes."""
    return Buffer((4 * share.entries,), index_dtype(is_wide(g, units)))


def table_step(g: ConvGeometry, units: Units, share: Share, x: Pixels) -> Step:
    """Return the launch that tabulates pixels."""
    return gemm_kernels.pixels_step(g, x.of_pixel, share.entries, True, is_wide(g, units))


def correlate_step(
    g: ConvGeometry, units: Units, share: Share, x: Pixels, grad: Pixels, add: bool = False, skip: int = 0
) -> Step:
    """Return the launch that multiplies pixels of both, and writes parts of the sums or adds to them.

    The blocks' shares begin at the step `skip`.
    """
    wide, tile, filters = is_wide(g, units), share.tile, g.out_channels // g.groups
    numbers = (
        g.batch * math.prod(g.output_size), skip, share.steps, share.each, int(add), g.groups, filters, grad.chunks,
        grad.of_chunk, grad.of_pixel, grad.plane, math.prod(g.kernel_size), x.chunks, x.of_chunk, x.of_pixel, x.plane,
        *g.input_size, *g.kernel_size[1:], *g.dilation,
    )  # fmt: skip
    arrays = [x.array, grad.array, ("pixels", CPointer(index_type(wide))), ("partial", CPointer(float32))]
    grid = -(-filters // tile.rows), -(-share.columns * units.chunk // tile.columns), g.groups * share.splits
    made = step(tensor_core_grads.correlate(tile, units, wide), arrays, numbers, wide, grid, (tile.threads,))
    return on_tiles(made, tile, tensor_core_grads.buffer_words(tile, units)[1])


def _add_step(g: ConvGeometry, units: Units, share: Share) -> Step:
    element, wide, elements = Element.of(g.dtype), is_wide(g, units), math.prod(g.weight_shape)
    inner, taps = g.in_channels // g.groups, math.prod(g.kernel_size)
    numbers = (
        elements, share.splits, g.out_channels // g.groups, inner, taps, share.columns // taps,
        g.batch * math.prod(g.output_size), g.in_channels, *g.input_size, g.out_channels, *g.output_size,
        *g.kernel_size[1:], *(-before for before, _ in g.padding), *g.stride, *g.dilation,
    )  # fmt: skip
    kernel = tensor_core_grads.add(element, units.chunk, _is_last(g), wide)
    arrays = [
        ("x", element.pointer), ("grad_output", element.pointer), ("partial", CPointer(float32)),
        ("out", element.pointer),
    ]  # fmt: skip
    return launch(kernel, arrays, numbers, wide, elements)
