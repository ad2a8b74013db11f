"""Penalties on the size of weights, added to the loss and its gradient.

L1 is ``strength * sum(|w|)``, L2 is ``strength * sum(w**2)`` (Keras's regularisers; an optimiser's ``weight_decay`` of
``2 * strength`` has the gradient of L2, but does not show in the loss).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from ..errors import ArgumentError
from .module import Module, Parameter


class Penalty:
    """Base of the penalties.

    Parameters
    ----------
    strength : float
    parameters : Parameter or iterable of them, optional
        What it holds down; unless given all weights of the model, that is parameters of two dimensions or more.

    Examples
    --------
    >>> from fastconv import nn
    >>> layer = nn.Linear(2, 1)
    >>> layer.weight.data[...] = [[3, -4]]
    >>> nn.penalty.L1(0.5).value(layer), nn.penalty.L2(0.1).value(layer)
    (3.5, 2.5)
    """

    def __init__(self, strength: float = 0.01, parameters: Any = None) -> None:
        if not isinstance(strength, (int, float)) or not strength >= 0:
            raise ArgumentError(f"strength must be a number of at least 0, not {strength!r}")
        self.strength = float(strength)
        self.parameters: list[Parameter] | None = None
        if parameters is not None:
            self.parameters = [parameters] if isinstance(parameters, Parameter) else list(parameters)

    def value(self, model: Module) -> float:
        """Return what is added to the loss."""
        return self.strength * sum(self.size(parameter.data) for parameter in self._held(model))

    def add_gradient(self, model: Module) -> None:
        """Add the penalty's gradient to that of each weight."""
        for parameter in self._held(model):
            slope = self.slope(parameter.data)
            slope *= self.strength
            parameter.accumulate(slope)

    def size(self, weight: np.ndarray) -> float:
        """Return the size of a weight, for a strength of 1."""
        raise NotImplementedError

    def slope(self, weight: np.ndarray) -> np.ndarray:
        """Return the gradient of :meth:`size`, a fresh array."""
        raise NotImplementedError

    def _held(self, model: Module) -> Iterable[Parameter]:
        if self.parameters is not None:
            return [p for p in self.parameters if p.requires_grad]
        return [p for p in model.parameters() if p.requires_grad and p.data.ndim > 1]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.strength})"


class L1(Penalty):
    """strength * sum(|w|): drives small weights to zero."""

    def size(self, weight: np.ndarray) -> float:
        """Return sum(|w|)."""
        return float(np.abs(weight).sum(dtype=np.float64))

    def slope(self, weight: np.ndarray) -> np.ndarray:
        """Return the sign of w."""
        return np.sign(weight)


class L2(Penalty):
    """strength * sum(w**2): shrinks large weights most."""

    def size(self, weight: np.ndarray) -> float:
        """Return sum(w**2)."""
        return float(np.square(weight).sum(dtype=np.float64))

    def slope(self, weight: np.ndarray) -> np.ndarray:
        """Return 2*w."""
        return 2 * weight
