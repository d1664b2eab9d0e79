"""`explain`: every token with its fate, in the text it came from."""

from __future__ import annotations

import html
import json
import re

import numpy as np
import pytest

import minilpt
from minilpt.errors import InputError

import checkpoints

RULE = {"rule": "threshold", "thresholds": [0.0, 0.9, 0.8], "score_denominator": 1}
MERGED = RULE | {"thresholds": [0.8, 0.95, 0.9], "merge_removed": True}
TEXT = "A film,  not <b>good</b>ly & the bads!"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> minilpt.Classifier:
    made = checkpoints.write(tmp_path_factory.mktemp("explanation") / "model")
    return minilpt.load(checkpoints.write_vocabulary(made), pruning=RULE)


@pytest.mark.parametrize("text", [TEXT, ("good film", "not the bads!"), ""])
def test_every_token_has_the_fate_that_forward_gave_it(model: minilpt.Classifier, text: str | tuple[str, str]) -> None:
    found = model.explain(text)
    traced = model.forward(*model.encode([text]), trace=True)
    assert traced.ffn_lengths is not None and traced.masses is not None
    for layer in range(3):
        reached = [token for token in found.tokens if len(token.scores) > layer]
        goes_on = [token for token in reached if token.removed_in is None or token.removed_in > layer]
        np.testing.assert_array_equal([token.scores[layer] for token in reached], traced.masses[layer])
        assert len(goes_on) == traced.ffn_lengths[layer, 0]
    (prediction,) = model.predict([text])
    assert (found.label, found.score) == (prediction.label, prediction.score)
    assert len(found.tokens) == prediction.n_tokens
    assert found.tokens[0].removed_in is None


def test_merged_tokens_are_shown_as_removed_and_the_row_that_stands_for_them_is_none(model: minilpt.Classifier) -> None:
    merged = model.with_pruning(MERGED)
    found, traced = merged.explain(TEXT), merged.forward(*merged.encode([TEXT]), trace=True)
    assert traced.kept is not None and traced.masses is not None
    gone = [token.removed_in == 0 for token in found.tokens]
    assert gone == (~traced.kept[0]).tolist()
    assert 1 < sum(gone) < len(gone)
    stands_in = gone.index(True)
    reached = [token for token in found.tokens if token.removed_in != 0]
    np.testing.assert_array_equal([t.scores[1] for t in reached], np.delete(traced.masses[1], stands_in))


def test_tokens_stand_where_their_characters_are(model: minilpt.Classifier) -> None:
    found = model.explain(TEXT)
    shown = {TEXT[t.start : t.end] for t in found.tokens if t.part == 0}
    assert {"A", "film", ",", "not", "good", "bad", "s", "!"} <= shown
    second = [t for t in model.explain(("good film", "bad")).tokens if t.part == 1]
    assert [(t.token, t.start, t.end) for t in second] == [("bad", 0, 3)]


def test_the_page_holds_the_whole_text_and_nothing_from_elsewhere(model: minilpt.Classifier) -> None:
    page = model.explain(TEXT).to_html()
    body = re.search(r"<p class=text>(.*?)</p>", page, re.S)
    assert body
    assert html.unescape(re.sub(r"<[^>]*>", "", body[1])) == TEXT
    assert "<b>good" not in body[1]
    assert not re.search(r"<script|https?:|src=|url\(", page)


def test_a_text_that_was_cut_is_shown_whole(model: minilpt.Classifier) -> None:
    long = "good film " * 40
    found = model.explain(long)
    assert len(found.tokens) == model.max_tokens
    plain = re.sub(r"\x1b\[[0-9;]*m", "", found.to_ansi())
    assert plain.split("\n", 1)[1] == long


def test_without_pruning_everything_stays(model: minilpt.Classifier) -> None:
    found = model.with_pruning(None).explain(TEXT)
    assert found.rule is None
    assert all(token.removed_in is None for token in found.tokens)


def test_one_text_at_a_time(model: minilpt.Classifier) -> None:
    with pytest.raises(InputError, match="explain takes one text or pair, found 2"):
        model.explain(["a", "b"])  # type: ignore[arg-type]


def test_to_dict_is_plain(model: minilpt.Classifier) -> None:
    record = json.loads(json.dumps(model.explain("good").to_dict()))
    assert record["tokens"][1]["token"] == "good"
    assert record["layers"] == 3
