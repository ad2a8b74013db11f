"""Modules: PyTorch's convolutions and pools, computed by fastconv.

Each is a subclass of PyTorch's, so that initial values, state dicts, hooks and `isinstance` are as before, and differs
in `forward` alone. So :func:`convert` brings a model over by giving its modules another class, and `revert` back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx.proxy import Proxy, TraceError

from .. import arrays, registry, selection
from ..errors import ArgumentTypeError, FastconvError, UnsupportedError, shown
from ..geometry import DIRECTIONS, ConvGeometry
from . import convolution, pooling
from ._operators import to_array, unscriptable

_DIMS = (1, 2, 3)
_DEFAULTS = {"algorithm": "auto", "precision": None}


def _checked(algorithm: str, precision: str | None) -> dict[str, Any]:
    registry.named(algorithm, "cpu")
    selection.checked_precision(precision)
    return {"algorithm": algorithm, "precision": precision}


class _Weighted(nn.Module):
    """A convolution of either kind: PyTorch's arguments, and how to compute."""

    algorithm: str
    precision: str | None

    def __init__(self, *args: Any, algorithm: str = "auto", precision: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__.update(_checked(algorithm, precision))

    def extra_repr(self) -> str:
        """Show what differs from the defaults."""
        parts = [super().extra_repr(), *(f"{n}={getattr(self, n)!r}" for n in _DEFAULTS)]
        return ", ".join(parts)


def _conv_forward(self: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    try:
        return convolution.convNd(
            len(self.kernel_size), x, weight, bias, self.stride, self.padding, self.dilation, self.groups,
            padding_mode=self.padding_mode, algorithm=self.algorithm, precision=self.precision,
        )  # fmt: skip
    except ArgumentTypeError:
        return _leaf(self, (x,), {})


def _conv_transpose(dims: int, self: Any, input: torch.Tensor, output_size: Any = None) -> torch.Tensor:
    extra = self._output_padding(
        input, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation
    )  # fmt: skip
    return convolution.conv_transposeNd(
        dims, input, self.weight, self.bias, self.stride, self.padding, extra, self.groups, self.dilation,
        algorithm=self.algorithm, precision=self.precision,
    )  # fmt: skip


def _max_pool(dims: int, self: Any, input: torch.Tensor) -> Any:
    how = self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
    return pooling.max_poolNd(dims, input, *how)


def _avg_pool(dims: int, self: Any, input: torch.Tensor) -> torch.Tensor:
    how = self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad
    return pooling.avg_poolNd(dims, input, *how, getattr(self, "divisor_override", None))


def _lp_pool(dims: int, self: Any, input: torch.Tensor) -> torch.Tensor:
    return pooling.lp_poolNd(dims, input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode)


def _max_unpool(
    dims: int, self: Any, input: torch.Tensor, indices: torch.Tensor, output_size: Any = None
) -> torch.Tensor:
    return pooling.max_unpoolNd(dims, input, indices, self.kernel_size, self.stride, self.padding, output_size)


def _adaptive_avg_pool(dims: int, self: Any, input: torch.Tensor) -> torch.Tensor:
    return pooling.adaptive_avg_poolNd(dims, input, self.output_size)


def _adaptive_max_pool(dims: int, self: Any, input: torch.Tensor) -> Any:
    return pooling.adaptive_max_poolNd(dims, input, self.output_size, self.return_indices)


_POOLS = {
    "MaxPool": _max_pool,
    "AvgPool": _avg_pool,
    "LPPool": _lp_pool,
    "MaxUnpool": _max_unpool,
    "AdaptiveAvgPool": _adaptive_avg_pool,
    "AdaptiveMaxPool": _adaptive_max_pool,
}


def _class(name: str, method: str, function: Any, mixins: tuple[type, ...] = ()) -> type:
    about = f"`torch.nn.{name}`, computed by fastconv"
    more = "; `algorithm` and `precision` as :func:`fastconv.conv2d` takes them." if mixins else "."
    methods = {"__doc__": about + more, "__module__": __name__, "__prepare_scriptable__": _refuse_script}
    return type(name, (*mixins, getattr(nn, name)), {method: function, **methods})


def _classes() -> dict[str, type]:
    found = {}
    for dims in _DIMS:
        name = f"Conv{dims}d"
        found[name] = _class(name, "_conv_forward", _conv_forward, (_Weighted,))
        name = f"ConvTranspose{dims}d"
        found[name] = _class(name, "forward", _forward(_conv_transpose, dims), (_Weighted,))
        for family, function in _POOLS.items():
            name = f"{family}{dims}d"
            found[name] = _class(name, "forward", _forward(function, dims))
    return found


def _forward(function: Any, dims: int) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return function(dims, self, *args, **kwargs)
        except (ArgumentTypeError, TraceError):
            return _leaf(self, args, kwargs)

    return forward


def _leaf(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Give `torch.fx` the module as a whole, as it has PyTorch's own; of other arguments, raise the error again."""
    proxies = [a for a in (*args, *kwargs.values()) if isinstance(a, Proxy)]
    if not proxies:
        raise
    tracer: Any = proxies[0].tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)


def _refuse_script(self: nn.Module) -> Any:
    raise UnsupportedError(unscriptable(type(self).__name__) + ", or revert the model first")


CLASSES = _classes()
globals().update(CLASSES)
_SWAPS = {getattr(nn, name): ours for name, ours in CLASSES.items()}
_BACK = {ours: theirs for theirs, ours in _SWAPS.items()}
# Kinds of layers that the report speaks of.
_KINDS = ("Conv", "Pool", "Unpool")


@dataclass
class Conversion:
    """What :func:`convert` or :func:`revert` did.

    Attributes
    ----------
    swapped : list of (name, class)
    left : list of (name, class, reason)
        Convolutions and pools that stay as they are.
    """

    swapped: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str, str]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"convert and revert change the model in place and return what they did, which has no {name!r}"
        )

    def __str__(self) -> str:
        lines = [f"{name}: {kind}, swapped" for name, kind in self.swapped]
        lines += [f"{name}: {kind}, left: {reason}" for name, kind, reason in self.left]
        return "\n".join(lines) or "no convolution or pool among the modules"


def convert(model: nn.Module, algorithm: str = "auto", precision: str | None = None) -> Conversion:
    """Swap every convolution and pool of a model, in place, for fastconv's.

    Parameters, buffers and hooks stay; only the modules' classes change.

    Parameters
    ----------
    model : torch.nn.Module
    algorithm : str
        Of the convolutions, as in :func:`fastconv.conv2d`.
    precision : "highest", "high" or "medium", optional

    Returns
    -------
    Conversion
        What was swapped and what was left, with the reason; printed, a line each.

    Examples
    --------
    >>> import torch, fastconv.torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.FractionalMaxPool2d(2, 3))
    >>> print(fastconv.torch.convert(model))
    0: Conv2d, swapped
    2: FractionalMaxPool2d, left: fastconv has none
    >>> print(fastconv.torch.revert(model))
    0: Conv2d, swapped
    >>> type(model[0]).__module__
    'torch.nn.modules.conv'
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model must be a torch.nn.Module, not {shown(model)}")
    how, done = _checked(algorithm, precision), Conversion()
    for name, module in model.named_modules():
        kind = type(module)
        # Of others no attribute is read: to compute a parametrised weight may change the module.
        refusal = _refusal(module, **how) if kind in _SWAPS or kind in _BACK else ""
        if refusal:
            done.left.append((name, kind.__name__, refusal))
        elif kind in _SWAPS or kind in _BACK:
            module.__class__ = _SWAPS.get(kind, kind)
            if isinstance(module, _Weighted):
                module.__dict__.update(how)
            done.swapped.append((name, kind.__name__))
        elif any(base in _SWAPS for base in kind.__mro__):
            done.left.append((name, kind.__name__, "its class is one of its own, which may compute something else"))
        elif any(word in kind.__name__ for word in _KINDS) and kind.__module__.startswith("torch.nn.modules"):
            done.left.append((name, kind.__name__, "fastconv has none"))
    return done


def _refusal(module: Any, algorithm: str, precision: str | None) -> str:
    """Return why a module cannot be computed, or not by the algorithm asked for; mostly nothing."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.modules.pooling._LPPoolNd):
        return pooling.norm_refusal(float(module.norm_type))
    if not isinstance(module, nn.modules.conv._ConvNd) or not isinstance(weight, torch.Tensor):
        return ""
    try:
        device = arrays.library_of("its weight", weight).device
    except FastconvError as error:
        return str(error)
    if algorithm in ("auto", "tune"):
        return ""
    try:
        # Which algorithms there are depends on the input's size hardly ever.
        extents = [d * (k - 1) + 1 + s for k, d, s in zip(module.kernel_size, module.dilation, module.stride)]
        how = (module.stride, 0, module.dilation, module.groups)
        filters, channels = (
            (module.in_channels, module.out_channels)
            if module.transposed
            else (module.out_channels, module.in_channels)
        )
        shapes = (1, channels, *extents), (filters, channels // module.groups, *module.kernel_size)
        geometry = ConvGeometry.create(*shapes, *how, dtype=to_array(weight.detach().flatten()[:0]).dtype)
        for direction in DIRECTIONS:
            selection.choose(geometry, direction, "channels_first", device, algorithm, precision)
    except FastconvError as error:
        return str(error)
    return ""


def revert(model: nn.Module) -> Conversion:
    """Undo :func:`convert`, in place.

    Returns
    -------
    Conversion
        What was swapped back, and what is fastconv's still, with the reason.
    """
    done = Conversion()
    for name, module in model.named_modules():
        kind = type(module)
        if kind in _BACK:
            module.__class__ = _BACK[kind]
            for option in _DEFAULTS:
                module.__dict__.pop(option, None)
            done.swapped.append((name, kind.__name__))
        elif any(base in _BACK for base in kind.__mro__):
            advice = ": remove its parametrizations first" if nn.utils.parametrize.is_parametrized(module) else ""
            done.left.append((name, kind.__name__, "its class is made of fastconv's" + advice))
    return done
