"""Memory for the emulator, and the machine code of steps: what tests of memory-bound kernels share."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastconv.cuda.compile import CompiledKernel, compile_kernel


def poisoned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array of NaN, which may be bits of unsigned numbers, or of numbers that are no index."""
    out = np.empty(shape, dtype)
    out.reshape(-1).view(np.uint8)[...] = 0xFF
    if out.dtype.kind == "i":
        out[...] = np.int64(-12345).astype(dtype)
    return out


def compiled(step: Any, architecture: str) -> CompiledKernel:
    return compile_kernel(step.kernel, step.signature, architecture, step.launch_bounds)


def without_exits(faults: list[str], architecture: str) -> list[str]:
    """Leave out the ways out of loops for sm_8x: jumps that ptxas writes as calls."""
    return [fault for fault in faults if not (fault.endswith(" CALL") and architecture.startswith("sm_8"))]


def global_bytes(reports: Any) -> set[int]:
    """Return the sizes of accesses to global memory."""
    return {a.nbytes for report in reports for a in report.accesses if a.memory == "global"}
