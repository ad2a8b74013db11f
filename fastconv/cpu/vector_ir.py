"""Words of LLVM's IR: what the intrinsics of the `simd` modules are written with.

Each takes the builder first, and pointers as `i8*` or of what lies there.
"""

from llvmlite import ir
from numba.core import cgutils

from ..activations import LEAKY_SLOPE

I8P, I32, I64 = ir.IntType(8).as_pointer(), ir.IntType(32), ir.IntType(64)

# Bytes ahead of the panel that are fetched: measured on packed panels of 64 to 256 kB.
PREFETCH = 512


def vector_type(lanes, itemsize):
    """Return the type of a vector of floats."""
    return ir.VectorType(ir.FloatType() if itemsize == 4 else ir.DoubleType(), lanes)


def masked_load(builder, pointer, inside, vector):
    """Return a vector, zero where the mask is not set: nothing is read there."""
    signature = ir.FunctionType(vector, [pointer.type, I32, inside.type, vector])
    function = cgutils.get_or_insert_function(builder.module, signature, f"llvm.masked.load.{suffix_of(vector)}.p0")
    zeros = ir.Constant(vector, [0 if isinstance(vector.element, ir.IntType) else 0.0] * vector.count)
    return builder.call(function, [pointer, ir.Constant(I32, nbytes_of(vector.element)), inside, zeros])


def masked_store(builder, vector, pointer, inside):
    """Write a vector where the mask is set."""
    kind = vector.type
    signature = ir.FunctionType(ir.VoidType(), [kind, pointer.type, I32, inside.type])
    function = cgutils.get_or_insert_function(builder.module, signature, f"llvm.masked.store.{suffix_of(kind)}.p0")
    builder.call(function, [vector, pointer, ir.Constant(I32, nbytes_of(kind.element)), inside])


def suffix_of(vector):
    """Return what the names of LLVM's functions say of a vector's type."""
    letter = "i" if isinstance(vector.element, ir.IntType) else "f"
    return f"v{vector.count}{letter}{8 * nbytes_of(vector.element)}"


def nbytes_of(kind):
    """Return the size of an element of this type."""
    return kind.width // 8 if isinstance(kind, ir.IntType) else {ir.FloatType(): 4, ir.DoubleType(): 8}[kind]


def shuffle(builder, a, b, order):
    """Return the elements of two vectors, counted through both, in this order."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(order)), order))


def lanes_below(builder, count, lanes):
    """Return the mask of the lanes whose number is below a count."""
    numbers = ir.Constant(ir.VectorType(I64, lanes), list(range(lanes)))
    return builder.icmp_signed("<", numbers, splat(builder, count, lanes))


def splat(builder, value, lanes):
    """Return a vector of equal elements."""
    vector = ir.VectorType(value.type, lanes)
    single = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(I32, 0))
    return shuffle(builder, single, ir.Constant(vector, ir.Undefined), [0] * lanes)


def multiples(builder, step, count):
    """Return 0, step, 2*step and so on."""
    values = [ir.Constant(I64, 0)]
    for _ in range(1, count):
        values.append(builder.add(values[-1], step))
    return values


def table_of(builder, place, count):
    """Return the first int64 numbers at an address."""
    pointer = builder.inttoptr(place, I64.as_pointer())
    return [builder.load(builder.gep(pointer, [ir.Constant(I64, i)])) for i in range(count)]


def change_if(builder, condition, values, change):
    """Return change(values) where the condition is not zero."""
    before = builder.block
    with builder.if_then(builder.icmp_signed("!=", condition, ir.Constant(I64, 0))):
        changed, after = change(values), builder.block
    merged = []
    for old, new in zip(values, changed):
        merged.append(builder.phi(old.type))
        merged[-1].add_incoming(old, before)
        merged[-1].add_incoming(new, after)
    return merged


def rectify(builder, values, code):
    """Return ReLU (code 1) or leaky ReLU (code 2); the comparison is false for NaN, which passes through."""
    vector = values[0].type
    zero, slope = (ir.Constant(vector, [number] * vector.count) for number in (0.0, LEAKY_SLOPE))
    relu = builder.icmp_signed("==", code, ir.Constant(I64, 1))
    return [
        builder.select(
            builder.fcmp_ordered("<", value, zero), builder.select(relu, zero, builder.fmul(value, slope)), value
        )
        for value in values
    ]


def with_alignment(instruction, align):
    """Say how a load or store is aligned, and return it."""
    instruction.align = align
    return instruction


def load_vector(builder, pointer, offset, vector, align):
    """Return the vector so many bytes behind a pointer."""
    place = builder.bitcast(builder.gep(pointer, [ir.Constant(I64, offset)]), vector.as_pointer())
    return with_alignment(builder.load(place), align)


def fetch_line(builder, pointer, level):
    """Prefetch a line for reading; level 3 is the first-level cache, 2 the second."""
    kind = ir.FunctionType(ir.VoidType(), [I8P, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [pointer, *(ir.Constant(I32, v) for v in (0, level, 1))])


def prefetch(builder, pointer, nbytes):
    """Fetch so many bytes that come PREFETCH behind a pointer."""
    for offset in range(0, nbytes, 64):
        fetch_line(builder, builder.gep(pointer, [ir.Constant(I64, PREFETCH + offset)]), level=3)


def fma_of(builder, vector):
    """Return LLVM's function a * b + c of vectors."""
    bits = 32 if isinstance(vector.element, ir.FloatType) else 64
    name = f"llvm.fma.v{vector.count}f{bits}"
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3), name)


def store_unaligned(builder, vector, place):
    """Write a vector to an address of its elements."""
    builder.store(vector, builder.inttoptr(place, vector.type.as_pointer())).align = nbytes_of(vector.type.element)


def number_of(value):
    """Return an int64 constant."""
    return ir.Constant(I64, value)


def place_at(builder, address, *offsets):
    """Return the pointer to an address, or an address plus offsets."""
    pointer = builder.inttoptr(address, I8P) if address.type == I64 else address
    for offset in offsets:
        pointer = builder.gep(pointer, [number_of(offset) if isinstance(offset, int) else offset])
    return pointer
