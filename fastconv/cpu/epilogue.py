"""Bias and activation, in place on a fresh output, in one pass.

    y[n, k, ...] = activation(y[n, k, ...] + bias[k])

Memory layout: C-contiguous, (N, K, pixels) or (pixels, K). And the way back: the sum that is the
gradient of the bias, the mask that is a ReLU's.
"""

import math
from functools import lru_cache

import numpy as np
from numba import prange

from ..activations import CODES, LEAKY_SLOPE
from .compile import device, kernel, share, task
from .memory import address
from .simd import integers, load, store

# Elements worth a part of their own.
PART = 16 * 1024


def apply(y, data_format, bias, activation):
    """Add `bias` (K,) and apply `activation` to `y` (lifted), in place; either may be None."""
    if (bias is None and activation is None) or y.size == 0:
        return
    filters = y.shape[1] if data_format == "channels_first" else y.shape[-1]
    if bias is None:
        bias = np.zeros(filters, y.dtype)
    if data_format == "channels_first":
        _rows(y.reshape(y.shape[0], filters, -1), bias, CODES[activation])
    else:
        _pixels(y.reshape(-1, filters), bias, CODES[activation])


def pad_bias(bias, groups, columns, copies, padded, least=None):
    """Write the bias as (groups, a row of `padded`): `columns` numbers so many times, then zeros; all zeros for None.

    After the rows comes the least result, "zero" or "-inf", if that is asked for.
    """
    size, limits = padded.itemsize, _LIMITS[padded.itemsize]
    row = (padded.size - (least is not None)) // groups
    _bias_task(size)(
        1, 0 if bias is None else address(bias), groups, columns, 0 if bias is None else copies, address(padded), row,
        address(limits), -1 if least is None else ("zero", "-inf").index(least),
    )  # fmt: skip


_LIMITS = {dtype().itemsize: np.array([0, -np.inf], dtype) for dtype in (np.float32, np.float64)}


@lru_cache(maxsize=2)
def _bias_task(itemsize):
    SIZE = itemsize

    @task
    def pad(arguments, chunk):
        """Bias (groups, columns) -> (groups, row), and the least result."""
        _, bias, groups, columns, copies, padded, row, limits, least = integers(arguments, 0, 9)
        for group in range(groups):
            for i in range(row):
                source = bias + (group * columns + i % columns) * SIZE if i < columns * copies else limits
                store(SIZE, padded + (group * row + i) * SIZE, load(SIZE, source))
        if least >= 0:
            store(SIZE, padded + groups * row * SIZE, load(SIZE, limits + least * SIZE))

    return pad


@device
def activate(value, code):
    """Return the activation of one value; `code` is one of CODES."""
    if code == 1:
        # The comparison is false for NaN, which passes through.
        return type(value)(0) if value < 0 else value
    if code == 2:
        return value * type(value)(LEAKY_SLOPE) if value < 0 else value
    if code == 3:
        # exp of a number that is never positive cannot overflow.
        small = math.exp(-abs(value))
        return type(value)(1 / (1 + small) if value >= 0 else small / (1 + small) if value < 0 else value)
    if code == 4:
        return type(value)(math.tanh(value))
    return value


@kernel
def _rows(y, bias, code):
    N, K, L = y.shape
    for row in prange(N * K):
        n, k = row // K, row % K
        for i in range(L):
            y[n, k, i] = activate(y[n, k, i] + bias[k], code)


@kernel
def _pixels(y, bias, code):
    L, K = y.shape
    for i in prange(L):
        for k in range(K):
            y[i, k] = activate(y[i, k] + bias[k], code)


def masked(bits, mask, result):
    """Write integers where `mask`, of ones and zeros, is 1, and 0 elsewhere to `result`; all are flat."""
    if bits.size < PART:
        np.bitwise_and(np.negative(mask, out=result, dtype=result.dtype, casting="unsafe"), bits, out=result)
    else:
        _masked(bits, mask, result)


@kernel
def _masked(bits, mask, result):
    parts = (bits.size + PART - 1) // PART
    for part in prange(parts):
        begin, end = part * PART, min(part * PART + PART, bits.size)
        # Slices, so that every index is in range and the loop becomes vectors.
        source, chosen, target = bits[begin:end], mask[begin:end], result[begin:end]
        for i in range(len(source)):
            target[i] = source[i] if chosen[i] else type(source[i])(0)


def sum_pixels(grad, result):
    """Write the sum of `grad`, (N, C, L) or (L, C), over all but the channels to `result`, added up in float64."""
    if grad.size < PART:
        result[...] = grad.sum(axis=(0, 2) if grad.ndim == 3 else 0, dtype=np.float64)
        return
    if grad.ndim == 3:
        N, C, _ = grad.shape
        sums = np.empty((N, C))
        _sum_rows(grad.reshape(N * C, -1), sums.reshape(-1))
    else:
        # The number of parts depends on sizes alone, and so does the result.
        sums = np.zeros((max(min(grad.size // PART, 64), 1), grad.shape[1]))
        _sum_columns(grad, sums)
    result[...] = sums.sum(axis=0)


@kernel
def _sum_rows(grad, sums):
    rows, length = grad.shape
    for row in prange(rows):
        total = 0.0
        for i in range(length):
            total += grad[row, i]
        sums[row] = total


@kernel
def _sum_columns(grad, sums):
    pixels, channels = grad.shape
    for part in prange(len(sums)):
        begin, end = share(pixels, part, len(sums))
        for pixel in range(begin, end):
            for c in range(channels):
                sums[part, c] += grad[pixel, c]
