"""Programs: the tasks of a call, recorded once and from then on started by one compiled function.

Between its tasks Python works out their numbers: sizes, strides and addresses. That takes tens of microseconds, and
several times as many where the layer before has emptied the caches. In calls of the same shapes only the addresses
differ. So a call is carried out, without its tasks, on arrays at three sets of places. Numbers that move with an array
are its address and an offset; the others stay. If a number does anything else, or Python would write to an array by
itself, there is no program, and calls are carried out by Python.

An algorithm takes part by `IN_TASKS = True`: all that it does to arrays it does in tasks.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numba
import numpy as np

from . import compile as compilation
from .compile import Step, kernel
from .memory import address
from .simd import call, integer, store_integer
from .workspace import ALIGNMENT, Layout, lend_addresses

# Of a step in a program: function, chunks, place of its numbers.
HEAD = 3
# Of a move: place of the number, operand, offset.
MOVE = 3

# Lines by which the first operand is moved; more than twice as many as there are operands.
FARTHER = 64

_lock = threading.Lock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    # Whoever held it has not come along.
    os.register_at_fork(after_in_child=_renew_lock)


class Program(NamedTuple):
    """A call's tasks.

    Attributes
    ----------
    numbers : int64
        The head of each step, then the numbers of each.
    steps : int
    moves : int64 (n, 3)
        Of each number that is the address of an operand: its place, which operand, and the offset.
    aligned : bool
        Whether the result must begin a cache line.
    held : what the other addresses among the numbers belong to
    """

    numbers: np.ndarray
    steps: int
    moves: np.ndarray
    aligned: bool
    held: Any

    def run(self, *operands: int) -> None:
        """Start the tasks on operands at these addresses."""
        numbers, places = self.numbers.copy(), np.array(operands, np.int64)
        _run(self.steps, address(numbers), address(self.moves), len(self.moves), address(places))


@kernel
def _run(steps: int, numbers: int, moves: int, count: int, operands: int) -> None:
    for move in range(count):
        place, operand = integer(moves, MOVE * move), integer(moves, MOVE * move + 1)
        store_integer(numbers, place, integer(operands, operand) + integer(moves, MOVE * move + 2))
    for step in range(steps):
        function, chunks = integer(numbers, HEAD * step), integer(numbers, HEAD * step + 1)
        arguments = numbers + 8 * integer(numbers, HEAD * step + 2)
        if chunks == 1:
            call(function, arguments, 0)
        else:
            for chunk in numba.prange(chunks):
                call(function, arguments, chunk)


class Recorded:
    """A function of (factor, factor, bias or None, result, workspace), by a program where there is one.

    Parameters
    ----------
    function : as above, of lifted contiguous arrays
    shapes : of a factor, of the other, of the bias, of the result
    dtype : of all
    layout : of the workspace
    """

    def __init__(
        self,
        function: Callable[..., None],
        shapes: Sequence[tuple[int, ...]],
        dtype: np.dtype,
        layout: Layout,
    ) -> None:
        self._function, self._shapes, self._dtype, self._layout = function, shapes, dtype, layout
        # With a bias, and without.
        self._programs: dict[bool, Program | None] = {}

    def program(self, has_bias: bool) -> Program | None:
        """Return the program, recorded if need be, or None if there is none."""
        if has_bias not in self._programs:
            # While somebody else records, be it whom this call has interrupted, there is none yet.
            if not _lock.acquire(blocking=False):
                return None
            try:
                self._programs[has_bias] = self._record(has_bias)
            finally:
                _lock.release()
        return self._programs[has_bias]

    def __call__(self, a: Any, b: Any, bias: Any, result: Any) -> bool:
        """Run the program, or return False if there is none for such arrays."""
        program = self.program(bias is not None)
        if program is None or (program.aligned and address(result) % ALIGNMENT):
            return False
        with lend_addresses(self._layout) as places:
            program.run(address(a), address(b), 0 if bias is None else address(bias), address(result), *places)
        return True

    def _record(self, has_bias: bool) -> Program | None:
        operands = [(shape, self._dtype) for shape in self._shapes]
        operands += [(shape, dtype) for _, shape, dtype, _ in self._layout.places]
        names = [name for name, *_ in self._layout.places]

        def carry_out(arrays: Sequence[np.ndarray]) -> None:
            a, b, bias, result = arrays[:4]
            self._function(a, b, bias if has_bias else None, result, dict(zip(names, arrays[4:])))

        return record(carry_out, operands, result=3, whole=4)


def record(
    function: Callable[[Sequence[np.ndarray]], None],
    operands: Sequence[tuple[tuple[int, ...], np.dtype]],
    result: int,
    whole: int,
) -> Program | None:
    """Return the program of a function, or None if it has none.

    Parameters
    ----------
    function : of a list of arrays, which works on them in tasks alone
    operands : (shape, dtype) of each
    result : int
        The operand that the function may want to begin a cache line.
    whole : int
        Operands from this one on, the workspace, always do.
    """
    sizes = [int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in operands]
    starts = np.cumsum([0, *(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)])
    # Distances of which no multiple, sum or difference is another.
    lines = [ALIGNMENT * (FARTHER + i) for i in range(len(sizes))]
    # Less than a line, by whole elements of any type.
    odd = [8 * (whole - i) if i < whole else line for i, line in enumerate(lines)]

    def carried_out(shifts: Sequence[int]) -> tuple[list[int], compilation.Recording]:
        base, arrays = -address(room) % ALIGNMENT, []
        for (shape, dtype), start, size, shift in zip(operands, starts, sizes, shifts):
            first = base + int(start) + shift
            array = room[first : first + size].view(dtype).reshape(shape)
            # What Python would write to it is not in a program.
            array.flags.writeable = False
            arrays.append(array)
        with compilation.recording() as found:
            found.run(function, arrays)
        return [address(array) for array in arrays], found

    try:
        # Never touched, so that it takes no memory but where the system counts what is asked for.
        room = np.empty(int(starts[-1]) + max(lines) + ALIGNMENT, np.uint8)
        at, first = carried_out([0] * len(sizes))
        moved, second = carried_out(lines)
        moves = _moves(first.steps, second.steps, at, moved)
        for aligned in (False, True):
            shifts = [line if aligned and i == result else s for i, (s, line) in enumerate(zip(odd, lines))]
            places, third = carried_out(shifts)
            if _follow(moves, first.steps, third.steps, at, places):
                return _program(first, moves, aligned)
    except (compilation.NotInTasksError, ValueError, MemoryError):
        # NumPy's word for a write to what is read-only is ValueError.
        pass
    return None


def _flat(steps: Sequence[Step]) -> np.ndarray:
    parts = [(step.function, step.chunks) for step in steps], [step.numbers for step in steps]
    return np.concatenate([np.ravel(parts[0]), *parts[1]]).astype(np.int64)


def _moves(first: Sequence[Step], second: Sequence[Step], at: Sequence[int], moved: Sequence[int]) -> Any:
    """Return (place among the steps' numbers, operand, offset) of the numbers that are addresses."""
    before, after = _flat(first), _flat(second)
    if before.shape != after.shape:
        raise compilation.NotInTasksError("the tasks depend on addresses")
    operands = {there - here: i for i, (here, there) in enumerate(zip(at, moved))}
    moves = []
    for place in np.flatnonzero(before != after):
        operand = operands.get(int(after[place] - before[place]))
        if operand is None:
            raise compilation.NotInTasksError("a number depends on addresses")
        moves.append((int(place), operand, int(before[place]) - at[operand]))
    return moves


def _follow(moves: Any, first: Sequence[Step], third: Sequence[Step], at: Sequence[int], places: Sequence[int]) -> bool:
    """Whether the moves say where the numbers are for operands elsewhere."""
    expected, found = _flat(first), _flat(third)
    for place, operand, offset in moves:
        expected[place] = places[operand] + offset
    return expected.shape == found.shape and bool((expected == found).all())


def _program(found: compilation.Recording, moves: Any, aligned: bool) -> Program:
    steps = found.steps
    heads, place = [], HEAD * len(steps)
    for step in steps:
        heads.append((step.function, step.chunks, place))
        place += len(step.numbers)
    numbers = np.concatenate([np.ravel(heads), *(step.numbers for step in steps)]).astype(np.int64)
    # Among the steps' numbers a step has function and chunks only.
    shifted = [(at + len(steps), operand, offset) for at, operand, offset in moves]
    constants = set(numbers.tolist())
    held = [array for array in found.addressed if address(array) in constants]
    return Program(numbers, len(steps), np.array(shifted, np.int64).reshape(-1, MOVE), aligned, (held, steps))
