"""Is it right? Data for a layer, what float64 makes of it, and how far a result is from that.

`fastconv.reference` is the oracle. On large layers it computes a sample that is exact in itself: the first and the
last image of an output or an input gradient; some filters and channels of a weight gradient, over all images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fastconv import reference
from fastconv.geometry import ConvGeometry
from fastconv.testing import rms_error, tolerance

from .workloads import Workload

# Largest RMS error of a float32 result, by level of precision.
PROMISES = {"highest": 1e-6, "high": 2e-5, "medium": 5e-3}
# Operations of the oracle beyond which it takes a sample: a tenth of a second or so.
SAMPLE_FLOPS = 1e9
# A normally distributed error hardly ever exceeds eight standard deviations.
_LARGEST_OVER_RMS = 8.0
_HALF_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclass(frozen=True)
class Problem:
    """A layer with its operands, random normal and channels-first."""

    workload: Workload
    dtype: np.dtype
    x: np.ndarray
    weight: np.ndarray
    grad: np.ndarray

    @staticmethod
    def make(workload: Workload, dtype: Any = "float32", seed: int = 0) -> Problem:
        """Draw operands for a layer, the same ones every time."""
        geometry, rng = workload.geometry(dtype=dtype), np.random.default_rng(seed)
        shapes = (workload.x_shape, workload.weight_shape, geometry.output_shape)
        operands = (rng.standard_normal(shape, np.float32).astype(geometry.dtype) for shape in shapes)
        return Problem(workload, geometry.dtype, *operands)

    @cached_property
    def geometry(self) -> ConvGeometry:
        """All sizes, channels-first."""
        return self.workload.geometry(dtype=self.dtype)

    def reduction_length(self, direction: str) -> int:
        """Products summed for one element of a result."""
        g = self.geometry
        if direction == "weight_grad":
            return g.batch * math.prod(g.output_size)
        if direction == "input_grad":
            return g.out_channels // g.groups * math.prod(g.kernel_size)
        return g.reduction_length


@dataclass(frozen=True)
class Errors:
    """How far a result is from float64: RMS over RMS, and largest error over the largest value."""

    rms: float
    largest: float


class Oracle:
    """What float64 makes of a problem in one direction, or of a sample of it."""

    def __init__(self, problem: Problem, direction: str) -> None:
        self.direction = direction
        self._where: tuple[Any, ...]
        if direction == "weight_grad":
            self._where, self._expected = _weight_grad(problem)
        else:
            self._where, self._expected = _per_image(problem, direction)

    def errors(self, result: np.ndarray) -> Errors:
        """Compare a result, channels-first; raises ValueError for a wrong shape."""
        if result.ndim != self._expected.ndim:
            raise ValueError(f"{result.ndim} dimensions instead of {self._expected.ndim}")
        actual = result[self._where].astype(np.float64)
        if actual.shape != self._expected.shape:
            raise ValueError(f"shape {result.shape} does not fit")
        with np.errstate(all="ignore"):
            gap = float(np.abs(actual - self._expected).max(initial=0.0))
            scale = float(np.abs(self._expected).max(initial=0.0))
            return Errors(rms_error(actual, self._expected), gap / scale if scale else gap)


def allowed(problem: Problem, direction: str, algorithm: str, precision: str, is_peer: bool) -> Errors:
    """Return the largest errors that count as right.

    In float32 fastconv is held to its promise, whatever the length of the sums; another library, which makes none, to
    what rounding explains. The other types are held to that in any case, though others may sum half types as such.
    """
    length = problem.reduction_length(direction)
    model = tolerance(problem.dtype, algorithm, length)
    if is_peer and problem.dtype.itemsize == 2:
        # As `tolerance` has it for the wider types, with the unit of the half type.
        rms = model.rms + 4 * _HALF_ROUNDOFF[problem.dtype.name] * math.sqrt(length)
        return Errors(rms, _LARGEST_OVER_RMS * rms)
    if problem.dtype != np.float32:
        return Errors(model.rms, model.elementwise)
    rms = max(PROMISES[precision], model.rms if is_peer else 0.0)
    return Errors(rms, _LARGEST_OVER_RMS * rms)


def is_right(found: Errors, limits: Errors) -> bool:
    """Return True if both errors are within their limits; NaN is not."""
    return found.rms <= limits.rms and found.largest <= limits.largest


def _per_image(problem: Problem, direction: str) -> tuple[tuple[Any, ...], np.ndarray]:
    large = problem.geometry.flops > SAMPLE_FLOPS and problem.geometry.batch > 2
    images = [0, -1] if large else slice(None)
    x, grad, how = problem.x[images], problem.grad[images], problem.workload.arguments
    if direction == "forward":
        return (images,), reference.conv(x, problem.weight, **how)
    return (images,), reference.conv_backward(grad, x, problem.weight, **how)[0]


def _weight_grad(problem: Problem) -> tuple[tuple[Any, ...], np.ndarray]:
    """A weight's gradient depends on its own channel and filter only: take the first and last few of each."""
    g, how = problem.geometry, dict(problem.workload.arguments)
    share = min(1.0, SAMPLE_FLOPS / max(g.flops, 1))
    C, K = g.in_channels // g.groups, g.out_channels // g.groups
    groups = _ends(g.groups, share)
    # What is left to save once there are few groups, from channels and filters alike.
    rest = math.sqrt(min(1.0, share * g.groups / len(groups)))
    channels, filters = _ends(C, rest), _ends(K, rest)
    x_at = (groups[:, None] * C + channels).ravel()
    filter_at = (groups[:, None] * K + filters).ravel()
    x, grad = problem.x[:, x_at], problem.grad[:, filter_at]
    weight = np.zeros((len(filter_at), len(channels), *g.kernel_size))
    how["groups"] = len(groups)
    _, expected, _ = reference.conv_backward(grad, x, weight, **how)
    return np.ix_(filter_at, channels), expected


def _ends(count: int, share: float) -> np.ndarray:
    """About `share` of the indices, at least two, from both ends."""
    taken = min(count, max(2, math.ceil(count * share)))
    half = (taken + 1) // 2
    return np.unique(np.r_[np.arange(half), np.arange(count - (taken - half), count)])
