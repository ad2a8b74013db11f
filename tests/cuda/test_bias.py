"""The bias on its own: its gradient, and what ends algorithms that do not end in it, in the emulator."""

import ml_dtypes
import numpy as np
import pytest
from emulation import compiled, poisoned
from support import whole

from fastconv.cuda import bias, run, sums
from fastconv.cuda.architecture import TESTED
from fastconv.cuda.compile import budget

FORMATS = ("channels_first", "channels_last")
THREADS = 32
FLOAT = np.dtype(np.float32)


def stored(array, data_format):
    return np.ascontiguousarray(np.moveaxis(array, 1, -1) if data_format == "channels_last" else array)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("shape", [(2, 5, 9), (3, 8, 24), (1, 35, 35), (2, 4, 400), (0, 3, 16)], ids=str)
def test_whole_numbers_come_out_exact(shape, data_format, dtype):
    grad, dtype = whole("bias", shape=shape, dtype=dtype), np.dtype(dtype)
    ((name, buffer),) = bias.workspace(*shape, data_format, dtype, THREADS).items()
    out = poisoned(shape[1:2], dtype)
    arrays = {"grad_output": stored(grad, data_format), name: poisoned(buffer.shape, buffer.dtype), "out": out}
    run.emulated(bias.steps(*shape, data_format, dtype, THREADS), arrays, seed=1)
    expected = grad.astype(np.float64).sum(axis=(0, 2)).astype(dtype)
    assert np.array_equal(out.astype(np.float64), expected.astype(np.float64))


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("wide", [False, True])
def test_long_sums_are_shared_by_blocks(data_format, wide, monkeypatch):
    monkeypatch.setattr(sums, "CHAIN", 4)
    monkeypatch.setattr(bias, "needs_wide", lambda *extents: wide)
    shape = (3, 2, 400)
    grad, out = whole("g", shape=shape), poisoned(shape[1:2], FLOAT)
    ((name, buffer),) = bias.workspace(*shape, data_format, FLOAT, THREADS).items()
    assert buffer.shape[0] > 2
    arrays = {"grad_output": stored(grad, data_format), name: poisoned(buffer.shape, buffer.dtype), "out": out}
    run.emulated(bias.steps(*shape, data_format, FLOAT, THREADS), arrays)
    assert np.array_equal(out, grad.sum(axis=(0, 2)))


@pytest.mark.parametrize("architecture", TESTED)
@pytest.mark.parametrize("data_format", FORMATS)
def test_machine_code_keeps_its_budget(data_format, architecture):
    first, second = bias.steps(64, 32, 9000, data_format, FLOAT)
    assert budget(compiled(first, architecture), 64, ("LDG.E.128", "STS", "BAR")) == []
    if data_format == "channels_first":
        ending = bias.apply_steps(4000, 8, 10, FLOAT, "leaky_relu", True)
        for step in (second, *ending):
            assert budget(compiled(step, architecture), 40, ("LDG.E", "STG.E")) == []
