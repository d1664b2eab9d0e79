"""The forward pass on a GPU: the same ragged batch, rows really removed on the device.

A `CudaProgram` knows the weights and the arithmetic (`cuda_float`, `cuda_integer`); the loop here knows which rows are
alive. Legend: B sequences, N packed tokens, H heads, D width, L layers, Z blocks of 64 queries.

The card is the one that was CuPy's current one when the model was loaded; a run makes it the current one of its thread,
whichever that was. Every run has a stream to itself, so that threads that share a model do not wait for each other's
work, and ends when its results are on the host; nothing passes from one run to another, and the weights do not change.
Streams are used again: CuPy keeps freed memory for the stream that it was allocated on.

Within a run the host waits once for each layer that a rule by masses is active in: the next products are started with
the number of rows that go on, and the alternative, products over the rows before pruning, would save nothing. A layer
without a rule, and a rule by counts, which lengths alone decide, are not waited for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from . import ragged
from .backends import Backend
from .config import ModelConfig
from .cuda_device import CudaDevice, compile_kernels, loading, out_of_memory
from .engine import Forward, LastRows, Prefix, outcome
from .errors import BackendError, InputError
from .footprint import Load, Needs
from .kernels import blocks
from .kernels.cuda import MOST_WIDTH, QUERIES, Array, Kernels
from .pruning import KeepRule, Step
from .ragged import TokenBatch

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

MOST_SEQUENCES = 65535  # blocks of a grid's second and third dimension, which stand for sequences

ON_THE_CPU = 'use device="cpu"'


class LayerRule(NamedTuple):
    """A layer's step, and for integers its threshold and its counts by length, on the device."""

    step: Step = Step()
    lowest: int = 0
    counts: Array = None

    @property
    def kind(self) -> int:
        return self.step.kind

    @property
    def denominator(self) -> int:
        return self.step.denominator

    @property
    def limit(self) -> int:
        return self.step.limit


class Rows(NamedTuple):
    """Live rows of B sequences: bounds, (B + 1,) int32 on the device, and of the longest one the length."""

    cu_seqlens: Array
    longest: int


class Removed(NamedTuple):
    """How removed rows are merged. weights: as the program has them; goes_on: (N,) uint8; stand_in: (B,) int32."""

    weights: tuple[Array, ...]
    goes_on: Array
    stand_in: Array


class CudaProgram(Protocol):
    """A model's weights on a device and its arithmetic, on the current stream. Rows are (N, D) of `row_type`."""

    row_type: Any
    mass_type: Any
    longest_text: int

    @property
    def kernels(self) -> Kernels:
        """Of the device."""

    def rules(self, rule: KeepRule | None) -> list[LayerRule]:
        """One for each layer."""

    def running(self) -> AbstractContextManager[None]:
        """Around a run: what its libraries are told for this thread."""

    def embed(self, tokens: tuple[Array, Array, Array]) -> Array:
        """ids, positions, segments, (N,) int32, to (N, D)."""

    def project(self, layer: int, x: Array) -> Array:
        """Queries, keys and values side by side, (N, 3 D)."""

    def project_last(self, first: Array, x: Array) -> tuple[Array, Array]:
        """The last layer's queries of first rows, (B, D), and keys and values of all, (N, 2 D)."""

    def received(self, layer: int, qkv: Array, rows: Rows, mass_zhn: Array) -> None:
        """Partial masses, (Z, H, N)."""

    def keep(
        self, rule: LayerRule, mass_zhn: Array, rows: Rows, initial: Array, mass: Array, kept: Array, counts: Array
    ) -> None:
        """Masses and kept flags, (N,), and how many stay, (B,)."""

    def removed(self, mass: Array, kept: Array, rows: Rows, counts: Array) -> Removed:
        """How the removed rows of a rule that merges go on as one, which counts then include."""

    def merge_rows(self, x: Array, removed: Removed, rows: Rows) -> None:
        """In place: the row that stands for the removed ones."""

    def merged_context(
        self, layer: int, qkv: Array, rows: Rows, removed: Removed, rank: Array, probs_zhn: Array, context: Array
    ) -> None:
        """The context of the row that stands for removed ones. probs_zhn: room, (Z, H, N)."""

    def context(
        self, layer: int, q: tuple[Array, Array, Rows], kv: tuple[Array, int, int], rows: Rows, context: Array
    ) -> None:
        """Attention of the queries that go on. q: the array, the rows, (N',), and their bounds."""

    def rest_of_layer(self, layer: int, x: Array, places: Array, identity: Array, context: Array) -> Array:
        """Output projection, feed-forward, and the two residual norms: (N', D). identity: (N',), 0 and up."""

    def gather(self, x: Array, places: Array) -> Array:
        """x[places]."""

    def classify(self, first: Array) -> Array:
        """What `logits` makes logits of, (B, labels)."""

    def logits(self, raw: NDArray[Any]) -> Float32:
        """(B, labels)."""

    def masses(self, raw: NDArray[Any]) -> Float32:
        """(n,), averaged over heads."""

    def floats(self, rows: NDArray[Any]) -> Float32:
        """(N, D) of the last layer's rows."""


def check_fits(config: ModelConfig, longest_text: int) -> None:
    """BackendError for a model that the kernels do not hold. longest_text: the most tokens that they do."""
    widest, head = max(config.width, config.embedding_width), config.width // config.heads
    if widest > MOST_WIDTH:
        raise BackendError(
            f"rows of {widest} columns are wider than the {MOST_WIDTH} of the CUDA kernels; {ON_THE_CPU}"
        )
    if longest_text < 1:
        raise BackendError(f"heads of {head} columns are wider than the CUDA kernels hold; {ON_THE_CPU}")


class CudaEngine:
    """A program, a keep rule, and the layer loop. Immutable: safe to share between threads."""

    def __init__(
        self, config: ModelConfig, program: CudaProgram, rule: KeepRule | None, backend: Backend, device: CudaDevice
    ):
        """BackendError where the card cannot hold or compile it."""
        self.config, self.backend, self._program = config, backend, program
        self._device, self._cp = device, device.cp
        self._streams: list[Any] = []  # that no run has at the moment
        compile_kernels(program.kernels, device)  # here rather than at the first text: it takes seconds
        with loading(device) as card:
            self._set_rule(rule)
            card.synchronize()  # the weights are there: other streams do not wait for this one

    def _set_rule(self, rule: KeepRule | None) -> None:
        self.rule, self._rules = rule, self._program.rules(rule)

    def check_every_text(self) -> None:
        """BackendError where the model takes texts that the kernels do not hold."""
        most, wanted = self._program.longest_text, self.config.max_tokens
        if wanted > most:
            raise BackendError(f"the model takes texts of {wanted} tokens, the CUDA kernels hold {most}; {ON_THE_CPU}")

    def with_rule(self, rule: KeepRule | None) -> CudaEngine:
        """The same weights, shared, under another keep rule."""
        engine = copy(self)
        with loading(self._device) as card:
            engine._set_rule(rule)
            card.synchronize()
        return engine

    def run(
        self,
        batch: TokenBatch,
        *,
        trace: bool = False,
        entering: Sequence[int] = (),
        prefix: Prefix | None = None,
    ) -> Forward:
        """Classify the batch: logits (B, labels) float32, lengths and FLOPs, as `Forward` has them.

        With trace the last layer evaluates its rule too, instead of computing row 0 only, and masses and kept tokens of
        all layers come along. entering, prefix: see `Engine.run`; no rows are kept, so there is nothing to take up.
        InputError for a text whose attention does not fit in a block's shared memory, and for more than MOST_SEQUENCES;
        BackendError where the card's memory does not hold the batch.
        """
        if not len(batch.ids):
            return _nothing(self.config, trace)
        with self._run(batch, first_row_only=not trace, trace=trace) as run:
            return run.forward()

    def last_rows(self, batch: TokenBatch, *, first_only: bool) -> LastRows:
        """Run the layers without the head: the rows that go on behind the last one, (N', D) float32, and their bounds.

        With first_only the last layer computes row 0 of each sequence only, and N' = B. Raises what `run` raises.
        """
        if not len(batch.ids):
            return LastRows(np.zeros((0, self.config.width), np.float32), batch.cu_seqlens)
        with self._run(batch, first_row_only=first_only, trace=False) as run:
            return run.last_rows()

    def needs(self, load: Load) -> Needs:
        """Raises BackendError: most of it is the card's."""
        raise BackendError("memory() tells the host's memory, for device \"cpu\"; nvidia-smi tells a card's")

    def close(self) -> None:
        """Nothing to end: CuPy keeps the card's memory for all engines."""

    @contextmanager
    def _run(self, batch: TokenBatch, *, first_row_only: bool, trace: bool) -> Iterator[_Run]:
        """The batch, on a stream that no other run has."""
        longest, most, B = ragged.lengths(batch.cu_seqlens).max(), self._program.longest_text, len(batch.cu_seqlens) - 1
        if B > MOST_SEQUENCES:
            raise InputError(f"a batch has {B} sequences; the CUDA kernels take {MOST_SEQUENCES}: use smaller batches")
        if longest > most:
            raise InputError(f"a text has {longest} tokens; the CUDA kernels hold {most}: {ON_THE_CPU}")
        try:
            with self._cp.cuda.Device(self._device.ordinal), self._stream(), self._program.running():
                yield _Run(self.config, self._program, self._rules, batch, self._cp, first_row_only, trace)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(self._cp, error):
                raise
            raise BackendError(
                f"the GPU has no room for {len(batch.ids)} tokens at once ({error}): use a smaller batch_tokens"
            ) from error

    @contextmanager
    def _stream(self) -> Iterator[None]:
        """A stream that no other run has, made if need be."""
        try:
            stream = self._streams.pop()
        except IndexError:
            stream = self._cp.cuda.Stream(non_blocking=True)
        with stream:
            try:
                yield
            except BaseException:
                stream.synchronize()  # what was started may still use memory that the next run gets
                raise
            finally:
                self._streams.append(stream)


def _nothing(config: ModelConfig, trace: bool) -> Forward:
    """What no sequence at all gives."""
    lengths = np.zeros((config.layers, 0), np.int32)
    traced = [np.zeros(0, np.float32)] * config.layers, [np.zeros(0, np.bool_)] * config.layers
    return outcome(config, np.zeros((0, len(config.labels)), np.float32), lengths, lengths, traced if trace else None)


@dataclass
class _Live:
    """The rows of a run. lengths: (B,) on the host while counts alone decide them, else None."""

    x: Array
    rows: Rows
    total: int
    lengths: Int32 | None


class _Run:
    """One batch on its way through the layers, on the current stream."""

    def __init__(
        self,
        config: ModelConfig,
        program: CudaProgram,
        rules: list[LayerRule],
        batch: TokenBatch,
        cp: Any,
        first_row_only: bool,
        trace: bool,
    ):
        self._config, self._program, self._rules, self._cp = config, program, rules, cp
        self._first_row_only, self._trace = first_row_only, trace
        self._lengths = ragged.lengths(batch.cu_seqlens)
        self._bounds = cp.empty((config.layers, len(self._lengths) + 1), np.int32)  # behind the layers that change them
        self._changed: list[int] = []  # those layers
        self._masses: list[Array] = []
        self._kept: list[Array] = []
        segments = batch.segments if config.segments else np.zeros_like(batch.segments)
        identity = np.arange(len(batch.ids) + 1, dtype=np.int32)
        ids, positions, kinds, bounds, self._initial, self._identity = _on_device(
            cp, (batch.ids, batch.positions, segments, batch.cu_seqlens, self._lengths, identity)
        )
        rows = Rows(bounds, int(self._lengths.max()))
        self._live = _Live(program.embed((ids, positions, kinds)), rows, len(batch.ids), self._lengths)

    def forward(self) -> Forward:
        cp, live = self._cp, self._encode()
        first = self._program.gather(live.x, live.rows.cu_seqlens[: len(self._lengths)])
        logits = self._program.logits(cp.asnumpy(self._program.classify(first)))
        traced = None
        if self._trace:
            masses = [self._program.masses(cp.asnumpy(mass)) for mass in self._masses]
            traced = masses, [cp.asnumpy(kept).astype(np.bool_) for kept in self._kept]
        return outcome(self._config, logits, *self._layer_lengths(), traced)

    def last_rows(self) -> LastRows:
        live = self._encode()
        return LastRows(self._program.floats(self._cp.asnumpy(live.x)), self._cp.asnumpy(live.rows.cu_seqlens))

    def _encode(self) -> _Live:
        """All layers."""
        live = self._live
        for layer in range(self._config.layers):
            first_rows = layer == self._config.layers - 1 and self._first_row_only
            live = self._first_row_layer(live) if first_rows else self._full_layer(layer, live)
        return live

    def _layer_lengths(self) -> tuple[Int32, Int32]:
        """Live tokens before and after each layer's pruning, (L, B) each."""
        bounds, lengths = self._cp.asnumpy(self._bounds), [self._lengths]
        for layer in range(self._config.layers):
            lengths.append(np.diff(bounds[layer]) if layer in self._changed else lengths[-1])
        if self._first_row_only:
            lengths[-1] = np.ones_like(self._lengths)
        return np.stack(lengths[:-1]), np.stack(lengths[1:])

    def _full_layer(self, layer: int, live: _Live) -> _Live:
        """Attention over all rows, the rule, and the rest for the rows that go on."""
        program, D = self._program, self._config.width
        qkv = program.project(layer, live.x)
        kept = self._keep(layer, live, qkv)
        context = self._cp.empty((kept.live.total, D), program.row_type)
        program.context(layer, (qkv, kept.places, kept.live.rows), (qkv, D, 2 * D), live.rows, context)
        if kept.removed is not None:
            room = self._partial_masses(live)
            program.merged_context(layer, qkv, live.rows, kept.removed, kept.rank, room, context)
        identity = self._identity[: kept.live.total]
        kept.live.x = program.rest_of_layer(layer, live.x, kept.places, identity, context)
        return kept.live

    def _keep(self, layer: int, live: _Live, qkv: Array) -> _Kept:
        """The rule; where it merges, live.x holds the merged rows afterwards."""
        cp, program, rule, rows, N = self._cp, self._program, self._rules[layer], live.rows, live.total
        everything = _Kept(replace(live), self._identity[:N])
        if rule.kind == blocks.KEEP_ALL and not self._trace:
            return everything
        mass_zhn = self._partial_masses(live)
        program.received(layer, qkv, rows, mass_zhn)
        mass, kept = cp.empty((N,), program.mass_type), cp.empty((N,), np.uint8)
        counts = cp.empty((len(self._lengths),), np.int32)
        program.keep(rule, mass_zhn, rows, self._initial, mass, kept, counts)
        if self._trace:
            self._masses.append(mass)
            self._kept.append(kept)
        if rule.kind == blocks.KEEP_ALL:
            return everything
        removed = None
        if rule.step.merge:
            removed = program.removed(mass, kept, rows, counts)
            program.merge_rows(live.x, removed, rows)
        goes_on = kept if removed is None else removed.goes_on
        places, rank, totals = (cp.empty((size,), np.int32) for size in (N, N, 2))
        program.kernels.compact(goes_on, counts, rows.cu_seqlens, places, rank, self._bounds[layer], totals)
        self._changed.append(layer)
        lengths = _known_lengths(rule.step, live.lengths, self._lengths)
        if lengths is None:
            total, longest = (int(value) for value in cp.asnumpy(totals))  # the layer's one wait
        else:
            total, longest = int(lengths.sum()), int(lengths.max())
        following = _Live(live.x, Rows(self._bounds[layer], longest), total, lengths)
        return _Kept(following, places[:total], removed, rank)

    def _partial_masses(self, live: _Live) -> Array:
        """Room for (Z, H, N)."""
        shape = (math.ceil(live.rows.longest / QUERIES), self._config.heads, live.total)
        return self._cp.empty(shape, self._program.mass_type)

    def _first_row_layer(self, live: _Live) -> _Live:
        """The last layer for a classifier: one query row per sequence against all its keys."""
        program, B, D = self._program, len(self._lengths), self._config.width
        first = program.gather(live.x, live.rows.cu_seqlens[:B])
        q, kv = program.project_last(first, live.x)
        same, rows = self._identity[:B], Rows(self._identity[: B + 1], 1)
        context = self._cp.empty((B, D), program.row_type)
        layer = self._config.layers - 1
        program.context(layer, (q, same, rows), (kv, 0, D), live.rows, context)
        return _Live(program.rest_of_layer(layer, first, same, same, context), rows, B, None)


def _on_device(cp: Any, arrays: Sequence[Int32]) -> list[Array]:
    """They are parts of one array there: a copy takes some 40 us, however small."""
    together = cp.asarray(np.concatenate(arrays))
    ends = np.cumsum([len(array) for array in arrays]).tolist()
    return [together[end - len(array) : end] for end, array in zip(ends, arrays, strict=True)]


class _Kept(NamedTuple):
    """The next rows, without their values yet; where they are now, (N',); where a rule merges, how, and the inverse."""

    live: _Live
    places: Array
    removed: Removed | None = None
    rank: Array = None


def _known_lengths(step: Step, live: Int32 | None, initial: Int32) -> Int32 | None:
    """(B,) lengths behind a rule by counts, which no mass changes; None where masses decide."""
    if step.kind != blocks.COUNT or live is None:
        return None
    counts = np.maximum(1, np.rint(initial.astype(np.float32) * step.value)).astype(np.int32)
    kept = np.minimum(counts, live)
    return np.where(kept < live, kept + step.merge, kept).astype(np.int32)
