"""Minimal filtering: the matrices of Winograd's F(m, r) from interpolation points.

    y = A^T [(G w) * (B^T x)]        m outputs of an r-tap filter for m + r - 1 products

The two polynomials are evaluated at m + r - 2 points and at infinity, multiplied there, and interpolated (Lavin & Gray,
"Fast algorithms for convolutional neural networks", 2016; Blahut, "Fast algorithms for digital signal processing",
section 5). All numbers are exact fractions; the kernels round each constant once.

The points decide the rounding error (Barabasz et al., "Error analysis and improving the accuracy of Winograd
convolution for deep neural networks", 2020). For m = 4 the pairs +-2/3, +-3/2 keep both their powers and their
differences near one: measured, half the error of the usual 0, +-1, +-2, below 1e-6 where that is above.
"""

from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

Matrix = tuple[tuple[Fraction, ...], ...]

POINTS = {
    2: (Fraction(0), Fraction(1), Fraction(-1)),
    4: (Fraction(0), Fraction(2, 3), Fraction(-2, 3), Fraction(3, 2), Fraction(-3, 2)),
    6: (Fraction(0), Fraction(1, 2), Fraction(-1, 2), Fraction(1), Fraction(-1), Fraction(2), Fraction(-2)),
}
TAPS = 3


class Filtering(NamedTuple):
    """The transforms of F(m, 3), t = m + 2: input (t, t), taps (t, 3), and back to output (m, t)."""

    input: Matrix
    taps: Matrix
    output: Matrix


@lru_cache(maxsize=8)
def filtering(m: int) -> Filtering:
    """Return the matrices B^T, G and A^T of F(m, 3)."""
    points = POINTS[m]
    output = [[p**i for p in points] + [Fraction(i == m - 1)] for i in range(m)]
    taps, inputs = [], []
    for i, point in enumerate(points):
        others = points[:i] + points[i + 1 :]
        scale = Fraction(1)
        for other in others:
            scale *= point - other
        taps.append([point**j / scale for j in range(TAPS)])
        inputs.append([*_with_roots(others), Fraction(0)])
    taps.append([Fraction(j == TAPS - 1) for j in range(TAPS)])
    inputs.append(_with_roots(points))
    return Filtering(_matrix(inputs), _matrix(taps), _matrix(output))


def transposed(matrix: Matrix) -> Matrix:
    """Return the transpose."""
    return tuple(zip(*matrix))


def _with_roots(roots: tuple[Fraction, ...]) -> list[Fraction]:
    """Return the coefficients of the product of (x - root), constant first."""
    polynomial = [Fraction(1)]
    for root in roots:
        shifted, scaled = [Fraction(0), *polynomial], [*(-root * c for c in polynomial), Fraction(0)]
        polynomial = [a + b for a, b in zip(shifted, scaled)]
    return polynomial


def _matrix(rows: list[list[Fraction]]) -> Matrix:
    return tuple(tuple(row) for row in rows)
