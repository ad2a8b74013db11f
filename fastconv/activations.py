"""The activations that operations fuse: their names, the numbers by which kernels know them, and the slope of one."""

from __future__ import annotations

ACTIVATIONS = ("relu", "leaky_relu", "sigmoid", "tanh")
# What kernels compare with: 0 is "no activation".
CODES = {name: code for code, name in enumerate((None, *ACTIVATIONS))}
# What leaky ReLU multiplies negative numbers by.
LEAKY_SLOPE = 0.01
