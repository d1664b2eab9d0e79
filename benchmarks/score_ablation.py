"""What a token's score is made of, and what becomes of the removed ones: calibrated frontiers of the variants.

    python -m benchmarks.score_ablation --work WORK --tasks mrpc rte     # after study_data and study_train

Each variant is searched by `minilpt.calibrate` on the same unlabelled texts and judged on the same held-out half: mean
divergence from the dense model at the same share of its counted FLOPs. Other scores than minilpt's run on NumPy.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

import minilpt
from minilpt import backends, calibration, ragged
from minilpt.evaluate import machine
from minilpt.numpy_engine import NumpyEngine
from minilpt.reference import merge_removed
from minilpt.tasks import TASKS, read_examples
from minilpt.weights import checkpoint

from . import files
from .processes import ROOT
from .report import table
from .study_data import SOURCES

RESULTS = ROOT / "benchmarks" / "results" / "score_ablation.json"
VARIANTS = {
    "received": "attention received from all live tokens, the removed tokens merged into one (what minilpt uses)",
    "not merged": "the same score, the removed tokens gone",
    "accumulated": "the mean of the attention received in all layers so far, merged",
    "value norm": "attention received times the norm of the token's value, merged",
    "first token": "attention received from the first token alone, merged",
}
RATIOS = (0.7, 0.6, 0.5, 0.4)
TEXTS = 256

Float32 = NDArray[np.float32]


class Variant(NumpyEngine):
    """The NumPy engine with another score, scaled to mean 1 over the live tokens; not safe to share between threads."""

    kind = "first token"

    def run(self, batch: ragged.TokenBatch, *, trace: bool = False) -> Any:
        self._earlier: list[Float32] = []
        return super().run(batch, trace=trace)

    def _full_layer(self, layer: int, x: Float32, cu_seqlens: Any, n_initial: Any, traced: Any) -> Any:
        weights, rule = self._layers[layer], self.rule
        if rule is not None and not rule.active(layer):
            rule = None
        q, kv = self._linear(x, *weights.query), self._linear(x, *weights.key_value)
        context, scores, keep = [x[:0]], [np.zeros(0, np.float32)], [np.zeros(0, dtype=bool)]
        goes_on, earlier = [np.zeros(0, dtype=bool)], []
        for b, (begin, end) in enumerate(pairwise(cu_seqlens)):
            k, v = np.split(kv[begin:end], 2, axis=1)
            probs = self._probs(q[begin:end], k, self.config.heads)
            score = self._score(probs, v)
            if self.kind == "accumulated" and self._earlier:
                score = (score + layer * self._earlier[b]) / (layer + 1)
            everything = np.ones(end - begin, dtype=bool)
            kept = rows = everything if rule is None else rule.keep(score, layer, int(n_initial[b]))
            if rule is not None and rule.merge_removed and not kept.all():
                x[begin:end], probs, rows = merge_removed(x[begin:end], probs, score, kept)
            context.append(self._context(probs[:, rows], v))
            scores.append(score)
            keep.append(kept)
            goes_on.append(rows)
            earlier.append(score[rows])
        self._earlier = earlier
        if traced is not None:
            traced[0].append(np.concatenate(scores))
            traced[1].append(np.concatenate(keep))
        places, cu_seqlens = ragged.compact(np.concatenate(goes_on), cu_seqlens)
        return self._rest_of_layer(weights, x[places], np.concatenate(context)), cu_seqlens

    def _score(self, probs: Float32, values: Float32) -> Float32:
        """(n,) float32 of mean 1. probs: (H, n, n), values: (n, D)."""
        if self.kind == "first token":
            score = probs[:, 0].mean(axis=0)
        elif self.kind == "value norm":
            norms = np.linalg.norm(values.reshape(len(values), len(probs), -1), axis=2)  # (n, H)
            score = (probs.sum(axis=1) * norms.T).mean(axis=0)
        else:
            score = self._mass(probs)
        return (score / score.mean()).astype(np.float32)


def variant(folder: Path, kind: str) -> minilpt.Classifier:
    """The model in `folder` on an engine with this score."""
    model = minilpt.load(folder, pruning=None)
    if kind in ("received", "not merged"):
        return model
    weights = checkpoint.load_weights(folder, model.config)
    engine = Variant(model.config, weights, None, backends.Backend("numpy", "cpu", "fp32", 1))
    engine.kind = kind
    return minilpt.Classifier(folder, model.config, engine, None, model._encoder)


def frontier(work: Path, task: str, kind: str) -> list[dict[str, float | None]]:
    """Held-out divergence and agreement at each of the shares."""
    examples = read_examples(work / task / "calibrate.jsonl", TASKS[SOURCES[task].task])
    texts = [each.text for each in examples][:TEXTS]
    with mock.patch.dict(calibration.RULE, merge_removed=kind != "not merged"):
        found = minilpt.calibrate(variant(work / task / "plain", kind), texts, flops_ratio=min(RATIOS))
    points = [next(point for point in found.frontier if point.flops_ratio <= ratio) for ratio in RATIOS]
    return [{"counted": p.flops_ratio, "kl": p.kl, "agreement": p.agreement} for p in points]


def report(results: dict[str, Any]) -> str:
    """Divergence at each share, in thousandths of a nat, and its ratio to the score that minilpt uses."""
    parts = []
    for task, found in results["tasks"].items():
        rows = [["score", *(f"{ratio:g}" for ratio in RATIOS)]]
        for kind, points in found.items():
            base = found["received"]
            cells = [
                f"{1000 * point['kl']:.1f} ({point['kl'] / old['kl']:.2f} x)"
                for point, old in zip(points, base, strict=True)
            ]
            rows.append([kind, *cells])
        parts += [f"**{task}**", table(rows)]
    return "\n\n".join(parts)


def main() -> None:
    """Measure the tasks named and add them to the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.score_ablation", description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="where study_data and study_train wrote")
    parser.add_argument("--tasks", nargs="+", choices=SOURCES, required=True, metavar="TASK")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS], metavar="VARIANT")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    results = files.read_json(options.out) if options.out.is_file() else {"tasks": {}}
    for task in options.tasks:
        for kind in options.variants:
            results["tasks"].setdefault(task, {})[kind] = frontier(options.work, task, kind)
            results["machine"] = machine()
            files.write_json(options.out, results)
    print(report(results))


if __name__ == "__main__":
    main()
