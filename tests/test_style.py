"""House rules that a machine can check: who imports whom, and that every public name shows how it is used."""

import ast
import doctest
import importlib
import inspect
from pathlib import Path

import pytest

import fastconv

PACKAGE = Path(fastconv.__file__).parent
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
KERNELS = [path for path in FILES if path.parts[0] in ("cpu", "cuda")]
# The modules whose business other array libraries are.
BRIDGES = {"arrays.py", "device_arrays.py", "torch", "jax.py", "info.py", "cli", "__main__.py"}
LIBRARIES = ("cupy", "torch", "jax")

every_file = pytest.mark.parametrize("path", FILES, ids=str)


def tree(path):
    return ast.parse((PACKAGE / path).read_text(), str(path))


def imports(path):
    """Absolute names of all modules that a file imports, at any depth."""
    package = ["fastconv", *path.parts[:-1]]
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


# TensorBoard's log writer, which PyTorch ships: no array comes near it.
HARMLESS = "torch.utils.tensorboard"


def within(found, *packages):
    return sorted(name for name in found if any(name == p or name.startswith(p + ".") for p in packages))


@pytest.mark.parametrize("path", KERNELS, ids=str)
def test_kernels_of_one_device_import_neither_the_other_nor_the_operations(path):
    other = {"cpu": "cuda", "cuda": "cpu"}[path.parts[0]]
    assert not within(imports(path), f"fastconv.{other}", "fastconv.ops", "fastconv.nn", "fastconv.torch")


@every_file
def test_only_the_bridges_know_other_array_libraries(path):
    if path.parts[0] in BRIDGES:
        return
    assert not within({name for name in imports(path) if not name.startswith(HARMLESS)}, *LIBRARIES)
    for node in ast.walk(tree(path)):
        name = getattr(node, "id", None) or (node.value if isinstance(node, ast.Constant) else None)
        assert name not in LIBRARIES, f"line {node.lineno} names {name}"


def test_the_oracle_shares_no_code_with_the_kernels():
    assert not within(imports(Path("reference.py")), "fastconv", "numba", "scipy")


def test_shapes_know_nothing_of_kernels():
    for name in ("geometry.py", "errors.py", "config.py"):
        assert not within(imports(Path(name)), "fastconv.cpu", "fastconv.cuda", "fastconv.ops", "numba"), name


@every_file
def test_no_user_input_is_left_to_assert(path):
    """An assert vanishes under -O: only what no argument can break may be asserted."""
    if path.parts[0] in ("testing.py", "reference.py", "cpu", "cuda"):
        return
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Assert):
            assert node.msg is not None, f"{path}, line {node.lineno}: say why this holds"


@every_file
def test_modules_open_with_what_they_are_for(path):
    module = tree(path)
    if module.body:
        assert ast.get_docstring(module)


@every_file
def test_kernels_use_no_fast_math_that_assumes_finite_numbers(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.keyword) and node.arg == "fastmath":
            assert not (isinstance(node.value, ast.Constant) and node.value.value is True), f"line {node.value.lineno}"
            flags = {n.value for n in ast.walk(node.value) if isinstance(n, ast.Constant)}
            assert not flags & {"nnan", "ninf", "fast"}


def test_the_flags_of_kernels_assume_no_finite_numbers():
    from fastconv.cpu import compile as compilation

    assert not compilation.FASTMATH & {"nnan", "ninf", "fast"}


# --- what is public --------------------------------------------------------------------------------------------


def public():
    for name in fastconv.__all__:
        value = getattr(fastconv, name)
        if callable(value) and not (isinstance(value, type) and issubclass(value, Exception)):
            yield name, value


@pytest.mark.parametrize("name", fastconv.__all__)
def test_every_public_name_has_a_docstring(name):
    if name.startswith("__"):
        return
    assert inspect.getdoc(getattr(fastconv, name))


@pytest.mark.parametrize(("name", "value"), list(public()), ids=lambda v: v if isinstance(v, str) else "")
def test_every_public_callable_shows_how_it_is_used(name, value):
    documents = [inspect.getdoc(value)]
    if isinstance(value, type):
        documents += [inspect.getdoc(member) for member in vars(value).values() if callable(member) or member]
    assert any(">>>" in (text or "") for text in documents)


@pytest.mark.parametrize(("name", "value"), list(public()), ids=lambda v: v if isinstance(v, str) else "")
def test_docstrings_of_operations_are_about_their_own_number_of_dimensions(name, value):
    text = inspect.getdoc(value) or ""
    assert "Nd" not in text
    if name[-2:] in ("1d", "2d", "3d") and not isinstance(value, type):
        assert value.__name__ == name
        assert "dims" not in inspect.signature(value).parameters


OPERATIONS = [name for name in fastconv.__all__ if "2d" in name or name in ("unfold", "fold")]


@pytest.mark.parametrize("name", [*OPERATIONS, "algorithms", "explain", "warmup", "options"])
def test_docstrings_of_functions_say_what_they_take_give_and_refuse(name):
    text = inspect.getdoc(getattr(fastconv, name))
    sections = ["Parameters", "Returns", "Raises", "Examples"]
    for section in sections if name not in ("warmup", "options") else ["Parameters", "Raises", "Examples"]:
        assert f"\n{section}\n{'-' * len(section)}\n" in text
    if name in OPERATIONS and not name.endswith("_backward"):
        assert "float" in text or "dtype" in text


def example_modules():
    for path in FILES:
        parts = ["fastconv", *path.with_suffix("").parts]
        if path.parts[0] not in ("cuda", *BRIDGES - {"arrays.py", "info.py", "torch"}):
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("module", list(example_modules()))
def test_examples_print_what_they_say(module):
    found = importlib.import_module(module)
    result = doctest.testmod(found, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
