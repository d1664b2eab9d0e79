"""Sequences in batches of similar length, and their results in the order in which they came."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import ragged
from .config import ModelConfig
from .errors import InputError
from .ragged import TokenBatch
from .text import Encoded

Rows = Sequence[Sequence[int] | NDArray[np.integer]]  # (n,) each
Run = Callable[[TokenBatch], Sequence[NDArray[Any]]]  # gives arrays of (B, ...)


def token_batch(config: ModelConfig, ids: Rows, segments: Rows) -> TokenBatch:
    """The batch of B sequences, none of them empty. ids, segments: (n,) integers each."""
    packed, bounds = _packed(ids), ragged.boundaries([len(row) for row in ids])
    offset, pad = config.position_offset, config.pad_token_id
    places = ragged.packed_positions(packed, bounds, offset=offset, pad_token_id=pad)
    return TokenBatch(packed, places, _packed(segments), bounds)


def _packed(rows: Rows) -> NDArray[np.int32]:
    return np.concatenate([np.zeros(0, np.int32), *rows], dtype=np.int32, casting="same_kind")


def checked_ids(kind: str, sequences: Rows, rows: int, longest: int) -> list[NDArray[Any]]:
    """The sequences as arrays of integers. kind: "token" or "segment"; rows: of the table that the ids are rows of.

    Raises InputError that names the first sequence which is empty, no integers, longer, or has an id without a row.
    """
    found = [_integers(at, kind, values) for at, values in enumerate(sequences)]
    for at, ids in enumerate(found):
        if len(ids) > longest:
            raise InputError(f"sequence {at} has {len(ids)} {kind} ids; the model holds {longest}")
    every = np.concatenate([np.zeros(0, np.int64), *found], dtype=np.int64, casting="unsafe")  # uint64, too
    if every.size and not (every.min() >= 0 and every.max() < rows):
        at, wrong = next((at, one) for at, ids in enumerate(found) for one in ids.tolist() if not 0 <= one < rows)
        raise InputError(f"sequence {at}: {kind} id {wrong} has no row; the model has rows 0 to {rows - 1}")
    return found


def _integers(at: int, kind: str, values: Sequence[int] | NDArray[np.integer]) -> NDArray[Any]:
    try:
        array = np.asarray(values)
    except ValueError:  # lists of unequal lengths inside
        array = np.empty(0)
    if array.ndim != 1 or not len(array) or array.dtype.kind not in "iu":
        raise InputError(f"sequence {at}: {kind} ids must be a non-empty sequence of integers, found {values!r:.80}")
    return array


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
