"""Flags that commands share: layers, networks, and what of them to compute; and what these flags mean."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .. import config, device_arrays
from ..errors import MissingDependencyError
from ..geometry import DATA_FORMATS, DIRECTIONS

NETWORKS = ("vgg16", "resnet50", "alexnet", "mobilenet", "mnist", "fashion")
DTYPES = ("float32", "float64", "float16", "bfloat16")

_LAYER_FLAGS = ("filters", "kernel", "stride", "padding", "dilation", "groups")


class UsageError(Exception):
    """Flags that do not fit together; the message is one sentence."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        """Print it and exit with status 2."""
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


def add_layers(parser: Any) -> None:
    """Add the flags of one layer and those of a network, for :func:`workloads`."""
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


def add_kinds(group: Any, data_format: str, direction: str = "all", devices: Sequence[str] = ("cpu", "cuda")) -> None:
    """Add the flags that say what of a layer is computed and where, for :func:`check_kinds` and those after it."""
    group.add_argument("--device", choices=devices, default="cpu", help="cuda: the current GPU")
    group.add_argument("--direction", metavar="D", default=direction, help=f"all, or some of {', '.join(DIRECTIONS)}")
    group.add_argument("--dtype", choices=DTYPES, default="float32")
    group.add_argument("--data-format", choices=(*DATA_FORMATS, "both"), default=data_format)
    group.add_argument("--precision", choices=config.PRECISIONS, help="promise about float32 results")
    group.add_argument("--threads", type=int, metavar="T", help="threads of every library")


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


def words(text: str) -> list[str]:
    """Return the words between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


# --- what they mean --------------------------------------------------------------------------------------------


def benchmarks(module: str) -> Any:
    """Import a module of the benchmarks, from the installed package or the folder beside it in a checkout."""
    if importlib.util.find_spec("fastconv.benchmarks") is None:
        folder = Path(__file__).resolve().parent.parent.parent / "benchmarks"
        spec = importlib.util.spec_from_file_location(
            "fastconv.benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None or not (folder / "__init__.py").exists():
            raise MissingDependencyError("compare needs the benchmarks folder of the source, which is not here")
        package = importlib.util.module_from_spec(spec)
        sys.modules["fastconv.benchmarks"] = package
        spec.loader.exec_module(package)
    return importlib.import_module(f"fastconv.benchmarks.{module}")


def check_kinds(args: argparse.Namespace) -> None:
    """Refuse what does not go together, and wrong options in the environment, before anything is computed."""
    if args.dtype == "bfloat16" and importlib.util.find_spec("ml_dtypes") is None:
        raise UsageError("--dtype bfloat16 needs ml_dtypes: pip install 'fastconv[bfloat16]'")
    if args.threads is not None and args.threads < 1:
        raise UsageError(f"--threads must be at least 1, not {args.threads}")
    if args.threads is not None and args.device != "cpu":
        raise UsageError(f"--threads does not go with --device {args.device}")
    # Values from the environment are checked when they are read.
    for option in config.DEFAULTS:
        config.get(option)


def architecture(args: argparse.Namespace) -> str:
    """Return what `selection` knows a device by: "cpu", or the architecture of the current GPU."""
    return "cpu" if args.device == "cpu" else device_arrays.gpu_library().device


def data_formats(text: str) -> tuple[str, ...]:
    """Return the formats that --data-format names."""
    return DATA_FORMATS if text == "both" else (text,)


def directions(text: str) -> tuple[str, ...]:
    """Return the directions that --direction names."""
    if text == "all":
        return DIRECTIONS
    named = words(text)
    unknown = [word for word in named if word not in DIRECTIONS]
    if unknown or not named:
        raise UsageError(f"--direction must be all or some of {', '.join(DIRECTIONS)}, not {text!r}")
    return tuple(d for d in DIRECTIONS if d in named)


def workloads(args: argparse.Namespace) -> list[Any]:
    """Return the layers that the flags name."""
    known: Any = benchmarks("workloads")
    if args.input is not None:
        for flag in ("network", "batch", "layers"):
            if getattr(args, flag) is not None:
                raise UsageError(f"--{flag} does not go with --input")
        chosen = [_single_layer(args, known)]
    else:
        for flag in _LAYER_FLAGS:
            if getattr(args, flag) is not None:
                raise UsageError(f"--{flag} needs --input N,C,H,W")
        chosen = _network_layers(args, known)
    for workload in chosen:
        # Refuses sizes that do not fit, before anything is measured.
        if workload.geometry(dtype=dtype(args.dtype)).is_empty:
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


def dtype(name: str) -> Any:
    """Return the dtype that --dtype names."""
    if name == "bfloat16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return name
