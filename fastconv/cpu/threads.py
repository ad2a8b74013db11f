"""Threads: launching Numba kernels from any Python thread, under any threading layer, before and after a fork.

These facts shape this module.

- Numba's workqueue layer aborts the process when two threads enter parallel kernels at once, so launches take
  turns under it. The OpenMP and TBB layers need no turns. Which layer there is is known only after the first launch.
- No thread pool survives a fork, and GNU OpenMP kills a child that tries. A child of a process that has launched
  therefore runs the serial twin of each kernel.
- BLAS has threads of its own. It is never called from inside a kernel, so the two pools never work at once; but GNU
  OpenMP's threads spin for milliseconds after a kernel, on the cores that BLAS wants next. They are told to spin less.
- Loaded after PyTorch, Numba's OpenMP layer runs on PyTorch's threads; before, on threads of its own, and in a training
  step the two pools wait for each other's cores. So it is loaded as late as may be: by the first kernel.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from importlib import import_module
from typing import Any

import numba
from numba.np.ufunc import parallel as _numba_parallel

from .. import config

# Rounds a waiting OpenMP thread spins before it sleeps: under a millisecond, enough from one kernel to the next.
SPIN_COUNT = "50000"

_turn = threading.RLock()
_forked = False


def load_openmp() -> None:
    """Load Numba's OpenMP layer, which reads its settings just then, unless the user has settings of their own."""
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        return
    os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
    try:
        import_module("numba.np.ufunc.omppool")
    except ImportError:
        # Another layer will do.
        pass
    finally:
        os.environ.pop("GOMP_SPINCOUNT", None)


def _after_fork_in_child() -> None:
    global _turn, _forked
    _turn = threading.RLock()
    _forked = _forked or _numba_parallel._is_initialized


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def must_run_serially() -> bool:
    """Return True in a child of a process whose thread pool had started: the pool did not come along."""
    return _forked


def _most() -> int:
    return numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]


def layer() -> str | None:
    """Return Numba's threading layer, or None before the first launch."""
    try:
        return numba.threading_layer()
    except ValueError:
        return None


def count() -> int:
    """Return how many threads a kernel launched now would use."""
    wanted = config.get("threads")
    if must_run_serially():
        return 1
    if wanted is not None:
        return min(wanted, _most())
    # Asking Numba would start its threads, and from then on a fork has none.
    return numba.get_num_threads() if _numba_parallel._is_initialized else _most()


def launch(dispatcher: Any, args: tuple[Any, ...]) -> Any:
    """Call a parallel kernel on the number of threads the options ask for."""
    if not _numba_parallel._is_initialized:
        load_openmp()
    wanted = config.get("threads")
    needs_turn = layer() in (None, "workqueue")
    with _turn if needs_turn else nullcontext():
        if wanted is None:
            return dispatcher(*args)
        before = numba.get_num_threads()
        numba.set_num_threads(min(wanted, _most()))
        try:
            return dispatcher(*args)
        finally:
            numba.set_num_threads(before)


@lru_cache(maxsize=1)
def _blas_controller() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


@contextmanager
def blas() -> Iterator[None]:
    """Hold BLAS to ``config.threads`` inside the block, if that is set."""
    wanted = config.get("threads")
    if wanted is None:
        yield
        return
    with _blas_controller().limit(limits=wanted, user_api="blas"):
        yield
