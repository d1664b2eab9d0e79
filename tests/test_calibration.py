"""`minilpt.calibrate`: what a point claims is what the model then does, and nothing but texts and seed decides."""

from __future__ import annotations

import json
import random
import shutil
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import minilpt
from minilpt import calibration, pruning
from minilpt.errors import CalibrationError, InputError, MinilptWarning, PruningError

import checkpoints

WORDS = ["good", "bad", "a", "film", "not", "the", "!", ","]


def sentences(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(3, 24))) + f" {'a ' * (row % 7)}" for row in range(count)]


TEXTS = sentences(120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    content = checkpoints.config(num_hidden_layers=4)
    made = checkpoints.write(tmp_path_factory.mktemp("calibration") / "model", content)
    return checkpoints.write_vocabulary(made)


@pytest.fixture(scope="module")
def model(folder: Path) -> minilpt.Classifier:
    return minilpt.load(folder)


@pytest.fixture(scope="module")
def found(model: minilpt.Classifier) -> minilpt.Calibration:
    return minilpt.calibrate(model, TEXTS, flops_ratio=0.5)


@pytest.fixture(scope="module")
def regression(tmp_path_factory: pytest.TempPathFactory) -> minilpt.Classifier:
    content = checkpoints.config(labels=1, problem_type="regression")
    made = checkpoints.write(tmp_path_factory.mktemp("regression") / "model", content)
    return minilpt.load(checkpoints.write_vocabulary(made))


def held_out(seed: int = 0) -> list[Any]:
    return list(calibration._halves(list(TEXTS), None, seed, len(TEXTS)))[1][0]


def test_the_frontier_begins_with_the_dense_model_and_falls(found: minilpt.Calibration) -> None:
    dense = found.frontier[0]
    assert dense == calibration.Point((0.0,) * 4, 1.0, 1.0, 0.0, 1.0, dense.agreement_lower)
    ratios = [point.flops_ratio for point in found.frontier]
    assert all(after < before for before, after in pairwise(ratios))
    assert len(ratios) > 20
    assert ratios[-1] < 0.35


def test_the_search_beats_equal_thresholds_at_as_few_flops(model: minilpt.Classifier) -> None:
    half = calibration._Half(model, True, TEXTS, None)
    draw = np.random.default_rng(0)
    steps = [*calibration.threshold_search.search(half, half.start(), 0.4, draw, lambda trial: None)]
    last = half.start().thresholds[-1]
    for value in (0.6, 0.7, 0.8):
        equal = half.measure((value,) * 3 + (last,))
        assert equal.flops_ratio < 0.95
        found = next((step for step in steps if step.flops_ratio <= equal.flops_ratio), steps[-1])
        assert found.divergence < equal.divergence


def test_a_point_that_a_cheaper_one_betters_or_equals_is_dropped() -> None:
    def measured(ratio: float, divergence: float) -> calibration.Measured:
        return calibration.Measured((ratio,), ratio, divergence)

    found = [measured(0.9, 0.0), measured(0.8, 0.3), measured(0.7, 0.2), measured(0.6, 0.2), measured(0.5, 0.4)]
    assert [point.flops_ratio for point in calibration._undominated(found)] == [0.9, 0.6, 0.5]


def test_every_point_is_what_the_model_does_on_the_held_out_texts(
    model: minilpt.Classifier, found: minilpt.Calibration
) -> None:
    texts = held_out()
    ids, segments = model.encode(texts)
    dense = model.predict(texts)
    for point in found.frontier[::5]:
        pruned = model.with_pruning(calibration.RULE | {"thresholds": point.thresholds, "merge_removed": True})
        traced, answers = pruned.forward(ids, segments, trace=True), pruned.predict(texts)
        assert traced.counted_flops is not None
        assert point.flops_ratio == traced.counted_flops.sum() / traced.dense_flops.sum()
        executed = sum(p.executed_flops for p in answers) / sum(p.executed_flops for p in dense)
        assert point.executed_ratio == executed
        assert point.agreement == np.mean([a.label == b.label for a, b in zip(answers, dense, strict=True)])
        scores = [np.array([list(p.scores.values()) for p in each], np.float64) for each in (dense, answers)]
        np.testing.assert_allclose(point.kl, stats.entropy(*scores, axis=1).mean(), rtol=1e-3, atol=1e-7)


def test_the_chosen_point_spends_the_most_within_the_target(found: minilpt.Calibration) -> None:
    assert found.chosen.flops_ratio <= 0.5
    dearer = found.frontier[found.frontier.index(found.chosen) - 1]
    assert dearer.flops_ratio > 0.5


def test_agreement_holds_for_every_dearer_point_too(model: minilpt.Classifier) -> None:
    chosen = minilpt.calibrate(model, TEXTS, agreement=0.9)
    place = chosen.frontier.index(chosen.chosen)
    assert all((point.agreement or 0) >= 0.9 for point in chosen.frontier[: place + 1])
    after = chosen.frontier[place + 1 : place + 2]
    assert all((point.agreement or 0) < 0.9 for point in after)


def test_neither_order_nor_repetition_of_the_texts_matters(
    model: minilpt.Classifier, found: minilpt.Calibration
) -> None:
    mixed = TEXTS + TEXTS[:30]
    random.Random(5).shuffle(mixed)
    again = minilpt.calibrate(model, mixed, flops_ratio=0.5)
    assert again.frontier == found.frontier
    assert again.chosen == found.chosen


def test_a_seed_decides_the_halves(model: minilpt.Classifier, found: minilpt.Calibration) -> None:
    assert set(held_out(1)) != set(held_out())
    assert minilpt.calibrate(model, TEXTS, flops_ratio=0.5, seed=1).frontier != found.frontier


def test_labels_decide_the_choice_and_never_the_search(model: minilpt.Classifier, found: minilpt.Calibration) -> None:
    truth = [prediction.label for prediction in model.with_pruning(None).predict(TEXTS)]
    kind = minilpt.calibrate(model, TEXTS, max_drop=5, labels=truth)
    cruel = minilpt.calibrate(model, TEXTS, max_drop=0, labels=[0] * len(TEXTS))
    thresholds = [[point.thresholds for point in each.frontier] for each in (kind, cruel, found)]
    assert thresholds[0] == thresholds[1] == thresholds[2]
    assert kind.frontier[0].metric == 100
    assert kind.chosen.metric is not None
    assert kind.chosen.metric >= 95
    assert kind.chosen.metric == pytest.approx(100 * (kind.chosen.agreement or 0))
    assert found.chosen.metric is None


def test_labels_are_class_names_or_numbers_of_the_model(model: minilpt.Classifier) -> None:
    numbers = replace(model.config, labels=("1", "2", "3"))
    assert calibration._gold(["0", "2", "1"], numbers, 3).tolist() == [0, 2, 1]
    assert calibration._gold(["1", "3", "2"], numbers, 3).tolist() == [0, 2, 1]
    named = calibration._gold(["class-2", "CLASS-0", 1, "1"], model.config, 4)
    assert named.tolist() == [2, 0, 1, 1]
    with pytest.raises(InputError, match=r"label 1 must be one of class-0, .*, found 'good'"):
        calibration._gold([0, "good"], model.config, 2)
    with pytest.raises(InputError, match="2 texts but 1 labels"):
        calibration._gold([0], model.config, 2)


def test_one_text_has_one_label(model: minilpt.Classifier) -> None:
    with pytest.raises(InputError, match="texts 3 and 120 are the same and have different labels"):
        minilpt.calibrate(model, [*TEXTS, TEXTS[3]], max_drop=1, labels=[0] * 120 + [1])


def test_regression_is_measured_by_correlation(regression: minilpt.Classifier) -> None:
    values = regression.with_pruning(None).logits(TEXTS)[:, 0].tolist()
    chosen = minilpt.calibrate(regression, TEXTS, max_drop=1, labels=values)
    assert chosen.frontier[0].metric == pytest.approx(100)
    assert chosen.chosen.metric is not None
    assert chosen.chosen.metric >= 99
    assert chosen.chosen.agreement is None
    with pytest.raises(InputError, match="label 1 must be a finite number"):
        minilpt.calibrate(regression, TEXTS, max_drop=1, labels=[1.0, float("nan"), *values[2:]])
    with pytest.raises(CalibrationError, match="agreement is not defined for regression"):
        minilpt.calibrate(regression, TEXTS, agreement=0.9)


def test_what_is_saved_is_what_load_takes(
    folder: Path, model: minilpt.Classifier, found: minilpt.Calibration, tmp_path: Path
) -> None:
    path = found.save(tmp_path)
    assert path == tmp_path / "ltp.json"
    read, given = minilpt.load(folder, pruning=path), minilpt.load(folder, pruning=found.pruning)
    want = model.with_pruning(found.pruning)
    assert read.pruning is not None
    assert read.pruning.to_json() == json.loads(path.read_text())
    for each in (read, given):
        np.testing.assert_array_equal(each.logits(TEXTS), want.logits(TEXTS))
        np.testing.assert_array_equal(each.logits(TEXTS, flops_ratio=0.6), want.logits(TEXTS, flops_ratio=0.6))


def test_flops_ratio_moves_along_the_frontier(model: minilpt.Classifier, found: minilpt.Calibration) -> None:
    pruned = model.with_pruning(found.pruning)
    for ratio in (0.9, 0.6, 0.4):
        point = next(point for point in found.frontier if point.flops_ratio <= ratio)
        want = model.with_pruning(calibration.RULE | {"thresholds": point.thresholds, "merge_removed": True}).predict(
            TEXTS
        )
        assert pruned.predict(TEXTS, flops_ratio=ratio) == want
    np.testing.assert_array_equal(
        pruned.predict_proba(TEXTS, flops_ratio=1.0), model.with_pruning(None).predict_proba(TEXTS)
    )
    with pytest.raises(PruningError, match=r"flops_ratio 0\.01 is below 0\.\d+, the frontier's lowest"):
        pruned.predict(TEXTS, flops_ratio=0.01)
    with pytest.raises(PruningError, match="number from 0 to 1, found 3"):
        pruned.predict(TEXTS, flops_ratio=3)
    with pytest.raises(PruningError, match="this model is not pruned"):
        model.predict(TEXTS, flops_ratio=0.5)
    plain = model.with_pruning({"rule": "topk", "token_keep_rate": 0.5})
    with pytest.raises(PruningError, match="run minilpt calibrate"):
        plain.predict(TEXTS, flops_ratio=0.5)


def test_an_interrupted_search_returns_what_it_found(
    model: minilpt.Classifier, found: minilpt.Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, left = calibration._Half.measure, iter(range(60))

    def stopping(self: Any, thresholds: Any) -> Any:
        if next(left, None) is None:
            signal.raise_signal(signal.SIGINT)  # as Ctrl-C does, in the middle of a run
        return measure(self, thresholds)

    monkeypatch.setattr(calibration._Half, "measure", stopping)
    with pytest.warns(MinilptWarning, match=r"interrupted: the frontier ends at 0\.\d+ of the FLOPs"):
        cut = minilpt.calibrate(model, TEXTS, flops_ratio=0.5)
    assert cut.interrupted
    assert cut.frontier == found.frontier[: len(cut.frontier)]
    assert 3 < len(cut.frontier) < len(found.frontier)
    assert cut.chosen == cut.frontier[-1]


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "a target is needed, at least one of flops_ratio, agreement, max_drop"),
        ({"flops_ratio": 1.5}, "flops_ratio must be a number from 0 to 1, found 1.5"),
        ({"flops_ratio": "0.5"}, "flops_ratio must be a number"),
        ({"agreement": -0.1}, "agreement must be a number from 0 to 1"),
        ({"max_drop": 1}, "max_drop needs labels, one for each text"),
        ({"agreement": 0.9, "labels": [0] * 120}, "labels serve max_drop only"),
        ({"flops_ratio": 0.01}, r"flops_ratio 0.01 is out of reach: the cheapest thresholds found need 0\.\d+"),
        ({"flops_ratio": 0.35, "agreement": 1.0}, "the targets contradict each other"),
        ({"flops_ratio": 0.5, "seed": -1}, "seed must be an integer of 0 or more, found -1"),
        ({"flops_ratio": 0.5, "max_texts": 10}, "max_texts must be 16 at least, found 10"),
    ],
)
def test_targets_that_cannot_be_met(model: minilpt.Classifier, options: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        minilpt.calibrate(model, TEXTS, **options)


def test_too_few_texts(model: minilpt.Classifier) -> None:
    with pytest.raises(CalibrationError, match="16 different texts are needed at least, better 100; found 1"):
        minilpt.calibrate(model, ["good film"] * 100, flops_ratio=0.5)
    with pytest.warns(MinilptWarning, match="40 texts are few"):
        minilpt.calibrate(model, TEXTS[:40], flops_ratio=0.8)


def test_texts_that_are_all_cut_give_a_warning(model: minilpt.Classifier) -> None:
    long = [" ".join([text] * 20) for text in TEXTS]
    with pytest.warns(MinilptWarning, match="every text is longer than the model's limit"):
        minilpt.calibrate(model, long, flops_ratio=0.9)


def test_of_many_texts_a_sample_is_taken(model: minilpt.Classifier) -> None:
    found = minilpt.calibrate(model, TEXTS, flops_ratio=0.8, max_texts=100)
    assert found.provenance["texts"]["search"] == found.provenance["texts"]["held_out"] == 50


def test_a_model_of_one_layer_has_nothing_to_search(tmp_path: Path) -> None:
    content = checkpoints.config(num_hidden_layers=1)
    model = minilpt.load(checkpoints.write_vocabulary(checkpoints.write(tmp_path / "model", content)))
    found = minilpt.calibrate(model, TEXTS, flops_ratio=0.99)
    assert len(found.frontier) == 2
    np.testing.assert_array_equal(model.with_pruning(found.pruning).logits(TEXTS), model.logits(TEXTS))


def test_independent_labels_are_sets_and_have_no_metric(tmp_path: Path) -> None:
    content = checkpoints.config(problem_type="multi_label_classification")
    model = minilpt.load(checkpoints.write_vocabulary(checkpoints.write(tmp_path / "model", content)))
    found = minilpt.calibrate(model, TEXTS, agreement=0.8, progress=True)
    texts = held_out()
    dense, pruned = (each.logits(texts) > 0 for each in (model, model.with_pruning(found.pruning)))
    assert found.chosen.agreement == (dense == pruned).all(axis=1).mean()
    with pytest.raises(CalibrationError, match="no metric for independent labels"):
        minilpt.calibrate(model, TEXTS, max_drop=1, labels=[0] * len(TEXTS))


def test_what_the_folder_holds_is_not_read_again(folder: Path, tmp_path: Path) -> None:
    """So that a damaged ltp.json can be calibrated anew."""
    made = shutil.copytree(folder, tmp_path / "model")
    model = minilpt.load(made)
    (made / "ltp.json").write_text("{")
    assert minilpt.calibrate(model, TEXTS, flops_ratio=0.8).chosen.flops_ratio <= 0.8


def test_without_merging_removed_tokens_are_gone(model: minilpt.Classifier) -> None:
    found = minilpt.calibrate(model, TEXTS, flops_ratio=0.6, merge_removed=False)
    pruned, texts = model.with_pruning(found.pruning), held_out()
    traced = pruned.forward(*model.encode(texts), trace=True)
    assert traced.counted_flops is not None and traced.ffn_lengths is not None and traced.kept is not None
    assert found.chosen.flops_ratio == traced.counted_flops.sum() / traced.dense_flops.sum()
    assert [kept.sum() for kept in traced.kept] == traced.ffn_lengths.sum(axis=1).tolist()


@pytest.mark.parametrize("labels", [3, 1])
def test_divergence_is_that_of_the_scores(model: minilpt.Classifier, labels: int) -> None:
    draw = np.random.default_rng(2)
    dense, pruned = (draw.normal(0, 3, (50, labels)).astype(np.float32) for _ in range(2))
    if labels == 1:
        p, q = (1 / (1 + np.exp(-logits.astype(np.float64))) for logits in (dense, pruned))
        want = stats.entropy(np.hstack([p, 1 - p]), np.hstack([q, 1 - q]), axis=1)
    else:
        p, q = (np.exp(logits.astype(np.float64)) for logits in (dense, pruned))
        want = stats.entropy(p, q, axis=1)
    np.testing.assert_allclose(calibration.divergence(model.config, dense, pruned), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("same, texts", [(0, 10), (9, 10), (128, 128), (990, 1000)])
def test_the_lower_bound_is_wilsons(same: int, texts: int) -> None:
    interval = stats.binomtest(same, texts, alternative="greater").proportion_ci(0.95, method="wilson")
    assert calibration._lower_bound(same / texts, texts) == pytest.approx(interval.low)


def test_the_plot_is_drawn(found: minilpt.Calibration, tmp_path: Path) -> None:
    found.plot(tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="sheet"):
        found.plot(tmp_path / "frontier.sheet")


@pytest.mark.parametrize(
    "frontier, message",
    [
        ("none", "frontier must be a list of objects"),
        ([3], r"frontier\[0\] must be an object with flops_ratio and thresholds"),
        ([{"flops_ratio": 0.5, "thresholds": [0.0]}], r"frontier\[0\].thresholds must be a list of 2 numbers"),
        ([{"flops_ratio": 1.5, "thresholds": [0, 0]}], r"frontier\[0\].flops_ratio must lie between 0 and 1"),
        ([{"flops_ratio": r, "thresholds": [0, 0]} for r in (0.5, 0.6)], r"frontier\[1\].flops_ratio must be below"),
    ],
)
def test_bad_frontiers_are_refused(frontier: Any, message: str) -> None:
    record = {"rule": "threshold", "thresholds": [0, 0], "score_denominator": 1, "frontier": frontier}
    with pytest.raises(PruningError, match=message):
        pruning.parse(record, 2, "ltp.json")
