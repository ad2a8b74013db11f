"""Write the README's table of ratios from the committed results: ``python -m benchmarks.readme``.

Every figure between the markers comes from ``results/tour.json``, which this makes anew::

    make compare ARGS="--data-format both --json benchmarks/results/tour.json"
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results" / "tour.json"
README = ROOT.parent / "README.md"
BEGIN, END = "<!-- compare:begin -->", "<!-- compare:end -->"
ALGORITHMS = ("direct", "im2col", "implicit_gemm", "fft")


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
        f"({', '.join(machine['features'])}), each callable timed alone and warm in alternating blocks, medians.",
        "`auto` is what fastconv takes by itself.",
        "",
        "| layer | direction | auto | " + " | ".join(f"`{name}`" for name in ALGORITHMS) + " |",
        "|---|---|" + "---:|" * (1 + len(ALGORITHMS)),
    ]
    auto_ratios = []
    for (layer, direction), rows in groups.items():
        auto = _best([row for row in rows if row["is_auto"]])
        auto_ratios.append(auto)
        cells = [_ratio(_best([row for row in rows if row["provider"] == name])) for name in ALGORITHMS]
        lines.append(f"| {layer} | {direction} | **{_ratio(auto)}** | " + " | ".join(cells) + " |")
    known = [ratio for ratio in auto_ratios if ratio]
    mean = math.exp(math.fsum(map(math.log, known)) / len(known))
    losses = sum(ratio < 1 for ratio in known)
    lines += [
        "",
        f"Geometric mean of `auto`: {mean:.2f}; it loses to PyTorch in {losses} of {len(known)} rows.",
        "Milliseconds, errors and workspaces are in `benchmarks/results/tour.json`; `benchmarks/readme.py` says how to",
        "make both anew.",
    ]
    return "\n".join(lines)


def _best(rows: list[dict[str, Any]]) -> float | None:
    return max((row["ratio"] for row in rows if row["ratio"] is not None), default=None)


def _ratio(ratio: float | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio:.1f}" if ratio >= 10 else f"{ratio:.2f}" if ratio >= 0.01 else f"{ratio:.4f}"


def rendered(readme: str, results: dict[str, Any]) -> str:
    """Return the README with its table replaced."""
    head, rest = readme.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{table(results)}\n{END}{tail}"


def main() -> None:
    """Rewrite the README."""
    results = json.loads(RESULTS.read_text())
    README.write_text(rendered(README.read_text(), results))


if __name__ == "__main__":
    main()
