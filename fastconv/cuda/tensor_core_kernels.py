"""The kernels of implicit GEMM on tensor cores: tiles are copied to shared memory while others are multiplied.

A block multiplies `rows` by `columns`. Rows are pixels and columns filters where channels are last, and the other way
round where they are first, so that a thread's results are neighbours in memory: columns of a tile are in such an order
that of those a thread has, two of each product of 8, as many as are 16 bytes follow each other (`in_order`).

Tiles are [row][depth], in chunks of 16 bytes that are exchanged within a row (`swizzle`), so that eight rows of one
chunk, which is what ldmatrix reads at once, lie in eight different groups of banks. A chunk holds channels of one tap,
a multiple of 8 numbers, or of 4 of tf32: `tensor_core_staging.py` brings pixels into that form where they are not.
Which chunk is read is the sum of two table entries, (offset, d, h, w) of the pixel and of the tap, as in
`gemm_kernels.py`.

A sum that is not finite is written as NaN, and the flag of its warp set: `tensor_core_staging.mend` computes it anew.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

from . import ptx, toolchain
from .elements import Element
from .epilogue import activate
from .gemm_kernels import inside, pixel_tables, split, width
from .lanes import storer
from .tensor_core_units import Units

cuda = toolchain.import_cuda()

from numba.cuda.types import float32, int32, uint32  # noqa: E402

ALL_LANES = 0xFFFFFFFF


class Tile(NamedTuple):
    """Sizes of a block's product: results, 16-byte chunks of depth at a time, warps over it, buffers in flight.

    Each warp has 16 rows or a multiple, and 16, 32 or 64 columns; or, on sm_90a, four warps multiply together
    (`warpgroups`), each has 16 rows, and all have 128 or 256 columns. `blocks` are meant to share a multiprocessor.
    """

    rows: int
    columns: int
    chunks: int
    warps_down: int
    warps_across: int
    stages: int
    blocks: int = 1
    warpgroups: bool = False

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps_down * self.warps_across

    @property
    def turned(self) -> Tile:
        """The tile whose rows are these columns."""
        return self._replace(
            rows=self.columns, columns=self.rows, warps_down=self.warps_across, warps_across=self.warps_down
        )

    @property
    def warp(self) -> tuple[int, int]:
        """Rows and columns of a warp."""
        return self.rows // self.warps_down, self.columns // self.warps_across


# --- helpers ---------------------------------------------------------------------------------------------------


def swizzle(chunks: int) -> Any:
    """Return where (in words) a chunk of a row lies; rows that are 8 apart are the same."""
    shift, last = max(3 - int(math.log2(chunks)), 0), min(chunks, 8) - 1

    def place(row, chunk):
        return int32(row * int32(4 * chunks) + (chunk ^ ((row >> int32(shift)) & int32(last))) * int32(4))

    return place


def neighbours(tile: Tile, element: Element) -> int:
    """Return how many of a thread's columns follow each other: 16 bytes of results."""
    return min(128 // element.stored.bitwidth, tile.warp[1] // 4)


def in_order(tile: Tile, element: Element) -> Any:
    """Return which column is at a place of the tile: four threads with a row in common write neighbours."""
    columns, together = tile.warp[1], neighbours(tile, element)
    shift, vector = int(math.log2(columns)), int(math.log2(together))

    def column_at(place):
        warp, within = place >> int32(shift), place & int32(columns - 1)
        thread, own = (within >> int32(1)) & int32(3), (within >> int32(3)) * int32(2) + (within & int32(1))
        column = (((own >> int32(vector)) * int32(4) + thread) << int32(vector)) + (own & int32(together - 1))
        return int32(warp * int32(columns) + column)

    return column_at


def as_they_are(place):
    """The order of rows."""
    return place


def warp_place(tile: Tile) -> Any:
    """Return first row and column of a warp's results."""
    (rows, columns), across = tile.warp, tile.warps_across

    def place(warp):
        down, right = split(warp, across)
        return int32(down * int32(rows)), int32(right * int32(columns))

    return place


def block_of(index: Any) -> Any:
    """Return the function that numbers the blocks of a grid."""

    def number():
        rest = index(index(cuda.blockIdx.z) * index(cuda.gridDim.y) + index(cuda.blockIdx.y))
        return index(rest * index(cuda.gridDim.x) + index(cuda.blockIdx.x))

    return number


# --- the product of two tiles ----------------------------------------------------------------------------------


def multiply(tile: Tile, units: Units, load_rows: Any, load_columns: Any, together: int = 1) -> Any:
    """Return the product of two tiles in shared memory, added to sums in registers.

    `load_rows` and `load_columns` fill the fragments of all planes, from a register on: of 16 rows, and of all columns
    of a warp. Places are those of the lane, within its warp's part of the tiles. Of planes, so many steps of depth are
    summed `together` on tensor cores before they are added to the sums.
    """
    (warp_rows, warp_columns), steps, planes, mma = tile.warp, tile.chunks // 2, units.planes, units.mma
    down, across = warp_rows // 16, warp_columns // 8
    # Registers of a fragment, of all planes, and of a product.
    of_row, of_columns, apart = 4, 2 * across, planes > 1
    row_size, column_size, part_size = of_row * planes, of_columns * planes, 4 * across
    rows_size, columns_size = together * row_size, together * column_size

    def product(sums, tiles, rows_at, columns_at):
        a = cuda.local.array(rows_size, uint32)
        b = cuda.local.array(columns_size, uint32)
        part = cuda.local.array(part_size, float32)
        for turn in range(steps // together):
            for step in range(together):
                load_columns(b, step * column_size, tiles, columns_at, turn * together + step)
            for i in range(down):
                for step in range(together):
                    load_rows(a, step * row_size, tiles, rows_at, turn * together + step, i)
                if not apart:
                    for j in range(across):
                        mma(sums, i * part_size + 4 * j, a, 0, b, 2 * j)
                else:
                    for s in range(part_size):
                        part[s] = float32(0)
                    # The smallest products first.
                    for level in range(planes):
                        for p in range(planes - level):
                            q = planes - 1 - level - p
                            for j in range(across):
                                for step in range(together):
                                    a_at, b_at = step * row_size + of_row * p, step * column_size + of_columns * q
                                    mma(part, 4 * j, a, a_at, b, b_at + 2 * j)
                    for s in range(part_size):
                        sums[i * part_size + s] += part[s]

    return product


def loaders(tile: Tile, units: Units, pixels_are_rows: bool) -> tuple[Any, Any]:
    """Return what loads fragments of tiles that are [row][depth], see `multiply`."""
    planes, pitch, of_columns = units.planes, 4 * tile.chunks, tile.warp[1] // 4
    row_plane, column_plane = tile.rows * pitch, tile.columns * pitch
    split_rows, split_columns = (units.split is not None and is_ for is_ in (pixels_are_rows, not pixels_are_rows))
    to_planes = units.split or as_they_are

    def load_rows(a, to, tiles, at, step, i):
        at = (at ^ int32(8 * step)) + i * (16 * pitch)
        if split_rows:
            raw = cuda.local.array(4, uint32)
            ptx.ldmatrix_x4(raw, 0, tiles, at)
            to_planes(raw, 4, a, to)
        else:
            for p in range(planes):
                ptx.ldmatrix_x4(a, to + 4 * p, tiles, at + p * row_plane)

    def load_columns(b, to, tiles, at, step):
        at = at ^ int32(8 * step)
        if split_columns:
            raw = cuda.local.array(of_columns, uint32)
            for j in range(of_columns // 4):
                ptx.ldmatrix_x4(raw, 4 * j, tiles, at + j * (16 * pitch))
            to_planes(raw, of_columns, b, to)
        else:
            for q in range(planes):
                for j in range(of_columns // 4):
                    ptx.ldmatrix_x4(b, to + of_columns * q + 4 * j, tiles, at + (q * column_plane + j * (16 * pitch)))

    return load_rows, load_columns


def _nothing(sums, tiles, rows_at, columns_at):
    pass


def _no_fence():
    pass


def warpgroup_product(tile: Tile, units: Units) -> tuple[Any, Any]:
    """Return what begins and what ends the product of two tiles by warpgroups: 64 rows each, with all columns.

    Tiles have rows of 128 bytes at multiples of 1024, where `swizzle` is theirs. Products of planes are summed in
    registers of their own, after the sums.
    """
    steps, planes, wgmma = tile.chunks // 2, units.planes, units.warpgroup[tile.columns // 128 - 1]
    wait = {128: ptx.wgmma_wait64, 256: ptx.wgmma_wait128}[tile.columns]
    pitch, size, apart = 4 * tile.chunks, tile.columns // 2, planes > 1
    row_plane, column_plane, part = tile.rows * pitch, tile.columns * pitch, size if apart else 0

    def begin(sums, tiles, rows_at, columns_at):
        if apart:
            for i in range(size):
                sums[part + i] = float32(0)
        ptx.wgmma_fence()
        # The smallest products first.
        for level in range(planes):
            for p in range(planes - level):
                a_at, b_at = rows_at + p * row_plane, columns_at + (planes - 1 - level - p) * column_plane
                for step in range(steps):
                    wgmma(sums, part, tiles, a_at + 8 * step, b_at + 8 * step)
        ptx.wgmma_commit()

    def end(sums, tiles, rows_at, columns_at):
        wait(sums, part)
        if apart:
            for i in range(size):
                sums[i] += sums[part + i]

    return begin, end


def warpgroup_places(tile: Tile) -> Any:
    """Return the places of a warpgroup's rows, and of all columns."""
    pitch = 4 * tile.chunks

    def places(lane, row, column):
        return int32((row & int32(-64)) * int32(pitch)), int32(0)

    return places


def lane_places(tile: Tile) -> Any:
    """Return the places of a lane's rows of ldmatrix, within tiles of rows and of columns."""
    place = swizzle(tile.chunks)

    def places(lane, row, column):
        rows_at = place(int32(row + (lane & int32(15))), lane >> int32(4))
        column = int32(column + (lane & int32(7)) + ((lane >> int32(4)) << int32(3)))
        return rows_at, place(column, (lane >> int32(3)) & int32(1))

    return places


# --- forward and input gradient --------------------------------------------------------------------------------


def buffer_words(tile: Tile, units: Units, channels_last: bool) -> tuple[int, int]:
    """Return the words of a buffer's tile of rows, and of the whole buffer."""
    pitch, both = 4 * tile.chunks, (units.pixel_planes, units.planes)
    row_planes, column_planes = both if channels_last else both[::-1]
    return row_planes * tile.rows * pitch, (row_planes * tile.rows + column_planes * tile.columns) * pitch


@lru_cache(maxsize=256)
def gather(
    tile: Tile, units: Units, element: Element, channels_last: bool, together: int, wide: bool, bias_: bool, code: int
) -> Any:
    """Return the kernel of one phase.

    Parameters
    ----------
    together : int
        Neighbours of the result that are written at once: 1, or as many as are 16 bytes.
    wide : bool
        Whether indices have 64 bits.
    bias_, code : bool and int
        Bias and activation.
    """
    rows, columns, chunks, threads, stages = tile.rows, tile.columns, tile.chunks, tile.threads, tile.stages
    pixels_of_tile, lines_of_tile = (rows, columns) if channels_last else (columns, rows)
    pitch, pixel_planes = 4 * chunks, units.pixel_planes
    pixel_plane, tile_words = pixels_of_tile * pitch, units.planes * lines_of_tile * pitch
    columns_at, size = buffer_words(tile, units, channels_last)
    pixels_at, lines_at = (0, columns_at) if channels_last else (columns_at, 0)
    copies, line_copies, at_once = pixels_of_tile * chunks // threads, tile_words // 4 // threads, threads // chunks
    table_size, entries_size = 4 * pixels_of_tile, 4 * copies
    ahead, in_flight, warps = stages - 1, stages - 2, threads // 32
    warp_rows, warp_columns = tile.warp
    down, across, of_thread = warp_rows // 16, warp_columns // 8, warp_columns // 4
    sums_of_thread = 4 * down * across
    # Warpgroups sum products of planes in as many registers more.
    sums_size = sums_of_thread * (2 if tile.warpgroups and units.planes > 1 else 1)
    index, _, entry_at = width(wide)
    place, order = swizzle(chunks), as_they_are if channels_last else in_order(tile, element)
    tabulate, warp_of = pixel_tables(pixels_of_tile, threads, True, channels_last, wide), warp_place(tile)
    lanes_of, alignment, arrived = lane_places(tile), 128, _no_fence
    begin, end = _nothing, multiply(tile, units, *loaders(tile, units, channels_last))
    if tile.warpgroups:
        lanes_of, alignment, arrived = warpgroup_places(tile), 1024, ptx.fence_async
        begin, end = warpgroup_product(tile, units)
    bias_last, bias_first, block_number = bias_ and channels_last, bias_ and not channels_last, block_of(index)
    widen = element.widen
    side_by_side = neighbours(tile, element)
    together = min(together, side_by_side)
    put, last = storer(element, together), side_by_side - 1

    def fetch(tiles, at, x, packed, weight, places, offset, d, h, w, pixel_to, line_to, plane, D, H, W):
        pixel_to, line_to = int32(at + pixel_to), int32(at + line_to)
        for j in range(copies):
            pixel_d, pixel_h, pixel_w = places[4 * j + 1], places[4 * j + 2], places[4 * j + 3]
            valid = inside(pixel_d + d, D) & inside(pixel_h + h, H) & inside(pixel_w + w, W)
            start, nbytes = index(places[4 * j] + offset), int32(16) if valid else int32(0)
            for p in range(pixel_planes):
                ptx.copy_async16(tiles, pixel_to + (j * at_once * pitch + p * pixel_plane), x, start, nbytes)
                start = index(start + plane)
        for j in range(line_copies):
            ptx.copy_async16(tiles, line_to + 4 * j * threads, packed, weight + 4 * j * threads, int32(16))

    def write(out, bias, sums, targets, first_line, first_bias, real_lines, target_plane, row, column):
        """Write a thread's results; return whether one of them is not finite."""
        values, shifts = cuda.local.array(together, float32), cuda.local.array(of_thread, float32)
        bad = int32(0)
        for c in range(of_thread):
            line = int32(first_line + column + ((c & ~last) * 4 + (c & last)))
            shifts[c] = widen(bias[int32(first_bias + line)]) if bias_last and line < real_lines else float32(0)
        for i in range(down):
            for half in range(2):
                line = int32(first_line + row + (16 * i + 8 * half))
                shift = widen(bias[int32(first_bias + line)]) if bias_first and line < real_lines else float32(0)
                for v in range(of_thread // together):
                    further = (v * together & ~last) * 4 + (v * together & last)
                    target = targets[row + (16 * i + 8 * half)] if channels_last else targets[column + further]
                    if channels_last:
                        line = int32(first_line + column + further)
                    if target >= 0 and line < real_lines:
                        for e in range(together):
                            c = v * together + e
                            value = sums[(i * across + (c >> 1)) * 4 + 2 * half + (c & 1)]
                            value += shifts[c] if channels_last else shift
                            lost = float32(value - value)
                            if lost != lost:
                                bad = int32(1)
                            values[e] = activate(float32(value + lost), code)
                        put(out, index(target + (line if channels_last else line * target_plane)), values, 0)
        return bad

    def kernel(
        x, packed, taps, bias, out, flags, total, plane, steps, real_lines, inner, C, D, H, W, K, OD, OH, OW, O, P, Q,
        d_first, h_first, w_first, d_step, h_step, w_step, od_first, oh_first, ow_first, od_step, oh_step, ow_step,
    ):  # fmt: skip
        tiles = ptx.pointer_to(cuda.shared.array(0, uint32, alignment=alignment))
        pixels = ptx.pointer_to(cuda.shared.array(table_size, index, alignment=16))
        targets = ptx.pointer_to(cuda.shared.array(pixels_of_tile, index, alignment=16))
        thread, group = int32(cuda.threadIdx.x), int32(cuda.blockIdx.z)
        target_plane = index(index(OD) * OH * OW)
        first_line = int32(int32(cuda.blockIdx.y) * int32(lines_of_tile))
        tabulate(pixels, targets, total, real_lines, inner, C, D, H, W, K, OD, OH, OW, O, P, Q, d_first, h_first,
                 w_first, d_step, h_step, w_step, od_first, oh_first, ow_first, od_step, oh_step, ow_step)  # fmt: skip
        cuda.syncthreads()
        # What the thread copies: a chunk of some pixels, and of the packed weight what follows.
        position, chunk = split(thread, chunks)
        places = cuda.local.array(entries_size, index)
        for j in range(copies):
            at = int32(order(int32(position + j * at_once)) * int32(4))
            places[4 * j], places[4 * j + 1], places[4 * j + 2], places[4 * j + 3] = entry_at(pixels, at)
        pixel_to, line_to = int32(int32(pixels_at) + place(position, chunk)), int32(int32(lines_at) + thread * int32(4))
        entry = index(chunk * int32(4))
        weight_tile = index(index(group) * index(cuda.gridDim.y) + index(cuda.blockIdx.y))
        weight = index(weight_tile * steps * index(tile_words) + thread * int32(4))
        offset, d, h, w = entry_at(taps, entry)
        lane, warp = thread & int32(31), thread >> int32(5)
        row, column = warp_of(warp)
        rows_at, read_columns_at = lanes_of(lane, row, column)
        read_columns_at = int32(int32(columns_at) + read_columns_at)
        sums = cuda.local.array(sums_size, float32)
        for i in range(sums_of_thread):
            sums[i] = float32(0)
        for stage in range(ahead):
            if stage < steps:
                fetch(tiles, int32(stage * size), x, packed, weight, places, offset, d, h, w, pixel_to, line_to, plane,
                      D, H, W)  # fmt: skip
                entry, weight = index(entry + int32(4 * chunks)), index(weight + int32(tile_words))
                offset, d, h, w = entry_at(taps, entry)
            ptx.copy_commit()
        read, fill, step = int32(0), int32(ahead * size), int32(ahead)
        while step < steps + ahead:
            ptx.copy_wait(in_flight)
            arrived()
            cuda.syncthreads()
            begin(sums, tiles, int32(read + rows_at), int32(read + read_columns_at))
            if step < steps:
                fetch(tiles, fill, x, packed, weight, places, offset, d, h, w, pixel_to, line_to, plane, D, H, W)
                entry, weight = index(entry + int32(4 * chunks)), index(weight + int32(tile_words))
                # The table has one entry more than there are steps: what comes next is loaded long before it is used.
                offset, d, h, w = entry_at(taps, entry)
            ptx.copy_commit()
            end(sums, tiles, int32(read + rows_at), int32(read + read_columns_at))
            read = int32(read + int32(size)) if read < int32(ahead * size) else int32(0)
            fill = int32(fill + int32(size)) if fill < int32(ahead * size) else int32(0)
            step = int32(step + int32(1))
        row, column = int32(row + (lane >> int32(2))), int32(column + (lane & int32(3)) * int32(side_by_side))
        first_bias = int32(group * real_lines)
        bad = write(out, bias, sums, targets, first_line, first_bias, real_lines, target_plane, row, column)
        found = cuda.any_sync(ALL_LANES, bad != 0)
        if lane == 0:
            flags[index(block_number() * index(warps) + warp)] = int32(1) if found else int32(0)

    kernel.__name__ = f"tensor_core_{units.name}_{'nhwc' if channels_last else 'nchw'}_{rows}x{columns}"
    kernel.__name__ += "_warpgroups" if tile.warpgroups else ""
    return kernel
