"""The comparison: for each layer and direction check every provider, then time those that are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import fastconv
from fastconv.arrays import NumpyArrays
from fastconv.device_arrays import gpu_library
from fastconv.errors import FastconvError, UnsupportedError, WorkspaceLimitError
from fastconv.geometry import DIRECTIONS

from . import check, gpu_timing, providers, timing
from .check import Errors, Oracle, Problem
from .providers import Provider
from .report import Row, size
from .timing import Timing
from .workloads import Workload

# The most repeats on a GPU.
REPEATS = 100


@dataclass(frozen=True)
class Settings:
    """What to measure, and how.

    `budget` is in seconds for each row of the result; `algorithms` and `threads` may be None for all there are.
    `device` is "cpu", or "cuda" for the current GPU.
    """

    workloads: Sequence[Workload]
    directions: Sequence[str] = DIRECTIONS
    algorithms: Sequence[str] | None = None
    dtype: str = "float32"
    data_formats: Sequence[str] = ("channels_first",)
    precision: str = "highest"
    threads: int | None = None
    budget: float = 0.3
    with_torch: bool = True
    device: str = "cpu"

    def describe(self) -> dict[str, Any]:
        """Return the settings that the numbers depend on, for a file."""
        names = (
            "device", "directions", "algorithms", "dtype", "data_formats", "precision", "threads", "budget",
            "with_torch",
        )  # fmt: skip
        found = {name: getattr(self, name) for name in names}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


@dataclass
class _Attempt:
    """What came of running a provider once, and later of timing it."""

    provider: Provider
    call: Callable[[], Any] | None = None
    errors: Errors | None = None
    status: str = "ok"
    note: str = ""
    timing: Timing | None = field(default=None)
    host_seconds: float | None = None


def run_layer(settings: Settings, problem: Problem, direction: str) -> list[Row]:
    """Measure one layer in one direction; return a row for each provider."""
    with ExitStack() as stack:
        # What is measured does not depend on the option; what auto takes is what it would take without.
        stack.enter_context(fastconv.options(algorithm="auto"))
        if settings.threads is not None:
            stack.enter_context(fastconv.options(threads=settings.threads))
            if settings.with_torch and providers.torch_problem() is None:
                stack.enter_context(providers.torch_threads(settings.threads))
        library = NumpyArrays if settings.device == "cpu" else gpu_library()
        oracle = Oracle(problem, direction)
        attempts = [
            _attempt(provider, problem, direction, oracle, settings.precision)
            for provider in providers.providers(
                problem, direction, settings.data_formats, settings.precision, settings.algorithms,
                settings.with_torch, library,
            )
        ]  # fmt: skip
        calls = {i: a.call for i, a in enumerate(attempts) if a.status == "ok" and a.call is not None}
        if library is NumpyArrays:
            for i, found in timing.measure(calls, settings.budget).items():
                attempts[i].timing = found
        else:
            gpu = gpu_timing.CurrentGpu(library)
            for i, call in calls.items():
                attempts[i].timing, attempts[i].host_seconds = gpu_timing.measure(call, gpu, settings.budget, REPEATS)
    reference = min(
        (a.timing.median for a in attempts if a.timing is not None and a.provider.is_peer),
        default=None,
    )
    return [_row(settings, problem, direction, attempt, reference) for attempt in attempts]


def _attempt(provider: Provider, problem: Problem, direction: str, oracle: Oracle, precision: str) -> _Attempt:
    attempt = _Attempt(provider)
    try:
        attempt.call = provider.prepare(problem, direction)
        result = provider.as_numpy(attempt.call(), direction)
        attempt.errors = oracle.errors(result)
    except Exception as error:
        attempt.call = None
        attempt.status, attempt.note = _refusal(error)
        return attempt
    limits = check.allowed(problem, direction, provider.name, precision, provider.is_peer)
    if not check.is_right(attempt.errors, limits):
        attempt.status = "wrong"
        why = f"allowed {limits.rms:.1e}"
        if attempt.errors.rms <= limits.rms:
            why = f"one element is off by {attempt.errors.largest:.1e} of the largest"
        attempt.note = f"WRONG (rms {attempt.errors.rms:.1e}, {why})"
    return attempt


def _refusal(error: Exception) -> tuple[str, str]:
    """Return the status and a short reason for what a provider raised."""
    if isinstance(error, WorkspaceLimitError) and error.needed:
        return "workspace", f"needs {size(error.needed)} of workspace, the limit is {size(error.limit)}"
    if isinstance(error, MemoryError):
        return "memory", f"out of memory: {error}" if str(error) else "out of memory"
    if isinstance(error, UnsupportedError):
        return "unsupported", str(error).rpartition(": ")[2]
    first = (str(error).splitlines() or [""])[0]
    kind = type(error).__name__
    return "unsupported" if isinstance(error, FastconvError) else "failed", f"{kind}: {first[:100]}"


def _row(settings: Settings, problem: Problem, direction: str, attempt: _Attempt, reference: float | None) -> Row:
    workload, g, found, provider = problem.workload, problem.geometry, attempt.timing, attempt.provider
    seconds = None if found is None else found.median
    return Row(
        network=workload.network,
        layer=workload.name,
        count=workload.count,
        direction=direction,
        provider=provider.name,
        data_format=provider.data_format,
        dtype=settings.dtype,
        precision=settings.precision,
        x_shape=_times(workload.x_shape),
        weight_shape=_times(workload.weight_shape),
        stride=_times(g.stride),
        padding=_times(f"{before}" if before == after else f"{before}+{after}" for before, after in g.padding),
        dilation=_times(g.dilation),
        groups=g.groups,
        gflop=g.flops * 1e-9,
        status=attempt.status,
        note=attempt.note,
        ms=None if found is None else found.median * 1e3,
        ms_q20=None if found is None else found.q20 * 1e3,
        ms_q80=None if found is None else found.q80 * 1e3,
        repeats=0 if found is None else found.repeats,
        gflops_per_s=None if seconds is None else g.flops * 1e-9 / seconds,
        workspace_bytes=provider.workspace_bytes,
        rms_error=None if attempt.errors is None else attempt.errors.rms,
        ratio=None if seconds is None or reference is None else reference / seconds,
        is_reference=provider.is_peer and seconds is not None and seconds == reference,
        is_auto=provider.is_auto,
        device=settings.device,
        host_us=None if attempt.host_seconds is None else attempt.host_seconds * 1e6,
    )


def _times(sizes: Any) -> str:
    return "x".join(map(str, sizes))
