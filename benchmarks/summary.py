"""Ratios to PyTorch from the panel's times: per cell, per kind of work against its target, and every single loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastconv import config
from fastconv.geometry import DATA_FORMATS, DIRECTIONS

from .report import geometric_mean

Record = dict[str, Any]


@dataclass(frozen=True)
class Ratio:
    """PyTorch's time over fastconv's, above 1 is faster than PyTorch; with the range that the quantiles allow."""

    low: float
    value: float
    high: float

    def __str__(self) -> str:
        return f"{number(self.value)} ({number(self.low)}-{number(self.high)})"


def ratio(cell: Record, level: str, data_format: str | None = None, provider: str = "fastconv") -> Ratio | None:
    """Return a cell's ratio at a precision: the better layout of each side, or both in one; None if a side has none."""
    ours, theirs = (fastest(cell, level, side, data_format) for side in (provider, "torch"))
    if ours is None or theirs is None:
        return None
    return Ratio(theirs["ms_q20"] / ours["ms_q80"], theirs["ms"] / ours["ms"], theirs["ms_q80"] / ours["ms_q20"])


def fastest(cell: Record, level: str, provider: str, data_format: str | None = None) -> Record | None:
    """Return the entry of a provider that has the least time, in one layout or in its better one."""
    timed = [
        entry
        for entry in cell["entries"]
        if entry["ms"] is not None and level in entry["levels"] and entry["provider"] == provider
        and data_format in (None, entry["data_format"])
    ]  # fmt: skip
    return min(timed, key=lambda entry: entry["ms"], default=None)


def regret(cell: Record, level: str, data_format: str, promises: dict[str, str]) -> float | None:
    """Return the time of what auto takes over that of the fastest algorithm that keeps the promise of `level`.

    `promises` has the strictest promise that each algorithm keeps.
    """
    strict = config.PRECISIONS.index(level)
    timed = [e for e in cell["entries"] if e["provider"] == "fastconv" and e["ms"] is not None]
    ours = [e for e in timed if e["data_format"] == data_format and e["algorithm"] in promises]
    kept = [e["ms"] for e in ours if config.PRECISIONS.index(promises[e["algorithm"]]) <= strict]
    taken = [e["ms"] for e in ours if level in e["levels"]]
    return taken[0] / min(kept) if taken and cell["regret"] else None


# --- groups and their targets ----------------------------------------------------------------------------------

DENSE = ("first layer", "1x1", "3x3 stride 1", "other dense", "grouped")
_FORTH, _BACK = DIRECTIONS[:2], DIRECTIONS[1:]
_FIRST, _LAST = DATA_FORMATS


@dataclass(frozen=True)
class Group:
    """Cells that share a target. `data_format` is None for the better layout of each side.

    `provider` is who is held against PyTorch: "fastconv", or "fastconv.torch" for PyTorch's own model inside `enabled`.
    """

    name: str
    kinds: Sequence[str]
    directions: Sequence[str]
    targets: tuple[str, ...] = ()
    data_format: str | None = None
    provider: str = "fastconv"

    def cells(self, every: Iterable[Record]) -> list[Record]:
        """Return those that belong to it."""
        return [cell for cell in every if cell["kind"] in self.kinds and cell["direction"] in self.directions]


# Targets at "highest" and "high"; those that suppose AMX say so.
GROUPS = (
    Group("all layers and passes", (*DENSE, "depthwise"), DIRECTIONS, ("1.8", "2.8")),
    Group("3x3 stride 1, forward and input gradient", ("3x3 stride 1",), _FORTH, ("1.6 (AMX 2.2)", "2.2 (AMX 3.0)")),
    Group("1x1, forward and input gradient", ("1x1",), _FORTH, ("AMX 1.0", "AMX 1.5")),
    Group("other dense, forward and input gradient", ("other dense",), _FORTH, ("AMX 1.3", "AMX 2.0")),
    Group("grouped, forward and input gradient", ("grouped",), _FORTH),
    Group("weight gradient, all dense", DENSE, ("weight_grad",), ("AMX 1.4", "AMX 2.4")),
    Group("first layers, forward", ("first layer",), ("forward",), ("1.2",)),
    Group("first layers, weight gradient", ("first layer",), ("weight_grad",), ("3",)),
    Group("depthwise, forward", ("depthwise",), ("forward",), ("1.2",)),
    Group("depthwise, gradients", ("depthwise",), _BACK, ("5",)),
    Group("large max pool, forward, channels-first", ("large pool",), ("forward",), ("5",), _FIRST),
    Group("large max pool, forward, channels-last", ("large pool",), ("forward",), ("1.8",), _LAST),
    Group("large max pool, gradient", ("large pool",), ("input_grad",), ("3",)),
    Group("max pools of a few MB, forward, channels-first", ("pool",), ("forward",), ("1.5",), _FIRST),
    Group("max pools of a few MB, forward, channels-last", ("pool",), ("forward",), ("1.5",), _LAST),
    Group("max pools of a few MB, gradient, channels-first", ("pool",), ("input_grad",), ("2.5",), _FIRST),
    Group("max pools of a few MB, gradient, channels-last", ("pool",), ("input_grad",), ("2.5",), _LAST),
    Group("training step", ("training",), ("step",), ("1.6", "2.0")),
    Group("training step, in PyTorch inside enabled()", ("training",), ("step",), ("1.3",), None, "fastconv.torch"),
    Group("smallest convolution, forward", ("smallest",), ("forward",), ("1",)),
    Group("smallest convolution, gradients", ("smallest",), _BACK),
)


@dataclass(frozen=True)
class Mean:
    """A group's ratios at one precision; `alike` has the means in one layout on both sides."""

    count: int
    mean: float
    worst: float
    losses: int
    alike: dict[str, float | None]


def mean(group: Group, results: Record, level: str) -> Mean | None:
    """Return a group's ratios at a precision."""
    cells = group.cells(results["cells"])
    ratios = _ratios(cells, level, group.data_format, group.provider)
    if not ratios:
        return None
    alike = {name: _ratios(cells, level, name, group.provider) for name in DATA_FORMATS}
    return Mean(
        len(ratios),
        geometric_mean(ratios),
        min(ratios),
        sum(r < 1 for r in ratios),
        {name: geometric_mean(values) if values else None for name, values in alike.items()},
    )


def _ratios(cells: Iterable[Record], level: str, data_format: str | None, provider: str) -> list[float]:
    found = (ratio(cell, level, data_format, provider) for cell in cells)
    return [r.value for r in found if r is not None]


def levels(results: Record) -> list[str]:
    """Return the precisions that the results have, strictest first."""
    there = {level for cell in results["cells"] for entry in cell["entries"] for level in entry["levels"]}
    return [level for level in config.PRECISIONS if level in there]


def losses(results: Record) -> list[tuple[Ratio, str, Record]]:
    """Return every cell slower than PyTorch, as (ratio, precision, cell), the worst first."""
    found = [(ratio(cell, level), level, cell) for cell in results["cells"] for level in levels(results)]
    lost = [(r, level, cell) for r, level, cell in found if r is not None and r.value < 1]
    return sorted(lost, key=lambda item: item[0].value)


def wrongs(results: Record) -> list[str]:
    """Return what was not timed because it was wrong or failed."""
    bad = [(cell, entry) for cell in results["cells"] for entry in cell["entries"] if entry["status"] != "ok"]
    return [f"{name(c)}: {who(e)} {e['status']}: {e['note']}" for c, e in bad]


# --- text ------------------------------------------------------------------------------------------------------


def table(results: Record) -> list[list[str]]:
    """Return the groups as rows of text, the first one being the header."""
    shown = levels(results)
    rows = [["work", "cells", *(word for level in shown for word in (f'"{level}"', "target", "worst", "first : last"))]]
    for group in GROUPS:
        found = [mean(group, results, level) for level in shown]
        row = [group.name, str(max((f.count for f in found if f), default=0))]
        for i, f in enumerate(found):
            if f is None:
                row += ["-"] * 4
                continue
            target = group.targets[i] if i < len(group.targets) else "-"
            alike = " : ".join(number(f.alike[data_format]) for data_format in DATA_FORMATS)
            row += [number(f.mean), target + _missed(f.mean, target), number(f.worst), alike]
        if any(found):
            rows.append(row)
    return rows


def text(results: Record) -> str:
    """Return the summary for a terminal."""
    rows, lost, wrong = table(results), losses(results), wrongs(results)
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["PyTorch's time over fastconv's, geometric means: the better layout of each, and like for like"]
    for first, *rest in rows:
        lines.append("  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:]))]))
    lines += [*training_lines(results, levels(results)), *regret_lines(results), f"{len(lost)} losses"]
    lines += [f"  {r}  {level:<7}  {name(cell)}  {algorithm(cell, level)}" for r, level, cell in lost]
    return "\n".join([*lines, *(["wrong or failed, not timed:", *wrong] if wrong else [])])


def _missed(mean: float, target: str) -> str:
    """Return the mark of a target that is missed: of those that suppose AMX it cannot be said."""
    first = target.partition(" ")[0]
    return " missed" if first not in ("-", "AMX") and round(mean, 2) < float(first) else ""


def training_lines(results: Record, shown: Sequence[str]) -> list[str]:
    """Return images per second of the training steps at some precisions."""
    lines = []
    for cell in results["cells"]:
        for level in shown if cell["kind"] == "training" else ():
            sides = ("fastconv", ""), ("fastconv.torch", "inside enabled() "), ("torch", "PyTorch ")
            found = [(word, fastest(cell, level, provider)) for provider, word in sides]
            speeds = [
                f"{word}{_two_digits(cell['images'] * 1e3 / entry['ms']):,} images/s" for word, entry in found if entry
            ]
            if found[0][1] and found[-1][1]:
                lines.append(f"training {cell['network']}, {level}: {', '.join(speeds)}")
    return lines


def _two_digits(value: float) -> int:
    """Return a number as precisely as steps in different processes agree."""
    return int(float(f"{value:.2g}"))


def regret_lines(results: Record) -> list[str]:
    """Return auto's regret at each precision and in each data format, where it was measured."""
    from fastconv import registry

    promises, lines = {a.name: a.precision for a in registry.on("cpu")}, []
    for level in levels(results):
        for data_format in DATA_FORMATS:
            found = [(regret(cell, level, data_format, promises), name(cell)) for cell in results["cells"]]
            known = [(value, where) for value, where in found if value is not None]
            if known:
                average, (worst, where) = geometric_mean([value for value, _ in known]), max(known)
                lines.append(f"regret of auto, {level}, {data_format}: mean {average:.3f}, worst {worst:.2f} ({where})")
    return lines


def line(cell: Record) -> str:
    """Return one cell for a terminal: its ratios, and what auto took."""
    parts = [f"{name(cell):<36}"]
    for level in levels({"cells": [cell]}):
        found = ratio(cell, level)
        parts.append(f"{level} {'-' if found is None else found} {algorithm(cell, level)}")
    return "  ".join([*parts, *wrongs({"cells": [cell]})])


def name(cell: Record) -> str:
    """Return a cell's name."""
    return f"{cell['network']} {cell['layer']} {cell['direction']}"


def who(entry: Record) -> str:
    """Return whose entry this is: the algorithm, or PyTorch, and the layout."""
    return f"{entry['algorithm'] or entry['provider']} {entry['data_format'].removeprefix('channels_')}"


def algorithm(cell: Record, level: str) -> str:
    """Return what fastconv took in its better layout."""
    ours = fastest(cell, level, "fastconv")
    return "-" if ours is None else who(ours)


def number(value: float | None) -> str:
    """Return a ratio with two figures or more."""
    if value is None:
        return "-"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
