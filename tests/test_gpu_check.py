"""The check on a GPU, as far as that goes without one: processes that die, what is merged, dry runs of the parts."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from fastconv import MissingDependencyError, UnsupportedError, device_arrays, registry
from fastconv.cli.flags import benchmarks
from fastconv.geometry import DIRECTIONS

torch = pytest.importorskip("torch")
pytest.importorskip("numba_cuda", reason="the kernels are compiled by numba-cuda")
from fastconv.cuda import launch, run  # noqa: E402

gpu_check, gpu_bench, gpu_look = (benchmarks(name) for name in ("gpu_check", "gpu_bench", "gpu_look"))
import gpu  # noqa: E402  # of tests/cuda, which gpu_look adds to the path

hardware = gpu_look.hardware
ROOT = Path(__file__).parent.parent


# --- processes -------------------------------------------------------------------------------------------------

WORKER = """
import json, os, sys, time
path = os.environ["FASTCONV_TEST_GPU_REPORT"]
lines = [json.loads(line) for line in open(path) if line.strip()]
def write(**line):
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\\n")
for key in {keys!r}:
    if not any(line.get("key") == key for line in lines):
        print("working on", key)
        write(start=key)
        if key.startswith("dies"):
            os._exit(9)
        if key == "hangs":
            time.sleep(60)
        write(key=key, status="ok")
"""


def through(*keys, done=None, seconds=30.0, **how):
    command = [sys.executable, "-c", WORKER.format(keys=keys)]
    return gpu_check.through(command, time.monotonic() + seconds, {}, done or {}, **how)


def test_what_dies_or_hangs_is_noted_and_the_rest_is_done(monkeypatch):
    monkeypatch.setattr(gpu_check, "QUIET", 5.0)
    how, found, _ = through("first", "dies", "between", "hangs", "last")
    assert how == "done"
    statuses = {"first": "ok", "dies": "crashed", "between": "ok", "hangs": "hung", "last": "ok"}
    assert {key: line["status"] for key, line in found.items()} == statuses


def test_what_has_been_done_is_not_done_again():
    how, found, output = through(
        "first", "dies", "last", done={"dies": {"status": "crashed"}, "first": {"status": "ok"}}
    )
    assert (how, list(found)) == ("done", ["dies", "first", "last"])
    assert "working on first" not in output


def test_a_process_that_begins_nothing_is_not_started_for_ever():
    how, found, output = gpu_check.through([sys.executable, "-c", "raise OSError('no such thing')"], 1e12, {}, {})
    assert (how, found) == ("crashed", {})
    assert "no such thing" in output


def test_time_is_kept_and_what_was_cut_is_left_for_another_time():
    start = time.monotonic()
    how, found, _ = through("first", "hangs", "last", seconds=6.0)
    assert (how, list(found)) == ("cut", ["first"])
    assert time.monotonic() - start < 20


def test_what_is_done_is_kept_while_the_rest_is_not(monkeypatch):
    monkeypatch.setattr(gpu_check, "SAVE_EVERY", 0.0)
    seen = []
    how, found, _ = through("first", "hangs", "last", seconds=3.0, keep=lambda lines: seen.append(list(lines)))
    assert (how, seen[-1]) == ("cut", ["first"])


def test_processes_that_die_one_after_the_other_leave_time_for_other_things(monkeypatch):
    monkeypatch.setattr(gpu_check, "MOST_FAULTS", 2)
    how, found, _ = through("dies 1", "dies 2", "dies 3")
    assert (how, list(found)) == ("crashed", ["dies 1", "dies 2"])
    how, found, _ = through("dies 1", "dies 2", "dies 3", "last", done=found)
    assert (how, list(found)) == ("done", ["dies 1", "dies 2", "dies 3", "last"])


# --- order and merging -----------------------------------------------------------------------------------------


@pytest.fixture
def options(tmp_path):
    return gpu_check.parse(["--out", str(tmp_path / "gpu.json"), "--minutes", "10"])


def test_parts_come_in_order_each_until_its_share_of_the_time_and_one_that_fails_stops_no_other(options, capsys):
    seen = []

    def part(name, ended):
        def do(results, until, save):
            seen.append((name, round((until - time.monotonic()) / 60)))
            if name == "tests":
                raise OSError("lost")
            results[name][name] = {"status": "ok"} if name != "sanitizer" else {"status": "done", "text": "0 errors"}
            return ended

        return do

    parts = {name: part(name, True) for name in gpu_check.PARTS}
    assert gpu_check.check(options, parts) == gpu_check.LEFT
    assert seen == [("look", 2), ("tests", 5), ("sanitizer", 6), ("bench", 10)]
    kept = json.loads(options.out.read_text())
    assert kept["look"] == {"look": {"status": "ok"}}
    assert "OSError: lost" in kept["errors"][0]
    assert "- sanitizer: done: 0 errors" in options.out.with_suffix(".md").read_text()
    assert "OSError: lost" in capsys.readouterr().out


def test_without_a_gpu_nothing_follows_the_look(options, capsys):
    def look(results, until, save):
        assert "machine" not in results["look"]
        results["look"]["machine"] = {"status": "ok", "architecture": "UnsupportedError: no NVIDIA driver"}
        return True

    # And the next time it is looked for again.
    for _ in range(2):
        assert gpu_check.check(options, {"look": look}) == gpu_check.LEFT
        assert "no NVIDIA driver" in capsys.readouterr().out


def test_a_file_of_tests_that_is_cut_goes_on_where_it_was(monkeypatch):
    given, passed = [], {"status": "passed"}

    def through(command, until, extra, done, fine):
        given.append(done)
        return ("done" if done else "cut"), {**done, f"test {len(done)}": passed}, "the end"

    monkeypatch.setattr(gpu_check, "through", through)
    monkeypatch.setattr(gpu_check, "_host_only", lambda: [p.name for p in (ROOT / "tests" / "cuda").glob("test_[!p]*")])
    results, saved = {"tests": {}}, []
    assert not gpu_check.run_tests(results, 0.0, lambda: saved.append(len(results["tests"])))
    assert gpu_check.run_tests(results, 0.0, lambda: saved.append(len(results["tests"])))
    assert given == [{}, {}, {"test 0": passed}, {"test 0": passed}]
    assert saved == [1, 2, 2, 2]
    assert results["tests"]["test_pool.py"]["counts"] == {"passed": 2}


def test_results_of_other_code_do_not_count(options, monkeypatch):
    results = gpu_check.load(options.out)
    results["look"]["machine"] = {"status": "ok", "gpu": "H200"}
    gpu_check.save(options.out, results)
    assert gpu_check.load(options.out) == results
    monkeypatch.setattr(gpu_check.panel, "code", lambda: "changed")
    assert gpu_check.load(options.out)["look"] == {}


def line(who, us, status="ok", direction="forward", **more):
    where = {"network": "vgg", "layer": "conv1", "direction": direction, "data_format": "channels_last"}
    facts = {**where, "dtype": "float32", "kind": "1x1", "gflop": 2.0, "mbytes": 3.0, "who": who}
    times = {"us": us, "host_us": 4.0, "rms": 1e-7} if status != "failed" else {}
    return {f"vgg | conv1 | {direction} | {who}": {**facts, "status": status, **times, **more}}


def test_the_table_has_ratios_of_what_is_right():
    results = {"code": "c", **{part: {} for part in gpu_check.PARTS}}
    results["bench"] = {
        "copy": {"status": "ok", "bytes_per_s": 4e12},
        **line("torch", 10.0), **line("torch tf32", 5.0), **line("direct", 50.0), **line("winograd", 5.0),
        **line("tf32", 4.0, precision="medium"),
        **line("wrong", 1.0, "wrong"), **line("failing", 0, "failed", text="Traceback\nValueError: no"),
        **line("torch", 10.0, direction="input_grad"), **line("direct", 50.0, direction="input_grad"),
    }  # fmt: skip
    text = "\n".join(gpu_check.summary(results))
    assert "Copying moves 4.00 TB/s" in text
    forward = "- convolution, float32, channels_last, forward, against "
    assert forward + "torch: best 2.00 (1), winograd 2.00 (1), direct 0.20 (1)" in text
    assert forward + "torch tf32: best 1.25 (1), tf32 1.25 (1), winograd 1.00 (1), direct 0.10 (1)" in text
    rows = gpu_check.table(results)
    assert (
        "| vgg conv1 | forward | channels_last | float32 | 10.0 | 5.0 | winograd | 5.0 | 4.0 | 1e-07 | 2.00 "
        "| 400.0 TFLOP/s, 0.60 TB/s |"
    ) in rows
    assert rows[-2:] == [
        "- vgg conv1, forward, channels_last, float32, wrong: wrong 1e-07",
        "- vgg conv1, forward, channels_last, float32, failing: failed : ValueError: no",
    ]


# --- dry runs --------------------------------------------------------------------------------------------------


class Kept(gpu.Memory):
    """Host memory that tensors of PyTorch lie in too."""

    def address(self, tensor):
        nbytes = tensor.numel() * tensor.element_size()
        view = torch.as_strided(tensor, (tensor.numel(),), (1,)).view(torch.uint8).numpy()[:nbytes]
        self.blocks.append(view)
        return tensor.data_ptr()


class Device(Kept):
    """PyTorch's CPU in the GPU's place: kernels are emulated, and no time is taken."""

    name, architecture = "cpu", "sm_90a"
    library = SimpleNamespace(new=lambda shape, dtype: torch.empty(shape, dtype=getattr(torch, dtype.name)))

    def workspace(self, call):
        return 0

    def finish(self):
        pass

    def measure(self, call):
        call()
        return gpu_bench.Timing.of([1e-6]), 1e-6


@pytest.fixture
def device(monkeypatch):
    memory = Device()
    driver = gpu.Driver(memory)
    monkeypatch.setattr(launch, "driver", lambda: driver)
    monkeypatch.setattr(run, "compile_kernel", driver.compile)
    launch._stream.cache_clear()
    yield memory
    launch._stream.cache_clear()


@pytest.fixture
def report(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTCONV_TEST_GPU_REPORT", str(tmp_path / "report"))
    hardware.reported.cache_clear()
    yield lambda: gpu_check.lines_of(tmp_path / "report")[0]
    hardware.reported.cache_clear()


TINY = gpu_bench.Workload("tiny", "3x3", (3, 2, 4, 5), (4, 2, 3, 3), 1, 1)
DEPTHWISE = replace(TINY, name="depthwise", weight_shape=(2, 1, 3, 3), groups=2)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_algorithm_is_compared_with_pytorch(device, report, direction, monkeypatch):
    # One with tables in its workspace, and the cheapest.
    names = ("direct", "implicit_gemm") if direction == "forward" else ("direct",)
    ours = [registry.named(name, "cuda")[0] for name in names]
    monkeypatch.setattr(gpu_bench.registry, "on", lambda device: ours)
    for layer, (data_format, dtype) in [
        (TINY, gpu_bench.MODES[0]),
        (TINY, gpu_bench.MODES[3]),
        (DEPTHWISE, gpu_bench.MODES[1]),
    ]:
        gpu_bench.ConvUnit(device, layer, direction, data_format, dtype).measure()
    found = report()
    bad = {key: line for key, line in found.items() if line["status"] != "ok"}
    assert not bad
    assert {line["who"] for line in found.values()} == {"torch", "torch tf32", *names}
    assert found[f"tiny | 3x3 | {direction} | channels_first | float32 | direct"]["rms"] < 1e-6


@pytest.mark.parametrize("direction", DIRECTIONS[:2])
def test_pools_are_compared_with_pytorch(device, report, direction):
    one = gpu_bench.Pool((1, 8, 6, 8), 3, 2, 1)
    for operation, mode in (
        ("max_pool", gpu_bench.MODES[0]),
        ("avg_pool", gpu_bench.MODES[0]),
        ("max_pool", gpu_bench.MODES[1]),
    ):
        gpu_bench.PoolUnit(device, one, operation, direction, *mode).measure()
    assert {(line["who"], line["status"]) for line in report().values()} == {
        ("torch", "ok"), ("max_pool", "ok"), ("avg_pool", "ok"),
    }  # fmt: skip


def test_a_wrong_result_and_an_exception_are_noted(device, report, monkeypatch):
    ours = registry.named("direct", "cuda")
    monkeypatch.setattr(gpu_bench.registry, "on", lambda device: ours)
    unit = gpu_bench.ConvUnit(device, TINY, "forward", *gpu_bench.MODES[0])
    monkeypatch.setattr(unit, "limit", lambda who: 1e-12)
    unit.measure()
    assert report()[f"{unit.key} | direct"]["status"] == "wrong"
    again = gpu_bench.ConvUnit(device, TINY, "input_grad", *gpu_bench.MODES[0])
    monkeypatch.setattr(again, "launched", lambda *arguments: 1 / 0)
    again.measure()
    assert "ZeroDivisionError" in report()[f"{again.key} | direct"]["text"]


def test_what_ended_a_process_is_not_tried_again_on_another_layer(device, report, monkeypatch):
    where = "forward | channels_first | float32"
    hardware.write(key=f"other | layer | {where} | direct", status="crashed")
    hardware.write(key=f"other | layer | {where} | fft", status="wrong")
    ours = registry.named("direct", "cuda")
    monkeypatch.setattr(gpu_bench.registry, "on", lambda device: ours)
    for direction in DIRECTIONS[:2]:
        gpu_bench.ConvUnit(device, TINY, direction, *gpu_bench.MODES[0]).measure()
    assert f"tiny | 3x3 | {where} | torch" in report()
    assert f"tiny | 3x3 | {where} | direct" not in report()
    assert "tiny | 3x3 | input_grad | channels_first | float32 | direct" in report()


def test_what_is_asked_first_is_timed_first(report, monkeypatch):
    timed = []
    monkeypatch.setattr(gpu_bench.Unit, "measure", lambda unit: timed.append(unit))
    monkeypatch.setattr(gpu_bench, "copy_bandwidth", lambda device: {"bytes_per_s": 1.0})
    gpu_bench.bench(gpu_bench.Nowhere(), only_first=True)
    assert [(u.facts["kind"], u.direction, u.dtype, u.data_format) for u in timed] == [
        ("3x3 stride 1", "forward", "float32", "channels_first"),
        ("3x3 stride 1", "forward", "float16", "channels_last"),
    ]


def test_one_layer_of_each_kind_comes_first_and_each_thing_once():
    units = list(gpu_bench.units(gpu_bench.Nowhere()))
    first = units[: len(gpu_bench.KINDS)]
    assert [unit.facts["kind"] for unit in first] == list(gpu_bench.KINDS)
    assert {(unit.direction, unit.data_format, unit.dtype) for unit in first} == {
        ("forward", "channels_first", "float32")
    }
    assert len({unit.key for unit in units}) == len(units) > 1000


def test_what_the_benchmark_launches_is_compiled_beforehand(report, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTCONV_PREBUILT", str(tmp_path / "cubins"))
    monkeypatch.setattr(gpu_bench, "units", lambda device: iter(()))
    monkeypatch.setattr(gpu_bench, "LIMITS", {"float32": 1e-5})
    ours = registry.named("direct", "cuda")
    monkeypatch.setattr(gpu_bench.registry, "on", lambda device: ours)
    gpu_bench.prebuild()
    assert {(line["status"], line["kernels"] > 0) for line in report().values()} == {("ok", True)}
    names = {path.name.partition(".")[0] for path in (tmp_path / "cubins").glob("*.kernel")}
    assert names >= {"add_vectors", "stencil_5", "gemm_3", "direct_forward_float32_first_32"}


@pytest.fixture
def stand_in(monkeypatch):
    memory = gpu.Memory()
    driver = gpu.Driver(memory)
    bindings = gpu.Bindings(memory)
    monkeypatch.setattr(hardware, "MODE", "emulated")
    monkeypatch.setattr(hardware, "_gpus", [hardware.Gpu(bindings, driver, "sm_90a")])
    return bindings


def test_machine_code_that_was_built_beforehand_is_run_and_no_other(stand_in, report, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTCONV_PREBUILT", str(tmp_path))
    for name in gpu_look.PROGRAMS:
        gpu_look.guarded(f"before {name}", lambda n=name: gpu_look.prebuilt(n))
        gpu_look.PROGRAMS[name]()
        gpu_look.guarded(f"after {name}", lambda n=name: gpu_look.prebuilt(n))
    found = report()
    assert [found[f"after {name}"]["status"] for name in gpu_look.PROGRAMS] == ["ok"] * 3
    assert "not been built beforehand" in found["before gemm"]["text"]
    assert gpu_look.compiled_here()["stack"] == 0
    assert os.environ["FASTCONV_PREBUILT"] == str(tmp_path)


def test_a_device_that_faults_ends_the_process(stand_in, monkeypatch, capfd):
    monkeypatch.setenv("PYTEST_CURRENT_TEST", "")
    monkeypatch.setattr(os, "_exit", lambda status: pytest.exit(f"status {status}"))
    stand_in.faults = True
    with pytest.raises(pytest.exit.Exception, match="status 70"):
        gpu_look.PROGRAMS["add_vectors"]()
    assert "add_vectors: CUDA_ERROR_ILLEGAL_ADDRESS" in capfd.readouterr().err


def test_a_kernel_that_does_not_end_is_noted_and_ends_the_process(report, monkeypatch):
    monkeypatch.setattr(os, "_exit", lambda status: pytest.exit(f"status {status}"))
    monkeypatch.setattr(hardware, "PATIENCE", 0.1)
    busy = SimpleNamespace(cuStreamQuery=lambda stream: (SimpleNamespace(name="CUDA_ERROR_NOT_READY"),))
    with pytest.raises(pytest.exit.Exception, match="status 70"):
        gpu_look.guarded("endless", lambda: hardware.finished(busy))
    assert report()["endless"]["status"] == "hung"


def test_without_machine_code_and_a_compiler_a_test_is_skipped(stand_in, monkeypatch):
    monkeypatch.setattr(hardware, "compile_kernel", mock.Mock(side_effect=MissingDependencyError("no libnvvm")))
    with pytest.raises(pytest.skip.Exception, match="add_vectors has not been built beforehand: no libnvvm"):
        hardware.emulate(gpu_look.kernels.add_vectors, 1, 32)


def test_public_operations_are_compared_with_the_oracle(monkeypatch):
    module = gpu.Cupy()
    driver = gpu.Driver(module.memory)
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(launch, "driver", lambda: driver)
    monkeypatch.setattr(run, "compile_kernel", driver.compile)
    small = {n: replace(w, x_shape=(1, 4, 3, 4), weight_shape=(4, 4 // n, 2, 2)) for n, w in gpu_look.PUBLIC.items()}
    monkeypatch.setattr(gpu_look, "PUBLIC", small)
    ours = registry.named("direct", "cuda")
    monkeypatch.setattr(gpu_look.registry, "on", lambda device: ours)
    caches = (device_arrays._cupy_on, launch._stream, run._conv_launches)
    for cache in caches:
        cache.cache_clear()
    found = gpu_look.public_operations("cupy", "float32", "direct")
    for cache in caches:
        cache.cache_clear()
    assert (found["status"], found["tried"]) == ("ok", 4)
    assert found["rms"] < 1e-6


def test_the_tests_run_through_the_device_and_say_how(tmp_path):
    command = [*gpu_check._pytest("tests/cuda/test_ptx.py"), "-k", "mma_multiplies or mma_is_one_instruction"]
    extra = {**gpu_check.ON_DEVICE, "FASTCONV_TEST_GPU": "emulated", "FASTCONV_PREBUILT": str(tmp_path)}
    how, found, output = gpu_check.through(command, time.monotonic() + 120, extra, {}, (0, 1, 5))
    assert how == "done", output
    assert [key.partition("::")[2] for key in found] == [
        f"test_mma_multiplies_matrices[{name}]"
        for name in ("mma_m16n8k16_float16", "mma_m16n8k16_bfloat16", "mma_m16n8k8_float16", "mma_m16n8k8_tf32")
    ]
    assert {line["status"] for line in found.values()} == {"passed"}
    assert len(list(tmp_path.glob("*.kernel"))) == 4


def test_without_a_gpu_nothing_else_is_asked(report, monkeypatch):
    monkeypatch.setattr(launch, "architecture", mock.Mock(side_effect=UnsupportedError("no NVIDIA driver")))
    gpu_look.look()
    (line,) = report().values()
    assert line["architecture"] == "UnsupportedError: no NVIDIA driver"


def test_libnvvm_is_looked_for_where_the_system_has_it(monkeypatch, tmp_path):
    (tmp_path / "cuda" / "nvvm").mkdir(parents=True)
    monkeypatch.setattr(gpu_check, "CUDA_HOMES", [tmp_path / "bin", tmp_path / "cuda", tmp_path / "other"])
    monkeypatch.setattr(os, "environ", {})
    gpu_check.find_libraries(tmp_path / "cubins")
    gpu_check.find_libraries(tmp_path / "cubins")
    assert os.environ == {"FASTCONV_PREBUILT": str(tmp_path / "cubins"), "CUDA_HOME": str(tmp_path / "cuda")}
    monkeypatch.setattr(os, "environ", {"CUDA_HOME": "/elsewhere"})
    gpu_check.find_libraries(tmp_path)
    assert os.environ["CUDA_HOME"] == "/elsewhere"


def test_machine_code_that_was_made_is_not_looked_at_again(monkeypatch, tmp_path, capsys):
    given = []

    def through(command, until, extra, done):
        given.append(done)
        return ("done" if done else "cut"), {**done, "unit": {"status": "ok"}, "bad": {"status": "failed"}}, ""

    monkeypatch.setattr(gpu_check, "run_tests", lambda *arguments: True)
    monkeypatch.setattr(gpu_check, "through", through)
    options = gpu_check.parse(["--cubins", str(tmp_path / "cubins")])
    assert (gpu_check.prebuild(options), gpu_check.prebuild(options)) == (gpu_check.LEFT, 0)
    monkeypatch.setattr(gpu_check.panel, "code", lambda: "changed")
    gpu_check.prebuild(options)
    assert given == [{}, {"unit": {"status": "ok"}}, {}]
    assert "bad: failed" in capsys.readouterr().out


def test_files_that_test_the_tools_are_left_out():
    assert gpu_check._host_only() == hardware.NOT_FOR_GPUS
    assert all((ROOT / "tests" / "cuda" / name).exists() for name in hardware.NOT_FOR_GPUS)


def test_the_make_rule_needs_no_environment_of_its_own():
    rule = re.search(r"^gpu-check:(.*?)##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert rule is not None
    assert rule[1].strip() == ""
