"""Classifier.forward: token ids in, a record out, and ids that the model cannot take named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minilpt
from minilpt import Classifier, InputError, ragged

import checkpoints

PRUNING = {"rule": "threshold", "thresholds": [0.0, 0.04, 0.06], "score_denominator": "initial"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    """A tiny pruned BERT without a tokenizer."""
    folder = checkpoints.write(tmp_path_factory.mktemp("forward"))
    (folder / "ltp.json").write_text(json.dumps(PRUNING))
    return minilpt.load(folder)


@pytest.mark.parametrize("trace", [False, True])
def test_no_sequence_gives_no_rows(model: Classifier, trace: bool) -> None:
    for found in (model.forward([], trace=trace), model.forward([], [], trace=trace)):
        assert found.logits.shape == (0, 3)
        assert found.kept_tokens.shape == (3, 0)
        assert found.executed_flops.shape == found.dense_flops.shape == (0,)
        if trace:
            assert found.attention_lengths is not None and found.ffn_lengths is not None
            assert found.attention_lengths.shape == found.ffn_lengths.shape == (3, 0)


def test_only_a_trace_holds_the_lengths(model: Classifier) -> None:
    ids = [[2, 5, 7, 8, 3], [2, 3]]
    plain, traced = model.forward(ids), model.forward(ids, trace=True)
    assert plain.attention_lengths is plain.ffn_lengths is plain.counted_flops is None
    assert traced.attention_lengths is not None and traced.ffn_lengths is not None
    assert traced.attention_lengths[0].tolist() == [5, 2]
    assert np.array_equal(traced.attention_lengths[1:], traced.ffn_lengths[:-1])
    assert np.array_equal(traced.kept_tokens, traced.ffn_lengths)
    assert plain.kept_tokens[-1].tolist() == [1, 1]
    assert (plain.logits.dtype, plain.kept_tokens.dtype) == (np.float32, np.int32)
    assert (plain.executed_flops < traced.executed_flops).all()


def test_forward_takes_lists_tuples_arrays_and_integers_of_any_width(model: Classifier) -> None:
    wanted = model.forward([[2, 5, 3]], [[0, 1, 1]]).logits
    for dtype in (np.uint8, np.int16, np.int32, np.int64, np.uint64):
        found = model.forward([np.array([2, 5, 3], dtype)], [np.array([0, 1, 1], dtype)])
        assert np.array_equal(found.logits, wanted)
    assert np.array_equal(model.forward(((2, 5, 3),), ((0, 1, 1),)).logits, wanted)
    assert np.array_equal(model.forward(np.array([[2, 5, 3]]), np.array([[0, 1, 1]])).logits, wanted)
    assert not np.array_equal(model.forward([[2, 5, 3]]).logits, wanted)


OK = [2, 5, 3]


@pytest.mark.parametrize(
    "ids, segments, said",
    [
        ([OK, []], None, "sequence 1: token ids must be a non-empty sequence of integers"),
        ([OK, [2.0, 3.0]], None, "sequence 1: token ids must be"),
        ([OK, [True, False]], None, "sequence 1: token ids must be"),
        ([OK, ["2"]], None, "sequence 1: token ids must be"),
        ([OK, "abc"], None, "sequence 1: token ids must be"),
        ([OK, 5], None, "sequence 1: token ids must be"),
        ([OK, None], None, "sequence 1: token ids must be"),
        ([OK, [[2, 3]]], None, "sequence 1: token ids must be"),
        ([OK, [2, [3]]], None, "sequence 1: token ids must be"),
        ([OK, [2**70]], None, "sequence 1: token ids must be"),
        ([2, 5, 3], None, "sequence 0: token ids must be"),
        ([OK, [2, 60]], None, "sequence 1: token id 60 has no row; the model has rows 0 to 59"),
        ([OK, [-1]], None, "sequence 1: token id -1 has no row"),
        ([OK, [2**40]], None, f"sequence 1: token id {2**40} has no row"),
        ([OK, [5] * 41], None, "sequence 1 has 41 token ids; the model holds 40"),
        ([OK], [[0, 2, 1]], "sequence 0: segment id 2 has no row; the model has rows 0 to 1"),
        ([OK], [[0, -1, 1]], "sequence 0: segment id -1 has no row"),
        ([OK], [[0, 0, 0.0]], "sequence 0: segment ids must be"),
        ([OK], [[]], "sequence 0: segment ids must be"),
        ([OK], [[0, 0]], "sequence 0 has 3 token ids but 2 segment ids"),
        ([OK, OK], [[0, 0, 0]], "2 token id sequences but 1 segment id sequences"),
        ([OK], [], "1 token id sequences but 0 segment id sequences"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
@pytest.mark.parametrize("trace", [False, True])
def test_ids_that_the_model_cannot_take_are_named(
    model: Classifier, ids: Any, segments: Any, said: str, trace: bool
) -> None:
    with pytest.raises(InputError) as caught:
        model.forward(ids, segments, trace=trace)
    assert said in str(caught.value)


@pytest.mark.parametrize("model_type, rows", [("distilbert", 0), ("roberta", 1)])
def test_a_model_without_segments_takes_segment_zero_only(tmp_path: Path, model_type: str, rows: int) -> None:
    model = minilpt.load(checkpoints.write(tmp_path, checkpoints.config(model_type)), pruning=None)
    assert model.config.segments == rows
    assert np.array_equal(model.forward([OK], [[0, 0, 0]]).logits, model.forward([OK]).logits)
    with pytest.raises(InputError, match="segment id 1 has no row; the model has rows 0 to 0"):
        model.forward([OK], [[0, 1, 0]])


@given(st.data())
def test_the_positions_of_a_batch_are_those_of_each_sequence(data: st.DataObject) -> None:
    """Pads among the tokens included, which families that count from an offset do not count."""
    rows = data.draw(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), max_size=5))
    arrays = [np.array(row, np.int32) for row in rows]
    packed = np.concatenate([np.zeros(0, np.int32), *arrays])
    for offset in (0, 2):
        counting = {"offset": offset, "pad_token_id": 1}
        found = ragged.packed_positions(packed, ragged.boundaries(list(map(len, rows))), **counting)
        assert found.dtype == np.int32
        assert found.tolist() == [place for row in arrays for place in ragged.positions(row, **counting).tolist()]


def test_the_longest_sequence_is_the_limit_itself(model: Classifier) -> None:
    assert model.config.max_tokens == 40
    assert model.forward([[5] * 40]).logits.shape == (1, 3)


def test_inputs_are_left_as_they_were(model: Classifier) -> None:
    ids, segments = np.array([2, 5, 6, 3]), np.array([0, 0, 1, 1])
    model.forward([ids], [segments])
    assert (ids.tolist(), segments.tolist()) == ([2, 5, 6, 3], [0, 0, 1, 1])
