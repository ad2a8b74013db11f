"""Implicit GEMM of the GPU: every direction in the emulator, its tables against the oracle, its machine code."""

import math

import numpy as np
import pytest
from support import DIRECTIONS, LAYOUTS, conv_problem, whole

from fastconv.cuda import implicit_gemm
from fastconv.cuda.emulator import emulate
from fastconv.cuda.gemm_kernels import Tile
from fastconv.testing import CONV_CASES, ConvCase

# 32 threads of 4x4 sums: tails in every dimension at a few thousand products a block.
SMALL = Tile(16, 32, 8, 4, 8)


def run_steps(steps, arrays, workspace, seed=None, architecture="sm_90a"):
    """Emulate launches; what is not among the arrays is an empty one."""
    buffers = {}
    for name, buffer in workspace.items():
        poison = np.nan if buffer.dtype.kind == "f" else -(1 << 20)
        buffers[name] = np.full(buffer.shape, poison, buffer.dtype)
    reports = []
    for step in steps:
        given = [
            {**arrays, **buffers}.get(a, np.empty(0, np.float32)) if isinstance(a, str) else a for a in step.arguments
        ]
        reports.append(
            emulate(step.kernel, step.grid, step.block, *given, shared_bytes=step.shared_bytes,
                    architecture=architecture, seed=seed)
        )  # fmt: skip
    return reports


def compute(problem, layout, direction, tile=SMALL, activation=None, bias=True, seed=None, architecture="sm_90a"):
    """Return a direction's result in the emulator, channels first."""
    geometry = problem.geometry(layout).lifted(layout.data_format, np.dtype(np.float32))
    put = lambda a: np.ascontiguousarray(layout.put(a))  # noqa: E731
    arrays = {"weight": problem.weight, "x": put(problem.x), "grad_output": put(problem.grad)}
    wanted = {"forward": problem.y, "input_grad": problem.x, "weight_grad": problem.weight}[direction]
    with_bias = bias and direction == "forward"
    if with_bias:
        arrays["bias"] = problem.bias
    out = np.full(wanted.shape if direction == "weight_grad" else put(wanted).shape, np.nan, np.float32)
    work = implicit_gemm.workspace(geometry, direction, 1 << 30, tile=tile)
    steps = implicit_gemm.steps(geometry, direction, activation, with_bias, architecture, tile=tile)
    run_steps(steps, {**arrays, "out": out}, work, seed, architecture)
    return out if direction == "weight_grad" else np.asarray(layout.back(out))


CASES = [
    ConvCase("whole tiles", (1, 8, 4, 8), (32, 8, 1, 1)),
    ConvCase("tails of pixels, filters and depth", (2, 4, 5, 6), (5, 4, 3, 3), padding=1),
    ConvCase("three channels", (1, 3, 7, 6), (18, 3, 3, 2), padding=(1, 0)),
    ConvCase("two tiles of filters", (1, 4, 3, 5), (36, 4, 1, 1)),
    ConvCase("stride 2", (2, 4, 7, 6), (4, 4, 3, 3), stride=2, padding=1),
    ConvCase("stride over the kernel", (1, 5, 9, 8), (3, 5, 2, 1), stride=3),
    ConvCase("dilation and stride share a factor", (1, 4, 11, 9), (4, 4, 3, 2), stride=(2, 4), padding=2, dilation=(2, 2)),
    ConvCase("dilation", (1, 4, 7, 8), (4, 4, 2, 3), padding=((0, 2), (3, 1)), dilation=(2, 3)),
    ConvCase("groups of whole vectors", (1, 8, 4, 5), (8, 4, 3, 3), padding=1, groups=2),
    ConvCase("groups of one run", (1, 16, 3, 5), (24, 8, 2, 2), padding=1, groups=2),
    ConvCase("groups of three and five", (2, 9, 3, 4), (15, 3, 2, 2), groups=3),
    ConvCase("depthwise", (1, 5, 6, 5), (5, 1, 3, 3), padding=1, groups=5),
    ConvCase("one dimension", (2, 4, 19), (6, 4, 5), stride=2, padding=3),
    ConvCase("three dimensions", (1, 3, 3, 4, 3), (4, 3, 2, 3, 2), stride=(1, 2, 1), padding=(1, 1, 0)),
    ConvCase("kernel larger than the image", (2, 3, 2, 3), (4, 3, 5, 5), padding=2),
]
FORMATS = [layout for layout in LAYOUTS if layout.data_format == layout.memory]


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_exact_on_whole_numbers(case, direction, layout):
    problem = conv_problem(case, np.float32, whole)
    wanted = {"forward": problem.y, "input_grad": problem.grads[0], "weight_grad": problem.grads[1]}[direction]
    assert (compute(problem, layout, direction) == wanted).all()
