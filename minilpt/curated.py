"""The first use of a curated name: thresholds for the checkpoint behind it, searched here and kept in a cache."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from . import __version__
from .api import Classifier
from .calibration import Calibration, calibrate
from .errors import InputError
from .files import write_whole
from .kernels import compiled
from .weights.cards import Card
from .weights.resolve import Source

# At this level it reaches stderr unasked: minutes of work and a file that later answers depend on are no detail.
_say = logging.getLogger("minilpt").warning


def keep_thresholds(source: Source, dense: Callable[[], Classifier]) -> None:
    """Search and write the file `source.thresholds` of a curated name if it is not there; says so on stderr.

    dense: loads the unpruned model. Of several processes one searches, and the others wait for the file.
    Raises InputError if the cache cannot be written to, and as `calibrate` does.
    """
    card, path = source.card, source.thresholds
    assert card is not None and path is not None and source.commit is not None
    if path.is_file():
        return
    with _alone(path, card.name):
        if path.is_file():
            return
        texts = card.calibration_texts
        _say(
            "%s: searching thresholds for %s at commit %s on %d bundled texts without labels, once: it takes minutes",
            *(card.name, card.repository, source.commit[:12], len(texts)),
        )
        progress = sys.stderr.isatty()
        found = calibrate(dense(), texts, flops_ratio=card.flops_ratio, seed=card.seed, progress=progress)
        if found.interrupted:  # a shorter search has found less than the card asks for, and nothing of it is kept
            raise KeyboardInterrupt
        write_whole(path, json.dumps(_record(found, card, source.commit), indent=2) + "\n")
        _say("%s: %s. Kept in %s", card.name, _measured(found), path)
        if not card.verified:
            _say("%s: %s", card.name, card.note)


@contextmanager
def _alone(path: Path, name: str) -> Iterator[None]:
    """In a folder that is there, with no other process inside for this file."""
    from filelock import FileLock, Timeout

    lock = FileLock(path.with_suffix(".lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _say("%s: another process searches its thresholds; waiting for it", name)
            lock.acquire()
    except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
        raise InputError(
            f"{path.parent}: the thresholds of {name} cannot be kept here: {error}; set {compiled.CACHE_VARIABLE} to a "
            f"folder that can be written, or load it with pruning=None"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _record(found: Calibration, card: Card, commit: str) -> dict[str, object]:
    """The ltp.json, with what stands behind the name in its provenance."""
    record = found.pruning
    record["provenance"] |= {
        "minilpt": __version__,
        "card": card.name,
        "repository": card.repository,
        "commit": commit,
        "texts_file": {"name": card.texts, "sha256": card.texts_hash},
        "agreement": found.chosen.agreement,
        "agreement_lower": found.chosen.agreement_lower,
        "kl": found.chosen.kl,
    }
    return record


def _measured(found: Calibration) -> str:
    chosen, texts = found.chosen, found.provenance["texts"]["held_out"]
    spent = f"{chosen.flops_ratio:.0%} of the dense FLOPs as counted"
    if chosen.agreement is None or chosen.agreement_lower is None:
        return f"{spent}; half the mean squared difference is {chosen.kl:.4f} on {texts} texts the search did not see"
    return (
        f"{spent}; of {texts} texts that the search did not see, {chosen.agreement:.1%} keep the dense model's label "
        f"(at least {chosen.agreement_lower:.1%}, with 95 % confidence)"
    )
