"""A classifier as integers: every scale folded into multipliers, shifts and biases once, when the model is loaded.

Names and bit widths are those of I-BERT (arXiv 2101.01321): weights of 8 bits with a scale for each output channel,
activations of 8 bits with one static scale, 16 where embeddings are added, 22 in front of a LayerNorm, sums and biases
of 32. What I-BERT has not: a scale for each row of an embedding table, powers of two by channel behind a LayerNorm
(`scales.Scales`), and a head of integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .config import ModelConfig
from .errors import UnsupportedModelError
from .kernels import integer
from .kernels.integer import Dyadic, Exp, Gelu, Norm
from .quantize import Quantized, quantize_as_ibert, quantize_rows
from .scales import AGAIN, Scales, read_scales
from .weights import checkpoint, names

Float32 = NDArray[np.float32]
Int = NDArray[np.int64]
ACTIVATIONS = ("gelu", "relu")
HEAD_ACTIVATIONS = ("tanh", "gelu", "relu")
TANH_SCALE = 2.0**-integer.TANH_INPUT_BITS


class Linear(NamedTuple):
    """weight: (M, K) int8; bias: (M,) int32, in units of the sums."""

    weight: NDArray[np.int8]
    bias: NDArray[np.int32]


class Table(NamedTuple):
    """rows: (R, D) int8; factor: (R,), to the 16-bit sum's scale."""

    rows: NDArray[np.int8]
    factor: Dyadic


@dataclass(frozen=True)
class Layer:
    """One layer. *_out: to the 8-bit scale of what the sums become, (M,); *_sum and *_residual: to the 22-bit scale.

    *_again: the second requantisation, one number.
    """

    query: Linear
    key: Linear
    value: Linear
    query_out: Dyadic
    key_out: Dyadic
    value_out: Dyadic
    exp: Exp
    context: Dyadic
    attention_output: Linear
    attention_sum: Dyadic
    attention_residual: Dyadic
    attention_norm: Norm
    attention_again: Dyadic
    inner: Linear
    activation: Gelu | Dyadic
    inner_again: Dyadic
    outer: Linear
    outer_sum: Dyadic
    outer_residual: Dyadic
    outer_norm: Norm


@dataclass(frozen=True)
class IntegerModel:
    """All integers between token ids and logits; a logit is its integer times `logit_scale`.

    last_scale: of the first row's 8-bit integers behind the last layer, as the head's weights take them, for a head in
    floating point (I-BERT's). masses_of_8_bits: masses are sums of 8-bit probabilities, as the LTP code has them.
    """

    word: Table
    position: Table
    segment: Table | None
    embedding_norm: Norm
    layers: tuple[Layer, ...]
    head_dense: Linear
    head_activation: Gelu | Dyadic
    head_out: Linear
    logits: Dyadic
    logit_scale: float
    last_scale: Any
    masses_of_8_bits: bool = False


class _Scaled(NamedTuple):
    """A matrix of integers, and the scale of its sums, (M,)."""

    linear: Linear
    scale: Any


def load_integer_model(folder: Path, config: ModelConfig) -> IntegerModel:
    """The model of a folder that holds integer.json, or a checkpoint trained with I-BERT.

    Raises ModelFileError, WeightsError or UnsupportedModelError.
    """
    scales = read_scales(folder, config)
    trained = config.quant_mode and not scales.from_file
    stored = checkpoint.load_weights(folder, config, as_stored=names.expected_shapes(config))
    stored.check_word_table()
    weights = {}
    for name, tensor in stored.items():
        if isinstance(tensor, Quantized) or tensor.ndim != 2:
            weights[name] = tensor
        elif trained:
            weights[name] = quantize_as_ibert(tensor, per_row=not name.startswith("embeddings."))
        else:
            weights[name] = quantize_rows(tensor)
    model = integer_model(config, weights, scales)
    return replace(model, masses_of_8_bits=trained and config.model_type == "ltp")


def check_supported(config: ModelConfig) -> None:
    """UnsupportedModelError for a model that has no integer form."""
    for kind, found, known in (
        ("activation", config.activation, ACTIVATIONS),
        ("head activation", config.head_activation, HEAD_ACTIVATIONS),
    ):
        if found not in known:
            raise UnsupportedModelError(f"integer-only inference has no {found} as {kind}; it has {', '.join(known)}")
    if config.embedding_width != config.width:
        raise UnsupportedModelError("integer-only inference has no embeddings that are narrower than the layers")


def integer_model(config: ModelConfig, weights: Mapping[str, Any], scales: Scales) -> IntegerModel:
    """Fold the scales into integers. weights: our names, matrices and tables `Quantized`, the rest floating.

    Raises UnsupportedModelError for what integers of these widths cannot hold, before anything is computed with it.
    """
    check_supported(config)
    return _Folding(config, weights, scales).model()


class _Folding:
    """Weights and scales at hand; every method names what it folds in its errors."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Any], scales: Scales):
        self.config, self.weights, self.scales = config, weights, scales

    def model(self) -> IntegerModel:
        layers, before = [], "embeddings.norm"
        for number in range(self.config.layers):
            layers.append(self._layer(f"layers.{number}.", before))
            before = f"layers.{number}.outer_norm"
        dense = self._linear("head.dense", before)
        activation, scale = self._head_activation(dense)
        out = self._linear("head.out", scale)
        logit_scale = np.max(np.float64(out.scale))
        return IntegerModel(
            word=self._table("word"),
            position=self._table("position"),
            segment=self._table("segment") if self.config.segments else None,
            embedding_norm=self._norm("embeddings.norm", "embeddings.norm"),
            layers=tuple(layers),
            head_dense=dense.linear,
            head_activation=activation,
            head_out=out.linear,
            logits=self._dyadic("head.out", out.scale, logit_scale),
            logit_scale=float(logit_scale),
            last_scale=self.scales.scales[before],
        )

    def _layer(self, at: str, before: str) -> Layer:
        query, key, value = (self._linear(f"{at}{name}", before) for name in ("query", "key", "value"))
        scales = self.scales.scales
        head_root = (self.config.width // self.config.heads) ** 0.5
        scores = scales[f"{at}query"] * scales[f"{at}key"] / head_root
        attention = self._linear(f"{at}attention_output", f"{at}context")
        again, inner_again = f"{at}attention_norm.again", f"{at}inner.again"
        inner = self._linear(f"{at}inner", again)
        outer = self._linear(f"{at}outer", inner_again)
        prob_scale = scales[f"{at}value"] / 2**integer.PROB_BITS
        return Layer(
            query=query.linear,
            key=key.linear,
            value=value.linear,
            query_out=self._dyadic(f"{at}query", query.scale, scales[f"{at}query"]),
            key_out=self._dyadic(f"{at}key", key.scale, scales[f"{at}key"]),
            value_out=self._dyadic(f"{at}value", value.scale, scales[f"{at}value"]),
            exp=self._exp(f"{at}exp", scores),
            context=self._dyadic(f"{at}context", prob_scale, scales[f"{at}context"]),
            attention_output=attention.linear,
            attention_sum=self._dyadic(f"{at}attention_sum", attention.scale, scales[f"{at}attention_sum"]),
            attention_residual=self._residual(f"{at}attention_sum", before),
            attention_norm=self._norm(f"{at}attention_norm", f"{at}attention_norm"),
            attention_again=self._again(again),
            inner=inner.linear,
            activation=self._activation(f"{at}inner", self.config.activation, inner, scales[f"{at}inner"]),
            inner_again=self._again(inner_again),
            outer=outer.linear,
            outer_sum=self._dyadic(f"{at}outer_sum", outer.scale, scales[f"{at}outer_sum"]),
            outer_residual=self._residual(f"{at}outer_sum", again),
            outer_norm=self._norm(f"{at}outer_norm", f"{at}outer_norm"),
        )

    def _exp(self, name: str, scores: Any) -> Exp:
        """I-BERT's code takes the range of the integers of i-exp, not of what they stand for: its scale counts them."""
        output = self.scales.scales[name]
        if not self.scales.from_file:
            output = output * integer.exp_unit(scores)
        exp: Exp = self._checked(name, lambda: integer.exp_constants(scores, output))
        if not integer.i_exp(np.int64(0), exp):
            raise UnsupportedModelError(f"{name}: at the scale {self.scales.scales[name]}, exp(0) is the integer 0")
        return exp

    def _again(self, name: str) -> Dyadic:
        factor = self._dyadic(name, self.scales.scales[name.removesuffix(AGAIN)], self.scales.scales[name])
        if not factor.multiplier:
            raise UnsupportedModelError(f"{name}: its scale {self.scales.scales[name]} leaves nothing of what it reads")
        return factor

    def _quantized(self, name: str) -> Quantized:
        weight: Quantized = self.weights[f"{name}.weight"]
        if not (np.isfinite(weight.scale) & (weight.scale > 0)).all():
            raise UnsupportedModelError(f"{name}: scales of rows must be positive numbers, found {weight.scale.min()}")
        return weight

    def _residual(self, name: str, source: str) -> Dyadic:
        return self._dyadic(name, self.scales.by_channel(source), self.scales.scales[name])

    def _table(self, name: str) -> Table:
        rows, scale = self._quantized(f"embeddings.{name}")
        ratio = np.float64(scale) / np.float64(self.scales.scales["embeddings.sum"])
        if not (3 * 128 * ratio < 2.0**31).all():  # three of them are added
            raise UnsupportedModelError(f"embeddings.{name}: {scale.max()} is too many units of the sum's scale")
        return Table(rows, self._checked(f"embeddings.{name}", lambda: integer.dyadic(ratio)))

    def _norm(self, name: str, output: str) -> Norm:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        scale, shift = self.scales.by_channel(output), self.scales.shifts.get(name, 0)
        late = self.scales.from_file  # a checkpoint of I-BERT has no such channel
        return self._checked(name, lambda: integer.norm_constants(weight, bias, scale, shift, late))

    def _linear(self, name: str, source: Any) -> _Scaled:
        """source: the name of the activation that the matrix reads, or its scale."""
        input_scale = self.scales.scales[source] if isinstance(source, str) else source
        weight, bias = self._quantized(name), self.weights[f"{name}.bias"]
        scale = weight.scale * input_scale  # (M,)
        whole = np.rint(1 / scale * bias)
        most = 128 * np.abs(weight.rows.astype(np.int64)).sum(axis=1) + np.abs(whole)
        if not (most < 2.0**31).all():  # NaN is not
            row = int(np.argmax(np.nan_to_num(most, nan=np.inf)))
            raise UnsupportedModelError(
                f"{name}: sums of output {row} can reach {most[row]:.3g}, more than 32 bits hold: its bias {bias[row]} "
                f"is too large for its scale {scale[row]}"
            )
        return _Scaled(Linear(weight.rows, whole.astype(np.int32)), scale)

    def _activation(self, name: str, kind: str, sums: _Scaled, output_scale: Any) -> Gelu | Dyadic:
        if kind == "relu":
            return self._dyadic(name, sums.scale, output_scale)
        gelu: Gelu = self._checked(name, lambda: integer.gelu_constants(sums.scale, output_scale))
        wide = np.flatnonzero(integer.gelu_bound(largest_sums(sums.linear), gelu) >= 2**62)
        if len(wide):
            raise UnsupportedModelError(
                f"{name}: i-GELU of output {wide[0]}, whose scale is {sums.scale[wide[0]]}, can need more than 64 bits"
            )
        return gelu

    def _head_activation(self, dense: _Scaled) -> tuple[Gelu | Dyadic, Any]:
        """The activation's constants, and the scale of what it gives."""
        if self.config.head_activation == "tanh":
            return self._dyadic("head.dense", dense.scale, TANH_SCALE), dense.scale.dtype.type(1 / integer.TANH_LIMIT)
        scale = self.scales.scales["head.dense"]
        return self._activation("head.dense", self.config.head_activation, dense, scale), scale

    def _dyadic(self, name: str, scale: Any, output_scale: Any) -> Dyadic:
        return self._checked(name, lambda: integer.dyadic(np.float64(scale) / np.float64(output_scale)))

    def _checked(self, name: str, make: Any) -> Any:
        try:
            return make()
        except ValueError as error:
            raise UnsupportedModelError(f"{name}: {error}") from None


def largest_sums(linear: Linear) -> Int:
    """(M,) int64: no sum of this product is larger in size, whatever 8-bit integers it reads."""
    bias = np.abs(linear.bias.astype(np.int64))
    return 128 * np.abs(linear.weight.astype(np.int64)).sum(axis=1) + bias
