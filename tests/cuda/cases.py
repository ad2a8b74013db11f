"""Convolutions in the emulator: what the tests of every CUDA algorithm share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from emulation import poisoned
from support import ConvProblem

import fastconv
from fastconv import registry
from fastconv.cuda import run
from fastconv.testing import CONV_CASES, ConvCase


def products(case: ConvCase) -> int:
    """Multiplications of a case: the emulator does some hundred thousand a second."""
    g = fastconv.ConvGeometry.create(
        case.x_shape, case.weight_shape, case.stride, case.padding, case.dilation, case.groups,
        padding_mode=case.padding_mode,
    )  # fmt: skip
    return g.flops // 2


def small_cases(most: int) -> list[ConvCase]:
    """Return the cases of the one table that the emulator does in no time."""
    return [case for case in CONV_CASES if case.padding_mode == "zeros" and 0 < products(case) <= most]


def lifted(problem: ConvProblem, data_format: str, dtype: Any = None) -> fastconv.ConvGeometry:
    """Return the geometry as kernels see it."""
    return problem.geometry().lifted(data_format, np.dtype(dtype or problem.dtype))


def emulate_conv(
    algorithm: Any,
    problem: ConvProblem,
    direction: str,
    data_format: str,
    activation: str | None = None,
    bias: bool = True,
    seed: int | None = None,
    architecture: str = "sm_90a",
    limit: int = 2**30,
    **how: Any,
) -> np.ndarray:
    """Run one direction of an algorithm on poisoned memory; return the result with channels first."""
    g = lifted(problem, data_format)
    operands = {"x": _put(problem.x, data_format), "grad_output": _put(problem.grad, data_format)}
    shape = {"forward": g.output_shape, "input_grad": g.x_shape, "weight_grad": g.weight_shape}[direction]
    out = np.full(shape, np.nan, problem.dtype)
    buffers = algorithm.workspace(g, direction, limit, **how)
    lent = {name: poisoned(b.shape, b.dtype) for name, b in buffers.items() if b.owned}
    more = {} if direction == "weight_grad" else {"activation": activation, "bias": bias}
    operands["bias"] = problem.bias if bias else None
    arrays = {**operands, "weight": np.ascontiguousarray(problem.weight), **lent, "out": out}
    limit = registry.workspace_bytes(buffers)
    steps = algorithm.steps(g, direction, architecture=architecture, limit=limit, **more, **how)
    run.emulated(steps, arrays, seed, architecture)
    if direction == "weight_grad":
        return out.reshape(problem.weight.shape)
    back = np.moveaxis(out, -1, 1) if data_format == "channels_last" else out
    return back.reshape((problem.y if direction == "forward" else problem.x).shape)


def _put(array: np.ndarray, data_format: str) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(array, 1, -1) if data_format == "channels_last" else array)


def reduction(case: ConvCase) -> int:
    """Products of one output."""
    return math.prod(case.weight_shape[1:])
