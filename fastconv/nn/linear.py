"""The linear layer: a matrix product over the last dimension."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import arrays
from ..cpu.threads import blas
from ..errors import ShapeError
from ..geometry import ReceptiveField, integer
from . import activations
from .convolution import Weighted
from .module import Array, Shape


class Linear(Weighted):
    """y = activation(x @ weight.T + bias), over the last dimension.

    Parameters
    ----------
    in_features, out_features : int
    bias : bool
    activation : None, "relu", "leaky_relu" (slope 0.01), "sigmoid" or "tanh"
    dtype : dtype, optional
        float32 unless given.
    rng : numpy.random.Generator or seed, optional

    Attributes
    ----------
    weight : Parameter (out_features, in_features)
    bias : Parameter (out_features,) or None

    Examples
    --------
    >>> from fastconv import nn
    >>> nn.Linear(576, 64)(np.ones((2, 576), np.float32)).shape
    (2, 64)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation: str | None = None,
        dtype: Any = None,
        rng: Any = None,
    ) -> None:
        super().__init__()
        self.in_features = integer("in_features", in_features, 1)
        self.out_features = integer("out_features", out_features, 1)
        self.activation = activations.check_name(activation)
        self.create((out_features, in_features), out_features, bias, dtype, rng)

    def forward(self, x: Array) -> Array:
        """Return activation(x @ weight.T + bias)."""
        self.output_shape(x.shape)
        arrays.check_same_dtype("x", x, "weight", self.weight.data.dtype)
        with blas():
            # (N, K) = (N, C) @ (C, K)
            y = x @ self.weight.data.T
        if self.bias is not None:
            y += self.bias.data
        y = activations.activate(self.activation, y)
        if self.training:
            self.keep((x, y.shape, activations.remember(self.activation, y)))
        return y

    def backward(self, grad_output: Array, *, input_grad: bool = True) -> Array | None:
        """Add the gradients of weight and bias; return that of the input."""
        x, shape, remembered = self.kept()
        activations.check_gradient(grad_output, shape)
        grad = activations.gradient(self.activation, remembered, grad_output)
        rows = grad.reshape(-1, self.out_features)
        needs = self.needs(input_grad)
        with blas():
            if "weight" in needs:
                # (K, C) = (K, N) @ (N, C)
                self.weight.accumulate(rows.T @ x.reshape(-1, self.in_features))
            if "bias" in needs and self.bias is not None:
                self.bias.accumulate(rows.sum(axis=0))
            # (N, C) = (N, K) @ (K, C)
            return grad @ self.weight.data if input_grad else None

    def output_shape(self, input_shape: Shape) -> Shape:
        """Return the input's shape with out_features at the end."""
        if len(input_shape) == 0 or input_shape[-1] != self.in_features:
            raise ShapeError(f"x must have {self.in_features} features in its last dimension, not shape {input_shape}")
        return (*input_shape[:-1], self.out_features)

    def flops(self, input_shape: Shape) -> int:
        """Return the operations of the matrix product."""
        return 2 * int(np.prod(self.output_shape(input_shape), dtype=object)) * self.in_features

    def receptive_field(self, field: ReceptiveField | None, input_shape: Shape) -> ReceptiveField | None:
        """Give up: it sees everything."""
        return None

    def extra_repr(self) -> str:
        """Show the sizes."""
        shown = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return shown + (f", activation={self.activation!r}" if self.activation else "")
