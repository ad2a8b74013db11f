"""Plans: a convolution for repeated use with the same weight.

A call of conv2d packs or transforms the weight before it convolves. A plan does so once and keeps the result, with
everything else that does not depend on the input's numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import arrays, config, registry, selection
from ..arrays import INTEGER8
from ..errors import ArgumentTypeError, DTypeError, ShapeError
from ..geometry import PADDING_MODES, ConvGeometry, one_of
from ._entries import as_given, batched, entries, runner
from .convolution import adopt_all, adopt_out, check_activation, check_bias, check_dtypes, check_weight_dims


class ConvPlan:
    """A convolution of inputs of one shape with one weight, from :func:`fastconv.plan_conv2d`.

    ``plan(x)`` is what conv2d gives with the plan's arguments. It may be called from several threads at once.

    The plan holds on to the arrays `weight` and `bias` and notices when their contents change: each call compares the
    weight with a copy, bit by bit, which takes as long as reading both. Where nothing is packed there is no copy.

    The algorithm is chosen for the options and the number of threads of the first call; another number of threads
    chooses anew, other options do not matter any more.

    Attributes
    ----------
    geometry : ConvGeometry
    algorithm : str
        The algorithm's name.
    workspace_bytes : int
        What a call needs beside its arrays, the packed weight and the copy to compare with included. Scratch memory up
        to 64 MiB is shared by all plans of a thread and kept between calls.

    Examples
    --------
    >>> import numpy as np, fastconv
    >>> plan = fastconv.plan_conv2d((8, 16, 32, 32), np.ones((4, 16, 3, 3), np.float32), algorithm="implicit_gemm")
    >>> plan
    ConvPlan(implicit_gemm: x (8, 16, 32, 32), weight (4, 16, 3, 3) -> (8, 4, 30, 30), float32)
    """

    def __init__(
        self,
        library: arrays.Library,
        geometry: ConvGeometry,
        weight: np.ndarray,
        bias: np.ndarray | None,
        activation: str | None,
        algorithm: Any,
        precision: Any,
    ) -> None:
        self.geometry = geometry
        self._library, self._weight, self._bias, self._activation = library, weight, bias, activation
        self._asked = (algorithm, precision)
        self._options = {name: config.get(name) for name in ("algorithm", "precision", "workspace_limit")}
        self._dtype = arrays.compute_dtype(geometry.dtype) if geometry.dtype.name in INTEGER8 else geometry.dtype
        self._device = runner(library.device, "plan")
        self._made = self._make()

    def __call__(self, x: Any, out: Any = None) -> Any:
        """Return activation(conv(x, weight) + bias), in `out` if that is given.

        Parameters
        ----------
        x : array of the plan's input shape and dtype, any strides
        out : array, optional

        Raises
        ------
        ShapeError, DTypeError, ArgumentTypeError
            If x or `out` is not of the plan's shape, dtype and library.
        """
        g, made = self.geometry, self._current()
        plain = x.__class__ is np.ndarray and x.flags.carray and x.shape == g.x_shape and x.dtype == g.dtype
        if plain and out is None and made.is_plain and self._library is arrays.NumpyArrays:
            result = arrays.empty(g.output_shape, g.dtype)
            made.compute(x, self._bias, result)
            return result
        library, (x,) = adopt_all(x=x)
        if library is not self._library:
            raise ArgumentTypeError(f"x must be an array of {self._library.name}, like the plan's weight")
        if x.shape != g.x_shape:
            raise ShapeError(f"x must have the plan's input shape {g.x_shape}, not {x.shape}")
        arrays.check_same_dtype("x", x, "the plan", g.dtype)
        target = adopt_out(library, out, g.output_shape, self._dtype)
        if g.is_empty:
            result = arrays.empty(g.output_shape, self._dtype) if target is None else target
        else:
            slot = None if target is None else batched(target, g.batched)
            result = as_given(made(batched(x, g.batched), self._bias, slot), g.batched)
        return library.give_back(result) if out is None else out

    @property
    def algorithm(self) -> str:
        """Name of the algorithm."""
        return self._made.choice.algorithm.name

    @property
    def workspace_bytes(self) -> int:
        """Bytes beside the arrays of a call."""
        made = self._made
        return (
            registry.workspace_bytes(made.choice.buffers)
            + selection.staging_bytes(self.geometry, self._library.device)
            + made.nbytes
        )

    def refresh(self) -> None:
        """Pack the weight as it is now. Calls do so by themselves when they find it changed."""
        if not self.geometry.is_empty:
            self._current().refresh()

    def _make(self) -> Any:
        algorithm, precision = self._asked
        with config.options(**self._options):
            choice = selection.choose(
                self.geometry, "forward", self.geometry.data_format, self._library.device, algorithm, precision
            )
            return self._device.Plan(choice, self.geometry, self._weight, self._activation)

    def _current(self) -> Any:
        """Return the plan for the number of threads there is now: the workspace is for so many."""
        if self._made.is_outdated():
            self._made = self._make()
        return self._made

    def __repr__(self) -> str:
        g = self.geometry
        return f"ConvPlan({self.algorithm}: x {g.x_shape}, weight {g.weight_shape} -> {g.output_shape}, {g.dtype})"


def plan_convNd(
    dims: int,
    x_shape: Any,
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
) -> ConvPlan:
    """Prepare the convolution of inputs of a shape with `weight`: ``plan(x)`` then gives what convNd gives.

    Parameters
    ----------
    x_shape : shape of the inputs, (N, C, *spatial) or (N, *spatial, C) with data_format="channels_last"
        N may be absent. Their dtype is that of the weight.
    weight, bias, stride, padding, dilation, groups, data_format, padding_mode, activation, algorithm, precision
        As :func:`convNd` takes them.

    Returns
    -------
    ConvPlan
        With attributes `geometry`, `algorithm` and `workspace_bytes`.

    Raises
    ------
    As :func:`convNd`.

    Examples
    --------
    >>> import numpy as np, fastconv
    >>> weight = np.array([[[1.0, 0.0, -1.0]]])
    >>> plan = fastconv.plan_conv1d((1, 1, 5), weight)
    >>> plan(np.arange(1.0, 6.0).reshape(1, 1, 5))
    array([[[-2., -2., -2.]]])
    >>> weight *= 2
    >>> plan(np.arange(1.0, 6.0).reshape(1, 1, 5))
    array([[[-4., -4., -4.]]])
    """
    library, (weight, bias) = _adopt_kept(weight, bias)
    one_of("padding_mode", padding_mode, PADDING_MODES)
    check_dtypes(weight, weight)
    check_weight_dims(dims, weight, "(K, C // groups, *kernel)")
    geometry = ConvGeometry.create(
        x_shape, weight.shape, stride, padding, dilation, groups,
        data_format=data_format, padding_mode=padding_mode, dtype=weight.dtype, name="x_shape",
    )  # fmt: skip
    check_bias(bias, geometry.out_channels, weight.dtype)
    check_activation(activation, weight.dtype)
    return ConvPlan(library, geometry, weight, bias, activation, algorithm, precision)


def _adopt_kept(weight: Any, bias: Any) -> tuple[arrays.Library, list[Any]]:
    """Adopt arrays that are read again at each call, and so cannot be converted once."""
    library, found = arrays.adopt(weight=arrays.require_array("weight", weight), bias=bias)
    for name, array in zip(("weight", "bias"), found):
        if array is not None and not array.dtype.isnative:
            raise DTypeError(f"{name} must be in the machine's byte order in a plan, not of dtype {array.dtype.str}")
    return library, found


plan_conv1d, plan_conv2d, plan_conv3d = entries(plan_convNd)
