"""Convolution layers, plain and transposed.

Constructors are PyTorch's, with keywords of this package behind. A convolution layer is a call of the operation; its
`activation` is fused there and costs no pass of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import calls, registry
from ..config import PRECISIONS
from ..errors import ArgumentError
from ..geometry import (
    DATA_FORMATS,
    PADDING_MODES,
    ConvGeometry,
    ReceptiveField,
    flag,
    integer,
    one_of,
    padding_form,
    sizes,
)
from ..ops.convolution import convNd, convNd_backward
from ..ops.plans import ConvPlan, plan_convNd
from ..ops.transposed import conv_transposeNd, conv_transposeNd_backward
from . import activations, init
from .module import Array, Module, Parameter, Shape, floating_dtype

# Kinds of input for which a layer keeps its weight packed: whole batches, and a last one.
MOST_PLANS = 2


class Weighted(Module):
    """A layer with a weight and perhaps a bias, whose backward pass computes only the gradients that are wanted."""

    weight: Parameter
    bias: Parameter | None

    def create(self, shape: Shape, outputs: int, bias: bool, dtype: Any, rng: Any) -> None:
        """Make the parameters, with initial values."""
        dtype = floating_dtype(dtype)
        self.weight = Parameter(np.empty(shape, dtype))
        self.bias = Parameter(np.empty((outputs,), dtype)) if flag("bias", bias) else None
        init.default_(self.weight, self.bias, rng)

    def needs(self, input_grad: bool) -> list[str]:
        """Return which gradients are wanted, by the operations' names."""
        wanted = ["input"] if input_grad else []
        wanted += ["weight"] if self.weight.requires_grad else []
        return wanted + (["bias"] if self.bias is not None and self.bias.requires_grad else [])

    def bias_data(self) -> Array | None:
        """Return the bias as the operations take it."""
        return None if self.bias is None else self.bias.data

    def collect(self, grads: Any) -> Array | None:
        """Add what an operation's backward gave to the parameters' gradients; return that of the input."""
        if grads.weight is not None:
            self.weight.accumulate(grads.weight)
        if grads.bias is not None and self.bias is not None:
            self.bias.accumulate(grads.bias)
        return grads.input


class _Conv(Weighted):
    dims = 0
    transposed = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        data_format: str = "channels_first",
        activation: str | None = None,
        algorithm: str = "auto",
        precision: str | None = None,
        dtype: Any = None,
        rng: Any = None,
    ) -> None:
        super().__init__()
        self._plans: dict[Any, tuple[ConvPlan | None, Any]] = {}
        self.in_channels = integer("in_channels", in_channels, 1)
        self.out_channels = integer("out_channels", out_channels, 1)
        self.kernel_size = sizes("kernel_size", kernel_size, self.dims, 1)
        self.stride = sizes("stride", stride, self.dims, 1)
        self.padding = padding_form(padding, self.dims)
        self.dilation = sizes("dilation", dilation, self.dims, 1)
        self.groups = integer("groups", groups, 1)
        self.padding_mode = one_of("padding_mode", padding_mode, PADDING_MODES)
        self.data_format = one_of("data_format", data_format, DATA_FORMATS)
        self.activation = activations.check_name(activation)
        # A name that nobody knows is refused here; what cannot be computed is found out where it runs.
        registry.named(algorithm, "cpu")
        self.algorithm, self.precision = algorithm, precision and one_of("precision", precision, PRECISIONS)
        if in_channels % groups or out_channels % groups:
            raise ArgumentError(
                f"groups={groups} must divide in_channels={in_channels} and out_channels={out_channels}"
            )
        first, second = (in_channels, out_channels) if self.transposed else (out_channels, in_channels)
        self.create((first, second // groups, *self.kernel_size), out_channels, bias, dtype, rng)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments that say what is convolved how, for the operation and its geometry."""
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "data_format": self.data_format,
            "padding_mode": self.padding_mode,
        }

    def strategy(self) -> dict[str, Any]:
        """Return the arguments that say how it is computed."""
        return {"algorithm": self.algorithm, "precision": self.precision}

    def forward(self, x: Array) -> Array:
        """Return activation(conv(x, weight) + bias)."""
        how = {**self.arguments(), **self.strategy(), "activation": self.activation}
        if not self.training:
            return self._inferred(x, how)
        self._plans.clear()
        y = convNd(self.dims, x, self.weight.data, self.bias_data(), **how)
        self.keep((x, activations.remember(self.activation, y)))
        return y

    def _inferred(self, x: Array, how: dict[str, Any]) -> Array:
        """Return the output in evaluation mode: by a plan, from the second input of a kind on."""
        weight, bias = self.weight.data, self.bias_data()
        key = calls.key(tuple(how.values()), x, weight, bias)
        if key is None:
            return convNd(self.dims, x, weight, bias, **how)
        plan, arrays = self._plans.get(key, (None, None))
        if arrays is not None and arrays[0] is weight and arrays[1] is bias:
            if plan is None:
                plan = plan_convNd(self.dims, x.shape, weight, bias, **how)
                self._plans[key] = plan, arrays
            return plan(x)
        y = convNd(self.dims, x, weight, bias, **how)
        if len(self._plans) >= MOST_PLANS:
            self._plans.clear()
        self._plans[key] = None, (weight, bias)
        return y

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes its own.
        return {**self.__dict__, "_plans": {}}

    def backward(self, grad_output: Array, *, input_grad: bool = True) -> Array | None:
        """Add the gradients of weight and bias; return that of the input."""
        x, remembered = self.kept()
        needs = self.needs(input_grad)
        if not needs:
            return None
        grad = activations.gradient(self.activation, remembered, grad_output)
        arguments = {**self.arguments(), **self.strategy()}
        return self.collect(convNd_backward(self.dims, grad, x, self.weight.data, needs=needs, **arguments))

    def geometry(self, input_shape: Shape) -> ConvGeometry:
        """Return the geometry of the convolution of an input of a shape."""
        return ConvGeometry.create(input_shape, self.weight.shape, dtype=self.weight.data.dtype, **self.arguments())

    def output_shape(self, input_shape: Shape) -> Shape:
        """Return the shape of the output, from the geometry."""
        return self.geometry(input_shape).output_shape

    def flops(self, input_shape: Shape) -> int:
        """Return the operations of a direct convolution."""
        return self.geometry(input_shape).flops

    def receptive_field(self, field: ReceptiveField | None, input_shape: Shape) -> ReceptiveField | None:
        """Widen the field by the dilated kernel."""
        geometry = self.geometry(input_shape)
        return None if field is None else field.through(geometry.window, geometry.stride)

    def extra_repr(self) -> str:
        """Show what differs from the defaults, as PyTorch does."""
        shown = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        if self.padding != (0,) * self.dims:
            shown.append(f"padding={self.padding!r}")
        if self.dilation != (1,) * self.dims:
            shown.append(f"dilation={self.dilation}")
        if self.groups != 1:
            shown.append(f"groups={self.groups}")
        if self.bias is None:
            shown.append("bias=False")
        defaults = {
            "padding_mode": "zeros",
            "data_format": "channels_first",
            "activation": None,
            "algorithm": "auto",
            "precision": None,
        }
        own = {name: getattr(self, name) for name in defaults}
        return ", ".join(shown + [f"{n}={v!r}" for n, v in own.items() if v != defaults[n]])


class Conv1d(_Conv):
    """1-D convolution layer, of signals (N, C, L): arguments as :class:`Conv2d`."""

    dims = 1


class Conv2d(_Conv):
    """2-D convolution layer: :func:`fastconv.conv2d` with a weight and a bias of its own.

    Parameters
    ----------
    in_channels, out_channels : int
        C and K.
    kernel_size, stride, dilation : int or one per spatial dimension
    padding : int, one per dimension, (before, after) pairs, or "valid", "same", "same_lower", "full"
    groups : int
    bias : bool
    padding_mode : "zeros", "reflect", "symmetric", "replicate" or "circular"
    data_format : "channels_first" or "channels_last"
    activation : None, "relu", "leaky_relu" (slope 0.01), "sigmoid" or "tanh"
        Fused into the convolution.
    algorithm, precision : str
        As in the operation.
    dtype : dtype, optional
        float32 unless given.
    rng : numpy.random.Generator or seed, optional
        Draws the initial values, uniform in +-1/sqrt(fan_in) as in PyTorch.

    Attributes
    ----------
    weight : Parameter (K, C // groups, *kernel_size)
    bias : Parameter (K,) or None

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Naming the argument, its value and what is expected.

    Examples
    --------
    >>> from fastconv import nn
    >>> layer = nn.Conv2d(3, 8, 5, padding="same", activation="relu")
    >>> y = layer(np.ones((2, 3, 16, 16), np.float32))
    >>> layer.backward(np.ones_like(y)).shape, layer.weight.grad.shape
    ((2, 3, 16, 16), (8, 3, 5, 5))
    """

    dims = 2


class Conv3d(_Conv):
    """3-D convolution layer, of volumes (N, C, D, H, W): arguments as :class:`Conv2d`."""

    dims = 3


class _ConvTranspose(_Conv):
    transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Any = 1,
        padding_mode: str = "zeros",
        **keywords: Any,
    ) -> None:
        if padding_mode != "zeros":
            raise ArgumentError(f"padding_mode must be 'zeros' in a transposed convolution, not {padding_mode!r}")
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, **keywords
        )
        self.output_padding = sizes("output_padding", output_padding, self.dims, 0)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the transposed operation."""
        found = {**super().arguments(), "output_padding": self.output_padding}
        del found["padding_mode"]
        return found

    def forward(self, x: Array, output_size: Any = None) -> Array:
        """Return activation(conv_transpose(x, weight) + bias), of an output size if one is given."""
        arguments = {**self.arguments(), **self.strategy()}
        if output_size is not None:
            arguments |= {"output_size": tuple(output_size), "output_padding": 0}
        y = conv_transposeNd(self.dims, x, self.weight.data, self.bias_data(), activation=self.activation, **arguments)
        if self.training:
            self.keep((x, activations.remember(self.activation, y), arguments))
        return y

    def backward(self, grad_output: Array, *, input_grad: bool = True) -> Array | None:
        """Add the gradients of weight and bias; return that of the input."""
        x, remembered, arguments = self.kept()
        needs = self.needs(input_grad)
        if not needs:
            return None
        grad = activations.gradient(self.activation, remembered, grad_output)
        return self.collect(conv_transposeNd_backward(self.dims, grad, x, self.weight.data, needs=needs, **arguments))

    def geometry(self, input_shape: Shape) -> ConvGeometry:
        """Return the geometry of the convolution whose input gradient this layer is."""
        return ConvGeometry.transposed(input_shape, self.weight.shape, dtype=self.weight.data.dtype, **self.arguments())

    def output_shape(self, input_shape: Shape) -> Shape:
        """Return the shape of the output, from the geometry."""
        return self.geometry(input_shape).x_shape

    def receptive_field(self, field: ReceptiveField | None, input_shape: Shape) -> ReceptiveField | None:
        """Give up: neighbouring outputs see windows of different sizes."""
        return None


class ConvTranspose1d(_ConvTranspose):
    """1-D transposed convolution layer: arguments as :class:`ConvTranspose2d`."""

    dims = 1


class ConvTranspose2d(_ConvTranspose):
    """2-D transposed convolution layer: :func:`fastconv.conv_transpose2d` with a weight and a bias of its own.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation
        As in the operation; `output_padding` adds elements after. The order is PyTorch's.
    padding_mode : "zeros"
    data_format, activation, algorithm, precision, dtype, rng
        As in :class:`Conv2d`.

    Attributes
    ----------
    weight : Parameter (C, K // groups, *kernel_size)
    bias : Parameter (K,) or None
    """

    dims = 2


class ConvTranspose3d(_ConvTranspose):
    """3-D transposed convolution layer: arguments as :class:`ConvTranspose2d`."""

    dims = 3
