"""How implicit GEMM cuts a convolution: phases, jobs, and tables of where everything lies.

A phase is a dense gather: target position first + i*out_step is the sum over taps of source positions
i*in_step + delta. Forward is one phase; a strided input gradient falls into stride**dims of them, each a dense
convolution of dy with the taps that meet it (Dumoulin & Visin 2016, section 4). A job is some rows of one image, or
some whole images: it reads a strip, which is a padded copy of its source with channels last, or the array in place
where that has channels last already and no padding is met. A register tile computes any pixels of a job, because the
tables here say where each pixel's window begins and where its result goes.

Everything depends on sizes alone, so that plans are kept.
"""

from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

import numpy as np

from .simd import Tile, tile_for
from .strips import pack_table

# Products per running sum: the rounding error of a float32 sum grows with its length.
CHAIN = 512
# Bytes of source that one job keeps in the second-level cache.
STRIP_BYTES = 400 * 1024
# Bytes of source that a job of several images keeps in the third-level cache: each is read once for 32 filters.
IMAGES_BYTES = 1536 * 1024
# Bytes of a cache line.
LINE = 64
# Rows of a tile that lie so many bytes apart share one set of the first-level cache.
ALIAS_BYTES = 4096
# Tiles of products that read each output gradient, up to which it is read where it is: a copy does not pay.
FEW_TILES = 4
# Pixels of a job: their tables stay small.
MOST_PIXELS = 4096
# Cycles to copy one element into a strip, in units of one multiply-add of vectors.
COPY_COST = 0.15
# Steps of a folded phase's runs, below which changing the columns costs too much; vectors of its columns at most;
# cost, relative to a phase that is not, above which it does not pay for scattering the results.
SHORTEST_RUN, MOST_COLUMNS, FOLDED_GAIN = 8, 4, 0.8
# Steps that a tile's start and end take as long as.
TILE_OVERHEAD = 12


class Phase(NamedTuple):
    """A dense gather: target position first + i*out_step reads source positions i*in_step + delta for each tap."""

    first: tuple[int, int, int]
    size: tuple[int, int, int]
    out_step: tuple[int, int, int]
    in_step: tuple[int, int, int]
    # Per dimension, (tap, delta) in the order of delta.
    taps: tuple[tuple[tuple[int, int], ...], ...]
    # Pixels that are computed side by side as columns, per dimension; one unless folded.
    fold: tuple[int, int, int] = (1, 1, 1)
    # If folded, the tap of the kernel that each tap of the phase is for each of those pixels, -1 for none.
    members: np.ndarray | None = None


class Images(NamedTuple):
    """Where a batch of images lies, apart from its address: sizes, and byte strides along N, C, D, H, W."""

    batch: int
    extent: tuple[int, int, int]
    strides: tuple[int, int, int, int, int]
    # Bytes from one group of channels to the next.
    group: int


class Strip(NamedTuple):
    """What a job reads: pixels of a copy, or of the source in place, and how many bytes they are apart."""

    in_place: bool
    # Rows of a copy for one row of results, and for each further one.
    span: int
    step: int
    # Pixels of a row.
    pitch: int
    # Bytes from pixel to pixel, row to row; planes and images of a copy follow from its rows.
    pixel: int
    row: int


class Cut(NamedTuple):
    """A job: `images` whole images, or `rows` rows of results of one."""

    images: int
    rows: int


class Plan(NamedTuple):
    """Everything about one phase that depends on sizes alone."""

    itemsize: int
    phase: Phase
    tile: Tile
    source: Images
    target: Images
    strip: Strip
    cut: Cut
    # Multiply-adds of a panel's width that the busiest thread does, copying included.
    cost: float
    # Products per result: rows of a packed panel. Columns of all panels of a group.
    depth: int
    columns: int
    # Source depth of each plane of the strip, relative to i*in_step.
    depths: np.ndarray
    # Byte offsets of each run of taps, from its pixel and in the panel; (first run, runs, steps) of each chain of runs.
    offsets: np.ndarray
    chains: np.ndarray
    # Byte offset of each product's source from its pixel, in the order of the panel; the last repeated to fill a tile.
    products: np.ndarray
    # What each kind of job is made of (see `_Kinds`), and the byte offset of that of (a whole job or the last, part).
    kinds: np.ndarray
    kind: np.ndarray
    # Byte offsets of each stretch of evenly spaced windows and of the gradients it meets.
    starts: np.ndarray
    # Byte offsets of the rows of a tile in a block.
    even: np.ndarray
    # Where each row of a panel goes, in the weight's own order.
    panel: np.ndarray
    # If folded, the columns that take part in each run: a bit for each, (panels, runs).
    masks: np.ndarray

    @property
    def images(self) -> tuple[int, int]:
        """Images in a job, and jobs for the whole batch."""
        return self.cut.images, -(-self.source.batch // self.cut.images)

    @property
    def rest(self) -> int:
        """Images of the last job."""
        return (self.source.batch - 1) % self.cut.images + 1

    @property
    def panels(self) -> int:
        """Panels of one group."""
        return -(-self.columns // self.tile.width)

    @property
    def parts(self) -> int:
        """Jobs for the rows of one image."""
        return -(-self.phase.size[1] // self.cut.rows)

    @property
    def jobs(self) -> int:
        """Jobs of one group."""
        return self.images[1] * self.phase.size[0] * self.parts

    @property
    def most_pixels(self) -> int:
        """Results of the largest job, for one channel."""
        return self.cut.images * self.cut.rows * self.phase.size[2]

    @property
    def strip_rows(self) -> int:
        """Rows of one plane of the strip."""
        return (self.cut.rows - 1) * self.strip.step + self.strip.span

    @property
    def image_bytes(self) -> int:
        """Bytes of one image's strip."""
        return len(self.depths) * self.strip_rows * self.strip.row

    @property
    def strip_bytes(self) -> int:
        """Bytes of a job's strip."""
        return 0 if self.strip.in_place else self.cut.images * self.image_bytes

    @property
    def panel_row(self) -> int:
        """Bytes of a row of a panel, and of a pixel of a block."""
        return self.itemsize * self.tile.width

    @property
    def joined(self) -> bool:
        """Whether all windows of one image's job are evenly spaced."""
        step, strip = self.phase.in_step, self.strip
        Q = self.phase.size[2]
        return self.cut.rows == 1 or Q == 1 or step[1] * strip.row == Q * step[2] * strip.pixel

    @property
    def straight(self) -> bool:
        """Whether a weight gradient reads whole vectors of output gradients in place."""
        strides, few = self.target.strides, self.depth <= FEW_TILES * self.tile.rows
        aligned = self.columns % self.tile.lanes == 0 and strides[4] % ALIAS_BYTES
        # With channels first the channels of single pixels lie side by side too, but not the pixels of several images.
        even = strides[0] == prod(self.target.extent) * strides[4]
        return bool(few and aligned and even and strides[1] == self.itemsize)

    @property
    def corner(self) -> tuple[int, int, int]:
        """Source position, relative to i*in_step, of the first tap."""
        d, h, w = (taps[0][1] for taps in self.phase.taps)
        return d, h, w


@lru_cache(maxsize=1024)
def plans(g, direction, threads):
    """Return (phase, plan) of all phases; the plan is None for a phase that no tap meets, which is zero."""
    size = g.dtype.itemsize
    x = _images(g.batch, g.in_channels, g.input_size, g.groups, g.data_format, size)
    y = _images(g.batch, g.out_channels, g.output_size, g.groups, g.data_format, size)
    C, K = g.in_channels // g.groups, g.out_channels // g.groups
    source, target, inner, outer = (y, x, K, C) if direction == "input_grad" else (x, y, C, K)
    found: list[tuple[Phase, Plan | None]] = []
    for phase in phases(g, direction, inner, outer):
        plan = _plan(g, direction, threads, phase, source, target, inner, outer) if all(phase.taps) else None
        found.append((phase, plan))
    return tuple(found)


def phases(g, direction, inner, outer):
    """Return the phases of a direction; the weight gradient has that of forward."""
    fold = (1, 1, 1) if direction == "weight_grad" else _best_fold(g, direction, inner, outer)
    if fold != (1, 1, 1):
        return (_folded(g, direction, fold),)
    return plain_phases(g, direction)


def plain_phases(g, direction):
    """Return the phases of a direction whose columns are channels alone."""
    if direction != "input_grad":
        taps = tuple(
            tuple((t, t * d - b) for t in range(k)) for k, d, (b, _) in zip(g.kernel_size, g.dilation, g.padding)
        )
        return (Phase((0, 0, 0), g.output_size, (1, 1, 1), g.stride, taps),)
    found = []
    for first in np.ndindex(*(min(s, n) for s, n in zip(g.stride, g.input_size))):
        count = tuple(-(-(n - f) // s) for n, f, s in zip(g.input_size, first, g.stride))
        taps = tuple(
            tuple(
                sorted(
                    ((t, (f + b - t * d) // s) for t in range(k) if (f + b - t * d) % s == 0), key=lambda tap: tap[1]
                )
            )
            for f, k, d, s, (b, _) in zip(first, g.kernel_size, g.dilation, g.stride, g.padding)
        )
        found.append(Phase(first, count, g.stride, (1, 1, 1), taps))
    return tuple(found)


def _best_fold(g, direction, inner, outer):
    """Return the pixels to compute side by side so that few channels fill the vectors: (1, 1, 1) for none.

    Each run of a folded phase is one tap, and some of its columns have no such tap.
    """
    lanes = tile_for(g.dtype.itemsize).lanes
    if inner < SHORTEST_RUN or 2 * outer > lanes:
        return 1, 1, 1
    base = g.stride if direction == "input_grad" else (1, 1, 1)

    def cost(fold):
        taps = prod(len(_offsets(g, direction, dim, fold[dim])) for dim in range(3))
        return -(-prod(fold) * outer // lanes) * taps / prod(fold)

    folds = [(base[0], base[1] * down, base[2] * across) for down in range(1, 5) for across in range(1, 9)]
    folds = [fold for fold in folds if prod(fold) * outer <= MOST_COLUMNS * lanes]
    best = min(folds, key=cost, default=(1, 1, 1))
    return best if folds and cost(best) < FOLDED_GAIN * prod(g.kernel_size) / prod(base) else (1, 1, 1)


def _offsets(g, direction, dim, fold):
    """Return {delta: taps for each of `fold` pixels, -1 for none} along one dimension."""
    stride, dilation, before = g.stride[dim], g.dilation[dim], g.padding[dim][0]
    found: dict[int, list[int]] = {}
    for pixel, tap in product(range(fold), range(g.kernel_size[dim])):
        if direction == "input_grad":
            delta, rest = divmod(pixel + before - tap * dilation, stride)
        else:
            delta, rest = pixel * stride + tap * dilation - before, 0
        if rest == 0:
            found.setdefault(delta, [-1] * fold)[pixel] = tap
    return dict(sorted(found.items()))


def _folded(g, direction, fold):
    """Return the one phase of a direction with `fold` pixels as columns."""
    offsets = [_offsets(g, direction, dim, fold[dim]) for dim in range(3)]
    (_, R, S), extent = g.kernel_size, g.input_size if direction == "input_grad" else g.output_size
    d, h, w = (np.array(list(along.values()), np.int64) for along in offsets)
    d, h, w = d[:, None, None, :, None, None], h[None, :, None, None, :, None], w[None, None, :, None, None, :]
    members = np.where((d >= 0) & (h >= 0) & (w >= 0), (d * R + h) * S + w, -1).reshape(-1, prod(fold))
    in_step = tuple(n // s if direction == "input_grad" else n * s for n, s in zip(fold, g.stride))
    size = tuple(-(-n // f) for n, f in zip(extent, fold))
    taps = tuple(tuple(enumerate(along)) for along in offsets)
    return Phase((0, 0, 0), size, fold, in_step, taps, fold, members)


def _masks(phase, tile, outer, inner, offsets, panel_row):
    """Return the columns that take part in each run, as the bits of one number for each panel."""
    there = np.repeat(phase.members >= 0, outer, axis=1)
    there = np.pad(there, ((0, 0), (0, -there.shape[1] % tile.width))).reshape(len(there), -1, tile.width)
    bits = there @ (1 << np.arange(tile.width, dtype=np.int64))
    return np.ascontiguousarray(bits[offsets[:, 1] // panel_row // inner].T)


def _images(batch, channels, extent, groups, data_format, size):
    D, H, W = extent
    if data_format == "channels_first":
        column = size
        channel = D * H * W * size
        image = channels * channel
    else:
        channel = size
        column = channels * size
        image = D * H * W * column
    group = channels // groups * channel
    # A single channel lies in any order.
    channel = size if channels == groups else channel
    return Images(batch, extent, (image, channel, H * W * column, W * column, column), group)


def _plan(g, direction, threads, phase, source, target, inner, outer):
    size = g.dtype.itemsize
    tile = tile_for(size)
    if phase.members is None:
        order = [np.ravel_multi_index(tap, g.kernel_size) for tap in product(*([t for t, _ in d] for d in phase.taps))]
        panel = pack_table(inner, prod(g.kernel_size), order, tile.width, size, direction == "input_grad")
        phase, source, target = _flattened(*_thinned(phase, source, size), target)
    else:
        panel = np.ascontiguousarray(phase.members)
    strip = _strip(phase, source, inner, size, direction)
    depth, columns = inner * prod(map(len, phase.taps)), outer * prod(phase.fold)
    if direction == "weight_grad":
        tile = _tile_for_products(tile, depth)
    cut, cost = _cut(phase, source, strip, g.groups, direction, threads, tile, (inner, depth, columns))
    nothing = np.empty(0, np.int64)
    plan = Plan(size, phase, tile, source, target, strip, cut, cost, depth, columns, *[nothing] * 8, panel, nothing)
    plan = plan._replace(depths=np.array([delta for _, delta in phase.taps[0]], np.int64))
    kinds = _Kinds(plan, inner)
    kind = np.array([[kinds.of(images, part) for part in range(plan.parts)] for images in (cut.images, plan.rest)])
    offsets = np.array(kinds.runs, np.int64)
    if phase.members is not None:
        plan = plan._replace(masks=_masks(phase, tile, outer, inner, offsets, plan.panel_row))
    return plan._replace(
        offsets=offsets,
        chains=np.array(kinds.chains, np.int64),
        products=_filled(_products(plan, inner), tile.rows),
        kinds=np.concatenate(kinds.tables),
        kind=kind * 8,
        starts=_starts(plan),
        even=np.arange(tile.rows, dtype=np.int64) * plan.panel_row,
    )


def _tile_for_products(tile, depth):
    """Return a tile with fewer rows if it wastes less on the last: rows are products here, and few layers have many."""
    choices = [tile, *(tile._replace(rows=rows) for rows in range(tile.rows - 1, tile.rows * 5 // 8, -1))]
    # Two more cycles a step, for its loads and the loop; and a gain that is worth compiling another tile.
    costs = [-(-depth // choice.rows) * (choice.rows + 2) for choice in choices]
    best = min(range(len(choices)), key=costs.__getitem__)
    return choices[best] if costs[best] < 0.97 * costs[0] else tile


def _thinned(phase, source, size):
    """Leave out the rows and pixels that a stride skips, where the kernel is one tap at 0."""
    extent, strides, in_step = list(source.extent), list(source.strides), list(phase.in_step)
    for dim in range(3):
        # Pixels with channels first are moved side by side or not at all.
        if phase.taps[dim][0][1] == 0 and len(phase.taps[dim]) == 1 and (dim < 2 or strides[1] == size):
            extent[dim] = -(-extent[dim] // in_step[dim])
            strides[2 + dim] *= in_step[dim]
            in_step[dim] = 1
    return phase._replace(in_step=tuple(in_step)), source._replace(extent=tuple(extent), strides=tuple(strides))


def _flattened(phase, source, target):
    """Make one column of all pixels where each result needs only the pixel in its place."""
    whole = phase.size == source.extent == target.extent
    if not whole or not all(len(taps) == 1 and taps[0][1] == 0 for taps in phase.taps):
        return phase, source, target
    count, batch = prod(phase.size), source.batch
    if not (_even(source) and _even(target)):
        return phase, source, target
    if all(images.strides[0] == count * images.strides[4] for images in (source, target)):
        count, batch = count * batch, 1
    phase = phase._replace(size=(1, count, 1), out_step=(1, 1, 1))
    source, target = (
        Images(batch, (1, count, 1), (*images.strides[:2], count * images.strides[4], *[images.strides[4]] * 2), group)
        for images, group in ((source, source.group), (target, target.group))
    )
    return phase, source, target


def _even(images):
    """Whether the pixels of an image are evenly spaced."""
    _, H, W = images.extent
    return images.strides[3] == W * images.strides[4] and images.strides[2] == H * images.strides[3]


def _strip(phase, source, channels, size, direction):
    """Read in place what lies in order and needs no padding; else pixels of a copy, kept off each other's sets."""
    spans = [taps[-1][1] - taps[0][1] + 1 for taps in phase.taps]
    inside = all(
        taps[0][1] >= 0 and (n - 1) * step + taps[-1][1] < extent
        for taps, n, step, extent in zip(phase.taps, phase.size, phase.in_step, source.extent)
    )
    # A weight gradient walks over the pixels once for every few channels: long pixels are copied to the cache first.
    inside = inside and (direction != "weight_grad" or channels * size <= 4 * LINE)
    neighbour = 2 if phase.size[2] > 1 else 1
    if inside and source.strides[1] == size and source.strides[2 + neighbour] * phase.in_step[neighbour] % ALIAS_BYTES:
        return Strip(True, spans[1], phase.in_step[1], source.extent[2], source.strides[4], source.strides[3])
    pitch = (phase.size[2] - 1) * phase.in_step[2] + spans[2]
    pixel = channels * size
    if pixel * phase.in_step[neighbour] % ALIAS_BYTES == 0:
        pixel += LINE
    return Strip(False, spans[1], phase.in_step[1], pitch, pixel, pitch * pixel)


def _cut(phase, source, strip, groups, direction, threads, tile, sizes):
    """Return the jobs that take the busiest thread least time, and how long."""
    (O, P, Q), planes, (inner, depth, outer) = phase.size, len(phase.taps[0]), sizes
    panels = -(-outer // tile.width) if outer > tile.lanes else 0.5
    half = max(tile.rows // 2, 1)
    reduces = direction == "weight_grad"

    @lru_cache
    def met(images):
        return 1.0 if reduces else _fraction_met(phase, source, tile, images)

    def strip_bytes(images, rows):
        return images * planes * ((rows - 1) * strip.step + strip.span) * strip.row

    def cost(images, rows):
        pixels = images * rows * Q
        if reduces:
            joined = rows == 1 or Q == 1 or phase.in_step[1] * strip.row == Q * phase.in_step[2] * strip.pixel
            stretches = images if joined else images * rows
            work = -(-depth // tile.rows) * tile.rows * (pixels + TILE_OVERHEAD + stretches)
        else:
            work = -(-pixels // half) * half * (depth * met(images) + TILE_OVERHEAD)
        copied = 0 if strip.in_place else strip_bytes(images, rows) // strip.pixel * inner * COPY_COST
        return work * panels + copied

    def fits(images, rows):
        few = images * rows * Q <= (CHAIN if reduces else MOST_PIXELS)
        return few and strip_bytes(images, rows) <= (STRIP_BYTES if images == 1 or reduces else IMAGES_BYTES)

    def busiest(cut):
        images, rows = cut
        whole, rest = divmod(P, rows)
        each = whole * cost(images, rows) + (cost(images, rest) if rest else 0)
        jobs = -(-source.batch // images) * O * groups * (whole + (rest > 0))
        return -(-jobs // threads) * each / (whole + (rest > 0))

    fewest = next((parts for parts in range(1, P + 1) if fits(1, -(-P // parts))), max(P, 1))
    choices = [Cut(1, max(-(-P // parts), 1)) for parts in range(fewest, min(fewest + 64, max(P, 1)) + 1)]
    if Q == 1:
        # Any number of single pixels can be a job: whole tiles.
        choices += [Cut(1, min(-(-cut.rows // half) * half, P)) for cut in choices if cut.rows > half]
    if O == 1:
        # A weight gradient's stretches are those of whole images.
        parts = (1,) if reduces else (1, 2, 4)
        each = [(images, -(-P // n) or 1) for images in range(2, source.batch + 1) for n in parts]
        choices += [Cut(images, rows) for images, rows in each if fits(images, rows)]
    best = min(choices, key=busiest)
    return best, busiest(best)


def _fraction_met(phase, source, tile, images):
    """Return the fraction of products that are left when tiles skip taps that meet nothing but padding."""
    if all(len(taps) == 1 for taps in phase.taps[1:]):
        return 1.0
    down, across = (_met(phase.taps[dim], 0, phase.size[dim], phase.in_step[dim], source.extent[dim]) for dim in (1, 2))
    tiles = _tiles_met(down, across, images, tile.rows)
    return float(np.prod(tiles[:, 1::2] - tiles[:, ::2], axis=1).mean()) / (len(phase.taps[1]) * len(phase.taps[2]))


def _tiles_met(down, across, images, rows):
    """Return the range of rows and of columns of taps that each tile meets: (tiles, 4)."""
    met = np.empty((len(down), len(across), images, 4), np.int64)
    met[..., :2], met[..., 2:] = down[:, None, None], across[None, :, None]
    met = met.reshape(-1, 4)
    met = np.pad(met, ((0, -len(met) % rows), (0, 0)), mode="edge").reshape(-1, rows, 4)
    return np.where([True, False, True, False], met.min(1), met.max(1))


def _taps(plan):
    """Return the byte offsets of every tap from its pixel: (planes, rows, columns)."""
    (planes, rows, columns), strip = plan.phase.taps, plan.strip
    step = plan.source.strides[2] if strip.in_place else plan.strip_rows * strip.row
    # The planes of a strip are those of the taps alone.
    d = [(delta - planes[0][1] if strip.in_place else number) * step for number, (_, delta) in enumerate(planes)]
    h, w = ([delta - taps[0][1] for _, delta in taps] for taps in (rows, columns))
    return np.add.outer(np.add.outer(d, np.multiply(h, strip.row)), np.multiply(w, strip.pixel))


def _products(plan, channels):
    """Return the byte offset of each product's source from its pixel, in the order of the panel."""
    return np.add.outer(_taps(plan).ravel(), np.arange(channels) * plan.itemsize).ravel()


def _pixels(plan, job):
    """Return byte offsets of a job's windows, of its results, and of those in a block: by row, column, image."""
    phase, strip, target = plan.phase, plan.strip, plan.target.strides
    image = plan.source.strides[0] if strip.in_place else plan.image_bytes
    p, q, i = np.ix_(np.arange(job.rows), np.arange(phase.size[2]), np.arange(job.images))
    windows = i * image + p * phase.in_step[1] * strip.row + q * phase.in_step[2] * strip.pixel
    results = i * target[0] + p * phase.out_step[1] * target[3] + q * phase.out_step[2] * target[4]
    block = ((i * job.rows + p) * phase.size[2] + q) * plan.panel_row
    return windows.ravel(), results.ravel(), block.ravel()


def _starts(plan):
    """Return byte offsets of each stretch of evenly spaced windows, and of the gradients it meets."""
    image = plan.source.strides[0] if plan.strip.in_place else plan.image_bytes
    rows = 1 if plan.joined else plan.cut.rows
    windows = np.add.outer(np.arange(plan.cut.images) * image, np.arange(rows) * plan.phase.in_step[1] * plan.strip.row)
    step = plan.most_pixels // windows.size * (plan.target.strides[4] if plan.straight else plan.panel_row)
    return np.stack([windows.ravel(), np.arange(windows.size) * step], axis=1).astype(np.int64)


def _filled(offsets, rows):
    """Repeat the last offset to fill a tile."""
    return np.pad(offsets, (0, -len(offsets) % rows), mode="edge").astype(np.int64)


class _Kinds:
    """Kinds of jobs: those that meet padding at the same places share tables.

    The tables of one kind are byte offsets of windows, of results and of results in a block, for every pixel, and
    (first chain, chains) of every tile. Taps that meet nothing but padding under a whole tile are left out.
    """

    def __init__(self, plan, channels):
        self.plan, self.channels, self.size = plan, channels, plan.itemsize
        self.taps = _taps(plan)
        self.runs, self.chains, self.tables, self.length = [], [], [], 0
        self.kinds: dict[tuple[object, ...], int] = {}
        self.ranges: dict[tuple[int, ...], tuple[int, int]] = {}

    def of(self, images, part):
        """Return where the tables of a job of so many images begin."""
        plan, phase = self.plan, self.plan.phase
        p0 = part * plan.cut.rows
        rows = min(plan.cut.rows, phase.size[1] - p0)
        down = _met(phase.taps[1], p0, rows, phase.in_step[1], plan.source.extent[1])
        key = (images, down.tobytes())
        if key not in self.kinds:
            self.kinds[key] = self.length
            across = _met(phase.taps[2], 0, phase.size[2], phase.in_step[2], plan.source.extent[2])
            self._add(Cut(images, rows), down, across)
        return self.kinds[key]

    def _add(self, job, down, across):
        rows = self.plan.tile.rows
        met = _tiles_met(down, across, job.images, rows)
        tiles = np.array([self._chains_of(taps) for taps in map(tuple, met.tolist())]).ravel()
        table = np.concatenate([*(_filled(offsets, rows) for offsets in _pixels(self.plan, job)), tiles])
        self.tables.append(table.astype(np.int64))
        self.length += len(table)

    def _chains_of(self, met):
        """Return (first chain, chains) for a range of rows and columns of taps."""
        if met not in self.ranges:
            first = len(self.chains)
            self._cut_into_chains(*self._runs_of(*met))
            self.ranges[met] = first, len(self.chains) - first
        return self.ranges[met]

    def _runs_of(self, r0, r1, s0, s1):
        """Return (byte offset from the pixel, row of the panel) of each run under some taps, and their length."""
        _, R, S = self.taps.shape
        columns = [delta for _, delta in self.plan.phase.taps[2]][s0:s1]
        joined = columns[-1] - columns[0] + 1 == len(columns)
        joined = joined and self.plan.strip.pixel == self.channels * self.size and self.plan.phase.members is None
        runs = [
            (int(plane[r, s]), ((number * R + r) * S + s) * self.channels)
            for number, plane in enumerate(self.taps)
            for r in range(r0, r1)
            for s in range(s0, s0 + 1 if joined else s1)
        ]
        return runs, (s1 - s0 if joined else 1) * self.channels

    def _cut_into_chains(self, runs, length):
        """Add chains of about CHAIN products: whole runs together, or parts of one."""
        panel_row = self.plan.panel_row
        if length <= CHAIN:
            together = CHAIN // length
            for start in range(0, len(runs), together):
                self.chains.append((len(self.runs) + start, min(together, len(runs) - start), length))
            self.runs += [(offset, row * panel_row) for offset, row in runs]
            return
        parts = -(-length // CHAIN)
        for offset, row in runs:
            for part in range(parts):
                start, end = part * length // parts, (part + 1) * length // parts
                self.chains.append((len(self.runs), 1, end - start))
                self.runs.append((offset + start * self.size, (row + start) * panel_row))


def _met(taps, first, count, step, extent):
    """Return the range of taps that meet the source, for each of `count` positions: (positions, 2)."""
    at = np.add.outer(np.arange(first, first + count) * step, [delta for _, delta in taps])
    # A window of nothing but padding has one tap, which gives 0.
    low = np.minimum((at < 0).sum(1), len(taps) - 1)
    return np.stack([low, np.maximum((at < extent).sum(1), low + 1)], axis=1)
