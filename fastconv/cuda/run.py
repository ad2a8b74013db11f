"""Running on a GPU: from the caller's arrays to lists of steps, and those to the driver or to the emulator.

Kernels take C-contiguous arrays of three spatial dimensions, in float32, float64, float16 or bfloat16 as they are. Here
memory is laid out so (copied only if it is not so already), results and workspace are allocated by the caller's
library, on its device and stream, and steps are compiled once and launched with addresses. It has run against a driver
that emulates, on no GPU.

All arrays are `device_arrays.DeviceArray`s with a batch, in the format of the geometry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from .. import config
from ..arrays import NumpyArrays, library_of
from ..device_arrays import ALIGNMENT, DeviceArray, DeviceLibrary
from ..errors import ArgumentError, UnsupportedError
from ..geometry import ConvGeometry, PoolGeometry, first_spatial_axis, join_shape, planes_shape
from ..registry import Buffer, workspace_bytes
from . import bias, im2col, launch, padding, pool
from .compile import compile_kernel
from .elements import INTEGERS, SUPPORTED, Element
from .steps import Call, Step

# --- steps -----------------------------------------------------------------------------------------------------


def split_arguments(step: Step) -> tuple[tuple[str, ...], tuple[np.generic, ...]]:
    """Return the names of a step's arrays and the numbers that follow them."""
    first = next((i for i, a in enumerate(step.arguments) if not isinstance(a, str)), len(step.arguments))
    names, numbers = step.arguments[:first], step.arguments[first:]
    if not all(isinstance(a, np.generic) for a in numbers) or len(step.arguments) != len(step.signature):
        raise ArgumentError(f"{step.kernel.__name__} must take names of arrays and then NumPy scalars, as it declares")
    return names, numbers  # type: ignore[return-value]


def emulated(
    steps: Iterable[Step | Call],
    arrays: Mapping[str, np.ndarray | None],
    seed: int | None = None,
    architecture: str = "sm_90a",
) -> list[Any]:
    """Run steps in the emulator, on NumPy arrays that are written in place; return what each launch did to memory.

    An array that is absent or None is empty: a kernel that touches it is refused.
    """
    from .emulator import emulate

    reports = []
    for step in steps:
        if isinstance(step, Call):
            step.perform(NumpyArrays, *[arrays[name] for name in step.arguments])
            continue
        names, numbers = split_arguments(step)
        given = [_stored(arrays.get(name)) for name in names]
        reports.append(
            emulate(
                step.kernel, step.grid, step.block, *given, *numbers,
                shared_bytes=step.shared_bytes, architecture=architecture, seed=seed,
                signature=step.signature, launch_bounds=step.launch_bounds,
            )
        )  # fmt: skip
    return reports


def _stored(array: np.ndarray | None) -> np.ndarray:
    """Return an array as kernels have it: bfloat16 as the bits it is, a complex number as two real ones."""
    if array is None:
        return np.empty(0, np.float32)
    if array.dtype.kind == "c":
        return array.view(array.real.dtype)
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


class Launch(NamedTuple):
    """A step that is ready on one device, and the names of the arrays that it takes.

    `launcher` is called with the stream and their addresses, or if `is_call` with the library and what it holds.
    """

    launcher: Callable[..., None]
    names: tuple[str, ...]
    is_call: bool = False


def ready(steps: Iterable[Step | Call], architecture: str) -> list[Launch]:
    """Compile steps, or take them from the disk, and load them on the current device."""
    made, known = [], dict[Any, Any]()
    for step in steps:
        if isinstance(step, Call):
            made.append(Launch(step.perform, step.arguments, is_call=True))
            continue
        names, numbers = split_arguments(step)
        # Some algorithms launch the same kernel a thousand times.
        what = (step.kernel, step.signature, step.launch_bounds)
        code = known[what] = known.get(what) or compile_kernel(*what[:2], architecture, what[2])
        made.append(Launch(launch.Launcher(code, step.grid, step.block, numbers, step.shared_bytes), names))
    return made


def launched(
    launches: Iterable[Launch],
    addresses: Mapping[str, int],
    stream: int = 0,
    library: DeviceLibrary | None = None,
    held: Mapping[str, Any] | None = None,
) -> None:
    """Launch what is ready, on a stream of this handle; an array that is absent is a null pointer.

    Calls need the library too, and what it holds by name.
    """
    on = launch.stream(stream)
    for launcher, names, is_call in launches:
        if is_call:
            launcher(library, *[held[name] for name in names])  # type: ignore[index]
        else:
            launcher(on, *[addresses.get(name, 0) for name in names])


@lru_cache(maxsize=1024)
def _conv_launches(
    algorithm: Any, g: ConvGeometry, direction: str, activation: str | None, has_bias: bool, library: DeviceLibrary,
    limit: int,
) -> list[Launch]:  # fmt: skip
    module = algorithm.implementation
    if direction in getattr(module, "FUSED", ("forward",)) or not (has_bias or activation):
        return ready(module.steps(g, direction, activation, has_bias, library.device, limit), library.device)
    channels, shape = (g.out_channels, g.output_shape) if direction == "forward" else (g.in_channels, g.x_shape)
    pixels = math.prod(shape) // (g.batch * channels) if g.data_format == "channels_first" else 1
    ending = bias.apply_steps(math.prod(shape), channels, pixels, g.dtype, activation, has_bias)
    return ready([*module.steps(g, direction, None, False, library.device, limit), *ending], library.device)


def _run(
    launches: list[Launch],
    library: DeviceLibrary,
    arrays: Mapping[str, DeviceArray | None],
    buffers: Mapping[str, Buffer] | None = None,
) -> None:
    """Launch on the current stream, with workspace of the library.

    The memory of what is freed then is given to later work of the same stream, so nothing waits.
    """
    lent = {name: library.empty(b.shape, np.dtype(b.dtype)) for name, b in (buffers or {}).items() if b.owned}
    there = {name: array for name, array in {**arrays, **lent}.items() if array is not None}
    addresses = {name: array.address for name, array in there.items()}
    launched(launches, addresses, library.stream(), library, {name: array.held for name, array in there.items()})


# --- convolution -----------------------------------------------------------------------------------------------


def stored_format(array: DeviceArray, data_format: str) -> str:
    """Return the memory format to compute in: the one the array has, or else its own data format."""
    other = {"channels_first": "channels_last", "channels_last": "channels_first"}[data_format]
    return other if not array.is_contiguous and _moved(array, data_format, other).is_contiguous else data_format


def conv_forward(
    choice: Any,
    geometry: ConvGeometry,
    stored: str,
    x: DeviceArray,
    weight: DeviceArray,
    bias: DeviceArray | None,
    activation: str | None,
    out: DeviceArray | None,
) -> DeviceArray:
    """Return activation(conv(x, weight) + bias), in `out` if that is given."""
    g, library = geometry, x.library
    with library.current():
        operands = {"x": _padded(x, g, stored), "weight": _contiguous(weight), "bias": _contiguous(bias)}
        shape = join_shape(g.batch, g.out_channels, g.output_size, stored)
        return _computed(choice, "forward", g, stored, shape, operands, activation, out)


def conv_input_grad(
    choice: Any,
    geometry: ConvGeometry,
    stored: str,
    grad_output: DeviceArray,
    weight: DeviceArray,
    out: DeviceArray | None = None,
    bias: DeviceArray | None = None,
    activation: str | None = None,
) -> DeviceArray:
    """Return the gradient with respect to the input; as a transposed convolution, through bias and activation."""
    g, library = geometry, grad_output.library
    with library.current():
        operands = {
            "grad_output": _laid_out(grad_output, g.data_format, stored),
            "weight": _contiguous(weight),
            "bias": _contiguous(bias),
        }
        size = g.padded_size if g.padding_mode != "zeros" else g.input_size
        shape = join_shape(g.batch, g.in_channels, size, stored)
        if g.padding_mode == "zeros":
            return _computed(choice, "input_grad", g, stored, shape, operands, activation, out)
        padded = library.empty(shape, g.dtype)
        compute(choice, "input_grad", library, {**operands, "out": padded}, None)
        folded = padding.fold_back(padded, g.padding, g.padding_mode, first_spatial_axis(stored))
        return _given_back(folded, stored, g.data_format, out)


def conv_weight_grad(
    choice: Any, geometry: ConvGeometry, stored: str, grad_output: DeviceArray, x: DeviceArray
) -> DeviceArray:
    """Return the gradient with respect to the weight."""
    g, library = geometry, x.library
    with library.current():
        result = library.empty(g.weight_shape, g.dtype)
        operands = {
            "grad_output": _laid_out(grad_output, g.data_format, stored),
            "x": _padded(x, g, stored),
            "out": result,
        }
        compute(choice, "weight_grad", library, operands, None)
        return result


def _padded(x: DeviceArray, g: ConvGeometry, stored: str) -> DeviceArray:
    """Return the input as kernels take it: in the format to compute in, its padding mode carried out."""
    x = _laid_out(x, g.data_format, stored)
    return x if g.padding_mode == "zeros" else padding.pad(x, g.padding, g.padding_mode, first_spatial_axis(stored))


def bias_grad(grad_output: DeviceArray, data_format: str) -> DeviceArray:
    """Return the sum of the gradient over batch and space."""
    library, stored = grad_output.library, stored_format(grad_output, data_format)
    with library.current():
        grad = _laid_out(grad_output, data_format, stored)
        N, K = grad.shape[0], grad.shape[1 if stored == "channels_first" else -1]
        result = library.empty((K,), grad.dtype)
        L = grad.size // max(N * K, 1)
        launches, buffers = _bias_grad_launches(N, K, L, stored, grad.dtype, library)
        _run(launches, library, {"grad_output": grad, "out": result}, buffers)
        return result


@lru_cache(maxsize=256)
def _bias_grad_launches(
    N: int, K: int, L: int, stored: str, dtype: np.dtype, library: DeviceLibrary
) -> tuple[list[Launch], dict[str, Buffer]]:
    return ready(bias.steps(N, K, L, stored, dtype), library.device), bias.workspace(N, K, L, stored, dtype)


def _computed(
    choice: Any,
    direction: str,
    geometry: ConvGeometry,
    stored: str,
    shape: tuple[int, ...],
    operands: dict[str, DeviceArray | None],
    activation: str | None,
    out: DeviceArray | None,
) -> DeviceArray:
    """Return what an algorithm makes of operands, in the format of the geometry, in `out` if that is given."""
    library = next(a.library for a in operands.values() if a is not None)
    inside = None if out is None else _moved(out, geometry.data_format, stored)
    if inside is None or not _is_ready(inside) or any(_overlap(inside, a) for a in operands.values()):
        inside = library.empty(shape, geometry.dtype)
        compute(choice, direction, library, {**operands, "out": inside}, activation)
        return _given_back(inside, stored, geometry.data_format, out)
    compute(choice, direction, library, {**operands, "out": inside}, activation)
    return out  # type: ignore[return-value]


def compute(
    choice: Any,
    direction: str,
    library: DeviceLibrary,
    arrays: Mapping[str, DeviceArray | None],
    activation: str | None,
) -> None:
    """Write what an algorithm computes to `out`, through bias and activation."""
    launches = _launches(choice, direction, activation, arrays.get("bias") is not None, library)
    _run(launches, library, arrays, choice.buffers)


def _launches(
    choice: Any, direction: str, activation: str | None, has_bias: bool, library: DeviceLibrary
) -> list[Launch]:
    """Return the launches of a convolution through bias and activation; the library's GPU is the current one."""
    # What was stated is as much as is used.
    limit = workspace_bytes(choice.buffers)
    return _conv_launches(choice.algorithm, choice.geometry, direction, activation, has_bias, library, limit)


# --- prepared calls --------------------------------------------------------------------------------------------
#
# What `calls` keeps of a call whose arrays lie as kernels want them: compiled, loaded, and a list of addresses away.

Prepared = Callable[..., Any]


def _prepared(
    make: Callable[..., tuple[list[Launch], Mapping[str, Buffer]]], names: Sequence[str], **results: Any
) -> Prepared | None:
    """Return a function of a library's arrays of these names that is a whole call; `make` is called at the first.

    `make` gets the library and the arrays; results are (shape, dtype) by name. The function returns the results, one
    or a tuple, and None if another GPU is the current one.
    """
    if config.get("poison"):
        return None
    bound: _Bound | None = None
    count = len(results)

    def run(*given: Any) -> Any:
        nonlocal bound
        if bound is None:
            library: Any = library_of(names[0], given[0])
            with library.current():
                launches, buffers = make(library, *given)
            bound = _bound(library, launches, names, results, buffers)
        library, new, address_of, stream_of, memory, wanted = bound
        if not library.is_current():
            return None
        fresh = [new(shape, dtype) for shape, dtype in memory]
        arrays = (*given, *fresh)
        addresses = [0 if array is None else address_of(array) for array in arrays]
        addresses.append(0)
        on = stream_of(library.stream())
        for launcher, chosen, is_call in wanted:
            if is_call:
                launcher(library, *chosen(arrays))
            else:
                launcher(on, *chosen(addresses))
        return fresh[0] if count == 1 else tuple(fresh[:count])

    return run


class _Bound(NamedTuple):
    """What a prepared call does with arrays of one library: allocate, find addresses, and launch on some of them."""

    library: DeviceLibrary
    new: Callable[..., Any]
    address_of: Callable[[Any], int]
    stream_of: Callable[[int], Any]
    memory: list[tuple[tuple[int, ...], np.dtype]]
    wanted: list[tuple[Callable[..., None], Callable[[Sequence[Any]], Sequence[Any]], bool]]


def _bound(
    library: DeviceLibrary, launches: list[Launch], names: Sequence[str], results: Mapping[str, Any],
    buffers: Mapping[str, Buffer],
) -> _Bound:  # fmt: skip
    """Return a prepared call, its names resolved to places among what is given and made."""
    made = {**results, **{name: (b.shape, np.dtype(b.dtype)) for name, b in buffers.items() if b.owned}}
    places = {name: i for i, name in enumerate((*names, *made))}
    # One place more, of the null pointer that stands for arrays that are not there.
    wanted = [
        (launcher, _chooser([places.get(name, len(places)) for name in own]), is_call)
        for launcher, own, is_call in launches
    ]
    return _Bound(library, library.new, library.address_of, launch.streams(), [*made.values()], wanted)


def _chooser(places: list[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Return the function that takes the elements at some places; `itemgetter` has no tuple for one."""
    return itemgetter(*places) if len(places) > 1 else lambda values: [values[i] for i in places]


def prepared_forward(choice: Any, geometry: ConvGeometry, activation: str | None) -> Prepared | None:
    """Return a function of (x, weight, bias) that is a whole forward call, as `calls` keeps it, or None."""
    return _prepared_conv(choice, geometry, "forward", ("x", "weight", "bias"), geometry.output_shape, activation)


def prepared_input_grad(choice: Any, geometry: ConvGeometry) -> Prepared | None:
    """Return a function of (grad_output, weight) for the gradient with respect to the input, or None."""
    return _prepared_conv(choice, geometry, "input_grad", ("grad_output", "weight"), geometry.x_shape)


def prepared_weight_grad(choice: Any, geometry: ConvGeometry) -> Prepared | None:
    """Return a function of (grad_output, x) for the gradient with respect to the weight, or None."""
    return _prepared_conv(choice, geometry, "weight_grad", ("grad_output", "x"), geometry.weight_shape)


def _prepared_conv(
    choice: Any, geometry: ConvGeometry, direction: str, names: Sequence[str], shape: tuple[int, ...],
    activation: str | None = None,
) -> Prepared | None:  # fmt: skip
    if geometry.padding_mode != "zeros" or geometry.is_empty:
        return None

    def make(library: DeviceLibrary, *given: Any) -> tuple[list[Launch], Mapping[str, Buffer]]:
        has_bias = len(given) > 2 and given[2] is not None
        return _launches(choice, direction, activation, has_bias, library), choice.buffers

    return _prepared(make, names, out=(shape, geometry.dtype))


def prepared_bias_grad(geometry: ConvGeometry) -> Prepared | None:
    """Return a function of grad_output for the gradient with respect to the bias, or None."""
    g = geometry
    sizes = g.batch, g.out_channels, math.prod(g.output_size), g.data_format, g.dtype

    def make(library: DeviceLibrary, grad_output: Any) -> tuple[list[Launch], Mapping[str, Buffer]]:
        return _bias_grad_launches(*sizes, library)

    return None if g.is_empty else _prepared(make, ("grad_output",), out=((g.out_channels,), g.dtype))


# --- memory ----------------------------------------------------------------------------------------------------


def _moved(array: DeviceArray, data_format: str, wanted: str) -> DeviceArray:
    """Return a view of a batched array of one format in another."""
    if data_format == wanted:
        return array
    return array.moved(1, -1) if data_format == "channels_first" else array.moved(-1, 1)


def _is_ready(array: DeviceArray) -> bool:
    return array.is_contiguous and array.address % ALIGNMENT == 0


def _contiguous(array: DeviceArray | None) -> DeviceArray | None:
    """Return an array that kernels can take, copied only if it is not one already."""
    if array is None or _is_ready(array):
        return array
    fresh = array.library.empty(array.shape, array.dtype)
    fresh.fill_from(array)
    return fresh


def _laid_out(array: DeviceArray, data_format: str, stored: str) -> DeviceArray:
    return _contiguous(_moved(array, data_format, stored))  # type: ignore[return-value]


def _given_back(result: DeviceArray, stored: str, data_format: str, out: DeviceArray | None) -> DeviceArray:
    result = _moved(result, stored, data_format)
    if out is None:
        return result
    out.fill_from(result)
    return out


def _overlap(a: DeviceArray, b: DeviceArray | None) -> bool:
    """Return whether two contiguous arrays share memory."""
    if b is None:
        return False
    return a.address < b.address + b.nbytes and b.address < a.address + a.nbytes


# --- pooling ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _launches_of(make: Callable[..., list[Step]], library: DeviceLibrary, *arguments: Any) -> list[Launch]:
    """Return the launches of a function that makes steps, on a library's GPU."""
    return ready(make(*arguments), library.device)


def _dtypes(name: str) -> tuple[str, ...]:
    """Return what there are kernels for: maxima alone are taken of integers."""
    return (*SUPPORTED, *INTEGERS) if name.startswith("max_pool") else SUPPORTED


def _require_dtype(name: str, array: DeviceArray) -> None:
    if array.dtype.name not in (allowed := _dtypes(name)):
        raise UnsupportedError(f"on a GPU {name} pools {', '.join(allowed)}, not {array.dtype}")


def _pooled(
    name: str, make: Callable[..., list[Step]], geometry: PoolGeometry, given: DeviceArray, *arguments: Any,
    backward: bool = False, indices: bool = False,
) -> tuple[DeviceArray, DeviceArray | None]:  # fmt: skip
    """Return what steps made for a geometry make of one array: "out", and where asked for the "indices"."""
    g, library = geometry, given.library
    _require_dtype(name, given)
    stored = stored_format(given, g.data_format)
    with library.current():
        source = _laid_out(given, g.data_format, stored)
        shape = join_shape(g.batch, g.channels, g.input_size if backward else g.output_size, stored)
        out = library.empty(shape, given.dtype)
        where = library.empty(shape, np.dtype(np.int64)) if indices else None
        launches = _launches_of(make, library, replace(g, data_format=stored), given.dtype, *arguments)
        _run(launches, library, {"grad_output" if backward else "x": source, "out": out, "indices": where})
        return _moved(out, stored, g.data_format), None if where is None else _moved(where, stored, g.data_format)


def max_pool(geometry: PoolGeometry, x: DeviceArray, return_indices: bool) -> tuple[DeviceArray, DeviceArray | None]:
    """Return (maxima, int64 indices or None)."""
    return _pooled("max_pool", pool.max_pool, geometry, x, return_indices, indices=return_indices)


def avg_pool(geometry: PoolGeometry, x: DeviceArray, count_include_pad: bool, divisor: int) -> DeviceArray:
    """Return the average of each window."""
    return _pooled("avg_pool", pool.avg_pool, geometry, x, count_include_pad, divisor)[0]


def avg_pool_backward(
    geometry: PoolGeometry, grad_output: DeviceArray, count_include_pad: bool, divisor: int
) -> DeviceArray:
    """Return the gradient of the average with respect to its input."""
    how = (count_include_pad, divisor)
    return _pooled("avg_pool_backward", pool.avg_pool_grad, geometry, grad_output, *how, backward=True)[0]


def lp_pool(geometry: PoolGeometry, x: DeviceArray, power: float) -> DeviceArray:
    """Return (mean of |x|**power * prod(kernel)) ** (1/power) of each window."""
    return _pooled("lp_pool", pool.lp_pool, geometry, x, power)[0]


def lp_pool_backward(geometry: PoolGeometry, grad_output: DeviceArray, x: DeviceArray, power: float) -> DeviceArray:
    """Return the gradient of the norm with respect to its input; half types are computed in float32."""
    g, library = geometry, x.library
    _require_dtype("lp_pool_backward", x)
    stored, dtype = stored_format(x, g.data_format), Element.of(x.dtype).sums_dtype
    with library.current():
        operands = {
            "x": _converted(_laid_out(x, g.data_format, stored), dtype),
            "grad_output": _converted(_laid_out(grad_output, g.data_format, stored), dtype),
        }
        inside = replace(g, data_format=stored)
        out = library.empty(join_shape(g.batch, g.channels, g.input_size, stored), dtype)
        launches = _launches_of(pool.lp_pool_grad, library, inside, dtype, power)
        _run(launches, library, {**operands, "out": out}, pool.lp_pool_grad_workspace(inside, dtype))
        return _moved(_converted(out, x.dtype), stored, g.data_format)


def _converted(array: DeviceArray, dtype: np.dtype) -> DeviceArray:
    if array.dtype == dtype:
        return array
    fresh = array.library.empty(array.shape, dtype)
    fresh.fill_from(array)
    return fresh


def _scattered(
    values: DeviceArray, indices: DeviceArray, batch: int, channels: int, spatial: tuple[int, ...], data_format: str,
    latest: bool,
) -> tuple[DeviceArray, bool]:  # fmt: skip
    """Return values at their places, added up or the latest, and True: who asks whether indices were good must wait."""
    library, stored = values.library, stored_format(values, data_format)
    _require_dtype("max_unpool" if latest else "max_pool_backward", values)
    with library.current():
        source, where = (_laid_out(a, data_format, stored) for a in (values, indices))
        out = library.empty(join_shape(batch, channels, spatial, stored), values.dtype)
        shape, size = planes_shape(source.shape, stored), planes_shape(out.shape, stored)[1:4]
        launches = _launches_of(pool.scatter, library, shape, size, values.dtype, latest)
        buffers = pool.scatter_workspace(shape, size)
        _run(launches, library, {"grad_output": source, "indices": where, "out": out}, buffers)
        return _moved(out, stored, data_format), True


def max_pool_backward(
    grad_output: DeviceArray, indices: DeviceArray, batch: int, channels: int, input_size: tuple[int, ...],
    data_format: str,
) -> tuple[DeviceArray, bool]:  # fmt: skip
    """Return (gradient with respect to the input, True); an index outside the plane counts for nothing."""
    return _scattered(grad_output, indices, batch, channels, input_size, data_format, latest=False)


def max_unpool(
    x: DeviceArray, indices: DeviceArray, batch: int, channels: int, output_size: tuple[int, ...], data_format: str
) -> tuple[DeviceArray, bool]:
    """Return (values at their indices and 0 elsewhere, True); an index outside the plane counts for nothing."""
    return _scattered(x, indices, batch, channels, output_size, data_format, latest=True)


def max_unpool_backward(
    grad_output: DeviceArray, indices: DeviceArray, batch: int, channels: int, input_size: tuple[int, ...],
    data_format: str,
) -> tuple[DeviceArray, bool]:  # fmt: skip
    """Return (gradient at each index, True); an index outside the plane reads 0."""
    library, stored = grad_output.library, stored_format(grad_output, data_format)
    _require_dtype("max_unpool_backward", grad_output)
    with library.current():
        source, where = (_laid_out(a, data_format, stored) for a in (grad_output, indices))
        out = library.empty(join_shape(batch, channels, input_size, stored), grad_output.dtype)
        outer, *windows, inner = planes_shape(out.shape, stored)
        size = math.prod(planes_shape(source.shape, stored)[1:4])
        launches = _launches_of(pool.gather, library, (outer, math.prod(windows), inner), size, grad_output.dtype)
        _run(launches, library, {"grad_output": source, "indices": where, "out": out})
        return _moved(out, stored, data_format), True


def _prepared_pool(
    make: Callable[..., list[Step]], geometry: PoolGeometry, dtype: np.dtype, *arguments: Any,
    backward: bool = False, indices: bool = False,
) -> Prepared | None:  # fmt: skip
    """Return a function of one array that is a whole call, as `calls` keeps it, or None."""
    if dtype.name not in _dtypes(make.__name__):
        return None

    def launches(library: DeviceLibrary, *given: Any) -> tuple[list[Launch], Mapping[str, Buffer]]:
        return _launches_of(make, library, geometry, dtype, *arguments), {}

    results = {"out": (geometry.x_shape if backward else geometry.output_shape, dtype)}
    if indices:
        results["indices"] = (geometry.output_shape, np.dtype(np.int64))
    return _prepared(launches, ("grad_output" if backward else "x",), **results)


def prepared_max_pool(geometry: PoolGeometry, dtype: np.dtype, return_indices: bool) -> Prepared | None:
    """Return a function of x that is a whole call, as `calls` keeps it, or None."""
    return _prepared_pool(pool.max_pool, geometry, dtype, return_indices, indices=return_indices)


def prepared_avg_pool(
    geometry: PoolGeometry, dtype: np.dtype, count_include_pad: bool, divisor: int
) -> Prepared | None:
    """Return a function of x that is a whole call, as `calls` keeps it, or None."""
    return _prepared_pool(pool.avg_pool, geometry, dtype, count_include_pad, divisor)


def prepared_avg_pool_backward(
    geometry: PoolGeometry, dtype: np.dtype, count_include_pad: bool, divisor: int
) -> Prepared | None:
    """Return a function of grad_output that is a whole call, as `calls` keeps it, or None."""
    return _prepared_pool(pool.avg_pool_grad, geometry, dtype, count_include_pad, divisor, backward=True)


def prepared_max_pool_backward(
    grad_output: DeviceArray, indices: DeviceArray, input_shape: tuple[int, ...], data_format: str
) -> Prepared | None:
    """Return a function of (grad_output, indices) that is a whole call, or None; the arrays have a batch."""
    dtype, shape = grad_output.dtype, planes_shape(grad_output.shape, data_format)
    size = planes_shape((1,) * (grad_output.ndim - len(input_shape)) + input_shape, data_format)[1:4]
    if dtype.name not in _dtypes("max_pool_backward"):
        return None

    def launches(library: DeviceLibrary, *given: Any) -> tuple[list[Launch], Mapping[str, Buffer]]:
        return _launches_of(pool.scatter, library, shape, size, dtype, False), pool.scatter_workspace(shape, size)

    return _prepared(launches, ("grad_output", "indices"), out=(input_shape, dtype))


# --- patches ---------------------------------------------------------------------------------------------------


def unfold(geometry: ConvGeometry, x: DeviceArray) -> DeviceArray:
    """Return the windows of x as columns: (N, C*prod(kernel), L)."""
    g = geometry
    return _patches(im2col.unfold, g, "x", x, (g.batch, g.reduction_length, math.prod(g.output_size)))


def fold(geometry: ConvGeometry, columns: DeviceArray) -> DeviceArray:
    """Return the image whose pixels are the sums of the columns' elements: (N, C, *output_size)."""
    g = geometry
    return _patches(im2col.fold, g, "columns", columns, (g.batch, g.in_channels, *g.input_size))


def _patches(
    make: Callable[..., list[Step]], g: ConvGeometry, name: str, given: DeviceArray, shape: tuple[int, ...]
) -> DeviceArray:
    library = given.library
    with library.current():
        source, out = _contiguous(given), library.empty(shape, g.dtype)
        if out.size:
            launches = _launches_of(make, library, g.lifted("channels_first", g.dtype))
            _run(launches, library, {name: source, "out": out})
        return out
