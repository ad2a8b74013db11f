"""Networks from modules: one after the other, side by side, and around a shortcut. Gradients add where paths meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ..errors import ArgumentTypeError, ShapeError
from ..geometry import DATA_FORMATS, ReceptiveField, one_of
from .activations import Identity
from .module import Array, Module, Shape

# Visits (path, module, input shape, output shape, receptive field) of each layer.
Visit = Callable[[str, Module, Shape, Shape, ReceptiveField | None], None]


class Container(Module):
    """A module that is nothing but its members, so that shapes can be followed through it without computing."""

    def follow(self, path: str, shape: Shape, field: ReceptiveField | None, visit: Visit) -> Any:
        """Follow an input shape through the members; return (output shape, receptive field)."""
        raise NotImplementedError

    def output_shape(self, input_shape: Shape) -> Shape:
        """Return the shape of the output."""
        return follow(self, "", tuple(input_shape), None, lambda *_: None)[0]

    def flops(self, input_shape: Shape) -> int:
        """Return the sum over the members."""
        total = 0

        def add(path: str, module: Module, shape: Shape, output: Shape, field: ReceptiveField | None) -> None:
            nonlocal total
            total += module.flops(shape)

        follow(self, "", tuple(input_shape), None, add)
        return total


def follow(
    module: Module, path: str, shape: Shape, field: ReceptiveField | None, visit: Visit
) -> tuple[Shape, ReceptiveField | None]:
    """Follow an input shape through a module, visiting each layer; return (output shape, receptive field)."""
    if isinstance(module, Container):
        return module.follow(path, shape, field, visit)
    output, seen = module.output_shape(shape), module.receptive_field(field, shape)
    visit(path, module, shape, output, seen)
    return output, seen


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


class _List(Container):
    """Members under names, by default "0", "1", ..., that can be looked up, replaced and counted."""

    def __init__(self, *modules: Any) -> None:
        super().__init__()
        first = modules[0] if len(modules) == 1 else None
        named = first.items() if isinstance(first, Mapping) else ((str(i), m) for i, m in enumerate(modules))
        for name, module in named:
            self._check(name, module)
            setattr(self, name, module)

    def _check(self, name: Any, module: Any) -> None:
        if not isinstance(module, Module):
            raise ArgumentTypeError(f"member {name} of {type(self).__name__} must be a module, not {module!r}")
        if not isinstance(name, str) or "." in name or (hasattr(self, name) and name not in self._names()):
            raise ArgumentTypeError(f"a member of {type(self).__name__} cannot be called {name!r}")

    def _names(self) -> list[str]:
        return [name for name, _ in self.named_children()]

    def __len__(self) -> int:
        return len(self._names())

    def __iter__(self) -> Iterator[Module]:
        return (child for _, child in self.named_children())

    def __getitem__(self, index: Any) -> Any:
        return getattr(self, self._names()[index])

    def __setitem__(self, index: int, module: Module) -> None:
        name = self._names()[index]
        self._check(name, module)
        setattr(self, name, module)

    def append(self, module: Module) -> _List:
        """Add a member at the end; return self."""
        name = str(len(self))
        self._check(name, module)
        setattr(self, name, module)
        return self


class Sequential(_List):
    """Modules one after the other.

    Parameters
    ----------
    *modules : Module, or one mapping of names to modules (such as an OrderedDict)

    Examples
    --------
    >>> from fastconv import nn
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
    >>> y = model(np.zeros((2, 1, 8, 8), np.float32))
    >>> model.backward(np.ones_like(y), input_grad=False)
    >>> model[0].weight.grad.shape
    (4, 1, 3, 3)
    """

    def __getitem__(self, index: Any) -> Any:
        """Return a member, or for a slice a Sequential of the same members under the same names."""
        if isinstance(index, slice):
            return Sequential(dict(list(self.named_children())[index]))
        return super().__getitem__(index)

    def forward(self, x: Array) -> Array:
        """Pass x through all members."""
        for module in self:
            x = module(x)
        return x

    def backward(self, grad_output: Array, *, input_grad: bool = True) -> Array | None:
        """Pass the gradient back, as far as somebody needs it.

        With ``input_grad=False`` members ahead of the first trainable parameter are left alone, and the member that
        holds it does not compute the gradient of its input.
        """
        members = list(self)
        if not members:
            return grad_output if input_grad else None
        needed = input_grad
        wants = []
        for module in members:
            wants.append(needed)
            needed = needed or module.is_trainable()
        grad: Array | None = grad_output
        for module, want in zip(reversed(members), reversed(wants)):
            grad = module.backward(grad, input_grad=want)
            if not want:
                break
        return grad if input_grad else None

    def follow(self, path: str, shape: Shape, field: ReceptiveField | None, visit: Visit) -> Any:
        """Follow a shape through one member after the other."""
        for name, module in self.named_children():
            shape, field = follow(module, _below(path, name), shape, field, visit)
        return shape, field


class Residual(Container):
    """body(x) + shortcut(x): the block of residual networks (He et al., 2015).

    Parameters
    ----------
    body : Module
    shortcut : Module, optional
        The identity unless given; a 1x1 convolution where body changes the shape.

    Examples
    --------
    >>> from fastconv import nn
    >>> block = nn.Residual(nn.Conv2d(8, 8, 3, padding=1))
    >>> block(np.zeros((2, 8, 5, 5), np.float32)).shape
    (2, 8, 5, 5)
    """

    def __init__(self, body: Module, shortcut: Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.shortcut = Identity() if shortcut is None else shortcut

    def forward(self, x: Array) -> Array:
        """Return body(x) + shortcut(x)."""
        y, short = self.body(x), self.shortcut(x)
        if y.shape != short.shape:
            raise ShapeError(f"body and shortcut of Residual must agree in shape, not give {y.shape} and {short.shape}")
        return y + short

    def backward(self, grad_output: Array, *, input_grad: bool = True) -> Array | None:
        """Return the sum of the gradients of both paths."""
        found = self.body.backward(grad_output, input_grad=input_grad)
        other = self.shortcut.backward(grad_output, input_grad=input_grad)
        return None if found is None or other is None else found + other

    def follow(self, path: str, shape: Shape, field: ReceptiveField | None, visit: Visit) -> Any:
        """Follow a shape through both paths; the field is the body's."""
        output, seen = follow(self.body, _below(path, "body"), shape, field, visit)
        short, _ = follow(self.shortcut, _below(path, "shortcut"), shape, field, visit)
        if output != short:
            raise ShapeError(f"body and shortcut of Residual must agree in shape, not give {output} and {short}")
        return output, seen


class Concat(_List):
    """All branches on the same input, their outputs joined along the channels: the inception block.

    Szegedy et al., "Going deeper with convolutions", 2014.

    Parameters
    ----------
    *branches : Module
    data_format : "channels_first" or "channels_last"

    Examples
    --------
    >>> from fastconv import nn
    >>> block = nn.Concat(nn.Conv2d(3, 4, 1), nn.Conv2d(3, 8, 3, padding="same"))
    >>> block(np.zeros((2, 3, 5, 5), np.float32)).shape
    (2, 12, 5, 5)
    """

    def __init__(self, *branches: Any, data_format: str = "channels_first") -> None:
        super().__init__(*branches)
        self.axis = 1 if one_of("data_format", data_format, DATA_FORMATS) == "channels_first" else -1

    def forward(self, x: Array) -> Array:
        """Return the joined outputs."""
        outputs = [branch(x) for branch in self]
        self.keep([y.shape[self.axis] for y in outputs])
        return np.concatenate(outputs, axis=self.axis)

    def backward(self, grad_output: Array, *, input_grad: bool = True) -> Array | None:
        """Give each branch its share of the gradient; return the sum of what comes back."""
        ends = np.cumsum(self.kept())
        found = None
        for branch, grad in zip(self, np.split(grad_output, ends[:-1], axis=self.axis)):
            came = branch.backward(grad, input_grad=input_grad)
            found = came if found is None or came is None else found + came
        return found

    def follow(self, path: str, shape: Shape, field: ReceptiveField | None, visit: Visit) -> Any:
        """Follow a shape through every branch; the field is the largest."""
        shapes, fields = [], []
        for name, branch in self.named_children():
            output, seen = follow(branch, _below(path, name), shape, field, visit)
            shapes.append(list(output))
            fields.append(seen)
        joined = shapes[0]
        joined[self.axis] = sum(output[self.axis] for output in shapes)
        known = [f for f in fields if f is not None]
        return tuple(joined), max(known, key=lambda f: f.size) if len(known) == len(fields) else None


class Flatten(Module):
    """Join the dimensions from start_dim to end_dim into one.

    Parameters
    ----------
    start_dim, end_dim : int
        By default all but the batch.
    """

    def __init__(self, start_dim: int = 1, end_dim: int = -1) -> None:
        super().__init__()
        self.start_dim, self.end_dim = start_dim, end_dim

    def forward(self, x: Array) -> Array:
        """Return x in its new shape, without a copy if its memory allows."""
        self.keep(x.shape)
        return x.reshape(self.output_shape(x.shape))

    def backward(self, grad_output: Array, *, input_grad: bool = True) -> Array | None:
        """Return the gradient in the input's shape."""
        shape = self.kept()
        return grad_output.reshape(shape) if input_grad else None

    def output_shape(self, input_shape: Shape) -> Shape:
        """Return the input's shape with the dimensions joined."""
        rank = len(input_shape)
        start, end = (d + rank if d < 0 else d for d in (self.start_dim, self.end_dim))
        if not 0 <= start <= end < rank:
            raise ShapeError(
                f"start_dim={self.start_dim} and end_dim={self.end_dim} name no dimensions of x of shape {input_shape}"
            )
        joined = int(np.prod(input_shape[start : end + 1], dtype=object))
        return (*input_shape[:start], joined, *input_shape[end + 1 :])

    def extra_repr(self) -> str:
        """Show the dimensions."""
        return f"start_dim={self.start_dim}, end_dim={self.end_dim}"
