"""Commands that measure a model on texts: calibrate, quantize, eval."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import backends, records
from ..calibration import MOST_TEXTS, Calibration, Point, calibrate
from ..evaluate import evaluate, machine
from ..files import write_whole
from ..loading import load
from ..pruning import FILE_NAME
from ..ranges import quantize_model
from ..tasks import TASKS, dev_file, read_examples
from ..weights.cards import curated_names
from ..weights.resolve import DEFAULT, bundled_names, is_hub_name, resolve
from .options import (
    MODEL_HELP,
    add_engine_options,
    add_hub_options,
    add_input_options,
    add_model_options,
    add_progress_option,
    load_model,
    of_the_hub,
    positive,
)
from .rows import aligned, rows_of


def add(commands: Any) -> None:
    """Their parsers."""
    _add_calibrate(commands)
    _add_quantize(commands)
    _add_eval(commands)


def _add_calibrate(commands: Any) -> None:
    calibration = commands.add_parser("calibrate", help="find pruning thresholds for a model on texts without labels")
    calibration.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_hub_options(calibration)
    calibration.add_argument("input", metavar="FILE", help="some hundred texts of the kind that the model will see")
    add_input_options(calibration)
    calibration.add_argument("--flops-ratio", type=float, metavar="R", help="spend this share of the dense FLOPs")
    calibration.add_argument(
        "--agreement", type=float, metavar="A", help="keep the dense model's label for at least this share of texts"
    )
    calibration.add_argument(
        "--max-drop", type=float, metavar="POINTS", help="lose at most this much of the metric; needs --labels"
    )
    calibration.add_argument("--labels", metavar="COLUMN", help="read for --max-drop only")
    calibration.add_argument("--seed", type=int, default=0)
    calibration.add_argument(
        "--max-texts",
        type=positive,
        default=MOST_TEXTS,
        metavar="N",
        help=f"sampled if more (default: {MOST_TEXTS})",
    )
    calibration.add_argument("--out", metavar="FILE", help="default: ltp.json in the model's folder, if it has none")
    calibration.add_argument("--plot", metavar="FILE", help="draw the frontier; the ending says the format")
    add_progress_option(calibration, "on a terminal")
    add_engine_options(calibration)
    calibration.set_defaults(run=_calibrate, usage_error=calibration.error)


def _add_quantize(commands: Any) -> None:
    quantization = commands.add_parser("quantize", help="write a model's folder for integer-only inference")
    quantization.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_hub_options(quantization)
    quantization.add_argument("input", metavar="FILE", help="some hundred texts of the kind that the model will see")
    add_input_options(quantization)
    quantization.add_argument("--out", required=True, metavar="DIR", help="the folder to make")
    quantization.add_argument(
        "--by-channel",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="allow scales that differ by channel; a folder that has some loads in no other precision",
    )
    add_progress_option(quantization, "on a terminal")
    quantization.add_argument("--threads", type=positive, metavar="N", help="default: one for each usable core")
    quantization.set_defaults(run=_quantize)


def _add_eval(commands: Any) -> None:
    evaluation = commands.add_parser("eval", help="a task's metrics, FLOPs and time, dense beside pruned")
    evaluation.add_argument("task", choices=sorted(TASKS), metavar="TASK", help=", ".join(sorted(TASKS)))
    evaluation.add_argument("--data", required=True, metavar="PATH", help="a TSV, CSV or JSONL file, or GLUE's folder")
    evaluation.add_argument("--repeats", type=positive, default=3, metavar="N", help="timed runs of each variant")
    evaluation.add_argument("--format", choices=("json", "table"), default="table", help="of the output")
    evaluation.add_argument("--out", metavar="FILE", help="also write the JSON record to this file")
    add_model_options(evaluation)
    evaluation.set_defaults(run=_eval)


def _calibrate(options: argparse.Namespace) -> int:
    target = _where_to_save(options)
    model = load(
        options.model,
        **of_the_hub(options),
        pruning=None,
        threads=options.threads,
        precision=options.precision,
        device=options.device,
    )
    with rows_of(options) as rows:
        read = list(rows)
    texts = [records.text_of(place, row, options.text_column, options.pair_column) for place, row in read]
    labels = options.labels and [records.value_of(place, row, options.labels) for place, row in read]
    found = calibrate(
        model,
        texts,
        flops_ratio=options.flops_ratio,
        agreement=options.agreement,
        max_drop=options.max_drop,
        labels=labels,
        seed=options.seed,
        max_texts=options.max_texts,
        progress=sys.stderr.isatty() if options.progress is None else options.progress,
    )
    path = found.save(target)
    if options.plot:
        found.plot(options.plot)
    print(_calibration_table(found))
    print(f"minilpt: wrote {path}", file=sys.stderr)
    return 130 if found.interrupted else 0


def _where_to_save(options: argparse.Namespace) -> Path:
    """The file or folder, looked at before the search begins."""
    if options.out:
        if not Path(options.out).parent.is_dir():
            options.usage_error(f"--out {options.out}: there is no folder {Path(options.out).parent}")
        return Path(options.out)
    if is_hub_name(options.model) or options.model in curated_names():
        options.usage_error(f"--out FILE is needed: {options.model} is on the hub")
    source = resolve(options.model, **of_the_hub(options))
    if options.model in bundled_names():
        options.usage_error(f"--out FILE is needed: {options.model} is a bundled model")
    if (source.folder / FILE_NAME).exists():
        options.usage_error(f"--out FILE is needed: {source.folder / FILE_NAME} is there already")
    return source.folder


def _calibration_table(found: Calibration) -> str:
    """The frontier, with a mark at the point that was chosen, and what it was measured on."""

    def row(point: Point) -> list[str]:
        agreement = ["-" if share is None else f"{share:.3f}" for share in (point.agreement, point.agreement_lower)]
        metric = [] if point.metric is None else [f"{point.metric:.2f}"]
        ratios = f"{point.flops_ratio:.3f}", f"{point.executed_ratio:.3f}"
        return ["*" if point is found.chosen else "", *ratios, f"{point.kl:.4f}", *agreement, *metric]

    head = ["", "counted", "executed", "KL (nats)", "agreement", "at least"]
    head += [] if found.chosen.metric is None else ["metric"]
    texts = found.provenance["texts"]
    note = (
        f"FLOPs are shares of the dense model's; * is chosen. Measured on {texts['held_out']} texts that the search "
        f"(on {texts['search']} others) did not see; 'at least' holds with 95 % confidence"
    )
    return "\n".join([*aligned([head, *map(row, found.frontier)]), note])


def _quantize(options: argparse.Namespace) -> None:
    model = load(options.model, **of_the_hub(options), pruning=None, threads=options.threads, device="cpu")
    with rows_of(options) as rows:
        texts = [records.text_of(place, row, options.text_column, options.pair_column) for place, row in rows]
    wanted = sys.stderr.isatty() if options.progress is None else options.progress
    found = quantize_model(model, texts, options.out, by_channel=options.by_channel, progress=wanted)
    record = {
        "rms_of_logits": {"before": found.rms[0], "after": found.rms[1]},
        "held_out": {"before": found.held_out_rms[0], "after": found.held_out_rms[1], "agreement": found.agreement},
        "methods": dict(Counter(found.methods.values())),
        "precisions": ["ibert"] if found.scales.exponents else list(backends.PRECISIONS),
    }
    print(json.dumps(record, indent=2))
    print(f"minilpt: wrote {options.out}", file=sys.stderr)


def _eval(options: argparse.Namespace) -> None:
    task = TASKS[options.task]
    path = dev_file(Path(options.data), task)
    examples = read_examples(path, task)
    model = load_model(options)
    result = evaluate(model, examples, task, repeats=options.repeats)
    record = {
        "task": options.task,
        "data": path.name,
        "model": options.model or DEFAULT,
        "machine": machine() | {"backend": asdict(model.backend)},
        **result,
    }
    if options.out:
        write_whole(Path(options.out), json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2) if options.format == "json" else _eval_table(record))


def _eval_table(record: dict[str, Any]) -> str:
    """One row per variant, then the ratio of the times."""
    metrics = TASKS[record["task"]].metrics
    head = ["", *metrics, "GFLOPs counted", "executed", "of dense", "seconds", "live tokens after each layer"]
    table = [head]
    for name, row in record["variants"].items():
        kept = " ".join(f"{count:.1f}" for count in row["kept_tokens"])
        table.append(
            [
                name,
                *(f"{row[metric]:.2f}" for metric in metrics),
                f"{row['gflops_counted']:.4f}",
                f"{row['gflops_executed']:.4f}",
                f"{row['relative_flops_counted']:.3f}",
                f"{row['seconds']:.2f}",
                kept,
            ]
        )
    lines = aligned(table)
    if "speedup" in record:
        ratio = record["speedup"]
        lines.append(
            f"time dense / pruned: median {ratio['median']:.2f}, from {ratio['min']:.2f} to {ratio['max']:.2f}"
        )
    lines.append(f"{record['texts']} texts; FLOPs are means per text, 'of dense' is the counted ratio")
    return "\n".join(lines)
