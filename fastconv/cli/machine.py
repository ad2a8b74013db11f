"""``info`` and ``warmup``: what the package found on the machine, and compiling ahead. Both are in `fastconv.info`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from time import perf_counter
from typing import Any

from ..geometry import DATA_FORMATS
from . import flags


def add_info(commands: Any) -> None:
    """Add the command to show what was found."""
    text = "show what fastconv found on this machine, and why anything is off"
    parser = commands.add_parser("info", help=text, description=text)
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_info, parser=parser)


def _info(args: argparse.Namespace) -> int:
    from .. import info

    found = info.collect()
    print(json.dumps(found, indent=1) if args.json else info.render(found))
    return 0


def add_warmup(commands: Any) -> None:
    """Add the command to compile ahead."""
    text = "compile the usual kernels ahead; they are kept on disk"
    parser = commands.add_parser("warmup", help=text, description=text)
    parser.add_argument("--operations", type=flags.words, metavar="A,B", help="such as conv2d,max_pool2d")
    parser.add_argument("--dtypes", type=flags.words, metavar="A,B", default=["float32"])
    parser.add_argument(
        "--algorithms", type=flags.words, metavar="A,B", default=["auto"],
        help="of convolutions: names, auto for what it takes for usual layers (auto), or all",
    )  # fmt: skip
    parser.add_argument("--data-formats", type=flags.words, metavar="A,B", default=list(DATA_FORMATS))
    parser.add_argument("--quiet", action="store_true")
    parser.set_defaults(run=_warmup, parser=parser)


def _warmup(args: argparse.Namespace) -> int:
    from .. import info

    operations = info.USUAL_OPERATIONS if args.operations is None else args.operations
    algorithms = None if args.algorithms == ["all"] else args.algorithms
    steps: list[tuple[str, Callable[[], None]]]
    steps = info.warm_up_steps(operations, args.dtypes, args.data_formats, algorithms)
    start = perf_counter()
    for number, (label, run) in enumerate(steps, 1):
        if not args.quiet:
            print(f"[{number}/{len(steps)}] {label} ... ".ljust(56), end="", flush=True)
        before = perf_counter()
        run()
        if not args.quiet:
            print(f"{perf_counter() - before:6.1f} s", flush=True)
    if not args.quiet:
        cache = info.collect()["cache"]
        kept = f"kept in {cache['directory']}" if cache["writable"] else f"not kept: {cache['why']}"
        print(f"{len(steps)} operations ready in {perf_counter() - start:.1f} s; compiled kernels are {kept}")
    return 0
