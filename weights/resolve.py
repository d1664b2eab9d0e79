"""From a name or a path to a folder on disk. This is the one place where a new kind of name is added."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ModelConfig, read_json
from ..errors import UnknownModelError
from . import hub
from .cards import Card, curated_names, read_card

MODELS = Path(__file__).parent / "models"
DEFAULT = "minilm-l6-ltp-sst2"


@dataclass(frozen=True)
class Source:
    """Where a model's files are, and the card of a curated name."""

    folder: Path
    card: Card | None = None

    @property
    def repository(self) -> str | None:
        """Of a model in the hub's cache."""
        found = hub.origin(self.folder)
        return found and found[0]

    @property
    def commit(self) -> str | None:
        """Of a model in the hub's cache."""
        found = hub.origin(self.folder)
        return found and found[1]

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


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a model's folder that loading may read."""
    read = sorted({*folder.glob("*.safetensors"), *folder.glob("*.json")} - set(folder.glob("results*.json")))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in read}


def damaged(folder: Path) -> list[str]:
    """Files of a bundled model that are not, or no longer, those that its card (README.md) lists by their SHA-256."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| (\S+) \| ([0-9a-f]{64}) \|$", card, flags=re.MULTILINE))
    found = hashes(folder)
    return sorted(name for name in listed.keys() | found.keys() if listed.get(name) != found.get(name))


def is_hub_name(name_or_path: str | Path | None) -> bool:
    """Whether it is "org/name" and no folder here; a Path is never looked for on the hub."""
    if not isinstance(name_or_path, str) or not hub.NAME.fullmatch(name_or_path):
        return False
    return not os.path.isdir(name_or_path)


def resolve(name_or_path: str | Path | None, *, revision: str | None = None, local_files_only: bool = False) -> Source:
    """The model's folder: None is the bundled default; a name of ours wins over a folder of the same name.

    "org/name" that is no folder here is a repository of the hub, at a revision (None: main), and so is what stands
    behind a curated name, at its card's revision unless another is given; see `hub.snapshot`, also for local_files_only
    and the errors it raises. Nothing else touches the network. Raises UnknownModelError for any other name, and for a
    revision of something that is no repository.
    """
    if isinstance(name_or_path, str) and name_or_path in curated_names():
        card = read_card(name_or_path)
        at = revision or card.revision
        return Source(hub.snapshot(card.repository, at, local_files_only=local_files_only), card)
    if is_hub_name(name_or_path):
        return Source(hub.snapshot(str(name_or_path), revision, local_files_only=local_files_only))
    if revision is not None:
        raise UnknownModelError(f"a revision is for a repository of the hub; {name_or_path!r} is bundled or a path")
    if name_or_path is None:
        return Source(MODELS / DEFAULT)
    if isinstance(name_or_path, str) and name_or_path in bundled_names():
        return Source(MODELS / name_or_path)
    folder = Path(name_or_path)
    if os.path.isdir(folder):  # unlike Path.is_dir, false for a name that is too long to be one
        return Source(folder)
    raise UnknownModelError(
        f"{str(name_or_path)!r} is neither a folder nor a bundled model, nor the org/name of a model on the hub; "
        f"bundled: {', '.join(bundled_names())}; curated: {', '.join(curated_names())}"
    )
