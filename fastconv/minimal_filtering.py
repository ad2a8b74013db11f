"""Minimal filtering: the matrices of Winograd's F(m, r) from interpolation points.

    y = A^T [(G w) * (B^T x)]        m outputs of an r-tap filter for m + r - 1 products

The two polynomials are evaluated at m + r - 2 points and at infinity, multiplied there, and interpolated (Lavin & Gray,
"Fast algorithms for convolutional neural networks", 2016; Blahut, "Fast algorithms for digital signal processing",
section 5). All numbers are exact fractions; the kernels round each constant once.

The points decide the rounding error (Barabasz et al., "Error analysis and improving the accuracy of Winograd
convolution for deep neural networks", 2020). For m = 4 the pairs +-2/3, +-3/2 keep both their powers and their
differences near one: measured, half the error of the usual 0, +-1, +-2, below 1e-6 where that is above.

How a convolution is cut into tiles is here too: it is the same on every device.
"""

import math
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from .geometry import ConvGeometry

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


class Problem(NamedTuple):
    """A stride-1 convolution of a source with reversed or plain taps, and how it is cut into tiles."""

    batch: int
    groups: int
    # Channels of a group that are summed over, and that result.
    inner: int
    targets: int
    size: tuple[int, ...]
    # Source position of tap 0 for target 0.
    low: tuple[int, ...]
    kernel: tuple[int, ...]
    dilation: tuple[int, ...]
    reversed: bool
    # Tiles along H and W of one dilation phase.
    tiles: tuple[int, ...]

    @property
    def blocks(self) -> tuple[int, int, int]:
        """Blocks of 3x3 taps the kernel is cut into, for each tap along D."""
        T, R, S = self.kernel
        return T, -(-R // 3), -(-S // 3)

    @property
    def depth(self) -> int:
        """Products per position of a tile: channels times blocks of taps."""
        return math.prod(self.blocks) * self.inner

    @property
    def tile_count(self) -> int:
        """Tiles of all images and dilation phases."""
        return self.batch * self.size[0] * self.dilation[1] * self.dilation[2] * self.tiles[0] * self.tiles[1]


@lru_cache(maxsize=1024)
def problem(g: ConvGeometry, direction: str, m: int) -> Problem:
    """Return the tiles of m x m results of a direction; of the weight gradient, those that the forward pass has."""
    C, K = g.in_channels // g.groups, g.out_channels // g.groups
    size, low = g.output_size, tuple(-before for before, _ in g.padding)
    if direction == "input_grad":
        C, K, size = K, C, g.input_size
        low = tuple(b - d * (k - 1) for (b, _), d, k in zip(g.padding, g.dilation, g.kernel_size))
    tiles = tuple((n + d * m - 1) // (d * m) for n, d in zip(size[1:], g.dilation[1:]))
    return Problem(g.batch, g.groups, C, K, size, low, g.kernel_size, g.dilation, direction == "input_grad", tiles)
