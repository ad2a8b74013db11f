"""One line: an unmodified PyTorch model on Fashion-MNIST, its convolutions and pools computed by fastconv.

    python examples/03_torch_one_line.py --data DIR      # the four IDX files, or a directory with fashion-mnist/ in it
    python examples/03_torch_one_line.py --synthetic     # digits drawn on the spot: needs no files

Without --data it looks in $FASTCONV_DATA and then in ~/.cache/fastconv. The model is trained twice from the same
weights on the same images, with PyTorch and with fastconv: the losses agree within rounding, which training magnifies
over some hundred steps. Both speeds are printed.
"""

import argparse
import contextlib
import copy
import sys
import time

import numpy as np
import torch
from torch import nn

import fastconv.torch
from fastconv.nn import datasets

BATCH = 64


def network() -> nn.Module:
    """Three convolutions and two linear layers, as anybody would write them."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(64 * 3 * 3, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int) -> tuple[list[float], float]:
    """Return the loss of each step and the images per second, the first quarter of the steps aside: those compile."""
    optimizer, losses, start, warm = torch.optim.SGD(model.parameters(), 0.05), [], 0.0, steps // 4
    for step in range(steps):
        if step == warm:
            start = time.perf_counter()
        first = step * BATCH % (len(x) - BATCH + 1)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[first : first + BATCH]), y[first : first + BATCH])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, (steps - warm) * BATCH / (time.perf_counter() - start)


def load(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (N, 1, 28, 28) from 0 to 1, and labels."""
    if options.synthetic:
        images, labels = datasets.synthetic_digits(min(options.steps, 64) * BATCH, seed=0)
    else:
        (images, labels), _ = datasets.load_mnist(datasets.find_mnist(options.data, "fashion-mnist"))
    return torch.from_numpy(images[:, None].astype(np.float32) / 255), torch.from_numpy(labels.astype(np.int64))


def main() -> int:
    """Train twice and compare; return the exit status."""
    parser = argparse.ArgumentParser(description="An unmodified PyTorch model, with and without fastconv.")
    parser.add_argument("--data", metavar="DIR", help="directory of the four IDX files, or with fashion-mnist/ in it")
    parser.add_argument("--synthetic", action="store_true", help="train on generated digits instead")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help=f"batches of {BATCH} images")
    options = parser.parse_args()
    try:
        x, y = load(options)
    except datasets.DataNotFoundError as error:
        print(f"{error}\n\nOr train on generated digits: add --synthetic", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    model = network()
    curves, speeds = {}, {}
    # The one line is `with fastconv.torch.enabled():`.
    for name, block in (("PyTorch", contextlib.nullcontext()), ("fastconv", fastconv.torch.enabled())):
        with block:
            curves[name], speeds[name] = train(copy.deepcopy(model), x, y, options.steps)
    print(block.report(), end="\n\n")
    print(f"{'step':>6} {'PyTorch':>10} {'fastconv':>10}   loss")
    for step in np.unique(np.geomspace(1, options.steps, 10).astype(int)):
        print(f"{step:6d} {curves['PyTorch'][step - 1]:10.6f} {curves['fastconv'][step - 1]:10.6f}")
    print(f"\nPyTorch {speeds['PyTorch']:,.0f} images/s, fastconv {speeds['fastconv']:,.0f} images/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
