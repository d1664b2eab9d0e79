"""Write a bundled model's README.md from its result files, so that no number is typed by hand.

minilpt eval sst-2 --data dev.tsv --model FOLDER --out FOLDER/results.json
minilpt eval imdb --data imdb_dev_2000.jsonl --repeats 1 --model FOLDER --out FOLDER/results-imdb.json
minilpt eval sst-2 --data dev.tsv --precision ibert --repeats 1 --model FOLDER --out FOLDER/results-ibert.json
python -m minilpt.weights.recipes.model_card FOLDER

For the model of pairs: `minilpt eval mnli` into results.json and results-snli.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..resolve import hashes
from . import card_texts


def results_table(results: dict[str, Any], title: str = "SST-2 dev") -> str:
    """Dense beside pruned, and their ratio, as a Markdown table."""
    variants, speedup = results["variants"], results["speedup"]
    dense, pruned = variants["dense"], variants["pruned"]
    rows = [[title, "accuracy", "GFLOPs counted", "GFLOPs executed", "seconds"], ["---"] * 5]
    for name, row in (("dense (`pruning=None`)", dense), ("pruned (default)", pruned)):
        numbers = [f"{row[key]:.4f}" for key in ("gflops_counted", "gflops_executed")]
        rows.append([name, f"{row['accuracy']:.2f}", *numbers, f"{row['seconds']:.2f}"])
    fewer = [f"**{dense[key] / pruned[key]:.2f} x less**" for key in ("gflops_counted", "gflops_executed")]
    faster = f"{speedup['median']:.2f} x faster ({speedup['min']:.2f} to {speedup['max']:.2f})"
    rows.append(["difference", f"{pruned['accuracy'] - dense['accuracy']:+.2f}", *fewer, faster])
    return _markdown(rows)


def card(folder: Path) -> str:
    """The card's text for a bundled model's folder, which holds the results of its commands, and the log."""
    return CARDS[folder.name](folder)


def _common(folder: Path, title: str) -> dict[str, Any]:
    """What every card shows of results.json and the training log."""
    results, log = _record(folder, "results"), _log(folder)
    start = next(record for record in reversed(log) if record.get("event") == "start")
    return {
        "table": results_table(results, title),
        "texts": results["texts"],
        "repeats": results["repeats"],
        "tokens": results["variants"]["dense"]["tokens"],
        "kept": ", ".join(f"{count:.1f}" for count in results["variants"]["pruned"]["kept_tokens"]),
        "machine": results["machine"],
        "versions": ", ".join(f"{name} {version}" for name, version in results["machine"]["versions"].items()),
        "train": start["train"],
        "held_out": start["held_out"],
        "stage": {record["stage"]: record["dev"]["accuracy"] for record in log if record.get("event") == "done"},
        "options": start["options"],
        "files": _markdown(
            [["file", "SHA-256"], ["---"] * 2, *([name, found] for name, found in hashes(folder).items())]
        ),
    }


def _sst2(folder: Path) -> str:
    common = _common(folder, "SST-2 dev")
    choices = [line["dev"]["dense"]["accuracy"] for line in _log(folder) if "dense" in line.get("dev", {})]
    return card_texts.SST2.format(
        **common,
        command_line=_command_line(common["options"]),
        looks=card_texts.SST2_LOOKS.format(low=min(choices), high=max(choices)),
        ranges=_record(folder, "integer")["provenance"]["texts"],
        integers=_of_integers(_record(folder, "results-ibert")),
        reviews=_of_reviews(_record(folder, "results-imdb")),
    )


def _nli(folder: Path) -> str:
    pruning, captions = _record(folder, "ltp"), _record(folder, "results-snli")
    rows = [["counted FLOPs, share of dense", "accuracy"], ["---"] * 2]
    for point in pruning["frontier"]:
        default = " (default)" if point["thresholds"] == pruning["thresholds"] else ""
        rows.append([f"{point['flops_ratio']:.2f}{default}", f"{point['metric']:.2f}"])
    return card_texts.NLI.format(
        **_common(folder, "MNLI-m dev"),
        points=_markdown(rows),
        choice=pruning["provenance"]["operating_point"],
        captions=_of_captions(captions),
    )


CARDS: Mapping[str, Callable[[Path], str]] = {"minilm-l6-ltp-sst2": _sst2, "minilm-l6-ltp-nli": _nli}


def _record(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def _log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]


def _markdown(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _of_captions(results: dict[str, Any]) -> str:
    """One sentence on `minilpt eval mnli` with the dev set of SNLI."""
    dense, pruned = results["variants"]["dense"], results["variants"]["pruned"]
    return (
        f"On the dev set of SNLI, captions of photographs, {results['texts']} pairs of {dense['tokens']:.1f} tokens: "
        f"{dense['accuracy']:.2f} dense and {pruned['accuracy']:.2f} pruned, at "
        f"{pruned['relative_flops_counted']:.2f} of the counted FLOPs (`results-snli.json`)."
    )


def _of_integers(results: dict[str, Any]) -> str:
    """One sentence on `minilpt eval sst-2 --precision ibert`."""
    dense, pruned = results["variants"]["dense"], results["variants"]["pruned"]
    return (
        f"SST-2 dev accuracy {dense['accuracy']:.2f} dense and {pruned['accuracy']:.2f} pruned, at "
        f"{pruned['relative_flops_counted']:.2f} of the counted FLOPs (`results-ibert.json`; the same command with "
        f"`--precision ibert`)."
    )


def _of_reviews(results: dict[str, Any]) -> str:
    """One sentence on the film reviews of `minilpt eval imdb`."""
    dense, pruned = results["variants"]["dense"], results["variants"]["pruned"]
    return (
        f"of {results['texts']} IMDB reviews of {dense['tokens']:.0f} tokens on average the pruned model gets "
        f"{pruned['accuracy']:.1f} % right and the dense one {dense['accuracy']:.1f} %, at "
        f"{pruned['relative_flops_counted']:.2f} of the counted FLOPs (`results-imdb.json`; every 12th of the training "
        f"split of the Large Movie Review Dataset, Maas et al., ACL 2011; an eighth of them served to choose the "
        f"limit, with an earlier model; `minilpt eval imdb --data {results['data']} --repeats {results['repeats']}`)."
    )


def _command_line(options: dict[str, Any]) -> str:
    """The options of a run that change its result, but for those that the recipe's defaults give."""
    epochs = " ".join(str(count) for count in options["epochs"])
    rest = f"--save-every {options['save_every']} --seed {options['seed']}{' --bf16' if options['bf16'] else ''}"
    pruning = " ".join(
        f"--{name.replace('_', '-')} {options[name]}" for name in ("flops", "temperature", "denominator_limit")
    )
    return f"--epochs {epochs} {pruning} {rest}"


def main() -> None:
    """Write README.md into the folder named on the command line."""
    folder = Path(sys.argv[1])
    (folder / "README.md").write_text(card(folder), encoding="utf-8")


if __name__ == "__main__":
    main()
