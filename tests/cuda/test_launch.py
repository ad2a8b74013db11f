"""Launching, as far as it can be tested without a driver: what is asked of it, how often, and what is refused."""

from types import SimpleNamespace

import kernels
import numpy as np
import pytest

import fastconv
from fastconv import device_arrays
from fastconv.cuda import launch
from fastconv.cuda.compile import CompiledKernel


class Driver:
    """A driver that writes down what it is asked to do."""

    def __init__(self, capability=90):
        self.calls, self._capability = [], capability

    def device(self):
        return 0

    def capability(self, device):
        return self._capability

    def load(self, cubin, entry):
        self.calls.append(("load", entry))
        return f"kernel {entry}"

    def allow_shared(self, kernel, nbytes, device):
        self.calls.append(("allow", nbytes))

    def configuration(self, grid, block, shared_bytes):
        return grid, block, shared_bytes

    def stream(self, handle):
        return f"stream {handle}"

    def launch(self, stream, configuration, kernel, *arguments):
        self.calls.append(("launch", stream, configuration, kernel, arguments))


def compiled(architecture="sm_90a"):
    return CompiledKernel(b"code", "entry", "entry", 32, 0, 0, 0, architecture)


def test_a_call_passes_addresses_then_numbers_on_the_stream():
    driver = Driver()
    run = launch.Launcher(compiled(), (2, 1, 1), (64, 1, 1), (np.int32(7), np.float32(0.5)), using=driver)
    run("stream", 4096, 8192)
    expected = (
        "launch",
        "stream",
        ((2, 1, 1), (64, 1, 1), 0),
        "kernel entry",
        (4096, 8192, np.int32(7), np.float32(0.5)),
    )
    assert driver.calls == [("load", "entry"), expected]


def test_a_module_is_loaded_once_and_large_shared_memory_allowed_once():
    driver = Driver()
    for shared in (0, 96 * 1024, 64 * 1024, 100 * 1024):
        launch.Launcher(compiled(), (1,), (32,), shared_bytes=shared, using=driver)
    assert driver.calls == [("load", "entry"), ("allow", 96 * 1024), ("allow", 100 * 1024)]


def test_the_architecture_is_the_devices_own():
    assert launch.architecture(Driver(90)) == "sm_90a"
    assert launch.architecture(Driver(86)) == "sm_86"
    with pytest.raises(fastconv.UnsupportedError, match=r"no kernels for GPUs of compute capability 7.0"):
        launch.architecture(Driver(70))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"numbers": (7,)}, fastconv.ArgumentTypeError, "numbers must be NumPy scalars, whose size is known, not 7"),
        ({"grid": (0, 1)}, fastconv.ArgumentError, "grid and block must be positive"),
        (
            {"shared_bytes": 10**6},
            fastconv.UnsupportedError,
            "1000000 bytes of shared memory; sm_90a gives a block 232448",
        ),
        ({"using": Driver(100)}, fastconv.UnsupportedError, "machine code for sm_90a does not run .* capability 10.0"),
    ],
)
def test_what_cannot_be_launched_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        launch.Launcher(compiled(), **{"grid": (1,), "block": (32,), "using": Driver(), **change})


def test_machine_code_runs_on_later_minor_versions_unless_it_is_for_one_alone():
    assert launch.Launcher(compiled("sm_80"), (1,), (32,), using=Driver(86))
    with pytest.raises(fastconv.UnsupportedError, match="sm_86 does not run"):
        launch.Launcher(compiled("sm_86"), (1,), (32,), using=Driver(80))


def test_without_a_driver_the_refusal_says_so(monkeypatch):
    from cuda.bindings import driver

    def refuse(flags):
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    monkeypatch.setattr(driver, "cuInit", refuse)
    with pytest.raises(
        fastconv.UnsupportedError, match=r"no NVIDIA driver can be loaded: Failed to dlopen libcuda.so.1"
    ):
        launch.CoreDriver()


def interface(shape, strides=None, stream=None):
    return SimpleNamespace(
        __cuda_array_interface__={
            "shape": shape,
            "strides": strides,
            "typestr": "<f4",
            "data": (64, False),
            "stream": stream,
        }
    )


def test_addresses_come_from_the_array_interface():
    assert device_arrays.device_address("x", interface((2, 3))) == 64
    assert device_arrays.device_address("x", interface((2, 3), (12, 4))) == 64
    with pytest.raises(fastconv.ArgumentTypeError, match="x must be C-contiguous"):
        device_arrays.device_address("x", interface((2, 3), (4, 8)))
    with pytest.raises(fastconv.ArgumentTypeError, match="x must be an array on a GPU, not ndarray"):
        device_arrays.device_address("x", np.zeros(3))


def test_streams_come_from_the_array_interface():
    assert device_arrays.stream_handle(interface((1,), stream=1)) == 0
    assert device_arrays.stream_handle(interface((1,), stream=77)) == 77
    driver = Driver()
    run = launch.Launcher(compiled(), (1,), (32,), using=driver)
    assert run.stream(interface((1,), stream=77)) == "stream 77"


def test_kernels_have_the_c_signature_that_addresses_and_numbers_fit():
    from fastconv.cuda.architecture import Architecture
    from fastconv.cuda.compile import to_ptx

    ptx, entry = to_ptx(kernels.add_vectors, kernels.ADD_VECTORS, Architecture.named("sm_80"))
    assert entry == "add_vectors"
    declared = ptx[ptx.index(f".entry {entry}(") : ptx.index(")", ptx.index(f".entry {entry}("))]
    assert [line.split()[1] for line in declared.splitlines()[1:]] == [".u64", ".u64", ".u64", ".u32"]
