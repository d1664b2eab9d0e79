"""Settings shared by all tests: fixed seeds, and where the shared data lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from minilpt import cuda_device

settings.register_profile("minilpt", derandomize=True, deadline=None)
settings.load_profile("minilpt")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def shared() -> Path:
    """The folder with GLUE data and golden checkpoints that lies beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared data, which is not at {SHARED}")
    return SHARED


@pytest.fixture(scope="module", params=["shim", pytest.param("gpu", marks=pytest.mark.gpu)])
def cp(request: pytest.FixtureRequest) -> Any:
    """CuPy: the rig's stand-in, which runs the CUDA sources on the CPU, and the real one where there is a card."""
    if request.param == "gpu":
        reason = cuda_device.why_not()
        if reason is not None:
            pytest.skip(f"needs a CUDA card: {reason}")
        return cuda_device.find().cp
    from cuda_rig import fake_cupy, simt

    if not simt.available():
        pytest.skip(simt.WHY_NOT)
    return fake_cupy
