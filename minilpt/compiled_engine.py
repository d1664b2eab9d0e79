"""The forward pass by compiled kernels: weights packed once, a batch split into work items, threads, scratch memory.

The layer loop itself is compiled (`kernels/jit/encoder.py`, `integer_encoder.py`); a `Program` knows its weights. A
sequence's logits are bit for bit the same alone, in any batch, in any order and with any number of threads. Legend: B
sequences, N packed tokens, H heads, D width, F inner width, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from . import ragged
from .backends import Backend
from .config import ModelConfig
from .engine import Forward, LastRows, Prefix, Traced, outcome
from .footprint import Held, Load, Needs
from .kernels import blocks, compiled, packing
from .pruning import KeepRule
from .ragged import TokenBatch
from .threads import Threads

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

ITEM_TOKENS = 1024  # that one thread takes at a time: every item reads all weights once
ZEROS_BYTES = 512  # what sums without a bias start with: one panel's columns, and more
TEAM_TOKENS = 128  # per thread: smaller batches are computed by all threads together, one panel each

SHORTEST = 2  # tokens: a text without any has its special ones
BATCH_BYTES = 32  # of a token outside the workspace: ids, positions and segments, in the batch and in an item


class Shape(NamedTuple):
    """Of a batch, as far as scratch memory goes. pruned: probabilities of whole sequences are kept."""

    tokens: int
    sequences: int
    longest: int
    threads: int
    pruned: bool


class Rules(NamedTuple):
    """A record of `blocks` for each layer, and what the records point to."""

    records: NDArray[np.void]
    counts: NDArray[np.int32] | None = None


class Wanted(NamedTuple):
    """Of a run. first_row_only: of the last layer; rows: that layer's, instead of logits; the rest as `Engine.run`."""

    first_row_only: bool
    trace: bool = False
    rows: bool = False
    entering: Sequence[int] = ()
    prefix: Prefix | None = None


class Program(Protocol):
    """A model's weights for one part of the compiled kernels, and how to talk to them.

    record: the model's, of `blocks`. operation: the forward pass. logits_type, masses_type: of its results.
    last_width: D where `logits` wants the rows that the head reads, else 0. keeps_rows: whether the operation gives the
    rows that enter a layer, and takes them up.
    """

    part: str
    operation: int
    record: NDArray[np.void]
    logits_type: np.dtype[Any]
    masses_type: np.dtype[Any]
    last_width: int
    keeps_rows: bool

    def rules(self, rule: KeepRule | None) -> Rules:
        """A record for each layer."""

    def work(self, memory: Memory, shape: Shape) -> NDArray[np.void]:
        """The record of the scratch memory for batches of this shape."""

    def logits(self, raw: NDArray[Any], last: NDArray[np.int32]) -> Float32:
        """(B, labels) float32 of the kernels' results; last: (B, last_width)."""

    def held(self) -> Held:
        """All of its arrays."""

    def masses(self, raw: NDArray[Any]) -> Float32:
        """(n,) float32, summing to n, of the kernels' results."""


class CompiledEngine:
    """Packed weights, a keep rule and threads. Immutable but for its scratch memory: safe to share between threads."""

    def __init__(self, config: ModelConfig, program: Program, rule: KeepRule | None, backend: Backend):
        compiled.entry(program.part)  # here rather than at the first text: it may take half a minute
        self.config, self.backend = config, backend
        self.program = program
        self._threads = Threads(backend.threads)
        self._free: list[_Workspace] = []
        self._set_rule(rule)

    def _set_rule(self, rule: KeepRule | None) -> None:
        self.rule, self._rules = rule, self.program.rules(rule)

    def with_rule(self, rule: KeepRule | None) -> CompiledEngine:
        """The same weights and threads, shared, under another keep rule."""
        engine = copy(self)
        engine._set_rule(rule)
        return engine

    def with_program(self, program: Program) -> CompiledEngine:
        """Other weights of the same shape, with the same rule and threads."""
        engine = copy(self)
        engine.program = program
        engine._set_rule(self.rule)
        return engine

    def run(
        self,
        batch: TokenBatch,
        *,
        trace: bool = False,
        entering: Sequence[int] = (),
        prefix: Prefix | None = None,
    ) -> Forward:
        """Classify the batch. With trace the last layer evaluates its rule too, instead of computing row 0 only.

        entering, prefix: see `Engine.run`.
        """
        begin = prefix.layers if prefix else 0
        here = [layer for layer in entering if layer >= begin] if self.program.keeps_rows else []
        items = self._run_items(batch, Wanted(not trace, trace, entering=here, prefix=prefix))
        raw, last = (np.concatenate([getattr(item, name) for item in items]) for name in ("logits", "last"))
        logits = self.program.logits(raw, last)
        lengths = np.concatenate([item.lengths for item in items], axis=2)
        traced: Traced | None = None
        if trace:
            masses = [[self.program.masses(row) for row in item.live(item.masses)] for item in items]
            kept = [item.live(item.kept) for item in items]
            traced = _by_layer(masses), _by_layer(kept)
        rows = {layer: np.concatenate([item.entered(layer) for item in items]) for layer in here}
        if prefix is not None:
            rows |= {layer: found for layer, found in (prefix.run.entering or {}).items() if layer < begin}
            traced = traced and _after(prefix, traced)
        return outcome(self.config, logits, lengths[0], lengths[1], traced, rows)

    def last_rows(self, batch: TokenBatch, *, first_only: bool) -> LastRows:
        """Run the layers without the head: the rows that the last one's rule keeps, or row 0 of each sequence only."""
        items = self._run_items(batch, Wanted(first_row_only=first_only, rows=True))
        lengths = [item.lengths[1, -1] for item in items]  # (B of the item,) each
        rows = [item.rows[: n.sum()] for item, n in zip(items, lengths, strict=True)]
        return LastRows(np.concatenate(rows), ragged.boundaries(np.concatenate(lengths)))

    def needs(self, load: Load) -> Needs:
        """A workspace for each thread of the team and one for every further caller, each grown to the largest."""
        threads, pruned = self._threads.count, self._prunes()
        team = max(load.longest, min(load.tokens, threads * TEAM_TOKENS))
        item = min(load.tokens, load.longest + load.tokens // self._item_count(load.tokens))
        sizes = []
        for tokens, workers in ((team, threads), (item, 1)):
            memory = Memory(0)  # laid out, never touched
            self.program.work(memory, Shape(tokens, tokens // SHORTEST, load.longest, workers, pruned))
            sizes.append(memory.used)
        scratch = (threads + load.callers - 1) * max(sizes) + load.callers * load.tokens * BATCH_BYTES
        return Needs(self.program.held(), scratch, sum(each.size_bytes for each in self._free))

    def close(self) -> None:
        """End the threads and free the scratch memory. They come again if the engine is used again."""
        self._threads.close()
        self._free.clear()

    def _item_count(self, tokens: int) -> int:
        """Into how many items the threads divide a batch."""
        return self._threads.count * math.ceil(tokens / (self._threads.count * ITEM_TOKENS))

    def _prunes(self) -> bool:
        """Whether any layer has a rule."""
        return bool((self._rules.records["kind"] != blocks.KEEP_ALL).any())

    def _run_items(self, batch: TokenBatch, wanted: Wanted) -> list[_Item]:
        """The batch as work items, in order, one at least, with their results."""

        def item(begin: int, end: int) -> _Item:
            return _Item(self.config, self.program, batch, begin, end, wanted)

        B, tokens, threads = len(batch.cu_seqlens) - 1, int(batch.cu_seqlens[-1]), self._threads.count
        if B == 0:
            return [item(0, 0)]
        if B == 1 or tokens < threads * TEAM_TOKENS:
            items = [item(0, B)]
            self._run_item(items[0], together=True)
        else:
            items = [item(*bounds) for bounds in _split(batch.cu_seqlens, self._item_count(tokens))]
            self._threads.each(partial(self._run_item, item, together=False) for item in items)
        return items

    def _run_item(self, item: _Item, together: bool) -> None:
        """Fill the item's results, by all threads together or by this one alone."""
        threads = self._threads.count if together else 1
        pruned = bool(item.masses.size or self._prunes())
        try:
            workspace = self._free.pop()
        except IndexError:
            workspace = _Workspace()
        batch, work = item.record(self._rules.records), workspace.record(self.program, item.batch, threads, pruned)
        memory = self, item, batch, workspace, work  # in use to the end, even if an interrupt takes this frame away

        def part(thread: int, threads: int) -> Callable[[], None]:
            places = (block.ctypes.data for block in (self.program.record, batch, work))
            return compiled.prepared(self.program.operation, *places, thread, threads, memory=memory)

        if together:
            self._threads.together(part)
        else:
            part(0, 1)()
        self._free.append(workspace)


class _Item:
    """Some sequences of a batch, and room for their results."""

    def __init__(self, config: ModelConfig, program: Program, batch: TokenBatch, begin: int, end: int, wanted: Wanted):
        self.batch = _part(batch, begin, end)
        B, N, trace = end - begin, len(self.batch.ids), wanted.trace
        self.logits = np.empty((B, 0 if wanted.rows else len(config.labels)), program.logits_type)
        self.rows = np.empty(((B if wanted.first_row_only else N) if wanted.rows else 0, config.width), np.float32)
        self.last = np.empty((B, program.last_width), np.int32)
        self.lengths = np.empty((2, config.layers, B), np.int32)  # before and after each layer's pruning
        self.masses = np.empty((config.layers, N if trace else 0), program.masses_type)
        self.kept = np.empty((config.layers, N if trace else 0), np.bool_)
        self._first_row_only, self._bounds = wanted.first_row_only, self.batch.cu_seqlens.astype(np.int64)
        self._begin = 0
        self._begin_rows, self._begin_bounds = np.empty((0, config.width), np.float32), self._bounds
        if wanted.prefix is not None:
            self._take_up(*wanted.prefix, begin, end)
        self._entering = {layer: np.empty((N, config.width), np.float32) for layer in wanted.entering}
        addresses = [_place(self._entering[at]) if at in self._entering else 0 for at in range(config.layers)]
        self._entering_addresses = np.array(addresses if self._entering else [], np.int64)

    def _take_up(self, run: Forward, layers: int, begin: int, end: int) -> None:
        """What an earlier run found of sequences begin to end."""
        assert run.entering is not None and run.attention_lengths is not None and run.ffn_lengths is not None
        bounds = ragged.boundaries(run.attention_lengths[layers])
        self.lengths[:, :layers] = run.attention_lengths[:layers, begin:end], run.ffn_lengths[:layers, begin:end]
        self._begin, self._begin_rows = layers, run.entering[layers][bounds[begin] : bounds[end]]
        self._begin_bounds = (bounds[begin : end + 1] - bounds[begin]).astype(np.int64)

    def entered(self, layer: int) -> Float32:
        """The rows that entered the layer."""
        return self._entering[layer][: self.lengths[0, layer].sum()]

    def record(self, rule: NDArray[np.void]) -> NDArray[np.void]:
        """One `blocks.BATCH`, which must not outlive this item and the rule."""
        lengths = ragged.lengths(self.batch.cu_seqlens)
        values: dict[str, Any] = {
            "sequences": len(lengths),
            "tokens": len(self.batch.ids),
            "longest": int(lengths.max()),
            "ids": self.batch.ids.ctypes.data,
            "positions": self.batch.positions.ctypes.data,
            "segments": self.batch.segments.ctypes.data,
            "cu_seqlens": self._bounds.ctypes.data,
            "rule": rule.ctypes.data,
            "first_row_only": self._first_row_only,
            "logits": _place(self.logits),
            "rows": _place(self.rows),
            "last": _place(self.last),
            "n_attention": self.lengths[0].ctypes.data,
            "n_ffn": self.lengths[1].ctypes.data,
            "masses": _place(self.masses),
            "kept": _place(self.kept),
            "entering": _place(self._entering_addresses),
            "begin": self._begin,
            "begin_rows": _place(self._begin_rows),
            "begin_bounds": self._begin_bounds.ctypes.data,
        }
        return filled(blocks.BATCH, values)

    def live(self, traced: NDArray[Any]) -> list[NDArray[Any]]:
        """What a trace, (L, N), holds of each layer's live tokens, (N_l,)."""
        return [row[:n] for row, n in zip(traced, self.lengths[0].sum(axis=1), strict=True)]


def _place(results: NDArray[Any]) -> int:
    """The address of results, or 0 where none are wanted."""
    return results.ctypes.data if results.size else 0


def _by_layer(parts: list[list[NDArray[Any]]]) -> list[NDArray[Any]]:
    """Each layer's rows of all items."""
    return [np.concatenate(layer) for layer in zip(*parts, strict=True)]


def _after(prefix: Prefix, traced: Traced) -> Traced:
    """A trace with what the prefix says of the layers that were not run."""
    run, layers = prefix
    assert run.masses is not None and run.kept is not None
    return [*run.masses[:layers], *traced[0][layers:]], [*run.kept[:layers], *traced[1][layers:]]


def _part(batch: TokenBatch, begin: int, end: int) -> TokenBatch:
    """Sequences begin to end of the batch."""
    bounds = batch.cu_seqlens[begin : end + 1]
    rows = slice(bounds[0], bounds[-1])
    ids, positions, segments = (np.ascontiguousarray(a[rows]) for a in (batch.ids, batch.positions, batch.segments))
    return TokenBatch(ids, positions, segments, bounds - bounds[0])


def _split(cu_seqlens: Int32, items: int) -> list[tuple[int, int]]:
    """Runs of sequences, (begin, end), of about equal numbers of tokens; at most `items`, none of them empty."""
    targets = np.linspace(0, cu_seqlens[-1], items + 1)
    edges = np.unique(np.searchsorted(cu_seqlens, targets))
    return list(pairwise(edges.tolist()))


def filled(dtype: np.dtype[np.void], values: Mapping[str, Any]) -> NDArray[np.void]:
    """One record of `blocks` with all of its fields."""
    return np.array([tuple(values[name] for name in dtype.names or ())], dtype)


class Memory:
    """Hands out places from an address on, one after another, each at the start of a cache line."""

    def __init__(self, base: int):
        self._base, self.used = base, 0

    def take(self, size: int) -> int:
        """The address of `size` bytes."""
        place = self._base + self.used
        self.used += compiled.padded(size, packing.ALIGNMENT)
        return place

    def each(self, name: str, size: int, count: int) -> dict[str, int]:
        """`count` places of `size` bytes: the first one's address, and how far apart they are."""
        size = compiled.padded(size, packing.ALIGNMENT)
        return {name: self.take(size * count), f"{name}_bytes": size}

    def common(self) -> dict[str, int]:
        """What every batch needs; the zeros and the barrier come first, see `_Workspace.record`."""
        return {
            "zeros": self.take(ZEROS_BYTES),
            "barrier": self.take(2 * packing.ALIGNMENT),
            "yield_core": compiled.yield_address(),
            "chunk": blocks.CHUNK,
        }


class _Workspace:
    """Scratch memory that grows to the largest work item so far and is used again."""

    def __init__(self) -> None:
        self._memory = packing.aligned(0)
        self._shape: Shape | None = None  # that self._work is laid out for
        self._work = np.zeros(0, blocks.WORK)

    @property
    def size_bytes(self) -> int:
        """So far."""
        return len(self._memory)

    def record(self, program: Program, batch: TokenBatch, threads: int, pruned: bool) -> NDArray[np.void]:
        """The program's record for this batch."""
        lengths = ragged.lengths(batch.cu_seqlens)
        shape = Shape(len(batch.ids), len(lengths), int(lengths.max()), threads, pruned)
        while shape != self._shape:
            memory = Memory(self._memory.ctypes.data)
            self._work = program.work(memory, shape)
            if memory.used <= len(self._memory):
                self._memory[: ZEROS_BYTES + 2 * packing.ALIGNMENT] = 0
                self._shape = shape
            else:
                self._memory = packing.aligned(memory.used)
        return self._work
