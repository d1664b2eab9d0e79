"""The float operations on packed rows of a GPU: each chooses its launch geometry and starts one kernel.

x, q, kv, qkv, tables and matrices are of the storage type, float32 or float16; biases and norms are float32, indices
int32, flags uint8. Legend: N packed tokens, N' those that go on, B sequences, H heads, D width, d = D / H, Z blocks of
64 queries.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .. import blocks
from . import BLOCK_SHARED_BYTES, QUERIES, ROWS, TILE, Array, Geometry, Kernels, pitch, row_bytes, rows_words

HEAD_WIDTHS = (32, 64, 128)  # that the context kernels are made for; a head takes the next wider one
SUFFIXES = {np.dtype(np.float32): "f32", np.dtype(np.float16): "f16"}


def longest_text(head_width: int) -> int:
    """The most tokens whose attention fits in a block's shared memory, with one warp; 0 for heads that are too wide."""
    if head_width > HEAD_WIDTHS[-1]:
        return 0
    return (BLOCK_SHARED_BYTES // 4 - rows_words(1, head_width)) // (ROWS + 1)


class FloatKernels(Kernels):
    """dtype: the storage type."""

    sources = ("rows", "attention", "prune", "compact")

    def __init__(self, cp: Any, geometry: Geometry, dtype: Any):
        super().__init__(cp, geometry)
        self._suffix = SUFFIXES[np.dtype(dtype)]

    def embed_norm(
        self, tokens: tuple[Array, Array, Array], tables: tuple[Array, ...], norm: Any, eps: float, out: Array
    ) -> None:
        """The tables' rows added, and LayerNorm. tokens: ids, positions, segments, (N,); out: (N, E)."""
        arguments = (*tokens, *tables, *norm, *out.shape, eps, out)
        self.on_rows(f"embed_norm_{self._suffix}", out, *arguments, row_bytes=4 * out.shape[1])

    def add_norm(
        self, product: Array, bias: Array, residual: Array, places: Array, norm: Any, eps: float, out: Array
    ) -> None:
        """LayerNorm of product + bias + residual[places], all (N', D), residual (N, D)."""
        arguments = (product, bias, residual, places, *norm, *out.shape, eps, out)
        self.on_rows(f"add_norm_{self._suffix}", out, *arguments, row_bytes=4 * out.shape[1])

    def bias_activation(self, x: Array, bias: Array, activation: str) -> None:
        """In place: activation(x + bias), (N, F); "none" adds the bias only."""
        self.on_rows(f"bias_{activation}_{self._suffix}", x, x, bias, *x.shape)

    def gather_rows(self, x: Array, places: Array, out: Array) -> None:
        """x[places], (N', D)."""
        self.on_rows(f"gather_rows_{self._suffix}", out, x, places, *out.shape, out)

    def head_out(self, hidden: Array, weight: Array, bias: Array, logits: Array) -> None:
        """Hidden W^T + b. hidden: (B, D), weight: (labels, D); logits: (B, labels) float32."""
        arguments = (hidden, weight, bias, *logits.shape, hidden.shape[1], logits)
        self.on_rows(f"head_out_{self._suffix}", logits, *arguments)

    def attention_mass(self, qkv: Array, bias: Array, cu_seqlens: Array, longest: int, mass_zhn: Array) -> None:
        """What each key receives from each block of queries. qkv: (N, 3 D)."""
        self._columns("attention_mass", (qkv, bias, cu_seqlens), longest, mass_zhn)

    def weighted_probs(
        self, qkv: Array, bias: Array, cu_seqlens: Array, share: Array, longest: int, probs_zhn: Array
    ) -> None:
        """Probabilities times their queries' shares, (N,), summed over the queries of each block."""
        self._columns("weighted_probs", (qkv, bias, cu_seqlens, share), longest, probs_zhn)

    def _columns(self, name: str, arrays: tuple[Array, ...], longest: int, out_zhn: Array) -> None:
        _, heads, N = out_zhn.shape
        qkv, _, cu_seqlens = arrays[:3]
        D = qkv.shape[1] // 3
        d = D // heads

        def shared_bytes(warps: int) -> int:
            return 4 * (rows_words(warps, d) + (warps * ROWS + 1) * longest)

        shape = (longest, heads, len(cu_seqlens) - 1)
        arguments = (*arrays, N, D, heads, longest, 1 / math.sqrt(d), out_zhn)
        self.on_heads(f"{name}_{self._suffix}", shape, shared_bytes, *arguments, queries_of_block=QUERIES)

    def attention_context(
        self,
        q: tuple[Array, Array, Array, int],
        kv: tuple[Array, int, int],
        cu_seqlens: Array,
        bias: Array,
        heads: int,
        out: Array,
    ) -> None:
        """Softmax(Q K^T / sqrt d) V of the queries that go on. out: (N', D).

        q: the array, (N, .), whose first D columns are queries; the rows that go on, (N',); their bounds, (B + 1,); and
        the most of a sequence. kv: the array, (N, .), and its columns where keys and values begin.
        """
        (q_array, q_rows, q_bounds, most), (kv_array, k_offset, v_offset) = q, kv
        D, d = out.shape[1], out.shape[1] // heads

        def shared_bytes(warps: int) -> int:
            return 4 * (rows_words(warps, d) + TILE * pitch(d))

        made_for = next(width for width in HEAD_WIDTHS if width >= d)
        queries = (q_array, q_array.shape[1], q_rows, q_bounds)
        keys = (kv_array, kv_array.shape[1], k_offset, v_offset, cu_seqlens)
        name, shape = f"attention_context_{self._suffix}_d{made_for}", (most, heads, len(cu_seqlens) - 1)
        self.on_heads(name, shape, shared_bytes, *queries, *keys, bias, D, heads, 1 / math.sqrt(d), out)

    def merged_context(
        self,
        probs_zhn: Array,
        qkv: Array,
        bias: Array,
        cu_seqlens: Array,
        stand_in: Array,
        rank: Array,
        longest: int,
        out: Array,
    ) -> None:
        """The context of each sequence's row that stands for removed ones, at rank[stand_in] of out, (N', D)."""
        _, heads, N = probs_zhn.shape
        arguments = (probs_zhn, qkv, bias, cu_seqlens, stand_in, rank, N, out.shape[1], heads, out)
        grid = (heads, len(stand_in))
        self.launch(f"merged_context_{self._suffix}", grid, 2, *arguments, shared_bytes=row_bytes(longest))

    def keep(
        self, step: Any, mass_zhn: Array, cu_seqlens: Array, initial: Array, mass: Array, kept: Array, counts: Array
    ) -> None:
        """Masses, (N,) float32, whether each token stays, (N,) uint8, and how many do, (B,) int32.

        step: a record like `blocks.RULE`. initial: (B,) int32, lengths before layer 0.
        """
        _, H, N = mass_zhn.shape
        name, arguments = {
            blocks.KEEP_ALL: ("keep_all", (cu_seqlens, N, H)),
            blocks.ABSOLUTE: (
                "keep_absolute",
                (cu_seqlens, initial, N, H, step.denominator, step.limit, step.value),
            ),
            blocks.RELATIVE: ("keep_relative", (cu_seqlens, N, H, step.value)),
            blocks.COUNT: ("keep_count", (cu_seqlens, initial, N, H, step.value)),
        }[step.kind]
        self.on_sequences(name, len(counts), mass_zhn, *arguments, mass, kept, counts)

    def share_removed(
        self, mass: Array, kept: Array, cu_seqlens: Array, share: Array, goes_on: Array, stand_in: Array, counts: Array
    ) -> None:
        """Each removed token's share, (N,); which rows go on, the first removed among them; its place, (B,), or -1."""
        self.on_sequences("share_removed", len(counts), mass, kept, cu_seqlens, share, goes_on, stand_in, counts)

    def merge_rows(self, x: Array, share: Array, stand_in: Array, cu_seqlens: Array) -> None:
        """In place: row stand_in[b] of x, (N, D), becomes its sequence's rows times their shares."""
        grid = (math.ceil(x.shape[1] / 128), len(stand_in))
        self.launch(f"merge_rows_{self._suffix}", grid, 4, x, share, stand_in, cu_seqlens, x.shape[1])
