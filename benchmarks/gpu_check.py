"""The check on a GPU: does the code run there, is it right, how fast is it. It needs a checkout, and no network.

    make gpu-cubins                       # where there is no GPU: machine code to take along, in .cubins
    make gpu-check                        # nine minutes of what the file lacks; exit status 3: some is left

`look` answers what decides all else: does machine code load that was built elsewhere, does Numba compile here, what
does a launch cost by each way. `tests` are those of tests/cuda, on the device. `sanitizer` runs a few of them under
compute-sanitizer. `bench` times every algorithm against PyTorch, and copying, the most important shapes first.

All that touches the device does so in processes of its own, which say what they are about to do (`gpu_look`,
`gpu_bench`, tests/cuda/hardware.py). One that dies or hangs costs the thing that it had begun: that is noted, and
another process goes on with the rest. Results are merged into one JSON file as they come, with a table beside it. None
of it has run on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastconv import info
from fastconv.config import PRECISIONS

from . import panel
from .report import geometric_mean

ROOT = Path(__file__).resolve().parent.parent
TESTS = "tests/cuda"
PARTS = ("look", "tests", "sanitizer", "bench")
# Share of the minutes by whose end a part is over: what is left of it is done another time.
ENDS = {"look": 0.25, "tests": 0.55, "sanitizer": 0.65, "bench": 1.0}
# Seconds without a sign of life after which a process is taken for dead.
QUIET = 90.0
# Seconds that a process which is killed may take to die: it may be waiting for the device.
DYING = 10.0
# Processes that may die or hang over one command; then what is left of it waits for another time.
MOST_FAULTS = 8
# Seconds between one saving of results and the next.
SAVE_EVERY = 5.0
# Processes that test at the same time.
MOST_AT_ONCE = 6
# Where the system may have CUDA.
CUDA_HOMES = [Path(shutil.which("nvcc") or "/usr/bin/nvcc").resolve().parent.parent, Path("/usr/local/cuda")]
TOOLS = ("memcheck", "racecheck", "synccheck")
# Of the tests, each so many-th runs under compute-sanitizer.
EVERY = 40
# Failed tests of a file that the summary names.
SHOWN = 3
LEFT = 3
# What tells tests where to run. Whatever plugins are there, none is needed.
ON_DEVICE = {"FASTCONV_TEST_GPU": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
# Nowhere: kernels are compiled, and nothing is asserted.
COMPILED = {**ON_DEVICE, "FASTCONV_TEST_GPU": "compiled", "PYTHONOPTIMIZE": "1", "PYTEST_ADDOPTS": "--assert=plain"}

Lines = dict[str, dict[str, Any]]
# Writes the results so far to the file.
Save = Callable[[], None]
# What keys of the first look begin with that are many.
PUBLICLY = "public operations on "
# Set when this process is told to end: what runs is cut, and the results so far are saved.
STOP = threading.Event()


# --- processes -------------------------------------------------------------------------------------------------


def watch(
    command: Sequence[str], report: Path, until: float, extra: dict[str, str], fine: Sequence[int],
    grown: Callable[[], None],
) -> tuple[str, str]:  # fmt: skip
    """Run a process; return "done", "crashed", "hung" or "cut", and the end of what it printed.

    `grown` is called now and then while its report grows.
    """
    env = {**os.environ, **extra, "PYTHONPATH": str(ROOT), "FASTCONV_TEST_GPU_REPORT": str(report)}
    size, sign, how, told = -1, time.monotonic(), "", time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        child = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while child.poll() is None and not how:
                time.sleep(0.1)
                now, found = time.monotonic(), report.stat().st_size if report.exists() else 0
                size, sign = found, sign if found == size else now
                if sign > told and now > told + SAVE_EVERY:
                    told = now
                    grown()
                how = "cut" if now > until or STOP.is_set() else "hung" if now - sign > QUIET else ""
        finally:
            # Its children too.
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                child.wait(DYING)
        output.seek(0)
        tail = output.read()[-3000:]
    return how or ("done" if child.returncode in fine else "crashed"), tail


def through(
    command: Sequence[str], until: float, extra: dict[str, str], done: Lines, fine: Sequence[int] = (0,),
    keep: Callable[[Lines], None] = lambda found: None,
) -> tuple[str, Lines, str]:  # fmt: skip
    """Run a process, and others in its place when it dies; return how the last one ended, all lines, and the output.

    `keep` is given the lines now and then.
    """
    tails: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        report.write_text("".join(json.dumps({**line, "key": key}) + "\n" for key, line in done.items()))
        while True:
            before = len(lines_of(report)[0])
            how, tail = watch(command, report, until, extra, fine, lambda: keep(lines_of(report)[0]))
            tails.append(tail)
            found, begun = lines_of(report)
            if how in ("crashed", "hung") and begun and begun not in found:
                with report.open("a") as file:
                    file.write("\n" + json.dumps({"key": begun, "status": how, "text": tail[-800:]}) + "\n")
                found, _ = lines_of(report)
            if how in ("done", "cut") or len(found) == before or len(tails) == MOST_FAULTS:
                return how, found, "\n".join(tails)


def lines_of(report: Path) -> tuple[Lines, str]:
    """Return what a report says by key, and the last thing that was begun."""
    found, begun = {}, ""
    for text in report.read_text().splitlines() if report.exists() else ():
        with suppress(json.JSONDecodeError):
            line = json.loads(text)
            begun = line.get("start", begun)
            if "key" in line:
                found[line.pop("key")] = line
    return found, begun


# --- parts -----------------------------------------------------------------------------------------------------


def look(results: dict[str, Any], until: float, save: Save) -> bool:
    """Take the first look, and time what is asked first."""
    ended = _lines(results, "look", _module("look"), until, save)
    return _has_gpu(results) and _lines(results, "bench", [*_module("bench"), "--first"], until, save) and ended


def bench(results: dict[str, Any], until: float, save: Save) -> bool:
    """Time what has not been timed."""
    return _lines(results, "bench", _module("bench"), until, save)


def _lines(results: dict[str, Any], part: str, command: Sequence[str], until: float, save: Save) -> bool:
    """Run what writes the lines of a part; return whether there is nothing left to do."""

    def keep(found: Lines) -> None:
        results[part] = found
        save()

    results[part].pop(part, None)
    how, results[part], tail = through(command, until, {}, results[part], keep=keep)
    if how not in ("done", "cut"):
        results[part][part] = {"status": how, "text": tail[-3000:]}
    return how == "done"


def _has_gpu(results: dict[str, Any]) -> bool:
    return results["look"].get("machine", {}).get("architecture", "sm_").startswith("sm_")


def run_tests(
    results: dict[str, Any], until: float, save: Save, how: dict[str, str] = ON_DEVICE, at_once: int = MOST_AT_ONCE
) -> bool:
    """Run the tests of each file in a process of its own, those of single instructions first."""
    names = sorted(path.name for path in (ROOT / TESTS).glob("test_*.py"))
    names.sort(key=lambda name: name != "test_ptx.py")
    left = [n for n in names if n not in _host_only() and results["tests"].get(n, {}).get("status") != "done"]

    def one(name: str) -> None:
        start, before = time.monotonic(), results["tests"].get(name, {})
        # Failures, and that there was nothing to run, are results.
        ended, found, tail = through(_pytest(f"{TESTS}/{name}"), until, how, before.get("found", {}), (0, 1, 5))
        bad = {key: line for key, line in found.items() if line["status"] not in ("passed", "skipped")}
        counts = Counter(line["status"] for line in found.values())
        more: dict[str, Any] = {} if ended == "done" else {"found": found}
        if ended != "done" or bad:
            more["text"] = tail[-3000:]
        seconds = round(before.get("seconds", 0.0) + time.monotonic() - start, 1)
        results["tests"][name] = {"status": ended, "counts": counts, "seconds": seconds, "bad": bad, **more}
        save()

    if left[:1] == ["test_ptx.py"]:
        one(left.pop(0))
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(one, left))
    return all(line["status"] == "done" for line in results["tests"].values())


def _host_only() -> list[str]:
    """Return the files that test the tools, as tests/cuda/hardware.py names them."""
    text = (ROOT / TESTS / "hardware.py").read_text()
    found = re.search(r"NOT_FOR_GPUS = (\[.*?\])", text)
    assert found is not None
    return json.loads(found[1])


def sanitizer(results: dict[str, Any], until: float, save: Save) -> bool:
    """Run a few tests under each tool of compute-sanitizer."""
    folders = (os.environ.get("PATH", ""), *(str(home / "bin") for home in CUDA_HOMES))
    program = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    if program is None:
        results["sanitizer"] = {tool: {"status": "missing", "text": "compute-sanitizer is not there"} for tool in TOOLS}
        return True

    def one(tool: str) -> None:
        command = [program, "--tool", tool, "--target-processes", "all", *_pytest(TESTS)]
        extra = {**ON_DEVICE, "FASTCONV_TEST_GPU_EVERY": str(EVERY)}
        before = results["sanitizer"].get(tool, {})
        how, found, tail = through(command, until, extra, before.get("found", {}), (0, 1, 5))
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", tail)
        counts = Counter(line["status"] for line in found.values())
        status = how if summary or how != "done" else "failed"
        more = {} if how == "done" else {"found": found}
        said = {"summary": [*before.get("summary", []), *summary], "text": tail[-3000:]}
        results["sanitizer"][tool] = {"status": status, "counts": counts, **said, **more}
        save()

    with ThreadPoolExecutor(len(TOOLS)) as pool:
        list(pool.map(one, [t for t in TOOLS if results["sanitizer"].get(t, {}).get("status") != "done"]))
    return all(line["status"] == "done" for line in results["sanitizer"].values())


def _module(part: str) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.gpu_{part}"]


def _pytest(where: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-W", "ignore", where]


def find_libraries(cubins: Path) -> None:
    """Name, for other processes, where machine code is, and the system's CUDA, whose libnvvm serves if it must."""
    os.environ["FASTCONV_PREBUILT"] = str(cubins.resolve())
    homes = [str(home) for home in CUDA_HOMES if (home / "nvvm").is_dir()]
    if homes:
        os.environ.setdefault("CUDA_HOME", homes[0])


# --- the file --------------------------------------------------------------------------------------------------


def load(path: Path) -> dict[str, Any]:
    """Read results; what another state of the code has left does not count."""
    empty = {"code": panel.code(), **{part: {} for part in PARTS}}
    found = json.loads(path.read_text()) if path.exists() else empty
    if found["code"] != empty["code"]:
        print(f"{path} is of other code: starting anew")
        return empty
    if not _has_gpu(found):
        # There may be one now.
        del found["look"]["machine"]
    return found


def save(path: Path, results: dict[str, Any]) -> None:
    """Write results in one step, a thing a line, and the table beside them."""
    parts = [f' "{name}": {json.dumps(value)}' for name, value in results.items() if name not in PARTS]
    for part in PARTS:
        rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(line)}" for key, line in results[part].items())
        parts.append(f' "{part}": {{\n{rows}\n }}')
    fresh = path.with_suffix(".part")
    fresh.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    fresh.replace(path)
    path.with_suffix(".md").write_text("\n".join([*summary(results), "", *table(results)]) + "\n")


# --- tables ----------------------------------------------------------------------------------------------------


def summary(results: dict[str, Any]) -> list[str]:
    """Return what there is to know first, as lines of Markdown."""
    machine = results["look"].get("machine", {})
    commit = f"Code {results['code']}, commit {machine.get('commit', 'unknown')}."
    lines = [f"# {machine.get('gpu', 'No GPU seen')}", "", commit, ""]
    public = {key: line for key, line in results["look"].items() if key.startswith(PUBLICLY)}
    fine = [key for key, line in public.items() if line["status"] == "ok"]
    # Ten lines of the same kind say enough.
    hidden = {*fine, *[key for key in public if key not in fine][10:]}
    for key, line in results["look"].items():
        facts = {k: v for k, v in line.items() if k not in ("status", "text")}
        if key not in hidden:
            lines.append(f"- {key}: {line['status']} {facts}{_reason(line)}")
    lines.append(f"- {PUBLICLY}arrays: {len(fine)} of {len(public)} ok")
    lines += ["", "| tests | | passed | skipped | other | s |", "|---|---|---:|---:|---:|---:|"]
    for name, line in results["tests"].items():
        numbers = (line["counts"].get("passed", 0), line["counts"].get("skipped", 0), len(line["bad"]), line["seconds"])
        lines.append(f"| {name} | {line['status']} | {' | '.join(map(str, numbers))} |")
    for name, line in results["tests"].items():
        if line["status"] not in ("done", "cut"):
            lines.append(f"- {name}: {line['status']}{_reason(line)}")
        lines += [f"- {key}: {bad['status']}{_reason(bad)}" for key, bad in [*line["bad"].items()][:SHOWN]]
    lines += ["", *results.get("errors", [])]
    for tool, line in results["sanitizer"].items():
        lines.append(f"- {tool}: {line['status']}{_reason(line)}")
    return [*lines, "", *means(results)]


def _reason(line: dict[str, Any]) -> str:
    """Return the last line of what went wrong, or of what was said."""
    said = line.get("text", "").strip().splitlines()
    return f": {said[-1][:160]}" if said else ""


def cells(results: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Lines]]:
    """Yield the facts of each thing that was timed, and what each who did it has."""
    found: dict[str, Lines] = {}
    for key, line in results["bench"].items():
        if "who" in line:
            found.setdefault(key.rpartition(" | ")[0], {})[line["who"]] = line
    for by_name in found.values():
        yield next(iter(by_name.values())), by_name


def ratios(by_name: Lines, peer: str = "torch") -> dict[str, float]:
    """Return the peer's time over that of each of ours that is right, the best first.

    PyTorch without TF32 is compared with what keeps the promise "highest" alone.
    """
    right = {who: line for who, line in by_name.items() if line["status"] == "ok"}
    if peer not in right:
        return {}
    levels = ("highest",) if peer == "torch" else PRECISIONS
    ours = {who: line for who, line in right.items() if not who.startswith("torch")}
    times = sorted((line["us"], who) for who, line in ours.items() if line.get("precision", "highest") in levels)
    return {who: right[peer]["us"] / us for us, who in times}


def means(results: dict[str, Any]) -> list[str]:
    """Return the geometric means of ratios to PyTorch, by dtype, format and direction, of the best and of each."""
    groups: dict[str, dict[str, list[float]]] = {}
    for facts, by_name in cells(results):
        for peer in ("torch", "torch tf32"):
            for who, ratio in _with_best(ratios(by_name, peer)):
                what = "pool" if facts["kind"] == "pool" else "convolution"
                where = (what, facts["dtype"], facts["data_format"], facts["direction"], f"against {peer}")
                groups.setdefault(", ".join(where), {}).setdefault(who, []).append(ratio)
    copied = results["bench"].get("copy", {}).get("bytes_per_s", 0.0)
    lines = [f"Copying moves {copied * 1e-12:.2f} TB/s, read and written.", ""]
    lines += ["Geometric means of PyTorch's time over ours (of so many):", ""]
    for group, found in groups.items():
        texts = (f"{who} {geometric_mean(values):.2f} ({len(values)})" for who, values in found.items())
        lines.append(f"- {group}: {', '.join(texts)}")
    return lines


def _with_best(found: dict[str, float]) -> list[tuple[str, float]]:
    return [("best", next(iter(found.values()))), *found.items()] if found else []


COLUMNS = (
    "layer",
    "direction",
    "format",
    "dtype",
    "torch",
    "torch tf32",
    "best",
    "time",
    "host",
    "error",
    "ratio",
    "rate",
)


def table(results: dict[str, Any]) -> list[str]:
    """Return a row for each thing that was timed, in microseconds, with who of ours took least; then what is wrong."""
    lines, wrong = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"], [""]
    for facts, by_name in cells(results):
        found = ratios(by_name)
        who = next(iter(found), "")
        best = by_name.get(who, {})
        layer = f"{facts['network']} {facts['layer']}"
        where: list[Any] = [layer, *(facts[name] for name in ("direction", "data_format", "dtype"))]
        times = (by_name.get(name, {}).get("us", "") for name in ("torch", "torch tf32"))
        numbers = (best.get(name, "") for name in ("us", "host_us", "rms"))
        rest = (f"{found[who]:.2f}", _rate(best)) if best else ("", "")
        lines.append(f"| {' | '.join(map(str, (*where, *times, who, *numbers, *rest)))} |")
        wrong += [
            f"- {', '.join(where)}, {name}: {line['status']} {line.get('rms', '')}{_reason(line)}"
            for name, line in by_name.items()
            if line["status"] != "ok"
        ]
    return lines + wrong


def _rate(line: dict[str, Any]) -> str:
    moved = f"{line['mbytes'] / line['us']:.2f} TB/s"
    return f"{1e3 * line['gflop'] / line['us']:.1f} TFLOP/s, {moved}" if "gflop" in line else moved


# --- the command -----------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description="Check the CUDA kernels.")
    parser.add_argument("--minutes", type=float, default=9.0, metavar="M", help="end after so long (9)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json", metavar="FILE")
    parser.add_argument("--only", default=",".join(PARTS), metavar="A,B", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--cubins", type=Path, default=ROOT / ".cubins", metavar="DIR", help="machine code (.cubins)")
    parser.add_argument("--prebuild", action="store_true", help="fill DIR, without a GPU")
    parser.add_argument("--show", action="store_true", help="print the file's summary, run nothing")
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"--only must be some of {', '.join(PARTS)}, not {', '.join(unknown)}")
    return options


def check(options: argparse.Namespace, parts: dict[str, Callable[[dict[str, Any], float, Save], bool]]) -> int:
    """Do what the file lacks, as far as the minutes go; return the exit status."""
    results, start, ended, turn = load(options.out), time.monotonic(), True, threading.Lock()
    options.out.parent.mkdir(parents=True, exist_ok=True)

    def keep() -> None:
        with turn:
            save(options.out, results)

    for name in options.only:
        until = start + 60 * options.minutes * ENDS[name]
        try:
            ended &= parts[name](results, until, keep)
        except Exception:
            ended, results["errors"] = False, [*results.get("errors", []), traceback.format_exc()[-1500:]]
        keep()
        if not _has_gpu(results):
            ended = False
            break
    print("\n".join(summary(results)))
    return 0 if ended else LEFT


def prebuild(options: argparse.Namespace) -> int:
    """Build the machine code of all that `check` launches; return the exit status."""
    until = time.monotonic() + 60 * options.minutes
    results: dict[str, Any] = {"tests": {}}
    ended = run_tests(results, until, lambda: None, COMPILED, info.cores_available())
    # Looking again at what is done takes minutes.
    path = options.cubins / "built.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    done = before["done"] if before.get("code") == panel.code() else {}
    how, found, tail = through([*_module("bench"), "--prebuild"], until, {}, done)
    done = {key: line for key, line in found.items() if line["status"] == "ok"}
    options.cubins.mkdir(exist_ok=True)
    path.write_text(json.dumps({"code": panel.code(), "done": done}))
    for name, line in results["tests"].items():
        print(f"{name}: {line['status']}, {dict(line['counts'])}", *line["bad"], sep="\n  ")
    for key, line in found.items():
        if line["status"] != "ok":
            print(f"{key}: {line['status']}{_reason(line)}")
    made = list(options.cubins.glob("*.kernel"))
    print(f"{len(made)} kernels, {sum(p.stat().st_size for p in made) >> 20} MB in {options.cubins}")
    if how != "done":
        print(f"not all of the benchmark's: {how}\n{tail}")
    return 0 if ended and how == "done" else LEFT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    options = parse(arguments)
    find_libraries(options.cubins)
    signal.signal(signal.SIGTERM, lambda *_: STOP.set())
    if options.show:
        print("\n".join(summary(load(options.out))))
        return 0
    if options.prebuild:
        return prebuild(options)
    return check(options, {"look": look, "tests": run_tests, "sanitizer": sanitizer, "bench": bench})


if __name__ == "__main__":
    sys.exit(main())
