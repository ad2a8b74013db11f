"""Convolution as a product of spectra, through `scipy.fft`.

    forward       Y  = X  * conj(W)    sampled every `stride`
    input_grad    dX = dY * W          dY spread by `stride`
    weight_grad   dW = X  * conj(dY)   sampled every `dilation`

where X, W, dY are the transforms of the padded input, the dilated kernel and the spread gradient, all zero-filled
to one length that is fast to transform and at least the padded input's, so that nothing wraps around
(Mathieu, Henaff & LeCun, "Fast training of convolutional networks through FFTs", 2014, section 2). The product over
channels is one small complex matrix product per frequency:  (F, N, K) = (F, N, C) @ (F, C, K).

The work does not depend on the kernel's size, so wide kernels gain. A NaN or an infinity in the input spreads over
its whole plane, and rounding errors are relative to the largest values of a plane.
"""

import importlib.util
import math
from functools import lru_cache

import numpy as np

from ..registry import Buffer
from . import blas, epilogue, threads

_AXES = (1, 2, 3)


def supports(geometry, direction):
    """Every floating-point geometry, where SciPy is installed."""
    if not _scipy_is_installed():
        return False, "needs SciPy: pip install 'fastconv[fft]'"
    if geometry.dtype.kind != "f":
        return False, f"there is no transform of {geometry.dtype}"
    return True, ""


@lru_cache(maxsize=1)
def _scipy_is_installed():
    return importlib.util.find_spec("scipy") is not None


def workspace(geometry, direction, limit):
    """Both operands zero-filled, and all three spectra; nothing is split."""
    g = geometry
    length, half = _lengths(g)
    complex_ = np.dtype(np.complex64 if g.dtype.itemsize == 4 else np.complex128)
    sizes = {
        "x": (g.batch, g.in_channels),
        "grad": (g.batch, g.out_channels),
        "weight": (g.in_channels // g.groups, g.out_channels),
    }
    first, second, result = _roles(direction)
    # What the inverse transform allocates: a copy of the spectrum and the result.
    buffers = {
        "inverse": Buffer((sizes[result][0], *half, sizes[result][1]), complex_, owned=False),
        "inverse_result": Buffer((sizes[result][0], *length, sizes[result][1]), g.dtype, owned=False),
        "product": Buffer((sizes[result][0], *half, sizes[result][1]), complex_),
    }
    for name in (first, second):
        rows, columns = sizes[name]
        buffers[name] = Buffer((rows, *length, columns), g.dtype)
        buffers[name + "_spectrum"] = Buffer((rows, *half, columns), complex_, owned=False)
    depth = {"forward": g.in_channels, "input_grad": g.out_channels}.get(direction, g.batch * g.groups) // g.groups
    return buffers | blas.partial_buffer(depth, buffers["product"].shape, complex_)


def _roles(direction):
    """The two operands and the result of a direction."""
    return {
        "forward": ("x", "weight", "grad"),
        "input_grad": ("grad", "weight", "x"),
        "weight_grad": ("x", "grad", "weight"),
    }[direction]


@lru_cache(maxsize=1024)
def _lengths(g):
    """Transform lengths per dimension, and the same with the last one halved as real input allows."""
    from scipy.fft import next_fast_len

    length = tuple(next_fast_len(n, real=True) for n in g.padded_size)
    return length, (*length[:-1], length[-1] // 2 + 1)


def seconds(geometry, direction, threads_):
    """Predicted time: three sets of transforms and the products at every frequency."""
    g = geometry
    length, half = _lengths(g)
    points = math.prod(length)
    planes = g.batch * (g.in_channels + g.out_channels) + g.in_channels // g.groups * g.out_channels
    transforms = planes * 2.5 * points * max(math.log2(points), 1) / (2.5e9 * threads_)
    C, K = g.in_channels // g.groups, g.out_channels // g.groups
    products = 8 * g.batch * C * K * g.groups * math.prod(half) / (16e9 * min(1.0, (C * K) ** 0.5 / 24 + 0.05))
    return 150e-6 + transforms + products + 40e-9 * math.prod(half) * g.groups**0.5


def forward(geometry, x, weight, bias, activation, out, workspace):
    """Write the convolution of `x` with `weight`, plus bias, through the activation, to `out`."""
    g = geometry
    spectrum = _input_spectrum(g, x, workspace)
    kernel = _weight_spectrum(g, weight, workspace)
    np.conjugate(kernel, out=kernel)
    C, K = g.in_channels // g.groups, g.out_channels // g.groups
    _multiply(g, spectrum, kernel.reshape(C, -1, g.groups, K), workspace)
    result = _inverse(g, workspace["product"])
    _last(g, out)[...] = result[_every(g.output_size, g.stride)]
    epilogue.apply(out, g.data_format, bias, activation)


def input_grad(geometry, grad_output, weight, out, workspace):
    """Write the gradient with respect to the input to `out`."""
    g = geometry
    spectrum = _grad_spectrum(g, grad_output, workspace)
    kernel = _weight_spectrum(g, weight, workspace)
    # The same product from the other side: filters are summed, channels remain.
    C, K = g.in_channels // g.groups, g.out_channels // g.groups
    swapped = kernel.reshape(C, -1, g.groups, K).transpose(3, 1, 2, 0)
    _multiply(g, spectrum, swapped, workspace)
    _last(g, out)[...] = _inverse(g, workspace["product"])[_interior(g)]


def weight_grad(geometry, grad_output, x, out, workspace):
    """Write the gradient with respect to the weight to `out`."""
    g = geometry
    C, K = g.in_channels // g.groups, g.out_channels // g.groups
    spectrum = _input_spectrum(g, x, workspace)
    grad = _grad_spectrum(g, grad_output, workspace)
    np.conjugate(grad, out=grad)
    product = workspace["product"]
    # (F, G, C, K) = (F, G, C, N) @ (F, G, N, K)
    left = spectrum.reshape(g.batch, -1, g.groups, C).transpose(1, 2, 3, 0)
    right = grad.reshape(g.batch, -1, g.groups, K).transpose(1, 2, 0, 3)
    blas.matmul(left, right, product.reshape(C, -1, g.groups, K).transpose(1, 2, 0, 3), workspace)
    taps = _inverse(g, product)[_every(g.kernel_size, g.dilation)]
    # (C, T, R, S, G*K) -> (G*K, C, T, R, S)
    out[...] = taps.transpose(4, 0, 1, 2, 3)


def _last(g, array):
    """The array with its channels last, as a view."""
    return array.transpose(0, 2, 3, 4, 1) if g.data_format == "channels_first" else array


def _every(count, step):
    return (slice(None), *(slice(0, (n - 1) * s + 1, s) for n, s in zip(count, step)))


def _interior(g):
    return (slice(None), *(slice(b, b + n) for n, (b, _) in zip(g.input_size, g.padding)))


def _input_spectrum(g, x, workspace):
    return _spectrum(_last(g, x), workspace["x"], _interior(g))


def _grad_spectrum(g, grad_output, workspace):
    return _spectrum(_last(g, grad_output), workspace["grad"], _every(g.output_size, g.stride))


def _weight_spectrum(g, weight, workspace):
    # (K, C, T, R, S) -> (C, T, R, S, K)
    return _spectrum(weight.transpose(1, 2, 3, 4, 0), workspace["weight"], _every(g.kernel_size, g.dilation))


def _spectrum(values, room, where):
    import scipy.fft

    room[...] = 0
    room[where] = values
    with np.errstate(all="ignore"):
        return scipy.fft.rfftn(room, axes=_AXES, workers=threads.count())


def _inverse(g, product):
    import scipy.fft

    with np.errstate(all="ignore"):
        return scipy.fft.irfftn(product, s=_lengths(g)[0], axes=_AXES, workers=threads.count())


def _multiply(g, spectrum, kernel, workspace):
    """(N, F, G*K) = (N, F, G*C) by (C, F, G, K), summed over C, frequency by frequency and group by group."""
    C, K = kernel.shape[0], kernel.shape[3]
    left = spectrum.reshape(g.batch, -1, g.groups, C).transpose(1, 2, 0, 3)
    target = workspace["product"].reshape(g.batch, -1, g.groups, K).transpose(1, 2, 0, 3)
    if C == 1:
        with np.errstate(all="ignore"):
            # (F, G, N, K) = (F, G, N, 1) * (F, G, 1, K)
            np.multiply(left, kernel.transpose(1, 2, 0, 3), out=target)
    else:
        blas.matmul(left, kernel.transpose(1, 2, 0, 3), target, workspace)
