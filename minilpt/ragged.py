"""The one batch representation: packed rows and their boundaries. No padding, no mask.

Legend of the package: B sequences, N packed tokens, H heads, D width, F inner width, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]


@dataclass(frozen=True)
class TokenBatch:
    """B sequences, packed. ids, positions, segments: (N,) int32; cu_seqlens: (B + 1,) int32, from 0 to N."""

    ids: Int32
    positions: Int32
    segments: Int32
    cu_seqlens: Int32


def boundaries(lengths: Sequence[int] | NDArray[np.integer]) -> Int32:
    """cu_seqlens, (B + 1,) int32, of sequences with these lengths."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def lengths(cu_seqlens: Int32) -> Int32:
    """Tokens in each sequence, (B,) int32."""
    return np.diff(cu_seqlens)


def positions(ids: Int32, *, offset: int, pad_token_id: int) -> Int32:
    """Rows of the position table for one sequence, (n,) int32.

    Families that count from 0 number the tokens plainly. RoBERTa's count from offset = pad id + 1, give a literal pad
    token the row pad_token_id and do not count it (create_position_ids_from_input_ids in modeling_roberta.py).
    """
    if offset == 0:
        return np.arange(len(ids), dtype=np.int32)
    real = ids != pad_token_id
    return np.where(real, np.cumsum(real) + offset - 1, pad_token_id).astype(np.int32)


def packed_positions(ids: Int32, cu_seqlens: Int32, *, offset: int, pad_token_id: int) -> Int32:
    """`positions` of every sequence of a batch, (N,) int32."""
    n = lengths(cu_seqlens)
    if offset == 0:
        return np.arange(len(ids), dtype=np.int32) - np.repeat(cu_seqlens[:-1], n)
    real = ids != pad_token_id
    counted = np.concatenate([[0], np.cumsum(real)])
    before = np.repeat(counted[cu_seqlens[:-1]], n)
    return np.where(real, counted[1:] - before + offset - 1, pad_token_id).astype(np.int32)


def compact(keep: NDArray[np.bool_], cu_seqlens: Int32) -> tuple[NDArray[np.intp], Int32]:
    """Indices of the kept rows, (N',), and the boundaries of the smaller batch, (B + 1,) int32. keep: (N,) bool."""
    kept_before = np.concatenate([[0], np.cumsum(keep)])
    return np.flatnonzero(keep), kept_before[cu_seqlens].astype(np.int32)
