"""im2col on a GPU: lay every window out as a column, then matrix products by cuBLAS, through the library of the arrays.

    channels_first   y (G, K, L) = w (G, K, C*T*R*S) @ columns (G, C*T*R*S, L)
    channels_last    y (G, L, K) = columns (G, L, T*R*S*C) @ w (G, T*R*S*C, K)

(Chellapilla, Puri & Simard, "High performance convolutional neural networks for document processing", 2006, section 2.)
The input gradient is the product with the transposed weight, which every pixel of the input gathers its share of; the
weight gradient the product of the output's gradient with the columns, in chains of pixels that are then added up in
order, and in chains too. Groups, and chains, are matrices side by side. All of them are contiguous, because CuPy
copies others; L pixels are done at a time, as many as the workspace limit has room for.

Products of float16 are rounded to float16 where cuBLAS writes them; all that is added up afterwards is in float32.
cuBLAS sums in float32 as long as the library does not let it round to tf32, which neither CuPy nor PyTorch does unless
told to. The kernels have run in the emulator with NumPy's products between them, on no GPU.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

from ..geometry import ConvGeometry
from ..registry import Buffer
from . import roofline, toolchain
from .elements import Element
from .epilogue import CODES, activate
from .indices import divided, image_strides, index_type, launch, meeting, needs_wide
from .lanes import loader, storer, widest
from .steps import Call, Step, renamed
from .sums import CHAIN, chained

cuda = toolchain.import_cuda()

from numba.cuda.types import CPointer  # noqa: E402

# Bytes of workspace in all, unless one pixel needs more.
MOST_BYTES = 256 << 20
# Share of the peak that products reach; not measured.
SHARE = 0.8


# --- kernels ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def columns(element: Element, pixels_inside: bool, channels_inside: bool, lanes: int, wide: bool) -> Any:
    """Return the kernel that lays windows out: (chains, G, depth, pixels) or (chains, G, pixels, depth).

    The depth is (C, taps) or with `channels_inside` (taps, C); beyond the pixels up to `end` there are zeros.
    """
    index, divide, sums = index_type(wide), divided(wide), element.sums
    load, store = loader(element, lanes), storer(element, lanes)

    def im2col_columns(
        x, matrix, total, L, depth, G, first, end, C, taps, R, S, O, P, Q, D, H, W, image_step, channel_step,
        pixel_step, stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, dilation_d, dilation_h, dilation_w,
    ):  # fmt: skip
        number = index(index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x))
        if number < total:
            if pixels_inside:
                rest, pixel = divide(number, L)
                rest, k = divide(rest, depth)
            else:
                rest, k = divide(index(number * lanes), depth)
                rest, pixel = divide(rest, L)
            chain, group = divide(rest, G)
            pixel = index(first + chain * L + pixel)
            tap, c = divide(k, C)
            if not channels_inside:
                c, tap = divide(k, taps)
            rest, s = divide(tap, S)
            t, r = divide(rest, R)
            rest, q = divide(pixel, Q)
            rest, p = divide(rest, P)
            n, o = divide(rest, O)
            d = index(o * stride_d + t * dilation_d - pad_d)
            h = index(p * stride_h + r * dilation_h - pad_h)
            w = index(q * stride_w + s * dilation_w - pad_w)
            values = cuda.local.array(lanes, sums)
            if pixel < end and d >= 0 and d < D and h >= 0 and h < H and w >= 0 and w < W:
                channel = index((group * C + c) * channel_step)
                load(x, index(n * image_step + channel + ((d * H + h) * W + w) * pixel_step), values, 0)
            else:
                for lane in range(lanes):
                    values[lane] = sums(0)
            store(matrix, index(number * lanes), values, 0)

    im2col_columns.__name__ = f"im2col_columns_{element.name}_lanes{lanes}"
    return im2col_columns


@lru_cache(maxsize=16)
def pack(element: Element, filters_inside: bool, channels_inside: bool, wide: bool) -> Any:
    """Return the kernel that packs the weight (G, K, C, taps) to (G, depth, K) or (G, K, depth)."""
    index, divide = index_type(wide), divided(wide)

    def im2col_pack(weight, packed, total, K, depth, C, taps):
        number = index(index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x))
        if number < total:
            if filters_inside:
                rest, k = divide(number, K)
                group, at = divide(rest, depth)
            else:
                rest, at = divide(number, depth)
                group, k = divide(rest, K)
            tap, c = divide(at, C)
            if not channels_inside:
                c, tap = divide(at, taps)
            packed[number] = weight[index(((group * K + k) * C + c) * taps + tap)]

    im2col_pack.__name__ = f"im2col_pack_{element.name}"
    return im2col_pack


@lru_cache(maxsize=64)
def place(element: Element, pixels_inside: bool, lanes: int, wide: bool, has_bias: bool, code: int) -> Any:
    """Return the kernel that puts products (G, K, L) or (G, L, K) into the output, through bias and activation."""
    index, divide, sums, widen = index_type(wide), divided(wide), element.sums, element.widen
    load, store = loader(element, lanes), storer(element, lanes)

    def im2col_place(product, bias, out, total, K, L, first, pixels, image_step, channel_step, pixel_step):
        number = index(index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x))
        if number < total:
            if pixels_inside:
                rest, pixel = divide(number, L)
                group, k = divide(rest, K)
            else:
                rest, k = divide(index(number * lanes), K)
                group, pixel = divide(rest, L)
            n, at = divide(index(first + pixel), pixels)
            channel = index(group * K + k)
            values = cuda.local.array(lanes, sums)
            load(product, index(number * lanes), values, 0)
            for lane in range(lanes):
                if has_bias:
                    values[lane] += widen(bias[index(channel + lane)])
                values[lane] = activate(values[lane], code)
            store(out, index(n * image_step + channel * channel_step + at * pixel_step), values, 0)

    im2col_place.__name__ = f"im2col_place_{element.name}_lanes{lanes}"
    return im2col_place


@lru_cache(maxsize=16)
def gather(element: Element, pixels_inside: bool, wide: bool) -> Any:
    """Return the kernel of col2im: each pixel of the input sums what the columns have for it, of some output pixels."""
    index, divide, sums = index_type(wide), divided(wide), element.sums
    widen, narrow, source_of = element.widen, element.narrow, meeting(wide)

    def im2col_gather(
        matrix, out, total, start, add, L, depth, first, C, G, T, R, S, O, P, Q, D, H, W,
        stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, dilation_d, dilation_h, dilation_w,
    ):  # fmt: skip
        number = index(index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x))
        if number < total:
            number = index(start + number)
            if pixels_inside:
                rest, w = divide(number, W)
                rest, h = divide(rest, H)
                rest, d = divide(rest, D)
                rest, c = divide(rest, C)
                n, group = divide(rest, G)
            else:
                rest, c = divide(number, C)
                rest, group = divide(rest, G)
                rest, w = divide(rest, W)
                rest, h = divide(rest, H)
                n, d = divide(rest, D)
            value = sums(0)
            for t in range(T):
                o = source_of(index(d + pad_d - t * dilation_d), stride_d, O)
                for r in range(R):
                    p = source_of(index(h + pad_h - r * dilation_h), stride_h, P)
                    for s in range(S):
                        q = source_of(index(w + pad_w - s * dilation_w), stride_w, Q)
                        pixel = index(((n * O + o) * P + p) * Q + q - first)
                        if o >= 0 and p >= 0 and q >= 0 and pixel >= 0 and pixel < L:
                            tap = index((t * R + r) * S + s)
                            if pixels_inside:
                                value += widen(matrix[index((group * depth + c * (T * R * S) + tap) * L + pixel)])
                            else:
                                value += widen(matrix[index((group * L + pixel) * depth + tap * C + c)])
            if add > 0:
                value += widen(out[number])
            out[number] = narrow(value)

    im2col_gather.__name__ = f"im2col_gather_{element.name}"
    return im2col_gather


@lru_cache(maxsize=8)
def add_chains(element: Element, channels_inside: bool, wide: bool) -> Any:
    """Return the kernel that adds up chains (chains, G*K, depth) in order, to the weight gradient (G*K, C, taps).

    `continues` says to add what "part" holds of launches before; the sum goes there, or if `ends` to `out`, which holds
    what `adds` says to add it to.
    """
    index, divide, narrow, add_up = index_type(wide), divided(wide), element.narrow, chained(element, wide)

    def im2col_add_chains(product, part, out, total, chains, continues, ends, adds, C, taps):
        number = index(index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x))
        if number < total:
            at = number
            if channels_inside:
                rest, tap = divide(number, taps)
                k, c = divide(rest, C)
                at = index((k * taps + tap) * C + c)
            value = add_up(product, at, total, chains)
            if continues > 0:
                value += part[number]
            if ends > 0:
                if adds > 0:
                    value += out[number]
                out[number] = narrow(value)
            else:
                part[number] = value

    im2col_add_chains.__name__ = f"im2col_add_chains_{element.name}"
    return im2col_add_chains


# --- host ------------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """What is done at a time: pixels of the output, and of the weight gradient chains of so many pixels."""

    pixels: int
    chains: int = 1


def supports(geometry: ConvGeometry, direction: str) -> tuple[bool, str]:
    """Every geometry of the dtypes that CuPy has products of."""
    if geometry.dtype.name in ("float32", "float64", "float16"):
        return True, ""
    return False, f"on a GPU its products are of float32, float64 and float16, not {geometry.dtype}"


def seconds(geometry: ConvGeometry, direction: str, architecture: str) -> float:
    """Predicted time: the product, and columns that are written and read; not measured.

    No product of float16 is taken to be faster than of float32: CuPy has not always used tensor cores for it.
    """
    g, block = geometry, _block(geometry, direction, MOST_BYTES)
    blocks = -(-_pixels(g) // (block.pixels * block.chains))
    moved = 2 * g.batch * math.prod(g.output_size) * g.groups * g.reduction_length * g.dtype.itemsize
    return roofline.seconds(g, architecture, SHARE, 1 + 3 * blocks) + moved / roofline.peak(architecture).bytes


def workspace(geometry: ConvGeometry, direction: str, limit: int) -> dict[str, Buffer]:
    """Columns and products of some pixels, and the packed weight."""
    g, (L, chains) = geometry, _block(geometry, direction, limit)
    K, depth = g.out_channels // g.groups, g.reduction_length
    shapes: dict[str, tuple[int, ...]]
    if direction == "weight_grad":
        shapes = {
            "columns": (chains, g.groups, L, depth),
            "grads": (chains, g.groups, K, L),
            "product": (chains, g.groups, K, depth),
        }
    elif direction == "input_grad":
        shapes = {
            "packed": (g.groups, depth, K),
            "grads": (g.groups, K, L),
            "columns": (g.groups, depth, L),
        }
    else:
        shapes = {"columns": (g.groups, depth, L), "product": (g.groups, K, L)}
        if g.data_format == "channels_last":
            shapes["packed"] = (g.groups, depth, K)
    buffers = {name: Buffer(shape, g.dtype) for name, shape in shapes.items()}
    if direction == "weight_grad" and _has_part(g):
        buffers["part"] = Buffer((g.groups, K, depth), Element.of(g.dtype).sums_dtype)
    return buffers


def steps(
    geometry: ConvGeometry,
    direction: str,
    activation: str | None = None,
    bias: bool = False,
    architecture: str = "sm_90a",
    limit: int = 1 << 30,
) -> list[Step | Call]:
    """Return the launches and products of one direction; forward ends in bias and activation."""
    launches = _Launches(geometry, _block(geometry, direction, limit))
    if direction == "weight_grad":
        return launches.weight_grad()
    return launches.input_grad() if direction == "input_grad" else launches.forward(bias, CODES[activation])


def unfold(geometry: ConvGeometry) -> list[Step]:
    """Return the launch from "x", (N, C, *spatial), to "out", (N, C*taps, pixels): all windows as columns."""
    images = _side_by_side(geometry)
    return renamed([images.columns("x", True, 0, images.total)], columns="out")


def fold(geometry: ConvGeometry) -> list[Step]:
    """Return the launch from "columns", (N, C*taps, pixels), to "out", (N, C, *spatial): the sums for each pixel."""
    images = _side_by_side(geometry)
    return [images.gather(0, 1, 0, images.total, False)]


def _side_by_side(g: ConvGeometry) -> _Launches:
    """Return the launches of one image whose groups are the images of a batch: channels first, one filter each."""
    inside = replace(g, batch=1, in_channels=g.batch * g.in_channels, out_channels=g.batch, groups=g.batch)
    return _Launches(inside, Block(_pixels(inside)))


def _pixels(g: ConvGeometry) -> int:
    return g.batch * math.prod(g.output_size)


@lru_cache(maxsize=1024)
def _block(g: ConvGeometry, direction: str, limit: int) -> Block:
    """Return as many pixels as the limit has room for, at least one, and all blocks alike."""
    K, depth, total, limit = g.out_channels // g.groups, g.reduction_length, _pixels(g), min(limit, MOST_BYTES)
    size = g.groups * g.dtype.itemsize
    if direction == "weight_grad":
        pixels = min(CHAIN, total)
        limit -= g.groups * K * depth * Element.of(g.dtype).sums_dtype.itemsize if _has_part(g) else 0
        chains = _even(-(-total // pixels), limit // (size * (pixels * (K + depth) + K * depth)))
        return Block(pixels, chains)
    packed = direction == "input_grad" or g.data_format == "channels_last"
    room = (limit - (K * depth * size if packed else 0)) // (size * (K + depth))
    if direction == "forward":
        return Block(_even(total, room))
    # Whole images, so that each pixel of the input is written once; or else parts of one, whose sums are rounded.
    image = math.prod(g.output_size)
    whole = room >= image or _is_half(g)
    return Block(_even(g.batch, room // image) * image if whole else _even(image, room))


def _is_long(g: ConvGeometry) -> bool:
    """Return whether there may be so many launches for the weight gradient that what they add must be chains too."""
    return _pixels(g) > CHAIN * CHAIN


def _is_half(g: ConvGeometry) -> bool:
    return g.dtype.itemsize < 4


def _has_part(g: ConvGeometry) -> bool:
    """Return whether what launches for the weight gradient add is kept apart: in chains, or because it is rounded."""
    return _is_long(g) or _is_half(g)


def _even(count: int, most: int) -> int:
    """Return how many to take at a time, at most so many: the same number each time."""
    return -(-count // -(-count // min(max(most, 1), count)))


class _Launches:
    """The launches and products of one convolution."""

    def __init__(self, g: ConvGeometry, block: Block) -> None:
        self.g, self.block = g, block
        self.last = g.data_format == "channels_last"
        self.element = Element.of(g.dtype)
        self.G, self.C, self.K = g.groups, g.in_channels // g.groups, g.out_channels // g.groups
        self.taps, self.depth, self.total = math.prod(g.kernel_size), g.reduction_length, _pixels(g)
        at_once = block.pixels * block.chains * self.G
        self.wide = needs_wide(
            g.x_shape, g.output_shape, g.weight_shape, at_once * self.depth, at_once * self.K,
            block.chains * math.prod(g.weight_shape), *g.padded_size,
        )  # fmt: skip

    def forward(self, bias: bool, code: int) -> list[Step | Call]:
        """Columns, product and output, block by block."""
        G, K, depth = self.G, self.K, self.depth
        made: list[Step | Call] = [self._pack(True)] if self.last else []
        for first in range(0, self.total, self.block.pixels):
            L = min(self.block.pixels, self.total - first)
            made.append(self.columns("x", not self.last, first, L))
            if self.last:
                made.append(_product("columns", "packed", "product", G, L, depth, K))
            else:
                made.append(_product("weight", "columns", "product", G, K, depth, L))
            made.append(self._place(first, L, bias, code))
        return made

    def input_grad(self) -> list[Step | Call]:
        """Output gradients as a matrix, product, and what the input gathers of it, block by block."""
        G, K, depth, image = self.G, self.K, self.depth, math.prod(self.g.output_size)
        made: list[Step | Call] = [self._pack(not self.last)]
        for start in range(0, self.total, max(self.block.pixels, image)):
            end = min(start + max(self.block.pixels, image), self.total)
            for first in range(start, end, self.block.pixels):
                L = min(self.block.pixels, end - first)
                made.append(self.columns("grad_output", not self.last, first, L))
                if self.last:
                    made.append(_product("grads", "packed", "columns", G, L, K, depth))
                else:
                    made.append(_product("packed", "grads", "columns", G, depth, K, L))
                made.append(self.gather(start // image, -(-end // image), first, L, first > start))
        return made

    def weight_grad(self) -> list[Step | Call]:
        """Columns and output gradients, products of chains, and their sums, block by block."""
        g, G, K, depth, L = self.g, self.G, self.K, self.depth, self.block.pixels
        made: list[Step | Call] = []
        elements, starts = math.prod(g.weight_shape), range(0, self.total, L * self.block.chains)
        together = len(starts) if _is_half(g) else CHAIN if _is_long(g) else 1
        for turn, first in enumerate(starts):
            chains = min(self.block.chains, -(-(self.total - first) // L))
            made.append(self.columns("x", False, first, L, chains))
            made.append(self.columns("grad_output", True, first, L, chains))
            made.append(_product("grads", "columns", "product", chains * G, K, L, depth))
            kernel, place, ends = add_chains(self.element, self.last, self.wide), turn % together, first == starts[-1]
            flags = place > 0, ends or place == together - 1, turn >= together
            numbers = (elements, chains, *map(int, flags), self.C, self.taps)
            made.append(self._step(kernel, ("product", "part" if _has_part(g) else "out", "out"), numbers, elements))
        return made

    def columns(self, source: str, pixels_inside: bool, first: int, L: int, chains: int = 1) -> Step:
        """Windows of x, or the output gradient as the windows of a kernel of one tap."""
        g, ones, zeros = self.g, (1, 1, 1), (0, 0, 0)
        C, kernel, size, target = self.C, g.kernel_size, g.input_size, "columns"
        moves = (*g.stride, *(before for before, _ in g.padding), *g.dilation)
        if source == "grad_output":
            C, kernel, size, target, moves = self.K, ones, g.output_size, "grads", (*ones, *zeros, *ones)
        depth = C * math.prod(kernel)
        lanes = widest(g.dtype, C) if self.last and not pixels_inside else 1
        total = chains * self.G * L * depth // lanes
        numbers = (
            total, L, depth, self.G, first, self.total, C, math.prod(kernel), *kernel[1:], *g.output_size, *size,
            *image_strides(self.G * C, size, self.last), *moves,
        )  # fmt: skip
        made = columns(self.element, pixels_inside, self.last, lanes, self.wide)
        return self._step(made, (source, target), numbers, total)

    def _pack(self, filters_inside: bool) -> Step:
        total = math.prod(self.g.weight_shape)
        kernel = pack(self.element, filters_inside, self.last, self.wide)
        return self._step(kernel, ("weight", "packed"), (total, self.K, self.depth, self.C, self.taps), total)

    def _place(self, first: int, L: int, bias: bool, code: int) -> Step:
        g = self.g
        lanes = widest(g.dtype, self.K) if self.last else 1
        total = self.G * self.K * L // lanes
        strides = image_strides(g.out_channels, g.output_size, self.last)
        numbers = (total, self.K, L, first, math.prod(g.output_size), *strides)
        kernel = place(self.element, not self.last, lanes, self.wide, bias, code)
        return self._step(kernel, ("product", "bias", "out"), numbers, total)

    def gather(self, first_image: int, last_image: int, first: int, L: int, add: bool) -> Step:
        g = self.g
        image = g.in_channels * math.prod(g.input_size)
        total = (last_image - first_image) * image
        numbers = (
            total, first_image * image, int(add), L, self.depth, first, self.C, self.G, *g.kernel_size,
            *g.output_size, *g.input_size, *g.stride, *(before for before, _ in g.padding), *g.dilation,
        )  # fmt: skip
        kernel = gather(self.element, not self.last, self.wide)
        return self._step(kernel, ("columns", "out"), numbers, total)

    def _step(self, kernel: Any, names: tuple[str, ...], numbers: tuple[int, ...], total: int) -> Step:
        kinds = {"part": CPointer(self.element.sums)}
        arrays = [(name, kinds.get(name, self.element.pointer)) for name in names]
        return launch(kernel, arrays, numbers, self.wide, total)


def _product(a: str, b: str, out: str, batch: int, rows: int, depth: int, columns: int) -> Call:
    return Call("matmul", (a, b, out), ((batch, rows, depth), (batch, depth, columns), (batch, rows, columns)))
