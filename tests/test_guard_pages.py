"""No access outside the arrays: everything a kernel gets ends, or begins, at an inaccessible page.

A crash takes the process along, so each sweep runs in one of its own and says what it is about to do.
"""

import contextlib
import math
import sys

import numpy as np
import pytest
from support import (
    ALGORITHMS,
    FIRST,
    LAST,
    LAYOUTS,
    conv_problem,
    op,
    pool_arguments,
    promise,
    refusal,
    rng,
    run_python,
)

import fastconv
from fastconv import reference
from fastconv.testing import CONV_CASES, POOL_CASES, assert_close, guarded

pytestmark = pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="guard pages need mprotect")

LAYOUT = {layout.name: layout for layout in LAYOUTS}
AWKWARD = (
    "1d audio k15 stride 4", "1d causal dilation 4", "1d same stride 3", "3x3", "3x3 one past a tile",
    "3x3 one short of a tile", "3x3 on one pixel", "3x3 one output", "3x3 stride 2",
    "3x3 stride 3 that leaves a rest", "3x3 dilation 3 stride 2", "1x1", "1x1 stride 2", "1x1 padding 1",
    "11x11 stride 4 on RGB", "15x15", "kernel larger than the image", "stride larger than the kernel", "1x7", "7x1",
    "groups 3 of 5 channels", "groups 3 of 5 channels, 1x1 stride 2", "depthwise", "depthwise multiplier 2",
    "depthwise 5x5 stride 2", "depthwise 7x7 dilation 2", "prime channels", "long reduction, C=512", "tall image",
    "flat image", "padding in pairs, stride 2", "padding larger than the kernel", "same_lower, stride 2", "full",
    "reflect in pairs", "circular as wide as the image", "3d stride 2 dilation 2", "3d groups 2",
    "3d 1x1x1 stride 2",
)  # fmt: skip


def guard_what_is_allocated(where):
    """Put fresh outputs and workspaces at guard pages too."""
    from fastconv import arrays
    from fastconv.cpu import run, workspace

    def empty(dimensions, dtype):
        return guarded(original(dimensions, dtype), where)

    original = arrays.empty
    arrays.empty = run.empty = empty
    # Nothing is kept from call to call: every buffer ends at a guard page of its own.
    workspace.KEPT_BYTES = -1


def announce(*words):
    print(*words, flush=True)


def sweep_convolutions(algorithm, layout, where):
    layout = LAYOUT[layout]
    guard_what_is_allocated(where)
    for case in CONV_CASES:
        if case.name not in AWKWARD:
            continue
        p, dims = conv_problem(case, "float32"), case.spatial_dims
        x, grad, out = (guarded(layout.put(a), where) for a in (p.x, p.grad, p.y.astype("float32")))
        weight, bias = guarded(p.weight, where), guarded(p.bias, where)
        how = {**p.how, "data_format": layout.data_format, "algorithm": algorithm, "precision": promise(algorithm)}
        if not refusal(algorithm, p.geometry(layout), "forward"):
            announce(case, "forward")
            op("conv{}d", dims)(x, weight, bias, out=out, activation="relu", **how)
            expected = np.maximum(p.y, 0)
            assert_close(layout.back(out), expected, algorithm=algorithm, reduction_length=p.lengths["forward"])
        for name, direction in (("input", "input_grad"), ("weight", "weight_grad"), ("bias", "weight_grad")):
            if not refusal(algorithm, p.geometry(layout), direction):
                announce(case, name)
                op("conv{}d_backward", dims)(grad, x, weight, needs=[name], **how)
    announce("done")


def sweep_integers(layout, where):
    layout = LAYOUT[layout]
    guard_what_is_allocated(where)
    for case in CONV_CASES:
        if case.name not in AWKWARD[::2]:
            continue
        p = conv_problem(case, "float32")
        x = guarded(layout.put(rng(case).integers(-128, 128, case.x_shape, "int8")), where)
        weight = guarded(rng(case).integers(-128, 128, case.weight_shape, "int8"), where)
        announce(case)
        op("conv{}d", case.spatial_dims)(x, weight, data_format=layout.data_format, **p.how)
    announce("done")


def sweep_pools(layout, where):
    layout = LAYOUT[layout]
    guard_what_is_allocated(where)
    for case in POOL_CASES:
        dims, how, sizes = case.spatial_dims, {"data_format": layout.data_format}, pool_arguments(case)
        x = guarded(layout.put(rng(case).standard_normal(case.x_shape).astype("float32")), where)
        announce(case, "maximum")
        y, places = op("max_pool{}d", dims)(x, **sizes, return_indices=True, **how)
        op("max_pool{}d", dims)(x, **sizes, **how)
        grad, places = guarded(np.nan_to_num(y), where), guarded(places, where)
        announce(case, "gradient of the maximum")
        op("max_pool{}d_backward", dims)(grad, places, x.shape, **how)
        announce(case, "indices far outside")
        wild = guarded(np.where(places % 2 == 0, places, 2**62 - places), where)
        with contextlib.suppress(fastconv.ArgumentError):
            op("max_pool{}d_backward", dims)(grad, wild, x.shape, **how)
        with contextlib.suppress(fastconv.ArgumentError):
            op("max_unpool{}d_backward", dims)(x, wild, **how)
        announce(case, "average")
        op("avg_pool{}d", dims)(x, **sizes, **how)
        op("avg_pool{}d_backward", dims)(grad, x.shape, **sizes, **how)
        op("lp_pool{}d", dims)(x, 2, **sizes, **how)
        announce(case, "adaptive")
        y, places = op("adaptive_max_pool{}d", dims)(x, 3, return_indices=True, **how)
        grad, places = guarded(y, where), guarded(places, where)
        op("adaptive_max_pool{}d_backward", dims)(grad, places, x.shape, **how)
        op("adaptive_avg_pool{}d", dims)(x, 3, **how)
        op("adaptive_avg_pool{}d_backward", dims)(grad, x.shape, **how)
        announce(case, "unpool")
        flat = math.prod(n for n in case.x_shape[2:])
        wild = guarded(np.where(places == flat - 1, -1, places), where)
        op("max_unpool{}d_backward", dims)(x, places, **how)
        for indices in (places, wild):
            with contextlib.suppress(fastconv.ArgumentError):
                op("max_unpool{}d", dims)(grad, indices, 2, 2, **how)
    announce("done")


def sweep_patches(where):
    guard_what_is_allocated(where)
    for case in CONV_CASES:
        if case.name not in AWKWARD or case.padding_mode != "zeros":
            continue
        x, kernel = conv_problem(case, "float32").x, tuple(case.weight_shape[2:])
        how = {"dilation": case.dilation, "padding": case.padding, "stride": case.stride}
        announce(case)
        cols = fastconv.unfold(guarded(x, where), kernel, **how)
        assert np.array_equal(cols, reference.unfold(x, kernel, **how)), case
        fastconv.fold(guarded(cols, where), case.x_shape[2:], kernel, **how)
    announce("done")


def assert_survives(call):
    """Run one of the sweeps in another process; the last line it printed is where it crashed."""
    printed = run_python(f"import test_guard_pages as sweeps; sweeps.{call}")
    assert printed.endswith("done\n"), printed


each_side = pytest.mark.parametrize("where", ["after", "before"])


@each_side
@pytest.mark.parametrize("layout", [FIRST, LAST], ids=str)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_convolutions_stay_inside_their_arrays(algorithm, layout, where):
    assert_survives(f"sweep_convolutions({algorithm!r}, {layout.name!r}, {where!r})")


@each_side
@pytest.mark.parametrize("layout", [FIRST, LAST], ids=str)
def test_integer_convolutions_stay_inside_their_arrays(layout, where):
    assert_survives(f"sweep_integers({layout.name!r}, {where!r})")


@each_side
@pytest.mark.parametrize("layout", [FIRST, LAST], ids=str)
def test_pools_stay_inside_their_arrays(layout, where):
    assert_survives(f"sweep_pools({layout.name!r}, {where!r})")


@each_side
def test_patches_stay_inside_their_arrays(where):
    assert_survives(f"sweep_patches({where!r})")


def test_a_crash_is_a_failure_that_names_the_case():
    crash = "import test_guard_pages as t; t.announce('the case'); import os; os.kill(os.getpid(), 11)"
    with pytest.raises(AssertionError, match=r"exit status -11; it printed:\nthe case"):
        run_python(crash)


def test_every_awkward_case_is_in_the_table():
    assert set(AWKWARD) <= {case.name for case in CONV_CASES}
