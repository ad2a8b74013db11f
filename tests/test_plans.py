"""Plans give what calls give, bit by bit, and notice a weight that has changed."""

import threading

import numpy as np
import pytest
from support import ALGORITHMS, normal, promise

import fastconv
from fastconv import nn
from fastconv.errors import ArgumentTypeError, DTypeError, ShapeError, UnsupportedError, WorkspaceLimitError
from fastconv.ops.plans import ConvPlan
from fastconv.testing import CONV_CASES, guarded

X = normal("x", shape=(2, 16, 13, 12), dtype="float32")
W = normal("w", shape=(20, 16, 3, 3), dtype="float32")
B = normal("b", shape=(20,), dtype="float32")


def plan_and_call(x, w, bias, case_or_how, dims):
    plan = getattr(fastconv, f"plan_conv{dims}d")(x.shape, w, bias, **case_or_how)
    return plan, getattr(fastconv, f"conv{dims}d")(x, w, bias, **case_or_how)


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "auto"])
@pytest.mark.parametrize("case", CONV_CASES[::3], ids=str)
def test_a_plan_gives_what_the_call_gives(case, algorithm, poisoned):
    x = normal("x", shape=case.x_shape, dtype="float32")
    w = normal("w", shape=case.weight_shape, dtype="float32")
    bias = normal("b", shape=case.weight_shape[:1], dtype="float32")
    how = {
        "stride": case.stride, "padding": case.padding, "dilation": case.dilation, "groups": case.groups,
        "padding_mode": case.padding_mode, "algorithm": algorithm, "precision": promise(algorithm),
        "activation": "leaky_relu",
    }  # fmt: skip
    try:
        plan, expected = plan_and_call(x, w, bias, how, case.spatial_dims)
    except (UnsupportedError, WorkspaceLimitError) as error:
        # The same refusal, whichever is asked first.
        with pytest.raises(type(error)):
            getattr(fastconv, f"conv{case.spatial_dims}d")(x, w, bias, **how)
        return
    for _ in range(2):
        assert plan(x).tobytes() == expected.tobytes()
    assert algorithm in ("auto", plan.algorithm)
    assert plan.geometry.output_shape == expected.shape


@pytest.mark.parametrize("dtype", ["float64", "float16", "int8"])
@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_every_dtype_format_and_stride(dtype, data_format):
    x = (4 * X).astype(dtype) if data_format == "channels_first" else np.moveaxis((4 * X).astype(dtype), 1, -1)
    w, how = (4 * W).astype(dtype), {"padding": 1, "data_format": data_format}
    for given in (x, x.copy("C"), x[::-1]):
        plan, expected = plan_and_call(given, w, None, how, 2)
        assert np.array_equal(plan(given), fastconv.conv2d(np.ascontiguousarray(given), w, **how))
        assert plan(given).dtype == expected.dtype


@pytest.mark.parametrize("algorithm", ["auto", "implicit_gemm", "winograd_f2x3", "im2col", "direct"])
@pytest.mark.parametrize("layout", ["contiguous", "strided", "half"])
def test_a_changed_weight_is_noticed(algorithm, layout):
    x, w = X, W.copy()
    if layout == "strided":
        w = np.asfortranarray(w)
    elif layout == "half":
        x, w = X.astype("float16"), w.astype("float16")
    plan, how = fastconv.plan_conv2d(x.shape, w, padding=1, algorithm=algorithm), {"algorithm": algorithm}
    plan(x)
    # One number at either end, the last bit of one, the sign of zero; and everything.
    for change in ((0, 0, 0, 0), (-1, -1, -1, -1), (3, 2, 1, 0), ...):
        w[change] = np.nextafter(w[change], w.dtype.type(9)) if change is not ... else -w
        assert plan(x).tobytes() == fastconv.conv2d(x, w, padding=1, **how).tobytes()


def test_a_changed_bias_is_noticed():
    bias = B.copy()
    plan = fastconv.plan_conv2d(X.shape, W, bias)
    before = plan(X)
    bias += 1
    assert np.allclose(plan(X), before + 1, atol=1e-5)


def test_refresh_packs_the_weight_as_it_is_now():
    w = W.copy()
    plan = fastconv.plan_conv2d(X.shape, w)
    w *= 2
    plan.refresh()
    assert plan(X).tobytes() == fastconv.conv2d(X, w).tobytes()


def test_out_is_written():
    plan, out = fastconv.plan_conv2d(X.shape, W, B), np.full((2, 20, 11, 10), np.nan, np.float32)
    assert plan(X, out) is out
    assert np.array_equal(out, plan(X))


def test_an_image_without_a_batch_and_an_empty_batch():
    plan = fastconv.plan_conv2d(X.shape[1:], W)
    assert np.array_equal(plan(X[0]), fastconv.conv2d(X[0], W))
    empty = fastconv.plan_conv2d((0, *X.shape[1:]), W)
    empty.refresh()
    assert empty(X[:0]).shape == (0, 20, 11, 10)


def test_tensors_give_tensors():
    torch = pytest.importorskip("torch")
    plan = fastconv.plan_conv2d(X.shape, torch.from_numpy(W), torch.from_numpy(B))
    result = plan(torch.from_numpy(X))
    assert isinstance(result, torch.Tensor)
    assert np.array_equal(result.numpy(), fastconv.conv2d(X, W, B))
    with pytest.raises(ArgumentTypeError, match="x must be an array of torch"):
        plan(X)


def test_wrong_arguments_are_named():
    plan = fastconv.plan_conv2d(X.shape, W)
    with pytest.raises(ShapeError, match="x must have the plan's input shape"):
        plan(X[:1])
    with pytest.raises(DTypeError, match="x has dtype float64"):
        plan(X.astype("float64"))
    with pytest.raises(ShapeError, match="out must have the output's shape"):
        plan(X, np.empty((2, 20, 11, 11), np.float32))
    with pytest.raises(ShapeError, match="x_shape"):
        fastconv.plan_conv2d((2, 15, 13, 12), W)
    with pytest.raises(ShapeError, match="weight must have 4 dimensions"):
        fastconv.plan_conv2d(X.shape, W[0])
    with pytest.raises(ShapeError, match="bias"):
        fastconv.plan_conv2d(X.shape, W, B[:3])
    with pytest.raises(DTypeError, match="byte order"):
        fastconv.plan_conv2d(X.shape, W.astype(">f4"))
    with pytest.raises(ArgumentTypeError, match="weight"):
        fastconv.plan_conv2d(X.shape, None)


def test_workspace_is_stated_with_what_is_kept():
    choice = fastconv.algorithms(fastconv.ConvGeometry.create(X.shape, W.shape))
    stated = {c.name: c.workspace_bytes for c in choice if c.supported}
    for name in ("implicit_gemm", "winograd_f2x3"):
        plan = fastconv.plan_conv2d(X.shape, W, algorithm=name)
        assert plan.workspace_bytes == stated[name] + W.nbytes
    assert fastconv.plan_conv2d(X.shape, W, algorithm="im2col").workspace_bytes == stated["im2col"]


def test_options_after_the_first_call_do_not_matter_but_threads_do():
    with fastconv.options(algorithm="winograd_f2x3"):
        plan = fastconv.plan_conv2d(X.shape, W)
    expected = plan(X)
    with fastconv.options(algorithm="direct"):
        assert np.array_equal(plan(X), expected)
    with fastconv.options(threads=1):
        assert np.allclose(plan(X), expected, atol=1e-4)
    assert plan.algorithm == "winograd_f2x3"
    assert "winograd_f2x3" in repr(plan)


def test_several_threads_may_call_it_while_the_weight_changes():
    w = W.copy()
    plan, results, wrong = fastconv.plan_conv2d(X.shape, w, padding=1), [], []
    for sign in (1, -1):
        w[:] = sign * W
        results.append(fastconv.conv2d(X, w, padding=1).tobytes())

    def body():
        for _ in range(20):
            wrong.extend([1] if plan(X).tobytes() != results[0] else [])

    w[:] = W
    crowd = [threading.Thread(target=body) for _ in range(4)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    assert not wrong
    w[:] = -W
    assert plan(X).tobytes() == results[1]


def test_it_reads_nothing_beyond_the_arrays():
    for where in ("after", "before"):
        x, w, b = (guarded(a, where) for a in (X, W[:, :, :2].copy(), B))
        for algorithm in ("implicit_gemm", "winograd_f2x3"):
            plan = fastconv.plan_conv2d(x.shape, w, b, algorithm=algorithm)
            assert np.array_equal(plan(x), fastconv.conv2d(x, w, b, algorithm=algorithm))


def spied(monkeypatch):
    """Count the calls of plans."""
    seen, call = [], ConvPlan.__call__
    monkeypatch.setattr(ConvPlan, "__call__", lambda self, *a: seen.append(self) or call(self, *a))
    return seen


def test_a_layer_in_evaluation_mode_uses_a_plan_from_the_second_input_on(monkeypatch):
    seen = spied(monkeypatch)
    layer = nn.Conv2d(16, 20, 3, padding=1, activation="relu", rng=0)
    expected = layer(X)
    layer.eval()
    for count in (0, 1, 2):
        assert layer(X).tobytes() == expected.tobytes()
        assert len(seen) == count
    layer.train()
    layer(X)
    assert len(seen) == 2


def test_a_layer_notices_new_weights_options_and_arguments(monkeypatch):
    seen = spied(monkeypatch)
    layer = nn.Conv2d(16, 20, 3, rng=0).eval()

    def check(used):
        before = len(seen)
        expected = fastconv.conv2d(X, layer.weight.data, layer.bias.data, algorithm=layer.algorithm)
        assert np.array_equal(layer(X), expected)
        assert len(seen) - before == used

    check(0)
    check(1)
    layer.weight.data *= 2
    check(1)
    layer.load_state_dict({name: -value for name, value in layer.state_dict().items()})
    check(1)
    layer.weight.data = layer.weight.data + 1
    check(0)
    check(1)
    layer.algorithm = "direct"
    check(0)
    check(1)


def test_a_layer_with_plans_is_copied_and_pickled():
    import copy
    import pickle

    layer = nn.Conv2d(16, 20, 3, rng=0).eval()
    expected = layer(X)
    layer(X)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        layer.weight.data[:] = 0
        assert np.array_equal(other(X), expected)
        assert np.array_equal(other(X), expected)
        layer.weight.data[:] = other.weight.data
