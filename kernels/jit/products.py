"""Matrix products with packed weights, float32 or int8, and what follows them while the rows are still in cache.

A product runs over chunks of rows, panels of columns and register tiles, in that order. int8 rows are quantised when
they are read, with one scale per row, so a row's result does not depend on the batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit, types
from numba.core.extending import intrinsic, overload
from numpy.typing import NDArray

from . import lines, tiles
from .isa import chosen

Float32 = NDArray[np.float32]

RUNG = chosen()
TALL, COLUMNS, GROUP = RUNG.rows, RUNG.columns, RUNG.group
FLOAT_TILE = tiles.FLOAT_TILES[RUNG.vectors - 1]
DOT = RUNG.int8 == "dot"
ITEM_BYTES = 2 if RUNG.int8 == "pairs" else 1  # of a quantised activation
DEPTH_STEP = 64  # int8 depths are padded with zeros to multiples of this: whole vectors of 16 always fit
CHUNK = 96  # rows whose inner activations (96 x 3072 x 4 bytes) stay in a 2 MiB second-level cache
ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}


class Packed(NamedTuple):
    """A linear layer for this rung, its M outputs padded with zeros to P panels of COLUMNS.

    panels: (P, K, COLUMNS) float32, or (P, K' / GROUP, COLUMNS, GROUP) int8 with K padded to K'. start: (P * COLUMNS,)
    what each sum starts with: the bias (float32), or int32 that takes out the +128 of unsigned activations. scale, bias:
    (P * COLUMNS,) float32, of int8 weights. inputs, outputs: K, M.
    """

    panels: NDArray[Any]
    start: NDArray[Any]
    scale: Float32
    bias: Float32
    inputs: int
    outputs: int


def pack(weight: Float32, bias: Float32) -> Packed:
    """Float32 weights, (M, K), and bias, (M,), in panels."""
    M, K = weight.shape
    P = -(-M // COLUMNS)
    padded, start = np.zeros((P * COLUMNS, K), np.float32), np.zeros(P * COLUMNS, np.float32)
    padded[:M], start[:M] = weight, bias
    panels = np.ascontiguousarray(padded.reshape(P, COLUMNS, K).transpose(0, 2, 1))
    return Packed(panels, start, start, start, K, M)


def pack_int8(weight: NDArray[np.int8], scale: Float32, bias: Float32) -> Packed:
    """int8 weights, (M, K) in [-127, 127], with a scale for each output, (M,), and bias, (M,), in panels."""
    M, K = weight.shape
    P, depth = -(-M // COLUMNS), -(-K // DEPTH_STEP) * DEPTH_STEP
    if depth * lines.LIMIT * 255 >= 2**31:
        raise ValueError(f"{K} products of int8 can overflow an int32 sum")
    padded = np.zeros((P * COLUMNS, depth), np.int8)
    padded[:M, :K] = weight
    panels = padded.reshape(P, COLUMNS, depth // GROUP, GROUP).transpose(0, 2, 1, 3)
    start = np.zeros(P * COLUMNS, np.int32)
    if DOT:
        start -= 128 * padded.sum(axis=1, dtype=np.int32)
    wide = np.zeros((2, P * COLUMNS), np.float32)
    wide[0, :M], wide[1, :M] = scale, bias
    return Packed(np.ascontiguousarray(panels), start, wide[0], wide[1], K, M)


@njit(nogil=True)
def activate(address: int, count: int, activation: int) -> None:
    """Apply an activation of ACTIVATIONS in place; count is a multiple of 16."""
    if activation == 1:
        lines.gelu_line(address, count)
    elif activation == 2:
        lines.gelu_tanh_line(address, count)
    elif activation == 3:
        lines.relu_line(address, count)


@intrinsic
def keep_alive(typingctx, *arrays):
    """Nothing, but the arrays live until here: Numba frees an array after its last use by name."""

    def code(context, builder, signature, arguments):
        return context.get_dummy_value()

    return types.void(types.StarArgTuple(arrays)), code


@njit(nogil=True)
def _float_product(
    x: int, x_stride: int, rows: int, weights: Packed, out: int, out_stride: int, activation: int
) -> None:
    panels, start = weights.panels, weights.start.ctypes.data
    depth, base = panels.shape[1], panels.ctypes.data
    for p in range(panels.shape[0]):
        panel, column = base + 4 * p * depth * COLUMNS, 4 * p * COLUMNS
        for r in range(0, rows, TALL):
            here, high = out + r * out_stride + column, min(TALL, rows - r)
            FLOAT_TILE(x + r * x_stride, x_stride, high, panel, 4 * COLUMNS, start + column, here, out_stride, depth)
            if activation > 0:
                for row in range(high):
                    activate(here + row * out_stride, COLUMNS, activation)


@njit(nogil=True)
def _int8_product(
    x: int, x_stride: int, rows: int, weights: Packed, out: int, out_stride: int, activation: int
) -> None:
    panels, start = weights.panels, weights.start.ctypes.data
    scale, bias, base = weights.scale.ctypes.data, weights.bias.ctypes.data, panels.ctypes.data
    depth = panels.shape[1] * GROUP
    quantized = np.empty((rows, depth * ITEM_BYTES), np.int8)
    quantized_stride, quantized_base = depth * ITEM_BYTES, quantized.ctypes.data
    factors = np.empty(rows, np.float32)
    for row in range(rows):
        factors[row] = lines.quantize_line(x + row * x_stride, quantized_base + row * quantized_stride, weights.inputs)
    sums = np.empty((TALL, COLUMNS), np.int32)
    sums_base, sums_stride = sums.ctypes.data, 4 * COLUMNS
    for p in range(panels.shape[0]):
        panel, column = base + p * depth * COLUMNS, 4 * p * COLUMNS
        for r in range(0, rows, TALL):
            left = quantized_base + r * quantized_stride
            tiles.int8_tile(
                left,
                quantized_stride,
                min(TALL, rows - r),
                panel,
                start + column,
                sums_base,
                sums_stride,
                depth // GROUP,
            )
            for row in range(min(TALL, rows - r)):
                here = out + (r + row) * out_stride + column
                lines.dequantize_line(
                    sums_base + row * sums_stride, here, factors[r + row], scale + column, bias + column, COLUMNS
                )
                activate(here, COLUMNS, activation)
    keep_alive(quantized, sums)  # only their addresses were used: without this Numba frees them above


def product(x: int, x_stride: int, rows: int, weights: Packed, out: int, out_stride: int, activation: int) -> None:
    """out = activation(x W^T + b) over `rows` rows at address x; the dtype of the weights decides how. Compiled only.

    x_stride, out_stride: bytes between rows; an out row has room for all P * COLUMNS columns.
    """
    raise NotImplementedError("called from compiled code only")


@overload(product, jit_options={"nogil": True})
def _product(x, x_stride, rows, weights, out, out_stride, activation):
    chosen_product = _int8_product if weights.types[0].dtype == types.int8 else _float_product

    def run(x, x_stride, rows, weights, out, out_stride, activation):
        chosen_product(x, x_stride, rows, weights, out, out_stride, activation)

    return run


@njit(nogil=True)
def linear(x: Float32, weights: Packed) -> Float32:
    """x W^T + b. x: (N, K) float32, C-contiguous. Returns (N, M) float32."""
    N, M, wide = len(x), weights.outputs, weights.start.size
    out = np.empty((N, M), np.float32)
    if wide == M:
        for r in range(0, N, CHUNK):
            product(
                x.ctypes.data + r * x.strides[0],
                x.strides[0],
                min(CHUNK, N - r),
                weights,
                out.ctypes.data + 4 * r * M,
                4 * M,
                0,
            )
        return out
    room = np.empty((min(N, CHUNK), wide), np.float32)
    for r in range(0, N, CHUNK):
        rows = min(CHUNK, N - r)
        product(x.ctypes.data + r * x.strides[0], x.strides[0], rows, weights, room.ctypes.data, 4 * wide, 0)
        out[r : r + rows] = room[:rows, :M]
    return out


@njit(nogil=True)
def layer_norm(x: Float32, weight: Float32, bias: Float32, eps: float) -> Float32:
    """Rows to mean 0 and variance 1, then scaled and shifted. x: (N, D) float32. Returns (N, D) float32."""
    N, D = x.shape
    out, row = np.empty((N, D), np.float32), np.empty(D, np.float32)
    for r in range(N):
        row[:] = x[r]
        lines.norm_line(
            row.ctypes.data, 0, out.ctypes.data + 4 * r * D, weight.ctypes.data, bias.ctypes.data, D, np.float32(eps)
        )
    return out


@njit(nogil=True)
def linear_norm(x: Float32, weights: Packed, residual: Float32, weight: Float32, bias: Float32, eps: float) -> Float32:
    """LayerNorm(residual + x W^T + b). x: (N, K), residual: (N, D). Returns (N, D) float32."""
    N, D = residual.shape
    out, wide = np.empty((N, D), np.float32), weights.start.size
    room = np.empty((min(N, CHUNK), wide), np.float32)
    for r in range(0, N, CHUNK):
        rows = min(CHUNK, N - r)
        product(x.ctypes.data + r * x.strides[0], x.strides[0], rows, weights, room.ctypes.data, 4 * wide, 0)
        for row in range(rows):
            place = 4 * (r + row) * D
            lines.norm_line(
                room.ctypes.data + 4 * row * wide,
                residual.ctypes.data + place,
                out.ctypes.data + place,
                weight.ctypes.data,
                bias.ctypes.data,
                D,
                np.float32(eps),
            )
    return out


@njit(nogil=True)
def feed_forward(
    x: Float32, inner: Packed, activation: int, outer: Packed, weight: Float32, bias: Float32, eps: float
) -> Float32:
    """LayerNorm(x + outer(activation(inner(x)))), a chunk of rows at a time. x: (N, D). Returns (N, D) float32."""
    N, D = x.shape
    out = np.empty((N, D), np.float32)
    hidden = np.empty((min(N, CHUNK), inner.start.size), np.float32)
    room = np.empty((min(N, CHUNK), outer.start.size), np.float32)
    stride, wide = 4 * inner.start.size, 4 * outer.start.size
    for r in range(0, N, CHUNK):
        rows, place = min(CHUNK, N - r), x.ctypes.data + 4 * r * D
        product(place, 4 * D, rows, inner, hidden.ctypes.data, stride, activation)
        product(hidden.ctypes.data, stride, rows, outer, room.ctypes.data, wide, 0)
        for row in range(rows):
            lines.norm_line(
                room.ctypes.data + row * wide,
                place + 4 * row * D,
                out.ctypes.data + 4 * (r + row) * D,
                weight.ctypes.data,
                bias.ctypes.data,
                D,
                np.float32(eps),
            )
    return out
