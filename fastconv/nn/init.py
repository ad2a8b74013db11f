"""Initial values of weights, written in place.

Glorot & Bengio, "Understanding the difficulty of training deep feedforward neural networks", 2010: a variance of
2 / (fan_in + fan_out) keeps the size of signals and gradients through linear layers. He et al., "Delving deep into
rectifiers", 2015: 2 / fan_in does so through ReLUs. `fan_in` and `fan_out` are the products summed for one output and
the outputs one input takes part in.

Functions take a Parameter or an array, fill it and return it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import ArgumentError, ShapeError
from ..geometry import one_of
from .module import Module, Parameter
from .rng import generator

NONLINEARITIES = ("linear", "relu", "leaky_relu", "sigmoid", "tanh")


def fans(tensor: Any) -> tuple[int, int]:
    """Return (fan_in, fan_out) of a weight (out, in, *kernel).

    As in PyTorch, also that of a transposed convolution, whose weight is (in, out, *kernel).
    """
    shape = np.shape(_array(tensor))
    if len(shape) < 2:
        raise ShapeError(f"a weight of shape {shape} has no fan_in and fan_out; it must have 2 dimensions or more")
    taps = math.prod(shape[2:])
    return shape[1] * taps, shape[0] * taps


def gain(nonlinearity: str, a: float = 0.0) -> float:
    """Return the factor by which weights make up for a nonlinearity; `a` is the negative slope of leaky_relu."""
    one_of("nonlinearity", nonlinearity, NONLINEARITIES)
    if nonlinearity == "leaky_relu":
        return math.sqrt(2 / (1 + a**2))
    return {"relu": math.sqrt(2), "tanh": 5 / 3}.get(nonlinearity, 1.0)


def constant_(tensor: Any, value: float) -> Any:
    """Fill with one value."""
    _array(tensor)[...] = value
    return tensor


def zeros_(tensor: Any) -> Any:
    """Fill with 0."""
    return constant_(tensor, 0.0)


def ones_(tensor: Any) -> Any:
    """Fill with 1."""
    return constant_(tensor, 1.0)


def uniform_(tensor: Any, low: float = 0.0, high: float = 1.0, *, rng: Any = None) -> Any:
    """Fill with numbers spread evenly over [low, high)."""
    array = _array(tensor)
    array[...] = generator(rng).uniform(low, high, array.shape)
    return tensor


def normal_(tensor: Any, mean: float = 0.0, std: float = 1.0, *, rng: Any = None) -> Any:
    """Fill with normally distributed numbers."""
    array = _array(tensor)
    array[...] = generator(rng).normal(mean, std, array.shape)
    return tensor


def xavier_uniform_(tensor: Any, gain: float = 1.0, *, rng: Any = None) -> Any:
    """Fill as Glorot & Bengio: uniform with variance gain**2 * 2 / (fan_in + fan_out). Also `glorot_uniform_`."""
    bound = gain * math.sqrt(6 / sum(fans(tensor)))
    return uniform_(tensor, -bound, bound, rng=rng)


def xavier_normal_(tensor: Any, gain: float = 1.0, *, rng: Any = None) -> Any:
    """Fill as Glorot & Bengio: normal with variance gain**2 * 2 / (fan_in + fan_out). Also `glorot_normal_`."""
    return normal_(tensor, 0.0, gain * math.sqrt(2 / sum(fans(tensor))), rng=rng)


def kaiming_uniform_(
    tensor: Any, a: float = 0.0, mode: str = "fan_in", nonlinearity: str = "leaky_relu", *, rng: Any = None
) -> Any:
    """Fill as He et al.: uniform with variance gain**2 / fan. Also `he_uniform_`.

    Parameters
    ----------
    tensor : Parameter or array (out, in, *kernel)
    a : float
        Negative slope, with nonlinearity="leaky_relu"; 0 is the ReLU.
    mode : "fan_in" or "fan_out"
        Keep the size of signals on the way forward, or of gradients on the way back.
    nonlinearity : str
        One of linear, relu, leaky_relu, sigmoid, tanh.
    """
    bound = math.sqrt(3) * _he_std(tensor, a, mode, nonlinearity)
    return uniform_(tensor, -bound, bound, rng=rng)


def kaiming_normal_(
    tensor: Any, a: float = 0.0, mode: str = "fan_in", nonlinearity: str = "leaky_relu", *, rng: Any = None
) -> Any:
    """Fill as He et al.: normal with variance gain**2 / fan. Also `he_normal_`; arguments as `kaiming_uniform_`."""
    return normal_(tensor, 0.0, _he_std(tensor, a, mode, nonlinearity), rng=rng)


glorot_uniform_, glorot_normal_ = xavier_uniform_, xavier_normal_
he_uniform_, he_normal_ = kaiming_uniform_, kaiming_normal_


def apply(
    model: Module,
    weight: Callable[..., Any] | None = None,
    bias: Callable[..., Any] | None = None,
    *,
    rng: Any = None,
) -> Module:
    """Initialise all weights and biases of convolutions and linear layers in a model.

    Parameters
    ----------
    model : Module
    weight, bias : function of this module, optional
        Filled with `weight`: parameters of two dimensions or more; with `bias`: those called "bias" of modules that
        have such a weight, so that normalisation layers stay as they are.
    rng : numpy.random.Generator or seed, optional

    Returns
    -------
    Module
        The model.

    Examples
    --------
    >>> from fastconv import nn
    >>> model = nn.init.apply(nn.Linear(3, 2), weight=nn.init.he_normal_, bias=nn.init.zeros_, rng=0)
    >>> model.bias.data
    array([0., 0.], dtype=float32)
    """
    source = generator(rng)
    for module in model.modules():
        own = [(name, p) for name, p in vars(module).items() if isinstance(p, Parameter)]
        if not any(p.data.ndim > 1 for _, p in own):
            continue
        for name, parameter in own:
            function = weight if parameter.data.ndim > 1 else bias if name == "bias" else None
            if function is not None:
                _call(function, parameter, source)
    return model


def default_(weight: Parameter, bias: Parameter | None, rng: Any = None) -> None:
    """Initialise a layer as PyTorch does: all numbers uniform in +-1/sqrt(fan_in)."""
    source = generator(rng)
    kaiming_uniform_(weight, a=math.sqrt(5), rng=source)
    if bias is not None:
        bound = 1 / math.sqrt(fans(weight)[0])
        uniform_(bias, -bound, bound, rng=source)


def _call(function: Callable[..., Any], parameter: Parameter, source: np.random.Generator) -> None:
    draws = "rng" in inspect.signature(function).parameters
    function(parameter, rng=source) if draws else function(parameter)


def _he_std(tensor: Any, a: float, mode: str, nonlinearity: str) -> float:
    fan = fans(tensor)[("fan_in", "fan_out").index(one_of("mode", mode, ("fan_in", "fan_out")))]
    if fan == 0:
        raise ArgumentError(f"a weight of shape {np.shape(_array(tensor))} has no elements to initialise")
    return gain(nonlinearity, a) / math.sqrt(fan)


def _array(tensor: Any) -> np.ndarray:
    return tensor.data if isinstance(tensor, Parameter) else tensor
