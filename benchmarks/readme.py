"""Write the README's tables of ratios from the committed results: ``python -m benchmarks.readme``.

Those of the panel come from ``results/panel-*.json``, which ``make panel`` makes, one for each CPU; every single layer
goes to ``results/panel.md``.

Every figure of the comparison of algorithms comes from ``results/tour-*.json``. For each NAME of auto, direct, im2col,
implicit_gemm, winograd, depthwise and fft this makes one anew, in a process of its own, because the thread pools of
Numba, BLAS and PyTorch disturb each other on few cores::

    make compare ARGS="--algorithms NAME --data-format both --json benchmarks/results/tour-NAME.json"
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastconv.geometry import DIRECTIONS

from . import summary

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
README, LAYERS = ROOT.parent / "README.md", RESULTS / "panel.md"
BEGIN, END = "<!-- compare:begin -->", "<!-- compare:end -->"
PANEL_BEGIN, PANEL_END = "<!-- panel:begin -->", "<!-- panel:end -->"
# Cells to show at each end.
SHOWN = 5
TITLE = """# The panel, layer by layer

PyTorch's time over fastconv's: above 1 beats PyTorch, below 1, in bold, loses to it. Written by
`python -m benchmarks.readme` from the `panel-*.json` beside it; the README has the means. A pool
has no weights, and no weight_grad; what is not timed has no result in the file.
"""
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
        "each algorithm in a process of its own with PyTorch: between processes the same kernel differs by a fifth, so",
        "that closer columns are equal. `auto` is what fastconv takes by itself.",
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
    """Return the panel's results as Markdown: means by kind of work beside their targets, losses, both ends."""
    strictest = summary.levels(results)[0]
    header, *rows = summary.table(results)
    lines = [
        *_machine(results, file),
        "PyTorch's time over fastconv's, **above 1 beats PyTorch**: geometric means of the better layout of each, and",
        "with both in channels-first : channels-last. Targets were set before anything was built; those marked AMX are",
        "for CPUs that have it.",
        "",
        f"| {' | '.join(header)} |",
        "|---" + "|---:" * (len(header) - 1) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        *(f"- {line}" for line in (*summary.training_lines(results, [strictest]), *summary.regret_lines(results))),
        f"- slower than PyTorch: {_lost(results)} (in bold; every layer is in",
        f"  [benchmarks/results/{LAYERS.name}](benchmarks/results/{LAYERS.name}))",
        *(f"- not timed: {line}" for line in summary.wrongs(results)),
        "",
        *_ends(results, strictest),
    ]
    return "\n".join(lines)


def _machine(results: dict[str, Any], file: str) -> list[str]:
    machine = results["machine"]
    return [
        f"`{file}`: {machine['cpu']} ({', '.join(machine['features'])}),",
        f"{machine['threads']} threads, PyTorch {machine['versions']['torch']}.",
    ]


def _lost(results: dict[str, Any]) -> str:
    """Return how many cells are slower than PyTorch at each precision."""
    lost = [level for _, level, _ in summary.losses(results)]
    known = {
        level: sum(summary.ratio(c, level) is not None for c in results["cells"]) for level in summary.levels(results)
    }
    return ", ".join(f"{lost.count(level)} of {count} cells at {level}" for level, count in known.items())


def _ends(results: dict[str, Any], level: str) -> list[str]:
    """Return the table of the cells with the lowest and the highest ratios."""
    found = [(summary.ratio(cell, level), summary.name(cell)) for cell in results["cells"]]
    order = sorted((r.value, name) for r, name in found if r is not None)
    rows = zip(order[:SHOWN], reversed(order[-SHOWN:]))
    return [
        f'| lowest, at "{level}" | ratio | highest | ratio |',
        "|---|---:|---|---:|",
        *(f"| {worst} | {_marked(low)} | {best} | {_marked(high)} |" for (low, worst), (high, best) in rows),
    ]


def _marked(value: float) -> str:
    """Return a ratio, in bold if it is a loss."""
    return f"**{summary.number(value)}**" if value < 1 else summary.number(value)


def layers(results: dict[str, Any], file: str) -> str:
    """Return every layer of the panel as Markdown, and the training steps."""
    levels = summary.levels(results)
    steps = [cell for cell in results["cells"] if cell["kind"] == "training"]
    lines = [
        *_machine(results, file),
        f"At {' / '.join(levels)}, in the better layout of each:",
        "",
        f"| layer | {' | '.join(DIRECTIONS)} |",
        "|---|---:|---:|---:|",
        *_panel_layers([cell for cell in results["cells"] if cell["kind"] != "training"], levels),
        "",
        "| training step | `fastconv.nn` | PyTorch's model inside `fastconv.torch.enabled()` |",
        "|---|---:|---:|",
        *(f"| {c['network']} | {_shown(c, levels)} | {_shown(c, levels, 'fastconv.torch')} |" for c in steps),
    ]
    return "\n".join(lines)


def _panel_layers(cells: list[dict[str, Any]], levels: list[str]) -> list[str]:
    rows: dict[str, dict[str, str]] = {}
    for cell in cells:
        none = {"weight_grad": ""} if "pool" in cell["kind"] else {}
        rows.setdefault(f"{cell['network']} {cell['layer']}", none)[cell["direction"]] = _shown(cell, levels)
    return [f"| {name} | {' | '.join(row.get(d, 'not timed') for d in DIRECTIONS)} |" for name, row in rows.items()]


def _shown(cell: dict[str, Any], levels: list[str], provider: str = "fastconv") -> str:
    """Return a cell's ratios at all levels, once where they are equal."""
    found = [summary.ratio(cell, level, provider=provider) for level in levels]
    return " / ".join(dict.fromkeys(_marked(r.value) for r in found if r)) or "-"


def panels(show: Callable[[dict[str, Any], str], str]) -> str:
    """Return what a function shows of the results of every CPU's file."""
    found = [show(json.loads(file.read_text()), file.name) for file in sorted(RESULTS.glob("panel-*.json"))]
    return "\n\n".join(found) or "No file of results is committed yet: `make panel` makes one."


def every_layer() -> str:
    """Return the file of all layers."""
    return f"{TITLE}\n{panels(layers)}\n"


def rendered(readme: str) -> str:
    """Return the README with its tables replaced."""
    for begin, end, text in ((BEGIN, END, table(load())), (PANEL_BEGIN, PANEL_END, panels(panel))):
        head, rest = readme.split(begin)
        _, tail = rest.split(end)
        readme = f"{head}{begin}\n{text}\n{end}{tail}"
    return readme


def main() -> None:
    """Rewrite the README and the file of all layers."""
    README.write_text(rendered(README.read_text()))
    LAYERS.write_text(every_layer())


if __name__ == "__main__":
    main()
