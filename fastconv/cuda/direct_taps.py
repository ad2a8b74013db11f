"""One result of a direct convolution, or of its input gradient: a sum over channels and taps.

`gather` in `direct.py` does it in every thread, `direct_tiled.py` for what came out as not a number.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from ..geometry import ConvGeometry
from .blocking import weight_steps
from .elements import Element
from .indices import index_type, quotient
from .sums import CHAIN

# --- the taps of one axis --------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def taps_of_output(wide: bool) -> Any:
    """Return the rule of the forward pass: which taps of an output are inside the input."""
    index, over = index_type(wide), quotient(wide)

    def taps(at, size, count, stride, before, dilation, tap_step, step):
        """Return (first tap, its place in the input, how many there are)."""
        start = index(at * stride - before)
        first = index(over(index(max(-start, 0) + dilation - 1), dilation))
        place = index(start + first * dilation)
        inside = index(0)
        if place < size:
            inside = index(over(index(size - 1 - place), dilation) + 1)
        return first, place, index(min(inside, count - first))

    return taps


@lru_cache(maxsize=2)
def taps_of_input(wide: bool) -> Any:
    """Return the rule of the input gradient: through which taps an input reaches which outputs."""
    index, over = index_type(wide), quotient(wide)

    def taps(at, size, count, stride, before, dilation, tap_step, step):
        """Return (first tap, its place in the output, how many there are); places go down by -step."""
        rest = index(at + before)
        first = index(0)
        # Residues repeat after tap_step taps.
        while first < tap_step and rest > 0 and index(index(over(rest, stride)) * stride) != rest:
            first = index(first + 1)
            rest = index(rest - dilation)
        if rest < 0 or first == tap_step:
            return index(0), index(0), index(0)
        place = index(over(rest, stride))
        # The last places are beyond the output where the input has a border that no window reaches.
        back = index(-step)
        skipped = index(over(index(max(place - size + 1, 0) + back - 1), back))
        first, place = index(first + skipped * tap_step), index(place - skipped * back)
        if place < 0 or first >= count:
            return index(0), index(0), index(0)
        left = index(over(index(count - 1 - first), tap_step) + 1)
        return first, place, index(min(left, index(over(place, back) + 1)))

    return taps


# --- all axes --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def sum_of_taps(element: Element, direction: str, channels_last: bool, wide: bool) -> Any:
    """Return the function that sums for one place (i, j, l) of a target what one group of the source has for it."""
    index, widen, sums = index_type(wide), element.widen, element.sums
    taps = (taps_of_output if direction == "forward" else taps_of_input)(wide)

    def sum_up(
        source, weight, n, i, j, l, group, own, B, D, H, W, sources, chain, T, R, S,
        weight_group, weight_target, weight_source, stride_d, stride_h, stride_w, pad_d, pad_h, pad_w,
        dilation_d, dilation_h, dilation_w, tap_d, tap_h, tap_w, step_d, step_h, step_w,
    ):  # fmt: skip
        pixel, channel = (B, index(1)) if channels_last else (index(1), index(D * H * W))
        t0, d0, count_t = taps(i, D, T, stride_d, pad_d, dilation_d, tap_d, step_d)
        r0, h0, count_r = taps(j, H, R, stride_h, pad_h, dilation_h, tap_h, step_h)
        s0, w0, count_s = taps(l, W, S, stride_w, pad_w, dilation_w, tap_w, step_w)
        first = index(n * B * D * H * W + group * sources * channel)
        filters = index(group * weight_group + own * weight_target)
        result = sums(0)
        for start in range(index(0), sources, chain):
            part = sums(0)
            for b in range(start, index(min(index(start + chain), sources))):
                for t in range(count_t):
                    d, plane = index(d0 + t * step_d), index((t0 + t * tap_d) * R)
                    for r in range(count_r):
                        h, row = index(h0 + r * step_h), index((plane + r0 + r * tap_h) * S + s0)
                        at = index(first + b * channel + ((d * H + h) * W + w0) * pixel)
                        tap = index(filters + b * weight_source + row)
                        for _ in range(count_s):
                            part += widen(source[at]) * widen(weight[tap])
                            at = index(at + step_w * pixel)
                            tap = index(tap + tap_w)
            result += part
        return result

    return sum_up


def numbers(g: ConvGeometry, direction: str) -> tuple[int, ...]:
    """Return what `sum_of_taps` takes from B on."""
    forward, taps = direction == "forward", math.prod(g.kernel_size)
    source = (g.in_channels, *g.input_size) if forward else (g.out_channels, *g.output_size)
    target_step, source_step, group_step = weight_steps(g, direction)
    common = [math.gcd(s, d) for s, d in zip(g.stride, g.dilation)]
    tap_steps = [1 if forward else s // c for s, c in zip(g.stride, common)]
    source_steps = [d if forward else -(d // c) for d, c in zip(g.dilation, common)]
    return (
        *source, source[0] // g.groups, max(CHAIN // taps, 1), *g.kernel_size,
        group_step, target_step, source_step,
        *g.stride, *(before for before, _ in g.padding), *g.dilation, *tap_steps, *source_steps,
    )  # fmt: skip
