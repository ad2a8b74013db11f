"""Direct convolution of a few numbers: one loop nest for every direction, on the calling thread.

    result[...] += a[...] * b[...]      for every image, group, filter, channel, tap and pixel

Of x, weight and y one is the result and two are factors, and every index of the sum has a byte stride in each of the
three. So directions and memory formats differ in strides alone, and share one machine code.

Up to some thousand products, waking threads or packing a weight takes longer than the sum itself, and so does finding
the addresses of arrays in Python. Here the machine code finds them: it is given the arrays as objects (their `id`).
"""

import math
from functools import lru_cache

import numpy as np

from ..activations import CODES
from .compile import device, kernel
from .epilogue import activate
from .memory import DATA, address
from .simd import integer, integers, load, store, zero_bytes

# Products per sum: the rounding error of a float32 sum grows with its length.
MOST_SUMMED = 512
# Seconds of a call beside its products, and of each product.
CALL_SECONDS, PRODUCT_SECONDS = 2e-6, 1e-9

# Where things are among the sizes: counts of the loops, then their byte strides in the result and the two factors;
LOOPS = ("N", "G", "K", "C", "O", "T", "P", "R", "Q", "S")
STRIDES = len(LOOPS)
# byte offsets of the first products; images, channels and pixels of the result, and their byte strides;
BASES = STRIDES + 3 * len(LOOPS)
FILL = BASES + 3
# the activation; then the pixels that each tap meets inside the image, as (first, end): of T, R and S in turn.
CODE = FILL + 6
MET = CODE + 1
# The strides along a row of pixels.
ALONG_Q = STRIDES + 3 * LOOPS.index("Q")


def supports(geometry, direction):
    """Short sums of floating-point numbers."""
    if geometry.dtype.kind != "f":
        return False, f"it sums floating-point numbers, not {geometry.dtype}"
    summed = _summed(geometry, direction)
    if summed > MOST_SUMMED:
        return False, f"sums of {summed} products are more than {MOST_SUMMED}, beyond which it loses precision"
    return True, ""


def _summed(g, direction):
    """Products of one result, those with padding included."""
    if direction == "weight_grad":
        return g.batch * math.prod(g.output_size)
    return (g.in_channels if direction == "forward" else g.out_channels) // g.groups * math.prod(g.kernel_size)


def workspace(geometry, direction, limit):
    """None."""
    return {}


def seconds(geometry, direction, threads_):
    """Predicted time: a call and the products, on one thread."""
    return CALL_SECONDS + PRODUCT_SECONDS * geometry.flops / 2


def forward(geometry, x, weight, bias, activation, out, workspace):
    """Write the convolution of `x` with `weight`, plus bias, through the activation, to `out`."""
    bind(geometry, "forward", activation)(x, weight, bias, out)


def input_grad(geometry, grad_output, weight, out, workspace):
    """Write the gradient with respect to the input to `out`."""
    bind(geometry, "input_grad")(grad_output, weight, None, out)


def weight_grad(geometry, grad_output, x, out, workspace):
    """Write the gradient with respect to the weight to `out`."""
    bind(geometry, "weight_grad")(grad_output, x, None, out)


@lru_cache(maxsize=1024)
def bind(geometry, direction, activation=None):
    """Return a function of (factor, factor, bias or None, result): C-contiguous arrays of any dimensions."""
    run, sizes = _sum(geometry.dtype.itemsize).serial, _sizes(geometry, direction, activation)
    place = address(sizes)

    def bound(a, b, bias, result, sizes=sizes):
        run(place, id(a), id(b), 0 if bias is None else id(bias), id(result))

    return bound


def _sizes(g, direction, activation):
    """Return all numbers the kernel needs beside arrays."""
    C, K = g.in_channels // g.groups, g.out_channels // g.groups
    x, y = _image(g, g.in_channels, g.input_size), _image(g, g.out_channels, g.output_size)
    w = _byte_strides("KCDHW", (g.out_channels, C, *g.kernel_size), g.dtype.itemsize)
    # Of each loop: how often, and the byte strides in x, weight and y.
    loops = {
        "N": (g.batch, x["N"], 0, y["N"]),
        "G": (g.groups, C * x["C"], K * w["K"], K * y["C"]),
        "K": (K, 0, w["K"], y["C"]),
        "C": (C, x["C"], w["C"], 0),
    }
    met, base = [], 0
    for i, (pixel, tap, d) in enumerate((("O", "T", "D"), ("P", "R", "H"), ("Q", "S", "W"))):
        stride, dilation, (before, _) = g.stride[i], g.dilation[i], g.padding[i]
        loops[pixel] = (g.output_size[i], stride * x[d], 0, y[d])
        loops[tap] = (g.kernel_size[i], dilation * x[d], w[d], 0)
        base -= before * x[d]
        for offset in range(-before, g.kernel_size[i] * dilation - before, dilation):
            first = max(-(offset // stride), 0)
            met += [first, max(min((g.input_size[i] - 1 - offset) // stride + 1, g.output_size[i]), first)]
    order = {"forward": (2, 0, 1), "input_grad": (0, 2, 1), "weight_grad": (1, 2, 0)}[direction]
    numbers = [loops[name][0] for name in LOOPS]
    numbers += [loops[name][1 + i] for name in LOOPS for i in order]
    numbers += [(base, 0, 0)[i] for i in order]
    return np.array([*numbers, *_fill(g, direction, x, y), CODES[activation], *met], np.int64)


def _fill(g, direction, x, y):
    """Return images, channels and pixels of the result, and their byte strides: what a bias is added to."""
    if direction == "weight_grad":
        return [1, 1, math.prod(g.weight_shape), 0, 0, g.dtype.itemsize]
    size, channels, at = (
        (g.output_size, g.out_channels, y) if direction == "forward" else (g.input_size, g.in_channels, x)
    )
    # Pixels follow each other at one distance, in either format.
    return [g.batch, channels, math.prod(size), at["N"], at["C"], at["W"]]


def _image(g, channels, size):
    if g.data_format == "channels_first":
        return _byte_strides("NCDHW", (g.batch, channels, *size), g.dtype.itemsize)
    return _byte_strides("NDHWC", (g.batch, *size, channels), g.dtype.itemsize)


def _byte_strides(axes, counts, itemsize):
    return {axis: itemsize * math.prod(counts[i + 1 :]) for i, axis in enumerate(axes)}


@lru_cache(maxsize=4)
def _sum(itemsize):
    """Return the kernel for elements of a size."""
    SIZE = itemsize

    @kernel
    def small(sizes, a, b, bias, result):
        """Fill the result with the bias, add all products, apply the activation."""
        a, b, result = integer(a + DATA, 0), integer(b + DATA, 0), integer(result + DATA, 0)
        fill(sizes, result, integer(bias + DATA, 0) if bias else 0)
        N, G, K, C = integers(sizes, 0, 4)
        bases = integers(sizes, BASES, 3)
        place = (result + bases[0], a + bases[1], b + bases[2])
        for n in range(N):
            for g in range(G):
                group = _along(sizes, 1, g, _along(sizes, 0, n, place))
                for k in range(K):
                    for c in range(C):
                        channel(sizes, _along(sizes, 3, c, _along(sizes, 2, k, group)))
        if integer(sizes, CODE):
            finish(sizes, result)

    @device
    def channel(sizes, place):
        """Add the products of one filter with one channel."""
        _, T, _, R, _, S = integers(sizes, 4, 6)
        to_q = integers(sizes, ALONG_Q, 3)
        met = sizes + MET * 8
        for t in range(T):
            for o in range(*integers(met + t * 16, 0, 2)):
                plane = _along(sizes, 4, o, _along(sizes, 5, t, place))
                for r in range(R):
                    for p in range(*integers(met + (T + r) * 16, 0, 2)):
                        row = _along(sizes, 6, p, _along(sizes, 7, r, plane))
                        for s in range(S):
                            first, end = integers(met + (T + R + s) * 16, 0, 2)
                            multiply_add(_along(sizes, 8, first, _along(sizes, 9, s, row)), to_q, end - first)

    @device
    def multiply_add(place, step, count):
        """Add the products along a row of pixels."""
        result, a, b = place
        if step[0] == 0:
            total = load(SIZE, result)
            for i in range(count):
                total += load(SIZE, a + i * step[1]) * load(SIZE, b + i * step[2])
            store(SIZE, result, total)
        else:
            for i in range(count):
                at = result + i * step[0]
                store(SIZE, at, load(SIZE, at) + load(SIZE, a + i * step[1]) * load(SIZE, b + i * step[2]))

    @device
    def fill(sizes, result, bias):
        images, channels, pixels, image, channel, pixel = integers(sizes, FILL, 6)
        if bias == 0:
            zero_bytes(result, images * channels * pixels * SIZE)
            return
        for n in range(images):
            for c in range(channels):
                value = load(SIZE, bias + c * SIZE)
                for i in range(pixels):
                    store(SIZE, result + n * image + c * channel + i * pixel, value)

    @device
    def finish(sizes, result):
        code, (images, channels, pixels) = integer(sizes, CODE), integers(sizes, FILL, 3)
        for at in range(result, result + images * channels * pixels * SIZE, SIZE):
            store(SIZE, at, activate(load(SIZE, at), code))

    return small


@device
def _along(sizes, loop, index, place):
    """Move three addresses along a loop."""
    step = integers(sizes + (STRIDES + 3 * loop) * 8, 0, 3)
    return place[0] + index * step[0], place[1] + index * step[1], place[2] + index * step[2]
