"""Random geometries against PyTorch in float64, values and gradients; and PyTorch tensors as arguments."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import op, per_group, promise, rng, stride_for, with_algorithms

import fastconv
from fastconv.testing import assert_close

pytestmark = pytest.mark.usefixtures("poisoned")

every_dimension = pytest.mark.parametrize("dims", [1, 2, 3])
seeds = pytest.mark.parametrize("seed", range(25))


def leaf(x):
    return torch.tensor(x, requires_grad=True)


def close(found, expected, length=200):
    assert_close(found, expected.detach().numpy(), reduction_length=length)


class Draw:
    """Random sizes."""

    def __init__(self, *key):
        self.rng = rng(*key)

    def one(self, low, high):
        return int(self.rng.integers(low, high, endpoint=True))

    def each(self, dims, low, high):
        return tuple(self.one(low, high) for _ in range(dims))

    def flag(self):
        return bool(self.rng.integers(2))

    def normal(self, *shape):
        return self.rng.standard_normal(shape)


@every_dimension
@seeds
def test_convolution(dims, seed):
    draw = Draw("conv", dims, seed)
    kernel, stride, dilation = draw.each(dims, 1, 4), draw.each(dims, 1, 4), draw.each(dims, 1, 3)
    extents = tuple(d * (k - 1) + draw.one(1, 7) for k, d in zip(kernel, dilation))
    mode = ("zeros", "reflect", "replicate", "circular")[draw.one(0, 3)]
    padding = tuple(draw.one(0, min(n - 1, 4)) for n in extents)
    groups, per_group = draw.one(1, 3), draw.one(1, 4)
    x = draw.normal(draw.one(1, 3), groups * per_group, *extents)
    weight, bias = draw.normal(groups * draw.one(1, 3), per_group, *kernel), None
    if draw.flag():
        bias = draw.normal(len(weight))
    leaves = leaf(x), leaf(weight), None if bias is None else leaf(bias)
    padded = leaves[0]
    if mode != "zeros":
        padded = F.pad(padded, [p for side in reversed(padding) for p in (side, side)], mode=mode)
    y = getattr(F, f"conv{dims}d")(
        padded, *leaves[1:], stride, padding if mode == "zeros" else 0, dilation, groups
    )  # fmt: skip
    grad = draw.normal(*y.shape)
    y.backward(torch.from_numpy(grad))
    how = (stride, padding, dilation, groups)
    close(op("conv{}d", dims)(x, weight, bias, *how, padding_mode=mode), y)
    grads = op("conv{}d_backward", dims)(grad, x, weight, *how, padding_mode=mode)
    close(grads.input, leaves[0].grad)
    close(grads.weight, leaves[1].grad)
    if bias is not None:
        close(grads.bias, leaves[2].grad)


@every_dimension
@seeds
def test_transposed_convolution(dims, seed):
    draw = Draw("transposed", dims, seed)
    kernel, stride, dilation = draw.each(dims, 1, 4), draw.each(dims, 1, 4), draw.each(dims, 1, 3)
    extra = tuple(draw.one(0, max(s, d) - 1) for s, d in zip(stride, dilation))
    extents = draw.each(dims, 1, 5)
    natural = [(n - 1) * s + d * (k - 1) + 1 + e for n, s, k, d, e in zip(extents, stride, kernel, dilation, extra)]
    padding = tuple(draw.one(0, min((n - 1) // 2, 4)) for n in natural)
    groups, per_group = draw.one(1, 3), draw.one(1, 3)
    x = draw.normal(draw.one(1, 3), groups * draw.one(1, 3), *extents)
    weight, bias = draw.normal(x.shape[1], per_group, *kernel), draw.normal(groups * per_group)
    leaves = leaf(x), leaf(weight), leaf(bias)
    how = (stride, padding, extra, groups, dilation)
    y = getattr(F, f"conv_transpose{dims}d")(*leaves, *how)
    grad = draw.normal(*y.shape)
    y.backward(torch.from_numpy(grad))
    close(op("conv_transpose{}d", dims)(x, weight, bias, *how), y)
    for found, tensor in zip(op("conv_transpose{}d_backward", dims)(grad, x, weight, *how), leaves):
        close(found, tensor.grad)


def pool_sizes(draw, dims, dilated):
    kernel, dilation = draw.each(dims, 1, 4), draw.each(dims, 1, 3 if dilated else 1)
    extents = tuple(d * (k - 1) + draw.one(1, 8) for k, d in zip(kernel, dilation))
    padding = tuple(draw.one(0, k // 2) for k in kernel)
    stride = None if draw.flag() else draw.each(dims, 1, 5)
    return draw.normal(draw.one(1, 3), draw.one(1, 4), *extents), kernel, stride, padding, dilation, draw.flag()


@every_dimension
@seeds
def test_max_pool_and_unpool(dims, seed):
    draw = Draw("max", dims, seed)
    x, *how = pool_sizes(draw, dims, dilated=True)
    tensor = leaf(x)
    y, where = getattr(F, f"max_pool{dims}d")(tensor, *how, return_indices=True)
    grad = draw.normal(*y.shape)
    y.backward(torch.from_numpy(grad))
    found, places = op("max_pool{}d", dims)(x, *how, return_indices=True)
    assert np.array_equal(found, y.detach().numpy())
    assert np.array_equal(places, where.numpy())
    close(op("max_pool{}d_backward", dims)(grad, places, x.shape), tensor.grad)
    # Any indices will do for unpooling; distinct ones leave no doubt about the order.
    small = draw.normal(2, 3, *draw.each(dims, 1, 4))
    kernel = draw.each(dims, 2, 3)
    size = [n * k for n, k in zip(small.shape[2:], kernel)]
    flat = np.prod(small.shape[2:])
    where = np.stack([draw.rng.permutation(int(np.prod(size)))[:flat] for _ in range(6)]).reshape(small.shape)
    tensor = leaf(small)
    y = getattr(F, f"max_unpool{dims}d")(tensor, torch.from_numpy(where), kernel)
    grad = draw.normal(*y.shape)
    y.backward(torch.from_numpy(grad))
    assert np.array_equal(op("max_unpool{}d", dims)(small, where, kernel), y.detach().numpy())
    assert np.array_equal(op("max_unpool{}d_backward", dims)(grad, where), tensor.grad.numpy())


@every_dimension
@seeds
def test_avg_pool(dims, seed):
    draw = Draw("avg", dims, seed)
    x, kernel, stride, padding, _, ceil_mode = pool_sizes(draw, dims, dilated=False)
    how = [kernel, stride, padding, ceil_mode, draw.flag()]
    if dims > 1:
        how.append((None, 1, 5)[draw.one(0, 2)])
    tensor = leaf(x)
    y = getattr(F, f"avg_pool{dims}d")(tensor, *how)
    grad = draw.normal(*y.shape)
    y.backward(torch.from_numpy(grad))
    close(op("avg_pool{}d", dims)(x, *how), y)
    close(op("avg_pool{}d_backward", dims)(grad, x.shape, *how), tensor.grad)


@every_dimension
@seeds
def test_lp_pool(dims, seed):
    draw = Draw("lp", dims, seed)
    x, kernel, stride, _, _, ceil_mode = pool_sizes(draw, dims, dilated=False)
    power = (1, 2, 3, 2.5)[draw.one(0, 3)]
    # PyTorch leaves the magnitude out, which is the same for positive numbers.
    x = np.abs(x) + 0.1
    if dims == 1:
        # PyTorch takes no sequence here.
        kernel, stride = kernel[0], stride and stride[0]
    tensor = leaf(x)
    y = getattr(F, f"lp_pool{dims}d")(tensor, power, kernel, stride, ceil_mode)
    grad = draw.normal(*y.shape)
    y.backward(torch.from_numpy(grad))
    np.testing.assert_allclose(op("lp_pool{}d", dims)(x, power, kernel, stride, ceil_mode), y.detach(), rtol=1e-12)
    dx = op("lp_pool{}d_backward", dims)(grad, x, power, kernel, stride, ceil_mode)
    np.testing.assert_allclose(dx, tensor.grad, rtol=1e-10, atol=1e-12)


@every_dimension
@seeds
def test_adaptive_pools(dims, seed):
    draw = Draw("adaptive", dims, seed)
    x, size = draw.normal(2, 3, *draw.each(dims, 1, 9)), draw.each(dims, 1, 6)
    tensor = leaf(x)
    y = getattr(F, f"adaptive_avg_pool{dims}d")(tensor, size)
    grad = draw.normal(*y.shape)
    y.backward(torch.from_numpy(grad))
    close(op("adaptive_avg_pool{}d", dims)(x, size), y)
    close(op("adaptive_avg_pool{}d_backward", dims)(grad, x.shape), tensor.grad)
    tensor = leaf(x)
    y, where = getattr(F, f"adaptive_max_pool{dims}d")(tensor, size, return_indices=True)
    y.backward(torch.from_numpy(grad))
    found, places = op("adaptive_max_pool{}d", dims)(x, size, return_indices=True)
    assert np.array_equal(found, y.detach().numpy())
    assert np.array_equal(places, where.numpy())
    close(op("adaptive_max_pool{}d_backward", dims)(grad, places, x.shape), tensor.grad)


# --- tensors as arguments --------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def images(dtype, channels_last=False, per_group=2):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 7, 6, generator=generator).to(dtype)
    weight = torch.randn(8, per_group, 3, 3, generator=generator).to(dtype)
    bias = torch.randn(8, generator=generator).to(dtype)
    return x.to(memory_format=torch.channels_last) if channels_last else x, weight, bias


def agree(found, expected, length=40, algorithm="direct"):
    assert isinstance(found, torch.Tensor)
    assert found.dtype == expected.dtype
    assert_close(found.double().numpy(), expected.double().numpy(), found.dtype, algorithm, reduction_length=length)


@with_algorithms(*DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_tensors_give_tensors_of_their_dtype_and_memory_format(dtype, channels_last, algorithm):
    c = per_group(algorithm, 2)
    x, weight, bias = images(dtype, channels_last, c)
    how = {"padding": 1, "groups": 4 // c, "stride": stride_for(algorithm, 2)}
    named = {"algorithm": algorithm, "precision": promise(algorithm)}
    y = fastconv.conv2d(x, weight, bias, **how, **named)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), **how)
    agree(y, exact.to(dtype), algorithm=algorithm)
    last = torch.channels_last if channels_last else torch.contiguous_format
    assert y.is_contiguous(memory_format=last)
    grads = fastconv.conv2d_backward(y, x, weight, **how, **named)
    assert all(isinstance(g, torch.Tensor) and g.dtype == dtype for g in grads)
    assert grads.input.is_contiguous(memory_format=last)
    expected = torch.nn.grad.conv2d_input(x.shape, weight.double(), y.double(), **how)
    agree(grads.input, expected.to(dtype), algorithm=algorithm)
    expected = torch.nn.grad.conv2d_weight(x.double(), weight.shape, y.double(), **how)
    agree(grads.weight, expected.to(dtype), algorithm=algorithm)
    agree(grads.bias, y.double().sum((0, 2, 3)).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pools_and_patches_take_tensors(dtype):
    x = images(dtype)[0]
    y, where = fastconv.max_pool2d(x, 2, return_indices=True)
    expected, expected_where = F.max_pool2d(x, 2, return_indices=True)
    assert torch.equal(y, expected)
    assert torch.equal(where, expected_where)
    assert torch.equal(
        fastconv.max_unpool2d(y, where, 2, output_size=(7, 6)), F.max_unpool2d(y, where, 2, 2, 0, (7, 6))
    )
    assert torch.equal(fastconv.max_pool2d_backward(y, where, x.shape).to(torch.float64).sum(), y.double().sum())
    agree(fastconv.avg_pool2d(x, 3, 2, 1), F.avg_pool2d(x.double(), 3, 2, 1).to(dtype))
    agree(fastconv.adaptive_avg_pool2d(x, 3), F.adaptive_avg_pool2d(x.double(), 3).to(dtype))
    agree(fastconv.lp_pool2d(x, 2, 2), F.lp_pool2d(x.double(), 2, 2).to(dtype))
    agree(fastconv.unfold(x, 3), F.unfold(x.double(), 3).to(dtype))
    agree(fastconv.fold(fastconv.unfold(x, 3), (7, 6), 3), F.fold(F.unfold(x.double(), 3), (7, 6), 3).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_shares_memory_with_the_tensor_given(dtype):
    x, weight, bias = images(dtype)
    out = torch.full((2, 8, 7, 6), float("nan"), dtype=dtype)
    for given in (out, out.to(memory_format=torch.channels_last), torch.empty(2, 8, 7, 12, dtype=dtype)[..., ::2]):
        assert fastconv.conv2d(x, weight, bias, padding=1, groups=2, out=given) is given
        agree(given, F.conv2d(x.double(), weight.double(), bias.double(), padding=1, groups=2).to(dtype))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:, :, ::2, 1:],
        lambda x: x.transpose(2, 3),
        lambda x: x[:1, :, :1, :1].expand(3, -1, 5, 5),
        lambda x: torch.view_as_complex(torch.stack([x, x], -1)).conj().imag,
    ],
    ids=["sliced", "transposed", "expanded", "negative bit"],
)
def test_tensors_of_any_strides(change):
    x, weight, bias = images(torch.float64)
    x = change(x)
    agree(fastconv.conv2d(x, weight, bias, padding=1, groups=2), F.conv2d(x, weight, bias, padding=1, groups=2))
    agree(fastconv.max_pool2d(x, 2, 1, 1), F.max_pool2d(x, 2, 1, 1))


@pytest.mark.parametrize("which", ["x", "weight", "bias"])
def test_a_tensor_that_requires_grad_is_refused_with_a_hint(which):
    arrays = dict(zip(("x", "weight", "bias"), images(torch.float32)))
    arrays[which].requires_grad_()
    hint = rf"{which} is a tensor that requires grad: fastconv\.torch has .* pass {which}\.detach\(\)"
    with pytest.raises(fastconv.ArgumentTypeError, match=hint):
        fastconv.conv2d(**arrays, groups=2)
    arrays[which] = arrays[which].detach()
    assert isinstance(fastconv.conv2d(**arrays, groups=2), torch.Tensor)


def test_a_tensor_elsewhere_is_refused():
    x = torch.empty(1, 1, 3, 3, device="meta")
    with pytest.raises(fastconv.UnsupportedError, match="x is a tensor on meta; there are no kernels for it"):
        fastconv.max_pool2d(x, 2)


def test_libraries_may_not_be_mixed():
    x, weight, bias = images(torch.float32)
    with pytest.raises(fastconv.ArgumentTypeError, match="weight is an array of numpy but x is one of torch"):
        fastconv.conv2d(x, weight.numpy(), bias, groups=2)
    with pytest.raises(fastconv.ArgumentTypeError, match="out must be an array of torch, like x"):
        fastconv.conv2d(x, weight, bias, groups=2, out=np.empty((2, 6, 5, 4), "float32"))
