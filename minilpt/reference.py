"""The whole forward pass in plain NumPy, one sequence at a time, in the order of the paper. Never optimised.

This is the specification: every engine is tested against it, and it is tested against PyTorch. Legend: n live tokens,
H heads, D width, F inner width, L layers. Weights are stored as in checkpoints, (outputs, inputs), under our own names
(`minilpt.weights.names`). Everything is computed in the dtype of the weights, so that float64 weights give float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import ragged
from .config import ModelConfig
from .pruning import KeepRule
from .quantize import Quantized

Array = NDArray[np.floating]
Keep = NDArray[np.bool_]
Weights = Mapping[str, Any]  # Array, or Quantized for the matrices of precision "int8"


@dataclass(frozen=True)
class Traced:
    """logits (labels,), and per layer the live tokens before (n_attention) and after (n_ffn) its pruning, (L,).

    masses, kept: per layer (n_attention,), what each live token receives and whether it stays; one row more goes on
    where the rule merges what it removes.
    """

    logits: Array
    n_attention: list[int]
    n_ffn: list[int]
    masses: list[Array]
    kept: list[Keep]


def forward(
    weights: Weights, config: ModelConfig, rule: KeepRule | None, ids: NDArray[np.int32], segments: NDArray[np.int32]
) -> Traced:
    """Classify one sequence. ids, segments: (n,) int32, special tokens included."""
    rows, n_attention, n_ffn, masses, kept = encode(weights, config, rule, ids, segments)
    return Traced(head(weights, config, rows[0]), n_attention, n_ffn, masses, kept)


def encode(
    weights: Weights, config: ModelConfig, rule: KeepRule | None, ids: NDArray[np.int32], segments: NDArray[np.int32]
) -> tuple[Array, list[int], list[int], list[Array], list[Keep]]:
    """All layers: the rows that the last one gives, (n', D), and what `Traced` holds of each."""
    x = embed(weights, config, ids, segments)  # (n, D)
    n_attention, n_ffn, masses, kept = [], [], [], []
    for layer in range(config.layers):
        n_attention.append(len(x))
        x, mass, keep = encoder_layer(weights, config, rule, layer, x, n_initial=len(ids))  # (n', D), (n,), (n,)
        n_ffn.append(len(x))
        masses.append(mass)
        kept.append(keep)
    return x, n_attention, n_ffn, masses, kept


def mean_pooled(rows: Array) -> Array:
    """An embedding of the whole sequence: the mean of the last layer's rows, pruned ones left out. (n', D) to (D,)."""
    return rows.mean(axis=0)


def embed(weights: Weights, config: ModelConfig, ids: NDArray[np.int32], segments: NDArray[np.int32]) -> Array:
    """Sum of the tables' rows, LayerNorm, and ELECTRA's projection where it has one. (n, D)."""
    rows = ragged.positions(ids, offset=config.position_offset, pad_token_id=config.pad_token_id)  # (n,)
    x = weights["embeddings.word.weight"][ids]  # (n, E)
    x = x + weights["embeddings.position.weight"][rows]  # (n, E)
    if config.segments:
        x = x + weights["embeddings.segment.weight"][segments]  # (n, E)
    x = layer_norm(x, weights["embeddings.norm.weight"], weights["embeddings.norm.bias"], config.eps)  # (n, E)
    if config.embedding_width != config.width:
        x = linear(x, weights["embeddings.project.weight"], weights["embeddings.project.bias"])  # (n, D)
    return x


def encoder_layer(
    weights: Weights, config: ModelConfig, rule: KeepRule | None, layer: int, x: Array, n_initial: int
) -> tuple[Array, Array, Keep]:
    """Attention, pruning, feed-forward. x: (n, D). Returns the rows that go on, (n', D), masses, who is kept, (n,)."""

    def projected(name: str, rows: Array) -> Array:
        return linear(rows, weights[f"layers.{layer}.{name}.weight"], weights[f"layers.{layer}.{name}.bias"])

    def normed(name: str, rows: Array) -> Array:
        weight, bias = weights[f"layers.{layer}.{name}.weight"], weights[f"layers.{layer}.{name}.bias"]
        return layer_norm(rows, weight, bias, config.eps)

    q, k, v = projected("query", x), projected("key", x), projected("value", x)  # (n, D) each
    probs = attention_probs(q, k, config.heads)  # (H, n, n)
    mass = attention_mass(probs)  # (n,)
    keep = np.ones(len(x), dtype=bool)  # (n,)
    if rule is not None and rule.active(layer):
        keep = rule.keep(mass, layer, n_initial)  # (n,)
    goes_on = keep  # (n,)
    if rule is not None and rule.merge_removed and not keep.all():
        x, probs, goes_on = merge_removed(x, probs, mass, keep)  # (n, D), (H, n, n), (n,)
    context = attention_context(probs[:, goes_on], v)  # (n', D): queries that go on, all keys
    x = normed("attention_norm", x[goes_on] + projected("attention_output", context))  # (n', D)
    inner = ACTIVATIONS[config.activation](projected("inner", x))  # (n', F)
    return normed("outer_norm", x + projected("outer", inner)), mass, keep  # (n', D), (n,), (n,)


def merge_removed(x: Array, probs: Array, mass: Array, keep: Keep) -> tuple[Array, Array, Keep]:
    """Let the removed tokens go on as one, their mean weighted by mass, in the place of the first of them.

    x: (n, D), probs: (H, n, n), mass, keep: (n,). Returns x and probs with that row set, and which rows go on.
    """
    gone = ~keep
    share = removed_share(mass, keep)  # (n,), 0 for the kept
    first = int(np.argmax(gone))
    x, probs, goes_on = x.copy(), probs.copy(), keep.copy()
    x[first], probs[:, first], goes_on[first] = merged_row(x, share), merged_row(probs, share), True
    return x, probs, goes_on


def removed_share(mass: Array, keep: Keep) -> Array:
    """Each removed token's share of the removed mass, or equal ones where there is none; 0 for the kept. (n,)."""
    gone = np.where(keep, 0, mass)
    total = gone.sum()
    share: Array = gone / total if total > 0 else ~keep / (~keep).sum()
    return share.astype(mass.dtype)


def merged_row(rows: Array, share: Array) -> Array:
    """The sum of rows times their shares. rows: (..., n, K), share: (n,). Returns (..., K)."""
    return share @ rows


def head(weights: Weights, config: ModelConfig, first: Array) -> Array:
    """Each family's classification head on the first row. first: (D,). Returns (labels,)."""
    hidden = linear(first, weights["head.dense.weight"], weights["head.dense.bias"])  # (D,)
    hidden = ACTIVATIONS[config.head_activation](hidden)  # (D,)
    return linear(hidden, weights["head.out.weight"], weights["head.out.bias"])  # (labels,)


def linear(x: Array, weight: Array | Quantized, bias: Array) -> Array:
    """x W^T + b. x: (..., K), weight: (M, K), bias: (M,). Returns (..., M)."""
    if isinstance(weight, Quantized):
        return linear_int8(x, weight.rows, weight.scale, bias)
    return x @ weight.T + bias


def linear_int8(x: Array, weight: NDArray[np.int8], scale: Array, bias: Array) -> Array:
    """x W^T + b with each row of x quantised to [-127, 127]. x: (..., K), weight: (M, K), scale, bias: (M,).

    The sums of integers are exact. A row whose largest is below 127 times float32's smallest normal number is zeros.
    """
    largest = np.abs(x).max(axis=-1, keepdims=True)  # (..., 1)
    factor = np.divide(127, largest, out=np.zeros_like(largest), where=largest >= 127 * np.finfo(np.float32).tiny)
    sums = np.rint(x * factor).astype(np.float64) @ weight.T.astype(np.float64)  # (..., M), below 2^53
    return (sums * (largest / 127 * scale) + bias).astype(x.dtype)


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """Rows to mean 0 and variance 1, then scaled and shifted. x: (n, D). NaN where the variance is infinite."""
    mean = x.mean(axis=-1, keepdims=True)  # (n, 1)
    variance = ((x - mean) ** 2).mean(axis=-1, keepdims=True)  # (n, 1)
    lost = variance - variance  # (n, 1), 0 or NaN: an infinite variance would make the row the bias
    return (x - mean) / np.sqrt(variance + eps + lost) * weight + bias  # (n, D)


def softmax(x: Array) -> Array:
    """Along the last axis, with the maximum taken out first."""
    exp = np.exp(x - x.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


def attention_probs(q: Array, k: Array, heads: int) -> Array:
    """softmax(Q_h K_h^T / sqrt(D/H)) over keys. q: (m, D), k: (n, D). Returns (H, m, n)."""
    q, k = split_heads(q, heads), split_heads(k, heads)  # (H, m, D/H), (H, n, D/H)
    return softmax(q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[2]))


def attention_mass(probs: Array) -> Array:
    """What each key receives: summed over queries, averaged over heads. probs: (H, m, n). Returns (n,)."""
    return probs.sum(axis=1).mean(axis=0)


def attention_context(probs: Array, v: Array) -> Array:
    """P_h V_h, heads side by side. probs: (H, m, n), v: (n, D). Returns (m, D)."""
    context = probs @ split_heads(v, len(probs))  # (H, m, D/H)
    return context.transpose(1, 0, 2).reshape(context.shape[1], -1)


def split_heads(x: Array, heads: int) -> Array:
    """(n, D) to (H, n, D/H)."""
    return x.reshape(len(x), heads, -1).transpose(1, 0, 2)


def gelu(x: Array) -> Array:
    """x * Phi(x) with the exact erf, evaluated in float64."""
    erf = np.vectorize(math.erf, otypes=[np.float64])
    return (0.5 * x * (1 + erf(x / math.sqrt(2)))).astype(x.dtype)


def gelu_tanh(x: Array) -> Array:
    """The tanh form that BERT's TensorFlow code used ("gelu_new"; arXiv 1606.08415, section 2)."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def relu(x: Array) -> Array:
    """max(x, 0)."""
    return np.maximum(x, 0)


def tanh(x: Array) -> Array:
    """The hyperbolic tangent."""
    return np.tanh(x)


ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu, "tanh": tanh}
