"""What it is worth to let removed tokens go on as one: calibrated frontiers with and without `merge_removed`.

    python -m benchmarks.merge_ablation --work WORK --tasks mrpc sts-b     # after study_data and study_train

Both are searched by `minilpt.calibrate` on the same unlabelled texts and judged on the same held-out half: mean
divergence from the dense model at the same share of its counted FLOPs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import minilpt
from minilpt.evaluate import machine
from minilpt.tasks import TASKS, read_examples

from . import files
from .processes import ROOT
from .report import table
from .study_data import SOURCES

RESULTS = ROOT / "benchmarks" / "results" / "merge_ablation.json"
RATIOS = (0.7, 0.6, 0.5, 0.4)
TEXTS = 256


def frontier(work: Path, task: str, merge_removed: bool) -> list[dict[str, float | None]]:
    """Held-out divergence and agreement at each of the shares."""
    examples = read_examples(work / task / "calibrate.jsonl", TASKS[SOURCES[task].task])
    texts = [each.text for each in examples][:TEXTS]
    model = minilpt.load(work / task / "plain")
    found = minilpt.calibrate(model, texts, flops_ratio=min(RATIOS), merge_removed=merge_removed)
    points = [next(point for point in found.frontier if point.flops_ratio <= ratio) for ratio in RATIOS]
    return [{"counted": p.flops_ratio, "kl": p.kl, "agreement": p.agreement} for p in points]


def report(results: dict[str, Any]) -> str:
    """Divergence at each share, in thousandths, and how many times the merged one it is without merging."""
    rows = [["task", "removed tokens", *(f"{ratio:g}" for ratio in RATIOS)]]
    for task, found in results["tasks"].items():
        merged, gone = ([1000 * point["kl"] for point in found[kind]] for kind in ("merged", "gone"))
        rows.append([task, "merged", *(f"{value:.1f}" for value in merged)])
        pairs = zip(gone, merged, strict=True)
        rows.append([task, "gone", *(f"{value:.1f} ({value / base:.2f} x)" for value, base in pairs)])
    return table(rows)


def main() -> None:
    """Measure the tasks named and add them to the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merge_ablation", description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="where study_data and study_train wrote")
    parser.add_argument("--tasks", nargs="+", choices=SOURCES, required=True, metavar="TASK")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    results = files.read_json(options.out) if options.out.is_file() else {"tasks": {}}
    for task in options.tasks:
        kinds = {"merged": True, "gone": False}
        results["tasks"][task] = {kind: frontier(options.work, task, merge) for kind, merge in kinds.items()}
        results["machine"] = machine()
        files.write_json(options.out, results)
    print(report(results))


if __name__ == "__main__":
    main()
