"""Instructions that Python has no words for, as intrinsics: the only inline PTX.

Each intrinsic is declared together with its emulation, the Python that `emulator.py` runs in its place, and with the
compute capability it needs. Pointers are what kernels get (`CPointer`) or arrays in shared memory; offsets count
elements and may be int32 or int64. Fragments of matrices live in one-dimensional local arrays, which the compiler
turns into registers: an instruction takes the array and the index of its first register.

Sources: PTX ISA 9.0, sections 9.7.9 (data movement), 9.7.15 (mma) and 9.7.16 (wgmma); fragments of ldmatrix and mma are
those of its figures. `.sync` and `.aligned` instructions are marked convergent, so that no pass moves them into a
branch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import toolchain
from .faults import MisalignedError, UninitialisedError

cuda = toolchain.import_cuda()

from llvmlite import ir  # noqa: E402
from numba.cuda import types  # noqa: E402
from numba.cuda.core.errors import RequireLiteralValue  # noqa: E402
from numba.cuda.extending import intrinsic  # noqa: E402

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32, _VOID = ir.FloatType(), ir.VoidType()
_GLOBAL, _SHARED = 1, 3

Lane = Any


def instruction(emulation: Callable[..., Any], since: int = 75, only: str = "") -> Any:
    """Make an intrinsic of a code generator, with its emulation and the architectures that have it.

    The emulation is called with the emulated thread, then the arguments. `since` is the lowest compute capability
    (ten times), `only` the name of the one architecture that has the instruction.
    """

    def pair(generator: Callable[..., Any]) -> Any:
        made = intrinsic(generator)
        made.emulation, made.since, made.only = emulation, since, only
        return made

    return pair


# --- what code generators share --------------------------------------------------------------------------------


def _is_memory(kind: Any) -> bool:
    return isinstance(kind, (types.CPointer, types.Array))


def _element(kind: Any) -> Any:
    """The type of the elements of a pointer or an array, None for anything else."""
    return getattr(kind, "dtype", None) if _is_memory(kind) else None


def _place(context: Any, builder: Any, kind: Any, memory: Any, offset_kind: Any, offset: Any) -> Any:
    """Return the address of an element."""
    start = context.make_array(kind)(context, builder, value=memory).data if isinstance(kind, types.Array) else memory
    return builder.gep(start, [context.cast(builder, offset, offset_kind, types.int64)], inbounds=True)


def _in_space(builder: Any, pointer: Any, space: int) -> Any:
    return builder.addrspacecast(builder.bitcast(pointer, _I8.as_pointer()), ir.PointerType(_I8, space))


def _shared_address(builder: Any, pointer: Any) -> Any:
    """Return the 32-bit address within the block's shared memory."""
    return builder.ptrtoint(_in_space(builder, pointer, _SHARED), _I32)


def _assemble(
    builder: Any, result: Any, operands: Sequence[Any], text: str, constraints: str,
    pure: bool = False, convergent: bool = True,
) -> Any:  # fmt: skip
    """Return the call of inline PTX; what is not pure stays in its place among others, convergent in its branch."""
    kind = ir.FunctionType(result, [operand.type for operand in operands])
    assembly = ir.InlineAsm(kind, text, constraints, side_effect=not pure)
    return builder.call(assembly, operands, attrs=("convergent",) if convergent else ())


def _registers(first: int, count: int) -> str:
    return "{" + ", ".join(f"${i}" for i in range(first, first + count)) + "}"


def _struct(kind: Any, count: int) -> Any:
    return kind if count == 1 else ir.LiteralStructType([kind] * count)


def _parts(builder: Any, value: Any, count: int) -> list[Any]:
    return [value] if count == 1 else [builder.extract_value(value, i) for i in range(count)]


class _Fragment:
    """Registers of a local array, from an index on."""

    def __init__(self, context: Any, builder: Any, kind: Any, array: Any, at_kind: Any, at: Any) -> None:
        self.builder = builder
        self.first = _place(context, builder, kind, array, at_kind, at)

    def load(self, count: int) -> list[Any]:
        return [self.builder.load(self._slot(i)) for i in range(count)]

    def store(self, values: Sequence[Any]) -> None:
        for i, value in enumerate(values):
            self.builder.store(value, self._slot(i))

    def _slot(self, index: int) -> Any:
        return self.builder.gep(self.first, [ir.Constant(_I64, index)], inbounds=True)


def _holds(kind: Any, element: Any) -> bool:
    """Whether a type is a one-dimensional array of an element type."""
    return isinstance(kind, types.Array) and kind.ndim == 1 and kind.dtype == element


# --- vectors of memory -----------------------------------------------------------------------------------------


def _vectors(kind: Any, bits: int, count: int) -> tuple[Any, Any]:
    """Return the vector of the elements, and that of 32-bit words it is moved as: 8 halves would go in two accesses."""
    vector = ir.VectorType(kind, count)
    return vector, vector if bits >= 32 or bits * count < 64 else ir.VectorType(_I32, bits * count // 32)


def _word(builder: Any, low: Any, high: Any) -> Any:
    """Return two 16-bit numbers in a word, as no pass takes back: a vector of 8 halves would go in two accesses."""
    halves = [builder.bitcast(half, _I16) for half in (low, high)]
    return _assemble(builder, _I32, halves, "mov.b32 $0, {$1, $2};", "=r,h,h", pure=True, convergent=False)


def _halves(builder: Any, word: Any) -> list[Any]:
    """Return the two 16-bit numbers of a word."""
    pair = _struct(_I16, 2)
    both = _assemble(builder, pair, [word], "mov.b32 {$0, $1}, $2;", "=h,=h,r", pure=True, convergent=False)
    return _parts(builder, both, 2)


def _vector_load(count: int) -> Any:
    def emulation(lane: Lane, memory: Any, offset: int) -> tuple[Any, ...]:
        return memory.read(offset, count, lane)

    @instruction(emulation)
    def load(typing_context, memory, offset):
        element = _element(memory)
        if element is None or element.bitwidth * count > 128:
            return None

        def generate(context, builder, signature, args):
            place = _place(context, builder, memory, args[0], offset, args[1])
            vector, moved = _vectors(place.type.pointee, element.bitwidth, count)
            loaded = builder.load(builder.bitcast(place, moved.as_pointer()))
            loaded.align = count * element.bitwidth // 8
            in_words = element.bitwidth == 16 and moved is not vector
            whole = loaded if in_words else builder.bitcast(loaded, vector)
            values = [builder.extract_element(whole, ir.Constant(_I32, i)) for i in range(whole.type.count)]
            if in_words:
                values = [builder.bitcast(v, vector.element) for word in values for v in _halves(builder, word)]
            return context.make_tuple(builder, signature.return_type, values)

        return types.UniTuple(element, count)(memory, offset), generate

    return load


def _vector_store(count: int) -> Any:
    def emulation(lane: Lane, memory: Any, offset: int, values: Sequence[Any]) -> None:
        memory.write(offset, values, lane)

    @instruction(emulation)
    def store(typing_context, memory, offset, values):
        element = _element(memory)
        if element is None or element.bitwidth * count > 128 or len(values) != count:
            return None

        def generate(context, builder, signature, args):
            place = _place(context, builder, memory, args[0], offset, args[1])
            vector, moved = _vectors(place.type.pointee, element.bitwidth, count)
            given = [
                context.cast(builder, builder.extract_value(args[2], i), kind, element)
                for i, kind in enumerate(values.types)
            ]
            if element.bitwidth == 16 and moved is not vector:
                given, vector = [_word(builder, *given[i : i + 2]) for i in range(0, count, 2)], moved
            whole = ir.Constant(vector, ir.Undefined)
            for i, value in enumerate(given):
                whole = builder.insert_element(whole, value, ir.Constant(_I32, i))
            stored = builder.store(builder.bitcast(whole, moved), builder.bitcast(place, moved.as_pointer()))
            stored.align = count * element.bitwidth // 8
            return context.get_dummy_value()

        return types.void(memory, offset, values), generate

    return store


# One access of so many elements: 64 or 128 bits where they fill them. The address must be a multiple of its size.
load2, load4, load8 = _vector_load(2), _vector_load(4), _vector_load(8)
store2, store4, store8 = _vector_store(2), _vector_store(4), _vector_store(8)


def _pointer_to(lane: Lane, array: Any) -> Any:
    return array.flat()


@instruction(_pointer_to)
def pointer_to(typing_context, array):
    """The address of an array's first element: indexing a pointer costs no test for negative indices."""
    if not isinstance(array, types.Array):
        return None

    def generate(context, builder, signature, args):
        return context.make_array(array)(context, builder, value=args[0]).data

    return types.CPointer(array.dtype)(array), generate


# --- whole numbers ---------------------------------------------------------------------------------------------


def _unsigned(value: int) -> int:
    return int(value) & 0xFFFFFFFF


def _signed(value: int) -> int:
    value = _unsigned(value)
    return value - (1 << 32) if value >> 31 else value


@instruction(lambda lane, a, b: _signed(_unsigned(a) // _unsigned(b)))
def divide(typing_context, a, b):
    """a / b of two numbers that are not negative, without Python's rounding: a fourth of the instructions of `//`."""

    def generate(context, builder, signature, args):
        return builder.udiv(args[0], args[1])

    return types.int32(types.int32, types.int32), generate


def divider(divisor: int) -> tuple[int, int]:
    """Return the multiplier and the shift that `fast_divide` takes for a divisor.

    From the source: T. Granlund, P. Montgomery, Division by invariant integers using multiplication, 1994. The
    multiplier is ceil(2**(31 + shift) / divisor), which fits in 32 bits and is exact for numbers below 2**31.
    """
    shift = (divisor - 1).bit_length()
    return -(-(1 << (31 + shift)) // divisor), shift


def _fast_divide(lane: Lane, number: int, multiplier: int, shift: int) -> int:
    return _signed((int(number) * _unsigned(multiplier)) >> 31 >> int(shift))


@instruction(_fast_divide)
def fast_divide(typing_context, number, multiplier, shift):
    """number / divisor for 0 <= number < 2**31, by the constants that `divider(divisor)` returns."""

    def generate(context, builder, signature, args):
        doubled = builder.shl(builder.zext(args[0], _I64), ir.Constant(_I64, 1))
        product = builder.mul(doubled, builder.zext(args[1], _I64))
        high = builder.trunc(builder.lshr(product, ir.Constant(_I64, 32)), _I32)
        return builder.lshr(high, args[2])

    return types.int32(types.int32, types.uint32, types.int32), generate


# --- formats of numbers ----------------------------------------------------------------------------------------


def _bits_of(value: Any) -> int:
    return int(np.float32(value).view(np.uint32))


def _float_of(bits: int) -> np.float32:
    return np.uint32(_unsigned(bits)).view(np.float32)


def round_to_bfloat16(values: Any) -> np.ndarray:
    """Return the nearest bfloat16 numbers, ties to even, as uint16."""
    values = np.asarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def round_to_tf32(values: Any) -> np.ndarray:
    """Return float32 numbers rounded to 10 bits after the point, ties away from zero."""
    values = np.asarray(values, np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x1000) & 0xFFFFE000).astype(np.uint32).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


def _convert(
    name: str, result: Any, argument: Any, emulation: Callable[..., Any], since: int, text: str, code: str
) -> Any:
    @instruction(emulation, since=since)
    def convert(typing_context, value):
        def generate(context, builder, signature, args):
            return _assemble(builder, context.get_value_type(result), args, text, code, pure=True, convergent=False)

        return result(argument), generate

    convert.__doc__ = name
    return convert


@instruction(lambda lane, value: _bits_of(value))
def float_bits(typing_context, value):
    """The bits of a float32."""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], _I32)

    return types.uint32(types.float32), generate


@instruction(lambda lane, bits: _float_of(bits))
def bits_float(typing_context, bits):
    """The float32 that has these bits."""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], _F32)

    return types.float32(types.uint32), generate


tf32 = _convert(
    "A float32 rounded to tf32, as the bits that mma takes.",
    types.uint32, types.float32, lambda lane, value: _bits_of(round_to_tf32(value)), 80,
    "cvt.rna.tf32.f32 $0, $1;", "=r,f",
)  # fmt: skip


def _pack(name: str, text: str, since: int, emulation: Callable[..., Any]) -> Any:
    @instruction(emulation, since=since)
    def pack(typing_context, low, high):
        def generate(context, builder, signature, args):
            return _assemble(builder, _I32, [args[1], args[0]], text, "=r,f,f", pure=True, convergent=False)

        return types.uint32(types.float32, types.float32), generate

    pack.__doc__ = name
    return pack


def _pack_bfloat16(lane: Lane, low: Any, high: Any) -> int:
    first, second = round_to_bfloat16([low, high]).tolist()
    return first | second << 16


def _pack_float16(lane: Lane, low: Any, high: Any) -> int:
    return int(np.array([low, high], np.float32).astype(np.float16).view(np.uint32)[0])


pack_bfloat16 = _pack(
    "Two float32 rounded to bfloat16, in one register.", "cvt.rn.bf16x2.f32 $0, $1, $2;", 80, _pack_bfloat16
)
pack_float16 = _pack(
    "Two float32 rounded to float16, in one register.",
    "{\n.reg .b16 l, h;\ncvt.rn.f16.f32 h, $1;\ncvt.rn.f16.f32 l, $2;\nmov.b32 $0, {l, h};\n}",
    75,
    _pack_float16,
)


@instruction(lambda lane, bits: _float_of(int(bits) << 16))
def bfloat16_float(typing_context, bits):
    """The float32 of a bfloat16 that is held as uint16."""

    def generate(context, builder, signature, args):
        return builder.bitcast(builder.shl(builder.zext(args[0], _I32), ir.Constant(_I32, 16)), _F32)

    return types.float32(types.uint16), generate


def _round_bfloat16(lane: Lane, value: Any) -> int:
    return int(round_to_bfloat16(value))


@instruction(_round_bfloat16)
def float_bfloat16(typing_context, value):
    """A float32 rounded to bfloat16, as uint16; in whole numbers, so that every architecture has it."""

    def generate(context, builder, signature, args):
        bits = builder.bitcast(args[0], _I32)
        odd = builder.and_(builder.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
        rounded = builder.lshr(builder.add(builder.add(bits, odd), ir.Constant(_I32, 0x7FFF)), ir.Constant(_I32, 16))
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.trunc(builder.select(is_nan, ir.Constant(_I32, 0x7FFF), rounded), _I16)

    return types.uint16(types.float32), generate


def _fma_float16x2(lane: Lane, a: int, b: int, c: int) -> int:
    x, y, z = (np.array([_unsigned(v)], np.uint32).view(np.float16).astype(np.float64) for v in (a, b, c))
    return int((x * y + z).astype(np.float16).view(np.uint32)[0])


@instruction(_fma_float16x2)
def fma_float16x2(typing_context, a, b, c):
    """a * b + c of two float16 numbers in each register, rounded once."""

    def generate(context, builder, signature, args):
        return _assemble(builder, _I32, args, "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", pure=True, convergent=False)

    return types.uint32(types.uint32, types.uint32, types.uint32), generate


# --- asynchronous copies ---------------------------------------------------------------------------------------


def _copy_async(size: int) -> Any:
    def emulation(lane: Lane, target: Any, at: int, source: Any, start: int, valid: int) -> None:
        lane.copy_async(target, at, source, start, size, valid)

    @instruction(emulation, since=80)
    def copy(typing_context, target, at, source, start, valid):
        if _element(target) is None or _element(source) is None:
            return None
        cache = "cg" if size == 16 else "ca"

        def generate(context, builder, signature, args):
            to = _shared_address(builder, _place(context, builder, target, args[0], at, args[1]))
            place = _place(context, builder, source, args[2], start, args[3])
            text = f"cp.async.{cache}.shared.global [$0], [$1], {size}, $2;"
            _assemble(builder, _VOID, [to, _in_space(builder, place, _GLOBAL), args[4]], text, "r,l,r,~{memory}")
            return context.get_dummy_value()

        return types.void(target, at, source, start, types.int32), generate

    copy.__doc__ = (
        f"Copy {size} bytes from global to shared memory; of those only `valid` are read, the rest is zero. "
        f"Each place counts elements of its own memory."
    )
    return copy


copy_async4, copy_async8, copy_async16 = _copy_async(4), _copy_async(8), _copy_async(16)


def _plain(text: str, emulation: Callable[..., Any], since: int, only: str = "") -> Any:
    @instruction(emulation, since=since, only=only)
    def plain(typing_context):
        def generate(context, builder, signature, args):
            _assemble(builder, _VOID, [], text, "~{memory}")
            return context.get_dummy_value()

        return types.void(), generate

    plain.__doc__ = text
    return plain


def _wait(text: str, emulation: Callable[..., Any], since: int, only: str = "") -> Any:
    @instruction(emulation, since=since, only=only)
    def wait(typing_context, groups):
        if not isinstance(groups, types.IntegerLiteral):
            raise RequireLiteralValue("the number of groups must be a literal")

        def generate(context, builder, signature, args):
            _assemble(builder, _VOID, [], text.format(groups.literal_value), "~{memory}")
            return context.get_dummy_value()

        return types.void(groups), generate

    wait.__doc__ = f"{text.format('N')} N is a literal number: all but the N newest groups have arrived."
    return wait


copy_commit = _plain("cp.async.commit_group;", lambda lane: lane.copy_commit(), 80)
copy_wait = _wait("cp.async.wait_group {};", lambda lane, groups: lane.copy_wait(groups), 80)


# --- matrices --------------------------------------------------------------------------------------------------


def _gather_matrices(rows: Sequence[Any], count: int, transposed: bool) -> np.ndarray:
    """Return the `count` registers of each lane: lane l has elements 2*(l%4) and the next of row l//4."""
    matrices = np.frombuffer(b"".join(rows[: 8 * count]), np.uint16).reshape(count, 8, 8)
    if transposed:
        matrices = np.ascontiguousarray(matrices.transpose(0, 2, 1))
    return matrices.view(np.uint32).reshape(count, 32).T


def _ldmatrix(count: int, transposed: bool) -> Any:
    def combine(rows: Sequence[Any]) -> list[list[int]]:
        return _gather_matrices(rows, count, transposed).tolist()

    def emulation(lane: Lane, fragment: Any, at: int, tile: Any, offset: int) -> None:
        row = tile.read_bytes(offset, 16, lane) if lane.index < 8 * count else None
        fragment.write(at, lane.exchange(combine, row), lane)

    @instruction(emulation)
    def ldmatrix(typing_context, fragment, at, tile, offset):
        if not _holds(fragment, types.uint32) or getattr(_element(tile), "bitwidth", 0) not in (16, 32):
            return None
        suffix = ".trans" if transposed else ""
        text = f"ldmatrix.sync.aligned.m8n8.x{count}{suffix}.shared.b16 {_registers(0, count)}, [${count}];"

        def generate(context, builder, signature, args):
            row = _shared_address(builder, _place(context, builder, tile, args[2], offset, args[3]))
            loaded = _assemble(builder, _struct(_I32, count), [row], text, ",".join(["=r"] * count) + ",r,~{memory}")
            _Fragment(context, builder, fragment, args[0], at, args[1]).store(_parts(builder, loaded, count))
            return context.get_dummy_value()

        return types.void(fragment, at, tile, offset), generate

    ldmatrix.__doc__ = (
        f"Load {count} matrices of 8x8 16-bit numbers into fragment[at:at+{count}]; lane l gives the place of row l%8 "
        f"of matrix l//8, which is 16 bytes of a tile of 16-bit elements, or of 32-bit words that hold two or one."
    )
    return ldmatrix


ldmatrix_x1, ldmatrix_x2, ldmatrix_x4 = (_ldmatrix(n, False) for n in (1, 2, 4))
ldmatrix_x1_trans, ldmatrix_x2_trans, ldmatrix_x4_trans = (_ldmatrix(n, True) for n in (1, 2, 4))


def _float16_of(registers: np.ndarray) -> np.ndarray:
    return registers.view(np.float16).astype(np.float32)


def _bfloat16_of(registers: np.ndarray) -> np.ndarray:
    return (registers.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _tf32_of(registers: np.ndarray) -> np.ndarray:
    # The hardware does not read the bits that tf32 lacks.
    return (registers & np.uint32(0xFFFFE000)).view(np.float32)


def _matrix(numbers: np.ndarray, packed: int, height: int) -> np.ndarray:
    """Return the matrix that 32 lanes hold: `numbers[lane, register, packed]`, 8 rows by 4 lanes per register.

    Registers run down the blocks of 8 rows first (`height` of them), then along the columns.
    """
    across = numbers.shape[1] // height
    blocks = numbers.reshape(8, 4, across, height, packed)
    return blocks.transpose(3, 0, 2, 1, 4).reshape(height * 8, across * 4 * packed)


def _mma(
    shape: str, kind: str, a_count: int, b_count: int, since: int, decode: Callable[..., np.ndarray], packed: int
) -> Any:
    def combine(fragments: Sequence[Any]) -> list[list[np.float32]]:
        registers = np.array([f[0] for f in fragments], np.uint32)
        numbers = decode(registers).reshape(32, a_count + b_count, packed)
        sums = np.array([f[1] for f in fragments], np.float32)
        a = _matrix(numbers[:, :a_count], packed, 2)
        b = _matrix(numbers[:, a_count:], packed, 1)
        # (16, 8) to (row % 8, column // 2, row // 8, column % 2): the lane, then its four sums
        product = (a @ b.T).reshape(2, 8, 4, 2).transpose(1, 2, 0, 3).reshape(32, 4)
        return list(sums + product)

    def emulation(lane: Lane, sums: Any, s: int, a: Any, i: int, b: Any, j: int) -> None:
        registers = (*a.read(i, a_count, lane), *b.read(j, b_count, lane))
        sums.write(s, lane.exchange(combine, (registers, sums.read(s, 4, lane))), lane)

    text = (
        f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {_registers(0, 4)}, {_registers(4, a_count)}, "
        f"{_registers(4 + a_count, b_count)}, {_registers(4 + a_count + b_count, 4)};"
    )
    constraints = ",".join(["=f"] * 4 + ["r"] * (a_count + b_count) + ["f"] * 4)

    @instruction(emulation, since=since)
    def mma(typing_context, sums, s, a, i, b, j):
        if not (_holds(sums, types.float32) and _holds(a, types.uint32) and _holds(b, types.uint32)):
            return None

        def generate(context, builder, signature, args):
            c = _Fragment(context, builder, sums, args[0], s, args[1])
            factors = _Fragment(context, builder, a, args[2], i, args[3]).load(a_count)
            factors += _Fragment(context, builder, b, args[4], j, args[5]).load(b_count)
            result = _assemble(builder, _struct(_F32, 4), factors + c.load(4), text, constraints, pure=True)
            c.store(_parts(builder, result, 4))
            return context.get_dummy_value()

        return types.void(sums, s, a, i, b, j), generate

    mma.__doc__ = f"sums[s:s+4] += a[i:i+{a_count}] @ b[j:j+{b_count}], {shape} of {kind}, summed in float32."
    return mma


mma_m16n8k16_float16 = _mma("m16n8k16", "f16", 4, 2, 80, _float16_of, 2)
mma_m16n8k16_bfloat16 = _mma("m16n8k16", "bf16", 4, 2, 80, _bfloat16_of, 2)
mma_m16n8k8_tf32 = _mma("m16n8k8", "tf32", 4, 2, 80, _tf32_of, 1)
# Turing has no larger one.
mma_m16n8k8_float16 = _mma("m16n8k8", "f16", 2, 1, 75, _float16_of, 2)


# --- products of warpgroups ------------------------------------------------------------------------------------


def _swizzled_row(lane: Lane, tile: Any, at: int, row: int, chunk: int) -> bytes:
    """Return 16 bytes of a row of 128, exchanged as the 128-byte swizzle does: bits 4 to 6 by bits 7 to 9."""
    item = tile.dtype.itemsize
    place = tile.base + at * item + 128 * row + 16 * chunk
    return tile.read_bytes(((place ^ (place >> 3 & 0x70)) - tile.base) // item, 16, lane)


def _wgmma(columns: int, kind: str, decode: Callable[..., np.ndarray]) -> Any:
    count = columns // 2

    def combine(payloads: Sequence[Any]) -> list[np.ndarray]:
        def numbers(part: int) -> np.ndarray:
            # A lane has every 32nd row of 16 bytes: rows of the first chunk, then those of the second.
            chunks = np.frombuffer(
                b"".join(p[part][i] for i in range(len(payloads[0][part])) for p in payloads), np.uint32
            )
            return decode(chunks).reshape(2, -1, 8).transpose(1, 0, 2).reshape(-1, 16)

        # (16, columns) to (row % 8, column % 8 // 2; column // 8, row // 8, column % 2): the lane, then its sums
        product = (numbers(0) @ numbers(1).T).reshape(2, 8, columns // 8, 4, 2).transpose(1, 3, 2, 0, 4)
        return list(np.array([p[2] for p in payloads], np.float32) + product.reshape(32, count))

    def emulation(lane: Lane, sums: Any, s: int, tile: Any, a: int, b: int) -> None:
        if not lane.machine.is_fenced:
            raise UninitialisedError("what was copied to shared memory is not there for wgmma: there is no fence_async")
        for at in (a, b):
            if (tile.base + at * tile.dtype.itemsize) % 1024 not in (0, 32, 64, 96):
                raise MisalignedError(f"a tile of wgmma begins at a multiple of 1024 bytes, not at {tile.name}[{at}]")
        first = lane.warp % 4 * 16
        rows = [_swizzled_row(lane, tile, a, first + lane.index % 16, lane.index // 16)]
        places = range(lane.index, 2 * columns, 32)
        lines = [_swizzled_row(lane, tile, b, place % columns, place // columns) for place in places]
        # Sums are neither the old nor the new ones until they are waited for.
        before = sums.take(s, count)
        sums.pending[s] = lane.exchange(combine, (rows, lines, before))

    name = f"m64n{columns}k16"
    text = (
        "{\n.reg .pred p;\n.reg .b32 one;\nmov.b32 one, 1;\nsetp.ne.b32 p, one, 0;\n"
        f"wgmma.mma_async.sync.aligned.{name}.f32.{kind}.{kind} {_registers(0, count)}, ${count}, ${count + 1}, "
        "p, 1, 1, 0, 0;\n}"
    )
    constraints = ",".join(["=f"] * count + ["l", "l"] + [str(i) for i in range(count)])

    @instruction(emulation, since=90, only="sm_90a")
    def wgmma(typing_context, sums, s, tile, a, b):
        if not _holds(sums, types.float32) or _element(tile) is None:
            return None

        def generate(context, builder, signature, args):
            held = _Fragment(context, builder, sums, args[0], s, args[1])
            places = [
                _matrix_descriptor(context, builder, tile, args[2], kind, at) for kind, at in zip((a, b), args[3:])
            ]
            result = _assemble(builder, _struct(_F32, count), places + held.load(count), text, constraints)
            held.store(_parts(builder, result, count))
            return context.get_dummy_value()

        return types.void(sums, s, tile, a, b), generate

    wgmma.__doc__ = (
        f"Begin sums[s:s+{count}] += a @ b.T, {name} of {kind}: 64 rows of a, {columns} of b, each of 128 bytes in the "
        "128-byte swizzle. a and b are their places, of which the next 16 of depth are 32 bytes further."
    )
    return wgmma


def _matrix_descriptor(context: Any, builder: Any, tile: Any, memory: Any, kind: Any, at: Any) -> Any:
    """Return what wgmma takes for a matrix: rows of 128 bytes, eight of them after 1024, swizzle of 128 bytes."""
    address = _shared_address(builder, _place(context, builder, tile, memory, kind, at))
    place = builder.lshr(builder.and_(address, ir.Constant(_I32, 0x3FFFF)), ir.Constant(_I32, 4))
    return builder.or_(builder.zext(place, _I64), ir.Constant(_I64, 1 << 62 | 1024 // 16 << 32 | 1 << 16))


def _wgmma_wait(count: int) -> Any:
    def emulation(lane: Lane, sums: Any, s: int) -> None:
        sums.write(s, sums.pending.pop(s), lane)

    @instruction(emulation, since=90, only="sm_90a")
    def wait(typing_context, sums, s):
        if not _holds(sums, types.float32):
            return None

        def generate(context, builder, signature, args):
            held = _Fragment(context, builder, sums, args[0], s, args[1])
            constraints = ",".join(["=f"] * count + [str(i) for i in range(count)] + ["~{memory}"])
            text = "wgmma.wait_group.sync.aligned 0;"
            result = _assemble(builder, _struct(_F32, count), held.load(count), text, constraints)
            held.store(_parts(builder, result, count))
            return context.get_dummy_value()

        return types.void(sums, s), generate

    wait.__doc__ = f"Wait for the products of all groups, summed in sums[s:s+{count}]."
    return wait


wgmma_m64n128k16_float16 = _wgmma(128, "f16", _float16_of)
wgmma_m64n128k16_bfloat16 = _wgmma(128, "bf16", _bfloat16_of)
wgmma_m64n256k16_float16 = _wgmma(256, "f16", _float16_of)
wgmma_m64n256k16_bfloat16 = _wgmma(256, "bf16", _bfloat16_of)
wgmma_wait64, wgmma_wait128 = _wgmma_wait(64), _wgmma_wait(128)
wgmma_fence = _plain("wgmma.fence.sync.aligned;", lambda lane: None, 90, "sm_90a")
wgmma_commit = _plain("wgmma.commit_group.sync.aligned;", lambda lane: None, 90, "sm_90a")


def _fence_async(lane: Lane) -> None:
    lane.is_fenced = True


# Between what threads, and their copies, have written to shared memory and wgmma, which reads it by another way.
fence_async = _plain("fence.proxy.async.shared::cta;", _fence_async, 90, "sm_90a")


def _name_instructions() -> None:
    """Name those made in factories after what they are in this module."""
    for name, value in globals().items():
        if hasattr(value, "emulation"):
            value.__name__ = name


_name_instructions()
