"""Kernels: arrays and scalars in, arrays out. Nothing here knows a model, a file or a config.

`NUMPY` lists them by operation name; tests walk the list against `minilpt.reference`, which has the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .attention import attention_context, attention_mass, attention_probs
from .elementwise import gelu, gelu_tanh, relu, tanh
from .rows import layer_norm, linear

NUMPY: Mapping[str, Callable[..., Any]] = {
    "linear": linear,
    "layer_norm": layer_norm,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": relu,
    "tanh": tanh,
    "attention_probs": attention_probs,
    "attention_mass": attention_mass,
    "attention_context": attention_context,
}
