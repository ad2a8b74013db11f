"""Compiled kernels on disk: found by the next process, checked before they run, never the reason that a call fails."""

import shutil
from pathlib import Path

import pytest
from support import run_python

import fastconv

# A pool is the kernel that compiles fastest.
CALL = """
import warnings
warnings.simplefilter("always")
import numpy as np, fastconv
from fastconv.cpu.compile import TASKS
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for dtype in ("float32", "float64"):
        x = np.arange(8, dtype=dtype).reshape(1, 2, 4)
        y = fastconv.avg_pool1d(x, 2)
        assert y.dtype == dtype and y.tolist() == [[[0.5, 2.5], [4.5, 6.5]]], y
loaded = [bool(t.compiled.cache_hits) for t in TASKS if "compiled" in vars(t)]
print(loaded.count(True), loaded.count(False))
for warning in caught:
    print(warning.category.__name__, warning.message)
"""
COMPILED, LOADED = "0 2\n", "2 0\n"


def call(directory, script=CALL, **environment):
    return run_python(script, NUMBA_CACHE_DIR=None if directory is None else str(directory), **environment)


def snapshot(directory):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path(directory).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A cache directory that one process has filled."""
    directory = tmp_path_factory.mktemp("cache")
    assert call(directory) == COMPILED
    return directory


@pytest.fixture
def cache(compiled, tmp_path):
    """A copy of that directory, to be damaged."""
    return Path(shutil.copytree(compiled, tmp_path / "cache"))


def files(cache):
    """The compiled kernels of the calls above, one for each dtype."""
    found = sorted(path for path in cache.rglob("*.nbc") if "reduce" in path.name)
    assert len(found) == 2
    return found


def test_a_second_process_compiles_nothing_and_writes_nothing(cache):
    before = snapshot(cache)
    assert call(cache) == LOADED
    assert snapshot(cache) == before


def overwrite(path, change):
    path.write_bytes(change(path.read_bytes()))


def flipped(content, at):
    content = bytearray(content)
    content[at] ^= 0x10
    return bytes(content)


DAMAGE = {
    "empty": lambda content: b"",
    "truncated to half": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "garbage": lambda content: b"garbage " * 100,
    "zeros": lambda content: bytes(len(content)),
    "a bit flipped at the start": lambda content: flipped(content, 0),
    "a bit flipped in the middle": lambda content: flipped(content, len(content) // 2),
    "a bit flipped near the end": lambda content: flipped(content, -9),
}


@pytest.mark.parametrize("damages", list(zip(*[iter(DAMAGE)] * 2)), ids=" and ".join)
def test_damaged_data_is_noticed_and_compiled_again(cache, damages):
    for path, damage in zip(files(cache), damages):
        overwrite(path, DAMAGE[damage])
    printed = call(cache)
    assert printed.startswith(COMPILED), printed
    assert printed.count("RuntimeWarning a compiled kernel in") == printed.count("compiling again") == 2, printed
    assert call(cache) == LOADED


def test_data_that_has_been_swapped_does_not_run_a_kernel_for_other_dtypes(cache):
    first, second = files(cache)
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    printed = call(cache)
    assert printed.startswith(COMPILED)
    assert "does not match its digest" in printed
    assert call(cache) == LOADED


def test_files_that_have_nothing_to_do_with_it_are_left_alone(cache):
    (directory,) = {path.parent for path in files(cache)}
    stray = [directory / "notes.txt", directory / "pool.nbc", directory / "other.0123456789ab.nbc"]
    for path in stray:
        path.write_text("mine")
    files(cache)[0].unlink()
    call(cache)
    assert all(path.read_text() == "mine" for path in stray)


def test_kernels_of_older_sources_are_removed_when_new_ones_are_saved(cache):
    path = files(cache)[0]
    base, stamp, key, _ = path.name.rsplit(".", 3)
    old = path.with_name(f"{base}.{stamp[::-1]}.{key}.nbc")
    path.rename(old)
    assert call(cache) == "1 1\n"
    assert not old.exists()
    assert call(cache) == LOADED
    assert len(files(cache)) == 2


def test_data_that_is_gone_is_compiled_again(cache):
    for path in files(cache):
        path.unlink()
    assert call(cache) == COMPILED
    assert call(cache) == LOADED


def test_two_processes_may_fill_a_cache_at_once(tmp_path):
    script = """
import subprocess, sys
parts = [subprocess.Popen([sys.executable, "-c", call], stdout=subprocess.PIPE, text=True) for call in CALLS]
print([part.communicate(timeout=200)[0].split()[0] + str(part.returncode) for part in parts])
"""
    # One process compiles for float32 first, the other for float64.
    other = CALL.replace('("float32", "float64")', '("float64", "float32")')
    printed = call(tmp_path, script.replace("CALLS", repr([CALL, other])))
    assert printed.count("0'") == 2, printed
    for _ in range(2):
        printed = call(tmp_path)
    assert printed == LOADED


# --- where nothing can be written ------------------------------------------------------------------------------
# File permissions do not hold root back, so that "cannot be written" is here a path below a regular file.


@pytest.fixture
def copy(tmp_path):
    """A copy of the package that has no compiled kernels and nowhere to put them."""
    package = Path(fastconv.__file__).parent
    shutil.copytree(package, tmp_path / "site" / "fastconv", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "site" / "fastconv" / "cpu" / "__pycache__").write_text("not a directory")
    (tmp_path / "home").write_text("not a directory")
    return tmp_path


def test_without_any_directory_to_write_kernels_are_compiled_in_each_process(copy):
    home = str(copy / "home")
    script = f"import sys; sys.path.insert(0, {str(copy / 'site')!r})\n{CALL}\nprint(fastconv.__file__)"
    printed = call(None, script, HOME=home, XDG_CACHE_HOME=home, PYTHONDONTWRITEBYTECODE="1")
    lines = printed.splitlines()
    assert lines[0] == COMPILED.strip()
    assert lines[1].startswith("RuntimeWarning no directory for compiled kernels can be written")
    assert lines[-1] == str(copy / "site" / "fastconv" / "__init__.py")
    # Said once, not for every kernel.
    assert len(lines) == 3, printed


def test_a_user_directory_serves_where_the_package_cannot_be_written(copy):
    cache = copy / "cache"
    script = f"import sys; sys.path.insert(0, {str(copy / 'site')!r})\n{CALL}"
    for expected in (COMPILED, LOADED):
        printed = call(None, script, HOME=str(copy / "home"), XDG_CACHE_HOME=str(cache), PYTHONDONTWRITEBYTECODE="1")
        assert printed == expected


def test_a_cache_directory_that_cannot_be_made_is_passed_over(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    printed = call(tmp_path / "file" / "below")
    # The directory of the package or of the user serves instead, where there may be kernels already.
    assert sum(map(int, printed.splitlines()[0].split())) == 2
    assert "Error" not in printed


LOST = """
import os, shutil, warnings
import numpy as np, fastconv
from fastconv.cpu import pool
pool._gather.parallel
directory = os.environ["NUMBA_CACHE_DIR"]
shutil.rmtree(directory)
open(directory, "w").close()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for index in (0, 1):
        found = fastconv.max_unpool1d_backward(np.array([[5.0, 7.0]]), np.array([[index]]))
        assert found == 5 + 2 * index
for warning in caught:
    print(warning.category.__name__, warning.message)
"""


def test_a_cache_directory_that_is_lost_on_the_way_costs_a_warning(tmp_path):
    printed = call(tmp_path / "cache", LOST)
    lines = printed.splitlines()
    assert 1 <= len(lines) <= 2, printed
    assert all(line.startswith("RuntimeWarning ") and "compiled kernel" in line for line in lines)


# --- imports ---------------------------------------------------------------------------------------------------

HEAVY = (
    "numba", "llvmlite", "scipy", "torch", "cupy", "jax", "matplotlib", "ml_dtypes", "threadpoolctl", "hypothesis",
    "pytest", "tqdm",
)  # fmt: skip

IMPORT = """
import sys
import fastconv
heavy = {heavy!r}
print([name for name in heavy if name in sys.modules])
print(sorted(name for name in sys.modules if name.startswith("fastconv.")))
fastconv.ConvGeometry.create((1, 1, 4, 4), (1, 1, 3, 3))
print([name for name in heavy if name in sys.modules])
import numba
from numba.core import event
with event.install_recorder("numba:compile") as recorder:
    import fastconv.cpu.run, fastconv.cpu.direct, fastconv.cpu.im2col, fastconv.cpu.fft, fastconv.cpu.pool
    import fastconv.ops.convolution, fastconv.ops.pooling, fastconv.ops.patches, fastconv.ops.transposed
    import fastconv.selection, fastconv.registry, fastconv.testing, fastconv.reference
print(len(recorder.buffer))
print([name for name in heavy if name in sys.modules and name not in ("numba", "llvmlite", "threadpoolctl")])
"""


def test_import_compiles_nothing_and_brings_no_heavy_module():
    first, modules, with_geometry, compiled, later = run_python(IMPORT.format(heavy=HEAVY)).splitlines()
    assert first == "[]"
    assert modules == "['fastconv._version', 'fastconv.config', 'fastconv.errors']"
    assert with_geometry == "[]"
    assert compiled == "0"
    # numba itself imports scipy where it is installed, to offer scipy.special's functions.
    assert later in ("[]", "['scipy']")


def test_a_call_needs_no_optional_module():
    script = """
import sys
for name in ("scipy", "torch", "cupy", "jax", "ml_dtypes", "matplotlib", "tqdm", "hypothesis"):
    sys.modules[name] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "scipy" else find(name, *rest)
import numpy as np, fastconv
x, w = np.ones((1, 2, 5, 5)), np.ones((3, 2, 3, 3))
print(fastconv.conv2d(x, w)[0, 0, 0, 0], fastconv.max_pool2d(x, 2)[0, 0, 0, 0])
geometry = fastconv.ConvGeometry.create(x.shape, w.shape)
print([c.reason for c in fastconv.algorithms(geometry) if c.name == "fft"])
try:
    fastconv.conv2d(x, w, algorithm="fft")
except fastconv.UnsupportedError as error:
    print(error)
"""
    first, listed, refused = run_python(script).splitlines()
    assert first == "18.0 1.0"
    assert listed == """["needs SciPy: pip install 'fastconv[fft]'"]"""
    assert refused.endswith("fft: needs SciPy: pip install 'fastconv[fft]'")
