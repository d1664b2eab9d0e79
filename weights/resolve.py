"""From a name or a path to a folder on disk. This is the one place where a new kind of name is added."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import UnknownModelError
from . import hub

MODELS = Path(__file__).parent / "models"
DEFAULT = "minilm-l6-ltp-sst2"


def bundled_names() -> list[str]:
    """Names of the models inside the package, sorted."""
    return sorted(config.parent.name for config in MODELS.glob("*/config.json"))


def is_hub_name(name_or_path: str | Path | None) -> bool:
    """Whether it is "org/name" and no folder here; a Path is never looked for on the hub."""
    if not isinstance(name_or_path, str) or not hub.NAME.fullmatch(name_or_path):
        return False
    return not os.path.isdir(name_or_path)


def resolve(name_or_path: str | Path | None, *, revision: str | None = None, local_files_only: bool = False) -> Path:
    """The model's folder: None is the bundled default; a bundled name wins over a folder of the same name.

    "org/name" that is no folder here is a repository of the hub, at a revision (None: main); see `hub.snapshot`, also
    for local_files_only and the errors it raises. Nothing else touches the network. Raises UnknownModelError for any
    other name, and for a revision of something that is no repository.
    """
    if is_hub_name(name_or_path):
        return hub.snapshot(str(name_or_path), revision, local_files_only=local_files_only)
    if revision is not None:
        raise UnknownModelError(f"a revision is for a repository of the hub; {name_or_path!r} is bundled or a path")
    if name_or_path is None:
        return MODELS / DEFAULT
    if isinstance(name_or_path, str) and name_or_path in bundled_names():
        return MODELS / name_or_path
    folder = Path(name_or_path)
    if os.path.isdir(folder):  # unlike Path.is_dir, false for a name that is too long to be one
        return folder
    raise UnknownModelError(
        f"{str(name_or_path)!r} is neither a folder nor a bundled model, nor the org/name of a model on the hub; "
        f"bundled: {', '.join(bundled_names())}"
    )
