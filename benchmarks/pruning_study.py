"""Every way of pruning tokens beside the others, on every task: metric, FLOPs and time, against dense without padding.

    python -m benchmarks.pruning_study --work WORK              # after study_data and study_train; adds to the results
    python -m benchmarks.pruning_study --report

Operating points are chosen on unlabelled texts that no model was trained on, and then measured once on the dev set: for
each share of the dense counted FLOPs, every method's own parameter is set to meet it there. `calibrated`,
`ramp`, `topk` and `relative` prune the plain fine-tuned model; `learned` is the model whose weights were tuned with its
thresholds, all of them scaled by one factor for other shares.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import minilpt
from minilpt import pruning
from minilpt.evaluate import METRICS, machine
from minilpt.tasks import TASKS, Example, Task, gold, read_examples

from . import files
from .processes import ROOT
from .study_data import SOURCES

RESULTS = ROOT / "benchmarks" / "results" / "pruning_study.json"
RATIOS = (0.8, 0.7, 0.6, 0.526, 0.5, 0.4, 0.33, 0.25)  # 0.526 is 1.9 x fewer
CALIBRATED = "calibrated.json"  # in a task's folder
METHODS = ("calibrated", "learned", "ramp", "topk", "relative")
TIMED_AT, ROUNDS = 0.5, 7
RESAMPLES = 2000
BATCH = 128  # sequences in one traced forward pass
BISECTIONS = 9

Rule = Mapping[str, Any] | None


class Measured:
    """A model under a rule on a set of texts. answers: (B,) labels or scores."""

    def __init__(self, model: minilpt.Classifier, rule: Rule, texts: Sequence[Any]):
        pruned = model.with_pruning(rule)
        ids, segments = model.encode(texts)
        order = sorted(range(len(ids)), key=lambda row: -len(ids[row]))
        logits = np.zeros((len(ids), len(model.config.labels)), np.float32)
        counted = executed = dense = dense_executed = 0
        for at in range(0, len(order), BATCH):
            rows = order[at : at + BATCH]
            found = pruned.forward([ids[row] for row in rows], [segments[row] for row in rows], trace=True)
            assert found.attention_lengths is not None and found.ffn_lengths is not None
            assert found.counted_flops is not None
            logits[rows] = found.logits
            counted += int(found.counted_flops.sum())
            dense += int(found.dense_flops.sum())
            whole = np.broadcast_to(found.attention_lengths[0], found.ffn_lengths.shape)
            executed += _executed(model, found.attention_lengths, found.ffn_lengths)
            dense_executed += _executed(model, whole, whole)
        regression = model.config.problem_type == "regression"
        self.answers = logits[:, 0].astype(np.float64) if regression else logits.argmax(axis=1).astype(np.float64)
        self.counted, self.executed = counted / dense, executed / dense_executed
        self.gflops = counted / len(ids) / 1e9


def _executed(model: minilpt.Classifier, n_attention: Any, n_ffn: Any) -> int:
    """FLOPs that `predict` runs."""
    return int(pruning.executed_flops(model.config, n_attention, n_ffn, first_row_only=True).sum())


def met(share: float, low: float, high: float, rule: Callable[[float], Rule], counted: Callable[[Rule], float]) -> Rule:
    """The rule whose parameter, between `low` (prunes little) and `high`, just meets the share; None if none does."""
    if counted(rule(high)) > share:
        return None
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if counted(rule(middle)) <= share else (middle, high)
    return rule(high)


def study(work: Path, name: str, methods: Sequence[str], record: dict[str, Any], say: Callable[[str], None]) -> None:
    """Measure the methods on one task and put them into `record`, which may hold others."""
    source = SOURCES[name]
    task = TASKS[source.task]
    models = {kind: minilpt.load(work / name / kind) for kind in {"plain", *map(model_of, methods)}}
    plain = models["plain"]
    dev = sample(read_examples(work / name / "dev.jsonl", task), source.measured_texts)
    unlabelled = [each.text for each in read_examples(work / name / "calibrate.jsonl", task)]
    texts, wanted = [each.text for each in dev], gold(dev, task, plain.config.labels)
    dense = {kind: Measured(model, None, texts) for kind, model in models.items()}
    record |= {
        "texts": len(texts),
        "tokens": sum(map(len, plain.encode(texts)[0])) / len(texts),
        "layers": plain.config.layers,
    }
    for kind, measured in dense.items():
        scores = _scores(measured, task, wanted) | {"gflops": measured.gflops}
        record.setdefault("dense", {})[kind] = scores
    points, rules = (record.setdefault(key, {}) for key in ("points", "rules"))
    for method in methods:
        model = models[model_of(method)]
        if method == "calibrated":
            record["calibration"] = calibration(plain, unlabelled[: source.searched_texts], work / name / CALIBRATED)
            rule_of = along(record["calibration"].pop("pruning"))
        else:
            rule_of = family(method, model, unlabelled[: source.bisected_texts])
        points[method] = []
        for share, rule in ((share, rule_of(share)) for share in RATIOS):
            if rule is None:
                continue
            measured = Measured(model, rule, texts)
            points[method].append(
                {"share": share, "counted": measured.counted, "executed": measured.executed, "gflops": measured.gflops}
                | _scores(measured, task, wanted)
                | {"difference": difference(measured.answers, dense["plain"].answers, wanted, task)}
            )
            if share == TIMED_AT:
                rules[method] = rule
        say(f"{name}: {method} " + ", ".join(f"{p['counted']:.2f}: {p[task.metrics[0]]:.2f}" for p in points[method]))
    timed = {method: models[model_of(method)].with_pruning(rules[method]) for method in methods if method in rules}
    found = _speedups(plain.with_pruning(None), timed, texts[: source.timed_texts])
    record["speedup"] = record.get("speedup", {}) | found


def model_of(method: str) -> str:
    """The folder of the model that a method prunes."""
    return "learned" if method == "learned" else "plain"


def calibration(model: minilpt.Classifier, unlabelled: Sequence[Any], path: Path) -> dict[str, Any]:
    """What `minilpt.calibrate` finds on these texts, and how long it took; kept in the file, and read from there."""
    if not path.is_file():
        began = time.perf_counter()
        found = minilpt.calibrate(model, unlabelled, flops_ratio=min(RATIOS))
        seconds = time.perf_counter() - began
        files.write_json(path, {"texts": len(unlabelled), "seconds": seconds, "pruning": found.pruning})
    return files.read_json(path)


def along(pruning: Mapping[str, Any]) -> Callable[[float], Rule]:
    """The rule of a calibrated frontier for a share of the counted FLOPs."""

    def rule(share: float) -> Rule:
        points = [point for point in pruning["frontier"] if point["flops_ratio"] <= share]
        kept = {key: value for key, value in pruning.items() if key not in ("frontier", "provenance")}
        return kept | {"thresholds": points[0]["thresholds"]} if points else None

    return rule


def family(method: str, model: minilpt.Classifier, unlabelled: Sequence[Any]) -> Callable[[float], Rule]:
    """The rule of a method with one parameter that meets a share of the counted FLOPs on these texts."""
    stored = model.pruning.settings["thresholds"] if model.pruning else ()
    z: dict[str, Any] = {"score_denominator": "initial", "denominator_limit": 64}
    ranges: dict[str, tuple[float, float, Callable[[float], Rule]]] = {
        "learned": (0.1, 8.0, lambda factor: {"thresholds": [factor * value for value in stored]}),
        "ramp": (0.0, 4 / 12, lambda final: {"rule": "ramp", "final_threshold": final, **z}),
        "topk": (0.0, 1.0, lambda removed: {"rule": "topk", "token_keep_rate": 1 - removed}),
        "relative": (0.0, 0.999, lambda threshold: {"rule": "relative", "token_threshold": threshold}),
    }
    low, high, rule_of = ranges[method]
    return lambda share: met(share, low, high, rule_of, lambda rule: Measured(model, rule, unlabelled).counted)


def sample(examples: list[Example], count: int) -> list[Example]:
    """Evenly spaced rows of the file."""
    if len(examples) <= count:
        return examples
    return [examples[math.floor(at * len(examples) / count)] for at in range(count)]


def _scores(measured: Measured, task: Task, wanted: NDArray[np.floating]) -> dict[str, Any]:
    """The task's metrics, and the standard error of the first by bootstrap over the texts."""
    draw = np.random.default_rng(0)
    metric = METRICS[task.metrics[0]]
    rows = draw.integers(0, len(wanted), (RESAMPLES // 4, len(wanted)))
    spread = statistics.pstdev(metric(measured.answers[row], wanted[row]) for row in rows)
    return {name: METRICS[name](measured.answers, wanted) for name in task.metrics} | {"standard_error": spread}


def difference(
    answers: NDArray[np.floating], dense: NDArray[np.floating], wanted: NDArray[np.floating], task: Task
) -> list[float]:
    """Lost points of the first metric against the plain dense model: estimate, and 95 % of a paired bootstrap."""
    draw = np.random.default_rng(0)
    metric = METRICS[task.metrics[0]]
    lost = [
        metric(dense[row], wanted[row]) - metric(answers[row], wanted[row])
        for row in draw.integers(0, len(wanted), (RESAMPLES, len(wanted)))
    ]
    low, high = np.quantile(lost, [0.025, 0.975])
    return [metric(dense, wanted) - metric(answers, wanted), float(low), float(high)]


def _speedups(
    dense: minilpt.Classifier, pruned: Mapping[str, minilpt.Classifier], texts: Sequence[Any]
) -> dict[str, list[float]]:
    """Dense time over pruned time, median, lowest and highest of interleaved rounds after one to warm up."""
    ratios: dict[str, list[float]] = {name: [] for name in pruned}
    for turn in range(ROUNDS + 1):
        for name, model in pruned.items():
            seconds = []
            for each in (dense, model):
                began = time.perf_counter()
                each.logits(texts)
                seconds.append(time.perf_counter() - began)
            if turn:
                ratios[name].append(seconds[0] / seconds[1])
    return {name: [statistics.median(found), min(found), max(found)] for name, found in ratios.items()}


def main() -> None:
    """Run the tasks named and add them to the results, or write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruning_study", description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, help="where study_data and study_train wrote")
    parser.add_argument("--tasks", nargs="+", choices=SOURCES, default=[*SOURCES], metavar="TASK")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="tables and charts beside the results file")
    options = parser.parse_args()
    if options.report:
        from . import study_report

        study_report.write(files.read_json(options.out), options.out)
        return
    results = files.read_json(options.out) if options.out.is_file() else {"tasks": {}}
    for name in options.tasks:
        record = results["tasks"].setdefault(name, {})
        study(options.work, name, options.methods, record, lambda line: print(line, flush=True))
        results["machine"] = machine()
        files.write_json(options.out, results)


if __name__ == "__main__":
    main()
