"""Static scales of activations for integer-only inference: integer.json, or what an I-BERT checkpoint carries.

A scale is what one unit of an activation's integer stands for. Names are ours: `layers.N.` and `activation_names`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import files
from .config import ModelConfig, read_json
from .errors import ModelFileError, WeightsError
from .kernels.integer import ACTIVATION_BITS, EXP_OUTPUT_BITS
from .weights import checkpoint, names

FILE_NAME = "integer.json"
SCHEMA_VERSION = 1
SUM_BITS, NORM_INPUT_BITS = 16, 22
MOST_EXPONENT = 30
AGAIN = ".again"  # an activation that I-BERT requantises a second time
UNSET = 1.1e-5  # I-BERT's ranges begin with +-1e-5

_LAYER_BITS = {
    "query": ACTIVATION_BITS,
    "key": ACTIVATION_BITS,
    "value": ACTIVATION_BITS,
    "exp": EXP_OUTPUT_BITS,
    "context": ACTIVATION_BITS,
    "attention_sum": NORM_INPUT_BITS,
    "attention_norm": ACTIVATION_BITS,
    "attention_norm.again": ACTIVATION_BITS,
    "inner": ACTIVATION_BITS,
    "inner.again": ACTIVATION_BITS,
    "outer_sum": NORM_INPUT_BITS,
    "outer_norm": ACTIVATION_BITS,
}


@dataclass(frozen=True)
class Scales:
    """scales: a float32 (or float64: then all are) for each of `activation_names`.

    exponents: behind a LayerNorm, (D,) integers k: channel c has the scale times 2^k_c, and the weights that read it
    have been multiplied by as much. shifts: of each LayerNorm that drops bits of deviations before it squares them.
    from_file: they are integer.json's, and not an I-BERT checkpoint's own.
    """

    scales: Mapping[str, Any]
    exponents: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    shifts: Mapping[str, int] = field(default_factory=dict)
    from_file: bool = False

    def by_channel(self, name: str) -> Any:
        """The scale, or (D,) of them."""
        exponents, scale = self.exponents.get(name.removesuffix(AGAIN)), self.scales[name]
        return scale if exponents is None else np.ldexp(scale, exponents)


def activation_names(config: ModelConfig) -> dict[str, int]:
    """Every static scale that a model needs, with the bits of its integers."""
    layers = {f"layers.{at}.{name}": bits for at in range(config.layers) for name, bits in _LAYER_BITS.items()}
    head = {} if config.head_activation == "tanh" else {"head.dense": ACTIVATION_BITS}
    return {"embeddings.sum": SUM_BITS, "embeddings.norm": ACTIVATION_BITS} | layers | head


def scale_of(largest: Any, bits: int) -> Any:
    """The scale at which `largest`, a floating number, is the largest integer of so many bits, in its dtype."""
    return np.maximum(largest, largest.dtype.type(1e-8)) / largest.dtype.type(2 ** (bits - 1) - 1)


def read_scales(folder: Path, config: ModelConfig) -> Scales:
    """From integer.json, or from the buffers of a checkpoint with quant_mode true.

    Raises ModelFileError for a file that is missing or damaged, WeightsError for buffers that are missing or were never
    set by training.
    """
    if config.quant_mode and not (folder / FILE_NAME).is_file():
        return _from_buffers(folder, config)
    return _from_file(folder / FILE_NAME, config)


def _from_buffers(folder: Path, config: ModelConfig) -> Scales:
    modules, scales = names.activation_modules(config), {}
    ends = [f"{module}.{end}" for module in modules.values() for end in ("x_min", "x_max")]
    norms = names.norm_modules(config)
    found = checkpoint.read_numbers(folder, config.family, [*ends, *(f"{module}.shift" for module in norms.values())])
    for name, bits in activation_names(config).items():
        lowest, highest = (found.get(f"{modules[name]}.{end}") for end in ("x_min", "x_max"))
        if lowest is None or highest is None:
            raise WeightsError(
                f"{folder}: quant_mode is true, but {modules[name]} has no x_min and x_max; save the checkpoint with "
                f"its buffers, or quantise the float one: minilpt quantize MODEL TEXTS --out DIR"
            )
        largest = np.maximum(abs(lowest), abs(highest))  # NaN stays
        if not UNSET < largest < np.inf:
            raise WeightsError(f"{folder}: {modules[name]} has the range {lowest} to {highest}: training never set it")
        scales[name] = scale_of(largest, bits)
    shifts = {name: found.get(f"{module}.shift", np.float32(0)) for name, module in norms.items()}
    for name, shift in shifts.items():
        if shift not in range(NORM_INPUT_BITS):
            raise WeightsError(f"{folder}: the LayerNorm {name} shifts by {shift} bits; wanted a whole number below 22")
    return Scales(scales, {}, {name: int(shift) for name, shift in shifts.items()})


def _from_file(path: Path, config: ModelConfig) -> Scales:
    if not path.is_file():
        raise ModelFileError(
            f"{path}: no such file; integer-only inference needs the ranges of activations: "
            f"minilpt quantize {path.parent} TEXTS --out DIR"
        )
    raw = read_json(path)
    if raw.get("schema_version") != SCHEMA_VERSION:
        raise ModelFileError(
            f"{path}: schema_version {raw.get('schema_version')!r}; this release reads {SCHEMA_VERSION}"
        )
    wanted = activation_names(config)
    scales, exponents = raw.get("scales"), raw.get("exponents", {})
    if not isinstance(scales, dict) or set(scales) != set(wanted):
        raise ModelFileError(f"{path}: scales must name the {len(wanted)} activations of this model and no others")
    for name, value in scales.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 1e-30 < value < 1e30:
            raise ModelFileError(f"{path}: the scale of {name} must be a positive number, found {value!r}")
    norms = {name for name in wanted if name.endswith("norm")}
    if not isinstance(exponents, dict) or not set(exponents) <= norms:
        raise ModelFileError(f"{path}: exponents must name outputs of LayerNorms, found {exponents!r:.80}")
    for name, values in exponents.items():
        good = isinstance(values, list) and len(values) == config.width
        if not good or not all(type(value) is int and 0 <= value <= MOST_EXPONENT for value in values):
            raise ModelFileError(
                f"{path}: exponents of {name} must be {config.width} integers from 0 to {MOST_EXPONENT}"
            )
    return Scales(
        {name: np.float32(value) for name, value in scales.items()},
        {name: np.array(values, np.int64) for name, values in exponents.items()},
        from_file=True,
    )


def write_scales(path: Path, scales: Scales, provenance: Mapping[str, Any]) -> None:
    """integer.json, whole or not at all."""
    record = {
        "schema_version": SCHEMA_VERSION,
        "scales": {name: float(value) for name, value in scales.scales.items()},
        "exponents": {name: values.tolist() for name, values in scales.exponents.items()},
        "provenance": dict(provenance),
    }
    files.write_whole(path, json.dumps(record, indent=2) + "\n")
