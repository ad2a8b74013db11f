"""Lists of steps in the emulator, and their machine code: what tests of memory-bound kernels share."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastconv.cuda.compile import CompiledKernel, compile_kernel
from fastconv.cuda.emulator import emulate


def run_steps(steps: Any, arrays: dict[str, Any], seed: int | None = None) -> list[Any]:
    """Run steps on arrays, which are written in place; one that is not given is empty. Return what each step did."""
    given = {name: stored(array) for name, array in arrays.items()}
    reports = []
    for step in steps:
        names = [a for a in step.arguments if isinstance(a, str)]
        numbers = step.arguments[len(names) :]
        assert all(isinstance(n, np.generic) for n in numbers)
        assert len(step.arguments) == len(step.signature)
        operands = [given.get(name, np.empty(0, np.float32)) for name in names]
        reports.append(
            emulate(step.kernel, step.grid, step.block, *operands, *numbers, shared_bytes=step.shared_bytes, seed=seed)
        )
    return reports


def stored(array: np.ndarray) -> np.ndarray:
    """Return an array as kernels have it: bfloat16 as its bits."""
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


def poisoned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array of NaN, or of numbers that are no index."""
    out = np.empty(shape, dtype)
    out.reshape(-1).view(np.uint8)[...] = 0xFF
    if out.dtype.kind in "iu":
        out[...] = -12345
    return out


def compiled(step: Any, architecture: str) -> CompiledKernel:
    return compile_kernel(step.kernel, step.signature, architecture)


def global_bytes(reports: Any) -> set[int]:
    """Return the sizes of accesses to global memory."""
    return {a.nbytes for report in reports for a in report.accesses if a.memory == "global"}
