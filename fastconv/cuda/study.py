"""What kernels take, from their machine code: the table that `explain` shows, with no GPU there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import MissingDependencyError, UnsupportedError
from .compile import compile_kernel, sass
from .steps import Call, Step

_TITLES = (
    "algorithm", "kernel", "launches", "blocks x threads", "registers", "resident", "shared", "instructions", "loop",
    "",
)  # fmt: skip
# Opcodes of a main loop to name.
_SHOWN = 4


def table(algorithms: Iterable[tuple[str, Sequence[Step | Call]]], architecture: str) -> list[str]:
    """Return the lines of a table of all kernels of some algorithms, in the order of their launches.

    Registers are a thread's, with the bytes that spill; "resident" is the share of a multiprocessor's threads that can
    be there at once; shared memory is a block's; the last column is what the main loop consists of.
    """
    rows: list[tuple[str, ...]] = [_TITLES]
    for name, steps in algorithms:
        # A kernel that runs for one slice after the other is shown once, for the largest.
        alike: dict[Any, list[Step | Call]] = {}
        for step in steps:
            key = (step.kernel, step.block) if isinstance(step, Step) else step.operation
            alike.setdefault(key, []).append(step)
        rows += [_row(name, same, architecture) for same in alike.values()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_TITLES) - 1)]
    lines = [
        "  ".join([*(f"{c:<{w}}" if i < 2 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths))), row[-1]])
        for row in rows
    ]
    return [f"kernels for {architecture}, compiled", *(line.rstrip() for line in lines)]


def _row(name: str, same: Sequence[Step | Call], architecture: str) -> tuple[str, ...]:
    times, largest = str(len(same)), max(same, key=lambda step: math.prod(getattr(step, "grid", ())))
    if not isinstance(largest, Step):
        return (name, largest.operation, times, *["-"] * (len(_TITLES) - 4), "by the library of the arrays")
    step, threads = largest, math.prod(largest.block)
    start = (name, step.kernel.__name__, times, f"{math.prod(step.grid)} x {threads}")
    try:
        made = compile_kernel(step.kernel, step.signature, architecture, step.launch_bounds)
    except UnsupportedError as error:
        return (*start, "-", "-", "-", "-", "-", str(error))
    spilled = made.stack + made.local
    registers = f"{made.registers}" + (f" + {spilled} B" if spilled else "")
    resident = f"{made.occupancy(threads, step.shared_bytes):.0%}"
    shared = f"{made.shared + step.shared_bytes} B"
    try:
        mix = sass(made)
    except MissingDependencyError as error:
        return (*start, registers, resident, shared, "-", "-", str(error))
    common = ", ".join(f"{count} {opcode}" for opcode, count in mix.opcodes(loop=True).most_common(_SHOWN))
    return (*start, registers, resident, shared, str(len(mix.instructions)), str(len(mix.main_loop)), common)
