"""unfold and fold for PyTorch: each is the other's gradient."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ArgumentTypeError
from ..geometry import sizes
from ..ops import patches as ops
from ._operators import How, Operation, Tensors, checked_tensor, described, flat_padding, in_pairs, to_array, to_tensor

# how = (kernel_size, dilation, padding, stride), for fold after the output's size
_WINDOWS = "int[] kernel_size, int[] dilation, int[] padding, int[] stride"


def _flat(extents: Any, how: How) -> How:
    kernel, dilation, padding, stride = how
    dims = len(kernel) if isinstance(kernel, (tuple, list)) else 2
    kernel = sizes("kernel_size", kernel, dims, 1)
    dilation, stride = (sizes(name, v, dims, 1) for name, v in (("dilation", dilation), ("stride", stride)))
    return kernel, dilation, flat_padding(padding, extents, kernel, stride, dilation), stride


def _gather(flat: How) -> How:
    kernel, dilation, padding, stride = flat
    return tuple(kernel), tuple(dilation), in_pairs(padding), tuple(stride)


def _columns(extents: Any, how: How) -> tuple[Any, Any]:
    """Return prod(kernel_size) and the number of windows."""
    taps, count = 1, 1
    for n, k, d, (b, a), s in zip(extents, *how):
        taps, count = taps * k, count * ((n + b + a - d * (k - 1) - 1) // s + 1)
    return taps, count


def _unfold(x: Any, how: How) -> torch.Tensor:
    return to_tensor(ops.unfold(to_array(x), *how))


def _unfolded(x: Any, how: How) -> torch.Tensor:
    taps, count = _columns(x.shape[2:], how)
    return x.new_empty(x.shape[0], x.shape[1] * taps, count)


def _set_up_unfold(ctx: Any, inputs: How, output: Any) -> None:
    ctx.how = (tuple(inputs[0].shape[2:]), *inputs[1])


def _fold(cols: Any, how: How) -> torch.Tensor:
    return to_tensor(ops.fold(to_array(cols), *how))


def _folded(cols: Any, how: How) -> torch.Tensor:
    taps, _ = _columns(how[0], how[1:])
    return cols.new_empty(cols.shape[0], cols.shape[1] // taps, *how[0])


def _set_up_fold(ctx: Any, inputs: How, output: Any) -> None:
    ctx.how = inputs[1][1:]


UNFOLD: Operation = Operation(
    f"unfold(Tensor x, {_WINDOWS}) -> Tensor",
    1, _unfold, _unfolded, lambda tensors, how: _flat(tensors[0].shape[2:], how), lambda tensors, flat: _gather(flat),
    _set_up_unfold, lambda ctx, saved, grad: (FOLD(grad, ctx.how),), lambda how: (0,),
)  # fmt: skip


def _fold_flat(tensors: Tensors, how: How) -> How:
    kernel, *_ = flat = _flat(how[0] if isinstance(how[0], (tuple, list)) else (how[0],) * 3, how[1:])
    return (sizes("output_size", how[0], len(kernel), 1, one_for_all=False), *flat)


FOLD: Operation = Operation(
    f"fold(Tensor cols, SymInt[] output_size, {_WINDOWS}) -> Tensor",
    1, _fold, _folded, _fold_flat, lambda tensors, flat: (tuple(flat[0]), *_gather(flat[1:])),
    _set_up_fold, lambda ctx, saved, grad: (UNFOLD(grad, ctx.how),), lambda how: (0,),
)  # fmt: skip


def unfold(x: torch.Tensor, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1) -> torch.Tensor:
    """Lay out every window of x as a column: :func:`fastconv.unfold` with gradients of every order.

    Parameters
    ----------
    x : Tensor (N, C, *spatial); N may be absent
    kernel_size, dilation, padding, stride
        As :func:`fastconv.unfold` takes them.

    Returns
    -------
    Tensor (N, C*prod(kernel_size), L)

    Examples
    --------
    >>> import torch, fastconv.torch
    >>> fastconv.torch.unfold(torch.ones(1, 1, 3, 3), 2).shape
    torch.Size([1, 4, 4])
    """
    how = (kernel_size, dilation, padding, stride)
    dims = len(kernel_size) if isinstance(kernel_size, (tuple, list)) else 2
    try:
        alone = checked_tensor(x).ndim == dims + 1
    except ArgumentTypeError:
        return described(unfold, (x, *how), {})
    return UNFOLD(x.unsqueeze(0), how).squeeze(0) if alone else UNFOLD(x, how)


def fold(
    cols: torch.Tensor, output_size: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
) -> torch.Tensor:
    """Add every column back to the window it came from: :func:`fastconv.fold` with gradients of every order.

    Parameters
    ----------
    cols : Tensor (N, C*prod(kernel_size), L); N may be absent
    output_size, kernel_size, dilation, padding, stride
        As :func:`fastconv.fold` takes them.

    Returns
    -------
    Tensor (N, C, *output_size)

    Examples
    --------
    >>> import torch, fastconv.torch
    >>> fastconv.torch.fold(torch.ones(1, 4, 4), (3, 3), 2).sum()
    tensor(16.)
    """
    how = (output_size, kernel_size, dilation, padding, stride)
    try:
        alone = checked_tensor(cols).ndim == 2
    except ArgumentTypeError:
        return described(fold, (cols, *how), {})
    return FOLD(cols.unsqueeze(0), how).squeeze(0) if alone else FOLD(cols, how)
