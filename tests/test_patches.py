"""unfold and fold against the oracle and PyTorch."""

import numpy as np
import pytest
import torch
from support import BFLOAT16, STRANGE, each, normal, plain, rng

import fastconv
from fastconv import reference
from fastconv.testing import CONV_CASES, assert_close

pytestmark = pytest.mark.usefixtures("poisoned")

CASES = tuple(case for case in CONV_CASES if case.padding_mode == "zeros")
every_dtype = pytest.mark.parametrize(
    "dtype", ["float32", "float64", "float16", BFLOAT16], ids=["float32", "float64", "float16", "bfloat16"]
)


def arguments(case):
    return {"dilation": case.dilation, "padding": case.padding, "stride": case.stride}


@every_dtype
def test_unfold_lays_out_every_case(dtype):
    for case in CASES:
        x, kernel = normal(case, shape=case.x_shape, dtype=dtype), tuple(case.weight_shape[2:])
        cols = fastconv.unfold(x, kernel, **arguments(case))
        expected = reference.unfold(x, kernel, **arguments(case))
        assert cols.dtype == x.dtype, case
        assert np.array_equal(cols, expected), case


@every_dtype
def test_fold_adds_up_every_case(dtype):
    for case in CASES:
        if case.x_shape[0] == 0:
            continue
        kernel, extents = tuple(case.weight_shape[2:]), case.x_shape[2:]
        shape = reference.unfold(np.zeros(case.x_shape), kernel, **arguments(case)).shape
        cols = normal(case, "cols", shape=shape, dtype=dtype)
        image = fastconv.fold(cols, extents, kernel, **arguments(case))
        assert image.dtype == cols.dtype, case
        expected = reference.fold(cols, extents, kernel, **arguments(case))
        assert_close(image, expected, reduction_length=int(np.prod(kernel)), err_msg=str(case))


def test_the_order_of_rows_and_columns_is_pytorchs():
    for case in CASES:
        numbers = not isinstance(case.padding, str) and np.ndim(case.padding) < 2
        if case.spatial_dims != 2 or not numbers or case.x_shape[0] == 0:
            continue
        x, kernel = normal(case, shape=case.x_shape), each(case.weight_shape[2:], 2)
        cols = torch.nn.functional.unfold(torch.from_numpy(x), kernel, **arguments(case))
        assert np.array_equal(fastconv.unfold(x, kernel, **arguments(case)), cols.numpy()), case
        image = torch.nn.functional.fold(cols, case.x_shape[2:], kernel, **arguments(case))
        assert_close(fastconv.fold(cols.numpy(), case.x_shape[2:], kernel, **arguments(case)), image.numpy())


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_sequence_tells_the_number_of_dimensions(dims):
    x = normal("x", shape=(2, 3, *(6, 5, 4)[:dims]))
    cols = fastconv.unfold(x, (2,) * dims)
    assert cols.shape == (2, 3 * 2**dims, np.prod([n - 1 for n in x.shape[2:]]))
    assert fastconv.fold(cols, list(x.shape[2:]), [2] * dims).shape == x.shape
    assert np.array_equal(fastconv.unfold(x, [2] * dims), cols)


def test_an_image_without_a_batch_is_a_batch_of_one():
    x = normal("x", shape=(1, 3, 6, 5))
    cols = fastconv.unfold(x, 3, padding=1)
    assert np.array_equal(fastconv.unfold(x[0], 3, padding=1), cols[0])
    image = fastconv.fold(cols, (6, 5), 3, padding=1)
    assert np.array_equal(fastconv.fold(cols[0], (6, 5), 3, padding=1), image[0])


def test_the_columns_times_the_weight_are_the_convolution():
    x, weight = rng("x").integers(-4, 5, (2, 3, 7, 8)) * 1.0, rng("w").integers(-4, 5, (5, 3, 3, 2)) * 1.0
    cols = fastconv.unfold(x, (3, 2), 2, 1, (1, 2))
    y = fastconv.conv2d(x, weight, padding=1, dilation=2, stride=(1, 2))
    assert np.array_equal((weight.reshape(5, -1) @ cols).reshape(y.shape), y)


@pytest.mark.parametrize("change", STRANGE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_inputs_of_any_strides(change, dtype):
    x = change(normal("x", shape=(2, 3, 6, 7), dtype=dtype))
    cols = change(normal("cols", shape=(2, 27, 42), dtype=dtype))
    before = x.tobytes(), cols.tobytes()
    assert np.array_equal(fastconv.unfold(x, 3, padding=1), reference.unfold(plain(x), 3, padding=1))
    folded = fastconv.fold(cols, (6, 7), 3, padding=1)
    assert_close(folded, reference.fold(plain(cols), (6, 7), 3, padding=1), reduction_length=9)
    assert (x.tobytes(), cols.tobytes()) == before


def test_an_empty_batch_has_no_columns():
    assert fastconv.unfold(np.empty((0, 3, 6, 7)), 3).shape == (0, 27, 20)
    assert fastconv.fold(np.empty((0, 27, 20)), (6, 7), 3).shape == (0, 3, 6, 7)
