"""A training loop by hand, with nothing but arrays: conv2d, max_pool2d and their gradients.

    python examples/06_cupy_loop.py

It runs on CuPy arrays where there is a GPU that fastconv has kernels for, elsewhere on NumPy arrays, and says which.
The loop itself is the same: `xp` is NumPy or CuPy, and fastconv takes the arrays of both.
"""

from typing import Any

import numpy as np

import fastconv
from fastconv import nn


def array_library() -> tuple[Any, str]:
    """Return CuPy, if convolutions run on it here, or NumPy, and why."""
    try:
        import cupy

        fastconv.conv2d(cupy.ones((1, 1, 3, 3), np.float32), cupy.ones((1, 1, 3, 3), np.float32))
    except ImportError:
        return np, "CuPy is not installed"
    except Exception as error:
        # No GPU, no driver, or no kernels: each has an error of its own.
        return np, f"CuPy cannot be used: {error}"
    return cupy, "CuPy has a GPU"


def train(xp: Any, steps: int, batch: int = 64, rate: float = 0.05) -> list[float]:
    """Train one convolution, a pool and a linear layer on drawn digits; return the losses."""
    images, labels = nn.datasets.synthetic_digits(steps * batch, seed=0)
    images, targets = xp.asarray(images[:, None] / np.float32(255)), xp.eye(10, dtype=np.float32)[xp.asarray(labels)]
    rng, losses = np.random.default_rng(0), []
    w = xp.asarray(rng.standard_normal((8, 1, 5, 5), np.float32) / 5)
    b = xp.zeros(8, np.float32)
    v = xp.asarray(rng.standard_normal((8 * 12 * 12, 10), np.float32) / 34)
    for i in range(0, steps * batch, batch):
        x, t = images[i : i + batch], targets[i : i + batch]
        hidden = fastconv.conv2d(x, w, b, activation="relu")
        pooled, indices = fastconv.max_pool2d(hidden, 2, return_indices=True)
        p = xp.exp(logits := pooled.reshape(batch, -1) @ v) / xp.exp(logits).sum(1, keepdims=True)
        d_logits = (p - t) / batch
        d_pooled = (d_logits @ v.T).reshape(pooled.shape)
        d_hidden = fastconv.max_pool2d_backward(d_pooled, indices, hidden.shape) * (hidden > 0)
        grads = fastconv.conv2d_backward(d_hidden, x, w, needs=("weight", "bias"))
        v -= rate * pooled.reshape(batch, -1).T @ d_logits
        w, b = w - rate * grads.weight, b - rate * grads.bias
        losses.append(float(-(t * xp.log(p)).sum() / batch))
    return losses


if __name__ == "__main__":
    library, reason = array_library()
    print(f"Training on {library.__name__} arrays: {reason}")
    losses = train(library, steps=60)
    print(f"Loss {np.mean(losses[:5]):.3f} at first, {np.mean(losses[-5:]):.3f} after {len(losses)} steps")
