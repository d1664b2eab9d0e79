"""The CUDA path on a real card, end to end, beside PyTorch in the same run.

    make gpu        # the tests on the card, and then this; or
    python -m benchmarks.gpu --out gpu.json [--sequences 512] [--rounds 5] [--shapes roberta-base ...]
    python -m benchmarks.gpu --report    # the table of docs/cuda.md, from the stored result

RoBERTa-base and MiniLM-L6 shapes with random weights, MNLI-like lengths, float32 and float16, dense and pruned to 0.53
of the counted FLOPs. PyTorch (with transformers and CUDA) gets batches sorted by length and padded. Every engine's
answers are checked before anything is timed, against the CPU's, pruned ones against its pruned ones, which is also the
warm-up. Every round runs all engines, one after another. A last pass of each is watched by PyTorch's profiler, which
tells how long the card's kernels ran. Needs CuPy, a CUDA build of PyTorch, and transformers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

import minilpt
from minilpt import cuda_device

from . import files, workloads

RESULT = Path(__file__).parent / "results" / "gpu.json"
BATCH_TOKENS = 16384
PRECISIONS = ("fp32", "fp16")
# Float16 rounds every stored value to 11 bits: logits of these shapes then lie some hundredths apart; a kernel that
# computes something else is off by more than their spread. A token whose mass lies at the threshold can go either way,
# and then its text's answer is another: of all tokens kept, at most this share may differ, and texts that keep as many
# in every layer have to agree.
LARGEST_DIFFERENCE = {"fp32": 1e-3, "fp16": 0.1}
MOST_OTHERS_KEPT = {"fp32": 1e-3, "fp16": 2e-2}
TORCH_DEVICE = "cuda"

Rows = Sequence[Sequence[int]]


class Answers(NamedTuple):
    """logits: (B, labels), in the order of the rows; kept: (layers, B) tokens, or None where nothing is pruned."""

    logits: Any
    kept: Any = None


Engine = Callable[[], Answers]


def ours(folder: Path, precision: str, pruning: Any, rows: Rows, device: str = "cuda") -> Engine:
    """Batches by length, as PyTorch's are, without the padding."""
    model = minilpt.load(folder, device=device, precision=precision, pruning=pruning)
    arrays = [np.array(row, np.int32) for row in rows]
    batches = [(places, [arrays[place] for place in places]) for places in _batches(rows)]

    def run() -> Answers:
        logits = np.empty((len(rows), len(model.classes_)), np.float32)
        kept = np.empty((model.config.layers, len(rows)), np.int64)
        for places, batch in batches:
            found = model.forward(batch)
            logits[places], kept[:, places] = found.logits, found.kept_tokens
        return Answers(logits, None if pruning is None else kept)

    return run


def torch_engine(folder: Path, precision: str, rows: Rows) -> Engine:
    import torch
    from transformers import AutoModelForSequenceClassification

    dtype = {"fp32": torch.float32, "fp16": torch.float16}[precision]
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).to(TORCH_DEVICE).eval()
    batches = [(places, *_padded([rows[place] for place in places])) for places in _batches(rows)]

    def run() -> Answers:
        out = np.empty((len(rows), model.config.num_labels), np.float32)
        with torch.inference_mode():
            for places, *padded in batches:
                ids, mask = (torch.from_numpy(array).to(TORCH_DEVICE) for array in padded)
                out[places] = model(ids, attention_mask=mask).logits.float().cpu().numpy()
        return Answers(out)

    return run


def why_no_torch() -> str | None:
    """Why PyTorch cannot run beside us, or None."""
    import torch

    if TORCH_DEVICE == "cuda" and not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} has no CUDA here: pip install torch==2.13.0 from an index with CUDA builds"
    return None


def _padded(rows: Rows) -> tuple[Any, Any]:
    longest = max(len(row) for row in rows)
    ids, mask = (np.zeros((len(rows), longest), np.int64) for _ in range(2))
    for n, row in enumerate(rows):
        ids[n, : len(row)], mask[n, : len(row)] = row, 1
    return ids, mask


def _batches(rows: Rows) -> list[list[int]]:
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
        thresholds = folder / "thresholds.json"
        workloads.write_thresholds(folder, rows, thresholds)
        engines: dict[str, Engine] = {}
        for precision in PRECISIONS:
            engines[f"minilpt {precision}"] = ours(folder, precision, None, rows)
            engines[f"minilpt {precision}, pruned"] = ours(folder, precision, thresholds, rows)
            if why_no_torch() is None:
                engines[f"PyTorch {precision}"] = torch_engine(folder, precision, rows)
        truths = {
            pruned: ours(folder, "fp32", thresholds if pruned else None, rows, "cpu")() for pruned in (False, True)
        }
        checks = {name: check(name, run(), truths["pruned" in name]) for name, run in engines.items()}
        speeds: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(rounds):
            for engine, run in engines.items():
                started = time.perf_counter()
                run()
                speeds[engine].append(count / (time.perf_counter() - started))
        busy = {engine: card_ms(run) for engine, run in engines.items()}
    return {"workload": workloads.describe(rows), "checks": checks, "sequences_per_s": speeds, "card_ms": busy}


def card_ms(run: Engine) -> float | None:
    """Milliseconds of one pass's kernels and copies, copies beside kernels counted too; None where nobody can tell."""
    if why_no_torch() is not None or TORCH_DEVICE != "cuda":
        return None
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
    return (
        sum(event.self_device_time_total for event in seen.key_averages() if event.device_type == DeviceType.CUDA) / 1e3
    )


def check(name: str, found: Answers, truth: Answers) -> dict[str, float]:
    """The largest difference of a logit and the share of tokens kept by one only; SystemExit if it is no rounding."""
    precision = next(precision for precision in PRECISIONS if precision in name)
    same, others = np.ones(len(found.logits), bool), 0.0
    if found.kept is not None:
        same = (found.kept == truth.kept).all(axis=0)
        others = float(np.abs(found.kept - truth.kept).sum() / truth.kept.sum())
    difference = float(np.abs(found.logits - truth.logits)[same].max(initial=0))
    if not (same.any() and others <= MOST_OTHERS_KEPT[precision] and difference <= LARGEST_DIFFERENCE[precision]):
        raise SystemExit(
            f"{name}: beside the CPU a logit is off by {difference} ({LARGEST_DIFFERENCE[precision]} is allowed), and "
            f"{others:.2g} of the tokens kept are others ({MOST_OTHERS_KEPT[precision]} is allowed); nothing was timed"
        )
    return {"logit": difference, "others_kept": others, "texts_compared": float(same.mean())}


def table(found: Mapping[str, Any]) -> str:
    """Markdown: median, lowest and highest sequences a second; the rounds' median ratio to PyTorch; the card's time."""
    lines = [f"left out: {found['left_out']}", ""] if found["left_out"] else []
    lines += ["| | sequences a second | of PyTorch's | kernels run, of a pass |", "| --- | --- | --- | --- |"]
    for shape, measured in found["shapes"].items():
        speeds, count = measured["sequences_per_s"], measured["workload"]["sequences"]
        for engine, mine in speeds.items():
            peer = speeds.get(f"PyTorch {next(precision for precision in PRECISIONS if precision in engine)}")
            ratio = statistics.median(a / b for a, b in zip(mine, peer, strict=True)) if peer else None
            middle, busy = statistics.median(mine), measured["card_ms"][engine]
            cells = (
                f"{shape}, {engine}",
                f"{middle:,.0f} ({min(mine):,.0f} to {max(mine):,.0f})",
                "" if ratio is None else f"{ratio:.2f} x",
                "" if busy is None else f"{busy:.1f} of {1e3 * count / middle:.1f} ms",
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--report", action="store_true", help="print the table of the stored result")
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", choices=workloads.SHAPES, default=list(workloads.SHAPES))
    options = parser.parse_args(arguments)
    if options.report:
        return print(table(files.read_json(RESULT)))
    try:
        device, left_out = cuda_device.find(), why_no_torch()
    except minilpt.MinilptError as error:
        raise SystemExit(str(error)) from None
    shapes = {shape: measure(shape, options.sequences, options.rounds) for shape in options.shapes}
    found = {
        "date": date.today().isoformat(),
        "card": device.name,
        "versions": {"minilpt": minilpt.__version__, "cupy": device.cp.__version__}
        | {name: version(name) for name in ("torch", "transformers")},
        "batch_tokens": BATCH_TOKENS,
        "left_out": left_out,
        "shapes": shapes,
    }
    files.write_text(options.out, json.dumps(found, indent=2) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
