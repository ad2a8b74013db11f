"""Convolutions in the emulator: what the tests of every CUDA algorithm share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from emulation import poisoned
from hypothesis import strategies
from support import DIRECTIONS, ConvProblem

import fastconv
from fastconv import registry
from fastconv.cuda import run
from fastconv.testing import CONV_CASES, ConvCase

FORMATS = ("channels_first", "channels_last")


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
    bias: bool | None = None,
    seed: int | None = None,
    architecture: str = "sm_90a",
    limit: int = 2**30,
    **how: Any,
) -> np.ndarray:
    """Run one direction of an algorithm on poisoned memory; return the result with channels first.

    A bias is that of the forward pass, unless it is said.
    """
    bias = direction == "forward" if bias is None else bias
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


def expected(problem: ConvProblem, direction: str) -> np.ndarray:
    """Return what the oracle makes of it."""
    return dict(zip(DIRECTIONS, (problem.y, *problem.grads)))[direction]


def layer(channels: int, filters: int, data_format: str, kernel: int = 3, stride: int = 1, dtype: str = "float32",
          batch: int = 4) -> fastconv.ConvGeometry:  # fmt: skip
    """Return an ordinary layer, whose machine code is looked at."""
    shape = (batch, 28, 28, channels) if data_format == "channels_last" else (batch, channels, 28, 28)
    g = fastconv.ConvGeometry.create(
        shape, (filters, channels, kernel, kernel), stride, kernel // 2, data_format=data_format, dtype=dtype
    )
    return g.lifted(data_format, np.dtype(dtype))


def drawn_case(
    data: Any, size: int, channels: int, filters: int, kernel: tuple[int, int] = (1, 3), stride: int = 3,
    dilation: int = 3,
) -> ConvCase:  # fmt: skip
    """Draw a case of two dimensions; numbers are the largest, channels and filters those of a group."""

    def draw(low: int, high: int) -> int:
        return data.draw(strategies.integers(low, high))

    groups = draw(1, 2)
    kernels, strides, dilations = ([draw(*ends) for _ in range(2)] for ends in (kernel, (1, stride), (1, dilation)))
    padding = [(draw(0, 3), draw(0, 3)) for _ in range(2)]
    windows = [d * (k - 1) + 1 for d, k in zip(dilations, kernels)]
    image = [max(draw(1, size), window - sum(pad), 1) for window, pad in zip(windows, padding)]
    inner = draw(1, channels)
    return ConvCase(
        "drawn", (draw(1, 2), groups * inner, *image), (groups * draw(1, filters), inner, *kernels), tuple(strides),
        tuple(padding), tuple(dilations), groups,
    )  # fmt: skip


def reduction(case: ConvCase) -> int:
    """Products of one output."""
    return math.prod(case.weight_shape[1:])
