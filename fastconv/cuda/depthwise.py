"""Depthwise convolution: every channel by itself, so that memory is what it waits for.

    forward       y[n, k, i] = sum over taps  x[n, c, i*stride + tap*dilation - before] * w[k, tap] k = c*multiplier + m
    input_grad    dx[n, c, j] = the same sum over the taps and outputs that j takes part in
    weight_grad   dw[k, tap] = sum over pixels  x[n, c, i*stride + tap*dilation - before] * dy[n, k, i]

`slide_lanes` has one pixel of neighbouring channels in a thread (of one channel in any format, where vectors do not
fit), the weight packed to (taps, K) before. `slide_rows` has neighbours of a row, where channels are first: the stretch
that they share is loaded by aligned vectors to registers, and kernel, stride, padding and dilation are constants, so
that each product is a choice of registers. Windows overlap in the caches: memory is read and written once.

The weight gradient has neighbouring channels and some pixels in a block, or pixels of one channel where those are
first; sums of taps are in registers, then in shared memory, and a second kernel adds up the blocks of a channel.
It has run in the emulator, on no GPU.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

from ..geometry import ConvGeometry
from ..registry import Buffer
from . import roofline, toolchain
from .elements import SUPPORTED, Element
from .epilogue import CODES, activate
from .indices import (
    THREADS,
    constant_division,
    divisor,
    divisors,
    index_type,
    launch,
    meeting,
    needs_wide,
    quotient,
    step,
)
from .lanes import MOST_STRETCH, Stretch, loader, storer, widest
from .ptx import pointer_to
from .steps import Step
from .sums import second_pass, shares, tree

cuda = toolchain.import_cuda()

from numba.cuda.types import CPointer  # noqa: E402

# Products per sum: the rounding error of a float32 sum grows with its length.
MOST_TAPS = 4096
# Taps of a kernel that is unrolled.
MOST_UNROLLED = 25
# Sums of a weight gradient that a thread holds in registers.
MOST_SUMS = 36
# Directions that end in bias and activation.
FUSED = ("forward", "input_grad")
# Shares of the peak of arithmetic and of bandwidth that are hoped for; not measured.
SHARE, BANDWIDTH_SHARE = 0.2, 0.85


class How(NamedTuple):
    """The constants of a kernel; `kernel` is (T, R, S), or zeros where it is not unrolled.

    The stride is one of them because the input gradient divides by it at every tap.
    """

    element: Element
    backward: bool
    channels_last: bool
    wide: bool
    lanes: int
    kernel: tuple[int, int, int]
    stride: tuple[int, ...]
    code: int
    has_bias: bool


# --- forward and input gradient --------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def tap_rule(backward: bool, wide: bool) -> Any:
    """Return the function that tells where a tap meets the source of a target, or -1."""
    index, meets = index_type(wide), meeting(wide)

    def of_output(at, tap, size, stride, before, dilation):
        place = index(at * stride + tap * dilation - before)
        return place if place < size else index(-1)

    def of_input(at, tap, size, stride, before, dilation):
        return meets(index(at + before - tap * dilation), stride, size)

    return of_input if backward else of_output


@lru_cache(maxsize=8)
def pack(element: Element, wide: bool) -> Any:
    """Return the kernel that packs the weight (K, taps) to (taps, K)."""
    index, split = index_type(wide), constant_division(wide)

    def depthwise_pack(weight, packed, total, K, k_m, k_s, taps):
        number = index(index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x))
        if number < total:
            tap, k = split(number, K, k_m, k_s)
            packed[number] = weight[index(k * taps + tap)]

    return depthwise_pack


@lru_cache(maxsize=128)
def slide_lanes(how: How) -> Any:
    """Return the kernel in which a thread has one pixel of `lanes` channels of the target; see `_numbers`.

    The target is (outer, I, J, L, V*lanes) with planes of one channel outside, or images with channels inside.
    """
    element, backward, channels_last, wide, lanes, kernel, (step_o, step_p, step_q), code, has_bias = how
    index, split, meets, over = index_type(wide), constant_division(wide), tap_rule(backward, wide), quotient(wide)
    load, store, sums, widen = loader(element, lanes), storer(element, lanes), element.sums, element.widen
    own_T, own_R, own_S = kernel

    def slide(
        source, weight, bias, target, total, V, v_m, v_s, L, l_m, l_s, J, j_m, j_s, I, i_m, i_s, D, H, W, C, M,
        T_, R_, S_, pad_d, pad_h, pad_w, step_d, step_h, step_w,
    ):  # fmt: skip
        number = index(index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x))
        if number < total:
            T, R, S = (own_T, own_R, own_S) if own_S > 0 else (T_, R_, S_)
            rest, v = split(number, V, v_m, v_s)
            rest, l = split(rest, L, l_m, l_s)
            rest, j = split(rest, J, j_m, j_s)
            n, i = split(rest, I, i_m, i_s)
            # Channels of the source, of which there are `apart` in a pixel, and of the weight.
            own, image = (index(v * lanes), n) if channels_last else (index(n - over(n, C) * C), over(n, C))
            per_target = M if backward else index(1)
            channel = index(own * M) if backward else over(own, M)
            results, values = cuda.local.array(lanes, sums), cuda.local.array(lanes, sums)
            factors = cuda.local.array(lanes, sums)
            for lane in range(lanes):
                results[lane] = sums(0)
            channels = index(C * M) if backward else over(C, M)
            apart, plane = (channels, index(0)) if channels_last else (index(1), index(D * H * W))
            for m in range(per_target):
                from_ = index((image * channels) * D * H * W + (channel + m) * (index(1) if channels_last else plane))
                k = index(channel + m) if backward else own
                for t in range(T):
                    d = meets(i, index(t), D, index(step_o), pad_d, step_d)
                    for r in range(R):
                        h = meets(j, index(r), H, index(step_p), pad_h, step_h)
                        for s in range(S):
                            w = meets(l, index(s), W, index(step_q), pad_w, step_w)
                            if d >= 0 and h >= 0 and w >= 0:
                                tap = index((t * R + r) * S + s)
                                load(source, index(from_ + ((d * H + h) * W + w) * apart), values, 0)
                                if lanes > 1:
                                    load(weight, index(tap * C + own), factors, 0)
                                else:
                                    factors[0] = widen(weight[index(k * T * R * S + tap)])
                                for lane in range(lanes):
                                    results[lane] += values[lane] * factors[lane]
            if has_bias:
                for lane in range(lanes):
                    results[lane] += widen(bias[index(own + lane)])
            for lane in range(lanes):
                results[lane] = activate(results[lane], code)
            store(target, index(number * lanes), results, 0)

    slide.__name__ = f"depthwise_{'input_grad' if backward else 'forward'}_lanes{lanes}_{element.name}"
    return slide


@lru_cache(maxsize=128)
def slide_rows(how: How, stretch: Stretch) -> Any:
    """Return the kernel in which a thread has neighbours of a row of one plane; arguments as of `slide_lanes`.

    Forward those are `lanes` outputs, backward `lanes * stride` inputs; V is 1, and L counts threads of a row.
    """
    element, backward, _, wide, lanes, (own_T, own_R, kernel), (step_o, step_p, _), code, has_bias = how
    _, stride, before, dilation, load_lanes, lead, offset, vectors = stretch
    index, split, meets, over = index_type(wide), constant_division(wide), tap_rule(backward, wide), quotient(wide)
    load, store, sums, widen = loader(element, load_lanes), storer(element, lanes), element.sums, element.widen
    pieces = stride if backward else 1
    registers, count, advance = vectors * load_lanes, lanes * pieces, lanes if backward else lanes * stride

    def slide(
        source, weight, bias, target, total, V, v_m, v_s, L, l_m, l_s, J, j_m, j_s, I, i_m, i_s, D, H, W, C, M,
        T_, R_, S_, pad_d, pad_h, pad_w, step_d, step_h, step_w,
    ):  # fmt: skip
        number = index(index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x))
        if number < total:
            T, R = (own_T, own_R) if own_T > 0 else (T_, R_)
            rest, l = split(number, L, l_m, l_s)
            rest, j = split(rest, J, j_m, j_s)
            n, i = split(rest, I, i_m, i_s)
            own = index(n - over(n, C) * C)
            results, row = cuda.local.array(count, sums), cuda.local.array(registers, sums)
            for e in range(count):
                results[e] = sums(0)
            column = index(l * advance - lead)
            for m in range(M if backward else index(1)):
                k = index(own * M + m) if backward else own
                plane = index(n * M + m) if backward else over(n, M)
                for t in range(T):
                    d = meets(i, index(t), D, index(step_o), pad_d, step_d)
                    for r in range(R):
                        h = meets(j, index(r), H, index(step_p), pad_h, step_h)
                        if d >= 0 and h >= 0:
                            line = index(((plane * D + d) * H + h) * W)
                            for v in range(vectors):
                                w = index(column + v * load_lanes)
                                if w >= 0 and w < W:
                                    load(source, index(line + w), row, v * load_lanes)
                                else:
                                    for e in range(load_lanes):
                                        row[v * load_lanes + e] = sums(0)
                            tap = index(((k * T + t) * R + r) * kernel)
                            for s in range(kernel):
                                factor = widen(weight[index(tap + s)])
                                if backward:
                                    # Element e meets the window of register g at tap s.
                                    for g in range(registers):
                                        e = (g - lead) * stride + s * dilation - before
                                        if e >= 0 and e < count:
                                            results[e] += row[g] * factor
                                else:
                                    for e in range(count):
                                        results[e] += row[offset + e * stride + s * dilation] * factor
            for e in range(count):
                if has_bias:
                    results[e] += widen(bias[own])
                results[e] = activate(results[e], code)
            # The last thread of a row may reach beyond it.
            width = index(V)
            at = index(l * count)
            for piece in range(pieces):
                if at + piece * lanes < width:
                    store(target, index(((n * I + i) * J + j) * width + at + piece * lanes), results, piece * lanes)

    slide.__name__ = f"depthwise_{'input_grad' if backward else 'forward'}_rows{lanes}_{element.name}"
    return slide


# --- weight gradient -------------------------------------------------------------------------------------------


class Lot(NamedTuple):
    """Taps whose sums a thread holds: rows and columns of the kernel, and the threads of a block."""

    lanes: int
    rows: int
    columns: int
    across: int
    down: int


@lru_cache(maxsize=64)
def correlate(element: Element, channels_last: bool, wide: bool, lot: Lot) -> Any:
    """Return the kernel that sums shares of the pixels to (shares, K, taps), each layer of blocks a lot of taps.

    Blocks have `across` vectors of channels and `down` pixels at a time.
    """
    lanes, rows, columns, across, down = lot
    index, split, over, load = index_type(wide), constant_division(wide), quotient(wide), loader(element, lanes)
    sums, slots, add_rows, count = element.sums, across * down, tree(wide, across, down), rows * columns * lanes

    def depthwise_correlate(
        grad, x, parts, K, total, share, Q, q_m, q_s, P, p_m, p_s, O, o_m, o_s, D, H, W, M, T, R, S,
        row_lots, column_lots, stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, step_d, step_h, step_w,
    ):  # fmt: skip
        shared = pointer_to(cuda.shared.array(slots, sums))
        column, row = index(cuda.threadIdx.x), index(cuda.threadIdx.y)
        results, values = cuda.local.array(count, sums), cuda.local.array(lanes, sums)
        grads = cuda.local.array(lanes, sums)
        for i in range(count):
            results[i] = sums(0)
        layer, part = index(cuda.blockIdx.z), index(cuda.blockIdx.y)
        rest = over(layer, column_lots)
        s0 = index((layer - rest * column_lots) * columns)
        t = over(rest, row_lots)
        r0 = index((rest - t * row_lots) * rows)
        k = index((index(cuda.blockIdx.x) * index(across) + column) * lanes)
        c, C = over(k, M), over(K, M)
        if k < K:
            for m in range(index(part * share + row), index(min(index(part * share + share), total)), down):
                rest, q = split(index(m), Q, q_m, q_s)
                rest, p = split(rest, P, p_m, p_s)
                n, o = split(rest, O, o_m, o_s)
                if channels_last:
                    load(grad, index(m * K + k), grads, 0)
                    image, apart = index(n * D * H * W * C + c), C
                else:
                    load(grad, index((((n * K + k) * O + o) * P + p) * Q + q), grads, 0)
                    image, apart = index((n * C + c) * D * H * W), index(1)
                d = index(o * stride_d + t * step_d - pad_d)
                if d >= 0 and d < D:
                    for r in range(rows):
                        h = index(p * stride_h + (r0 + r) * step_h - pad_h)
                        if h >= 0 and h < H and r0 + r < R:
                            for s in range(columns):
                                w = index(q * stride_w + (s0 + s) * step_w - pad_w)
                                if w >= 0 and w < W and s0 + s < S:
                                    load(x, index(image + ((d * H + h) * W + w) * apart), values, 0)
                                    for i in range(lanes):
                                        results[(r * columns + s) * lanes + i] += values[i] * grads[i]
        for i in range(count):
            cuda.syncthreads()
            shared[row * across + column] = results[i]
            add_rows(shared, column, row)
            r, s = index(r0 + i // lanes // columns), index(s0 + i // lanes % columns)
            if row == 0 and k < K and r < R and s < S:
                parts[index((((part * K + k + i % lanes) * T + t) * R + r) * S + s)] = shared[column]

    depthwise_correlate.__name__ = f"depthwise_weight_grad_lanes{lanes}_{element.name}"
    return depthwise_correlate


# --- host ------------------------------------------------------------------------------------------------------


def supports(geometry: ConvGeometry, direction: str) -> tuple[bool, str]:
    """Geometries with one channel per group."""
    per_group = geometry.in_channels // geometry.groups
    if geometry.dtype.name not in SUPPORTED:
        return False, f"on a GPU it computes {', '.join(SUPPORTED)}, not {geometry.dtype}"
    if per_group != 1:
        return False, f"it takes one channel per group, not {per_group}"
    if math.prod(geometry.kernel_size) > MOST_TAPS:
        return False, f"its sums of products keep their precision up to {MOST_TAPS} taps"
    return True, ""


def seconds(geometry: ConvGeometry, direction: str, architecture: str) -> float:
    """Predicted time: each array moved once; not measured."""
    return roofline.seconds(geometry, architecture, SHARE, launches=2, bandwidth_share=BANDWIDTH_SHARE)


def workspace(
    geometry: ConvGeometry, direction: str, limit: int, aligned: bool = True, threads: int = THREADS
) -> dict[str, Buffer]:
    """The packed weight where threads have several channels; sums of the shares of pixels."""
    g = geometry
    taps = math.prod(g.kernel_size)
    if direction == "weight_grad":
        parts = _correlation(g, aligned, threads)[1]
        return {"parts": Buffer((parts, g.out_channels, taps), Element.of(g.dtype).sums_dtype)}
    return {"packed": Buffer((taps, g.out_channels), g.dtype)} if _lanes(g, aligned) > 1 else {}


def steps(
    geometry: ConvGeometry,
    direction: str,
    activation: str | None = None,
    bias: bool = False,
    architecture: str = "sm_90a",
    limit: int = 1 << 30,
    aligned: bool = True,
    threads: int = THREADS,
) -> list[Step]:
    """Return the launches of one direction; `aligned`: all arrays begin at multiples of 16 bytes."""
    g = geometry
    if direction == "weight_grad":
        return _correlate_steps(g, aligned, threads)
    backward, lanes = direction == "input_grad", _lanes(g, aligned)
    stretch, last = _stretch(g, backward, aligned), g.data_format == "channels_last"
    how = How(Element.of(g.dtype), backward, last, _wide(g), lanes, _unrolled(g), _stride(g), CODES[activation], bias)
    names = ("grad_output" if backward else "x", "packed" if lanes > 1 else "weight", "bias", "out")
    if stretch is None:
        first = [_pack_step(g, how, threads)] if lanes > 1 else []
        return [*first, _slide_step(g, slide_lanes(how), how, names, None, threads)]
    how = how._replace(lanes=_row_lanes(g, backward), kernel=(*how.kernel[:2], g.kernel_size[2]))
    return [_slide_step(g, slide_rows(how, stretch), how, names, stretch, threads)]


def _stride(g: ConvGeometry) -> tuple[int, ...]:
    """Return the stride, which may be huge along an axis where it is never stepped."""
    return tuple(s if p > 1 else max(n, 1) for s, p, n in zip(g.stride, g.output_size, g.padded_size))


def _unrolled(g: ConvGeometry) -> tuple[int, int, int]:
    """Return the kernel's size, or zeros if it is too large to be unrolled."""
    T, R, S = g.kernel_size
    return (T, R, S) if T * R * S <= MOST_UNROLLED else (0, 0, 0)


def _wide(g: ConvGeometry) -> bool:
    spans = (n + sum(p) + d * k for n, p, d, k in zip(g.input_size, g.padding, g.dilation, g.kernel_size))
    return needs_wide(g.x_shape, g.output_shape, g.weight_shape, *spans)


def _lanes(g: ConvGeometry, aligned: bool) -> int:
    """Return how many channels a thread has."""
    is_fit = aligned and g.data_format == "channels_last" and g.in_channels == g.out_channels
    return widest(g.dtype, g.in_channels) if is_fit else 1


def _row_lanes(g: ConvGeometry, backward: bool) -> int:
    return widest(g.dtype, g.output_size[2], *((g.input_size[2],) if backward else ()))


def _stretch(g: ConvGeometry, backward: bool, aligned: bool) -> Stretch | None:
    """Return what neighbours of a row share, or None where that is too much or not whole vectors."""
    lanes = _row_lanes(g, backward)
    if g.data_format == "channels_last" or not aligned or lanes == 1:
        return None
    row = g.kernel_size[2], g.stride[2], g.padding[2][0], g.dilation[2]
    if backward:
        found = Stretch.backward(*row, lanes)
        return found if max(lanes * g.stride[2], found.registers) <= MOST_STRETCH else None
    found = Stretch.forward(*row, g.input_size[2], g.dtype.itemsize, lanes)
    return found if found.registers <= MOST_STRETCH else None


def _pack_step(g: ConvGeometry, how: How, threads: int) -> Step:
    total, wide = math.prod(g.weight_shape), how.wide
    arrays = [(name, how.element.pointer) for name in ("weight", "packed")]
    numbers = (total, *divisor(g.out_channels, wide), math.prod(g.kernel_size))
    return launch(pack(how.element, wide), arrays, numbers, wide, total, threads)


def _slide_step(
    g: ConvGeometry, kernel: Any, how: How, names: tuple[str, ...], stretch: Stretch | None, threads: int
) -> Step:
    x, y = (g.in_channels, *g.input_size), (g.out_channels, *g.output_size)
    (C, I, J, L), (_, *source) = (x, y) if how.backward else (y, x)
    V, threads_of_row, outer = (C // how.lanes, L, g.batch) if how.channels_last else (1, L, g.batch * C)
    if stretch is not None:
        # Of rows V is the width.
        V, threads_of_row = L, -(-L // (how.lanes * (g.stride[2] if how.backward else 1)))
    total = outer * I * J * threads_of_row * (1 if stretch is not None else V)
    before = (pair[0] for pair in g.padding)
    numbers = (
        total, *divisors((V, threads_of_row, J, I), how.wide), *source, C, g.out_channels // g.in_channels,
        *g.kernel_size, *before, *g.dilation,
    )  # fmt: skip
    return launch(kernel, [(name, how.element.pointer) for name in names], numbers, how.wide, total, threads)


def _correlation(g: ConvGeometry, aligned: bool, threads: int) -> tuple[Lot, int, int, int]:
    """Return (lot, shares, pixels of one, blocks of channels)."""
    K, (_, R, S) = g.out_channels, g.kernel_size
    last = g.data_format == "channels_last"
    lanes = _lanes(g, aligned)
    columns = min(S, MOST_SUMS // lanes)
    rows = R if R * columns * lanes <= MOST_SUMS else 1
    across = min(32, threads) if last else 1
    lot = Lot(lanes, rows, columns, across, threads // across)
    blocks = -(-K // (lanes * across))
    layers = g.kernel_size[0] * -(-R // rows) * -(-S // columns)
    parts, share = shares(g.batch * math.prod(g.output_size), blocks * layers, lot.down)
    return lot, parts, share, blocks


def _correlate_steps(g: ConvGeometry, aligned: bool, threads: int) -> list[Step]:
    lot, parts, share, blocks = _correlation(g, aligned, threads)
    element, wide = Element.of(g.dtype), _wide(g) or needs_wide((parts + 1, math.prod(g.weight_shape)))
    O, P, Q = g.output_size
    T, R, S = g.kernel_size
    lots = -(-R // lot.rows), -(-S // lot.columns)
    before = (pair[0] for pair in g.padding)
    numbers = (
        g.out_channels, g.batch * O * P * Q, share, *divisors((Q, P, O), wide), *g.input_size,
        g.out_channels // g.in_channels, T, R, S, *lots, *_stride(g), *before, *g.dilation,
    )  # fmt: skip
    arrays = [("grad_output", element.pointer), ("x", element.pointer), ("parts", CPointer(element.sums))]
    kernel = correlate(element, g.data_format == "channels_last", wide, lot)
    first = step(kernel, arrays, numbers, wide, (blocks, parts, T * math.prod(lots)), (lot.across, lot.down))
    return [first, second_pass(element, wide, g.out_channels * T * R * S, parts, threads)]
