"""CUDA kernels: written as plain Python functions, compiled to machine code without a driver, tested without a GPU.

`ptx.py` has the instructions that Python has no words for, `compile.py` makes machine code, `launch.py` runs it on a
GPU, and `emulator.py` runs the same source on the CPU. Importing this package imports nothing else.
"""
