"""Texts longer than the model: which of their tokens make which sequences, and how the sequences' answers become one.

Special tokens are none of this file's business: every sequence has all of them, and `room` is what they leave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .errors import InputError

Places = NDArray[np.intp]
Cut = tuple[Places, Places]  # the places of a text's tokens, or of a pair's both, that make a sequence
Array = NDArray[np.floating]
T = TypeVar("T", bound=np.floating)

# C. Sun et al., "How to Fine-Tune BERT for Text Classification?" (arXiv 1905.05583, section 5.3.1): of 510 tokens, the
# first 128 and the last 382.
HEAD, ROOM = 128, 510


def _head(n: int, length: int) -> Places:
    return np.arange(length)


def _tail(n: int, length: int) -> Places:
    return np.arange(n - length, n)


def _head_tail(n: int, length: int) -> Places:
    first = length * HEAD // ROOM
    return np.concatenate([np.arange(first), np.arange(n - (length - first), n)])


# Which `length` of n tokens stay.
KEPT: Mapping[str, Callable[[int, int], Places]] = {"head": _head, "tail": _tail, "head_tail": _head_tail}
MODES = ("error", *KEPT, "windows")


def _mean(answers: Array, starts: Places) -> Array:
    counts = np.diff(starts, append=len(answers))
    return np.add.reduceat(answers, starts, dtype=np.float64) / counts[:, None]


def _max(answers: Array, starts: Places) -> Array:
    return np.maximum.reduceat(answers, starts)


def _first(answers: Array, starts: Places) -> Array:
    return answers[starts]


# (S, K) answers of sequences, and where each of T texts begins among them, (T,), to (T, K).
AGGREGATES: Mapping[str, Callable[[Array, Places], Array]] = {"mean": _mean, "max": _max, "first": _first}


@dataclass(frozen=True)
class Truncation:
    """What becomes of long texts. mode: one of MODES, or None for what the tokenizer's settings say.

    stride: tokens that neighbouring windows share, 0 by default as in the tokenizers package; aggregate: one of
    AGGREGATES, "mean" by default. Both are for windows only. Raises InputError for anything else.
    """

    mode: str | None = None
    stride: int | None = None
    aggregate: str | None = None

    def __post_init__(self) -> None:
        if self.mode is not None and self.mode not in MODES:
            raise InputError(f"truncation must be one of {', '.join(MODES)}, found {self.mode!r}")
        if self.aggregate is not None and self.aggregate not in tuple(AGGREGATES):
            raise InputError(f"aggregate must be one of {', '.join(AGGREGATES)}, found {self.aggregate!r}")
        if self.stride is not None and (type(self.stride) is not int or self.stride < 0):
            raise InputError(f"stride must be a number of tokens, 0 or more, found {self.stride!r}")
        if self.mode != "windows" and (self.stride is not None or self.aggregate is not None):
            raise InputError('stride and aggregate are for truncation="windows"')

    def check(self, room: int) -> None:
        """Raise InputError for a stride that no window of so many tokens can have."""
        if self.stride is not None and self.stride >= room:
            raise InputError(f"stride {self.stride} is not less than the {room} tokens of a window")

    def cuts(self, lengths: tuple[int, int], room: int) -> list[Cut]:
        """The sequences of a text (its second part has 0 tokens) or pair that is longer than `room` tokens.

        Raises InputError, which says what is wrong with it, if it is not to be cut or cannot be.
        """
        if self.mode == "error":
            raise InputError(f"has {sum(lengths)} tokens, {room} is the most; shorten it, or give another truncation=")
        if self.mode == "windows":
            return self._windows(lengths, room)
        kept = KEPT[self.mode or "head"]
        first, second = (kept(*part) for part in zip(lengths, longest_first(*lengths, room), strict=True))
        return [(first, second)]

    def _windows(self, lengths: tuple[int, int], room: int) -> list[Cut]:
        """Windows over the longer part (the second of equals), from its beginning; the other stays whole in each."""
        n, whole = max(lengths), np.arange(min(lengths))
        size, stride = room - len(whole), self.stride or 0
        if size <= stride:
            raise InputError(
                f"is a pair whose shorter text has {len(whole)} of {room} tokens, which leaves windows of "
                f"{max(size, 0)} to the longer: too few for a stride of {stride}; shorten it, or cut both by another "
                f"truncation="
            )
        step = size - stride
        ends = range(size, n + step, step)  # the last at the text's end or behind it
        windows = [np.arange(end - size, min(end, n)) for end in ends]
        return [(window, whole) if lengths[0] > lengths[1] else (whole, window) for window in windows]

    def aggregated(self, answers: NDArray[T], starts: Places) -> NDArray[T]:
        """One answer a text. answers: (S, K), of sequences; starts: (T,), each text's first among them. (T, K)."""
        return AGGREGATES[self.aggregate or "mean"](answers, starts).astype(answers.dtype)


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths of a pair cut to `room` tokens: the longer part gives way until both are equal, then both.

    Where both are cut and room is odd, the odd token goes to the part that was longer, and to the second of equals,
    as the tokenizers package has it.
    """
    if first > second:
        second, first = longest_first(second, first, room)
        return first, second
    if first + second <= room:
        return first, second
    shorter = min(first, room // 2)
    return shorter, room - shorter
