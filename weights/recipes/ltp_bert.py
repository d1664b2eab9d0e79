"""A BERT classifier in torch with soft and hard Learned Token Pruning, for training only.

Parameters are a flat dictionary under the names that a `BertForSequenceClassification` checkpoint uses, so that
saving needs no translation. Source of the method: arXiv 2107.00910, section 3.3.

One legend: B sequences, S padded length, H heads, D width, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...pruning import SCORE_FLOOR, Threshold

GONE = -1e4  # log of "not there": exp() of it is exactly 0 in float32


@dataclass(frozen=True)
class Shape:
    """What the forward pass needs to know of config.json."""

    layers: int
    heads: int
    eps: float
    dropout: float


def initial_head(width: int, labels: int, seed: int) -> dict[str, Tensor]:
    """A fresh pooler and classifier, N(0, 0.02) weights and zero biases, as BERT initialises them."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "bert.pooler.dense.weight": torch.randn(width, width, generator=draw) * 0.02,
        "bert.pooler.dense.bias": torch.zeros(width),
        "classifier.weight": torch.randn(labels, width, generator=draw) * 0.02,
        "classifier.bias": torch.zeros(labels),
    }


def forward(
    params: dict[str, Tensor],
    shape: Shape,
    ids: Tensor,
    mask: Tensor,
    segments: Tensor | None = None,
    *,
    rule: Threshold | None = None,
    thresholds: Tensor | None = None,
    temperature: float | None = None,
    train: bool = False,
) -> tuple[Tensor, Tensor]:
    """Logits, and how much of each token is alive after each layer's pruning.

    ids, mask: (B, S) integers and booleans; segments: (B, S) integers, zeros if None. rule: how thresholds are
    compared, or None (no pruning); thresholds: (L,), in the place of the rule's own. temperature: a number makes the
    rule soft (a sigmoid), None makes it hard. A token's life is a weight in [0, 1] that multiplies it where removal
    acts: as a key inside the softmax and as a query inside the score. The paper multiplies the layer's output instead;
    with the weight in the softmax the soft model becomes the hard one as the temperature goes to zero. Only the hard
    rule merges what it removes.

    Returns (logits (B, labels), alive (L, B, S)); the first position is pinned, padding is never alive.
    """
    drop = shape.dropout if train else 0.0
    B, S = ids.shape
    lengths = mask.sum(1, keepdim=True)
    log_alive = torch.where(mask, 0.0, GONE)  # (B, S)
    pinned = torch.arange(S) == 0

    x = params["bert.embeddings.word_embeddings.weight"][ids]
    x = x + params["bert.embeddings.position_embeddings.weight"][:S]
    x = x + params["bert.embeddings.token_type_embeddings.weight"][0 if segments is None else segments]
    x = F.dropout(_norm(params, "bert.embeddings.LayerNorm", x, shape.eps), drop)

    history = []
    for layer in range(shape.layers):
        at = f"bert.encoder.layer.{layer}."
        q, k, v = (
            _linear(params, f"{at}attention.self.{name}", x).view(B, S, shape.heads, -1).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        logits = (q @ k.transpose(2, 3)).float() / math.sqrt(q.shape[-1]) + log_alive[:, None, None, :]
        probs = torch.softmax(logits, -1)  # (B, H, S, S)
        if rule is not None and thresholds is not None:
            as_query = log_alive.exp()[:, None, :, None]
            mass = (probs * as_query).sum(2).mean(1)  # (B, S)
            log_keep = _log_keep(mass / _denominator(rule, lengths), thresholds[layer], temperature, pinned)
            if rule.merge_removed:
                x, probs, log_keep = _merged(x, probs, mass, log_alive, log_keep)
            log_alive = log_alive + log_keep
        history.append(log_alive.exp())
        context = (F.dropout(probs, drop).to(v.dtype) @ v).transpose(1, 2).reshape(B, S, -1)
        attended = F.dropout(_linear(params, f"{at}attention.output.dense", context), drop)
        x = _norm(params, f"{at}attention.output.LayerNorm", x + attended, shape.eps)
        inner = F.gelu(_linear(params, f"{at}intermediate.dense", x))
        outer = F.dropout(_linear(params, f"{at}output.dense", inner), drop)
        x = _norm(params, f"{at}output.LayerNorm", x + outer, shape.eps)

    pooled = torch.tanh(_linear(params, "bert.pooler.dense", x[:, 0]))
    return _linear(params, "classifier", F.dropout(pooled, drop)).float(), torch.stack(history)


def _denominator(rule: Threshold, lengths: Tensor) -> Tensor | int:
    """Z of the score, a number or (B, 1)."""
    if isinstance(rule.score_denominator, int):
        return min(rule.score_denominator, rule.denominator_limit)
    assert rule.score_denominator == "initial"
    return lengths.clamp_max(rule.denominator_limit)


def _merged(
    x: Tensor, probs: Tensor, mass: Tensor, log_alive: Tensor, log_keep: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.merge_removed` of the hard rule: x (B, S, D), probs (B, H, S, S), the others (B, S)."""
    gone = (log_alive == 0) & (log_keep != 0)
    share = torch.where(gone, mass.clamp_min(torch.finfo(mass.dtype).tiny), 0)
    share = share / share.sum(1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
    place = gone & (gone.cumsum(1) == 1)  # the first of them
    x = torch.where(place[:, :, None], (share[:, None, :] @ x), x)
    probs = torch.where(place[:, None, :, None], torch.einsum("bq,bhqk->bhk", share, probs)[:, :, None], probs)
    return x, probs, torch.where(place, 0.0, log_keep)


def _log_keep(score: Tensor, threshold: Tensor, temperature: float | None, pinned: Tensor) -> Tensor:
    """log of the keep weight, (B, S): log sigmoid((score - threshold) / T), or 0 and GONE for the hard rule."""
    if temperature is None:
        keep = (score >= threshold.clamp_min(float(SCORE_FLOOR))) | pinned
        return torch.where(keep, 0.0, GONE)
    return torch.where(pinned, 0.0, F.logsigmoid((score - threshold) / temperature).clamp_min(GONE))


def _linear(params: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, params[f"{name}.weight"], params[f"{name}.bias"])


def _norm(params: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    weight, bias = params[f"{name}.weight"], params[f"{name}.bias"]
    return F.layer_norm(x.float(), weight.shape, weight, bias, eps)


def encoder_macs(alive: Tensor, mask: Tensor, width: int, inner: int) -> tuple[float, float]:
    """(pruned, dense) MACs of one batch of hard-pruned sequences, counted as in Table I of the paper."""
    n0 = mask.sum(1).double()  # (B,)
    after = alive.round().sum(2).double()  # (L, B)
    before = torch.cat([n0[None], after[:-1]])
    macs = 4 * width**2 * before + 2 * width * before**2 + 2 * width * inner * after
    dense = 4 * width**2 * n0 + 2 * width * n0**2 + 2 * width * inner * n0
    return macs.sum().item(), dense.sum().item() * len(after)
