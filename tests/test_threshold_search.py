"""The search alone, on an objective whose best answer is known."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from minilpt import threshold_search
from minilpt.threshold_search import Live, Measured, Thresholds

SCORES = np.random.default_rng(4).uniform(0.1, 3, (3, 200)).astype(np.float32)
WORTH = np.array([9.0, 1.0, 3.0])  # what a removed token's score costs, by layer


class Toy:
    """Layers that prune apart: a removed token saves 1 / 600 of the FLOPs and costs its score times a layer's worth."""

    def measure(self, thresholds: Thresholds) -> Measured:
        gone = np.array(thresholds)[:, None] > SCORES
        gone[:, 0] = False
        return Measured(thresholds, 1 - float(gone.sum()) / SCORES.size, float((WORTH @ (SCORES * gone)).sum()))

    def live(self, thresholds: Thresholds) -> list[Live]:
        pinned = np.arange(SCORES.shape[1]) == 0
        return [
            Live(scores, (scores >= threshold) | pinned, pinned, 1 / SCORES.size)
            for scores, threshold in zip(SCORES, thresholds, strict=True)
        ]


def found(floor: float, seed: int = 0) -> list[Measured]:
    toy, trials = Toy(), []
    start = toy.measure((0.0, 0.0, 0.0))
    steps = list(threshold_search.search(toy, start, floor, np.random.default_rng(seed), trials.append))
    assert {step.thresholds for step in steps} <= {trial.thresholds for trial in trials}
    return steps


def test_every_step_is_cheaper_by_about_a_step() -> None:
    steps = found(0.3)
    savings = -np.diff([1.0, *(step.flops_ratio for step in steps)])
    assert savings.min() > 0
    assert savings.max() < 3 * threshold_search.STEP
    assert steps[-1].flops_ratio <= 0.3 < steps[-2].flops_ratio


def test_it_comes_close_to_the_best_thresholds() -> None:
    """Within a tenth of the least divergence that any thresholds on a grid reach at as few FLOPs."""
    toy = Toy()
    grid = [np.quantile(row, np.linspace(0, 1, 26)) for row in SCORES]
    everything = [toy.measure(tuple(float(value) for value in point)) for point in product(*grid)]
    for step in found(0.4)[5::8]:
        best = min(each.divergence for each in everything if each.flops_ratio <= step.flops_ratio)
        assert step.divergence <= 1.1 * best


def test_it_ends_when_nothing_is_left_to_remove() -> None:
    last = found(0.0)[-1]
    assert last.flops_ratio == pytest.approx(3 / 600)


@pytest.mark.parametrize("tokens", [1, 7, 150])
def test_a_tighter_threshold_removes_the_lowest_and_a_looser_one_brings_the_highest_back(tokens: int) -> None:
    scores = SCORES[0]
    pinned = np.arange(len(scores)) == 0
    live = Live(scores, np.ones(len(scores), np.bool_), pinned, 1.0)
    tight = np.float32(threshold_search._tighter(live, tokens))
    kept = (scores >= tight) | pinned
    assert (~kept).sum() == tokens
    back = np.float32(threshold_search._looser(live._replace(kept=kept), tokens // 2))
    again = (scores >= back) | pinned
    assert (~again).sum() == tokens - tokens // 2 or tokens == 1
    assert (again | ~kept).all() or tokens == 1
