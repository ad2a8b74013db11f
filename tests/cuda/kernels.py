"""Kernels that the tests of the CUDA tools compile and emulate: small ones, with every part that real ones have."""

from numba import cuda
from numba.cuda.types import CPointer, float16, float32, int32, uint32

from fastconv.cuda import ptx

F32, F16, I32 = CPointer(float32), CPointer(float16), int32

BLOCK = 64


def thread_number():
    return int32(int32(cuda.blockIdx.x) * int32(cuda.blockDim.x) + int32(cuda.threadIdx.x))


def add_vectors(x, y, out, n):
    """out = x + y, four elements per thread where there are four."""
    at = int32(thread_number() * int32(4))
    if at + int32(4) <= n:
        a, b = ptx.load4(x, at), ptx.load4(y, at)
        ptx.store4(out, at, (a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]))
    else:
        for i in range(at, n):
            out[i] = x[i] + y[i]


ADD_VECTORS = (F32, F32, F32, I32)


def stencil(width, taps):
    """A row of `width` outputs per block, each the weighted sum of `taps` inputs, through shared memory."""
    extent = width + taps - 1

    def kernel(x, weight, out, n):
        tile = cuda.shared.array(extent, float32)
        row = ptx.pointer_to(tile)
        thread = int32(cuda.threadIdx.x)
        first = int32(int32(cuda.blockIdx.x) * int32(width))
        for at in range(thread, extent, width):
            place = int32(first + at)
            row[at] = x[place] if place < n else float32(0)
        cuda.syncthreads()
        total = float32(0)
        for tap in range(taps):
            total += row[int32(thread + tap)] * weight[tap]
        if first + thread < n - taps + 1:
            out[int32(first + thread)] = total

    kernel.__name__ = f"stencil_{taps}"
    return kernel


STENCIL = (F32, F32, F32, I32)

# Rows and columns of a block's tile, depth of one stage in float16 elements, and bytes of a 128-bit copy in elements.
M, N, K, CHUNK = 64, 64, 32, 8
THREADS, WARP_ROWS, WARP_COLUMNS = 128, 32, 32


def swizzled(row, chunk):
    """Where 16 bytes of a row lie, so that eight rows of one chunk are in eight different banks."""
    return int32(row * int32(K) + ((chunk ^ ((row >> int32(1)) & int32(3))) << int32(3)))


def gemm(stages):
    """c = a @ b.T for float16 matrices (m, k) and (n, k), k a multiple of 8, summed in float32 on tensor cores."""
    size, ahead, in_flight = (M + N) * K, stages - 1, stages - 2

    def fetch(tiles, stage, a, b, m, n, k, depth, thread):
        for j in range(M * K // CHUNK // THREADS):
            number = int32(thread + j * THREADS)
            row, chunk = number >> int32(2), number & int32(3)
            place = int32(stage * int32(size) + swizzled(row, chunk))
            column = int32(depth + chunk * int32(CHUNK))
            m_row, n_row = int32(cuda.blockIdx.x * M + row), int32(cuda.blockIdx.y * N + row)
            ptx.copy_async16(
                tiles, place, a, int32(m_row * k + column), int32(16) if m_row < m and column < k else int32(0)
            )
            ptx.copy_async16(
                tiles,
                int32(place + M * K),
                b,
                int32(n_row * k + column),
                int32(16) if n_row < n and column < k else int32(0),
            )

    def kernel(a, b, c, m, n, k):
        tiles = cuda.shared.array(0, float16, alignment=128)
        thread = int32(cuda.threadIdx.x)
        lane, warp = thread & int32(31), thread >> int32(5)
        top, left = (warp & int32(1)) * int32(WARP_ROWS), (warp >> int32(1)) * int32(WARP_COLUMNS)
        sums = cuda.local.array(32, float32)
        rows = cuda.local.array(8, uint32)
        columns = cuda.local.array(8, uint32)
        for i in range(32):
            sums[i] = float32(0)
        steps = ptx.divide(int32(k + int32(K - 1)), int32(K))
        for stage in range(ahead):
            if stage < steps:
                fetch(tiles, int32(stage), a, b, m, n, k, int32(stage * K), thread)
            ptx.copy_commit()
        read, write = int32(0), int32(ahead)
        for step in range(steps):
            ptx.copy_wait(in_flight)
            cuda.syncthreads()
            if step + int32(ahead) < steps:
                fetch(tiles, write, a, b, m, n, k, int32((step + int32(ahead)) * K), thread)
            ptx.copy_commit()
            base = int32(read * int32(size))
            for half in range(2):
                for i in range(2):
                    row = int32(top + i * 16 + (lane & int32(15)))
                    ptx.ldmatrix_x4(
                        rows, 4 * i, tiles, int32(base + swizzled(row, int32(half * 2 + (lane >> int32(4)))))
                    )
                for j in range(2):
                    row = int32(left + j * 16 + (lane & int32(7)) + ((lane >> int32(4)) << int32(3)))
                    chunk = int32(half * 2 + ((lane >> int32(3)) & int32(1)))
                    ptx.ldmatrix_x4(columns, 4 * j, tiles, int32(base + M * K + swizzled(row, chunk)))
                for i in range(2):
                    for j in range(4):
                        ptx.mma_m16n8k16_float16(sums, 16 * i + 4 * j, rows, 4 * i, columns, 2 * j)
            read = int32(read + int32(1)) if read < int32(ahead) else int32(0)
            write = int32(write + int32(1)) if write < int32(ahead) else int32(0)
        for i in range(2):
            for half in range(2):
                row = int32(cuda.blockIdx.x * M + top + i * 16 + (lane >> int32(2)) + half * 8)
                if row < m:
                    for j in range(4):
                        column = int32(cuda.blockIdx.y * N + left + j * 8 + (lane & int32(3)) * int32(2))
                        if column < n:
                            at = 16 * i + 4 * j + 2 * half
                            ptx.store2(c, int32(row * n + column), (sums[at], sums[at + 1]))

    kernel.__name__ = f"gemm_{stages}"
    return kernel


GEMM = (F16, F16, F32, I32, I32, I32)


def gemm_shared_bytes(stages):
    return stages * (M + N) * K * 2
