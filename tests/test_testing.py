"""The tools of the tests: each must fail on what it is there to catch."""

import dataclasses
import math
import signal
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from fastconv import reference
from fastconv.testing import (
    CONV_CASES,
    POOL_CASES,
    assert_close,
    check_gradients,
    conv_cases,
    guarded,
    pool_cases,
    rms_error,
    tolerance,
)


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def each(value, dims):
    return (value,) * dims if np.ndim(value) == 0 else tuple(value)


def test_tolerance_grows_with_the_reduction_and_with_the_transform():
    assert tolerance("float32", "direct", 400).rms == pytest.approx(20 * tolerance("float32").rms)
    ladder = ["direct", "winograd_f2x3", "winograd_f4x3", "winograd_f6x3"]
    allowed = [tolerance(np.float32, name, 9).rms for name in ladder]
    assert allowed == sorted(set(allowed))
    assert tolerance("float32", "winograd", 9) == tolerance("float32", "winograd_f6x3", 9)
    assert tolerance("float32", "im2col", 9) == tolerance("float32", "direct", 9)


def test_tolerance_takes_dtypes_of_every_kind():
    assert tolerance(torch.float32) == tolerance(np.float32) == tolerance("float32")
    assert tolerance(torch.bfloat16) == tolerance(ml_dtypes.bfloat16) == tolerance("bfloat16")
    assert tolerance("int8").elementwise == tolerance(np.int32).rms == 0.0


def test_tolerance_refuses_a_type_it_does_not_know():
    with pytest.raises(TypeError, match=r"dtype must be an integer type or one of float64.*not 'complex64'"):
        tolerance("complex64")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("C", [1, 16, 300])
def test_a_plain_float32_sum_is_within_tolerance_and_its_lower_half_is_not(C, dtype):
    x, weight = normal((2, C, 9, 9)).astype(dtype), normal((4, C, 3, 3), 1).astype(dtype)
    expected = reference.conv(x, weight)
    y = np.zeros(expected.shape, np.float32)
    for c in range(C):
        for r, s in np.ndindex(3, 3):
            tap = weight[np.newaxis, :, c, r, s, np.newaxis, np.newaxis].astype(np.float32)
            y += x[:, c, np.newaxis, r : r + 7, s : s + 7].astype(np.float32) * tap
    assert_close(y.astype(dtype), expected, reduction_length=9 * C)
    allowed = tolerance(dtype, "direct", 9 * C)
    assert rms_error(y.astype(dtype), expected) < allowed.rms
    with pytest.raises(AssertionError, match="RMS error"):
        assert_close((y * (1 + 2 * allowed.rms)).astype(np.float32), expected, dtype, reduction_length=9 * C)


def test_assert_close_accepts_rounding_nan_and_infinities():
    expected = np.array([1.0, -2.0, np.nan, np.inf, -np.inf, 0.0])
    assert_close(expected.astype(np.float32), expected)
    assert_close(np.float32([[]]), np.zeros((1, 0)))
    assert_close(np.float16([np.inf, 1.0]), [70000.0, 1.0])
    assert_close(np.int32([1, 2]), [1, 2])
    assert_close(np.float32([0.0, 1e-45]), [0.0, 0.0])


def test_assert_close_names_the_one_wrong_element():
    expected = normal((3, 4, 5))
    actual = expected.astype(np.float32)
    actual[1, 2, 3] += 1e-4
    with pytest.raises(AssertionError, match=r"layer 3: .*largest error 0\.0001.*worst at \(1, 2, 3\): "):
        assert_close(actual, expected, err_msg="layer 3")


def test_assert_close_compares_shapes():
    with pytest.raises(AssertionError, match=r"shape \(2, 1\), expected \(2,\)"):
        assert_close(np.zeros((2, 1), np.float32), np.zeros(2))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 3.0])
@pytest.mark.parametrize("right", [np.nan, np.inf, -np.inf, 3.0])
def test_assert_close_compares_nan_and_infinities_by_place(wrong, right):
    actual, expected = np.float32([1.0, wrong]), np.array([1.0, right])
    if wrong == right or (np.isnan(wrong) and np.isnan(right)):
        assert_close(actual, expected)
        return
    with pytest.raises(AssertionError, match=r"NaN or infinity differs in 1 of 2 elements, first at \(1,\)"):
        assert_close(actual, expected)


def test_assert_close_bounds_the_rms_where_every_element_passes():
    expected = np.ones(100)
    allowed = tolerance("float32")
    actual = expected * (1 + 3 * allowed.rms)
    assert 3 * allowed.rms < allowed.elementwise
    with pytest.raises(AssertionError, match=r"RMS error .*, allowed"):
        assert_close(actual, expected, "float32")


def test_assert_close_wants_equal_integers():
    with pytest.raises(AssertionError, match=r"1 of 2 integers differ, first at \(1,\)"):
        assert_close(np.int32([1, 2]), [1, 3])
    with pytest.raises(AssertionError, match="integers differ"):
        assert_close(np.int64([2**62]), np.int64([2**62 + 1]))


def test_rms_error_is_relative_and_neither_overflows_nor_vanishes():
    assert rms_error([3.0, 4.1], [3.0, 4.0]) == pytest.approx(0.02)
    assert rms_error([1e300], [2e300]) == pytest.approx(0.5)
    assert rms_error([1e-300], [2e-300]) == pytest.approx(0.5)
    assert rms_error([0.0], [0.0]) == 0.0
    assert rms_error([1.0], [0.0]) == math.inf
    assert rms_error([], []) == 0.0
    assert math.isnan(rms_error([np.nan, 1.0], [1.0, 1.0]))


def test_check_gradients_accepts_right_ones():
    x, weight, bias = normal((2, 4, 6, 5)), normal((6, 2, 3, 3), 1), normal(6, 2)
    how = {"stride": 2, "padding": 1, "groups": 2}
    g = normal((2, 6, 3, 3), 3)
    grads = reference.conv_backward(g, x, weight, **how)
    check_gradients(lambda *a: reference.conv(*a, **how), (x, weight, bias), grads, g)
    positive = np.abs(x) + 0.1
    norm = reference.lp_pool_backward(normal((2, 4, 3, 2), 4), positive, 3, 2)
    check_gradients(lambda x: reference.lp_pool(x, 3, 2), [positive], [norm], normal((2, 4, 3, 2), 4))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_check_gradients_catches_one_wrong_element(which):
    x, weight, bias = normal((2, 3, 6, 5)), normal((4, 3, 3, 3), 1), normal(4, 2)
    g = normal((2, 4, 4, 3), 3)
    grads = list(reference.conv_backward(g, x, weight))
    grads[which].flat[1] += 0.01
    with pytest.raises(AssertionError, match=f"gradient {which} along a random direction"):
        check_gradients(reference.conv, (x, weight, bias), grads, g)
    grads[which] = None
    check_gradients(reference.conv, (x, weight, bias), grads, g)


def test_check_gradients_catches_nan_zero_and_shape():
    x = normal(3)
    with pytest.raises(AssertionError, match="gradient 0 along"):
        check_gradients(np.square, [x], [np.full(3, np.nan)], np.ones(3))
    with pytest.raises(AssertionError, match="gradient 0 along"):
        check_gradients(np.square, [x], [np.zeros(3)], np.ones(3))
    with pytest.raises(AssertionError, match=r"gradient 0 has shape \(1, 3\), its input \(3,\)"):
        check_gradients(np.square, [x], [2 * x[np.newaxis]], np.ones(3))


READ = """
import ctypes, faulthandler, sys
import numpy as np
from fastconv.testing import guarded

faulthandler.disable()
array = guarded(np.arange(1.0, {count} + 1.0, dtype=np.{dtype}), {where!r})
element = ctypes.{ctype}.from_address(array.ctypes.data + {offset} * array.itemsize)
if {write}:
    element.value = 7.0
print(element.value)
"""


# macOS reports a guard page as a bus error.
FAULTS = (-signal.SIGSEGV, -signal.SIGBUS)


def access(where, offset, dtype="float32", ctype="c_float", count=5, write=False):
    script = READ.format(where=where, offset=offset, dtype=dtype, ctype=ctype, count=count, write=write)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="guard pages need mprotect")
class TestGuarded:
    @pytest.mark.parametrize(("where", "offset"), [("after", 5), ("before", -1)])
    @pytest.mark.parametrize("write", [False, True])
    def test_one_element_too_far_crashes(self, where, offset, write):
        assert access(where, offset, write=write).returncode in FAULTS

    def test_a_whole_page_of_elements_is_guarded_too(self):
        assert access("after", 2048, "float64", "c_double", 2048).returncode in FAULTS

    @pytest.mark.parametrize("where", ["after", "before"])
    def test_the_elements_themselves_are_readable_and_writable(self, where):
        assert access(where, 4).stdout == "5.0\n"
        assert access(where, 0, write=True).stdout == "7.0\n"

    def test_the_far_side_is_nan(self):
        assert access("after", -1).stdout == "nan\n"
        assert access("before", 5).stdout == "nan\n"

    @pytest.mark.parametrize("where", ["after", "before"])
    def test_values_dtype_and_axis_order_are_kept(self, where):
        x = normal((2, 3, 4, 5)).astype(ml_dtypes.bfloat16)
        last = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
        for array in (x, last, x[::-1, :, ::2], np.broadcast_to(x[:1], x.shape), x[:0], x[0, 0, 0, 0]):
            copy = guarded(array, where)
            assert copy.dtype == array.dtype
            assert np.array_equal(copy, array)
        assert guarded(last, where).strides == last.strides

    def test_a_wrong_side_is_refused(self):
        with pytest.raises(ValueError, match="where must be 'after' or 'before', not 'behind'"):
            guarded(np.zeros(3), "behind")


def conv_extension(case):
    """Which documented extension of PyTorch's convolution the case uses, if any."""
    if case.padding in ("same_lower", "full"):
        return case.padding
    if case.padding == "same" and any(s != 1 for s in each(case.stride, case.spatial_dims)):
        return "same with a stride"
    if np.ndim(case.padding) == 2:
        return "padding in pairs"
    if case.padding_mode == "symmetric":
        return "symmetric"
    return None


def pool_extension(case, average):
    if isinstance(case.padding, str):
        return case.padding
    if np.ndim(case.padding) == 2:
        return "padding in pairs"
    dilated = any(d != 1 for d in each(case.dilation, case.spatial_dims))
    return "dilated average" if average and dilated else None


def torch_conv(case):
    layer = getattr(torch.nn, f"Conv{case.spatial_dims}d")(
        case.x_shape[1],
        case.weight_shape[0],
        case.weight_shape[2:],
        case.stride,
        case.padding,
        case.dilation,
        case.groups,
        padding_mode=case.padding_mode,
    )
    assert tuple(layer.weight.shape) == case.weight_shape
    return layer(torch.zeros(case.x_shape))


def reference_conv(case):
    x, weight = np.zeros(case.x_shape), np.zeros(case.weight_shape)
    how = (case.stride, case.padding, case.dilation, case.groups)
    return reference.conv(x, weight, None, *how, padding_mode=case.padding_mode)


@pytest.mark.parametrize("table", [CONV_CASES, POOL_CASES], ids=["conv", "pool"])
def test_case_names_are_unique_and_cases_differ(table):
    assert len({case.name for case in table}) == len(table)
    assert len({dataclasses.replace(case, name="") for case in table}) == len(table)
    assert {case.spatial_dims for case in table} == {1, 2, 3}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_conv_case_is_small_and_pytorchs_or_a_known_extension(case):
    out = reference_conv(case).shape
    products = math.prod(out) * math.prod(case.weight_shape[1:])
    assert products <= 2e6
    assert all(n > 0 for n in out[1:])
    if conv_extension(case) is None:
        assert tuple(torch_conv(case).shape) == out
    else:
        with pytest.raises((TypeError, ValueError, RuntimeError), match=r"pad|symmetric|integer"):
            torch_conv(case)


@pytest.mark.parametrize("average", [False, True], ids=["max", "average"])
@pytest.mark.parametrize("case", POOL_CASES, ids=str)
def test_pool_case_is_small_and_pytorchs_or_a_known_extension(case, average):
    how = (case.kernel_size, case.stride, case.padding)
    out = reference.max_pool(np.zeros(case.x_shape), *how, case.dilation, case.ceil_mode)[0].shape
    kernel = each(case.kernel_size, case.spatial_dims)
    assert math.prod(out) * math.prod(kernel) <= 2e6
    assert all(n > 0 for n in out[1:])
    if pool_extension(case, average) is None:
        pool = getattr(torch.nn.functional, f"{'avg' if average else 'max'}_pool{case.spatial_dims}d")
        last = (case.ceil_mode,) if average else (case.dilation, case.ceil_mode)
        assert tuple(pool(torch.zeros(case.x_shape), *how, *last).shape) == out


def test_the_table_covers_what_every_algorithm_must_face():
    kernels = {case.weight_shape[2:] for case in CONV_CASES}
    assert {(1, 1), (1, 7), (7, 1), (11, 11), (15, 15), (3, 3, 3)} <= kernels
    assert {case.padding_mode for case in CONV_CASES} == {
        "zeros",
        "reflect",
        "symmetric",
        "replicate",
        "circular",
    }
    words = {"valid", "same", "same_lower", "full"}
    for table in (CONV_CASES, POOL_CASES):
        assert words == {case.padding for case in table if isinstance(case.padding, str)}
        assert any(case.x_shape[0] == 0 for case in table)
    assert {case.ceil_mode for case in POOL_CASES} == {True, False}


@given(conv_cases(2))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_drawn_conv_cases_are_valid(case):
    assert case.spatial_dims == 2
    out = reference_conv(case).shape
    assert all(n > 0 for n in out[1:])


@given(pool_cases(3))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_drawn_pool_cases_are_valid(case):
    assert case.spatial_dims == 3
    how = (case.kernel_size, case.stride, case.padding, case.dilation, case.ceil_mode)
    assert all(n > 0 for n in reference.max_pool(np.zeros(case.x_shape), *how)[0].shape[1:])


def test_the_module_needs_no_hypothesis_to_import():
    script = "import sys, fastconv.testing; assert 'hypothesis' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
