"""The command's comparing and tuning on a GPU, as far as that goes without one."""

import json
import re
import sys
from time import perf_counter

import pytest

import fastconv
from fastconv import cli, registry, tuning
from fastconv.cli.flags import benchmarks
from fastconv.cuda import launch

gpu_timing, providers = benchmarks("gpu_timing"), benchmarks("providers")

TINY = ["--device", "cuda", "--input", "1,2,4,5", "--filters", "2", "--kernel", "2,3"]


@pytest.fixture
def clock(cupy, monkeypatch):
    """A GPU whose time is that of the host."""
    monkeypatch.setattr(gpu_timing, "FLUSHED_BYTES", 1 << 10)
    monkeypatch.setattr(gpu_timing, "LONGEST_HOLD", 1e-5)
    monkeypatch.setattr(cupy.driver, "moment", lambda stream: perf_counter())
    monkeypatch.setattr(cupy.driver, "elapsed", lambda first, last: last - first)


@pytest.fixture
def few(monkeypatch):
    """Names of the algorithms that there are: cheap ones to emulate."""
    ours = [registry.named(name, "cuda")[0] for name in ("direct", "im2col", "fft")]
    monkeypatch.setattr(registry, "on", lambda device: ours)
    return {a.name for a in ours}


def test_every_algorithm_is_compared_on_the_gpu(clock, few, capsys, tmp_path):
    how = ["--budget", "1e-6", "--direction", "forward", "--data-format", "both", "--json", str(tmp_path / "rows.json")]
    assert cli.main(["compare", *TINY, *how]) == 0
    out = capsys.readouterr().out
    assert "float32, NVIDIA Emulated (sm_90a), arrays of cupy on GPU 0; medians." in out
    assert "no ratio to PyTorch: PyTorch" in out
    assert "  host us  " in out
    content = json.loads((tmp_path / "rows.json").read_text())
    assert content["settings"]["device"] == "cuda"
    assert {row["provider"] for row in content["rows"]} == few
    for row in content["rows"]:
        assert (row["status"], row["device"]) == ("ok", "cuda"), row["note"]
        assert row["rms_error"] < 1e-6
        assert row["ms"] > 0 < row["host_us"]
    assert sum(row["is_auto"] for row in content["rows"]) == 2


def test_gradients_and_pytorch_on_the_same_clock(clock, few, capsys, monkeypatch, tmp_path):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(providers, "torch_problem", lambda device: None)
    made = providers.TorchProvider
    monkeypatch.setattr(providers, "TorchProvider", lambda data_format, device: made(data_format))
    how = ["--budget", "1e-6", "--direction", "input_grad,weight_grad", "--json", str(tmp_path / "rows.json")]
    assert cli.main(["compare", *TINY, *how, "--algorithms", "direct,auto", "--dtype", "float16"]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {(row["status"], row["direction"]) for row in rows} == {("ok", "input_grad"), ("ok", "weight_grad")}
    assert all(row["ratio"] > 0 for row in rows)
    assert "ratio = PyTorch's time" in capsys.readouterr().out
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    providers.set_cudnn(tf32=False)
    assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32) == (True, False)


def test_a_call_is_timed_with_cold_caches_and_its_host_apart():
    class Gpu:
        """Time passes by the call alone, and by nothing on the host."""

        now, log = 0.0, []

        def synchronize(self):
            self.log.append("wait")

        def flush(self):
            self.log.append("flush")

        def hold(self, seconds):
            self.log.append("hold")

        def moment(self):
            return self.now

        def elapsed(self, first, last):
            return last - first

    gpu = Gpu()

    def call():
        gpu.now += 2.0
        gpu.log.append("call")

    found, host = gpu_timing.measure(call, gpu, 1e-9, 4)
    assert (found.median, found.repeats) == (2.0, 3)
    assert 0 < host < 0.1
    assert gpu.log[gpu.log.index("hold") :] == ["hold", *["flush", "call"] * 3, "wait"]


def test_the_command_tunes_on_the_gpu(cupy, few, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTCONV_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "SHORTEST", 0)
    monkeypatch.setattr(tuning, "FEWEST", 1)
    tuning.reload()
    try:
        how = ["--direction", "forward", "--data-format", "channels_first"]
        assert cli.main(["tune", *TINY, *how]) == 0
        assert "conv2d 2x3        forward      channels_first  direct" in capsys.readouterr().out
        assert cli.main(["tune", "--show", "--quiet"]) == 0
        _, shown = capsys.readouterr().out.splitlines()
        words = re.split("  +", shown)
        assert words[1:6] == ["forward", "channels_first", "float32", "sm_90a NVIDIA_Emulated", "highest"]
        assert re.fullmatch(r"direct \S+, \S+ \S+, \S+ \S+", words[6])
    finally:
        monkeypatch.delenv("FASTCONV_CACHE_DIR")
        tuning.reload()


@pytest.mark.parametrize("command", ["compare", "tune"])
def test_without_a_gpu_one_sentence_says_so(command, capsys, monkeypatch):
    def refuse():
        raise fastconv.UnsupportedError("no NVIDIA driver can be loaded: libcuda.so.1 is not there")

    monkeypatch.setattr(launch, "driver", refuse)
    for extra, message in (([], "no NVIDIA driver can be loaded"), (["--threads", "2"], "--threads does not go with")):
        with pytest.raises(SystemExit, match="2"):
            cli.main([command, *TINY, *extra])
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert message in err


def test_without_a_library_that_allocates_the_sentence_names_one(cupy, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["compare", *TINY])
    assert "work on a GPU needs CuPy or PyTorch" in capsys.readouterr().err
