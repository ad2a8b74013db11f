"""How long does it take? Medians over blocks of calls, each callable alone and warm.

Two libraries bring two thread pools. A pool that waits for work keeps cores busy for a while, and a pool that sleeps is
slow to wake, so that on few cores calls that take turns one by one measure each other. Here every callable runs
in blocks of its own: all pools go to sleep, it is called until it is warm, then timed; blocks of all callables
alternate, so that a change in the machine's speed meets them all. Only ratios within one run mean anything.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter, process_time, sleep
from typing import Any

import numpy as np

BLOCKS = 3
# Seconds at a time, and times at most, that a block waits until the threads of the one before have gone to sleep.
REST, MOST_RESTS = 0.005, 60
# Part of a block that goes by before its calls count.
WARM_SHARE = 0.25
# Shortest time that is read off the clock at once: shorter calls are timed several together.
SHORTEST = 50e-6
# A call that takes so many seconds runs once, whatever is asked: its spread is small beside it.
PATIENCE = 5.0


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the quantiles 20, 50 and 80 of `repeats` measurements."""

    q20: float
    median: float
    q80: float
    repeats: int

    @staticmethod
    def of(samples: list[float]) -> Timing:
        """Summarise measured seconds."""
        q20, median, q80 = (float(q) for q in np.quantile(samples, (0.2, 0.5, 0.8)))
        return Timing(q20, median, q80, len(samples))


def measure(
    calls: Mapping[Any, Callable[[], Any]],
    budget: float,
    clock: Callable[[], float] = perf_counter,
    thorough: bool = False,
) -> dict[Any, Timing]:
    """Time callables that have each run once already.

    Parameters
    ----------
    calls : mapping of key to callable
    budget : float
        Seconds for each callable. The number of repeats follows from it; one that takes longer runs once.
    thorough : bool
        Every block of a callable, unless it takes over `PATIENCE` seconds, has a call to warm up and one that counts.

    Returns
    -------
    dict of key to Timing
    """
    samples: dict[Hashable, list[float]] = {key: [] for key in calls}
    spent = dict.fromkeys(calls, 0.0)
    for _ in range(BLOCKS):
        for key, call in calls.items():
            if samples[key] and (max(samples[key]) >= PATIENCE or (spent[key] >= budget and not thorough)):
                continue
            _rest()
            start = clock()
            with _no_collection():
                samples[key] += _block(call, budget / BLOCKS, clock, thorough)
            spent[key] += clock() - start
    return {key: Timing.of(found) for key, found in samples.items()}


def _block(call: Callable[[], Any], seconds: float, clock: Callable[[], float], thorough: bool) -> list[float]:
    start = before = clock()
    while True:
        call()
        now = clock()
        once, before = now - before, now
        if now - start >= WARM_SHARE * seconds:
            break
    if once >= PATIENCE or (once >= seconds and not thorough):
        # It warmed itself up, and is too long to repeat.
        return [once]
    number = max(1, int(SHORTEST / max(once, 1e-9)))
    samples: list[float] = []
    while not samples or before - start < seconds:
        for _ in range(number):
            call()
        now = clock()
        samples.append((now - before) / number)
        before = now
    return samples


def _rest() -> None:
    """Wait until no thread of the process is busy: those of OpenBLAS wait for work so for a tenth of a second."""
    for _ in range(MOST_RESTS):
        before = process_time()
        sleep(REST)
        if process_time() - before < REST / 10:
            break


@contextmanager
def _no_collection() -> Any:
    """Keep Python's garbage collector out of the measurement."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
