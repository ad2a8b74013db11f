"""Predicted times: arithmetic over a share of the peak, or bytes over the bandwidth, whichever takes longer.

The numbers are those of data sheets (the largest GPU of an architecture; tensor cores of dense matrices, with sums in
float32), and the shares are guesses: nothing here has been measured. It orders algorithms until something has.
"""

from __future__ import annotations

from typing import NamedTuple

from ..geometry import ConvGeometry


class Peak(NamedTuple):
    """What a GPU can do in a second: operations outside tensor cores, bytes, and operations on tensor cores."""

    name: str
    float32: float
    float64: float
    bytes: float
    half: float
    tf32: float


# Source: NVIDIA's data sheets of the GPUs named.
PEAKS = {
    "sm_75": Peak("T4", 8.1e12, 0.25e12, 0.32e12, 65e12, 0.0),
    "sm_80": Peak("A100", 19.5e12, 9.7e12, 2.0e12, 312e12, 156e12),
    "sm_86": Peak("A40", 37.4e12, 0.58e12, 0.696e12, 150e12, 75e12),
    "sm_87": Peak("Orin", 5.3e12, 0.08e12, 0.2e12, 43e12, 21e12),
    "sm_89": Peak("L40S", 91.6e12, 1.4e12, 0.864e12, 362e12, 183e12),
    "sm_90": Peak("H200", 67e12, 34e12, 4.8e12, 989e12, 495e12),
    "sm_100": Peak("B200", 75e12, 37e12, 8.0e12, 2250e12, 1125e12),
    "sm_103": Peak("B300", 77e12, 1.2e12, 8.0e12, 2500e12, 1250e12),
    "sm_120": Peak("RTX PRO 6000", 125e12, 2.0e12, 1.8e12, 504e12, 252e12),
    "sm_121": Peak("GB10", 31e12, 0.48e12, 0.27e12, 125e12, 62e12),
}
# Seconds from one launch to the next.
LAUNCH = 3e-6


def peak(architecture: str) -> Peak:
    """Return the numbers of an architecture, such as "sm_90a"."""
    return PEAKS[architecture.rstrip("a")]


def seconds(
    geometry: ConvGeometry, architecture: str, share: float, launches: int = 1, bandwidth_share: float = 1.0
) -> float:
    """Return the predicted time of a convolution by an algorithm that reaches these shares of the peaks."""
    there = peak(architecture)
    flops = there.float64 if geometry.dtype.name == "float64" else there.float32
    return launches * LAUNCH + max(geometry.flops / (share * flops), geometry.bytes / (bandwidth_share * there.bytes))
