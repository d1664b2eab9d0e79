"""The pruning study's own arithmetic, on a tiny model and tiny files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import minilpt
from benchmarks import merge_ablation, pruning_study, study_ablations, study_data, study_report
from minilpt.tasks import TASKS

import checkpoints

RULE = {"rule": "threshold", "thresholds": [0.6, 0.9, 0.8], "score_denominator": 1, "merge_removed": True}
TEXTS = ["good film", "the bad film ! not a good , good , good film", "not", "a film , a film and a film"] * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = checkpoints.write(tmp_path_factory.mktemp("study") / "model", checkpoints.config(labels=2))
    return checkpoints.write_vocabulary(made)


def test_a_measurement_is_what_predict_and_forward_say(folder: Path) -> None:
    model = minilpt.load(folder)
    measured = pruning_study.Measured(model, RULE, TEXTS)
    pruned, dense = (model.with_pruning(rule).predict(TEXTS) for rule in (RULE, None))
    assert [model.config.labels[int(answer)] for answer in measured.answers] == [each.label for each in pruned]
    assert measured.executed == sum(p.executed_flops for p in pruned) / sum(p.executed_flops for p in dense)
    traced = model.with_pruning(RULE).forward(*model.encode(TEXTS), trace=True)
    assert traced.counted_flops is not None
    assert measured.counted == traced.counted_flops.sum() / traced.dense_flops.sum()


def test_a_rule_is_found_that_just_meets_the_share() -> None:
    rule = pruning_study.met(0.5, 0.0, 4.0, lambda x: {"x": x}, lambda rule: 1 - rule["x"] / 4 if rule else 1)
    assert rule is not None
    assert rule["x"] == pytest.approx(2, abs=0.01)
    assert 1 - rule["x"] / 4 <= 0.5
    assert pruning_study.met(0.5, 0.0, 1.0, lambda x: {"x": x}, lambda rule: 1 - rule["x"] / 4 if rule else 1) is None


def test_lost_points_are_paired() -> None:
    """Two models that err on the same texts differ by nothing, whatever the sample."""
    wanted = np.array([0.0, 1.0] * 50)
    dense = wanted.copy()
    dense[:10] = 1 - dense[:10]
    same = pruning_study.difference(dense, dense, wanted, TASKS["rte"])
    assert same == [0, 0, 0]
    worse = dense.copy()
    worse[50:60] = 1 - worse[50:60]
    lost, low, high = pruning_study.difference(worse, dense, wanted, TASKS["rte"])
    assert lost == pytest.approx(10)
    assert 3 < low < 10 < high < 17


def test_both_frontiers_of_the_ablation_are_calibrated(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "rte" / "plain")
    pairs = [("a film " + "good " * (at % 9), "not " * (at // 9)) for at in range(108)]
    rows = [{"sentence1": first, "sentence2": second, "label": 0} for first, second in pairs]
    (tmp_path / "rte" / "calibrate.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    merged, gone = (merge_ablation.frontier(tmp_path, "rte", merge) for merge in (True, False))
    assert [point["counted"] <= ratio for point, ratio in zip(gone, merge_ablation.RATIOS, strict=True)] == [True] * 4
    assert merged != gone
    found = {"tasks": {"rte": {"merged": [{"kl": 0.02}] * 4, "gone": [{"kl": 0.03}] * 4}}}
    assert merge_ablation.report(found).splitlines()[-1].startswith("| rte | gone | 30.0 (1.50 x) |")


def test_rows_are_split_once_and_for_all(tmp_path: Path) -> None:
    """QNLI's one file gives rows to train, to calibrate and to measure, and none to two of them."""
    rows = [f"{at}\tquestion {at}\tsentence {at}\tentailment" for at in range(1600)]
    source = tmp_path / "data" / "glue" / "QNLI" / "dev.tsv"
    source.parent.mkdir(parents=True)
    source.write_text("\n".join(["index\tquestion\tsentence\tlabel", *rows]) + "\n")
    study_data.write(tmp_path / "data", tmp_path, "qnli")
    parts = {}
    for part in ("train", "calibrate", "dev"):
        lines = (tmp_path / "qnli" / f"{part}.jsonl").read_text().splitlines()
        parts[part] = {json.loads(line)["question"] for line in lines}
    assert [len(parts[part]) for part in ("dev", "calibrate", "train")] == [1463, 13, 124]
    assert len(set.union(*parts.values())) == 1600


def test_the_report_shows_points_lost_and_draws(tmp_path: Path) -> None:
    point = {"share": 0.5, "counted": 0.49, "executed": 0.55, "gflops": 0.2, "accuracy": 70.5}
    point |= {"difference": [1.5, 0.25, 2.75], "standard_error": 1.0}
    dense = {"accuracy": 72.0, "gflops": 0.41}
    found = {
        "texts": 277,
        "tokens": 64.0,
        "calibration": {"texts": 200, "seconds": 31.0},
        "dense": {"plain": dense, "learned": dense},
        "points": {"calibrated": [point]},
        "speedup": {"calibrated": [1.7, 1.6, 1.8]},
    }
    machine = {"date": "2026-11-25", "processor": "one", "cores": 2, "versions": {"minilpt": "0.1.0"}}
    results = {"machine": machine, "tasks": {"rte": found}}
    study_report.write(results, tmp_path / "study.json")
    assert study_report.summary(results).splitlines()[-1] == (
        "| rte (accuracy) | 72.00 | 0.41 | - | 70.50 (-1.50; -2.75 to -0.25) | - | - | - |"
    )
    text = (tmp_path / "study.md").read_text()
    assert "| rte | calibrated, no training | 2.04 x | 1.82 x | 1.70 (1.60 to 1.80) |" in text
    assert (tmp_path / "study.svg").read_text().startswith("<?xml")


DOCS = (Path(__file__).resolve().parents[1] / "docs" / "calibration.md").read_text(encoding="utf-8")
RESULTS = Path(pruning_study.__file__).parent / "results"


def test_the_docs_say_what_the_results_hold() -> None:
    ablation = json.loads((RESULTS / "merge_ablation.json").read_text(encoding="utf-8"))
    assert merge_ablation.report(ablation) in DOCS
    ablations = json.loads(study_ablations.RESULTS.read_text(encoding="utf-8"))
    assert study_ablations.lengths_table(ablations) in DOCS
    assert study_ablations.manual_table(ablations) in DOCS
    study = json.loads((RESULTS / "pruning_study.json").read_text(encoding="utf-8"))
    assert study_report.summary(study) in DOCS
    assert study_report.details(study) in DOCS
    points = [point for task in study["tasks"].values() for point in task["points"]["calibrated"]]
    assert len(study["tasks"]) == 7
    for share in (0.526, 0.5):  # "missed on six of the seven"
        assert sum(point["difference"][0] > 1 for point in points if point["share"] == share) == 6
