"""Bias and activation, in place on a fresh output, in one pass.

    y[n, k, ...] = activation(y[n, k, ...] + bias[k])

Memory layout: C-contiguous, (N, K, pixels) or (pixels, K).
"""

import math

import numpy as np
from numba import prange

from .compile import device, kernel
from .simd import LEAKY_SLOPE

ACTIVATIONS = ("relu", "leaky_relu", "sigmoid", "tanh")


# What the kernels compare with: 0 is "no activation".
CODES = {name: code for code, name in enumerate((None, *ACTIVATIONS))}


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
