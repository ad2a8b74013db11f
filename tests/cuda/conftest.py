"""What tests of CUDA share. With FASTCONV_TEST_GPU the kernels run on a GPU: see `hardware.py`."""

import sys

import hardware
import pytest

if hardware.MODE:
    from hardware import (  # noqa: F401
        pytest_collection_modifyitems,
        pytest_runtest_logreport,
        pytest_runtest_logstart,
    )

    collect_ignore = hardware.NOT_FOR_GPUS
    hardware.take_over()

import gpu  # with the emulator, or what is in its place

from fastconv import calls, device_arrays
from fastconv.cuda import launch, run


@pytest.fixture
def cupy(monkeypatch):
    """A module like CuPy and, as its `driver`, a driver that emulates, in the place of theirs."""
    module = gpu.Cupy()
    driver = gpu.Driver(module.memory)
    module.driver = driver
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(launch, "driver", lambda: driver)
    monkeypatch.setattr(run, "compile_kernel", driver.compile)
    forget()
    yield module
    forget()


def forget():
    calls.known.clear()
    made = (run._conv_launches, run._launches_of, run._bias_grad_launches)
    for cache in (device_arrays._cupy_on, launch._stream, *made):
        cache.cache_clear()
