"""``explain`` and ``tune``: what algorithms are predicted to take for a layer, and what they take as measured."""

from __future__ import annotations

import argparse
from itertools import product
from typing import Any

from .. import config
from ..cuda.architecture import ARCHITECTURES
from ..errors import MissingDependencyError
from . import flags
from .flags import UsageError
from .progress import Progress


def add_explain(commands: Any) -> None:
    """Add the command to print the table of a layer's algorithms."""
    parser = commands.add_parser(
        "explain",
        help="say what each algorithm needs and is predicted to take, and why it cannot, without running any",
        description="Print a table of all algorithms for a layer or each layer of a network: workspace, predicted and "
        "measured time, which one auto takes, why one cannot be called; for a GPU, which need not be there, also the "
        "registers, occupancy and instructions of their kernels. Without --input or --network: one layer of each kind.",
    )
    parser.set_defaults(run=_explain, parser=parser)
    flags.add_layers(parser)
    devices = ("cpu", "cuda", *ARCHITECTURES)
    flags.add_kinds(parser.add_argument_group("what to show"), "channels_first", "forward", devices)


def _explain(args: argparse.Namespace) -> int:
    from .. import selection

    flags.check_kinds(args)
    if args.device != "cpu":
        from ..cuda import toolchain

        # Once, not beside every algorithm of every layer.
        if problem := toolchain.problem(toolchain.installed()):
            raise MissingDependencyError(f"explain --device {args.device} compiles the kernels: {problem}")
    tables = product(flags.workloads(args), flags.directions(args.direction), flags.data_formats(args.data_format))
    with config.options(**({} if args.threads is None else {"threads": args.threads})):
        for number, (layer, direction, data_format) in enumerate(tables):
            geometry = layer.geometry(data_format, flags.dtype(args.dtype))
            table = selection.explain(geometry, args.device, direction=direction, precision=args.precision)
            print("\n" * (number > 0) + f"{layer.name}: " * bool(layer.network) + table, flush=True)
    return 0


def add_tune(commands: Any) -> None:
    """Add the command to measure a layer's algorithms."""
    parser = commands.add_parser(
        "tune",
        help="measure every algorithm on a layer or a network, for auto to know",
        description="Measure every algorithm on a layer or a network and keep the times: from then on "
        'algorithm="auto" takes the one that was fastest. What has been measured is not measured again.',
    )
    parser.set_defaults(run=_tune, parser=parser)
    flags.add_layers(parser)
    flags.add_kinds(parser.add_argument_group("what to measure"), "both")
    kept = parser.add_argument_group("what is known")
    kept.add_argument("--clear", action="store_true", help="forget every time measured on this machine")
    kept.add_argument("--show", action="store_true", help="list the convolutions measured, and their times")
    parser.add_argument("--quiet", action="store_true")


def _tune(args: argparse.Namespace) -> int:
    from .. import tuning

    if (args.show or args.clear) and (args.network or args.input):
        raise UsageError("tune --show and --clear are for all that has been measured: leave --network and --input out")
    if not (args.network or args.input or args.clear or args.show):
        raise UsageError("tune needs --network, --input, --show or --clear")
    flags.check_kinds(args)
    flags.architecture(args)
    if args.clear:
        print(f"forgot {tuning.count()} convolutions of {tuning.file()}")
        tuning.clear()
    if args.network or args.input:
        _measure_layers(args)
    if args.show:
        print("\n".join(_known_times(tuning.entries())))
    if not (args.quiet or args.clear):
        print(f"{tuning.count()} convolutions are known in {tuning.file()}")
    return 0


def _known_times(entries: dict[str, dict[str, float]]) -> list[str]:
    """Return a table of what has been measured: convolutions in words, and times with the fastest first."""
    from .. import tuning

    rows: list[tuple[str, ...]] = [
        ("layer", "direction", "data format", "dtype", "on", "precision", "ms, the fastest first")
    ]
    for entry, times in entries.items():
        order = sorted(times, key=lambda name: times[name])
        rows.append((*tuning.described(entry), ", ".join(f"{name} {times[name] * 1e3:.4g}" for name in order)))
    widths = [max(map(len, column)) for column in list(zip(*rows))[:-1]]
    return ["  ".join([*(word.ljust(w) for word, w in zip(row, widths)), row[-1]]) for row in rows]


def _measure_layers(args: argparse.Namespace) -> None:
    layers, formats = flags.workloads(args), flags.data_formats(args.data_format)
    directions = flags.directions(args.direction)
    progress, device = Progress(len(layers) * len(directions) * len(formats), args.quiet), flags.architecture(args)
    with config.options(**({} if args.threads is None else {"threads": args.threads})):
        try:
            for layer in layers:
                for direction in directions:
                    for data_format in formats:
                        progress.show(f"{layer.name} {direction} {data_format}")
                        geometry = layer.geometry(data_format, flags.dtype(args.dtype))
                        found = _tuned(geometry, direction, args.precision, device)
                        progress.step()
                        if not args.quiet:
                            print(f"{layer.name:<16}  {direction:<11}  {data_format:<14}  {found}", flush=True)
        finally:
            progress.close()


def _tuned(geometry: Any, direction: str, precision: str | None, device: str) -> str:
    """Measure a convolution; return what is the fastest, and what was predicted to be if that is another."""
    from .. import selection

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
