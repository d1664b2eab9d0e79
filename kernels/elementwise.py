"""Activations, float32 in and out, written to use one temporary at a time."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

# erfc(z) = t P(t) exp(-z^2) for z >= 0, t = 1 / (1 + ERFC_SLOPE z), the form of Abramowitz & Stegun 7.1.26 with a
# polynomial of our own: relative error at most 2.0e-8 on [0, 10] in exact arithmetic (benchmarks/fit_erfc.py).
# Lowest power first.
ERFC_SLOPE = np.float32(0.3)
ERFC_POLYNOMIAL = (
    0.16918800700391917,
    0.17071519669502072,
    0.14833938755182111,
    0.21492519464712143,
    -0.09464864734869048,
    0.5477169264931401,
    -0.5122752812211886,
    0.4855617997334996,
    -0.12952260312668734,
)


def gelu(x: Float32) -> Float32:
    """x Phi(x), exact erf: max(x, 0) - |x| erfc(|x| / sqrt 2) / 2, which never cancels.

    Absolute error against float64 below 3e-7 max(1, |x|) for every float32 (tests/test_kernels.py).
    """
    size = np.minimum(np.abs(x), 16)  # from |x| = 15 on the tail is 0 in float32; keeps inf * 0 out of it
    z = size * np.float32(1 / math.sqrt(2))
    t = 1 / (1 + ERFC_SLOPE * z)
    tail = np.full_like(x, ERFC_POLYNOMIAL[-1])
    for coefficient in reversed(ERFC_POLYNOMIAL[:-1]):
        tail *= t
        tail += np.float32(coefficient)
    tail *= t
    tail *= np.exp(-z * z)
    tail *= size * np.float32(0.5)
    return np.maximum(x, 0) - tail


def gelu_tanh(x: Float32) -> Float32:
    """The tanh form of GELU ("gelu_new"; arXiv 1606.08415, section 2)."""
    inside = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * (x * x * x))
    return np.float32(0.5) * x * (1 + np.tanh(inside))


def relu(x: Float32) -> Float32:
    """max(x, 0)."""
    return np.maximum(x, 0)


def tanh(x: Float32) -> Float32:
    """The hyperbolic tangent."""
    return np.tanh(x)
