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

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numba import prange

from ..registry import Buffer
from . import threads
from .compile import device, inlined, kernel, share, task
from .memory import address
from .simd import copy_part, integer, integers, store_integer, zero_bytes
from .simd_pool import (
    ELEMENTS,
    MAXIMUM,
    PACKED,
    SUM,
    WIDE_SUM,
    apart,
    can_pack,
    deposit,
    element_lanes,
    packing_of,
    reduce_window,
    rows_together,
    spread_windows,
)
from .workspace import workspace

# Channels that one thread gathers: a cache line of float32.
LANES = 16
# Bytes of output below which threads are not worth waking.
SERIAL_BYTES = 64 * 1024
# Windows up to so many elements apart are loaded as one stretch; others one at a time.
MOST_STEP = 4
# Windows of a plane of which there is a table.
MOST_PACKED = 4096
# Square windows of up to so many rows are reduced without loops.
MOST_UNROLLED = 3
# Taps of a window that are added up in the element's own precision.
MOST_TAPS = 64
# Square windows up to this size and so far apart are unrolled when they are spread: one register for each element.
MOST_KERNEL, MOST_STRIDE = 5, 3
# Shares of the work for each thread where channels of images are scattered.
SHARES = 2


def maximum(dtype, shape, windows, pooled, with_indices):
    """Return a function of (x, y, indices or None) that writes maxima and their flat positions in the plane.

    Shapes are as kernels see them; arrays of any shape that lie so in memory will do.
    """
    bits = 0 if not with_indices else 64 if math.prod(shape[1:4]) >= 2**31 else 32
    return _reducing(MAXIMUM, dtype, shape, windows, pooled, bits)


def average(dtype, shape, windows, pooled, count_padding, divisor):
    """Return a function of (x, y) that writes averages of numbers with a fraction.

    `divisor` 0 means the number of elements, with or without padding.
    """
    taps = math.prod(int(w[:, 3].max(initial=0)) for w in windows)
    return _reducing(SUM if taps <= MOST_TAPS else WIDE_SUM, dtype, shape, windows, pooled, 0, count_padding, divisor)


def average_integers(x, windows, y, count_padding, divisor):
    """Write averages of integers, truncated towards zero."""
    _average_integers(x, *windows, y, count_padding, divisor)


def _reducing(operation, dtype, shape, windows, pooled, bits=0, count_padding=False, divisor=1):
    """Return a function of (x, y, indices or None) that reduces windows."""
    element, size, kernel = ELEMENTS.index(dtype.name), dtype.itemsize, _unrolled(dtype, windows)
    if _is_packed(dtype, shape, windows):
        packs, packings = _packed_tables(
            windows[1].tobytes(), windows[2].tobytes(), shape[3], size, element_lanes(element)
        )
        run = _packed_reduction(operation, element, size, bits, kernel)
        plane, held = math.prod(shape[1:4]), (packs, packings)
        sizes = shape[0], plane, math.prod(pooled), len(packs), *map(address, held), packings.strides[0], shape[3]
    else:
        step, groups = _side_by_side(windows[2].tobytes(), shape[-1])
        run = _reduction(operation, element, size, step, bits, kernel)
        held = windows, groups
        sizes = *shape, *pooled, *map(address, windows[:2]), address(groups), len(groups)
    numbers = np.array([0, 0, 0, 0, *sizes, count_padding, divisor], np.int64)
    is_large = _is_large(dtype, shape)

    # The tables are held because machine code has their addresses.
    def reduce(x, y, indices=None, tables=held):
        arguments = numbers.copy()
        arguments[0] = threads.count() if is_large else 1
        arguments[1], arguments[2] = address(x), address(y)
        if indices is not None:
            arguments[3] = address(indices)
        run.start(arguments)

    return reduce


def _unrolled(dtype, windows):
    """Return the size of square windows that is worth code without loops, or 0."""
    sizes = [int(w[:, 3].max(initial=0)) for w in windows]
    return sizes[2] if dtype.kind == "f" and sizes[0] == 1 < sizes[1] == sizes[2] <= MOST_UNROLLED else 0


def _is_packed(dtype, shape, windows):
    """Whether windows of several rows share vectors: those of planes with few enough of them for a table."""
    _, D, _, _, inner = shape
    count = len(windows[1]) * len(windows[2])
    return can_pack() and dtype.kind == "f" and inner == 1 and D == len(windows[0]) == 1 and 0 < count <= MOST_PACKED


@lru_cache(maxsize=256)
def _packed_tables(h_table, w_table, W, itemsize, lanes):
    """Return (packs, packings): what windows of a plane are reduced at a time, and where their elements lie.

    A pack is (first window, count, first element, rows, their step, columns, their step, elements with padding, number
    of the packing). Its windows have as many taps, as far apart.
    """
    h, w = (np.frombuffer(table, np.int64).reshape(-1, 4) for table in (h_table, w_table))
    first = (h[:, :1] * W + w[:, 0]).ravel()
    taps = [np.maximum(-((t[:, 0] - t[:, 1]) // t[:, 2]), 0) for t in (h, w)]
    kinds = np.stack([
        *np.broadcast_arrays(taps[0][:, None], h[:, 2:3], taps[1], w[:, 2], h[:, 3:] * w[:, 3])
    ]).reshape(5, -1)  # fmt: skip
    changes = np.append(np.flatnonzero((kinds[:, 1:] != kinds[:, :-1]).any(axis=0)) + 1, len(first))
    packs, packings, start = [], {}, 0
    while start < len(first):
        end = min(start + lanes, changes[np.searchsorted(changes, start, "right")])
        count, packing = packing_of(first[start:end], itemsize, lanes)
        number = packings.setdefault(packing.tobytes(), len(packings))
        packs.append((start, count, first[start], *kinds[:, start], number))
        start += count
    return np.array(packs, np.int64), np.frombuffer(b"".join(packings), np.int64).reshape(len(packings), -1)


def _window(operation, element, step, bits, kernel):
    """Return the function that reduces windows side by side, the fast way where they are `kernel` x `kernel` taps.

    Vectors are read and written whole up to `source_end` and `target_end`: later ones write over what is too much.
    """
    OPERATION, ELEMENT, SIDE, STEP, BITS, KERNEL = operation, element, element_lanes(element), step, bits, kernel

    @device
    def any_window(
        source, depth_step, depths, row_step, rows, column_step, columns,
        at, at_depth, at_row, at_column, target, where, count, packing, by,
    ):  # fmt: skip
        apart()
        reduce_window(
            OPERATION, ELEMENT, SIDE, STEP, BITS, 0, 0, source, depth_step, depths, row_step, rows,
            column_step, columns, at, at_depth, at_row, at_column, target, where, count, packing, by,
        )  # fmt: skip

    @inlined
    def window(
        source, depth_step, depths, row_step, rows, column_step, columns, reach, source_end,
        at, at_depth, at_row, at_column, target, target_end, where, count, packing, by,
    ):  # fmt: skip
        last = source + (depths - 1) * depth_step + (rows - 1) * row_step + (columns - 1) * column_step
        is_regular = KERNEL == 0 or (depths == 1 and rows == KERNEL and columns == KERNEL)
        if is_regular and last + reach <= source_end and target < target_end:
            reduce_window(
                OPERATION, ELEMENT, SIDE, STEP, BITS, KERNEL, 1, source, depth_step, depths, row_step, rows,
                column_step, columns, at, at_depth, at_row, at_column, target, where, count, packing, by,
            )  # fmt: skip
        else:
            any_window(
                source, depth_step, depths, row_step, rows, column_step, columns,
                at, at_depth, at_row, at_column, target, where, count, packing, by,
            )  # fmt: skip

    return window


@lru_cache(maxsize=64)
def _packed_reduction(operation, element, itemsize, bits, kernel):
    """Return the task that reduces packs of windows."""
    OPERATION, SIZE, SIDE = operation, itemsize, element_lanes(element)
    window = _window(operation, element, PACKED, bits, kernel)

    @task
    def reduce_packs(arguments, chunk):
        """Planes of windows."""
        chunks, source, target, where, planes, plane, pooled, packs, table, packings = integers(arguments, 0, 10)
        nbytes, W, count_padding, divisor = integers(arguments, 10, 4)
        begin, end = share(planes, chunk, chunks)
        for n in range(begin, end):
            for pack in range(packs):
                first, count, at, rows, h_step, columns, w_step, padded, packing = integers(table + pack * 72, 0, 9)
                by = 1.0 if OPERATION == MAXIMUM else _divisor(divisor, count_padding, padded, rows * columns)
                to = n * pooled + first
                window(
                    source + (n * plane + at) * SIZE, 0, 1, h_step * W * SIZE, rows, w_step * SIZE, columns,
                    integer(packings + packing * nbytes, 0) + SIDE * SIZE, source + planes * plane * SIZE,
                    at, 0, h_step * W, w_step, target + to * SIZE, target + (end * pooled - SIDE + 1) * SIZE,
                    where + to * 8, count, packings + packing * nbytes, by,
                )  # fmt: skip

    return reduce_packs


def _is_large(dtype, shape):
    """Whether threads are worth waking."""
    return math.prod(shape) * dtype.itemsize >= SERIAL_BYTES


@lru_cache(maxsize=1024)
def _side_by_side(table, inner):
    """Return (step, groups) of a table of windows along W: groups are (q, count, first, taps, step, padded taps).

    The windows of a group have as many taps, `step` elements further on each. Step 0 where lanes are channels: there
    a group is one window, and `count` the channels.
    """
    windows = np.frombuffer(table, np.int64).reshape(-1, 4).copy()
    windows[:, 1] = np.maximum(-((windows[:, 0] - windows[:, 1]) // windows[:, 2]), 0)
    if inner != 1:
        return 0, np.column_stack([np.arange(len(windows)), np.full(len(windows), inner), windows])
    apart = np.diff(windows[:, 0])
    step = max(int(np.bincount(apart[(apart > 0) & (apart <= MOST_STEP)], minlength=2).argmax()), 1)
    breaks = (apart != step) | (np.diff(windows[:, 1:], axis=0) != 0).any(axis=1)
    starts = np.concatenate([[0], np.flatnonzero(breaks) + 1])[: len(windows)]
    counts = np.diff(np.concatenate([starts, [len(windows)]]))
    return step, np.ascontiguousarray(np.column_stack([starts, counts, windows[starts]]))


@lru_cache(maxsize=64)
def _reduction(operation, element, itemsize, step, bits, kernel):
    """Return the task that reduces windows of one kind of element, `step` apart (0: lanes are channels)."""
    OPERATION, SIZE, STEP, SIDE = operation, itemsize, step, element_lanes(element)
    window = _window(operation, element, step, bits, kernel)

    @task
    def reduce(arguments, chunk):
        """Rows of windows."""
        chunks, source, target, where, outer, D, H, W, C = integers(arguments, 0, 9)
        O, P, Q, d_table, h_table, w_table, groups, count_padding, divisor = integers(arguments, 9, 9)
        begin, end = share(outer * O * P, chunk, chunks)
        for row in range(begin, end):
            n, o, p = row // (O * P), row // P % O, row % P
            d0, d1, d_step, d_count = integers(d_table + o * 32, 0, 4)
            h0, h1, h_step, h_count = integers(h_table + p * 32, 0, 4)
            depths, rows = _taps(d0, d1, d_step), _taps(h0, h1, h_step)
            at = source + ((n * D + d0) * H + h0) * W * C * SIZE
            for group in range(groups):
                q, count, w0, columns, w_step, w_count = integers(w_table + group * 48, 0, 6)
                by = 1.0
                if OPERATION != MAXIMUM:
                    by = _divisor(divisor, count_padding, d_count * h_count * w_count, depths * rows * columns)
                for lane in range(0, count, SIDE):
                    # Lane by lane: the next channel, or the next window.
                    to = row * Q * C + q * C + lane
                    window(
                        at + (w0 * C + lane * max(STEP, 1)) * SIZE,
                        d_step * H * W * C * SIZE, depths, h_step * W * C * SIZE, rows, w_step * C * SIZE, columns,
                        SIDE * max(STEP, 1) * SIZE, source + outer * D * H * W * C * SIZE,
                        (d0 * H + h0) * W + w0 + lane * STEP, d_step * H * W, h_step * W, w_step,
                        target + to * SIZE, target + (end * Q * C - SIDE + 1) * SIZE, where + to * 8,
                        min(SIDE, count - lane), 0, by,
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


def scatter_add(dtype, shape, sizes):
    """Return a function of (grad, indices, dx) that adds each gradient to the element its index names (-1: none).

    It returns False if an index is outside the plane.
    """
    return _scatter(dtype, shape, sizes, adds=True)


def scatter(dtype, shape, sizes):
    """Return a function of (x, indices, y) that writes each value where its index says, the last one winning."""
    return _scatter(dtype, shape, sizes, adds=False)


def _scatter(dtype, shape, sizes, adds):
    outer, *pooled, inner = shape
    run = _scattering(_element(dtype)[0], dtype.itemsize, adds, inner == 1)
    is_large = _is_large(dtype, (outer, *sizes, inner))
    numbers = np.array([0] * 5 + [outer, inner, math.prod(pooled), math.prod(sizes), 0], np.int64)

    def scatter(values, indices, target):
        chunks = threads.count() if is_large else 1
        states, arguments = np.zeros(chunks, np.int64), numbers.copy()
        arguments[:5] = chunks, address(values), address(indices), address(target), address(states)
        # All channels of an image in one sweep, if there are images for all threads.
        arguments[-1] = inner if chunks == 1 else min(inner, -(-outer * inner // (SHARES * chunks)))
        run.start(arguments)
        return not states.any()

    return scatter


@lru_cache(maxsize=64)
def _scattering(element, itemsize, adds, across):
    """Return the task that scatters values by their indices, in scan order."""
    ELEMENT, SIZE, ADDS, ACROSS = element, itemsize, int(adds), int(across)

    @device
    def scatter_image(values, where, target, inner, channels, windows, elements):
        """Scatter some channels of an image, or a plane; return whether an index is outside."""
        rows, length = (1, elements * inner) if channels == inner else (elements, channels)
        for i in range(rows):
            zero_bytes(target + i * inner * SIZE, length * SIZE)
        wrong, pitch = False, 1 if ACROSS else inner
        for i in range(windows):
            for c in range(1 if ACROSS else channels):
                position = integer(where, i * pitch + c)
                if np.uint64(position) < np.uint64(elements):
                    source, to = (i * pitch + c) * SIZE, (position * pitch + c) * SIZE
                    deposit(ELEMENT, ADDS, values + source, target + to)
                else:
                    wrong |= (not ADDS) | (position != -1)
        return wrong

    @task
    def scattering(arguments, chunk):
        chunks, values, where, target, states, outer, inner, windows, elements, together = integers(arguments, 0, 10)
        pieces = (inner + together - 1) // together
        begin, end = share(outer * pieces, chunk, chunks)
        wrong = False
        for job in range(begin, end):
            n, c = job // pieces, job % pieces * together
            at, to = n * windows * inner + c, (n * elements * inner + c) * SIZE
            wrong |= scatter_image(
                values + at * SIZE, where + at * 8, target + to, inner, min(together, inner - c), windows, elements
            )
        store_integer(states, chunk, int(wrong))

    return scattering


class _Regular(NamedTuple):
    """Windows `kernel` long, `stride` apart, the first of them from `first` on, along D, H and W each."""

    kernels: tuple[int, ...]
    strides: tuple[int, ...]
    firsts: tuple[int, ...]

    def is_unrolled(self):
        """Whether there is a kernel for them: square ones along H and W."""
        return self.kernels[1] == self.kernels[2] <= MOST_KERNEL and self.strides[1] == self.strides[2] <= MOST_STRIDE


class _Plan(NamedTuple):
    """Where windows lie in a buffer: rows and columns of them, and how many elements that is.

    Windows that begin at h0 to h1 and w0 to w1 (counted in windows) reach all elements; there and before them, and
    beside those there are, the buffer holds zeros.
    """

    h0: int
    h1: int
    w0: int
    w1: int
    top: int
    rows: int
    left: int
    columns: int
    size: int


@lru_cache(maxsize=1024)
def _plan(windows, lanes, across, pooled, sizes):
    """Return the plan of a plane, or of an image's `lanes` channels."""
    kernel, stride = windows.kernels[2], windows.strides[2]
    earlier, step = (kernel - 1) // stride, lanes if across else 1
    starts = [-((first + stride - 1) // stride) for first in windows.firsts]
    ends = [(size - 1 - first) // stride + 1 for size, first in zip(sizes, windows.firsts)]
    top, left = (min(0, start - earlier) for start in starts[1:])
    right = max(-(-pooled[2] // step) * step, starts[2] + -(-(ends[2] - starts[2]) // step) * step)
    together = rows_together(stride)
    bottom = max(pooled[1], starts[1] + -(-(ends[1] - starts[1]) // together) * together)
    rows, columns = bottom - top, right - left
    size = pooled[0] * rows * columns * (1 if across else lanes)
    return _Plan(starts[1], ends[1], starts[2], ends[2], top, rows, left, columns, size)


def _spread(dtype, shape, sizes, windows, divisor):
    """Return a function of (values, array) that spreads what each window has, divided, over its elements."""
    outer, *pooled, inner = shape
    across = inner == 1
    element, lanes = _element(dtype)
    plan = _plan(windows, lanes, across, tuple(pooled), sizes)
    is_large = _is_large(dtype, (outer, *sizes, inner))
    run = _spreading(element, dtype.itemsize, windows.kernels[2], windows.strides[2], across, sizes[0] > 1)
    size = -(-plan.size // 16) * 16
    numbers = np.array(
        [0, 0, 0, 0, size, outer, inner, *pooled, *sizes,
         windows.kernels[0], windows.strides[0], *windows.firsts, *plan[:-1], divisor], np.int64
    )  # fmt: skip

    def spread(values, target):
        chunks, arguments = threads.count() if is_large else 1, numbers.copy()
        with workspace({"buffer": Buffer((chunks, size), dtype)}) as lent:
            arguments[:4] = chunks, address(values), address(target), address(lent["buffer"])
            run.start(arguments)

    return spread


@lru_cache(maxsize=8)
def _element(dtype):
    """Return the number of an element type, and how many are in a vector."""
    element = ELEMENTS.index(dtype.name)
    return element, element_lanes(element)


@lru_cache(maxsize=64)
def _spreading(element, itemsize, kernel, stride, across, deep):
    """Return the task that spreads square windows of one size."""
    ELEMENT, SIZE, LANES = element, itemsize, element_lanes(element)
    KERNEL, STRIDE, ACROSS = kernel, stride, int(across)
    # Elements from one window to the next in the buffer, and windows in a vector.
    CELL, STEP = (1, LANES) if across else (LANES, 1)
    ROWS, DEEP = rows_together(stride), int(deep)

    @device
    def lay_out(arguments, values_at, to, count):
        """Lay out a plane, or some channels of an image: rows and columns without windows stay zeros."""
        inner, O, P, Q = integers(arguments, 6, 4)
        top, rows, left, columns = integers(arguments, 22, 4)
        for o in range(O):
            for p in range(P):
                for q in range(0, Q, STEP):
                    at = ((o * P + p) * Q + q) * inner
                    cell = ((o * rows + p - top) * columns + q - left) * CELL
                    part = min(count, Q - q) if ACROSS else count
                    copy_part(LANES, SIZE, to + cell * SIZE, values_at + at * SIZE, part)

    @device
    def spread(arguments, values, target, count):
        """Write the elements that all windows reach."""
        inner, O, P, Q, D, H, W, d_kernel, d_stride, d_first, h_first, w_first = integers(arguments, 6, 12)
        h0, h1, w0, w1, top, rows, left, columns, divisor = integers(arguments, 18, 9)
        for d in range(D):
            o0 = max(-((d_kernel - 1 + d_first - d) // d_stride), 0)
            o1 = min((d - d_first) // d_stride + 1, O)
            for p in range(h0, h1, ROWS):
                h = p * STRIDE + h_first
                for q in range(w0, w1, STEP):
                    w = q * STRIDE + w_first
                    cell = ((o0 * rows + p - top) * columns + q - left) * CELL
                    spread_windows(
                        ELEMENT, LANES, ACROSS, KERNEL, STRIDE, values + cell * SIZE,
                        max(o1 - o0, 0) if DEEP else 1, rows * columns * CELL, columns * CELL, CELL, h, H, w, W, count,
                        target + ((d * H + h) * W + w) * inner * SIZE, W * inner * SIZE, inner * SIZE, float(divisor),
                    )  # fmt: skip

    @task
    def spreading(arguments, chunk):
        """Planes, or vectors of channels."""
        chunks, source, target, buffer, size, outer, inner, O, P, Q, D, H, W = integers(arguments, 0, 13)
        values = buffer + chunk * size * SIZE
        zero_bytes(values, size * SIZE)
        blocks = (inner + LANES - 1) // LANES
        begin, end = share(outer * blocks, chunk, chunks)
        for job in range(begin, end):
            n, c = job // blocks, job % blocks * LANES
            channels = LANES if ACROSS else min(LANES, inner - c)
            lay_out(arguments, source + (n * O * P * Q * inner + c) * SIZE, values, channels)
            spread(arguments, values, target + (n * D * H * W * inner + c) * SIZE, channels)

    return spreading


def gather(values, indices, out):
    """Read the value that each index names; return False if an index is outside the plane."""
    bad = np.zeros((len(out), -(-out.shape[-1] // LANES)), np.bool_)
    _gather(_flat(values), _flat(indices), _flat(out), bad)
    return not bad.any()


def average_grad(geometry, dtype, shape, sizes, count_padding, divisor):
    """Return a function of (grad, dx) that writes the gradient of the average with respect to its input."""
    regular, divisor = _spread_average(geometry, count_padding, divisor)
    if regular and math.prod(shape):
        spread = _spread(dtype, shape, sizes, regular, divisor or 1)
    else:
        inverse = [_inverse(w.tobytes(), size) for w, size in zip(geometry.windows, sizes)]
        spread = average(dtype, shape, inverse, sizes, False, divisor or 1)
    if divisor != 0:
        return spread
    counts = _counts(geometry, count_padding)
    per_window = np.maximum(np.multiply.outer(np.multiply.outer(*counts[:2]), counts[2]), 1)[..., None]
    buffers = {"shares": Buffer(shape, dtype)}

    def share_out(grad, dx):
        with workspace(buffers) as lent:
            shares = np.divide(grad.reshape(shape), per_window, out=lent["shares"], casting="unsafe")
            spread(shares, dx)

    return share_out


@lru_cache(maxsize=256)
def _spread_average(geometry, count_padding, divisor):
    """Return the windows to spread, None if that takes other means, and what to divide by: 0 if windows differ."""
    g, missing = geometry, (1,) * (3 - geometry.spatial_dims)
    counts = _counts(g, count_padding)
    if divisor == 0 and all(np.ptp(c) == 0 for c in counts):
        divisor = max(math.prod(int(c[0]) for c in counts), 1)
    kernel, stride = (missing + tuple(each) for each in (g.kernel_size, g.stride))
    if g.spatial_dims == 1:
        # The rows beside the only one are zeros.
        kernel, stride = (each[1:] + each[2:] for each in (kernel, stride))
    firsts = (*(0,) * len(missing), *(-before for before, _ in g.padding))
    regular = _Regular(kernel, stride, firsts)
    return regular if regular.is_unrolled() and not g.is_adaptive and set(g.dilation) == {1} else None, divisor


def _counts(geometry, count_padding):
    """Return how many elements the windows along each dimension have."""
    inside = [np.maximum(-((w[:, 0] - w[:, 1]) // w[:, 2]), 0) for w in geometry.windows]
    return [w[:, 3] for w in geometry.windows] if count_padding else inside


@lru_cache(maxsize=1024)
def _inverse(table, size):
    """Return the windows of the gradient: the range of windows that hold each of `size` elements."""
    windows = np.frombuffer(table, np.int64).reshape(-1, 4)
    numbers, count = np.arange(len(windows)), np.zeros(size, np.int64)
    first, last = np.full(size, len(windows)), np.full(size, -1)
    for tap in range((windows[:, 3]).max(initial=0)):
        at = windows[:, 0] + tap * windows[:, 2]
        inside = at < windows[:, 1]
        # Two windows do not have the same tap in one place, but of adaptive ones those of one element.
        np.minimum.at(first, at[inside], numbers[inside])
        np.maximum.at(last, at[inside], numbers[inside])
        np.add.at(count, at[inside], 1)
    step = np.maximum((last - first) // np.maximum(count - 1, 1), 1)
    return np.column_stack([np.minimum(first, last + 1), last + 1, step, count])


def _flat(array):
    """(outer, D, H, W, inner) -> (outer, D*H*W, inner)."""
    outer, D, H, W, inner = array.shape
    return array.reshape(outer, D * H * W, inner)


@kernel
def _gather(values, indices, out, bad):
    outer, L, inner = out.shape
    positions, blocks = values.shape[1], bad.shape[1]
    for job in prange(outer * blocks):
        n, start = job // blocks, job % blocks * LANES
        end, wrong = min(start + LANES, inner), False
        for i in range(L):
            for c in range(start, end):
                position = indices[n, i, c]
                if np.uint64(position) < np.uint64(positions):
                    out[n, i, c] = values[n, position, c]
                else:
                    wrong = True
        bad[n, start // LANES] = wrong


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
