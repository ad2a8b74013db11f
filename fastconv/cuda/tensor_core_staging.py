"""Before and after the tensor cores: the packed weight, pixels in planes, and results that must be computed anew.

The multiplying kernels read chunks of 16 bytes, each of one tap's or one pixel's channels. `pack` brings the weight
into that form and into the order of tiles, and tabulates the taps; `stage` does it for pixels whose channels are not
neighbours, not a multiple of a chunk, or which are split into planes.

Infinities meet zeros of the padding, and parts of split numbers: `mend` computes what is marked by NaN again, as sums
of float32 products in which the padding does not take part.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from . import ptx, toolchain
from .elements import Element
from .epilogue import activate
from .gemm_kernels import OUTSIDE, inside, width
from .indices import decoder
from .tensor_core_kernels import Tile, as_they_are, block_of, in_order, swizzle, warp_place
from .tensor_core_units import Units

cuda = toolchain.import_cuda()

from numba.cuda.types import float32, int32, uint32  # noqa: E402


@lru_cache(maxsize=256)
def pack(tile: Tile, units: Units, element: Element, channels_last: bool, wide: bool) -> Any:
    """Return the kernel that packs a phase's weight and tabulates its taps.

    packed is (G, lines / tile, depth / tile, planes, tile of lines, chunks of depth), each chunk where `swizzle` wants
    it; a line of columns is where `in_order` wants it. taps is (chunks of depth + one tile, 4). Both are zero, and
    outside every image, beyond what there is.
    """
    index, divided, _ = width(wide)
    chunks, chunk, planes, encode, widen = tile.chunks, units.chunk, units.planes, units.encode, element.widen
    lines_of_tile = tile.columns if channels_last else tile.rows
    order = in_order(tile, element) if channels_last else as_they_are
    place, tile_chunks, words_of_chunk = swizzle(chunks), lines_of_tile * chunks, 4 * planes

    def tensor_core_pack(
        weight, packed, taps, elements, entries, k_tiles, chunks_of_tap, real_taps, inner, line_tiles, real_lines,
        line_step, inner_step, group_step, R_taps, S_taps, R, S, t_first, r_first, s_first, t_step, r_step, s_step,
        d_step, h_step, w_step, channel_step, H, W, pixel_step,
    ):  # fmt: skip
        number = index(index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x))
        if number < elements:
            rest, at = divided(number, tile_chunks)
            rest, k_tile = divided(rest, k_tiles)
            group, line_tile = divided(rest, line_tiles)
            position, k = divided(at, chunks)
            line = index(line_tile * lines_of_tile + order(int32(position)))
            tap, c = divided(index(k_tile * chunks + k), chunks_of_tap)
            rest, s = divided(tap, S_taps)
            t, r = divided(rest, R_taps)
            tap_at = ((t_first + t * t_step) * R + r_first + r * r_step) * S + s_first + s * s_step
            values, words = cuda.local.array(chunk, float32), cuda.local.array(words_of_chunk, uint32)
            for e in range(chunk):
                channel, value = index(c * chunk + e), float32(0)
                if tap < real_taps and channel < inner and line < real_lines:
                    from_ = index(group * group_step + line * line_step + channel * inner_step + tap_at)
                    value = float32(widen(weight[from_]))
                values[e] = value
            encode(values, words)
            to = index(index((number - at) * planes) * index(4) + place(int32(position), int32(k)))
            for p in range(planes):
                four = (words[4 * p], words[4 * p + 1], words[4 * p + 2], words[4 * p + 3])
                ptx.store4(packed, index(to + p * tile_chunks * 4), four)
        elif number < elements + entries:
            tap, c = divided(index(number - elements), chunks_of_tap)
            rest, s = divided(tap, S_taps)
            t, r = divided(rest, R_taps)
            d, h, w = index(t * d_step), index(r * h_step), index(s * w_step)
            at = index((number - elements) * index(4))
            taps[at] = index(c * channel_step + ((d * H + h) * W + w) * pixel_step)
            taps[index(at + 1)] = d if tap < real_taps else index(OUTSIDE)
            taps[index(at + 2)] = h
            taps[index(at + 3)] = w

    return tensor_core_pack


@lru_cache(maxsize=256)
def stage(units: Units, element: Element, channels_last: bool, together: bool, wide: bool) -> Any:
    """Return the kernel that brings pixels into planes (planes, N, pixels, G, chunks), one chunk a thread.

    `together` says that the channels of a chunk follow each other at a multiple of 16 bytes.
    """
    index, divided, _ = width(wide)
    chunk, planes, encode, widen = units.chunk, units.pixel_planes, units.encode_pixels, element.widen
    words_of_chunk = 4 * planes

    def tensor_core_stage(x, staged, elements, pixels, chunks_of_group, groups, inner):
        number = index(index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x))
        if number < elements:
            # Neighbouring threads read neighbours in memory.
            if channels_last:
                image_pixel, within = divided(number, index(chunks_of_group * groups))
                n, pixel = divided(image_pixel, pixels)
            else:
                rest, pixel = divided(number, pixels)
                n, within = divided(rest, index(chunks_of_group * groups))
            group, c = divided(within, chunks_of_group)
            C = index(groups * inner)
            channel = index(group * inner + c * chunk)
            first = index((n * pixels + pixel) * C + channel if channels_last else (n * C + channel) * pixels + pixel)
            step = index(1) if channels_last else index(pixels)
            values, words = cuda.local.array(chunk, float32), cuda.local.array(words_of_chunk, uint32)
            if together:
                for i in range(chunk // 4):
                    four = ptx.load4(x, index(first + 4 * i))
                    for e in range(4):
                        values[4 * i + e] = float32(widen(four[e]))
            else:
                for e in range(chunk):
                    exists = c * chunk + e < inner
                    values[e] = float32(widen(x[index(first + e * step)])) if exists else float32(0)
            encode(values, words)
            to = index(((n * pixels + pixel) * groups * chunks_of_group + within) * 4)
            for p in range(planes):
                four = (words[4 * p], words[4 * p + 1], words[4 * p + 2], words[4 * p + 3])
                ptx.store4(staged, index(to + p * elements * 4), four)

    return tensor_core_stage


@lru_cache(maxsize=256)
def mend(tile: Tile, element: Element, channels_last: bool, wide: bool, bias_: bool, code: int) -> Any:
    """Return the kernel that computes a phase's results again where they are NaN.

    Its blocks are those of the product, and a warp whose flag is not set does nothing.
    """
    rows, columns = tile.rows, tile.columns
    pixels_of_tile, lines_of_tile = (rows, columns) if channels_last else (columns, rows)
    index, divided, _ = width(wide)
    decode, warp_of, block_number = decoder(wide), warp_place(tile), block_of(index)
    warps, (warp_rows, warp_columns), (widen, narrow) = tile.threads // 32, tile.warp, (element.widen, element.narrow)

    def tensor_core_mend(
        x, weight, bias, out, flags, total, real_lines, inner, line_step, inner_step, group_step, R, S, T_taps, R_taps,
        S_taps, t_first, r_first, s_first, t_step, r_step, s_step, d_tap, h_tap, w_tap, C, D, H, W, K, OD, OH, OW,
        O, P, Q, d_first, h_first, w_first, d_step, h_step, w_step, od_first, oh_first, ow_first, od_step, oh_step,
        ow_step,
    ):  # fmt: skip
        thread, group = int32(cuda.threadIdx.x), index(cuda.blockIdx.z)
        lane, warp = thread & int32(31), thread >> int32(5)
        if flags[index(block_number() * index(warps) + warp)] == 0:
            return
        row, column = warp_of(warp)
        plane, target_plane = index(index(D) * H * W), index(index(OD) * OH * OW)
        for number in range(lane, warp_rows * warp_columns, 32):
            down, right = divided(index(number), warp_columns)
            pixel, line = index(row + down), index(column + right)
            if not channels_last:
                pixel, line = line, pixel
            pixel = index(index(cuda.blockIdx.x) * index(pixels_of_tile) + pixel)
            line = index(index(cuda.blockIdx.y) * index(lines_of_tile) + line)
            if pixel < total and line < real_lines:
                n, o, p, q = decode(pixel, O, P, Q)
                od, oh, ow = od_first + o * od_step, oh_first + p * oh_step, ow_first + q * ow_step
                target = index((index(od) * OH + oh) * OW + ow)
                k = index(group * real_lines + line)
                at = (n * target_plane + target) * K + k if channels_last else (n * K + k) * target_plane + target
                value = widen(out[index(at)])
                if value != value:
                    value = float32(0)
                    for t in range(T_taps):
                        for r in range(R_taps):
                            for s in range(S_taps):
                                d = index(d_first + o * d_step + t * d_tap)
                                h = index(h_first + p * h_step + r * h_tap)
                                w = index(w_first + q * w_step + s * w_tap)
                                if inside(d, D) and inside(h, H) and inside(w, W):
                                    place = index((d * H + h) * W + w)
                                    tap = ((t_first + t * t_step) * R + r_first + r * r_step) * S + s_first + s * s_step
                                    from_ = index(group * group_step + line * line_step + tap)
                                    for c in range(inner):
                                        channel = index(group * inner + c)
                                        if channels_last:
                                            source = index((n * plane + place) * C + channel)
                                        else:
                                            source = index((n * C + channel) * plane + place)
                                        value += widen(x[source]) * widen(weight[index(from_ + c * inner_step)])
                    if bias_:
                        value += widen(bias[k])
                    out[index(at)] = narrow(activate(float32(value), code))

    return tensor_core_mend
