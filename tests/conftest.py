"""Settings shared by all tests: fixed seeds, and where the shared data lies."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

import hub_server

settings.register_profile("minilpt", derandomize=True, deadline=None)
settings.load_profile("minilpt")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def shared() -> Path:
    """The folder with GLUE data and golden checkpoints that lies beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared data, which is not at {SHARED}")
    return SHARED


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.HubServer]:
    """A hub on loopback, and huggingface_hub with an empty cache that knows no other."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "huggingface_hub"}
    with hub_server.serving() as server:
        hub_server.set_environment(tmp_path / "hf", server.url, monkeypatch)
        yield server
    hub_server.forget_library()
    sys.modules.update(before)
