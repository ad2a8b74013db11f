"""Loss functions: a number to make small, and its gradient with respect to the prediction.

Each is there twice: as functions, ``mse_loss(prediction, target)`` and ``mse_loss_backward(prediction, target)``, and
as a class whose ``forward(prediction, target)`` keeps the two for ``backward()``. With reduction "mean" the sum over
samples is divided by their number, as in PyTorch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import ArgumentError, DTypeError, ShapeError
from ..geometry import one_of
from .activations import log_softmax, sigmoid
from .module import Array, BackwardError

REDUCTIONS = ("mean", "sum")


def cross_entropy(logits: Array, target: Array, *, reduction: str = "mean", label_smoothing: float = 0.0) -> float:
    """Return the cross-entropy between softmax(logits) and the target.

    Parameters
    ----------
    logits : array (N, C, ...)
        Any numbers; the softmax is part of the loss, which keeps it exact.
    target : integer array (N, ...) of classes, or floating array (N, C, ...) of probabilities
    reduction : "mean" or "sum"
    label_smoothing : float
        Share of the uniform distribution mixed into the target (Szegedy et al., 2015).

    Raises
    ------
    ShapeError, DTypeError, ArgumentError
        For a target of another shape or type, or a class out of range.

    Examples
    --------
    >>> round(cross_entropy(np.zeros((1, 10)), np.array([3])), 4)
    2.3026
    """
    share, count = _distribution(logits, target, reduction, label_smoothing)
    return -_total(share * log_softmax(logits)) / count


def cross_entropy_backward(
    logits: Array, target: Array, *, reduction: str = "mean", label_smoothing: float = 0.0
) -> Array:
    """Return the gradient of :func:`cross_entropy`: softmax(logits) - target, for targets that sum to 1."""
    share, count = _distribution(logits, target, reduction, label_smoothing)
    grad = np.exp(log_softmax(logits))
    grad *= share.sum(axis=1, keepdims=True)
    grad -= share
    grad /= count
    return grad


def nll_loss(log_probabilities: Array, target: Array, *, reduction: str = "mean") -> float:
    """Return minus the mean log-probability of the classes: cross-entropy behind a log-softmax."""
    share, count = _distribution(log_probabilities, target, reduction, 0.0)
    return -_total(share * log_probabilities) / count


def nll_loss_backward(log_probabilities: Array, target: Array, *, reduction: str = "mean") -> Array:
    """Return the gradient of :func:`nll_loss`."""
    share, count = _distribution(log_probabilities, target, reduction, 0.0)
    share /= -count
    return share


def binary_cross_entropy(probability: Array, target: Array, *, reduction: str = "mean") -> float:
    """Return the mean of -(t*log(p) + (1 - t)*log(1 - p)); logarithms are held above -100, as in PyTorch."""
    target, count = _same_shape(probability, target, reduction)
    _check_probabilities(probability)
    with np.errstate(divide="ignore"):
        yes, no = np.maximum(np.log(probability), -100), np.maximum(np.log1p(-probability), -100)
    return -_total(target * yes + (1 - target) * no) / count


def binary_cross_entropy_backward(probability: Array, target: Array, *, reduction: str = "mean") -> Array:
    """Return the gradient of :func:`binary_cross_entropy`: (p - t) / (p*(1 - p)), the denominator above 1e-12."""
    target, count = _same_shape(probability, target, reduction)
    return (probability - target) / np.maximum(probability * (1 - probability), 1e-12) / count


def binary_cross_entropy_with_logits(logits: Array, target: Array, *, reduction: str = "mean") -> float:
    """Return the binary cross-entropy of sigmoid(logits): max(x, 0) - x*t + log(1 + exp(-|x|))."""
    target, count = _same_shape(logits, target, reduction)
    return _total(np.maximum(logits, 0) - logits * target + np.log1p(np.exp(-np.abs(logits)))) / count


def binary_cross_entropy_with_logits_backward(logits: Array, target: Array, *, reduction: str = "mean") -> Array:
    """Return the gradient of :func:`binary_cross_entropy_with_logits`: sigmoid(x) - t."""
    target, count = _same_shape(logits, target, reduction)
    return (sigmoid(logits) - target) / count


def mse_loss(prediction: Array, target: Array, *, reduction: str = "mean") -> float:
    """Return the mean of (prediction - target)**2."""
    target, count = _same_shape(prediction, target, reduction)
    return _total(np.square(prediction - target)) / count


def mse_loss_backward(prediction: Array, target: Array, *, reduction: str = "mean") -> Array:
    """Return the gradient of :func:`mse_loss`: 2*(prediction - target)."""
    target, count = _same_shape(prediction, target, reduction)
    return (prediction - target) * (2 / count)


class Loss:
    """Base of the losses: ``loss(prediction, target)`` returns the number, ``loss.backward()`` then its gradient.

    Parameters
    ----------
    reduction : "mean" or "sum"
    """

    functions: tuple[Any, Any]

    def __init__(self, reduction: str = "mean") -> None:
        self.options: dict[str, Any] = {"reduction": one_of("reduction", reduction, REDUCTIONS)}
        self._saved: tuple[Array, Array] | None = None

    def __call__(self, prediction: Array, target: Array) -> float:
        """Return :meth:`forward`."""
        return self.forward(prediction, target)

    def forward(self, prediction: Array, target: Array) -> float:
        """Return the loss, and keep what :meth:`backward` needs."""
        value = type(self).functions[0](prediction, target, **self.options)
        self._saved = (prediction, target)
        return value

    def backward(self) -> Array:
        """Return the gradient with respect to the prediction, an array of its shape and dtype."""
        if self._saved is None:
            raise BackwardError(f"backward of {type(self).__name__} needs a forward pass before it")
        saved, self._saved = self._saved, None
        return type(self).functions[1](*saved, **self.options)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.options.items())})"


class CrossEntropyLoss(Loss):
    """Softmax cross-entropy from logits (N, C, ...), as :func:`cross_entropy`.

    Parameters
    ----------
    reduction : "mean" or "sum"
    label_smoothing : float
        Between 0 and 1.

    Examples
    --------
    >>> from fastconv import nn
    >>> loss = nn.CrossEntropyLoss()
    >>> round(loss(np.array([[0.0, 0.0]]), np.array([1])), 4), loss.backward()
    (0.6931, array([[ 0.5, -0.5]]))
    """

    functions = (cross_entropy, cross_entropy_backward)

    def __init__(self, reduction: str = "mean", label_smoothing: float = 0.0) -> None:
        super().__init__(reduction)
        self.options["label_smoothing"] = _checked_smoothing(label_smoothing)


class NLLLoss(Loss):
    """Negative log-likelihood from log-probabilities (N, C, ...)."""

    functions = (nll_loss, nll_loss_backward)


class BCELoss(Loss):
    """Binary cross-entropy from probabilities; prefer :class:`BCEWithLogitsLoss`, exact where these are 0 or 1."""

    functions = (binary_cross_entropy, binary_cross_entropy_backward)


class BCEWithLogitsLoss(Loss):
    """Binary cross-entropy from logits."""

    functions = (binary_cross_entropy_with_logits, binary_cross_entropy_with_logits_backward)


class MSELoss(Loss):
    """Mean squared error."""

    functions = (mse_loss, mse_loss_backward)


def _total(values: Array) -> float:
    return float(values.sum(dtype=np.float64))


def _distribution(logits: Array, target: Any, reduction: str, smoothing: float) -> tuple[Array, int]:
    """Return the target as probabilities of the logits' shape, and the number to divide by."""
    one_of("reduction", reduction, REDUCTIONS)
    _checked_smoothing(smoothing)
    target = np.asarray(target)
    if logits.ndim < 2:
        raise ShapeError(f"logits must have at least 2 dimensions (N, C, ...), not shape {logits.shape}")
    C, classes_shape = logits.shape[1], logits.shape[:1] + logits.shape[2:]
    if target.dtype.kind in "iu":
        if target.shape != classes_shape:
            raise ShapeError(f"target must have shape {classes_shape} for logits {logits.shape}, not {target.shape}")
        if target.size and not (target.min() >= 0 and target.max() < C):
            wrong = target.min() if target.min() < 0 else target.max()
            raise ArgumentError(f"target must hold classes from 0 to {C - 1}, not {int(wrong)}")
        share = np.zeros(logits.shape, logits.dtype)
        np.put_along_axis(share, np.expand_dims(target, 1).astype(np.intp), 1, axis=1)
    elif target.dtype.kind == "f":
        if target.shape != logits.shape:
            raise ShapeError(f"target must have the logits' shape {logits.shape}, not {target.shape}")
        share = target.astype(logits.dtype)
    else:
        raise DTypeError(f"target must hold integer classes or floating-point probabilities, not {target.dtype}")
    if smoothing:
        share *= 1 - smoothing
        share += smoothing / C
    return share, max(int(np.prod(classes_shape)), 1) if reduction == "mean" else 1


def _same_shape(prediction: Array, target: Any, reduction: str) -> tuple[Array, int]:
    """Return the target in the prediction's dtype, and the number to divide by."""
    one_of("reduction", reduction, REDUCTIONS)
    target = np.asarray(target)
    if target.shape != prediction.shape:
        raise ShapeError(f"target must have the prediction's shape {prediction.shape}, not {target.shape}")
    return target.astype(prediction.dtype, copy=False), max(prediction.size, 1) if reduction == "mean" else 1


def _checked_smoothing(value: Any) -> float:
    if not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ArgumentError(f"label_smoothing must be a number between 0 and 1, not {value!r}")
    return float(value)


def _check_probabilities(values: Array) -> None:
    if values.size and not (values.min() >= 0 and values.max() <= 1):
        raise ArgumentError("probability must lie between 0 and 1; use BCEWithLogitsLoss for logits")
