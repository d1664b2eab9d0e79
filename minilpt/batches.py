"""Sequences in batches of similar length, and their results in the order in which they came."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import ragged
from .config import ModelConfig
from .errors import InputError
from .ragged import TokenBatch
from .text import Encoded

Run = Callable[[TokenBatch], Sequence[NDArray[Any]]]  # gives arrays of (B, ...)


def token_batch(config: ModelConfig, ids: Sequence[ArrayLike], segments: Sequence[ArrayLike]) -> TokenBatch:
    """The batch of B sequences, none of them empty. ids, segments: (n,) integers each."""
    rows = [np.asarray(row, np.int32) for row in ids]
    offset, pad = config.position_offset, config.pad_token_id
    places = [ragged.positions(row, offset=offset, pad_token_id=pad) for row in rows]
    bounds = ragged.boundaries([len(row) for row in rows])
    return TokenBatch(_packed(rows), _packed(places), _packed(segments), bounds)


def _packed(rows: Sequence[ArrayLike]) -> NDArray[np.int32]:
    return np.concatenate([np.zeros(0, np.int32), *(np.asarray(row, np.int32) for row in rows)])


def flattened(texts: Sequence[Sequence[Encoded]]) -> tuple[list[Encoded], NDArray[np.intp]]:
    """The sequences of all texts, each of which has one at least, and where each text's begin among them, (texts,)."""
    starts = np.cumsum([0, *map(len, texts)])[:-1]
    return [sequence for text in texts for sequence in text], starts


def in_batches(
    config: ModelConfig, sequences: Sequence[Encoded], batch_tokens: int, progress: bool, run: Run
) -> list[NDArray[Any]]:
    """What `run` gives for batches of at most batch_tokens tokens, (S, ...) arrays in the order of the S sequences.

    progress: a bar on stderr. Raises InputError for a batch_tokens that is no positive integer.
    """
    if not isinstance(batch_tokens, int) or isinstance(batch_tokens, bool) or batch_tokens < 1:
        raise InputError(f"batch_tokens must be a positive integer, found {batch_tokens!r}")
    places, parts = [], []
    # tqdm takes 20 ms to import
    with progress_bar(len(sequences), True, "sequence") if progress else nullcontext() as bar:
        for indices in by_length([len(sequence.ids) for sequence in sequences], batch_tokens):
            batch = [sequences[index] for index in indices]
            parts.append(run(token_batch(config, [each.ids for each in batch], [each.segments for each in batch])))
            places += indices
            if bar is not None:
                bar.update(len(indices))
    order = np.argsort(places)
    return [np.concatenate(column)[order] for column in zip(*parts, strict=True)]


def by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Places of the sequences, longest first, in batches of at most batch_tokens tokens (one sequence at least).

    For no sequences there is one batch without any.
    """
    batch: list[int] = []
    total = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and total + lengths[index] > batch_tokens:
            yield batch
            batch, total = [], 0
        batch.append(index)
        total += lengths[index]
    yield batch


def progress_bar(total: float | None, wanted: bool, unit: str = "text") -> Any:
    """A tqdm bar on stderr, silent unless wanted."""
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, disable=not wanted)
