"""Compilation: a Python function to a cubin, its registers and its instructions, without a driver.

Numba translates the kernel to NVVM IR, libnvvm to PTX, nvJitLink to the machine code of one architecture. Helpers are
plain functions too: they become device functions here, inlined. Machine code is kept on disk, one file per kernel,
under the digest of everything that it depends on. fast-math is off: sums of products contract, nothing else changes.

A directory named by FASTCONV_PREBUILT is looked in first and added to. Its files travel: what they are found by is the
source and the architecture, not the versions of Python and of the toolchain, which need not be there to read them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import subprocess
import tempfile
import types as python_types
import uuid
import warnings
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from .. import tuning
from ..errors import ArgumentError, FastconvError, MissingDependencyError
from . import functions, toolchain
from .architecture import Architecture


class CompileError(FastconvError, RuntimeError):
    """A compiler refused a kernel; the message is its own."""


@dataclass(frozen=True)
class CompiledKernel:
    """Machine code of a kernel, and what it takes to run.

    Attributes
    ----------
    cubin : bytes
    entry : str
        Name of the kernel within the cubin.
    registers : int
        Of each thread.
    stack, local : int
        Bytes of each thread's stack frame and other local memory: 0, unless registers spill or an array is indexed by
        what is not known when it is compiled.
    shared : int
        Bytes of static shared memory, those included that newer architectures reserve.
    """

    cubin: bytes = field(repr=False)
    entry: str
    name: str
    registers: int
    stack: int
    local: int
    shared: int
    architecture: str

    def occupancy(self, threads: int, shared_bytes: int = 0) -> float:
        """Return the share of a multiprocessor's threads that blocks of this kernel can fill."""
        target = Architecture.named(self.architecture)
        reserved = 1024 if target.capability >= 90 else 0
        return target.occupancy(threads, self.registers, max(0, self.shared - reserved) + shared_bytes)


def compile_kernel(
    function: Any,
    signature: Sequence[Any],
    architecture: str = "sm_90a",
    launch_bounds: int | tuple[int, ...] | None = None,
    max_registers: int | None = None,
) -> CompiledKernel:
    """Compile a kernel, or take it from the disk.

    Parameters
    ----------
    function : function
        A plain Python function, or one made by a factory that has closed over numbers, types and functions.
    signature : sequence of Numba types
        Of its arguments: `types.CPointer(float32)` and such for arrays, numbers otherwise.
    architecture : str
        Such as "sm_80"; "sm_90a" and "sm_100a" have instructions that later ones lack.
    launch_bounds : int or tuple, optional
        Threads of a block, and how many blocks a multiprocessor should hold: fixes how many registers there are.
    max_registers : int, optional

    Raises
    ------
    MissingDependencyError
        If the toolchain is not there or its parts do not fit together; says what to install.
    UnsupportedError
        If the kernel uses instructions that the architecture lacks.
    CompileError
        If a compiler refuses the kernel.
    """
    target = Architecture.named(architecture)
    target.check(functions.reached(function))
    options = {"launch_bounds": launch_bounds, "max_registers": max_registers}
    how = (list(map(str, signature)), architecture, options, _OWN_DIGEST)
    prebuilt = os.environ.get("FASTCONV_PREBUILT")
    if prebuilt:
        travelling = _path(Path(prebuilt), function, _key(functions.digest(function, portable=True), *how))
        if made := _load(*travelling):
            return made
    place = _path(directory(), function, _key(functions.digest(function), *how, list(toolchain.require())))
    made = _load(*place) or _save(*place, _compile(function, tuple(signature), target, launch_bounds, max_registers))
    return _save(*travelling, made) if prebuilt else made


# --- the compilers ---------------------------------------------------------------------------------------------


def _compile(
    function: Any, signature: tuple[Any, ...], target: Architecture, launch_bounds: Any, max_registers: int | None
) -> CompiledKernel:
    ptx, entry = to_ptx(function, signature, target, launch_bounds)
    found = re.search(r"^\.version (\d+)\.(\d+)", ptx, re.MULTILINE)
    assert found is not None, "PTX begins with its version"
    toolchain.check_ptx((int(found[1]), int(found[2])), toolchain.require().nvjitlink)
    cubin = _link(ptx, target, max_registers)
    return CompiledKernel(cubin, entry, function.__name__, architecture=target.name, **resources(cubin, entry))


def to_ptx(
    function: Any, signature: tuple[Any, ...], target: Architecture, launch_bounds: Any = None
) -> tuple[str, str]:
    """Return the PTX of a kernel and the name of its entry."""
    cuda = toolchain.import_cuda()
    from numba.core.errors import NumbaError
    from numba.cuda import compiler, types
    from numba.cuda.core.errors import NumbaError as CudaNumbaError
    from numba.cuda.cudadrv import nvvm

    del cuda
    try:
        result = compiler.compile_cuda(
            _for_numba(function, target),
            types.void,
            signature,
            nvvm_options={"opt": 3},
            cc=target.compute_capability,
        )
        kernel = result.library.get_function(result.fndesc.llvm_func_name)
        compiler.kernel_fixup(kernel, False)
        nvvm.set_launch_bounds(kernel, launch_bounds)
        code = _translate(list(map(_unrolled, result.library.llvm_strs)), target)
    except (NumbaError, CudaNumbaError, nvvm.nvvmError) as error:
        raise CompileError(f"{function.__name__} for {target.name}: {error}") from error
    # Numba's names are long and hold a number that differs between processes; its environment is of no use here.
    ptx = code.decode().strip("\x00").strip().replace(kernel.name, function.__name__)
    return re.sub(r"^\.(common|weak|visible) \.global .*NumbaEnv.*$", "", ptx, flags=re.MULTILINE), function.__name__


def _translate(modules: list[str], target: Architecture) -> bytes:
    """Return the PTX of NVVM IR; libdevice, the mathematical functions, joins only where one is called.

    Numba's own function for this looks for NVRTC first, a library of 90 MB that nothing else here needs.
    """
    from numba.cuda.cudadrv import nvvm

    unit = nvvm.CompilationUnit({"arch": target.virtual, "opt": 3})
    for module in modules:
        unit.add_module(nvvm.llvm_replace(module).encode())
    unit.verify()
    if any(re.search('@"?__nv_', module) for module in modules):
        unit.lazy_add_module(toolchain.libdevice().read_bytes())
    return unit.compile()


_BLOCK = re.compile(r'^"?([\w.$-]+)"?:')
_TARGETS = re.compile(r'label %"?([\w.$-]+)"?')


def _unrolled(text: str) -> str:
    """Return NVVM IR that asks for the unrolling of loops whose extent is known.

    For Blackwell libnvvm has other rules and leaves them be: arrays of registers would be indexed in memory.
    """
    lines, nodes = text.splitlines(), []
    before: set[str] = set()
    number = 1 + max(map(int, re.findall(r"^!(\d+) =", text, re.MULTILINE)), default=0)
    for i, line in enumerate(lines):
        if line.startswith("define"):
            before = set()
        elif label := _BLOCK.match(line):
            before.add(label[1])
        elif line.lstrip().startswith("br ") and not before.isdisjoint(_TARGETS.findall(line)):
            lines[i] = f"{line}, !llvm.loop !{number}"
            nodes.append(f"!{number} = distinct !{{!{number}, !{number + 1}}}")
            nodes.append(f'!{number + 1} = !{{!"llvm.loop.unroll.enable"}}')
            number += 2
    return "\n".join([*lines, *nodes, ""])


def _for_numba(function: Any, target: Architecture) -> Any:
    """Return a copy of a kernel whose helpers are device functions."""
    made: dict[int, Any] = {}

    def device(value: Any) -> Any:
        if not isinstance(value, python_types.FunctionType) or value.__module__.startswith("numba"):
            return value
        if id(value) not in made:
            made[id(value)] = _device_function()(functions.rebuilt(value, device), _DEVICE_OPTIONS, target)
        return made[id(value)]

    return functions.rebuilt(function, device)


_DEVICE_OPTIONS = {"device": True, "forceinline": True, "opt": True}


@lru_cache(maxsize=1)
def _device_function() -> Any:
    """Return numba-cuda's dispatcher, told for which architecture to compile: it would ask the GPU."""
    from numba.cuda import compiler
    from numba.cuda.dispatcher import CUDADispatcher

    class DeviceFunction(CUDADispatcher):
        def __init__(self, function: Any, options: dict[str, Any], target: Architecture) -> None:
            super().__init__(function, targetoptions=dict(options))
            self._target = target

        def compile_device(self, args: Any, return_type: Any = None) -> Any:
            """Compile for the types of the arguments."""
            if args not in self.overloads:
                with self._compiling_counter:
                    result = compiler.compile_cuda(
                        self.py_func,
                        return_type,
                        args,
                        forceinline=True,
                        nvvm_options={"opt": 3},
                        cc=self._target.compute_capability,
                    )
                    self.overloads[args] = result
                    result.target_context.insert_user_function(result.entry_point, result.fndesc, [result.library])
            return self.overloads[args]

    return DeviceFunction


def _link(ptx: str, target: Architecture, max_registers: int | None) -> bytes:
    from cuda.bindings import nvjitlink

    options = [f"-arch={target.name}", "-O3"]
    if max_registers is not None:
        options.append(f"-maxrregcount={max_registers}")
    handle = nvjitlink.create(len(options), options)
    try:
        code = ptx.encode() + b"\0"
        nvjitlink.add_data(handle, nvjitlink.InputType.PTX, code, len(code), "kernel")
        nvjitlink.complete(handle)
        cubin = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, cubin)
    except nvjitlink.nvJitLinkError as error:
        log = bytearray(nvjitlink.get_error_log_size(handle))
        nvjitlink.get_error_log(handle, log)
        raise CompileError(f"nvJitLink for {target.name}: {error}: {log.decode(errors='replace').strip()}") from None
    finally:
        nvjitlink.destroy(handle)
    return bytes(cubin)


# --- what a cubin says of itself -------------------------------------------------------------------------------

# Attributes of an entry in the section .nv.info: of a function, each with the index of its symbol and a number.
_FRAME_SIZE, _REGISTERS, _NUMBER_OF_SYMBOL = 0x11, 0x2F, 0x04


def resources(cubin: bytes, entry: str) -> dict[str, int]:
    """Return registers, stack, local and shared memory of a kernel, read from the sections of an ELF file."""
    sections = _sections(cubin)
    symbols = [section for section in sections if section.name == ".symtab"]
    names = _symbol_names(cubin, symbols[0], sections)
    found = {"registers": 0, "stack": 0, "local": 0, "shared": 0}
    info = next(section for section in sections if section.name == ".nv.info")
    at, end = info.offset, info.offset + info.size
    while at < end:
        form, attribute, size = struct.unpack_from("<BBH", cubin, at)
        if form == _NUMBER_OF_SYMBOL and size >= 8:
            symbol, number = struct.unpack_from("<II", cubin, at + 4)
            if names[symbol] == entry and attribute in (_FRAME_SIZE, _REGISTERS):
                found["registers" if attribute == _REGISTERS else "stack"] = number
        at += 4 + (size if form == _NUMBER_OF_SYMBOL else 0)
    for section in sections:
        if section.name in (f".nv.local.{entry}", f".nv.shared.{entry}"):
            found[section.name.split(".")[2]] = section.size
    return found


class _Section(NamedTuple):
    name: str
    offset: int
    size: int
    link: int


def _sections(cubin: bytes) -> list[_Section]:
    """Return the sections of a 64-bit ELF file."""
    (start,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_size, count, names_at = struct.unpack_from("<HHH", cubin, 0x3A)
    rows = [struct.unpack_from("<IIQQQQI", cubin, start + i * entry_size) for i in range(count)]
    names = rows[names_at][4]
    return [_Section(_text(cubin, names + row[0]), row[4], row[5], row[6]) for row in rows]


def _symbol_names(cubin: bytes, table: _Section, sections: list[_Section]) -> list[str]:
    names = sections[table.link].offset
    return [
        _text(cubin, names + struct.unpack_from("<I", cubin, table.offset + at)[0]) for at in range(0, table.size, 24)
    ]


def _text(content: bytes, at: int) -> str:
    return content[at : content.index(b"\0", at)].decode()


# --- instructions ----------------------------------------------------------------------------------------------


class Instruction(NamedTuple):
    """One machine instruction: its address, the whole text, and its operation with all modifiers."""

    address: int
    text: str
    operation: str

    @property
    def opcode(self) -> str:
        """The operation without modifiers: "LDG" of "LDG.E.128"."""
        return self.operation.split(".")[0]


@dataclass(frozen=True)
class InstructionMix:
    """What a kernel consists of.

    Attributes
    ----------
    instructions : list of Instruction
    main_loop : list of Instruction
        The innermost loop with the most multiply-adds, empty if there is none.
    """

    instructions: list[Instruction]
    main_loop: list[Instruction]

    def count(self, prefix: str, loop: bool = False) -> int:
        """Return how many instructions there are whose operation begins so: "HMMA", "LDG.E.128"."""
        return sum(i.operation.startswith(prefix) for i in (self.main_loop if loop else self.instructions))

    def opcodes(self, loop: bool = False) -> Counter[str]:
        """Return the number of instructions of each opcode."""
        return Counter(i.opcode for i in (self.main_loop if loop else self.instructions))

    def per(self, opcode: str) -> float:
        """Return instructions of the main loop for each one of an opcode."""
        return len(self.main_loop) / max(1, self.count(opcode, loop=True))


_ARITHMETIC = ("HMMA", "HGMMA", "FFMA", "HFMA2", "IMMA", "FADD", "FMUL")
_LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?);")
_OPERATION = re.compile(r"(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_LABEL = re.compile(r"^(\.L\w+):")
_BRANCH = re.compile(r"\bBRA\b.*?`\((\.L\w+)\)")


@lru_cache(maxsize=64)
def sass(compiled: CompiledKernel) -> InstructionMix:
    """Return the instructions of a compiled kernel; needs nvdisasm, which the extra `test` brings."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(compiled.cubin)
        done = subprocess.run([_disassembler(), "-c", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(f"nvdisasm: {done.stderr.strip()}")
    return _parse(done.stdout)


@lru_cache(maxsize=1)
def _disassembler() -> str:
    from cuda import pathfinder

    found = pathfinder.find_nvidia_binary_utility("nvdisasm")
    if found is None:
        raise MissingDependencyError("instructions are read by nvdisasm: pip install 'fastconv[test]'")
    return str(found)


def _parse(text: str) -> InstructionMix:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _LINE.match(line):
            operation = _OPERATION.match(found[2])
            instructions.append(Instruction(int(found[1], 16), found[2], operation[1] if operation else ""))
    loops = []
    for at, instruction in enumerate(instructions):
        branch = _BRANCH.search(instruction.text)
        if branch and labels.get(branch[1], at + 1) < at:
            loops.append(range(labels[branch[1]], at + 1))
    densities = {loop: _density(instructions[loop.start : loop.stop]) for loop in loops}
    best = max(loops, key=lambda loop: (densities[loop], -len(loop)), default=range(0))
    # What is around the innermost loop may do a little arithmetic too.
    inner = [loop for loop in loops if loop[0] in best and loop[-1] in best and 2 * densities[loop] > densities[best]]
    best = min(inner, key=len, default=best)
    return InstructionMix(instructions, instructions[best.start : best.stop])


def _density(loop: list[Instruction]) -> int:
    return sum(i.opcode in _ARITHMETIC for i in loop)


def budget(compiled: CompiledKernel, registers: int, expected: Sequence[str] = (), double: bool = False) -> list[str]:
    """Return what is wrong with the machine code of a kernel: an empty list if it keeps its budget.

    Parameters
    ----------
    registers : int
        The most that a thread may use.
    expected : sequence of str
        Beginnings of operations that must occur, such as "LDG.E.128".
    double : bool
        Whether arithmetic in double precision is meant to be there.
    """
    mix = sass(compiled)
    faults = []
    if compiled.registers > registers:
        faults.append(f"{compiled.registers} registers; at most {registers}")
    if compiled.stack or compiled.local:
        faults.append(f"{compiled.stack} bytes of stack and {compiled.local} of local memory")
    for opcode in ("LDL", "STL", "CALL"):
        if count := mix.count(opcode):
            faults.append(f"{count} {opcode}")
    if not double:
        found = sorted({i.operation for i in mix.instructions if _DOUBLE.match(i.operation)})
        if found:
            faults.append(f"double precision: {', '.join(found)}")
    faults += [f"no {prefix}" for prefix in expected if not mix.count(prefix)]
    return faults


_DOUBLE = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX)\b|(F2F|I2F|F2I|FRND)\S*F64|MUFU\S*64H")


# --- the disk --------------------------------------------------------------------------------------------------

_OWN_DIGEST = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def directory() -> Path:
    """Return where machine code is kept: FASTCONV_CACHE_DIR, or the user's cache directory."""
    return tuning.directory() / "cuda"


def _key(*depends_on: Any) -> str:
    return hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()


def _path(folder: Path, function: Any, key: str) -> tuple[Path, str]:
    """Return the file of a kernel, and its key."""
    return folder / f"{re.sub(r'[^A-Za-z0-9_]', '_', function.__name__)[:60]}.{key[:32]}.kernel", key


def _load(path: Path, key: str) -> CompiledKernel | None:
    """Return a kernel from the disk; None, with a warning, for a file that is damaged."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _warn_once(f"compiled CUDA kernels in {path.parent} cannot be read ({error})")
        return None
    digest, payload = content[:32], content[32:]
    if digest != hashlib.sha256(key.encode() + payload).digest():
        _warn_once(f"the compiled CUDA kernel {path.name} is damaged; compiling again")
        return None
    header, _, cubin = payload.partition(b"\n")
    return CompiledKernel(cubin=zlib.decompress(cubin), **json.loads(header))


def _save(path: Path, key: str, compiled: CompiledKernel) -> CompiledKernel:
    """Write one file, in one step, or warn that it cannot be."""
    header = asdict(compiled)
    cubin = header.pop("cubin")
    # A third of the size: hundreds of them travel.
    payload = json.dumps(header).encode() + b"\n" + zlib.compress(cubin)
    fresh = path.with_suffix(f".{uuid.uuid4().hex[:16]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            fresh.write_bytes(hashlib.sha256(key.encode() + payload).digest() + payload)
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)
    except OSError as error:
        _warn_once(f"compiled CUDA kernels cannot be saved in {path.parent} ({error})")
    return compiled


@lru_cache(maxsize=16)
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def pointer(element: Any) -> Any:
    """Return the type of a pointer to elements of a type: what kernels take for arrays."""
    toolchain.import_cuda()
    from numba.cuda import types

    if not isinstance(element, types.Type):
        raise ArgumentError(f"element must be a Numba type, not {element!r}")
    return types.CPointer(element)
