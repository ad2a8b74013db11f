"""unfold and fold: im2col and its adjoint, col2im, as operations of their own."""

from __future__ import annotations

import math
from typing import Any

from .. import arrays
from ..arrays import FLOATING
from ..errors import ArgumentError, ShapeError
from ..geometry import ConvGeometry, Sizes, padding_form, sizes
from ._entries import as_given, batched, runner
from .convolution import adopt_all


def unfold(x: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1) -> Any:
    """Lay out every window of x as a column (im2col).

    Parameters
    ----------
    x : array (N, C, *spatial); N may be absent
        float32, float64, float16 or bfloat16.
    kernel_size : int or one per spatial dimension
        An int means two spatial dimensions, as in PyTorch; a sequence of one to three ints means that many.
    dilation, stride : int or one per spatial dimension
    padding : int, one per dimension, (before, after) pairs, or a word

    Returns
    -------
    array (N, C*prod(kernel_size), L) of x's dtype
        Rows in the order (channel, kernel position), L = prod(output sizes) columns in scan order.

    Raises
    ------
    ShapeError, ArgumentError (ValueError); DTypeError, ArgumentTypeError (TypeError)

    Notes
    -----
    Chellapilla, Puri & Simard, "High performance convolutional neural networks for document processing", 2006.

    Examples
    --------
    >>> import numpy as np, fastconv
    >>> fastconv.unfold(np.arange(9.0).reshape(1, 1, 3, 3), 2)[0].astype(int)
    array([[0, 1, 3, 4],
           [1, 2, 4, 5],
           [3, 4, 6, 7],
           [4, 5, 7, 8]])
    """
    library, (x,) = adopt_all(x=x)
    geometry = unfold_geometry(x, kernel_size, dilation, padding, stride)
    columns = runner(library.device).unfold(geometry, batched(x, geometry.batched))
    return library.give_back(as_given(columns, geometry.batched))


def fold(cols: Any, output_size: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1) -> Any:
    """Add every column back to the window it came from (col2im): the adjoint of :func:`unfold`.

    Parameters
    ----------
    cols : array (N, C*prod(kernel_size), L); N may be absent
        float32, float64, float16 or bfloat16.
    output_size : int or one per spatial dimension
        The spatial extent of the image.
    kernel_size, dilation, padding, stride
        As in :func:`unfold`.

    Returns
    -------
    array (N, C, *output_size) of cols' dtype

    Raises
    ------
    ShapeError, ArgumentError (ValueError); DTypeError, ArgumentTypeError (TypeError)

    Examples
    --------
    >>> import numpy as np, fastconv
    >>> fastconv.fold(np.ones((1, 4, 4)), (3, 3), 2)[0, 0].astype(int)
    array([[1, 2, 1],
           [2, 4, 2],
           [1, 2, 1]])
    """
    library, (cols,) = adopt_all(cols=cols)
    geometry = fold_geometry(cols, output_size, kernel_size, dilation, padding, stride)
    result = runner(library.device).fold(geometry, batched(cols, geometry.batched))
    return library.give_back(as_given(result, geometry.batched))


def unfold_geometry(x: Any, kernel_size: Any, dilation: Any, padding: Any, stride: Any) -> ConvGeometry:
    """Check the arguments of :func:`unfold`; return the convolution whose windows they are."""
    arrays.check_dtype("x", x, FLOATING)
    return _geometry(x.shape, _kernel(kernel_size), dilation, padding, stride, x.dtype, "x")


def fold_geometry(
    cols: Any, output_size: Any, kernel_size: Any, dilation: Any, padding: Any, stride: Any
) -> ConvGeometry:
    """Check the arguments of :func:`fold`; return the convolution whose windows they are."""
    arrays.check_dtype("cols", cols, FLOATING)
    kernel = _kernel(kernel_size)
    spatial = sizes("output_size", output_size, len(kernel), 1, one_for_all=False)
    if cols.ndim not in (2, 3):
        raise ShapeError(f"cols must have 3 dimensions (N, C*prod(kernel_size), L), or 2 without N, not {cols.shape}")
    rows, count = cols.shape[-2:]
    if rows == 0 or rows % math.prod(kernel):
        raise ShapeError(
            f"cols of shape {cols.shape} must have a multiple of prod(kernel_size) = {math.prod(kernel)} rows"
        )
    image = (*cols.shape[:-2], rows // math.prod(kernel), *spatial)
    geometry = _geometry(image, kernel, dilation, padding, stride, cols.dtype, "output_size")
    if count != math.prod(geometry.output_size):
        raise ShapeError(
            f"cols of shape {cols.shape} must have {math.prod(geometry.output_size)} columns: kernel_size {kernel} has "
            f"{geometry.output_size} windows on output_size {spatial}"
        )
    return geometry


def _kernel(kernel_size: Any) -> Sizes:
    """The kernel tells the number of spatial dimensions; an int means two."""
    dims = len(kernel_size) if isinstance(kernel_size, (tuple, list)) else 2
    if not 1 <= dims <= 3:
        raise ArgumentError(f"kernel_size must be an integer or 1 to 3 integers, not {kernel_size!r}")
    return sizes("kernel_size", kernel_size, dims, 1)


def _geometry(
    image: tuple[int, ...], kernel: Sizes, dilation: Any, padding: Any, stride: Any, dtype: Any, name: str
) -> ConvGeometry:
    dims = len(kernel)
    # Only two dimensions may come without a batch, as in PyTorch: the others could be mistaken for them.
    if len(image) != dims + 2 and not (dims == 2 and len(image) == 3):
        raise ShapeError(f"{name} must be a batch of {dims} spatial dimensions, like kernel_size {kernel}, not {image}")
    if 0 in image[-dims - 1 :]:
        raise ShapeError(f"{name} must have no channel or spatial size of zero, not shape {image}")
    stride = sizes("stride", stride, dims, 1, one_for_all=False)
    dilation = sizes("dilation", dilation, dims, 1, one_for_all=False)
    padding = padding_form(padding, dims, one_for_all=False)
    return ConvGeometry.create(image, (1, image[-dims - 1], *kernel), stride, padding, dilation, dtype=dtype, name=name)
