"""What a test of a convolution or a pool needs: tolerances, comparisons, gradient checks, guard pages, cases.

`CONV_CASES` and `POOL_CASES` are the one table of cases for every algorithm on every device, for tests and
benchmarks alike; `conv_cases` and `pool_cases` draw further ones with Hypothesis.

The error model: a sum of n products rounded with unit roundoff u gathers errors of random sign, so that the
root-mean-square error over the root-mean-square result grows as ``u * sqrt(n)`` (Higham & Mary, "A new
approach to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41, 2019). In that unit, sums in
natural order reach 0.3 to 0.5. Fast algorithms multiply it by an amplification, listed below.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
_SMALLEST = {"float64": 2.0**-1074, "float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}

# Ten times the error of a sum in natural order on random data.
_SAFETY = 4.0
# A normally distributed error exceeds eight standard deviations once in 1e15 elements.
_LARGEST_OVER_RMS = 8.0
# Two-dimensional transforms on random data: 0.6, 6 and 7 for transforms of 4, 6 and 8 points and one channel,
# and less with every further channel; the room above that is for unlucky weights.
_WINOGRAD_AMPLIFICATION = {4: 2.0, 5: 4.0, 6: 8.0, 7: 12.0, 8: 16.0}
# Operands cut to tf32, or split into bfloat16: the promises of "medium" and "high", in root-mean-square. Measured of
# bfloat16 2.4e-3 and 4.4e-6, and up to 4.0e-3 where results are few, of which rounding the operands alone is as much.
_SPLIT_PROMISES = {"bf16": 5e-3, "tf32": 5e-3, "bf16x3": 2e-5}
# A transform adds the error of a sum of log2(points) terms, whatever the kernel's size, and there are three.
_FFT_AMPLIFICATION = 4.0


@dataclass(frozen=True)
class Tolerance:
    """Allowed error of a result.

    Attributes
    ----------
    elementwise : float
        Largest absolute error over the largest absolute reference value.
    rms : float
        Root-mean-square error over the root-mean-square reference value.
    absolute : float
        Added to both bounds: the spacing of the type's subnormal numbers, below which nothing is relative.
    """

    elementwise: float
    rms: float
    absolute: float = 0.0


def _dtype_name(dtype: Any) -> str:
    try:
        return np.dtype(dtype).name
    except TypeError:
        # bfloat16 before ml_dtypes is imported, or a PyTorch dtype such as torch.float32
        return str(dtype).rpartition(".")[2]


def _amplification(algorithm: str) -> float:
    if algorithm.startswith("fft"):
        return _FFT_AMPLIFICATION
    if algorithm.startswith("winograd"):
        tile = re.match(r"winograd_f(\d+)x(\d+)", algorithm)
        points = int(tile[1]) + int(tile[2]) - 1 if tile else max(_WINOGRAD_AMPLIFICATION)
        return _WINOGRAD_AMPLIFICATION[min(max(points, 4), 8)]
    return 1.0


def tolerance(dtype: Any, algorithm: str = "direct", reduction_length: int = 1) -> Tolerance:
    """Return the allowed error of one algorithm's result.

    float32 and float64 allow ``4 * amplification * u * sqrt(reduction_length)`` in root-mean-square and eight
    times that for a single element. float16 and bfloat16 accumulate in float32, so that the one rounding of
    the result is nearly all of it. Integers allow nothing.

    Parameters
    ----------
    dtype : NumPy dtype, its name, or a PyTorch dtype
        Type of the result.
    algorithm : str
        "winograd..." and "fft..." have an amplification, "..._bf16", "..._bf16x3" and "..._tf32" round their
        operands; every other name counts as direct summation.
    reduction_length : int
        Products summed for one element: ``C // groups * prod(kernel)`` forwards, ``N * prod(out)`` for the
        weight gradient.

    Examples
    --------
    >>> tolerance("float32", "direct", 64 * 3 * 3).rms < 1e-5
    True
    >>> tolerance("int32").elementwise
    0.0
    """
    name = _dtype_name(dtype)
    if re.match(r"u?int\d+$|bool$", name):
        return Tolerance(0.0, 0.0)
    if name not in _UNIT_ROUNDOFF:
        raise TypeError(f"dtype must be an integer type or one of {', '.join(_UNIT_ROUNDOFF)}, not {dtype!r}")
    is_half = _UNIT_ROUNDOFF[name] > 2.0**-24
    accumulator = _UNIT_ROUNDOFF["float32" if is_half else name]
    # Of independent products: a single element may err by more than the average.
    split = 0.0 if name == "float64" else _SPLIT_PROMISES.get(algorithm.rpartition("_")[2], 0.0)
    summing = _SAFETY * _amplification(algorithm) * accumulator * math.sqrt(max(reduction_length, 1))
    rounding = _UNIT_ROUNDOFF[name] if is_half else 0.0
    elementwise = rounding + _LARGEST_OVER_RMS * summing + 3 * split
    return Tolerance(elementwise, rounding + summing + split, _SMALLEST[name])


def _rms(values: np.ndarray) -> float:
    largest = float(np.abs(values).max(initial=0.0))
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    # Scaled, so that squares of large or small values neither overflow nor vanish.
    return largest * math.sqrt(float(np.mean((values / largest) ** 2)))


def rms_error(actual: Any, reference: Any) -> float:
    """Root-mean-square error over the root-mean-square of `reference`, where that is finite.

    Zero for equal arrays, infinite if only the reference is all zero.

    Examples
    --------
    >>> rms_error([3.0, 4.1], [3.0, 4.0]) < 0.021
    True
    """
    reference = np.asarray(reference).astype(np.float64)
    actual = np.asarray(actual).astype(np.float64)
    finite = np.isfinite(reference)
    error, size = _rms(actual[finite] - reference[finite]), _rms(reference[finite])
    if error == 0.0:
        return 0.0
    return error / size if size else math.inf


def _check_special(actual: np.ndarray, expected: np.ndarray, context: str) -> np.ndarray:
    """Raise unless NaN and infinities agree; return where `expected` is finite."""
    same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    special = ~(np.isfinite(actual) & np.isfinite(expected)) & ~same
    if special.any():
        index = tuple(int(i) for i in np.argwhere(special)[0])
        raise AssertionError(
            f"{context}NaN or infinity differs in {int(special.sum())} of {actual.size} elements, first at "
            f"{index}: actual {actual[index]!r}, expected {expected[index]!r}"
        )
    return np.isfinite(expected)


def _rounded(expected: np.ndarray, name: str) -> np.ndarray:
    """`expected` with infinities where rounding to the type of the result overflows."""
    top = {"float64": math.inf, "float16": 2.0**16}.get(name, 2.0**128)
    overflows = np.abs(expected) >= top * (1.0 - _UNIT_ROUNDOFF[name] / 2)
    return np.where(overflows, np.copysign(math.inf, expected), expected)


def assert_close(
    actual: Any,
    expected: Any,
    dtype: Any = None,
    algorithm: str = "direct",
    reduction_length: int = 1,
    err_msg: str = "",
) -> None:
    """Raise AssertionError unless `actual` is `expected` within `tolerance`, elementwise and in RMS.

    Shapes must be equal, and so must NaN and infinities, place by place. Integers must be equal.

    Parameters
    ----------
    actual : array_like
        The result under test.
    expected : array_like
        The reference, in float64 for floating-point results.
    dtype : dtype, optional
        Type whose tolerance applies; that of `actual` unless given.
    algorithm, reduction_length
        As for `tolerance`.
    err_msg : str
        Put in front of the message.

    Examples
    --------
    >>> assert_close(np.float32([1.0, 2.0]), [1.0, 2.0 + 1e-7])
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    name = _dtype_name(actual.dtype if dtype is None else dtype)
    context = f"{err_msg}: " if err_msg else ""
    if actual.shape != expected.shape:
        raise AssertionError(f"{context}shape {actual.shape}, expected {expected.shape}")
    allowed = tolerance(name, algorithm, reduction_length)
    if allowed.elementwise == 0.0:
        _assert_equal(actual, expected, context)
        return
    actual, expected = actual.astype(np.float64), _rounded(expected.astype(np.float64), name)
    finite = _check_special(actual, expected, context)
    error = np.subtract(actual, expected, out=np.zeros(actual.shape), where=finite)
    largest = float(np.abs(expected[finite]).max(initial=0.0))
    size = _rms(expected[finite])
    worst, rms = float(np.abs(error).max(initial=0.0)), _rms(error[finite])
    most, most_rms = allowed.elementwise * largest, allowed.rms * size
    if worst <= most + allowed.absolute and rms <= most_rms + allowed.absolute:
        return
    index = tuple(int(i) for i in np.unravel_index(np.abs(error).argmax(), error.shape))
    raise AssertionError(
        f"{context}{name} {algorithm} over {reduction_length} products: largest error {worst:.3g}, allowed "
        f"{most:.3g} ({allowed.elementwise:.3g} of {largest:.3g}); RMS error {rms:.3g}, allowed "
        f"{most_rms:.3g} ({allowed.rms:.3g} of {size:.3g}); worst at {index}: actual {actual[index]!r}, "
        f"expected {expected[index]!r}"
    )


def _assert_equal(actual: np.ndarray, expected: np.ndarray, context: str) -> None:
    different = actual != expected
    if different.any():
        index = tuple(int(i) for i in np.argwhere(different)[0])
        raise AssertionError(
            f"{context}{int(different.sum())} of {actual.size} integers differ, first at {index}: "
            f"actual {actual[index]!r}, expected {expected[index]!r}"
        )


def check_gradients(
    function: Callable[..., Any],
    inputs: Sequence[Any],
    grads: Sequence[Any],
    grad_output: Any,
    *,
    eps: float = 1e-5,
    rtol: float = 1e-6,
    directions: int = 3,
    seed: int = 0,
) -> None:
    """Raise AssertionError unless `grads` are the gradients of ``sum(function(*inputs) * grad_output)``.

    For each input in turn, and for a few random directions v of normally distributed elements, the central
    difference ``<f(x + eps*v) - f(x - eps*v), grad_output> / (2*eps)`` must be ``<grad, v>`` within `rtol` of
    the larger of the two and of the gradient's norm: two evaluations a direction, not two an element.

    Parameters
    ----------
    function : callable
        Takes the inputs as float64 arrays, returns one array.
    inputs, grads : sequences of arrays
        A gradient of None is not checked.
    grad_output : array
        Of the shape that `function` returns.
    eps : float
        Step; keep it below the distance to the next kink, such as a tie in a max pool.
    rtol : float
        Allowed difference; the truncation error of a smooth function is near eps**2.
    directions, seed : int
        How many directions, and the seed that draws them.

    Examples
    --------
    >>> x = np.array([1.0, 2.0])
    >>> check_gradients(np.square, [x], [2 * x], np.ones(2))
    """
    rng = np.random.default_rng(seed)
    arrays = [np.asarray(x).astype(np.float64) for x in inputs]
    cotangent = np.asarray(grad_output).astype(np.float64)
    for i, (x, given) in enumerate(zip(arrays, grads)):
        if given is None:
            continue
        grad = np.asarray(given).astype(np.float64)
        if grad.shape != x.shape:
            raise AssertionError(f"gradient {i} has shape {grad.shape}, its input {x.shape}")
        for _ in range(directions):
            v = rng.standard_normal(x.shape)
            ahead = np.asarray(function(*arrays[:i], x + eps * v, *arrays[i + 1 :]))
            behind = np.asarray(function(*arrays[:i], x - eps * v, *arrays[i + 1 :]))
            numerical = float(((ahead - behind) * cotangent).sum()) / (2 * eps)
            analytic = float((grad * v).sum())
            scale = max(abs(numerical), abs(analytic), float(np.linalg.norm(grad)))
            if not abs(numerical - analytic) <= rtol * scale:
                raise AssertionError(
                    f"gradient {i} along a random direction is {analytic:.10g}, numerically "
                    f"{numerical:.10g}; they may differ by {rtol * scale:.3g}"
                )


def _protect(page: int, length: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    no_access = 0
    if libc.mprotect(page, length, no_access) != 0:
        raise OSError(ctypes.get_errno(), "mprotect could not make a guard page")


def guarded(array: Any, where: str = "after") -> np.ndarray:
    """Copy `array` to where it touches an inaccessible page, so that one element too far crashes the process.

    The copy keeps the order of the axes in memory but has no gaps between its elements. What lies between the
    copy and the far end of its pages is all ones bitwise, which is NaN in every floating-point type. Linux
    and macOS only.

    Parameters
    ----------
    array : array_like
    where : "after" or "before"
        Side of the inaccessible page: beyond the last element, or ahead of the first.

    Examples
    --------
    >>> guarded(np.arange(3.0)).tolist()
    [0.0, 1.0, 2.0]
    """
    if where not in ("after", "before"):
        raise ValueError(f"where must be 'after' or 'before', not {where!r}")
    if sys.platform not in ("linux", "darwin"):
        raise OSError(f"guard pages need Linux or macOS, not {sys.platform}")
    array = np.asarray(array)
    page = mmap.PAGESIZE
    room = -(-array.nbytes // page) * page
    memory = mmap.mmap(-1, room + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(b"\xff" * (room + page))
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    _protect(start + (room if where == "after" else 0), page)
    offset = room - array.nbytes if where == "after" else page
    order = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))
    shape = tuple(array.shape[axis] for axis in order)
    flat = np.ndarray(shape, array.dtype, buffer=memory, offset=offset)
    copy = flat.transpose(np.argsort(order)) if order else flat
    copy[...] = array
    return copy


@dataclass(frozen=True)
class ConvCase:
    """One convolution: shapes are batched and channels-first, the rest as the operations take it.

    `x_shape` is ``(N, C, *spatial)``, `weight_shape` is ``(K, C // groups, *kernel)``.
    """

    name: str
    x_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1
    padding_mode: str = "zeros"

    def __str__(self) -> str:
        return self.name

    @property
    def spatial_dims(self) -> int:
        """Number of spatial dimensions: 1, 2 or 3."""
        return len(self.x_shape) - 2


@dataclass(frozen=True)
class PoolCase:
    """One pool over `x_shape` ``(N, C, *spatial)``, for maxima and averages alike."""

    name: str
    x_shape: tuple[int, ...]
    kernel_size: Any
    stride: Any = None
    padding: Any = 0
    dilation: Any = 1
    ceil_mode: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def spatial_dims(self) -> int:
        """Number of spatial dimensions: 1, 2 or 3."""
        return len(self.x_shape) - 2


def _draw_padding(draw: Any, st: Any, most: Sequence[int]) -> Any:
    """A padding in one of its numeric forms, no side above `most`."""
    sides = [st.integers(0, limit) for limit in most]
    form = draw(st.sampled_from(("int", "each", "pairs")))
    if form == "int":
        return draw(st.integers(0, min(most)))
    if form == "each":
        return tuple(draw(side) for side in sides)
    return tuple((draw(side), draw(side)) for side in sides)


def _draw_sizes(draw: Any, st: Any, dims: int, most: int) -> tuple[int, ...]:
    return tuple(draw(st.integers(1, most)) for _ in range(dims))


def conv_cases(spatial_dims: int | None = None) -> Any:
    """Hypothesis strategy for a small valid `ConvCase`, of any number of spatial dimensions unless given.

    Examples
    --------
    >>> case = conv_cases(2).example()  # doctest: +SKIP
    """
    import hypothesis.strategies as st

    @st.composite
    def build(draw: Any) -> ConvCase:
        dims = draw(st.integers(1, 3)) if spatial_dims is None else spatial_dims
        kernel, stride = _draw_sizes(draw, st, dims, 5 if dims < 3 else 3), _draw_sizes(draw, st, dims, 4)
        dilation = _draw_sizes(draw, st, dims, 3)
        windows = [d * (k - 1) + 1 for k, d in zip(kernel, dilation)]
        # At least a window, so that the convolution is valid whatever its padding and mode.
        extents = tuple(draw(st.integers(w, w + 6)) for w in windows)
        mode = draw(st.sampled_from(("zeros", "zeros", "reflect", "symmetric", "replicate", "circular")))
        padding = draw(st.sampled_from(("valid", "same", "same_lower", "full", None, None, None, None)))
        if padding is None:
            padding = _draw_padding(draw, st, [min(n - 1, 4) for n in extents])
        groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
        x_shape = (draw(st.integers(0, 3)), groups * per_group, *extents)
        weight_shape = (groups * draw(st.integers(1, 3)), per_group, *kernel)
        return ConvCase("drawn", x_shape, weight_shape, stride, padding, dilation, groups, mode)

    return build()


def pool_cases(spatial_dims: int | None = None) -> Any:
    """Hypothesis strategy for a small valid `PoolCase`, of any number of spatial dimensions unless given.

    Examples
    --------
    >>> case = pool_cases(2).example()  # doctest: +SKIP
    """
    import hypothesis.strategies as st

    @st.composite
    def build(draw: Any) -> PoolCase:
        dims = draw(st.integers(1, 3)) if spatial_dims is None else spatial_dims
        kernel, dilation = _draw_sizes(draw, st, dims, 4), _draw_sizes(draw, st, dims, 3)
        stride = None if draw(st.booleans()) else _draw_sizes(draw, st, dims, 5)
        windows = [d * (k - 1) + 1 for k, d in zip(kernel, dilation)]
        extents = tuple(draw(st.integers(w, w + 6)) for w in windows)
        padding = draw(st.sampled_from(("valid", "same", "same_lower", "full", None, None, None, None)))
        if padding is None:
            padding = _draw_padding(draw, st, [k // 2 for k in kernel])
        x_shape = (draw(st.integers(0, 3)), draw(st.integers(1, 4)), *extents)
        return PoolCase("drawn", x_shape, kernel, stride, padding, dilation, draw(st.booleans()))

    return build()


CONV_CASES: tuple[ConvCase, ...] = (
    ConvCase("1d k3", (2, 3, 17), (4, 3, 3), padding=1),
    ConvCase("1d audio k15 stride 4", (2, 1, 67), (6, 1, 15), stride=4, padding=7),
    ConvCase("1d causal dilation 4", (1, 4, 33), (8, 4, 2), padding=((4, 0),), dilation=4),
    ConvCase("1d kernel as long as the signal", (2, 3, 9), (5, 3, 9)),
    ConvCase("1d depthwise", (2, 6, 21), (6, 1, 5), padding=2, groups=6),
    ConvCase("1d circular", (1, 2, 11), (3, 2, 5), padding=2, padding_mode="circular"),
    ConvCase("1d same stride 3", (2, 3, 20), (4, 3, 4), stride=3, padding="same"),
    ConvCase("3x3", (2, 8, 14, 14), (16, 8, 3, 3), padding=1),
    ConvCase("3x3 odd sizes, no padding", (2, 5, 13, 11), (7, 5, 3, 3)),
    ConvCase("3x3 one past a tile", (1, 4, 5, 9), (4, 4, 3, 3), padding=1),
    ConvCase("3x3 one short of a tile", (1, 4, 7, 3), (4, 4, 3, 3), padding=1),
    ConvCase("3x3 on one pixel", (3, 4, 1, 1), (5, 4, 3, 3), padding=1),
    ConvCase("3x3 one output", (5, 7, 3, 3), (6, 7, 3, 3)),
    # Pixels, channels and images are all an element apart, or may seem so.
    ConvCase("3x3 one output of whole vectors", (5, 2, 3, 3), (32, 2, 3, 3)),
    ConvCase("1x1 on one pixel, whole vectors", (4, 16, 1, 1), (32, 16, 1, 1)),
    ConvCase("1x1 on one pixel, grouped vectors", (3, 6, 1, 1), (32, 3, 1, 1), groups=2),
    ConvCase("3x3 stride 2", (2, 6, 15, 17), (8, 6, 3, 3), stride=2, padding=1),
    ConvCase("3x3 stride 3 that leaves a rest", (1, 4, 10, 13), (5, 4, 3, 3), stride=3),
    ConvCase("3x3 dilation 2", (1, 4, 12, 11), (6, 4, 3, 3), padding=2, dilation=2),
    ConvCase("3x3 dilation 3 stride 2", (2, 3, 15, 16), (4, 3, 3, 3), stride=2, padding=3, dilation=3),
    ConvCase("1x1", (2, 24, 9, 7), (20, 24, 1, 1)),
    ConvCase("1x1 stride 2", (2, 16, 9, 8), (12, 16, 1, 1), stride=2),
    ConvCase("1x1 on one pixel", (3, 64, 1, 1), (32, 64, 1, 1)),
    ConvCase("1x1 padding 1", (1, 3, 4, 5), (4, 3, 1, 1), padding=1),
    ConvCase("2x2", (2, 3, 8, 9), (5, 3, 2, 2), padding=1),
    ConvCase("4x4 stride 2", (1, 5, 12, 14), (7, 5, 4, 4), stride=2, padding=1),
    ConvCase("5x5", (1, 6, 13, 12), (8, 6, 5, 5), padding=2),
    ConvCase("7x7 stride 2 on RGB", (1, 3, 33, 31), (8, 3, 7, 7), stride=2, padding=3),
    ConvCase("11x11 stride 4 on RGB", (1, 3, 47, 43), (6, 3, 11, 11), stride=4, padding=2),
    ConvCase("15x15", (1, 2, 23, 21), (3, 2, 15, 15), padding=7),
    ConvCase("kernel as large as the image", (2, 4, 6, 7), (5, 4, 6, 7)),
    ConvCase("kernel larger than the image", (1, 3, 4, 5), (4, 3, 7, 7), padding=3),
    ConvCase("stride larger than the kernel", (2, 3, 17, 19), (4, 3, 2, 2), stride=5),
    ConvCase("patches, stride equal to the kernel", (1, 3, 16, 20), (16, 3, 4, 4), stride=4),
    ConvCase("1x7", (1, 5, 8, 15), (6, 5, 1, 7), padding=(0, 3)),
    ConvCase("7x1", (1, 5, 15, 8), (6, 5, 7, 1), padding=(3, 0)),
    ConvCase("3x5, all per dimension", (2, 3, 14, 13), (4, 3, 3, 5), (2, 1), (1, 3), (1, 2)),
    ConvCase("groups 2", (2, 8, 9, 9), (12, 4, 3, 3), padding=1, groups=2),
    ConvCase("groups 3 of 5 channels", (2, 15, 8, 8), (9, 5, 3, 3), padding=1, groups=3),
    ConvCase("groups 3 of 5 channels, 1x1 stride 2", (2, 15, 7, 7), (6, 5, 1, 1), stride=2, groups=3),
    ConvCase("depthwise", (2, 19, 11, 11), (19, 1, 3, 3), padding=1, groups=19),
    ConvCase("depthwise multiplier 2", (1, 10, 12, 13), (20, 1, 3, 3), padding=1, groups=10),
    ConvCase("depthwise 5x5 stride 2", (2, 9, 14, 15), (9, 1, 5, 5), stride=2, padding=2, groups=9),
    ConvCase("depthwise 7x7 dilation 2", (1, 6, 15, 17), (6, 1, 7, 7), padding=6, dilation=2, groups=6),
    ConvCase("depthwise 15x15", (1, 4, 20, 19), (4, 1, 15, 15), padding=7, groups=4),
    ConvCase("depthwise, a vector of channels and a rest", (2, 35, 9, 10), (35, 1, 3, 3), padding=1, groups=35),
    ConvCase("depthwise, whole vectors", (2, 64, 7, 7), (64, 1, 3, 3), 2, padding=1, groups=64),
    ConvCase("depthwise multiplier 3 stride 2 dilation 2", (2, 6, 13, 12), (18, 1, 3, 3), 2, 2, 2, groups=6),
    ConvCase("depthwise multiplier 2 of whole vectors", (1, 32, 6, 5), (64, 1, 2, 3), 1, (1, 0), groups=32),
    ConvCase("depthwise stride 3 dilation 2", (1, 5, 14, 16), (5, 1, 4, 3), 3, (2, 3), 2, groups=5),
    ConvCase("depthwise 31x31 on a small image", (1, 18, 6, 9), (18, 1, 31, 31), padding=15, groups=18),
    ConvCase("depthwise stride over the kernel", (2, 20, 11, 10), (20, 1, 2, 2), 5, ((0, 3), (4, 1)), groups=20),
    ConvCase("depthwise padding larger than the kernel", (1, 17, 4, 5), (17, 1, 3, 3), padding=4, groups=17),
    ConvCase("1d depthwise, long", (1, 3, 3000), (3, 1, 9), padding=((8, 0),), groups=3),
    ConvCase("3d depthwise stride 2", (2, 4, 5, 6, 7), (8, 1, 3, 2, 3), 2, (1, 0, 2), groups=4),
    ConvCase("first layer, C=1", (2, 1, 28, 28), (6, 1, 5, 5), padding=2),
    ConvCase("first layer, C=3", (1, 3, 16, 17), (64, 3, 3, 3), padding=1),
    ConvCase("K=1", (2, 7, 10, 9), (1, 7, 3, 3), padding=1),
    ConvCase("prime channels", (1, 13, 9, 10), (17, 13, 3, 3), padding=1),
    ConvCase("long reduction, C=512", (1, 512, 4, 4), (8, 512, 3, 3), padding=1),
    ConvCase("few channels from many, stride 2", (2, 3, 13, 11), (16, 3, 5, 5), stride=2, padding=2),
    ConvCase("groups 4 of 8 channels", (1, 32, 9, 10), (32, 8, 3, 3), padding=1, groups=4),
    ConvCase("many small images", (9, 8, 5, 4), (33, 8, 5, 5), padding=2),
    ConvCase("1x1, pixels of 4096 bytes", (2, 1024, 3, 3), (8, 1024, 1, 1)),
    ConvCase("dilation as wide as the image", (2, 4, 9, 9), (5, 4, 3, 3), padding=6, dilation=6),
    ConvCase("empty batch", (0, 3, 8, 8), (4, 3, 3, 3), padding=1),
    ConvCase("batch 7", (7, 3, 6, 6), (4, 3, 3, 3), padding=1),
    ConvCase("tall image", (1, 3, 97, 3), (4, 3, 3, 3), padding=1),
    ConvCase("flat image", (1, 3, 3, 101), (4, 3, 3, 3), padding=1),
    ConvCase("padding in pairs", (1, 3, 9, 8), (4, 3, 3, 3), padding=((0, 2), (3, 1))),
    ConvCase("padding in pairs, stride 2", (2, 3, 9, 8), (4, 3, 4, 3), stride=2, padding=((2, 1), (0, 1))),
    ConvCase("padding larger than the kernel", (1, 2, 5, 6), (3, 2, 3, 3), padding=4),
    ConvCase("same, even kernel", (1, 3, 9, 8), (4, 3, 4, 2), padding="same"),
    ConvCase("same, dilation 3", (1, 3, 11, 10), (4, 3, 3, 3), padding="same", dilation=3),
    ConvCase("same, stride 2", (2, 3, 10, 11), (4, 3, 3, 3), stride=2, padding="same"),
    ConvCase("same_lower, stride 2", (2, 3, 10, 11), (4, 3, 3, 4), stride=2, padding="same_lower"),
    ConvCase("full", (1, 3, 6, 7), (4, 3, 3, 4), padding="full"),
    ConvCase("valid, dilation 2", (1, 3, 9, 10), (4, 3, 3, 3), padding="valid", dilation=2),
    ConvCase("reflect", (1, 3, 8, 9), (4, 3, 5, 5), padding=2, padding_mode="reflect"),
    ConvCase("symmetric", (1, 3, 8, 9), (4, 3, 5, 5), padding=2, padding_mode="symmetric"),
    ConvCase("replicate", (1, 3, 8, 9), (4, 3, 5, 5), padding=2, padding_mode="replicate"),
    ConvCase("circular", (1, 3, 8, 9), (4, 3, 5, 5), padding=2, padding_mode="circular"),
    ConvCase("reflect in pairs", (1, 3, 8, 9), (4, 3, 3, 3), 2, ((7, 0), (1, 3)), padding_mode="reflect"),
    ConvCase("replicate wider than the image", (1, 2, 3, 2), (3, 2, 3, 3), 1, 5, padding_mode="replicate"),
    ConvCase("circular as wide as the image", (1, 2, 3, 4), (3, 2, 3, 3), 1, (3, 4), padding_mode="circular"),
    ConvCase("symmetric same", (1, 2, 9, 10), (3, 2, 4, 4), padding="same", padding_mode="symmetric"),
    ConvCase("3d 3x3x3", (1, 3, 5, 6, 7), (4, 3, 3, 3, 3), padding=1),
    ConvCase("3d stride 2 dilation 2", (2, 2, 9, 8, 7), (3, 2, 3, 2, 3), 2, (2, 1, 2), 2),
    ConvCase("3d 1x3x3", (1, 4, 4, 9, 8), (5, 4, 1, 3, 3), padding=(0, 1, 1)),
    ConvCase("3d 3x1x1", (1, 4, 9, 4, 5), (5, 4, 3, 1, 1), padding=(1, 0, 0)),
    ConvCase("3d depthwise", (1, 5, 5, 6, 7), (5, 1, 3, 3, 3), padding=1, groups=5),
    ConvCase("3d groups 2", (1, 6, 4, 5, 6), (4, 3, 3, 3, 3), padding=1, groups=2),
    ConvCase("3d replicate", (1, 2, 4, 5, 6), (3, 2, 3, 3, 3), padding=2, padding_mode="replicate"),
    ConvCase("3d same, stride 2", (1, 3, 5, 6, 7), (4, 3, 3, 3, 3), stride=2, padding="same"),
    ConvCase("3d 1x1x1 stride 2", (2, 6, 5, 4, 3), (7, 6, 1, 1, 1), stride=2),
)

POOL_CASES: tuple[PoolCase, ...] = (
    PoolCase("1d 2", (2, 3, 16), 2),
    PoolCase("1d 3 stride 2 ceil", (2, 3, 18), 3, 2, 1, ceil_mode=True),
    PoolCase("1d 5 overlapping", (1, 4, 19), 5, 1, 2),
    PoolCase("1d dilation 3", (2, 2, 21), 3, 2, 1, dilation=3),
    PoolCase("2x2", (2, 5, 8, 10), 2),
    PoolCase("2x2 odd sizes", (2, 5, 9, 11), 2),
    PoolCase("2x2 odd sizes, ceil", (2, 5, 9, 11), 2, ceil_mode=True),
    PoolCase("3x3 stride 2 padding 1", (2, 8, 15, 14), 3, 2, 1),
    PoolCase("3x3 stride 2, ceil", (1, 6, 14, 16), 3, 2, ceil_mode=True),
    PoolCase("3x3 stride 1 padding 1", (1, 17, 7, 8), 3, 1, 1),
    PoolCase("3x3 on 6x6 stride 3", (1, 1, 6, 6), 3),
    PoolCase("13x13 stride 1 padding 6", (1, 3, 13, 14), 13, 1, 6),
    PoolCase("ceil, last window dropped", (1, 3, 5, 8), 2, 3, 1, ceil_mode=True),
    PoolCase("ceil, last window leaves the margin", (1, 3, 8, 7), (3, 4), (2, 4), 1, ceil_mode=True),
    PoolCase("global", (2, 7, 7, 5), (7, 5)),
    PoolCase("1x1 stride 2", (2, 3, 7, 8), 1, 2),
    PoolCase("stride larger than the window", (1, 4, 17, 13), 2, 5),
    PoolCase("2x3, all per dimension", (2, 3, 12, 13), (2, 3), (3, 1), (1, 0), (2, 3)),
    PoolCase("dilation 2", (1, 4, 11, 12), 3, 1, 1, dilation=2),
    PoolCase("dilation 2, ceil", (2, 3, 12, 11), 3, 3, 1, dilation=2, ceil_mode=True),
    PoolCase("1x7", (1, 3, 6, 15), (1, 7), 1, (0, 3)),
    PoolCase("7x1", (1, 3, 15, 6), (7, 1), 1, (3, 0)),
    PoolCase("tall image", (1, 3, 101, 3), 3, 2, 1),
    PoolCase("flat image", (1, 3, 3, 97), 3, 2, 1),
    PoolCase("empty batch", (0, 3, 8, 8), 2),
    PoolCase("padding in pairs", (2, 3, 9, 8), 3, 2, ((0, 1), (1, 0))),
    PoolCase("windows wholly in padding", (1, 2, 4, 5), 2, 2, ((4, 2), (0, 5))),
    PoolCase("same, stride 2", (1, 3, 9, 10), 3, 2, "same"),
    PoolCase("same_lower, stride 2", (1, 3, 9, 10), (2, 4), 2, "same_lower"),
    PoolCase("valid", (1, 3, 9, 10), 3, 2, "valid"),
    PoolCase("full", (1, 3, 5, 6), 3, 2, "full"),
    PoolCase("3d 2x2x2", (2, 3, 6, 4, 8), 2),
    PoolCase("3d 3x3x3 stride 2 padding 1, ceil", (1, 3, 6, 7, 8), 3, 2, 1, ceil_mode=True),
    PoolCase("3d 1x2x2", (1, 4, 5, 6, 7), (1, 2, 2)),
    PoolCase("3d dilation 2", (1, 2, 7, 8, 9), 3, 1, 1, dilation=2),
)
