"""Commands about models: models, info, export-golden, bundle."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from .. import __version__, backends
from ..api import pruning_of
from ..bundling import RUNGS, bundle, zipped
from ..config import read_config
from ..evaluate import machine
from ..golden import export_golden
from ..kernels import compiled, isa
from ..weights.cards import curated_names, read_card
from ..weights.resolve import Source, bundled_names, resolve
from .options import (
    MODEL_HELP,
    add_hub_options,
    add_model_options,
    load_model,
    of_the_hub,
)
from .rows import aligned


def add(commands: Any) -> None:
    """Their parsers."""
    _add_models(commands)
    _add_info(commands)
    _add_export_golden(commands)
    _add_bundle(commands)


def _add_models(commands: Any) -> None:
    commands.add_parser("models", help="list the names that minilpt knows").set_defaults(run=_models)


def _add_info(commands: Any) -> None:
    info = commands.add_parser("info", help="show versions, backends and a model's facts, as JSON")
    add_model_options(info)
    info.set_defaults(run=_info)


def _add_export_golden(commands: Any) -> None:
    golden = commands.add_parser("export-golden", help="write every integer of a model and of its way through texts")
    golden.add_argument("model", metavar="MODEL", help="a folder that minilpt quantize wrote, or trained with I-BERT")
    add_hub_options(golden)
    golden.add_argument("texts", nargs="+", metavar="TEXT")
    golden.add_argument("--out", required=True, metavar="FILE", help="a .safetensors file")
    golden.add_argument("--pruning", default="auto", metavar="auto|off|FILE", help="default: what the model holds")
    golden.set_defaults(run=_export_golden, threads=None, precision="ibert", device="cpu")


def _add_bundle(commands: Any) -> None:
    bundling = commands.add_parser("bundle", help="write a folder that runs a model without Numba, as in the cloud")
    bundling.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_hub_options(bundling)
    bundling.add_argument("--out", required=True, metavar="DIR", help="the folder to make")
    bundling.add_argument(
        "--isa",
        type=lambda text: tuple(text.split(",")),
        default=RUNGS,
        metavar="RUNG,...",
        help=f"instruction sets, of {', '.join(rung.name for rung in isa.LADDER)} (default: {','.join(RUNGS)})",
    )
    bundling.add_argument("--precision", choices=backends.PRECISIONS, default="fp32", help="default: fp32")
    bundling.add_argument("--zip", action="store_true", help="also write DIR.zip")
    bundling.set_defaults(run=_bundle)


def _models(options: argparse.Namespace) -> None:
    table = [[name, "bundled", "", "", ""] for name in bundled_names()]
    for card in map(read_card, curated_names()):
        state = "verified" if card.verified else "not verified"
        table.append([card.name, "curated", f"{card.flops_ratio:.0%}", f"{card.repository} at {card.revision}", state])
    print("\n".join(aligned(table)))
    print(
        "minilpt: a curated name is a hub's checkpoint; its first use searches thresholds for that share of the FLOPs. "
        "docs/names.md says what is not verified",
        file=sys.stderr,
    )


def _info(options: argparse.Namespace) -> None:
    """Looks only: weights are not read and kernels not compiled."""
    backend = backends.choose(options.device, options.precision, options.threads)
    source = resolve(options.model, **of_the_hub(options))
    config = source.labelled(read_config(source.folder))
    pruning = pruning_of(source, config, None if options.pruning == "off" else options.pruning)
    facts: dict[str, Any] = {
        "minilpt": __version__,
        "machine": machine(),
        "backend": {
            "name": backend.name,
            "device": backend.device,
            "precision": backend.precision,
            "threads": backend.threads,
            "rung": backend.rung,
            "unavailable": backends.unavailable(),
            "compiled": _compiled() if backend.name == "numba" else None,
        },
        "bundled": bundled_names(),
        "model": {
            "folder": str(source.folder),
            "repository": source.repository,
            "commit": source.commit,
            "curated": _curated(source),
            "model_type": config.model_type,
            "layers": config.layers,
            "heads": config.heads,
            "width": config.width,
            "inner": config.inner,
            "max_tokens": config.max_tokens,
            "labels": list(config.labels),
            "problem_type": config.problem_type,
            "pruning": pruning.to_json() if pruning else None,
        },
    }
    print(json.dumps(facts, indent=2))


def _curated(source: Source) -> dict[str, Any] | None:
    """What stands behind a curated name, and whether its thresholds have been searched."""
    if source.card is None or source.thresholds is None:
        return None
    return {
        "card": source.card.name,
        "verified": source.card.verified,
        "note": source.card.note,
        "thresholds": str(source.thresholds),
        "found": source.thresholds.is_file(),
    }


def _compiled() -> dict[str, Any]:
    """The instruction sets, and where the compiled kernels are kept."""
    files = [compiled.kernel_file(part) for part in compiled.PARTS]
    return {
        "rung": isa.chosen().name,
        "rungs_of_this_machine": [rung.name for rung in isa.usable()],
        "cache": {str(file): "there" if file.is_file() else "to be compiled" for file in files},
    }


def _export_golden(options: argparse.Namespace) -> None:
    path = export_golden(load_model(options), options.texts, options.out)
    print(f"minilpt: wrote {path}", file=sys.stderr)


def _bundle(options: argparse.Namespace) -> None:
    hub = of_the_hub(options)
    folder = bundle(options.model, options.out, rungs=options.isa, precision=options.precision, **hub)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"minilpt: wrote {folder}, {size / 1e6:.0f} MB", file=sys.stderr)
    if options.zip:
        print(f"minilpt: wrote {zipped(folder)}", file=sys.stderr)
