"""A convolution for repeated use on a GPU: nothing is packed, so the weight is read anew by each call."""

from __future__ import annotations

from typing import Any

from ..device_arrays import DeviceArray
from ..geometry import ConvGeometry
from .run import conv_forward


class Plan:
    """The convolution of one geometry with one array of weights, by the algorithm chosen for it."""

    is_plain = False
    # Kept beside the workspace.
    nbytes = 0

    def __init__(self, choice: Any, geometry: ConvGeometry, weight: DeviceArray, activation: str | None) -> None:
        self.choice, self.geometry, self.weight, self.activation = choice, geometry, weight, activation

    def is_outdated(self) -> bool:
        """False: a plan stays on its GPU."""
        return False

    def refresh(self) -> None:
        """Nothing is kept of the weight."""

    def __call__(self, x: DeviceArray, bias: DeviceArray | None, out: DeviceArray | None) -> DeviceArray:
        """Return the convolution of a batched x, of any strides."""
        g = self.geometry
        return conv_forward(self.choice, g, g.data_format, x, self.weight, bias, self.activation, out)
