"""Implicit GEMM: the matrix product of im2col without its matrix.

Every direction is one loop over pixels, with a strip of the source in the cache and the register tile of `simd.py`
inside:

    forward       y[i]  = sum over taps  x[i*stride + delta]  @ w[tap]      delta = tap*dilation - before
    input_grad    dx[i*stride + phase] = sum over the phase's taps  dy[i + delta] @ w[tap]^T
    weight_grad   dw[tap] = sum over pixels  x[i*stride + delta]^T @ dy[i]

`blocking.py` cuts this into phases and jobs (after Chetlur et al., "cuDNN: efficient primitives for deep learning",
2014, section 3), `strips.py` moves pixels and weights. The weight is packed once per call, a panel of filters at a
time, in the order of the taps. Bias and activation are applied in registers, and results of whole vectors with
channels last go straight to the output; all others pass through a block in the cache.
"""

from functools import lru_cache
from math import prod
from typing import NamedTuple

import numpy as np

from ..activations import CODES
from ..registry import Buffer
from . import threads
from .blocking import LINE, plans
from .epilogue import pad_bias
from .gemm_tasks import JOBS_PER_SUM, tasks
from .machine import constants
from .memory import address

IN_TASKS = True
# Operations that are done before a second thread has woken.
SERIAL_FLOPS = 1_000_000
# Seconds of a call beside its loops; what of the tile's peak remains on real data.
CALL_SECONDS, TILE_SHARE = 20e-6, 0.97
# Arguments of a gathering that follow those of its workspace, counted from the end.
BEFORE_MASKS = -9
# Elements of a weight that are packed before a second thread has woken.
SERIAL_WEIGHT = 16 * 1024
# Bytes of a weight's gradient beyond which a copy for each thread leaves its cache too often, and panels that are worth
# each thread's reading the whole input.
SHARED_BYTES, SHARED_PANELS = 256 * 1024, 8
# Bytes of output beyond which it is not kept in the caches: a quarter of a third-level cache.
STREAMED = 8 * 1024 * 1024


def supports(geometry, direction):
    """Every floating-point geometry."""
    if geometry.dtype.kind != "f":
        return False, f"the register tile is floating-point, not {geometry.dtype}"
    return True, ""


def seconds(geometry, direction, threads_):
    """Predicted time: what the tiles of the busiest thread take, or moving the arrays; the shorter partly hides."""
    g, machine = geometry, constants()
    if g.batch == 0:
        return CALL_SECONDS
    found = [plan for _, plan in plans(g, direction, min(threads_, _chunks(g))) if plan]
    rate = machine.flops * TILE_SHARE * 4 / g.dtype.itemsize / 2
    multiplying = sum(plan.cost * plan.tile.width for plan in found) / rate
    moving = g.bytes / machine.bandwidth
    hidden = 0.4 if direction == "weight_grad" else 0.8
    return CALL_SECONDS + max(multiplying, moving) + (1 - hidden) * min(multiplying, moving)


def _chunks(g):
    return 1 if g.flops < SERIAL_FLOPS else threads.count()


def _plans(g, direction):
    return plans(g, direction, _chunks(g))


def workspace(geometry, direction, limit):
    """Per thread a strip of the source and a block of the result; the packed weight or its gradient."""
    g, count = geometry, _chunks(geometry)
    found = [plan for _, plan in _plans(g, direction) if plan]
    if not found or g.batch == 0:
        return {}
    width = found[0].tile.width
    lines = LINE // g.dtype.itemsize
    strip = max(plan.strip_bytes for plan in found) // g.dtype.itemsize
    most = max(_whole(plan.most_pixels, plan.tile.rows) for plan in found)
    buffers = {
        "strips": Buffer((count, strip + lines), g.dtype),
        "blocks": Buffer((count, most * width + lines), g.dtype),
    }
    if direction == "weight_grad":
        split = _split(g, found[0])
        buffers["partial"] = Buffer((split.copies, split.panels * len(found[0].products) * width + lines), g.dtype)
        if split.long:
            buffers["sums"] = Buffer(buffers["partial"].shape, np.dtype(np.float64))
    else:
        packed = sum(g.groups * plan.panels * width * plan.depth for plan in found)
        buffers["packed"] = Buffer((packed + lines,), g.dtype)
        if direction == "forward":
            buffers["bias"] = Buffer((g.groups, found[0].panels * width), g.dtype)
    return buffers


def _aligned(place):
    return _whole(place, LINE)


def _whole(count, step):
    return -(-count // step) * step


class Split(NamedTuple):
    """How threads share a weight gradient: units of it, or pixels and a copy each."""

    panels: int
    segments: int
    copies: int
    long: bool


def _split(g, plan):
    """Share out a gradient that is large, or larger than the input, which every thread then reads."""
    count, number = _chunks(g), g.groups * plan.panels
    size = number * len(plan.products) * plan.tile.width
    large = size * plan.itemsize >= SHARED_BYTES and number >= SHARED_PANELS
    shared = large or size > g.batch * g.in_channels * prod(g.input_size)
    # Few panels are cut, so that each thread has as much to do.
    segments = count if shared and number % count and number < 8 * count else 1
    jobs = plan.jobs if shared else -(-plan.jobs // count)
    return Split(number, segments, 1 if shared else count, jobs > JOBS_PER_SUM)


def forward(geometry, x, weight, bias, activation, out, workspace):
    """Write the convolution of `x` with `weight`, plus bias, through the activation, to `out`."""
    pack(geometry, "forward", weight, workspace)
    run(geometry, "forward", x, weight, bias, activation, out, workspace)


def input_grad(geometry, grad_output, weight, out, workspace):
    """Write the gradient with respect to the input to `out`."""
    pack(geometry, "input_grad", weight, workspace)
    run(geometry, "input_grad", grad_output, weight, None, None, out, workspace)


def kept(geometry, direction):
    """Return the buffers that `pack` writes and `run` only reads."""
    return ("packed",)


@lru_cache(maxsize=1024)
def _phases(g, direction, count):
    """Return (phase, plan, bytes from the first packed weight to this phase's) of the phases that read a weight."""
    found, place = [], 0
    for phase, plan in plans(g, direction, count):
        if plan is not None and g.batch:
            found.append((phase, plan, place))
            place += g.groups * plan.panels * plan.depth * plan.panel_row
    return tuple(found)


@lru_cache(maxsize=1024)
def _packings(g, direction, count):
    """Return (plan, task, its arguments but for addresses) of each phase."""
    found, (inner, targets), taps_ = [], _channels(g, direction), prod(g.kernel_size)
    row = g.in_channels // g.groups * taps_ * g.dtype.itemsize
    for phase, plan, place in _phases(g, direction, count):
        run, folded = tasks(plan.tile, g.dtype.itemsize), phase.members is not None
        taps = plan.depth // inner if folded or direction == "forward" else taps_
        numbers = (
            1 if prod(g.weight_shape) < SERIAL_WEIGHT else count, place, 0, row, taps_ * g.dtype.itemsize,
            g.groups, inner, targets, taps, plan.depth, address(plan.panel), direction == "input_grad",
            prod(phase.fold),
        )  # fmt: skip
        # The plan holds the table.
        found.append((plan, run.pack_folded if folded else run.pack, np.array(numbers, np.int64)))
    return tuple(found)


def pack(geometry, direction, weight, workspace):
    """Put the weight into the order in which tiles read it."""
    for plan, task, numbers in _packings(geometry, direction, _chunks(geometry)):
        numbers = numbers.copy()
        numbers[1] += _aligned(address(workspace["packed"]))
        numbers[2] = address(weight)
        task.start(numbers, plan)


def _channels(g, direction):
    """Return the channels of one group that are summed over, and those that result."""
    C, K = g.in_channels // g.groups, g.out_channels // g.groups
    return (K, C) if direction == "input_grad" else (C, K)


@lru_cache(maxsize=1024)
def _gatherings(g, direction, code, count):
    """Return (plan, task, its arguments but for addresses, strides of the workspace and streaming) of each phase."""
    found, (inner, targets) = [], _channels(g, direction)
    for phase, plan, place in _phases(g, direction, count):
        run = tasks(plan.tile, g.dtype.itemsize)
        numbers = (
            count, 0, 0, *_numbers(plan, g.groups, inner),
            address(plan.kinds), address(plan.kind), address(plan.offsets), address(plan.chains), plan.depth, code,
            place, *[0] * 6, address(plan.masks), plan.masks.strides[0], *phase.fold, *plan.target.extent, targets,
        )  # fmt: skip
        found.append((plan, run.gather if phase.members is None else run.gather_folded, np.array(numbers, np.int64)))
    return tuple(found)


def run(geometry, direction, source, weight, bias, activation, out, workspace):
    """Write the convolution with the weight that `pack` has put into the workspace to `out`."""
    g, count = geometry, _chunks(geometry)
    found = _gatherings(g, direction, CODES[activation], count)
    if len(found) < len(plans(g, direction, count)):
        out[...] = 0
    if not found:
        return
    packed, strips_, blocks = (workspace[name] for name in ("packed", "strips", "blocks"))
    places = address(strips_), strips_.strides[0], address(blocks), blocks.strides[0]
    for plan, task, numbers in found:
        padded = 0
        if bias is not None:
            padded = address(workspace["bias"])
            copies = prod(plan.phase.fold)
            pad_bias(bias, g.groups, plan.columns // copies, copies, workspace["bias"])
        numbers = numbers.copy()
        numbers[1:3] = address(source), address(out)
        numbers[BEFORE_MASKS - 7 : BEFORE_MASKS] = (
            numbers[BEFORE_MASKS - 7] + _aligned(address(packed)), padded, _streams(plan, out), *places
        )  # fmt: skip
        task.start(numbers, plan)


def _streams(plan, out):
    """Whether results pass the caches by: there are too many to be there when they are read."""
    lines = all(place % LINE == 0 for place in (address(out), plan.target.group, *plan.target.strides[2:]))
    return out.nbytes >= STREAMED and lines and plan.target.strides[0] % LINE == 0


def _numbers(plan, groups, inner):
    """Return what every task over a plan's jobs begins with, after the addresses of source and target."""
    phase, strip = plan.phase, plan.strip
    return (
        *plan.source.strides, plan.source.group, *plan.target.strides, plan.target.group, *plan.source.extent,
        plan.source.batch, groups, inner, plan.columns, *phase.size, *phase.first, *phase.out_step, *phase.in_step,
        *plan.corner, plan.cut.images, plan.cut.rows, strip.in_place, plan.strip_rows, strip.pitch, strip.pixel,
        strip.row, plan.image_bytes, address(plan.depths), len(plan.depths), address(plan.even),
    )  # fmt: skip


def weight_grad(geometry, grad_output, x, out, workspace):
    """Write the gradient with respect to the weight to `out`."""
    g = geometry
    if g.batch == 0:
        out[...] = 0
        return
    ((_, plan),) = _plans(g, "weight_grad")
    (C, K), split, count = _channels(g, "weight_grad"), _split(g, plan), _chunks(g)
    strips_, blocks, partial = (workspace[name] for name in ("strips", "blocks", "partial"))
    sums = workspace["sums"] if split.long else None
    run = tasks(plan.tile, g.dtype.itemsize)
    where = (
        split.copies, split.segments, len(plan.products), address(partial), partial.strides[0],
        0 if sums is None else address(sums), 0 if sums is None else sums.strides[0],
    )  # fmt: skip
    run.reduce(
        count, address(x), address(grad_output), *_numbers(plan, g.groups, C), *where, address(plan.products),
        address(plan.starts), plan.joined, plan.straight,
        address(strips_), strips_.strides[0], address(blocks), blocks.strides[0],
    )  # fmt: skip
    serial = split.copies * out.size < SERIAL_WEIGHT
    run.unpack(1 if serial else count, address(out), *out.strides[:2], g.groups, C, K, plan.depth // C, *where)
