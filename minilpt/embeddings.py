"""From the last layer's rows to one vector a text, and what the files of sentence-transformers say of it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .config import MODULES, read_json, read_json_list
from .errors import UnsupportedModelError

POOLINGS = ("mean", "cls")
SHORTEST = 1e-12  # the least length that a vector is divided by, as torch.nn.functional.normalize has it

# Keys of a Pooling module's config.json before sentence-transformers 6 -> what its `pooling_mode` says since.
_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


class Embedding(NamedTuple):
    """How rows become embeddings. pooling: one of POOLINGS; normalize: to length 1."""

    pooling: str = "mean"
    normalize: bool = True


def means(rows: NDArray[np.float32], cu_seqlens: NDArray[np.int32]) -> NDArray[np.float64]:
    """Each sequence's mean row, (B, D): a sum in float64 that no other sequence has a part in. rows: (N', D)."""
    spans = pairwise(cu_seqlens.tolist())
    pooled = [rows[begin:end].mean(axis=0, dtype=np.float64) for begin, end in spans]
    return np.array(pooled).reshape(-1, rows.shape[1])


def normalized(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """(B, D), each of length 1, or shorter if it was shorter than SHORTEST."""
    lengths = np.sqrt((vectors**2).sum(axis=1, keepdims=True))
    return vectors / np.maximum(lengths, SHORTEST)


def read_embedding(folder: Path) -> Embedding:
    """What modules.json says, or `Embedding()` where there is none.

    Raises ModelFileError for files that cannot be read, UnsupportedModelError for modules and settings that would give
    other embeddings than minilpt's.
    """
    path = folder / MODULES
    if not path.is_file():
        return Embedding()
    modules = read_json_list(path)
    kinds = [_kind(module) for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise _unsupported(path, f"wanted Transformer, Pooling and perhaps Normalize, found {', '.join(kinds)}")
    if modules[0].get("path"):
        raise _unsupported(path, f"the Transformer must be in the folder itself, not in {modules[0]['path']!r}")
    settings = folder / "config_sentence_transformers.json"
    prompt = read_json(settings).get("default_prompt_name") if settings.is_file() else None
    if prompt:
        raise _unsupported(settings, f"default_prompt_name {prompt!r}: put the prompt before the texts yourself")
    name = str(modules[1].get("path"))
    if Path(name).name != name:
        raise _unsupported(path, f"the Pooling module's path {name!r} is not the plain name of a folder here")
    return Embedding(_pooling(folder / name / "config.json"), len(kinds) == 3)


def _kind(module: Any) -> str:
    """The class of a module of sentence-transformers, which moved them between its own packages more than once."""
    name = str(module.get("type")) if isinstance(module, dict) else repr(module)
    return name.rsplit(".", 1)[-1] if name.startswith("sentence_transformers.") else name


def _pooling(path: Path) -> str:
    settings = read_json(path)
    mode = settings.get("pooling_mode", [name for key, name in _MODES.items() if settings.get(key)] or "mean")
    (mode, *others) = mode if isinstance(mode, list) and mode else [mode]
    if others or mode not in POOLINGS:
        raise _unsupported(path, f"wanted one pooling mode, {' or '.join(POOLINGS)}, found {[mode, *others]}")
    return str(mode)


def _unsupported(path: Path, message: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{path}: {message}; or choose pooling= and normalize= yourself")
