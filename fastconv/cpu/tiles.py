"""What tiles of bfloat16 cost, for plans of every direction: see `bfloat16.py`."""

from .simd_bfloat16 import DEPTH, VECTORS

# Pixels that lie so many bytes apart share sets of the first-level cache.
ALIAS_BYTES = 1024
LINE = 64
# Rows of a tile of AMX, and of the register tiles of vectors.
TILE_ROWS, VECTOR_ROWS = 16, (14, 8)
# Cycles to split 32 numbers, by products.
SPLIT_CYCLES = {1: 16, 3: 24, 6: 36}
# Bytes of a panel or of sums that a cycle brings from a farther cache.
PANEL_BYTES = 16


def tile_cycles(unit, products, held):
    """Cycles of one step of a tile of `held` rows and two tiles B.

    Measured for AMX: a tile of 14 rows takes 0.95 of the time of one of 16, one of 8 rows 0.85.
    """
    if unit == VECTORS:
        return products * DEPTH * held
    return products * DEPTH * (0.7 + 0.3 * held / TILE_ROWS)


def span(taps):
    """Return the positions from the first tap to the last."""
    return taps[-1][1] - taps[0][1] + 1
