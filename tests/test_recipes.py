"""The training recipe: its torch model is the engine's model, and a stopped run continues as if it had not stopped."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

import minilpt
from minilpt.config import read_config
from minilpt.tasks import TASKS, read_examples
from minilpt.text import TextEncoder

import checkpoints

torch = pytest.importorskip("torch", reason="recipes need torch (extra train)")

from minilpt.weights.recipes import export, ltp_bert, operating_point, train_ltp  # noqa: E402

SHAPE = ltp_bert.Shape(layers=3, heads=4, eps=1e-12, dropout=0.0, denominator_limit=20)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pretrained encoder with a tokenizer.json."""
    content = checkpoints.config("bert", labels=2, hidden_dropout_prob=0.1)
    folder = checkpoints.write_vocabulary(checkpoints.write(tmp_path_factory.mktemp("base"), content))
    encoder = TextEncoder.from_folder(folder, read_config(folder))
    encoder._tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences whose label is whether they say good or bad."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(3)
    for name, count in (("train", 96), ("dev", 24)):
        lines = ["sentence\tlabel"]
        for row in range(count):
            words = draw.choices(["a", "film", "the", "not"], k=draw.randint(1, 9))
            words.insert(draw.randint(0, len(words)), ("bad", "good")[row % 2])
            lines.append(f"{' '.join(words)}{' .' if row % 3 == 0 else ''}\t{row % 2}")
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def files(data: Path) -> list[str]:
    return ["--task", "sst-2", "--train", str(data / "train.tsv"), "--dev", str(data / "dev.tsv")]


def train(base: Path, data: Path, run: Path, *more: str) -> None:
    sizes = ["--batch", "16", "--epochs", "2", "2", "1", "--save-every", "2", "--threads", "1", "--flops", "0.1"]
    train_ltp.main(["--base", str(base), *files(data), "--run", str(run), *sizes, *more])


def parameters(run: Path) -> dict[str, torch.Tensor]:
    state = torch.load(run / "hard.pt", weights_only=True)
    return state["params"] | {"thresholds": state["thresholds"]}


@pytest.mark.parametrize("stage, after", [("none", 3), ("soft", 5), ("hard", 1)])
def test_a_stopped_run_continues_to_the_same_weights(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, after: int
) -> None:
    train(base, data, tmp_path / "whole")
    loss, steps = train_ltp.Trainer._loss, iter(range(after))

    def stopping(self: train_ltp.Trainer, batch: train_ltp.Batch, targets: torch.Tensor, pruning: str) -> torch.Tensor:
        if pruning == stage and next(steps, None) is None:
            raise KeyboardInterrupt
        return loss(self, batch, targets, pruning)

    monkeypatch.setattr(train_ltp.Trainer, "_loss", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(base, data, tmp_path / "stopped")
    monkeypatch.undo()
    train(base, data, tmp_path / "stopped")
    whole, stopped = parameters(tmp_path / "whole"), parameters(tmp_path / "stopped")
    assert whole.keys() == stopped.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, stopped[name]), name


def test_thresholds_and_weights_are_learned_and_exported(base: Path, data: Path, tmp_path: Path) -> None:
    train(base, data, tmp_path / "run", "--denominator-limit", "20")
    folder = tmp_path / "model"
    export.export(base, tmp_path / "run", folder, ["negative", "positive"])
    model = minilpt.load(folder)
    assert model.pruning is not None
    assert model.pruning.settings["score_denominator"] == "initial"
    assert model.pruning.settings["denominator_limit"] == 20
    start = [0.012 * (layer + 1) / 3 for layer in range(3)]
    assert not np.allclose(model.pruning.settings["thresholds"], start)
    assert model.predict("a good film")[0].label in ("negative", "positive")
    assert json.loads((folder / "train_log.jsonl").read_text().splitlines()[0])["event"] == "start"


def test_a_run_can_continue_from_a_finished_model(base: Path, data: Path, tmp_path: Path) -> None:
    """Its int8 rows and its classifier are read; a stage of 0 epochs leaves them as they are."""
    train(base, data, tmp_path / "first")
    export.export(base, tmp_path / "first", tmp_path / "model", ["negative", "positive"])
    options = ["--base", str(tmp_path / "model"), *files(data), "--run", str(tmp_path / "second")]
    train_ltp.main([*options, "--epochs", "0", "1", "1", "--batch", "16", "--save-every", "2", "--threads", "1"])
    stored = train_ltp._as_stored(torch.load(tmp_path / "first" / "hard.pt", weights_only=True)["params"])
    start = torch.load(tmp_path / "second" / "dense.pt", weights_only=True)["params"]
    assert stored.keys() == start.keys()
    for name, tensor in stored.items():
        assert torch.equal(tensor, start[name]), name


def test_the_later_stages_learn_from_the_mean_of_label_and_teachers(base: Path, data: Path, tmp_path: Path) -> None:
    sizes = ["--base", str(base), *files(data), "--batch", "16", "--threads", "1", "--save-every", "9"]
    for run, seed in (("one", "1"), ("two", "2")):
        train_ltp.main([*sizes, "--run", str(tmp_path / run), "--epochs", "1", "0", "0", "--seed", seed])
    taught = ["--run", str(tmp_path / "taught"), "--teachers", str(tmp_path / "one"), str(tmp_path / "two")]
    seen: list[torch.Tensor] = []
    targets = train_ltp.Trainer._targets

    def recording(self: train_ltp.Trainer, stage: train_ltp.Stage) -> torch.Tensor:
        seen.append(targets(self, stage))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_ltp.Trainer, "_targets", recording)
        train_ltp.main([*sizes, *taught, "--epochs", "1", "1", "1"])
    lines = [line.split("\t") for line in (data / "train.tsv").read_text().splitlines()[1:]]
    labels = torch.nn.functional.one_hot(torch.tensor([int(label) for _, label in lines]), 2)
    model, answers = minilpt.load(base), []
    for run in ("one", "two"):
        params = torch.load(tmp_path / run / "dense.pt", weights_only=True)["params"]
        rows = [torch.tensor([row]) for row in model.encode([text for text, _ in lines])[0]]
        logits = [ltp_bert.forward(params, SHAPE, row, torch.ones_like(row, dtype=torch.bool))[0] for row in rows]
        answers.append(torch.log_softmax(torch.cat(logits), -1))
    for name in ("soft", "soft-partial"):
        (tmp_path / "taught" / f"{name}.pt").unlink(missing_ok=True)
    with pytest.raises(SystemExit, match=r"teacher\.pt holds what \['one', 'two'\] said, not \['one'\]"):
        train_ltp.main([*sizes, *taught[:-1], "--epochs", "1", "1", "1"])
    dense, soft, hard = seen
    assert torch.equal(dense, labels.float())
    assert torch.equal(soft, hard)
    assert torch.allclose(soft, (labels + torch.softmax(sum(answers) / 2, -1)) / 2, atol=1e-5)


def test_pairs_and_scores_are_learned_too(base: Path, tmp_path: Path) -> None:
    """Regression on pairs, chosen on held-out examples; the plain model comes without thresholds."""
    draw = random.Random(4)
    for name, count in (("train", 120), ("dev", 30)):
        words = [draw.choices(["a", "film", "good", "bad"], k=draw.randint(1, 6)) for _ in range(count)]
        rows = [{"sentence1": " ".join(some), "sentence2": "the film", "score": draw.random()} for some in words]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = ["--task", "sts-b", "--train", str(tmp_path / "train.jsonl"), "--dev", str(tmp_path / "dev.jsonl")]
    sizes = ["--batch", "16", "--epochs", "1", "1", "1", "--save-every", "4", "--threads", "1", "--flops", "0.7"]
    run = tmp_path / "run"
    train_ltp.main(["--base", str(base), "--run", str(run), *sources, *sizes])
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    chosen_by = [line["held_out"] for line in log if line.get("stage") == "hard" and "held_out" in line]
    assert chosen_by
    assert all("pearson" in measured["dense"] for measured in chosen_by)
    for stage in ("dense", "hard"):
        export.export(base, run, tmp_path / stage, [], stage)
    plain, learned = minilpt.load(tmp_path / "dense"), minilpt.load(tmp_path / "hard")
    assert plain.pruning is None
    assert learned.pruning is not None
    assert plain.config.problem_type == "regression"
    params = train_ltp._as_stored(torch.load(run / "dense.pt", weights_only=True)["params"])
    ids, segments = plain.encode([("a good film", "the film")])
    shape = ltp_bert.Shape(layers=3, heads=4, eps=1e-12, dropout=0.0, denominator_limit=20)
    row, kinds = torch.tensor(ids), torch.tensor(segments)
    assert 0 < kinds.sum() < kinds.numel()
    want = ltp_bert.forward(params, shape, row, torch.ones_like(row, dtype=torch.bool), kinds)[0]
    np.testing.assert_allclose(plain.forward(ids, segments).logits, want.numpy(), atol=1e-4)


@pytest.mark.parametrize("thresholds", [None, [0.0, 0.05, 0.2], [0.1, 0.12, 0.15]])
def test_the_hard_rule_of_the_recipe_is_the_engine_s(base: Path, thresholds: list[float] | None) -> None:
    pruning = (
        None
        if thresholds is None
        else {"rule": "threshold", "thresholds": thresholds, "score_denominator": "initial", "denominator_limit": 20}
    )
    model = minilpt.load(base, pruning=pruning)
    draw = np.random.default_rng(5)
    rows = [draw.integers(5, 60, n).tolist() for n in (1, 2, 7, 30)]
    found = model.forward(rows, trace=True)
    params = {name: torch.from_numpy(tensor) for name, tensor in checkpoints.tensors(base).items()}
    for at, row in enumerate(rows):
        ids = torch.tensor([row + [0] * (32 - len(row))])
        hard = None if thresholds is None else torch.tensor(thresholds)
        logits, alive = ltp_bert.forward(params, SHAPE, ids, ids > 0, thresholds=hard)
        assert found.ffn_lengths[:, at].tolist() == alive.sum(2)[:, 0].int().tolist()
        assert np.abs(found.logits[at] - logits.numpy()[0]).max() < 1e-4


def test_the_soft_rule_becomes_the_hard_one_as_its_temperature_falls(base: Path) -> None:
    params = {name: torch.from_numpy(tensor) for name, tensor in checkpoints.tensors(base).items()}
    ids = torch.randint(5, 60, (3, 12), generator=torch.Generator().manual_seed(1))
    thresholds = torch.tensor([0.06, 0.07, 0.08])
    hard, alive = ltp_bert.forward(params, SHAPE, ids, ids > 0, thresholds=thresholds)
    assert 0 < alive[-1].sum() < alive[0].sum() < alive[0].numel()
    gaps = []
    for temperature in (1e-2, 1e-3, 1e-6):
        soft, weight = ltp_bert.forward(params, SHAPE, ids, ids > 0, thresholds=thresholds, temperature=temperature)
        gaps.append((weight - alive).abs().max().item())
    assert gaps[2] < 1e-3 < gaps[0]
    assert torch.allclose(soft, hard, atol=1e-4)


def test_the_operating_point_is_the_cheapest_that_loses_little(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    rule = {"rule": "threshold", "thresholds": [0.2, 0.3, 0.4], "score_denominator": "initial", "denominator_limit": 20}
    (folder / "ltp.json").write_text(json.dumps({"schema_version": 1, **rule, "provenance": {"recipe": "a test"}}))
    options = ["--task", "sst-2", "--texts", str(data / "dev.tsv")]
    for max_drop in (0, 100):
        monkeypatch.setattr("sys.argv", ["operating_point", str(folder), *options, "--max-drop", str(max_drop)])
        operating_point.main()
        record = json.loads((folder / "ltp.json").read_text())
        points = record["frontier"]
        assert [point["flops_ratio"] for point in points] == sorted({p["flops_ratio"] for p in points}, reverse=True)
        dense, picked = points[0], next(p for p in points if p["thresholds"] == record["thresholds"])
        assert all(dense["metric"] - p["metric"] <= max_drop for p in points[: points.index(picked) + 1])
        assert picked is points[-1] or dense["metric"] - points[points.index(picked) + 1]["metric"] > max_drop
        model = minilpt.load(folder)
        texts = [example.text for example in read_examples(data / "dev.tsv", TASKS["sst-2"])]
        traced = model.forward(*model.encode(texts), trace=True)
        assert traced.counted_flops is not None
        assert picked["flops_ratio"] == traced.counted_flops.sum() / traced.dense_flops.sum()
