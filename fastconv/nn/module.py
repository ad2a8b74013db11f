"""Parameters, and modules that hold them: a forward pass that keeps what the backward pass needs.

A module is a gate: ``y = module(x)`` and later ``x_grad = module.backward(y_grad)``, which also adds the gradients of
the module's parameters to their ``grad``. There is no graph: containers call their members in the reverse order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import FLOATING
from ..errors import ArgumentError, ArgumentTypeError, DTypeError, FastconvError, UnsupportedError
from ..geometry import ReceptiveField

Array = Any
Shape = tuple[int, ...]


class BackwardError(FastconvError, RuntimeError):
    """A backward pass was asked for without the forward pass that it needs."""


def floating_dtype(dtype: Any) -> np.dtype:
    """Return the dtype of a module's parameters; None means float32."""
    try:
        found = np.dtype(np.float32 if dtype is None else dtype)
    except TypeError:
        raise DTypeError(f"dtype must be one of {', '.join(FLOATING)}, not {dtype!r}") from None
    if found.name not in FLOATING:
        raise DTypeError(f"dtype must be one of {', '.join(FLOATING)}, not {found}")
    return found


class Parameter:
    """An array that training changes, and its gradient.

    Attributes
    ----------
    data : numpy.ndarray
    grad : numpy.ndarray or None
        Sum of the gradients of all backward passes since :meth:`zero_grad`; None if there was none.
    requires_grad : bool
        False freezes the parameter: its gradient is not computed, and optimisers leave it alone.
    """

    def __init__(self, data: np.ndarray, requires_grad: bool = True) -> None:
        self.data = data
        self.grad: np.ndarray | None = None
        self.requires_grad = requires_grad

    @property
    def shape(self) -> Shape:
        """Shape of the data."""
        return self.data.shape

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.data.size

    def accumulate(self, grad: np.ndarray) -> None:
        """Add a gradient. The first one is taken over, not copied: it must be an array of its own."""
        if self.grad is None:
            self.grad = grad
        else:
            self.grad += grad

    def zero_grad(self) -> None:
        """Forget the gradient."""
        self.grad = None

    def __repr__(self) -> str:
        frozen = "" if self.requires_grad else ", requires_grad=False"
        return f"Parameter(shape={self.shape}, dtype={self.data.dtype}{frozen})"


class Module:
    """Base of layers and networks.

    A subclass assigns parameters and member modules as attributes and writes :meth:`forward` and :meth:`backward`;
    for :func:`~fastconv.nn.summary` also :meth:`output_shape`, unless the forward pass may run on zeros for it.
    Names of parameters are paths of attributes, as in PyTorch: "body.0.weight".
    """

    buffer_names: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.training = True
        self._saved: Any = None

    # --- computing ---

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return :meth:`forward`."""
        return self.forward(*args, **kwargs)

    def forward(self, x: Array) -> Array:
        """Return the output for the input x; in training mode, keep what :meth:`backward` needs."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def backward(self, grad_output: Array, *, input_grad: bool = True) -> Array | None:
        """Add the gradients of the parameters to their ``grad`` and return that of the input.

        Parameters
        ----------
        grad_output : array, of the output's shape
        input_grad : bool
            False leaves out the gradient of the input, and None is returned: the first layer of a network has no
            use for it.

        Raises
        ------
        BackwardError
            Without a forward pass in training mode since the last backward pass.
        """
        raise NotImplementedError(f"{type(self).__name__} has no backward")

    def keep(self, saved: Any) -> None:
        """Keep what the backward pass needs; in evaluation mode, nothing."""
        self._saved = saved if self.training else None

    def kept(self) -> Any:
        """Return what the forward pass kept, and let go of it."""
        saved, self._saved = self._saved, None
        if saved is None:
            raise BackwardError(
                f"backward of {type(self).__name__} needs a forward pass before it, in training mode (train()); "
                "one forward pass serves one backward pass"
            )
        return saved

    # --- shapes ---

    def output_shape(self, input_shape: Shape) -> Shape:
        """Return the shape of the output for an input of a shape, batch included; unless overridden, by running."""
        dtype = next((p.data.dtype for p in self.parameters()), np.dtype(np.float32))
        with evaluating(self):
            return self.forward(np.zeros(input_shape, dtype)).shape

    def flops(self, input_shape: Shape) -> int:
        """Return the floating-point operations of convolutions and matrix products in a forward pass."""
        return 0

    def receptive_field(self, field: ReceptiveField | None, input_shape: Shape) -> ReceptiveField | None:
        """Return what an output element sees of the network's input, given what an input element sees."""
        return field

    # --- parameters ---

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """Iterate over member modules and their names."""
        return ((name, value) for name, value in vars(self).items() if isinstance(value, Module))

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """Iterate over this module (named "") and all modules in it, however deep."""
        yield prefix, self
        for name, child in self.named_children():
            yield from child.named_modules(_path(prefix, name))

    def modules(self) -> Iterator[Module]:
        """Iterate over this module and all modules in it."""
        return (module for _, module in self.named_modules())

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Iterate over all parameters and their names; one that is used in two places comes once."""
        seen: set[int] = set()
        for prefix, module in self.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Parameter) and id(value) not in seen:
                    seen.add(id(value))
                    yield _path(prefix, name), value

    def parameters(self) -> Iterator[Parameter]:
        """Iterate over all parameters."""
        return (parameter for _, parameter in self.named_parameters())

    def named_buffers(self) -> Iterator[tuple[str, np.ndarray]]:
        """Iterate over arrays that are part of the state but not trained, such as running averages."""
        for prefix, module in self.named_modules():
            for name in module.buffer_names:
                if getattr(module, name) is not None:
                    yield _path(prefix, name), getattr(module, name)

    def buffers(self) -> Iterator[np.ndarray]:
        """Iterate over the buffers."""
        return (buffer for _, buffer in self.named_buffers())

    def is_trainable(self) -> bool:
        """Return True if some parameter's gradient is wanted."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters():
            parameter.zero_grad()

    def requires_grad_(self, requires_grad: bool = True) -> Module:
        """Freeze (False) or release (True) all parameters; return self."""
        for parameter in self.parameters():
            parameter.requires_grad = requires_grad
            if not requires_grad:
                parameter.grad = None
        return self

    # --- modes ---

    def train(self, mode: bool = True) -> Module:
        """Set training mode here and in all members; return self."""
        for module in self.modules():
            module.training = mode
            if not mode:
                module._saved = None
        return self

    def eval(self) -> Module:
        """Set evaluation mode: running averages instead of batch averages, no dropout, nothing kept; return self."""
        return self.train(False)

    def apply(self, function: Callable[[Module], Any]) -> Module:
        """Call a function with every member and then self; return self."""
        for _, child in self.named_children():
            child.apply(function)
        function(self)
        return self

    def astype(self, dtype: Any) -> Module:
        """Convert parameters and floating-point buffers to a dtype, in this module itself; return it."""
        dtype = floating_dtype(dtype)
        for parameter in self.parameters():
            parameter.data, parameter.grad = parameter.data.astype(dtype), None
        for module in self.modules():
            for name in module.buffer_names:
                buffer = getattr(module, name)
                if buffer is not None and buffer.dtype.kind == "f":
                    setattr(module, name, buffer.astype(dtype))
        return self

    def double(self) -> Module:
        """Convert to float64; return self."""
        return self.astype(np.float64)

    def float(self) -> Module:
        """Convert to float32; return self."""
        return self.astype(np.float32)

    # --- state ---

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return copies of all parameters and buffers under PyTorch's names.

        ``{k: torch.from_numpy(v) for k, v in state.items()}`` loads into the same network in PyTorch.
        """
        return {name: array.copy() for name, array in self._state().items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Copy parameters and buffers from a state dict of NumPy arrays or PyTorch tensors.

        Parameters
        ----------
        state_dict : mapping of names to arrays
        strict : bool
            Whether a name that is missing or not known here is an error. Shapes must always agree.

        Raises
        ------
        ArgumentError
            Listing every missing and unexpected name and every shape that differs. Nothing has been loaded then.
        """
        if not isinstance(state_dict, Mapping):
            raise ArgumentTypeError(f"state_dict must be a mapping of names to arrays, not {type(state_dict).__name__}")
        own = self._state()
        given = {name: _as_array(name, state_dict[name]) for name in own if name in state_dict}
        problems = [
            f"{name} has shape {array.shape}, expected {own[name].shape}"
            for name, array in given.items()
            if array.shape != own[name].shape
        ]
        if strict:
            problems += _listed("missing", [name for name in own if name not in given])
            problems += _listed("unexpected", [name for name in state_dict if name not in own])
        if problems:
            raise ArgumentError(f"state_dict does not fit this {type(self).__name__}: {'; '.join(problems)}")
        for name, array in given.items():
            np.copyto(own[name], array, casting="unsafe")

    def _state(self) -> dict[str, np.ndarray]:
        """Return the arrays themselves, module by module as in PyTorch: parameters before buffers."""
        found: dict[str, np.ndarray] = {}
        for prefix, module in self.named_modules():
            own = {name: p.data for name, p in vars(module).items() if isinstance(p, Parameter)}
            own |= {name: getattr(module, name) for name in module.buffer_names}
            found |= {_path(prefix, name): array for name, array in own.items() if array is not None}
        return found

    # --- looks ---

    def extra_repr(self) -> str:
        """Return what stands between the brackets of a layer's repr."""
        return ""

    def __repr__(self) -> str:
        children = [f"({name}): {child!r}".replace("\n", "\n  ") for name, child in self.named_children()]
        if not children:
            return f"{type(self).__name__}({self.extra_repr()})"
        return "\n  ".join([f"{type(self).__name__}(", *children]) + "\n)"


@contextmanager
def evaluating(module: Module) -> Iterator[None]:
    """Set evaluation mode inside the block, and put back each member's own mode after it."""
    before = [(member, member.training) for member in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for member, training in before:
            member.training, member._saved = training, None


def _path(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _listed(what: str, names: list[str]) -> list[str]:
    return [f"{what}: {', '.join(names)}"] if names else []


def _as_array(name: str, value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach()
    if isinstance(value, (int, float, np.generic)):
        return np.asarray(value)
    library = arrays.library_of(name, value)
    if library.device != "cpu":
        raise UnsupportedError(f"{name} is an array of {library.name}; layers compute on the CPU so far")
    return library.adopt(name, value)
