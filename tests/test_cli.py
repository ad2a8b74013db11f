"""The command, in-process: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fastconv
from fastconv import cli, registry
from fastconv.cli.flags import benchmarks

compare, providers = benchmarks("compare"), benchmarks("providers")

TINY = ["--input", "2,3,8,8", "--filters", "4", "--kernel", "3", "--budget", "0.002"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run ``fastconv compare``; return its status and what it printed."""
    status = cli.main(["compare", *arguments])
    return status, *capsys.readouterr()


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one line that wrong flags give, after checking how they end."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert out == ""
    assert err.count("\n") == 1, err
    return err


# --- algorithms made for these tests ---------------------------------------------------------------------------


def algorithm(**functions: Any) -> ModuleType:
    """A module that claims to compute everything, and writes ones."""

    def write(geometry: Any, first: Any, second: Any, *rest: Any) -> None:
        out = rest[2] if len(rest) == 4 else rest[0]
        out[...] = 1

    module = ModuleType("odd")
    content = {
        "supports": lambda geometry, direction: (True, ""),
        "workspace": lambda geometry, direction, limit: {},
        "seconds": lambda geometry, direction, threads: 1e9,
        "forward": write,
        "input_grad": write,
        "weight_grad": write,
    }
    vars(module).update({**content, **functions})
    return module


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """Register a module as algorithm "odd" for one test, under a name of its own: choices are remembered."""

    def register(module: ModuleType) -> None:
        module.__name__ = request.node.name
        monkeypatch.setitem(sys.modules, module.__name__, module)
        registry.register(registry.Algorithm("odd", "cpu", module.__name__))

    yield register
    registry.unregister("odd", "cpu")


def test_a_wrong_result_shows_instead_of_its_time(registered, capsys, tmp_path):
    registered(algorithm())
    status, out, _ = run(capsys, *TINY, "--no-torch", "--csv", str(tmp_path / "rows.csv"))
    assert status == 1
    lines = [line for line in out.splitlines() if " odd " in line]
    assert len(lines) == 3
    assert all("WRONG (rms " in line for line in lines)
    rows = rows_of(tmp_path / "rows.csv")
    assert {row["status"] for row in rows if row["provider"] == "odd"} == {"wrong"}
    assert all(row["ms"] == "" for row in rows if row["provider"] == "odd")
    assert all(row["ms"] != "" and row["status"] == "ok" for row in rows if row["provider"] != "odd")


def test_an_algorithm_that_raises_is_reported_and_the_rest_goes_on(registered, capsys):
    def fail(*args: Any) -> None:
        raise ZeroDivisionError("in the kernel\nand more")

    registered(algorithm(forward=fail))
    status, out, _ = run(capsys, *TINY, "--no-torch", "--direction", "forward")
    assert status == 1
    assert "ZeroDivisionError: in the kernel\n" in out
    assert "direct" in out


def test_running_out_of_memory_is_a_reason_not_an_error(registered, capsys):
    def exhaust(*args: Any) -> None:
        raise MemoryError

    registered(algorithm(forward=exhaust))
    status, out, _ = run(capsys, *TINY, "--no-torch", "--direction", "forward")
    assert status == 0
    assert "out of memory" in out


def test_an_algorithm_over_the_workspace_limit_says_so(capsys):
    with fastconv.options(workspace_limit=1000):
        status, out, _ = run(capsys, *TINY, "--no-torch", "--direction", "forward")
    assert status == 0
    (line,) = [line for line in out.splitlines() if " fft " in line]
    assert line.endswith("of workspace, the limit is 1000 B")


def test_an_algorithm_asked_for_by_name_says_why_it_cannot(capsys):
    status, out, _ = run(capsys, *TINY, "--no-torch", "--direction", "forward", "--algorithms", "winograd,direct")
    reason = "there is no such algorithm on the cpu yet"
    known = [a.name for a in registry.on("cpu") if a.family == "winograd"]
    assert status == 0
    assert known or reason in out


# --- what a comparison shows -----------------------------------------------------------------------------------


def test_rows_are_well_formed(capsys, tmp_path):
    pytest.importorskip("torch")
    status, out, err = run(
        capsys,
        *TINY,
        "--csv",
        str(tmp_path / "rows.csv"),
        "--json",
        str(tmp_path / "rows.json"),
        "--data-format",
        "both",
    )
    assert (status, err) == (0, "")
    rows = rows_of(tmp_path / "rows.csv")
    content = json.loads((tmp_path / "rows.json").read_text())
    assert len(content["rows"]) == len(rows)
    for direction in ("forward", "input_grad", "weight_grad"):
        here = [row for row in rows if row["direction"] == direction]
        reference = min(float(row["ms"]) for row in here if row["provider"] == "torch")
        assert {row["data_format"] for row in here} == {"channels_first", "channels_last"}
        for row in here:
            assert float(row["ratio"]) == pytest.approx(reference / float(row["ms"]))
            assert float(row["gflops_per_s"]) == pytest.approx(float(row["gflop"]) / (float(row["ms"]) * 1e-3))
            assert float(row["ms_q20"]) <= float(row["ms"]) <= float(row["ms_q80"])
            assert float(row["rms_error"]) < 1e-6
            assert (row["workspace_bytes"] == "") == (row["provider"] == "torch")
        assert sum(row["is_auto"] == "True" for row in here) == 2
    assert out.count("<- auto") == 6 + 1, "one for each direction and format, and the explanation"


def test_a_file_names_the_machine_but_no_host_and_no_path(capsys, tmp_path):
    import socket

    run(capsys, *TINY, "--no-torch", "--direction", "forward", "--json", str(tmp_path / "rows.json"))
    text = (tmp_path / "rows.json").read_text()
    machine = json.loads(text)["machine"]
    assert {"cpu", "cores", "threads", "versions"} <= set(machine)
    assert {"fastconv", "python", "numpy", "numba"} <= set(machine["versions"])
    assert str(Path.home()) not in text
    assert str(Path(fastconv.__file__).parent) not in text
    assert len(socket.gethostname()) < 4 or socket.gethostname() not in text


def test_auto_stands_for_what_fastconv_takes(capsys):
    geometry = fastconv.ConvGeometry.create((2, 3, 8, 8), (4, 3, 3, 3))
    (taken,) = (c.name for c in fastconv.algorithms(geometry) if c.chosen)
    _, out, _ = run(capsys, *TINY, "--no-torch", "--quiet", "--direction", "forward", "--algorithms", "auto")
    header, row = out.splitlines()
    assert header.split()[:4] == ["layer", "direction", "algorithm", "layout"]
    assert f" {taken} " in row
    assert "<- auto" in row  # "noisy" may follow, where the machine was busy


@pytest.mark.parametrize(
    ("shape", "extra"),
    [
        ("2,4,9", ["--kernel", "3", "--padding", "2:0"]),
        ("1,4,5,6,7", ["--kernel", "1,3,3", "--padding", "same"]),
        ("1,4,9,9", ["--kernel", "3x3", "--groups", "4", "--stride", "2", "--padding", "1,1", "--dilation", "2"]),
    ],
)
def test_a_layer_may_have_one_two_or_three_dimensions(capsys, shape, extra):
    status, out, _ = run(
        capsys, "--input", shape, "--filters", "4", *extra, "--budget", "0.002", "--direction", "forward", "--quiet"
    )
    assert status == 0
    assert " direct " in out


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_other_dtypes_are_checked_against_their_own_tolerance(capsys, dtype):
    status, out, _ = run(capsys, *TINY, "--dtype", dtype, "--quiet")
    assert status == 0
    assert "WRONG" not in out


def test_a_network_ends_with_its_totals(capsys):
    arguments = ("--network", "mnist", "--batch", "1", "--budget", "0.001", "--direction", "forward", "--no-torch")
    status, out, _ = run(capsys, *arguments, "--algorithms", "direct,im2col", "--layers", "conv[12]", "--quiet")
    assert status == 0
    assert "conv3" not in out
    table, totals = out.split("total of")
    assert table.count(" direct ") == 2
    assert totals.count(" direct ") == 1


def test_threads_and_precision_reach_the_measurement(capsys, tmp_path):
    path = tmp_path / "rows.json"
    status, out, _ = run(capsys, *TINY, "--threads", "1", "--precision", "high", "--json", str(path))
    assert status == 0
    assert "1 thread;" in out
    settings = json.loads(path.read_text())["settings"]
    assert (settings["threads"], settings["precision"]) == (1, "high")
    assert fastconv.config.threads is None


def test_a_plot_is_a_png(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    for name, extra in (("ratios.png", []), ("rates.png", ["--no-torch"])):
        run(capsys, *TINY, "--quiet", "--plot", str(tmp_path / name), *extra)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_without_torch_there_are_times_but_no_ratios(capsys, monkeypatch):
    reason = "PyTorch is not installed (pip install 'fastconv[torch]')"
    monkeypatch.setattr(providers, "torch_problem", lambda *device: reason)
    status, out, _ = run(capsys, *TINY, "--direction", "forward")
    assert status == 0
    assert reason in out
    assert "torch " not in out.split("layer ", 1)[1]


def test_ctrl_c_keeps_what_was_measured(capsys, monkeypatch, tmp_path):
    measure, calls = compare.run_layer, []

    def interrupted(settings: Any, problem: Any, direction: str) -> Any:
        calls.append(direction)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return measure(settings, problem, direction)

    monkeypatch.setattr(compare, "run_layer", interrupted)
    status, out, err = run(capsys, *TINY, "--no-torch", "--csv", str(tmp_path / "rows.csv"))
    assert status == 130
    assert "stopped" in err
    assert {row["direction"] for row in rows_of(tmp_path / "rows.csv")} == {"forward"}
    assert "forward" in out


class Terminal(io.StringIO):
    """A standard error that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("with_tqdm", [True, False])
def test_a_terminal_shows_progress_whether_tqdm_is_there_or_not(capsys, monkeypatch, with_tqdm):
    terminal = Terminal()
    if with_tqdm:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys, "stderr", terminal)
    assert cli.main(["compare", *TINY, "--no-torch", "--direction", "forward"]) == 0
    assert "conv2d 3x3 forward" in terminal.getvalue()
    before = terminal.getvalue()
    assert cli.main(["compare", *TINY, "--no-torch", "--direction", "forward", "--quiet"]) == 0
    assert terminal.getvalue() == before


# --- refusals --------------------------------------------------------------------------------------------------

REFUSALS = {
    "unknown algorithm": ([*TINY, "--algorithms", "strassen"], "'strassen'"),
    "unknown direction": ([*TINY, "--direction", "sideways"], "'sideways'"),
    "unknown network": (["--network", "lenet"], "'lenet'"),
    "unknown padding": ([*TINY, "--padding", "some"], "'some'"),
    "kernel too large": (["--input", "1,1,3,3", "--filters", "1", "--kernel", "5"], "kernel"),
    "kernel of another rank": (["--input", "1,1,3,3", "--filters", "1", "--kernel", "5,5,5"], "--kernel"),
    "not numbers": (["--input", "a,b"], "'a,b'"),
    "too few numbers": (["--input", "3,3", "--filters", "1", "--kernel", "1"], "N,C,H,W"),
    "no filters": (["--input", "1,1,3,3"], "--filters"),
    "no input": (["--filters", "3"], "--input"),
    "groups": (["--input", "1,3,5,5", "--filters", "4", "--kernel", "1", "--groups", "2"], "--groups"),
    "no images": (["--input", "0,3,5,5", "--filters", "4", "--kernel", "1"], "nothing to measure"),
    "two at once": ([*TINY, "--network", "mnist"], "--network"),
    "budget": ([*TINY, "--budget", "0"], "--budget"),
    "threads": ([*TINY, "--threads", "0"], "threads"),
    "batch": (["--network", "mnist", "--batch", "0"], "--batch"),
    "no such layer": (["--network", "mnist", "--layers", "fc"], "conv1, conv2, conv3"),
    "not an expression": (["--network", "mnist", "--layers", "("], "regular expression"),
    "no such folder": ([*TINY, "--csv", "/no/such/folder/rows.csv"], "--csv"),
    "not a picture": ([*TINY, "--plot", "ratios.doc"], ".png"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_wrong_flags_give_one_sentence_and_status_2(capsys, name):
    arguments, word = REFUSALS[name]
    assert word in refused(capsys, "compare", *arguments)


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    message = refused(capsys, "compare", *TINY, "--plot", "ratios.png")
    assert "pip install 'fastconv[report]'" in message


def test_a_wrong_option_in_the_environment_gives_one_sentence(capsys, monkeypatch):
    monkeypatch.setenv("FASTCONV_THREADS", "many")
    assert "FASTCONV_THREADS" in refused(capsys, "compare", *TINY)


# --- the other commands ----------------------------------------------------------------------------------------


def test_without_a_command_it_shows_help(capsys):
    assert cli.main([]) == 0
    assert "compare" in capsys.readouterr().out


def test_info_prints_text_or_json(capsys):
    assert cli.main(["info"]) == 0
    assert "off, and why" in capsys.readouterr().out
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fastconv"] == fastconv.__version__


def test_explain_prints_the_table_of_a_layer_or_of_each_of_a_network(capsys):
    geometry = fastconv.ConvGeometry.create((2, 3, 8, 8), (4, 3, 3, 3))
    assert cli.main(["explain", *TINY[:6]]) == 0
    assert capsys.readouterr().out == fastconv.explain(geometry) + "\n"
    assert cli.main(["explain", "--network", "mnist", "--direction", "input_grad", "--data-format", "both"]) == 0
    titles = [table.split(": x ")[0] for table in capsys.readouterr().out.split("\n\n")]
    assert titles == [f"conv{i}: conv2d input_grad" for i in (1, 1, 2, 2, 3, 3)]
    assert "'tpu'" in refused(capsys, "explain", "--device", "tpu")
    assert "--device sm_80" in refused(capsys, "explain", "--device", "sm_80", "--threads", "2")


def test_warmup_announces_a_step_before_it_and_then_how_long_it_took(capsys, monkeypatch):
    before = []
    monkeypatch.setattr(
        fastconv.info, "warm_up_steps", lambda *args: [("slow", lambda: before.append(capsys.readouterr().out))]
    )
    assert cli.main(["warmup"]) == 0
    assert [text.rstrip() for text in before] == ["[1/1] slow ..."]
    assert capsys.readouterr().out.split("\n")[0].endswith(" s")


def test_warmup_says_where_kernels_are_kept(capsys):
    arguments = ["--operations", "max_pool2d,avg_pool2d", "--data-formats", "channels_first"]
    assert cli.main(["warmup", *arguments]) == 0
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("[1/2] max_pool2d float32 channels_first ... ")
    assert second.startswith("[2/2] avg_pool2d float32 channels_first ... ")
    assert first.endswith(" s")
    assert last.startswith("2 operations ready in ")
    assert "'conv9d'" in refused(capsys, "warmup", "--operations", "conv9d")
