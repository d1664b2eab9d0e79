"""Settings shared by all tests: fixed seeds, and where the shared data lies."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("minilpt", derandomize=True, deadline=None)
settings.load_profile("minilpt")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def shared() -> Path:
    """The folder with GLUE data and golden checkpoints that lies beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared data, which is not at {SHARED}")
    return SHARED
