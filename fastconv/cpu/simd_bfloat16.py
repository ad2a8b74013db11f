"""Vector code of split precision: float32 numbers as sums of bfloat16 ones, and products of their tiles.

A float32 is the sum of up to three bfloat16 numbers, its planes, each the rest that the one before leaves, rounded
to nearest even. A product of two is the sum of the products of their planes, of which the smallest are left out.

Tiles, as Intel's TDPBF16PS takes them: A of up to 16 rows of 32 numbers, B of 32 rows of 16 numbers whose rows
2j and 2j+1 are interleaved, C of up to 16 rows of 16 float32.
"""

from itertools import islice

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .simd import Tile, cpu_features, store_tile
from .vector_ir import (
    I8P,
    I32,
    I64,
    PREFETCH,
    fetch_line,
    fma_of,
    lanes_below,
    load_vector,
    multiples,
    number_of,
    place_at,
    shuffle,
    splat,
    with_alignment,
)

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


_FLOATS, _WORDS, _HALVES = (ir.VectorType(kind, 16) for kind in (ir.FloatType(), I32, ir.IntType(16)))


def _constant(vector, value):
    return ir.Constant(vector, [value] * vector.count)


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
        whole, rest = (builder.sdiv(count, number_of(DEPTH)), builder.srem(count, number_of(DEPTH)))

        def block(index, load):
            place = place_at(builder, source, builder.mul(index, number_of(4 * DEPTH)))
            into = place_at(builder, target, builder.mul(index, block_step))
            _split_block(
                builder, number, [load(place_at(builder, place, 64 * i), i) for i in range(2)], into, plane_step, found
            )

        with cgutils.for_range(builder, whole) as loop:
            block(loop.index, lambda place, i: load_vector(builder, place, 0, _FLOATS, 4))
        with builder.if_then(builder.icmp_signed(">", rest, number_of(0))):
            block(whole, lambda place, i: _load_below(builder, place, builder.sub(rest, number_of(16 * i))))
        return builder.zext(builder.icmp_unsigned("!=", builder.load(found), ir.IntType(16)(0)), I64)

    return types.int64(planes, *[types.int64] * 5), generate


def _load_below(builder, place, count):
    """Return the first `count` of 16 floats, and zeros."""
    pointer, inside = builder.bitcast(place, _FLOATS.as_pointer()), lanes_below(builder, count, 16)
    signature = ir.FunctionType(_FLOATS, [pointer.type, I32, inside.type, _FLOATS])
    function = cgutils.get_or_insert_function(builder.module, signature, "llvm.masked.load.v16f32.p0")
    return builder.call(function, [pointer, ir.Constant(I32, 4), inside, _constant(_FLOATS, 0.0)])


def _split_block(builder, planes, values, target, plane_step, found):
    halves = [_planes(builder, planes, value, found) for value in values]
    for plane, (low, high) in enumerate(zip(*halves)):
        place = place_at(builder, target, builder.mul(plane_step, number_of(plane)))
        _store_words(builder, shuffle(builder, low, high, list(range(DEPTH))), place)


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
        with cgutils.for_range(builder, number_of(DEPTH // 2)) as loop:
            for column in range(2):
                pair = place_at(builder, source, builder.mul(loop.index, number_of(8 * COLUMNS)), 64 * column)
                rows = [load_vector(builder, pair, 4 * COLUMNS * i, _FLOATS, 4) for i in range(2)]
                into = place_at(builder, target, builder.mul(loop.index, number_of(_ROW_BYTES)), _TILE_BYTES * column)
                for plane, (even, odd) in enumerate(zip(*(_planes(builder, number, row, found) for row in rows))):
                    place = place_at(builder, into, 2 * _TILE_BYTES * plane)
                    _store_words(builder, shuffle(builder, even, odd, mixed), place)
        return builder.zext(builder.icmp_unsigned("!=", builder.load(found), ir.IntType(16)(0)), I64)

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
            _call(builder, "llvm.x86.ldtilecfg", place_at(builder, args[1]))
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
    table, panel = builder.inttoptr(offsets, I64.as_pointer()), PLANES[products] * 2 * _TILE_BYTES
    for tile in range(4):
        tiles.zero(tile)
    with cgutils.for_range(builder, steps) as loop:
        offset = builder.load(builder.gep(table, [loop.index]))
        a = [place_at(builder, start, offset) for start in (a0, a1)]
        b_now = place_at(builder, b, builder.mul(loop.index, number_of(panel)))
        # The next step's tiles B, a part of them before each product.
        ahead, share = iter(range(panel, 2 * panel, 64)), -(-(panel // 64) // (4 * products))
        before: tuple[int | None, int | None] = None, None
        for planes in _PRODUCTS[products]:
            for i in range(2):
                if planes[0] != before[0]:
                    tiles.load(4 + i, place_at(builder, a[i], builder.mul(a_plane, number_of(planes[0]))), a_row)
                if planes[1] != before[1]:
                    tiles.load(
                        6 + i, place_at(builder, b_now, (2 * planes[1] + i) * _TILE_BYTES), number_of(_ROW_BYTES)
                    )
            for tile in range(4):
                tiles.multiply(tile, 4 + tile // 2, 6 + tile % 2)
                for line in islice(ahead, share):
                    fetch_line(builder, place_at(builder, b_now, line), level=3)
            before = planes
    adds = builder.icmp_signed("!=", add, number_of(0))
    with builder.if_else(adds) as (then, otherwise):
        with then:
            room = cgutils.alloca_once(builder, ir.ArrayType(_FLOATS, 4 * _TILE_ROWS))
            sums = builder.bitcast(room, I8P)
            for tile in range(4):
                tiles.store(tile, place_at(builder, sums, tile * _TILE_BYTES), number_of(_ROW_BYTES))
            for tile in range(4):
                with cgutils.for_range_slice(builder, done[tile // 2], held, number_of(1)) as (row, _):
                    place = place_at(builder, sums, builder.mul(row, number_of(_ROW_BYTES)))
                    more = load_vector(builder, place, tile * _TILE_BYTES, _FLOATS, 4)
                    place = place_at(builder, (out0, out1)[tile // 2], builder.mul(row, out_row), tile % 2 * _ROW_BYTES)
                    place = builder.bitcast(place, _FLOATS.as_pointer())
                    there = with_alignment(builder.load(place), 4)
                    with_alignment(builder.store(builder.fadd(there, more), place), 4)
        with otherwise:
            for tile in range(4):
                tiles.store(tile, place_at(builder, (out0, out1)[tile // 2], tile % 2 * _ROW_BYTES), out_row)


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
        self.memory = builder.bitcast(room, I8P)

    def _rows(self, tile):
        return self.held if tile < 6 else number_of(_TILE_ROWS)

    def _tile(self, tile):
        return place_at(self.builder, self.memory, tile * _TILE_BYTES)

    def _move(self, target, target_row, source, source_row, rows):
        with cgutils.for_range(self.builder, rows) as loop:
            place = place_at(self.builder, source, self.builder.mul(loop.index, source_row))
            into = place_at(self.builder, target, self.builder.mul(loop.index, target_row))
            value = load_vector(self.builder, place, 0, _WORDS, 2)
            self.builder.store(value, self.builder.bitcast(into, _WORDS.as_pointer())).align = 2

    def zero(self, tile):
        cgutils.memset(self.builder, self._tile(tile), number_of(_TILE_BYTES), 0)

    def load(self, tile, place, row):
        self._move(self._tile(tile), number_of(_ROW_BYTES), place, row, self._rows(tile))

    def store(self, tile, place, row):
        self._move(place, row, self._tile(tile), number_of(_ROW_BYTES), self._rows(tile))

    def multiply(self, c, a, b):
        function = _emulated_product(self.builder.module)
        self.builder.call(function, [self._tile(c), self._tile(a), self._tile(b), self.held])


def _emulated_product(module):
    """TDPBF16PS: sums of even and of odd numbers by fused multiply-add, then their sum; subnormal numbers are zero."""
    signature = ir.FunctionType(ir.VoidType(), [I8P, I8P, I8P, I64])
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
        with cgutils.for_range(builder, number_of(DEPTH // 2)) as pair:
            place = place_at(
                builder, a, builder.mul(row.index, number_of(_ROW_BYTES)), builder.mul(pair.index, number_of(4))
            )
            ours = splat(builder, builder.load(builder.bitcast(place, I32.as_pointer())), 16)
            theirs = load_vector(
                builder, place_at(builder, b, builder.mul(pair.index, number_of(_ROW_BYTES))), 0, _WORDS, 4
            )
            for number, total in enumerate(sums):
                x, y = (_flush(builder, _of_pair(builder, words, number)) for words in (ours, theirs))
                fused = builder.call(fma_of(builder, _FLOATS), [x, y, builder.load(total)])
                builder.store(_flush(builder, fused), total)
        place = builder.bitcast(
            place_at(builder, c, builder.mul(row.index, number_of(_ROW_BYTES))), _FLOATS.as_pointer()
        )
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
    table, panel = builder.inttoptr(offsets, I64.as_pointer()), PLANES[products] * 2 * _TILE_BYTES
    with cgutils.for_range(builder, steps) as step:
        a_now = place_at(builder, a0, builder.load(builder.gep(table, [step.index])))
        b_now = place_at(builder, b, builder.mul(step.index, number_of(panel)))
        with cgutils.for_range(builder, number_of(DEPTH // 2)) as pair:
            a_pair = place_at(builder, a_now, builder.mul(pair.index, number_of(4)))
            b_pair = place_at(builder, b_now, builder.mul(pair.index, number_of(_ROW_BYTES)))
            for a_number, b_number in _PRODUCTS[products]:
                place = place_at(builder, a_pair, builder.mul(a_plane, number_of(a_number)))
                start = 2 * b_number * _TILE_BYTES
                weights = [load_vector(builder, b_pair, start + j * _TILE_BYTES, pairs, 2) for j in range(2)]
                for j in range(2):
                    fetch_line(builder, place_at(builder, b_pair, start + j * _TILE_BYTES + PREFETCH), level=3)
                for i in range(rows):
                    value = builder.load(builder.bitcast(place, I32.as_pointer()))
                    value.align = 2
                    value = builder.bitcast(splat(builder, value, 16), pairs)
                    for total, weight in zip(sums[2 * i : 2 * i + 2], weights):
                        builder.store(builder.call(dot, [builder.load(total), weight, value]), total)
                    place = place_at(builder, place, a_row)
    values = []
    for number, total in enumerate(sums):
        row = number_of(number // 2)
        counts = builder.and_(builder.icmp_signed(">=", row, done), builder.icmp_signed("<", row, held))
        values.append(builder.select(counts, builder.load(total), _constant(_FLOATS, 0.0)))
    store_tile(builder, tile, 4, values, out0, multiples(builder, out_row, rows), add)
