"""Training: batches forward and back, epoch after epoch, with callbacks in between.

>>> import numpy as np
>>> from fastconv import nn
>>> _ = nn.manual_seed(0)
>>> x = np.random.default_rng(0).standard_normal((64, 2)).astype("float32")
>>> y = (x[:, 0] > x[:, 1]).astype(int)
>>> model = nn.Sequential(nn.Linear(2, 2))
>>> history = nn.fit(model, x, y, optimizer=nn.Adam(model.parameters(), lr=0.1), epochs=20, verbose=0)
>>> nn.evaluate(model, x, y, metrics=["accuracy"])["accuracy"] > 0.9
True
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import ArgumentError, ArgumentTypeError, ShapeError
from ..geometry import integer
from .activations import Elementwise
from .callbacks import Callback, ProgressBar
from .containers import Sequential
from .convolution import _Conv
from .losses import CrossEntropyLoss, Loss
from .metrics import named_metrics
from .module import Array, Module, evaluating
from .optim import Optimizer
from .penalty import Penalty
from .pooling import _Pool
from .rng import generator


@dataclass
class History:
    """What training went through.

    Attributes
    ----------
    history : dict of lists
        One number per epoch: "loss", metrics, the same with "val_" in front, and "learning_rate".
    epoch : list of int
        From 0.
    seconds : list of float
        Time of each epoch's training, without validation.
    images_per_second : list of float
    """

    history: dict[str, list[float]] = field(default_factory=dict)
    epoch: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    images_per_second: list[float] = field(default_factory=list)

    def add(self, epoch: int, logs: dict[str, float]) -> None:
        """Append the numbers of an epoch."""
        self.epoch.append(epoch)
        for name, value in logs.items():
            self.history.setdefault(name, []).append(value)


class Trainer:
    """A model with what is needed to train it.

    Parameters
    ----------
    model : Module
    optimizer : Optimizer
    loss : Loss, optional
        Softmax cross-entropy unless given.
    metrics : sequence of names or functions of (prediction, target)
    penalty : Penalty or sequence of them
        Added to the training loss and its gradient.

    Attributes
    ----------
    history : History
        Grows from one :meth:`fit` to the next.
    stop_training : bool
        A callback sets it to end training after the batch, or the epoch, that it is called in.
    """

    def __init__(
        self,
        model: Module,
        optimizer: Optimizer,
        loss: Loss | None = None,
        *,
        metrics: Any = (),
        penalty: Penalty | Sequence[Penalty] = (),
    ) -> None:
        if not isinstance(model, Module):
            raise ArgumentTypeError(f"model must be a Module, not {model!r}")
        if not isinstance(optimizer, Optimizer):
            raise ArgumentTypeError(f"optimizer must be an optimiser of fastconv.nn, not {optimizer!r}")
        self.model, self.optimizer = model, optimizer
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        of_model = [id(parameter) for parameter in model.parameters()]
        if of_model and held.isdisjoint(of_model):
            raise ArgumentError("optimizer has none of the model's parameters: make it from model.parameters()")
        self.loss = _checked_loss(loss)
        self.metrics = named_metrics(metrics)
        self.penalties = [penalty] if isinstance(penalty, Penalty) else list(penalty)
        self.history = History()
        self.stop_training = False
        self.epochs = self.batches = 0

    def train_batch(self, x: Array, y: Array) -> dict[str, float]:
        """Make one step of the optimiser on a batch; return its loss and metrics."""
        self.model.zero_grad()
        prediction = self.model(x)
        value = self.loss(prediction, y)
        self.model.backward(self.loss.backward(), input_grad=False)
        for penalty in self.penalties:
            value += penalty.value(self.model)
            penalty.add_gradient(self.model)
        self.optimizer.step()
        return {"loss": value, **{name: metric(prediction, y) for name, metric in self.metrics.items()}}

    def fit(
        self,
        x: Array,
        y: Array,
        *,
        batch_size: int = 32,
        epochs: int = 1,
        validation_data: tuple[Array, Array] | None = None,
        validation_split: float = 0.0,
        shuffle: bool = True,
        seed: Any = None,
        callbacks: Callback | Iterable[Callback] = (),
        verbose: int = 1,
    ) -> History:
        """Train for some epochs; arguments as :func:`fit`. A second call goes on where the first ended."""
        x, y, validation_data = _split(self.model, x, y, validation_data, validation_split)
        batch_size = integer("batch_size", batch_size, 1)
        first, rng = len(self.history.epoch), generator(seed)
        self.epochs = first + integer("epochs", epochs, 0)
        self.batches = math.ceil(len(x) / batch_size)
        self.stop_training = False
        given = [callbacks] if isinstance(callbacks, Callback) else list(callbacks)
        heard = [*given, *([ProgressBar()] if verbose else [])]
        for callback in heard:
            callback.trainer = self
            callback.on_train_begin()
        try:
            for epoch in range(first, self.epochs):
                self._epoch(epoch, x, y, batch_size, rng if shuffle else None, validation_data, heard)
                if self.stop_training:
                    break
        finally:
            for callback in heard:
                callback.on_train_end()
        return self.history

    def _epoch(
        self,
        epoch: int,
        x: Array,
        y: Array,
        batch_size: int,
        rng: np.random.Generator | None,
        validation_data: tuple[Array, Array] | None,
        callbacks: list[Callback],
    ) -> None:
        for callback in callbacks:
            callback.on_epoch_begin(epoch)
        self.model.train()
        order = None if rng is None else rng.permutation(len(x))
        logs: dict[str, float] = {"learning_rate": self.optimizer.lr}
        totals, start, seen = _Means(), time.perf_counter(), 0
        for number, (a, b) in enumerate(_batches(self.model, x, y, batch_size, order)):
            of_batch = self.train_batch(a, b)
            totals.add(of_batch, len(a))
            seen += len(a)
            for callback in callbacks:
                callback.on_batch_end(number, of_batch)
            if self.stop_training:
                break
        seconds = time.perf_counter() - start
        self.history.seconds.append(seconds)
        self.history.images_per_second.append(seen / seconds)
        logs = {**totals.means(), **logs}
        if validation_data is not None:
            found = self.evaluate(*validation_data, batch_size=max(batch_size, 256))
            logs |= {f"val_{name}": value for name, value in found.items()}
        self.history.add(epoch, logs)
        for callback in callbacks:
            callback.on_epoch_end(epoch, logs)

    def evaluate(self, x: Array, y: Array, *, batch_size: int = 256) -> dict[str, float]:
        """Return loss and metrics in evaluation mode, without penalties; arguments as :func:`evaluate`."""
        return evaluate(self.model, x, y, loss=self.loss, metrics=self.metrics.values(), batch_size=batch_size)

    def predict(self, x: Array, *, batch_size: int = 256) -> Array:
        """Return the model's output in evaluation mode; arguments as :func:`predict`."""
        return predict(self.model, x, batch_size=batch_size)


def fit(
    model: Module,
    x: Array,
    y: Array,
    *,
    optimizer: Optimizer,
    loss: Loss | None = None,
    metrics: Any = (),
    penalty: Penalty | Sequence[Penalty] = (),
    **keywords: Any,
) -> History:
    """Train a model.

    Parameters
    ----------
    model : Module
    x, y : arrays with one sample per row
        Batches of x are converted to the dtype of the model's parameters, without scaling.
    optimizer : Optimizer
    loss : Loss, optional
        Softmax cross-entropy unless given.
    metrics : sequence
        "accuracy", "binary_accuracy" or functions of (prediction, target).
    penalty : Penalty or sequence of them
    batch_size : int, default 32
    epochs : int, default 1
    validation_data : (x, y), optional
        Evaluated after each epoch.
    validation_split : float, default 0
        Share of the samples, taken from the end, to use as validation data.
    shuffle : bool, default True
        Whether each epoch has an order of its own.
    seed : int or numpy.random.Generator, optional
        Draws the orders; without it the generator of :func:`manual_seed`.
    callbacks : Callback or sequence of them
    verbose : int, default 1
        0 prints nothing, 1 a line per epoch and, on a terminal with tqdm installed, a bar.

    Returns
    -------
    History

    Raises
    ------
    ShapeError, ArgumentError, ArgumentTypeError
    """
    return Trainer(model, optimizer, loss, metrics=metrics, penalty=penalty).fit(x, y, **keywords)


def evaluate(
    model: Module, x: Array, y: Array, *, loss: Loss | None = None, metrics: Any = (), batch_size: int = 256
) -> dict[str, float]:
    """Return the mean loss and metrics of a model in evaluation mode, as {"loss": ..., "accuracy": ...}.

    Parameters
    ----------
    model, x, y, loss, metrics
        As :func:`fit` takes them.
    batch_size : int, default 256

    Returns
    -------
    dict of float

    Raises
    ------
    ShapeError, ArgumentError, ArgumentTypeError
    """
    _check_samples(model, x, y)
    criterion = _checked_loss(loss)
    measured, totals = named_metrics(metrics), _Means()
    with evaluating(model):
        for a, b in _batches(model, x, y, integer("batch_size", batch_size, 1), None):
            prediction = model(a)
            values = {"loss": criterion(prediction, b)}
            totals.add(values | {name: metric(prediction, b) for name, metric in measured.items()}, len(a))
    return totals.means()


def predict(model: Module, x: Array, *, batch_size: int = 256) -> Array:
    """Return the output of a model in evaluation mode, for any number of samples: one batch is held at a time.

    Parameters
    ----------
    model : Module
    x : array with one sample per row
        Batches are converted to the dtype of the model's parameters, without scaling.
    batch_size : int, default 256

    Returns
    -------
    array with one sample per row, of the model's dtype

    Raises
    ------
    ShapeError, ArgumentError, ArgumentTypeError
    """
    _check_input(model, x)
    batch_size = integer("batch_size", batch_size, 1)
    with evaluating(model):
        parts = (_rows(model, a) for a, _ in _batches(model, x, x, batch_size, None))
        first = next(parts, None)
        if first is None:
            return model(_converted(model, x))
        result = np.empty((len(x), *first.shape[1:]), first.dtype)
        result[: len(first)] = first
        for i, part in enumerate(parts, 1):
            result[i * batch_size : i * batch_size + len(part)] = part
    return result


def _rows(model: Module, batch: Array) -> Array:
    found = model(batch)
    if found.shape[:1] != batch.shape[:1]:
        raise ShapeError(f"the model must return a row for each of {len(batch)} samples, not shape {found.shape}")
    return found


class _Means:
    """Means over samples of numbers that come as means over batches."""

    def __init__(self) -> None:
        self.totals: dict[str, float] = {}
        self.count = 0

    def add(self, values: dict[str, float], count: int) -> None:
        self.count += count
        for name, value in values.items():
            self.totals[name] = self.totals.get(name, 0.0) + value * count

    def means(self) -> dict[str, float]:
        return {name: total / self.count for name, total in self.totals.items()}


def _batches(
    model: Module, x: Array, y: Array, batch_size: int, order: np.ndarray | None
) -> Iterator[tuple[Array, Array]]:
    for start in range(0, len(x), batch_size):
        rows: Any = slice(start, start + batch_size)
        if order is not None:
            rows = order[rows]
        yield _converted(model, x[rows]), y[rows]


def _converted(model: Module, x: Array) -> Array:
    """Return x in the dtype of the model's parameters."""
    parameter = next(model.parameters(), None)
    return x if parameter is None else x.astype(parameter.data.dtype, copy=False)


def _split(
    model: Module, x: Array, y: Array, validation_data: tuple[Array, Array] | None, validation_split: float
) -> tuple[Array, Array, tuple[Array, Array] | None]:
    _check_samples(model, x, y)
    if not 0 <= validation_split < 1:
        raise ArgumentError(f"validation_split must be at least 0 and below 1, not {validation_split!r}")
    if validation_data is not None:
        if validation_split:
            raise ArgumentError("validation_data and validation_split say the same thing; give one")
        if not isinstance(validation_data, (tuple, list)) or len(validation_data) != 2:
            raise ArgumentTypeError(f"validation_data must be (x, y), not {type(validation_data).__name__}")
        _check_samples(model, *validation_data)
    held = int(len(x) * validation_split)
    if held:
        return x[:-held], y[:-held], (x[-held:], y[-held:])
    return x, y, validation_data


def _checked_loss(loss: Any) -> Loss:
    """Return the loss, softmax cross-entropy if there is none, or raise if it cannot be one."""
    if loss is None:
        return CrossEntropyLoss()
    if isinstance(loss, type) or not callable(loss) or not hasattr(loss, "backward"):
        raise ArgumentTypeError(f"loss must be a loss such as nn.CrossEntropyLoss(), not {loss!r}")
    return loss


def _check_samples(model: Module, x: Any, y: Any) -> None:
    _check_input(model, x)
    _check_array("y", y)
    if len(x) != len(y) or not len(x):
        raise ShapeError(f"x and y must have the same number of samples, at least one, not {len(x)} and {len(y)}")


def _check_array(name: str, array: Any) -> None:
    if not isinstance(array, np.ndarray):
        raise ArgumentTypeError(f"{name} must be a NumPy array, not {type(array).__name__}")


def _check_input(model: Module, x: Any) -> None:
    """Refuse images without a channel axis: a layer would take a batch of them for one image of many channels."""
    _check_array("x", x)
    layer = _entrance(model)
    if isinstance(layer, (_Conv, _Pool)) and x.ndim == layer.dims + 1:
        one = "x[:, None]" if layer.data_format == "channels_first" else "x[..., None]"
        raise ShapeError(
            f"x must have {layer.dims + 2} dimensions, samples and channels among them, for {type(layer).__name__}, "
            f"not shape {x.shape}; {one} adds an axis of one channel"
        )


def _entrance(module: Module) -> Module | None:
    """Return the layer that sees the input as it is given, where that shows: not through a `forward` of the user's."""
    if not type(module).forward.__module__.startswith(__package__ + "."):
        return None
    if not isinstance(module, Sequential):
        return module
    return next((found for found in map(_entrance, module) if not isinstance(found, Elementwise)), None)
