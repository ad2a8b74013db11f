"""Learning-rate schedules: call ``step()`` after each epoch. Names and formulas are PyTorch's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..errors import ArgumentError, ArgumentTypeError
from ..geometry import integer
from .optim import Optimizer


class LRScheduler:
    """Base of the schedules: the learning rate of each group as a function of its first value and the epoch.

    Parameters
    ----------
    optimizer : Optimizer
        Its learning rates now are those of epoch 0.

    Attributes
    ----------
    last_epoch : int
        Steps made.
    base_lrs : list of float
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Optimizer):
            raise ArgumentTypeError(f"optimizer must be an optimiser of fastconv.nn, not {optimizer!r}")
        self.optimizer = optimizer
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        self.last_epoch = 0
        self._set()

    def rate(self, base: float, epoch: int, group: int) -> float:
        """Return the learning rate of a group in an epoch."""
        raise NotImplementedError

    def step(self) -> None:
        """Go to the next epoch."""
        self.last_epoch += 1
        self._set()

    def get_last_lr(self) -> list[float]:
        """Return the learning rate of each group now."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def _set(self) -> None:
        for i, (group, base) in enumerate(zip(self.optimizer.param_groups, self.base_lrs)):
            group["lr"] = self.rate(base, self.last_epoch, i)

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on."""
        return {"last_epoch": self.last_epoch, "base_lrs": list(self.base_lrs)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""
        self.last_epoch, self.base_lrs = state_dict["last_epoch"], list(state_dict["base_lrs"])
        self._set()


class StepLR(LRScheduler):
    """Multiply by `gamma` every `step_size` epochs."""

    def __init__(self, optimizer: Optimizer, step_size: int, gamma: float = 0.1) -> None:
        self.step_size, self.gamma = integer("step_size", step_size, 1), gamma
        super().__init__(optimizer)

    def rate(self, base: float, epoch: int, group: int) -> float:
        """Return base * gamma**(epoch // step_size)."""
        return base * self.gamma ** (epoch // self.step_size)


class ExponentialLR(LRScheduler):
    """Multiply by `gamma` every epoch."""

    def __init__(self, optimizer: Optimizer, gamma: float) -> None:
        self.gamma = gamma
        super().__init__(optimizer)

    def rate(self, base: float, epoch: int, group: int) -> float:
        """Return base * gamma**epoch."""
        return base * self.gamma**epoch


class CosineAnnealingLR(LRScheduler):
    """Follow half a cosine from the first value to `eta_min` in `T_max` epochs, and back again.

    Loshchilov & Hutter, "SGDR: stochastic gradient descent with warm restarts", 2016.
    """

    def __init__(self, optimizer: Optimizer, T_max: int, eta_min: float = 0.0) -> None:
        self.T_max, self.eta_min = integer("T_max", T_max, 1), eta_min
        super().__init__(optimizer)

    def rate(self, base: float, epoch: int, group: int) -> float:
        """Return eta_min + (base - eta_min) * (1 + cos(pi * epoch / T_max)) / 2."""
        return self.eta_min + (base - self.eta_min) * (1 + math.cos(math.pi * epoch / self.T_max)) / 2


class LambdaLR(LRScheduler):
    """Multiply the first value by a function of the epoch, or one function per group."""

    def __init__(self, optimizer: Optimizer, lr_lambda: Callable[[int], float] | list[Callable[[int], float]]) -> None:
        groups = len(optimizer.param_groups)
        self.lr_lambdas = lr_lambda if isinstance(lr_lambda, (list, tuple)) else [lr_lambda] * groups
        if len(self.lr_lambdas) != groups:
            raise ArgumentError(f"lr_lambda must be one function or {groups}, one per group, not {lr_lambda!r}")
        super().__init__(optimizer)

    def rate(self, base: float, epoch: int, group: int) -> float:
        """Return base * lr_lambda(epoch)."""
        return base * self.lr_lambdas[group](epoch)
