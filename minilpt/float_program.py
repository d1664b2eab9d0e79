"""Float32 and int8 weights for the compiled engine: packed once, with the layout of the scratch memory they need.

Legend: B sequences, N packed tokens, H heads, D width, F inner width, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .compiled_engine import Memory, Rules, Shape, filled
from .config import ModelConfig
from .footprint import Held, held
from .kernels import blocks, compiled, isa, packing
from .kernels.packing import Packed
from .pruning import KeepRule, Step
from .quantize import Quantized, quantize_rows

Float32 = NDArray[np.float32]

MATRICES = ("query", "key", "value", "attention_output", "inner", "outer")


class FloatProgram:
    """All weights as compiled kernels read them. record: one `blocks.MODEL`; the arrays it points to live as long."""

    part, operation = "float", blocks.RUN_FORWARD
    logits_type = masses_type = np.dtype(np.float32)
    last_width = 0
    keeps_rows = True

    @staticmethod
    def as_stored(config: ModelConfig, precision: str) -> frozenset[str]:
        """Weights that may come as the int8 rows of their file: read so, or packed so."""
        layers = range(config.layers if precision == "int8" else 0)
        matrices = {f"layers.{layer}.{part}.weight" for layer in layers for part in MATRICES}
        return frozenset({"embeddings.word.weight", *matrices})

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
        }
        if config.labels:
            values |= {"head_dense": self._matrix("head.dense", False), "head_out": self._matrix("head.out", False)}
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

    def held(self) -> Held:
        """All of its arrays."""
        return held(self._arrays)

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

    def rules(self, rule: KeepRule | None) -> Rules:
        """A `blocks.RULE` for each layer."""
        layers = range(len(self.layers))
        steps = [rule.step(layer) if rule is not None and rule.active(layer) else Step() for layer in layers]
        return Rules(np.array(steps, blocks.RULE))

    def logits(self, raw: Float32, last: NDArray[np.int32]) -> Float32:
        """(B, labels), as they are."""
        return raw

    def masses(self, raw: Float32) -> Float32:
        """(n,), as they are."""
        return raw

    def work(self, memory: Memory, shape: Shape) -> NDArray[np.void]:
        """One `blocks.WORK` for a batch of this shape."""
        sizes, take = self.record[0], memory.take
        rung, heads, head_width = isa.chosen(), int(sizes["heads"]), int(sizes["head_width"])
        columns = rung.columns
        width, wide = int(sizes["width"]), compiled.padded(heads * head_width, columns)
        chunk = max(blocks.CHUNK, shape.longest)
        rows = max(chunk, shape.sequences)
        inner = max(int(self.layers["inner"]["outputs"].max(initial=0)), width, int(sizes["embedding_width"]))
        widest = compiled.padded(max(width, wide, int(sizes["labels"])), columns)

        def take_rows(count: int, width: int) -> tuple[int, ...]:
            floats, integers = 4 * compiled.padded(width, columns), rung.item_bytes * rung.items(width)
            return (take(count * floats), floats, take(count * integers), integers, take(4 * count))

        values: dict[str, Any] = {
            **memory.common(),
            "x": take_rows(shape.tokens, width),
            "first": take_rows(shape.sequences, width),
            "context": take_rows(rows, heads * head_width),
            "attended": take_rows(rows, width),
            "hidden": take_rows(blocks.ROWS_OF_BLOCK, inner),
            "query_key_value": take(chunk * 3 * 4 * wide),
            "query_key_value_stride": 3 * 4 * wide,
            "room": take(rows * 4 * widest),
            "room_stride": 4 * widest,
        }
        stride = compiled.probs_stride_bytes(shape.longest)
        kept_rows = max(shape.longest, blocks.QUERIES) if shape.pruned else blocks.QUERIES
        keys = 4 * compiled.padded(shape.longest, columns) * head_width
        local = keys + 4 * shape.longest * (head_width + 1) + 16 * (shape.sequences + 1) + 8 * rows
        values |= memory.each("probs", stride * kept_rows, heads)
        values |= memory.each("received", stride, 2 * heads)
        values |= memory.each("local", local, shape.threads)
        take(4 * columns)  # the last row's vectors may be read beyond its end
        return filled(blocks.WORK, values)


def _by_head(rows: NDArray[Any], heads: int, head_width: int) -> NDArray[Any]:
    """(D, K) rows of H heads, each head's D/H padded with zeros: (H * head_width, K)."""
    D, K = rows.shape
    if heads * head_width == D:
        return rows
    out = np.zeros((heads, head_width, K), rows.dtype)
    out[:, : D // heads] = rows.reshape(heads, D // heads, K)
    return out.reshape(-1, K)
