"""What multiplies tiles of bfloat16 on this machine: AMX, AVX512-BF16, an imitation of AMX for tests, or nothing.

AMX's tile registers are 8 KiB of state that Linux hands out on request, once per process (`arch_prctl`).
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import lru_cache

from .. import config
from .simd import AMX, EMULATED, VECTORS, cpu_features, instruction_set

NAMES = {AMX: "AMX", VECTORS: "AVX512-BF16", EMULATED: "emulated AMX"}
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


@lru_cache(maxsize=1)
def why_no_amx() -> str:
    """Return why AMX cannot be used, or nothing if it can: this asks the kernel for permission."""
    missing = [name for name in ("amx-tile", "amx-bf16") if name not in cpu_features()]
    if missing:
        return f"this CPU (or its virtual machine, or NUMBA_CPU_FEATURES) has no {' and '.join(missing)}"
    if not sys.platform.startswith("linux"):
        return f"permission to use AMX is not implemented on {sys.platform}"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA):
        return f"the kernel refuses AMX's tile registers: {os.strerror(ctypes.get_errno())}"
    return ""


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
