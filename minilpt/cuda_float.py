"""Float32 and float16 weights on a GPU: products by cuBLAS, everything else by `kernels.cuda.float_kernels`.

Float16 is stored and multiplied, sums are float32. Legend: B sequences, N packed tokens, H heads, D width, F inner
width, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .config import ModelConfig
from .cuda_device import CudaDevice, full_sums, loading
from .cuda_engine import LayerRule, Removed, Rows, check_fits
from .kernels.cuda import Array, Geometry
from .kernels.cuda.float_kernels import FloatKernels, longest_text
from .pruning import KeepRule

Float32 = NDArray[np.float32]

ROW_TYPES: Mapping[str, np.dtype[Any]] = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}


class Linear(NamedTuple):
    """weight: (inputs, outputs) of the storage type; bias: (outputs,) float32."""

    weight: Array
    bias: Array


class Norm(NamedTuple):
    """weight, bias: (D,) float32."""

    weight: Array
    bias: Array


class Layer(NamedTuple):
    """One encoder layer's weights."""

    query_key_value: Linear
    attention_output: Linear
    attention_norm: Norm
    inner: Linear
    outer: Linear
    outer_norm: Norm


class FloatCudaProgram:
    """A `cuda_engine.CudaProgram`. BackendError for a model that the kernels or the card's memory do not hold."""

    mass_type = np.dtype(np.float32)

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Float32],
        precision: str,
        device: CudaDevice,
    ):
        self.row_type, self.longest_text = ROW_TYPES[precision], longest_text(config.width // config.heads)
        check_fits(config, self.longest_text)
        self._config, self._cp, self._weights = config, device.cp, weights
        with loading(device):
            self.kernels = FloatKernels(device.cp, Geometry.of(device.multiprocessors), self.row_type)
            device.cp.cuda.device.get_cublas_handle()  # a missing cuBLAS shows here rather than at the first text
            self._upload()
        del self._weights

    def _upload(self) -> None:
        config, linear = self._config, self._linear
        self._tables = tuple(self._table(name) for name in ("word", "position", "segment"))
        self._embedding_norm = self._norm("embeddings.norm")
        self._project = linear("embeddings.project") if config.embedding_width != config.width else None
        self._layers = [self._layer(f"layers.{layer}.") for layer in range(config.layers)]
        # The last layer's once more, apart: there a classifier needs queries of first rows only.
        last = f"layers.{config.layers - 1}."
        self._last_query = linear(f"{last}query").weight
        self._last_key_value = linear(f"{last}key", f"{last}value").weight
        if config.labels:  # an encoder without a head has none
            self._head_dense = linear("head.dense")
            self._head_out = self._stored("head.out.weight"), self._float32("head.out.bias")

    def _stored(self, name: str) -> Array:
        return self._cp.asarray(np.ascontiguousarray(self._weights[name], self.row_type))

    def _float32(self, *names: str) -> Array:
        return self._cp.asarray(np.concatenate([self._weights[name] for name in names]).astype(np.float32))

    def _table(self, name: str) -> Array:
        """A model without segments adds a row of zeros."""
        if name == "segment" and not self._config.segments:
            return self._cp.asarray(np.zeros((1, self._config.embedding_width), self.row_type))
        return self._stored(f"embeddings.{name}.weight")

    def _linear(self, *names: str) -> Linear:
        """One product, or several of the same rows side by side."""
        weight = np.concatenate([self._weights[f"{name}.weight"] for name in names]).T
        stored = self._cp.asarray(np.ascontiguousarray(weight, self.row_type))
        return Linear(stored, self._float32(*(f"{name}.bias" for name in names)))

    def _norm(self, name: str) -> Norm:
        return Norm(self._float32(f"{name}.weight"), self._float32(f"{name}.bias"))

    def _layer(self, at: str) -> Layer:
        return Layer(
            query_key_value=self._linear(f"{at}query", f"{at}key", f"{at}value"),
            attention_output=self._linear(f"{at}attention_output"),
            attention_norm=self._norm(f"{at}attention_norm"),
            inner=self._linear(f"{at}inner"),
            outer=self._linear(f"{at}outer"),
            outer_norm=self._norm(f"{at}outer_norm"),
        )

    def rules(self, rule: KeepRule | None) -> list[LayerRule]:
        layers = range(self._config.layers)
        return [LayerRule(rule.step(n)) if rule is not None and rule.active(n) else LayerRule() for n in layers]

    def running(self) -> AbstractContextManager[None]:
        return full_sums(self._cp)

    def _product(self, x: Array, weight: Array) -> Array:
        out = self._cp.empty((len(x), weight.shape[1]), self.row_type)
        self._cp.matmul(x, weight, out=out)
        return out

    def embed(self, tokens: tuple[Array, Array, Array]) -> Array:
        x = self._cp.empty((len(tokens[0]), self._config.embedding_width), self.row_type)
        self.kernels.embed_norm(tokens, self._tables, self._embedding_norm, self._config.eps, x)
        if self._project is not None:
            x = self._product(x, self._project.weight)
            self.kernels.bias_activation(x, self._project.bias, "none")
        return x

    def project(self, layer: int, x: Array) -> Array:
        """Without the bias, which the attention kernels add as they read."""
        return self._product(x, self._layers[layer].query_key_value.weight)

    def project_last(self, first: Array, x: Array) -> tuple[Array, Array]:
        return self._product(first, self._last_query), self._product(x, self._last_key_value)

    def _bias(self, layer: int) -> Array:
        return self._layers[layer].query_key_value.bias

    def received(self, layer: int, qkv: Array, rows: Rows, mass_zhn: Array) -> None:
        self.kernels.attention_mass(qkv, self._bias(layer), rows.cu_seqlens, rows.longest, mass_zhn)

    def keep(
        self, rule: LayerRule, mass_zhn: Array, rows: Rows, initial: Array, mass: Array, kept: Array, counts: Array
    ) -> None:
        self.kernels.keep(rule.step, mass_zhn, rows.cu_seqlens, initial, mass, kept, counts)

    def removed(self, mass: Array, kept: Array, rows: Rows, counts: Array) -> Removed:
        share, goes_on = self._cp.empty(mass.shape, np.float32), self._cp.empty(mass.shape, np.uint8)
        stand_in = self._cp.empty(counts.shape, np.int32)
        self.kernels.share_removed(mass, kept, rows.cu_seqlens, share, goes_on, stand_in, counts)
        return Removed((share,), goes_on, stand_in)

    def merge_rows(self, x: Array, removed: Removed, rows: Rows) -> None:
        (share,) = removed.weights
        self.kernels.merge_rows(x, share, removed.stand_in, rows.cu_seqlens)

    def merged_context(
        self, layer: int, qkv: Array, rows: Rows, removed: Removed, rank: Array, probs_zhn: Array, context: Array
    ) -> None:
        bias, (share,) = self._bias(layer), removed.weights
        self.kernels.weighted_probs(qkv, bias, rows.cu_seqlens, share, rows.longest, probs_zhn)
        self.kernels.merged_context(
            probs_zhn, qkv, bias, rows.cu_seqlens, removed.stand_in, rank, rows.longest, context
        )

    def context(
        self, layer: int, q: tuple[Array, Array, Rows], kv: tuple[Array, int, int], rows: Rows, context: Array
    ) -> None:
        array, places, bounds = q
        queries = (array, places, bounds.cu_seqlens, bounds.longest)
        self.kernels.attention_context(queries, kv, rows.cu_seqlens, self._bias(layer), self._config.heads, context)

    def rest_of_layer(self, layer: int, x: Array, places: Array, identity: Array, context: Array) -> Array:
        weights, kernels, eps = self._layers[layer], self.kernels, self._config.eps
        output, inner, outer = weights.attention_output, weights.inner, weights.outer
        attended, out = (self._cp.empty(context.shape, self.row_type) for _ in range(2))
        product = self._product(context, output.weight)
        kernels.add_norm(product, output.bias, x, places, weights.attention_norm, eps, attended)
        hidden = self._product(attended, inner.weight)
        kernels.bias_activation(hidden, inner.bias, self._config.activation)
        product = self._product(hidden, outer.weight)
        kernels.add_norm(product, outer.bias, attended, identity, weights.outer_norm, eps, out)
        return out

    def gather(self, x: Array, places: Array) -> Array:
        out = self._cp.empty((len(places), x.shape[1]), self.row_type)
        self.kernels.gather_rows(x, places, out)
        return out

    def classify(self, first: Array) -> Array:
        hidden = self._product(first, self._head_dense.weight)
        self.kernels.bias_activation(hidden, self._head_dense.bias, self._config.head_activation)
        weight, bias = self._head_out
        logits = self._cp.empty((len(first), len(weight)), np.float32)
        self.kernels.head_out(hidden, weight, bias, logits)
        return logits

    def logits(self, raw: Float32) -> Float32:
        return raw

    def masses(self, raw: Float32) -> Float32:
        return raw

    def floats(self, rows: NDArray[np.floating]) -> Float32:
        return rows.astype(np.float32)
