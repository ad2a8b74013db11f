"""The bias on its own: its gradient, and bias and activation after algorithms that do not end in them.

    db[k] = sum over n and pixels of g[n, k, pixel]        y[n, k, pixel] = activate(y[n, k, pixel] + b[k])

Vectors are of channels where they are last, and of pixels where they are first.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from ..registry import Buffer
from . import toolchain
from .elements import Element
from .epilogue import CODES, activate
from .indices import THREADS, constant_division, divided, divisor, index_type, launch, needs_wide, step
from .lanes import loader, widest
from .ptx import pointer_to
from .steps import Step
from .sums import second_pass, shares, tree

cuda = toolchain.import_cuda()

from numba.cuda.types import CPointer  # noqa: E402


@lru_cache(maxsize=64)
def add_pixels(element: Element, channels_last: bool, wide: bool, lanes: int, across: int, down: int) -> Any:
    """Return the kernel that sums a share of the pixels: blocks of `across` vectors of channels, `down` pixels.

    The target is (shares, K). Where channels are first `across` is 1, and L counts vectors of pixels.
    """
    index, split, load, sums = index_type(wide), constant_division(wide), loader(element, lanes), element.sums
    slots, add_rows = across * down, tree(wide, across, down)

    def bias_add_pixels(grad, parts, K, count, share, L, l_m, l_s):
        shared = pointer_to(cuda.shared.array(slots, sums))
        column, row = index(cuda.threadIdx.x), index(cuda.threadIdx.y)
        results, values = cuda.local.array(lanes, sums), cuda.local.array(lanes, sums)
        for i in range(lanes):
            results[i] = sums(0)
        part = index(cuda.blockIdx.y)
        k = index(index(cuda.blockIdx.x) * index(across) + column)
        if channels_last:
            k = index(k * lanes)
        if k < K:
            for m in range(index(part * share + row), index(min(index(part * share + share), count)), down):
                if channels_last:
                    at = index(m * K + k)
                else:
                    n, l = split(index(m), L, l_m, l_s)
                    at = index(((n * K + k) * L + l) * lanes)
                load(grad, at, values, 0)
                for i in range(lanes):
                    results[i] += values[i]
        if not channels_last:
            for i in range(1, lanes):
                results[0] += results[i]
        for i in range(lanes if channels_last else 1):
            cuda.syncthreads()
            shared[row * across + column] = results[i]
            add_rows(shared, column, row)
            if row == 0 and k < K:
                parts[index(part * K + k + i)] = shared[column]

    bias_add_pixels.__name__ = f"bias_add_pixels_{element.name}_{lanes}"
    return bias_add_pixels


def _plan(N: int, K: int, L: int, data_format: str, dtype: np.dtype, threads: int) -> tuple[int, int, int, int, int]:
    """Return (lanes, across, down, pixels in vectors, blocks of channels)."""
    if data_format == "channels_last":
        lanes, across = widest(dtype, K), min(32, threads)
        return lanes, across, threads // across, N * L, -(-K // (lanes * across))
    lanes = widest(dtype, L)
    return lanes, 1, threads, N * L // lanes, K


def workspace(N: int, K: int, L: int, data_format: str, dtype: np.dtype, threads: int = THREADS) -> dict[str, Buffer]:
    """Return the buffers of the gradient: sums of the shares of pixels."""
    _, _, down, count, blocks = _plan(N, K, L, data_format, dtype, threads)
    return {"parts": Buffer((shares(count, blocks, down)[0], K), Element.of(dtype).sums_dtype)}


def steps(N: int, K: int, L: int, data_format: str, dtype: np.dtype, threads: int = THREADS) -> list[Step]:
    """Return the launches from "grad_output", (N, K, L) or (N, L, K), to the gradient "out" of a bias, (K,).

    `threads`, a power of two, is that of a block.
    """
    element, wide = Element.of(dtype), needs_wide(N * K * L)
    lanes, across, down, count, blocks = _plan(N, K, L, data_format, dtype, threads)
    parts, share = shares(count, blocks, down)
    kernel = add_pixels(element, data_format == "channels_last", wide, lanes, across, down)
    arrays = [("grad_output", element.pointer), ("parts", CPointer(element.sums))]
    numbers = (K, count, share, *divisor(max(L // lanes, 1), wide))
    first = step(kernel, arrays, numbers, wide, (blocks, parts), (across, down))
    return [first, second_pass(element, wide, K, parts, threads)]


@lru_cache(maxsize=256)
def ending(element: Element, wide: bool, code: int, has_bias: bool) -> Any:
    """Return the kernel that adds a bias and applies an activation, in place."""
    index, split = index_type(wide), divided(wide)
    widen, narrow = element.widen, element.narrow

    def bias_ending(out, bias, total, channels, pixels):
        number = index(index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x))
        if number < total:
            value = widen(out[number])
            if has_bias:
                value += widen(bias[split(split(number, pixels)[0], channels)[1]])
            out[number] = narrow(activate(value, code))

    bias_ending.__name__ = f"bias_ending_{element.name}_{64 if wide else 32}"
    return bias_ending


def apply_steps(
    size: int, channels: int, pixels: int, dtype: np.dtype, activation: str | None, bias: bool, threads: int = THREADS
) -> list[Step]:
    """Return the launch for `size` elements, whose channel changes every `pixels` of them."""
    element, wide = Element.of(dtype), needs_wide(size)
    kernel = ending(element, wide, CODES[activation], bias)
    arrays = [("out", element.pointer), ("bias", element.pointer)]
    return [launch(kernel, arrays, (size, channels, pixels), wide, size, threads)]
