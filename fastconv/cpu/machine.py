"""What this machine can do: the constants of the cost models."""

from functools import lru_cache
from typing import NamedTuple

from .simd import instruction_set


class Machine(NamedTuple):
    """Constants of a machine.

    Attributes
    ----------
    flops : float
        Float32 operations per second and thread of the register tile, operands in the cache (a multiply-add is two).
    bandwidth : float
        Bytes per second that all threads together move to and from memory.
    launch : float
        Seconds to start a task on all threads and wait for it.
    """

    flops: float
    bandwidth: float
    launch: float


@lru_cache(maxsize=1)
def constants() -> Machine:
    """Return the constants of this machine."""
    rate = {"avx512": 110e9, "avx2": 60e9, "neon": 40e9, "generic": 10e9}[instruction_set()]
    return Machine(rate, 16e9, 5e-6)
