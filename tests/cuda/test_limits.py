"""What every algorithm launches for the shapes of networks, and for huge ones, stays within what a GPU takes.

Nothing is compiled and no array is made: steps are data.
"""

import math

import numpy as np
import pytest
from numba.cuda import types
from numba.cuda.np import numpy_support
from support import DIRECTIONS

from benchmarks.workloads import panel
from fastconv import ConvGeometry, registry
from fastconv.cuda import bias
from fastconv.cuda.architecture import Architecture
from fastconv.cuda.steps import Call

ALGORITHMS = {a.name: a for a in registry.on("cuda")}
FORMATS = ("channels_first", "channels_last")
# The default limit, and one that many layers do not fit in.
LIMITS = (1 << 30, 1 << 25)
# x, weight and arguments: counts beyond 16 or 32 bits, of pixels, groups, filters, channels, taps, elements, padding.
HUGE = {
    "wide image": ((1, 1, 1 << 16, 1 << 16), (1, 1, 3, 3), {}),
    "many pixels": ((64, 8, 2048, 2048), (8, 1, 3, 3), {"padding": 1, "groups": 8}),
    "large weight of many pixels": ((7, 64, 2048, 2048), (64, 64, 7, 7), {"padding": 3}),
    "large batch": ((1 << 28, 1, 2, 2), (1, 1, 1, 1), {}),
    "many groups": ((1, 70000, 8, 8), (70000, 1, 3, 3), {"groups": 70000}),
    "many filters": ((1, 4, 8, 8), ((1 << 21) + 5, 4, 3, 3), {}),
    "many channels": ((1, 1 << 21, 4, 4), (4, 1 << 21, 3, 3), {}),
    "many taps": ((1, 1, 2048, 2048), (1, 1, 1025, 1025), {}),
    "large volume": ((2, 64, 256, 512, 512), (64, 64, 3, 3, 3), {"padding": 1}),
    "far padding": ((1, 1, 8, 8), (1, 1, 3, 3), {"stride": 1 << 33, "padding": 1 << 33}),
}
# What is cut into so many launches that the test would take long.
LONG = ("im2col", *(name for name in ALGORITHMS if name.startswith("winograd")))


def arrays_of(g, direction, buffers):
    """Return the elements and dtypes of all that steps may name."""
    channels = g.out_channels if direction == "forward" else g.in_channels
    results = {"forward": g.output_shape, "input_grad": g.x_shape, "weight_grad": g.weight_shape}
    shapes = {
        "x": g.x_shape, "weight": g.weight_shape, "grad_output": g.output_shape, "bias": (channels,),
        "out": results[direction],
    }  # fmt: skip
    lent = {name: (b.shape, np.dtype(b.dtype)) for name, b in buffers.items() if b.owned}
    return {**{name: (shape, g.dtype) for name, shape in shapes.items()}, **lent}


def check(step, arrays, architecture):
    if isinstance(step, Call):
        assert all(math.prod(s) <= math.prod(arrays[name][0]) for name, s in zip(step.arguments, step.shapes))
        return
    what, (x, y, z), block = step.kernel.__name__, (*step.grid, 1, 1)[:3], step.block
    assert 1 <= x < 2**31, (what, step.grid)
    assert 1 <= min(y, z) <= max(y, z) <= 65535, (what, step.grid)
    assert math.prod(block) <= 1024, (what, block)
    assert (*block, 1, 1)[2] <= 64, (what, block)
    assert step.shared_bytes <= Architecture.named(architecture).shared_limit, what
    assert len(step.arguments) == len(step.signature), what
    is_wide = types.int64 in step.signature
    for argument, kind in zip(step.arguments, step.signature):
        if isinstance(argument, str):
            shape, dtype = arrays[argument]
            elements = math.prod(shape) * dtype.itemsize // numpy_support.as_dtype(kind.dtype).itemsize
            assert is_wide or elements < 2**31, (what, argument, shape)
        else:
            assert numpy_support.as_dtype(kind) == argument.dtype, (what, argument)


def check_plan(algorithm, g, direction, limit, architecture="sm_90a"):
    buffers = algorithm.workspace(g, direction, limit)
    stated = registry.workspace_bytes(buffers)
    assert algorithm.workspace(g, direction, stated) == buffers
    arrays = arrays_of(g, direction, buffers)
    if stated > limit:
        assert registry.workspace_bytes(algorithm.workspace(g, direction, 0)) >= stated
        # It is refused, unless nothing else is left.
        if algorithm.name != "depthwise":
            return
    fused = direction in getattr(algorithm.implementation, "FUSED", ("forward",)) and direction != "weight_grad"
    plans = [
        algorithm.implementation.steps(g, direction, "relu" if fused else None, fused, architecture, room)
        for room in (stated, limit)
    ]
    for step, other in zip(*plans, strict=True):
        assert step[1:] == other[1:]
        check(step, arrays, architecture)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_layers_of_networks(name):
    algorithm, dtype = ALGORITHMS[name], "float16" if name == "implicit_gemm_mma" else "float32"
    for number, layer in enumerate(panel()):
        for data_format in FORMATS:
            g = layer.geometry(dtype=dtype).lifted(data_format, np.dtype(dtype))
            for direction in DIRECTIONS:
                if algorithm.supports(g, direction).ok:
                    check_plan(algorithm, g, direction, LIMITS[0], ("sm_90a", "sm_80")[number % 2])
                    if number % 8 == 0 and name != "im2col":
                        check_plan(algorithm, g, direction, LIMITS[1])


@pytest.mark.parametrize("case", HUGE)
@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name not in LONG])
def test_huge_ones(name, case):
    algorithm, dtype, (x, weight, how) = ALGORITHMS[name], np.dtype(np.float32), HUGE[case]
    dtype = np.dtype(np.float16) if name == "implicit_gemm_mma" else dtype
    for data_format in FORMATS:
        g = ConvGeometry.create(x, weight, dtype=dtype, **how).lifted(data_format, dtype)
        for direction in DIRECTIONS:
            if algorithm.supports(g, direction).ok:
                check_plan(algorithm, g, direction, LIMITS[0])


def test_far_padding_is_laid_out():
    x, weight, how = HUGE["far padding"]
    g = ConvGeometry.create(x, weight, **how).lifted("channels_first", np.dtype(np.float32))
    for direction in DIRECTIONS:
        check_plan(ALGORITHMS["im2col"], g, direction, LIMITS[0])


@pytest.mark.parametrize("data_format", FORMATS)
def test_the_gradient_of_the_bias(data_format):
    for N, K, L in ((1, 1, 1 << 32), (64, 8, 1 << 22), (1 << 28, 1, 4), (1, 1 << 21, 16)):
        sizes = N, K, L, data_format, np.dtype(np.float32)
        named = {"grad_output": ((N, K, L), sizes[-1]), "out": ((K,), sizes[-1])}
        lent = {name: (b.shape, np.dtype(b.dtype)) for name, b in bias.workspace(*sizes).items()}
        for step in bias.steps(*sizes):
            check(step, {**named, **lent}, "sm_90a")
