"""The command: ``python -m fastconv compare | explain | info | tune | warmup``.

It reads flags, and prints. What is measured and how is in `fastconv.benchmarks`, which in a checkout is the folder
``benchmarks`` beside the package; what the package found on the machine is in `fastconv.info`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any, NoReturn

from . import config, device_arrays
from ._version import __version__
from .cuda.architecture import ARCHITECTURES
from .errors import FastconvError, MissingDependencyError
from .geometry import DATA_FORMATS, DIRECTIONS

NETWORKS = ("vgg16", "resnet50", "alexnet", "mobilenet", "mnist", "fashion")
DTYPES = ("float32", "float64", "float16", "bfloat16")

_LAYER_FLAGS = ("filters", "kernel", "stride", "padding", "dilation", "groups")
_PLOT_SUFFIXES = (".png", ".pdf", ".svg")


class UsageError(Exception):
    """Flags that do not fit together; the message is one sentence."""


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments; by default those of the process.

    Returns
    -------
    int
        Exit status: 0, 1 if an algorithm was wrong or failed, 130 after Ctrl-C.

    Raises
    ------
    SystemExit
        With status 2 for wrong flags, after one sentence on standard error.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        return args.run(args)
    except (UsageError, FastconvError) as error:
        command: _Parser = args.parser
        command.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe has gone, as `head` does: nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


# --- flags -----------------------------------------------------------------------------------------------------


def _parser() -> _Parser:
    parser = _Parser(prog="fastconv", description="Convolution and pooling kernels: compare, tune, compile ahead.")
    parser.add_argument("--version", action="version", version=f"fastconv {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="compare | explain | info | tune | warmup")
    _add_compare(commands)
    _add_explain(commands)
    _add_info(commands)
    _add_tune(commands)
    _add_warmup(commands)
    return parser


def _add_compare(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="time every algorithm on a layer or a network, against each other and PyTorch",
        description="Time every algorithm that can compute a layer, against each other and PyTorch. Results are "
        "checked against float64 first; a wrong one shows instead of its time, and the exit status is then 1. "
        "Without --input or --network: one layer of each kind, in about a minute.",
    )
    parser.set_defaults(run=_compare, parser=parser)
    _add_layers(parser)
    _add_choices(parser.add_argument_group("what to measure"))
    output = parser.add_argument_group("output")
    output.add_argument("--csv", type=Path, metavar="FILE", help="write one line per row")
    output.add_argument("--json", type=Path, metavar="FILE", help="write rows, totals, settings and the machine")
    output.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the ratios (needs matplotlib)")
    output.add_argument("--quiet", action="store_true", help="the table alone")


def _add_layers(parser: Any) -> None:
    layer = parser.add_argument_group("one layer")
    layer.add_argument("--input", type=_sizes, metavar="N,C,H,W", help="shape of the input; N,C,L or N,C,D,H,W too")
    layer.add_argument("--filters", type=int, metavar="K", help="number of filters")
    layer.add_argument("--kernel", type=_sizes, metavar="R,S", help="size of the kernel, one number or one each")
    layer.add_argument("--stride", type=_one_or_each, metavar="U")
    layer.add_argument("--padding", type=_padding, metavar="P", help="numbers, before:after, valid, same or full")
    layer.add_argument("--dilation", type=_one_or_each, metavar="D")
    layer.add_argument("--groups", type=int, metavar="G")
    network = parser.add_argument_group("a network")
    network.add_argument("--network", choices=NETWORKS, help="all its convolutions, repeated ones once")
    network.add_argument("--batch", type=int, metavar="N", help="number of images")
    network.add_argument("--layers", metavar="REGEX", help="only layers whose name matches")


def _add_kinds(group: Any, data_format: str, direction: str = "all", devices: Sequence[str] = ("cpu", "cuda")) -> None:
    group.add_argument("--device", choices=devices, default="cpu", help="cuda: the current GPU")
    group.add_argument("--direction", metavar="D", default=direction, help=f"all, or some of {', '.join(DIRECTIONS)}")
    group.add_argument("--dtype", choices=DTYPES, default="float32")
    group.add_argument("--data-format", choices=(*DATA_FORMATS, "both"), default=data_format)
    group.add_argument("--precision", choices=config.PRECISIONS, help="promise about float32 results")
    group.add_argument("--threads", type=int, metavar="T", help="threads of every library")


def _add_choices(group: Any) -> None:
    _add_kinds(group, "channels_first")
    group.add_argument("--algorithms", type=_words, metavar="A,B", help="only these; auto is what fastconv would take")
    group.add_argument("--budget", type=float, metavar="SECONDS", default=0.2, help="time for each row (0.2)")
    group.add_argument("--no-torch", action="store_true", help="leave PyTorch out")


def _add_explain(commands: Any) -> None:
    parser = commands.add_parser(
        "explain",
        help="say what each algorithm needs and is predicted to take, and why it cannot, without running any",
        description="Print a table of all algorithms for a layer or each layer of a network: workspace, predicted and "
        "measured time, which one auto takes, why one cannot be called; for a GPU, which need not be there, also the "
        "registers, occupancy and instructions of their kernels. Without --input or --network: one layer of each kind.",
    )
    parser.set_defaults(run=_explain, parser=parser)
    _add_layers(parser)
    devices = ("cpu", "cuda", *ARCHITECTURES)
    _add_kinds(parser.add_argument_group("what to show"), "channels_first", "forward", devices)


def _add_info(commands: Any) -> None:
    text = "show what fastconv found on this machine, and why anything is off"
    parser = commands.add_parser("info", help=text, description=text)
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_info, parser=parser)


def _add_tune(commands: Any) -> None:
    parser = commands.add_parser(
        "tune",
        help="measure every algorithm on a layer or a network, for auto to know",
        description="Measure every algorithm on a layer or a network and keep the times: from then on "
        'algorithm="auto" takes the one that was fastest. What has been measured is not measured again.',
    )
    parser.set_defaults(run=_tune, parser=parser)
    _add_layers(parser)
    _add_kinds(parser.add_argument_group("what to measure"), "both")
    kept = parser.add_argument_group("what is known")
    kept.add_argument("--clear", action="store_true", help="forget every time measured on this machine, first")
    kept.add_argument("--show", action="store_true", help="list the convolutions measured and their fastest algorithm")
    parser.add_argument("--quiet", action="store_true")


def _add_warmup(commands: Any) -> None:
    text = "compile the usual kernels ahead; they are kept on disk"
    parser = commands.add_parser("warmup", help=text, description=text)
    parser.add_argument("--operations", type=_words, metavar="A,B", help="such as conv2d,max_pool2d")
    parser.add_argument("--dtypes", type=_words, metavar="A,B", default=["float32"])
    parser.add_argument("--data-formats", type=_words, metavar="A,B", default=list(DATA_FORMATS))
    parser.add_argument("--quiet", action="store_true")
    parser.set_defaults(run=_warmup, parser=parser)


def _one_or_each(text: str) -> int | tuple[int, ...]:
    found = _sizes(text)
    return found[0] if len(found) == 1 else found


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in re.split("[,x]", text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers with commas between, not {text!r}") from None


def _padding(text: str) -> Any:
    if text.replace("_", "").isalpha():
        return text
    if ":" not in text:
        return _one_or_each(text)
    return tuple(_sizes(pair.replace(":", ",")) for pair in text.split(","))


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


# --- compare ---------------------------------------------------------------------------------------------------


def _benchmarks(module: str) -> Any:
    """Import a module of the benchmarks, from the installed package or the folder beside it in a checkout."""
    if importlib.util.find_spec("fastconv.benchmarks") is None:
        folder = Path(__file__).resolve().parent.parent / "benchmarks"
        spec = importlib.util.spec_from_file_location(
            "fastconv.benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None or not (folder / "__init__.py").exists():
            raise MissingDependencyError("compare needs the benchmarks folder of the source, which is not here")
        package = importlib.util.module_from_spec(spec)
        sys.modules["fastconv.benchmarks"] = package
        spec.loader.exec_module(package)
    return importlib.import_module(f"fastconv.benchmarks.{module}")


def _compare(args: argparse.Namespace) -> int:
    _check_outputs(args)
    settings = _settings(args)
    report = _benchmarks("report")
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
    from . import registry

    if not 0 < args.budget < float("inf"):
        raise UsageError(f"--budget must be a positive number of seconds, not {args.budget:g}")
    for name in args.algorithms or ():
        registry.named(name, args.device)
    _check_kinds(args)
    # Without a GPU this is where it ends.
    _architecture(args)
    compare: Any = _benchmarks("compare")
    return compare.Settings(
        workloads=_workloads(args),
        directions=_directions(args.direction),
        algorithms=args.algorithms,
        dtype=args.dtype,
        data_formats=_data_formats(args.data_format),
        precision=config.get("precision") if args.precision is None else args.precision,
        threads=args.threads,
        budget=args.budget,
        with_torch=not args.no_torch,
        device=args.device,
    )


def _check_kinds(args: argparse.Namespace) -> None:
    if args.dtype == "bfloat16" and importlib.util.find_spec("ml_dtypes") is None:
        raise UsageError("--dtype bfloat16 needs ml_dtypes: pip install 'fastconv[bfloat16]'")
    if args.threads is not None and args.threads < 1:
        raise UsageError(f"--threads must be at least 1, not {args.threads}")
    if args.threads is not None and args.device != "cpu":
        raise UsageError(f"--threads does not go with --device {args.device}")
    # Values from the environment are checked when they are read.
    for option in config.DEFAULTS:
        config.get(option)


def _architecture(args: argparse.Namespace) -> str:
    """Return what `selection` knows a device by: "cpu", or the architecture of the current GPU."""
    return "cpu" if args.device == "cpu" else device_arrays.gpu_library().device


def _data_formats(text: str) -> tuple[str, ...]:
    return DATA_FORMATS if text == "both" else (text,)


def _directions(text: str) -> tuple[str, ...]:
    if text == "all":
        return DIRECTIONS
    words = _words(text)
    unknown = [word for word in words if word not in DIRECTIONS]
    if unknown or not words:
        raise UsageError(f"--direction must be all or some of {', '.join(DIRECTIONS)}, not {text!r}")
    return tuple(d for d in DIRECTIONS if d in words)


def _workloads(args: argparse.Namespace) -> list[Any]:
    workloads: Any = _benchmarks("workloads")
    if args.input is not None:
        for flag in ("network", "batch", "layers"):
            if getattr(args, flag) is not None:
                raise UsageError(f"--{flag} does not go with --input")
        chosen = [_single_layer(args, workloads)]
    else:
        for flag in _LAYER_FLAGS:
            if getattr(args, flag) is not None:
                raise UsageError(f"--{flag} needs --input N,C,H,W")
        chosen = _network_layers(args, workloads)
    for workload in chosen:
        # Refuses sizes that do not fit, before anything is measured.
        if workload.geometry(dtype=_dtype(args.dtype)).is_empty:
            raise UsageError("there is nothing to measure without an image or a channel")
    return chosen


def _network_layers(args: argparse.Namespace, workloads: Any) -> list[Any]:
    if args.batch is not None and args.batch < 1:
        raise UsageError(f"--batch must be at least 1, not {args.batch}")
    try:
        return workloads.network(args.network or "tour", args.batch, args.layers)
    except re.error as error:
        raise UsageError(f"--layers {args.layers!r} is not a regular expression: {error}") from None
    except ValueError as error:
        raise UsageError(f"--layers: {error}") from None


def _single_layer(args: argparse.Namespace, workloads: Any) -> Any:
    dims = len(args.input) - 2
    if dims not in (1, 2, 3):
        raise UsageError(f"--input must be N,C,L or N,C,H,W or N,C,D,H,W, not {len(args.input)} numbers")
    if args.filters is None or args.kernel is None:
        raise UsageError("--input needs --filters and --kernel too")
    kernel = args.kernel * dims if len(args.kernel) == 1 else args.kernel
    groups = 1 if args.groups is None else args.groups
    if len(kernel) != dims:
        raise UsageError(f"--kernel must be one number or {dims}, not {len(kernel)}")
    if groups < 1 or args.input[1] % groups:
        raise UsageError(f"--groups must divide the {args.input[1]} channels of --input, not be {groups}")
    name = f"conv{dims}d {'x'.join(map(str, kernel))}"
    how = {flag: getattr(args, flag) for flag in ("stride", "padding", "dilation") if getattr(args, flag) is not None}
    weight_shape = (args.filters, args.input[1] // groups, *kernel)
    return workloads.Workload("", name, args.input, weight_shape, groups=groups, **how)


def _dtype(name: str) -> Any:
    if name == "bfloat16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return name


def _explanation(args: argparse.Namespace, settings: Any) -> str:
    """Return three lines that say what the table shows, and a fourth for a GPU."""
    what = f"{args.network or ('one layer' if args.input else 'One layer of each kind')}, {settings.dtype}"
    problem = "it was left out" if args.no_torch else _benchmarks("providers").torch_problem(args.device)
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
        from .cuda import launch

        library = device_arrays.gpu_library()
        return f"{launch.model(library.device)} ({library.device}), arrays of {library.name}"
    from .cpu import threads

    with config.options(**({} if settings.threads is None else {"threads": settings.threads})):
        count = threads.count()
    return f"{count} thread{'s' * (count > 1)}"


def _measure(settings: Any, quiet: bool) -> tuple[list[Any], bool]:
    """Measure and print; return the rows, and whether Ctrl-C ended it."""
    compare, report = _benchmarks("compare"), _benchmarks("report")
    table, rows = report.Table(*_widest(settings), settings.device), []
    progress = _Progress(len(settings.workloads) * len(settings.directions), quiet)
    print(table.header(), flush=True)
    try:
        for workload in settings.workloads:
            problem = compare.Problem.make(workload, _dtype(settings.dtype))
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
    from . import registry

    layers = [f"{w.name} x{w.count}" if w.count > 1 else w.name for w in settings.workloads]
    return layers, ["torch", *(a.name for a in registry.on(settings.device)), *(settings.algorithms or ())]


def _write(args: argparse.Namespace, settings: Any, rows: list[Any]) -> None:
    report = _benchmarks("report")
    network = args.network or ""
    if args.csv is not None:
        args.csv.write_text(report.to_csv(rows), encoding="utf-8")
    if args.json is not None:
        args.json.write_text(report.to_json(rows, {"network": network, **settings.describe()}), encoding="utf-8")
    if args.plot is not None:
        report.plot(rows, str(args.plot), f"fastconv {__version__} {network}".strip())


class _Progress:
    """A bar on standard error where that is a terminal: tqdm's if it is installed, or a plain line."""

    def __init__(self, total: int, quiet: bool) -> None:
        self._total, self._done = total, 0
        self._on = not quiet and sys.stderr.isatty()
        self._bar = self._tqdm() if self._on else None

    def _tqdm(self) -> Any:
        try:
            from tqdm import tqdm
        except ImportError:
            return None
        return tqdm(total=self._total, file=sys.stderr, leave=False, dynamic_ncols=True)

    def show(self, what: str) -> None:
        """Say what is being done."""
        if self._bar is not None:
            self._bar.set_description(what)
        elif self._on:
            self._line(f"[{self._done + 1}/{self._total}] {what}")

    def step(self) -> None:
        """One more is done; make room for what is printed next."""
        self._done += 1
        if self._bar is not None:
            self._bar.update()
            self._bar.clear()
        elif self._on:
            self._line("")

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
        elif self._on:
            self._line("")

    def _line(self, text: str) -> None:
        sys.stderr.write(f"\r{text:<70}\r" if not text else f"\r{text[:70]:<70}")
        sys.stderr.flush()


# --- explain ---------------------------------------------------------------------------------------------------


def _explain(args: argparse.Namespace) -> int:
    from . import selection

    _check_kinds(args)
    if args.device != "cpu":
        from .cuda import toolchain

        # Once, not beside every algorithm of every layer.
        if problem := toolchain.problem(toolchain.installed()):
            raise MissingDependencyError(f"explain --device {args.device} compiles the kernels: {problem}")
    tables = product(_workloads(args), _directions(args.direction), _data_formats(args.data_format))
    with config.options(**({} if args.threads is None else {"threads": args.threads})):
        for number, (layer, direction, data_format) in enumerate(tables):
            geometry = layer.geometry(data_format, _dtype(args.dtype))
            table = selection.explain(geometry, args.device, direction=direction, precision=args.precision)
            print("\n" * (number > 0) + f"{layer.name}: " * bool(layer.network) + table, flush=True)
    return 0


# --- tune ------------------------------------------------------------------------------------------------------


def _tune(args: argparse.Namespace) -> int:
    from . import tuning

    if not (args.network or args.input or args.clear or args.show):
        raise UsageError("tune needs --network, --input, --show or --clear")
    _check_kinds(args)
    _architecture(args)
    if args.clear:
        print(f"forgot {tuning.count()} convolutions of {tuning.file()}")
        tuning.clear()
    if args.network or args.input:
        _measure_layers(args)
    if args.show:
        for entry, times in tuning.entries().items():
            fastest = min(times, key=lambda name: times[name])
            print(f"{fastest:<14}  {times[fastest] * 1e3:10.3f} ms  of {len(times)}  {entry}")
    if not (args.quiet or args.clear):
        print(f"{tuning.count()} convolutions are known in {tuning.file()}")
    return 0


def _measure_layers(args: argparse.Namespace) -> None:
    layers, directions, formats = _workloads(args), _directions(args.direction), _data_formats(args.data_format)
    progress, device = _Progress(len(layers) * len(directions) * len(formats), args.quiet), _architecture(args)
    with config.options(**({} if args.threads is None else {"threads": args.threads})):
        try:
            for layer in layers:
                for direction in directions:
                    for data_format in formats:
                        progress.show(f"{layer.name} {direction} {data_format}")
                        geometry = layer.geometry(data_format, _dtype(args.dtype))
                        found = _tuned(geometry, direction, args.precision, device)
                        progress.step()
                        if not args.quiet:
                            print(f"{layer.name:<16}  {direction:<11}  {data_format:<14}  {found}", flush=True)
        finally:
            progress.close()


def _tuned(geometry: Any, direction: str, precision: str | None, device: str) -> str:
    """Measure a convolution; return what is the fastest, and what was predicted to be if that is another."""
    from . import selection

    selection.choose(geometry, direction, geometry.data_format, device, "tune", precision)
    found = selection.algorithms(geometry, device, direction=direction, precision=precision)
    supported = [c for c in found if c.supported and c.seconds is not None]
    predicted = min(supported, key=lambda c: c.seconds or 0.0)
    (chosen,) = (c for c in found if c.chosen)
    if chosen.measured is None or predicted.measured is None:
        return f"{chosen.name:<14}  (the only one)"
    text = f"{chosen.name:<14}  {chosen.measured * 1e3:10.3f} ms"
    if predicted is chosen:
        return text
    return f"{text}  (auto had predicted {predicted.name}, which took {predicted.measured * 1e3:.3f} ms)"


# --- info and warmup -------------------------------------------------------------------------------------------


def _info(args: argparse.Namespace) -> int:
    from . import info

    found = info.collect()
    print(json.dumps(found, indent=1) if args.json else info.render(found))
    return 0


def _warmup(args: argparse.Namespace) -> int:
    from . import info

    operations = info.USUAL_OPERATIONS if args.operations is None else args.operations
    steps: list[tuple[str, Callable[[], None]]] = info.warm_up_steps(operations, args.dtypes, args.data_formats)
    progress, start = _Progress(len(steps), args.quiet), perf_counter()
    try:
        for label, run in steps:
            progress.show(label)
            before = perf_counter()
            run()
            progress.step()
            if not args.quiet:
                print(f"{label:<48}  {perf_counter() - before:6.1f} s", flush=True)
    finally:
        progress.close()
    if not args.quiet:
        cache = info.collect()["cache"]
        kept = f"kept in {cache['directory']}" if cache["writable"] else f"not kept: {cache['why']}"
        print(f"{len(steps)} operations ready in {perf_counter() - start:.1f} s; compiled kernels are {kept}")
    return 0
