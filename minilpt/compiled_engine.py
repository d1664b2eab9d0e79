"""The forward pass by compiled kernels: weights packed once, a batch split into work items, threads, scratch memory.

The layer loop itself is compiled (`kernels/jit/encoder.py`). A sequence's logits are bit for bit the same alone, in any
batch, in any order and with any number of threads. Legend: B sequences, N packed tokens, H heads, D width, F inner
width, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import ragged
from .backends import Backend
from .config import ModelConfig
from .engine import Forward, outcome
from .kernels import blocks, compiled, isa, packing
from .kernels.packing import Packed
from .pruning import KeepRule, Step
from .quantize import Quantized, quantize_rows
from .ragged import TokenBatch
from .threads import Threads

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

ITEM_TOKENS = 1024  # that one thread takes at a time: every item reads all weights once
ZEROS_BYTES = 512  # what sums without a bias start with: one panel's columns, and more
MATRICES = ("query", "key", "value", "attention_output", "inner", "outer")
TEAM_TOKENS = 128  # per thread: smaller batches are computed by all threads together, one panel each


class CompiledEngine:
    """Packed weights, a keep rule and threads. Immutable but for its scratch memory: safe to share between threads."""

    @staticmethod
    def as_stored(config: ModelConfig, precision: str) -> frozenset[str]:
        """Weights that may come as the int8 rows of their file: read so, or packed so."""
        layers = range(config.layers if precision == "int8" else 0)
        matrices = {f"layers.{layer}.{part}.weight" for layer in layers for part in MATRICES}
        return frozenset({"embeddings.word.weight", *matrices})

    def __init__(self, config: ModelConfig, weights: Mapping[str, Any], rule: KeepRule | None, backend: Backend):
        compiled.warm_up()  # here rather than at the first text: it may take half a minute
        self.config, self.backend = config, backend
        self._model = _Model(config, weights, int8=backend.precision == "int8")
        self._threads = Threads(backend.threads)
        self._free: list[_Workspace] = []
        self._set_rule(rule)

    def _set_rule(self, rule: KeepRule | None) -> None:
        self.rule = rule
        steps = [
            rule.step(layer) if rule is not None and rule.active(layer) else Step()
            for layer in range(self.config.layers)
        ]
        self._rule = np.array(steps, blocks.RULE)

    def with_rule(self, rule: KeepRule | None) -> CompiledEngine:
        """The same weights and threads, shared, under another keep rule."""
        engine = copy(self)
        engine._set_rule(rule)
        return engine

    def run(self, batch: TokenBatch, *, trace: bool = False) -> Forward:
        """Classify the batch. With trace the last layer evaluates its rule too, instead of computing row 0 only."""
        B, tokens, threads = len(batch.cu_seqlens) - 1, int(batch.cu_seqlens[-1]), self._threads.count
        if B == 1 or tokens < threads * TEAM_TOKENS:
            items = [_Item(self.config, batch, 0, B, trace)] if B else []
            for item in items:
                self._run_item(item, together=True)
        else:
            count = threads * math.ceil(tokens / (threads * ITEM_TOKENS))
            items = [_Item(self.config, batch, *bounds, trace) for bounds in _split(batch.cu_seqlens, count)]
            self._threads.each(partial(self._run_item, item, together=False) for item in items)
        items = items or [_Item(self.config, batch, 0, 0, trace)]
        logits = np.concatenate([item.logits for item in items])
        lengths = np.concatenate([item.lengths for item in items], axis=2)
        traced = None
        if trace:
            masses = [item.live(item.masses) for item in items]
            kept = [item.live(item.kept) for item in items]
            traced = _by_layer(masses), _by_layer(kept)
        return outcome(self.config, logits, lengths[0], lengths[1], traced)

    def _run_item(self, item: _Item, together: bool) -> None:
        """Fill the item's results, by all threads together or by this one alone."""
        threads = self._threads.count if together else 1
        pruned = bool(item.masses.size or (self._rule["kind"] != blocks.KEEP_ALL).any())
        try:
            workspace = self._free.pop()
        except IndexError:
            workspace = _Workspace()
        batch, work = item.record(self._rule), workspace.record(self._model, item.batch, threads, pruned)

        def part(thread: int, threads: int) -> None:
            places = (block.ctypes.data for block in (self._model.record, batch, work))
            compiled.run(blocks.RUN_FORWARD, *places, thread, threads)

        if together:
            self._threads.together(part)
        else:
            part(0, 1)
        self._free.append(workspace)


class _Item:
    """Some sequences of a batch, and room for their results."""

    def __init__(self, config: ModelConfig, batch: TokenBatch, begin: int, end: int, trace: bool):
        self.batch = _part(batch, begin, end)
        B, N = end - begin, len(self.batch.ids)
        self.logits = np.empty((B, len(config.labels)), np.float32)
        self.lengths = np.empty((2, config.layers, B), np.int32)  # before and after each layer's pruning
        self.masses = np.empty((config.layers, N if trace else 0), np.float32)
        self.kept = np.empty((config.layers, N if trace else 0), np.bool_)
        self._trace, self._bounds = trace, self.batch.cu_seqlens.astype(np.int64)

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
            "first_row_only": not self._trace,
            "logits": self.logits.ctypes.data,
            "n_attention": self.lengths[0].ctypes.data,
            "n_ffn": self.lengths[1].ctypes.data,
            "masses": self.masses.ctypes.data if self._trace else 0,
            "kept": self.kept.ctypes.data if self._trace else 0,
        }
        return np.array([tuple(values[name] for name in blocks.BATCH.names or ())], blocks.BATCH)

    def live(self, traced: NDArray[Any]) -> list[NDArray[Any]]:
        """What a trace, (L, N), holds of each layer's live tokens, (N_l,)."""
        return [row[:n] for row, n in zip(traced, self.lengths[0].sum(axis=1), strict=True)]


def _by_layer(parts: list[list[NDArray[Any]]]) -> list[NDArray[Any]]:
    """Each layer's rows of all items."""
    return [np.concatenate(layer) for layer in zip(*parts, strict=True)]


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


class _Model:
    """All weights as compiled kernels read them. record: one `blocks.MODEL`; the arrays it points to live as long."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Any], *, int8: bool):
        self._weights, self._rung = weights, isa.chosen()
        self._arrays: list[Any] = []
        self.record, self.layers = np.zeros(1, blocks.MODEL), np.zeros(config.layers, blocks.LAYER)
        head_width = compiled.padded(config.width // config.heads)
        self.heads_width = config.heads * head_width
        values: dict[str, Any] = {
            "width": config.width,
            "heads": config.heads,
            "head_width": head_width,
            "layers": config.layers,
            "labels": len(config.labels),
            "embedding_width": config.embedding_width,
            "activation": blocks.ACTIVATIONS[config.activation],
            "head_activation": blocks.ACTIVATIONS[config.head_activation],
            "is_int8": int8,
            "eps": config.eps,
            "head_scale": 1 / math.sqrt(config.width // config.heads),
            **self._word_table(),
            "position": self._table("embeddings.position.weight"),
            "segment": self._table("embeddings.segment.weight") if config.segments else 0,
            "layer": self.layers.ctypes.data,
            "embedding_norm": self._norm("embeddings.norm"),
            "head_dense": self._matrix("head.dense", False),
            "head_out": self._matrix("head.out", False),
        }
        if config.embedding_width != config.width:
            values["project"] = self._matrix("embeddings.project", False)
        for name, value in values.items():
            self.record[name] = value
        for number, layer in enumerate(self.layers):
            at = f"layers.{number}."
            layer["query_key_value"] = self._query_key_value(at, config.heads, head_width, int8)
            layer["attention_output"] = self._attention_output(at, config.heads, head_width, int8)
            layer["attention_norm"], layer["outer_norm"] = (
                self._norm(f"{at}attention_norm"),
                self._norm(f"{at}outer_norm"),
            )
            layer["inner"], layer["outer"] = self._matrix(f"{at}inner", int8), self._matrix(f"{at}outer", int8)
        del self._weights  # packed: the originals may go

    def _keep(self, array: NDArray[Any]) -> int:
        """The array's address, for as long as this model lives."""
        self._arrays.append(array)
        return array.ctypes.data

    def _table(self, name: str) -> int:
        return self._keep(np.ascontiguousarray(self._weights[name]))

    def _word_table(self) -> dict[str, int]:
        """As it is stored: int8 rows are widened when they are looked up, and the others are never read."""
        table = self._weights["embeddings.word.weight"]
        if isinstance(table, Quantized):
            return {"word": self._keep(table.rows), "word_scale": self._keep(table.scale)}
        return {"word": self._keep(np.ascontiguousarray(table))}

    def _norm(self, name: str) -> tuple[int, int]:
        return self._table(f"{name}.weight"), self._table(f"{name}.bias")

    def _matrix(self, name: str, int8: bool) -> np.void:
        return self._packed(self._weight(name, int8), self._weights[f"{name}.bias"])

    def _packed(self, weight: Float32 | Quantized, bias: Float32) -> np.void:
        pack = partial(packing.pack_int8, *weight) if isinstance(weight, Quantized) else partial(packing.pack, weight)
        packed: Packed = pack(bias, self._rung)
        self._arrays.append(packed)
        return packed.record()

    def _weight(self, name: str, int8: bool) -> Any:
        """Float32, or Quantized."""
        weight = self._weights[f"{name}.weight"]
        return quantize_rows(weight) if int8 and not isinstance(weight, Quantized) else weight

    def _query_key_value(self, at: str, heads: int, head_width: int, int8: bool) -> np.void:
        """The three products of the same rows as one. Each begins with a panel, and each head with a vector."""
        part = compiled.padded(heads * head_width, self._rung.columns)

        def stacked(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
            """(D, K) or (D,) three times to (3 * part, K) or (3 * part,), each head's rows padded with zeros."""
            out = np.zeros((3, part, *arrays[0].shape[1:]), arrays[0].dtype)
            for place, array in enumerate(arrays):
                found = _by_head(array.reshape(len(array), -1), heads, head_width)
                out[place, : len(found)] = found.reshape(len(found), *array.shape[1:])
            return out.reshape(3 * part, *out.shape[2:])

        names = [f"{at}{name}" for name in ("query", "key", "value")]
        weights, bias = [self._weight(name, int8) for name in names], [self._weights[f"{name}.bias"] for name in names]
        weight = Quantized(*map(stacked, zip(*weights, strict=True))) if int8 else stacked(weights)
        return self._packed(weight, stacked(bias))

    def _attention_output(self, at: str, heads: int, head_width: int, int8: bool) -> np.void:
        def padded(rows: NDArray[Any]) -> NDArray[Any]:
            return np.ascontiguousarray(_by_head(np.ascontiguousarray(rows.T), heads, head_width).T)

        weight = self._weight(f"{at}attention_output", int8)
        weight = weight._replace(rows=padded(weight.rows)) if isinstance(weight, Quantized) else padded(weight)
        return self._packed(weight, self._weights[f"{at}attention_output.bias"])


def _by_head(rows: NDArray[Any], heads: int, head_width: int) -> NDArray[Any]:
    """(D, K) rows of H heads, each head's D/H padded with zeros: (H * head_width, K)."""
    D, K = rows.shape
    if heads * head_width == D:
        return rows
    out = np.zeros((heads, head_width, K), rows.dtype)
    out[:, : D // heads] = rows.reshape(heads, D // heads, K)
    return out.reshape(-1, K)


class _Workspace:
    """Scratch memory that grows to the largest work item so far and is used again."""

    def __init__(self) -> None:
        self._memory, self._used = compiled.aligned(0), 0
        self._shape: tuple[int, int, int, int, bool] | None = None  # that self._work is laid out for
        self._work = np.zeros(0, blocks.WORK)

    def record(self, model: _Model, batch: TokenBatch, threads: int, pruned: bool) -> NDArray[np.void]:
        """One `blocks.WORK` for this batch. pruned: probabilities of whole sequences are kept."""
        lengths = ragged.lengths(batch.cu_seqlens)
        shape = len(batch.ids), len(lengths), int(lengths.max()), threads, pruned
        while shape != self._shape:
            self._used, base = 0, self._memory.ctypes.data
            self._work = self._laid_out(model, base, *shape)
            if self._used <= len(self._memory):
                self._memory[: ZEROS_BYTES + 2 * compiled.ALIGNMENT] = 0
                self._shape = shape
            else:
                self._memory = compiled.aligned(self._used)
        return self._work

    def _laid_out(
        self, model: _Model, base: int, N: int, B: int, longest: int, threads: int, pruned: bool
    ) -> NDArray[np.void]:
        shape = model.record[0]
        columns, heads, head_width = isa.chosen().columns, int(shape["heads"]), int(shape["head_width"])
        width, wide = int(shape["width"]), compiled.padded(heads * head_width, columns)
        chunk = max(blocks.CHUNK, longest)
        rows = max(chunk, B)
        inner = max(int(model.layers["inner"]["outputs"].max(initial=0)), width, int(shape["embedding_width"]))
        widest = compiled.padded(max(width, wide, int(shape["labels"])), columns)

        def take(size: int) -> int:
            place = base + self._used
            self._used += compiled.padded(size, compiled.ALIGNMENT)
            return place

        def take_rows(count: int, width: int) -> tuple[int, ...]:
            floats, integers = 4 * compiled.padded(width, columns), isa.chosen().item_bytes * compiled.padded(width)
            return (take(count * floats), floats, take(count * integers), integers, take(4 * count))

        work = np.zeros(1, blocks.WORK)
        values: dict[str, Any] = {
            "zeros": take(ZEROS_BYTES),
            "barrier": take(2 * compiled.ALIGNMENT),
            "yield_core": compiled.yield_address(),
            "chunk": blocks.CHUNK,
            "x": take_rows(N, width),
            "first": take_rows(B, width),
            "context": take_rows(rows, heads * head_width),
            "attended": take_rows(rows, width),
            "hidden": take_rows(blocks.ROWS_OF_BLOCK, inner),
            "query_key_value": take(chunk * 3 * 4 * wide),
            "query_key_value_stride": 3 * 4 * wide,
            "room": take(rows * 4 * widest),
            "room_stride": 4 * widest,
        }
        stride = compiled.probs_stride_bytes(longest)
        kept_rows = max(longest, blocks.QUERIES) if pruned else blocks.QUERIES
        keys = 4 * compiled.padded(longest, columns) * head_width
        for name, each, count in (
            ("probs", stride * kept_rows, heads),
            ("received", stride, 2 * heads),
            ("local", keys + 4 * longest * head_width + 16 * (B + 1) + 8 * rows + 4 * longest, threads),
        ):
            values[f"{name}_bytes"] = compiled.padded(each, compiled.ALIGNMENT)
            values[name] = take(values[f"{name}_bytes"] * count)
        for name, value in values.items():
            work[name] = value
        take(4 * columns)  # the last row's vectors may be read beyond its end
        return work
