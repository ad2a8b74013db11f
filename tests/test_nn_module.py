"""Modules: names and state dicts, containers, modes, seeds, initial values, summaries, files."""

import copy
import math
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from nn_support import check_layer, vary
from support import normal

import fastconv
from fastconv import nn


def small(dtype="float64"):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, dtype=dtype),
        nn.BatchNorm2d(4, dtype=dtype),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 5, dtype=dtype),
    )


def small_torch():
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(36, 5),
    ).double()


def mnist_network():
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, activation="relu"),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, activation="relu"),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, activation="relu"),
        nn.Flatten(),
        nn.Linear(576, 64, activation="relu"),
        nn.Linear(64, 10),
    )


# --- state ---


def test_a_torch_state_dict_of_the_same_network_loads_and_gives_the_same_output_and_gradients():
    theirs, ours = small_torch(), small()
    theirs(torch.from_numpy(normal("warm", shape=(3, 1, 6, 6))))
    ours.load_state_dict(theirs.state_dict())
    x = normal("x", shape=(3, 1, 6, 6))
    expected = theirs(torch.from_numpy(x))
    y = ours(x)
    np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-10)
    grad = normal("grad", shape=y.shape)
    expected.backward(torch.from_numpy(grad))
    assert ours.backward(grad, input_grad=False) is None
    for (name, mine), (their_name, parameter) in zip(ours.named_parameters(), theirs.named_parameters()):
        assert name == their_name
        np.testing.assert_allclose(mine.grad, parameter.grad.numpy(), rtol=1e-8, atol=1e-10)


def test_a_state_dict_loads_into_torch_in_its_order():
    theirs, ours = small_torch(), small()
    vary(ours)
    ours(normal("warm", shape=(3, 1, 6, 6)))
    state = ours.state_dict()
    assert list(state) == list(theirs.state_dict())
    theirs.load_state_dict({name: torch.as_tensor(array) for name, array in state.items()})
    x = normal("x", shape=(3, 1, 6, 6))
    expected = theirs.eval()(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(ours.eval()(x), expected, rtol=1e-10)
    assert state["1.num_batches_tracked"].dtype == np.int64
    assert int(state["1.num_batches_tracked"]) == 1


def test_a_state_dict_is_a_copy_and_loading_it_takes_no_reference():
    model = small()
    state = model.state_dict()
    state["0.weight"][...] = 0
    assert model[0].weight.data.any()
    model.load_state_dict(state)
    state["0.weight"][...] = 1
    assert not model[0].weight.data.any()


def test_a_state_dict_that_does_not_fit_is_refused_whole_with_every_reason():
    model = small()
    before = model.state_dict()
    wrong = {**before, "0.weight": np.zeros((4, 1, 5, 5)), "extra": np.zeros(1)}
    del wrong["5.bias"], wrong["1.running_mean"]
    message = (
        r"state_dict does not fit this Sequential: 0\.weight has shape \(4, 1, 5, 5\), expected \(4, 1, 3, 3\); "
        r"missing: 1\.running_mean, 5\.bias; unexpected: extra"
    )
    with pytest.raises(fastconv.ArgumentError, match=message):
        model.load_state_dict(wrong)
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])
    with pytest.raises(fastconv.ArgumentError, match=r"0\.weight has shape"):
        model.load_state_dict(wrong, strict=False)
    wrong["0.weight"] = np.ones((4, 1, 3, 3))
    model.load_state_dict(wrong, strict=False)
    np.testing.assert_array_equal(model[0].weight.data, 1)


def test_a_state_dict_of_something_else_is_refused():
    with pytest.raises(fastconv.ArgumentTypeError, match="state_dict must be a mapping of names to arrays, not list"):
        small().load_state_dict([1])
    with pytest.raises(fastconv.ArgumentTypeError, match=r"0\.weight must be a NumPy array"):
        small().load_state_dict({**small().state_dict(), "0.weight": "x"})


def test_loading_converts_the_dtype_of_half_precision_tensors_too():
    model = nn.Linear(2, 2)
    state = {"weight": torch.full((2, 2), 0.5, dtype=torch.bfloat16), "bias": torch.nn.Parameter(torch.ones(2))}
    model.load_state_dict(state)
    np.testing.assert_array_equal(model.weight.data, np.full((2, 2), 0.5, np.float32))
    assert model.weight.data.dtype == np.float32


def test_weights_are_saved_to_a_file_and_read_back(tmp_path):
    one, other = small(), small()
    vary(one)
    nn.save_weights(one, tmp_path / "model.npz")
    nn.load_weights(other, tmp_path / "model.npz")
    for name, array in one.state_dict().items():
        np.testing.assert_array_equal(other.state_dict()[name], array)
    assert [path.name for path in tmp_path.iterdir()] == ["model.npz"]
    (tmp_path / "wrong.npz").write_text("something else")
    with pytest.raises(fastconv.ArgumentError, match=r"wrong\.npz is not a file of weights"):
        nn.load_weights(other, tmp_path / "wrong.npz")


def test_copies_and_pickles_are_independent_and_equal():
    model = small()
    x = normal("x", shape=(2, 1, 6, 6))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        np.testing.assert_array_equal(twin(x), model(x))
        twin[0].weight.data += 1
        assert (twin(x) != model(x)).any()


# --- containers ---


def test_names_are_paths_and_an_ordered_dict_gives_its_own():
    model = nn.Sequential(OrderedDict(stem=nn.Conv2d(1, 2, 3), block=nn.Residual(nn.Sequential(nn.Conv2d(2, 2, 1)))))
    names = ["stem.weight", "stem.bias", "block.body.0.weight", "block.body.0.bias"]
    assert [name for name, _ in model.named_parameters()] == names
    assert model.stem is model[0]
    assert [name for name, _ in model.named_modules()] == [
        "",
        "stem",
        "block",
        "block.body",
        "block.body.0",
        "block.shortcut",
    ]


def test_a_sequential_is_a_list_whose_members_can_be_replaced():
    model = small()
    assert len(model) == 6
    assert isinstance(model[-1], nn.Linear)
    model[-1] = nn.Linear(36, 2)
    model.append(nn.Softmax(1))
    names = [name for name, _ in model.named_parameters()]
    assert names[-2:] == ["5.weight", "5.bias"]
    body = model[:4]
    assert body[0] is model[0]
    assert len(body) == 4
    with pytest.raises(fastconv.ArgumentTypeError, match="member 0 of Sequential must be a module, not 3"):
        nn.Sequential(3)
    with pytest.raises(fastconv.ArgumentTypeError, match="cannot be called 'forward'"):
        nn.Sequential({"forward": nn.ReLU()})


def test_an_empty_sequential_passes_everything_on():
    model, x = nn.Sequential(), np.ones((2, 3))
    assert model(x) is x
    assert model.backward(x) is x


@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_gradients_add_where_paths_meet(data_format):
    how = {"data_format": data_format, "dtype": "float64"}
    shape = (2, 3, 5, 6) if data_format == "channels_first" else (2, 5, 6, 3)
    inception = nn.Concat(
        nn.Conv2d(3, 2, 1, **how),
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, **how), nn.Tanh()),
        nn.Sequential(nn.AvgPool2d(3, 1, 1, data_format=data_format), nn.Conv2d(3, 1, 1, **how)),
        data_format=data_format,
    )
    model = nn.Sequential(
        nn.Residual(nn.Sequential(nn.Conv2d(3, 3, 3, padding="same", **how), nn.Sigmoid())),
        inception,
        nn.Residual(nn.Conv2d(7, 2, 3, 2, 1, **how), nn.Conv2d(7, 2, 1, 2, **how)),
    )
    x = normal("x", shape=shape)
    y = model(x)
    assert model.output_shape(shape) == y.shape == ((2, 2, 3, 3) if data_format == "channels_first" else (2, 3, 3, 2))
    check_layer(model, x)


def test_paths_that_do_not_fit_together_are_refused():
    block = nn.Residual(nn.Conv2d(3, 4, 1))
    for run in (lambda: block(np.ones((1, 3, 2, 2), np.float32)), lambda: block.output_shape((1, 3, 2, 2))):
        with pytest.raises(fastconv.ShapeError, match=r"body and shortcut of Residual must agree in shape"):
            run()


def test_a_backward_pass_goes_no_further_than_it_is_needed():
    model = small()
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    y = model(normal("x", shape=(3, 1, 6, 6)))
    assert model.backward(np.ones_like(y), input_grad=False) is None
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["5.weight", "5.bias"]
    y = model(normal("x", shape=(3, 1, 6, 6)))
    assert model.backward(np.ones_like(y)).shape == (3, 1, 6, 6)
    assert model[0].weight.grad is None


def test_the_first_layer_does_not_compute_the_gradient_of_its_input(monkeypatch):
    from fastconv.nn import convolution

    asked = []
    real = convolution.convNd_backward
    monkeypatch.setattr(
        convolution,
        "convNd_backward",
        lambda *args, needs, **how: asked.append(needs) or real(*args, needs=needs, **how),
    )
    model = nn.Sequential(nn.Identity(), nn.Conv2d(1, 2, 3), nn.Conv2d(2, 1, 3, bias=False))
    y = model(np.ones((1, 1, 6, 6), np.float32))
    model.backward(y, input_grad=False)
    assert asked == [["input", "weight"], ["weight", "bias"]]


def test_gradients_accumulate_until_they_are_forgotten():
    model = small()
    x = normal("x", shape=(3, 1, 6, 6))
    for times in (1, 2):
        y = model(x)
        model.backward(np.ones_like(y))
        if times == 1:
            once = {name: p.grad.copy() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.grad, 2 * once[name], rtol=1e-12)
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_train_and_eval_reach_every_member_and_eval_keeps_nothing():
    model = nn.Sequential(nn.Residual(nn.Sequential(nn.ReLU(), nn.Dropout())))
    assert all(module.training for module in model.modules())
    model.eval()
    assert not any(module.training for module in model.modules())
    y = model(np.ones((2, 3)))
    with pytest.raises(nn.BackwardError, match="needs a forward pass"):
        model.backward(y)


def test_a_parameter_in_two_places_counts_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert len(list(model.parameters())) == 3
    assert nn.summary(model, (3,)).total_params == 15


def test_apply_visits_every_module_and_representations_nest():
    seen = []
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding="same", algorithm="fft"), nn.Residual(nn.ReLU()))
    model.apply(lambda module: seen.append(type(module).__name__))
    assert seen == ["Conv2d", "ReLU", "Identity", "Residual", "Sequential"]
    assert repr(model) == (
        "Sequential(\n  (0): Conv2d(1, 2, kernel_size=(3, 3), stride=(1, 1), padding='same', algorithm='fft')\n"
        "  (1): Residual(\n    (body): ReLU()\n    (shortcut): Identity()\n  )\n)"
    )


# --- seeds and initial values ---


def test_identical_seeds_give_identical_networks_and_dropout():
    def run():
        model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
        return model(np.ones((5, 4), np.float32))

    nn.manual_seed(3)
    first, second = run(), run()
    nn.manual_seed(3)
    np.testing.assert_array_equal(run(), first)
    assert (first != second).any()
    np.testing.assert_array_equal(nn.Linear(3, 2, rng=5).weight.data, nn.Linear(3, 2, rng=5).weight.data)
    with pytest.raises(fastconv.ArgumentError, match="seed must be at least 0, not -1"):
        nn.manual_seed(-1)


@pytest.mark.parametrize(("ours", "theirs"), [
    (lambda: nn.Conv2d(16, 64, 3, groups=2, rng=0), lambda: torch.nn.Conv2d(16, 64, 3, groups=2)),
    (lambda: nn.ConvTranspose2d(16, 64, 3, rng=0), lambda: torch.nn.ConvTranspose2d(16, 64, 3)),
    (lambda: nn.Linear(200, 100, rng=0), lambda: torch.nn.Linear(200, 100)),
], ids=["Conv2d", "ConvTranspose2d", "Linear"])  # fmt: skip
def test_default_initial_values_are_spread_as_those_of_torch(ours, theirs):
    torch.manual_seed(0)
    ours, theirs = ours(), theirs()
    for mine, parameter in ((ours.weight, theirs.weight), (ours.bias, theirs.bias)):
        values = parameter.detach().numpy()
        assert mine.shape == values.shape
        assert mine.data.dtype == np.float32
        assert np.abs(mine.data).max() == pytest.approx(np.abs(values).max(), rel=0.1)
        assert mine.data.std() == pytest.approx(values.std(), rel=0.15)


@pytest.mark.parametrize(("function", "variance"), [
    (nn.init.glorot_uniform_, 2 / (48 * 9 + 96 * 9)),
    (nn.init.glorot_normal_, 2 / (48 * 9 + 96 * 9)),
    (nn.init.he_uniform_, 2 / (48 * 9)),
    (nn.init.he_normal_, 2 / (48 * 9)),
    (lambda w, rng: nn.init.kaiming_normal_(w, mode="fan_out", nonlinearity="relu", rng=rng), 2 / (96 * 9)),
    (lambda w, rng: nn.init.kaiming_uniform_(w, a=1.0, rng=rng), 1 / (48 * 9)),
    (lambda w, rng: nn.init.xavier_normal_(w, nn.init.gain("tanh"), rng=rng), (5 / 3) ** 2 * 2 / (48 * 9 + 96 * 9)),
])  # fmt: skip
def test_initial_values_have_the_variance_of_their_paper(function, variance):
    weight = np.empty((96, 48, 3, 3))
    assert function(weight, rng=0) is weight
    assert weight.var() == pytest.approx(variance, rel=0.03)
    assert abs(weight.mean()) < 3 * math.sqrt(variance / weight.size)


def test_gains_are_those_of_torch():
    for name in nn.init.NONLINEARITIES:
        assert nn.init.gain(name) == pytest.approx(
            torch.nn.init.calculate_gain(name, 0) if name == "leaky_relu" else torch.nn.init.calculate_gain(name)
        )
    with pytest.raises(fastconv.ArgumentError, match="nonlinearity must be one of"):
        nn.init.gain("swish")


def test_apply_initialises_weights_and_biases_and_leaves_normalisation_alone():
    model = small()
    nn.init.apply(model, weight=nn.init.ones_, bias=lambda p: nn.init.constant_(p, 2.0), rng=0)
    assert (model[0].weight.data == 1).all()
    assert (model[5].bias.data == 2).all()
    assert not model[1].bias.data.any()
    one, other = (nn.init.apply(small(), weight=nn.init.he_normal_, rng=4) for _ in range(2))
    np.testing.assert_array_equal(one[5].weight.data, other[5].weight.data)
    with pytest.raises(fastconv.ShapeError, match=r"a weight of shape \(4,\) has no fan_in"):
        nn.init.he_normal_(np.zeros(4))


# --- summary ---


def test_the_summary_of_the_mnist_network_has_the_figures_of_the_lectures():
    table = nn.summary(mnist_network(), (1, 28, 28))
    assert [row.parameters for row in table.rows if row.parameters] == [320, 18_496, 36_928, 36_928, 650]
    assert table.total_params == table.trainable_params == 93_322
    assert [row.output_shape[-1] for row in table.rows[:5]] == [26, 13, 11, 5, 3]
    assert table.rows[4].receptive_field == (18, 18)
    text = str(table)
    for part in ("Total params: 93,322", "4 (Conv2d)", "(N, 64, 3, 3)", "18x18", "18,496"):
        assert part in text
    assert repr(table) == text


def test_three_convolutions_without_pooling_see_seven_pixels():
    model = nn.Sequential(*(nn.Conv2d(1, 1, 3) for _ in range(3)))
    assert nn.summary(model, (1, 28, 28)).rows[-1].receptive_field == (7, 7)


def test_summaries_run_no_kernel(monkeypatch):
    from fastconv.ops import convolution

    monkeypatch.setattr(convolution, "runner", lambda device: pytest.fail("a kernel would run"))
    assert nn.summary(mnist_network(), (1, 28, 28)).flops == 2 * (
        26 * 26 * 32 * 9 + 11 * 11 * 64 * 32 * 9 + 3 * 3 * 64 * 64 * 9 + 576 * 64 + 640
    )


def test_summaries_reach_into_blocks_and_count_frozen_parameters():
    block = nn.Concat(nn.Conv2d(2, 3, 1), nn.Conv2d(2, 4, 5, padding=2))
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, 2), block, nn.Residual(nn.Conv2d(7, 7, 3, padding=1)), nn.BatchNorm2d(7),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 2),
    )  # fmt: skip
    model[0].requires_grad_(False)
    table = nn.summary(model, (1, 21, 21))
    assert [row.name for row in table.rows] == ["0", "1.0", "1.1", "2.body", "2.shortcut", "3", "4", "5", "6"]
    assert table.non_trainable_params == 20
    fields = {row.name: row.receptive_field for row in table.rows}
    assert fields["0"] == (3, 3)
    assert fields["1.1"] == (11, 11)
    assert fields["2.body"] == (15, 15)
    assert fields["4"] == (33, 33)
    assert fields["6"] is None
    assert model.flops((1, 1, 21, 21)) == table.flops


def test_summaries_of_other_kinds_of_networks():
    series = nn.Sequential(nn.Conv1d(2, 4, 3, dilation=2), nn.AvgPool1d(2), nn.ConvTranspose1d(4, 1, 2, 2), nn.Tanh())
    table = nn.summary(series, (2, 20))
    assert [row.output_shape for row in table.rows] == [(4, 16), (4, 8), (1, 16), (1, 16)]
    assert [row.receptive_field for row in table.rows] == [(5,), (6,), None, None]
    assert nn.summary(nn.Linear(3, 2), (3,)).rows[0].name == ""
    with pytest.raises(fastconv.ShapeError, match="has 2 channels, but weight"):
        nn.summary(mnist_network(), (2, 28, 28))
    with pytest.raises(fastconv.ArgumentError, match="input_shape must have at least one dimension"):
        nn.summary(series, ())


def test_the_shape_of_a_module_without_one_of_its_own_is_found_by_running_it():
    class Twice(nn.Module):
        def forward(self, x):
            return np.concatenate([x, x], axis=1)

    model = nn.Sequential(Twice(), nn.Linear(6, 2))
    assert nn.summary(model, (3,)).rows[0].output_shape == (6,)
    with pytest.raises(NotImplementedError, match="Twice has no backward"):
        Twice().backward(np.ones(1))


def test_a_module_of_ones_own_has_members_parameters_and_buffers():
    class Scale(nn.Module):
        buffer_names = ("calls",)

        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(np.array([2.0]))
            self.inner = nn.Linear(2, 2, dtype="float64")
            self.calls = np.zeros((), np.int64)

        def forward(self, x):
            self.calls += 1
            self.keep(inner := self.inner(x))
            return inner * self.factor.data

        def backward(self, grad_output, *, input_grad=True):
            inner = self.kept()
            self.factor.accumulate((grad_output * inner).sum(keepdims=True).reshape(1))
            return self.inner.backward(grad_output * self.factor.data, input_grad=input_grad)

    model = Scale()
    assert list(model.state_dict()) == ["factor", "calls", "inner.weight", "inner.bias"]
    check_layer(model, normal("x", shape=(3, 2)))
    assert int(model.state_dict()["calls"]) > 1
    assert model.float().factor.data.dtype == np.float32
    assert model.calls.dtype == np.int64


def test_names_that_nobody_knows_are_refused_where_the_layer_is_made():
    with pytest.raises(fastconv.ArgumentError, match=r"algorithm must be one of 'auto', .*, not 'gemm'"):
        nn.Conv2d(3, 4, 3, algorithm="gemm")
    with pytest.raises(fastconv.ArgumentError, match=r"precision must be one of 'highest', .*, not 'tf32'"):
        nn.ConvTranspose2d(3, 4, 3, precision="tf32")
