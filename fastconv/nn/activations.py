"""Nonlinearities as layers, and the gradients of those that a convolution or linear layer fuses.

Gradients come from the output y alone: relu [y > 0], leaky_relu [y > 0] or its slope, sigmoid y*(1 - y), tanh 1 - y**2.
Of a ReLU only the signs are kept, one byte an element.
"""

from __future__ import annotations

import numpy as np

from ..activations import ACTIVATIONS, LEAKY_SLOPE
from ..arrays import empty
from ..errors import ArgumentError, ShapeError
from ..geometry import flag
from ..ops.masks import masked
from .module import Array, Module, Shape


def empty_like(values: Array, dtype: np.dtype) -> Array:
    """Return memory for as many elements in the same order, such as has been used before if that is plain."""
    return empty(values.shape, dtype) if values.flags.c_contiguous else np.empty_like(values, dtype)


def leaky(values: Array, mask: Array, slope: float) -> Array:
    """Return `values` where `mask` is True and `slope * values` elsewhere."""
    found = masked(values, mask)
    found += masked(values * values.dtype.type(slope), ~mask)
    return found


def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)) without overflow.

    Examples
    --------
    >>> sigmoid(np.array([-1000.0, 0.0, 1000.0]))
    array([0. , 0.5, 1. ])
    """
    # exp of a number that is never positive cannot overflow.
    small = np.exp(-np.abs(x))
    found = np.where(x < 0, small, x.dtype.type(1))
    small += 1
    found /= small
    return found


def softmax(x: Array, dim: int = 1) -> Array:
    """Return exp(x) / sum(exp(x)) along a dimension, without overflow."""
    found = x - x.max(axis=dim, keepdims=True)
    np.exp(found, out=found)
    found /= found.sum(axis=dim, keepdims=True)
    return found


def log_softmax(x: Array, dim: int = 1) -> Array:
    """Return the logarithm of the softmax, exact where the softmax itself would vanish."""
    found = x - x.max(axis=dim, keepdims=True)
    found -= np.log(np.exp(found).sum(axis=dim, keepdims=True))
    return found


def activate(name: str | None, y: Array) -> Array:
    """Apply a nonlinearity by name, in place where NumPy can: y must be the caller's own."""
    if name == "relu":
        return np.maximum(y, 0, out=y)
    if name == "leaky_relu":
        return leaky(y, y > 0, LEAKY_SLOPE)
    if name == "sigmoid":
        return sigmoid(y)
    return np.tanh(y, out=y) if name == "tanh" else y


def remember(name: str | None, y: Array) -> Array:
    """Return what :func:`gradient` needs of the output y."""
    if name is None:
        return None
    return np.greater(y, 0, out=empty_like(y, np.dtype(bool))) if name in ("relu", "leaky_relu") else y


def gradient(name: str | None, remembered: Array, grad_output: Array) -> Array:
    """Return the gradient before a nonlinearity, given that after it."""
    if name is None:
        return grad_output
    check_gradient(grad_output, remembered.shape)
    if name == "relu":
        return masked(grad_output, remembered)
    if name == "leaky_relu":
        return leaky(grad_output, remembered, LEAKY_SLOPE)
    y = remembered
    slope = y * (1 - y) if name == "sigmoid" else 1 - y * y
    slope *= grad_output
    return slope


def check_gradient(grad_output: Array, shape: Shape) -> None:
    """Raise ShapeError unless the gradient has the output's shape: NumPy would broadcast."""
    if np.shape(grad_output) != shape:
        raise ShapeError(f"grad_output must have the output's shape {shape}, not {np.shape(grad_output)}")


def check_name(activation: str | None) -> str | None:
    """Return the name of a fused activation if there is one of that name."""
    if activation is not None and activation not in ACTIVATIONS:
        raise ArgumentError(
            f"activation must be None or one of {', '.join(map(repr, ACTIVATIONS))}, not {activation!r}"
        )
    return activation


class Elementwise(Module):
    """Base of layers whose output has the input's shape."""

    def output_shape(self, input_shape: Shape) -> Shape:
        """Return the input's shape."""
        return tuple(input_shape)


class Identity(Elementwise):
    """Pass the input on. Takes and ignores any arguments, as PyTorch's does."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__()

    def forward(self, x: Array) -> Array:
        """Return x."""
        return x

    def backward(self, grad_output: Array, *, input_grad: bool = True) -> Array | None:
        """Return the gradient itself."""
        return grad_output if input_grad else None


class _Named(Elementwise):
    name = ""

    def forward(self, x: Array) -> Array:
        """Return the nonlinearity of each element."""
        y = activate(self.name, x.copy())
        self.keep(remember(self.name, y))
        return y

    def backward(self, grad_output: Array, *, input_grad: bool = True) -> Array | None:
        """Return the gradient of the input."""
        remembered = self.kept()
        return gradient(self.name, remembered, grad_output) if input_grad else None


class ReLU(_Named):
    """max(x, 0), whose gradient passes where the output is positive.

    Parameters
    ----------
    inplace : bool
        Write the result over x. Safe behind a layer that makes its output afresh and does not keep it:
        convolutions and linear layers without a fused activation, batch normalisation, average pools.
    """

    name = "relu"

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = flag("inplace", inplace)

    def forward(self, x: Array) -> Array:
        """Return max(x, 0)."""
        y = np.maximum(x, 0, out=x if self.inplace else None)
        if self.training:
            self.keep(y > 0)
        return y

    def extra_repr(self) -> str:
        """Say if it works in place."""
        return "inplace=True" if self.inplace else ""


class LeakyReLU(Elementwise):
    """x where x > 0, else negative_slope * x."""

    def __init__(self, negative_slope: float = 0.01, inplace: bool = False) -> None:
        super().__init__()
        self.negative_slope = negative_slope
        self.inplace = flag("inplace", inplace)

    def forward(self, x: Array) -> Array:
        """Return x or its fraction."""
        mask = x > 0
        self.keep(mask)
        y = leaky(x, mask, self.negative_slope)
        if self.inplace:
            x[...] = y
            return x
        return y

    def backward(self, grad_output: Array, *, input_grad: bool = True) -> Array | None:
        """Return the gradient of the input."""
        mask = self.kept()
        check_gradient(grad_output, mask.shape)
        return leaky(grad_output, mask, self.negative_slope) if input_grad else None

    def extra_repr(self) -> str:
        """Name the slope."""
        return f"negative_slope={self.negative_slope}" + (", inplace=True" if self.inplace else "")


class Sigmoid(_Named):
    """1 / (1 + exp(-x))."""

    name = "sigmoid"


class Tanh(_Named):
    """Hyperbolic tangent."""

    name = "tanh"


class Softmax(Elementwise):
    """exp(x) / sum(exp(x)) along a dimension.

    For training, leave it out and use :class:`~fastconv.nn.CrossEntropyLoss` on the logits.

    Parameters
    ----------
    dim : int, optional
        None: 0 for x of 1 or 3 dimensions, else 1, which is PyTorch's rule.
    """

    def __init__(self, dim: int | None = None) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Array) -> Array:
        """Return probabilities."""
        dim = (0 if x.ndim in (0, 1, 3) else 1) if self.dim is None else self.dim
        y = softmax(x, dim)
        self.keep((y, dim))
        return y

    def backward(self, grad_output: Array, *, input_grad: bool = True) -> Array | None:
        """Return y * (g - sum(g * y))."""
        y, dim = self.kept()
        check_gradient(grad_output, y.shape)
        if not input_grad:
            return None
        found = grad_output * y
        total = found.sum(axis=dim, keepdims=True)
        return np.subtract(found, np.multiply(y, total), out=found)

    def extra_repr(self) -> str:
        """Name the dimension."""
        return f"dim={self.dim}"
