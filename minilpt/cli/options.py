"""What several commands take: their flags, and the model that these name."""

from __future__ import annotations

import argparse
from typing import Any

from .. import backends, records
from ..api import BATCH_TOKENS, Classifier
from ..loading import load
from ..truncation import AGGREGATES, MODES
from ..weights.resolve import DEFAULT

MODEL_HELP = "a name that minilpt models lists, a folder, or the hub's org/name"


def add_text_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("texts", nargs="*", metavar="TEXT")
    parser.add_argument("--input", metavar="FILE", help="take the rows of a file instead; - is standard input")
    add_input_options(parser)
    parser.add_argument("--truncation", choices=MODES, help="of long texts (default: what the tokenizer says, or head)")
    parser.add_argument("--stride", type=count, metavar="N", help="tokens that windows share (default: 0)")
    parser.add_argument("--aggregate", choices=AGGREGATES, help="of windows (default: mean)")
    parser.add_argument("--batch-tokens", type=positive, default=BATCH_TOKENS, metavar="N")
    add_progress_option(parser, "with --input, on a terminal")


def add_input_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input-format", choices=records.FORMATS, help="default: by the file's ending, else lines")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="in JSONL, CSV and TSV (default: text)")
    parser.add_argument("--pair-column", metavar="NAME", help="second texts of pairs (default: text_pair, if there)")


def add_progress_option(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=None,
        help=f"a progress bar on stderr (default: {default})",
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="MODEL", help=f"{MODEL_HELP} (default: {DEFAULT})")
    add_hub_options(parser)
    parser.add_argument("--pruning", default="auto", metavar="auto|off|FILE", help="default: what the model holds")
    add_engine_options(parser)


def add_hub_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub's repository (default: main)")
    parser.add_argument("--local-files-only", action="store_true", help="ask no hub: take what its cache here has")


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=positive, metavar="N", help="default: one for each usable core")
    parser.add_argument("--precision", choices=backends.PRECISIONS, default="fp32", help="default: fp32")
    parser.add_argument("--device", choices=backends.DEVICES, default="auto", help="default: a GPU if one is usable")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a positive integer was expected, found {text!r}")
    return int(text)


def count(text: str) -> int:
    return 0 if text == "0" else positive(text)


def of_the_hub(options: argparse.Namespace) -> dict[str, Any]:
    return {"revision": options.revision, "local_files_only": options.local_files_only}


def load_model(options: argparse.Namespace) -> Classifier:
    pruning = None if options.pruning == "off" else options.pruning
    model = load(
        options.model,
        **of_the_hub(options),
        pruning=pruning,
        threads=options.threads,
        precision=options.precision,
        device=options.device,
    )
    ratio = getattr(options, "flops_ratio", None)
    return model if ratio is None else model.with_flops_ratio(ratio)
