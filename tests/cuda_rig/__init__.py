"""CUDA sources run and checked on a CPU, without a card: see docs/cuda-rig.md. Needs NumPy, and g++ on x86-64 Linux.

`simt` builds and launches unmodified sources, `fake_cupy` is a strict stand-in for CuPy on top of it, `compile_gate`
reads what NVIDIA's compiler says of them, `mutants` asks whether the tests would notice a missing barrier. Nothing here
knows the project around it.
"""
