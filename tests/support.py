"""What several test modules share: memory layouts, data for a case, odd arrays, other processes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fastconv
from fastconv import reference, registry, selection
from fastconv.testing import ConvCase, PoolCase, assert_close, tolerance


def _runs_here(algorithm: registry.Algorithm, dtype: str = "float32") -> bool:
    """Whether the machine has what an algorithm needs; `test_bfloat16.py` tests those that are refused without it."""
    smallest = fastconv.ConvGeometry.create((1, 1, 8, 8), (1, 1, 3, 3), dtype=dtype)
    return algorithm.supports(selection.lifted(smallest, "channels_first")).ok


ALGORITHMS = tuple(a.name for a in registry.on("cpu") if _runs_here(a))
# Those that compute in float64: finite differences need it.
FLOAT64 = tuple(a.name for a in registry.on("cpu") if _runs_here(a, "float64"))


def with_algorithms(*dtypes):
    """Return a mark that runs a test with each (algorithm, dtype) that there is: split precision is float32's alone."""
    names, wide = [*ALGORITHMS, "auto"], (*FLOAT64, "auto")
    pairs = [(name, d) for name in names for d in dtypes if "float64" not in str(d) or name in wide]
    return pytest.mark.parametrize(("algorithm", "dtype"), pairs, ids=[f"{name}-{d}" for name, d in pairs])


# What each level of `precision` promises: the root-mean-square error over the root-mean-square of the result.
PROMISES = {"highest": 1e-6, "high": 2e-5, "medium": 5e-3}
# Sums of products as they stand, so that whole numbers come out exact.
EXACT = tuple(name for name in ALGORITHMS if not name.startswith(("fft", "winograd")))
DIRECTIONS = ("forward", "input_grad", "weight_grad")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


# --- memory layouts --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How a test hands over an image: as which data format, over which memory."""

    name: str
    data_format: str
    memory: str

    def __str__(self) -> str:
        return self.name

    def put(self, x: np.ndarray) -> np.ndarray:
        """Return a copy of a batched channels-first array as the caller would hold it."""
        if self.memory == "channels_first":
            return np.array(x, order="C")
        last = np.array(np.moveaxis(x, 1, -1), order="C")
        return last if self.data_format == "channels_last" else np.moveaxis(last, -1, 1)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return a channels-first shape in the data format."""
        return shape if self.data_format == "channels_first" else (shape[0], *shape[2:], shape[1])

    def back(self, y: np.ndarray) -> np.ndarray:
        """Return a batched result as channels-first."""
        return y if self.data_format == "channels_first" else np.moveaxis(y, -1, 1)

    def lies_right(self, y: np.ndarray, x: np.ndarray) -> bool:
        """Return True if a result has the memory format of the input; one channel or one pixel has both."""
        plain = self.memory == self.data_format or x.flags.c_contiguous
        return (y if plain else np.moveaxis(y, 1, -1)).flags.c_contiguous


FIRST = Layout("first", "channels_first", "channels_first")
LAST = Layout("last", "channels_last", "channels_last")
VIEW = Layout("first-over-last", "channels_first", "channels_last")
LAYOUTS = (FIRST, LAST, VIEW)


# --- data and expected results ---------------------------------------------------------------------------------


def rng(*key: Any) -> np.random.Generator:
    """A generator that depends on its key alone, in every process."""
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def normal(*key: Any, shape: tuple[int, ...], dtype: Any = "float64") -> np.ndarray:
    return rng(*key).standard_normal(shape).astype(dtype)


def whole(*key: Any, shape: tuple[int, ...], dtype: Any = "float32") -> np.ndarray:
    """Small whole numbers of both signs."""
    return rng(*key).integers(-4, 5, shape).astype(dtype)


def each(value: Any, dims: int) -> tuple[Any, ...]:
    return (value,) * dims if np.ndim(value) == 0 else tuple(value)


def op(name: str, dims: int) -> Callable[..., Any]:
    """Return a public operation: op("conv{}d", 2) is fastconv.conv2d."""
    return getattr(fastconv, name.format(dims))


@dataclass(frozen=True)
class ConvProblem:
    """Operands of a case, channels-first, and what the oracle makes of them."""

    case: ConvCase
    dtype: np.dtype
    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    grad: np.ndarray
    y: np.ndarray
    grads: tuple[np.ndarray, np.ndarray, np.ndarray]
    how: dict[str, Any] = field(default_factory=dict)

    @property
    def lengths(self) -> dict[str, int]:
        """Products summed for one element of each result."""
        taps = math.prod(self.case.weight_shape[2:])
        pixels = max(self.y.shape[0] * math.prod(self.y.shape[2:]), 1)
        forward = self.case.weight_shape[1] * taps
        return {
            "forward": forward + 1,
            "input_grad": self.case.weight_shape[0] // self.case.groups * taps,
            "weight_grad": pixels,
            "bias": pixels,
        }

    def geometry(self, layout: Layout = FIRST, dtype: Any = None) -> fastconv.ConvGeometry:
        return fastconv.ConvGeometry.create(
            layout.shape(self.case.x_shape),
            self.case.weight_shape,
            data_format=layout.data_format,
            dtype=self.dtype if dtype is None else dtype,
            **self.how,
        )


def conv_arguments(case: ConvCase) -> dict[str, Any]:
    return {
        "stride": case.stride,
        "padding": case.padding,
        "dilation": case.dilation,
        "groups": case.groups,
        "padding_mode": case.padding_mode,
    }


@cache
def conv_problem(case: ConvCase, dtype: Any, make: Callable[..., np.ndarray] = normal) -> ConvProblem:
    dtype, how = np.dtype(dtype), conv_arguments(case)
    x = make(case, "x", shape=case.x_shape, dtype=dtype)
    weight = make(case, "weight", shape=case.weight_shape, dtype=dtype)
    bias = make(case, "bias", shape=case.weight_shape[:1], dtype=dtype)
    y = reference.conv(x, weight, bias, **how)
    grad = make(case, "grad", shape=y.shape, dtype=dtype)
    grads = reference.conv_backward(grad, x, weight, **how)
    problem = ConvProblem(case, dtype, x, weight, bias, grad, y, grads, how)
    for array in (x, weight, bias, grad, y, *grads):
        array.flags.writeable = False
    return problem


def pool_arguments(case: PoolCase) -> dict[str, Any]:
    return {
        "kernel_size": case.kernel_size,
        "stride": case.stride,
        "padding": case.padding,
        "ceil_mode": case.ceil_mode,
        "dilation": case.dilation,
    }


def refusal(algorithm: str, geometry: fastconv.ConvGeometry, direction: str) -> str:
    """Return why an algorithm says that it cannot do this, or nothing."""
    (record,) = registry.named(algorithm, "cpu")
    support = record.supports(selection.lifted(geometry, geometry.data_format), direction)
    assert support.ok or support.reason, f"{algorithm} refuses without a reason"
    return "" if support.ok else support.reason


def stride_for(algorithm: str, stride: Any) -> Any:
    """Return the stride for a test of one geometry: 1 for an algorithm that has no other."""
    return 1 if algorithm.startswith("winograd") else stride


def per_group(algorithm: str, channels: int) -> int:
    """Return the channels per group for a test of one geometry: 1 for an algorithm that takes no more."""
    return 1 if algorithm == "depthwise" else channels


def promise(algorithm: str) -> str:
    """Return the level of `precision` to ask an algorithm for: its own."""
    return "highest" if algorithm == "auto" else registry.named(algorithm, "cpu")[0].precision


def check_conv(problem: ConvProblem, layout: Layout, algorithm: str) -> None:
    """Compare values and gradients with the oracle; whatever the algorithm refuses must be refused with its reason."""
    p, dims, context = problem, problem.case.spatial_dims, f"{problem.case}, {layout}"
    x, grad = layout.put(p.x), layout.put(p.grad)
    how = {**p.how, "data_format": layout.data_format, "algorithm": algorithm, "precision": promise(algorithm)}
    directions = {
        "forward": lambda: op("conv{}d", dims)(x, p.weight, p.bias, **how),
        "input_grad": lambda: op("conv{}d_backward", dims)(grad, x, p.weight, needs=["input"], **how).input,
        "weight_grad": lambda: op("conv{}d_backward", dims)(grad, x, p.weight, needs=["weight"], **how).weight,
    }
    expected = dict(zip(DIRECTIONS, (p.y, *p.grads)))
    for direction, call in directions.items():
        reason = "" if algorithm == "auto" else refusal(algorithm, p.geometry(layout), direction)
        if reason and not p.geometry().is_empty:
            assert_refused(call, reason, f"{context}, {direction}")
            continue
        if reason:
            continue
        result = call()
        assert result.dtype == p.dtype, f"{context}, {direction}: dtype {result.dtype}"
        if direction != "weight_grad":
            assert layout.lies_right(result, x), f"{context}, {direction}: strides {result.strides}"
            result = layout.back(result)
        assert_close(
            result,
            expected[direction],
            algorithm=chosen(p.geometry(layout), layout, direction) if algorithm == "auto" else algorithm,
            reduction_length=p.lengths[direction],
            err_msg=f"{context}, {direction}",
        )
    bias = op("conv{}d_backward", dims)(grad, x, p.weight, needs=["bias"], **p.how, data_format=layout.data_format)
    assert bias.input is None, context
    assert bias.weight is None, context
    # Terms may cancel, and their rounding errors not.
    terms = np.abs(p.grad.astype(np.float64)).sum(axis=(0, *range(2, p.grad.ndim)))
    allowed = tolerance(p.dtype, reduction_length=p.lengths["bias"]).elementwise * terms
    assert (np.abs(bias.bias.astype(np.float64) - p.grads[2]) <= allowed).all(), f"{context}, bias"


def chosen(geometry: fastconv.ConvGeometry, layout: Layout, direction: str | None) -> str:
    """Return the algorithm that "auto" takes, whose tolerance is the one that applies; sums need none."""
    if direction is None:
        return "direct"
    return selection.choose(geometry, direction, layout.memory, "cpu").algorithm.name


def assert_refused(call: Callable[[], Any], reason: str, context: str) -> None:
    """Raise unless the call is refused for this reason."""
    try:
        call()
    except fastconv.UnsupportedError as refused:
        error: Exception = refused
    else:
        raise AssertionError(f"{context}: computed although {reason}")
    assert reason in str(error), f"{context}: {error}"


# --- arrays of every kind --------------------------------------------------------------------------------------


def negative(x: np.ndarray) -> np.ndarray:
    return x[(slice(None, None, -1),) * x.ndim]


def reversed_last_axis(x: np.ndarray) -> np.ndarray:
    return x[..., ::-1]


def broadcast(x: np.ndarray) -> np.ndarray:
    """All strides zero but the last."""
    return np.broadcast_to(x[(0,) * (x.ndim - 1)], x.shape)


def transposed(x: np.ndarray) -> np.ndarray:
    """The first and the last axis change places in memory."""
    return np.ascontiguousarray(np.swapaxes(x, 0, -1)).swapaxes(0, -1)


def sliced(x: np.ndarray) -> np.ndarray:
    """Every second element of a larger array, from the second on."""
    larger = np.full([2 * n + 1 for n in x.shape], 99, x.dtype)
    view = larger[(slice(1, None, 2),) * x.ndim]
    view[...] = x
    return view


def unaligned(x: np.ndarray) -> np.ndarray:
    """An array that begins one byte into its memory."""
    memory = np.zeros(x.nbytes + 1, np.uint8)
    view = memory[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def byte_swapped(x: np.ndarray) -> np.ndarray:
    return x if x.dtype == BFLOAT16 else x.astype(x.dtype.newbyteorder())


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


def fortran(x: np.ndarray) -> np.ndarray:
    return np.asfortranarray(x)


class Subclass(np.ndarray):
    """An ndarray of another class."""


def subclassed(x: np.ndarray) -> np.ndarray:
    return x.copy().view(Subclass)


STRANGE = (
    negative,
    reversed_last_axis,
    broadcast,
    transposed,
    sliced,
    unaligned,
    byte_swapped,
    read_only,
    fortran,
    subclassed,
)


def plain(x: np.ndarray) -> np.ndarray:
    """The same values in an ordinary array."""
    return np.ascontiguousarray(x, x.dtype.newbyteorder("=")).view(np.ndarray)


# --- other processes -------------------------------------------------------------------------------------------

HERE = Path(__file__).parent


def run_python(script: str, *, timeout: float = 240, flags: tuple[str, ...] = (), **environment: str | None) -> str:
    """Run a script in a fresh interpreter, warnings being errors; return what it prints. None unsets a variable."""
    values = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]), **environment}
    kept = {"FASTCONV_CACHE_DIR", *environment}
    for name in [name for name in values if name.startswith("FASTCONV_") and name not in kept]:
        del values[name]
    command = [sys.executable, "-W", "error", *flags, "-c", script]
    try:
        done = subprocess.run(
            command,
            env={name: value for name, value in values.items() if value is not None},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        shown = "\n".join(str(part) for part in (error.stdout, error.stderr) if part)
        raise AssertionError(f"no answer after {timeout} s; it printed:\n{shown}") from None
    if done.returncode:
        raise AssertionError(f"exit status {done.returncode}; it printed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def tbb_directory() -> str | None:
    """Return where the tbb distribution keeps its library: pip does not put it on the loader's path."""
    try:
        files = metadata.files("tbb") or []
    except metadata.PackageNotFoundError:
        return None
    return next((str(Path(f.locate()).resolve().parent) for f in files if f.name.startswith("libtbb.so")), None)
