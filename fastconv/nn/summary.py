"""The table of a network: layers, output shapes, parameters, receptive fields and operations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import ArgumentError
from ..geometry import ReceptiveField, Sizes, integer, shape
from .containers import follow
from .module import Module, Shape


@dataclass(frozen=True)
class Row:
    """One layer of a :class:`Summary`; shapes are without the batch."""

    name: str
    type: str
    output_shape: Shape
    parameters: int
    trainable: int
    receptive_field: Sizes | None
    flops: int


@dataclass(frozen=True)
class Summary:
    """A network's table; ``print`` shows it.

    Attributes
    ----------
    rows : tuple of Row
    input_shape : tuple of int
        Without the batch.
    total_params, trainable_params, non_trainable_params : int
        A parameter in two places counts once.
    flops : int
        Of convolutions and matrix products in the forward pass of one sample.
    """

    rows: tuple[Row, ...]
    input_shape: Shape
    total_params: int
    trainable_params: int
    flops: int

    @property
    def non_trainable_params(self) -> int:
        """Frozen parameters."""
        return self.total_params - self.trainable_params

    def __str__(self) -> str:
        table = [("Layer (type)", "Output shape", "Param #", "Receptive field", "FLOPs")]
        table += [
            (
                f"{row.name} ({row.type})" if row.name else row.type,
                f"(N, {', '.join(map(str, row.output_shape))})",
                f"{row.parameters:,}",
                "-" if row.receptive_field is None else "x".join(map(str, row.receptive_field)),
                f"{row.flops:,}",
            )
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in table) for i in range(5)]
        lines = ["  ".join(_aligned(line, widths)).rstrip() for line in table]
        width = max(map(len, lines))
        totals = [
            f"Total params: {self.total_params:,}",
            f"Trainable params: {self.trainable_params:,}",
            f"Non-trainable params: {self.non_trainable_params:,}",
            f"FLOPs per sample: {self.flops:,}",
        ]
        return "\n".join([lines[0], "=" * width, *lines[1:], "=" * width, *totals])

    __repr__ = __str__


def _aligned(line: tuple[str, ...], widths: list[int]) -> Iterable[str]:
    return (text.ljust(width) if i < 2 else text.rjust(width) for i, (text, width) in enumerate(zip(line, widths)))


def summary(model: Module, input_shape: Shape) -> Summary:
    """Follow an input through a model without computing anything, and return the table of what its layers do.

    Parameters
    ----------
    model : Module
    input_shape : sequence of int
        Of one sample, without the batch: (C, *spatial), (*spatial, C) for channels_last, or (features,).

    Returns
    -------
    Summary
        To print. The receptive field of a layer is what one element of its output sees of the input; a layer without
        a fixed one, such as a linear layer, shows "-". FLOPs count multiplications and additions.

    Raises
    ------
    ShapeError, ArgumentError
        If the input does not fit the model.

    Examples
    --------
    >>> from fastconv import nn
    >>> model = nn.Sequential(nn.Conv2d(1, 32, 3, activation="relu"), nn.MaxPool2d(2))
    >>> print(nn.summary(model, (1, 28, 28)))
    Layer (type)   Output shape     Param #  Receptive field    FLOPs
    =================================================================
    0 (Conv2d)     (N, 32, 26, 26)      320              3x3  389,376
    1 (MaxPool2d)  (N, 32, 13, 13)        0              4x4        0
    =================================================================
    Total params: 320
    Trainable params: 320
    Non-trainable params: 0
    FLOPs per sample: 389,376
    """
    sample = shape("input_shape", input_shape)
    if not sample:
        raise ArgumentError("input_shape must have at least one dimension besides the batch, not ()")
    for n in sample:
        integer("input_shape", n, 1)
    rows: list[Row] = []

    def visit(path: str, module: Module, before: Shape, after: Shape, field: ReceptiveField | None) -> None:
        sizes = [(p.size, p.requires_grad) for p in module.parameters()]
        rows.append(
            Row(
                path,
                type(module).__name__,
                tuple(after[1:]),
                sum(size for size, _ in sizes),
                sum(size for size, trained in sizes if trained),
                None if field is None else field.size,
                module.flops(before),
            )
        )

    spatial_dims = len(sample) - 1
    follow(model, "", (1, *sample), ReceptiveField.start(spatial_dims) if spatial_dims else None, visit)
    parameters = list(model.parameters())
    return Summary(
        tuple(rows),
        sample,
        sum(p.size for p in parameters),
        sum(p.size for p in parameters if p.requires_grad),
        sum(row.flops for row in rows),
    )
