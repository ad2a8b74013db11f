"""Implicit GEMM on tensor cores: every direction in the emulator, what it promises of float32, its machine code."""

import math
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from cases import FORMATS, drawn_case, emulate_conv, expected, layer, lifted
from emulation import compiled, without_exits
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DIRECTIONS, PROMISES, conv_problem, normal, whole

import fastconv
from fastconv import reference, selection
from fastconv.activations import ACTIVATIONS
from fastconv.cuda import direct, ptx, run, sums, tensor_core, tensor_core_kernels
from fastconv.cuda.architecture import ARCHITECTURES, TESTED
from fastconv.cuda.compile import budget, sass
from fastconv.cuda.faults import UninitialisedError
from fastconv.cuda.tensor_core import BF16, BF16X3, BF16X6, MMA, TF32, TF32X3
from fastconv.cuda.tensor_core_kernels import Tile
from fastconv.errors import UnsupportedError
from fastconv.testing import ConvCase, assert_close, rms_error

# One warp, with tails in every dimension at a few thousand products.
SMALL = Tile(16, 32, 4, 1, 1, 2)
# With the strictest promise that each keeps.
FLOAT32 = {
    "implicit_gemm_tf32": (TF32, "medium"),
    "implicit_gemm_tf32x3": (TF32X3, "highest"),
    "implicit_gemm_bf16": (BF16, "medium"),
    "implicit_gemm_bf16x3": (BF16X3, "high"),
    "implicit_gemm_bf16x6": (BF16X6, "highest"),
}


def compute(algorithm, problem, direction, data_format, tile=SMALL, **how):
    """Return a direction's result in the emulator, channels first."""
    return emulate_conv(algorithm, problem, direction, data_format, tile=tile, **how)


CASES = [
    ConvCase("whole tiles", (1, 32, 1, 2, 8), (32, 32, 1, 1, 1)),
    ConvCase("tails of pixels, filters and depth", (2, 8, 1, 5, 6), (5, 8, 1, 3, 3), padding=(0, 1, 1)),
    ConvCase("three channels", (1, 3, 1, 7, 6), (8, 3, 1, 3, 2), padding=(0, 1, 0)),
    ConvCase("two tiles of filters", (1, 4, 1, 3, 5), (40, 4, 1, 1, 1)),
    ConvCase("stride", (1, 8, 1, 7, 6), (8, 8, 1, 3, 3), (1, 2, 2), (0, 1, 1)),
    ConvCase("stride over the kernel", (1, 5, 1, 9, 8), (3, 5, 1, 2, 1), (1, 3, 3)),
    ConvCase("dilation and stride share a factor", (1, 4, 1, 9, 9), (8, 4, 1, 3, 2), (1, 2, 4), 2, (1, 2, 2)),
    ConvCase("groups of chunks", (1, 16, 1, 4, 4), (16, 8, 1, 3, 3), padding=(0, 1, 1), groups=2),
    ConvCase("groups of three and five", (2, 9, 1, 3, 4), (15, 3, 1, 2, 2), groups=3),
    ConvCase("three dimensions", (1, 3, 3, 4, 3), (4, 3, 2, 3, 2), (1, 2, 1), (1, 1, 0)),
    ConvCase("kernel larger than the image", (2, 3, 1, 2, 3), (4, 3, 1, 5, 5), padding=(0, 2, 2)),
    ConvCase("pixels that blocks share", (2, 8, 1, 12, 13), (8, 8, 1, 1, 1)),
]


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_exact_on_whole_numbers(case, direction, data_format):
    problem = conv_problem(case, np.float16, whole)
    got = compute(MMA, problem, direction, data_format)
    assert np.array_equal(got, expected(problem, direction))


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", FLOAT32)
def test_splitting_is_exact_on_whole_numbers(name, direction, data_format):
    problem = conv_problem(CASES[8], np.float32, whole)
    got = compute(FLOAT32[name][0], problem, direction, data_format)
    assert np.array_equal(got, expected(problem, direction))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_half_precision_is_rounded_once(direction, dtype):
    problem = conv_problem(CASES[1], dtype, normal)
    for data_format in FORMATS:
        got = compute(MMA, problem, direction, data_format)
        length = problem.lengths[direction]
        assert_close(got, expected(problem, direction), algorithm="implicit_gemm", reduction_length=length)


# Sums of 288 products forwards, of 144 backwards, and of 100 pixels.
DEEP = {direction: ConvCase("deep", (1, 32, 1, 4, 5), (16, 32, 1, 3, 3)) for direction in DIRECTIONS}
DEEP["weight_grad"] = ConvCase("many pixels", (2, 8, 1, 5, 11), (8, 8, 1, 1, 2))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", FLOAT32)
def test_float32_keeps_its_promise(name, direction):
    algorithm, precision = FLOAT32[name]
    problem = conv_problem(DEEP[direction], np.float32, normal)
    got, wanted = compute(algorithm, problem, direction, "channels_last"), expected(problem, direction)
    error = math.sqrt(np.mean((got - wanted) ** 2.0) / np.mean(wanted**2.0))
    assert error <= PROMISES[precision]
    # What is promised is not reached by less: planes are there, and multiplied.
    assert precision == "highest" or error > PROMISES[{"medium": "high", "high": "highest"}[precision]]


@pytest.mark.parametrize("name", ["MMA", "implicit_gemm_tf32x3"])
def test_sums_of_many_pixels_are_chains(name, monkeypatch):
    algorithm, dtype = algorithm_of(name)
    # One step of pixels each, of ten or more, shared out among two blocks.
    monkeypatch.setattr(tensor_core, "CHAIN", 1)
    monkeypatch.setattr(sums, "ENOUGH_TILES", 2)
    problem = conv_problem(CASES[11], dtype, whole)
    got = compute(algorithm, problem, "weight_grad", "channels_last")
    assert np.array_equal(got, expected(problem, "weight_grad"))


@pytest.mark.parametrize("pixels", [2**14, 2**23, 2**31])
def test_running_sums_of_the_weight_gradient_are_short(pixels):
    """Of pixels in registers, and of what launches add to a part: what a chain is for `sums`."""
    g = fastconv.ConvGeometry.create((pixels // 2**12, 64, 64, 64), (256, 64, 1, 1)).lifted(
        "channels_last", np.dtype(np.float32)
    )
    for units in (TF32X3.units["float32"], BF16X6.units["float32"]):
        share = tensor_core.Share.of(g, units, 1 << 44, None)
        assert share.each * share.tile.chunks * units.chunk <= 8 * sums.CHAIN
        assert -(-share.steps // (share.each * share.splits)) <= sums.CHAIN


# The smallest product of a warpgroup.
WARPGROUP = Tile(64, 128, 8, 4, 1, 2, warpgroups=True)


@pytest.mark.parametrize(("dtype", "direction"), [(np.float16, "forward"), (ml_dtypes.bfloat16, "input_grad")])
@pytest.mark.parametrize("data_format", FORMATS)
def test_warpgroups_are_exact_on_whole_numbers(data_format, dtype, direction):
    # In the last step of depth a part of the chunks is beyond it; the order of threads is drawn.
    problem = conv_problem(ConvCase("two steps", (1, 24, 1, 3, 4), (20, 24, 1, 2, 2), padding=(0, 1, 0)), dtype, whole)
    got = compute(MMA, problem, direction, data_format, WARPGROUP, seed=1)
    assert np.array_equal(got, expected(problem, direction))


@pytest.mark.parametrize("data_format", FORMATS)
def test_warpgroups_keep_the_promise_of_planes(data_format):
    problem = conv_problem(ConvCase("two steps", (1, 72, 1, 2, 8), (16, 72, 1, 1, 1)), np.float32, normal)
    got = compute(BF16X6, problem, "forward", data_format, WARPGROUP)
    assert rms_error(got, problem.y) <= PROMISES["highest"]


@pytest.fixture
def made_anew():
    """Kernels of mistaken parts are not kept."""
    tensor_core_kernels.gather.cache_clear()
    yield
    tensor_core_kernels.gather.cache_clear()


@pytest.mark.usefixtures("made_anew")
def test_warpgroups_whose_copies_are_not_fenced_are_found_out(monkeypatch):
    monkeypatch.setattr(tensor_core_kernels.ptx, "fence_async", ptx.copy_commit)
    problem = conv_problem(CASES[0], np.float16, whole)
    with pytest.raises(UninitialisedError, match="there is no fence_async"):
        compute(MMA, problem, "forward", "channels_last", WARPGROUP)


@pytest.mark.usefixtures("made_anew")
def test_warpgroups_whose_sums_are_not_waited_for_are_found_out(monkeypatch):
    begin = tensor_core_kernels.warpgroup_product(WARPGROUP, MMA.units["float16"])[0]
    monkeypatch.setattr(
        tensor_core_kernels, "warpgroup_product", lambda tile, units: (begin, tensor_core_kernels._nothing)
    )
    problem = conv_problem(CASES[0], np.float16, whole)
    with pytest.raises(UninitialisedError, match="is read and was never written"):
        compute(MMA, problem, "forward", "channels_last", WARPGROUP)


def algorithm_of(name):
    return (FLOAT32[name][0], np.float32) if name in FLOAT32 else (MMA, np.float16)


@pytest.mark.parametrize("name", ["MMA", *FLOAT32])
def test_infinities_are_where_direct_arithmetic_puts_them(name):
    """Padding is not multiplied, parts of what is split do not disagree, and no finite number becomes infinite."""
    algorithm, dtype = algorithm_of(name)
    problem = conv_problem(ConvCase("special", (1, 3, 1, 3, 4), (4, 3, 1, 2, 2), padding=(0, 1, 1)), dtype, normal)
    x, weight, grad = (np.array(a * 0.001, dtype) for a in (problem.x, problem.weight, problem.grad))
    x[0, 1, 0, 0, 0], x[0, 2, 0, 2, 3], weight[1, 0, 0, 0, 0], grad[0, 2, 0, 1, 1] = np.inf, np.nan, -np.inf, np.inf
    if dtype == np.float32:
        # In bfloat16 it is rounded to infinity.
        x[0, 0, 0, 1, 1] = np.finfo(dtype).max
    problem = replace(problem, x=x, weight=weight, grad=grad)
    for direction, data_format in zip(DIRECTIONS, (*FORMATS, FORMATS[0])):
        got = compute(algorithm, problem, direction, data_format)
        wanted = emulate_conv(direct, problem, direction, data_format, threads=32)
        assert np.array_equal(np.isnan(got), np.isnan(wanted))
        assert np.array_equal(np.where(np.isinf(got), got, 0), np.where(np.isinf(wanted), wanted, 0))


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", ["MMA", "implicit_gemm_tf32x3"])
def test_the_order_of_threads_does_not_matter(name, direction, data_format):
    algorithm, dtype = algorithm_of(name)
    problem = conv_problem(ConvCase("small", (1, 8, 1, 3, 6), (5, 8, 1, 2, 1)), dtype)
    # Two warps, each with more than one fragment of rows, and other sizes than elsewhere.
    tile = Tile(32, 64 if direction == "weight_grad" else 128, 4, 1, 2, 3)
    first, again = (compute(algorithm, problem, direction, data_format, tile, seed=seed) for seed in (None, 1))
    assert np.array_equal(first, again)
    small = compute(algorithm, problem, direction, data_format)
    assert_close(first, small, algorithm=name, reduction_length=problem.lengths[direction])


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_indices_of_64_bits_give_the_same(direction, data_format, monkeypatch):
    problem = conv_problem(CASES[6], np.float16, whole)
    monkeypatch.setattr(tensor_core, "is_wide", lambda geometry, units: True)
    assert np.array_equal(compute(MMA, problem, direction, data_format), expected(problem, direction))


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("direction", ["forward", "input_grad"])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_bias_and_activation_come_last(activation, direction, data_format):
    # In the gradient the bias is that of a transposed convolution, one for each channel of x.
    problem = conv_problem(ConvCase("small", (1, 8, 1, 3, 6), (8, 8, 1, 2, 1)), np.float32)
    plain = problem.y if direction == "forward" else problem.grads[0] + problem.bias.reshape(1, -1, 1, 1, 1)
    wanted = reference._ACTIVATIONS[activation](plain)
    got = compute(TF32X3, problem, direction, data_format, bias=True, activation=activation)
    assert_close(got, wanted, algorithm="implicit_gemm", reduction_length=problem.lengths[direction])


@settings(max_examples=8)
@given(st.data())
def test_any_geometry(data):
    problem = conv_problem(drawn_case(data, 6, 9, 9), np.float16, whole)
    direction, data_format = data.draw(st.sampled_from(DIRECTIONS)), data.draw(st.sampled_from(FORMATS))
    assert np.array_equal(compute(MMA, problem, direction, data_format), expected(problem, direction))


def test_the_name_of_the_family_means_what_has_the_dtype_and_the_instructions():
    how = {"stored": "channels_last", "algorithm": "implicit_gemm"}
    half, single = (
        fastconv.ConvGeometry.create((1, 8, 8, 8), (8, 8, 3, 3), data_format="channels_last", dtype=dtype)
        for dtype in ("float16", "float32")
    )
    assert selection.choose(half, "forward", device="sm_80", **how).algorithm.name == "implicit_gemm_mma"
    assert selection.choose(single, "forward", device="sm_80", **how).algorithm.name == "implicit_gemm"
    with pytest.raises(UnsupportedError, match="implicit_gemm_mma: it needs a GPU of sm_80 or later, not sm_75"):
        selection.choose(half, "forward", device="sm_75", **how)


def test_predicted_times_are_those_of_whole_tiles_and_of_what_is_moved():
    def seconds(x, weight, direction="forward", architecture="sm_80"):
        g = fastconv.ConvGeometry.create(x, weight, data_format="channels_last", dtype="float16")
        return MMA.seconds(g.lifted("channels_last", g.dtype), direction, architecture)

    for direction in DIRECTIONS:
        small = seconds((1, 4, 4, 8), (8, 8, 1, 1), direction)
        assert small < seconds((16, 64, 64, 64), (128, 64, 3, 3), direction) < 1e-3
    few, many = (seconds((16, 64, 64, 64), (filters, 64, 3, 3)) for filters in (65, 128))
    assert few == pytest.approx(many, rel=0.1)
    assert seconds((1, 4, 4, 8), (8, 8, 1, 1), architecture="sm_75") == math.inf


@pytest.mark.parametrize("direction", ["forward", "weight_grad"])
def test_memory_is_accessed_without_waste(direction, monkeypatch):
    """No bank conflicts but where tables are written, whole sectors, and each as wide as can be."""
    problem = conv_problem(ConvCase("row", (1, 16, 1, 1, 32), (64, 16, 1, 1, 1)), np.float16, whole)
    reports = []
    monkeypatch.setattr(run, "emulated", lambda *a, emulated=run.emulated: reports.extend(emulated(*a)))
    tile = Tile(32, 64, 4, 1, 2, 3)
    compute(MMA, problem, direction, "channels_last", tile, bias=False)
    (product,) = (r for r in reports if r.shared_bytes)
    loop = [a for a in product.accesses if a.nbytes >= 8]
    assert {a.memory for a in loop} == {"global", "shared"}
    assert all(a.cost == a.ideal for a in loop)


# --- machine code ----------------------------------------------------------------------------------------------


def product_step(algorithm, data_format, direction, architecture):
    """Return the step that multiplies, of an ordinary layer."""
    g = layer(64, 128, data_format, dtype=next(iter(algorithm.units)))
    return next(s for s in algorithm.steps(g, direction, architecture=architecture) if s.shared_bytes)


# Where copies to shared memory are asynchronous.
HERE = [a for a in TESTED if ARCHITECTURES[a].capability >= 80]
KINDS = [
    ("MMA", MMA, "channels_last", "forward", HERE),
    ("MMA", MMA, "channels_first", "forward", ["sm_80", "sm_90a"]),
    ("MMA", MMA, "channels_last", "weight_grad", ["sm_80", "sm_90a"]),
    ("TF32X3", TF32X3, "channels_last", "forward", ["sm_80", "sm_90a", "sm_120"]),
    ("BF16X6", BF16X6, "channels_last", "forward", ["sm_80", "sm_90a"]),
    ("TF32X3", TF32X3, "channels_last", "weight_grad", ["sm_80", "sm_90a", "sm_120"]),
]
ON = [(*kind[1:4], a) for kind in KINDS for a in kind[4]]
IDS = [f"{kind[0]}-{kind[2]}-{kind[3]}-{a}" for kind in KINDS for a in kind[4]]


@pytest.mark.parametrize(("algorithm", "data_format", "direction", "architecture"), ON, ids=IDS)
def test_machine_code_keeps_its_budget(algorithm, data_format, direction, architecture):
    step = product_step(algorithm, data_format, direction, architecture)
    made = compiled(step, architecture)
    words = direction == "weight_grad" and algorithm is TF32X3
    of_warpgroups = algorithm is not TF32X3 and architecture == "sm_90a" and direction == "forward"
    multiplying = ["WARPGROUP.ARRIVE", "HGMMA"] if of_warpgroups else ["LDS" if words else "LDSM", "HMMA"]
    expected = [*multiplying, "LDGSTS.E.BYPASS.128", "STG.E.64" if direction == "weight_grad" else "STG.E.128"]
    assert without_exits(budget(made, 255, expected), architecture) == []
    # A warpgroup's product is 64x128x16 or 64x256x16, a warp's 16x8x16 or 16x8x8.
    assert sass(made).per(multiplying[-1]) <= (50 if of_warpgroups else 5)
    assert made.occupancy(math.prod(step.block), step.shared_bytes) * ARCHITECTURES[architecture].threads >= 128


def test_what_stages_packs_mends_and_adds_up_keeps_its_budget():
    g = lifted(conv_problem(CASES[1], np.float32), "channels_last")
    for direction in ("forward", "weight_grad"):
        for step in BF16X6.steps(g, direction, architecture="sm_90a"):
            if not step.shared_bytes:
                assert budget(compiled(step, "sm_90a"), 48) == []
