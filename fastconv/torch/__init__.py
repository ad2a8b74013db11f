"""fastconv for PyTorch: its operations on tensors, with autograd.

Tensors are read and written in place, in either memory format. Functions, modules and two ways to bring a whole model
over, `convert` and `enabled`::

    y = fastconv.torch.conv2d(x, weight, bias, padding=1)
    layer = fastconv.torch.Conv2d(3, 16, 3, algorithm="winograd")
    print(fastconv.torch.convert(model))
    with fastconv.torch.enabled():
        loss(model(x), y).backward()

Derivatives are there of every order, in reverse and (except under `torch.compile` and dispatch modes) in forward mode.
Results lie in memory of NumPy's, which `Tensor.resize_` cannot make larger.
"""

from __future__ import annotations

from inspect import isfunction as _isfunction

from ..errors import MissingDependencyError

try:
    import torch as _torch  # noqa: F401
except ImportError:
    raise MissingDependencyError("fastconv.torch needs PyTorch: pip install 'fastconv[torch]'") from None

from . import modules as _modules
from ._operators import unscriptable as _unscriptable
from .convolution import conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d
from .modules import Conversion, convert, revert
from .patches import fold, unfold
from .pooling import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_avg_pool3d,
    adaptive_max_pool1d,
    adaptive_max_pool2d,
    adaptive_max_pool3d,
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
    lp_pool1d,
    lp_pool2d,
    lp_pool3d,
    max_pool1d,
    max_pool2d,
    max_pool3d,
    max_unpool1d,
    max_unpool2d,
    max_unpool3d,
)
from .routing import enabled

globals().update(_modules.CLASSES)

__all__ = [
    "Conversion",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "convert",
    "enabled",
    "fold",
    "lp_pool1d",
    "lp_pool2d",
    "lp_pool3d",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "max_unpool1d",
    "max_unpool2d",
    "max_unpool3d",
    "revert",
    "unfold",
    *_modules.CLASSES,
]

for _name in __all__:
    if _isfunction(globals()[_name]):
        # Where `torch.jit.script` looks for it.
        setattr(globals()[_name], "__script_unsupported", _unscriptable(_name))
