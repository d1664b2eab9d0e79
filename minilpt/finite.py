"""Where an answer that is not finite comes from: a weight, or the first layer whose output is not finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import reference
from .config import ModelConfig
from .errors import NumbersError
from .pruning import KeepRule
from .quantize import quantize_layers
from .weights import checkpoint

Int32 = NDArray[np.int32]


def not_finite(
    folder: Path, config: ModelConfig, rule: KeepRule | None, precision: str, ids: Int32, segments: Int32
) -> NumbersError:
    """The error for a sequence, ids and segments (n,), whose answer is not finite.

    Raises WeightsError if the weights are the cause. Runs the sequence once more, by the reference.
    """
    weights = checkpoint.load_weights(folder, config)
    weights.check_word_table()
    with np.errstate(all="ignore"):
        outputs = _outputs(quantize_layers(weights) if precision == "int8" else weights, config, rule, ids, segments)
        found = next((name for name, rows in outputs if not np.isfinite(rows).all()), None)
    where = f"the output of {found} is the first" if found else "none was when NumPy ran it again in float32"
    return NumbersError(
        f"{folder}: the answer to a sequence of {len(ids)} tokens is not finite, though all weights are: {where}; "
        f"activations outgrew the floating-point type, so this checkpoint cannot answer this text"
    )


def _outputs(
    weights: Mapping[str, Any], config: ModelConfig, rule: KeepRule | None, ids: Int32, segments: Int32
) -> Iterator[tuple[str, NDArray[np.floating]]]:
    """What each part of the model gives, in order."""
    x = reference.embed(weights, config, ids, segments)  # (n, D)
    yield "embeddings", x
    for layer in range(config.layers):
        x = reference.encoder_layer(weights, config, rule, layer, x, n_initial=len(ids))[0]  # (n', D)
        yield f"layers.{layer}", x
    if config.labels:
        yield "head", reference.head(weights, config, x[0])
