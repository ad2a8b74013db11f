"""The linear layer: a matrix product over the last dimension, which is a 1x1 convolution of single pixels.

BLAS would do as well, but its threads and Numba's, taking turns on the same cores, stall each other for milliseconds.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import arrays
from ..errors import ShapeError
from ..geometry import ReceptiveField, integer
from ..ops.convolution import convNd, convNd_backward
from . import activations
from .convolution import Weighted
from .module import Array, Shape

LAST: dict[str, Any] = {"data_format": "channels_last"}


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
        shape = self.output_shape(x.shape)
        arrays.check_same_dtype("x", x, "weight", self.weight.data.dtype)
        y = convNd(1, self._pixels(x), self._kernel(), self.bias_data(), activation=self.activation, **LAST)
        y = y.reshape(shape)
        if self.training:
            self.keep((x, shape, activations.remember(self.activation, y)))
        return y

    def backward(self, grad_output: Array, *, input_grad: bool = True) -> Array | None:
        """Add the gradients of weight and bias; return that of the input."""
        x, shape, remembered = self.kept()
        activations.check_gradient(grad_output, shape)
        needs = self.needs(input_grad)
        if not needs:
            return None
        grad = activations.gradient(self.activation, remembered, grad_output)
        found = convNd_backward(1, self._pixels(grad), self._pixels(x), self._kernel(), needs=needs, **LAST)
        if found.weight is not None:
            found = found._replace(weight=found.weight.reshape(self.weight.shape))
        dx = self.collect(found)
        return None if dx is None else dx.reshape(x.shape)

    def _pixels(self, x: Array) -> Array:
        """Images of one pixel, whose channels are the features."""
        return x.reshape(-1, 1, x.shape[-1])

    def _kernel(self) -> Array:
        return self.weight.data[:, :, None]

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
