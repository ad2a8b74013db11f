"""What fastconv found on this machine, why anything is off, and compiling ahead.

>>> import fastconv
>>> fastconv.show_config(mode="dicts")["fastconv"] == fastconv.__version__
True

Looking starts no threads, compiles nothing but the check that AMX multiplies rightly, where there is AMX, and imports
no optional library.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import config, tuning
from ._version import __version__
from .errors import ArgumentError, ArgumentTypeError, DTypeError
from .geometry import DATA_FORMATS, join_shape, one_of

# Distribution, and the extra that installs it; None for what every installation has. "cuda" is one per CUDA version.
LIBRARIES: dict[str, str | None] = {
    "numpy": None,
    "numba": None,
    "llvmlite": None,
    "threadpoolctl": None,
    "scipy": "fft",
    "ml_dtypes": "bfloat16",
    "torch": "torch",
    "jax": "jax",
    "cupy": "cuda",
    "numba-cuda": "cuda",
    "matplotlib": "report",
    "tqdm": "report",
}
# One distribution per CUDA version provides the module `cupy`.
_PROVIDERS = {"cupy": ("cupy", "cupy-cuda12x", "cupy-cuda13x")}
_WITHOUT = {
    "scipy": "algorithm 'fft' is off",
    "ml_dtypes": "bfloat16 arrays are off",
    "torch": "PyTorch tensors and the comparison with PyTorch are off",
    "jax": "fastconv.jax is off",
    "matplotlib": "plots are off",
    "tqdm": "progress bars are plain",
}
# Name to show, and LLVM's name of the feature.
FEATURES = {
    "AVX2": "avx2",
    "FMA": "fma",
    "AVX-512": "avx512f",
    "AVX-512 BF16": "avx512bf16",
    "AVX-512 VNNI": "avx512vnni",
    "AMX": "amx-tile",
    "AMX BF16": "amx-bf16",
    "NEON": "neon",
    "SVE": "sve",
}
_X86_ONLY = ("AVX2", "FMA", "AVX-512", "AVX-512 BF16", "AVX-512 VNNI", "AMX", "AMX BF16")
_THREADING_LAYERS = {"tbb": "tbbpool", "omp": "omppool", "workqueue": "workqueue"}


def collect() -> dict[str, Any]:
    """Return what fastconv found: the content of :func:`show_config` as nested dicts that JSON can hold.

    Examples
    --------
    >>> sorted(collect())
    ['blas', 'cache', 'cpu', 'fastconv', 'gpu', 'off', 'options', 'platform', 'python', 'threads', 'tuning', 'versions']
    """
    found: dict[str, Any] = {
        "fastconv": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {name: _version(name) for name in LIBRARIES},
        "cpu": _cpu(),
        "threads": _threads(),
        "blas": _blas(),
        "gpu": _gpu(),
        "cache": _cache(),
        "tuning": {"file": str(tuning.file()), "entries": tuning.count()},
        "options": _options(),
    }
    found["off"] = _off(found)
    return found


def show_config(mode: str = "stdout") -> dict[str, Any] | None:
    """Print versions, CPU features, threads, BLAS, GPU, caches and options, and why anything is off.

    Parameters
    ----------
    mode : "stdout" or "dicts"
        "dicts" returns the report instead, as :func:`numpy.show_config` does.

    Returns
    -------
    dict or None

    Raises
    ------
    ArgumentError (ValueError), ArgumentTypeError (TypeError)
        For another mode.

    Examples
    --------
    >>> fastconv.show_config()  # doctest: +SKIP
    """
    one_of("mode", mode, ("stdout", "dicts"))
    found = collect()
    if mode == "dicts":
        return found
    print(render(found))
    return None


# --- what there is ---------------------------------------------------------------------------------------------


def _version(name: str) -> str | None:
    for distribution in _PROVIDERS.get(name, (name,)):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def cores_available() -> int:
    """Return how many cores this process may run on: its affinity, not the machine's count."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def _cpu() -> dict[str, Any]:
    import llvmlite.binding as llvm

    try:
        features = dict(llvm.get_host_cpu_features())
    except RuntimeError:
        features = {}
    return {
        "model": cpu_model(),
        "architecture": platform.machine(),
        "llvm": llvm.get_host_cpu_name(),
        "features": {name: bool(features.get(key, False)) for name, key in FEATURES.items() if _applies(name)},
        "cores": os.cpu_count(),
        "cores_available": cores_available(),
        "cpu_quota": _cpu_quota(),
    }


def _applies(feature: str) -> bool:
    is_x86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
    return (feature in _X86_ONLY) == is_x86


def cpu_model() -> str:
    """Return the name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def _cpu_quota() -> float | None:
    """Cores' worth of time that a container may use, where that is limited."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()[:2]
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _threads() -> dict[str, Any]:
    import numba

    from .cpu import threads

    numba_config: Any = numba.config
    layers = {name: _layer_problem(name, module) for name, module in _THREADING_LAYERS.items()}
    layer, most = threads.layer(), int(numba_config.NUMBA_NUM_THREADS)
    # Asking Numba for its count starts the threads, so it is asked only if they run.
    per_call = most if layer is None and config.get("threads") is None else threads.count()
    return {
        "per_call": per_call,
        "numba": most,
        "layer": layer,
        "layer_expected": _expected_layer(numba_config, layers),
        "layers": {name: problem or "available" for name, problem in layers.items()},
        "environment": {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ},
    }


_THREAD_VARIABLES = (
    "NUMBA_NUM_THREADS", "NUMBA_THREADING_LAYER", "NUMBA_DISABLE_JIT", "NUMBA_CPU_NAME", "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS",
)  # fmt: skip


def _layer_problem(name: str, module: str) -> str:
    """Why a threading layer of Numba cannot be had; empty if it can."""
    try:
        if name == "tbb":
            from numba.np.ufunc import parallel

            parallel._check_tbb_version_compatible()
        importlib.import_module(f"numba.np.ufunc.{module}")
    except ImportError as error:
        return str(error).splitlines()[0]
    return ""


def _expected_layer(numba_config: Any, problems: dict[str, str]) -> str | None:
    """The layer that the first launch will take, by Numba's rule."""
    wanted = str(numba_config.THREADING_LAYER).lower()
    linux = sys.platform.startswith("linux")
    order = {
        "default": tuple(numba_config.THREADING_LAYER_PRIORITY),
        "safe": ("tbb",),
        "threadsafe": ("tbb", "omp"),
        "forksafe": ("tbb", "workqueue") if linux else ("tbb", "omp", "workqueue"),
    }.get(wanted, (wanted,))
    return next((name for name in order if problems.get(name) == ""), None)


def _blas() -> list[dict[str, Any]]:
    from threadpoolctl import threadpool_info

    wanted = ("internal_api", "version", "num_threads", "threading_layer", "architecture")
    return [{key: library.get(key) for key in wanted} for library in threadpool_info() if library["user_api"] == "blas"]


def _gpu() -> dict[str, Any]:
    """What there is to run CUDA kernels on and to compile them with; `extra` is the one that fits, "" if none does."""
    from .cuda import toolchain

    devices, driver, problem = _cuda_devices()
    tools, cuda = toolchain.installed(), driver["cuda"] if driver else None
    compiler: dict[str, Any] = {"versions": tools, "problem": toolchain.problem(tools) or _misfit(tools, cuda)}
    kernels = [device for device in devices if device["architecture"]]
    missing = [name for name in ("cupy", "numba-cuda") if _version(name) is None]
    extra = _cuda_extra(cuda)
    if not extra:
        # No extra fits: to name one would send people to what cannot be installed.
        compiler["problem"] = compiler["problem"].removesuffix(f": {toolchain.INSTALL}")
    reasons = ["the CUDA kernels have run in an emulator only", *([problem] if problem else [])]
    reasons += [f"no kernels for {d['name']} (capability {d['capability']})" for d in devices if d not in kernels]
    if kernels and missing:
        reasons.append(f"{' and '.join(missing)} not installed{_hint(extra)}")
    return {
        "in_use": bool(kernels) and not compiler["problem"],
        "devices": devices, "driver": driver, "extra": extra, "compiler": compiler, "why": "; ".join(reasons),
    }  # fmt: skip


def _cuda_extra(cuda: str | None) -> str:
    """The extra whose machine code the driver takes; without a driver the newest, which compiles and explains."""
    if sys.platform == "darwin":
        return ""
    major = 13 if cuda is None else int(cuda.partition(".")[0])
    return f"cuda{min(major, 13)}" if major >= 12 else ""


def _misfit(tools: dict[str, str | None], cuda: str | None) -> str:
    """Why machine code of this toolchain does not load, if its CUDA is newer than the driver's by a major number."""
    made = tools["nvJitLink"]
    if cuda is None or made is None or int(made.partition(".")[0]) <= int(cuda.partition(".")[0]):
        return ""
    return f"nvJitLink {made} makes code that a driver for CUDA {cuda} does not load{_hint(_cuda_extra(cuda))}"


def _hint(extra: str | None) -> str:
    return f" (pip install 'fastconv[{extra}]')" if extra else ""


def _cuda_devices() -> tuple[list[dict[str, Any]], dict[str, str] | None, str]:
    """The GPUs that NVIDIA's driver shows, its versions, and why there are none.

    By its management library: unlike the CUDA driver's own calls, that leaves a process free to fork.
    """
    try:
        nvml = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
    except OSError:
        return [], None, "no NVIDIA driver found"
    if status := nvml.nvmlInit_v2():
        return [], None, f"the NVIDIA driver answers with error {status}"
    try:
        devices, driver = list(_devices(nvml)), _driver(nvml)
    finally:
        nvml.nvmlShutdown()
    return devices, driver, "" if devices else "the NVIDIA driver shows no GPU"


def _devices(nvml: Any) -> Iterator[dict[str, Any]]:
    from .cuda.architecture import on_capability

    count, device, name = ctypes.c_uint(0), ctypes.c_void_p(), ctypes.create_string_buffer(96)
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    for index in range(count.value):
        nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device))
        if nvml.nvmlDeviceGetName(device, name, len(name)):
            continue
        # Bytes in all, free and used.
        memory, major, minor = (ctypes.c_ulonglong * 3)(), ctypes.c_int(0), ctypes.c_int(0)
        nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory))
        nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor))
        yield {
            "name": name.value.decode(errors="replace"),
            "memory_bytes": memory[0],
            "capability": f"{major.value}.{minor.value}",
            "architecture": on_capability(10 * major.value + minor.value),
        }


def _driver(nvml: Any) -> dict[str, str]:
    """Version of the driver, and the newest CUDA that it knows."""
    version, cuda = ctypes.create_string_buffer(80), ctypes.c_int(0)
    nvml.nvmlSystemGetDriverVersion(version, len(version))
    nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(cuda))
    return {
        "version": version.value.decode(errors="replace"),
        "cuda": f"{cuda.value // 1000}.{cuda.value % 1000 // 10}",
    }


def _cache() -> dict[str, Any]:
    """Where compiled kernels are kept: beside the package, or in the user's cache directory if that is read-only."""
    from .cpu import compile as compiling
    from .cpu import pool

    try:
        directory = Path(compiling._DiskCache(pool._gather.function).cache_path)
    except (OSError, RuntimeError) as error:
        return {"directory": None, "writable": False, "files": 0, "bytes": 0, "why": str(error).splitlines()[0]}
    sizes = [path.stat().st_size for path in directory.glob("*.nbc")]
    writable = os.access(directory, os.W_OK)
    why = "" if writable else "the directory is read-only"
    return {"directory": str(directory), "writable": writable, "files": len(sizes), "bytes": sum(sizes), "why": why}


def _options() -> dict[str, dict[str, Any]]:
    return {name: {"value": config.get(name), "from": _source(name)} for name in config.DEFAULTS}


def _source(option: str) -> str:
    if option in dict(config._scoped.get()):
        return "block"
    if option in config._assigned:
        return "assigned"
    return "environment" if os.environ.get(f"FASTCONV_{option.upper()}") else "default"


def _off(found: dict[str, Any]) -> list[str]:
    """What is not in use on this machine, each with its reason and what would help."""
    notes = []
    for name, extra in LIBRARIES.items():
        if found["versions"][name] is None and name in _WITHOUT:
            notes.append(f"{name} is not installed: {_WITHOUT[name]} (pip install 'fastconv[{extra}]')")
    notes.append(f"GPU: {found['gpu']['why']}")
    absent = [name for name, there in found["cpu"]["features"].items() if not there]
    if absent:
        notes.append(f"this CPU (or its virtual machine) has no {', '.join(absent)}")
    from .cpu import units

    without = units.unit(6)[1]
    if without:
        notes.append(f"algorithms 'implicit_gemm_bf16x6' and 'implicit_gemm_bf16x3': {without}")
    for layer in ("tbb", "omp"):
        if found["threads"]["layers"][layer] != "available":
            notes.append(f"threading layer {layer}: {found['threads']['layers'][layer]}")
    cores, available, quota = (found["cpu"][key] for key in ("cores", "cores_available", "cpu_quota"))
    if cores is not None and available < cores:
        notes.append(f"{cores - available} of {cores} cores: the process may not run on them (affinity)")
    if quota is not None and quota < available:
        notes.append(f"the container's quota is {quota:g} cores, less than the {available} it shows")
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        notes.append("NUMBA_DISABLE_JIT is set: kernels are interpreted, thousands of times slower")
    if found["cache"]["why"]:
        notes.append(f"compiled kernels are not kept: {found['cache']['why']}")
    return notes


# --- as text ---------------------------------------------------------------------------------------------------


def render(found: dict[str, Any]) -> str:
    """Return the report of :func:`collect` as text."""
    sections = {
        "fastconv": [("version", found["fastconv"]), ("python", f"{found['python']}, {found['platform']}")],
        "libraries": [(name, version or _absence(name, found["gpu"])) for name, version in found["versions"].items()],
        "CPU": _cpu_lines(found["cpu"]),
        "threads": _thread_lines(found["threads"], found["blas"]),
        "GPU": _gpu_lines(found["gpu"]),
        "compiled kernels": _cache_lines(found["cache"]),
        "measured times": [("file", found["tuning"]["file"]), ("convolutions", found["tuning"]["entries"])],
        "options": [(name, f"{o['value']!r} ({o['from']})") for name, o in found["options"].items()],
    }
    lines = []
    for title, rows in sections.items():
        lines += [title, *(f"  {key:<15} {value}" for key, value in rows)]
    return "\n".join([*lines, "off, and why", *(f"  - {note}" for note in found["off"])])


def _absence(name: str, gpu: dict[str, Any]) -> str:
    """Without a GPU CuPy serves nothing; numba-cuda compiles kernels for `explain` all the same."""
    extra = LIBRARIES[name]
    if extra == "cuda":
        extra = gpu["extra"] if gpu["devices"] or name != "cupy" else ""
    return f"not installed{_hint(extra)}"


def _gpu_lines(gpu: dict[str, Any]) -> list[tuple[str, str]]:
    """What compiles kernels needs no GPU: it is shown beside the devices."""
    versions, problem = gpu["compiler"]["versions"], gpu["compiler"]["problem"]
    names = [f"{name} {version or 'not found as a distribution'}" for name, version in versions.items()]
    devices, driver = gpu["devices"], gpu["driver"]
    return [
        ("in use", "by operations on its arrays" if gpu["in_use"] else "no"),
        *(("device", _device_line(device)) for device in devices),
        *([] if devices else [("devices", "none")]),
        ("driver", f"{driver['version']}, for CUDA up to {driver['cuda']}" if driver else "none"),
        ("toolchain", ", ".join(names)),
        ("kernels", problem or "can be compiled"),
    ]


def _device_line(device: dict[str, Any]) -> str:
    kernels = device["architecture"] or "no kernels"
    return f"{device['name']}, {device['memory_bytes'] / 2**30:.0f} GiB, capability {device['capability']} ({kernels})"


def _cpu_lines(cpu: dict[str, Any]) -> list[tuple[str, str]]:
    quota = "" if cpu["cpu_quota"] is None else f", quota {cpu['cpu_quota']:g}"
    return [
        ("model", f"{cpu['model']} ({cpu['architecture']}, LLVM: {cpu['llvm']})"),
        ("features", ", ".join(name for name, there in cpu["features"].items() if there) or "none of note"),
        ("cores", f"{cpu['cores_available']} available of {cpu['cores']}{quota}"),
    ]


def _thread_lines(threads: dict[str, Any], blas: list[dict[str, Any]]) -> list[tuple[str, str]]:
    in_use = threads["layer"] or f"{threads['layer_expected']} (from the first call on)"
    lines = [("per call", f"{threads['per_call']} of {threads['numba']}"), ("layer", in_use)]
    lines += [(f"layer {name}", state) for name, state in threads["layers"].items()]
    lines += [(name, value) for name, value in threads["environment"].items()]
    for library in blas:
        lines.append(
            (
                "BLAS",
                f"{library['internal_api']} {library['version']}, {library['num_threads']} threads "
                f"({library['threading_layer']}), kernels for {library['architecture']}",
            )
        )
    return lines


def _cache_lines(cache: dict[str, Any]) -> list[tuple[str, str]]:
    state = "writable" if cache["writable"] else f"not writable: {cache['why']}"
    size = f"{cache['files']} files, {cache['bytes'] / 2**20:.1f} MiB"
    return [("directory", f"{cache['directory'] or 'none'} ({state})"), ("size", size)]


# --- compiling ahead -------------------------------------------------------------------------------------------

_SPATIAL = {"1": (6,), "2": (6, 6), "3": (6, 6, 6)}


class _Arrays(NamedTuple):
    """Tiny operands of one warm-up: four channels, six elements in each spatial dimension; and by what to convolve."""

    data_format: str
    dtype: np.dtype
    spatial: tuple[int, ...]
    algorithms: tuple[str, ...] | None = None

    def image(self, channels: int = 4, size: int | None = None) -> np.ndarray:
        """One image of zeros, `size` in every dimension."""
        spatial = self.spatial if size is None else (size,) * len(self.spatial)
        return np.zeros(join_shape(1, channels, spatial, self.data_format), self.dtype)

    def weight(self, kernel: int, channels: int = 4) -> np.ndarray:
        """Four filters of zeros."""
        return np.zeros((4, channels, *(kernel,) * len(self.spatial)), self.dtype)


def _warm_conv(dims: str, a: _Arrays, how: dict[str, Any]) -> None:
    import fastconv

    conv, bias = getattr(fastconv, f"conv{dims}d"), np.zeros(4, a.dtype)
    for kernel, groups in ((3, 1), (1, 1), (3, 4)):
        weight = a.weight(kernel, 4 // groups)
        for named in _algorithms(a, weight, "forward", groups):
            conv(a.image(), weight, bias, groups=groups, activation="relu", **named, **how)


def _warm_plan(dims: str, a: _Arrays, how: dict[str, Any]) -> None:
    import fastconv

    _warm_conv(dims, a, how)
    # A weight that takes a kernel to compare.
    x, weight = a.image(16), np.zeros((512, 16, *(3,) * len(a.spatial)), a.dtype)
    plan = getattr(fastconv, f"plan_conv{dims}d")(x.shape, weight, algorithm="implicit_gemm", **how)
    for _ in range(2):
        plan(x)


def _warm_conv_backward(dims: str, a: _Arrays, how: dict[str, Any]) -> None:
    import fastconv

    backward = getattr(fastconv, f"conv{dims}d_backward")
    for kernel, groups in ((3, 1), (1, 1), (3, 4)):
        weight = a.weight(kernel, 4 // groups)
        for need in ("input", "weight"):
            for named in _algorithms(a, weight, f"{need}_grad", groups):
                grad = a.image(size=a.spatial[0] - kernel + 1)
                backward(grad, a.image(), weight, groups=groups, needs=(need, "bias"), **named, **how)


def _warm_transpose(dims: str, a: _Arrays, how: dict[str, Any]) -> None:
    import fastconv

    transpose = getattr(fastconv, f"conv_transpose{dims}d")
    for named in _algorithms(a, a.weight(3), "input_grad"):
        transpose(a.image(), a.weight(3), np.zeros(4, a.dtype), activation="relu", **named, **how)


def _warm_transpose_backward(dims: str, a: _Arrays, how: dict[str, Any]) -> None:
    import fastconv

    backward, grad = getattr(fastconv, f"conv_transpose{dims}d_backward"), a.image(size=a.spatial[0] + 2)
    for need, direction in (("input", "forward"), ("weight", "weight_grad")):
        for named in _algorithms(a, a.weight(3), direction):
            backward(grad, a.image(), a.weight(3), needs=(need, "bias"), **named, **how)


def _algorithms(a: _Arrays, weight: np.ndarray, direction: str, groups: int = 1) -> list[dict[str, str]]:
    """Return the arguments that name each algorithm which can do this and is asked for, whatever it promises."""
    from . import selection
    from .geometry import ConvGeometry

    geometry = ConvGeometry.create(
        a.image().shape, weight.shape, groups=groups, data_format=a.data_format, dtype=a.dtype
    )
    found = [c.name for c in selection.algorithms(geometry, direction=direction, precision="medium") if c.supported]
    if a.algorithms is not None:
        wanted = {name for asked in a.algorithms for name in _meant(asked, a, direction)}
        found = [name for name in found if name in wanted]
    return [{"algorithm": name, "precision": "medium"} for name in found]


# Channels, filters, kernel, groups and size of a layer of each kind: the first, 3x3, 1x1, depthwise, and a tiny one.
_USUAL_LAYERS = ((3, 64, 7, 1, 64), (64, 64, 3, 1, 32), (64, 128, 1, 1, 32), (64, 64, 3, 64, 32), (1, 1, 3, 1, 8))


def _meant(name: str, a: _Arrays, direction: str) -> list[str]:
    """Return the algorithms of a name: for "auto" those that it takes for usual layers."""
    from . import registry, selection
    from .geometry import ConvGeometry

    if name != "auto":
        return [algorithm.name for algorithm in registry.named(name, "cpu")]
    found: list[str] = []
    for channels, filters, kernel, groups, size in _USUAL_LAYERS:
        x_shape = join_shape(8, channels, (size,) * len(a.spatial), a.data_format)
        weight_shape = (filters, channels // groups, *(kernel,) * len(a.spatial))
        g = ConvGeometry.create(x_shape, weight_shape, groups=groups, data_format=a.data_format, dtype=a.dtype)
        found += [c.name for c in selection.algorithms(g, direction=direction) if c.chosen]
    return found


def _warm_pool(dims: str, a: _Arrays, how: dict[str, Any], kind: str, backward: bool) -> None:
    import fastconv

    def op(name: str) -> Callable[..., Any]:
        return getattr(fastconv, name.format(dims))

    x, shape = a.image(), a.image().shape
    if kind == "max":
        y, indices = op("max_pool{}d")(x, 2, return_indices=True, **how)
        if backward:
            op("max_pool{}d_backward")(y, indices, shape, **how)
        else:
            op("max_pool{}d")(x, 2, **how)
            op("max_unpool{}d")(y, indices, 2, **how)
            op("max_unpool{}d_backward")(x, indices, **how)
    else:
        y = op("avg_pool{}d")(x, 2, **how)
        if backward:
            op("avg_pool{}d_backward")(y, shape, 2, **how)


def _warm_patches(a: _Arrays) -> None:
    import fastconv

    fastconv.fold(fastconv.unfold(a.image(), 3), a.spatial, 3)


# Operations that share kernels share a warm-up: Lp, adaptive and average pooling, for instance.
_WARM_UPS: dict[str, Callable[..., None]] = {
    "conv{}d": _warm_conv,
    "conv{}d_backward": _warm_conv_backward,
    "plan_conv{}d": _warm_plan,
    "conv_transpose{}d": _warm_transpose,
    "conv_transpose{}d_backward": _warm_transpose_backward,
    **{
        f"{name}{suffix}": (lambda dims, a, how, kind=kind, back=bool(suffix): _warm_pool(dims, a, how, kind, back))
        for kind, names in {
            "max": ("max_pool{}d", "adaptive_max_pool{}d", "max_unpool{}d"),
            "average": ("avg_pool{}d", "adaptive_avg_pool{}d", "lp_pool{}d"),
        }.items()
        for name in names
        for suffix in ("", "_backward")
    },
}
WARM_OPERATIONS: tuple[str, ...] = (
    *(name.format(dims) for name in _WARM_UPS for dims in _SPATIAL), "unfold", "fold",
)  # fmt: skip
USUAL_OPERATIONS = (
    "conv2d", "conv2d_backward", "max_pool2d", "max_pool2d_backward", "avg_pool2d", "avg_pool2d_backward",
)  # fmt: skip


def warmup(
    operations: Sequence[str] = USUAL_OPERATIONS,
    dtypes: Sequence[Any] = ("float32",),
    data_formats: Sequence[str] = DATA_FORMATS,
    algorithms: Sequence[str] | None = None,
) -> None:
    """Compile ahead the kernels that operations use, by running them on tiny arrays.

    Kernels are kept on disk, so one call serves later processes too. One-, two- and three-dimensional operations share
    kernels.

    Parameters
    ----------
    operations : sequence of str
        Names of public operations, such as "conv2d" or "max_pool2d_backward".
    dtypes : sequence of dtypes or their names
    data_formats : sequence of "channels_first", "channels_last"
    algorithms : sequence of str, optional
        Of convolutions; "auto" stands for those that it takes for usual layers. All of them unless given: that takes
        about twice as long.

    Raises
    ------
    ArgumentError, ArgumentTypeError, DTypeError
        For an unknown operation, format, dtype or algorithm, before anything is compiled.

    Examples
    --------
    >>> import fastconv
    >>> fastconv.warmup(["max_pool2d"], ["float32"], ["channels_last"])
    """
    for _, run in warm_up_steps(operations, dtypes, data_formats, algorithms):
        run()


def warm_up_steps(
    operations: Sequence[str],
    dtypes: Sequence[Any],
    data_formats: Sequence[str],
    algorithms: Sequence[str] | None = None,
) -> list[tuple[str, Callable[[], None]]]:
    """Return what :func:`warmup` does, as (label, function) steps."""
    from . import registry

    given = {"operations": operations, "dtypes": dtypes, "data_formats": data_formats}
    for name, value in (given if algorithms is None else {**given, "algorithms": algorithms}).items():
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ArgumentTypeError(f"{name} must be a sequence of names, not {value!r}")
    for operation in operations:
        if operation not in WARM_OPERATIONS:
            raise ArgumentError(f"operations must be names of public operations such as 'conv2d', not {operation!r}")
    formats = [one_of("data_formats", data_format, DATA_FORMATS) for data_format in data_formats]
    names = None if algorithms is None else tuple(registry.checked_name("algorithms", name) for name in algorithms)
    return list(_steps(operations, [_floating(dtype) for dtype in dtypes], formats, names))


def _floating(dtype: Any) -> np.dtype:
    from .arrays import FLOATING, bfloat16

    if dtype == "bfloat16":
        return bfloat16()
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = np.dtype(object)
    if found.name not in FLOATING:
        raise DTypeError(f"dtypes must be among {', '.join(FLOATING)}, not {dtype!r}")
    return found


def _steps(
    operations: Sequence[str],
    dtypes: Sequence[np.dtype],
    data_formats: Sequence[str],
    algorithms: tuple[str, ...] | None,
) -> Iterator[tuple[str, Callable[[], None]]]:
    done: set[tuple[Any, ...]] = set()
    for operation in operations:
        for dtype in dtypes:
            for data_format in data_formats:
                step = _step(operation, dtype, data_format, algorithms)
                if (operation, dtype, data_format) not in done:
                    done.add((operation, dtype, data_format))
                    yield f"{operation} {dtype} {data_format}", step


def _step(operation: str, dtype: np.dtype, data_format: str, algorithms: tuple[str, ...] | None) -> Callable[[], None]:
    if operation in ("unfold", "fold"):
        return lambda: _warm_patches(_Arrays("channels_first", dtype, _SPATIAL["2"]))
    dims = next(d for d in _SPATIAL if f"{d}d" in operation)
    run = _WARM_UPS[operation.replace(f"{dims}d", "{}d")]
    return lambda: run(dims, _Arrays(data_format, dtype, _SPATIAL[dims], algorithms), {"data_format": data_format})
