"""Whole numbers of kernels: the width of indices, division, numbers of mixed radix; and launches of such kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from . import toolchain
from .ptx import divide
from .steps import Step

toolchain.import_cuda()

from numba.cuda.types import int32, int64  # noqa: E402


def _wide_quotient(a, b):
    return a // b


@lru_cache(maxsize=2)
def whole_numbers(wide: bool) -> tuple[Any, Any, Any]:
    """Return the type of indices and two divisions of numbers that are not negative.

    `quotient(a, b)` is a // b, `divided(a, b)` is (a // b, a % b).
    """
    index, quotient = (int64, _wide_quotient) if wide else (int32, divide)

    def divided(number, size):
        whole = index(quotient(number, size))
        return whole, index(number - whole * size)

    return index, quotient, divided


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
