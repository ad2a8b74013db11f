"""Transposed convolution: the input gradient of a convolution, as an operation of its own.

It needs no kernel: forward is the convolution's input gradient, and its own gradients are that convolution's forward
pass and weight gradient with the roles of input and output exchanged.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import arrays, selection
from ..arrays import FLOATING
from ..geometry import ConvGeometry
from ._entries import as_given, batched, entries, runner
from .convolution import (
    NEEDS,
    ConvGrads,
    adopt_all,
    adopt_operands,
    adopt_out,
    check_activation,
    check_bias,
    check_gradient,
    check_needs,
    check_weight_dims,
    zeros,
)


def conv_transposeNd(
    dims: int,
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    *,
    output_size: Any = None,
    data_format: str = "channels_first",
    activation: str | None = None,
    algorithm: str = "auto",
    precision: str | None = None,
    out: Any = None,
) -> Any:
    """Apply the transposed convolution: each element of x adds a scaled kernel to the output.

    output = (input - 1)*stride - before - after + dilation*(kernel - 1) + output_padding + 1

    Parameters
    ----------
    x : array (N, C, *spatial), or (N, *spatial, C) with data_format="channels_last"; N may be absent
        float32, float64, float16 or bfloat16.
    weight : array (C, K // groups, *kernel)
        Of x's dtype.
    bias : array (K,), optional
    stride, dilation : int or one per spatial dimension
    padding : int, one per dimension, pairs or a word
        Elements cut from each side of the output. "same" gives input * stride outputs.
    output_padding : int or one per dimension, below stride or dilation
        Elements added after.
    output_size : sequence of int, optional
        The output's spatial extent, instead of `output_padding`.
    groups, activation, algorithm, precision, out
        As in convNd.

    Returns
    -------
    array (N, K, *output) or (N, *output, K), of x's library and dtype

    Raises
    ------
    As convNd.

    Notes
    -----
    Dumoulin & Visin, "A guide to convolution arithmetic for deep learning", 2016, section 4.

    Examples
    --------
    >>> import numpy as np, fastconv
    >>> fastconv.conv_transpose1d(np.ones((1, 1, 3)), np.ones((1, 1, 2)), stride=2)
    array([[[1., 1., 1., 1., 1., 1.]]])
    """
    library, (x, weight, bias) = adopt_operands(x, weight, bias)
    geometry = transposed_geometry(
        dims, x, weight, stride, padding, output_padding, groups, dilation, output_size, data_format
    )
    check_bias(bias, geometry.in_channels, x.dtype)
    check_activation(activation, x.dtype)
    target = adopt_out(library, out, geometry.x_shape, x.dtype)
    run, x = runner(library.device), batched(x, geometry.batched)
    stored = run.stored_format(x, data_format)
    choice = selection.choose(geometry, "input_grad", stored, library.device, algorithm, precision)
    if geometry.is_empty:
        result = zeros(geometry.x_shape, x.dtype) if target is None else target
    else:
        slot = None if target is None else batched(target, geometry.batched)
        result = run.conv_input_grad(choice, geometry, stored, x, weight, slot, bias, activation)
        result = as_given(result, geometry.batched)
    return library.give_back(result) if out is None else out


def conv_transposeNd_backward(
    dims: int,
    grad_output: Any,
    x: Any,
    weight: Any,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    *,
    output_size: Any = None,
    data_format: str = "channels_first",
    needs: Any = NEEDS,
    algorithm: str = "auto",
    precision: str | None = None,
) -> ConvGrads:
    """Compute the gradients of :func:`conv_transposeNd` (without activation).

    Behind an activation multiply grad_output by its derivative first, as convNd_backward says.

    Parameters
    ----------
    grad_output : array, of the output's shape and x's dtype
    x, weight, stride, padding, output_padding, groups, dilation, output_size, data_format, algorithm, precision
        As in the forward call.
    needs : sequence of "input", "weight", "bias"

    Returns
    -------
    ConvGrads
        `input` of x's shape, `weight` of weight's, `bias` (K,); None where not asked for.

    Raises
    ------
    As conv_transposeNd.

    Examples
    --------
    >>> import numpy as np, fastconv
    >>> x, w, g = np.ones((1, 1, 3)), np.ones((1, 1, 2)), np.ones((1, 1, 6))
    >>> fastconv.conv_transpose1d_backward(g, x, w, stride=2).weight
    array([[[3., 3.]]])
    """
    library, (grad, x, weight) = adopt_all(grad_output=grad_output, x=x, weight=weight)
    geometry = transposed_geometry(
        dims, x, weight, stride, padding, output_padding, groups, dilation, output_size, data_format
    )
    wanted = check_needs(needs)
    check_gradient(grad, geometry.x_shape, x.dtype)
    found: dict[str, Any] = dict.fromkeys(NEEDS)
    run = runner(library.device)
    x, grad = batched(x, geometry.batched), batched(grad, geometry.batched)
    stored = run.stored_format(grad, data_format)
    for name, direction in (("input", "forward"), ("weight", "weight_grad")):
        if name in wanted:
            choice = selection.choose(geometry, direction, stored, library.device, algorithm, precision)
            if geometry.is_empty:
                found[name] = zeros(x.shape if name == "input" else weight.shape, x.dtype)
            elif name == "input":
                found[name] = run.conv_forward(choice, geometry, stored, grad, weight, None, None, None)
            else:
                found[name] = run.conv_weight_grad(choice, geometry, stored, x, grad)
    if "input" in wanted:
        found["input"] = as_given(found["input"], geometry.batched)
    if "bias" in wanted:
        empty = geometry.is_empty
        found["bias"] = zeros((geometry.in_channels,), x.dtype) if empty else run.bias_grad(grad, data_format)
    return ConvGrads(**{n: None if a is None else library.give_back(a) for n, a in found.items()})


conv_transpose1d, conv_transpose2d, conv_transpose3d = entries(conv_transposeNd)
conv_transpose1d_backward, conv_transpose2d_backward, conv_transpose3d_backward = entries(conv_transposeNd_backward)


def transposed_geometry(
    dims: int,
    x: np.ndarray,
    weight: np.ndarray,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: Any,
    dilation: Any,
    output_size: Any,
    data_format: Any,
) -> ConvGeometry:
    """Check dtypes and shapes of a transposed convolution; return the convolution whose input gradient it is."""
    arrays.check_dtype("x", x, FLOATING)
    arrays.check_same_dtype("weight", weight, "x", x.dtype)
    check_weight_dims(dims, weight, "(C, K // groups, *kernel)")
    return ConvGeometry.transposed(
        x.shape, weight.shape, stride, padding, output_padding, groups, dilation,
        output_size=output_size, data_format=data_format, dtype=x.dtype,
    )  # fmt: skip
