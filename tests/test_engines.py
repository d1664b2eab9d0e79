"""The compiled engine as a whole: the same bits whatever the batch, the threads, the order and the callers."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minilpt
from minilpt import Classifier
from minilpt.batches import token_batch
from minilpt.config import read_config
from minilpt.engine import Forward
from minilpt.weights import checkpoint, names, save

import checkpoints

pytest.importorskip("numba", reason="compiled kernels need numba")

RULES: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "threshold": {"rule": "threshold", "thresholds": [0, 0.6, 0.8, 0.9], "score_denominator": 1},
    "relative": {"rule": "relative", "token_threshold": 0.3},
    "topk": {"rule": "topk", "token_keep_rate": 0.4},
    "merged": {"rule": "threshold", "thresholds": [0.7, 0.6, 0.8, 0.9], "score_denominator": 1, "merge_removed": True},
    "merged to two": {"rule": "threshold", "thresholds": [1e6] * 4, "score_denominator": 1, "merge_removed": True},
    "first only": {"rule": "threshold", "thresholds": [1e6] * 4, "score_denominator": 1},
}
SHAPE = {"num_hidden_layers": 4, "max_position_embeddings": 512}
Load = Callable[..., Classifier]
LENGTHS = [1, 300, 5, 17, 64, 2, 129, 97, 40, 512, 3, 33]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """A small BERT, loaded with any settings."""
    folder = checkpoints.write(tmp_path_factory.mktemp("bert"), checkpoints.config(**SHAPE))
    return partial(minilpt.load, folder)


def sequences(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(5, 60, n).tolist() for n in lengths]


def columns(result: Forward, places: Sequence[int]) -> list[Any]:
    """What a result says of some sequences."""
    by_token = ("masses", "kept", "entering")
    values = [getattr(result, field.name) for field in fields(result) if field.name not in (*by_token, "logits")]
    return [result.logits[places].tolist(), *(v if v is None else v[..., places].tolist() for v in values)]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("trace", [False, True])
def test_a_sequence_has_the_same_bits_alone_in_any_batch_in_any_order_and_with_any_threads(
    load: Load, precision: str, rule: str, trace: bool
) -> None:
    rows = sequences(LENGTHS)
    order = np.random.default_rng(1).permutation(len(rows)).tolist()
    one, two, three = (load(precision=precision, pruning=RULES[rule], threads=count) for count in (1, 2, 3))
    together = one.forward(rows, trace=trace)
    for model in (two, three):
        found = model.forward(rows, trace=trace)
        assert columns(found, range(len(rows))) == columns(together, range(len(rows)))
        if trace:
            for name in ("masses", "kept"):
                for mine, theirs in zip(getattr(found, name), getattr(together, name), strict=True):
                    assert np.array_equal(mine, theirs)
    shuffled = two.forward([rows[place] for place in order], trace=trace)
    assert columns(shuffled, range(len(rows))) == columns(together, order)
    for place, row in enumerate(rows):
        for model in (one, three):
            assert columns(model.forward([row], trace=trace), [0]) == columns(together, [place])


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("first_only", [False, True])
def test_last_rows_have_the_same_bits_too(load: Load, precision: str, rule: str, first_only: bool) -> None:
    """As many as a traced run keeps, or one a sequence; the one that the head reads is the same in both."""
    rows = sequences(LENGTHS)
    one, two, three = (load(precision=precision, pruning=RULES[rule], threads=count) for count in (1, 2, 3))
    order = np.random.default_rng(1).permutation(len(rows)).tolist()

    def run(model: Classifier, places: Sequence[int], first_only: bool = first_only) -> list[list[list[float]]]:
        ids = [rows[place] for place in places]
        batch = token_batch(model.config, ids, [[0] * len(row) for row in ids])
        found, bounds = model.engine.last_rows(batch, first_only=first_only)
        assert bounds[-1] == len(found)
        return [found[begin:end].tolist() for begin, end in pairwise(bounds)]

    together = run(one, range(len(rows)))
    lengths = one.forward(rows, trace=True).ffn_lengths
    assert lengths is not None
    assert [len(found) for found in together] == ([1] * len(rows) if first_only else lengths[-1].tolist())
    assert run(two, range(len(rows))) == run(three, range(len(rows))) == together
    assert run(two, order) == [together[place] for place in order]
    assert [run(three, [place])[0] for place in range(len(rows))] == together
    first = run(one, range(len(rows)), first_only=not first_only)
    assert [found[:1] for found in first] == [found[:1] for found in together]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_all_tokens_but_the_first_can_go(load: Load, precision: str) -> None:
    found = load(precision=precision, pruning=RULES["first only"]).forward(sequences([1, 30, 512]), trace=True)
    assert found.ffn_lengths is not None
    assert (found.ffn_lengths == 1).all()
    assert np.isfinite(found.logits).all()


def test_many_callers_share_one_model(load: Load) -> None:
    model = load(threads=2, pruning=RULES["threshold"])
    batches = [sequences(LENGTHS[start::5], seed) for seed, start in enumerate([0, 1, 2, 3, 4] * 6)]
    expected = [model.forward(rows).logits.tolist() for rows in batches]
    barrier = threading.Barrier(6)

    def call(caller: int) -> list[Any]:
        barrier.wait()
        return [model.forward(rows).logits.tolist() for rows in batches[caller::6]]

    with ThreadPoolExecutor(6) as pool:
        for caller, found in enumerate(pool.map(call, range(6))):
            assert found == expected[caller::6]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_answers_as_its_parent(load: Load) -> None:
    model, rows = load(threads=2), sequences(LENGTHS)
    expected = model.forward(rows).logits
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(model.forward(rows).logits, expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_rule_can_be_changed_and_changed_back(load: Load) -> None:
    rows = sequences(LENGTHS)
    model = load(pruning=None)
    dense = model.forward(rows).logits
    pruned = model.with_pruning(RULES["threshold"])
    assert np.array_equal(pruned.forward(rows).logits, load(pruning=RULES["threshold"]).forward(rows).logits)
    assert not np.array_equal(pruned.forward(rows).logits, dense)
    assert np.array_equal(model.forward(rows).logits, dense)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_int8_rows_are_looked_up_as_the_floats_that_they_stand_for(tmp_path: Path, precision: str) -> None:
    plain = checkpoints.write(tmp_path / "plain", checkpoints.config(**SHAPE))
    rows, widened = tmp_path / "rows", tmp_path / "widened"
    config = read_config(plain)
    stored = names.checkpoint_names(config)
    for folder, source, int8_rows in ((rows, plain, True), (widened, rows, False)):
        folder.mkdir()
        shutil.copy(plain / "config.json", folder)
        weights = checkpoint.load_weights(source, config)
        save.save_weights(folder, {stored[ours]: tensor for ours, tensor in weights.items()}, int8_rows=int8_rows)
    ids = sequences(LENGTHS)
    found, expected = (minilpt.load(folder, precision=precision).forward(ids).logits for folder in (rows, widened))
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, minilpt.load(plain, precision=precision).forward(ids).logits)
