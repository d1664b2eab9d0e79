"""Two ablations of the paper: rules set on short texts and used on long ones; learned thresholds against a manual ramp.

    python -m benchmarks.study_ablations --work WORK --tasks mrpc qnli nli     # after study_data and study_train
    python -m benchmarks.study_ablations --report

Lengths: each rule's one parameter is set to meet a share of the dense counted FLOPs on the shorter half of the
unlabelled texts, and then measured on the shortest and the longest quarter of the dev set. Learned against manual: on
the same weights, those tuned with the learned thresholds, which are scaled by one factor, beside a ramp.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import minilpt
from minilpt.evaluate import machine
from minilpt.tasks import TASKS, Example, gold, read_examples

from . import files
from .processes import ROOT
from .pruning_study import Measured, Rule, along, calibration, difference, family, met, sample
from .report import table
from .study_data import SOURCES

RESULTS = ROOT / "benchmarks" / "results" / "study_ablations.json"
SHORT_SHARE = 0.8  # what top-k reaches on six layers, of which it keeps three dense
SHARES = (0.8, 0.7, 0.6, 0.5)
TEXTS = 128  # that set a rule
LENGTH_RULES = {
    "calibrated": "calibrated (mass, no denominator)",
    "mass": "ramp on the mass, no denominator",
    "initial": "ramp, mass over the text's length",
    "learned": "learned, over at most 32",
    "topk": "top-k",
}


class Rows:
    """A task's labelled dev texts and unlabelled ones, shortest first, and its two models."""

    def __init__(self, work: Path, name: str):
        self.task, self.folder = TASKS[SOURCES[name].task], work / name
        self.plain, self.learned = (minilpt.load(work / name / kind) for kind in ("plain", "learned"))
        dev = sample(read_examples(self.folder / "dev.jsonl", self.task), SOURCES[name].measured_texts)
        self.dev = self._by_length(dev)
        self.unlabelled = [
            each.text for each in self._by_length(read_examples(self.folder / "calibrate.jsonl", self.task))
        ]

    def _by_length(self, examples: list[Example]) -> list[Example]:
        lengths = [len(ids) for ids in self.plain.encode([each.text for each in examples])[0]]
        return [examples[row] for row in sorted(range(len(examples)), key=lambda row: lengths[row])]

    def measured(self, model: minilpt.Classifier, rule: Rule, examples: Sequence[Example]) -> dict[str, Any]:
        """Share of the counted FLOPs, and lost points of the metric against the same weights without pruning."""
        texts, wanted = [each.text for each in examples], gold(examples, self.task, model.config.labels)
        pruned, dense = Measured(model, rule, texts), Measured(model, None, texts)
        return {"counted": pruned.counted, "difference": difference(pruned.answers, dense.answers, wanted, self.task)}


def lengths(rows: Rows) -> dict[str, Any]:
    """Every rule, set on short texts, on short and on long ones."""
    texts = sample(rows.unlabelled[: len(rows.unlabelled) // 2], TEXTS)
    quarter = len(rows.dev) // 4
    parts = {"short": rows.dev[:quarter], "long": rows.dev[-quarter:]}
    counts = {part: rows.plain.encode([each.text for each in some])[0] for part, some in parts.items()}
    found: dict[str, Any] = {"tokens": {part: sum(map(len, ids)) / len(ids) for part, ids in counts.items()}}
    for name in LENGTH_RULES:
        model = rows.learned if name == "learned" else rows.plain
        rule = _rule_of(name, model, texts, rows.folder)(SHORT_SHARE)
        found[name] = {part: rows.measured(model, rule, some) for part, some in parts.items()}
    return found


def _rule_of(name: str, model: minilpt.Classifier, texts: Sequence[Any], folder: Path) -> Callable[[float], Rule]:
    """The rule that meets a share on these texts."""
    if name == "calibrated":
        return along(calibration(model, texts, folder / "calibrated-short.json")["pruning"])
    if name in ("learned", "topk"):
        return family(name, model, texts)
    z = {"mass": 1, "initial": "initial"}[name]
    highest = {"mass": 4.0, "initial": 4 / 12}[name]

    def ramp(final: float) -> Rule:
        return {"rule": "ramp", "final_threshold": final, "score_denominator": z}

    return partial(met, low=0.0, high=highest, rule=ramp, counted=lambda rule: Measured(model, rule, texts).counted)


def manual(rows: Rows) -> dict[str, Any]:
    """Learned thresholds and a ramp on the weights that were tuned with the learned ones, at several shares."""
    texts = sample(rows.unlabelled, TEXTS)
    found = {}
    for name in ("learned", "ramp"):
        rules = [family(name, rows.learned, texts)(share) for share in SHARES]
        found[name] = [rows.measured(rows.learned, rule, rows.dev) for rule in rules]
    return found


def lengths_table(results: Mapping[str, Any]) -> str:
    """Counted share and points against dense, on short and long texts."""
    rows = [["task", "rule, set on short texts", "short: counted", "points", "long: counted", "points"]]
    for name, found in results["tasks"].items():
        tokens = found["lengths"]["tokens"]
        for rule, label in LENGTH_RULES.items():
            cells = [cell for part in ("short", "long") for cell in _cells(found["lengths"][rule][part])]
            rows.append([f"{name} ({tokens['short']:.0f} and {tokens['long']:.0f} tokens)", label, *cells])
    return table(rows)


def manual_table(results: Mapping[str, Any]) -> str:
    """Points against the same weights without pruning, at each share."""
    rows = [["task", "thresholds", *(f"{share:g}" for share in SHARES)]]
    for name, found in results["tasks"].items():
        for kind, label in (("learned", "learned, scaled"), ("ramp", "manual ramp")):
            cells = [" at ".join(reversed(_cells(each))) for each in found["manual"][kind]]
            rows.append([name, label, *cells])
    return table(rows)


def _cells(measured: Mapping[str, Any]) -> list[str]:
    lost, low, high = measured["difference"]
    return [f"{measured['counted']:.2f}", f"{-lost:+.1f} ({-high:+.1f} to {-low:+.1f})"]


def main() -> None:
    """Measure the tasks named and add them to the results, and print both tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study_ablations", description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, help="where study_data and study_train wrote")
    parser.add_argument("--tasks", nargs="+", choices=SOURCES, default=["mrpc", "qnli", "nli"], metavar="TASK")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="print the tables of what is measured already")
    options = parser.parse_args()
    results = files.read_json(options.out) if options.out.is_file() else {"tasks": {}}
    for name in [] if options.report else options.tasks:
        rows = Rows(options.work, name)
        results["tasks"][name] = {"lengths": lengths(rows), "manual": manual(rows)}
        results["machine"] = machine()
        files.write_json(options.out, results)
    print(lengths_table(results), manual_table(results), sep="\n\n")


if __name__ == "__main__":
    main()
