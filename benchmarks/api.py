"""Write API.md, a line for every public name, from signatures and docstrings: ``python -m benchmarks.api``."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

FILE = Path(__file__).resolve().parent.parent / "API.md"
HEAD = """# What there is, a line each

Written by `python -m benchmarks.api` from the docstrings, which have the shapes, dtypes, errors and examples:
`help(fastconv.conv2d)`. Names that end in 1d, 2d and 3d differ in the number of spatial dimensions alone; one stands
for all.
"""
# Module, title, and what there is to say of it beside its names.
PARTS = (
    ("fastconv", "Arrays in, arrays out", ""),
    ("fastconv.nn", "Layers and training", ""),
    ("fastconv.nn.datasets", "Images to train on", ""),
    ("fastconv.nn.init", "Initial values of weights", ""),
    (
        "fastconv.torch",
        "PyTorch",
        "`fastconv.jax` has the functions of the same names for JAX, without the modules, `enabled` and `convert`.",
    ),
    ("fastconv.testing", "Tests of your own", ""),
    ("fastconv.reference", "The oracle: loops in float64", ""),
)


def page() -> str:
    """Return the whole page."""
    return "\n".join([HEAD, *(_part(import_module(module), title, more) for module, title, more in PARTS)])


def _part(module: ModuleType, title: str, more: str) -> str:
    lines = [f"## {title}: `{module.__name__}`", "", *([more, ""] if more else [])]
    names = public(module)
    for name in names:
        if re.search("[13]d", name) and re.sub("[13]d", "2d", name) in names:
            continue
        value, others = getattr(module, name), " (1d, 3d)" if name.replace("2d", "3d") in names and "2d" in name else ""
        lines.append(f"- `{name}{_signature(value)}`{others}: {_line(value)}")
    return "\n".join([*lines, ""])


def public(module: ModuleType) -> list[str]:
    """Return the functions and classes that a module offers, in its order."""
    listed = getattr(module, "__all__", None)
    names = [n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__]
    found = [name for name in (names if listed is None else listed) if not name.startswith("_")]
    return [name for name in found if callable(getattr(module, name))]


def _signature(value: Any) -> str:
    """Return the arguments with their defaults, without types; nothing for an error."""
    if isinstance(value, type) and issubclass(value, Exception):
        return ""
    try:
        signature = inspect.signature(value)
    except ValueError:
        return ""
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def _line(value: Any) -> str:
    """Return the first paragraph of the docstring as Markdown."""
    text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
    return re.sub(":\\w+:`~?", "`", text).replace("``", "`")


def main() -> None:
    """Rewrite the page."""
    FILE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
