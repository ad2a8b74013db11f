"""The emulator: right results, named faults, seeded mistakes caught, accesses counted."""

import inspect
import linecache

import kernels
import numpy as np
import pytest
from numba import cuda
from numba.cuda.types import float32, int32, uint32

import fastconv
from fastconv.cuda import faults, ptx
from fastconv.cuda.emulator import emulate

RANDOM = np.random.default_rng(5)


def whole(*shape, low=-4, high=5):
    """Whole numbers, whose sums and products are exact."""
    return RANDOM.integers(low, high, shape)


# --- kernels that are right ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 128, 131])
def test_vectors_are_added(n):
    x, y = (whole(n).astype(np.float32) for _ in range(2))
    out = np.full(n, np.nan, np.float32)
    emulate(kernels.add_vectors, -(-n // 128), 32, x, y, out, n)
    assert (out == x + y).all()


def test_numbers_keep_their_precision():
    def store(out, number):
        out[0] = number

    out, third = np.zeros(1), np.float64(1) / 3
    emulate(store, 1, 1, out, third)
    assert out[0] == third


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("n", [68, 130])
def test_a_stencil_goes_through_shared_memory(n, seed):
    x, weight = whole(n).astype(np.float32), whole(5).astype(np.float32)
    out = np.full(n - 4, np.nan, np.float32)
    emulate(kernels.stencil(64, 5), -(-(n - 4) // 64), 64, x, weight, out, n, seed=seed)
    assert (out == np.correlate(x, weight, "valid")).all()


def run_gemm(kernel, m, n, k, stages=3, **options):
    a, b = whole(m, k).astype(np.float16), whole(n, k).astype(np.float16)
    c = np.full((m, n), np.nan, np.float32)
    grid = -(-m // kernels.M), -(-n // kernels.N)
    shared = kernels.gemm_shared_bytes(stages)
    report = emulate(kernel, grid, kernels.THREADS, a, b, c, m, n, k, shared_bytes=shared, **options)
    assert (c == a.astype(np.float32) @ b.astype(np.float32).T).all(), "the result is wrong"
    return report


@pytest.mark.parametrize(("m", "n", "k", "stages"), [(64, 64, 96, 3), (70, 18, 40, 2), (5, 66, 8, 4)])
def test_a_product_goes_through_tensor_cores(m, n, k, stages):
    run_gemm(kernels.gemm(stages), m, n, k, stages)


def test_the_order_of_warps_does_not_matter():
    for seed in range(3):
        run_gemm(kernels.gemm(3), 64, 64, 128, seed=seed)


# --- seeded mistakes -------------------------------------------------------------------------------------------

BARRIER = "            ptx.copy_wait(in_flight)\n            cuda.syncthreads()\n"
HALVES = "for half in range(2):\n                for i"
COLUMN = "(lane & int32(3)) * int32(2))\n                        if column"
MISTAKES = {
    "barrier removed": (BARRIER, BARRIER.replace("            cuda.syncthreads()\n", "")),
    "wait removed": (BARRIER, "            cuda.syncthreads()\n"),
    "wait too weak": ("ptx.copy_wait(in_flight)", "ptx.copy_wait(ahead)"),
    "row guard dropped": ("if row < m:", "if True:"),
    "column guard dropped": ("if column < n:", "if True:"),
    "swizzle on one side": ("base + M * K + swizzled(row, chunk)", "base + M * K + row * K + chunk * 8"),
    "no zero fill": ("int32(16) if m_row < m and column < k else int32(0)", "int32(16)"),
    "divergent mma": (HALVES, HALVES.replace("(2)", "(2 if lane < 16 else 1)", 1)),
    "misaligned copy": ("int32(n_row * k + column)", "int32(n_row * k + column + 1)"),
    "stage overwritten too early": ("read, write = int32(0), int32(ahead)", "read, write = int32(0), int32(0)"),
    "race of stores": (COLUMN, COLUMN.replace("(lane & int32(3))", "int32(0)")),
    "sums not cleared": ("        for i in range(32):\n            sums[i] = float32(0)\n", ""),
    "too little shared memory": ("size, ahead, in_flight = (M + N) * K", "size, ahead, in_flight = (M + N) * K * 2"),
}  # fmt: skip


def mistaken(name):
    """The module of kernels, with one mistake."""
    source = inspect.getsource(kernels)
    right, wrong = MISTAKES[name]
    assert right in source, name
    text = source.replace(right, wrong)
    space = {"__name__": "mistaken"}
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    exec(compile(text, name, "exec"), space)
    return space


CAUGHT_AS = {
    "barrier removed": faults.EmulationError,
    "wait removed": faults.UninitialisedError,
    "wait too weak": faults.EmulationError,
    "row guard dropped": faults.OutOfRangeError,
    "column guard dropped": faults.EmulationError,
    "swizzle on one side": AssertionError,
    "no zero fill": faults.OutOfRangeError,
    "divergent mma": faults.DivergenceError,
    "misaligned copy": faults.EmulationError,
    "stage overwritten too early": faults.EmulationError,
    "race of stores": faults.RaceError,
    "sums not cleared": faults.UninitialisedError,
    "too little shared memory": faults.OutOfRangeError,
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_caught(name):
    with pytest.raises(CAUGHT_AS[name]):
        run_gemm(mistaken(name)["gemm"](3), 60, 50, 104)


# --- faults, each in the smallest kernel that has it -----------------------------------------------------------


def negative_index(x, out):
    out[int32(cuda.threadIdx.x)] = x[int32(cuda.threadIdx.x) - int32(1)]


def past_the_end(x, out):
    out[int32(cuda.threadIdx.x) + int32(1)] = x[int32(cuda.threadIdx.x)]


def misaligned(x, out):
    a, b = ptx.load2(x, int32(cuda.threadIdx.x) * int32(2) + int32(1) if cuda.threadIdx.x < 15 else int32(0))
    out[int32(cuda.threadIdx.x)] = a + b


def no_barrier(x, out):
    row = cuda.shared.array(32, float32)
    row[int32(cuda.threadIdx.x)] = x[int32(cuda.threadIdx.x)]
    out[int32(cuda.threadIdx.x)] = row[int32(31 - cuda.threadIdx.x)]


def write_after_read(x, out):
    row = cuda.shared.array(32, float32)
    t = int32(cuda.threadIdx.x)
    row[t] = x[t]
    cuda.syncthreads()
    out[t] = row[int32(31) - t]
    row[t] = x[t] + x[t]


def never_written(x, out):
    row = cuda.shared.array(33, float32)
    t = int32(cuda.threadIdx.x)
    row[t] = x[t]
    cuda.syncthreads()
    out[t] = row[t + int32(1)]


def local_never_written(x, out):
    a = cuda.local.array(2, float32)
    a[0] = x[int32(cuda.threadIdx.x)]
    out[int32(cuda.threadIdx.x)] = a[1]


def barrier_in_a_branch(x, out):
    if cuda.threadIdx.x < 16:
        cuda.syncthreads()
    else:
        cuda.syncthreads()


def barrier_after_return(x, out):
    if cuda.threadIdx.x == 3:
        return
    cuda.syncthreads()


def shuffle_in_a_branch(x, out):
    if cuda.threadIdx.x < 16:
        out[int32(cuda.threadIdx.x)] = cuda.shfl_sync(0xFFFFFFFF, x[0], 0)


def lane_outside_its_mask(x, out):
    cuda.syncwarp(0xFFFF)


def two_writers(x, out):
    out[0] = x[0]


def int32_overflow(x, out):
    out[int32(int32(70000) * int32(70000))] = x[0]


def unaligned_shared(x, out):
    t = int32(cuda.threadIdx.x)
    row = cuda.shared.array(128, float32)
    for i in range(4):
        row[int32(4 * t + i)] = x[t]
    out[t] = ptx.load4(row, int32(4 * t))[0]


def shuffle_from_outside(x, out):
    if cuda.threadIdx.x < 16:
        out[int32(cuda.threadIdx.x)] = cuda.shfl_sync(0xFFFF, x[0], 20)


FAULTS = [
    (
        shuffle_from_outside,
        faults.DivergenceError,
        r"thread \(0, 0, 0\): shfl_sync at test_emulator.py:\d+: .* lane 20",
    ),
    (negative_index, faults.OutOfRangeError, r"thread \(0, 0, 0\), test_emulator.py:\d+: x\[-1\] is outside its 32"),
    (past_the_end, faults.OutOfRangeError, r"block \(0, 0, 0\), thread \(31, 0, 0\).*out\[32\]"),
    (misaligned, faults.MisalignedError, "x.1:3. is no multiple of 8 bytes"),
    (no_barrier, faults.RaceError, "writes shared memory .* reads it .* with no barrier between"),
    (write_after_read, faults.RaceError, "shared memory"),
    (never_written, faults.UninitialisedError, r"thread \(31, 0, 0\).*read before it is written"),
    (local_never_written, faults.UninitialisedError, r"local array \[1\] is read and was never written"),
    (barrier_in_a_branch, faults.DivergenceError, "syncthreads at test_emulator.py"),
    (barrier_after_return, faults.DeadlockError, r"ended, such as thread \(3, 0, 0\)"),
    (shuffle_in_a_branch, faults.DeadlockError, "shfl_sync .* is not reached by all its lanes: has ended"),
    (lane_outside_its_mask, faults.DivergenceError, "leaves out the lane 16"),
    (two_writers, faults.RaceError, "writes global memory"),
    (int32_overflow, faults.PrecisionError, r"int32\(4900000000\) loses bits"),
    (unaligned_shared, faults.MisalignedError, "multiple of 16 bytes"),
]


@pytest.mark.parametrize(("kernel", "error", "message"), FAULTS, ids=lambda v: getattr(v, "__name__", ""))
def test_a_fault_is_named_with_its_place(kernel, error, message):
    with pytest.raises(error, match=message):
        emulate(kernel, 1, 32, np.arange(32, dtype=np.float32), np.zeros(32, np.float32))


def test_blocks_that_write_one_place_are_refused():
    def kernel(x, out):
        if cuda.threadIdx.x == 0:
            out[0] = x[0]

    with pytest.raises(faults.RaceError, match="blocks number 0 and 1"):
        emulate(kernel, 2, 32, np.ones(1, np.float32), np.ones(1, np.float32))


def test_limits_of_the_architecture_hold():
    arguments = np.ones(4, np.float32), np.ones(4, np.float32)
    with pytest.raises(fastconv.UnsupportedError, match=r"copy_.* needs sm_80 or later, not sm_75"):
        run_gemm(kernels.gemm(3), 64, 64, 32, architecture="sm_75")
    with pytest.raises(faults.EmulationError, match="102400 bytes of shared memory; sm_86 has 101376"):
        emulate(two_writers, 1, 1, *arguments, shared_bytes=100 * 1024, architecture="sm_86")
    with pytest.raises(fastconv.ArgumentError, match="architecture must be one of"):
        emulate(two_writers, 1, 1, *arguments, architecture="sm_70")
    with pytest.raises(faults.EmulationError, match="1 to 1024 threads, not 2048"):
        emulate(two_writers, 1, (1024, 2), *arguments)


def test_arguments_are_of_the_types_that_the_kernel_is_compiled_for():
    x, n = np.ones(4, np.float32), np.int32(4)
    emulate(kernels.add_vectors, 1, 32, x, x, np.ones(4, np.float32), n, signature=kernels.ADD_VECTORS)
    with pytest.raises(faults.EmulationError, match=r"add_vectors: y is compiled as float32\* and given as float64"):
        emulate(kernels.add_vectors, 1, 32, x, np.ones(4), x, n, signature=kernels.ADD_VECTORS)
    with pytest.raises(faults.EmulationError, match="n is compiled as int32 and given as int64"):
        emulate(kernels.add_vectors, 1, 32, x, x, x, np.int64(4), signature=kernels.ADD_VECTORS)
    with pytest.raises(faults.EmulationError, match="compiled for 16 threads, not for blocks of 32"):
        emulate(kernels.add_vectors, 1, 32, x, x, x, n, launch_bounds=16)


def test_what_is_not_emulated_says_so():
    def kernel(x):
        cuda.nanosleep(x)

    with pytest.raises(faults.EmulationError, match=r"cuda.nanosleep is not emulated"):
        emulate(kernel, 1, 1, 3)


# --- warps -----------------------------------------------------------------------------------------------------


def test_lanes_exchange_values():
    def kernel(out):
        lane = int32(cuda.laneid)
        full = uint32(0xFFFFFFFF)
        out[lane] = int32(cuda.shfl_xor_sync(full, lane, 1))
        out[int32(32) + lane] = int32(cuda.shfl_down_sync(full, lane, 4))
        out[int32(64) + lane] = int32(cuda.shfl_up_sync(full, lane, 4))
        out[int32(96) + lane] = int32(cuda.shfl_sync(full, lane, 7))
        out[int32(128) + lane] = int32(cuda.ballot_sync(full, lane < 5))
        if lane < 8:
            out[int32(160) + lane] = int32(cuda.shfl_sync(uint32(0xFF), lane, 3))

    out = np.full(192, -1, np.int32)
    emulate(kernel, 1, 32, out)
    lanes = np.arange(32)
    assert (out[:32] == lanes ^ 1).all()
    assert (out[32:64] == np.where(lanes < 28, lanes + 4, lanes)).all()
    assert (out[64:96] == np.where(lanes >= 4, lanes - 4, lanes)).all()
    assert (out[96:128] == 7).all()
    assert (out[128:160] == 31).all()
    assert (out[160:168] == 3).all()


def test_a_warp_may_share_memory_over_syncwarp_alone():
    def kernel(x, out):
        row = cuda.shared.array(64, float32)
        t = int32(cuda.threadIdx.x)
        row[t] = x[t]
        cuda.syncwarp()
        out[t] = row[t ^ int32(1)]

    x, out = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    emulate(kernel, 1, 64, x, out)
    assert (out == x[np.arange(64) ^ 1]).all()


# --- counting --------------------------------------------------------------------------------------------------


def strided(x, out, stride):
    out[int32(cuda.threadIdx.x)] = x[int32(cuda.threadIdx.x) * stride]


@pytest.mark.parametrize(("stride", "sectors"), [(1, 4), (2, 8), (8, 32)])
def test_sectors_of_global_memory_are_counted(stride, sectors):
    report = emulate(strided, 1, 32, np.ones(256, np.float32), np.ones(32, np.float32), stride)
    read, write = report.accesses
    assert (read.requests, read.cost, read.ideal) == (1, sectors, 4)
    assert (write.requests, write.cost, write.write) == (1, 4, True)
    assert f"{sectors}.00" in report.table()


def transposed(columns):
    def kernel(x, out):
        tile = cuda.shared.array((32, columns), float32)
        t, w = int32(cuda.threadIdx.x), int32(cuda.threadIdx.y)
        tile[w, t] = x[int32(w * 32 + t)]
        cuda.syncthreads()
        out[int32(w * 32 + t)] = tile[t, w]

    return kernel


@pytest.mark.parametrize(("columns", "conflicts"), [(32, 31 * 32), (33, 0)])
def test_bank_conflicts_are_counted(columns, conflicts):
    x = np.arange(1024, dtype=np.float32)
    out = np.zeros(1024, np.float32)
    report = emulate(transposed(columns), 1, (32, 32), x, out)
    assert (out.reshape(32, 32) == x.reshape(32, 32).T).all()
    assert report.bank_conflicts == conflicts


def test_the_swizzle_of_the_product_leaves_no_bank_conflict():
    assert run_gemm(kernels.gemm(3), 64, 64, 64).bank_conflicts == 0
