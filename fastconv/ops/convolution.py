"""Convolution and its gradients.

    y[n, k, p, q] = b[k] + sum over c, r, s of  x[n, c, p*u + r*d - a, q*u + s*d - a] * w[k, c, r, s]

with stride u, dilation d and padding a: cross-correlation, as every neural-network library has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .. import arrays, calls, selection
from ..activations import ACTIVATIONS
from ..arrays import FLOATING, INTEGER8
from ..errors import ArgumentError, ArgumentTypeError, DTypeError, ShapeError
from ..geometry import PADDING_MODES, ConvGeometry, one_of
from ._entries import as_given, batched, entries, runner

NEEDS = ("input", "weight", "bias")


class ConvGrads(NamedTuple):
    """Gradients of a convolution; None for those not asked for.

    Examples
    --------
    >>> import numpy as np, fastconv
    >>> x, w, g = np.ones((1, 1, 3)), np.ones((1, 1, 2)), np.ones((1, 1, 2))
    >>> grads = fastconv.conv1d_backward(g, x, w, needs=("weight",))
    >>> grads.weight, grads.input is None
    (array([[[2., 2.]]]), True)
    """

    input: Any
    weight: Any
    bias: Any


def convNd(
    dims: int,
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    data_format: str = "channels_first",
    padding_mode: str = "zeros",
    activation: str | None = None,
    algorithm: str = "auto",
    precision: str | None = None,
    out: Any = None,
) -> Any:
    """Convolve `x` with `weight`.

    Parameters
    ----------
    x : array (N, C, *spatial), or (N, *spatial, C) with data_format="channels_last"; N may be absent
        NumPy array or CPU tensor of float32, float64, float16, bfloat16, int8 or uint8; any strides.
    weight : array (K, C // groups, *kernel)
        Of x's dtype (any 8-bit integer with 8-bit x).
    bias : array (K,), optional
        Of x's dtype (int32 with 8-bit x).
    stride, dilation : int or one per spatial dimension
    padding : int, one per dimension, ((before, after), ...) pairs, or "valid", "same", "same_lower", "full"
        "same" gives ceil(input / stride) outputs with the odd element after, "same_lower" before.
    groups : int
        Divides C and K; group i of the filters sees group i of the channels.
    padding_mode : "zeros", "reflect", "symmetric", "replicate" or "circular"
    activation : None, "relu", "leaky_relu" (slope 0.01), "sigmoid" or "tanh"
    algorithm : "auto", "tune", "direct", "im2col", "implicit_gemm", "winograd", "fft", "depthwise" or a variant
    precision : "highest", "high" or "medium", optional
        Promise about float32 results: RMS error over RMS of at most 1e-6, 2e-5, 5e-3.
    out : array, optional
        Where to write the result.

    Returns
    -------
    array (N, K, *output) or (N, *output, K), of x's library and dtype (int32 for 8-bit integers)
        Half types are summed in float32. If x lies in memory as channels_last, so does the result.

    Raises
    ------
    ShapeError, ArgumentError (ValueError); DTypeError, ArgumentTypeError (TypeError)
        Naming the argument, its value and what is expected.
    UnsupportedError
        The algorithm named cannot compute this case.
    WorkspaceLimitError
        The algorithm named needs more than config.workspace_limit.

    Notes
    -----
    Dumoulin & Visin, "A guide to convolution arithmetic for deep learning", 2016.

    Examples
    --------
    >>> import numpy as np, fastconv
    >>> x, w = np.arange(16.0).reshape(1, 1, 4, 4), np.ones((1, 1, 3, 3))
    >>> fastconv.conv2d(x, w)
    array([[[[45., 54.],
             [81., 90.]]]])
    >>> fastconv.conv1d(x[0, :, :1], w[0, :, :1], padding="same", algorithm="im2col")
    array([[[1., 3., 6., 5.]]])
    """
    key = None
    if out is None:
        arguments = (
            "conv", dims, stride, padding, dilation, groups, data_format, padding_mode, activation, algorithm, precision
        )  # fmt: skip
        key = calls.key(arguments, x, weight, bias)
        prepared = calls.known.get(key)
        if prepared is not None and (result := prepared(x, weight, bias)) is not None:
            return result
    library, (x, weight, bias) = adopt_operands(x, weight, bias)
    geometry = conv_geometry(dims, x, weight, stride, padding, dilation, groups, data_format, padding_mode)
    check_bias(bias, geometry.out_channels, x.dtype)
    check_activation(activation, x.dtype)
    result_dtype = arrays.compute_dtype(x.dtype) if x.dtype.name in INTEGER8 else x.dtype
    target = adopt_out(library, out, geometry.output_shape, result_dtype)
    run, x = runner(library.device), batched(x, geometry.batched)
    stored = run.stored_format(x, data_format)
    choice = selection.choose(geometry, "forward", stored, library.device, algorithm, precision)
    if geometry.is_empty:
        result = arrays.empty(geometry.output_shape, result_dtype) if target is None else target
    else:
        slot = None if target is None else batched(target, geometry.batched)
        result = run.conv_forward(choice, geometry, stored, x, weight, bias, activation, slot)
        result = as_given(result, geometry.batched)
        if key is not None:
            calls.keep(key, arguments, run.prepared_forward(choice, geometry, activation))
    return library.give_back(result) if out is None else out


def convNd_backward(
    dims: int,
    grad_output: Any,
    x: Any,
    weight: Any,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    data_format: str = "channels_first",
    padding_mode: str = "zeros",
    needs: Any = NEEDS,
    algorithm: str = "auto",
    precision: str | None = None,
) -> ConvGrads:
    """Compute the gradients of :func:`convNd` (without activation).

    Behind an activation multiply grad_output by its derivative first, from the output y: ``y > 0`` for "relu",
    ``y * (1 - y)`` for "sigmoid", ``1 - y * y`` for "tanh".

    Parameters
    ----------
    grad_output : array, of the output's shape and x's dtype
        Gradient of the loss with respect to the convolution's output.
    x, weight, stride, padding, dilation, groups, data_format, padding_mode, algorithm, precision
        As in the forward call.
    needs : sequence of "input", "weight", "bias"
        The gradients to compute.

    Returns
    -------
    ConvGrads
        `input` of x's shape, `weight` of weight's, `bias` (K,); None where not asked for.

    Raises
    ------
    As :func:`convNd`.

    Examples
    --------
    >>> import numpy as np, fastconv
    >>> x, w, g = np.ones((1, 2, 4)), np.ones((3, 2, 3)), np.ones((1, 3, 2))
    >>> fastconv.conv1d_backward(g, x, w, needs=("input", "bias"))
    ConvGrads(input=array([[[3., 6., 6., 3.],
            [3., 6., 6., 3.]]]), weight=None, bias=array([2., 2., 2.]))
    """
    arguments = (
        "conv_backward", dims, stride, padding, dilation, groups, data_format, padding_mode, needs, algorithm, precision
    )  # fmt: skip
    key = calls.key(arguments, grad_output, x, weight)
    prepared = calls.known.get(key)
    if prepared is not None and (result := prepared(grad_output, x, weight)) is not None:
        return result
    library, (grad, x, weight) = adopt_all(grad_output=grad_output, x=x, weight=weight)
    geometry = conv_geometry(dims, x, weight, stride, padding, dilation, groups, data_format, padding_mode)
    wanted = check_needs(needs)
    check_floating("x", x)
    check_gradient(grad, geometry.output_shape, x.dtype)
    found: dict[str, Any] = dict.fromkeys(NEEDS)
    short: dict[str, Any] = {}
    run = runner(library.device)
    x, grad = batched(x, geometry.batched), batched(grad, geometry.batched)
    stored = run.stored_format(x, data_format)
    for name, direction in (("input", "input_grad"), ("weight", "weight_grad")):
        if name in wanted:
            choice = selection.choose(geometry, direction, stored, library.device, algorithm, precision)
            if geometry.is_empty:
                found[name] = zeros(x.shape if name == "input" else weight.shape, x.dtype)
            elif name == "input":
                found[name] = run.conv_input_grad(choice, geometry, stored, grad, weight)
                short[name] = run.prepared_input_grad(choice, geometry)
            else:
                found[name] = run.conv_weight_grad(choice, geometry, stored, grad, x)
                short[name] = run.prepared_weight_grad(choice, geometry)
    if "input" in wanted:
        found["input"] = as_given(found["input"], geometry.batched)
    if "bias" in wanted:
        empty = geometry.is_empty
        found["bias"] = zeros((len(weight),), x.dtype) if empty else run.bias_grad(grad, data_format)
        short["bias"] = None if empty else run.prepared_bias_grad(geometry)
    if key is not None and all(short.get(name) for name in wanted):
        calls.keep(key, arguments, _prepared_backward(**short))
    return ConvGrads(**{n: None if a is None else library.give_back(a) for n, a in found.items()})


def _prepared_backward(input: Any = None, weight: Any = None, bias: Any = None) -> Callable[..., ConvGrads | None]:
    """Return the whole backward call, from functions for the gradients that are asked for."""

    def run(grad: Any, x: Any, w: Any) -> ConvGrads | None:
        dx = None if input is None else input(grad, w)
        dw = None if weight is None else weight(grad, x)
        if (dx is None) != (input is None) or (dw is None) != (weight is None):
            return None
        return ConvGrads(dx, dw, None if bias is None else bias(grad))

    return run


conv1d, conv2d, conv3d = entries(convNd)
conv1d_backward, conv2d_backward, conv3d_backward = entries(convNd_backward)


# --- shared with the transposed convolution --------------------------------------------------------------------


def adopt_all(**named: Any) -> tuple[arrays.Library, list[Any]]:
    """Adopt arrays that must all be there, in the machine's byte order."""
    for name, value in named.items():
        arrays.require_array(name, value)
    library, found = arrays.adopt(**named)
    return library, [arrays.native(a) for a in found]


def adopt_operands(x: Any, weight: Any, bias: Any) -> tuple[arrays.Library, list[Any]]:
    """Adopt x, weight and perhaps a bias."""
    if bias is None:
        library, found = adopt_all(x=x, weight=weight)
        return library, [*found, None]
    return adopt_all(x=x, weight=weight, bias=bias)


def adopt_out(library: arrays.Library, out: Any, expected: tuple[int, ...], dtype: np.dtype) -> Any:
    """Check the array to write to."""
    if out is None:
        return None
    if arrays.library_of("out", out) is not library:
        raise ArgumentTypeError(f"out must be an array of {library.name}, like x")
    target = library.adopt("out", out)
    if target.shape != expected:
        raise ShapeError(f"out must have the output's shape {expected}, not {target.shape}")
    if target.dtype != dtype:
        raise DTypeError(f"out must have dtype {dtype}, not {target.dtype}")
    if not target.flags.writeable:
        raise ArgumentError("out must be writable, not a read-only array")
    return target


def conv_geometry(
    dims: int,
    x: np.ndarray,
    weight: np.ndarray,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    data_format: Any,
    padding_mode: Any,
) -> ConvGeometry:
    """Check dtypes and shapes of a convolution."""
    one_of("padding_mode", padding_mode, PADDING_MODES)
    check_dtypes(x, weight)
    check_weight_dims(dims, weight, "(K, C // groups, *kernel)")
    return ConvGeometry.create(
        x.shape, weight.shape, stride, padding, dilation, groups,
        data_format=data_format, padding_mode=padding_mode, dtype=x.dtype,
    )  # fmt: skip


def check_dtypes(x: np.ndarray, weight: np.ndarray) -> None:
    """Check that x and weight are of one supported dtype, or both 8-bit integers."""
    arrays.check_dtype("x", x, (*FLOATING, *INTEGER8))
    arrays.check_dtype("weight", weight, (*FLOATING, *INTEGER8))
    if not (x.dtype.name in INTEGER8 and weight.dtype.name in INTEGER8):
        arrays.check_same_dtype("weight", weight, "x", x.dtype)


def check_floating(name: str, array: np.ndarray) -> None:
    """Check that an array has a floating-point dtype: there are no gradients of integers."""
    arrays.check_dtype(name, array, FLOATING)


def check_weight_dims(dims: int, weight: np.ndarray, layout: str) -> None:
    """Check that the weight has as many dimensions as the operation's name says."""
    if weight.ndim != dims + 2:
        raise ShapeError(f"weight must have {dims + 2} dimensions {layout}, not shape {weight.shape}")


def check_bias(bias: np.ndarray | None, filters: int, dtype: np.dtype) -> None:
    """Check that the bias is one number per filter."""
    if bias is None:
        return
    if bias.shape != (filters,):
        raise ShapeError(f"bias must have shape ({filters},), one element per filter, not {bias.shape}")
    expected = np.dtype(np.int32) if dtype.name in INTEGER8 else dtype
    if bias.dtype != expected:
        raise DTypeError(f"bias must have dtype {expected} when x has {dtype}, not {bias.dtype}")


def check_activation(activation: Any, dtype: np.dtype) -> None:
    """Check that the activation is known, and defined for the result."""
    if activation is None:
        return
    one_of("activation", activation, ACTIVATIONS)
    if dtype.name in INTEGER8 and activation != "relu":
        raise DTypeError(f"activation={activation!r} needs a floating-point x, not {dtype}")


def check_gradient(grad: np.ndarray, expected: tuple[int, ...], dtype: np.dtype) -> None:
    """Check that the gradient has the output's shape and x's dtype."""
    if grad.shape != expected:
        raise ShapeError(f"grad_output must have the output's shape {expected}, not {grad.shape}")
    arrays.check_same_dtype("grad_output", grad, "x", dtype)


def check_needs(needs: Any) -> tuple[str, ...]:
    """Check the names of the gradients asked for."""
    if isinstance(needs, str) or not isinstance(needs, (tuple, list, set, frozenset)):
        raise ArgumentTypeError(f"needs must be a sequence of {', '.join(map(repr, NEEDS))}, not {needs!r}")
    return tuple(one_of("needs", need, NEEDS) for need in needs)


def zeros(dimensions: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return the gradient of nothing."""
    return np.zeros(dimensions, dtype)
