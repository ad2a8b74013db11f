"""Convolution, pooling and patches for JAX arrays on the CPU, under jit, grad, vmap and every other transformation.

>>> import fastconv.jax  # doctest: +SKIP
>>> loss = lambda w: fastconv.jax.conv2d(x, w, padding="same").sum()  # doctest: +SKIP
>>> jax.jit(jax.grad(loss))(w)  # doctest: +SKIP

The functions are the twins of those of `fastconv`, with their names, arguments and errors; gradients are left to
`jax.grad`. Arguments that are not arrays are Python's, known when JAX traces the call: shapes and dtypes are checked
then, and the options that hold in ``with`` blocks are those that held then.

A convolution relates three arrays, x, weight and y: any two of them give the third, by the forward pass, the input
gradient or the weight gradient, each linear in both. One primitive stands for the three. Their derivatives are each
other, so that those of every order and in both modes come out of one table. A max pool is linear, too, once it is
known where the maxima are; and so are averages, unpooling and patches. A norm is made of an average.

XLA calls the kernels by its foreign function interface (`fastconv.xla`): they read and write XLA's buffers where they
lie. What a call computes is a text in the compiled program, which therefore means the same in another process; that
another version of fastconv reads it is no promise, so that `jax.export` asks for
``disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(fastconv.jax.TARGET)]``. Shapes are numbers, not symbols.
"""

from __future__ import annotations

import atexit
from ast import literal_eval
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import lru_cache, partial
from math import copysign, isinf, prod
from typing import Any

import numpy as np

from . import arrays, config, registry, selection, xla
from .activations import LEAKY_SLOPE
from .arrays import INTEGER8
from .errors import ArgumentTypeError, MissingDependencyError, ShapeError, UnsupportedError
from .geometry import ConvGeometry, PoolGeometry, flag, sizes, unpool_output_size
from .ops._entries import as_given, batched, entries, runner
from .ops.convolution import check_activation, check_bias, check_floating, conv_geometry
from .ops.patches import fold_geometry, unfold_geometry
from .ops.pooling import AVERAGE_DTYPES, MAX_DTYPES, adaptive_geometry, checked_divisor, checked_norm, raise_index
from .ops.transposed import transposed_geometry

try:
    import jax
    import jax.numpy as jnp
    from jax.extend.core import Primitive
    from jax.interpreters import ad, batching, mlir
except ImportError as error:
    raise MissingDependencyError(f"fastconv.jax needs JAX: pip install 'fastconv[jax]' ({error})") from None

_FAMILIES = (
    "conv", "conv_transpose", "max_pool", "max_unpool", "avg_pool", "lp_pool", "adaptive_max_pool", "adaptive_avg_pool"
)  # fmt: skip
__all__ = [*(f"{name}{dims}d" for name in _FAMILIES for dims in (1, 2, 3)), "fold", "unfold"]

# The target's name in compiled programs.
TARGET = "fastconv"
# Calls that stay prepared; then all are forgotten.
MOST = 1024

Geometry = ConvGeometry | PoolGeometry


# --- operations ------------------------------------------------------------------------------------------------


def convNd(
    dims: int,
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    data_format: str = "channels_first",
    padding_mode: str = "zeros",
    activation: str | None = None,
    algorithm: str = "auto",
    precision: str | None = None,
) -> jax.Array:
    """Convolve `x` with `weight`: :func:`fastconv.convNd` for JAX arrays.

    Parameters
    ----------
    x, weight, bias : JAX or NumPy arrays
    stride, padding, dilation, groups, data_format, padding_mode, activation, algorithm, precision
        As fastconv.convNd takes them.

    Returns
    -------
    jax.Array

    Raises
    ------
    As fastconv.convNd, when JAX traces the call; UnsupportedError also for devices other than the CPU.
    """
    x, weight, bias = _adopt(x=x, weight=weight, bias=bias)
    geometry = conv_geometry(dims, x, weight, stride, padding, dilation, groups, data_format, padding_mode)
    check_bias(bias, geometry.out_channels, x.dtype)
    check_activation(activation, x.dtype)
    operands = (x, weight) if bias is None else (x, weight, bias)
    return _on_images(conv_p, operands, geometry, direction="forward", activation=activation,
                      algorithm=algorithm, precision=precision)[0]  # fmt: skip


def conv_transposeNd(
    dims: int,
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    *,
    output_size: Any = None,
    data_format: str = "channels_first",
    activation: str | None = None,
    algorithm: str = "auto",
    precision: str | None = None,
) -> jax.Array:
    """Apply the transposed convolution: :func:`fastconv.conv_transposeNd` for JAX arrays.

    Parameters
    ----------
    x, weight, bias : JAX or NumPy arrays
    stride, padding, output_padding, groups, dilation, output_size, data_format, activation, algorithm, precision
        As fastconv.conv_transposeNd takes them.

    Returns
    -------
    jax.Array

    Raises
    ------
    As convNd.
    """
    x, weight, bias = _adopt(x=x, weight=weight, bias=bias)
    geometry = transposed_geometry(
        dims, x, weight, stride, padding, output_padding, groups, dilation, output_size, data_format
    )
    check_bias(bias, geometry.in_channels, x.dtype)
    check_activation(activation, x.dtype)
    y = _on_images(conv_p, (x, weight), geometry, direction="input_grad", activation=None,
                   algorithm=algorithm, precision=precision)[0]  # fmt: skip
    y = y if bias is None else y + _spread(bias, y.shape, geometry)
    return y if activation is None else _ACTIVATIONS[activation](y)


def max_poolNd(
    dims: int,
    x: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    data_format: str = "channels_first",
) -> Any:
    """Return the maximum of each window: :func:`fastconv.max_poolNd` for JAX arrays.

    Parameters
    ----------
    x : JAX or NumPy array
    kernel_size, stride, padding, dilation, ceil_mode, return_indices, data_format
        As fastconv.max_poolNd takes them.

    Returns
    -------
    jax.Array, or (maxima, indices)
        Indices are int64 with JAX's option `jax_enable_x64`, and int32 without.
    """
    (x,) = _adopt(x=x)
    arrays.check_dtype("x", x, MAX_DTYPES)
    geometry = PoolGeometry.create(
        x.shape, kernel_size, stride, padding, dilation, ceil_mode, spatial_dims=dims, data_format=data_format
    )
    return _max_pooled(x, geometry, return_indices)


def adaptive_max_poolNd(
    dims: int, x: Any, output_size: Any, return_indices: bool = False, *, data_format: str = "channels_first"
) -> Any:
    """Return the maximum of each of `output_size` windows: :func:`fastconv.adaptive_max_poolNd` for JAX arrays.

    Parameters
    ----------
    x : JAX or NumPy array
    output_size, return_indices, data_format
        As fastconv.adaptive_max_poolNd takes them.

    Returns
    -------
    jax.Array, or (maxima, indices) as max_poolNd
    """
    (x,) = _adopt(x=x)
    geometry = adaptive_geometry(dims, x, output_size, data_format, average=False)
    return _max_pooled(x, geometry, return_indices)


def max_unpoolNd(
    dims: int,
    x: Any,
    indices: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    output_size: Any = None,
    *,
    data_format: str = "channels_first",
) -> jax.Array:
    """Put each value where its index says, and zeros elsewhere: :func:`fastconv.max_unpoolNd` for JAX arrays.

    Parameters
    ----------
    x : JAX or NumPy array
    indices : int32 or int64 array of x's shape
    kernel_size, stride, padding, output_size, data_format
        As fastconv.max_unpoolNd takes them.

    Returns
    -------
    jax.Array

    Raises
    ------
    As fastconv.max_unpoolNd; but an index outside the output is an error of the program that runs (JaxRuntimeError).
    """
    x, indices = _adopt(x=x, indices=indices)
    check_floating("x", x)
    arrays.check_dtype("indices", indices, ("int32", "int64"))
    if indices.shape != x.shape:
        raise ShapeError(f"indices must have the shape of x, {x.shape}, not {indices.shape}")
    is_batched, batch, channels, pooled, size = unpool_output_size(
        x.shape, kernel_size, stride, padding, output_size, spatial_dims=dims, data_format=data_format
    )
    ones, none = (1,) * dims, ((0, 0),) * dims
    # Of the pooling, sizes alone matter.
    geometry = PoolGeometry(batch, channels, size, pooled, ones, ones, none, ones, data_format, is_batched)
    return _on_images(unpool_p, (x, batched(_words(indices), is_batched)), geometry)[0]


def avg_poolNd(
    dims: int,
    x: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    dilation: Any = 1,
    data_format: str = "channels_first",
) -> jax.Array:
    """Return the average of each window: :func:`fastconv.avg_poolNd` for JAX arrays.

    Parameters
    ----------
    x : JAX or NumPy array
    kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, dilation, data_format
        As fastconv.avg_poolNd takes them.

    Returns
    -------
    jax.Array
    """
    (x,) = _adopt(x=x)
    arrays.check_dtype("x", x, AVERAGE_DTYPES)
    geometry = PoolGeometry.create(
        x.shape, kernel_size, stride, padding, dilation, ceil_mode,
        spatial_dims=dims, data_format=data_format, average=True,
    )  # fmt: skip
    counted, divisor = flag("count_include_pad", count_include_pad), checked_divisor(divisor_override)
    return _on_images(avg_pool_p, (x,), geometry, direction="forward", counted=counted, divisor=divisor)[0]


def lp_poolNd(
    dims: int,
    x: Any,
    norm_type: float,
    kernel_size: Any,
    stride: Any = None,
    ceil_mode: bool = False,
    *,
    padding: Any = 0,
    dilation: Any = 1,
    data_format: str = "channels_first",
) -> jax.Array:
    """Return the p-norm of each window: :func:`fastconv.lp_poolNd` for JAX arrays.

    Parameters
    ----------
    x : JAX or NumPy array
    norm_type, kernel_size, stride, ceil_mode, padding, dilation, data_format
        As fastconv.lp_poolNd takes them.

    Returns
    -------
    jax.Array
        Its derivatives are 0 where a norm is 0.
    """
    (x,) = _adopt(x=x)
    check_floating("x", x)
    p = checked_norm(norm_type)
    kernel = sizes("kernel_size", kernel_size, dims, 1, one_for_all=False)
    geometry = PoolGeometry.create(
        x.shape, kernel, stride, padding, dilation, ceil_mode,
        spatial_dims=dims, data_format=data_format, average=True,
    )  # fmt: skip
    wide = x.astype(arrays.compute_dtype(x.dtype))
    if isinf(p):
        sign = copysign(1, p)
        # A window without elements has the norm 0.
        return jnp.maximum(sign * _max_pooled(sign * jnp.abs(wide), geometry, False), 0).astype(x.dtype)
    means = _on_images(avg_pool_p, (_power(wide, p),), geometry, direction="forward", counted=True, divisor=0)[0]
    return _power(means * prod(kernel), 1 / p).astype(x.dtype)


def _power(x: Any, p: float) -> jax.Array:
    """Return |x|**p, whose derivatives are 0 where x is 0 (save those of x**2) and finite elsewhere."""
    if p == 2:
        return x * x
    # The power of 1 is there because what is not chosen has a derivative too.
    powers = jnp.where(x == 0, 1, jnp.abs(x)) ** (int(p) if p.is_integer() else p)
    return jnp.where(x == 0, np.inf if p < 0 else 0, powers)


def adaptive_avg_poolNd(dims: int, x: Any, output_size: Any, *, data_format: str = "channels_first") -> jax.Array:
    """Return the average of each of `output_size` windows: :func:`fastconv.adaptive_avg_poolNd` for JAX arrays.

    Parameters
    ----------
    x : JAX or NumPy array
    output_size, data_format
        As fastconv.adaptive_avg_poolNd takes them.

    Returns
    -------
    jax.Array
    """
    (x,) = _adopt(x=x)
    geometry = adaptive_geometry(dims, x, output_size, data_format, average=True)
    return _on_images(avg_pool_p, (x,), geometry, direction="forward", counted=False, divisor=0)[0]


def unfold(x: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1) -> jax.Array:
    """Lay out every window of x as a column: :func:`fastconv.unfold` for JAX arrays.

    Parameters
    ----------
    x : JAX or NumPy array
    kernel_size, dilation, padding, stride
        As fastconv.unfold takes them.

    Returns
    -------
    jax.Array
    """
    (x,) = _adopt(x=x)
    geometry = unfold_geometry(x, kernel_size, dilation, padding, stride)
    return _on_images(patches_p, (x,), geometry, direction="forward")[0]


def fold(
    cols: Any, output_size: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
) -> jax.Array:
    """Add every column back to the window it came from: :func:`fastconv.fold` for JAX arrays.

    Parameters
    ----------
    cols : JAX or NumPy array
    output_size, kernel_size, dilation, padding, stride
        As fastconv.fold takes them.

    Returns
    -------
    jax.Array
    """
    (cols,) = _adopt(cols=cols)
    geometry = fold_geometry(cols, output_size, kernel_size, dilation, padding, stride)
    return _on_images(patches_p, (cols,), geometry, direction="input_grad")[0]


conv1d, conv2d, conv3d = entries(convNd, __name__)
conv_transpose1d, conv_transpose2d, conv_transpose3d = entries(conv_transposeNd, __name__)
max_pool1d, max_pool2d, max_pool3d = entries(max_poolNd, __name__)
max_unpool1d, max_unpool2d, max_unpool3d = entries(max_unpoolNd, __name__)
avg_pool1d, avg_pool2d, avg_pool3d = entries(avg_poolNd, __name__)
lp_pool1d, lp_pool2d, lp_pool3d = entries(lp_poolNd, __name__)
adaptive_max_pool1d, adaptive_max_pool2d, adaptive_max_pool3d = entries(adaptive_max_poolNd, __name__)
adaptive_avg_pool1d, adaptive_avg_pool2d, adaptive_avg_pool3d = entries(adaptive_avg_poolNd, __name__)


def _adopt(**named: Any) -> list[Any]:
    """Return JAX arrays or tracers; None stays None where it may."""
    for name, value in named.items():
        if not isinstance(value, (jax.Array, np.ndarray)) and not (value is None and name == "bias"):
            raise ArgumentTypeError(f"{name} must be a JAX or NumPy array, not {type(value).__name__}")
    return [jnp.asarray(a) if isinstance(a, np.ndarray) else a for a in named.values()]


def _on_images(p: Primitive, operands: Sequence[Any], geometry: Any, **how: Any) -> list[Any]:
    """Bind a primitive; the first operand may lack the batch dimension, which primitives always have."""
    if "algorithm" in how:
        registry.named(how["algorithm"], "cpu")
        selection.checked_precision(how["precision"])
    image, *others = operands
    options = tuple(sorted(config.scoped().items()))
    found = p.bind(
        batched(image, geometry.batched), *others, geometry=replace(geometry, batched=True), options=options, **how
    )
    return [as_given(a, geometry.batched) for a in found]


def _max_pooled(x: Any, geometry: PoolGeometry, return_indices: bool) -> Any:
    y, *words = _on_images(max_pool_p, (x,), geometry, return_indices=bool(return_indices))
    return (y, _indices(words[0])) if return_indices else y


# --- primitives ------------------------------------------------------------------------------------------------
#
# Each has a parameter `geometry`, of batched arrays, and `options`, those of `with` blocks around the call.


def _primitive(name: str, results: Callable[..., Any]) -> Primitive:
    """Return a primitive; `results` takes the operands' descriptions and the parameters, and describes the results."""
    p = Primitive(f"fastconv_{name}")
    p.multiple_results = True
    p.def_impl(partial(_run, p))
    p.def_abstract_eval(lambda *avals, **params: [jax.core.ShapedArray(*r) for r in results(*avals, **params)])
    mlir.register_lowering(p, _refuse_device)
    mlir.register_lowering(p, partial(_lower, p), platform="cpu")
    return p


def _run(p: Primitive, *operands: Any, **params: Any) -> Any:
    # Under jax.disable_jit() too, which would come here again.
    with jax.disable_jit(False):
        return _jitted(p, **params)(*operands)


@lru_cache(maxsize=MOST)
def _jitted(p: Primitive, **params: Any) -> Any:
    return jax.jit(partial(p.bind, **params))


def _lower(p: Primitive, context: Any, *operands: Any, **params: Any) -> Any:
    g = params["geometry"]
    if p is pick_p and params["direction"] == "forward":
        return mlir.lower_fun(_picked, multiple_results=True)(context, *operands, **params)
    if "algorithm" in params:
        # Here for its errors: what is asked for by name may be refused.
        with config.options(**dict(params["options"])):
            how = params["direction"], g.data_format, "cpu", params["algorithm"], params["precision"]
            selection.choose(g, *how)
    _end_in_order()
    return jax.ffi.ffi_lowering(TARGET)(context, *operands, call=_text(p.name, params))


def _refuse_device(context: Any, *operands: Any, **params: Any) -> Any:
    platforms = ", ".join(context.module_context.platforms)
    raise UnsupportedError(
        f"fastconv.jax computes on the CPU, not on {platforms}: use jax.device_put or jit(device=...)"
    )


def _conv_results(*avals: Any, geometry: ConvGeometry, direction: str, **how: Any) -> Any:
    g = geometry
    dtype = arrays.compute_dtype(g.dtype) if g.dtype.name in INTEGER8 else g.dtype
    return [({"forward": g.output_shape, "input_grad": g.x_shape, "weight_grad": g.weight_shape}[direction], dtype)]


def _max_pool_results(x: Any, *, geometry: PoolGeometry, return_indices: bool, options: Any) -> Any:
    y = (geometry.output_shape, x.dtype)
    # Indices are 64 bits wide, which JAX has no type for unless it is told to: two words each.
    return [y, ((*geometry.output_shape, 2), np.dtype(np.uint32))] if return_indices else [y]


def _image_results(a: Any, *others: Any, geometry: PoolGeometry, direction: str, **how: Any) -> Any:
    return [(geometry.output_shape if direction == "forward" else geometry.x_shape, a.dtype)]


def _unpool_results(x: Any, words: Any, *, geometry: PoolGeometry, options: Any) -> Any:
    return [(geometry.x_shape, x.dtype)]


def _patches_results(a: Any, *, geometry: ConvGeometry, direction: str, options: Any) -> Any:
    g = geometry
    columns = (g.batch, g.reduction_length, prod(g.output_size))
    return [(columns if direction == "forward" else g.x_shape, a.dtype)]


# (x, weight[, bias]) -> y, (y, weight) -> x or (y, x) -> weight
conv_p = _primitive("conv", _conv_results)
# x -> y[, where]
max_pool_p = _primitive("max_pool", _max_pool_results)
# (x, where) -> y: the elements of x that the indices name; or back, (y, where) -> x
pick_p = _primitive("pick", _image_results)
# x -> y or back
avg_pool_p = _primitive("avg_pool", _image_results)
# (y, where) -> x: each element alone, where `pick` back adds those that share an index
unpool_p = _primitive("unpool", _unpool_results)
# x -> columns or back
patches_p = _primitive("patches", _patches_results)


# --- derivatives -----------------------------------------------------------------------------------------------

OPERANDS = {"forward": ("x", "weight"), "input_grad": ("y", "weight"), "weight_grad": ("y", "x")}
PRODUCING = {"y": "forward", "x": "input_grad", "weight": "weight_grad"}
RESULT = {direction: result for result, direction in PRODUCING.items()}
OPPOSITE = {"forward": "input_grad", "input_grad": "forward"}

_ACTIVATIONS = {
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}
# Functions of (y, tangent) with y = activation(z): the derivatives at z, from y.
_SLOPES: dict[str, Callable[[Any, Any], Any]] = {
    "relu": lambda y, t: jnp.where(y > 0, t, 0),
    "leaky_relu": lambda y, t: jnp.where(y > 0, t, LEAKY_SLOPE * t),
    "sigmoid": lambda y, t: y * (1 - y) * t,
    "tanh": lambda y, t: (1 - y * y) * t,
}


def _conv_jvp(primals: Any, tangents: Any, *, activation: str | None, **params: Any) -> Any:
    found = conv_p.bind(*primals, activation=activation, **params)
    linear = partial(conv_p.bind, activation=None, **params)
    (y,), (a, b), (da, db, *dbias) = found, primals[:2], tangents
    terms = [] if type(da) is ad.Zero else linear(da, b)
    terms += [] if type(db) is ad.Zero else linear(a, db)
    if dbias and type(dbias[0]) is not ad.Zero:
        terms.append(_spread(dbias[0], y.shape, params["geometry"]))
    tangent = sum(terms[1:], terms[0])
    return found, [tangent if activation is None else _SLOPES[activation](y, tangent)]


def _conv_transpose(cotangents: Any, *operands: Any, direction: str, **params: Any) -> Any:
    held = dict(zip(OPERANDS[direction], operands))
    (wanted,) = (name for name, a in held.items() if ad.is_undefined_primal(a))
    if type(cotangents[0]) is ad.Zero:
        return [None, None]
    held[RESULT[direction]] = cotangents[0]
    other = PRODUCING[wanted]
    (found,) = conv_p.bind(*(held[name] for name in OPERANDS[other]), direction=other, **params)
    return [found if name == wanted else None for name in OPERANDS[direction]]


def _spread(bias: Any, shape: tuple[int, ...], geometry: ConvGeometry) -> Any:
    """Return a number per channel as an image of such channels; sums back are in float32 or better."""
    axis = len(shape) - 1 - (geometry.spatial_dims if geometry.data_format == "channels_first" else 0)
    wide = bias.astype(arrays.compute_dtype(bias.dtype))
    return jax.lax.broadcast_in_dim(wide, shape, (axis,)).astype(bias.dtype)


def _max_pool_jvp(primals: Any, tangents: Any, *, geometry: PoolGeometry, return_indices: bool, options: Any) -> Any:
    y, where = max_pool_p.bind(*primals, geometry=geometry, return_indices=True, options=options)
    tangent = pick_p.bind(tangents[0], where, geometry=geometry, direction="forward", options=options)
    if return_indices:
        return [y, where], [*tangent, ad.Zero(jax.core.ShapedArray(where.shape, jax.dtypes.float0))]
    return [y], tangent


def _linear_jvp(p: Primitive, primals: Any, tangents: Any, **params: Any) -> Any:
    """Of what is linear in the first operand; others are indices, which have no tangents."""
    return p.bind(*primals, **params), p.bind(tangents[0], *primals[1:], **params)


def _linear_transpose(p: Primitive, cotangents: Any, image: Any, *others: Any, direction: str, **params: Any) -> Any:
    nothing = [None] * len(others)
    if type(cotangents[0]) is ad.Zero:
        return [None, *nothing]
    return [*p.bind(cotangents[0], *others, direction=OPPOSITE[direction], **params), *nothing]


def _unpool_transpose(cotangents: Any, image: Any, words: Any, **params: Any) -> Any:
    if type(cotangents[0]) is ad.Zero:
        return [None, None]
    return [*pick_p.bind(cotangents[0], words, direction="forward", **params), None]


ad.primitive_jvps[conv_p] = _conv_jvp
ad.primitive_transposes[conv_p] = _conv_transpose
ad.primitive_jvps[max_pool_p] = _max_pool_jvp
for _p in (pick_p, avg_pool_p, unpool_p, patches_p):
    ad.primitive_jvps[_p] = partial(_linear_jvp, _p)
    ad.primitive_transposes[_p] = partial(_linear_transpose, _p)
ad.primitive_transposes[unpool_p] = _unpool_transpose


# --- batching --------------------------------------------------------------------------------------------------


def _batch(p: Primitive, operands: Any, axes: Any, **params: Any) -> Any:
    """Fold the new dimension into N where all that has it are images; else compute one after the other."""
    weights = axes[1:] if p is conv_p else ()
    if params.get("direction") == "weight_grad" or any(axis is not None for axis in weights):
        found = _one_by_one(p, operands, axes, params)
    else:
        found = _folded(p, operands, axes, len(operands) - len(weights), params)
    return found, [0] * len(found)


def _folded(p: Primitive, operands: Any, axes: Any, images: int, params: Any) -> list[Any]:
    g = params["geometry"]
    (size,) = {a.shape[axis] for a, axis in zip(operands, axes) if axis is not None}

    def fold(image: Any, axis: int | None) -> Any:
        # (B, N, ...) -> (B*N, ...)
        stack = jnp.broadcast_to(image, (size, *image.shape)) if axis is None else jnp.moveaxis(image, axis, 0)
        return stack.reshape(size * g.batch, *stack.shape[2:])

    folded = [fold(image, axis) for image, axis in zip(operands[:images], axes)]
    found = p.bind(*folded, *operands[images:], **{**params, "geometry": replace(g, batch=size * g.batch)})
    return [a.reshape(size, g.batch, *a.shape[1:]) for a in found]


def _one_by_one(p: Primitive, operands: Any, axes: Any, params: Any) -> list[Any]:
    mapped = tuple(axis is not None for axis in axes)
    stacks = [a if axis is None else jnp.moveaxis(a, axis, 0) for a, axis in zip(operands, axes)]
    return list(_loop(p, mapped, **params)(*stacks))


@lru_cache(maxsize=MOST)
def _loop(p: Primitive, mapped: tuple[bool, ...], **params: Any) -> Any:
    """Return a function that binds a primitive to each slice of the mapped operands; kept, to compile it once."""

    def loop(*stacks: Any) -> Any:
        def one(slices: Any) -> Any:
            rest = iter(slices)
            return p.bind(*(next(rest) if moves else a for a, moves in zip(stacks, mapped)), **params)

        return jax.lax.map(one, [a for a, moves in zip(stacks, mapped) if moves])

    return jax.jit(loop)


for _p in (conv_p, max_pool_p, pick_p, avg_pool_p, unpool_p, patches_p):
    batching.primitive_batchers[_p] = partial(_batch, _p)


@lru_cache(maxsize=1)
def _end_in_order() -> None:
    """Have the process wait, at its end, for programs that still run."""
    atexit.register(_finish)


def _finish() -> None:
    """Wait for the programs that this thread has started: while it ends, Python takes no calls, and JAX waits for ever.

    A thread's programs run one after the other, save for those so short that they run at once: hence some work.
    """
    for device in jax.local_devices(backend="cpu"):
        work = jax.device_put(np.ones((256, 256), np.float32), device)
        jax.jit(jnp.dot)(work, work).block_until_ready()


# --- calls from compiled programs ------------------------------------------------------------------------------


def _text(name: str, params: dict[str, Any]) -> str:
    """Return a primitive and its parameters as what `literal_eval` reads."""
    geometry = params["geometry"]
    plain = {field.name: getattr(geometry, field.name) for field in fields(geometry)}
    if "dtype" in plain:
        plain["dtype"] = plain["dtype"].name
    return repr((name, {**params, "geometry": plain}))


@lru_cache(maxsize=MOST)
def _computing(text: bytes) -> Callable[..., None]:
    """Return the function of (*operands, *results) that a text stands for."""
    name, params = literal_eval(text.decode())
    plain, options = params.pop("geometry"), dict(params.pop("options"))
    if "dtype" in plain:
        plain["dtype"] = np.dtype(plain["dtype"])
    geometry: Any = (ConvGeometry if "dtype" in plain else PoolGeometry)(**plain)
    compute = _COMPUTING[name](geometry, **params)
    if not options:
        return compute

    def under_options(*found: np.ndarray) -> None:
        with config.options(**options):
            compute(*found)

    return under_options


def _call(text: bytes, operands: list[np.ndarray], results: list[np.ndarray]) -> None:
    _computing(text)(*operands, *results)


def _reusing(prepare: Callable[..., Any]) -> Callable[..., None]:
    """Return a function of arrays that calls what `prepare` makes of the first ones.

    What was prepared serves for as many arrays, one dtype and one state of the options, and until it returns None.
    """
    known: dict[Any, Callable[..., Any]] = {}

    def compute(*found: np.ndarray) -> None:
        key = config.state(), len(found), found[0].dtype
        call = known.get(key)
        if call is not None and call(*found) is not None:
            return
        if len(known) >= MOST:
            known.clear()
        known[key] = call = prepare(*found)
        call(*found)

    return compute


def _computing_conv(
    geometry: ConvGeometry, direction: str, activation: str | None, algorithm: str, precision: str | None
) -> Callable[..., None]:
    g, run = geometry, runner("cpu")

    def prepare(*found: np.ndarray) -> Callable[..., Any]:
        if g.is_empty:
            # A sum of nothing.
            return lambda *found: found[-1].fill(0)
        choice = selection.choose(g, direction, g.data_format, "cpu", algorithm, precision)
        quick = {
            "forward": lambda: run.prepared_forward(choice, g, activation),
            "input_grad": lambda: run.prepared_input_grad(choice, g),
            "weight_grad": lambda: run.prepared_weight_grad(choice, g),
        }[direction]()
        if quick is not None:
            # (a, b, bias, result), of which the bias may be missing.
            return quick if len(found) == 4 else lambda a, b, result: quick(a, b, None, result)
        if direction == "forward":
            return lambda x, w, *rest: run.conv_forward(
                choice, g, g.data_format, x, w, rest[0] if rest[1:] else None, activation, rest[-1]
            )
        if direction == "input_grad":
            return lambda y, w, x: run.conv_input_grad(choice, g, g.data_format, y, w, x)
        return _copying(lambda y, x: [run.conv_weight_grad(choice, g, g.data_format, y, x)], 2)

    return _reusing(prepare)


def _computing_max_pool(geometry: PoolGeometry, return_indices: bool) -> Callable[..., None]:
    run = runner("cpu")

    def prepare(x: np.ndarray, *results: np.ndarray) -> Callable[..., Any]:
        return run.prepared_max_pool(geometry, x.dtype, return_indices) or _copying(
            lambda x: run.max_pool(geometry, x, return_indices), 1
        )

    compute = _reusing(prepare)
    return compute if not return_indices else lambda x, y, words: compute(x, y, _where(words))


def _computing_pick(geometry: PoolGeometry, direction: str) -> Callable[..., None]:
    g, run = geometry, runner("cpu")

    def prepare(y: np.ndarray, where: np.ndarray, x: np.ndarray) -> Callable[..., Any]:
        return run.prepared_max_pool_backward(y, where, g.x_shape, g.data_format) or _copying(
            lambda y, where: run.max_pool_backward(y, where, g.batch, g.channels, g.input_size, g.data_format)[:1], 2
        )

    compute = _reusing(prepare)
    return lambda y, words, x: compute(y, _where(words), x)


def _computing_avg_pool(geometry: PoolGeometry, direction: str, counted: bool, divisor: int) -> Callable[..., None]:
    run = runner("cpu")
    names = {"forward": "avg_pool", "input_grad": "avg_pool_backward"}
    quick, whole = (getattr(run, kind + names[direction]) for kind in ("prepared_", ""))

    def prepare(a: np.ndarray, result: np.ndarray) -> Callable[..., Any]:
        return quick(geometry, a.dtype, counted, divisor) or _copying(
            lambda a: [whole(geometry, a, counted, divisor)], 1
        )

    return _reusing(prepare)


def _computing_unpool(geometry: PoolGeometry) -> Callable[..., None]:
    g, run = geometry, runner("cpu")

    def compute(x: np.ndarray, words: np.ndarray, y: np.ndarray) -> None:
        where = _where(words)
        found, valid = run.max_unpool(x, where, g.batch, g.channels, g.input_size, g.data_format)
        if not valid:
            raise_index(where, g.input_size, lowest=0)
        np.copyto(y, found)

    return compute


def _computing_patches(geometry: ConvGeometry, direction: str) -> Callable[..., None]:
    whole = getattr(runner("cpu"), {"forward": "unfold", "input_grad": "fold"}[direction])
    return _copying(lambda a: [whole(geometry, a)], 1)


def _copying(function: Callable[..., Any], operands: int) -> Callable[..., Any]:
    """Return a function of (*operands, *results) that copies what `function` returns."""

    def call(*found: np.ndarray) -> bool:
        for result, made in zip(found[operands:], function(*found[:operands])):
            np.copyto(result, made)
        return True

    return call


def _where(words: np.ndarray) -> np.ndarray:
    """Return pairs of words as 64-bit indices, in place."""
    return words.view(np.int64)[..., 0]


def _indices(words: Any) -> Any:
    """Return pairs of words as indices of the widest integers that JAX has at present."""
    dtype = jax.dtypes.canonicalize_dtype(np.int64)
    return jax.lax.bitcast_convert_type(words if dtype.itemsize == 8 else words[..., 0], dtype)


def _words(indices: Any) -> Any:
    """Return indices as pairs of words, the lower first."""
    if indices.dtype.itemsize == 8:
        return jax.lax.bitcast_convert_type(indices, np.uint32)
    return jax.lax.bitcast_convert_type(jnp.stack([indices, indices >> 31], -1), np.uint32)


def _picked(x: Any, words: Any, *, geometry: PoolGeometry, **how: Any) -> list[Any]:
    """Compute the elements of x that indices name, by XLA: no way to a first derivative in reverse leads here."""
    shape, last, channels = geometry.output_shape, geometry.data_format == "channels_last", geometry.channels
    where = jax.lax.bitcast_convert_type(words[..., 0], np.int32)
    # (N, C, L) or (N, L, C)
    sizes = (prod(geometry.input_size), prod(geometry.output_size))
    flat, index = (
        a.reshape(len(a), *((size, channels) if last else (channels, size))) for a, size in zip((x, where), sizes)
    )
    found = jnp.take_along_axis(flat, jnp.maximum(index, 0), axis=1 if last else 2)
    return [jnp.where(index < 0, 0, found).reshape(shape)]


_COMPUTING: dict[str, Callable[..., Callable[..., None]]] = {
    conv_p.name: _computing_conv,
    max_pool_p.name: _computing_max_pool,
    pick_p.name: _computing_pick,
    avg_pool_p.name: _computing_avg_pool,
    unpool_p.name: _computing_unpool,
    patches_p.name: _computing_patches,
}
_handler = xla.handler(_call)
jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(xla.address(_handler)), platform="cpu")
