"""Direct convolution: the definition, one output row at a time.

    y[n, k, p, q] = sum over c, r, s of  x[n, c, p*u + r*d - a, q*u + s*d - a] * w[k, c, r, s]

(stride u, dilation d, padding a; Dumoulin & Visin 2016, section 2). An output row is a sum of scaled input rows, so
the innermost loop runs along memory: along the pixels of a row in channels_first, along the filters in
channels_last, where the weight is first packed as (G, T, R, S, C/G, K/G). The input gradient is the same sum
gathered from the other side. No product with padding is formed: the ranges of r, s and q are cut instead.

Sums run in chains of at most `CHAIN` products that are then added up, so that float32 keeps its promise at any depth.
"""

import math

import numpy as np
from numba import prange

from ..registry import Buffer
from . import epilogue, threads
from .compile import device, kernel
from .machine import constants

# Products per running sum: the rounding error of a float32 sum grows with its length.
CHAIN = 512


def supports(geometry, direction):
    """Every geometry; 8-bit integers forward only."""
    return True, ""


def workspace(geometry, direction, limit):
    """A row of partial sums per thread, and in channels_last the packed weight."""
    g, (C, K) = geometry, _group_channels(geometry)
    chunks = threads.count()
    if g.data_format == "channels_first":
        if direction == "weight_grad":
            return {}
        row = g.output_size[-1] if direction == "forward" else g.input_size[-1]
        return {"rows": Buffer((chunks, row), g.dtype)}
    taps = (g.groups, *g.kernel_size)
    if direction == "forward":
        return {"rows": Buffer((chunks, K), g.dtype), "packed": Buffer((*taps, C, K), g.dtype)}
    if direction == "input_grad":
        return {"rows": Buffer((chunks, C), g.dtype), "packed": Buffer((*taps, K, C), g.dtype)}
    return {
        "rows": Buffer((chunks, K), g.dtype),
        "sums": Buffer((chunks, K), np.dtype(np.float64)),
        "packed": Buffer((*taps, C, K), g.dtype),
    }


def seconds(geometry, direction, threads_):
    """Predicted time: so many innermost loops, each with a fixed cost and one per element, and moving the arrays."""
    g, (C, K) = geometry, _group_channels(geometry)
    taps = math.prod(g.kernel_size)
    dense_stride = 1 if direction != "input_grad" else math.prod(g.stride[:2])
    if g.data_format == "channels_first":
        pixels = g.batch * math.prod((g.input_size if direction == "input_grad" else g.output_size)[:2])
        loops = pixels * g.groups * C * K * taps / dense_stride
        row = g.output_size[2]
        fixed = 8 if direction == "weight_grad" else 18
        each = 0.09 if g.stride[2] == 1 else 0.7
    else:
        pixels = g.batch * math.prod(g.input_size if direction == "input_grad" else g.output_size)
        row = C if direction == "input_grad" else K
        loops = pixels * g.groups * (K if direction == "input_grad" else C) * taps / dense_stride
        # Up to 64 elements the loop is not vectorised.
        fixed, each = (15, 0.2) if row <= 64 else (8, 0.06)
    return 20e-6 + loops * (fixed + each * row) * 1e-9 / threads_ + g.bytes / constants().bandwidth


def forward(geometry, x, weight, bias, activation, out, workspace):
    """Write the convolution of `x` with `weight`, plus bias, through the activation, to `out`."""
    g, rows = geometry, workspace["rows"]
    if g.data_format == "channels_first":
        _forward_first(x, weight, out, rows, g.stride, _before(g), g.dilation, g.groups, _chain(g))
    else:
        packed = _pack(g, weight, (0, 3, 4, 5, 2, 1), workspace["packed"])
        _forward_last(x, packed, out, rows, g.stride, _before(g), g.dilation, _chain(g))
    epilogue.apply(out, g.data_format, bias, activation)


def input_grad(geometry, grad_output, weight, out, workspace):
    """Write the gradient with respect to the input to `out`."""
    g, rows = geometry, workspace["rows"]
    if g.data_format == "channels_first":
        _input_grad_first(grad_output, weight, out, rows, g.stride, _before(g), g.dilation, g.groups, _chain(g))
    else:
        packed = _pack(g, weight, (0, 3, 4, 5, 1, 2), workspace["packed"])
        _input_grad_last(grad_output, packed, out, rows, g.stride, _before(g), g.dilation, _chain(g))


def weight_grad(geometry, grad_output, x, out, workspace):
    """Write the gradient with respect to the weight to `out`."""
    g = geometry
    if g.data_format == "channels_first":
        _weight_grad_first(grad_output, x, out, g.stride, _before(g), g.dilation, g.groups)
        return
    packed, rows, sums = workspace["packed"], workspace["rows"], workspace["sums"]
    _weight_grad_last(grad_output, x, packed, rows, sums, g.stride, _before(g), g.dilation)
    C, K = _group_channels(g)
    # (G, T, R, S, C, K) -> (G, K, C, T, R, S)
    np.copyto(out.reshape(g.groups, K, C, *g.kernel_size), packed.transpose(0, 5, 4, 1, 2, 3))


def _before(g):
    return tuple(before for before, _ in g.padding)


def _group_channels(g):
    return g.in_channels // g.groups, g.out_channels // g.groups


def _chain(g):
    return max(CHAIN // math.prod(g.kernel_size), 1)


def _pack(g, weight, order, packed):
    """(G, K, C, T, R, S) in another order of axes."""
    C, K = _group_channels(g)
    np.copyto(packed, weight.reshape(g.groups, K, C, *g.kernel_size).transpose(order))
    return packed


@device
def first_inside(offset, stride):
    """Smallest i >= 0 with i*stride + offset >= 0."""
    return max(0, -(offset // stride))


@device
def end_inside(offset, stride, size, count):
    """End of the range of i < count with i*stride + offset < size."""
    return max(0, min(count, (size - 1 - offset) // stride + 1))


@device
def _add_scaled(target, factor, source):
    for i in range(target.size):
        target[i] += factor * source[i]


@kernel
def _forward_first(x, w, y, rows, stride, before, dilation, groups, chain):
    N, K, O, P, Q = y.shape
    chunks, tasks = rows.shape[0], N * K * O * P
    for chunk in prange(chunks):
        for task in range(chunk * tasks // chunks, (chunk + 1) * tasks // chunks):
            p, o = task % P, task // P % O
            k, n = task // (P * O) % K, task // (P * O * K)
            _forward_row(x, w, y[n, k, o, p], rows[chunk], n, k, o, p, stride, before, dilation, groups, chain)


@device
def _forward_row(x, w, row, partial, n, k, o, p, stride, before, dilation, groups, chain):
    K, C, T, R, S = w.shape
    D, H, W = x.shape[2:]
    first_channel = k // (K // groups) * C
    row[:] = 0
    for start in range(0, C, chain):
        partial[:] = 0
        for c in range(start, min(start + chain, C)):
            for t in range(T):
                d = o * stride[0] + t * dilation[0] - before[0]
                if d < 0 or d >= D:
                    continue
                for r in range(R):
                    h = p * stride[1] + r * dilation[1] - before[1]
                    if h < 0 or h >= H:
                        continue
                    source = x[n, first_channel + c, d, h]
                    for s in range(S):
                        offset = s * dilation[2] - before[2]
                        q0 = first_inside(offset, stride[2])
                        q1 = end_inside(offset, stride[2], W, row.size)
                        if q0 >= q1:
                            continue
                        at = q0 * stride[2] + offset
                        if stride[2] == 1:
                            _add_scaled(partial[q0:q1], w[k, c, t, r, s], source[at : at + q1 - q0])
                        else:
                            _add_scaled(partial[q0:q1], w[k, c, t, r, s], source[at :: stride[2]])
        for q in range(row.size):
            row[q] += partial[q]


@kernel
def _forward_last(x, w, y, rows, stride, before, dilation, chain):
    N, O, P, Q, _ = y.shape
    chunks, tasks = rows.shape[0], N * O * P * Q
    for chunk in prange(chunks):
        for task in range(chunk * tasks // chunks, (chunk + 1) * tasks // chunks):
            q, p = task % Q, task // Q % P
            o, n = task // (Q * P) % O, task // (Q * P * O)
            _forward_pixel(x, w, y[n, o, p, q], rows[chunk], n, o, p, q, stride, before, dilation, chain)


@device
def _forward_pixel(x, w, pixel, partial, n, o, p, q, stride, before, dilation, chain):
    G, T, R, S, C, K = w.shape
    D, H, W = x.shape[1:4]
    for g in range(G):
        total = pixel[g * K : (g + 1) * K]
        total[:] = 0
        for start in range(0, C, chain):
            partial[:] = 0
            for t in range(T):
                d = o * stride[0] + t * dilation[0] - before[0]
                if d < 0 or d >= D:
                    continue
                for r in range(R):
                    h = p * stride[1] + r * dilation[1] - before[1]
                    if h < 0 or h >= H:
                        continue
                    for s in range(S):
                        i = q * stride[2] + s * dilation[2] - before[2]
                        if i < 0 or i >= W:
                            continue
                        for c in range(start, min(start + chain, C)):
                            _add_scaled(partial, x[n, d, h, i, g * C + c], w[g, t, r, s, c])
            for k in range(K):
                total[k] += partial[k]


@kernel
def _input_grad_first(dy, w, dx, rows, stride, before, dilation, groups, chain):
    N, C, D, H, W = dx.shape
    chunks, tasks = rows.shape[0], N * C * D * H
    for chunk in prange(chunks):
        for task in range(chunk * tasks // chunks, (chunk + 1) * tasks // chunks):
            h, d = task % H, task // H % D
            c, n = task // (H * D) % C, task // (H * D * C)
            _input_grad_row(dy, w, dx[n, c, d, h], rows[chunk], n, c, d, h, stride, before, dilation, groups, chain)


@device
def _input_grad_row(dy, w, row, partial, n, c, d, h, stride, before, dilation, groups, chain):
    C, T, R, S = w.shape[1:]
    K = w.shape[0] // groups
    O, P, Q = dy.shape[2:]
    first_filter = c // C * K
    row[:] = 0
    for start in range(0, K, chain):
        partial[:] = 0
        for k in range(first_filter + start, first_filter + min(start + chain, K)):
            for t in range(T):
                od = d + before[0] - t * dilation[0]
                if od < 0 or od % stride[0] != 0 or od // stride[0] >= O:
                    continue
                for r in range(R):
                    ph = h + before[1] - r * dilation[1]
                    if ph < 0 or ph % stride[1] != 0 or ph // stride[1] >= P:
                        continue
                    source = dy[n, k, od // stride[0], ph // stride[1]]
                    for s in range(S):
                        offset = s * dilation[2] - before[2]
                        q0 = first_inside(offset, stride[2])
                        q1 = end_inside(offset, stride[2], row.size, Q)
                        if q0 >= q1:
                            continue
                        at, factor = q0 * stride[2] + offset, w[k, c % C, t, r, s]
                        if stride[2] == 1:
                            _add_scaled(partial[at : at + q1 - q0], factor, source[q0:q1])
                        else:
                            _add_scaled_spread(partial[at:], stride[2], factor, source[q0:q1])
        for i in range(row.size):
            row[i] += partial[i]


@device
def _add_scaled_spread(target, step, factor, source):
    for i in range(source.size):
        target[i * step] += factor * source[i]


@kernel
def _input_grad_last(dy, w, dx, rows, stride, before, dilation, chain):
    N, D, H, W, _ = dx.shape
    chunks, tasks = rows.shape[0], N * D * H * W
    for chunk in prange(chunks):
        for task in range(chunk * tasks // chunks, (chunk + 1) * tasks // chunks):
            i, h = task % W, task // W % H
            d, n = task // (W * H) % D, task // (W * H * D)
            _input_grad_pixel(dy, w, dx[n, d, h, i], rows[chunk], n, d, h, i, stride, before, dilation, chain)


@device
def _input_grad_pixel(dy, w, pixel, partial, n, d, h, i, stride, before, dilation, chain):
    G, T, R, S, K, C = w.shape
    O, P, Q = dy.shape[1:4]
    for g in range(G):
        total = pixel[g * C : (g + 1) * C]
        total[:] = 0
        for start in range(0, K, chain):
            partial[:] = 0
            for t in range(T):
                od = d + before[0] - t * dilation[0]
                if od < 0 or od % stride[0] != 0 or od // stride[0] >= O:
                    continue
                for r in range(R):
                    ph = h + before[1] - r * dilation[1]
                    if ph < 0 or ph % stride[1] != 0 or ph // stride[1] >= P:
                        continue
                    for s in range(S):
                        qi = i + before[2] - s * dilation[2]
                        if qi < 0 or qi % stride[2] != 0 or qi // stride[2] >= Q:
                            continue
                        source = dy[n, od // stride[0], ph // stride[1], qi // stride[2]]
                        for k in range(start, min(start + chain, K)):
                            _add_scaled(partial, source[g * K + k], w[g, t, r, s, k])
            for c in range(C):
                total[c] += partial[c]


@kernel
def _weight_grad_first(dy, x, dw, stride, before, dilation, groups):
    K, C = dw.shape[:2]
    for task in prange(K * C):
        k, c = task // C, task % C
        _weight_grad_filter(dy, x, dw[k, c], k, k // (K // groups) * C + c, stride, before, dilation)


@device
def _weight_grad_filter(dy, x, dw, k, c, stride, before, dilation):
    T, R, S = dw.shape
    N = dy.shape[0]
    for t in range(T):
        for r in range(R):
            for s in range(S):
                # A row's dot product is summed in its own dtype, the rows in float64.
                total = 0.0
                for n in range(N):
                    total += _weight_grad_tap(dy[n, k], x[n, c], t, r, s, stride, before, dilation)
                dw[t, r, s] = total


@device
def _weight_grad_tap(dy, x, t, r, s, stride, before, dilation):
    O, P, Q = dy.shape
    D, H, W = x.shape
    offset = s * dilation[2] - before[2]
    q0 = first_inside(offset, stride[2])
    q1 = end_inside(offset, stride[2], W, Q)
    total = 0.0
    if q0 >= q1:
        return total
    for o in range(O):
        d = o * stride[0] + t * dilation[0] - before[0]
        if d < 0 or d >= D:
            continue
        for p in range(P):
            h = p * stride[1] + r * dilation[1] - before[1]
            if h < 0 or h >= H:
                continue
            # The sum runs in as many lanes as a vector has, so its chains are that much shorter.
            for start in range(q0, q1, 8 * CHAIN):
                end = min(start + 8 * CHAIN, q1)
                first = start * stride[2] + offset
                if stride[2] == 1:
                    total += _dot(dy[o, p, start:end], x[d, h, first : first + end - start])
                else:
                    total += _dot(dy[o, p, start:end], x[d, h, first :: stride[2]])
    return total


@device
def _dot(a, b):
    total = a[0] * b[0]
    for i in range(1, a.size):
        total += a[i] * b[i]
    return total


@kernel
def _weight_grad_last(dy, x, dw, rows, sums, stride, before, dilation):
    G, T, R, S, C, _ = dw.shape
    chunks, tasks = rows.shape[0], G * T * R * S * C
    for chunk in prange(chunks):
        for task in range(chunk * tasks // chunks, (chunk + 1) * tasks // chunks):
            c, s = task % C, task // C % S
            r, t = task // (C * S) % R, task // (C * S * R) % T
            g = task // (C * S * R * T)
            tap = dw[g, t, r, s, c]
            _weight_grad_pixels(
                dy,
                x,
                tap,
                rows[chunk],
                sums[chunk],
                g * tap.size,
                g * C + c,
                t,
                r,
                s,
                stride,
                before,
                dilation,
            )


@device
def _weight_grad_pixels(dy, x, tap, partial, total, first_filter, c, t, r, s, stride, before, dilation):
    N, O, P, Q, _ = dy.shape
    D, H, W = x.shape[1:4]
    offset = s * dilation[2] - before[2]
    q0 = first_inside(offset, stride[2])
    q1 = end_inside(offset, stride[2], W, Q)
    total[:] = 0
    for n in range(N):
        for o in range(O):
            d = o * stride[0] + t * dilation[0] - before[0]
            if d < 0 or d >= D:
                continue
            for p in range(P):
                h = p * stride[1] + r * dilation[1] - before[1]
                if h < 0 or h >= H:
                    continue
                for start in range(q0, q1, CHAIN):
                    partial[:] = 0
                    for q in range(start, min(start + CHAIN, q1)):
                        source = dy[n, o, p, q, first_filter : first_filter + tap.size]
                        _add_scaled(partial, x[n, d, h, q * stride[2] + offset, c], source)
                    for k in range(tap.size):
                        total[k] += partial[k]
    for k in range(tap.size):
        tap[k] = total[k]
