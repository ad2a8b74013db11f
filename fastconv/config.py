"""Options: a ``with options(...)`` block, before assigned values, before environment variables, before defaults.

>>> import fastconv
>>> with fastconv.options(workspace_limit=64 * 2**20, precision="high"):
...     fastconv.config.workspace_limit
67108864
>>> fastconv.config.workspace_limit == fastconv.config.DEFAULTS["workspace_limit"]
True

A block holds for the current thread and asyncio task only (`contextvars`). ``fastconv.config.threads = 1``
sets a value for the whole process. A wrong value is refused when it is set; one in the environment gives a warning when
the package is imported, and an error where it is used.

=================  ==========================  ==========  ====================================================
option             environment variable        default     meaning
=================  ==========================  ==========  ====================================================
algorithm          FASTCONV_ALGORITHM          "auto"      algorithm of calls that do not name one
precision          FASTCONV_PRECISION          "highest"   promise about float32 results: highest, high, medium
workspace_limit    FASTCONV_WORKSPACE_LIMIT    2**30       bytes of workspace that one call may use
threads            FASTCONV_THREADS            None        threads of one call; None: what Numba and BLAS choose
poison             FASTCONV_POISON             False       fill fresh outputs and workspaces with NaN (debugging)
amx                FASTCONV_AMX                "on"        use AMX where there is: on, off, or emulated (for tests)
=================  ==========================  ==========  ====================================================
"""

from __future__ import annotations

import operator
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from typing import Any

from .errors import ArgumentError, ArgumentTypeError

PRECISIONS = ("highest", "high", "medium")
AMX_CHOICES = ("on", "off", "emulated")
_WORDS_FOR_NO = ("0", "false", "no", "off")
_WORDS_FOR_YES = ("1", "true", "yes", "on")

DEFAULTS: dict[str, Any] = {
    "algorithm": "auto",
    "precision": "highest",
    "workspace_limit": 2**30,
    "threads": None,
    "poison": False,
    "amx": "on",
}

# (option, value) pairs in order of their names: equal blocks are equal keys.
_scoped: ContextVar[tuple[tuple[str, Any], ...]] = ContextVar("fastconv_options", default=())
_assigned: dict[str, Any] = {}
_generation = 0
_watched: tuple[Callable[[], Any], ...] = ()

# os.environ encodes every name and decodes every value anew, which takes longer than a small convolution.
_variables: Any = getattr(os.environ, "_data", os.environ)
_encoded: Callable[[str], Any] = getattr(os.environ, "encodekey", str)
_KEYS = {option: _encoded(f"FASTCONV_{option.upper()}") for option in DEFAULTS}


def _check_algorithm(option: str, value: Any) -> str:
    # Loads NumPy, which importing the package does not.
    from . import registry

    return registry.checked_name(option, value)


def _check_precision(option: str, value: Any) -> str:
    if not isinstance(value, str) or value not in PRECISIONS:
        kind = ArgumentError if isinstance(value, str) else ArgumentTypeError
        raise kind(f"{option} must be one of {', '.join(map(repr, PRECISIONS))}, not {value!r}")
    return value


def _check_bytes(option: str, value: Any) -> int:
    return _check_integer(option, value, minimum=0)


def _check_threads(option: str, value: Any) -> int | None:
    return None if value is None else _check_integer(option, value, minimum=1)


def _check_integer(option: str, value: Any, minimum: int) -> int:
    # `geometry.integer` would load NumPy, which importing the package does not.
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise ArgumentTypeError(f"{option} must be an integer, not {value!r}")
    if number < minimum:
        raise ArgumentError(f"{option} must be at least {minimum}, not {value!r}")
    return number


def _check_flag(option: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ArgumentTypeError(f"{option} must be True or False, not {value!r}")
    return value


def _check_amx(option: str, value: Any) -> str:
    if isinstance(value, bool):
        value = "on" if value else "off"
    if not isinstance(value, str) or value not in AMX_CHOICES:
        kind = ArgumentError if isinstance(value, str) else ArgumentTypeError
        raise kind(f"{option} must be one of {', '.join(map(repr, AMX_CHOICES))}, or True or False, not {value!r}")
    return value


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "algorithm": _check_algorithm,
    "precision": _check_precision,
    "workspace_limit": _check_bytes,
    "threads": _check_threads,
    "poison": _check_flag,
    "amx": _check_amx,
}


def _checked(option: str, value: Any) -> Any:
    if option not in DEFAULTS:
        raise ArgumentError(f"unknown option {option!r}; the options are {', '.join(DEFAULTS)}")
    return _CHECKS[option](option, value)


def _from_environment(option: str) -> Any:
    if not _variables.get(_KEYS[option]):
        return None
    variable = f"FASTCONV_{option.upper()}"
    text = os.environ[variable]
    value: Any = text
    if option in ("workspace_limit", "threads"):
        try:
            value = int(text)
        except ValueError:
            raise ArgumentError(f"{variable} must be an integer, not {text!r}") from None
    elif option == "poison":
        if text.lower() not in _WORDS_FOR_NO + _WORDS_FOR_YES:
            raise ArgumentError(f"{variable} must be one of {', '.join(_WORDS_FOR_YES + _WORDS_FOR_NO)}, not {text!r}")
        value = text.lower() in _WORDS_FOR_YES
    elif option == "amx" and text.lower() in _WORDS_FOR_NO + _WORDS_FOR_YES:
        value = text.lower() in _WORDS_FOR_YES
    return _CHECKS[option](variable, value)


def check_environment() -> None:
    """Warn of variables whose value every call that reads them will refuse."""
    for option in DEFAULTS:
        try:
            _from_environment(option)
        except (ArgumentError, ArgumentTypeError) as error:
            warnings.warn(f"{error}; calls that depend on it will fail", RuntimeWarning, stacklevel=3)


def get(option: str) -> Any:
    """Return the value of an option as it stands for this thread now."""
    for name, value in _scoped.get():
        if name == option:
            return value
    if option in _assigned:
        return _assigned[option]
    value = _from_environment(option)
    return DEFAULTS[option] if value is None else value


def state() -> tuple[Any, ...]:
    """Return what is equal for two calls if nothing has changed between them but their arguments.

    It holds every option, in whatever way it is set, and what :func:`changed` and :func:`watch` are told.
    """
    nothing_set = _variables.keys().isdisjoint(_KEYS.values())
    variables = None if nothing_set else tuple(map(_variables.get, _KEYS.values()))
    return _generation, _scoped.get(), variables, _watched and tuple([watched() for watched in _watched])


def scoped() -> dict[str, Any]:
    """Return the options that ``with`` blocks set here: what another thread passes to :func:`options` to have them."""
    return dict(_scoped.get())


def changed() -> None:
    """Let no call rely on what was decided before."""
    global _generation
    _generation += 1


def watch(function: Callable[[], Any]) -> None:
    """Let what was decided hold only while `function`, which must be quick, returns the same."""
    global _watched
    _watched += (function,)


@contextmanager
def options(**values: Any) -> Iterator[None]:
    """Set options for the calls inside a ``with`` block, in this thread and task only.

    Parameters
    ----------
    **values
        Any of algorithm, precision, workspace_limit, threads, poison, amx.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        For an unknown option or a value that is not allowed.

    Examples
    --------
    >>> import fastconv
    >>> with fastconv.options(threads=1, algorithm="direct"):
    ...     fastconv.config.algorithm
    'direct'
    """
    checked = {option: _checked(option, value) for option, value in values.items()}
    token = _scoped.set(tuple(sorted({**dict(_scoped.get()), **checked}.items())))
    try:
        yield
    finally:
        _scoped.reset(token)


class _ConfigModule(types.ModuleType):
    """Let ``config.threads`` read an option and ``config.threads = 2`` check and set it."""

    def __getattr__(self, name: str) -> Any:
        if name in DEFAULTS:
            return get(name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in DEFAULTS:
            _assigned[name] = _checked(name, value)
            changed()
        elif name in self.__dict__ or name.startswith("__"):
            super().__setattr__(name, value)
        else:
            near = get_close_matches(name, DEFAULTS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(DEFAULTS)}"
            raise AttributeError(f"there is no option {name!r}{hint}")

    def __delattr__(self, name: str) -> None:
        if name in DEFAULTS:
            _assigned.pop(name, None)
            changed()
        else:
            super().__delattr__(name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *DEFAULTS})


sys.modules[__name__].__class__ = _ConfigModule
