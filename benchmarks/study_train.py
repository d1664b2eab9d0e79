"""Train the pruning study's models: for each task a plain one and two with weights tuned for pruning.

    python -m benchmarks.study_train --base MODEL_DIR --work WORK [--tasks mrpc rte] [--models plain learned tuned]

A stopped run continues. `learned` learns thresholds and weights (WORK/TASK/run holds its checkpoints, and the plain
model's); `tuned` takes the thresholds that `minilpt calibrate` finds for the plain model at the same share of the FLOPs
and tunes the weights, for as many epochs (WORK/TASK/tuning). WORK/TASK/MODEL are the exported models.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import minilpt
from minilpt.tasks import TASKS
from minilpt.weights.recipes import export, train_ltp

from . import files
from .pruning_study import CALIBRATED, along, calibration, unlabelled
from .study_data import SOURCES, Source

MODELS = ("plain", "learned", "tuned")
FLOPS = "0.5"  # of the dense ones, which thresholds are scaled to: 2 x fewer
SEED = "11"
TUNING_RATE = "1e-4"  # of weights for thresholds that do not come with them; at 1e-5 they hardly moved


def train(base: Path, folder: Path, source: Source, bf16: bool, *, learned: bool) -> None:
    """The dense stage and, if learned, those of LTP; the folders made of them."""
    stages = train_ltp.STAGES if learned else ("dense",)
    more = ["--base", str(base), "--run", str(folder / "run"), "--epochs", *map(str, source.epochs)]
    train_ltp.main([*more, *_options(folder, source, bf16), "--stages", *stages])
    labels = list(TASKS[source.task].labels)
    export.export(base, folder / "run", folder / "plain", labels, "dense")
    if learned:
        export.export(base, folder / "run", folder / "learned", labels, "hard")


def tune(folder: Path, source: Source, bf16: bool) -> None:
    """The plain model's weights for its calibrated thresholds, and the folder made of them."""
    plain, rule = folder / "plain", folder / "tuning.json"
    found = calibration(minilpt.load(plain), unlabelled(folder, source), folder / CALIBRATED)
    files.write_json(rule, along(found["pruning"])(float(FLOPS)))
    _, soft, hard = source.epochs
    more = ["--base", str(plain), "--run", str(folder / "tuning"), "--epochs", "0", "0", str(soft + hard)]
    more += ["--rule", str(rule), "--teachers", str(folder / "run"), "--hard-learning-rate", TUNING_RATE]
    train_ltp.main([*more, *_options(folder, source, bf16)])
    export.export(plain, folder / "tuning", folder / "tuned", list(TASKS[source.task].labels))


def _options(folder: Path, source: Source, bf16: bool) -> list[str]:
    data = ["--train", str(folder / "train.jsonl"), "--dev", str(folder / "dev.jsonl"), "--task", source.task]
    sizes = ["--max-tokens", str(source.max_tokens), "--flops", FLOPS, "--seed", SEED]
    return [*data, *sizes, "--save-every", _save_every(source), *(["--bf16"] if bf16 else [])]


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
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 matrix products where the CPU has them")
    options = parser.parse_args()
    os.nice(10)
    for name in options.tasks:
        folder, source = options.work / name, SOURCES[name]
        if {"plain", "learned"} & {*options.models}:
            train(options.base, folder, source, options.bf16, learned="learned" in options.models)
        if "tuned" in options.models:
            tune(folder, source, options.bf16)


if __name__ == "__main__":
    main()
