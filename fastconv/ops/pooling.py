"""Pooling, unpooling and their gradients."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np

from .. import arrays, calls
from ..arrays import FLOATING
from ..errors import ArgumentError, ArgumentTypeError, DTypeError, ShapeError
from ..geometry import (
    PoolGeometry,
    flag,
    integer,
    pool_grad_geometry,
    sizes,
    unpool_output_size,
)
from ._entries import as_given, batched, entries, runner
from .convolution import adopt_all, check_floating

# What PyTorch pools too: integers have a maximum, and int64 an average (truncated).
MAX_DTYPES = (*FLOATING, "int8", "uint8", "int16", "int32", "int64")
AVERAGE_DTYPES = (*FLOATING, "int64")


def max_poolNd(
    dims: int,
    x: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    data_format: str = "channels_first",
) -> Any:
    """Return the maximum of each window.

    Parameters
    ----------
    x : array (N, C, *spatial), or (N, *spatial, C) with data_format="channels_last"; N may be absent
        Floating point or integers.
    kernel_size, stride, dilation : int or one per spatial dimension
        stride None means kernel_size.
    padding : int or one per dimension (at most half of kernel_size), (before, after) pairs, or a word
        Padding is -inf (the smallest value of an integer dtype).
    ceil_mode : bool
        Also pool a last, partial window, if it starts inside the input or its front padding.
    return_indices : bool
        Also return where each maximum was.

    Returns
    -------
    array (N, C, *output) of x's dtype, or (maxima, indices)
        indices : int64, flat over the plane's spatial extent. Of equal maxima the first in scan order counts; NaN
        wins over all numbers (the last NaN, as in PyTorch); -1 where a window lies wholly in padding.

    Raises
    ------
    ShapeError, ArgumentError (ValueError); DTypeError, ArgumentTypeError (TypeError)

    Notes
    -----
    Dumoulin & Visin, "A guide to convolution arithmetic for deep learning", 2016, section 3.

    Examples
    --------
    >>> import numpy as np, fastconv
    >>> fastconv.max_pool2d(np.arange(16.0).reshape(1, 1, 4, 4), 2)
    array([[[[ 5.,  7.],
             [13., 15.]]]])
    >>> fastconv.max_pool1d(np.array([[1.0, 3.0, 2.0, 5.0]]), 2, return_indices=True)
    (array([[3., 5.]]), array([[1, 3]]))
    """
    arguments = ("max_pool", dims, kernel_size, stride, padding, dilation, ceil_mode, return_indices, data_format)
    key = calls.key(arguments, x)
    prepared = calls.known.get(key)
    if prepared is not None:
        return prepared(x)
    library, (x,) = adopt_all(x=x)
    arrays.check_dtype("x", x, MAX_DTYPES)
    geometry = PoolGeometry.create(
        x.shape, kernel_size, stride, padding, dilation, ceil_mode, spatial_dims=dims, data_format=data_format
    )

    calls.keep(key, arguments, runner(library.device).prepared_max_pool(geometry, x.dtype, bool(return_indices)))
    return _max_pooled(library, geometry, x, return_indices)


def adaptive_max_poolNd(
    dims: int, x: Any, output_size: Any, return_indices: bool = False, *, data_format: str = "channels_first"
) -> Any:
    """Return the maximum of each of `output_size` windows: window i is [floor(i*n/p), ceil((i+1)*n/p)).

    Parameters
    ----------
    x : array (N, C, *spatial), or (N, *spatial, C) with data_format="channels_last"; N may be absent
        float32, float64, float16 or bfloat16.
    output_size : int or one per spatial dimension
        In 2-D and 3-D an entry of None keeps the input's size.
    return_indices : bool

    Returns
    -------
    array (N, C, *output_size) of x's dtype, or (maxima, indices) as max_poolNd

    Raises
    ------
    ShapeError, ArgumentError (ValueError); DTypeError, ArgumentTypeError (TypeError)

    Examples
    --------
    >>> import numpy as np, fastconv
    >>> fastconv.adaptive_max_pool1d(np.array([[1.0, 3.0, 2.0, 5.0, 4.0]]), 2)
    array([[3., 5.]])
    """
    arguments = ("adaptive_max_pool", dims, output_size, return_indices, data_format)
    key = calls.key(arguments, x)
    prepared = calls.known.get(key)
    if prepared is not None:
        return prepared(x)
    library, (x,) = adopt_all(x=x)
    geometry = adaptive_geometry(dims, x, output_size, data_format, average=False)
    calls.keep(key, arguments, runner(library.device).prepared_max_pool(geometry, x.dtype, bool(return_indices)))
    return _max_pooled(library, geometry, x, return_indices)


def adaptive_geometry(dims: int, x: Any, output_size: Any, data_format: str, average: bool) -> PoolGeometry:
    """Check the arguments of an adaptive pool."""
    check_floating("x", x)
    # Of no channels PyTorch takes an image, and averages of batches in 1-D and 2-D, or down to one element.
    allowed = x.ndim == dims + 1 or (average and (dims < 3 or output_size in (1, (1, 1, 1), [1, 1, 1])))
    return PoolGeometry.adaptive(
        x.shape, output_size, spatial_dims=dims, data_format=data_format, allow_no_channels=allowed
    )


def _max_pooled(library: arrays.Library, geometry: PoolGeometry, x: np.ndarray, return_indices: bool) -> Any:
    y, indices = runner(library.device).max_pool(geometry, batched(x, geometry.batched), bool(return_indices))
    y = library.give_back(as_given(y, geometry.batched))
    return (y, library.give_back(as_given(indices, geometry.batched))) if return_indices else y


def max_poolNd_backward(
    dims: int, grad_output: Any, indices: Any, input_shape: Any, *, data_format: str = "channels_first"
) -> Any:
    """Return the gradient of max_poolNd with respect to its input.

    Each gradient goes to the element that its index names; where windows overlap they add up.

    Parameters
    ----------
    grad_output : array, of the output's shape
    indices : int64 array of the same shape, as max_poolNd returned it
    input_shape : shape of x

    Returns
    -------
    array of shape `input_shape` and grad_output's dtype

    Raises
    ------
    ShapeError, ArgumentError (ValueError); DTypeError, ArgumentTypeError (TypeError)
        ArgumentError too if an index is outside the plane; on a GPU, where no call waits to see that, it counts for
        nothing.

    Examples
    --------
    >>> import numpy as np, fastconv
    >>> fastconv.max_pool1d_backward(np.array([[1.0, 2.0]]), np.array([[1, 3]]), (1, 4))
    array([[0., 1., 0., 2.]])
    """
    arguments = ("max_pool_backward", dims, input_shape, data_format)
    key = calls.key(arguments, grad_output, indices)
    prepared = calls.known.get(key)
    if prepared is not None:
        dx = prepared(grad_output, indices)
        if dx is not None:
            return dx
    library, (grad, where) = adopt_all(grad_output=grad_output, indices=indices)
    arrays.check_dtype("grad_output", grad, MAX_DTYPES)
    batched_, batch, channels, spatial = pool_grad_geometry(input_shape, grad.shape, dims, data_format)
    _check_indices(where, grad.shape, "grad_output")
    dx, valid = runner(library.device).max_pool_backward(
        batched(grad, batched_), batched(where, batched_), batch, channels, spatial, data_format
    )
    if not valid:
        raise_index(where, spatial, lowest=-1)
    if key is not None:
        shape = (*input_shape,)
        prepare = runner(library.device).prepared_max_pool_backward
        calls.keep(key, arguments, prepare(batched(grad, batched_), batched(where, batched_), shape, data_format))
    return library.give_back(as_given(dx, batched_))


def adaptive_max_poolNd_backward(
    dims: int, grad_output: Any, indices: Any, input_shape: Any, *, data_format: str = "channels_first"
) -> Any:
    """Return the gradient of adaptive_max_poolNd with respect to its input; as :func:`max_poolNd_backward`.

    Parameters
    ----------
    grad_output : array, of the output's shape
    indices : int64 array of the same shape, as adaptive_max_poolNd returned it
    input_shape : shape of x

    Returns
    -------
    array of shape `input_shape` and grad_output's dtype

    Raises
    ------
    As max_poolNd_backward.

    Examples
    --------
    >>> import numpy as np, fastconv
    >>> fastconv.adaptive_max_pool1d_backward(np.array([[1.0]]), np.array([[2]]), (1, 3))
    array([[0., 0., 1.]])
    """
    return max_poolNd_backward(dims, grad_output, indices, input_shape, data_format=data_format)


def max_unpoolNd(
    dims: int,
    x: Any,
    indices: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    output_size: Any = None,
    *,
    data_format: str = "channels_first",
) -> Any:
    """Put each value where its index says, and zeros elsewhere: the partial inverse of max_poolNd.

    Parameters
    ----------
    x : array (N, C, *spatial), or (N, *spatial, C) with data_format="channels_last"; N may be absent
        float32, float64, float16 or bfloat16.
    indices : int64 array of x's shape, flat over the output's spatial extent
        Of equal indices the last in scan order wins.
    kernel_size, stride, padding
        Of the pooling undone: output = (input - 1)*stride - 2*padding + kernel_size.
    output_size : sequence of int, optional
        Another spatial extent, less than a stride away from that.

    Returns
    -------
    array (N, C, *output) of x's dtype

    Raises
    ------
    ShapeError, ArgumentError (ValueError); DTypeError, ArgumentTypeError (TypeError)
        ArgumentError too if an index is outside the output; on a GPU, where no call waits to see that, it counts for
        nothing.

    Notes
    -----
    Zeiler & Fergus, "Visualizing and understanding convolutional networks", 2014.

    Examples
    --------
    >>> import numpy as np, fastconv
    >>> fastconv.max_unpool1d(np.array([[3.0, 5.0]]), np.array([[1, 3]]), 2)
    array([[0., 3., 0., 5.]])
    """
    library, (x, where) = adopt_all(x=x, indices=indices)
    check_floating("x", x)
    batched_, batch, channels, _, spatial = unpool_output_size(
        x.shape, kernel_size, stride, padding, output_size, spatial_dims=dims, data_format=data_format
    )
    _check_indices(where, x.shape, "x")
    y, valid = runner(library.device).max_unpool(
        batched(x, batched_), batched(where, batched_), batch, channels, spatial, data_format
    )
    if not valid:
        raise_index(where, spatial, lowest=0)
    return library.give_back(as_given(y, batched_))


def max_unpoolNd_backward(dims: int, grad_output: Any, indices: Any, *, data_format: str = "channels_first") -> Any:
    """Return the gradient of max_unpoolNd with respect to its input: the gradient at each index.

    Parameters
    ----------
    grad_output : array, of the unpooled shape
    indices : int64 array, of the pooled shape

    Returns
    -------
    array of the indices' shape and grad_output's dtype

    Raises
    ------
    As max_unpoolNd.

    Examples
    --------
    >>> import numpy as np, fastconv
    >>> fastconv.max_unpool1d_backward(np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([[1, 3]]))
    array([[2., 4.]])
    """
    library, (grad, where) = adopt_all(grad_output=grad_output, indices=indices)
    check_floating("grad_output", grad)
    batched_, batch, channels, spatial = pool_grad_geometry(
        grad.shape, where.shape, dims, data_format, names=("grad_output", "indices")
    )
    _check_index_dtype(where)
    small = pool_grad_geometry(where.shape, where.shape, dims, data_format, names=("indices", "indices"))[3]
    dx, valid = runner(library.device).max_unpool_backward(
        batched(grad, batched_), batched(where, batched_), batch, channels, small, data_format
    )
    if not valid:
        raise_index(where, spatial, lowest=0)
    return library.give_back(as_given(dx, batched_))


def avg_poolNd(
    dims: int,
    x: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    dilation: Any = 1,
    data_format: str = "channels_first",
) -> Any:
    """Return the average of each window.

    Parameters
    ----------
    x : array (N, C, *spatial), or (N, *spatial, C) with data_format="channels_last"; N may be absent
        Floating point, or int64 (averages are truncated towards zero).
    kernel_size, stride, padding, ceil_mode
        As max_poolNd, with zeros for padding.
    count_include_pad : bool
        Whether zeros of the padding count as elements; what a partial last window lacks never does. A window
        without elements gives 0.
    divisor_override : int, optional
        Divide by this instead of the number of elements.
    dilation : int or one per spatial dimension

    Returns
    -------
    array (N, C, *output) of x's dtype

    Raises
    ------
    ShapeError, ArgumentError (ValueError); DTypeError, ArgumentTypeError (TypeError)

    Notes
    -----
    Dumoulin & Visin, "A guide to convolution arithmetic for deep learning", 2016, section 3.

    Examples
    --------
    >>> import numpy as np, fastconv
    >>> fastconv.avg_pool2d(np.arange(16.0).reshape(1, 1, 4, 4), 2)
    array([[[[ 2.5,  4.5],
             [10.5, 12.5]]]])
    """
    arguments = (
        "avg_pool", dims, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, dilation,
        data_format,
    )  # fmt: skip
    key = calls.key(arguments, x)
    prepared = calls.known.get(key)
    if prepared is not None:
        return prepared(x)
    library, (x,) = adopt_all(x=x)
    arrays.check_dtype("x", x, AVERAGE_DTYPES)
    geometry = PoolGeometry.create(
        x.shape, kernel_size, stride, padding, dilation, ceil_mode,
        spatial_dims=dims, data_format=data_format, average=True,
    )  # fmt: skip
    counted, divisor = flag("count_include_pad", count_include_pad), checked_divisor(divisor_override)

    calls.keep(key, arguments, runner(library.device).prepared_avg_pool(geometry, x.dtype, counted, divisor))
    y = runner(library.device).avg_pool(geometry, batched(x, geometry.batched), counted, divisor)
    return library.give_back(as_given(y, geometry.batched))


def avg_poolNd_backward(
    dims: int,
    grad_output: Any,
    input_shape: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    dilation: Any = 1,
    data_format: str = "channels_first",
) -> Any:
    """Return the gradient of avg_poolNd with respect to its input: each window's gradient, shared out evenly.

    Parameters
    ----------
    grad_output : array, of the output's shape
    input_shape : shape of x
    kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, dilation, data_format
        As in the forward call.

    Returns
    -------
    array of shape `input_shape` and grad_output's dtype

    Raises
    ------
    As avg_poolNd.

    Examples
    --------
    >>> import numpy as np, fastconv
    >>> fastconv.avg_pool1d_backward(np.array([[2.0, 4.0]]), (1, 4), 2)
    array([[1., 1., 2., 2.]])
    """
    arguments = (
        "avg_pool_backward", dims, input_shape, kernel_size, stride, padding, ceil_mode, count_include_pad,
        divisor_override, dilation, data_format,
    )  # fmt: skip
    key = calls.key(arguments, grad_output)
    prepared = calls.known.get(key)
    if prepared is not None:
        return prepared(grad_output)
    library, (grad,) = adopt_all(grad_output=grad_output)
    check_floating("grad_output", grad)
    geometry = PoolGeometry.create(
        input_shape, kernel_size, stride, padding, dilation, ceil_mode,
        spatial_dims=dims, data_format=data_format, name="input_shape", average=True,
    )  # fmt: skip
    counted, divisor = flag("count_include_pad", count_include_pad), checked_divisor(divisor_override)
    return _average_grad(library, geometry, grad, counted, divisor, key, arguments)


def adaptive_avg_poolNd(dims: int, x: Any, output_size: Any, *, data_format: str = "channels_first") -> Any:
    """Return the average of each of `output_size` windows: window i is [floor(i*n/p), ceil((i+1)*n/p)).

    Parameters
    ----------
    x : array (N, C, *spatial), or (N, *spatial, C) with data_format="channels_last"; N may be absent
        float32, float64, float16 or bfloat16.
    output_size : int or one per spatial dimension
        In 2-D and 3-D an entry of None keeps the input's size.

    Returns
    -------
    array (N, C, *output_size) of x's dtype

    Raises
    ------
    ShapeError, ArgumentError (ValueError); DTypeError, ArgumentTypeError (TypeError)

    Notes
    -----
    He et al., "Spatial pyramid pooling in deep convolutional networks for visual recognition", 2014.

    Examples
    --------
    >>> import numpy as np, fastconv
    >>> fastconv.adaptive_avg_pool1d(np.array([[1.0, 3.0, 2.0]]), 2)
    array([[2. , 2.5]])
    """
    arguments = ("adaptive_avg_pool", dims, output_size, data_format)
    key = calls.key(arguments, x)
    prepared = calls.known.get(key)
    if prepared is not None:
        return prepared(x)
    library, (x,) = adopt_all(x=x)
    geometry = adaptive_geometry(dims, x, output_size, data_format, average=True)
    calls.keep(key, arguments, runner(library.device).prepared_avg_pool(geometry, x.dtype, False, 0))
    y = runner(library.device).avg_pool(geometry, batched(x, geometry.batched), False, 0)
    return library.give_back(as_given(y, geometry.batched))


def adaptive_avg_poolNd_backward(
    dims: int, grad_output: Any, input_shape: Any, *, data_format: str = "channels_first"
) -> Any:
    """Return the gradient of adaptive_avg_poolNd with respect to its input.

    The output's size is that of `grad_output`.

    Parameters
    ----------
    grad_output : array, of the output's shape
    input_shape : shape of x

    Returns
    -------
    array of shape `input_shape` and grad_output's dtype

    Raises
    ------
    As adaptive_avg_poolNd.

    Examples
    --------
    >>> import numpy as np, fastconv
    >>> fastconv.adaptive_avg_pool1d_backward(np.array([[2.0, 4.0]]), (1, 3))
    array([[1., 3., 2.]])
    """
    arguments = ("adaptive_avg_pool_backward", dims, input_shape, data_format)
    key = calls.key(arguments, grad_output)
    prepared = calls.known.get(key)
    if prepared is not None:
        return prepared(grad_output)
    library, (grad,) = adopt_all(grad_output=grad_output)
    check_floating("grad_output", grad)
    _, _, _, spatial = pool_grad_geometry(grad.shape, grad.shape, dims, data_format, names=("grad_output",) * 2)
    pool_grad_geometry(input_shape, grad.shape, dims, data_format)
    geometry = PoolGeometry.adaptive(
        input_shape, spatial, spatial_dims=dims, data_format=data_format, name="input_shape", allow_no_channels=True
    )
    return _average_grad(library, geometry, grad, False, 0, key, arguments)


def lp_poolNd(
    dims: int,
    x: Any,
    norm_type: float,
    kernel_size: Any,
    stride: Any = None,
    ceil_mode: bool = False,
    *,
    padding: Any = 0,
    dilation: Any = 1,
    data_format: str = "channels_first",
) -> Any:
    """Return the p-norm of each window: (sum |x|**p) ** (1/p).

    PyTorch leaves out the absolute value, which differs for odd p and negative x; here p = 1 is the sum of
    magnitudes, as in ONNX. As in PyTorch, a partial last window (ceil_mode) is scaled up to a whole one.

    Parameters
    ----------
    x : array (N, C, *spatial), or (N, *spatial, C) with data_format="channels_last"; N may be absent
        float32, float64, float16 or bfloat16.
    norm_type : float
        p, not zero. math.inf gives the largest magnitude, -math.inf the smallest.
    kernel_size, stride, ceil_mode, padding, dilation
        As avg_poolNd.

    Returns
    -------
    array (N, C, *output) of x's dtype

    Raises
    ------
    ShapeError, ArgumentError (ValueError); DTypeError, ArgumentTypeError (TypeError)

    Notes
    -----
    Sermanet, Chintala & LeCun, "Convolutional neural networks applied to house numbers digit classification", 2012.

    Examples
    --------
    >>> import numpy as np, fastconv
    >>> fastconv.lp_pool1d(np.array([[3.0, 4.0, 0.0, -2.0]]), 2, 2)
    array([[5., 2.]])
    """
    library, (x,) = adopt_all(x=x)
    check_floating("x", x)
    power = checked_norm(norm_type)
    kernel = sizes("kernel_size", kernel_size, dims, 1, one_for_all=False)
    geometry = PoolGeometry.create(
        x.shape, kernel, stride, padding, dilation, ceil_mode,
        spatial_dims=dims, data_format=data_format, average=True,
    )  # fmt: skip
    y = runner(library.device).lp_pool(geometry, batched(x, geometry.batched), power)
    return library.give_back(as_given(y, geometry.batched))


def lp_poolNd_backward(
    dims: int,
    grad_output: Any,
    x: Any,
    norm_type: float,
    kernel_size: Any,
    stride: Any = None,
    ceil_mode: bool = False,
    *,
    padding: Any = 0,
    dilation: Any = 1,
    data_format: str = "channels_first",
) -> Any:
    """Return the gradient of lp_poolNd with respect to its input; 0 where a window's norm is 0.

    Parameters
    ----------
    grad_output : array, of the output's shape
    x, norm_type, kernel_size, stride, ceil_mode, padding, dilation, data_format
        As in the forward call; norm_type must be finite.

    Returns
    -------
    array of x's shape and dtype

    Raises
    ------
    As lp_poolNd.

    Examples
    --------
    >>> import numpy as np, fastconv
    >>> fastconv.lp_pool1d_backward(np.array([[1.0]]), np.array([[3.0, -4.0]]), 2, 2)
    array([[ 0.6, -0.8]])
    """
    library, (grad, x) = adopt_all(grad_output=grad_output, x=x)
    check_floating("x", x)
    arrays.check_same_dtype("grad_output", grad, "x", x.dtype)
    power = checked_norm(norm_type)
    if math.isinf(power):
        raise ArgumentError("norm_type must be finite for the gradient; use max_pool on abs(x) for infinity")
    kernel = sizes("kernel_size", kernel_size, dims, 1, one_for_all=False)
    geometry = PoolGeometry.create(
        x.shape, kernel, stride, padding, dilation, ceil_mode,
        spatial_dims=dims, data_format=data_format, average=True,
    )  # fmt: skip
    _check_grad_shape(grad, geometry)
    dx = runner(library.device).lp_pool_backward(
        geometry, batched(grad, geometry.batched), batched(x, geometry.batched), power
    )
    return library.give_back(as_given(dx, geometry.batched))


max_pool1d, max_pool2d, max_pool3d = entries(max_poolNd)
max_pool1d_backward, max_pool2d_backward, max_pool3d_backward = entries(max_poolNd_backward)
max_unpool1d, max_unpool2d, max_unpool3d = entries(max_unpoolNd)
max_unpool1d_backward, max_unpool2d_backward, max_unpool3d_backward = entries(max_unpoolNd_backward)
avg_pool1d, avg_pool2d, avg_pool3d = entries(avg_poolNd)
avg_pool1d_backward, avg_pool2d_backward, avg_pool3d_backward = entries(avg_poolNd_backward)
lp_pool1d, lp_pool2d, lp_pool3d = entries(lp_poolNd)
lp_pool1d_backward, lp_pool2d_backward, lp_pool3d_backward = entries(lp_poolNd_backward)
adaptive_avg_pool1d, adaptive_avg_pool2d, adaptive_avg_pool3d = entries(adaptive_avg_poolNd)
adaptive_avg_pool1d_backward, adaptive_avg_pool2d_backward, adaptive_avg_pool3d_backward = entries(
    adaptive_avg_poolNd_backward
)
adaptive_max_pool1d, adaptive_max_pool2d, adaptive_max_pool3d = entries(adaptive_max_poolNd)
adaptive_max_pool1d_backward, adaptive_max_pool2d_backward, adaptive_max_pool3d_backward = entries(
    adaptive_max_poolNd_backward
)


def _average_grad(
    library: arrays.Library,
    geometry: PoolGeometry,
    grad: np.ndarray,
    counted: bool,
    divisor: int,
    key: Any,
    arguments: tuple[Any, ...],
) -> Any:
    _check_grad_shape(grad, geometry)
    run = runner(library.device)
    calls.keep(key, arguments, run.prepared_avg_pool_backward(geometry, grad.dtype, counted, divisor))
    dx = run.avg_pool_backward(geometry, batched(grad, geometry.batched), counted, divisor)
    return library.give_back(as_given(dx, geometry.batched))


def _check_grad_shape(grad: np.ndarray, geometry: PoolGeometry) -> None:
    if grad.shape != geometry.output_shape:
        raise ShapeError(f"grad_output must have the output's shape {geometry.output_shape}, not {grad.shape}")


def _check_indices(indices: np.ndarray, expected: tuple[int, ...], like: str) -> None:
    _check_index_dtype(indices)
    if indices.shape != expected:
        raise ShapeError(f"indices must have the shape of {like}, {expected}, not {indices.shape}")


def _check_index_dtype(indices: np.ndarray) -> None:
    if indices.dtype != np.int64:
        raise DTypeError(f"indices must have dtype int64, not {indices.dtype}")


def raise_index(indices: np.ndarray, spatial: tuple[int, ...], lowest: int) -> None:
    """Raise an error that shows an index which is outside a plane of size `spatial`."""
    size = math.prod(spatial)
    bad = indices[(indices < lowest) | (indices >= size)]
    raise ArgumentError(f"indices must lie in 0 to {size - 1} for a plane of size {spatial}, not {int(bad.flat[0])}")


def checked_divisor(value: Any) -> int:
    """0 stands for "the number of elements"."""
    if value is None:
        return 0
    divisor = integer("divisor_override", value, -(2**63))
    if divisor == 0:
        raise ArgumentError("divisor_override must not be 0")
    return divisor


def checked_norm(value: Any) -> float:
    """Return p of the p-norm."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ArgumentTypeError(f"norm_type must be a number, not {value!r}")
    power = float(value)
    if power == 0 or math.isnan(power):
        raise ArgumentError(f"norm_type must be a number other than zero, not {value!r}")
    return power
