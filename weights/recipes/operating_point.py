"""Milder thresholds for a trained model, chosen on examples that it never saw, and a frontier to move along.

    python -m minilpt.weights.recipes.operating_point FOLDER --task mnli --texts FILE --max-drop 1

All learned thresholds are scaled by one factor after another, and metric and counted FLOPs of each are measured on
labelled examples, which should neither have trained the model nor measure it later. FOLDER/ltp.json then holds all
points as its frontier, and as its thresholds those of the cheapest point that, as all dearer ones, loses at most
--max-drop points of the metric against the same weights without pruning.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from ... import load
from ...api import Classifier
from ...evaluate import evaluate
from ...files import write_whole
from ...pruning import FILE_NAME
from ...tasks import TASKS, Example, Task, read_examples

FACTORS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def frontier(model: Classifier, examples: Sequence[Example], task: Task) -> list[dict[str, Any]]:
    """Dense first, then every factor: thresholds, flops_ratio (counted) and the task's first metric."""
    assert model.pruning is not None
    learned = model.pruning.settings["thresholds"]
    points = []
    for factor in FACTORS:
        thresholds = [round(factor * value, 6) for value in learned]
        found = evaluate(model.with_pruning({"thresholds": thresholds}), examples, task, repeats=1)["variants"]
        points.append(_point(thresholds, found["pruned"], task))
    return [_point([0.0] * len(learned), found["dense"], task), *points]


def _point(thresholds: list[float], found: dict[str, Any], task: Task) -> dict[str, Any]:
    ratio, metric = found["relative_flops_counted"], found[task.metrics[0]]
    return {"thresholds": thresholds, "flops_ratio": ratio, "metric": metric}


def chosen(points: Sequence[dict[str, Any]], max_drop: float) -> dict[str, Any]:
    """The last point, from dense on, before the first that loses more."""
    *_, last = takewhile(lambda point: points[0]["metric"] - point["metric"] <= max_drop, points)
    return last


def main() -> None:
    """Rewrite the thresholds of the folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="as `export` wrote it")
    parser.add_argument("--task", required=True, choices=sorted(TASKS))
    parser.add_argument("--texts", type=Path, required=True, help="TSV, CSV or JSONL with labels")
    parser.add_argument("--max-drop", type=float, default=1.0, metavar="POINTS")
    options = parser.parse_args()
    task = TASKS[options.task]
    examples = read_examples(options.texts, task)
    points = frontier(load(options.folder), examples, task)
    for point in points:
        print(f"{point['flops_ratio']:.3f} of the counted FLOPs: {task.metrics[0]} {point['metric']:.2f}")
    path = options.folder / FILE_NAME
    record = json.loads(path.read_text(encoding="utf-8"))
    record |= {"thresholds": chosen(points, options.max_drop)["thresholds"], "frontier": points}
    record["provenance"]["operating_point"] = {
        "recipe": "minilpt.weights.recipes.operating_point",
        "examples": len(examples),
        "max_drop": options.max_drop,
    }
    write_whole(path, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
