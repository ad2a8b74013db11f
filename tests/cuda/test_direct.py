"""The direct convolution of the GPU, in the emulator and as machine code."""

import math
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from cases import FORMATS, drawn_case, emulate_conv, expected, small_cases
from emulation import compiled
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DIRECTIONS, ConvProblem, conv_problem, normal, whole

import fastconv
from fastconv import reference, registry
from fastconv.cuda import direct, direct_taps, run, sums
from fastconv.cuda.architecture import TESTED
from fastconv.cuda.compile import budget
from fastconv.testing import ConvCase, assert_close

# Blocks of few threads: what the emulator costs.
THREADS = 32


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", small_cases(2500), ids=str)
def test_whole_numbers_come_out_exact(case, direction, data_format):
    if direction == "weight_grad" and math.prod(case.weight_shape) > 300:
        # A block for every few elements, each for the same few pixels.
        case = replace(case, weight_shape=(case.groups, *case.weight_shape[1:]))
    problem = conv_problem(case, np.float32, whole)
    got = emulate_conv(direct, problem, direction, data_format, threads=THREADS)
    assert np.array_equal(got, expected(problem, direction))


SMALL = ConvCase("small", (2, 4, 1, 5, 6), (6, 2, 1, 3, 2), (1, 2, 1), (0, 1, 2), (1, 1, 3), groups=2)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_dtype_is_summed_as_it_should_be_with_indices_of_either_width(direction, dtype, wide, monkeypatch):
    monkeypatch.setattr(direct, "needs_wide", lambda geometry: wide)
    problem = conv_problem(SMALL, dtype, normal)
    got = emulate_conv(direct, problem, direction, "channels_last", threads=THREADS)
    length = problem.lengths[direction]
    assert_close(got, expected(problem, direction), algorithm="direct", reduction_length=length)


@pytest.mark.parametrize("direction", ["forward", "input_grad"])
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "sigmoid", "tanh"])
def test_bias_and_activation_come_last(direction, activation):
    problem = conv_problem(SMALL, np.float32, normal)
    if direction == "input_grad":
        # The bias of a transposed convolution is one number per channel of x.
        shift = normal("shift", shape=(SMALL.x_shape[1],), dtype=np.float32)
        plain = problem.grads[0] + shift.reshape(1, -1, 1, 1, 1)
        problem = ConvProblem(**{**vars(problem), "bias": shift})
    else:
        plain = problem.y
    wanted = reference._ACTIVATIONS[activation](plain)
    got = emulate_conv(direct, problem, direction, "channels_first", activation, bias=True, threads=THREADS)
    assert_close(got, wanted, algorithm="direct", reduction_length=problem.lengths[direction] + 1)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("data_format", FORMATS)
def test_the_order_of_threads_does_not_matter(data_format, seed):
    problem = conv_problem(SMALL, np.float32, normal)
    for direction in DIRECTIONS:
        first, other = (emulate_conv(direct, problem, direction, data_format, seed=s, threads=64) for s in (None, seed))
        assert np.array_equal(first, other)


@pytest.mark.parametrize("data_format", FORMATS)
def test_long_sums_are_chains_and_parts(data_format, monkeypatch):
    for module in (direct, direct_taps, sums):
        monkeypatch.setattr(module, "CHAIN", 2)
    problem = conv_problem(ConvCase("long", (2, 7, 1, 9, 11), (2, 7, 1, 2, 2)), np.float32, whole)
    g = problem.geometry().lifted(data_format, problem.dtype)
    assert direct.workspace(g, "weight_grad", 1 << 20, THREADS)["parts"].shape[0] > 1
    for direction in DIRECTIONS:
        got = emulate_conv(direct, problem, direction, data_format, threads=THREADS)
        assert np.array_equal(got, expected(problem, direction))


@pytest.mark.parametrize("limit", [0, 300, 1000])
def test_shares_of_the_weight_gradient_fit_the_limit(limit, monkeypatch):
    monkeypatch.setattr(sums, "LEAST", 1)
    problem = conv_problem(ConvCase("shared", (2, 3, 1, 9, 11), (2, 3, 1, 2, 2)), np.float32, whole)
    g = problem.geometry().lifted("channels_first", problem.dtype)
    buffers = direct.workspace(g, "weight_grad", limit, THREADS)
    assert registry.workspace_bytes(buffers) <= limit
    got = emulate_conv(direct, problem, "weight_grad", "channels_first", limit=limit, threads=THREADS, bias=False)
    assert np.array_equal(got, expected(problem, "weight_grad"))


def test_chains_keep_the_promise_of_float32_at_any_depth():
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((1, 20000, 1, 1, 1), (1, 20000, 1, 1, 1)))
    g = fastconv.ConvGeometry.create(x.shape, w.shape)
    y, one_chain = np.full((1, 1), np.nan, np.float32), np.float32(0)
    run.emulated(direct.steps(g, "forward"), {"x": x, "weight": w, "out": y})
    for product in x.ravel() * w.ravel():
        one_chain += product
    exact = np.dot(x.ravel().astype(np.float64), w.ravel())
    assert abs(y.item() - exact) < abs(one_chain - exact)


def test_nan_and_infinity_stay_where_arithmetic_puts_them():
    x = np.zeros((1, 1, 1, 4, 5), np.float32)
    x[0, 0, 0, 1, 1], x[0, 0, 0, 3, 4] = np.nan, np.inf
    w = np.ones((1, 1, 1, 3, 3), np.float32)
    g = fastconv.ConvGeometry.create(x.shape, w.shape, padding=(0, 1, 1))
    y = np.empty(g.output_shape, np.float32)
    run.emulated(direct.steps(g, "forward"), {"x": x, "weight": w, "out": y})
    assert np.array_equal(y, reference.conv(x, w, padding=(0, 1, 1)), equal_nan=True)
    # Padding is not multiplied: infinity times zero would be NaN.
    w[..., 0, 0] = np.inf
    run.emulated(direct.steps(g, "forward"), {"x": np.ones_like(x), "weight": w, "out": y})
    assert (y[0, 0, 0, 0, 0], y[0, 0, 0, 1, 1]) == (4, np.inf)


@settings(max_examples=8)
@given(st.data())
def test_any_geometry(data):
    problem = conv_problem(drawn_case(data, 5, 2, 2), np.float32, whole)
    for direction in DIRECTIONS:
        data_format = data.draw(st.sampled_from(FORMATS))
        got = emulate_conv(direct, problem, direction, data_format, threads=THREADS)
        assert np.array_equal(got, expected(problem, direction))


def test_indices_are_wide_from_two_to_the_31_elements_on():
    small = fastconv.ConvGeometry.create((1, 1, 1000, 1000), (1, 1, 3, 3))
    assert not direct.needs_wide(small)
    assert direct.needs_wide(fastconv.ConvGeometry.create((2**11, 1, 1024, 1024), (1, 1, 1, 1)))
    # The coordinates of padding are numbers too.
    assert direct.needs_wide(fastconv.ConvGeometry.create((1, 1, 4), (1, 1, 1), stride=2**20, padding=2**30))


# --- machine code ----------------------------------------------------------------------------------------------


def geometry(data_format, dtype=np.float32):
    shape = (4, 16, 1, 20, 20) if data_format == "channels_first" else (4, 1, 20, 20, 16)
    g = fastconv.ConvGeometry.create(
        shape, (8, 16, 1, 3, 3), (1, 2, 2), (0, 1, 1), data_format=data_format, dtype=dtype
    )
    return g.lifted(data_format, np.dtype(dtype))


@pytest.mark.parametrize(
    ("data_format", "architecture"), [("channels_first", a) for a in TESTED] + [("channels_last", "sm_90a")]
)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_machine_code_keeps_the_budget(direction, data_format, architecture):
    how = {} if direction == "weight_grad" else {"activation": "relu", "bias": True}
    # The first; the one that adds parts is short.
    step = direct.steps(geometry(data_format), direction, threads=128, **how)[0]
    assert budget(compiled(step, architecture), 64, ("LDG.E", "STG.E", "FFMA")) == []


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("wide", [False, True])
def test_machine_code_of_other_dtypes_and_wide_indices_keeps_the_budget(dtype, wide, monkeypatch):
    monkeypatch.setattr(direct, "needs_wide", lambda geometry: wide)
    (step,) = direct.steps(geometry("channels_last", dtype), "input_grad", "relu", True, threads=128)
    expected = {8: ("LDG.E.64", "DFMA"), 2: ("LDG.E.U16", "FFMA")}[np.dtype(dtype).itemsize]
    faults = budget(compiled(step, "sm_90a"), 128, expected, double=dtype is np.float64)
    # Division of 64-bit numbers is a subroutine.
    assert [fault for fault in faults if not (wide and "CALL" in fault)] == []


@pytest.mark.parametrize("activation", ["leaky_relu", "sigmoid", "tanh"])
def test_activations_are_not_in_double_precision(activation):
    (step,) = direct.steps(geometry("channels_first"), "forward", activation, True, threads=128)
    faults = budget(compiled(step, "sm_90a"), 64, ("FFMA",))
    # What the quotient of a sigmoid needs for numbers near the limits of float32.
    assert faults in ([], ["1 CALL"])
