"""Vector code: the only place with LLVM IR.

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
from itertools import islice
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..activations import LEAKY_SLOPE
from ..minimal_filtering import filtering, transposed

_I8P, _I32, _I64 = ir.IntType(8).as_pointer(), ir.IntType(32), ir.IntType(64)

# Bytes ahead of the panel that are fetched: measured on packed panels of 64 to 256 kB.
PREFETCH = 512


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
        pointer = builder.inttoptr(args[0], _I64.as_pointer())
        values = [builder.load(builder.gep(pointer, [ir.Constant(_I64, first + i)])) for i in range(number)]
        return context.make_tuple(builder, signature.return_type, values)

    return types.UniTuple(types.int64, number)(types.int64, start, count), generate


@intrinsic
def integer(typing_context, place, at):
    """The int64 number `at` those at an address."""

    def generate(context, builder, signature, args):
        return builder.load(builder.gep(builder.inttoptr(args[0], _I64.as_pointer()), [args[1]]))

    return types.int64(types.int64, types.int64), generate


@intrinsic
def store_integer(typing_context, place, at, value):
    """Write the int64 number `at` those at an address."""

    def generate(context, builder, signature, args):
        builder.store(args[2], builder.gep(builder.inttoptr(args[0], _I64.as_pointer()), [args[1]]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def call(typing_context, function, arguments, chunk):
    """Call the function at an address with two int64 arguments."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [_I64, _I64])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def fetch(typing_context, place):
    """Begin to load the cache line at an address, which may be anything, into the second-level cache."""

    def generate(context, builder, signature, args):
        _fetch(builder, builder.inttoptr(args[0], _I8P), level=2)
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
        to, fro = (builder.inttoptr(a, _I8P) for a in args[:2])
        cgutils.raw_memcpy(builder, to, fro, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic(prefer_literal=True)
def copy_part(typing_context, lanes, itemsize, target, source, count):
    """Copy up to `lanes` elements as one vector, where memcpy's call would take longer."""
    shape = lanes.literal_value, itemsize.literal_value

    def generate(context, builder, signature, args):
        target, source, count = args[2:]
        kind = _vector(*shape)
        inside = _lanes_below(builder, count, shape[0])
        pointers = [builder.bitcast(builder.inttoptr(a, _I8P), kind.as_pointer()) for a in (target, source)]
        value = _masked_load(builder, pointers[1], inside, _vector(*shape))
        _masked_store(builder, value, pointers[0], inside)
        return context.get_dummy_value()

    return types.void(lanes, itemsize, *[types.int64] * 3), generate


@intrinsic
def zero_bytes(typing_context, target, count):
    """Set `count` bytes at an address to zero."""

    def generate(context, builder, signature, args):
        cgutils.memset(builder, builder.inttoptr(args[0], _I8P), args[1], 0)
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
        full = ir.Constant(_I64, shape[0])
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
        table, base = builder.inttoptr(offsets, _I64.as_pointer()), builder.inttoptr(target, _I8P)
        for j, vector in enumerate(vectors):
            with builder.if_then(builder.icmp_signed(">", columns, ir.Constant(_I64, j))):
                offset = builder.load(builder.gep(table, [ir.Constant(_I64, j)]))
                with builder.if_then(builder.icmp_signed(">=", offset, ir.Constant(_I64, 0))):
                    place = builder.bitcast(builder.gep(base, [offset]), vector.type.as_pointer())
                    builder.store(vector, place).align = shape[1]
        return context.get_dummy_value()

    return types.void(lanes, itemsize, *[types.int64] * 6), generate


def _transpose(builder, lanes, itemsize, source, source_row, target, target_row, rows=None, columns=None):
    """Transpose a whole block, or `rows` x `columns` of it."""
    vectors, mask = _transposed(builder, lanes, itemsize, source, source_row, rows, columns)
    place = builder.inttoptr(target, _I8P)
    for j, vector in enumerate(vectors):
        pointer = builder.bitcast(place, vector.type.as_pointer())
        if rows is None:
            builder.store(vector, pointer).align = itemsize
        else:
            inside = builder.and_(mask, _splat(builder, builder.icmp_signed(">", columns, ir.Constant(_I64, j)), lanes))
            _masked_store(builder, vector, pointer, inside)
        place = builder.gep(place, [target_row])


def _transposed(builder, lanes, itemsize, source, source_row, rows, columns):
    """Return the columns of a block as vectors, zeros from `rows` and `columns` on, and the mask of `rows`."""
    kind = _vector(lanes, itemsize)
    place = builder.inttoptr(source, _I8P)
    across = None if columns is None else _lanes_below(builder, columns, lanes)
    vectors = []
    for i in range(lanes):
        pointer = builder.bitcast(place, kind.as_pointer())
        if across is None:
            vectors.append(builder.load(pointer))
            vectors[-1].align = itemsize
        else:
            inside = builder.and_(across, _splat(builder, builder.icmp_signed(">", rows, ir.Constant(_I64, i)), lanes))
            vectors.append(_masked_load(builder, pointer, inside, _vector(lanes, itemsize)))
        place = builder.gep(place, [source_row])
    # One bit of the row number changes places with the same bit of the column number at a time.
    distance = lanes // 2
    while distance:
        low = [j if not j & distance else lanes + j - distance for j in range(lanes)]
        high = [j + distance if not j & distance else lanes + j for j in range(lanes)]
        for i in range(lanes):
            if not i & distance:
                pair = vectors[i], vectors[i + distance]
                vectors[i] = _shuffle(builder, *pair, low)
                vectors[i + distance] = _shuffle(builder, *pair, high)
        distance //= 2
    return vectors, None if rows is None else _lanes_below(builder, rows, lanes)


def _vector(lanes, itemsize):
    return ir.VectorType(ir.FloatType() if itemsize == 4 else ir.DoubleType(), lanes)


def _masked_load(builder, pointer, inside, vector):
    """Return a vector, zero where the mask is not set: nothing is read there."""
    signature = ir.FunctionType(vector, [pointer.type, _I32, inside.type, vector])
    function = cgutils.get_or_insert_function(builder.module, signature, f"llvm.masked.load.{_suffix(vector)}.p0")
    zeros = ir.Constant(vector, [0 if isinstance(vector.element, ir.IntType) else 0.0] * vector.count)
    return builder.call(function, [pointer, ir.Constant(_I32, _nbytes(vector.element)), inside, zeros])


def _masked_store(builder, vector, pointer, inside):
    """Write a vector where the mask is set."""
    kind = vector.type
    signature = ir.FunctionType(ir.VoidType(), [kind, pointer.type, _I32, inside.type])
    function = cgutils.get_or_insert_function(builder.module, signature, f"llvm.masked.store.{_suffix(kind)}.p0")
    builder.call(function, [vector, pointer, ir.Constant(_I32, _nbytes(kind.element)), inside])


def _suffix(vector):
    letter = "i" if isinstance(vector.element, ir.IntType) else "f"
    return f"v{vector.count}{letter}{8 * _nbytes(vector.element)}"


def _nbytes(kind):
    return kind.width // 8 if isinstance(kind, ir.IntType) else {ir.FloatType(): 4, ir.DoubleType(): 8}[kind]


def _shuffle(builder, a, b, order):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(order)), order))


def _lanes_below(builder, count, lanes):
    """Return the mask of the lanes whose number is below a count."""
    numbers = ir.Constant(ir.VectorType(_I64, lanes), list(range(lanes)))
    return builder.icmp_signed("<", numbers, _splat(builder, count, lanes))


def _splat(builder, value, lanes):
    vector = ir.VectorType(value.type, lanes)
    single = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_I32, 0))
    return _shuffle(builder, single, ir.Constant(vector, ir.Undefined), [0] * lanes)


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
        a_rows, out_rows = (_multiples(builder, step, tile.rows) for step in (a_row, out_row))
        sums = _generate_tile(builder, tile, shape[3], a, a_rows, a_step, offsets, runs, steps, b, b_step)
        _store_tile(builder, tile, shape[3], sums, out, out_rows, add)
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
            builder, tile, shape[3], a, _table(builder, a_rows, tile.rows), a_step, offsets, runs, steps, b, b_step,
            pairs=True, masks=masks if has_masks else None, ahead=args[21:] if fetches else (),
        )  # fmt: skip
        _store_tile(builder, tile, shape[3], sums, out, _table(builder, out_rows, tile.rows), add, bias, code, stream)
        return context.get_dummy_value()

    return signature, generate


def _multiples(builder, step, count):
    """Return 0, step, 2*step and so on."""
    values = [ir.Constant(_I64, 0)]
    for _ in range(1, count):
        values.append(builder.add(values[-1], step))
    return values


def _table(builder, place, count):
    """Return the first int64 numbers at an address."""
    pointer = builder.inttoptr(place, _I64.as_pointer())
    return [builder.load(builder.gep(pointer, [ir.Constant(_I64, i)])) for i in range(count)]


def _generate_tile(
    builder, tile, itemsize, a, row_offsets, a_step, offsets, runs, steps, b, b_step, pairs=False, masks=None, ahead=()
):
    """Return the sums of a tile: vectors, row by row. With `pairs` each run has its own place in `b` too.

    `ahead` is what each step fetches, and how far the next one's is from there.
    """
    scalar = ir.FloatType() if itemsize == 4 else ir.DoubleType()
    vector = ir.VectorType(scalar, tile.lanes)
    nbytes = tile.lanes * itemsize
    fma = _fma(builder, vector)
    count = tile.rows * tile.columns
    entry = builder.block
    run_block, step_block, run_end, done = (
        builder.append_basic_block(name) for name in ("run", "step", "run_end", "done")
    )
    a_start, b_start = builder.inttoptr(a, _I8P), builder.inttoptr(b, _I8P)
    far_start = builder.inttoptr(ahead[0], _I8P) if ahead else None
    table = builder.inttoptr(offsets, _I64.as_pointer())
    zero = ir.Constant(vector, [0.0] * tile.lanes)
    builder.branch(run_block)

    builder.position_at_end(run_block)
    run, b_run = builder.phi(_I64), builder.phi(_I8P)
    far_run: Any = builder.phi(_I8P) if ahead else None
    held = [builder.phi(vector) for _ in range(count)]
    if pairs:
        place = builder.gep(table, [builder.shl(run, ir.Constant(_I64, 1))])
        a_run = builder.gep(a_start, [builder.load(place)])
        b_first = builder.gep(b_start, [builder.load(builder.gep(place, [ir.Constant(_I64, 1)]))])
    else:
        a_run, b_first = builder.gep(a_start, [builder.load(builder.gep(table, [run]))]), b_run
    inside = [] if masks is None else _masks_of(builder, tile, masks, run)
    builder.branch(step_block)

    builder.position_at_end(step_block)
    step, a_now, b_now = builder.phi(_I64), builder.phi(_I8P), builder.phi(_I8P)
    far: Any = builder.phi(_I8P) if ahead else None
    sums = [builder.phi(vector) for _ in range(count)]
    weights = [_load(builder, b_now, j * nbytes, vector, itemsize) for j in range(tile.columns)]
    _prefetch(builder, b_now, tile.columns * nbytes)
    if ahead:
        _fetch(builder, far, level=3)
    fresh = []
    for i in range(tile.rows):
        value = _broadcast(builder, builder.gep(a_now, [row_offsets[i]]), scalar, tile.lanes)
        for j in range(tile.columns):
            before = sums[i * tile.columns + j]
            after = builder.call(fma, [value, weights[j], before])
            fresh.append(builder.select(inside[j], after, before) if inside else after)
    step_next = builder.add(step, ir.Constant(_I64, 1))
    a_next, b_next = builder.gep(a_now, [a_step]), builder.gep(b_now, [b_step])
    far_next = builder.gep(far, [ahead[1]]) if ahead else None
    builder.cbranch(builder.icmp_signed("<", step_next, steps), step_block, run_end)

    builder.position_at_end(run_end)
    run_next = builder.add(run, ir.Constant(_I64, 1))
    builder.cbranch(builder.icmp_signed("<", run_next, runs), run_block, done)
    for phi, first, later in [(run, ir.Constant(_I64, 0), run_next), (b_run, b_start, b_next)] + [
        (held[i], zero, fresh[i]) for i in range(count)
    ]:
        phi.add_incoming(first, entry)
        phi.add_incoming(later, run_end)
    for phi, first, later in [
        (step, ir.Constant(_I64, 0), step_next),
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
    bits = builder.load(builder.gep(builder.inttoptr(masks, _I64.as_pointer()), [run]))
    lane_bits, lanes = ir.IntType(tile.lanes), ir.VectorType(ir.IntType(1), tile.lanes)
    return [
        builder.bitcast(builder.trunc(builder.lshr(bits, ir.Constant(_I64, j * tile.lanes)), lane_bits), lanes)
        for j in range(tile.columns)
    ]


def _store_tile(builder, tile, itemsize, values, out, out_rows, add, bias=None, code=None, stream=None):
    """Store a tile, or add it to what is there; then bias and activation, if any."""
    nbytes, base, vector = tile.lanes * itemsize, builder.inttoptr(out, _I8P), values[0].type
    places = [
        builder.bitcast(builder.gep(base, [builder.add(row, ir.Constant(_I64, j * nbytes))]), vector.as_pointer())
        for row in out_rows
        for j in range(tile.columns)
    ]
    values = _if(builder, add, values, lambda sums: [
        builder.fadd(value, _aligned(builder.load(place), itemsize)) for value, place in zip(sums, places)
    ])  # fmt: skip
    if bias is not None:
        values = _if(builder, bias, values, lambda sums: _add_bias(builder, tile, itemsize, sums, bias))
        values = _if(builder, code, values, lambda sums: _rectify(builder, sums, code))
    if stream is None:
        stream = ir.Constant(_I64, 0)
    with builder.if_else(builder.icmp_signed("!=", stream, ir.Constant(_I64, 0))) as (past, through):
        with past:
            hint = builder.module.add_metadata([ir.Constant(_I32, 1)])
            for value, place in zip(values, places):
                _aligned(builder.store(value, place), nbytes).set_metadata("nontemporal", hint)
        with through:
            for value, place in zip(values, places):
                _aligned(builder.store(value, place), itemsize)


def _if(builder, condition, values, change):
    """Return change(values) where the condition is not zero."""
    before = builder.block
    with builder.if_then(builder.icmp_signed("!=", condition, ir.Constant(_I64, 0))):
        changed, after = change(values), builder.block
    merged = []
    for old, new in zip(values, changed):
        merged.append(builder.phi(old.type))
        merged[-1].add_incoming(old, before)
        merged[-1].add_incoming(new, after)
    return merged


def _add_bias(builder, tile, itemsize, values, bias):
    place, nbytes = builder.inttoptr(bias, _I8P), tile.lanes * itemsize
    vectors = [_load(builder, place, j * nbytes, values[0].type, itemsize) for j in range(tile.columns)]
    return [builder.fadd(value, vectors[i % tile.columns]) for i, value in enumerate(values)]


def _rectify(builder, values, code):
    """Return ReLU (code 1) or leaky ReLU (code 2); the comparison is false for NaN, which passes through."""
    vector = values[0].type
    zero, slope = (ir.Constant(vector, [number] * vector.count) for number in (0.0, LEAKY_SLOPE))
    relu = builder.icmp_signed("==", code, ir.Constant(_I64, 1))
    return [
        builder.select(
            builder.fcmp_ordered("<", value, zero), builder.select(relu, zero, builder.fmul(value, slope)), value
        )
        for value in values
    ]


def _aligned(instruction, align):
    instruction.align = align
    return instruction


def _load(builder, pointer, offset, vector, align):
    place = builder.bitcast(builder.gep(pointer, [ir.Constant(_I64, offset)]), vector.as_pointer())
    return _aligned(builder.load(place), align)


def _broadcast(builder, pointer, scalar, lanes):
    return _splat(builder, builder.load(builder.bitcast(pointer, scalar.as_pointer())), lanes)


def _fetch(builder, pointer, level):
    """Prefetch a line for reading; level 3 is the first-level cache, 2 the second."""
    kind = ir.FunctionType(ir.VoidType(), [_I8P, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [pointer, *(ir.Constant(_I32, v) for v in (0, level, 1))])


def _prefetch(builder, pointer, nbytes):
    for offset in range(0, nbytes, 64):
        _fetch(builder, builder.gep(pointer, [ir.Constant(_I64, PREFETCH + offset)]), level=3)


# What `transform_tile` applies from both sides, by number: of F(m, 3) in `minimal_filtering`.
INPUT, TAPS, OUTPUT, OUTPUT_GRAD, TAPS_GRAD = range(5)


def _transform_matrix(m, kind):
    found = filtering(m)
    matrices = (found.input, found.taps, found.output)
    return matrices[kind] if kind <= OUTPUT else transposed(matrices[(OUTPUT, TAPS)[kind - OUTPUT_GRAD]])


@intrinsic(prefer_literal=True)
def transform_tile(
    typing_context, m, kind, lanes, itemsize, source, source_row, source_column, target, target_row, target_column
):
    """Write M X M^T, where X is a tile of vectors and M a matrix of F(m, 3): one transform in each lane."""
    shape = [t.literal_value for t in (m, kind, lanes, itemsize)]
    signature = types.void(m, kind, lanes, itemsize, *[types.int64] * 6)

    def generate(context, builder, signature, args):
        _generate_transform(builder, *shape, args[4:7], args[7:], lambda value: value)
        return context.get_dummy_value()

    return signature, generate


@intrinsic(prefer_literal=True)
def finish_tile(
    typing_context,
    m,
    lanes,
    itemsize,
    source,
    source_row,
    source_column,
    target,
    target_row,
    target_column,
    bias,
    floor,
):
    """Write the outputs of a tile, plus a vector of bias at an address, none less than `floor`; NaN passes."""
    shape = [t.literal_value for t in (m, lanes, itemsize)]
    kind = types.float32 if shape[2] == 4 else types.float64
    signature = types.void(m, lanes, itemsize, *[types.int64] * 7, kind)

    def generate(context, builder, signature, args):
        vector = ir.VectorType(args[10].type, shape[1])
        added = _load(builder, builder.inttoptr(args[9], _I8P), 0, vector, shape[2])
        least = _splat(builder, args[10], shape[1])

        def epilogue(value):
            value = builder.fadd(value, added)
            return builder.select(builder.fcmp_ordered("<", value, least), least, value)

        _generate_transform(builder, shape[0], OUTPUT, *shape[1:], args[3:6], args[6:9], epilogue)
        return context.get_dummy_value()

    return signature, generate


def _generate_transform(builder, m, kind, lanes, itemsize, source, target, epilogue):
    matrix = _transform_matrix(m, kind)
    vector = ir.VectorType(ir.FloatType() if itemsize == 4 else ir.DoubleType(), lanes)
    columns = range(len(matrix[0]))
    half = [
        _linear(builder, matrix, [_load(builder, _cell(builder, source, i, j), 0, vector, itemsize) for i in columns])
        for j in columns
    ]
    for i in range(len(matrix)):
        for j, value in enumerate(_linear(builder, matrix, [half[k][i] for k in columns])):
            place = builder.bitcast(_cell(builder, target, i, j), vector.as_pointer())
            builder.store(epilogue(value), place).align = itemsize


def _cell(builder, grid, i, j):
    start, row, column = grid
    at = builder.add(builder.mul(row, ir.Constant(_I64, i)), builder.mul(column, ir.Constant(_I64, j)))
    return builder.gep(builder.inttoptr(start, _I8P), [at])


def _linear(builder, matrix, values):
    """Matrix times vector of values; what two rows or two columns have in common up to sign is computed once."""
    rows = {i: list(row) for i, row in enumerate(matrix)}
    if len(matrix) < len(values):
        for j, k in _pairs(transposed(matrix)):
            both = builder.fadd(values[j], values[k]), builder.fsub(values[j], values[k])
            values = [both[0] if i == j else both[1] if i == k else v for i, v in enumerate(values)]
            for row in rows.values():
                same = row[j] == row[k]
                row[j], row[k] = (row[j], 0) if same else (0, row[j])
        return [_combination(builder, rows[i], values) for i in range(len(matrix))]
    results = [None] * len(matrix)
    for j, k in _pairs(matrix):
        same = [a if a == b else 0 for a, b in zip(matrix[j], matrix[k])]
        other = [0 if a == b else a for a, b in zip(matrix[j], matrix[k])]
        common, change = _combination(builder, same, values), _combination(builder, other, values)
        results[j], results[k] = builder.fadd(common, change), builder.fsub(common, change)
    return [_combination(builder, rows[i], values) if r is None else r for i, r in enumerate(results)]


def _pairs(rows):
    """Yield the disjoint pairs of rows that agree in magnitude, with both equal and opposite entries."""
    taken = set()
    for j, first in enumerate(rows):
        for k in range(j + 1, len(rows)):
            agree = all(abs(a) == abs(b) for a, b in zip(first, rows[k]))
            mixed = any(a == b != 0 for a, b in zip(first, rows[k])) and any(a != b for a, b in zip(first, rows[k]))
            if agree and mixed and not {j, k} & taken:
                taken |= {j, k}
                yield j, k


def _combination(builder, coefficients, values):
    total = None
    # Units first: they need no multiplication to begin with.
    for c, value in sorted(zip(coefficients, values), key=lambda pair: abs(pair[0]) != 1):
        if c == 0:
            continue
        constant = ir.Constant(value.type, [float(c)] * value.type.count)
        if total is None:
            total = value if c == 1 else builder.fmul(value, constant)
        elif abs(c) == 1:
            total = builder.fadd(total, value) if c == 1 else builder.fsub(total, value)
        else:
            total = builder.call(_fma(builder, value.type), [value, constant, total])
    return total


def _fma(builder, vector):
    bits = 32 if isinstance(vector.element, ir.FloatType) else 64
    name = f"llvm.fma.v{vector.count}f{bits}"
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3), name)


# Taps of a row that slide over the pixels of a tile in registers.
SLIDING = 3


@intrinsic(prefer_literal=True)
def slide_tile(
    typing_context, pixels, apart, lanes, itemsize, source, step, rows, first_row, last_row, columns, first_column,
    last_column, weights, bias, out, out_step, code,
):  # fmt: skip
    """Compute `pixels` vectors, the j-th from what lies j*step bytes further on in the source:

        out[j*out_step] = activation(bias + sum over rows r, columns s  w[r, s] * source[r + s + j*step])

    `rows` and `columns` are addresses of three int64 numbers for each row or column of taps, of which the first is its
    offset in the source and the second in the weights; those from the first to before the last take part. Pixels that
    are `apart` columns of taps from each other share what they load; 0: they share nothing. Without bias its address
    is 0; `code` is that of an activation: 0 for none, 1 for ReLU, 2 for leaky ReLU.
    """
    shape = [t.literal_value for t in (pixels, apart, lanes, itemsize)]
    signature = types.void(pixels, apart, lanes, itemsize, *[types.int64] * 13)

    def generate(context, builder, signature, args):
        _Slide(builder, *shape).generate(*args[4:])
        return context.get_dummy_value()

    return signature, generate


class _Slide:
    """Generates the loops of `slide_tile`."""

    def __init__(self, builder, pixels, apart, lanes, itemsize):
        self.builder, self.pixels, self.apart, self.itemsize = builder, pixels, apart, itemsize
        self.vector = _vector(lanes, itemsize)
        zero = ir.Constant(self.vector, [0.0] * lanes)
        self.sums = [cgutils.alloca_once_value(builder, zero) for _ in range(pixels)]

    def generate(
        self, source, step, rows, first_row, last_row, columns, first_column, last_column, weights, bias, out, out_step,
        code,
    ):  # fmt: skip
        builder = self.builder
        one, lot = ir.Constant(_I64, 1), ir.Constant(_I64, SLIDING)
        unit = builder.ashr(step, ir.Constant(_I64, self.apart // 2))
        single = first_column
        if self.apart:
            lots = builder.sdiv(builder.sub(last_column, first_column), lot)
            single = builder.add(first_column, builder.mul(lots, lot))
        with cgutils.for_range_slice(builder, first_row, last_row, one) as (row, _):
            place, weight = self._entry(rows, row)
            place, weight = builder.add(source, place), builder.add(weights, weight)
            if self.apart:
                with cgutils.for_range_slice(builder, first_column, single, lot) as (column, _):
                    self._take(place, weight, columns, column, SLIDING, unit, self.apart)
            with cgutils.for_range_slice(builder, single, last_column, one) as (column, _):
                self._take(place, weight, columns, column, 1, step, 1)
        values = [builder.load(total) for total in self.sums]
        values = _if(builder, bias, values, lambda values: [builder.fadd(value, self._load(bias)) for value in values])
        values = _if(builder, code, values, lambda values: _rectify(builder, values, code))
        for value, offset in zip(values, _multiples(builder, out_step, self.pixels)):
            place = builder.inttoptr(builder.add(out, offset), self.vector.as_pointer())
            _aligned(builder.store(value, place), self.itemsize)

    def _entry(self, table, number):
        """The place of a row or column of taps in the source and in the weights."""
        at = self.builder.add(table, self.builder.mul(number, ir.Constant(_I64, 24)))
        return _table(self.builder, at, 2)

    def _load(self, place):
        return _load(self.builder, self.builder.inttoptr(place, _I8P), 0, self.vector, self.itemsize)

    def _take(self, row, weights, columns, column, taps, unit, apart):
        """Add what some neighbouring taps give: each column they meet is loaded once."""
        builder = self.builder
        entries = [self._entry(columns, builder.add(column, ir.Constant(_I64, t))) for t in range(taps)]
        factors = [self._load(builder.add(weights, weight)) for _, weight in entries]
        place = builder.add(row, entries[0][0])
        for number in range((self.pixels - 1) * apart + taps):
            met = [(j, number - j * apart) for j in range(self.pixels) if 0 <= number - j * apart < taps]
            value = self._load(place) if met else None
            for j, t in met:
                fma = _fma(builder, self.vector)
                builder.store(builder.call(fma, [value, factors[t], builder.load(self.sums[j])]), self.sums[j])
            place = builder.add(place, unit)


@intrinsic(prefer_literal=True)
def correlate_taps(
    typing_context, taps, lanes, itemsize, source, source_row, source_step, grad, grad_row, grad_step, rows, count,
    offsets, sums,
):  # fmt: skip
    """Add to `taps` vectors of float64 at `sums` what rows of `count` vectors give:

        sums[t] += sum over i < rows, j < count  grad[i, j] * source[offsets[t] + i*source_row + j*source_step]

    The sum of all of them is in the element's own precision.
    """
    shape = [t.literal_value for t in (taps, lanes, itemsize)]
    signature = types.void(taps, lanes, itemsize, *[types.int64] * 10)

    def generate(context, builder, signature, args):
        _generate_correlation(builder, *shape, *args[3:])
        return context.get_dummy_value()

    return signature, generate


def _generate_correlation(
    builder, taps, lanes, itemsize, source, source_row, source_step, grad, grad_row, grad_step, rows, count, offsets,
    sums,
):  # fmt: skip
    vector, wide = _vector(lanes, itemsize), _vector(lanes, 8)
    found = [cgutils.alloca_once_value(builder, ir.Constant(vector, [0.0] * lanes)) for _ in range(taps)]
    places = _table(builder, offsets, taps)
    with cgutils.for_range(builder, rows) as row:
        at = builder.add(source, builder.mul(row.index, source_row))
        starts = [builder.add(at, place) for place in places]
        grads = builder.add(grad, builder.mul(row.index, grad_row))
        with cgutils.for_range(builder, count) as column:
            place = builder.add(grads, builder.mul(column.index, grad_step))
            value = _load(builder, builder.inttoptr(place, _I8P), 0, vector, itemsize)
            along = builder.mul(column.index, source_step)
            for total, start in zip(found, starts):
                pixel = _load(builder, builder.gep(builder.inttoptr(start, _I8P), [along]), 0, vector, itemsize)
                builder.store(builder.call(_fma(builder, vector), [value, pixel, builder.load(total)]), total)
    for t, total in enumerate(found):
        place = builder.inttoptr(builder.add(sums, ir.Constant(_I64, t * lanes * 8)), _I8P)
        more = builder.load(total)
        more = builder.fpext(more, wide) if itemsize == 4 else more
        place = builder.bitcast(place, wide.as_pointer())
        _aligned(builder.store(builder.fadd(_aligned(builder.load(place), 8), more), place), 8)


# What `reduce_window` computes, and the elements it takes, by number.
MAXIMUM, SUM, WIDE_SUM = range(3)
ELEMENTS = ("float32", "float64", "int8", "uint8", "int16", "int32", "int64")


def element_lanes(element):
    """Return how many windows are reduced side by side: a register of elements, or of 32-bit positions if wider."""
    nbytes = {"avx512": 64, "avx2": 32}.get(instruction_set(), 16)
    return nbytes // max(4, _nbytes(_element_type(element)[0]))


def _element_type(number):
    """Return an element's type, of integers with its `width`, and whether it has a sign."""
    name = ELEMENTS[number]
    kind = {"float32": ir.FloatType(), "float64": ir.DoubleType()}.get(name)
    return kind or ir.IntType(int(name.lstrip("uint"))), not name.startswith("u")


@intrinsic(prefer_literal=True)
def reduce_window(
    typing_context, operation, element, lanes, step, position_bits, kernel, whole,
    source, depth_step, depths, row_step, rows, column_step, columns,
    position, position_depth, position_row, position_column, target, where, count, packing, divisor,
):  # fmt: skip
    """Reduce `count` windows side by side, one in each lane, `step` elements apart; 0: channels of the same window.

    A tap is so many steps from `source` along depth, rows and columns, and its number as many from `position`.
    The maximum goes to `target` and, unless `position_bits` is 0, the number of its tap to int64 numbers at `where`:
    the first of equal ones, of NaN the last. The sum, if wide in float64, is divided. If `whole`, lanes from `count`
    on may be read and written too: with masks, vectors across cache lines take several times as long.

    With step PACKED, `packing` says where the lanes' elements are: see `packing_of`. Unless `kernel` is 0, there are
    so many rows and columns of taps, of one depth, and no loops.
    """
    literals = operation, element, lanes, step, position_bits, kernel, whole
    shape = [t.literal_value for t in literals]
    signature = types.void(*literals, *[types.int64] * 15, types.float64)

    def generate(context, builder, signature, args):
        _Window(builder, args[20], args[21], *shape).generate(*args[7:20], args[22])
        return context.get_dummy_value()

    return signature, generate


# The step of windows that lie anywhere in two vectors' reach.
PACKED = -1


def can_pack():
    """Whether there is an instruction that picks lanes of two vectors."""
    return instruction_set() == "avx512"


def packing_of(offsets, itemsize, lanes):
    """Return (how many of the windows fit two vectors, the packing of those) for the elements they begin at.

    A packing is a row of int64 numbers: bytes from the first vector to the second, the mask of each, what elements
    of the two the lanes take, and the offsets of those. An element at no lane is not read.
    """
    near = offsets - offsets[0] < lanes
    second = int(offsets[np.argmin(near)]) if not near.all() else int(offsets[0]) + lanes
    taken = np.where(near, offsets - offsets[0], offsets - second + lanes)[:lanes]
    fits = (taken >= 0) & (taken < 2 * lanes) & (near | (taken >= lanes))[:lanes]
    count = len(taken) if fits.all() else int(np.argmin(fits))
    order, places = np.zeros(lanes, np.int64), np.zeros(lanes, np.int64)
    order[:count], places[:count] = taken[:count], offsets[:count] - offsets[0]
    masks = [sum(1 << int(i) for i in set(taken[:count].tolist()) & set(range(a, a + lanes))) >> a for a in (0, lanes)]
    return count, np.array([(second - int(offsets[0])) * itemsize, *masks, *order, *places], np.int64)


class _Window:
    """Generates the loops of `reduce_window`."""

    def __init__(self, builder, count, packing, operation, element, lanes, step, position_bits, kernel, whole):
        self.kernel, self.whole = kernel, whole
        self.builder, self.operation, self.lanes, self.step = builder, operation, lanes, step
        kind, self.is_signed = _element_type(element)
        self.vector = ir.VectorType(kind, lanes)
        self.held = ir.VectorType(ir.DoubleType(), lanes) if operation == WIDE_SUM else self.vector
        self.positions: Any = ir.VectorType(ir.IntType(position_bits), lanes) if position_bits else None
        self.mask = _lanes_below(builder, count, lanes)
        if step == PACKED:
            self._unpack(packing)
            return
        self.places = [step * i for i in range(lanes)]
        apart = ir.Constant(_I64, max(step, 1))
        # Of the lanes in use, only elements between the first and the last are read.
        spread = builder.sub(builder.mul(count, apart), builder.sub(apart, ir.Constant(_I64, 1)))
        self.wide_mask = self.mask if step <= 1 else _lanes_below(builder, spread, lanes * step)

    def _unpack(self, packing):
        """Load what `packing_of` wrote."""
        builder, lanes, bits = self.builder, self.lanes, 8 * _nbytes(self.vector.element)
        base, wide = builder.inttoptr(packing, _I8P), ir.VectorType(_I64, lanes)
        self.second = _load(builder, base, 0, _I64, 8)
        masks = [builder.trunc(_load(builder, base, 8 * i, _I64, 8), ir.IntType(lanes)) for i in (1, 2)]
        self.masks = [builder.bitcast(mask, ir.VectorType(ir.IntType(1), lanes)) for mask in masks]
        order, self.places = (_load(builder, base, 8 * (3 + i), wide, 8) for i in (0, lanes))
        self.order = order if bits == 64 else builder.trunc(order, ir.VectorType(ir.IntType(bits), lanes))

    def generate(
        self, source, depth_step, depths, row_step, rows, column_step, columns,
        position, position_depth, position_row, position_column, target, where, divisor,
    ):  # fmt: skip
        builder = self.builder
        best, found = cgutils.alloca_once_value(builder, self._lowest(self.held)), None
        if self.positions:
            taps = builder.mul(builder.mul(depths, rows), columns)
            nothing = builder.icmp_signed("==", taps, ir.Constant(_I64, 0))
            first = builder.select(nothing, ir.Constant(self.positions, [-1] * self.lanes), self._numbers(position))
            found = cgutils.alloca_once_value(builder, first)

        def take(*counts):
            value = self._load(self._along(source, counts, (depth_step, row_step, column_step)))
            if self.operation != MAXIMUM:
                builder.store(builder.fadd(builder.load(best), self._held(value)), best)
            else:
                here = self._along(position, counts, (position_depth, position_row, position_column))
                self._take(value, here, best, found)

        if self.kernel:
            for tap in range(self.kernel**2):
                take(*(ir.Constant(_I64, at) for at in (0, *divmod(tap, self.kernel))))
        else:
            with (
                cgutils.for_range(builder, depths) as depth,
                cgutils.for_range(builder, rows) as row,
                cgutils.for_range(builder, columns) as column,
            ):
                take(depth.index, row.index, column.index)
        self._end(best, found, target, where, divisor)

    def _along(self, start, counts, steps):
        for count, step in zip(counts, steps):
            start = self.builder.add(start, self.builder.mul(count, step))
        return start

    def _held(self, value):
        return value if value.type == self.held else self.builder.fpext(value, self.held)

    def _lowest(self, held):
        kind = held.element
        if self.operation != MAXIMUM:
            lowest = 0.0
        elif isinstance(kind, ir.IntType):
            lowest = -(2 ** (kind.width - 1)) if self.is_signed else 0
        else:
            lowest = float("-inf")
        return ir.Constant(held, [lowest] * self.lanes)

    def _load(self, place):
        if self.step == PACKED:
            vectors = [
                self._masked(at, self.vector, mask)
                for at, mask in zip((place, self.builder.add(place, self.second)), self.masks)
            ]
            return _picked(self.builder, *vectors, self.order)
        if self.step <= 1:
            return self._masked(place, self.vector, self.mask)
        wide = ir.VectorType(self.vector.element, self.lanes * self.step)
        values = self._masked(place, wide, self.wide_mask)
        return _shuffle(self.builder, values, values, [self.step * i for i in range(self.lanes)])

    def _masked(self, place, vector, mask):
        if self.whole:
            return _load(self.builder, self.builder.inttoptr(place, _I8P), 0, vector, _nbytes(vector.element))
        return _masked_load(self.builder, self.builder.inttoptr(place, vector.as_pointer()), mask, vector)

    def _numbers(self, first):
        kind = self.positions.element
        single = first if kind.width == 64 else self.builder.trunc(first, kind)
        offsets = self.places
        if self.step != PACKED:
            offsets = ir.Constant(self.positions, offsets)
        elif kind.width < 64:
            offsets = self.builder.trunc(offsets, self.positions)
        return self.builder.add(_splat(self.builder, single, self.lanes), offsets)

    def _take(self, value, number, best, found):
        builder, held = self.builder, self.builder.load(best)
        if isinstance(self.vector.element, ir.IntType):
            compare = builder.icmp_signed if self.is_signed else builder.icmp_unsigned
            taken = compare(">", value, held)
        else:
            taken = builder.or_(builder.fcmp_ordered(">", value, held), builder.fcmp_unordered("uno", value, value))
        builder.store(builder.select(taken, value, held), best)
        if found is not None:
            builder.store(builder.select(taken, self._numbers(number), builder.load(found)), found)

    def _end(self, best, found, target, where, divisor):
        builder, result = self.builder, self.builder.load(best)
        if self.operation != MAXIMUM:
            kind = self.held.element
            by = divisor if isinstance(kind, ir.DoubleType) else builder.fptrunc(divisor, kind)
            result = builder.fdiv(result, _splat(builder, by, self.lanes))
            result = result if result.type == self.vector else builder.fptrunc(result, self.vector)
        results = [(result, target)]
        if found is not None:
            numbers = builder.load(found)
            if self.positions.element.width < 64:
                numbers = builder.sext(numbers, ir.VectorType(_I64, self.lanes))
            results.append((numbers, where))
        for vector, place in results:
            if self.whole:
                _store_unaligned(builder, vector, place)
            else:
                _masked_store(builder, vector, builder.inttoptr(place, vector.type.as_pointer()), self.mask)


def _picked(builder, a, b, order):
    """Return the lanes of two vectors that `order` names."""
    name = "ps" if isinstance(a.type.element, ir.FloatType) else "pd"
    signature = ir.FunctionType(a.type, [a.type, order.type, a.type])
    function = cgutils.get_or_insert_function(builder.module, signature, f"llvm.x86.avx512.vpermi2var.{name}.512")
    return builder.call(function, [a, order, b])


@intrinsic
def apart(typing_context):
    """Keep the function that calls this from being inlined: a loop's registers would be those of rare cases."""

    def generate(context, builder, signature, args):
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic(prefer_literal=True)
def deposit(typing_context, element, add, source, target):
    """Write the element at one address to another, or with `add` add it to what is there."""
    kind, adds = _element_type(element.literal_value)[0], add.literal_value

    def generate(context, builder, signature, args):
        source, target = (builder.inttoptr(place, kind.as_pointer()) for place in args[2:])
        value = builder.load(source)
        if adds:
            plus = builder.add if isinstance(kind, ir.IntType) else builder.fadd
            value = plus(builder.load(target), value)
        builder.store(value, target)
        return context.get_dummy_value()

    return types.void(element, add, types.int64, types.int64), generate


def rows_together(stride):
    """Return how many rows of windows `spread_windows` takes at a time: each is loaded once for all."""
    return 4 if stride == 1 else 1


# What `spread_windows` does with the values of the windows an element is in.
ADD_MATCHING, LAST_MATCHING, ADD_ALL = range(3)


@intrinsic(prefer_literal=True)
def lay_out(typing_context, kind, element, lanes, values, indices, count, plane, to_values, to_numbers):
    """Lay out a vector for `spread_windows`: `count` values and their indices plus one, zeros from there on.

    An index that is not in range(plane) becomes zero; returned is how many are.
    """
    matching, kind_of, shape = kind.literal_value != ADD_ALL, element.literal_value, lanes.literal_value

    def generate(context, builder, signature, args):
        values, indices, count, plane, to_values, to_numbers = args[3:]
        vector, wide = ir.VectorType(_element_type(kind_of)[0], shape), ir.VectorType(_I64, shape)
        narrow = ir.VectorType(_I32, shape)
        inside = _lanes_below(builder, count, shape)
        value = _masked_load(builder, builder.inttoptr(values, vector.as_pointer()), inside, vector)
        _store_unaligned(builder, value, to_values)
        if not matching:
            return count
        index = _masked_load(builder, builder.inttoptr(indices, wide.as_pointer()), inside, wide)
        valid = builder.and_(inside, builder.icmp_unsigned("<", index, _splat(builder, plane, shape)))
        number = builder.add(builder.trunc(index, narrow), ir.Constant(narrow, [1] * shape))
        number = builder.select(valid, number, ir.Constant(narrow, [0] * shape))
        _store_unaligned(builder, number, to_numbers)
        return _set_lanes(builder, valid)

    return types.int64(kind, element, lanes, *[types.int64] * 6), generate


def _store_unaligned(builder, vector, place):
    builder.store(vector, builder.inttoptr(place, vector.type.as_pointer())).align = _nbytes(vector.type.element)


def _set_lanes(builder, mask):
    """Return how many lanes of a mask are set."""
    bits = builder.bitcast(mask, ir.IntType(mask.type.count))
    wide = ir.IntType(max(mask.type.count, 8))
    return builder.zext(builder.ctpop(bits if bits.type == wide else builder.zext(bits, wide)), _I64)


@intrinsic(prefer_literal=True)
def spread_windows(
    typing_context, kind, element, lanes, across, kernel, stride,
    values, numbers, depths, depth_step, row_step, column_step, position, h, H, w, W, count,
    target, target_row, target_column, divisor,
):  # fmt: skip
    """Write `stride` columns of a few rows for each lane: the sums of the values of the windows that hold them.

    The rows are those of `rows_together(stride)` windows. Lanes are neighbouring windows (`across`), or else the
    first `count` are channels. A window is `kernel` x `kernel`; one begins at (h, w), the first element. In elements
    from `values` and `numbers`, the window before is a row or column step back, and the next of `depths` a depth step
    on. A value takes part where its number is that of the element, `position` for the first; returned is how many
    did. With ADD_ALL each does, and the sum is divided.
    """
    shape = [t.literal_value for t in (kind, element, lanes, across, kernel, stride)]
    signature = types.int64(kind, element, lanes, across, kernel, stride, *[types.int64] * 15, types.float64)

    def generate(context, builder, signature, args):
        return _Spread(builder, *shape).generate(*args[6:])

    return signature, generate


class _Spread:
    """Generates `spread_windows`: a register for each of the elements, and each window loaded once for all."""

    def __init__(self, builder, kind, element, lanes, across, kernel, stride):
        self.builder, self.kind, self.lanes, self.across = builder, kind, lanes, across
        self.kernel, self.stride = kernel, stride
        self.vector = ir.VectorType(_element_type(element)[0], lanes)
        self.numbers = ir.VectorType(_I32, lanes)
        self.height = stride * rows_together(stride)
        self.cells = [(a, t) for a in range(self.height) for t in range(stride)]

    def generate(
        self, values, numbers, depths, depth_step, row_step, column_step, position, h, H, w, W, count,
        target, target_row, target_column, divisor,
    ):  # fmt: skip
        builder = self.builder
        rows = [self._below(builder.add(h, self._number(a)), H) for a in range(self.height)]
        columns = [self._columns(builder.add(w, self._number(t)), W, count) for t in range(self.stride)]
        wanted = {}
        for a, t in self.cells if self.kind != ADD_ALL else ():
            first = builder.add(position, builder.add(builder.mul(W, self._number(a)), self._number(t)))
            inside = builder.and_(columns[t], _splat(builder, rows[a], self.lanes))
            wanted[a, t] = builder.select(inside, self._from(first), ir.Constant(self.numbers, [-1] * self.lanes))
        zeros = ir.Constant(self.vector, [0.0] * self.lanes)
        sums = {cell: cgutils.alloca_once_value(builder, zeros) for cell in self.cells}
        matches = cgutils.alloca_once_value(builder, self._number(0))
        earlier = range((self.kernel - 1) // self.stride, -1, -1)
        with cgutils.for_range(builder, depths) as depth:
            start = builder.mul(depth.index, depth_step)
            # In scan order, as a scatter would add them.
            later = range(-1, -rows_together(self.stride), -1)
            for i, j in ((i, j) for i in (*earlier, *later) for j in earlier):
                back = builder.add(builder.mul(row_step, self._number(i)), builder.mul(column_step, self._number(j)))
                self._window(i, j, builder.sub(start, back), values, numbers, wanted, sums, matches)
        length = self.stride * self.lanes if self.across else self.stride
        whole = builder.and_(self._below(w, W), self._below(builder.add(w, self._number(length - 1)), W))
        if not self.across:
            whole = builder.and_(whole, builder.icmp_signed("==", count, self._number(self.lanes)))
        for a in range(self.height):
            with builder.if_then(rows[a]):
                results = [builder.load(sums[a, t]) for t in range(self.stride)]
                if self.kind == ADD_ALL:
                    results = [self._divided(result, divisor) for result in results]
                place = builder.add(target, builder.mul(target_row, self._number(a)))
                self._store(results, columns, whole, place, target_column, w, W)
        return builder.load(matches)

    def _number(self, value):
        return ir.Constant(_I64, value)

    def _below(self, value, end):
        """Whether a number is in range(end): as unsigned, a negative one is large."""
        return self.builder.icmp_unsigned("<", value, end)

    def _splat(self, value):
        return _splat(self.builder, self.builder.trunc(value, _I32), self.lanes)

    def _from(self, first, step=None):
        """Return `first` in each lane, or counting up in steps where lanes are windows."""
        step = (step or self.stride) if self.across else 0
        return self.builder.add(self._splat(first), ir.Constant(self.numbers, [step * i for i in range(self.lanes)]))

    def _columns(self, w, W, count):
        """Return the mask of the lanes whose column from `w` on is in the row."""
        builder = self.builder
        inside = builder.icmp_unsigned("<", self._from(w), self._splat(W))
        return inside if self.across else builder.and_(inside, _lanes_below(builder, count, self.lanes))

    def _window(self, i, j, offset, values, numbers, wanted, sums, matches):
        """Add one window's value to the elements it holds."""
        builder, kernel, stride = self.builder, self.kernel, self.stride
        value, matching = self._at(values, offset, self.vector), None
        number = self._at(numbers, offset, self.numbers) if wanted else None
        for a, t in self.cells:
            if not 0 <= a + i * stride < kernel or t + j * stride >= kernel:
                continue
            before = builder.load(sums[a, t])
            after = value if self.kind == LAST_MATCHING else builder.fadd(before, value)
            if wanted:
                match = builder.icmp_signed("==", number, wanted[a, t])
                after = builder.select(match, after, before)
                # A number is that of one element at most.
                matching = builder.or_(matching, match) if matching else match
            builder.store(after, sums[a, t])
        if matching:
            builder.store(builder.add(builder.load(matches), _set_lanes(builder, matching)), matches)

    def _at(self, base, offset, vector):
        """Load the vector that begins so many elements from an address."""
        builder = self.builder
        place = builder.add(base, builder.mul(offset, self._number(_nbytes(vector.element))))
        return _load(builder, builder.inttoptr(place, _I8P), 0, vector, _nbytes(vector.element))

    def _divided(self, total, divisor):
        builder, kind = self.builder, self.vector.element
        by = divisor if isinstance(kind, ir.DoubleType) else builder.fptrunc(divisor, kind)
        return builder.fdiv(total, _splat(builder, by, self.lanes))

    def _store(self, results, columns, whole, place, target_column, w, W):
        """Write a row: of channels element by element, of windows interleaved."""
        builder = self.builder
        if self.across:
            results, target_column = (
                _interleaved(builder, results),
                self._number(self.lanes * _nbytes(self.vector.element)),
            )
        for t, result in enumerate(results):
            at = builder.add(place, builder.mul(target_column, self._number(t)))
            with builder.if_else(whole, likely=True) as (then, otherwise):
                with then:
                    _store_unaligned(builder, result, at)
                with otherwise:
                    # Slower by far, even where all lanes are written.
                    inside = columns[t]
                    if self.across:
                        first = builder.add(w, self._number(t * self.lanes))
                        inside = builder.icmp_unsigned("<", self._from(first, 1), self._splat(W))
                    _masked_store(builder, result, builder.inttoptr(at, result.type.as_pointer()), inside)


def _interleaved(builder, vectors):
    """Return vectors with the first elements of all, then the second ones, and so on."""
    count, lanes = len(vectors), vectors[0].type.count
    whole = vectors[0]
    for k, vector in enumerate(vectors[1:], 2):
        # Operands of a shuffle are as long as each other.
        padded = _shuffle(builder, vector, vector, [i % lanes for i in range(lanes * (k - 1))])
        whole = _shuffle(builder, whole, padded, list(range(lanes * k)))
    order = [i % count * lanes + i // count for i in range(count * lanes)]
    return [_shuffle(builder, whole, whole, order[k : k + lanes]) for k in range(0, count * lanes, lanes)]


# --- bfloat16 --------------------------------------------------------------------------------------------------
#
# A float32 is the sum of up to three bfloat16 numbers, its planes, each the rest that the one before leaves, rounded
# to nearest even. A product of two is the sum of the products of their planes, of which the smallest are left out.
#
# Tiles, as Intel's TDPBF16PS takes them: A of up to 16 rows of 32 numbers, B of 32 rows of 16 numbers whose rows
# 2j and 2j+1 are interleaved, C of up to 16 rows of 16 float32.

# Numbers along the sum of one step.
DEPTH = 32
# Planes of each operand, for as many products of planes.
PLANES = {1: 1, 3: 2, 6: 3}
# Which plane of A is multiplied by which of B: small terms first, and only one operand changes from one to the next.
_PRODUCTS = {1: ((0, 0),), 3: ((1, 0), (0, 0), (0, 1)), 6: ((0, 2), (0, 1), (1, 1), (1, 0), (2, 0), (0, 0))}
# What multiplies tiles: AMX, vectors of AVX512-BF16 (one row of tiles at a time), or an imitation of AMX in memory.
AMX, VECTORS, EMULATED = range(3)
# Columns of filters that are multiplied at a time: two tiles B.
COLUMNS = 32
_TILE_BYTES, _ROW_BYTES, _TILE_ROWS = 1024, 64, 16
_SIGN, _EXPONENT, _SMALLEST_NORMAL = 0x80000000, 0x7F800000, 0x00800000


class _BFloat16(ir.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def __str__(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _BFloat16)

    def __hash__(self):
        return hash(_BFloat16)


_FLOATS, _WORDS, _HALVES = (ir.VectorType(kind, 16) for kind in (ir.FloatType(), _I32, ir.IntType(16)))


def _constant(vector, value):
    return ir.Constant(vector, [value] * vector.count)


def _number(value):
    return ir.Constant(_I64, value)


def _at(builder, address, *offsets):
    """Return the pointer to an address, or an address plus offsets."""
    pointer = builder.inttoptr(address, _I8P) if address.type == _I64 else address
    for offset in offsets:
        pointer = builder.gep(pointer, [_number(offset) if isinstance(offset, int) else offset])
    return pointer


@intrinsic(prefer_literal=True)
def split(typing_context, planes, source, count, target, plane_step, block_step):
    """Write `count` floats as planes of bfloat16; return 1 if one of them is not finite (or rounds so), else 0.

    Blocks of DEPTH numbers go to target + block*block_step + plane*plane_step, zeros beyond the last number.
    """
    number = planes.literal_value

    def generate(context, builder, signature, args):
        source, count, target, plane_step, block_step = args[1:]
        found = cgutils.alloca_once(builder, ir.IntType(16))
        builder.store(ir.IntType(16)(0), found)
        whole, rest = (builder.sdiv(count, _number(DEPTH)), builder.srem(count, _number(DEPTH)))

        def block(index, load):
            place = _at(builder, source, builder.mul(index, _number(4 * DEPTH)))
            into = _at(builder, target, builder.mul(index, block_step))
            _split_block(
                builder, number, [load(_at(builder, place, 64 * i), i) for i in range(2)], into, plane_step, found
            )

        with cgutils.for_range(builder, whole) as loop:
            block(loop.index, lambda place, i: _load(builder, place, 0, _FLOATS, 4))
        with builder.if_then(builder.icmp_signed(">", rest, _number(0))):
            block(whole, lambda place, i: _load_below(builder, place, builder.sub(rest, _number(16 * i))))
        return builder.zext(builder.icmp_unsigned("!=", builder.load(found), ir.IntType(16)(0)), _I64)

    return types.int64(planes, *[types.int64] * 5), generate


def _load_below(builder, place, count):
    """Return the first `count` of 16 floats, and zeros."""
    pointer, inside = builder.bitcast(place, _FLOATS.as_pointer()), _lanes_below(builder, count, 16)
    signature = ir.FunctionType(_FLOATS, [pointer.type, _I32, inside.type, _FLOATS])
    function = cgutils.get_or_insert_function(builder.module, signature, "llvm.masked.load.v16f32.p0")
    return builder.call(function, [pointer, ir.Constant(_I32, 4), inside, _constant(_FLOATS, 0.0)])


def _split_block(builder, planes, values, target, plane_step, found):
    halves = [_planes(builder, planes, value, found) for value in values]
    for plane, (low, high) in enumerate(zip(*halves)):
        place = _at(builder, target, builder.mul(plane_step, _number(plane)))
        _store_words(builder, _shuffle(builder, low, high, list(range(DEPTH))), place)


def _store_words(builder, value, place):
    builder.store(value, builder.bitcast(place, value.type.as_pointer())).align = 2


@intrinsic(prefer_literal=True)
def interleave(typing_context, planes, source, target):
    """Write DEPTH rows of COLUMNS floats as planes of two tiles B each; return what `split` returns."""
    number = planes.literal_value

    def generate(context, builder, signature, args):
        source, target = args[1:]
        found = cgutils.alloca_once(builder, ir.IntType(16))
        builder.store(ir.IntType(16)(0), found)
        mixed = [i // 2 + 16 * (i % 2) for i in range(DEPTH)]
        with cgutils.for_range(builder, _number(DEPTH // 2)) as loop:
            for column in range(2):
                pair = _at(builder, source, builder.mul(loop.index, _number(8 * COLUMNS)), 64 * column)
                rows = [_load(builder, pair, 4 * COLUMNS * i, _FLOATS, 4) for i in range(2)]
                into = _at(builder, target, builder.mul(loop.index, _number(_ROW_BYTES)), _TILE_BYTES * column)
                for plane, (even, odd) in enumerate(zip(*(_planes(builder, number, row, found) for row in rows))):
                    place = _at(builder, into, 2 * _TILE_BYTES * plane)
                    _store_words(builder, _shuffle(builder, even, odd, mixed), place)
        return builder.zext(builder.icmp_unsigned("!=", builder.load(found), ir.IntType(16)(0)), _I64)

    return types.int64(planes, types.int64, types.int64), generate


def _planes(builder, count, value, found):
    """Return the planes of 16 floats; mark in `found` those that are not finite, which leave no rest."""
    planes = []
    for plane in range(count):
        rounded = _round(builder, value)
        planes.append(rounded)
        if plane == 0:
            magnitude = builder.and_(rounded, _constant(_HALVES, 0x7FFF))
            finite = builder.icmp_unsigned("<", magnitude, _constant(_HALVES, _EXPONENT >> 16))
            others = builder.not_(builder.bitcast(finite, ir.IntType(16)))
            builder.store(builder.or_(builder.load(found), others), found)
        if plane + 1 < count:
            # The flag keeps Numba from allowing this to be reordered.
            value = builder.fsub(value, _widen(builder, rounded), flags=("contract",))
            value = builder.select(finite, value, _constant(_FLOATS, 0.0))
    return planes


def _round(builder, value):
    """Return 16 floats as bfloat16: to nearest even, subnormal numbers to zero, as AVX512-BF16 does."""
    if "avx512bf16" in cpu_features():
        return builder.bitcast(builder.fptrunc(value, ir.VectorType(_BFloat16(), 16)), _HALVES)
    bits = builder.bitcast(value, _WORDS)
    magnitude = builder.and_(bits, _constant(_WORDS, _SIGN - 1))
    odd = builder.and_(builder.lshr(bits, _constant(_WORDS, 16)), _constant(_WORDS, 1))
    rounded = builder.add(builder.add(bits, odd), _constant(_WORDS, 0x7FFF))
    is_nan = builder.icmp_unsigned(">", magnitude, _constant(_WORDS, _EXPONENT))
    rounded = builder.select(is_nan, builder.or_(bits, _constant(_WORDS, 0x00400000)), rounded)
    tiny = builder.icmp_unsigned("<", magnitude, _constant(_WORDS, _SMALLEST_NORMAL))
    rounded = builder.select(tiny, builder.and_(bits, _constant(_WORDS, _SIGN)), rounded)
    return builder.trunc(builder.lshr(rounded, _constant(_WORDS, 16)), _HALVES)


def _widen(builder, halves):
    """Return bfloat16 numbers as floats."""
    return builder.bitcast(builder.shl(builder.zext(halves, _WORDS), _constant(_WORDS, 16)), _FLOATS)


@intrinsic(prefer_literal=True)
def configure_tiles(typing_context, unit, configuration):
    """Give this thread's tiles their shape: 64 bytes at an address, see `tile_configuration`."""
    is_amx = unit.literal_value == AMX

    def generate(context, builder, signature, args):
        if is_amx:
            _call(builder, "llvm.x86.ldtilecfg", _at(builder, args[1]))
        return context.get_dummy_value()

    return types.void(unit, types.int64), generate


@intrinsic(prefer_literal=True)
def release_tiles(typing_context, unit):
    """Give up this thread's tiles."""
    is_amx = unit.literal_value == AMX

    def generate(context, builder, signature, args):
        if is_amx:
            _call(builder, "llvm.x86.tilerelease")
        return context.get_dummy_value()

    return types.void(unit), generate


def tile_configuration(rows):
    """Return the 64 bytes that give tiles A and C `rows` rows, and B 16; see `_generate_tiles` for their numbers."""
    configuration = bytearray(64)
    configuration[0] = 1
    for tile in range(8):
        configuration[16 + 2 * tile] = _ROW_BYTES
        configuration[48 + tile] = rows if tile < 6 else _TILE_ROWS
    return bytes(configuration)


def _call(builder, name, *args):
    """Call a function of LLVM's that returns nothing."""
    signature = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
    builder.call(cgutils.get_or_insert_function(builder.module, signature, name), args)


@intrinsic(prefer_literal=True)
def multiply_planes(
    typing_context, unit, products, rows, a0, a1, a_row, a_plane, offsets, steps, b, out0, out1, out_row, held, add,
    done0, done1,
):  # fmt: skip
    """Multiply two tiles of rows, at `a0` and `a1`, with COLUMNS columns: one float32 result for each.

        out[i, :] (+)= sum over steps, products of planes  a[offsets[step] + i*a_row, 0:DEPTH] * b[step]

    `rows` is how many a tile has in VECTORS, which compute the first tile alone, those from `held` on as zeros; the
    others' tiles have `held`, which is what their configuration says. `b` holds, for each step and plane, two tiles B.
    Rows before `done0` and `done1` have been added to by the tile before, with which these overlap.
    """
    shape = [t.literal_value for t in (unit, products, rows)]
    signature = types.void(unit, products, rows, *[types.int64] * 14)

    def generate(context, builder, signature, args):
        if shape[0] == VECTORS:
            _generate_pairs(builder, *shape[1:], args[3:])
        else:
            _generate_tiles(
                builder, (_Tiles if shape[0] == AMX else _EmulatedTiles)(builder, args[13]), shape[1], args[3:]
            )
        return context.get_dummy_value()

    return signature, generate


def _generate_tiles(builder, tiles, products, args):
    """Tiles 0 to 3 are C, 4 and 5 are A, 6 and 7 are B."""
    a0, a1, a_row, a_plane, offsets, steps, b, out0, out1, out_row, held, add, *done = args
    table, panel = builder.inttoptr(offsets, _I64.as_pointer()), PLANES[products] * 2 * _TILE_BYTES
    for tile in range(4):
        tiles.zero(tile)
    with cgutils.for_range(builder, steps) as loop:
        offset = builder.load(builder.gep(table, [loop.index]))
        a = [_at(builder, start, offset) for start in (a0, a1)]
        b_now = _at(builder, b, builder.mul(loop.index, _number(panel)))
        # The next step's tiles B, a part of them before each product.
        ahead, share = iter(range(panel, 2 * panel, 64)), -(-(panel // 64) // (4 * products))
        before: tuple[int | None, int | None] = None, None
        for planes in _PRODUCTS[products]:
            for i in range(2):
                if planes[0] != before[0]:
                    tiles.load(4 + i, _at(builder, a[i], builder.mul(a_plane, _number(planes[0]))), a_row)
                if planes[1] != before[1]:
                    tiles.load(6 + i, _at(builder, b_now, (2 * planes[1] + i) * _TILE_BYTES), _number(_ROW_BYTES))
            for tile in range(4):
                tiles.multiply(tile, 4 + tile // 2, 6 + tile % 2)
                for line in islice(ahead, share):
                    _fetch(builder, _at(builder, b_now, line), level=3)
            before = planes
    adds = builder.icmp_signed("!=", add, _number(0))
    with builder.if_else(adds) as (then, otherwise):
        with then:
            room = cgutils.alloca_once(builder, ir.ArrayType(_FLOATS, 4 * _TILE_ROWS))
            sums = builder.bitcast(room, _I8P)
            for tile in range(4):
                tiles.store(tile, _at(builder, sums, tile * _TILE_BYTES), _number(_ROW_BYTES))
            for tile in range(4):
                with cgutils.for_range_slice(builder, done[tile // 2], held, _number(1)) as (row, _):
                    place = _at(builder, sums, builder.mul(row, _number(_ROW_BYTES)))
                    more = _load(builder, place, tile * _TILE_BYTES, _FLOATS, 4)
                    place = _at(builder, (out0, out1)[tile // 2], builder.mul(row, out_row), tile % 2 * _ROW_BYTES)
                    place = builder.bitcast(place, _FLOATS.as_pointer())
                    there = _aligned(builder.load(place), 4)
                    _aligned(builder.store(builder.fadd(there, more), place), 4)
        with otherwise:
            for tile in range(4):
                tiles.store(tile, _at(builder, (out0, out1)[tile // 2], tile % 2 * _ROW_BYTES), out_row)


class _Tiles:
    """The registers of AMX, by number."""

    def __init__(self, builder, held):
        self.builder, self.held = builder, held

    def _call(self, name, tiles, *args):
        _call(self.builder, f"llvm.x86.{name}", *(ir.Constant(ir.IntType(8), tile) for tile in tiles), *args)

    def zero(self, tile):
        self._call("tilezero", [tile])

    def load(self, tile, place, row):
        self._call("tileloadd64", [tile], place, row)

    def store(self, tile, place, row):
        self._call("tilestored64", [tile], place, row)

    def multiply(self, c, a, b):
        self._call("tdpbf16ps", [c, a, b])


class _EmulatedTiles(_Tiles):
    """The same in memory, with the same results on any CPU."""

    def __init__(self, builder, held):
        super().__init__(builder, held)
        room = cgutils.alloca_once(builder, ir.ArrayType(_FLOATS, 8 * _TILE_ROWS))
        self.memory = builder.bitcast(room, _I8P)

    def _rows(self, tile):
        return self.held if tile < 6 else _number(_TILE_ROWS)

    def _tile(self, tile):
        return _at(self.builder, self.memory, tile * _TILE_BYTES)

    def _move(self, target, target_row, source, source_row, rows):
        with cgutils.for_range(self.builder, rows) as loop:
            place = _at(self.builder, source, self.builder.mul(loop.index, source_row))
            into = _at(self.builder, target, self.builder.mul(loop.index, target_row))
            value = _load(self.builder, place, 0, _WORDS, 2)
            self.builder.store(value, self.builder.bitcast(into, _WORDS.as_pointer())).align = 2

    def zero(self, tile):
        cgutils.memset(self.builder, self._tile(tile), _number(_TILE_BYTES), 0)

    def load(self, tile, place, row):
        self._move(self._tile(tile), _number(_ROW_BYTES), place, row, self._rows(tile))

    def store(self, tile, place, row):
        self._move(place, row, self._tile(tile), _number(_ROW_BYTES), self._rows(tile))

    def multiply(self, c, a, b):
        function = _emulated_product(self.builder.module)
        self.builder.call(function, [self._tile(c), self._tile(a), self._tile(b), self.held])


def _emulated_product(module):
    """TDPBF16PS: sums of even and of odd numbers by fused multiply-add, then their sum; subnormal numbers are zero."""
    signature = ir.FunctionType(ir.VoidType(), [_I8P, _I8P, _I8P, _I64])
    function = cgutils.get_or_insert_function(module, signature, "fastconv_tdpbf16ps")
    if not function.is_declaration:
        return function
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    c, a, b, held = function.args
    sums = [cgutils.alloca_once(builder, _FLOATS) for _ in range(2)]
    with cgutils.for_range(builder, held) as row:
        for total in sums:
            builder.store(_constant(_FLOATS, 0.0), total)
        with cgutils.for_range(builder, _number(DEPTH // 2)) as pair:
            place = _at(builder, a, builder.mul(row.index, _number(_ROW_BYTES)), builder.mul(pair.index, _number(4)))
            ours = _splat(builder, builder.load(builder.bitcast(place, _I32.as_pointer())), 16)
            theirs = _load(builder, _at(builder, b, builder.mul(pair.index, _number(_ROW_BYTES))), 0, _WORDS, 4)
            for number, total in enumerate(sums):
                x, y = (_flush(builder, _of_pair(builder, words, number)) for words in (ours, theirs))
                fused = builder.call(_fma(builder, _FLOATS), [x, y, builder.load(total)])
                builder.store(_flush(builder, fused), total)
        place = builder.bitcast(_at(builder, c, builder.mul(row.index, _number(_ROW_BYTES))), _FLOATS.as_pointer())
        # The flag keeps Numba from allowing these to be reordered.
        both = builder.fadd(*(builder.load(total) for total in sums), flags=("contract",))
        result = builder.fadd(_flush(builder, builder.load(place)), _flush(builder, both), flags=("contract",))
        builder.store(_flush(builder, result), place)
    builder.ret_void()
    return function


def _of_pair(builder, words, number):
    """Return the first or second of pairs of bfloat16 numbers as floats."""
    if number == 0:
        words = builder.shl(words, _constant(_WORDS, 16))
    return builder.bitcast(builder.and_(words, _constant(_WORDS, 0xFFFF0000)), _FLOATS)


def _flush(builder, values):
    bits = builder.bitcast(values, _WORDS)
    magnitude = builder.and_(bits, _constant(_WORDS, _SIGN - 1))
    tiny = builder.icmp_unsigned("<", magnitude, _constant(_WORDS, _SMALLEST_NORMAL))
    zero = builder.and_(bits, _constant(_WORDS, _SIGN))
    return builder.bitcast(builder.select(tiny, zero, bits), _FLOATS)


def _generate_pairs(builder, products, rows, args):
    """Sums in vector registers: a pair of numbers of A is broadcast against pairs of 16 columns of B."""
    a0, _, a_row, a_plane, offsets, steps, b, out0, _, out_row, held, add, done, _ = args
    tile, pairs = Tile(rows, 2, 16), ir.VectorType(_BFloat16(), DEPTH)
    sums = [cgutils.alloca_once(builder, _FLOATS) for _ in range(2 * rows)]
    for total in sums:
        builder.store(_constant(_FLOATS, 0.0), total)
    signature = ir.FunctionType(_FLOATS, [_FLOATS, pairs, pairs])
    dot = cgutils.get_or_insert_function(builder.module, signature, "llvm.x86.avx512bf16.dpbf16ps.512")
    table, panel = builder.inttoptr(offsets, _I64.as_pointer()), PLANES[products] * 2 * _TILE_BYTES
    with cgutils.for_range(builder, steps) as step:
        a_now = _at(builder, a0, builder.load(builder.gep(table, [step.index])))
        b_now = _at(builder, b, builder.mul(step.index, _number(panel)))
        with cgutils.for_range(builder, _number(DEPTH // 2)) as pair:
            a_pair = _at(builder, a_now, builder.mul(pair.index, _number(4)))
            b_pair = _at(builder, b_now, builder.mul(pair.index, _number(_ROW_BYTES)))
            for a_number, b_number in _PRODUCTS[products]:
                place = _at(builder, a_pair, builder.mul(a_plane, _number(a_number)))
                start = 2 * b_number * _TILE_BYTES
                weights = [_load(builder, b_pair, start + j * _TILE_BYTES, pairs, 2) for j in range(2)]
                for j in range(2):
                    _fetch(builder, _at(builder, b_pair, start + j * _TILE_BYTES + PREFETCH), level=3)
                for i in range(rows):
                    value = builder.load(builder.bitcast(place, _I32.as_pointer()))
                    value.align = 2
                    value = builder.bitcast(_splat(builder, value, 16), pairs)
                    for total, weight in zip(sums[2 * i : 2 * i + 2], weights):
                        builder.store(builder.call(dot, [builder.load(total), weight, value]), total)
                    place = _at(builder, place, a_row)
    values = []
    for number, total in enumerate(sums):
        row = _number(number // 2)
        counts = builder.and_(builder.icmp_signed(">=", row, done), builder.icmp_signed("<", row, held))
        values.append(builder.select(counts, builder.load(total), _constant(_FLOATS, 0.0)))
    _store_tile(builder, tile, 4, values, out0, _multiples(builder, out_row, rows), add)
