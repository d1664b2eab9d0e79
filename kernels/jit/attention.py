"""Attention over a ragged batch, one sequence and head at a time, through the same register tiles as every product.

Probabilities are never stored for more rows than one register tile has: the masses need them before the rule decides,
the contexts after it and for the kept rows only, so those of kept rows are computed twice. Storing them would take H n n floats: 12 MB for 12 heads and 512 tokens.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from . import lines, tiles
from .isa import LANES, chosen

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

TALL, VECTORS = chosen().rows, chosen().vectors
COLUMNS = chosen().columns
TILE_1, TILE_2, TILE_3, TILE_4 = tiles.FLOAT_TILES


@njit(nogil=True)
def _tile(
    a: int, a_stride: int, rows: int, b: int, b_stride: int, zero: int, c: int, c_stride: int, depth: int, width: int
) -> None:
    """c = a b for `rows` rows and as many vectors as cover `width` columns, at most one panel's."""
    if VECTORS == 1 or width <= LANES:
        TILE_1(a, a_stride, rows, b, b_stride, zero, c, c_stride, depth)
    elif width <= 2 * LANES:
        TILE_2(a, a_stride, rows, b, b_stride, zero, c, c_stride, depth)
    elif width <= 3 * LANES:
        TILE_3(a, a_stride, rows, b, b_stride, zero, c, c_stride, depth)
    else:
        TILE_4(a, a_stride, rows, b, b_stride, zero, c, c_stride, depth)


@njit(nogil=True)
def _pack_keys(k: Float32, panels: Float32) -> None:
    """k: (n, d) to panels, (P, d, COLUMNS), the columns beyond n left as they are."""
    for row in range(len(k)):
        p, column = row // COLUMNS, row % COLUMNS
        for i in range(k.shape[1]):
            panels[p, i, column] = k[row, i]


@njit(nogil=True)
def _pack_values(v: Float32, panels: Float32) -> None:
    """v: (n, d) to panels, (P, n, COLUMNS), the columns beyond d left as they are."""
    for p in range(len(panels)):
        first = p * COLUMNS
        width = min(COLUMNS, v.shape[1] - first)
        for row in range(len(v)):
            for i in range(width):
                panels[p, row, i] = v[row, first + i]


@njit(nogil=True)
def _probabilities(q: int, q_stride: int, rows: int, keys: Float32, n: int, zero: int, probs: Float32) -> None:
    """softmax(q k^T / sqrt d) of up to one tile's rows. keys: (P, d, COLUMNS); probs: (TALL, P * COLUMNS), written."""
    d, stride = keys.shape[1], 4 * probs.shape[1]
    for p in range((n + COLUMNS - 1) // COLUMNS):
        panel, out = keys.ctypes.data + 4 * p * d * COLUMNS, probs.ctypes.data + 4 * p * COLUMNS
        _tile(q, q_stride, rows, panel, 4 * COLUMNS, zero, out, stride, d, n - p * COLUMNS)
    scale = np.float32(1 / math.sqrt(d))
    for row in range(rows):
        lines.softmax_line(probs.ctypes.data + row * stride, n, scale)


@njit(nogil=True)
def _longest(cu_seqlens: Int32) -> int:
    longest = 0
    for b in range(len(cu_seqlens) - 1):
        longest = max(longest, cu_seqlens[b + 1] - cu_seqlens[b])
    return longest


@njit(nogil=True)
def attention_mass(q: Float32, kv: Float32, cu_seqlens: Int32, heads: int) -> Float32:
    """What each token receives as a key: summed over its sequence's queries, averaged over heads.

    q: (N, D), kv: (N, 2 D) float32, keys then values; cu_seqlens: (B + 1,) int32. Returns (N,) float32.
    """
    N, D = q.shape
    d, wide = D // heads, (_longest(cu_seqlens) + COLUMNS - 1) // COLUMNS
    keys, probs = np.zeros((wide, d, COLUMNS), np.float32), np.empty((TALL, wide * COLUMNS), np.float32)
    zeros, mass = np.zeros(COLUMNS, np.float32), np.zeros(N, np.float32)
    received = np.empty(wide * COLUMNS, np.float32)
    for b in range(len(cu_seqlens) - 1):
        begin, end = cu_seqlens[b], cu_seqlens[b + 1]
        n = end - begin
        for h in range(heads):
            _pack_keys(kv[begin:end, h * d : (h + 1) * d], keys)
            received[:n] = 0
            for row in range(begin, end, TALL):
                rows, place = min(TALL, end - row), q.ctypes.data + 4 * (row * D + h * d)
                _probabilities(place, 4 * D, rows, keys, n, zeros.ctypes.data, probs)
                for i in range(rows):
                    for k in range(n):
                        received[k] += probs[i, k]
            for k in range(n):
                mass[begin + k] += received[k]
    for k in range(N):
        mass[k] /= np.float32(heads)
    return mass


@njit(nogil=True)
def attention_context(q: Float32, kv: Float32, cu_queries: Int32, cu_seqlens: Int32, heads: int) -> Float32:
    """softmax(Q_h K_h^T / sqrt(D/H)) V_h, heads side by side: some queries of each sequence against all its keys.

    q: (N', D), kv: (N, 2 D) float32, keys then values; cu_queries, cu_seqlens: (B + 1,) int32, the sequences' bounds in
    q and in kv. Returns (N', D) float32.
    """
    D = q.shape[1]
    d, longest = D // heads, _longest(cu_seqlens)
    wide, across = (longest + COLUMNS - 1) // COLUMNS, (d + COLUMNS - 1) // COLUMNS
    keys, probs = np.zeros((wide, d, COLUMNS), np.float32), np.empty((TALL, wide * COLUMNS), np.float32)
    values, found = np.zeros((across, longest, COLUMNS), np.float32), np.empty((TALL, COLUMNS), np.float32)
    zeros, out = np.zeros(COLUMNS, np.float32), np.empty(q.shape, np.float32)
    for b in range(len(cu_seqlens) - 1):
        begin, end = cu_seqlens[b], cu_seqlens[b + 1]
        n = end - begin
        for h in range(heads):
            _pack_keys(kv[begin:end, h * d : (h + 1) * d], keys)
            _pack_values(kv[begin:end, D + h * d : D + (h + 1) * d], values)
            for row in range(cu_queries[b], cu_queries[b + 1], TALL):
                rows, place = min(TALL, cu_queries[b + 1] - row), q.ctypes.data + 4 * (row * D + h * d)
                _probabilities(place, 4 * D, rows, keys, n, zeros.ctypes.data, probs)
                for p in range(across):
                    first = p * COLUMNS
                    width = min(COLUMNS, d - first)
                    panel = values.ctypes.data + 4 * p * longest * COLUMNS
                    room, stride = found.ctypes.data, 4 * probs.shape[1]
                    _tile(
                        probs.ctypes.data,
                        stride,
                        rows,
                        panel,
                        4 * COLUMNS,
                        zeros.ctypes.data,
                        room,
                        4 * COLUMNS,
                        n,
                        width,
                    )
                    for i in range(rows):
                        for c in range(width):
                            out[row + i, h * d + first + c] = found[i, c]
    return out
