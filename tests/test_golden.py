"""Checkpoints that the original LTP code wrote, with the outputs it gave: logits, and the lengths of every layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import minilpt
from minilpt import reference
from minilpt.pruning import KeepRule, Relative, Threshold, TopK

import oracles
import tolerances

# Checkpoint -> (our rule, what to say at load). Its score was divided by the width of the padded batch.
RULES: dict[str, tuple[type, str | dict[str, Any]]] = {
    "ltp_absolute_threshold": (Threshold, {"score_denominator": 40}),
    "ltp_relative_threshold": (Relative, "auto"),
    "ltp_topk": (TopK, "auto"),
}


@dataclass(frozen=True)
class Golden:
    """A checkpoint under its own rule, its inputs without padding, and what the original code answered."""

    model: minilpt.Classifier
    rule: KeepRule
    twin: oracles.Twin
    batch: oracles.Batch
    expected: dict[str, NDArray[Any]]

    def logits_bound(self) -> float:
        """Between two float32 results, the recorded one and ours."""
        cost = tolerances.cost_of(self.twin.weights, self.twin.exact, self.twin.config, self.rule, self.batch)
        return 2 * tolerances.logits_bound(cost, self.expected["logits"])


@pytest.fixture(params=RULES)
def golden(request: pytest.FixtureRequest, shared: Path) -> Golden:
    folder, (kind, wanted) = shared / "golden" / request.param, RULES[request.param]
    model = minilpt.load(folder, pruning=wanted)
    assert model.pruning is not None
    assert isinstance(model.pruning.rule, kind)
    with np.load(folder / "expected.npz") as file:
        expected = dict(file)
    rows = zip(expected["input_ids"], expected["attention_mask"], strict=True)
    batch = [(ids[mask == 1].tolist(), [0] * int(mask.sum())) for ids, mask in rows]
    return Golden(model, model.pruning.rule, oracles.golden_twin(folder), batch, expected)


def test_the_engine_gives_the_recorded_logits_and_lengths(golden: Golden) -> None:
    ids, _ = zip(*golden.batch, strict=True)
    result = golden.model.forward(ids, trace=True)
    assert np.abs(result.logits - golden.expected["logits"]).max() <= golden.logits_bound()
    assert np.array_equal(result.attention_lengths, golden.expected["attention_lengths"])
    assert np.array_equal(result.ffn_lengths, golden.expected["ffn_lengths"])
    assert np.array_equal(result.kept_tokens, golden.expected["ffn_lengths"])


def test_the_last_layer_shortcut_gives_the_recorded_logits(golden: Golden) -> None:
    ids, _ = zip(*golden.batch, strict=True)
    result = golden.model.forward(ids)
    assert np.abs(result.logits - golden.expected["logits"]).max() <= golden.logits_bound()
    assert np.array_equal(result.kept_tokens[:-1], golden.expected["ffn_lengths"][:-1])
    assert (result.kept_tokens[-1] == 1).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_reference_gives_the_recorded_logits_and_lengths(golden: Golden, dtype: type) -> None:
    weights = golden.twin.weights if dtype is np.float32 else golden.twin.exact
    for b, (ids, segments) in enumerate(golden.batch):
        row, kinds = np.array(ids, np.int32), np.array(segments, np.int32)
        traced = reference.forward(weights, golden.twin.config, golden.rule, row, kinds)
        assert np.abs(traced.logits - golden.expected["logits"][b]).max() <= golden.logits_bound()
        assert traced.n_attention == golden.expected["attention_lengths"][:, b].tolist()
        assert traced.n_ffn == golden.expected["ffn_lengths"][:, b].tolist()


def test_the_masked_emulation_gives_the_recorded_logits_and_lengths(golden: Golden) -> None:
    """So the oracle of test_equivalence.py is LTP as its authors wrote it."""
    pruning = golden.model.pruning
    assert pruning is not None
    emulated = oracles.emulate(golden.twin, golden.batch, {"rule": pruning.name, **pruning.settings})
    assert np.abs(emulated.logits - golden.expected["logits"]).max() <= golden.logits_bound()
    assert np.array_equal(emulated.attention_lengths, golden.expected["attention_lengths"])
    assert np.array_equal(emulated.ffn_lengths, golden.expected["ffn_lengths"])


def test_a_checkpoint_that_does_not_say_its_padded_length_gets_128_and_one_warning(shared: Path) -> None:
    with pytest.warns(minilpt.MinilptWarning, match="score_denominator") as caught:
        model = minilpt.load(shared / "golden" / "ltp_absolute_threshold")
    assert [warning.filename for warning in caught] == [__file__]
    assert model.pruning is not None
    assert model.pruning.settings["score_denominator"] == 128
    assert isinstance(model.pruning.rule, Threshold)
    assert model.pruning.rule.denominator(n_live=3, n_initial=5) == 128


@pytest.mark.parametrize("pruning", [None, {"score_denominator": 40}])
@pytest.mark.filterwarnings("error")
def test_nothing_is_warned_of_where_the_denominator_is_given_or_not_needed(shared: Path, pruning: Any) -> None:
    assert minilpt.load(shared / "golden" / "ltp_absolute_threshold", pruning=pruning).config.layers == 4
