"""What the emulator refuses, by kind."""

from __future__ import annotations

from ..errors import FastconvError


class EmulationError(FastconvError, RuntimeError):
    """A kernel did what a GPU would punish or, worse, forgive."""


class OutOfRangeError(EmulationError):
    """An access outside an array."""


class MisalignedError(EmulationError):
    """An access at an address that is no multiple of its size."""


class DivergenceError(EmulationError):
    """Threads of a warp, or of a block, wait in different places where all must be in one."""


class DeadlockError(EmulationError):
    """Threads wait for others that have ended."""


class UninitialisedError(EmulationError):
    """A read of memory that was never written, or that an asynchronous copy has not filled yet."""


class RaceError(EmulationError):
    """Two threads at one address, one of them writing, with no barrier between."""


class PrecisionError(EmulationError):
    """A whole number that its type cannot hold."""
