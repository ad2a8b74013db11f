"""Inner products: a gradient is the adjoint of what it is the gradient of, to the last bits of float64."""

import numpy as np
import pytest
from support import (
    ALGORITHMS,
    FIRST,
    FLOAT64,
    LAST,
    LAYOUTS,
    conv_problem,
    normal,
    op,
    per_group,
    pool_arguments,
    refusal,
    rng,
    stride_for,
)

import fastconv
from fastconv.testing import CONV_CASES, POOL_CASES, check_gradients

pytestmark = pytest.mark.usefixtures("poisoned")

every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)
DIRECTIONS = ("forward", "input_grad", "weight_grad")


def inner(a, b):
    """<a, b>, and the size that its rounding error is relative to."""
    return float((a * b).sum()), float(np.linalg.norm(a) * np.linalg.norm(b))


def assert_same(left, right, context, room=1e-12):
    scale = max(left[1], right[1])
    assert abs(left[0] - right[0]) <= room * scale, f"{context}: {left[0]!r} against {right[0]!r}"


@every_layout
@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "auto"])
def test_the_gradients_of_a_convolution_are_its_adjoints(algorithm, layout):
    for case in CONV_CASES:
        p, dims = conv_problem(case, "float64"), case.spatial_dims
        refused = algorithm != "auto" and any(refusal(algorithm, p.geometry(layout), d) for d in DIRECTIONS)
        if refused and not p.geometry().is_empty:
            continue
        how = {**p.how, "data_format": layout.data_format, "algorithm": "auto" if refused else algorithm}
        x, grad = layout.put(p.x), layout.put(p.grad)
        y = op("conv{}d", dims)(x, p.weight, **how)
        grads = op("conv{}d_backward", dims)(grad, x, p.weight, **how)
        of_output = inner(y, grad)
        assert_same(of_output, inner(x, grads.input), f"{case}, input")
        assert_same(of_output, inner(p.weight, grads.weight), f"{case}, weight")
        ones = np.ones((grad.shape[0], len(p.bias), *p.y.shape[2:]))
        assert_same(inner(p.bias, grads.bias), inner(ones * p.bias.reshape(-1, *[1] * dims), p.grad), f"{case}, bias")


@pytest.mark.parametrize("algorithm", FLOAT64)
@pytest.mark.parametrize("layout", [FIRST, LAST], ids=str)
def test_the_gradients_of_a_convolution_are_those_of_finite_differences(algorithm, layout):
    x, weight, bias = (
        normal("x", shape=(2, 4, 7, 6)),
        normal("w", shape=(8, per_group(algorithm, 2), 3, 2)),
        normal("b", shape=(8,)),
    )
    how = {"stride": stride_for(algorithm, (2, 1)), "padding": ((1, 0), (2, 1)), "padding_mode": "reflect"}
    how["groups"] = 4 // per_group(algorithm, 2)
    how |= {"algorithm": algorithm, "data_format": layout.data_format}
    x = layout.put(x)
    grad = normal("g", shape=fastconv.conv2d(x, weight, **how).shape)
    grads = fastconv.conv2d_backward(grad, x, weight, **how)
    check_gradients(lambda *a: fastconv.conv2d(*a, **how), (x, weight, bias), grads, grad)


def test_fold_is_the_adjoint_of_unfold():
    for case in CONV_CASES:
        if case.padding_mode != "zeros" or case.x_shape[0] == 0:
            continue
        kernel = tuple(case.weight_shape[2:])
        how = {"dilation": case.dilation, "padding": case.padding, "stride": case.stride}
        x = normal(case, shape=case.x_shape)
        cols = fastconv.unfold(x, kernel, **how)
        other = normal(case, "cols", shape=cols.shape)
        image = fastconv.fold(other, case.x_shape[2:], kernel, **how)
        assert_same(inner(cols, other), inner(x, image), case)


@every_layout
def test_the_gradients_of_pools_are_their_adjoints(layout):
    for case in POOL_CASES:
        dims, how = case.spatial_dims, {"data_format": layout.data_format}
        x = layout.put(normal(case, shape=case.x_shape))
        for counted, divisor in ((True, None), (False, None), (True, 3)):
            options = {**pool_arguments(case), "count_include_pad": counted, "divisor_override": divisor, **how}
            y = op("avg_pool{}d", dims)(x, **options)
            grad = rng(case, "g").standard_normal(y.shape)
            dx = op("avg_pool{}d_backward", dims)(grad, x.shape, **options)
            assert_same(inner(y, grad), inner(x, dx), f"{case}, average")
        y, where = op("max_pool{}d", dims)(x, **pool_arguments(case), return_indices=True, **how)
        dx = op("max_pool{}d_backward", dims)(grad, where, x.shape, **how)
        # As a linear map with the indices held fixed, a pool is a gather; windows wholly in padding take nothing.
        taken = np.where(where < 0, 0, y)
        assert_same(inner(taken, grad), inner(x, dx), f"{case}, maximum")


@every_layout
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_the_gradients_of_adaptive_pools_are_their_adjoints(layout, dims, size):
    x, how = layout.put(normal(dims, shape=(2, 3, *(7, 5, 6)[:dims]))), {"data_format": layout.data_format}
    y = op("adaptive_avg_pool{}d", dims)(x, size, **how)
    grad = normal(dims, size, shape=y.shape)
    assert_same(inner(y, grad), inner(x, op("adaptive_avg_pool{}d_backward", dims)(grad, x.shape, **how)), "average")
    y, where = op("adaptive_max_pool{}d", dims)(x, size, return_indices=True, **how)
    dx = op("adaptive_max_pool{}d_backward", dims)(grad, where, x.shape, **how)
    assert_same(inner(y, grad), inner(x, dx), "maximum")


@every_layout
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_gradient_of_unpooling_is_its_adjoint(layout, dims):
    how = {"data_format": layout.data_format}
    x = layout.put(normal("x", shape=(2, 3, *(8, 6, 4)[:dims])))
    pooled, where = op("max_pool{}d", dims)(x, 2, return_indices=True, **how)
    image = op("max_unpool{}d", dims)(pooled, where, 2, **how)
    assert image.shape == x.shape
    grad = normal("g", shape=image.shape)
    assert_same(inner(image, grad), inner(pooled, op("max_unpool{}d_backward", dims)(grad, where, **how)), "unpool")


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("power", [1, 2, 3, 2.5])
def test_the_gradient_of_lp_pooling_is_that_of_finite_differences(dims, power):
    x = normal("x", shape=(2, 3, *(7, 6, 5)[:dims]))
    x += np.sign(x) * 0.1
    how = {"kernel_size": 3, "stride": 2, "ceil_mode": True}
    grad = normal("g", shape=op("lp_pool{}d", dims)(x, power, **how).shape)
    dx = op("lp_pool{}d_backward", dims)(grad, x, power, **how)
    check_gradients(lambda x: op("lp_pool{}d", dims)(x, power, **how), [x], [dx], grad, eps=1e-6)
