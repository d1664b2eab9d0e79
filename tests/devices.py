"""Where CUDA kernels run in tests: under the rig's schedules on the CPU, or on a card with a real CuPy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from minilpt import cuda_device
from minilpt.kernels import cuda

from cuda_rig import fake_cupy, mutants, simt

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
    if mutants.VARIABLE in os.environ:
        _take_mutant(Path(os.environ[mutants.VARIABLE]))
    fake_cupy.configure(checked=True, schedule=name, seed=1)
    return fake_cupy


def _take_mutant(path: Path) -> None:
    """That source instead of ours of the same name, for the life of this process."""
    ours = cuda.source
    cuda.source = lambda name: path.read_text(encoding="utf-8") if name == path.stem else ours(name)
