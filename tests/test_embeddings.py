"""embed(): rows pooled, what a sentence-transformers folder says, and encoders without a head."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minilpt
from minilpt import Classifier, InputError, ModelFileError, UnsupportedModelError, backends, reference
from minilpt.config import read_config
from minilpt.embeddings import Embedding, means, normalized, read_embedding
from minilpt.weights import checkpoint, save

import checkpoints

TEXTS = ["good", "a bad film !", "", "not good , not bad", "the film " * 30, ("good film", "bad")]
PRUNING = {"rule": "threshold", "thresholds": [0.0, 0.9, 0.9], "score_denominator": 1}
CLASS = "sentence_transformers.models."
NEW = "sentence_transformers.base.modules."
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": f"{CLASS}Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{CLASS}Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{CLASS}Normalize"},
]
Change = dict[str, Any]


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def headless(folder: Path, family: str = "bert", **changes: Any) -> Path:
    """A tiny encoder with a tokenizer."""
    architecture = {"bert": "BertModel", "roberta": "RobertaModel"}[family]
    content = checkpoints.config(family, **{"architectures": [architecture]} | changes)
    return checkpoints.write_vocabulary(checkpoints.write(folder, content))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be read only."""
    return headless(tmp_path_factory.mktemp("embeddings") / "encoder")


@pytest.fixture(scope="module")
def model(folder: Path) -> Classifier:
    return minilpt.load(folder)


def expected(model: Classifier, pooling: str) -> np.ndarray[Any, Any]:
    """The reference's, in float64, not normalised."""
    weights = {
        name: tensor.astype(np.float64) for name, tensor in checkpoint.load_weights(model.folder, model.config).items()
    }
    rule, found = model.engine.rule, []
    for ids, segments in zip(*model.encode(TEXTS), strict=True):
        rows = reference.encode(weights, model.config, rule, np.array(ids, np.int32), np.array(segments, np.int32))[0]
        found.append(rows[0] if pooling == "cls" else reference.mean_pooled(rows))
    return np.stack(found)


# Vectors.


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("pruning", [None, PRUNING], ids=["dense", "pruned"])
@pytest.mark.parametrize("with_head", [False, True], ids=["encoder", "classifier"])
def test_embeddings_are_the_reference_s_pooled_rows(
    tmp_path: Path, pooling: str, pruning: Change | None, with_head: bool
) -> None:
    made = headless(tmp_path, architectures=["BertForSequenceClassification"] if with_head else ["BertModel"])
    model = minilpt.load(made, pruning=pruning)
    plain, unit = (model.embed(TEXTS, pooling=pooling, normalize=wanted) for wanted in (False, True))
    assert plain.dtype == unit.dtype == np.float32
    assert plain.shape == (len(TEXTS), model.config.width)
    truth = expected(model, pooling)
    assert plain == pytest.approx(truth, abs=2e-5)  # test_equivalence.py has the derived bounds
    assert unit == pytest.approx(truth / np.linalg.norm(truth, axis=1, keepdims=True), abs=2e-5)
    if pruning and pooling == "mean":
        assert plain != pytest.approx(model.with_pruning(None).embed(TEXTS, pooling=pooling, normalize=False), abs=1e-3)


def test_a_text_has_the_same_bits_alone_in_any_batch_and_with_any_threads(folder: Path) -> None:
    pytest.importorskip("numba", reason="bit-equality needs the compiled kernels")
    for precision in ("fp32", "int8"):
        one, three = (minilpt.load(folder, precision=precision, threads=count) for count in (1, 3))
        together = one.embed(TEXTS * 40)
        assert np.array_equal(together, three.embed(TEXTS * 40, batch_tokens=333))
        alone = np.concatenate([three.embed([text]) for text in TEXTS])
        assert np.array_equal(together, np.tile(alone, (40, 1)))
        assert np.array_equal(one.embed(TEXTS[::-1]), alone[::-1])


def test_int8_is_near(folder: Path, model: Classifier) -> None:
    pytest.importorskip("numba", reason="int8 needs the compiled kernels")
    cosines = (minilpt.load(folder, precision="int8").embed(TEXTS) * model.embed(TEXTS)).sum(axis=1)
    assert (cosines > 0.99).all()
    assert (cosines < 1).any()


def test_on_numpy(folder: Path, model: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with pytest.warns(minilpt.MinilptWarning, match="running on NumPy"):
        slow = minilpt.load(folder)
    for pooling in ("mean", "cls"):
        assert slow.embed(TEXTS, pooling=pooling) == pytest.approx(model.embed(TEXTS, pooling=pooling), abs=2e-5)


def test_nothing_gives_no_rows(model: Classifier) -> None:
    for pooling in ("mean", "cls"):
        assert model.embed([], pooling=pooling).shape == (0, 32)


def test_means_and_lengths() -> None:
    rows = np.array([[1, 2], [3, 4], [0, 0]], np.float32)
    found = means(rows, np.array([0, 2, 3], np.int32))
    assert found.tolist() == [[2, 3], [0, 0]]
    assert normalized(found).tolist() == [[2 / 13**0.5, 3 / 13**0.5], [0, 0]]
    assert means(rows[:0], np.zeros(1, np.int32)).shape == (0, 2)


# What the folder says.


def sentence_folder(folder: Path, modules: object, pooling: object = None, **files: object) -> Path:
    write_json(folder / "modules.json", modules)
    if pooling is not None:
        write_json(folder / "1_Pooling" / "config.json", pooling)
    for name, content in files.items():
        write_json(folder / f"{name}.json", content)
    return folder


MEAN = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
CLS = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}


@pytest.mark.parametrize(
    "modules, pooling, wanted",
    [
        (MODULES, MEAN, Embedding("mean", True)),
        (MODULES[:2], MEAN, Embedding("mean", False)),
        (MODULES, CLS, Embedding("cls", True)),
        (MODULES[:2], CLS, Embedding("cls", False)),
        (
            MODULES[:2],
            {"embedding_dimension": 32, "pooling_mode": "cls", "include_prompt": True},
            Embedding("cls", False),
        ),
        (MODULES[:2], {"pooling_mode": ["mean"]}, Embedding("mean", False)),
        (MODULES[:2], {}, Embedding("mean", False)),
        ([row | {"type": row["type"].replace(CLASS, f"{NEW}x.")} for row in MODULES], CLS, Embedding("cls", True)),
    ],
    ids=["mean, unit", "mean", "cls, unit", "cls", "cls, new keys", "mean, new keys", "nothing said", "new packages"],
)
def test_modules_json_says_pooling_and_normalize(
    tmp_path: Path, modules: list[Change], pooling: Change, wanted: Embedding
) -> None:
    model = minilpt.load(sentence_folder(headless(tmp_path), modules, pooling))
    assert read_embedding(tmp_path) == wanted
    said = model.embed(TEXTS, pooling=wanted.pooling, normalize=wanted.normalize)
    assert np.array_equal(model.embed(TEXTS), said)
    assert np.array_equal(
        model.embed(TEXTS, normalize=False), model.embed(TEXTS, pooling=wanted.pooling, normalize=False)
    )
    other = "cls" if wanted.pooling == "mean" else "mean"
    assert not np.allclose(model.embed(TEXTS, pooling=other, normalize=wanted.normalize), said)


def test_without_modules_json_it_is_the_normalised_mean(folder: Path, model: Classifier) -> None:
    assert read_embedding(folder) == Embedding("mean", True)
    assert np.array_equal(model.embed(TEXTS), model.embed(TEXTS, pooling="mean", normalize=True))
    assert np.linalg.norm(model.embed(TEXTS), axis=1) == pytest.approx(1, abs=1e-6)


def change(place: int, **values: Any) -> list[Change]:
    return [row | values if number == place else row for number, row in enumerate(MODULES)]


@pytest.mark.parametrize(
    "modules, pooling, said",
    [
        ([*MODULES[:2], {"path": "2_Dense", "type": f"{CLASS}Dense"}, MODULES[2]], MEAN, "Pooling, Dense, Normalize"),
        (MODULES[:1], MEAN, "wanted Transformer, Pooling and perhaps Normalize, found Transformer;"),
        ([], MEAN, "perhaps Normalize, found ;"),
        (change(1, type="my.Pooling"), MEAN, r"found Transformer, my\.Pooling, Normalize"),
        (["Transformer"], MEAN, "found 'Transformer'"),
        (change(0, path="0_BERT"), MEAN, "the Transformer must be in the folder itself, not in '0_BERT'"),
        (change(1, path="../1_Pooling"), MEAN, r"path '\.\./1_Pooling' is not the plain name of a folder here"),
        (
            MODULES,
            MEAN | {"pooling_mode_max_tokens": True},
            r"wanted one pooling mode, mean or cls, found \['max', 'mean'\]",
        ),
        (MODULES, {"pooling_mode": "lasttoken"}, r"found \['lasttoken'\]"),
        (MODULES, {"pooling_mode": ["cls", "mean"]}, r"found \['cls', 'mean'\]"),
        (MODULES, {"pooling_mode": 3}, r"found \[3\]"),
        (MODULES, {"pooling_mode": {}}, r"found \[\{\}\]"),
    ],
    ids=[
        "dense",
        "no pooling",
        "none",
        "of my own",
        "a string",
        "elsewhere",
        "outside",
        "two modes",
        "last token",
        "two new modes",
        "a number",
        "an object",
    ],
)
def test_other_modules_are_refused_unless_pooling_is_chosen(
    tmp_path: Path, modules: Any, pooling: Change, said: str
) -> None:
    model = minilpt.load(sentence_folder(headless(tmp_path), modules, pooling))
    with pytest.raises(UnsupportedModelError, match=said) as caught:
        model.embed(TEXTS)
    assert "or choose pooling= and normalize= yourself" in str(caught.value)
    assert model.embed(TEXTS, pooling="mean").shape == (len(TEXTS), 32)


def test_a_default_prompt_is_refused(tmp_path: Path) -> None:
    prompts = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    model = minilpt.load(sentence_folder(headless(tmp_path), MODULES, MEAN, config_sentence_transformers=prompts))
    with pytest.raises(UnsupportedModelError, match=r"default_prompt_name 'query': put the prompt before the texts"):
        model.embed(TEXTS)
    write_json(tmp_path / "config_sentence_transformers.json", prompts | {"default_prompt_name": None})
    assert len(model.embed(TEXTS)) == len(TEXTS)


@pytest.mark.parametrize("damage", ["{", "{}", None], ids=["cut", "an object", "no pooling"])
def test_damaged_files_are_errors_of_ours(tmp_path: Path, damage: str | None) -> None:
    model = minilpt.load(sentence_folder(headless(tmp_path), MODULES))
    if damage is not None:
        (tmp_path / "modules.json").write_text(damage)
    with pytest.raises(ModelFileError, match=r"modules\.json: |1_Pooling.config\.json: no such file"):
        model.embed(TEXTS)


def test_sentence_bert_config_limits_tokens_and_makes_letters_small(tmp_path: Path) -> None:
    headless(tmp_path)
    checkpoints.write_vocabulary(tmp_path, do_lower_case=False)
    assert minilpt.load(tmp_path).max_tokens == 40
    sensitive = minilpt.load(tmp_path).encode(["Good FILM"])
    write_json(tmp_path / "sentence_bert_config.json", {"max_seq_length": 12, "do_lower_case": True})
    model = minilpt.load(tmp_path)
    assert model.max_tokens == 12
    assert len(model.encode(["film " * 30])[0][0]) == 12
    assert model.encode(["Good FILM [SEP]"]) == model.encode(["good film [SEP]"])
    assert model.encode(["Good FILM"]) != sensitive
    write_json(tmp_path / "sentence_bert_config.json", {"max_seq_length": None, "do_lower_case": False})
    assert minilpt.load(tmp_path).max_tokens == 40
    assert minilpt.load(tmp_path).encode(["Good FILM"]) == sensitive


# Encoders without a head.


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("prefix", [True, False], ids=["prefix", "bare"])
def test_an_encoder_loads_with_or_without_a_prefix_and_its_pooler_is_ignored(
    tmp_path: Path, family: str, prefix: bool
) -> None:
    folder = headless(tmp_path, family)
    wanted = minilpt.load(folder).embed(TEXTS)
    tensors = checkpoints.tensors(folder)
    assert all(name.startswith(f"{family}.") for name in tensors)
    pooler = {
        f"{family}.pooler.dense.{part}": np.ones((32, 32)[: 2 - (part == "bias")], np.float32)
        for part in ("weight", "bias")
    }
    rename: Callable[[str], str] = str if prefix else lambda name: name.removeprefix(f"{family}.")
    save.save_weights(folder, {rename(name): tensor for name, tensor in (tensors | pooler).items()})
    model = minilpt.load(folder)
    assert np.array_equal(model.embed(TEXTS), wanted)
    assert model.classes_.tolist() == []
    assert model.config.labels == ()


def test_what_needs_a_head_says_that_there_is_none(tmp_path: Path, model: Classifier) -> None:
    asks: list[Callable[[], object]] = [
        lambda: model.predict(TEXTS),
        lambda: model.predict_proba(TEXTS),
        lambda: model.logits(TEXTS),
        lambda: model.forward([[2, 5, 3]]),
        lambda: model.explain("good"),
        lambda: minilpt.calibrate(model, [f"good {'film ' * n}" for n in range(1, 30)], flops_ratio=0.5),
        lambda: minilpt.quantize_model(model, TEXTS * 4, tmp_path / "out"),
    ]
    for ask in asks:
        with pytest.raises(UnsupportedModelError, match=r"this bert encoder has no classification head: embed\(\)"):
            ask()
    assert not (tmp_path / "out").exists()


def test_integer_precisions_have_no_embeddings(folder: Path) -> None:
    pytest.importorskip("numba", reason="ibert needs the compiled kernels")
    with pytest.raises(minilpt.BackendError, match='precision "ibert" is for classifiers'):
        minilpt.load(folder, precision="ibert")
    with pytest.raises(minilpt.BackendError, match='precision "ibert" is for classifiers'):
        minilpt.load(precision="ibert").embed(TEXTS)


@pytest.mark.parametrize("wrong", ["max", "Mean", "", 1, []])
def test_an_unknown_pooling_is_refused(model: Classifier, wrong: Any) -> None:
    with pytest.raises(InputError, match="pooling must be one of mean, cls, found"):
        model.embed(TEXTS, pooling=wrong)


@pytest.mark.parametrize(
    "architectures, modules, labels",
    [
        (["BertModel"], False, 0),
        (["BertForMaskedLM"], True, 0),
        (None, True, 0),
        ([], True, 0),
        (None, False, 3),
        (["BertForSequenceClassification"], True, 3),
        (["BertForSequenceClassification"], False, 3),
        (["BertForMaskedLM"], False, 3),  # load() then misses the head's tensors and says so
    ],
)
def test_architectures_and_modules_json_say_whether_there_is_a_head(
    tmp_path: Path, architectures: list[str] | None, modules: bool, labels: int
) -> None:
    write_json(tmp_path / "config.json", checkpoints.config(architectures=architectures))
    if modules:
        write_json(tmp_path / "modules.json", MODULES)
    assert len(read_config(tmp_path).labels) == labels


@pytest.mark.parametrize("wrong", ["BertModel", [3], {"a": 1}])
def test_architectures_are_strings(tmp_path: Path, wrong: Any) -> None:
    write_json(tmp_path / "config.json", checkpoints.config(architectures=wrong))
    with pytest.raises(UnsupportedModelError, match="architectures must be an array of strings"):
        read_config(tmp_path)


def test_a_head_that_has_no_place_is_refused(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path)
    write_json(folder / "config.json", checkpoints.config(architectures=["BertModel"]))
    with pytest.raises(minilpt.WeightsError, match=r"have no place in this bert encoder: classifier\.bias"):
        minilpt.load(folder)
