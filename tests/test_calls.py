"""Prepared calls: a call like the last goes the short way, with the same result; any other goes the long way."""

import threading

import numpy as np
import pytest
from support import normal, subclassed

import fastconv
from fastconv import calls, config, registry
from fastconv.errors import ArgumentTypeError, DTypeError, ShapeError
from fastconv.testing import CONV_CASES, guarded

X = normal("x", shape=(2, 4, 9, 8), dtype="float32")
W = normal("w", shape=(6, 2, 3, 3), dtype="float32")
B = normal("b", shape=(6,), dtype="float32")
HOW = {"padding": 1, "groups": 2}


@pytest.fixture(autouse=True)
def nothing_known():
    """Start and leave without prepared calls."""
    calls.known.clear()
    yield
    calls.known.clear()


def counted(function, *args, **kwargs):
    """Return a result, and whether it came the short way."""
    prepared, taken = dict(calls.known), []
    for key, call in prepared.items():
        calls.known[key] = lambda *a, call=call: taken.append(1) or call(*a)
    try:
        return function(*args, **kwargs), bool(taken)
    finally:
        calls.known.update(prepared)


def conv(x=X, w=W, b=B, **how):
    return fastconv.conv2d(x, w, b, **{**HOW, **how})


@pytest.mark.parametrize("algorithm", ["auto", "direct_small", "implicit_gemm", "winograd_f2x3", "im2col"])
@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_the_second_call_goes_the_short_way_to_the_same_bits(algorithm, data_format, poisoned):
    x = X if data_format == "channels_first" else np.ascontiguousarray(np.moveaxis(X, 1, -1))
    how = {"algorithm": algorithm, "data_format": data_format, "activation": "relu"}
    first, short = counted(conv, x, **how)
    assert not short
    again, short = counted(conv, x, **how)
    assert short
    assert again is not first
    assert again.tobytes() == first.tobytes()
    other, short = counted(conv, -x, -W, -B, **how)
    assert short
    calls.known.clear()
    assert other.tobytes() == conv(-x, -W, -B, **how).tobytes()


@pytest.mark.parametrize("needs", [("input", "weight", "bias"), ["weight"], ("bias", "input"), ()], ids=str)
@pytest.mark.parametrize("algorithm", ["auto", "direct_small", "implicit_gemm"])
def test_gradients_go_the_short_way_to_the_same_bits(needs, algorithm, poisoned):
    def grads():
        return fastconv.conv2d_backward(g, X, W, **HOW, needs=needs, algorithm=algorithm)

    g = normal("g", shape=(2, 6, 9, 8), dtype="float32")
    first, short = counted(grads)
    assert not short
    again, short = counted(grads)
    assert short
    for name, a, b in zip(first._fields, first, again):
        assert (a is None) == (b is None) == (name not in needs)
        assert a is None or a.tobytes() == b.tobytes()


@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_every_case_gives_the_same_bits_again(case):
    x = normal("x", shape=case.x_shape, dtype="float32")
    w = normal("w", shape=case.weight_shape, dtype="float32")
    bias = normal("b", shape=case.weight_shape[:1], dtype="float32")
    operation = getattr(fastconv, f"conv{case.spatial_dims}d")
    how = {"padding_mode": case.padding_mode}
    first, again = (
        operation(x, w, bias, case.stride, case.padding, case.dilation, case.groups, **how) for _ in range(2)
    )
    assert first.tobytes() == again.tobytes()


@pytest.mark.parametrize("needs", [("input",), ("weight",), ("input", "weight", "bias")])
def test_gradients_of_nothing_are_there_again(needs):
    x, w, grad = (np.ones(shape, "float32") for shape in ((0, 2, 5, 5), (3, 2, 3, 3), (0, 3, 3, 3)))
    for _ in range(2):
        found = fastconv.conv2d_backward(grad, x, w, needs=needs)
        assert [a is not None for a in found] == [n in needs for n in ("input", "weight", "bias")]


def test_numbers_that_are_equal_but_not_alike_are_told_apart():
    conv(stride=1)
    for stride in (True, 1.0, np.float64(1), (1.0, 1.0), (True, 1), "1"):
        with pytest.raises(ArgumentTypeError, match="stride"):
            conv(stride=stride)
    for stride in (np.int64(1), np.int32(1), (1, 1), [1, 1]):
        assert np.array_equal(conv(stride=stride), conv(stride=1))
    # Eight bytes that are also the integer 1.
    with pytest.raises(ArgumentTypeError, match="stride"):
        conv(stride=np.array([1], np.int64).view(np.float64)[0])


def test_what_is_wrong_is_refused_after_what_is_right():
    conv()
    with pytest.raises(ShapeError, match="channels"):
        conv(X[:, :3])
    with pytest.raises(DTypeError, match="weight"):
        conv(X.astype("float64"))
    with pytest.raises(ShapeError, match="bias"):
        conv(b=B[:5].copy())
    with pytest.raises(ArgumentTypeError, match="x"):
        conv(X.tolist())


OTHER = {
    "reversed": lambda a: a[:, :, ::-1],
    "other byte order": lambda a: a.astype(">f4"),
    "broadcast": lambda a: np.broadcast_to(a[:1], a.shape),
    "fortran": np.asfortranarray,
    "unaligned": lambda a: np.frombuffer(bytearray(1) + a.tobytes(), np.uint8)[1:].view("f4").reshape(a.shape),
    "read-only": lambda a: np.frombuffer(a.tobytes(), "f4").reshape(a.shape),
    "subclass": subclassed,
}


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER)
def test_other_arrays_go_the_long_way(change):
    conv()
    x = change(X)
    result, short = counted(conv, x)
    assert not short
    result, short = counted(conv, x)
    assert not short
    assert np.array_equal(result, conv(np.array(x, "float32", order="C")))


def test_out_and_tensors_go_the_long_way():
    torch = pytest.importorskip("torch")
    conv()
    out = np.empty((2, 6, 9, 8), np.float32)
    result, short = counted(conv, out=out)
    assert result is out
    assert not short
    result, short = counted(conv, *map(torch.from_numpy, (X, W, B)))
    assert isinstance(result, torch.Tensor)
    assert not short


def test_options_hold_for_the_next_call(monkeypatch):
    first = conv()
    with fastconv.options(algorithm="im2col"):
        assert not counted(conv)[1]
        assert counted(conv)[1]
    assert counted(conv)[1]
    monkeypatch.setenv("FASTCONV_WORKSPACE_LIMIT", "4096")
    assert not counted(conv)[1]
    monkeypatch.delenv("FASTCONV_WORKSPACE_LIMIT")
    assert counted(conv)[1]
    config.precision = "high"
    try:
        assert not counted(conv)[1]
    finally:
        del config.precision
    assert np.allclose(first, conv(), atol=1e-5)
    with fastconv.options(poison=True):
        assert not np.isnan(conv()).any()
        assert not np.isnan(conv()).any()


def test_another_registered_algorithm_is_considered():
    conv()
    record = registry.named("direct", "cpu")[0]
    registry.register(record)
    assert not counted(conv)[1]


def test_another_number_of_threads_prepares_anew():
    numba = pytest.importorskip("numba")
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("there is one thread")
    x, w = normal("x", shape=(2, 32, 40, 40), dtype="float32"), normal("w", shape=(32, 32, 3, 3), dtype="float32")
    results = [fastconv.conv2d(x, w, algorithm="implicit_gemm")]
    before = numba.get_num_threads()
    for count in (1, before, 1, 1):
        numba.set_num_threads(count)
        results.append(fastconv.conv2d(x, w, algorithm="implicit_gemm"))
    numba.set_num_threads(before)
    assert all(np.allclose(results[0], r, atol=1e-5) for r in results)


def test_arrays_at_guard_pages_are_not_read_beyond():
    for where in ("after", "before"):
        x, w, b = (guarded(a, where) for a in (X, W, B))
        for algorithm in ("direct_small", "implicit_gemm"):
            first, again = (conv(x, w, b, algorithm=algorithm) for _ in range(2))
            assert np.array_equal(first, again)


def test_what_is_known_is_bounded(monkeypatch):
    monkeypatch.setattr(calls, "MOST", 8)
    for size in range(4, 30):
        fastconv.conv1d(np.ones((1, 1, size)), np.ones((1, 1, 2)))
    assert 0 < len(calls.known) <= 8


def test_threads_share_what_is_known():
    expected, wrong = {n: conv(X[:, :, :n].copy()).tobytes() for n in (5, 7, 9)}, []

    def body():
        for _ in range(50):
            wrong.extend(n for n, result in expected.items() if conv(X[:, :, :n].copy()).tobytes() != result)

    crowd = [threading.Thread(target=body) for _ in range(4)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    assert not wrong


POOLS = {
    "maximum": lambda x, g, **how: fastconv.max_pool2d(x, 3, 2, 1, return_indices=True, **how),
    "maximum alone": lambda x, g, **how: [fastconv.max_pool2d(x, 3, 2, 1, **how)],
    "average": lambda x, g, **how: [fastconv.avg_pool2d(x, 3, 2, 1, **how)],
    "adaptive maximum": lambda x, g, **how: fastconv.adaptive_max_pool2d(x, 3, True, **how),
    "adaptive average": lambda x, g, **how: [fastconv.adaptive_avg_pool2d(x, 3, **how)],
    "gradient of the average": lambda x, g, **how: [fastconv.avg_pool2d_backward(g, x.shape, 3, 2, 1, **how)],
    "gradient of uneven averages": lambda x, g, **how: [
        fastconv.avg_pool2d_backward(g, x.shape, 3, 2, 1, count_include_pad=False, **how)
    ],
    "gradient of the adaptive average": lambda x, g, **how: [fastconv.adaptive_avg_pool2d_backward(g, x.shape, **how)],
}


@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
@pytest.mark.parametrize("batch", [(), (2,)], ids=["image", "batch"])
@pytest.mark.parametrize("pool", POOLS)
def test_pools_go_the_short_way_to_the_same_bits(pool, data_format, batch, poisoned):
    sizes = ((7, 9), (4, 5))
    first = data_format == "channels_first"
    x, g = (normal(pool, shape=(*batch, *((18, *s) if first else (*s, 18))), dtype="float32") for s in sizes)
    results, short = counted(POOLS[pool], x, g, data_format=data_format)
    assert not short
    again, short = counted(POOLS[pool], x, g, data_format=data_format)
    assert short
    assert [(a.shape, a.tobytes()) for a in again] == [(a.shape, a.tobytes()) for a in results]


@pytest.mark.parametrize("channels", [1, 18])
@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_indices_of_other_windows_than_the_first_call_had_go_the_short_way_too(data_format, channels):
    x = normal("x", shape=(2, channels, 12, 12), dtype="float32")
    if data_format == "channels_last":
        x = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    how = {"data_format": data_format}
    y, local = fastconv.max_pool2d(x, 2, return_indices=True, **how)
    strange = np.random.default_rng(0).integers(-1, 144, local.shape)
    for where in (local, strange, strange, local, local):
        dx, short = counted(fastconv.max_pool2d_backward, y, where, x.shape, **how)
        known = dict(calls.known)
        calls.known.clear()
        assert dx.tobytes() == fastconv.max_pool2d_backward(y, where, x.shape, **how).tobytes()
        calls.known.clear()
        calls.known.update(known)
    assert short
    for bad in (-2, 144):
        strange.flat[-1] = bad
        with pytest.raises(fastconv.ArgumentError, match=f"not {bad}"):
            fastconv.max_pool2d_backward(y, strange, x.shape, **how)
