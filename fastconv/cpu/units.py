"""What multiplies tiles of bfloat16 on this machine: AMX, AVX512-BF16, an imitation of AMX for tests, or nothing.

AMX's tile registers are 8 KiB of state that Linux hands out on request, once per process (`arch_prctl`). Tiles are used
only after they have multiplied two small matrices as NumPy does.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import lru_cache
from typing import Any

import numpy as np

from .. import config
from .compile import task
from .memory import address
from .simd import cpu_features, instruction_set, integers
from .simd_bfloat16 import (
    AMX,
    COLUMNS,
    DEPTH,
    EMULATED,
    PLANES,
    VECTORS,
    configure_tiles,
    interleave,
    multiply_planes,
    release_tiles,
    split,
    tile_configuration,
)
from .tiles import TILE_ROWS

NAMES = {AMX: "AMX", VECTORS: "AVX512-BF16", EMULATED: "emulated AMX"}
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


@lru_cache(maxsize=1)
def why_no_amx() -> str:
    """Return why AMX cannot be used, or nothing if it can: asks the kernel for permission, and tries the tiles."""
    missing = [name for name in ("amx-tile", "amx-bf16") if name not in cpu_features()]
    if missing:
        return f"this CPU (or its virtual machine, or NUMBA_CPU_FEATURES) has no {' and '.join(missing)}"
    return _why_no_permission() or _why_wrong(AMX)


def _why_no_permission() -> str:
    if not sys.platform.startswith("linux"):
        return f"permission to use AMX is not implemented on {sys.platform}"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA):
        return f"the kernel refuses AMX's tile registers: {os.strerror(ctypes.get_errno())}"
    return ""


def _why_wrong(unit: int) -> str:
    """Return what tiles compute differently from NumPy, or nothing: whole numbers exactly, fractions to 1e-6."""
    random = np.random.default_rng(0)
    # Tiles that are full, and those that the configuration makes shorter.
    for held in (TILE_ROWS, 11):
        shapes = (2 * held, 2 * DEPTH), (2 * DEPTH, COLUMNS)
        for kind, allowed in (("whole numbers", 0.0), ("fractions", 1e-6)):
            if allowed:
                a, b = (random.standard_normal(shape).astype(np.float32) for shape in shapes)
            else:
                a, b = (random.integers(-999, 1000, shape).astype(np.float32) for shape in shapes)
            expected = a.astype(np.float64) @ b
            error = np.abs(_multiply(unit, a, b, held) - expected).max()
            # Also if it is not a number.
            if not error <= allowed * np.abs(expected).max():
                return f"tiles of {held} rows multiply {kind} wrongly on this machine (largest error {error:.3g})"
    return ""


def _multiply(unit: int, a: np.ndarray, b: np.ndarray, held: int) -> np.ndarray:
    """Return a @ b from two tiles of `held` rows, in six products of planes."""
    planes = np.zeros((2 * held, 2, PLANES[6], DEPTH), np.uint16)
    panels = np.zeros((2, PLANES[6], 2, TILE_ROWS, DEPTH), np.uint16)
    offsets = np.array([0, planes[0, 0].nbytes], np.int64)
    out = np.full((2 * held, COLUMNS), np.nan, np.float32)
    configuration = np.frombuffer(tile_configuration(held), np.uint8)
    places = (address(array) for array in (a, planes, b, panels, offsets, out, configuration))
    _check_task(unit)(1, *places, held)
    return out


@lru_cache(maxsize=2)
def _check_task(unit: int) -> Any:
    UNIT, NP, ROWS = unit, PLANES[6], TILE_ROWS
    BLOCK, PANEL = 2 * DEPTH * NP, 2048 * NP

    @task
    def multiply(arguments, chunk):
        _, a, planes, b, panels, offsets, out, configuration, held = integers(arguments, 0, 9)
        for row in range(2 * held):
            split(NP, a + row * 8 * DEPTH, 2 * DEPTH, planes + row * 2 * BLOCK, 2 * DEPTH, BLOCK)
        for step in range(2):
            interleave(NP, b + step * DEPTH * COLUMNS * 4, panels + step * PANEL)
        configure_tiles(UNIT, configuration)
        multiply_planes(
            UNIT, 6, ROWS, planes, planes + held * 2 * BLOCK, 2 * BLOCK, 2 * DEPTH, offsets, 2, panels,
            out, out + held * COLUMNS * 4, COLUMNS * 4, held, 0, 0, 0,
        )  # fmt: skip
        release_tiles(UNIT)

    return multiply


def unit(products: int) -> tuple[int | None, str]:
    """Return what multiplies bfloat16 tiles by so many products of planes, or None and why nothing does."""
    option = config.get("amx")
    if option == "emulated":
        return EMULATED, ""
    reason = "the option amx is off" if option == "off" else why_no_amx()
    if not reason:
        return AMX, ""
    if products > 1:
        return None, reason
    if instruction_set() == "avx512" and "avx512bf16" in cpu_features():
        return VECTORS, ""
    return None, f"{reason}, and there is no AVX512-BF16 either"
