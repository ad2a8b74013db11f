"""Measured times of algorithms, kept on disk: they overrule the prediction wherever there are any.

``algorithm="tune"`` and ``fastconv tune`` measure every algorithm that may compute a convolution, once, and record the
seconds in one JSON file per machine signature (CPU, instruction set, cores, versions, kernel sources)::

    {"machine": {...}, "entries": {"cpu forward float32 channels_last n8 c64 ...": {"direct": 0.011, ...}}}

The file lies in FASTCONV_CACHE_DIR, or else in the user's cache directory. It is read at the first convolution of a
process, and after that only to be merged with what other processes have written: within a process a choice changes
by its own tuning alone. A damaged or foreign file is set aside; where nothing can be written, memory serves.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import threading
import uuid
import warnings
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from . import config
from ._version import __version__
from .arrays import HALF
from .geometry import ConvGeometry

Entries = dict[str, dict[str, float]]

# A candidate is timed until it has taken so long and often, or longest; a call that takes longer is timed once.
# The first call of any process compiles, and cannot be cut short.
SHORTEST, FEWEST, LONGEST = 0.02, 5, 0.3
# Seconds to wait for another process that writes.
PATIENCE = 10.0

# How often the known times have changed: what has been chosen by older ones is chosen anew.
changes = 0

_turn = threading.RLock()
_known: Entries | None = None


def _after_fork_in_child() -> None:
    global _turn
    _turn = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


# --- what is known ---------------------------------------------------------------------------------------------


def key(
    inner: ConvGeometry, dtype: np.dtype, direction: str, device: str, units: int | str, precision: str, model: str = ""
) -> str:
    """Return the name of an entry: a lifted geometry, the caller's dtype, and what else a time depends on.

    `units` is the number of threads, or the architecture of a GPU of this model, whose times depend on its kernels'
    sources too: those of the CPU's are in the file's name.
    """
    sizes = {
        "in": inner.input_size, "kernel": inner.kernel_size, "out": inner.output_size, "stride": inner.stride,
        "pad": [f"{before}+{after}" for before, after in inner.padding], "dilation": inner.dilation,
    }  # fmt: skip
    if not isinstance(units, str):
        units = f"threads={units}"
    elif model:
        units = f"{units} {model.replace(' ', '_')}"
    if device != "cpu":
        units = f"{units} kernels={sources_digest(device)[:16]}"
    words = [f"{name}={'x'.join(map(str, values))}" for name, values in sizes.items()]
    channels = f"n={inner.batch} c={inner.in_channels} k={inner.out_channels} groups={inner.groups}"
    return " ".join([device, direction, str(dtype), inner.data_format, channels, *words, units, precision])


def described(entry: str) -> tuple[str, ...]:
    """Return what a name of :func:`key` says: layer, direction, data format, dtype, threads or GPU, precision.

    A name that says nothing of the kind stands for itself.
    """
    try:
        return _described(entry)
    except (KeyError, ValueError):
        return (entry, *[""] * 5)


def _described(entry: str) -> tuple[str, ...]:
    _, direction, dtype, data_format, *words, precision = entry.split()
    given = dict(word.split("=") for word in words if "=" in word)
    sizes = {name: given[name].split("x") for name in _USUAL}
    # Dimensions that lifting put in front.
    while len(sizes["in"]) > 1 and all(values[0] == _USUAL[name] for name, values in sizes.items()):
        sizes = {name: values[1:] for name, values in sizes.items()}
    layer = [f"{given['n']}x{given['c']}x{'x'.join(sizes['in'])}, {given['k']} filters {'x'.join(sizes['kernel'])}"]
    layer += [
        f"{word} {_together(sizes[name])}"
        for name, word in (("stride", "stride"), ("pad", "padding"), ("dilation", "dilation"))
        if set(sizes[name]) != {_USUAL[name]}
    ]
    layer += [f"{given['groups']} groups"] if given["groups"] != "1" else []
    units = f"threads {given['threads']}" if "threads" in given else " ".join(w for w in words if "=" not in w)
    return ", ".join(layer), direction, data_format, dtype, units, precision


# What the sizes of a dimension are that a problem does not have.
_USUAL = {"in": "1", "kernel": "1", "stride": "1", "pad": "0+0", "dilation": "1"}


def _together(values: list[str]) -> str:
    """Return "2" for equal sizes, or all: "1x2"; paddings that differ before and after as "0:1"."""
    pairs = [value.split("+") for value in values]
    words = [before if set(rest) <= {before} else ":".join([before, *rest]) for before, *rest in pairs]
    return words[0] if len(set(words)) == 1 else "x".join(words)


@lru_cache(maxsize=2)
def sources_digest(device: str) -> str:
    """Return a digest of all that kernels of a device, "cpu" or "cuda", are made from."""
    digest, here = hashlib.sha256(), Path(__file__).parent
    # The constants of transforms and activations are shared by the devices.
    for path in [*sorted((here / device).glob("*.py")), here / "minimal_filtering.py", here / "activations.py"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def times(entry: str) -> Mapping[str, float]:
    """Return the measured seconds of algorithms, by name; empty if there are none."""
    return _loaded().get(entry, {})


def count() -> int:
    """Return how many convolutions have been measured on this machine."""
    return len(_loaded())


def entries() -> Entries:
    """Return all that is known on this machine."""
    return {name: dict(found) for name, found in _loaded().items()}


def _loaded() -> Entries:
    global _known
    if _known is None:
        _known = _read()
    return _known


def _changed() -> None:
    """Let what has been chosen be chosen anew."""
    global changes
    changes += 1
    config.changed()


def record(entry: str, measured: Mapping[str, float]) -> None:
    """Keep measured seconds, in memory and in the file."""
    with _turn:
        known = _loaded()
        known[entry] = {**known.get(entry, {}), **measured}
        _changed()
        _update_file(lambda there: {**known, **there, entry: {**there.get(entry, {}), **measured}})


def reload() -> None:
    """Read the file anew at the next convolution: other processes may have measured more."""
    global _known
    with _turn:
        _known = None
        _changed()


def clear() -> None:
    """Forget everything measured on this machine, in memory and in the file."""
    with _turn:
        _loaded().clear()
        _changed()
        _update_file(lambda there: {})


# --- the file --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def machine() -> dict[str, Any]:
    """Return what the times depend on beside the convolution: the signature of the file."""
    import numba

    from . import info
    from .cpu.compile import SOURCES_DIGEST
    from .cpu.simd import instruction_set

    return {
        "cpu": info.cpu_model(),
        "instruction_set": instruction_set(),
        "cores": info.cores_available(),
        "fastconv": __version__,
        "kernels": SOURCES_DIGEST[:16],
        "numba": numba.__version__,
    }


def file() -> Path:
    """Return where measured times are kept on this machine."""
    digest = hashlib.sha256(json.dumps(machine(), sort_keys=True).encode()).hexdigest()
    return directory() / f"tuning-{digest[:16]}.json"


def directory() -> Path:
    """Return FASTCONV_CACHE_DIR, or the directory that the system has for caches of a user."""
    if given := os.environ.get("FASTCONV_CACHE_DIR"):
        return Path(given).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "fastconv" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fastconv"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastconv"


def _read() -> Entries:
    """Return the entries of the file; one that cannot be used is renamed, with a warning."""
    path = file()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        _check(content)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        _warn_once(f"measured times in {path} cannot be read ({error})")
        return {}
    except (ValueError, RecursionError) as error:
        _set_aside(path, error)
        return {}
    return content["entries"]


def _check(content: Any) -> None:
    if not isinstance(content, dict) or not isinstance(content.get("entries"), dict):
        raise ValueError("it holds no entries")
    if content.get("machine") != machine():
        raise ValueError("it is of another machine or version")
    for name, found in content["entries"].items():
        if not isinstance(found, dict) or not all(_is_time(seconds) for seconds in found.values()):
            raise ValueError(f"its entry {name!r} holds no times")


def _is_time(value: Any) -> bool:
    return isinstance(value, float) and 0 < value < math.inf


def _set_aside(path: Path, error: Exception) -> None:
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.damaged")
    try:
        path.replace(aside)
        where = f"set aside as {aside.name}"
    except OSError:
        where = "left alone"
    warnings.warn(f"measured times in {path} are not used but {where}: {error}", RuntimeWarning, stacklevel=2)


def _update_file(change: Callable[[Entries], Entries]) -> None:
    """Replace the file's entries in one step, while no other process does."""
    from filelock import FileLock

    path = file()
    fresh = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=PATIENCE):
            content = {"machine": machine(), "entries": change(_read())}
            try:
                fresh.write_text(json.dumps(content, indent=1), encoding="utf-8")
                fresh.replace(path)
            finally:
                fresh.unlink(missing_ok=True)
    except (OSError, NotImplementedError) as error:
        _warn_once(f"measured times cannot be kept in {path.parent} ({error}); they hold for this process")


@lru_cache(maxsize=16)
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


# --- measuring -------------------------------------------------------------------------------------------------


def tune(entry: str, dtype: np.dtype, direction: str, choices: Collection[Any], device: str = "cpu") -> None:
    """Measure those of the choices that the entry lacks, and record them.

    Parameters
    ----------
    entry : str
        Of :func:`key`.
    dtype : numpy.dtype
        Of x: the geometry that an algorithm sees has only the one it computes in.
    choices : collection of selection.Choice
        Algorithms that may compute one and the same convolution.
    device : "cpu" or "cuda"
    """
    with _turn:
        known, names = dict(times(entry)), {c.algorithm.name for c in choices}
        if names <= set(known):
            return
        # Another process may have measured it meanwhile.
        known = {**_read().get(entry, {}), **known}
        missing = [c for c in choices if c.algorithm.name not in known]
        if missing:
            arrays = operands(missing[0].geometry, dtype)
            if device == "cpu":
                calls = {c.algorithm.name: _timed(c, direction, arrays) for c in missing}
            else:
                from .cuda import measure

                calls = measure.timed(missing, direction, arrays)
            known.update(_measure(calls))
        record(entry, known)


def operands(geometry: ConvGeometry, dtype: np.dtype) -> dict[str, np.ndarray]:
    """Return "x", "weight" and "grad_output" of a lifted geometry as its algorithms take them."""
    g, rng = geometry, np.random.default_rng(0)
    x_dtype = dtype if g.dtype.kind in "iu" else g.dtype
    return {
        "x": _random(rng, g.x_shape, x_dtype),
        "weight": _random(rng, g.weight_shape, g.dtype),
        "grad_output": _random(rng, g.output_shape, g.dtype),
    }


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if dtype.kind in "iu":
        return rng.integers(0, 8, shape).astype(dtype)
    if dtype.name in HALF:
        return rng.standard_normal(shape, np.float32).astype(dtype)
    return rng.standard_normal(shape, dtype)


def _timed(choice: Any, direction: str, arrays: Mapping[str, np.ndarray]) -> Callable[[], float]:
    """Return a function that computes and returns the seconds it took."""
    from .cpu.workspace import workspace

    run = getattr(choice.algorithm.implementation, direction)
    x, weight, y = arrays["x"], arrays["weight"], arrays["grad_output"]
    first, second, like = {"forward": (x, weight, y), "input_grad": (y, weight, x), "weight_grad": (y, x, weight)}[
        direction
    ]
    out = np.empty_like(like)
    middle = (None, None) if direction == "forward" else ()

    def call() -> float:
        start = perf_counter()
        with workspace(choice.buffers) as lent:
            run(choice.geometry, first, second, *middle, out, lent)
        return perf_counter() - start

    return call


def _measure(calls: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """Return seconds by name: the better of two medians, in turns, since other work on the machine comes and goes."""
    found = {name: _seconds(call) for name, call in calls.items()}
    for name, call in calls.items():
        if found[name] < LONGEST:
            found[name] = min(found[name], _seconds(call))
    return found


def _seconds(call: Callable[[], float]) -> float:
    """Return the median time of a call that has run once: to compile, and to be warm."""
    call()
    found: list[float] = []
    while not found or (sum(found) < LONGEST and (len(found) < FEWEST or sum(found) < SHORTEST)):
        found.append(call())
    return float(f"{max(median(found), 1e-9):.4g}")
