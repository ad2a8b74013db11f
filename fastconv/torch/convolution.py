"""Convolutions for PyTorch, transposed ones too, with gradients of every order.

A convolution is linear in the input and in the weight, and so are its two gradients::

    <conv(x, w), g> == <x, input_grad(g, w)> == <w, weight_grad(g, x)>

The gradient of each of the three is made of the other two. The transposed convolution has `input_grad` for its forward
pass, and obeys the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch

from ..activations import LEAKY_SLOPE
from ..geometry import ConvGeometry, sizes
from ..ops import convolution as ops
from ..ops import transposed
from ..ops._entries import entries
from ..ops.convolution import NEEDS
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
    on_batches,
    plus,
    to_array,
    to_image,
    to_tensor,
)

# The gradient of each activation from its result.
_ACTIVATION_GRADS: dict[str, Callable[..., torch.Tensor]] = {
    "relu": lambda grad, y: torch.ops.aten.threshold_backward(grad, y, 0),
    "leaky_relu": lambda grad, y: torch.ops.aten.leaky_relu_backward(grad, y, LEAKY_SLOPE, True),
    "sigmoid": lambda grad, y: torch.ops.aten.sigmoid_backward(grad, y),
    "tanh": lambda grad, y: torch.ops.aten.tanh_backward(grad, y),
}
_NEEDS = {flags: tuple(n for n, f in zip(NEEDS, flags) if f) for flags in product((False, True), repeat=3)}
INTEGERS = (torch.int8, torch.uint8)


def computes_last(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return True where PyTorch's result is channels-last: where the weight is, or a batch of images."""
    return (3 < x.ndim == weight.ndim and lies_last(x)) or lies_last(weight)


class _Kind:
    """What differs between the plain and the transposed convolution.

    `arguments` are all that say what is convolved how, in the order of the operations' parameters; the last one is
    given by name.
    """

    name: str
    schema: str
    last_name: str

    def call(self, form: str, dims: int, arrays: Sequence[Any], arguments: How, **strategy: Any) -> Any:
        core = _CORES[self.name + form]
        return core(dims, *arrays, *arguments[:-1], **{self.last_name: arguments[-1]}, **strategy)

    def flatten(self, x: Any, weight: Any, arguments: How) -> How:
        raise NotImplementedError

    def gather(self, flat: How) -> How:
        raise NotImplementedError

    def output_shape(self, x: Any, weight: Any, arguments: How) -> list[Any]:
        raise NotImplementedError


class _Plain(_Kind):
    name, last_name = "conv", "padding_mode"
    schema = "int[] stride, int[] padding, int[] dilation, int groups, str padding_mode"

    def flatten(self, x: Any, weight: Any, arguments: How) -> How:
        stride, padding, dilation, groups, mode = arguments
        dims = weight.ndim - 2
        stride, dilation = sizes("stride", stride, dims, 1), sizes("dilation", dilation, dims, 1)
        padding = flat_padding(padding, x.shape[2:], weight.shape[2:], stride, dilation)
        return stride, padding, dilation, groups, mode

    def gather(self, flat: How) -> How:
        stride, padding, dilation, groups, mode = flat
        return tuple(stride), in_pairs(padding), tuple(dilation), groups, mode

    def output_shape(self, x: Any, weight: Any, arguments: How) -> list[Any]:
        stride, pairs, dilation, _, _ = arguments
        extents = zip(x.shape[2:], weight.shape[2:], stride, pairs, dilation)
        return [
            x.shape[0],
            # Of no channels PyTorch makes none.
            weight.shape[0] if weight.shape[1] else 0,
            *((n + b + a - d * (k - 1) - 1) // s + 1 for n, k, s, (b, a), d in extents),
        ]


class _Transposed(_Kind):
    name, last_name = "conv_transpose", "output_size"
    schema = "int[] stride, int[] padding, int[] output_padding, int groups, int[] dilation"

    def flatten(self, x: Any, weight: Any, arguments: How) -> How:
        stride, padding, extra, groups, dilation, output_size = arguments
        dims = weight.ndim - 2
        stride, dilation = sizes("stride", stride, dims, 1), sizes("dilation", dilation, dims, 1)
        extra = sizes("output_padding", extra, dims, 0)
        if output_size is None and not isinstance(padding, str):
            padding = flat_padding(padding, x.shape[2:], weight.shape[2:], stride, dilation)
        else:
            g = ConvGeometry.transposed(
                tuple(x.shape), tuple(weight.shape), stride, padding, extra, groups, dilation, output_size=output_size
            )
            padding = [side for pair in g.padding for side in pair]
            smallest = self.output_shape(x, weight, (stride, g.padding, (0,) * dims, groups, dilation, None))[2:]
            extra = tuple(n - m for n, m in zip(g.input_size, smallest))
        return stride, padding, extra, groups, dilation

    def gather(self, flat: How) -> How:
        stride, padding, extra, groups, dilation = flat
        return tuple(stride), in_pairs(padding), tuple(extra), groups, tuple(dilation), None

    def output_shape(self, x: Any, weight: Any, arguments: How) -> list[Any]:
        stride, pairs, extra, groups, dilation, _ = arguments
        extents = zip(x.shape[2:], weight.shape[2:], stride, pairs, extra, dilation)
        spatial = ((n - 1) * s + d * (k - 1) + 1 - b - a + e for n, k, s, (b, a), e, d in extents)
        return [x.shape[0], weight.shape[1] * groups, *spatial]


_CORES: dict[str, Callable[..., Any]] = {
    "conv": ops.convNd,
    "conv_backward": ops.convNd_backward,
    "conv_transpose": transposed.conv_transposeNd,
    "conv_transpose_backward": transposed.conv_transposeNd_backward,
}


def _operations(kind: _Kind) -> tuple[Operation, Operation]:
    """Return the forward operation and its gradient, of either kind."""
    many, name = len(kind.schema.split(",")), kind.name
    strategy = "str algorithm, str? precision"

    # how = (dims, arguments, activation, algorithm, precision)

    def compute(x: Any, weight: Any, bias: Any, how: How) -> torch.Tensor:
        dims, arguments, activation, algorithm, precision = how
        x, last = to_image(x, computes_last(x, weight))
        y = kind.call(
            "", dims, (x, to_array(weight), to_array(bias)), arguments, data_format=data_format_of(last),
            activation=activation, algorithm=algorithm, precision=precision,
        )  # fmt: skip
        return from_image(y, last)

    def shapes(x: Any, weight: Any, bias: Any, how: How) -> torch.Tensor:
        dtype = torch.int32 if x.dtype in INTEGERS else x.dtype
        return empty_image(x, kind.output_shape(x, weight, how[1]), dtype, computes_last(x, weight))

    def flatten(tensors: Tensors, how: How) -> How:
        return (*kind.flatten(tensors[0], tensors[1], how[1]), *how[2:])

    def gather(tensors: Tensors, flat: How) -> How:
        return tensors[0].ndim - 2, kind.gather(flat[:many]), *flat[many:]

    def setup(ctx: Any, inputs: How, output: Any) -> None:
        x, weight, _, how = inputs
        ctx.how = how
        ctx.save_for_backward(x, weight, *(() if how[2] is None else (output,)))

    def backward(ctx: Any, saved: Any, grad: Any) -> How:
        x, weight, *y = saved
        dims, arguments, activation, algorithm, precision = ctx.how
        if activation is not None:
            grad = _ACTIVATION_GRADS[activation](grad, *y)
        needs = tuple(ctx.needs_input_grad[:3])
        found = gradient(grad, x, weight, (needs, dims, arguments, algorithm, precision))
        return tuple(g if need else None for g, need in zip(found, needs))

    def tangent(tensors: How, how: How, results: Tensors, tangents: How) -> Any:
        x, weight, _ = tensors
        tx, tw, tb = tangents
        dims, arguments, activation, *strategy = how
        plain = (dims, arguments, None, *strategy)
        found = plus(
            None if tx is None else forward(tx, weight, None, plain),
            None if tw is None else forward(x, tw, None, plain),
            None if tb is None else tb.reshape(-1, *(1,) * dims).expand_as(results[0]),
        )
        return found if activation is None or found is None else _ACTIVATION_GRADS[activation](found, *results)

    # how = (needs, dims, arguments, algorithm, precision)

    def compute_gradient(grad: Any, x: Any, weight: Any, how: How) -> Tensors:
        needs, dims, arguments, algorithm, precision = how
        x_, last = to_image(x, computes_last(x, weight))
        grad, _ = to_image(grad, last)
        found = kind.call(
            "_backward", dims, (grad, x_, to_array(weight)), arguments, needs=_NEEDS[needs],
            data_format=data_format_of(last), algorithm=algorithm, precision=precision,
        )  # fmt: skip
        dx, dw, db = needs
        return (
            from_image(found.input, last) if dx else x.new_empty(0),
            to_tensor(found.weight) if dw else x.new_empty(0),
            to_tensor(found.bias) if db else x.new_empty(0),
        )

    def shapes_gradient(grad: Any, x: Any, weight: Any, how: How) -> Tensors:
        dx, dw, db = how[0]
        return (
            empty_image(x, x.shape, last=computes_last(x, weight)) if dx else x.new_empty(0),
            x.new_empty(weight.shape) if dw else x.new_empty(0),
            x.new_empty(grad.shape[1] or weight.shape[0]) if db else x.new_empty(0),
        )

    def flatten_gradient(tensors: Tensors, how: How) -> How:
        return (list(how[0]), *kind.flatten(tensors[1], tensors[2], how[2]), *how[3:])

    def gather_gradient(tensors: Tensors, flat: How) -> How:
        needs, *flat = flat  # type: ignore[assignment]
        return tuple(needs), tensors[0].ndim - 2, kind.gather(tuple(flat[:many])), *flat[many:]

    def setup_gradient(ctx: Any, inputs: How, output: Any) -> None:
        *tensors, ctx.how = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    def backward_gradient(ctx: Any, saved: Any, hx: Any, hw: Any, hb: Any) -> How:
        grad, x, weight = saved
        needs, dims, arguments, *how = ctx.how
        hx, hw, hb = (h if need else None for h, need in zip((hx, hw, hb), needs))
        to_grad, to_x, to_weight = ctx.needs_input_grad[:3]
        dgrad = dx = dw = None
        if to_grad:
            dgrad = tangent((x, weight, None), (dims, arguments, None, *how), (grad,), (hx, hw, hb))
        if to_x and hw is not None:
            dx = gradient(grad, x, hw, ((True, False, False), dims, arguments, *how))[0]
        if to_weight and hx is not None:
            dw = gradient(grad, hx, weight, ((False, True, False), dims, arguments, *how))[1]
        return dgrad, dx, dw

    def tangents_of_gradient(tensors: Tensors, how: How, results: Tensors, tangents: How) -> How:
        grad, x, weight = tensors
        tg, tx, tw = tangents
        (dx, dw, db), *rest = how

        def part(*given: Any, needs: Sequence[bool]) -> Any:
            # Of no tangent there is none.
            wanted = any(needs) and all(t is not None for t in given)
            return gradient(*given, (tuple(needs), *rest)) if wanted else (None, None, None)

        both = part(tg, x, weight, needs=how[0])
        by_weight, by_x = part(grad, x, tw, needs=(dx, False, False)), part(grad, tx, weight, needs=(False, dw, False))
        return (
            plus(both[0], by_weight[0]) if dx else None,
            plus(both[1], by_x[1]) if dw else None,
            both[2] if db else None,
        )

    forward = Operation(
        f"{name}(Tensor x, Tensor weight, Tensor? bias, {kind.schema}, str? activation, {strategy}) -> Tensor",
        3, compute, shapes, flatten, gather, setup, backward, lambda how: (0,), tangent,
    )  # fmt: skip
    gradient = Operation(
        f"{name}_backward(Tensor grad_output, Tensor x, Tensor weight, bool[] needs, {kind.schema}, {strategy})"
        " -> (Tensor, Tensor, Tensor)",
        3, compute_gradient, shapes_gradient, flatten_gradient, gather_gradient, setup_gradient, backward_gradient,
        lambda how: () if how[0][1] or how[0][2] else (0, 1), tangents_of_gradient,
    )  # fmt: skip
    return forward, gradient


CONV, CONV_BACKWARD = _operations(_Plain())
CONV_TRANSPOSE, CONV_TRANSPOSE_BACKWARD = _operations(_Transposed())


# --- functions -------------------------------------------------------------------------------------------------


def convNd(
    dims: int,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
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
) -> torch.Tensor:
    """Convolve `x` with `weight`: :func:`fastconv.convNd` with gradients, of gradients too.

    Parameters
    ----------
    x : Tensor (N, C, *spatial), or (N, *spatial, C) with data_format="channels_last"; N may be absent
        In any memory format; the result's is PyTorch's.
    weight, bias, stride, padding, dilation, groups, padding_mode, activation, algorithm, precision
        As :func:`fastconv.convNd` takes them. The gradients are computed in the same precision.

    Returns
    -------
    Tensor (N, K, *output) or (N, *output, K)

    Raises
    ------
    As :func:`fastconv.convNd`.

    Examples
    --------
    >>> import torch, fastconv.torch
    >>> x, w = torch.ones(1, 1, 4, requires_grad=True), torch.ones(1, 1, 3)
    >>> fastconv.torch.conv1d(x, w).sum().backward()
    >>> x.grad
    tensor([[[1., 2., 2., 1.]]])
    """
    how = (dims, (stride, padding, dilation, groups, padding_mode), activation, algorithm, precision)
    x, weight, bias = in_autocast(x, weight, bias)
    return on_batches(CONV, dims, data_format, (x,), weight, bias, how)


def conv_transposeNd(
    dims: int,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
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
) -> torch.Tensor:
    """Apply the transposed convolution: :func:`fastconv.conv_transposeNd` with gradients, of gradients too.

    Parameters
    ----------
    x : Tensor (N, C, *spatial), or (N, *spatial, C) with data_format="channels_last"; N may be absent
    weight, bias, stride, padding, output_padding, groups, dilation, output_size, activation, algorithm, precision
        As :func:`fastconv.conv_transposeNd` takes them.

    Returns
    -------
    Tensor (N, K, *output) or (N, *output, K)

    Examples
    --------
    >>> import torch, fastconv.torch
    >>> fastconv.torch.conv_transpose1d(torch.ones(1, 1, 3), torch.ones(1, 1, 2), stride=2)
    tensor([[[1., 1., 1., 1., 1., 1.]]])
    """
    arguments = (stride, padding, output_padding, groups, dilation, output_size)
    how = (dims, arguments, activation, algorithm, precision)
    x, weight, bias = in_autocast(x, weight, bias)
    return on_batches(CONV_TRANSPOSE, dims, data_format, (x,), weight, bias, how)


def in_autocast(x: Any, weight: Any, bias: Any) -> How:
    """Return the tensors in autocast's type where that is on, as PyTorch does for its own convolutions."""
    device = "cpu" if checked_tensor(x).is_cpu else x.device.type
    known = device == "cpu" or torch.amp.is_autocast_available(device)
    if not known or not is_autocast(device):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(t: Any) -> Any:
        return t if t is None or not t.is_floating_point() or t.dtype is torch.float64 else t.to(dtype)

    return tuple(map(cast, (x, weight, bias)))


conv1d, conv2d, conv3d = entries(convNd, "fastconv.torch", described)
conv_transpose1d, conv_transpose2d, conv_transpose3d = entries(conv_transposeNd, "fastconv.torch", described)
