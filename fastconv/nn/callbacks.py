"""Callbacks: called between the batches and epochs of training. Names and arguments are Keras's."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, MissingDependencyError
from ..geometry import one_of
from .schedules import LRScheduler
from .weights import save_weights

if TYPE_CHECKING:
    from .training import Trainer

Logs = dict[str, float]
MODES = ("auto", "min", "max")


class Callback:
    """Base of the callbacks: override what is needed.

    Attributes
    ----------
    trainer : Trainer
        Set before training begins; has `model`, `optimizer`, `history`, `epochs`, `batches` and `stop_training`.
    """

    trainer: Trainer

    def on_train_begin(self) -> None:
        """Before the first epoch."""

    def on_train_end(self) -> None:
        """After the last epoch, also if training failed."""

    def on_epoch_begin(self, epoch: int) -> None:
        """Before an epoch, counted from 0."""

    def on_batch_end(self, batch: int, logs: Logs) -> None:
        """After the optimiser's step; `logs` has the batch's loss and metrics."""

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        """After an epoch and its validation; `logs` has means over the epoch."""


class Monitor(Callback):
    """Base of the callbacks that follow one number: is it better than the best so far?

    Parameters
    ----------
    monitor : str
        Name in the logs: "loss", "val_loss", "val_accuracy", ...
    mode : "auto", "min" or "max"
        "auto" takes "max" for names that end in "accuracy".
    min_delta : float
        Smallest change that counts.
    """

    def __init__(self, monitor: str, mode: str = "auto", min_delta: float = 0.0) -> None:
        self.monitor, self.min_delta = monitor, abs(min_delta)
        one_of("mode", mode, MODES)
        self.sign = -1 if mode == "max" or (mode == "auto" and monitor.endswith("accuracy")) else 1
        self.best = math.inf * self.sign

    def value(self, logs: Logs) -> float:
        """Return the number."""
        if self.monitor not in logs:
            hint = "; it needs validation data" if self.monitor.startswith("val_") else ""
            raise ArgumentError(f"monitor={self.monitor!r} is not among {', '.join(map(repr, logs))}{hint}")
        return logs[self.monitor]

    def improves(self, value: float) -> bool:
        """Return True, and remember the value, if it is the best."""
        if self.sign * value < self.sign * self.best - self.min_delta:
            self.best = value
            return True
        return False


class EarlyStopping(Monitor):
    """Stop when a number has not improved for some epochs.

    Parameters
    ----------
    monitor, min_delta, mode
        As :class:`Monitor`.
    patience : int
        Epochs without improvement before training stops.
    baseline : float, optional
        The number must be better than this, too.
    restore_best_weights : bool
        Whether the model ends with the weights of its best epoch.

    Attributes
    ----------
    stopped_epoch : int or None
    best_epoch : int or None
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        min_delta: float = 0.0,
        patience: int = 0,
        mode: str = "auto",
        baseline: float | None = None,
        restore_best_weights: bool = False,
    ) -> None:
        super().__init__(monitor, mode, min_delta)
        self.patience, self.restore_best_weights, self.baseline = patience, restore_best_weights, baseline
        self.stopped_epoch: int | None = None
        self.best_epoch: int | None = None
        self._weights: Any = None

    def on_train_begin(self) -> None:
        """Start anew."""
        self.best = math.inf * self.sign if self.baseline is None else self.baseline
        self.waited = 0
        self.stopped_epoch = self.best_epoch = self._weights = None

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        """Compare, and stop if patience has run out."""
        if self.improves(self.value(logs)):
            self.waited, self.best_epoch = 0, epoch
            if self.restore_best_weights:
                self._weights = self.trainer.model.state_dict()
            return
        self.waited += 1
        if self.waited >= self.patience:
            self.stopped_epoch, self.trainer.stop_training = epoch, True

    def on_train_end(self) -> None:
        """Put back the best weights."""
        if self._weights is not None:
            self.trainer.model.load_state_dict(self._weights)


class ModelCheckpoint(Monitor):
    """Write the model's state dict to a .npz file after each epoch.

    Parameters
    ----------
    filepath : str or path
        May hold fields: "model-{epoch:02d}-{val_loss:.3f}.npz", epochs counted from 1.
    monitor, mode
        As :class:`Monitor`; looked at with save_best_only.
    save_best_only : bool
        Write only when the number improves.
    """

    def __init__(
        self, filepath: Any, monitor: str = "val_loss", save_best_only: bool = False, mode: str = "auto"
    ) -> None:
        super().__init__(monitor, mode)
        self.filepath, self.save_best_only = str(filepath), save_best_only

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        """Write the file."""
        if self.save_best_only and not self.improves(self.value(logs)):
            return
        try:
            path = self.filepath.format(**{**logs, "epoch": epoch + 1})
        except KeyError as error:
            raise ArgumentError(
                f"filepath={self.filepath!r} names {error}, which is not among {sorted(logs)}"
            ) from None
        save_weights(self.trainer.model, path)


class CSVLogger(Callback):
    """Write a line per epoch to a CSV file.

    Parameters
    ----------
    filename : str or path
    separator : str
    append : bool
        Go on in a file that is there.
    """

    def __init__(self, filename: Any, separator: str = ",", append: bool = False) -> None:
        self.path, self.separator, self.append = Path(filename), separator, append

    def on_train_begin(self) -> None:
        """Open the file."""
        self._file = self.path.open("a" if self.append else "w", newline="", encoding="utf-8")
        self._header = not (self.append and self.path.stat().st_size)

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        """Write the line, and the names ahead of the first."""
        writer = csv.writer(self._file, delimiter=self.separator, lineterminator="\n")
        if self._header:
            writer.writerow(["epoch", *logs])
            self._header = False
        writer.writerow([epoch, *logs.values()])
        self._file.flush()

    def on_train_end(self) -> None:
        """Close the file."""
        self._file.close()


class LearningRateScheduler(Callback):
    """Set the learning rate by a schedule.

    Parameters
    ----------
    schedule : function of (epoch, learning rate), or LRScheduler
        The function gives the learning rate of an epoch from that of the epoch before; a schedule object steps after
        each epoch.
    """

    def __init__(self, schedule: Callable[[int, float], float] | LRScheduler) -> None:
        self.schedule = schedule

    def on_epoch_begin(self, epoch: int) -> None:
        """Ask the function."""
        if not isinstance(self.schedule, LRScheduler):
            for group in self.trainer.optimizer.param_groups:
                group["lr"] = float(self.schedule(epoch, group["lr"]))

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        """Step the schedule."""
        if isinstance(self.schedule, LRScheduler):
            self.schedule.step()


class ReduceLROnPlateau(Monitor):
    """Multiply the learning rate by a factor when a number has not improved for some epochs.

    Parameters
    ----------
    monitor, min_delta, mode
        As :class:`Monitor`.
    factor : float
        Below 1.
    patience : int
        Epochs without improvement before it does.
    cooldown : int
        Epochs to wait after it did.
    min_lr : float
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        factor: float = 0.1,
        patience: int = 10,
        mode: str = "auto",
        min_delta: float = 1e-4,
        cooldown: int = 0,
        min_lr: float = 0.0,
    ) -> None:
        super().__init__(monitor, mode, min_delta)
        if not 0 < factor < 1:
            raise ArgumentError(f"factor must lie between 0 and 1, not {factor!r}")
        self.factor, self.patience, self.cooldown, self.min_lr = factor, patience, cooldown, min_lr
        self.waited = self.resting = 0

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        """Compare, and reduce if patience has run out."""
        better = self.improves(self.value(logs))
        if self.resting:
            self.resting -= 1
            self.waited = 0
            return
        self.waited = 0 if better else self.waited + 1
        if self.waited >= max(self.patience, 1):
            for group in self.trainer.optimizer.param_groups:
                group["lr"] = max(group["lr"] * self.factor, self.min_lr)
            self.waited, self.resting = 0, self.cooldown


class TerminateOnNaN(Callback):
    """Stop when the loss of a batch is NaN or infinite."""

    def on_batch_end(self, batch: int, logs: Logs) -> None:
        """Look at the loss."""
        if not math.isfinite(logs["loss"]):
            print(f"batch {batch}: the loss is {logs['loss']}, training stops", file=sys.stderr)
            self.trainer.stop_training = True


class ProgressBar(Callback):
    """Print a line per epoch; while it runs, show a bar if standard error is a terminal and tqdm is installed."""

    def __init__(self) -> None:
        self._bar: Any = None

    def on_epoch_begin(self, epoch: int) -> None:
        """Start the bar."""
        self._bar = _bar(self.trainer.batches, f"epoch {epoch + 1}/{self.trainer.epochs}")

    def on_batch_end(self, batch: int, logs: Logs) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.set_postfix({name: f"{value:.4f}" for name, value in logs.items()}, refresh=False)
            self._bar.update()

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        """Print the line."""
        self.on_train_end()
        history = self.trainer.history
        shown = [f"{name} {value:.4f}" for name, value in logs.items() if name != "learning_rate"]
        speed = f"{history.images_per_second[-1]:,.0f} images/s"
        start = f"epoch {epoch + 1}/{self.trainer.epochs}"
        print("  ".join([start, f"{history.seconds[-1]:.1f} s", speed, *shown]), flush=True)

    def on_train_end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class TensorBoard(Callback):
    """Write the numbers of each epoch for TensorBoard.

    Parameters
    ----------
    log_dir : str or path
    writer : object, optional
        With ``add_scalar(tag, value, step)`` and ``close()``; otherwise the SummaryWriter of an installed tensorboardX
        or PyTorch.

    Raises
    ------
    MissingDependencyError
        If there is no writer.
    """

    def __init__(self, log_dir: Any = "logs", writer: Any = None) -> None:
        self.writer = _summary_writer(str(log_dir)) if writer is None else writer

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        """Write the numbers; training and validation in one chart."""
        for name, value in logs.items():
            part = "validation" if name.startswith("val_") else "training"
            self.writer.add_scalar(f"{name.removeprefix('val_')}/{part}", value, epoch)

    def on_train_end(self) -> None:
        """Close the file."""
        self.writer.close()


def _bar(total: int, description: str) -> Any:
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, desc=description, unit="batch", leave=False)


def _summary_writer(directory: str) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingDependencyError(
                "TensorBoard needs a writer: pip install tensorboardX, or tensorboard next to PyTorch"
            ) from None
    return SummaryWriter(directory)
