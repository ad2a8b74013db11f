"""pytest-benchmark: each algorithm and PyTorch, on a layer of each kind, in each direction. Run by ``make bench``."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest

from fastconv import registry, selection
from fastconv.geometry import DIRECTIONS
from fastconv.testing import CONV_CASES

from . import check, workloads
from .check import Oracle, Problem
from .providers import FastconvProvider, TorchProvider, torch_problem
from .workloads import Workload

# From the tests' own table: what the networks have none of.
_CASES = ("1d audio k15 stride 4", "3x3 dilation 2", "depthwise 15x15", "3d 3x3x3")
LAYERS = (
    *workloads.network("mnist"),
    *workloads.network("tour"),
    *(Workload.from_case(case) for case in CONV_CASES if case.name in _CASES),
)
ALGORITHMS = (*(a.name for a in registry.on("cpu")), "torch")


# One problem at a time: tests of one layer follow each other.
@lru_cache(maxsize=1)
def _problem(layer: Workload) -> Problem:
    return Problem.make(layer)


@lru_cache(maxsize=len(DIRECTIONS))
def _oracle(layer: Workload, direction: str) -> Oracle:
    return Oracle(_problem(layer), direction)


def _provider(name: str, data_format: str, problem: Problem, direction: str) -> Any:
    """Return the provider, or skip with the reason that it cannot do this."""
    if name == "torch":
        if (reason := torch_problem()) is not None:
            pytest.skip(reason)
        if data_format == "channels_last" and problem.geometry.spatial_dims == 1:
            pytest.skip("PyTorch has no such layout for signals")
        return TorchProvider(data_format)
    geometry = problem.workload.geometry(data_format, problem.dtype)
    (found,) = (c for c in selection.algorithms(geometry, direction=direction) if c.name == name)
    if not found.supported:
        pytest.skip(found.reason)
    return FastconvProvider(name, data_format, "highest", found.chosen, found.workspace_bytes)


@pytest.mark.benchmark(max_time=0.3, min_rounds=3, warmup=True, warmup_iterations=2)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_convolution(layer: Workload, direction: str, data_format: str, algorithm: str, benchmark: Any) -> None:
    problem = _problem(layer)
    provider = _provider(algorithm, data_format, problem, direction)
    call = provider.prepare(problem, direction)
    errors = _oracle(layer, direction).errors(provider.as_numpy(call(), direction))
    assert check.is_right(errors, check.allowed(problem, direction, algorithm, "highest", provider.is_peer))
    benchmark.group = f"{layer} {direction}"
    benchmark(call)
