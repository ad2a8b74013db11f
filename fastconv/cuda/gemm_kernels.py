"""The kernels of implicit GEMM on floating-point units: products of tiles, gathered while they are computed.

A block multiplies a tile of `rows` by `columns`, `depth` products at a time: asynchronous copies fill one buffer of
shared memory while the other is multiplied. Each thread has its sums in registers, and reads four rows or columns, or
four products of a row, as 128 bits (after CUTLASS, "efficient GEMM in CUDA"; the gathering: Chetlur et al. 2014).

    channels last     rows: pixels    columns: filters   a tile of pixels is [row][depth], of the weight [depth][column]
    channels first    rows: filters   columns: pixels    a tile of the weight is [row][depth], of pixels [depth][column]

Which element of the source is read is the sum of two table entries, (offset, d, h, w) of the pixel and of the tap and
channel: it exists where the summed coordinates lie inside the image, and counts as zero elsewhere: a copy of no bytes,
from an address that nobody reads. What follows in memory is copied along: 4 channels of a pixel, or nothing. Nothing
here has run on a GPU.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ..geometry import ConvGeometry
from . import ptx, toolchain
from .elements import Element
from .epilogue import activate
from .indices import constant_division, decoder, divided, index_type, launch
from .steps import Step
from .sums import chained

cuda = toolchain.import_cuda()

from numba.cuda.types import CPointer, float32, int32, uint32  # noqa: E402

# A coordinate that no tap brings back into an image.
OUTSIDE = -(1 << 30)
# Entries that are loaded before what they are for is copied: between a load from shared memory and a copy to it
# ptxas puts three instructions for sm_90.
GROUP = 8


class Tile(NamedTuple):
    """Sizes of a block's product, how its threads lie over it, buffers in flight, and blocks on a multiprocessor.

    `threads_down` is a multiple of 4, `threads_across` of 8, each thread has 4 columns or a multiple; with channels
    first the threads are a multiple of the columns.
    """

    rows: int
    columns: int
    depth: int
    threads_down: int
    threads_across: int
    stages: int = 2
    blocks: int = 2

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.threads_down * self.threads_across

    @property
    def spread(self) -> Tile:
        """The tile with 8x8 sums per thread: more threads, which hide each other's copies."""
        return self._replace(threads_down=self.rows // 8, threads_across=self.columns // 8)


# 8x16 sums per thread read a quarter less from shared memory than 8x8: two blocks of 255 registers on a multiprocessor.
TILE = Tile(128, 128, 16, 16, 8)
# For few filters, or where single elements are gathered, whose addresses need registers too: 64 filters.
NARROW = {True: Tile(256, 64, 16, 16, 8), False: Tile(64, 128, 16, 8, 16, blocks=3)}


# --- helpers of all kernels ------------------------------------------------------------------------------------

split = divided(False)


def inside(place, extent):
    """Whether 0 <= place < extent, in one comparison."""
    return uint32(place) < uint32(extent)


def load_entry(table, at):
    """Return four numbers of a table."""
    return ptx.load4(table, at)


def _wide_load_entry(table, at):
    a, b = ptx.load2(table, at), ptx.load2(table, at + 2)
    return a[0], a[1], b[0], b[1]


def copy16(target, at, source, start, size):
    """What `ptx.copy_async16` does, at once."""
    if size > int32(0):
        ptx.store4(target, at, ptx.load4(source, start))
    else:
        ptx.store4(target, at, (float32(0), float32(0), float32(0), float32(0)))


def copy4(target, at, source, start, size):
    """What `ptx.copy_async4` does, at once."""
    target[at] = source[start] if size > int32(0) else float32(0)


def _nothing():
    pass


def _no_wait(groups):
    pass


def copies(asynchronous: bool) -> tuple[Any, ...]:
    """Return how to copy 16 and 4 bytes, to close a group of copies, and to wait for all but the newest."""
    if asynchronous:
        return ptx.copy_async16, ptx.copy_async4, ptx.copy_commit, ptx.copy_wait
    return copy16, copy4, _nothing, _no_wait


def width(wide: bool) -> tuple[Any, Any, Any]:
    """Return the type of indices, the division and the loading of entries that go with it."""
    return index_type(wide), divided(wide), _wide_load_entry if wide else load_entry


def gathered(
    copy: Any, nbytes: int, entries: int, each: int, apart: int, entries_apart: int, wide: bool, flat: bool
) -> Any:
    """Return the function that copies from places that are sums of an entry of a table and of one that all share.

    Each entry is for `each` copies, `step` elements from one to the next; all copies are `apart` in the tile, entries
    `entries_apart` in the table. With `flat` an image is a plane: d is 0 everywhere.
    """
    index, entry_at, group = index_type(wide), width(wide)[2], math.gcd(entries, GROUP)
    loaded_size = 4 * group

    def copy_all(tiles, to, source, step, table, at, offset, d, h, w, D, H, W):
        loaded = cuda.local.array(loaded_size, index)
        for turn in range(entries // group):
            for i in range(group):
                entry = entry_at(table, at + (turn * group + i) * entries_apart)
                loaded[4 * i], loaded[4 * i + 1], loaded[4 * i + 2], loaded[4 * i + 3] = entry
            for i in range(group):
                valid = inside(loaded[4 * i + 2] + h, H) & inside(loaded[4 * i + 3] + w, W)
                if not flat:
                    valid &= inside(loaded[4 * i + 1] + d, D)
                start, size = index(loaded[4 * i] + offset), int32(nbytes) if valid else int32(0)
                for j in range(each):
                    copy(tiles, to + ((turn * group + i) * each + j) * apart, source, start + j * step, size)

    return copy_all


def on_tiles(made: Step, tile: Any, words: int) -> Step:
    """Return a step with the shared memory of a tile's buffers, of so many words each."""
    return made._replace(shared_bytes=4 * tile.stages * words, launch_bounds=(tile.threads, tile.blocks))


def pixel_tables(pixels_of_tile: int, threads: int, source_last: bool, target_last: bool, wide: bool) -> Any:
    """Return the function that tabulates the pixels of a block's tile, in shared memory.

    `pixels` is (offset, d, h, w) of each one's place in the source, `targets` its place in the target, or -1 where
    there is no such pixel. C and K are the elements of a pixel of all groups, inner and lines of one.
    """
    index, decode = index_type(wide), decoder(wide)

    def tabulate(
        pixels, targets, total, lines, inner, C, D, H, W, K, OD, OH, OW, O, P, Q, d_first, h_first, w_first,
        d_step, h_step, w_step, od_first, oh_first, ow_first, od_step, oh_step, ow_step,
    ):  # fmt: skip
        group, first = int32(cuda.blockIdx.z), index(index(cuda.blockIdx.x) * index(pixels_of_tile))
        plane, target_plane = index(index(D) * H * W), index(index(OD) * OH * OW)
        for at in range(int32(cuda.threadIdx.x), pixels_of_tile, threads):
            number = index(first + at)
            n, o, p, q = decode(number, O, P, Q)
            d, h, w = index(d_first + o * d_step), index(h_first + p * h_step), index(w_first + q * w_step)
            od, oh, ow = od_first + o * od_step, oh_first + p * oh_step, ow_first + q * ow_step
            place, target = index((d * H + h) * W + w), index((index(od) * OH + oh) * OW + ow)
            if source_last:
                place = index((n * plane + place) * C + group * inner)
            else:
                place = index((n * C + group * inner) * plane + place)
            if target_last:
                target = index((n * target_plane + target) * K + group * lines)
            else:
                target = index((n * K + group * lines) * target_plane + target)
            exists = number < total
            entry = int32(int32(at) * int32(4))
            pixels[entry], pixels[int32(entry + 1)] = place, d
            pixels[int32(entry + 2)], pixels[int32(entry + 3)] = h if exists else index(OUTSIDE), w
            targets[int32(at)] = target if exists else index(-1)

    return tabulate


def swizzle(depth: int) -> Any:
    """Return where four products of a row lie: threads that meet four rows, or two whole ones, meet all banks once.

    It repeats after four rows, so that a thread's further rows are a constant away.
    """
    last = depth // 4 - 1

    def place(row, chunk):
        return int32(row * int32(depth) + (chunk ^ (row & int32(3 & last))) * int32(4))

    return place


def thread_places(tile: Tile) -> Any:
    """Return which rows and columns a thread has: a warp covers 4 of them down and 8 across."""
    warps_across = tile.threads_across // 8

    def places(thread):
        lane, warp = thread & int32(31), thread >> int32(5)
        down, across = split(warp, warps_across)
        return int32(down * int32(4) + (lane >> int32(3))), int32(across * int32(8) + (lane & int32(7)))

    return places


def multiply(tile: Tile, rows_first: bool, pad: int) -> Any:
    """Return the product of two tiles in shared memory, added to sums in registers.

    The rows' tile is [row][depth], swizzled, or with `rows_first` False [depth][rows + pad]; the columns' is
    [depth][columns + pad].
    """
    depth, threads_down, threads_across = tile.depth, tile.threads_down, tile.threads_across
    down, across = tile.rows // threads_down, tile.columns // threads_across
    chunk_of_rows = 4 * down
    row_pitch, column_pitch = tile.rows + pad, tile.columns + pad

    def load_columns(b, tiles, at):
        for j in range(across // 4):
            four = ptx.load4(tiles, at + 4 * j * threads_across)
            for e in range(4):
                b[4 * j + e] = four[e]

    def swizzled(sums, tiles, rows_at, columns_at):
        a = cuda.local.array(chunk_of_rows, float32)
        b = cuda.local.array(across, float32)
        for chunk in range(depth // 4):
            # The swizzle of `place`: chunk 0 of the row lies at rows_at.
            chunk_at = rows_at ^ int32(4 * chunk)
            for i in range(down):
                # A sum that is not cast back to 32 bits: the constant becomes part of the instruction.
                four = ptx.load4(tiles, chunk_at + i * threads_down * depth)
                for e in range(4):
                    a[4 * i + e] = four[e]
            for k in range(4):
                load_columns(b, tiles, columns_at + (4 * chunk + k) * column_pitch)
                for i in range(down):
                    for j in range(across):
                        sums[i * across + j] += a[4 * i + k] * b[j]

    def straight(sums, tiles, rows_at, columns_at):
        a = cuda.local.array(down, float32)
        b = cuda.local.array(across, float32)
        for k in range(depth):
            for i in range(down // 4):
                four = ptx.load4(tiles, rows_at + (k * row_pitch + 4 * i * threads_down))
                for e in range(4):
                    a[4 * i + e] = four[e]
            load_columns(b, tiles, columns_at + k * column_pitch)
            for i in range(down):
                for j in range(across):
                    sums[i * across + j] += a[i] * b[j]

    return swizzled if rows_first else straight


# --- the weight and the table of taps --------------------------------------------------------------------------


@lru_cache(maxsize=256)
def prepare(tile: Tile, channels_last: bool, wide: bool) -> Any:
    """Return the kernel that puts a phase's weight in the order tiles read it, and tabulates its taps and channels.

    packed is (G, lines / tile, depth / tile, tile of depth, tile of lines) with channels last, the last two exchanged
    with channels first: what a block copies at a time is contiguous. It is zero beyond what there is. taps is
    (depth / run, 4), one entry for `run` products that follow each other.
    """
    index, divided, _ = width(wide)
    tile_lines, tile_depth = (tile.columns if channels_last else tile.rows), tile.depth
    tile_size = tile_lines * tile_depth

    def prepare_taps(
        weight, packed, taps, packed_first, taps_first, elements, entries, k_tiles, real_depth, run, inner,
        line_tiles, real_lines, line_step, inner_step, group_step, R_taps, S_taps, R, S, t_first, r_first, s_first,
        t_step, r_step, s_step, d_step, h_step, w_step, channel_stride, H, W, pixel_stride,
    ):  # fmt: skip
        number = index(index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x))
        is_entry = number >= elements
        k = line = group = index(0)
        if is_entry:
            k = index((number - elements) * index(run))
        else:
            rest, at = divided(number, tile_size)
            rest, k_tile = divided(rest, k_tiles)
            group, line_tile = divided(rest, line_tiles)
            k, line = divided(at, tile_lines)
            if not channels_last:
                line, k = divided(at, tile_depth)
            k, line = index(k + k_tile * tile_depth), index(line + line_tile * tile_lines)
        tap, c = divided(k, inner)
        rest, s = divided(tap, S_taps)
        t, r = divided(rest, R_taps)
        if not is_entry:
            value = float32(0)
            if k < real_depth and line < real_lines:
                at = ((t_first + t * t_step) * R + r_first + r * r_step) * S + s_first + s * s_step
                value = weight[index(index(group) * group_step + line * line_step + c * inner_step + at)]
            packed[index(packed_first + number)] = value
        elif number < elements + entries:
            d, h, w = index(t * d_step), index(r * h_step), index(s * w_step)
            at = index(taps_first + (number - elements) * index(4))
            taps[at] = index(c * channel_stride + ((d * H + h) * W + w) * pixel_stride)
            taps[index(at + 1)] = d
            taps[index(at + 2)] = h if k < real_depth else index(OUTSIDE)
            taps[index(at + 3)] = w

    prepare_taps.__name__ = f"prepare_taps_{'nhwc' if channels_last else 'nchw'}_{64 if wide else 32}"
    return prepare_taps


# --- forward and input gradient --------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def gather(
    tile: Tile, channels_last: bool, run: int, vector_out: bool, asynchronous: bool, wide: bool, flat: bool,
    adds: bool, bias_: bool, code: int,
) -> Any:  # fmt: skip
    """Return the kernel of one phase, or of one chain of its products.

    Parameters
    ----------
    run : int
        Products that one entry of the taps' table stands for: with channels last 4 or 1, copied together; with channels
        first the tile's depth, all of one tap, or 1.
    vector_out : bool
        Whether four columns of the result are neighbours at a multiple of 16 bytes.
    asynchronous, wide, flat : bool
        Whether there is cp.async; whether indices have 64 bits; whether images are planes.
    adds : bool
        Whether to add to what an earlier chain has written.
    bias_, code : bool and int
        Bias and activation.
    """
    rows, columns, depth, threads, stages = tile.rows, tile.columns, tile.depth, tile.threads, tile.stages
    threads_down, threads_across = tile.threads_down, tile.threads_across
    down, across = rows // threads_down, columns // threads_across
    pixels_of_tile, lines_of_tile = (rows, columns) if channels_last else (columns, rows)
    rows_size = rows * depth
    size = rows_size + columns * depth
    entries_of_tile = depth // run
    sums_of_thread, table_size = down * across, 4 * pixels_of_tile
    ahead, in_flight = stages - 1, stages - 2
    index, divided, entry_at = width(wide)
    block_copy, word_copy, commit, wait = copies(asynchronous)
    copy, nbytes = (block_copy, 16) if channels_last and run == 4 else (word_copy, 4)
    place, places_of, product = swizzle(depth), thread_places(tile), multiply(tile, True, 0)
    tabulate = pixel_tables(pixels_of_tile, threads, channels_last, channels_last, wide)
    is_vector = channels_last and run == 4
    chunks = depth // 4
    if channels_last:
        apart = threads // entries_of_tile
        copy_pixels = gathered(copy, nbytes, rows // apart, 1, apart * depth, 4 * apart, wide, flat)
    else:
        apart = threads // columns
        each = depth // apart if run > 1 else 1
        copy_pixels = gathered(copy, nbytes, depth // apart // each, each, threads, 4 * apart, wide, flat)

    # Where a thread copies: (to and from the pixels, their table, the taps' entry, to and from the weight).

    def first_last(thread, plane):
        row, chunk = split(thread, entries_of_tile)
        k, four = split(thread, columns // 4)
        to = place(row, chunk) if is_vector else int32(place(row, chunk >> int32(2)) + (chunk & int32(3)))
        weight_to = int32(int32(rows_size) + k * int32(columns) + four * int32(4))
        return (to, int32(row * int32(4)), int32(chunk * int32(4)), index(0), index(0), weight_to,
                int32(k * int32(columns) + four * int32(4)))  # fmt: skip

    def fetch_last(tiles, at, x, packed, taps, pixels, entry, weight, to, table, x_first, x_step, weight_to, D, H, W):
        offset, d, h, w = entry_at(taps, entry)
        to, weight_to = int32(at + to), int32(at + weight_to)
        copy_pixels(tiles, to, x, x_step, pixels, table, offset, d, h, w, D, H, W)
        for j in range(depth * columns // 4 // threads):
            further = j * (threads * 4 // columns)
            block_copy(tiles, weight_to + further * columns, packed, weight + further * columns, int32(16))

    def first_first(thread, plane):
        k, column = split(thread, columns)
        row, chunk = split(thread, chunks)
        to = int32(int32(rows_size) + k * int32(columns) + column)
        entry, x_first = (int32(0), index(k * plane)) if run > 1 else (int32(k * int32(4)), index(0))
        weight = int32(row * int32(depth) + chunk * int32(4))
        return (to, int32(column * int32(4)), entry, x_first, index(plane * index(threads // columns)),
                place(row, chunk), weight)  # fmt: skip

    def fetch_first(tiles, at, x, packed, taps, pixels, entry, weight, to, table, x_first, x_step, weight_to, D, H, W):
        pixel_offset, pixel_d, pixel_h, pixel_w = entry_at(pixels, table)
        to, weight_to = int32(at + to), int32(at + weight_to)
        offset = index(pixel_offset + x_first)
        copy_pixels(tiles, to, x, x_step, taps, entry, offset, pixel_d, pixel_h, pixel_w, D, H, W)
        for j in range(rows * chunks // threads):
            further = j * (threads // chunks)
            block_copy(tiles, weight_to + further * depth, packed, weight + further * depth, int32(16))

    first, fetch = (first_last, fetch_last) if channels_last else (first_first, fetch_first)

    def bias_of(bias, first, line, real_lines):
        return bias[int32(first + line)] if bias_ and line < real_lines else float32(0)

    def earlier(out, at, exists):
        return out[index(at)] if adds and exists else float32(0)

    def write_last(out, bias, sums, targets, first_line, first_bias, real_lines, target_plane, row, column):
        for i in range(down):
            target = targets[int32(row + int32(i * threads_down))]
            if target >= 0:
                for j in range(across // 4):
                    line = int32(first_line + (column + int32(j * threads_across)) * int32(4))
                    four = cuda.local.array(4, float32)
                    for e in range(4):
                        shift = bias_of(bias, first_bias, int32(line + e), real_lines)
                        before = earlier(out, target + line + e, line + e < real_lines)
                        four[e] = activate(before + sums[i * across + 4 * j + e] + shift, code)
                    if vector_out:
                        if line < real_lines:
                            ptx.store4(out, index(target + line), (four[0], four[1], four[2], four[3]))
                    else:
                        for e in range(4):
                            if line + e < real_lines:
                                out[index(target + line + e)] = four[e]

    def write_first(out, bias, sums, targets, first_line, first_bias, real_lines, target_plane, row, column):
        for i in range(down):
            line = int32(first_line + row + int32(i * threads_down))
            if line < real_lines:
                shift = bias_of(bias, first_bias, line, real_lines)
                for j in range(across // 4):
                    pixel = int32((column + int32(j * threads_across)) * int32(4))
                    four = cuda.local.array(4, float32)
                    for e in range(4):
                        target = targets[int32(pixel + e)]
                        before = earlier(out, target + line * target_plane, target >= 0)
                        four[e] = activate(before + sums[i * across + 4 * j + e] + shift, code)
                    if vector_out:
                        target = targets[pixel]
                        if target >= 0:
                            to = index(target + line * target_plane)
                            ptx.store4(out, to, (four[0], four[1], four[2], four[3]))
                    else:
                        for e in range(4):
                            target = targets[int32(pixel + e)]
                            if target >= 0:
                                out[index(target + line * target_plane)] = four[e]

    write = write_last if channels_last else write_first

    def kernel(
        x, packed, taps, bias, out, total, packed_first, taps_first, steps, all_steps, real_lines, inner,
        C, D, H, W, K, OD, OH, OW, O, P, Q, d_first, h_first, w_first, d_step, h_step, w_step,
        od_first, oh_first, ow_first, od_step, oh_step, ow_step,
    ):  # fmt: skip
        tiles = ptx.pointer_to(cuda.shared.array(0, float32, alignment=128))
        pixels = ptx.pointer_to(cuda.shared.array(table_size, index, alignment=16))
        targets = ptx.pointer_to(cuda.shared.array(pixels_of_tile, index, alignment=16))
        thread, group = int32(cuda.threadIdx.x), int32(cuda.blockIdx.z)
        plane, target_plane = index(index(D) * H * W), index(index(OD) * OH * OW)
        first_line = int32(int32(cuda.blockIdx.y) * int32(lines_of_tile))
        tabulate(pixels, targets, total, real_lines, inner, C, D, H, W, K, OD, OH, OW, O, P, Q, d_first, h_first,
                 w_first, d_step, h_step, w_step, od_first, oh_first, ow_first, od_step, oh_step, ow_step)  # fmt: skip
        cuda.syncthreads()
        row, column = places_of(thread)
        rows_at, columns_at = place(row, int32(0)), int32(int32(rows_size) + column * int32(4))
        sums = cuda.local.array(sums_of_thread, float32)
        for i in range(sums_of_thread):
            sums[i] = float32(0)
        to, table, entry, x_first, x_step, weight_to, weight = first(thread, plane)
        entry = index(taps_first + entry)
        weight_tile = index(index(group) * index(cuda.gridDim.y) + index(cuda.blockIdx.y))
        weight = index(packed_first + weight_tile * all_steps * index(lines_of_tile * depth) + weight)
        for stage in range(ahead):
            if stage < steps:
                fetch(tiles, int32(stage * size), x, packed, taps, pixels, entry, weight, to, table, x_first, x_step,
                      weight_to, D, H, W)  # fmt: skip
            entry, weight = index(entry + int32(4 * entries_of_tile)), index(weight + int32(lines_of_tile * depth))
            commit()
        read, fill, step = int32(0), int32(ahead * size), int32(ahead)
        while step < steps + ahead:
            wait(in_flight)
            cuda.syncthreads()
            if step < steps:
                fetch(tiles, fill, x, packed, taps, pixels, entry, weight, to, table, x_first, x_step, weight_to,
                      D, H, W)  # fmt: skip
            entry, weight = index(entry + int32(4 * entries_of_tile)), index(weight + int32(lines_of_tile * depth))
            commit()
            product(sums, tiles, int32(read + rows_at), int32(read + columns_at))
            if stages == 2:
                read = int32(int32(size) - read)
                fill = int32(int32(size) - read)
            else:
                read = int32(read + int32(size)) if read < int32(ahead * size) else int32(0)
                fill = int32(fill + int32(size)) if fill < int32(ahead * size) else int32(0)
            step = int32(step + int32(1))
        first_bias = int32(group * real_lines)
        write(out, bias, sums, targets, first_line, first_bias, real_lines, target_plane, row, column)

    kernel.__name__ = f"gather_{'nhwc' if channels_last else 'nchw'}_{rows}x{columns}x{depth}_{run}"
    return kernel


# --- weight gradient -------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def tabulate_pixels(channels_last: bool, wide: bool) -> Any:
    """Return the kernel that writes (offset, d, h, w) of each output pixel's place in x, outside beyond the last."""
    index, decode = index_type(wide), decoder(wide)

    def pixels_of_output(
        pixels, entries, total, C, D, H, W, O, P, Q, d_first, h_first, w_first, d_step, h_step, w_step
    ):  # fmt: skip
        number = index(index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x))
        if number < entries:
            n, o, p, q = decode(number, O, P, Q)
            d, h, w = index(d_first + o * d_step), index(h_first + p * h_step), index(w_first + q * w_step)
            place, plane = (d * H + h) * W + w, index(D) * H * W
            at = index(number * index(4))
            pixels[at] = index((n * plane + place) * C if channels_last else n * plane * C + place)
            pixels[index(at + 1)] = d
            pixels[index(at + 2)] = h if number < total else index(OUTSIDE)
            pixels[index(at + 3)] = w

    pixels_of_output.__name__ = f"pixels_of_output_{'nhwc' if channels_last else 'nchw'}_{64 if wide else 32}"
    return pixels_of_output


def pixels_step(g: ConvGeometry, of_pixel: int, entries: int, channels_last: bool, wide: bool) -> Step:
    """Return the launch that tabulates pixels, `of_pixel` elements of x from one to the next."""
    sizes = (of_pixel, *g.input_size, *g.output_size, *(-before for before, _ in g.padding), *g.stride)
    numbers = (entries, g.batch * math.prod(g.output_size), *map(np.int32, sizes))
    arrays = [("pixels", CPointer(index_type(wide)))]
    return launch(tabulate_pixels(channels_last, wide), arrays, numbers, wide, entries)


# Elements between the rows of a tile that is written down its columns: eight of them meet eight groups of banks.
PAD = 4


@lru_cache(maxsize=256)
def weight_gradient(
    tile: Tile, channels_last: bool, grad_run: int, channel_run: int, asynchronous: bool, wide: bool, flat: bool,
    adds: bool,
) -> Any:  # fmt: skip
    """Return the kernel that multiplies output gradients with pixels of x: rows are filters, columns (tap, channel).

    partial is (splits, K, taps * C // groups): what each share of the pixels adds. With channels last both tiles are
    [pixel][line], and `grad_run` and `channel_run` lines, 4 or 1, are copied together. With channels first that of the
    gradients is [line][pixel], `grad_run` pixels are copied together, and `channel_run` columns, or 1, have a tap in
    common. The shares begin at the step `skip`; with `adds` they are added to those of an earlier launch.
    """
    rows, columns, depth, threads, stages = tile.rows, tile.columns, tile.depth, tile.threads, tile.stages
    threads_down, threads_across = tile.threads_down, tile.threads_across
    down, across = rows // threads_down, columns // threads_across
    sums_of_thread, table_size = down * across, 4 * columns
    row_pitch, column_pitch = rows + PAD, columns + PAD
    columns_at, size = row_pitch * depth, (row_pitch + column_pitch) * depth
    ahead, in_flight = stages - 1, stages - 2
    index, by_plane, entry_at = index_type(wide), constant_division(wide), width(wide)[2]
    block_copy, word_copy, commit, wait = copies(asynchronous)
    copy_grad, grad_bytes = (block_copy, 16) if grad_run == 4 else (word_copy, 4)
    copy_x, x_bytes = (block_copy, 16) if channels_last and channel_run == 4 else (word_copy, 4)
    places_of, product, place_of = thread_places(tile), multiply(tile, not channels_last, PAD), swizzle(depth)
    row_runs, column_runs, depth_runs = rows // grad_run, columns // channel_run, depth // grad_run
    if channels_last:
        apart = threads // column_runs
        copy_pixels = gathered(copy_x, x_bytes, depth // apart, 1, apart * column_pitch, 4 * apart, wide, flat)
    else:
        apart = threads // depth
        each = max(channel_run // apart, 1)
        copy_pixels = gathered(copy_x, x_bytes, columns // apart // each, each, apart, 4 * apart * each, wide, flat)

    def fetch_last(tiles, at, x, grad, pixels, table, first, total, first_k, real_rows, K, planes, D, H, W, thread):
        k, run = split(thread, row_runs)
        line = int32(run * int32(grad_run))
        for j in range(depth * row_runs // threads):
            place = int32(k + int32(j * (threads // row_runs)))
            pixel = index(first + place)
            valid = (pixel < total) & (line < real_rows)
            start = index(pixel * K + first_k + line)
            copy_grad(
                tiles,
                int32(at + place * int32(row_pitch) + line),
                grad,
                start,
                int32(grad_bytes) if valid else int32(0),
            )
        k, run = split(thread, column_runs)
        line = int32(run * int32(channel_run))
        offset, d, h, w = entry_at(table, int32(line * int32(4)))
        to = int32(at + int32(columns_at) + k * int32(column_pitch) + line)
        copy_pixels(tiles, to, x, index(0), pixels, index((first + k) * index(4)), offset, d, h, w, D, H, W)

    def fetch_first(tiles, at, x, grad, pixels, table, first, total, first_k, real_rows, K, planes, D, H, W, thread):
        plane, multiplier, shift, x_plane = planes
        line, place = split(thread, depth)
        pixel_offset, pixel_d, pixel_h, pixel_w = entry_at(pixels, index((first + place) * index(4)))
        to, entry = int32(at + int32(columns_at) + place * int32(column_pitch) + line), int32(line * int32(4))
        copy_pixels(tiles, to, x, index(x_plane * apart), table, entry, pixel_offset, pixel_d, pixel_h, pixel_w, D, H,
                    W)  # fmt: skip
        line, run = split(thread, depth_runs)
        pixel = index(first + run * int32(grad_run))
        n, rest = by_plane(pixel, plane, multiplier, shift)
        start, left = index((index(n * K) + first_k + line) * plane + rest), int32(real_rows - line)
        to = place_of(line, run) if grad_run == 4 else int32(place_of(line, run >> int32(2)) + (run & int32(3)))
        to = int32(at + to)
        for j in range(rows * depth_runs // threads):
            further = j * (threads // depth_runs)
            valid = (pixel < total) & (int32(further) < left)
            copy_grad(tiles, to + further * depth, grad, start + further * plane,
                      int32(grad_bytes) if valid else int32(0))  # fmt: skip

    fetch = fetch_last if channels_last else fetch_first

    def kernel(
        x, grad, pixels, partial, total, skip, steps, share, groups, filters, K, inner, real_columns, C, D, H, W, plane,
        multiplier, shift, x_plane, R, S, d_step, h_step, w_step,
    ):  # fmt: skip
        tiles = ptx.pointer_to(cuda.shared.array(0, float32, alignment=128))
        table = ptx.pointer_to(cuda.shared.array(table_size, index, alignment=16))
        thread = int32(cuda.threadIdx.x)
        part, group = split(int32(cuda.blockIdx.z), groups)
        first_row = int32(int32(cuda.blockIdx.x) * int32(rows))
        first_column = int32(int32(cuda.blockIdx.y) * int32(columns))
        for at in range(thread, columns, threads):
            tap, c = split(int32(first_column + at), inner)
            rest, s = split(tap, S)
            t, r = split(rest, R)
            d, h, w = index(t * d_step), index(r * h_step), index(s * w_step)
            place, channel = index((d * H + h) * W + w), index(group * inner + c)
            entry = int32(int32(at) * int32(4))
            table[entry] = index(place * C + channel if channels_last else channel * x_plane + place)
            table[int32(entry + 1)] = d
            table[int32(entry + 2)] = h if first_column + at < real_columns else index(OUTSIDE)
            table[int32(entry + 3)] = w
        cuda.syncthreads()
        row, column = places_of(thread)
        rows_at = int32(row * int32(4)) if channels_last else place_of(row, int32(0))
        sums = cuda.local.array(sums_of_thread, float32)
        for i in range(sums_of_thread):
            sums[i] = float32(0)
        planes = plane, multiplier, shift, x_plane
        first_k, real_rows = int32(group * filters + first_row), int32(filters - first_row)
        begin = int32(skip + part * share)
        end = int32(min(int32(begin + share), steps))
        first = index(index(begin) * index(depth))
        for stage in range(ahead):
            if begin + stage < end:
                fetch(tiles, int32(stage * size), x, grad, pixels, table, first, total, first_k, real_rows, K, planes,
                      D, H, W, thread)  # fmt: skip
            first = index(first + int32(depth))
            commit()
        read, fill, step = int32(0), int32(ahead * size), int32(begin + int32(ahead))
        while step < end + ahead:
            wait(in_flight)
            cuda.syncthreads()
            if step < end:
                fetch(tiles, fill, x, grad, pixels, table, first, total, first_k, real_rows, K, planes, D, H, W, thread)
            first = index(first + int32(depth))
            commit()
            product(sums, tiles, int32(read + rows_at), int32(read + int32(columns_at) + column * int32(4)))
            if stages == 2:
                read = int32(int32(size) - read)
                fill = int32(int32(size) - read)
            else:
                read = int32(read + int32(size)) if read < int32(ahead * size) else int32(0)
                fill = int32(fill + int32(size)) if fill < int32(ahead * size) else int32(0)
            step = int32(step + int32(1))
        target = index(index(index(part) * K + first_k) * real_columns)
        for i in range(down):
            if channels_last:
                line = int32((row + int32(i // 4 * threads_down)) * int32(4) + int32(i % 4))
            else:
                line = int32(row + int32(i * threads_down))
            for j in range(across):
                place = int32(first_column + (column + int32(j // 4 * threads_across)) * int32(4) + int32(j % 4))
                if line < real_rows and place < real_columns:
                    at = index(target + index(line) * real_columns + place)
                    before = partial[at] if adds else float32(0)
                    partial[at] = before + sums[i * across + j]

    kernel.__name__ = f"weight_gradient_{'nhwc' if channels_last else 'nchw'}_{rows}x{columns}x{depth}"
    return kernel


@lru_cache(maxsize=256)
def add_parts(wide: bool) -> Any:
    """Return the kernel that adds the parts (splits, K, taps, C // groups), in order, into (K, C // groups, taps)."""
    index, divided, _ = width(wide)
    add_up = chained(Element.of(np.dtype(np.float32)), wide)

    def sum_of_parts(partial, out, total, splits, inner, taps):
        number = index(index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x))
        if number < total:
            rest, tap = divided(number, taps)
            k, c = divided(rest, inner)
            out[number] = add_up(partial, index((k * taps + tap) * inner + c), total, splits)

    sum_of_parts.__name__ = f"sum_of_parts_{64 if wide else 32}"
    return sum_of_parts
