"""Pools for PyTorch: max, average, Lp and adaptive ones, unpooling, and their gradients.

What a gradient needs beside the gradient of the output is little: where the maxima were, or only how large the input
was. The input is kept all the same, as PyTorch does: with create_graph=True the gradient depends on it, if only by 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

from ..geometry import check_pool_padding, padding_form, sizes, unpool_output_size
from ..ops import pooling as ops
from ..ops._entries import entries
from ._operators import (
    How,
    Operation,
    Tensors,
    checked_tensor,
    data_format_of,
    described,
    empty_image,
    flat_padding,
    from_image,
    in_pairs,
    is_autocast,
    lies_last,
    lying_first,
    on_batches,
    plus,
    to_image,
)

_HALF = (torch.float16, torch.bfloat16)
_FIRST = lambda how: (0,)  # noqa: E731
_BOTH = lambda how: (0, 1)  # noqa: E731
_WINDOW = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode"

# --- windows ---------------------------------------------------------------------------------------------------
# window = (kernel_size, stride, padding, dilation, ceil_mode)


def _flat_window(extents: Sequence[Any], window: How) -> How:
    kernel, stride, padding, dilation, ceil_mode = window
    dims = len(extents)
    kernel = sizes("kernel_size", kernel, dims, 1)
    stride = kernel if stride is None or stride in ((), []) else sizes("stride", stride, dims, 1)
    dilation = sizes("dilation", dilation, dims, 1)
    # As pairs, to which it is brought here, it might be wider.
    check_pool_padding(padding_form(padding, dims), kernel)
    return kernel, stride, flat_padding(padding, extents, kernel, stride, dilation), dilation, ceil_mode


def _window(flat: How) -> How:
    kernel, stride, padding, dilation, ceil_mode = flat
    return tuple(kernel), tuple(stride), in_pairs(padding), tuple(dilation), ceil_mode


def _pooled_shape(x: torch.Tensor, window: How) -> list[Any]:
    """Return the output's shape; the window is in tuples."""
    result = list(x.shape[:2])
    for n, k, s, (b, a), d in zip(x.shape[2:], *window[:4]):
        room = n + b + a - d * (k - 1) - 1
        count = (-(-room // s) if window[4] else room // s) + 1
        if window[4] and (count - 1) * s >= n + b:
            count -= 1
        result.append(count)
    return result


def _by_name(window: How) -> dict[str, Any]:
    kernel, stride, padding, dilation, ceil_mode = window
    return {
        "kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation, "ceil_mode": ceil_mode
    }  # fmt: skip


# --- maxima: how = (dims, window) ------------------------------------------------------------------------------


def _max(x: Any, how: How, return_indices: bool) -> Any:
    dims, window = how
    x, last = to_image(x, None if return_indices else _has_format(x))
    found = ops.max_poolNd(dims, x, **_by_name(window), return_indices=return_indices, data_format=data_format_of(last))
    return tuple(from_image(part, last) for part in found) if return_indices else from_image(found, last)


def _max_flatten(tensors: Tensors, how: How) -> How:
    return _flat_window(tensors[0].shape[2:], how[1])


def _max_gather(tensors: Tensors, flat: How) -> How:
    return tensors[0].ndim - 2, _window(flat)


def _has_format(x: torch.Tensor) -> bool:
    """Return True for channels-last images: the maxima of signals, without indices, are contiguous in PyTorch."""
    return x.ndim > 3 and lies_last(x)


def _max_empty(x: Any, how: How) -> torch.Tensor:
    return empty_image(x, _pooled_shape(x, how[1]), last=_has_format(x))


def _indexed_empty(x: Any, shape: Any) -> Tensors:
    return empty_image(x, shape), empty_image(x, shape, torch.int64)


def _set_up_input(ctx: Any, inputs: How, output: Any) -> None:
    x, ctx.how = inputs
    ctx.save_for_backward(x)


def _max_backward(ctx: Any, saved: Any, grad: Any) -> How:
    (x,) = saved
    return (_depending(x, SCATTER(grad, MAX_POOL_WITH_INDICES(x, ctx.how)[1], tuple(x.shape[2:]))),)


def _depending(x: torch.Tensor, dx: torch.Tensor) -> torch.Tensor:
    """Return the gradient as one that requires grad where PyTorch's does: a second one is then 0, and no error."""
    if not torch.is_grad_enabled() or dx.requires_grad or not x.requires_grad:
        return dx
    # `torch.func` takes what does not depend for 0.
    return dx if torch._C._are_functorch_transforms_active() else _Depending.apply(x, dx)


class _Depending(torch.autograd.Function):
    """What is given second, as if it depended on the first."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dx: torch.Tensor) -> torch.Tensor:
        # Returned as it is, it would become a view, of other strides.
        return dx.data

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> How:
        return torch.zeros_like(grad), grad


def _set_up_indices(ctx: Any, inputs: How, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], output[1])
    ctx.mark_non_differentiable(output[1])


def _indices_backward(ctx: Any, saved: Any, grad: Any, _: Any) -> How:
    x, indices = saved
    return (None if grad is None else _depending(x, SCATTER(grad, indices, tuple(x.shape[2:]))),)


def _picked(image: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return the elements of an image that indices name, and 0 for -1: a window that lies wholly in padding."""
    # (N, C, L)
    flat, where = (t.reshape(*t.shape[:2], prod(t.shape[2:])) for t in (image, indices))
    return flat.gather(2, where.clamp(min=0)).reshape(indices.shape).masked_fill(indices < 0, 0)


def _max_tangent(tensors: Tensors, how: How, results: Tensors, tangents: Tensors) -> torch.Tensor:
    return _picked(tangents[0], MAX_POOL_WITH_INDICES(tensors[0], how)[1])


def _indexed_tangent(tensors: Tensors, how: How, results: Tensors, tangents: Tensors) -> Any:
    return _picked(tangents[0], results[1]), None


# The values alone: without indices to write it is faster, and a gradient would have to find them again.
MAX_POOL: Operation = Operation(
    f"max_pool(Tensor x, {_WINDOW}) -> Tensor",
    1, lambda x, how: _max(x, how, False), _max_empty, _max_flatten, _max_gather, _set_up_input, _max_backward, _FIRST,
    _max_tangent,
)  # fmt: skip
MAX_POOL_WITH_INDICES: Operation = Operation(
    f"max_pool_with_indices(Tensor x, {_WINDOW}) -> (Tensor, Tensor)",
    1, lambda x, how: _max(x, how, True), lambda x, how: _indexed_empty(x, _pooled_shape(x, how[1])),
    _max_flatten, _max_gather, _set_up_indices, _indices_backward, _FIRST, _indexed_tangent,
)  # fmt: skip


# --- adaptive maxima: how = output_size, as a tuple ------------------------------------------------------------


def _adaptive_max(x: Any, how: How) -> Any:
    x, last = to_image(x)
    found = ops.adaptive_max_poolNd(len(how), x, how, True, data_format=data_format_of(last))
    return tuple(from_image(part, last) for part in found)


def _same_how(tensors: Tensors, how: How) -> How:
    return (list(how),)


def _one_list(tensors: Tensors, flat: How) -> How:
    return tuple(flat[0])


ADAPTIVE_MAX_POOL: Operation = Operation(
    "adaptive_max_pool(Tensor x, SymInt[] output_size) -> (Tensor, Tensor)",
    1, _adaptive_max, lambda x, how: _indexed_empty(x, [*x.shape[:2], *how]),
    _same_how, _one_list, _set_up_indices, _indices_backward, _FIRST, _indexed_tangent,
)  # fmt: skip


# --- to and from where the maxima are: how = size of the larger image ------------------------------------------


def _scatter(grad: Any, indices: Any, how: How) -> torch.Tensor:
    indices, last = to_image(indices)
    grad, _ = to_image(grad, last)
    size = (*grad.shape[:1], *how, *grad.shape[-1:]) if last else (*grad.shape[:2], *how)
    return from_image(ops.max_poolNd_backward(len(how), grad, indices, size, data_format=data_format_of(last)), last)


def _set_up_places(ctx: Any, inputs: How, output: Any) -> None:
    ctx.save_for_backward(inputs[1])


def _scatter_backward(ctx: Any, saved: Any, grad: Any) -> How:
    return _picked(grad, *saved), None


SCATTER: Operation = Operation(
    "max_pool_backward(Tensor grad_output, Tensor indices, SymInt[] input_size) -> Tensor",
    2, _scatter, lambda grad, indices, how: empty_image(indices, [*grad.shape[:2], *how], grad.dtype),
    _same_how, _one_list, _set_up_places, _scatter_backward, _BOTH,
)  # fmt: skip


def _unpool(x: Any, indices: Any, how: How) -> torch.Tensor:
    dims, kernel, stride, padding, size = how
    x, last = to_image(x)
    indices, _ = to_image(indices, last)
    y = ops.max_unpoolNd(dims, x, indices, kernel, stride, padding, size, data_format=data_format_of(last))
    return from_image(y, last)


def _unpool_flatten(tensors: Tensors, how: How) -> How:
    dims, kernel, stride, padding, size = how
    shape = tuple(map(int, tensors[0].shape))
    *_, size = unpool_output_size(
        shape, kernel, stride, padding, size, spatial_dims=dims, data_format="channels_first"
    )  # fmt: skip
    kernel, stride, padding, *_ = _flat_window(shape[2:], (kernel, stride, padding, 1, False))
    return kernel, stride, padding, size


def _unpool_gather(tensors: Tensors, flat: How) -> How:
    kernel, stride, padding, size = flat
    return tensors[0].ndim - 2, tuple(kernel), tuple(stride), in_pairs(padding), tuple(size)


def _take(grad: Any, indices: Any, how: How) -> torch.Tensor:
    indices, last = to_image(indices)
    grad, _ = to_image(grad, last)
    dx = ops.max_unpoolNd_backward(indices.ndim - 2, grad, indices, data_format=data_format_of(last))
    return from_image(dx, last)


def _set_up_taken(ctx: Any, inputs: How, output: Any) -> None:
    ctx.shape = inputs[0].shape
    ctx.save_for_backward(inputs[1])


def _take_backward(ctx: Any, saved: Any, grad: Any) -> How:
    indices = saved[0].flatten(2)
    return grad.new_zeros(ctx.shape).flatten(2).scatter_add(2, indices, grad.flatten(2)).view(ctx.shape), None


TAKE: Operation = Operation(
    "max_unpool_backward(Tensor grad_output, Tensor indices) -> Tensor",
    2, _take, lambda grad, indices, how: empty_image(indices, indices.shape, grad.dtype),
    lambda tensors, how: (), lambda tensors, flat: (), _set_up_taken, _take_backward, _BOTH,
)  # fmt: skip
MAX_UNPOOL: Operation = Operation(
    "max_unpool(Tensor x, Tensor indices, int[] kernel_size, int[] stride, int[] padding, int[] output_size) -> Tensor",
    2, _unpool, lambda x, indices, how: empty_image(x, [*x.shape[:2], *how[4]]), _unpool_flatten, _unpool_gather,
    _set_up_places, lambda ctx, saved, grad: (TAKE(grad, *saved, ()), None), _BOTH,
)  # fmt: skip


# --- averages: how = (dims, window, count_include_pad, divisor_override) ---------------------------------------
# For the gradient after the input's size and whether it is channels-last, which the gradient is then, too.


def _avg(x: Any, how: How) -> torch.Tensor:
    dims, window, counted, divisor = how
    x, last = to_image(x)
    y = ops.avg_poolNd(
        dims, x, **_by_name(window), count_include_pad=counted, divisor_override=divisor,
        data_format=data_format_of(last),
    )  # fmt: skip
    return from_image(y, last)


def _avg_flatten(tensors: Tensors, how: How) -> How:
    return (*_flat_window(tensors[0].shape[2:], how[1]), *how[2:])


def _avg_gather(tensors: Tensors, flat: How) -> How:
    return tensors[0].ndim - 2, _window(flat[:5]), *flat[5:]


def _avg_backward(ctx: Any, saved: Any, grad: Any) -> How:
    (x,) = saved
    return (_depending(x, AVG_POOL_BACKWARD(grad, (tuple(x.shape[2:]), lies_last(x), *ctx.how))),)


def _set_up_how(ctx: Any, inputs: How, output: Any) -> None:
    ctx.how = inputs[-1]


def _avg_gradient(grad: Any, how: How) -> torch.Tensor:
    size, last, dims, window, counted, divisor = how
    grad, _ = to_image(grad, last)
    shape = (grad.shape[0], *size, grad.shape[-1]) if last else (*grad.shape[:2], *size)
    dx = ops.avg_poolNd_backward(
        dims, grad, shape, **_by_name(window), count_include_pad=counted, divisor_override=divisor,
        data_format=data_format_of(last),
    )  # fmt: skip
    return from_image(dx, last)


def _avg_gradient_flatten(tensors: Tensors, how: How) -> How:
    size, last, _, window, *rest = how
    return (list(size), last, *_flat_window(size, window), *rest)


def _avg_gradient_gather(tensors: Tensors, flat: How) -> How:
    return tuple(flat[0]), flat[1], *_avg_gather(tensors, flat[2:])


def _empty_gradient(grad: Any, how: How) -> torch.Tensor:
    return empty_image(grad, [*grad.shape[:2], *how[0]], last=how[1])


_IMAGE = "SymInt[] input_size, bool channels_last"
_AVERAGE = f"{_WINDOW}, bool count_include_pad, int? divisor_override"
AVG_POOL: Operation = Operation(
    f"avg_pool(Tensor x, {_AVERAGE}) -> Tensor",
    1, _avg, lambda x, how: empty_image(x, _pooled_shape(x, how[1])), _avg_flatten, _avg_gather,
    _set_up_input, _avg_backward, _FIRST,
)  # fmt: skip
AVG_POOL_BACKWARD: Operation = Operation(
    f"avg_pool_backward(Tensor grad_output, {_IMAGE}, {_AVERAGE}) -> Tensor",
    1, _avg_gradient, _empty_gradient, _avg_gradient_flatten, _avg_gradient_gather,
    _set_up_how, lambda ctx, saved, grad: (AVG_POOL(grad, ctx.how[2:]),), _FIRST,
)  # fmt: skip


# --- adaptive averages: how = output_size; for the gradient (input_size, channels_last) ------------------------


def _adaptive_avg(x: Any, how: How) -> torch.Tensor:
    x, last = to_image(x)
    return from_image(ops.adaptive_avg_poolNd(len(how), x, how, data_format=data_format_of(last)), last)


def _adaptive_avg_gradient(grad: Any, how: How) -> torch.Tensor:
    size, last = how
    grad, _ = to_image(grad, last)
    shape = (grad.shape[0], *size, grad.shape[-1]) if last else (*grad.shape[:2], *size)
    dx = ops.adaptive_avg_poolNd_backward(len(size), grad, shape, data_format=data_format_of(last))
    return from_image(dx, last)


def _set_up_adaptive(ctx: Any, inputs: How, output: Any) -> None:
    x, how = inputs
    # One average of all is `mean` to PyTorch, whose gradient is contiguous and depends on nothing else.
    is_mean = all(n == 1 for n in how)
    ctx.image = tuple(x.shape[2:]), lies_last(x) and not is_mean
    ctx.save_for_backward(*() if is_mean else (x,))


def _adaptive_backward(ctx: Any, saved: Any, grad: Any) -> How:
    dx = ADAPTIVE_AVG_POOL_BACKWARD(grad, ctx.image)
    return (_depending(saved[0], dx) if saved else dx,)


def _set_up_size(ctx: Any, inputs: How, output: Any) -> None:
    ctx.size = tuple(inputs[0].shape[2:])


def _empty_sized(x: Any, how: How) -> torch.Tensor:
    return empty_image(x, [*x.shape[:2], *how])


ADAPTIVE_AVG_POOL: Operation = Operation(
    "adaptive_avg_pool(Tensor x, SymInt[] output_size) -> Tensor",
    1, _adaptive_avg, _empty_sized, _same_how, _one_list,
    _set_up_adaptive, _adaptive_backward, _FIRST,
)  # fmt: skip
ADAPTIVE_AVG_POOL_BACKWARD: Operation = Operation(
    f"adaptive_avg_pool_backward(Tensor grad_output, {_IMAGE}) -> Tensor",
    1, _adaptive_avg_gradient, _empty_gradient,
    lambda tensors, how: (list(how[0]), how[1]), lambda tensors, flat: (tuple(flat[0]), flat[1]),
    _set_up_size, lambda ctx, saved, grad: (ADAPTIVE_AVG_POOL(grad, ctx.size),), _FIRST,
)  # fmt: skip


# --- norms: how = (dims, window, norm_type) --------------------------------------------------------------------


def _lp_arguments(how: How) -> dict[str, Any]:
    return {**_by_name(how[1]), "norm_type": how[2]}


def _lp(x: Any, how: How) -> torch.Tensor:
    x, last = to_image(x)
    return from_image(ops.lp_poolNd(how[0], x, **_lp_arguments(how), data_format=data_format_of(last)), last)


def _lp_gradient(grad: Any, x: Any, how: How) -> torch.Tensor:
    x, last = to_image(x)
    grad, _ = to_image(grad, last)
    dx = ops.lp_poolNd_backward(how[0], grad, x, **_lp_arguments(how), data_format=data_format_of(last))
    return from_image(dx, last)


def _lp_flatten(tensors: Tensors, how: How) -> How:
    return (*_flat_window(tensors[-1].shape[2:], how[1]), float(how[2]))


def _lp_gather(tensors: Tensors, flat: How) -> How:
    return tensors[-1].ndim - 2, _window(flat[:5]), flat[5]


def _set_up_both(ctx: Any, inputs: How, output: Any) -> None:
    *tensors, ctx.how = inputs
    ctx.save_for_backward(*tensors)


def _power(t: torch.Tensor, p: float) -> torch.Tensor:
    """Return |t|**p, and 0 where t is 0: derivatives are taken as 0 there."""
    if p == 0:
        return torch.ones_like(t)
    exists = t != 0
    return torch.where(exists, torch.where(exists, t, 1).abs() ** p, 0)


class _Norm:
    """What derivatives of n = lp_pool(x) are made of.

    dn = share * gathered(slope * dx), and back, dx = slope * spread(share * grad).
    """

    def __init__(self, x: torch.Tensor, how: How) -> None:
        self.x, self.how = x, how
        self.dims, window, self.p = how
        # An average without its division.
        self.taps, self.average = prod(sizes("kernel_size", window[0], self.dims, 1)), (self.dims, window, True, None)
        self.n = LP_POOL(x, how)
        # Of the sign there is no derivative, which x itself has at 0.
        self.slope = x if self.p == 2 else x.sign() * _power(x, self.p - 1)
        self.share = _power(self.n, 1 - self.p)

    def gathered(self, t: torch.Tensor) -> torch.Tensor:
        return self.taps * AVG_POOL(t, self.average)

    def spread(self, t: torch.Tensor) -> torch.Tensor:
        return self.taps * AVG_POOL_BACKWARD(t, (tuple(self.x.shape[2:]), lies_last(self.x), *self.average))

    def curved(self, t: torch.Tensor) -> torch.Tensor:
        """Return t times the slope's derivative."""
        return (self.p - 1) * _power(self.x, self.p - 2) * t

    def bent(self, t: torch.Tensor) -> torch.Tensor:
        """Return t times the share's derivative by n."""
        return (1 - self.p) * _power(self.n, -self.p) * t


def _wide(*tensors: Any) -> tuple[Any, ...]:
    return tuple(t.float() if t is not None and t.dtype in _HALF else t for t in tensors)


def _lp_tangent(tensors: Tensors, how: How, results: Tensors, tangents: Tensors) -> torch.Tensor:
    (x,) = _wide(*tensors)
    norm = _Norm(x, how)
    return (norm.share * norm.gathered(norm.slope * tangents[0])).to(tensors[0].dtype)


def _lp_second(ctx: Any, saved: Any, h: Any) -> How:
    grad, x, h = _wide(*saved, h)
    norm = _Norm(x, ctx.how)
    pulled = norm.gathered(norm.slope * h)
    dx = norm.curved(h) * norm.spread(norm.share * grad) + LP_POOL_BACKWARD(norm.bent(grad * pulled), x, ctx.how)
    return norm.share * pulled, dx


def _lp_gradient_tangent(tensors: Tensors, how: How, results: Tensors, tangents: Tensors) -> Any:
    grad, x, tg, tx = _wide(*tensors, *tangents)
    found = None if tg is None else LP_POOL_BACKWARD(tg, x, how)
    if tx is not None:
        norm = _Norm(x, how)
        bent = norm.bent(grad * norm.share * norm.gathered(norm.slope * tx))
        found = plus(found, norm.curved(tx) * norm.spread(norm.share * grad), norm.slope * norm.spread(bent))
    return None if found is None else found.to(tensors[0].dtype)


LP_POOL: Operation = Operation(
    f"lp_pool(Tensor x, {_WINDOW}, float norm_type) -> Tensor",
    1, _lp, lambda x, how: empty_image(x, _pooled_shape(x, how[1])), _lp_flatten, _lp_gather,
    _set_up_input, lambda ctx, saved, grad: (LP_POOL_BACKWARD(grad, *saved, ctx.how),), _FIRST, _lp_tangent,
)  # fmt: skip
LP_POOL_BACKWARD: Operation = Operation(
    f"lp_pool_backward(Tensor grad_output, Tensor x, {_WINDOW}, float norm_type) -> Tensor",
    2, _lp_gradient, lambda grad, x, how: empty_image(x, x.shape), _lp_flatten, _lp_gather,
    _set_up_both, _lp_second, _BOTH, _lp_gradient_tangent,
)  # fmt: skip


# --- functions -------------------------------------------------------------------------------------------------


def _pooled(
    operation: Operation, dims: int, data_format: str, images: tuple[torch.Tensor, ...], how: How, keeps: bool = False
) -> Any:
    """Pool in the type and the memory format that PyTorch does.

    Of three dimensions, and to unpool, its autocast takes float32, and results are contiguous: save for those that
    keep the input's format, as unpooled images do.
    """
    unpools = operation is MAX_UNPOOL
    if dims == 3 or unpools:
        x, *others = images
        # Unpooling is no operator that `vmap` takes apart.
        images = (_in_autocast(x, torch.is_autocast_enabled if unpools else is_autocast), *others)
        if data_format == "channels_first" and not (keeps or (unpools and dims == 2)):
            images = tuple(map(lying_first, images))
    return on_batches(operation, dims, data_format, images, how)


def _in_autocast(x: torch.Tensor, is_on: Callable[[str], bool] = is_autocast) -> torch.Tensor:
    """Return an image in the type of pools that the CPU's autocast computes in float32, and no other does."""
    return x.float() if x.dtype in _HALF and x.is_cpu and is_on("cpu") else x


def max_poolNd(
    dims: int,
    x: torch.Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    data_format: str = "channels_first",
) -> Any:
    """Return the maximum of each window: :func:`fastconv.max_poolNd` with gradients.

    Parameters
    ----------
    x : Tensor (N, C, *spatial), or (N, *spatial, C) with data_format="channels_last"; N may be absent
        In any memory format; the result's is PyTorch's.
    kernel_size, stride, padding, dilation, ceil_mode, return_indices
        As :func:`fastconv.max_poolNd` takes them.

    Returns
    -------
    Tensor (N, C, *output), or (maxima, indices)

    Examples
    --------
    >>> import torch, fastconv.torch
    >>> fastconv.torch.max_pool1d(torch.tensor([[1.0, 3.0, 2.0, 5.0]]), 2, return_indices=True)
    (tensor([[3., 5.]]), tensor([[1, 3]]))
    """
    how = (dims, (kernel_size, stride, padding, dilation, ceil_mode))
    if return_indices:
        return on_batches(MAX_POOL_WITH_INDICES, dims, data_format, (checked_tensor(x),), how)
    if dims == 3:
        x = _in_autocast(checked_tensor(x))
    if _wants_gradient(x):
        return on_batches(MAX_POOL_WITH_INDICES, dims, data_format, (x,), how)[0]
    return on_batches(MAX_POOL, dims, data_format, (x,), how)


def _wants_gradient(x: Any) -> bool:
    """Return True if a gradient may be asked for: then the indices of the maxima are worth keeping."""
    # `torch.jit.trace` wants to find the same operators with gradients and without.
    traced = torch._C._get_tracing_state() is not None
    return torch.is_grad_enabled() and checked_tensor(x).requires_grad and not traced


def adaptive_max_poolNd(
    dims: int, x: torch.Tensor, output_size: Any, return_indices: bool = False, *, data_format: str = "channels_first"
) -> Any:
    """Return the maximum of each of `output_size` windows: :func:`fastconv.adaptive_max_poolNd` with gradients.

    Parameters
    ----------
    x : Tensor (N, C, *spatial), or (N, *spatial, C) with data_format="channels_last"; N may be absent
    output_size, return_indices
        As :func:`fastconv.adaptive_max_poolNd` takes them.

    Returns
    -------
    Tensor (N, C, *output_size), or (maxima, indices)

    Examples
    --------
    >>> import torch, fastconv.torch
    >>> fastconv.torch.adaptive_max_pool1d(torch.tensor([[1.0, 3.0, 2.0, 5.0, 4.0]]), 2)
    tensor([[3., 5.]])
    """
    how = _adaptive_size(dims, x, output_size, data_format)
    found = _pooled(ADAPTIVE_MAX_POOL, dims, data_format, (x,), how)
    return found if return_indices else found[0]


def _adaptive_size(dims: int, x: Any, output_size: Any, data_format: str) -> tuple[Any, ...]:
    extents = checked_tensor(x).shape[-dims:] if data_format == "channels_first" else x.shape[-dims - 1 : -1]
    if dims > 1 and isinstance(output_size, (tuple, list)) and len(output_size) == dims:
        output_size = [n if p is None else p for n, p in zip(extents, output_size)]
    return sizes("output_size", output_size, dims, 0, one_for_all=False)


def max_unpoolNd(
    dims: int,
    x: torch.Tensor,
    indices: torch.Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    output_size: Any = None,
    *,
    data_format: str = "channels_first",
) -> torch.Tensor:
    """Put each value where its index says, and zeros elsewhere: :func:`fastconv.max_unpoolNd` with gradients.

    Parameters
    ----------
    x : Tensor (N, C, *spatial), or (N, *spatial, C) with data_format="channels_last"; N may be absent
    indices : int64 Tensor of x's shape
    kernel_size, stride, padding, output_size
        As :func:`fastconv.max_unpoolNd` takes them.

    Returns
    -------
    Tensor (N, C, *output)

    Examples
    --------
    >>> import torch, fastconv.torch
    >>> fastconv.torch.max_unpool1d(torch.tensor([[3.0, 5.0]]), torch.tensor([[1, 3]]), 2)
    tensor([[0., 3., 0., 5.]])
    """
    if output_size is not None:
        output_size = tuple(output_size)
        if len(output_size) == dims + 2:
            output_size = output_size[2:] if data_format == "channels_first" else output_size[1:-1]
    how = (dims, kernel_size, stride, padding, output_size)
    return _pooled(MAX_UNPOOL, dims, data_format, (checked_tensor(x), checked_tensor(indices)), how)


def avg_poolNd(
    dims: int,
    x: torch.Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    dilation: Any = 1,
    data_format: str = "channels_first",
) -> torch.Tensor:
    """Return the average of each window: :func:`fastconv.avg_poolNd` with gradients.

    Parameters
    ----------
    x : Tensor (N, C, *spatial), or (N, *spatial, C) with data_format="channels_last"; N may be absent
    kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, dilation
        As :func:`fastconv.avg_poolNd` takes them.

    Returns
    -------
    Tensor (N, C, *output)

    Examples
    --------
    >>> import torch, fastconv.torch
    >>> fastconv.torch.avg_pool1d(torch.tensor([[1.0, 3.0, 2.0, 5.0]]), 2)
    tensor([[2.0000, 3.5000]])
    """
    how = (dims, (kernel_size, stride, padding, dilation, ceil_mode), count_include_pad, divisor_override)
    return _pooled(AVG_POOL, dims, data_format, (checked_tensor(x),), how)


def adaptive_avg_poolNd(
    dims: int, x: torch.Tensor, output_size: Any, *, data_format: str = "channels_first"
) -> torch.Tensor:
    """Return the average of each of `output_size` windows: :func:`fastconv.adaptive_avg_poolNd` with gradients.

    Parameters
    ----------
    x : Tensor (N, C, *spatial), or (N, *spatial, C) with data_format="channels_last"; N may be absent
    output_size
        As :func:`fastconv.adaptive_avg_poolNd` takes it.

    Returns
    -------
    Tensor (N, C, *output_size)

    Examples
    --------
    >>> import torch, fastconv.torch
    >>> fastconv.torch.adaptive_avg_pool1d(torch.tensor([[1.0, 3.0, 2.0]]), 2)
    tensor([[2.0000, 2.5000]])
    """
    how = _adaptive_size(dims, x, output_size, data_format)
    return _pooled(ADAPTIVE_AVG_POOL, dims, data_format, (x,), how, keeps=how == (1, 1, 1))


def lp_poolNd(
    dims: int,
    x: torch.Tensor,
    norm_type: float,
    kernel_size: Any,
    stride: Any = None,
    ceil_mode: bool = False,
    *,
    padding: Any = 0,
    dilation: Any = 1,
    data_format: str = "channels_first",
) -> torch.Tensor:
    """Return the p-norm of each window: :func:`fastconv.lp_poolNd` with gradients.

    Parameters
    ----------
    x : Tensor (N, C, *spatial), or (N, *spatial, C) with data_format="channels_last"; N may be absent
    norm_type, kernel_size, stride, ceil_mode, padding, dilation
        As :func:`fastconv.lp_poolNd` takes them.

    Returns
    -------
    Tensor (N, C, *output)

    Examples
    --------
    >>> import torch, fastconv.torch
    >>> fastconv.torch.lp_pool1d(torch.tensor([[3.0, 4.0, 0.0, -2.0]]), 2, 2)
    tensor([[5., 2.]])
    """
    how = (dims, (kernel_size, stride, padding, dilation, ceil_mode), norm_type)
    return _pooled(LP_POOL, dims, data_format, (checked_tensor(x),), how)


def norm_refusal(norm_type: float) -> str:
    """Return why PyTorch's `lp_pool` is none of :func:`lp_poolNd`, or nothing."""
    return f"norm_type={norm_type:g} of PyTorch is no norm: it leaves out the absolute value" if norm_type % 2 else ""


_HOME = "fastconv.torch"
max_pool1d, max_pool2d, max_pool3d = entries(max_poolNd, _HOME, described)
max_unpool1d, max_unpool2d, max_unpool3d = entries(max_unpoolNd, _HOME, described)
avg_pool1d, avg_pool2d, avg_pool3d = entries(avg_poolNd, _HOME, described)
lp_pool1d, lp_pool2d, lp_pool3d = entries(lp_poolNd, _HOME, described)
adaptive_avg_pool1d, adaptive_avg_pool2d, adaptive_avg_pool3d = entries(adaptive_avg_poolNd, _HOME, described)
adaptive_max_pool1d, adaptive_max_pool2d, adaptive_max_pool3d = entries(adaptive_max_poolNd, _HOME, described)
