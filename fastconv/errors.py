"""What can go wrong, by kind.

Every error fastconv raises on purpose is a :class:`FastconvError`, and also the built-in exception that a
Python user would expect: a wrong shape is a ValueError, a wrong dtype a TypeError.
"""

from __future__ import annotations

from typing import Any


class FastconvError(Exception):
    """Base of all errors raised by fastconv."""


class ArgumentError(FastconvError, ValueError):
    """An argument has the right type but a value that is not allowed."""


class ShapeError(ArgumentError):
    """Shapes or sizes do not fit together, or give an output with no elements in some window."""


class ArgumentTypeError(FastconvError, TypeError):
    """An argument has a type that is not accepted."""


class DTypeError(ArgumentTypeError):
    """An array has an element type that is not supported, or two arrays differ in it."""


class UnsupportedError(FastconvError, NotImplementedError):
    """The algorithm asked for by name cannot compute this case; the message says why."""


class WorkspaceLimitError(FastconvError, MemoryError):
    """The algorithm asked for by name needs more workspace than ``config.workspace_limit`` allows.

    Attributes
    ----------
    needed, limit : int
        Bytes.
    """

    def __init__(self, message: str, needed: int = 0, limit: int = 0) -> None:
        super().__init__(message)
        self.needed = needed
        self.limit = limit


class MissingDependencyError(FastconvError, ImportError):
    """An optional library is not installed; the message names the extra that brings it."""


def shown(value: Any) -> str:
    """Return a value as an error shows it: an array by its shape, and nothing that fills the screen.

    >>> shown(3), shown(range(1000)), shown("x" * 500)[-3:]
    ('3', 'range(0, 1000)', '...')
    """
    if len(getattr(value, "shape", ())) > 1:
        return f"an array of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
