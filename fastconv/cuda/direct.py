"""Direct convolution, any stride, padding, dilation and groups: in tiles, or one output per thread.

    y[n, k, o, p, q] = bias[k] + sum over c, t, r, s of x[n, c, o*stride + t*dilation - pad, ...] * w[k, c, t, r, s]

The input gradient is the same loop nest read backwards: for one input element, the taps that reach it are those where
`i + pad - t*dilation` is a multiple of the stride, every `stride / gcd(stride, dilation)`-th tap from the first on, and
the output moves back by `dilation / gcd(stride, dilation)` from one to the next. So both are one kernel, `gather`, with
another rule for where the taps of an axis begin (`direct_taps.py`). No product with padding is formed: the ranges of
taps are cut instead. Where several filters share what they read, and tiles of pixels are mostly results, both are
computed by `direct_tiled.py`.

The weight gradient is a sum over pixels. A block owns a few elements of the weight and a part of the pixels, adds up
in shared memory, and where there is more than one part a second kernel adds those: always in the same order.

Sums run in chains of at most `CHAIN` products that are then added up, so that float32 keeps its promise at any depth.
Memory layout: x and y in either data format, the weight (K, C // groups, T, R, S) in both. Neighbouring threads write
neighbouring elements. Indices are 32-bit where every tensor has fewer than 2**31 elements. It has run in the emulator,
on no GPU.

Source: Dumoulin & Visin, "A guide to convolution arithmetic for deep learning", 2016, sections 2 and 4.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from ..geometry import ConvGeometry
from ..registry import Buffer
from . import direct_taps, direct_tiled, indices, roofline, toolchain
from .blocking import source_of
from .direct_taps import sum_of_taps
from .direct_tiled import Tile
from .elements import SUPPORTED, Element
from .epilogue import CODES, activate
from .indices import THREADS, digits, divided, index_type, launch, step
from .ptx import pointer_to
from .steps import Step
from .sums import CHAIN, second_pass, shares, tree

cuda = toolchain.import_cuda()

from numba.cuda.types import CPointer  # noqa: E402

# Directions that end in bias and activation.
FUSED = ("forward", "input_grad")
# Shares of the peak that one load per product leaves, and that tiles without idle threads do; not measured.
SHARE, TILED_SHARE = 0.05, 0.6


# --- forward and input gradient --------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def gather(element: Element, direction: str, channels_last: bool, wide: bool, code: int, has_bias: bool) -> Any:
    """Return the kernel that makes `target` of `source`: y of x, or the gradient of x from that of y.

    (A, I, J, L) are the channels and the extent of the target, (B, D, H, W) those of the source, all channels counted;
    a group has `targets` and `sources` of them.
    """
    index, split = index_type(wide), divided(wide)
    sum_up, widen, narrow = sum_of_taps(element, direction, channels_last, wide), element.widen, element.narrow

    def direct_gather(
        source, weight, bias, target, total, A, I, J, L, targets, B, D, H, W, sources, chain, T, R, S,
        weight_group, weight_target, weight_source, stride_d, stride_h, stride_w, pad_d, pad_h, pad_w,
        dilation_d, dilation_h, dilation_w, tap_d, tap_h, tap_w, step_d, step_h, step_w,
    ):  # fmt: skip
        number = index(index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x))
        if number < total:
            if channels_last:
                rest, a = split(number, A)
                rest, l = split(rest, L)
                rest, j = split(rest, J)
                n, i = split(rest, I)
            else:
                rest, l = split(number, L)
                rest, j = split(rest, J)
                rest, i = split(rest, I)
                n, a = split(rest, A)
            group, own = split(a, targets)
            result = sum_up(
                source, weight, n, i, j, l, group, own, B, D, H, W, sources, chain, T, R, S,
                weight_group, weight_target, weight_source, stride_d, stride_h, stride_w, pad_d, pad_h, pad_w,
                dilation_d, dilation_h, dilation_w, tap_d, tap_h, tap_w, step_d, step_h, step_w,
            )  # fmt: skip
            if has_bias:
                result += widen(bias[a])
            target[number] = narrow(activate(result, code))

    direct_gather.__name__ = _name(f"direct_{direction}", element, channels_last, wide)
    return direct_gather


def _name(what: str, element: Element, channels_last: bool, wide: bool) -> str:
    return f"{what}_{element.name}_{'last' if channels_last else 'first'}_{64 if wide else 32}"


# --- weight gradient -------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def correlate(element: Element, channels_last: bool, wide: bool, own: int, pixels: int, to_parts: bool) -> Any:
    """Return the kernel of the weight gradient: blocks of `own` elements of the weight, `pixels` pixels at a time.

    Threads along x have elements of the weight, numbered in the order of memory where channels are first and as
    (K, T, R, S, C // groups) where they are last, so that they read neighbours. A block sums the pixels from
    `blockIdx.y * share` on; with `to_parts` its sums go to (parts, K, C // groups, T, R, S), to be added up.
    """
    index, split = index_type(wide), divided(wide)
    widen, narrow, sums = element.widen, element.narrow, element.sums
    slots, add_rows = own * pixels, tree(wide, own, pixels)

    def direct_correlate(
        grad, x, out, total, share, count, C, D, H, W, K, T, R, S, O, P, Q, filters, channels,
        stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, dilation_d, dilation_h, dilation_w,
        walk_n, walk_o, walk_p, walk_q,
    ):  # fmt: skip
        partial = pointer_to(cuda.shared.array(slots, sums))
        lane, row = index(cuda.threadIdx.x), index(cuda.threadIdx.y)
        number = index(index(cuda.blockIdx.x) * index(own) + lane)
        result, place = sums(0), index(0)
        if number < total:
            if channels_last:
                rest, c = split(number, channels)
                rest, s = split(rest, S)
                rest, r = split(rest, R)
                k, t = split(rest, T)
                pixel, channel, y_pixel, filter_ = C, index(1), K, index(1)
            else:
                rest, s = split(number, S)
                rest, r = split(rest, R)
                rest, t = split(rest, T)
                k, c = split(rest, channels)
                pixel, channel, y_pixel, filter_ = index(1), index(D * H * W), index(1), index(O * P * Q)
            place = index((((k * channels + c) * T + t) * R + r) * S + s)
            first = index((split(k, filters)[0] * channels + c) * channel)
            from_d = index(t * dilation_d - pad_d)
            from_h = index(r * dilation_h - pad_h)
            from_w = index(s * dilation_w - pad_w)
            m = index(index(cuda.blockIdx.y) * share + row)
            end = index(min(index(index(cuda.blockIdx.y) * share + share), count))
            rest, q = split(m, Q)
            rest, p = split(rest, P)
            n, o = split(rest, O)
            while m < end:
                part, stop = sums(0), index(min(index(m + CHAIN * pixels), end))
                while m < stop:
                    d, h, w = index(o * stride_d + from_d), index(p * stride_h + from_h), index(q * stride_w + from_w)
                    if d >= 0 and d < D and h >= 0 and h < H and w >= 0 and w < W:
                        at = index(n * C * D * H * W + first + ((d * H + h) * W + w) * pixel)
                        y_at = index(n * K * O * P * Q + k * filter_ + ((o * P + p) * Q + q) * y_pixel)
                        part += widen(grad[y_at]) * widen(x[at])
                    # The thread's next pixel: numbers of mixed radix are added, carries and all.
                    m = index(m + index(pixels))
                    q, p, o, n = index(q + walk_q), index(p + walk_p), index(o + walk_o), index(n + walk_n)
                    if q >= Q:
                        q, p = index(q - Q), index(p + 1)
                    if p >= P:
                        p, o = index(p - P), index(o + 1)
                    if o >= O:
                        o, n = index(o - O), index(n + 1)
                result += part
        partial[index(row * index(own) + lane)] = result
        add_rows(partial, lane, row)
        if row == 0 and number < total:
            if to_parts:
                out[index(index(cuda.blockIdx.y) * total + place)] = partial[lane]
            else:
                out[place] = narrow(partial[lane])

    direct_correlate.__name__ = _name("direct_weight_grad", element, channels_last, wide)
    return direct_correlate


# --- host ------------------------------------------------------------------------------------------------------


def supports(geometry: ConvGeometry, direction: str) -> tuple[bool, str]:
    """Every geometry of floating-point numbers."""
    if geometry.dtype.name in SUPPORTED:
        return True, ""
    return False, f"on a GPU it computes {', '.join(SUPPORTED)}, not {geometry.dtype}"


def seconds(geometry: ConvGeometry, direction: str, architecture: str) -> float:
    """Predicted time; not measured."""
    used = 0.0 if direction == "weight_grad" else direct_tiled.use(geometry, direction)
    return roofline.seconds(geometry, architecture, max(TILED_SHARE * used, SHARE))


def workspace(
    geometry: ConvGeometry, direction: str, limit: int, threads: int | None = None, tile: Tile | None = None
) -> dict[str, Buffer]:
    """Sums of parts of the pixels, for the weight gradient of a small weight, as many as there is room for."""
    g = geometry
    cut = _shares(g, threads or THREADS, limit)[0] if direction == "weight_grad" else 1
    return {} if cut == 1 else {"parts": Buffer((cut, *g.weight_shape), Element.of(g.dtype).sums_dtype)}


def steps(
    geometry: ConvGeometry,
    direction: str,
    activation: str | None = None,
    bias: bool = False,
    architecture: str = "sm_90a",
    limit: int = 1 << 30,
    threads: int | None = None,
    tile: Tile | None = None,
) -> list[Step]:
    """Return the launches of one direction; forward and input gradient end in bias and activation.

    These are computed in tiles where that serves better. Tests ask for small blocks: with `threads` for one output per
    thread, with `tile` for tiles.
    """
    if direction == "weight_grad":
        return _correlate_steps(geometry, threads or THREADS, limit)
    ending = CODES[activation], bias
    tiled = None if threads else direct_tiled.steps(geometry, direction, *ending, needs_wide(geometry), tile)
    return tiled or [_gather_step(geometry, direction, *ending, threads or THREADS)]


def needs_wide(geometry: ConvGeometry) -> bool:
    """Return whether an index could pass what 32 bits hold."""
    g = geometry
    tensors = (math.prod(shape) for shape in (g.x_shape, g.output_shape, g.weight_shape))
    # Threads beyond the last element count on, and so do pixels beyond the last chain.
    return max(*tensors, *(2 * n for n in g.padded_size)) + CHAIN * THREADS >= 2**31


def _gather_step(g: ConvGeometry, direction: str, code: int, bias: bool, threads: int) -> Step:
    element, wide = Element.of(g.dtype), needs_wide(g)
    x, y = (g.in_channels, *g.input_size), (g.out_channels, *g.output_size)
    target = y if direction == "forward" else x
    total = g.batch * math.prod(target)
    sizes = (total, *target, target[0] // g.groups, *direct_taps.numbers(g, direction))
    kernel = gather(element, direction, g.data_format == "channels_last", wide, code, bias)
    names = (source_of(direction), "weight", "bias", "out")
    arrays = [(name, element.pointer) for name in names]
    return launch(kernel, arrays, sizes, wide, total, threads)


def _correlate_steps(g: ConvGeometry, threads: int, limit: int) -> list[Step]:
    own, pixels = _tile(g, threads)
    cut, share = _shares(g, threads, limit)
    total = math.prod(g.weight_shape)
    element, wide = Element.of(g.dtype), needs_wide(g) or indices.needs_wide((cut + 1, total))
    sizes = (
        total, share, _pixels(g), g.in_channels, *g.input_size, g.out_channels, *g.kernel_size, *g.output_size,
        g.out_channels // g.groups, g.in_channels // g.groups, *g.stride, *_before(g), *g.dilation,
        *digits(pixels, (g.batch + pixels, *g.output_size)),
    )  # fmt: skip
    kernel = correlate(element, g.data_format == "channels_last", wide, own, pixels, cut > 1)
    target = ("parts", CPointer(element.sums)) if cut > 1 else ("out", element.pointer)
    arrays = [("grad_output", element.pointer), ("x", element.pointer), target]
    first = step(kernel, arrays, sizes, wide, (-(-total // own), cut), (own, pixels))
    return [first] if cut == 1 else [first, second_pass(element, wide, total, cut, threads)]


def _tile(g: ConvGeometry, threads: int) -> tuple[int, int]:
    """Return (elements, pixels) of a block: neighbouring threads read pixels, or where channels are last channels."""
    own = max(threads // (4 if g.data_format == "channels_last" else 32), 1)
    return own, threads // own


def _shares(g: ConvGeometry, threads: int, limit: int) -> tuple[int, int]:
    """Return how many shares the pixels of the weight gradient are cut in, and the pixels of one."""
    (own, pixels), elements = _tile(g, threads), math.prod(g.weight_shape)
    room = limit // (elements * Element.of(g.dtype).sums_dtype.itemsize)
    return shares(_pixels(g), -(-elements // own), pixels, room)


def _before(g: ConvGeometry) -> tuple[int, ...]:
    return tuple(before for before, _ in g.padding)


def _pixels(g: ConvGeometry) -> int:
    return g.batch * math.prod(g.output_size)
