"""Attention of one sequence and one head, through the same register tiles as every product.

Addresses and byte strides throughout. head_width is d padded to whole vectors; the weights make the padding zero.
"""

from __future__ import annotations

import numpy as np

from ..isa import LANES, chosen
from . import lines, tiles
from .memory import compiled, copy, view
from .products import float_panel

VECTORS, COLUMNS = chosen().vectors, chosen().columns


@compiled
def probs_stride(n):
    """Bytes of one row of n probabilities: whole vectors and one more, so that rows do not share cache sets."""
    return 4 * LANES * ((n + LANES - 1) // LANES + 1)


@compiled
def _vectors(columns):
    """Vectors that cover this many columns, at most one panel's."""
    return min(VECTORS, (columns + LANES - 1) // LANES)


@compiled
def keys_bytes(n, head_width):
    """Room for one head's packed keys."""
    return 4 * COLUMNS * ((n + COLUMNS - 1) // COLUMNS) * head_width


@compiled
def pack_keys(k, k_stride, n, head_width, keys):
    """k: (n, head_width) float32 rows, transposed into panels: (P, head_width, COLUMNS) at `keys`."""
    line = 4 * COLUMNS
    for r in range(0, n, LANES):
        panel = keys + (r // COLUMNS) * head_width * line + 4 * (r % COLUMNS)
        for c in range(0, head_width, LANES):
            tiles.transpose(k + r * k_stride + 4 * c, k_stride, min(LANES, n - r), panel + c * line, line)


@compiled
def pack_values(v, v_stride, n, head_width, values):
    """v: (n, head_width) float32 rows, side by side at `values`: read again and again, they should lie on few pages."""
    for row in range(n):
        copy(values + row * 4 * head_width, v + row * v_stride, 4 * head_width)


@compiled
def attention_probs(q, q_stride, rows, keys, n, head_width, scale, zeros, probs):
    """softmax(scale q k^T) of some query rows against all n packed keys, at `probs`, rows `probs_stride(n)` apart."""
    stride, line = probs_stride(n), 4 * COLUMNS
    for c in range(0, n, COLUMNS):
        panel = keys + c * 4 * head_width
        float_panel(
            q, q_stride, rows, panel, line, zeros, 0, probs + 4 * c, stride, head_width, _vectors(n - c), panel, 0
        )
    for row in range(rows):
        lines.softmax_line(probs + row * stride, n, scale)


@compiled
def clear(sums, n):
    """Zeros, (n,) float32 at address `sums`."""
    values = view(sums, n, np.float32)
    for k in range(n):
        values[k] = 0


@compiled
def add_mass(probs, rows, n, sums):
    """Add to `sums`, (n,), what each key receives from some rows of one head's probabilities, row by row."""
    for row in range(rows):
        lines.add_line(sums, probs + row * probs_stride(n), n)


@compiled
def average_mass(received, received_bytes, heads, n, mass):
    """Attention masses, (n,) float32: what the heads received, added in order, over their number."""
    for k in range(n):
        mass[k] = 0
    for h in range(heads):
        row = view(received + h * received_bytes, n, np.float32)
        for k in range(n):
            mass[k] += row[k]
    for k in range(n):
        mass[k] /= np.float32(heads)


@compiled
def attention_context(probs, rows, n, v, v_stride, head_width, zeros, out, out_stride):
    """probs v for some rows of probabilities over n keys. v: (n, head_width) float32 rows."""
    stride = probs_stride(n)
    for c in range(0, head_width, COLUMNS):
        vectors, here = _vectors(head_width - c), out + 4 * c
        float_panel(probs, stride, rows, v + 4 * c, v_stride, zeros, 0, here, out_stride, n, vectors, v, 0)
