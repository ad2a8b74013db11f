"""The README says what is so."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastconv
from fastconv import config

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def benchmarks(module):
    sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module(f"benchmarks.{module}")
    finally:
        sys.path.remove(str(ROOT))


def test_the_figures_are_those_of_the_committed_results():
    readme = benchmarks("readme")
    assert readme.rendered(README) == README
    assert readme.every_layer() == readme.LAYERS.read_text()


def test_the_page_of_functions_is_that_of_the_docstrings():
    pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'fastconv[torch]'")
    api = benchmarks("api")
    assert api.page() == api.FILE.read_text(), "python -m benchmarks.api writes it anew"


def test_the_page_of_functions_has_every_public_name_and_a_line_for_each():
    page = (ROOT / "API.md").read_text()
    for name in ("conv1d", "max_pool3d", *fastconv.__all__, *fastconv.nn.__all__):
        value = getattr(fastconv, name, None) or getattr(fastconv.nn, name)
        if callable(value):
            assert f"`{re.sub('[13]d', '2d', name)}" in page
    assert all(line.split(": ", 1)[1] for line in page.splitlines() if line.startswith("- "))


def test_the_table_of_options_has_all_with_their_defaults_and_every_variable():
    rows = re.findall(r"^\| `(\w+)` \| `(FASTCONV_\w+)` \| `([^`]+)` \|", README, re.M)
    names = {name: f"FASTCONV_{name.upper()}" for name in config.DEFAULTS}
    assert {name: variable for name, variable, _ in rows} == names
    assert {name: eval(default) for name, _, default in rows} == config.DEFAULTS
    source = "".join(path.read_text() for path in (ROOT / "fastconv").rglob("*.py"))
    read = set(re.findall(r"""environ(?:\.get\(|\[)"(FASTCONV_\w+)""", source))
    assert read
    assert read | set(names.values()) == set(re.findall(r"^\|[^|]*\| `(FASTCONV_\w+)` \|", README, re.M))


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.S))
def test_the_python_it_shows_runs(block):
    if "fastconv.jax" in block:
        pytest.importorskip("jax", reason="JAX is not installed: pip install 'fastconv[jax]'")
    exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize(
    "name", re.findall(r"`(?:fastconv\.)?((?:conv|max_|avg_|lp_|adaptive_|unfold|fold)\w*)`", README)
)
def test_the_operations_it_names_are_there(name):
    assert hasattr(fastconv, name) or hasattr(fastconv, f"{name}2d")


@pytest.mark.parametrize("target", re.findall(r"make (\w[\w-]*)", README))
def test_the_commands_it_names_are_there(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


def test_the_quickstart_runs():
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / "01_quickstart.py")],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "30. 30." in done.stdout
    assert "A wrong shape: x of shape" in done.stdout


def test_the_loop_by_hand_learns():
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / "06_cupy_loop.py")],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, after = map(float, re.findall(r"(\d\.\d+) (?:at first|after)", done.stdout))
    assert after < before / 2
