"""pytest-benchmark: pooling against PyTorch, forward and backward. Run by ``make bench``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastconv
from fastconv.testing import POOL_CASES, PoolCase, assert_close

from .providers import torch_problem

# From the tests' own table, and the pools of three networks.
_CASES = ("1d 3 stride 2 ceil", "13x13 stride 1 padding 6", "3d 2x2x2")
POOLS = (
    PoolCase("mnist pool1", (64, 32, 26, 26), 2),
    PoolCase("vgg16 pool1", (2, 64, 224, 224), 2),
    PoolCase("resnet50 pool1", (8, 64, 112, 112), 3, 2, 1),
    *(case for case in POOL_CASES if case.name in _CASES),
)
KINDS = ("max", "max_with_indices", "max_backward", "average", "average_backward")

Call = Callable[[], Any]


def _fastconv(case: PoolCase, kind: str, x: np.ndarray) -> Call:
    def op(name: str) -> Any:
        return getattr(fastconv, name.format(case.spatial_dims))

    size = {"stride": case.stride, "padding": case.padding, "ceil_mode": case.ceil_mode}
    if kind == "average":
        return lambda: op("avg_pool{}d")(x, case.kernel_size, **size)
    if kind == "average_backward":
        grad = op("avg_pool{}d")(x, case.kernel_size, **size)
        return lambda: op("avg_pool{}d_backward")(grad, x.shape, case.kernel_size, **size)
    if kind == "max":
        return lambda: op("max_pool{}d")(x, case.kernel_size, **size)
    if kind == "max_with_indices":
        return lambda: op("max_pool{}d")(x, case.kernel_size, return_indices=True, **size)[0]
    y, indices = op("max_pool{}d")(x, case.kernel_size, return_indices=True, **size)
    return lambda: op("max_pool{}d_backward")(y, indices, x.shape)


def _torch(case: PoolCase, kind: str, array: np.ndarray) -> Call:
    import torch

    def op(name: str) -> Any:
        return getattr(torch.nn.functional, name.format(case.spatial_dims))

    x = torch.from_numpy(array).requires_grad_(kind.endswith("backward"))
    size = {"stride": case.stride, "padding": case.padding, "ceil_mode": case.ceil_mode}
    pool = op("avg_pool{}d") if kind.startswith("average") else op("max_pool{}d")
    if kind == "max_with_indices":
        return lambda: pool(x, case.kernel_size, return_indices=True, **size)[0].numpy()
    if not kind.endswith("backward"):
        return lambda: pool(x, case.kernel_size, **size).numpy()
    y = pool(x, case.kernel_size, **size)
    return lambda: torch.autograd.grad(y, x, y.detach(), retain_graph=True)[0].numpy()


@pytest.mark.benchmark(max_time=0.3, min_rounds=3, warmup=True, warmup_iterations=2)
@pytest.mark.parametrize("provider", ["fastconv", "torch"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", POOLS, ids=str)
def test_pool(case: PoolCase, kind: str, provider: str, benchmark: Any) -> None:
    if (reason := torch_problem()) is not None:
        pytest.skip(reason)
    x = np.random.default_rng(0).standard_normal(case.x_shape, np.float32)
    calls = {"fastconv": _fastconv(case, kind, x), "torch": _torch(case, kind, x)}
    assert_close(calls["fastconv"](), calls["torch"](), dtype="float32")
    benchmark.group = f"{case} {kind}"
    benchmark(calls[provider])
