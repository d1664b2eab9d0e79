"""What the limits of a Tesla T4 allow, on paper: RoBERTa-base in float16 at MNLI lengths, dense and pruned, by layer.

    python -m benchmarks.t4_model          # writes results/t4_model.json and prints the tables of docs/cuda.md

No GPU is used and nothing is measured. Every kernel takes the larger of its bytes over the memory's rate and its
operations over the arithmetic's; launches, tails and caches are left out, so that a real card is slower. Legend: n live
tokens, m those that go on, D width, F inner width, H heads.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from datetime import date
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minilpt.config import ModelConfig, read_config
from minilpt.kernels.cuda import QUERIES

from . import files, workloads

RESULT = Path(__file__).parent / "results" / "t4_model.json"
# NVIDIA's T4 data sheet (2019): float16 tensor cores, float32, and memory.
TENSOR, FLOAT32, MEMORY = 65e12, 8.1e12, 320e9
BATCH_TOKENS = 4096  # that share one reading of the weights, as `predict` batches them
HALF = 2  # bytes
# Published for BERT-base on a T4, 128 tokens, batch 32, sequences a second: FasterTransformer's guide (the second with
# padding removed, mean length half), TensorRT's BERT demo; and what the LTP paper's first version gives as its gain.
PUBLISHED = {
    "FasterTransformer fp16, 128 tokens": 990,
    "FasterTransformer fp16, padding removed, mean 64 tokens": 1878,
    "TensorRT 8 fp16, 128 tokens": 874,
    "TensorRT 8 int8, 128 tokens": 1690,
}
PAPER_GAIN = 1.4


class Part(NamedTuple):
    """One kernel or product: bytes of memory, and operations at a rate."""

    moved_bytes: float
    operations: float
    rate: float

    def seconds(self) -> float:
        return max(self.moved_bytes / MEMORY, self.operations / self.rate)


Lengths = NDArray[np.int64]


def layer_parts(model: ModelConfig, n: Lengths, m: Lengths, batches: float, pruned: bool) -> dict[str, Part]:
    """The parts of one layer for sequences of n live tokens of which m go on. batches: readings of the weights."""
    D, F, H = model.width, model.inner, model.heads
    N, M = float(n.sum()), float(m.sum())

    def product(rows: float, inputs: int, outputs: int) -> Part:
        moved = HALF * (rows * (inputs + outputs) + batches * inputs * outputs)
        return Part(moved, 2 * rows * inputs * outputs, TENSOR)

    parts = {
        "query, key, value": product(N, D, 3 * D),
        "context": Part(HALF * (N * 2 * D + 2 * M * D), float((4 * n * m).sum()) * D, FLOAT32),
        "attention output": product(M, D, D),
        "residual and norm": Part(2 * HALF * 3 * M * D, 0, FLOAT32),
        "inner": product(M, D, F),
        "gelu": Part(HALF * 2 * M * F, 0, FLOAT32),
        "outer": product(M, F, D),
    }
    if pruned:
        partial = 4 * H * float((n * np.ceil(n / QUERIES)).sum())
        parts["masses"] = Part(HALF * N * 2 * D + partial, float((2 * n * n).sum()) * D, FLOAT32)
        parts["rule and compaction"] = Part(partial + 20 * N, 0, FLOAT32)
    return parts


def forward_times(model: ModelConfig, lengths: Lengths, fractions: Sequence[float] | None) -> list[dict[str, float]]:
    """Seconds of each part of each layer; fractions: of the tokens that go on behind each layer, None for dense."""
    batches, layers, n = float(lengths.sum()) / BATCH_TOKENS, [], lengths
    for layer in range(model.layers):
        last = layer == model.layers - 1
        m = n if fractions is None else np.maximum(1, np.rint(lengths * fractions[layer])).astype(np.int64)
        pruned = fractions is not None and layer > 0 and not last
        parts = layer_parts(model, n, np.ones_like(n) if last else m, batches, pruned)
        layers.append({name: part.seconds() for name, part in parts.items()})
        n = m
    return layers


def result() -> dict[str, Any]:
    rows = workloads.sequences("roberta-base", "mnli", workloads.LENGTHS["mnli"].sequences)
    lengths = np.array([len(row) for row in rows])
    with TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(workloads.SHAPES["roberta-base"].config))
        model = read_config(Path(folder))
    fractions = workloads.wanted_fractions(model, rows)
    dense, pruned = forward_times(model, lengths, None), forward_times(model, lengths, fractions)
    at_128 = np.full(256, 128)
    per_second = {name: len(rows) / _total(layers) for name, layers in (("dense", dense), ("pruned", pruned))}
    return {
        "date": date.today().isoformat(),
        "what": "a model on paper: the limits of a Tesla T4, nothing was measured",
        "limits": {"tensor_flops": TENSOR, "float32_flops": FLOAT32, "memory_bytes_per_s": MEMORY},
        "workload": workloads.describe(rows) | {"batch_tokens": BATCH_TOKENS},
        "counted_ratio": workloads.COUNTED_RATIO,
        "kept_fractions": fractions,
        "dense_s": dense,
        "pruned_s": pruned,
        "sequences_per_s": per_second,
        "dense_sequences_per_s_at_128_tokens": len(at_128) / _total(forward_times(model, at_128, None)),
        "gain": per_second["pruned"] / per_second["dense"],
        "published": {"sequences_per_s": PUBLISHED, "gain of LTP, arXiv 2107.00910v1": PAPER_GAIN},
    }


def _total(layers: Sequence[Mapping[str, float]]) -> float:
    return sum(sum(parts.values()) for parts in layers)


def tables(found: Mapping[str, Any]) -> str:
    """Microseconds a sequence, layer by layer; then sequences a second, beside what was published."""
    count = found["workload"]["sequences"]
    names = list(found["pruned_s"][1])
    head = ["us a sequence", *names, "layer"]
    lines = [_row(head), _row(["---"] * len(head))]
    for kind in ("dense", "pruned"):
        cells = [_times(parts, names, count) for parts in found[f"{kind}_s"]]
        for times, numbers in groupby(range(len(cells)), cells.__getitem__):
            first, *others = numbers
            title = f"layers {first} to {others[-1]}" if others else f"layer {first}"
            lines.append(_row([f"{kind}, {title}", *times]))
    lines += ["", _row(["on a T4", "sequences a second"]), _row(["---", "---"])]
    limits = found["sequences_per_s"]
    for kind in ("dense", "pruned"):
        title = f"limit of ours, fp16, {kind}, MNLI lengths (mean {found['workload']['mean']:.0f} tokens)"
        lines.append(_row([title, f"{limits[kind]:.0f}"]))
    for name, value in found["published"]["sequences_per_s"].items():
        lines.append(_row([f"published: {name}", str(value)]))
    return "\n".join(lines)


def _times(parts: Mapping[str, float], names: Sequence[str], count: int) -> list[str]:
    """Microseconds a sequence of each part, and of the layer."""
    times = [f"{1e6 * parts[name] / count:.1f}" if name in parts else "" for name in names]
    return [*times, f"{1e6 * sum(parts.values()) / count:.1f}"]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    found = result()
    files.write_text(RESULT, json.dumps(found, indent=2) + "\n")
    print(tables(found))


if __name__ == "__main__":
    main()
