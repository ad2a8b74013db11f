"""What runs on a GPU, as data: kernels, launch sizes and the names of their arguments.

An algorithm's host code returns a list of steps and touches no array, so that the driver, the emulator and the tables
of `explain` are given the same. What the array's own library does better, products of matrices by cuBLAS and transforms
by cuFFT, are calls between the launches: on a GPU they are CuPy's or PyTorch's, in the emulator NumPy's.
"""

from __future__ import annotations

import math
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


class Call(NamedTuple):
    """What the library of the arrays computes, on the stream of the launches.

    Attributes
    ----------
    operation : str
        "matmul", "rfftn" or "irfftn": a method of `device_arrays.DeviceLibrary`, which writes to its last argument.
    arguments : tuple of str
        Names of arrays, of operands, results or workspace buffers.
    shapes : tuple of tuples of int
        How it sees each of them: the first elements, in this shape.
    """

    operation: str
    arguments: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def perform(self, library: Any, *held: Any) -> None:
        """Do it, with arrays of the library."""
        views = [array.reshape((-1,))[: math.prod(s)].reshape(s) for array, s in zip(held, self.shapes)]
        getattr(library, self.operation)(*views)


def renamed(steps: Iterable[Step], **names: str) -> list[Step]:
    """Return steps whose arrays have other names."""
    return [
        s._replace(arguments=tuple(names.get(a, a) if isinstance(a, str) else a for a in s.arguments)) for s in steps
    ]
