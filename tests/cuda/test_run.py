"""Public operations on arrays of a GPU, as far as that goes without one: CuPy and the driver are stand-ins."""

import sys
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from support import normal, whole

import fastconv
from fastconv import arrays, calls, device_arrays, reference, registry, tuning
from fastconv.cuda import direct, launch, run, tensor_core, tensor_core_kernels, winograd, winograd_tensor_core
from fastconv.cuda.gemm_kernels import Tile
from fastconv.cuda.steps import Step
from fastconv.testing import assert_close

X, W, B = (2, 4, 5, 6), (6, 2, 3, 2), (6,)
HOW = {"stride": (2, 1), "padding": 1, "dilation": (1, 2), "groups": 2}


def operands(make=whole, dtype="float32"):
    return [make(name, shape=shape, dtype=dtype) for name, shape in (("x", X), ("w", W), ("b", B))]


def last(array):
    return np.ascontiguousarray(np.moveaxis(array, 1, -1))


@pytest.mark.parametrize("memory", ["channels_first", "channels_last", "first over last"])
def test_convolution_and_its_gradients(cupy, memory):
    x, w, b = operands()
    y = reference.conv(x, w, b, **HOW)
    g = whole("g", shape=y.shape)
    grads = reference.conv_backward(g, x, w, **HOW)
    data_format = "channels_last" if memory == "channels_last" else "channels_first"

    def put(array):
        if memory == "channels_first":
            return cupy.asarray(array)
        held = cupy.asarray(last(array))
        return held if memory == "channels_last" else cupy.moveaxis(held, -1, 1)

    def back(array):
        return np.moveaxis(array.host, -1, 1) if memory == "channels_last" else array.host

    how = {**HOW, "data_format": data_format}
    got = fastconv.conv2d(put(x), cupy.asarray(w), cupy.asarray(b), **how)
    assert isinstance(got, cupy.ndarray)
    assert np.array_equal(back(got), y)
    if memory == "first over last":
        assert np.moveaxis(got.host, 1, -1).flags.c_contiguous
    found = fastconv.conv2d_backward(put(g), put(x), cupy.asarray(w), **how)
    assert np.array_equal(back(found.input), grads[0])
    assert np.array_equal(found.weight.host, grads[1])
    assert np.array_equal(found.bias.host, grads[2])


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16, "float64"])
def test_other_dtypes_reach_the_kernels_as_they_are(cupy, dtype):
    x, w, b = operands(normal, dtype)
    y = fastconv.conv2d(*map(cupy.asarray, (x, w, b)), **HOW, activation="tanh")
    assert y.dtype == np.dtype(dtype)
    assert_close(y.host, reference.conv(x, w, b, **HOW, activation="tanh"), reduction_length=13)
    g = normal("g", shape=y.shape, dtype=dtype)
    expected = reference.conv_backward(g, x, w, **HOW)
    got = fastconv.conv2d_backward(*map(cupy.asarray, (g, x, w)), **HOW)
    for found, wanted in zip(got, expected):
        assert_close(found.host, wanted, reduction_length=60)


def test_one_and_three_dimensions_and_no_batch(cupy):
    x, w = whole("x", shape=(2, 9)), whole("w", shape=(3, 2, 3))
    assert np.array_equal(fastconv.conv1d(cupy.asarray(x), cupy.asarray(w)).host, reference.conv(x[None], w)[0])
    x, w = whole("x", shape=(1, 2, 3, 4, 3)), whole("w", shape=(2, 2, 2, 2, 2))
    assert np.array_equal(fastconv.conv3d(cupy.asarray(x), cupy.asarray(w)).host, reference.conv(x, w))


def test_the_transposed_convolution_ends_in_bias_and_activation(cupy):
    x, w, b = whole("x", shape=(2, 4, 3, 3)), whole("w", shape=(4, 3, 3, 3)), whole("b", shape=(3,))
    how = {"stride": 2, "padding": 1, "output_padding": 1}
    y = fastconv.conv_transpose2d(*map(cupy.asarray, (x, w, b)), **how, activation="relu")
    assert np.array_equal(y.host, np.maximum(reference.conv_transpose(x, w, b, **how), 0))
    assert len(cupy.driver.launches) == 1
    g = whole("g", shape=y.shape)
    got = fastconv.conv_transpose2d_backward(*map(cupy.asarray, (g, x, w)), **how)
    for found, expected in zip(got, reference.conv_transpose_backward(g, x, w, **how)):
        assert np.array_equal(found.host, expected)


def test_algorithms_that_do_not_end_in_bias_and_activation_get_a_kernel_that_does(cupy, monkeypatch):
    monkeypatch.setattr(direct, "FUSED", ())
    for channels_last in (False, True):
        x, w, b = operands()
        y = np.maximum(reference.conv(x, w, b, **HOW), 0)
        how = {**HOW, "data_format": "channels_last" if channels_last else "channels_first"}
        x, y = (last(x), last(y)) if channels_last else (x, y)
        got = fastconv.conv2d(*map(cupy.asarray, (x, w, b)), **how, activation="relu")
        assert np.array_equal(got.host, y)
    assert [name for name, _ in cupy.driver.launches if "ending" in name] == ["bias_ending_float32_32"] * 2


@pytest.mark.parametrize("mode", ["reflect", "symmetric", "replicate", "circular"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_padding_that_copies_the_image(cupy, mode, channels_last):
    x, w = whole("x", shape=(1, 2, 4, 5)), whole("w", shape=(2, 2, 3, 3))
    how = {"padding": ((1, 2), (3, 0)), "padding_mode": mode}
    y = reference.conv(x, w, **how)
    g = whole("g", shape=y.shape)
    dx, dw, _ = reference.conv_backward(g, x, w, **how)
    if channels_last:
        x, y, g, dx = map(last, (x, y, g, dx))
        how["data_format"] = "channels_last"
    assert np.array_equal(fastconv.conv2d(cupy.asarray(x), cupy.asarray(w), **how).host, y)
    got = fastconv.conv2d_backward(*map(cupy.asarray, (g, x, w)), **how, needs=("input", "weight"))
    assert np.array_equal(got.input.host, dx)
    assert np.array_equal(got.weight.host, dw)


def test_results_go_to_out_whatever_it_is(cupy):
    x, w, b = operands()
    y = reference.conv(x, w, b, **HOW)
    given = [*map(cupy.asarray, (x, w, b))]
    whole_out = cupy.empty(y.shape, np.float32)
    strided = cupy.asarray(np.zeros((*y.shape[:-1], 2 * y.shape[-1]), np.float32))[..., ::2]
    odd = cupy.asarray(np.zeros(y.shape, np.float32), offset=4)
    for out in (whole_out, strided, odd):
        assert fastconv.conv2d(*given, **HOW, out=out) is out
        assert np.array_equal(out.host, y)
    # The result over its own input: an identity that would read what it has written.
    x, w = whole("x", shape=(1, 2, 4, 4)), whole("w", shape=(2, 2, 3, 3))
    both = cupy.asarray(x)
    fastconv.conv2d(both, cupy.asarray(w), padding=1, out=both)
    assert np.array_equal(both.host, reference.conv(x, w, padding=1))


def test_arrays_may_have_any_strides_and_begin_anywhere(cupy):
    x, w, b = operands()
    y = reference.conv(x, w, b, **HOW)
    strange = cupy.moveaxis(cupy.asarray(np.ascontiguousarray(np.moveaxis(x, 2, 0))), 0, 2)
    odd = cupy.asarray(x, offset=4)
    for given in (strange, odd):
        got = fastconv.conv2d(given, cupy.asarray(w, offset=8), cupy.asarray(b, offset=12), **HOW)
        assert np.array_equal(got.host, y)
        assert np.array_equal(given.host, x)


def test_nothing_to_compute(cupy):
    x, w, _ = operands()
    none = cupy.asarray(x[:0])
    y = fastconv.conv2d(none, cupy.asarray(w), **HOW)
    assert isinstance(y, cupy.ndarray)
    assert y.shape == (0, *reference.conv(x, w, **HOW).shape[1:])
    got = fastconv.conv2d_backward(y, none, cupy.asarray(w), **HOW)
    assert not got.weight.host.any()
    assert got.input.shape == none.shape
    assert not cupy.driver.launches


def test_plans(cupy):
    x, w, b = operands()
    held = cupy.asarray(w)
    plan = fastconv.plan_conv2d(X, held, cupy.asarray(b), **HOW)
    assert np.array_equal(plan(cupy.asarray(x)).host, reference.conv(x, w, b, **HOW))
    held.host[...] *= 2
    assert np.array_equal(plan(cupy.asarray(x)).host, reference.conv(x, 2 * w, b, **HOW))
    assert (plan.algorithm, plan.workspace_bytes) == ("direct", 0)


def test_theirsalike_are_compiled_and_loaded_once_and_launched_on_the_stream_of_the_library(cupy):
    x, w, b = map(cupy.asarray, operands())
    for stream in (0, 4096):
        cupy.stream = stream
        fastconv.conv2d(x, w, b, **HOW)
    assert cupy.driver.loads == 1
    assert cupy.driver.launches == [("direct_forward_float32_first_32", 0), ("direct_forward_float32_first_32", 4096)]


@pytest.mark.parametrize("algorithm", ["winograd_f2x3", "winograd_f2x3_bf16x6"])
def test_winograd(cupy, monkeypatch, algorithm):
    monkeypatch.setattr(winograd, "SMALL", Tile(16, 32, 8, 4, 8))
    monkeypatch.setattr(tensor_core, "tile_for", lambda *how: tensor_core_kernels.Tile(16, 16, 4, 1, 1, 2))
    for module in (winograd, winograd_tensor_core):
        module._sizes.cache_clear()
    x, w, b = whole("x", shape=(1, 3, 5, 4)), whole("w", shape=(2, 3, 3, 3)), whole("b", shape=(2,))
    got = fastconv.conv2d(*map(cupy.asarray, (x, w, b)), padding=1, algorithm=algorithm)
    assert np.array_equal(got.host, reference.conv(x, w, b, padding=1))
    for module in (winograd, winograd_tensor_core):
        module._sizes.cache_clear()


@pytest.mark.parametrize("algorithm", ["im2col", "fft"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_theirsof_the_library_stand_between_launches_the_long_way_and_the_short_one(cupy, algorithm, channels_last):
    x, w, b = whole("x", shape=(2, 3, 4, 3)), whole("w", shape=(2, 3, 2, 3)), whole("b", shape=(3,))
    how = {"padding": 1, "algorithm": algorithm, "data_format": "channels_last" if channels_last else "channels_first"}
    y = reference.conv(x, w, b[:2], padding=1)
    g = whole("g", shape=y.shape)

    def put(array):
        return cupy.asarray(last(array) if channels_last else array)

    def compare(got, wanted):
        back = np.moveaxis(got.host, -1, 1) if channels_last and got.shape != w.shape else got.host
        assert_close(back, wanted.astype(np.float32), algorithm=algorithm, reduction_length=60)

    for _ in range(2):
        got = fastconv.conv2d(put(x), cupy.asarray(w), cupy.asarray(b[:2]), activation="relu", **how)
        compare(got, np.maximum(y, 0))
        grads = fastconv.conv2d_backward(put(g), put(x), cupy.asarray(w), needs=("input", "weight"), **how)
        for found, wanted in zip(grads[:2], reference.conv_backward(g, x, w, padding=1)):
            compare(found, wanted)
        got = fastconv.conv_transpose2d(put(g), cupy.asarray(w), cupy.asarray(b), activation="relu", **how)
        compare(got, np.maximum(reference.conv_transpose(g, w, b, padding=1), 0))


def test_sums_in_several_parts_use_the_workspace_that_was_declared(cupy):
    x, w = whole("x", shape=(1, 1, 100, 100)), np.ones((1, 1, 1, 1), np.float32)
    geometry = fastconv.ConvGeometry.create(x.shape, w.shape)
    inner = geometry.lifted("channels_first", geometry.dtype)
    assert direct.workspace(inner, "weight_grad", 1 << 20)["parts"].shape == (40, 1, 1, 1, 1, 1)
    got = fastconv.conv2d_backward(*map(cupy.asarray, (x, x, w)), needs=("weight", "bias"))
    assert got.weight.host.item() == (x * x).sum()
    assert got.bias.host.item() == x.sum()
    assert [name for name, _ in cupy.driver.launches] == [
        "direct_weight_grad_float32_first_32", "sums_add_parts_float32_32", "bias_add_pixels_float32_4",
        "sums_add_parts_float32_32",
    ]  # fmt: skip


def test_the_second_call_of_its_kind_takes_the_short_way(cupy, monkeypatch):
    x, w, b = operands()
    given = [cupy.asarray(a) for a in (x, w, b)]
    y = reference.conv(x, w, b, **HOW)
    g = whole("g", shape=y.shape)
    pooled, where = reference.max_pool(x, 2)
    pools = {
        "max": lambda: fastconv.max_pool2d(given[0], 2, return_indices=True)[0],
        "average": lambda: fastconv.avg_pool2d(given[0], 2),
        "max gradient": lambda: fastconv.max_pool2d_backward(cupy.asarray(pooled), cupy.asarray(where), X),
        "average gradient": lambda: fastconv.avg_pool2d_backward(cupy.asarray(pooled), X, 2),
    }
    expected = {
        "max": pooled, "average": reference.avg_pool(x, 2),
        "max gradient": reference.max_pool_backward(pooled, where, X),
        "average gradient": reference.avg_pool_backward(pooled, X, 2),
    }  # fmt: skip

    def check():
        for bias in (given[2], None):
            got = fastconv.conv2d(given[0], given[1], bias, **HOW).host
            assert np.array_equal(got, y if bias is not None else reference.conv(x, w, **HOW))
        for found, wanted in zip(
            fastconv.conv2d_backward(cupy.asarray(g), *given[:2], **HOW), reference.conv_backward(g, x, w, **HOW)
        ):
            assert np.array_equal(found.host, wanted)
        for name, call in pools.items():
            assert_close(call().host, expected[name], reduction_length=4)

    # Modules that load at the first may have something watched from then on, which makes calls others.
    check()
    check()

    def long_way(*arguments, **named):
        raise AssertionError("it should know the call")

    monkeypatch.setattr(arrays, "adopt", long_way)
    check()
    with pytest.raises(AssertionError, match="it should know the call"):
        fastconv.conv2d(cupy.asarray(x, offset=4), *given[1:], **HOW)
    with pytest.raises(AssertionError, match="it should know the call"):
        fastconv.conv2d(cupy.moveaxis(cupy.asarray(last(x)), -1, 1), *given[1:], **HOW)


def test_tuning_measures_on_the_gpu(cupy, monkeypatch, tmp_path):
    """Time is the number of launches there: what takes fewest is the fastest."""
    monkeypatch.setenv("FASTCONV_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "SHORTEST", 0)
    monkeypatch.setattr(tuning, "FEWEST", 1)
    tuning.reload()
    x, w = (whole(name, shape=shape, dtype="float64") for name, shape in (("x", (1, 5, 5, 4)), ("w", (4, 1, 3, 3))))
    how = {"groups": 4, "data_format": "channels_last"}
    try:
        y = fastconv.conv2d(cupy.asarray(x), cupy.asarray(w), **how, algorithm="tune")
        assert np.array_equal(y.host, reference.conv(x, w, **how))
        ((entry, times),) = tuning.entries().items()
        assert entry.startswith("cuda forward")
        assert " sm_90a NVIDIA_Emulated kernels=" in entry
        # Depthwise convolution packs its weight first.
        assert (times["direct"], times["depthwise"]) == (0.001, 0.002)
        geometry = fastconv.ConvGeometry.create(x.shape, w.shape, dtype=x.dtype, **how)
        (chosen,) = (c for c in fastconv.algorithms(geometry, "sm_90a") if c.chosen)
        assert (chosen.name, chosen.measured) == ("direct", 0.001)
        monkeypatch.setattr(cupy.driver, "name", lambda device: "NVIDIA Other")
        assert all(c.measured is None for c in fastconv.algorithms(geometry, "sm_90a"))
        assert all(c.measured is None for c in fastconv.algorithms(geometry, "sm_80"))
    finally:
        monkeypatch.delenv("FASTCONV_CACHE_DIR")
        tuning.reload()


# --- pools -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", ml_dtypes.bfloat16])
@pytest.mark.parametrize("memory", ["channels_first", "channels_last", "first over last"])
def test_pools_and_their_gradients(cupy, memory, dtype):
    data_format = "channels_last" if memory == "channels_last" else "channels_first"
    axes = (0, 2, 3, 1)

    def put(array):
        if memory == "channels_first":
            return cupy.asarray(array)
        held = cupy.asarray(np.ascontiguousarray(np.transpose(array, axes)))
        return held if memory == "channels_last" else cupy.moveaxis(held, -1, 1)

    def back(found):
        return np.moveaxis(found.host, -1, 1) if memory == "channels_last" else found.host

    x = whole("x", shape=(2, 4, 7, 8), dtype=dtype)
    how = {"kernel_size": (3, 2), "stride": 2, "padding": 1}
    y, where = reference.max_pool(x, **how)
    g = whole("g", shape=y.shape, dtype=dtype)
    got, indices = fastconv.max_pool2d(put(x), **how, return_indices=True, data_format=data_format)
    assert np.array_equal(back(got), y.astype(dtype))
    assert np.array_equal(back(indices), where)
    assert np.array_equal(back(fastconv.max_pool2d(put(x), **how, data_format=data_format)), y.astype(dtype))
    if memory == "first over last":
        assert np.moveaxis(got.host, 1, -1).flags.c_contiguous
    shape = x.shape if memory != "channels_last" else tuple(x.shape[a] for a in axes)
    dx = fastconv.max_pool2d_backward(put(g), put(where), shape, data_format=data_format)
    assert np.array_equal(back(dx), reference.max_pool_backward(g, where, x.shape).astype(dtype))

    y, where = reference.max_pool(x, 2)
    y = y.astype(dtype)
    up = fastconv.max_unpool2d(put(y), put(where), 2, output_size=(7, 8), data_format=data_format)
    assert np.array_equal(back(up), reference.max_unpool(y, where, (7, 8)).astype(dtype))
    down = fastconv.max_unpool2d_backward(put(x), put(where), data_format=data_format)
    assert np.array_equal(
        back(down), np.take_along_axis(x.reshape(2, 4, -1), where.reshape(2, 4, -1), -1).reshape(y.shape)
    )

    y = reference.avg_pool(x, **how, count_include_pad=False)
    g = whole("g", shape=y.shape, dtype=dtype)
    how_last = {**how, "count_include_pad": False, "data_format": data_format}
    assert_close(back(fastconv.avg_pool2d(put(x), **how_last)), y, reduction_length=6)
    dx = fastconv.avg_pool2d_backward(put(g), shape, **how_last)
    assert_close(back(dx), reference.avg_pool_backward(g, x.shape, **how, count_include_pad=False), reduction_length=6)
    got = fastconv.adaptive_max_pool2d(put(x), (3, 1), data_format=data_format)
    assert np.array_equal(back(got), reference.adaptive_max_pool(x, (3, 1))[0].astype(dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", ml_dtypes.bfloat16])
@pytest.mark.parametrize("batch", [0, 2])
def test_patches(cupy, dtype, batch):
    x = whole("x", shape=(batch, 3, 6, 7), dtype=dtype)
    how = {"kernel_size": (3, 2), "stride": 2, "padding": ((1, 0), (0, 2)), "dilation": (1, 2)}
    columns = fastconv.unfold(x, **how)
    assert np.array_equal(fastconv.unfold(cupy.asarray(x), **how).host, columns)
    assert np.array_equal(
        fastconv.fold(cupy.asarray(columns), (6, 7), **how).host, fastconv.fold(columns, (6, 7), **how)
    )


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "int64"])
@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_maxima_of_integers(cupy, dtype, data_format):
    x = whole("x", shape=(2, 4, 6, 8)).astype(dtype)
    how = {"kernel_size": 3, "stride": 2, "padding": 1, "data_format": data_format, "return_indices": True}
    with fastconv.options(poison=True):
        y, where = fastconv.max_pool2d(cupy.asarray(x), **how)
        dx = fastconv.max_pool2d_backward(y, where, x.shape, data_format=data_format)
    expected, places = fastconv.max_pool2d(x, **how)
    assert np.array_equal(y.host, expected)
    assert np.array_equal(where.host, places)
    wanted = fastconv.max_pool2d_backward(expected, places, x.shape, data_format=data_format)
    assert np.array_equal(dx.host, wanted)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_gradient_of_a_norm(cupy, power, dtype):
    x = normal("x", shape=(2, 3, 6, 7), dtype=dtype)
    x[0, 0] = 0
    how = {"kernel_size": 3, "stride": 2, "ceil_mode": True}
    y = fastconv.lp_pool2d(x, power, **how)
    g = normal("g", shape=y.shape, dtype=dtype)
    assert_close(fastconv.lp_pool2d(cupy.asarray(x), power, **how).host, y, reduction_length=9)
    got = fastconv.lp_pool2d_backward(cupy.asarray(g), cupy.asarray(x), power, **how).host
    assert_close(got, fastconv.lp_pool2d_backward(g, x, power, **how), reduction_length=9)


def test_an_index_outside_the_plane_counts_for_nothing(cupy):
    g, where = whole("g", shape=(1, 1, 2, 2)), np.array([[[[0, 16], [-1, 2**40]]]])
    dx = fastconv.max_pool2d_backward(cupy.asarray(g), cupy.asarray(where), (1, 1, 4, 4)).host
    assert dx[0, 0, 0, 0] == g[0, 0, 0, 0]
    assert np.count_nonzero(dx) == np.count_nonzero(g[0, 0, 0, 0])


# --- what is refused -------------------------------------------------------------------------------------------


def test_what_has_no_kernels_says_so(cupy):
    x = cupy.asarray(np.zeros((1, 2, 4, 4), np.float32))
    known = len(calls.known)
    for _ in range(2):
        with pytest.raises(fastconv.UnsupportedError, match=r"on a GPU avg_pool pools float32, .*, not int64"):
            fastconv.avg_pool2d(cupy.asarray(np.zeros((1, 2, 4, 4), np.int64)), 2)
    assert len(calls.known) == known, "a refused call is no prepared one"
    small = cupy.asarray(np.zeros((1, 2, 4, 4), np.int8))
    with pytest.raises(fastconv.UnsupportedError, match=r"on a GPU it computes float32, .*, not int32"):
        fastconv.conv2d(small, small)
    with pytest.raises(fastconv.UnsupportedError, match="there is no such algorithm on the cuda yet"):
        fastconv.conv2d(x, x, algorithm="direct_small")
    with pytest.raises(fastconv.UnsupportedError, match="is an array of cupy on GPU 0; layers compute on the CPU"):
        fastconv.nn.Linear(2, 2).load_state_dict({"weight": x, "bias": x})


def test_arrays_of_the_host_and_of_a_gpu_do_not_mix(cupy):
    x, w, _ = operands()
    with pytest.raises(fastconv.ArgumentTypeError, match="weight is an array of numpy but x is one of cupy on GPU 0"):
        fastconv.conv2d(cupy.asarray(x), w)
    with pytest.raises(fastconv.ArgumentTypeError, match="out must be an array of cupy on GPU 0, like x"):
        fastconv.conv2d(cupy.asarray(x), cupy.asarray(w), **HOW, out=np.zeros(3))
    far = cupy.asarray(w)
    far.device.id = 1
    with pytest.raises(fastconv.ArgumentTypeError, match=r"weight is an array of cupy on GPU 1 but x is one of .* 0"):
        fastconv.conv2d(cupy.asarray(x), far)


def test_without_a_driver_the_error_says_what_is_missing(cupy, monkeypatch):
    def refuse():
        raise fastconv.UnsupportedError("no NVIDIA driver can be loaded: libcuda.so.1 is not there")

    monkeypatch.setattr(launch, "driver", refuse)
    x, w, b = map(cupy.asarray, operands())
    with pytest.raises(fastconv.UnsupportedError, match=r"no NVIDIA driver can be loaded: libcuda.so.1 is not there"):
        fastconv.conv2d(x, w, b, **HOW)


def test_tensors_on_a_gpu_are_adopted():
    torch = pytest.importorskip("torch")
    library = device_arrays._torch_on(0)
    # A tensor on the CPU has the same members.
    tensor = torch.arange(24.0).reshape(1, 2, 3, 4).to(torch.bfloat16)
    held = library.adopt("x", tensor)
    assert (held.shape, held.dtype, held.address) == ((1, 2, 3, 4), ml_dtypes.bfloat16, tensor.data_ptr())
    assert held.is_contiguous
    assert not held.moved(1, -1).is_contiguous
    assert held.moved(1, -1).shape == (1, 3, 4, 2)
    assert np.array_equal(library.to_host(held.held), np.arange(24.0).reshape(1, 2, 3, 4))
    with pytest.raises(fastconv.ArgumentTypeError, match="x is a tensor that requires grad"):
        library.adopt("x", torch.zeros(3, requires_grad=True))
    with pytest.raises(fastconv.UnsupportedError, match="x is a tensor on meta"):
        arrays.library_of("x", torch.zeros(3, device="meta"))
    assert library.name == "torch on GPU 0"


class Foreign:
    """An array of a library that offers its memory."""

    def __init__(self, held):
        self.held, self.__cuda_array_interface__ = held, {"version": 3}


def test_arrays_of_smaller_libraries_are_read_in_place_by_cupy(cupy, monkeypatch):
    x, w, b = operands()
    got = fastconv.conv2d(*(Foreign(cupy.asarray(a)) for a in (x, w, b)), **HOW)
    assert isinstance(got, cupy.ndarray)
    assert np.array_equal(got.host, reference.conv(x, w, b, **HOW))
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(
        fastconv.MissingDependencyError, match=r"x is a Foreign on a GPU, which needs CuPy: pip install"
    ):
        fastconv.conv2d(Foreign(None), Foreign(None))


@pytest.mark.parametrize("record", registry.on("cuda"), ids=lambda r: r.name)
def test_every_record_is_complete(record):
    assert record.family in registry.FAMILIES
    module = record.implementation
    for name in ("supports", "workspace", "seconds", "steps"):
        assert getattr(module, name).__doc__, f"{record.name}.{name} has no docstring"


def test_steps_take_arrays_and_then_numbers():
    def kernel(x, n):
        pass

    for arguments in ((np.int32(1), "x"), ("x", 1), ("x",)):
        step = Step(kernel, (None, None), (1,), (1,), arguments)
        with pytest.raises(fastconv.ArgumentError, match="kernel must take names of arrays and then NumPy scalars"):
            run.split_arguments(step)


# --- the tables ------------------------------------------------------------------------------------------------

GEOMETRY = fastconv.ConvGeometry.create(X, W, **HOW)


@pytest.mark.parametrize("device", ["cuda", "sm_75", "sm_90a", "sm_120"])
def test_algorithms_are_listed_for_an_architecture_without_a_gpu(device):
    rows = fastconv.algorithms(GEOMETRY, device, direction="weight_grad")
    assert "direct" in [row.name for row in rows if row.supported]
    assert sum(row.chosen for row in rows) == 1
    assert all(row.seconds > 0 for row in rows if row.supported)


def test_faster_gpus_are_predicted_to_be_faster():
    big = fastconv.ConvGeometry.create((32, 64, 56, 56), (64, 64, 3, 3))
    old, new = (fastconv.algorithms(big, device)[0].seconds for device in ("sm_75", "sm_90a"))
    assert old > 2 * new


def test_a_dtype_that_no_kernel_has_leaves_a_list_of_refusals():
    integers = fastconv.ConvGeometry.create(X, W, **HOW, dtype=np.int8)
    assert not any(row.supported or row.chosen for row in fastconv.algorithms(integers, "sm_90a"))
    assert "on a GPU it computes float32" in fastconv.explain(integers, "sm_90a")


def test_explain_shows_the_machine_code_of_an_architecture(monkeypatch):
    # Others take half a minute to compile.
    shown = {a: b for a, b in registry._algorithms.items() if b.name in ("direct", "im2col", "fft")}
    monkeypatch.setattr(registry, "_algorithms", shown)
    table = fastconv.explain(GEOMETRY, "sm_80", direction="input_grad").splitlines()
    at = table.index("kernels for sm_80, compiled")
    assert table[at + 1].split()[:2] == ["algorithm", "kernel"]
    (row,) = [line for line in table[at:] if line.startswith("direct ")]
    name, kernel, times, blocks, _, threads, registers, resident, shared, unit, instructions, loop = row.split()[:12]
    assert (name, kernel, times, blocks, threads) == ("direct", "direct_input_grad_float32_first_32", "1", "2", "128")
    assert 16 <= int(registers) <= 64
    assert resident.endswith("%")
    assert (shared, unit) == ("0", "B")
    assert int(instructions) > int(loop) > 0
    assert "FFMA" in row or "IMAD" in row
    theirs = [line.split()[1] for line in table[at:] if line.endswith("by the library of the arrays")]
    assert sorted(theirs) == ["irfftn", "matmul", "rfftn"]
    assert any(line.split()[1:3] == ["rfftn", "2"] for line in table[at:])


def test_a_device_array_is_what_operations_see_of_it(cupy):
    held = arrays.adopt(x=cupy.asarray(np.zeros((3, 4), np.float32)))[1][0]
    assert (held.ndim, held.size, held.nbytes, len(held)) == (2, 12, 48, 3)
    assert held[None].shape == (1, 3, 4)
    assert held.flags.writeable
    with fastconv.options(poison=True):
        assert np.isnan(held.library.empty((2,), np.dtype(np.float32)).held.host).all()
    assert SimpleNamespace(x=held).x.reshape((4, 3)).shape == (4, 3)
