"""Training in several processes: PyTorch's DistributedDataParallel, with fastconv inside.

    torchrun --nproc-per-node 2 examples/04_torchrun_ddp.py --synthetic
    torchrun --nproc-per-node 2 examples/04_torchrun_ddp.py --data DIR     # MNIST's four IDX files

Each process computes the gradients of its part of the images; PyTorch averages them, through gloo. Nothing here knows
of fastconv but one line. One process will do too: ``python examples/04_torchrun_ddp.py --synthetic``.
"""

import argparse
import os
import sys

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import fastconv.torch
from fastconv.nn import datasets


def network() -> nn.Module:
    """Two convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 5 * 5, 10),
    )  # fmt: skip


def train(model: nn.Module, loader: DataLoader, epochs: int, is_first: bool) -> None:
    """Train; the first process says how it goes."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        right = seen = 0
        for x, y in loader:
            optimizer.zero_grad()
            scores = model(x)
            nn.functional.cross_entropy(scores, y).backward()
            optimizer.step()
            right, seen = right + int((scores.argmax(1) == y).sum()), seen + len(y)
        if is_first:
            print(f"epoch {epoch + 1}: accuracy {right / seen:.4f} on this process's {seen:,} images", flush=True)


def load(options: argparse.Namespace) -> TensorDataset:
    """Return images (N, 1, 28, 28) from 0 to 1, with labels."""
    if options.synthetic:
        images, labels = datasets.synthetic_digits(options.limit, seed=0)
    else:
        (images, labels), _ = datasets.load_mnist(datasets.find_mnist(options.data, "mnist"))
    x = torch.from_numpy(images[: options.limit, None].astype(np.float32) / 255)
    return TensorDataset(x, torch.from_numpy(labels[: options.limit].astype(np.int64)))


def main() -> int:
    """Join the other processes and train; return the exit status."""
    parser = argparse.ArgumentParser(description="DistributedDataParallel with fastconv inside.")
    parser.add_argument("--data", metavar="DIR", help="directory of the four IDX files, or with mnist/ in it")
    parser.add_argument("--synthetic", action="store_true", help="train on generated digits instead")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--limit", type=int, default=4096, metavar="N", help="train on the first N images only")
    options = parser.parse_args()
    try:
        data = load(options)
    except datasets.DataNotFoundError as error:
        print(f"{error}\n\nOr train on generated digits: add --synthetic", file=sys.stderr)
        return 2
    for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "29500")):
        os.environ.setdefault(name, alone)
    dist.init_process_group("gloo")
    # The processes of this machine share its cores.
    threads = max((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = DistributedDataParallel(network())
    loader = DataLoader(data, 64, sampler=DistributedSampler(data))
    with fastconv.options(threads=threads), fastconv.torch.enabled():
        train(model, loader, options.epochs, dist.get_rank() == 0)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
