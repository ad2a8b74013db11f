"""Implicit GEMM of the GPU: every direction in the emulator, its tables against the oracle, its machine code."""

import math
from dataclasses import replace

import numpy as np
import pytest
from support import DIRECTIONS, LAYOUTS, conv_problem, whole

import fastconv
from fastconv import reference
from fastconv.activations import ACTIVATIONS
from fastconv.cuda import implicit_gemm, run, sums
from fastconv.cuda.architecture import ARCHITECTURES, TESTED
from fastconv.cuda.compile import budget, compile_kernel, sass
from fastconv.cuda.gemm_kernels import NARROW, TILE, Tile
from fastconv.testing import ConvCase, assert_close

# 32 threads of 4x4 sums: tails in every dimension at a few thousand products a block.
SMALL = Tile(16, 32, 8, 4, 8)


def run_steps(steps, arrays, workspace, seed=None, architecture="sm_90a"):
    """Emulate launches; what is not among the arrays is an empty one."""
    buffers = {}
    for name, buffer in workspace.items():
        poison = np.nan if buffer.dtype.kind == "f" else -(1 << 20)
        buffers[name] = np.full(buffer.shape, poison, buffer.dtype)
    return run.emulated(steps, {**arrays, **buffers}, seed, architecture)


def compute(problem, layout, direction, tile=SMALL, activation=None, bias=True, seed=None, architecture="sm_90a"):
    """Return a direction's result in the emulator, channels first."""
    geometry = problem.geometry(layout).lifted(layout.data_format, np.dtype(np.float32))
    put = lambda a: np.ascontiguousarray(layout.put(a))  # noqa: E731
    arrays = {"weight": problem.weight, "x": put(problem.x), "grad_output": put(problem.grad)}
    wanted = {"forward": problem.y, "input_grad": problem.x, "weight_grad": problem.weight}[direction]
    with_bias = bias and direction == "forward"
    if with_bias:
        arrays["bias"] = problem.bias
    out = np.full(wanted.shape if direction == "weight_grad" else put(wanted).shape, np.nan, np.float32)
    work = implicit_gemm.workspace(geometry, direction, 1 << 30, tile=tile)
    steps = implicit_gemm.steps(geometry, direction, activation, with_bias, architecture, tile=tile)
    run_steps(steps, {**arrays, "out": out}, work, seed, architecture)
    return out if direction == "weight_grad" else np.asarray(layout.back(out))


CASES = [
    ConvCase("whole tiles", (1, 8, 4, 8), (32, 8, 1, 1)),
    ConvCase("tails of pixels, filters and depth", (2, 4, 5, 6), (5, 4, 3, 3), padding=1),
    ConvCase("three channels", (1, 3, 7, 6), (18, 3, 3, 2), padding=(1, 0)),
    ConvCase("two tiles of filters", (1, 4, 3, 5), (36, 4, 1, 1)),
    ConvCase("stride 2", (2, 4, 7, 6), (4, 4, 3, 3), stride=2, padding=1),
    ConvCase("stride over the kernel", (1, 5, 9, 8), (3, 5, 2, 1), stride=3),
    ConvCase(
        "dilation and stride share a factor", (1, 4, 11, 9), (4, 4, 3, 2), stride=(2, 4), padding=2, dilation=(2, 2)
    ),
    ConvCase("dilation", (1, 4, 7, 8), (4, 4, 2, 3), padding=((0, 2), (3, 1)), dilation=(2, 3)),
    ConvCase("groups of whole vectors", (1, 8, 4, 5), (8, 4, 3, 3), padding=1, groups=2),
    ConvCase("groups of one run", (1, 16, 3, 5), (24, 8, 2, 2), padding=1, groups=2),
    ConvCase("groups of three and five", (2, 9, 3, 4), (15, 3, 2, 2), groups=3),
    ConvCase("depthwise", (1, 5, 6, 5), (5, 1, 3, 3), padding=1, groups=5),
    ConvCase("one dimension", (2, 4, 19), (6, 4, 5), stride=2, padding=3),
    ConvCase("three dimensions", (1, 3, 3, 4, 3), (4, 3, 2, 3, 2), stride=(1, 2, 1), padding=(1, 1, 0)),
    ConvCase("pixels that blocks share", (2, 3, 9, 9), (4, 3, 2, 1)),
    ConvCase("kernel larger than the image", (2, 3, 2, 3), (4, 3, 5, 5), padding=2),
]
FORMATS = [layout for layout in LAYOUTS if layout.data_format == layout.memory]


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_exact_on_whole_numbers(case, direction, layout):
    problem = conv_problem(case, np.float32, whole)
    wanted = {"forward": problem.y, "input_grad": problem.grads[0], "weight_grad": problem.grads[1]}[direction]
    assert (compute(problem, layout, direction) == wanted).all()


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("seed", "architecture"), [(1, "sm_75"), (2, "sm_80")])
def test_the_order_of_threads_and_the_kind_of_copy_do_not_matter(direction, layout, seed, architecture):
    problem = conv_problem(ConvCase("small", (1, 4, 3, 6), (5, 4, 2, 1)), np.float32)
    first = compute(problem, layout, direction)
    again = compute(problem, layout, direction, seed=seed, architecture=architecture)
    assert (first == again).all()
    wanted = {"forward": problem.y, "input_grad": problem.grads[0], "weight_grad": problem.grads[1]}[direction]
    assert_close(first, wanted, algorithm="implicit_gemm", reduction_length=problem.lengths[direction])


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_indices_of_64_bits_give_the_same(direction, layout, monkeypatch):
    problem = conv_problem(CASES[4], np.float32, whole)
    narrow = compute(problem, layout, direction)
    monkeypatch.setattr(implicit_gemm, "is_wide", lambda geometry: True)
    implicit_gemm._share.cache_clear()
    assert (compute(problem, layout, direction) == narrow).all()
    implicit_gemm._share.cache_clear()


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("stages", [2, 3])
def test_more_buffers_and_larger_products_of_a_thread(layout, stages):
    problem = conv_problem(ConvCase("larger", (1, 16, 5, 4), (40, 16, 2, 1)), np.float32, whole)
    tile = Tile(32, 64, 16, 8, 8, stages)
    assert (compute(problem, layout, "forward", tile) == problem.y).all()
    assert (compute(problem, layout, "weight_grad", tile) == problem.grads[1]).all()


def test_tiles_are_what_the_kernels_take():
    for tile in (TILE, TILE.spread, *NARROW.values(), *(tile.spread for tile in NARROW.values())):
        assert tile.threads_down % 4 == tile.threads_across % 8 == tile.columns // tile.threads_across % 4 == 0
    # A thread copies pixels of one column.
    for tile in (TILE, TILE.spread, NARROW[False], NARROW[False].spread):
        assert tile.threads % tile.columns == 0


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_applied(activation, layout):
    problem = conv_problem(ConvCase("small", (1, 4, 3, 6), (5, 4, 2, 1)), np.float32)
    got = compute(problem, layout, "forward", activation=activation)
    y = problem.y.astype(np.float64)
    wanted = {"relu": np.maximum(y, 0), "leaky_relu": np.where(y < 0, 0.01 * y, y), "sigmoid": 1 / (1 + np.exp(-y)),
              "tanh": np.tanh(y)}[activation]  # fmt: skip
    assert_close(got, wanted.astype(np.float32), algorithm="implicit_gemm", reduction_length=problem.lengths["forward"])


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_long_sums_are_cut_in_chains(direction, layout, monkeypatch):
    monkeypatch.setattr(implicit_gemm, "CHAIN", 16)
    # As few shares as there may be: each has several turns.
    monkeypatch.setattr(implicit_gemm, "ENOUGH_BLOCKS", 2)
    implicit_gemm._share.cache_clear()
    problem = conv_problem(ConvCase("long", (2, 9, 5, 4), (10, 9, 3, 3), padding=1), np.float32, whole)
    activation = None if direction == "weight_grad" else "relu"
    got = compute(problem, layout, direction, activation=activation)
    implicit_gemm._share.cache_clear()
    wanted = {"forward": problem.y, "input_grad": problem.grads[0], "weight_grad": problem.grads[1]}[direction]
    assert (got == (wanted if direction == "weight_grad" else np.maximum(wanted, 0))).all()


def test_chains_keep_the_promise_of_float32_at_any_depth():
    """What the emulator cannot do at such a depth: the same sums in the same order."""
    rng = np.random.default_rng(0)
    for depth in (4608, 9216, 40000):
        a, b = (rng.standard_normal((400, depth)).astype(np.float32) for _ in range(2))
        result = np.zeros(400, np.float32)
        for chain in implicit_gemm._chains(depth // 16, 16):
            sums = np.zeros(400, np.float32)
            for k in range(chain.start * 16, chain.stop * 16):
                sums += a[:, k] * b[:, k]
            result += sums
        wanted = (a.astype(np.float64) * b).sum(axis=1)
        assert np.sqrt(np.mean((result - wanted) ** 2)) <= 1e-6 * np.sqrt(np.mean(wanted**2))


def test_no_more_launches_add_to_a_part_than_a_chain_is_long():
    for pixels in (2**14, 2**23, 2**31):
        share = implicit_gemm._share(geometry_of(512, 512, "channels_last", batch=pixels // 784), 1 << 44, TILE)
        assert share.each * TILE.depth <= implicit_gemm.CHAIN
        assert -(-share.steps // (share.each * share.splits)) <= sums.CHAIN


def test_an_infinity_reaches_what_it_should_and_nothing_else():
    """Padding is not multiplied, and what lies beyond an image or a group is not read."""
    problem = conv_problem(ConvCase("infinite", (2, 3, 4, 5), (4, 3, 3, 3), padding=1), np.float32)
    x = problem.x.copy()
    x[0, 1, 0, 0] = np.inf
    with np.errstate(invalid="ignore"):
        wanted = reference.conv(x, problem.weight, problem.bias, **problem.how)
    for layout in FORMATS:
        # Filters that pad a tile are zero: their products are thrown away.
        with np.errstate(invalid="ignore"):
            got = compute(replace(problem, x=x), layout, "forward")
        assert (np.isfinite(got) == np.isfinite(wanted)).all()


def geometry_of(channels, filters, data_format, batch=4, **how):
    shape = (batch, 28, 28, channels) if data_format == "channels_last" else (batch, channels, 28, 28)
    return fastconv.ConvGeometry.create(
        shape, (filters, channels, 3, 3), padding=1, data_format=data_format, **how
    ).lifted(data_format, np.dtype(np.float32))


# Channels, filters, memory format, direction, and the share of multiply-adds in the main loop of the product: what is
# left are loads from shared memory, 96 for 2048, and the addresses and tests of what is gathered.
BUDGETS = [
    (64, 128, "channels_last", "forward", 0.90),
    (64, 128, "channels_first", "forward", 0.90),
    (64, 128, "channels_last", "weight_grad", 0.90),
    (64, 128, "channels_first", "weight_grad", 0.79),
    (64, 64, "channels_first", "forward", 0.85),
    (3, 64, "channels_last", "forward", 0.75),
]
# Compiling takes seconds: every architecture for one kernel, one or two for the others.
ON = [(*BUDGETS[0], a) for a in TESTED if a != "sm_90a"] + [(*row, "sm_90a") for row in BUDGETS]
ON += [(*row, "sm_120") for row in BUDGETS[1:3]]


@pytest.mark.parametrize(("channels", "filters", "data_format", "direction", "share", "architecture"), ON)
def test_machine_code_keeps_its_budget(channels, filters, data_format, direction, share, architecture):
    geometry = geometry_of(channels, filters, data_format)
    found = implicit_gemm.steps(geometry, direction, architecture=architecture)
    (step,) = [step for step in found if step.shared_bytes]
    made = compile_kernel(step.kernel, step.signature, architecture, step.launch_bounds)
    expected = [
        "FFMA",
        "LDS.U.128" if architecture == "sm_75" else "LDS.128",
        "BAR.SYNC",
        *(["STG.E.128"] if direction == "forward" else []),
    ]
    if channels % 4 == 0 and data_format == "channels_last" and architecture != "sm_75":
        expected.append("LDGSTS.E.BYPASS.128")
    # The way out of the loop for sm_8x: a jump that ptxas writes as a call.
    assert [fault for fault in budget(made, 255, expected) if fault != "1 CALL"] == []
    mix = sass(made)
    # On sm_75 threads have half as many sums, and copy through registers.
    assert mix.count("FFMA", loop=True) / len(mix.main_loop) >= (share - 0.02 if architecture == "sm_75" else share)
    assert made.occupancy(math.prod(step.block), step.shared_bytes) * ARCHITECTURES[architecture].threads >= 256


@pytest.mark.parametrize("architecture", ["sm_75", "sm_120"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_what_prepares_and_adds_up_keeps_its_budget(data_format, architecture):
    geometry = geometry_of(64, 128, data_format)
    for direction in ("forward", "weight_grad"):
        for step in implicit_gemm.steps(geometry, direction, architecture=architecture):
            if not step.shared_bytes:
                made = compile_kernel(step.kernel, step.signature, architecture, step.launch_bounds)
                assert budget(made, 40) == []
