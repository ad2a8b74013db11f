"""Pooling, unpooling and their gradients against the oracle; ties, NaN and infinity as PyTorch has them."""

import itertools
import math

import numpy as np
import pytest
import torch
from support import BFLOAT16, FIRST, LAST, LAYOUTS, STRANGE, VIEW, each, normal, op, plain, pool_arguments, rng

import fastconv
from fastconv import calls, reference
from fastconv.cpu import pool, simd
from fastconv.testing import POOL_CASES, assert_close

pytestmark = pytest.mark.usefixtures("poisoned")

every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)
every_dtype = pytest.mark.parametrize(
    "dtype", ["float32", "float64", "float16", BFLOAT16], ids=["float32", "float64", "float16", "bfloat16"]
)
HALF = ("float16", "bfloat16")
BY_NUMBERS = tuple(c for c in POOL_CASES if not isinstance(c.padding, str) and np.ndim(c.padding) < 2)


def window(case):
    return math.prod(each(case.kernel_size, case.spatial_dims))


def image(case, dtype, ties=True):
    """Values from a small set, so that windows hold ties."""
    if ties:
        return rng(case).integers(-3, 4, case.x_shape).astype(dtype)
    return normal(case, shape=case.x_shape, dtype=dtype)


# --- maximum ---------------------------------------------------------------------------------------------------


@every_layout
@every_dtype
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_maxima_their_indices_and_their_gradient(layout, dtype, ties):
    for case in POOL_CASES:
        dims, how = case.spatial_dims, {"data_format": layout.data_format}
        x = image(case, dtype, ties)
        expected, expected_where = reference.max_pool(x, **pool_arguments(case))
        given = layout.put(x)
        y, where = op("max_pool{}d", dims)(given, **pool_arguments(case), return_indices=True, **how)
        assert y.dtype == x.dtype, case
        assert where.dtype == np.int64, case
        assert np.array_equal(layout.back(y), expected), case
        assert np.array_equal(layout.back(where), expected_where), case
        assert layout.lies_right(y, given), case
        assert layout.lies_right(where, given), case
        alone = op("max_pool{}d", dims)(given, **pool_arguments(case), **how)
        assert np.array_equal(alone, y), case
        grad = normal(case, "g", shape=expected.shape, dtype=dtype)
        dx = op("max_pool{}d_backward", dims)(layout.put(grad), where, given.shape, **how)
        wanted = reference.max_pool_backward(grad, expected_where, x.shape)
        assert dx.dtype == x.dtype, case
        assert_close(layout.back(dx), wanted, reduction_length=window(case), err_msg=str(case))


@every_layout
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64"])
def test_maxima_of_integers(layout, dtype):
    info = np.iinfo(dtype)
    for case in POOL_CASES:
        x = rng(case).integers(info.min, info.max, case.x_shape, dtype, endpoint=True)
        x.flat[: x.size // 2] = info.min
        expected, expected_where = reference.max_pool(x, **pool_arguments(case))
        y, where = op("max_pool{}d", case.spatial_dims)(
            layout.put(x), **pool_arguments(case), return_indices=True, data_format=layout.data_format
        )
        assert y.dtype == x.dtype, case
        assert np.array_equal(layout.back(y), expected), case
        assert np.array_equal(layout.back(where), expected_where), case


@pytest.mark.parametrize("dtype", ["int16", "int32"])
def test_maxima_of_wider_integers(dtype):
    x = np.arange(-8, 8, dtype=dtype)[None, ::-1]
    y, where = fastconv.max_pool1d(x, 3, return_indices=True)
    assert y.dtype == dtype
    assert y.tolist() == [[7, 4, 1, -2, -5]]
    assert where.tolist() == [[0, 3, 6, 9, 12]]


SPECIALS = {
    "nan here and there": lambda x, r: np.where(r < 0.2, np.nan, x),
    "all nan": lambda x, r: np.full_like(x, np.nan),
    "-inf here and there": lambda x, r: np.where(r < 0.5, -np.inf, x),
    "all -inf": lambda x, r: np.full_like(x, -np.inf),
    "+inf here and there": lambda x, r: np.where(r < 0.3, np.inf, x),
    "all kinds": lambda x, r: np.select([r < 0.1, r < 0.2, r < 0.5], [np.nan, np.inf, -np.inf], x),
    "all equal": lambda x, r: np.ones_like(x),
    "zeros of both signs": lambda x, r: np.where(r < 0.5, 0.0, -0.0).astype(x.dtype),
}


def torch_pair(x, case, channels_last):
    tensor = torch.from_numpy(x)
    if channels_last and case.spatial_dims > 1:
        tensor = tensor.to(memory_format=torch.channels_last if case.spatial_dims == 2 else torch.channels_last_3d)
    function = getattr(torch.nn.functional, f"max_pool{case.spatial_dims}d")
    y, where = function(tensor, **pool_arguments(case), return_indices=True)
    return y.numpy(), where.numpy()


@every_layout
@pytest.mark.parametrize("special", SPECIALS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ties_nan_and_infinity_are_decided_as_pytorch_does(layout, special, dtype):
    for case in BY_NUMBERS:
        x = image(case, dtype)
        x = SPECIALS[special](x, rng(case, "r").random(x.shape)).astype(dtype)
        expected, expected_where = torch_pair(x, case, channels_last=False)
        y, where = op("max_pool{}d", case.spatial_dims)(
            layout.put(x), **pool_arguments(case), return_indices=True, data_format=layout.data_format
        )
        np.testing.assert_array_equal(layout.back(y), expected, err_msg=str(case))
        np.testing.assert_array_equal(layout.back(where), expected_where, err_msg=str(case))
        oracle, oracle_where = reference.max_pool(x, **pool_arguments(case))
        np.testing.assert_array_equal(oracle, expected, err_msg=str(case))
        np.testing.assert_array_equal(oracle_where, expected_where, err_msg=str(case))


@every_layout
@pytest.mark.parametrize("special", SPECIALS)
def test_adaptive_maxima_decide_as_pytorch_does(layout, special):
    for dims, size in itertools.product((1, 2, 3), (1, 2, 4)):
        x = rng(dims).integers(-3, 4, (2, 3, *(7, 6, 5)[:dims])).astype("float64")
        x = SPECIALS[special](x, rng(dims, "r").random(x.shape))
        function = getattr(torch.nn.functional, f"adaptive_max_pool{dims}d")
        expected, expected_where = function(torch.from_numpy(x), size, return_indices=True)
        y, where = op("adaptive_max_pool{}d", dims)(
            layout.put(x), size, return_indices=True, data_format=layout.data_format
        )
        np.testing.assert_array_equal(layout.back(y), expected.numpy())
        np.testing.assert_array_equal(layout.back(where), expected_where.numpy())


@every_layout
def test_a_window_wholly_in_padding_is_minus_infinity_and_takes_no_gradient(layout):
    x, how = np.ones((1, 2, 3, 3), "float32"), {"data_format": layout.data_format}
    y, where = fastconv.max_pool2d(layout.put(x), 2, 2, ((4, 2), (0, 5)), return_indices=True, **how)
    y, where = layout.back(y), layout.back(where)
    # Rows 0 and 1 of windows see only padding, and the columns from 2 on.
    inside = np.zeros((4, 4), bool)
    inside[2:, :2] = True
    assert np.array_equal(np.isfinite(y[0, 0]), inside)
    assert np.array_equal(where[0, 1] >= 0, inside)
    assert (y[..., ~inside] == -np.inf).all()
    assert (where[..., ~inside] == -1).all()
    grad = layout.put(np.ones(y.shape, "float32"))
    dx = fastconv.max_pool2d_backward(grad, layout.put(where), layout.put(x).shape, **how)
    assert dx.sum() == 2 * inside.sum()
    lowest = fastconv.max_pool2d(np.ones((1, 1, 3, 3), "int8"), 2, 2, ((4, 2), (0, 5)))
    assert (lowest[..., ~inside] == -128).all()


@every_layout
@pytest.mark.parametrize("bad", [-2, 20, 2**62, -(2**63)])
@pytest.mark.parametrize("channels", [1, 40])
def test_indices_outside_the_plane_are_refused(layout, bad, channels):
    how = {"data_format": layout.data_format}
    values, where = np.ones((2, channels, 2, 2)), np.zeros((2, channels, 2, 2), np.int64)
    where[1, -1, 1, 0] = bad
    values, where = layout.put(values), layout.put(where)
    shape = layout.shape((2, channels, 4, 5))
    message = rf"indices must lie in 0 to 19 for a plane of size \(4, 5\), not {bad}"
    with pytest.raises(fastconv.ArgumentError, match=message):
        fastconv.max_pool2d_backward(values, where, shape, **how)
    with pytest.raises(fastconv.ArgumentError, match=message):
        fastconv.max_unpool2d_backward(np.ones(shape), where, **how)
    with pytest.raises(fastconv.ArgumentError, match="indices must lie in 0 to"):
        fastconv.max_unpool2d(values, where, 2, output_size=(4, 5), stride=3, **how)


# --- average ---------------------------------------------------------------------------------------------------

COUNTS = ((True, None), (False, None), (True, 1), (False, 7), (True, -2))


@every_layout
@every_dtype
def test_averages_and_their_gradient(layout, dtype):
    for case, (counted, divisor) in itertools.product(POOL_CASES, COUNTS):
        dims, x = case.spatial_dims, image(case, dtype, ties=False)
        how = {**pool_arguments(case), "count_include_pad": counted, "divisor_override": divisor}
        expected = reference.avg_pool(x, **how)
        context = f"{case}, count_include_pad {counted}, divisor {divisor}"
        y = op("avg_pool{}d", dims)(layout.put(x), **how, data_format=layout.data_format)
        assert y.dtype == x.dtype, context
        assert_close(layout.back(y), expected, reduction_length=window(case), err_msg=context)
        grad = normal(case, "g", shape=expected.shape, dtype=dtype)
        wanted = reference.avg_pool_backward(grad, x.shape, **how)
        dx = op("avg_pool{}d_backward", dims)(
            layout.put(grad), layout.shape(x.shape), **how, data_format=layout.data_format
        )
        assert dx.dtype == x.dtype, context
        assert_close(layout.back(dx), wanted, reduction_length=4 * window(case), err_msg=context)


@every_layout
def test_averages_of_int64_are_truncated_towards_zero(layout):
    x = rng("int64").integers(-(2**40), 2**40, (2, 3, 7, 8))
    y = fastconv.avg_pool2d(layout.put(x), 3, 2, data_format=layout.data_format)
    assert y.dtype == np.int64
    assert np.array_equal(layout.back(y), torch.nn.functional.avg_pool2d(torch.from_numpy(x), 3, 2).numpy())


def test_the_average_of_a_large_window_keeps_the_precision_of_its_dtype():
    x = rng("large").random((1, 2, 700, 700)).astype("float32")
    y = fastconv.avg_pool2d(x, 700)
    np.testing.assert_allclose(y[0, :, 0, 0], x.mean(axis=(0, 2, 3), dtype="float64"), rtol=1e-7)


def test_the_average_of_a_deep_window_keeps_the_precision_of_its_dtype():
    x = rng("deep").random((1, 2, 4096, 2, 2)).astype("float32")
    y = fastconv.avg_pool3d(x, (4096, 2, 2))
    np.testing.assert_allclose(y[..., 0, 0, 0], x.mean(axis=(2, 3, 4), dtype="float64"), rtol=6e-8)


@every_layout
def test_a_window_without_elements_averages_to_zero(layout):
    x = np.ones((1, 2, 3, 3))
    for counted in (False, True):
        y = fastconv.avg_pool2d(
            layout.put(x), 2, 2, ((4, 2), (0, 5)), count_include_pad=counted, data_format=layout.data_format
        )
        assert (layout.back(y)[..., :2, :] == 0).all()


@every_layout
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_averages_hand_on_nan_and_infinity(layout, special):
    x = np.ones((1, 2, 4, 4), "float32")
    x[0, 1, 1, 1] = special
    y = layout.back(fastconv.avg_pool2d(layout.put(x), 2, data_format=layout.data_format))
    np.testing.assert_array_equal(y[0, 1], [[special, 1], [1, 1]])
    assert (y[0, 0] == 1).all()


# --- adaptive --------------------------------------------------------------------------------------------------

SIZES = (1, 2, 3, 5, 8, 12)


@every_layout
@every_dtype
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_adaptive_pools_and_their_gradients(layout, dtype, dims):
    check_adaptive_pools(layout, dtype, dims, (8, 7, 5)[:dims])


@every_layout
def test_adaptive_pools_of_one_element_per_row(layout):
    check_adaptive_pools(layout, "float32", 2, (3, 1))


def check_adaptive_pools(layout, dtype, dims, extents):
    x, how = normal("adaptive", dims, shape=(2, 3, *extents), dtype=dtype), {}
    how["data_format"] = layout.data_format
    mixed = [(None, 3, None)[:dims]] if dims > 1 else []
    for size in (*SIZES[: 4 if dims == 3 else None], *mixed):
        expected = reference.adaptive_avg_pool(x, size)
        y = op("adaptive_avg_pool{}d", dims)(layout.put(x), size, **how)
        assert y.dtype == x.dtype
        assert_close(layout.back(y), expected, reduction_length=280, err_msg=f"average to {size}")
        grad = normal(size, shape=expected.shape, dtype=dtype)
        wanted = reference.adaptive_avg_pool_backward(grad, x.shape)
        dx = op("adaptive_avg_pool{}d_backward", dims)(layout.put(grad), layout.shape(x.shape), **how)
        assert_close(layout.back(dx), wanted, reduction_length=280, err_msg=f"gradient of the average to {size}")
        expected, expected_where = reference.adaptive_max_pool(x, size)
        y, where = op("adaptive_max_pool{}d", dims)(layout.put(x), size, True, **how)
        assert np.array_equal(layout.back(y), expected)
        assert np.array_equal(layout.back(where), expected_where)
        assert np.array_equal(op("adaptive_max_pool{}d", dims)(layout.put(x), size, **how), y)
        dx = op("adaptive_max_pool{}d_backward", dims)(layout.put(grad), where, layout.shape(x.shape), **how)
        wanted = reference.adaptive_max_pool_backward(grad, expected_where, x.shape)
        assert_close(layout.back(dx), wanted, reduction_length=280, err_msg=f"gradient of the maximum to {size}")


# --- Lp --------------------------------------------------------------------------------------------------------


@every_layout
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("power", [1, 2, 3, 0.5, -1, math.inf])
def test_norms_and_their_gradient(layout, dtype, power):
    for case in POOL_CASES:
        dims = case.spatial_dims
        x = image(case, "float64", ties=False)
        # Away from zero, where the norm has a gradient.
        x = (x + 0.1 * np.sign(x)).astype(dtype)
        how = pool_arguments(case)
        y = op("lp_pool{}d", dims)(layout.put(x), power, **how, data_format=layout.data_format)
        assert y.dtype == x.dtype, case
        if math.isinf(power):
            # A window wholly in padding has the norm of nothing.
            expected = np.maximum(reference.max_pool(np.abs(x), **how)[0], 0)
            np.testing.assert_array_equal(layout.back(y), expected, err_msg=str(case))
            continue
        expected = reference.lp_pool(x, power, **how)
        slack = {"float64": 1e-12, "float32": 2e-5, "float16": 4e-3}[dtype]
        np.testing.assert_allclose(layout.back(y), expected, rtol=slack, err_msg=str(case))
        if dtype == "float16" or power < 1:
            continue
        grad = normal(case, "g", shape=expected.shape, dtype=dtype)
        wanted = reference.lp_pool_backward(grad, x, power, **how)
        dx = op("lp_pool{}d_backward", dims)(
            layout.put(grad), layout.put(x), power, **how, data_format=layout.data_format
        )
        scale = np.abs(wanted).max(initial=0)
        np.testing.assert_allclose(layout.back(dx), wanted, rtol=0, atol=slack * scale, err_msg=str(case))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("power", [1, 2, 3])
def test_the_gradient_of_a_norm_is_zero_where_the_norm_is(dtype, power):
    x = np.zeros((1, 1, 4), dtype)
    x[..., 2:] = 3, -4
    dx = fastconv.lp_pool1d_backward(np.ones((1, 1, 2), dtype), x, power, 2)
    assert (dx[..., :2] == 0).all()
    assert np.isfinite(dx).all()


# --- unpool ----------------------------------------------------------------------------------------------------


@every_layout
@every_dtype
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_unpooling_and_its_gradient(layout, dtype, dims):
    x, how = normal("unpool", dims, shape=(2, 3, *(9, 7, 6)[:dims]), dtype=dtype), {}
    how["data_format"] = layout.data_format
    for kernel, stride, padding in ((2, 2, 0), (3, 2, 1), (2, 3, 0), (3, 1, 0)):
        pooled, where = reference.max_pool(x, kernel, stride, padding)
        pooled = pooled.astype(dtype)
        size = x.shape[2:]
        default = tuple((n - 1) * stride - 2 * padding + kernel for n in pooled.shape[2:])
        y = op("max_unpool{}d", dims)(
            layout.put(pooled), layout.put(where), kernel, stride, padding,
            size if all(abs(a - b) < stride for a, b in zip(size, default)) else None, **how,
        )  # fmt: skip
        expected = reference.max_unpool(pooled, where, layout.back(y).shape[2:])
        assert y.dtype == x.dtype
        assert np.array_equal(layout.back(y), expected)
        grad = normal("g", shape=expected.shape, dtype=dtype)
        found = op("max_unpool{}d_backward", dims)(layout.put(grad), layout.put(where), **how)
        assert np.array_equal(layout.back(found), reference.max_unpool_backward(grad, where))


@every_layout
def test_of_equal_indices_the_last_in_scan_order_wins(layout):
    x = np.arange(1.0, 9.0).reshape(1, 2, 4)
    where = np.array([[[0, 1, 0, 1], [3, 3, 3, 3]]])
    last = {"channels_first": (x, where), "channels_last": (x.swapaxes(1, 2), where.swapaxes(1, 2))}[layout.data_format]
    y = fastconv.max_unpool1d(*last, 2, data_format=layout.data_format)
    assert layout.back(y)[0, :, :4].tolist() == [[3, 4, 0, 0], [0, 0, 0, 8]]


# --- arrays of every kind --------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", STRANGE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("layout", [FIRST, LAST], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_inputs_of_any_strides(change, layout, dtype):
    how, raw = {"data_format": layout.data_format}, layout.put(normal("x", shape=(2, 5, 6, 7), dtype=dtype))
    x = change(raw)
    straight = plain(x)
    before = x.tobytes()
    y, where = fastconv.max_pool2d(x, 3, 2, 1, return_indices=True, **how)
    expected, expected_where = reference.max_pool(straight, 3, 2, 1, **how)
    assert y.dtype == np.dtype(dtype)
    assert np.array_equal(y, expected)
    assert np.array_equal(where, expected_where)
    grad, places = change(layout.put(normal("g", shape=(2, 5, 3, 4), dtype=dtype))), change(expected_where)
    if change.__name__ != "broadcast":
        places = plain(places)
    straight_places = plain(places)
    tolerant = {"reduction_length": 12}
    dx = fastconv.max_pool2d_backward(grad, places, x.shape, **how)
    assert_close(dx, reference.max_pool_backward(plain(grad), straight_places, x.shape, **how), **tolerant)
    image = fastconv.max_unpool2d(grad, places, 3, 2, 1, (6, 7), **how)
    assert np.array_equal(image, reference.max_unpool(plain(grad), straight_places, (6, 7), **how))
    found = fastconv.max_unpool2d_backward(x, places, **how)
    assert np.array_equal(found, reference.max_unpool_backward(straight, straight_places, **how))
    averages = fastconv.avg_pool2d(x, 3, 2, 1, **how)
    assert_close(averages, reference.avg_pool(straight, 3, 2, 1, **how), **tolerant)
    dx = fastconv.avg_pool2d_backward(grad, x.shape, 3, 2, 1, **how)
    assert_close(dx, reference.avg_pool_backward(plain(grad), x.shape, 3, 2, 1, **how), **tolerant)
    assert_close(fastconv.adaptive_avg_pool2d(x, 4, **how), reference.adaptive_avg_pool(straight, 4, **how), **tolerant)
    assert np.array_equal(fastconv.adaptive_max_pool2d(x, 4, **how), reference.adaptive_max_pool(straight, 4, **how)[0])
    norms = fastconv.lp_pool2d(x, 2, 3, 2, **how)
    assert_close(norms, reference.lp_pool(straight, 2, 3, 2, **how), reduction_length=40)
    assert x.tobytes() == before


@pytest.mark.parametrize("change", [STRANGE[0], *STRANGE[3:]], ids=lambda f: f.__name__)
def test_indices_of_any_strides_and_byte_order(change):
    x = normal("x", shape=(2, 5, 6, 8))
    y, where = fastconv.max_pool2d(x, 2, return_indices=True)
    odd = change(where)
    assert np.array_equal(fastconv.max_unpool2d(y, odd, 2), fastconv.max_unpool2d(y, plain(odd), 2))
    found = fastconv.max_pool2d_backward(y, odd, x.shape)
    assert np.array_equal(found, fastconv.max_pool2d_backward(y, plain(odd), x.shape))


@pytest.mark.parametrize("layout", [FIRST, LAST], ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_an_image_without_a_batch_is_a_batch_of_one(layout, dims):
    how = {"data_format": layout.data_format}
    x = layout.put(normal("x", shape=(1, 3, *(6, 4, 8)[:dims])))
    y, where = op("max_pool{}d", dims)(x, 2, return_indices=True, **how)
    alone = op("max_pool{}d", dims)(x[0], 2, return_indices=True, **how)
    assert np.array_equal(alone[0], y[0])
    assert np.array_equal(alone[1], where[0])
    backward = op("max_pool{}d_backward", dims)
    assert np.array_equal(backward(y[0], where[0], x.shape[1:], **how), backward(y, where, x.shape, **how)[0])
    unpool = op("max_unpool{}d", dims)
    assert np.array_equal(unpool(y[0], where[0], 2, **how), unpool(y, where, 2, **how)[0])
    unpooled = op("max_unpool{}d_backward", dims)
    assert np.array_equal(unpooled(x[0], where[0], **how), unpooled(x, where, **how)[0])
    for name, arguments in (
        ("avg_pool{}d", (2,)),
        ("lp_pool{}d", (2, 2)),
        ("adaptive_avg_pool{}d", (2,)),
        ("adaptive_max_pool{}d", (2,)),
    ):
        assert np.array_equal(op(name, dims)(x[0], *arguments, **how), op(name, dims)(x, *arguments, **how)[0])
    averages = op("avg_pool{}d_backward", dims)
    assert np.array_equal(averages(y[0], x.shape[1:], 2, **how), averages(y, x.shape, 2, **how)[0])


@every_layout
@every_dtype
def test_an_empty_batch_pools_to_an_empty_batch(layout, dtype):
    x, how = layout.put(np.empty((0, 3, 6, 8), dtype)), {"data_format": layout.data_format}
    y, where = fastconv.max_pool2d(x, 2, return_indices=True, **how)
    assert layout.back(y).shape == layout.back(where).shape == (0, 3, 3, 4)
    assert fastconv.max_pool2d_backward(y, where, x.shape, **how).shape == x.shape
    assert fastconv.max_unpool2d(y, where, 2, **how).shape == x.shape
    assert fastconv.avg_pool2d(x, 2, **how).shape == y.shape
    assert fastconv.avg_pool2d_backward(y, x.shape, 2, **how).shape == x.shape
    assert fastconv.adaptive_avg_pool2d(x, (3, 4), **how).shape == y.shape
    assert fastconv.lp_pool2d(x, 2, 2, **how).shape == y.shape
    assert y.dtype == np.dtype(dtype)


def test_a_view_over_channels_last_memory_is_not_copied_apart():
    x = VIEW.put(normal("x", shape=(2, 8, 6, 6)))
    for y in (fastconv.max_pool2d(x, 2), fastconv.avg_pool2d(x, 2), fastconv.adaptive_avg_pool2d(x, 2)):
        assert VIEW.lies_right(y, x)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_share_the_channels_of_few_images(threads):
    x = rng("few images").integers(-4, 5, (1, 37, 41, 50)).astype("float32")
    with fastconv.options(threads=threads, poison=True):
        y, where = fastconv.max_pool2d(LAST.put(x), 3, 2, 1, return_indices=True, data_format=LAST.data_format)
        dx = fastconv.max_pool2d_backward(y, where, LAST.put(x).shape, data_format=LAST.data_format)
        back = fastconv.max_unpool2d(y, where, 3, 2, 1, output_size=(41, 50), data_format=LAST.data_format)
    expected = reference.max_pool_backward(LAST.back(y), LAST.back(where), x.shape)
    np.testing.assert_array_equal(LAST.back(dx), expected)
    np.testing.assert_array_equal(LAST.back(back), reference.max_unpool(LAST.back(y), LAST.back(where), (41, 50)))


@pytest.mark.parametrize("instructions", ["avx512", "avx2", "generic"])
@pytest.mark.parametrize("layout", [FIRST, LAST], ids=str)
def test_every_instruction_set_has_its_vectors(monkeypatch, instructions, layout):
    if instructions == "avx512" and simd.instruction_set() != "avx512":
        pytest.skip("vectors of 64 bytes are put together by an AVX-512 instruction")
    monkeypatch.setattr(simd, "instruction_set", lambda: instructions)

    def forget():
        calls.known.clear()
        for cached in (pool._element, pool._plan, pool._reduction, pool._packed_reduction, pool._packed_tables):
            cached.cache_clear()

    forget()
    for shape, sizes in (((2, 19, 8, 8), (2,)), ((3, 4, 26, 27), (3, 2, 1)), ((2, 3, 11, 40), (5, 3))):
        x = rng(shape).integers(-3, 4, shape).astype("float32")
        x[rng(shape, "nan").random(shape) < 0.02] = np.nan
        expected, expected_where = reference.max_pool(x, *sizes)
        y, where = fastconv.max_pool2d(layout.put(x), *sizes, return_indices=True, data_format=layout.data_format)
        np.testing.assert_array_equal(layout.back(y), expected)
        np.testing.assert_array_equal(layout.back(where), expected_where)
        averages = layout.back(fastconv.avg_pool2d(layout.put(x), *sizes, data_format=layout.data_format))
        np.testing.assert_allclose(averages, reference.avg_pool(x, *sizes), rtol=1e-6, atol=1e-6)
    forget()
