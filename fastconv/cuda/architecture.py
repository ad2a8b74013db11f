"""What the GPU architectures have: instructions, shared memory, registers. One table for compiler, emulator and tests.

Source: CUDA C++ Programming Guide 13.0, tables of section 20.2 (technical specifications per compute capability).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from ..errors import ArgumentError, UnsupportedError

# The most blocks of a grid's second and third dimension, on all of them.
MOST_BLOCKS = 65535


class Architecture(NamedTuple):
    """One real architecture, such as "sm_90a".

    Attributes
    ----------
    capability : int
        Ten times the compute capability.
    shared_limit : int
        Bytes of shared memory that a block may use.
    shared_total, threads : int
        Bytes of shared memory and resident threads of a multiprocessor.
    """

    name: str
    capability: int
    shared_limit: int
    shared_total: int
    threads: int

    @classmethod
    def named(cls, name: str) -> Architecture:
        """Return the architecture of a name."""
        if name not in ARCHITECTURES:
            raise ArgumentError(f"architecture must be one of {', '.join(ARCHITECTURES)}, not {name!r}")
        return ARCHITECTURES[name]

    @property
    def virtual(self) -> str:
        """The name that libnvvm has for it."""
        return self.name.replace("sm_", "compute_")

    @property
    def compute_capability(self) -> tuple[int, int]:
        """Major and minor number."""
        return divmod(self.capability, 10)

    @property
    def copies_asynchronously(self) -> bool:
        """Whether global memory is copied to shared memory past the registers (cp.async)."""
        return self.capability >= 80

    def lacks(self, instructions: Iterable[Any]) -> str:
        """Return why it cannot run these instructions; empty if it can."""
        for made in instructions:
            if getattr(made, "since", 0) > self.capability:
                return f"{made.__name__} needs sm_{made.since} or later, not {self.name}"
            if getattr(made, "only", "") not in ("", self.name):
                return f"{made.__name__} exists on {made.only} alone, not on {self.name}"
        return ""

    def check(self, instructions: Iterable[Any]) -> None:
        """Refuse instructions that it lacks."""
        if reason := self.lacks(instructions):
            raise UnsupportedError(reason)

    def occupancy(self, threads: int, registers: int, shared: int) -> float:
        """Return the share of resident threads that blocks of `threads` reach, by registers and shared memory."""
        warps = -(-threads // 32)
        # Registers are given out to warps in units of 256, of which a multiprocessor has 65536.
        by_registers = 65536 // max(1, -(-registers * 32 // 256) * 256) // warps
        # From sm_80 on the system keeps 1 KB of each block.
        reserved = 1024 if self.capability >= 80 else 0
        by_shared = self.shared_total // max(1, shared + reserved)
        return min(by_registers, by_shared, self.threads // (32 * warps)) * warps * 32 / self.threads


_K = 1024
ARCHITECTURES = {
    name: Architecture(name, int(re.sub(r"\D", "", name)), *sizes)
    for name, sizes in {
        "sm_75": (64 * _K, 64 * _K, 1024),
        "sm_80": (163 * _K, 164 * _K, 2048),
        "sm_86": (99 * _K, 100 * _K, 1536),
        "sm_87": (163 * _K, 164 * _K, 1536),
        "sm_89": (99 * _K, 100 * _K, 1536),
        "sm_90": (227 * _K, 228 * _K, 2048),
        "sm_90a": (227 * _K, 228 * _K, 2048),
        "sm_100": (227 * _K, 228 * _K, 2048),
        "sm_100a": (227 * _K, 228 * _K, 2048),
        "sm_103": (227 * _K, 228 * _K, 2048),
        "sm_120": (99 * _K, 100 * _K, 1536),
        "sm_121": (99 * _K, 100 * _K, 1536),
    }.items()
}
# Those that budgets on machine code are kept for.
TESTED = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120")


def on_capability(capability: int) -> str | None:
    """Return the architecture to compile for on a GPU of ten times this compute capability; None if there is none."""
    return next((name for name in (f"sm_{capability}a", f"sm_{capability}") if name in ARCHITECTURES), None)
