"""Layers: gradients checked numerically, values and gradients compared with torch.nn from the same state dict."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from nn_support import check_layer, vary
from support import normal

import fastconv
from fastconv import nn
from fastconv.ops.masks import masked


@dataclass(frozen=True)
class Case:
    """A layer of both libraries, by name, and an input channels-first."""

    name: str
    args: tuple[Any, ...]
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}{self.args}{self.options or ''}"

    def ours(self, **more: Any) -> nn.Module:
        return getattr(nn, self.name)(*self.args, **self.options, **more).double()

    def theirs(self) -> torch.nn.Module:
        return getattr(torch.nn, self.name)(*self.args, **self.options).double()


WEIGHTED = (
    Case("Conv1d", (4, 6, 3), (2, 4, 11), {"stride": 2, "padding": 1, "groups": 2}),
    Case("Conv2d", (3, 4, 3), (2, 3, 7, 8)),
    Case("Conv2d", (4, 4, (3, 2), 2, (1, 0), (1, 2), 2), (2, 4, 9, 8)),
    Case("Conv2d", (2, 3, 3), (1, 2, 6, 5), {"padding": "same", "bias": False}),
    Case("Conv2d", (2, 3, 5), (1, 2, 6, 7), {"padding": 2, "padding_mode": "reflect"}),
    Case("Conv3d", (2, 3, (1, 3, 2)), (2, 2, 3, 5, 6), {"padding": (0, 1, 1)}),
    Case("ConvTranspose1d", (3, 4, 4, 3, 1, 1), (2, 3, 5)),
    Case("ConvTranspose2d", (4, 6, 3), (2, 4, 4, 5), {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2}),
    Case("ConvTranspose3d", (2, 3, 2), (1, 2, 3, 2, 4), {"stride": 2, "bias": False, "dilation": 2}),
    Case("Linear", (5, 3), (4, 5)),
    Case("Linear", (5, 3), (2, 4, 5), {"bias": False}),
)
POOLS = (
    Case("MaxPool1d", (3, 2, 1), (2, 3, 12)),
    Case("MaxPool2d", (2,), (2, 3, 7, 8)),
    Case("MaxPool2d", (3, 2, 1), (2, 3, 8, 9), {"dilation": 2, "ceil_mode": True}),
    Case("MaxPool3d", ((1, 2, 2),), (2, 3, 3, 4, 5)),
    Case("AvgPool1d", (3, 2, 1), (2, 3, 12)),
    Case("AvgPool2d", (3, 2, 1, True, False), (2, 3, 8, 9)),
    Case("AvgPool2d", (2,), (2, 3, 6, 4), {"divisor_override": 3}),
    Case("AvgPool3d", (2,), (2, 3, 4, 4, 5)),
    Case("AdaptiveAvgPool1d", (4,), (2, 3, 11)),
    Case("AdaptiveAvgPool2d", ((3, None),), (2, 3, 7, 5)),
    Case("AdaptiveAvgPool3d", (1,), (2, 3, 4, 5, 6)),
    Case("AdaptiveMaxPool1d", (4,), (2, 3, 11)),
    Case("AdaptiveMaxPool2d", (3,), (2, 3, 7, 5)),
    Case("AdaptiveMaxPool3d", (2,), (2, 3, 4, 5, 6)),
)
NORMS = (
    Case("BatchNorm1d", (3,), (5, 3)),
    Case("BatchNorm1d", (3,), (4, 3, 6), {"momentum": None}),
    Case("BatchNorm2d", (3,), (4, 3, 5, 6), {"eps": 1e-3, "momentum": 0.3}),
    Case("BatchNorm2d", (3,), (4, 3, 5, 6), {"affine": False}),
    Case("BatchNorm2d", (3,), (4, 3, 5, 6), {"track_running_stats": False}),
    Case("BatchNorm3d", (2,), (3, 2, 2, 3, 4)),
)
ELEMENTWISE = (
    Case("ReLU", (), (3, 4, 5)),
    Case("LeakyReLU", (), (3, 4, 5)),
    Case("LeakyReLU", (0.3,), (3, 4)),
    Case("Sigmoid", (), (3, 4, 5)),
    Case("Tanh", (), (3, 4)),
    Case("Softmax", (1,), (3, 4, 5)),
    Case("Softmax", (), (3, 4), {"dim": -1}),
    Case("Flatten", (), (3, 4, 5, 2)),
    Case("Flatten", (0, 1), (3, 4, 5)),
    Case("Identity", (), (3, 4)),
)
EVERY = (*WEIGHTED, *POOLS, *NORMS, *ELEMENTWISE)
# Layers that take data_format, with axes to move; a size of None is that of the format's own axis.
FORMATTED = tuple(
    case
    for case in EVERY
    if case.name.rstrip("123d").endswith(("Conv", "Transpose", "Pool", "Norm"))
    and len(case.shape) > 2
    and case.args != ((3, None),)
)


def last(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(x, 1, -1))


def first(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, -1, 1)


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_gradients_agree_with_finite_differences(case):
    layer = case.ours()
    vary(layer)
    check_layer(layer, normal(case, "x", shape=case.shape))


@pytest.mark.parametrize("case", FORMATTED, ids=str)
def test_channels_last_is_channels_first_with_its_axes_moved(case):
    one, other = case.ours(), case.ours(data_format="channels_last")
    vary(one)
    other.load_state_dict(one.state_dict())
    x = normal(case, "x", shape=case.shape)
    y, z = one(x), other(last(x))
    np.testing.assert_allclose(first(z), y, rtol=1e-10, atol=1e-12)
    grad = normal(case, "grad", shape=y.shape)
    np.testing.assert_allclose(first(other.backward(last(grad))), one.backward(grad), rtol=1e-10, atol=1e-12)
    for a, b in zip(one.parameters(), other.parameters()):
        np.testing.assert_allclose(a.grad, b.grad, rtol=1e-10, atol=1e-12)
    assert other.output_shape(last(x).shape) == z.shape


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_values_gradients_and_state_are_those_of_torch(case, training):
    ours, theirs = case.ours().train(training), case.theirs().train(training)
    vary(ours)
    if case.name.startswith("BatchNorm"):
        for name in ("running_mean", "running_var"):
            if getattr(ours, name) is not None:
                getattr(ours, name)[...] = np.abs(normal(name, shape=(case.args[0],)))
    theirs.load_state_dict({name: torch.from_numpy(array) for name, array in ours.state_dict().items()})
    x = normal(case, "x", shape=case.shape)
    tensor = torch.from_numpy(x.copy()).requires_grad_()
    y, expected = ours(x), theirs(tensor)
    np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-10, atol=1e-12)
    assert ours.output_shape(x.shape) == y.shape
    state = ours.state_dict()
    assert set(state) == set(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        np.testing.assert_allclose(state[name], value.numpy(), rtol=1e-12, err_msg=name)
        assert state[name].shape == tuple(value.shape)
    if not training:
        return
    y = ours(x)
    grad = normal(case, "grad", shape=y.shape)
    expected.backward(torch.from_numpy(grad))
    np.testing.assert_allclose(ours.backward(grad), tensor.grad.numpy(), rtol=1e-9, atol=1e-11)
    for (name, mine), (_, parameter) in zip(ours.named_parameters(), theirs.named_parameters()):
        np.testing.assert_allclose(mine.grad, parameter.grad.numpy(), rtol=1e-9, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_inputs_and_gradients_are_not_modified(case):
    layer = case.ours()
    x = normal(case, "x", shape=case.shape)
    before = x.copy()
    y = layer(x)
    grad = normal(case, "grad", shape=y.shape)
    grad_before = grad.copy()
    layer.backward(grad)
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(grad, grad_before)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "sigmoid", "tanh"])
@pytest.mark.parametrize("make", [
    lambda **how: (nn.Conv2d(2, 3, 3, **how), (2, 2, 5, 6)),
    lambda **how: (nn.ConvTranspose1d(2, 3, 3, stride=2, **how), (2, 2, 5)),
    lambda **how: (nn.Linear(4, 3, **how), (5, 4)),
], ids=["Conv2d", "ConvTranspose1d", "Linear"])  # fmt: skip
def test_a_fused_activation_is_the_layer_and_the_activation_behind_it(make, activation):
    layer, shape = make(activation=activation, dtype="float64")
    plain, _ = make(dtype="float64")
    plain.load_state_dict(layer.state_dict())
    behind = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}[activation]
    apart = nn.Sequential(plain, behind())
    x = normal("x", shape=shape)
    y = layer(x)
    np.testing.assert_allclose(y, apart(x), rtol=1e-12)
    grad = normal("grad", shape=y.shape)
    np.testing.assert_allclose(layer.backward(grad), apart.backward(grad), rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(layer.weight.grad, plain.weight.grad, rtol=1e-11, atol=1e-13)
    check_layer(layer, x)


def test_a_relu_passes_nothing_of_an_infinite_gradient_where_its_output_is_zero():
    layer = nn.ReLU()
    layer(np.array([-1.0, 0.0, 2.0], np.float32))
    grad = layer.backward(np.array([np.inf, np.nan, np.inf], np.float32))
    np.testing.assert_array_equal(grad, [0, 0, np.inf])


def test_a_relu_in_place_writes_over_its_input():
    x = np.array([-1.0, 2.0])
    assert nn.ReLU(inplace=True)(x) is x
    np.testing.assert_array_equal(x, [0, 2])
    np.testing.assert_array_equal(nn.LeakyReLU(0.5, inplace=True)(np.array([-1.0, 2.0])), [-0.5, 2])


@pytest.mark.parametrize("layer", [nn.Sigmoid(), nn.Tanh(), nn.Softmax(1), nn.LeakyReLU()], ids=repr)
def test_extreme_inputs_neither_overflow_nor_warn(layer):
    x = np.array([[-1e4, 0.0, 1e4]], np.float32)
    y = layer(x)
    assert np.isfinite(y).all()
    assert np.isfinite(layer.backward(np.ones_like(x))).all()


def test_dropout_drops_its_share_keeps_the_mean_and_rests_in_evaluation():
    layer = nn.Dropout(0.3, rng=0)
    x = np.ones((200, 500), np.float32)
    y = layer(x)
    kept = y != 0
    assert abs(kept.mean() - 0.7) < 0.01
    np.testing.assert_allclose(y[kept], 1 / 0.7, rtol=1e-6)
    grad = layer.backward(np.full_like(x, 2))
    np.testing.assert_allclose(grad, 2 * y)
    assert (layer(x) != y).any()
    layer.eval()
    assert layer(x) is x
    np.testing.assert_array_equal(layer.backward(x), x)
    assert not nn.Dropout(1.0)(x).any()
    np.testing.assert_array_equal(nn.Dropout(0.0)(x), x)


def test_dropout_has_the_gradient_of_its_mask():
    layer = nn.Dropout(0.4, rng=0)

    def before():
        layer.rng = np.random.default_rng(7)

    check_layer(layer, normal("x", shape=(6, 7)), before)


def test_dropout_in_place_writes_over_its_input():
    x = np.ones(100)
    assert nn.Dropout(0.5, inplace=True, rng=1)(x) is x
    assert set(np.unique(x)) == {0.0, 2.0}


def test_batch_norm_frozen_in_evaluation_mode_passes_gradients():
    layer = nn.BatchNorm2d(3).double()
    vary(layer)
    layer.running_mean[...], layer.running_var[...] = [0.1, -0.2, 0.3], [1.5, 0.5, 2.0]
    layer.eval()
    before = layer.state_dict()
    check_layer(layer, normal("x", shape=(4, 3, 5, 6)))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        np.testing.assert_array_equal(layer.state_dict()[name], before[name])


def test_batch_norm_refuses_a_single_value_per_channel_in_training_only():
    layer = nn.BatchNorm1d(3)
    with pytest.raises(fastconv.ShapeError, match="more than one value per channel in training, not 1"):
        layer(np.ones((1, 3), np.float32))
    assert layer.eval()(np.ones((1, 3), np.float32)).shape == (1, 3)


def test_batch_norm_keeps_float32():
    for affine in (True, False):
        layer = nn.BatchNorm2d(3, affine=affine)
        y = layer(normal("x", shape=(4, 3, 2, 2), dtype="float32"))
        assert y.dtype == layer.backward(y).dtype == layer.running_var.dtype == np.float32
        assert layer.eval()(y).dtype == np.float32


def test_max_unpool_undoes_a_pool_that_returned_its_indices():
    pool, unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
    x = normal("x", shape=(2, 3, 6, 4))
    y, indices = pool(x)
    back = unpool(y, indices)
    expected = torch.nn.MaxUnpool2d(2)(torch.from_numpy(y), torch.from_numpy(indices)).numpy()
    np.testing.assert_array_equal(back, expected)
    grad = normal("grad", shape=back.shape)
    # One maximum in each window, and none is zero: its gradient comes back.
    np.testing.assert_array_equal(np.sort(unpool.backward(grad), axis=None), np.sort(grad[back != 0]))
    assert unpool(y, indices, output_size=(7, 5)).shape == (2, 3, 7, 5)


def test_a_transposed_convolution_takes_an_output_size():
    layer = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, dtype="float64")
    x = normal("x", shape=(1, 2, 4, 5))
    y = layer(x, output_size=(8, 9))
    assert y.shape == (1, 3, 8, 9)
    other = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=(1, 0), dtype="float64")
    other.load_state_dict(layer.state_dict())
    np.testing.assert_array_equal(y, other(x))
    np.testing.assert_allclose(layer.backward(y), other.backward(y))


@pytest.mark.parametrize("algorithm", ["direct", "im2col", "fft"])
def test_a_layer_computes_by_the_algorithm_it_names(algorithm):
    layer = nn.Conv2d(2, 3, 3, algorithm=algorithm, precision="high", rng=0)
    y = layer(normal("x", shape=(2, 2, 6, 6), dtype="float32"))
    layer.backward(y)
    layer.algorithm = "nonsense"
    with pytest.raises(fastconv.FastconvError, match="nonsense"):
        layer(y[:, :2])


@pytest.mark.parametrize(("make", "message"), [
    (lambda: nn.Conv2d(0, 3, 3), "in_channels must be at least 1, not 0"),
    (lambda: nn.Conv2d(3, 3, (3, 3, 3)), "kernel_size must be an integer or 2 integers"),
    (lambda: nn.Conv2d(3, 4, 3, groups=2), "groups=2 must divide in_channels=3 and out_channels=4"),
    (lambda: nn.Conv2d(3, 4, 3, activation="swish"), "activation must be None or one of .* not 'swish'"),
    (lambda: nn.Conv2d(3, 4, 3, dtype="int32"), "dtype must be one of .* not int32"),
    (lambda: nn.Conv2d(3, 4, 3, dtype="wrong"), "dtype must be one of .* not 'wrong'"),
    (lambda: nn.Conv2d(3, 4, 3, rng="x"), "rng must be .* not 'x'"),
    (lambda: nn.ConvTranspose2d(3, 4, 3, padding_mode="reflect"), "padding_mode must be 'zeros'"),
    (lambda: nn.MaxPool2d(0), "kernel_size must be"),
    (lambda: nn.Dropout(1.5), "p must be a probability between 0 and 1, not 1.5"),
    (lambda: nn.Linear(3, -1), "out_features must be at least 1, not -1"),
    (lambda: nn.Linear(3, 2)(np.ones((2, 4), np.float32)), r"x must have 3 features .* not shape \(2, 4\)"),
    (lambda: nn.Linear(3, 2)(np.ones((2, 3))), "x has dtype float64, but weight has float32"),
    (lambda: nn.BatchNorm2d(3)(np.ones((2, 4, 5, 5))), r"x must have 3 channels in dimension 1, not shape"),
    (lambda: nn.BatchNorm2d(3)(np.ones((2, 3))), r"x must have 4 dimensions, with the batch, not shape \(2, 3\)"),
    (lambda: nn.Flatten(1, 5)(np.ones((2, 3))), "start_dim=1 and end_dim=5 name no dimensions"),
])  # fmt: skip
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(fastconv.FastconvError, match=message):
        make()


def test_a_gradient_of_another_shape_is_refused():
    for layer, shape in (
        (nn.ReLU(), (2, 3)),
        (nn.Linear(3, 3), (2, 3)),
        (nn.BatchNorm1d(3), (2, 3)),
        (nn.Dropout(0.5), (2, 3)),
        (nn.Conv2d(1, 1, 1, activation="relu"), (2, 1, 3, 3)),
    ):
        layer(np.ones(shape, np.float32))
        with pytest.raises(fastconv.ShapeError, match="grad_output must have the output's shape"):
            layer.backward(np.ones((1, 1), np.float32))


def test_a_backward_without_a_forward_says_so():
    layer = nn.Conv2d(1, 1, 3)
    x = np.ones((1, 1, 4, 4), np.float32)
    for prepare in (lambda: None, lambda: layer.eval()(x), lambda: layer.train().backward(layer(x))):
        prepare()
        with pytest.raises(
            nn.BackwardError, match="backward of Conv2d needs a forward pass before it, in training mode"
        ):
            layer.backward(np.ones((1, 1, 2, 2), np.float32))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(3, 5), (64, 3, 19, 23)], ids=["few", "many"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_masks_choose_bits_and_so_keep_or_drop_nan_and_infinities(dtype, shape, order):
    rng = np.random.default_rng(0)
    values, mask = (
        np.asarray(rng.standard_normal(shape), dtype, order),
        np.asarray(rng.random(shape) < 0.5, order=order),
    )
    values[0, 0], values[1, 1] = np.nan, np.inf
    mask[0, 0], mask[1, 1] = (True, False) if order == "C" else (False, True)
    found = masked(values, mask)
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, np.where(mask, values, 0))
