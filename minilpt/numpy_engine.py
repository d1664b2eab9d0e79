"""The forward pass in NumPy: packed rows for everything that treats tokens alike, a loop over sequences for attention.

It runs where Numba is missing; `compiled_engine.py` is the same by compiled kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import ragged
from .backends import Backend
from .config import ModelConfig
from .engine import Forward, LastRows, Prefix, Traced, outcome
from .footprint import Load, Needs, held
from .kernels import NUMPY
from .pruning import KeepRule
from .ragged import TokenBatch
from .reference import merge_removed

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


class Linear(NamedTuple):
    """weight: (outputs, inputs) float32 whose transpose is C-contiguous, as BLAS likes it; bias: (outputs,)."""

    weight: Float32
    bias: Float32


class Norm(NamedTuple):
    """weight, bias: (D,) float32."""

    weight: Float32
    bias: Float32


class Layer(NamedTuple):
    """One encoder layer's weights."""

    query: Linear
    key_value: Linear
    attention_output: Linear
    attention_norm: Norm
    inner: Linear
    outer: Linear
    outer_norm: Norm


class NumpyEngine:
    """Weights laid out for BLAS, a keep rule, and the layer loop. Immutable: safe to share between threads."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Float32], rule: KeepRule | None, backend: Backend):
        self.config, self.rule, self.backend = config, rule, backend
        self._linear, self._layer_norm = NUMPY["linear"], NUMPY["layer_norm"]
        self._probs, self._mass = NUMPY["attention_probs"], NUMPY["attention_mass"]
        self._context = NUMPY["attention_context"]
        self._activation, self._head_activation = NUMPY[config.activation], NUMPY[config.head_activation]
        self._tables = {name: weights[f"embeddings.{name}.weight"] for name in ("word", "position")}
        self._segments = weights["embeddings.segment.weight"] if config.segments else None
        self._embedding_norm = _norm(weights, "embeddings.norm")
        projected = config.embedding_width != config.width
        self._project = _linear(weights, "embeddings.project") if projected else None
        self._layers = [_layer(weights, f"layers.{layer}.") for layer in range(config.layers)]
        self._head = [_linear(weights, name) for name in ("head.dense", "head.out") if config.labels]

    def with_rule(self, rule: KeepRule | None) -> NumpyEngine:
        """The same weights, shared, under another keep rule."""
        engine = copy(self)
        engine.rule = rule
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

        entering, prefix: see `Engine.run`; no rows are kept, so there is nothing to take up.
        """
        traced: Traced | None = ([], []) if trace else None
        (x, cu_seqlens), before, after = self._encode(batch, first_row_only=not trace, traced=traced)
        logits = self._classify(x[cu_seqlens[:-1]])
        return outcome(self.config, logits, before, after, traced)

    def last_rows(self, batch: TokenBatch, *, first_only: bool) -> LastRows:
        """Run the layers without the head: the rows that the last one's rule keeps, or row 0 of each sequence only."""
        return self._encode(batch, first_row_only=first_only, traced=None)[0]

    def needs(self, load: Load) -> Needs:
        """For every caller the widest activations of its whole batch, and the probabilities of one text.

        Inside the exact GELU, the hungriest activation function, seven arrays of F columns live at once, beside eight
        of D; a softmax has three.
        """
        config = self.config
        rows = 4 * load.tokens * (7 * config.inner + 8 * config.width)
        probs = 3 * 4 * config.heads * load.longest**2
        return Needs(held(vars(self)), load.callers * max(rows, probs), 0)

    def close(self) -> None:
        """Nothing to end: BLAS's threads are the process's."""

    def _encode(
        self, batch: TokenBatch, *, first_row_only: bool, traced: Traced | None
    ) -> tuple[LastRows, Int32, Int32]:
        """All layers; also the live tokens before and after each layer's pruning, (L, B) int32."""
        x, cu_seqlens = self._embed(batch), batch.cu_seqlens  # (N, D), (B + 1,)
        n_initial = ragged.lengths(cu_seqlens)
        before, after = [], []
        for layer in range(self.config.layers):
            before.append(ragged.lengths(cu_seqlens))
            if layer == self.config.layers - 1 and first_row_only:
                x, cu_seqlens = self._first_row_layer(layer, x, cu_seqlens)
            else:
                x, cu_seqlens = self._full_layer(layer, x, cu_seqlens, n_initial, traced)
            after.append(ragged.lengths(cu_seqlens))
        return LastRows(x, cu_seqlens), np.stack(before), np.stack(after)

    def _embed(self, batch: TokenBatch) -> Float32:
        x: Float32 = self._tables["word"][batch.ids] + self._tables["position"][batch.positions]
        if self._segments is not None:
            x += self._segments[batch.segments]
        x = self._layer_norm(x, *self._embedding_norm, self.config.eps)
        return x if self._project is None else self._linear(x, *self._project)

    def _full_layer(
        self, layer: int, x: Float32, cu_seqlens: Int32, n_initial: Int32, traced: Traced | None
    ) -> tuple[Float32, Int32]:
        """Attention over all rows, the rule, and the rest for the kept rows. Returns (N', D) rows, (B + 1,) bounds.

        traced: where this layer's masses and kept tokens are appended.
        """
        weights, rule = self._layers[layer], self.rule
        if rule is not None and not rule.active(layer):
            rule = None
        q, kv = self._linear(x, *weights.query), self._linear(x, *weights.key_value)
        # Of no sequence at all, to begin with.
        context, masses, keep = [x[:0]], [np.zeros(0, np.float32)], [np.zeros(0, dtype=bool)]
        rows = [np.zeros(0, dtype=bool)]
        for b, (begin, end) in enumerate(_spans(cu_seqlens)):
            k, v = np.split(kv[begin:end], 2, axis=1)
            probs = self._probs(q[begin:end], k, self.config.heads)
            kept = goes_on = np.ones(end - begin, dtype=bool)
            if rule is not None or traced is not None:
                masses.append(self._mass(probs))
            if rule is not None:
                kept = goes_on = rule.keep(masses[-1], layer, int(n_initial[b]))
                if rule.merge_removed and not kept.all():
                    x[begin:end], probs, goes_on = merge_removed(x[begin:end], probs, masses[-1], kept)
                probs = probs[:, goes_on]
            context.append(self._context(probs, v))
            keep.append(kept)
            rows.append(goes_on)
        if traced is not None:
            traced[0].append(np.concatenate(masses))
            traced[1].append(np.concatenate(keep))
        places, cu_seqlens = ragged.compact(np.concatenate(rows), cu_seqlens)
        return self._rest_of_layer(weights, x[places], np.concatenate(context)), cu_seqlens

    def _first_row_layer(self, layer: int, x: Float32, cu_seqlens: Int32) -> tuple[Float32, Int32]:
        """The last layer where row 0 is enough: one query row per sequence, all its keys. Exact. (B, D), (B + 1,)."""
        weights = self._layers[layer]
        first = x[cu_seqlens[:-1]]
        q, kv = self._linear(first, *weights.query), self._linear(x, *weights.key_value)
        context = [x[:0]]  # of no sequence at all, to begin with
        for b, (begin, end) in enumerate(_spans(cu_seqlens)):
            k, v = np.split(kv[begin:end], 2, axis=1)
            context.append(self._context(self._probs(q[b : b + 1], k, self.config.heads), v))
        return self._rest_of_layer(weights, first, np.concatenate(context)), ragged.boundaries([1] * len(first))

    def _rest_of_layer(self, weights: Layer, x: Float32, context: Float32) -> Float32:
        """Output projection, feed-forward, and the two residual norms. x, context: (N', D)."""
        attended = self._linear(context, *weights.attention_output)
        x = self._layer_norm(x + attended, *weights.attention_norm, self.config.eps)
        inner = self._activation(self._linear(x, *weights.inner))
        return self._layer_norm(x + self._linear(inner, *weights.outer), *weights.outer_norm, self.config.eps)

    def _classify(self, first: Float32) -> Float32:
        """(B, D) first rows to (B, labels) logits."""
        dense, out = self._head
        return self._linear(self._head_activation(self._linear(first, *dense)), *out)


def _spans(cu_seqlens: Int32) -> list[tuple[int, int]]:
    return list(pairwise(cu_seqlens.tolist()))


def _linear(weights: Mapping[str, Float32], *names: str) -> Linear:
    """One layer, or several that read the same rows, stacked along their outputs."""
    weight = np.concatenate([weights[f"{name}.weight"] for name in names])
    bias = np.concatenate([weights[f"{name}.bias"] for name in names])
    return Linear(np.ascontiguousarray(weight.T).T, bias)


def _norm(weights: Mapping[str, Float32], name: str) -> Norm:
    return Norm(weights[f"{name}.weight"], weights[f"{name}.bias"])


def _layer(weights: Mapping[str, Float32], at: str) -> Layer:
    return Layer(
        query=_linear(weights, f"{at}query"),
        key_value=_linear(weights, f"{at}key", f"{at}value"),
        attention_output=_linear(weights, f"{at}attention_output"),
        attention_norm=_norm(weights, f"{at}attention_norm"),
        inner=_linear(weights, f"{at}inner"),
        outer=_linear(weights, f"{at}outer"),
        outer_norm=_norm(weights, f"{at}outer_norm"),
    )
