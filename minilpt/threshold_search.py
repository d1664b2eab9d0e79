"""Thresholds without gradients: from the dense model down to few FLOPs, one small step after another.

At every step each layer in turn removes a few more of the tokens that it still keeps, those with the lowest scores, so
many that all these trials save the same FLOPs; the one that moves the answers least is taken. Then exchanges are tried:
one layer removes a little more, another a little less; what lies nearer to the dense answers at no more FLOPs stays.
The search sees an `Objective` only. Layer numbers are 0-based; the last layer has no part in it, because a classifier
reads its first token only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Thresholds = tuple[float, ...]

STEP = 0.015  # of the dense FLOPs, saved by one step
EXCHANGES = 4  # tried after each step


@dataclass(frozen=True)
class Measured:
    """One set of thresholds on the texts of the search.

    flops_ratio: counted FLOPs over the dense model's. divergence: mean over the texts, in nats, from the dense answers.
    """

    thresholds: Thresholds
    flops_ratio: float
    divergence: float


class Live(NamedTuple):
    """The live tokens of one layer, of all texts: scores (N,) float32; kept, pinned (N,) bool; saving, a number.

    saving: the share of the dense FLOPs that goes if this layer removes one more token, on average.
    """

    scores: NDArray[np.float32]
    kept: NDArray[np.bool_]
    pinned: NDArray[np.bool_]
    saving: float


class Objective(Protocol):
    """What the search asks of a model and its texts."""

    def measure(self, thresholds: Thresholds) -> Measured:
        """Run the texts under these thresholds."""

    def live(self, thresholds: Thresholds) -> list[Live]:
        """Every layer but the last under these thresholds."""


def search(
    objective: Objective, start: Measured, floor: float, draw: np.random.Generator, seen: Callable[[Measured], None]
) -> Iterator[Measured]:
    """Ever cheaper thresholds from `start` on, until flops_ratio <= floor or no token is left to remove.

    seen: called with the result of every trial.
    """

    def tried(here: Measured, savings: dict[int, float]) -> Measured:
        found = objective.measure(_moved(here.thresholds, layers, savings))
        seen(found)
        return found

    here, layers = start, objective.live(start.thresholds)
    while here.flops_ratio > floor:
        trials = [tried(here, {layer: STEP}) for layer, live in enumerate(layers) if _removable(live).any()]
        trials = [trial for trial in trials if trial.flops_ratio < here.flops_ratio]
        if not trials:
            return
        here = min(trials, key=lambda trial: _slope(here, trial))
        layers = objective.live(here.thresholds)
        for _ in range(EXCHANGES if len(layers) > 1 else 0):
            more, less = draw.choice(len(layers), 2, replace=False)
            size = STEP * draw.uniform(0.3, 2)
            if not _removable(layers[more]).any():
                continue
            trial = tried(here, {more: size, less: -size})
            if trial.flops_ratio <= here.flops_ratio and trial.divergence < here.divergence:
                here, layers = trial, objective.live(trial.thresholds)
        yield here


def _removable(live: Live) -> NDArray[np.bool_]:
    """Tokens that the layer keeps and need not, (N,)."""
    return live.kept & ~live.pinned


def _slope(here: Measured, there: Measured) -> float:
    """What a saved share of the FLOPs costs in divergence."""
    return (there.divergence - here.divergence) / (here.flops_ratio - there.flops_ratio)


def _moved(thresholds: Thresholds, layers: list[Live], savings: dict[int, float]) -> Thresholds:
    """The thresholds with some layers' changed so that each saves this share of the dense FLOPs more (or less)."""
    moved = list(thresholds)
    for layer, saving in savings.items():
        live = layers[layer]
        tokens = max(1, round(abs(saving) / live.saving))
        moved[layer] = _tighter(live, tokens) if saving > 0 else _looser(live, tokens)
    return tuple(moved)


def _tighter(live: Live, tokens: int) -> float:
    """The threshold that also removes the `tokens` lowest of the kept scores, of which there is at least one."""
    scores = np.sort(live.scores[_removable(live)]).astype(np.float64)
    if tokens >= len(scores):
        return float(scores[-1] * 1.01)
    return float(scores[tokens - 1 : tokens + 1].mean())


def _looser(live: Live, tokens: int) -> float:
    """The threshold that removes all but the `tokens` highest of the scores that it removes now; 0 if none is left."""
    scores = np.sort(live.scores[~live.kept]).astype(np.float64)
    if tokens >= len(scores):
        return 0.0
    return float(scores[len(scores) - tokens - 1 : len(scores) - tokens + 1].mean())
