"""Texts that nobody means well: the same answers alone and beside others, in bounded memory, at every door."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minilpt
from minilpt import cli

import checkpoints

TEXTS: dict[str, Any] = {
    "empty": "",
    "blank": " \t\r\n\u00a0\u2003\u3000",
    "NUL": "a good\0film\0",
    "control characters": "a\x01good\x1b[31m film\x7f\x85",
    "right-to-left marks": "\u202ea good film\u202c \u200f\u2067bad\u2069 \u061c",
    "Arabic and Hebrew": "فيلم جيد סרט טוב",
    "joined emoji": "👩‍👩‍👧‍👦 👨🏽‍🚀 🏳️‍🌈 film",
    "joiners alone": "\u200d\u200d\ufe0f\u200b\ufeff",
    "piled accents": "fi" + "\u0301\u0489" * 300 + "lm",
    "outside the first plane": "\U0001d4a2\U0001d45c\U0001d4b9 \U0010ffff film",
    "no characters": "\ufffe\uffff\ufdd0 film",
    "special tokens": "[CLS] good [SEP] [PAD] [MASK] film [SEP]",
    "one long word": "x" * 5000,
    "long": "good film , bad " * 500,
    "a pair": ("a good film", "\u202eno"),
    "a pair of nothing": ("", ""),
    "half a pair": ("", "a film " * 400),
    "pair of NUL": ("\0", "good\0"),
}
LONE = ["\ud800", "film \udfff", "\udc00\ud83d", ("good", "\udcff")]


@pytest.fixture(scope="module", params=["fp32", "int8"])
def bundled(request: pytest.FixtureRequest) -> minilpt.Classifier:
    """The pruned default model, with BERT's whole vocabulary."""
    return minilpt.load(precision=request.param, threads=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write_vocabulary(checkpoints.write(tmp_path_factory.mktemp("tiny")))


def test_each_text_has_its_answer_alone_and_beside_all_others(bundled: minilpt.Classifier) -> None:
    """Bit for bit: few at a time, many (which another tokenizing path takes), backwards, and in batches of one."""
    texts = list(TEXTS.values())
    alone = np.concatenate([bundled.logits([text]) for text in texts])
    assert np.isfinite(alone).all()
    assert np.array_equal(bundled.logits(texts), alone)
    assert np.array_equal(bundled.logits(texts[::-1]), alone[::-1])
    assert np.array_equal(bundled.logits(texts * 5, batch_tokens=300), np.concatenate([alone] * 5))
    assert np.array_equal(bundled.logits(texts, batch_tokens=1), alone)


@pytest.mark.parametrize("count", [0, 40])
@pytest.mark.parametrize("text", LONE, ids=ascii)
def test_a_lone_surrogate_is_refused_by_its_place_and_its_neighbours_by_nothing(
    bundled: minilpt.Classifier, text: Any, count: int
) -> None:
    texts = ["a film"] * count + [text]
    for ask in (bundled.predict, bundled.predict_proba, bundled.logits, bundled.embed, bundled.encode):
        with pytest.raises(minilpt.InputError, match=f"text {count} is not valid Unicode"):
            ask(texts)


MILLIONS = {
    "words": '"film " * 1_000_000',
    "a word": '"x" * 1_000_000',
    "ideographs": '"中" * 1_000_000',
    "joiners": '"👩‍" * 500_000',
    "marks": '"\\u202e" * 1_000_000',
    "accents": '"e" + "\\u0301" * 1_000_000',
    "a pair": '("film " * 200_000, "中" * 200_000)',
}
PEAK = """
import sys, minilpt
def peak_bytes():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
model = minilpt.load(threads=1)
model.predict(["film " * 600, ("film", "film")])
before, text = peak_bytes(), eval(sys.argv[1])
(found,) = model.predict([text])
print((peak_bytes() - before) / sum(map(len, [text] if isinstance(text, str) else text)), found.n_tokens)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("what", MILLIONS)
def test_a_million_of_anything_takes_memory_in_proportion(what: str) -> None:
    """The peak grows by less than 1,000 bytes a character, all of them the tokenizer's; the model sees 512 tokens."""
    command = [sys.executable, "-c", PEAK, MILLIONS[what]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    bytes_a_character, n_tokens = map(float, done.stdout.split())
    assert bytes_a_character < 1000
    assert n_tokens <= 512


LABELS = 10_000


@pytest.fixture(scope="module")
def many_labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = checkpoints.write(tmp_path_factory.mktemp("labels") / "model", checkpoints.config(labels=LABELS))
    return checkpoints.write_vocabulary(made)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_ten_thousand_labels_are_answered_alone_and_in_a_batch(many_labels: Path, precision: str) -> None:
    model = minilpt.load(many_labels, precision=precision, threads=2)
    texts = ["good film", "", ("bad", "film"), "not a bad film !"] * 20
    alone = [model.predict([text])[0] for text in texts[:4]]
    assert model.predict(texts) == alone * 20
    for found in alone:
        assert len(found.scores) == LABELS and found.score == max(found.scores.values())
        assert sum(found.scores.values()) == pytest.approx(1, abs=1e-4)


def command(*arguments: str, stdin: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="ascii"))
    return cli.main([*arguments])


def lines(texts: list[Any]) -> str:
    """Records for the command line, in ASCII."""
    rows = ({"text": text} if isinstance(text, str) else {"text": text[0], "text_pair": text[1]} for text in texts)
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_the_command_line_answers_as_the_library(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every text as a JSON record, and output that any JSON reader takes: one line for each."""
    texts = list(TEXTS.values())
    expected = minilpt.load(folder, threads=1).predict(texts)
    options = ("predict", "--model", str(folder), "--input", "-", "--input-format", "jsonl")
    assert command(*options, stdin=lines(texts), monkeypatch=monkeypatch) == 0
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.split("\n")[:-1]]
    assert [row["scores"] for row in found] == [prediction.scores for prediction in expected]
    assert err.startswith("minilpt: texts cut: ") and err.count("\n") == 1
    for text in LONE:
        assert command(*options, stdin=lines(["good", text]), monkeypatch=monkeypatch) == 1
        out, err = capsys.readouterr()
        assert "is not valid Unicode" in err and err.startswith("minilpt: error: ") and err.count("\n") == 1


def test_the_command_line_prints_ten_thousand_labels(many_labels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["predict", "--model", str(many_labels), "good film", "bad"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(row["scores"]) for row in found] == [LABELS, LABELS]


@pytest.fixture
def client(folder: Path) -> Iterator[Any]:
    pytest.importorskip("httpx", reason="the server is an extra")
    from serving import served

    with served(minilpt.load(folder, threads=1), auto_truncate=True, payload_limit=10_000_000) as client:
        yield client


def test_the_server_answers_as_the_library(folder: Path, client: Any) -> None:
    """Alone and in one request with others; an empty text and a lone surrogate are errors by the contract."""
    model = minilpt.load(folder, threads=1)
    texts = [text for text in TEXTS.values() if all(text if isinstance(text, tuple) else [text])]
    expected = [prediction.scores for prediction in model.predict(texts)]
    replies = [client.post("/predict", json={"inputs": text}) for text in texts]
    found = [{each["label"]: each["score"] for each in reply.json()} for reply in replies]
    assert found == expected
    batch = client.post("/predict", json={"inputs": [[text] if isinstance(text, str) else text for text in texts]})
    assert [{each["label"]: each["score"] for each in answer} for answer in batch.json()] == expected
    for content in ('{"inputs": ""}', *(json.dumps({"inputs": text}) for text in LONE)):
        reply = client.post("/predict", content=content, headers={"content-type": "application/json"})
        assert reply.status_code in (400, 413, 422) and reply.json()["error"], content


def test_the_server_survives_a_million_characters(client: Any) -> None:
    for text in ("中" * 1_000_000, "x" * 1_000_000):
        assert client.post("/predict", json={"inputs": text}).status_code == 200
    assert client.get("/health").status_code == 200
