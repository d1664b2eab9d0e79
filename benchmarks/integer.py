"""Integer-only inference: what it costs in accuracy on real tasks, and its time beside our own float32 and int8.

    python -m benchmarks.integer accuracy --work WORK   # after study_data and study_train
    python -m benchmarks.integer speed                              # adds to the same results

Accuracy: each plain fine-tuned model is quantised with texts that no model was trained on (`minilpt quantize`, no
labels), and thresholds for 1.9 x fewer counted FLOPs are calibrated on the integers with the same texts; models tuned
with learned thresholds keep those. SST-2's is the bundled model. Everything is measured once, on the dev
set.

Speed: shapes with random weights and the lengths of MNLI's dev set, dense, verified against float32, then timed in
turn; and one row of GELU, softmax and LayerNorm (with its residual addition), integers beside float32.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import minilpt
from minilpt import ranges
from minilpt.evaluate import METRICS, machine
from minilpt.kernels import blocks, compiled, compiled_integer, integer
from minilpt.tasks import TASKS, gold, read_examples

from . import files, workloads
from .processes import ROOT
from .pruning_study import Measured, difference, sample
from .study_data import SOURCES

RESULTS = ROOT / "benchmarks" / "results" / "integer.json"
PREPARED = ROOT / "benchmarks" / "prepared"
FLOPS = 1 / 1.9
TASK_OF = {"sst-2": "sst-2", "mrpc": "mrpc", "nli": "mnli"}
SEQUENCES, ROUNDS = {"minilm-l6": 512, "roberta-base": 128}, 9
_ALIVE: list[Any] = []  # what timed calls point to
RANGE_SEQUENCES = 128  # that the ranges of random weights are read from


def accuracy(work: Path, name: str) -> dict[str, Any]:
    """The rows of one task: metric, counted FLOPs, points lost against the float32 model with 95 % of a bootstrap."""
    task = TASKS[TASK_OF[name]]
    dev = sample(read_examples(work / name / "dev.jsonl", task), SOURCES[name].measured_texts)
    unlabelled = [each.text for each in read_examples(work / name / "calibrate.jsonl", task)]
    learned = "minilm-l6-ltp-sst2" if name == "sst-2" else work / name / "learned"
    sources: dict[str, Any] = {"plain": work / name / "plain", "learned": learned}
    if not (work / name / "plain").is_dir():
        del sources["plain"]
    rows: dict[str, Any] = {}
    reference: Measured | None = None
    for kind, source in sources.items():
        floats = minilpt.load(source)
        texts, wanted = [each.text for each in dev], gold(dev, task, floats.config.labels)
        with tempfile.TemporaryDirectory() as room:
            target = Path(room, "integer")
            began = time.perf_counter()
            found = minilpt.quantize_model(floats.with_pruning(None), unlabelled, target)
            seconds = time.perf_counter() - began
            integers = minilpt.load(target, precision="ibert", pruning="auto")
        runs: dict[str, tuple[minilpt.Classifier, Any]] = {
            f"{kind}, float32": (floats, None),
            f"{kind}, integers": (integers, None),
        }
        if kind == "learned":
            assert floats.pruning is not None
            for title, model in (("float32", floats), ("integers", integers)):
                runs[f"{kind}, {title}, pruned"] = (model, floats.pruning)
        if kind == "plain" or "plain" not in sources:
            calibration = minilpt.calibrate(integers.with_pruning(None), unlabelled, flops_ratio=FLOPS)
            runs[f"{kind}, integers, calibrated"] = (integers, _rule(calibration))
        for title, (model, rule) in runs.items():
            measured = Measured(model, rule, texts)
            reference = reference or measured
            metrics = {metric: METRICS[metric](measured.answers, wanted) for metric in task.metrics}
            lost = difference(measured.answers, reference.answers, wanted, task)
            rows[title] = metrics | {"counted": measured.counted, "lost": lost}
            print(f"{name}: {title}: {metrics}, {measured.counted:.3f}, lost {lost[0]:.2f}", flush=True)
        rows[f"{kind}, quantising"] = {
            "seconds": seconds,
            "held_out_rms": found.held_out_rms[1],
            "agreement": found.agreement,
        }
    return {"texts": len(dev), "unlabelled": len(unlabelled), "rows": rows}


def _rule(calibration: minilpt.Calibration) -> Mapping[str, Any]:
    return {key: value for key, value in calibration.pruning.items() if key not in ("frontier", "provenance")}


def speed(shape: str) -> dict[str, Any]:
    """Sequences per second of the whole forward pass by precision, and float32's time over the integers'."""
    folder = PREPARED / shape
    if not (folder / "model.safetensors").is_file():
        workloads.write_checkpoint(folder, shape)
    rows = sorted(workloads.sequences(shape, "mnli", SEQUENCES[shape]), key=len)
    with tempfile.TemporaryDirectory() as room:
        target = Path(room, "integer")
        few = rows[:: max(1, len(rows) // RANGE_SEQUENCES)][:RANGE_SEQUENCES]
        plain = minilpt.load(folder, pruning=None)
        ranges.quantize_sequences(plain, few, [[0] * len(row) for row in few], target, search=False)
        models = {name: minilpt.load(folder, precision=name, pruning=None) for name in ("fp32", "int8")}
        models["ibert"] = minilpt.load(target, precision="ibert", pruning=None)
    logits = {name: model.forward(rows).logits for name, model in models.items()}
    apart = {name: float(np.abs(found - logits["fp32"]).mean()) for name, found in logits.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(ROUNDS + 1):
        for name, model in models.items():
            began = time.perf_counter()
            model.forward(rows)
            if turn:
                seconds[name].append(time.perf_counter() - began)
    ratios = [slow / fast for slow, fast in zip(seconds["fp32"], seconds["ibert"], strict=True)]
    return {
        "sequences": len(rows),
        "sequences_per_second": {name: len(rows) / statistics.median(found) for name, found in seconds.items()},
        "fp32_over_ibert": [statistics.median(ratios), min(ratios), max(ratios)],
        "mean_logit_difference": apart,
    }


def kernels() -> dict[str, Any]:
    """Nanoseconds of one row on one thread, integers and float32, and their ratio: the least of many calls."""
    draw, kept = np.random.default_rng(0), []  # type: Any, list[Any]
    rows = {"gelu": _gelu_rows(3072, draw, kept), "layer_norm": _norm_rows(768, draw, kept)}
    rows |= {f"softmax {n}": _softmax_rows(n, draw, kept) for n in (40, 128, 512)}
    nothing = _call(blocks.RUN_ACTIVATE, 0, 0, blocks.GELU)
    found = {}
    for name, (integers, floats) in rows.items():
        calls = {"integer": integers, "float": floats, "nothing": [nothing]}
        least = dict.fromkeys(calls, float("inf"))
        for _ in range(400):
            for kind, parts in calls.items():
                least[kind] = min(least[kind], sum(map(_nanoseconds, parts)))
        whole = {kind: least[kind] - len(calls[kind]) * least["nothing"] for kind in ("integer", "float")}
        found[name] = whole | {"ratio": whole["integer"] / whole["float"]}
    return found


Row = tuple[list[Callable[[], None]], list[Callable[[], None]]]


def _nanoseconds(call: Callable[[], None], times: int = 5) -> float:
    began = time.perf_counter_ns()
    for _ in range(times):
        call()
    return (time.perf_counter_ns() - began) / times


def _call(operation: int, *arguments: int) -> Callable[[], None]:
    """One call of a compiled operation, without the wrapper that `compiled.run` is."""
    block = np.array(arguments + (0,) * (10 - len(arguments)), np.int64)
    ignored = (ctypes.c_void_p * 2)()
    entry, place = compiled.entry(compiled.part_of(operation)), ctypes.addressof(ignored)
    call = partial(entry, place, place + 8, operation, block.ctypes.data)
    _ALIVE.extend([block, ignored])
    return call


def _gelu_rows(count: int, draw: Any, kept: list[Any]) -> Row:
    scale = (draw.uniform(0.5, 2, count) * 1e-4).astype(np.float32)
    constants = integer.gelu_constants(scale, np.float32(0.02))
    record = compiled_integer.ending_record(blocks.TO_8_BITS_GELU, constants, count, kept, largest=2**22)
    ending, x = np.array([record], blocks.ENDING), np.rint(draw.normal(0, 1, count) / scale).astype(np.int32)
    out, floats = np.empty(count, compiled_integer.item_type()), draw.standard_normal(count).astype(np.float32)
    kept += [ending, x, out, floats]
    places = (x.ctypes.data, count, ending.ctypes.data, out.ctypes.data)
    return [_call(blocks.RUN_INTEGER_ACTIVATE, *places)], [
        _call(blocks.RUN_ACTIVATE, floats.ctypes.data, count, blocks.GELU)
    ]


def _norm_rows(count: int, draw: Any, kept: list[Any]) -> Row:
    weight, bias = (draw.normal(mean, 0.2, count).astype(np.float32) for mean in (1, 0))
    constants = integer.norm_constants(weight, bias, np.float32(0.03))
    norm = np.array([compiled_integer.norm_record(constants, kept)], blocks.INTEGER_NORM)
    factors = [integer.dyadic(draw.uniform(low, 2 * low, count)) for low in (0.01, 100)]
    records = [compiled_integer.dyadic_record(factors[0], count, kept, largest=2**24)]
    records.append(compiled_integer.dyadic_record(factors[1], count, kept, largest=128))
    first, second = (np.array([record], blocks.DYADIC) for record in records)
    sums = draw.integers(-(2**23), 2**23, count).astype(np.int32)
    residual = compiled_integer.to_items(draw.integers(-128, 128, (1, count)))[0]
    room, out = np.empty(count, np.int32), np.empty(count, compiled_integer.item_type())
    floats = [draw.standard_normal(count).astype(np.float32) for _ in range(3)]
    eps = np.array([1e-5], np.float32)
    kept += [norm, first, second, sums, residual, room, out, *floats, eps, weight, bias]
    add = (sums, first, residual, second)
    places = (*(array.ctypes.data for array in add), count, room.ctypes.data)
    integers = [
        _call(blocks.RUN_ADD_REQUANTIZED, *places),
        _call(blocks.RUN_INTEGER_NORM, room.ctypes.data, count, norm.ctypes.data, out.ctypes.data),
    ]
    lines = (*floats, weight, bias)
    return integers, [_call(blocks.RUN_NORM, *(line.ctypes.data for line in lines), count, eps.ctypes.data)]


def _softmax_rows(n: int, draw: Any, kept: list[Any]) -> Row:
    constants = integer.exp_constants(np.float32(2e-4), np.float32(1 / 32767))
    exp = np.array([compiled_integer.exp_record(constants)], blocks.EXP)
    room = compiled.padded(n)
    scores = np.rint(draw.normal(0, 2, room) / 2e-4).astype(np.int32)
    probs, floats = np.empty(room, compiled_integer.item_type()), draw.normal(0, 2, room).astype(np.float32)
    one = np.ones(1, np.float32)
    kept += [exp, scores, probs, floats, one]
    places = (scores.ctypes.data, n, exp.ctypes.data, probs.ctypes.data, room, 0, 0)
    return [_call(blocks.RUN_INTEGER_SOFTMAX, *places)], [
        _call(blocks.RUN_SOFTMAX, floats.ctypes.data, n, one.ctypes.data)
    ]


def main() -> None:
    """Measure and add to the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.integer", description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("accuracy", "speed"))
    parser.add_argument("--work", type=Path, help="where study_data and study_train wrote")
    parser.add_argument("--tasks", nargs="+", choices=TASK_OF, default=[*TASK_OF], metavar="TASK")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    results = files.read_json(options.out) if options.out.is_file() else {}
    if options.part == "accuracy":
        for name in options.tasks:
            results.setdefault("accuracy", {})[name] = accuracy(options.work, name)
            results["machine"] = machine()
            files.write_json(options.out, results)
        return
    results["kernels"] = kernels()
    print(results["kernels"], flush=True)
    for shape in SEQUENCES:
        results.setdefault("speed", {})[shape] = speed(shape)
        print(shape, results["speed"][shape], flush=True)
    results["machine"] = machine()
    files.write_json(options.out, results)


if __name__ == "__main__":
    main()
