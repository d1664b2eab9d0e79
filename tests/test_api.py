"""load() and Classifier: what goes in, what comes out, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info, threadpool_limits

import minilpt
from minilpt import Classifier, InputError, backends, batches
from minilpt.threads import usable_cores

import checkpoints

PRUNING = {"rule": "threshold", "thresholds": [0.0, 0.04, 0.06], "score_denominator": "initial"}
TEXTS = ["good", "a bad film !", "", "not good , not bad", "the film " * 30, "good films"]
PAIRS = [("good film", "bad"), ("", "not good"), ("a " * 40, "b " * 40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pruned BERT with a tokenizer; to be read only."""
    made = checkpoints.write_vocabulary(checkpoints.write(tmp_path_factory.mktemp("api") / "model"))
    (made / "ltp.json").write_text(json.dumps(PRUNING))
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> Classifier:
    return minilpt.load(folder)


def with_config(tmp_path: Path, **changes: Any) -> Classifier:
    """A fresh model with a tokenizer and these settings in config.json."""
    return minilpt.load(checkpoints.write_vocabulary(checkpoints.write(tmp_path, checkpoints.config(**changes))))


# What goes in.


class Record(dict[str, str]):
    """A mapping of the user's own."""


def test_every_form_of_an_item_means_the_same(model: Classifier) -> None:
    text, (a, b) = "a bad film", ("good film", "bad")
    single, pair = model.predict([text])[0], model.predict([(a, b)])[0]
    for form in (text, {"text": text}, Record(text=text), MappingProxyType({"text": text}), np.str_(text)):
        assert model.predict(form if isinstance(form, (str, dict)) else [form]) == [single]
        assert model.predict([form]) == [single]
    for record in ({"text": a, "text_pair": b}, Record(text=a, text_pair=b)):
        assert model.predict(record) == [pair]
        assert model.predict([record]) == [pair]
    assert single != pair
    assert pair.n_tokens == 6


WRAPPERS: dict[str, Callable[[list[str]], Any]] = {
    "tuple": tuple,
    "iterator": iter,
    "generator": lambda texts: (text for text in texts),
    "keys": lambda texts: dict.fromkeys(texts).keys(),
    "array": np.array,
    "object array": lambda texts: np.array(texts, dtype=object),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_any_iterable_of_texts_is_taken(model: Classifier, wrap: Callable[[list[str]], Any]) -> None:
    assert model.predict(wrap(TEXTS)) == model.predict(TEXTS)


def test_singles_and_pairs_may_be_mixed(model: Classifier) -> None:
    mixed = [TEXTS[0], PAIRS[0], {"text": TEXTS[1]}, {"text": PAIRS[1][0], "text_pair": PAIRS[1][1]}]
    found = [prediction.n_tokens for prediction in model.predict(mixed)]
    assert found == [model.predict([item])[0].n_tokens for item in mixed]


@pytest.mark.parametrize("nothing", [[], (), iter(()), np.array([], dtype=str), {}.keys()], ids=repr)
def test_nothing_gives_nothing(model: Classifier, nothing: Any) -> None:
    assert model.predict(nothing) == []
    assert model.logits([]).shape == model.predict_proba([]).shape == (0, 3)
    assert model.encode([]) == ([], [])


@pytest.mark.parametrize("texts", [("a", "b"), (np.str_("a"), np.str_("b"))], ids=repr)
def test_a_bare_tuple_of_two_strings_is_ambiguous(model: Classifier, texts: Any) -> None:
    for ask in (model.predict, model.logits, model.predict_proba, model.encode):
        with pytest.raises(InputError, match=r"write \[\(a, b\)\] for one pair, \[a, b\] for two texts"):
            ask(texts)
    assert len(model.predict(("a", "b", "c"))) == 3
    assert len(model.predict((("a", "b"),))) == 1


@pytest.mark.parametrize(
    "item",
    [
        None,
        3,
        float("nan"),
        b"bytes",
        ["a", "b"],
        ["a"],
        ("a",),
        ("a", "b", "c"),
        ("a", None),
        (1, 2),
        {},
        {"text": None},
        {"text": "a", "text_pair": None},
        {"text": "a", "text_pair": 3},
        {"text_pair": "a"},
        {"text": "a", "label": "b"},
        {"sentence": "a"},
        {"text": "a", 3: "b"},
    ],
    ids=repr,
)
def test_an_item_that_is_neither_text_nor_pair_is_named(model: Classifier, item: Any) -> None:
    with pytest.raises(InputError, match=r"^text 2 must be a string, a tuple \(a, b\) of two strings") as caught:
        model.predict(["good", "bad", item])
    assert type(item).__name__ in str(caught.value)


@pytest.mark.parametrize("texts", [None, 3, 2.5, True, object()], ids=lambda value: type(value).__name__)
def test_something_that_holds_no_texts_is_refused(model: Classifier, texts: Any) -> None:
    with pytest.raises(InputError, match=f"found {type(texts).__name__}"):
        model.predict(texts)


def test_a_message_stays_short_whatever_it_quotes(model: Classifier) -> None:
    with pytest.raises(InputError) as caught:
        model.predict([["x" * 10**6]])
    assert len(str(caught.value)) < 300


# What comes out.


def test_the_order_is_that_of_the_texts(model: Classifier) -> None:
    """A text of n words among shuffled others has n + 2 tokens, whatever the batches."""
    words = np.random.default_rng(3).permutation(30)
    for batch_tokens in (1, 7, 64, 4096):
        found = model.predict(["film " * n for n in words], batch_tokens=batch_tokens)
        assert [prediction.n_tokens for prediction in found] == (words + 2).tolist()


@settings(max_examples=15)
@given(st.permutations(range(len(TEXTS))))
def test_one_text_at_a_time_is_bit_for_bit_independent_of_the_others(model: Classifier, order: list[int]) -> None:
    alone = [model.predict(text)[0] for text in TEXTS]
    assert model.predict([TEXTS[index] for index in order], batch_tokens=1) == [alone[index] for index in order]


def test_a_prediction_is_whole(model: Classifier) -> None:
    (found,) = model.predict("the film " * 30)
    assert found.label in found.scores == dict(zip(model.classes_, found.scores.values(), strict=True))
    assert found.score == found.scores[found.label] == max(found.scores.values())
    assert sum(found.scores.values()) == pytest.approx(1, abs=1e-6)
    assert len(found.logits) == 3
    assert (found.n_tokens, found.n_truncated) == (40, 22)
    assert len(found.kept_tokens) == 3
    assert found.kept_tokens[0] == 40  # no rule in layer 0
    assert 1 <= found.kept_tokens[1] < 40
    assert found.kept_tokens[2] == 1  # the shortcut of the last layer
    assert 0 < found.executed_flops < found.dense_flops


def test_a_prediction_is_frozen_slotted_and_json(model: Classifier) -> None:
    (found,) = model.predict("good")
    assert not hasattr(found, "__dict__")
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.label = "other"  # type: ignore[misc]
    record = found.to_dict()
    assert list(record) == [field.name for field in dataclasses.fields(found)]
    again = json.loads(json.dumps(record, allow_nan=False))
    assert minilpt.Prediction(**again | {key: tuple(again[key]) for key in ("logits", "kept_tokens")}) == found


def test_predict_predict_proba_and_logits_agree(model: Classifier) -> None:
    items = TEXTS + PAIRS
    predictions, proba, logits = model.predict(items), model.predict_proba(items), model.logits(items)
    assert proba.dtype == logits.dtype == np.float32
    assert proba.shape == logits.shape == (len(items), 3)
    assert model.classes_.tolist() == ["class-0", "class-1", "class-2"]
    for row, prediction in enumerate(predictions):
        assert prediction.logits == tuple(logits[row].tolist())
        assert list(prediction.scores.values()) == proba[row].tolist()
        assert prediction.label == model.classes_[proba[row].argmax()]


def test_encode_gives_what_forward_takes(model: Classifier) -> None:
    ids, segments = model.encode([PAIRS[0]])
    assert ids == [[2, 5, 8, 3, 6, 3]]
    assert segments == [[0, 0, 0, 0, 1, 1]]
    assert np.array_equal(model.forward(ids, segments).logits, model.logits([PAIRS[0]]))


# The activation.


def softmax(row: list[float]) -> list[float]:
    largest = max(row)
    return [math.exp(x - largest) / math.fsum(math.exp(y - largest) for y in row) for x in row]


def sigmoid(row: list[float]) -> list[float]:
    return [1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x)) for x in row]


ACTIVATIONS = [
    (None, 3, softmax),
    ("single_label_classification", 3, softmax),
    ("multi_label_classification", 3, sigmoid),
    (None, 1, sigmoid),
    ("single_label_classification", 1, sigmoid),
    ("multi_label_classification", 1, sigmoid),
    ("regression", 1, list),
    ("regression", 3, list),
]


@pytest.mark.parametrize("problem_type, labels, activation", ACTIVATIONS)
def test_scores_follow_problem_type(
    tmp_path: Path, problem_type: str | None, labels: int, activation: Callable[..., list[float]]
) -> None:
    found = with_config(tmp_path, problem_type=problem_type, labels=labels)
    for prediction in found.predict(TEXTS):
        assert list(prediction.scores.values()) == pytest.approx(activation(list(prediction.logits)), rel=2e-6, abs=0)
        assert prediction.score == max(prediction.scores.values())


@pytest.mark.parametrize("problem_type, labels, activation", ACTIVATIONS)
def test_extreme_logits_give_their_limits_without_a_warning(
    tmp_path: Path, problem_type: str | None, labels: int, activation: Callable[..., list[float]]
) -> None:
    model = with_config(tmp_path, problem_type=problem_type, labels=labels)
    extremes = [
        (0, 0, 0),
        (-3e38, -3e38, -3e38),
        (3e38, 3e38, 3e38),
        (3e38, -3e38, 0),
        (-60, 88.8, 1e-30),
        (-100, 0, 1),
    ]
    logits = np.array([row[:labels] for row in extremes], np.float32)
    found = model._activated(logits)
    assert found.dtype == np.float32
    for scores, row in zip(found.tolist(), logits.tolist(), strict=True):
        assert scores == pytest.approx(activation(row), rel=1e-6, abs=2**-149)


# Options.


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "64", None, True])
def test_batch_tokens_is_a_positive_integer(model: Classifier, wrong: Any) -> None:
    for ask in (model.predict, model.logits, model.predict_proba):
        with pytest.raises(InputError, match="batch_tokens must be a positive integer"):
            ask(TEXTS, batch_tokens=wrong)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 120))
def test_batches_hold_every_text_once_and_the_budget_at_most(lengths: list[int], budget: int) -> None:
    found = list(batches.by_length(lengths, budget))
    assert sorted(index for batch in found for index in batch) == list(range(len(lengths)))
    sizes = [[lengths[index] for index in batch] for batch in found]
    assert all(len(batch) == 1 or sum(batch) <= budget for batch in sizes)
    assert [length for batch in sizes for length in batch] == sorted(lengths, reverse=True)
    assert all(sum(one) + two[0] > budget for one, two in pairwise(sizes)), "a batch had room left"


def test_the_progress_bar_is_on_stderr_and_only_where_wanted(
    model: Classifier, capsys: pytest.CaptureFixture[str]
) -> None:
    for ask in (model.predict, model.logits, model.predict_proba):
        ask(TEXTS)
        assert capsys.readouterr() == ("", "")
        ask(TEXTS, progress=True)
        out, err = capsys.readouterr()
        assert out == ""
        assert f"{len(TEXTS)}/{len(TEXTS)}" in err


def test_with_pruning_leaves_the_original_as_it_is(model: Classifier) -> None:
    before = model.predict(TEXTS)
    dense = model.with_pruning(None)
    assert dense.pruning is None
    assert model.pruning is not None
    assert all(prediction.kept_tokens[0] == prediction.kept_tokens[1] for prediction in dense.predict(TEXTS))
    assert any(prediction.kept_tokens[0] != prediction.kept_tokens[1] for prediction in before)
    assert model.predict(TEXTS) == before
    assert dense.with_pruning("auto").predict(TEXTS) == before
    assert dense.engine.program is model.engine.program  # type: ignore[attr-defined] # shared weights, not copied


# load.


@pytest.mark.parametrize(
    "options, said",
    [
        ({"device": "tpu"}, "device 'tpu' is not one of auto, cpu, cuda"),
        ({"device": None}, "device None is not one of"),
        ({"precision": "int4"}, "precision 'int4' is not one of fp32, fp16, int8"),
        ({"precision": "float64"}, "precision 'float64'"),
        ({"threads": 0}, "threads must be a positive integer or None, found 0"),
        ({"threads": -1}, "threads must be"),
        ({"threads": 1.0}, "threads must be"),
        ({"threads": True}, "threads must be"),
        ({"threads": "2"}, "threads must be"),
    ],
    ids=str,
)
def test_a_wish_that_cannot_be_met_is_refused_before_anything_is_read(options: dict[str, Any], said: str) -> None:
    with pytest.raises(minilpt.BackendError, match=said):
        minilpt.load("no-such-folder", **options)


def test_threads_are_one_for_each_usable_core_unless_said_otherwise(folder: Path) -> None:
    assert minilpt.load(folder).backend.threads == usable_cores()
    assert minilpt.load(folder, threads=3).backend.threads == 3


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: None)


@pytest.mark.usefixtures("without_numba")
def test_without_numba_numpy_takes_over_and_says_so(folder: Path, model: Classifier) -> None:
    with pytest.warns(minilpt.MinilptWarning, match="numba is not installed .* running on NumPy") as caught:
        slow = minilpt.load(folder)
    assert [warning.filename for warning in caught] == [__file__]
    assert slow.backend.name == "numpy"
    for found, wanted in zip(slow.predict(TEXTS), model.predict(TEXTS), strict=True):
        assert found.kept_tokens == wanted.kept_tokens
        assert found.logits == pytest.approx(wanted.logits, rel=1e-4, abs=1e-4)
    with pytest.raises(minilpt.BackendError, match="precision 'int8' needs the compiled kernels: numba is not"):
        minilpt.load(folder, precision="int8")


@pytest.mark.usefixtures("without_numba")
@pytest.mark.filterwarnings("ignore:numba is not installed")
def test_on_numpy_threads_are_blas_s_and_left_alone_unless_wanted(folder: Path) -> None:
    def blas() -> set[int]:
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    with threadpool_limits(limits=1, user_api="blas"):
        assert minilpt.load(folder).backend.threads == 1
        assert blas() == {1}
        assert minilpt.load(folder, threads=2).backend.threads in (1, 2)  # BLAS may know of fewer cores
        assert minilpt.load(folder, threads=1, device="cpu", precision="fp32").backend.threads == 1
        assert blas() == {1}


def test_load_takes_a_folder_as_string_or_path(folder: Path) -> None:
    assert minilpt.load(str(folder)).predict(TEXTS) == minilpt.load(folder).predict(TEXTS)


def test_every_error_is_of_one_family() -> None:
    errors = [getattr(minilpt, name) for name in minilpt.__all__ if name.endswith("Error")]
    assert len(errors) >= 10
    assert all(issubclass(error, minilpt.MinilptError) for error in errors)
    assert issubclass(InputError, ValueError)


# Threads and processes.


def test_eight_threads_share_one_model(model: Classifier) -> None:
    jobs = [TEXTS[n % 6 :] + PAIRS[: n % 4] for n in range(24)]
    wanted = [model.predict(job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(model.predict, jobs * 3)) == wanted * 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_predicts_what_its_parent_does(folder: Path) -> None:
    """In a process of its own: a fork under pytest would copy pytest too."""
    program = (
        "import os, sys, minilpt\n"
        "model = minilpt.load(sys.argv[1]); texts = ['good film', 'not a bad film'] * 20\n"
        "before = model.predict(texts)\n"
        "if not (child := os.fork()):\n"
        "    same = model.predict(texts) == before == minilpt.load(sys.argv[1]).predict(texts)\n"
        "    os._exit(0 if same else 3)\n"
        "status = os.waitpid(child, 0)[1]\n"
        "print(os.waitstatus_to_exitcode(status), model.predict(texts) == before)"
    )
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["0", "True"], done.stderr
