"""Losses and penalties: values and gradients as torch's, gradients as finite differences."""

import numpy as np
import pytest
import torch
from nn_support import vary
from support import normal, rng

import fastconv
from fastconv import nn
from fastconv.testing import check_gradients

LOGITS = normal("logits", shape=(6, 4))
IMAGE = normal("logits", shape=(3, 4, 2, 5))
CLASSES = rng("classes").integers(0, 4, 6)
PIXELS = rng("pixels").integers(0, 4, (3, 2, 5))
SHARES = nn.Softmax(1)(normal("shares", shape=(6, 4)))
PROBABILITIES = nn.Sigmoid()(LOGITS)
BITS = (normal("bits", shape=(6, 4)) > 0).astype(np.float64)

CASES = [
    ("CrossEntropyLoss", {}, LOGITS, CLASSES),
    ("CrossEntropyLoss", {"reduction": "sum"}, LOGITS, CLASSES),
    ("CrossEntropyLoss", {"label_smoothing": 0.2}, LOGITS, CLASSES),
    ("CrossEntropyLoss", {}, LOGITS, SHARES),
    ("CrossEntropyLoss", {"label_smoothing": 0.1, "reduction": "sum"}, LOGITS, SHARES),
    ("CrossEntropyLoss", {}, IMAGE, PIXELS),
    ("NLLLoss", {}, np.log(SHARES), CLASSES),
    ("NLLLoss", {"reduction": "sum"}, np.log(SHARES), CLASSES),
    ("BCELoss", {}, PROBABILITIES, BITS),
    ("BCELoss", {"reduction": "sum"}, PROBABILITIES, np.abs(BITS - 0.3)),
    ("BCEWithLogitsLoss", {}, LOGITS, BITS),
    ("BCEWithLogitsLoss", {"reduction": "sum"}, LOGITS, np.abs(BITS - 0.3)),
    ("MSELoss", {}, LOGITS, BITS),
    ("MSELoss", {"reduction": "sum"}, IMAGE, -IMAGE),
]


@pytest.mark.parametrize(("name", "options", "prediction", "target"), CASES)
def test_losses_and_their_gradients_are_those_of_torch_and_of_finite_differences(name, options, prediction, target):
    loss = getattr(nn, name)(**options)
    tensor = torch.from_numpy(prediction.copy()).requires_grad_()
    expected = getattr(torch.nn, name)(**options)(tensor, torch.from_numpy(target))
    value = loss(prediction, target)
    assert isinstance(value, float)
    assert value == pytest.approx(expected.item(), rel=1e-12)
    expected.backward()
    grad = loss.backward()
    np.testing.assert_allclose(grad, tensor.grad.numpy(), rtol=1e-10, atol=1e-14)
    check_gradients(lambda p: loss(p, target), [prediction], [grad], 1.0, eps=1e-6, rtol=1e-5)


def test_the_gradient_of_softmax_with_cross_entropy_is_prediction_minus_truth():
    loss = nn.CrossEntropyLoss(reduction="sum")
    loss(LOGITS, CLASSES)
    np.testing.assert_allclose(loss.backward(), nn.Softmax(1)(LOGITS) - np.eye(4)[CLASSES], atol=1e-14)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64"])
def test_classes_may_have_any_integer_type_and_gradients_keep_the_dtype(dtype):
    loss = nn.CrossEntropyLoss()
    value = loss(LOGITS.astype("float32"), CLASSES.astype(dtype))
    assert value == pytest.approx(nn.losses.cross_entropy(LOGITS, CLASSES), rel=1e-6)
    assert loss.backward().dtype == np.float32


def test_losses_of_extreme_predictions_are_finite():
    logits = np.array([[1e4, -1e4], [-1e4, 1e4]], np.float32)
    assert nn.CrossEntropyLoss()(logits, np.array([1, 1])) == 1e4
    assert nn.BCEWithLogitsLoss()(logits, np.array([[1.0, 0.0], [1.0, 0.0]])) == 5e3
    assert nn.BCELoss()(np.array([0.0, 1.0]), np.array([1.0, 1.0])) == 50
    loss = nn.BCELoss()
    loss(np.array([0.0, 1.0]), np.array([1.0, 1.0]))
    assert np.isfinite(loss.backward()).all()


@pytest.mark.parametrize(("run", "message"), [
    (lambda: nn.CrossEntropyLoss()(LOGITS, CLASSES[:3]), r"target must have shape \(6,\) for logits \(6, 4\), not"),
    (lambda: nn.CrossEntropyLoss()(LOGITS, CLASSES + 1), "target must hold classes from 0 to 3, not 4"),
    (lambda: nn.CrossEntropyLoss()(LOGITS, CLASSES - 9), "target must hold classes from 0 to 3, not -9"),
    (lambda: nn.CrossEntropyLoss()(LOGITS, SHARES[:2]), r"target must have the logits' shape \(6, 4\)"),
    (lambda: nn.CrossEntropyLoss()(LOGITS, CLASSES > 1), "target must hold integer classes or .* not bool"),
    (lambda: nn.CrossEntropyLoss()(LOGITS[0], CLASSES[0]), "logits must have at least 2 dimensions"),
    (lambda: nn.CrossEntropyLoss(label_smoothing=2), "label_smoothing must be a number between 0 and 1, not 2"),
    (lambda: nn.MSELoss("none"), "reduction must be one of 'mean', 'sum', not 'none'"),
    (lambda: nn.MSELoss()(LOGITS, BITS[0]), r"target must have the prediction's shape \(6, 4\), not \(4,\)"),
    (lambda: nn.BCELoss()(LOGITS, BITS), "probability must lie between 0 and 1; use BCEWithLogitsLoss"),
    (lambda: nn.MSELoss().backward(), "backward of MSELoss needs a forward pass before it"),
    (lambda: nn.L1(-1), "strength must be a number of at least 0, not -1"),
])  # fmt: skip
def test_wrong_targets_are_refused(run, message):
    with pytest.raises(fastconv.FastconvError, match=message):
        run()


@pytest.mark.parametrize(("penalty", "size"), [
    (nn.penalty.L1(0.3), lambda w: 0.3 * np.abs(w).sum()),
    (nn.penalty.L2(0.3), lambda w: 0.3 * np.square(w).sum()),
])  # fmt: skip
def test_penalties_add_their_gradient_to_that_of_the_weights(penalty, size):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    vary(model)
    model[2].weight.requires_grad = False
    weight = model[0].weight
    weight.grad = np.ones_like(weight.data)
    assert penalty.value(model) == pytest.approx(size(weight.data))
    penalty.add_gradient(model)
    check_gradients(lambda w: size(w), [weight.data], [weight.grad - 1], 1.0)
    assert all(p.grad is None for p in model.parameters() if p is not weight)


def test_a_penalty_can_be_for_certain_parameters():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    assert nn.L2(1.0, model[1].bias).value(model) == pytest.approx(float(np.square(model[1].bias.data).sum()))
    one, other = nn.L1(1.0, model[0].parameters()), nn.L1(1.0, [model[0].weight, model[0].bias])
    assert one.value(model) == one.value(model) == other.value(model)
    assert repr(one) == "L1(1.0)"
