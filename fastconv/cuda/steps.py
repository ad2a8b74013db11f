"""What runs on a GPU, as data: kernels, launch sizes and the names of their arguments.

An algorithm's host code returns a list of steps and touches no array, so that the driver, the emulator and the tables
of `explain` are given the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np


class Step(NamedTuple):
    """One launch.

    Attributes
    ----------
    kernel : function
        As `compile.compile_kernel` takes it.
    signature : tuple of Numba types
    grid, block : tuple of int
    arguments : tuple of str and NumPy scalars
        Names of arrays, of operands, results or workspace buffers, and numbers, in the order of the signature. An array
        that a call does not have, such as no bias, is a null pointer.
    shared_bytes : int
        Dynamic shared memory of each block.
    launch_bounds : int or tuple of int, optional
        See `compile.compile_kernel`.
    """

    kernel: Callable[..., Any]
    signature: tuple[Any, ...]
    grid: tuple[int, ...]
    block: tuple[int, ...]
    arguments: tuple[str | np.generic, ...]
    shared_bytes: int = 0
    launch_bounds: int | tuple[int, ...] | None = None


def renamed(steps: Iterable[Step], **names: str) -> list[Step]:
    """Return steps whose arrays have other names."""
    return [
        s._replace(arguments=tuple(names.get(a, a) if isinstance(a, str) else a for a in s.arguments)) for s in steps
    ]
