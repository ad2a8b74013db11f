"""im2col: lay every window out as a column, then one matrix product by BLAS per group.

    channels_first   y[n] (K, L) = w (K, C*T*R*S) @ cols[n] (C*T*R*S, L)
    channels_last    y (N*L, K)  = cols (N*L, T*R*S*C) @ w (T*R*S*C, K)

(Chellapilla, Puri & Simard, "High performance convolutional neural networks for document processing", 2006,
section 2; Jia, "Learning semantic image representations at a large scale", 2014, chapter 2.) The input gradient is
the product with the transposed weight, summed back by col2im; the weight gradient the product of the output's
gradient with the columns. The columns are made in blocks of output rows that fit the cache and the workspace limit.
A 1x1 convolution needs no columns: the input is its own.
"""

import math

import numpy as np
from numba import prange

from ..registry import Buffer
from . import blas, epilogue
from .compile import device, kernel
from .direct import end_inside, first_inside

# Bytes of columns made at a time: a share of the last-level cache, so that BLAS finds them there.
BLOCK_BYTES = 8 * 2**20
# Seconds that a call stalls where the threads of BLAS and of Numba take turns on the same cores (measured, 4 to 8 ms).
WAKING = 4e-3


def supports(geometry, direction):
    """Every floating-point geometry: BLAS has no integer product."""
    if geometry.dtype.kind != "f":
        return False, f"BLAS has no product of {geometry.dtype}"
    return True, ""


def seconds(geometry, direction, threads_):
    """Predicted time: the product at BLAS speed, the columns at memory speed."""
    g = geometry
    columns = 0 if g.is_pointwise else g.batch * math.prod(g.output_size) * g.reduction_length * g.groups
    C, K = g.in_channels // g.groups, g.out_channels // g.groups
    # A thin product cannot use the registers of a square one.
    efficiency = min(1.0, min(C * math.prod(g.kernel_size), K) / 48) ** 0.7
    calls = g.groups * (g.batch if g.data_format == "channels_first" else 1)
    rate = 70e9 * threads_ * (4 / g.dtype.itemsize) * efficiency
    traffic = columns * g.dtype.itemsize * (2 if direction == "input_grad" else 1)
    return WAKING + 20e-6 * calls + g.flops / rate + traffic / (6e9 * threads_)


def workspace(geometry, direction, limit):
    """One block of columns (of one image or more), the packed weight or the sum of its gradient."""
    g = geometry
    buffers = {}
    if direction == "weight_grad":
        buffers["product"] = Buffer((g.groups, *_weight_matrix(g)), g.dtype)
        buffers["sum"] = Buffer((g.groups, *_weight_matrix(g)), np.dtype(np.float64))
    elif g.data_format == "channels_last":
        buffers["packed"] = Buffer((g.groups, *_weight_matrix(g)), g.dtype)
    if not g.is_pointwise:
        buffers["columns"] = Buffer(_columns_shape(g, limit - sum(b.nbytes for b in buffers.values())), g.dtype)
    depth = g.reduction_length if direction == "forward" else g.out_channels // g.groups
    if direction != "weight_grad":
        buffers |= blas.partial_buffer(depth, _product_shape(g, direction, buffers.get("columns")), g.dtype)
    return buffers


def _columns_shape(g, room):
    """As many whole images, or else rows of one, as fit; at least one row. (N, G, CTRS, L) or (L, TRSC)."""
    room = min(room, BLOCK_BYTES)
    row = g.output_size[2] * g.reduction_length * g.dtype.itemsize
    rows_per_image = g.output_size[0] * g.output_size[1]
    if g.data_format == "channels_first":
        images, rows = _split(g.batch, rows_per_image, row * g.groups, room)
        return images, g.groups, g.reduction_length, rows * g.output_size[2]
    rows = max(min(room // max(row, 1), g.batch * rows_per_image), 1)
    return rows * g.output_size[2], g.reduction_length


def _product_shape(g, direction, columns):
    """Elements that one product writes: a block of the output, or of columns."""
    if columns is None:
        return (g.batch, g.out_channels if direction == "forward" else g.in_channels, math.prod(g.output_size))
    if direction == "input_grad":
        return columns.shape
    pixels = columns.shape[0] * (columns.shape[3] if g.data_format == "channels_first" else 1)
    return (pixels, g.out_channels)


def _split(batch, rows_per_image, row_bytes, room):
    """Return how many images, and how many output rows of each, have columns of at most `room` bytes; at least one."""
    rows = max(room // max(row_bytes, 1), 1)
    if rows >= rows_per_image:
        return min(rows // max(rows_per_image, 1), max(batch, 1)), rows_per_image
    return 1, rows


def _weight_matrix(g):
    """Shape of one group's weight as a matrix: filters first in channels_first, last in channels_last."""
    K = g.out_channels // g.groups
    return (K, g.reduction_length) if g.data_format == "channels_first" else (g.reduction_length, K)


def forward(geometry, x, weight, bias, activation, out, workspace):
    """Write the convolution of `x` with `weight`, plus bias, through the activation, to `out`."""
    g = geometry
    if g.data_format == "channels_first":
        # (G, K, CTRS)
        matrix = weight.reshape(g.groups, -1, g.reduction_length)
        for images, rows, columns in _column_blocks(g, x, workspace):
            # (N, G, K, L) = (G, K, CTRS) @ (N, G, CTRS, L)
            blas.matmul(matrix, columns, _rows_of(g, out, images, rows), workspace)
    else:
        matrix = _pack(g, weight, workspace["packed"])
        for group in range(g.groups):
            for rows, columns in _column_blocks_last(g, x, group, workspace):
                # (L, K) = (L, TRSC) @ (TRSC, K)
                blas.matmul(columns, matrix[group], _pixels_of(g, out, group, rows), workspace)
    epilogue.apply(out, g.data_format, bias, activation)


def input_grad(geometry, grad_output, weight, out, workspace):
    """Write the gradient with respect to the input to `out`."""
    g = geometry
    if not g.is_pointwise:
        out[...] = 0
    if g.data_format == "channels_first":
        # (G, CTRS, K)
        matrix = weight.reshape(g.groups, -1, g.reduction_length).transpose(0, 2, 1)
        for images, rows in _blocks(g, workspace):
            columns = _columns_for(g, out, images, rows, workspace)
            # (N, G, CTRS, L) = (G, CTRS, K) @ (N, G, K, L)
            blas.matmul(matrix, _rows_of(g, grad_output, images, rows), columns, workspace)
            if not g.is_pointwise:
                col2im(columns, out[images], rows.start, g)
    else:
        matrix = _pack(g, weight, workspace["packed"])
        for group in range(g.groups):
            for rows in _blocks_last(g, workspace):
                columns = _columns_for_last(g, out, group, rows, workspace)
                # (L, TRSC) = (L, K) @ (K, TRSC)
                blas.matmul(_pixels_of(g, grad_output, group, rows), matrix[group].T, columns, workspace)
                if not g.is_pointwise:
                    _col2im_last(columns, out, group, rows.start, *_window(g))


def weight_grad(geometry, grad_output, x, out, workspace):
    """Write the gradient with respect to the weight to `out`; blocks are added up in float64."""
    g, product, total = geometry, workspace["product"], workspace["sum"]
    total[...] = 0
    if g.data_format == "channels_first":
        for images, rows, columns in _column_blocks(g, x, workspace):
            grads = _rows_of(g, grad_output, images, rows)
            for n in range(len(grads)):
                for part in _chains(columns.shape[-1], product):
                    # (G, K, CTRS) = (G, K, L) @ (G, L, CTRS)
                    blas.matmul(grads[n][..., part], columns[n][..., part].transpose(0, 2, 1), product, workspace)
                    np.add(total, product, out=total)
        out.reshape(total.shape)[...] = total
        return
    for group in range(g.groups):
        for rows, columns in _column_blocks_last(g, x, group, workspace):
            grads = _pixels_of(g, grad_output, group, rows)
            for part in _chains(len(columns), product):
                # (TRSC, K) = (TRSC, L) @ (L, K)
                blas.matmul(columns[part].T, grads[part], product[group], workspace)
                np.add(total[group], product[group], out=total[group])
    C, K = g.in_channels // g.groups, g.out_channels // g.groups
    # (G, TRS, C, K) -> (G, K, C, TRS)
    out.reshape(g.groups, K, C, -1)[...] = total.reshape(g.groups, -1, C, K).transpose(0, 3, 2, 1)


def _chains(count, product):
    """Slices of the pixels that one product sums before it is added in float64: BLAS cuts the larger ones itself."""
    step = blas.CHAIN if product[0].size < 4096 else 8 * blas.CHAIN
    return (slice(start, start + step) for start in range(0, count, step))


def _pack(g, weight, packed):
    """(K, C/G, T, R, S) -> (G, T*R*S*C, K)."""
    C, K = g.in_channels // g.groups, g.out_channels // g.groups
    np.copyto(packed.reshape(g.groups, -1, C, K), weight.reshape(g.groups, K, C, -1).transpose(0, 3, 2, 1))
    return packed


def _window(g):
    return g.kernel_size, g.stride, tuple(before for before, _ in g.padding), g.dilation, g.output_size


def _blocks(g, workspace):
    """Yield (slice of images, slice of output rows) in a fixed order."""
    rows_per_image = g.output_size[0] * g.output_size[1]
    images, rows = g.batch, rows_per_image
    if not g.is_pointwise:
        images, length = workspace["columns"].shape[0], workspace["columns"].shape[3]
        rows = length // g.output_size[2]
    for n in range(0, g.batch, images):
        for row in range(0, rows_per_image, rows):
            yield slice(n, min(n + images, g.batch)), slice(row, min(row + rows, rows_per_image))


def _columns_for(g, x, images, rows, workspace):
    """Memory for the columns of a block; for 1x1 the pixels of `x` themselves. (N, G, CTRS, L)."""
    if g.is_pointwise:
        return x[images].reshape(-1, g.groups, g.reduction_length, math.prod(g.output_size))
    N, L = images.stop - images.start, (rows.stop - rows.start) * g.output_size[2]
    size = N * g.groups * g.reduction_length * L
    return workspace["columns"].reshape(-1)[:size].reshape(N, g.groups, g.reduction_length, L)


def _column_blocks(g, x, workspace):
    for images, rows in _blocks(g, workspace):
        columns = _columns_for(g, x, images, rows, workspace)
        if not g.is_pointwise:
            im2col(x[images], columns, rows.start, g)
        yield images, rows, columns


def _rows_of(g, y, images, rows):
    """Output rows of some images as matrices: a view (N, G, K, L)."""
    Q = g.output_size[2]
    planes = y[images].reshape(-1, g.groups, g.out_channels // g.groups, math.prod(g.output_size))
    return planes[..., rows.start * Q : rows.stop * Q]


def _blocks_last(g, workspace):
    total = g.batch * g.output_size[0] * g.output_size[1]
    step = total if g.is_pointwise else workspace["columns"].shape[0] // g.output_size[2]
    for row in range(0, total, max(step, 1)):
        yield slice(row, min(row + step, total))


def _columns_for_last(g, x, group, rows, workspace):
    """Memory for the columns of a block; for 1x1 the pixels of `x` themselves. (L, TRSC)."""
    if g.is_pointwise:
        C = g.in_channels // g.groups
        return x.reshape(-1, g.in_channels)[:, group * C : (group + 1) * C]
    return workspace["columns"][: (rows.stop - rows.start) * g.output_size[2]]


def _column_blocks_last(g, x, group, workspace):
    for rows in _blocks_last(g, workspace):
        columns = _columns_for_last(g, x, group, rows, workspace)
        if not g.is_pointwise:
            _im2col_last(x, columns, group, rows.start, *_window(g))
        yield rows, columns


def _pixels_of(g, y, group, rows):
    """Pixels of some output rows as a matrix: a view (L, K)."""
    K, Q = g.out_channels // g.groups, g.output_size[2]
    return y.reshape(-1, g.out_channels)[rows.start * Q : rows.stop * Q, group * K : (group + 1) * K]


def im2col(x, columns, first_row, geometry):
    """Write the windows of `x` (N, C, D, H, W) to `columns` (N, G, C/G*T*R*S, L), from output row `first_row` on."""
    N, C, L = x.shape[0], x.shape[1], columns.shape[-1]
    taps = math.prod(geometry.kernel_size)
    _im2col_first(x, columns.reshape(N, C, taps, L), first_row, *_window(geometry))


def col2im(columns, x, first_row, geometry):
    """Add `columns` (N, G, C/G*T*R*S, L) to the pixels of `x` that they came from: the adjoint of :func:`im2col`."""
    N, C, L = x.shape[0], x.shape[1], columns.shape[-1]
    taps = math.prod(geometry.kernel_size)
    _col2im_first(columns.reshape(N, C, taps, L), x, first_row, *_window(geometry))


@kernel
def _im2col_first(x, columns, first_row, kernel, stride, before, dilation, output):
    N, C, taps, L = columns.shape
    for task in prange(N * C * taps):
        n, c, tap = task // (C * taps), task // taps % C, task % taps
        _im2col_tap(x[n, c], columns[n, c, tap], tap, first_row, kernel, stride, before, dilation, output)


@device
def _im2col_tap(plane, column, tap, first_row, kernel, stride, before, dilation, output):
    D, H, W = plane.shape
    P, Q = output[1], output[2]
    t, r, s = tap // (kernel[1] * kernel[2]), tap // kernel[2] % kernel[1], tap % kernel[2]
    offset = s * dilation[2] - before[2]
    q0 = first_inside(offset, stride[2])
    q1 = max(end_inside(offset, stride[2], W, Q), q0)
    for i in range(column.size // Q):
        row = column[i * Q : (i + 1) * Q]
        d = (first_row + i) // P * stride[0] + t * dilation[0] - before[0]
        h = (first_row + i) % P * stride[1] + r * dilation[1] - before[1]
        if d < 0 or d >= D or h < 0 or h >= H or q0 >= Q:
            row[:] = 0
            continue
        row[:q0] = 0
        row[q1:] = 0
        source, target = plane[d, h, q0 * stride[2] + offset :], row[q0:q1]
        if stride[2] == 1:
            for q in range(target.size):
                target[q] = source[q]
        else:
            for q in range(target.size):
                target[q] = source[q * stride[2]]


@kernel
def _col2im_first(columns, x, first_row, kernel, stride, before, dilation, output):
    N, C, taps, L = columns.shape
    for task in prange(N * C):
        n, c = task // C, task % C
        for tap in range(taps):
            _col2im_tap(columns[n, c, tap], x[n, c], tap, first_row, kernel, stride, before, dilation, output)


@device
def _col2im_tap(column, plane, tap, first_row, kernel, stride, before, dilation, output):
    D, H, W = plane.shape
    P, Q = output[1], output[2]
    t, r, s = tap // (kernel[1] * kernel[2]), tap // kernel[2] % kernel[1], tap % kernel[2]
    offset = s * dilation[2] - before[2]
    q0 = first_inside(offset, stride[2])
    q1 = end_inside(offset, stride[2], W, Q)
    for i in range(column.size // Q):
        d = (first_row + i) // P * stride[0] + t * dilation[0] - before[0]
        h = (first_row + i) % P * stride[1] + r * dilation[1] - before[1]
        if d < 0 or d >= D or h < 0 or h >= H or q0 >= q1:
            continue
        source, target = column[i * Q + q0 : i * Q + q1], plane[d, h, q0 * stride[2] + offset :]
        if stride[2] == 1:
            for q in range(source.size):
                target[q] += source[q]
        else:
            for q in range(source.size):
                target[q * stride[2]] += source[q]


@kernel
def _im2col_last(x, columns, group, first_row, kernel, stride, before, dilation, output):
    L = columns.shape[0]
    for pixel in prange(L):
        _im2col_pixel(x, columns[pixel], group, first_row, pixel, kernel, stride, before, dilation, output)


@device
def _im2col_pixel(x, column, group, first_row, pixel, kernel, stride, before, dilation, output):
    D, H, W = x.shape[1:4]
    O, P, Q = output
    C = column.size // (kernel[0] * kernel[1] * kernel[2])
    row, q = first_row + pixel // Q, pixel % Q
    n, o, p = row // (O * P), row // P % O, row % P
    at = 0
    for t in range(kernel[0]):
        d = o * stride[0] + t * dilation[0] - before[0]
        for r in range(kernel[1]):
            h = p * stride[1] + r * dilation[1] - before[1]
            for s in range(kernel[2]):
                w = q * stride[2] + s * dilation[2] - before[2]
                target = column[at : at + C]
                at += C
                if d < 0 or d >= D or h < 0 or h >= H or w < 0 or w >= W:
                    target[:] = 0
                    continue
                source = x[n, d, h, w, group * C : (group + 1) * C]
                for c in range(C):
                    target[c] = source[c]


@kernel
def _col2im_last(columns, x, group, first_row, kernel, stride, before, dilation, output):
    N, D, H = x.shape[:3]
    for task in prange(N * D * H):
        n, d, h = task // (D * H), task // H % D, task % H
        _col2im_row(columns, x[n, d, h], group, first_row, n, d, h, kernel, stride, before, dilation, output)


@device
def _col2im_row(columns, row, group, first_row, n, d, h, kernel, stride, before, dilation, output):
    T, R, S = kernel
    O, P, Q = output
    W = row.shape[0]
    C = columns.shape[1] // (T * R * S)
    rows = columns.shape[0] // Q
    for t in range(T):
        od = d + before[0] - t * dilation[0]
        if od < 0 or od % stride[0] != 0 or od // stride[0] >= O:
            continue
        for r in range(R):
            ph = h + before[1] - r * dilation[1]
            if ph < 0 or ph % stride[1] != 0 or ph // stride[1] >= P:
                continue
            i = (n * O + od // stride[0]) * P + ph // stride[1] - first_row
            if i < 0 or i >= rows:
                continue
            for s in range(S):
                offset = s * dilation[2] - before[2]
                q0 = first_inside(offset, stride[2])
                q1 = end_inside(offset, stride[2], W, Q)
                at = ((t * R + r) * S + s) * C
                for q in range(q0, q1):
                    source = columns[i * Q + q, at : at + C]
                    target = row[q * stride[2] + offset, group * C : (group + 1) * C]
                    for c in range(C):
                        target[c] += source[c]
