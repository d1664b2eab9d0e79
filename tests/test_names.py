"""The name tables, both ways: every tensor has one name of ours and one in the checkpoint, and transformers agrees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minilpt.config import ModelConfig, read_config
from minilpt.weights import names

import checkpoints

CLASSES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "camembert": "Camembert",
    "distilbert": "DistilBert",
    "electra": "Electra",
    "ibert": "IBert",
}
FAMILIES = tuple(checkpoints.CONFIGS)


def config_of(folder: Path, model_type: str) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(checkpoints.config(model_type)))
    return read_config(folder)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_tensor_has_one_name_on_each_side(tmp_path: Path, model_type: str) -> None:
    config = config_of(tmp_path, model_type)
    table = names.checkpoint_names(config)
    assert list(table) == list(names.expected_shapes(config))
    assert len(set(table.values())) == len(table)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_wanted_name_is_already_in_its_normal_form_and_no_unused_one(tmp_path: Path, model_type: str) -> None:
    config = config_of(tmp_path, model_type)
    for name in names.checkpoint_names(config).values():
        assert names.normalise(name, config.family) == name
        assert names.normalise(f"module.{name}", config.family) == name


@pytest.mark.parametrize("model_type", CLASSES)
def test_names_and_shapes_are_those_of_transformers(tmp_path: Path, model_type: str) -> None:
    """Everything in the state_dict is either read, under this name with this shape, or on the list of unused names."""
    transformers = pytest.importorskip("transformers")
    config = config_of(tmp_path, model_type)
    class_name = f"{CLASSES[model_type]}ForSequenceClassification"
    theirs = getattr(transformers, class_name)(
        getattr(transformers, f"{CLASSES[model_type]}Config").from_pretrained(tmp_path)
    ).state_dict()
    table, shapes = names.checkpoint_names(config), names.expected_shapes(config)
    assert {table[ours]: shapes[ours] for ours in table} == {
        name: tuple(tensor.shape)
        for name, tensor in theirs.items()
        if name in table.values() or not names.is_unused(name, config.family)
    }


def test_the_unused_list_leaves_every_encoder_and_head_name_alone(tmp_path: Path) -> None:
    """BERT alone reads a pooler, so only there may a wanted name look unused."""
    for model_type in FAMILIES:
        config = config_of(tmp_path, model_type)
        confused = {n for n in names.checkpoint_names(config).values() if names.is_unused(n, config.family)}
        assert confused == ({"bert.pooler.dense.weight", "bert.pooler.dense.bias"} if model_type == "bert" else set())


@pytest.mark.parametrize(
    "stored, family, normal",
    [
        ("module.bert.embeddings.LayerNorm.gamma", "bert", "bert.embeddings.LayerNorm.weight"),
        ("embeddings.LayerNorm.beta", "bert", "bert.embeddings.LayerNorm.bias"),
        ("pooler.dense.bias", "bert", "bert.pooler.dense.bias"),
        ("encoder.layer.0.output.dense.bias", "ibert", "ibert.encoder.layer.0.output.dense.bias"),
        ("transformer.layer.0.ffn.lin1.bias", "distilbert", "distilbert.transformer.layer.0.ffn.lin1.bias"),
        ("embeddings_project.weight", "electra", "electra.embeddings_project.weight"),
        ("classifier.out_proj.weight", "roberta", "classifier.out_proj.weight"),
        ("pre_classifier.weight", "distilbert", "pre_classifier.weight"),
        ("roberta.encoder.layer.0.output.dense.bias", "bert", "roberta.encoder.layer.0.output.dense.bias"),
        ("bert.gamma", "bert", "bert.gamma"),
        ("module.module.classifier.weight", "bert", "module.classifier.weight"),
    ],
)
def test_stored_names_are_brought_to_one_form(stored: str, family: str, normal: str) -> None:
    assert names.normalise(stored, family) == normal
    assert names.normalise(normal.removeprefix("module."), family) == normal.removeprefix("module.")
