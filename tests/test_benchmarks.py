"""The parts of the comparison: layers of networks, the check, the clock, the report."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastconv
from fastconv.cli.flags import NETWORKS, benchmarks
from fastconv.geometry import DIRECTIONS

check, report, timing, workloads, compare = (
    benchmarks(name) for name in ("check", "report", "timing", "workloads", "compare")
)


# --- workloads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "macs", "layers"),
    [
        ("vgg16", 15.35e9, 13),
        ("resnet50", 4.09e9, 53),
        ("alexnet", 0.666e9, 5),
        ("mobilenet", 0.568e9, 27),
        ("mnist", 2.757e6, 3),
        ("fashion", 89.2e6, 5),
    ],
)
def test_networks_have_the_published_arithmetic(network, macs, layers):
    found = workloads.network(network)
    assert workloads.macs_per_image(found) == pytest.approx(macs, rel=0.01)
    assert sum(w.count for w in found) == layers
    assert len({w.name for w in found}) == len(found)
    shapes = [replace(w, name="", count=1) for w in found]
    assert len(set(shapes)) == len(shapes), "a repeated layer is listed once, with its count"


def test_the_command_offers_every_network():
    assert NETWORKS == workloads.NETWORKS


def test_layers_can_be_chosen_by_expression_and_batch():
    found = workloads.network("vgg16", batch=2, layers=r"^conv[12]_1$")
    assert [(w.name, w.x_shape[0]) for w in found] == [("conv1_1", 2), ("conv2_1", 2)]
    with pytest.raises(ValueError, match="no layer of mnist matches 'fc'; they are conv1, conv2, conv3"):
        workloads.network("mnist", layers="fc")


# --- check -----------------------------------------------------------------------------------------------------


def layer(*x_shape: int, K: int = 6, kernel: int = 3, **how: Any) -> Any:
    C = x_shape[1] // how.get("groups", 1)
    return workloads.Workload("", "layer", x_shape, (K, C, *(kernel,) * (len(x_shape) - 2)), **how)


def result_of(problem: Any, direction: str) -> np.ndarray:
    how = {**problem.workload.arguments, "algorithm": "direct"}
    if direction == "forward":
        return fastconv.conv2d(problem.x, problem.weight, **how)
    need = direction.removesuffix("_grad")
    return getattr(fastconv.conv2d_backward(problem.grad, problem.x, problem.weight, needs=(need,), **how), need)


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    "case", [layer(5, 12, 9, 8, padding=1), layer(4, 12, 7, 9, K=24, groups=6), layer(3, 16, 9, 9, K=16, groups=16)]
)
def test_the_oracle_accepts_what_is_right_and_nothing_else(case, direction, sample, monkeypatch):
    if sample:
        monkeypatch.setattr(check, "SAMPLE_FLOPS", 1e3)
    problem = check.Problem.make(case)
    oracle, right = check.Oracle(problem, direction), result_of(problem, direction)
    limits = check.allowed(problem, direction, "direct", "highest", is_peer=False)
    assert check.is_right(oracle.errors(right), limits)
    for index in (0, -1):
        for value in (np.nan, np.inf, right.flat[index] + 1e-4 * np.abs(right).max()):
            wrong = right.copy()
            wrong.flat[index] = value
            assert not check.is_right(oracle.errors(wrong), limits), value
    assert not check.is_right(oracle.errors(np.zeros_like(right)), limits)
    with pytest.raises(ValueError, match=r"does not fit|dimensions instead of"):
        oracle.errors(right[..., :-1])


def test_a_large_layer_is_checked_on_a_sample(monkeypatch):
    monkeypatch.setattr(check, "SAMPLE_FLOPS", 1e5)
    problem = check.Problem.make(layer(8, 16, 12, 12, K=16, padding=1))
    forward, weight_grad = check.Oracle(problem, "forward"), check.Oracle(problem, "weight_grad")
    assert forward._expected.shape[0] == 2
    assert weight_grad._expected.size < problem.weight.size


def test_fastconv_is_held_to_its_promise_and_others_to_rounding():
    problem = check.Problem.make(layer(2, 512, 9, 9))
    levels = {p: check.allowed(problem, "forward", "direct", p, False).rms for p in fastconv.config.PRECISIONS}
    assert levels == {"highest": 1e-6, "high": 2e-5, "medium": 5e-3}
    assert check.allowed(problem, "forward", "torch", "highest", True).rms > 1e-6


# --- timing ----------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only in calls."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, *seconds: float) -> Any:
        """Return a callable that takes these times, the last one for ever."""
        times = iter(seconds)

        def run() -> None:
            self.order.append(name)
            self.now += next(times, seconds[-1])

        return run


def test_a_call_is_timed_when_it_is_warm():
    clock = Clock()
    found = timing.measure({"a": clock.call("a", 0.02, 0.01, 0.001)}, 0.3, clock)
    assert found["a"].q20 == found["a"].median == found["a"].q80 == pytest.approx(0.001)
    assert found["a"].repeats > 100


def test_blocks_alternate_and_keep_to_the_budget():
    clock = Clock()
    timing.measure({"a": clock.call("a", 0.01), "b": clock.call("b", 0.02)}, 0.6, clock)
    assert "".join(re.sub(r"(.)\1*", r"\1", "".join(clock.order))) == "ababab"
    assert clock.now == pytest.approx(1.2, rel=0.2)


def test_a_long_call_is_made_once():
    clock = Clock()
    found = timing.measure({"long": clock.call("long", 5.0), "short": clock.call("short", 0.001)}, 0.1, clock)
    assert clock.order.count("long") == 1
    assert (found["long"].median, found["long"].repeats) == (5.0, 1)
    assert found["short"].median == pytest.approx(0.001)


def test_short_calls_are_timed_several_together():
    clock = Clock()
    found = timing.measure({"tiny": clock.call("tiny", 1e-6)}, 0.003, clock)
    assert found["tiny"].median == pytest.approx(1e-6)
    assert found["tiny"].repeats < len(clock.order) / 10


# --- report ----------------------------------------------------------------------------------------------------


def row(layer: str = "conv1", provider: str = "direct", ms: float | None = 2.0, **values: Any) -> Any:
    content = {
        "network": "net", "layer": layer, "count": 1, "direction": "forward", "provider": provider,
        "data_format": "channels_first", "dtype": "float32", "precision": "highest", "x_shape": "1x3x8x8",
        "weight_shape": "4x3x3x3", "stride": "1x1", "padding": "0x0", "dilation": "1x1", "groups": 1, "gflop": 0.5,
        "status": "ok", "note": "", "ms": ms, "ms_q20": ms, "ms_q80": ms, "repeats": 5, "gflops_per_s": 250.0,
        "workspace_bytes": 2048, "rms_error": 1e-7, "ratio": None if ms is None else 4.0 / ms,
        "is_reference": False, "is_auto": False,
    }  # fmt: skip
    return report.Row(**{**content, **values})


ROWS = [
    row(count=3, is_auto=True),
    row(provider="torch", ms=4.0, count=3, workspace_bytes=None, is_reference=True),
    row("conv2", ms=None, status="wrong", note="WRONG (rms 1.0e+00, allowed 1.0e-06)", rms_error=1.0),
    row("conv2", "fft", 8.0, is_auto=True),
    row("conv2", "torch", 4.0, workspace_bytes=None, is_reference=True),
]


def test_totals_count_repeated_layers_and_say_what_is_missing():
    found = {t["provider"]: t for t in report.totals(ROWS)}
    assert found["torch"]["ms"] == 3 * 4.0 + 4.0
    assert found["auto"]["ms"] == 3 * 2.0 + 8.0
    assert (found["direct"]["layers"], found["direct"]["of"]) == (3, 4)
    assert found["auto"]["ratio"] == pytest.approx((2.0 * 0.5) ** 0.5)
    assert "3 of 4 layers" in report.totals_text(ROWS)


def test_the_table_is_aligned_and_marks_what_auto_takes():
    header, *lines = report.text(ROWS).splitlines()
    assert " ".join(lines[0].split()) == "conv1 x3 forward direct first 2.000 0% 250.0 2 KiB 1.0e-07 2.00 <- auto"
    assert " ".join(lines[1].split()) == "torch first 4.000 0% 250.0 - 1.0e-07 1.00"
    assert lines[2].endswith("WRONG (rms 1.0e+00, allowed 1.0e-06)")
    assert "2.000" not in lines[2]
    assert header.index("ratio") + len("ratio") == len(lines[1])


def test_a_block_waits_until_no_thread_is_busy(monkeypatch):
    used, slept = iter([0.0, 0.005, 0.005, 0.01, 0.01, 0.01]), []
    monkeypatch.setattr(timing, "process_time", lambda: next(used))
    monkeypatch.setattr(timing, "sleep", slept.append)
    timing._rest()
    assert slept == [timing.REST] * 3


def test_times_that_say_little_are_marked():
    assert report.noise_text(ROWS) == ""
    noisy = [replace(ROWS[0], ms_q20=1.8, ms_q80=2.4), replace(ROWS[1], ms_q80=40.0), ROWS[3]]
    _, *lines = report.text(noisy).splitlines()
    assert " 30% " in lines[0]
    assert lines[0].endswith("  <- auto  noisy")
    assert " 900% " in lines[1]
    assert lines[1].endswith("  noisy")
    assert report.noise_text(noisy).startswith("2 of 3 rows are noisy, 1 of them PyTorch's, to which ratios refer: ")


def test_csv_and_json_hold_the_same_rows():
    rows = list(csv.DictReader(io.StringIO(report.to_csv(ROWS))))
    content = json.loads(report.to_json([*ROWS, replace(ROWS[0], rms_error=float("nan"))], {"budget": 0.1}))
    assert [r["ms"] for r in rows] == ["2.0", "4.0", "", "8.0", "4.0"]
    assert [r["ms"] for r in content["rows"]] == [2.0, 4.0, None, 8.0, 4.0, 2.0]
    assert content["rows"][-1]["rms_error"] == "nan"
    assert content["settings"] == {"budget": 0.1}


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1000, "1000 B"), (2048, "2 KiB"), (2**20 * 1000, "1000 MiB"), (2**31, "2 GiB")]
)
def test_sizes_have_units(count, text):
    assert report.size(count) == text


# --- packaging -------------------------------------------------------------------------------------------------


def test_a_wheel_takes_every_package_along():
    tomllib = pytest.importorskip("tomllib")
    root = Path(__file__).parent.parent
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [path.parent.relative_to(root).as_posix() for path in (root / "fastconv").rglob("__init__.py")]
    assert sorted(listed) == sorted({"fastconv.benchmarks", *(folder.replace("/", ".") for folder in folders)})
