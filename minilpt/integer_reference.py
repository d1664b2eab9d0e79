"""The integer-only forward pass in plain NumPy, one sequence at a time: the specification of precision "ibert".

Every array is of integers, from the token ids to the logits; the order is that of `reference`, the operations are those
of `kernels.integer`. Legend: n live tokens, H heads, D width, F inner width, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import ragged
from .config import ModelConfig
from .integer_model import IntegerModel, Linear, Table
from .integer_rules import IntegerRule
from .kernels import integer
from .kernels.integer import ACTIVATION_BITS, Dyadic, Gelu, Int
from .scales import NORM_INPUT_BITS, SUM_BITS

Keep = NDArray[np.bool_]


@dataclass(frozen=True)
class Traced:
    """logits (labels,) int64 and first (D,), the row they come from; per layer, what `steps` says, by step.

    n_attention, n_ffn: live tokens before and after each layer's pruning, (L,); masses, kept: (n_attention,) per layer,
    in units of 2^-32 summed over heads.
    """

    logits: Int
    first: Int
    n_attention: list[int]
    n_ffn: list[int]
    masses: list[Int]
    kept: list[Keep]
    steps: list[dict[str, Int]]


def forward(
    model: IntegerModel,
    config: ModelConfig,
    rule: IntegerRule | None,
    ids: NDArray[np.int32],
    segments: NDArray[np.int32],
) -> Traced:
    """Classify one sequence. ids, segments: (n,) int32, special tokens included.

    steps: the integers behind every operation, layer by layer; before the first layer the embeddings', after the last
    the head's.
    """
    embedded = embed(model, config, ids, segments)
    x = embedded["norm"]  # (n, D) in [-128, 127], as all activations
    n_attention, n_ffn, masses, kept, steps = [], [], [], [], [embedded]
    for number in range(len(model.layers)):
        n_attention.append(len(x))
        step = encoder_layer(model, config, rule, number, x, len(ids))
        x = step["outer_norm"]  # (n', D)
        n_ffn.append(len(x))
        masses.append(step["mass"])
        kept.append(step["keep"].astype(bool))
        steps.append(step)
    last = head(model, config, x[:1])
    return Traced(last["logits"][0], x[0], n_attention, n_ffn, masses, kept, [*steps, last])


def embed(
    model: IntegerModel, config: ModelConfig, ids: NDArray[np.int32], segments: NDArray[np.int32]
) -> dict[str, Int]:
    """Tables' rows added in 16 bits, and LayerNorm. Both (n, D)."""
    places = ragged.positions(ids, offset=config.position_offset, pad_token_id=config.pad_token_id)  # (n,)
    total = _row(model.word, ids)  # (n, D)
    if model.segment is not None:
        total = total + _row(model.segment, segments)
    total = integer.clamped(total, SUM_BITS)
    total = integer.clamped(total + _row(model.position, places), SUM_BITS)
    return {"sum": total, "norm": integer.i_layer_norm(total, model.embedding_norm)}


def _row(table: Table, places: NDArray[np.int32]) -> Int:
    factor = Dyadic(table.factor.multiplier[places, None], table.factor.shift[places, None])
    return integer.scaled(table.rows[places].astype(np.int64), factor)


def encoder_layer(
    model: IntegerModel, config: ModelConfig, rule: IntegerRule | None, number: int, x: Int, n_initial: int
) -> dict[str, Int]:
    """Attention, pruning, feed-forward. x: (n, D). The integers behind every operation, by name."""
    layer, heads = model.layers[number], config.heads
    q = activated(x, layer.query, layer.query_out)  # (n, D)
    k = activated(x, layer.key, layer.key_out)  # (n, D)
    v = activated(x, layer.value, layer.value_out)  # (n, D)
    scores = split_heads(q, heads) @ split_heads(k, heads).transpose(0, 2, 1)  # (H, n, n)
    wide = integer.i_softmax(scores, layer.exp)  # (H, n, n)
    probs = integer.probs_of(wide)  # (H, n, n)
    mass = integer.attention_mass(probs << 24 if model.masses_of_8_bits else wide)  # (n,)
    keep = np.ones(len(x), dtype=bool)  # (n,)
    if rule is not None:
        keep = rule.keep(mass, number, n_initial)
    goes_on, weighed = keep, probs  # (n,), (H, n, n)
    if rule is not None and rule.merge_removed and not keep.all():
        x, weighed, goes_on = merge_removed(x, probs, mass, keep)  # (n, D), (H, n, n), (n,)
    context = (weighed[:, goes_on] @ split_heads(v, heads)).transpose(1, 0, 2).reshape(goes_on.sum(), -1)  # (n', D)
    context = integer.requantize(context, layer.context, ACTIVATION_BITS)
    sums = linear(context, layer.attention_output)  # (n', D)
    residual = x[goes_on]  # (n', D)
    attended = added(sums, layer.attention_sum, residual, layer.attention_residual)  # (n', D), 22 bits
    attention_norm = integer.i_layer_norm(attended, layer.attention_norm)
    x = integer.requantize(attention_norm, layer.attention_again, ACTIVATION_BITS)  # (n', D)
    inner = activate(linear(x, layer.inner), config.activation, layer.activation)  # (n', F)
    again = integer.requantize(inner, layer.inner_again, ACTIVATION_BITS)  # (n', F)
    outer = added(linear(again, layer.outer), layer.outer_sum, x, layer.outer_residual)  # (n', D), 22 bits
    return {
        "query": q,
        "key": k,
        "value": v,
        "scores": scores,
        "wide": wide,
        "probs": probs,
        "mass": mass,
        "keep": keep.astype(np.int64),
        "probs.going_on": weighed[:, goes_on],
        "residual": residual,
        "context": context,
        "attention_sum": attended,
        "attention_norm": attention_norm,
        "attention_norm.again": x,
        "inner": inner,
        "inner.again": again,
        "outer_sum": outer,
        "outer_norm": integer.i_layer_norm(outer, layer.outer_norm),
    }


def merge_removed(x: Int, probs: Int, mass: Int, keep: Keep) -> tuple[Int, Int, Keep]:
    """As `reference.merge_removed`: the removed tokens go on as one, in the place of the first of them."""
    weight = integer.merge_weights(mass, keep)  # (n,)
    first = int(np.argmax(~keep))
    x, probs, goes_on = x.copy(), probs.copy(), keep.copy()
    x[first], goes_on[first] = integer.merged_row(x, weight), True
    probs[:, first] = integer.merged_row(probs, weight)
    return x, probs, goes_on


def head(model: IntegerModel, config: ModelConfig, first: Int) -> dict[str, Int]:
    """The classification head on first rows, (B, D): (B, labels) logits on one scale, 32 bits."""
    dense = linear(first, model.head_dense)  # (B, D)
    if config.head_activation == "tanh":
        assert isinstance(model.head_activation, Dyadic)
        hidden = integer.i_tanh(integer.requantize(dense, model.head_activation, 32), integer.tanh_constants())
    else:
        hidden = activate(dense, config.head_activation, model.head_activation)
    out = linear(hidden, model.head_out)  # (B, labels)
    return {"dense": dense, "activation": hidden, "logits": integer.requantize(out, model.logits, 32)}


def linear(x: Int, weights: Linear) -> Int:
    """x W^T + b, exact sums. x: (n, K). Returns (n, M)."""
    return integer.linear(x, weights.weight, weights.bias)


def activated(x: Int, weights: Linear, factor: Dyadic) -> Int:
    """A projection in 8 bits. x: (n, K). Returns (n, M)."""
    return integer.requantize(linear(x, weights), factor, ACTIVATION_BITS)


def activate(sums: Int, activation: str, constants: Gelu | Dyadic) -> Int:
    """An activation of sums, (n, M), in 8 bits."""
    if activation == "gelu":
        assert isinstance(constants, Gelu)
        return integer.i_gelu(sums, constants)
    assert isinstance(constants, Dyadic)
    return integer.i_relu(sums, constants)


def added(sums: Int, factor: Dyadic, residual: Int, residual_factor: Dyadic) -> Int:
    """The input of a LayerNorm, 22 bits. Both (n, D)."""
    return integer.add_requantized(sums, factor, residual, residual_factor, NORM_INPUT_BITS)


def split_heads(x: Any, heads: int) -> Any:
    """(n, D) to (H, n, D/H)."""
    return x.reshape(len(x), heads, -1).transpose(1, 0, 2)
