"""Machine code without a driver: budgets, the disk cache, and what is refused."""

import json
import shutil
import subprocess
import tempfile
import types
import warnings
from pathlib import Path

import kernels
import numpy as np
import pytest
from numba import cuda
from numba.cuda.types import CPointer, float32, int32
from support import run_python

import fastconv
from fastconv.cuda import compile as compiling
from fastconv.cuda import functions, ptx, toolchain
from fastconv.cuda.architecture import ARCHITECTURES, TESTED
from fastconv.cuda.compile import budget, compile_kernel, sass

# --- budgets ---------------------------------------------------------------------------------------------------

# Kernel, signature, threads, most registers, instructions that must be there.
BUDGETS = {
    "add_vectors": (kernels.add_vectors, kernels.ADD_VECTORS, 32, 40, ("LDG.E.128", "STG.E.128", "FADD")),
    "stencil": (kernels.stencil(64, 5), kernels.STENCIL, 64, 40, ("LDG", "LDS", "STS", "BAR", "FFMA")),
    "gemm": (kernels.gemm(3), kernels.GEMM, 128, 104,
             ("HMMA.16816.F32", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128", "STG.E.64")),
}  # fmt: skip


@pytest.mark.parametrize("architecture", TESTED)
@pytest.mark.parametrize("name", BUDGETS)
def test_machine_code_keeps_its_budget(name, architecture):
    function, signature, threads, registers, expected = BUDGETS[name]
    lacking = ARCHITECTURES[architecture].lacks(functions.reached(function))
    if lacking:
        pytest.skip(lacking)
    made = compile_kernel(function, signature, architecture, launch_bounds=threads)
    assert budget(made, registers, expected) == []


@pytest.mark.parametrize("architecture", [a for a in TESTED if a != "sm_75"])
def test_the_main_loop_of_the_product_is_its_multiplications(architecture):
    mix = sass(compile_kernel(kernels.gemm(3), kernels.GEMM, architecture, launch_bounds=128))
    assert mix.count("HMMA", loop=True) == 16
    assert mix.count("LDSM", loop=True) == 8
    assert mix.per("HMMA") < 8


def in_double(x, out):
    out[int32(cuda.threadIdx.x)] = x[int32(cuda.threadIdx.x)] * 0.3 + 1.0


def spilling(x, out):
    held = cuda.local.array(64, float32)
    for i in range(64):
        held[i] = x[int32(i * 7)]
    cuda.syncthreads()
    for i in range(64):
        out[int32(i * 3)] = held[i]


def indexed(x, out, n):
    held = cuda.local.array(64, float32)
    for i in range(64):
        held[int32(63 - i)] = x[i] * x[int32(i + n)]
    out[0] = held[n]


def test_a_budget_names_what_breaks_it():
    pair = (kernels.F32, kernels.F32)
    faults = budget(compile_kernel(in_double, pair, "sm_80"), 2, ("HMMA",))
    assert any("registers; at most 2" in f for f in faults)
    assert any(f.startswith("double precision: ") and "DFMA" in f and "F2F.F64.F32" in f for f in faults)
    assert "no HMMA" in faults
    assert not any("double" in f for f in budget(compile_kernel(in_double, pair, "sm_80"), 64, double=True))
    faults = budget(compile_kernel(spilling, pair, "sm_80", max_registers=24), 24)
    assert any("bytes of stack" in f for f in faults)
    assert any(f.endswith(" STL") for f in faults)
    assert any(f.endswith(" LDL") for f in budget(compile_kernel(indexed, (*pair, int32), "sm_90a"), 64))


def test_launch_bounds_and_register_limits_take_effect():
    free = compile_kernel(kernels.gemm(3), kernels.GEMM, "sm_80")
    bound = compile_kernel(kernels.gemm(3), kernels.GEMM, "sm_80", launch_bounds=(128, 8))
    assert bound.registers <= 64 < free.registers
    assert compile_kernel(spilling, (kernels.F32, kernels.F32), "sm_80", max_registers=24).registers <= 24


def test_resources_are_those_that_cuobjdump_reads():
    from cuda import pathfinder

    tool = pathfinder.find_nvidia_binary_utility("cuobjdump")
    if tool is None:
        pytest.skip("cuobjdump is not installed")
    for architecture in ("sm_75", "sm_90a", "sm_120"):
        made = compile_kernel(kernels.stencil(64, 5), kernels.STENCIL, architecture)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.cubin)
            file.flush()
            said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        for word, value in (
            ("REG", made.registers),
            ("STACK", made.stack),
            ("SHARED", made.shared),
            ("LOCAL", made.local),
        ):
            assert f"{word}:{value} " in said


def test_occupancy_follows_registers_and_shared_memory():
    made = compile_kernel(kernels.stencil(64, 5), kernels.STENCIL, "sm_90a")
    assert made.occupancy(64) == 1.0
    assert made.occupancy(64, shared_bytes=100 * 1024) == 2 * 64 / 2048


# --- the disk --------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCONV_CACHE_DIR", str(tmp_path))
    compiling._warn_once.cache_clear()
    return tmp_path / "cuda"


@pytest.fixture
def compilations(monkeypatch):
    """The names of kernels that are compiled."""
    found = []
    real = compiling._compile
    monkeypatch.setattr(
        compiling, "_compile", lambda function, *rest: found.append(function.__name__) or real(function, *rest)
    )
    return found


def compile_add(**options):
    return compile_kernel(kernels.add_vectors, kernels.ADD_VECTORS, "sm_80", **options)


def test_a_kernel_is_compiled_once_for_each_set_of_options(cache, compilations):
    first = compile_add()
    assert compile_add() == first
    compile_add(max_registers=32)
    compile_kernel(kernels.add_vectors, kernels.ADD_VECTORS, "sm_86")
    assert len(compilations) == len(list(cache.iterdir())) == 3


def test_another_process_compiles_nothing(cache, compilations):
    compile_add()
    script = """
import kernels
from fastconv.cuda import compile as compiling
compiling._compile = None
print(compiling.compile_kernel(kernels.add_vectors, kernels.ADD_VECTORS, "sm_80").entry)
"""
    directory = str(Path(kernels.__file__).parent)
    assert (
        run_python(f"import sys; sys.path.insert(0, {directory!r})\n{script}", FASTCONV_CACHE_DIR=str(cache.parent))
        == "add_vectors\n"
    )


DAMAGE = {
    "empty": lambda content: b"",
    "short": lambda content: content[:-1],
    "flipped": lambda content: content[:200] + bytes([content[200] ^ 16]) + content[201:],
    "garbage": lambda content: b"garbage " * 100,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_compiled_again_with_a_warning(cache, compilations, kind):
    first = compile_add()
    (file,) = cache.iterdir()
    file.write_bytes(DAMAGE[kind](file.read_bytes()))
    with pytest.warns(RuntimeWarning, match="is damaged; compiling again"):
        assert compile_add().cubin == first.cubin
    assert len(compilations) == 2
    compile_add()
    assert len(compilations) == 2


def test_where_nothing_can_be_written_kernels_are_compiled_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTCONV_CACHE_DIR", str(tmp_path / "file" / "below"))
    compiling._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="cannot be"):
        assert compile_add().registers


def test_a_directory_that_was_filled_and_is_read_only_serves(cache, compilations, monkeypatch):
    compile_add()

    def refuse(self, content):
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile_add()
    with pytest.warns(RuntimeWarning, match="cannot be saved in .*read-only"):
        compile_add(max_registers=40)
    assert not list(cache.glob("*.tmp"))


def test_prebuilt_kernels_serve_where_nothing_can_be_compiled(cache, compilations, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTCONV_PREBUILT", str(tmp_path / "prebuilt"))
    first = compile_add()
    assert len(list((tmp_path / "prebuilt").iterdir())) == len(list(cache.iterdir())) == 1
    shutil.rmtree(cache)

    def nothing():
        raise fastconv.MissingDependencyError("libnvvm cannot be loaded")

    monkeypatch.setattr(toolchain, "require", nothing)
    assert compile_add() == first
    assert compilations == ["add_vectors"]
    with pytest.raises(fastconv.MissingDependencyError, match="libnvvm"):
        compile_add(max_registers=32)


def test_a_portable_key_is_of_files_lines_and_constants_and_of_no_bytecode(monkeypatch):
    keys = [functions.digest(kernels.stencil(64, taps), portable=True) for taps in (3, 5, 5)]
    assert keys[0] != keys[1] == keys[2]
    monkeypatch.setattr(functions, "_code", lambda code: pytest.fail("differs between versions of Python"))
    assert functions.digest(kernels.stencil(64, 5), portable=True) == keys[1]
    monkeypatch.setattr(functions, "_file_digest", lambda path: "changed")
    assert functions.digest(kernels.stencil(64, 5), portable=True) != keys[1]


# What a kernel depends on, each with a change that must give it another key.
SOURCE = """
from numba import cuda
from numba.cuda.types import float32, int32
FACTOR = 3
def inner(v):
    return v * float32(2)
def helper(v):
    return inner(v) + float32(FACTOR)
def make(count):
    def kernel(x, out):
        for i in range(count):
            out[i] = helper(x[i])
    return kernel
kernel = make(4)
"""
CHANGES = {
    "the kernel": ("out[i] = helper(x[i])", "out[i] = helper(x[i]) + x[i]"),
    "a helper": ("inner(v) + ", "inner(v) - "),
    "a helper's helper": ("v * float32(2)", "v * float32(4)"),
    "a global constant": ("FACTOR = 3", "FACTOR = 4"),
    "a closed-over constant": ("make(4)", "make(5)"),
}


def module(text):
    made = types.ModuleType("made")
    exec(text, made.__dict__)
    return made.kernel


def test_instructions_of_one_factory_have_keys_of_their_own():
    def kernel(load):
        def inner(x, out):
            out[0] = load(x, 0)[1]

        return inner

    assert functions.digest(kernel(ptx.load2)) != functions.digest(kernel(ptx.load4))


@pytest.mark.parametrize("what", CHANGES)
def test_the_key_changes_with(what):
    good, bad = CHANGES[what]
    assert good in SOURCE
    assert functions.digest(module(SOURCE)) != functions.digest(module(SOURCE.replace(good, bad)))


def test_the_key_does_not_change_with_comments_or_places():
    assert functions.digest(module(SOURCE)) == functions.digest(module("# moved\n\n" + SOURCE))


def test_the_key_changes_with_the_file_of_an_instruction(monkeypatch, tmp_path):
    before = functions.digest(kernels.add_vectors)
    copy = tmp_path / "ptx.py"
    shutil.copy(ptx.__file__, copy)
    copy.write_text(copy.read_text() + "\n")
    monkeypatch.setattr(functions.inspect, "getfile", lambda defined: str(copy))
    assert functions.digest(kernels.add_vectors) != before


# --- refusals --------------------------------------------------------------------------------------------------


def untyped(x, out):
    out[0] = x.nothing


def with_an_array():
    table = np.ones(3)

    def kernel(x, out):
        out[0] = table[1]

    return kernel


def through_a_module(x, out):
    out[0] = kernels.swizzled(x[0], x[1])


@pytest.mark.parametrize(
    ("kernel", "error", "message"),
    [
        (untyped, compiling.CompileError, "(?s)untyped for sm_80: .*nothing"),
        (with_an_array(), fastconv.ArgumentTypeError, "kernels may use numbers, .*, not array"),
        (through_a_module, fastconv.ArgumentTypeError, "write 'from kernels import swizzled'"),
        (kernels.gemm(2), fastconv.UnsupportedError, "needs sm_80 or later, not sm_75"),
    ],
)
def test_what_cannot_be_compiled_is_refused(kernel, error, message):
    architecture = "sm_75" if kernel.__name__.startswith("gemm") else "sm_80"
    with pytest.raises(error, match=message):
        compile_kernel(kernel, (CPointer(float32),) * 2, architecture)


def test_an_unknown_architecture_is_refused():
    with pytest.raises(fastconv.ArgumentError, match=r"architecture must be one of sm_75, .*, not 'sm_70'"):
        compile_kernel(kernels.add_vectors, kernels.ADD_VECTORS, "sm_70")


def test_missing_mathematical_functions_are_named(monkeypatch):
    def nowhere(name):
        raise RuntimeError('Failure finding "libdevice.10.bc": CUDA_HOME not set\nmore')

    monkeypatch.setattr("cuda.pathfinder.find_bitcode_lib", nowhere)
    with pytest.raises(fastconv.MissingDependencyError, match=r"libdevice.10.bc.* not set: set CUDA_HOME, or pip inst"):
        toolchain.libdevice()


def test_numba_cuda_works_with_a_numpy_that_has_no_row_stack():
    script = f"""
import sys
import numpy as np
if vars(np).pop("row_stack", None):
    np.__all__.remove("row_stack")
sys.path.insert(0, {str(Path(kernels.__file__).parent)!r})
import kernels
from fastconv.cuda.compile import to_ptx
from fastconv.cuda.architecture import Architecture
print(to_ptx(kernels.add_vectors, kernels.ADD_VECTORS, Architecture.named("sm_80"))[1], "row_stack" in vars(np))
"""
    assert run_python(script) == "add_vectors False\n"


@pytest.mark.parametrize(
    ("ptx_version", "linker", "message"),
    [
        ((9, 4), (13, 0), r"nvJitLink 13.0 cannot read the code of libnvvm 13.4: pip install 'nvidia-nvjitlink>=13.4'"),
        ((9, 0), (12, 9), r"nvJitLink 12.9 cannot read the code of libnvvm 13.0"),
        ((8, 8), (12, 4), r"pip install 'nvidia-nvjitlink-cu12>=12.9'"),
    ],
)
def test_a_linker_older_than_the_compiler_is_refused(ptx_version, linker, message):
    with pytest.raises(fastconv.MissingDependencyError, match=message):
        toolchain.check_ptx(ptx_version, linker)


@pytest.mark.parametrize(
    ("ptx_version", "linker"), [((9, 0), (13, 0)), ((9, 0), (13, 5)), ((8, 4), (12, 6)), ((8, 8), (13, 0))]
)
def test_a_linker_as_new_as_the_compiler_is_accepted(ptx_version, linker):
    toolchain.check_ptx(ptx_version, linker)


def versions(**changed):
    usual = {
        "numba-cuda": "0.30.4",
        "cuda-bindings": "13.0.3",
        "cuda-core": "1.2.2",
        "libnvvm": "13.0.88",
        "nvJitLink": "13.0.88",
    }
    return usual | {name.replace("_", "-"): version for name, version in changed.items()}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, ""),
        ({"nvJitLink": "13.5.37"}, ""),
        ({"libnvvm": None}, ""),
        ({"numba_cuda": None}, "numba-cuda is not installed: pip install 'fastconv[cuda13]' (or 'fastconv[cuda12]')"),
        ({"cuda_core": None}, "cuda-core not installed: pip install 'fastconv[cuda13]' (or 'fastconv[cuda12]')"),
        ({"libnvvm": "13.4.1"}, toolchain.too_old("13.0.88", "13.4.1")),
    ],
)  # fmt: skip
def test_versions_that_do_not_fit_are_named(changed, message):
    assert toolchain.problem(versions(**changed)) == message


def test_numbas_own_cuda_target_is_refused(monkeypatch):
    monkeypatch.delattr(cuda, "implementation")
    with pytest.raises(fastconv.MissingDependencyError, match="compiled by numba-cuda, which is not installed"):
        toolchain.import_cuda()


def test_a_missing_libnvvm_is_named(monkeypatch):
    from numba.cuda.cudadrv import nvvm

    def missing(*args):
        raise nvvm.NvvmSupportError("libNVVM cannot be found")

    monkeypatch.setattr(nvvm, "NVVM", missing)
    toolchain.require.cache_clear()
    with pytest.raises(fastconv.MissingDependencyError, match=r"libnvvm cannot be loaded \(libNVVM cannot be found\)"):
        toolchain.require()
    toolchain.require.cache_clear()


def test_a_missing_nvjitlink_is_named(monkeypatch):
    from cuda.bindings import nvjitlink

    def missing():
        raise RuntimeError("libnvJitLink.so.13 not found")

    monkeypatch.setattr(nvjitlink, "version", missing)
    with pytest.raises(fastconv.MissingDependencyError, match="nvJitLink cannot be loaded"):
        toolchain._linker_version()


def test_reading_what_is_installed_imports_nothing():
    script = """
import sys, json
from fastconv.cuda import toolchain
print(json.dumps(toolchain.installed()))
print("numba.cuda" in sys.modules, "cuda.bindings" in sys.modules)
"""
    found, imported = run_python(script).splitlines()
    assert json.loads(found)["numba-cuda"]
    assert imported == "False False"
