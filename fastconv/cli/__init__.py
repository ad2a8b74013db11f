"""The command: ``python -m fastconv compare | explain | info | tune | warmup``.

It reads flags, and prints: one module for each group of commands. What is behind them is elsewhere in the package.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from .._version import __version__
from ..errors import FastconvError
from . import choosing, compare, machine
from .flags import Parser, UsageError


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
        command: Parser = args.parser
        command.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe has gone, as `head` does: nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> Parser:
    parser = Parser(prog="fastconv", description="Convolution and pooling kernels: compare, tune, compile ahead.")
    parser.add_argument("--version", action="version", version=f"fastconv {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="compare | explain | info | tune | warmup")
    compare.add(commands)
    choosing.add_explain(commands)
    machine.add_info(commands)
    choosing.add_tune(commands)
    machine.add_warmup(commands)
    return parser
