"""Depthwise convolution and sums over pixels on the GPU: in the emulator against the oracle, and as machine code."""

import math

import numpy as np
import pytest
from emulation import compiled, global_bytes, poisoned
from hypothesis import given, settings, strategies
from support import BFLOAT16, DIRECTIONS, whole

import fastconv
from fastconv import reference
from fastconv.cuda import depthwise, run
from fastconv.cuda.architecture import TESTED
from fastconv.cuda.compile import budget
from fastconv.testing import CONV_CASES, ConvCase

FORMATS = ("channels_first", "channels_last")
THREADS = 32


def size(case):
    g = geometry_of(case, "channels_first", np.float32)
    return math.prod(g.output_shape) * math.prod(g.kernel_size)


def geometry_of(case, data_format, dtype):
    g = fastconv.ConvGeometry.create(
        case.x_shape, case.weight_shape, case.stride, case.padding, case.dilation, case.groups, dtype=np.dtype(dtype)
    )
    return g.lifted(data_format, np.dtype(dtype))


def put(array, data_format):
    return np.ascontiguousarray(np.moveaxis(array, 1, -1) if data_format == "channels_last" else array)


CASES = [
    *(c for c in CONV_CASES if c.groups == c.x_shape[1] > 1 and c.padding_mode == "zeros" and size(c) <= 5000),
    # Rows and channels of whole vectors.
    ConvCase("3x3 rows", (1, 2, 4, 16), (2, 1, 3, 3), padding=1, groups=2),
    ConvCase("3x3 stride 2 rows", (1, 2, 6, 16), (2, 1, 3, 3), 2, padding=1, groups=2),
    ConvCase("3x4 stride 3 dilation 2 rows", (1, 2, 5, 24), (2, 1, 3, 4), 3, ((2, 1), (3, 4)), 2, groups=2),
    ConvCase("multiplier 2 rows", (1, 2, 4, 12), (4, 1, 2, 5), 1, (0, 2), groups=2),
    ConvCase("channels", (1, 8, 5, 4), (8, 1, 3, 3), (1, 2), 1, groups=8),
    ConvCase("one pixel", (2, 4, 1, 1), (4, 1, 3, 3), padding=1, groups=4),
    ConvCase("6x7", (1, 2, 8, 9), (2, 1, 6, 7), padding=3, groups=2),
]  # fmt: skip


def computed(case, direction, data_format, dtype=np.float32, seed=None, threads=THREADS, **options):
    """Return (result with channels first, the oracle's, what the steps did)."""
    g = geometry_of(case, data_format, dtype)
    x, weight = whole("dx", shape=case.x_shape, dtype=dtype), whole("dw", shape=case.weight_shape, dtype=dtype)
    bias = whole("db", shape=case.weight_shape[:1], dtype=dtype)
    how = (case.stride, case.padding, case.dilation, case.groups)
    y = reference.conv(x, weight, bias, *how)
    grad = whole("dy", shape=y.shape, dtype=dtype)
    shape = {"forward": g.output_shape, "input_grad": g.x_shape, "weight_grad": g.weight_shape}[direction]
    buffers = depthwise.workspace(g, direction, 2**30, threads=threads, **options)
    arrays = {
        "x": put(x, data_format), "weight": weight, "bias": bias, "grad_output": put(grad, data_format),
        "out": poisoned(shape, dtype), **{name: poisoned(b.shape, b.dtype) for name, b in buffers.items()},
    }  # fmt: skip
    more = {"bias": True, "activation": "relu"} if direction == "forward" else {}
    reports = run.emulated(depthwise.steps(g, direction, threads=threads, **more, **options), arrays, seed)
    dx, dw, _ = reference.conv_backward(grad, x, weight, *how)
    expected = {"forward": np.maximum(y, 0), "input_grad": dx, "weight_grad": dw}[direction]
    got = arrays["out"]
    if direction != "weight_grad" and data_format == "channels_last":
        got = np.moveaxis(got, -1, 1)
    return got.reshape(expected.shape).astype(np.float64), expected, reports


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_whole_numbers_come_out_exact(case, direction, data_format):
    got, expected, _ = computed(case, direction, data_format, seed=len(case.name))
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, BFLOAT16], ids=str)
@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_other_dtypes_come_out_exact_where_they_hold_the_sums(direction, data_format, dtype):
    case = ConvCase("", (1, 8, 3, 8), (8, 1, 1, 3), 1, (0, 1), groups=8)
    got, expected, _ = computed(case, direction, data_format, dtype)
    assert np.array_equal(got, expected.astype(dtype).astype(np.float64))


@pytest.mark.parametrize("direction", ["forward", "input_grad"])
@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("stride", [1, 2])
def test_aligned_images_are_read_and_written_by_128_bits(data_format, direction, stride):
    case = ConvCase("", (1, 8, 5, 16), (8, 1, 3, 3), stride, 1, groups=8)
    _, _, reports = computed(case, direction, data_format)
    narrow = {a.where for a in reports[-1].accesses if a.nbytes < 16}
    # Channels first: of the weight and the bias each thread reads one number, all threads of a row the same.
    assert len(narrow) <= (2 if data_format == "channels_first" else 1)
    assert {a.nbytes for a in reports[-1].accesses if a.write} == {16}
    assert global_bytes(reports[-1:]) <= {4, 16}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("data_format", FORMATS)
def test_unaligned_arrays_are_read_one_by_one(data_format, direction):
    case = CASES[-3]
    got, expected, reports = computed(case, direction, data_format, aligned=False)
    assert np.array_equal(got, expected)
    assert global_bytes(reports) == {4}


@given(
    sizes=strategies.tuples(*[strategies.integers(1, 9)] * 2),
    kernel=strategies.tuples(*[strategies.integers(1, 4)] * 2),
    stride=strategies.integers(1, 3),
    dilation=strategies.integers(1, 2),
    padding=strategies.integers(3, 4),
    channels=strategies.integers(1, 5),
    multiplier=strategies.integers(1, 2),
    direction=strategies.sampled_from(DIRECTIONS),
    last=strategies.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_drawn_geometries_come_out_exact(
    sizes, kernel, stride, dilation, padding, channels, multiplier, direction, last
):
    shape = (channels * multiplier, 1, *kernel)
    case = ConvCase("", (1, channels, *sizes), shape, stride, padding, dilation, channels)
    got, expected, _ = computed(case, direction, FORMATS[last])
    assert np.array_equal(got, expected)


def test_shares_of_pixels_are_added_up():
    case = ConvCase("", (2, 2, 16, 16), (2, 1, 1, 3), padding=(0, 1), groups=2)
    for data_format in FORMATS:
        got, expected, reports = computed(case, "weight_grad", data_format)
        assert reports[0].blocks > reports[1].blocks
        assert np.array_equal(got, expected)


def test_one_channel_per_group_is_what_it_takes():
    ok = fastconv.ConvGeometry.create((1, 4, 8, 8), (8, 1, 3, 3), groups=4)
    wide = fastconv.ConvGeometry.create((1, 4, 8, 8), (8, 2, 3, 3), groups=2)
    assert depthwise.supports(ok, "forward") == (True, "")
    assert depthwise.supports(wide, "forward") == (False, "it takes one channel per group, not 2")


# --- machine code ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", TESTED)
@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_machine_code_keeps_its_budget(direction, data_format, architecture):
    last = data_format == "channels_last"
    g = geometry_of(ConvCase("", (8, 64, 56, 56), (64, 1, 3, 3), 1, 1, groups=64), data_format, np.float32)
    step = depthwise.steps(g, direction)[1 if last and direction != "weight_grad" else 0]
    expected = ("LDG.E.128",) if last or direction != "weight_grad" else ("LDG",)
    expected += ("STG.E.128", "FFMA") if direction != "weight_grad" else ("STS", "BAR")
    assert budget(compiled(step, architecture), 128, expected) == []


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("data_format", FORMATS)
def test_wide_indices_give_the_same(direction, data_format, monkeypatch):
    monkeypatch.setattr(depthwise, "needs_wide", lambda *extents: True)
    case = ConvCase("", (1, 4, 4, 8), (4, 1, 2, 3), 2, 1, groups=4)
    got, expected, _ = computed(case, direction, data_format)
    assert np.array_equal(got, expected)
    for step in depthwise.steps(geometry_of(case, data_format, np.float32), direction, "tanh", bias=True):
        faults = budget(compiled(step, "sm_90a"), 128)
        assert [fault for fault in faults if "CALL" not in fault] == []


@pytest.mark.parametrize(
    ("data_format", "dtype", "kernel", "direction"),
    [
        ("channels_first", BFLOAT16, 3, "forward"),
        ("channels_last", np.float16, 3, "input_grad"),
        ("channels_first", np.float64, 3, "input_grad"),
        ("channels_last", BFLOAT16, 3, "weight_grad"),
        ("channels_first", np.float32, 7, "forward"),
    ],
)
def test_other_variants_compile_without_spills(data_format, dtype, kernel, direction):
    g = geometry_of(ConvCase("", (8, 64, 56, 56), (64, 1, kernel, kernel), 2, 1, groups=64), data_format, dtype)
    for step in depthwise.steps(g, direction, "relu", bias=True):
        assert budget(compiled(step, "sm_90a"), 160, double=dtype == np.float64) == []
