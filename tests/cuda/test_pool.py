"""Pooling on the GPU: in the emulator against the oracle, and as machine code."""

import math

import numpy as np
import pytest
from emulation import compiled, global_bytes, poisoned
from hypothesis import given, settings, strategies
from support import BFLOAT16, normal, whole

import fastconv
from fastconv import reference
from fastconv.cuda import pool, run
from fastconv.cuda.architecture import TESTED
from fastconv.cuda.compile import budget
from fastconv.testing import POOL_CASES, PoolCase, assert_close, pool_cases

FORMATS = ("channels_first", "channels_last")
THREADS = 32


def geometry_of(case, data_format, average=False):
    return fastconv.PoolGeometry.create(
        put(np.empty(case.x_shape), data_format).shape, case.kernel_size, case.stride, case.padding, case.dilation,
        case.ceil_mode, spatial_dims=case.spatial_dims, data_format=data_format, average=average,
    )  # fmt: skip


def put(array, data_format):
    return np.ascontiguousarray(np.moveaxis(array, 1, -1) if data_format == "channels_last" else array)


def back(array, data_format):
    return np.moveaxis(array, -1, 1) if data_format == "channels_last" else array


def how(case):
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    return {name: getattr(case, name) for name in names}


def size(case):
    g = geometry_of(case, "channels_first")
    return g.batch * g.channels * (math.prod(g.output_size) * math.prod(g.kernel_size) + math.prod(g.input_size))


SMALL = [case for case in POOL_CASES if size(case) <= 6000]
# Rows of whole vectors, read and written by vectors.
ROWS = (
    PoolCase("2x2", (1, 2, 4, 16), 2),
    PoolCase("3x3 stride 2 padding 1", (1, 2, 5, 16), 3, 2, 1),
    PoolCase("3x3 stride 1 padding 1", (1, 2, 4, 8), 3, 1, 1),
    PoolCase("3x3 stride 1 dilation 2", (1, 1, 6, 12), 3, 1, 1, 2),
    PoolCase("5x5 padding 2", (1, 1, 4, 12), 5, 1, 2),
    PoolCase("1x3 stride 3", (2, 2, 2, 24), (1, 3), (1, 3)),
    PoolCase("2x4, pairs of padding", (1, 2, 4, 10), (2, 4), 1, ((1, 0), (4, 1))),
)
# Channels of whole vectors.
CHANNELS = (
    PoolCase("3x3 stride 2 padding 1", (1, 8, 5, 6), 3, 2, 1),
    PoolCase("2x2 stride 1 dilation 2", (2, 4, 4, 5), 2, 1, 1, 2),
)
EVERY = [*SMALL, *ROWS, *CHANNELS]


def max_pooled(case, data_format, x, **options):
    g = geometry_of(case, data_format)
    y, indices = poisoned(g.output_shape, x.dtype), poisoned(g.output_shape, np.int64)
    seed = options.pop("seed", None)
    options = {"threads": THREADS, **options}
    arrays = {"x": put(x, data_format), "out": y, "indices": indices}
    reports = run.emulated(pool.max_pool(g, x.dtype, **options), arrays, seed)
    return back(y, data_format), back(indices, data_format), reports


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_maxima_and_their_indices_are_the_oracles(case, data_format):
    x = whole("pool", case.name, shape=case.x_shape)
    y, indices, _ = max_pooled(case, data_format, x)
    expected, where = reference.max_pool(x, **how(case), spatial_dims=case.spatial_dims)
    assert np.array_equal(y, expected)
    assert np.array_equal(indices, where)


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("case", [ROWS[1], CHANNELS[0], POOL_CASES[2]], ids=str)
def test_nan_wins_and_ties_go_to_the_first(case, data_format):
    x = whole("ties", shape=case.x_shape)
    x.flat[::5], x.flat[3::11], x.flat[::7] = -np.inf, np.nan, np.inf
    y, indices, _ = max_pooled(case, data_format, x)
    expected, where = reference.max_pool(x, **how(case), spatial_dims=case.spatial_dims)
    assert np.array_equal(y, expected, equal_nan=True)
    assert np.array_equal(indices, where)
    nothing = np.full_like(x, -np.inf)
    y, indices, _ = max_pooled(case, data_format, nothing, seed=1)
    assert np.array_equal(indices, reference.max_pool(nothing, **how(case), spatial_dims=case.spatial_dims)[1])


@pytest.mark.parametrize("dtype", [np.float64, np.float16, BFLOAT16], ids=str)
@pytest.mark.parametrize("data_format", FORMATS)
def test_other_dtypes_have_the_same_maxima(data_format, dtype):
    case = PoolCase("", (1, 8, 5, 16), 3, 2, 1)
    x = whole("dtypes", shape=case.x_shape, dtype=dtype)
    y, indices, _ = max_pooled(case, data_format, x)
    expected, where = reference.max_pool(x, **how(case), spatial_dims=case.spatial_dims)
    assert np.array_equal(y.astype(np.float64), expected)
    assert np.array_equal(indices, where)


@pytest.mark.parametrize("data_format", FORMATS)
def test_aligned_shapes_are_read_and_written_by_128_bits(data_format):
    case = PoolCase("", (1, 8, 6, 16), 2)
    x = normal("wide", shape=case.x_shape, dtype="float32")
    reports = max_pooled(case, data_format, x)[2]
    assert global_bytes(reports) == {16}
    assert global_bytes(max_pooled(case, data_format, x, aligned=False)[2]) == {4, 8}


# --- averages and norms ----------------------------------------------------------------------------------------


def pooled(steps, g, data_format, x):
    y = poisoned(g.output_shape, x.dtype)
    run.emulated(steps, {"x": put(x, data_format), "out": y})
    return back(y, data_format)


AVERAGES = [*(case for case in SMALL if size(case) <= 3000), *ROWS, *CHANNELS]


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("case", AVERAGES, ids=str)
def test_averages_are_the_oracles(case, data_format):
    x = normal("average", case.name, shape=case.x_shape, dtype="float32")
    g = geometry_of(case, data_format)
    # One way of counting each, by turns.
    number = AVERAGES.index(case) % 3
    counted, divisor = number != 1, 3 if number == 2 else None
    y = pooled(pool.avg_pool(g, x.dtype, counted, divisor or 0, threads=THREADS), g, data_format, x)
    expected = reference.avg_pool(
        x, **how(case), count_include_pad=counted, divisor_override=divisor, spatial_dims=case.spatial_dims
    )
    assert_close(y, expected, reduction_length=math.prod(g.kernel_size))


@pytest.mark.parametrize("power", [1, 2, 3, 0.5, -1])
@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("case", [ROWS[1], CHANNELS[1], POOL_CASES[1]], ids=str)
def test_norms_are_the_oracles(case, data_format, power):
    x = normal("norm", case.name, shape=case.x_shape, dtype="float32")
    g = geometry_of(case, data_format)
    y = pooled(pool.lp_pool(g, x.dtype, power, threads=THREADS), g, data_format, x)
    expected = reference.lp_pool(x, power, **how(case), spatial_dims=case.spatial_dims)
    assert_close(y, expected, reduction_length=8 * math.prod(g.kernel_size))


@pytest.mark.parametrize("data_format", FORMATS)
def test_norms_of_infinite_power_are_the_largest_and_the_smallest_magnitude(data_format):
    case = CHANNELS[1]
    x = normal("infinite", shape=case.x_shape, dtype="float32")
    g = geometry_of(case, data_format)
    for power in (math.inf, -math.inf):
        y = pooled(pool.lp_pool(g, x.dtype, power, threads=THREADS), g, data_format, x)
        ours = fastconv.lp_pool2d(put(x, data_format), power, case.kernel_size, 1, padding=1, dilation=2,
                                  data_format=data_format)  # fmt: skip
        assert np.array_equal(y, back(ours, data_format))


# --- adaptive windows ------------------------------------------------------------------------------------------

ADAPTIVE = [
    ((1, 3, 7, 5), (3, 2)),
    ((2, 4, 6, 8), (3, 4)),
    ((1, 2, 4, 3), (6, 5)),
    ((1, 2, 11), (4,)),
    ((1, 8, 5, 6), (1, 1)),
]


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize(("shape", "output"), ADAPTIVE, ids=str)
def test_adaptive_pools_and_their_gradients_are_the_oracles(shape, output, data_format):
    dims = len(output)
    x = whole("adaptive", shape=shape)
    g = fastconv.PoolGeometry.adaptive(put(x, data_format).shape, output, spatial_dims=dims, data_format=data_format)
    y, indices = poisoned(g.output_shape, x.dtype), poisoned(g.output_shape, np.int64)
    run.emulated(pool.max_pool(g, x.dtype, threads=THREADS), {"x": put(x, data_format), "out": y, "indices": indices})
    expected, where = reference.adaptive_max_pool(x, output)
    assert np.array_equal(back(y, data_format), expected)
    assert np.array_equal(back(indices, data_format), where)
    y = pooled(pool.avg_pool(g, x.dtype, threads=THREADS), g, data_format, x)
    assert_close(y, reference.adaptive_avg_pool(x, output), reduction_length=40)
    grad = whole("adaptive grad", shape=expected.shape)
    dx = graded(pool.max_pool_grad(g, x.dtype, threads=THREADS), g, data_format, grad, where)
    assert np.array_equal(dx, reference.adaptive_max_pool_backward(grad, where, shape))
    dx = graded(pool.avg_pool_grad(g, x.dtype, threads=THREADS), g, data_format, grad)
    assert_close(dx, reference.adaptive_avg_pool_backward(grad, shape), reduction_length=40)


INTEGERS = [np.int8, np.uint8, np.int16, np.int32, np.int64]


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_maxima_of_integers_and_their_gradients_are_the_oracles(dtype, data_format):
    case = PoolCase("", (1, 8, 5, 8), 3, 2, 1)
    limits = np.iinfo(dtype)
    x = np.random.default_rng(0).integers(limits.min, limits.max, case.x_shape, dtype, endpoint=True)
    x[:, 0] = limits.min
    y, where, _ = max_pooled(case, data_format, x)
    # Numbers up to 2**63 are told apart by their ranks.
    values, ranks = np.unique(x, return_inverse=True)
    expected, places = reference.max_pool(ranks.reshape(x.shape).astype(np.float64), **how(case), spatial_dims=2)
    assert np.array_equal(y, values[expected.astype(np.int64)])
    assert np.array_equal(where, places)
    grad = (np.arange(y.size) % 5).astype(dtype).reshape(y.shape)
    dx, wrong = scattered(grad, where, (1, 5, 8), data_format, False)
    assert np.array_equal(dx.reshape(x.shape), reference.max_pool_backward(grad, where, case.x_shape))
    assert not wrong


# --- gradients -------------------------------------------------------------------------------------------------


def graded(steps, g, data_format, grad, where=None, seed=None):
    dx = poisoned(g.x_shape, grad.dtype)
    arrays = {"grad_output": put(grad, data_format), "out": dx}
    if where is not None:
        arrays["indices"] = put(where, data_format)
    run.emulated(steps, arrays, seed)
    return back(dx, data_format)


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_gradients_of_maxima_are_the_oracles(case, data_format):
    g = geometry_of(case, data_format)
    x = whole("ties", case.name, shape=case.x_shape)
    y, where = reference.max_pool(x, **how(case), spatial_dims=case.spatial_dims)
    grad = whole("grad", case.name, shape=y.shape)
    dx = graded(pool.max_pool_grad(g, x.dtype, threads=THREADS), g, data_format, grad, where)
    assert np.array_equal(dx, reference.max_pool_backward(grad, where, case.x_shape))


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("case", AVERAGES, ids=str)
def test_gradients_of_averages_are_the_oracles(case, data_format):
    g = geometry_of(case, data_format)
    number = AVERAGES.index(case) % 3
    counted, divisor = number != 1, 3 if number == 2 else None
    shape = (*case.x_shape[:2], *g.output_size)
    grad = normal("average grad", case.name, shape=shape, dtype="float32")
    dx = graded(pool.avg_pool_grad(g, grad.dtype, counted, divisor or 0, threads=THREADS), g, data_format, grad)
    expected = reference.avg_pool_backward(
        grad, case.x_shape, **how(case), count_include_pad=counted, divisor_override=divisor
    )
    assert_close(dx, expected, reduction_length=math.prod(g.kernel_size))


@pytest.mark.parametrize("data_format", FORMATS)
def test_gradients_of_aligned_shapes_are_written_by_128_bits(data_format):
    case = PoolCase("", (1, 8, 6, 16), 3, 2, 1)
    g = geometry_of(case, data_format)
    x = whole("aligned", shape=case.x_shape)
    y, where = reference.max_pool(x, **how(case))
    arrays = {"grad_output": put(y.astype(np.float32), data_format), "indices": put(where, data_format),
              "out": poisoned(g.x_shape, x.dtype)}  # fmt: skip
    assert global_bytes(run.emulated(pool.max_pool_grad(g, x.dtype, threads=THREADS), arrays, seed=3)) == {16}


# --- any indices -----------------------------------------------------------------------------------------------


def planes(array, data_format):
    """(N, C, *spatial) as kernels see it: (outer, D, H, W, inner), and how to go back."""
    moved = put(array, data_format)
    spatial = (1,) * (5 - array.ndim) + array.shape[2:]
    first = data_format == "channels_first"
    return moved.reshape(-1, *spatial, 1) if first else moved.reshape(array.shape[0], *spatial, array.shape[1])


def scattered(values, where, size, data_format, latest, seed=None):
    given = {"grad_output": planes(values, data_format), "indices": planes(where, data_format)}
    shape = given["indices"].shape
    buffers = {name: poisoned(b.shape, b.dtype) for name, b in pool.scatter_workspace(shape, size, THREADS).items()}
    out = poisoned((shape[0], *size, shape[4]), values.dtype)
    run.emulated(
        pool.scatter(shape, size, values.dtype, latest, threads=THREADS), {**given, **buffers, "out": out}, seed
    )
    N, C = values.shape[:2]
    out = out.reshape(N, C, *size) if data_format == "channels_first" else np.moveaxis(out.reshape(N, *size, C), -1, 1)
    return out, int(buffers["reach"][6])


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("case", [ROWS[1], CHANNELS[0], SMALL[2], POOL_CASES[-5]], ids=str)
def test_gradients_of_unknown_windows_are_the_oracles(case, data_format):
    x = whole("unknown", case.name, shape=case.x_shape)
    y, where = reference.max_pool(x, **how(case), spatial_dims=case.spatial_dims)
    grad = whole("unknown grad", case.name, shape=y.shape)
    size = (1,) * (3 - case.spatial_dims) + case.x_shape[2:]
    dx, wrong = scattered(grad, where, size, data_format, False)
    assert np.array_equal(dx.reshape(case.x_shape), reference.max_pool_backward(grad, where, case.x_shape))
    assert not wrong


@pytest.mark.parametrize("data_format", FORMATS)
def test_unpooling_takes_the_latest_and_the_way_back_reads_it(data_format):
    where = np.random.default_rng(0).integers(0, 30, (2, 4, 3, 4))
    x = whole("unpool", shape=where.shape)
    y, wrong = scattered(x, where, (1, 5, 6), data_format, True, seed=2)
    assert np.array_equal(y[:, :, 0], reference.max_unpool(x, where, (5, 6)))
    assert not wrong
    grad = whole("unpool grad", shape=(2, 4, 5, 6))
    shape = planes(where, data_format).shape
    out = poisoned(put(where, data_format).shape, np.float32)
    arrays = {"grad_output": put(grad, data_format), "indices": put(where, data_format), "out": out}
    run.emulated(pool.gather((shape[0], 12, shape[4]), 30, grad.dtype, threads=THREADS), arrays)
    assert np.array_equal(back(out, data_format), reference.max_unpool_backward(grad, where))


def test_indices_outside_the_plane_are_told():
    where = np.arange(8).reshape(1, 2, 2, 2)
    x = whole("outside", shape=where.shape)
    for value, gradient, unpooled in ((-1, 0, 1), (8, 1, 1), (2**40, 1, 1), (-2, 1, 1), (7, 0, 0)):
        where[0, 1, 1, 0] = value
        assert scattered(x, where, (1, 2, 4), "channels_first", False)[1] == gradient
        assert scattered(x, where, (1, 2, 4), "channels_first", True)[1] == unpooled
    nowhere, wrong = scattered(x, np.full_like(where, -1), (1, 2, 4), "channels_first", False)
    assert not nowhere.any()
    assert not wrong


@pytest.mark.parametrize("data_format", FORMATS)
def test_indices_outside_the_plane_count_for_nothing(data_format):
    """Nothing is written or read where they point to, which the emulator would refuse."""
    where = np.random.default_rng(1).integers(0, 30, (2, 4, 3, 4))
    where.flat[::7] = np.resize([-1, -7, 30, 2**31 + 3, 2**32 + 3, 2**40, -(2**63), 2**63 - 1], where.flat[::7].shape)
    x, inside = whole("outside", shape=where.shape), (where >= 0) & (where < 30)
    added, latest = np.zeros((2, 4, 30), np.float32), np.zeros((2, 4, 30), np.float32)
    for n, c, p, q in np.argwhere(inside):
        added[n, c, where[n, c, p, q]] += x[n, c, p, q]
        latest[n, c, where[n, c, p, q]] = x[n, c, p, q]
    for wanted, takes_latest in ((added, False), (latest, True)):
        y, wrong = scattered(x, where, (1, 5, 6), data_format, takes_latest)
        assert np.array_equal(y.reshape(wanted.shape), wanted)
        assert wrong
    grad, out = whole("outside grad", shape=(2, 4, 5, 6)), poisoned(put(where, data_format).shape, np.float32)
    shape = planes(where, data_format).shape
    arrays = {"grad_output": put(grad, data_format), "indices": put(where, data_format), "out": out}
    run.emulated(pool.gather((shape[0], 12, shape[4]), 30, grad.dtype, threads=THREADS), arrays)
    read = np.take_along_axis(grad.reshape(2, 4, 30), np.where(inside, where, 0).reshape(2, 4, 12), 2)
    assert np.array_equal(back(out, data_format), np.where(inside, read.reshape(where.shape), 0))


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("case", [ROWS[1], CHANNELS[0]], ids=str)
def test_indices_outside_their_window_count_for_nothing(case, data_format):
    g = geometry_of(case, data_format)
    x = whole("ties", case.name, shape=case.x_shape)
    y, where = reference.max_pool(x, **how(case), spatial_dims=case.spatial_dims)
    bad = where.copy()
    bad.flat[::5] = np.resize([-1, 10**6, 2**32 + 1, -(2**63)], bad.flat[::5].shape)
    y = y.astype(x.dtype)
    dx = graded(pool.max_pool_grad(g, x.dtype, threads=THREADS), g, data_format, y, bad)
    assert np.array_equal(dx, reference.max_pool_backward(np.where(bad == where, y, 0), where, case.x_shape))


@given(case=pool_cases(), last=strategies.booleans())
@settings(max_examples=15, deadline=None)
def test_drawn_pools_are_the_oracles(case, last):
    data_format = FORMATS[last]
    x = whole("drawn", shape=case.x_shape)
    if x.size > 600:
        x = x[:1, :1]
        case = PoolCase("", x.shape, **how(case))
    y, indices, _ = max_pooled(case, data_format, x)
    expected, where = reference.max_pool(x, **how(case), spatial_dims=case.spatial_dims)
    assert np.array_equal(y, expected)
    assert np.array_equal(indices, where)
    g = geometry_of(case, data_format)
    dx = graded(pool.max_pool_grad(g, x.dtype, threads=THREADS), g, data_format, y, where)
    assert np.array_equal(dx, reference.max_pool_backward(y, where, case.x_shape))


# --- machine code ----------------------------------------------------------------------------------------------

IMAGE = {"channels_first": (8, 64, 56, 56), "channels_last": (8, 56, 56, 64)}


def step_of(what, data_format, dtype=np.float32, shape=None):
    g = fastconv.PoolGeometry.create(shape or IMAGE[data_format], 3, 2, 1, spatial_dims=2, data_format=data_format)
    return getattr(pool, what)(g, np.dtype(dtype))[0]


@pytest.mark.parametrize("architecture", TESTED)
@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("what", ["max_pool", "avg_pool", "max_pool_grad", "avg_pool_grad"])
def test_machine_code_keeps_its_budget(what, data_format, architecture):
    made = compiled(step_of(what, data_format), architecture)
    assert budget(made, 96, ("LDG.E.128", "STG.E.128")) == []


@pytest.mark.parametrize("dtype", INTEGERS)
def test_pools_of_integers_compile(dtype):
    found = [step_of("max_pool", "channels_last", dtype)]
    found += pool.scatter((8, 1, 28, 28, 64), (1, 56, 56), np.dtype(dtype))
    assert [budget(compiled(step, "sm_90a"), 96) for step in found] == [[], [], [], []]


def variants():
    """Steps of every other kind: formats and dtypes, divisors that differ, norms, adaptive windows, any indices."""
    half, double = np.dtype(np.float16), np.dtype(np.float64)
    for data_format in FORMATS:
        shape = IMAGE[data_format]
        g = fastconv.PoolGeometry.create(shape, 3, 2, 1, 1, True, spatial_dims=2, data_format=data_format)
        adaptive = fastconv.PoolGeometry.adaptive(shape, (5, 7), spatial_dims=2, data_format=data_format)
        f32 = np.dtype(np.float32)
        outer, inner = (8 * 64, 1) if data_format == "channels_first" else (8, 64)
        made = {
            "half max": pool.max_pool(g, half), "bfloat16 max gradient": pool.max_pool_grad(g, BFLOAT16),
            "double average": pool.avg_pool(g, double, False), "average": pool.avg_pool(g, f32, False),
            "average gradient": pool.avg_pool_grad(g, f32, False), "norm 3": pool.lp_pool(g, f32, 3),
            "norm 2": pool.lp_pool(g, f32, 2), "norm -inf": pool.lp_pool(g, f32, -math.inf),
            "adaptive": pool.max_pool(adaptive, f32), "adaptive gradient": pool.avg_pool_grad(adaptive, f32),
            "scatter": pool.scatter((outer, 1, 28, 28, inner), (1, 56, 56), f32, True),
            "gather": pool.gather((outer, 784, inner), 3136, f32),
        }  # fmt: skip
        # Formats share most of them.
        once = {
            k: v for k, v in made.items() if data_format == "channels_last" or k in ("half max", "average gradient")
        }
        yield from ((f"{name}, {data_format}", step) for name, steps in once.items() for step in steps)


def test_every_variant_compiles_without_spills():
    for name, step in variants():
        faults = budget(compiled(step, "sm_90a"), 128, double=name.startswith("double"))
        # Divisions that are not by constants are subroutines.
        assert [fault for fault in faults if "CALL" not in fault] == [], name


@pytest.mark.parametrize("data_format", FORMATS)
def test_wide_indices_give_the_same(data_format, monkeypatch):
    monkeypatch.setattr(pool, "needs_wide", lambda *extents: True)
    case = ROWS[1] if data_format == "channels_first" else CHANNELS[0]
    x = whole("wide", shape=case.x_shape)
    y, indices, _ = max_pooled(case, data_format, x)
    expected, where = reference.max_pool(x, **how(case))
    assert np.array_equal(y, expected)
    assert np.array_equal(indices, where)
    g = geometry_of(case, data_format)
    steps = pool.max_pool_grad(g, x.dtype, threads=THREADS)
    assert np.array_equal(graded(steps, g, data_format, y, where), reference.max_pool_backward(y, where, case.x_shape))
    for step in (*steps, *pool.avg_pool(g, x.dtype), *pool.scatter((8, 1, 4, 4, 1), (1, 8, 8), x.dtype)):
        faults = budget(compiled(step, "sm_90a"), 128)
        assert [fault for fault in faults if "CALL" not in fault] == []
    dx, wrong = scattered(y.astype(np.float32), where, (1, *case.x_shape[2:]), data_format, False)
    assert np.array_equal(dx[:, :, 0], reference.max_pool_backward(y, where, case.x_shape))
    assert not wrong


def test_indices_are_wide_from_two_to_the_31_elements_on():
    small = fastconv.PoolGeometry.create((1, 1, 1000, 1000), 3, spatial_dims=2)
    large = fastconv.PoolGeometry.create((2**11, 1, 1024, 1024), 3, spatial_dims=2)
    assert pool.max_pool(small, np.dtype(np.float32))[0].arguments[4].dtype == np.int32
    assert pool.max_pool(large, np.dtype(np.float32))[0].arguments[4].dtype == np.int64
