"""Bias and activation as the last thing that a kernel does with a sum, in registers.

    y = activate(sum + bias[k], code)

A kernel closes over the code, and the compiler drops the branches that it does not take. Numbers are float32 or
float64; what is not a number passes through.
"""

from __future__ import annotations

import math

from ..activations import CODES, LEAKY_SLOPE

__all__ = ["CODES", "activate"]


def activate(value, code):
    """Return the activation of one value; `code` is one of CODES."""
    kind = type(value)
    zero, one = kind(0), kind(1)
    if code == 1:
        # The comparison is false for NaN, which passes through.
        return zero if value < zero else value
    if code == 2:
        return kind(value * kind(LEAKY_SLOPE)) if value < zero else value
    if code == 3:
        # exp of a number that is never positive cannot overflow.
        small = math.exp(-math.fabs(value))
        return kind(one / (one + small)) if value >= zero else kind(small / (one + small))
    if code == 4:
        return kind(math.tanh(value))
    return value
