"""Optimisers and schedules: step by step as torch's."""

import numpy as np
import pytest
import torch
from support import normal

import fastconv
from fastconv import nn

OPTIMIZERS = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("RMSprop", {}),
    ("RMSprop", {"lr": 1e-3, "alpha": 0.9, "eps": 1e-7}),
    ("RMSprop", {"momentum": 0.8, "centered": True, "weight_decay": 0.01}),
    ("Adadelta", {}),
    ("Adadelta", {"lr": 0.5, "rho": 0.8, "weight_decay": 0.01}),
    ("Adam", {}),
    ("Adam", {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-4, "weight_decay": 0.01}),
    ("NAdam", {}),
    ("NAdam", {"lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0.01, "momentum_decay": 0.02}),
]


def parameters():
    return [nn.Parameter(normal("p", i, shape=shape)) for i, shape in enumerate([(3, 4), (5,)])]


def tensors():
    return [torch.from_numpy(p.data.copy()).requires_grad_() for p in parameters()]


def set_gradients(step, *groups):
    """Give parameters of either library the gradients of a step."""
    for group in groups:
        for i, p in enumerate(group):
            grad = normal("g", step, i, shape=tuple(p.shape))
            p.grad = torch.from_numpy(grad) if isinstance(p, torch.Tensor) else grad


@pytest.fixture
def double_by_default():
    """NAdam in torch keeps a product of its own in the default dtype, whatever that of the parameters."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double_by_default")
@pytest.mark.parametrize(("name", "options"), OPTIMIZERS)
def test_every_step_is_that_of_torch(name, options):
    mine, theirs = parameters(), tensors()
    ours, expected = getattr(nn, name)(mine, **options), getattr(torch.optim, name)(theirs, **options)
    for step in range(6):
        set_gradients(step, mine, theirs)
        ours.step()
        expected.step()
        for a, b in zip(mine, theirs):
            np.testing.assert_allclose(a.data, b.detach().numpy(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS)
def test_a_state_dict_continues_where_it_was_taken(name, options):
    mine, twins = parameters(), parameters()
    one, other = getattr(nn, name)(mine, **options), getattr(nn, name)(twins, lr=0.9)
    for step in range(5):
        if step == 2:
            other.load_state_dict(one.state_dict())
            for a, b in zip(mine, twins):
                b.data[...] = a.data
        set_gradients(step, mine)
        one.step()
        if step >= 2:
            set_gradients(step, twins)
            other.step()
    for a, b in zip(mine, twins):
        np.testing.assert_array_equal(a.data, b.data)
    assert repr(one) == repr(other)


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS)
def test_float32_parameters_stay_float32_and_gradients_are_not_changed(name, options):
    p = nn.Parameter(np.ones(4, np.float32))
    p.grad = np.full(4, 0.5, np.float32)
    optimizer = getattr(nn, name)([p], **options)
    optimizer.step()
    optimizer.step()
    assert p.data.dtype == np.float32
    assert (p.grad == 0.5).all()
    assert (p.data < 1).all()
    arrays = [value for value in optimizer.state[0].values() if isinstance(value, np.ndarray)]
    assert all(value.dtype == np.float32 for value in arrays)


def test_groups_have_options_of_their_own_as_in_torch():
    mine, theirs = parameters(), tensors()
    ours = nn.SGD([{"params": mine[0], "lr": 0.5}, {"params": [mine[1]]}], lr=0.1, momentum=0.9)
    expected = torch.optim.SGD([{"params": theirs[0], "lr": 0.5}, {"params": [theirs[1]]}], lr=0.1, momentum=0.9)
    for step in range(3):
        set_gradients(step, mine, theirs)
        ours.step()
        expected.step()
    for a, b in zip(mine, theirs):
        np.testing.assert_allclose(a.data, b.detach().numpy(), rtol=1e-12)
    assert ours.lr == 0.5


def test_frozen_parameters_and_those_without_a_gradient_stay():
    mine = parameters()
    set_gradients(0, mine)
    mine[0].requires_grad, mine[1].grad = False, None
    before = [p.data.copy() for p in mine]
    optimizer = nn.SGD(mine, lr=1.0, weight_decay=0.1)
    optimizer.step()
    for p, data in zip(mine, before):
        np.testing.assert_array_equal(p.data, data)
    set_gradients(0, mine)
    optimizer.zero_grad()
    assert all(p.grad is None for p in mine)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: nn.SGD([]), "params must hold at least one parameter"),
    (lambda: nn.SGD(nn.Parameter(np.ones(1))), "params must be an iterable of parameters"),
    (lambda: nn.SGD([np.ones(2)]), r"params must hold parameters, as from model.parameters\(\)"),
    (lambda: nn.SGD(parameters()[:1] * 2), "params must hold each parameter once"),
    (lambda: nn.SGD(parameters(), lr=-1), "lr must be a number of at least 0, not -1"),
    (lambda: nn.SGD(parameters(), nesterov=True), "nesterov=True needs a momentum above 0"),
    (lambda: nn.Adam(parameters(), betas=(0.9, 1.0)), "betas must lie between 0 and 1"),
    (lambda: nn.RMSprop(parameters(), alpha=2), "alpha must lie between 0 and 1, not 2"),
    (lambda: nn.SGD(parameters()).load_state_dict(nn.SGD(parameters()[:1]).state_dict()), "1 groups and 1 parameters"),
    (lambda: nn.StepLR("sgd", 2), "optimizer must be an optimiser of fastconv.nn, not 'sgd'"),
    (lambda: nn.StepLR(nn.SGD(parameters()), 0), "step_size must be at least 1, not 0"),
    (lambda: nn.LambdaLR(nn.SGD(parameters()), [abs, abs]), "lr_lambda must be one function or 1"),
])  # fmt: skip
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(fastconv.FastconvError, match=message):
        make()


@pytest.mark.parametrize(("name", "args"), [
    ("StepLR", (3,)),
    ("StepLR", (2, 0.5)),
    ("ExponentialLR", (0.9,)),
    ("CosineAnnealingLR", (5, 0.01)),
    ("LambdaLR", (lambda epoch: 1 / (1 + epoch),)),
    ("LambdaLR", ([lambda epoch: 0.5**epoch, lambda epoch: 1.0],)),
])  # fmt: skip
def test_schedules_are_those_of_torch(name, args):
    mine, theirs = parameters(), tensors()
    ours = nn.SGD([{"params": mine[0]}, {"params": mine[1], "lr": 0.7}], lr=0.1)
    expected = torch.optim.SGD([{"params": theirs[0]}, {"params": theirs[1], "lr": 0.7}], lr=0.1)
    schedule, their_schedule = getattr(nn, name)(ours, *args), getattr(torch.optim.lr_scheduler, name)(expected, *args)
    for epoch in range(9):
        assert schedule.get_last_lr() == pytest.approx(their_schedule.get_last_lr(), rel=1e-10, abs=1e-12)
        if epoch == 4:
            resumed = getattr(nn, name)(ours, *args)
            resumed.load_state_dict(schedule.state_dict())
            schedule = resumed
        expected.step()
        schedule.step()
        their_schedule.step()
