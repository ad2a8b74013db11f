"""fastconv.torch's modules, `convert` and `enabled`: models compute what they did, layer by layer and step by step."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from support import normal
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fastconv
import fastconv.torch as ft


def image(*shape, dtype="float32"):
    return torch.from_numpy(normal("image", shape=shape, dtype=dtype))


LAYERS = {
    "Conv1d": ((4, 6, 3), {"padding": 1, "dilation": 2}, (2, 4, 13)),
    "Conv2d": ((4, 6, 3), {"stride": 2, "padding": 1, "groups": 2, "padding_mode": "reflect"}, (2, 4, 9, 8)),
    "Conv3d": ((2, 3, 3), {"padding": "same", "bias": False}, (1, 2, 4, 5, 6)),
    "ConvTranspose1d": ((4, 6, 3), {"stride": 2, "output_padding": 1}, (2, 4, 7)),
    "ConvTranspose2d": ((4, 6, 3), {"stride": 2, "groups": 2, "padding": 1}, (2, 4, 5, 6)),
    "ConvTranspose3d": ((2, 3, 2), {"dilation": 2}, (1, 2, 3, 4, 3)),
    "MaxPool2d": ((3, 2, 1), {"ceil_mode": True}, (2, 4, 9, 8)),
    "AvgPool2d": ((3, 2, 1), {"count_include_pad": False}, (2, 4, 9, 8)),
    "AvgPool1d": ((2,), {}, (2, 4, 9)),
    "AdaptiveAvgPool2d": (((3, None),), {}, (2, 4, 9, 8)),
    "AdaptiveMaxPool2d": ((3,), {}, (2, 4, 9, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_modules_are_pytorchs_with_its_values_and_gradients(name):
    arguments, keywords, shape = LAYERS[name]
    theirs, ours = (getattr(home, name)(*arguments, **keywords) for home in (nn, ft))
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, getattr(nn, name))
    theirs, ours, x = theirs.double(), ours.double(), image(*shape, dtype="float64").requires_grad_()
    wanted, found = theirs(x), ours(x)
    torch.testing.assert_close(found, wanted)
    grads = [torch.autograd.grad(y.sin().sum(), [x, *m.parameters()]) for y, m in ((found, ours), (wanted, theirs))]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_arguments_have_pytorchs_names():
    x = image(1, 2, 6, 6)
    y, where = nn.MaxPool2d(2, return_indices=True)(x)
    for layer in (nn.Conv2d(2, 3, 3), nn.ConvTranspose2d(2, 3, 3), nn.MaxPool2d(2), nn.AvgPool2d(2)):
        wanted = layer(input=x)
        ft.convert(layer)
        torch.testing.assert_close(layer(input=x), wanted)
    assert torch.equal(ft.MaxUnpool2d(2)(input=y, indices=where), nn.MaxUnpool2d(2)(y, where))


def test_initial_values_are_pytorchs():
    for home in (nn, ft):
        torch.manual_seed(3)
        found = home.Conv2d(3, 4, 5).state_dict()
        wanted = found if home is nn else wanted  # noqa: F821
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_modules_take_the_algorithm_and_check_its_name():
    layer = ft.Conv2d(3, 4, 3, padding=1, algorithm="fft", precision="high")
    assert "algorithm='fft', precision='high'" in repr(layer)
    x = image(1, 3, 8, 8)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1), atol=1e-4, rtol=1e-4)
    with pytest.raises(fastconv.ArgumentError, match="algorithm must be one of"):
        ft.Conv2d(3, 4, 3, algorithm="quick")


def test_unpooling_and_output_sizes():
    x = image(1, 2, 7, 6)
    y, where = ft.MaxPool2d(2, return_indices=True)(x)
    assert torch.equal(ft.MaxUnpool2d(2)(y, where, (7, 6)), nn.MaxUnpool2d(2)(y, where, (7, 6)))
    layer = ft.ConvTranspose2d(2, 3, 3, stride=2)
    assert layer(x, output_size=(16, 14)).shape == (1, 3, 16, 14)


# --- convert and revert ----------------------------------------------------------------------------------------


class Odd(nn.Conv2d):
    """A user's own layer."""


def mixed():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Sequential(nn.MaxPool2d(2), Odd(4, 4, 3)), nn.LPPool2d(2, 2), nn.Flatten()
    )


def test_convert_swaps_in_place_and_reports():
    model, x = mixed(), image(2, 1, 12, 12)
    seen, before, layer = [], model(x), model[0]
    layer.register_forward_hook(lambda *a: seen.append(a))
    state = model.state_dict()
    done = ft.convert(model, algorithm="direct", precision="high")
    assert done.swapped == [("0", "Conv2d"), ("1.0", "MaxPool2d"), ("2", "LPPool2d")]
    assert [name for name, *_ in done.left] == ["1.1"]
    assert "1.1: Odd, left: its class is one of its own" in str(done)
    assert layer is model[0]
    assert (layer.algorithm, layer.precision) == ("direct", "high")
    torch.testing.assert_close(model(x), before)
    assert len(seen) == 1
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values()))
    assert ft.convert(model).swapped == done.swapped
    assert layer.algorithm == "auto"
    ft.revert(model)
    assert [type(m) for m in (layer, model[1][0], model[2])] == [nn.Conv2d, nn.MaxPool2d, nn.LPPool2d]
    assert not hasattr(layer, "algorithm")
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("power", [2, 4.0, 3, 1.5])
def test_a_model_and_a_block_leave_the_same_norms(power):
    model, x = nn.Sequential(nn.LPPool1d(power, 2), nn.LPPool1d(power, 3, 1, ceil_mode=True)), image(1, 2, 12).abs()
    with ft.enabled() as block:
        wanted = model(x)
    done, whole = ft.convert(model), power % 2 == 0
    assert bool(done.swapped) == bool(block.routed) == whole
    assert bool(done.left) == bool(block.left) == (not whole)
    assert {reason for *_, reason in done.left} == {reason for _, reason in block.left}
    torch.testing.assert_close(model(x), wanted)


def test_revert_tells_what_it_left():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.MaxPool2d(2), ft.Conv2d(2, 2, 1), nn.ReLU())
    ft.convert(model)
    nn.utils.parametrizations.weight_norm(model[1])
    model.append(type("Own", (ft.Conv2d,), {})(2, 2, 3))
    done = ft.revert(model)
    assert done.swapped == [("0", "Conv2d"), ("2", "MaxPool2d"), ("3", "Conv2d")]
    assert str(done).splitlines()[-2:] == [
        "1: ParametrizedConv2d, left: its class is made of fastconv's: remove its parametrizations first",
        "5: Own, left: its class is made of fastconv's",
    ]
    nn.utils.parametrize.remove_parametrizations(model[1], "weight")
    assert [name for name, _ in ft.revert(model).swapped] == ["1"]
    assert type(model[1]) is nn.Conv2d


def test_convert_leaves_what_the_algorithm_cannot_do():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, stride=2), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3).to("meta"))
    done = ft.convert(model, algorithm="winograd")
    assert [name for name, _ in done.swapped] == ["1"]
    assert "tiles need stride 1, not 2" in done.left[0][2]
    assert "its weight is a tensor on meta; there are no kernels for it yet" in done.left[1][2]


def test_copies_and_pickles_of_modules():
    model, x = mixed(), image(2, 1, 12, 12)
    ft.convert(model, algorithm="im2col")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin[0]) is ft.Conv2d
        assert twin[0].algorithm == "im2col"
        assert torch.equal(twin(x), model(x))


def test_a_converted_model_compiles_without_graph_breaks():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 25, 3)).double()
    x, y = image(2, 1, 12, 12, dtype="float64"), torch.tensor([0, 2])

    def gradients(function):
        return torch.autograd.grad(F.cross_entropy(function(x), y), list(model.parameters()))

    wanted = gradients(model)
    ft.convert(model)
    for found, expected in zip(gradients(torch.compile(model, fullgraph=True, backend="aot_eager")), wanted):
        torch.testing.assert_close(found, expected)


# --- enabled ---------------------------------------------------------------------------------------------------


def test_enabled_routes_functions_and_modules_and_counts():
    x, w = image(2, 4, 8, 8), image(4, 4, 3, 3).requires_grad_()
    y, where = F.max_pool2d(x, 2, return_indices=True)
    calls = {
        "conv2d": lambda: F.conv2d(x, w, None, 1, "same"),
        "conv_transpose2d": lambda: F.conv_transpose2d(x, w, stride=2, groups=1),
        "convolution": lambda: torch.convolution(x, w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
        "max_pool2d": lambda: F.max_pool2d(x, 2, ceil_mode=True),
        "max_pool2d_with_indices": lambda: F.max_pool2d(x, 2, return_indices=True)[1],
        "max_unpool2d": lambda: F.max_unpool2d(y, where, 2),
        "avg_pool1d": lambda: F.avg_pool1d(x[0], 3, 1, 1),
        "avg_pool2d": lambda: nn.AvgPool2d(2)(x),
        "adaptive_avg_pool2d": lambda: nn.AdaptiveAvgPool2d(1)(x),
        "adaptive_max_pool1d": lambda: torch.adaptive_max_pool1d(x[0], 3)[1],
        "adaptive_max_pool2d": lambda: F.adaptive_max_pool2d(x, (3, 5)),
        "lp_pool2d": lambda: F.lp_pool2d(x, 2, 2),
    }
    for name, call in calls.items():
        wanted = call()
        with ft.enabled() as found:
            result = call()
        torch.testing.assert_close(result, wanted)
        assert dict(found.routed) == {name: 1}, name
        assert "fastconv" in found.report()
        assert str(found) == found.report()
        if result.requires_grad:
            assert "Fastconv" in type(result.grad_fn).__name__
            torch.testing.assert_close(*(torch.autograd.grad(t.sin().sum(), w)[0] for t in (result, wanted)))


def test_blocks_count_what_those_inside_them_computed():
    x, w = image(1, 2, 8, 8), image(2, 2, 3, 3)
    with ft.enabled() as outer:
        F.conv2d(x, w)
        with ft.enabled(algorithm="winograd") as inner:
            F.conv2d(x, w)
            with inner:
                F.conv2d(x, w)
            # The inner one leaves it to the outer one.
            F.conv2d(x, w, stride=2)
            # Both leave it.
            F.conv2d(torch.complex(x, x), torch.complex(w, w))
        F.max_pool2d(x, 2)
        with inner:
            F.conv2d(x, w)
    assert dict(inner.routed) == {"conv2d": 3}
    assert sum(inner.left.values()) == 2
    assert dict(outer.routed) == {"conv2d": 5, "max_pool2d": 1}
    assert sum(outer.left.values()) == 1


def test_what_is_unsupported_falls_through_and_is_counted():
    x, w = image(1, 2, 8, 8), image(2, 2, 3, 3).requires_grad_()
    with ft.enabled(algorithm="winograd") as found:
        F.conv2d(x, w, stride=2).sum().backward()
        assert F.conv2d(torch.complex(x, x), torch.complex(w, w)).is_complex()
        F.lp_pool2d(x, 3, 2)
        with pytest.raises(RuntimeError, match="expected input"):
            F.conv2d(x[:, :1], w)
    assert not found.routed
    assert sum(found.left.values()) == 4
    for reason in ("tiles need stride 1", "complex64", "leaves out the absolute value", "channels"):
        assert reason in found.report()


def test_what_only_pytorch_refuses_is_refused():
    x, w = image(1, 2, 8, 8), image(2, 2, 3, 3)
    calls = {
        "same": lambda: F.conv2d(x, w, stride=2, padding="same"),
        "full": lambda: F.conv2d(x, w, padding="full"),
        "pairs": lambda: F.conv2d(x, w, padding=((1, 0), (0, 1))),
        "transposed": lambda: F.conv_transpose2d(x, w, padding="same"),
        "no batch": lambda: torch.convolution(x[0], w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
        "maxima": lambda: F.max_pool2d(x, 2, padding="same"),
        "averages": lambda: F.avg_pool2d(x, 2, padding=((1, 0), (0, 1))),
        "unpooled": lambda: F.max_unpool2d(x, torch.zeros(x.shape, dtype=torch.int64), 2, padding="valid"),
    }
    for name, call in calls.items():
        with ft.enabled() as found, pytest.raises((RuntimeError, TypeError)):
            call()
        assert not found.routed, name


# PyTorch's own.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_autocast_reaches_what_pytorchs_does():
    x, w, places = image(2, 1, 2, 8, 8), image(2, 2, 3, 3), torch.arange(8)[None]
    calls = {
        "convolution": lambda: torch.convolution(x[0], w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
        "of each image": lambda: torch.func.vmap(lambda x: F.conv2d(x, w))(x),
        "of each volume": lambda: torch.func.vmap(lambda x: F.max_pool3d(x, 2))(x.bfloat16()),
        "unpooled": lambda: torch.func.vmap(lambda x: F.max_unpool1d(x, places, 2))(x[0, 0, :, :1].bfloat16()),
        "gradient of each": lambda: torch.func.vmap(torch.func.grad(lambda x: F.conv2d(x, w).float().pow(2).sum()))(x),
    }
    with torch.autocast("cpu", torch.bfloat16):
        for call in calls.values():
            wanted = call()
            with ft.enabled() as found:
                torch.testing.assert_close(call(), wanted, rtol=0.05, atol=0.3)
            assert found.routed


# PyTorch's own, of its quantised tensors.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_tensors_of_other_kinds_fall_through():
    x, w = image(1, 2, 8, 8), image(3, 2, 3, 3)
    quantised = torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)
    both = torch.complex(x, x).conj(), torch.complex(w, w)
    calls = {
        "conjugate": lambda: F.conv2d(*both),
        "mkldnn": lambda: F.conv2d(x.to_mkldnn(), w).to_dense(),
        "quantised": lambda: F.max_pool2d(quantised, 2).dequantize(),
        "meta": lambda: torch.empty(F.conv2d(x.to("meta"), w.to("meta")).shape).zero_(),
        "8 bits": lambda: F.conv2d(x.to(torch.int8), w.to(torch.int8)),
    }
    for name, call in calls.items():
        with ft.enabled() as found:
            result = call()
        assert not found.routed, name
        torch.testing.assert_close(result, call())


# PyTorch's own, from the bottom of `torch.func.jvp`.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_forward_mode_is_routed():
    x, w = image(1, 2, 8, 8), image(3, 2, 3, 3)

    def function(x):
        return F.avg_pool2d(F.conv2d(x, w), 2).pow(3)

    def dual():
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x))).tangent

    for call in (dual, lambda: torch.func.jvp(function, (x,), (x,)), lambda: torch.func.hessian(function)(x[..., :4])):
        with ft.enabled() as found:
            result = call()
        torch.testing.assert_close(result, call())
        assert not found.left


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_traced_models_compute_the_same():
    model, x = nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2)), image(2, 1, 12, 12)
    wanted = model(x)
    ft.convert(model)
    torch.testing.assert_close(torch.jit.trace(model, torch.ones(2, 1, 12, 12))(x), wanted)


class Calls(nn.Module):
    """Every kind of call that `torch.fx` sees: modules, functions, and one module with two arguments."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool, self.up = nn.Conv2d(1, 4, 3), nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
        self.out = nn.ConvTranspose2d(4, 2, 2, bias=False)

    def forward(self, x):
        y, where = self.pool(F.relu(self.conv(x)))
        return self.out(self.up(y, where, output_size=[10, 10]), output_size=[11, 11])


def test_symbolic_traces_have_modules_as_leaves():
    model, x = Calls(), image(2, 1, 12, 12)
    wanted = model(x)
    ft.convert(model, algorithm="direct")
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["conv", "pool", "up", "out"]
    assert type(traced.conv) is ft.Conv2d
    assert traced.conv.algorithm == "direct"
    torch.testing.assert_close(traced(x), wanted)
    assert traced.state_dict().keys() == model.state_dict().keys()


def test_symbolic_traces_have_functions_as_calls():
    def network(x, w):
        y = ft.max_pool2d(ft.conv2d(x, weight=w, padding=1), 2)
        return ft.fold(ft.unfold(y, 2), (6, 6), 2)

    x, w = image(2, 1, 12, 12), image(4, 1, 3, 3)
    traced = torch.fx.symbolic_trace(network)
    names = [n.target for n in traced.graph.nodes if n.op == "call_function"]
    assert names == [ft.conv2d, ft.max_pool2d, ft.unfold, ft.fold]
    torch.testing.assert_close(traced(x, w), network(x, w))


# PyTorch's own.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_scripts_are_refused_with_what_to_do_instead():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2))
    ft.convert(model)
    with pytest.raises(
        fastconv.UnsupportedError, match=r"cannot compile Conv2d of fastconv.torch: use torch\.jit\.trace"
    ):
        torch.jit.script(model)
    ft.revert(model)
    torch.jit.script(model)
    for function in (ft.conv2d, ft.max_pool1d, ft.unfold):
        with pytest.raises(
            RuntimeError, match=rf"cannot compile {function.__name__} of fastconv.torch: use torch\.jit\."
        ):
            torch.jit.script(function)


def test_convert_changes_nothing_in_what_it_leaves():
    model = nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 4, 3))
    before = copy.deepcopy(model.state_dict())
    assert ft.convert(model).left
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))


def test_the_backward_pass_stays_fastconvs_outside_the_block():
    x, w = image(1, 2, 8, 8), image(2, 2, 3, 3).requires_grad_()
    with ft.enabled():
        y = F.max_pool2d(F.conv2d(x, w), 2)
    y.sum().backward()
    outside = F.conv2d(x, w)
    assert "Fastconv" not in type(outside.grad_fn).__name__
    torch.testing.assert_close(w.grad, torch.autograd.grad(F.max_pool2d(outside, 2).sum(), w)[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_converted_model_may_compute_its_forward_pass_again(reentrant):
    model, x = mixed(), image(2, 1, 12, 12).requires_grad_()
    (wanted,) = torch.autograd.grad(model(x).sum(), x)
    ft.convert(model)
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    torch.testing.assert_close(x.grad, wanted)


@pytest.mark.parametrize("inside", [True, False])
def test_a_block_computes_again_what_it_computed(inside):
    """`torch.utils.checkpoint` compares what the two passes save, and PyTorch's pools save other tensors."""
    pools = nn.MaxPool2d(2), nn.AvgPool2d(2), nn.LPPool2d(2, 2), nn.AdaptiveMaxPool2d(7), nn.AdaptiveAvgPool2d(6)
    for pool in pools:
        model = nn.Sequential(nn.Conv2d(1, 4, 3), pool, nn.ReLU(), nn.Conv2d(4, 2, 3))
        x = image(2, 1, 18, 18).requires_grad_()
        (wanted,) = torch.autograd.grad(model(x).exp().sum(), x)
        with ft.enabled() as outer, ft.enabled() as found:
            loss = checkpoint(model, x, use_reentrant=False).exp().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        torch.testing.assert_close(x.grad, wanted)
        # It stops when all is saved, in the last one.
        assert found.routed["conv2d"] == 3
        assert not found.left
        assert not outer.left


def test_a_block_in_a_checkpoint_is_entered_again_by_it_alone():
    blocks, pool = [], nn.MaxPool2d(2)

    def model(x):
        with ft.enabled() as found:
            y = F.conv2d(x, w)
        blocks.append(found)
        return checkpoint(lambda y: F.relu(pool(y)).exp(), pool(y), use_reentrant=False).sum()

    x, w = image(1, 1, 12, 12).requires_grad_(), image(2, 1, 3, 3)
    (wanted,) = torch.autograd.grad(model(x), x)
    (found,) = torch.autograd.grad(checkpoint(model, x, use_reentrant=False), x)
    torch.testing.assert_close(found, wanted)
    assert all(block.routed == {"conv2d": 1} for block in blocks)


def test_a_block_is_its_threads_alone_and_threads_work_at_once():
    model, x = mixed(), image(2, 1, 12, 12)
    wanted, results = model(x), {}

    def work(i, block):
        with torch.no_grad():
            if block:
                with ft.enabled() as found:
                    results[i] = [model(x) for _ in range(5)], found.routed["conv2d"]
            else:
                results[i] = [model(x) for _ in range(5)], 0

    threads = [threading.Thread(target=work, args=(i, i % 2)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, (outputs, routed) in results.items():
        assert routed == 10 * (i % 2)
        for y in outputs:
            torch.testing.assert_close(y, wanted)


@pytest.mark.parametrize("power", ["2", torch.tensor(2), torch.tensor(3.0)], ids=repr)
def test_norms_that_pytorch_makes_numbers_of(power):
    model, x = nn.Sequential(nn.Conv2d(1, 2, 3), nn.LPPool2d(power, 2), nn.Conv2d(2, 2, 2)), image(1, 1, 9, 9)
    expected = model(x)
    done = ft.convert(model)
    assert len(done.swapped) == (2 if float(power) % 2 else 3)
    torch.testing.assert_close(model(x), expected, equal_nan=True)


def test_enabled_checks_its_arguments():
    with pytest.raises(fastconv.ArgumentError, match="algorithm must be one of"):
        ft.enabled(algorithm="quick")
    with pytest.raises(fastconv.ArgumentError, match="precision must be one of"):
        ft.enabled(precision="most")
    with pytest.raises(fastconv.ArgumentTypeError, match=r"call the model inside the block, or use convert\(model\)"):
        ft.enabled(nn.Conv2d(1, 1, 1))
    with pytest.raises(fastconv.ArgumentTypeError, match=r"model must be a torch\.nn\.Module, not <class"):
        ft.convert(nn.Conv2d)


def test_enabled_counts_what_fastconv_has_none_of():
    x = image(2, 4, 8, 8)
    with ft.enabled() as found:
        nn.FractionalMaxPool2d(2, 3)(x)
        F.fractional_max_pool2d(x, 2, 3, return_indices=True)
        torch.conv_tbc(image(5, 2, 3), image(3, 3, 4), image(4))
    assert not found.routed
    names = ["conv_tbc", "fractional_max_pool2d", "fractional_max_pool2d_with_indices"]
    assert found.left == {(name, "fastconv has none"): 1 for name in names}


# --- data loaders ----------------------------------------------------------------------------------------------


class Convolved(torch.utils.data.Dataset):
    """Images that are convolved when they are asked for: in the workers."""

    def __init__(self):
        self.layer = ft.Conv2d(1, 2, 3)
        self.images = image(6, 1, 8, 8)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        with torch.no_grad():
            return self.layer(self.images[i])


@pytest.mark.parametrize("method", ["fork", "spawn"])
# After the parent's threads have started, which is what a training loop does; PyTorch warns of the very thing.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_of_data_loaders(method):
    data = Convolved()
    with torch.no_grad():
        wanted = data.layer(data.images)
    loader = torch.utils.data.DataLoader(data, 3, num_workers=1, multiprocessing_context=method)
    torch.testing.assert_close(torch.cat(list(loader)), wanted)


# --- networks --------------------------------------------------------------------------------------------------


def lenet():
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10),
    ), (4, 1, 28, 28)  # fmt: skip


def mnist():
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 64), nn.ReLU(), nn.Linear(64, 10),
    ), (4, 1, 28, 28)  # fmt: skip


def fashion():
    def block(c, k):
        return [nn.Conv2d(c, k, 3, padding="same"), nn.ReLU(), nn.Conv2d(k, k, 3, padding="same"), nn.ReLU()]

    return nn.Sequential(
        nn.Conv2d(1, 8, 7, padding="same"), nn.ReLU(), nn.MaxPool2d(2), *block(8, 16), nn.MaxPool2d(2), *block(16, 32),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(288, 10),
    ), (4, 1, 28, 28)  # fmt: skip


class Residual(nn.Module):
    def __init__(self, c, k, stride):
        super().__init__()
        self.a, self.b = nn.Conv2d(c, k, 3, stride, 1, bias=False), nn.Conv2d(k, k, 3, 1, 1, bias=False)
        self.na, self.nb, self.short = nn.BatchNorm2d(k), nn.BatchNorm2d(k), nn.Conv2d(c, k, 1, stride)

    def forward(self, x):
        return F.relu(self.nb(self.b(F.relu(self.na(self.a(x))))) + self.short(x))


def resnet():
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(3, 2, 1), Residual(8, 8, 1), Residual(8, 16, 2)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)), (4, 3, 16, 16)


def mobilenet():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.ReLU6(),
        nn.Conv2d(16, 24, 1), nn.BatchNorm2d(24), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    ), (4, 3, 16, 16)  # fmt: skip


def vgg():
    layers, c = [], 3
    for k in (8, "M", 16, "M", 32, 32, "M", 64, 64, "M", 64, 64, "M"):
        layers += [nn.MaxPool2d(2)] if k == "M" else [nn.Conv2d(c, k, 3, padding=1), nn.ReLU()]
        c = c if k == "M" else k
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 10)), (2, 3, 32, 32)


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.bottom = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(16, 10, 3, padding=1)

    def forward(self, x):
        first = F.relu(self.down(x))
        second = F.relu(self.bottom(F.max_pool2d(first, 2)))
        return self.out(torch.cat([first, self.up(second)], 1)).mean((2, 3))


NETWORKS = {f.__name__: f for f in (lenet, mnist, fashion, resnet, mobilenet, vgg)}
NETWORKS["unet"] = lambda: (UNet(), (2, 1, 16, 16))


def train(model, x, labels, steps=3):
    """Return the losses, and the last step's gradients."""
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_train_as_with_pytorch(name):
    torch.manual_seed(0)
    model, shape = NETWORKS[name]()
    # Float64 decides near ties of maxima the same way on both sides.
    model, x = model.double(), image(*shape, dtype="float64")
    labels = torch.arange(shape[0]) % 10
    twins = [copy.deepcopy(model) for _ in range(2)]
    wanted = train(model, x, labels)
    with ft.enabled() as found:
        results = [train(twins[0], x, labels)]
    assert not found.left
    assert not ft.convert(twins[1]).left
    results.append(train(twins[1].to(memory_format=torch.channels_last), x, labels))
    for losses, grads in results:
        assert losses == pytest.approx(wanted[0], rel=1e-9)
        for parameter, grad in grads.items():
            torch.testing.assert_close(grad, wanted[1][parameter], rtol=1e-6, atol=1e-9, msg=parameter)


def test_a_network_trains_in_float32_within_rounding():
    torch.manual_seed(0)
    model, shape = mnist()
    x, labels, twin = image(*shape), torch.arange(4), copy.deepcopy(model)
    wanted = train(model, x, labels, 1)
    with ft.enabled():
        found = train(twin, x, labels, 1)
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    for name, grad in found[1].items():
        torch.testing.assert_close(grad, wanted[1][name], rtol=1e-3, atol=1e-5)


def test_what_convert_returns_is_not_the_model():
    done = ft.convert(nn.Sequential(nn.Conv2d(1, 2, 3)))
    with pytest.raises(
        AttributeError, match="convert and revert change the model in place and return what they did, which has no"
    ):
        done.parameters()
    assert copy.deepcopy(done) == done
