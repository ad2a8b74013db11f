"""Whole numbers of kernels: 32 or 64 bits, division, by constants too, mixed radix; and launches of such kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from . import ptx, toolchain
from .ptx import divide, fast_divide
from .steps import Step

toolchain.import_cuda()

from numba.cuda.np import numpy_support  # noqa: E402
from numba.cuda.types import int32, int64  # noqa: E402

# Threads of a block: four warps hide each other's loads, and a small layer still fills the multiprocessors.
THREADS = 128


def index_type(wide: bool) -> Any:
    """Return the type of indices."""
    return int64 if wide else int32


def index_dtype(wide: bool) -> np.dtype:
    """Return NumPy's name for it."""
    return np.dtype(np.int64 if wide else np.int32)


def _wide_quotient(a, b):
    return int64(a // b)


def quotient(wide: bool) -> Any:
    """Return the function of (a, b) that divides numbers that are not negative."""
    return _wide_quotient if wide else divide


@lru_cache(maxsize=2)
def divided(wide: bool) -> Any:
    """Return the function of (a, b) that returns a // b and a % b of numbers that are not negative."""
    index, over = index_type(wide), quotient(wide)

    def by_division(number, size):
        whole = index(over(number, size))
        return whole, index(number - whole * size)

    return by_division


@lru_cache(maxsize=2)
def decoder(wide: bool) -> Any:
    """Return the function of (number, O, P, Q) that tells image and place of a pixel."""
    divide = divided(wide)

    def decode(number, O, P, Q):
        rest, q = divide(number, Q)
        rest, p = divide(rest, P)
        n, o = divide(rest, O)
        return n, o, p, q

    return decode


@lru_cache(maxsize=2)
def meeting(wide: bool) -> Any:
    """Return the function that tells which of `size` places, `step` apart from 0 on, is at a distance; -1 if none."""
    index, divide = index_type(wide), divided(wide)

    def meets(distance, step, size):
        place = index(-1)
        if distance >= 0:
            place, rest = divide(distance, step)
            if rest > 0 or place >= size:
                place = index(-1)
        return place

    return meets


def round_up(count: int, to: int) -> int:
    """Return the next multiple of a number.

    >>> round_up(9, 4)
    12
    """
    return -(-count // to) * to


def image_strides(channels: int, size: Sequence[int], channels_last: bool) -> tuple[int, int, int]:
    """Return the elements from one image to the next, from a channel and from a pixel."""
    pixels = math.prod(size)
    return (channels * pixels, 1, channels) if channels_last else (channels * pixels, pixels, 1)


def digits(number: int, radices: Sequence[int]) -> tuple[int, ...]:
    """Return a number in mixed radix, the last of which runs the fastest.

    >>> digits(23, (2, 3, 4))
    (1, 2, 3)
    """
    found: list[int] = []
    for radix in reversed(radices):
        number, digit = divmod(number, radix)
        found.insert(0, digit)
    return tuple(found)


@lru_cache(maxsize=2)
def constant_division(wide: bool) -> Any:
    """Return the function of (number, divisor, its multiplier, its shift) that returns quotient and remainder."""

    def by_division(number, size, multiplier, shift):
        whole = int64(number // size)
        return whole, int64(number - whole * size)

    def by_multiplication(number, size, multiplier, shift):
        whole = fast_divide(number, multiplier, shift)
        return whole, int32(number - whole * size)

    return by_division if wide else by_multiplication


def divisor(size: int, wide: bool) -> tuple[Any, ...]:
    """Return the arguments that `constant_division` takes for a divisor."""
    multiplier, shift = (0, 0) if wide else ptx.divider(max(size, 1))
    return scalar(size, wide), np.uint32(multiplier), np.int32(shift)


def divisors(extents: Sequence[int], wide: bool) -> tuple[Any, ...]:
    """Return those of several divisors."""
    return tuple(number for extent in extents for number in divisor(extent, wide))


def scalar(value: int, wide: bool) -> Any:
    """Return a whole number as an argument of a kernel."""
    return index_dtype(wide).type(value)


def needs_wide(*extents: Sequence[int] | int) -> bool:
    """Return whether a number of elements, or of threads counted to the end of their block, could pass 32 bits."""
    return max(math.prod(e) if isinstance(e, Sequence) else e for e in extents) + 1024 >= 2**31


def step(
    kernel: Callable[..., Any],
    arrays: Sequence[tuple[str, Any]],
    numbers: Sequence[Any],
    wide: bool,
    grid: tuple[int, ...],
    block: tuple[int, ...],
) -> Step:
    """Return the launch of a kernel that takes arrays, as (name, type), and then numbers.

    Those that are not NumPy's are of the type of indices.
    """
    names, types = zip(*arrays)
    given = [n if isinstance(n, np.generic) else scalar(n, wide) for n in numbers]
    return Step(
        kernel, (*types, *(numpy_support.from_dtype(n.dtype) for n in given)), (*grid, 1, 1)[:3], (*block, 1, 1)[:3],
        (*names, *given),
    )  # fmt: skip


def launch(
    kernel: Callable[..., Any],
    arrays: Sequence[tuple[str, Any]],
    numbers: Sequence[Any],
    wide: bool,
    total: int,
    threads: int = THREADS,
) -> Step:
    """Return the launch of a kernel that has a thread for each of `total` results."""
    return step(kernel, arrays, numbers, wide, (-(-total // threads),), (threads,))
