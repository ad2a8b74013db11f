"""Pooling: maximum with its index, average, and their gradients.

Arrays are seen as (outer, D, H, W, inner): outer N*C planes with inner 1 in channels_first, outer N images with inner
C in channels_last. A window is a range (first, end, step) per dimension from `PoolGeometry.windows`, already clipped
to the input, so padding, dilation, ceil_mode and adaptive windows all run through the same loops.

Windows are reduced side by side, in the lanes of a vector: the channels of one window in channels_last; in
channels_first neighbouring windows of a row, as far as they have as many taps and are a fixed step apart.

The gradient of an average is itself an average: an input element takes part in a range of windows, and those are the
windows of the gradient. The gradient of a maximum is scattered by one thread per plane, in scan order: no atomics,
the same bits every time.
"""

from functools import lru_cache

import numpy as np
from numba import prange

from . import threads
from .compile import device, kernel, share, task
from .memory import address
from .simd import ELEMENTS, MAXIMUM, SUM, WIDE_SUM, element_lanes, integers, reduce_window

# Channels that one task scatters: a cache line of float32.
LANES = 16
# Bytes of output below which threads are not worth waking.
SERIAL_BYTES = 64 * 1024
# Windows up to so many elements apart are loaded as one stretch; others one at a time.
MOST_STEP = 4
# Taps of a window that are added up in the element's own precision.
MOST_TAPS = 64


def max_forward(x, windows, y, indices):
    """Write maxima to `y` and, unless it is None, flat positions in the plane to `indices`."""
    bits = 0 if indices is None else 64 if np.prod(x.shape[1:4], dtype=object) >= 2**31 else 32
    _reduce(MAXIMUM, x, windows, y, indices, bits, False, 1)


def average_forward(x, windows, y, count_padding, divisor):
    """Write window averages to `y`; `divisor` 0 means the number of elements, with or without padding."""
    if x.dtype.kind == "f":
        taps = np.prod([(w[:, 3]).max(initial=0) for w in windows], dtype=object)
        _reduce(SUM if taps <= MOST_TAPS else WIDE_SUM, x, windows, y, None, 0, count_padding, divisor)
    else:
        _average_integers(x, *windows, y, count_padding, divisor)


def _reduce(operation, x, windows, y, indices, bits, count_padding, divisor):
    outer, D, H, W, inner = x.shape
    _, O, P, Q, _ = y.shape
    step, groups = _side_by_side(windows[2].tobytes(), inner)
    groups = groups if inner == 1 else windows[2]
    run = _reduction(operation, ELEMENTS.index(x.dtype.name), x.dtype.itemsize, step, bits)
    run(
        threads.count() if y.nbytes >= SERIAL_BYTES else 1, address(x), address(y),
        0 if indices is None else address(indices), outer, D, H, W, inner, O, P, Q,
        *map(address, windows[:2]), address(groups), len(groups), count_padding, divisor,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _side_by_side(table, inner):
    """Return (step, groups) of a table of windows along W: groups are (q, count, first, end, step, taps with padding).

    The windows of a group have as many taps, `step` elements further on each. Step 0 where lanes are channels.
    """
    windows = np.frombuffer(table, np.int64).reshape(-1, 4)
    if inner != 1:
        return 0, None
    apart = np.diff(windows[:, 0])
    step = max(int(np.bincount(apart[(apart > 0) & (apart <= MOST_STEP)], minlength=2).argmax()), 1)
    length = windows[:, 1] - windows[:, 0]
    breaks = (apart != step) | (np.diff(length) != 0) | (np.diff(windows[:, 3]) != 0)
    starts = np.concatenate([[0], np.flatnonzero(breaks) + 1])[: len(windows)]
    counts = np.diff(np.concatenate([starts, [len(windows)]]))
    return step, np.ascontiguousarray(np.column_stack([starts, counts, windows[starts]]))


@lru_cache(maxsize=64)
def _reduction(operation, element, itemsize, step, bits):
    """Return the task that reduces windows of one kind of element, `step` apart (0: lanes are channels)."""
    OPERATION, ELEMENT, SIZE, STEP, BITS, SIDE = operation, element, itemsize, step, bits, element_lanes(element)

    @task
    def reduce(arguments, chunk):
        """Rows of windows: each tap of depth in turn, the others inside."""
        chunks, source, target, where, outer, D, H, W, C = integers(arguments, 0, 9)
        O, P, Q, d_table, h_table, w_table, groups, count_padding, divisor = integers(arguments, 9, 9)
        begin, end = share(outer * O * P, chunk, chunks)
        for row in range(begin, end):
            n, o, p = row // (O * P), row // P % O, row % P
            d0, d1, d_step, d_count = integers(d_table + o * 32, 0, 4)
            h0, h1, h_step, h_count = integers(h_table + p * 32, 0, 4)
            depths, rows = _taps(d0, d1, d_step), _taps(h0, h1, h_step)
            for i in range(max(depths, 1)):
                d = d0 + i * d_step
                at = source + ((n * D + d) * H + h0) * W * C * SIZE
                taps = rows if depths > 0 else 0
                for group in range(groups):
                    if STEP == 0:
                        q, count = group, C
                        w0, w1, w_step, w_count = integers(w_table + group * 32, 0, 4)
                    else:
                        q, count, w0, w1, w_step, w_count = integers(w_table + group * 48, 0, 6)
                    columns = _taps(w0, w1, w_step)
                    by = 1.0
                    if OPERATION != MAXIMUM and i >= depths - 1:
                        by = _divisor(divisor, count_padding, d_count * h_count * w_count, depths * rows * columns)
                    for lane in range(0, count, SIDE):
                        # Lane by lane: the next channel, or the next window.
                        to = row * Q * C + q * C + lane
                        reduce_window(
                            OPERATION, ELEMENT, SIDE, STEP, BITS, at + (w0 * C + lane * max(STEP, 1)) * SIZE,
                            h_step * W * C * SIZE, taps, w_step * C * SIZE, columns,
                            (d * H + h0) * W + w0 + lane * STEP, h_step * W, w_step, target + to * SIZE, where + to * 8,
                            min(SIDE, count - lane), i, by,
                        )  # fmt: skip

    return reduce


@device
def _taps(first, end, step):
    return max((end - first + step - 1) // step, 0)


@device
def _divisor(given, count_padding, padded, inside):
    """What a sum is divided by: 1 where there is nothing to sum."""
    count = given if given != 0 else padded if count_padding else inside
    return float(count) if count != 0 else 1.0


def scatter_add(grad, indices, dx):
    """Add each gradient to the element its index names (-1: none); return False if an index is outside the plane."""
    return _scattered(grad, indices, dx, True)


def scatter(x, indices, y):
    """Write each value where its index says, the last one winning; return False if an index is outside the plane."""
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


def average_backward(grad, windows, dx, count_padding, divisor):
    """Write the gradient of the average with respect to its input to `dx`."""
    dx[...] = 0
    _average_backward(grad, *windows, dx, count_padding, divisor)


@kernel
def _scatter(values, indices, target, bad, add):
    outer, L, inner = values.shape
    positions, blocks = target.shape[1], bad.shape[1]
    for job in prange(outer * blocks):
        n, start = job // blocks, job % blocks * LANES
        end = min(start + LANES, inner)
        # Zeros are still in the cache when they are added to.
        for i in range(positions):
            for c in range(start, end):
                target[n, i, c] = 0
        wrong = False
        for i in range(L):
            for c in range(start, end):
                position = indices[n, i, c]
                if np.uint64(position) < np.uint64(positions):
                    if add:
                        target[n, position, c] += values[n, i, c]
                    else:
                        target[n, position, c] = values[n, i, c]
                else:
                    wrong |= (not add) | (position != -1)
        bad[n, start // LANES] = wrong


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
def _count(dw, hw, ww, count_padding, divisor):
    if divisor != 0:
        return divisor
    if count_padding:
        return dw[3] * hw[3] * ww[3]
    return _length(dw) * _length(hw) * _length(ww)


@kernel
def _average_integers(x, d_windows, h_windows, w_windows, y, count_padding, divisor):
    outer, O, P, Q, inner = y.shape
    for row in prange(outer * O * P):
        n, o, p = row // (O * P), row // P % O, row % P
        dw, hw = d_windows[o], h_windows[p]
        for q in range(Q):
            ww = w_windows[q]
            count = _count(dw, hw, ww, count_padding, divisor)
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
    for job in prange(outer * blocks):
        n, start = job // blocks, job % blocks * LANES
        end = min(start + LANES, inner)
        for o in range(O):
            for p in range(P):
                for q in range(Q):
                    dw, hw, ww = d_windows[o], h_windows[p], w_windows[q]
                    count = _count(dw, hw, ww, count_padding, divisor)
                    if count == 0:
                        continue
                    for d in range(dw[0], dw[1], dw[2]):
                        for h in range(hw[0], hw[1], hw[2]):
                            for w in range(ww[0], ww[1], ww[2]):
                                for c in range(start, end):
                                    dx[n, d, h, w, c] += grad[n, o, p, q, c] / count
