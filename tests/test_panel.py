"""The panel: what it measures, what it keeps, and what it calls slower."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fastconv
from fastconv import config, registry, tuning
from fastconv.cli.flags import benchmarks
from fastconv.geometry import DATA_FORMATS, DIRECTIONS

pytest.importorskip("torch")
panel, cells, summary, timing, workloads, readme = (
    benchmarks(name) for name in ("panel", "cells", "summary", "timing", "workloads", "readme")
)

TINY = workloads.Workload("tiny", "3x3", (2, 3, 8, 8), (4, 3, 3, 3))


@pytest.fixture
def out(tmp_path, monkeypatch):
    """A file, and a panel of one tiny layer in three directions."""
    monkeypatch.setattr(cells, "all_cells", lambda: [cells.ConvCell(TINY, d) for d in DIRECTIONS])
    return tmp_path / "panel.json"


def run(out, *flags):
    return panel.main(["--out", str(out), "--budget", "0.002", "--threads", "1", *flags])


def entries(out):
    return [entry for cell in json.loads(out.read_text())["cells"] for entry in cell["entries"]]


# --- what it measures ------------------------------------------------------------------------------------------


def test_the_table_has_every_layer_once_and_of_its_kind():
    layers = workloads.panel()
    assert len({(w.network, w.name) for w in layers}) == len(layers) == 77
    assert len({(w.x_shape, w.weight_shape, w.stride, w.padding, w.dilation, w.groups) for w in layers}) == 77
    kinds = [workloads.kind(w) for w in layers]
    counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    assert set(counts) == {*summary.DENSE, "depthwise"}
    assert counts["depthwise"] == 12
    (layer,) = [w for w in layers if (w.network, w.name) == ("vgg_19", "conv4_2")]
    assert layer.geometry().flops == pytest.approx(8 * 3.69938e9, rel=1e-5)


def test_every_cell_belongs_to_a_group_and_has_a_name_of_its_own():
    every = list(cells.all_cells())
    assert len({panel.key(cell) for cell in every}) == len(every) == 3 * 78 + 2 * 6 + 2
    for cell in every:
        record = {"kind": cell.kind, "direction": cell.direction}
        assert any(group.cells([record]) for group in summary.GROUPS), panel.key(cell)
    assert {(c.kind, c.direction) for c in panel.sample(every)} == {(c.kind, c.direction) for c in every}


def test_all_that_can_compute_a_layer_are_timed_in_both_layouts(out, capsys):
    assert run(out) == 0
    found = entries(out)
    for data_format in DATA_FORMATS:
        for level in ("highest", "high"):
            here = [e for e in found if e["data_format"] == data_format and level in e["levels"]]
            assert sum(e["provider"] == "fastconv" for e in here) == sum(e["provider"] == "torch" for e in here) == 3
    assert all(e["status"] == "ok" and 0 < e["ms_q20"] <= e["ms"] <= e["ms_q80"] for e in found)
    assert all(e["rms_error"] < 1e-5 for e in found)
    text = capsys.readouterr().out
    assert "all layers and passes" in text
    assert "losses" in text


def test_with_regret_every_algorithm_is_timed(out):
    assert run(out, "--regret", "--only", "forward") == 0
    (cell,) = json.loads(out.read_text())["cells"]
    geometry = TINY.geometry()
    names = {c.name for c in fastconv.algorithms(geometry, precision="high") if c.supported}
    assert {e["algorithm"] for e in cell["entries"] if e["data_format"] == "channels_first"} == {*names, ""}
    promises = {a.name: a.precision for a in registry.on("cpu")}
    for level in ("highest", "high"):
        assert summary.regret(cell, level, "channels_first", promises) >= 1
    assert "regret of auto, highest" in summary.text({"cells": [cell]})


def test_the_regret_counts_fastconv_alone_and_only_what_keeps_the_promise():
    cell = {**CELL, "regret": True, "entries": [
        entry("fastconv", 2.0, algorithm="direct"), entry("torch", 0.1),
        entry("fastconv", 1.6, algorithm="im2col", levels=[]), entry("fastconv", 1.0, algorithm="w6", levels=["high"]),
    ]}  # fmt: skip
    promises = {"direct": "highest", "im2col": "highest", "w6": "high"}
    assert summary.regret(cell, "highest", "channels_first", promises) == 2.0 / 1.6
    assert summary.regret(cell, "high", "channels_first", promises) == 1.0


@pytest.mark.parametrize("direction", ["forward", "input_grad"])
def test_max_pools_are_held_against_pytorch(direction, monkeypatch):
    cell = cells.PoolCell(cells.Pool((2, 3, 9, 9), 3, 2, 1), direction)
    found = list(cell.contenders(["highest", "high"], False))
    assert [(c.entry.provider, c.entry.data_format) for c in found] == [
        (provider, data_format) for provider in ("fastconv", "torch") for data_format in DATA_FORMATS
    ]
    assert all(panel.attempt(c, None) is not None for c in found)
    good = cell._fastconv
    monkeypatch.setattr(cell, "_fastconv", lambda *a: lambda: [r + 1 for r in good(*a)()])
    for contender in list(cell.contenders(["highest"], False))[:2]:
        assert panel.attempt(contender, None) is None
        assert contender.entry.status == "wrong"


def test_training_steps_begin_with_the_gradient_of_pytorch():
    cell = cells.TrainingCell("mnist", 4)
    for contender in cell.contenders(["highest"], False):
        assert panel.attempt(contender, None) is not None, contender.entry
        assert contender.entry.rms_error <= cells.TRAINING_ERRORS["highest"]
    cell.first_gradient = np.zeros_like(cell.first_gradient)
    ours = next(cell.contenders(["highest"], False))
    with pytest.raises(cells.WrongResultError, match=r"allowed 1\.0e-05"):
        ours.verify(None)


def test_the_conditions_are_the_same_whatever_the_options(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTCONV_CACHE_DIR", str(tmp_path))
    tuning.reload()
    tuning.record("something", {"direct": 1.0})
    with fastconv.options(algorithm="im2col", threads=2, precision="medium", workspace_limit=0):
        with panel.conditions(1):
            assert {name: config.get(name) for name in config.DEFAULTS} == {**config.DEFAULTS, "threads": 1}
            assert tuning.count() == 0
        assert config.algorithm == "im2col"
    assert tuning.count() == 1
    monkeypatch.undo()
    tuning.reload()


def test_a_long_call_is_warmed_in_every_block():
    now, calls = [0.0], []

    def call() -> None:
        calls.append(now[0])
        # The first call of each block is slow.
        now[0] += 4.0 if len(calls) % 2 else 3.0

    found = timing.measure({"long": call}, 0.3, clock=lambda: now[0], thorough=True)
    assert len(calls) == 2 * timing.BLOCKS
    assert found["long"] == timing.Timing(3.0, 3.0, 3.0, timing.BLOCKS)


def test_a_call_beyond_patience_runs_once():
    now, calls = [0.0], []

    def call() -> None:
        calls.append(now[0])
        now[0] += 2 * timing.PATIENCE

    found = timing.measure({"endless": call}, 0.3, clock=lambda: now[0], thorough=True)
    assert len(calls) == found["endless"].repeats == 1


# --- the file --------------------------------------------------------------------------------------------------


def counting(monkeypatch):
    """Count how often operands are made ready, and results checked."""
    counts = {"prepared": 0, "checked": 0}
    prepare, errors = cells.FastconvProvider.prepare, cells.Oracle.errors

    def counted(what: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            counts[what] += 1
            return function(*args)

        return call

    monkeypatch.setattr(cells.FastconvProvider, "prepare", counted("prepared", prepare))
    monkeypatch.setattr(cells.Oracle, "errors", counted("checked", errors))
    return counts


def test_a_run_goes_on_where_another_stopped(out, capsys, monkeypatch):
    assert run(out, "--minutes", "0") == panel.LEFT
    assert run(out, "--only", "input_grad") == 0
    counts = counting(monkeypatch)
    assert run(out, "--only", "forward|input_grad") == 0
    first = counts["prepared"]
    assert first > 0
    assert run(out) == 0
    assert [cell["direction"] for cell in json.loads(out.read_text())["cells"]] == list(DIRECTIONS)
    done = dict(counts)
    assert run(out) == 0
    assert counts == done
    monkeypatch.setattr(panel, "code", lambda: "newer code")
    assert run(out, "--keep") == 0
    assert counts == done
    assert run(out, "--only", "forward") == 0
    assert counts["checked"] > done["checked"]


def test_what_a_dry_run_has_checked_is_not_checked_again(out, monkeypatch):
    assert run(out, "--dry-run") == 0
    assert {e["ms"] for e in entries(out)} == {None}
    counts = counting(monkeypatch)
    assert run(out) == 0
    assert counts["checked"] == 0
    assert counts["prepared"] > 0
    assert None not in {e["ms"] for e in entries(out)}


@pytest.mark.parametrize("how", ["wrong", "failed"])
def test_what_is_wrong_or_fails_is_not_timed_and_ends_with_status_1(out, capsys, monkeypatch, how):
    def broken(provider: Any, *args: Any) -> Any:
        if how == "failed":
            raise ZeroDivisionError("in the kernel")
        return lambda: np.zeros((2, 4, 6, 6) if provider.data_format == "channels_first" else (2, 6, 6, 4), "float32")

    monkeypatch.setattr(cells.FastconvProvider, "prepare", broken)
    assert run(out, "--only", "forward") == panel.WORSE
    found = [e for e in entries(out) if e["provider"] == "fastconv"]
    assert {(e["status"], e["ms"]) for e in found} == {(how, None)}
    text = capsys.readouterr().out
    assert "wrong or failed, not timed:" in text
    assert f"first {how}: " in text


def test_results_of_another_machine_are_neither_extended_nor_compared(out, capsys):
    assert run(out, "--only", "forward") == 0
    results = json.loads(out.read_text())
    results["machine"]["cpu"] = "abacus"
    out.write_text(json.dumps(results))
    assert run(out) == panel.OTHER_MACHINE
    assert run(out, "--check") == panel.OTHER_MACHINE
    assert "not abacus" in capsys.readouterr().err
    assert run(out.with_name("none.json"), "--check") == panel.OTHER_MACHINE


# --- what got slower -------------------------------------------------------------------------------------------


def entry(provider, ms, data_format="channels_first", levels=("highest",), spread=0.02, status="ok", algorithm=""):
    return {
        "provider": provider, "data_format": data_format, "algorithm": algorithm, "levels": list(levels),
        "status": status, "note": "", "rms_error": 0.0, "ms": ms, "ms_q20": ms and ms * (1 - spread),
        "ms_q80": ms and ms * (1 + spread), "repeats": 9,
    }  # fmt: skip


def cell(first, last, spread=0.02):
    """A cell whose ratios are given, for each layout; PyTorch takes as long in both."""
    ours = [entry("fastconv", 1 / ratio, f, spread=spread) for ratio, f in zip((first, last), DATA_FORMATS)]
    return {**CELL, "entries": [*ours, *(entry("torch", 1.0, f) for f in DATA_FORMATS)]}


CELL = {"network": "net", "layer": "layer", "direction": "forward", "kind": "1x1", "regret": False}


def test_a_ratio_is_of_the_better_layouts_or_like_for_like():
    both = cell(1.5, 2.0)
    assert summary.ratio(both, "highest").value == pytest.approx(2.0)
    assert summary.ratio(both, "highest", "channels_first").value == pytest.approx(1.5)
    assert summary.ratio(both, "high") is None
    results = {"cells": [both, cell(0.5, 0.25)]}
    (mean,) = [summary.mean(g, results, "highest") for g in summary.GROUPS if g.name.startswith("1x1")]
    assert (mean.count, mean.losses) == (2, 1)
    assert mean.mean == pytest.approx(1.0)
    assert mean.worst == pytest.approx(0.5)
    assert mean.alike == pytest.approx({"channels_first": 0.75**0.5, "channels_last": 0.5**0.5})
    ((ratio, level, lost),) = summary.losses(results)
    assert (ratio.value, level, lost) == (pytest.approx(0.5), "highest", results["cells"][1])


def test_only_what_is_slower_beyond_the_noise_is_named():
    assert panel.slower(cell(2.0, 2.0), cell(2.0, 2.0)) == []
    assert panel.slower(cell(2.0, 2.0), cell(1.9, 1.9)) == []
    assert panel.slower(cell(2.0, 2.0, spread=0.2), cell(1.6, 1.6)) == []
    assert panel.slower(cell(2.0, 2.0), cell(4.0, 4.0)) == []
    # One layout is slower, though the better one is not.
    (found,) = panel.slower(cell(1.5, 2.0), cell(1.0, 2.0))
    assert found.startswith("highest, channels_first: was 1.50 (")
    assert ", is 1.00 (" in found
    assert len(panel.slower(cell(2.0, 2.0), cell(1.0, 1.0))) == 3


def test_what_crashes_is_worse_than_slow():
    old, new = cell(2.0, 2.0), copy.deepcopy(cell(2.0, 2.0))
    new["entries"][0] = entry("fastconv", None, status="failed")
    found = panel.slower(old, new)
    assert any("failed" in line for line in found)
    assert any("channels_first: was 2.00" in line and "has no time now" in line for line in found)
    # A process that dies leaves no entries.
    assert len(panel.slower(old, {**CELL, "entries": []})) == 3


def test_a_suspect_is_measured_again_in_processes_of_its_own(out, capsys, monkeypatch):
    assert run(out, "--only", "forward") == 0
    (good,) = json.loads(out.read_text())["cells"]
    bad = copy.deepcopy(good)
    for found in bad["entries"]:
        if found["provider"] == "fastconv":
            found.update({name: 100 * found[name] for name in ("ms", "ms_q20", "ms_q80")})
    apart = iter([bad, good, bad, bad, bad])
    monkeypatch.setattr(panel, "measure", lambda *args: bad)
    monkeypatch.setattr(panel, "measure_apart", lambda *args: next(apart))
    assert run(out, "--check") == 0
    assert "0 of 1 cells are worse" in capsys.readouterr().out
    assert run(out, "--check", "--all") == panel.WORSE
    assert "SLOWER tiny 3x3 forward  highest, channels_first: was " in capsys.readouterr().out


def test_a_process_of_its_own_measures_the_one_cell():
    (smallest,) = [c for c in cells.all_cells() if c.network == "smallest" and c.direction == "forward"]
    options = panel.parse(["--budget", "0.002", "--threads", "1", "--levels", "highest"])
    found = panel.measure_apart(smallest, options)
    assert panel.key(found) == panel.key(smallest)
    assert all(e["ms"] > 0 for e in found["entries"])


def test_contenders_that_are_timed_apart_take_turns_in_processes_of_their_own(monkeypatch):
    monkeypatch.setattr(panel.timing, "BLOCKS", 1)
    (training,) = [c for c in cells.all_cells() if c.network == "mnist" and c.kind == "training"]
    assert training.apart
    options = panel.parse(["--budget", "0.002", "--threads", "2", "--levels", "highest"])
    (found,) = panel._take_turns(training, [2], options).values()
    assert 0 < found.q20 <= found.median <= found.q80
    runs = iter([timing.Timing(2.0, 3.0, 4.0, 5), timing.Timing(1.0, 4.0, 4.5, 6), timing.Timing(3.0, 3.5, 5.0, 7)])
    monkeypatch.setattr(panel.timing, "BLOCKS", 3)
    monkeypatch.setattr(
        panel, "_run", lambda *args, **how: SimpleNamespace(stdout=json.dumps(asdict(next(runs))).encode())
    )
    assert panel._take_turns(training, [0], options) == {0: timing.Timing(1.0, 3.5, 5.0, 18)}


# --- the README's table ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean", "target", "mark"),
    [(1.79, "1.8", " missed"), (1.796, "1.8", ""), (2.0, "1.6 (AMX 2.2)", ""), (0.5, "AMX 1.4", ""), (0.5, "-", "")],
)
def test_targets_that_are_missed_are_marked(mean, target, mark):
    assert summary._missed(mean, target) == mark


def test_the_readme_shows_means_targets_and_both_ends_and_a_file_every_layer_with_losses_in_bold():
    machine = {"cpu": "abacus", "features": ["beads"], "threads": 2, "versions": {"torch": "2"}}
    lost = {**cell(0.5, 0.25), "direction": "weight_grad"}
    training = {**CELL, "kind": "training", "network": "mnist", "layer": "training", "direction": "step", "images": 64}
    results = {
        "machine": machine,
        "cells": [cell(1.5, 2.0), lost, {**training, "entries": cell(2, 1)["entries"]}],
    }
    text, every = readme.panel(results, "panel-abacus.json"), readme.layers(results, "panel-abacus.json")
    assert "| layer | forward | input_grad | weight_grad |" in every
    assert "| net layer | 2.00 | not timed | **0.50** |" in every
    assert "| mnist | 2.00 | - |" in every.split("| training step |")[1]
    assert "- slower than PyTorch: 1 of 3 cells at highest (in bold; " in text
    assert "| net layer weight_grad | **0.50** | net layer forward | 2.00 |" in text
    assert "- training mnist, highest: 130,000 images/s, PyTorch 64,000" in text
    assert "| training step | 1 | 2.00 | 1.6 | 2.00 |" in text
