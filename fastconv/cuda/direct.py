"""Direct convolution: one output element per thread, any stride, padding, dilation and groups.

    y[n, k, o, p, q] = bias[k] + sum over c, t, r, s of x[n, c, o*stride + t*dilation - pad, ...] * w[k, c, t, r, s]

The memory format is a constant of the kernel, and so is the width of its index arithmetic: 32 bits where every tensor
has fewer than 2**31 elements. Neighbouring threads write neighbouring elements: columns where channels are first,
filters where they are last. The weight is (K, C // groups, T, R, S) for both. It has run in the emulator, on no GPU.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..geometry import ConvGeometry
from . import ptx, toolchain

cuda = toolchain.import_cuda()

from numba.cuda.types import CPointer, float32, int32, int64  # noqa: E402

# Threads of a block: four warps hide each other's loads, and a small layer still fills the multiprocessors.
THREADS = 128


def _wide_quotient(a, b):
    return a // b


def forward(channels_last: bool, wide: bool) -> Any:
    """Return the kernel for a memory format and a width of indices."""
    index = int64 if wide else int32
    quotient = _wide_quotient if wide else ptx.divide

    def direct_forward(
        x, weight, bias, y, total, C, D, H, W, K, T, R, S, O, P, Q, filters, channels,
        stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, step_d, step_h, step_w,
    ):  # fmt: skip
        number = index(index(cuda.blockIdx.x) * index(THREADS) + index(cuda.threadIdx.x))
        if number < total:
            rest = number
            k = q = index(0)
            if channels_last:
                k = index(rest - quotient(rest, index(K)) * index(K))
                rest = quotient(rest, index(K))
            q = index(rest - quotient(rest, index(Q)) * index(Q))
            rest = quotient(rest, index(Q))
            p = index(rest - quotient(rest, index(P)) * index(P))
            rest = quotient(rest, index(P))
            o = index(rest - quotient(rest, index(O)) * index(O))
            n = quotient(rest, index(O))
            if not channels_last:
                k = index(n - quotient(n, index(K)) * index(K))
                n = quotient(n, index(K))
            first = index(quotient(k, index(filters)) * index(channels))
            d0, h0, w0 = index(o * stride_d - pad_d), index(p * stride_h - pad_h), index(q * stride_w - pad_w)
            total_sum = bias[k]
            tap = index(k * channels * T * R * S)
            for c in range(channels):
                for t in range(T):
                    d = index(d0 + t * step_d)
                    for r in range(R):
                        h = index(h0 + r * step_h)
                        for s in range(S):
                            w = index(w0 + s * step_w)
                            if d >= 0 and d < D and h >= 0 and h < H and w >= 0 and w < W:
                                if channels_last:
                                    at = index((((n * D + d) * H + h) * W + w) * C + first + c)
                                else:
                                    at = index((((n * C + first + c) * D + d) * H + h) * W + w)
                                total_sum += x[at] * weight[tap]
                            tap = index(tap + index(1))
            y[number] = total_sum

    direct_forward.__name__ = f"direct_forward_{'nhwc' if channels_last else 'nchw'}_{64 if wide else 32}"
    return direct_forward


def signature(wide: bool) -> tuple[Any, ...]:
    """Return the types of a kernel's arguments."""
    return (*(CPointer(float32),) * 4, int64 if wide else int32, *(int32,) * 22)


def needs_wide(geometry: ConvGeometry) -> bool:
    """Return whether an index could pass what 32 bits hold."""
    x = geometry.batch * geometry.in_channels * math.prod(geometry.input_size)
    y = geometry.batch * geometry.out_channels * math.prod(geometry.output_size)
    weight = geometry.out_channels * geometry.in_channels // geometry.groups * math.prod(geometry.kernel_size)
    # Threads beyond the last element count on to the end of their block.
    return max(x, y + THREADS, weight) >= 2**31


def numbers(geometry: ConvGeometry) -> tuple[Any, ...]:
    """Return the numbers that follow the arrays, for a geometry of three spatial dimensions."""
    K, G = geometry.out_channels, geometry.groups
    total = geometry.batch * K * math.prod(geometry.output_size)
    sizes = (
        geometry.in_channels, *geometry.input_size, K, *geometry.kernel_size, *geometry.output_size, K // G,
        geometry.in_channels // G, *geometry.stride, *(before for before, _ in geometry.padding), *geometry.dilation,
    )  # fmt: skip
    return ((np.int64 if needs_wide(geometry) else np.int32)(total), *map(np.int32, sizes))


def blocks(geometry: ConvGeometry) -> int:
    """Return the number of blocks."""
    return -(-geometry.batch * geometry.out_channels * math.prod(geometry.output_size) // THREADS)
