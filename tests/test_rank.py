"""Rerankers: what sentence-transformers' CrossEncoder stores of its activation, and `rank`, against transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

import minilpt

import checkpoints
import oracles
import tolerances

QUERY = "the good film"
DOCUMENTS = ["bad", "a good , good film !", "", "not the film", "bad", "films badly", "a the a the a the bad ! ! ,"]
IDENTITY, SIGMOID = torch.nn.Identity(), torch.nn.Sigmoid()
# Keys of config.json -> what a CrossEncoder of one label does to its outputs.
ACTIVATIONS: list[tuple[Mapping[str, Any], torch.nn.Module]] = [
    ({}, SIGMOID),
    ({"problem_type": "regression"}, IDENTITY),
    ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, IDENTITY),
    ({"sbert_ce_default_activation_function": "torch.nn.modules.activation.Sigmoid"}, SIGMOID),
    ({"sbert_ce_default_activation_function": None}, SIGMOID),
    ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "5.1.0"}}, IDENTITY),
    ({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}, SIGMOID),
    ({"sentence_transformers": {"version": "5.1.0"}}, SIGMOID),
    (
        {
            "sentence_transformers": {"activation_fn": "torch.nn.Identity"},
            "sbert_ce_default_activation_function": "torch.nn.modules.activation.Sigmoid",
        },
        IDENTITY,
    ),
]


def bert(folder: Path) -> transformers.PreTrainedTokenizerFast:
    checkpoints.write_vocabulary(folder)
    return transformers.BertTokenizerFast(str(folder / "vocab.txt"))


def roberta(folder: Path) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of single bytes."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet())]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.RobertaTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., minilpt.Classifier]:
    """A tiny model with changed settings."""

    def make(labels: int = 1, **changes: Any) -> minilpt.Classifier:
        content = checkpoints.config(labels=labels) | changes
        return minilpt.load(checkpoints.write_vocabulary(checkpoints.write(tmp_path, content)))

    return make


@pytest.mark.parametrize(("settings", "activation"), ACTIVATIONS, ids=lambda value: str(value)[:60])
@pytest.mark.parametrize(("architecture", "tokenizer_of"), [("bert", bert), ("roberta", roberta)])
def test_rank_equivalence_with_transformers(
    tmp_path: Path,
    architecture: str,
    tokenizer_of: Callable[[Path], transformers.PreTrainedTokenizerFast],
    settings: Mapping[str, Any],
    activation: torch.nn.Module,
) -> None:
    twin = oracles.build(tmp_path, architecture, labels=1, vocab_size=270, max_position_embeddings=80)
    tokenizer = tokenizer_of(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    # As CrossEncoder does it, all at once: transformers takes a single pair's empty second text for none.
    encoded = tokenizer([QUERY] * len(DOCUMENTS), DOCUMENTS, return_token_type_ids=True)
    batch = list(zip(encoded["input_ids"], encoded["token_type_ids"], strict=True))
    truth = oracles.transformers_logits(twin, batch)
    cost = tolerances.cost_of(twin.weights, twin.exact, twin.config, None, batch)
    bound = tolerances.logits_bound(cost, truth)  # the sigmoid's slope is a quarter at most
    wanted = activation(torch.from_numpy(truth)).numpy()[:, 0]

    model = minilpt.load(tmp_path)
    ranked = model.rank(QUERY, DOCUMENTS, return_documents=True)
    places = [row["corpus_id"] for row in ranked]
    scores = np.array([row["score"] for row in ranked])
    assert sorted(places) == list(range(len(DOCUMENTS)))
    assert [row["text"] for row in ranked] == [DOCUMENTS[place] for place in places]
    assert np.abs(scores - wanted[places]).max() <= bound
    assert (np.diff(scores) <= 0).all()
    (best,) = model.predict([(QUERY, DOCUMENTS[places[0]])])
    assert abs(best.score - scores[0]) <= 2 * bound


def test_equal_scores_stay_in_order_and_top_k_cuts(changed: Callable[..., minilpt.Classifier]) -> None:
    model = changed()
    ranked = model.rank(QUERY, DOCUMENTS)
    places = [row["corpus_id"] for row in ranked]
    assert places.index(4) == places.index(0) + 1  # the same text twice
    assert [set(row) for row in ranked] == [{"corpus_id", "score"}] * len(DOCUMENTS)
    assert model.rank(QUERY, DOCUMENTS, top_k=2, batch_tokens=1) == ranked[:2]
    assert model.rank(QUERY, iter(DOCUMENTS), top_k=100) == ranked
    assert model.rank(QUERY, []) == []


def test_several_labels_do_not_rank(changed: Callable[..., minilpt.Classifier]) -> None:
    with pytest.raises(minilpt.UnsupportedModelError, match="one label, this one has class-0, class-1"):
        changed(labels=2).rank(QUERY, DOCUMENTS)


@pytest.mark.parametrize(
    ("query", "documents", "options"),
    [
        (QUERY, "good", {}),
        (QUERY, [("good", "bad")], {}),
        (["good"], ["bad"], {}),
        (QUERY, DOCUMENTS, {"top_k": 0}),
        (QUERY, DOCUMENTS, {"top_k": True}),
        (QUERY, DOCUMENTS, {"top_k": 1.5}),
    ],
)
def test_rank_refuses_what_is_no_query_or_no_list(
    changed: Callable[..., minilpt.Classifier], query: Any, documents: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(minilpt.InputError):
        changed().rank(query, documents, **options)


@pytest.mark.parametrize("name", ["torch.nn.modules.activation.Tanh", "somewhere.Sigmoid", 3, ["torch.nn.Sigmoid"]])
def test_other_activations_are_refused(changed: Callable[..., minilpt.Classifier], name: Any) -> None:
    with pytest.raises(minilpt.UnsupportedModelError, match=r"sbert_ce_default_activation_function .*torch\.nn\.Sigm"):
        changed(sbert_ce_default_activation_function=name)
    with pytest.raises(minilpt.UnsupportedModelError, match=r"sentence_transformers\.activation_fn"):
        changed(sentence_transformers={"activation_fn": name})


@pytest.mark.parametrize(
    ("name", "problem_type"), [("Identity", None), ("Sigmoid", "multi_label_classification")], ids=str
)
def test_several_labels_have_a_softmax_unless_sigmoid_is_named(
    changed: Callable[..., minilpt.Classifier], name: str, problem_type: str | None
) -> None:
    model = changed(labels=3, sentence_transformers={"activation_fn": f"torch.nn.{name}"})
    assert model.config.problem_type == problem_type
    logits = torch.from_numpy(model.logits(["good film"])).double()
    wanted = torch.softmax(logits, 1) if problem_type is None else torch.sigmoid(logits)
    assert np.allclose(model.predict_proba(["good film"]), wanted.numpy(), rtol=1e-6, atol=0)
