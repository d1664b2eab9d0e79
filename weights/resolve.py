"""From a name or a path to a folder on disk. This is the one place where a new kind of name is added."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ModelConfig, read_json
from ..errors import InputError, UnknownModelError
from . import hub
from .cards import Card, curated_names, read_card

MODELS = Path(__file__).parent / "models"
DEFAULT = "minilm-l6-ltp-sst2"


@dataclass(frozen=True)
class Source:
    """Where a model's files are and where they come from.

    repository, commit: of the hub, None for a folder of one's own and for bundled models. card: of a curated name.
    """

    folder: Path
    repository: str | None = None
    commit: str | None = None
    card: Card | None = None

    @property
    def thresholds(self) -> Path | None:
        """The file that holds a curated name's thresholds, once they are found; None where the folder's own count."""
        return self.card.thresholds(self.commit) if self.card and self.commit else None

    def labelled(self, config: ModelConfig) -> ModelConfig:
        """What the folder's config.json says, under the label names of the card if there is one.

        Raises UnsupportedModelError where the two do not fit together.
        """
        return self.card.applied(config, self.commit) if self.card and self.commit else config

    def settings(self) -> dict[str, Any]:
        """The content of config.json, with the label names and problem type of the card if there is one."""
        content = read_json(self.folder / "config.json")
        if self.card is None:
            return content
        labels = {str(number): label for number, label in enumerate(self.card.labels)}
        return content | {"id2label": labels, "problem_type": self.card.problem_type or content.get("problem_type")}


def bundled_names() -> list[str]:
    """Names of the models inside the package, sorted."""
    return sorted(config.parent.name for config in MODELS.glob("*/config.json"))


def resolve(name_or_path: str | Path | None, *, revision: str | None = None, local_files_only: bool = False) -> Source:
    """The model's folder: None is the bundled default; a name of ours wins over a folder of the same name.

    A string that is no folder and reads "owner/name" is a repository of the hub, at `revision`, and so is what stands
    behind a curated name, at its card's revision unless another is given; both are downloaded if need be, as
    `hub.fetch` says. Nothing else touches the network.
    Raises UnknownModelError when it is none of these, InputError for a revision of what has none, and as `hub.fetch`.
    """
    if isinstance(name_or_path, str) and name_or_path in curated_names():
        card = read_card(name_or_path)
        found = hub.fetch(card.repository, revision or card.revision, local_files_only=local_files_only)
        return Source(found.folder, card.repository, found.commit, card)
    folder = _local(name_or_path)
    if folder is not None:
        if revision is not None:
            raise InputError(f"revision {revision!r} is for names of the hub; {str(folder)!r} is a folder here")
        return Source(folder)
    if isinstance(name_or_path, str) and hub.is_repository(name_or_path):
        found = hub.fetch(name_or_path, revision, local_files_only=local_files_only)
        return Source(found.folder, name_or_path, found.commit)
    raise UnknownModelError(
        f"{str(name_or_path)!r} is neither a folder nor a name that minilpt knows, and not a hub's owner/name; "
        f"bundled: {', '.join(bundled_names())}; curated: {', '.join(curated_names())}"
    )


def _local(name_or_path: str | Path | None) -> Path | None:
    if name_or_path is None:
        return MODELS / DEFAULT
    if isinstance(name_or_path, str) and name_or_path in bundled_names():
        return MODELS / name_or_path
    folder = Path(name_or_path)
    return folder if os.path.isdir(folder) else None  # unlike Path.is_dir, false for a name that is too long to be one
