"""Results as rows, and rows as a table, CSV, JSON or a plot."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from fastconv import info

_SHORT = {"channels_first": "first", "channels_last": "last"}
# On a quiet machine nine rows of ten spread by less than an eighth.
NOISY = 0.25


@dataclass(frozen=True)
class Row:
    """One provider on one layer in one direction.

    `ms`, its quantiles, `gflops_per_s` and `ratio` are None unless `status` is "ok". `gflop` counts the arithmetic of
    direct convolution whatever the algorithm does. `ratio` is the reference's time over this one's, where the
    reference is the faster of the other library's memory layouts: above 1 is faster than the reference. On a GPU `ms`
    is the device's time, and `host_us` what a call costs the host.
    """

    network: str
    layer: str
    count: int
    direction: str
    provider: str
    data_format: str
    dtype: str
    precision: str
    x_shape: str
    weight_shape: str
    stride: str
    padding: str
    dilation: str
    groups: int
    gflop: float
    status: str
    note: str
    ms: float | None
    ms_q20: float | None
    ms_q80: float | None
    repeats: int
    gflops_per_s: float | None
    workspace_bytes: int | None
    rms_error: float | None
    ratio: float | None
    is_reference: bool
    is_auto: bool
    device: str = "cpu"
    host_us: float | None = None

    @property
    def spread(self) -> float | None:
        """From the quantile 20 to the quantile 80 of the times, over their median."""
        if self.ms is None or self.ms_q20 is None or self.ms_q80 is None:
            return None
        return (self.ms_q80 - self.ms_q20) / self.ms

    @property
    def is_noisy(self) -> bool:
        """Whether the times spread so far that their median says little."""
        return self.spread is not None and self.spread > NOISY


# --- sums over a network ---------------------------------------------------------------------------------------


def totals(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return, for each network, direction and provider, the time of all its layers.

    `ms` sums over the `layers` that the provider has a time for, repeated layers counted; `of` is how many there are.
    `ratio` is the geometric mean over the distinct layers. "auto" adds up what fastconv takes by itself.
    """
    found: dict[tuple[str, str, str, str], list[Row]] = {}
    layers: dict[tuple[str, str], int] = {}
    seen: set[tuple[str, ...]] = set()
    for row in rows:
        where = (row.network, row.direction)
        if (*where, row.layer) not in seen:
            seen.add((*where, row.layer))
            layers[where] = layers.get(where, 0) + row.count
        found.setdefault((*where, row.provider, row.data_format), []).append(row)
        if row.is_auto and row.provider != "auto":
            found.setdefault((*where, "auto", row.data_format), []).append(row)
    order = sorted(found, key=lambda key: (list(layers).index(key[:2]), key[2] == "auto"))
    return [_total(key, found[key], layers[key[:2]]) for key in order]


def _total(key: tuple[str, str, str, str], rows: Sequence[Row], layers: int) -> dict[str, Any]:
    network, direction, provider, data_format = key
    timed = [row for row in rows if row.ms is not None]
    ratios = [row.ratio for row in timed if row.ratio is not None]
    return {
        "network": network,
        "direction": direction,
        "provider": provider,
        "data_format": data_format,
        "layers": sum(row.count for row in timed),
        "of": layers,
        "ms": sum(row.count * row.ms for row in timed if row.ms is not None),
        "ratio": geometric_mean(ratios) if ratios else None,
    }


def geometric_mean(values: Sequence[float]) -> float:
    """Return the mean that ratios have."""
    return math.exp(math.fsum(map(math.log, values)) / len(values))


# --- text ------------------------------------------------------------------------------------------------------


class Table:
    """Rows as aligned lines that can be printed one by one: widths follow from what may come, not from what came."""

    _NUMBERS = (
        ("ms", 9), ("spread", 6), ("host us", 7), ("GFLOP/s", 8), ("workspace", 10), ("RMS error", 9), ("ratio", 6),
    )  # fmt: skip

    def __init__(self, layers: Iterable[str], providers: Iterable[str], device: str = "cpu") -> None:
        self._numbers = [number for number in self._NUMBERS if device != "cpu" or number[0] != "host us"]
        self._widths = (
            max(map(len, ("layer", *layers))),
            len("weight_grad"),
            max(map(len, ("algorithm", *providers))),
            len("layout"),
        )
        self._last: tuple[str, str] | None = None

    def header(self) -> str:
        """Return the line above the rows."""
        words = zip(("layer", "direction", "algorithm", "layout"), self._widths)
        return "  ".join([*(f"{word:<{w}}" for word, w in words), *(f"{name:>{w}}" for name, w in self._numbers)])

    def line(self, row: Row) -> str:
        """Return a row; the layer and the direction show where they change."""
        name, here = layer_name(row), (row.layer, row.direction)
        same_layer = self._last is not None and self._last[0] == row.layer
        words = ("" if same_layer else name, "" if self._last == here else row.direction)
        self._last = here
        cells = (*words, row.provider, _SHORT[row.data_format])
        left = "  ".join(f"{cell:<{w}}" for cell, w in zip(cells, self._widths))
        mark = "  <- auto" * row.is_auto + "  noisy" * row.is_noisy
        if row.status != "ok":
            return f"{left}  {row.note}{mark}"
        numbers = {
            "ms": milliseconds(row.ms),
            "spread": _number(row.spread, ".0%"),
            "host us": _number(row.host_us, ".1f"),
            "GFLOP/s": _number(row.gflops_per_s, ".1f"),
            "workspace": "-" if row.workspace_bytes is None else size(row.workspace_bytes),
            "RMS error": _number(row.rms_error, ".1e"),
            "ratio": ratio(row.ratio),
        }
        right = "  ".join(f"{numbers[name]:>{w}}" for name, w in self._numbers)
        return f"{left}  {right}{mark}"


def layer_name(row: Row) -> str:
    """Return the layer with its count, if that is not one."""
    return row.layer if row.count == 1 else f"{row.layer} x{row.count}"


def text(rows: Sequence[Row]) -> str:
    """Return all rows as a table."""
    devices = {row.device for row in rows} - {"cpu"}
    table = Table(map(layer_name, rows), (row.provider for row in rows), *devices)
    return "\n".join([table.header(), *map(table.line, rows)])


def noise_text(rows: Sequence[Row]) -> str:
    """Return a sentence about times that say little; empty if there are none."""
    noisy = [row for row in rows if row.is_noisy]
    if not noisy:
        return ""
    peers = sum(row.is_reference for row in noisy)
    what = f", {peers} of them PyTorch's, to which ratios refer" if peers else ""
    return (
        f"{len(noisy)} of {len(rows)} rows are noisy{what}: times that spread by more than {NOISY:.0%} of their median "
        f"say little. Measure again when nothing else runs."
    )


def totals_text(rows: Sequence[Row]) -> str:
    """Return the sums over a network as a table."""
    lines = [("total of", "direction", "algorithm", "layout", "ms", "ratio", "")]
    for t in totals(rows):
        note = "" if t["layers"] == t["of"] else f"{t['layers']} of {t['of']} layers"
        lines.append(
            (
                t["network"], t["direction"], t["provider"], _SHORT[t["data_format"]],
                milliseconds(t["ms"]) if t["layers"] else "-", ratio(t["ratio"]), note,
            )
        )  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(6)]
    aligns = "<<<<>>"
    return "\n".join(
        "  ".join([*(f"{cell:{a}{w}}" for cell, a, w in zip(line, aligns, widths)), line[6]]).rstrip() for line in lines
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def milliseconds(value: float | None) -> str:
    """Return milliseconds with three or four figures."""
    if value is None:
        return "-"
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}" if value >= 10 else f"{value:.3f}"


def ratio(value: float | None) -> str:
    """Return a ratio with two figures or more."""
    if value is None:
        return "-"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def size(count: int) -> str:
    """Return bytes in the unit that suits."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.3g} GiB"


# --- files -----------------------------------------------------------------------------------------------------


def to_csv(rows: Sequence[Row]) -> str:
    """Return one line per row under the names of its fields; empty where there is no value."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [f.name for f in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return buffer.getvalue()


def to_json(rows: Sequence[Row], settings: dict[str, Any]) -> str:
    """Return the machine, the settings, the rows and the totals."""
    # JSON has no infinity and no NaN.
    content = {
        "machine": machine(),
        "settings": settings,
        "rows": [{k: _finite(v) for k, v in asdict(row).items()} for row in rows],
        "totals": totals(rows),
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def machine() -> dict[str, Any]:
    """Describe where the numbers come from: hardware and versions, no names and no paths."""
    found, torch = info.collect(), sys.modules.get("torch")
    return {
        "cpu": found["cpu"]["model"],
        "features": [name for name, there in found["cpu"]["features"].items() if there],
        "cores": found["cpu"]["cores_available"],
        "threads": found["threads"]["per_call"],
        "threading_layer": found["threads"]["layer"],
        "torch_threads": None if torch is None else torch.get_num_threads(),
        "gpus": [device["name"] for device in found["gpu"]["devices"]],
        "driver": found["gpu"]["driver"],
        "platform": found["platform"],
        "blas": [f"{library['internal_api']} {library['version']}" for library in found["blas"]],
        "versions": {
            "fastconv": found["fastconv"],
            "python": found["python"],
            **{name: version for name, version in found["versions"].items() if version is not None},
        },
    }


# --- plot ------------------------------------------------------------------------------------------------------


def plot(rows: Sequence[Row], path: str, title: str = "") -> None:
    """Draw bars of the ratio to the reference, per layer and provider, one panel per direction.

    Bars grow from 1: upwards faster than the reference, downwards slower. Without a reference they show GFLOP/s.
    Needs matplotlib.
    """
    from matplotlib.figure import Figure

    directions = list(dict.fromkeys(row.direction for row in rows))
    layers = list(dict.fromkeys(layer_name(row) for row in rows))
    series = list(dict.fromkeys((row.provider, row.data_format) for row in rows))
    width = min(max(7.0, 1.5 + 0.19 * len(layers) * (len(series) + 1)), 40.0)
    figure = Figure(figsize=(width, 1.4 + 2.6 * len(directions)), layout="constrained")
    axes = figure.subplots(len(directions), 1, sharex=True, squeeze=False)[:, 0]
    for ax, direction in zip(axes, directions):
        _panel(ax, [row for row in rows if row.direction == direction], layers, series)
        ax.set_title(direction, loc="left", fontsize=10)
    axes[-1].set_xticks(range(len(layers)), layers, rotation=35, ha="right", rotation_mode="anchor")
    handles, labels = axes[0].get_legend_handles_labels()
    columns = max(1, min(len(labels), int(width / 1.8)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)


# Colour-blind safe (Okabe & Ito); the peers are grey.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_GREYS = {"channels_first": "#777777", "channels_last": "#bbbbbb"}


def _panel(ax: Any, rows: Sequence[Row], layers: Sequence[str], series: Sequence[tuple[str, str]]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    has_reference = any(row.ratio is not None for row in rows)
    base = 1.0 if has_reference else 0.0
    value = {(layer_name(r), r.provider, r.data_format): r.ratio if has_reference else r.gflops_per_s for r in rows}
    names = list(dict.fromkeys(name for name, _ in series if name != "torch"))
    step = 0.84 / len(series)
    for i, (provider, data_format) in enumerate(series):
        heights = [(value.get((layer, provider, data_format)) or math.nan) - base for layer in layers]
        at = [x + (i - (len(series) - 1) / 2) * step for x in range(len(layers))]
        is_peer = provider == "torch"
        colour = _GREYS[data_format] if is_peer else _COLOURS[names.index(provider) % len(_COLOURS)]
        hatch = "///" if data_format == "channels_last" and not is_peer else None
        label = f"{provider} ({_SHORT[data_format]})"
        ax.bar(at, heights, step * 0.92, bottom=base, color=colour, hatch=hatch, edgecolor="white", label=label)
    ax.set_ylabel("ratio to PyTorch" if has_reference else "GFLOP/s")
    ax.set_axisbelow(True)
    ax.grid(axis="y", color="#dddddd", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.margins(x=0.01)
    if has_reference:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}x"))
        ax.axhline(1.0, color="black", linewidth=0.9)
