"""Long texts: which tokens make which sequences, and one answer from several windows, exactly."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

import minilpt
from minilpt import Classifier, InputError
from minilpt.text import Encoded, TextEncoder, TextOrPair
from minilpt.truncation import AGGREGATES, MODES, Truncation

import checkpoints

PRUNING = {"rule": "threshold", "thresholds": [0.0, 0.04, 0.06], "score_denominator": "initial"}
WORDS = [word for word in checkpoints.WORDS if word.isalpha()]
LIMIT = 40
SPECIAL = {2, 3}  # [CLS] and [SEP]
lengths = st.tuples(st.integers(0, 120), st.integers(0, 120))
rooms = st.integers(1, 60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pruned BERT of LIMIT tokens with a tokenizer; to be read only."""
    made = checkpoints.write_vocabulary(checkpoints.write(tmp_path_factory.mktemp("truncation") / "model"))
    (made / "ltp.json").write_text(json.dumps(PRUNING))
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> Classifier:
    return minilpt.load(folder)


@pytest.fixture(scope="module")
def encoder(model: Classifier) -> TextEncoder:
    return model._text_encoder()


def text_of(n: int, seed: int = 0) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, n))


def item_of(first: int, second: int | None) -> TextOrPair:
    return text_of(first) if second is None else (text_of(first), text_of(second, 1))


def whole(encoder: TextEncoder, item: TextOrPair) -> list[int]:
    return encoder._encode_one(item).ids


def inner(sequence: Encoded) -> list[int]:
    """The ids without the special ones, which no word of WORDS is."""
    return [token for token in sequence.ids.tolist() if token not in SPECIAL]


# The places that stay.


@given(lengths, rooms, st.sampled_from(["head", "tail", "head_tail"]))
def test_one_sequence_has_as_many_tokens_as_there_is_room_for(lengths: tuple[int, int], room: int, mode: str) -> None:
    assume(sum(lengths) > room)
    ((first, second),) = Truncation(mode).cuts(lengths, room)
    assert len(first) + len(second) == room
    for places, n in zip((first, second), lengths, strict=True):
        assert (np.diff(places) > 0).all()
        head = np.arange(len(places) * 128 // 510 if mode == "head_tail" else len(places) * (mode == "head"))
        tail = np.arange(n - (len(places) - len(head)), n)
        assert places.tolist() == [*head, *tail]
    if min(lengths) * 2 <= room:  # the longer one is cut first
        assert min(lengths) in (len(first), len(second))


def test_head_tail_of_510_is_the_paper_s_128_and_382() -> None:
    ((places, _),) = Truncation("head_tail").cuts((2000, 0), 510)
    assert places.tolist() == [*range(128), *range(2000 - 382, 2000)]


@given(lengths, rooms, st.none() | st.integers(0, 60))
@example((120, 10), 20, 9)
@example((50, 50), 60, 3)
@example((100, 0), 25, None)
def test_windows_lose_no_token_and_share_exactly_the_stride(
    lengths: tuple[int, int], room: int, stride: int | None
) -> None:
    assume(sum(lengths) > room)
    shared, size = stride or 0, room - min(lengths)
    truncation = Truncation("windows", stride)
    if size <= shared:
        with pytest.raises(InputError, match=rf"leaves windows of {max(size, 0)} to the longer: .* stride of {shared}"):
            truncation.cuts(lengths, room)
        return
    sides = [
        (second, first) if lengths[0] > lengths[1] else (first, second)
        for first, second in truncation.cuts(lengths, room)
    ]
    assert all(whole.tolist() == [*range(min(lengths))] for whole, _ in sides)
    windows = [window.tolist() for _, window in sides]
    assert windows[0][0] == 0
    assert windows[-1][-1] == max(lengths) - 1
    assert all(window == [*range(window[0], window[-1] + 1)] for window in windows)
    assert all(len(window) == size for window in windows[:-1])
    assert shared < len(windows[-1]) <= size
    for one, two in pairwise(windows):
        assert len(set(one) & set(two)) == shared == one[-1] + 1 - two[0]


# Texts.

TRUNCATIONS = [Truncation(mode) for mode in (None, *MODES)] + [Truncation("windows", 5, "max")]


@given(st.integers(0, 60), st.none() | st.integers(0, 17), st.sampled_from(TRUNCATIONS))
def test_no_sequence_is_longer_than_the_limit_and_short_texts_are_the_same_under_every_mode(
    encoder: TextEncoder, first: int, second: int | None, truncation: Truncation
) -> None:
    item = item_of(first, second)
    ids = whole(encoder, item)
    if truncation.mode == "error" and len(ids) > LIMIT:
        with pytest.raises(InputError, match=rf"^text 0 \(.*\) has {first + (second or 0)} tokens, 3[78] is the most"):
            encoder.sequences([item], truncation)
        return
    (found,) = encoder.sequences([item], truncation)
    assert all(len(sequence.ids) <= LIMIT for sequence in found)
    specials = [token for token in ids if token in SPECIAL]
    for sequence in found:
        assert [token for token in sequence.ids.tolist() if token in SPECIAL] == specials
    if len(ids) <= LIMIT:
        assert [sequence.ids.tolist() for sequence in found] == [ids]
    lost = 0 if truncation.mode == "windows" else max(0, len(ids) - LIMIT)
    assert [sequence.n_truncated for sequence in found] == [lost] * len(found)


@given(st.integers(0, 150), st.none() | st.integers(0, 150), st.integers(0, 20))
def test_windows_are_the_overflowing_tokens_of_the_tokenizers_package(
    encoder: TextEncoder, first: int, second: int | None, stride: int
) -> None:
    """As transformers has them by return_overflowing_tokens with "only_second", or "only_first" if that is longer."""
    item, side = item_of(first, second), "only_first" if first > (second or 0) else "only_second"
    room = LIMIT - 2 - (second is not None) - min(first, second or 0)
    assume(room > stride)
    theirs = Tokenizer.from_str(encoder._tokenizer.to_str())
    theirs.enable_truncation(LIMIT, stride=stride, strategy=side)
    wanted = theirs.encode(item) if isinstance(item, str) else theirs.encode(*item)
    (found,) = encoder.sequences([item], Truncation("windows", stride))
    pieces = [wanted, *wanted.overflowing]
    assert [sequence.ids.tolist() for sequence in found] == [piece.ids for piece in pieces]
    assert [sequence.segments.tolist() for sequence in found] == [piece.type_ids for piece in pieces]


def test_tail_and_none_are_what_truncation_side_left_gives(model: Classifier, encoder: TextEncoder) -> None:
    left = TextEncoder(encoder._tokenizer, model.config, LIMIT, "left")
    for item in (text_of(90), (text_of(50), text_of(9))):
        ((tail,),) = encoder.sequences([item], Truncation("tail"))
        ((own,),) = left.sequences([item], Truncation())
        ((head,),) = left.sequences([item], Truncation("head"))
        assert tail.ids.tolist() == own.ids.tolist() == left.encode([item])[0].ids.tolist()
        assert head.ids.tolist() == encoder.encode([item])[0].ids.tolist() != own.ids.tolist()


def test_an_error_names_the_text(model: Classifier) -> None:
    with pytest.raises(
        InputError, match=r"^text 2 \('.{70,}\) has 60 tokens, 38 is the most; shorten it, or give anoth"
    ):
        model.predict(["good", "bad", text_of(60)], truncation="error")
    with pytest.raises(
        InputError, match=r"^text 1 .* is a pair whose shorter text has 40 of 37 tokens, which leaves wi"
    ):
        model.predict(["good", (text_of(40), text_of(41))], truncation="windows")


# Predictions.

LONG = [text_of(n, n) for n in (1, 38, 39, 120, 77, 38)] + [
    (text_of(10), text_of(99, 1)),
    (text_of(99), text_of(10, 1)),
]


@pytest.mark.parametrize("aggregate", [None, *AGGREGATES])
@pytest.mark.parametrize("stride", [None, 7])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_windowed_text_is_the_aggregate_and_the_sum_of_its_windows(
    folder: Path, encoder: TextEncoder, precision: str, stride: int | None, aggregate: str | None
) -> None:
    pytest.importorskip("numba", reason="int8 and bit-equality need the compiled kernels")
    model = minilpt.load(folder, precision=precision)
    options: dict[str, Any] = {"truncation": "windows", "stride": stride, "aggregate": aggregate}
    found = model.predict(LONG, **options)
    assert [prediction.n_windows > 1 for prediction in found] == [False, False, True, True, True, False, True, True]
    combine = {"mean": np.mean, "max": np.max, "first": lambda logits, axis: logits[0]}[aggregate or "mean"]
    for item, prediction in zip(LONG, found, strict=True):
        (sequences,) = encoder.sequences([item], Truncation("windows", stride, aggregate))
        runs = [model.forward([window.ids.tolist()], [window.segments.tolist()]) for window in sequences]
        logits = combine(np.concatenate([run.logits for run in runs]).astype(np.float64), axis=0).astype(np.float32)
        assert prediction.logits == tuple(logits.tolist())
        assert prediction.kept_tokens == tuple(sum(run.kept_tokens[:, 0] for run in runs).tolist())
        assert prediction.executed_flops == sum(int(run.executed_flops[0]) for run in runs)
        assert prediction.dense_flops == sum(int(run.dense_flops[0]) for run in runs)
        assert prediction.n_tokens == sum(len(window.ids) for window in sequences)
        assert (prediction.n_truncated, prediction.n_windows) == (0, len(runs))
        assert prediction.kept_tokens[-1] == len(runs)


@pytest.mark.parametrize("mode", ["head", "tail", "head_tail", "windows"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_text_has_the_same_answer_alone_and_in_any_batch_in_every_mode(
    folder: Path, precision: str, mode: str
) -> None:
    pytest.importorskip("numba", reason="int8 and bit-equality need the compiled kernels")
    model = minilpt.load(folder, precision=precision)
    together = model.predict(LONG, truncation=mode)
    for batch_tokens in (1, 50, 10_000):
        assert model.predict(LONG[::-1], truncation=mode, batch_tokens=batch_tokens) == together[::-1]
    assert [model.predict([item], truncation=mode)[0] for item in LONG] == together
    assert model.logits(LONG, truncation=mode).tolist() == [list(each.logits) for each in together]
    assert model.predict_proba(LONG, truncation=mode).tolist() == [list(each.scores.values()) for each in together]
    assert model.predict_proba(LONG, truncation=mode).dtype == model.logits(LONG, truncation=mode).dtype == np.float32


def test_short_texts_have_the_same_answers_in_every_mode(model: Classifier) -> None:
    short = [text_of(n, n) for n in (0, 1, 17, 38)] + [("good", "bad")]
    plain = model.predict(short)
    assert all(each.n_windows == 1 and each.n_truncated == 0 for each in plain)
    for mode in MODES:
        assert model.predict(short, truncation=mode) == plain
    assert model.predict(short, truncation="windows", stride=3, aggregate="max") == plain


def test_the_default_is_head(model: Classifier) -> None:
    assert model.predict(LONG) == model.predict(LONG, truncation="head") != model.predict(LONG, truncation="tail")
    assert [each.n_truncated for each in model.predict(LONG)] == [0, 0, 1, 82, 39, 0, 72, 72]


def test_nothing_gives_nothing_in_every_mode(model: Classifier) -> None:
    for mode in MODES:
        assert model.predict([], truncation=mode) == []
        assert model.logits([], truncation=mode).shape == (0, 3)


def test_embeddings_of_windows_are_aggregated_and_then_normalised(model: Classifier, encoder: TextEncoder) -> None:
    item = text_of(100)
    (sequences,) = encoder.sequences([item], Truncation("windows", 5))
    texts = [encoder._tokenizer.decode(sequence.ids.tolist()) for sequence in sequences]
    each = model.embed(texts, normalize=False).astype(np.float64)
    assert len(each) == 3
    for aggregate, wanted in {"mean": each.mean(axis=0), "max": each.max(axis=0), "first": each[0]}.items():
        (found,) = model.embed([item], truncation="windows", stride=5, aggregate=aggregate)
        assert found == pytest.approx(wanted / np.linalg.norm(wanted), abs=1e-6)


# What is refused.


@pytest.mark.parametrize(
    "options, said",
    [
        ({"truncation": "middle"}, "truncation must be one of error, head, tail, head_tail, windows, found 'middle'"),
        ({"truncation": True}, "truncation must be one of"),
        ({"truncation": []}, "truncation must be one of"),
        ({"truncation": "windows", "aggregate": "median"}, "aggregate must be one of mean, max, first, found 'median'"),
        ({"truncation": "windows", "aggregate": []}, "aggregate must be one of"),
        *(
            ({"truncation": "windows", "stride": bad}, "stride must be a number of tokens")
            for bad in (-1, 1.0, True, "")
        ),
        ({"truncation": "windows", "stride": 38}, "stride 38 is not less than the 38 tokens of a window"),
        ({"stride": 0}, 'stride and aggregate are for truncation="windows"'),
        ({"truncation": "tail", "aggregate": "mean"}, 'stride and aggregate are for truncation="windows"'),
    ],
    ids=str,
)
def test_a_wish_that_makes_no_sense_is_refused_whatever_the_texts(
    model: Classifier, options: dict[str, Any], said: str
) -> None:
    for ask in (model.predict, model.predict_proba, model.logits, model.embed):
        with pytest.raises(InputError, match=said):
            ask(["good"], **options)


def test_the_example_of_the_documentation_prints_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "long-texts.md").read_text(encoding="utf-8")
    program, output = (re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("python", "text"))
    assert program
    assert output
    exec(compile(program[1], "long-texts.md", "exec"), {})
    assert capsys.readouterr().out == output[1]
