"""Padding that copies the image instead of adding zeros, and its adjoint.

One dimension at a time: the elements beyond each edge are copies of elements inside, so the gradient of the padded
image is folded back onto those. With n elements, `before` and `after` copied ones:

    reflect    c b | a b c | b a      symmetric  b a | a b c | c b
    replicate  a a | a b c | c c      circular   b c | a b c | a b
"""

import numpy as np

_NUMPY_MODES = {"reflect": "reflect", "symmetric": "symmetric", "replicate": "edge", "circular": "wrap"}


def pad(x, padding, mode, first_axis):
    """Return `x` padded along the spatial axes, C-contiguous."""
    widths = [(0, 0)] * x.ndim
    widths[first_axis : first_axis + len(padding)] = padding
    return np.pad(x, widths, _NUMPY_MODES[mode])  # type: ignore[call-overload]


def fold_back(grad, padding, mode, first_axis, out):
    """Write the gradient with respect to the image to `out`, from that of the padded image, which is overwritten."""
    for axis, (before, after) in enumerate(padding, first_axis):
        n = grad.shape[axis] - before - after
        moved = np.moveaxis(grad, axis, 0)
        inner = moved[before : before + n]
        _add_edges(inner, moved[:before], moved[before + n :], mode)
        grad = np.moveaxis(inner, 0, axis)
    out[...] = grad


def _add_edges(inner, left, right, mode):
    n, before, after = len(inner), len(left), len(right)
    if mode == "replicate":
        if before:
            inner[0] += left.sum(axis=0)
        if after:
            inner[-1] += right.sum(axis=0)
    elif mode == "circular":
        inner[n - before :] += left
        inner[:after] += right
    else:
        skip = 1 if mode == "reflect" else 0
        inner[skip : skip + before] += left[::-1]
        inner[n - skip - after : n - skip] += right[::-1]
