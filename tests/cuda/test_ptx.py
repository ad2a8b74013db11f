"""Instructions: each has an emulation that agrees with NumPy, and machine code on the architectures that have it."""

import kernels
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import cuda
from numba.cuda.types import CPointer, float16, float32, int32, uint16, uint32

from fastconv.cuda import functions, ptx
from fastconv.cuda.architecture import ARCHITECTURES, TESTED
from fastconv.cuda.compile import compile_kernel, sass
from fastconv.cuda.emulator import emulate

INSTRUCTIONS = {name: value for name, value in vars(ptx).items() if functions.is_intrinsic(value)}


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_every_instruction_has_an_emulation_and_an_architecture(name):
    made = INSTRUCTIONS[name]
    assert callable(getattr(made, "emulation", None))
    assert any(not target.lacks([made]) for target in ARCHITECTURES.values())
    assert made.__name__ == name


def call(instruction, *values):
    return instruction.emulation(None, *values)


FLOATS = st.floats(width=32, allow_nan=False)
WHOLE = st.integers(0, 2**31 - 1)


@given(WHOLE, st.integers(1, 2**31 - 1))
def test_division_by_multiplication_is_exact(number, divisor):
    multiplier, shift = ptx.divider(divisor)
    assert multiplier < 2**32
    assert call(ptx.fast_divide, number, multiplier, shift) == number // divisor == call(ptx.divide, number, divisor)


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 2**16, 2**31 - 1])
@pytest.mark.parametrize("number", [0, 1, 6, 2**31 - 1, 2**31 - 2])
def test_division_by_multiplication_is_exact_at_its_ends(number, divisor):
    assert call(ptx.fast_divide, number, *ptx.divider(divisor)) == number // divisor


@given(FLOATS, FLOATS)
def test_halves_are_rounded_as_numpy_rounds(low, high):
    with np.errstate(over="ignore"):
        pair = np.array([low, high], np.float32)
        assert call(ptx.pack_float16, low, high) == pair.astype(np.float16).view(np.uint32)[0]
        assert call(ptx.pack_bfloat16, low, high) == pair.astype(ml_dtypes.bfloat16).view(np.uint32)[0]
        assert call(ptx.float_bfloat16, low) == pair.astype(ml_dtypes.bfloat16).view(np.uint16)[0]


@given(st.integers(0, 0xFFFF))
def test_bfloat16_widens_exactly(bits):
    wide = np.array([bits], np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    assert call(ptx.bfloat16_float, bits).view(np.uint32) == wide.view(np.uint32)[0]


@given(FLOATS)
def test_tf32_keeps_ten_bits_and_rounds_ties_away(value):
    rounded = np.uint32(call(ptx.tf32, np.float32(value))).view(np.float32)
    assert np.uint32(rounded.view(np.uint32)) & 0x1FFF == 0
    if np.isfinite(rounded) and abs(value) > 1e-30:
        assert abs(float(rounded) - value) <= abs(value) * 2.0**-11
    assert call(ptx.bits_float, call(ptx.float_bits, np.float32(value))) == np.float32(value)


def test_products_of_half_pairs_are_rounded_once():
    a, b, c = (np.array(v, np.float16) for v in ([1.001, -3], [7.01, 2.5], [-7, 0.3]))
    packed = [int(v.view(np.uint32)[0]) for v in (a, b, c)]
    got = np.array([call(ptx.fma_float16x2, *packed)], np.uint32).view(np.float16)
    assert (got == (a.astype(float) * b.astype(float) + c.astype(float)).astype(np.float16)).all()


# --- fragments -------------------------------------------------------------------------------------------------


def loader(instruction, count):
    """Every lane loads its part of `count` matrices and writes down its registers."""
    registers = 32 * count

    def kernel(x, out):
        tile = cuda.shared.array(256, uint16, alignment=16)
        fragment = cuda.local.array(4, uint32)
        lane = int32(cuda.threadIdx.x)
        for i in range(8):
            tile[int32(lane * 8 + i)] = x[int32(lane * 8 + i)]
        cuda.syncthreads()
        instruction(fragment, 0, tile, int32(lane * 8))
        for i in range(count):
            out[int32(lane * count + i)] = fragment[i]

    return kernel, registers


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_gives_each_lane_two_neighbours_of_a_row(count, transposed):
    kernel, registers = loader(INSTRUCTIONS[f"ldmatrix_x{count}{'_trans' if transposed else ''}"], count)
    x = np.arange(256, dtype=np.uint16)
    out = np.zeros(registers, np.uint32)
    emulate(kernel, 1, 32, x, out)
    matrices = x.reshape(4, 8, 8)[:count]
    for lane in range(32):
        row, column = lane // 4, 2 * (lane % 4)
        for m in range(count):
            pair = matrices[m, column : column + 2, row] if transposed else matrices[m, row, column : column + 2]
            assert out.reshape(32, count)[lane, m] == int(pair[0]) | int(pair[1]) << 16


def multiplier(instruction, a_count, b_count):
    """One product of fragments that are given by lane."""

    def kernel(a, b, c, out):
        lane = int32(cuda.threadIdx.x)
        x, y, sums = cuda.local.array(a_count, uint32), cuda.local.array(b_count, uint32), cuda.local.array(4, float32)
        for i in range(a_count):
            x[i] = a[int32(lane * a_count + i)]
        for i in range(b_count):
            y[i] = b[int32(lane * b_count + i)]
        for i in range(4):
            sums[i] = c[int32(lane * 4 + i)]
        instruction(sums, 0, x, 0, y, 0)
        for i in range(4):
            out[int32(lane * 4 + i)] = sums[i]

    return kernel


PRODUCTS = {
    "mma_m16n8k16_float16": (np.float16, 16, 2, "HMMA.16816.F32"),
    "mma_m16n8k16_bfloat16": (ml_dtypes.bfloat16, 16, 2, "HMMA.16816.F32.BF16"),
    "mma_m16n8k8_float16": (np.float16, 8, 2, "HMMA.1688.F32"),
    "mma_m16n8k8_tf32": (np.float32, 8, 1, "HMMA.1688.F32.TF32"),
}


def fragments(matrix, packed):
    """The registers of each lane, by the figures of the PTX manual written out as loops."""
    rows, depth = matrix.shape
    found = []
    for lane in range(32):
        group, place = lane // 4, lane % 4
        for column in range(0, depth, 4 * packed):
            for row in range(0, rows, 8):
                at = column + place * packed
                found.append(matrix[row + group, at : at + packed])
    return np.ascontiguousarray(found).view(np.uint32).reshape(-1)


@pytest.mark.parametrize("name", PRODUCTS)
def test_mma_multiplies_matrices(name):
    dtype, depth, packed, _ = PRODUCTS[name]
    random = np.random.default_rng(2)
    a, b = (random.integers(-5, 6, (rows, depth)).astype(dtype) for rows in (16, 8))
    c = random.integers(-5, 6, (16, 8)).astype(np.float32)
    out = np.zeros(128, np.float32)
    kernel = multiplier(INSTRUCTIONS[name], 16 * depth // packed // 32, 8 * depth // packed // 32)
    emulate(kernel, 1, 32, fragments(a, packed), fragments(b, packed), fragments(c, 2).view(np.float32), out)
    want = c + a.astype(np.float32) @ b.astype(np.float32).T
    assert (out == fragments(want, 2).view(np.float32)).all()


# --- machine code ----------------------------------------------------------------------------------------------

U16, U32 = CPointer(uint16), CPointer(uint32)


@pytest.mark.parametrize("architecture", TESTED)
@pytest.mark.parametrize("name", PRODUCTS)
def test_mma_is_one_instruction(name, architecture):
    target = ARCHITECTURES[architecture]
    _, depth, packed, operation = PRODUCTS[name]
    if target.lacks([INSTRUCTIONS[name]]):
        pytest.skip(target.lacks([INSTRUCTIONS[name]]))
    kernel = multiplier(INSTRUCTIONS[name], 16 * depth // packed // 32, 8 * depth // packed // 32)
    made = compile_kernel(kernel, (U32, U32, kernels.F32, kernels.F32), architecture)
    assert (sass(made).count(operation), sass(made).count("HMMA"), made.stack) == (1, 1, 0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_is_one_instruction(count, transposed):
    kernel, _ = loader(INSTRUCTIONS[f"ldmatrix_x{count}{'_trans' if transposed else ''}"], count)
    mix = sass(compile_kernel(kernel, (U16, U32), "sm_75"))
    assert [i.operation for i in mix.instructions if i.opcode == "LDSM"] == [
        f"LDSM.16.M{'T' if transposed else ''}88{f'.{count}' if count > 1 else ''}"
    ]


def vector_copy(load, store):
    def kernel(x, out):
        at = int32(int32(cuda.threadIdx.x) * int32(8))
        store(out, at, load(x, at))

    return kernel


@pytest.mark.parametrize(
    ("width", "element", "operation"),
    [(2, float32, "LDG.E.64"), (4, float32, "LDG.E.128"), (4, uint16, "LDG.E.64"), (8, uint16, "LDG.E.128"),
     (8, float16, "LDG.E.128"), (4, uint32, "LDG.E.128"), (2, uint16, "LDG.E")],
)  # fmt: skip
def test_vectors_are_one_access(width, element, operation):
    kernel = vector_copy(INSTRUCTIONS[f"load{width}"], INSTRUCTIONS[f"store{width}"])
    mix = sass(compile_kernel(kernel, (CPointer(element),) * 2, "sm_80"))
    assert [i.operation for i in mix.instructions if i.opcode in ("LDG", "STG")] == [
        operation, operation.replace("LD", "ST"),
    ]  # fmt: skip


def arithmetic(x, y, out):
    a, b = x[0], y[0]
    out[0] = uint32(ptx.fast_divide(int32(a), b, int32(5)))
    out[1] = uint32(ptx.divide(int32(a), int32(b)))
    out[2] = ptx.tf32(ptx.bits_float(a))
    out[3] = ptx.pack_bfloat16(ptx.bits_float(a), ptx.bits_float(b))
    out[4] = ptx.pack_float16(ptx.bits_float(a), ptx.bits_float(b))
    out[5] = ptx.fma_float16x2(a, b, a)
    out[6] = ptx.float_bits(ptx.bfloat16_float(uint16(a)))
    out[7] = uint32(ptx.float_bfloat16(ptx.bits_float(b)))


@pytest.mark.parametrize("architecture", [a for a in TESTED if a != "sm_75"])
def test_arithmetic_compiles_without_double_precision(architecture):
    made = compile_kernel(arithmetic, (U32, U32, U32), architecture)
    mix = sass(made)
    assert mix.count("HFMA2") >= 1
    assert not [i for i in mix.instructions if i.opcode in ("DADD", "DMUL", "DFMA")]


def copies(x, out):
    tile = cuda.shared.array(128, float32, alignment=16)
    t = int32(cuda.threadIdx.x)
    ptx.copy_async16(tile, int32(t * 4), x, int32(t * 4), int32(16) if t < 8 else int32(0))
    ptx.copy_commit()
    ptx.copy_wait(0)
    cuda.syncthreads()
    out[t] = tile[int32(127 - t)]


def test_copies_fill_with_zeros_what_they_do_not_read():
    x, out = np.arange(1, 33, dtype=np.float32), np.full(128, np.nan, np.float32)
    emulate(copies, 1, 32, x, out[:32])
    assert (out[:32] == np.concatenate([x, np.zeros(96, np.float32)])[::-1][:32]).all()


def test_copies_are_asynchronous_in_machine_code():
    mix = sass(compile_kernel(copies, (kernels.F32, kernels.F32), "sm_80"))
    assert mix.count("LDGSTS.E.BYPASS.128") == 1
    assert mix.count("LDGDEPBAR") == 1
    assert mix.count("DEPBAR") >= 1
