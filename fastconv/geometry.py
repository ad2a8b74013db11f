"""Shapes: the one place where arguments are checked and sizes computed, before any kernel runs.

Along each spatial dimension, with padding (b, a), dilation d, kernel k and stride s::

    window  = d*(k - 1) + 1
    output  = floor((input + b + a - window) / s) + 1

(Dumoulin & Visin, "A guide to convolution arithmetic for deep learning", 2016, section 2 and 4). Padding words
follow TensorFlow and ONNX: "same" gives ceil(input / stride) with the odd element after, "same_lower" before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from operator import index
from typing import Any

import numpy as np

from .errors import ArgumentError, ArgumentTypeError, ShapeError, shown

Sizes = tuple[int, ...]
Pairs = tuple[tuple[int, int], ...]

DATA_FORMATS = ("channels_first", "channels_last")
PADDING_MODES = ("zeros", "reflect", "symmetric", "replicate", "circular")
PADDING_WORDS = ("valid", "same", "same_lower", "full")
DIRECTIONS = ("forward", "input_grad", "weight_grad")

FLOAT32 = np.dtype(np.float32)
_MAX_BYTES = 2**63 - 1


# --- arguments -------------------------------------------------------------------------------------------------


def one_of(name: str, value: Any, allowed: Sequence[str]) -> str:
    """Return `value` if it is one of the `allowed` words."""
    if isinstance(value, str):
        if value in allowed:
            return value
        raise ArgumentError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {shown(value)}")
    raise ArgumentTypeError(f"{name} must be a string, one of {', '.join(map(repr, allowed))}, not {shown(value)}")


def integer(name: str, value: Any, minimum: int) -> int:
    """Return `value` as an int of at least `minimum`; a bool, float or string is refused."""
    if isinstance(value, (bool, np.bool_, np.ndarray)):
        raise ArgumentTypeError(f"{name} must be an integer, not {shown(value)}")
    try:
        number = index(value)
    except TypeError:
        raise ArgumentTypeError(f"{name} must be an integer, not {shown(value)}") from None
    if number < minimum:
        raise ArgumentError(f"{name} must be at least {minimum}, not {shown(value)}")
    if number > _MAX_BYTES:
        raise ArgumentError(f"{name} must be below 2**63, not {shown(value)}")
    return number


def flag(name: str, value: Any) -> bool:
    """Return `value` if it is a bool."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise ArgumentTypeError(f"{name} must be True or False, not {shown(value)}")


def sizes(name: str, value: Any, dims: int, minimum: int, one_for_all: bool = True) -> Sizes:
    """Return one int per spatial dimension, from an int (used for all) or a sequence of `dims` ints.

    A sequence of one int serves for all dimensions too, unless `one_for_all` is False.
    """
    if type(value) is int and minimum <= value <= _MAX_BYTES:
        return (value,) * dims
    if _is_sequence(value):
        if len(value) != dims and not (len(value) == 1 and one_for_all):
            raise ArgumentError(f"{name} must be an integer or {dims} integers, not {shown(value)}")
        checked = tuple(integer(name, element, minimum) for element in value)
        return checked * dims if len(checked) == 1 else checked
    try:
        return (integer(name, value, minimum),) * dims
    except ArgumentTypeError:
        raise ArgumentTypeError(f"{name} must be an integer or {dims} integers, not {shown(value)}") from None


def shape(name: str, value: Any) -> Sizes:
    """Return a sequence of non-negative ints as a tuple."""
    if not _is_sequence(value):
        raise ArgumentTypeError(f"{name} must be a sequence of integers, not {shown(value)}")
    return tuple(integer(name, element, 0) for element in value)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, (tuple, list))


def padding_form(padding: Any, dims: int, one_for_all: bool = True) -> str | Sizes | Pairs:
    """Return padding as a word, one int per dimension or one (before, after) pair per dimension."""
    if isinstance(padding, str):
        return one_of("padding", padding, PADDING_WORDS)
    if _is_sequence(padding) and len(padding) and all(_is_sequence(pair) for pair in padding):
        if len(padding) != dims or any(len(pair) != 2 for pair in padding):
            raise ArgumentError(f"padding must have {dims} (before, after) pairs, not {shown(padding)}")
        return tuple((integer("padding", b, 0), integer("padding", a, 0)) for b, a in padding)
    try:
        return sizes("padding", padding, dims, 0, one_for_all)
    except ArgumentTypeError:
        raise ArgumentTypeError(
            f"padding must be an integer, {dims} integers, {dims} (before, after) pairs or one of "
            f"{', '.join(map(repr, PADDING_WORDS))}, not {shown(padding)}"
        ) from None


def _padding_pairs(
    form: str | Sizes | Pairs, input_size: Sizes, kernel: Sizes, stride: Sizes, dilation: Sizes
) -> Pairs:
    if isinstance(form, str):
        return tuple(
            padding_word(form, n, d * (k - 1) + 1, s) for n, k, s, d in zip(input_size, kernel, stride, dilation)
        )
    return tuple(p if isinstance(p, tuple) else (p, p) for p in form)


def padding_word(word: str, n: int, window: int, stride: int) -> tuple[int, int]:
    """Return (before, after) along one dimension."""
    if word == "valid":
        return (0, 0)
    if word == "full":
        return (window - 1, window - 1)
    total = max((-(-n // stride) - 1) * stride + window - n, 0)
    less, more = total // 2, total - total // 2
    return (less, more) if word == "same" else (more, less)


def check_bytes(what: str, dimensions: Sizes, itemsize: int) -> None:
    """Raise ShapeError if an array of these dimensions cannot be addressed with 64 bits."""
    if math.prod(dimensions) * itemsize > _MAX_BYTES:
        raise ShapeError(f"{what} would have shape {dimensions}, more than 2**63 bytes")


def _split_shape(name: str, array_shape: Sizes, dims: int, data_format: str) -> tuple[bool, int, int, Sizes]:
    """Return (batched, N, C, spatial) of an array in `data_format`."""
    if len(array_shape) not in (dims + 1, dims + 2):
        spatial = "DHW"[3 - dims :]
        layout = "C" + spatial if data_format == "channels_first" else spatial + "C"
        raise ShapeError(
            f"{name} must have {dims + 2} dimensions {_letters('N' + layout)}, or {dims + 1} without a batch "
            f"{_letters(layout)}, not shape {array_shape}"
        )
    batched = len(array_shape) == dims + 2
    batch = array_shape[0] if batched else 1
    rest = array_shape[1:] if batched else array_shape
    if data_format == "channels_first":
        return batched, batch, rest[0], rest[1:]
    return batched, batch, rest[-1], rest[:-1]


def _letters(text: str) -> str:
    return "(" + ", ".join(text) + ("," if len(text) == 1 else "") + ")"


def join_shape(batch: int, channels: int, spatial: Sizes, data_format: str, batched: bool = True) -> Sizes:
    """Return (N, C, *spatial) or (N, *spatial, C), without N if not `batched`."""
    inner = (channels, *spatial) if data_format == "channels_first" else (*spatial, channels)
    return (batch, *inner) if batched else inner


def first_spatial_axis(data_format: str, batched: bool = True) -> int:
    """Return the axis where the spatial extent begins."""
    return int(batched) + int(data_format == "channels_first")


def planes_shape(array_shape: Sizes, data_format: str) -> Sizes:
    """Return the shape of a batched array as pooling kernels see it: (N*C, D, H, W, 1) or (N, D, H, W, C)."""
    _, N, C, spatial = _split_shape("array", array_shape, len(array_shape) - 2, data_format)
    spatial = (1,) * (3 - len(spatial)) + spatial
    return (N * C, *spatial, 1) if data_format == "channels_first" else (N, *spatial, C)


# --- convolution -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConvGeometry:
    """All sizes of one convolution (and of its gradients, and of the transposed convolution that is one of them).

    Make one with :meth:`create` or :meth:`transposed`, which check their arguments.

    Attributes
    ----------
    batch, in_channels, out_channels, groups : int
        N, C, K, G.
    input_size, kernel_size, output_size, stride, dilation : tuple of int
        One entry per spatial dimension.
    padding : tuple of (before, after)
        Elements added on each side.
    data_format, padding_mode : str
    dtype : numpy.dtype
        Of x and weight.
    batched : bool
        False if x came without a batch dimension.
    """

    batch: int
    in_channels: int
    out_channels: int
    input_size: Sizes
    kernel_size: Sizes
    output_size: Sizes
    stride: Sizes
    padding: Pairs
    dilation: Sizes
    groups: int = 1
    data_format: str = "channels_first"
    padding_mode: str = "zeros"
    dtype: np.dtype = FLOAT32
    batched: bool = True

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Kept, because every call looks up what is known of its geometry, several times."""
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    @staticmethod
    def create(
        x_shape: Sequence[int],
        weight_shape: Sequence[int],
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        *,
        data_format: str = "channels_first",
        padding_mode: str = "zeros",
        dtype: Any = np.float32,
        name: str = "x",
    ) -> ConvGeometry:
        """Check the arguments of a convolution and compute its sizes.

        Parameters
        ----------
        x_shape : (N, C, *spatial), (N, *spatial, C) with channels_last; N may be absent
        weight_shape : (K, C // groups, *kernel)
        stride, dilation : int or one per spatial dimension
        padding : int, one per dimension, (before, after) pairs, or "valid", "same", "same_lower", "full"
        groups : int

        Raises
        ------
        ShapeError, ArgumentError, ArgumentTypeError
            Naming the argument, its value and what is expected.

        Examples
        --------
        >>> ConvGeometry.create((8, 3, 227, 227), (96, 3, 11, 11), stride=4).output_size
        (55, 55)
        """
        x_shape, weight_shape = shape("x_shape", x_shape), shape("weight_shape", weight_shape)
        if not 3 <= len(weight_shape) <= 5:
            raise ShapeError(f"weight must have 3, 4 or 5 dimensions (K, C // groups, *kernel), not {weight_shape}")
        dims = len(weight_shape) - 2
        return _conv_geometry(
            x_shape,
            weight_shape,
            sizes("stride", stride, dims, 1),
            padding_form(padding, dims),
            sizes("dilation", dilation, dims, 1),
            integer("groups", groups, 1),
            one_of("data_format", data_format, DATA_FORMATS),
            one_of("padding_mode", padding_mode, PADDING_MODES),
            np.dtype(dtype),
            name,
        )

    @staticmethod
    def transposed(
        x_shape: Sequence[int],
        weight_shape: Sequence[int],
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
        *,
        output_size: Any = None,
        data_format: str = "channels_first",
        dtype: Any = np.float32,
    ) -> ConvGeometry:
        """Check the arguments of a transposed convolution; return the convolution whose input gradient it is.

        The result's `input_size` is therefore the *output* of the transposed convolution::

            output = (input - 1)*stride - before - after + dilation*(kernel - 1) + output_padding + 1

        Parameters
        ----------
        x_shape : (N, C, *spatial)
        weight_shape : (C, K // groups, *kernel)
        output_padding : int or one per dimension, below stride or dilation
        output_size : the spatial extent wanted, instead of `output_padding`
        padding : as for :meth:`create`; "same" gives input * stride
        """
        x_shape, weight_shape = shape("x_shape", x_shape), shape("weight_shape", weight_shape)
        if not 3 <= len(weight_shape) <= 5:
            raise ShapeError(f"weight must have 3, 4 or 5 dimensions (C, K // groups, *kernel), not {weight_shape}")
        dims = len(weight_shape) - 2
        extra = sizes("output_padding", output_padding, dims, 0)
        if output_size is not None and any(extra):
            raise ArgumentError(
                f"output_size={output_size!r} and output_padding={output_padding!r} say the same thing; give one"
            )
        return _transposed_geometry(
            x_shape,
            weight_shape,
            sizes("stride", stride, dims, 1),
            padding_form(padding, dims),
            extra,
            integer("groups", groups, 1),
            sizes("dilation", dilation, dims, 1),
            None if output_size is None else shape("output_size", output_size),
            one_of("data_format", data_format, DATA_FORMATS),
            np.dtype(dtype),
        )

    @property
    def spatial_dims(self) -> int:
        """1, 2 or 3."""
        return len(self.input_size)

    @property
    def x_shape(self) -> Sizes:
        """Shape of the input, in the caller's format."""
        return join_shape(self.batch, self.in_channels, self.input_size, self.data_format, self.batched)

    @property
    def weight_shape(self) -> Sizes:
        """(K, C // groups, *kernel)."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def output_shape(self) -> Sizes:
        """Shape of the output, in the caller's format. Without input channels it has none either, as in PyTorch."""
        channels = self.out_channels if self.in_channels else 0
        return join_shape(self.batch, channels, self.output_size, self.data_format, self.batched)

    @property
    def first_spatial_axis(self) -> int:
        """Axis of x where its spatial extent begins."""
        return first_spatial_axis(self.data_format, self.batched)

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to sum: no image or no channel."""
        return self.batch == 0 or self.in_channels == 0

    @cached_property
    def window(self) -> Sizes:
        """Extent of the dilated kernel: dilation*(kernel - 1) + 1."""
        return tuple(d * (k - 1) + 1 for k, d in zip(self.kernel_size, self.dilation))

    @cached_property
    def padded_size(self) -> Sizes:
        """Spatial extent of the input with its padding."""
        return tuple(n + b + a for n, (b, a) in zip(self.input_size, self.padding))

    @cached_property
    def reduction_length(self) -> int:
        """Products summed for one output element: C // groups * prod(kernel)."""
        return self.in_channels // self.groups * math.prod(self.kernel_size)

    @cached_property
    def flops(self) -> int:
        """Floating-point operations of direct convolution, in either direction; padding is counted as computed."""
        return 2 * self.batch * self.out_channels * math.prod(self.output_size) * self.reduction_length

    @cached_property
    def bytes(self) -> int:
        """Bytes of input, weight and output, each touched once."""
        elements = math.prod(self.x_shape) + math.prod(self.weight_shape) + math.prod(self.output_shape)
        return elements * self.dtype.itemsize

    @property
    def is_pointwise(self) -> bool:
        """True for a 1x1 kernel with stride 1 and no padding: a matrix product on the tensor as it lies."""
        return (
            all(k == 1 for k in self.kernel_size)
            and all(s == 1 for s in self.stride)
            and not any(b or a for b, a in self.padding)
            and self.input_size == self.output_size
        )

    @property
    def is_depthwise(self) -> bool:
        """True if each filter sees one channel."""
        return self.groups == self.in_channels and self.groups > 1

    def lifted(self, data_format: str, dtype: np.dtype) -> ConvGeometry:
        """Return the same convolution in three spatial dimensions, batched, zero-padded, as kernels take it.

        Any other padding mode has by then been carried out on the input itself.
        """
        return _lifted(self, data_format, dtype)

    def padded(self) -> ConvGeometry:
        """Return the convolution without padding over an input that has already been padded."""
        return replace(self, input_size=self.padded_size, padding=((0, 0),) * self.spatial_dims, padding_mode="zeros")


@lru_cache(maxsize=4096)
def _conv_geometry(
    x_shape: Sizes,
    weight_shape: Sizes,
    stride: Sizes,
    padding: str | Sizes | Pairs,
    dilation: Sizes,
    groups: int,
    data_format: str,
    padding_mode: str,
    dtype: np.dtype,
    name: str,
) -> ConvGeometry:
    kernel = weight_shape[2:]
    batched, batch, channels, input_size = _split_shape(name, x_shape, len(kernel), data_format)
    filters = weight_shape[0]
    _check_kernel("weight", weight_shape, kernel)
    if filters == 0:
        raise ShapeError(f"weight must have at least one filter, not shape {weight_shape}")
    if filters % groups:
        raise ShapeError(f"groups={groups} does not divide the {filters} filters of weight of shape {weight_shape}")
    if channels != weight_shape[1] * groups:
        without = "" if batched else ", an image without a batch,"
        raise ShapeError(
            f"{name} of shape {x_shape}{without} with data_format={data_format!r} has {channels} channels, but weight "
            f"of shape {weight_shape} with groups={groups} expects {weight_shape[1] * groups}"
        )
    if batch and channels and not all(input_size):
        raise ShapeError(f"{name} must have at least one element in each spatial dimension, not shape {x_shape}")
    pairs = _padding_pairs(padding, input_size, kernel, stride, dilation)
    if padding_mode in ("reflect", "replicate") and channels == 0:
        raise ShapeError(
            f"{name} must have at least one channel with padding_mode={padding_mode!r}, not shape {x_shape}"
        )
    _check_padding_mode(padding_mode, input_size, pairs)
    output_size = _window_count(input_size, kernel, stride, pairs, dilation, name, x_shape)
    geometry = ConvGeometry(
        batch, channels, filters, input_size, kernel, output_size, stride, pairs, dilation,
        groups, data_format, padding_mode, dtype, batched,
    )  # fmt: skip
    check_bytes("the output", geometry.output_shape, max(dtype.itemsize, 4))
    if padding_mode != "zeros":
        check_bytes("the padded input", (batch, channels, *geometry.padded_size), max(dtype.itemsize, 4))
    return geometry


@lru_cache(maxsize=1024)
def _transposed_geometry(
    x_shape: Sizes,
    weight_shape: Sizes,
    stride: Sizes,
    padding: str | Sizes | Pairs,
    output_padding: Sizes,
    groups: int,
    dilation: Sizes,
    output_size: Sizes | None,
    data_format: str,
    dtype: np.dtype,
) -> ConvGeometry:
    kernel = weight_shape[2:]
    dims = len(kernel)
    batched, batch, channels, input_size = _split_shape("x", x_shape, dims, data_format)
    _check_kernel("weight", weight_shape, kernel)
    filters = weight_shape[1] * groups
    if 0 in weight_shape:
        raise ShapeError(f"weight must have no size of zero, not shape {weight_shape}")
    if channels % groups:
        raise ShapeError(f"groups={groups} does not divide the {channels} channels of x")
    if channels != weight_shape[0]:
        raise ShapeError(
            f"x of shape {x_shape} with data_format={data_format!r} has {channels} channels, but weight of shape "
            f"{weight_shape} expects {weight_shape[0]}"
        )
    if batch and not all(input_size):
        raise ShapeError(f"x must have at least one element in each spatial dimension, not shape {x_shape}")
    window = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation))
    natural = tuple((n - 1) * s + w for n, s, w in zip(input_size, stride, window))
    if isinstance(padding, str):
        pairs, output_padding = _transposed_padding_word(padding, input_size, stride, natural, window, output_padding)
    else:
        pairs = _padding_pairs(padding, input_size, kernel, stride, dilation)
        if output_size is None:
            _check_output_padding(output_padding, stride, dilation)
    smallest = tuple(n - b - a for n, (b, a) in zip(natural, pairs))
    if output_size is not None:
        result = _transposed_output_size(output_size, smallest, stride, dims + 1 + batched)
    else:
        result = tuple(n + e for n, e in zip(smallest, output_padding))
    if any(n < (1 if batch else 0) for n in result):
        raise ShapeError(
            f"x of shape {x_shape} gives an output of size {result}; every size must be at least 1 "
            f"(kernel {kernel}, stride {stride}, padding {pairs}, dilation {dilation})"
        )
    geometry = ConvGeometry(
        batch, filters, channels, result, kernel, input_size, stride, pairs, dilation,
        groups, data_format, "zeros", dtype, batched,
    )  # fmt: skip
    check_bytes("the output", geometry.x_shape, max(dtype.itemsize, 4))
    return geometry


def _transposed_padding_word(
    word: str, input_size: Sizes, stride: Sizes, natural: Sizes, window: Sizes, output_padding: Sizes
) -> tuple[Pairs, Sizes]:
    """ONNX's ConvTranspose rule: "same" cuts the natural output to input * stride, or extends it."""
    if word == "valid":
        return ((0, 0),) * len(stride), output_padding
    if word == "full":
        return tuple((w - 1, w - 1) for w in window), output_padding
    pairs, extra = [], []
    for n, s, full, e in zip(input_size, stride, natural, output_padding):
        total = full + e - n * s
        cut = max(total, 0)
        less, more = cut // 2, cut - cut // 2
        pairs.append((less, more) if word == "same" else (more, less))
        extra.append(e + max(-total, 0))
    return tuple(pairs), tuple(extra)


def _check_output_padding(output_padding: Sizes, stride: Sizes, dilation: Sizes) -> None:
    if any(e >= max(s, d) for e, s, d in zip(output_padding, stride, dilation)):
        raise ArgumentError(
            f"output_padding must be smaller than stride {stride} or dilation {dilation}, not {output_padding}"
        )


def _transposed_output_size(wanted: Sizes, smallest: Sizes, stride: Sizes, full_dims: int) -> Sizes:
    """Accept the spatial extent alone or, as PyTorch does, behind sizes that are not looked at."""
    dims = len(stride)
    spatial = wanted[-dims:]
    if len(wanted) not in (dims, full_dims):
        raise ArgumentError(f"output_size must have {dims} sizes, not {wanted}")
    largest = tuple(n + s - 1 for n, s in zip(smallest, stride))
    if any(not low <= n <= high for low, n, high in zip(smallest, spatial, largest)):
        raise ArgumentError(f"output_size must lie between {smallest} and {largest}, not {spatial}")
    return spatial


def _check_kernel(name: str, full: Sizes, kernel: Sizes) -> None:
    if any(k < 1 for k in kernel):
        raise ShapeError(f"{name} must have a kernel of at least one element in each dimension, not shape {full}")


def _check_padding_mode(mode: str, input_size: Sizes, pairs: Pairs) -> None:
    """A mirrored or wrapped border can be no wider than what there is to copy."""
    if mode == "zeros":
        return
    for n, (before, after) in zip(input_size, pairs):
        most = {"reflect": n - 1, "replicate": math.inf if n else 0}.get(mode, n)
        if max(before, after) > most:
            raise ShapeError(
                f"padding must be at most {most} with padding_mode={mode!r} on an extent of {n}, not {(before, after)}"
            )


def _window_count(
    input_size: Sizes,
    kernel: Sizes,
    stride: Sizes,
    padding: Pairs,
    dilation: Sizes,
    name: str,
    full: Sizes,
    ceil_mode: bool = False,
) -> Sizes:
    """Count windows; with `ceil_mode` also a last, partial one that starts inside the input or its front padding."""
    result = []
    for n, k, s, (b, a), d in zip(input_size, kernel, stride, padding, dilation):
        room = n + b + a - (d * (k - 1) + 1)
        count = (-(-room // s) if ceil_mode else room // s) + 1
        if ceil_mode and (count - 1) * s >= n + b:
            count -= 1
        if count < 1 or (room < 0 and not ceil_mode):
            raise ShapeError(
                f"{name} of shape {full} is too small: kernel {kernel} with dilation {dilation} covers "
                f"{tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation))}, more than the padded size "
                f"{tuple(n + b + a for n, (b, a) in zip(input_size, padding))}"
            )
        result.append(count)
    return tuple(result)


@lru_cache(maxsize=4096)
def _lifted(geometry: ConvGeometry, data_format: str, dtype: np.dtype) -> ConvGeometry:
    missing = 3 - geometry.spatial_dims
    ones = (1,) * missing
    output_size = ones + geometry.output_size
    kernel = ones + geometry.kernel_size
    return replace(
        geometry,
        input_size=ones + geometry.input_size,
        kernel_size=kernel,
        output_size=output_size,
        # A stride that is never stepped and a dilation that is never used may be huge: kernels see 1.
        stride=tuple(1 if p == 1 else s for p, s in zip(output_size, ones + geometry.stride)),
        dilation=tuple(1 if k == 1 else d for k, d in zip(kernel, ones + geometry.dilation)),
        padding=((0, 0),) * missing + geometry.padding,
        padding_mode="zeros",
        data_format=data_format,
        dtype=dtype,
        batched=True,
    )


# --- pooling ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PoolGeometry:
    """All sizes of one pooling: where each window begins and ends, clipped to the input.

    Make one with :meth:`create` or :meth:`adaptive`, which check their arguments. Kernels see only
    :attr:`windows`, so padding, dilation, ceil_mode and adaptive windows need no kernel of their own.

    Examples
    --------
    >>> PoolGeometry.create((1, 1, 28, 28), 3, stride=2, padding=1, spatial_dims=2).output_size
    (14, 14)
    """

    batch: int
    channels: int
    input_size: Sizes
    output_size: Sizes
    kernel_size: Sizes
    stride: Sizes
    padding: Pairs
    dilation: Sizes
    data_format: str = "channels_first"
    batched: bool = True
    is_adaptive: bool = False

    @staticmethod
    def create(
        x_shape: Sequence[int],
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        *,
        spatial_dims: int,
        data_format: str = "channels_first",
        itemsize: int = 8,
        name: str = "x",
        average: bool = False,
    ) -> PoolGeometry:
        """Check the arguments of a pooling and compute its sizes.

        Parameters
        ----------
        x_shape : (N, C, *spatial), (N, *spatial, C) with channels_last; N may be absent
        kernel_size, stride, dilation : int or one per spatial dimension; stride None means kernel_size
        padding : int or one per dimension (at most half the dilated window), (before, after) pairs, or a word
        ceil_mode : bool
            Also count a last, partial window, if it starts inside the input or its front padding.

        Raises
        ------
        ShapeError, ArgumentError, ArgumentTypeError
        """
        dims = spatial_dims
        kernel = sizes("kernel_size", kernel_size, dims, 1)
        form = padding_form(padding, dims)
        geometry = _pool_geometry(
            shape(name, x_shape),
            kernel,
            _stride_or_kernel(stride, kernel),
            form,
            sizes("dilation", dilation, dims, 1),
            flag("ceil_mode", ceil_mode),
            one_of("data_format", data_format, DATA_FORMATS),
            itemsize,
            name,
        )
        plain = not isinstance(form, str) and not isinstance(form[0], tuple)
        if average and dims == 3 and plain and any(k > n for k, n in zip(kernel, geometry.input_size)):
            # PyTorch's rule for 3-D averages alone.
            raise ShapeError(
                f"{name} of shape {geometry.x_shape} is smaller than kernel_size {kernel}; "
                f"padding given as (before, after) pairs lifts this rule"
            )
        return geometry

    @staticmethod
    def adaptive(
        x_shape: Sequence[int],
        output_size: Any,
        *,
        spatial_dims: int,
        data_format: str = "channels_first",
        itemsize: int = 8,
        name: str = "x",
        allow_no_channels: bool = False,
    ) -> PoolGeometry:
        """Check the arguments of an adaptive pooling: window i is [floor(i*n/p), ceil((i+1)*n/p)).

        `output_size` is an int or one entry per dimension; None keeps the input's size in 2-D and 3-D.
        """
        dims = spatial_dims
        one_of("data_format", data_format, DATA_FORMATS)
        full = shape(name, x_shape)
        batched, batch, channels, input_size = _split_shape(name, full, dims, data_format)
        wanted = output_size
        if _is_sequence(output_size) and dims > 1 and len(output_size) == dims:
            wanted = [n if p is None else p for n, p in zip(input_size, output_size)]
        result = sizes("output_size", wanted, dims, 0, one_for_all=False)
        _check_not_empty(name, full, channels or int(allow_no_channels), input_size)
        ones = (1,) * dims
        geometry = PoolGeometry(
            batch,
            channels,
            input_size,
            result,
            ones,
            ones,
            ((0, 0),) * dims,
            ones,
            data_format,
            batched,
            True,
        )
        check_bytes("the output", geometry.output_shape, itemsize)
        return geometry

    @property
    def spatial_dims(self) -> int:
        """1, 2 or 3."""
        return len(self.input_size)

    @property
    def x_shape(self) -> Sizes:
        """Shape of the input, in the caller's format."""
        return join_shape(self.batch, self.channels, self.input_size, self.data_format, self.batched)

    @property
    def output_shape(self) -> Sizes:
        """Shape of the output, in the caller's format."""
        return join_shape(self.batch, self.channels, self.output_size, self.data_format, self.batched)

    @property
    def first_spatial_axis(self) -> int:
        """Axis of x where its spatial extent begins."""
        return first_spatial_axis(self.data_format, self.batched)

    @property
    def windows(self) -> tuple[np.ndarray, ...]:
        """Per lifted spatial dimension an int64 array (output, 4) of (first, end, step, count).

        Positions first, first + step, ... < end lie inside the input; `count` counts those in the padding too.
        """
        # Geometries live in a cache: the tables of a long signal would stay with them.
        return self._tables if sum(self.output_size) < 2**14 else self._build_tables()

    @cached_property
    def _tables(self) -> tuple[np.ndarray, ...]:
        return self._build_tables()

    def _build_tables(self) -> tuple[np.ndarray, ...]:
        single = np.array([[0, 1, 1, 1]], dtype=np.int64)
        rows = self._adaptive_rows if self.is_adaptive else self._window_rows
        return (*(single,) * (3 - self.spatial_dims), *(rows(axis) for axis in range(self.spatial_dims)))

    def _adaptive_rows(self, axis: int) -> np.ndarray:
        n, p = self.input_size[axis], self.output_size[axis]
        # In Python's integers: i*n may pass 2**63 where n and p do not.
        spans = [(i * n // p, -(-(i + 1) * n // p)) for i in range(p)]
        rows = [(first, end, 1, end - first) for first, end in spans]
        return np.array(rows, dtype=np.int64).reshape(-1, 4)

    def _window_rows(self, axis: int) -> np.ndarray:
        n, k = self.input_size[axis], self.kernel_size[axis]
        before, after = self.padding[axis]
        p = self.output_size[axis]
        # A stride that is never stepped may be huge, and so may a dilation that is never used.
        s = self.stride[axis] if p > 1 else 1
        d = self.dilation[axis] if k > 1 else 1
        start = np.arange(p, dtype=np.int64) * s - before
        end = start + (d * (k - 1) + 1)
        first = start + np.maximum(-(start // d), 0) * d
        count = np.maximum(-(-(np.minimum(end, n + after) - start) // d), 0)
        return np.stack([np.minimum(first, n), np.minimum(end, n), np.full_like(start, d), count], axis=1)


@lru_cache(maxsize=4096)
def _pool_geometry(
    x_shape: Sizes,
    kernel: Sizes,
    stride: Sizes,
    padding: str | Sizes | Pairs,
    dilation: Sizes,
    ceil_mode: bool,
    data_format: str,
    itemsize: int,
    name: str,
) -> PoolGeometry:
    batched, batch, channels, input_size = _split_shape(name, x_shape, len(kernel), data_format)
    check_pool_padding(padding, kernel)
    _check_not_empty(name, x_shape, channels, input_size)
    pairs = _padding_pairs(padding, input_size, kernel, stride, dilation)
    output_size = _window_count(input_size, kernel, stride, pairs, dilation, name, x_shape, ceil_mode)
    geometry = PoolGeometry(
        batch, channels, input_size, output_size, kernel, stride, pairs, dilation, data_format, batched
    )
    check_bytes("the output", geometry.output_shape, itemsize)
    return geometry


def check_pool_padding(form: str | Sizes | Pairs, kernel: Sizes) -> None:
    """Refuse ints that PyTorch does: more than half the kernel, dilated or not; a pair may be wider."""
    if not isinstance(form, str) and any(isinstance(p, int) and p > k // 2 for p, k in zip(form, kernel)):
        raise ArgumentError(
            f"padding must be at most {tuple(k // 2 for k in kernel)}, half of kernel_size, not {form}; "
            f"(before, after) pairs may be wider"
        )


def _check_not_empty(name: str, full: Sizes, channels: int, input_size: Sizes) -> None:
    if channels == 0 or 0 in input_size:
        raise ShapeError(f"{name} must have at least one channel and one element per dimension, not shape {full}")


def _stride_or_kernel(stride: Any, kernel: Sizes) -> Sizes:
    """Not given, or given as an empty sequence: the windows lie side by side."""
    if stride is None or (_is_sequence(stride) and not stride):
        return kernel
    return sizes("stride", stride, len(kernel), 1)


def pool_grad_geometry(
    input_shape: Any,
    output_shape: Sizes,
    dims: int,
    data_format: str,
    names: tuple[str, str] = ("input_shape", "grad_output"),
) -> tuple[bool, int, int, Sizes]:
    """Check that a pooled array fits the input it came from; return (batched, N, C, spatial) of the input."""
    one_of("data_format", data_format, DATA_FORMATS)
    full = shape(names[0], input_shape)
    batched, batch, channels, spatial = _split_shape(names[0], full, dims, data_format)
    _check_not_empty(names[0], full, 1, spatial)
    pooled = _split_shape(names[1], output_shape, dims, data_format)
    if pooled[:3] != (batched, batch, channels):
        raise ShapeError(f"{names[1]} of shape {output_shape} must have the batch and channels of {names[0]} {full}")
    check_bytes(names[0], full, 8)
    return batched, batch, channels, spatial


def unpool_output_size(
    x_shape: Sequence[int],
    kernel_size: Any,
    stride: Any,
    padding: Any,
    output_size: Any,
    *,
    spatial_dims: int,
    data_format: str,
) -> tuple[bool, int, int, Sizes, Sizes]:
    """Check the arguments of max-unpooling; return (batched, N, C, input spatial size, output spatial size).

    The default output, (input - 1)*stride - 2*padding + kernel, may be overridden by less than a stride.
    """
    dims = spatial_dims
    kernel = sizes("kernel_size", kernel_size, dims, 1, one_for_all=False)
    step = _stride_or_kernel(stride, kernel)
    pairs = _unpool_padding(padding, kernel, step, dims)
    one_of("data_format", data_format, DATA_FORMATS)
    full = shape("x_shape", x_shape)
    batched, batch, channels, input_size = _split_shape("x", full, dims, data_format)
    _check_not_empty("x", full, channels, input_size)
    default = tuple((n - 1) * s - b - a + k for n, s, (b, a), k in zip(input_size, step, pairs, kernel))
    result = default
    if output_size is not None:
        wanted = shape("output_size", output_size)
        if len(wanted) == dims + 2:
            wanted = wanted[2:] if data_format == "channels_first" else wanted[1:-1]
        if len(wanted) != dims:
            raise ArgumentError(f"output_size must have {dims} sizes, not {shown(output_size)}")
        if any(not n - s < w < n + s for n, s, w in zip(default, step, wanted)):
            raise ArgumentError(
                f"output_size must lie within a stride of {default}, exclusive: strides {step}, not {wanted}"
            )
        result = wanted
    if any(n < 1 for n in result):
        raise ShapeError(f"x of shape {full} gives an output of size {result}; every size must be at least 1")
    check_bytes("the output", (batch, channels, *result), 8)
    return batched, batch, channels, input_size, result


def _unpool_padding(padding: Any, kernel: Sizes, stride: Sizes, dims: int) -> Pairs:
    form = padding_form(padding, dims)
    if isinstance(form, str):
        if form in ("same", "same_lower"):
            raise ArgumentError(
                f"padding={form!r} does not tell the size that was pooled; give numbers, or output_size"
            )
        return tuple(padding_word(form, 1, k, s) for k, s in zip(kernel, stride))
    return _padding_pairs(form, kernel, kernel, stride, (1,) * dims)


# --- receptive field -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReceptiveField:
    """What one output element sees of the network's input, along each spatial dimension.

    A layer of window w and stride s turns (size, jump) into (size + (w - 1)*jump, jump*s)
    (Araujo, Norris & Sim, "Computing receptive fields of convolutional neural networks", Distill 2019).

    Examples
    --------
    >>> field = ReceptiveField.start(2)
    >>> for _ in range(3):
    ...     field = field.through((3, 3), (1, 1))
    >>> field.size
    (7, 7)
    """

    size: Sizes
    jump: Sizes

    @staticmethod
    def start(spatial_dims: int) -> ReceptiveField:
        """Return the field of the input itself: one element."""
        return ReceptiveField((1,) * spatial_dims, (1,) * spatial_dims)

    def through(self, window: Sizes, stride: Sizes) -> ReceptiveField:
        """Return the field after a layer with this (dilated) window and stride."""
        return ReceptiveField(
            tuple(n + (w - 1) * j for n, w, j in zip(self.size, window, self.jump)),
            tuple(j * s for j, s in zip(self.jump, stride)),
        )
