"""Curated names: the cards as they are, and the first use, later uses and failures of a card for a tiny model."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import minilpt
from minilpt import bundling, calibration, cli, curated
from minilpt.calibration import FEW_TEXTS
from minilpt.kernels import compiled
from minilpt.tasks import TASKS
from minilpt.weights import cards
from minilpt.weights import hub as downloads
from minilpt.weights.resolve import bundled_names, resolve

import checkpoints
import hub_server
from hub_server import Hub, Repository

NAME, REPOSITORY = "tiny-ltp-sentiment", "some-one/tiny"
LABELS = ["negative", "neutral", "positive"]
CARD = {
    "repository": REPOSITORY,
    "revision": "main",
    "task": "",
    "labels": LABELS,
    "problem_type": None,
    "shape": {"model_type": "bert", "layers": 3, "width": 32},
    "flops_ratio": 0.7,
    "seed": 3,
    "texts": "words",
    "verified": False,
    "note": "Nobody has looked.",
}


# The cards of the package.


@pytest.mark.parametrize("name", cards.curated_names())
def test_a_card_says_what_it_must(name: str) -> None:
    card = cards.read_card(name)
    assert downloads.NAME.fullmatch(card.repository)
    assert card.revision == "main" or downloads.COMMIT.fullmatch(card.revision)
    assert card.task in ("", *TASKS)
    wanted = TASKS[card.task].labels if card.task else card.labels
    if len(card.labels) == 1:
        assert card.task in ("qqp", "sts-b")
    else:
        assert sorted(card.labels) == sorted(wanted)
    assert card.shape["model_type"] in ("bert", "roberta", "xlm-roberta")  # whose first use is tried below
    assert set(card.shape) == {"model_type", "layers", "heads", "width", "inner"}
    assert 0.3 < card.flops_ratio < 1
    assert card.note.startswith("Not checked against the hub") != card.verified
    assert ("The commit was read in " in card.note) == (card.revision != "main")
    assert len(card.note) > 80
    assert name not in bundled_names()


@pytest.mark.parametrize("path", sorted((cards.CARDS / "texts").glob("*.jsonl")), ids=lambda path: path.stem)
def test_bundled_texts_are_enough_distinct_texts_or_pairs(path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kinds = {type(row) for row in rows}
    assert kinds in ({str}, {list})
    if kinds == {list}:
        assert {len(row) for row in rows} == {2}
    assert FEW_TEXTS <= len({json.dumps(row) for row in rows}) == len(rows)
    assert all(text and text == text.strip() for row in rows for text in ([row] if kinds == {str} else row))
    assert path.stem in {cards.read_card(name).texts for name in cards.curated_names()}
    assert f"`{path.name}`" in (path.parent / "README.md").read_text(encoding="utf-8")


def test_pairs_are_for_tasks_of_pairs() -> None:
    for card in map(cards.read_card, cards.curated_names()):
        is_pair = isinstance(card.calibration_texts[0], tuple)
        assert is_pair == (not card.task or TASKS[card.task].pair is not None), card.name


# A card of our own.


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on loopback, and an empty cache, whatever the caller's variables say."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "huggingface_hub"}
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))]:
        monkeypatch.delenv(name)
    with hub_server.serving() as server:
        for name, value in {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": server.endpoint}.items():
            monkeypatch.setenv(name, value)
        forget_library()
        yield server
    forget_library()
    sys.modules.update(before)


def forget_library() -> None:
    """The next import of huggingface_hub reads the environment, as it does once in a process."""
    if "huggingface_hub.utils" in sys.modules:
        sys.modules["huggingface_hub.utils"].get_session().close()
    for name in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
        del sys.modules[name]
    logging.getLogger("huggingface_hub").handlers.clear()  # each import adds one
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves sockets to the collector
        gc.collect()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for thresholds, with the kernels that are compiled already."""
    compiled.warm_up()
    made = tmp_path / "cache"
    made.mkdir()
    for kernels in compiled.cache_folder().glob("*.bin"):
        (made / kernels.name).symlink_to(kernels)
    monkeypatch.setenv(compiled.CACHE_VARIABLE, str(made))
    return made


@pytest.fixture
def deck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of cards, with this one only."""
    made = tmp_path / "cards"
    (made / "texts").mkdir(parents=True)
    draw = random.Random(0)
    texts = sorted({" ".join(draw.choices(checkpoints.WORDS[5:], k=draw.randint(2, 12))) for _ in range(110)})
    (made / "texts" / "words.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    (made / f"{NAME}.json").write_text(json.dumps(CARD))
    monkeypatch.setattr(cards, "CARDS", made)
    return made


@pytest.fixture
def repository(hub: Hub, deck: Path, cache: Path, tmp_path: Path) -> Repository:
    """What stands behind the card, on the hub."""
    hub.repositories[REPOSITORY] = Repository()
    push(hub.repositories[REPOSITORY], tmp_path)
    return hub.repositories[REPOSITORY]


def push(repository: Repository, tmp_path: Path, seed: int = 0, model_type: str = "bert", **changes: Any) -> str:
    """A commit with a tiny model of these settings, whose labels are numbered."""
    content = checkpoints.config(model_type, id2label={str(n): f"LABEL_{n}" for n in range(3)}) | changes
    folder = checkpoints.write_vocabulary(checkpoints.write(tmp_path / "model", content, seed))
    return repository.commit(hub_server.files_of(folder))


def rewrite(deck: Path, **changes: Any) -> None:
    (deck / f"{NAME}.json").write_text(json.dumps(CARD | changes))


def kept(cache: Path) -> list[Path]:
    return sorted((cache / "curated").glob("*.json"))


def never(*arguments: object, **options: object) -> None:
    raise AssertionError("thresholds are searched again")


def test_the_first_use_searches_thresholds_keeps_them_and_says_so(
    repository: Repository, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = minilpt.load(NAME)
    (path,) = kept(cache)
    plain = minilpt.load(REPOSITORY)
    wanted = minilpt.calibrate(plain, cards.read_card(NAME).calibration_texts, flops_ratio=0.7, seed=3)
    assert model.pruning is not None
    assert model.pruning.to_json()["thresholds"] == list(wanted.chosen.thresholds)
    provenance = json.loads(path.read_text())["provenance"]
    told = {key: provenance[key] for key in ("card", "repository", "commit", "minilpt", "agreement", "seed")}
    assert told == {
        "card": NAME,
        "repository": REPOSITORY,
        "commit": repository.refs["main"],
        "minilpt": minilpt.__version__,
        "agreement": wanted.chosen.agreement,
        "seed": 3,
    }
    assert provenance["texts_file"] == {"name": "words", "sha256": cards.read_card(NAME).texts_hash}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", provenance["date"])
    assert {record.levelno for record in caplog.records} == {logging.WARNING}  # shown even where logging is not set up
    first, second, third = (record.getMessage() for record in caplog.records)
    assert f"{REPOSITORY} at commit {repository.refs['main'][:12]}" in first
    assert f"{wanted.chosen.agreement:.1%} keep the dense model's label" in second and str(path) in second
    assert third == f"{NAME}: Nobody has looked."


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta"])
def test_every_architecture_of_the_cards_is_searched_once(
    repository: Repository, deck: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    rewrite(deck, shape={"model_type": model_type, "layers": 3})
    push(repository, tmp_path, model_type=model_type)
    first = minilpt.load(NAME)
    assert first.pruning is not None
    monkeypatch.setattr(curated, "calibrate", never)
    assert minilpt.load(NAME).predict(["good film"]) == first.predict(["good film"])


def test_later_uses_just_load(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = minilpt.load(NAME)
    caplog.clear()
    monkeypatch.setattr(curated, "calibrate", never)
    for options in ({}, {"local_files_only": True}, {"revision": repository.refs["main"]}, {"precision": "int8"}):
        again = minilpt.load(NAME, **options)  # type: ignore[arg-type]
        assert (again.pruning, again.source) == (first.pruning, first.source)
    assert again.with_pruning(None).with_pruning("auto").pruning == first.pruning
    assert minilpt.load(NAME).predict(["good film"]) == first.predict(["good film"])
    assert caplog.records == []


def test_another_pruning_needs_no_thresholds(
    repository: Repository, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curated, "calibrate", never)
    assert minilpt.load(NAME, pruning=None).pruning is None
    assert kept(cache) == []


def test_int8_is_pruned_by_the_thresholds_of_fp32(repository: Repository) -> None:
    first = minilpt.load(NAME, precision="int8")
    assert first.backend.precision == "int8"
    assert first.pruning == minilpt.load(NAME).pruning


def test_thresholds_belong_to_a_commit_and_a_recipe(
    repository: Repository, deck: Path, cache: Path, tmp_path: Path
) -> None:
    minilpt.load(NAME)
    push(repository, tmp_path, seed=5)
    minilpt.load(NAME)
    rewrite(deck, flops_ratio=0.8)
    minilpt.load(NAME)
    with open(deck / "texts" / "words.jsonl", "a") as file:
        file.write('"another text"\n')
    minilpt.load(NAME)
    assert len(kept(cache)) == 4


def test_labels_are_the_card_s(repository: Repository) -> None:
    model = minilpt.load(NAME, pruning=None)
    assert model.classes_.tolist() == LABELS
    assert model.predict("good")[0].label in LABELS
    settings = model.source.settings()
    assert settings["id2label"] == {"0": "negative", "1": "neutral", "2": "positive"}
    assert minilpt.load(REPOSITORY).classes_.tolist() == ["LABEL_0", "LABEL_1", "LABEL_2"]


def test_a_bundle_of_it_is_a_folder_with_its_labels_and_thresholds(repository: Repository, tmp_path: Path) -> None:
    model = minilpt.load(NAME)
    bundling._copy_model(model.source, tmp_path / "bundle")
    alone = minilpt.load(tmp_path / "bundle")
    assert (alone.source.commit, alone.source.card) == (None, None)
    assert alone.predict(["good film", "not bad"]) == model.predict(["good film", "not bad"])
    assert alone.pruning is not None and model.pruning is not None
    assert alone.pruning.to_json() == model.pruning.to_json()


def test_a_problem_type_is_the_card_s(repository: Repository, deck: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(deck, problem_type="regression")
    model = minilpt.load(NAME)
    assert model.config.problem_type == model.source.settings()["problem_type"] == "regression"
    assert "half the mean squared difference" in caplog.text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 2}, "layers is 2, and the card of tiny-ltp-sentiment is for 3"),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, "2 labels"),
        (
            {"id2label": {"0": "positive", "1": "neutral", "2": "negative"}},
            "its labels are positive, neutral, negative",
        ),
    ],
    ids=["shape", "count", "order"],
)
def test_a_checkpoint_that_contradicts_the_card_is_refused(
    repository: Repository, cache: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    push(repository, tmp_path, **changes)
    with pytest.raises(minilpt.UnsupportedModelError, match=said):
        minilpt.load(NAME)
    assert kept(cache) == []


def test_a_pinned_commit_without_safetensors_says_which_others_to_try(
    repository: Repository, deck: Path, cache: Path
) -> None:
    later = repository.refs["main"]
    pinned = repository.commit({"config.json": b"{}", "pytorch_model.bin": b"a pickle"}, ref="old")
    rewrite(deck, revision=pinned)
    with pytest.raises(minilpt.ModelFileError, match=rf"at revision {pinned}: .*revision='main', or 'refs/pr/N'"):
        minilpt.load(NAME)
    assert kept(cache) == []
    assert minilpt.load(NAME, revision="main", pruning=None).commit == later


def test_a_pinned_commit_that_is_not_there_is_named(repository: Repository, deck: Path) -> None:
    rewrite(deck, revision="0" * 40)
    with pytest.raises(minilpt.UnknownModelError, match=f"has no revision '{'0' * 40}'"):
        minilpt.load(NAME)


def test_the_card_s_own_names_in_other_letters_are_the_same_names(repository: Repository, tmp_path: Path) -> None:
    push(repository, tmp_path, id2label={"0": "NEGATIVE", "1": "Neutral", "2": "positive"})
    assert minilpt.load(NAME, pruning=None).classes_.tolist() == LABELS


def test_an_interrupted_search_keeps_nothing(
    repository: Repository, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> calibration.Calibration:
        return replace(calibration.calibrate(*arguments, **options), interrupted=True)

    monkeypatch.setattr(curated, "calibrate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        minilpt.load(NAME)
    assert kept(cache) == []


def test_a_cache_that_cannot_be_written_is_found_before_the_search(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(compiled.CACHE_VARIABLE, str(tmp_path / "file"))
    monkeypatch.setattr(curated, "calibrate", never)
    with pytest.raises(minilpt.InputError, match=f"cannot be kept here.*{compiled.CACHE_VARIABLE}"):
        minilpt.load(NAME)


PROGRAM = """
import sys, pathlib, minilpt
from minilpt.weights import cards
cards.CARDS = pathlib.Path(sys.argv[1])
print(minilpt.load(sys.argv[2]).logits(["good film"]).tolist())
"""


def test_processes_that_come_at_once_search_once(repository: Repository, deck: Path, cache: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(deck), NAME]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
        for _ in range(3)
    ]
    done = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], done
    assert len({out for out, _ in done}) == 1
    assert sum("searching thresholds" in err for _, err in done) == 1
    assert len(kept(cache)) == 1


# The command line.


def test_models_lists_curated_names_and_info_says_what_stands_behind_one(
    repository: Repository, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["models"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[-1] == [NAME, "curated", "70%", REPOSITORY, "at", "main", "not", "verified"]

    def info() -> dict[str, Any]:
        assert cli.main(["info", "--model", NAME]) == 0
        return dict(json.loads(capsys.readouterr().out)["model"])

    before = info()
    assert (before["repository"], before["commit"]) == (REPOSITORY, repository.refs["main"])
    assert (before["curated"]["found"], before["pruning"]) == (False, None)
    model = minilpt.load(NAME)
    after = info()
    assert (after["curated"]["found"], after["labels"]) == (True, LABELS)
    assert after["curated"]["thresholds"] == str(kept(cache)[0]) == str(resolve(NAME).thresholds)
    assert model.pruning is not None and after["pruning"]["thresholds"] == model.pruning.to_json()["thresholds"]


def test_calibrating_a_hub_s_model_asks_where_to_write(
    repository: Repository, deck: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    texts = str(deck / "texts" / "words.jsonl")
    for name in (NAME, REPOSITORY):
        with pytest.raises(SystemExit):
            cli.main(["calibrate", name, texts, "--flops-ratio", "0.8"])
        assert "--out FILE is needed" in capsys.readouterr().err
    out = str(tmp_path / "found.json")
    options = ["--input-format", "lines", "--flops-ratio", "0.8", "--revision", "main"]
    assert cli.main(["calibrate", REPOSITORY, texts, *options, "--out", out]) == 0
    assert minilpt.load(REPOSITORY, pruning=out, local_files_only=True).pruning is not None
    assert cli.main(["predict", "--model", REPOSITORY, "--local-files-only", "--pruning", out, "good"]) == 0
