"""The benchmark on a GPU: every algorithm against PyTorch, in all formats, dtypes and directions, and pools.

`python -m benchmarks.gpu_bench` is what `gpu_check` runs last, in a process of its own, until it is ended. How time is
taken is in `gpu_timing`. Results are compared with float64 before they are timed. PyTorch has the memory; kernels get
addresses.

With --first it ends after what is asked first: the usual layer in float32 and float16. With --prebuild the kernels are
compiled and nothing else happens, which needs no GPU.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property, partial
from typing import Any

import numpy as np

import fastconv
from fastconv import arrays, info, registry
from fastconv.cuda import compile, launch, pool, run
from fastconv.cuda.steps import Step
from fastconv.geometry import DATA_FORMATS, DIRECTIONS
from fastconv.testing import tolerance

from . import check, gpu_timing, workloads
from .cells import POOLS, Pool
from .gpu_look import LIMITS, PUBLIC, guarded, hardware, kernels, numpy_dtype
from .providers import set_cudnn, torch_convolution
from .timing import Timing
from .workloads import Workload

# The panel's batches are a CPU's: so many times as large fills a GPU.
BATCH = 8
# Images of a result that are compared with float64.
IMAGES = 2
# Seconds of measuring a call, and the most repeats.
BUDGET, REPEATS = 0.03, 30
# The most bytes of workspace.
LIMIT = 2**30
# Dtypes and formats, and kinds of layers, the most important first.
MODES = (
    ("channels_first", "float32"), ("channels_last", "float16"), ("channels_last", "float32"),
    ("channels_last", "bfloat16"), ("channels_first", "float16"), ("channels_first", "bfloat16"),
)  # fmt: skip
KINDS = ("3x3 stride 1", "1x1", "depthwise", "first layer", "other dense", "grouped")

# How what ends a process is noted.
FAULTS = ("crashed", "hung")

# What is timed, which returns its result, and facts to store with it.
Prepared = tuple[Callable[[], Any], dict[str, Any]]


class Cuda:
    """PyTorch's GPU."""

    name = "cuda"

    def __init__(self) -> None:
        import torch
        from cuda.bindings import driver

        self._torch, self._bindings, self.architecture = torch, driver, launch.architecture()
        self._flushed = torch.empty(gpu_timing.FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
        self.library: Any = arrays.library_of("memory", self._flushed)

    def address(self, tensor: Any) -> int:
        """Return where a tensor begins."""
        return tensor.data_ptr()

    def workspace(self, call: Callable[[], Any]) -> int:
        """Return the bytes that PyTorch lends during a call, beyond its result."""
        cuda = self._torch.cuda
        cuda.synchronize()
        before = cuda.memory_allocated()
        cuda.reset_peak_memory_stats()
        result = call()
        return cuda.max_memory_allocated() - before - result.nbytes

    def measure(self, call: Callable[[], Any]) -> tuple[Timing, float]:
        """Return the seconds that a call keeps the GPU busy, and those that it costs the host."""
        return gpu_timing.measure(call, self, BUDGET, REPEATS)

    # What `gpu_timing` needs.

    def synchronize(self) -> None:
        """Wait for all work."""
        self._torch.cuda.synchronize()

    def finish(self) -> None:
        """Wait for all work, but not for ever."""
        hardware.finished(self._bindings)

    def flush(self) -> None:
        """Empty the caches."""
        self._flushed.zero_()

    def hold(self, seconds: float) -> None:
        """Let cycles of some 2 GHz go by."""
        self._torch.cuda._sleep(int(2e9 * seconds))

    def moment(self) -> Any:
        """Return an event."""
        event = self._torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed(self, first: Any, last: Any) -> float:
        """Return the seconds between two events that have come."""
        return 1e-3 * first.elapsed_time(last)


def bench(device: Any, only_first: bool = False) -> None:
    """Measure, the most important first."""
    guarded("copy", partial(copy_bandwidth, device))
    for unit in first(device) if only_first else units(device):
        unit.measure()


def first(device: Any) -> list[Unit]:
    """Return what is asked first: the most important kind of layer in the two most important ways."""
    found = (unit for unit in units(device) if unit.facts["kind"] == KINDS[0])
    return list(itertools.islice(found, 2))


def units(device: Any) -> Iterator[Unit]:
    """Yield what is measured: a layer of each kind in all ways first, then pools, then the next layer of each kind."""
    layers = [w.with_batch(BATCH * w.x_shape[0]) for w in workloads.panel()]
    ranked = [_from_the_middle([w for w in layers if workloads.kind(w) == kind]) for kind in KINDS]
    for rank in range(max(map(len, ranked))):
        chosen = [kind[rank] for kind in ranked if rank < len(kind)]
        for direction, mode, workload in itertools.product(DIRECTIONS, MODES, chosen):
            yield ConvUnit(device, workload, direction, *mode)
        if rank == 0:
            operations = itertools.product(("max_pool", "avg_pool"), DIRECTIONS[:2])
            for mode, one, (operation, direction) in itertools.product(MODES[:2], POOLS, list(operations)):
                yield PoolUnit(device, one, operation, direction, *mode)


def _from_the_middle(layers: list[Workload]) -> list[Workload]:
    """Return layers of ordinary size first, the smallest and the largest last."""
    layers = sorted(layers, key=lambda w: w.geometry().flops)
    return [layers[i] for i in sorted(range(len(layers)), key=lambda i: abs(i - len(layers) // 2))]


def copy_bandwidth(device: Any, nbytes: int = 2 << 30) -> dict[str, Any]:
    """Return bytes read and written per second by a large copy."""
    import torch

    source = torch.ones(nbytes // 4, device=device.name)
    target = torch.empty_like(source)
    return {"bytes_per_s": 2 * nbytes / device.measure(lambda: target.copy_(source))[0].median}


class Unit:
    """One thing to compute, by whoever can: `key` names it, `facts` are stored with it."""

    facts: dict[str, Any]

    def __init__(self, device: Any, network: str, layer: str, direction: str, data_format: str, dtype: str) -> None:
        self.device, self.direction, self.data_format, self.dtype = device, direction, data_format, dtype
        names = ("network", "layer", "direction", "data_format", "dtype")
        self.where = dict(zip(names, (network, layer, direction, data_format, dtype)))
        self.key = " | ".join(self.where.values())

    def contenders(self) -> Iterator[tuple[str, Callable[[], Prepared]]]:
        """Yield who computes it, and the function that prepares that."""
        raise NotImplementedError

    def error(self, result: Any) -> float:
        """Return the RMS error of a result; NaN if any of it is."""
        raise NotImplementedError

    def limit(self, who: str) -> float:
        """Return the largest error of ours that is right."""
        return LIMITS[self.dtype]

    def steps(self) -> list[Any]:
        """Return all launches of ours, and what the library of the arrays does in between."""
        raise NotImplementedError

    def measure(self) -> None:
        """Time all contenders."""
        for who, prepare in self.contenders():
            if self._has_faulted(who):
                continue
            work = partial(self._measured, who, prepare)
            guarded(f"{self.key} | {who}", work, who=who, **self.where, **self.facts)

    def _has_faulted(self, who: str) -> bool:
        """Return whether another layer, done in the same way, has ended a process: that takes too much time twice."""
        way = " | ".join(["", self.direction, self.data_format, self.dtype, who])
        return any(key.endswith(way) and status in FAULTS for key, status in hardware.reported().items())

    def _measured(self, who: str, prepare: Callable[[], Prepared]) -> dict[str, Any]:
        call, facts = prepare()
        result = call()
        self.device.finish()
        try:
            rms = self.error(result)
        except RuntimeError as error:
            # No reference, or a fault that will show again when it is timed.
            rms, facts = float("nan"), {**facts, "text": str(error)[-300:]}
        found, host = self.device.measure(call)
        times = {"us": found.median, "us_q20": found.q20, "us_q80": found.q80, "host_us": host}
        right = who.startswith("torch") or rms <= self.limit(who)
        rounded = {name: round(1e6 * seconds, 2) for name, seconds in times.items()}
        shown = float(f"{rms:.2g}") if rms == rms else None
        return {"status": "ok" if right else "wrong", **rounded, "rms": shown, **facts}

    def launched(self, steps: Any, buffers: Any, tensors: dict[str, Any]) -> Callable[[], Any]:
        """Return the call that launches steps on tensors and lent memory, and gives back "out"."""
        library = self.device.library
        held = {name: t if t.is_contiguous() else t.movedim(1, -1) for name, t in tensors.items()}
        held |= {name: library.new(b.shape, np.dtype(b.dtype)) for name, b in buffers.items() if b.owned}
        addresses = {name: self.device.address(tensor) for name, tensor in held.items()}
        launches = run.ready(steps, self.device.architecture)
        tensors["out"].fill_(float("nan"))

        def call() -> Any:
            run.launched(launches, addresses, 0, library, held)
            return tensors["out"]

        return call

    def random(self, seed: int, shape: tuple[int, ...]) -> Any:
        """Return normally distributed operands, the same every time, with their channels last in memory if so here."""
        import torch

        generator = torch.Generator(self.device.name).manual_seed(seed)
        made = torch.randn(shape, generator=generator, device=self.device.name).to(getattr(torch, self.dtype))
        formats = {"channels_first": torch.contiguous_format, "channels_last": torch.channels_last}
        return made.contiguous(memory_format=formats[self.data_format])


class ConvUnit(Unit):
    """A convolution in one direction: PyTorch without and with TF32, and every algorithm."""

    def __init__(self, device: Any, workload: Workload, direction: str, data_format: str, dtype: str) -> None:
        super().__init__(device, workload.network, workload.name, direction, data_format, dtype)
        self.workload, own = workload, numpy_dtype(dtype)
        g = self.geometry = workload.geometry(data_format, own).lifted(data_format, own)
        self.facts = {"kind": workloads.kind(workload), "gflop": g.flops * 1e-9, "mbytes": g.bytes * 1e-6}

    @cached_property
    def operands(self) -> tuple[Any, Any, Any]:
        """Input, weight and gradient of the output."""
        shapes = (self.workload.x_shape, self.workload.weight_shape, self.workload.geometry().output_shape)
        return tuple(self.random(i, shape) for i, shape in enumerate(shapes))

    @cached_property
    def expected(self) -> Any:
        """What float64 makes of the first images, or of all of them for the gradient of the weight."""
        x, weight, grad = (tensor.double().contiguous() for tensor in self.operands)
        images = None if self.direction == "weight_grad" else IMAGES
        return self._torch_call(x[:images], weight, grad[:images])()

    def error(self, result: Any) -> float:
        """Return the error of what float64 was made of."""
        if not result.isfinite().all():
            return float("nan")
        gap = result[: len(self.expected)].double() - self.expected
        return float((gap.square().mean() / self.expected.square().mean()).sqrt())

    def limit(self, who: str) -> float:
        """Return the promise of an algorithm, or what rounding to a half type explains."""
        if self.dtype == "float32":
            return check.PROMISES[registry.named(who, "cuda")[0].precision]
        return max(LIMITS[self.dtype], tolerance(self.geometry.dtype, who, self.geometry.reduction_length).rms)

    def contenders(self) -> Iterator[tuple[str, Callable[[], Prepared]]]:
        """Yield PyTorch first."""
        yield "torch", partial(self._torch, False)
        if self.dtype == "float32":
            yield "torch tf32", partial(self._torch, True)
        for algorithm in self._able():
            yield algorithm.name, partial(self._fastconv, algorithm)

    def _able(self) -> list[Any]:
        return [a for a in registry.on("cuda") if a.supports(self.geometry, self.direction).ok]

    def _torch(self, tf32: bool) -> Prepared:
        set_cudnn(tf32)
        call = self._torch_call(*self.operands)
        # The first call looks for the best algorithm, in memory that later ones do without.
        call()
        return call, {"workspace": self.device.workspace(call)}

    def _torch_call(self, x: Any, weight: Any, grad: Any) -> Callable[[], Any]:
        return torch_convolution(self.workload.geometry(), self.direction, x, weight, grad)

    def _fastconv(self, algorithm: Any) -> Prepared:
        import torch

        x, weight, grad = self.operands
        # Ours is (K, C, R, S) in memory in either format.
        weight = weight.contiguous()
        out = torch.empty_like({"forward": grad, "input_grad": x, "weight_grad": weight}[self.direction])
        buffers, steps = self._plan(algorithm)
        tensors = {"x": x, "weight": weight, "grad_output": grad, "out": out}
        predicted = 1e6 * algorithm.seconds(self.geometry, self.direction, self.device.architecture)
        facts = {"workspace": registry.workspace_bytes(buffers), "predicted_us": round(predicted, 2)}
        if self.dtype == "float32":
            facts["precision"] = algorithm.precision
        return self.launched(steps, buffers, tensors), facts

    def _plan(self, algorithm: Any) -> tuple[dict[str, Any], list[Any]]:
        """Return the workspace and the launches of an algorithm, which are told how much that is."""
        buffers = algorithm.workspace(self.geometry, self.direction, LIMIT)
        how = (self.direction, None, False, self.device.architecture, registry.workspace_bytes(buffers))
        return buffers, algorithm.implementation.steps(self.geometry, *how)

    def steps(self) -> list[Any]:
        """Return those of every algorithm."""
        return [step for algorithm in self._able() for step in self._plan(algorithm)[1]]


class PoolUnit(Unit):
    """A maximum with its indices or an average, or the gradient of one: PyTorch, and ours, which gets its indices."""

    def __init__(self, device: Any, one: Pool, operation: str, direction: str, data_format: str, dtype: str) -> None:
        N, C, H, W = one.x_shape
        window = (one.kernel, one.stride, one.padding)
        super().__init__(
            device, operation, f"{N}x{C}x{H}x{W} {one.kernel}x{one.kernel}/{one.stride}", direction, data_format, dtype
        )
        self.shape, self.operation, self.is_max = one.x_shape, operation, operation == "max_pool"
        self.window = [[n, n] for n in window]
        shape = (N, H, W, C) if data_format == "channels_last" else one.x_shape
        self.geometry = g = fastconv.PoolGeometry.create(
            shape, *window, spatial_dims=2, data_format=data_format, average=not self.is_max
        )
        item, index = numpy_dtype(dtype).itemsize, 8 * self.is_max
        written = np.prod(g.output_shape, dtype=float)
        self.facts = {"kind": "pool", "mbytes": (np.prod(shape, dtype=float) * item + written * (item + index)) * 1e-6}

    @cached_property
    def x(self) -> Any:
        """The input."""
        return self.random(0, self.shape)

    @cached_property
    def forward(self) -> Any:
        """What PyTorch makes of it: (values, indices), or (values,)."""
        import torch

        aten = torch.ops.aten
        make = aten.max_pool2d_with_indices if self.is_max else lambda *a: (aten.avg_pool2d(*a),)
        return torch.inference_mode()(make)(self.x, *self.window)

    @cached_property
    def expected(self) -> Any:
        """PyTorch's result."""
        return self._torch()[0]()

    def error(self, result: Any) -> float:
        """Return the distance from PyTorch."""
        expected = self.expected.double()
        return float(((result.double() - expected).square().mean() / expected.square().mean()).sqrt())

    def contenders(self) -> Iterator[tuple[str, Callable[[], Prepared]]]:
        """Yield both."""
        yield "torch", self._torch
        yield self.operation, self._fastconv

    def _torch(self) -> Prepared:
        import torch

        aten = torch.ops.aten
        if self.direction == "forward":
            make = (lambda *a: aten.max_pool2d_with_indices(*a)[0]) if self.is_max else aten.avg_pool2d
            call = partial(make, self.x, *self.window)
        elif self.is_max:
            values, indices = self.forward
            backward = aten.max_pool2d_with_indices_backward
            call = partial(backward, values, self.x, *self.window, [1, 1], False, indices)
        else:
            call = partial(aten.avg_pool2d_backward, self.forward[0], self.x, *self.window, False, True, None)
        return torch.inference_mode()(call), {}

    def _fastconv(self) -> Prepared:
        import torch

        values, *indices = self.forward
        out = torch.empty_like(values if self.direction == "forward" else self.x)
        tensors = {"x": self.x, "grad_output": values, "out": out}
        # The gradient reads PyTorch's, of the same windows and format; the maximum overwrites a copy.
        tensors |= dict(zip(["indices"], [i.clone() for i in indices]))
        return self.launched(self.steps(), {}, tensors), {}

    def steps(self) -> list[Any]:
        """Return those of the one way there is."""
        make = getattr(pool, self.operation + ("_grad" if self.direction == "input_grad" else ""))
        return make(self.geometry, numpy_dtype(self.dtype))


# --- beforehand ------------------------------------------------------------------------------------------------


class Nowhere:
    """No GPU, but one to build for."""

    name, architecture = "nowhere", hardware.ARCHITECTURE


def prebuild() -> None:
    """Compile what the first look and the benchmark launch, on all cores."""
    programs = (
        (kernels.add_vectors, kernels.ADD_VECTORS), (kernels.stencil(64, 5), kernels.STENCIL),
        (kernels.gemm(3), kernels.GEMM),
    )  # fmt: skip
    for kernel, signature in programs:
        compile.compile_kernel(kernel, signature, hardware.ARCHITECTURE)
    ways = itertools.product(PUBLIC.values(), DIRECTIONS, DATA_FORMATS, LIMITS)
    looked_at = (ConvUnit(Nowhere(), *how) for how in ways)
    with ProcessPoolExecutor(info.cores_available()) as executor:
        list(executor.map(_build, itertools.chain(looked_at, units(Nowhere()))))


def _build(unit: Unit) -> None:
    guarded(unit.key, lambda: {"kernels": _compiled(unit.steps())})


def _compiled(steps: list[Any]) -> int:
    """Compile the kernels of steps, each once; return how many there are."""
    kernels = {(s.kernel, s.signature, s.launch_bounds) for s in steps if isinstance(s, Step)}
    for kernel, signature, launch_bounds in kernels:
        compile.compile_kernel(kernel, signature, hardware.ARCHITECTURE, launch_bounds)
    return len(kernels)


if __name__ == "__main__":
    prebuild() if "--prebuild" in sys.argv else bench(Cuda(), "--first" in sys.argv)
