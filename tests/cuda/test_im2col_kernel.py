"""im2col and FFT on a GPU: kernels in the emulator around NumPy's products and transforms, and their machine code."""

import numpy as np
import pytest
from cases import FORMATS, drawn_case, emulate_conv, expected, layer, lifted
from emulation import compiled, without_exits
from hypothesis import given, settings, strategies
from support import DIRECTIONS, conv_problem, normal, whole

import fastconv
from fastconv import registry
from fastconv.arrays import NumpyArrays
from fastconv.cuda import fft, im2col
from fastconv.cuda.compile import budget, sass
from fastconv.cuda.steps import Call, Step
from fastconv.device_arrays import _TorchOnDevice
from fastconv.testing import ConvCase, assert_close

MODULES = {"im2col": im2col, "fft": fft}
BOTH = pytest.mark.parametrize("name", MODULES)


def check(name, case, direction, data_format, dtype="float32", **how):
    """Products of whole numbers are exact, transforms are not."""
    problem = conv_problem(case, np.dtype(dtype), whole if name == "im2col" else normal)
    got = emulate_conv(MODULES[name], problem, direction, data_format, **how)
    wanted = expected(problem, direction)
    if name == "im2col":
        assert np.array_equal(got, wanted)
    else:
        assert_close(got, wanted, algorithm=name, reduction_length=problem.lengths[direction])


CASES = [
    ConvCase("padding", (2, 3, 5, 4), (5, 3, 3, 3), padding=((0, 1), (2, 1))),
    ConvCase("groups of whole vectors", (2, 8, 3, 4), (8, 4, 2, 2), groups=2),
    ConvCase("stride and dilation", (1, 4, 7, 6), (6, 2, 3, 2), stride=(2, 3), padding=2, dilation=(1, 2), groups=2),
    ConvCase("1x1", (2, 3, 3, 3), (6, 3, 1, 1), stride=2),
    ConvCase("depthwise", (1, 5, 4, 4), (5, 1, 3, 3), padding=1, groups=5),
    ConvCase("one dimension", (2, 2, 9), (3, 2, 4), stride=2, padding=3),
    ConvCase("one column", (1, 2, 5, 1), (3, 2, 2, 1)),
    ConvCase("three dimensions", (1, 2, 3, 4, 3), (2, 2, 2, 3, 2), stride=(1, 2, 1), padding=1),
    ConvCase("kernel larger than the image", (1, 2, 2, 3), (3, 2, 4, 5), padding=2),
]


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
@BOTH
def test_it_agrees_with_the_oracle(name, case, direction, data_format):
    check(name, case, direction, data_format)


@BOTH
@settings(max_examples=4, deadline=None)
@given(strategies.data())
def test_any_convolution(name, data):
    case = drawn_case(data, 6, 3, 3, dilation=2)
    direction, data_format = data.draw(strategies.sampled_from(DIRECTIONS)), data.draw(strategies.sampled_from(FORMATS))
    check(name, case, direction, data_format)


@BOTH
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_order_of_threads_the_dtype_and_the_width_of_indices_do_not_matter(name, direction, monkeypatch):
    monkeypatch.setattr(MODULES[name], "needs_wide", lambda *extents: True)
    check(name, CASES[2], direction, "channels_last", "float64", seed=1)


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("limit", [0, 900, 2000])
def test_blocks_of_pixels_fit_the_limit(direction, limit, data_format, monkeypatch):
    """Blocks of several images, of one, of parts of one; chains of a weight gradient that are done in turn."""
    monkeypatch.setattr(im2col, "CHAIN", 5)
    im2col._block.cache_clear()
    case = ConvCase("blocks", (3, 2, 3, 4), (3, 2, 2, 2), padding=1)
    check("im2col", case, direction, data_format, limit=limit)
    problem = conv_problem(case, np.dtype(np.float32), whole)
    g = lifted(problem, data_format)
    stated = registry.workspace_bytes(im2col.workspace(g, direction, limit))
    assert stated <= max(limit, 420)
    products = [s for s in im2col.steps(g, direction, limit=stated) if isinstance(s, Call)]
    assert len(products) > 1
    assert im2col.workspace(g, direction, stated) == im2col.workspace(g, direction, limit)
    im2col._block.cache_clear()


@pytest.mark.parametrize("data_format", FORMATS)
def test_what_thousands_of_launches_add_is_chains_too(data_format, monkeypatch):
    monkeypatch.setattr(im2col, "CHAIN", 2)
    im2col._block.cache_clear()
    case = ConvCase("long", (3, 2, 3, 4), (3, 2, 2, 2))
    check("im2col", case, "weight_grad", data_format, limit=0)
    g = lifted(conv_problem(case, np.dtype(np.float32), whole), data_format)
    adding = [s.arguments[5:8] for s in im2col.steps(g, "weight_grad", limit=0) if "out" in s.arguments]
    continues, ends, adds = np.array(adding).T
    # 18 pixels are 9 launches, which add to the result in twos.
    assert (continues.tolist(), ends.tolist()) == ([0, 1, 0, 1, 0, 1, 0, 1, 0], [0, 1, 0, 1, 0, 1, 0, 1, 1])
    assert adds.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1]
    im2col._block.cache_clear()


@BOTH
@pytest.mark.parametrize("data_format", FORMATS)
def test_forward_ends_in_bias_and_activation(name, data_format):
    problem = conv_problem(CASES[1], np.float32)
    got = emulate_conv(MODULES[name], problem, "forward", data_format, activation="tanh")
    assert_close(got, np.tanh(problem.y.astype(np.float64)).astype(np.float32), algorithm=name, reduction_length=17)


def test_lengths_of_transforms_have_small_factors():
    assert [fft._fast_length(n) for n in (1, 2, 11, 13, 97, 230, 2049)] == [1, 2, 12, 14, 98, 240, 2058]


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("name", "dtype"), [("im2col", "float16"), ("fft", "float16"), ("fft", "bfloat16")])
def test_half_types_are_rounded_once(name, dtype, direction, data_format):
    problem = conv_problem(CASES[1], np.dtype(dtype), normal)
    got = emulate_conv(MODULES[name], problem, direction, data_format, bias=direction == "forward")
    how = {"algorithm": name, "reduction_length": problem.lengths[direction]}
    assert_close(got, expected(problem, direction), **how)


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_sums_of_several_products_of_halves_are_not_rounded(direction, data_format, monkeypatch):
    """Whole numbers are exact up to 2048, so that each product is; sums of them in float16 would not be."""
    monkeypatch.setattr(im2col, "CHAIN", 4)
    im2col._block.cache_clear()
    case = ConvCase("blocks", (3, 2, 3, 4), (3, 2, 2, 2), padding=1)
    problem = conv_problem(case, np.dtype(np.float16), whole)
    got = emulate_conv(im2col, problem, direction, data_format, bias=direction == "forward", limit=0)
    assert np.array_equal(got, expected(problem, direction))
    g = lifted(problem, data_format)
    products = [s for s in im2col.steps(g, direction, limit=0) if isinstance(s, Call)]
    assert len(products) > 1
    adding = [s for s in im2col.steps(g, direction, limit=0) if "part" in getattr(s, "arguments", ())]
    assert [int(s.arguments[6]) for s in adding] == ([0] * (len(adding) - 1) + [1] if adding else [])
    assert bool(adding) == (direction == "weight_grad")
    im2col._block.cache_clear()


def test_products_of_bfloat16_are_refused():
    g = fastconv.ConvGeometry.create((1, 2, 4, 4), (2, 2, 3, 3), dtype=np.dtype("bfloat16"))
    ok, reason = im2col.supports(g.lifted("channels_first", g.dtype), "forward")
    assert not ok
    assert "float32, float64 and float16, not bfloat16" in reason


def test_libraries_do_the_same():
    torch = pytest.importorskip("torch")
    libraries = (NumpyArrays, np.asarray, np.zeros), (
        _TorchOnDevice(0), torch.from_numpy, lambda shape, dtype: torch.zeros(shape, dtype=getattr(torch, dtype))
    )  # fmt: skip
    a, b = (normal(n, shape=s, dtype="float32") for n, s in (("a", (2, 3, 4)), ("b", (2, 4, 5))))
    for library, put, zeros in libraries:
        out, spectrum, back = zeros((2, 3, 5), "float32"), zeros((2, 3, 3), "complex64"), zeros((2, 3, 4), "float32")
        # More than is used lies behind.
        held = put(np.concatenate([a.ravel(), b.ravel()]))
        Call("matmul", ("a", "b", "out"), (a.shape, b.shape, out.shape)).perform(library, put(a), put(b), out)
        assert_close(np.asarray(out), a @ b)
        Call("rfftn", ("a", "spectrum"), (a.shape, tuple(spectrum.shape))).perform(library, held, spectrum)
        assert np.allclose(np.asarray(spectrum), np.fft.rfftn(a, axes=(1, 2)), atol=1e-5)
        library.irfftn(spectrum, back)
        assert_close(np.asarray(back), a, algorithm="fft", reduction_length=12)


# --- machine code ----------------------------------------------------------------------------------------------


def launches(name, data_format, architecture):
    g = layer(64, 128, data_format)
    found = [s for d in DIRECTIONS for s in MODULES[name].steps(g, d, architecture=architecture)]
    return {s.kernel.__name__: s for s in found if isinstance(s, Step)}


# Registers, and accesses of 128 bits.
BUDGETS = [
    ("im2col", "channels_last", "im2col_columns_float32_lanes4", 40, 1, 1),
    ("im2col", "channels_last", "im2col_place_float32_lanes4", 32, 1, 1),
    ("im2col", "channels_first", "im2col_columns_float32_lanes1", 40, 0, 0),
    ("im2col", "channels_first", "im2col_gather_float32", 64, 0, 0),
    ("im2col", "channels_first", "im2col_pack_float32", 32, 0, 0),
    ("im2col", "channels_last", "im2col_add_chains_float32", 40, 0, 0),
    ("fft", "channels_first", "fft_spread_float32", 32, 0, 0),
    ("fft", "channels_first", "fft_multiply_float32", 112, 0, 0),
    ("fft", "channels_first", "fft_collect_float32", 32, 0, 0),
]


@pytest.mark.parametrize(("name", "data_format", "kernel", "registers", "loads", "stores"), BUDGETS)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_kernels_keep_their_budget(name, data_format, kernel, registers, loads, stores, architecture):
    step = launches(name, data_format, architecture)[kernel]
    made = compiled(step, architecture)
    assert without_exits(budget(made, registers), architecture) == []
    mix = sass(made)
    assert (mix.count("LDG.E.128"), mix.count("STG.E.128")) == (loads, stores)
