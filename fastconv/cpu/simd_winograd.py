"""Vector code of Winograd: a tile's transform from both sides, its matrices unrolled to additions and products."""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..minimal_filtering import filtering, transposed
from .vector_ir import I8P, I64, fma_of, load_vector, splat

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
        added = load_vector(builder, builder.inttoptr(args[9], I8P), 0, vector, shape[2])
        least = splat(builder, args[10], shape[1])

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
        _linear(
            builder, matrix, [load_vector(builder, _cell(builder, source, i, j), 0, vector, itemsize) for i in columns]
        )
        for j in columns
    ]
    for i in range(len(matrix)):
        for j, value in enumerate(_linear(builder, matrix, [half[k][i] for k in columns])):
            place = builder.bitcast(_cell(builder, target, i, j), vector.as_pointer())
            builder.store(epilogue(value), place).align = itemsize


def _cell(builder, grid, i, j):
    start, row, column = grid
    at = builder.add(builder.mul(row, ir.Constant(I64, i)), builder.mul(column, ir.Constant(I64, j)))
    return builder.gep(builder.inttoptr(start, I8P), [at])


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
            total = builder.call(fma_of(builder, value.type), [value, constant, total])
    return total
