"""The first look at a GPU: what is there, does machine code load, does Numba compile, what does a launch cost.

`python -m benchmarks.gpu_look` is what `gpu_check` runs first, in a process of its own. Each question is announced in
the report before it is asked and noted when it is answered, so that what kills the process is known.
"""

from __future__ import annotations

import itertools
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest import mock

import numpy as np

import fastconv
from fastconv import reference, registry
from fastconv.cuda import compile, launch, toolchain
from fastconv.geometry import DATA_FORMATS
from fastconv.testing import rms_error

from .gpu_timing import host_seconds
from .workloads import Workload

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "cuda"), str(ROOT / "tests")]

import hardware  # noqa: E402
import kernels  # noqa: E402

PACKAGES = (
    "numpy", "numba", "numba-cuda", "cuda-core", "cuda-bindings", "cuda-pathfinder", "nvidia-nvjitlink", "nvidia-nvvm",
    "cupy-cuda13x", "torch", "nvidia-cudnn-cu13", "ml_dtypes", "greenlet",
)  # fmt: skip
# Largest RMS error, whatever an algorithm promises.
LIMITS = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.5e-2}
# What keys of public operations begin with.
PUBLICLY = "public operations on "
# What the public operations are tried on, by groups; the second is depthwise.
PUBLIC = {n: Workload("public", f"{n} groups", (2, 4, 9, 10), (8, 4 // n, 3, 3), (2, 1), 1, groups=n) for n in (1, 4)}


def guarded(key: str, work: Callable[[], dict[str, Any]], **facts: Any) -> None:
    """Do one thing, unless the report has it, and write down what came of it."""
    if key in hardware.reported():
        return
    hardware.write(start=key)
    start, gone = perf_counter(), False
    try:
        found = {"status": "ok", **work()}
    except hardware.Endless as error:
        found, gone = {"status": "hung", "text": str(error)}, True
    except Exception:
        gone = hardware.is_lost()
        found = {"status": "crashed" if gone else "failed", "text": traceback.format_exc()[-1500:]}
    hardware.write(key=key, **facts, **found, seconds=round(perf_counter() - start, 3))
    if gone:
        os._exit(hardware.LOST)


def look() -> None:
    """Ask everything, in order; without a GPU that is one thing, which says why there is none."""
    guarded("machine", machine)
    try:
        launch.architecture()
    except fastconv.FastconvError:
        return
    for name in PROGRAMS:
        guarded(f"prebuilt {name}", partial(prebuilt, name))
    guarded("compiled here", compiled_here)
    guarded("numba.cuda.jit", numba_jit)
    guarded("launch", launch_costs)
    names = ["auto", *(a.name for a in registry.on("cuda"))]
    for how in itertools.product(("torch", "cupy"), LIMITS, names):
        guarded(f"{PUBLICLY}{' '.join(how)}", partial(public_operations, *how))


# --- what is there ---------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Return the GPU, the driver and all versions."""
    query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit"
    found: dict[str, Any] = {
        "gpu": _said(["nvidia-smi", query, "--format=csv,noheader"]),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _said(["git", "rev-parse", "HEAD"]),
        **{tool: shutil.which(tool) for tool in ("nvcc", "nvdisasm", "compute-sanitizer")},
    }
    for name, ask in (("toolchain", toolchain.require), ("architecture", launch.architecture)):
        try:
            found[name] = str(ask())
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _said(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    return (done.stdout or done.stderr).strip()


# --- machine code ----------------------------------------------------------------------------------------------


def add_vectors() -> None:
    """Vector accesses."""
    x, y, out = np.arange(130, dtype=np.float32), np.ones(130, np.float32), np.full(130, np.nan, np.float32)
    _run(kernels.add_vectors, 2, 32, (x, y, out, np.int32(130)), kernels.ADD_VECTORS)
    np.testing.assert_array_equal(out, x + y)


def stencil() -> None:
    """Shared memory and barriers."""
    x, weight, out = np.arange(68, dtype=np.float32), np.arange(5, dtype=np.float32), np.full(64, np.nan, np.float32)
    _run(kernels.stencil(64, 5), 1, 64, (x, weight, out, np.int32(68)), kernels.STENCIL)
    np.testing.assert_array_equal(out, np.correlate(x, weight, "valid"))


def gemm() -> None:
    """Asynchronous copies, ldmatrix and mma."""
    random, (m, n, k) = np.random.default_rng(0), (70, 66, 104)
    a, b = (random.integers(-4, 5, shape).astype(np.float16) for shape in ((m, k), (n, k)))
    c, grid = np.full((m, n), np.nan, np.float32), (-(-m // kernels.M), -(-n // kernels.N))
    arguments = (a, b, c, *map(np.int32, (m, n, k)))
    _run(kernels.gemm(3), grid, kernels.THREADS, arguments, kernels.GEMM, kernels.gemm_shared_bytes(3))
    np.testing.assert_array_equal(c, a.astype(np.float32) @ b.astype(np.float32).T)


def _run(kernel: Any, grid: Any, block: Any, arguments: Any, signature: Any, shared_bytes: int = 0) -> None:
    hardware.gpu().run(kernel, grid, block, arguments, shared_bytes, signature, None)


PROGRAMS = {"add_vectors": add_vectors, "stencil": stencil, "gemm": gemm}


def prebuilt(name: str) -> dict[str, Any]:
    """Load and run machine code that was built elsewhere, and no other."""
    refused = fastconv.MissingDependencyError("this kernel has not been built beforehand")
    with mock.patch.object(toolchain, "require", side_effect=refused):
        PROGRAMS[name]()
    return {}


def compiled_here() -> dict[str, Any]:
    """Compile a kernel, and run what has come of it."""
    with tempfile.TemporaryDirectory() as empty, mock.patch.dict(os.environ, FASTCONV_CACHE_DIR=empty):
        os.environ.pop("FASTCONV_PREBUILT", None)
        start = perf_counter()
        made = compile.compile_kernel(kernels.gemm(3), kernels.GEMM, hardware.gpu().architecture)
        seconds = perf_counter() - start
        gemm()
    return {"compile_s": round(seconds, 2), "registers": made.registers, "stack": made.stack}


def numba_jit() -> dict[str, Any]:
    """Let Numba compile and launch by itself."""
    call, start = _numba_jit(), perf_counter()
    call()
    return {"compile_s": round(perf_counter() - start, 2)}


# --- what a launch costs ---------------------------------------------------------------------------------------


def launch_costs() -> dict[str, Any]:
    """Return microseconds of the host for a launch of a small kernel of three arrays, and for whole calls."""
    import torch

    costs: dict[str, Any] = {}
    for name, prepare in WAYS.items():
        try:
            costs[name] = round(1e6 * host_seconds(prepare(), torch.cuda.synchronize), 2)
        except Exception as error:
            costs[name] = f"{type(error).__name__}: {error}"[:300]
    return {"us": costs}


def _launcher() -> Callable[[], Any]:
    import torch

    code = compile.compile_kernel(kernels.add_vectors, kernels.ADD_VECTORS, launch.architecture())
    launcher, on = launch.Launcher(code, (1, 1, 1), (32, 1, 1), (np.int32(128),)), launch.stream(0)
    tensors = torch.ones(3, 128).cuda()
    return lambda: launcher(on, *[t.data_ptr() for t in tensors])


def _raw_module() -> Callable[[], Any]:
    import cupy

    code = compile.compile_kernel(kernels.add_vectors, kernels.ADD_VECTORS, launch.architecture())
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.cubin)
        file.flush()
        function = cupy.RawModule(path=file.name).get_function(code.entry)
    arguments = (*(cupy.ones(128, np.float32) for _ in range(3)), np.int32(128))
    return lambda: function((1,), (32,), arguments)


def _numba_jit() -> Callable[[], Any]:
    from numba import cuda

    @cuda.jit
    def add(x: Any, y: Any, out: Any, n: Any) -> None:
        i = cuda.grid(1)
        if i < n:
            out[i] = x[i] + y[i]

    arguments = (*(cuda.to_device(np.ones(128, np.float32)) for _ in range(3)), 128)
    return lambda: add[4, 32](*arguments)


def _convolution(library: str, own: bool = True) -> Callable[[], Any]:
    put, _ = _library(library, "float32")
    x, weight = put(np.ones((1, 8, 16, 16))), put(np.ones((8, 8, 3, 3)))
    if own:
        return lambda: fastconv.conv2d(x, weight, padding=1)
    import torch

    return torch.inference_mode()(lambda: torch.nn.functional.conv2d(x, weight, padding=1))


WAYS: dict[str, Callable[[], Callable[[], Any]]] = {
    "launch by cuda.core": _launcher,
    "launch by cupy.RawModule": _raw_module,
    "launch by numba.cuda.jit": _numba_jit,
    "fastconv.conv2d on cupy": partial(_convolution, "cupy"),
    "fastconv.conv2d on torch": partial(_convolution, "torch"),
    "torch conv2d": partial(_convolution, "torch", own=False),
}


# --- public operations -----------------------------------------------------------------------------------------


def public_operations(library: str, dtype: str, algorithm: str) -> dict[str, Any]:
    """Compare convolutions of an algorithm in both formats, and their gradients, with the oracle."""
    (put, back), random = _library(library, dtype), np.random.default_rng(0)
    errors = {}
    for layer in PUBLIC.values():
        x, w = (back(put(random.standard_normal(s))) for s in (layer.x_shape, layer.weight_shape))
        y = reference.conv(x, w, None, **layer.arguments)
        # The oracle's result, rounded, serves as the gradient.
        grad = back(put(y))
        dx, dw, _ = reference.conv_backward(grad, x, w, **layer.arguments)
        for data_format in DATA_FORMATS:
            moved = partial(_moved, data_format=data_format)
            how = {**layer.arguments, "data_format": data_format, "algorithm": algorithm}
            try:
                got = fastconv.conv2d(put(moved(x)), put(w), **how)
                grads = fastconv.conv2d_backward(
                    put(moved(grad)), put(moved(x)), put(w), needs=("input", "weight"), **how
                )
            except fastconv.UnsupportedError:
                continue
            _finish()
            pairs = ((got, moved(y)), (grads.input, moved(dx)), (grads.weight, dw))
            errors[f"{layer.name}, {data_format}"] = max(rms_error(back(a), b) for a, b in pairs)
    wrong = {name: error for name, error in errors.items() if not error <= LIMITS[dtype]}
    text = f"wrong: {wrong}" if wrong else "" if errors else "it supports none of this"
    return {"status": "wrong" if wrong else "ok", "tried": len(errors), "rms": max(errors.values(), default=0.0),
            "text": text}  # fmt: skip


def _finish() -> None:
    """Wait for the GPU, but not for ever."""
    try:
        from cuda.bindings import driver

        hardware.finished(driver)
    except (ImportError, RuntimeError):
        # Without a driver nothing has been launched.
        return


def _moved(array: np.ndarray, data_format: str) -> np.ndarray:
    return np.moveaxis(array, 1, -1) if data_format == "channels_last" else array


def _library(name: str, dtype: str) -> tuple[Callable[[np.ndarray], Any], Callable[[Any], np.ndarray]]:
    """Return the functions that bring arrays to a library on the GPU, rounded to a dtype, and back in float32."""
    if name == "torch":
        import torch

        kind = getattr(torch, dtype)
        return (
            lambda a: torch.from_numpy(np.ascontiguousarray(a, np.float32)).cuda().to(kind),
            lambda t: t.float().cpu().numpy(),
        )
    import cupy

    own = numpy_dtype(dtype)
    return (
        lambda a: cupy.asarray(np.ascontiguousarray(a).astype(own)),
        lambda a: cupy.asnumpy(a).astype(np.float32),
    )


def numpy_dtype(name: str) -> np.dtype:
    """Return a dtype; NumPy knows bfloat16 once ml_dtypes is there."""
    import ml_dtypes  # noqa: F401

    return np.dtype(name)


if __name__ == "__main__":
    look()
