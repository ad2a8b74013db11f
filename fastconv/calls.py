"""Prepared calls: what a call decided, kept for the next one like it.

A call checks its arguments, works out sizes, chooses an algorithm and lays out memory. All of that depends on shapes,
dtypes, arguments and options, not on the numbers in the arrays, and takes longer than a small convolution does. So an
operation asks for the :func:`key` of a call first. If a function is :data:`known` under it, that is the whole call;
otherwise the call goes the long way, where everything is checked, and leaves such a function behind (:func:`keep`).

Only arrays that kernels read as they lie go the short way: plain ones of NumPy, and of libraries that have said how to
tell theirs apart (:data:`readers`). Arguments are told apart by their `marshal`
bytes, since 1, True and 1.0 are equal but not all valid; options by `config.state()`. A function that finds itself
out of date returns None, and the call goes the long way again.
"""

from __future__ import annotations

from collections.abc import Callable
from marshal import dumps, loads
from typing import Any

from numpy import ndarray

from . import config

# Calls to remember; then all are forgotten.
MOST = 1024

known: dict[Any, Callable[..., Any]] = {}

# By class of arrays: a function that returns what is equal for arrays that differ in contents alone, None for the rest.
readers: dict[type, Callable[[Any], Any]] = {}


def key(arguments: tuple[Any, ...], *arrays: Any) -> tuple[Any, ...] | None:
    """Return what is equal for two calls that differ in their arrays' contents alone; None for the long way.

    `arguments` are all others, beginning with the operation's name; an array may be None.
    """
    alike: list[Any] = [config.state()]
    for array in arrays:
        if array.__class__ is ndarray:
            # C-contiguous, aligned and writable.
            if not array.flags.carray:
                return None
            alike.append(array.shape)
            alike.append(array.dtype)
        elif array is None:
            alike.append(None)
        else:
            read = readers.get(array.__class__)
            likeness = None if read is None else read(array)
            if likeness is None:
                return None
            alike.append(likeness)
    try:
        # Version 2 writes the same bytes for the same value, whoever else refers to it.
        alike.append(dumps(arguments, 2))
    except ValueError:
        return None
    return tuple(alike)


def keep(key: tuple[Any, ...] | None, arguments: tuple[Any, ...], function: Callable[..., Any] | None) -> None:
    """Remember the function that is the whole call, if there is one."""
    if key is None or function is None or not all(getattr(part, "isnative", True) for part in key):
        return
    # NumPy's scalars are written as mere bytes, which others may share.
    if loads(key[-1]) != arguments:
        return
    if len(known) >= MOST:
        known.clear()
    known[key] = function
