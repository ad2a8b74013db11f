"""Choosing an algorithm, per call: by name, or the fastest, as measured or predicted, of those that may be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from . import config, registry, tuning
from .arrays import compute_dtype
from .errors import ArgumentTypeError, UnsupportedError, WorkspaceLimitError
from .geometry import DIRECTIONS, ConvGeometry, one_of
from .registry import Algorithm, Buffer


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


def staging_bytes(geometry: ConvGeometry) -> int:
    """Return the bytes of copies made around any algorithm.

    Half-precision operands and results are staged in float32; a padding mode other than zeros pads the input.
    """
    elements = 0
    dtype = compute_dtype(geometry.dtype)
    if geometry.padding_mode != "zeros":
        elements += _count(geometry.padded().x_shape)
    if dtype != geometry.dtype and dtype.kind == "f":
        elements += sum(map(_count, (geometry.x_shape, geometry.weight_shape, geometry.output_shape)))
    return elements * dtype.itemsize


def _count(dimensions: tuple[int, ...]) -> int:
    return int(np.prod(dimensions, dtype=object)) if dimensions else 1


def lifted(geometry: ConvGeometry, stored: str) -> ConvGeometry:
    """Return the geometry that kernels see: the padding mode carried out, three spatial dimensions."""
    plain = geometry if geometry.padding_mode == "zeros" else geometry.padded()
    return plain.lifted(stored, compute_dtype(geometry.dtype))


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
    # Also the error for a name that nobody knows.
    registry.named(algorithm, device)
    return _choose(
        geometry, direction, stored, device, algorithm, precision, config.get("workspace_limit"),
        _thread_count(device), _registered(device), tuning.changes, config.get("amx"),
    )  # fmt: skip


def checked_precision(precision: Any) -> str:
    """Return the precision asked for, or the option's."""
    return config.get("precision") if precision is None else one_of("precision", precision, config.PRECISIONS)


def _thread_count(device: str) -> int:
    if device != "cpu":
        return 1
    from .cpu import threads

    return threads.count()


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
    threads: int,
    registered: tuple[Algorithm, ...],
    changes: int,
    amx: str,
) -> Choice:
    inner = lifted(geometry, stored)
    room = limit - staging_bytes(geometry)
    refusals: list[str] = []
    choices: list[Choice] = []
    smallest: tuple[int, Choice] | None = None
    for algorithm in registry.named(name, device):
        refusal = _refusal(algorithm, inner, direction, precision)
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
        entry = tuning.key(inner, geometry.dtype, direction, device, threads, precision)
        if name == "tune" and len(choices) > 1:
            tuning.tune(entry, geometry.dtype, direction, choices)
        return _fastest(choices, tuning.times(entry), direction, threads)
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


def _fastest(choices: list[Choice], measured: Mapping[str, float], direction: str, threads: int) -> Choice:
    """Return the fastest of those measured, or the one predicted to be if none is: the two do not compare."""
    known = [choice for choice in choices if choice.algorithm.name in measured]
    if known:
        return min(known, key=lambda choice: measured[choice.algorithm.name])
    return min(choices, key=lambda choice: choice.algorithm.seconds(choice.geometry, direction, threads))


def _refusal(algorithm: Algorithm, inner: ConvGeometry, direction: str, precision: str) -> str:
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
    device : "cpu" or "cuda"
    direction : "forward", "input_grad" or "weight_grad"
    precision : str, optional

    Returns
    -------
    list of Candidate

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
    one_of("device", device, ("cpu", "cuda"))
    one_of("direction", direction, DIRECTIONS)
    stored, level = geometry.data_format, checked_precision(precision)
    inner, limit = lifted(geometry, stored), config.get("workspace_limit")
    staging, threads = staging_bytes(geometry), _thread_count(device)
    here = registry.on(device)
    best = None
    if here:
        how = (direction, stored, device, "auto", level, limit, threads, tuple(here), tuning.changes, config.get("amx"))
        best = _choose(geometry, *how).algorithm.name
    measured = tuning.times(tuning.key(inner, geometry.dtype, direction, device, threads, level))
    found = []
    for algorithm in here:
        reason = "there is nothing to compute" if geometry.is_empty else ""
        reason = reason or _refusal(algorithm, inner, direction, level)
        if reason:
            found.append(Candidate(algorithm.name, False, reason, None, None, None, False))
            continue
        size = staging + registry.workspace_bytes(algorithm.workspace(inner, direction, max(limit - staging, 0)))
        if size > limit:
            reason = f"needs {size} bytes of workspace, more than the limit of {limit}"
        seconds = algorithm.seconds(inner, direction, threads)
        name = algorithm.name
        found.append(Candidate(name, not reason, reason, size, seconds, measured.get(name), name == best))
    return found


def explain(
    geometry: ConvGeometry,
    device: str = "cpu",
    *,
    direction: str = "forward",
    precision: str | None = None,
) -> str:
    """Return :func:`algorithms` as a table to print.

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
    return "\n".join([title, *lines])


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3f} ms"


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if value < base:
            return f"{value:.3g} {unit}"
        value /= base
    return f"{value:.3g} {units[-1]}"


def _bytes(value: int) -> str:
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))
