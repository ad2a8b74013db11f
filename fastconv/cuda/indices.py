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

from numba.cuda.types import int32, int64, uint32  # noqa: E402


def index_type(wide: bool) -> Any:
    """Return the type of indices."""
    return int64 if wide else int32


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


def divisor_types(wide: bool) -> tuple[Any, ...]:
    """Return their types."""
    return index_type(wide), uint32, int32


def scalar(value: int, wide: bool) -> Any:
    """Return a whole number as an argument of a kernel."""
    return np.int64(value) if wide else np.int32(value)


def needs_wide(*extents: Sequence[int] | int) -> bool:
    """Return whether a number of elements, or of threads counted to the end of their block, could pass 32 bits."""
    return max(math.prod(e) if isinstance(e, Sequence) else e for e in extents) + 1024 >= 2**31


def step(
    kernel: Callable[..., Any],
    arrays: Sequence[tuple[str, Any]],
    numbers: Sequence[int],
    wide: bool,
    grid: tuple[int, ...],
    block: tuple[int, ...],
) -> Step:
    """Return the launch of a kernel that takes arrays, as (name, type), and then numbers of the type of indices."""
    number, scalar = (int64, np.int64) if wide else (int32, np.int32)
    names, types = zip(*arrays)
    return Step(
        kernel, (*types, *(number,) * len(numbers)), (*grid, 1, 1)[:3], (*block, 1, 1)[:3],
        (*names, *map(scalar, numbers)),
    )  # fmt: skip
