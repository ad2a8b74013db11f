"""What is special to implicit GEMM: folded phases, padding left out, streamed outputs, long sums, every tile."""

import numpy as np
import pytest

import fastconv
from fastconv import calls
from fastconv.cpu import implicit_gemm, simd


def normal(*shape):
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def plans_of(monkeypatch, direction, call):
    """Return what was planned for a direction while `call` ran."""
    seen = []
    plans = implicit_gemm.plans

    def spy(geometry, asked, threads):
        found = plans(geometry, asked, threads)
        if asked == direction:
            seen.extend(plan for _, plan in found if plan)
        return found

    monkeypatch.setattr(implicit_gemm, "plans", spy)
    # A call like an earlier one may be a program by now, and asks for no plans.
    calls.known.clear()
    return call(), seen


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_a_folded_gradient_has_infinities_only_where_a_tap_puts_them(monkeypatch, special):
    weight, grad = normal(16, 3, 5, 5), normal(1, 16, 9, 10)
    grad[0, 5, 4, 3] = special
    x = normal(1, 3, 20, 22)

    def call():
        return fastconv.conv2d_backward(grad, x, weight, 2, 1, needs=("input",), algorithm="implicit_gemm").input

    dx, (plan, *_) = plans_of(monkeypatch, "input_grad", call)
    assert plan.phase.fold != (1, 1, 1)
    expected = fastconv.conv2d_backward(grad, x, weight, 2, 1, needs=("input",), algorithm="direct").input
    np.testing.assert_array_equal(np.isnan(dx), np.isnan(expected))
    np.testing.assert_array_equal(np.isinf(dx), np.isinf(expected))
    finite = np.isfinite(expected)
    np.testing.assert_allclose(dx[finite], expected[finite], rtol=1e-4, atol=1e-4)


def test_padding_under_a_whole_tile_is_not_multiplied(monkeypatch):
    x, weight = normal(8, 16, 10, 10), normal(32, 16, 7, 7)
    grad = normal(8, 32, 4, 4)

    def call():
        return fastconv.conv2d_backward(grad, x, weight, needs=("input",), algorithm="implicit_gemm").input

    _, (plan, *_) = plans_of(monkeypatch, "input_grad", call)
    # Of 7 x 7 taps the pixels of a 10 x 10 image meet 4/10 x 4/10 x 7 x 7 that are not padding.
    chains = plan.chains[:, 1] * plan.chains[:, 2]
    tiles = plan.kinds[-2 * -(-plan.most_pixels // plan.tile.rows) :].reshape(-1, 2)
    met = np.mean([chains[first : first + count].sum() for first, count in tiles]) / plan.depth
    assert met < 0.5


def test_pointwise_convolutions_read_the_pixels_of_all_images_in_place(monkeypatch):
    x, weight = normal(3, 5, 7, 8), normal(32, 8, 1, 1)

    def call():
        return fastconv.conv2d(x, weight, data_format="channels_last", algorithm="implicit_gemm")

    y, (plan, *_) = plans_of(monkeypatch, "forward", call)
    assert plan.strip.in_place
    assert plan.phase.size == (1, 3 * 5 * 7, 1)
    np.testing.assert_allclose(y, x @ weight[:, :, 0, 0].T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_streamed_outputs_have_the_same_bits(monkeypatch, activation):
    x, weight, bias = normal(1, 64, 66, 8), normal(64, 8, 3, 3), normal(64)
    how = {"data_format": "channels_last", "algorithm": "implicit_gemm", "activation": activation, "padding": 1}
    expected = fastconv.conv2d(x, weight, bias, **how)
    monkeypatch.setattr(implicit_gemm, "STREAMED", 0)
    np.testing.assert_array_equal(fastconv.conv2d(x, weight, bias, **how), expected)


def test_sums_over_very_many_pixels_keep_their_precision():
    x, grad = normal(2, 1, 500, 500) + 1, normal(2, 1, 498, 498) + 1
    weight = normal(1, 1, 3, 3)
    dw = fastconv.conv2d_backward(grad, x, weight, needs=("weight",), algorithm="implicit_gemm").weight
    windows = np.lib.stride_tricks.sliding_window_view(x[:, 0].astype(np.float64), (498, 498), axis=(1, 2))
    expected = np.einsum("nrshw,nhw->rs", windows, grad[:, 0].astype(np.float64))
    assert np.abs(dw[0, 0] / expected - 1).max() < 1e-6


# Plans and choices are kept for each geometry: every instruction set has a batch size of its own.
INSTRUCTIONS = {"avx2": 2, "neon": 3, "generic": 4}


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_every_instruction_set_has_its_tile(monkeypatch, instructions, data_format):
    monkeypatch.setattr(simd, "instruction_set", lambda: instructions)
    batch = INSTRUCTIONS[instructions]
    x, weight, bias = normal(batch, 3, 12, 13), normal(20, 3, 3, 3), normal(20)
    grad, how = normal(batch, 20, 6, 7), {"stride": 2, "padding": 1}
    put = (lambda a: np.ascontiguousarray(np.moveaxis(a, 1, -1))) if data_format == "channels_last" else np.asarray
    chosen = {**how, "data_format": data_format, "algorithm": "implicit_gemm"}
    y = fastconv.conv2d(put(x), weight, bias, **chosen, activation="leaky_relu")
    grads = fastconv.conv2d_backward(put(grad), put(x), weight, **chosen)
    exact = fastconv.conv2d(x, weight, bias, **how, activation="leaky_relu", algorithm="direct")
    expected = fastconv.conv2d_backward(grad, x, weight, **how, algorithm="direct")
    for result, correct in ((y, put(exact)), (grads.input, put(expected.input)), (grads.weight, expected.weight)):
        np.testing.assert_allclose(result, correct, rtol=1e-4, atol=1e-4)
