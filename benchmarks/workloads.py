"""The convolutions that are measured: the layers of published networks, each distinct one once, with its count.

Sources: VGG-16 (Simonyan & Zisserman 2015, configuration D); ResNet-50 (He et al. 2016, with the stride in the 3x3
layers, as most libraries have it); AlexNet (Krizhevsky et al. 2012, two groups as on its two GPUs); MobileNet
(Howard et al. 2017, width 1, 224 pixels); `mnist` and `fashion`, the small networks of the examples. `tour` takes one
layer of each kind: it is what the command shows when asked for nothing in particular.

`panel` is ``panel.csv``: the distinct layers of AlexNet, MobileNet (pointwise and depthwise apart), ResNet-50 (with the
stride in the 1x1 layers, as in the paper), VGG-19, the ConvNet benchmarks (Chintala 2014), the networks of the examples
and LeNet-5; and kinds of layers that those lack: wide depthwise kernels (ConvNeXt, Liu et al. 2022; RepLKNet, Ding et
al. 2022), dilated ones (DeepLab, Chen et al. 2017), groups (ResNeXt, Xie et al. 2017), and one of 63x63.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastconv.geometry import ConvGeometry, join_shape
from fastconv.testing import ConvCase


@dataclass(frozen=True)
class Workload:
    """One convolution to measure; shapes are batched and channels-first.

    `count` says how often the network has this layer.
    """

    network: str
    name: str
    x_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1
    count: int = 1
    padding_mode: str = "zeros"

    def __str__(self) -> str:
        return f"{self.network} {self.name}".strip()

    @staticmethod
    def from_case(case: ConvCase) -> Workload:
        """Take a case of the tests' table."""
        return Workload(
            "", case.name, case.x_shape, case.weight_shape, case.stride, case.padding, case.dilation, case.groups,
            padding_mode=case.padding_mode,
        )  # fmt: skip

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the convolution."""
        names = ("stride", "padding", "dilation", "groups", "padding_mode")
        return {name: getattr(self, name) for name in names}

    def geometry(self, data_format: str = "channels_first", dtype: Any = "float32") -> ConvGeometry:
        """Return all its sizes; raises ShapeError or ArgumentError if they do not fit."""
        N, C, *spatial = self.x_shape
        x_shape = join_shape(N, C, tuple(spatial), data_format)
        return ConvGeometry.create(x_shape, self.weight_shape, data_format=data_format, dtype=dtype, **self.arguments)

    def with_batch(self, batch: int) -> Workload:
        """Return the same layer on another number of images."""
        return replace(self, x_shape=(batch, *self.x_shape[1:]))


# Per layer: name, C, size of the square image, K, size of the square kernel, padding, stride, groups, count.
_Row = tuple[str, int, int, int, int, int, int, int, int]

_VGG16: tuple[_Row, ...] = (
    ("conv1_1", 3, 224, 64, 3, 1, 1, 1, 1),
    ("conv1_2", 64, 224, 64, 3, 1, 1, 1, 1),
    ("conv2_1", 64, 112, 128, 3, 1, 1, 1, 1),
    ("conv2_2", 128, 112, 128, 3, 1, 1, 1, 1),
    ("conv3_1", 128, 56, 256, 3, 1, 1, 1, 1),
    ("conv3_2", 256, 56, 256, 3, 1, 1, 1, 2),
    ("conv4_1", 256, 28, 512, 3, 1, 1, 1, 1),
    ("conv4_2", 512, 28, 512, 3, 1, 1, 1, 2),
    ("conv5_1", 512, 14, 512, 3, 1, 1, 1, 3),
)

_RESNET50: tuple[_Row, ...] = (
    ("conv1", 3, 224, 64, 7, 3, 2, 1, 1),
    ("conv2 in 1x1", 64, 56, 64, 1, 0, 1, 1, 1),
    ("conv2 3x3", 64, 56, 64, 3, 1, 1, 1, 3),
    ("conv2 expand", 64, 56, 256, 1, 0, 1, 1, 4),
    ("conv2 reduce", 256, 56, 64, 1, 0, 1, 1, 2),
    ("conv3 in 1x1", 256, 56, 128, 1, 0, 1, 1, 1),
    ("conv3 3x3/2", 128, 56, 128, 3, 1, 2, 1, 1),
    ("conv3 shortcut/2", 256, 56, 512, 1, 0, 2, 1, 1),
    ("conv3 3x3", 128, 28, 128, 3, 1, 1, 1, 3),
    ("conv3 expand", 128, 28, 512, 1, 0, 1, 1, 4),
    ("conv3 reduce", 512, 28, 128, 1, 0, 1, 1, 3),
    ("conv4 in 1x1", 512, 28, 256, 1, 0, 1, 1, 1),
    ("conv4 3x3/2", 256, 28, 256, 3, 1, 2, 1, 1),
    ("conv4 shortcut/2", 512, 28, 1024, 1, 0, 2, 1, 1),
    ("conv4 3x3", 256, 14, 256, 3, 1, 1, 1, 5),
    ("conv4 expand", 256, 14, 1024, 1, 0, 1, 1, 6),
    ("conv4 reduce", 1024, 14, 256, 1, 0, 1, 1, 5),
    ("conv5 in 1x1", 1024, 14, 512, 1, 0, 1, 1, 1),
    ("conv5 3x3/2", 512, 14, 512, 3, 1, 2, 1, 1),
    ("conv5 shortcut/2", 1024, 14, 2048, 1, 0, 2, 1, 1),
    ("conv5 3x3", 512, 7, 512, 3, 1, 1, 1, 2),
    ("conv5 expand", 512, 7, 2048, 1, 0, 1, 1, 3),
    ("conv5 reduce", 2048, 7, 512, 1, 0, 1, 1, 2),
)

_ALEXNET: tuple[_Row, ...] = (
    ("conv1", 3, 227, 96, 11, 0, 4, 1, 1),
    ("conv2", 96, 27, 256, 5, 2, 1, 2, 1),
    ("conv3", 256, 13, 384, 3, 1, 1, 1, 1),
    ("conv4", 384, 13, 384, 3, 1, 1, 2, 1),
    ("conv5", 384, 13, 256, 3, 1, 1, 2, 1),
)

_MOBILENET: tuple[_Row, ...] = (
    ("conv1", 3, 224, 32, 3, 1, 2, 1, 1),
    ("dw2", 32, 112, 32, 3, 1, 1, 32, 1),
    ("pw2", 32, 112, 64, 1, 0, 1, 1, 1),
    ("dw3/2", 64, 112, 64, 3, 1, 2, 64, 1),
    ("pw3", 64, 56, 128, 1, 0, 1, 1, 1),
    ("dw4", 128, 56, 128, 3, 1, 1, 128, 1),
    ("pw4", 128, 56, 128, 1, 0, 1, 1, 1),
    ("dw5/2", 128, 56, 128, 3, 1, 2, 128, 1),
    ("pw5", 128, 28, 256, 1, 0, 1, 1, 1),
    ("dw6", 256, 28, 256, 3, 1, 1, 256, 1),
    ("pw6", 256, 28, 256, 1, 0, 1, 1, 1),
    ("dw7/2", 256, 28, 256, 3, 1, 2, 256, 1),
    ("pw7", 256, 14, 512, 1, 0, 1, 1, 1),
    ("dw8", 512, 14, 512, 3, 1, 1, 512, 5),
    ("pw8", 512, 14, 512, 1, 0, 1, 1, 5),
    ("dw13/2", 512, 14, 512, 3, 1, 2, 512, 1),
    ("pw13", 512, 7, 1024, 1, 0, 1, 1, 1),
    ("dw14", 1024, 7, 1024, 3, 1, 1, 1024, 1),
    ("pw14", 1024, 7, 1024, 1, 0, 1, 1, 1),
)

_MNIST: tuple[_Row, ...] = (
    ("conv1", 1, 28, 32, 3, 0, 1, 1, 1),
    ("conv2", 32, 13, 64, 3, 0, 1, 1, 1),
    ("conv3", 64, 5, 64, 3, 0, 1, 1, 1),
)

_FASHION: tuple[_Row, ...] = (
    ("conv1", 1, 28, 64, 7, 3, 1, 1, 1),
    ("conv2", 64, 14, 128, 3, 1, 1, 1, 1),
    ("conv3", 128, 14, 128, 3, 1, 1, 1, 1),
    ("conv4", 128, 7, 256, 3, 1, 1, 1, 1),
    ("conv5", 256, 7, 256, 3, 1, 1, 1, 1),
)

_TOUR: tuple[_Row, ...] = (
    ("first layer 7x7/2", 3, 112, 64, 7, 3, 2, 1, 1),
    ("3x3", 64, 28, 64, 3, 1, 1, 1, 1),
    ("1x1", 256, 14, 256, 1, 0, 1, 1, 1),
    ("depthwise 3x3", 128, 28, 128, 3, 1, 1, 128, 1),
    ("wide 21x21", 8, 32, 8, 21, 10, 1, 1, 1),
)

# Per network: images in a batch (the small networks' own for training), and its layers.
_TABLES: dict[str, tuple[int, tuple[_Row, ...]]] = {
    "vgg16": (8, _VGG16),
    "resnet50": (8, _RESNET50),
    "alexnet": (8, _ALEXNET),
    "mobilenet": (8, _MOBILENET),
    "mnist": (64, _MNIST),
    "fashion": (32, _FASHION),
    "tour": (4, _TOUR),
}
NETWORKS = tuple(name for name in _TABLES if name != "tour")


def _workloads(network: str) -> Iterator[Workload]:
    batch, rows = _TABLES[network]
    for name, C, size, K, kernel, padding, stride, groups, count in rows:
        x_shape, weight_shape = (batch, C, size, size), (K, C // groups, kernel, kernel)
        yield Workload(network, name, x_shape, weight_shape, stride, padding, groups=groups, count=count)


def network(name: str, batch: int | None = None, layers: str | None = None) -> list[Workload]:
    """Return the layers of a network.

    Parameters
    ----------
    name : one of NETWORKS, or "tour"
    batch : int, optional
        Images; by default 8, or what the small networks train with.
    layers : str, optional
        Regular expression that the names must contain.

    Raises
    ------
    ValueError
        No layer's name matches.

    Examples
    --------
    >>> [layer.name for layer in network("mnist", batch=1)]
    ['conv1', 'conv2', 'conv3']
    """
    found = list(_workloads(name))
    chosen = [w for w in found if layers is None or re.search(layers, w.name)]
    if not chosen:
        raise ValueError(f"no layer of {name} matches {layers!r}; they are {', '.join(w.name for w in found)}")
    return chosen if batch is None else [w.with_batch(batch) for w in chosen]


def panel() -> list[Workload]:
    """Return the layers of ``panel.csv``."""
    with (Path(__file__).parent / "panel.csv").open(newline="") as file:
        return [_from_columns(row) for row in csv.DictReader(file)]


def _from_columns(row: dict[str, str]) -> Workload:
    N, C, H, W, K, R, S, groups = (int(row[name]) for name in ("n", "c", "h", "w", "k", "r", "s", "groups"))
    stride, padding, dilation = ((int(row[f"{what}_h"]), int(row[f"{what}_w"])) for what in ("stride", "pad", "dil"))
    shapes = (N, C, H, W), (K, C // groups, R, S)
    return Workload(row["network"], row["layer"], *shapes, stride, padding, dilation, groups)


def kind(workload: Workload) -> str:
    """Return what sort of layer this is, which decides what bounds it."""
    g = workload.geometry()
    if g.groups > 1:
        return "depthwise" if g.groups == g.in_channels else "grouped"
    if g.in_channels <= 4:
        return "first layer"
    if math.prod(g.kernel_size) == 1:
        return "1x1"
    is_plain = set(g.kernel_size) == {3} and {*g.stride, *g.dilation} == {1}
    return "3x3 stride 1" if is_plain else "other dense"


def macs_per_image(workloads: list[Workload]) -> int:
    """Return the multiply-accumulates of one image through all layers, repeated ones counted."""
    return sum(w.count * math.prod(w.geometry().output_size) * math.prod(w.weight_shape) for w in workloads)
