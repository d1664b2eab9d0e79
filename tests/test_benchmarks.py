"""The benchmark's own arithmetic: workloads that repeat, and ratios taken round by round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import (
    batch_engines,
    cuda_compile,
    engines,
    files,
    integer,
    integer_report,
    report,
    t4_model,
    workloads,
)
from minilpt.config import read_config


def test_a_ratio_is_against_the_fastest_peer_of_its_precision_in_each_round() -> None:
    rounds = [
        {"minilpt-int8": 1.0, "openvino-int8": 2.0, "onnxruntime-int8": 3.0, "torch-fp32": 0.1},
        {"minilpt-int8": 1.0, "openvino-int8": 4.0, "onnxruntime-int8": 1.5},
        {"minilpt-int8": 2.0, "openvino-int8": 2.0},
        {"openvino-int8": 2.0},
    ]
    assert report.ratio(rounds, "minilpt-int8") == (1.5, 1.0, 2.0)
    assert report.ratio(rounds, "minilpt-fp32") is None


def results(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """A results file with one workload and one length of the latency."""
    latency = [{name: {"p50": ms, "p95": ms} for name, ms in turn.items()} for turn in rounds]
    machine = {"date": "2026-11-25", "processor": "one", "family_model": ["6", "1"], "flags": ["avx2"]}
    case = {"seconds": rounds, "workload": {"sequences": 8, "mean": 3.0}, "pruning": {"counted_ratio": 0.5}}
    case |= {"peak_mb": {}, "verified": {}}
    shape = {"title": "small", "throughput": {"mnli": case}, "latency": {"ms": {"16": latency}}}
    return {
        "machine": machine | {"python": "3.11", "versions": {"minilpt": "0.1.0", "torch": None}},
        "options": {"threads": 2, "rounds": len(rounds)},
        "left_out": {},
        "shapes": {"minilm-l6": shape},
    }


def test_the_summaries_hold_ratios_and_name_the_fastest_peer() -> None:
    found = results([{"minilpt-int8": 1.0, "openvino-int8": 2.0, "onnxruntime-int8": 3.0, "torch-fp32": 0.1}])
    line = report.summary(found).splitlines()[-1]
    assert line == "| small, mnli | - | - | 2.00 (2.00 to 2.00) | - | PyTorch fp32; OpenVINO int8, static |"
    line = report.latency_summary(found).splitlines()[2]
    assert line == "| small, minilpt int8 | 0.50 |"


def test_a_report_is_written_beside_its_results(tmp_path: Path) -> None:
    found = results([{"minilpt-int8": 1.0, "openvino-int8": 2.0}])
    del found["shapes"]["minilm-l6"]["throughput"]["mnli"]  # a chart needs matplotlib
    report.write(found, tmp_path / "some.results.json")
    text = (tmp_path / "some.results.md").read_text()
    assert "minilpt 0.1.0. 1 rounds" in text
    assert "| minilpt int8 | 1.00 (0.50 x) |" in text


@pytest.mark.parametrize("shape", workloads.SHAPES)
@pytest.mark.parametrize("lengths", workloads.LENGTHS)
def test_a_workload_is_the_same_every_time_and_inside_its_range(shape: str, lengths: str) -> None:
    rows, of = workloads.sequences(shape, lengths, 200), workloads.LENGTHS[lengths]
    assert rows == workloads.sequences(shape, lengths, 200)
    counts = np.array([len(row) for row in rows])
    assert of.low <= counts.min()
    assert counts.max() <= of.high
    assert abs(np.log(counts).mean() - of.mu) < 4 * of.sigma / 200**0.5
    assert {row[0] for row in rows} == {workloads.SHAPES[shape].first}


def test_every_row_is_in_one_batch_and_batches_hold_what_was_asked() -> None:
    rows, engine = [[7] * n for n in (3, 50, 1, 20, 20)], engines.ENGINES["minilpt-int8"]
    found = list(engines.batches(engine, rows, {"batch": 60}))
    assert sorted(place for places, _ in found for place in places) == [0, 1, 2, 3, 4]
    assert all(sum(map(len, batch)) <= 60 for _, batch in found)
    ids, mask = engines.padded(rows)
    assert (ids.shape, mask.sum(axis=1).tolist()) == ((5, 50), [3, 50, 1, 20, 20])


def test_the_document_on_integers_holds_the_results() -> None:
    document = (integer.ROOT / "docs" / "integer-arithmetic.md").read_text(encoding="utf-8")
    results = files.read_json(integer.RESULTS)
    for part in ("accuracy_table", "speed_table", "kernel_table", "machine_line"):
        assert getattr(integer_report, part)(results) in document, part
    lost = {name: task["rows"] for name, task in results["accuracy"].items()}
    for name, kind in (("sst-2", "learned"), ("mrpc", "plain"), ("nli", "plain")):  # "within a point"
        assert lost[name][f"{kind}, integers"]["lost"][0] <= 1.0
    assert all(found["fp32_over_ibert"][1] >= 1.5 for found in results["speed"].values())


def test_the_document_on_cuda_holds_the_results() -> None:
    document = (integer.ROOT / "docs" / "cuda.md").read_text(encoding="utf-8")
    compiled, limits = (files.read_json(module.RESULT) for module in (cuda_compile, t4_model))
    assert cuda_compile.table(compiled) in document
    assert t4_model.tables(limits) in document
    assert f"gives {limits['dense_sequences_per_s_at_128_tokens']:.0f} sequences a second" in document
    assert f"the model on paper gives {limits['gain']:.2f} x" in document
    sources = {path.name for path in (integer.ROOT / "kernels" / "cuda").glob("*.cu")}
    assert {kernel["source"] for kernel in compiled["kernels"].values()} == sources


def test_the_document_on_deployment_holds_the_results() -> None:
    document = (integer.ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    assert batch_engines.table(files.read_json(batch_engines.RESULTS)) in document


def test_the_model_on_paper_counts_what_a_layer_moves_and_computes(tmp_path: Path) -> None:
    """One layer of one sequence of 100 tokens of which 50 go on, by hand."""
    files.write_text(tmp_path / "config.json", json.dumps(workloads.SHAPES["roberta-base"].config))
    parts = t4_model.layer_parts(read_config(tmp_path), np.array([100]), np.array([50]), 0, pruned=True)
    assert parts["inner"].operations == 2 * 50 * 768 * 3072
    assert parts["gelu"].seconds() == 2 * 2 * 50 * 3072 / 320e9
    assert parts["masses"].operations == 2 * 100 * 100 * 768
    assert parts["context"].operations == 4 * 100 * 50 * 768


def test_every_mutant_that_lives_is_explained() -> None:
    document = (integer.ROOT / "docs" / "cuda.md").read_text(encoding="utf-8")
    found = files.read_json(integer.ROOT / "benchmarks" / "results" / "cuda_mutants.json")
    lives = found["survivors"]
    assert f"{found['mutants'] - len(lives)} of {found['mutants']} mutants die" in document
    assert not found["other errors"], "errors that are no verdict of the tests"
    for mutant in lives:
        assert f"    {mutant['before']}\n" in document, mutant
        source = (integer.ROOT / "kernels" / "cuda" / mutant["source"]).read_text(encoding="utf-8")
        assert mutant["before"] in source, "the result is of another source: make cuda-mutants"
