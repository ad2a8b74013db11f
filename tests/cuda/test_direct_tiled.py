"""Direct convolution in tiles: in the emulator and as machine code."""

import math
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from cases import FORMATS, drawn_case, emulate_conv, expected, layer, lifted
from emulation import compiled, without_exits
from hypothesis import given, settings
from hypothesis import strategies as st
from support import conv_problem, normal, whole

import fastconv
from fastconv.cuda import direct, direct_tiled, run
from fastconv.cuda.architecture import ARCHITECTURES
from fastconv.cuda.blocking import phases
from fastconv.cuda.compile import budget, sass
from fastconv.cuda.direct_tiled import TILES, Tile
from fastconv.testing import ConvCase, assert_close

DIRECTIONS = ("forward", "input_grad")
# One warp: 8x8 pixels of 16 filters in rows of one, two channels at a time.
SMALL = Tile(4, 4, 2, 1, 1, filters=4, rows=1, channels=2)


def compute(problem, direction, data_format, tile=SMALL, **how):
    return emulate_conv(direct, problem, direction, data_format, tile=tile, **how)


CASES = [
    ConvCase("tails of pixels, filters and channels", (1, 3, 1, 5, 9), (18, 3, 1, 3, 2), padding=(0, 1, 1)),
    ConvCase("one tap", (1, 3, 1, 3, 5), (5, 3, 1, 1, 1)),
    ConvCase("aligned rows and channels", (1, 4, 1, 4, 12), (8, 4, 1, 3, 3), padding=(0, 1, 1)),
    ConvCase("stride and groups", (1, 4, 1, 9, 8), (6, 2, 1, 3, 2), (1, 2, 3), (0, 1, 2), (1, 1, 2), groups=2),
    ConvCase("dilation and stride share a factor", (1, 4, 1, 11, 9), (4, 4, 1, 3, 2), (1, 2, 4), 2, (1, 2, 2)),
    ConvCase("stride over the kernel", (1, 5, 1, 9, 8), (3, 5, 1, 2, 1), (1, 3, 3)),
    ConvCase("three dimensions", (1, 3, 3, 4, 3), (4, 3, 2, 3, 2), (1, 2, 1), (1, 1, 0)),
    ConvCase("kernel larger than the image", (2, 3, 1, 2, 3), (4, 3, 1, 5, 5), padding=(0, 2, 2)),
    ConvCase("padding that is cut off", (1, 2, 1, 4, 5), (4, 2, 1, 2, 2), padding=((0, 0), (3, 0), (0, 4))),
]


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_whole_numbers_come_out_exact(case, direction, data_format):
    problem = conv_problem(case, np.float32, whole)
    assert np.array_equal(compute(problem, direction, data_format), expected(problem, direction))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("data_format", FORMATS)
def test_half_types_are_rounded_once_with_indices_of_either_width(data_format, dtype, wide, monkeypatch):
    monkeypatch.setattr(direct, "needs_wide", lambda geometry: wide)
    problem = conv_problem(CASES[2], dtype, normal)
    for direction in DIRECTIONS:
        got = compute(problem, direction, data_format)
        assert_close(got, expected(problem, direction), algorithm="direct", reduction_length=problem.lengths[direction])


@pytest.mark.parametrize("data_format", FORMATS)
def test_the_order_of_threads_and_the_tile_do_not_matter(data_format):
    problem = conv_problem(CASES[2], np.float32, normal)
    first = compute(problem, "forward", data_format)
    again = compute(problem, "forward", data_format, Tile(1, 2, 16, 1, 2, filters=4, rows=2, channels=1), seed=1)
    assert np.array_equal(first, again)


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_long_sums_are_chains_and_end_in_bias_and_activation(direction, data_format, monkeypatch):
    # Launches of four channels, two at a time.
    monkeypatch.setattr(direct_tiled, "PRODUCTS", 5 * 4)
    problem = conv_problem(ConvCase("long", (1, 12, 1, 4, 5), (12, 12, 1, 2, 2)), np.float32, whole)
    g = lifted(problem, data_format)
    assert len(direct.steps(g, direction, tile=SMALL)) == 3
    # The bias of a gradient is that of a transposed convolution, one for each channel of x.
    plain = problem.y if direction == "forward" else problem.grads[0] + problem.bias.reshape(1, -1, 1, 1, 1)
    got = compute(problem, direction, data_format, bias=True, activation="relu")
    assert np.array_equal(got, np.maximum(plain, 0))


def test_chains_are_as_long_as_the_promise_of_float32_allows():
    for channels, kernel in ((256, 3), (512, 3), (2048, 1), (1000, 7)):
        g = fastconv.ConvGeometry.create((1, channels, 16, 16), (64, channels, kernel, kernel), padding=kernel // 2)
        g = g.lifted("channels_first", np.dtype(np.float32))
        bounds = [s.arguments[14:16] for s in direct.steps(g, "forward")]
        assert [int(first) for first, _ in bounds] == [0, *(int(end) for _, end in bounds[:-1])]
        assert bounds[-1][1] == channels
        # Where vectors are aligned.
        plan = direct_tiled.Plan.of(g, "forward", phases(g, "forward")[0], None)
        assert all(first % plan.tile.channels == 0 for first, _ in bounds)
        assert max(end - first for first, end in bounds) * kernel**2 <= direct_tiled.PRODUCTS


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_nan_and_infinity_stay_where_arithmetic_puts_them(direction, data_format):
    """Padding is not multiplied: infinity times zero would be NaN."""
    problem = conv_problem(CASES[2], np.float32, normal)
    x, weight, grad = problem.x.copy(), problem.weight.copy(), problem.grad.copy()
    weight[1, 2, 0, 0, 0], x[0, 1, 0, 2, 3], x[0, 3, 0, 0, 0], grad[0, 1, 0, 1, 1] = np.inf, np.nan, -np.inf, np.inf
    problem = replace(problem, x=x, weight=weight, grad=grad)
    got = compute(problem, direction, data_format, activation="relu")
    wanted = compute(problem, direction, data_format, None, threads=32, activation="relu")
    assert np.array_equal(np.isnan(got), np.isnan(wanted))
    assert 0 < np.isnan(wanted).sum() < wanted.size or direction == "input_grad"
    finite = np.isfinite(wanted)
    assert np.array_equal(got[~finite], wanted[~finite], equal_nan=True)
    assert_close(got[finite], wanted[finite], algorithm="direct", reduction_length=problem.lengths[direction])


@settings(max_examples=8)
@given(st.data())
def test_any_geometry(data):
    problem = conv_problem(drawn_case(data, 9, 4, 5), np.float32, whole)
    direction, data_format = data.draw(st.sampled_from(DIRECTIONS)), data.draw(st.sampled_from(FORMATS))
    assert np.array_equal(compute(problem, direction, data_format), expected(problem, direction))


def test_it_is_done_in_tiles_where_reading_together_pays():
    def name_and_use(x, weight, dtype="float32", direction="forward", **how):
        g = fastconv.ConvGeometry.create(x, weight, dtype=dtype, **how).lifted("channels_first", np.dtype(dtype))
        (name,) = {step.kernel.__name__ for step in direct.steps(g, direction)}
        return name, direct_tiled.use(g, direction)

    # Four phases in 16x16 tiles, of which 14x14 are results.
    gradient = name_and_use((8, 64, 28, 28), (64, 64, 3, 3), direction="input_grad", stride=2, padding=1)
    assert gradient == ("direct_tiled_input_grad_float32_first", (14 / 16) ** 2)
    # float64, one filter for each channel, few pixels, kernels whose rows or windows are too large.
    for x, weight, dtype, how in (
        ((8, 64, 28, 28), (64, 64, 3, 3), "float64", {"padding": 1}),
        ((8, 64, 28, 28), (64, 1, 3, 3), "float32", {"groups": 64}),
        ((8, 64, 2, 2), (64, 64, 3, 3), "float32", {"padding": 1}),
        ((8, 64, 64, 64), (64, 64, 1, 33), "float32", {}),
        ((8, 64, 280, 280), (64, 64, 3, 3), "float32", {"dilation": 99}),
    ):
        assert name_and_use(x, weight, dtype, **how) == (f"direct_forward_{dtype}_first_32", 0)


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("shape", range(len(TILES)))
def test_the_multiplying_threads_meet_no_bank_twice(shape, data_format, monkeypatch):
    """And what is aligned is read as vectors: 128 bits of the source, of the weight and of shared memory."""
    reports = []
    monkeypatch.setattr(run, "emulated", lambda *a, emulated=run.emulated: reports.extend(emulated(*a)))
    for stride in (1, 2):
        tile = TILES[shape]._replace(warps_filters=1, warps_rows=1, filters=4, rows=1, channels=4)
        filters, rows, columns = tile.block
        case = ConvCase("one tile", (1, 4, 1, rows * stride, columns * stride), (filters, 4, 1, 1, 3),
                        (1, stride, stride), padding=(0, 0, 1))  # fmt: skip
        compute(conv_problem(case, np.float32, whole), "forward", data_format, tile, bias=False)
    read = [a for report in reports for a in report.accesses if not a.write]
    assert {a.memory for a in read} == {"global", "shared"}
    assert {a.nbytes for a in read} == {16}
    assert all(a.cost == a.ideal for a in read if a.memory == "shared")


def test_shapes_of_warps_are_what_the_kernel_takes():
    for tile in TILES:
        assert tile.lanes_filters * tile.lanes_rows * tile.lanes_columns == 32
        # The filters of eight threads are one vector, and columns of a tile begin at whole vectors.
        assert tile.lanes_rows * tile.lanes_columns >= 8
        assert tile.block[2] % 8 == 0


# --- machine code ----------------------------------------------------------------------------------------------


# With the share of multiply-adds in the loop over staged channels.
BUDGETS = [
    ("channels_first", "forward", {}, 0.92, ("sm_75", "sm_80", "sm_120")),
    ("channels_last", "forward", {}, 0.92, ("sm_90a",)),
    ("channels_last", "input_grad", {"stride": 2}, 0.9, ("sm_90a",)),
    ("channels_first", "forward", {"dtype": "float16"}, 0.92, ("sm_90a",)),
    ("channels_first", "forward", {"channels": 3, "kernel": 7, "stride": 2}, 0.94, ("sm_90a",)),
]
ON = [(*row[:4], a) for row in BUDGETS for a in row[4]]


@pytest.mark.parametrize(("data_format", "direction", "what", "share", "architecture"), ON)
def test_machine_code_keeps_its_budget(data_format, direction, what, share, architecture):
    g = layer(**{"channels": 64, "filters": 128, "data_format": data_format, **what})
    step = direct.steps(g, direction, "relu", True)[-1]
    made = compiled(step, architecture)
    expected = ["FFMA", "LDS.U.128" if architecture == "sm_75" else "LDS.128"]
    if what in ({}, {"stride": 2}):
        expected += ["LDG.E.128", "STG.E.128"]
    assert without_exits(budget(made, 128, expected), architecture) == []
    mix = sass(made)
    assert mix.count("FFMA", loop=True) / len(mix.main_loop) >= share
    assert made.occupancy(math.prod(step.block), step.shared_bytes) * ARCHITECTURES[architecture].threads >= 256
