"""What a kernel reaches: helpers, constants and instructions, followed through globals and closures.

A kernel is a plain function. The compiler sees a copy of it in which helpers are device functions, the emulator one
in which instructions are Python; the key of the disk cache is a digest of everything reached.
"""

from __future__ import annotations

import dis
import hashlib
import inspect
import types
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import ArgumentTypeError

# Modules that Numba or the emulator know by themselves.
_KNOWN = ("numba", "math", "builtins", "numpy")


def is_intrinsic(value: Any) -> bool:
    """Return True for what `ptx.instruction` makes: an intrinsic of numba-cuda."""
    return type(value).__name__ == "_Intrinsic"


def references(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the name and the value of each global and each closed-over variable that a function uses."""
    code = function.__code__
    for name in _names(code, "LOAD_GLOBAL"):
        if name in function.__globals__:
            value = function.__globals__[name]
            yield name, value
            if isinstance(value, types.ModuleType) and not value.__name__.startswith(_KNOWN):
                yield from _used_members(value, _names(code, "LOAD_ATTR", "LOAD_METHOD"))
    for name, cell in zip(code.co_freevars, function.__closure__ or ()):
        yield name, cell.cell_contents


def _used_members(module: types.ModuleType, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, types.FunctionType):
            raise ArgumentTypeError(f"kernels call helpers by name: write 'from {module.__name__} import {name}'")
        if is_intrinsic(value):
            yield f"{module.__name__}.{name}", value


@lru_cache(maxsize=4096)
def _names(code: types.CodeType, *operations: str) -> tuple[str, ...]:
    """Return the names that these operations of a function, and of those within it, refer to."""
    found = {i.argval for i in dis.get_instructions(code) if i.opname in operations}
    inner = [_names(c, *operations) for c in code.co_consts if isinstance(c, types.CodeType)]
    return tuple(sorted(found.union(*inner)))


def reached(function: types.FunctionType) -> list[Any]:
    """Return the functions and intrinsics that a kernel reaches, itself first."""
    found: list[Any] = [function]
    for item in found:
        if isinstance(item, types.FunctionType):
            for _, value in references(item):
                if (isinstance(value, types.FunctionType) or is_intrinsic(value)) and not any(
                    value is f for f in found
                ):
                    found.append(value)
    return found


def rebuilt(function: types.FunctionType, replace: Callable[[Any], Any]) -> types.FunctionType:
    """Return a copy of a function that sees `replace(value)` for every global and closed-over value it uses."""
    seen = {name: replace(value) for name, value in references(function) if "." not in name}
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, **seen},
        function.__name__,
        function.__defaults__,
        tuple(types.CellType(seen[name]) for name in function.__code__.co_freevars),
    )
    copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__
    return copy


def digest(function: types.FunctionType, portable: bool = False) -> str:
    """Return a digest of a kernel and all it reaches: the same in every process, another after any change.

    A portable one is the same in every version of Python, and another after any change to the files that are reached.
    """
    found: dict[int, int] = {}
    lines: list[str] = []
    _describe(function, found, lines, _place if portable else _code)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _describe(value: Any, found: dict[int, int], lines: list[str], body_of: Callable[[types.CodeType], str]) -> str:
    """Return a name for a value that is the same in every process; add what stands behind it to `lines`."""
    if isinstance(value, types.FunctionType) or is_intrinsic(value):
        if id(value) not in found:
            found[id(value)] = len(found)
            if isinstance(value, types.FunctionType):
                used = [f"{name}={_describe(v, found, lines, body_of)}" for name, v in references(value)]
                body = f"{body_of(value.__code__)} {value.__defaults__!r} {used}"
            else:
                body = _intrinsic(value)
            lines.append(f"{found[id(value)]}: {body}")
        return f"<{found[id(value)]}>"
    if isinstance(value, types.ModuleType):
        return value.__name__
    if isinstance(value, tuple):
        return f"({', '.join(_describe(v, found, lines, body_of) for v in value)})"
    if isinstance(value, (bool, int, float, str, type(None))) or type(value).__module__.startswith("numba."):
        return f"{type(value).__name__} {value!s}"
    if isinstance(value, type) or inspect.isbuiltin(value):
        return f"{value.__module__}.{value.__qualname__}"
    raise ArgumentTypeError(
        f"kernels may use numbers, strings, tuples of them, types, functions and modules, not {value!r}"
    )


def _code(code: types.CodeType) -> str:
    constants = [_code(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return f"{code.co_code.hex()} {constants} {code.co_names} {code.co_varnames} {code.co_freevars} {code.co_argcount}"


def _place(code: types.CodeType) -> str:
    """Return where a function is defined, and what its file says."""
    names = _names(code, "LOAD_GLOBAL", "LOAD_ATTR", "LOAD_METHOD")
    arguments = code.co_varnames[: code.co_argcount]
    return f"{code.co_name} {arguments} {names} {code.co_firstlineno} {_file_digest(code.co_filename)}"


@lru_cache(maxsize=256)
def _file_digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _intrinsic(value: Any) -> str:
    """Return what tells an intrinsic from others: its name, its factory's constants, and the file that defines it.

    Its code generator may use anything in that file.
    """
    path = Path(inspect.getfile(value._defn))
    cells = zip(value._defn.__code__.co_freevars, value._defn.__closure__ or ())
    constants = [(name, cell.cell_contents) for name, cell in cells if isinstance(cell.cell_contents, (int, str))]
    return f"{value.__name__} {constants} {hashlib.sha256(path.read_bytes()).hexdigest()}"
