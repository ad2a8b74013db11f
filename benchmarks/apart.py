"""One contender of the panel, alone in this process: ``benchmarks.panel`` starts it.

PyTorch is loaded first, as a training script loads it: the kernels of both libraries then run on one pool of threads.
With fastconv's first there are two, which wait for each other's cores.
"""

import sys

import torch  # noqa: F401

from .panel import main

if __name__ == "__main__":
    sys.exit(main())
