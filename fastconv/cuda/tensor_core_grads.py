"""The weight gradient on tensor cores: products of output gradients and shifted pixels, summed over pixels.

    dw[k, (tap, c)] = sum over pixels of dy[pixel, k] * x[pixel + tap, c]

Rows are filters, columns channels of taps, depth is pixels: tiles are [pixel][line], in chunks of 16 bytes of one
pixel. Transposing loads of 16-bit numbers make fragments of them; of tf32 there is none, and each register is loaded
by itself. Blocks share out the pixels; `add` adds up what they have found, in a fixed order, and computes anew, as
sums of float32 products, what is not finite.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from . import ptx, toolchain
from .elements import Element
from .gemm_kernels import OUTSIDE, inside, split, width
from .indices import decoder
from .sums import chained
from .tensor_core_kernels import Tile, multiply, warp_place
from .tensor_core_units import Units

cuda = toolchain.import_cuda()

from numba.cuda.types import float32, int32, uint32  # noqa: E402


def swizzle(chunks: int, words: bool) -> Any:
    """Return where (in words) a chunk of a pixel lies, so that what a fragment is loaded from lies in all banks once.

    That is one chunk of eight pixels, or where words are loaded by themselves, two chunks of four.
    """
    shift, last = max(3 - int(math.log2(chunks)), 0), min(chunks, 8) - 1

    def place(pixel, chunk):
        turn = (pixel << int32(1)) if words else (pixel >> int32(shift))
        return int32(pixel * int32(4 * chunks) + (chunk ^ (turn & int32(last))) * int32(4))

    return place


def _copy(words, count, planes, at):
    for i in range(count):
        planes[at + i] = words[i]


def loaders(tile: Tile, units: Units) -> tuple[Any, Any]:
    """Return what loads fragments of tiles that are [pixel][line], see `multiply`."""
    planes, of_columns, depth = units.planes, tile.warp[1] // 4, tile.chunks * units.chunk
    row_pitch, column_pitch = (4 * lines // units.chunk for lines in (tile.rows, tile.columns))
    row_plane, column_plane = depth * row_pitch, depth * column_pitch
    put = units.split or _copy

    def load_rows(a, to, tiles, at, step, i):
        at = (at ^ int32(8 * i)) + step * (16 * row_pitch)
        for p in range(planes):
            ptx.ldmatrix_x4_trans(a, to + 4 * p, tiles, at + p * row_plane)

    def load_columns(b, to, tiles, at, step):
        for q in range(planes):
            for j in range(of_columns // 4):
                from_ = (at ^ int32(8 * j)) + (step * 16 * column_pitch + q * column_plane)
                ptx.ldmatrix_x4_trans(b, to + of_columns * q + 4 * j, tiles, from_)

    def load_row_words(a, to, tiles, at, step, i):
        raw = cuda.local.array(4, uint32)
        for h in range(2):
            from_ = (at ^ int32(16 * i + 8 * h)) + step * (8 * row_pitch)
            raw[h], raw[2 + h] = tiles[from_], tiles[from_ + 4 * row_pitch]
        put(raw, 4, a, to)

    def load_column_words(b, to, tiles, at, step):
        raw = cuda.local.array(of_columns, uint32)
        for j in range(of_columns // 2):
            from_ = (at ^ int32(8 * j)) + step * (8 * column_pitch)
            raw[2 * j], raw[2 * j + 1] = tiles[from_], tiles[from_ + 4 * column_pitch]
        put(raw, of_columns, b, to)

    return (load_rows, load_columns) if units.chunk == 8 else (load_row_words, load_column_words)


def lane_places(tile: Tile, units: Units) -> Any:
    """Return the places from which a lane loads, within tiles of rows and of columns."""
    words = units.chunk == 4
    of_rows, of_columns = (swizzle(lines // units.chunk, words) for lines in (tile.rows, tile.columns))

    def places(lane, row, column):
        row_pixel = (lane & int32(7)) + ((lane >> int32(4)) << int32(3))
        rows_at = of_rows(row_pixel, (row >> int32(3)) + ((lane >> int32(3)) & int32(1)))
        return rows_at, of_columns(lane & int32(15), (column >> int32(3)) + (lane >> int32(4)))

    def places_of_words(lane, row, column):
        pixel, line = lane & int32(3), lane >> int32(2)
        rows_at = of_rows(pixel, (row >> int32(2)) + (line >> int32(2))) + (line & int32(3))
        return int32(rows_at), int32(of_columns(pixel, (column >> int32(2)) + (line >> int32(2))) + (line & int32(3)))

    return places_of_words if words else places


def buffer_words(tile: Tile, units: Units) -> tuple[int, int]:
    """Return the words of a buffer's tile of rows, and of the whole buffer."""
    pixels = tile.chunks * units.chunk * units.pixel_planes
    return pixels * 4 * tile.rows // units.chunk, pixels * 4 * (tile.rows + tile.columns) // units.chunk


@lru_cache(maxsize=256)
def correlate(tile: Tile, units: Units, wide: bool) -> Any:
    """Return the kernel of the products: partial is (splits, G, K // G, taps, C // G in whole chunks), or `add` to it.

    The shares begin at the step `skip`.
    Threads are enough to copy eight pixels of a tile at once, or four of words: its swizzle is then the same for all.
    """
    rows, columns, threads, stages, chunk = tile.rows, tile.columns, tile.threads, tile.stages, units.chunk
    depth, planes, words = tile.chunks * chunk, units.pixel_planes, chunk == 4
    row_chunks, column_chunks = rows // chunk, columns // chunk
    rows_at_once, columns_at_once = threads // row_chunks, threads // column_chunks
    row_plane, column_plane = depth * 4 * row_chunks, depth * 4 * column_chunks
    columns_at, size = buffer_words(tile, units)
    ahead, in_flight = stages - 1, stages - 2
    down, across = tile.warp[0] // 16, tile.warp[1] // 8
    sums_of_thread = 4 * down * across
    index, _, entry_at = width(wide)
    row_place, column_place = swizzle(row_chunks, words), swizzle(column_chunks, words)
    warp_of, lanes_of = warp_place(tile), lane_places(tile, units)
    # Of numbers that are split, two steps are as many products as one of bfloat16: half the additions outside.
    product = multiply(tile, units, *loaders(tile, units), 2 if units.split and tile.chunks % 4 == 0 else 1)

    def fetch_rows(tiles, at, grad, first, total, has_filters, grad_at, grad_step, grad_plane, row_pixel):
        for j in range(depth // rows_at_once):
            pixel = index(first + row_pixel + j * rows_at_once)
            start, nbytes = index(grad_at + pixel * grad_step), int32(16) if has_filters and pixel < total else int32(0)
            for p in range(planes):
                ptx.copy_async16(tiles, at + (j * rows_at_once * 4 * row_chunks + p * row_plane), grad, start, nbytes)
                start = index(start + grad_plane)

    def fetch_columns(tiles, at, x, pixels, first, x_plane, column_pixel, offset, d, h, w, D, H, W):
        entry = index((first + column_pixel) * index(4))
        for j in range(depth // columns_at_once):
            pixel_offset, pixel_d, pixel_h, pixel_w = entry_at(pixels, index(entry + 4 * j * columns_at_once))
            valid = inside(pixel_d + d, D) & inside(pixel_h + h, H) & inside(pixel_w + w, W)
            start, nbytes = index(pixel_offset + offset), int32(16) if valid else int32(0)
            for p in range(planes):
                to = at + (j * columns_at_once * 4 * column_chunks + p * column_plane)
                ptx.copy_async16(tiles, to, x, start, nbytes)
                start = index(start + x_plane)

    def kernel(
        x, grad, pixels, partial, total, skip, steps, share, add, groups, filters, filter_chunks, of_grad_chunk,
        grad_step, grad_plane, taps, chunks_of_tap, of_chunk, x_step, x_plane, D, H, W, R, S, d_step, h_step, w_step,
    ):  # fmt: skip
        tiles = ptx.pointer_to(cuda.shared.array(0, uint32, alignment=128))
        thread = int32(cuda.threadIdx.x)
        part, group = split(int32(cuda.blockIdx.z), int32(groups))
        row_pixel, row_chunk = split(thread, row_chunks)
        column_pixel, column_chunk = split(thread, column_chunks)
        rows_to = row_place(row_pixel, row_chunk)
        columns_to = int32(int32(columns_at) + column_place(column_pixel, column_chunk))
        row_chunk = int32(int32(cuda.blockIdx.x) * int32(row_chunks) + row_chunk)
        has_filters = row_chunk < filter_chunks
        grad_at = index((group * filter_chunks + row_chunk) * of_grad_chunk)
        column_chunk = int32(int32(cuda.blockIdx.y) * int32(column_chunks) + column_chunk)
        tap, c = split(column_chunk, int32(chunks_of_tap))
        rest, s = split(tap, int32(S))
        t, r = split(rest, int32(R))
        d, h, w = index(t * d_step), index(r * h_step), index(s * w_step)
        offset = index((group * chunks_of_tap + c) * of_chunk + ((d * H + h) * W + w) * x_step)
        d = d if tap < taps else index(OUTSIDE)
        lane, warp = thread & int32(31), thread >> int32(5)
        row, column = warp_of(warp)
        rows_at, read_columns_at = lanes_of(lane, row, column)
        read_columns_at = int32(int32(columns_at) + read_columns_at)
        sums = cuda.local.array(sums_of_thread, float32)
        for i in range(sums_of_thread):
            sums[i] = float32(0)
        step = index(skip + part * share)
        end = index(min(index(step + share), index(steps)))
        first = index(step * index(depth))
        for stage in range(ahead):
            if step < end:
                fetch_rows(tiles, int32(stage * size) + rows_to, grad, first, total, has_filters, grad_at, grad_step,
                           grad_plane, row_pixel)  # fmt: skip
                fetch_columns(tiles, int32(stage * size) + columns_to, x, pixels, first, x_plane, column_pixel, offset,
                              d, h, w, D, H, W)  # fmt: skip
            ptx.copy_commit()
            step, first = index(step + index(1)), index(first + index(depth))
        read, fill = int32(0), int32(ahead * size)
        while step < end + ahead:
            ptx.copy_wait(in_flight)
            cuda.syncthreads()
            if step < end:
                fetch_rows(tiles, int32(fill + rows_to), grad, first, total, has_filters, grad_at, grad_step,
                           grad_plane, row_pixel)  # fmt: skip
                fetch_columns(tiles, int32(fill + columns_to), x, pixels, first, x_plane, column_pixel, offset, d, h,
                              w, D, H, W)  # fmt: skip
            ptx.copy_commit()
            product(sums, tiles, int32(read + rows_at), int32(read + read_columns_at))
            read = int32(read + int32(size)) if read < int32(ahead * size) else int32(0)
            fill = int32(fill + int32(size)) if fill < int32(ahead * size) else int32(0)
            step, first = index(step + index(1)), index(first + index(depth))
        row = int32(int32(cuda.blockIdx.x) * int32(rows) + row + (lane >> int32(2)))
        column = int32(int32(cuda.blockIdx.y) * int32(columns) + column + (lane & int32(3)) * int32(2))
        real_columns = int32(taps * chunks_of_tap * chunk)
        target = index(index(part * groups + group) * filters * real_columns)
        for i in range(down):
            for half in range(2):
                line = int32(row + (16 * i + 8 * half))
                for j in range(across):
                    if line < filters and column + 8 * j < real_columns:
                        at = (i * across + j) * 4 + 2 * half
                        to = index(target + index(line) * real_columns + column + 8 * j)
                        before = ptx.load2(partial, to) if add > 0 else (float32(0), float32(0))
                        ptx.store2(partial, to, (before[0] + sums[at], before[1] + sums[at + 1]))

    kernel.__name__ = f"tensor_core_weight_gradient_{units.name}_{rows}x{columns}"
    return kernel


@lru_cache(maxsize=256)
def add(element: Element, chunk: int, channels_last: bool, wide: bool) -> Any:
    """Return the kernel that adds up the parts, in order, into (K, C // G, taps): one element a thread."""
    index, divided, _ = width(wide)
    widen, narrow, decode = element.widen, element.narrow, decoder(wide)
    add_up = chained(Element.of(np.dtype(np.float32)), wide)

    def tensor_core_add(
        x, grad, partial, out, elements, splits, filters, inner, taps, chunks_of_tap, pixels, C, D, H, W, K, O, P, Q,
        R, S, d_first, h_first, w_first, d_step, h_step, w_step, d_tap, h_tap, w_tap,
    ):  # fmt: skip
        number = index(index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x))
        if number < elements:
            rest, tap = divided(number, taps)
            k, c = divided(rest, inner)
            columns = index(taps * chunks_of_tap * chunk)
            at = index(k * columns + tap * chunks_of_tap * chunk + c)
            value = add_up(partial, at, index(K * columns), splits)
            lost = float32(value - value)
            if lost != lost:
                value = float32(0)
                rest, s = divided(tap, S)
                t, r = divided(rest, R)
                channel = index(divided(k, filters)[0] * inner + c)
                plane, target_plane = index(index(D) * H * W), index(index(O) * P * Q)
                for pixel in range(pixels):
                    n, o, p, q = decode(index(pixel), O, P, Q)
                    d = index(d_first + o * d_step + t * d_tap)
                    h = index(h_first + p * h_step + r * h_tap)
                    w = index(w_first + q * w_step + s * w_tap)
                    if inside(d, D) and inside(h, H) and inside(w, W):
                        place, target = index((d * H + h) * W + w), index((o * P + p) * Q + q)
                        if channels_last:
                            source, to = (n * plane + place) * C + channel, (n * target_plane + target) * K + k
                        else:
                            source, to = (n * C + channel) * plane + place, (n * K + k) * target_plane + target
                        value += widen(x[index(source)]) * widen(grad[index(to)])
            out[number] = narrow(value)

    return tensor_core_add
