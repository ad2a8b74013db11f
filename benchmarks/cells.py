"""What the panel measures: convolutions, max pools and training steps, each as a cell with its contenders.

A contender's result is checked before it is timed. Convolutions are held against float64, max pools against PyTorch's
values and indices, a training step's first gradient against PyTorch's in float64.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache, partial
from importlib.machinery import SourceFileLoader
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

import fastconv
from fastconv import nn, registry, selection
from fastconv.geometry import DATA_FORMATS, DIRECTIONS
from fastconv.testing import rms_error

from . import check, workloads
from .check import Oracle, Problem
from .providers import FastconvProvider, Provider, TorchProvider
from .workloads import Workload

# Gradients of max pools are sums of a few float32 numbers; values and indices are PyTorch's.
POOL_ERRORS = {"forward": 0.0, "input_grad": 1e-6}
# Of a weight's gradient through a whole network, by precision of its convolutions.
TRAINING_ERRORS = {"highest": 1e-5, "high": 2e-4, "medium": 5e-2}
# Of a network's first weights.
SEED = 2


class WrongResultError(Exception):
    """A result that is further from what it should be than is allowed."""


@dataclass
class Entry:
    """One contender's line of the results.

    `levels` lists the precisions that it stands for: those at which fastconv takes this algorithm by itself, none for
    one that is measured for the regret alone. Times are None unless `status` is "ok".
    """

    provider: str
    data_format: str
    algorithm: str
    levels: list[str]
    status: str = "ok"
    note: str = ""
    rms_error: float | None = None
    ms: float | None = None
    ms_q20: float | None = None
    ms_q80: float | None = None
    repeats: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the fields, floats with five figures."""
        return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in asdict(self).items()}


@dataclass
class Contender:
    """Who computes a cell: `prepare` returns the callable, `verify` the RMS error of its result or raises."""

    entry: Entry
    prepare: Callable[[], Callable[[], Any]]
    verify: Callable[[Any], float]


class Cell(Protocol):
    """One thing to compute, by whoever can.

    Attributes
    ----------
    network, layer, direction, kind : str
        The first three name it; the last is what the summary groups by.
    facts : dict
        What to store with it: "gflop" of direct convolution, "mbytes" of operands, "images" of a batch.
    apart : bool
        Whether each contender is timed in processes of its own.
    """

    network: str
    layer: str
    direction: str
    kind: str
    facts: dict[str, float]
    apart: bool

    def contenders(self, levels: Sequence[str], regret: bool) -> Iterator[Contender]:
        """Yield those that can compute it; with `regret` fastconv's other algorithms too."""
        ...


def limited(error: float, limit: float) -> float:
    """Return an error within its limit."""
    if not error <= limit:
        raise WrongResultError(f"rms {error:.1e}, allowed {limit:.1e}")
    return error


# --- convolutions ----------------------------------------------------------------------------------------------

SMALLEST = Workload("smallest", "1x1x8x8 3x3", (1, 1, 8, 8), (1, 1, 3, 3))
_problem = lru_cache(maxsize=1)(Problem.make)


class ConvCell:
    """A layer of the panel in one direction."""

    apart = False

    def __init__(self, workload: Workload, direction: str) -> None:
        self.workload, self.direction = workload, direction
        self.network, self.layer = workload.network, workload.name
        self.kind = "smallest" if workload.network == "smallest" else workloads.kind(workload)
        geometry = workload.geometry()
        self.facts = {"gflop": geometry.flops * 1e-9, "mbytes": geometry.bytes * 1e-6}

    @cached_property
    def problem(self) -> Problem:
        """Its operands."""
        return _problem(self.workload)

    @cached_property
    def oracle(self) -> Oracle:
        """What float64 makes of them."""
        return Oracle(self.problem, self.direction)

    def contenders(self, levels: Sequence[str], regret: bool) -> Iterator[Contender]:
        """Yield what auto takes in both formats, PyTorch, and, with `regret`, every other algorithm."""
        for data_format in DATA_FORMATS:
            geometry = self.workload.geometry(data_format, "float32")
            taken: dict[str, list[str]] = {}
            for level in levels:
                choice = selection.choose(geometry, self.direction, data_format, "cpu", "auto", level)
                taken.setdefault(choice.algorithm.name, []).append(level)
            for name, its_levels in taken.items():
                # The call that a user makes, choice included.
                provider = FastconvProvider("auto", data_format, its_levels[0], True, None)
                yield self._contender(Entry("fastconv", data_format, name, its_levels), provider, its_levels[0])
            others = selection.algorithms(geometry, direction=self.direction, precision=levels[-1]) if regret else []
            for name in [c.name for c in others if c.supported and c.name not in taken]:
                level = registry.named(name, "cpu")[0].precision
                provider = FastconvProvider(name, data_format, level, False, None)
                yield self._contender(Entry("fastconv", data_format, name, []), provider, level)
        for data_format in DATA_FORMATS:
            yield self._contender(Entry("torch", data_format, "", list(levels)), TorchProvider(data_format), levels[0])

    def _contender(self, entry: Entry, provider: Provider, level: str) -> Contender:
        def verify(result: Any) -> float:
            found = self.oracle.errors(provider.as_numpy(result, self.direction))
            limits = check.allowed(self.problem, self.direction, entry.algorithm, level, provider.is_peer)
            if not check.is_right(found, limits):
                raise WrongResultError(f"rms {found.rms:.1e}, allowed {limits.rms:.1e}; largest {found.largest:.1e}")
            return found.rms

        return Contender(entry, lambda: provider.prepare(self.problem, self.direction), verify)


# --- max pools with indices ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """A max pool: input, window, stride and padding."""

    x_shape: tuple[int, int, int, int]
    kernel: int
    stride: int
    padding: int = 0


POOLS = (
    Pool((32, 64, 112, 112), 2, 2),
    Pool((8, 64, 56, 56), 2, 2),
    Pool((8, 64, 56, 56), 3, 2, 1),
    Pool((8, 64, 56, 56), 3, 1, 1),
    Pool((8, 64, 56, 56), 5, 3),
    Pool((64, 32, 26, 26), 2, 2),
)


class PoolCell:
    """A max pool with indices, or its gradient."""

    network = "max_pool2d"
    apart = False

    def __init__(self, pool: Pool, direction: str) -> None:
        self.pool, self.direction = pool, direction
        N, C, H, W = pool.x_shape
        self.layer = f"{N}x{C}x{H}x{W} {pool.kernel}x{pool.kernel}/{pool.stride}"
        P, Q = ((n + 2 * pool.padding - pool.kernel) // pool.stride + 1 for n in (H, W))
        # Values of 4 bytes, and indices of 8 where a value is.
        self.facts = {"mbytes": N * C * (4 * H * W + 12 * P * Q) * 1e-6}
        self.kind = "large pool" if self.facts["mbytes"] > 64 else "pool"

    def contenders(self, levels: Sequence[str], regret: bool) -> Iterator[Contender]:
        """Yield fastconv and PyTorch in both formats; pools have one precision."""
        x = np.random.default_rng(0).standard_normal(self.pool.x_shape, np.float32)
        expected = [a.numpy() for a in self._torch(x, "channels_first")()]

        def verify(data_format: str, results: Sequence[Any]) -> float:
            arrays = [np.asarray(a) for a in results]
            if data_format == "channels_last":
                arrays = [np.moveaxis(a, -1, 1) for a in arrays]
            return limited(max(map(rms_error, arrays, expected)), POOL_ERRORS[self.direction])

        for data_format in DATA_FORMATS:
            entry = Entry("fastconv", data_format, "max_pool2d", list(levels[:1]))
            yield Contender(entry, partial(self._fastconv, x, data_format), partial(verify, data_format))
        for data_format in DATA_FORMATS:
            entry = Entry("torch", data_format, "", list(levels[:1]))
            yield Contender(entry, partial(self._torch, x, data_format), partial(verify, "channels_first"))

    def _fastconv(self, x: np.ndarray, data_format: str) -> Callable[[], Any]:
        pool, how = self.pool, {"data_format": data_format}
        x = x if data_format == "channels_first" else np.ascontiguousarray(np.moveaxis(x, 1, -1))
        window = (pool.kernel, pool.stride, pool.padding)
        forward = partial(fastconv.max_pool2d, x, *window, return_indices=True, **how)
        if self.direction == "forward":
            return forward
        grad, indices = forward()
        return lambda: (fastconv.max_pool2d_backward(grad, indices, x.shape, **how),)

    def _torch(self, array: np.ndarray, data_format: str) -> Callable[[], Any]:
        import torch

        x = torch.from_numpy(array).to(memory_format=_memory_format(data_format))
        window = [[n, n] for n in (self.pool.kernel, self.pool.stride, self.pool.padding, 1)]
        forward = torch.inference_mode()(partial(torch.ops.aten.max_pool2d_with_indices, x, *window))
        if self.direction == "forward":
            return forward
        grad, indices = forward()
        backward = torch.ops.aten.max_pool2d_with_indices_backward
        return torch.inference_mode()(lambda: (backward(grad, x, *window, False, indices),))


def _memory_format(data_format: str) -> Any:
    import torch

    return torch.channels_last if data_format == "channels_last" else torch.contiguous_format


# --- training steps --------------------------------------------------------------------------------------------

# Network of examples/02_train_mnist.py, and images in a batch.
TRAININGS = (("mnist", 64), ("fashion", 32))


class TrainingCell:
    """Forward, backward and the optimiser's step on one batch.

    Timed apart, as a training script runs: what else has been in a process decides whether its allocator hands pages
    back to the system, and with these networks a step of PyTorch that gets new ones takes half as long again.
    """

    layer, direction, kind, apart = "training", "step", "training", True

    def __init__(self, network: str, batch: int) -> None:
        self.network, self.facts = network, {"images": float(batch)}
        rng = np.random.default_rng(0)
        self.x = rng.standard_normal((batch, 1, 28, 28), np.float32)
        self.y = rng.integers(0, 10, batch)

    def contenders(self, levels: Sequence[str], regret: bool) -> Iterator[Contender]:
        """Yield `fastconv.nn` and PyTorch's model inside `enabled`, at each precision, and PyTorch, in both formats."""
        for name, ours in (("fastconv", self._ours), ("fastconv.torch", self._routed)):
            algorithm = "nn" if name == "fastconv" else "enabled"
            for data_format, level in product(DATA_FORMATS, levels):
                prepare, verify = partial(ours, data_format, level), partial(self._verify, level)
                yield Contender(Entry(name, data_format, algorithm, [level]), prepare, verify)
        for data_format in DATA_FORMATS:
            entry = Entry("torch", data_format, "", list(levels))
            yield Contender(entry, partial(self._theirs, data_format), lambda result: 0.0)

    def _network(self, precision: str) -> Any:
        # From some weights float32 takes another of two nearly equal maxima than float64, PyTorch's too.
        nn.manual_seed(SEED)
        return getattr(_example(), f"{self.network}_network")("auto", precision)

    def _ours(self, data_format: str, level: str) -> Callable[[], Any]:
        x, model = self.x, self._network(level)
        first = next(model.parameters())
        if data_format == "channels_last":
            _to_channels_last(model, x.shape[1:])
            x = np.ascontiguousarray(np.moveaxis(x, 1, -1))
        loss = nn.CrossEntropyLoss()
        optimizer = nn.RMSprop(model.parameters(), lr=1e-3, alpha=0.9, eps=1e-7)

        def gradients() -> None:
            optimizer.zero_grad()
            loss(model(x), self.y)
            model.backward(loss.backward(), input_grad=False)

        def step() -> None:
            gradients()
            optimizer.step()

        # The first gradient is without dropout, whose masks nobody shares.
        dropouts = [layer for layer in model if isinstance(layer, nn.Dropout)]
        for layer in dropouts:
            layer.eval()
        gradients()
        self.first_gradient = first.grad.copy()
        for layer in dropouts:
            layer.train()
        return step

    def _routed(self, data_format: str, level: str) -> Callable[[], Any]:
        import torch

        import fastconv.torch

        model, x, y, step = self._twin(data_format)
        mode = fastconv.torch.enabled(precision=level)

        def routed() -> None:
            with mode:
                step()

        with mode:
            torch.nn.functional.cross_entropy(model.eval()(x), y).backward()
        self.first_gradient = next(model.parameters()).grad.numpy().copy()
        model.train()
        return routed

    def _theirs(self, data_format: str) -> Callable[[], Any]:
        return self._twin(data_format)[-1]

    def _twin(self, data_format: str) -> tuple[Any, Any, Any, Callable[[], Any]]:
        """Return PyTorch's model, its batch, and its step."""
        import torch

        memory, network = _memory_format(data_format), self._network("highest")
        model = _torch_twin(network, network.state_dict()).to(memory_format=memory)
        x, y = torch.from_numpy(self.x).to(memory_format=memory), torch.from_numpy(self.y)
        optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3, alpha=0.9, eps=1e-7)

        def step() -> None:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

        return model, x, y, step

    def _verify(self, level: str, result: Any) -> float:
        return limited(rms_error(self.first_gradient, self._expected), TRAINING_ERRORS[level])

    @cached_property
    def _expected(self) -> np.ndarray:
        """PyTorch's gradient of the first weight, in float64 and without dropout."""
        import torch

        network = self._network("highest")
        model = _torch_twin(network, network.state_dict()).double().eval()
        logits = model(torch.from_numpy(self.x).double())
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(self.y)).backward()
        return next(model.parameters()).grad.numpy()


@lru_cache(maxsize=1)
def _example() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "examples" / "02_train_mnist.py"
    loader = SourceFileLoader("train_mnist", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))  # type: ignore[arg-type]
    loader.exec_module(module)
    return module


def _to_channels_last(model: Any, shape: tuple[int, ...]) -> None:
    """Change a network's data format; the linear layer behind the flattening gets its columns in the new order."""
    flattened: tuple[int, ...] | None = None
    for layer in model:
        if isinstance(layer, nn.Flatten):
            flattened = shape
        elif flattened is not None and isinstance(layer, nn.Linear):
            weight = layer.weight.data.reshape(-1, *flattened)
            layer.weight.data = np.ascontiguousarray(np.moveaxis(weight, 1, -1)).reshape(len(weight), -1)
            return
        if flattened is None:
            shape = layer.output_shape((1, *shape))[1:]
        if hasattr(layer, "data_format"):
            layer.data_format = "channels_last"


def _torch_twin(model: Any, state: dict[str, np.ndarray]) -> Any:
    """Return the same network in PyTorch, with these parameters."""
    import torch

    layers: list[Any] = []
    layer: Any
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            K, C, R, S = layer.weight.shape
            layers.append(torch.nn.Conv2d(C, K, (R, S), padding=layer.padding))  # type: ignore[arg-type]
        elif isinstance(layer, nn.Linear):
            layers.append(torch.nn.Linear(layer.in_features, layer.out_features))
        elif isinstance(layer, nn.MaxPool2d):
            layers.append(torch.nn.MaxPool2d(layer.kernel_size, layer.stride))
        elif isinstance(layer, nn.Dropout):
            layers.append(torch.nn.Dropout(layer.p))
        else:
            layers.append(torch.nn.Flatten())
        if getattr(layer, "activation", None) is not None:
            layers.append(torch.nn.ReLU())
    twin = torch.nn.Sequential(*layers)
    with torch.no_grad():
        for parameter, array in zip(twin.parameters(), state.values()):
            parameter.copy_(torch.from_numpy(array))
    return twin


# --- all of them -----------------------------------------------------------------------------------------------


def all_cells() -> Iterator[Cell]:
    """Yield the whole panel."""
    for workload in (*workloads.panel(), SMALLEST):
        for direction in DIRECTIONS:
            yield ConvCell(workload, direction)
    for pool in POOLS:
        for direction in ("forward", "input_grad"):
            yield PoolCell(pool, direction)
    for network, batch in TRAININGS:
        yield TrainingCell(network, batch)
