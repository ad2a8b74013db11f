"""The emulator: runs the source of a kernel on the CPU, thread by thread, and refuses what a GPU would do silently.

One greenlet stands for each thread of a block, and blocks follow each other. Threads run until they meet at a barrier,
at an instruction of the whole warp, or end. Found and named: barriers and collectives that some threads do not reach,
accesses out of range or misaligned, reads of shared or local memory that was never written, data of asynchronous copies
read before it is waited for, two threads at one address with no barrier between, numbers that int32 cannot hold.

It also counts what the memory does, per source line: 32-byte sectors of each warp's access to global memory, and passes
over the 32 banks of shared memory.

Whole numbers are Python's, which is how compiled Numba has them: the sum of two int32 is an int64, and `int32(...)`
brings it back. Not modelled: unsigned differences that wrap before they are cast, products contracted into fused
multiply-adds, sums of tensor cores beyond float32 rounding, double precision that comes from untyped literals (the
budgets on machine code find that), the memory model of warps that do not meet, and time.
"""

from __future__ import annotations

import contextvars
import math
import sys
import types as python_types
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import MissingDependencyError, UnsupportedError
from . import functions, toolchain
from .access import ARRIVAL, ISSUE, MET, READ, SITE_BITS, WARP, WRITE, Ledger, Report, Site
from .architecture import Architecture
from .faults import (
    DeadlockError,
    DivergenceError,
    EmulationError,
    MisalignedError,
    OutOfRangeError,
    PrecisionError,
    UninitialisedError,
)

try:
    from greenlet import getcurrent, greenlet
except ImportError:
    raise MissingDependencyError("the emulator of CUDA kernels needs greenlet: pip install 'fastconv[test]'") from None

cuda = toolchain.import_cuda()

from numba.cuda import types  # noqa: E402
from numba.cuda.np import numpy_support  # noqa: E402

_FULL = (1 << WARP) - 1
# Shared memory lies below this address, arrays of global memory above it, so far apart that no overrun meets the next.
_GLOBAL_BASE, _GAP = 1 << 24, 1 << 16
_STATIC_LIMIT = 48 * 1024


def emulate(
    kernel: Callable[..., None],
    grid: int | tuple[int, ...],
    block: int | tuple[int, ...],
    *arguments: Any,
    shared_bytes: int = 0,
    architecture: str = "sm_90a",
    seed: int | None = None,
    signature: Sequence[Any] | None = None,
    launch_bounds: int | tuple[int, ...] | None = None,
) -> Report:
    """Run a kernel on the CPU and return what its memory accesses cost.

    Parameters
    ----------
    kernel : function
        What `compile_kernel` takes.
    grid, block : int or tuple of up to three
    *arguments
        Arrays stand for pointers to their first element, and are written in place; numbers for numbers.
    shared_bytes : int
        Dynamic shared memory of each block.
    architecture : str
        Instructions that it lacks are refused, and its limit on shared memory holds.
    seed : int, optional
        Run the warps, and the threads of each, in an order drawn anew at every turn.
    signature, launch_bounds : optional
        What the kernel would be compiled with: arguments and blocks that compiled code would misread are refused.

    Raises
    ------
    EmulationError
        One of its kinds, with kernel, block, thread and source line.
    UnsupportedError
        For an instruction that the architecture does not have.

    Examples
    --------
    >>> def double(x, y):
    ...     i = cuda.threadIdx.x
    ...     y[i] = x[i] + x[i]
    >>> y = np.zeros(32, np.float32)
    >>> report = emulate(double, 1, 32, np.ones(32, np.float32), y)
    >>> float(y.sum()), report.sectors
    (64.0, 8)
    """
    function: Any = getattr(kernel, "py_func", kernel)
    target = Architecture.named(architecture)
    target.check(functions.reached(function))
    if signature is not None:
        _check_types(function, signature, arguments)
    if launch_bounds is not None and math.prod(_triple(block)) > _triple(launch_bounds)[0]:
        raise EmulationError(f"{kernel.__name__} is compiled for {launch_bounds} threads, not for blocks of {block}")
    # Threads run in a copy of the context that the machine is made in, and NumPy's error state is part of it.
    with np.errstate(all="ignore"):
        machine = _Machine(function, _triple(grid), _triple(block), shared_bytes, target, seed)
        machine.run(arguments)
    return machine.report()


def _check_types(function: Any, signature: Sequence[Any], arguments: Sequence[Any]) -> None:
    """Refuse arrays and numbers that are not of the types that a kernel is compiled for; an absent array is empty."""
    for name, kind, value in zip(function.__code__.co_varnames, signature, arguments):
        is_array = isinstance(value, np.ndarray)
        stored = kind.dtype if is_array and isinstance(kind, types.CPointer) else kind
        given = getattr(value, "dtype", None)
        if given is not None and not (is_array and not value.size) and numpy_support.as_dtype(stored) != given:
            raise EmulationError(f"{function.__name__}: {name} is compiled as {kind} and given as {given}")


def _triple(sizes: int | Sequence[int]) -> tuple[int, int, int]:
    given = (sizes,) if isinstance(sizes, (int, np.integer)) else tuple(sizes)
    x, y, z = (*map(int, given), 1, 1)[:3]
    return x, y, z


# --- memory ----------------------------------------------------------------------------------------------------


class Pointer:
    """Typed memory of a kernel: indexing and vector accesses, checked and logged."""

    __slots__ = (
        "_bytes",
        "_data",
        "_is_integer",
        "_item",
        "_machine",
        "_shape",
        "base",
        "dtype",
        "name",
        "shared",
        "size",
    )

    def __init__(self, machine: _Machine, name: str, data: np.ndarray, base: int, shared: bool, shape: tuple[int, ...]):
        self._machine, self.name, self._data, self.base, self.shared, self._shape = (
            machine,
            name,
            data,
            base,
            shared,
            shape,
        )
        self.dtype, self.size, self._item = data.dtype, data.size, data.dtype.itemsize
        self._bytes = data.view(np.uint8)
        self._is_integer = data.dtype.kind in "iub"

    def flat(self) -> Pointer:
        """Return the same memory with one dimension."""
        return Pointer(self._machine, self.name, self._data, self.base, self.shared, (self.size,))

    def __getitem__(self, index: Any) -> Any:
        at = index if type(index) is int and len(self._shape) == 1 else self._flat_index(index)
        if not 0 <= at < self.size:
            self._check(at, 1)
        frame = sys._getframe(1)
        self._log(at, self._item, READ, frame)
        return self._data.item(at) if self._is_integer else self._data[at]

    def __setitem__(self, index: Any, value: Any) -> None:
        at = index if type(index) is int and len(self._shape) == 1 else self._flat_index(index)
        if not 0 <= at < self.size:
            self._check(at, 1)
        self._log(at, self._item, WRITE, sys._getframe(1))
        self._data[at] = value

    def read(self, at: int, count: int, lane: Lane) -> tuple[Any, ...]:
        """Return `count` elements as one access."""
        self._check(at, count, count)
        self._log(at, self._item * count, READ, lane.frame)
        part = self._data[at : at + count]
        return tuple(part.tolist() if self._is_integer else part)

    def write(self, at: int, values: Sequence[Any], lane: Lane) -> None:
        """Write elements as one access."""
        self._check(at, len(values), len(values))
        self._log(at, self._item * len(values), WRITE, lane.frame)
        self._data[at : at + len(values)] = values

    def read_bytes(self, at: int, nbytes: int, lane: Lane) -> bytes:
        """Return `nbytes` bytes from an element on as one access."""
        count = nbytes // self._item
        self._check(at, count, count)
        self._log(at, nbytes, READ, lane.frame)
        return self._bytes[at * self._item : at * self._item + nbytes].tobytes()

    def _flat_index(self, index: Any) -> int:
        indices = index if isinstance(index, tuple) else (index,)
        if len(indices) != len(self._shape):
            raise OutOfRangeError(f"{self.name} has {len(self._shape)} dimensions, not {len(indices)}")
        at = 0
        for i, extent in zip(indices, self._shape):
            if not isinstance(i, (int, np.integer)):
                raise EmulationError(f"{self.name} is indexed by {type(i).__name__} {i!r}, not by a whole number")
            if not 0 <= i < extent:
                raise OutOfRangeError(f"{self.name}[{', '.join(map(str, indices))}] is outside its shape {self._shape}")
            at = at * extent + int(i)
        return at

    def _check(self, at: int, count: int, aligned: int = 1) -> None:
        if not 0 <= at <= self.size - count:
            places = f"{at}" if count == 1 else f"{at}:{at + count}"
            raise OutOfRangeError(f"{self.name}[{places}] is outside its {self.size} elements")
        if (self.base + at * self._item) % (aligned * self._item):
            raise MisalignedError(f"{self.name}[{at}:{at + count}] is no multiple of {aligned * self._item} bytes")

    def _log(self, at: int, nbytes: int, kind: int, frame: Any) -> None:
        machine = self._machine
        key = (id(frame.f_code), frame.f_lasti, nbytes, kind, self.shared)
        site = machine.site_numbers.get(key)
        if site is None:
            site = machine.new_site(key, frame)
        machine.lane.log.append((self.base + at * self._item) << SITE_BITS | site)


class Local(dict):
    """An array of one thread: registers, if the compiler can."""

    def __init__(self, shape: Any, dtype: Any) -> None:
        super().__init__()
        self._shape = shape if isinstance(shape, tuple) else (int(shape),)
        self._extent = range(self._shape[0]) if len(self._shape) == 1 else frozenset(np.ndindex(*self._shape))
        self._convert = _conversion(dtype)
        # What asynchronous products will have made of registers, by the first of them.
        self.pending: dict[int, Any] = {}

    def __setitem__(self, index: Any, value: Any) -> None:
        if index not in self._extent:
            raise OutOfRangeError(f"local array [{index}] is outside its shape {self._shape}")
        super().__setitem__(index, self._convert(value))

    def __missing__(self, index: Any) -> Any:
        if index not in self._extent:
            raise OutOfRangeError(f"local array [{index}] is outside its shape {self._shape}")
        raise UninitialisedError(f"local array [{index}] is read and was never written")

    def read(self, at: int, count: int, lane: Lane) -> tuple[Any, ...]:
        """Return `count` elements."""
        return tuple([self[i] for i in range(at, at + count)])

    def write(self, at: int, values: Iterable[Any], lane: Lane) -> None:
        """Write elements from an index on."""
        for i, value in enumerate(values, at):
            self[i] = value

    def take(self, at: int, count: int) -> Any:
        """Return elements, or what becomes of them, and leave none: an asynchronous product is to write them."""
        if at in self.pending:
            return self.pending[at]
        taken = [self[i] for i in range(at, at + count)]
        for i in range(at, at + count):
            del self[i]
        return taken


# --- numbers ---------------------------------------------------------------------------------------------------


def _conversion(kind: Any) -> Callable[[Any], Any]:
    """Return what a Numba type does to a number."""
    dtype = numpy_support.as_dtype(kind) if isinstance(kind, types.Type) else np.dtype(kind)
    if dtype.kind == "b":
        return bool
    if dtype.kind == "f":
        wanted = dtype.type
        return lambda value: value if type(value) is wanted else wanted(value)
    limits = np.iinfo(dtype)
    low, high, bits = int(limits.min), int(limits.max), limits.bits
    if dtype.kind == "u":
        return lambda value: int(value) & high

    def signed(value: Any) -> int:
        if type(value) is not int:
            value = int(value)
        if not low <= value <= high:
            raise PrecisionError(
                f"int{bits}({value}) loses bits; use a wider type, or uint{bits} if it is meant to wrap"
            )
        return value

    return signed


class _Math:
    """The functions of `math`, in the precision of their argument."""

    pi, e, inf, nan = math.pi, math.e, math.inf, math.nan

    def __getattr__(self, name: str) -> Any:
        found = getattr(np, {"pow": "power", "fmod": "fmod"}.get(name, name), None)
        if found is None:
            raise UnsupportedError(f"math.{name} is not emulated")
        return found


# --- threads ---------------------------------------------------------------------------------------------------


class _Index(NamedTuple):
    x: int
    y: int
    z: int


class _Wait(NamedTuple):
    """What a thread waits for: a barrier of the block, or the other lanes of its warp."""

    operation: str
    frame: Any
    mask: int = 0
    payload: Any = None
    combine: Any = None
    aligned: bool = True

    @property
    def place(self) -> tuple[int, Any]:
        return id(self.frame[0]), _position(*self.frame)

    def __str__(self) -> str:
        code, lasti = self.frame
        return f"{self.operation} at {Path(code.co_filename).name}:{_line(code, lasti)}"


@lru_cache(maxsize=1 << 14)
def _position(code: Any, lasti: int) -> Any:
    """Return where in the source an instruction is: its offset changes when the interpreter specialises it."""
    if hasattr(code, "co_positions"):
        return next(islice(code.co_positions(), lasti // 2, None))
    return lasti


def _line(code: Any, lasti: int) -> int:
    lines = [line for start, end, line in code.co_lines() if start <= lasti < end and line is not None]
    return lines[0] if lines else code.co_firstlineno


def _here(frame: Any) -> tuple[Any, int]:
    return frame.f_code, frame.f_lasti


class Lane:
    """One thread of a block: what the emulations of instructions are given."""

    __slots__ = ("allocations", "frame", "groups", "index", "is_fenced", "log", "machine", "queue", "result", "thread",
                 "threadIdx", "wait", "warp", "worker")  # fmt: skip

    def __init__(self, machine: _Machine, thread: int, place: _Index) -> None:
        self.machine, self.thread, self.threadIdx = machine, thread, place
        self.warp, self.index = divmod(thread, WARP)
        self.log: list[int] = []
        self.queue: list[Any] = []
        self.groups: list[list[Any]] = []
        self.allocations = 0
        # Whether what its asynchronous copies have brought is there for instructions that read memory by another way.
        self.is_fenced = True
        self.frame: Any = None
        self.wait: _Wait | None = None
        self.result: Any = None
        self.worker: Any = None

    @property
    def ended(self) -> bool:
        """Whether the thread has returned."""
        return self.worker.dead

    def exchange(self, combine: Callable[[list[Any]], Sequence[Any]], payload: Any) -> Any:
        """Wait until all 32 lanes are at the same instruction; return this lane's part of `combine(payloads)`."""
        name = self.machine.current_instruction
        return self.machine.switch(_Wait(name, _here(self.frame), _FULL, payload, combine))

    def copy_async(self, target: Pointer, at: int, source: Pointer, start: int, size: int, valid: int) -> None:
        """Begin to copy: until it is waited for, the target reads as poison."""
        if not 0 <= valid <= size:
            raise EmulationError(f"cp.async of {size} bytes is told to read {valid}")
        count = size // target._item
        target._check(at, count, count)
        data = bytes(size)
        if valid:
            source._check(start, valid // source._item)
            source._check(start, 0, size // source._item)
            data = source._bytes[start * source._item :][:valid].tobytes() + data[valid:]
            source._log(start, size, READ, self.frame)
        first = at * target._item
        target._bytes[first : first + size] = 0xFF
        self.machine.valid[target.base + first : target.base + first + size] = False
        target._log(at, size, ISSUE, self.frame)
        self.queue.append((target, at, np.frombuffer(data, np.uint8)))

    def copy_commit(self) -> None:
        """Close a group of copies."""
        self.groups.append(self.queue)
        self.queue = []

    def copy_wait(self, newest: int) -> None:
        """Let all groups arrive but the newest ones."""
        while len(self.groups) > newest:
            self.is_fenced = self.is_fenced and not self.groups[0]
            for target, at, data in self.groups.pop(0):
                first = at * target._item
                target._bytes[first : first + data.size] = data
                self.machine.valid[target.base + first : target.base + first + data.size] = True
                target._log(at, data.size, ARRIVAL, self.frame)


class _Machine:
    """One launch: its memory, its threads and what they log."""

    def __init__(self, function: Any, grid: Any, block: Any, shared_bytes: int, target: Architecture, seed: int | None):
        self.grid, self.block, self.dynamic_bytes, self.target = _Index(*grid), _Index(*block), shared_bytes, target
        self.threads = math.prod(block)
        if not 0 < self.threads <= 1024:
            raise EmulationError(f"a block has 1 to 1024 threads, not {self.threads}")
        self.random = None if seed is None else np.random.default_rng(seed)
        self.name = function.__qualname__
        self.lane: Any = None
        self.current_instruction = ""
        self.sites: list[Site] = []
        self.site_numbers: dict[tuple[Any, ...], int] = {}
        self._known_sites: dict[tuple[Any, ...], int] = {}
        self.used, self.static_bytes = 0, 0
        self.dynamic_place: int | None = None
        self._copies: dict[int, Any] = {}
        self._fake = _Cuda(self)
        self.ledger = Ledger(self)
        self.function = self.emulated(function)
        # NumPy's error state is a context variable, and a greenlet begins with an empty context.
        self.context = contextvars.copy_context()

    # what the kernel sees

    def emulated(self, value: Any) -> Any:
        """Return what stands for a value that a kernel refers to."""
        if value is cuda:
            return self._fake
        if value is math:
            return _Math()
        if isinstance(value, types.Type):
            return self._remembered(value, lambda: _Type(value))
        if functions.is_intrinsic(value):
            return self._remembered(value, lambda: self._instruction(value))
        if isinstance(value, python_types.FunctionType) and not value.__module__.startswith("numba"):
            return self._remembered(value, lambda: functions.rebuilt(value, self.emulated))
        if isinstance(value, python_types.ModuleType) and not value.__name__.startswith("numba"):
            return self._remembered(value, lambda: _Module(value, self.emulated))
        return value

    def _remembered(self, value: Any, make: Callable[[], Any]) -> Any:
        if id(value) not in self._copies:
            self._copies[id(value)] = make()
        return self._copies[id(value)]

    def _instruction(self, made: Any) -> Callable[..., Any]:
        emulation, name = made.emulation, made.__name__

        def call(*arguments: Any) -> Any:
            lane = self.lane
            lane.frame = sys._getframe(1)
            self.current_instruction = name
            return emulation(lane, *arguments)

        return call

    def new_site(self, key: tuple[Any, ...], frame: Any) -> int:
        """Number an instruction that accesses memory."""
        site = (frame.f_code, _position(frame.f_code, frame.f_lasti), *key[2:])
        if site not in self._known_sites:
            self._known_sites[site] = len(self.sites)
            self.sites.append(Site(frame.f_code, frame.f_lineno, *key[2:]))
        self.site_numbers[key] = self._known_sites[site]
        return self._known_sites[site]

    def allocate(self, shape: Any, dtype: Any, alignment: int | None) -> Pointer:
        """Return the shared array that is the next one of this thread's."""
        dtype = numpy_support.as_dtype(dtype) if isinstance(dtype, types.Type) else np.dtype(dtype)
        sizes = shape if isinstance(shape, tuple) else (int(shape),)
        number, self.lane.allocations = self.lane.allocations, self.lane.allocations + 1
        nbytes = math.prod(sizes) * dtype.itemsize
        wanted = (sizes, dtype, alignment)
        if number == len(self.shared_arrays):
            self.shared_arrays.append((wanted, self._shared_place(nbytes, alignment or dtype.itemsize)))
        known, place = self.shared_arrays[number]
        if known != wanted:
            raise DivergenceError("threads declare different shared arrays")
        size = nbytes or self.dynamic_bytes
        data = self.memory[place : place + size // dtype.itemsize * dtype.itemsize].view(dtype)
        return Pointer(self, f"shared array {number}", data, place, True, sizes if nbytes else (data.size,))

    def _shared_place(self, nbytes: int, alignment: int) -> int:
        """Place an array at a multiple of its alignment and of no larger power of two: more was not asked for."""
        if not nbytes:
            if self.dynamic_place is None:
                self.dynamic_place = _STATIC_LIMIT * 2 + alignment
            return self.dynamic_place
        place = -(-self.used // (2 * alignment)) * 2 * alignment + alignment
        self.used = place + nbytes
        self.static_bytes = -(-self.static_bytes // alignment) * alignment + nbytes
        if self.static_bytes > _STATIC_LIMIT:
            raise EmulationError(f"static shared memory of {self.static_bytes} bytes; there are {_STATIC_LIMIT}")
        if self.static_bytes + self.dynamic_bytes > self.target.shared_limit:
            total = self.static_bytes + self.dynamic_bytes
            raise EmulationError(f"{total} bytes of shared memory; {self.target.name} has {self.target.shared_limit}")
        return place

    # running

    def run(self, arguments: Sequence[Any]) -> None:
        """Run all blocks."""
        if self.dynamic_bytes > self.target.shared_limit:
            raise EmulationError(
                f"{self.dynamic_bytes} bytes of shared memory; {self.target.name} has {self.target.shared_limit}"
            )
        names = self.function.__code__.co_varnames
        self._next_base = _GLOBAL_BASE
        given = [self._argument(name, value) for name, value in zip(names, arguments)]
        if len(arguments) != self.function.__code__.co_argcount:
            raise EmulationError(
                f"{self.name} takes {self.function.__code__.co_argcount} arguments, not {len(arguments)}"
            )
        for z in range(self.grid.z):
            for y in range(self.grid.y):
                for x in range(self.grid.x):
                    self._run_block(_Index(x, y, z), given)
        self.ledger.finish()

    def _argument(self, name: str, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            if not value.flags.c_contiguous:
                raise EmulationError(f"{name} must be C-contiguous: kernels get the address of its first element")
            base, self._next_base = self._next_base, self._next_base + value.nbytes + 2 * _GAP
            self._next_base -= self._next_base % _GAP
            # A view keeps its place within the array it is cut from, as its address does on a GPU.
            if isinstance(value.base, np.ndarray):
                base += (value.ctypes.data - value.base.ctypes.data) % 256
            data = value.reshape(-1)
            return Pointer(self, name, data, base, False, (data.size,))
        if isinstance(value, (bool, np.bool_)):
            return bool(value)
        if isinstance(value, (int, np.integer)):
            return int(value)
        return np.float32(value) if type(value) is float else value

    def _run_block(self, place: _Index, arguments: list[Any]) -> None:
        self.blockIdx, self.used, self.static_bytes, self.dynamic_place = place, 0, 0, None
        self.is_fenced = True
        self.shared_arrays: list[Any] = []
        self.memory = np.full(2 * _STATIC_LIMIT + 1024 + self.dynamic_bytes, 0xFF, np.uint8)
        # Bytes that hold data now, and those that did at the last barrier.
        self.valid = np.zeros(self.memory.size, bool)
        self.valid_before = self.valid.copy()
        self.hub = getcurrent()
        x, y = self.block.x, self.block.y
        lanes = [Lane(self, t, _Index(t % x, t // x % y, t // (x * y))) for t in range(self.threads)]
        for lane in lanes:
            lane.worker = greenlet(self.function, self.hub)
            lane.worker.gr_context = self.context
        self.lanes = lanes
        warps = [lanes[first : first + WARP] for first in range(0, self.threads, WARP)]
        try:
            for lane in self._shuffled(lanes):
                self._resume(lane, *arguments)
            while True:
                for warp in self._shuffled(warps):
                    while self._meet(warp):
                        pass
                self.ledger.settle(lanes)
                if not self._pass_barrier(lanes):
                    break
        finally:
            for lane in lanes:
                if lane.worker:
                    lane.worker.throw()

    def _shuffled(self, items: list[Any]) -> list[Any]:
        return items if self.random is None else [items[i] for i in self.random.permutation(len(items))]

    def switch(self, wait: _Wait) -> Any:
        """Let the current thread wait; return what it is woken with."""
        return self.hub.switch(wait)

    def _resume(self, lane: Lane, *values: Any) -> None:
        self.lane = lane
        try:
            lane.wait = lane.worker.switch(*values)
        except Exception as error:
            raise self._located(error, lane) from (error.__cause__ if isinstance(error, EmulationError) else error)

    def _meet(self, warp: list[Lane]) -> bool:
        """Carry out one instruction of a warp whose lanes are all there; return False if none waits for one."""
        waiting = [lane for lane in warp if lane.wait is not None and lane.wait.mask]
        if not waiting:
            return False
        for first in waiting:
            wait = first.wait
            assert wait is not None
            members = [
                lane for lane in waiting
                if lane.wait.operation == wait.operation and lane.wait.mask == wait.mask  # type: ignore[union-attr]
                and (not wait.aligned or lane.wait.place == wait.place)  # type: ignore[union-attr]
            ]  # fmt: skip
            asked = WARP if wait.aligned else sum(wait.mask >> lane.index & 1 for lane in warp)
            if len(members) == asked and all(wait.mask >> lane.index & 1 for lane in members):
                self._carry_out(wait, members)
                return True
        raise self._stuck(warp, waiting[0])

    def _carry_out(self, wait: _Wait, members: list[Lane]) -> None:
        try:
            results = wait.combine([lane.wait.payload for lane in members])  # type: ignore[union-attr]
        except EmulationError as error:
            raise type(error)(f"{self.place_of(members[0])}: {wait}: {error}") from None
        if wait.operation == "syncwarp" and len(members) == min(WARP, self.threads - members[0].thread):
            for lane in members:
                lane.log.append(MET)
        for lane, result in self._shuffled(list(zip(members, results))):
            lane.wait = None
            self._resume(lane, result)

    def _stuck(self, warp: list[Lane], lane: Lane) -> EmulationError:
        others = {str(l.wait) if l.wait else "has ended" for l in warp}
        others.discard(str(lane.wait))
        if len(warp) < WARP and lane.wait.aligned:  # type: ignore[union-attr]
            others.add(f"the warp has {len(warp)} threads")
        elif not others:
            others.add("their masks differ, or name lanes that are not there")
        kind = DeadlockError if others == {"has ended"} else DivergenceError
        return kind(f"{self.place_of(lane)}: {lane.wait} is not reached by all its lanes: {'; '.join(sorted(others))}")

    def _pass_barrier(self, lanes: list[Lane]) -> bool:
        """Let all threads pass a barrier of the block; return False if they have ended."""
        waiting = [lane for lane in lanes if lane.wait is not None]
        if not waiting:
            return False
        wait = waiting[0].wait
        assert wait is not None
        if len(waiting) < len(lanes):
            ended = next(lane for lane in lanes if lane.wait is None)
            raise DeadlockError(
                f"{self.place_of(waiting[0])}: {wait} waits for {len(lanes) - len(waiting)} threads that have ended, "
                f"such as thread {tuple(ended.threadIdx)}"
            )
        for lane in waiting:
            if lane.wait.place != wait.place:  # type: ignore[union-attr]
                raise DivergenceError(
                    f"{self.place_of(waiting[0])}: waits in {wait}, thread {tuple(lane.threadIdx)} in {lane.wait}"
                )
        self.is_fenced = all(lane.is_fenced for lane in lanes)
        for lane in self._shuffled(lanes):
            lane.wait = None
            self._resume(lane, None)
        return True

    # words

    def place_of(self, lane: Lane, code: Any = None, line: int = 0) -> str:
        where = f", {Path(code.co_filename).name}:{line}" if code else ""
        return f"{self.name}, block {tuple(self.blockIdx)}, thread {tuple(lane.threadIdx)}{where}"

    def _located(self, error: Exception, lane: Lane) -> Exception:
        """Return the error with kernel, block, thread and the line of the kernel, or of its helper, in front."""
        place = error.__traceback__
        code, line = None, 0
        while place is not None:
            if Path(place.tb_frame.f_code.co_filename) not in _OWN_FILES:
                code, line = place.tb_frame.f_code, place.tb_lineno
            place = place.tb_next
        kind = type(error) if isinstance(error, EmulationError) else EmulationError
        text = str(error) if isinstance(error, EmulationError) else f"{type(error).__name__}: {error}"
        return kind(f"{self.place_of(lane, code, line)}: {text}")

    def report(self) -> Report:
        """Return what the launch did to memory."""
        shared = self.static_bytes + self.dynamic_bytes
        return Report(self.name, math.prod(self.grid), self.threads, shared, self.ledger.accesses())


_OWN_FILES = {Path(__file__), Path(__file__).with_name("ptx.py")}


class _Type:
    """A Numba type as a kernel uses it: called to convert, and named as the type of an array."""

    def __init__(self, kind: Any) -> None:
        self.kind, self._convert = kind, _conversion(kind) if isinstance(kind, types.Number | types.Boolean) else None

    def __call__(self, value: Any) -> Any:
        return self._convert(value)  # type: ignore[misc]


class _Module:
    """A module as a kernel uses it: its members emulated."""

    def __init__(self, module: Any, emulated: Callable[[Any], Any]) -> None:
        self._module, self._emulated = module, emulated

    def __getattr__(self, name: str) -> Any:
        value = self._emulated(getattr(self._module, name))
        setattr(self, name, value)
        return value


class _Arrays:
    """`cuda.shared` or `cuda.local`."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def array(self, shape: Any, dtype: Any, alignment: int | None = None) -> Any:
        """Return an array, poisoned."""
        return self._make(shape, dtype.kind if isinstance(dtype, _Type) else dtype, alignment)


class _Cuda:
    """The part of `numba.cuda` that kernels may use."""

    warpsize = WARP

    def __init__(self, machine: _Machine) -> None:
        self._machine = machine
        self.shared = _Arrays(machine.allocate)
        self.local = _Arrays(lambda shape, dtype, alignment: Local(shape, dtype))

    def __getattr__(self, name: str) -> Any:
        raise UnsupportedError(f"cuda.{name} is not emulated")

    @property
    def threadIdx(self) -> _Index:
        """The thread's place in its block."""
        return self._machine.lane.threadIdx

    @property
    def blockIdx(self) -> _Index:
        """The block's place in the grid."""
        return self._machine.blockIdx

    @property
    def blockDim(self) -> _Index:
        """The sizes of a block."""
        return self._machine.block

    @property
    def gridDim(self) -> _Index:
        """The sizes of the grid."""
        return self._machine.grid

    @property
    def laneid(self) -> int:
        """The thread's place in its warp."""
        return self._machine.lane.index

    def grid(self, dimensions: int) -> Any:
        """The thread's place in the grid."""
        places = zip(self.blockIdx, self.blockDim, self.threadIdx)
        found = tuple(b * size + t for b, size, t in list(places)[:dimensions])
        return found[0] if dimensions == 1 else found

    def gridsize(self, dimensions: int) -> Any:
        """The threads of the grid in each dimension."""
        found = tuple(blocks * size for blocks, size in list(zip(self.gridDim, self.blockDim))[:dimensions])
        return found[0] if dimensions == 1 else found

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c, rounded once (twice in rare cases, for float64 holds no more)."""
        return type(a)(np.float64(a) * np.float64(b) + np.float64(c))

    def syncthreads(self) -> None:
        """Wait for all threads of the block."""
        self._machine.switch(_Wait("syncthreads", _here(sys._getframe(1))))

    def _exchange(self, name: str, mask: int, payload: Any, combine: Callable[..., Any]) -> Any:
        lane = self._machine.lane
        if not mask >> lane.index & 1:
            raise DivergenceError(
                f"{name} with mask {mask:#010x}, which leaves out the lane {lane.index} that calls it"
            )
        wait = _Wait(name, _here(sys._getframe(2)), mask & _FULL, payload, combine, aligned=False)
        return self._machine.switch(wait)

    def syncwarp(self, mask: int = _FULL) -> None:
        """Wait for the lanes of the mask."""
        self._exchange("syncwarp", mask, None, lambda payloads: payloads)

    def shfl_sync(self, mask: int, value: Any, source: int) -> Any:
        """The value of lane `source`."""
        return self._exchange("shfl_sync", mask, (self.laneid, value, source % WARP), _shuffle)

    def shfl_xor_sync(self, mask: int, value: Any, bits: int) -> Any:
        """The value of the lane whose number differs in these bits."""
        return self._exchange("shfl_xor_sync", mask, (self.laneid, value, self.laneid ^ bits), _shuffle)

    def shfl_down_sync(self, mask: int, value: Any, distance: int) -> Any:
        """The value of the lane `distance` above; the own where there is none."""
        source = self.laneid + distance
        return self._exchange(
            "shfl_down_sync", mask, (self.laneid, value, source if source < WARP else self.laneid), _shuffle
        )

    def shfl_up_sync(self, mask: int, value: Any, distance: int) -> Any:
        """The value of the lane `distance` below; the own where there is none."""
        source = self.laneid - distance
        return self._exchange(
            "shfl_up_sync", mask, (self.laneid, value, source if source >= 0 else self.laneid), _shuffle
        )

    def ballot_sync(self, mask: int, predicate: Any) -> int:
        """One bit for each lane whose predicate holds."""
        return self._exchange("ballot_sync", mask, (self.laneid, bool(predicate)), _ballot)

    def any_sync(self, mask: int, predicate: Any) -> bool:
        """Whether the predicate holds in any lane."""
        return self._exchange("any_sync", mask, bool(predicate), lambda all_: [any(all_)] * len(all_))

    def all_sync(self, mask: int, predicate: Any) -> bool:
        """Whether the predicate holds in all lanes."""
        return self._exchange("all_sync", mask, bool(predicate), lambda all_: [all(all_)] * len(all_))


def _shuffle(payloads: list[tuple[int, Any, int]]) -> list[Any]:
    values = {lane: value for lane, value, _ in payloads}
    missing = [source for _, _, source in payloads if source not in values]
    if missing:
        raise DivergenceError(f"a shuffle reads lane {missing[0]}, which does not take part")
    return [values[source] for _, _, source in payloads]


def _ballot(payloads: list[tuple[int, bool]]) -> list[int]:
    return [sum(1 << lane for lane, holds in payloads if holds)] * len(payloads)
