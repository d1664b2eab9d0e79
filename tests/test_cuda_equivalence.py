"""The CUDA engine against PyTorch: every architecture, and LTP kept token for kept token, by test_equivalence's checks.

Its sources run on the CPU under the SIMT shim, which is slow: fewer and shorter sequences than there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minilpt.backends import Backend
from minilpt.cuda_device import CudaDevice
from minilpt.cuda_engine import CudaEngine
from minilpt.cuda_float import FloatCudaProgram
from minilpt.engine import Engine
from minilpt.pruning import KeepRule

import devices
import oracles
import test_equivalence as equivalence
from oracles import Twin
from test_equivalence import Build, Case, Tally

build = equivalence.build  # the fixture
lengths = st.lists(st.integers(1, 40), min_size=1, max_size=3)


@pytest.fixture(scope="module", params=devices.ONE_SCHEDULE)
def cp(request: pytest.FixtureRequest) -> Any:
    return devices.cupy_of(request.param)


@pytest.fixture(autouse=True)
def cuda_only(cp: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The checks see this engine and no other."""
    device = CudaDevice(cp, 0, "a card", 75, multiprocessors=40)

    def engines(twin: Twin, rule: KeepRule | None) -> dict[str, Engine]:
        program = FloatCudaProgram(twin.config, twin.stored, "fp32", device)
        return {"cuda": CudaEngine(twin.config, program, rule, Backend("cuda", "cuda", "fp32", 1), device)}

    monkeypatch.setattr(equivalence, "engines", engines)
    yield


@pytest.mark.parametrize("architecture", oracles.ARCHITECTURES)
def test_every_architecture_answers_as_transformers(build: Build, architecture: str) -> None:
    twin = build(architecture)
    equivalence.assert_equal_to_rounding(twin, oracles.draw_batch(twin, [1, 9, 33]))


@pytest.mark.parametrize(("width", "heads"), [(32, 1), (36, 3), (200, 2), (384, 12)])
def test_every_width(build: Build, width: int, heads: int) -> None:
    shape = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 2 * width + 12}
    twin = build("bert", num_hidden_layers=2, **shape)
    equivalence.assert_equal_to_rounding(twin, oracles.draw_batch(twin, [7, 20]))


@pytest.mark.parametrize("activation", ["gelu_new", "relu"])
def test_every_activation(build: Build, activation: str) -> None:
    twin = build("bert", hidden_act=activation)
    equivalence.assert_equal_to_rounding(twin, oracles.draw_batch(twin, [12, 2]))


@pytest.mark.parametrize("name", equivalence.RECORDS)
def test_pruning_keeps_the_tokens_that_the_masked_emulation_keeps(build: Build, name: str) -> None:
    tally = Tally()

    @settings(max_examples=4, suppress_health_check=[HealthCheck.too_slow])
    @given(st.sampled_from(equivalence.EMULATED), equivalence.RECORDS[name], lengths, equivalence.seeds)
    def check(architecture: str, record: dict[str, Any], lengths: list[int], seed: int) -> None:
        twin = build(architecture, 2, num_hidden_layers=equivalence.LAYERS)
        Case(twin, oracles.draw_batch(twin, lengths, seed), record, tally).check_all()

    check()
    assert tally.close <= max(1, 0.001 * tally.tokens), tally
