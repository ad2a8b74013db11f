"""CPU kernels: one module per algorithm, compiled by Numba at the first call and cached on disk."""
