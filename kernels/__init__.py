"""Kernels: arrays and scalars in, arrays out. Nothing here knows a model, a file or a config.

`NUMPY` and `COMPILED` list them by operation name; tests walk the lists against `minilpt.reference`, which has the same
names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from . import compiled
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

COMPILED: Mapping[str, Callable[..., Any]] = {
    "linear": compiled.linear,
    "linear_int8": compiled.linear_int8,
    "layer_norm": compiled.layer_norm,
    "gelu": compiled.gelu,
    "gelu_tanh": compiled.gelu_tanh,
    "relu": compiled.relu,
    "tanh": compiled.tanh,
    "softmax": compiled.softmax,
    "attention_probs": compiled.attention_probs,
    "attention_mass": compiled.attention_mass,
    "attention_context": compiled.attention_context,
    "merged_row": compiled.merged_row,
}
