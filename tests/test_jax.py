"""The JAX bridge: fastconv's numbers under every transformation, lax's within rounding, and XLA's buffers in place."""

import re
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from support import BFLOAT16, HERE, conv_arguments, normal, op, pool_arguments, run_python, whole

import fastconv
from fastconv.testing import CONV_CASES, POOL_CASES, assert_close

jax = pytest.importorskip("jax", reason="JAX is not installed: pip install 'fastconv[jax]'")

import jax.numpy as jnp  # noqa: E402
from jax import export, lax  # noqa: E402

import fastconv.jax as fj  # noqa: E402
from fastconv import nn  # noqa: E402

every_conv = pytest.mark.parametrize("case", CONV_CASES, ids=str)
every_pool = pytest.mark.parametrize("case", POOL_CASES, ids=str)


def twin(name, dims):
    return getattr(fj, name.format(dims))


def operands(case, dtype=np.float32, make=normal):
    shapes = case.x_shape, case.weight_shape, case.weight_shape[:1]
    return tuple(make(case, name, shape=shape, dtype=dtype) for name, shape in zip(("x", "weight", "bias"), shapes))


def last(x):
    """Channels-first as channels-last."""
    return np.ascontiguousarray(np.moveaxis(x, 1, -1))


@contextmanager
def x64(wide):
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", wide)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def close(actual, expected, length=100):
    assert_close(np.asarray(actual), np.asarray(expected), reduction_length=length)


# --- the same numbers as for NumPy arrays ----------------------------------------------------------------------


@every_conv
def test_convolutions_and_their_gradients_are_those_of_numpy_arrays(case):
    how, dims, (x, w, b) = conv_arguments(case), case.spatial_dims, operands(case)
    y = op("conv{}d", dims)(x, w, b, **how)
    grad = normal(case, "grad", shape=y.shape, dtype=np.float32)

    @jax.jit
    def both(x, w, b, grad):
        y, back = jax.vjp(lambda *a: twin("conv{}d", dims)(*a, **how), x, w, b)
        return y, *back(grad)

    found = both(x, w, b, grad)
    expected = op("conv{}d_backward", dims)(grad, x, w, **how)
    for ours, theirs in zip(found[:3], (y, *expected[:2])):
        np.testing.assert_array_equal(ours, theirs)
    # Summed by XLA, where terms may cancel.
    allowed = 1e-5 * np.abs(grad).sum(axis=(0, *range(2, grad.ndim))) + 1e-6
    assert (np.abs(found[3] - expected.bias) <= allowed).all()


TRANSPOSED = [
    {"stride": 2, "padding": 1, "output_padding": 1},
    {"stride": (2, 1), "dilation": 2, "groups": 2, "activation": "relu"},
    {"stride": 3, "output_size": (16, 17)},
]


@pytest.mark.parametrize("how", TRANSPOSED, ids=str)
def test_transposed_convolutions_and_their_gradients_are_those_of_numpy_arrays(how):
    x, w = normal("x", shape=(2, 4, 5, 6), dtype="float32"), normal("w", shape=(4, 3, 3, 2), dtype="float32")
    b = normal("b", shape=(3 * how.get("groups", 1),), dtype="float32")
    y, back = jax.vjp(lambda x, w, b: fj.conv_transpose2d(x, w, b, **how), x, w, b)
    close(y, fastconv.conv_transpose2d(x, w, b, **how))
    close(fj.conv_transpose2d(x[0], w, b, **how), y[0])
    grad = np.asarray(normal("g", shape=y.shape, dtype="float32") * (np.asarray(y) != 0))
    plain = {name: value for name, value in how.items() if name != "activation"}
    expected = fastconv.conv_transpose2d_backward(grad, x, w, **plain)
    for found, wanted in zip(back(jnp.asarray(grad)), expected):
        close(found, wanted)


@every_pool
def test_pools_and_their_gradients_are_those_of_numpy_arrays(case):
    how, dims = pool_arguments(case), case.spatial_dims
    x = normal(case, "x", shape=case.x_shape, dtype=np.float32)
    y, indices = op("max_pool{}d", dims)(x, **how, return_indices=True)
    grad = normal(case, "grad", shape=y.shape, dtype=np.float32)

    @jax.jit
    def maximum(x, grad):
        (y, indices), back = jax.vjp(lambda x: twin("max_pool{}d", dims)(x, **how, return_indices=True), x)
        return y, indices, *back((grad, np.zeros(indices.shape, jax.dtypes.float0)))

    @jax.jit
    def average(x, grad):
        y, back = jax.vjp(lambda x: twin("avg_pool{}d", dims)(x, **how), x)
        return y, *back(grad)

    dx = op("max_pool{}d_backward", dims)(grad, indices, x.shape)
    for found, expected in zip(maximum(x, grad), (y, indices, dx)):
        np.testing.assert_array_equal(found, expected)
    expected = op("avg_pool{}d", dims)(x, **how), op("avg_pool{}d_backward", dims)(grad, x.shape, **how)
    for found, wanted in zip(average(x, grad), expected):
        np.testing.assert_array_equal(found, wanted)


def test_adaptive_pools_and_their_gradients_are_those_of_numpy_arrays():
    x = normal("x", shape=(2, 3, 7, 9), dtype="float32")
    y, back = jax.vjp(lambda x: fj.adaptive_avg_pool2d(x, (3, 4)), x)
    np.testing.assert_array_equal(y, fastconv.adaptive_avg_pool2d(x, (3, 4)))
    np.testing.assert_array_equal(back(y)[0], fastconv.adaptive_avg_pool2d_backward(np.asarray(y), x.shape))
    y, back = jax.vjp(lambda x: fj.adaptive_max_pool2d(x, (3, 4)), x)
    maxima, indices = fastconv.adaptive_max_pool2d(x, (3, 4), return_indices=True)
    np.testing.assert_array_equal(y, maxima)
    np.testing.assert_array_equal(back(y)[0], fastconv.adaptive_max_pool2d_backward(maxima, indices, x.shape))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("power", [1, 2, 3, 2.5, 0.5, -1, np.inf, -np.inf])
def test_norms_and_their_gradients_are_those_of_numpy_arrays(dtype, power):
    how = {"kernel_size": (3, 2), "stride": 2, "padding": 1, "ceil_mode": True}
    x = normal("x", shape=(2, 3, 7, 6), dtype=dtype)
    # A window of zeros, and zeros among other numbers.
    x[0, 0, :4], x[1, 1, 2, 3] = 0, 0
    slack = {"float64": 1e-12, "float32": 2e-5, "float16": 4e-3}[dtype]
    with x64(dtype == "float64"):
        y, back = jax.vjp(jax.jit(lambda x: fj.lp_pool2d(x, power, **how)), x)
        expected = fastconv.lp_pool2d(x, power, **how)
        assert y.dtype == expected.dtype
        np.testing.assert_allclose(y, expected, rtol=slack)
        if np.isinf(power) or dtype == "float16":
            return
        grad = normal("g", shape=expected.shape, dtype=dtype)
        wanted = fastconv.lp_pool2d_backward(grad, x, power, **how)
        np.testing.assert_allclose(back(grad)[0], wanted, rtol=0, atol=slack * np.abs(wanted).max())


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_unpooling_and_its_gradient_are_those_of_numpy_arrays(dims, data_format):
    x = normal("unpool", shape=(2, 3, *(9, 7, 5)[:dims]), dtype="float32")
    x, how = x if data_format == "channels_first" else last(x), {"data_format": data_format}
    pooled, where = jax.jit(lambda x: twin("max_pool{}d", dims)(x, 3, 2, 1, return_indices=True, **how))(x)
    unpool = jax.jit(lambda p: twin("max_unpool{}d", dims)(p, where, 3, 2, 1, x.shape, **how))
    y, back = jax.vjp(unpool, pooled)
    arrays = np.asarray(pooled), np.asarray(where, np.int64)
    np.testing.assert_array_equal(y, op("max_unpool{}d", dims)(*arrays, 3, 2, 1, x.shape, **how))
    expected = op("max_unpool{}d_backward", dims)(x, arrays[1], **how)
    np.testing.assert_array_equal(back(jnp.asarray(x))[0], expected)
    np.testing.assert_array_equal(jax.vmap(unpool)(jnp.stack([pooled, 2 * pooled]))[1], 2 * y)
    # One image, the size that follows from the pooling, and indices of either width.
    for wide in (False, True):
        with x64(wide):
            alone = twin("max_unpool{}d", dims)(arrays[0][1], arrays[1][1], 3, 2, 1, **how)
            np.testing.assert_array_equal(alone, op("max_unpool{}d", dims)(arrays[0][1], arrays[1][1], 3, 2, 1, **how))


def test_indices_to_unpool_are_checked():
    x, where = jnp.ones((1, 1, 2)), jnp.array([[[0, 4]]])
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"indices must lie in 0 to 3 .*, not 4"):
        fj.max_unpool1d(x, where, 2).block_until_ready()
    with pytest.raises(fastconv.DTypeError, match="indices must have dtype int32, int64, not float32"):
        fj.max_unpool1d(x, x, 2)
    with pytest.raises(fastconv.ShapeError, match="indices must have the shape of x"):
        fj.max_unpool1d(x, where[0], 2)


PATCHES = [case for case in CONV_CASES if case.padding_mode == "zeros" and case.x_shape[0]]


@pytest.mark.parametrize("case", PATCHES, ids=str)
def test_patches_and_their_gradients_are_those_of_numpy_arrays(case):
    x, kernel = normal(case, shape=case.x_shape, dtype="float32"), tuple(case.weight_shape[2:])
    how = {"dilation": case.dilation, "padding": case.padding, "stride": case.stride}
    cols, back = jax.vjp(lambda x: fj.unfold(x, kernel, **how), x)
    np.testing.assert_array_equal(cols, fastconv.unfold(x, kernel, **how))
    image, forth = jax.vjp(lambda cols: fj.fold(cols, x.shape[2:], kernel, **how), cols)
    np.testing.assert_array_equal(image, fastconv.fold(np.asarray(cols), x.shape[2:], kernel, **how))
    # Each is the other's gradient.
    np.testing.assert_array_equal(back(cols)[0], image)
    np.testing.assert_array_equal(forth(jnp.asarray(x))[0], cols)


@pytest.mark.parametrize("dtype", ["float64", "float16", BFLOAT16], ids=str)
def test_patches_of_every_dtype_with_and_without_a_batch(dtype):
    x = normal("x", shape=(2, 3, 5, 6), dtype=dtype)
    with x64(np.dtype(dtype) == np.float64):
        cols = jax.jit(lambda x: fj.unfold(x, (2, 3), padding=1))(x)
        assert cols.dtype == x.dtype
        np.testing.assert_array_equal(cols, fastconv.unfold(x, (2, 3), padding=1))
        np.testing.assert_array_equal(fj.unfold(x[1], (2, 3), padding=1), cols[1])
        np.testing.assert_array_equal(jax.vmap(lambda x: fj.unfold(x, (2, 3), padding=1))(x), cols)
        fold = lambda cols: fj.fold(cols, (5, 6), (2, 3), padding=1)  # noqa: E731
        np.testing.assert_array_equal(fold(cols), fastconv.fold(np.asarray(cols), (5, 6), (2, 3), padding=1))
        np.testing.assert_array_equal(fold(cols[1]), fold(cols)[1])
        assert fold(cols[:0]).shape == (0, 3, 5, 6)


def test_every_operation_for_arrays_is_there_for_jax():
    operations = {n for n in fastconv.__all__ if re.search(r"(conv|pool|transpose)[123]d$|^(un)?fold$", n)}
    # Gradients are `jax.grad`'s.
    assert set(fj.__all__) == {n for n in operations if not n.startswith("plan_")}
    assert all(callable(getattr(fj, name)) for name in fj.__all__)


@pytest.mark.parametrize("dtype", ["float64", "float16", BFLOAT16, "int8"], ids=str)
@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_dtypes_and_formats_are_those_of_numpy_arrays(dtype, data_format):
    with x64(np.dtype(dtype) == np.float64):
        make = whole if dtype == "int8" else normal
        x, w = make("x", shape=(2, 4, 7, 6), dtype=dtype), make("w", shape=(5, 4, 3, 3), dtype=dtype)
        x = x if data_format == "channels_first" else last(x)
        y = fj.conv2d(x, w, padding=1, data_format=data_format)
        expected = fastconv.conv2d(x, w, padding=1, data_format=data_format)
        assert y.dtype == expected.dtype
        np.testing.assert_array_equal(y, expected)
        pooled = fj.max_pool2d(x, 2, data_format=data_format)
        assert pooled.dtype == x.dtype
        np.testing.assert_array_equal(pooled, fastconv.max_pool2d(x, 2, data_format=data_format))
        if dtype == "int8":
            return
        _, back = jax.vjp(lambda x, w: fj.conv2d(x, w, padding=1, data_format=data_format), x, w)
        grads = fastconv.conv2d_backward(expected, x, w, padding=1, data_format=data_format)
        for found, wanted in zip(back(y), grads):
            assert found.dtype == wanted.dtype
            np.testing.assert_array_equal(found, wanted)
        _, back = jax.vjp(lambda x: fj.max_pool2d(x, 2, data_format=data_format), x)
        indices = fastconv.max_pool2d(x, 2, data_format=data_format, return_indices=True)[1]
        wanted = fastconv.max_pool2d_backward(np.asarray(pooled), indices, x.shape, data_format=data_format)
        np.testing.assert_array_equal(back(pooled)[0], wanted)
        _, back = jax.vjp(lambda x: fj.avg_pool2d(x, 2, data_format=data_format), x)
        wanted = fastconv.avg_pool2d_backward(np.asarray(pooled), x.shape, 2, data_format=data_format)
        np.testing.assert_array_equal(back(pooled)[0], wanted)


def test_gradients_of_a_bias_in_half_precision_are_summed_in_float32():
    y, back = jax.vjp(lambda b: fj.conv2d(jnp.ones((1, 1, 64, 64), b.dtype), jnp.ones((1, 1, 1, 1), b.dtype), b),
                      jnp.zeros(1, jnp.bfloat16))  # fmt: skip
    # In bfloat16, a sum of ones stays at 256.
    assert float(back(jnp.ones_like(y))[0][0]) == 4096


@pytest.mark.parametrize("wide", [False, True])
def test_indices_are_of_the_widest_integers_there_are(wide):
    x = normal("x", shape=(1, 2, 4, 4), dtype="float32")
    with x64(wide):
        _, indices = fj.max_pool2d(x, 2, 3, ((2, 0), (0, 0)), return_indices=True)
        assert indices.dtype == (np.int64 if wide else np.int32)
        expected = fastconv.max_pool2d(x, 2, 3, ((2, 0), (0, 0)), return_indices=True)[1]
        # A window in padding alone has -1.
        assert -1 in expected
        np.testing.assert_array_equal(indices, expected)


def test_an_image_without_a_batch_and_numpy_arrays_are_taken():
    x, w, b = (a[0] if a.ndim == 4 else a for a in operands(CONV_CASES[8]))
    w = operands(CONV_CASES[8])[1]
    np.testing.assert_array_equal(fj.conv2d(x, w, b), fastconv.conv2d(x, w, b))
    np.testing.assert_array_equal(fj.max_pool2d(x, 2), fastconv.max_pool2d(x, 2))
    assert isinstance(fj.avg_pool2d(x, 2), jax.Array)


# --- derivatives -----------------------------------------------------------------------------------------------

ACTIVATIONS = {
    None: lambda y: y,
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}


def lax_conv(x, w, b, stride=2, padding=1, dilation=1, groups=1):
    dims = x.ndim - 2
    y = lax.conv_general_dilated(
        x, w, (stride,) * dims, [(padding, padding)] * dims, rhs_dilation=(dilation,) * dims, feature_group_count=groups
    )
    return y + b.reshape(1, -1, *(1,) * dims)


PROBLEM = (
    normal("x", shape=(2, 4, 7, 6), dtype="float32"),
    normal("w", shape=(6, 2, 3, 3), dtype="float32"),
    normal("b", shape=(6,), dtype="float32"),
)
HOW = {"stride": 2, "padding": 1, "groups": 2}


@pytest.mark.parametrize(
    ("mode", "activation"),
    # XLA compiles for long: one of each is enough.
    [*((jax.grad, activation) for activation in ACTIVATIONS), (jax.jacfwd, "leaky_relu"), (jax.hessian, "tanh")],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_derivatives_of_both_modes_and_orders_are_those_of_lax(activation, mode):
    def loss(convolve, activate):
        return jax.jit(mode(lambda *a: (activate(convolve(*a)) ** 3).mean(), argnums=(0, 1, 2)))

    found = loss(lambda *a: fj.conv2d(*a, **HOW, activation=activation), lambda y: y)(*PROBLEM)
    expected = loss(lambda *a: lax_conv(*a, **HOW), ACTIVATIONS[activation])(*PROBLEM)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-6)


def lax_max(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 3, 3), (1, 1, 2, 2), ((0, 0), (0, 0), (1, 1), (1, 1)))


def lax_mean(x):
    window = (1, 1, 3, 3), (1, 1, 2, 2), ((0, 0), (0, 0), (1, 1), (1, 1))
    return lax.reduce_window(x, 0.0, lax.add, *window) / 9


POOLS = {
    "max": (lambda x: fj.max_pool2d(x, 3, 2, 1), lax_max),
    "max, channels last": (
        lambda x: jnp.moveaxis(fj.max_pool2d(jnp.moveaxis(x, 1, -1), 3, 2, 1, data_format="channels_last"), -1, 1),
        lax_max,
    ),
    "average": (lambda x: fj.avg_pool2d(x, 3, 2, 1), lax_mean),
    "norm": (lambda x: fj.lp_pool2d(x, 2, 3, 2, padding=1), lambda x: (9 * lax_mean(x * x)) ** 0.5),
    "unpooled": (
        lambda x: fj.max_unpool2d(x, PLACES.reshape(x.shape), 2),
        lambda x: jnp.zeros((2, 168)).at[np.arange(2)[:, None], PLACES].set(x.reshape(2, 42)),
    ),
    "patches": (
        lambda x: fj.unfold(x, 2, padding=1),
        lambda x: lax.conv_general_dilated_patches(x, (2, 2), (1, 1), ((1, 1), (1, 1))),
    ),
}
PLACES = np.arange(84, dtype=np.int32).reshape(2, 42) * 2


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        *((jax.grad, name) for name in POOLS),
        (jax.jacfwd, "max, channels last"),
        (jax.hessian, "max"),
        (jax.hessian, "average"),
        (jax.hessian, "norm"),
        (jax.hessian, "unpooled"),
        (jax.hessian, "patches"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_derivatives_of_pools_are_those_of_lax(mode, name):
    pools = POOLS[name]
    x = normal("x", shape=(1, 2, 7, 6), dtype="float32")
    x[0, 0, 2, 2] = 0
    found, expected = (jax.jit(mode(lambda x: (pool(x) ** 3).sum()))(x) for pool in pools)  # noqa: B023
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_tangents_of_windows_in_padding_alone_are_zero():
    x = normal("x", shape=(1, 1, 4, 4), dtype="float32")
    _, tangent = jax.jvp(lambda x: fj.max_pool2d(x, 2, 3, ((2, 0), (0, 0))), (x,), (jnp.ones_like(x),))
    assert np.asarray(tangent)[0, 0].tolist() == [[0.0], [1.0]]


@pytest.mark.parametrize("dims", [1, 3])
def test_other_numbers_of_dimensions_agree_with_lax(dims):
    x = normal("x", shape=(2, 3, *(6,) * dims), dtype="float32")
    w, b = normal("w", shape=(4, 3, *(3,) * dims), dtype="float32"), normal("b", shape=(4,), dtype="float32")
    close(twin("conv{}d", dims)(x, w, b, stride=2, padding=1, dilation=2), lax_conv(x, w, b, 2, 1, 2))


def test_gradients_that_nobody_wants_are_not_computed():
    text = str(jax.make_jaxpr(jax.grad(lambda w: fj.conv2d(PROBLEM[0], w, PROBLEM[2], **HOW).sum()))(PROBLEM[1]))
    assert re.findall(r"direction=(\w+)", text) == ["forward", "weight_grad"]


def test_rematerialised_and_scanned_networks_have_the_same_gradients():
    x, w = normal("x", shape=(2, 3, 8, 8), dtype="float32"), normal("w", shape=(4, 3, 3, 3, 3), dtype="float32")
    step = lambda x, w: (fj.conv2d(x, w, padding=1, activation="tanh"), None)  # noqa: E731
    scanned = jax.jit(jax.grad(lambda w: lax.scan(jax.checkpoint(step), x, w)[0].sum()))(w)

    def unrolled(w):
        y = x
        for i in range(4):
            y, _ = step(y, w[i])
        return y.sum()

    close(scanned, jax.grad(unrolled)(w))


# --- vmap ------------------------------------------------------------------------------------------------------

STACKS = {"x": (0, None, None), "weight": (None, 0, None), "all": (1, 0, 0), "bias": (None, None, 0)}


def stacked(axes, size=3):
    return [a if axis is None else np.stack([a * (i + 1) for i in range(size)], axis) for a, axis in zip(PROBLEM, axes)]


@pytest.mark.parametrize("axes", STACKS.values(), ids=list(STACKS))
@pytest.mark.parametrize("what", ["value", "grad"])
def test_vmap_is_one_call_after_another(axes, what):
    def run(*a):
        return fj.conv2d(*a, **HOW, activation="sigmoid")

    function = run if what == "value" else jax.grad(lambda *a: run(*a).sum(), argnums=(0, 1, 2))
    given = stacked(axes)
    found = jax.vmap(function, in_axes=axes)(*given)
    each = [function(*(a if axis is None else a.take(i, axis) for a, axis in zip(given, axes))) for i in range(3)]
    for stack, *parts in zip(*map(jax.tree.leaves, (found, *each))):
        close(stack, np.stack(parts))


def test_images_are_folded_into_one_call():
    text = str(
        jax.make_jaxpr(jax.vmap(jax.vmap(lambda x: fj.conv2d(x, PROBLEM[1], **HOW))))(np.zeros((5, 3, 4, 9, 9), "f"))
    )
    assert "batch=15" in text
    assert "scan" not in text


def test_a_gradient_of_a_batch_and_gradients_of_its_images_agree():
    x, w, _ = PROBLEM
    loss = lambda w, x: (fj.max_pool2d(fj.conv2d(x, w, **HOW), 2) ** 2).sum()  # noqa: E731
    each = jax.vmap(jax.grad(loss), in_axes=(None, 0))(w, x)
    close(each.sum(0), jax.grad(loss)(w, x))
    close(jax.grad(lambda w: jax.vmap(loss, in_axes=(None, 0))(w, x).sum())(w), jax.grad(loss)(w, x))


def test_empty_stacks_and_batches_are_taken():
    x, w, b = PROBLEM
    assert jax.vmap(lambda x: fj.conv2d(x, w, b, **HOW))(np.zeros((0, *x.shape), "f")).shape[0] == 0
    grads = jax.grad(lambda w, b: fj.conv2d(x[:0], w, b, **HOW).sum(), argnums=(0, 1))(w, b)
    assert not np.any(grads[0])
    assert not np.any(grads[1])


def test_nothing_is_pooled_and_unpooled():
    x, where = jnp.ones((0, 2, 2)), jnp.zeros((0, 2, 2), jnp.int32)
    y, back = jax.vjp(lambda x: fj.max_unpool1d(x, where, 2), x)
    assert back(y)[0].shape == x.shape
    assert jax.jvp(lambda x: fj.max_pool1d(x, 2), (x,), (x,))[1].shape == (0, 2, 1)
    # An image without channels.
    assert fj.adaptive_max_pool1d(jnp.ones((0, 4)), 2).shape == (0, 2)
    assert fj.adaptive_avg_pool2d(jnp.ones((1, 0, 3, 3)), 2).shape == (1, 0, 2, 2)


# --- in the machine --------------------------------------------------------------------------------------------


def test_kernels_read_and_write_the_buffers_of_xla(monkeypatch):
    from fastconv import jax as bridge

    seen = []
    monkeypatch.setattr(bridge, "_computing", lambda text: lambda *found: seen.append([a.ctypes.data for a in found]))
    x, w = (jnp.asarray(a) for a in PROBLEM[:2])
    y = fj.conv2d(x, w, **HOW)
    assert seen == [[a.unsafe_buffer_pointer() for a in (x, w, y.block_until_ready())]]


def test_errors_of_arguments_are_raised_by_the_call():
    x, w, b = PROBLEM
    with pytest.raises(fastconv.ShapeError, match=r"x of shape .* has 4 channels"):
        jax.jit(lambda x: fj.conv2d(x, w))(x)
    with pytest.raises(fastconv.DTypeError, match=r"x must have dtype .*, not int32"):
        fj.conv2d(jnp.ones((1, 2, 3, 3), jnp.int32), jnp.ones((1, 2, 3, 3), jnp.int32))
    with pytest.raises(fastconv.ArgumentTypeError, match="x must be a JAX or NumPy array, not list"):
        fj.max_pool2d([[1.0]], 2)
    with pytest.raises(fastconv.ArgumentTypeError, match="weight must be a JAX or NumPy array, not NoneType"):
        fj.conv2d(x, None)
    with pytest.raises(fastconv.ArgumentError, match="activation must be one of"):
        fj.conv2d(x, w, b, **HOW, activation="gelu")
    with pytest.raises(fastconv.ArgumentTypeError, match="algorithm must be"):
        fj.conv2d(x, w, b, **HOW, algorithm=["direct"])
    with pytest.raises(fastconv.ArgumentError, match="precision must be one of"):
        fj.conv2d(x, w, b, **HOW, precision="low")
    with pytest.raises(TypeError, match=r"conv2d\(\) got an unexpected keyword argument 'out'"):
        fj.conv2d(x, w, out=x)


def test_an_algorithm_that_cannot_do_it_is_refused_by_the_call():
    with pytest.raises(fastconv.UnsupportedError, match="algorithm='winograd' cannot compute this forward"):
        jax.jit(lambda *a: fj.conv2d(*a, **HOW, algorithm="winograd"))(*PROBLEM)
    with (
        fastconv.options(workspace_limit=0),
        pytest.raises(fastconv.WorkspaceLimitError, match=r"needs .* bytes of workspace, more than the limit of 0"),
    ):
        fj.conv2d(*PROBLEM, **HOW, algorithm="im2col")


def test_other_devices_are_refused():
    with pytest.raises(fastconv.UnsupportedError, match="computes on the CPU, not on cuda"):
        export.export(jax.jit(lambda x: fj.max_pool2d(x, 2)), platforms=["cuda"])(PROBLEM[0])


def test_what_goes_wrong_in_a_kernel_is_an_error_of_the_program(monkeypatch):
    def broken(text):
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr(fj, "_computing", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="ZeroDivisionError: of all things"):
        fj.avg_pool2d(PROBLEM[0], 2).block_until_ready()


def test_options_are_those_around_the_call_that_is_traced():
    x, w, _ = PROBLEM
    run = jax.jit(lambda x: fj.conv2d(x, w, **HOW))
    with fastconv.options(algorithm="direct", threads=1):
        text = run.lower(x).as_text()
        y = run(x)
        np.testing.assert_array_equal(y, fastconv.conv2d(x, w, **HOW))
    assert "algorithm" in text
    assert "direct" in text
    np.testing.assert_array_equal(run(x), y)


def test_calls_without_jit_are_the_same():
    y = fj.conv2d(*PROBLEM, **HOW)
    with jax.disable_jit():
        np.testing.assert_array_equal(fj.conv2d(*PROBLEM, **HOW), y)


def test_programs_mean_the_same_in_another_process(tmp_path):
    """What a compiled program kept on disk calls is named in it, not numbered in the process that made it."""
    script = f"""
import jax, numpy as np
jax.config.update("jax_compilation_cache_dir", {str(tmp_path)!r})
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
import fastconv.jax as fj
if %s:
    fj.avg_pool1d(np.ones((1, 1, 8), "f"), 2)
print(np.asarray(fj.conv1d(np.arange(6, dtype="f").reshape(1, 1, 6), np.float32([[[1, 0, -1]]]))).tolist())
"""
    assert run_python(script % True) == run_python(script % False) == "[[[-2.0, -2.0, -2.0, -2.0]]]\n"
    assert list(tmp_path.rglob("*"))


def test_threads_that_call_at_once_do_not_wait_for_each_other_for_ever():
    x, w = normal("x", shape=(4, 8, 20, 20), dtype="float32"), normal("w", shape=(8, 8, 3, 3), dtype="float32")
    step = jax.jit(lambda x: fj.conv2d(fj.conv2d(x, w, padding=1) + jnp.tanh(x), w, padding=1))
    expected, found = np.asarray(step(x)), []

    def work():
        y = [step(x) for _ in range(20)]
        found.append(all(np.array_equal(a, expected) for a in y))

    workers = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert found == [True] * 4


def test_a_process_may_end_while_a_call_runs():
    run_python("""
import jax, numpy as np, fastconv.jax as fj
x, w = np.ones((8, 32, 64, 64), "f"), np.ones((32, 32, 3, 3), "f")
step = jax.jit(lambda x: fj.conv2d(fj.conv2d(x, w, padding=1), w, padding=1))
for _ in range(4):
    step(x)
""")


def test_programs_on_several_devices_call_at_once():
    printed = run_python(
        """
import jax, numpy as np, fastconv.jax as fj
from functools import partial
x, w = np.ones((4, 2, 8, 8), "f"), np.ones((3, 2, 3, 3), "f")
mesh = jax.sharding.Mesh(jax.devices(), ("batch",))
spec = jax.sharding.PartitionSpec("batch")
split = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
shard_map = partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec)
step = lambda x: fj.max_pool2d(fj.conv2d(x, w), 2)
print(np.array_equal(jax.jit(shard_map(step))(split), step(x)), np.array_equal(jax.jit(step)(split), step(x)))
""",
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )
    assert printed == "True True\n"


def test_without_jax_the_error_says_what_to_install():
    printed = run_python("""
import sys
sys.modules["jax"] = None
import fastconv
try:
    import fastconv.jax
except fastconv.MissingDependencyError as error:
    print(error)
""")
    assert printed.startswith("fastconv.jax needs JAX: pip install 'fastconv[jax]'")


def test_the_example_without_jax_says_what_to_install_in_one_line():
    printed = run_python(f"""
import runpy, sys
sys.modules["jax"] = None
try:
    runpy.run_path({str(HERE.parent / "examples" / "05_jax_training.py")!r})
except SystemExit as end:
    print(end)
""")
    assert re.fullmatch(r"this example needs JAX: pip install 'fastconv\[jax\]' \(.*\)\n", printed)


def test_functions_of_arrays_name_those_of_jax():
    x = jnp.ones((1, 1, 4, 4))
    for call in (lambda: fastconv.conv2d(x, x), lambda: fastconv.max_pool2d(x, 2)):
        with pytest.raises(fastconv.ArgumentTypeError, match=r"not ArrayImpl: fastconv\.jax has the functions"):
            call()


def test_programs_can_be_exported_without_the_check_of_calls():
    x, w, b = PROBLEM
    run = jax.jit(lambda x: fj.conv2d(x, w, b, **HOW))
    with pytest.raises(ValueError, match="custom calls whose targets have no compatibility guarantees"):
        export.export(run)(x)
    checks = [export.DisabledSafetyCheck.custom_call(fj.TARGET)]
    np.testing.assert_array_equal(export.export(run, disabled_checks=checks)(x).call(x), run(x))


# --- training --------------------------------------------------------------------------------------------------


def test_the_example_trains():
    example = HERE.parent / "examples" / "05_jax_training.py"
    printed = run_python(f"""
import runpy, sys
sys.argv = ["x", "--synthetic", "--limit", "256", "--epochs", "1"]
try:
    runpy.run_path({str(example)!r}, run_name="__main__")
except SystemExit as end:
    print("exit status", end.code)
""")
    assert re.search(r"Epoch 1: loss \d\.\d+, [\d,]+ images/s with fastconv\nTest accuracy", printed)
    assert "exit status 0" in printed


def lenet(parameters, x, conv, pool):
    """LeNet-5 with maxima and rectifiers (LeCun et al., 1998)."""
    c1, c3, *linear = parameters
    x = pool(jax.nn.relu(conv(x, *c1, 2)))
    x = pool(jax.nn.relu(conv(x, *c3, 0))).reshape(len(x), -1)
    for w, b in linear[:-1]:
        x = jax.nn.relu(x @ w + b)
    return x @ linear[-1][0] + linear[-1][1]


WAYS = {
    "fastconv": (lambda x, w, b, p: fj.conv2d(x, w, b, padding=p), lambda x: fj.max_pool2d(x, 2)),
    "lax": (
        lambda x, w, b, p: lax_conv(x, w, b, 1, p),
        lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID"),
    ),
}


def test_a_network_learns_as_it_does_with_lax():
    images, labels = nn.datasets.synthetic_digits(32 * 10, seed=3)
    x, t = images[:, None].astype("float32") / 255, jax.nn.one_hot(labels.astype(int), 10)
    shapes = [(6, 1, 5, 5), (16, 6, 5, 5), (400, 120), (120, 84), (84, 10)]
    start = [
        (
            normal(s, shape=s, dtype="float32") * (2 / max(np.prod(s[1:]), s[0])) ** 0.5,
            np.zeros(s[0 if len(s) == 4 else 1], "f"),
        )
        for s in shapes
    ]
    losses = {}
    for name, (conv, pool) in WAYS.items():

        def loss(parameters, x, t, conv=conv, pool=pool):
            return -(jax.nn.log_softmax(lenet(parameters, x, conv, pool)) * t).sum(-1).mean()

        @jax.jit
        def step(parameters, x, t, loss=loss):
            value, grads = jax.value_and_grad(loss)(parameters, x, t)
            return value, jax.tree.map(lambda p, g: p - 0.05 * g, parameters, grads)

        parameters, losses[name] = start, []
        for i in range(10):
            value, parameters = step(parameters, x[32 * i : 32 * i + 32], t[32 * i : 32 * i + 32])
            losses[name].append(float(value))
    np.testing.assert_allclose(losses["fastconv"], losses["lax"], rtol=1e-4)
    assert losses["fastconv"][-1] < losses["fastconv"][0]
