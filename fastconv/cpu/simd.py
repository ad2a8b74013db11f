"""Vector code: with `simd_*.py`, each for a family of kernels, and `vector_ir.py` the only place with LLVM IR.

One microkernel serves every dense convolution and every direction. It multiplies a tile of `rows` x `columns` vectors,
held in registers, over a reduction that is a list of runs through memory:

    out[i, :] (+)= sum over runs, steps  a[offset[run] + i*a_row + step*a_step] * b[step'*b_step + :]

where `step'` counts through all runs: `b` is read in one sweep. Forward and input gradient take pixels as rows and
filters as columns, and a run is a row of kernel taps; the weight gradient takes channels as rows, and a run is a row
of pixels. Everything is a byte address or a byte stride, so no index arithmetic is left inside.

The vector width is that of the CPU found at run time. Intrinsics live at module level and take their shape as literal
integers: made in a factory they would miss Numba's disk cache in every process.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .vector_ir import (
    I8P,
    I32,
    I64,
    change_if,
    fetch_line,
    fma_of,
    lanes_below,
    load_vector,
    masked_load,
    masked_store,
    multiples,
    prefetch,
    rectify,
    shuffle,
    splat,
    table_of,
    vector_type,
    with_alignment,
)


class Tile(NamedTuple):
    """A register tile: `rows` scalars broadcast against `columns` vectors of `lanes` elements."""

    rows: int
    columns: int
    lanes: int

    @property
    def width(self) -> int:
        """Elements along the vectors."""
        return self.columns * self.lanes


@lru_cache(maxsize=1)
def cpu_features() -> frozenset[str]:
    """Return the instruction sets that Numba compiles for, as LLVM spells them: the host's, or those asked for."""
    told = numba.config.CPU_FEATURES  # type: ignore[attr-defined]
    if told is not None:
        return frozenset(name[1:] for name in told.split(",") if name.startswith("+"))
    return frozenset(name for name, there in llvm.get_host_cpu_features().items() if there)


@lru_cache(maxsize=1)
def instruction_set() -> str:
    """Return the vector instructions kernels are written for."""
    features = cpu_features()
    if "avx512f" in features:
        return "avx512"
    if {"avx2", "fma"} <= features:
        return "avx2"
    return "neon" if "neon" in features else "generic"


def tile_for(itemsize: int, small: bool = False) -> Tile:
    """Return the register tile for elements of `itemsize` bytes; the small one wastes less on short rows.

    Accumulators and the vectors of one step fill the register file: 14x2 + 2 + 1 of 32, 6x2 + 2 + 1 of 16.
    """
    rows, small_rows, columns, nbytes = {
        "avx512": (14, 8, 2, 64),
        "avx2": (6, 4, 2, 32),
        "neon": (8, 4, 3, 16),
        "generic": (4, 4, 2, 16),
    }[instruction_set()]
    return Tile(small_rows if small else rows, columns, nbytes // itemsize)


@intrinsic(prefer_literal=True)
def load(typing_context, itemsize, place):
    """The float (4 bytes) or double (8 bytes) at an address."""
    kind = types.float32 if itemsize.literal_value == 4 else types.float64

    def generate(context, builder, signature, args):
        return builder.load(builder.inttoptr(args[1], context.get_value_type(kind).as_pointer()))

    return kind(itemsize, types.int64), generate


@intrinsic(prefer_literal=True)
def store(typing_context, itemsize, place, value):
    """Write a float (4 bytes) or double (8 bytes) to an address."""
    kind = types.float32 if itemsize.literal_value == 4 else types.float64

    def generate(context, builder, signature, args):
        builder.store(args[2], builder.inttoptr(args[1], context.get_value_type(kind).as_pointer()))
        return context.get_dummy_value()

    return types.void(itemsize, types.int64, kind), generate


@intrinsic(prefer_literal=True)
def integers(typing_context, place, start, count):
    """A tuple of `count` int64 numbers, from number `start` at an address on."""
    first, number = start.literal_value, count.literal_value

    def generate(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], I64.as_pointer())
        values = [builder.load(builder.gep(pointer, [ir.Constant(I64, first + i)])) for i in range(number)]
        return context.make_tuple(builder, signature.return_type, values)

    return types.UniTuple(types.int64, number)(types.int64, start, count), generate


@intrinsic
def integer(typing_context, place, at):
    """The int64 number `at` those at an address."""

    def generate(context, builder, signature, args):
        return builder.load(builder.gep(builder.inttoptr(args[0], I64.as_pointer()), [args[1]]))

    return types.int64(types.int64, types.int64), generate


@intrinsic
def store_integer(typing_context, place, at, value):
    """Write the int64 number `at` those at an address."""

    def generate(context, builder, signature, args):
        builder.store(args[2], builder.gep(builder.inttoptr(args[0], I64.as_pointer()), [args[1]]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def call(typing_context, function, arguments, chunk):
    """Call the function at an address with two int64 arguments."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [I64, I64])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def fetch(typing_context, place):
    """Begin to load the cache line at an address, which may be anything, into the second-level cache."""

    def generate(context, builder, signature, args):
        fetch_line(builder, builder.inttoptr(args[0], I8P), level=2)
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def fence(typing_context):
    """Wait until all that was written is seen by all threads, streamed results too."""

    def generate(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def copy_bytes(typing_context, target, source, count):
    """memcpy of `count` bytes between addresses."""

    def generate(context, builder, signature, args):
        to, fro = (builder.inttoptr(a, I8P) for a in args[:2])
        cgutils.raw_memcpy(builder, to, fro, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic(prefer_literal=True)
def copy_part(typing_context, lanes, itemsize, target, source, count):
    """Copy up to `lanes` elements as one vector, where memcpy's call would take longer."""
    shape = lanes.literal_value, itemsize.literal_value

    def generate(context, builder, signature, args):
        target, source, count = args[2:]
        kind = vector_type(*shape)
        inside = lanes_below(builder, count, shape[0])
        pointers = [builder.bitcast(builder.inttoptr(a, I8P), kind.as_pointer()) for a in (target, source)]
        value = masked_load(builder, pointers[1], inside, vector_type(*shape))
        masked_store(builder, value, pointers[0], inside)
        return context.get_dummy_value()

    return types.void(lanes, itemsize, *[types.int64] * 3), generate


@intrinsic
def zero_bytes(typing_context, target, count):
    """Set `count` bytes at an address to zero."""

    def generate(context, builder, signature, args):
        cgutils.memset(builder, builder.inttoptr(args[0], I8P), args[1], 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic(prefer_literal=True)
def transpose_block(typing_context, lanes, itemsize, source, source_row, rows, columns, target, target_row):
    """Transpose up to `lanes` x `lanes` elements: target[j*target_row + i*size] = source[i*source_row + j*size].

    `i` stays below `rows` and `j` below `columns`: nothing beyond is read or written.
    """
    shape = lanes.literal_value, itemsize.literal_value

    def generate(context, builder, signature, args):
        source, source_row, rows, columns, target, target_row = args[2:]
        full = ir.Constant(I64, shape[0])
        whole = builder.and_(builder.icmp_signed(">=", rows, full), builder.icmp_signed(">=", columns, full))
        with builder.if_else(whole) as (then, otherwise):
            with then:
                _transpose(builder, *shape, source, source_row, target, target_row)
            with otherwise:
                _transpose(builder, *shape, source, source_row, target, target_row, rows, columns)
        return context.get_dummy_value()

    return types.void(lanes, itemsize, *[types.int64] * 6), generate


@intrinsic(prefer_literal=True)
def scatter_transposed(typing_context, lanes, itemsize, source, source_row, rows, columns, target, offsets):
    """Transpose as `transpose_block` does; row `j` goes to int64 number `j` at `offsets`, unless that is negative.

    Rows of the target are written whole, `lanes` long, with zeros from `rows` on.
    """
    shape = lanes.literal_value, itemsize.literal_value

    def generate(context, builder, signature, args):
        source, source_row, rows, columns, target, offsets = args[2:]
        vectors, _ = _transposed(builder, *shape, source, source_row, rows, columns)
        table, base = builder.inttoptr(offsets, I64.as_pointer()), builder.inttoptr(target, I8P)
        for j, vector in enumerate(vectors):
            with builder.if_then(builder.icmp_signed(">", columns, ir.Constant(I64, j))):
                offset = builder.load(builder.gep(table, [ir.Constant(I64, j)]))
                with builder.if_then(builder.icmp_signed(">=", offset, ir.Constant(I64, 0))):
                    place = builder.bitcast(builder.gep(base, [offset]), vector.type.as_pointer())
                    builder.store(vector, place).align = shape[1]
        return context.get_dummy_value()

    return types.void(lanes, itemsize, *[types.int64] * 6), generate


def _transpose(builder, lanes, itemsize, source, source_row, target, target_row, rows=None, columns=None):
    """Transpose a whole block, or `rows` x `columns` of it."""
    vectors, mask = _transposed(builder, lanes, itemsize, source, source_row, rows, columns)
    place = builder.inttoptr(target, I8P)
    for j, vector in enumerate(vectors):
        pointer = builder.bitcast(place, vector.type.as_pointer())
        if rows is None:
            builder.store(vector, pointer).align = itemsize
        else:
            inside = builder.and_(mask, splat(builder, builder.icmp_signed(">", columns, ir.Constant(I64, j)), lanes))
            masked_store(builder, vector, pointer, inside)
        place = builder.gep(place, [target_row])


def _transposed(builder, lanes, itemsize, source, source_row, rows, columns):
    """Return the columns of a block as vectors, zeros from `rows` and `columns` on, and the mask of `rows`."""
    kind = vector_type(lanes, itemsize)
    place = builder.inttoptr(source, I8P)
    across = None if columns is None else lanes_below(builder, columns, lanes)
    vectors = []
    for i in range(lanes):
        pointer = builder.bitcast(place, kind.as_pointer())
        if across is None:
            vectors.append(builder.load(pointer))
            vectors[-1].align = itemsize
        else:
            inside = builder.and_(across, splat(builder, builder.icmp_signed(">", rows, ir.Constant(I64, i)), lanes))
            vectors.append(masked_load(builder, pointer, inside, vector_type(lanes, itemsize)))
        place = builder.gep(place, [source_row])
    # One bit of the row number changes places with the same bit of the column number at a time.
    distance = lanes // 2
    while distance:
        low = [j if not j & distance else lanes + j - distance for j in range(lanes)]
        high = [j + distance if not j & distance else lanes + j for j in range(lanes)]
        for i in range(lanes):
            if not i & distance:
                pair = vectors[i], vectors[i + distance]
                vectors[i] = shuffle(builder, *pair, low)
                vectors[i + distance] = shuffle(builder, *pair, high)
        distance //= 2
    return vectors, None if rows is None else lanes_below(builder, rows, lanes)


@intrinsic(prefer_literal=True)
def multiply_tile(
    typing_context, rows, columns, lanes, itemsize, a, a_row, a_step, offsets, runs, steps, b, b_step, out, out_row, add
):
    """Compute one tile; see the module. `offsets` is the address of `runs` int64 byte offsets, each run `steps` long.

    With `add` not zero the tile is added to what `out` holds.
    """
    shape = [t.literal_value for t in (rows, columns, lanes, itemsize)]
    signature = types.void(rows, columns, lanes, itemsize, *[types.int64] * 11)

    def generate(context, builder, signature, args):
        a, a_row, a_step, offsets, runs, steps, b, b_step, out, out_row, add = args[4:]
        tile = Tile(*shape[:3])
        a_rows, out_rows = (multiples(builder, step, tile.rows) for step in (a_row, out_row))
        sums = _generate_tile(builder, tile, shape[3], a, a_rows, a_step, offsets, runs, steps, b, b_step)
        store_tile(builder, tile, shape[3], sums, out, out_rows, add)
        return context.get_dummy_value()

    return signature, generate


@intrinsic(prefer_literal=True)
def multiply_rows(
    typing_context, rows, columns, lanes, itemsize, masked, fetching,
    a, a_rows, a_step, offsets, runs, steps, b, b_step, out, out_rows, add, bias, code, stream, masks, ahead, stride,
):  # fmt: skip
    """Compute one tile as `multiply_tile` does, of rows that lie anywhere, through a bias and an activation.

    `a_rows` and `out_rows` are addresses of `rows` int64 byte offsets, `offsets` that of two for each run: where it
    begins in `a` and in `b`. `bias` is the address of one number per column, or 0; `code` that of an activation: 0 for
    none, 1 for ReLU, 2 for leaky ReLU. With `stream` the results, which then begin cache lines, pass the caches by. If
    `masked`, each run leaves out the columns whose bit is not set in its int64 number at `masks`. If `fetching`,
    every step begins to load the line at `ahead`, which moves on by `stride` bytes.
    """
    shape = [t.literal_value for t in (rows, columns, lanes, itemsize)]
    signature = types.void(rows, columns, lanes, itemsize, masked, fetching, *[types.int64] * 17)
    has_masks, fetches = bool(masked.literal_value), bool(fetching.literal_value)

    def generate(context, builder, signature, args):
        a, a_rows, a_step, offsets, runs, steps, b, b_step, out, out_rows, add, bias, code, stream, masks = args[6:21]
        tile = Tile(*shape[:3])
        sums = _generate_tile(
            builder, tile, shape[3], a, table_of(builder, a_rows, tile.rows), a_step, offsets, runs, steps, b, b_step,
            pairs=True, masks=masks if has_masks else None, ahead=args[21:] if fetches else (),
        )  # fmt: skip
        store_tile(builder, tile, shape[3], sums, out, table_of(builder, out_rows, tile.rows), add, bias, code, stream)
        return context.get_dummy_value()

    return signature, generate


def _generate_tile(
    builder, tile, itemsize, a, row_offsets, a_step, offsets, runs, steps, b, b_step, pairs=False, masks=None, ahead=()
):
    """Return the sums of a tile: vectors, row by row. With `pairs` each run has its own place in `b` too.

    `ahead` is what each step fetches, and how far the next one's is from there.
    """
    scalar = ir.FloatType() if itemsize == 4 else ir.DoubleType()
    vector = ir.VectorType(scalar, tile.lanes)
    nbytes = tile.lanes * itemsize
    fma = fma_of(builder, vector)
    count = tile.rows * tile.columns
    entry = builder.block
    run_block, step_block, run_end, done = (
        builder.append_basic_block(name) for name in ("run", "step", "run_end", "done")
    )
    a_start, b_start = builder.inttoptr(a, I8P), builder.inttoptr(b, I8P)
    far_start = builder.inttoptr(ahead[0], I8P) if ahead else None
    table = builder.inttoptr(offsets, I64.as_pointer())
    zero = ir.Constant(vector, [0.0] * tile.lanes)
    builder.branch(run_block)

    builder.position_at_end(run_block)
    run, b_run = builder.phi(I64), builder.phi(I8P)
    far_run: Any = builder.phi(I8P) if ahead else None
    held = [builder.phi(vector) for _ in range(count)]
    if pairs:
        place = builder.gep(table, [builder.shl(run, ir.Constant(I64, 1))])
        a_run = builder.gep(a_start, [builder.load(place)])
        b_first = builder.gep(b_start, [builder.load(builder.gep(place, [ir.Constant(I64, 1)]))])
    else:
        a_run, b_first = builder.gep(a_start, [builder.load(builder.gep(table, [run]))]), b_run
    inside = [] if masks is None else _masks_of(builder, tile, masks, run)
    builder.branch(step_block)

    builder.position_at_end(step_block)
    step, a_now, b_now = builder.phi(I64), builder.phi(I8P), builder.phi(I8P)
    far: Any = builder.phi(I8P) if ahead else None
    sums = [builder.phi(vector) for _ in range(count)]
    weights = [load_vector(builder, b_now, j * nbytes, vector, itemsize) for j in range(tile.columns)]
    prefetch(builder, b_now, tile.columns * nbytes)
    if ahead:
        fetch_line(builder, far, level=3)
    fresh = []
    for i in range(tile.rows):
        value = _broadcast(builder, builder.gep(a_now, [row_offsets[i]]), scalar, tile.lanes)
        for j in range(tile.columns):
            before = sums[i * tile.columns + j]
            after = builder.call(fma, [value, weights[j], before])
            fresh.append(builder.select(inside[j], after, before) if inside else after)
    step_next = builder.add(step, ir.Constant(I64, 1))
    a_next, b_next = builder.gep(a_now, [a_step]), builder.gep(b_now, [b_step])
    far_next = builder.gep(far, [ahead[1]]) if ahead else None
    builder.cbranch(builder.icmp_signed("<", step_next, steps), step_block, run_end)

    builder.position_at_end(run_end)
    run_next = builder.add(run, ir.Constant(I64, 1))
    builder.cbranch(builder.icmp_signed("<", run_next, runs), run_block, done)
    for phi, first, later in [(run, ir.Constant(I64, 0), run_next), (b_run, b_start, b_next)] + [
        (held[i], zero, fresh[i]) for i in range(count)
    ]:
        phi.add_incoming(first, entry)
        phi.add_incoming(later, run_end)
    for phi, first, later in [
        (step, ir.Constant(I64, 0), step_next),
        (a_now, a_run, a_next),
        (b_now, b_first, b_next),
    ]:
        phi.add_incoming(first, run_block)
        phi.add_incoming(later, step_block)
    if ahead:
        far_run.add_incoming(far_start, entry)
        far_run.add_incoming(far_next, run_end)
        far.add_incoming(far_run, run_block)
        far.add_incoming(far_next, step_block)
    for i in range(count):
        sums[i].add_incoming(held[i], run_block)
        sums[i].add_incoming(fresh[i], step_block)

    builder.position_at_end(done)
    return fresh


def _masks_of(builder, tile, masks, run):
    """Return the mask of each vector of columns, from the bits of the run's number."""
    bits = builder.load(builder.gep(builder.inttoptr(masks, I64.as_pointer()), [run]))
    lane_bits, lanes = ir.IntType(tile.lanes), ir.VectorType(ir.IntType(1), tile.lanes)
    return [
        builder.bitcast(builder.trunc(builder.lshr(bits, ir.Constant(I64, j * tile.lanes)), lane_bits), lanes)
        for j in range(tile.columns)
    ]


def store_tile(builder, tile, itemsize, values, out, out_rows, add, bias=None, code=None, stream=None):
    """Store a tile, or add it to what is there; then bias and activation, if any."""
    nbytes, base, vector = tile.lanes * itemsize, builder.inttoptr(out, I8P), values[0].type
    places = [
        builder.bitcast(builder.gep(base, [builder.add(row, ir.Constant(I64, j * nbytes))]), vector.as_pointer())
        for row in out_rows
        for j in range(tile.columns)
    ]
    values = change_if(builder, add, values, lambda sums: [
        builder.fadd(value, with_alignment(builder.load(place), itemsize)) for value, place in zip(sums, places)
    ])  # fmt: skip
    if bias is not None:
        values = change_if(builder, bias, values, lambda sums: _add_bias(builder, tile, itemsize, sums, bias))
        values = change_if(builder, code, values, lambda sums: rectify(builder, sums, code))
    if stream is None:
        stream = ir.Constant(I64, 0)
    with builder.if_else(builder.icmp_signed("!=", stream, ir.Constant(I64, 0))) as (past, through):
        with past:
            hint = builder.module.add_metadata([ir.Constant(I32, 1)])
            for value, place in zip(values, places):
                with_alignment(builder.store(value, place), nbytes).set_metadata("nontemporal", hint)
        with through:
            for value, place in zip(values, places):
                with_alignment(builder.store(value, place), itemsize)


def _add_bias(builder, tile, itemsize, values, bias):
    place, nbytes = builder.inttoptr(bias, I8P), tile.lanes * itemsize
    vectors = [load_vector(builder, place, j * nbytes, values[0].type, itemsize) for j in range(tile.columns)]
    return [builder.fadd(value, vectors[i % tile.columns]) for i, value in enumerate(values)]


def _broadcast(builder, pointer, scalar, lanes):
    return splat(builder, builder.load(builder.bitcast(pointer, scalar.as_pointer())), lanes)
