"""Fine-tune a BERT encoder on one of the tasks of `minilpt eval`, then learn LTP thresholds.

    python -m minilpt.weights.recipes.train_ltp --base MODEL_DIR --task sst-2 --train FILE --dev FILE --run RUN_DIR

Three stages, as in arXiv 2107.00910 section 3.3, each resumable from RUN_DIR and logged to RUN_DIR/log.jsonl:
`dense` fine-tunes; `soft` learns thresholds and weights under soft masks and the penalty
`lambda * sum_l mean(alive_l)`, then scales the thresholds by one factor so that the *hard* rule meets the FLOPs target
on held-out training sentences; `hard` tunes the weights under really removed tokens, every other batch without pruning,
and scales the thresholds again with every checkpoint. `soft` and `hard` also learn from the mean output of dense models
(--teachers: runs whose dense stage is done; the run's own where none are named). The word table stays as pretrained.
Each stage ends with an exponential average of its weights; `hard` takes the one with the best metrics, on the held-out
examples or, with --select dev, on the dev file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from ...evaluate import METRICS
from ...pruning import Pruning, Threshold, parse, read_pruning
from ...quantize import dequantize_rows, quantize_rows
from ...tasks import TASKS, Task, gold, read_examples
from ...threads import usable_cores
from ..checkpoint import SCALE_SUFFIX
from .ltp_bert import Shape, encoder_macs, forward, initial_head

FROZEN = "bert.embeddings.word_embeddings.weight"  # most dev words are rare in 67,000 phrases
STAGES = ("dense", "soft", "hard")
HELD_OUT = 1000  # training examples, or a tenth of a small file's
SCALED_BY = 250  # held-out examples that the thresholds are scaled by
AVERAGE_DECAY = 0.999  # of the weights, over about one epoch of 1,000 steps


@dataclass(frozen=True)
class Stage:
    """One training stage. The learning rates fall linearly to zero after a warm-up of 6 % of the steps."""

    name: str
    epochs: float
    learning_rate: float
    pruning: str  # "none", "soft" or "hard"
    threshold_learning_rate: float = 0.0


@dataclass(frozen=True)
class Batch:
    """ids, segments (B, S) int64, mask (B, S) bool, labels (B,) float32, rows (B,) int64: places among the examples."""

    ids: Tensor
    segments: Tensor
    mask: Tensor
    labels: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Examples:
    """Tokenised texts or pairs with their labels (class numbers or scores), and the batches drawn from them."""

    texts: list[str | tuple[str, str]]
    labels: Tensor
    ids: list[list[int]]
    segments: list[list[int]]

    @classmethod
    def read(cls, paths: list[Path], task: Task, tokenizer: Tokenizer) -> Examples:
        """All rows of the files, with the columns of the task."""
        rows = [row for path in paths for row in read_examples(path, task)]
        texts = [text.strip() if isinstance(text := row.text, str) else text for row in rows]
        encodings = tokenizer.encode_batch(texts)
        labels = torch.from_numpy(gold(rows, task, task.labels)).float()
        return cls(texts, labels, [each.ids for each in encodings], [each.type_ids for each in encodings])

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: list[int]) -> Batch:
        """Pad the rows to their longest."""
        ids = torch.zeros(len(rows), max(len(self.ids[row]) for row in rows), dtype=torch.long)
        mask, segments = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids)
        for at, row in enumerate(rows):
            ids[at, : len(self.ids[row])] = torch.tensor(self.ids[row])
            segments[at, : len(self.ids[row])] = torch.tensor(self.segments[row])
            mask[at, : len(self.ids[row])] = True
        return Batch(ids, segments, mask, self.labels[rows], torch.tensor(rows))

    def by_length(self, rows: list[int], size: int) -> Iterator[Batch]:
        """Every row once, sorted by length: for evaluation."""
        rows = sorted(rows, key=lambda row: len(self.ids[row]))
        return (self.batch(rows[at : at + size]) for at in range(0, len(rows), size))

    def shuffled(self, rows: list[int], size: int, seed: int, pool: int = 64) -> list[list[int]]:
        """One epoch of shuffled batches; sorting inside pools of 64 batches keeps the padding small."""
        draw = torch.Generator().manual_seed(seed)
        order = [rows[at] for at in torch.randperm(len(rows), generator=draw).tolist()]
        batches: list[list[int]] = []
        for start in range(0, len(order), size * pool):
            chunk = sorted(order[start : start + size * pool], key=lambda row: len(self.ids[row]))
            batches += [chunk[at : at + size] for at in range(0, len(chunk), size)]
        return [batches[at] for at in torch.randperm(len(batches), generator=draw).tolist()]


class Trainer:
    """Parameters, thresholds and the run folder; `run(stage)` continues from wherever the last call stopped."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.task = options, TASKS[options.task]
        self.outputs = max(1, len(self.task.labels))
        self.folder = Path(options.run)
        self.folder.mkdir(parents=True, exist_ok=True)
        base = Path(options.base)
        config = json.loads((base / "config.json").read_text())
        self.shape = Shape(
            config["num_hidden_layers"],
            config["num_attention_heads"],
            config["layer_norm_eps"],
            config.get("hidden_dropout_prob", 0.1),  # BERT's default
        )
        self.widths = config["hidden_size"], config["intermediate_size"]
        tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(options.max_tokens)
        self.train = Examples.read([*map(Path, options.train)], self.task, tokenizer)
        self.dev = Examples.read([Path(options.dev)], self.task, tokenizer)
        # Whole sentences (they end in a full stop) resemble SST-2's dev set; the rest of its train set are phrases.
        phrases = options.task == "sst-2"
        whole = [row for row, text in enumerate(self.train.texts) if not phrases or text[-1:] == "."]
        draw = torch.Generator().manual_seed(options.seed)
        count = min(HELD_OUT, len(self.train) // 10)
        self.held_out = [whole[at] for at in torch.randperm(len(whole), generator=draw)[:count].tolist()]
        held = {self.train.texts[row] for row in self.held_out}
        self.rows = [row for row, text in enumerate(self.train.texts) if text not in held]
        self.params = self._base_parameters(base)
        self.pruning = self._first_pruning()
        self.thresholds = torch.tensor(self.rule.thresholds)
        self.average: dict[str, Tensor] = {}

    def _first_pruning(self) -> Pruning:
        """The rule named, or a ramp for `soft` to begin with."""
        layers = self.shape.layers
        if self.options.rule:
            return read_pruning(Path(self.options.rule), layers)
        ramp = [self.options.final_threshold * (layer + 1) / layers for layer in range(layers)]
        record = {"rule": "threshold", "thresholds": ramp, "score_denominator": "initial"}
        return parse(record | {"denominator_limit": self.options.denominator_limit}, layers, "the first thresholds")

    @property
    def rule(self) -> Threshold:
        assert isinstance(self.pruning.rule, Threshold)
        return self.pruning.rule

    def _base_parameters(self, base: Path) -> dict[str, Tensor]:
        """The base's tensors under `bert.`, with its pooler and classifier, or fresh ones where it has none."""
        stored = load_file(base / "model.safetensors")
        params = initial_head(self.widths[0], labels=self.outputs, seed=self.options.seed)
        for name, tensor in stored.items():
            if name.endswith(("position_ids", SCALE_SUFFIX)):
                continue
            if name + SCALE_SUFFIX in stored:
                tensor = torch.from_numpy(dequantize_rows(tensor.numpy(), stored[name + SCALE_SUFFIX].numpy()))
            inside = name.removeprefix("bert.")
            if inside.startswith(("embeddings.", "encoder.", "pooler.")):
                params[f"bert.{inside}"] = tensor.float()
            elif inside in params and params[inside].shape == tensor.shape:  # a classifier of this task's kind
                params[inside] = tensor.float()
        return params

    def log(self, **record: object) -> None:
        line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S"), **record})
        print(line, flush=True)
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def save(self, name: str, **more: object) -> None:
        """Write a checkpoint whole or not at all."""
        target = self.folder / f"{name}.pt"
        rule = {key: value for key, value in self.pruning.settings.items() if key != "frontier"}
        state = {"params": self.params, "thresholds": self.thresholds, "rule": rule, **more}
        torch.save(state, target.with_suffix(".tmp"))
        os.replace(target.with_suffix(".tmp"), target)

    def restore(self, name: str) -> dict[str, Any] | None:
        path = self.folder / f"{name}.pt"
        if not path.exists():
            return None
        state = torch.load(path, weights_only=True)
        self.params, self.thresholds = state["params"], state["thresholds"]
        return state

    def run(self, stage: Stage) -> None:
        if self.restore(stage.name):
            return self.log(stage=stage.name, event="already done")
        batches = [
            rows
            for epoch in range(math.ceil(stage.epochs))
            for rows in self.train.shuffled(self.rows, self.options.batch, self.options.seed * 1000 + epoch)
        ]
        del batches[round(len(batches) * stage.epochs / max(1, math.ceil(stage.epochs))) :]
        targets = self._targets(stage) if batches else torch.empty(0)
        state = self.restore(f"{stage.name}-partial")
        start = state["step"] if state else 0
        best = state["best"] if state else {"sum": -math.inf}
        self.average = state["average"] if state else {name: p.clone() for name, p in self._trained().items()}
        optimizer = self._optimizer(stage)
        if state:
            optimizer.load_state_dict(state["optimizer"])
        began = time.perf_counter()
        for step in range(start, len(batches)):
            torch.manual_seed(self.options.seed * 1_000_003 + step)  # dropout repeats after a resume
            self._set_rates(optimizer, stage, step / len(batches))
            pruning = (
                "none" if stage.pruning == "hard" and step % 2 else stage.pruning
            )  # the dense model stays good too
            batch = self.train.batch(batches[step])
            loss = self._loss(batch, targets[batch.rows], pruning)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self._trained().values(), 1.0)
            optimizer.step()
            self._update_average(step)
            if (step + 1) % 100 == 0:
                seconds = (time.perf_counter() - began) / (step + 1 - start)
                self.log(stage=stage.name, step=step + 1, of=len(batches), loss=loss.item(), s_per_step=seconds)
            if (step + 1) % self.options.save_every == 0:
                if stage.pruning == "hard":
                    best = self._better(best, step + 1)
                else:
                    held = self.evaluate(self.train, self.held_out, stage.pruning == "soft")
                    self.log(stage=stage.name, step=step + 1, held_out=held, thresholds=self.thresholds.tolist())
                self.save(
                    f"{stage.name}-partial",
                    step=step + 1,
                    average=self.average,
                    optimizer=optimizer.state_dict(),
                    best=best,
                )
        for tensor in (*self.params.values(), self.thresholds):
            tensor.requires_grad_(False)
        if stage.pruning == "hard":
            best = self._better(best, len(batches))
            self.average, self.thresholds = best["average"], best["thresholds"]
        self.params |= self.average
        if stage.pruning != "none":
            self._meet_target()
        report = self.evaluate(self.dev, list(range(len(self.dev))), stage.pruning != "none")
        self.log(stage=stage.name, event="done", dev=report, thresholds=self.thresholds.tolist())
        self.save(stage.name)

    def _better(self, best: dict[str, Any], step: int) -> dict[str, Any]:
        """The averaged weights of this step if their metrics, dense plus pruned, are the highest yet, else `best`.

        Measured as they will be stored, as int8 rows. As the weights move, so do the scores: the thresholds are scaled
        to the FLOPs target again first.
        """
        trained = self.params
        self.params = _as_stored(trained | self.average)
        self._meet_target()
        examples, rows = self.train, self.held_out
        if self.options.select == "dev":
            examples, rows = self.dev, list(range(len(self.dev)))
        found = {name: self.evaluate(examples, rows, name == "pruned") for name in ("dense", "pruned")}
        self.params = trained
        self.log(stage="hard", step=step, **{self.options.select.replace("-", "_"): found})
        total = sum(measured[self.task.metrics[0]] for measured in found.values())
        if "average" in best and not total > best["sum"]:  # NaN, of constant answers, never wins
            return best
        average = {name: tensor.clone() for name, tensor in self.average.items()}
        return {"sum": total, "step": step, "thresholds": self.thresholds, "average": average}

    def _meet_target(self) -> None:
        """Scale all thresholds by one factor so that the hard rule meets the FLOPs target on held-out sentences."""
        learned = self.thresholds
        low, high = 0.25, 4.0
        for _ in range(8):
            middle = math.sqrt(low * high)
            self.thresholds = learned * middle
            held = self.evaluate(self.train, self.held_out[:SCALED_BY], pruned=True)
            low, high = (low, middle) if held["relative_flops"] <= self.options.flops else (middle, high)
        self.thresholds = learned * high
        self.log(factor=high, held_out=self.evaluate(self.train, self.held_out, pruned=True))

    def _trained(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.params.items() if name != FROZEN}

    @torch.no_grad()
    def _update_average(self, step: int) -> None:
        decay = min(AVERAGE_DECAY, (1 + step) / (10 + step))  # the first steps count less
        for name, tensor in self._trained().items():
            self.average[name].lerp_(tensor, 1 - decay)

    def _optimizer(self, stage: Stage) -> torch.optim.Optimizer:
        trained = self._trained().values()
        for tensor in trained:
            tensor.requires_grad_(True)
        decayed = [tensor for tensor in trained if tensor.ndim == 2]
        plain = [tensor for tensor in trained if tensor.ndim != 2]
        groups = [
            {"params": decayed, "weight_decay": 0.01, "peak": stage.learning_rate},
            {"params": plain, "weight_decay": 0.0, "peak": stage.learning_rate},
        ]
        if stage.pruning == "soft":
            self.thresholds.requires_grad_(True)
            groups.append({"params": [self.thresholds], "weight_decay": 0.0, "peak": stage.threshold_learning_rate})
        return torch.optim.AdamW(groups, lr=stage.learning_rate, fused=True)

    def _set_rates(self, optimizer: torch.optim.Optimizer, stage: Stage, done: float) -> None:
        """Linear warm-up over the first 6 %, then linear decay; thresholds keep a constant rate."""
        factor = min(done / 0.06, (1 - done) / 0.94)
        for group in optimizer.param_groups:
            is_threshold = group["params"][0] is self.thresholds
            group["lr"] = group["peak"] * (1.0 if is_threshold else factor)

    def _loss(self, batch: Batch, targets: Tensor, pruning: str) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.options.bf16):
            logits, alive = forward(
                self.params,
                self.shape,
                batch.ids,
                batch.mask,
                batch.segments,
                rule=None if pruning == "none" else self.rule,
                thresholds=self.thresholds,
                temperature=self.options.temperature if pruning == "soft" else None,
                train=True,
            )
        loss = F.cross_entropy(logits, targets) if self.task.labels else F.mse_loss(logits, targets)
        if pruning == "soft":
            loss = loss + self.options.lambda_ * alive[:, batch.mask].mean(1).sum()
        return loss

    def _targets(self, stage: Stage) -> Tensor:
        """Probabilities or scores to learn, (rows, labels): the label, and later on its mean with the teachers'."""
        labels = self.train.labels[:, None]
        if self.task.labels:
            labels = F.one_hot(self.train.labels.long(), self.outputs).float()
        if stage.pruning == "none":
            return labels
        taught = self._taught()
        return (labels + (torch.softmax(taught, -1) if self.task.labels else taught)) / 2

    @torch.no_grad()
    def _taught(self) -> Tensor:
        """Mean log-probabilities (or scores) of the teachers on the training files, (rows, labels); once per run."""
        path, teachers = self.folder / "teacher.pt", [*map(Path, self.options.teachers)] or [self.folder]
        names = [teacher.name for teacher in teachers]
        if not path.exists():
            outputs = torch.zeros(len(self.train), self.outputs)
            for run in teachers:
                dense = torch.load(run / "dense.pt", weights_only=True)["params"]
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.options.bf16):
                    for batch in self.train.by_length(list(range(len(self.train))), 256):
                        found = forward(dense, self.shape, batch.ids, batch.mask, batch.segments)[0]
                        outputs[batch.rows] += torch.log_softmax(found, -1) if self.task.labels else found
            torch.save({"outputs": outputs / len(teachers), "teachers": names}, path)
        stored = torch.load(path, weights_only=True)
        if stored["teachers"] != names:
            raise SystemExit(f"{path} holds what {stored['teachers']} said, not {names}; use another --run")
        return stored["outputs"]

    @torch.no_grad()
    def evaluate(self, examples: Examples, rows: list[int], pruned: bool) -> dict[str, float]:
        """The task's first metric and counted FLOPs of the hard rule (or of the dense model), in fp32."""
        answers, labels, macs, dense_macs = [], [], 0.0, 0.0
        rule = self.rule if pruned else None
        for batch in examples.by_length(rows, 128):
            logits, alive = forward(
                self.params, self.shape, batch.ids, batch.mask, batch.segments, rule=rule, thresholds=self.thresholds
            )
            answers.append(logits.argmax(1).float() if self.task.labels else logits[:, 0])
            labels.append(batch.labels)
            counted, dense = encoder_macs(alive, batch.mask, *self.widths)
            macs, dense_macs = macs + counted, dense_macs + dense
        metric = self.task.metrics[0]
        value = METRICS[metric](torch.cat(answers).double().numpy(), torch.cat(labels).double().numpy())
        return {metric: value, "relative_flops": macs / dense_macs}


def _as_stored(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters after `export` has stored them and `minilpt.load` has read them: matrices through int8 rows."""
    return {
        name: torch.from_numpy(dequantize_rows(*quantize_rows(tensor.detach().numpy()))) if tensor.ndim == 2 else tensor
        for name, tensor in params.items()
    }


def main(argv: list[str] | None = None) -> None:
    """Command line: run or continue all three stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="folder with config.json, tokenizer.json, model.safetensors")
    parser.add_argument("--task", required=True, choices=sorted(TASKS), help="names the columns and the metric")
    parser.add_argument("--train", required=True, nargs="+", metavar="FILE", help="TSV, CSV or JSONL")
    parser.add_argument("--dev", required=True, metavar="FILE", help="measured after each stage")
    parser.add_argument("--select", choices=("held-out", "dev"), default="held-out", help="what `hard` is chosen by")
    parser.add_argument("--max-tokens", type=int, default=128, help="longer texts are cut")
    parser.add_argument("--run", required=True, help="folder for checkpoints and the log; an old one is continued")
    parser.add_argument(
        "--teachers", nargs="*", default=[], metavar="RUN", help="folders of runs whose dense stage is done"
    )
    parser.add_argument("--flops", type=float, default=0.54, help="relative FLOPs that thresholds are scaled to")
    parser.add_argument(
        "--lambda", dest="lambda_", type=float, default=0.1, help="weight of the penalty on alive tokens"
    )
    parser.add_argument("--temperature", type=float, default=1e-3, help="of the soft rule's sigmoid")
    parser.add_argument(
        "--denominator-limit", type=int, default=32, help="of the score: longer texts count as this many tokens"
    )
    parser.add_argument("--final-threshold", type=float, default=0.012, help="last layer's threshold at the start")
    parser.add_argument(
        "--rule",
        metavar="FILE",
        help="ltp.json with thresholds that `hard` tunes the weights for, instead of learned ones",
    )
    parser.add_argument("--epochs", type=float, nargs=3, default=(2, 0.36, 1.4), metavar="N", help="dense, soft, hard")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="what to run now; all by default")
    parser.add_argument("--learning-rate", type=float, default=5e-5, help="highest of the dense stage")
    parser.add_argument("--hard-learning-rate", type=float, default=1e-5, help="highest of the hard stage")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=250, metavar="STEPS", help="checkpoint and held-out check")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--bf16", action="store_true", help="bfloat16 matrix products where the CPU has them")
    options = parser.parse_args(argv)
    if options.rule and options.epochs[1]:
        parser.error("--rule takes the place of the soft stage: --epochs DENSE 0 HARD")
    torch.set_num_threads(options.threads)
    trainer = Trainer(options)
    trainer.log(event="start", options=vars(options), train=len(trainer.rows), held_out=len(trainer.held_out))
    dense, soft, hard = options.epochs
    stages = (
        Stage("dense", dense, options.learning_rate, "none"),
        Stage("soft", soft, 5e-6, "soft", threshold_learning_rate=1e-4),
        Stage("hard", hard, options.hard_learning_rate, "hard"),
    )
    for stage in stages:
        if stage.name in options.stages:
            trainer.run(stage)


if __name__ == "__main__":
    main()
