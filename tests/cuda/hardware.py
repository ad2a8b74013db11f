"""The tests of kernels on a GPU: what they would emulate is compiled, launched and read back instead.

FASTCONV_TEST_GPU=1 puts this module in the emulator's place, so that the same tests run on the device. With
FASTCONV_TEST_GPU=emulated they take the same way to a driver that emulates. With FASTCONV_TEST_GPU=compiled nothing is
launched or compared: that leaves the machine code of every kernel in FASTCONV_PREBUILT, if Python leaves out
assertions. `benchmarks/gpu_check.py` reads what FASTCONV_TEST_GPU_REPORT names, a line of JSON for each test, as it
grows.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numba.cuda import types
from numba.cuda.np import numpy_support

from fastconv import testing
from fastconv.cuda import faults, launch
from fastconv.cuda.compile import compile_kernel
from fastconv.errors import MissingDependencyError

MODE = os.environ.get("FASTCONV_TEST_GPU", "")
# The architecture that is compiled for where there is no GPU.
ARCHITECTURE = os.environ.get("FASTCONV_TEST_ARCHITECTURE", "sm_90a")
# Tests of the tools: mistakes planted on purpose, machine code, a driver that is none.
NOT_FOR_GPUS = ["test_compare.py", "test_cubins.py", "test_emulator.py", "test_launch.py", "test_limits.py"]
# Tests that use one of these look at machine code, which needs no GPU, or launch what a GPU must not run: mistakes.
_MISTAKES = {name for name, value in vars(faults).items() if isinstance(value, type)}
_NOT_LAUNCHING = {"budget", "compile_kernel", "compiled", "explain", "faults", "sass", *_MISTAKES}
# Seconds after which a small kernel is taken for one that never ends.
PATIENCE = 10.0
# Exit status of a process that can launch nothing any more.
LOST = 70


class Gpu:
    """The current GPU: arrays go there and back through `cuda.bindings`, kernels run through `launch.Launcher`."""

    def __init__(self, bindings: Any, driver: Any, architecture: str) -> None:
        self._cuda, self._driver, self.architecture = bindings, driver, architecture

    def run(
        self, kernel: Any, grid: Any, block: Any, arguments: Any, shared_bytes: int, signature: Any, launch_bounds: Any
    ) -> None:
        """Compile and launch a kernel on NumPy arrays, the first of its arguments, which are written in place."""
        code = compile_kernel(kernel, signature, self.architecture, launch_bounds)
        if MODE == "compiled":
            return
        if MODE == "emulated":
            self._driver.functions[code.entry] = kernel, signature, launch_bounds
        arrays = [a for a in arguments if isinstance(a, np.ndarray)]
        numbers = [
            numpy_support.as_dtype(kind).type(value)
            for kind, value in list(zip(signature, arguments))[len(arrays) :]
        ]  # fmt: skip
        launcher = launch.Launcher(code, _triple(grid), _triple(block), numbers, shared_bytes, self._driver)
        with contextlib.ExitStack() as held:
            addresses = [held.enter_context(self._there(array)) for array in arrays]
            launcher(self._driver.stream(0), *addresses)
            self._wait(kernel.__name__)
            for array, address in zip(arrays, addresses):
                self._read_back(array, address)

    @contextlib.contextmanager
    def _there(self, array: np.ndarray) -> Iterator[int]:
        """Lend a copy of an array on the device, aligned as it is; 0 for an empty one."""
        assert array.flags.c_contiguous
        if not array.size:
            yield 0
            return
        offset = (array.ctypes.data - array.base.ctypes.data) % 256 if isinstance(array.base, np.ndarray) else 0
        start = int(self._done(self._cuda.cuMemAlloc(array.nbytes + offset)))
        try:
            self._done(self._cuda.cuMemcpyHtoD(start + offset, array.ctypes.data, array.nbytes))
            yield start + offset
        finally:
            self._done(self._cuda.cuMemFree(start))

    def _read_back(self, array: np.ndarray, address: int) -> None:
        """Write to an array what has changed on the device: two arguments may be views of the same memory."""
        if array.size:
            found = np.empty_like(array)
            self._done(self._cuda.cuMemcpyDtoH(found.ctypes.data, address, found.nbytes))
            if found.tobytes() != array.tobytes():
                array[...] = found

    def _wait(self, name: str) -> None:
        try:
            status = finished(self._cuda)
        except Endless as error:
            lost(f"{name}: {error}")
        if int(status):
            # What the device has faulted in stays so for the life of the process.
            lost(f"{name}: {status.name}")

    @staticmethod
    def _done(answer: Any) -> Any:
        status, *values = answer
        if int(status):
            raise RuntimeError(f"the driver says {status.name}")
        return values[0] if values else None


def _triple(sizes: Any) -> tuple[int, ...]:
    return (*(map(int, sizes) if isinstance(sizes, (tuple, list)) else (int(sizes),)), 1, 1)[:3]


class Endless(Exception):
    """A kernel has not ended in time."""


def finished(bindings: Any) -> Any:
    """Return the status of the default stream once it has nothing left to do."""
    limit = time.monotonic() + PATIENCE
    (status,) = bindings.cuStreamQuery(0)
    while status.name == "CUDA_ERROR_NOT_READY":
        if time.monotonic() > limit:
            raise Endless(f"not ended after {PATIENCE:.0f} s")
        (status,) = bindings.cuStreamQuery(0)
    return status


class Unseen:
    """What a launch did to memory, which a GPU does not tell."""

    def __getattr__(self, name: str) -> Any:
        pytest.skip(f"{name}: a GPU does not tell")


def emulate(
    kernel: Any, grid: Any, block: Any, *arguments: Any, shared_bytes: int = 0, signature: Any = None,
    launch_bounds: Any = None, **how: Any,
) -> Unseen:  # fmt: skip
    """Stand for `fastconv.cuda.emulator.emulate`; the GPU has an architecture and an order of threads of its own."""
    kernel = getattr(kernel, "py_func", kernel)
    signature = signature or [*map(_type, arguments)]
    try:
        gpu().run(kernel, grid, block, arguments, shared_bytes, signature, launch_bounds)
    except MissingDependencyError as error:
        pytest.skip(f"{kernel.__name__} has not been built beforehand: {error}")
    return Unseen()


def _type(value: Any) -> Any:
    """Return the type that a test means by an argument, where it does not say."""
    if isinstance(value, np.ndarray):
        return types.CPointer(numpy_support.from_dtype(value.dtype))
    if isinstance(value, np.generic):
        return numpy_support.from_dtype(value.dtype)
    return types.int32 if isinstance(value, int) else types.float32


_gpus: list[Gpu] = []
# Tests put another in its place.
_real_driver = launch.driver


def gpu() -> Gpu:
    """Return the GPU, or what stands for it."""
    if not _gpus:
        from cuda.bindings import driver as bindings

        driver = _real_driver()
        _gpus.append(Gpu(bindings, driver, launch.architecture(driver)))
    return _gpus[0]


def take_over() -> None:
    """Put this module in the emulator's place, before anything has imported that."""
    assert "fastconv.cuda.emulator" not in sys.modules
    if MODE == "compiled":
        _gpus.append(Gpu(None, None, ARCHITECTURE))
        testing.assert_close = lambda *arguments, **how: None
    if MODE == "emulated":
        import gpu as stand_ins

        from fastconv.cuda.emulator import emulate as emulated

        memory = stand_ins.Memory()
        _gpus.append(Gpu(stand_ins.Bindings(memory), stand_ins.Driver(memory, emulated), ARCHITECTURE))
    module = ModuleType("fastconv.cuda.emulator")
    module.emulate = emulate  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module


def lost(message: str) -> None:
    """End the process: the device takes nothing more from it. The test that was running is to blame."""
    if test := os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]:
        write(key=test, status="crashed", text=message)
    os.write(2, f"{test}: {message}\n".encode())
    os._exit(LOST)


def is_lost() -> bool:
    """Return True if the device has faulted: this process can launch nothing any more."""
    try:
        from cuda.bindings import driver

        (status,) = driver.cuCtxSynchronize()
    except (ImportError, RuntimeError):
        return False
    # From 700 on are faults of kernels.
    return int(status) >= 700


# --- what pytest is told ---------------------------------------------------------------------------------------


def write(**line: Any) -> None:
    """Add a line to the report."""
    if path := os.environ.get("FASTCONV_TEST_GPU_REPORT"):
        with Path(path).open("a") as file:
            file.write("\n" + json.dumps(line))


@lru_cache(maxsize=1)
def reported() -> dict[str, str]:
    """Return what the report had when this process first looked: the status of each thing that was done."""
    found, path = {}, Path(os.environ.get("FASTCONV_TEST_GPU_REPORT", os.devnull))
    for text in path.read_text().splitlines() if path.exists() else ():
        # The last line of a process that was ended may be a part of one.
        with contextlib.suppress(json.JSONDecodeError):
            line = json.loads(text)
            if "key" in line:
                found[line["key"]] = line.get("status", "")
    return found


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leave out what needs no GPU and what has been done; with FASTCONV_TEST_GPU_EVERY=n all but each n-th."""
    launching = [i for i in items if _NOT_LAUNCHING.isdisjoint(i.function.__code__.co_names)]
    done = reported()
    chosen = [i for i in launching[:: int(os.environ.get("FASTCONV_TEST_GPU_EVERY", 1))] if i.nodeid not in done]
    config.hook.pytest_deselected(items=[i for i in items if i not in chosen])
    items[:] = chosen


def pytest_runtest_logstart(nodeid: str) -> None:
    """Say which test runs, in case nothing else does."""
    write(start=nodeid)


def pytest_runtest_logreport(report: Any) -> None:
    """Say how a test went."""
    if report.when == "call" or (not report.passed and report.when == "setup"):
        text = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else report.longreprtext
        write(key=report.nodeid, status=report.outcome, text=str(text)[-800:], seconds=round(report.duration, 3))
