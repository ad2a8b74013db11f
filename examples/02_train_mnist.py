"""Train a convolutional network on MNIST, on NumPy arrays: 99 % of the test digits in five epochs.

    python examples/02_train_mnist.py --data DIR      # the four IDX files, or a directory with mnist/ in it
    python examples/02_train_mnist.py --synthetic     # digits drawn on the spot: needs no files

Without --data it looks in $FASTCONV_DATA and then in ~/.cache/fastconv. ``--fashion`` trains a larger network on
Fashion-MNIST.
"""

import argparse
import sys
import time

import numpy as np

from fastconv import nn


def mnist_network(algorithm: str, precision: str | None) -> nn.Sequential:
    """Three convolutions and two linear layers: 93,322 parameters."""
    how = {"activation": "relu", "algorithm": algorithm, "precision": precision}
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, **how),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, **how),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, **how),
        nn.Flatten(),
        nn.Linear(64 * 3 * 3, 64, activation="relu"),
        nn.Linear(64, 10),
    )
    return nn.init.apply(model, weight=nn.init.glorot_uniform_, bias=nn.init.zeros_)


def fashion_network(algorithm: str, precision: str | None) -> nn.Sequential:
    """Five convolutions and three linear layers, with dropout and He initialisation: 1,413,834 parameters."""
    how = {"padding": "same", "activation": "relu", "algorithm": algorithm, "precision": precision}
    model = nn.Sequential(
        nn.Conv2d(1, 64, 7, **how),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, **how),
        nn.Conv2d(128, 128, 3, **how),
        nn.MaxPool2d(2),
        nn.Conv2d(128, 256, 3, **how),
        nn.Conv2d(256, 256, 3, **how),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256 * 3 * 3, 128, activation="relu"),
        nn.Dropout(0.5),
        nn.Linear(128, 64, activation="relu"),
        nn.Dropout(0.5),
        nn.Linear(64, 10),
    )
    return nn.init.apply(model, weight=nn.init.he_normal_, bias=nn.init.zeros_)


def load(options: argparse.Namespace) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return ((x, y) for training, (x, y) for testing), images as float32 (N, 1, 28, 28) from 0 to 1."""
    if options.synthetic:
        n = options.limit or 10_000
        splits = (nn.datasets.synthetic_digits(n, seed=1), nn.datasets.synthetic_digits(max(n // 5, 200), seed=2))
    else:
        place = nn.datasets.find_mnist(options.data, "fashion-mnist" if options.fashion else "mnist")
        splits = nn.datasets.load_mnist(place)
    (x, y), test = splits
    train = (x[: options.limit], y[: options.limit])
    first, second = ((images[:, None].astype(np.float32) / 255, labels) for images, labels in (train, test))
    return first, second


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train a convolutional network on MNIST with fastconv.nn.")
    parser.add_argument("--data", metavar="DIR", help="directory of the four IDX files, or with mnist/ in it")
    parser.add_argument("--synthetic", action="store_true", help="train on generated digits instead")
    parser.add_argument("--fashion", action="store_true", help="the larger network, on Fashion-MNIST")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--limit", type=int, metavar="N", help="train on the first N images only")
    parser.add_argument("--algorithm", default="auto", help="of the convolutions: auto, direct, im2col, fft, ...")
    parser.add_argument("--precision", choices=("highest", "high", "medium"), help="of the convolutions")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main() -> int:
    """Train and test; return the exit status."""
    options = parse()
    try:
        train, test = load(options)
    except nn.datasets.DataNotFoundError as error:
        print(f"{error}\n\nOr train on generated digits: add --synthetic", file=sys.stderr)
        return 2
    nn.manual_seed(options.seed)
    model = (fashion_network if options.fashion else mnist_network)(options.algorithm, options.precision)
    print(nn.summary(model, train[0].shape[1:]), end="\n\n")
    optimizer = nn.RMSprop(model.parameters(), lr=1e-3, alpha=0.9, eps=1e-7)
    start = time.perf_counter()
    nn.fit(model, *train, optimizer=optimizer, metrics=["accuracy"], batch_size=64, epochs=options.epochs)
    print(f"\nTrained in {time.perf_counter() - start:.1f} s")
    found = nn.evaluate(model, *test, metrics=["accuracy"])
    print(f"Test accuracy {found['accuracy']:.4f}, loss {found['loss']:.4f}, on {len(test[0]):,} images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
