"""Sums over many blocks: as precise, and as many blocks, as there may be."""

import numpy as np
import pytest
from emulation import poisoned
from support import normal

from fastconv.cuda import gemm_kernels, im2col, run, sums, tensor_core_grads
from fastconv.cuda.elements import Element
from fastconv.cuda.indices import step
from fastconv.testing import rms_error


def test_there_are_no_more_shares_than_a_grid_has_blocks():
    for pixels in (0, 1, 70000, 2**28, 2**33):
        for down in (1, 4, 128):
            count, share = sums.shares(pixels, 1, down)
            assert 1 <= count <= 65535
            assert (count - 1) * share < max(pixels, 1) <= count * max(share, 1)


FLOAT32 = Element.of(np.dtype(np.float32))
# What adds up 4096 parts of 32 elements, in which order ever it takes them: kernels and their numbers.
ADDING = {
    "sums": (sums.add_parts(FLOAT32, False), (32, 4096)),
    "im2col": (im2col.add_chains(FLOAT32, False, False), (32, 4096, 0, 1, 0, 1, 1)),
    "implicit_gemm": (gemm_kernels.add_parts(False), (32, 4096, 1, 1)),
    "tensor cores": (tensor_core_grads.add(FLOAT32, 4, True, False), (32, 4096, 8, 4, 1, 1, 0, *[8] * 19)),
}


@pytest.mark.parametrize("name", ADDING)
def test_the_sums_of_thousands_of_parts_keep_the_promise_of_float32(name):
    kernel, numbers = ADDING[name]
    parts, out = normal("parts", shape=(4096, 32), dtype="float32"), poisoned((32,), np.float32)
    names = {"im2col": ("parts", "none", "out"), "tensor cores": ("x", "grad_output", "parts", "out")}
    adding = step(
        kernel, [(n, FLOAT32.pointer) for n in names.get(name, ("parts", "out"))], numbers, False, (1,), (32,)
    )
    run.emulated([adding], {"parts": parts, "out": out})
    assert rms_error(out, parts.astype(np.float64).sum(axis=0)) < 7e-7
