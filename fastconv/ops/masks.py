"""What a ReLU and dropout do on the way back: values where a mask is True, 0 elsewhere."""

from __future__ import annotations

import numpy as np

from ..arrays import empty
from ..cpu import epilogue


def masked(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return `values` where `mask` is True and 0 elsewhere, even where a value is infinite or NaN.

    Parameters
    ----------
    values : ndarray
        Of 1, 2, 4 or 8 bytes an element.
    mask : ndarray of bool, of the same shape

    Returns
    -------
    ndarray, like `values`; in their memory order

    Examples
    --------
    >>> masked(np.array([1.0, np.inf]), np.array([True, False]))
    array([1., 0.])
    """
    bits, ones = values.view(f"i{values.dtype.itemsize}"), mask.view(np.int8)
    if not (bits.flags.c_contiguous and ones.flags.c_contiguous):
        return (bits & np.negative(ones, dtype=bits.dtype, casting="unsafe")).view(values.dtype)
    found = empty(values.shape, bits.dtype)
    epilogue.masked(bits.reshape(-1), ones.reshape(-1), found.reshape(-1))
    return found.view(values.dtype)
