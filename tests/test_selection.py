"""Choosing an algorithm: limits of workspace, precision, and what auto promises."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from support import ALGORITHMS, FIRST, LAST, conv_problem, normal, op, promise, refusal, run_python

import fastconv
from fastconv import registry, selection
from fastconv.cpu import workspace
from fastconv.testing import CONV_CASES, ConvCase, assert_close

DIRECTIONS = ("forward", "input_grad", "weight_grad")
LARGE = ConvCase("large", (2, 16, 40, 48), (24, 16, 3, 3), padding=1)


def stated(algorithm, geometry, direction, limit=2**40):
    """What the algorithm says it allocates."""
    (record,) = registry.named(algorithm, "cpu")
    inner = selection.lifted(geometry, geometry.data_format)
    return registry.workspace_bytes(record.workspace(inner, direction, limit))


def calls(p, layout, algorithm):
    """One call per direction, and the bytes of its result."""
    x, grad = layout.put(p.x), layout.put(p.grad)
    how = {**p.how, "data_format": layout.data_format, "algorithm": algorithm, "precision": promise(algorithm)}
    dims = p.case.spatial_dims
    backward = op("conv{}d_backward", dims)
    return {
        "forward": (lambda: op("conv{}d", dims)(x, p.weight, p.bias, **how), grad.nbytes),
        "input_grad": (lambda: backward(grad, x, p.weight, needs=["input"], **how).input, x.nbytes),
        "weight_grad": (lambda: backward(grad, x, p.weight, needs=["weight"], **how).weight, p.weight.nbytes),
    }


# --- workspace -------------------------------------------------------------------------------------------------


def peak(call):
    """Bytes of NumPy arrays allocated at the same time during a call, beyond what there was."""
    call()
    # What the thread has kept of it is allocated anew.
    workspace.release()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        result = call()
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert result is not None
    return most - before


MEASURED = (
    LARGE,
    ConvCase("1x1", (4, 64, 24, 24), (48, 64, 1, 1)),
    ConvCase("grouped", (3, 24, 32, 32), (48, 6, 3, 3), padding=1, groups=4),
    ConvCase("depthwise", (2, 64, 48, 48), (64, 1, 5, 5), padding=2, groups=64),
    ConvCase("1d", (4, 16, 4000), (24, 16, 9), padding=4),
    ConvCase("3d", (1, 8, 8, 16, 16), (12, 8, 3, 3, 3), padding=1),
    ConvCase("wide", (1, 192, 6, 6), (192, 192, 3, 3), padding=1),
    ConvCase("reflect", (2, 16, 40, 40), (16, 16, 3, 3), padding=2, padding_mode="reflect"),
)
# Python objects, views, and the buffers in which NumPy converts 8192 elements of each operand at a time.
SLACK = 64 * 1024 + 2 * 8 * 8192


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("layout", [FIRST, LAST], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_nothing_is_allocated_that_was_not_stated(algorithm, layout, dtype):
    for case in MEASURED if dtype == "float32" else MEASURED[::4]:
        p = conv_problem(case, dtype)
        geometry = p.geometry(layout)
        staging = selection.staging_bytes(geometry)
        for direction, (call, result) in calls(p, layout, algorithm).items():
            if refusal(algorithm, geometry, direction):
                continue
            said = staging + stated(algorithm, geometry, direction, 2**30 - staging)
            used = peak(call)
            context = f"{case}, {direction}: stated {said} and a result of {result}, allocated {used}"
            assert used <= said + result + SLACK, context
            # A statement far above what is used keeps the algorithm out of where it would fit.
            if algorithm in ("direct", "im2col") and dtype == "float32" and case.padding_mode == "zeros":
                assert used >= 0.5 * said, context


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("layout", [FIRST, LAST], ids=str)
def test_algorithms_list_the_bytes_that_the_limit_is_compared_with(algorithm, layout):
    p = conv_problem(LARGE, "float32")
    for direction in DIRECTIONS:
        geometry = p.geometry(layout)
        rows = fastconv.algorithms(geometry, direction=direction, precision=promise(algorithm))
        (row,) = [c for c in rows if c.name == algorithm]
        if refusal(algorithm, geometry, direction):
            assert not row.supported
            assert row.reason
            continue
        assert row.workspace_bytes == stated(algorithm, geometry, direction, 2**30)
        with fastconv.options(workspace_limit=row.workspace_bytes):
            calls(p, layout, algorithm)[direction][0]()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("layout", [FIRST, LAST], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_too_much_workspace_is_refused_with_both_numbers(algorithm, layout, direction):
    p = conv_problem(LARGE, "float32")
    geometry = p.geometry(layout)
    least = 0 if refusal(algorithm, geometry, direction) else stated(algorithm, geometry, direction, 0)
    if not least:
        pytest.skip(f"{algorithm} takes no workspace for this")
    message = rf"algorithm='{algorithm}' needs {least} bytes of workspace, more than the limit of {least - 1} bytes"
    with fastconv.options(workspace_limit=least - 1):
        with pytest.raises(fastconv.WorkspaceLimitError, match=message) as caught:
            calls(p, layout, algorithm)[direction][0]()
        (row,) = [
            c
            for c in fastconv.algorithms(geometry, direction=direction, precision=promise(algorithm))
            if c.name == algorithm
        ]
    assert (caught.value.needed, caught.value.limit) == (least, least - 1)
    assert (row.supported, row.workspace_bytes) == (False, least)
    assert row.reason == f"needs {least} bytes of workspace, more than the limit of {least - 1}"
    with fastconv.options(workspace_limit=least):
        calls(p, layout, algorithm)[direction][0]()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", [FIRST, LAST], ids=str)
def test_im2col_splits_its_columns_to_stay_under_a_small_limit(layout):
    for case in (*CONV_CASES, LARGE):
        p = conv_problem(case, "float32")
        if p.geometry().is_empty:
            continue
        geometry = p.geometry(layout)
        staging = selection.staging_bytes(geometry)
        expected = dict(zip(DIRECTIONS, (p.y, *p.grads)))
        for direction in DIRECTIONS:
            least = staging + stated("im2col", geometry, direction, 0)
            whole = staging + stated("im2col", geometry, direction)
            for limit in {least, (2 * least + whole) // 3, (least + whole) // 2}:
                with fastconv.options(workspace_limit=limit):
                    result = calls(p, layout, "im2col")[direction][0]()
                result = result if direction == "weight_grad" else layout.back(result)
                assert_close(
                    result,
                    expected[direction],
                    reduction_length=p.lengths[direction],
                    err_msg=f"{case}, {direction}, {limit} of {whole} bytes",
                )


def test_a_split_uses_less_memory():
    p = conv_problem(LARGE, "float32")
    geometry = p.geometry()
    least, whole = (stated("im2col", geometry, "forward", limit) for limit in (0, 2**40))
    assert least < whole / 10
    with fastconv.options(workspace_limit=least):
        call, result = calls(p, FIRST, "im2col")["forward"]
        assert peak(call) <= least + result + SLACK


# --- auto ------------------------------------------------------------------------------------------------------


def chosen(geometry, direction="forward", **how):
    (row,) = [c for c in fastconv.algorithms(geometry, direction=direction, **how) if c.chosen]
    return row


@pytest.mark.parametrize("layout", [FIRST, LAST], ids=str)
def test_auto_takes_the_fastest_that_fits(layout):
    for case, direction in itertools.product(CONV_CASES, DIRECTIONS):
        geometry = conv_problem(case, "float32").geometry(layout)
        rows = fastconv.algorithms(geometry, direction=direction)
        if geometry.is_empty:
            assert {(c.supported, c.reason, c.chosen) for c in rows} == {(False, "there is nothing to compute", False)}
            continue
        best = min((c for c in rows if c.supported), key=lambda c: c.seconds)
        assert chosen(geometry, direction) == best, f"{case}, {direction}"
        assert all(c.seconds >= 0 and math.isfinite(c.seconds) for c in rows if c.supported)
        assert all(c.reason for c in rows if not c.supported)


@pytest.mark.parametrize("layout", [FIRST, LAST], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_auto_stays_under_the_limit(layout, direction):
    p = conv_problem(LARGE, "float32")
    call, result = calls(p, layout, "auto")[direction]
    smallest = min(
        stated(a, p.geometry(layout), direction, 0) for a in ALGORITHMS if not refusal(a, p.geometry(layout), direction)
    )
    for limit in sorted({smallest, smallest + 10_000, 2**16, 2**18, 2**20, 2**24}):
        if limit < smallest:
            continue
        with fastconv.options(workspace_limit=limit):
            row = chosen(p.geometry(layout), direction)
            assert row.workspace_bytes <= limit
            assert peak(call) <= row.workspace_bytes + result + SLACK


@pytest.mark.parametrize("layout", [FIRST, LAST], ids=str)
def test_auto_never_fails_for_want_of_workspace(layout):
    for case in (*CONV_CASES[::5], LARGE):
        p = conv_problem(case, "float32")
        expected = dict(zip(DIRECTIONS, (p.y, *p.grads)))
        with fastconv.options(workspace_limit=0):
            for direction, (call, _) in calls(p, layout, "auto").items():
                result = call()
                result = result if direction == "weight_grad" else layout.back(result)
                assert_close(result, expected[direction], reduction_length=p.lengths[direction], err_msg=str(case))


@pytest.mark.parametrize("level", ["highest", "high", "medium"])
def test_auto_keeps_the_precision_asked_for(level):
    for case in CONV_CASES[::6]:
        geometry = conv_problem(case, "float32").geometry()
        (record,) = registry.named(chosen(geometry, precision=level).name, "cpu")
        assert record.keeps(level)
        with fastconv.options(precision=level):
            assert chosen(geometry) == chosen(geometry, precision=level)


def test_an_unknown_precision_is_refused():
    p = conv_problem(LARGE, "float32")
    with pytest.raises(fastconv.ArgumentError, match="precision must be one of 'highest', 'high', 'medium', not 'low'"):
        fastconv.conv2d(p.x, p.weight, precision="low")
    with pytest.raises(fastconv.ArgumentTypeError, match=r"precision must be a string, one of .*, not 3"):
        fastconv.conv2d(p.x, p.weight, precision=3)


def test_the_option_algorithm_is_for_calls_that_name_none():
    x, weight = np.ones((1, 1, 5, 5), "int8"), np.ones((1, 1, 3, 3), "int8")
    with fastconv.options(algorithm="im2col"):
        with pytest.raises(fastconv.UnsupportedError, match="algorithm='im2col' cannot compute this forward"):
            fastconv.conv2d(x, weight)
        assert (fastconv.conv2d(x, weight, algorithm="direct") == 9).all()


def test_the_choice_is_made_anew_in_every_call():
    x, weight = normal("x", shape=(1, 4, 9, 9)), normal("w", shape=(4, 4, 3, 3))
    geometry = fastconv.ConvGeometry.create(x.shape, weight.shape, dtype=x.dtype)
    roomy = chosen(geometry)
    for limit in (0, 2**30, 0, 2**30):
        with fastconv.options(workspace_limit=limit):
            fastconv.conv2d(x, weight)
            supported = [c for c in fastconv.algorithms(geometry) if c.supported]
            assert all(c.workspace_bytes <= limit for c in supported)
            if limit:
                assert chosen(geometry) == roomy


def test_the_limit_may_come_from_the_environment():
    script = """
import numpy as np, fastconv
x, w = np.ones((1, 4, 9, 9)), np.ones((4, 4, 3, 3))
try:
    fastconv.conv2d(x, w, algorithm="im2col")
except fastconv.WorkspaceLimitError as error:
    print(error.limit, error.needed > 100, str(error.needed) in str(error), str(error.limit) in str(error))
print(fastconv.conv2d(x, w)[0, 0, 0, 0])
"""
    assert run_python(script, FASTCONV_WORKSPACE_LIMIT="100") == "100 True True True\n36.0\n"


# --- the list and the table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_table_says_what_the_list_says(direction):
    for case in CONV_CASES[::9]:
        geometry = conv_problem(case, "float32").geometry()
        title, header, *lines = fastconv.explain(geometry, direction=direction).splitlines()
        rows = fastconv.algorithms(geometry, direction=direction)
        assert title.startswith(f"conv{case.spatial_dims}d {direction}: x {geometry.x_shape}")
        assert header.split() == ["algorithm", "workspace", "predicted", "measured"]
        assert [line.split()[0] for line in lines] == [c.name for c in rows]
        assert [line.endswith("<- auto") for line in lines] == [c.chosen for c in rows]


def test_without_numba_cuda_the_list_for_a_gpu_says_what_to_install():
    script = """
import sys
sys.modules["numba.cuda"] = None
import fastconv
geometry = fastconv.ConvGeometry.create((1, 3, 8, 8), (4, 3, 3, 3))
for device in ("cuda", "sm_80"):
    found = fastconv.algorithms(geometry, device)
    assert [c.name for c in found] == [a.name for a in fastconv.registry.on("cuda")]
    assert not any(c.supported or c.chosen for c in found)
    assert all("pip install 'fastconv[cuda13]'" in c.reason for c in found)
    assert fastconv.explain(geometry, device).count("pip install") == len(found)
"""
    run_python(script)


def test_wrong_arguments_are_named():
    geometry = conv_problem(LARGE, "float32").geometry()
    with pytest.raises(fastconv.ArgumentError, match=r"device must be one of 'cpu', 'cuda', 'sm_75', .*, not 'tpu'"):
        fastconv.algorithms(geometry, "tpu")
    with pytest.raises(fastconv.ArgumentError, match=r"direction must be one of 'forward', .*, not 'up'"):
        fastconv.explain(geometry, direction="up")
