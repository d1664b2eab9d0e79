"""Golden files: the integers of an integer-only model and of its way through some texts, for other implementations.

One safetensors file. Of the model, under `model.`: weights, biases, multipliers, shifts and the constants of
`kernels.integer`, so that nothing is left to compute from scales; of its keep rule, under `rule.`. Of text t, under
`texts.t.`: ids of tokens, positions and segments, and every activation of `integer_reference`, layer by layer.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import integer_reference, ragged
from .api import Classifier, Item, text_items
from .errors import InputError, UnsupportedModelError
from .files import write_whole
from .integer_program import IntegerProgram

FORMAT = "minilpt-golden-1"


def export_golden(model: Classifier, texts: Iterable[Item], out: Path | str) -> Path:
    """Write the file for texts or pairs; returns its path.

    Arrays have the smallest signed type that holds them; masses and scores are as `integer_reference` defines them. The
    metadata has the texts, the activations, the heads and the scale of the logits.
    Raises UnsupportedModelError if the model is not of precision "ibert", InputError without a text.
    """
    from safetensors.numpy import save

    items = text_items(texts)
    if not items:
        raise InputError("a golden file needs at least one text")
    program = integer_program(model)
    rule = program.integer_rule(model.pruning.rule) if model.pruning else None
    tensors = dict(_constants("model", program.model))
    if rule is not None:
        for name in ("kind", "denominator", "limit", "merge"):
            tensors[f"rule.{name}"] = np.array([int(getattr(step, name)) for step in rule.steps])
        tensors |= {"rule.lowest": np.array(rule.lowest), "rule.counts": rule.counts}
    for at, (ids, segments) in enumerate(zip(*model.encode(items), strict=True)):
        arrays = np.array(ids, np.int32), np.array(segments, np.int32)
        traced = integer_reference.forward(program.model, model.config, rule, *arrays)
        config = model.config
        positions = ragged.positions(arrays[0], offset=config.position_offset, pad_token_id=config.pad_token_id)
        rows = {"ids": arrays[0], "segments": arrays[1], "positions": positions}
        tensors |= {f"texts.{at}.{name}": row for name, row in rows.items()}
        places = ["embeddings", *(f"layers.{layer}" for layer in range(model.config.layers)), "head"]
        for place, step in zip(places, traced.steps, strict=True):
            tensors |= {f"texts.{at}.{place}.{name}": values for name, values in step.items()}
    metadata = {
        "format": FORMAT,
        "texts": json.dumps(items),
        "heads": str(model.config.heads),
        "activation": model.config.activation,
        "head_activation": model.config.head_activation,
        "logit_scale": repr(program.model.logit_scale),
        "masses_of_8_bits": str(program.model.masses_of_8_bits),
    }
    path = Path(out)
    write_whole(path, save({name: narrowed(values) for name, values in tensors.items()}, metadata))
    return path


def integer_program(model: Classifier) -> IntegerProgram:
    """The integers behind a model of precision "ibert"; UnsupportedModelError for any other."""
    program = getattr(model.engine, "program", None)
    if not isinstance(program, IntegerProgram):
        raise UnsupportedModelError(
            f'a golden file is made of integers: precision="ibert" is needed, found "{model.backend.precision}"'
        )
    return program


def _constants(name: str, value: Any) -> Iterator[tuple[str, NDArray[Any]]]:
    """Every array and integer of a record of records."""
    fields: Mapping[str, Any] = {}
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif hasattr(value, "_asdict"):
        fields = value._asdict()
    elif isinstance(value, tuple):
        fields = {str(at): each for at, each in enumerate(value)}
    elif value is not None and np.issubdtype(np.asarray(value).dtype, np.integer):
        yield name, np.asarray(value)
    for field, each in fields.items():
        yield from _constants(f"{name}.{field}", each)


def narrowed(values: NDArray[Any]) -> NDArray[Any]:
    """In the smallest signed integer type that holds them, contiguous."""
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    for dtype in (np.int8, np.int16, np.int32):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return np.ascontiguousarray(values, dtype)
    return np.ascontiguousarray(values, np.int64)
