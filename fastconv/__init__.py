"""Convolution and pooling kernels in Python: every strategy, every gradient, for NumPy arrays and CPU tensors.

>>> import numpy as np, fastconv
>>> x = np.random.rand(8, 3, 32, 32).astype("float32")
>>> w = np.random.rand(16, 3, 3, 3).astype("float32")
>>> fastconv.conv2d(x, w, padding="same", activation="relu").shape
(8, 16, 32, 32)

The same call takes ``algorithm="direct"``, ``"im2col"``, ``"fft"``, ... ; ``fastconv.algorithms(geometry)`` lists them.
Submodules load at first use, and kernels compile at their first call.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from . import config, errors
from ._version import __version__
from .config import options
from .errors import (
    ArgumentError,
    ArgumentTypeError,
    DTypeError,
    FastconvError,
    MissingDependencyError,
    ShapeError,
    UnsupportedError,
    WorkspaceLimitError,
)


def _dims(*names: str) -> list[str]:
    return [name.format(d) for name in names for d in (1, 2, 3)]


_LAZY = {
    "fastconv.ops.convolution": ["ConvGrads", *_dims("conv{}d", "conv{}d_backward")],
    "fastconv.ops.transposed": _dims("conv_transpose{}d", "conv_transpose{}d_backward"),
    "fastconv.ops.pooling": _dims(
        "max_pool{}d", "max_pool{}d_backward", "max_unpool{}d", "max_unpool{}d_backward",
        "avg_pool{}d", "avg_pool{}d_backward", "lp_pool{}d", "lp_pool{}d_backward",
        "adaptive_avg_pool{}d", "adaptive_avg_pool{}d_backward",
        "adaptive_max_pool{}d", "adaptive_max_pool{}d_backward",
    ),
    "fastconv.ops.patches": ["unfold", "fold"],
    "fastconv.ops.plans": ["ConvPlan", *_dims("plan_conv{}d")],
    "fastconv.geometry": ["ConvGeometry", "PoolGeometry", "ReceptiveField"],
    "fastconv.selection": ["algorithms", "explain"],
    "fastconv.info": ["show_config", "warmup"],
}  # fmt: skip
_SUBMODULES = (
    "arrays", "cli", "geometry", "info", "nn", "ops", "reference", "registry", "selection", "testing", "tuning",
)  # fmt: skip
_HOME = {name: module for module, names in _LAZY.items() for name in names}

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "DTypeError",
    "FastconvError",
    "MissingDependencyError",
    "ShapeError",
    "UnsupportedError",
    "WorkspaceLimitError",
    "__version__",
    "config",
    "errors",
    "options",
    *_HOME,
]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_SUBMODULES})


config.check_environment()
