"""Compilation: what tells one compiled kernel from another."""

import pytest

from fastconv.cpu import compile as compilation
from fastconv.cpu import implicit_gemm
from fastconv.cpu.simd import Tile


def test_register_tiles_never_share_machine_code():
    # The loop itself closes over the tile's width only; its rows are in a function that it calls.
    kernels = [implicit_gemm.tasks(Tile(rows, 2, 16), 4) for rows in (8, 14)]
    for few, many in zip(*kernels):
        if few.function.__name__ in ("gather", "reduce"):
            assert compilation._constants(few.function) != compilation._constants(many.function)


def test_constants_that_cannot_be_compared_across_processes_are_refused():
    table = [1, 2]

    def kernel(i):
        return table[i]

    with pytest.raises(TypeError, match="table"):
        compilation._constants(kernel)
