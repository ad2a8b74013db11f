"""The bias on its own: its gradient, and bias and activation after algorithms that do not end in them.

db[k] = sum over n, o, p, q of g[n, k, o, p, q]        y[n, k, ...] = activate(y[n, k, ...] + bias[k])
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from ..registry import Buffer
from . import sums as summing
from . import toolchain
from .elements import Element
from .epilogue import CODES, activate
from .indices import step, whole_numbers
from .ptx import pointer_to
from .steps import Step

cuda = toolchain.import_cuda()

from numba.cuda.types import CPointer  # noqa: E402

THREADS = 128


@lru_cache(maxsize=64)
def gradient(element: Element, channels_last: bool, wide: bool, own: int, pixels: int, to_parts: bool) -> Any:
    """Return the kernel of the gradient: blocks of `own` channels, `pixels` pixels at a time."""
    index, _, divided = whole_numbers(wide)
    widen, narrow, sums = element.widen, element.narrow, element.sums
    slots, half = own * pixels, pixels // 2

    def bias_gradient(grad, out, K, L, share, count, chain):
        partial = pointer_to(cuda.shared.array(slots, sums))
        lane, row = index(cuda.threadIdx.x), index(cuda.threadIdx.y)
        k = index(index(cuda.blockIdx.x) * index(own) + lane)
        result = sums(0)
        if k < K:
            m = index(index(cuda.blockIdx.y) * share + row)
            end = index(min(index(index(cuda.blockIdx.y) * share + share), count))
            while m < end:
                part, stop = sums(0), index(min(index(m + chain), end))
                while m < stop:
                    if channels_last:
                        part += widen(grad[index(m * K + k)])
                    else:
                        n, l = divided(m, L)
                        part += widen(grad[index((n * K + k) * L + l)])
                    m = index(m + index(pixels))
                result += part
        slot = index(row * index(own) + lane)
        partial[slot] = result
        cuda.syncthreads()
        above = index(half)
        while above > 0:
            if row < above:
                partial[slot] += partial[index(slot + above * index(own))]
            cuda.syncthreads()
            above = index(above >> 1)
        if row == 0 and k < K:
            if to_parts:
                out[index(index(cuda.blockIdx.y) * K + k)] = partial[slot]
            else:
                out[k] = narrow(partial[slot])

    bias_gradient.__name__ = f"bias_gradient_{element.name}_{'last' if channels_last else 'first'}_{64 if wide else 32}"
    return bias_gradient


def workspace(N: int, K: int, L: int, data_format: str, dtype: np.dtype, threads: int = THREADS) -> dict[str, Buffer]:
    """Sums of parts of the pixels."""
    parts = summing.parts(K, N * L, data_format, threads)
    return {} if parts == 1 else {"parts": Buffer((parts, K), Element.of(dtype).sums_dtype)}


def steps(N: int, K: int, L: int, data_format: str, dtype: np.dtype, threads: int = THREADS) -> list[Step]:
    """Return the launches of the gradient of a bias: "grad_output", (N, K, L) or (N, L, K), to "out", (K,)."""
    element, wide = Element.of(dtype), N * K * L + summing.CHAIN * threads >= 2**31
    parts, (own, pixels) = summing.parts(K, N * L, data_format, threads), summing.tile(data_format, threads)
    kernel = gradient(element, data_format == "channels_last", wide, own, pixels, parts > 1)
    target = ("parts", CPointer(element.sums)) if parts > 1 else ("out", element.pointer)
    numbers = (K, L, -(-N * L // parts), N * L, summing.CHAIN * pixels)
    arrays = [("grad_output", element.pointer), target]
    first = step(kernel, arrays, numbers, wide, (-(-K // own), parts), (own, pixels))
    return [first] if parts == 1 else [first, summing.add_step(element, K, parts, wide, threads)]


@lru_cache(maxsize=256)
def ending(element: Element, wide: bool, code: int, has_bias: bool) -> Any:
    """Return the kernel that adds a bias and applies an activation, in place."""
    index, _, divided = whole_numbers(wide)
    widen, narrow = element.widen, element.narrow

    def bias_ending(out, bias, total, channels, pixels):
        number = index(index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x))
        if number < total:
            value = widen(out[number])
            if has_bias:
                value += widen(bias[divided(divided(number, pixels)[0], channels)[1]])
            out[number] = narrow(activate(value, code))

    bias_ending.__name__ = f"bias_ending_{element.name}_{64 if wide else 32}"
    return bias_ending


def apply_steps(
    size: int, channels: int, pixels: int, dtype: np.dtype, activation: str | None, bias: bool, threads: int = THREADS
) -> list[Step]:
    """Return the launch for `size` elements, whose channel changes every `pixels` of them."""
    element, wide = Element.of(dtype), size + threads >= 2**31
    kernel = ending(element, wide, CODES[activation], bias)
    arrays = [("out", element.pointer), ("bias", element.pointer)]
    return [step(kernel, arrays, (size, channels, pixels), wide, (-(-size // threads),), (threads,))]
