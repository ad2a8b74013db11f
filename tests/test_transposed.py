"""Transposed convolution and its gradients against the oracle, and as the adjoint of convolution."""

import itertools
import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
from support import (
    ALGORITHMS,
    BFLOAT16,
    EXACT,
    FIRST,
    FLOAT64,
    LAST,
    LAYOUTS,
    PROMISES,
    STRANGE,
    VIEW,
    assert_refused,
    chosen,
    each,
    normal,
    op,
    per_group,
    plain,
    promise,
    refusal,
    stride_for,
    whole,
)

import fastconv
from fastconv import reference
from fastconv.testing import CONV_CASES, assert_close, check_gradients

pytestmark = pytest.mark.usefixtures("poisoned")

every_algorithm = pytest.mark.parametrize("algorithm", [*ALGORITHMS, "auto"])
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


@dataclass(frozen=True)
class Case:
    """One transposed convolution: x is (N, C, *spatial), the weight (C, K // groups, *kernel)."""

    name: str
    x_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    stride: Any = 1
    padding: Any = 0
    output_padding: Any = 0
    groups: int = 1
    dilation: Any = 1

    def __str__(self):
        return self.name

    @property
    def dims(self):
        return len(self.x_shape) - 2

    @property
    def how(self):
        return {
            "stride": self.stride,
            "padding": self.padding,
            "output_padding": self.output_padding,
            "groups": self.groups,
            "dilation": self.dilation,
        }


def undone(case):
    """The transposed convolution that leads from a convolution's output back to its input."""
    dims = case.spatial_dims
    stride, dilation = each(case.stride, dims), each(case.dilation, dims)
    sides = [each(side, 2) for side in each(case.padding, dims)]
    rooms = [
        n + before + after - d * (k - 1) - 1
        for n, (before, after), d, k in zip(case.x_shape[2:], sides, dilation, case.weight_shape[2:])
    ]
    out = tuple(room // s + 1 for room, s in zip(rooms, stride))
    rest = tuple(room % s for room, s in zip(rooms, stride))
    x_shape = (case.x_shape[0], case.weight_shape[0], *out)
    return Case(
        case.name, x_shape, case.weight_shape, case.stride, case.padding, rest, case.groups, case.dilation
    )  # fmt: skip


CASES = tuple(undone(c) for c in CONV_CASES if c.padding_mode == "zeros" and not isinstance(c.padding, str))
WORDS = tuple(
    Case(f"{word}, kernel {k}, stride {s}, dilation {d}, extra {e}", (2, 4, 7, 6), (4, 3, k, k), s, word, e, 1, d)
    for word, k, s, d in itertools.product(("valid", "full", "same", "same_lower"), (2, 3, 4), (1, 2, 3), (1, 2))
    for e in range(max(s, d))
    if word != "full" or 5 * s > d * (k - 1)
)


@dataclass(frozen=True)
class Problem:
    case: Case
    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    grad: np.ndarray
    y: np.ndarray
    grads: tuple
    lengths: dict = field(default_factory=dict)


@cache
def problem(case, dtype, make=normal):
    x = make(case, "x", shape=case.x_shape, dtype=dtype)
    weight = make(case, "weight", shape=case.weight_shape, dtype=dtype)
    bias = make(case, "bias", shape=(case.weight_shape[1] * case.groups,), dtype=dtype)
    y = reference.conv_transpose(x, weight, bias, **case.how)
    grad = make(case, "grad", shape=y.shape, dtype=dtype)
    grads = reference.conv_transpose_backward(grad, x, weight, **case.how)
    taps = math.prod(case.weight_shape[2:])
    lengths = {
        "forward": case.weight_shape[0] // case.groups * taps + 1,
        "input": case.weight_shape[1] * taps,
        "weight": case.x_shape[0] * math.prod(case.x_shape[2:]),
        "bias": y.shape[0] * math.prod(y.shape[2:]),
    }
    return Problem(case, x, weight, bias, grad, y, grads, lengths)


# The transposed convolution runs as the input gradient of a convolution, and its gradients as that one's others.
DIRECTION = {"forward": "input_grad", "input": "forward", "weight": "weight_grad"}


def check(p, layout, algorithm):
    case = p.case
    x, grad = layout.put(p.x), layout.put(p.grad)
    how = {**case.how, "data_format": layout.data_format}
    geometry = fastconv.ConvGeometry.transposed(x.shape, p.weight.shape, dtype=p.x.dtype, **how)
    how |= {"algorithm": algorithm, "precision": promise(algorithm)}
    backward = op("conv_transpose{}d_backward", case.dims)
    calls = {
        "forward": lambda: op("conv_transpose{}d", case.dims)(x, p.weight, p.bias, **how),
        "input": lambda: backward(grad, x, p.weight, needs=["input"], **how).input,
        "weight": lambda: backward(grad, x, p.weight, needs=["weight"], **how).weight,
        "bias": lambda: backward(grad, x, p.weight, needs=["bias"], **how).bias,
    }
    for (name, call), expected in zip(calls.items(), (p.y, *p.grads)):
        context = f"{case}, {layout}, {name}"
        if name in DIRECTION and algorithm != "auto":
            reason = refusal(algorithm, geometry, DIRECTION[name])
            if reason:
                if not geometry.is_empty:
                    assert_refused(call, reason, context)
                continue
        result = call()
        assert result.dtype == p.x.dtype, context
        if name in ("forward", "input"):
            assert layout.lies_right(result, x if name == "forward" else grad), f"{context}: {result.strides}"
            result = layout.back(result)
        assert_close(
            result,
            expected,
            algorithm=chosen(geometry, layout, DIRECTION.get(name)) if algorithm == "auto" else algorithm,
            reduction_length=p.lengths[name],
            err_msg=context,
        )


@every_algorithm
@every_layout
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_and_gradients_of_every_case(algorithm, layout, dtype):
    for case in CASES:
        check(problem(case, dtype), layout, algorithm)


@every_algorithm
@every_layout
@pytest.mark.parametrize("dtype", ["float16", BFLOAT16], ids=["float16", "bfloat16"])
def test_half_precision_is_summed_in_float32(algorithm, layout, dtype):
    for case in CASES[::7]:
        check(problem(case, dtype), layout, algorithm)


@every_algorithm
@pytest.mark.parametrize("layout", [FIRST, LAST], ids=str)
def test_padding_words_with_output_padding(algorithm, layout):
    for case in WORDS:
        check(problem(case, "float64"), layout, algorithm)


@every_layout
@pytest.mark.parametrize("algorithm", EXACT)
def test_whole_numbers_come_out_exact(algorithm, layout):
    for case in CASES:
        p = problem(case, "float32", whole)
        how = {**case.how, "data_format": layout.data_format}
        x = layout.put(p.x)
        geometry = fastconv.ConvGeometry.transposed(x.shape, p.weight.shape, **how)
        if any(refusal(algorithm, geometry, direction) for direction in DIRECTION.values()):
            continue
        how |= {"algorithm": algorithm, "precision": promise(algorithm)}
        y = op("conv_transpose{}d", case.dims)(x, p.weight, p.bias, **how)
        grads = op("conv_transpose{}d_backward", case.dims)(layout.put(p.grad), x, p.weight, **how)
        results = (layout.back(y), layout.back(grads.input), grads.weight, grads.bias)
        for name, result, expected in zip(("forward", *grads._fields), results, (p.y, *p.grads)):
            assert np.array_equal(result, expected), f"{case}, {name}"


@pytest.mark.parametrize("word", ["same", "same_lower"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
def test_same_gives_input_times_stride(word, stride, kernel):
    x, weight = normal("x", shape=(1, 2, 5, 4)), normal("w", shape=(2, 3, kernel, kernel))
    y = fastconv.conv_transpose2d(x, weight, stride=stride, padding=word)
    assert y.shape == (1, 3, 5 * stride, 4 * stride)


@every_layout
def test_output_size_stands_for_output_padding(layout):
    x, weight = layout.put(normal("x", shape=(2, 3, 4, 5))), normal("w", shape=(3, 4, 3, 2))
    how = {"stride": (3, 2), "padding": 1, "data_format": layout.data_format}
    grad = normal("g", shape=(2, 4, 10 + 2, 8 + 1))
    for extra in itertools.product((0, 1, 2), (0, 1)):
        size = (10 + extra[0], 8 + extra[1])
        y = fastconv.conv_transpose2d(x, weight, output_padding=extra, **how)
        assert layout.back(y).shape == (2, 4, *size)
        assert np.array_equal(fastconv.conv_transpose2d(x, weight, output_size=size, **how), y)
        assert np.array_equal(fastconv.conv_transpose2d(x, weight, output_size=list(size), **how), y)
        given = layout.put(grad[:, :, : size[0], : size[1]])
        by_padding = fastconv.conv_transpose2d_backward(given, x, weight, output_padding=extra, **how)
        by_size = fastconv.conv_transpose2d_backward(given, x, weight, output_size=size, **how)
        assert all(np.array_equal(a, b) for a, b in zip(by_padding, by_size))


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "sigmoid", "tanh"])
@every_layout
@every_algorithm
def test_bias_and_activation_are_applied_in_the_same_call(algorithm, layout, activation):
    stride = stride_for(algorithm, 2)
    p = problem(Case("epilogue", (2, 4, 5, 6), (4, per_group(algorithm, 3), 3, 3), stride, 1, stride - 1, 2), "float32")
    room = PROMISES[promise(algorithm)] * np.abs(p.y).max()
    expected = reference.conv_transpose(p.x, p.weight, p.bias, **p.case.how, activation=activation)
    y = fastconv.conv_transpose2d(
        layout.put(p.x), p.weight, p.bias, **p.case.how, data_format=layout.data_format, activation=activation,
        algorithm=algorithm, precision=promise(algorithm),
    )  # fmt: skip
    np.testing.assert_allclose(layout.back(y), expected, rtol=1e-6, atol=room)


@every_algorithm
@pytest.mark.parametrize("layout", [FIRST, LAST], ids=str)
@pytest.mark.parametrize("change", STRANGE, ids=lambda f: f.__name__)
def test_inputs_of_any_strides(algorithm, layout, change):
    stride = stride_for(algorithm, 2)
    p = problem(Case("strides", (2, 4, 5, 6), (4, per_group(algorithm, 3), 3, 3), stride, 1, stride - 1, 2), "float32")
    x, weight, bias, grad = (change(a) for a in (layout.put(p.x), p.weight, p.bias, layout.put(p.grad)))
    before = [a.tobytes() for a in (x, weight, bias, grad)]
    how = {**p.case.how, "data_format": layout.data_format}
    expected = reference.conv_transpose(plain(x), plain(weight), plain(bias), **how)
    wanted = reference.conv_transpose_backward(plain(grad), plain(x), plain(weight), **how)
    how |= {"algorithm": algorithm, "precision": promise(algorithm)}
    tolerant = {"algorithm": algorithm, "reduction_length": 120}
    assert_close(fastconv.conv_transpose2d(x, weight, bias, **how), expected, **tolerant)
    for found, right in zip(fastconv.conv_transpose2d_backward(grad, x, weight, **how), wanted):
        assert_close(found, right, **tolerant)
    assert [a.tobytes() for a in (x, weight, bias, grad)] == before


@every_algorithm
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_out_gets_the_result_whatever_it_looks_like(algorithm, dtype):
    c = per_group(algorithm, 2)
    p = problem(Case("out", (2, 4, 5, 6), (4, c, 3, 3), 1, 1, 0, 4 // c), dtype)
    how = {**p.case.how, "algorithm": algorithm, "precision": promise(algorithm)}
    for layout in (FIRST, VIEW):
        x = layout.put(p.x)
        strided = np.empty((2, 4, 10, 12), dtype)[:, :, ::-2, 1::2]
        for out in (np.empty(p.y.shape, dtype), VIEW.put(np.empty(p.y.shape, dtype)), strided, x):
            assert fastconv.conv_transpose2d(x, p.weight, p.bias, out=out, **how) is out
            assert_close(out, p.y, algorithm=algorithm, reduction_length=19)
            x = layout.put(p.x)


@pytest.mark.parametrize("layout", [FIRST, LAST], ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_an_image_without_a_batch_is_a_batch_of_one(layout, dims):
    p = problem(Case("unbatched", (1, 4, *(5, 4, 3)[:dims]), (4, 3, *(3,) * dims), 2, 1, 1, 2), "float64")
    how = {**p.case.how, "data_format": layout.data_format}
    x, grad = layout.put(p.x), layout.put(p.grad)
    alone = op("conv_transpose{}d", dims)(x[0], p.weight, p.bias, **how)
    assert np.array_equal(alone, op("conv_transpose{}d", dims)(x, p.weight, p.bias, **how)[0])
    alone = op("conv_transpose{}d_backward", dims)(grad[0], x[0], p.weight, **how)
    batch = op("conv_transpose{}d_backward", dims)(grad, x, p.weight, **how)
    assert np.array_equal(alone.input, batch.input[0])
    assert np.array_equal(alone.weight, batch.weight)
    assert np.array_equal(alone.bias, batch.bias)


@every_algorithm
@every_layout
def test_an_empty_batch_has_an_empty_result_and_zero_gradients(algorithm, layout):
    groups = 4 // per_group(algorithm, 4)
    x, weight = layout.put(np.empty((0, 4, 5, 6), "float32")), np.ones((4, 4 // groups, 3, 3), "float32")
    how = {"data_format": layout.data_format, "algorithm": algorithm, "precision": promise(algorithm), "groups": groups}
    y = fastconv.conv_transpose2d(x, weight, np.ones(4, "float32"), **how)
    assert layout.back(y).shape == (0, 4, 7, 8)
    grads = fastconv.conv_transpose2d_backward(y, x, weight, **how)
    assert grads.input.shape == x.shape
    assert np.array_equal(grads.weight, np.zeros_like(weight))
    assert np.array_equal(grads.bias, np.zeros(4))


@pytest.mark.parametrize("layout", [FIRST, LAST], ids=str)
def test_it_is_the_adjoint_of_convolution(layout):
    for case in CASES:
        p = problem(case, "float64")
        how = {name: value for name, value in case.how.items() if name != "output_padding"}
        grad = layout.put(p.grad)
        y = op("conv{}d", case.dims)(grad, p.weight, **how, data_format=layout.data_format)
        up = op("conv_transpose{}d", case.dims)(layout.put(p.x), p.weight, **case.how, data_format=layout.data_format)
        left, right = float((layout.back(y) * p.x).sum()), float((layout.back(up) * p.grad).sum())
        scale = np.linalg.norm(p.x) * np.linalg.norm(y)
        assert abs(left - right) <= 1e-12 * scale, case


@pytest.mark.parametrize("algorithm", FLOAT64)
def test_gradients_are_those_of_finite_differences(algorithm):
    p = problem(
        Case(
            "numerical",
            (2, 4, 5, 6),
            (4, per_group(algorithm, 3), 3, 2),
            stride_for(algorithm, (2, 3)),
            ((1, 0), (0, 1)),
            0,
            2,
        ),
        "float64",
    )
    how = {**p.case.how, "algorithm": algorithm}
    grads = fastconv.conv_transpose2d_backward(p.grad, p.x, p.weight, **how)
    check_gradients(
        lambda x, weight, bias: fastconv.conv_transpose2d(x, weight, bias, **how),
        (p.x, p.weight, p.bias),
        grads,
        p.grad,
    )
