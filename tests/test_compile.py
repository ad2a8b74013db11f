"""Compilation: what tells one compiled kernel from another."""

import pytest
from support import run_python

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


VARIANTS = """
import math
import sys

import numpy as np

from fastconv.cpu.compile import device, task
from fastconv.cpu.simd import integer, store


def variant(number):
    NUMBER = number

    # Too large to be inlined twice: its machine code is found by name.
    @device
    def value(x):
        LARGE
        return NUMBER + 0 * x

    @task
    def write(arguments, chunk):
        store(8, integer(arguments, 1), value(chunk + 0.5))
        store(8, integer(arguments, 1) + 8, value(chunk + 1.5))

    return write


for number in map(int, sys.argv[1:]):
    result = np.zeros(2)
    variant(number)(1, result.ctypes.data)
    print(*result.astype(int))
"""


def test_variants_compiled_by_different_processes_do_not_take_each_others_place(tmp_path):
    path = tmp_path / "variants.py"
    path.write_text(VARIANTS.replace("LARGE", "\n        ".join(["x += math.sin(x) * math.cos(x)"] * 200)))

    def run(*numbers):
        script = f"import sys, runpy; sys.argv[1:] = {list(map(str, numbers))}; runpy.run_path({str(path)!r})"
        # The order of a set of flags is part of Numba's symbols: by chance it keeps apart what nothing else does.
        return run_python(script, NUMBA_CACHE_DIR=str(tmp_path / "cache"), PYTHONHASHSEED="1").split()

    assert run(1) == ["1", "1"]
    assert run(2) == ["2", "2"]
    assert run(1, 2) == ["1", "1", "2", "2"]
    assert run(2, 1) == ["2", "2", "1", "1"]
