"""Kernels as Numba functions over generated LLVM IR, compiled to one object file by `build.py`; nothing here runs in Python."""
