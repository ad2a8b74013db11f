"""How a convolution becomes matrix products: which positions of the input meet which taps of the weight.

Forward and input gradient are one operation, a sum over taps of a shifted image times a matrix:

    forward      y[i]               = sum over r of       x[i*stride - before + r*dilation]   @ w[r]
    input_grad   dx[phase + i*stride] = sum over the phase's r of  dy[first + i - r'*step]    @ w[r]^T

An input element of one phase, its place modulo the stride, meets only every `stride / gcd(stride, dilation)`-th tap, so
that each phase is a dense product of its own (Chetlur et al., "cuDNN: efficient primitives for deep learning", 2014).
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import NamedTuple

from ..geometry import ConvGeometry


class Axis(NamedTuple):
    """One spatial dimension of a phase.

    Position i writes out[out_first + i*out_step] and reads, for tap j, source[in_first + i*in_step + j*tap_step], which
    meets weight[weight_first + j*weight_step].
    """

    extent: int
    in_first: int
    in_step: int
    out_first: int
    out_step: int
    taps: int
    tap_step: int
    weight_first: int
    weight_step: int


class Phase(NamedTuple):
    """The axes of one dense product; `source` and `target` are the whole images' extents."""

    axes: tuple[Axis, Axis, Axis]
    source: tuple[int, ...]
    target: tuple[int, ...]

    def column(self, name: str) -> tuple[int, ...]:
        """Return one number of each axis."""
        return tuple(getattr(axis, name) for axis in self.axes)

    @property
    def positions(self) -> int:
        """Pixels of one image that the phase writes."""
        return math.prod(self.column("extent"))

    @property
    def taps(self) -> int:
        """Taps that the phase reads."""
        return math.prod(self.column("taps"))

    @property
    def places(self) -> tuple[int, ...]:
        """Extent, and first place and step in the source and in the target, each of all axes."""
        names = "extent", "in_first", "in_step", "out_first", "out_step"
        return tuple(number for name in names for number in self.column(name))

    @property
    def is_whole(self) -> bool:
        """Whether it writes every pixel, in their order."""
        return self.column("extent") == self.target


@lru_cache(maxsize=1024)
def phases(geometry: ConvGeometry, direction: str) -> tuple[Phase, ...]:
    """Return the products of "forward" or "input_grad"; of taps that meet nothing there is a phase without any."""
    g = geometry
    sizes = zip(g.input_size, g.output_size, g.kernel_size, g.stride, g.padding, g.dilation)
    if direction == "forward":
        axes = [[Axis(p, -before, s, 0, 1, r, d, 0, 1)] for _, p, r, s, (before, _), d in sizes]
        source, target = g.input_size, g.output_size
    else:
        axes = [
            [_phase_axis(n, r, s, before, d, phase) for phase in range(min(s, n))]
            for n, _, r, s, (before, _), d in sizes
        ]
        source, target = g.output_size, g.input_size
    return tuple(Phase((a, b, c), source, target) for a, b, c in itertools.product(*axes))


def source_of(direction: str) -> str:
    """Return the name of the array whose pixels "forward" or "input_grad" multiplies."""
    return "x" if direction == "forward" else "grad_output"


def channels(geometry: ConvGeometry, direction: str) -> tuple[int, int]:
    """Return all channels of the source and of the target."""
    both = geometry.in_channels, geometry.out_channels
    return both[::-1] if direction == "input_grad" else both


def channels_of_group(geometry: ConvGeometry, direction: str) -> tuple[int, int]:
    """Return the channels of one group that are summed over, and those that result."""
    source, target = channels(geometry, direction)
    return source // geometry.groups, target // geometry.groups


def weight_steps(geometry: ConvGeometry, direction: str) -> tuple[int, int, int]:
    """Return the steps, in the weight (K, C // groups, T, R, S), to the next line, summed channel and group."""
    g, taps = geometry, math.prod(geometry.kernel_size)
    of_filter = taps * g.in_channels // g.groups
    line, inner = (taps, of_filter) if direction == "input_grad" else (of_filter, taps)
    return line, inner, of_filter * g.out_channels // g.groups


def _phase_axis(size: int, kernel: int, stride: int, before: int, dilation: int, phase: int) -> Axis:
    extent = -(-(size - phase) // stride)
    step = stride // math.gcd(stride, dilation)
    first = next((r for r in range(min(kernel, step)) if (phase + before - r * dilation) % stride == 0), kernel)
    taps = len(range(first, kernel, step))
    start = (phase + before - first * dilation) // stride if taps else 0
    return Axis(extent, start, 1, phase, stride, taps, -(step * dilation) // stride, first, step)
