"""Write a model folder's weights: whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..quantize import quantize_rows
from .checkpoint import SCALE_SUFFIX, SINGLE


def save_weights(folder: Path, tensors: Mapping[str, NDArray[np.float32]], *, int8_rows: bool = False) -> Path:
    """Write model.safetensors under the names given (a checkpoint's names), float32, or matrices as int8 rows.

    Returns the file's path. The file appears under its name only when it is complete.
    """
    from safetensors.numpy import save_file

    stored: dict[str, NDArray[Any]] = {}
    for name, tensor in tensors.items():
        if int8_rows and tensor.ndim == 2:
            stored[name], stored[name + SCALE_SUFFIX] = quantize_rows(tensor)
        else:
            stored[name] = np.ascontiguousarray(tensor)
    target = folder / SINGLE
    partial = target.with_suffix(".partial")
    save_file(stored, partial, metadata={"format": "np"})
    partial.chmod(0o644)  # the safetensors package makes files that only their owner can read
    os.replace(partial, target)
    return target
