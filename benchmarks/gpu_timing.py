"""How long does it take on a GPU? What events say around one call, and what it costs the host.

Caches are emptied before each call, and the GPU is kept waiting until the host is ahead, so that the host's own time
does not count. That is measured apart: calls that nobody waits for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from fastconv.cuda import launch
from fastconv.device_arrays import DeviceLibrary

from .timing import Timing

# More than any cache holds.
FLUSHED_BYTES = 256 << 20
# Seconds that a GPU is kept waiting at most.
LONGEST_HOLD = 0.05


class Gpu(Protocol):
    """What measuring needs of a GPU; `moment` marks how far its stream has come, `elapsed` waits and subtracts."""

    def synchronize(self) -> None:
        """Wait for all work."""
        ...

    def flush(self) -> None:
        """Empty the caches."""
        ...

    def hold(self, seconds: float) -> None:
        """Keep it busy for about so long, without waiting."""
        ...

    def moment(self) -> Any:
        """Return an event."""
        ...

    def elapsed(self, first: Any, last: Any) -> float:
        """Return the seconds between two events."""
        ...


class CurrentGpu:
    """The current GPU, by the driver's events on the stream of a library's arrays."""

    def __init__(self, library: DeviceLibrary) -> None:
        self._driver, self._stream = launch.driver(), launch.stream(library.stream())
        self._flushed = library.new((FLUSHED_BYTES,), np.dtype(np.uint8))
        self.flush()
        start = self.moment()
        self.flush()
        self._flush_seconds = max(self.elapsed(start, self.moment()), 1e-6)

    def synchronize(self) -> None:
        """Wait for all work."""
        now = self.moment()
        self.elapsed(now, now)

    def flush(self) -> None:
        """Empty the caches."""
        self._flushed[...] = 0

    def hold(self, seconds: float) -> None:
        """Keep it busy for about so long, without waiting."""
        for _ in range(math.ceil(seconds / self._flush_seconds)):
            self.flush()

    def moment(self) -> Any:
        """Return an event."""
        return self._driver.moment(self._stream)

    def elapsed(self, first: Any, last: Any) -> float:
        """Return the seconds between two events."""
        return self._driver.elapsed(first, last)


def measure(call: Callable[[], Any], gpu: Gpu, budget: float, most: int) -> tuple[Timing, float]:
    """Return the seconds that a call keeps the GPU busy, and those that it costs the host.

    Parameters
    ----------
    call : callable
        It has run before, and does not wait for its result.
    budget : float
        Seconds to spend on it.
    most : int
        The most repeats.
    """
    gpu.synchronize()
    start = perf_counter()
    call()
    gpu.synchronize()
    once = perf_counter() - start
    host = host_seconds(call, gpu.synchronize, *((10, 5) if once < budget / 10 else (1, 3)))
    repeats = int(min(max(budget / once, 3), most))
    moments = []
    gpu.hold(min(repeats * (host + 30e-6), LONGEST_HOLD))
    for _ in range(repeats):
        gpu.flush()
        before = gpu.moment()
        call()
        moments.append((before, gpu.moment()))
    gpu.synchronize()
    return Timing.of([gpu.elapsed(*pair) for pair in moments]), host


def host_seconds(call: Callable[[], Any], synchronize: Callable[[], Any], calls: int = 100, blocks: int = 15) -> float:
    """Return the median time of a call that nobody waits for."""
    call()
    found = []
    for _ in range(blocks):
        synchronize()
        start = perf_counter()
        for _ in range(calls):
            call()
        found.append((perf_counter() - start) / calls)
    synchronize()
    return float(np.median(found))
