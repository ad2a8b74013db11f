"""fastconv.torch: operations on tensors give what those on arrays give, with gradients, however PyTorch calls them."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import conv_arguments, normal, op, pool_arguments, run_python
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import fastconv
import fastconv.torch as ft
from fastconv.testing import CONV_CASES, POOL_CASES

MEMORY = {3: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d}
layouts = pytest.mark.parametrize("last", [False, True], ids=["first", "last"])


def tensor(*key, shape, last=False, dtype="float64", grad=True):
    x = torch.from_numpy(normal(*key, shape=shape, dtype=dtype))
    return (x.to(memory_format=MEMORY[x.ndim]) if last else x).requires_grad_(grad)


def same(found, expected):
    return np.array_equal(found.detach().numpy(), expected.detach().numpy())


def lies(y, last):
    return y.is_contiguous(memory_format=MEMORY[y.ndim]) if last and len(y) else y.is_contiguous()


# --- the table of cases ----------------------------------------------------------------------------------------


def in_turn(cases):
    """Cases and, in turn, one of the layouts: both are tested with arrays."""
    found = [(case, bool(i % 2) and case.spatial_dims > 1) for i, case in enumerate(cases)]
    return pytest.mark.parametrize(("case", "last"), found, ids=[f"{c}-{'last' if n else 'first'}" for c, n in found])


@in_turn(CONV_CASES)
def test_convolutions_give_what_arrays_give(case, last):
    dims, how = case.spatial_dims, conv_arguments(case)
    x, w = tensor(case, "x", shape=case.x_shape, last=last), tensor(case, "w", shape=case.weight_shape)
    b = tensor(case, "b", shape=case.weight_shape[:1])
    y = getattr(ft, f"conv{dims}d")(x, w, b, **how)
    arrays = [t.detach() for t in (x, w, b)]
    assert same(y, op("conv{}d", dims)(*arrays, **how))
    assert lies(y, last)
    grad = torch.from_numpy(normal(case, "grad", shape=tuple(y.shape)))
    y.backward(grad)
    expected = op("conv{}d_backward", dims)(grad, *arrays[:2], **how)
    for found, wanted in zip((x.grad, w.grad, b.grad), expected):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert lies(x.grad, last)


@in_turn(POOL_CASES)
def test_pools_give_what_arrays_give(case, last):
    dims, how = case.spatial_dims, pool_arguments(case)
    x = tensor(case, "x", shape=case.x_shape, last=last)
    y, where = getattr(ft, f"max_pool{dims}d")(x, **how, return_indices=True)
    values, places = op("max_pool{}d", dims)(x.detach(), **how, return_indices=True)
    assert same(y, values)
    assert same(where, places)
    assert lies(y, last)
    with torch.no_grad():
        assert same(getattr(ft, f"max_pool{dims}d")(x, **how), values)
    grad = torch.from_numpy(normal(case, "grad", shape=tuple(y.shape)))
    (dx,) = torch.autograd.grad(y, x, grad)
    assert same(dx, op("max_pool{}d_backward", dims)(grad, places, tuple(x.shape)))
    y = getattr(ft, f"avg_pool{dims}d")(x, **how)
    assert same(y, op("avg_pool{}d", dims)(x.detach(), **how))
    assert lies(y, last and dims == 2)
    (dx,) = torch.autograd.grad(y, x, grad)
    grad = grad.to(memory_format=MEMORY[grad.ndim]) if last else grad
    assert same(dx, op("avg_pool{}d_backward", dims)(grad, tuple(x.shape), **how))


TRANSPOSED = (
    {"stride": 2, "padding": 1, "output_padding": 1},
    {"stride": 3, "output_size": (14, 17)},
    {"stride": 2, "padding": "same", "dilation": 2},
    {"padding": ((0, 1), (1, 0))},
)


@layouts
@pytest.mark.parametrize("how", TRANSPOSED, ids=str)
def test_transposed_convolutions_give_what_arrays_give(how, last):
    x, w = tensor("x", shape=(2, 4, 5, 6), last=last), tensor("w", shape=(4, 3, 2, 2))
    b = tensor("b", shape=(6,))
    y = ft.conv_transpose2d(x, w, b, groups=2, **how)
    arrays = [t.detach() for t in (x, w, b)]
    assert same(y, fastconv.conv_transpose2d(*arrays, groups=2, **how))
    assert lies(y, last)
    grads = torch.autograd.grad(y, (x, w, b), y.detach())
    for found, wanted in zip(grads, fastconv.conv_transpose2d_backward(y.detach(), *arrays[:2], groups=2, **how)):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_adaptive_pools_unpooling_norms_and_patches_give_what_pytorch_gives():
    x = tensor("x", shape=(2, 3, 9, 7))
    close = torch.testing.assert_close
    for ours, theirs in (
        (ft.adaptive_avg_pool2d(x, (4, None)), F.adaptive_avg_pool2d(x, (4, None))),
        (ft.adaptive_max_pool2d(x, 3), F.adaptive_max_pool2d(x, 3)),
        (ft.lp_pool2d(x, 2, 2), F.lp_pool2d(x, 2, 2)),
        (ft.unfold(x, 3, 1, 1, 2), F.unfold(x, 3, 1, 1, 2)),
        (ft.fold(ft.unfold(x, (2, 3)), (9, 7), (2, 3)), F.fold(F.unfold(x, (2, 3)), (9, 7), (2, 3))),
    ):
        close(ours, theirs)
        grad = torch.from_numpy(normal("g", shape=tuple(ours.shape)))
        close(torch.autograd.grad(ours, x, grad)[0], torch.autograd.grad(theirs, x, grad)[0])
    y, where = F.max_pool2d(x, 2, return_indices=True)
    y = y.detach().requires_grad_()
    ours, theirs = (f(y, where, 2, output_size=(9, 7)) for f in (ft.max_unpool2d, F.max_unpool2d))
    assert same(ours, theirs)
    close(*(torch.autograd.grad(t, y, x.detach())[0] for t in (ours, theirs)))


# --- shapes and formats ----------------------------------------------------------------------------------------


def test_single_images_and_channels_last_shapes():
    x, w = tensor("x", shape=(2, 4, 7, 6)), tensor("w", shape=(5, 4, 3, 3))
    y = ft.conv2d(x, w)
    last = x.permute(0, 2, 3, 1)
    assert same(ft.conv2d(x[0], w), y[0])
    torch.testing.assert_close(ft.conv2d(last, w, data_format="channels_last"), y.permute(0, 2, 3, 1))
    torch.testing.assert_close(ft.conv2d(last[1], w, data_format="channels_last"), y[1].permute(1, 2, 0))
    y, where = ft.max_pool2d(last[0], 2, return_indices=True, data_format="channels_last")
    assert same(ft.max_unpool2d(y, where, 2, output_size=(7, 6), data_format="channels_last").sum(), y.sum())
    assert same(ft.unfold(x[0], 3), ft.unfold(x, 3)[0])
    assert same(ft.fold(ft.unfold(x, 3)[0], (7, 6), 3), ft.fold(ft.unfold(x, 3), (7, 6), 3)[0])


@pytest.mark.parametrize(
    "change",
    [lambda x: x[:, :, ::2, 1:], lambda x: x.transpose(2, 3), lambda x: x[:1, :, :1, :1].expand(3, -1, 5, 5)],
    ids=["sliced", "transposed", "expanded"],
)
def test_tensors_of_any_strides(change):
    x, w = tensor("x", shape=(2, 4, 7, 6)), tensor("w", shape=(3, 4, 3, 3))
    w_last = w.detach().to(memory_format=torch.channels_last)
    for ours, theirs in ((ft.conv2d(change(x), w_last, padding=1), F.conv2d(change(x), w, padding=1)),):
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (ours, theirs)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtypes_and_gradients_of_half_types(dtype):
    x, w = (
        tensor(n, shape=s).detach().to(dtype).requires_grad_() for n, s in (("x", (2, 3, 6, 6)), ("w", (4, 3, 3, 3)))
    )
    y = ft.max_pool2d(ft.conv2d(x, w, activation="relu"), 2)
    y.backward(torch.ones_like(y))
    assert y.dtype == x.grad.dtype == w.grad.dtype == dtype
    exact = F.max_pool2d(F.conv2d(x.double(), w.double()).relu(), 2)
    torch.testing.assert_close(y.double(), exact, rtol=2e-2, atol=2e-2)


@layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_results_may_be_written_to(dtype, last):
    x, w = tensor("x", shape=(2, 3, 6, 6), last=last), tensor("w", shape=(4, 3, 3, 3))
    x, w = (t.detach().to(dtype).requires_grad_() for t in (x, w))
    results = [[conv(x, w).relu_(), F.max_pool2d(conv(x, w), 2).mul_(2)] for conv in (ft.conv2d, F.conv2d)]
    for ours, theirs in zip(*results):
        grads = [torch.autograd.grad(y.sum(), (x, w)) for y in (ours, theirs)]
        for found, expected in zip(grads[0], grads[1]):
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=0.3 if dtype == torch.bfloat16 else 1e-4)
    assert ft.max_pool2d(x, 2).mul_(2).requires_grad


def test_autocast_casts_as_for_pytorchs_convolutions():
    x, w = tensor("x", shape=(1, 3, 6, 6), dtype="float32"), tensor("w", shape=(4, 3, 3, 3), dtype="float32")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ft.conv2d(x, w)
        assert y.dtype == F.conv2d(x, w).dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == w.grad.dtype == torch.float32


POOLED = {
    "max_pool": (2,), "max_pool_with_indices": (2,), "avg_pool": (2,), "lp_pool": (2, 2), "adaptive_avg_pool": (3,),
    "adaptive_max_pool": (3,), "max_unpool": (2,),
}  # fmt: skip


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("name", POOLED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_autocast_pools_in_pytorchs_types(name, dims, dtype):
    x, arguments = tensor("x", shape=(2, 3, *(7, 6, 5)[:dims])).detach().to(dtype), POOLED[name]
    if name == "max_unpool":
        arguments = (torch.arange(x[0, 0].numel()).view(x.shape[2:]).expand(x.shape), *arguments)
    name, more = name.partition("_with")[0] + f"{dims}d", {"return_indices": True} if "_with" in name else {}

    def pooled(home):
        with torch.autocast("cpu", torch.bfloat16):
            y = getattr(home, name)(x, *arguments, **more)
        return y[0] if more else y

    wanted = pooled(F)
    with ft.enabled() as block:
        found = [pooled(ft), pooled(F)]
    assert sum(block.routed.values()) == 1, block.report()
    for y in found:
        torch.testing.assert_close(y, wanted, rtol=0.02, atol=0.02, check_dtype=True)


def test_integers_give_int32():
    x, w = torch.randint(-9, 9, (1, 2, 5, 5), dtype=torch.int8), torch.randint(-9, 9, (3, 2, 3, 3), dtype=torch.int8)
    y = ft.conv2d(x, w)
    assert y.dtype == torch.int32
    assert torch.equal(y, F.conv2d(x.double(), w.double()).int())


def test_empty_batches_have_gradients():
    x, w = tensor("x", shape=(0, 3, 6, 6)), tensor("w", shape=(4, 3, 3, 3))
    y = ft.avg_pool2d(ft.max_pool2d(ft.conv2d(x, w), 2), 2)
    y.sum().backward()
    assert y.shape == (0, 4, 1, 1)
    assert x.grad.shape == x.shape
    assert not w.grad.any()


def test_compiled_convolutions_of_no_channels_have_the_same_shapes():
    shapes = {"x": (2, 0, 6, 6), "w": (4, 0, 3, 3), "b": (4,)}
    inputs = [tensor(n, shape=s) for n, s in shapes.items()]
    y = torch.compile(ft.conv2d, backend="aot_eager")(*inputs)
    assert y.shape == ft.conv2d(*inputs).shape == (2, 0, 4, 4)
    assert [g.shape for g in torch.autograd.grad(y.sum(), inputs)] == list(shapes.values())


def test_inference_mode_and_no_grad():
    x, w = tensor("x", shape=(1, 3, 6, 6)), tensor("w", shape=(4, 3, 3, 3))
    y = ft.conv2d(x, w)
    with torch.inference_mode():
        found = ft.max_pool2d(ft.conv2d(x, w), 2)
        assert found.is_inference()
        assert same(found, F.max_pool2d(y, 2))
    with torch.no_grad():
        assert not ft.conv2d(x, w).requires_grad


class Seen(TorchDispatchMode):
    def __init__(self, names):
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


# --- gradients -------------------------------------------------------------------------------------------------

SMALL = {"x": (2, 2, 4, 5), "w": (4, 1, 2, 3), "b": (4,)}
CONVOLUTIONS = {
    "plain": lambda x, w, b: ft.conv2d(x, w, b, stride=2, padding=((1, 0), (1, 2)), groups=2),
    "reflected": lambda x, w, b: ft.conv2d(x, w, b, padding=1, groups=2, padding_mode="reflect"),
    "activated": lambda x, w, b: ft.conv2d(x, w, b, dilation=2, groups=2, padding="same", activation="tanh"),
    "transposed": lambda x, w, b: ft.conv_transpose2d(x, w.transpose(0, 1).reshape(2, 2, 2, 3), b, 2, 1, 1, groups=2),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_gradients_of_convolutions_to_the_second_order(name):
    inputs = [tensor(name, n, shape=shape) for n, shape in SMALL.items()]
    assert torch.autograd.gradcheck(CONVOLUTIONS[name], inputs)
    assert torch.autograd.gradgradcheck(CONVOLUTIONS[name], inputs)


def test_a_third_derivative_is_there_too():
    x, w = tensor("x", shape=(1, 1, 4)), tensor("w", shape=(1, 1, 2))

    def cubic(conv):
        first = torch.autograd.grad((conv(x, w) ** 4).sum(), x, create_graph=True)[0]
        second = torch.autograd.grad((first**2).sum(), w, create_graph=True)[0]
        return torch.autograd.grad(second.sum(), (x, w))

    for ours, theirs in zip(cubic(ft.conv1d), cubic(F.conv1d)):
        torch.testing.assert_close(ours, theirs)


POOLS = {
    "max": lambda x: ft.max_pool2d(x, 2, padding=1),
    "avg": lambda x: ft.avg_pool2d(x, 3, 1, 1, ceil_mode=True),
    "adaptive avg": lambda x: ft.adaptive_avg_pool2d(x, 3),
    "adaptive max": lambda x: ft.adaptive_max_pool2d(x, 3),
    "unpool": lambda x: ft.max_unpool2d(x, torch.arange(40).reshape(2, 2, 2, 5) % 20, (2, 1)),
    "unfold": lambda x: ft.unfold(x, 2, padding=1),
    "fold": lambda x: ft.fold(x.reshape(2, 4, 10)[:, :, :4], (3, 3), 2),
}


@pytest.mark.parametrize("name", POOLS)
def test_gradients_of_pools_and_patches_to_the_second_order(name):
    x = tensor(name, shape=(2, 2, 4, 5)) if name != "unpool" else tensor(name, shape=(2, 2, 2, 5))
    assert torch.autograd.gradcheck(POOLS[name], x)
    assert torch.autograd.gradgradcheck(POOLS[name], x)


@pytest.mark.parametrize("power", [1, 2, 3, 2.5, -1])
def test_gradients_of_norms_to_the_second_order(power):
    x = tensor("norm", shape=(2, 2, 4, 5))
    norm = lambda x: ft.lp_pool2d(x, power, (2, 3), 2, padding=1)  # noqa: E731
    assert torch.autograd.gradcheck(norm, x)
    assert torch.autograd.gradgradcheck(norm, x)


def test_the_third_gradient_of_a_norm_at_zero_is_pytorchs():
    def third(pool):
        x = torch.tensor([[[0.0, 3.0, 4.0]]], dtype=torch.float64, requires_grad=True)
        found = pool(x, 2, 3).sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(found, x, create_graph=True)
            found = (g * torch.tensor([1.0, 2.0, 3.0])).sum()
        return g.detach()

    torch.testing.assert_close(third(ft.lp_pool1d), third(F.lp_pool1d))


def test_second_gradients_of_norms_at_zero_are_pytorchs():
    x = tensor("norm", shape=(2, 2, 4, 6)).detach()
    x[..., ::2] = 0
    x.requires_grad_()
    found = []
    for norm in (ft.lp_pool2d, F.lp_pool2d):
        (dx,) = torch.autograd.grad((norm(x, 2, (2, 3)) ** 3).sum(), x, create_graph=True)
        found.append((dx, *torch.autograd.grad(dx.sin().sum(), x)))
    torch.testing.assert_close(*found)
    # Without a norm that is not zero there is nothing to agree on but that it is a number.
    x = torch.zeros(1, 1, 2, 2, requires_grad=True)
    (dx,) = torch.autograd.grad(ft.lp_pool2d(x, 2, 2).sum(), x, create_graph=True)
    assert not torch.autograd.grad(dx.sum(), x)[0].any()


FORWARD = {
    **{name: (CONVOLUTIONS[name], tuple(SMALL.values())) for name in CONVOLUTIONS},
    **{name: (pool, [(2, 2, 2, 5) if name == "unpool" else (2, 2, 4, 5)]) for name, pool in POOLS.items()},
    "max, windows of padding": (lambda x: ft.max_pool2d(x, 2, 3, ((2, 0), (0, 0))).clamp(min=-9), [(1, 2, 4, 4)]),
    "norm": (lambda x: ft.lp_pool2d(x, 3, (2, 3), 2, padding=1), [(2, 2, 4, 5)]),
}


# PyTorch's own, from the bottom of `torch.func.jvp`.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("name", FORWARD)
def test_derivatives_in_forward_mode_and_of_gradients(name):
    function, shapes = FORWARD[name]
    inputs = [tensor(name, i, shape=shape) for i, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_forward_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True)
    # The same through `torch.func`, forward over reverse.
    loss = lambda *a: function(*a).sin().sum()  # noqa: E731
    plain, directions = [t.detach() for t in inputs], [tensor("t", t.shape, shape=t.shape, grad=False) for t in inputs]
    grad = torch.func.grad(loss, tuple(range(len(inputs))))
    _, found = torch.func.jvp(grad, tuple(plain), tuple(directions))
    first = torch.autograd.grad(loss(*inputs), inputs, create_graph=True)
    product = sum((g * t).sum() for g, t in zip(first, directions))
    for ours, theirs in zip(found, torch.autograd.grad(product, inputs)):
        torch.testing.assert_close(ours, theirs)


# PyTorch's own, from the bottom of `torch.func.jvp`.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script", "ignore::DeprecationWarning")
def test_operators_have_no_tangents_and_say_so():
    x, w = (torch.from_numpy(normal(n, shape=n)) for n in ((1, 2, 5, 5), (3, 2, 3, 3)))

    def tangent(x):
        return torch.func.jvp(lambda x: F.conv2d(x, w) ** 2, (x,), (x,))[1]

    with ft.enabled() as found:
        torch.testing.assert_close(torch.compile(tangent, backend="aot_eager")(x), tangent(x))
    assert "no forward-mode derivatives, which torch.compile would need" in found.report()
    with (
        forward_ad.dual_level(),
        Seen([]),
        pytest.raises(fastconv.UnsupportedError, match="no forward-mode derivatives, which dispatch modes would need"),
    ):
        ft.conv2d(forward_ad.make_dual(x, x), w)


def test_only_what_needs_a_gradient_gets_one():
    x, w, b = (tensor(n, shape=shape, grad=n == "w") for n, shape in SMALL.items())
    y = ft.conv2d(x, w, b, groups=2)
    y.sum().backward()
    assert x.grad is None
    assert b.grad is None
    assert w.grad is not None


# --- what PyTorch does with operators --------------------------------------------------------------------------

IMAGE, PLACES = (2, 3, 5, 6), torch.arange(36).reshape(2, 3, 2, 3) % 12
WINDOW = ([2, 2], [2, 2], [0, 1, 0, 0], [1, 1], False)
CONV = ([2, 1], [1, 0, 1, 1], [1, 2], 1)


def samples(last):
    """Arguments for each operator, by name."""
    x, w, wt = (tensor(s, shape=s, last=last and s == IMAGE) for s in (IMAGE, (4, 3, 3, 2), (3, 4, 3, 2)))
    y = tensor("y", shape=(2, 4, 2, 6))
    yt = tensor("yt", shape=(2, 4, 9, 5))
    small = tensor("small", shape=(2, 3, 2, 3))
    transposed = ([2, 1], [1, 1, 1, 1], [0, 0], 1, [1, 1])
    yield "conv", (x, w, tensor("b", shape=(4,)), *CONV, "zeros", "relu", "auto", None)
    yield "conv_backward", (y, x, w, [True, True, True], *CONV, "zeros", "auto", None)
    yield "conv_transpose", (x, wt, None, *transposed, None, "auto", None)
    yield "conv_transpose_backward", (yt, x, wt, [True, True, False], *transposed, "auto", None)
    yield "max_pool", (x, *WINDOW)
    yield "max_pool_with_indices", (x, *WINDOW)
    yield "adaptive_max_pool", (x, [2, 4])
    yield "max_pool_backward", (small, PLACES, [4, 6])
    yield "max_unpool", (small, PLACES, [2, 2], [2, 2], [0, 0, 0, 0], [4, 6])
    yield "max_unpool_backward", (tensor("big", shape=(2, 3, 4, 6)), PLACES)
    yield "avg_pool", (x, *WINDOW, True, None)
    yield "avg_pool_backward", (small, [4, 6], True, *WINDOW[:2], [0] * 4, *WINDOW[3:], True, 3)
    yield "adaptive_avg_pool", (x, [2, 4])
    yield "adaptive_avg_pool_backward", (small, [5, 6], last)
    yield "lp_pool", (x, *WINDOW, 2.0)
    yield "unfold", (x, [2, 3], [1, 1], [1, 0, 0, 1], [2, 2])
    yield "fold", (tensor("cols", shape=(2, 12, 20)), [5, 6], [2, 2], [1, 1], [0] * 4, [1, 1])


@pytest.mark.parametrize("name", [name for name, _ in samples(False)])
def test_operators_pass_pytorchs_own_checks(name):
    last = name in ("conv", "max_pool_with_indices", "avg_pool", "conv_transpose_backward")
    torch.library.opcheck(getattr(torch.ops.fastconv, name).default, dict(samples(last))[name])


def network(x, w, b, v):
    y = ft.max_pool2d(ft.conv2d(x, w, b, padding="same", activation="relu"), 2)
    y = ft.avg_pool2d(ft.conv_transpose2d(y, v, stride=2), 3, padding=1)
    return ft.adaptive_avg_pool2d(y, 1).flatten(1)


def network_inputs(dtype="float64"):
    shapes = {"x": (2, 3, 9, 8), "w": (4, 3, 3, 3), "b": (4,), "v": (4, 5, 2, 2)}
    return [tensor("network", n, shape=s, dtype=dtype) for n, s in shapes.items()]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compilation_without_graph_breaks(dynamic):
    inputs = network_inputs()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for scale in (1, 2):
        torch.testing.assert_close(compiled(*inputs), network(*inputs))
        found, wanted = (torch.autograd.grad((f(*inputs) * scale).sin().sum(), inputs) for f in (compiled, network))
        for ours, theirs in zip(found, wanted):
            torch.testing.assert_close(ours, theirs)
        inputs[0] = inputs[0].detach()[..., 1:].clone().requires_grad_()


@pytest.mark.parametrize("pool", [ft.max_pool2d, ft.avg_pool2d])
def test_operators_refuse_the_same_padding(pool):
    x = torch.ones(1, 1, 6, 6)
    with (
        Seen([]),
        pytest.raises(fastconv.ArgumentError, match=r"padding must be at most \(1, 1\), half of kernel_size"),
    ):
        pool(x, 2, padding=2)
    with Seen([]):
        assert pool(x, 2, padding=((2, 0), (0, 2))).shape == (1, 1, 4, 4)


def test_export_with_a_dynamic_batch():
    class Network(torch.nn.Module):
        def forward(self, x, w, b, v):
            return network(x, w, b, v)

    inputs = [t.detach() for t in network_inputs()]
    program = torch.export.export(
        Network(), tuple(inputs), dynamic_shapes=({0: torch.export.Dim("n")}, None, None, None)
    )
    names = {str(node.target) for node in program.graph.nodes}
    assert {"fastconv.conv.default", "fastconv.max_pool.default", "fastconv.conv_transpose.default"} <= names
    inputs[0] = torch.cat([inputs[0]] * 2)
    torch.testing.assert_close(program.module()(*inputs), network(*inputs))


def test_gradients_of_functions_and_of_each_sample():
    x, w, b, v = (t.detach() for t in network_inputs())

    def reference(x, w, b, v):
        y = F.max_pool2d(F.conv2d(x, w, b, padding="same").relu(), 2)
        return F.adaptive_avg_pool2d(F.avg_pool2d(F.conv_transpose2d(y, v, stride=2), 3, padding=1), 1).flatten(1)

    def of_samples(function):
        loss = lambda w, v, x: function(x[None], w, b, v).sin().sum()  # noqa: E731
        return torch.func.vmap(torch.func.grad(loss, (0, 1)), (None, None, 0))(w, v, x)

    for ours, theirs in zip(of_samples(network), of_samples(reference)):
        torch.testing.assert_close(ours, theirs)
    loss = lambda f: lambda w: f(x, w, b, v).sin().sum()  # noqa: E731
    torch.testing.assert_close(*(torch.func.jacrev(torch.func.grad(loss(f)))(w) for f in (network, reference)))


def test_vmap_over_each_argument():
    x, w = (t.detach() for t in network_inputs()[:2])
    two = lambda t: torch.stack([t, 2 * t], 1)  # noqa: E731
    for dims, inputs in (((1, None), (two(x), w)), ((None, 1), (x, two(w))), ((1, 1), (two(x), two(w)))):
        ours, theirs = (torch.func.vmap(f, dims)(*inputs) for f in (ft.conv2d, F.conv2d))
        torch.testing.assert_close(ours, theirs)
    values, where = torch.func.vmap(lambda x: ft.max_pool2d(x, 2, return_indices=True), 1)(two(x))
    assert torch.equal(values[1], F.max_pool2d(2 * x, 2))
    assert torch.equal(where[0], where[1])


def test_dispatch_modes_see_the_operators():
    names = []
    x, w = (t for t in network_inputs()[:2])
    with Seen(names):
        ft.conv2d(x, w).sum().backward()
    assert {"fastconv.conv.default", "fastconv.conv_backward.default"} <= set(names)


# --- refusals --------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_refused_by_name():
    x, w = torch.ones(1, 3, 6, 6), torch.ones(4, 3, 3, 3)
    with pytest.raises(fastconv.ArgumentTypeError, match="x must be a PyTorch tensor, not ndarray"):
        ft.conv2d(x.numpy(), w)
    with pytest.raises(fastconv.ArgumentTypeError, match="every array must be a PyTorch tensor, not ndarray"):
        ft.conv2d(x, w.numpy())
    with pytest.raises(
        fastconv.ShapeError, match=r"x must have 4 dimensions, or 3 without a batch, not shape \(6, 6\)"
    ):
        ft.conv2d(x[0, 0], w)
    with pytest.raises(fastconv.ShapeError, match="channels"):
        ft.conv2d(x[:, :2], w)
    with pytest.raises(fastconv.ArgumentError, match="stride must be at least 1, not 0"):
        ft.max_pool2d(x, 2, 0)
    with pytest.raises(fastconv.DTypeError, match="weight has dtype float64, but x has float32"):
        ft.conv2d(x, w.double())
    with pytest.raises(fastconv.UnsupportedError, match="winograd"):
        ft.conv2d(x, w, stride=2, algorithm="winograd")


def test_many_gradients_at_once():
    shapes = (1, 3, 6, 6), (4, 3, 3, 3), (3, 1, 4, 2, 2)
    x, w, grads = (torch.from_numpy(normal("many gradients", i, shape=shape)) for i, shape in enumerate(shapes))
    x.requires_grad_()
    y = ft.max_pool2d(ft.conv2d(x, w), 2)
    (found,) = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)
    for one, grad in zip(found, grads):
        torch.testing.assert_close(one, torch.autograd.grad(y, x, grad, retain_graph=True)[0])


def test_vmap_over_nothing():
    assert torch.func.vmap(lambda x: ft.conv2d(x, torch.ones(4, 3, 3, 3)))(torch.ones(0, 2, 3, 6, 6)).shape == (
        0, 2, 4, 4, 4,
    )  # fmt: skip


def test_results_are_on_the_cpu_whatever_the_default_device():
    x, w = (torch.ones(shape, dtype=torch.bfloat16) for shape in ((1, 1, 4, 4), (1, 1, 3, 3)))
    with torch.device("meta"):
        assert ft.conv2d(x, w).device.type == "cpu"


@pytest.mark.parametrize(
    "make", [lambda x: x.to(torch.complex64).conj(), lambda x: x.to_mkldnn()], ids=["conjugate", "mkldnn"]
)
def test_tensors_that_no_array_can_show_are_refused(make):
    with pytest.raises(fastconv.UnsupportedError, match="no array over its memory"):
        ft.max_pool2d(make(torch.ones(1, 2, 4, 4)), 2)


def test_without_pytorch_the_extra_is_named():
    script = """
import sys
sys.modules["torch"] = None
try:
    import fastconv.torch
except ImportError as error:
    print(type(error).__name__, error)
"""
    assert run_python(script).strip() == (
        "MissingDependencyError fastconv.torch needs PyTorch: pip install 'fastconv[torch]'"
    )


def test_the_import_compiles_nothing():
    script = """
from numba.core import event
with event.install_recorder("numba:compile") as recorder:
    import fastconv.torch
print(len(recorder.buffer))
"""
    assert run_python(script).strip() == "0"


# --- strides ---------------------------------------------------------------------------------------------------

EXTENTS = (7, 6, 5)


def last_in_memory(x, axis=1):
    return x.movedim(axis, -1).contiguous().movedim(-1, axis)


FORMATS = {
    "contiguous": lambda x: x,
    "channels last": last_in_memory,
    "one channel, last": lambda x: last_in_memory(x[:, :1].expand_as(x))[:, :1].to(memory_format=MEMORY[x.ndim]),
    "one pixel, last": lambda x: last_in_memory(x)[(..., *(slice(1),) * (x.ndim - 2))].to(memory_format=MEMORY[x.ndim]),
    "turned": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "no batch": lambda x: x[0],
    "no batch, channels last": lambda x: last_in_memory(x[0], 0),
    "nothing": lambda x: x[:0],
}


def strided(dims, channels):
    """Functions that PyTorch and fastconv have, by name."""
    of = lambda name: getattr(F, name.format(dims))  # noqa: E731
    w, wt = (tensor(n, shape=(*n, *(1,) * dims), dtype="float32", grad=False) for n in ((6, channels), (channels, 6)))
    yield "conv", lambda x: of("conv{}d")(x, w, padding=1)
    yield "conv, weight last", lambda x: of("conv{}d")(x, last_in_memory(w.repeat_interleave(3, -1)), padding="same")
    yield "depthwise", lambda x: of("conv{}d")(x, wt[:, :1], groups=channels)
    yield "transposed", lambda x: of("conv_transpose{}d")(x, wt, stride=2)
    yield "max", lambda x: of("max_pool{}d")(x, 3, padding=1)
    yield "indices", lambda x: of("max_pool{}d")(x, 3, padding=1, return_indices=True)
    yield "avg", lambda x: of("avg_pool{}d")(x, 1, 2)
    yield "norm", lambda x: of("lp_pool{}d")(x, 2, 1, 2)
    yield "adaptive avg", lambda x: of("adaptive_avg_pool{}d")(x, 3)
    yield "mean", lambda x: of("adaptive_avg_pool{}d")(x, 1)
    yield "adaptive max", lambda x: of("adaptive_max_pool{}d")(x, 3, return_indices=True)
    yield "unpool", lambda x: of("max_unpool{}d")(x, torch.zeros(x.shape, dtype=torch.int64), 2)


def stride_differs(dims, form, name):
    """Where PyTorch's strides are not followed."""
    return (
        # Its norms are made of several operations, and do not tell the formats of single elements apart.
        (name == "norm" and form.startswith("one "))
        # Alone among single images.
        or (dims == 3 and form == "no batch, channels last" and name in ("max", "indices"))
        # It depends on which of its kernels PyTorch takes for one image.
        or (dims == 3 and form.startswith("no batch") and name == "conv, weight last")
    )


@pytest.mark.parametrize(
    ("dims", "form"),
    [(dims, form) for form in FORMATS for dims in (1, 2, 3) if dims > 1 or not form.startswith("one ")],
)
def test_strides_are_pytorchs_and_what_requires_grad(dims, form):
    given = FORMATS[form](tensor("x", shape=(2, 4, *EXTENTS[:dims]), dtype="float32", grad=False))
    for name, function in strided(dims, given.shape[-dims - 1]):
        if stride_differs(dims, form, name):
            continue
        for grad, graph in ((False, False), (True, False), (True, True)):
            x, results = given.detach().requires_grad_(grad), []
            for block in (nullcontext(), ft.enabled()):
                with block:
                    y = function(x)
                parts = y if isinstance(y, tuple) else (y,)
                if grad and form != "nothing":
                    parts += torch.autograd.grad(parts[0], x, torch.ones(parts[0].shape), create_graph=graph)
                results.append([(p.stride(), p.requires_grad) for p in parts])
            assert block.routed, (name, block.report())
            assert results[1] == results[0], (name, grad, graph)


@pytest.mark.parametrize("name", ["max", "avg", "adaptive avg", "adaptive max"])
def test_the_second_gradient_of_a_pools_sum_is_zero(name):
    function = dict(strided(2, 4))[name]
    x = tensor("x", shape=(2, 4, 7, 6), dtype="float32")
    with ft.enabled():
        y = function(x)
    (dx,) = torch.autograd.grad((y[0] if isinstance(y, tuple) else y).sum(), x, create_graph=True)
    x.data[:] = torch.nan
    (found,) = torch.autograd.grad(dx.square().sum(), x)
    assert not found.any()


def test_results_of_one_dimension_are_contiguous_as_those_of_pytorch():
    x, w = torch.rand(2, 9, 4).transpose(1, 2), torch.rand(3, 4, 3)
    for y in (ft.conv1d(x, w), ft.conv_transpose1d(x, w.transpose(0, 1)), ft.max_pool1d(x, 2)):
        assert y.is_contiguous()
        y.view(2, -1)
