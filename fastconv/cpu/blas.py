"""Matrix products by NumPy's BLAS, with sums kept short.

BLAS adds up small products in one running sum, whose float32 error grows with its length: beyond `CHAIN` terms the
product is taken in parts.
"""

import numpy as np

from ..registry import Buffer
from . import threads

# Terms of one running sum: 2048 keep float32 below 1e-6 (RMS, relative) on normal data.
CHAIN = 2048

_SINGLE = (np.dtype(np.float32), np.dtype(np.complex64))


def partial_buffer(depth, shape, dtype):
    """Return the buffer that a product over `depth` terms with a result of `shape` needs, as a dict; mostly none."""
    return {"partial": Buffer(shape, dtype)} if depth > CHAIN and dtype in _SINGLE else {}


def matmul(a, b, out, workspace):
    """Write a @ b to `out`, in parts if `workspace` has a buffer for them."""
    partial = workspace.get("partial")
    depth = a.shape[-1]
    step = depth if partial is None else CHAIN
    # NaN and infinities are the caller's, and pass through as they are.
    with threads.blas(), np.errstate(all="ignore"):
        np.matmul(a[..., :step], b[..., :step, :], out=out)
        for start in range(step, depth, step):
            part = partial.reshape(-1)[: out.size].reshape(out.shape)
            np.matmul(a[..., start : start + step], b[..., start : start + step, :], out=part)
            np.add(out, part, out=out)
