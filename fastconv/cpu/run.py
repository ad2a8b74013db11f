"""Running on the CPU: from the caller's arrays to what kernels take, and back.

Kernels take C-contiguous arrays of three spatial dimensions in float32, float64 or 32-bit integers. Here memory is
laid out so (copied only if it is not so already), half precision is staged in float32, borders that copy the image
are built, and results go to the caller's dtype, format and `out`.

All arrays are batched ndarrays in the format of the geometry.
"""

from functools import partial
from math import prod

import numpy as np

from .. import arrays
from ..arrays import allocator, compute_dtype, empty, in_format, lift, memory_format, out_format
from ..geometry import first_spatial_axis, join_shape, planes_shape
from . import epilogue, padding, pool, threads
from .programs import Recorded
from .workspace import layout_of, workspace


def stored_format(array, data_format):
    """Return the memory format to compute in: the one the array has, or else its own data format."""
    return memory_format(array, data_format == "channels_first") or data_format


def conv_forward(choice, geometry, stored, x, weight, bias, activation, out, compute=None):
    """Return activation(conv(x, weight) + bias), in `out` if that is given.

    A plan computes (x, bias, result) by itself: `compute` takes contiguous arrays.
    """
    g, inner = geometry, choice.geometry
    dtype = inner.dtype
    x = _operand(g, stored, x, dtype if g.dtype.kind not in "iu" else x.dtype)
    if g.padding_mode != "zeros":
        x = padding.pad(x, g.padding, g.padding_mode, first_spatial_axis(stored))
    if bias is not None:
        bias = np.ascontiguousarray(bias, dtype)
    if compute is None:
        weight = lifted_weight(weight, dtype)
        compute = partial(lifted_call(choice, "forward", activation), b=weight)
    result, direct = _destination(g, stored, g.out_channels, g.output_size, dtype, out, (x, weight, bias))
    compute(x, bias=bias, result=result)
    return _finish(g, stored, result, direct, out)


def lifted_weight(weight, dtype):
    """Return the weight as kernels take it, for arithmetic in a dtype."""
    dtype = weight.dtype if dtype.kind in "iu" else dtype
    return lift(in_format(weight, "channels_first", "channels_first", dtype), "channels_first")


def conv_input_grad(choice, geometry, stored, grad_output, weight, out=None, bias=None, activation=None):
    """Return the gradient with respect to the input; as a transposed convolution, through bias and activation."""
    g, inner = geometry, choice.geometry
    dtype = inner.dtype
    grad_output = lift(_operand(g, stored, grad_output, dtype), stored)
    weight = lift(in_format(weight, "channels_first", "channels_first", dtype), "channels_first")
    if bias is not None:
        bias = np.ascontiguousarray(bias, dtype)
    padded = g.padding_mode != "zeros"
    result, direct = _destination(g, stored, g.in_channels, g.input_size, dtype, out, (grad_output, weight, bias))
    target = empty(join_shape(g.batch, g.in_channels, g.padded_size, stored), dtype) if padded else result
    with workspace(choice.buffers) as lent:
        choice.algorithm.implementation.input_grad(inner, grad_output, weight, lift(target, stored), lent)
    if padded:
        padding.fold_back(target, g.padding, g.padding_mode, first_spatial_axis(stored), result)
    epilogue.apply(lift(result, stored), stored, bias, activation)
    return _finish(g, stored, result, direct, out)


def conv_weight_grad(choice, geometry, stored, grad_output, x):
    """Return the gradient with respect to the weight."""
    g, inner = geometry, choice.geometry
    dtype = inner.dtype
    x = _operand(g, stored, x, dtype)
    if g.padding_mode != "zeros":
        x = padding.pad(x, g.padding, g.padding_mode, first_spatial_axis(stored))
    grad_output = lift(_operand(g, stored, grad_output, dtype), stored)
    result = empty(g.weight_shape, dtype)
    with workspace(choice.buffers) as lent:
        choice.algorithm.implementation.weight_grad(
            inner, grad_output, lift(x, stored), lift(result, "channels_first"), lent
        )
    return result if dtype == g.dtype else result.astype(g.dtype)


def bias_grad(grad_output, data_format):
    """Return the sum of the gradient over batch and space, added up in float64."""
    stored = stored_format(grad_output, data_format)
    dtype = compute_dtype(grad_output.dtype)
    grad = in_format(grad_output, data_format, stored, dtype)
    result = empty((grad.shape[1 if stored == "channels_first" else -1],), dtype)
    epilogue.sum_pixels(grad.reshape(_pixels_shape(grad.shape, stored)), result)
    return result if dtype == grad_output.dtype else result.astype(grad_output.dtype)


def _pixels_shape(shape, stored):
    """(N, C, L) or (L, C)."""
    if stored == "channels_first":
        return shape[0], shape[1], prod(shape[2:])
    return prod(shape[:-1]), shape[-1]


# --- prepared calls --------------------------------------------------------------------------------------------
#
# Each of the functions made here writes to the C-contiguous arrays it is given for its results, or makes them.


def prepared_forward(choice, geometry, activation):
    """Return a function of (x, weight, bias) that is a whole forward call, as `calls` keeps it, or None."""
    return _prepared(choice, geometry, "forward", geometry.output_shape, activation)


def prepared_input_grad(choice, geometry):
    """Return a function of (grad_output, weight) for the gradient with respect to the input, or None."""
    return _prepared(choice, geometry, "input_grad", geometry.x_shape)


def prepared_weight_grad(choice, geometry):
    """Return a function of (grad_output, x) for the gradient with respect to the weight, or None."""
    return _prepared(choice, geometry, "weight_grad", geometry.weight_shape)


def prepared_bias_grad(geometry):
    """Return a function of grad_output for the gradient with respect to the bias, or None."""
    g = geometry
    if g.is_empty or compute_dtype(g.dtype) != g.dtype:
        return None
    shape = _pixels_shape(join_shape(g.batch, g.out_channels, g.output_size, g.data_format), g.data_format)
    make = allocator((g.out_channels,), g.dtype)

    def run(grad_output, result=None):
        result = make() if result is None else result
        epilogue.sum_pixels(grad_output.reshape(shape), result)
        return result

    return run


def _prepared(choice, geometry, direction, shape, activation=None):
    """Return a function of (factor, factor, bias) that makes the result; None if arrays are staged on the way."""
    if is_staged(choice, geometry):
        return None
    make, compute = allocator(shape, geometry.dtype), lifted_call(choice, direction, activation)
    recorded = _recorded(choice, direction, activation)
    # The workspace is for so many threads.
    count = threads.count() if choice.buffers else None

    def run(a, b, bias=None, result=None):
        if count is not None and threads.count() != count:
            return None
        result = make() if result is None else result
        if recorded is None or not recorded(a, b, bias, result):
            compute(a, b, bias, result)
        return result

    return run


def _recorded(choice, direction, activation):
    """Return the call of an algorithm that works in tasks, to be recorded, or None."""
    g, algorithm = choice.geometry, choice.algorithm.implementation
    if not getattr(algorithm, "IN_TASKS", False):
        return None
    first, second, last = _operands(g, direction)
    shapes = first, second, (g.out_channels,), last
    return Recorded(_lifted(choice, direction, activation), shapes, g.dtype, layout_of(choice.buffers))


def _lifted(choice, direction, activation):
    """Return a function of (factor, factor, bias, result, workspace) that runs an algorithm on lifted arrays."""
    g, function = choice.geometry, getattr(choice.algorithm.implementation, direction)

    def compute(a, b, bias, result, lent):
        more = (bias, activation) if direction == "forward" else ()
        function(g, a, b, *more, result, lent)

    return compute


def _operands(g, direction):
    """Return the shapes of the factors and of the result."""
    x, w, y = g.x_shape, g.weight_shape, g.output_shape
    return {"forward": (x, w, y), "input_grad": (y, w, x), "weight_grad": (y, x, w)}[direction]


def is_staged(choice, geometry):
    """Whether the algorithm does not work on the caller's arrays, contiguous as they may be, or there is none."""
    return geometry.is_empty or geometry.padding_mode != "zeros" or choice.geometry.dtype != geometry.dtype


def lifted_call(choice, direction, activation=None):
    """Return a function of (factor a, factor b, bias, result) that runs an algorithm on contiguous arrays."""
    g, algorithm = choice.geometry, choice.algorithm.implementation
    if hasattr(algorithm, "bind"):
        return algorithm.bind(g, direction, activation)
    function, layout = _lifted(choice, direction, activation), layout_of(choice.buffers)
    first, second, last = _operands(g, direction)

    def compute(a, b, bias, result):
        with workspace(choice.buffers, layout) as lent:
            function(a.reshape(first), b.reshape(second), bias, result.reshape(last), lent)

    return compute


def _operand(geometry, stored, array, dtype):
    return in_format(array, geometry.data_format, stored, dtype)


def _destination(geometry, stored, channels, spatial, dtype, out, inputs):
    """Return memory for the result, and whether it is that of `out`."""
    if out is not None and out.dtype == dtype and not arrays.overlap(out, *inputs):
        moved = out_format(out, geometry.data_format, stored)
        if moved.flags.c_contiguous and moved.flags.aligned:
            return moved, True
    return empty(join_shape(geometry.batch, channels, spatial, stored), dtype), False


def _finish(geometry, stored, result, is_out, out):
    """Return the result in the caller's format and dtype."""
    if is_out:
        return out
    result = out_format(result, stored, geometry.data_format)
    if out is not None:
        with np.errstate(over="ignore", invalid="ignore"):
            np.copyto(out, result, casting="unsafe")
        return out
    if geometry.dtype.kind in "iu" or result.dtype == geometry.dtype:
        return result
    with np.errstate(over="ignore", invalid="ignore"):
        return result.astype(geometry.dtype)


# --- pooling ---------------------------------------------------------------------------------------------------


def _as_planes(array, data_format, stored, dtype):
    """Return the array as pooling kernels see it."""
    array = in_format(array, data_format, stored, dtype)
    return array.reshape(planes_shape(array.shape, stored))


def _planes_of(geometry, stored, spatial):
    """Return the shape of a pool's input or output, as pooling kernels see it."""
    return planes_shape(join_shape(geometry.batch, geometry.channels, spatial, stored), stored)


def _pool_dtype(dtype):
    """Half types are staged in float32, which orders them the same; all others pool as they are."""
    return np.dtype(np.float32) if dtype.name in arrays.HALF else dtype


def _given_back(array, stored, data_format, dtype):
    array = out_format(array, stored, data_format)
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(dtype)


def _maximum(g, stored, dtype, with_indices):
    """Return a function of (x, y, indices or None) that pools in one memory format."""
    x, y = (_planes_of(g, stored, size) for size in (g.input_size, g.output_size))
    return pool.maximum(dtype, x, g.windows, y[1:4], with_indices)


def max_pool(geometry, x, return_indices):
    """Return (maxima, int64 indices or None)."""
    g = geometry
    stored, dtype = stored_format(x, g.data_format), _pool_dtype(x.dtype)
    shape = join_shape(g.batch, g.channels, g.output_size, stored)
    y, indices = empty(shape, dtype), empty(shape, np.int64) if return_indices else None
    _maximum(g, stored, dtype, return_indices)(in_format(x, g.data_format, stored, dtype), y, indices)
    if indices is not None:
        indices = out_format(indices, stored, g.data_format)
    return _given_back(y, stored, g.data_format, x.dtype), indices


def prepared_max_pool(geometry, dtype, return_indices):
    """Return a function of x that is a whole call, as `calls` keeps it, or None if x is staged on the way."""
    g = geometry
    if _pool_dtype(dtype) != dtype:
        return None
    compute, make = _maximum(g, g.data_format, dtype, return_indices), allocator(g.output_shape, dtype)
    if not return_indices:

        def run_alone(x, y=None):
            y = make() if y is None else y
            compute(x, y)
            return y

        return run_alone
    make_indices = allocator(g.output_shape, np.int64)

    def run(x, y=None, indices=None):
        y = make() if y is None else y
        indices = make_indices() if indices is None else indices
        compute(x, y, indices)
        return y, indices

    return run


def max_pool_backward(grad_output, indices, batch, channels, input_size, data_format):
    """Return (gradient with respect to the input, whether all indices were inside the plane or -1)."""
    return _scattered(pool.scatter_add, grad_output, indices, batch, channels, input_size, data_format)


def prepared_max_pool_backward(grad_output, indices, input_shape, data_format):
    """Return a function of (grad_output, indices) that is a whole call, or None; it returns None for bad indices.

    The arrays are those of a first call, with a batch.
    """
    dtype = grad_output.dtype
    if _pool_dtype(dtype) != dtype:
        return None
    shape = planes_shape(grad_output.shape, data_format)
    sizes = planes_shape((1,) * (grad_output.ndim - len(input_shape)) + input_shape, data_format)[1:4]
    compute, make = pool.scatter_add(dtype, shape, sizes), allocator(input_shape, dtype)

    def run(grad_output, indices, dx=None):
        dx = make() if dx is None else dx
        return dx if compute(grad_output, indices, dx) else None

    return run


def max_unpool(x, indices, batch, channels, output_size, data_format):
    """Return (values at their indices and 0 elsewhere, whether all indices were inside the plane)."""
    return _scattered(pool.scatter, x, indices, batch, channels, output_size, data_format)


def _scattered(how, values, indices, batch, channels, spatial, data_format):
    stored, dtype = stored_format(values, data_format), _pool_dtype(values.dtype)
    target = empty(join_shape(batch, channels, spatial, stored), dtype)
    where = in_format(indices, data_format, stored, np.dtype(np.int64))
    shape, sizes = planes_shape(where.shape, stored), planes_shape(target.shape, stored)[1:4]
    valid = how(dtype, shape, sizes)(in_format(values, data_format, stored, dtype), where, target)
    return _given_back(target, stored, data_format, values.dtype), valid


def max_unpool_backward(grad_output, indices, batch, channels, input_size, data_format):
    """Return (gradient at each index, whether all indices were inside the plane)."""
    stored, dtype = stored_format(grad_output, data_format), _pool_dtype(grad_output.dtype)
    dx = empty(join_shape(batch, channels, input_size, stored), dtype)
    grad = _as_planes(grad_output, data_format, stored, dtype)
    where = _as_planes(indices, data_format, stored, np.dtype(np.int64))
    valid = pool.gather(grad, where, dx.reshape(planes_shape(dx.shape, stored)))
    return _given_back(dx, stored, data_format, grad_output.dtype), valid


def avg_pool(geometry, x, count_include_pad, divisor):
    """Return the average of each window."""
    g = geometry
    stored, dtype = stored_format(x, g.data_format), _pool_dtype(x.dtype)
    y = empty(join_shape(g.batch, g.channels, g.output_size, stored), dtype)
    if dtype.kind == "f":
        x_ = in_format(x, g.data_format, stored, dtype)
        _average(g, stored, dtype, count_include_pad, divisor)(x_, y)
    else:
        planes = _as_planes(x, g.data_format, stored, dtype)
        pool.average_integers(planes, g.windows, y.reshape(planes_shape(y.shape, stored)), count_include_pad, divisor)
    return _given_back(y, stored, g.data_format, x.dtype)


def _average(g, stored, dtype, count_include_pad, divisor):
    x, y = (_planes_of(g, stored, size) for size in (g.input_size, g.output_size))
    return pool.average(dtype, x, g.windows, y[1:4], count_include_pad, divisor)


def prepared_avg_pool(geometry, dtype, count_include_pad, divisor):
    """Return a function of x that is a whole call, as `calls` keeps it, or None."""
    g = geometry
    if dtype.kind != "f" or _pool_dtype(dtype) != dtype:
        return None
    return _one_to_one(_average(g, g.data_format, dtype, count_include_pad, divisor), g.output_shape, dtype)


def _one_to_one(compute, shape, dtype):
    """Return a function that makes a result and computes it from one array."""
    make = allocator(shape, dtype)

    def run(array, result=None):
        result = make() if result is None else result
        compute(array, result)
        return result

    return run


def avg_pool_backward(geometry, grad_output, count_include_pad, divisor):
    """Return the gradient of the average with respect to its input."""
    g = geometry
    stored, dtype = stored_format(grad_output, g.data_format), _pool_dtype(grad_output.dtype)
    dx = empty(join_shape(g.batch, g.channels, g.input_size, stored), dtype)
    _average_grad(g, stored, dtype, count_include_pad, divisor)(
        in_format(grad_output, g.data_format, stored, dtype), dx
    )
    return _given_back(dx, stored, g.data_format, grad_output.dtype)


def _average_grad(g, stored, dtype, count_include_pad, divisor):
    x, y = (_planes_of(g, stored, size) for size in (g.input_size, g.output_size))
    return pool.average_grad(g, dtype, y, x[1:4], count_include_pad, divisor)


def prepared_avg_pool_backward(geometry, dtype, count_include_pad, divisor):
    """Return a function of grad_output that is a whole call, as `calls` keeps it, or None."""
    g = geometry
    if _pool_dtype(dtype) != dtype:
        return None
    return _one_to_one(_average_grad(g, g.data_format, dtype, count_include_pad, divisor), g.x_shape, dtype)


def lp_pool(geometry, x, power):
    """Return (mean of |x|**power * prod(kernel)) ** (1/power) of each window."""
    dtype = _pool_dtype(x.dtype)
    magnitudes = np.abs(x, dtype=dtype)
    if np.isinf(power):
        sign = dtype.type(np.sign(power))
        # Padding is zeros: a window without elements has the norm 0, not the maximum of nothing.
        largest = np.maximum(sign * max_pool(geometry, sign * magnitudes, False)[0], 0)
        return largest.astype(x.dtype, copy=False)
    with np.errstate(all="ignore"):
        norms = avg_pool(geometry, magnitudes ** dtype.type(power), True, 0)
        norms = (norms * np.prod(geometry.kernel_size)) ** dtype.type(1 / power)
        return norms.astype(x.dtype, copy=False)


def lp_pool_backward(geometry, grad_output, x, power):
    """Return d(lp_pool)/dx: sign(x) * |x|**(power - 1) * sum over windows of grad * norm**(1 - power)."""
    dtype = _pool_dtype(x.dtype)
    values, grad = x.astype(dtype), grad_output.astype(dtype)
    norms = lp_pool(geometry, values, power)
    with np.errstate(all="ignore"):
        shares = np.where(norms == 0, 0, grad * norms ** dtype.type(1 - power)) * dtype.type(
            np.prod(geometry.kernel_size)
        )
        dx = avg_pool_backward(geometry, shares.astype(dtype, copy=False), True, 0)
        slopes = np.sign(values) * np.abs(values) ** dtype.type(power - 1)
        # Where x is 0 and power below 1 the slope is infinite; the gradient is taken as 0 there, as for norm 0.
        return (dx * np.where(values == 0, 0, slopes)).astype(x.dtype)


# --- patches ---------------------------------------------------------------------------------------------------


def unfold(geometry, x):
    """Return the windows of x as columns: (N, C*prod(kernel), L)."""
    from .im2col import im2col

    inner = geometry.lifted("channels_first", compute_dtype(geometry.dtype))
    x = lift(in_format(x, "channels_first", "channels_first", inner.dtype), "channels_first")
    columns = empty((geometry.batch, 1, inner.reduction_length, int(np.prod(inner.output_size))), inner.dtype)
    im2col(x, columns, 0, inner)
    return _given_back(columns[:, 0], "channels_first", "channels_first", geometry.dtype)


def fold(geometry, columns):
    """Return the image whose pixels are the sums of the columns' elements: (N, C, *output_size)."""
    from .im2col import col2im

    inner = geometry.lifted("channels_first", compute_dtype(geometry.dtype))
    columns = in_format(columns, "channels_first", "channels_first", inner.dtype)
    image = empty((geometry.batch, geometry.in_channels, *geometry.input_size), inner.dtype)
    image[...] = 0
    col2im(columns[:, None], lift(image, "channels_first"), 0, inner)
    return _given_back(image, "channels_first", "channels_first", geometry.dtype)
