"""Batch normalisation and dropout: layers that differ between training and evaluation.

Batch normalisation (Ioffe & Szegedy, 2015), for each channel over batch and space, M elements::

    z = (x - mean) / sqrt(var + eps)      y = weight * z + bias
    x_grad = weight / sqrt(var + eps) * (g - mean(g) - z * mean(g * z))

Both layers can be set to evaluation mode alone (``layer.eval()``) in a network that trains, and pass gradients then.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import ArgumentError, ShapeError
from ..geometry import DATA_FORMATS, flag, integer, one_of
from .activations import Elementwise, check_gradient, masked
from .module import Array, Parameter, Shape, floating_dtype
from .rng import generator


class _BatchNorm(Elementwise):
    ranks: tuple[int, ...] = ()
    buffer_names = ("running_mean", "running_var", "num_batches_tracked")

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        data_format: str = "channels_first",
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.num_features = C = integer("num_features", num_features, 1)
        self.eps, self.momentum = eps, momentum
        self.affine, self.track_running_stats = flag("affine", affine), flag("track_running_stats", track_running_stats)
        self.data_format = one_of("data_format", data_format, DATA_FORMATS)
        dtype = floating_dtype(dtype)
        self.weight = Parameter(np.ones(C, dtype)) if affine else None
        self.bias = Parameter(np.zeros(C, dtype)) if affine else None
        self.running_mean = np.zeros(C, dtype) if track_running_stats else None
        self.running_var = np.ones(C, dtype) if track_running_stats else None
        self.num_batches_tracked = np.zeros((), np.int64) if track_running_stats else None

    def forward(self, x: Array) -> Array:
        """Normalise with the batch's own statistics in training, with running ones in evaluation."""
        axes, lined = self._axes(x.shape)
        if self.training or self.running_mean is None or self.running_var is None:
            mean = x.mean(axis=axes)
            z = x - mean.reshape(lined)
            y = np.square(z)
            var = y.mean(axis=axes)
            self._track(mean, var, x.size // self.num_features)
            inverse = 1 / np.sqrt(var + self.eps)
            z *= inverse.reshape(lined)
            self.keep((z, inverse, None))
            scale, shift = self._affine(np.zeros_like(mean), np.ones_like(mean))
            np.multiply(z, scale.reshape(lined), out=y)
        else:
            inverse = 1 / np.sqrt(self.running_var + self.eps)
            # Also in evaluation: a layer frozen with eval() inside a network that trains passes gradients.
            self._saved = (x, inverse, self.running_mean)
            scale, shift = self._affine(self.running_mean, inverse)
            y = x * scale.reshape(lined)
        y += shift.reshape(lined)
        return y

    def backward(self, grad_output: Array, *, input_grad: bool = True) -> Array | None:
        """Add the gradients of weight and bias; return that of the input."""
        z, inverse, running_mean = self.kept()
        check_gradient(grad_output, z.shape)
        axes, lined = self._axes(z.shape)
        if running_mean is not None:
            z = (z - running_mean.reshape(lined)) * inverse.reshape(lined)
        product = grad_output * z
        total, correlation = grad_output.sum(axis=axes), product.sum(axis=axes)
        if self.weight is not None and self.weight.requires_grad:
            self.weight.accumulate(correlation)
        if self.bias is not None and self.bias.requires_grad:
            self.bias.accumulate(total)
        if not input_grad:
            return None
        scale = (inverse if self.weight is None else inverse * self.weight.data).reshape(lined)
        if running_mean is not None:
            return np.multiply(grad_output, scale, out=product)
        count = z.dtype.type(z.size // self.num_features)
        np.multiply(z, (correlation / count).reshape(lined), out=product)
        product += (total / count).reshape(lined)
        np.subtract(grad_output, product, out=product)
        product *= scale
        return product

    def _affine(self, mean: Array, inverse: Array) -> tuple[Array, Array]:
        """Return scale and shift per channel of (x - mean) * inverse with weight and bias behind it."""
        scale = inverse if self.weight is None else inverse * self.weight.data
        shift = -mean * scale
        return scale, shift if self.bias is None else shift + self.bias.data

    def _axes(self, shape: Shape) -> tuple[tuple[int, ...], Shape]:
        """Return the axes to average over, and the shape of one number per channel along the others."""
        C = self.num_features
        if len(shape) not in self.ranks:
            ranks = " or ".join(map(str, self.ranks))
            raise ShapeError(f"x must have {ranks} dimensions, with the batch, not shape {shape}")
        channel = 1 if self.data_format == "channels_first" else len(shape) - 1
        if shape[channel] != C:
            raise ShapeError(f"x must have {C} channels in dimension {channel}, not shape {shape}")
        axes = tuple(i for i in range(len(shape)) if i != channel)
        return axes, tuple(C if i == channel else 1 for i in range(len(shape)))

    def _track(self, mean: Array, var: Array, count: int) -> None:
        if self.training and count < 2:
            raise ShapeError(f"x must have more than one value per channel in training, not {count}")
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        share = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        # The running variance is unbiased, as PyTorch's; that of the batch is not.
        for running, now in ((self.running_mean, mean), (self.running_var, var * (count / (count - 1)))):
            running *= 1 - share
            running += share * now

    def output_shape(self, input_shape: Shape) -> Shape:
        """Return the input's shape, if it fits."""
        self._axes(input_shape)
        return tuple(input_shape)

    def extra_repr(self) -> str:
        """Show the arguments, as PyTorch does."""
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}"
        )


class BatchNorm1d(_BatchNorm):
    """Batch normalisation of (N, C) or (N, C, L).

    Parameters
    ----------
    num_features : int
        C.
    eps : float
        Added to the variance.
    momentum : float or None
        Share of each batch in the running statistics; None: their plain average.
    affine : bool
        Whether there are a weight and a bias.
    track_running_stats : bool
        False: batch statistics in evaluation too.
    data_format : "channels_first" or "channels_last"
    dtype : dtype, optional

    Attributes
    ----------
    weight, bias : Parameter (C,) or None
    running_mean, running_var : array (C,) or None
    num_batches_tracked : int64 array () or None

    Raises
    ------
    ShapeError
        Of an input with another number of channels or, in training, with one value per channel.
    """

    ranks = (2, 3)


class BatchNorm2d(_BatchNorm):
    """Batch normalisation of (N, C, H, W); arguments as :class:`BatchNorm1d`."""

    ranks = (4,)


class BatchNorm3d(_BatchNorm):
    """Batch normalisation of (N, C, D, H, W); arguments as :class:`BatchNorm1d`."""

    ranks = (5,)


class Dropout(Elementwise):
    """Set elements to zero with probability p in training, and scale the others by 1 / (1 - p).

    Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", 2014.

    Parameters
    ----------
    p : float
        Between 0 and 1.
    inplace : bool
        Write the result over x.
    rng : numpy.random.Generator or seed, optional
        Draws the masks; without it the generator of :func:`~fastconv.nn.manual_seed`.
    """

    def __init__(self, p: float = 0.5, inplace: bool = False, *, rng: Any = None) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ArgumentError(f"p must be a probability between 0 and 1, not {p!r}")
        self.p, self.inplace = p, flag("inplace", inplace)
        self.rng = None if rng is None else generator(rng)

    def forward(self, x: Array) -> Array:
        """Return x with some elements dropped; in evaluation x itself."""
        mask = None
        if self.training and self.p > 0:
            mask = generator(self.rng).random(x.shape, dtype=np.float32) >= self.p
        # Also in evaluation: a layer set to eval() inside a network that trains passes gradients.
        self._saved = (mask,)
        y = self._dropped(x, mask)
        if self.inplace and y is not x:
            x[...] = y
            return x
        return y

    def backward(self, grad_output: Array, *, input_grad: bool = True) -> Array | None:
        """Return the gradient of what was not dropped."""
        (mask,) = self.kept()
        if mask is not None:
            check_gradient(grad_output, mask.shape)
        return self._dropped(grad_output, mask) if input_grad else None

    def _dropped(self, values: Array, mask: Array | None) -> Array:
        if mask is None:
            return values
        found = masked(values, mask)
        if self.p < 1:
            found *= 1 / (1 - self.p)
        return found

    def extra_repr(self) -> str:
        """Show the probability."""
        return f"p={self.p}, inplace={self.inplace}"
