"""Routing: inside a block, PyTorch's convolutions and pools are computed by fastconv."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import _CheckpointFrame

from .. import registry, selection
from ..errors import ArgumentTypeError, FastconvError, UnsupportedError
from ..geometry import ConvGeometry
from . import convolution, pooling
from ._operators import checked_tensor, data_format_of, to_array


class enabled(TorchFunctionMode):
    """Compute every convolution and pool inside the block with fastconv, forward and backward.

    Whatever module or function a convolution or pool comes from, the model stays as it is. What fastconv cannot do,
    PyTorch does, and the report says why. The block is its thread's alone, and reaches what is called from Python, not
    TorchScript. A backward pass may come after the block. What `torch.utils.checkpoint` computes again in it, it does
    as it did in the block, which counts it again; with use_reentrant=True, PyTorch does. To compile a model,
    :func:`convert` it.

    Blocks may be nested: the innermost is the first to try, and what it leaves goes to the next one. A block counts
    what was computed inside it, by blocks within too once they end, and what it left itself.

    Parameters
    ----------
    algorithm : str
        Of the convolutions, as in :func:`fastconv.conv2d`.
    precision : "highest", "high" or "medium", optional

    Attributes
    ----------
    routed : Counter of the calls that fastconv computed, by name
    left : Counter of those that it did not, by (name, reason)

    Examples
    --------
    >>> import torch, fastconv.torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
    >>> with fastconv.torch.enabled() as found:
    ...     model(torch.ones(2, 1, 8, 8)).sum().backward()
    >>> print(found.report())
    conv2d      1  fastconv
    max_pool2d  1  fastconv
    """

    def __init__(self, algorithm: str = "auto", precision: str | None = None) -> None:
        super().__init__()
        if isinstance(algorithm, torch.nn.Module):
            raise ArgumentTypeError("enabled() takes no model: call the model inside the block, or use convert(model)")
        registry.named(algorithm, "cpu")
        selection.checked_precision(precision)
        self.algorithm, self.precision = algorithm, precision
        self.routed: Counter[str] = Counter()
        self.left: Counter[tuple[str, str]] = Counter()
        # Whenever it was entered, the block around it, what it had computed, and the checkpoint that it is in.
        self._outer: list[tuple[enabled | None, Counter[str], Any]] = []

    def __enter__(self) -> enabled:
        blocks = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, enabled)]
        self._outer.append((blocks[-1] if blocks else None, Counter(self.routed), _checkpoint()))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        outer, before, _ = self._outer.pop()
        if outer is not None and outer is not self:
            outer.routed += self.routed - before

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = _ROUTES.get(function)
        if found is None:
            return function(*args, **kwargs)
        name, route = found
        if not torch.compiler.is_compiling():
            self._keep_checkpoint()
        try:
            result = route(self, *args, **kwargs)
        except FastconvError as error:
            # A wrong argument too: PyTorch says so in its own words.
            self.left[name, str(error)] += 1
            return function(*args, **kwargs)
        self.routed[name] += 1
        return result

    def _keep_checkpoint(self) -> None:
        """Have a checkpoint that began in the block compute again in it, or PyTorch would find other saved tensors."""
        checkpoint = _checkpoint()
        if checkpoint is None or checkpoint is self._outer[-1][2]:
            return
        blocks = vars(checkpoint).setdefault("_fastconv_blocks", [])
        if self not in blocks:
            blocks.append(self)
            checkpoint.recompute_fn = partial(self._compute_again, checkpoint.recompute_fn)

    def _compute_again(self, function: Callable[..., Any], *args: Any) -> Any:
        with nullcontext() if self in _get_current_function_mode_stack() else self:
            return function(*args)

    def __str__(self) -> str:
        return self.report()

    def report(self) -> str:
        """Return a table of the calls: how many of each, and who computed them."""
        rows = [(name, count, "fastconv") for name, count in sorted(self.routed.items())]
        rows += [(name, count, f"PyTorch: {reason}") for (name, reason), count in sorted(self.left.items())]
        if not rows:
            return "no convolution or pool was called from Python inside the block"
        width = max(len(row[0]) for row in rows)
        return "\n".join(f"{name:<{width}}  {count}  {who}" for name, count, who in rows)


def _checkpoint() -> Any:
    """Return what `torch.utils.checkpoint` knows of the call that it saves tensors of at present, if it does."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    cells = () if hooks is None else getattr(hooks[0], "__closure__", None) or ()
    return next((c.cell_contents for c in cells if isinstance(c.cell_contents, _CheckpointFrame)), None)


# --- routes: PyTorch's functions, with its parameters ----------------------------------------------------------


def _conv(dims: int) -> Callable[..., Any]:
    def route(
        mode: enabled, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
        groups: int = 1,
    ) -> Any:  # fmt: skip
        def geometry(dtype: Any) -> ConvGeometry:
            shapes = tuple(input.shape), tuple(weight.shape)
            return ConvGeometry.create(*shapes, stride, padding, dilation, groups, dtype=dtype)

        _check_padding(padding, stride)
        if checked_tensor(input).dtype in convolution.INTEGERS:
            raise UnsupportedError(f"fastconv sums {input.dtype} in int32, and PyTorch does not")
        _check_gradients(mode, input, weight, geometry, ("input_grad", "weight_grad"))
        return convolution.convNd(
            dims, input, weight, bias, stride, padding, dilation, groups,
            algorithm=mode.algorithm, precision=mode.precision,
        )  # fmt: skip

    return route


def _conv_transpose(dims: int) -> Callable[..., Any]:
    def route(
        mode: enabled, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
        output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
    ) -> Any:  # fmt: skip
        _check_padding(padding)
        how = (stride, padding, output_padding, groups, dilation)

        def geometry(dtype: Any) -> ConvGeometry:
            return ConvGeometry.transposed(tuple(input.shape), tuple(weight.shape), *how, dtype=dtype)

        _check_gradients(mode, input, weight, geometry, ("forward", "weight_grad"))
        return convolution.conv_transposeNd(
            dims, input, weight, bias, *how, algorithm=mode.algorithm, precision=mode.precision
        )

    return route


def _convolution(
    mode: enabled, input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int,
) -> Any:  # fmt: skip
    dims = weight.ndim - 2
    if input.ndim != weight.ndim:
        raise UnsupportedError("PyTorch takes no image without a batch here")
    # Which PyTorch's autocast does not know.
    with torch.autocast(input.device.type, enabled=False):
        if transposed:
            return _conv_transpose(dims)(mode, input, weight, bias, stride, padding, output_padding, groups, dilation)
        return _conv(dims)(mode, input, weight, bias, stride, padding, dilation, groups)


def _check_padding(padding: Any, stride: Any = None) -> None:
    """Refuse padding that PyTorch has not; words are there for convolutions, which give their stride."""
    kind = type(padding)
    if kind is int or (kind is tuple and padding and type(padding[0]) is int):
        return
    if isinstance(padding, str):
        strides = stride if isinstance(stride, (tuple, list)) else (stride,)
        known = stride is not None and (padding == "valid" or (padding == "same" and all(s == 1 for s in strides)))
    else:
        known = not any(isinstance(p, (tuple, list)) for p in padding)
    if not known:
        raise UnsupportedError(f"PyTorch takes no padding={padding!r} here")


def _check_gradients(
    mode: enabled, x: Any, weight: Any, geometry: Callable[[Any], ConvGeometry], directions: tuple[str, str]
) -> None:
    """Refuse an algorithm, asked for by name, that could not compute the gradients."""
    if mode.algorithm in ("auto", "tune") or not torch.is_grad_enabled() or not x.is_cpu:
        return
    for tensor, direction in zip((x, weight), directions):
        if tensor.requires_grad:
            g = geometry(to_array(x.detach()[:0]).dtype)
            stored = data_format_of(convolution.computes_last(x, weight))
            selection.choose(g, direction, stored, "cpu", mode.algorithm, mode.precision)


def _max_pool(dims: int) -> Callable[..., Any]:
    def route(
        mode: enabled, input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil_mode: bool = False, return_indices: bool = False,
    ) -> Any:  # fmt: skip
        _check_padding(padding)
        return pooling.max_poolNd(dims, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)

    return route


def _max_pool_with_indices(dims: int) -> Callable[..., Any]:
    def route(mode: enabled, *args: Any, return_indices: bool = True, **kwargs: Any) -> Any:
        return _max_pool(dims)(mode, *args[:6], return_indices=True, **kwargs)

    return route


def _avg_pool(dims: int) -> Callable[..., Any]:
    def route(
        mode: enabled, input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
        count_include_pad: bool = True, divisor_override: Any = None,
    ) -> Any:  # fmt: skip
        _check_padding(padding)
        return pooling.avg_poolNd(
            dims, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
        )

    return route


def _lp_pool(dims: int) -> Callable[..., Any]:
    def route(
        mode: enabled, input: Any, norm_type: Any, kernel_size: Any, stride: Any = None, ceil_mode: bool = False
    ) -> Any:
        if refusal := pooling.norm_refusal(norm_type):
            raise UnsupportedError(refusal)
        return pooling.lp_poolNd(dims, input, norm_type, kernel_size, stride, ceil_mode)

    return route


def _max_unpool(dims: int) -> Callable[..., Any]:
    def route(
        mode: enabled, input: Any, indices: Any, kernel_size: Any, stride: Any = None, padding: Any = 0,
        output_size: Any = None,
    ) -> Any:  # fmt: skip
        _check_padding(padding)
        return pooling.max_unpoolNd(dims, input, indices, kernel_size, stride, padding, output_size)

    return route


def _adaptive_avg_pool(dims: int) -> Callable[..., Any]:
    return lambda mode, input, output_size: pooling.adaptive_avg_poolNd(dims, input, output_size)


def _adaptive_max_pool(dims: int) -> Callable[..., Any]:
    return lambda mode, input, output_size, return_indices=False: pooling.adaptive_max_poolNd(
        dims, input, output_size, return_indices
    )


def _adaptive_max_pool_with_indices(dims: int) -> Callable[..., Any]:
    return lambda mode, input, output_size, return_indices=True: pooling.adaptive_max_poolNd(
        dims, input, output_size, True
    )


def _none(dims: int) -> Callable[..., Any]:
    def route(mode: enabled, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError("fastconv has none")

    return route


def _routes() -> dict[Any, tuple[str, Callable[..., Any]]]:
    """Return PyTorch's functions with the name to report and the function to call, for those this version has."""
    made = {
        "conv{}d": _conv, "conv_transpose{}d": _conv_transpose, "max_pool{}d": _max_pool,
        "max_pool{}d_with_indices": _max_pool_with_indices, "avg_pool{}d": _avg_pool, "lp_pool{}d": _lp_pool,
        "max_unpool{}d": _max_unpool, "adaptive_avg_pool{}d": _adaptive_avg_pool,
        "adaptive_max_pool{}d": _adaptive_max_pool,
        "adaptive_max_pool{}d_with_indices": _adaptive_max_pool_with_indices,
        "fractional_max_pool{}d": _none, "fractional_max_pool{}d_with_indices": _none,
    }  # fmt: skip
    found: dict[Any, tuple[str, Callable[..., Any]]] = {
        torch.convolution: ("convolution", _convolution),
        torch.conv_tbc: ("conv_tbc", _none(1)),
    }
    for pattern, make in made.items():
        for dims in (1, 2, 3):
            name = pattern.format(dims)
            for home in (torch, F):
                function = getattr(home, name, None)
                # `torch.adaptive_max_pool1d` returns the indices without being asked; F's does not.
                indexed = home is torch and name == "adaptive_max_pool1d"
                if function is not None and function not in found:
                    found[function] = name, (_adaptive_max_pool_with_indices if indexed else make)(dims)
    return found


_ROUTES = _routes()
