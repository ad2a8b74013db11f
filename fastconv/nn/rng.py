"""Random numbers: one generator that `manual_seed` resets, unless a call brings its own."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import ArgumentTypeError
from ..geometry import integer

_default = np.random.default_rng()


def manual_seed(seed: int) -> np.random.Generator:
    """Seed everything in `fastconv.nn` that draws random numbers without an ``rng=`` of its own.

    That is the initial weights of layers, dropout and the order of samples in training. The same seed before the
    same calls gives the same run, bit by bit.

    Parameters
    ----------
    seed : int
        At least 0.

    Returns
    -------
    numpy.random.Generator
        The generator that is used from now on.

    Examples
    --------
    >>> from fastconv import nn
    >>> _ = nn.manual_seed(0)
    >>> a = nn.Linear(2, 2).weight.data
    >>> _ = nn.manual_seed(0)
    >>> bool((nn.Linear(2, 2).weight.data == a).all())
    True
    """
    global _default
    _default = np.random.default_rng(integer("seed", seed, 0))
    return _default


def generator(rng: Any = None) -> np.random.Generator:
    """Return the generator meant by an ``rng=`` argument: a Generator, a seed, or None for the common one."""
    if rng is None:
        return _default
    if isinstance(rng, np.random.Generator):
        return rng
    if isinstance(rng, (int, np.integer)) and not isinstance(rng, bool):
        return np.random.default_rng(integer("rng", rng, 0))
    raise ArgumentTypeError(f"rng must be a numpy.random.Generator, a seed or None, not {rng!r}")
