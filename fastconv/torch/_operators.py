"""Operations as PyTorch sees them.

Each operation is an operator of PyTorch's dispatcher (`torch.ops.fastconv.conv`, ...), so that `torch.compile`,
`torch.export`, fake tensors and dispatch modes know it. The dispatcher costs more than a small convolution. So a call
that nothing watches takes a short way: to the kernels, or through one `autograd.Function` if a gradient is wanted.

An operation takes tensors and then one tuple, `how`, with the rest of its arguments as the caller gave them. The
operator takes lists of ints in its place: `flatten` makes them from `how` and the shapes, `gather` a `how` from them.

Tensors are batched and channels-first; memory that lies channels-last is taken as it lies, and so is the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.overrides import handle_torch_function, has_torch_function

from ..arrays import TorchArrays
from ..errors import ArgumentTypeError, ShapeError, UnsupportedError
from ..geometry import DATA_FORMATS, one_of, padding_form, padding_word

_LIBRARY = torch.library.Library("fastconv", "DEF")
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, type(None)})
# Axes of (N, C, ...) as (N, ..., C), and back, by the number of dimensions.
_TO_LAST = {n: (0, *range(2, n), 1) for n in (3, 4, 5)}
_TO_FIRST = {n: (0, n - 1, *range(1, n - 1)) for n in (3, 4, 5)}
# Axes whose strides grow in channels-last memory, save for the batch.
_GROWING = {n: (1, *reversed(range(2, n))) for n in (3, 4, 5)}

How = tuple[Any, ...]
Tensors = tuple[torch.Tensor, ...]


class Operation:
    """An operation of tensors and a `how`.

    Parameters
    ----------
    schema : str
        Of the operator, such as "conv(Tensor x, int[] stride) -> Tensor".
    tensors : int
        How many of the arguments are tensors (or None).
    compute : function of (*tensors, how)
        Runs it, on tensors that need no gradient.
    shapes : function of (*tensors, how)
        Returns what `compute` would, with arbitrary contents: for tensors without memory.
    flatten : function of (tensors, how); gather : function of (tensors, arguments)
    setup : function of (ctx, inputs, output), optional
    backward : function of (ctx, saved tensors, *gradients), optional
        Returns a gradient or None for each of the tensors. Without it there is none.
    folds : function of how
        The positions of the tensors that have the batch, if images do not depend on each other, or else nothing.
    jvp : function of (tensors, how, results as a tuple, tangents), optional
        Returns the result's tangent, or a tuple; a tangent may be None, which is zero. Without it, the operation is
        linear in its first tensor, and others have no tangents.
    """

    def __init__(
        self,
        schema: str,
        tensors: int,
        compute: Callable[..., Any],
        shapes: Callable[..., Any],
        flatten: Callable[[Tensors, How], How],
        gather: Callable[[Tensors, How], How],
        setup: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        folds: Callable[[How], Sequence[int]] = lambda how: (),
        jvp: Callable[..., Any] | None = None,
    ) -> None:
        self.name, self.tensors = schema.partition("(")[0], tensors
        self.compute, self.flatten, self.gather, self.folds = compute, flatten, gather, folds
        self.setup, self.backward = setup or _set_up_nothing, backward or self._refuse
        self.jvp = jvp or self._linear
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        self.operator = getattr(torch.ops.fastconv, self.name).default
        self._register(shapes)
        # Past the checks of `Function.apply` for `torch.func`, which does not come this way.
        self._eager = super(torch.autograd.Function, _eager_function(self)).apply  # type: ignore[misc]
        self._transformed = _transformed_function(self)

    def __call__(self, *inputs: Any) -> Any:
        """Compute, as whatever is active wants it to be seen."""
        tensors = inputs[:-1]
        if torch.compiler.is_compiling():
            if in_forward_mode():
                raise UnsupportedError("operators have no forward-mode derivatives, which torch.compile would need")
            return self.operator(*tensors, *self.flatten(tensors, inputs[-1]))
        if torch._C._are_functorch_transforms_active():
            return self._transformed.apply(*inputs)
        forward = in_forward_mode()
        if not _PLAIN.issuperset(map(type, tensors)) or is_watched() or _are_batched(tensors, forward):
            if forward and torch._C._is_fwd_grad_enabled() and any(map(_is_dual, tensors)):
                raise UnsupportedError("operators have no forward-mode derivatives, which dispatch modes would need")
            return self.operator(*_checked(tensors), *self.flatten(tensors, inputs[-1]))
        if (torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)) or forward:
            return self._eager(*inputs)
        return self.compute(*inputs)

    def vmap(self, info: Any, in_dims: Sequence[int | None], *inputs: Any) -> tuple[Any, Any]:
        """Compute for each element along a further dimension: as one batch if that is the same, or else in turn."""
        dims, how = in_dims[: self.tensors], inputs[-1]
        front = [t if d is None else t.movedim(d, 0) for t, d in zip(inputs, dims)]
        size, folds = info.batch_size, self.folds(how)
        if all(d is None or i in folds for i, d in enumerate(dims)):

            def fold(i: int, t: Any) -> Any:
                if t is None or i not in folds:
                    return t
                return (t if dims[i] is not None else t.expand(size, *t.shape)).flatten(0, 1)

            found = self(*(fold(i, t) for i, t in enumerate(front)), how)
            batch = front[0].shape[0 if dims[0] is None else 1]
            split = _each(found, lambda t: t.unflatten(0, (size, t.shape[0] // size if size else batch)))
        else:
            rows = [self(*(t if d is None else t[i] for t, d in zip(front, dims)), how) for i in range(size)]
            split = tuple(map(torch.stack, zip(*rows))) if isinstance(rows[0], tuple) else torch.stack(rows)
        return split, _each(split, lambda t: 0)

    def _register(self, shapes: Callable[..., Any]) -> None:
        name, n = f"fastconv::{self.name}", self.tensors

        def inputs_of(flat: How) -> How:
            return (*flat[:n], self.gather(flat[:n], flat[n:]))

        def backward(ctx: Any, *grads: Any) -> Any:
            return (*self.backward(ctx, ctx.saved_tensors, *grads)[:n], *(None,) * ctx.others)

        def setup(ctx: Any, inputs: How, output: Any) -> None:
            ctx.others = len(inputs) - n
            self.setup(ctx, inputs_of(inputs), output)

        def vmap(info: Any, in_dims: Sequence[Any], *flat: Any) -> Any:
            return self.vmap(info, in_dims, *inputs_of(flat))

        def kernel(*flat: Any) -> Any:
            return self.compute(*inputs_of(flat))

        def fake(*flat: Any) -> Any:
            return shapes(*inputs_of(flat))

        _LIBRARY.impl(self.name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(name, fake, lib=_LIBRARY)
        torch.library.register_autograd(name, backward, setup_context=setup, lib=_LIBRARY)
        torch.library.register_vmap(name, vmap, lib=_LIBRARY)

    def _linear(self, tensors: Tensors, how: How, results: Tensors, tangents: Any) -> Any:
        return None if tangents[0] is None else self(tangents[0], *tensors[1:], how)

    def _refuse(self, ctx: Any, saved: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"fastconv.torch has no gradient of {self.name}")


def is_watched() -> bool:
    """Return True if a dispatch mode or `torch.jit.trace` wants to see each operator."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None


def in_forward_mode() -> bool:
    """Return True inside `torch.func.jvp` and `torch.autograd.forward_ad.dual_level`."""
    return torch.autograd.forward_ad._current_level >= 0


def is_autocast(device: str) -> bool:
    """Return True where PyTorch's autocast changes types: not under `vmap`, which takes operators apart before it."""
    if not torch.is_autocast_enabled(device):
        return False
    if not torch._C._are_functorch_transforms_active():
        return True
    return torch._C._functorch.peek_interpreter_stack().key() != torch._C._functorch.TransformType.Vmap


def plus(*terms: Any) -> Any:
    """Return the sum of the terms that are not None; without any, None."""
    found = [t for t in terms if t is not None]
    return sum(found[1:], found[0]) if found else None


def _is_dual(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None


def _are_batched(tensors: Sequence[Any], forward: bool) -> bool:
    """Return True for many gradients at once, `torch.autograd.grad(..., is_grads_batched=True)`, or many tangents."""
    if not forward and torch._C._current_graph_task_id() == -1:
        return False
    return any(t is not None and torch._C._functorch.is_legacy_batchedtensor(t) for t in tensors)


def _set_up_nothing(ctx: Any, inputs: How, output: Any) -> None:
    pass


def _eager_function(operation: Operation) -> Any:
    """Return the `autograd.Function` of the short way."""

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = operation.compute(*inputs)
        operation.setup(ctx, inputs, output)
        if in_forward_mode():
            _set_up_tangents(ctx, inputs, output)
        return output

    def backward(ctx: Any, *grads: Any) -> Any:
        # Unpacking may compute them again (`torch.utils.checkpoint`), as the caller's function modes want it.
        saved = ctx.saved_tensors
        # A function mode, `enabled` or another, has no business in here, and costs much.
        with torch._C.DisableTorchFunction():
            return (*operation.backward(ctx, saved, *grads), None)

    return _function(operation, forward, backward)


def _transformed_function(operation: Operation) -> Any:
    """Return the `autograd.Function` for `torch.func`: it finds no gradients of operators registered from Python."""

    def setup(ctx: Any, inputs: How, output: Any) -> None:
        operation.setup(ctx, inputs, output)
        if in_forward_mode():
            _set_up_tangents(ctx, inputs, output)

    def backward(ctx: Any, *grads: Any) -> Any:
        return (*operation.backward(ctx, ctx.saved_tensors, *grads), None)

    return _function(operation, operation.__call__, backward, setup_context=setup, vmap=operation.vmap)


def _function(operation: Operation, forward: Any, backward: Any, **more: Any) -> Any:
    def jvp(ctx: Any, *tangents: Any) -> Any:
        n = operation.tensors
        tensors, results = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        found = operation.jvp(tensors, ctx.forward_how, results, tangents[:n])
        if len(results) == 1:
            return torch.zeros_like(results[0]) if found is None else found
        # Of whole numbers there is no tangent, not even zero.
        return tuple(torch.zeros_like(r) if t is None and r.is_floating_point() else t for r, t in zip(results, found))

    methods = {"forward": forward, "backward": backward, "jvp": jvp, **more}
    name = f"Fastconv_{operation.name}"
    return type(name, (torch.autograd.Function,), {n: staticmethod(method) for n, method in methods.items()})


def _set_up_tangents(ctx: Any, inputs: How, output: Any) -> None:
    *tensors, ctx.forward_how = inputs
    ctx.save_for_forward(*tensors, *(output if isinstance(output, tuple) else (output,)))


def _checked(tensors: Sequence[Any]) -> Sequence[Any]:
    for tensor in tensors:
        if tensor is not None and not isinstance(tensor, torch.Tensor):
            raise ArgumentTypeError(f"every array must be a PyTorch tensor, not {type(tensor).__name__}")
    return tensors


def _each(found: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    return tuple(map(function, found)) if isinstance(found, tuple) else function(found)


def checked_tensor(x: Any) -> torch.Tensor:
    """Return `x`, or raise if it is no tensor."""
    if isinstance(x, torch.Tensor):
        return x
    raise ArgumentTypeError(f"x must be a PyTorch tensor, not {type(x).__name__}")


def described(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Leave a call to what stands for a tensor, as `torch.fx` does; without such, raise the error at hand again."""
    given = (*args, *kwargs.values())
    if not has_torch_function(given):
        raise
    return handle_torch_function(function, given, *args, **kwargs)


def unscriptable(name: str) -> str:
    """Return what to say to `torch.jit.script`."""
    return f"TorchScript cannot compile {name} of fastconv.torch: use torch.jit.trace, torch.compile or torch.export"


def on_batches(operation: Operation, dims: int, data_format: str, images: tuple[torch.Tensor, ...], *rest: Any) -> Any:
    """Compute from batches or single images of either data format, by views that are batches.

    PyTorch gives contiguous results of single images, however they lie; so they are copied first, where they are not.
    """
    x = images[0]
    if data_format == "channels_first" and x.ndim == dims + 2:
        return operation(*images, *rest)
    last = one_of("data_format", data_format, DATA_FORMATS) == "channels_last"
    if x.ndim not in (dims + 1, dims + 2):
        raise ShapeError(
            f"x must have {dims + 2} dimensions, or {dims + 1} without a batch, not shape {tuple(x.shape)}"
        )
    alone = x.ndim == dims + 1
    if alone:
        images = tuple((t if last else lying_first(t)).unsqueeze(0) for t in images)
    first = [t.permute(_TO_FIRST[t.ndim]) if last else t for t in images]

    def as_given(t: torch.Tensor) -> torch.Tensor:
        t = t.permute(_TO_LAST[t.ndim]) if last else t
        return t.squeeze(0) if alone else t

    return _each(operation(*first, *rest), as_given)


# --- tensors and arrays ----------------------------------------------------------------------------------------


def to_array(tensor: torch.Tensor | None) -> Any:
    """Return a C-contiguous array over a tensor's memory, copied only if that is not so; None stays None."""
    if tensor is None:
        return None
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    return _array(tensor)


def to_image(tensor: torch.Tensor, last: bool | None = None) -> tuple[Any, bool]:
    """Return an array over a batch of images, and whether it is channels-last; `last` says how it has to be."""
    if last is None:
        last = lies_last(tensor)
    return (_array(_contiguous(tensor.permute(_TO_LAST[tensor.ndim]))) if last else to_array(tensor)), last


def from_image(result: Any, last: bool) -> torch.Tensor:
    """Return the channels-first tensor over what an operation computed."""
    # The array is turned, not the tensor: a view may not be written to where it comes from an `autograd.Function`.
    if last:
        axes = _TO_FIRST[result.ndim]
        result = result.transpose(axes) if type(result) is np.ndarray else result.permute(axes)
    return to_tensor(result)


def to_tensor(result: Any) -> torch.Tensor:
    """Return a tensor over an array, which is no view of another."""
    if type(result) is not np.ndarray:
        return result
    # `from_numpy` gives an empty tensor strides of 0, which PyTorch's operations do not.
    # The kind of bfloat16 is V; its name takes microseconds to ask for.
    if result.dtype.kind != "V":
        found = torch.from_numpy(result)
        return found if result.size else found.new_empty(result.shape)
    if not result.size:
        return torch.empty(result.shape, dtype=torch.bfloat16, device="cpu")
    words = torch.from_numpy(result.view(np.int16))
    empty = torch.empty(0, dtype=torch.bfloat16, device="cpu")
    return empty.set_(words.untyped_storage(), words.storage_offset(), words.shape, words.stride())


def lies_last(tensor: torch.Tensor) -> bool:
    """Return True for a channels-first tensor that PyTorch takes for channels-last: by its strides alone."""
    strides = tensor.stride()
    # Mostly not, and asked for in every call. And channels that are one, expanded, lie nowhere.
    if strides[1] > strides[-1] or strides[1] == 0:
        return False
    shape = tensor.shape
    # c10/core/MemoryFormat.h: strides grow from channels to batch. Where all these have one element they tell nothing.
    least = 0
    for axis in _GROWING[len(shape)]:
        if shape[axis] == 0 or strides[axis] < least:
            return False
        least = strides[axis] * shape[axis]
    return bool(shape[0] != 0 and strides[0] >= least and least != strides[1])


def lying_first(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous tensor that PyTorch does not take for channels-last."""
    # The view gives a single channel the strides of many.
    return tensor.contiguous().view(tensor.shape)


def empty_image(like: torch.Tensor, shape: Sequence[Any], dtype: Any = None, last: bool | None = None) -> torch.Tensor:
    """Return an empty (N, C, ...) tensor in the memory format that a result computed from `like` has."""
    dtype = dtype or like.dtype
    if last is None:
        last = lies_last(like)
    if not last:
        return like.new_empty(shape, dtype=dtype)
    n = len(shape)
    return like.new_empty([shape[axis] for axis in _TO_LAST[n]], dtype=dtype).permute(_TO_FIRST[n])


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _array(tensor: torch.Tensor) -> Any:
    if not tensor.is_cpu:
        # On the caller's device; the operation looks for kernels there.
        return tensor.detach()
    if tensor.dtype is torch.bfloat16 or tensor.is_neg():
        return TorchArrays.adopt("x", tensor.detach())
    try:
        return tensor.numpy()
    except (TypeError, RuntimeError) as error:
        raise UnsupportedError(f"a tensor has no array over its memory: {error}") from None


# --- arguments -------------------------------------------------------------------------------------------------


def data_format_of(last: bool) -> str:
    """Return an operation's name for a memory format."""
    return "channels_last" if last else "channels_first"


def flat_padding(
    padding: Any, extents: Sequence[Any], kernel: Sequence[Any], stride: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Return padding of any form as [before, after, before, after, ...]."""
    form = padding_form(padding, len(stride))
    if isinstance(form, str):
        pairs = [padding_word(form, n, d * (k - 1) + 1, s) for n, k, s, d in zip(extents, kernel, stride, dilation)]
    else:
        pairs = [p if isinstance(p, tuple) else (p, p) for p in form]
    return [side for pair in pairs for side in pair]


def in_pairs(flat: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return [before, after, ...] as pairs."""
    return tuple(zip(flat[::2], flat[1::2]))
