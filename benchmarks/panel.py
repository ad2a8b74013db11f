"""The panel: ``panel.csv``, max pools and training steps against PyTorch, in one file, in as many calls as it takes.

    python -m benchmarks.panel --dry-run                    # compiles and checks, times nothing
    python -m benchmarks.panel --minutes 5                  # times what the file lacks; exit status 3: some is left
    python -m benchmarks.panel --check                      # names what got slower than the file says: status 1

Each callable is timed alone and warm, in blocks that alternate with those of the others (`timing`), after its result
was checked; training steps in processes of their own that take turns. Ratios are of medians; the quantiles 20 and 80 of
both sides bound them. What auto takes is what it predicts: times that have been measured by tuning are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import fastconv
from fastconv import config, info, tuning
from fastconv.geometry import DATA_FORMATS

from . import cells, providers, report, summary, timing
from .cells import Cell, Contender, Entry, WrongResultError

RESULTS = Path(__file__).resolve().parent / "results"
# In a run for the regret, an algorithm that takes this much longer than another is not timed again.
HOPELESS = 4.0
# Seconds at least for a contender that is timed in a process of its own: its allocator has to settle.
LEAST_APART = 1.0
# What --check looks at unless told otherwise: cells of each kind and direction.
SAMPLE = 3
# A suspect is timed again in so many processes before it is called slower: some are a third slower than others at the
# same call for as long as they live.
SECOND_LOOKS = 3
# A ratio may shrink by this much, beyond the noise of both runs, without being called slower.
MARGIN = 0.05

WORSE, OTHER_MACHINE, LEFT = 1, 2, 3


# --- measuring -------------------------------------------------------------------------------------------------


def measure(cell: Cell, old: dict[str, Any] | None, options: argparse.Namespace, budget: float) -> dict[str, Any]:
    """Check and time a cell's contenders; return it as the file has it. Without a budget nothing is timed."""
    contenders = list(cell.contenders(options.levels, options.regret))
    known = {_who(entry): entry for entry in old["entries"]} if old and old["code"] == code() else {}
    calls = {i: call for i, c in enumerate(contenders) if (call := attempt(c, known.get(_who(c.entry)))) is not None}
    if budget:
        for i in _hopeless(contenders, calls):
            del calls[i]
        found = _take_turns(cell, calls, options) if cell.apart else timing.measure(calls, budget, thorough=True)
        for i in found:
            _store(contenders[i].entry, found[i])
    facts = {name: float(f"{value:.5g}") for name, value in cell.facts.items()}
    names = {name: getattr(cell, name) for name in ("network", "layer", "direction", "kind")}
    entries = [c.entry.to_json() for c in contenders]
    what = {"code": code(), "levels": options.levels, "regret": options.regret}
    return {**names, **facts, **what, "entries": entries}


def attempt(contender: Contender, known: dict[str, Any] | None) -> Callable[[], Any] | None:
    """Run a contender once and check its result, unless it is known to be right; None if it is not to be timed."""
    entry = contender.entry
    try:
        call = contender.prepare()
        result = call()
        right = known is not None and known["status"] == "ok"
        entry.rms_error = known["rms_error"] if known is not None and right else contender.verify(result)
    except WrongResultError as error:
        entry.status, entry.note = "wrong", str(error)
        return None
    except Exception as error:
        entry.status, entry.note = "failed", f"{type(error).__name__}: {str(error)[:200]}"
        return None
    return call


def _who(entry: Entry | dict[str, Any]) -> tuple[Any, ...]:
    found = entry if isinstance(entry, dict) else entry.to_json()
    return found["provider"], found["data_format"], found["algorithm"], tuple(found["levels"])


def _hopeless(contenders: Sequence[Contender], calls: dict[int, Callable[[], Any]]) -> list[int]:
    """Time the algorithms that auto does not take once, and return those far behind, which keep that time."""
    if all(c.entry.levels for c in contenders):
        return []
    once = {i: timing.measure({i: call}, 0.0)[i] for i, call in calls.items()}
    best = min(found.median for found in once.values())
    behind = [i for i, found in once.items() if not contenders[i].entry.levels and found.median > HOPELESS * best]
    for i in behind:
        _store(contenders[i].entry, once[i])
    return behind


def _take_turns(cell: Cell, indices: Iterable[int], options: argparse.Namespace) -> dict[int, timing.Timing]:
    """Time contenders in processes of their own, one after the other, several times.

    The median is that of the processes' medians; the quantiles are the outermost, so that they bound all processes.
    """
    found: dict[int, list[timing.Timing]] = {i: [] for i in indices}
    for _ in range(timing.BLOCKS):
        for i, times in found.items():
            printed = _run("apart", cell, options, stdout=subprocess.PIPE, contender=i).stdout
            times.append(timing.Timing(**json.loads(printed)))
    return {
        i: timing.Timing(
            min(t.q20 for t in times),
            median(t.median for t in times),
            max(t.q80 for t in times),
            sum(t.repeats for t in times),
        )
        for i, times in found.items()
    }


def time_one(options: argparse.Namespace) -> int:
    """Time one contender of the one cell that is chosen, and print what came out."""
    (cell,) = selected(list(cells.all_cells()), options.only)
    contender = next(islice(cell.contenders(options.levels, options.regret), options.contender, None))
    call = contender.prepare()
    found = timing.measure({0: call}, max(options.budget, LEAST_APART), thorough=True)[0]
    print(json.dumps(asdict(found)))
    return 0


def _run(
    module: str, cell: Cell, options: argparse.Namespace, stdout: int, **flags: Any
) -> subprocess.CompletedProcess[bytes]:
    """Run this command, or the like, in a process of its own, on one cell."""
    how = {"only": f"^{re.escape(' '.join(key(cell)))}$", "levels": ",".join(options.levels), **flags}
    how |= {"threads": options.threads, "budget": options.budget}
    command = [sys.executable, "-m", f"benchmarks.{module}", *(f"--{name}={value}" for name, value in how.items())]
    return subprocess.run(command, cwd=RESULTS.parent.parent, stdout=stdout, check=False)


def _store(entry: Entry, found: timing.Timing) -> None:
    entry.ms, entry.ms_q20, entry.ms_q80 = (1e3 * t for t in (found.median, found.q20, found.q80))
    entry.repeats = found.repeats


def code() -> str:
    """Return a digest of the package's source."""
    folder, digest = Path(fastconv.__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@contextmanager
def conditions(threads: int) -> Iterator[None]:
    """Hold both libraries to as many threads, fastconv to its defaults, and to no times measured by tuning."""
    before = os.environ.get("FASTCONV_CACHE_DIR")
    defaults = {name: config.DEFAULTS[name] for name in ("algorithm", "precision", "workspace_limit", "poison")}
    with tempfile.TemporaryDirectory() as nothing, providers.torch_threads(threads):
        os.environ["FASTCONV_CACHE_DIR"] = nothing
        tuning.reload()
        try:
            with fastconv.options(threads=threads, **defaults):
                yield
        finally:
            del os.environ["FASTCONV_CACHE_DIR"]
            if before is not None:
                os.environ["FASTCONV_CACHE_DIR"] = before
            tuning.reload()


# --- the file --------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Describe the machine as both libraries see it."""
    import torch  # noqa: F401  # the description has its threads

    return report.machine()


def default_file() -> Path:
    """Return the file of this CPU."""
    return RESULTS / f"panel-{re.sub('[^a-z0-9]+', '-', info.cpu_model().lower()).strip('-')}.json"


def load(path: Path) -> dict[str, Any]:
    """Read a file of results; an empty one if there is none."""
    return json.loads(path.read_text()) if path.exists() else {"machine": machine(), "cells": []}


def save(path: Path, results: dict[str, Any]) -> None:
    """Write the results in one step, one contender a line."""
    blocks = []
    for cell in results["cells"]:
        head = json.dumps({name: value for name, value in cell.items() if name != "entries"})
        entries = ",\n   ".join(map(json.dumps, cell["entries"]))
        blocks.append(f'  {head[:-1]}, "entries": [\n   {entries}]}}')
    cells_text = ",\n".join(blocks)
    fresh = path.with_suffix(".part")
    fresh.write_text(f'{{\n "machine": {json.dumps(results["machine"])},\n "cells": [\n{cells_text}\n ]\n}}\n')
    fresh.replace(path)


def key(cell: Any) -> tuple[str, str, str]:
    """Return what names a cell, whether it is to be measured or comes from a file."""
    found = cell if isinstance(cell, dict) else vars(type(cell)) | vars(cell)
    return found["network"], found["layer"], found["direction"]


def other_machine(results: dict[str, Any]) -> str:
    """Return how this machine differs from the one of the results, or nothing."""
    here, there = machine(), results["machine"]
    pairs = [(name, here[name], there[name]) for name in ("cpu", "features", "cores")]
    pairs.append(("PyTorch", here["versions"].get("torch"), there["versions"].get("torch")))
    return "; ".join(f"{name} {a}, not {b}" for name, a, b in pairs if a != b)


# --- running ---------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Measure the cells that the file lacks; return the exit status."""
    results = load(options.out)
    if difference := other_machine(results):
        print(f"{options.out} is of another machine ({difference}): name another file", file=sys.stderr)
        return OTHER_MACHINE
    every = list(cells.all_cells())
    order = {key(cell): i for i, cell in enumerate(every)}
    there = {key(cell): cell for cell in results["cells"]}
    chosen = selected(every, options.only)
    todo = [cell for cell in chosen if not is_done(there.get(key(cell)), options)]
    start, left = perf_counter(), len(todo)
    for cell in todo:
        if options.minutes is not None and perf_counter() - start > 60 * options.minutes:
            break
        found = measure(cell, there.get(key(cell)), options, options.budget)
        there[key(cell)], left = found, left - 1
        print(f"[{left} left] {summary.line(found)}", flush=True)
        results["machine"] = machine()
        results["cells"] = sorted(there.values(), key=lambda cell: order.get(key(cell), len(order)))
        save(options.out, results)
    if options.budget:
        print("\n" + summary.text(results))
    if left:
        print(f"{left} cells are left")
        return LEFT
    return WORSE if summary.wrongs({"cells": [there[key(cell)] for cell in chosen]}) else 0


def selected(every: Sequence[Cell], only: str | None) -> list[Cell]:
    """Return the cells whose name contains a regular expression."""
    return [cell for cell in every if only is None or re.search(only, " ".join(key(cell)))]


def is_done(cell: dict[str, Any] | None, options: argparse.Namespace) -> bool:
    """Return True if the file has what is asked for, measured with this code (or any, with --keep)."""
    if cell is None or (options.regret and not cell["regret"]) or not (options.keep or cell["code"] == code()):
        return False
    timed = not options.budget or all(e["ms"] is not None for e in cell["entries"] if e["status"] == "ok")
    return timed and set(options.levels) <= set(cell["levels"])


def check(options: argparse.Namespace) -> int:
    """Time cells again and name those whose ratio to PyTorch fell; return the exit status."""
    results = load(options.out)
    if not results["cells"]:
        print(f"{options.out} has no results to compare with", file=sys.stderr)
        return OTHER_MACHINE
    if difference := other_machine(results):
        print(f"{options.out} is of another machine ({difference}): nothing compared", file=sys.stderr)
        return OTHER_MACHINE
    before = {key(cell): cell for cell in results["cells"]}
    chosen = [cell for cell in selected(list(cells.all_cells()), options.only) if key(cell) in before]
    chosen = chosen if options.all else sample(chosen)
    count, start = 0, perf_counter()
    for done, cell in enumerate(chosen):
        if options.minutes is not None and perf_counter() - start > 60 * options.minutes:
            print(f"{len(chosen) - done} cells are left out for want of time")
            break
        old = before[key(cell)]
        worse = slower(old, measure(cell, old, options, options.budget))
        for _ in range(SECOND_LOOKS):
            if worse:
                worse = slower(old, measure_apart(cell, options))
        count += bool(worse)
        print(f"{'SLOWER' if worse else 'ok    '} {summary.name(old)}  {'; '.join(worse)}".rstrip(), flush=True)
    print(f"{count} of {len(chosen)} cells are worse than {options.out.name} says, beyond the noise")
    return WORSE if count else 0


def measure_apart(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a cell in a process of its own; return it without entries if that crashes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "cell.json"
        _run("panel", cell, options, stdout=subprocess.DEVNULL, out=out)
        return (load(out)["cells"] or [{"entries": []}])[0]


def slower(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return what of a cell got slower against PyTorch, like for like in each layout and between the better ones.

    What is wrong, or does not run, is worse than slow.
    """
    found = summary.wrongs({"cells": [new]})
    for level in summary.levels({"cells": [old]}):
        for data_format in (*DATA_FORMATS, None):
            was, now = (summary.ratio(cell, level, data_format) for cell in (old, new))
            where = f"{level}, {data_format or 'better layouts'}"
            if was is not None and now is None:
                found.append(f"{where}: was {was}, has no time now")
            elif was is not None and now is not None and now.high < was.low * (1 - MARGIN):
                found.append(f"{where}: was {was}, is {now}")
    return found


def sample(every: Sequence[Cell]) -> list[Cell]:
    """Return a few cells of each kind and direction: the first, the last and what lies evenly between."""
    groups: dict[tuple[str, str], list[int]] = {}
    for i, cell in enumerate(every):
        groups.setdefault((cell.kind, cell.direction), []).append(i)
    taken = {group[round(i * (len(group) - 1) / (SAMPLE - 1))] for group in groups.values() for i in range(SAMPLE)}
    return [every[i] for i in sorted(taken)]


# --- the command -----------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.panel", description="Time the panel against PyTorch.")
    parser.add_argument("--out", type=Path, metavar="FILE", help="results, read and written (this CPU's own)")
    parser.add_argument("--only", metavar="REGEX", help='cells whose "network layer direction" matches')
    parser.add_argument("--levels", default="highest,high", metavar="A,B", help="precisions (highest,high)")
    parser.add_argument("--threads", type=int, default=info.cores_available(), help="of both libraries (all cores)")
    parser.add_argument("--budget", type=float, default=0.3, metavar="SECONDS", help="for each callable (0.3)")
    parser.add_argument("--minutes", type=float, metavar="M", help="start no cell after so long; go on another time")
    parser.add_argument("--regret", action="store_true", help="time every algorithm, not only what auto takes")
    parser.add_argument("--keep", action="store_true", help="keep cells that older code was measured on")
    parser.add_argument("--dry-run", action="store_true", help="compile and check, and keep that, but time nothing")
    parser.add_argument("--check", action="store_true", help="name what got slower than the file says")
    parser.add_argument("--all", action="store_true", help="check every cell, not a few of each kind")
    parser.add_argument("--contender", type=int, help=argparse.SUPPRESS)  # for processes that this command starts
    parser.add_argument("--show", action="store_true", help="show the file's summary, measure nothing")
    options = parser.parse_args(arguments)
    if unknown := set(options.levels.split(",")) - set(config.PRECISIONS):
        parser.error(f"--levels must be some of {', '.join(config.PRECISIONS)}, not {', '.join(unknown)}")
    # Strictest first.
    options.levels = [level for level in config.PRECISIONS if level in options.levels.split(",")]
    options.budget = 0.0 if options.dry_run else options.budget
    options.out = default_file() if options.out is None else options.out
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    options = parse(arguments)
    if options.show:
        print(summary.text(load(options.out)))
        return 0
    with conditions(options.threads):
        if options.contender is not None:
            return time_one(options)
        return check(options) if options.check else run(options)


if __name__ == "__main__":
    sys.exit(main())
