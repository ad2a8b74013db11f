"""Convolution as a product of spectra on a GPU: transforms by cuFFT, through the library of the arrays.

    forward       Y  = X  * conj(W)    sampled every `stride`
    input_grad    dX = dY * W          dY spread by `stride`
    weight_grad   dW = X  * conj(dY)   sampled every `dilation`

where X, W, dY are the transforms of the padded input, the dilated kernel and the spread gradient, all zero-filled to
one length that is fast to transform and at least the padded input's, so that nothing wraps around (Mathieu, Henaff &
LeCun, "Fast training of convolutional networks through FFTs", 2014, section 2). Planes lie side by side, frequencies
innermost, as cuFFT has them; the sum over channels at each frequency is a kernel of its own, because frequencies are
what neighbouring threads have. Nothing is split. Planes of half types are float32, from the kernel that fills them to
the one that takes results from them.

A NaN or an infinity in the input spreads over its whole plane, and rounding errors are relative to the largest values
of a plane. The kernels have run in the emulator with NumPy's transforms between them, on no GPU.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ..geometry import ConvGeometry
from ..registry import Buffer
from . import roofline, toolchain
from .elements import SUPPORTED, Element
from .epilogue import CODES, activate
from .indices import THREADS, divided, image_strides, index_type, launch, meeting, needs_wide, step
from .ptx import load2, store2
from .steps import Call, Step
from .sums import CHAIN

cuda = toolchain.import_cuda()

from numba.cuda.types import CPointer  # noqa: E402

# Directions that end in bias and activation.
FUSED = ("forward", "input_grad")
# Products that a thread has at one frequency: so many rows by so many columns.
ROWS, COLUMNS = 4, 4
# Channels that neighbouring threads have before the next pixel, where channels are last.
TOGETHER = 8
# Passes over memory that transforms take, and the share of the peak that products reach; not measured.
PASSES, SHARE = 6, 0.2


# --- kernels ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def spread(element: Element, wide: bool) -> Any:
    """Return the kernel that writes planes (A, B, D, H, W): a pixel of the source every `step` from `first` on, or 0.

    Neighbouring threads have `low` of B, then neighbours of a row.
    """
    index, divide, meets = index_type(wide), divided(wide), meeting(wide)
    sums, widen = element.sums, element.widen

    def fft_spread(
        source, target, total, low, high, B, D, H, W, size_d, size_h, size_w, first_d, first_h, first_w,
        step_d, step_h, step_w, a_step, b_step, pixel_step,
    ):  # fmt: skip
        number = index(index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x))
        rest, low_b = divide(number, low)
        rest, w = divide(rest, W)
        rest, h = divide(rest, H)
        rest, d = divide(rest, D)
        a, high_b = divide(rest, high)
        b = index(high_b * low + low_b)
        if number < total and b < B:
            z, y = meets(index(d - first_d), step_d, size_d), meets(index(h - first_h), step_h, size_h)
            x = meets(index(w - first_w), step_w, size_w)
            value = sums(0)
            if z >= 0 and y >= 0 and x >= 0:
                value = widen(source[index(a * a_step + b * b_step + ((z * size_h + y) * size_w + x) * pixel_step)])
            target[index((((a * B + b) * D + d) * H + h) * W + w)] = value

    fft_spread.__name__ = f"fft_spread_{element.name}"
    return fft_spread


@lru_cache(maxsize=64)
def collect(element: Element, wide: bool, has_bias: bool, code: int) -> Any:
    """Return the kernel that takes pixels of planes, every `step` from `first` on, through bias and activation."""
    index, divide, widen, narrow = index_type(wide), divided(wide), element.widen, element.narrow

    def fft_collect(
        source, bias, target, total, low, high, B, D, H, W, size_d, size_h, size_w, first_d, first_h, first_w,
        step_d, step_h, step_w, a_step, b_step, pixel_step,
    ):  # fmt: skip
        number = index(index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x))
        rest, low_b = divide(number, low)
        rest, x = divide(rest, size_w)
        rest, y = divide(rest, size_h)
        rest, z = divide(rest, size_d)
        a, high_b = divide(rest, high)
        b = index(high_b * low + low_b)
        if number < total and b < B:
            d, h = index(first_d + z * step_d), index(first_h + y * step_h)
            w = index(first_w + x * step_w)
            value = source[index((((a * B + b) * D + d) * H + h) * W + w)]
            if has_bias:
                value += widen(bias[b])
            to = index(a * a_step + b * b_step + ((z * size_h + y) * size_w + x) * pixel_step)
            target[to] = narrow(activate(value, code))

    fft_collect.__name__ = f"fft_collect_{element.name}"
    return fft_collect


@lru_cache(maxsize=16)
def multiply(element: Element, conjugate: bool, wide: bool) -> Any:
    """Return the kernel that sums products of spectra: out[a, b] = sum over s of p[a, s] * q[b, s], or its conjugate.

    A thread has one frequency and a tile of results; sums run in chains.
    """
    index, divide, sums = index_type(wide), divided(wide), element.sums
    results, p_parts, q_parts = 2 * ROWS * COLUMNS, 2 * ROWS, 2 * COLUMNS

    def fft_multiply(
        p, q, out, frequencies, pieces, tiles_a, tiles_b, A, B, S, p_group, p_a, p_s, q_group, q_b, q_s,
        out_group, out_a, out_b,
    ):  # fmt: skip
        rest, piece = divide(index(cuda.blockIdx.x), pieces)
        rest, tile_b = divide(rest, tiles_b)
        group, tile_a = divide(rest, tiles_a)
        f = index(piece * index(cuda.blockDim.x) + index(cuda.threadIdx.x))
        if f < frequencies:
            first_a, first_b = index(tile_a * ROWS), index(tile_b * COLUMNS)
            p_at, q_at = cuda.local.array(ROWS, index), cuda.local.array(COLUMNS, index)
            # Beyond the last one the last one is computed again, and not stored.
            for i in range(ROWS):
                p_at[i] = index(2 * (group * p_group + min(index(first_a + i), index(A - 1)) * p_a + f))
            for j in range(COLUMNS):
                q_at[j] = index(2 * (group * q_group + min(index(first_b + j), index(B - 1)) * q_b + f))
            chain, total = cuda.local.array(results, sums), cuda.local.array(results, sums)
            x, y = cuda.local.array(p_parts, sums), cuda.local.array(q_parts, sums)
            for i in range(results):
                total[i] = sums(0)
            for start in range(index(0), S, CHAIN):
                for i in range(results):
                    chain[i] = sums(0)
                for _ in range(start, min(index(start + CHAIN), S)):
                    for i in range(ROWS):
                        x[2 * i], x[2 * i + 1] = load2(p, p_at[i])
                        p_at[i] = index(p_at[i] + 2 * p_s)
                    for j in range(COLUMNS):
                        y[2 * j], y[2 * j + 1] = load2(q, q_at[j])
                        if conjugate:
                            y[2 * j + 1] = -y[2 * j + 1]
                        q_at[j] = index(q_at[j] + 2 * q_s)
                    for i in range(ROWS):
                        for j in range(COLUMNS):
                            k = 2 * (i * COLUMNS + j)
                            chain[k] += x[2 * i] * y[2 * j]
                            chain[k] -= x[2 * i + 1] * y[2 * j + 1]
                            chain[k + 1] += x[2 * i] * y[2 * j + 1]
                            chain[k + 1] += x[2 * i + 1] * y[2 * j]
                for i in range(results):
                    total[i] += chain[i]
            for i in range(ROWS):
                for j in range(COLUMNS):
                    k = 2 * (i * COLUMNS + j)
                    if first_a + i < A and first_b + j < B:
                        to = index(group * out_group + (first_a + i) * out_a + (first_b + j) * out_b + f)
                        store2(out, index(2 * to), (total[k], total[k + 1]))

    fft_multiply.__name__ = f"fft_multiply_{element.name}{'_conjugate' if conjugate else ''}"
    return fft_multiply


# --- host ------------------------------------------------------------------------------------------------------


class Planes(NamedTuple):
    """An operand or a result as planes (rows, columns, D, H, W), and where its pixels are in them."""

    name: str
    rows: int
    columns: int
    size: tuple[int, ...]
    first: tuple[int, ...]
    step: tuple[int, ...]
    # Elements from a row to the next, from a column and from a pixel, in memory.
    strides: tuple[int, int, int]
    # Columns that are neighbours in memory.
    together: int = 1


def supports(geometry: ConvGeometry, direction: str) -> tuple[bool, str]:
    """Every geometry of a floating-point dtype."""
    if geometry.dtype.name in SUPPORTED:
        return True, ""
    return False, f"on a GPU it transforms {', '.join(SUPPORTED)}, not {geometry.dtype}"


def seconds(geometry: ConvGeometry, direction: str, architecture: str) -> float:
    """Predicted time: passes over all planes, and the products at every frequency; not measured."""
    g, there = geometry, roofline.peak(architecture)
    peak = there.float64 if g.dtype.name == "float64" else there.float32
    length, half = lengths(g)
    planes = sum(p.rows * p.columns for p in _planes(g).values())
    products = 8 * g.batch * g.out_channels * (g.in_channels // g.groups) * math.prod(half)
    moved = PASSES * planes * math.prod(length) * Element.of(g.dtype).sums_dtype.itemsize + g.bytes
    return 7 * roofline.LAUNCH + moved / there.bytes + products / (SHARE * peak)


def workspace(geometry: ConvGeometry, direction: str, limit: int) -> dict[str, Buffer]:
    """Both operands and the result zero-filled, all three spectra, and what the library takes for a transform.

    That is a copy of its operand and its result; what cuFFT keeps for its plans comes on top.
    """
    g, planes = geometry, _planes(geometry)
    length, half = lengths(g)
    dtype = Element.of(g.dtype).sums_dtype
    spectrum = np.result_type(dtype, np.complex64)
    buffers = {}
    for name in _roles(direction):
        rows, columns = planes[name].rows, planes[name].columns
        buffers[name + "_planes"] = Buffer((rows, columns, *length), dtype)
        buffers[name + "_spectrum"] = Buffer((rows, columns, *half), spectrum)
    largest = max(b.nbytes for b in buffers.values())
    return {**buffers, "library": Buffer((2 * largest,), np.dtype(np.uint8), owned=False)}


def steps(
    geometry: ConvGeometry,
    direction: str,
    activation: str | None = None,
    bias: bool = False,
    architecture: str = "sm_90a",
    limit: int = 1 << 30,
) -> list[Step | Call]:
    """Return the launches and transforms of one direction; `limit` does not matter."""
    g, planes = geometry, _planes(geometry)
    first, second, result = (planes[name] for name in _roles(direction))
    length, half = lengths(g)
    # What cuFFT transforms: axes that are more than one long.
    axes = [i for i in range(3) if length[i] > 1]

    def call(operation: str, p: Planes, source: str, target: str) -> Call:
        shapes = {"planes": length, "spectrum": half}
        names = (f"{p.name}_{source}", f"{p.name}_{target}")
        return Call(
            operation, names, tuple((p.rows * p.columns, *(shapes[s][i] for i in axes)) for s in (source, target))
        )

    return [
        _spread_step(g, first),
        call("rfftn", first, "planes", "spectrum"),
        _spread_step(g, second),
        call("rfftn", second, "planes", "spectrum"),
        _multiply_step(g, direction),
        call("irfftn", result, "spectrum", "planes"),
        _collect_step(g, result, bias, CODES[activation]),
    ]


def _roles(direction: str) -> tuple[str, str, str]:
    """Return the two operands and the result of a direction."""
    return {
        "forward": ("x", "weight", "grad_output"),
        "input_grad": ("grad_output", "weight", "x"),
        "weight_grad": ("x", "grad_output", "weight"),
    }[direction]


@lru_cache(maxsize=1024)
def lengths(g: ConvGeometry) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the lengths of the transform, and the same with the last one halved as real input allows."""
    D, H, W = map(_fast_length, g.padded_size)
    W = max(W, 2)
    return (D, H, W), (D, H, W // 2 + 1)


def _fast_length(least: int) -> int:
    """Return the next number without prime factors over 7: those that cuFFT has kernels for."""
    powers = [[prime**i for i in range(int(math.log(least, prime)) + 2)] for prime in (3, 5, 7)]
    odd = map(math.prod, itertools.product(*powers))
    return min(number << (-(-least // number) - 1).bit_length() for number in odd)


@lru_cache(maxsize=1024)
def _planes(g: ConvGeometry) -> dict[str, Planes]:
    C, taps, zeros = g.in_channels // g.groups, math.prod(g.kernel_size), (0, 0, 0)
    before = tuple(b for b, _ in g.padding)

    def image(name: str, channels: int, size: tuple[int, ...], first: Any, step: Any) -> Planes:
        last = g.data_format == "channels_last"
        strides = image_strides(channels, size, last)
        return Planes(name, g.batch, channels, size, first, step, strides, TOGETHER if last else 1)

    return {
        "x": image("x", g.in_channels, g.input_size, before, (1, 1, 1)),
        "grad_output": image("grad_output", g.out_channels, g.output_size, zeros, g.stride),
        "weight": Planes("weight", g.out_channels, C, g.kernel_size, zeros, g.dilation, (C * taps, taps, 1)),
    }


def _is_wide(g: ConvGeometry) -> bool:
    """Return whether an index could pass what 32 bits hold; spectra are read as real numbers."""
    length, half = lengths(g)
    most = max(p.rows * (p.columns + TOGETHER) for p in _planes(g).values())
    return needs_wide((most, math.prod(length)), (2, most, math.prod(half)))


def _numbers(g: ConvGeometry, p: Planes, size: tuple[int, ...]) -> tuple[int, ...]:
    low, high = p.together, -(-p.columns // p.together)
    total = p.rows * low * high * math.prod(size)
    return total, low, high, p.columns, *lengths(g)[0], *p.size, *p.first, *p.step, *p.strides


def _spread_step(g: ConvGeometry, p: Planes) -> Step:
    element, wide = Element.of(g.dtype), _is_wide(g)
    numbers = _numbers(g, p, lengths(g)[0])
    arrays = [(p.name, element.pointer), (p.name + "_planes", CPointer(element.sums))]
    return launch(spread(element, wide), arrays, numbers, wide, numbers[0])


def _collect_step(g: ConvGeometry, p: Planes, bias: bool, code: int) -> Step:
    element, wide = Element.of(g.dtype), _is_wide(g)
    numbers = _numbers(g, p, p.size)
    arrays = [(p.name + "_planes", CPointer(element.sums)), ("bias", element.pointer), ("out", element.pointer)]
    return launch(collect(element, wide, bias, code), arrays, numbers, wide, numbers[0])


def _multiply_step(g: ConvGeometry, direction: str) -> Step:
    element, wide = Element.of(Element.of(g.dtype).sums_dtype), _is_wide(g)
    N, C, K, F = g.batch, g.in_channels // g.groups, g.out_channels // g.groups, math.prod(lengths(g)[1])
    # Elements from one group to the next, from an image or filter and from a channel.
    x, y, w = (C * F, g.in_channels * F, F), (K * F, g.out_channels * F, F), (K * C * F, C * F, F)
    swapped = (w[0], w[2], w[1])
    A, B, S, p, q, out = {
        "forward": (N, K, C, x, w, y),
        "input_grad": (N, C, K, y, swapped, x),
        "weight_grad": (C, K, N, (x[0], x[2], x[1]), (y[0], y[2], y[1]), swapped),
    }[direction]
    pieces, tiles_a, tiles_b = -(-F // THREADS), -(-A // ROWS), -(-B // COLUMNS)
    numbers = (F, pieces, tiles_a, tiles_b, A, B, S, *p, *q, *out)
    arrays = [(name + "_spectrum", element.pointer) for name in _roles(direction)]
    kernel = multiply(element, direction != "input_grad", wide)
    return step(kernel, arrays, numbers, wide, (pieces * tiles_a * tiles_b * g.groups,), (THREADS,))
