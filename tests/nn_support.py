"""What the tests of fastconv.nn share."""

from typing import Any

import numpy as np
from support import normal

from fastconv import nn
from fastconv.testing import check_gradients


def vary(layer: nn.Module, seed: str = "weights") -> None:
    """Random parameters, also where the initial ones are 0 or 1."""
    for name, parameter in layer.named_parameters():
        parameter.data[...] = normal(seed, name, shape=parameter.shape)


def check_layer(layer: nn.Module, x: np.ndarray, before: Any = lambda: None) -> None:
    """Check all gradients of a module numerically; `before` puts its random state back."""
    parameters = list(layer.parameters())
    before()
    layer.zero_grad()
    y = layer(x)
    grad = normal("grad", y.shape, shape=y.shape)
    found = layer.backward(grad)

    def run(x: np.ndarray, *values: np.ndarray) -> np.ndarray:
        for parameter, value in zip(parameters, values):
            parameter.data[...] = value
        before()
        return layer(x)

    inputs = [x, *(parameter.data.copy() for parameter in parameters)]
    check_gradients(run, inputs, [found, *(parameter.grad for parameter in parameters)], grad)
