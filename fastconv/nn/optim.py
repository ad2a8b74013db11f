"""Optimisers: from gradients to the next parameters. Names, defaults and formulas are PyTorch's.

g is the gradient plus ``weight_decay * p``, t counts steps from 1; every operation is elementwise and in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..errors import ArgumentError, ArgumentTypeError
from .module import Parameter

State = dict[str, Any]


class Optimizer:
    """Base of the optimisers.

    Parameters
    ----------
    params : iterable of Parameter, or of dicts
        A dict has the parameters under "params" and options of their own, such as another "lr".
    **defaults
        Options of groups that do not have their own.

    Attributes
    ----------
    param_groups : list of dict
        Options by name and the parameters they hold for; a learning-rate schedule changes "lr" there.
    state : list of dict
        Per parameter, in order: the step count and averages.
    """

    def __init__(self, params: Any, **defaults: Any) -> None:
        if isinstance(params, Parameter) or not isinstance(params, Iterable):
            raise ArgumentTypeError(f"params must be an iterable of parameters or of dicts, not {params!r}")
        given = list(params)
        if not given:
            raise ArgumentError("params must hold at least one parameter, not none")
        groups = given if isinstance(given[0], Mapping) else [{"params": given}]
        self.param_groups: list[dict[str, Any]] = []
        for group in groups:
            own = group["params"]
            members = [own] if isinstance(own, Parameter) else list(own)
            if not all(isinstance(member, Parameter) for member in members):
                raise ArgumentTypeError("params must hold parameters, as from model.parameters()")
            self.param_groups.append({**defaults, **group, "params": members})
        for group in self.param_groups:
            _check_options(group)
        everything = [p for group in self.param_groups for p in group["params"]]
        if len({id(p) for p in everything}) < len(everything):
            raise ArgumentError("params must hold each parameter once, not twice")
        self.state: list[State] = [{} for _ in everything]

    @property
    def lr(self) -> float:
        """Learning rate of the first group."""
        return self.param_groups[0]["lr"]

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.zero_grad()

    def step(self) -> None:
        """Change each parameter that has a gradient and is not frozen."""
        states = iter(self.state)
        for group in self.param_groups:
            for parameter in group["params"]:
                state = next(states)
                if parameter.grad is None or not parameter.requires_grad:
                    continue
                grad, p = parameter.grad, parameter.data
                if group["weight_decay"]:
                    grad = grad + group["weight_decay"] * p
                state["step"] = state.get("step", 0) + 1
                self.update(p, grad, state, group)

    def update(self, p: np.ndarray, grad: np.ndarray, state: State, group: dict[str, Any]) -> None:
        """Change one array in place."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the options of all groups and the state of all parameters."""
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        return {"param_groups": groups, "state": [_copied(state) for state in self.state]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict` of an optimiser of the same kind over the same parameters.

        Raises
        ------
        ArgumentError
            If the numbers of groups or parameters differ.
        """
        groups, states = state_dict["param_groups"], state_dict["state"]
        if len(groups) != len(self.param_groups) or len(states) != len(self.state):
            raise ArgumentError(
                f"state_dict has {len(groups)} groups and {len(states)} parameters, this optimiser "
                f"{len(self.param_groups)} and {len(self.state)}"
            )
        for own, given in zip(self.param_groups, groups):
            own.update(given)
        self.state = [_copied(state) for state in states]

    def __repr__(self) -> str:
        options = ", ".join(f"{k}={v}" for k, v in self.param_groups[0].items() if k != "params")
        return f"{type(self).__name__}({options})"


class SGD(Optimizer):
    """Stochastic gradient descent: v = momentum*v + (1 - dampening)*g; p -= lr*v, or lr*(g + momentum*v) (Nesterov).

    Parameters
    ----------
    params : iterable of Parameter or of dicts
    lr, momentum, dampening, weight_decay : float
    nesterov : bool
        Sutskever et al., "On the importance of initialization and momentum in deep learning", 2013.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ArgumentError("nesterov=True needs a momentum above 0 and no dampening")
        super().__init__(
            params, lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov
        )

    def update(self, p: np.ndarray, grad: np.ndarray, state: State, group: dict[str, Any]) -> None:
        """Make one step."""
        momentum = group["momentum"]
        if momentum:
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = grad.copy()
            else:
                state["momentum_buffer"] *= momentum
                state["momentum_buffer"] += (1 - group["dampening"]) * grad
            buffer = state["momentum_buffer"]
            grad = grad + momentum * buffer if group["nesterov"] else buffer
        p -= group["lr"] * grad


class RMSprop(Optimizer):
    """Gradients over a running root of their squares: s = alpha*s + (1 - alpha)*g**2; p -= lr*g / (sqrt(s) + eps).

    Hinton, "Neural networks for machine learning", lecture 6e, 2012. Keras's defaults are ``lr=1e-3, alpha=0.9,
    eps=1e-7`` (it calls alpha rho).

    Parameters
    ----------
    params : iterable of Parameter or of dicts
    lr, alpha, eps, weight_decay, momentum : float
    centered : bool
        Subtract the square of the average gradient from s.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
    ) -> None:
        super().__init__(
            params, lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum, centered=centered
        )

    def update(self, p: np.ndarray, grad: np.ndarray, state: State, group: dict[str, Any]) -> None:
        """Make one step."""
        square = _average(state, "square_avg", np.square(grad), group["alpha"])
        if group["centered"]:
            mean = _average(state, "grad_avg", grad.copy(), group["alpha"])
            root = np.sqrt(square - mean * mean)
        else:
            root = np.sqrt(square)
        root += group["eps"]
        np.divide(grad, root, out=root)
        if group["momentum"]:
            buffer = state.setdefault("momentum_buffer", np.zeros_like(p))
            buffer *= group["momentum"]
            buffer += root
            p -= group["lr"] * buffer
        else:
            root *= group["lr"]
            p -= root


class Adadelta(Optimizer):
    """Steps whose size follows earlier steps: d = sqrt(u + eps) / sqrt(s + eps) * g; p -= lr*d.

    s and u are running averages of g**2 and d**2 (Zeiler, "ADADELTA: an adaptive learning rate method", 2012).

    Parameters
    ----------
    params : iterable of Parameter or of dicts
    lr, rho, eps, weight_decay : float
    """

    def __init__(
        self, params: Any, lr: float = 1.0, rho: float = 0.9, eps: float = 1e-6, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, lr=lr, rho=rho, eps=eps, weight_decay=weight_decay)

    def update(self, p: np.ndarray, grad: np.ndarray, state: State, group: dict[str, Any]) -> None:
        """Make one step."""
        square = _average(state, "square_avg", np.square(grad), group["rho"])
        steps = state.setdefault("acc_delta", np.zeros_like(p))
        delta = np.sqrt((steps + group["eps"]) / (square + group["eps"]))
        delta *= grad
        _average(state, "acc_delta", np.square(delta), group["rho"])
        delta *= group["lr"]
        p -= delta


class Adam(Optimizer):
    """Averages of gradients over averages of their squares, corrected for their start at zero.

    m = b1*m + (1 - b1)*g, s = b2*s + (1 - b2)*g**2;
    p -= lr * m/(1 - b1**t) / (sqrt(s/(1 - b2**t)) + eps) (Kingma & Ba, "Adam", 2014).

    Parameters
    ----------
    params : iterable of Parameter or of dicts
    lr : float
    betas : (float, float)
    eps, weight_decay : float
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def update(self, p: np.ndarray, grad: np.ndarray, state: State, group: dict[str, Any]) -> None:
        """Make one step."""
        mean, root = _moments(grad, state, group)
        np.divide(mean, root, out=root)
        root *= group["lr"] / (1 - group["betas"][0] ** state["step"])
        p -= root


class NAdam(Optimizer):
    """Adam with Nesterov's momentum (Dozat, "Incorporating Nesterov momentum into Adam", 2016).

    Parameters
    ----------
    params : iterable of Parameter or of dicts
    lr : float
    betas : (float, float)
    eps, weight_decay, momentum_decay : float
    """

    def __init__(
        self,
        params: Any,
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_decay: float = 4e-3,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, momentum_decay=momentum_decay)

    def update(self, p: np.ndarray, grad: np.ndarray, state: State, group: dict[str, Any]) -> None:
        """Make one step."""
        mean, root = _moments(grad, state, group)
        now, after = (
            group["betas"][0] * (1 - 0.5 * 0.96 ** (t * group["momentum_decay"]))
            for t in (state["step"], state["step"] + 1)
        )
        state["mu_product"] = product = state.get("mu_product", 1.0) * now
        change = grad * ((1 - now) / (1 - product))
        change += mean * (after / (1 - product * after))
        change /= root
        change *= group["lr"]
        p -= change


def _average(state: State, name: str, values: np.ndarray, decay: float) -> np.ndarray:
    """Move a running average towards `values`, which is used up."""
    average = state.setdefault(name, np.zeros_like(values))
    average *= decay
    values *= 1 - decay
    average += values
    return average


def _moments(grad: np.ndarray, state: State, group: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return Adam's m, and sqrt(s / (1 - b2**t)) + eps as a fresh array."""
    first, second = group["betas"]
    mean = _average(state, "exp_avg", grad.copy(), first)
    root = np.sqrt(_average(state, "exp_avg_sq", np.square(grad), second))
    root /= math.sqrt(1 - second ** state["step"])
    root += group["eps"]
    return mean, root


def _check_options(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "momentum", "weight_decay", "momentum_decay"):
        value = group.get(name, 0.0)
        if not isinstance(value, (int, float)) or not value >= 0:
            raise ArgumentError(f"{name} must be a number of at least 0, not {value!r}")
    for name in ("alpha", "rho"):
        if not 0 <= group.get(name, 0.0) <= 1:
            raise ArgumentError(f"{name} must lie between 0 and 1, not {group[name]!r}")
    if "betas" in group and not all(0 <= beta < 1 for beta in group["betas"]):
        raise ArgumentError(f"betas must lie between 0 and 1, not {group['betas']!r}")


def _copied(state: Mapping[str, Any]) -> State:
    return {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in state.items()}
