"""Drawn geometries against the oracle, for every algorithm; examples are the same in every run."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ALGORITHMS, LAYOUTS, check_conv, conv_problem, normal, op, pool_arguments, rng

import fastconv
from fastconv import reference
from fastconv.testing import assert_close, conv_cases, pool_cases


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "auto"])
@given(conv_cases(), st.sampled_from(LAYOUTS), st.sampled_from(["float32", "float64"]))
@settings(max_examples=60)
def test_any_convolution_is_the_oracles(algorithm, case, layout, dtype):
    with fastconv.options(poison=True):
        check_conv(conv_problem.__wrapped__(case, dtype), layout, algorithm)


@given(pool_cases(), st.sampled_from(LAYOUTS), st.integers(0, 2**32 - 1))
@settings(max_examples=120)
def test_any_maximum_is_the_oracles(case, layout, seed):
    x = rng(seed).integers(-2, 3, case.x_shape).astype("float64")
    x[rng(seed, "nan").random(x.shape) < 0.1] = np.nan
    expected, expected_where = reference.max_pool(x, **pool_arguments(case))
    with fastconv.options(poison=True):
        y, where = op("max_pool{}d", case.spatial_dims)(
            layout.put(x), **pool_arguments(case), return_indices=True, data_format=layout.data_format
        )
        np.testing.assert_array_equal(layout.back(y), expected)
        np.testing.assert_array_equal(layout.back(where), expected_where)
        grad = normal(seed, shape=expected.shape)
        dx = op("max_pool{}d_backward", case.spatial_dims)(
            layout.put(grad), where, layout.shape(x.shape), data_format=layout.data_format
        )
    wanted = reference.max_pool_backward(grad, expected_where, x.shape)
    assert_close(layout.back(dx), wanted, reduction_length=64)


@given(pool_cases(), st.sampled_from(LAYOUTS), st.booleans(), st.sampled_from([None, 1, 3, -2]))
@settings(max_examples=120)
def test_any_average_is_the_oracles(case, layout, counted, divisor):
    x = normal(case, shape=case.x_shape)
    how = {**pool_arguments(case), "count_include_pad": counted, "divisor_override": divisor}
    expected = reference.avg_pool(x, **how)
    with fastconv.options(poison=True):
        y = op("avg_pool{}d", case.spatial_dims)(layout.put(x), **how, data_format=layout.data_format)
        assert_close(layout.back(y), expected, reduction_length=64)
        grad = normal(case, "g", shape=expected.shape)
        dx = op("avg_pool{}d_backward", case.spatial_dims)(
            layout.put(grad), layout.shape(x.shape), **how, data_format=layout.data_format
        )
    assert_close(layout.back(dx), reference.avg_pool_backward(grad, x.shape, **how), reduction_length=256)


@given(conv_cases())
@settings(max_examples=60)
def test_any_geometry_counts_what_the_oracle_computes(case):
    p = conv_problem.__wrapped__(case, "float64")
    geometry = p.geometry()
    assert geometry.output_shape == p.y.shape
    assert geometry.flops == 2 * p.y.size * int(np.prod(case.weight_shape[1:]))
    assert geometry.bytes == 8 * (p.x.size + p.weight.size + p.y.size)
    window = [d * (k - 1) + 1 for k, d in zip(geometry.kernel_size, geometry.dilation)]
    assert geometry.padded_size == tuple(n + b + a for n, (b, a) in zip(geometry.input_size, geometry.padding))
    assert geometry.output_size == tuple(
        (n - w) // s + 1 for n, w, s in zip(geometry.padded_size, window, geometry.stride)
    )
