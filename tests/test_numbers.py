"""Numbers at the edge: weights and activations that are not finite are named, and all others are computed right."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import minilpt
from minilpt import reference
from minilpt.config import read_config
from minilpt.kernels import COMPILED, NUMPY
from minilpt.quantize import quantize_layers, quantize_rows
from minilpt.weights import checkpoint

import checkpoints
import tolerances

pytest.importorskip("numba", reason="compiled kernels need numba")

ROWS = [[2, 5, 6, 7, 8, 9, 3], [2, 10, 11, 12, 13, 14, 15, 16, 17, 3], [2, 3]]  # token 5 in the first only
WORDS = "bert.embeddings.word_embeddings.weight"
Change = Callable[[dict[str, Any]], object]
precisions = pytest.mark.parametrize("precision", ["fp32", "int8"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoints.write_vocabulary(checkpoints.write(tmp_path / "bert"))


def changed(folder: Path, change: Change) -> Path:
    """The folder with other weights, which `change` sets in place."""
    weights = {name: tensor.copy() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


@precisions
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named_wherever_it_is(folder: Path, precision: str, value: float) -> None:
    """In each tensor in turn: at load, but in the word table, which is read row by row, with the first answer."""
    for name, sound in load_file(folder / "model.safetensors").items():
        place = (5,) * sound.ndim if len(sound) > 5 else (1,) + (5,) * (sound.ndim - 1)

        def change(weights: dict[str, Any], name: str = name, place: tuple[int, ...] = place) -> None:
            weights[name][place] = value

        changed(folder, change)
        with pytest.raises(minilpt.WeightsError) as caught:
            model = minilpt.load(folder, precision=precision, threads=1)
            assert name == WORDS, f"loaded with {value} in {name}"
            model.forward(ROWS)
        assert re.search(rf"model\.safetensors: {re.escape(name)} holds {value} at \({place[0]},", str(caught.value))
        changed(folder, lambda weights, name=name, sound=sound: weights.update({name: sound}))  # type: ignore[misc]
    assert np.isfinite(minilpt.load(folder, precision=precision).forward(ROWS).logits).all()


def test_a_scale_that_takes_an_int8_weight_beyond_float32_is_named(folder: Path) -> None:
    name = "bert.encoder.layer.1.attention.self.key.weight"

    def as_int8(weights: dict[str, Any]) -> None:
        weights[name], weights[f"{name}_scale"] = quantize_rows(weights[name])
        weights[f"{name}_scale"][3] = 3e38

    changed(folder, as_int8)
    with pytest.raises(minilpt.WeightsError, match=rf"model\.safetensors: {re.escape(name)} holds -?inf at \(3,"):
        minilpt.load(folder, threads=1)


def test_a_weight_that_is_not_finite_is_not_quantised(folder: Path, tmp_path: Path) -> None:
    model = minilpt.load(folder)
    texts = ["good film", "bad film", "a film"] * 40
    for name in (WORDS, "bert.encoder.layer.1.attention.self.key.weight"):
        sound = load_file(folder / "model.safetensors")[name]
        changed(folder, lambda weights, name=name: weights[name].__setitem__((7, 7), np.nan))  # type: ignore[misc]
        with pytest.raises(minilpt.WeightsError, match=rf"{name} holds nan at \(7, 7\)"):
            minilpt.quantize_model(model, texts, tmp_path / "ibert")
        assert not (tmp_path / "ibert").exists()
        changed(folder, lambda weights, name=name, sound=sound: weights.update({name: sound}))  # type: ignore[misc]
    minilpt.quantize_model(model, texts, tmp_path / "ibert")
    changed(tmp_path / "ibert", lambda weights: weights[f"{WORDS}_scale"].__setitem__(7, np.nan))
    with pytest.raises(minilpt.WeightsError, match=rf"{WORDS}_scale holds nan at \(7,\)"):
        minilpt.load(tmp_path / "ibert", precision="ibert")


def multiply(name: str, factor: float, row: int | slice = slice(None)) -> Change:
    return lambda weights: weights[name].__setitem__(row, weights[name][row] * np.float32(factor))


def saturate(weights: dict[str, Any]) -> None:
    """All the head's inputs 1, and their weights close to float32's end."""
    weights["bert.pooler.dense.bias"][:], weights["classifier.weight"][:] = 100, 3e38


LAYER = "bert.encoder.layer.1"
OVERFLOWS: dict[str, tuple[Change, str]] = {
    "a word": (multiply(WORDS, 1e30, 5), "embeddings"),
    "queries": (multiply(f"{LAYER}.attention.self.query.weight", 1e38), "layers.1"),
    "values": (multiply(f"{LAYER}.attention.self.value.weight", 1e38), "layers.1"),
    "feed-forward": (multiply(f"{LAYER}.intermediate.dense.weight", 1e38), "layers.1"),
    "squares in LayerNorm": (multiply(f"{LAYER}.output.dense.weight", 1e25), "layers.1"),
    "outputs": (saturate, "head"),
}


@precisions
@pytest.mark.parametrize("what", OVERFLOWS)
def test_activations_that_outgrow_float32_are_an_error_naming_the_layer(
    folder: Path, what: str, precision: str
) -> None:
    change, where = OVERFLOWS[what]
    model = minilpt.load(changed(folder, change), precision=precision, threads=2)
    said = rf"{folder}: the answer to a sequence of 7 tokens is not finite.* the output of {where} is the first"
    with pytest.raises(minilpt.NumbersError, match=said):
        model.forward([*ROWS[1:], *ROWS[:1]] if what == "a word" else ROWS)
    for ask in (model.predict, model.predict_proba, model.logits, *([] if where == "head" else [model.embed])):
        with pytest.raises(minilpt.NumbersError, match=rf"the output of {where} is the first"):
            ask(["the film", "good film", "the"])


def test_a_text_that_can_be_answered_is_beside_one_that_cannot(folder: Path) -> None:
    """The check looks at answers, so a word that nobody uses costs nobody his."""
    model = minilpt.load(changed(folder, OVERFLOWS["a word"][0]))
    assert model.predict(["the film", "bad film"])
    with pytest.raises(minilpt.NumbersError):
        model.predict(["the film", "good film"])


@pytest.mark.parametrize("layer_norm", [reference.layer_norm, NUMPY["layer_norm"], COMPILED["layer_norm"]])
def test_a_variance_beyond_float32_is_not_taken_for_a_constant_row(layer_norm: Callable[..., Any]) -> None:
    x = np.float32(1e25) * np.arange(16, dtype=np.float32).reshape(1, 16)
    one = np.ones(16, np.float32)
    with np.errstate(all="ignore"):
        assert np.isnan(layer_norm(x, one, one, 1e-5)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 15, 16, 31, 40])
def test_quantising_a_row_does_not_lose_what_is_not_finite(value: float, place: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, 41)).astype(np.float32)
    x[1, place] = value
    weight, scale = np.ones((3, 41), np.int8), np.ones(3, np.float32)
    sound, lost = COMPILED["linear_int8"](x, weight, scale, np.zeros(3, np.float32))
    assert np.isfinite(sound).all()
    assert not np.isfinite(lost).any()


@precisions
@pytest.mark.filterwarnings("error")
def test_a_float16_file_whose_layernorm_inputs_overflow_float16_is_right(folder: Path, precision: str) -> None:
    """Sums in front of each LayerNorm beyond 65,504, which float32 holds, from weights that float16 holds."""
    loud = ("attention.output.dense.weight", "output.dense.weight", "attention.output.dense.bias")

    def change(weights: dict[str, Any]) -> None:
        for name, tensor in weights.items():
            weights[name] = (tensor * (30_000 if name.endswith(loud) else 1)).astype(np.float16)

    config = read_config(changed(folder, change))
    stored = checkpoint.load_weights(folder, config)
    weights = quantize_layers(stored) if precision == "int8" else dict(stored.items())
    exact = tolerances.widened(weights)
    sequences = [(row, [0] * len(row)) for row in ROWS]
    assert largest_norm_input(exact, config, ROWS[1]) > 65_504
    cost = tolerances.cost_of(weights, exact, config, None, sequences)
    found = minilpt.load(folder, precision=precision).forward(ROWS).logits
    for row, logits in zip(ROWS, found, strict=True):
        ids = np.array(row, np.int32)
        truth = reference.forward(exact, config, None, ids, np.zeros_like(ids)).logits
        assert np.abs(logits - truth).max() <= tolerances.logits_bound(cost, truth)


def largest_norm_input(weights: Any, config: Any, row: list[int]) -> float:
    """Of layer 0's first LayerNorm, in float64."""
    ids = np.array(row, np.int32)
    x = reference.embed(weights, config, ids, np.zeros_like(ids))

    def projected(name: str, x: Any) -> Any:
        return reference.linear(x, weights[f"layers.0.{name}.weight"], weights[f"layers.0.{name}.bias"])

    probs = reference.attention_probs(projected("query", x), projected("key", x), config.heads)
    attended = projected("attention_output", reference.attention_context(probs, projected("value", x)))
    return float(np.abs(x + attended).max())


@precisions
def test_with_all_tokens_pruned_but_the_first_the_answer_is_the_reference_s(folder: Path, precision: str) -> None:
    model = minilpt.load(folder, precision=precision, pruning=None, threads=2).with_pruning(
        {"schema_version": 1, "rule": "threshold", "thresholds": [1e9] * 3, "score_denominator": "initial"}
    )
    assert model.pruning is not None
    traced = model.forward(ROWS, trace=True)
    assert traced.ffn_lengths is not None and (traced.ffn_lengths == 1).all()
    found = model.forward(ROWS)
    assert (found.kept_tokens == 1).all()
    stored = checkpoint.load_weights(folder, model.config)
    weights = quantize_layers(stored) if precision == "int8" else dict(stored.items())
    exact, rule = tolerances.widened(weights), model.pruning.rule
    cost = tolerances.cost_of(weights, exact, model.config, rule, [(row, [0] * len(row)) for row in ROWS])
    for row, logits in zip(ROWS, found.logits, strict=True):
        ids = np.array(row, np.int32)
        truth = reference.forward(exact, model.config, rule, ids, np.zeros_like(ids)).logits
        assert np.abs(logits - truth).max() <= tolerances.logits_bound(cost, truth)
        assert np.array_equal(model.forward([row]).logits[0], logits)
