"""One batch on the engine, and what the requests learn of it: results, times, headers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..api import Classifier
from ..batching import Outcome

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Tokens:
    """A text to be classified."""

    ids: list[int]
    segments: list[int]


@dataclass(frozen=True)
class Text:
    """A text to be embedded; normalize, truncation: as `Classifier.embed` has them."""

    text: str
    normalize: bool
    truncation: str | None


@dataclass(frozen=True)
class Result:
    """values: (labels,) logits or a (D,) embedding; of an embedding the counts are not known."""

    values: Float32
    kept_tokens: tuple[int, ...] = ()
    executed_flops: int = 0
    dense_flops: int = 0


def run(model: Classifier, items: Sequence[Tokens | Text]) -> list[Result]:
    """One batch: tokens are classified, texts embedded. Results in the order of the items."""
    found: dict[int, Result] = {}
    tokens = {index: item for index, item in enumerate(items) if isinstance(item, Tokens)}
    if tokens:
        forward = model.forward([item.ids for item in tokens.values()], [item.segments for item in tokens.values()])
        for row, index in enumerate(tokens):
            kept = tuple(forward.kept_tokens[:, row].tolist())
            flops = int(forward.executed_flops[row]), int(forward.dense_flops[row])
            found[index] = Result(forward.logits[row], kept, *flops)
    alike: dict[tuple[bool, str | None], dict[int, str]] = {}  # settings -> place and text of each
    for index, item in enumerate(items):
        if isinstance(item, Text):
            alike.setdefault((item.normalize, item.truncation), {})[index] = item.text
    for (normalize, truncation), texts in alike.items():
        vectors = model.embed(list(texts.values()), normalize=normalize, truncation=truncation)
        found |= {index: Result(vector) for index, vector in zip(texts, vectors, strict=True)}
    return [found[index] for index in range(len(items))]


@dataclass(frozen=True)
class Computed:
    """The results for one request's texts, and what its headers tell."""

    route: str
    outcomes: list[Outcome[Result]]
    tokens: list[int]
    characters: int
    began: float
    tokenization_s: float

    @property
    def results(self) -> list[Result]:
        """Of every text."""
        return [outcome.value for outcome in self.outcomes if outcome.value is not None]

    @property
    def values(self) -> Float32:
        """(texts, labels or D) float32."""
        return np.array([result.values for result in self.results])

    def seconds(self) -> dict[str, float]:
        """By the names of the metrics: the whole request, and its parts as means over its texts."""
        count = len(self.outcomes)
        return {
            "": time.perf_counter() - self.began,
            "tokenization_": self.tokenization_s,
            "queue_": sum(outcome.queue_s for outcome in self.outcomes) / count,
            "inference_": sum(outcome.run_s for outcome in self.outcomes) / count,
        }

    def headers(self, device: str) -> dict[str, str]:
        """The contract's, times in whole milliseconds, and ours: kept tokens per layer, and the share of the FLOPs."""
        ms = {name: str(round(1000 * value)) for name, value in self.seconds().items()}
        found = {
            "x-compute-type": device,
            "x-compute-time": ms[""],
            "x-compute-characters": str(self.characters),
            "x-compute-tokens": str(sum(self.tokens)),
            "x-total-time": ms[""],
            "x-tokenization-time": ms["tokenization_"],
            "x-queue-time": ms["queue_"],
            "x-inference-time": ms["inference_"],
        }
        dense = sum(result.dense_flops for result in self.results)
        if dense:
            kept = np.sum([result.kept_tokens for result in self.results], axis=0)
            found["x-minilpt-kept-tokens"] = ",".join(map(str, kept.tolist()))
            found["x-minilpt-flops-ratio"] = f"{sum(r.executed_flops for r in self.results) / dense:.4f}"
        return found
