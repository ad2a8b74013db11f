"""What is refused, and what is accepted at the edges: every argument of every public operation."""

# A family such as conv{n}d has one valid call, its base. A row replaces some of its arguments and says which
# error must come, and what its message must name. `torch` says for which dimensions PyTorch refuses the same
# call too; a second test holds PyTorch to that, so that the table cannot drift into refusing what PyTorch
# accepts without saying so.

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import fastconv
from fastconv.errors import (
    ArgumentError,
    ArgumentTypeError,
    DTypeError,
    FastconvError,
    ShapeError,
    UnsupportedError,
)

torch = pytest.importorskip("torch")

ALL = (1, 2, 3)
INF, NAN = math.inf, math.nan
HUGE = 2**62


def full(*shape: int, value: float = 1, dtype: str = "float32") -> np.ndarray:
    return np.full(shape, value, dtype)


def ramp(*shape: int, dtype: str = "float32") -> np.ndarray:
    """Small whole numbers of both signs, in no order."""
    return ((np.arange(math.prod(shape)) * 7 % 11) - 5).astype(dtype).reshape(shape)


# With more threads PyTorch keeps any one of the values whose indices are equal when it unpools.
torch.set_num_threads(1)


def indices(*shape: int, value: int = 0, dtype: str = "int64") -> np.ndarray:
    return np.full(shape, value, dtype)


def places(*lead: int, n: int, size: int = 2) -> np.ndarray:
    """Indices of which no two in a plane are equal: of equal ones PyTorch takes whichever thread comes last."""
    plane = np.arange(size**n).reshape((size,) * n)
    return np.broadcast_to(plane, (*lead, *plane.shape)).copy()


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


# --- the base calls -----------------------------------------------------------------------------------------

Call = dict[str, Any]

BASES: dict[str, Callable[[int], Call]] = {
    "conv{n}d": lambda n: {
        "x": ramp(2, 4, *(6,) * n),
        "weight": ramp(6, 2, *(3,) * n),
        "groups": 2,
    },
    "conv{n}d_backward": lambda n: {
        "grad_output": ramp(2, 6, *(4,) * n),
        "x": ramp(2, 4, *(6,) * n),
        "weight": ramp(6, 2, *(3,) * n),
        "groups": 2,
    },
    "conv_transpose{n}d": lambda n: {
        "x": ramp(2, 4, *(3,) * n),
        "weight": ramp(4, 3, *(3,) * n),
        "stride": 2,
        "groups": 2,
    },
    "conv_transpose{n}d_backward": lambda n: {
        "grad_output": ramp(2, 6, *(7,) * n),
        "x": ramp(2, 4, *(3,) * n),
        "weight": ramp(4, 3, *(3,) * n),
        "stride": 2,
        "groups": 2,
    },
    "max_pool{n}d": lambda n: {"x": ramp(2, 3, *(6,) * n), "kernel_size": 3, "return_indices": True},
    "max_pool{n}d_backward": lambda n: {
        "grad_output": ramp(2, 3, *(2,) * n),
        "indices": indices(2, 3, *(2,) * n),
        "input_shape": (2, 3, *(6,) * n),
    },
    "max_unpool{n}d": lambda n: {
        "x": ramp(2, 3, *(2,) * n),
        "indices": places(2, 3, n=n),
        "kernel_size": 3,
    },
    "max_unpool{n}d_backward": lambda n: {
        "grad_output": ramp(2, 3, *(6,) * n),
        "indices": indices(2, 3, *(2,) * n),
    },
    "avg_pool{n}d": lambda n: {"x": ramp(2, 3, *(6,) * n), "kernel_size": 3},
    "avg_pool{n}d_backward": lambda n: {
        "grad_output": ramp(2, 3, *(2,) * n),
        "input_shape": (2, 3, *(6,) * n),
        "kernel_size": 3,
    },
    "lp_pool{n}d": lambda n: {"x": ramp(2, 3, *(6,) * n), "norm_type": 2, "kernel_size": 3},
    "adaptive_avg_pool{n}d": lambda n: {"x": ramp(2, 3, *(6,) * n), "output_size": 4},
    "adaptive_avg_pool{n}d_backward": lambda n: {
        "grad_output": ramp(2, 3, *(4,) * n),
        "input_shape": (2, 3, *(6,) * n),
    },
    "adaptive_max_pool{n}d": lambda n: {
        "x": ramp(2, 3, *(6,) * n),
        "output_size": 4,
        "return_indices": True,
    },
    "adaptive_max_pool{n}d_backward": lambda n: {
        "grad_output": ramp(2, 3, *(4,) * n),
        "indices": indices(2, 3, *(4,) * n),
        "input_shape": (2, 3, *(6,) * n),
    },
    "unfold": lambda n: {"x": ramp(2, 3, 6, 6), "kernel_size": 3},
    "fold": lambda n: {"cols": ramp(2, 27, 16), "output_size": 6, "kernel_size": 3},
}

CONV, CONV_BACK = "conv{n}d", "conv{n}d_backward"
TRANSPOSE, TRANSPOSE_BACK = "conv_transpose{n}d", "conv_transpose{n}d_backward"
CONVS = (CONV, CONV_BACK)
TRANSPOSES = (TRANSPOSE, TRANSPOSE_BACK)
MAX, MAX_BACK, UNPOOL, UNPOOL_BACK = (
    "max_pool{n}d",
    "max_pool{n}d_backward",
    "max_unpool{n}d",
    "max_unpool{n}d_backward",
)
AVG, AVG_BACK, LP = "avg_pool{n}d", "avg_pool{n}d_backward", "lp_pool{n}d"
ADAPTIVE_AVG, ADAPTIVE_AVG_BACK = "adaptive_avg_pool{n}d", "adaptive_avg_pool{n}d_backward"
ADAPTIVE_MAX, ADAPTIVE_MAX_BACK = "adaptive_max_pool{n}d", "adaptive_max_pool{n}d_backward"


def dims_of(family: str) -> tuple[int, ...]:
    return ALL if "{n}" in family else (2,)


def arguments(family: str, n: int, changes: Call) -> Call:
    """Return the base call with `changes`; a function among them is asked for its value in n dimensions."""
    call = BASES[family](n)
    for name, value in changes.items():
        call[name] = value(n) if callable(value) else value
    return call


# --- the same call in PyTorch -------------------------------------------------------------------------------


def to_torch(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def to_numpy(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(to_numpy(element) for element in value)
    return value.detach().numpy() if isinstance(value, torch.Tensor) else value


def torch_call(family: str, n: int, call: Call) -> Any:
    """Make the call that PyTorch's users would make in its place."""
    call = {name: to_torch(value) for name, value in call.items()}
    name = family.format(n=n)
    if family.endswith("_backward"):
        return torch_gradient(family.removesuffix("_backward"), n, call)
    if "padding_mode" in call or ("output_size" in call and "transpose" in family):
        return torch_module(family, n, call)
    first = call.pop("cols") if family == "fold" else call.pop("x")
    return getattr(torch.nn.functional, name)(first, **call)


def torch_module(family: str, n: int, call: Call) -> Any:
    """Do the call through the layer, which alone takes `padding_mode` and `output_size`."""
    x, weight, bias = call.pop("x"), call.pop("weight"), call.pop("bias", None)
    options = {} if "output_size" not in call else {"output_size": call.pop("output_size")}
    groups = call.get("groups", 1)
    channels = (weight.shape[1] * groups, weight.shape[0])
    if "transpose" in family:
        layer = getattr(torch.nn, f"ConvTranspose{n}d")
        channels = (weight.shape[0], weight.shape[1] * groups)
    else:
        layer = getattr(torch.nn, f"Conv{n}d")
    kernel_size = tuple(weight.shape[2:])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        module = layer(*channels, kernel_size, bias=bias is not None, **call)
    module.weight.data = weight
    if bias is not None:
        module.bias.data = bias
    return module(x, **options)


def torch_gradient(family: str, n: int, call: Call) -> Any:
    """Return the gradient by autograd, or what it amounts to where PyTorch has no such call."""
    gradient = call.pop("grad_output")
    if "conv" in family:
        x, weight = call.pop("x").requires_grad_(), call.pop("weight").requires_grad_()
        filters = weight.shape[1] * call["groups"] if "transpose" in family else weight.shape[0]
        bias = torch.zeros(filters, dtype=weight.dtype, requires_grad=True)
        result = torch_call(family, n, {"x": x, "weight": weight, "bias": bias, **call})
        return torch.autograd.grad(result, (x, weight, bias), gradient)
    if "indices" in call:
        index = call["indices"]
        if "unpool" in family:
            return gradient.flatten(-n).gather(-1, index.flatten(-n)).reshape(index.shape)
        plane = torch.zeros(call["input_shape"]).flatten(-n)
        return plane.scatter_add(-1, index.flatten(-n), gradient.flatten(-n)).reshape(call["input_shape"])
    x = torch.zeros(call.pop("input_shape"), requires_grad=True)
    if family == ADAPTIVE_AVG:
        call["output_size"] = tuple(gradient.shape[-n:])
    return torch.autograd.grad(torch_call(family, n, {"x": x, **call}), x, gradient)[0]


TORCH_REFUSES = (
    RuntimeError,
    TypeError,
    ValueError,
    IndexError,
    AttributeError,
    ZeroDivisionError,
    NotImplementedError,
)


# --- the table ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    family: str
    n: int
    label: str
    changes: Call
    error: type[Exception] = FastconvError
    match: str = ""
    torch: bool = False

    @property
    def name(self) -> str:
        return self.family.format(n=self.n)

    def __str__(self) -> str:
        return f"{self.name}-{self.label}"


def label_of(changes: Call) -> str:
    """Name a row after what it changes: "stride=0"."""
    parts = [f"{name}={value!r}" for name, value in changes.items() if not callable(value)]
    return ",".join(parts).replace(" ", "")


ROWS: list[Row] = []


def refuse(
    families: str | tuple[str, ...],
    error: type[Exception],
    match: str,
    *,
    torch: bool | tuple[int, ...] = True,
    dims: tuple[int, ...] = ALL,
    label: str = "",
    **changes: Any,
) -> None:
    """Add one row per family and dimension."""
    for family in (families,) if isinstance(families, str) else families:
        for n in dims_of(family):
            if n not in dims:
                continue
            also = n in torch if isinstance(torch, tuple) else torch
            ROWS.append(Row(family, n, label or label_of(changes), changes, error, match, also))


def named(name: str, *shown: Any) -> str:
    """Match a message that has the argument's name and, somewhere after it, the values."""
    return rf"(?s)\b{name}\b" + "".join(".*" + re.escape(repr(value)) for value in shown)


def refuse_sizes(
    families: str | tuple[str, ...],
    name: str,
    *,
    minimum: int = 1,
    none: bool = True,
    torch: bool | tuple[int, ...] = True,
) -> None:
    """Add the rows that every size argument has: too small, the wrong number of entries, the wrong type."""
    for value in (minimum - 1, minimum - 3):
        refuse(families, ArgumentError, named(name, value), torch=torch, **{name: value})
        refuse(
            families,
            ArgumentError,
            named(name, value),
            torch=torch,
            label=f"{name}=(..,{value})",
            **{name: lambda n, value=value: (1,) * (n - 1) + (value,)},
        )
    refuse(families, ArgumentError, named(name), torch=torch, label=f"{name}=2**63", **{name: 2**63})
    for kind in (tuple, list):
        refuse(
            families,
            ArgumentError,
            named(name),
            torch=torch,
            label=f"{name}-too-long-{kind.__name__}",
            **{name: lambda n, kind=kind: kind((1,) * (n + 1))},
        )
    refuse(
        families,
        ArgumentError,
        named(name),
        torch=torch,
        dims=(3,),
        label=f"{name}-too-short",
        **{name: (1, 1)},
    )
    for value in (1.0, 2.5, NAN, "1", "same1", True, np.float64(1), 1j):
        wrong = ArgumentTypeError
        if name == "padding" and isinstance(value, str):
            wrong = ArgumentError  # a string is a padding word, and these are no such words
        refuse(families, wrong, named(name), torch=torch, label=f"{name}={value!r}", **{name: value})
    for value in (1.0, "1", True, None):
        refuse(
            families,
            ArgumentTypeError,
            named(name),
            torch=torch,
            # A None in an adaptive output_size keeps the input's size, except in one dimension.
            dims=(1,) if value is None and name == "output_size" else ALL,
            label=f"{name}=({value!r},)*n",
            **{name: lambda n, value=value: (value,) * n},
        )
    if none:
        refuse(families, ArgumentTypeError, named(name, None), torch=torch, **{name: None})


def refuse_arrays(families: str | tuple[str, ...], name: str, *, torch: bool = True) -> None:
    """Add the rows of what is no array at all."""
    nested = [[[[1.0, 2.0]]]]
    for value in (None, nested, "x", 1.0):
        if value is None and name == "bias":
            continue
        label = f"{name}-{type(value).__name__}"
        refuse(families, ArgumentTypeError, named(name), torch=torch, label=label, **{name: value})


def refuse_options(families: str | tuple[str, ...], name: str, wrong: Any = "nonsense") -> None:
    """Add the rows of an argument that takes one of a few words."""
    refuse(families, ArgumentError, named(name, wrong), torch=False, **{name: wrong})
    for value in (1, ["zeros"]):
        refuse(families, ArgumentTypeError, named(name, value), torch=False, **{name: value})


def refuse_flag(families: str | tuple[str, ...], name: str) -> None:
    for value in (1, "yes", None):
        refuse(families, ArgumentTypeError, named(name, value), **{name: value})


def recast(
    families: str | tuple[str, ...],
    name: str,
    dtype: str,
    *,
    torch: bool | tuple[int, ...] = True,
    also: str = "",
) -> None:
    """Add rows in which one array of the base call has another dtype, and with it the array `also`."""
    for family in (families,) if isinstance(families, str) else families:
        changes = {
            array: lambda n, family=family, array=array: BASES[family](n)[array].astype(dtype)
            for array in (name, also)
            if array
        }
        refuse(family, DTypeError, named(name), torch=torch, label=f"{name}-{dtype}", **changes)


POOLED = (MAX, AVG, LP)
WITH_X = (CONV, CONV_BACK, TRANSPOSE, TRANSPOSE_BACK, *POOLED, UNPOOL, ADAPTIVE_AVG, ADAPTIVE_MAX)
WITH_GRADIENT = tuple(family for family in BASES if family.endswith("_backward"))
EVERY_ND = tuple(family for family in BASES if "{n}" in family)
SIZED_BACKWARD = (MAX_BACK, AVG_BACK, ADAPTIVE_AVG_BACK, ADAPTIVE_MAX_BACK)

# -- x, weight, bias and friends: what they are, their number of dimensions, their sizes
refuse_arrays((CONV, TRANSPOSE, *POOLED, UNPOOL, ADAPTIVE_AVG, ADAPTIVE_MAX, "unfold"), "x")
refuse_arrays(("fold",), "cols")
refuse_arrays((CONV, TRANSPOSE), "weight")
refuse_arrays((CONV, TRANSPOSE), "bias")
refuse_arrays((CONV_BACK, TRANSPOSE_BACK), "x", torch=False)
refuse_arrays((CONV_BACK, TRANSPOSE_BACK), "weight", torch=False)
refuse_arrays((UNPOOL,), "indices")
refuse_arrays((MAX_BACK, ADAPTIVE_MAX_BACK, UNPOOL_BACK), "indices", torch=False)
refuse_arrays(WITH_GRADIENT, "grad_output", torch=False)
refuse(
    (CONV, TRANSPOSE),
    ArgumentTypeError,
    named("weight"),
    torch=False,
    label="weight-of-another-library",
    weight=lambda n: torch.zeros(6, 2, *(3,) * n),
)

refuse(WITH_X, ShapeError, named("x"), label="x-one-dimension-less", x=lambda n: ramp(*(6,) * n))
refuse(WITH_X, ShapeError, named("x"), label="x-one-dimension-more", x=lambda n: ramp(1, 2, 4, *(6,) * n))
refuse("unfold", ShapeError, named("x"), label="x-2d", x=ramp(6, 6))
refuse("unfold", ShapeError, named("x"), label="x-5d", x=ramp(1, 1, 2, 6, 6))
refuse("fold", ShapeError, named("cols"), label="cols-1d", cols=ramp(16))
refuse("fold", ShapeError, named("cols"), label="cols-4d", cols=ramp(1, 2, 27, 16))
refuse("fold", ShapeError, named("cols"), label="cols-channels", cols=ramp(2, 26, 16))
refuse("fold", ShapeError, named("cols"), label="cols-no-channels", cols=ramp(2, 0, 16))
for length in (0, 15, 17):
    refuse("fold", ShapeError, named("cols"), label=f"cols-{length}-windows", cols=ramp(2, 27, length))

for dtype in ("bool", "object", "<U4", "complex64", "longdouble", "uint16"):
    in_torch = dtype == "bool"
    recast((CONV, TRANSPOSE), "x", dtype, torch=in_torch, also="weight")
    recast((MAX, AVG, UNPOOL, ADAPTIVE_AVG, ADAPTIVE_MAX), "x", dtype, torch=in_torch)
    recast((LP, "unfold"), "x", dtype, torch=False)
    recast("fold", "cols", dtype, torch=False)
    recast(SIZED_BACKWARD, "grad_output", dtype, torch=False)
recast((CONV, TRANSPOSE), "x", "int64", torch=False, also="weight")
recast((AVG, UNPOOL, ADAPTIVE_AVG, ADAPTIVE_MAX, "unfold"), "x", "int32")
recast("fold", "cols", "int32")
recast((CONV, TRANSPOSE), "x", "float64")
recast((CONV, TRANSPOSE), "x", "float16")
recast((CONV, TRANSPOSE), "weight", "float64")
recast((CONV, TRANSPOSE), "weight", "int8")
recast((CONV_BACK, TRANSPOSE_BACK), "grad_output", "float64", torch=False)
recast((CONV_BACK, TRANSPOSE_BACK), "x", "float64")
recast((CONV_BACK, TRANSPOSE_BACK), "weight", "float16")
for dtype in ("float64", "float16", "int64"):
    # PyTorch adds a float64 bias to a float32 transposed convolution in one and two dimensions.
    refuse(CONV, DTypeError, named("bias"), label=f"bias-{dtype}", bias=full(6, dtype=dtype))
    refuse(TRANSPOSE, DTypeError, named("bias"), torch=(3,), label=f"bias-{dtype}", bias=full(6, dtype=dtype))
for dtype in ("int32", "uint64", "float32", "bool"):
    recast(UNPOOL, "indices", dtype)
    recast((MAX_BACK, ADAPTIVE_MAX_BACK, UNPOOL_BACK), "indices", dtype, torch=False)

for family, base in BASES.items():
    for name in (name for name, value in base(2).items() if isinstance(value, np.ndarray)):
        refuse(
            family,
            ArgumentTypeError,
            rf"^{name} is a masked array",
            torch=False,
            label=f"{name}-masked",
            **{name: lambda n, base=base, name=name: np.ma.masked_less(base(n)[name], 0)},
        )

# -- weight and bias against x
CHANNELS = r"\b(weight|x|channels)\b"
refuse(CONVS, ShapeError, CHANNELS, label="x-channels", x=lambda n: ramp(2, 5, *(6,) * n))
refuse(CONVS, ShapeError, CHANNELS, label="x-channels-empty-batch", x=lambda n: ramp(0, 5, *(6,) * n))
refuse(CONVS, ShapeError, CHANNELS, label="x-no-channels", x=lambda n: ramp(2, 0, *(6,) * n))
refuse(CONVS, ShapeError, CHANNELS, label="weight-channels", weight=lambda n: ramp(6, 4, *(3,) * n))
refuse(TRANSPOSES, ShapeError, CHANNELS, label="x-channels", x=lambda n: ramp(2, 6, *(3,) * n))
refuse(TRANSPOSES, ShapeError, CHANNELS, label="weight-channels", weight=lambda n: ramp(6, 3, *(3,) * n))
WEIGHT_OR_X = r"\b(weight|x)\b"
for family in (*CONVS, *TRANSPOSES):
    first, second = (4, 3) if "transpose" in family else (6, 2)
    size = (lambda n: (3,) * n) if "transpose" in family else (lambda n: (6,) * n)
    refuse(
        family,
        ShapeError,
        WEIGHT_OR_X,
        label="weight-one-dimension-less",
        weight=lambda n, first=first, second=second: ramp(first, second, *(3,) * (n - 1)),
    )
    refuse(
        family,
        ShapeError,
        WEIGHT_OR_X,
        label="weight-one-dimension-more",
        weight=lambda n, first=first, second=second: ramp(first, second, *(3,) * (n + 1)),
    )
    refuse(
        family,
        ShapeError,
        named("weight"),
        label="kernel-of-size-zero",
        weight=lambda n, first=first, second=second: ramp(first, second, *(3,) * (n - 1), 0),
    )
    refuse(
        family,
        ShapeError,
        named("weight"),
        label="kernel-of-size-zero-empty-batch",
        x=lambda n, size=size: ramp(0, 4, *size(n)),
        weight=lambda n, first=first, second=second: ramp(first, second, *(3,) * (n - 1), 0),
    )
refuse(CONVS, ShapeError, named("weight"), label="no-filters", weight=lambda n: ramp(0, 2, *(3,) * n))
refuse(
    CONVS,
    ShapeError,
    named("weight"),
    label="no-filters-empty-batch",
    x=lambda n: ramp(0, 4, *(6,) * n),
    weight=lambda n: ramp(0, 2, *(3,) * n),
)
refuse(
    CONVS,
    ShapeError,
    named("weight"),
    label="no-filters-no-channels",
    x=lambda n: ramp(2, 0, *(6,) * n),
    weight=lambda n: ramp(0, 0, *(3,) * n),
)
refuse(TRANSPOSES, ShapeError, named("weight"), label="no-filters", weight=lambda n: ramp(4, 0, *(3,) * n))
refuse(
    TRANSPOSES,
    ShapeError,
    named("weight"),
    label="no-filters-empty-batch",
    x=lambda n: ramp(0, 4, *(3,) * n),
    weight=lambda n: ramp(4, 0, *(3,) * n),
)
refuse(
    TRANSPOSES,
    ShapeError,
    WEIGHT_OR_X,
    label="no-channels",
    x=lambda n: ramp(2, 0, *(3,) * n),
    weight=lambda n: ramp(0, 3, *(3,) * n),
)
for shape in ((5,), (7,), (1,), (0,), (6, 1), (1, 6), ()):
    refuse(
        (CONV, TRANSPOSE),
        ShapeError,
        named("bias"),
        # A bias of float32 () broadcasts nowhere in PyTorch.
        label=f"bias-of-shape-{shape}",
        bias=lambda n, shape=shape: ramp(*shape),
    )
refuse(TRANSPOSE, ShapeError, named("bias"), label="bias-of-one-group", bias=full(3))

for value in (0, -1, HUGE, 2**63):
    refuse((*CONVS, *TRANSPOSES), ArgumentError, named("groups"), groups=value)
refuse((*CONVS, *TRANSPOSES), ArgumentError, named("groups", 3), groups=3)
refuse(
    CONVS,
    ArgumentError,
    named("groups"),
    label="groups-do-not-divide-filters",
    weight=lambda n: ramp(5, 2, *(3,) * n),
)
refuse(
    CONVS,
    ArgumentError,
    r"\b(groups|weight)\b",
    label="fewer-filters-than-groups",
    weight=lambda n: ramp(1, 2, *(3,) * n),
)
for value in (2.0, "2", True, None, (2,), [2]):
    refuse((*CONVS, *TRANSPOSES), ArgumentTypeError, named("groups"), groups=value)

# -- every size
refuse_sizes((*CONVS, *TRANSPOSES), "stride")
refuse_sizes((*CONVS, *TRANSPOSES), "dilation")
refuse_sizes(TRANSPOSES, "output_padding", minimum=0)
refuse_sizes((*CONVS,), "padding", minimum=0)
refuse_sizes((*TRANSPOSES,), "padding", minimum=0)
refuse_sizes((*POOLED, AVG_BACK), "kernel_size")
refuse_sizes((*POOLED, AVG_BACK), "stride", none=False)
refuse_sizes((MAX, AVG, AVG_BACK), "padding", minimum=0)
refuse_sizes((LP,), "padding", minimum=0, torch=False)
refuse_sizes(MAX, "dilation")
refuse_sizes((AVG, LP), "dilation", torch=False)
refuse_sizes((ADAPTIVE_AVG, ADAPTIVE_MAX), "output_size", minimum=0)
for family in (*CONVS, *TRANSPOSES):
    for name in ("stride", "padding", "dilation"):
        for empty in ((), []):
            refuse(family, ArgumentError, named(name), **{name: empty})
for empty in ((), []):
    refuse(TRANSPOSES, ArgumentError, named("output_padding"), output_padding=empty)
    refuse((MAX, AVG, LP, AVG_BACK), ArgumentError, named("kernel_size"), kernel_size=empty)
    refuse((MAX, AVG, AVG_BACK), ArgumentError, named("padding"), padding=empty)
    refuse((ADAPTIVE_AVG, ADAPTIVE_MAX), ArgumentError, named("output_size"), output_size=empty)
    refuse(MAX, ArgumentError, named("dilation"), dilation=empty)
for name, minimum in (("kernel_size", 1), ("dilation", 1), ("padding", 0), ("stride", 1)):
    refuse_sizes(("unfold", "fold"), name, minimum=minimum)
    for value in ((), (1, 1, 1)):
        refuse(("unfold", "fold"), ArgumentError, named(name), **{name: value})
for value in (-1, (6, -6), (6, 6, 6), ()):
    refuse("fold", ArgumentError, named("output_size"), output_size=value)
for value in (6.0, "6", True, None, (6.0, 6), (None, 6)):
    refuse("fold", ArgumentTypeError, named("output_size"), output_size=value)
for value in (0, 2, 5, 7, (6, 5)):
    refuse("fold", ArgumentError, r"\b(output_size|cols)\b", output_size=value)
refuse(
    "fold",
    ArgumentError,
    named("output_size"),
    label="output_size=0-with-padding",
    cols=ramp(1, 8, 1),
    kernel_size=2,
    padding=1,
    output_size=0,
)

# -- padding: words, pairs, how much
for word in ("SAME", "mirror", ""):
    refuse((*CONVS, *TRANSPOSES, MAX, AVG, AVG_BACK), ArgumentError, named("padding", word), padding=word)
PADDED = (*CONVS, *TRANSPOSES, MAX, AVG, AVG_BACK, LP)
for pair, error in (
    ((1, -1), ArgumentError),
    ((1, 1, 1), ArgumentError),
    ((1,), ArgumentError),
    ((1, 1.0), ArgumentTypeError),
    ((1, None), ArgumentTypeError),
    ((1, "1"), ArgumentTypeError),
):
    refuse(
        PADDED,
        error,
        named("padding"),
        torch=False,
        label=f"padding=({pair},)*n",
        padding=lambda n, pair=pair: (pair,) * n,
    )
refuse(
    PADDED,
    ArgumentError,
    named("padding"),
    label="too-many-pairs",
    torch=False,
    padding=lambda n: ((0, 0),) * (n + 1),
)
refuse(
    PADDED,
    FastconvError,
    named("padding"),
    torch=False,
    dims=(2, 3),
    label="padding-pair-and-number",
    padding=lambda n: ((1, 1),) + (1,) * (n - 1),
)
for value in (2, (2,), 3, HUGE):
    refuse((MAX, AVG, AVG_BACK), ArgumentError, named("padding"), padding=value)
    refuse(LP, ArgumentError, named("padding"), torch=False, padding=value)
refuse(MAX, ArgumentError, named("padding"), kernel_size=2, padding=2)
refuse(MAX, ArgumentError, named("padding"), kernel_size=1, padding=1)
# Half of the kernel, whatever its dilation.
refuse(MAX, ArgumentError, named("padding"), padding=2, dilation=2)
refuse(MAX, ArgumentError, named("padding"), kernel_size=2, padding=2, dilation=2)
refuse(MAX, ArgumentError, named("padding"), kernel_size=1, padding=1, dilation=3)
refuse(
    (MAX, AVG),
    ArgumentError,
    named("padding"),
    label="padding-over-half-empty-batch",
    x=lambda n: ramp(0, 3, *(6,) * n),
    padding=2,
)

# -- sizes that leave no output
SMALL = r"\b(x|weight|kernel|kernel_size|input_shape|output)\b"
refuse(CONVS, ShapeError, SMALL, label="kernel-too-large", x=lambda n: ramp(2, 4, *(6,) * (n - 1), 2))
refuse(
    CONVS,
    ShapeError,
    SMALL,
    label="kernel-too-large-padded",
    x=lambda n: ramp(2, 4, *(6,) * n),
    weight=lambda n: ramp(6, 2, *(9,) * n),
    padding=1,
)
refuse(CONVS, ShapeError, SMALL, label="kernel-too-large-dilated", dilation=3)
refuse(CONVS, ShapeError, SMALL, label="kernel-too-large-empty-batch", x=lambda n: ramp(0, 4, *(2,) * n))
refuse(
    CONVS,
    ShapeError,
    SMALL,
    label="kernel-too-large-no-channels",
    x=lambda n: ramp(2, 0, *(2,) * n),
    weight=lambda n: ramp(6, 0, *(3,) * n),
)
refuse(CONVS, ShapeError, SMALL, label="empty-image", x=lambda n: ramp(2, 4, *(6,) * (n - 1), 0))
for padding in (2, "same"):
    refuse(
        CONVS,
        ShapeError,
        SMALL,
        label=f"empty-image-padding-{padding}",
        x=lambda n: ramp(2, 4, *(6,) * (n - 1), 0),
        padding=padding,
    )
refuse(CONVS, ShapeError, SMALL, torch=False, label="dilation-overflows", dilation=HUGE)
refuse(CONVS, ShapeError, SMALL, label="dilation-huge", dilation=2**40)
refuse(CONVS, ArgumentError, r"\b(padding|output)\b", label="padding-huge", padding=HUGE)
refuse(TRANSPOSES, ArgumentError, SMALL + r"|\bpadding\b", label="padding-leaves-nothing", padding=4)
# PyTorch's oneDNN path lets an output of size 0 pass in float32.
refuse(
    TRANSPOSE,
    ArgumentError,
    SMALL + r"|\bpadding\b",
    label="padding-leaves-zero",
    x=lambda n: ramp(2, 4, *(2,) * n, dtype="float64"),
    weight=lambda n: ramp(4, 3, *(3,) * n, dtype="float64"),
    stride=1,
    padding=2,
)
refuse(
    TRANSPOSES,
    ArgumentError,
    SMALL + r"|\bpadding\b",
    label="padding-leaves-less-than-nothing-empty-batch",
    x=lambda n: ramp(0, 4, *(1,) * n),
    stride=1,
    padding=2,
)
for name in ("stride", "padding", "dilation"):
    refuse(TRANSPOSES, ArgumentError, rf"\b({name}|output|shape)\b", label=f"{name}-huge", **{name: HUGE})
refuse(TRANSPOSES, ShapeError, named("x"), label="empty-image", x=lambda n: ramp(2, 4, *(3,) * (n - 1), 0))

for value in (2, 3, (2,)):
    refuse(TRANSPOSES, ArgumentError, named("output_padding"), output_padding=value)
refuse(TRANSPOSES, ArgumentError, named("output_padding"), stride=1, output_padding=1)
refuse(TRANSPOSES, ArgumentError, named("output_padding"), stride=1, dilation=2, output_padding=2)
refuse(TRANSPOSES, ArgumentError, named("output_padding"), stride=3, dilation=2, output_padding=3)

for size in (6, 9, -1, 0, HUGE):
    refuse(
        TRANSPOSE,
        ArgumentError,
        named("output_size"),
        label=f"output_size=[{size}]*n",
        output_size=lambda n, size=size: [size] * n,
    )
refuse(
    TRANSPOSE,
    ArgumentError,
    named("output_size"),
    label="output_size-within-dilation",
    stride=1,
    dilation=3,
    output_size=lambda n: [10] * n,
)
for count in (1, 3, -1):
    refuse(
        TRANSPOSE,
        ArgumentError,
        named("output_size"),
        label=f"output_size-with-{count}-more",
        output_size=lambda n, count=count: [7] * (n + count),
    )
for value in (7, 7.0, "7", True):
    refuse(TRANSPOSE, ArgumentTypeError, named("output_size"), output_size=value)
for value in (8.0, None, "8"):
    refuse(
        TRANSPOSE,
        ArgumentTypeError,
        named("output_size"),
        label=f"output_size=[{value!r}]*n",
        output_size=lambda n, value=value: [value] * n,
    )
refuse(
    TRANSPOSE,
    ArgumentError,
    r"output_size.*output_padding|output_padding.*output_size",
    torch=False,
    label="output_size-and-output_padding",
    output_size=lambda n: [8] * n,
    output_padding=1,
)

for kernel in (7, 8, 2**40, HUGE):
    refuse(
        (MAX, AVG, LP, "unfold"),
        ArgumentError,
        SMALL,
        label=f"kernel_size={kernel}",
        torch=kernel < 2**40,
        kernel_size=kernel,
    )
refuse(
    (MAX, AVG, LP),
    ShapeError,
    SMALL,
    label="kernel-too-large-empty-batch",
    x=lambda n: ramp(0, 3, *(2,) * n),
)
refuse((MAX, AVG), ShapeError, SMALL, kernel_size=9, padding=1)
refuse((MAX, AVG, LP), ShapeError, SMALL, kernel_size=8, stride=1, ceil_mode=True)
refuse((MAX, "unfold"), ShapeError, SMALL, dilation=3)
refuse((MAX, "unfold"), ShapeError, SMALL, dilation=2**40, torch=False)
refuse((MAX, "unfold"), ShapeError, SMALL, dilation=HUGE, torch=False)
refuse("unfold", ArgumentError, r"\b(padding|output)\b", padding=HUGE, torch=False)
refuse("fold", ArgumentError, r"\b(output_size|output|cols)\b", output_size=HUGE)
refuse((ADAPTIVE_AVG, ADAPTIVE_MAX), ArgumentError, r"\b(output_size|output)\b", output_size=HUGE)

# -- pools want channels and pixels; only the batch may be empty
POOLS = (MAX, AVG, LP, ADAPTIVE_MAX)
for label, shape in (
    ("no-channels", lambda n: (2, 0, *(6,) * n)),
    ("no-channels-empty-batch", lambda n: (0, 0, *(6,) * n)),
):
    refuse(POOLS, ShapeError, named("x"), label=label, x=lambda n, shape=shape: ramp(*shape(n)))
refuse((MAX, AVG, LP), ShapeError, named("x"), label="no-channels-unbatched", x=lambda n: ramp(0, *(6,) * n))
for batch in (0, 2):
    refuse(
        (MAX, AVG, LP, ADAPTIVE_AVG, ADAPTIVE_MAX),
        ShapeError,
        named("x"),
        label=f"empty-image-batch-{batch}",
        x=lambda n, batch=batch: ramp(batch, 3, *(6,) * (n - 1), 0),
    )
refuse(
    (MAX, AVG),
    ShapeError,
    named("x"),
    label="empty-image-padded",
    x=lambda n: ramp(2, 3, *(6,) * (n - 1), 0),
    kernel_size=2,
    padding=1,
)
refuse(
    (ADAPTIVE_AVG, ADAPTIVE_MAX),
    ShapeError,
    named("x"),
    label="empty-image-empty-output",
    x=lambda n: ramp(2, 3, *(6,) * (n - 1), 0),
    output_size=0,
)
refuse("unfold", ShapeError, named("x"), label="no-channels", x=ramp(2, 0, 6, 6))
refuse("unfold", ShapeError, named("x"), label="no-channels-unbatched", x=ramp(0, 6, 6))
refuse("unfold", ShapeError, named("x"), label="empty-image-padded", x=ramp(2, 3, 0, 6), padding=2)

# -- flags, norms, divisors
refuse_flag((MAX, AVG, LP, AVG_BACK), "ceil_mode")
refuse_flag((AVG, AVG_BACK), "count_include_pad")
refuse((AVG, AVG_BACK), ArgumentError, named("divisor_override", 0), torch=(2, 3), divisor_override=0)
for value in (1.5, True, "2", (2,)):
    refuse((AVG, AVG_BACK), ArgumentTypeError, named("divisor_override"), torch=(2, 3), divisor_override=value)
refuse(LP, ArgumentError, named("norm_type", 0), norm_type=0)
refuse(LP, ArgumentError, named("norm_type", 0.0), norm_type=0.0)
for value in (None, "2", (2,), 1j):
    refuse(LP, ArgumentTypeError, named("norm_type"), torch=value != 1j and value != (2,), norm_type=value)
for family in (ADAPTIVE_AVG, ADAPTIVE_MAX):
    for value in (0.5, "4x4"):
        refuse(family, ArgumentTypeError, named("output_size"), output_size=value)

# -- max_unpool
refuse_sizes(UNPOOL, "kernel_size", torch=False)
refuse_sizes(UNPOOL, "stride", none=False, torch=False)
refuse_sizes(UNPOOL, "padding", minimum=0, torch=False)
for label, changed in (
    ("size", lambda n: indices(2, 3, *(3,) * n)),
    ("channels", lambda n: indices(2, 4, *(2,) * n)),
    ("batch", lambda n: indices(1, 3, *(2,) * n)),
    ("dimensions", lambda n: indices(3, *(2,) * n)),
):
    refuse(UNPOOL, ShapeError, named("indices"), label=f"indices-{label}", indices=changed)
    refuse(
        (MAX_BACK, ADAPTIVE_MAX_BACK),
        ShapeError,
        r"\b(indices|grad_output)\b",
        torch=False,
        label=f"indices-{label}",
        indices=changed,
    )
for value in (-1, "end", 2**62, -(2**63)):
    changed = lambda n, value=value: indices(2, 3, *(2,) * n, value=6**n if value == "end" else value)  # noqa: E731
    refuse((UNPOOL,), ArgumentError, named("indices"), label=f"indices-hold-{value}", indices=changed)
    refuse(UNPOOL_BACK, ArgumentError, named("indices"), torch=False, label=f"indices-hold-{value}", indices=changed)
# -1 is what max_pool itself returns for a window wholly in padding.
for value in (-2, "end", 2**62, -(2**63)):
    changed = lambda n, value=value: indices(2, 3, *(2,) * n, value=6**n if value == "end" else value)  # noqa: E731
    refuse(
        MAX_BACK,
        ArgumentError,
        named("indices"),
        torch=False,
        label=f"indices-hold-{value}",
        indices=changed,
    )
    refuse(
        ADAPTIVE_MAX_BACK,
        ArgumentError,
        named("indices"),
        torch=False,
        label=f"indices-hold-{value}",
        indices=lambda n, value=value: indices(2, 3, *(4,) * n, value=6**n if value == "end" else value),
    )


def one_bad_index(n: int) -> np.ndarray:
    bad = indices(2, 3, *(2,) * n)
    bad.flat[-1] = 6**n
    return bad


refuse(UNPOOL, ArgumentError, named("indices"), label="last-index-outside", indices=one_bad_index)
refuse(
    (MAX_BACK, UNPOOL_BACK),
    ArgumentError,
    named("indices"),
    torch=False,
    label="last-index-outside",
    indices=one_bad_index,
)
refuse(
    UNPOOL,
    ArgumentError,
    named("indices"),
    label="index-outside-smaller-output",
    output_size=lambda n: (5,) * n,
    indices=lambda n: indices(2, 3, *(2,) * n, value=5**n),
)
for size in (3, 9, 0, -1, HUGE):
    refuse(
        UNPOOL,
        ArgumentError,
        named("output_size"),
        label=f"output_size=[{size}]*n",
        output_size=lambda n, size=size: [size] * n,
    )
for count in (1, 3, -1):
    refuse(
        UNPOOL,
        ArgumentError,
        named("output_size"),
        label=f"output_size-with-{count}-more",
        output_size=lambda n, count=count: [6] * (n + count),
    )
refuse(UNPOOL, ArgumentError, named("output_size"), stride=1, output_size=lambda n: (5,) * n, label="stride-1")
for value in (6, 6.0, True):
    refuse(UNPOOL, ArgumentTypeError, named("output_size"), output_size=value)
for value in (6.0, "6", None):
    refuse(
        UNPOOL,
        ArgumentTypeError,
        named("output_size"),
        label=f"output_size=[{value!r}]*n",
        output_size=lambda n, value=value: [value] * n,
    )
refuse(UNPOOL, ArgumentError, r"\b(x|output|padding)\b", label="padding-leaves-nothing", padding=4)
for label, shape in (
    ("no-channels", lambda n: (2, 0, *(2,) * n)),
    ("no-channels-empty-batch", lambda n: (0, 0, *(2,) * n)),
    ("empty-image", lambda n: (2, 3, *(2,) * (n - 1), 0)),
):
    refuse(
        UNPOOL,
        ShapeError,
        named("x"),
        label=label,
        x=lambda n, shape=shape: ramp(*shape(n)),
        indices=lambda n, shape=shape: indices(*shape(n)),
    )

# -- gradients: what comes back must have the shape that went out
OTHER = r"\b(grad_output|input_shape|indices|x)\b"
for label, change in (
    ("spatial", lambda s: (*s[:-1], s[-1] + 1)),
    ("channels", lambda s: (s[0], s[1] + 1, *s[2:])),
    ("batch", lambda s: (s[0] + 1, *s[1:])),
    ("no-batch", lambda s: s[1:]),
    ("dimensions", lambda s: (*s, 1)),
):
    for family in WITH_GRADIENT:
        if family == UNPOOL_BACK and label == "spatial":
            continue  # the size of the unpooled plane is free
        if family == ADAPTIVE_AVG_BACK and label == "spatial":
            continue  # and so is that of an adaptive pool
        refuse(
            family,
            ShapeError,
            OTHER,
            torch=family in (CONV_BACK, TRANSPOSE_BACK, AVG_BACK),
            label=f"grad_output-{label}",
            grad_output=lambda n, family=family, change=change: ramp(*change(BASES[family](n)["grad_output"].shape)),
        )
for family in SIZED_BACKWARD:
    for label, value in (
        ("short", lambda n: (6,) * n),
        ("long", lambda n: (1, 2, 3, *(6,) * n)),
        ("batch", lambda n: (3, 3, *(6,) * n)),
        ("channels", lambda n: (2, 4, *(6,) * n)),
        ("negative", lambda n: (2, 3, *(6,) * (n - 1), -6)),
        ("empty-image", lambda n: (2, 3, *(6,) * (n - 1), 0)),
        ("unbatched", lambda n: (3, *(6,) * n)),
    ):
        refuse(family, ArgumentError, OTHER, torch=False, label=f"input_shape-{label}", input_shape=value)
    for label, value in (
        ("float", lambda n: (2, 3, *(6.0,) * n)),
        ("None", lambda n: (2, 3, *(None,) * n)),
        ("bool", lambda n: (2, 3, *(True,) * n)),
    ):
        refuse(
            family,
            ArgumentTypeError,
            named("input_shape"),
            torch=False,
            label=f"input_shape-{label}",
            input_shape=value,
        )
    for value in (None, 6, "6666", 1.0):
        refuse(family, ArgumentTypeError, named("input_shape"), torch=False, input_shape=value)
refuse(
    AVG_BACK,
    ShapeError,
    OTHER,
    label="grad_output-of-another-pooling",
    kernel_size=2,
)
for needs in (("inputs",), ("input", "x"), ("input", 3), "input_weight", 5, None, ("input", None)):
    refuse(
        (CONV_BACK, TRANSPOSE_BACK),
        FastconvError,
        named("needs"),
        torch=False,
        needs=needs,
    )

# -- options
refuse_options((*EVERY_ND,), "data_format", "NCHW")
refuse(EVERY_ND, ArgumentTypeError, named("data_format", None), torch=False, data_format=None)
refuse_options(CONVS, "padding_mode", "mirror")
refuse(CONVS, ArgumentTypeError, named("padding_mode", None), torch=False, padding_mode=None)
refuse_options(CONV, "activation", "gelu")
refuse_options((*CONVS, *TRANSPOSES), "algorithm")
refuse_options((*CONVS, *TRANSPOSES), "precision", "exact")
refuse(
    (CONV, CONV_BACK),
    ShapeError,
    r"\b(x|weight|channels)\b",
    torch=False,
    label="channels-last-of-a-channels-first-x",
    data_format="channels_last",
)
refuse(
    (CONV,),
    UnsupportedError,
    "winograd",
    torch=False,
    label="winograd-with-stride",
    algorithm="winograd",
    stride=2,
)
refuse(
    (CONV,),
    UnsupportedError,
    "depthwise",
    torch=False,
    label="depthwise-of-a-dense-convolution",
    algorithm="depthwise",
)

for label, value, error in (
    ("shape", lambda n: full(2, 6, *(5,) * n), ShapeError),
    ("dimensions", lambda n: full(6, *(4,) * n), ShapeError),
    ("dtype", lambda n: full(2, 6, *(4,) * n, dtype="float64"), DTypeError),
    ("read-only", lambda n: read_only(full(2, 6, *(4,) * n)), ArgumentError),
    ("list", lambda n: [1.0], ArgumentTypeError),
    ("string", lambda n: "out", ArgumentTypeError),
):
    refuse(CONV, error, named("out"), torch=False, label=f"out-{label}", out=value)

# -- borders that are copied from x
for mode, most in (("reflect", 5), ("circular", 6)):
    for extra in (1, HUGE):
        refuse(
            CONV,
            ArgumentError,
            named("padding"),
            label=f"{mode}-by-{most}+{extra}",
            padding_mode=mode,
            padding=most + extra,
        )
    refuse(
        CONV,
        ArgumentError,
        named("padding"),
        label=f"{mode}-too-wide-empty-batch",
        padding_mode=mode,
        padding=most + 1,
        x=lambda n: ramp(0, 4, *(6,) * n),
    )
    refuse(
        CONV,
        ArgumentError,
        named("padding"),
        label=f"{mode}-same-too-wide",
        padding_mode=mode,
        padding="same",
        dilation=7,
    )
refuse(
    CONV,
    ArgumentError,
    named("padding"),
    torch=False,
    label="symmetric-too-wide",
    padding_mode="symmetric",
    padding=7,
)
for mode in ("reflect", "circular", "replicate"):
    refuse(
        CONV,
        ArgumentError,
        r"\b(padding|x)\b",
        label=f"{mode}-of-an-empty-image",
        padding_mode=mode,
        padding=2,
        x=lambda n: ramp(2, 4, *(6,) * (n - 1), 0),
    )
for mode in ("reflect", "symmetric", "replicate", "circular"):
    refuse(
        CONV,
        ArgumentError,
        named("padding", -1),
        torch=False,
        label=f"{mode}-negative",
        padding_mode=mode,
        padding=-1,
    )

# -- what PyTorch refuses in some places only; refused here where it is
for value in ((3,), [3]):
    refuse(("unfold", "fold"), ArgumentError, named("kernel_size"), kernel_size=value)
    refuse(LP, ArgumentError, named("kernel_size"), dims=(2, 3), kernel_size=value)
    refuse(UNPOOL, ArgumentError, named("kernel_size"), dims=(2, 3), kernel_size=value)
    refuse((ADAPTIVE_AVG, ADAPTIVE_MAX), ArgumentError, named("output_size"), dims=(2, 3), output_size=value)
for name in ("stride", "dilation", "padding"):
    refuse(("unfold", "fold"), ArgumentError, named(name), **{name: (1,)})
refuse("fold", ArgumentError, named("output_size"), output_size=(6,))
refuse(AVG, ShapeError, SMALL, dims=(3,), kernel_size=7, padding=1, label="kernel-larger-than-unpadded-x")
refuse((AVG, LP), ShapeError, SMALL, dims=(3,), kernel_size=8, stride=8, ceil_mode=True)
refuse(
    ADAPTIVE_AVG,
    ShapeError,
    named("x"),
    dims=(3,),
    label="no-channels",
    x=lambda n: ramp(2, 0, *(6,) * n),
)
for mode in ("reflect", "replicate"):
    refuse(
        CONV,
        ShapeError,
        r"\b(x|padding_mode)\b",
        label=f"{mode}-of-no-channels",
        padding_mode=mode,
        padding=1,
        groups=1,
        x=lambda n: ramp(2, 0, *(6,) * n),
        weight=lambda n: ramp(6, 0, *(3,) * n),
    )


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_refused(row: Row) -> None:
    operation = getattr(fastconv, row.name)
    with pytest.raises(row.error, match=row.match) as caught:
        operation(**arguments(row.family, row.n, row.changes))
    assert isinstance(caught.value, FastconvError)


@pytest.mark.parametrize("row", [row for row in ROWS if row.torch], ids=str)
def test_pytorch_refuses_it_too(row: Row) -> None:
    with pytest.raises(TORCH_REFUSES):
        torch_call(row.family, row.n, arguments(row.family, row.n, row.changes))


def test_errors_are_exported_and_are_what_python_users_expect() -> None:
    for error in (ArgumentError, ArgumentTypeError, DTypeError, ShapeError, UnsupportedError, FastconvError):
        assert getattr(fastconv, error.__name__) is error
        assert issubclass(error, FastconvError)
    assert issubclass(ShapeError, ValueError)
    assert issubclass(ArgumentError, ValueError)
    assert issubclass(DTypeError, TypeError)
    assert issubclass(ArgumentTypeError, TypeError)


# --- accepted, at the edges ---------------------------------------------------------------------------------

EDGES: list[Row] = []


def accept(families: str | tuple[str, ...], label: str, *, dims: tuple[int, ...] = ALL, **changes: Any) -> None:
    """Add one row per family and dimension."""
    for family in (families,) if isinstance(families, str) else families:
        EDGES.extend(Row(family, n, label, changes) for n in dims_of(family) if n in dims)


for family in BASES:
    accept(family, "base")


def with_shape(name: str, *lead: int, size: int = 6) -> dict[str, Callable[[int], np.ndarray]]:
    return {name: lambda n: ramp(*lead, *(size,) * n)}


# -- empty batches, no batch, no channels
accept((CONV, TRANSPOSE), "empty-batch", **with_shape("x", 0, 4))
accept((CONV, TRANSPOSE), "empty-batch-bias", bias=full(6), **with_shape("x", 0, 4))
accept((CONV, TRANSPOSE), "unbatched", bias=ramp(6), **with_shape("x", 4))
accept((CONV, TRANSPOSE), "one-pixel-padded", padding=1, **with_shape("x", 2, 4, size=1))
accept(CONV, "empty-batch-empty-image", padding=2, x=lambda n: ramp(0, 4, *(6,) * (n - 1), 0))
accept(TRANSPOSE, "empty-batch-empty-image", x=lambda n: ramp(0, 4, *(6,) * (n - 1), 0))
accept(TRANSPOSE, "empty-batch-empty-output", stride=1, padding=2, **with_shape("x", 0, 4, size=2))
# Without input channels PyTorch's result has no channels either, whatever the number of filters.
NO_CHANNELS = {"weight": lambda n: ramp(6, 0, *(3,) * n), "groups": 1}
accept(CONV, "no-channels", **NO_CHANNELS, **with_shape("x", 2, 0))
accept(CONV, "no-channels-bias", bias=full(6), **NO_CHANNELS, **with_shape("x", 2, 0))
accept(CONV, "no-channels-unbatched", **NO_CHANNELS, **with_shape("x", 0))
accept(CONV, "no-channels-empty-batch", **NO_CHANNELS, **with_shape("x", 0, 0))
accept(CONV, "no-channels-groups", **{**NO_CHANNELS, "groups": 2}, **with_shape("x", 2, 0))
accept(CONV, "no-channels-stride-padding", stride=2, padding=1, **NO_CHANNELS, **with_shape("x", 2, 0))
accept(CONV, "no-channels-circular", padding=1, padding_mode="circular", **NO_CHANNELS, **with_shape("x", 2, 0))
accept(CONV_BACK, "empty-batch", **with_shape("x", 0, 4), **with_shape("grad_output", 0, 6, size=4))
accept(CONV_BACK, "unbatched", **with_shape("x", 4), **with_shape("grad_output", 6, size=4))
accept(
    CONV_BACK,
    "no-channels",
    **NO_CHANNELS,
    **with_shape("x", 2, 0),
    **with_shape("grad_output", 2, 0, size=4),
)
accept(TRANSPOSE_BACK, "empty-batch", **with_shape("x", 0, 4, size=3), **with_shape("grad_output", 0, 6, size=7))
accept(TRANSPOSE_BACK, "unbatched", **with_shape("x", 4, size=3), **with_shape("grad_output", 6, size=7))
accept((MAX, AVG, LP, ADAPTIVE_AVG, ADAPTIVE_MAX, "unfold"), "empty-batch", **with_shape("x", 0, 3))
accept((MAX, AVG, LP, ADAPTIVE_AVG, ADAPTIVE_MAX, "unfold"), "unbatched", **with_shape("x", 3))
accept((ADAPTIVE_AVG, ADAPTIVE_MAX), "no-channels-unbatched", **with_shape("x", 0))
accept(ADAPTIVE_AVG, "no-channels", dims=(1, 2), **with_shape("x", 2, 0))
accept(ADAPTIVE_AVG, "no-channels-to-one", output_size=1, **with_shape("x", 2, 0))
accept((ADAPTIVE_AVG, ADAPTIVE_MAX), "empty-batch-empty-output", output_size=0, **with_shape("x", 0, 3))
accept("fold", "empty-batch", cols=ramp(0, 27, 16))
accept("fold", "unbatched", cols=ramp(27, 16))
for lead in ((0, 3), (3,)):
    accept(
        UNPOOL,
        f"lead-{lead}",
        x=lambda n, lead=lead: ramp(*lead, *(2,) * n),
        indices=lambda n, lead=lead: places(*lead, n=n),
    )
    accept(
        UNPOOL_BACK,
        f"lead-{lead}",
        grad_output=lambda n, lead=lead: ramp(*lead, *(6,) * n),
        indices=lambda n, lead=lead: indices(*lead, *(2,) * n),
    )
    for family, size in ((AVG_BACK, 2), (ADAPTIVE_AVG_BACK, 4), (MAX_BACK, 2), (ADAPTIVE_MAX_BACK, 4)):
        change = {
            "grad_output": lambda n, lead=lead, size=size: ramp(*lead, *(size,) * n),
            "input_shape": lambda n, lead=lead: [*lead, *(6,) * n],
        }
        if family in (MAX_BACK, ADAPTIVE_MAX_BACK):
            change["indices"] = lambda n, lead=lead, size=size: indices(*lead, *(size,) * n)
        accept(family, f"lead-{lead}", **change)

# -- the forms of a size
for value in (2, (2,), [2], np.int64(2), (np.int32(2),)):
    accept((CONV, MAX, AVG, LP), f"stride={value!r}", stride=value)
for kind in (tuple, list):
    every = {
        name: lambda n, kind=kind, value=value: kind((value,) * n)
        for name, value in (("stride", 2), ("padding", 1), ("dilation", 2))
    }
    accept(CONV, f"sizes-{kind.__name__}", **every)
    accept("unfold", f"sizes-{kind.__name__}", kernel_size=kind((2, 3)), stride=kind((2, 1)))
    accept("fold", f"sizes-{kind.__name__}", output_size=kind((6, 6)), kernel_size=kind((3, 3)))
accept((CONV, TRANSPOSE), "groups-numpy", groups=np.int64(2))
for empty in (None, (), []):
    accept((MAX, AVG, LP), f"stride={empty!r}", stride=empty)
accept(MAX, "kernel_size-of-one-entry", kernel_size=(3,), padding=(1,), dilation=[1])
accept(UNPOOL, "output_size-spatial", output_size=lambda n: (5, 8, 4)[:n])
accept(UNPOOL, "output_size-full", output_size=lambda n: [2, 3, *(8,) * n])
accept(UNPOOL, "output_size-of-a-stride", stride=2, output_size=lambda n: (6,) * n)
accept(UNPOOL, "padding", padding=1)
accept(UNPOOL, "last-index", indices=lambda n: indices(2, 3, *(2,) * n, value=6**n - 1))
for size in (7, 8):
    accept(TRANSPOSE, f"output_size-{size}", output_size=lambda n, size=size: (size,) * n)
    accept(TRANSPOSE, f"output_size-full-{size}", output_size=lambda n, size=size: [2, 6, *(size,) * n])
accept(TRANSPOSE, "output_size-unbatched", output_size=lambda n: (6, *(8,) * n), **with_shape("x", 4, size=3))
accept(TRANSPOSE, "output_padding-below-dilation", stride=1, dilation=3, output_padding=2)
accept(TRANSPOSE, "padding-over-kernel", padding=3, **with_shape("x", 2, 4, size=5))
accept((ADAPTIVE_AVG, ADAPTIVE_MAX), "empty-output", output_size=0)
accept((ADAPTIVE_AVG, ADAPTIVE_MAX), "output-larger-than-x", output_size=9)
accept(
    (ADAPTIVE_AVG, ADAPTIVE_MAX),
    "output_size-None",
    dims=(2, 3),
    output_size=lambda n: (None,) * (n - 1) + (2,),
)
accept(
    (ADAPTIVE_AVG, ADAPTIVE_MAX),
    "output_size-one-zero",
    dims=(2, 3),
    output_size=lambda n: (0,) + (2,) * (n - 1),
)
accept("unfold", "padding-over-kernel", padding=9)
accept("fold", "padding", cols=ramp(2, 27, 64), padding=2)

# -- padding of a convolution
accept(CONV, "same-even-kernel", padding="same", weight=lambda n: ramp(6, 2, *(2,) * n))
accept(CONV, "same-even-kernel-dilated", padding="same", dilation=3, weight=lambda n: ramp(6, 2, *(2,) * n))
accept(CONV, "same-empty-batch", padding="same", **with_shape("x", 0, 4))
accept(CONV, "same-unbatched", padding="same", **with_shape("x", 4))
accept(CONV, "same-small-image", padding="same", **with_shape("x", 2, 4, size=1))
accept(CONV, "valid-with-stride", padding="valid", stride=2)
for mode, padding in (("reflect", 5), ("circular", 6), ("replicate", 9)):
    accept(CONV, f"{mode}-widest", padding_mode=mode, padding=padding)
    accept(CONV, f"{mode}-empty-batch", padding_mode=mode, padding=1, **with_shape("x", 0, 4))
    accept(CONV, f"{mode}-unbatched", padding_mode=mode, padding=2, **with_shape("x", 4))
    accept(
        CONV,
        f"{mode}-same-even-kernel",
        padding_mode=mode,
        padding="same",
        weight=lambda n: ramp(6, 2, *(2,) * n),
    )

# -- sizes that are never stepped may be huge
for value in (2**31, 2**40, HUGE):
    accept(CONV, f"stride={value}", stride=value)
    accept(CONV, f"dilation-of-a-1x1-kernel={value}", dilation=value, weight=lambda n: ramp(6, 2, *(1,) * n))
accept((MAX, AVG, LP), "stride=2**31-1", stride=2**31 - 1)
accept("unfold", "stride=2**62", stride=HUGE)
accept((MAX, AVG), "kernel-over-x-in-ceil-mode", dims=(1, 2), kernel_size=8, stride=8, ceil_mode=True)
accept(MAX, "kernel-over-x-in-ceil-mode-3d", dims=(3,), kernel_size=8, stride=8, ceil_mode=True)
for size in (4, 5, 7):
    for stride in (1, 2, 3, 4):
        for padding in (0, 1):
            accept(
                (MAX, AVG),
                f"ceil-mode-{size}-{stride}-{padding}",
                stride=stride,
                padding=padding,
                ceil_mode=True,
                **with_shape("x", 2, 3, size=size),
            )

# -- values at the edge
accept(MAX, "all-minus-infinity", padding=1, x=lambda n: full(1, 2, *(6,) * n, value=-INF))
accept(ADAPTIVE_MAX, "all-minus-infinity", x=lambda n: full(1, 2, *(6,) * n, value=-INF))
accept((MAX, ADAPTIVE_MAX), "ties", x=lambda n: full(1, 2, *(6,) * n))
accept((MAX, ADAPTIVE_MAX), "zeros-of-both-signs", x=lambda n: full(1, 2, *(6,) * n) * ramp(1, 2, *(6,) * n) * 0)
accept(
    MAX,
    "window-wholly-in-padding",
    return_indices=False,
    kernel_size=2,
    padding=1,
    dilation=3,
    **with_shape("x", 2, 3, size=2),
)


def with_nans(n: int) -> np.ndarray:
    x = ramp(1, 2, *(6,) * n)
    x.flat[::3] = NAN
    x.flat[1::7] = INF
    return x


accept((MAX, ADAPTIVE_MAX), "several-nans", x=with_nans)
accept((MAX, ADAPTIVE_MAX), "all-nan", x=lambda n: full(1, 2, *(6,) * n, value=NAN))
accept((MAX, ADAPTIVE_MAX), "several-nans-float64", x=lambda n: with_nans(n).astype("float64"))
accept((MAX, ADAPTIVE_MAX), "several-nans-float16", x=lambda n: with_nans(n).astype("float16"))
accept((AVG, LP, ADAPTIVE_AVG), "several-nans", x=with_nans)
accept(UNPOOL, "duplicates-keep-the-last", indices=lambda n: indices(2, 3, *(2,) * n, value=1))
accept(UNPOOL_BACK, "duplicates", indices=lambda n: indices(2, 3, *(2,) * n, value=1))
accept(AVG, "divisor-negative", dims=(2, 3), divisor_override=-2)
accept(AVG, "divisor-huge", dims=(2, 3), divisor_override=HUGE)
accept(AVG, "count_include_pad", padding=1, count_include_pad=False)
accept(AVG, "count_include_pad-ceil", padding=1, stride=2, count_include_pad=False, ceil_mode=True)
for norm in (1, 2, 3, 2.5, -1, INF, -INF):
    accept(
        LP,
        f"norm_type={norm}",
        norm_type=norm,
        x=lambda n: full(1, 2, *(6,) * n) + abs(ramp(1, 2, *(6,) * n)),
    )
# Negative x with odd p is a documented difference: magnitudes are summed, as in ONNX.
accept(LP, "negative", norm_type=2, x=lambda n: -full(1, 2, *(6,) * n))
accept(LP, "zeros", x=lambda n: full(1, 2, *(6,) * n, value=0))
accept(LP, "partial-windows", kernel_size=2, ceil_mode=True, x=lambda n: full(1, 2, *(5,) * n))
accept(
    LP,
    "partial-windows-infinity",
    norm_type=INF,
    kernel_size=2,
    ceil_mode=True,
    **with_shape("x", 1, 2, size=5),
)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("row", EDGES, ids=str)
def test_accepted_edges(row: Row) -> None:
    expected = to_numpy(torch_call(row.family, row.n, arguments(row.family, row.n, row.changes)))
    result = getattr(fastconv, row.name)(**arguments(row.family, row.n, row.changes))
    if not isinstance(expected, tuple):
        result, expected = (result,), (expected,)
    assert len(result) == len(expected)
    for got, wanted in zip(result, expected):
        assert isinstance(got, np.ndarray)
        assert got.shape == wanted.shape
        assert got.dtype == wanted.dtype
        if got.dtype.kind == "f":
            # Winograd's rounding is that of the largest elements, in every element.
            largest = np.abs(wanted).max(initial=5, where=np.isfinite(wanted))
            np.testing.assert_allclose(got, wanted, rtol=2e-3 if got.dtype == np.float16 else 1e-5, atol=2e-6 * largest)
        else:
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("row", EDGES, ids=str)
def test_pytorch_accepts_it_too(row: Row) -> None:
    torch_call(row.family, row.n, arguments(row.family, row.n, row.changes))
