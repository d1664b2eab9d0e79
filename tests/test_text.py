"""Texts to token ids: those of transformers' fast tokenizers, cut as the tokenizers package cuts them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors

import minilpt
from minilpt.config import read_config
from minilpt.text import TextEncoder

import checkpoints

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LETTERS = [chr(code) for code in range(33, 127)]
WORDPIECES = (
    *SPECIAL,
    *LETTERS,
    *(f"##{letter}" for letter in LETTERS if letter.isalpha()),
    *"film filming Film the ##ing ##s ##ly na ##ïve ##ive é É e ##é 中 文 中文 ß ss i̇ <cls> <sep>".split(),
    *(f"w{number}" for number in range(100)),
)
TEXTS = [
    "",
    " ",
    "\t\n\r ",
    "Good film!",
    "the filmings, filmly...  x",
    "naïve Naïve É é e\u0301 E\u0301 ß İ",
    "中文film中 文",
    "[SEP] in the [MASK] middle[MASK] [sep] [ SEP ]",
    "a" * 100 + " " + "a" * 101,
    "nul\0 bell\a soft\u00adhyphen zero\u200bwidth no\u00a0break \ufffd \ufeff",
    "☃ 🎬🏽 \U0010ffff",
    "don't _can't_ 1,000.5",
    "<s> </s> <mask> <pad> a <mask> b",
]
PAIRS = [("Good film!", "the film"), ("", ""), ("film", ""), ("", "film"), ("[SEP]", "naïve 中文")]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def wordpiece(folder: Path, **settings: Any) -> Path:
    """A BERT folder (no weights) with vocab.txt and these tokenizer settings."""
    write_json(folder / "config.json", checkpoints.config("bert", vocab_size=1000))
    write_json(folder / "tokenizer_config.json", settings)
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in dict.fromkeys(WORDPIECES)), encoding="utf-8")
    return folder


def byte_level(folder: Path, **settings: Any) -> Path:
    """A RoBERTa folder (no weights) with vocab.json, merges.txt and these tokenizer settings."""
    write_json(folder / "config.json", checkpoints.config("roberta", vocab_size=1000))
    write_json(folder / "tokenizer_config.json", settings)
    merges = ["Ġ w", "Ġ f", "i l", "Ġf il", "Ġfil m", "t h", "th e"]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [merge.replace(" ", "") for merge in merges] + ["<mask>"]
    write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    return folder


BUILDERS = {"wordpiece": wordpiece, "byte level": byte_level}
builders = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)


def encoder(folder: Path) -> TextEncoder:
    return TextEncoder.from_folder(folder, read_config(folder))


def as_json(folder: Path, change: Callable[[Tokenizer], None] = lambda tokenizer: None, **settings: Any) -> Path:
    """The folder with its tokenizer, changed, as tokenizer.json and nothing else, under new settings."""
    tokenizer = encoder(folder)._tokenizer
    change(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name in ("vocab.txt", "vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)
    write_json(folder / "tokenizer_config.json", settings)
    return folder


def ids(found: TextEncoder, texts: list[Any]) -> list[tuple[list[int], list[int]]]:
    return [(item.ids.tolist(), item.segments.tolist()) for item in found.encode(texts)]


def assert_equals_transformers(folder: Path, texts: list[Any]) -> None:
    """As AutoTokenizer encodes a batch of these texts, or of these pairs."""
    theirs, ours = their_tokenizer(folder), encoder(folder)
    parts = [texts] if isinstance(texts[0], str) else [list(part) for part in zip(*texts, strict=True)]
    wanted = theirs(*parts, truncation="longest_first", max_length=40, return_token_type_ids=True)
    for text, *found in zip(texts, ours.encode(texts), wanted["input_ids"], wanted["token_type_ids"], strict=True):
        assert (found[0].ids.tolist(), found[0].segments.tolist()) == tuple(found[1:]), repr(text)


@lru_cache
def their_tokenizer(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.is_fast
    return tokenizer


@pytest.mark.parametrize("kept_as", ["vocabulary", "tokenizer.json"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_lower_case": False},
        {"do_lower_case": True},
        {"do_lower_case": False, "strip_accents": True},
        {"do_lower_case": True, "strip_accents": False},
        {"tokenize_chinese_chars": False},
        {"cls_token": "<cls>", "sep_token": "<sep>"},
    ],
    ids=str,
)
def test_wordpiece_is_transformers_bert_tokenizer(tmp_path: Path, settings: dict[str, Any], kept_as: str) -> None:
    """Where tokenizer.json and tokenizer_config.json disagree the latter wins."""
    wordpiece(tmp_path, **{key: value for key, value in settings.items() if key.endswith("_token")})
    if kept_as == "tokenizer.json":
        as_json(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", settings)
    assert_equals_transformers(tmp_path, TEXTS)
    assert_equals_transformers(tmp_path, PAIRS)


@pytest.mark.parametrize("kept_as", ["vocabulary", "tokenizer.json"])
@pytest.mark.parametrize("settings", [{}, {"add_prefix_space": True}, {"add_prefix_space": False}], ids=str)
def test_byte_level_bpe_is_transformers_roberta_tokenizer(
    tmp_path: Path, settings: dict[str, Any], kept_as: str
) -> None:
    byte_level(tmp_path)
    if kept_as == "tokenizer.json":
        as_json(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", settings)
    assert_equals_transformers(tmp_path, TEXTS)
    assert_equals_transformers(tmp_path, PAIRS)


@pytest.mark.parametrize("files", [("tokenizer.json",), ("vocab.json", "merges.txt")], ids=str)
def test_roberta_s_own_files_give_transformers_ids(tmp_path: Path, shared: Path, files: tuple[str, ...]) -> None:
    write_json(tmp_path / "config.json", checkpoints.config("roberta", vocab_size=50265))
    for name in files:
        shutil.copy(shared / "data" / "tokenizer" / name, tmp_path)
    lines = (shared / "data" / "glue" / "SST-2" / "dev.tsv").read_text(encoding="utf-8").splitlines()[1:40]
    assert_equals_transformers(tmp_path, TEXTS + [line.split("\t")[0] for line in lines])
    assert_equals_transformers(tmp_path, PAIRS)


@pytest.fixture(scope="module")
def any_folder(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder of each kind, to be read only."""
    return {name: build(tmp_path_factory.mktemp("any")) for name, build in BUILDERS.items()}


@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=8), others=st.none() | st.lists(ANY_TEXT, min_size=8, max_size=8))
@pytest.mark.parametrize("name", BUILDERS)
def test_any_unicode_gives_transformers_ids(
    any_folder: dict[str, Path], name: str, texts: list[str], others: list[str] | None
) -> None:
    assert_equals_transformers(any_folder[name], list(zip(texts, others, strict=False)) if others else texts)


@pytest.mark.parametrize("form", ["[CLS]", {"content": "[CLS]", "lstrip": False}], ids=["str", "dict"])
def test_a_special_token_is_a_string_or_an_object(tmp_path: Path, form: Any) -> None:
    found = encoder(wordpiece(tmp_path, cls_token=form))
    assert ids(found, ["w1"]) == [([2, WORDPIECES_INDEX["w1"], 3], [0, 0, 0])]


WORDPIECES_INDEX = {token: index for index, token in enumerate(dict.fromkeys(WORDPIECES))}


def test_tokenizer_json_comes_before_vocab_txt_before_vocab_json(tmp_path: Path) -> None:
    word = WORDPIECES_INDEX["w7"]
    byte_level(tmp_path)
    assert len(ids(encoder(tmp_path), ["w7"])[0][0]) == 4
    wordpiece(tmp_path)
    assert ids(encoder(tmp_path), ["w7"])[0][0] == [2, word, 3]
    tokenizer = encoder(tmp_path)._tokenizer
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[MASK]", 4))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert ids(encoder(tmp_path), ["w7"])[0][0] == [4, word, 3]


# Truncation.

INF, NAN = float("inf"), float("nan")
LENGTHS = st.integers(0, 60)


@given(first=LENGTHS, second=st.none() | LENGTHS, limit=st.integers(5, 40), side=st.sampled_from(["left", "right"]))
@example(first=30, second=30, limit=15, side="right")
@example(first=31, second=30, limit=16, side="left")
@example(first=30, second=31, limit=15, side="right")
@example(first=3, second=40, limit=16, side="left")
@example(first=40, second=3, limit=15, side="right")
@pytest.mark.parametrize("name", BUILDERS)
def test_truncation_is_longest_first_of_the_tokenizers_package(
    any_folder: dict[str, Path], name: str, first: int, second: int | None, limit: int, side: str
) -> None:
    tokenizer, config = encoder(any_folder[name])._tokenizer, read_config(any_folder[name])
    parts = [" ".join(f"w{index % 10}" for index in range(n)) for n in (first, second) if n is not None]
    (found,) = TextEncoder(tokenizer, config, limit, side).encode([tuple(parts) if len(parts) == 2 else parts[0]])
    whole = tokenizer.encode(*parts)
    tokenizer.enable_truncation(limit, strategy="longest_first", direction=side)
    wanted = tokenizer.encode(*parts)
    assert found.ids.tolist() == wanted.ids
    assert found.segments.tolist() == wanted.type_ids
    assert found.n_truncated == len(whole.ids) - len(wanted.ids)


@pytest.mark.parametrize(
    "stated, limit",
    [(10, 10), (10.7, 10), *((stated, 40) for stated in (None, 40, 512, 1e30, int(1e30), -1, 0, "10", True, INF, NAN))],
)
def test_the_limit_is_the_model_s_or_a_smaller_one_that_is_stated(tmp_path: Path, stated: Any, limit: int) -> None:
    found = encoder(wordpiece(tmp_path, model_max_length=stated))
    assert found.max_tokens == limit
    (cut,) = found.encode(["film " * 60])
    assert (len(cut.ids), cut.n_truncated) == (limit, 62 - limit)


@pytest.mark.parametrize("build, stated", [(wordpiece, 3), (wordpiece, 1), (wordpiece, 0.5), (byte_level, 4)])
def test_a_limit_without_room_for_text_is_refused(tmp_path: Path, build: Callable[..., Path], stated: float) -> None:
    with pytest.raises(minilpt.TokenizerError, match="leaves no room for text"):
        encoder(build(tmp_path, model_max_length=stated))


@pytest.mark.parametrize("side", ["middle", "Right", 1, None])
def test_an_unknown_truncation_side_is_refused(tmp_path: Path, side: Any) -> None:
    with pytest.raises(minilpt.TokenizerError, match=r"tokenizer_config\.json: truncation_side must be"):
        encoder(wordpiece(tmp_path, truncation_side=side))


def test_truncation_and_padding_of_tokenizer_json_are_dropped(tmp_path: Path) -> None:
    def reconfigure(tokenizer: Tokenizer) -> None:
        tokenizer.enable_truncation(8)
        tokenizer.enable_padding(length=32, pad_id=0)

    found = encoder(as_json(wordpiece(tmp_path), reconfigure))
    short, long, cut = found.encode(["film", "film " * 20, "film " * 50])
    assert (len(short.ids), len(long.ids), len(cut.ids)) == (3, 22, 40)
    assert (short.n_truncated, long.n_truncated, cut.n_truncated) == (0, 0, 12)


def test_a_tokenizer_without_special_tokens_keeps_its_segments_when_cut(tmp_path: Path) -> None:
    def bare(tokenizer: Tokenizer) -> None:
        tokenizer.post_processor = processors.Sequence([])

    found = encoder(as_json(wordpiece(tmp_path), bare))
    whole, cut = found.encode([("film film", "film"), ("film " * 50, "film")])
    assert whole.segments.tolist() == [0, 0, 1]
    assert cut.segments.tolist() == [0] * 39 + [1]
    with pytest.raises(minilpt.InputError, match=r"text 0 \(''\): the tokenizer makes no token of it"):
        found.encode([""])


# What the model can take.


def test_an_id_without_a_row_in_the_model_is_the_tokenizer_s_fault(tmp_path: Path) -> None:
    wordpiece(tmp_path)
    write_json(tmp_path / "config.json", checkpoints.config("bert", vocab_size=WORDPIECES_INDEX["w50"]))
    assert encoder(tmp_path).encode(["w49"])
    with pytest.raises(minilpt.TokenizerError, match=r"'w50' the id \d+, but the model has \d+ rows"):
        encoder(tmp_path).encode(["w49 w50"])


def test_segments_are_zeros_where_the_model_has_no_rows_for_them(tmp_path: Path) -> None:
    wordpiece(tmp_path)
    assert 1 in ids(encoder(tmp_path), [("film", "film")])[0][1]
    for content in (
        checkpoints.config("distilbert", vocab_size=1000),
        checkpoints.config(vocab_size=1000, type_vocab_size=1),
    ):
        write_json(tmp_path / "config.json", content)
        assert ids(encoder(tmp_path), [("film", "film")])[0][1] == [0] * 5


# Any text, any number of threads.


@builders
def test_a_batch_is_its_texts_one_by_one(tmp_path: Path, build: Callable[..., Path]) -> None:
    found = encoder(build(tmp_path))
    texts = (TEXTS + PAIRS) * 3
    assert ids(found, texts) == [ids(found, [text])[0] for text in texts]
    assert found.encode([]) == []


@builders
def test_eight_threads_encode_what_one_does(tmp_path: Path, build: Callable[..., Path]) -> None:
    found = encoder(build(tmp_path))
    jobs = [[f"w{job} film", ("film " * (job + 20), "w1 " * job), "the " * 50] * (1 + job % 8) for job in range(48)]
    wanted = [ids(found, job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda job: ids(found, job), jobs * 3)) == wanted * 3


@pytest.mark.parametrize("count", [1, 40], ids=["serial", "batch"])
@pytest.mark.parametrize("bad", ["\ud800", "film \udfff", ("film", "\udc00"), ("\udc00", "film")], ids=repr)
def test_a_lone_surrogate_is_an_error_naming_the_text(tmp_path: Path, bad: Any, count: int) -> None:
    with pytest.raises(minilpt.InputError, match=f"text {count} is not valid Unicode"):
        encoder(wordpiece(tmp_path)).encode(["film"] * count + [bad])


@pytest.mark.parametrize(
    "build, text, n_tokens",
    [(wordpiece, "film the " * 111_112, 222_226), (byte_level, "x" * 1_000_000, 1_000_002)],
    ids=["words", "one word"],
)
def test_a_million_characters_are_a_text(tmp_path: Path, build: Callable[..., Path], text: str, n_tokens: int) -> None:
    (cut,) = encoder(build(tmp_path)).encode([text])
    assert (len(cut.ids), cut.n_truncated) == (40, n_tokens - 40)


# Folders without a tokenizer, or with a broken one.


def test_without_a_tokenizer_a_model_loads_and_runs_and_only_texts_are_an_error(tmp_path: Path) -> None:
    model = minilpt.load(checkpoints.write(tmp_path))
    assert model.forward([[2, 5, 3]]).logits.shape == (1, 3)
    for ask in (model.predict, model.logits, model.predict_proba, model.encode):
        with pytest.raises(minilpt.TokenizerError, match=r"no tokenizer\.json, no vocab\.txt, and no vocab\.json"):
            ask(["film"])


@pytest.mark.parametrize("name", ["sentencepiece.bpe.model", "spiece.model"])
def test_a_sentencepiece_model_alone_must_be_converted(tmp_path: Path, name: str) -> None:
    write_json(tmp_path / "config.json", checkpoints.config("camembert"))
    (tmp_path / name).write_bytes(b"\n\x0e\n\x05<unk>")
    with pytest.raises(minilpt.TokenizerError, match="SentencePiece model must be converted"):
        encoder(tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": b"{"},
        {"tokenizer.json": b"{}"},
        {"vocab.txt": b"film\nthe\n"},
        {"vocab.txt": b"[CLS]\n[SEP]\n\xff\n"},
        {"vocab.json": b"{", "merges.txt": b""},
        {"vocab.json": b'{"<s>": 0}', "merges.txt": b"#version: 0.2\n"},
        {"vocab.json": b'{"<s>": 0, "</s>": 1}', "merges.txt": b"#version: 0.2\na b\n"},
        {"vocab.txt": b"[CLS]\n[SEP]\n[UNK]\n", "tokenizer_config.json": b'{"do_lower_case": "no"}'},
        {"vocab.txt": b"[CLS]\n[SEP]\n[UNK]\n", "tokenizer_config.json": b'{"cls_token": {"lstrip": false}}'},
    ],
    ids=[
        "cut",
        "empty",
        "no cls",
        "latin-1",
        "bad vocab.json",
        "no sep",
        "merge of nothing",
        "bad setting",
        "no content",
    ],
)
def test_a_broken_tokenizer_is_an_error_of_ours_when_texts_are_asked_for(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    checkpoints.write(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    model = minilpt.load(tmp_path)
    assert model.forward([[2, 5, 3]]).logits.shape == (1, 3)
    with pytest.raises(minilpt.TokenizerError, match="the tokenizer's files cannot be read"):
        model.predict("film")


def test_a_setting_of_the_wrong_type_is_refused_with_tokenizer_json_too(tmp_path: Path) -> None:
    as_json(wordpiece(tmp_path), do_lower_case="no")
    with pytest.raises(minilpt.TokenizerError, match="cannot be read"):
        encoder(tmp_path)


def test_settings_that_are_no_json_are_a_broken_model_folder(tmp_path: Path) -> None:
    wordpiece(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(minilpt.ModelFileError, match=r"tokenizer_config\.json"):
        encoder(tmp_path)


def test_settings_leave_other_kinds_of_normaliser_alone(tmp_path: Path) -> None:
    def other(tokenizer: Tokenizer) -> None:
        tokenizer.normalizer = normalizers.Lowercase()

    found = encoder(as_json(wordpiece(tmp_path), other, do_lower_case=False))
    assert ids(found, ["FILM"])[0][0] == [2, WORDPIECES_INDEX["film"], 3]
