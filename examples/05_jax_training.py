"""Train a convolutional network in JAX, with fastconv's convolutions and pools under jit and grad, or with lax's.

    python examples/05_jax_training.py --synthetic        # digits drawn on the spot: needs no files
    python examples/05_jax_training.py --data DIR         # the four IDX files, or a directory with mnist/ in it
    python examples/05_jax_training.py --backend lax      # the same network by jax.lax, to compare

Without --data it looks in $FASTCONV_DATA and then in ~/.cache/fastconv. ``--fashion`` takes Fashion-MNIST.
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

try:
    import jax
    import jax.numpy as jnp
except ImportError as error:
    sys.exit(f"this example needs JAX: pip install 'fastconv[jax]' ({error})")

import fastconv.jax
from fastconv import nn

Convolve, Pool = Callable[..., jax.Array], Callable[[jax.Array], jax.Array]


def lax_conv(x: jax.Array, weight: jax.Array, bias: jax.Array, activation: str) -> jax.Array:
    """What fastconv.jax.conv2d computes, by jax.lax."""
    y = jax.lax.conv_general_dilated(x, weight, (1, 1), "VALID") + bias[:, None, None]
    return getattr(jax.nn, activation)(y)


def lax_pool(x: jax.Array) -> jax.Array:
    """What fastconv.jax.max_pool2d(x, 2) computes, by jax.lax."""
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")


BACKENDS: dict[str, tuple[Convolve, Pool]] = {
    "fastconv": (fastconv.jax.conv2d, lambda x: fastconv.jax.max_pool2d(x, 2)),
    "lax": (lax_conv, lax_pool),
}
# Weights of three convolutions (K, C, R, S) and two linear layers (in, out): 93,322 parameters with the biases.
SHAPES = ((32, 1, 3, 3), (64, 32, 3, 3), (64, 64, 3, 3), (64 * 3 * 3, 64), (64, 10))


def parameters(seed: int) -> list[tuple[jax.Array, jax.Array]]:
    """Weights and biases, by Glorot and Bengio (2010)."""
    made = []
    for key, shape in zip(jax.random.split(jax.random.key(seed), len(SHAPES)), SHAPES):
        convolution = len(shape) == 4
        glorot = jax.nn.initializers.glorot_uniform(*((1, 0) if convolution else (0, 1)))
        made.append((glorot(key, shape), jnp.zeros(shape[0] if convolution else shape[1])))
    return made


def network(backend: str) -> Callable[[Any, jax.Array], jax.Array]:
    """Return a function of (parameters, images) that gives the ten logits of each image."""
    conv, pool = BACKENDS[backend]

    def logits(layers: Any, x: jax.Array) -> jax.Array:
        c1, c2, c3, hidden, last = layers
        x = pool(conv(x, *c1, activation="relu"))
        x = pool(conv(x, *c2, activation="relu"))
        x = conv(x, *c3, activation="relu").reshape(len(x), -1)
        x = jax.nn.relu(x @ hidden[0] + hidden[1])
        return x @ last[0] + last[1]

    return logits


def training_step(logits: Callable[[Any, jax.Array], jax.Array], rate: float, momentum: float) -> Callable[..., Any]:
    """Return a compiled step of gradient descent: (parameters, velocities, images, labels) to (both new, loss)."""

    def loss(layers: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(logits(layers, x))
        return -jnp.take_along_axis(log_p, labels[:, None], axis=1).mean()

    @jax.jit
    def step(layers: Any, velocities: Any, x: jax.Array, labels: jax.Array) -> Any:
        value, grads = jax.value_and_grad(loss)(layers, x, labels)
        velocities = jax.tree.map(lambda v, g: momentum * v + g, velocities, grads)
        return jax.tree.map(lambda p, v: p - rate * v, layers, velocities), velocities, value

    return step


def load(options: argparse.Namespace) -> Any:
    """Return ((x, y) for training, (x, y) for testing), images as float32 (N, 1, 28, 28) from 0 to 1."""
    if options.synthetic:
        n = options.limit or 10_000
        splits = (nn.datasets.synthetic_digits(n, seed=1), nn.datasets.synthetic_digits(max(n // 5, 200), seed=2))
    else:
        place = nn.datasets.find_mnist(options.data, "fashion-mnist" if options.fashion else "mnist")
        splits = nn.datasets.load_mnist(place)
    (x, y), test = splits
    train = (x[: options.limit], y[: options.limit])
    return tuple(
        (images[:, None].astype(np.float32) / 255, labels.astype(np.int32)) for images, labels in (train, test)
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train a convolutional network in JAX with fastconv.jax.")
    parser.add_argument("--data", metavar="DIR", help="directory of the four IDX files, or with mnist/ in it")
    parser.add_argument("--synthetic", action="store_true", help="train on generated digits instead")
    parser.add_argument("--fashion", action="store_true", help="train on Fashion-MNIST")
    parser.add_argument("--backend", choices=tuple(BACKENDS), default="fastconv")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--limit", type=int, metavar="N", help="train on the first N images only")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main() -> int:
    """Train and test; return the exit status."""
    options, batch = parse(), 64
    try:
        (x, labels), (test_x, test_labels) = load(options)
    except nn.datasets.DataNotFoundError as error:
        print(f"{error}\n\nOr train on generated digits: add --synthetic", file=sys.stderr)
        return 2
    logits = network(options.backend)
    step, layers = training_step(logits, rate=0.02, momentum=0.9), parameters(options.seed)
    velocities, rng = jax.tree.map(jnp.zeros_like, layers), np.random.default_rng(options.seed)
    # Compile before the clock starts.
    jax.block_until_ready(step(layers, velocities, x[:batch], labels[:batch]))
    for epoch in range(options.epochs):
        start, losses = time.perf_counter(), []
        order = rng.permutation(len(x))
        for i in range(0, len(x) - batch + 1, batch):
            rows = order[i : i + batch]
            layers, velocities, loss = step(layers, velocities, x[rows], labels[rows])
            losses.append(loss)
        mean = float(jnp.stack(losses).mean())
        rate = batch * len(losses) / (time.perf_counter() - start)
        print(f"Epoch {epoch + 1}: loss {mean:.4f}, {rate:,.0f} images/s with {options.backend}")
    predict = jax.jit(lambda x: logits(layers, x).argmax(-1))
    found = np.concatenate([predict(test_x[i : i + 1000]) for i in range(0, len(test_x), 1000)])
    print(f"Test accuracy {(found == test_labels).mean():.4f} on {len(test_x):,} images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
