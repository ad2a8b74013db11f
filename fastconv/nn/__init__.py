"""Layers, losses, optimisers and a training loop over the operations of fastconv, for NumPy arrays.

Names, arguments and state dicts are PyTorch's; there is no graph: a layer's ``forward`` keeps what its ``backward``
needs. See :mod:`fastconv.nn.module`.

>>> import numpy as np
>>> from fastconv import nn
>>> model = nn.Sequential(nn.Conv2d(1, 8, 3, activation="relu"), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 9, 10))
>>> loss, optimizer = nn.CrossEntropyLoss(), nn.SGD(model.parameters(), lr=0.1)
>>> value = loss(model(np.zeros((4, 1, 8, 8), np.float32)), np.array([3, 1, 4, 1]))
>>> model.backward(loss.backward(), input_grad=False)
>>> optimizer.step()
"""

from . import callbacks, datasets, init, losses, metrics, optim, penalty, schedules
from .activations import Identity, LeakyReLU, ReLU, Sigmoid, Softmax, Tanh
from .callbacks import (
    Callback,
    CSVLogger,
    EarlyStopping,
    LearningRateScheduler,
    ModelCheckpoint,
    ProgressBar,
    ReduceLROnPlateau,
    TensorBoard,
    TerminateOnNaN,
)
from .containers import Concat, Container, Flatten, Residual, Sequential
from .convolution import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from .linear import Linear
from .losses import BCELoss, BCEWithLogitsLoss, CrossEntropyLoss, Loss, MSELoss, NLLLoss
from .metrics import accuracy, binary_accuracy
from .module import BackwardError, Module, Parameter
from .normalization import BatchNorm1d, BatchNorm2d, BatchNorm3d, Dropout
from .optim import SGD, Adadelta, Adam, NAdam, Optimizer, RMSprop
from .penalty import L1, L2, Penalty
from .pooling import (
    AdaptiveAvgPool1d,
    AdaptiveAvgPool2d,
    AdaptiveAvgPool3d,
    AdaptiveMaxPool1d,
    AdaptiveMaxPool2d,
    AdaptiveMaxPool3d,
    AvgPool1d,
    AvgPool2d,
    AvgPool3d,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
    MaxUnpool1d,
    MaxUnpool2d,
    MaxUnpool3d,
)
from .rng import manual_seed
from .schedules import CosineAnnealingLR, ExponentialLR, LambdaLR, LRScheduler, StepLR
from .summary import Summary, summary
from .training import History, Trainer, evaluate, fit, predict
from .weights import load_weights, save_weights

__all__ = [
    "L1",
    "L2",
    "SGD",
    "Adadelta",
    "Adam",
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AdaptiveMaxPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "BCELoss",
    "BCEWithLogitsLoss",
    "BackwardError",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "CSVLogger",
    "Callback",
    "Concat",
    "Container",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "CosineAnnealingLR",
    "CrossEntropyLoss",
    "Dropout",
    "EarlyStopping",
    "ExponentialLR",
    "Flatten",
    "History",
    "Identity",
    "LRScheduler",
    "LambdaLR",
    "LeakyReLU",
    "LearningRateScheduler",
    "Linear",
    "Loss",
    "MSELoss",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "MaxUnpool1d",
    "MaxUnpool2d",
    "MaxUnpool3d",
    "ModelCheckpoint",
    "Module",
    "NAdam",
    "NLLLoss",
    "Optimizer",
    "Parameter",
    "Penalty",
    "ProgressBar",
    "RMSprop",
    "ReLU",
    "ReduceLROnPlateau",
    "Residual",
    "Sequential",
    "Sigmoid",
    "Softmax",
    "StepLR",
    "Summary",
    "Tanh",
    "TensorBoard",
    "TerminateOnNaN",
    "Trainer",
    "accuracy",
    "binary_accuracy",
    "callbacks",
    "datasets",
    "evaluate",
    "fit",
    "init",
    "load_weights",
    "losses",
    "manual_seed",
    "metrics",
    "optim",
    "penalty",
    "predict",
    "save_weights",
    "schedules",
    "summary",
]
