"""config.json: what is read, what is refused, and what is said about the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import minilpt
from minilpt import config
from minilpt.config import ModelConfig, read_config

import checkpoints

BIG = 10**400  # a JSON integer that no float holds


def read(folder: Path, model_type: str = "bert", **changes: Any) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(checkpoints.config(model_type, **changes)))
    return read_config(folder)


def refusal(folder: Path, model_type: str = "bert", **changes: Any) -> str:
    """The message with which this config is refused; it names the file."""
    with pytest.raises(minilpt.UnsupportedModelError) as caught:
        read(folder, model_type, **changes)
    assert str(folder / "config.json") in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("model_type", checkpoints.CONFIGS)
def test_every_family_is_read(tmp_path: Path, model_type: str) -> None:
    found = read(tmp_path, model_type, labels=4)
    own_family = {"xlm-roberta": "roberta", "camembert": "roberta", "ltp": "ibert"}
    assert found.family == own_family.get(model_type, model_type)
    assert (found.layers, found.heads, found.width, found.inner, found.vocabulary) == (3, 4, 32, 48, 60)
    assert found.labels == ("class-0", "class-1", "class-2", "class-3")
    assert found.max_tokens == 40
    assert found.embedding_width == (20 if model_type == "electra" else 32)
    assert found.segments == {"bert": 2, "electra": 2, "distilbert": 0}.get(model_type, 1)
    assert found.head_activation == {"distilbert": "relu", "electra": "gelu"}.get(model_type, "tanh")


@pytest.mark.parametrize(
    "name", ["Bert", "Roberta", "XLMRoberta", "Camembert", "DistilBert", "Electra", "IBert"], ids=str
)
def test_a_config_of_transformers_says_nothing_that_minilpt_does_not_know(tmp_path: Path, name: str) -> None:
    """Warnings are errors here; the values are those of the configuration class."""
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, f"{name}Config")(num_labels=3, problem_type="single_label_classification")
    theirs.save_pretrained(tmp_path)
    ours = read_config(tmp_path)
    assert ours.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert (ours.layers, ours.heads, ours.width) == (
        theirs.num_hidden_layers,
        theirs.num_attention_heads,
        theirs.hidden_size,
    )
    assert ours.positions == theirs.max_position_embeddings
    assert ours.pad_token_id == theirs.pad_token_id
    assert ours.eps == getattr(theirs, "layer_norm_eps", 1e-12)
    assert ours.segments == getattr(theirs, "type_vocab_size", 0)
    assert ours.embedding_width == getattr(theirs, "embedding_size", theirs.hidden_size)


def test_settings_left_out_take_the_defaults_of_the_class(tmp_path: Path) -> None:
    left_out = dict.fromkeys(("type_vocab_size", "layer_norm_eps", "hidden_act", "pad_token_id"))
    bert, roberta = read(tmp_path, "bert", **left_out), read(tmp_path, "roberta", **left_out)
    assert (bert.segments, bert.eps, bert.activation, bert.pad_token_id) == (2, 1e-12, "gelu", 0)
    assert (roberta.segments, roberta.eps, roberta.activation, roberta.pad_token_id) == (2, 1e-12, "gelu", 1)


def test_roberta_s_514_rows_hold_512_tokens(tmp_path: Path) -> None:
    assert read(tmp_path, "roberta", max_position_embeddings=514).max_tokens == 512
    assert read(tmp_path, "roberta", max_position_embeddings=514, pad_token_id=0).max_tokens == 513
    assert read(tmp_path, "bert", max_position_embeddings=512).max_tokens == 512


@pytest.mark.parametrize("model_type", [None, "gpt2", "BERT", "deberta-v2", "longformer", 3, ["bert"], {}, True])
def test_an_unknown_model_type_is_refused_with_the_known_ones(tmp_path: Path, model_type: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps(checkpoints.config() | {"model_type": model_type}))
    with pytest.raises(minilpt.UnsupportedModelError) as caught:
        read_config(tmp_path)
    assert all(name in str(caught.value) for name in (repr(model_type), *config.FAMILIES))


@pytest.mark.parametrize("value", ["gelu_fast", "silu", "", 1, [], True])
@pytest.mark.parametrize("model_type, key", [("bert", "hidden_act"), ("distilbert", "activation")])
def test_an_unknown_activation_is_refused(tmp_path: Path, model_type: str, key: str, value: object) -> None:
    assert f"{key} {value!r}" in refusal(tmp_path, model_type, **{key: value})


@pytest.mark.parametrize("value", ["relative_key", "relative_key_query", "rotary"])
def test_a_position_embedding_other_than_absolute_is_refused(tmp_path: Path, value: str) -> None:
    assert f"position_embedding_type {value!r}" in refusal(tmp_path, position_embedding_type=value)


FOREIGN = {bool: True, str: "other", dict: {"0": [1]}, type(None): 7}


@pytest.mark.parametrize("key", config.REFUSED_UNLESS)
def test_a_setting_that_changes_results_is_refused_and_its_neutral_values_pass(tmp_path: Path, key: str) -> None:
    accepted = config.REFUSED_UNLESS[key]
    path = tmp_path / "config.json"
    for value in accepted:
        path.write_text(json.dumps(checkpoints.config() | {key: value}))
        read_config(tmp_path)
    for kind in {type(value) for value in accepted}:
        assert key in refusal(tmp_path, **{key: FOREIGN[kind]})


SIZES = {
    "bert": (
        "num_hidden_layers num_attention_heads hidden_size intermediate_size vocab_size max_position_embeddings "
        "type_vocab_size"
    ).split(),
    "distilbert": "n_layers n_heads dim hidden_dim vocab_size max_position_embeddings".split(),
}
SIZE_KEYS = [(family, key) for family, keys in SIZES.items() for key in keys]


@pytest.mark.parametrize("model_type, key", SIZE_KEYS)
def test_a_size_is_a_positive_integer_or_refused(tmp_path: Path, model_type: str, key: str) -> None:
    for value in (0, -1, 2.0, "2", True, [2]):
        assert f"{key} must be an integer of at least 1, found {value!r}" in refusal(
            tmp_path, model_type, **{key: value}
        )


@pytest.mark.parametrize("model_type, key", [pair for pair in SIZE_KEYS if pair[1] != "type_vocab_size"])
def test_a_size_without_default_must_be_there(tmp_path: Path, model_type: str, key: str) -> None:
    assert f"{key} is missing" in refusal(tmp_path, model_type, **{key: None})


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of the 5 heads"),
        ({"pad_token_id": -1}, "pad_token_id must be an integer of at least 0"),
        ({"pad_token_id": False}, "pad_token_id must be an integer"),
        ({"layer_norm_eps": 0}, "layer_norm_eps must lie between 0 and 1"),
        ({"layer_norm_eps": 1}, "layer_norm_eps"),
        ({"layer_norm_eps": "1e-12"}, "layer_norm_eps"),
        ({"layer_norm_eps": True}, "layer_norm_eps"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps"),
        ({"layer_norm_eps": BIG}, "layer_norm_eps"),
        ({"embedding_size": 16}, "embedding_size 16 differs from hidden_size 32: factorised"),
        ({"embedding_size": "32"}, "embedding_size"),
        ({"problem_type": "ranking"}, "problem_type 'ranking'"),
        ({"problem_type": ["regression"]}, "problem_type"),
        ({"prune_mode": "absolute_threshold"}, "prune_mode 'absolute_threshold'"),
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert said in refusal(tmp_path, **changes)


def test_roberta_needs_a_position_after_the_padding_row(tmp_path: Path) -> None:
    assert "leaves no position after row 41" in refusal(tmp_path, "roberta", pad_token_id=41)
    assert read(tmp_path, "roberta", pad_token_id=40).max_tokens == 1
    assert read(tmp_path, "bert", pad_token_id=59).max_tokens == 40


def test_electra_alone_may_have_narrow_embeddings(tmp_path: Path) -> None:
    assert read(tmp_path, "electra", embedding_size=8).embedding_width == 8
    assert read(tmp_path, "electra", embedding_size=None).embedding_width == 32
    assert read(tmp_path, "bert", embedding_size=32).embedding_width == 32
    assert "embedding_size" in refusal(tmp_path, "electra", embedding_size=0)


def test_a_few_bytes_of_config_cannot_ask_for_much_memory(tmp_path: Path) -> None:
    """Names are made for every layer and for every label that has none, before the checkpoint is looked at."""
    assert "num_hidden_layers" in refusal(tmp_path, num_hidden_layers=10**9)
    assert "n_layers" in refusal(tmp_path, "distilbert", n_layers=10**9)
    assert "num_labels" in refusal(tmp_path, id2label=None, num_labels=10**9)


@pytest.mark.parametrize(
    "changes, labels",
    [
        ({"id2label": {"0": "no", "1": "yes"}}, ("no", "yes")),
        ({"id2label": {"1": "yes", "0": "no"}}, ("no", "yes")),
        ({"id2label": {"0": 0, "1": 1}}, ("0", "1")),
        ({"id2label": {"0": "only"}}, ("only",)),
        ({"id2label": {str(i): f"c{i}" for i in range(12)}}, tuple(f"c{i}" for i in range(12))),
        ({"id2label": None}, ("LABEL_0", "LABEL_1")),
        ({"id2label": None, "num_labels": 1}, ("LABEL_0",)),
        ({"id2label": None, "_num_labels": 3}, ("LABEL_0", "LABEL_1", "LABEL_2")),
    ],
    ids=str,
)
def test_labels_come_from_id2label_or_a_count(tmp_path: Path, changes: dict[str, Any], labels: tuple[str, ...]) -> None:
    assert read(tmp_path, **changes).labels == labels


@pytest.mark.parametrize(
    "changes",
    [
        {"id2label": {}},
        {"id2label": ["no", "yes"]},
        {"id2label": "no"},
        {"id2label": {"1": "no", "2": "yes"}},
        {"id2label": {"0": "no", "2": "yes"}},
        {"id2label": {"zero": "no"}},
        {"id2label": {"0": "same", "1": "same"}},
        {"id2label": {"0": 1, "1": "1"}},
        {"id2label": None, "num_labels": 0},
        {"id2label": None, "num_labels": True},
        {"id2label": None, "num_labels": "2"},
        {"id2label": None, "_num_labels": 2.0},
    ],
    ids=str,
)
def test_labels_that_do_not_name_every_output_once_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    message = refusal(tmp_path, **changes)
    assert "id2label" in message or "num_labels" in message


@pytest.mark.parametrize(
    "mode, key",
    [
        ("absolute_threshold", "final_token_threshold"),
        ("threshold", "token_threshold"),
        ("topk", "token_keep_rate"),
    ],
)
def test_ltp_settings_are_read_and_checked(tmp_path: Path, mode: str, key: str) -> None:
    kept = {"prune_mode": mode, "final_token_threshold": None}
    assert read(tmp_path, "ltp", **kept | {key: 0.25}).ltp == config.LtpSettings(mode, 0.25)
    for value in (None, "0.1", True, float("nan"), float("inf"), BIG):
        assert f"needs the number {key}" in refusal(tmp_path, "ltp", **kept | {key: value})


def test_an_ltp_checkpoint_may_be_unpruned_and_unknown_modes_are_refused(tmp_path: Path) -> None:
    assert read(tmp_path, "ltp", prune_mode=None).ltp is None
    assert read(tmp_path, "ibert", prune_mode="none").ltp is None
    assert "prune_mode 'rising_threshold'" in refusal(tmp_path, "ltp", prune_mode="rising_threshold")
    assert "prune_mode ['topk']" in refusal(tmp_path, "ltp", prune_mode=["topk"])


def test_unknown_settings_are_named_in_one_warning(tmp_path: Path) -> None:
    with pytest.warns(minilpt.MinilptWarning) as caught:
        read(tmp_path, zeta=1, alpha=2, architectures=["BertForSequenceClassification"])
    assert len(caught) == 1
    assert "taken as harmless: alpha, zeta" in str(caught[0].message)


def test_the_warning_points_at_the_caller_of_load(tmp_path: Path) -> None:
    checkpoints.write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(checkpoints.config(zeta=1)))
    with pytest.warns(minilpt.MinilptWarning) as caught:
        minilpt.load(tmp_path)
    assert Path(caught[0].filename) == Path(__file__)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b'"bert"',
        b'{"model_type": "bert"\xff}',
        b"[" * 100_000,
        b'{"vocab_size": ' + b"9" * 5000 + b"}",
    ],
    ids=["empty", "cut", "list", "null", "string", "latin-1", "nested", "digits"],
)
def test_a_config_that_is_no_json_object_is_an_error_naming_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(minilpt.ModelFileError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_folder_without_config_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(minilpt.ModelFileError, match=r"config\.json: no such file"):
        read_config(tmp_path)
