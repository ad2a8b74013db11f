"""Split precision: float32 convolution on units that multiply bfloat16.

Every float32 is split into planes of bfloat16, each the rounded rest of those before:

    x = h + m + l        x*w = hh + (hm + mh) + (hl + mm + lh) + (terms left out)

With three planes and six products ("x6") the error is that of a float32 sum, or less; with two planes and three
products ("x3") about 4e-6 of the result; with one ("x1") bfloat16's, 2e-3 (Henry, Tang & Heinecke, "Leveraging the
bfloat16 artificial intelligence datatype for higher-precision computations", 2019). Sums are in float32 always.

The loops are those of implicit GEMM: a job is some rows of an image, or some images. Its source is split into a strip
of planes in the cache, channels last and in blocks of 32, or, where channels are few, whole windows side by side; the
weight into panels of two tiles B per 32 channels and tap. Output gradients with respect to the weight sum over pixels
instead: rows of tile A are channels, each a row of pixels that begins at any tap, and B holds pairs of pixels.

An infinity times a small plane would be infinite too, and of any sign: an operand that is not finite, or rounds so,
is noticed when it is split, and the result computed again in float32. Numbers below 2**-126 count as zero, in each
plane and each product: results near 1e-36 lose precision and those below 1e-38 vanish.
"""

from functools import lru_cache
from itertools import pairwise, product
from math import prod
from typing import NamedTuple

import numpy as np

from ..activations import CODES
from ..registry import Buffer
from . import implicit_gemm, threads, units
from .bfloat16_grads import JOBS_PER_SUM, grad_plan, grad_tasks
from .bfloat16_tasks import tasks
from .blocking import Phase, plain_phases
from .machine import constants
from .memory import address, extent_of, layout_of
from .simd_bfloat16 import AMX, COLUMNS, DEPTH, EMULATED, PLANES, VECTORS, tile_configuration
from .strips import pack_table
from .tiles import ALIAS_BYTES, LINE, PANEL_BYTES, SPLIT_CYCLES, TILE_ROWS, VECTOR_ROWS, span, tile_cycles

# Steps of DEPTH products per running sum: the rounding error of a float32 sum grows with its length.
CHAIN = 160
# Bytes of planes that one job keeps in the second-level cache.
STRIP_BYTES = {AMX: 800 * 1024, EMULATED: 800 * 1024, VECTORS: 400 * 1024}
# Cycles to put the numbers of a window side by side, for 32 of them.
WINDOW_CYCLES = 20
# Cycles per second.
RATES: dict[int | None, float] = {AMX: 2.2e9, VECTORS: 3.3e9, EMULATED: 2e7}
# Operations that are done before a second thread has woken.
SERIAL_FLOPS = 1_000_000


class Strip(NamedTuple):
    """Planes of one image of a job: `rows` of `width` pixels for each depth, `pixel` bytes apart."""

    gathered: bool
    depths: int
    rows: int
    width: int
    pixel: int

    @property
    def image_bytes(self) -> int:
        """Bytes of one image."""
        return self.depths * self.rows * self.width * self.pixel


class Plan(NamedTuple):
    """Everything about one phase that depends on sizes alone."""

    phase: Phase
    strip: Strip
    # Whether pixels of a job are one row: of all its images, or of each, those between two rows thrown away.
    dense: bool
    flat: bool
    images: int
    rows: int
    # Rows of a tile.
    held: int
    # Channels of the source in float32 that windows are put together from: elements per image, 0 if not needed.
    floats: int
    # Source depth of each plane of the strip, relative to i*in_step.
    depths: np.ndarray
    # (offset in bytes, length) of each run of numbers a window is put together from, if it is.
    runs: np.ndarray
    # Byte offset in the strip of each step, and (first step, steps) of each chain.
    offsets: np.ndarray
    chains: np.ndarray
    # How the weight is packed: channels at a time, and where each row goes, see `pack_table`.
    channels: int
    stage_rows: int
    table: np.ndarray
    configuration: np.ndarray

    @property
    def steps(self) -> int:
        """Steps of DEPTH products per output element."""
        return len(self.offsets)

    @property
    def block_pixels(self) -> int:
        """Pixels of a block of results, those thrown away included."""
        return self.images * self.rows * (self.strip.width if self.flat else self.phase.size[2])


class Bfloat16:
    """The functions of an algorithm, see `registry`, for so many products of planes."""

    def __init__(self, products):
        self.products = products

    def supports(self, g, direction):
        """Every float32 geometry, where there is something that multiplies bfloat16."""
        if g.dtype != np.float32:
            return False, f"planes of bfloat16 are made of float32, not {g.dtype}"
        unit, reason = units.unit(self.products)
        return unit is not None, reason

    def seconds(self, g, direction, threads_):
        """Predicted time: the tiles' rate, less what their edges waste, and the traffic."""
        if g.batch == 0:
            return constants().launch
        unit, _ = units.unit(self.products)
        plans = [plan for _, plan in self._plans(g, direction, unit, threads_) if plan]
        C, K = _channels(g, direction)
        columns = -(-K // COLUMNS)
        cycles = 0.0
        for plan in plans:
            pixels = g.batch * g.groups * prod(plan.phase.size)
            cycles += pixels * columns * plan.steps * tile_cycles(unit, self.products, plan.held) / plan.held
            cycles += pixels * plan.steps / len(plan.phase.taps[1]) * SPLIT_CYCLES[self.products]
        multiplying, moving = cycles / (RATES[unit] * threads_), g.bytes / constants().bandwidth
        if unit != VECTORS:
            # Rates measured on another machine that has AMX, with other code: this one has never run there.
            return 4 * constants().launch + multiplying + 1.5 * moving
        # Fitted to ten layers on AVX512-BF16; sums of the weight gradient are read and written for each tile.
        shown = 0.2
        if direction == "weight_grad":
            multiplying, shown = 1.4 * multiplying, 0.6
        return 4 * constants().launch + max(multiplying, moving) + shown * min(multiplying, moving)

    def _plans(self, g, direction, unit, count):
        return _plans(g, direction, unit, self.products, count)

    def workspace(self, g, direction, limit):
        """Per thread a strip of planes and a block of results; the packed weight; what float32 arithmetic needs."""
        unit, _ = units.unit(self.products)
        count, exact = _count(g), implicit_gemm.workspace(g, direction, limit)
        if direction == "weight_grad":
            return {**self._grad_workspace(g, unit, count), **{f"exact {name}": b for name, b in exact.items()}}
        plans = [plan for _, plan in self._plans(g, direction, unit, count) if plan]
        buffers = {f"exact {name}": buffer for name, buffer in exact.items()}
        if not plans or g.batch == 0:
            return buffers
        C, K = _channels(g, direction)
        own = {
            "planes": (count, max(_strip_bytes(p) for p in plans)),
            "floats": (count, max(4 * p.floats for p in plans) + max(_stage_bytes(p, C, K) for p in plans)),
            "blocks": (count, max(p.block_pixels + 2 * TILE_ROWS for p in plans) * 4 * COLUMNS),
            "packed": (sum(_packed_bytes(p, g, K, self.products) for p in plans) + LINE,),
            "flags": (count * 8,),
        }
        return {**{name: Buffer(shape, np.dtype(np.uint8)) for name, shape in own.items()}, **buffers}

    def forward(self, g, x, weight, bias, activation, out, workspace):
        """Write the convolution of `x` with `weight`, plus bias, through the activation, to `out`."""
        if self._gather(g, "forward", x, weight, bias, activation, out, workspace):
            implicit_gemm.forward(g, x, weight, bias, activation, out, _exact(workspace))

    def input_grad(self, g, grad_output, weight, out, workspace):
        """Write the gradient with respect to the input to `out`."""
        if self._gather(g, "input_grad", grad_output, weight, None, None, out, workspace):
            implicit_gemm.input_grad(g, grad_output, weight, out, _exact(workspace))

    def _grad_plan(self, g, unit, count):
        """Return the phase as it is, and the plan for it without the pixels that are skipped."""
        ((phase, _),) = self._plans(g, "weight_grad", unit, count)
        C, K = _channels(g, "weight_grad")
        return phase, grad_plan(_without(phase), g.batch, C, -(-K // COLUMNS), unit, self.products, count)

    def _grad_workspace(self, g, unit, count):
        _, plan = self._grad_plan(g, unit, count)
        sums = g.groups * -(-g.out_channels // g.groups // COLUMNS) * plan.sums
        long = plan.jobs(g.batch) > JOBS_PER_SUM * count
        own = {
            "planes": plan.strip_bytes,
            "floats": plan.stage_bytes,
            "panels": len(plan.offsets) * 2048 * PLANES[self.products],
            "partial": 4 * sums,
            "sums": 8 * sums if long else 0,
            "flags": 8,
        }
        return {name: Buffer((count, size), np.dtype(np.uint8)) for name, size in own.items()}

    def weight_grad(self, g, grad_output, x, out, workspace):
        """Write the gradient with respect to the weight to `out`."""
        unit, _ = units.unit(self.products)
        (C, K), count = _channels(g, "weight_grad"), _count(g)
        phase, plan = self._grad_plan(g, unit, count)
        run = grad_tasks(unit, self.products, _literal_rows(unit, plan.held))
        layout, extent = _thinned(phase, x, g.data_format)
        flags = workspace["flags"].reshape(-1).view(np.float64)
        flags[...] = 0
        configuration = np.frombuffer(tile_configuration(TILE_ROWS), np.uint8)
        buffers = [workspace[name] for name in ("planes", "floats", "panels", "partial", "sums")]
        run.reduce(
            count, *layout, *layout_of(grad_output, g.data_format), *extent, g.batch, g.groups, C, K, *phase.size,
            *plan.phase.in_step, phase.taps[1][0][1], phase.taps[2][0][1], plan.gathered, plan.images, plan.rows,
            plan.width, plan.lines, plan.tiles, plan.row_bytes, plan.pixels * 2, len(plan.offsets),
            address(plan.offsets), address(plan.shifts), len(plan.shifts), address(plan.taps), len(plan.taps),
            address(plan.depths), len(plan.depths), plan.channel_floats, plan.columns,
            *(number for buffer in buffers for number in (address(buffer), buffer.shape[1])), address(flags),
            address(configuration),
        )  # fmt: skip
        tap_rows = C if plan.gathered else plan.tiles * plan.held
        run.unpack(
            count, address(out), g.groups, C, K, prod(g.kernel_size), tap_rows * 4 * COLUMNS, plan.sums * 4, count,
            *(number for buffer in buffers[3:] for number in (address(buffer), buffer.shape[1])),
        )  # fmt: skip
        # Gradients that are zero meet pixels that are not theirs: those that are not finite must not count.
        if flags.any():
            implicit_gemm.weight_grad(g, grad_output, x, out, _exact(workspace))

    def _gather(self, g, direction, source, weight, bias, activation, out, workspace):
        """Compute the result; return whether it has to be computed in float32."""
        unit, _ = units.unit(self.products)
        (C, K), count = _channels(g, direction), _count(g)
        plans = self._plans(g, direction, unit, count)
        if not all(plan for _, plan in plans):
            out[...] = 0
        if "flags" not in workspace:
            return False
        flags = workspace["flags"].view(np.float64)
        flags[...] = 0
        packed = _aligned(address(workspace["packed"]))
        for phase, plan in plans:
            if plan is None:
                continue
            run = tasks(unit, self.products, _literal_rows(unit, plan.held))
            planes, floats, blocks = (workspace[name] for name in ("planes", "floats", "blocks"))
            run.pack(
                count, packed, address(weight), *weight.strides[:2], g.groups, C, K, prod(g.kernel_size),
                direction == "input_grad", address(plan.table), plan.channels, plan.stage_rows,
                address(floats), floats.strides[0], address(flags),
            )  # fmt: skip
            layout, extent = _thinned(phase, source, g.data_format)
            run.gather(
                count, *layout, *layout_of(out, g.data_format), *extent, g.batch, g.groups, C, K,
                *phase.first, *phase.size, *phase.out_step, *plan.phase.in_step,
                phase.taps[1][0][1], phase.taps[2][0][1], plan.images, plan.rows, *plan.strip,
                plan.dense, plan.flat, plan.held, plan.floats,
                address(plan.depths), len(plan.depths), address(plan.runs), len(plan.runs), address(plan.offsets),
                address(plan.chains), len(plan.chains), plan.steps, CODES[activation],
                packed, 0 if bias is None else address(bias), address(planes), planes.strides[0],
                address(floats), floats.strides[0], address(blocks), blocks.strides[0], address(flags),
                address(plan.configuration), _strip_rows(plan.phase, plan.rows), _width(plan.phase),
                C * prod(map(len, phase.taps)), *((1, 1) if plan.strip.gathered else plan.phase.in_step[1:]),
            )  # fmt: skip
            packed += _packed_bytes(plan, g, K, self.products)
        return flags.any()


def _exact(workspace):
    return {name.removeprefix("exact "): array for name, array in workspace.items() if name.startswith("exact ")}


def _count(g):
    return 1 if g.flops < SERIAL_FLOPS else threads.count()


def _channels(g, direction):
    """Return the channels of one group that are summed over, and those that result."""
    C, K = g.in_channels // g.groups, g.out_channels // g.groups
    return (K, C) if direction == "input_grad" else (C, K)


def _aligned(place):
    return -(-place // LINE) * LINE


def _literal_rows(unit, held):
    """Return the rows of a tile that are compiled in: those of AMX are set when it runs."""
    return held if unit == VECTORS else TILE_ROWS


def _strip_bytes(plan):
    """Bytes of a job's planes, with room for a tile to run past the last pixel."""
    beyond = TILE_ROWS * plan.phase.in_step[2] * plan.strip.pixel
    return plan.images * plan.strip.image_bytes + int(plan.offsets.max(initial=0)) + beyond + 2 * LINE


def _stage_bytes(plan, C, K):
    """Bytes of float32 that wait to be split: a window, some pixels, or a part of a panel of the weight."""
    pixels = max(TILE_ROWS * C, plan.stage_rows) * 4
    return _aligned(max(pixels + 2 * LINE, plan.stage_rows * 4 * COLUMNS)) + 2 * LINE


def _packed_bytes(plan, g, K, products):
    return g.groups * -(-K // COLUMNS) * plan.steps * 2 * PLANES[products] * 1024


@lru_cache(maxsize=1024)
def _plans(g, direction, unit, products, count):
    """Plans of all phases; None for a phase that no tap meets, which is zero."""
    found = []
    for phase in plain_phases(g, direction):
        found.append((phase, _plan(g, direction, unit, products, count, phase) if all(phase.taps) else None))
    return tuple(found)


def _plan(g, direction, unit, products, count, phase):
    C, K = _channels(g, direction)
    phase = _without(phase)
    taps, planes = prod(map(len, phase.taps)), PLANES[products]
    choices = []
    kinds = [(False, False)]
    if phase.in_step[1] == phase.in_step[2]:
        kinds.append((False, True))
    if taps > 1:
        kinds.append((True, False))
    for gathered, flat in kinds:
        blocks = -(-(taps * C if gathered else C) // DEPTH)
        shape, steps = _shape(phase, gathered, blocks * LINE * planes), blocks * (1 if gathered else taps)
        choices.append(_cut(g, phase, shape, flat, steps, -(-K // COLUMNS), unit, products, count))
    _, strip, flat, dense, images, rows, held = min(choices, key=lambda choice: choice[0])
    offsets = _offsets(phase, strip, C, planes)
    order = [np.ravel_multi_index(tap, g.kernel_size) for tap in product(*([t for t, _ in d] for d in phase.taps))]
    channels = C if strip.gathered else DEPTH
    parts = -(-len(offsets) // CHAIN)
    edges = [part * len(offsets) // parts for part in range(parts + 1)]
    width = _width(phase)
    floats = 0
    if strip.gathered:
        floats = _aligned(len(phase.taps[0]) * _strip_rows(phase, rows) * width * C) + LINE
    return Plan(
        phase, strip, dense, flat, images, rows, held, floats,
        depths=np.array([delta for _, delta in phase.taps[0]], np.int64),
        runs=np.array(_runs(phase, rows, C) if strip.gathered else np.empty((0, 2)), np.int64),
        offsets=offsets,
        chains=np.array([(a, b - a) for a, b in pairwise(edges)], np.int64),
        channels=channels,
        stage_rows=-(-taps * channels // DEPTH) * DEPTH,
        table=pack_table(channels, prod(g.kernel_size), order, COLUMNS, 4, direction == "input_grad"),
        configuration=np.frombuffer(tile_configuration(held), np.uint8),
    )  # fmt: skip


def _strip_rows(phase, rows):
    return (rows - 1) * phase.in_step[1] + span(phase.taps[1])


def _width(phase):
    return (phase.size[2] - 1) * phase.in_step[2] + span(phase.taps[2])


def _skipped(phase):
    """Return, along each dimension, how many pixels a stride takes at a time where no tap meets those between."""
    return [s if len(taps) == 1 and taps[0][1] == 0 else 1 for s, taps in zip(phase.in_step, phase.taps)]


def _without(phase):
    """Return the phase over the source without the pixels that are skipped."""
    return phase._replace(in_step=tuple(s // skipped for s, skipped in zip(phase.in_step, _skipped(phase))))


def _thinned(phase, source, data_format):
    """Return layout and extent of the source without the pixels that are skipped."""
    place, n, c, *strides = layout_of(source, data_format)
    steps = _skipped(phase)
    extent = (-(-n // step) for n, step in zip(extent_of(source, data_format), steps))
    return (place, n, c, *(s * step for s, step in zip(strides, steps))), tuple(extent)


def _shape(phase, gathered, pixel):
    """Return the strip for one row of output."""
    if pixel % ALIAS_BYTES == 0:
        pixel += LINE
    if gathered:
        return Strip(True, 1, 1, phase.size[2], pixel)
    return Strip(False, len(phase.taps[0]), _strip_rows(phase, 1), _width(phase), pixel)


def _cut(g, phase, strip, flat, steps, panels, unit, products, count):
    """Return the jobs and tiles that take the busiest thread least time: (cycles, strip, flat, dense, ...)."""
    O, P, Q = phase.size
    per_row = strip.depths * (phase.in_step[1] if not strip.gathered else 1) * strip.width * strip.pixel
    halo = strip.image_bytes - per_row
    most = max((STRIP_BYTES[unit] - halo) // per_row, 1)
    choices = [(1, -(-P // parts)) for parts in range(-(-P // min(most, P)), min(P, -(-P // min(most, P)) + 16) + 1)]
    fits = STRIP_BYTES[unit] // max(per_row * P + halo, 1)
    choices += [(images, P) for images in range(2, min(fits, g.batch) + 1)]
    best = None
    for images, rows in choices:
        cut = strip._replace(rows=rows if strip.gathered else _strip_rows(phase, rows))
        dense = cut.depths == 1 and cut.rows == rows and cut.width == Q
        lines, pixels = images * rows, Q
        if dense:
            lines, pixels = 1, images * rows * Q
        elif flat:
            lines, pixels = images, (rows - 1) * cut.width + Q
        held = _best_rows(unit, products, pixels)
        tiles = lines * -(-pixels // held)
        tiles += tiles % 2 if unit != VECTORS else 0
        work = tiles * (steps * tile_cycles(unit, products, held) + 60) * panels
        work += max(steps * panels * 2048 * PLANES[products] / PANEL_BYTES, 0) / 2
        work += images * cut.image_bytes / (64 * PLANES[products]) * (
            SPLIT_CYCLES[products] + WINDOW_CYCLES * strip.gathered
        )  # fmt: skip
        jobs = -(-g.batch // images) * O * g.groups * -(-P // rows)
        cycles = -(-jobs // count) * work
        if best is None or cycles < best[0]:
            best = cycles, cut, flat, dense, images, rows, held
    return best


def _best_rows(unit, products, pixels):
    """Return the rows of a tile that waste least on a row of pixels."""
    choices = VECTOR_ROWS if unit == VECTORS else range(1, min(TILE_ROWS, max(pixels, 1)) + 1)
    return min(choices, key=lambda held: -(-pixels // held) * tile_cycles(unit, products, held))


def _offsets(phase, strip, C, planes):
    """Return the byte offset in the strip of each step: blocks of channels, and taps within; or a window's blocks."""
    block = LINE * planes
    if strip.gathered:
        depth = prod(map(len, phase.taps)) * C
        return np.arange(-(-depth // DEPTH), dtype=np.int64) * block
    rows, columns = phase.taps[1:]
    d = np.arange(strip.depths) * strip.rows * strip.width
    h = np.array([delta - rows[0][1] for _, delta in rows]) * strip.width
    w = np.array([delta - columns[0][1] for _, delta in columns])
    taps = (d[:, None, None] + h[:, None] + w).ravel() * strip.pixel
    return np.add.outer(np.arange(-(-C // DEPTH)) * block, taps).ravel().astype(np.int64)


def _runs(phase, rows, C):
    """Return (byte offset, length) of each run of numbers in float32 that a window is put together from."""
    taps, width = phase.taps, _width(phase)
    columns = [delta - taps[2][0][1] for _, delta in taps[2]]
    joined = span(taps[2]) == len(columns)
    runs = []
    for plane in range(len(taps[0])):
        for _, delta in taps[1]:
            start = (plane * _strip_rows(phase, rows) + delta - taps[1][0][1]) * width
            runs += [
                ((start + w) * C * 4, (len(columns) if joined else 1) * C) for w in columns[: 1 if joined else None]
            ]
    return runs


X1, X3, X6 = Bfloat16(1), Bfloat16(3), Bfloat16(6)
