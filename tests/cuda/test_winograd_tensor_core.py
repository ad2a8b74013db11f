"""Winograd on tensor cores: every direction in the emulator against the oracle, its promises, its machine code."""

import math

import numpy as np
import pytest
from cases import FORMATS, drawn_case, emulate_conv, expected, layer, lifted
from emulation import compiled
from hypothesis import given, settings, strategies
from support import DIRECTIONS, PROMISES, conv_problem, normal, whole

import fastconv
from fastconv import registry
from fastconv.cuda import sums, tensor_core, winograd, winograd_tensor_core
from fastconv.cuda.compile import budget, sass
from fastconv.cuda.tensor_core import TF32X3
from fastconv.cuda.tensor_core_kernels import Tile
from fastconv.cuda.winograd_tensor_core import F2_BF16X6, F2_TF32X3, F4_BF16X6
from fastconv.testing import ConvCase, assert_close, rms_error

# One warp, with tails in every dimension.
SMALL = Tile(16, 16, 4, 1, 1, 2)
RECORDS = {
    a.name: a for a in registry.on("cuda") if isinstance(a.implementation, winograd_tensor_core.TensorCoreWinograd)
}
TAILS = ConvCase("tails everywhere", (2, 3, 5, 6), (5, 3, 3, 3), padding=1)


def compute(algorithm, problem, direction, data_format, **how):
    return emulate_conv(algorithm, problem, direction, data_format, tile=SMALL, **how)


def check(algorithm, problem, direction, data_format, **how):
    """F(2x2) halves whole numbers at most twice, and each plane holds them: sums of their products are exact."""
    assert np.array_equal(compute(algorithm, problem, direction, data_format, **how), expected(problem, direction))


CASES = [
    ("channels_first", "forward", TAILS),
    ("channels_last", "input_grad", ConvCase("whole vectors", (1, 8, 4, 5), (4, 8, 3, 3), padding=((0, 1), (2, 1)))),
    ("channels_last", "weight_grad", ConvCase("groups", (1, 8, 4, 5), (8, 4, 3, 3), padding=1, groups=2)),
    ("channels_first", "forward", ConvCase("4x5", (1, 2, 4, 5), (3, 2, 4, 5), padding=(2, 1))),
    ("channels_first", "weight_grad", ConvCase("dilation", (1, 2, 5, 6), (3, 2, 3, 2), padding=2, dilation=(2, 3))),
    ("channels_last", "forward", ConvCase("two taps deep", (1, 2, 3, 2, 4), (3, 2, 2, 3, 3), padding=(1, 1, 1))),
    ("channels_last", "forward", ConvCase("two steps", (1, 20, 2, 2), (4, 20, 3, 3), padding=1)),
]


@pytest.mark.parametrize(("data_format", "direction", "case"), CASES, ids=str)
def test_it_agrees_with_the_oracle(data_format, direction, case):
    check(F2_TF32X3, conv_problem(case, np.float32, whole), direction, data_format)


WAYS = [
    ("winograd_f2x3_bf16x6", "channels_first", "forward"),
    ("winograd_f2x3_bf16x3", "channels_last", "input_grad"),
    ("winograd_f2x3_tf32", "channels_first", "weight_grad"),
    ("winograd_f4x3_bf16x6", "channels_last", "weight_grad"),
]


@pytest.mark.parametrize(("name", "data_format", "direction"), WAYS)
def test_every_way_to_split_agrees_with_the_oracle(name, direction, data_format):
    problem = conv_problem(ConvCase("one tile", (1, 4, 3, 4), (4, 4, 3, 3), padding=1), np.float32, whole)
    got = compute(RECORDS[name].implementation, problem, direction, data_format)
    if name.startswith("winograd_f2"):
        assert np.array_equal(got, expected(problem, direction))
    else:
        assert_close(got, expected(problem, direction), algorithm=name, reduction_length=problem.lengths[direction])


@settings(max_examples=2, deadline=None)
@given(strategies.data())
def test_any_stride_1_convolution(data):
    case = drawn_case(data, 5, 9, 9, kernel=(2, 4), stride=1, dilation=1)
    direction, data_format = data.draw(strategies.sampled_from(DIRECTIONS)), data.draw(strategies.sampled_from(FORMATS))
    algorithm = data.draw(strategies.sampled_from((F2_TF32X3, F2_BF16X6)))
    check(algorithm, conv_problem(case, np.float32, whole), direction, data_format)


@pytest.mark.parametrize("name", RECORDS)
def test_float32_keeps_its_promise(name):
    """Outside of the tests: as many channels as are supported, and sums cut off as tensor cores may, keep it too."""
    record, problem = RECORDS[name], conv_problem(ConvCase("deep", (1, 32, 4, 4), (8, 32, 3, 3), padding=1), np.float32)
    error = rms_error(compute(record.implementation, problem, "forward", "channels_last"), problem.y)
    assert error <= PROMISES[record.precision]
    # What is promised is not reached by less: planes are there, and multiplied.
    assert record.precision == "highest" or error > PROMISES[{"medium": "high", "high": "highest"}[record.precision]]


@pytest.mark.parametrize("algorithm", [F2_TF32X3, F4_BF16X6], ids=["F2_TF32X3", "F4_BF16X6"])
def test_the_weight_gradient_keeps_its_promise(algorithm):
    problem = conv_problem(ConvCase("many tiles", (1, 4, 16, 24), (4, 4, 3, 3), padding=1), np.float32)
    got = compute(algorithm, problem, "weight_grad", "channels_last")
    assert rms_error(got, problem.grads[1]) <= PROMISES["highest"]


def test_tiles_that_do_not_fit_the_limit_are_taken_in_slices():
    """The last one is not whole."""
    problem = conv_problem(ConvCase("many tiles", (1, 2, 6, 18), (3, 2, 3, 3), padding=1), np.float32, whole)
    steps = F2_TF32X3.steps(lifted(problem, "channels_first"), "forward", limit=0, tile=SMALL)
    assert len([s for s in steps if s.shared_bytes]) == 2
    check(F2_TF32X3, problem, "forward", "channels_first", limit=0)


def test_parts_of_a_weight_gradient_are_added_up(monkeypatch):
    """There are two slices of two steps, shared out to three parts, the last of which is zero."""
    monkeypatch.setattr(sums, "LEAST_STEPS", 1)
    winograd_tensor_core._sizes.cache_clear()
    problem = conv_problem(ConvCase("many tiles", (1, 2, 12, 16), (3, 2, 3, 3), padding=1), np.float32, whole)
    g = lifted(problem, "channels_last")
    limit = registry.workspace_bytes(F2_TF32X3.workspace(g, "weight_grad", 1 << 30, tile=SMALL)) - 1
    assert F2_TF32X3.workspace(g, "weight_grad", limit, tile=SMALL)["sums"].shape[0] == 3
    steps = F2_TF32X3.steps(g, "weight_grad", limit=limit, tile=SMALL)
    assert len([s for s in steps if s.shared_bytes]) == 2
    check(F2_TF32X3, problem, "weight_grad", "channels_last", limit=limit)
    winograd_tensor_core._sizes.cache_clear()


@pytest.mark.parametrize("direction", ["forward", "weight_grad"])
def test_the_order_of_threads_and_the_width_of_indices_do_not_matter(direction, monkeypatch):
    problem = conv_problem(ConvCase("small", (1, 3, 3, 4), (5, 3, 3, 3), padding=1), np.float32, normal)
    first = compute(F2_BF16X6, problem, direction, "channels_first", seed=1)
    monkeypatch.setattr(winograd, "needs_wide", lambda *extents: True)
    monkeypatch.setattr(tensor_core, "is_wide", lambda geometry, units: True)
    assert np.array_equal(first, compute(F2_BF16X6, problem, direction, "channels_first"))


def test_it_ends_in_bias_and_activation():
    problem = conv_problem(ConvCase("ending", (1, 4, 3, 4), (4, 4, 3, 3), padding=1), np.float32, whole)
    got = compute(F2_TF32X3, problem, "input_grad", "channels_last", activation="relu", bias=True)
    assert np.array_equal(got, np.maximum(problem.grads[0] + problem.bias.reshape(-1, 1, 1), 0))


@pytest.mark.parametrize("algorithm", [F2_TF32X3, F2_BF16X6], ids=["F2_TF32X3", "F2_BF16X6"])
def test_an_infinity_stays_in_the_tiles_that_read_it(algorithm):
    problem = conv_problem(ConvCase("infinite", (1, 2, 3, 8), (3, 2, 3, 3), padding=1), np.float32, whole)
    x = problem.x.copy()
    x[0, 1, 1, 0] = np.inf
    got = compute(algorithm, problem.__class__(**{**vars(problem), "x": x}), "forward", "channels_first")
    assert not np.isfinite(got[..., :2]).any()
    assert np.array_equal(got[..., 2:], problem.y[..., 2:])


def test_what_it_refuses_has_a_reason():
    g = fastconv.ConvGeometry.create((1, 1160, 8, 8), (4, 1160, 3, 3)).lifted("channels_last", np.dtype(np.float32))
    assert "a sum over 1160" in F4_BF16X6.supports(g, "forward")[1]
    assert F4_BF16X6.supports(g, "weight_grad") == F2_BF16X6.supports(g, "forward") == (True, "")
    half = fastconv.ConvGeometry.create((1, 4, 8, 8), (4, 4, 3, 3), dtype="float16")
    assert F2_TF32X3.supports(half.lifted("channels_last", half.dtype), "forward") == (
        False, "it splits float32, not float16",
    )  # fmt: skip
    record = RECORDS["winograd_f2x3_tf32x3"]
    assert record.lacking("sm_75") == "it needs a GPU of sm_80 or later, not sm_75"
    assert record.seconds(g, "forward", "sm_75") == math.inf


# --- machine code ----------------------------------------------------------------------------------------------


def steps_of(algorithm, direction):
    return algorithm.steps(layer(64, 128, "channels_last"), direction)


@pytest.mark.parametrize(("direction", "as_there"), [("forward", "input_grad"), ("weight_grad", "weight_grad")])
def test_the_products_are_those_of_implicit_gemm(direction, as_there):
    """Their machine code keeps its budget there."""
    g = fastconv.ConvGeometry.create((1, 9, 128), (64, 128, 1), data_format="channels_last", dtype="float32")
    theirs = TF32X3.steps(g.lifted("channels_last", g.dtype), as_there)
    own = steps_of(F2_TF32X3, direction)
    assert {s.kernel for s in own if s.shared_bytes} == {s.kernel for s in theirs if s.shared_bytes}


# Registers, loads of 128 bits, and what is stored of four channels in three planes.
@pytest.mark.parametrize(
    ("name", "registers", "loads", "architecture"), [("input", 180, 36, "sm_80"), ("grad", 140, 16, "sm_90a")]
)
def test_transforms_to_planes_keep_their_budget(name, registers, loads, architecture):
    steps = steps_of(F4_BF16X6, "weight_grad")
    step = next(s for s in steps if s.kernel.__name__ == f"winograd_{name}_6_lanes4_planes3")
    made = compiled(step, architecture)
    assert budget(made, registers) == []
    mix = sass(made)
    assert (mix.count("LDG.E.128"), mix.count("STG.E.64")) == (loads, 3 * 36)
