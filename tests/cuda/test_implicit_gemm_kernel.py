"""Implicit GEMM of the GPU: every direction in the emulator, its tables against the oracle, its machine code."""

import math
from dataclasses import replace

import numpy as np
import pytest
from cases import FORMATS, emulate_conv, expected, layer
from emulation import compiled, without_exits
from support import DIRECTIONS, conv_problem, whole

from fastconv import reference
from fastconv.activations import ACTIVATIONS
from fastconv.cuda import implicit_gemm, sums
from fastconv.cuda.architecture import ARCHITECTURES, TESTED
from fastconv.cuda.compile import budget, sass
from fastconv.cuda.gemm_kernels import NARROW, TILE, Tile
from fastconv.testing import ConvCase, assert_close

# 32 threads of 4x4 sums: tails in every dimension at a few thousand products a block.
SMALL = Tile(16, 32, 8, 4, 8)


def compute(problem, direction, data_format, tile=SMALL, **how):
    return emulate_conv(implicit_gemm, problem, direction, data_format, tile=tile, **how)


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


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_exact_on_whole_numbers(case, direction, data_format):
    problem = conv_problem(case, np.float32, whole)
    assert np.array_equal(compute(problem, direction, data_format), expected(problem, direction))


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("seed", "architecture"), [(1, "sm_75"), (2, "sm_80")])
def test_the_order_of_threads_and_the_kind_of_copy_do_not_matter(direction, data_format, seed, architecture):
    problem = conv_problem(ConvCase("small", (1, 4, 3, 6), (5, 4, 2, 1)), np.float32)
    first = compute(problem, direction, data_format)
    again = compute(problem, direction, data_format, seed=seed, architecture=architecture)
    assert (first == again).all()
    wanted = expected(problem, direction)
    assert_close(first, wanted, algorithm="implicit_gemm", reduction_length=problem.lengths[direction])


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_indices_of_64_bits_give_the_same(direction, data_format, monkeypatch):
    problem = conv_problem(CASES[4], np.float32, whole)
    narrow = compute(problem, direction, data_format)
    monkeypatch.setattr(implicit_gemm, "is_wide", lambda geometry: True)
    implicit_gemm._share.cache_clear()
    assert (compute(problem, direction, data_format) == narrow).all()
    implicit_gemm._share.cache_clear()


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("stages", [2, 3])
def test_more_buffers_and_larger_products_of_a_thread(data_format, stages):
    problem = conv_problem(ConvCase("larger", (1, 16, 5, 4), (40, 16, 2, 1)), np.float32, whole)
    tile = Tile(32, 64, 16, 8, 8, stages)
    assert (compute(problem, "forward", data_format, tile) == problem.y).all()
    assert (compute(problem, "weight_grad", data_format, tile) == problem.grads[1]).all()


def test_tiles_are_what_the_kernels_take():
    for tile in (TILE, TILE.spread, *NARROW.values(), *(tile.spread for tile in NARROW.values())):
        assert tile.threads_down % 4 == tile.threads_across % 8 == tile.columns // tile.threads_across % 4 == 0
    # A thread copies pixels of one column.
    for tile in (TILE, TILE.spread, NARROW[False], NARROW[False].spread):
        assert tile.threads % tile.columns == 0


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_applied(activation, data_format):
    problem = conv_problem(ConvCase("small", (1, 4, 3, 6), (5, 4, 2, 1)), np.float32)
    got = compute(problem, "forward", data_format, activation=activation)
    wanted = reference._ACTIVATIONS[activation](problem.y)
    assert_close(got, wanted, algorithm="implicit_gemm", reduction_length=problem.lengths["forward"])


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_long_sums_are_cut_in_chains(direction, data_format, monkeypatch):
    monkeypatch.setattr(implicit_gemm, "PRODUCTS", 16)
    # As few shares as there may be: each has several turns.
    monkeypatch.setattr(sums, "ENOUGH_TILES", 2)
    implicit_gemm._share.cache_clear()
    problem = conv_problem(ConvCase("long", (2, 9, 5, 4), (10, 9, 3, 3), padding=1), np.float32, whole)
    activation = None if direction == "weight_grad" else "relu"
    got = compute(problem, direction, data_format, activation=activation)
    implicit_gemm._share.cache_clear()
    wanted = expected(problem, direction)
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
        share = implicit_gemm._share(layer(512, 512, "channels_last", batch=pixels // 784), 1 << 44, TILE)
        assert share.each * TILE.depth <= implicit_gemm.PRODUCTS
        assert -(-share.steps // (share.each * share.splits)) <= sums.CHAIN


def test_an_infinity_reaches_what_it_should_and_nothing_else():
    """Padding is not multiplied, and what lies beyond an image or a group is not read."""
    problem = conv_problem(ConvCase("infinite", (2, 3, 4, 5), (4, 3, 3, 3), padding=1), np.float32)
    x = problem.x.copy()
    x[0, 1, 0, 0] = np.inf
    with np.errstate(invalid="ignore"):
        wanted = reference.conv(x, problem.weight, problem.bias, **problem.how)
    for data_format in FORMATS:
        # Filters that pad a tile are zero: their products are thrown away.
        with np.errstate(invalid="ignore"):
            got = compute(replace(problem, x=x), "forward", data_format)
        assert (np.isfinite(got) == np.isfinite(wanted)).all()


# Channels, filters, memory format, direction, and the share of multiply-adds in the main loop of the product: what is
# left are loads from shared memory, 96 for 2048, and the addresses and tests of what is gathered.
BUDGETS = [
    (64, 128, "channels_last", "forward", 0.91),
    (64, 128, "channels_first", "forward", 0.91),
    (64, 128, "channels_last", "weight_grad", 0.905),
    (64, 128, "channels_first", "weight_grad", 0.90),
    (64, 64, "channels_last", "forward", 0.90),
    (64, 64, "channels_first", "forward", 0.86),
    (3, 64, "channels_last", "forward", 0.83),
]
# Compiling takes seconds: every architecture for one kernel, one or two for the others.
ON = [(*BUDGETS[0], a) for a in TESTED if a != "sm_90a"] + [(*row, "sm_90a") for row in BUDGETS]
ON += [(*row, "sm_120") for row in BUDGETS[1:3]]


@pytest.mark.parametrize(("channels", "filters", "data_format", "direction", "share", "architecture"), ON)
def test_machine_code_keeps_its_budget(channels, filters, data_format, direction, share, architecture):
    geometry = layer(channels, filters, data_format)
    found = implicit_gemm.steps(geometry, direction, architecture=architecture)
    (step,) = [step for step in found if step.shared_bytes]
    made = compiled(step, architecture)
    wanted = [
        "FFMA",
        "LDS.U.128" if architecture == "sm_75" else "LDS.128",
        "BAR.SYNC",
        *(["STG.E.128"] if direction == "forward" else []),
    ]
    if channels % 4 == 0 and data_format == "channels_last" and architecture != "sm_75":
        wanted.append("LDGSTS.E.BYPASS.128")
    assert without_exits(budget(made, 255, wanted), architecture) == []
    mix = sass(made)
    # On sm_75 threads have half as many sums, and copy through registers.
    assert mix.count("FFMA", loop=True) / len(mix.main_loop) >= (share - 0.03 if architecture == "sm_75" else share)
    assert made.occupancy(math.prod(step.block), step.shared_bytes) * ARCHITECTURES[architecture].threads >= 256


@pytest.mark.parametrize("architecture", ["sm_75", "sm_120"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_what_prepares_and_adds_up_keeps_its_budget(data_format, architecture):
    geometry = layer(64, 128, data_format)
    for direction in ("forward", "weight_grad"):
        for step in implicit_gemm.steps(geometry, direction, architecture=architecture):
            if not step.shared_bytes:
                made = compiled(step, architecture)
                assert budget(made, 40) == []
