"""Sums over pixels in two passes: the gradient of a bias, and the second pass of any other.

    db[k] = sum over n, pixels of dy[n, k, pixel]

A block sums a share of the pixels for a few channels, in registers, then in shared memory as a tree; where there is
more than one share a second kernel adds those up. Which numbers meet depends on sizes alone: no atomics. Vectors are of
channels where they are last and of pixels where they are first. It has run in the emulator, on no GPU.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from ..geometry import ConvGeometry
from ..registry import Buffer
from . import toolchain
from .elements import Element
from .lanes import THREADS, divided, divisor, divisor_types, index_type, loader, needs_wide, scalar, widest
from .ptx import pointer_to
from .steps import Step

cuda = toolchain.import_cuda()

from numba.cuda.types import CPointer  # noqa: E402

# Additions in one running sum: the rounding error of a float32 sum grows with its length.
CHAIN = 512
# Blocks to cut the pixels for: eight for each of 132 multiprocessors.
ENOUGH_BLOCKS = 1056


@lru_cache(maxsize=16)
def tree(wide: bool, across: int, down: int) -> Any:
    """Return the function that adds up the rows of a block's (down, across) slots of shared memory in its first row."""
    index, half = index_type(wide), down // 2

    def add_rows(slots, column, row):
        above = index(half)
        while above > 0:
            cuda.syncthreads()
            if row < above:
                slots[row * across + column] += slots[(row + above) * across + column]
            above = index(above >> 1)

    return add_rows


@lru_cache(maxsize=64)
def add_pixels(element: Element, channels_last: bool, wide: bool, lanes: int, across: int, down: int) -> Any:
    """Return the kernel that sums a share of the pixels: blocks of `across` vectors of channels, `down` pixels.

    The target is (shares, K). Where channels are first `across` is 1, and L counts vectors of pixels.
    """
    index, split, load, sums = index_type(wide), divided(wide), loader(element, lanes), element.sums
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


@lru_cache(maxsize=16)
def add_parts(element: Element, wide: bool) -> Any:
    """Return the kernel that adds up (count, total) sums in order, one result a thread."""
    index, sums, narrow = index_type(wide), element.sums, element.narrow

    def sums_add_parts(parts, out, total, count):
        number = index(index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x))
        if number < total:
            result, at = sums(0), number
            for _ in range(count):
                result += parts[at]
                at = index(at + total)
            out[number] = narrow(result)

    sums_add_parts.__name__ = f"sums_add_parts_{element.name}_{64 if wide else 32}"
    return sums_add_parts


# --- host ------------------------------------------------------------------------------------------------------


def shares(pixels: int, blocks: int, down: int) -> tuple[int, int]:
    """Return (how many shares, pixels of one) for so many pixels, blocks beside each other and rows of a block."""
    wanted = max(min(-(-ENOUGH_BLOCKS // blocks), -(-pixels // (8 * down))), -(-pixels // (CHAIN * down)), 1)
    share = max(-(-pixels // wanted), 1)
    return max(-(-pixels // share), 1), share


def sum_dtype(dtype: np.dtype) -> np.dtype:
    """Return what sums of a dtype are held in."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def second_pass(element: Element, wide: bool, total: int, count: int, threads: int = THREADS) -> Step:
    """Return the launch that adds up "parts" to "out"."""
    index = index_type(wide)
    signature = (CPointer(element.sums), element.pointer, index, index)
    numbers = scalar(total, wide), scalar(count, wide)
    grid, block = (-(-total // threads), 1, 1), (threads, 1, 1)
    return Step(add_parts(element, wide), signature, grid, block, ("parts", "out", *numbers))


def _plan(g: ConvGeometry, aligned: bool, threads: int) -> tuple[int, int, int, int, int]:
    """Return (lanes, across, down, pixels in vectors, blocks of channels)."""
    K, pixels = g.out_channels, math.prod(g.output_size)
    if g.data_format == "channels_last":
        lanes = widest(g.dtype, K) if aligned else 1
        across = min(32, threads)
        return lanes, across, threads // across, g.batch * pixels, -(-K // (lanes * across))
    lanes = widest(g.dtype, pixels) if aligned else 1
    return lanes, 1, threads, g.batch * pixels // lanes, K


def bias_workspace(geometry: ConvGeometry, aligned: bool = True, threads: int = THREADS) -> dict[str, Buffer]:
    """Return the buffers of `bias_grad`."""
    _, _, down, count, blocks = _plan(geometry, aligned, threads)
    shape = (shares(count, blocks, down)[0], geometry.out_channels)
    return {"parts": Buffer(shape, sum_dtype(geometry.dtype))}


def bias_grad(geometry: ConvGeometry, aligned: bool = True, threads: int = THREADS) -> list[Step]:
    """Return the launches from "grad_output" to the gradient "out" of a bias, (K,).

    `threads`, a power of two, is that of a block.
    """
    g, element = geometry, Element.of(geometry.dtype)
    lanes, across, down, count, blocks = _plan(g, aligned, threads)
    parts, share = shares(count, blocks, down)
    wide = needs_wide(g.output_shape)
    kernel = add_pixels(element, g.data_format == "channels_last", wide, lanes, across, down)
    index = index_type(wide)
    signature = (element.pointer, CPointer(element.sums), index, index, index, *divisor_types(wide))
    numbers = (
        *(scalar(n, wide) for n in (g.out_channels, count, share)),
        *divisor(max(math.prod(g.output_size) // lanes, 1), wide),
    )  # fmt: skip
    first = Step(kernel, signature, (blocks, parts, 1), (across, down, 1), ("grad_output", "parts", *numbers))
    return [first, second_pass(element, wide, g.out_channels, parts, threads)]
