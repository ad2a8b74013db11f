"""A convolution for repeated use: its weight packed once, and again when it has changed.

An algorithm takes part by three functions beside those of `registry`::

    kept(geometry, direction) -> names of the buffers that `pack` writes and `run` only reads; may be empty
    pack(geometry, direction, weight, workspace)
    run(geometry, direction, source, weight, bias, activation, out, workspace)

so that its forward is `pack` and then `run`. Others run whole, and a plan saves the rest of the call.
"""

from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from . import threads
from .compile import share, task
from .memory import address
from .run import conv_forward, is_staged, lifted_call, lifted_weight
from .simd import integer, integers, store_integer
from .workspace import fresh, layout_of, workspace

# Bytes that are compared before a task is prepared, and before a second thread has woken.
FEW_BYTES, SERIAL_BYTES = 16 * 1024, 64 * 1024


class Packed(NamedTuple):
    """A weight as it was (contiguous), as kernels take it (lifted, in the dtype computed in), and packed."""

    seen: np.ndarray
    weight: np.ndarray
    buffers: dict[str, np.ndarray]


class Plan:
    """The convolution of one geometry with one array of weights, by the algorithm chosen for it."""

    def __init__(self, choice, geometry, weight, activation):
        self.choice, self.geometry, self.weight, self.activation = choice, geometry, weight, activation
        algorithm = choice.algorithm.implementation
        names = algorithm.kept(choice.geometry, "forward") if choice.buffers and hasattr(algorithm, "kept") else ()
        self._kept = {name: choice.buffers[name] for name in names}
        self._scratch = {name: b for name, b in choice.buffers.items() if name not in self._kept}
        self._layout = layout_of(self._scratch)
        self._whole: Any = None if geometry.is_empty else lifted_call(choice, "forward", activation)
        # The workspace is for so many threads.
        self._threads = threads.count() if choice.buffers else None
        self._packed, self._lock = None, Lock()
        # A weight that algorithms take as it lies is read anew by each call, if nothing is packed.
        self.is_plain = not is_staged(choice, geometry)
        self._reads_weight = self.is_plain and not self._kept and weight.flags.carray

    def is_outdated(self):
        """Whether another number of threads would run it now."""
        return self._threads is not None and self._threads != threads.count()

    @property
    def nbytes(self):
        """Bytes kept beside the workspace: a copy of the weight to compare with, and one in the dtype computed in."""
        if self._reads_weight:
            return 0
        itemsize = self.choice.geometry.dtype.itemsize
        return self.weight.nbytes + (0 if self.weight.itemsize == itemsize else self.weight.size * itemsize)

    def __call__(self, x, bias, out):
        """Return the convolution of a batched x, of any strides."""
        g = self.geometry
        return conv_forward(self.choice, g, g.data_format, x, self.weight, bias, self.activation, out, self.compute)

    def compute(self, x, bias, result):
        """Write the convolution of arrays that are contiguous and of the dtype computed in; of any dimensions."""
        if self._reads_weight:
            self._whole(x, self.weight, bias, result)
            return
        packed, g = self._packed, self.choice.geometry
        if packed is None or differ(self.weight, packed.seen):
            packed = self.refresh()
        if not self._kept:
            self._whole(x, packed.weight, bias, result)
            return
        with workspace(self._scratch, self._layout) as lent:
            self.choice.algorithm.implementation.run(
                g, "forward", x.reshape(g.x_shape), packed.weight, bias, self.activation,
                result.reshape(g.output_shape), {**lent, **packed.buffers},
            )  # fmt: skip

    def refresh(self):
        """Pack the weight as it is now. Calls that are running still read what was packed before."""
        with self._lock:
            seen, g = self.weight.copy("C"), self.choice.geometry
            weight, buffers = lifted_weight(seen, g.dtype), fresh(self._kept)
            if buffers:
                with workspace(self._scratch, self._layout) as lent:
                    self.choice.algorithm.implementation.pack(g, "forward", weight, {**lent, **buffers})
            self._packed = Packed(seen, weight, buffers)
            return self._packed


def differ(a, b):
    """Return whether two arrays of a shape differ in any bit."""
    if a.nbytes <= FEW_BYTES:
        return a.tobytes() != b.tobytes()
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    words, rest = divmod(a.nbytes, 8)
    if rest and a.reshape(-1).view(np.uint8)[-rest:].tobytes() != b.reshape(-1).view(np.uint8)[-rest:].tobytes():
        return True
    chunks = 1 if a.nbytes < SERIAL_BYTES else threads.count()
    found = np.zeros(chunks, np.int64)
    _compare(chunks, address(a), address(b), words, address(found))
    return bool(found.any())


@task
def _compare(arguments, chunk):
    """Write the bits in which two stretches of memory differ anywhere."""
    chunks, a, b, words, found = integers(arguments, 0, 5)
    begin, end = share(words, chunk, chunks)
    bits = 0
    for i in range(begin, end):
        bits |= integer(a, i) ^ integer(b, i)
    store_integer(found, chunk, bits)
