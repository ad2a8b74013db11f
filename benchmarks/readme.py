"""Write the README's tables of ratios from the committed results: ``python -m benchmarks.readme``.

Those of the panel come from ``results/panel-*.json``, which ``make panel`` makes, one for each CPU.

Every figure of the comparison of algorithms comes from ``results/tour-*.json``. For each NAME of auto, direct, im2col,
implicit_gemm, winograd, depthwise and fft this makes one anew, in a process of its own, because the thread pools of
Numba, BLAS and PyTorch disturb each other on few cores::

    make compare ARGS="--algorithms NAME --data-format both --json benchmarks/results/tour-NAME.json"
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from fastconv.geometry import DIRECTIONS

from . import summary

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
README = ROOT.parent / "README.md"
BEGIN, END = "<!-- compare:begin -->", "<!-- compare:end -->"
PANEL_BEGIN, PANEL_END = "<!-- panel:begin -->", "<!-- panel:end -->"
ALGORITHMS = ("direct", "im2col", "implicit_gemm", "winograd", "depthwise", "fft")


def load() -> dict[str, Any]:
    """Return the rows of all runs, and the machine of the first."""
    names = ("auto", *ALGORITHMS)
    runs = [json.loads((RESULTS / f"tour-{name}.json").read_text()) for name in names]
    machines = {json.dumps([run["machine"]["cpu"], run["machine"]["versions"]["torch"]]) for run in runs}
    if len(machines) != 1:
        raise SystemExit(f"the runs are of different machines: {machines}")
    rows = [{**row, "provider": name} for name, run in zip(names, runs) for row in run["rows"] if not is_peer(row)]
    return {"machine": runs[0]["machine"], "rows": rows}


def is_peer(row: dict[str, Any]) -> bool:
    """Return True for a row of PyTorch's."""
    return bool(row["provider"] == "torch")


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown: per layer and direction each algorithm's ratio, in its better layout."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        groups.setdefault((row["layer"], row["direction"]), []).append(row)
    machine, versions = results["machine"], results["machine"]["versions"]
    lines = [
        f"PyTorch {versions['torch']}'s time, in the faster of its two memory layouts, over fastconv's, in the faster",
        'of its own: **above 1 beats PyTorch**, below 1 loses to it. float32 at precision "highest", '
        f"{machine['threads']} threads on {machine['cpu']}",
        f"({', '.join(machine['features'])}), each callable timed alone and warm in alternating blocks, medians;",
        "each algorithm in a process of its own with PyTorch. `auto` is what fastconv takes by itself.",
        "",
        "| layer | direction | auto | " + " | ".join(f"`{name}`" for name in ALGORITHMS) + " |",
        "|---|---|" + "---:|" * (1 + len(ALGORITHMS)),
    ]
    auto_ratios = []
    for (layer, direction), rows in groups.items():
        auto = _best([row for row in rows if row["provider"] == "auto"])
        auto_ratios.append(auto)
        cells = [_ratio(_best([row for row in rows if row["provider"] == name])) for name in ALGORITHMS]
        lines.append(f"| {layer} | {direction} | **{_ratio(auto)}** | " + " | ".join(cells) + " |")
    known = [ratio for ratio in auto_ratios if ratio]
    mean = math.exp(math.fsum(map(math.log, known)) / len(known))
    losses = sum(ratio < 1 for ratio in known)
    lines += [
        "",
        f"Geometric mean of `auto`: {mean:.2f}; it loses to PyTorch in {losses} of {len(known)} rows.",
        "Milliseconds, errors and workspaces are in `benchmarks/results/tour-*.json`; `benchmarks/readme.py` says how",
        "the files and this table are made.",
    ]
    return "\n".join(lines)


def _best(rows: list[dict[str, Any]]) -> float | None:
    return max((row["ratio"] for row in rows if row["ratio"] is not None), default=None)


def _ratio(ratio: float | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio:.1f}" if ratio >= 10 else f"{ratio:.2f}" if ratio >= 0.01 else f"{ratio:.4f}"


def panel(results: dict[str, Any], file: str) -> str:
    """Return the panel's results as Markdown: means by kind of work beside their targets, then every layer."""
    machine, levels = results["machine"], summary.levels(results)
    header, *rows = summary.table(results)
    lost, wrong = summary.losses(results), summary.wrongs(results)
    lines = [
        f"`{file}`: {machine['cpu']} ({', '.join(machine['features'])}), {machine['threads']} threads,",
        f"PyTorch {machine['versions']['torch']}. PyTorch's time over fastconv's, geometric means: of the better",
        "layout of each, and with both in channels-first : channels-last. Targets were set before anything was built;",
        "those marked AMX are for CPUs that have it.",
        "",
        f"| {' | '.join(header)} |",
        "|---" + "|---:" * (len(header) - 1) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        *(f"- {line}" for line in (*summary.training_lines(results), *summary.regret_lines(results))),
        f"- {len(lost)} cells lost at {' or '.join(levels)}{', each level counted; in bold below' if lost else ''}",
        *(f"- not timed: {line}" for line in wrong),
        "",
        f"<details><summary>every layer, at {' / '.join(levels)}</summary>",
        "",
        f"| layer | {' | '.join(DIRECTIONS)} |",
        "|---|---:|---:|---:|",
        *_panel_layers(results, levels),
        "",
        "</details>",
    ]
    return "\n".join(lines)


def _panel_layers(results: dict[str, Any], levels: list[str]) -> list[str]:
    layers: dict[str, dict[str, str]] = {}
    for cell in results["cells"]:
        found = [summary.ratio(cell, level) for level in levels]
        known = [f"**{summary.number(r.value)}**" if r.value < 1 else summary.number(r.value) for r in found if r]
        shown = " / ".join(dict.fromkeys(known)) or "-"
        # A training step has one direction, shown as the first.
        direction = cell["direction"] if cell["direction"] in DIRECTIONS else DIRECTIONS[0]
        layers.setdefault(f"{cell['network']} {cell['layer']}", {})[direction] = shown
    return [f"| {name} | {' | '.join(row.get(d, '') for d in DIRECTIONS)} |" for name, row in layers.items()]


def panels() -> str:
    """Return the results of every CPU's file."""
    files = sorted(RESULTS.glob("panel-*.json"))
    found = [panel(json.loads(file.read_text()), file.name) for file in files]
    return "\n\n".join(found) or "No file of results is committed yet: `make panel` makes one."


def rendered(readme: str) -> str:
    """Return the README with its tables replaced."""
    for begin, end, text in ((BEGIN, END, table(load())), (PANEL_BEGIN, PANEL_END, panels())):
        head, rest = readme.split(begin)
        _, tail = rest.split(end)
        readme = f"{head}{begin}\n{text}\n{end}{tail}"
    return readme


def main() -> None:
    """Rewrite the README."""
    README.write_text(rendered(README.read_text()))


if __name__ == "__main__":
    main()
