"""Curated names: which checkpoint of a hub stands behind one, what it must look like, how its thresholds are found.

A card (`cards/NAME.json`) invents no thresholds: they are searched on the user's machine, on weights that are there,
and kept in the user's cache. The texts to search on are bundled (`cards/texts/`; README.md says where they come from).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config import ModelConfig, read_json
from ..errors import UnsupportedModelError
from ..kernels import compiled

CARDS = Path(__file__).parent / "cards"
TextOrPair = str | tuple[str, str]


@dataclass(frozen=True)
class Card:
    """What `cards/NAME.json` says.

    repository, revision: of the plain fine-tuned checkpoint. task: of `minilpt eval`, or "". labels: in the order of
    the outputs, for checkpoints that number theirs (LABEL_0) or name the same ones. problem_type: as in config.json,
    None to leave what is there. shape: fields of ModelConfig that the checkpoint must have. flops_ratio, seed: what
    `calibrate` is asked for. texts: the name of a file of bundled texts. verified: whether repository, revision and
    labels were checked against the hub; note: what was and what was not.
    """

    name: str
    repository: str
    revision: str
    task: str
    labels: tuple[str, ...]
    problem_type: str | None
    shape: dict[str, Any]
    flops_ratio: float
    seed: int
    texts: str
    verified: bool
    note: str

    @cached_property
    def calibration_texts(self) -> list[TextOrPair]:
        """The bundled texts, or pairs, without labels."""
        lines = _text_file(self.texts).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return [row if isinstance(row, str) else (row[0], row[1]) for row in rows]

    @cached_property
    def texts_hash(self) -> str:
        """SHA-256 of the file of texts."""
        return hashlib.sha256(_text_file(self.texts).read_bytes()).hexdigest()

    def thresholds(self, commit: str) -> Path:
        """Where the thresholds for this commit of the checkpoint are kept: a file for each recipe and its texts."""
        recipe = [self.repository, commit, self.flops_ratio, self.seed, self.texts_hash, self.labels, self.problem_type]
        key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
        return compiled.cache_folder() / "curated" / f"{self.name}-{key}.json"

    def applied(self, config: ModelConfig, commit: str) -> ModelConfig:
        """The checkpoint's settings under the card's label names and problem type.

        Raises UnsupportedModelError if the shape is not the card's, or if the checkpoint's own names contradict it.
        """
        place = f"{self.repository} at commit {commit}"
        for field, value in self.shape.items():
            if getattr(config, field) != value:
                raise UnsupportedModelError(
                    f"{place}: {field} is {getattr(config, field)!r}, and the card of {self.name} is for {value!r}; "
                    f"load the repository by its own name"
                )
        if len(config.labels) != len(self.labels):
            raise UnsupportedModelError(
                f"{place}: {len(config.labels)} labels, and the card of {self.name} is for {', '.join(self.labels)}"
            )
        numbered = [label.upper() == f"LABEL_{number}" for number, label in enumerate(config.labels)]
        same = [_plain(own) == _plain(card) for own, card in zip(config.labels, self.labels, strict=True)]
        if not all(numbered) and not all(same):
            raise UnsupportedModelError(
                f"{place}: its labels are {', '.join(config.labels)}, and the card of {self.name} has "
                f"{', '.join(self.labels)}: one of the two is wrong; load the repository by its own name"
            )
        return replace(config, labels=self.labels, problem_type=self.problem_type or config.problem_type)


def curated_names() -> list[str]:
    """Names that have a card, sorted."""
    return sorted(path.stem for path in CARDS.glob("*.json"))


def read_card(name: str) -> Card:
    """The card of a curated name. A wrong one is our own mistake: tests read them all."""
    content = read_json(CARDS / f"{name}.json")
    return Card(name=name, **content | {"labels": tuple(content["labels"])})


def _text_file(name: str) -> Path:
    return CARDS / "texts" / f"{name}.jsonl"


def _plain(label: str) -> str:
    return label.lower().replace("-", "_").replace(" ", "_")
