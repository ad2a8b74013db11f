"""What the package says of the machine, and compiling ahead."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from support import run_python

import fastconv
from fastconv import config, info
from fastconv.cpu import compile as compiling


def test_the_report_is_json_and_names_every_part():
    found = json.loads(json.dumps(info.collect()))
    assert found["versions"]["numpy"] == np.__version__
    assert found["cpu"]["cores_available"] >= 1
    assert found["cpu"]["model"]
    assert set(found["threads"]["layers"]) == {"tbb", "omp", "workqueue"}
    assert set(found["options"]) == set(config.DEFAULTS)
    assert found["off"]


def test_show_config_prints_or_returns(capsys):
    assert fastconv.show_config() is None
    printed = capsys.readouterr().out
    assert "fastconv" in printed
    assert "compiled kernels" in printed
    found = fastconv.show_config(mode="dicts")
    assert capsys.readouterr().out == ""
    assert found is not None
    assert found["fastconv"] == fastconv.__version__
    with pytest.raises(fastconv.ArgumentError, match="mode must be one of 'stdout', 'dicts'"):
        fastconv.show_config(mode="yaml")


def test_options_say_where_they_come_from(monkeypatch):
    monkeypatch.setenv("FASTCONV_PRECISION", "high")
    monkeypatch.setitem(config._assigned, "workspace_limit", 2**20)
    with fastconv.options(threads=1):
        options = info.collect()["options"]
    assert options["threads"] == {"value": 1, "from": "block"}
    assert options["workspace_limit"] == {"value": 2**20, "from": "assigned"}
    assert options["precision"] == {"value": "high", "from": "environment"}
    assert options["algorithm"] == {"value": "auto", "from": "default"}


def test_what_is_missing_says_what_installs_it(monkeypatch):
    version = info._version
    monkeypatch.setattr(
        info, "_version", lambda name: None if name in ("scipy", "cupy", "numba-cuda") else version(name)
    )
    monkeypatch.setattr(info, "_cuda_devices", lambda: ([], None, "no NVIDIA driver found"))
    found = info.collect()
    assert "scipy is not installed: algorithm 'fft' is off (pip install 'fastconv[fft]')" in found["off"]
    assert "pip" not in found["gpu"]["why"]
    text = info.render(found)
    assert "not installed (pip install 'fastconv[fft]')" in text
    # numba-cuda lets `explain` compile without a GPU, CuPy does nothing without one.
    assert "  numba-cuda      not installed (pip install 'fastconv[cuda13]')\n" in text
    assert "  cupy            not installed\n" in text
    assert "  driver          none\n" in text
    monkeypatch.setattr(info.sys, "platform", "darwin")
    assert "fastconv[cuda" not in info.render(info.collect())


def test_a_cache_that_cannot_be_written_is_explained(monkeypatch):
    def refuse(self, function):
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(compiling._DiskCache, "__init__", refuse)
    found = info.collect()
    assert not found["cache"]["writable"]
    assert "compiled kernels are not kept: cannot cache function: no locator available" in found["off"]
    assert "not writable" in info.render(found)


def test_looking_starts_no_threads_and_imports_no_other_library():
    script = """
import sys, fastconv
found = fastconv.show_config(mode="dicts")
from numba.np.ufunc import parallel
print(parallel._is_initialized, found["threads"]["layer"], "torch" in sys.modules, "scipy.fft" in sys.modules)
"""
    assert run_python(script).split() == ["False", "None", "False", "False"]


@pytest.mark.parametrize("operation", info.WARM_OPERATIONS)
def test_every_operation_can_be_warmed_up(operation):
    data_format = "channels_first" if "3d" in operation else "channels_last"
    fastconv.warmup([operation], ["float32"], [data_format])


def test_the_names_to_warm_up_are_the_public_operations():
    public = {name for name in fastconv.__all__ if name.partition("d")[0].rstrip("_") and "1d" in name}
    assert public == {name for name in info.WARM_OPERATIONS if "1d" in name}


def test_what_was_warmed_up_is_not_compiled_again():
    script = """
import numpy as np, fastconv
from fastconv.cpu import compile as compiling
def compiled():
    return sum(len(k.parallel.signatures) for k in compiling.KERNELS if "parallel" in vars(k))
fastconv.warmup(["conv2d", "conv2d_backward"], ["float32"], ["channels_first"])
before = compiled()
x, w, b = (np.ones(shape, "float32") for shape in ((2, 3, 9, 9), (5, 3, 3, 3), (5,)))
for stride in (1, 2):
    geometry = fastconv.ConvGeometry.create(x.shape, w.shape, stride=stride)
    for algorithm in [c.name for c in fastconv.algorithms(geometry) if c.supported]:
        y = fastconv.conv2d(x, w, b, stride=stride, activation="tanh", algorithm=algorithm)
        fastconv.conv2d_backward(y, x, w, stride=stride, algorithm=algorithm)
fastconv.conv1d(x[:, :, 0], w[..., 0], padding=1)
print(before, compiled())
"""
    before, after = run_python(script).split()
    assert before == after != "0"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"operations": ["conv4d"]}, fastconv.ArgumentError, "operations must be names .* not 'conv4d'"),
        ({"operations": "conv2d"}, fastconv.ArgumentTypeError, "operations must be a sequence of names"),
        ({"dtypes": ["int8"]}, fastconv.DTypeError, "dtypes must be among .* not 'int8'"),
        ({"dtypes": ["single precision"]}, fastconv.DTypeError, "not 'single precision'"),
        ({"algorithms": "fft"}, fastconv.ArgumentTypeError, "algorithms must be a sequence of names"),
        ({"algorithms": ["wino"]}, fastconv.ArgumentError, "algorithms must be one of 'auto', .* not 'wino'"),
        ({"data_formats": ["NCHW"]}, fastconv.ArgumentError, "data_formats must be one of .* not 'NCHW'"),
    ],
)
def test_warmup_refuses_what_it_does_not_know(arguments, error, message):
    with pytest.raises(error, match=message):
        fastconv.warmup(**arguments)


def test_only_the_algorithms_asked_for_are_warmed_up(monkeypatch):
    ran = set()
    convolve = fastconv.conv2d
    monkeypatch.setattr(fastconv, "conv2d", lambda *a, **how: ran.add(how["algorithm"]) or convolve(*a, **how))
    fastconv.warmup(["conv2d"], data_formats=["channels_first"], algorithms=["direct", "direct_small"])
    assert ran == {"direct", "direct_small"}
    ran.clear()
    fastconv.warmup(["conv2d"], data_formats=["channels_first"], algorithms=["auto"])
    geometry = fastconv.ConvGeometry.create((8, 64, 32, 32), (64, 64, 3, 3))
    (taken,) = (c.name for c in fastconv.algorithms(geometry) if c.chosen)
    assert taken in ran
    assert ran < {c.name for c in fastconv.algorithms(geometry) if c.supported} | {"direct_small", "depthwise"}


class Nvml:
    """NVIDIA's management library as it is called here, with two GPUs."""

    def __init__(self, status: int = 0, cuda: int = 13000) -> None:
        self.status, self.cuda, self.closed = status, cuda, False

    def nvmlInit_v2(self) -> int:
        return self.status

    def nvmlShutdown(self) -> None:
        self.closed = True

    def nvmlDeviceGetCount_v2(self, count: Any) -> None:
        count._obj.value = 2

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, device: Any) -> None:
        device._obj.value = 100 + index

    def nvmlDeviceGetName(self, device: Any, name: Any, size: int) -> int:
        name.value = f"GPU {device.value - 100}".encode()
        return 0

    def nvmlDeviceGetMemoryInfo(self, device: Any, memory: Any) -> None:
        memory._obj[0] = (device.value - 60) << 30

    def nvmlDeviceGetCudaComputeCapability(self, device: Any, major: Any, minor: Any) -> None:
        # The second is too old.
        major._obj.value, minor._obj.value = (9, 0) if device.value == 100 else (6, 1)

    def nvmlSystemGetDriverVersion(self, version: Any, size: int) -> None:
        version.value = b"580.95.05"

    def nvmlSystemGetCudaDriverVersion_v2(self, cuda: Any) -> None:
        cuda._obj.value = self.cuda


def test_the_cuda_toolchain_is_shown_and_what_does_not_fit_explained(monkeypatch):
    from fastconv.cuda import toolchain

    found = info.collect()
    assert found["gpu"]["compiler"] == {"versions": toolchain.installed(), "problem": ""}
    assert "kernels         can be compiled" in info.render(found)
    there = {**toolchain.installed(), "libnvvm": "13.4.1", "nvJitLink": "13.0.88"}
    monkeypatch.setattr(toolchain, "installed", lambda: there)
    assert "nvJitLink 13.0.88 cannot read the code of libnvvm 13.4.1" in info.render(info.collect())


def test_gpus_are_shown_or_their_absence_explained(monkeypatch):
    nvml = Nvml()
    monkeypatch.setattr(info.ctypes, "CDLL", lambda name: nvml)
    version = info._version
    monkeypatch.setattr(info, "_version", lambda name: None if name == "cupy" else version(name))
    found = info.collect()["gpu"]
    assert nvml.closed
    assert found["devices"] == [
        {"name": "GPU 0", "memory_bytes": 40 << 30, "capability": "9.0", "architecture": "sm_90a"},
        {"name": "GPU 1", "memory_bytes": 41 << 30, "capability": "6.1", "architecture": None},
    ]
    assert (found["driver"], found["in_use"]) == ({"version": "580.95.05", "cuda": "13.0"}, True)
    assert "no kernels for GPU 1 (capability 6.1); cupy not installed (pip install 'fastconv[cuda13]')" in found["why"]
    text = info.render(info.collect())
    assert "  device          GPU 0, 40 GiB, capability 9.0 (sm_90a)\n" in text
    assert "  driver          580.95.05, for CUDA up to 13.0\n" in text
    monkeypatch.setattr(info.ctypes, "CDLL", lambda name: Nvml(status=9))
    assert info._cuda_devices() == ([], None, "the NVIDIA driver answers with error 9")


def test_a_driver_older_than_the_toolchain_is_explained(monkeypatch):
    from fastconv.cuda import toolchain

    there = {**toolchain.installed(), "libnvvm": "13.0.88", "nvJitLink": "13.0.88"}
    monkeypatch.setattr(toolchain, "installed", lambda: there)
    monkeypatch.setattr(info.ctypes, "CDLL", lambda name: Nvml(cuda=12080))
    found = info.collect()["gpu"]
    assert not found["in_use"]
    assert found["compiler"]["problem"] == (
        "nvJitLink 13.0.88 makes code that a driver for CUDA 12.8 does not load (pip install 'fastconv[cuda12]')"
    )
    assert info._cuda_extra("11.8") == ""
    assert info._cuda_extra("14.0") == "cuda13"
