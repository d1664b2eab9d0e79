"""Kernels compiled at run time by Numba from generated LLVM IR: the same operations on any CPU, one rung at a time."""
