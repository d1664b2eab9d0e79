"""Attention of one sequence, in the three steps between which tokens are pruned. All heads at once."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]


def attention_probs(q: Float32, k: Float32, heads: int) -> Float32:
    """softmax(Q_h K_h^T / sqrt(D/H)) over keys. q: (m, D), k: (n, D). Returns (H, m, n) float32; rows sum to one."""
    probs: Float32 = _split(q, heads) @ _split(k, heads).transpose(0, 2, 1)
    probs *= np.float32(1 / math.sqrt(q.shape[1] // heads))
    probs -= probs.max(axis=-1, keepdims=True)
    np.exp(probs, out=probs)
    probs /= probs.sum(axis=-1, keepdims=True)
    return probs


def attention_mass(probs: Float32) -> Float32:
    """What each key receives: summed over queries, averaged over heads. probs: (H, m, n). Returns (n,) float32."""
    return probs.sum(axis=1).mean(axis=0)


def attention_context(probs: Float32, v: Float32) -> Float32:
    """P_h V_h, heads side by side. probs: (H, m, n), v: (n, D). Returns (m, D) float32."""
    context = probs @ _split(v, len(probs))
    return context.transpose(1, 0, 2).reshape(probs.shape[1], -1)


def _split(x: Float32, heads: int) -> Float32:
    """(n, D) to (H, n, D/H), without a copy."""
    return x.reshape(len(x), heads, -1).transpose(1, 0, 2)
