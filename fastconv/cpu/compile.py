"""Compilation: ``@kernel`` for what Python calls, ``@device`` for what kernels call.

A kernel is compiled at its first call for the dtypes it meets and cached on disk by Numba, beside this file or,
if that is read-only, in the user's cache directory. A damaged cache entry is dropped and compiled again;
where nothing can be written, kernels are compiled once per process.
"""

from __future__ import annotations

import hashlib
import pickle
import types
import warnings
from collections.abc import Callable
from functools import cached_property, lru_cache, update_wrapper
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile

from . import threads

# Contract a*b+c into one rounding and reorder sums; never assume that numbers are finite.
FASTMATH = {"contract", "reassoc", "nsz"}

device = numba.njit(fastmath=FASTMATH, nogil=True)

KERNELS: list[Kernel] = []


class Kernel:
    """A function compiled twice on demand: with `prange` on threads, and serially for after a fork."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        update_wrapper(self, function)
        KERNELS.append(self)

    def __call__(self, *args: Any) -> Any:
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


def _compiled(function: Callable[..., Any], parallel: bool) -> Any:
    dispatcher: Any = numba.njit(fastmath=FASTMATH, nogil=True, parallel=parallel)(function)
    try:
        dispatcher._cache = _DiskCache(function)
    except (OSError, RuntimeError) as error:
        _warn_once(f"no directory for compiled kernels can be written ({error}); each process compiles them anew")
    return dispatcher


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


@lru_cache(maxsize=1)
def _sources_digest() -> str:
    """Digest of all kernel sources: a kernel contains the code of the functions it calls in other files."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@lru_cache(maxsize=16)
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


class _DiskCache(FunctionCache):
    """Numba's on-disk cache, stale when any kernel source changes, and never the reason that a call fails."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        plain = self._cache_file
        self._cache_file = _CheckedCacheFile(
            plain._cache_path, self._impl.filename_base, (plain._source_stamp, _sources_digest())
        )

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the compiled kernel, or None if there is none or it is damaged."""
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:
            _warn_once(f"compiled kernels in {self.cache_path} are damaged ({error!r}); compiling again")
            self._try(self.flush)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Save the compiled kernel, or warn that it cannot be."""
        self._try(lambda: super(_DiskCache, self).save_overload(sig, data))

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:
            _warn_once(f"compiled kernels cannot be saved in {self.cache_path} ({error!r})")


class _CheckedCacheFile(IndexDataCacheFile):
    """Cache files whose data carries its digest: machine code with one bad bit must not run."""

    def _save_data(self, name: str, data: Any) -> None:
        payload = self._dump(data)
        with self._open_for_write(self._data_path(name)) as file:
            file.write(hashlib.sha256(payload).digest() + payload)

    def _load_data(self, name: str) -> Any:
        content = Path(self._data_path(name)).read_bytes()
        payload = content[32:]
        if hashlib.sha256(payload).digest() != content[:32]:
            raise pickle.UnpicklingError(f"{name} does not match its digest")
        return pickle.loads(payload)
