"""The integer operations on packed rows of a GPU, equal bit for bit to `kernels.integer`.

x, q, kv, qkv, tables and matrices are int8, sums int32, masses and weights of removed tokens int64, factors two int32
arrays (of `device_dyadic`), flags uint8. Legend: N packed tokens, N' those that go on, B sequences, H heads, D width,
M outputs, Z blocks of 64 queries.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from .. import blocks, integer
from . import BLOCK_SHARED_BYTES, QUERIES, ROWS, Array, Kernels, row_bytes, rows_words

PRODUCT_TILE = 64  # rows and outputs of a block of `linear_i8`
MOST_GRID = 65535  # of a grid's second dimension


class Factor(NamedTuple):
    """A multiplier and a shift for each channel, (M,) int32."""

    multiplier: Array
    shift: Array


class Norm(NamedTuple):
    """`integer.Norm` on the device: drop its shift; arrays (D,) int32."""

    drop: int
    bias: Array
    multiplier: Array
    shift: Array
    late: Array


class Gelu(NamedTuple):
    """`integer.Gelu` on the device: b int32, c and one int64, (M,)."""

    b: Array
    c: Array
    one: Array
    multiplier: Array
    shift: Array


def device_dyadic(cp: Any, factor: integer.Dyadic, count: int) -> Factor:
    """One factor, or one for each of `count` channels."""
    return Factor(*(cp.asarray(_channels(part, count, np.int32)) for part in factor))


def device_norm(cp: Any, norm: integer.Norm) -> Norm:
    """The constants of a LayerNorm."""
    count = len(norm.bias)
    bias, late = (cp.asarray(_channels(part, count, np.int32)) for part in (norm.bias, norm.late))
    return Norm(norm.shift, bias, *device_dyadic(cp, norm.output, count), late)


def device_gelu(cp: Any, gelu: integer.Gelu, count: int) -> Gelu:
    """The constants of i-GELU for `count` channels."""
    b, c, one = (
        cp.asarray(_channels(part, count, kind))
        for part, kind in ((gelu.b, np.int32), (gelu.c, np.int64), (gelu.one, np.int64))
    )
    return Gelu(b, c, one, *device_dyadic(cp, gelu.output, count))


def _channels(values: Any, count: int, kind: Any) -> Any:
    return np.ascontiguousarray(np.broadcast_to(values, (count,)), kind)


def exp_numbers(exp: integer.Exp) -> tuple[int, int, int, int, int]:
    """ln2, b, c, multiplier and shift."""
    return int(exp.ln2), int(exp.b), int(exp.c), int(exp.output.multiplier), int(exp.output.shift)


def longest_text(head_width: int) -> int:
    """The most tokens whose attention fits in a block's shared memory, with one warp; 0 or less for too wide heads."""
    return (BLOCK_SHARED_BYTES - 4 * _rows_words(1, head_width)) // (4 * ROWS + 8)


def _rows_words(warps: int, head_width: int) -> int:
    return rows_words(warps, math.ceil(head_width / 4))  # four columns to a word


class IntegerKernels(Kernels):
    sources = ("integer_rows", "integer_products", "integer_attention", "integer_prune", "compact")

    def embed_norm(
        self, tokens: tuple[Array, Array, Array], tables: tuple[tuple[Array, Factor], ...], norm: Norm, out: Array
    ) -> None:
        """Rows of int8 tables added in 16 bits, and LayerNorm. tokens: ids, positions, segments, (N,); out: (N, D)."""
        parts = [part for rows, factor in tables for part in (rows, *factor)]
        arguments = (*tokens, *parts, *norm, *out.shape, out)
        self.on_rows("embed_norm_i8", out, *arguments, row_bytes=4 * out.shape[1])

    def linear(self, x: Array, weight: Array, bias: Array, sums: Array) -> None:
        """x W^T + b. x: (N, K), weight: (M, K), bias: (M,) int32; sums: (N, M)."""
        (N, K), M = x.shape, len(weight)
        grid = (math.ceil(M / PRODUCT_TILE), min(math.ceil(N / PRODUCT_TILE), MOST_GRID))
        self.launch("linear_i8", grid, 8, x, weight, bias, N, K, M, sums)

    def requantize(self, sums: Array, factor: Factor, out: Array) -> None:
        """Eight bits, or where out is int32 as many."""
        self.on_rows("requantize_i8" if out.dtype == np.int8 else "requantize_i32", out, sums, *factor, *out.shape, out)

    def i_gelu(self, sums: Array, gelu: Gelu, again: tuple[int, int], out: Array) -> None:
        """GELU in 8 bits, requantised once more by `again` unless its multiplier is 0."""
        self.on_rows("i_gelu", out, sums, *gelu, *again, *out.shape, out)

    def i_relu(self, sums: Array, factor: Factor, again: tuple[int, int], out: Array) -> None:
        """max(x, 0) in 8 bits, requantised once more by `again` unless its multiplier is 0."""
        self.on_rows("i_relu", out, sums, *factor, *again, *out.shape, out)

    def i_tanh(self, sums: Array, factor: Factor, exp: integer.Exp, out: Array) -> None:
        """127 tanh. factor: to units of 2^-12; exp: `integer.tanh_constants`."""
        self.on_rows("i_tanh", out, sums, *factor, *exp_numbers(exp), *out.shape, out)

    def add_norm(
        self,
        sums: tuple[Array, Factor],
        residual: tuple[Array, Factor],
        places: Array,
        norm: Norm,
        again: tuple[int, int],
        out: Array,
    ) -> None:
        """LayerNorm of sums, (N', D), + residual[places], each in the 22-bit scale by its factor."""
        arguments = (sums[0], *sums[1], residual[0], places, *residual[1], *norm, *again, *out.shape, out)
        self.on_rows("add_norm_i8", out, *arguments, row_bytes=4 * out.shape[1])

    def gather_rows(self, x: Array, places: Array, out: Array) -> None:
        """x[places], (N', D)."""
        self.on_rows("gather_rows_i8", out, x, places, *out.shape, out)

    def attention_mass(
        self, qkv: Array, cu_seqlens: Array, exp: integer.Exp, mask: int, longest: int, mass_zhn: Array
    ) -> None:
        """What each key receives from each block of queries. qkv: (N, 3 D). mask: bits of a probability that count."""
        self._columns("attention_mass_i8", (qkv, cu_seqlens), (*exp_numbers(exp), mask), longest, mass_zhn)

    def weighted_probs(
        self, qkv: Array, cu_seqlens: Array, weights: Array, exp: integer.Exp, longest: int, probs_zhn: Array
    ) -> None:
        """8-bit probabilities times their queries' weights, (N,), summed over the queries of each block."""
        self._columns("weighted_probs_i8", (qkv, cu_seqlens, weights), exp_numbers(exp), longest, probs_zhn)

    def _columns(
        self, name: str, arrays: tuple[Array, ...], numbers: tuple[int, ...], longest: int, out_zhn: Array
    ) -> None:
        _, heads, N = out_zhn.shape
        qkv, cu_seqlens = arrays[:2]
        D = qkv.shape[1] // 3

        def shared_bytes(warps: int) -> int:
            return 4 * _rows_words(warps, D // heads) + (4 * warps * ROWS + 8) * longest

        shape, arguments = (longest, heads, len(cu_seqlens) - 1), (*arrays, N, D, heads, longest, *numbers, out_zhn)
        self.on_heads(name, shape, shared_bytes, *arguments, queries_of_block=QUERIES)

    def attention_context(
        self,
        q: tuple[Array, Array, Array, int],
        kv: tuple[Array, int, int],
        cu_seqlens: Array,
        heads: int,
        longest: int,
        exp: integer.Exp,
        factor: tuple[int, int],
        out: Array,
    ) -> None:
        """P V of the queries that go on, in 8 bits by one factor. q, kv, out: as `FloatKernels.attention_context`."""
        (q_array, q_rows, q_bounds, most), (kv_array, k_offset, v_offset) = q, kv
        D = out.shape[1]

        def shared_bytes(warps: int) -> int:
            return 4 * _rows_words(warps, D // heads) + 4 * warps * ROWS * longest

        queries = (q_array, q_array.shape[1], q_rows, q_bounds)
        keys = (kv_array, kv_array.shape[1], k_offset, v_offset, cu_seqlens)
        arguments = (*queries, *keys, D, heads, longest, *exp_numbers(exp), *factor, out)
        self.on_heads("attention_context_i8", (most, heads, len(cu_seqlens) - 1), shared_bytes, *arguments)

    def merged_context(
        self,
        probs_zhn: Array,
        qkv: Array,
        cu_seqlens: Array,
        total_weight: Array,
        stand_in: Array,
        rank: Array,
        longest: int,
        factor: tuple[int, int],
        out: Array,
    ) -> None:
        """The context of each sequence's row that stands for removed ones, at rank[stand_in] of out, (N', D)."""
        _, heads, N = probs_zhn.shape
        arguments = (
            probs_zhn, qkv, cu_seqlens, total_weight, stand_in, rank, N, out.shape[1], heads, *factor, out
        )  # fmt: skip
        self.launch("merged_context_i8", (heads, len(stand_in)), 2, *arguments, shared_bytes=row_bytes(longest))

    def keep(
        self, rule: Any, mass_zhn: Array, cu_seqlens: Array, initial: Array, mass: Array, kept: Array, counts: Array
    ) -> None:
        """Masses, (N,) int64, whether each token stays, (N,) uint8, and how many do, (B,) int32.

        rule: kind, denominator, limit, lowest and counts of one layer of `minilpt.integer_rules`, counts on the device.
        """
        _, H, N = mass_zhn.shape
        name, arguments = {
            blocks.KEEP_ALL: ("keep_all_i8", (cu_seqlens, N, H)),
            blocks.ABSOLUTE: (
                "keep_absolute_i8",
                (cu_seqlens, initial, N, H, rule.denominator, rule.limit, rule.lowest),
            ),
            blocks.RELATIVE: ("keep_relative_i8", (cu_seqlens, N, H, rule.lowest)),
            blocks.COUNT: ("keep_count_i8", (cu_seqlens, initial, rule.counts, N, H)),
        }[rule.kind]
        self.on_sequences(name, len(counts), mass_zhn, *arguments, mass, kept, counts)

    def weigh_removed(
        self,
        mass: Array,
        kept: Array,
        cu_seqlens: Array,
        weights: Array,
        total_weight: Array,
        goes_on: Array,
        stand_in: Array,
        counts: Array,
    ) -> None:
        """Removed tokens' weights, (N,), their sum, (B,); which rows go on; the place of the merged, (B,), or -1."""
        arguments = (mass, kept, cu_seqlens, weights, total_weight, goes_on, stand_in, counts)
        self.on_sequences("weigh_removed_i8", len(counts), *arguments)

    def merge_rows(self, x: Array, weights: Array, total_weight: Array, stand_in: Array, cu_seqlens: Array) -> None:
        """In place: row stand_in[b] of x, (N, D), becomes the weighted mean of its sequence's removed rows."""
        D = x.shape[1]
        grid = (math.ceil(D / 128), len(stand_in))
        self.launch("merge_rows_i8", grid, 4, x, weights, total_weight, stand_in, cu_seqlens, D)
