"""DistributedDataParallel with fastconv inside: the averaged gradients are those of the joint batch."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support import run_python
from torch import nn

import fastconv.torch as ft

EXAMPLES = Path(__file__).parent.parent / "examples"

PROCESS = """
import sys, warnings
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import fastconv.torch
from test_torch_distributed import gradients, images, network

rank, place = {rank}, {place!r}
# One machine: no need of a host name that resolves.
dist.init_process_group("gloo", init_method="file://" + place + "/meeting", rank=rank, world_size=2)
model = DistributedDataParallel(network())
x, y = images()
with fastconv.torch.enabled() as found:
    grads = gradients(model, x[rank::2], y[rank::2])
assert found.routed["conv2d"] and not found.left
torch.save(grads, place + f"/{{rank}}.pt")
dist.destroy_process_group()
"""


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.AvgPool2d(2), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(24, 10)).double()


def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 1, 14, 14, generator=generator, dtype=torch.float64), torch.arange(8)


def gradients(model, x, y):
    nn.functional.cross_entropy(model(x), y).backward()
    return [p.grad for p in model.parameters()]


def test_two_processes_average_to_the_gradients_of_the_joint_batch(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        scripts = [PROCESS.format(rank=rank, place=str(tmp_path)) for rank in (0, 1)]
        list(pool.map(lambda script: run_python(script, GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1"), scripts))
    with ft.enabled():
        wanted = gradients(network(), *images())
    for rank in (0, 1):
        for found, expected in zip(torch.load(tmp_path / f"{rank}.pt"), wanted):
            torch.testing.assert_close(found, expected)


def run_example(name, *arguments):
    script = f"""
import runpy, sys
sys.argv = [{name!r}, *{arguments!r}]
try:
    runpy.run_path({str(EXAMPLES / name)!r}, run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
"""
    return run_python(script, GLOO_SOCKET_IFNAME="lo")


def test_the_example_of_one_line_has_the_same_losses():
    printed = run_example("03_torch_one_line.py", "--synthetic", "--steps", "8")
    rows = [line.split() for line in printed.splitlines() if line.startswith("     ") and line.split()[0].isdigit()]
    assert len(rows) >= 4
    for _, theirs, ours in rows:
        assert float(ours) == pytest.approx(float(theirs), rel=1e-3)
    assert "images/s" in printed
    assert "conv2d" in printed


def test_the_example_of_ddp_trains():
    assert "epoch 1: accuracy" in run_example("04_torchrun_ddp.py", "--synthetic", "--epochs", "1", "--limit", "256")
