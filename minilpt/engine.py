"""What every engine takes and gives: a ragged batch in, pruned rows really removed, the record of the run out.

Engines compute what `reference.py` specifies. Legend: B sequences, N packed tokens, H heads, D width, F inner width,
L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from . import pruning
from .backends import Backend
from .config import ModelConfig
from .footprint import Load, Needs
from .pruning import KeepRule
from .ragged import TokenBatch

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Kept = NDArray[np.bool_]
Traced = tuple[list[Float32], list[Kept]]  # of every layer, see Forward


@dataclass(frozen=True)
class Forward:
    """What a forward pass gives for B sequences.

    logits: (B, labels) float32. kept_tokens: (L, B) int32, the rows that each layer's feed-forward computed; without
    trace the last layer computes the first row only. executed_flops, dense_flops: (B,) int64.
    With trace only, else None: attention_lengths and ffn_lengths, (L, B) int32, live tokens before and after each
    layer's pruning; counted_flops, (B,) int64, as the paper counts; masses and kept, for each layer (N_l,) float32 and
    bool over its N_l = attention_lengths[l].sum() live tokens, sequence after sequence: the attention that each token
    receives, summed over queries and averaged over heads, and whether it stays. Where a rule merges what it removes,
    one row more goes on, in the place of the first removed token: ffn_lengths count it. entering: rows that enter some
    layers, (N_l, D) float32 each, by layer, if they were asked for.
    """

    logits: Float32
    kept_tokens: Int32
    executed_flops: Int64
    dense_flops: Int64
    attention_lengths: Int32 | None = None
    ffn_lengths: Int32 | None = None
    counted_flops: Int64 | None = None
    masses: tuple[Float32, ...] | None = None
    kept: tuple[Kept, ...] | None = None
    entering: Mapping[int, Float32] | None = None


class Prefix(NamedTuple):
    """The first layers of a run, which another one of the same batch, under a rule that is the same there, need not do.

    run: with trace; its `entering` holds the rows of layer number `layers`.
    """

    run: Forward
    layers: int


class LastRows(NamedTuple):
    """What the last layer gives for B sequences: rows (N', D) float32, and their cu_seqlens, (B + 1,) int32."""

    rows: Float32
    cu_seqlens: Int32


class Engine(Protocol):
    """A model's weights and a keep rule, ready to run. Safe to share between threads."""

    config: ModelConfig
    backend: Backend
    rule: KeepRule | None

    def with_rule(self, rule: KeepRule | None) -> Engine:
        """The same weights, shared, under another keep rule."""

    def run(
        self,
        batch: TokenBatch,
        *,
        trace: bool = False,
        entering: Sequence[int] = (),
        prefix: Prefix | None = None,
    ) -> Forward:
        """Classify the batch. With trace the last layer evaluates its rule too, instead of computing row 0 only.

        entering: layers whose rows the record shall hold, of which an engine may leave out any. prefix: what is not run
        again; the record is, bit for bit, that of a whole run, in its FLOPs too.
        """

    def last_rows(self, batch: TokenBatch, *, first_only: bool) -> LastRows:
        """Run the layers without the head: the rows that the last one's rule keeps, or row 0 of each sequence only."""

    def needs(self, load: Load) -> Needs:
        """The memory for it. Raises BackendError where that is not the host's."""

    def close(self) -> None:
        """End its threads and free its scratch memory. They come again if it is used again."""


def outcome(
    config: ModelConfig,
    logits: Float32,
    n_attention: Int32,
    n_ffn: Int32,
    traced: Traced | None,
    entering: Mapping[int, Float32] | None = None,
) -> Forward:
    """The record of a run. n_attention, n_ffn: (L, B) int32, live tokens before and after each layer's pruning.

    traced: None for a run without trace; entering: see `Forward`.
    """
    executed = pruning.executed_flops(config, n_attention, n_ffn, first_row_only=traced is None)
    dense = pruning.dense_flops(config, n_attention[0])
    if traced is None:
        return Forward(logits, n_ffn, executed, dense, entering=entering)
    counted = pruning.counted_flops(config, n_attention, n_ffn)
    masses, kept = traced
    return Forward(logits, n_ffn, executed, dense, n_attention, n_ffn, counted, tuple(masses), tuple(kept), entering)
