"""Metrics: what a prediction is worth, as a mean over samples. A metric is any function of (prediction, target)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ..errors import ArgumentError, ShapeError

Metric = Callable[[Any, Any], float]


def accuracy(prediction: Any, target: Any) -> float:
    """Return the share of samples whose largest prediction is at the target.

    Parameters
    ----------
    prediction : array (N, C, ...)
        Logits or probabilities.
    target : integer array (N, ...) of classes, or array (N, C, ...) whose largest element counts

    Examples
    --------
    >>> accuracy(np.array([[0.1, 0.9], [0.8, 0.2]]), np.array([1, 1]))
    0.5
    """
    target = np.asarray(target)
    if target.ndim == prediction.ndim:
        target = target.argmax(axis=1)
    found = prediction.argmax(axis=1)
    if found.shape != target.shape:
        raise ShapeError(f"target must have shape {found.shape} for prediction {prediction.shape}, not {target.shape}")
    return float(np.mean(found == target))


def binary_accuracy(prediction: Any, target: Any, threshold: float = 0.5) -> float:
    """Return the share of elements on the target's side of a threshold: 0.5 for probabilities, 0 for logits."""
    if prediction.shape != np.shape(target):
        raise ShapeError(f"target must have the prediction's shape {prediction.shape}, not {np.shape(target)}")
    return float(np.mean((prediction > threshold) == (np.asarray(target) > 0.5)))


METRICS: dict[str, Metric] = {"accuracy": accuracy, "binary_accuracy": binary_accuracy}


def named_metrics(metrics: Iterable[str | Metric]) -> dict[str, Metric]:
    """Return metrics by name; a function goes by its own."""
    found: dict[str, Metric] = {}
    for metric in (metrics,) if isinstance(metrics, str) or callable(metrics) else metrics:
        if callable(metric):
            found[getattr(metric, "__name__", type(metric).__name__)] = metric
        elif metric in METRICS:
            found[metric] = METRICS[metric]
        else:
            raise ArgumentError(f"metrics must be functions or of {', '.join(map(repr, METRICS))}, not {metric!r}")
    return found
