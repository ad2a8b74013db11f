"""The CUDA toolchain: numba-cuda, libnvvm (kernel to PTX) and nvJitLink (PTX to machine code), all from wheels.

No driver is needed. A mix that cannot work is refused in one sentence that says what to install: nvJitLink reads
the PTX of its own CUDA release and of older ones, and nothing in pip sees to that.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import MissingDependencyError

INSTALL = "pip install 'fastconv[cuda13]' (or 'fastconv[cuda12]')"
# What the extras install, and the other names that the same libraries have on CUDA 12.
DISTRIBUTIONS = {
    "numba-cuda": ("numba-cuda",),
    "cuda-bindings": ("cuda-bindings",),
    "cuda-core": ("cuda-core",),
    "libnvvm": ("nvidia-nvvm", "nvidia-cuda-nvcc-cu12"),
    "nvJitLink": ("nvidia-nvjitlink", "nvidia-nvjitlink-cu12"),
}
# CUDA release -> version of the PTX it writes, where the minor numbers differ; from CUDA 13 on PTX 9.x is CUDA 13.x.
_PTX_OF_CUDA_12 = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 5, 7: 6, 8: 7, 9: 8}


class Toolchain(NamedTuple):
    """Versions that machine code depends on."""

    numba_cuda: str
    nvvm: str
    nvjitlink: tuple[int, int]


def installed() -> dict[str, str | None]:
    """Return the versions of the toolchain's distributions, without importing any; None for what is not installed."""
    return {name: _first_version(names) for name, names in DISTRIBUTIONS.items()}


def _first_version(names: tuple[str, ...]) -> str | None:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def problem(versions: dict[str, str | None]) -> str:
    """Return why distributions of these versions cannot compile kernels; empty if nothing is known to be wrong.

    A library that is not installed by pip may still be on the system: that shows only when it is loaded.
    """
    if versions["numba-cuda"] is None:
        return f"numba-cuda is not installed: {INSTALL}"
    missing = [name for name in ("cuda-bindings", "cuda-core") if versions[name] is None]
    if missing:
        return f"{' and '.join(missing)} not installed: {INSTALL}"
    nvvm, linker = versions["libnvvm"], versions["nvJitLink"]
    if nvvm and linker and release(linker) < release(nvvm):
        return too_old(linker, nvvm)
    return ""


def release(version: str) -> tuple[int, int]:
    """Return the CUDA release (major, minor) of a distribution's version."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def too_old(linker: str, nvvm: str) -> str:
    """Return the sentence about an nvJitLink that cannot read what libnvvm writes."""
    major, minor = release(nvvm)
    name = "nvidia-nvjitlink-cu12" if major == 12 else "nvidia-nvjitlink"
    return f"nvJitLink {linker} cannot read the code of libnvvm {nvvm}: pip install '{name}>={major}.{minor}'"


def check_ptx(version: tuple[int, int], linker: tuple[int, int]) -> None:
    """Refuse PTX of a version that an nvJitLink of release `linker` cannot read."""
    newest = (9, linker[1]) if linker[0] >= 13 else (8, _PTX_OF_CUDA_12.get(linker[1], 8))
    if version > newest:
        cuda = (
            (13, version[1]) if version[0] >= 9 else (12, max(m for m, p in _PTX_OF_CUDA_12.items() if p <= version[1]))
        )
        raise MissingDependencyError(too_old(f"{linker[0]}.{linker[1]}", f"{cuda[0]}.{cuda[1]}"))


def import_cuda() -> Any:
    """Return `numba.cuda` as numba-cuda provides it; refuse Numba's own, which is deprecated and another compiler."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from numba import cuda
    except ImportError:
        raise MissingDependencyError(f"CUDA kernels need numba-cuda: {INSTALL}") from None
    if getattr(cuda, "implementation", None) != "NVIDIA":
        raise MissingDependencyError(f"kernels for a GPU are compiled by numba-cuda, which is not installed: {INSTALL}")
    _finish_import()
    return cuda


@lru_cache(maxsize=1)
def _finish_import() -> None:
    """Load what numba-cuda loads late: up to 0.30.4 it looks for `numpy.row_stack`, which NumPy 2.5 has no more."""
    if "row_stack" not in vars(np):
        vars(np)["row_stack"] = np.vstack
        try:
            from numba.cuda.np import arrayobj  # noqa: F401
        finally:
            del vars(np)["row_stack"]


@lru_cache(maxsize=1)
def require() -> Toolchain:
    """Load the compilers and return their versions, or refuse with what to install."""
    import_cuda()
    import numba_cuda
    from numba.cuda.cudadrv.nvvm import NVVM, NvvmSupportError

    try:
        nvvm = NVVM()
    except (NvvmSupportError, ImportError, RuntimeError) as error:
        raise MissingDependencyError(f"libnvvm cannot be loaded ({_first_line(error)}): {INSTALL}") from None
    versions = ".".join(map(str, nvvm.get_ir_version()))
    return Toolchain(numba_cuda.__version__, _first_version(DISTRIBUTIONS["libnvvm"]) or versions, _linker_version())


def _linker_version() -> tuple[int, int]:
    try:
        from cuda.bindings import nvjitlink

        major, minor = nvjitlink.version()
    except Exception as error:
        # cuda.bindings raises kinds of its own, which differ between its versions.
        raise MissingDependencyError(f"nvJitLink cannot be loaded ({_first_line(error)}): {INSTALL}") from None
    return int(major), int(minor)


def libdevice() -> Path:
    """Return the file of the mathematical functions, which is found beside libnvvm's wheel or through CUDA_HOME."""
    from cuda import pathfinder

    try:
        return Path(pathfinder.find_bitcode_lib("device"))
    except RuntimeError as error:
        raise MissingDependencyError(f"{_first_line(error)}: set CUDA_HOME, or {INSTALL}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
