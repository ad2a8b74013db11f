"""Vector code of depthwise convolution: taps that slide over pixels, and their gradient."""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .vector_ir import (
    I8P,
    I64,
    change_if,
    fma_of,
    load_vector,
    multiples,
    rectify,
    table_of,
    vector_type,
    with_alignment,
)

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
        self.vector = vector_type(lanes, itemsize)
        zero = ir.Constant(self.vector, [0.0] * lanes)
        self.sums = [cgutils.alloca_once_value(builder, zero) for _ in range(pixels)]

    def generate(
        self, source, step, rows, first_row, last_row, columns, first_column, last_column, weights, bias, out, out_step,
        code,
    ):  # fmt: skip
        builder = self.builder
        one, lot = ir.Constant(I64, 1), ir.Constant(I64, SLIDING)
        unit = builder.ashr(step, ir.Constant(I64, self.apart // 2))
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
        values = change_if(
            builder, bias, values, lambda values: [builder.fadd(value, self._load(bias)) for value in values]
        )
        values = change_if(builder, code, values, lambda values: rectify(builder, values, code))
        for value, offset in zip(values, multiples(builder, out_step, self.pixels)):
            place = builder.inttoptr(builder.add(out, offset), self.vector.as_pointer())
            with_alignment(builder.store(value, place), self.itemsize)

    def _entry(self, table, number):
        """The place of a row or column of taps in the source and in the weights."""
        at = self.builder.add(table, self.builder.mul(number, ir.Constant(I64, 24)))
        return table_of(self.builder, at, 2)

    def _load(self, place):
        return load_vector(self.builder, self.builder.inttoptr(place, I8P), 0, self.vector, self.itemsize)

    def _take(self, row, weights, columns, column, taps, unit, apart):
        """Add what some neighbouring taps give: each column they meet is loaded once."""
        builder = self.builder
        entries = [self._entry(columns, builder.add(column, ir.Constant(I64, t))) for t in range(taps)]
        factors = [self._load(builder.add(weights, weight)) for _, weight in entries]
        place = builder.add(row, entries[0][0])
        for number in range((self.pixels - 1) * apart + taps):
            met = [(j, number - j * apart) for j in range(self.pixels) if 0 <= number - j * apart < taps]
            value = self._load(place) if met else None
            for j, t in met:
                fma = fma_of(builder, self.vector)
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
    vector, wide = vector_type(lanes, itemsize), vector_type(lanes, 8)
    found = [cgutils.alloca_once_value(builder, ir.Constant(vector, [0.0] * lanes)) for _ in range(taps)]
    places = table_of(builder, offsets, taps)
    with cgutils.for_range(builder, rows) as row:
        at = builder.add(source, builder.mul(row.index, source_row))
        starts = [builder.add(at, place) for place in places]
        grads = builder.add(grad, builder.mul(row.index, grad_row))
        with cgutils.for_range(builder, count) as column:
            place = builder.add(grads, builder.mul(column.index, grad_step))
            value = load_vector(builder, builder.inttoptr(place, I8P), 0, vector, itemsize)
            along = builder.mul(column.index, source_step)
            for total, start in zip(found, starts):
                pixel = load_vector(builder, builder.gep(builder.inttoptr(start, I8P), [along]), 0, vector, itemsize)
                builder.store(builder.call(fma_of(builder, vector), [value, pixel, builder.load(total)]), total)
    for t, total in enumerate(found):
        place = builder.inttoptr(builder.add(sums, ir.Constant(I64, t * lanes * 8)), I8P)
        more = builder.load(total)
        more = builder.fpext(more, wide) if itemsize == 4 else more
        place = builder.bitcast(place, wide.as_pointer())
        with_alignment(builder.store(builder.fadd(with_alignment(builder.load(place), 8), more), place), 8)
