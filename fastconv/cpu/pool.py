"""Pooling: maximum with its index, average, and their gradients.

Arrays are seen as (outer, D, H, W, inner): outer N*C planes with inner 1 in channels_first, outer N images with inner
C in channels_last. A window is a range (first, end, step) per dimension from `PoolGeometry.windows`, already clipped
to the input, so padding, dilation, ceil_mode and adaptive windows all run through the same loops.

Gradients are scattered by one thread per plane, in scan order: no atomics, the same bits every time.
"""

import numpy as np
from numba import prange

from .compile import device, kernel

# Channels that one task scatters: a cache line of float32.
LANES = 16


def max_forward(x, windows, y, indices):
    """Write maxima to `y` and, unless it is None, flat positions in the plane to `indices`."""
    lowest = np.iinfo(x.dtype).min if x.dtype.kind in "iu" else -np.inf
    if indices is None:
        indices = np.empty((0, 0, 0, 0, 0), np.int64)
    _max_forward(x, *windows, y, indices, x.dtype.type(lowest))


def scatter_add(grad, indices, dx):
    """Add each gradient to the element its index names (-1: none); return False if an index is outside the plane."""
    dx[...] = 0
    return _scattered(grad, indices, dx, True)


def scatter(x, indices, y):
    """Write each value where its index says, the last one winning; return False if an index is outside the plane."""
    y[...] = 0
    return _scattered(x, indices, y, False)


def _scattered(values, indices, target, add):
    bad = np.zeros((len(values), -(-values.shape[-1] // LANES)), np.bool_)
    _scatter(_flat(values), _flat(indices), _flat(target), bad, add)
    return not bad.any()


def _flat(array):
    """(outer, D, H, W, inner) -> (outer, D*H*W, inner)."""
    outer, D, H, W, inner = array.shape
    return array.reshape(outer, D * H * W, inner)


def gather(values, indices, out):
    """Read the value that each index names; return False if an index is outside the plane."""
    bad = np.zeros(len(out), np.bool_)
    _gather(_flat(values), _flat(indices), _flat(out), bad)
    return not bad.any()


def average_forward(x, windows, y, count_padding, divisor):
    """Write window averages to `y`; `divisor` 0 means the number of elements, with or without padding."""
    _average_forward(x, *windows, y, count_padding, divisor)


def average_backward(grad, windows, dx, count_padding, divisor):
    """Write the gradient of the average with respect to its input to `dx`."""
    dx[...] = 0
    _average_backward(grad, *windows, dx, count_padding, divisor)


@kernel
def _max_forward(x, d_windows, h_windows, w_windows, y, indices, lowest):
    outer, O, P, _, inner = y.shape
    for row in prange(outer * O * P):
        n, o, p = row // (O * P), row // P % O, row % P
        if inner == 1:
            _max_row(x[n], d_windows[o], h_windows[p], w_windows, y, indices, n, o, p, lowest)
        else:
            _max_pixels(x[n], d_windows[o], h_windows[p], w_windows, y, indices, n, o, p, lowest)


@device
def _max_row(x, dw, hw, w_windows, y, indices, n, o, p, lowest):
    _, H, W, _ = x.shape
    for q in range(w_windows.shape[0]):
        first, end, step = w_windows[q, 0], w_windows[q, 1], w_windows[q, 2]
        best, where = lowest, -1
        # Not ranges: the division that counts their steps takes longer than a small window.
        d = dw[0]
        while d < dw[1]:
            h = hw[0]
            while h < hw[1]:
                w = first
                while w < end:
                    value = x[d, h, w, 0]
                    # A NaN is not equal to itself: it is taken, and no number is greater than it.
                    taken = (value > best) | (value != value) | (where < 0)
                    best = value if taken else best
                    where = (d * H + h) * W + w if taken else where
                    w += step
                h += hw[2]
            d += dw[2]
        y[n, o, p, q, 0] = best
        if indices.size:
            indices[n, o, p, q, 0] = where


@device
def _max_pixels(x, dw, hw, w_windows, y, indices, n, o, p, lowest):
    _, H, W, C = x.shape
    for q in range(w_windows.shape[0]):
        first, end, step = w_windows[q, 0], w_windows[q, 1], w_windows[q, 2]
        best = y[n, o, p, q]
        best[:] = lowest
        is_first = True
        if indices.size:
            indices[n, o, p, q, :] = -1
        for d in range(dw[0], dw[1], dw[2]):
            for h in range(hw[0], hw[1], hw[2]):
                for w in range(first, end, step):
                    source, position = x[d, h, w], (d * H + h) * W + w
                    if indices.size:
                        where = indices[n, o, p, q]
                        for c in range(C):
                            value = source[c]
                            taken = value > best[c] or value != value or is_first
                            best[c] = value if taken else best[c]
                            where[c] = position if taken else where[c]
                    else:
                        for c in range(C):
                            value = source[c]
                            best[c] = value if value > best[c] or value != value or is_first else best[c]
                    is_first = False


@kernel
def _scatter(values, indices, target, bad, add):
    outer, L, inner = values.shape
    positions = target.shape[1]
    blocks = bad.shape[1]
    for task in prange(outer * blocks):
        n, block = task // blocks, task % blocks
        for i in range(L):
            for c in range(block * LANES, min((block + 1) * LANES, inner)):
                position = indices[n, i, c]
                if 0 <= position < positions:
                    if add:
                        target[n, position, c] += values[n, i, c]
                    else:
                        target[n, position, c] = values[n, i, c]
                elif not add or position != -1:
                    bad[n, block] = True


@kernel
def _gather(values, indices, out, bad):
    outer, L, inner = out.shape
    positions = values.shape[1]
    for n in prange(outer):
        for i in range(L):
            for c in range(inner):
                position = indices[n, i, c]
                if 0 <= position < positions:
                    out[n, i, c] = values[n, position, c]
                else:
                    bad[n] = True


@device
def _length(window):
    return max(0, (window[1] - window[0] + window[2] - 1) // window[2])


@device
def _divisor(dw, hw, ww, count_padding, divisor):
    if divisor != 0:
        return divisor
    if count_padding:
        return dw[3] * hw[3] * ww[3]
    return _length(dw) * _length(hw) * _length(ww)


@kernel
def _average_forward(x, d_windows, h_windows, w_windows, y, count_padding, divisor):
    outer, O, P, Q, inner = y.shape
    for row in prange(outer * O * P):
        n, o, p = row // (O * P), row // P % O, row % P
        dw, hw = d_windows[o], h_windows[p]
        for q in range(Q):
            ww = w_windows[q]
            count = _divisor(dw, hw, ww, count_padding, divisor)
            for c in range(inner):
                total = 0.0
                for d in range(dw[0], dw[1], dw[2]):
                    for h in range(hw[0], hw[1], hw[2]):
                        w = ww[0]
                        while w < ww[1]:
                            total += x[n, d, h, w, c]
                            w += ww[2]
                y[n, o, p, q, c] = total / count if count != 0 else 0.0


@kernel
def _average_backward(grad, d_windows, h_windows, w_windows, dx, count_padding, divisor):
    outer, O, P, Q, inner = grad.shape
    blocks = (inner + LANES - 1) // LANES
    for task in prange(outer * blocks):
        n, start = task // blocks, task % blocks * LANES
        end = min(start + LANES, inner)
        for o in range(O):
            for p in range(P):
                for q in range(Q):
                    dw, hw, ww = d_windows[o], h_windows[p], w_windows[q]
                    count = _divisor(dw, hw, ww, count_padding, divisor)
                    if count == 0:
                        continue
                    for d in range(dw[0], dw[1], dw[2]):
                        for h in range(hw[0], hw[1], hw[2]):
                            for w in range(ww[0], ww[1], ww[2]):
                                for c in range(start, end):
                                    dx[n, d, h, w, c] += grad[n, o, p, q, c] / count
