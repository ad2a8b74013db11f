"""Direct convolution: one output element per thread, any stride, padding, dilation and groups.

    y[n, k, o, p, q] = bias[k] + sum over c, t, r, s of x[n, c, o*stride + t*dilation - pad, ...] * w[k, c, t, r, s]

The input gradient is the same loop nest read backwards: for one input element, the taps that reach it are those where
`i + pad - t*dilation` is a multiple of the stride, every `stride / gcd(stride, dilation)`-th tap from the first on, and
the output moves back by `dilation / gcd(stride, dilation)` from one to the next. So both are one kernel, `gather`, with
another rule for where the taps of an axis begin. No product with padding is formed: the ranges of taps are cut instead.

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
from . import indices, roofline, toolchain
from .elements import SUPPORTED, Element
from .epilogue import CODES, activate
from .indices import digits, divided, index_type, quotient, step
from .ptx import pointer_to
from .steps import Step
from .sums import CHAIN, second_pass, shares, tree

cuda = toolchain.import_cuda()

from numba.cuda.types import CPointer  # noqa: E402

# Threads of a block: four warps hide each other's loads, and a small layer still fills the multiprocessors.
THREADS = 128
# Directions that end in bias and activation.
FUSED = ("forward", "input_grad")
# Share of the peak that one load per product leaves; not measured.
SHARE = 0.05


# --- the taps of one axis --------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def taps_of_output(wide: bool) -> Any:
    """Return the rule of the forward pass: which taps of an output are inside the input."""
    index, over = index_type(wide), quotient(wide)

    def taps(at, size, count, stride, before, dilation, tap_step, step):
        """Return (first tap, its place in the input, how many there are)."""
        start = index(at * stride - before)
        first = index(over(index(max(-start, 0) + dilation - 1), dilation))
        place = index(start + first * dilation)
        inside = index(0)
        if place < size:
            inside = index(over(index(size - 1 - place), dilation) + 1)
        return first, place, index(min(inside, count - first))

    return taps


@lru_cache(maxsize=2)
def taps_of_input(wide: bool) -> Any:
    """Return the rule of the input gradient: through which taps an input reaches which outputs."""
    index, over = index_type(wide), quotient(wide)

    def taps(at, size, count, stride, before, dilation, tap_step, step):
        """Return (first tap, its place in the output, how many there are); places go down by -step."""
        rest = index(at + before)
        first = index(0)
        # Residues repeat after tap_step taps.
        while first < tap_step and rest > 0 and index(index(over(rest, stride)) * stride) != rest:
            first = index(first + 1)
            rest = index(rest - dilation)
        if rest < 0 or first == tap_step:
            return index(0), index(0), index(0)
        place = index(over(rest, stride))
        # The last places are beyond the output where the input has a border that no window reaches.
        back = index(-step)
        skipped = index(over(index(max(place - size + 1, 0) + back - 1), back))
        first, place = index(first + skipped * tap_step), index(place - skipped * back)
        if place < 0 or first >= count:
            return index(0), index(0), index(0)
        left = index(over(index(count - 1 - first), tap_step) + 1)
        return first, place, index(min(left, index(over(place, back) + 1)))

    return taps


# --- forward and input gradient --------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def gather(element: Element, direction: str, channels_last: bool, wide: bool, code: int, has_bias: bool) -> Any:
    """Return the kernel that makes `target` of `source`: y of x, or the gradient of x from that of y.

    (A, I, J, L) are the channels and the extent of the target, (B, D, H, W) those of the source, all channels counted;
    a group has `targets` and `sources` of them.
    """
    index, split = index_type(wide), divided(wide)
    taps = (taps_of_output if direction == "forward" else taps_of_input)(wide)
    widen, narrow, sums = element.widen, element.narrow, element.sums

    def direct_gather(
        source, weight, bias, target, total, A, I, J, L, B, D, H, W, targets, sources, chain, T, R, S,
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
                pixel, channel = B, index(1)
            else:
                rest, l = split(number, L)
                rest, j = split(rest, J)
                rest, i = split(rest, I)
                n, a = split(rest, A)
                pixel, channel = index(1), index(D * H * W)
            group, own = split(a, targets)
            t0, d0, count_t = taps(i, D, T, stride_d, pad_d, dilation_d, tap_d, step_d)
            r0, h0, count_r = taps(j, H, R, stride_h, pad_h, dilation_h, tap_h, step_h)
            s0, w0, count_s = taps(l, W, S, stride_w, pad_w, dilation_w, tap_w, step_w)
            first = index(n * B * D * H * W + group * sources * channel)
            filters = index(group * weight_group + own * weight_target)
            result = sums(0)
            for start in range(index(0), sources, chain):
                part = sums(0)
                for b in range(start, index(min(index(start + chain), sources))):
                    for t in range(count_t):
                        d, plane = index(d0 + t * step_d), index((t0 + t * tap_d) * R)
                        for r in range(count_r):
                            h, row = index(h0 + r * step_h), index((plane + r0 + r * tap_h) * S + s0)
                            at = index(first + b * channel + ((d * H + h) * W + w0) * pixel)
                            tap = index(filters + b * weight_source + row)
                            for _ in range(count_s):
                                part += widen(source[at]) * widen(weight[tap])
                                at = index(at + step_w * pixel)
                                tap = index(tap + tap_w)
                result += part
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
    return roofline.seconds(geometry, architecture, SHARE)


def workspace(geometry: ConvGeometry, direction: str, limit: int, threads: int = THREADS) -> dict[str, Buffer]:
    """Sums of parts of the pixels, for the weight gradient of a small weight, as many as there is room for."""
    g = geometry
    cut = _shares(g, threads, limit)[0] if direction == "weight_grad" else 1
    return {} if cut == 1 else {"parts": Buffer((cut, *g.weight_shape), Element.of(g.dtype).sums_dtype)}


def steps(
    geometry: ConvGeometry,
    direction: str,
    activation: str | None = None,
    bias: bool = False,
    architecture: str = "sm_90a",
    limit: int = 1 << 30,
    threads: int = THREADS,
) -> list[Step]:
    """Return the launches of one direction; forward and input gradient end in bias and activation."""
    if direction == "weight_grad":
        return _correlate_steps(geometry, threads, limit)
    return [_gather_step(geometry, direction, CODES[activation], bias, threads)]


def needs_wide(geometry: ConvGeometry) -> bool:
    """Return whether an index could pass what 32 bits hold."""
    g = geometry
    tensors = (math.prod(shape) for shape in (g.x_shape, g.output_shape, g.weight_shape))
    # Threads beyond the last element count on, and so do pixels beyond the last chain.
    return max(*tensors, *(2 * n for n in g.padded_size)) + CHAIN * THREADS >= 2**31


def _gather_step(g: ConvGeometry, direction: str, code: int, bias: bool, threads: int) -> Step:
    forward, element, wide = direction == "forward", Element.of(g.dtype), needs_wide(g)
    x, y = (g.in_channels, *g.input_size), (g.out_channels, *g.output_size)
    target, source = (y, x) if forward else (x, y)
    taps = math.prod(g.kernel_size)
    # Elements of the weight from one filter to the next.
    one_filter = taps * g.in_channels // g.groups
    common = [math.gcd(s, d) for s, d in zip(g.stride, g.dilation)]
    tap_steps = [1 if forward else s // c for s, c in zip(g.stride, common)]
    source_steps = [d if forward else -(d // c) for d, c in zip(g.dilation, common)]
    total = g.batch * math.prod(target)
    sizes = (
        total, *target, *source, target[0] // g.groups, source[0] // g.groups, max(CHAIN // taps, 1), *g.kernel_size,
        one_filter * g.out_channels // g.groups, *((one_filter, taps) if forward else (taps, one_filter)),
        *g.stride, *_before(g), *g.dilation, *tap_steps, *source_steps,
    )  # fmt: skip
    kernel = gather(element, direction, g.data_format == "channels_last", wide, code, bias)
    names = ("x" if forward else "grad_output", "weight", "bias", "out")
    arrays = [(name, element.pointer) for name in names]
    return step(kernel, arrays, sizes, wide, (-(-total // threads),), (threads,))


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
