"""What the engines are given: model shapes with random weights, sequences of lengths as in real sets, thresholds.

Everything follows from fixed seeds, so that every machine gets the same work and no data set is needed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minilpt import load, pruning, reference
from minilpt.config import ModelConfig, read_config
from minilpt.weights import checkpoint, names, resolve

from . import files

Ids = list[int]
Thresholds = tuple[float, ...]

# Standard deviation of a query's attention logits over random keys. Near 0 every token would get the same attention,
# and no threshold could tell tokens apart; trained encoders lie around 1 to 3.
ATTENTION_SPREAD = 1.5
COUNTED_RATIO = 0.53  # counted FLOPs of the pruned runs, as a share of the dense model's
CALIBRATION_TOKENS = 4000  # of the workload, on which thresholds are chosen


@dataclass(frozen=True)
class Shape:
    """A model shape: its config.json, and the first and last token ids of every sequence."""

    title: str
    config: dict[str, Any]
    first: int
    last: int


@dataclass(frozen=True)
class Lengths:
    """Token counts, special tokens included: exp(normal(mu, sigma)), rounded and clipped to low..high.

    mu and sigma are the mean and standard deviation of the logarithm, rounded, over the development set's tokens
    (WordPiece and byte-level BPE agree within 0.07); `sequences` is how many a full run takes.
    """

    title: str
    mu: float
    sigma: float
    low: int
    high: int
    sequences: int


_COMMON = {"hidden_act": "gelu", "num_attention_heads": 12}
SHAPES = {
    "roberta-base": Shape(
        "RoBERTa-base shape (12 x 768 x 3072)",
        _COMMON
        | {"model_type": "roberta", "architectures": ["RobertaForSequenceClassification"], "vocab_size": 50265}
        | {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072, "max_position_embeddings": 514}
        | {"type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
        | {"id2label": {str(label): f"label-{label}" for label in range(3)}},
        first=0,
        last=2,
    ),
    "minilm-l6": Shape(
        "MiniLM-L6 shape (6 x 384 x 1536)",
        _COMMON
        | {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "vocab_size": 30522}
        | {"num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536, "max_position_embeddings": 512}
        | {"type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0}
        | {"id2label": {str(label): f"label-{label}" for label in range(2)}},
        first=101,
        last=102,
    ),
}
LENGTHS = {
    "mnli": Lengths("MNLI-like", mu=3.54, sigma=0.46, low=8, high=128, sequences=512),
    "sst-2": Lengths("SST-2-like", mu=3.14, sigma=0.44, low=4, high=64, sequences=512),
    "imdb": Lengths("IMDB-like", mu=5.49, sigma=0.62, low=24, high=512, sequences=64),
}


def sequences(shape: str, lengths: str, count: int, seed: int = 0) -> list[Ids]:
    """Random sequences of token ids whose lengths follow the named distribution."""
    draw, of = np.random.default_rng([seed, 1]), LENGTHS[lengths]
    drawn = np.clip(np.rint(np.exp(draw.normal(of.mu, of.sigma, count))), of.low, of.high)
    return [sequence(shape, int(n), draw) for n in drawn]


def sequence(shape: str, length: int, draw: np.random.Generator) -> Ids:
    """One random sequence of this many tokens, between the shape's first and last token."""
    of = SHAPES[shape]
    inner = draw.integers(1000, of.config["vocab_size"] - 1000, length - 2)  # clear of special and unused ids
    return [of.first, *inner.tolist(), of.last]


def describe(rows: Sequence[Ids]) -> dict[str, Any]:
    """How many sequences, and the mean and range of their lengths."""
    counts = [len(row) for row in rows]
    return {"sequences": len(counts), "mean": sum(counts) / len(counts), "min": min(counts), "max": max(counts)}


def write_checkpoint(folder: Path, shape: str, seed: int = 0) -> None:
    """A whole model folder without a tokenizer: random weights under the family's own names."""
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / "config.json", json.dumps(SHAPES[shape].config, indent=2))
    model, draw = read_config(folder), np.random.default_rng([seed, 2])
    stored = names.checkpoint_names(model)
    tensors = {
        stored[ours]: _tensor(ours, wanted, model, draw) for ours, wanted in names.expected_shapes(model).items()
    }
    _save(folder, tensors)


def _save(folder: Path, tensors: Mapping[str, NDArray[np.float32]]) -> None:
    """As `minilpt.weights.save` does, under the format name that transformers insists on."""
    from safetensors.numpy import save_file

    partial = folder / "model.partial"
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, partial, {"format": "pt"})
    os.replace(partial, folder / "model.safetensors")


def _tensor(name: str, shape: names.Shape, model: ModelConfig, draw: np.random.Generator) -> NDArray[np.float32]:
    """Matrices that keep a row's variance, so that the first row's answer depends on all; wider queries and keys.

    Biases, tables and norms spread by BERT's 0.02: a norm or a bias that an engine forgot would show.
    """
    scale, centre = 0.02, 1.0 if name.endswith("norm.weight") else 0.0
    if name.endswith(("query.weight", "key.weight")):
        scale = (ATTENTION_SPREAD / model.width) ** 0.5  # logits of unit-variance rows then vary by ATTENTION_SPREAD
    elif len(shape) == 2 and not name.startswith("embeddings."):
        scale = shape[1] ** -0.5
    return (centre + scale * draw.standard_normal(shape)).astype(np.float32)


def write_bundled(folder: Path) -> None:
    """The bundled model as a plain float32 checkpoint, which is what other engines can read."""
    folder.mkdir(parents=True, exist_ok=True)
    source = resolve.resolve(None).folder
    model = read_config(source)
    stored = names.checkpoint_names(model)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "ltp.json"):
        files.write_text(folder / name, (source / name).read_text(encoding="utf-8"))
    weights = checkpoint.load_weights(source, model)
    _save(folder, {stored[ours]: tensor for ours, tensor in weights.items()})


def pruned_answers(folder: Path, path: Path, rows: Sequence[Ids]) -> dict[str, Any]:
    """What the reference says of these rows under the rule in `path`, in float32 and, as the truth, in float64."""
    model = read_config(folder)
    rule, weights = pruning.read_pruning(path, model.layers).rule, checkpoint.load_weights(folder, model)
    answers = {}
    for name in ("float32", "float64"):
        weights = {key: tensor.astype(name) for key, tensor in weights.items()}
        ids = [np.array(row, np.int32) for row in rows]
        answers[name] = [reference.forward(weights, model, rule, row, 0 * row).logits.tolist() for row in ids]
    return answers


def write_thresholds(folder: Path, rows: Sequence[Ids], path: Path) -> None:
    """Write an ltp.json whose counted FLOPs on `rows` are about COUNTED_RATIO of the dense model's.

    The bundled model's kept fractions on SST-2 dev, after each layer, are interpolated to this model's depth and raised
    to one power, solved so that the counted ratio comes out. Each layer's threshold is then the quantile of the
    masses that keeps that fraction, layer by layer, each on what the layers before it left. Masses have mean 1 whatever
    the length, so the denominator 1 makes one threshold mean the same for every length.
    """
    model = read_config(folder)
    fractions = wanted_fractions(model, rows)
    thresholds = _quantile_thresholds(folder, model, rows, fractions)
    record = {"rule": "threshold", "thresholds": thresholds, "score_denominator": 1, "method": "score quantiles"}
    files.write_text(path, json.dumps({"schema_version": 1, **record}, indent=2))


def counted(folder: Path, path: Path, rows: Sequence[Ids]) -> dict[str, Any]:
    """Counted FLOPs and kept tokens of the rule in `path`, as shares of the dense model's, over all rows."""
    model, flops, dense = load(folder, pruning=path), 0, 0
    kept = np.zeros(model.config.layers)
    for start in range(0, len(rows), 32):
        traced = model.forward(rows[start : start + 32], trace=True)
        assert traced.counted_flops is not None and traced.ffn_lengths is not None
        flops, dense = flops + int(traced.counted_flops.sum()), dense + int(traced.dense_flops.sum())
        kept += traced.ffn_lengths.sum(axis=1)
    tokens = sum(len(row) for row in rows)
    return {"counted_ratio": flops / dense, "kept_fractions": (kept / tokens).tolist()}


def wanted_fractions(model: ModelConfig, rows: Sequence[Ids]) -> list[float]:
    """The share of tokens to keep after each layer, for COUNTED_RATIO over these rows."""
    results = json.loads((resolve.resolve(None).folder / "results.json").read_text(encoding="utf-8"))["variants"][
        "pruned"
    ]
    learned = np.array([1.0, *(kept / results["tokens"] for kept in results["kept_tokens"])])
    depth = np.arange(1, model.layers + 1) / model.layers
    curve = np.interp(depth, np.linspace(0, 1, len(learned)), learned)
    low, high = 0.0, 8.0  # powers: everything kept, and next to nothing
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _counted_ratio(model, rows, curve**middle) > COUNTED_RATIO else (low, middle)
    return (curve**high).tolist()


def _counted_ratio(model: ModelConfig, rows: Sequence[Ids], fractions: NDArray[np.float64]) -> float:
    lengths = np.array([len(row) for row in rows])
    after = np.maximum(1, np.rint(np.outer(fractions, lengths))).astype(np.int64)
    before = np.concatenate([lengths[None], after[:-1]])
    counted = pruning.counted_flops(model, before, after).sum()
    return float(counted / pruning.dense_flops(model, lengths).sum())


def _quantile_thresholds(
    folder: Path, model: ModelConfig, rows: Sequence[Ids], fractions: Sequence[float]
) -> list[float]:
    weights = checkpoint.load_weights(folder, model)
    step = max(1, round(sum(len(row) for row in rows) / CALIBRATION_TOKENS))
    sample = [np.array(row, np.int32) for row in sorted(rows, key=len)[::step]]
    states = [reference.embed(weights, model, ids, np.zeros_like(ids)) for ids in sample]
    n_initial, thresholds = sum(len(ids) for ids in sample), [0.0] * model.layers
    for layer, fraction in enumerate(fractions):
        live = sum(len(x) for x in states)
        pinned = len(states)
        keep = max(pinned, round(fraction * n_initial))
        if keep < live:
            masses = np.sort(np.concatenate([_mass(weights, model, layer, x)[1:] for x in states]))[::-1]
            place = keep - pinned  # this many of the masses are to stay
            least, most = masses[place], masses[place - 1] if place else 2 * masses[0]
            thresholds[layer] = float((least + most) / 2)  # between two, so that rounding does not decide
        rule = pruning.Threshold(tuple(thresholds), 1)
        states = [reference.encoder_layer(weights, model, rule, layer, x, n_initial=len(x))[0] for x in states]
    return thresholds


def _mass(weights: reference.Weights, model: ModelConfig, layer: int, x: reference.Array) -> reference.Array:
    q, k = (
        reference.linear(x, weights[f"layers.{layer}.{name}.weight"], weights[f"layers.{layer}.{name}.bias"])
        for name in ("query", "key")
    )
    return reference.attention_mass(reference.attention_probs(q, k, model.heads))
