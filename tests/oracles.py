"""What the engine is compared with: classifiers of transformers in float64, and LTP emulated with masks, in torch.

Checkpoints are made on the spot, with weights spread so widely that attention differs from token to token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from minilpt.config import ModelConfig, read_config
from minilpt.quantize import quantize_layers, quantize_rows
from minilpt.weights import checkpoint

import tolerances

torch.set_num_threads(1)

Batch = Sequence[tuple[Sequence[int], Sequence[int]]]  # (token ids, segment ids) of each sequence
Float64 = NDArray[np.float64]

_SHAPE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
_ROBERTA = _SHAPE | {"max_position_embeddings": 42, "type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5}
_DISTILBERT = {
    "vocab_size": 60,
    "dim": 32,
    "n_layers": 3,
    "n_heads": 4,
    "hidden_dim": 48,
    "max_position_embeddings": 40,
}
# Name in the tests -> (prefix of the transformers classes, settings).
ARCHITECTURES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "bert": ("Bert", _SHAPE),
    "roberta": ("Roberta", _ROBERTA),
    "xlm-roberta": ("XLMRoberta", _ROBERTA),
    "camembert": ("Camembert", _ROBERTA),
    "distilbert": ("DistilBert", _DISTILBERT),
    "electra": ("Electra", _SHAPE | {"embedding_size": 32}),
    "electra-narrow": ("Electra", _SHAPE | {"embedding_size": 20}),
    "ibert": ("IBert", _ROBERTA | {"quant_mode": False}),
}


@dataclass(frozen=True)
class Twin:
    """One checkpoint several times: its folder, the torch model in float64, and weights.

    stored: float32, as the engines get them; weights, exact: in float32 and float64, as the reference gets them, with
    the layers' matrices quantised where precision is "int8".
    """

    folder: Path
    model: transformers.PreTrainedModel
    config: ModelConfig
    precision: str
    stored: Mapping[str, NDArray[np.float32]]
    weights: tolerances.Weights
    exact: tolerances.Weights


def build(folder: Path, architecture: str, labels: int = 3, precision: str = "fp32", **settings: Any) -> Twin:
    """A random classifier of transformers, saved with save_pretrained. settings: of its configuration class."""
    prefix, shape = ARCHITECTURES[architecture]
    config = getattr(transformers, f"{prefix}Config")(**shape | {"num_labels": labels} | settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForSequenceClassification")(config)
    _spread(model)
    model.save_pretrained(folder)
    return twin_of(folder, model, precision)


def twin_of(folder: Path, model: transformers.PreTrainedModel, precision: str = "fp32") -> Twin:
    """The torch model with the folder that holds its weights."""
    config = read_config(folder)
    stored = weights = dict(checkpoint.load_weights(folder, config))
    if precision == "int8":
        weights = quantize_layers(stored)
        base = model.base_model
        for module in list((base.transformer if config.family == "distilbert" else base.encoder).modules()):
            for name, child in module.named_children():
                if isinstance(child, torch.nn.Linear):
                    setattr(module, name, Int8Linear(child))
    return Twin(folder, model.double().eval(), config, precision, stored, weights, tolerances.widened(weights))


class Int8Linear(torch.nn.Module):
    """A linear layer with int8 weights per output and inputs quantised row by row, in float64."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        rows, scale = quantize_rows(linear.weight.detach().numpy())
        self.rows, self.scale, self.bias = torch.from_numpy(rows).double(), torch.from_numpy(scale), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., K) float64; returns (..., M)."""
        step = x.abs().amax(-1, keepdim=True) / 127
        whole = torch.where(step > torch.finfo(torch.float32).tiny, (x / step).round(), 0)
        return (whole @ self.rows.T) * step * self.scale.double() + self.bias


def golden_twin(folder: Path) -> Twin:
    """A checkpoint of the original LTP code, a RoBERTa under other names, in transformers' own RoBERTa."""
    settings = json.loads((folder / "config.json").read_text())
    config = transformers.RobertaConfig(**{key: value for key, value in settings.items() if key != "model_type"})
    model = transformers.RobertaForSequenceClassification(config)
    stored = load_file(folder / "model.safetensors")
    model.load_state_dict({name: stored[name.replace("roberta.", "ibert.")] for name in model.state_dict()})
    return twin_of(folder, model)


@torch.no_grad()
def _spread(model: torch.nn.Module) -> None:
    """Weights of random normals: norms around one, biases around zero, matrices so that rows keep their size."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, 1.5 / math.sqrt(parameter.shape[1]) if "embedding" not in name else 1)
        else:
            parameter.normal_(1 if "norm" in name.lower() and name.endswith("weight") else 0, 0.2)


def draw_batch(twin: Twin, lengths: Sequence[int], seed: int = 0) -> Batch:
    """Random sequences with random segments, where the model tells segments apart. No pad token among them."""
    draw, config = np.random.default_rng(seed), twin.config
    tokens = np.setdiff1d(np.arange(config.vocabulary), [config.pad_token_id])
    return [(draw.choice(tokens, n).tolist(), draw.integers(0, max(config.segments, 1), n).tolist()) for n in lengths]


def _padded(twin: Twin, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of the torch model, right-padded, and which of them are real, (B, n) bool."""
    width = max(len(ids) for ids, _ in batch)
    ids = torch.full((len(batch), width), twin.config.pad_token_id)
    kinds, alive = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, (tokens, segments) in enumerate(batch):
        ids[row, : len(tokens)], kinds[row, : len(tokens)] = torch.tensor(tokens), torch.tensor(segments)
        alive[row, : len(tokens)] = True
    inputs = {"input_ids": ids}
    return inputs | ({"token_type_ids": kinds} if twin.config.segments > 1 else {}), alive


@torch.no_grad()
def transformers_logits(twin: Twin, batch: Batch) -> Float64:
    """(B, labels) of the padded batch, in float64."""
    inputs, alive = _padded(twin, batch)
    return twin.model(**inputs, attention_mask=alive.long()).logits.numpy()


@torch.no_grad()
def transformers_embeddings(twin: Twin, batch: Batch, pooling: str) -> Float64:
    """(B, D) of the padded batch, in float64: means of the last hidden states without padding, or the first ones."""
    inputs, alive = _padded(twin, batch)
    hidden = twin.model.base_model(**inputs, attention_mask=alive.long()).last_hidden_state
    return (hidden[:, 0] if pooling == "cls" else _mean(hidden, alive)).numpy()


def _mean(rows: Tensor, alive: Tensor) -> Tensor:
    """(B, n, D), (B, n) to (B, D)."""
    return (rows * alive[..., None]).sum(1) / alive.sum(1, keepdim=True)


@dataclass(frozen=True)
class Emulated:
    """logits (B, labels), embedding (B, D), the mean of the rows that are left, and, in the padded batch, (L, B, n):

    alive, kept: the tokens before and after the layer's rule, with the one that stands for merged ones; mass: the
    attention that a token receives from live queries, averaged over heads; score: what its rule compares; margin: how
    far, in units of mass, the decision is from the opposite one, infinite where there is nothing to decide.
    """

    logits: Float64
    embedding: Float64
    alive: NDArray[np.bool_]
    kept: NDArray[np.bool_]
    mass: Float64
    score: Float64
    margin: Float64

    @property
    def attention_lengths(self) -> NDArray[np.int64]:
        return self.alive.sum(axis=2)

    @property
    def ffn_lengths(self) -> NDArray[np.int64]:
        return self.kept.sum(axis=2)


@torch.no_grad()
def emulate(twin: Twin, batch: Batch, rule: Mapping[str, Any] | None) -> Emulated:
    """LTP as its authors train it: no tensor ever shrinks, only a mask does. rule: the content of an ltp.json.

    Pruned tokens keep evolving, but never again act as keys, nor as queries in a score. For models of transformers
    with BERT's module names (BERT, RoBERTa, ELECTRA).
    """
    inputs, alive = _padded(twin, batch)
    encoder, heads = twin.model.base_model, twin.config.heads
    x = encoder.embeddings(**inputs)  # (B, n, D)
    if hasattr(encoder, "embeddings_project"):
        x = encoder.embeddings_project(x)
    n_initial = alive.sum(1, keepdim=True)
    steps = []
    for number, layer in enumerate(encoder.encoder.layer):
        attention = layer.attention.self
        q, k, v = (
            part(x).unflatten(2, (heads, -1)).transpose(1, 2)
            for part in (attention.query, attention.key, attention.value)
        )  # (B, H, n, d)
        products = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
        probs = products.masked_fill(~alive[:, None, None], -math.inf).softmax(3)
        mass = (probs * alive[:, None, :, None]).sum((1, 2)) / heads  # (B, n)
        kept, score, margin = _decide(rule, number, twin.config.layers, mass, alive, n_initial)
        margin = margin.masked_fill(~alive, math.inf)
        margin[:, 0] = math.inf
        goes_on = kept
        if rule is not None and rule.get("merge_removed"):
            x, probs, goes_on = _merged(x, probs, mass, alive, kept)
        steps.append((alive, goes_on, mass, score, margin))
        x = layer.attention.output((probs @ v).transpose(1, 2).flatten(2), x)
        x = layer.output(layer.intermediate(x), x)
        alive = goes_on
    pooler = getattr(encoder, "pooler", None)
    logits = twin.model.classifier(x if pooler is None else pooler(x))
    return Emulated(
        logits.numpy(), _mean(x, alive).numpy(), *(torch.stack(step).numpy() for step in zip(*steps, strict=True))
    )


def _merged(x: Tensor, probs: Tensor, mass: Tensor, alive: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first token that each sequence's rule removed stands for all of them. x: (B, n, D), probs: (B, H, n, n)."""
    x, probs, goes_on = x.clone(), probs.clone(), kept.clone()
    for b, gone in enumerate(alive & ~kept):
        if gone.any():
            places = gone.nonzero()[:, 0]
            share = mass[b, places] / mass[b, places].sum()
            x[b, places[0]] = (share[:, None] * x[b, places]).sum(0)
            probs[b, :, places[0]] = (share[:, None] * probs[b][:, places]).sum(1)
            goes_on[b, places[0]] = True
    return x, probs, goes_on


def _decide(
    rule: Mapping[str, Any] | None, layer: int, layers: int, mass: Tensor, alive: Tensor, n_initial: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(kept, score, margin) of one layer, (B, n) each. mass, alive: (B, n); n_initial: (B, 1)."""
    undecided = alive, mass, torch.full_like(mass, math.inf)
    if rule is None:
        return undecided
    pinned = torch.zeros_like(alive)
    pinned[:, 0] = True
    live_mass = mass.masked_fill(~alive, 0)
    if rule["rule"] in ("threshold", "ramp"):
        theta = rule["thresholds"][layer] if rule["rule"] == "threshold" else rule["final_threshold"] * layer / layers
        if theta == 0:
            return undecided
        named = {"initial": n_initial, "live": alive.sum(1, keepdim=True)}
        denominator = named.get(rule["score_denominator"], rule["score_denominator"])
        if rule.get("denominator_limit"):
            denominator = torch.as_tensor(denominator).clamp(max=rule["denominator_limit"])
        score, floor = live_mass / denominator, max(1e-5, theta)
        return alive & (pinned | (score >= floor)), score, (score - floor).abs() * denominator
    if rule["rule"] == "relative":
        theta = rule["token_threshold"]
        largest = live_mass.amax(1, keepdim=True)
        # Both the token's mass and the largest are rounded, so the distance between them counts half.
        margin = (live_mass - theta * largest).abs() / 2 if theta > 0 else undecided[2]
        return alive & (pinned | (live_mass / largest >= theta)), live_mass / largest, margin
    dense = max(3, math.ceil(0.15 * layers))
    if layer < dense or rule["token_keep_rate"] == 1:
        return undecided
    rate = max(0.01, 1 + (rule["token_keep_rate"] - 1) * (layer - dense + 1) / (layers - dense))
    places = (n_initial.float() * torch.tensor(rate, dtype=torch.float32)).round().clamp(min=1).long()  # (B, 1)
    ranked = mass.masked_fill(~alive, -math.inf).masked_fill(pinned, math.inf)
    falling, order = ranked.sort(stable=True, dim=1, descending=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
    last_in = falling.gather(1, places - 1)
    first_out = falling.gather(1, places.clamp(max=order.shape[1] - 1))
    both_rivals = last_in.isfinite() & first_out.isfinite() & (places < order.shape[1])
    cut = (last_in + first_out) / 2
    margin = torch.where(both_rivals, (mass - cut).abs(), torch.full_like(mass, math.inf))
    return alive & (rank < places), ranked, margin


class Step(NamedTuple):
    """kept: places in the text of the tokens that leave a layer; mass: of those that entered."""

    kept: list[int]
    mass: NDArray[np.floating]


def steps_of(
    lengths: Sequence[int], masses: Sequence[NDArray[np.floating]], kept: Sequence[NDArray[np.bool_]], merge: bool
) -> list[list[Step]]:
    """Per sequence and layer, the masses and which tokens went on. masses, kept: as `engine.Forward` has them.

    merge: whether the first removed token stands for all of them.
    """
    places = [np.arange(n) for n in lengths]
    steps: list[list[Step]] = [[] for _ in lengths]
    for mass, goes_on in zip(masses, kept, strict=True):
        bounds = np.cumsum([0, *map(len, places)])
        assert len(mass) == len(goes_on) == bounds[-1]
        for b, (begin, end) in enumerate(pairwise(bounds)):
            here = goes_on[begin:end].copy()
            here[here.argmin()] |= merge
            places[b] = places[b][here]
            steps[b].append(Step(places[b].tolist(), mass[begin:end]))
    return steps
