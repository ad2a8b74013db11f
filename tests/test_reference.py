"""The oracle against PyTorch in float64, and against cases worked by hand."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from fastconv import reference
from fastconv.testing import CONV_CASES, POOL_CASES, conv_cases, pool_cases

NATIVE_POOLS = [
    case
    for case in POOL_CASES
    if not isinstance(case.padding, str) and not (case.padding and np.ndim(case.padding) == 2)
]


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def tensor(x):
    return torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True)


def close(actual, expected):
    expected = expected.detach().numpy() if isinstance(expected, torch.Tensor) else expected
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-11, strict=True)


def each(value, dims):
    return (value,) * dims if np.ndim(value) == 0 else tuple(value)


def explicit_padding(padding, extents, kernel, stride, dilation):
    """(before, after) per dimension, one dimension after another."""
    pairs = []
    for axis, (n, k, s, d) in enumerate(zip(extents, kernel, stride, dilation)):
        window = d * (k - 1) + 1
        if padding in ("same", "same_lower"):
            total = max((math.ceil(n / s) - 1) * s + window - n, 0)
            small, large = total // 2, math.ceil(total / 2)
            pairs.append((small, large) if padding == "same" else (large, small))
        elif isinstance(padding, str):
            pairs.append({"valid": (0, 0), "full": (window - 1, window - 1)}[padding])
        else:
            pair = each(padding, len(extents))[axis]
            pairs.append(each(pair, 2))
    return pairs


def source(i, n, mode):
    """Which element of n stands at position i, inside the image or beyond it."""
    if mode == "circular":
        return i % n
    if mode == "replicate":
        return min(max(i, 0), n - 1)
    period = 2 * n if mode == "symmetric" else max(2 * n - 2, 1)
    i %= period
    return i if i < n else period - i - (mode == "symmetric")


def torch_pad(x, pairs, mode="zeros", value=0.0):
    if mode == "zeros":
        return F.pad(x, [p for pair in reversed(pairs) for p in pair], value=value)
    for axis, (before, after) in enumerate(pairs, start=2):
        n = x.shape[axis]
        x = x.index_select(axis, torch.tensor([source(i, n, mode) for i in range(-before, n + after)]))
    return x


def torch_conv(x, weight, bias, case):
    dims = case.spatial_dims
    stride, dilation = each(case.stride, dims), each(case.dilation, dims)
    pairs = explicit_padding(case.padding, case.x_shape[2:], case.weight_shape[2:], stride, dilation)
    padded = torch_pad(x, pairs, case.padding_mode)
    return getattr(F, f"conv{dims}d")(padded, weight, bias, stride, 0, dilation, case.groups)


def check_conv(case):
    x, weight, bias = normal(case.x_shape, 1), normal(case.weight_shape, 2), normal(case.weight_shape[0], 3)
    how = (case.stride, case.padding, case.dilation, case.groups)
    y = reference.conv(x, weight, bias, *how, padding_mode=case.padding_mode)
    inputs = tensor(x), tensor(weight), tensor(bias)
    expected = torch_conv(*inputs, case)
    close(y, expected)
    g = normal(y.shape, 4)
    grads = reference.conv_backward(g, x, weight, *how, padding_mode=case.padding_mode)
    for actual, wanted in zip(grads, torch.autograd.grad(expected, inputs, tensor(g))):
        close(actual, wanted)


@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_conv_and_its_gradients_match_pytorch(case):
    check_conv(case)


@given(conv_cases())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_drawn_convs_and_their_gradients_match_pytorch(case):
    check_conv(case)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kernel", [(3, 3), (4, 2), (1, 5)])
@pytest.mark.parametrize("padding", ["same", "valid", 1, (2, 0)])
def test_padding_means_what_it_means_to_pytorch(kernel, padding):
    x, weight = normal((2, 3, 9, 10)), normal((4, 3, *kernel))
    expected = F.conv2d(tensor(x), tensor(weight), padding=padding, dilation=2)
    close(reference.conv(x, weight, padding=padding, dilation=2), expected)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes_mean_what_they_mean_to_pytorch(mode):
    x, weight = normal((2, 3, 6, 7)), normal((4, 3, 3, 3))
    padded = F.pad(tensor(x), (2, 3, 1, 4), mode=mode)
    close(
        reference.conv(x, weight, padding=((1, 4), (2, 3)), padding_mode=mode),
        F.conv2d(padded, tensor(weight)),
    )


TRANSPOSED = [
    # C, K, kernel, stride, padding, output_padding, groups, dilation
    (3, 4, (3,), 1, 0, 0, 1, 1),
    (4, 6, (4,), (3,), (1,), (2,), 2, 1),
    (3, 5, (3, 3), 2, 1, 1, 1, 1),
    (6, 9, (2, 3), (2, 3), (0, 1), (1, 2), 3, (2, 1)),
    (4, 4, (5, 5), 1, 2, 0, 4, 1),
    (3, 4, (2, 2), 3, 0, 0, 1, 1),
    (2, 3, (3, 3), 2, 2, 2, 1, 3),
    (3, 4, (2, 3, 3), 2, (0, 1, 1), 1, 1, 1),
    (4, 6, (3, 1, 2), (1, 2, 2), (1, 0, 0), 0, 2, (1, 1, 2)),
]


@pytest.mark.parametrize(("C", "K", "kernel", "stride", "padding", "extra", "groups", "dilation"), TRANSPOSED)
def test_conv_transpose_and_its_gradients_match_pytorch(C, K, kernel, stride, padding, extra, groups, dilation):
    dims = len(kernel)
    x, weight, bias = normal((2, C, 5, 6, 4)[: dims + 2]), normal((C, K // groups, *kernel), 1), normal(K, 2)
    how = (stride, padding, extra, groups, dilation)
    y = reference.conv_transpose(x, weight, bias, *how)
    inputs = tensor(x), tensor(weight), tensor(bias)
    expected = getattr(F, f"conv_transpose{dims}d")(*inputs, *how)
    close(y, expected)
    g = normal(y.shape, 3)
    grads = reference.conv_transpose_backward(g, x, weight, *how)
    for actual, wanted in zip(grads, torch.autograd.grad(expected, inputs, tensor(g))):
        close(actual, wanted)
    for unbatched, batched in zip(reference.conv_transpose_backward(g[0], x[0], weight, *how), grads):
        assert unbatched.shape == (batched.shape[1:] if batched.shape == x.shape else batched.shape)


@pytest.mark.parametrize("padding", ["same", "same_lower", "valid", ((0, 2), (1, 1))])
@pytest.mark.parametrize("kernel", [(4, 3), (5, 6)])
def test_conv_transpose_is_the_input_gradient_of_conv(padding, kernel):
    x, weight = normal((2, 4, 5, 7)), normal((4, 3, *kernel), 1)
    y = reference.conv_transpose(x, weight, stride=3, padding=padding)
    image = normal(y.shape, 2)
    through = reference.conv(image, weight, stride=3, padding=padding)
    assert through.shape == x.shape
    np.testing.assert_allclose((through * x).sum(), (image * y).sum(), rtol=1e-12)
    close(reference.conv_backward(x, image, weight, stride=3, padding=padding)[0], y)


@pytest.mark.parametrize("padding", ["same", "same_lower"])
def test_same_transposed_convolution_enlarges_by_the_stride(padding):
    for kernel in (1, 2, 3, 4, 7):
        y = reference.conv_transpose(np.ones((1, 2, 5)), np.ones((2, 3, kernel)), stride=3, padding=padding)
        assert y.shape == (1, 3, 15)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_conv_moves_axes_for_channels_last_and_takes_single_images(dims):
    x, weight = normal((2, 4, 7, 6, 5)[: dims + 2]), normal((6, 2, 3, 2, 3)[: dims + 2], 1)
    how = {"stride": 2, "padding": 1, "groups": 2}
    y = reference.conv(x, weight, **how)
    g = normal(y.shape, 2)
    last = {"data_format": "channels_last", **how}
    x_last, g_last = np.moveaxis(x, 1, -1), np.moveaxis(g, 1, -1)
    close(reference.conv(x_last, weight, **last), np.moveaxis(y, 1, -1))
    close(reference.conv(x[1], weight, **how), y[1])
    close(reference.conv(x_last[1], weight, **last), np.moveaxis(y, 1, -1)[1])
    wanted = reference.conv_backward(g, x, weight, **how)
    actual = reference.conv_backward(g_last, x_last, weight, **last)
    close(actual[0], np.moveaxis(wanted[0], 1, -1))
    close(actual[1], wanted[1])
    close(actual[2], wanted[2])


def test_conv_of_a_sequence_by_hand():
    y = reference.conv([[[1, 2, 3, 4, 5]]], [[[1, 0, -1]]])
    assert y.tolist() == [[[-2, -2, -2]]]


def test_vertical_edges_by_hand():
    image = np.repeat([[10, 10, 10, 0, 0, 0]], 6, axis=0)
    y = reference.conv(image[np.newaxis], np.array([[1, 0, -1]] * 3)[np.newaxis, np.newaxis])
    assert y.tolist() == [[[0, 30, 30, 0]] * 4]


def test_integers_are_exact():
    x = np.full((1, 3000, 1, 1), -128, np.int8)
    assert reference.conv(x, x)[0, 0, 0, 0] == 3000 * 128**2
    assert reference.conv(np.full((1, 3, 1), 255, np.uint8), np.full((1, 3, 1), -1, np.int8))[0, 0, 0] == -765


def test_bfloat16_is_widened():
    x = np.array([[[1.0, 3.0]]], ml_dtypes.bfloat16)
    assert reference.conv(x, x).tolist() == [[[10.0]]]
    assert reference.max_pool(x, 2)[0].dtype == np.float64


@pytest.mark.parametrize(
    ("name", "function"),
    [("relu", F.relu), ("leaky_relu", F.leaky_relu), ("sigmoid", torch.sigmoid), ("tanh", torch.tanh)],
)
def test_activations_are_pytorchs(name, function):
    x, weight = normal((1, 3, 6, 6)) * 300, normal((2, 3, 3, 3))
    close(reference.conv(x, weight, activation=name), function(F.conv2d(tensor(x), tensor(weight))))


def with_index_map(x, case, value):
    """Pad `x` for `case` with `value`; also the flat input index at each flat padded position, -1 outside."""
    dims = case.spatial_dims
    kernel = each(case.kernel_size, dims)
    stride = kernel if case.stride is None else each(case.stride, dims)
    dilation = each(case.dilation, dims)
    pairs = explicit_padding(case.padding, case.x_shape[2:], kernel, stride, dilation)
    extents = case.x_shape[2:]
    origin = torch.arange(math.prod(extents)).reshape(1, 1, *extents)
    origin = torch_pad(origin, pairs, value=-1).flatten().numpy()
    return torch_pad(x, pairs, value=value), origin, (kernel, stride, dilation)


def pooled_like(actual, expected):
    """PyTorch's result on an image padded by hand, less the windows that `ceil_mode` would have dropped."""
    return expected[(slice(None), slice(None), *(slice(p) for p in actual.shape[2:]))]


def check_max_pool(case):
    dims = case.spatial_dims
    x = normal(case.x_shape)
    how = (case.kernel_size, case.stride, case.padding, case.dilation, case.ceil_mode)
    values, indices = reference.max_pool(x, *how)
    padded, origin, (kernel, stride, dilation) = with_index_map(tensor(x), case, -math.inf)
    pool = getattr(F, f"max_pool{dims}d")
    expected, where = pool(padded, kernel, stride, 0, dilation, case.ceil_mode, return_indices=True)
    expected, where = pooled_like(values, expected), pooled_like(indices, where)
    close(values, expected)
    outside = np.isneginf(values)
    assert np.array_equal(indices, np.where(outside, -1, origin[where.numpy()]))
    g = np.where(outside, 0.0, normal(values.shape, 1))
    (wanted,) = torch.autograd.grad(expected, padded, tensor(g))
    wanted = wanted.flatten(2)[..., torch.tensor(origin >= 0)].reshape(x.shape)
    close(reference.max_pool_backward(g, indices, x.shape), wanted)


def summed(x, kernel, stride, dilation, out):
    """Sum over each window of a padded image, as a convolution with ones; windows may go beyond the end."""
    C, dims = x.shape[1], len(kernel)
    ends = [(p - 1) * s + d * (k - 1) + 1 for p, k, s, d in zip(out, kernel, stride, dilation)]
    x = torch_pad(x, [(0, max(end - n, 0)) for end, n in zip(ends, x.shape[2:])])
    ones = torch.ones((C, 1, *kernel), dtype=torch.float64)
    sums = getattr(F, f"conv{dims}d")(x, ones, None, stride, 0, dilation, C)
    return sums[(slice(None), slice(None), *(slice(p) for p in out))]


def check_avg_pool(case, count_include_pad, divisor):
    x = normal(case.x_shape)
    how = (case.kernel_size, case.stride, case.padding, case.ceil_mode, count_include_pad, divisor)
    y = reference.avg_pool(x, *how, dilation=case.dilation)
    assert y.shape == reference.max_pool(x, *how[:3], case.dilation, case.ceil_mode)[0].shape
    leaf = tensor(x)
    padded, origin, sizes = with_index_map(leaf, case, 0.0)
    margin = torch.ones((1, padded.shape[1], *padded.shape[2:]), dtype=torch.float64)
    inside = margin * torch.tensor(origin >= 0, dtype=torch.float64).reshape(padded.shape[2:])
    sums, inner = summed(padded, *sizes, y.shape[2:]), summed(inside, *sizes, y.shape[2:])
    counted = summed(margin, *sizes, y.shape[2:]) if count_include_pad else inner
    expected = torch.where(inner > 0, sums / (counted if divisor is None else divisor), 0.0)
    close(y, expected)
    g = normal(y.shape, 1)
    (wanted,) = torch.autograd.grad((sums / (counted.clamp(min=1) if divisor is None else divisor)), leaf, tensor(g))
    close(reference.avg_pool_backward(g, x.shape, *how, dilation=case.dilation), wanted)


@pytest.mark.parametrize("case", POOL_CASES, ids=str)
def test_max_pool_indices_and_gradient_match_pytorch(case):
    check_max_pool(case)


@pytest.mark.parametrize("divisor", [None, 3])
@pytest.mark.parametrize("count_include_pad", [True, False])
@pytest.mark.parametrize("case", POOL_CASES, ids=str)
def test_avg_pool_and_its_gradient_match_sums_over_windows(case, count_include_pad, divisor):
    check_avg_pool(case, count_include_pad, divisor)


@given(pool_cases())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_drawn_pools_match_pytorch(case):
    check_max_pool(case)
    check_avg_pool(case, True, None)
    check_avg_pool(case, False, None)


@pytest.mark.parametrize("case", NATIVE_POOLS, ids=str)
def test_pools_mean_what_they_mean_to_pytorch(case):
    dims, x = case.spatial_dims, normal(case.x_shape)
    leaf = tensor(x)
    how = (case.kernel_size, case.stride, case.padding)
    values, indices = reference.max_pool(x, *how, case.dilation, case.ceil_mode)
    expected, where = getattr(F, f"max_pool{dims}d")(leaf, *how, case.dilation, case.ceil_mode, return_indices=True)
    close(values, expected)
    assert np.array_equal(indices, where.numpy())
    if case.dilation != 1:
        return
    for count_include_pad in (True, False):
        average = getattr(F, f"avg_pool{dims}d")(leaf, *how, case.ceil_mode, count_include_pad)
        close(reference.avg_pool(x, *how, case.ceil_mode, count_include_pad), average)
        g = normal(average.shape, 1)
        grad = reference.avg_pool_backward(g, x.shape, *how, case.ceil_mode, count_include_pad)
        close(grad, torch.autograd.grad(average, leaf, tensor(g))[0])


@pytest.mark.parametrize("p", [1, 2, 3.5])
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_lp_pool_and_its_gradient_match_pytorch(dims, ceil_mode, p):
    x = np.abs(normal((2, 3, 8, 9, 7)[: dims + 2]))
    leaf = tensor(x)
    expected = getattr(F, f"lp_pool{dims}d")(leaf, p, 3, 2, ceil_mode)
    close(reference.lp_pool(x, p, 3, 2, ceil_mode), expected)
    close(reference.lp_pool(-x, p, 3, 2, ceil_mode), expected)
    g = normal(expected.shape, 1)
    (wanted,) = torch.autograd.grad(expected, leaf, tensor(g))
    close(reference.lp_pool_backward(g, x, p, 3, 2, ceil_mode), wanted)
    close(reference.lp_pool_backward(g, -x, p, 3, 2, ceil_mode), -wanted)


def test_lp_pool_has_no_gradient_at_zero():
    zeros = np.zeros((1, 1, 4))
    assert not reference.lp_pool_backward(np.ones((1, 1, 2)), zeros, 2, 2).any()


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((2, 3, 13), 5),
        ((2, 3, 4), (7,)),
        ((2, 3, 11, 10), 4),
        ((1, 2, 7, 9), (3, None)),
        ((2, 3, 3, 2), (5, 4)),
        ((1, 2, 5, 6, 7), (2, 3, 1)),
    ],
)
def test_adaptive_pools_and_their_gradients_match_pytorch(shape, size):
    dims, x = len(shape) - 2, normal(shape)
    leaf = tensor(x)
    average = getattr(F, f"adaptive_avg_pool{dims}d")(leaf, size)
    largest, where = getattr(F, f"adaptive_max_pool{dims}d")(leaf, size, return_indices=True)
    close(reference.adaptive_avg_pool(x, size), average)
    values, indices = reference.adaptive_max_pool(x, size)
    close(values, largest)
    assert np.array_equal(indices, where.numpy())
    g = normal(average.shape, 1)
    close(reference.adaptive_avg_pool_backward(g, shape), torch.autograd.grad(average, leaf, tensor(g))[0])
    wanted = torch.autograd.grad(largest, leaf, tensor(g))[0]
    close(reference.adaptive_max_pool_backward(g, indices, shape), wanted)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_unpooling_matches_pytorch(dims):
    x = normal((2, 3, 6, 8, 4)[: dims + 2])
    values, indices = reference.max_pool(x, 2)
    leaf = tensor(values)
    expected = getattr(F, f"max_unpool{dims}d")(leaf, torch.tensor(indices), 2)
    close(reference.max_unpool(values, indices, x.shape[2:]), expected)
    g = normal(x.shape, 1)
    wanted = torch.autograd.grad(expected, leaf, tensor(g))[0]
    close(reference.max_unpool_backward(g, indices), wanted)


@pytest.mark.parametrize(
    ("kernel", "dilation", "padding", "stride"),
    [(3, 1, 0, 1), ((2, 3), (2, 1), (1, 2), (2, 3)), (4, 1, 2, 3)],
)
def test_unfold_and_fold_match_pytorch(kernel, dilation, padding, stride):
    x = normal((2, 3, 9, 10))
    cols = reference.unfold(x, kernel, dilation, padding, stride)
    close(cols, F.unfold(tensor(x), kernel, dilation, padding, stride))
    other = normal(cols.shape, 1)
    image = reference.fold(other, (9, 10), kernel, dilation, padding, stride)
    close(image, F.fold(tensor(other), (9, 10), kernel, dilation, padding, stride))
    close(reference.unfold(x[0], kernel, dilation, padding, stride), cols[0])
    close(reference.fold(other[0], (9, 10), kernel, dilation, padding, stride), image[0])


def test_unfold_times_weights_is_conv_in_three_dimensions():
    x, weight = normal((2, 3, 5, 6, 4)), normal((7, 3, 2, 3, 2), 1)
    cols = reference.unfold(x, (2, 3, 2), padding=1, stride=2)
    y = reference.conv(x, weight, stride=2, padding=1)
    close((weight.reshape(7, -1) @ cols).reshape(y.shape), y)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_pools_move_axes_for_channels_last_and_take_single_images(dims):
    x = normal((2, 4, 7, 6, 5)[: dims + 2])
    x_last = np.moveaxis(x, 1, -1)
    last, one = {"data_format": "channels_last"}, {"spatial_dims": dims}
    for pool in (lambda x, **how: reference.max_pool(x, 3, 2, 1, **how)[0],
                 lambda x, **how: reference.max_pool(x, 3, 2, 1, **how)[1],
                 lambda x, **how: reference.avg_pool(x, 3, 2, 1, **how),
                 lambda x, **how: reference.lp_pool(x, 2, 3, 2, **how),
                 lambda x, **how: reference.adaptive_avg_pool(x, 3, **how),
                 lambda x, **how: reference.adaptive_max_pool(x, 3, **how)[1]):  # fmt: skip
        y = pool(x)
        close(pool(x_last, **last), np.moveaxis(y, 1, -1))
        close(pool(x[1], **one), y[1])
        close(pool(x_last[1], **last, **one), np.moveaxis(y, 1, -1)[1])


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_pool_gradients_move_axes_for_channels_last_and_take_single_images(dims):
    x = normal((2, 4, 7, 6, 5)[: dims + 2])
    values, indices = reference.max_pool(x, 3, 2, 1)
    grad, last = normal(values.shape, 1), {"data_format": "channels_last"}
    moved, where = np.moveaxis(grad, 1, -1), np.moveaxis(indices, 1, -1)
    shape = np.moveaxis(x, 1, -1).shape
    for wanted, actual in (
        (
            reference.max_pool_backward(grad, indices, x.shape),
            reference.max_pool_backward(moved, where, shape, **last),
        ),
        (
            reference.avg_pool_backward(grad, x.shape, 3, 2, 1),
            reference.avg_pool_backward(moved, shape, 3, 2, 1, **last),
        ),
        (
            reference.adaptive_avg_pool_backward(grad, x.shape),
            reference.adaptive_avg_pool_backward(moved, shape, **last),
        ),
        (
            reference.max_unpool(values, indices, x.shape[2:]),
            reference.max_unpool(np.moveaxis(values, 1, -1), where, x.shape[2:], **last),
        ),
        (
            reference.max_unpool_backward(x, indices),
            reference.max_unpool_backward(np.moveaxis(x, 1, -1), where, **last),
        ),
    ):
        close(actual, np.moveaxis(wanted, 1, -1))
    single = reference.max_pool_backward(grad[1], indices[1], x.shape[1:], spatial_dims=dims)
    close(single, reference.max_pool_backward(grad, indices, x.shape)[1])


def test_pools_by_hand():
    image = np.arange(36.0).reshape(1, 1, 6, 6)
    values, indices = reference.max_pool(image, 3)
    assert values.tolist() == [[[[14, 17], [32, 35]]]]
    assert indices.tolist() == [[[[14, 17], [32, 35]]]]
    assert reference.avg_pool(image, 3).tolist() == [[[[7, 10], [25, 28]]]]
    assert reference.max_pool_backward(np.ones((1, 1, 2, 2)), indices, image.shape).sum() == 4
    assert reference.avg_pool([[[2, 4, 6]]], 2, 2, ((1, 0),)).tolist() == [[[1, 5]]]
    assert reference.avg_pool([[[2, 4, 6]]], 2, 2, ((1, 0),), False, False).tolist() == [[[2, 5]]]


def test_ceil_mode_drops_a_window_that_starts_beyond_the_image_and_its_margin():
    ones = np.ones((1, 1, 5))
    assert reference.max_pool(ones, 2, 3, 1, 1, True)[0].shape == (1, 1, 2)
    assert reference.max_pool(np.ones((1, 1, 6)), 2, 3, 0, 1, True)[0].shape == (1, 1, 2)
    assert reference.max_pool(np.ones((1, 1, 7)), 2, 3, 0, 1, True)[0].shape == (1, 1, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_last_nan_wins_in_pytorch_too(dims, channels_last, dtype):
    rng = np.random.default_rng(dims)
    x = rng.integers(-4, 4, (2, 17, 9, 8, 7)[: dims + 2]).astype(np.float64)
    x[rng.random(x.shape) < 0.2] = np.nan
    x[rng.random(x.shape) < 0.2] = -np.inf
    x[rng.random(x.shape) < 0.05] = np.inf
    leaf = torch.tensor(x, dtype=dtype)
    if channels_last and dims > 1:
        leaf = leaf.contiguous(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)
    for name, here, there in (("max_pool", (3, 2, 1, 2), (3, 2, 1, 2)), ("adaptive_max_pool", (3,), (3,))):
        values, indices = getattr(reference, name)(x, *here)
        expected, where = getattr(F, f"{name}{dims}d")(leaf, *there, return_indices=True)
        assert np.array_equal(values, expected.double().numpy(), equal_nan=True)
        assert np.array_equal(indices, where.numpy())


def test_ties_go_to_the_first_and_nan_to_the_last():
    assert reference.max_pool([[[1.0, 5.0, 5.0, 2.0]]], 4)[1].tolist() == [[[1]]]
    assert reference.max_pool([[[np.nan, np.inf, np.nan, 2.0]]], 4)[1].tolist() == [[[2]]]


def test_windows_that_see_nothing():
    values, indices = reference.max_pool(np.full((1, 1, 4), -np.inf), 2, 2, ((2, 2),))
    assert np.isneginf(values).all()
    assert indices.tolist() == [[[-1, 0, 2, -1]]]
    assert reference.avg_pool(np.ones((1, 1, 4)), 2, 2, ((2, 2),), False, False).tolist() == [[[0, 1, 1, 0]]]
    values, indices = reference.max_pool(np.full((1, 1, 2), -128, np.int8), 2, 2, ((2, 0),))
    assert values.dtype == np.int8
    assert values.tolist() == [[[-128, -128]]]
    assert indices.tolist() == [[[-1, 0]]]


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64"])
def test_integers_are_pooled_as_they_are(dtype):
    limits = np.iinfo(dtype)
    x = np.array([[[limits.min, limits.min, limits.max - 1, limits.max]]], dtype)
    values, indices = reference.max_pool(x, 2, 2)
    expected, where = F.max_pool1d(torch.tensor(x), 2, 2, return_indices=True)
    assert values.dtype == x.dtype
    assert values.tolist() == expected.tolist()
    assert indices.tolist() == where.tolist()


def test_nan_and_infinity_pass_through_without_warnings():
    x = np.array([[[np.inf, 1.0, np.nan]]])
    assert np.isposinf(reference.conv(x, [[[1.0, 0.5]]])[0, 0, 0])
    assert np.isnan(reference.conv(x, [[[0.0, 1.0]]])).all()
    assert np.isnan(reference.avg_pool(np.array([[[np.inf, -np.inf]]]), 2)).all()
