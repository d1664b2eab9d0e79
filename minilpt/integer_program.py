"""An `IntegerModel` for the compiled engine: packed once, with the layout of the scratch memory it needs.

Legend: B sequences, N packed tokens, H heads, D width, F inner width, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import reference
from .compiled_engine import Memory, Rules, Shape, filled
from .config import ModelConfig
from .footprint import Held, held
from .integer_model import IntegerModel, Layer, Linear, Table, largest_sums, load_integer_model
from .integer_rules import IntegerRule, integer_rule
from .kernels import blocks, compiled, compiled_integer, isa, packing
from .kernels.compiled_integer import dyadic_record, ending_record, exp_record, norm_record
from .kernels.integer import SOFTMAX_BITS, Dyadic, Gelu
from .pruning import KeepRule
from .weights import checkpoint

Float32 = NDArray[np.float32]
Int = NDArray[np.int64]

MASK_OF_8_BITS = -(1 << 24)  # the bits of a wide probability that an 8-bit one has
ENDINGS = {"gelu": blocks.TO_8_BITS_GELU, "relu": blocks.TO_8_BITS_RELU, "tanh": blocks.TO_8_BITS_TANH}


@dataclass(frozen=True)
class FloatHead:
    """The classification head on dequantised rows, float64: what I-BERT's own code does, in float32."""

    weights: Mapping[str, Any]
    config: ModelConfig

    @classmethod
    def of(cls, folder: Path, config: ModelConfig) -> FloatHead:
        """The head's weights as the folder has them."""
        stored = checkpoint.load_weights(folder, config)
        return cls({name: np.asarray(stored[name], np.float64) for name in stored if name.startswith("head.")}, config)

    def logits(self, rows: NDArray[np.float64]) -> Float32:
        """(B, labels) of (B, D)."""
        return np.stack([reference.head(self.weights, self.config, row) for row in rows]).astype(np.float32)


class IntegerProgram:
    """All integers as compiled kernels read them. record: one `blocks.INTEGER_MODEL`."""

    part, operation = "integer", blocks.RUN_INTEGER_FORWARD
    logits_type, masses_type = np.dtype(np.int32), np.dtype(np.int64)
    keeps_rows = False

    @classmethod
    def load(cls, folder: Path, config: ModelConfig, *, float_head: bool) -> IntegerProgram:
        """The model of a folder, see `integer_model.load_integer_model`. float_head: I-BERT's, in float64."""
        head = FloatHead.of(folder, config) if float_head else None
        return cls(config, load_integer_model(folder, config), head)

    def __init__(self, config: ModelConfig, model: IntegerModel, float_head: FloatHead | None = None):
        self._config, self.model = config, model
        self._float_head, self.last_width = float_head, 0 if float_head is None else config.width
        self._columns, self._arrays = isa.chosen().columns, []  # type: int, list[Any]
        self._head_width = compiled.padded(config.width // config.heads)
        self.layers = np.concatenate([np.zeros(0, blocks.INTEGER_LAYER), *map(self._layer, model.layers)])
        dense, out = self._matrix(model.head_dense), self._matrix(model.head_out)
        values: dict[str, Any] = {
            "width": config.width,
            "heads": config.heads,
            "head_width": self._head_width,
            "layers": config.layers,
            "labels": len(config.labels),
            "mass_mask": MASK_OF_8_BITS if model.masses_of_8_bits else -1,
            **self._table("word", model.word),
            **self._table("position", model.position),
            **self._table("segment", model.segment),
            "layer": self.layers.ctypes.data,
            "embedding_norm": norm_record(model.embedding_norm, self._arrays),
            "head_dense": dense,
            "head_dense_end": self._ending(config.head_activation, model.head_activation, model.head_dense),
            "head_out": out,
            "logits": dyadic_record(model.logits, len(config.labels), self._arrays),
        }
        self.record = filled(blocks.INTEGER_MODEL, values)

    def rules(self, rule: KeepRule | None) -> Rules:
        """A `blocks.INTEGER_RULE` for each layer, and the counts that they point to."""
        if rule is None:
            return Rules(np.zeros(self._config.layers, blocks.INTEGER_RULE))  # of the kind KEEP_ALL
        whole = self.integer_rule(rule)
        records = [
            (step.kind, step.denominator, step.limit, step.merge, lowest, counts.ctypes.data)
            for step, lowest, counts in zip(whole.steps, whole.lowest, whole.counts, strict=True)
        ]
        return Rules(np.array(records, blocks.INTEGER_RULE), whole.counts)

    def integer_rule(self, rule: KeepRule) -> IntegerRule:
        """The rule that this model's integers are compared by."""
        config = self._config
        return integer_rule(rule, config.layers, config.heads, config.max_tokens)

    def logits(self, raw: NDArray[np.int32], last: NDArray[np.int32]) -> Float32:
        """(B, labels): the integers times their scale, or what the float head makes of the last rows."""
        if self._float_head is not None:
            return self._float_head.logits(last * np.float64(self.model.last_scale))
        return (raw * self.model.logit_scale).astype(np.float32)

    def masses(self, raw: Int) -> Float32:
        """(n,) averaged over heads."""
        return (raw / (self._config.heads << SOFTMAX_BITS)).astype(np.float32)

    def held(self) -> Held:
        """All of its arrays, and of the model that they were packed from."""
        return held([self._arrays, self.model, self._float_head])

    def _keep(self, array: NDArray[Any]) -> int:
        """The array's address, for as long as this model lives."""
        self._arrays.append(array)
        return array.ctypes.data

    def _table(self, name: str, table: Table | None) -> dict[str, Any]:
        if table is None:
            return {name: 0, f"{name}_factor": (0, 0, 0)}
        factor = dyadic_record(table.factor, len(table.rows), self._arrays)
        return {name: self._keep(np.ascontiguousarray(table.rows)), f"{name}_factor": factor}

    def _matrix(self, linear: Linear) -> np.void:
        packed = packing.pack_integer(*linear, isa.chosen())
        self._arrays.append(packed)
        return packed.record()

    def _ending(
        self, kind: str, constants: Gelu | Dyadic, linear: Linear, again: Dyadic | None = None
    ) -> tuple[object, ...]:
        count, largest = len(linear.bias), largest_sums(linear)
        columns = compiled.padded(count, self._columns)
        return ending_record(ENDINGS[kind], constants, count, self._arrays, columns, again, largest)

    def _layer(self, layer: Layer) -> NDArray[np.void]:
        attention = self._matrix(
            layer.attention_output._replace(weight=self._by_head(layer.attention_output.weight.T).T)
        )
        width, arrays = self._config.width, self._arrays
        again = compiled_integer.again_numbers(layer.attention_again)
        values: dict[str, Any] = {
            "context_multiplier": int(layer.context.multiplier),
            "context_shift": int(layer.context.shift),
            "again_multiplier": again[0],
            "again_shift": again[1],
            **self._query_key_value(layer),
            "exp": exp_record(layer.exp),
            "attention_output": attention,
            "attention_sum": dyadic_record(
                layer.attention_sum, width, arrays, largest=largest_sums(layer.attention_output)
            ),
            "attention_residual": dyadic_record(layer.attention_residual, width, arrays, largest=128),
            "attention_norm": norm_record(layer.attention_norm, arrays),
            "inner": self._matrix(layer.inner),
            "inner_end": self._ending(self._config.activation, layer.activation, layer.inner, layer.inner_again),
            "outer": self._matrix(layer.outer),
            "outer_sum": dyadic_record(layer.outer_sum, width, arrays, largest=largest_sums(layer.outer)),
            "outer_residual": dyadic_record(layer.outer_residual, width, arrays, largest=128),
            "outer_norm": norm_record(layer.outer_norm, arrays),
        }
        return filled(blocks.INTEGER_LAYER, values)

    def _query_key_value(self, layer: Layer) -> dict[str, Any]:
        """The three products of the same rows as one. Each begins with a panel, and each head with a vector."""
        part = compiled.padded(self._config.heads * self._head_width, self._columns)

        def stacked(arrays: Sequence[NDArray[Any]], filler: int = 0) -> NDArray[Any]:
            out = np.full((3, part, *arrays[0].shape[1:]), filler, arrays[0].dtype)
            for place, array in enumerate(arrays):
                found = self._by_head(array.reshape(len(array), -1), filler)
                out[place, : len(found)] = found.reshape(len(found), *array.shape[1:])
            return out.reshape(3 * part, *out.shape[2:])

        parts, factors = (layer.query, layer.key, layer.value), (layer.query_out, layer.key_out, layer.value_out)
        linear = Linear(stacked([each.weight for each in parts]), stacked([each.bias for each in parts]))
        factor = Dyadic(
            stacked([np.atleast_1d(each.multiplier) for each in factors]),
            stacked([np.atleast_1d(each.shift) for each in factors], 1),
        )
        ending = ending_record(blocks.TO_8_BITS, factor, 3 * part, self._arrays)
        return {"query_key_value": self._matrix(linear), "query_key_value_end": ending}

    def _by_head(self, rows: NDArray[Any], filler: int = 0) -> NDArray[Any]:
        """(D, K) rows of H heads, each head's D/H filled up: (H * head_width, K)."""
        heads = self._config.heads
        D, K = rows.shape
        out = np.full((heads, self._head_width, K), filler, rows.dtype)
        out[:, : D // heads] = rows.reshape(heads, D // heads, K)
        return out.reshape(-1, K)

    def work(self, memory: Memory, shape: Shape) -> NDArray[np.void]:
        """One `blocks.INTEGER_WORK` for a batch of this shape."""
        config, columns, item, take = self._config, self._columns, isa.chosen().item_bytes, memory.take
        wide = compiled.padded(config.heads * self._head_width, columns)
        chunk = max(blocks.CHUNK, shape.longest)
        rows = max(chunk, shape.sequences)
        widest = 4 * compiled.padded(max(config.width, wide, len(config.labels)), columns)
        x_stride, hidden = (
            item * compiled.padded(config.width, columns),
            compiled.padded(max(config.inner, config.width), columns),
        )
        probs = item * compiled.padded(shape.longest)
        values: dict[str, Any] = {
            **memory.common(),
            "x": take(shape.tokens * x_stride),
            "first": take(shape.sequences * x_stride),
            "x_stride": x_stride,
            "context": take(rows * item * wide),
            "context_stride": item * wide,
            "attended": take(rows * x_stride),
            "query_key_value": take(chunk * 3 * item * wide),
            "query_key_value_stride": 3 * item * wide,
            "hidden": take(blocks.ROWS_OF_BLOCK * item * hidden),
            "hidden_stride": item * hidden,
            "room": take(rows * widest),
            "room_stride": widest,
            **memory.each("probs", probs * shape.longest if shape.pruned else 0, config.heads),
            **memory.each("received", 8 * compiled.padded(shape.longest), 2 * config.heads),
            **memory.each("local", self._local_bytes(shape, rows, probs), shape.threads),
        }
        take(4 * columns)  # the last row's vectors may be read beyond its end
        return filled(blocks.INTEGER_WORK, values)

    def _local_bytes(self, shape: Shape, rows: int, probs: int) -> int:
        """Of one thread: bookkeeping, and a tile's sums, an embedding row or one head's attention, the largest."""
        n, columns = shape.longest, self._columns
        books = 16 * (shape.sequences + 1) + 8 * (rows + n)
        keys = (self._head_width + 4) * compiled.padded(n, columns)
        values = (n + isa.chosen().group) * compiled.padded(self._head_width, columns)
        block = blocks.QUERIES * (
            4 * compiled.padded(n, columns) + probs + 4 * compiled.padded(self._head_width, columns)
        )
        attention = keys + values + block + 4 * packing.ALIGNMENT
        return books + max(attention, 8 * self._config.width, isa.chosen().sums_bytes)
