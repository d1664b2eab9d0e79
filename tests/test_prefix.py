"""Runs that take up the first layers of an earlier one: the same bits as whole runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minilpt
from minilpt import calibration
from minilpt.batches import token_batch
from minilpt.engine import Engine, Forward, Prefix
from minilpt.pruning import parse
from minilpt.ragged import TokenBatch

import checkpoints

pytest.importorskip("numba", reason="engines without compiled kernels keep no rows")

BASE = [0.3, 0.6, 0.8, 0.9]
LENGTHS = [1, 90, 5, 17, 64, 2, 40, 33]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    content = checkpoints.config(num_hidden_layers=4, max_position_embeddings=128)
    return checkpoints.write_vocabulary(checkpoints.write(tmp_path_factory.mktemp("prefix") / "model", content))


@pytest.fixture
def batch(folder: Path) -> TokenBatch:
    draw = np.random.default_rng(2)
    rows = [draw.integers(5, 60, n) for n in LENGTHS]
    return token_batch(minilpt.load(folder).config, rows, [np.zeros(len(row), np.int32) for row in rows])


def rule(thresholds: list[float], merge: bool) -> Any:
    record = {"rule": "threshold", "thresholds": thresholds, "score_denominator": "initial", "denominator_limit": 1}
    return parse(record | {"merge_removed": merge}, len(thresholds), "a test").rule


def contents(found: Forward) -> Iterator[tuple[str, int, Any]]:
    """Every array of a record, with its name and layer; rows that enter layers apart."""
    for field in fields(found):
        value = getattr(found, field.name)
        parts = value if isinstance(value, tuple) else [value]
        if field.name != "entering":
            yield from ((field.name, number, part) for number, part in enumerate(parts) if part is not None)


def assert_same(found: Forward, whole: Forward) -> None:
    for (name, number, mine), (_, _, theirs) in zip(contents(found), contents(whole), strict=True):
        assert np.array_equal(mine, theirs), (name, number)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_run_that_takes_up_layers_gives_the_bits_of_a_whole_one(
    folder: Path, batch: TokenBatch, precision: str, merge: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minilpt.compiled_engine.ITEM_TOKENS", 30)
    monkeypatch.setattr("minilpt.compiled_engine.TEAM_TOKENS", 8)
    engine: Engine = minilpt.load(folder, precision=precision, threads=threads).engine
    first = engine.with_rule(rule(BASE, merge)).run(batch, trace=True, entering=(1, 2, 3))
    assert first.entering is not None
    assert first.attention_lengths is not None
    for layers in (1, 2, 3):
        assert first.entering[layers].shape == (first.attention_lengths[layers].sum(), 32)
        kept = {layer: rows.copy() for layer, rows in first.entering.items()}
        other = engine.with_rule(rule([*BASE[:layers], 1.1, *BASE[layers + 1 :]], merge))
        for trace in (False, True):
            whole = other.run(batch, trace=trace, entering=(1, 3))
            found = other.run(batch, trace=trace, entering=(1, 3), prefix=Prefix(first, layers))
            assert_same(found, whole)
            assert found.entering is not None
            assert whole.entering is not None
            for layer, rows in whole.entering.items():
                assert np.array_equal(found.entering[layer], rows), (layers, layer)
        assert all(np.array_equal(kept[layer], rows) for layer, rows in first.entering.items())


def test_what_was_taken_up_is_not_run(folder: Path, batch: TokenBatch) -> None:
    """Rows of zeros in their place show in the logits."""
    engine = minilpt.load(folder).engine
    first = engine.run(batch, trace=True, entering=(2,))
    assert first.entering is not None
    zeros = {2: np.zeros_like(first.entering[2])}
    changed = engine.run(batch, prefix=Prefix(Forward(**{**vars(first), "entering": zeros}), 2))
    assert not np.array_equal(changed.logits, first.logits)


@pytest.mark.parametrize("layers, kept", [(0.9, []), (2.5, [1, 3]), (9, [1, 2, 3])])
def test_a_search_finds_the_same_with_room_for_the_rows_of_any_number_of_layers(
    folder: Path, layers: float, kept: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [" ".join(["good", "bad", "a", "film"][: 1 + at % 4] * (1 + at // 4)) for at in range(32)]
    model = minilpt.load(folder, threads=1)
    monkeypatch.setattr(calibration, "ROWS_BYTES", 0)
    with pytest.warns(minilpt.errors.MinilptWarning, match="32 texts are few"):
        want = minilpt.calibrate(model, texts, flops_ratio=0.6)
    searched, _ = next(calibration._halves(list(texts), None, 0, len(texts)))
    rows_bytes = int(layers * 4 * model.config.width * sum(map(len, model.encode(searched)[0])))
    monkeypatch.setattr(calibration, "ROWS_BYTES", rows_bytes)
    half = calibration._Half(model, True, searched, None)
    half.live(half.start().thresholds)
    assert half._seen is not None
    entering = half._seen[1].entering or {}
    assert sorted(entering) == kept
    assert sum(rows.nbytes for rows in entering.values()) <= rows_bytes
    with pytest.warns(minilpt.errors.MinilptWarning, match="32 texts are few"):
        assert minilpt.calibrate(model, texts, flops_ratio=0.6).frontier == want.frontier
