"""Convolution and its gradients against the oracle: every algorithm, layout, dtype and kind of array."""

import itertools

import numpy as np
import pytest
from support import (
    ALGORITHMS,
    BFLOAT16,
    EXACT,
    FIRST,
    LAST,
    LAYOUTS,
    PROMISES,
    STRANGE,
    VIEW,
    assert_refused,
    check_conv,
    conv_problem,
    each,
    normal,
    op,
    per_group,
    plain,
    promise,
    refusal,
    rng,
    stride_for,
    whole,
    with_algorithms,
)

import fastconv
from fastconv import reference
from fastconv.geometry import PADDING_MODES, PADDING_WORDS
from fastconv.testing import CONV_CASES, ConvCase, assert_close, rms_error

pytestmark = pytest.mark.usefixtures("poisoned")

every_algorithm = pytest.mark.parametrize("algorithm", [*ALGORITHMS, "auto"])
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)
CASE = {case.name: case for case in CONV_CASES}


# --- the table -------------------------------------------------------------------------------------------------


@every_algorithm
@every_layout
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_and_gradients_of_every_case(algorithm, layout, dtype):
    for case in CONV_CASES:
        check_conv(conv_problem(case, dtype), layout, algorithm)


@every_algorithm
@every_layout
@pytest.mark.parametrize("dtype", ["float16", BFLOAT16], ids=["float16", "bfloat16"])
def test_half_precision_is_summed_in_float32(algorithm, layout, dtype):
    for case in CONV_CASES[::7]:
        check_conv(conv_problem(case, dtype), layout, algorithm)


@every_layout
@pytest.mark.parametrize("algorithm", EXACT)
def test_whole_numbers_come_out_exact(algorithm, layout):
    for case in CONV_CASES:
        p = conv_problem(case, "float32", whole)
        how = {**p.how, "data_format": layout.data_format, "algorithm": algorithm, "precision": promise(algorithm)}
        if any(refusal(algorithm, p.geometry(layout), d) for d in ("forward", "input_grad", "weight_grad")):
            continue
        x, dims = layout.put(p.x), case.spatial_dims
        y = op("conv{}d", dims)(x, p.weight, p.bias, **how)
        grads = op("conv{}d_backward", dims)(layout.put(p.grad), x, p.weight, **how)
        results = (layout.back(y), layout.back(grads.input), grads.weight, grads.bias)
        for name, result, expected in zip(("forward", *grads._fields), results, (p.y, *p.grads)):
            assert np.array_equal(result, expected), f"{case}, {name}"


# --- precision -------------------------------------------------------------------------------------------------

DEEP = (
    ConvCase("C=512, 3x3", (1, 512, 10, 10), (16, 512, 3, 3), padding=1),
    ConvCase("K=512, 3x3", (1, 16, 10, 10), (512, 16, 3, 3), padding=1),
    ConvCase("C=4096, 1x1", (2, 4096, 3, 3), (8, 4096, 1, 1)),
    ConvCase("100,000 pixels", (2, 3, 224, 224), (4, 3, 3, 3), padding=1),
    ConvCase("100,000 pixels, 1x1", (1, 5, 320, 320), (6, 5, 1, 1)),
    ConvCase("100,000 pixels in a row", (1, 2, 100_000), (3, 2, 3), padding=1),
)


def positive(*key, shape, dtype):
    return rng(*key).random(shape).astype(dtype)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("layout", [FIRST, LAST], ids=str)
@pytest.mark.parametrize("make", [normal, positive], ids=["normal", "positive"])
def test_deep_reductions_keep_the_precision_promised(algorithm, layout, make):
    level = promise(algorithm)
    for case in DEEP:
        p, dims = conv_problem(case, "float32", make), case.spatial_dims
        how = {**p.how, "data_format": layout.data_format, "algorithm": algorithm, "precision": level}
        x, grad = layout.put(p.x), layout.put(p.grad)
        errors = {}
        if not refusal(algorithm, p.geometry(layout), "forward"):
            y = op("conv{}d", dims)(x, p.weight, p.bias, **how)
            errors["forward"] = rms_error(layout.back(y), p.y)
        for name, direction, expected in (("input", "input_grad", p.grads[0]), ("weight", "weight_grad", p.grads[1])):
            if not refusal(algorithm, p.geometry(layout), direction):
                found = getattr(op("conv{}d_backward", dims)(grad, x, p.weight, needs=[name], **how), name)
                errors[direction] = rms_error(layout.back(found) if name == "input" else found, expected)
        broken = {direction: error for direction, error in errors.items() if not error <= PROMISES[level]}
        assert not broken, f"{case}: {level!r} promises {PROMISES[level]}, got {broken}"


@pytest.mark.parametrize("layout", [FIRST, LAST], ids=str)
def test_the_bias_gradient_of_many_pixels_keeps_the_promise(layout):
    grad = positive("bias", shape=(2, 3, 400, 400), dtype="float32")
    x, weight = np.zeros((2, 1, 400, 400), "float32"), np.zeros((3, 1, 1, 1), "float32")
    found = fastconv.conv2d_backward(
        layout.put(grad), layout.put(x), weight, data_format=layout.data_format, needs=["bias"]
    )
    assert rms_error(found.bias, grad.sum(axis=(0, 2, 3), dtype="float64")) <= 1e-6


# --- bias and activation ---------------------------------------------------------------------------------------


@every_algorithm
@every_layout
@pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "sigmoid", "tanh"])
def test_bias_and_activation_are_applied_in_the_same_call(algorithm, layout, with_bias, activation):
    c = per_group(algorithm, 2)
    case = ConvCase("epilogue", (2, 4, 9, 8), (8, c, 3, 3), padding=1, groups=4 // c)
    p = conv_problem(case, "float32")
    bias = p.bias if with_bias else None
    expected = reference.conv(p.x, p.weight, bias, **p.how, activation=activation)
    y = fastconv.conv2d(
        layout.put(p.x),
        p.weight,
        bias,
        **p.how,
        data_format=layout.data_format,
        activation=activation,
        algorithm=algorithm,
        precision=promise(algorithm),
    )
    # A slope below 1 adds no error; the error of the sum is relative to the sum, not to what sigmoid leaves of it.
    sums = reference.conv(p.x, p.weight, bias, **p.how)
    room = PROMISES[promise(algorithm)] * np.abs(sums).max()
    np.testing.assert_allclose(layout.back(y), expected, rtol=1e-6, atol=room)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "sigmoid", "tanh"])
def test_activations_at_the_ends_of_the_scale(activation, dtype):
    x = np.array([[-np.inf, -1e30, -200.0, -0.0, 0.0, 200.0, 1e30, np.inf, np.nan]], dtype)
    with np.errstate(all="ignore"):
        expected = {
            "relu": np.maximum(x, 0),
            "leaky_relu": np.where(x < 0, x * x.dtype.type(0.01), x),
            "sigmoid": 1 / (1 + np.exp(-x.astype("float64"))),
            "tanh": np.tanh(x.astype("float64")),
        }[activation]
    y = fastconv.conv1d(x, np.ones((1, 1, 1), dtype), activation=activation, algorithm="direct")
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-30)


# --- NaN and infinity ------------------------------------------------------------------------------------------


@every_layout
@pytest.mark.parametrize("algorithm", EXACT)
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_appear_where_the_definition_puts_them(algorithm, layout, special):
    c = per_group(algorithm, 2)
    case = ConvCase("special", (1, 2, 7, 8), (4, c, 3, 3), padding=1, groups=2 // c)
    p = conv_problem(case, "float32")
    x = p.x.copy()
    x[0, 1, 2, 3] = special
    y = fastconv.conv2d(
        layout.put(x), p.weight, **p.how, data_format=layout.data_format, algorithm=algorithm,
        precision=promise(algorithm),
    )  # fmt: skip
    expected = reference.conv(x, p.weight, **p.how)
    assert_close(layout.back(y), expected, algorithm=algorithm, reduction_length=18)


@pytest.mark.parametrize("algorithm", EXACT)
def test_padding_meets_an_infinite_weight_without_making_nan(algorithm):
    x, weight = np.ones((1, 1, 4, 4), "float32"), np.full((1, 1, 3, 3), np.inf, "float32")
    y = fastconv.conv2d(x, weight, padding=1, algorithm=algorithm, precision=promise(algorithm))
    if algorithm == "direct":
        assert (y == np.inf).all()
    # A matrix product multiplies the padding too: 0 * inf.
    assert (y[..., 1:-1, 1:-1] == np.inf).all()


# --- 8-bit integers --------------------------------------------------------------------------------------------

INTEGER_CASES = tuple(
    CASE[name]
    for name in (
        "3x3", "1d same stride 3", "groups 3 of 5 channels", "depthwise 5x5 stride 2", "3x3 dilation 3 stride 2",
        "long reduction, C=512", "circular", "same_lower, stride 2", "3d groups 2", "empty batch",
    )
)  # fmt: skip
SIGNS = tuple(itertools.product(("int8", "uint8"), repeat=2))


def extremes(*key, shape, dtype):
    info = np.iinfo(dtype)
    return rng(*key).choice([info.min, info.max], shape).astype(dtype)


def any_integer(*key, shape, dtype):
    info = np.iinfo(dtype)
    return rng(*key).integers(info.min, info.max, shape, endpoint=True).astype(dtype)


@every_layout
@pytest.mark.parametrize(("x_dtype", "weight_dtype"), SIGNS, ids=["-".join(s) for s in SIGNS])
@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "auto"])
def test_eight_bit_integers_give_exact_32_bit_sums(algorithm, layout, x_dtype, weight_dtype):
    for case, make in itertools.product(INTEGER_CASES, (extremes, any_integer)):
        x = make(case, "x", shape=case.x_shape, dtype=x_dtype)
        weight = make(case, "weight", shape=case.weight_shape, dtype=weight_dtype)
        bias = rng(case).integers(-(2**20), 2**20, case.weight_shape[0], dtype="int32")
        how = {
            "stride": case.stride, "padding": case.padding, "dilation": case.dilation, "groups": case.groups,
            "padding_mode": case.padding_mode,
        }  # fmt: skip

        def call(x=x, weight=weight, how=how, dims=case.spatial_dims, bias=bias):
            return op("conv{}d", dims)(
                layout.put(x), weight, bias, **how, data_format=layout.data_format, activation="relu",
                algorithm=algorithm,
            )  # fmt: skip

        geometry = fastconv.ConvGeometry.create(case.x_shape, case.weight_shape, dtype=x_dtype, **how)
        reason = "" if algorithm == "auto" else refusal(algorithm, geometry, "forward")
        if reason:
            assert_refused(call, reason, str(case))
            continue
        y = call()
        assert y.dtype == np.int32
        expected = reference.conv(x, weight, bias, **how, activation="relu")
        assert np.array_equal(layout.back(y), expected), case


@pytest.mark.parametrize(("x", "weight"), [(-128, -128), (255, 255), (255, -128), (-128, 255), (127, -128)])
def test_the_largest_products_do_not_overflow_on_the_way(x, weight):
    kind = {-128: "int8", 127: "int8", 255: "uint8"}
    images = np.full((1, 600, 3, 3), x, kind[x])
    filters = np.full((2, 600, 3, 3), weight, kind[weight])
    assert (fastconv.conv2d(images, filters) == x * weight * 5400).all()


# --- padding ---------------------------------------------------------------------------------------------------

PADDINGS = (*PADDING_WORDS, 1, 3, "pairs")


@every_algorithm
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("mode", PADDING_MODES)
def test_every_padding_mode_with_every_form_of_padding(algorithm, dims, mode):
    extents, kernel = (7, 6, 5)[:dims], (3, 4, 2)[:dims]
    for padding, stride, layout in itertools.product(PADDINGS, (1, 2), (FIRST, LAST)):
        sides = ((0, 3), (2, 1), (1, 0))[:dims] if padding == "pairs" else padding
        case = ConvCase(
            f"{padding}, stride {stride}", (2, 2, *extents), (3, 2, *kernel), stride, sides, padding_mode=mode
        )
        check_conv(conv_problem(case, "float64"), layout, algorithm)


@pytest.mark.parametrize("algorithm", EXACT)
@every_layout
def test_taps_that_meet_nothing_but_padding(algorithm, layout):
    c = per_group(algorithm, 4)
    case = ConvCase("padding", (2, 4, 1, 1), (4, c, 1, 1), 3, 1, groups=4 // c)
    check_conv(conv_problem(case, "float32"), layout, algorithm)


# --- arrays of every kind --------------------------------------------------------------------------------------


@every_algorithm
@pytest.mark.parametrize("change", STRANGE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_inputs_of_any_strides(algorithm, change, data_format, dtype):
    c = per_group(algorithm, 2)
    case = ConvCase("strides", (2, 4, 6, 7), (8, c, 3, 3), padding=1, groups=4 // c)
    layout = {"channels_first": FIRST, "channels_last": LAST}[data_format]
    p = conv_problem(case, dtype)
    x, weight, bias, grad = (change(a) for a in (layout.put(p.x), p.weight, p.bias, layout.put(p.grad)))
    before = [a.tobytes() for a in (x, weight, bias, grad)]
    how = {**p.how, "data_format": data_format}
    y = fastconv.conv2d(x, weight, bias, **how, algorithm=algorithm, precision=promise(algorithm))
    grads = fastconv.conv2d_backward(grad, x, weight, **how, algorithm=algorithm, precision=promise(algorithm))
    expected = reference.conv(plain(x), plain(weight), plain(bias), **how)
    expected_grads = reference.conv_backward(plain(grad), plain(x), plain(weight), **how)
    tolerant = {"algorithm": algorithm, "reduction_length": 100}
    assert y.dtype == np.dtype(dtype)
    assert_close(y, expected, **tolerant)
    for name, found, wanted in zip(grads._fields, grads, expected_grads):
        assert_close(found, wanted, **tolerant, err_msg=name)
    assert [a.tobytes() for a in (x, weight, bias, grad)] == before


def channels_last_view(shape, dtype):
    return np.moveaxis(np.empty((shape[0], *shape[2:], shape[1]), dtype), -1, 1)


def every_other(shape, dtype):
    return np.empty([2 * n for n in shape], dtype)[(slice(None, None, 2),) * len(shape)]


def backwards(shape, dtype):
    return np.empty(shape, dtype)[(slice(None, None, -1),) * len(shape)]


def one_byte_off(shape, dtype):
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.empty(nbytes + 1, np.uint8)[1:].view(dtype).reshape(shape)


@every_algorithm
@pytest.mark.parametrize("layout", [FIRST, VIEW], ids=str)
@pytest.mark.parametrize("make", [np.empty, channels_last_view, every_other, backwards, one_byte_off])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_out_of_any_strides_gets_the_result(algorithm, layout, make, dtype):
    c = per_group(algorithm, 2)
    case = ConvCase("out", (2, 4, 6, 7), (8, c, 3, 3), padding=1, groups=4 // c)
    p = conv_problem(case, dtype)
    out = make(p.y.shape, p.dtype)
    out[...] = np.nan
    given = fastconv.conv2d(
        layout.put(p.x), p.weight, p.bias, **p.how, out=out, activation="relu", algorithm=algorithm,
        precision=promise(algorithm),
    )  # fmt: skip
    assert given is out
    assert_close(out, np.maximum(p.y, 0), algorithm=algorithm, reduction_length=19)


@every_algorithm
@every_layout
def test_out_may_overlap_the_input(algorithm, layout):
    c = per_group(algorithm, 4)
    case = ConvCase("in place", (2, 4, 6, 7), (4, c, 3, 3), padding=1, groups=4 // c)
    p = conv_problem(case, "float32")
    shared = layout.put(p.x)
    how = {**p.how, "data_format": layout.data_format, "algorithm": algorithm, "precision": promise(algorithm)}
    fastconv.conv2d(shared, p.weight, p.bias, out=shared, **how)
    assert_close(layout.back(shared), p.y, algorithm=algorithm, reduction_length=37)
    # One row further in the same memory.
    memory = np.empty((3, *layout.put(p.x).shape[1:]), "float32")
    memory[:2] = np.ascontiguousarray(layout.put(p.x))
    fastconv.conv2d(memory[:2], p.weight, p.bias, out=memory[1:], **how)
    assert_close(layout.back(memory[1:]), p.y, algorithm=algorithm, reduction_length=37)


def test_out_may_overlap_the_weight_and_the_bias():
    x, shared = normal("x", shape=(1, 1, 5, 5)), normal("w", shape=(1, 1, 5, 5))
    expected = reference.conv(x, shared, padding=2)
    assert_close(fastconv.conv2d(x, shared, padding=2, out=shared), expected, reduction_length=25)
    x, weight, bias = normal("x", shape=(1, 1, 3)), normal("w", shape=(3, 1, 3)), normal("b", shape=(3,))
    expected = reference.conv(x, weight, bias)
    fastconv.conv1d(x, weight, bias, out=bias.reshape(1, 3, 1))
    assert_close(bias.reshape(1, 3, 1), expected, reduction_length=4)


@every_layout
def test_out_of_an_integer_convolution(layout):
    x, weight = whole("x", shape=(2, 3, 5, 6), dtype="int8"), whole("w", shape=(4, 3, 3, 3), dtype="int8")
    out = layout.put(np.empty((2, 4, 3, 4), "int32"))
    assert fastconv.conv2d(layout.put(x), weight, data_format=layout.data_format, out=out) is out
    assert np.array_equal(layout.back(out), reference.conv(x, weight))


# --- no batch, nothing at all ----------------------------------------------------------------------------------


@every_algorithm
@pytest.mark.parametrize("layout", [FIRST, LAST], ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_an_image_without_a_batch_is_a_batch_of_one(algorithm, layout, dims):
    c = per_group(algorithm, 2)
    case = ConvCase("unbatched", (1, 4, *(6, 5, 4)[:dims]), (8, c, *(3,) * dims), padding=1, groups=4 // c)
    p = conv_problem(case, "float64")
    how = {**p.how, "data_format": layout.data_format, "algorithm": algorithm}
    if algorithm != "auto" and (reason := refusal(algorithm, p.geometry(layout), "forward")):
        assert_refused(lambda: op("conv{}d", dims)(layout.put(p.x)[0], p.weight, **how), reason, "unbatched")
        return
    x, grad = layout.put(p.x), layout.put(p.grad)
    assert np.array_equal(
        op("conv{}d", dims)(x[0], p.weight, p.bias, **how), op("conv{}d", dims)(x, p.weight, p.bias, **how)[0]
    )
    alone = op("conv{}d_backward", dims)(grad[0], x[0], p.weight, **how)
    batch = op("conv{}d_backward", dims)(grad, x, p.weight, **how)
    assert np.array_equal(alone.input, batch.input[0])
    assert np.array_equal(alone.weight, batch.weight)
    assert np.array_equal(alone.bias, batch.bias)
    out = np.full_like(layout.put(p.y)[0], np.nan)
    assert op("conv{}d", dims)(x[0], p.weight, p.bias, **how, out=out) is out
    assert np.array_equal(out, op("conv{}d", dims)(x, p.weight, p.bias, **how)[0])


@with_algorithms("float32", "float64", "float16", BFLOAT16)
@every_layout
@pytest.mark.parametrize("mode", PADDING_MODES)
def test_an_empty_batch_has_an_empty_result_and_zero_gradients(algorithm, layout, dtype, mode):
    c = per_group(algorithm, 2)
    x, weight = np.empty((0, 4, 6, 7), dtype), np.ones((8, c, 3, 3), dtype)
    how = {
        "groups": 4 // c,
        "padding": 1,
        "padding_mode": mode,
        "data_format": layout.data_format,
        "algorithm": algorithm,
    }
    how["precision"] = promise(algorithm)
    y = fastconv.conv2d(layout.put(x), weight, np.ones(8, dtype), **how)
    assert layout.back(y).shape == (0, 8, 6, 7)
    grads = fastconv.conv2d_backward(y, layout.put(x), weight, **how)
    assert layout.back(grads.input).shape == x.shape
    assert np.array_equal(grads.weight, np.zeros_like(weight))
    assert np.array_equal(grads.bias, np.zeros(8, dtype))
    assert {g.dtype for g in (y, *grads)} == {np.dtype(dtype)}


@pytest.mark.parametrize("layout", [FIRST, LAST], ids=str)
def test_without_channels_the_output_has_none_either(layout):
    x, weight = np.empty((2, 0, 5, 5), "float32"), np.empty((4, 0, 3, 3), "float32")
    y = fastconv.conv2d(layout.put(x), weight, data_format=layout.data_format)
    assert layout.back(y).shape == (2, 0, 3, 3)
    grads = fastconv.conv2d_backward(y, layout.put(x), weight, data_format=layout.data_format)
    assert layout.back(grads.input).shape == x.shape
    assert grads.weight.shape == weight.shape
    assert np.array_equal(grads.bias, np.zeros(4))


# --- what is computed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("needs", [n for r in range(4) for n in itertools.combinations(("input", "weight", "bias"), r)])
def test_only_the_gradients_asked_for_are_returned(needs):
    p = conv_problem(CASE["3x3 stride 2"], "float32")
    grads = fastconv.conv2d_backward(p.grad, p.x, p.weight, **p.how, needs=needs)
    assert {name for name, found in zip(grads._fields, grads) if found is not None} == set(needs)


@every_layout
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_result_lies_in_memory_as_the_input_does(layout, dtype):
    x, weight = normal("x", shape=(2, 3, 6, 7), dtype=dtype), normal("w", shape=(5, 3, 3, 3), dtype=dtype)
    x = layout.put(x)
    y = fastconv.conv2d(x, weight, data_format=layout.data_format)
    assert layout.lies_right(y, x)
    grads = fastconv.conv2d_backward(y, x, weight, data_format=layout.data_format)
    assert layout.lies_right(grads.input, x)
    assert grads.weight.flags.c_contiguous


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_large_strides_and_dilations_that_are_never_used(algorithm):
    c = per_group(algorithm, 2)
    x, weight = whole("x", shape=(1, c, 3, 4)), whole("w", shape=(3, c, 3, 4))
    expected = reference.conv(x, weight)
    stride = stride_for(algorithm, 2**40)
    y = fastconv.conv2d(x, weight, stride=stride, algorithm=algorithm, precision=promise(algorithm))
    assert_close(y, expected, algorithm=algorithm, reduction_length=24)
    x, weight = whole("x", shape=(1, c, 3, 4)), whole("w", shape=(3, c, 1, 1))
    how = {"dilation": 2**40, "algorithm": algorithm, "precision": promise(algorithm)}
    if reason := refusal(algorithm, fastconv.ConvGeometry.create(x.shape, weight.shape, dilation=2**40), "forward"):
        assert_refused(lambda: fastconv.conv2d(x, weight, **how), reason, "dilation never used")
        return
    y = fastconv.conv2d(x, weight, **how)
    assert_close(y, reference.conv(x, weight), algorithm=algorithm, reduction_length=24)


def test_sizes_may_be_given_as_lists_tuples_or_numbers():
    p = conv_problem(CASE["3x5, all per dimension"], "float64")
    expected = fastconv.conv2d(p.x, p.weight, **p.how)
    for kind in (list, tuple):
        how = {name: kind(each(p.how[name], 2)) for name in ("stride", "padding", "dilation")}
        assert np.array_equal(fastconv.conv2d(p.x, p.weight, **how), expected)
