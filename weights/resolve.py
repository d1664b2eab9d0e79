"""From a name or a path to a folder on disk. This is the one place where a new kind of name is added."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import UnknownModelError

MODELS = Path(__file__).parent / "models"
DEFAULT = "minilm-l6-ltp-sst2"


def bundled_names() -> list[str]:
    """Names of the models inside the package, sorted."""
    return sorted(config.parent.name for config in MODELS.glob("*/config.json"))


def resolve(name_or_path: str | Path | None) -> Path:
    """The model's folder: None is the bundled default; a bundled name wins over a folder of the same name.

    Raises UnknownModelError when it is neither. Nothing here touches the network.
    """
    if name_or_path is None:
        return MODELS / DEFAULT
    if isinstance(name_or_path, str) and name_or_path in bundled_names():
        return MODELS / name_or_path
    folder = Path(name_or_path)
    if os.path.isdir(folder):  # unlike Path.is_dir, false for a name that is too long to be one
        return folder
    raise UnknownModelError(
        f"{str(name_or_path)!r} is neither a folder nor a bundled model; bundled: {', '.join(bundled_names())}"
    )
