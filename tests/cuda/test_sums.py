"""Sums over many blocks: as precise, and as many blocks, as there may be."""

import numpy as np
from emulation import poisoned
from support import normal

from fastconv.cuda import run, sums
from fastconv.cuda.elements import Element
from fastconv.testing import rms_error


def test_there_are_no_more_shares_than_a_grid_has_blocks():
    for pixels in (0, 1, 70000, 2**28, 2**33):
        for down in (1, 4, 128):
            count, share = sums.shares(pixels, 1, down)
            assert 1 <= count <= 65535
            assert (count - 1) * share < max(pixels, 1) <= count * max(share, 1)


def test_the_sums_of_thousands_of_shares_keep_the_promise_of_float32():
    parts, out = normal("parts", shape=(4096, 64), dtype="float32"), poisoned((64,), np.float32)
    step = sums.second_pass(Element.of(out.dtype), False, 64, 4096, 64)
    run.emulated([step], {"parts": parts, "out": out})
    assert rms_error(out, parts.astype(np.float64).sum(axis=0)) < 6e-7
