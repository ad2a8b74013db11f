"""Pooling layers: calls of the pooling operations that remember indices or shapes for the way back."""

from __future__ import annotations

from typing import Any

from ..geometry import DATA_FORMATS, PoolGeometry, ReceptiveField, flag, one_of, padding_form, sizes
from ..ops import pooling
from .module import Array, Module, Shape


class _Pool(Module):
    """What all pools share: shapes from the geometry."""

    dims = 0
    data_format = "channels_first"

    def geometry(self, input_shape: Shape) -> PoolGeometry:
        raise NotImplementedError

    def output_shape(self, input_shape: Shape) -> Shape:
        """Return the shape of the output, from the geometry."""
        return self.geometry(input_shape).output_shape

    def receptive_field(self, field: ReceptiveField | None, input_shape: Shape) -> ReceptiveField | None:
        """Widen the field by the largest window."""
        if field is None:
            return None
        geometry = self.geometry(input_shape)
        # Rows of (first, end, step, count), with padding and partial windows cut off: the largest is a whole one.
        windows = tuple(int((rows[:, 1] - rows[:, 0]).max()) for rows in geometry.windows[-self.dims :])
        stride = tuple(n // p if geometry.is_adaptive else s for n, p, s in
                       zip(geometry.input_size, geometry.output_size, geometry.stride))  # fmt: skip
        return field.through(windows, stride)


class _Window(_Pool):
    """Pools with a window: its sizes, checked once."""

    def set_window(self, kernel_size: Any, stride: Any, padding: Any, ceil_mode: bool, data_format: str) -> None:
        self.kernel_size = sizes("kernel_size", kernel_size, self.dims, 1)
        # None, or an empty sequence: the windows lie side by side.
        given = stride is not None and stride not in ((), [])
        self.stride = sizes("stride", stride, self.dims, 1) if given else self.kernel_size
        self.padding = padding_form(padding, self.dims)
        self.ceil_mode = flag("ceil_mode", ceil_mode)
        self.data_format = one_of("data_format", data_format, DATA_FORMATS)

    def extra_repr(self) -> str:
        """Show the window, as PyTorch does."""
        shown = f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding!r}"
        if self.data_format != "channels_first":
            shown += f", data_format={self.data_format!r}"
        return shown + (", ceil_mode=True" if self.ceil_mode else "")


class _MaxPool(_Window):
    def __init__(
        self,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
        *,
        data_format: str = "channels_first",
    ) -> None:
        super().__init__()
        self.set_window(kernel_size, stride, padding, ceil_mode, data_format)
        self.dilation = sizes("dilation", dilation, self.dims, 1)
        self.return_indices = flag("return_indices", return_indices)

    def forward(self, x: Array) -> Any:
        """Return the maxima, or (maxima, indices) with return_indices."""
        wanted = self.training or self.return_indices
        found = pooling.max_poolNd(
            self.dims, x, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, wanted,
            data_format=self.data_format,
        )  # fmt: skip
        if wanted:
            self.keep((found[1], x.shape))
        return found[0] if wanted and not self.return_indices else found

    def backward(self, grad_output: Array, *, input_grad: bool = True) -> Array | None:
        """Return the gradient of the input: each goes to the maximum of its window."""
        indices, shape = self.kept()
        if not input_grad:
            return None
        return pooling.max_poolNd_backward(self.dims, grad_output, indices, shape, data_format=self.data_format)

    def geometry(self, input_shape: Shape) -> PoolGeometry:
        """Return the geometry of the pooling of an input of a shape."""
        return PoolGeometry.create(
            input_shape, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode,
            spatial_dims=self.dims, data_format=self.data_format,
        )  # fmt: skip


class _AvgPool(_Window):
    def __init__(
        self,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
        *,
        data_format: str = "channels_first",
    ) -> None:
        super().__init__()
        self.set_window(kernel_size, stride, padding, ceil_mode, data_format)
        self.count_include_pad = flag("count_include_pad", count_include_pad)
        self.divisor_override = divisor_override

    def arguments(self) -> tuple[Any, ...]:
        """Return the arguments of the operation, after the array."""
        window = (self.kernel_size, self.stride, self.padding, self.ceil_mode)
        return (*window, self.count_include_pad, self.divisor_override)

    def forward(self, x: Array) -> Array:
        """Return the averages."""
        y = pooling.avg_poolNd(self.dims, x, *self.arguments(), data_format=self.data_format)
        self.keep(x.shape)
        return y

    def backward(self, grad_output: Array, *, input_grad: bool = True) -> Array | None:
        """Return the gradient of the input: each is shared out over its window."""
        shape = self.kept()
        if not input_grad:
            return None
        return pooling.avg_poolNd_backward(
            self.dims, grad_output, shape, *self.arguments(), data_format=self.data_format
        )

    def geometry(self, input_shape: Shape) -> PoolGeometry:
        """Return the geometry of the pooling of an input of a shape."""
        return PoolGeometry.create(
            input_shape, self.kernel_size, self.stride, self.padding, 1, self.ceil_mode,
            spatial_dims=self.dims, data_format=self.data_format, average=True,
        )  # fmt: skip


class _AdaptivePool(_Pool):
    def __init__(self, output_size: Any, *, data_format: str = "channels_first") -> None:
        super().__init__()
        self.output_size = output_size
        self.data_format = one_of("data_format", data_format, DATA_FORMATS)

    def geometry(self, input_shape: Shape) -> PoolGeometry:
        """Return the geometry of the pooling of an input of a shape."""
        return PoolGeometry.adaptive(
            input_shape, self.output_size, spatial_dims=self.dims, data_format=self.data_format
        )

    def extra_repr(self) -> str:
        """Show the size of the output."""
        return f"output_size={self.output_size}"


class _AdaptiveAvgPool(_AdaptivePool):
    def forward(self, x: Array) -> Array:
        """Return the averages."""
        y = pooling.adaptive_avg_poolNd(self.dims, x, self.output_size, data_format=self.data_format)
        self.keep(x.shape)
        return y

    def backward(self, grad_output: Array, *, input_grad: bool = True) -> Array | None:
        """Return the gradient of the input: each is shared out over its window."""
        shape = self.kept()
        if not input_grad:
            return None
        return pooling.adaptive_avg_poolNd_backward(self.dims, grad_output, shape, data_format=self.data_format)


class _AdaptiveMaxPool(_AdaptivePool):
    def __init__(self, output_size: Any, return_indices: bool = False, *, data_format: str = "channels_first") -> None:
        super().__init__(output_size, data_format=data_format)
        self.return_indices = flag("return_indices", return_indices)

    def forward(self, x: Array) -> Any:
        """Return the maxima, or (maxima, indices) with return_indices."""
        y, indices = pooling.adaptive_max_poolNd(self.dims, x, self.output_size, True, data_format=self.data_format)
        self.keep((indices, x.shape))
        return (y, indices) if self.return_indices else y

    def backward(self, grad_output: Array, *, input_grad: bool = True) -> Array | None:
        """Return the gradient of the input: each goes to the maximum of its window."""
        indices, shape = self.kept()
        if not input_grad:
            return None
        return pooling.adaptive_max_poolNd_backward(
            self.dims, grad_output, indices, shape, data_format=self.data_format
        )


class _MaxUnpool(Module):
    dims = 0

    def __init__(
        self, kernel_size: Any, stride: Any = None, padding: Any = 0, *, data_format: str = "channels_first"
    ) -> None:
        super().__init__()
        self.window = (kernel_size, stride, padding)
        self.data_format = one_of("data_format", data_format, DATA_FORMATS)

    def forward(self, x: Array, indices: Array = None, output_size: Any = None) -> Array:
        """Put each value where its index says; `indices` come from a max pool with return_indices."""
        y = pooling.max_unpoolNd(self.dims, x, indices, *self.window, output_size, data_format=self.data_format)
        self.keep(indices)
        return y

    def backward(self, grad_output: Array, *, input_grad: bool = True) -> Array | None:
        """Return the gradient of x: that at each index."""
        indices = self.kept()
        if not input_grad:
            return None
        return pooling.max_unpoolNd_backward(self.dims, grad_output, indices, data_format=self.data_format)


class MaxPool1d(_MaxPool):
    """1-D max pooling layer; arguments in PyTorch's order, as :func:`fastconv.max_pool1d`."""

    dims = 1


class MaxPool2d(_MaxPool):
    """2-D max pooling layer; arguments in PyTorch's order, as :func:`fastconv.max_pool2d`.

    Examples
    --------
    >>> import numpy as np
    >>> from fastconv import nn
    >>> pool = nn.MaxPool2d(2)
    >>> x = np.array([[[[1.0, 2.0], [4.0, 3.0]]]])
    >>> pool(x), pool.backward(np.array([[[[7.0]]]]))
    (array([[[[4.]]]]), array([[[[0., 0.],
             [7., 0.]]]]))
    """

    dims = 2


class MaxPool3d(_MaxPool):
    """3-D max pooling layer; arguments in PyTorch's order, as :func:`fastconv.max_pool3d`."""

    dims = 3


class AvgPool1d(_AvgPool):
    """1-D average pooling layer, as :func:`fastconv.avg_pool1d`."""

    dims = 1


class AvgPool2d(_AvgPool):
    """2-D average pooling layer, as :func:`fastconv.avg_pool2d`."""

    dims = 2


class AvgPool3d(_AvgPool):
    """3-D average pooling layer, as :func:`fastconv.avg_pool3d`."""

    dims = 3


class AdaptiveAvgPool1d(_AdaptiveAvgPool):
    """1-D average pooling to a given size, as :func:`fastconv.adaptive_avg_pool1d`."""

    dims = 1


class AdaptiveAvgPool2d(_AdaptiveAvgPool):
    """2-D average pooling to a given size, as :func:`fastconv.adaptive_avg_pool2d`; 1 pools the whole plane."""

    dims = 2


class AdaptiveAvgPool3d(_AdaptiveAvgPool):
    """3-D average pooling to a given size, as :func:`fastconv.adaptive_avg_pool3d`."""

    dims = 3


class AdaptiveMaxPool1d(_AdaptiveMaxPool):
    """1-D max pooling to a given size, as :func:`fastconv.adaptive_max_pool1d`."""

    dims = 1


class AdaptiveMaxPool2d(_AdaptiveMaxPool):
    """2-D max pooling to a given size, as :func:`fastconv.adaptive_max_pool2d`."""

    dims = 2


class AdaptiveMaxPool3d(_AdaptiveMaxPool):
    """3-D max pooling to a given size, as :func:`fastconv.adaptive_max_pool3d`."""

    dims = 3


class MaxUnpool1d(_MaxUnpool):
    """1-D partial inverse of max pooling, as :func:`fastconv.max_unpool1d`; called with (x, indices)."""

    dims = 1


class MaxUnpool2d(_MaxUnpool):
    """2-D partial inverse of max pooling, as :func:`fastconv.max_unpool2d`; called with (x, indices)."""

    dims = 2


class MaxUnpool3d(_MaxUnpool):
    """3-D partial inverse of max pooling, as :func:`fastconv.max_unpool3d`; called with (x, indices)."""

    dims = 3
