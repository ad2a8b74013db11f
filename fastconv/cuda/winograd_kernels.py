"""The kernels of Winograd's minimal filtering: transforms of tiles, and the products of what they make.

    M (t*t, G, tiles, targets)  =  V (t*t, G, tiles, depth)  @  U (t*t, G, depth, targets)

are matrices side by side, one for each of the t*t positions of a tile and each group: U is the transformed weight, V
the source. They are padded to whole tiles of the product, so that it tests nothing in its loop; where sums run over
padding, it is zero.

A transform has the t*t numbers of one tile and channel (of four neighbouring channels where those are last) in the
registers of a thread, a column of the tile at a time on the way in, a row on the way out. Neighbouring threads have
neighbouring channels where those are last; where they are first, eight channels and then neighbouring tiles, so that
a warp fills 32-byte sectors on both sides. Products are summed in chains, which are added up in registers of their own:
the transforms amplify rounding errors. Nothing here has run on a GPU.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ..minimal_filtering import Matrix
from . import ptx, toolchain
from .elements import Element
from .epilogue import activate
from .gemm_kernels import Tile, copies, multiply, split, swizzle, thread_places
from .indices import divided, index_type
from .lanes import loader, storer

cuda = toolchain.import_cuda()

from numba.cuda.types import float32, int32  # noqa: E402

_F32 = Element.of(np.dtype(np.float32))


# --- transforms ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def linear(matrix: Matrix, lanes: int) -> Any:
    """Return the function that multiplies a matrix by a vector of registers, `step` apart, in each lane."""
    rows, columns = len(matrix), len(matrix[0])
    factors = tuple(float(number) for row in matrix for number in row)

    def apply(source, source_at, source_step, target, target_at, target_step):
        for i in range(rows):
            for lane in range(lanes):
                total = float32(0)
                for k in range(columns):
                    factor = factors[i * columns + k]
                    if factor != 0.0:
                        total += float32(factor) * source[source_at + k * source_step + lane]
                target[target_at + i * target_step + lane] = total

    return apply


def tile_place(wide: bool) -> Any:
    """Return the function that tells (n, d, phase along H, along W, tile along H, along W) of a tile's number."""
    divide = divided(wide)

    def place(tile, tiles_h, tiles_w, phases_h, phases_w, depths):
        row, tw = divide(tile, tiles_w)
        image, th = divide(row, tiles_h)
        image, w = divide(image, phases_w)
        image, h = divide(image, phases_h)
        n, d = divide(image, depths)
        return n, d, h, w, th, tw

    return place


class Planes(NamedTuple):
    """What tiles are transformed to: float32, or planes of a smaller type, each the rounded rest of those before."""

    element: Element
    number: int

    def storer(self, lanes: int) -> Any:
        """Return the function that stores neighbours from registers, from register `of` on, which it changes."""
        number, store, widen, narrow = self.number, storer(self.element, lanes), self.element.widen, self.element.narrow

        def put(matrices, at, plane, registers, of):
            for p in range(number):
                store(matrices, at, registers, of)
                if p + 1 < number:
                    at = at + plane
                    for lane in range(lanes):
                        registers[of + lane] -= widen(narrow(registers[of + lane]))

        return put


PLAIN = Planes(_F32, 1)


@lru_cache(maxsize=64)
def transform_image(name: str, matrix: Matrix, m: int, lanes: int, element: Element, planes: Planes, wide: bool) -> Any:
    """Return the kernel that transforms tiles of an image, `m` apart, and zeros around it, to rows of matrices.

    The numbers of channels are those of a block of taps after another. `rows` tiles are written from `first` on, zeros
    where there are no more.
    """
    height, window = len(matrix), len(matrix[0])
    column_size, half_size, row_size = window * lanes, height * window * lanes, height * lanes
    index, divide = index_type(wide), divided(wide)
    place_of, transform = tile_place(wide), linear(matrix, lanes)
    load, put = loader(element, lanes), planes.storer(lanes)

    def kernel(
        image, matrices, total, low, rows, high, first, tiles, inner, depth, position_step, group_step, row_step,
        plane_step, image_step, channel_step, pixel_step, D, H, W, tiles_h, tiles_w, depths, A, B, dilation_d,
        dilation_h, dilation_w, low_d, low_h, low_w,
    ):  # fmt: skip
        number = index(index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x))
        if number < total:
            rest, low_place = divide(number, low)
            rest, row = divide(rest, rows)
            group, high_place = divide(rest, high)
            place = index((high_place * low + low_place) * lanes)
            n, d, h, w, th, tw = place_of(index(first + row), tiles_h, tiles_w, dilation_h, dilation_w, depths)
            block, c = divide(place, inner)
            rest, b = divide(block, B)
            t, a = divide(rest, A)
            d = index(d + t * dilation_d + low_d)
            h = index(h + (th * m + 3 * a) * dilation_h + low_h)
            w = index(w + (tw * m + 3 * b) * dilation_w + low_w)
            exists = (place < depth) & (first + row < tiles) & (d >= 0) & (d < D)
            from_ = index(n * image_step + (group * inner + c) * channel_step + d * H * W * pixel_step)
            column = cuda.local.array(column_size, float32)
            half = cuda.local.array(half_size, float32)
            for j in range(window):
                x = index(w + j * dilation_w)
                for i in range(window):
                    y = index(h + i * dilation_h)
                    if exists & (y >= 0) & (y < H) & (x >= 0) & (x < W):
                        load(image, index(from_ + (y * W + x) * pixel_step), column, i * lanes)
                    else:
                        for lane in range(lanes):
                            column[i * lanes + lane] = float32(0)
                transform(column, 0, lanes, half, j * lanes, window * lanes)
            to = index(group * group_step + row * row_step + place)
            results = cuda.local.array(row_size, float32)
            for i in range(height):
                transform(half, i * window * lanes, lanes, results, 0, lanes)
                for j in range(height):
                    put(matrices, index(to + (i * height + j) * position_step), plane_step, results, j * lanes)

    kernel.__name__ = f"winograd_{name}_{height}_lanes{lanes}"
    kernel.__name__ += f"_planes{planes.number}" if planes.number > 1 else ""
    return kernel


@lru_cache(maxsize=32)
def transform_weight(matrix: Matrix, element: Element, wide: bool) -> Any:
    """Return the kernel that transforms blocks of 3x3 taps to U, zero beyond the channels that there are.

    Eight targets, then the depth, then further targets and groups; `last` is the last tap if they are reversed, or 0.
    """
    height, window = len(matrix), len(matrix[0])
    half_size = height * window
    index, divide = index_type(wide), divided(wide)
    transform, widen = linear(matrix, 1), element.widen

    def kernel(
        weight, matrices, total, low, rows, high, inner, depth, targets, position_step, group_step, row_step,
        weight_group, inner_step, target_step, last, R, S, A, B,
    ):  # fmt: skip
        number = index(index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x))
        if number < total:
            rest, low_place = divide(number, low)
            rest, row = divide(rest, rows)
            group, high_place = divide(rest, high)
            k = index(high_place * low + low_place)
            block, c = divide(row, inner)
            rest, b = divide(block, B)
            t, a = divide(rest, A)
            exists = (row < depth) & (k < targets)
            from_ = index(group * weight_group + c * inner_step + k * target_step)
            column, results = cuda.local.array(window, float32), cuda.local.array(height, float32)
            half = cuda.local.array(half_size, float32)
            for j in range(window):
                s = index(3 * b + j)
                for i in range(window):
                    r = index(3 * a + i)
                    tap = index((t * R + r) * S + s)
                    column[i] = float32(0)
                    if exists & (r < R) & (s < S):
                        column[i] = widen(weight[index(from_ + (last - tap if last > 0 else tap))])
                transform(column, 0, 1, half, j, window)
            to = index(group * group_step + row * row_step + k)
            for i in range(height):
                transform(half, i * window, 1, results, 0, 1)
                for j in range(height):
                    matrices[index(to + (i * height + j) * position_step)] = results[j]

    kernel.__name__ = f"winograd_weight_{height}"
    return kernel


@lru_cache(maxsize=128)
def transform_output(
    matrix: Matrix, lanes: int, across: bool, element: Element, wide: bool, has_bias: bool, code: int
) -> Any:
    """Return the kernel that transforms M to output, through bias and activation.

    With `across` the results of a row of a tile are neighbours, all there, and stored together.
    """
    m, window = len(matrix), len(matrix[0])
    column_size, half_size, row_size = window * lanes, m * window * lanes, m * lanes
    index, divide = index_type(wide), divided(wide)
    place_of, transform, load = tile_place(wide), linear(matrix, lanes), loader(_F32, lanes)
    store, store_row, widen = storer(element, lanes), storer(element, m), element.widen

    def kernel(
        matrices, bias, out, total, low, rows, high, first, targets, position_step, group_step, row_step,
        image_step, channel_step, pixel_step, H, W, tiles_h, tiles_w, depths, dilation_h, dilation_w,
    ):  # fmt: skip
        number = index(index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x))
        rest, low_place = divide(number, low)
        rest, row = divide(rest, rows)
        group, high_place = divide(rest, high)
        k = index((high_place * low + low_place) * lanes)
        if number < total and k < targets:
            n, d, h, w, th, tw = place_of(index(first + row), tiles_h, tiles_w, dilation_h, dilation_w, depths)
            h, w = index(h + th * m * dilation_h), index(w + tw * m * dilation_w)
            from_ = index(group * group_step + row * row_step + k)
            column, half = cuda.local.array(column_size, float32), cuda.local.array(half_size, float32)
            for j in range(window):
                for i in range(window):
                    load(matrices, index(from_ + (i * window + j) * position_step), column, i * lanes)
                transform(column, 0, lanes, half, j * lanes, window * lanes)
            target = index(group * targets + k)
            to = index(n * image_step + target * channel_step + (d * H * W + h * W + w) * pixel_step)
            results = cuda.local.array(row_size, float32)
            for i in range(m):
                transform(half, i * window * lanes, lanes, results, 0, lanes)
                for j in range(m):
                    for lane in range(lanes):
                        value = results[j * lanes + lane]
                        if has_bias:
                            value += widen(bias[index(target + lane)])
                        results[j * lanes + lane] = activate(value, code)
                if h + i * dilation_h < H:
                    line = index(to + i * dilation_h * W * pixel_step)
                    if across:
                        store_row(out, line, results, 0)
                    else:
                        for j in range(m):
                            if w + j * dilation_w < W:
                                store(out, index(line + j * dilation_w * pixel_step), results, j * lanes)

    kernel.__name__ = f"winograd_output_{m}_lanes{lanes}"
    return kernel


@lru_cache(maxsize=32)
def transform_sums(matrix: Matrix, element: Element, wide: bool) -> Any:
    """Return the kernel that adds up parts of the products, in order, and transforms them to taps of the weight."""
    taps, window = len(matrix), len(matrix[0])
    half_size = taps * window
    index, divide = index_type(wide), divided(wide)
    transform, narrow = linear(matrix, 1), element.narrow

    def kernel(
        matrices, out, total, low, rows, high, parts, part_step, inner, targets, position_step, group_step, row_step,
        weight_group, inner_step, target_step, R, S, A, B,
    ):  # fmt: skip
        number = index(index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x))
        rest, low_place = divide(number, low)
        rest, row = divide(rest, rows)
        group, high_place = divide(rest, high)
        k = index(high_place * low + low_place)
        if number < total and k < targets:
            from_ = index(group * group_step + row * row_step + k)
            column, half = cuda.local.array(window, float32), cuda.local.array(half_size, float32)
            for j in range(window):
                for i in range(window):
                    column[i] = float32(0)
                at = from_
                for _ in range(parts):
                    for i in range(window):
                        column[i] += matrices[index(at + (i * window + j) * position_step)]
                    at = index(at + part_step)
                transform(column, 0, 1, half, j, window)
            block, c = divide(row, inner)
            rest, b = divide(block, B)
            t, a = divide(rest, A)
            to = index(group * weight_group + c * inner_step + k * target_step)
            results = cuda.local.array(taps, float32)
            for i in range(taps):
                transform(half, i * window, 1, results, 0, 1)
                r = index(3 * a + i)
                for j in range(taps):
                    s = index(3 * b + j)
                    if r < R and s < S:
                        out[index(to + (t * R + r) * S + s)] = narrow(results[j])

    kernel.__name__ = f"winograd_sums_{window}"
    return kernel


# --- products --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def batched_product(tile: Tile, rows_first: bool, chain: int, asynchronous: bool, wide: bool) -> Any:
    """Return the kernel that multiplies matrices side by side: c = a @ b, or with `add` c += a @ b.

    Parameters
    ----------
    rows_first : bool
        Whether a is (rows, depth), as in M = V @ U, or (depth, rows), as in the weight gradient V^T @ Y.
    chain : int
        Products after which a sum is added up; a multiple of the tile's depth.

    The depth of `steps` steps is cut into parts of `share`, each of which has matrices c of its own. All three are
    whole tiles.
    """
    rows, columns, depth, threads, stages = tile.rows, tile.columns, tile.depth, tile.threads, tile.stages
    threads_down, threads_across = tile.threads_down, tile.threads_across
    down, across = rows // threads_down, columns // threads_across
    rows_size, size, sums_of_thread = rows * depth, (rows + columns) * depth, down * across
    ahead, in_flight, chain_steps = stages - 1, stages - 2, chain // depth
    index = index_type(wide)
    copy, _, commit, wait = copies(asynchronous)
    place, places_of, product = swizzle(depth), thread_places(tile), multiply(tile, rows_first, 0)
    # A thread copies every so many rows of a tile.
    chunks = depth // 4 if rows_first else rows // 4
    row_stride, b_stride = threads // chunks, threads * 4 // columns
    copied_rows, tile_pitch = (rows, depth) if rows_first else (depth, rows)

    def fetch(tiles, at, a, b, a_at, b_at, a_to, b_to, a_row, b_row):
        a_to, b_to = int32(at + a_to), int32(at + b_to)
        for j in range(copied_rows // row_stride):
            copy(tiles, a_to + j * row_stride * tile_pitch, a, index(a_at + j * row_stride * a_row), int32(16))
        for j in range(depth // b_stride):
            copy(tiles, b_to + j * b_stride * columns, b, index(b_at + j * b_stride * b_row), int32(16))

    def kernel(a, b, c, steps, share, add, matrices, a_row, b_row, a_matrix, b_matrix, c_matrix):
        tiles = ptx.pointer_to(cuda.shared.array(0, float32, alignment=128))
        thread = int32(cuda.threadIdx.x)
        part, matrix = split(int32(cuda.blockIdx.z), int32(matrices))
        first_row, first_column = index(int32(cuda.blockIdx.x) * rows), index(int32(cuda.blockIdx.y) * columns)
        begin = int32(part * share)
        end = int32(min(int32(begin + share), steps))
        line, chunk = split(thread, chunks)
        if rows_first:
            a_at = index((first_row + line) * a_row + begin * depth + chunk * 4)
            a_to, a_step = place(line, chunk), index(depth)
        else:
            a_at = index((begin * depth + line) * a_row + first_row + chunk * 4)
            a_to, a_step = int32(line * int32(rows) + chunk * int32(4)), index(a_row * depth)
        a_at = index(a_at + matrix * a_matrix)
        line, chunk = split(thread, columns // 4)
        b_at = index(matrix * b_matrix + (begin * depth + line) * b_row + first_column + chunk * 4)
        b_to, b_step = int32(int32(rows_size) + line * int32(columns) + chunk * int32(4)), index(b_row * depth)
        row, column = places_of(thread)
        rows_at = place(row, int32(0)) if rows_first else int32(row * int32(4))
        columns_at = int32(int32(rows_size) + column * int32(4))
        sums, totals = cuda.local.array(sums_of_thread, float32), cuda.local.array(sums_of_thread, float32)
        for i in range(sums_of_thread):
            sums[i], totals[i] = float32(0), float32(0)
        for stage in range(ahead):
            if begin + stage < end:
                fetch(tiles, int32(stage * size), a, b, a_at, b_at, a_to, b_to, a_row, b_row)
            a_at, b_at = index(a_at + a_step), index(b_at + b_step)
            commit()
        read, fill, step, stop = int32(0), int32(ahead * size), int32(begin + ahead), int32(begin + ahead)
        while step < end + ahead:
            stop = int32(min(stop + chain_steps, end + ahead))
            while step < stop:
                wait(in_flight)
                cuda.syncthreads()
                if step < end:
                    fetch(tiles, fill, a, b, a_at, b_at, a_to, b_to, a_row, b_row)
                a_at, b_at = index(a_at + a_step), index(b_at + b_step)
                commit()
                product(sums, tiles, int32(read + rows_at), int32(read + columns_at))
                read = int32(read + int32(size)) if read < int32(ahead * size) else int32(0)
                fill = int32(fill + int32(size)) if fill < int32(ahead * size) else int32(0)
                step = int32(step + int32(1))
            for i in range(sums_of_thread):
                totals[i] += sums[i]
                sums[i] = float32(0)
        to = index(index(int32(cuda.blockIdx.z)) * c_matrix + first_row * b_row + first_column + column * 4)
        for i in range(down):
            if rows_first:
                line = int32(row + i * threads_down)
            else:
                line = int32((row + i // 4 * threads_down) * 4 + i % 4)
            for j in range(across // 4):
                at = index(to + line * b_row + 4 * j * threads_across)
                four, k = cuda.local.array(4, float32), i * across + 4 * j
                for e in range(4):
                    four[e] = totals[k + e]
                if add > 0:
                    before = ptx.load4(c, at)
                    for e in range(4):
                        four[e] += before[e]
                ptx.store4(c, at, (four[0], four[1], four[2], four[3]))

    kernel.__name__ = f"winograd_product_{rows}x{columns}x{depth}_{'nn' if rows_first else 'tn'}"
    return kernel
