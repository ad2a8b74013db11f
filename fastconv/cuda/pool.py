"""Pooling: maximum with its index, average, p-norm, unpooling, and their gradients.

    y[i] = max, sum / count or (sum |x|**p)**(1/p) over the window i        dx[j] = sum over the windows i that hold j

Arrays are seen as (outer, D, H, W, inner): outer N*C planes with inner 1 in channels_first, outer N images with inner
C in channels_last. Both ways a thread gathers: forward the elements of its windows, backward the windows that cover its
elements, of a maximum those whose index is its own. No atomics, and sums in scan order, so the same bits every time.

There are two loop nests for each way. `*_lanes` works on neighbouring channels, or on one element in any format, for
any windows. `*_rows` works on neighbours of a row, where channels are first: the stretch that they share is loaded by
aligned vectors to registers, and kernel, stride, padding and dilation are constants, so that each window is a choice of
registers. All accesses are of 128 bits where channels, or rows, are a multiple of that.

It has run in the emulator, on no GPU.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ..geometry import PoolGeometry
from ..registry import Buffer
from . import toolchain
from .elements import INTEGERS, Element
from .indices import THREADS, constant_division, divisors, index_dtype, index_type, launch, needs_wide, quotient, step
from .lanes import MOST_STRETCH, Stretch, index_loader, index_storer, loader, storer, widest
from .ptx import pointer_to
from .steps import Step, renamed

cuda = toolchain.import_cuda()

from numba.cuda.types import CPointer, int64  # noqa: E402

# What is reduced, and what windows give back.
MAXIMUM, AVERAGE, NORM = "maximum", "average", "norm"
MATCHING, LATEST, EVERY = "matching", "latest", "every"
# Blocks that look for the reach of indices, and what each finds: least and most of each axis, and a wrong one.
REACH_BLOCKS, REACH = 256, 7


# --- windows ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def window_rule(adaptive: bool, wide: bool) -> Any:
    """Return the function that tells (first position, taps inside the input, taps with padding) of a window."""
    index, over = index_type(wide), quotient(wide)

    def regular(at, size, windows, kernel, stride, before, after, dilation):
        start = index(at * stride - before)
        skipped = over(index(max(-start, 0) + dilation - 1), dilation)
        first = index(start + skipped * dilation)
        inside = counted = index(0)
        if first < size:
            inside = index(min(over(index(size - 1 - first), dilation) + 1, kernel - skipped))
        if start < size + after:
            counted = index(min(over(index(size + after - 1 - start), dilation) + 1, kernel))
        return first, index(max(inside, 0)), counted

    def spread(at, size, windows, kernel, stride, before, after, dilation):
        first = over(index(at * size), windows)
        count = index(over(index((at + 1) * size + windows - 1), windows) - first)
        return first, count, count

    return spread if adaptive else regular


@lru_cache(maxsize=4)
def cover_rule(adaptive: bool, wide: bool) -> Any:
    """Return the function that tells (first, end) of the windows among which are all that hold a position."""
    index, over = index_type(wide), quotient(wide)

    def regular(at, size, windows, span, stride, before):
        late = index(at + before)
        early = index(max(late - span + 1, 0))
        first = over(index(early + stride - 1), stride)
        end = index(0)
        if late >= 0:
            end = index(min(over(late, stride) + 1, windows))
        return first, end

    def spread(at, size, windows, span, stride, before):
        return over(index(at * windows), size), index(over(index((at + 1) * windows + size - 1), size))

    return spread if adaptive else regular


# --- what is reduced -------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def taker(element: Element, operation: str, power: float) -> Any:
    """Return the function that takes a value into a result of sums or of maxima."""
    sums = element.sums

    def greater(result, value):
        return value if value > result or value != value else result

    def add(result, value):
        return result + value

    def add_square(result, value):
        return result + value * value

    def add_magnitude(result, value):
        return result + math.fabs(value)

    def add_power(result, value):
        return result + math.pow(math.fabs(value), sums(power))

    def greatest_magnitude(result, value):
        return greater(result, math.fabs(value))

    def least_magnitude(result, value):
        return greater(result, -math.fabs(value))

    if operation != NORM:
        return greater if operation == MAXIMUM else add
    if math.isinf(power):
        return greatest_magnitude if power > 0 else least_magnitude
    return {1.0: add_magnitude, 2.0: add_square}.get(power, add_power)


@lru_cache(maxsize=64)
def finisher(element: Element, operation: str, power: float, is_fixed: bool) -> Any:
    """Return the function of (result, elements inside, elements counted, factor) that makes a window's result."""
    sums = element.sums

    def as_is(result, inside, counted, factor):
        return result

    def scaled(result, inside, counted, factor):
        return result * factor

    def shared(result, inside, counted, factor):
        return sums(result / sums(counted)) if inside > 0 else sums(0)

    mean = scaled if is_fixed else shared

    def root(result, inside, counted, factor):
        return math.pow(mean(result, inside, counted, sums(1)) * factor, sums(1 / power))

    def square_root(result, inside, counted, factor):
        return math.sqrt(mean(result, inside, counted, sums(1)) * factor)

    def at_least_nothing(result, inside, counted, factor):
        # NaN passes through.
        return sums(0) if result < sums(0) else result

    def least(result, inside, counted, factor):
        return at_least_nothing(-result, inside, counted, factor)

    if operation == MAXIMUM:
        return as_is
    if operation == AVERAGE:
        return mean
    if math.isinf(power):
        return at_least_nothing if power > 0 else least
    return square_root if power == 2.0 else root


def _start(element: Element, operation: str, power: float) -> float:
    """Return what a window's result begins with."""
    if element.name in INTEGERS:
        return int(np.iinfo(element.name).min)
    return -math.inf if operation == MAXIMUM or (operation == NORM and math.isinf(power)) else 0.0


# --- forward ---------------------------------------------------------------------------------------------------


class How(NamedTuple):
    """The constants of a forward kernel; `is_fixed`: all windows have one divisor, which is multiplied by."""

    element: Element
    operation: str
    wide: bool
    lanes: int
    adaptive: bool = False
    with_indices: bool = False
    count_padding: bool = False
    is_fixed: bool = True
    power: float = 0.0


@lru_cache(maxsize=256)
def reduce_lanes(how: How) -> Any:
    """Return the kernel in which a thread has one window of some channels; its arguments are `_Sizes.forward`."""
    element, operation, wide, lanes, adaptive, with_indices, count_padding, is_fixed, power = how
    index, split, window = index_type(wide), constant_division(wide), window_rule(adaptive, wide)
    load, store, store_indices = loader(element, lanes), storer(element, lanes), index_storer(wide, lanes)
    take, finish = taker(element, operation, power), finisher(element, operation, power, is_fixed)
    sums, begin, is_maximum = element.sums, _start(element, operation, power), operation == MAXIMUM

    def reduce(
        x, y, indices, factor, total, V, v_m, v_s, Q, q_m, q_s, P, p_m, p_s, O, o_m, o_s, D, H, W,
        T, R, S, stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, after_d, after_h, after_w, step_d, step_h, step_w,
    ):  # fmt: skip
        number = index(index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x))
        if number < total:
            rest, v = split(number, V, v_m, v_s)
            rest, q = split(rest, Q, q_m, q_s)
            rest, p = split(rest, P, p_m, p_s)
            n, o = split(rest, O, o_m, o_s)
            d0, count_d, all_d = window(o, D, O, T, stride_d, pad_d, after_d, step_d)
            h0, count_h, all_h = window(p, H, P, R, stride_h, pad_h, after_h, step_h)
            w0, count_w, all_w = window(q, W, Q, S, stride_w, pad_w, after_w, step_w)
            inside = index(count_d * count_h * count_w)
            results, values = cuda.local.array(lanes, sums), cuda.local.array(lanes, sums)
            where = cuda.local.array(lanes, index)
            first = index((d0 * H + h0) * W + w0) if inside > 0 else index(-1)
            for i in range(lanes):
                results[i] = sums(begin)
                where[i] = first
            pixel = index(V * lanes)
            image = index(n * D * H * W * pixel + v * lanes)
            for t in range(count_d):
                for r in range(count_h):
                    at = index(((d0 + t * step_d) * H + h0 + r * step_h) * W + w0)
                    for _ in range(count_w):
                        load(x, index(image + at * pixel), values, 0)
                        for i in range(lanes):
                            if is_maximum:
                                if values[i] > results[i] or values[i] != values[i]:
                                    results[i] = values[i]
                                    where[i] = at
                            else:
                                results[i] = take(results[i], values[i])
                        at = index(at + step_w)
            counted = index(all_d * all_h * all_w) if count_padding else inside
            for i in range(lanes):
                results[i] = finish(results[i], inside, counted, factor)
            store(y, index(number * lanes), results, 0)
            if with_indices:
                store_indices(indices, index(number * lanes), where)

    reduce.__name__ = f"pool_{operation}_lanes{lanes}_{element.name}_{64 if wide else 32}"
    return reduce


@lru_cache(maxsize=256)
def reduce_rows(how: How, stretch: Stretch) -> Any:
    """Return the kernel in which a thread has neighbouring windows of a row; its arguments are `_Sizes.forward`.

    V is the number of threads of a row of windows, Q is 1.
    """
    element, operation, wide, lanes, _, with_indices, count_padding, is_fixed, power = how
    kernel, stride, before, dilation, load_lanes, lead, offset, vectors = stretch
    index, split, window = index_type(wide), constant_division(wide), window_rule(False, wide)
    load, store, store_indices = loader(element, load_lanes), storer(element, lanes), index_storer(wide, lanes)
    take, finish = taker(element, operation, power), finisher(element, operation, power, is_fixed)
    sums, begin, is_maximum = element.sums, _start(element, operation, power), operation == MAXIMUM
    registers, padding = vectors * load_lanes, begin if is_maximum else 0.0

    def reduce(
        x, y, indices, factor, total, V, v_m, v_s, Q, q_m, q_s, P, p_m, p_s, O, o_m, o_s, D, H, W,
        T, R, S, stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, after_d, after_h, after_w, step_d, step_h, step_w,
    ):  # fmt: skip
        number = index(index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x))
        if number < total:
            rest, v = split(number, V, v_m, v_s)
            rest, p = split(rest, P, p_m, p_s)
            n, o = split(rest, O, o_m, o_s)
            d0, count_d, all_d = window(o, D, O, T, stride_d, pad_d, after_d, step_d)
            h0, count_h, all_h = window(p, H, P, R, stride_h, pad_h, after_h, step_h)
            results, row = cuda.local.array(lanes, sums), cuda.local.array(registers, sums)
            where = cuda.local.array(lanes, index)
            column = index(v * (lanes * stride) - lead)
            corner = index((d0 * H + h0) * W)
            for j in range(lanes):
                results[j] = sums(begin)
                if with_indices:
                    w0, count_w, all_w = window(index(v * lanes + j), W, Q, index(kernel), index(stride),
                                                index(before), after_w, index(dilation))  # fmt: skip
                    some = count_d > 0 and count_h > 0 and count_w > 0
                    where[j] = index(corner + w0) if some else index(-1)
            for t in range(count_d):
                for r in range(count_h):
                    line = index(((d0 + t * step_d) * H + h0 + r * step_h) * W)
                    for i in range(vectors):
                        w = index(column + i * load_lanes)
                        if w >= 0 and w < W:
                            load(x, index(n * D * H * W + line + w), row, i * load_lanes)
                        else:
                            for j in range(load_lanes):
                                row[i * load_lanes + j] = sums(padding)
                    for j in range(lanes):
                        for s in range(kernel):
                            value = row[offset + j * stride + s * dilation]
                            if with_indices:
                                if value > results[j] or value != value:
                                    results[j] = value
                                    where[j] = index(line + column + (offset + j * stride + s * dilation))
                            else:
                                results[j] = take(results[j], value)
            for j in range(lanes):
                inside = counted = index(1)
                if not is_fixed:
                    w0, count_w, all_w = window(index(v * lanes + j), W, Q, index(kernel), index(stride),
                                                index(before), after_w, index(dilation))  # fmt: skip
                    inside = index(count_d * count_h * count_w)
                    counted = index(all_d * all_h * all_w) if count_padding else inside
                results[j] = finish(results[j], inside, counted, factor)
            store(y, index(number * lanes), results, 0)
            if with_indices:
                store_indices(indices, index(number * lanes), where)

    reduce.__name__ = f"pool_{operation}_rows{lanes}_{element.name}_{64 if wide else 32}"
    return reduce


# --- backward --------------------------------------------------------------------------------------------------


class Back(NamedTuple):
    """The constants of a backward kernel; `has_reach`: where windows are is in memory, from `find_reach`."""

    element: Element
    kind: str
    wide: bool
    lanes: int
    adaptive: bool = False
    has_reach: bool = False
    count_padding: bool = False
    is_fixed: bool = True


@lru_cache(maxsize=256)
def spread_lanes(back: Back) -> Any:
    """Return the kernel in which a thread has one element of some channels; its arguments are `_Sizes.backward`."""
    element, kind, wide, lanes, adaptive, has_reach, count_padding, is_fixed = back
    index, split, over = index_type(wide), constant_division(wide), quotient(wide)
    window, cover = window_rule(adaptive, wide), cover_rule(adaptive, wide)
    load, store, load_indices = loader(element, lanes), storer(element, lanes), index_loader(wide, lanes)
    sums, by_index, latest = element.sums, kind != EVERY, kind == LATEST
    steps_over = kind == EVERY and not adaptive

    def holds(place, window_, stride, before, dilation):
        """Return whether a window whose span covers a place has a tap there."""
        if steps_over:
            distance = index(place + before - window_ * stride)
            return index(over(distance, dilation) * dilation) == distance
        return True

    def spread(
        grad, indices, reach, out, factor, total, V, v_m, v_s, W, w_m, w_s, H, h_m, h_s, D, d_m, d_s, O, P, Q,
        T, R, S, stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, after_d, after_h, after_w, step_d, step_h, step_w,
    ):  # fmt: skip
        number = index(index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x))
        if number < total:
            rest, v = split(number, V, v_m, v_s)
            rest, w = split(rest, W, w_m, w_s)
            rest, h = split(rest, H, h_m, h_s)
            n, d = split(rest, D, d_m, d_s)
            if has_reach:
                pad_d, span_d = index(-reach[0]), index(reach[1] - reach[0] + 1)
                pad_h, span_h = index(-reach[2]), index(reach[3] - reach[2] + 1)
                pad_w, span_w = index(-reach[4]), index(reach[5] - reach[4] + 1)
            else:
                span_d, span_h = index((T - 1) * step_d + 1), index((R - 1) * step_h + 1)
                span_w = index((S - 1) * step_w + 1)
            o0, o1 = cover(d, D, O, span_d, stride_d, pad_d)
            p0, p1 = cover(h, H, P, span_h, stride_h, pad_h)
            q0, q1 = cover(w, W, Q, span_w, stride_w, pad_w)
            own = index((d * H + h) * W + w)
            results, values = cuda.local.array(lanes, sums), cuda.local.array(lanes, sums)
            where = cuda.local.array(lanes, index)
            for i in range(lanes):
                results[i] = sums(0)
            pixel = index(V * lanes)
            for o in range(o0, o1):
                for p in range(p0, p1):
                    line = index(((n * O + o) * P + p) * Q)
                    for q in range(q0, q1):
                        at = index((line + q) * pixel + v * lanes)
                        if by_index:
                            load(grad, at, values, 0)
                            load_indices(indices, at, where, 0)
                            for i in range(lanes):
                                if where[i] == own:
                                    results[i] = values[i] if latest else results[i] + values[i]
                        elif (
                            holds(d, o, stride_d, pad_d, step_d)
                            and holds(h, p, stride_h, pad_h, step_h)
                            and holds(w, q, stride_w, pad_w, step_w)
                        ):
                            load(grad, at, values, 0)
                            share = factor
                            if not is_fixed:
                                _, count_d, all_d = window(index(o), D, O, T, stride_d, pad_d, after_d, step_d)
                                _, count_h, all_h = window(index(p), H, P, R, stride_h, pad_h, after_h, step_h)
                                _, count_w, all_w = window(index(q), W, Q, S, stride_w, pad_w, after_w, step_w)
                                counted = index(count_d * count_h * count_w)
                                if count_padding:
                                    counted = index(all_d * all_h * all_w)
                                share = sums(sums(1) / sums(counted))
                            for i in range(lanes):
                                results[i] += values[i] * share
            store(out, index(number * lanes), results, 0)

    spread.__name__ = f"pool_{kind}_lanes{lanes}_{element.name}_{64 if wide else 32}"
    return spread


@lru_cache(maxsize=256)
def spread_rows(back: Back, stretch: Stretch) -> Any:
    """Return the kernel in which a thread has neighbours of a row of the input; its arguments are `_Sizes.backward`.

    It has `lanes * stride` of them, so that the windows it looks at begin with a whole vector. V is 1.
    """
    element, kind, wide, lanes, *_ = back
    kernel, stride, before, dilation, _, lead, _, vectors = stretch
    index, split, cover = index_type(wide), constant_division(wide), cover_rule(False, wide)
    load, store, load_indices = loader(element, lanes), storer(element, lanes), index_loader(wide, lanes)
    sums, by_index, latest = element.sums, kind != EVERY, kind == LATEST
    own, registers, span = lanes * stride, vectors * lanes, (kernel - 1) * dilation + 1
    # So that quotients of constants are of numbers that are not negative.
    shift = lead * stride

    def spread(
        grad, indices, reach, out, factor, total, V, v_m, v_s, W, w_m, w_s, H, h_m, h_s, D, d_m, d_s, O, P, Q,
        T, R, S, stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, after_d, after_h, after_w, step_d, step_h, step_w,
    ):  # fmt: skip
        number = index(index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x))
        if number < total:
            rest, b = split(number, V, v_m, v_s)
            rest, h = split(rest, H, h_m, h_s)
            n, d = split(rest, D, d_m, d_s)
            o0, o1 = cover(d, D, O, index((T - 1) * step_d + 1), stride_d, pad_d)
            p0, p1 = cover(h, H, P, index((R - 1) * step_h + 1), stride_h, pad_h)
            results, row = cuda.local.array(own, sums), cuda.local.array(registers, sums)
            where = cuda.local.array(registers, index)
            for j in range(own):
                results[j] = sums(0)
            place = index((d * H + h) * W + b * own)
            for o in range(o0, o1):
                for p in range(p0, p1):
                    line = index(((n * O + o) * P + p) * Q)
                    for i in range(vectors):
                        q = index(b * lanes + (i * lanes - lead))
                        if q >= 0 and q < Q:
                            load(grad, index(line + q), row, i * lanes)
                            if by_index:
                                load_indices(indices, index(line + q), where, i * lanes)
                        else:
                            for j in range(lanes):
                                row[i * lanes + j] = sums(0)
                                where[i * lanes + j] = index(-1)
                    for i in range(registers):
                        for j in range(own):
                            # The window begins at `first`, counted as the element's own place is.
                            first, at = i * stride, j + before + shift
                            if first <= at and at < first + span:
                                if not by_index:
                                    results[j] += row[i]
                                elif where[i] == index(place + j):
                                    results[j] = row[i] if latest else results[j] + row[i]
            for i in range(stride):
                if b * own + i * lanes < W:
                    for j in range(lanes):
                        results[i * lanes + j] *= factor
                    store(out, index(n * D * H * W + place + i * lanes), results, i * lanes)

    spread.__name__ = f"pool_{kind}_rows{lanes}_{element.name}_{64 if wide else 32}"
    return spread


# --- indices of unknown windows --------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def merge_reaches(wide: bool, threads: int) -> Any:
    """Return the function that merges what the threads of a block found, and writes it."""
    index, half = index_type(wide), threads // 2

    def merge(mine, thread, found, at):
        slot, above = index(thread * REACH), index(half)
        while above > 0:
            cuda.syncthreads()
            if thread < above:
                other = index(slot + above * REACH)
                for axis in range(3):
                    mine[slot + 2 * axis] = index(min(mine[slot + 2 * axis], mine[other + 2 * axis]))
                    mine[slot + 2 * axis + 1] = index(max(mine[slot + 2 * axis + 1], mine[other + 2 * axis + 1]))
                mine[slot + 6] = index(max(mine[slot + 6], mine[other + 6]))
            above = index(above >> 1)
        if thread == 0:
            for i in range(REACH):
                found[at + i] = mine[i]

    return merge


@lru_cache(maxsize=16)
def find_reach(wide: bool, threads: int) -> Any:
    """Return the kernel in which each block finds how far some indices are from their windows' corners.

    That is (least, most) of three axes, and 1 if an index is neither inside its plane nor the one that is allowed.
    """
    index, over, split = index_type(wide), quotient(wide), constant_division(wide)
    slots, far, merge = threads * REACH, _far(wide), merge_reaches(wide, threads)

    def pool_find_reach(
        indices, found, total, share, V, v_m, v_s, Q, q_m, q_s, P, p_m, p_s, O, o_m, o_s, D, H, W,
        stride_d, stride_h, stride_w, allowed,
    ):  # fmt: skip
        mine = pointer_to(cuda.shared.array(slots, index))
        block, thread = index(cuda.blockIdx.x), index(cuda.threadIdx.x)
        low_d = low_h = low_w = index(far)
        high_d = high_h = high_w = index(-far)
        wrong = index(0)
        end = index(min(index(block * share + share), total))
        for at in range(index(block * share + thread), end, threads):
            position = int64(indices[at])
            if position >= 0 and position < D * H * W:
                rest, _ = split(index(at), V, v_m, v_s)
                rest, q = split(rest, Q, q_m, q_s)
                rest, p = split(rest, P, p_m, p_s)
                _, o = split(rest, O, o_m, o_s)
                line = over(index(position), W)
                plane = over(line, H)
                d, h, w = index(plane), index(line - plane * H), index(index(position) - line * W)
                d, h, w = index(d - o * stride_d), index(h - p * stride_h), index(w - q * stride_w)
                low_d, low_h, low_w = index(min(low_d, d)), index(min(low_h, h)), index(min(low_w, w))
                high_d, high_h, high_w = index(max(high_d, d)), index(max(high_h, h)), index(max(high_w, w))
            elif position != allowed:
                wrong = index(1)
        slot = index(thread * REACH)
        mine[slot], mine[slot + 1], mine[slot + 2], mine[slot + 3] = low_d, high_d, low_h, high_h
        mine[slot + 4], mine[slot + 5], mine[slot + 6] = low_w, high_w, wrong
        merge(mine, thread, found, index(block * REACH))

    return pool_find_reach


@lru_cache(maxsize=16)
def join_reaches(wide: bool, threads: int) -> Any:
    """Return the kernel that joins what blocks found: one block, of as many threads as there are findings or more."""
    index = index_type(wide)
    slots, far, merge = threads * REACH, _far(wide), merge_reaches(wide, threads)

    def pool_join_reaches(found, reach, count):
        mine = pointer_to(cuda.shared.array(slots, index))
        thread = index(cuda.threadIdx.x)
        for i in range(REACH):
            empty = index(0) if i == REACH - 1 else index(far) if i % 2 == 0 else index(-far)
            mine[thread * REACH + i] = found[thread * REACH + i] if thread < count else empty
        merge(mine, thread, reach, index(0))

    return pool_join_reaches


def _far(wide: bool) -> int:
    """Return a distance beyond all that occur."""
    return 2**60 if wide else 2**28


@lru_cache(maxsize=16)
def pick(element: Element, wide: bool, lanes: int) -> Any:
    """Return the kernel that reads the element of its plane that each index names; nothing for one outside."""
    index, split = index_type(wide), constant_division(wide)
    store, load_indices, sums, widen = storer(element, lanes), index_loader(wide, lanes), element.sums, element.widen

    def pool_pick(grad, indices, out, total, V, v_m, v_s, L, l_m, l_s, size):
        number = index(index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x))
        if number < total:
            rest, v = split(number, V, v_m, v_s)
            n, _ = split(rest, L, l_m, l_s)
            where, results = cuda.local.array(lanes, index), cuda.local.array(lanes, sums)
            load_indices(indices, index(number * lanes), where, 0)
            for i in range(lanes):
                results[i] = sums(0)
                if where[i] >= 0 and where[i] < size:
                    results[i] = widen(grad[index((n * size + where[i]) * V * lanes + v * lanes + i)])
            store(out, index(number * lanes), results, 0)

    return pool_pick


# --- the gradient of a norm ------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def norm_shares(element: Element, wide: bool, power: float) -> Any:
    """Return the kernel of what each window gives back: grad * norm**(1 - power); nothing where the norm is 0."""
    index, sums = index_type(wide), element.sums

    def pool_norm_shares(grad, norms, out, total, factor):
        number = index(index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x))
        if number < total:
            norm = norms[number]
            share = grad[number] * math.pow(norm, sums(1 - power)) * factor
            out[number] = sums(0) if norm == sums(0) else share

    return pool_norm_shares


@lru_cache(maxsize=16)
def norm_slopes(element: Element, wide: bool, power: float) -> Any:
    """Return the kernel that multiplies by the slope sign(x) * |x|**(power - 1), in place; 0 where x is."""
    index, sums = index_type(wide), element.sums

    def pool_norm_slopes(x, out, total):
        number = index(index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x))
        if number < total:
            value = x[number]
            slope = math.pow(math.fabs(value), sums(power - 1))
            slope = -slope if value < sums(0) else slope
            out[number] = out[number] * (sums(0) if value == sums(0) else slope)

    return pool_norm_slopes


# --- host ------------------------------------------------------------------------------------------------------


class _Sizes(NamedTuple):
    """A pooling of three dimensions, as kernels see it."""

    outer: int
    inner: int
    x: tuple[int, ...]
    y: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, g: PoolGeometry) -> _Sizes:
        """Return those of a geometry; a stride that is never stepped, and an unused dilation, may be huge."""
        ones = (1,) * (3 - g.spatial_dims)
        x, y = (ones + tuple(size) for size in (g.input_size, g.output_size))
        kernel = ones + tuple(g.kernel_size)
        stride = tuple(s if p > 1 else 1 for s, p in zip(ones + tuple(g.stride), y))
        dilation = tuple(d if k > 1 else 1 for d, k in zip(ones + tuple(g.dilation), kernel))
        padding = (*((0, 0),) * len(ones), *g.padding)
        return cls(*_outer_inner(g.batch, g.channels, g.data_format), x, y, kernel, stride, padding, dilation)

    @property
    def last(self) -> tuple[Any, ...]:
        """Kernel, stride, padding before and dilation along a row."""
        return self.kernel[2], self.stride[2], self.padding[2][0], self.dilation[2]

    @property
    def wide(self) -> bool:
        """Whether indices need 64 bits: products of adaptive windows too, and ends of windows in the padding."""
        spans = (d * k + n + sum(pad) for d, k, n, pad in zip(self.dilation, self.kernel, self.x, self.padding))
        products = (n * (p + 1) + n + p for n, p in zip(self.x, self.y))
        return needs_wide(
            self.outer * self.inner * math.prod(self.x), self.outer * self.inner * math.prod(self.y), *spans, *products
        )

    @property
    def rest(self) -> tuple[int, ...]:
        """The numbers that windows are computed from."""
        before, after = zip(*self.padding)
        return (*self.kernel, *self.stride, *before, *after, *self.dilation)


def _outer_inner(batch: int, channels: int, data_format: str) -> tuple[int, int]:
    return (batch * channels, 1) if data_format == "channels_first" else (batch, channels)


def max_pool(
    geometry: PoolGeometry, dtype: np.dtype, with_indices: bool = True, aligned: bool = True, threads: int = THREADS
) -> list[Step]:
    """Return the launches from "x" to the maxima "out" and their int64 "indices".

    `aligned` says whether all arrays begin at multiples of 16 bytes, `threads` how many a block has.
    """
    return _reduction(geometry, dtype, MAXIMUM, with_indices=with_indices, aligned=aligned, threads=threads)


def avg_pool(
    geometry: PoolGeometry, dtype: np.dtype, count_padding: bool = True, divisor: int = 0,
    aligned: bool = True, threads: int = THREADS,
) -> list[Step]:  # fmt: skip
    """Return the launches from "x" to the averages "out"; divisor 0 means the number of elements."""
    return _reduction(geometry, dtype, AVERAGE, count_padding, divisor, aligned=aligned, threads=threads)


def lp_pool(
    geometry: PoolGeometry, dtype: np.dtype, power: float, aligned: bool = True, threads: int = THREADS
) -> list[Step]:
    """Return the launches from "x" to the norms "out"; partial windows are scaled up to whole ones."""
    return _reduction(geometry, dtype, NORM, True, 0, float(power), aligned=aligned, threads=threads)


def max_pool_grad(
    geometry: PoolGeometry, dtype: np.dtype, aligned: bool = True, threads: int = THREADS, kind: str = MATCHING
) -> list[Step]:
    """Return the launches from "grad_output" and "indices" to the gradient "out" of a maximum over these windows.

    An index that is not in its window counts for nothing: where windows are unknown, see :func:`scatter`.
    """
    return _spreading(geometry, dtype, kind, aligned=aligned, threads=threads)


def avg_pool_grad(
    geometry: PoolGeometry, dtype: np.dtype, count_padding: bool = True, divisor: int = 0,
    aligned: bool = True, threads: int = THREADS,
) -> list[Step]:  # fmt: skip
    """Return the launches from "grad_output" to the gradient "out" of an average."""
    return _spreading(geometry, dtype, EVERY, count_padding, divisor, aligned=aligned, threads=threads)


def lp_pool_grad_workspace(geometry: PoolGeometry, dtype: np.dtype) -> dict[str, Buffer]:
    """Return the buffers of `lp_pool_grad`."""
    shape = (geometry.batch * geometry.channels * math.prod(geometry.output_size),)
    return {"norms": Buffer(shape, dtype), "shares": Buffer(shape, dtype)}


def lp_pool_grad(geometry: PoolGeometry, dtype: np.dtype, power: float, threads: int = THREADS) -> list[Step]:
    """Return the launches from "grad_output" and "x", float32 or float64, to the gradient "out" of a norm.

    dx = sign(x) * |x|**(power - 1) * sum over windows of grad * norm**(1 - power)
    """
    g, element = geometry, Element.of(dtype)
    windows, pixels = (g.batch * g.channels * math.prod(size) for size in (g.output_size, g.input_size))
    if 0 in (windows, pixels):
        return avg_pool_grad(g, dtype, threads=threads)
    wide = needs_wide(windows, pixels)
    arrays = [(name, element.pointer) for name in ("grad_output", "norms", "shares")]
    numbers = (windows, _number(element, math.prod(g.kernel_size)))
    shares = launch(norm_shares(element, wide, power), arrays, numbers, wide, windows, threads)
    arrays = [(name, element.pointer) for name in ("x", "out")]
    slopes = launch(norm_slopes(element, wide, power), arrays, (pixels,), wide, pixels, threads)
    return [
        *renamed(lp_pool(g, dtype, power, threads=threads), out="norms"),
        shares,
        *renamed(avg_pool_grad(g, dtype, threads=threads), grad_output="shares"),
        slopes,
    ]


def scatter_workspace(shape: Any, size: Any, threads: int = THREADS) -> dict[str, Buffer]:
    """Return the buffers of `scatter`; "reach"[6] is 1 afterwards if an index was neither inside nor -1."""
    kind = index_dtype(_scatter_is_wide(shape, size))
    blocks = _reach_blocks(math.prod(shape), threads)
    return {"reaches": Buffer((blocks, REACH), kind), "reach": Buffer((REACH,), kind)}


def scatter(
    shape: tuple[int, ...], size: tuple[int, ...], dtype: np.dtype, latest: bool = False,
    aligned: bool = True, threads: int = THREADS,
) -> list[Step]:  # fmt: skip
    """Return the launches that put "grad_output" where "indices" say, in "out", whatever the windows were.

    Values at one place are added up, or the latest is taken (unpooling). First the reach of the indices is found: then
    an element knows which windows may name it.

    Parameters
    ----------
    shape : (outer, O, P, Q, inner)
        Of values and indices, as kernels see them.
    size : (D, H, W)
    """
    outer, O, P, Q, inner = shape
    wide, blocks = _scatter_is_wide(shape, size), _reach_blocks(math.prod(shape), threads)
    total = math.prod(shape)
    # Windows of nearly all pools are so far apart; a bad guess costs time, no more.
    strides = tuple(max(round(n / p), 1) if p > 1 else 1 for n, p in zip(size, shape[1:4]))
    ones = (1,) * 3
    sizes = _Sizes(outer, inner, tuple(size), (O, P, Q), ones, strides, ((0, 0),) * 3, ones)
    if 0 in (outer, inner, *size):
        return []
    found, reach = ((name, CPointer(index_type(wide))) for name in ("reaches", "reach"))
    numbers = (
        total, -(-total // blocks), *divisors((inner, Q, P, O), wide), *size, *strides, 0 if latest else -1,
    )  # fmt: skip
    find = step(find_reach(wide, threads), [("indices", CPointer(int64)), found], numbers, wide, (blocks,), (threads,))
    of_join = _join_threads(blocks)
    join = step(join_reaches(wide, of_join), [found, reach], (blocks,), wide, (1,), (of_join,))
    lanes = widest(dtype, inner) if aligned and dtype.name not in INTEGERS else 1
    back = Back(Element.of(dtype), LATEST if latest else MATCHING, wide, lanes, has_reach=True)
    return [find, join, _spread_step(sizes, back, spread_lanes(back), (inner // lanes, sizes.x[2]), 1.0, threads)]


def gather(
    shape: tuple[int, ...], size: int, dtype: np.dtype, aligned: bool = True, threads: int = THREADS
) -> list[Step]:
    """Return the launches that read from the planes "grad_output" of `size` elements what "indices" name, to "out".

    `shape` is (outer, windows, inner) of indices and result. An index outside the plane reads 0.
    """
    outer, windows, inner = shape
    wide = needs_wide(outer * inner * max(windows, size))
    lanes = widest(dtype, inner) if aligned else 1
    element, total = Element.of(dtype), math.prod(shape) // lanes
    if total == 0:
        return []
    arrays = [("grad_output", element.pointer), ("indices", CPointer(int64)), ("out", element.pointer)]
    numbers = (total, *divisors((inner // lanes, windows), wide), size)
    return [launch(pick(element, wide, lanes), arrays, numbers, wide, total, threads)]


def _reduction(
    g: PoolGeometry, dtype: np.dtype, operation: str, count_padding: bool = True, divisor: int = 0,
    power: float = 0.0, with_indices: bool = False, aligned: bool = True, threads: int = THREADS,
) -> list[Step]:  # fmt: skip
    sizes, element = _Sizes.of(g), Element.of(dtype)
    if 0 in (sizes.outer, sizes.inner, *sizes.y):
        return []
    # Vectors are of floating-point numbers.
    aligned = aligned and dtype.name not in INTEGERS
    factor = 1.0 if operation == MAXIMUM else _factor(g, count_padding, divisor)
    is_fixed = factor is not None
    factor = (1.0 if factor is None else factor) * (math.prod(g.kernel_size) if operation == NORM else 1)
    by_rows = g.data_format == "channels_first" and not g.is_adaptive and power >= 0 and aligned
    lanes = widest(dtype, sizes.y[2] if by_rows else sizes.inner) if aligned else 1
    how = How(element, operation, sizes.wide, lanes, g.is_adaptive, with_indices, count_padding, is_fixed, power)
    stretch = Stretch.forward(*sizes.last, sizes.x[2], dtype.itemsize, lanes) if by_rows else None
    if stretch is not None and lanes > 1 and stretch.registers <= MOST_STRETCH:
        kernel, across = reduce_rows(how, stretch), (sizes.y[2] // lanes, 1)
    else:
        how = how._replace(lanes=lanes if sizes.inner > 1 else 1)
        kernel, across = reduce_lanes(how), (sizes.inner // how.lanes, sizes.y[2])
    O, P, _ = sizes.y
    wide, total = how.wide, sizes.outer * O * P * math.prod(across)
    arrays = [("x", element.pointer), ("out", element.pointer), ("indices", CPointer(int64))]
    numbers = (_number(element, factor), total, *divisors((*across, P, O), wide), *sizes.x, *sizes.rest)
    return [launch(kernel, arrays, numbers, wide, total, threads)]


def _spreading(
    g: PoolGeometry, dtype: np.dtype, kind: str, count_padding: bool = True, divisor: int = 0,
    aligned: bool = True, threads: int = THREADS,
) -> list[Step]:  # fmt: skip
    sizes, element = _Sizes.of(g), Element.of(dtype)
    if 0 in (sizes.outer, sizes.inner, *sizes.x):
        return []
    factor = _factor(g, count_padding, divisor) if kind == EVERY else 1.0
    is_fixed, factor = factor is not None, 1.0 if factor is None else factor
    back = Back(element, kind, sizes.wide, 1, g.is_adaptive, False, count_padding, is_fixed)
    if g.data_format == "channels_first" and aligned and is_fixed and not g.is_adaptive:
        lanes = widest(dtype, sizes.x[2], sizes.y[2])
        stretch, own = Stretch.backward(*sizes.last, lanes), lanes * sizes.stride[2]
        if lanes > 1 and max(own, stretch.registers) <= MOST_STRETCH and (kind != EVERY or set(sizes.dilation) == {1}):
            back = back._replace(lanes=lanes)
            return [_spread_step(sizes, back, spread_rows(back, stretch), (-(-sizes.x[2] // own), sizes.x[2]), factor,
                                 threads, by_rows=True)]  # fmt: skip
    back = back._replace(lanes=widest(dtype, sizes.inner) if aligned else 1)
    across = (sizes.inner // back.lanes, sizes.x[2])
    return [_spread_step(sizes, back, spread_lanes(back), across, factor, threads)]


def _spread_step(
    sizes: _Sizes, back: Back, kernel: Any, across: tuple[int, int], factor: float, threads: int, by_rows: bool = False
) -> Step:
    D, H, _ = sizes.x
    element, wide = back.element, back.wide
    total = sizes.outer * D * H * across[0] * (1 if by_rows else across[1])
    arrays = [
        ("grad_output", element.pointer), ("indices", CPointer(int64)), ("reach", CPointer(index_type(wide))),
        ("out", element.pointer),
    ]  # fmt: skip
    numbers = (_number(element, factor), total, *divisors((*across, H, D), wide), *sizes.y, *sizes.rest)
    return launch(kernel, arrays, numbers, wide, total, threads)


def _factor(g: PoolGeometry, count_padding: bool, divisor: int) -> float | None:
    """Return what all windows' sums are multiplied by; None if their divisors differ."""
    if divisor:
        return 1.0 / divisor
    inside = [np.maximum(-((w[:, 0] - w[:, 1]) // w[:, 2]), 0) for w in g.windows]
    counts = [w[:, 3] for w in g.windows] if count_padding else inside
    if any(c.size == 0 or np.ptp(c) for c in counts):
        return None
    return 1.0 / max(math.prod(int(c[0]) for c in counts), 1)


def _number(element: Element, value: float) -> Any:
    return element.sums_dtype.type(value)


def _scatter_is_wide(shape: tuple[int, ...], size: tuple[int, ...]) -> bool:
    # Reaches are differences of places, and spans of differences.
    return needs_wide(math.prod(shape), shape[0] * shape[4] * math.prod(size), *(8 * n for n in (*shape[1:4], *size)))


def _reach_blocks(total: int, threads: int) -> int:
    return max(min(REACH_BLOCKS, -(-total // threads)), 1)


def _join_threads(blocks: int) -> int:
    return 1 << max((blocks - 1).bit_length(), 5)
