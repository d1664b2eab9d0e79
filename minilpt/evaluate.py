"""Task metrics, counted FLOPs and wall time of a model, dense beside pruned."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from .api import Classifier, Prediction
from .errors import DependencyError, InputError
from .tasks import Example, Task, Values, gold
from .text import TextOrPair
from .threads import usable_cores

TRACED_TEXTS = 64  # in one forward pass


def accuracy(predicted: Values, wanted: Values) -> float:
    """Percent of equal entries."""
    return float(100 * (predicted == wanted).mean())


def f1(predicted: Values, wanted: Values) -> float:
    """F1 of class 1, in percent; 0 where neither side holds one."""
    both = ((predicted == 1) & (wanted == 1)).sum()
    total = (predicted == 1).sum() + (wanted == 1).sum()
    return float(200 * both / total) if total else 0.0


def matthews(predicted: Values, wanted: Values) -> float:
    """Matthews correlation of two binary labellings, in percent; 0 where one side is constant."""
    if predicted.std() == 0 or wanted.std() == 0:
        return 0.0
    return float(100 * np.corrcoef(predicted, wanted)[0, 1])


def pearson(predicted: Values, wanted: Values) -> float:
    """Pearson correlation, in percent."""
    return float(100 * _scipy_stats().pearsonr(predicted, wanted).statistic)


def spearman(predicted: Values, wanted: Values) -> float:
    """Spearman rank correlation, in percent."""
    return float(100 * _scipy_stats().spearmanr(predicted, wanted).statistic)


def _scipy_stats() -> Any:
    try:
        from scipy import stats
    except ImportError:
        raise DependencyError("correlations need scipy: pip install 'minilpt[eval]'") from None
    return stats


METRICS: Mapping[str, Callable[[Values, Values], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def evaluate(model: Classifier, examples: Sequence[Example], task: Task, *, repeats: int = 3) -> dict[str, Any]:
    """Metrics, FLOPs and seconds of the model without and with its pruning, as one JSON-ready record.

    Both variants classify all texts `repeats` times in turn after one warm-up; their seconds (tokenisation included)
    are medians, and `speedup` holds the median, smallest and largest ratio of the pairs. Counted FLOPs follow Table I
    of the paper: rules evaluated in every layer, against the dense model without padding. A model without pruning has
    the dense variant only.
    """
    if not examples:
        raise InputError("there is nothing to evaluate: the file holds no rows")
    model.require_head()
    wanted = gold(examples, task, model.config.labels)
    texts = [example.text for example in examples]
    variants = {"dense": model.with_pruning(None)} | ({"pruned": model} if model.pruning else {})
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    predictions = {name: variant.predict(texts) for name, variant in variants.items()}  # warms up
    for _ in range(repeats):
        for name, variant in variants.items():
            began = time.perf_counter()
            variant.logits(texts)
            seconds[name].append(time.perf_counter() - began)
    report: dict[str, Any] = {"texts": len(texts), "repeats": repeats, "variants": {}}
    for name, variant in variants.items():
        answers = _answers(predictions[name], task)
        scores = {metric: METRICS[metric](answers, wanted) for metric in task.metrics}
        costs = _costs(variant, texts, predictions[name])
        report["variants"][name] = scores | costs | {"seconds": statistics.median(seconds[name])}
    if model.pruning:
        ratios = [dense / pruned for dense, pruned in zip(seconds["dense"], seconds["pruned"], strict=True)]
        report["speedup"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return report


def _answers(predictions: Sequence[Prediction], task: Task) -> Values:
    logits = np.array([prediction.logits for prediction in predictions])
    return logits.argmax(axis=1).astype(np.float64) if task.labels else logits[:, 0]


def _costs(model: Classifier, texts: Sequence[TextOrPair], predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Mean GFLOPs per text and mean live tokens after each layer; the rule of every layer needs a traced pass."""
    ids, segments = model.encode(texts)
    counted = 0
    kept = np.zeros(model.config.layers)
    for start in range(0, len(ids), TRACED_TEXTS):
        part = slice(start, start + TRACED_TEXTS)
        traced = model.forward(ids[part], segments[part], trace=True)
        assert traced.counted_flops is not None and traced.ffn_lengths is not None
        counted += int(traced.counted_flops.sum())
        kept += traced.ffn_lengths.sum(axis=1)
    executed = sum(prediction.executed_flops for prediction in predictions)
    dense = sum(prediction.dense_flops for prediction in predictions)
    return {
        "gflops_counted": counted / len(ids) / 1e9,
        "gflops_executed": executed / len(ids) / 1e9,
        "relative_flops_counted": counted / dense,
        "relative_flops_executed": executed / dense,
        "tokens": sum(len(row) for row in ids) / len(ids),
        "kept_tokens": (kept / len(ids)).tolist(),
    }


def _installed(package: str) -> bool:
    return find_spec(package) is not None


def machine() -> dict[str, Any]:
    """Where and with what a result was obtained: date, processor, cores, versions."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    packages = [name for name in ("minilpt", "numba", "numpy", "tokenizers", "safetensors") if _installed(name)]
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor,
        "cores": usable_cores(),
        "cores_of_machine": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
    }
