"""Measured times: what is kept of them, what auto makes of them, and what becomes of a file that cannot be used."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from support import run_python

import fastconv
from fastconv import cli, nn, registry, selection, tuning

X, W = (2, 4, 9, 9), (4, 4, 3, 3)
GEOMETRY = fastconv.ConvGeometry.create(X, W)
NAMES = [c.name for c in fastconv.algorithms(GEOMETRY) if c.supported]


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """An empty directory for the file."""
    monkeypatch.setenv("FASTCONV_CACHE_DIR", str(tmp_path / "cache"))
    tuning._warn_once.cache_clear()
    tuning.reload()
    yield tmp_path / "cache"
    tuning.reload()


@pytest.fixture
def measured(monkeypatch):
    """Times that tests decide, by algorithm; and a list of what has been measured. Others take a second."""
    seconds: dict[str, float] = {}
    asked: list[list[str]] = []

    def measure(calls: Any) -> dict[str, float]:
        asked.append(list(calls))
        return {name: seconds.get(name, 1.0) for name in calls}

    monkeypatch.setattr(tuning, "_measure", measure)
    return seconds, asked


def entry(geometry=GEOMETRY, direction="forward", precision="highest"):
    inner = selection.lifted(geometry, geometry.data_format)
    return tuning.key(inner, geometry.dtype, direction, "cpu", selection._units("cpu"), precision)


def taken(algorithm="auto", geometry=GEOMETRY, direction="forward", precision=None):
    return selection.choose(geometry, direction, geometry.data_format, "cpu", algorithm, precision).algorithm.name


def saved():
    return json.loads(tuning.file().read_text())["entries"]


def test_times_of_a_gpu_hold_for_the_kernels_that_were_measured(monkeypatch, tmp_path):
    inner = selection.lifted(GEOMETRY, GEOMETRY.data_format)

    def names():
        tuning.sources_digest.cache_clear()
        units = {"cpu": 2, "cuda": "sm_90a"}
        return [tuning.key(inner, GEOMETRY.dtype, "forward", d, n, "highest", "H200") for d, n in units.items()]

    for folder in ("cpu", "cuda"):
        (tmp_path / folder).mkdir()
    for name in ("minimal_filtering.py", "activations.py", "cuda/winograd.py"):
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(tuning, "__file__", str(tmp_path / "tuning.py"))
    before = names()
    assert names() == before
    (tmp_path / "cuda" / "winograd.py").write_text("2")
    after = names()
    tuning.sources_digest.cache_clear()
    # The CPU's sources are in the name of the file.
    assert after[0] == before[0]
    assert after[1] != before[1]


# --- what auto makes of it -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_auto_takes_what_was_measured_to_be_the_fastest(name, measured):
    measured[0][name] = 1e-6
    assert taken("tune") == name
    assert taken() == name
    (row,) = [c for c in fastconv.algorithms(GEOMETRY) if c.chosen]
    assert (row.name, row.measured) == (name, 1e-6)
    assert {c.measured for c in fastconv.algorithms(GEOMETRY) if c.supported and c.name != name} == {1.0}
    (line,) = [line for line in fastconv.explain(GEOMETRY).splitlines() if line.endswith("<- auto")]
    assert line.split()[0] == name
    assert " 0.001 ms " in line


def test_another_geometry_direction_thread_count_or_format_is_another_entry(measured):
    predicted = taken(direction="input_grad")
    name = next(n for n in NAMES if n not in (taken(), predicted))
    measured[0][name] = 1e-6
    assert taken("tune") == name
    assert taken(direction="input_grad") == predicted
    first, last = "channels_first", "channels_last"
    for data_format, threads, batch in ((last, None, 2), (first, 1, 2), (first, None, 3)):
        shape = (batch, *X[1:]) if data_format == first else (batch, *X[2:], X[1])
        other = fastconv.ConvGeometry.create(shape, W, data_format=data_format)
        with fastconv.options(threads=threads):
            # One thread may be all there is.
            if entry(other) != entry():
                assert all(c.measured is None for c in fastconv.algorithms(other))


def test_a_family_takes_its_fastest_variant(measured):
    family = [n for n in NAMES if n.startswith("winograd")]
    for name in family:
        tuning.record(entry(), {**dict.fromkeys(family, 1.0), name: 1e-3})
        assert taken("winograd") == name


def test_the_workspace_limit_holds_for_what_was_fastest(measured):
    measured[0]["im2col"] = 1e-6
    assert taken("tune") == "im2col"
    least = min(c.workspace_bytes for c in fastconv.algorithms(GEOMETRY) if c.name == "direct")
    with fastconv.options(workspace_limit=least):
        assert taken() == taken("tune") == "direct"
    with fastconv.options(workspace_limit=0):
        assert taken("tune") == taken()


def test_only_what_fits_the_limit_is_measured(measured):
    least = min(c.workspace_bytes for c in fastconv.algorithms(GEOMETRY) if c.name == "direct")
    with fastconv.options(workspace_limit=least + 1):
        taken("tune")
    assert all("fft" not in names for names in measured[1])
    taken("tune")
    assert "fft" in measured[1][-1]


def test_the_precision_asked_for_is_kept(measured):
    tuning.record(entry(), {"winograd_f6x3": 1e-9, "direct": 1e-3})
    assert taken() == "direct"
    measured[0]["winograd_f6x3"] = 1e-9
    assert taken("tune", precision="high") == "winograd_f6x3"
    assert "winograd_f6x3" in measured[1][-1]
    assert taken("tune") != "winograd_f6x3"


def test_an_entry_of_an_algorithm_that_is_gone_is_ignored():
    tuning.record(entry(), {"strassen": 1e-9})
    assert taken() == min((c for c in fastconv.algorithms(GEOMETRY) if c.supported), key=lambda c: c.seconds).name
    tuning.record(entry(), {"direct": 1.0})
    assert taken() == "direct"


def test_a_new_algorithm_is_measured_and_the_others_are_not_again(measured, monkeypatch):
    taken("tune")
    module = ModuleType("newcomer")
    functions = {
        "supports": lambda geometry, direction: (True, ""),
        "workspace": lambda geometry, direction, limit: {},
        "seconds": lambda geometry, direction, threads: 1e9,
        "forward": lambda *args: None,
    }
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, "newcomer", module)
    measured[0]["newcomer"] = 1e-9
    registry.register(registry.Algorithm("newcomer", "cpu", "newcomer"))
    try:
        assert taken() != "newcomer"
        assert taken("tune") == "newcomer"
        assert measured[1][1:] == [["newcomer"]]
    finally:
        registry.unregister("newcomer", "cpu")
    assert taken() != "newcomer"


# --- algorithm="tune" ------------------------------------------------------------------------------------------


def test_every_algorithm_is_measured_once_and_kept():
    """With real times: each candidate runs on operands of the right shapes, in every direction and format."""
    for shape, how in ((X, {}), ((2, 9, 9, 4), {"data_format": "channels_last", "stride": 2, "padding": 1})):
        geometry = fastconv.ConvGeometry.create(shape, W, **how)
        for direction in ("forward", "input_grad", "weight_grad"):
            taken("tune", geometry, direction)
            rows = [c for c in fastconv.algorithms(geometry, direction=direction) if c.supported]
            assert all(0 < c.measured < 60 for c in rows)
            assert min(rows, key=lambda c: c.measured).chosen
            assert saved()[entry(geometry, direction)] == {c.name: c.measured for c in rows}
    assert len(saved()) == tuning.count() == 6


def test_a_second_call_measures_nothing(measured):
    x, weight = np.ones(X, "float32"), np.ones(W, "float32")
    for _ in range(3):
        fastconv.conv2d(x, weight, algorithm="tune")
    assert measured[1] == [NAMES]
    tuning.reload()
    fastconv.conv2d(x, weight, algorithm="tune")
    assert len(measured[1]) == 1


def test_it_serves_gradients_transposed_convolutions_layers_and_the_option(measured):
    x, weight = np.ones(X, "float32"), np.ones(W, "float32")
    y = fastconv.conv2d(x, weight, algorithm="tune")
    fastconv.conv2d_backward(y, x, weight, algorithm="tune")
    assert tuning.count() == 3
    assert (fastconv.conv_transpose2d(y, weight, algorithm="tune") != 0).any()
    # Its input gradient is known already.
    assert tuning.count() == 3
    tuning.clear()
    layer = nn.Conv2d(4, 4, 3, algorithm="tune")
    layer.backward(layer(x))
    assert tuning.count() == 3
    tuning.clear()
    with fastconv.options(algorithm="tune"):
        fastconv.conv2d(x, weight)
    assert tuning.count() == 1


def test_the_result_is_that_of_the_algorithm(measured):
    x, weight = np.ones((1, 2, 6, 6), "float16"), np.ones((2, 2, 3, 3), "float16")
    for dtype, expected in (("float16", 18), ("int8", 18), ("float64", 18)):
        assert (fastconv.conv2d(x.astype(dtype), weight.astype(dtype), algorithm="tune") == expected).all()


def test_integers_and_empty_batches_have_nothing_to_choose_from(measured):
    assert (fastconv.conv2d(np.ones(X, "int8"), np.ones(W, "int8"), algorithm="tune") == 36).all()
    assert fastconv.conv2d(np.ones((0, *X[1:])), np.ones(W), algorithm="tune").shape == (0, 4, 7, 7)
    assert measured[1] == []


# --- the file --------------------------------------------------------------------------------------------------


def test_another_process_finds_what_was_measured(directory):
    predicted = taken()
    name = next(n for n in NAMES if n != predicted)
    tuning.record(entry(), {name: 1e-9, predicted: 1.0})
    script = f"""
import fastconv
geometry = fastconv.ConvGeometry.create({X}, {W})
print(*[c.name for c in fastconv.algorithms(geometry) if c.chosen])
"""
    assert run_python(script, FASTCONV_CACHE_DIR=str(directory)) == f"{name}\n"
    assert run_python(script, FASTCONV_CACHE_DIR=str(directory / "other")) == f"{predicted}\n"


def test_processes_that_write_at_once_lose_nothing(directory):
    script = """
from fastconv import tuning
for i in range(25):
    tuning.record(f"PROCESS {i}", {"direct": 1.0 + i})
print(tuning.count())
"""
    with ThreadPoolExecutor() as pool:
        runs = [
            pool.submit(run_python, script.replace("PROCESS", name), FASTCONV_CACHE_DIR=str(directory))
            for name in "abc"
        ]
        assert all(run.result() for run in runs)
    assert saved() == {f"{name} {i}": {"direct": 1.0 + i} for name in "abc" for i in range(25)}
    assert tuning.count() == 75
    assert not list(directory.glob("*.tmp"))


def test_times_of_one_convolution_are_merged(measured):
    tuning.record(entry(), {"direct": 1.0})
    # As another process would, this one having read the file before.
    content = json.loads(tuning.file().read_text())
    content["entries"][entry()]["im2col"] = 1e-9
    content["entries"]["another"] = {"fft": 2.0}
    tuning.file().write_text(json.dumps(content))
    assert taken() == "direct", "a choice changes by this process's own tuning alone"
    assert taken("tune") == "im2col"
    assert "im2col" not in measured[1][0]
    assert set(saved()) == {entry(), "another"}
    tuning.reload()
    assert tuning.count() == 2


GOOD = {"machine": tuning.machine(), "entries": {}}
DAMAGE = {
    "empty": "",
    "truncated": json.dumps(GOOD)[:-3],
    "not text": b"\xff\xfe\x00",
    "a list": "[]",
    "no entries": json.dumps({"machine": tuning.machine()}),
    "an entry of another kind": json.dumps({**GOOD, "entries": {"a": 3}}),
    "a time that is none": json.dumps({**GOOD, "entries": {"a": {"direct": "fast"}}}),
    "NaN": json.dumps({**GOOD, "entries": {"a": {"direct": float("nan")}}}),
    "a negative time": json.dumps({**GOOD, "entries": {"a": {"direct": -1.0}}}),
    "another machine": json.dumps({**GOOD, "machine": {**tuning.machine(), "cores": 10**6}}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_file_is_set_aside_with_a_warning(directory, damage):
    content = DAMAGE[damage]
    directory.mkdir()
    tuning.file().write_bytes(content if isinstance(content, bytes) else content.encode())
    before = tuning.file().read_bytes()
    with pytest.warns(RuntimeWarning, match=r"measured times in .* are not used but set aside as .*\.damaged"):
        assert tuning.count() == 0
    (aside,) = directory.glob("*.damaged")
    assert aside.read_bytes() == before
    tuning.record(entry(), {"direct": 1.0})
    tuning.reload()
    assert tuning.times(entry()) == {"direct": 1.0}


def test_another_signature_has_another_file(monkeypatch):
    tuning.record(entry(), {"direct": 1e-9})
    first = tuning.file()
    signature = {**tuning.machine(), "kernels": "0" * 16}
    monkeypatch.setattr(tuning, "machine", lambda: signature)
    tuning.reload()
    assert tuning.file() != first
    assert tuning.count() == 0
    tuning.record("other", {"fft": 1.0})
    assert set(json.loads(first.read_text())["entries"]) == {entry()}


# File permissions do not hold root back, so that what cannot be written lies below a regular file.
def test_where_nothing_can_be_written_memory_serves_after_one_warning(tmp_path, monkeypatch, measured):
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("FASTCONV_CACHE_DIR", str(tmp_path / "file" / "below"))
    tuning.reload()
    measured[0]["fft"] = 1e-9
    with pytest.warns(RuntimeWarning, match="measured times cannot be kept in .*; they hold for this process"):
        assert taken("tune") == "fft"
    # Warnings are errors: a second one would show.
    taken("tune", direction="input_grad")
    assert taken() == "fft"
    assert tuning.count() == 2


def test_the_directory_is_the_one_for_caches_unless_named(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTCONV_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert tuning.directory() == tmp_path / "xdg" / "fastconv"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.directory() == tmp_path / ".cache" / "fastconv"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert tuning.directory() == tmp_path / "Library" / "Caches" / "fastconv"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "Local"))
    assert tuning.directory() == tmp_path / "Local" / "fastconv" / "Cache"


def test_the_report_names_the_file_and_how_many_there_are():
    tuning.record(entry(), {"direct": 1.0})
    found = fastconv.show_config(mode="dicts")
    assert found["tuning"] == {"file": str(tuning.file()), "entries": 1}


# --- the command -----------------------------------------------------------------------------------------------

TINY = ["--input", "2,4,9,9", "--filters", "4", "--kernel", "3"]


def test_the_command_measures_shows_and_forgets(capsys, measured):
    measured[0]["im2col"] = 2e-6
    assert cli.main(["tune", *TINY, "--direction", "forward,input_grad"]) == 0
    out = capsys.readouterr().out
    assert out.count("im2col") >= 4
    assert "4 convolutions are known in" in out
    assert str(Path(tuning.file())) in out
    assert taken() == "im2col"
    assert cli.main(["tune", "--show", "--quiet"]) == 0
    out = capsys.readouterr().out
    header, *lines = out.splitlines()
    assert header.startswith("layer ")
    assert header.endswith("  ms, the fastest first")
    assert len(lines) == 4
    layer = "2x4x9x9, 4 filters 3x3"
    assert lines[0].split("  ")[:2] == [layer, "forward"]
    assert all(line.startswith(layer) and "  im2col 0.002, " in line for line in lines)
    for flag in ("--show", "--clear"):
        # Neither measures the layer, nor is about that one alone.
        with pytest.raises(SystemExit):
            cli.main(["tune", flag, *TINY])
        assert "leave --network and --input out" in capsys.readouterr().err
    assert cli.main(["tune", "--clear"]) == 0
    assert capsys.readouterr().out.startswith("forgot 4 convolutions of ")
    assert tuning.count() == 0
    assert saved() == {}


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({}, "2x4x8x8, 6 filters 3x3"),
        ({"stride": 2, "padding": 1, "groups": 2}, "2x4x8x8, 6 filters 3x3, stride 2, padding 1, 2 groups"),
        (
            {"stride": (1, 2), "padding": ((0, 1), (2, 2)), "dilation": 2},
            "2x4x8x8, 6 filters 3x3, stride 1x2, padding 0:1x2, dilation 2",
        ),
    ],
)
def test_what_was_measured_is_told_in_words(how, words):
    g = fastconv.ConvGeometry.create((2, 4, 8, 8), (6, 4 // how.get("groups", 1), 3, 3), **how)
    inner = selection.lifted(g, g.data_format)
    here = tuning.key(inner, g.dtype, "forward", "cpu", 2, "high")
    there = tuning.key(inner, g.dtype, "forward", "cuda", "sm_90a", "high", "NVIDIA H200")
    assert tuning.described(here) == (words, "forward", "channels_first", "float32", "threads 2", "high")
    assert tuning.described(there)[4] == "sm_90a NVIDIA_H200"


@pytest.mark.parametrize("entry", ["foo", "conv forward float32 channels_first n=1 high", ""])
def test_names_that_say_nothing_stand_for_themselves(entry):
    assert tuning.described(entry) == (entry, "", "", "", "", "")


def test_a_file_of_too_many_brackets_is_set_aside():
    tuning.record(entry(), {"direct": 1.0})
    tuning.file().write_text("[" * 100_000)
    tuning.reload()
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert tuning.count() == 0


def test_a_line_of_pixels_has_one_dimension_and_a_single_pixel_too():
    for length in (9, 1):
        g = fastconv.ConvGeometry.create((1, 4, length), (6, 4, 1))
        entry = tuning.key(selection.lifted(g, g.data_format), g.dtype, "forward", "cpu", 1, "high")
        assert tuning.described(entry)[0] == f"1x4x{length}, 6 filters 1"


def test_the_command_takes_a_network_and_what_auto_depends_on(capsys, measured):
    how = ["--network", "mnist", "--layers", "conv1", "--batch", "1", "--direction", "forward"]
    assert cli.main(["tune", *how, "--data-format", "channels_last", "--precision", "high", "--threads", "1"]) == 0
    (name,) = saved()
    assert name.startswith("cpu forward float32 channels_last n=1 c=1 k=32 ")
    assert name.endswith(" threads=1 high")
    assert fastconv.config.threads is None


def test_the_command_needs_something_to_do(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["tune"])
    assert "tune needs --network, --input, --show or --clear" in capsys.readouterr().err
