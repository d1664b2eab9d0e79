"""Tiny model folders made on the spot, without torch: random weights under each family's own names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minilpt.config import read_config
from minilpt.weights import names, save

_BERT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
_ROBERTA = _BERT | {"max_position_embeddings": 42, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1}

CONFIGS: dict[str, dict[str, Any]] = {
    "bert": _BERT | {"model_type": "bert"},
    "roberta": _ROBERTA | {"model_type": "roberta"},
    "xlm-roberta": _ROBERTA | {"model_type": "xlm-roberta"},
    "camembert": _ROBERTA | {"model_type": "camembert"},
    "distilbert": {
        "model_type": "distilbert",
        "vocab_size": 60,
        "dim": 32,
        "n_layers": 3,
        "n_heads": 4,
        "hidden_dim": 48,
        "max_position_embeddings": 40,
        "activation": "gelu",
        "pad_token_id": 0,
    },
    "electra": _BERT | {"model_type": "electra", "embedding_size": 20},
    "ibert": _ROBERTA | {"model_type": "ibert", "quant_mode": False},
    "ltp": _ROBERTA
    | {"model_type": "ltp", "quant_mode": False, "prune_mode": "absolute_threshold", "final_token_threshold": 0.01},
}


def config(model_type: str = "bert", labels: int = 3, **changes: Any) -> dict[str, Any]:
    """The content of a config.json; a change to None removes the key."""
    content = CONFIGS[model_type] | {"id2label": {str(i): f"class-{i}" for i in range(labels)}} | changes
    return {key: value for key, value in content.items() if value is not None}


def tensors(folder: Path, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Random weights for the folder's config.json, by the checkpoint's names. Norm weights lie around one."""
    draw = np.random.default_rng(seed)
    model = read_config(folder)
    stored, shapes = names.checkpoint_names(model), names.expected_shapes(model)
    made = {}
    for ours, shape in shapes.items():
        # Spread wide enough for attention to differ between tokens, or no threshold could tell them apart.
        scale = 0.3 if len(shape) == 2 else 0.1
        centre = 1.0 if ours.endswith("norm.weight") else 0.0
        made[stored[ours]] = (centre + scale * draw.standard_normal(shape)).astype(np.float32)
    return made


def write(folder: Path, content: dict[str, Any] | None = None, seed: int = 0) -> Path:
    """A whole tiny checkpoint (config.json, model.safetensors, no tokenizer) in `folder`, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content or config()))
    save.save_weights(folder, tensors(folder, seed))
    return folder


WORDS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "good",
    "bad",
    "a",
    "film",
    "not",
    "##s",
    "##ly",
    "the",
    "!",
    ",",
)


def write_vocabulary(folder: Path, **settings: Any) -> Path:
    """A WordPiece vocab.txt and a tokenizer_config.json with these settings."""
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
