"""Weights to integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]


class Quantized(NamedTuple):
    """rows: (M, K) int8 in [-127, 127]; scale: (M,) floating. It stands for rows * scale[:, None]."""

    rows: NDArray[np.int8]
    scale: NDArray[np.floating]


def quantize_rows(weight: Float32) -> Quantized:
    """Symmetric int8 per row of (M, K).

    The error of each element is at most half its row's scale, max|row| / 254. A row without a value of 1.5e-36, whose
    scale would be subnormal, becomes zeros.
    """
    largest = np.abs(weight).max(axis=1)
    scale = (np.where(largest > 127 * np.finfo(np.float32).tiny, largest, 1) / 127).astype(np.float32)
    return Quantized(np.rint(weight / scale[:, None]).astype(np.int8), scale)


def quantize_as_ibert(weight: Float32, per_row: bool) -> Quantized:
    """Symmetric int8 as the I-BERT code rounds, in float32: one scale for each row, or one for all; [-127, 126].

    The scale is max|w| / 127, of at least 1e-8 / 127; 1 / scale is rounded before it multiplies.
    """
    largest = np.abs(weight).max(axis=1) if per_row else np.full(len(weight), np.abs(weight).max())
    scale = np.maximum(largest, np.float32(1e-8)) / np.float32(127)
    whole = np.rint(1 / scale[:, None] * weight)
    return Quantized(np.clip(whole, -127, 126).astype(np.int8), scale)


def dequantize_rows(quantized: NDArray[np.int8], scale: Float32) -> Float32:
    """(M, K) float32 from int8 rows and their (M,) scales."""
    return quantized.astype(np.float32) * scale[:, None]


def quantize_layers(weights: Mapping[str, Float32]) -> dict[str, Any]:
    """The weights of precision "int8": the layers' matrices quantised, embeddings and head as they are."""
    return {
        name: quantize_rows(tensor) if name.startswith("layers.") and tensor.ndim == 2 else tensor
        for name, tensor in weights.items()
    }
