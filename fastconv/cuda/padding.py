"""Padding that copies the image instead of adding zeros, and its adjoint, by the array library's own operations.

One dimension at a time, as in the formulas of `numpy.pad`: the elements beyond each edge are copies of elements inside,
so the gradient of the padded image is folded back onto those, in a fixed order.
"""

from __future__ import annotations

import numpy as np

from ..device_arrays import DeviceArray

_NUMPY_MODES = {"reflect": "reflect", "symmetric": "symmetric", "replicate": "edge", "circular": "wrap"}


def pad(x: DeviceArray, padding: tuple[tuple[int, int], ...], mode: str, first_axis: int) -> DeviceArray:
    """Return `x` padded along the spatial axes, C-contiguous."""
    for axis, (before, after) in enumerate(padding, first_axis):
        if before or after:
            x = x.take(_sources(x.shape[axis], before, after, mode), axis)
    return x


def fold_back(grad: DeviceArray, padding: tuple[tuple[int, int], ...], mode: str, first_axis: int) -> DeviceArray:
    """Return the gradient with respect to the image from that of the padded image."""
    for axis, (before, after) in enumerate(padding, first_axis):
        n = grad.shape[axis] - before - after
        if before or after:
            grad = _folded(grad, _sources(n, before, after, mode), n, axis)
    return grad


def _folded(grad: DeviceArray, sources: np.ndarray, n: int, axis: int) -> DeviceArray:
    """Return the sums of the elements that are copies of the same one: the first copy of each, then the second, ..."""
    order = np.argsort(sources, kind="stable")
    copies = np.bincount(sources, minlength=n)
    starts = np.cumsum(copies) - copies
    result = grad.take(order[starts], axis)
    for copy in range(1, int(copies.max())):
        more = np.flatnonzero(copies > copy)
        result.add_at(grad.take(order[starts[more] + copy], axis), more, axis)
    return result


def _sources(n: int, before: int, after: int, mode: str) -> np.ndarray:
    """Return the element that each padded one is a copy of."""
    return np.pad(np.arange(n), (before, after), _NUMPY_MODES[mode])  # type: ignore[call-overload]
