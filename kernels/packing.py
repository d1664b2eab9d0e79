"""Weights laid out once for a rung's register tiles: panels of columns, each read from its first byte to its last."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import blocks
from .isa import Rung

Float32 = NDArray[np.float32]
ALIGNMENT = 64  # bytes of a cache line and of the widest vector
LIMIT = 127  # int8 activations and weights lie in [-127, 127]


def aligned(size: int) -> NDArray[np.uint8]:
    """`size` bytes of memory, not initialised, from a multiple of ALIGNMENT on."""
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size]


class Packed(NamedTuple):
    """A linear layer for one rung, its M outputs padded with zeros to P panels of `rung.columns`.

    panels: (P, K, columns) float32, or (P, G, columns, group) int8 with K padded to G groups, as `rung.depth` says.
    start: (P * columns,) what each sum starts with: the bias (float32), or int32 that takes out the +128 of unsigned
    activations. scale, bias: (P * columns,) float32; ones for float32 weights. inputs, outputs: K, M.
    """

    panels: NDArray[Any]
    start: NDArray[Any]
    scale: Float32
    bias: Float32
    inputs: int
    outputs: int

    def record(self) -> np.void:
        """The `blocks.MATRIX` that describes this layer to compiled code, which must not outlive it."""
        panels, start, scale, bias = (array.ctypes.data for array in self[:4])
        is_int8 = self.panels.dtype == np.int8
        count, depth = self.panels.shape[:2]
        values = (panels, start, scale, bias, self.inputs, self.outputs, depth, count, is_int8)
        return np.array([values], blocks.MATRIX)[0]


def pack(weight: Float32, bias: Float32, rung: Rung) -> Packed:
    """Float32 weights, (M, K), and bias, (M,), in panels."""
    M, K = weight.shape
    P = -(-M // rung.columns)
    padded, start = np.zeros((P * rung.columns, K), np.float32), np.zeros(P * rung.columns, np.float32)
    padded[:M], start[:M] = weight, bias
    panels = _aligned(padded.reshape(P, rung.columns, K).transpose(0, 2, 1))
    return Packed(panels, start, np.ones_like(start), start, K, M)


def pack_int8(weight: NDArray[np.int8], scale: Float32, bias: Float32, rung: Rung) -> Packed:
    """int8 weights, (M, K) in [-127, 127], with a scale for each output, (M,), and bias, (M,), in panels.

    ValueError where K products could overflow an int32 sum.
    """
    M, K = weight.shape
    if K * LIMIT * 255 >= 2**31:
        raise ValueError(f"{K} products of int8 can overflow an int32 sum")
    panels, start = _int8_panels(weight, rung)
    wide = np.zeros((2, start.size), np.float32)
    wide[0, :M], wide[1, :M] = scale, bias
    return Packed(panels, start, wide[0], wide[1], K, M)


def pack_integer(weight: NDArray[np.int8], bias: NDArray[np.int32], rung: Rung) -> Packed:
    """int8 weights, (M, K), with int32 biases, (M,), which the sums start with: exact where the sums fit into int32."""
    M, K = weight.shape
    panels, start = _int8_panels(weight, rung)
    start[:M] += bias
    nothing = np.zeros(0, np.float32)
    return Packed(panels, start, nothing, nothing, K, M)


def _int8_panels(weight: NDArray[np.int8], rung: Rung) -> tuple[NDArray[np.int8], NDArray[np.int32]]:
    """The panels, and what takes the +128 of unsigned activations out of their sums."""
    M, K = weight.shape
    P, G = -(-M // rung.columns), -(-K // rung.depth) * rung.depth // rung.group
    padded = np.zeros((P * rung.columns, G * rung.group), np.int8)
    padded[:M, :K] = weight
    panels = padded.reshape(P, rung.columns, G, rung.group).transpose(0, 2, 1, 3)
    start = np.zeros(P * rung.columns, np.int32)
    if rung.int8 == "dot":
        start -= 128 * padded.sum(axis=1, dtype=np.int32)
    return _aligned(panels), start


def _aligned(panels: NDArray[Any]) -> NDArray[Any]:
    """A copy whose every vector is one cache line."""
    out = aligned(panels.nbytes).view(panels.dtype).reshape(panels.shape)
    out[...] = panels
    return out
