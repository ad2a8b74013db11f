"""Vector code of pooling: windows reduced side by side, and what they have spread over the elements they came from."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import simd
from .vector_ir import (
    I8P,
    I32,
    I64,
    lanes_below,
    load_vector,
    masked_load,
    masked_store,
    nbytes_of,
    shuffle,
    splat,
    store_unaligned,
)

# What `reduce_window` computes, and the elements it takes, by number.
MAXIMUM, SUM, WIDE_SUM = range(3)
ELEMENTS = ("float32", "float64", "int8", "uint8", "int16", "int32", "int64")


def element_lanes(element):
    """Return how many windows are reduced side by side: a register of elements, or of 32-bit positions if wider."""
    nbytes = {"avx512": 64, "avx2": 32}.get(simd.instruction_set(), 16)
    return nbytes // max(4, nbytes_of(_element_type(element)[0]))


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
    return simd.instruction_set() == "avx512"


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
        self.mask = lanes_below(builder, count, lanes)
        if step == PACKED:
            self._unpack(packing)
            return
        self.places = [step * i for i in range(lanes)]
        apart = ir.Constant(I64, max(step, 1))
        # Of the lanes in use, only elements between the first and the last are read.
        spread = builder.sub(builder.mul(count, apart), builder.sub(apart, ir.Constant(I64, 1)))
        self.wide_mask = self.mask if step <= 1 else lanes_below(builder, spread, lanes * step)

    def _unpack(self, packing):
        """Load what `packing_of` wrote."""
        builder, lanes, bits = self.builder, self.lanes, 8 * nbytes_of(self.vector.element)
        base, wide = builder.inttoptr(packing, I8P), ir.VectorType(I64, lanes)
        self.second = load_vector(builder, base, 0, I64, 8)
        masks = [builder.trunc(load_vector(builder, base, 8 * i, I64, 8), ir.IntType(lanes)) for i in (1, 2)]
        self.masks = [builder.bitcast(mask, ir.VectorType(ir.IntType(1), lanes)) for mask in masks]
        order, self.places = (load_vector(builder, base, 8 * (3 + i), wide, 8) for i in (0, lanes))
        self.order = order if bits == 64 else builder.trunc(order, ir.VectorType(ir.IntType(bits), lanes))

    def generate(
        self, source, depth_step, depths, row_step, rows, column_step, columns,
        position, position_depth, position_row, position_column, target, where, divisor,
    ):  # fmt: skip
        builder = self.builder
        best, found = cgutils.alloca_once_value(builder, self._lowest(self.held)), None
        if self.positions:
            taps = builder.mul(builder.mul(depths, rows), columns)
            nothing = builder.icmp_signed("==", taps, ir.Constant(I64, 0))
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
                take(*(ir.Constant(I64, at) for at in (0, *divmod(tap, self.kernel))))
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
        return shuffle(self.builder, values, values, [self.step * i for i in range(self.lanes)])

    def _masked(self, place, vector, mask):
        if self.whole:
            return load_vector(self.builder, self.builder.inttoptr(place, I8P), 0, vector, nbytes_of(vector.element))
        return masked_load(self.builder, self.builder.inttoptr(place, vector.as_pointer()), mask, vector)

    def _numbers(self, first):
        kind = self.positions.element
        single = first if kind.width == 64 else self.builder.trunc(first, kind)
        offsets = self.places
        if self.step != PACKED:
            offsets = ir.Constant(self.positions, offsets)
        elif kind.width < 64:
            offsets = self.builder.trunc(offsets, self.positions)
        return self.builder.add(splat(self.builder, single, self.lanes), offsets)

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
            result = builder.fdiv(result, splat(builder, by, self.lanes))
            result = result if result.type == self.vector else builder.fptrunc(result, self.vector)
        results = [(result, target)]
        if found is not None:
            numbers = builder.load(found)
            if self.positions.element.width < 64:
                numbers = builder.sext(numbers, ir.VectorType(I64, self.lanes))
            results.append((numbers, where))
        for vector, place in results:
            if self.whole:
                store_unaligned(builder, vector, place)
            else:
                masked_store(builder, vector, builder.inttoptr(place, vector.type.as_pointer()), self.mask)


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


@intrinsic(prefer_literal=True)
def spread_windows(
    typing_context, element, lanes, across, kernel, stride,
    values, depths, depth_step, row_step, column_step, h, H, w, W, count, target, target_row, target_column, divisor,
):  # fmt: skip
    """Write `stride` columns of a few rows for each lane: the sums of the values of the windows that hold them.

    The rows are those of `rows_together(stride)` windows. Lanes are neighbouring windows (`across`), or else the
    first `count` are channels. A window is `kernel` x `kernel`; one begins at (h, w), the first element. In elements
    from `values`, the window before is a row or column step back, and the next of `depths` a depth step on. Sums are
    divided.
    """
    shape = [t.literal_value for t in (element, lanes, across, kernel, stride)]
    signature = types.void(element, lanes, across, kernel, stride, *[types.int64] * 13, types.float64)

    def generate(context, builder, signature, args):
        _Spread(builder, *shape).generate(*args[5:])
        return context.get_dummy_value()

    return signature, generate


class _Spread:
    """Generates `spread_windows`: a register for each of the elements, and each window loaded once for all."""

    def __init__(self, builder, element, lanes, across, kernel, stride):
        self.builder, self.lanes, self.across = builder, lanes, across
        self.kernel, self.stride = kernel, stride
        self.vector = ir.VectorType(_element_type(element)[0], lanes)
        self.numbers = ir.VectorType(I32, lanes)
        self.height = stride * rows_together(stride)
        self.cells = [(a, t) for a in range(self.height) for t in range(stride)]

    def generate(
        self, values, depths, depth_step, row_step, column_step, h, H, w, W, count, target, target_row, target_column,
        divisor,
    ):  # fmt: skip
        builder = self.builder
        rows = [self._below(builder.add(h, self._number(a)), H) for a in range(self.height)]
        columns = [self._columns(builder.add(w, self._number(t)), W, count) for t in range(self.stride)]
        zeros = ir.Constant(self.vector, [0.0] * self.lanes)
        sums = {cell: cgutils.alloca_once_value(builder, zeros) for cell in self.cells}
        earlier = range((self.kernel - 1) // self.stride, -1, -1)
        with cgutils.for_range(builder, depths) as depth:
            start = builder.mul(depth.index, depth_step)
            # In scan order.
            later = range(-1, -rows_together(self.stride), -1)
            for i, j in ((i, j) for i in (*earlier, *later) for j in earlier):
                back = builder.add(builder.mul(row_step, self._number(i)), builder.mul(column_step, self._number(j)))
                self._window(i, j, self._at(values, builder.sub(start, back)), sums)
        length = self.stride * self.lanes if self.across else self.stride
        whole = builder.and_(self._below(w, W), self._below(builder.add(w, self._number(length - 1)), W))
        if not self.across:
            whole = builder.and_(whole, builder.icmp_signed("==", count, self._number(self.lanes)))
        for a in range(self.height):
            with builder.if_then(rows[a]):
                results = [self._divided(builder.load(sums[a, t]), divisor) for t in range(self.stride)]
                place = builder.add(target, builder.mul(target_row, self._number(a)))
                self._store(results, columns, whole, place, target_column, w, W)

    def _number(self, value):
        return ir.Constant(I64, value)

    def _below(self, value, end):
        """Whether a number is in range(end): as unsigned, a negative one is large."""
        return self.builder.icmp_unsigned("<", value, end)

    def _splat(self, value):
        return splat(self.builder, self.builder.trunc(value, I32), self.lanes)

    def _from(self, first, step=None):
        """Return `first` in each lane, or counting up in steps where lanes are windows."""
        step = (step or self.stride) if self.across else 0
        return self.builder.add(self._splat(first), ir.Constant(self.numbers, [step * i for i in range(self.lanes)]))

    def _columns(self, w, W, count):
        """Return the mask of the lanes whose column from `w` on is in the row."""
        builder = self.builder
        inside = builder.icmp_unsigned("<", self._from(w), self._splat(W))
        return inside if self.across else builder.and_(inside, lanes_below(builder, count, self.lanes))

    def _window(self, i, j, value, sums):
        """Add one window's value to the elements it holds."""
        builder, kernel, stride = self.builder, self.kernel, self.stride
        for a, t in self.cells:
            if 0 <= a + i * stride < kernel and t + j * stride < kernel:
                builder.store(builder.fadd(builder.load(sums[a, t]), value), sums[a, t])

    def _at(self, base, offset):
        """Load the vector that begins so many elements from an address."""
        builder, nbytes = self.builder, nbytes_of(self.vector.element)
        place = builder.add(base, builder.mul(offset, self._number(nbytes)))
        return load_vector(builder, builder.inttoptr(place, I8P), 0, self.vector, nbytes)

    def _divided(self, total, divisor):
        builder, kind = self.builder, self.vector.element
        by = divisor if isinstance(kind, ir.DoubleType) else builder.fptrunc(divisor, kind)
        return builder.fdiv(total, splat(builder, by, self.lanes))

    def _store(self, results, columns, whole, place, target_column, w, W):
        """Write a row: of channels element by element, of windows interleaved."""
        builder = self.builder
        if self.across:
            results, target_column = (
                _interleaved(builder, results),
                self._number(self.lanes * nbytes_of(self.vector.element)),
            )
        for t, result in enumerate(results):
            at = builder.add(place, builder.mul(target_column, self._number(t)))
            with builder.if_else(whole, likely=True) as (then, otherwise):
                with then:
                    store_unaligned(builder, result, at)
                with otherwise:
                    # Slower by far, even where all lanes are written.
                    inside = columns[t]
                    if self.across:
                        first = builder.add(w, self._number(t * self.lanes))
                        inside = builder.icmp_unsigned("<", self._from(first, 1), self._splat(W))
                    masked_store(builder, result, builder.inttoptr(at, result.type.as_pointer()), inside)


def _interleaved(builder, vectors):
    """Return vectors with the first elements of all, then the second ones, and so on."""
    count, lanes = len(vectors), vectors[0].type.count
    whole = vectors[0]
    for k, vector in enumerate(vectors[1:], 2):
        # Operands of a shuffle are as long as each other.
        padded = shuffle(builder, vector, vector, [i % lanes for i in range(lanes * (k - 1))])
        whole = shuffle(builder, whole, padded, list(range(lanes * k)))
    order = [i % count * lanes + i // count for i in range(count * lanes)]
    return [shuffle(builder, whole, whole, order[k : k + lanes]) for k in range(0, count * lanes, lanes)]
