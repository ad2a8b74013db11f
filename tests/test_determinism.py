"""The same call gives the same bits, run after run, and leaves its arguments as they were."""

import numpy as np
import pytest
from support import (
    ALGORITHMS,
    FIRST,
    LAST,
    LAYOUTS,
    conv_problem,
    normal,
    op,
    per_group,
    pool_arguments,
    promise,
    refusal,
    run_python,
)

import fastconv
from fastconv.testing import CONV_CASES, POOL_CASES

every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)

# Every operation once: (name, arguments), made afresh for each layout.
SHAPE = (2, 6, 9, 8)


def every_call(layout):
    how = {"data_format": layout.data_format}
    x = layout.put(normal("x", shape=SHAPE, dtype="float32"))
    small, where = fastconv.max_pool2d(x, 3, 2, 1, return_indices=True, **how)
    adaptive, places = fastconv.adaptive_max_pool2d(x, 4, return_indices=True, **how)
    calls = {
        "max_pool2d": ((x, 3, 2, 1), {"return_indices": True, **how}),
        "max_pool2d_backward": ((small, where, x.shape), how),
        "max_unpool2d": ((small, where, 3, 2, 1, (9, 8)), how),
        "max_unpool2d_backward": ((x, where), how),
        "avg_pool2d": ((x, 3, 2, 1), how),
        "avg_pool2d_backward": ((small, x.shape, 3, 2, 1), how),
        "lp_pool2d": ((x, 2, 3, 2), {"padding": 1, **how}),
        "lp_pool2d_backward": ((small, x, 2, 3, 2), {"padding": 1, **how}),
        "adaptive_avg_pool2d": ((x, 4), how),
        "adaptive_avg_pool2d_backward": ((adaptive, x.shape), how),
        "adaptive_max_pool2d": ((x, 4, True), how),
        "adaptive_max_pool2d_backward": ((adaptive, places, x.shape), how),
        "unfold": ((x, 3), {}),
        "fold": ((normal("cols", shape=(2, 27, 42), dtype="float32"), (8, 9), 3), {}),
    }
    yield from ((name, *call) for name, call in calls.items())
    for algorithm in (*ALGORITHMS, "auto"):
        yield from every_convolution(layout, x, {"algorithm": algorithm, "precision": promise(algorithm), **how})


def every_convolution(layout, x, how):
    c, k = per_group(how["algorithm"], 3), per_group(how["algorithm"], 2)
    weight, bias = normal("w", shape=(6, c, 3, 3), dtype="float32"), normal("b", shape=(6,), dtype="float32")
    up, up_bias = normal("up", shape=(6, k, 3, 3), dtype="float32"), normal("ub", shape=(2 * k,), dtype="float32")
    grad = layout.put(normal("g", shape=(2, 6, 9, 8), dtype="float32"))
    up_grad = layout.put(normal("g", shape=(2, 2 * k, 11, 10), dtype="float32"))
    conv = {"padding": 1, "groups": 6 // c, "padding_mode": "reflect", **how}
    yield "conv2d", (x, weight, bias), {"activation": "tanh", **conv}
    yield "conv2d_backward", (grad, x, weight), conv
    yield "conv_transpose2d", (x, up, up_bias), {"groups": 2, **how}
    yield "conv_transpose2d_backward", (up_grad, x, up), {"groups": 2, **how}


def bits(result):
    parts = result if isinstance(result, tuple) else (result,)
    return [np.ascontiguousarray(part).tobytes() for part in parts if part is not None]


@every_layout
def test_every_operation_gives_the_same_bits_again(layout):
    for name, arguments, how in every_call(layout):
        first = bits(getattr(fastconv, name)(*arguments, **how))
        for _ in range(3):
            assert bits(getattr(fastconv, name)(*arguments, **how)) == first, f"{name} {how}"


@every_layout
def test_no_operation_modifies_its_arguments(layout):
    for name, arguments, how in every_call(layout):
        arrays = [a for a in arguments if isinstance(a, np.ndarray)]
        before = [(a.tobytes(), a.strides, a.flags.writeable) for a in arrays]
        getattr(fastconv, name)(*arguments, **how)
        assert [(a.tobytes(), a.strides, a.flags.writeable) for a in arrays] == before, f"{name} {how}"


@every_layout
def test_no_result_shares_memory_with_an_argument(layout):
    for name, arguments, how in every_call(layout):
        result = getattr(fastconv, name)(*arguments, **how)
        for part in result if isinstance(result, tuple) else (result,):
            for argument in arguments:
                assert not isinstance(argument, np.ndarray) or not np.shares_memory(part, argument), name


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "auto"])
@pytest.mark.parametrize("layout", [FIRST, LAST], ids=str)
@pytest.mark.parametrize("threads", [None, 1, 2])
def test_every_case_gives_the_same_bits_again(algorithm, layout, threads):
    with fastconv.options(threads=threads):
        for case in CONV_CASES:
            p, dims = conv_problem(case, "float32"), case.spatial_dims
            if algorithm != "auto" and refusal(algorithm, p.geometry(layout), "forward"):
                continue
            how = {**p.how, "data_format": layout.data_format, "algorithm": algorithm}
            how["precision"] = promise(algorithm)
            x = layout.put(p.x)
            assert bits(op("conv{}d", dims)(x, p.weight, **how)) == bits(op("conv{}d", dims)(x, p.weight, **how)), case


@every_layout
def test_every_pool_gives_the_same_bits_again(layout):
    for case in POOL_CASES:
        dims, how = case.spatial_dims, {"data_format": layout.data_format}
        x = layout.put(normal(case, shape=case.x_shape, dtype="float32"))
        y, where = op("max_pool{}d", dims)(x, **pool_arguments(case), return_indices=True, **how)
        backward = op("max_pool{}d_backward", dims)
        assert bits(backward(y, where, x.shape, **how)) == bits(backward(y, where, x.shape, **how)), case


DIGEST = """
import hashlib
import test_determinism as there
from support import FIRST, LAST
import fastconv
digest = hashlib.sha256()
for layout in (FIRST, LAST):
    for name, arguments, how in there.every_call(layout):
        for part in there.bits(getattr(fastconv, name)(*arguments, **how)):
            digest.update(part)
print(digest.hexdigest())
"""


def test_another_process_gives_the_same_bits():
    assert run_python(DIGEST) == run_python(DIGEST)
