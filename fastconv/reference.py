"""The oracle: every operation as its definition, in NumPy and float64.

Convolution is ``y[n, k, p] = bias[k] + sum_{c, r} x[n, c, p*stride - before + r*dilation] * weight[k, c, r]``
with ``p`` and ``r`` over 1, 2 or 3 spatial dimensions: one shifted multiply-accumulate per kernel tap,
so that the layers of real networks take seconds. Pools visit one output position after another.

Nothing is shared with a kernel or with the package's argument checks, and nothing is validated: arguments
are taken to be right. Floating-point inputs of any width are widened to float64 and results are float64;
integers are exact as long as every sum stays below 2**53. Padding is real here: a zero in the margin times an
infinite weight is NaN.

Arrays are ``(N, C, *spatial)``, or ``(N, *spatial, C)`` with ``data_format="channels_last"``, with or without
``N``. The number of spatial dimensions comes from the weight or from a tuple among the arguments; otherwise
the array is taken to be batched unless ``spatial_dims`` says how many there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

Array = np.ndarray
Sizes = tuple[int, ...]
Pairs = list[tuple[int, int]]
Window = tuple[Sizes, Array, int]

_NUMPY_PAD: dict[str, Any] = {
    "zeros": "constant",
    "reflect": "reflect",
    "symmetric": "symmetric",
    "replicate": "edge",
    "circular": "wrap",
}

_ACTIVATIONS: dict[str | None, Callable[[Array], Array]] = {
    None: lambda y: y,
    "relu": lambda y: np.maximum(y, 0.0),
    "leaky_relu": lambda y: np.where(y < 0, 0.01 * y, y),
    "sigmoid": lambda y: 1.0 / (1.0 + np.exp(-y)),
    "tanh": np.tanh,
}

# NaN, infinity and overflow are results like any other, not a cause for warnings.
_quiet = np.errstate(invalid="ignore", over="ignore", divide="ignore")


def _at(position: Sizes) -> tuple[Any, ...]:
    """Index of one kernel tap or one output position in every plane."""
    return (slice(None), slice(None), *position)


def _each(value: Any, dims: int) -> Sizes:
    """One int per spatial dimension, from an int or a sequence."""
    return (int(value),) * dims if np.ndim(value) == 0 else tuple(int(v) for v in value)


def _dims(spatial_dims: int | None, ndim: int, *sizes: Any) -> int:
    """Spatial dimensions: as told, else as many as a sequence among `sizes` has, else those of a batch."""
    if spatial_dims is not None:
        return spatial_dims
    lengths = [len(size) for size in sizes if isinstance(size, (list, tuple))]
    return lengths[0] if lengths else ndim - 2


def _pads(
    padding: Any,
    extents: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Pairs:
    """The margin as (before, after), one pair per spatial dimension."""
    spans = [d * (k - 1) for k, d in zip(kernel, dilation)]
    if isinstance(padding, str):
        if padding == "valid":
            return [(0, 0) for _ in spans]
        if padding == "full":
            return [(span, span) for span in spans]
        totals = [max((-(-n // s) - 1) * s + span + 1 - n, 0) for n, s, span in zip(extents, stride, spans)]
        halves = [(total // 2, total - total // 2) for total in totals]
        return halves if padding == "same" else [(after, before) for before, after in halves]
    if np.ndim(padding) == 0:
        padding = [padding] * len(spans)
    return [(int(p), int(p)) if np.ndim(p) == 0 else (int(p[0]), int(p[1])) for p in padding]


def _planes(x: Any, dims: int, data_format: str) -> Array:
    """`x` as (N, C, *spatial), a batch axis added if it had none."""
    x = np.asarray(x)
    x = x if x.ndim == dims + 2 else x[np.newaxis]
    return np.moveaxis(x, -1, 1) if data_format == "channels_last" else x


def _float_planes(x: Any, dims: int, data_format: str) -> Array:
    return _planes(x, dims, data_format).astype(np.float64)


def _flat(planes: Array) -> Array:
    """Each plane as one axis; NumPy cannot infer its length for an empty batch."""
    return planes.reshape(*planes.shape[:2], math.prod(planes.shape[2:]))


def _layout(y: Array, batched: bool, data_format: str) -> Array:
    """(N, C, *spatial) in the caller's layout again."""
    y = np.moveaxis(y, 1, -1) if data_format == "channels_last" else y
    return np.ascontiguousarray(y if batched else y[0])


def _logical(shape: Sequence[int], dims: int, data_format: str) -> tuple[int, int, Sizes]:
    """(N, C, spatial) of an array whose shape in the caller's layout is `shape`."""
    shape = tuple(shape) if len(shape) == dims + 2 else (1, *shape)
    if data_format == "channels_last":
        return shape[0], shape[-1], shape[1:-1]
    return shape[0], shape[1], shape[2:]


def _taps(
    kernel: Sequence[int], out: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Iterator[tuple[Sizes, tuple[Any, ...]]]:
    """Each kernel tap with the slices of a padded image that it meets, one element per output position."""
    for tap in np.ndindex(*kernel):
        starts = [r * d for r, d in zip(tap, dilation)]
        yield tap, (..., *(slice(r, r + s * p, s) for r, p, s in zip(starts, out, stride)))


def _add_margin(x: Any, pads: Pairs, padding_mode: str) -> Array:
    if not any(before or after for before, after in pads):
        return x
    return np.pad(x, [(0, 0), (0, 0), *pads], mode=_NUMPY_PAD[padding_mode])


def _remove_margin(padded: Array, extents: Sequence[int], pads: Pairs, padding_mode: str) -> Array:
    """Adjoint of `_add_margin`: every element of the margin goes back to the element that it copied."""
    for axis, (n, pad) in enumerate(zip(extents, pads), start=2):
        if padding_mode == "zeros":
            source = np.pad(np.arange(n), pad, constant_values=-1)
        else:
            source = np.pad(np.arange(n), pad, mode=_NUMPY_PAD[padding_mode])
        padded = np.moveaxis(padded, axis, 0)
        folded = np.zeros((n, *padded.shape[1:]))
        for at, origin in enumerate(source):
            if origin >= 0:
                folded[origin] += padded[at]
        padded = np.moveaxis(folded, 0, axis)
    return padded


def _accumulate(
    planes: Array,
    weight: Array,
    out: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Array:
    """(N, K, *out) = sum over taps of weight (K, C//groups, *kernel) @ shifted planes (N, C, *padded)."""
    N, C = planes.shape[:2]
    K, kernel = weight.shape[0], weight.shape[2:]
    y = np.zeros((N, groups, K // groups, math.prod(out)))
    for tap, shifted in _taps(kernel, out, stride, dilation):
        w = weight[_at(tap)].reshape(groups, K // groups, C // groups)
        # (N, G, K/G, PQ) = (G, K/G, C/G) @ (N, G, C/G, PQ)
        y += w @ planes[shifted].reshape(N, groups, C // groups, math.prod(out))
    return y.reshape(N, K, *out)


def _scatter(
    grad: Array,
    weight: Array,
    padded_extents: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Array:
    """Adjoint of `_accumulate` in its planes: (N, C, *padded) from grad (N, K, *out)."""
    N, K, *out = grad.shape
    per_group, kernel = weight.shape[1], weight.shape[2:]
    planes = np.zeros((N, groups * per_group, *padded_extents))
    g = grad.reshape(N, groups, K // groups, math.prod(out))
    for tap, shifted in _taps(kernel, out, stride, dilation):
        w = weight[_at(tap)].reshape(groups, K // groups, per_group)
        # (N, G, C/G, PQ) = (G, C/G, K/G) @ (N, G, K/G, PQ)
        planes[shifted] += (w.swapaxes(1, 2) @ g).reshape(N, groups * per_group, *out)
    return planes


def _correlate(
    grad: Array,
    planes: Array,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Array:
    """Adjoint of `_accumulate` in its weight: (K, C//groups, *kernel)."""
    N, K, *out = grad.shape
    per_group, kernel = weight_shape[1], weight_shape[2:]
    weight = np.zeros(weight_shape)
    g = grad.reshape(N, groups, K // groups, math.prod(out))
    for tap, shifted in _taps(kernel, out, stride, dilation):
        x = planes[shifted].reshape(N, groups, per_group, math.prod(out))
        # (N, G, K/G, C/G) = (N, G, K/G, PQ) @ (N, G, PQ, C/G), then summed over N
        product = (g @ x.swapaxes(2, 3)).sum(axis=0)
        weight[_at(tap)] = product.reshape(K, per_group)
    return weight


def _epilogue(y: Array, bias: Any, activation: str | None) -> Array:
    if bias is not None:
        y = y + np.asarray(bias).astype(np.float64).reshape(-1, *[1] * (y.ndim - 2))
    return _ACTIVATIONS[activation](y)


def _bias_grad(grad: Array) -> Array:
    return grad.sum(axis=(0, *range(2, grad.ndim)))


@_quiet
def conv(
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
) -> Array:
    """Convolution (cross-correlation) of `x` with `weight` ``(K, C//groups, *kernel)``: ``(N, K, *out)``."""
    weight = np.asarray(weight).astype(np.float64)
    kernel, dims = weight.shape[2:], weight.ndim - 2
    planes = _float_planes(x, dims, data_format)
    stride, dilation = _each(stride, dims), _each(dilation, dims)
    pads = _pads(padding, planes.shape[2:], kernel, stride, dilation)
    planes = _add_margin(planes, pads, padding_mode)
    out = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(planes.shape[2:], kernel, stride, dilation)]
    y = _epilogue(_accumulate(planes, weight, out, stride, dilation, groups), bias, activation)
    return _layout(y, np.ndim(x) == dims + 2, data_format)


@_quiet
def conv_backward(
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
) -> tuple[Array, Array, Array]:
    """Gradients of `conv` before its activation, ``(grad_input, grad_weight, grad_bias)``."""
    weight = np.asarray(weight).astype(np.float64)
    dims = weight.ndim - 2
    planes, grad = _float_planes(x, dims, data_format), _float_planes(grad_output, dims, data_format)
    stride, dilation = _each(stride, dims), _each(dilation, dims)
    extents = planes.shape[2:]
    pads = _pads(padding, extents, weight.shape[2:], stride, dilation)
    planes = _add_margin(planes, pads, padding_mode)
    grad_weight = _correlate(grad, planes, weight.shape, stride, dilation, groups)
    grad_input = _scatter(grad, weight, planes.shape[2:], stride, dilation, groups)
    grad_input = _remove_margin(grad_input, extents, pads, padding_mode)
    return _layout(grad_input, np.ndim(x) == dims + 2, data_format), grad_weight, _bias_grad(grad)


def _transposed_pads(
    padding: Any,
    extents: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
) -> Pairs:
    """The (before, after) cut from the full result; "same" leaves in*stride, so that it may be negative."""
    if not isinstance(padding, str) or padding in ("valid", "full"):
        return _pads(padding, extents, kernel, stride, dilation)
    pads = []
    for k, s, d, extra in zip(kernel, stride, dilation, output_padding):
        total = d * (k - 1) + 1 + extra - s
        half = max(total, 0) // 2
        before = half if padding == "same" else max(total, 0) - half
        pads.append((before, total - before))
    return pads


def _transposed_sizes(
    extents: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Any,
    output_padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[tuple[Any, ...], list[int]]:
    """Where a transposed convolution's result lies: (slices of the full image, extents of the full image)."""
    pads = _transposed_pads(padding, extents, kernel, stride, output_padding, dilation)
    full = [(n - 1) * s + d * (k - 1) + 1 for n, k, s, d in zip(extents, kernel, stride, dilation)]
    stops = [n - after + extra for n, (_, after), extra in zip(full, pads, output_padding)]
    inner = (..., *(slice(before, stop) for (before, _), stop in zip(pads, stops)))
    return inner, [max(n, stop) for n, stop in zip(full, stops)]


@_quiet
def conv_transpose(
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    *,
    data_format: str = "channels_first",
    activation: str | None = None,
) -> Array:
    """Transposed convolution, the input gradient of a convolution; `weight` is ``(C, K//groups, *kernel)``.

    The extents are ``(in - 1)*stride - before - after + dilation*(kernel - 1) + output_padding + 1``.
    """
    weight = np.asarray(weight).astype(np.float64)
    dims = weight.ndim - 2
    planes = _float_planes(x, dims, data_format)
    stride, dilation, extra = _each(stride, dims), _each(dilation, dims), _each(output_padding, dims)
    inner, full = _transposed_sizes(planes.shape[2:], weight.shape[2:], stride, padding, extra, dilation)
    y = _epilogue(_scatter(planes, weight, full, stride, dilation, groups)[inner], bias, activation)
    return _layout(y, np.ndim(x) == dims + 2, data_format)


@_quiet
def conv_transpose_backward(
    grad_output: Any,
    x: Any,
    weight: Any,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    *,
    data_format: str = "channels_first",
) -> tuple[Array, Array, Array]:
    """Gradients of `conv_transpose` before its activation: ``(grad_input, grad_weight, grad_bias)``."""
    weight = np.asarray(weight).astype(np.float64)
    dims = weight.ndim - 2
    planes, grad = _float_planes(x, dims, data_format), _float_planes(grad_output, dims, data_format)
    stride, dilation, extra = _each(stride, dims), _each(dilation, dims), _each(output_padding, dims)
    inner, full = _transposed_sizes(planes.shape[2:], weight.shape[2:], stride, padding, extra, dilation)
    whole = np.zeros((*grad.shape[:2], *full))
    whole[inner] = grad
    grad_input = _accumulate(whole, weight, planes.shape[2:], stride, dilation, groups)
    grad_weight = _correlate(planes, whole, weight.shape, stride, dilation, groups)
    return _layout(grad_input, np.ndim(x) == dims + 2, data_format), grad_weight, _bias_grad(grad)


def _pool_extent(n: int, pad: tuple[int, int], k: int, s: int, d: int, ceil_mode: bool) -> int:
    before, after = pad
    room = n + before + after - d * (k - 1) - 1
    if not ceil_mode:
        return room // s + 1
    out = -(-room // s) + 1
    # A last window that starts beyond the image and its leading margin would see nothing of the image.
    return out - 1 if (out - 1) * s >= n + before else out


def _windows(
    extents: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Any,
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[Sizes, Iterator[Window]]:
    """Output extents, and per output position: (position, flat indices in scan order, elements counted).

    Counted are the window's elements in the image or its margin; with `ceil_mode` a window may end beyond.
    """
    pads = _pads(padding, extents, kernel, stride, dilation)
    per_dim = list(zip(extents, pads, kernel, stride, dilation))
    out = tuple(_pool_extent(*sizes, ceil_mode) for sizes in per_dim)
    plane = np.arange(math.prod(extents)).reshape(extents)

    def visit() -> Iterator[Window]:
        for position in np.ndindex(*out):
            inside, counted = [], 1
            for p, (n, (before, after), k, s, d) in zip(position, per_dim):
                places = p * s - before + d * np.arange(k)
                inside.append(places[(places >= 0) & (places < n)])
                counted *= int((places < n + after).sum())
            yield position, plane[np.ix_(*inside)].ravel(), counted

    return out, visit()


def _adaptive_windows(extents: Sequence[int], out: Sequence[int]) -> Iterator[Window]:
    """As `_windows`: window i of an extent n spans floor(i*n/out) to ceil((i+1)*n/out)."""
    plane = np.arange(math.prod(extents)).reshape(extents)
    for position in np.ndindex(*out):
        inside = [np.arange(i * n // p, -(-(i + 1) * n // p)) for i, n, p in zip(position, extents, out)]
        flat = plane[np.ix_(*inside)].ravel()
        yield position, flat, flat.size


def _max_over(planes: Array, out: Sequence[int], windows: Iterable[Window]) -> tuple[Array, Array]:
    """Largest element and its flat index per window: the first on ties, the last NaN where there are any."""
    N, C = planes.shape[:2]
    is_float = planes.dtype.kind == "f"
    lowest = -np.inf if is_float else np.iinfo(planes.dtype).min
    flat_planes = _flat(planes)
    values, indices = np.full((N, C, *out), lowest, planes.dtype), np.full((N, C, *out), -1, np.int64)
    for position, flat, _ in windows:
        if flat.size == 0:
            continue
        window = flat_planes[..., flat]
        winner = window.argmax(axis=-1)
        if is_float:
            nan = np.isnan(window)
            # PyTorch replaces the winner whenever it meets a NaN, so that the last one in scan order stays.
            winner = np.where(nan.any(axis=-1), flat.size - 1 - nan[..., ::-1].argmax(axis=-1), winner)
        values[_at(position)] = np.take_along_axis(window, winner[..., np.newaxis], axis=-1)[..., 0]
        indices[_at(position)] = flat[winner]
    return values, indices


def _comparable(x: Any) -> Array:
    """Integers as they are, every floating-point width as float64."""
    x = np.asarray(x)
    return x if np.issubdtype(x.dtype, np.integer) else x.astype(np.float64)


def max_pool(
    x: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    *,
    data_format: str = "channels_first",
    spatial_dims: int | None = None,
) -> tuple[Array, Array]:
    """Largest element of each window, and its flat index over the spatial extents of the plane.

    Values are float64, or the input's own type if that is an integer type; indices are int64. A margin never
    wins: a window wholly in it gives -inf (the smallest integer) with index -1, a window of -inf its first
    element inside the image. On ties the first in scan order wins; among NaNs the last, as in PyTorch.
    """
    dims = _dims(spatial_dims, np.ndim(x), kernel_size, stride, padding, dilation)
    kernel = _each(kernel_size, dims)
    stride = kernel if stride is None else _each(stride, dims)
    planes = _planes(_comparable(x), dims, data_format)
    out, windows = _windows(planes.shape[2:], kernel, stride, padding, _each(dilation, dims), ceil_mode)
    values, indices = _max_over(planes, out, windows)
    batched = np.ndim(x) == dims + 2
    return _layout(values, batched, data_format), _layout(indices, batched, data_format)


def max_pool_backward(
    grad_output: Any,
    indices: Any,
    input_shape: Sequence[int],
    *,
    data_format: str = "channels_first",
    spatial_dims: int | None = None,
) -> Array:
    """Gradient of `max_pool`: each element is added where its index points; -1 points nowhere."""
    dims = len(input_shape) - 2 if spatial_dims is None else spatial_dims
    N, C, extents = _logical(input_shape, dims, data_format)
    grad = _flat(_float_planes(grad_output, dims, data_format))
    where = _flat(_planes(indices, dims, data_format))
    grad_input = np.zeros((N, C, math.prod(extents)))
    for n, c in np.ndindex(N, C):
        kept = where[n, c] >= 0
        np.add.at(grad_input[n, c], where[n, c][kept], grad[n, c][kept])
    return _layout(grad_input.reshape(N, C, *extents), len(input_shape) == dims + 2, data_format)


def max_unpool(x: Any, indices: Any, output_spatial: Sequence[int], *, data_format: str = "channels_first") -> Array:
    """Put each element of `x` where its index points in an image of zeros; the last one at a place stays."""
    dims = len(output_spatial)
    planes, where = _float_planes(x, dims, data_format), _planes(indices, dims, data_format)
    N, C = planes.shape[:2]
    y = np.zeros((N, C, math.prod(output_spatial)))
    for n, c in np.ndindex(N, C):
        for value, index in zip(planes[n, c].ravel(), where[n, c].ravel()):
            y[n, c, index] = value
    return _layout(y.reshape(N, C, *output_spatial), np.ndim(x) == dims + 2, data_format)


def max_unpool_backward(
    grad_output: Any, indices: Any, *, data_format: str = "channels_first", spatial_dims: int | None = None
) -> Array:
    """Gradient of `max_unpool`: the element of `grad_output` that each index points at."""
    dims = np.ndim(grad_output) - 2 if spatial_dims is None else spatial_dims
    grad, where = _float_planes(grad_output, dims, data_format), _planes(indices, dims, data_format)
    picked = np.take_along_axis(_flat(grad), _flat(where), axis=-1)
    return _layout(picked.reshape(where.shape), np.ndim(grad_output) == dims + 2, data_format)


def _divisor(size: int, counted: int, count_include_pad: bool, divisor_override: int | None) -> int:
    if divisor_override is not None:
        return divisor_override
    return counted if count_include_pad else size


@_quiet
def avg_pool(
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
    spatial_dims: int | None = None,
) -> Array:
    """Mean of each window; a window with no element inside the image gives 0.

    The divisor is the number of window elements in the image and, with `count_include_pad`, in its margin.
    """
    dims = _dims(spatial_dims, np.ndim(x), kernel_size, stride, padding, dilation)
    kernel = _each(kernel_size, dims)
    stride = kernel if stride is None else _each(stride, dims)
    planes = _float_planes(x, dims, data_format)
    N, C = planes.shape[:2]
    out, windows = _windows(planes.shape[2:], kernel, stride, padding, _each(dilation, dims), ceil_mode)
    y, flat_planes = np.zeros((N, C, *out)), _flat(planes)
    for position, flat, counted in windows:
        if flat.size:
            divisor = _divisor(flat.size, counted, count_include_pad, divisor_override)
            y[_at(position)] = flat_planes[..., flat].sum(axis=-1) / divisor
    return _layout(y, np.ndim(x) == dims + 2, data_format)


@_quiet
def avg_pool_backward(
    grad_output: Any,
    input_shape: Sequence[int],
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    dilation: Any = 1,
    data_format: str = "channels_first",
    spatial_dims: int | None = None,
) -> Array:
    """Gradient of `avg_pool`: each element of `grad_output`, divided, goes to every element of its window."""
    dims = len(input_shape) - 2 if spatial_dims is None else spatial_dims
    kernel = _each(kernel_size, dims)
    stride = kernel if stride is None else _each(stride, dims)
    N, C, extents = _logical(input_shape, dims, data_format)
    grad = _float_planes(grad_output, dims, data_format)
    _, windows = _windows(extents, kernel, stride, padding, _each(dilation, dims), ceil_mode)
    grad_input = np.zeros((N, C, math.prod(extents)))
    for position, flat, counted in windows:
        if flat.size:
            divisor = _divisor(flat.size, counted, count_include_pad, divisor_override)
            grad_input[..., flat] += grad[_at(position)][..., np.newaxis] / divisor
    return _layout(grad_input.reshape(N, C, *extents), len(input_shape) == dims + 2, data_format)


@_quiet
def lp_pool(
    x: Any,
    norm_type: float,
    kernel_size: Any,
    stride: Any = None,
    ceil_mode: bool = False,
    *,
    padding: Any = 0,
    dilation: Any = 1,
    data_format: str = "channels_first",
    spatial_dims: int | None = None,
) -> Array:
    """``(avg_pool(|x|**p) * prod(kernel)) ** (1/p)``: the p-norm of each window."""
    dims = _dims(spatial_dims, np.ndim(x), kernel_size, stride, padding, dilation)
    powers = np.abs(np.asarray(x).astype(np.float64)) ** norm_type
    layout = {"dilation": dilation, "data_format": data_format, "spatial_dims": dims}
    mean = avg_pool(powers, kernel_size, stride, padding, ceil_mode, **layout)
    return (mean * math.prod(_each(kernel_size, dims))) ** (1.0 / norm_type)


@_quiet
def lp_pool_backward(
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
    spatial_dims: int | None = None,
) -> Array:
    """Gradient of `lp_pool`, taken as 0 where the norm is 0 and so has none."""
    dims = _dims(spatial_dims, np.ndim(x), kernel_size, stride, padding, dilation)
    x = np.asarray(x).astype(np.float64)
    layout = {"dilation": dilation, "data_format": data_format, "spatial_dims": dims}
    norms = lp_pool(x, norm_type, kernel_size, stride, ceil_mode, padding=padding, **layout)
    grad = np.where(norms == 0, 0.0, np.asarray(grad_output).astype(np.float64) * norms ** (1.0 - norm_type))
    # d norm / d mean = prod(kernel) / p * norm**(1 - p), and d |x|**p / dx = p * |x|**(p - 1) * sign(x)
    spread = avg_pool_backward(grad, x.shape, kernel_size, stride, padding, ceil_mode, **layout)
    return spread * math.prod(_each(kernel_size, dims)) * np.abs(x) ** (norm_type - 1) * np.sign(x)


def _adaptive_out(output_size: Any, extents: Sequence[int]) -> Sizes:
    if np.ndim(output_size) == 0:
        output_size = [output_size] * len(extents)
    return tuple(n if p is None else int(p) for p, n in zip(output_size, extents))


@_quiet
def adaptive_avg_pool(
    x: Any, output_size: Any, *, data_format: str = "channels_first", spatial_dims: int | None = None
) -> Array:
    """Mean over windows ``floor(i*in/out) .. ceil((i+1)*in/out)``; None in `output_size` keeps an extent."""
    dims = _dims(spatial_dims, np.ndim(x), output_size)
    planes = _float_planes(x, dims, data_format)
    N, C, *extents = planes.shape
    out = _adaptive_out(output_size, extents)
    y, flat_planes = np.zeros((N, C, *out)), _flat(planes)
    for position, flat, count in _adaptive_windows(extents, out):
        y[_at(position)] = flat_planes[..., flat].sum(axis=-1) / count
    return _layout(y, np.ndim(x) == dims + 2, data_format)


@_quiet
def adaptive_avg_pool_backward(
    grad_output: Any,
    input_shape: Sequence[int],
    *,
    data_format: str = "channels_first",
    spatial_dims: int | None = None,
) -> Array:
    """Gradient of `adaptive_avg_pool`."""
    dims = len(input_shape) - 2 if spatial_dims is None else spatial_dims
    N, C, extents = _logical(input_shape, dims, data_format)
    grad = _float_planes(grad_output, dims, data_format)
    grad_input = np.zeros((N, C, math.prod(extents)))
    for position, flat, count in _adaptive_windows(extents, grad.shape[2:]):
        grad_input[..., flat] += grad[_at(position)][..., np.newaxis] / count
    return _layout(grad_input.reshape(N, C, *extents), len(input_shape) == dims + 2, data_format)


def adaptive_max_pool(
    x: Any, output_size: Any, *, data_format: str = "channels_first", spatial_dims: int | None = None
) -> tuple[Array, Array]:
    """Largest element of each adaptive window, and its flat index; ties and NaN as in `max_pool`."""
    dims = _dims(spatial_dims, np.ndim(x), output_size)
    planes = _planes(_comparable(x), dims, data_format)
    out = _adaptive_out(output_size, planes.shape[2:])
    values, indices = _max_over(planes, out, _adaptive_windows(planes.shape[2:], out))
    batched = np.ndim(x) == dims + 2
    return _layout(values, batched, data_format), _layout(indices, batched, data_format)


def adaptive_max_pool_backward(
    grad_output: Any,
    indices: Any,
    input_shape: Sequence[int],
    *,
    data_format: str = "channels_first",
    spatial_dims: int | None = None,
) -> Array:
    """Gradient of `adaptive_max_pool`."""
    return max_pool_backward(grad_output, indices, input_shape, data_format=data_format, spatial_dims=spatial_dims)


def unfold(
    x: Any,
    kernel_size: Any,
    dilation: Any = 1,
    padding: Any = 0,
    stride: Any = 1,
    *,
    spatial_dims: int | None = None,
) -> Array:
    """Patches as columns: ``(N, C, *spatial)`` to ``(N, C*prod(kernel), L)``, channels slowest, then taps.

    Two spatial dimensions unless a tuple or `spatial_dims` says otherwise.
    """
    dims = _dims(spatial_dims, 4, kernel_size, dilation, padding, stride)
    planes = _float_planes(x, dims, "channels_first")
    kernel, stride, dilation = _each(kernel_size, dims), _each(stride, dims), _each(dilation, dims)
    planes = _add_margin(planes, _pads(padding, planes.shape[2:], kernel, stride, dilation), "zeros")
    out = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(planes.shape[2:], kernel, stride, dilation)]
    N, C = planes.shape[:2]
    cols = np.zeros((N, C, *kernel, *out))
    for tap, shifted in _taps(kernel, out, stride, dilation):
        cols[_at(tap)] = planes[shifted]
    cols = cols.reshape(N, C * math.prod(kernel), math.prod(out))
    return cols if np.ndim(x) == dims + 2 else cols[0]


def fold(
    cols: Any,
    output_size: Any,
    kernel_size: Any,
    dilation: Any = 1,
    padding: Any = 0,
    stride: Any = 1,
    *,
    spatial_dims: int | None = None,
) -> Array:
    """Adjoint of `unfold`: ``(N, C*prod(kernel), L)`` to ``(N, C, *output_size)``, overlaps added."""
    dims = _dims(spatial_dims, 4, output_size, kernel_size, dilation, padding, stride)
    extents, kernel = _each(output_size, dims), _each(kernel_size, dims)
    stride, dilation = _each(stride, dims), _each(dilation, dims)
    pads = _pads(padding, extents, kernel, stride, dilation)
    padded = [n + before + after for n, (before, after) in zip(extents, pads)]
    out = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(padded, kernel, stride, dilation)]
    batched = np.asarray(cols).astype(np.float64)
    batched = batched if batched.ndim == 3 else batched[np.newaxis]
    N, C = batched.shape[0], batched.shape[1] // math.prod(kernel)
    patches, planes = batched.reshape(N, C, *kernel, *out), np.zeros((N, C, *padded))
    for tap, shifted in _taps(kernel, out, stride, dilation):
        planes[shifted] += patches[_at(tap)]
    image = _remove_margin(planes, extents, pads, "zeros")
    return image if np.ndim(cols) == 3 else image[0]
