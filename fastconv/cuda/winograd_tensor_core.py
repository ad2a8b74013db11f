"""Winograd's minimal filtering with products on tensor cores: float32 split into planes of tf32 or bfloat16, or cut.

The transforms are those of `winograd.py`. What they make are pixels of channels last, a tile of the image each,

    V (tiles, positions, G, depth)   M, Y (tiles, positions, G, targets)   U (positions, G, depth, targets)

so that the products of all positions are those of one convolution with a kernel of 1 and a group for each position:
M is its input gradient of V, and the weight gradient's sums over tiles are its own, of V and Y. Both are the kernels of
`tensor_core.py`. The transform writes the planes that are multiplied (`tensor_core_units.py`).

An infinity or a NaN, in the input or because a plane cannot hold what is near the ends of float32's range, reaches
every output of the tiles that read it. Nothing here has run on a GPU; times are predicted from peaks.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np

from ..geometry import ConvGeometry
from ..minimal_filtering import problem
from ..registry import Buffer, workspace_bytes
from . import roofline, tensor_core
from .architecture import Architecture
from .blocking import phases
from .elements import Element
from .epilogue import CODES
from .indices import round_up
from .steps import Step, renamed
from .sums import parts_of_tiles
from .tensor_core import Pixels, Places, Share, product_buffers
from .tensor_core_kernels import Tile
from .tensor_core_units import BFLOAT16_PLANES, TF32_PLANES, Units
from .winograd import MOST_PARTS_BYTES, Launches, Planes, Sizes, Winograd

# Bytes of V and M, or of V, Y and parts of sums, unless one tile of the product needs more: about what a cache holds.
SLICE_BYTES = 64 << 20
# Tiles of one running sum of the weight gradient: one addition for 8 or 16 of them.
CHAINS = {2: 2048, 4: 512}
_FLOAT32 = np.dtype(np.float32)


class TensorCoreWinograd(Winograd):
    """The functions of an algorithm, see `registry`, for one size of output tile and one way to multiply.

    Parameters
    ----------
    m, most_depth : int
        As of `Winograd`.
    units : Units
        How planes are multiplied.
    """

    since = 80

    def __init__(self, m: int, units: Units, most_depth: int) -> None:
        super().__init__(m, most_depth)
        self.units = units

    def supports(self, geometry: ConvGeometry, direction: str) -> tuple[bool, str]:
        """What `Winograd` does, of float32."""
        if geometry.dtype != _FLOAT32:
            return False, f"it splits float32, not {geometry.dtype}"
        return super().supports(geometry, direction)

    def seconds(self, geometry: ConvGeometry, direction: str, architecture: str) -> float:
        """Predicted time: the products at a share of the peak, what all launches read and write; not measured."""
        if Architecture.named(architecture).capability < self.since:
            return math.inf
        g, units, s = geometry, self.units, self._sizes(geometry, direction, 1 << 30, None)
        matrices, slices = self.positions * g.groups, -(-s.problem.tile_count // s.tiles)
        # Of V and Y there are planes; each is written once and read once.
        planes = Element.of(_dtype(units)).stored.bitwidth // 8 * units.pixel_planes
        rows = s.depth * planes + s.targets * (planes if direction == "weight_grad" else 4)
        weight = s.depth * s.targets * (4 * s.parts * slices if direction == "weight_grad" else 4 + 4 * units.planes)
        moved = g.bytes + 2 * matrices * (slices * s.tiles * rows + weight)
        tile, products = _products(g, direction, self.m, units, s, architecture)
        arithmetic = tensor_core.seconds_of(slices * products, units, tile, architecture)
        return (3 + 3 * slices) * roofline.LAUNCH + arithmetic + moved / roofline.peak(architecture).bytes

    def workspace(self, geometry: ConvGeometry, direction: str, limit: int, tile: Any = None) -> dict[str, Buffer]:
        """U, as it is and packed, and V and M of some tiles; of the weight gradient V and Y, and parts of the sums."""
        return _buffers(geometry, direction, self.m, self.units, self._sizes(geometry, direction, limit, tile))

    def _sizes(self, g: ConvGeometry, direction: str, limit: int, tile: Any) -> Sizes:
        return _sizes(g, direction, self.m, self.units, limit, tile)

    def _launches(self, geometry: ConvGeometry, direction: str, limit: int, tile: Any, architecture: str) -> Launches:
        sizes = self._sizes(geometry, direction, limit, tile)
        return _Launches(geometry, direction, self.m, self.units, sizes, architecture)


# RMS errors of as many channels, with sums that are cut off as tensor cores may, in NumPy: 7.2e-7, 4.9e-7, 7.7e-6,
# 6.5e-4; 8.1e-7, 1.5e-3. F(4x4) amplifies too much of what two planes leave out: 1.05e-6 of tf32 at 512 channels,
# 2.1e-5 of bfloat16.
F2_TF32X3, F2_BF16X6 = TensorCoreWinograd(2, TF32_PLANES[2], 4096), TensorCoreWinograd(2, BFLOAT16_PLANES[3], 4096)
F2_BF16X3, F2_TF32 = TensorCoreWinograd(2, BFLOAT16_PLANES[2], 4096), TensorCoreWinograd(2, TF32_PLANES[1], 4096)
F4_BF16X6, F4_TF32 = TensorCoreWinograd(4, BFLOAT16_PLANES[3], 1152), TensorCoreWinograd(4, TF32_PLANES[1], 4096)


# --- sizes -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _sizes(g: ConvGeometry, direction: str, m: int, units: Units, limit: int, tile: Any) -> Sizes:
    """Return as many tiles at a time as the limit has room for, all the same number of them."""
    p, backward, matrices = problem(g, direction, m), direction == "weight_grad", (m + 2) ** 2 * g.groups
    depth, targets = round_up(p.depth, 8), round_up(p.targets, 8)
    if backward:
        tile = tile or tensor_core.grad_tile(units, depth)
    whole = tile.chunks * units.chunk if backward else (tile or tensor_core.tile_for(units, targets, True)).rows

    def nbytes(tiles: int) -> int:
        return workspace_bytes(_buffers(g, direction, m, units, Sizes(p, tile, tiles, depth, targets)))

    least, product, parts, most = nbytes(whole), 4 * matrices * depth * targets, 1, p.tile_count
    limit = min(limit, least + SLICE_BYTES)
    if backward:
        blocks = -(-depth // tile.rows) * -(-targets // tile.columns) * matrices
        room = (min(MOST_PARTS_BYTES, limit - least) + product) // product
        parts = parts_of_tiles(p.tile_count // whole, blocks, matrices, room)
        most = parts * CHAINS[m]
    room = (limit - least - (parts - 1) * product) // (nbytes(2 * whole) - least) + 1
    slices = max(-(-p.tile_count // max(room * whole, whole)), -(-p.tile_count // most))
    return Sizes(p, tile, round_up(-(-p.tile_count // slices), whole), depth, targets, parts)


def _dtype(units: Units) -> np.dtype:
    """Return the dtype of a plane in memory."""
    return np.dtype(ml_dtypes.bfloat16) if units.chunk == 8 else _FLOAT32


@lru_cache(maxsize=1024)
def _convolution(g: ConvGeometry, m: int, s: Sizes) -> ConvGeometry:
    """Return the convolution whose gradients the products are: of Y (or M) with U to V."""
    matrices = (m + 2) ** 2 * g.groups
    x_shape, weight_shape = (1, s.tiles, matrices * s.targets), (matrices * s.depth, s.targets, 1)
    made = ConvGeometry.create(x_shape, weight_shape, groups=matrices, data_format="channels_last")
    return made.lifted("channels_last", _FLOAT32)


def _pixels(convolution: ConvGeometry, name: str, units: Units) -> Pixels:
    """Return how "x" (Y) or "grad_output" (V) is read: as planes that are there already."""
    return Pixels.of(replace(convolution, dtype=_dtype(units)), name, units)._replace(staged=False)


def _share(convolution: ConvGeometry, units: Units, s: Sizes) -> Share:
    share = Share.of(convolution, units, 0, s.tile)
    return share._replace(each=-(-share.steps // s.parts), splits=s.parts)


def _products(g: ConvGeometry, direction: str, m: int, units: Units, s: Sizes, architecture: str) -> tuple[Tile, int]:
    """Return the tile of the product, and the products of whole tiles of a slice, in chunks."""
    convolution = _convolution(g, m, s)
    if direction == "weight_grad":
        share = _share(convolution, units, s)
        return share.tile, share.products
    (phase,) = phases(convolution, "input_grad")
    places = Places.of(convolution, "input_grad", phase, units, s.tile, architecture)
    return places.tile, places.products


def _buffers(g: ConvGeometry, direction: str, m: int, units: Units, s: Sizes) -> dict[str, Buffer]:
    convolution, matrices = _convolution(g, m, s), (m + 2) ** 2 * g.groups

    def of(name: str) -> Buffer:
        stored = Element.of(_dtype(units)).stored.name
        return Buffer((units.pixel_planes * _pixels(convolution, name, units).plane,), np.dtype(stored))

    U = matrices, s.depth, s.targets
    if direction == "weight_grad":
        table = tensor_core.table_buffer(convolution, units, _share(convolution, units, s))
        return {"V": of("grad_output"), "Y": of("x"), "pixels": table, "sums": Buffer((s.parts, *U), _FLOAT32)}
    return {
        "U": Buffer(U, _FLOAT32), "V": of("grad_output"), "M": Buffer((s.tiles, matrices, s.targets), _FLOAT32),
        **product_buffers(convolution, "input_grad", units, s.tile),
    }  # fmt: skip


# --- launches --------------------------------------------------------------------------------------------------


class _Launches(Launches):
    """The launches of one direction: all slices have as many tiles, those that there are not are zero."""

    def __init__(self, g: ConvGeometry, direction: str, m: int, units: Units, sizes: Sizes, architecture: str) -> None:
        super().__init__(g, m, sizes, architecture, Planes(Element.of(_dtype(units)), units.pixel_planes))
        self.units, self.convolution = units, _convolution(g, m, sizes)
        self.x, self.grad = (_pixels(self.convolution, name, units) for name in ("x", "grad_output"))
        if direction == "weight_grad":
            self.share = _share(self.convolution, units, sizes)
        else:
            (self.phase,) = phases(self.convolution, "input_grad")
            self.places = Places.of(self.convolution, "input_grad", self.phase, units, sizes.tile, architecture)

    def weight(self) -> list[Step]:
        """U, packed."""
        pack = tensor_core.pack_step(self.convolution, "input_grad", self.phase, self.grad, self.places)
        return [*super().weight(), *_named(pack)]

    def slice(self, first: int, bias: bool, code: int) -> list[Step]:
        """Some tiles from `first` on: V, M and the output."""
        p, s = self.problem, self.sizes
        product = tensor_core.product_step(
            self.convolution, "input_grad", self.phase, self.grad, self.places, False, CODES[None]
        )
        return [
            self._image("grad_output" if p.reversed else "x", "V", first, s.tiles, s.depth),
            *_named(product),
            self._output(first, min(s.tiles, p.tile_count - first), bias, code),
        ]

    def before_gradient(self) -> list[Step]:
        """The table of tiles."""
        return _named(tensor_core.table_step(self.convolution, self.units, self.share, self.x))

    def gradient_of_slice(self, first: int) -> list[Step]:
        """What some tiles from `first` on add to the sums."""
        p, s, convolution = self.problem, self.sizes, self.convolution
        product = tensor_core.correlate_step(convolution, self.units, self.share, self.x, self.grad, first > 0)
        return [
            self._image("x", "V", first, s.tiles, p.depth),
            self._image("grad_output", "Y", first, s.tiles, p.targets),
            *_named(product),
        ]

    def _steps_of_tiles(self, columns: int) -> tuple[int, int, int]:
        matrices = self.t2 * self.g.groups
        return self.g.groups * columns, columns, matrices * columns


def _named(made: Step) -> list[Step]:
    """Return a step with the names that the factors have here."""
    return renamed([made], weight="U", grad_output="V", x="Y", out="M", partial="sums")
