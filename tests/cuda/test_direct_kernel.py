"""The direct convolution of the GPU, in the emulator and as machine code."""

import math

import numpy as np
import pytest
from support import conv_problem

import fastconv
from fastconv.cuda import direct
from fastconv.cuda.architecture import TESTED
from fastconv.cuda.compile import budget, compile_kernel
from fastconv.cuda.emulator import emulate
from fastconv.testing import CONV_CASES, assert_close


def work(case):
    """Multiplications of a case: the emulator does some hundred thousand a second."""
    y = fastconv.ConvGeometry.create(
        case.x_shape, case.weight_shape, stride=case.stride, padding=case.padding, dilation=case.dilation,
        groups=case.groups, padding_mode=case.padding_mode,
    )  # fmt: skip
    return y.batch * math.prod(y.output_size) * math.prod(case.weight_shape)


SMALL = [case for case in CONV_CASES if case.padding_mode == "zeros" and 0 < work(case) <= 12000]


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_it_agrees_with_the_oracle(case, channels_last, wide):
    problem = conv_problem(case, np.float32)
    data_format = "channels_last" if channels_last else "channels_first"
    x = np.moveaxis(problem.x, 1, -1) if channels_last else problem.x
    geometry = problem.geometry().lifted(data_format, np.dtype(np.float32))
    shape = np.moveaxis(problem.y, 1, -1).shape if channels_last else problem.y.shape
    y = np.full(shape, np.nan, np.float32)
    arrays = (np.ascontiguousarray(x), np.ascontiguousarray(problem.weight), np.ascontiguousarray(problem.bias), y)
    kernel = direct.forward(channels_last, wide)
    emulate(kernel, direct.blocks(geometry), direct.THREADS, *arrays, *direct.numbers(geometry))
    got = np.moveaxis(y, -1, 1) if channels_last else y
    assert_close(got, problem.y, algorithm="direct", reduction_length=problem.lengths["forward"])


@pytest.mark.parametrize("architecture", TESTED)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_its_machine_code_keeps_the_budget(channels_last, wide, architecture):
    made = compile_kernel(direct.forward(channels_last, wide), direct.signature(wide), architecture)
    faults = budget(made, 96 if wide else 64, ("LDG.E", "STG.E", "FFMA"))
    # Division of 64-bit numbers is a subroutine.
    assert [fault for fault in faults if not (wide and "CALL" in fault)] == []


def test_indices_are_wide_from_two_to_the_31_elements_on():
    small = fastconv.ConvGeometry.create((1, 1, 1000, 1000), (1, 1, 3, 3))
    assert not direct.needs_wide(small)
    assert direct.needs_wide(fastconv.ConvGeometry.create((2**11, 1, 1024, 1024), (1, 1, 1, 1)))
