"""Train the pruning study's models: for each task a plain one and one with learned thresholds. A stopped run continues.

    python -m benchmarks.study_train --base MODEL_DIR --work WORK [--tasks mrpc rte] [--stages dense]

WORK/TASK/run holds checkpoints and the log, WORK/TASK/plain and WORK/TASK/learned the exported models.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from minilpt.tasks import TASKS
from minilpt.weights.recipes import export, train_ltp

from .study_data import SOURCES, Source

FLOPS = "0.5"  # of the dense ones, which the learned thresholds are scaled to: 2 x fewer
SEED = "11"


def train(base: Path, work: Path, name: str, stages: Sequence[str], bf16: bool) -> None:
    """One task's stages, and the folders made of them."""
    source, folder = SOURCES[name], work / name
    dense, soft, hard = source.epochs
    files = ["--train", str(folder / "train.jsonl"), "--dev", str(folder / "dev.jsonl")]
    sizes = ["--epochs", str(dense), str(soft), str(hard), "--max-tokens", str(source.max_tokens)]
    more = ["--flops", FLOPS, "--seed", SEED, "--save-every", _save_every(source), *(["--bf16"] if bf16 else [])]
    run = ["--base", str(base), "--task", source.task, "--run", str(folder / "run")]
    train_ltp.main([*run, *files, *sizes, *more, "--stages", *stages])
    labels = list(TASKS[source.task].labels)
    export.export(base, folder / "run", folder / "plain", labels, "dense")
    if "hard" in stages:
        export.export(base, folder / "run", folder / "learned", labels, "hard")


def _save_every(source: Source) -> str:
    if source.max_tokens > 128:  # a step takes some ten seconds
        return "50"
    return "250" if source.epochs[0] <= 3 else "100"


def main() -> None:
    """Train all tasks, or those named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study_train", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--base", type=Path, required=True, help="folder with config.json, model.safetensors, tokenizer"
    )
    parser.add_argument("--work", type=Path, required=True, help="where `study_data` wrote")
    parser.add_argument("--tasks", nargs="+", choices=SOURCES, default=[*SOURCES], metavar="TASK")
    parser.add_argument("--stages", nargs="+", choices=train_ltp.STAGES, default=train_ltp.STAGES, metavar="STAGE")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 matrix products where the CPU has them")
    options = parser.parse_args()
    os.nice(10)
    for name in options.tasks:
        train(options.base, options.work, name, options.stages, options.bf16)


if __name__ == "__main__":
    main()
