"""fastconv in a page: convolve a picture, choose a strategy, get every gradient, pool with indices.

Run it from anywhere: ``python examples/01_quickstart.py``. It needs nothing but fastconv.
"""

import numpy as np

import fastconv


def filter_a_picture() -> None:
    """A vertical edge filter on a picture of two halves, and a blur whose edges mirror the picture."""
    picture = np.zeros((1, 1, 6, 6), np.float32)
    picture[..., :3] = 10
    edge = np.array([[[[1, 0, -1]] * 3]], np.float32)
    print("Vertical edges of a 6x6 step image (three columns of 10, three of 0):")
    print(fastconv.conv2d(picture, edge)[0, 0])

    mean = np.full((1, 1, 3, 3), 1 / 9, np.float32)
    blurred = fastconv.conv2d(picture, mean, padding="same", padding_mode="symmetric")
    print("Mean filter, edges mirrored:", blurred[0, 0, 0].round(2))


def compare_strategies() -> None:
    """Every algorithm gives the same numbers; they differ in time and workspace."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 16, 32, 32), np.float32)
    weight = rng.standard_normal((32, 16, 3, 3), np.float32)
    geometry = fastconv.ConvGeometry.create(x.shape, weight.shape, padding=1)
    print()
    print(fastconv.explain(geometry))

    exact = fastconv.reference.conv(x, weight, padding=1)
    for candidate in fastconv.algorithms(geometry):
        if candidate.supported:
            y = fastconv.conv2d(x, weight, padding=1, algorithm=candidate.name)
            error = fastconv.testing.rms_error(y, exact)
            print(f"{candidate.name:>13}: RMS error against float64 {error:.1e}")


def differentiate() -> None:
    """One step of gradient descent on a convolution, ReLU and max pooling, by hand."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((8, 3, 16, 16), np.float32)
    weight = rng.standard_normal((4, 3, 3, 3), np.float32) / 5
    bias = np.zeros(4, np.float32)

    def forward(weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        hidden = fastconv.conv2d(x, weight, bias, padding="same", activation="relu")
        return hidden, *fastconv.max_pool2d(hidden, 2, return_indices=True)

    hidden, pooled, indices = forward(weight, bias)
    before = (pooled**2).mean()
    grad = 2 * pooled / pooled.size
    grad = fastconv.max_pool2d_backward(grad, indices, hidden.shape)
    grad[hidden == 0] = 0
    grads = fastconv.conv2d_backward(grad, x, weight, padding="same", needs=("weight", "bias"))
    _, pooled, _ = forward(weight - 0.1 * grads.weight, bias - 0.1 * grads.bias)
    print(f"\nOne step of gradient descent: loss {before:.4f} -> {(pooled**2).mean():.4f}")


def refuse_politely() -> None:
    """Wrong arguments are named, with their value and what was expected."""
    try:
        fastconv.conv2d(np.zeros((1, 3, 8, 8)), np.zeros((4, 5, 3, 3)))
    except fastconv.ShapeError as error:
        print(f"\nA wrong shape: {error}")


if __name__ == "__main__":
    filter_a_picture()
    compare_strategies()
    differentiate()
    refuse_politely()
