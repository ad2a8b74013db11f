"""Choosing an algorithm, per call: by name, or the fastest, as measured or predicted, of those that may be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from . import config, registry, tuning
from .arrays import HALF, compute_dtype
from .errors import ArgumentTypeError, MissingDependencyError, UnsupportedError, WorkspaceLimitError
from .geometry import DIRECTIONS, ConvGeometry, one_of
from .registry import Algorithm, Buffer

# What "cuda" stands for in tables where there is no GPU.
DEFAULT_ARCHITECTURE = "sm_90a"


class Choice(NamedTuple):
    """An algorithm, the geometry it gets and the workspace it needs."""

    algorithm: Algorithm
    geometry: ConvGeometry
    buffers: dict[str, Buffer]


@dataclass(frozen=True)
class Candidate:
    """What is known of one algorithm for one convolution, before it runs.

    Attributes
    ----------
    name : str
    supported : bool
        Whether it may be called by name; if not, `reason` says why.
    reason : str
    workspace_bytes : int or None
        Including the float32 copies of half-precision operands and the padded input of a padding mode.
    seconds : float or None
        Predicted time.
    measured : float or None
        Time measured on this machine, where the convolution has been tuned.
    chosen : bool
        Whether algorithm="auto" takes it.
    """

    name: str
    supported: bool
    reason: str
    workspace_bytes: int | None
    seconds: float | None
    measured: float | None
    chosen: bool


def staging_bytes(geometry: ConvGeometry, device: str = "cpu") -> int:
    """Return the bytes of copies made around any algorithm.

    On the CPU half-precision operands and results are staged in float32; a padding mode other than zeros pads the
    input.
    """
    elements = 0
    dtype = _kernel_dtype(geometry, device)
    if geometry.padding_mode != "zeros":
        elements += _count(geometry.padded().x_shape)
    if dtype != geometry.dtype and dtype.kind == "f":
        elements += sum(map(_count, (geometry.x_shape, geometry.weight_shape, geometry.output_shape)))
    return elements * dtype.itemsize


def _count(dimensions: tuple[int, ...]) -> int:
    return int(np.prod(dimensions, dtype=object)) if dimensions else 1


def _kernel_dtype(geometry: ConvGeometry, device: str) -> np.dtype:
    """Return the dtype of the arrays that kernels get: those of a GPU convert half types themselves."""
    half = geometry.dtype.name in HALF
    return geometry.dtype if half and device != "cpu" else compute_dtype(geometry.dtype)


def lifted(geometry: ConvGeometry, stored: str, device: str = "cpu") -> ConvGeometry:
    """Return the geometry that kernels see: the padding mode carried out, three spatial dimensions."""
    plain = geometry if geometry.padding_mode == "zeros" else geometry.padded()
    return plain.lifted(stored, _kernel_dtype(geometry, device))


def choose(
    geometry: ConvGeometry,
    direction: str,
    stored: str,
    device: str,
    algorithm: Any = "auto",
    precision: Any = None,
) -> Choice:
    """Return the algorithm for one call.

    Parameters
    ----------
    geometry : ConvGeometry
    direction : "forward", "input_grad" or "weight_grad"
    stored : "channels_first" or "channels_last"
        How the arrays lie in memory.
    device : str
        "cpu", or the architecture of a GPU.
    algorithm : str
        "auto" (or the option of that name), "tune" (measure what has not been, then as "auto"), a family or a variant.
    precision : str or None
        None: the option of that name.

    Raises
    ------
    UnsupportedError
        An algorithm asked for by name cannot do this; the message says why.
    WorkspaceLimitError
        It could, with more workspace than the limit.
    """
    if algorithm == "auto":
        algorithm = config.get("algorithm")
    precision = checked_precision(precision)
    kind = "cpu" if device == "cpu" else "cuda"
    # Also the error for a name that nobody knows.
    registry.named(algorithm, kind)
    return _choose(
        geometry, direction, stored, kind, algorithm, precision, config.get("workspace_limit"),
        _units(device), _model(device), _registered(kind), tuning.changes, config.get("amx"),
    )  # fmt: skip


def checked_precision(precision: Any) -> str:
    """Return the precision asked for, or the option's."""
    return config.get("precision") if precision is None else one_of("precision", precision, config.PRECISIONS)


def _units(device: str) -> int | str:
    """Return what times depend on beside the convolution: the number of threads, or a GPU's architecture."""
    if device != "cpu":
        return device
    from .cpu import threads

    return threads.count()


def _model(device: str) -> str:
    """Return the model of the GPU whose times are of use, if it is there; empty for the CPU."""
    if device == "cpu":
        return ""
    from .cuda import launch

    return launch.model(device)


def _registered(device: str) -> tuple[Algorithm, ...]:
    return tuple(registry.on(device))


@lru_cache(maxsize=4096)
def _choose(
    geometry: ConvGeometry,
    direction: str,
    stored: str,
    device: str,
    name: str,
    precision: str,
    limit: int,
    units: int | str,
    model: str,
    registered: tuple[Algorithm, ...],
    changes: int,
    amx: str,
) -> Choice:
    inner = lifted(geometry, stored, device)
    room = limit - staging_bytes(geometry, device)
    refusals: list[str] = []
    choices: list[Choice] = []
    smallest: tuple[int, Choice] | None = None
    for algorithm in _asked_for(name, device, inner, direction, precision, units):
        refusal = _refusal(algorithm, inner, direction, precision, units)
        if refusal:
            refusals.append(f"{algorithm.name}: {refusal}")
            continue
        if geometry.is_empty:
            # Nothing will run.
            return Choice(algorithm, inner, {})
        choice = Choice(algorithm, inner, algorithm.workspace(inner, direction, max(room, 0)))
        size = registry.workspace_bytes(choice.buffers)
        if smallest is None or size < smallest[0]:
            smallest = size, choice
        if size <= room:
            choices.append(choice)
    if choices:
        entry = tuning.key(inner, geometry.dtype, direction, device, units, precision, model)
        if name == "tune" and len(choices) > 1:
            tuning.tune(entry, geometry.dtype, direction, choices, device)
        return _fastest(choices, tuning.times(entry), direction, units)
    if smallest is None:
        why = "; ".join(refusals) or f"there is no such algorithm on the {device} yet"
        raise UnsupportedError(f"algorithm={name!r} cannot compute this {direction}: {why}")
    if name in ("auto", "tune"):
        # A valid call never fails for want of a few rows: the frugal algorithm runs.
        return smallest[1]
    needed = smallest[0] + limit - room
    raise WorkspaceLimitError(
        f"algorithm={name!r} needs {needed} bytes of workspace, more than the limit of {limit} bytes "
        f"(config.workspace_limit)",
        needed,
        limit,
    )


def _fastest(choices: list[Choice], measured: Mapping[str, float], direction: str, units: int | str) -> Choice:
    """Return the fastest of those measured, or the one predicted to be if none is: the two do not compare."""
    known = [choice for choice in choices if choice.algorithm.name in measured]
    if known:
        return min(known, key=lambda choice: measured[choice.algorithm.name])
    return min(choices, key=lambda choice: choice.algorithm.seconds(choice.geometry, direction, units))


def _asked_for(
    name: str, device: str, inner: ConvGeometry, direction: str, precision: str, units: int | str
) -> list[Algorithm]:
    """Return the algorithms of a name; where it is a family's too and that member cannot, the others of the family."""
    found = registry.named(name, device)
    others = [a for a in registry.on(device) if a.family == name and a not in found]
    refused = others and all(_refusal(a, inner, direction, precision, units) for a in found)
    return found + others if refused else found


def _refusal(algorithm: Algorithm, inner: ConvGeometry, direction: str, precision: str, units: int | str) -> str:
    if reason := algorithm.lacking(units):
        return reason
    if inner.dtype == np.float32 and not algorithm.keeps(precision):
        return f"its results keep the promise of precision={algorithm.precision!r}, not of {precision!r}"
    support = algorithm.supports(inner, direction)
    return "" if support.ok else support.reason


def algorithms(
    geometry: ConvGeometry,
    device: str = "cpu",
    *,
    direction: str = "forward",
    precision: str | None = None,
) -> list[Candidate]:
    """List every algorithm of a device, with what is known of it for this convolution.

    Parameters
    ----------
    geometry : ConvGeometry
        For instance ``ConvGeometry.create(x_shape, weight_shape, stride=2)``.
    device : str
        "cpu", "cuda" for the GPU that there is (or an H200 if there is none), or an architecture such as "sm_80".
    direction : "forward", "input_grad" or "weight_grad"
    precision : str, optional

    Returns
    -------
    list of Candidate

    Raises
    ------
    ArgumentError (ValueError), ArgumentTypeError (TypeError)

    Examples
    --------
    >>> import fastconv
    >>> geometry = fastconv.ConvGeometry.create((1, 3, 8, 8), (4, 3, 3, 3))
    >>> [c.name for c in fastconv.algorithms(geometry) if c.supported][:2]
    ['direct', 'im2col']
    """
    if not isinstance(geometry, ConvGeometry):
        raise ArgumentTypeError(
            f"geometry must be a ConvGeometry, such as ConvGeometry.create(x.shape, weight.shape), "
            f"not {type(geometry).__name__}"
        )
    device, kind = checked_device(device)
    one_of("direction", direction, DIRECTIONS)
    stored, level = geometry.data_format, checked_precision(precision)
    inner, limit = lifted(geometry, stored, device), config.get("workspace_limit")
    staging, units, model = staging_bytes(geometry, device), _units(device), _model(device)
    here = registry.on(kind)
    how = (direction, stored, kind, "auto", level, limit, units, model, tuple(here), tuning.changes, config.get("amx"))
    try:
        best = _choose(geometry, *how).algorithm.name
    except UnsupportedError:
        # The table says of each why.
        best = None
    except MissingDependencyError as error:
        return [Candidate(algorithm.name, False, str(error), None, None, None, False) for algorithm in here]
    measured = tuning.times(tuning.key(inner, geometry.dtype, direction, kind, units, level, model))
    found = []
    for algorithm in here:
        reason = "there is nothing to compute" if geometry.is_empty else ""
        reason = reason or _refusal(algorithm, inner, direction, level, units)
        if reason:
            found.append(Candidate(algorithm.name, False, reason, None, None, None, False))
            continue
        size = staging + registry.workspace_bytes(algorithm.workspace(inner, direction, max(limit - staging, 0)))
        if size > limit:
            reason = f"needs {size} bytes of workspace, more than the limit of {limit}"
        seconds = algorithm.seconds(inner, direction, units)
        name = algorithm.name
        found.append(Candidate(name, not reason, reason, size, seconds, measured.get(name), name == best))
    return found


def checked_device(device: Any) -> tuple[str, str]:
    """Return ("cpu", "cpu") or (architecture of a GPU, "cuda")."""
    from .cuda.architecture import ARCHITECTURES

    if one_of("device", device, ("cpu", "cuda", *ARCHITECTURES)) == "cpu":
        return "cpu", "cpu"
    if device != "cuda":
        return device, "cuda"
    from .cuda import launch

    try:
        return launch.architecture(), "cuda"
    except (MissingDependencyError, UnsupportedError):
        return DEFAULT_ARCHITECTURE, "cuda"


def explain(
    geometry: ConvGeometry,
    device: str = "cpu",
    *,
    direction: str = "forward",
    precision: str | None = None,
) -> str:
    """Return :func:`algorithms` as a table to print; for a GPU with what the kernels' machine code takes.

    The kernels are compiled for it, so that no GPU needs to be there: registers, share of a multiprocessor's threads
    that are resident, shared memory, instructions in all and in the main loop, and what the loop consists of.

    Parameters
    ----------
    geometry, device, direction, precision
        As :func:`algorithms` takes them.

    Returns
    -------
    str

    Raises
    ------
    As :func:`algorithms`.

    Examples
    --------
    >>> import fastconv
    >>> geometry = fastconv.ConvGeometry.create((1, 3, 8, 8), (4, 3, 3, 3))
    >>> print(fastconv.explain(geometry).splitlines()[0])
    conv2d forward: x (1, 3, 8, 8), weight (4, 3, 3, 3) -> (1, 4, 6, 6), 7.78 kFLOP, 1.73 KiB, float32
    """
    found, g = algorithms(geometry, device, direction=direction, precision=precision), geometry
    title = (
        f"conv{g.spatial_dims}d {direction}: x {g.x_shape}, weight {g.weight_shape} -> {g.output_shape}, "
        f"{_scaled(g.flops, 1000, ('FLOP', 'kFLOP', 'MFLOP', 'GFLOP', 'TFLOP'))}, {_bytes(g.bytes)}, {g.dtype}"
    )
    rows = [("algorithm", "workspace", "predicted", "measured", "")]
    for c in found:
        size = "-" if c.workspace_bytes is None else _bytes(c.workspace_bytes)
        rows.append((c.name, size, _time(c.seconds), _time(c.measured), "<- auto" if c.chosen else c.reason))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join([f"{name:<{widths[0]}}", *(f"{n:>{w}}" for n, w in zip(numbers, widths[1:])), note]).rstrip()
        for name, *numbers, note in rows
    ]
    if not found:
        lines = [f"there are no algorithms on the device {device!r} yet"]
    supported = [c.name for c in found if c.supported]
    if device != "cpu" and supported:
        lines += ["", *_kernel_lines(geometry, device, direction, supported)]
    return "\n".join([title, *lines])


def _kernel_lines(geometry: ConvGeometry, device: str, direction: str, names: list[str]) -> list[str]:
    """Return the table of the kernels that the algorithms of these names launch."""
    from .cuda import study

    architecture, kind = checked_device(device)
    inner = lifted(geometry, geometry.data_format, architecture)
    chosen = [a for a in registry.on(kind) if a.name in names]
    return study.table([(a.name, a.implementation.steps(inner, direction)) for a in chosen], architecture)


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3f} ms"


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        # 999.5 would be shown as 1e+03.
        if value < min(base, 999.5):
            return f"{value:.3g} {unit}"
        value /= base
    return f"{value:.3g} {units[-1]}" if value < 999.5 else f"{value:.0f} {units[-1]}"


def _bytes(value: int) -> str:
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))
