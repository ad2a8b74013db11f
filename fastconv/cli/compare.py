"""``compare``: the time of every algorithm on layers, against each other and PyTorch.

What is measured and how is in `fastconv.benchmarks`, in a checkout the folder ``benchmarks`` beside the package.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from .. import config, device_arrays
from .._version import __version__
from . import flags
from .flags import UsageError
from .progress import Progress

_PLOT_SUFFIXES = (".png", ".pdf", ".svg")


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "compare",
        help="time every algorithm on a layer or a network, against each other and PyTorch",
        description="Time every algorithm that can compute a layer, against each other and PyTorch. Results are "
        "checked against float64 first; a wrong one shows instead of its time, and the exit status is then 1. "
        "Without --input or --network: one layer of each kind, in about a minute.",
    )
    parser.set_defaults(run=run, parser=parser)
    flags.add_layers(parser)
    _add_choices(parser.add_argument_group("what to measure"))
    output = parser.add_argument_group("output")
    output.add_argument("--csv", type=Path, metavar="FILE", help="write one line per row")
    output.add_argument("--json", type=Path, metavar="FILE", help="write rows, totals, settings and the machine")
    output.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the ratios (needs matplotlib)")
    output.add_argument("--quiet", action="store_true", help="the table alone")


def _add_choices(group: Any) -> None:
    flags.add_kinds(group, "channels_first")
    group.add_argument(
        "--algorithms", type=flags.words, metavar="A,B", help="only these; auto is what fastconv would take"
    )
    group.add_argument("--budget", type=float, metavar="SECONDS", default=0.2, help="time for each row (0.2)")
    group.add_argument("--no-torch", action="store_true", help="leave PyTorch out")


def run(args: argparse.Namespace) -> int:
    """Measure, print and write what the flags name; return the exit status."""
    _check_outputs(args)
    settings = _settings(args)
    report = flags.benchmarks("report")
    if not args.quiet:
        print(_explanation(args, settings), flush=True)
    rows, interrupted = _measure(settings, args.quiet)
    if args.network and rows:
        print("\n" + report.totals_text(rows))
    if not args.quiet and (noise := report.noise_text(rows)):
        print("\n" + noise)
    if not (args.network or args.input or args.quiet):
        print("\nNext: --network vgg16, --input 8,64,56,56 --filters 64 --kernel 3, --plot FILE.png; --help lists all.")
    if rows:
        _write(args, settings, rows)
    if interrupted:
        print("stopped; this is what was measured", file=sys.stderr)
        return 130
    return int(any(row.status in ("wrong", "failed") and row.provider != "torch" for row in rows))


def _check_outputs(args: argparse.Namespace) -> None:
    """Find out before anything is measured that a file cannot be written."""
    for flag in ("csv", "json", "plot"):
        path = getattr(args, flag)
        if path is None:
            continue
        if path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
            raise UsageError(f"--{flag} {path} cannot be written")
    if args.plot is None:
        return
    if args.plot.suffix.lower() not in _PLOT_SUFFIXES:
        raise UsageError(f"--plot must end in {', '.join(_PLOT_SUFFIXES)}, not {args.plot.name!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'fastconv[report]'")


def _settings(args: argparse.Namespace) -> Any:
    from .. import registry

    if not 0 < args.budget < float("inf"):
        raise UsageError(f"--budget must be a positive number of seconds, not {args.budget:g}")
    for name in args.algorithms or ():
        registry.named(name, args.device)
    flags.check_kinds(args)
    # Without a GPU this is where it ends.
    flags.architecture(args)
    compare: Any = flags.benchmarks("compare")
    return compare.Settings(
        workloads=flags.workloads(args),
        directions=flags.directions(args.direction),
        algorithms=args.algorithms,
        dtype=args.dtype,
        data_formats=flags.data_formats(args.data_format),
        precision=config.get("precision") if args.precision is None else args.precision,
        threads=args.threads,
        budget=args.budget,
        with_torch=not args.no_torch,
        device=args.device,
    )


def _explanation(args: argparse.Namespace, settings: Any) -> str:
    """Return three lines that say what the table shows, and a fourth for a GPU."""
    what = f"{args.network or ('one layer' if args.input else 'One layer of each kind')}, {settings.dtype}"
    problem = "it was left out" if args.no_torch else flags.benchmarks("providers").torch_problem(args.device)
    if problem is None:
        ratio = "ratio = PyTorch's time (in its faster layout) / time: above 1 beats it."
    else:
        ratio = f"no ratio to PyTorch: {problem}."
    lines = [
        f"{what}, {_where(args, settings)}; medians. {ratio}",
        "spread: of the times from quantile 20 to 80, over the median; GFLOP/s: of direct convolution's arithmetic;",
        "RMS error: against float64; <- auto: what fastconv takes.",
    ]
    if args.device != "cpu":
        lines.append("ms: time on the GPU, caches emptied before; host us: a call's on the host; cuDNN without TF32.")
    return "\n".join([*lines, ""])


def _where(args: argparse.Namespace, settings: Any) -> str:
    """Return what computes: threads, or a GPU with the library of the arrays."""
    if args.device != "cpu":
        from ..cuda import launch

        library = device_arrays.gpu_library()
        return f"{launch.model(library.device)} ({library.device}), arrays of {library.name}"
    from ..cpu import threads

    with config.options(**({} if settings.threads is None else {"threads": settings.threads})):
        count = threads.count()
    return f"{count} thread{'s' * (count > 1)}"


def _measure(settings: Any, quiet: bool) -> tuple[list[Any], bool]:
    """Measure and print; return the rows, and whether Ctrl-C ended it."""
    compare, report = flags.benchmarks("compare"), flags.benchmarks("report")
    table, rows = report.Table(*_widest(settings), settings.device), []
    progress = Progress(len(settings.workloads) * len(settings.directions), quiet)
    print(table.header(), flush=True)
    try:
        for workload in settings.workloads:
            problem = compare.Problem.make(workload, flags.dtype(settings.dtype))
            for direction in settings.directions:
                progress.show(f"{workload.name} {direction}")
                found = compare.run_layer(settings, problem, direction)
                rows += found
                progress.step()
                print("\n".join(map(table.line, found)), flush=True)
    except KeyboardInterrupt:
        return rows, True
    finally:
        progress.close()
    return rows, False


def _widest(settings: Any) -> tuple[list[str], list[str]]:
    """Return the names of layers and algorithms that the table has to have room for."""
    from .. import registry

    layers = [f"{w.name} x{w.count}" if w.count > 1 else w.name for w in settings.workloads]
    return layers, ["torch", *(a.name for a in registry.on(settings.device)), *(settings.algorithms or ())]


def _write(args: argparse.Namespace, settings: Any, rows: list[Any]) -> None:
    report = flags.benchmarks("report")
    network = args.network or ""
    if args.csv is not None:
        args.csv.write_text(report.to_csv(rows), encoding="utf-8")
    if args.json is not None:
        args.json.write_text(report.to_json(rows, {"network": network, **settings.describe()}), encoding="utf-8")
    if args.plot is not None:
        report.plot(rows, str(args.plot), f"fastconv {__version__} {network}".strip())
