"""The benchmark's own arithmetic: workloads that repeat, and ratios taken round by round."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import engines, report, workloads


def test_a_ratio_is_against_the_fastest_peer_of_its_precision_in_each_round() -> None:
    rounds = [
        {"minilpt-int8": 1.0, "openvino-int8": 2.0, "onnxruntime-int8": 3.0, "torch-fp32": 0.1},
        {"minilpt-int8": 1.0, "openvino-int8": 4.0, "onnxruntime-int8": 1.5},
        {"minilpt-int8": 2.0, "openvino-int8": 2.0},
        {"openvino-int8": 2.0},
    ]
    assert report.ratio(rounds, "minilpt-int8") == (1.5, 1.0, 2.0)
    assert report.ratio(rounds, "minilpt-fp32") is None


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
