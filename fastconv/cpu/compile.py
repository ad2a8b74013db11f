"""Compilation: ``@kernel`` and ``@task`` for what Python calls, ``@device`` for what those call.

A kernel is a function of arrays with `prange` loops. A task is a function of integers (addresses, strides and sizes)
and the number of a chunk of the work; all tasks share one `prange` loop, so that each is compiled once, where Numba
compiles a parallel kernel three times over.

A kernel is compiled at its first call for the dtypes it meets and cached on disk by Numba, beside this file or,
if that is read-only, in the user's cache directory. A damaged cache entry is dropped and compiled again;
where nothing can be written, kernels are compiled once per process.
"""

from __future__ import annotations

import glob
import hashlib
import os
import pickle
import sys
import types
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache, update_wrapper
from pathlib import Path
from threading import get_ident
from typing import Any, NamedTuple

import numba
import numpy as np
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc
from numba.core.serialize import dumps
from numba.types import int64, void  # type: ignore[attr-defined]

from .. import tuning
from . import memory, threads
from .memory import address as address_of
from .simd import call

# Contract a*b+c into one rounding and reorder sums; never assume that numbers are finite.
FASTMATH = {"contract", "reassoc", "nsz"}

device = numba.njit(fastmath=FASTMATH, nogil=True, error_model="numpy", forceinline=False)
# For functions of so many numbers that handing them over takes as long as the work. What they call is asked anew.
inlined = numba.njit(fastmath=FASTMATH, nogil=True, error_model="numpy", forceinline=True)

KERNELS: list[Kernel] = []
TASKS: list[Task] = []


class Kernel:
    """A function compiled twice on demand: with `prange` on threads, and serially for after a fork."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        update_wrapper(self, function)
        KERNELS.append(self)

    def __call__(self, *args: Any) -> Any:
        """Run on threads, or serially where there are none to be had."""
        if _recording is not None and _recording.is_mine():
            raise NotInTasksError(f"{self.function.__name__} is a kernel, not a task")
        if threads.must_run_serially():
            return self.serial(*args)
        return threads.launch(self.parallel, args)

    @cached_property
    def parallel(self) -> Any:
        """The dispatcher that uses threads."""
        return _compiled(self.function, parallel=True)

    @cached_property
    def serial(self) -> Any:
        """The dispatcher that does not."""
        return _compiled(_renamed(self.function, "serial_"), parallel=False)


def kernel(function: Callable[..., Any]) -> Kernel:
    """Mark a function as a kernel: compiled at the first call, parallel over its `prange` loops."""
    return Kernel(function)


class Task:
    """A function of (address of int64 arguments, chunk), compiled on demand and run for each chunk on threads."""

    def __init__(self, function: Callable[[int, int], None]) -> None:
        self.function = function
        update_wrapper(self, function)
        TASKS.append(self)

    @cached_property
    def compiled(self) -> CFunc:
        """The machine code."""
        code = CFunc(self.function, ((int64, int64), void), {}, {"fastmath": FASTMATH, "error_model": "numpy"})
        _use_disk_cache(code, self.function)
        _distinguish(self.function)
        code.compile()
        return code

    def __call__(self, chunks: int, *arguments: int, held: Any = None) -> None:
        """Run the task for chunk 0 to `chunks` - 1; its arguments begin with `chunks`; `held` as in :meth:`start`."""
        self.start(np.array((chunks, *arguments), np.int64), held)

    def start(self, numbers: np.ndarray, held: Any = None) -> None:
        """Run the task with arguments that are int64 numbers already; `held` owns what addresses among them are of."""
        address, chunks = address_of(numbers), int(numbers[0])
        if _recording is not None and _recording.is_mine():
            _recording.steps.append(Step(self.compiled.address, chunks, numbers.copy(), held))
            return
        if chunks == 1:
            # Nothing to share: no thread is woken.
            self.compiled.ctypes(address, 0)
        else:
            _for_each(self.compiled.address, address, chunks)


class NotInTasksError(Exception):
    """A call that does more than to start tasks."""


class Step(NamedTuple):
    """A task as it would have been started."""

    function: Any
    chunks: int
    numbers: np.ndarray
    held: Any


class Recording:
    """What a thread would do, while :func:`recording` lasts: tasks not started, and arrays whose address was taken."""

    def __init__(self) -> None:
        self.thread = get_ident()
        self.steps: list[Step] = []
        self.addressed: list[np.ndarray] = []

    def run(self, function: Callable[..., None], *args: Any) -> None:
        """Call a function, to be recorded."""
        function(*args)

    def is_mine(self) -> bool:
        """Whether the function that is recorded asks, and no other thread, signal handler or finalizer."""
        if self.thread != get_ident():
            return False
        frame = sys._getframe(2)
        # Up to the recorded function all is of this package; who comes between is not.
        while frame.f_back is not None and frame.f_back.f_code is not _RUN:
            if not frame.f_globals.get("__name__", "").startswith(__package__):
                return False
            frame = frame.f_back
        return frame.f_back is not None


_RUN = Recording.run.__code__
_recording: Recording | None = None


def _forget_recording() -> None:
    global _recording
    _recording = memory.addressed = None


if hasattr(os, "register_at_fork"):
    # The thread that records has not come along.
    os.register_at_fork(after_in_child=_forget_recording)


@contextmanager
def recording() -> Iterator[Recording]:
    """Record the tasks that a function starts, by :meth:`Recording.run`; one thread at a time may."""
    global _recording
    _recording = Recording()
    memory.addressed = _recording.addressed
    try:
        yield _recording
    finally:
        _forget_recording()


def task(function: Callable[[int, int], None]) -> Task:
    """Mark a function of (arguments, chunk) as a task."""
    return Task(function)


@kernel
def _for_each(function: int, arguments: int, chunks: int) -> None:
    for chunk in numba.prange(chunks):
        call(function, arguments, chunk)


@device
def share(work: int, chunk: int, chunks: int) -> tuple[int, int]:
    """Return the part of range(work) that one chunk does."""
    return chunk * work // chunks, (chunk + 1) * work // chunks


def _compiled(function: Callable[..., Any], parallel: bool) -> Any:
    dispatcher: Any = numba.njit(fastmath=FASTMATH, nogil=True, error_model="numpy", parallel=parallel)(function)
    _use_disk_cache(dispatcher, function)
    _distinguish(function)
    return dispatcher


def _use_disk_cache(compilable: Any, function: Callable[..., Any]) -> None:
    try:
        compilable._cache = _DiskCache(function)
    except (OSError, RuntimeError) as error:
        _warn_once(f"no directory for compiled kernels can be written ({error}); each process compiles them anew")


def _renamed(function: Any, prefix: str) -> Any:
    """Return a copy under another name: Numba's cache file is named after the function, whatever its options."""
    copy = types.FunctionType(
        function.__code__,
        function.__globals__,
        prefix + function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__qualname__ = prefix + function.__qualname__
    copy.__module__ = function.__module__
    return copy


def _distinguish(function: Any) -> None:
    """Name a function, and those it has closed over, after the constants in them.

    Machine code is linked by name, and Numba's names tell functions apart by a number that begins anew in every
    process: variants compiled by different processes would take each other's place in a third.
    """
    if function.__closure__ and "__constants__" not in function.__dict__:
        function.__constants__ = hashlib.sha256(repr(_constants(function)).encode()).hexdigest()[:16]
        function.__qualname__ = f"{function.__qualname__}_{function.__constants__}"
        for cell in function.__closure__:
            called = getattr(cell.cell_contents, "py_func", cell.cell_contents)
            if isinstance(called, types.FunctionType):
                _distinguish(called)


def _constants(function: Any) -> tuple[Any, ...]:
    """Return the integers that a function and the functions it calls have closed over.

    Numba would pickle the closures, which gives other bytes in every process; the sources are in the stamp.
    """
    found: list[Any] = []
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        value = getattr(cell.cell_contents, "py_func", cell.cell_contents)
        if isinstance(value, types.FunctionType):
            found.append((name, _constants(value)))
        elif isinstance(value, (int, str)):
            found.append((name, value))
        else:
            raise TypeError(f"kernels may close over integers, strings and functions, not {name}={value!r}")
    return tuple(found)


# A kernel contains the code of the functions it calls in other files. Taken at import, when those are read too.
SOURCES_DIGEST = tuning.sources_digest("cpu")


@lru_cache(maxsize=16)
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


class _DiskCache(FunctionCache):
    """Numba's on-disk cache, stale when any kernel source changes, and never the reason that a call fails."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        stamp = (numba.__version__, self._impl.locator.get_source_stamp(), SOURCES_DIGEST)
        self._cache_file: Any = _CacheFiles(self.cache_path, self._impl.filename_base, stamp)

    def _index_key(self, sig: Any, codegen: Any) -> tuple[Any, ...]:
        """Return what tells one compilation from another: signature, CPU, and the constants of all closures."""
        return sig, codegen.magic_tuple(), _constants(self._py_func)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the compiled kernel, or None if there is none or it is damaged."""
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:
            _warn_once(f"a compiled kernel in {self.cache_path} is damaged ({error!r}); compiling again")
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Save the compiled kernel, or warn that it cannot be."""
        try:
            super().save_overload(sig, data)
        except Exception as error:
            _warn_once(f"compiled kernels cannot be saved in {self.cache_path} ({error!r})")


class _CacheFiles:
    """One file per kernel and signature, which carries its own digest.

    Numba's index of numbered files can name the wrong one after a crash, a race or a flipped bit; here the name is
    the signature's digest, and machine code that does not match its own is not run.
    """

    def __init__(self, directory: str, base: str, stamp: tuple[Any, ...]) -> None:
        self._directory, self._base = Path(directory), base
        self._stamp = hashlib.sha256(repr(stamp).encode()).hexdigest()

    def _path(self, key: Any) -> Path:
        digest = hashlib.sha256(repr(key).encode()).hexdigest()
        return self._directory / f"{self._base}.{self._stamp[:12]}.{digest[:24]}.nbc"

    def _digest(self, key: Any, payload: bytes) -> bytes:
        return hashlib.sha256(repr((self._stamp, key)).encode() + payload).digest()

    def load(self, key: Any) -> Any:
        """Return what was saved, or None."""
        try:
            content = self._path(key).read_bytes()
        except FileNotFoundError:
            return None
        digest, payload = content[:32], content[32:]
        if digest != self._digest(key, payload):
            raise pickle.UnpicklingError(f"{self._path(key).name} does not match its digest")
        return pickle.loads(payload)

    def save(self, key: Any, data: Any) -> None:
        """Write one file, in one step, and remove those of older sources."""
        payload, path = dumps(data), self._path(key)
        fresh = path.with_suffix(f".{uuid.uuid4().hex[:16]}.tmp")
        try:
            fresh.write_bytes(self._digest(key, payload) + payload)
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)
        for old in self._directory.glob(f"{glob.escape(self._base)}.*.nbc"):
            if not old.name.startswith(f"{self._base}.{self._stamp[:12]}."):
                old.unlink(missing_ok=True)

    def flush(self) -> None:
        """Remove every file of this kernel."""
        for path in self._directory.glob(f"{glob.escape(self._base)}.*.nbc"):
            path.unlink(missing_ok=True)
