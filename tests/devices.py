"""Where CUDA kernels run in tests: under the rig's schedules on the CPU, or on a card with a real CuPy."""

from __future__ import annotations

from typing import Any

import pytest

from minilpt import cuda_device

from cuda_rig import fake_cupy, simt

GPU = pytest.param("gpu", marks=pytest.mark.gpu)
ONE_SCHEDULE = ["fifo", GPU]
EVERY_SCHEDULE = [*simt.SCHEDULES, GPU]


def cupy_of(name: str) -> Any:
    """CuPy, or the stand-in under the schedule of this name, with the checker; skips where it cannot run."""
    if name == "gpu":
        reason = cuda_device.why_not()
        if reason is not None:
            pytest.skip(f"needs a CUDA card: {reason}")
        return cuda_device.find().cp
    if not simt.available():
        pytest.skip(simt.WHY_NOT)
    fake_cupy.configure(checked=True, schedule=name, seed=1)
    return fake_cupy
