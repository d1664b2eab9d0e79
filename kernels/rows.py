"""Operations on packed rows: each output row depends on one input row."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]


def linear(x: Float32, weight: Float32, bias: Float32) -> Float32:
    """x W^T + b. x: (N, K), weight: (M, K), bias: (M,). Returns (N, M) float32.

    One BLAS call over all rows. BLAS libraries pick their inner loops by N, so a row's last bits can depend on how
    many rows are beside it.
    """
    out: Float32 = x @ weight.T
    out += bias
    return out


def layer_norm(x: Float32, weight: Float32, bias: Float32, eps: float) -> Float32:
    """Rows to mean 0 and variance 1, then scaled and shifted. x: (N, D); weight, bias: (D,). Returns (N, D) float32."""
    out: Float32 = x - x.mean(axis=-1, keepdims=True)
    variance = np.mean(out * out, axis=-1, keepdims=True)
    lost = variance - variance  # 0, or NaN where squares overflow
    out /= np.sqrt(variance + np.float32(eps) + lost)
    out *= weight
    out += bias
    return out
