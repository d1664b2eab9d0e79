"""The CUDA path on a real card, end to end, beside PyTorch in the same run: nothing of it was ever measured yet.

    python -m benchmarks.gpu --out gpu.json [--sequences 512] [--rounds 5]

RoBERTa-base and MiniLM-L6 shapes with random weights, MNLI-like lengths, float32 and float16, dense and pruned to 0.53
of the counted FLOPs. PyTorch (with transformers and CUDA) gets batches sorted by length and padded. Answers are checked
before anything is timed; every round runs all engines, one after another. Needs CuPy, a CUDA build of PyTorch, and
transformers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import minilpt
from minilpt import cuda_device

from . import files, workloads

BATCH_TOKENS = 16384
# Float16 rounds every stored value to 11 bits: logits of these shapes then lie some hundredths apart; a kernel that
# computes something else is off by more than their spread.
LARGEST_DIFFERENCE = {"fp32": 1e-3, "fp16": 0.1}


def ours(folder: Path, precision: str, pruning: Any, rows: Sequence[Sequence[int]]) -> Callable[[], Any]:
    """All logits, in the order of rows."""
    model = minilpt.load(folder, device="cuda", precision=precision, pruning=pruning)
    batches = list(_batches(rows))

    def run() -> Any:
        out = np.empty((len(rows), len(model.classes_)), np.float32)
        for places in batches:
            out[places] = model.forward([rows[place] for place in places]).logits
        return out

    return run


def torch_engine(folder: Path, precision: str, rows: Sequence[Sequence[int]]) -> Callable[[], Any]:
    import torch
    from transformers import AutoModelForSequenceClassification

    dtype = {"fp32": torch.float32, "fp16": torch.float16}[precision]
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).cuda().eval()
    batches = [(places, *_padded([rows[place] for place in places])) for places in _batches(rows)]

    def run() -> Any:
        out = np.empty((len(rows), model.config.num_labels), np.float32)
        with torch.inference_mode():
            for places, ids, mask in batches:
                logits = model(torch.from_numpy(ids).cuda(), attention_mask=torch.from_numpy(mask).cuda()).logits
                out[places] = logits.float().cpu().numpy()
        return out

    return run


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    longest = max(len(row) for row in rows)
    ids, mask = (np.zeros((len(rows), longest), np.int64) for _ in range(2))
    for n, row in enumerate(rows):
        ids[n, : len(row)], mask[n, : len(row)] = row, 1
    return ids, mask


def _batches(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Places of the rows, longest first, in batches of at most BATCH_TOKENS tokens after padding."""
    batches: list[list[int]] = [[]]
    for place in sorted(range(len(rows)), key=lambda place: -len(rows[place])):
        if batches[-1] and (len(batches[-1]) + 1) * len(rows[batches[-1][0]]) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(place)
    return batches


def measure(shape: str, count: int, rounds: int) -> dict[str, Any]:
    """Sequences a second of every engine in every round; and how far each lies from the CPU's answers."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        workloads.write_checkpoint(folder, shape)
        rows = workloads.sequences(shape, "mnli", count)
        workloads.write_thresholds(folder, rows, folder / "thresholds.json")
        engines = {}
        for precision in ("fp32", "fp16"):
            engines[f"minilpt {precision}"] = ours(folder, precision, None, rows)
            engines[f"minilpt {precision}, pruned"] = ours(folder, precision, folder / "thresholds.json", rows)
            engines[f"PyTorch {precision}"] = torch_engine(folder, precision, rows)
        truth = minilpt.load(folder, device="cpu", pruning=None).forward(rows).logits
        differences = {name: _check(name, run(), truth) for name, run in engines.items() if "pruned" not in name}
        speeds: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(rounds):
            for engine, run in engines.items():
                started = time.perf_counter()
                run()
                speeds[engine].append(count / (time.perf_counter() - started))
    return {"workload": workloads.describe(rows), "differences": differences, "sequences_per_s": speeds}


def _check(name: str, found: Any, truth: Any) -> float:
    """The largest difference of a logit; SystemExit where it is no rounding."""
    difference = float(np.abs(found - truth).max())
    if not difference <= LARGEST_DIFFERENCE["fp16" if "fp16" in name else "fp32"]:
        raise SystemExit(f"{name}: a logit is off by {difference}; nothing was timed")
    return difference


def table(found: Mapping[str, Any]) -> str:
    """Median, lowest and highest sequences a second."""
    lines = []
    for shape, measured in found["shapes"].items():
        for engine, speeds in measured["sequences_per_s"].items():
            lines.append(f"{shape}  {engine}: {statistics.median(speeds):.0f} ({min(speeds):.0f} to {max(speeds):.0f})")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device = cuda_device.find()
    shapes = {shape: measure(shape, options.sequences, options.rounds) for shape in workloads.SHAPES}
    found = {
        "date": date.today().isoformat(),
        "card": device.name,
        "versions": {"minilpt": minilpt.__version__, "cupy": device.cp.__version__},
        "batch_tokens": BATCH_TOKENS,
        "shapes": shapes,
    }
    files.write_text(options.out, json.dumps(found, indent=2) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
