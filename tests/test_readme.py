"""The README says what is so."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastconv

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_figures_are_those_of_the_committed_results():
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks import readme
    finally:
        sys.path.remove(str(ROOT))
    assert readme.rendered(README) == README
    assert readme.every_layer() == readme.LAYERS.read_text()


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
