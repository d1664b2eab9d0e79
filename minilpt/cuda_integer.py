"""An `IntegerModel` on a GPU: every product by dp4a, everything else by `kernels.cuda.integer_kernels`.

Legend: B sequences, N packed tokens, H heads, D width, F inner width, L layers.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .config import ModelConfig
from .cuda_device import CudaDevice, loading
from .cuda_engine import LayerRule, Removed, Rows, check_fits
from .integer_model import IntegerModel
from .integer_model import Layer as IntegerLayer
from .integer_rules import integer_rule
from .kernels import integer
from .kernels.cuda import Array, Geometry
from .kernels.cuda.integer_kernels import (
    Factor,
    Gelu,
    IntegerKernels,
    Norm,
    device_dyadic,
    device_gelu,
    device_norm,
    longest_text,
)
from .pruning import KeepRule

Float32 = NDArray[np.float32]
Int = NDArray[np.int64]

ALL_BITS, BITS_OF_8 = 0xFFFFFFFF, 0xFF000000  # of a wide probability: what counts as mass
NOT_AGAIN = (0, 0)  # no second requantisation


class Linear(NamedTuple):
    """weight: (M, K) int8; bias: (M,) int32."""

    weight: Array
    bias: Array


class Layer(NamedTuple):
    """One encoder layer's constants on the device, as `integer_model.Layer` names them."""

    query_key_value: Linear
    query_key_value_out: Factor
    exp: integer.Exp
    context: tuple[int, int]
    attention_output: Linear
    attention_sum: Factor
    attention_residual: Factor
    attention_norm: Norm
    attention_again: tuple[int, int]
    inner: Linear
    activation: Gelu | Factor
    inner_again: tuple[int, int]
    outer: Linear
    outer_sum: Factor
    outer_residual: Factor
    outer_norm: Norm


class IntegerCudaProgram:
    """A `cuda_engine.CudaProgram`. BackendError for a model that the kernels or the card's memory do not hold."""

    row_type, mass_type = np.dtype(np.int8), np.dtype(np.int64)

    def __init__(self, config: ModelConfig, model: IntegerModel, device: CudaDevice):
        self.longest_text = longest_text(config.width // config.heads)
        check_fits(config, self.longest_text)
        self._config, self._cp, self._model = config, device.cp, model
        with loading(device):
            self.kernels = IntegerKernels(device.cp, Geometry.of(device.multiprocessors))
            self._upload()

    def _upload(self) -> None:
        model, cp, D = self._model, self._cp, self._config.width
        self._tables = tuple(self._table(name) for name in ("word", "position", "segment"))
        self._embedding_norm = device_norm(cp, model.embedding_norm)
        self._layers = [self._layer(layer) for layer in model.layers]
        # The last layer's once more, apart: there a classifier needs queries of first rows only.
        last = model.layers[-1]
        self._last_query = self._linear(last.query), device_dyadic(cp, last.query_out, D)
        self._last_key_value = (
            self._linear(last.key, last.value),
            self._factor((last.key_out, last.value_out)),
        )
        self._head_dense, self._head_out = self._linear(model.head_dense), self._linear(model.head_out)
        self._head_activation = self._activation(model.head_activation, D)
        self._logits = device_dyadic(cp, model.logits, len(self._config.labels))

    def _table(self, name: str) -> tuple[Array, Factor]:
        """A model without segments adds a row of zeros."""
        table = getattr(self._model, name)
        if table is None:
            zeros = np.zeros((1, self._config.width), np.int8)
            return self._cp.asarray(zeros), device_dyadic(self._cp, integer.Dyadic(np.int64(0), np.int64(1)), 1)
        rows = self._cp.asarray(np.ascontiguousarray(table.rows))
        return rows, device_dyadic(self._cp, table.factor, len(table.rows))

    def _linear(self, *parts: Any) -> Linear:
        """One product, or several of the same rows side by side."""
        weight, bias = (np.ascontiguousarray(np.concatenate(arrays)) for arrays in zip(*parts, strict=True))
        return Linear(self._cp.asarray(weight), self._cp.asarray(bias))

    def _factor(self, parts: tuple[integer.Dyadic, ...]) -> Factor:
        """Factors of products side by side, D channels each."""
        D = self._config.width
        arrays = [[np.broadcast_to(part, (D,)) for part in factor] for factor in parts]
        whole = integer.Dyadic(*(np.concatenate(part) for part in zip(*arrays, strict=True)))
        return device_dyadic(self._cp, whole, D * len(parts))

    def _activation(self, constants: integer.Gelu | integer.Dyadic, count: int) -> Gelu | Factor:
        if isinstance(constants, integer.Gelu):
            return device_gelu(self._cp, constants, count)
        return device_dyadic(self._cp, constants, count)

    def _layer(self, layer: IntegerLayer) -> Layer:
        cp, D = self._cp, self._config.width
        return Layer(
            query_key_value=self._linear(layer.query, layer.key, layer.value),
            query_key_value_out=self._factor((layer.query_out, layer.key_out, layer.value_out)),
            exp=layer.exp,
            context=_numbers(layer.context),
            attention_output=self._linear(layer.attention_output),
            attention_sum=device_dyadic(cp, layer.attention_sum, D),
            attention_residual=device_dyadic(cp, layer.attention_residual, D),
            attention_norm=device_norm(cp, layer.attention_norm),
            attention_again=_numbers(layer.attention_again),
            inner=self._linear(layer.inner),
            activation=self._activation(layer.activation, self._config.inner),
            inner_again=_numbers(layer.inner_again),
            outer=self._linear(layer.outer),
            outer_sum=device_dyadic(cp, layer.outer_sum, D),
            outer_residual=device_dyadic(cp, layer.outer_residual, D),
            outer_norm=device_norm(cp, layer.outer_norm),
        )

    def running(self) -> AbstractContextManager[None]:
        """No library takes part."""
        return nullcontext()

    def rules(self, rule: KeepRule | None) -> list[LayerRule]:
        config = self._config
        if rule is None:
            return [LayerRule()] * config.layers
        whole = integer_rule(rule, config.layers, config.heads, config.max_tokens)
        counts = (self._cp.asarray(row) for row in whole.counts)
        return [LayerRule(*parts) for parts in zip(whole.steps, whole.lowest, counts, strict=True)]

    def _sums(self, x: Array, linear: Linear) -> Array:
        sums = self._cp.empty((len(x), len(linear.weight)), np.int32)
        self.kernels.linear(x, *linear, sums)
        return sums

    def _projected(self, x: Array, linear: Linear, factor: Factor) -> Array:
        sums = self._sums(x, linear)
        out = self._cp.empty(sums.shape, np.int8)
        self.kernels.requantize(sums, factor, out)
        return out

    def embed(self, tokens: tuple[Array, Array, Array]) -> Array:
        out = self._cp.empty((len(tokens[0]), self._config.width), np.int8)
        self.kernels.embed_norm(tokens, self._tables, self._embedding_norm, out)
        return out

    def project(self, layer: int, x: Array) -> Array:
        return self._projected(x, self._layers[layer].query_key_value, self._layers[layer].query_key_value_out)

    def project_last(self, first: Array, x: Array) -> tuple[Array, Array]:
        return self._projected(first, *self._last_query), self._projected(x, *self._last_key_value)

    def received(self, layer: int, qkv: Array, rows: Rows, mass_zhn: Array) -> None:
        mask = BITS_OF_8 if self._model.masses_of_8_bits else ALL_BITS
        self.kernels.attention_mass(qkv, rows.cu_seqlens, self._layers[layer].exp, mask, rows.longest, mass_zhn)

    def keep(
        self, rule: LayerRule, mass_zhn: Array, rows: Rows, initial: Array, mass: Array, kept: Array, counts: Array
    ) -> None:
        self.kernels.keep(rule, mass_zhn, rows.cu_seqlens, initial, mass, kept, counts)

    def removed(self, mass: Array, kept: Array, rows: Rows, counts: Array) -> Removed:
        cp, B = self._cp, counts.shape
        weights, total = cp.empty(mass.shape, np.int64), cp.empty(B, np.int64)
        goes_on, stand_in = cp.empty(mass.shape, np.uint8), cp.empty(B, np.int32)
        self.kernels.weigh_removed(mass, kept, rows.cu_seqlens, weights, total, goes_on, stand_in, counts)
        return Removed((weights, total), goes_on, stand_in)

    def merge_rows(self, x: Array, removed: Removed, rows: Rows) -> None:
        weights, total = removed.weights
        self.kernels.merge_rows(x, weights, total, removed.stand_in, rows.cu_seqlens)

    def merged_context(
        self, layer: int, qkv: Array, rows: Rows, removed: Removed, rank: Array, probs_zhn: Array, context: Array
    ) -> None:
        constants, (weights, total) = self._layers[layer], removed.weights
        self.kernels.weighted_probs(qkv, rows.cu_seqlens, weights, constants.exp, rows.longest, probs_zhn)
        self.kernels.merged_context(
            *(probs_zhn, qkv, rows.cu_seqlens, total, removed.stand_in, rank, rows.longest),
            constants.context,
            context,
        )

    def context(
        self, layer: int, q: tuple[Array, Array, Rows], kv: tuple[Array, int, int], rows: Rows, context: Array
    ) -> None:
        constants, (array, places, bounds) = self._layers[layer], q
        queries = (array, places, bounds.cu_seqlens, bounds.longest)
        self.kernels.attention_context(
            *(queries, kv, rows.cu_seqlens, self._config.heads, rows.longest),
            constants.exp,
            constants.context,
            context,
        )

    def rest_of_layer(self, layer: int, x: Array, places: Array, identity: Array, context: Array) -> Array:
        constants, kernels = self._layers[layer], self.kernels
        attended, out = (self._cp.empty(context.shape, np.int8) for _ in range(2))
        sums = self._sums(context, constants.attention_output), constants.attention_sum
        residual, again = (x, constants.attention_residual), constants.attention_again
        kernels.add_norm(sums, residual, places, constants.attention_norm, again, attended)
        hidden = self._activated(self._sums(attended, constants.inner), constants.activation, constants.inner_again)
        sums = self._sums(hidden, constants.outer), constants.outer_sum
        kernels.add_norm(sums, (attended, constants.outer_residual), identity, constants.outer_norm, NOT_AGAIN, out)
        return out

    def _activated(self, sums: Array, constants: Gelu | Factor, again: tuple[int, int]) -> Array:
        out = self._cp.empty(sums.shape, np.int8)
        if isinstance(constants, Gelu):
            self.kernels.i_gelu(sums, constants, again, out)
        else:
            self.kernels.i_relu(sums, constants, again, out)
        return out

    def gather(self, x: Array, places: Array) -> Array:
        out = self._cp.empty((len(places), x.shape[1]), np.int8)
        self.kernels.gather_rows(x, places, out)
        return out

    def classify(self, first: Array) -> Array:
        sums = self._sums(first, self._head_dense)
        if self._config.head_activation == "tanh":
            hidden = self._cp.empty(sums.shape, np.int8)
            assert isinstance(self._head_activation, Factor)
            self.kernels.i_tanh(sums, self._head_activation, integer.tanh_constants(), hidden)
        else:
            hidden = self._activated(sums, self._head_activation, NOT_AGAIN)
        sums = self._sums(hidden, self._head_out)
        logits = self._cp.empty(sums.shape, np.int32)
        self.kernels.requantize(sums, self._logits, logits)
        return logits

    def logits(self, raw: NDArray[np.int32]) -> Float32:
        return (raw * self._model.logit_scale).astype(np.float32)

    def masses(self, raw: Int) -> Float32:
        return (raw / (self._config.heads << integer.SOFTMAX_BITS)).astype(np.float32)

    def floats(self, rows: NDArray[np.int8]) -> Float32:
        return (rows * np.float64(self._model.last_scale)).astype(np.float32)


def _numbers(factor: integer.Dyadic) -> tuple[int, int]:
    return int(factor.multiplier), int(factor.shift)
