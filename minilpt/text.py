"""From texts to token ids: the folder's tokenizer, pairs, and truncation that is reported, never silent.

The tokenizer is configured once, at load, and never again: changing truncation or padding while another thread
encodes is what raises "Already borrowed" elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .config import ModelConfig, read_json
from .errors import DependencyError, InputError, TokenizerError

if TYPE_CHECKING:
    import tokenizers

TextOrPair = str | tuple[str, str]

# A batch this small is encoded on the calling thread: the tokenizers package then starts no threads of its own, and
# a later fork gives no warning.
_SERIAL_BATCH = 16


@dataclass(frozen=True)
class Encoded:
    """ids, segments: (n,) int32, special tokens included. n_truncated: tokens that were cut off, 0 if none."""

    ids: NDArray[np.int32]
    segments: NDArray[np.int32]
    n_truncated: int


@dataclass(frozen=True)
class Piece:
    """A token and the characters that it covers: start to end of the text (part 0) or of a pair's second (part 1).

    part: None for special tokens, which cover none.
    """

    token: str
    part: int | None
    start: int
    end: int


class TextEncoder:
    """A tokenizer and the model's limits. Safe to share between threads."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, config: ModelConfig, max_tokens: int, truncation_side: str):
        self._tokenizer = tokenizer
        self._config = config
        self.max_tokens = max_tokens
        self.truncation_side = truncation_side

    @classmethod
    def from_folder(cls, folder: Path, config: ModelConfig) -> TextEncoder:
        """Build from tokenizer.json, else vocab.txt, else vocab.json + merges.txt.

        The settings of tokenizer_config.json apply to each. Raises TokenizerError if none is there, or it cannot be
        read.
        """
        settings_path = folder / "tokenizer_config.json"
        settings = read_json(settings_path) if settings_path.is_file() else {}
        tokenizer = _build(folder, settings)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        limit, side = _limit(settings, config), settings.get("truncation_side", "right")
        if tokenizer.num_special_tokens_to_add(True) >= limit:
            raise TokenizerError(f"{folder}: a limit of {limit} tokens leaves no room for text")
        if side not in ("left", "right"):
            raise TokenizerError(f'{settings_path}: truncation_side must be "left" or "right", found {side!r}')
        return cls(tokenizer, config, limit, side)

    def encode(self, texts: Sequence[TextOrPair]) -> list[Encoded]:
        """Token ids of every text or pair, cut to max_tokens as Hugging Face's "longest_first" cuts.

        Raises InputError naming the text if it is not valid Unicode (a lone surrogate), TokenizerError if the tokenizer
        gives an id that the model has no row for.
        """
        try:
            if len(texts) < _SERIAL_BATCH:
                encodings = [self._encode_one(text) for text in texts]
            else:
                encodings = self._tokenizer.encode_batch_fast(list(texts))
        except (UnicodeEncodeError, TypeError):
            raise self._blamed(texts) from None
        return [self._fit(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]

    def pieces(self, text: TextOrPair) -> list[Piece]:
        """The tokens behind the ids that `encode` gives for this text or pair. Raises as it does."""
        self.encode([text])
        encoding = self._encode_one(text)
        keep = self._kept(encoding) if len(encoding.ids) > self.max_tokens else np.ones(len(encoding.ids), np.bool_)
        rows = zip(encoding.tokens, encoding.sequence_ids, encoding.offsets, strict=True)
        return [Piece(token, part, *place) for (token, part, place), kept in zip(rows, keep, strict=True) if kept]

    def uncut(self, text: str, *, special: bool = True) -> list[tuple[int, Piece]]:
        """Ids and tokens of the whole text, however long, with its special tokens or without."""
        try:
            found = self._tokenizer.encode(text, add_special_tokens=special)
        except (UnicodeEncodeError, TypeError):
            raise self._blamed([text]) from None
        rows = zip(found.ids, found.tokens, found.sequence_ids, found.offsets, strict=True)
        return [(number, Piece(token, part, *place)) for number, token, part, place in rows]

    def cutting(self, side: str) -> TextEncoder:
        """The same tokenizer, cutting texts that are too long at this side, "left" or "right"."""
        return TextEncoder(self._tokenizer, self._config, self.max_tokens, side)

    def _encode_one(self, text: TextOrPair) -> tokenizers.Encoding:
        return self._tokenizer.encode(text) if isinstance(text, str) else self._tokenizer.encode(*text)

    def _blamed(self, texts: Sequence[TextOrPair]) -> InputError:
        for index, text in enumerate(texts):
            try:
                "".join(text).encode()
            except UnicodeEncodeError as error:
                return InputError(f"text {index} is not valid Unicode: {error.reason} at character {error.start}")
        raise AssertionError("the tokenizer refused texts that are valid Unicode")

    def _fit(self, text: TextOrPair, encoding: tokenizers.Encoding) -> Encoded:
        ids, segments = np.array(encoding.ids, np.int32), np.array(encoding.type_ids, np.int32)
        n_truncated = max(0, len(ids) - self.max_tokens)
        if n_truncated:
            keep = self._kept(encoding)
            ids, segments = ids[keep], segments[keep]
        if not len(ids):
            raise InputError(f"the tokenizer makes no token of {text!r:.80}, not even a special one")
        if ids.max() >= self._config.vocabulary:
            token = self._tokenizer.id_to_token(int(ids.max()))
            raise TokenizerError(
                f"the tokenizer gives {token!r} the id {ids.max()}, but the model has {self._config.vocabulary} rows"
            )
        if self._config.segments < 2:  # a tokenizer may number a pair's parts for a model that has one kind only
            segments = np.zeros_like(ids)
        elif segments.max() >= self._config.segments:
            raise TokenizerError(
                f"the tokenizer gives the segment id {segments.max()}, but the model has {self._config.segments} rows"
            )
        return Encoded(ids, segments, n_truncated)

    def _kept(self, encoding: tokenizers.Encoding) -> NDArray[np.bool_]:
        """Which tokens stay, (n,) bool: the special ones, and the beginning (or end) of each text of the pair."""
        part = np.array([-1 if part is None else part for part in encoding.sequence_ids])  # -1: a special token
        keep = part == -1
        places = [np.flatnonzero(part == number) for number in (0, 1)]
        lengths = _longest_first(len(places[0]), len(places[1]), self.max_tokens - int(keep.sum()))
        for place, length in zip(places, lengths, strict=True):
            keep[place[:length] if self.truncation_side == "right" else place[len(place) - length :]] = True
        return keep


def _longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths of a pair cut to `room` tokens: the longer part gives way until both are equal, then both.

    Where both are cut and room is odd, the odd token goes to the part that was longer, and to the second of equals,
    as the tokenizers package has it.
    """
    if first > second:
        second, first = _longest_first(second, first, room)
        return first, second
    if first + second <= room:
        return first, second
    shorter = min(first, room // 2)
    return shorter, room - shorter


def _limit(settings: dict[str, Any], config: ModelConfig) -> int:
    """The model's positions, or fewer where tokenizer_config.json says so (1e30 there means "not set")."""
    stated = settings.get("model_max_length")
    if isinstance(stated, (int, float)) and not isinstance(stated, bool) and 0 < stated < math.inf:
        return int(min(stated, config.max_tokens))
    return config.max_tokens


def _build(folder: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    try:
        import tokenizers as library
    except ImportError:
        raise DependencyError("texts need the tokenizers package: pip install tokenizers") from None

    def there(*names: str) -> bool:
        return all((folder / name).is_file() for name in names)

    try:
        if there("tokenizer.json"):
            return _with_settings(library.Tokenizer.from_file(str(folder / "tokenizer.json")), settings)
        if there("vocab.txt"):
            return _wordpiece(folder, settings)
        if there("vocab.json", "merges.txt"):
            return _byte_level_bpe(folder, settings)
    except Exception as error:  # the tokenizers package raises plain Exception for every kind of bad file
        raise TokenizerError(f"{folder}: the tokenizer's files cannot be read: {error}") from None
    hint = ""
    if there("sentencepiece.bpe.model") or there("spiece.model"):
        hint = "; a SentencePiece model must be converted: save it with a fast tokenizer of transformers"
    raise TokenizerError(f"{folder}: no tokenizer.json, no vocab.txt, and no vocab.json with merges.txt{hint}")


# tokenizer_config.json key -> (the part of a tokenizer that it governs, that part's kind and attribute).
# Transformers' fast tokenizers let tokenizer_config.json win over tokenizer.json for these.
_GOVERNED = {
    "do_lower_case": ("normalizer", "BertNormalizer", "lowercase"),
    "strip_accents": ("normalizer", "BertNormalizer", "strip_accents"),
    "tokenize_chinese_chars": ("normalizer", "BertNormalizer", "handle_chinese_chars"),
    "add_prefix_space": ("pre_tokenizer", "ByteLevel", "add_prefix_space"),
}


def _with_settings(tokenizer: tokenizers.Tokenizer, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer under the settings of tokenizer_config.json."""
    for key, (place, kind, attribute) in _GOVERNED.items():
        part = getattr(tokenizer, place)
        if key in settings and type(part).__name__ == kind:
            setattr(part, attribute, settings[key])
    return tokenizer


def _special(settings: dict[str, Any], key: str, default: str) -> str:
    """A special token's text; tokenizer_config.json holds a string or an object with `content`."""
    value = settings.get(key, default)
    return str(value["content"] if isinstance(value, dict) else value)


def _wordpiece(folder: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    """BERT's tokenizer from vocab.txt (one token a line)."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    unknown, cls, sep, pad, mask = (
        _special(settings, f"{name}_token", f"[{name.upper()}]") for name in ("unk", "cls", "sep", "pad", "mask")
    )
    vocabulary = models.WordPiece.read_file(str(folder / "vocab.txt"))
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    tokenizer.add_special_tokens([token for token in (pad, unknown, cls, sep, mask) if token in vocabulary])
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        lowercase=settings.get("do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(cls, vocabulary[cls]), (sep, vocabulary[sep])],
    )
    return tokenizer


def _byte_level_bpe(folder: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    """RoBERTa's tokenizer from vocab.json and merges.txt."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    vocabulary, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    prefix_space = settings.get("add_prefix_space", False)
    cls, sep = _special(settings, "cls_token", "<s>"), _special(settings, "sep_token", "</s>")
    unknown, pad = _special(settings, "unk_token", "<unk>"), _special(settings, "pad_token", "<pad>")
    mask = _special(settings, "mask_token", "<mask>")
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.add_special_tokens([token for token in (cls, pad, sep, unknown) if token in vocabulary])
    if mask in vocabulary:
        tokenizer.add_special_tokens([AddedToken(mask, lstrip=True)])  # RobertaTokenizer's mask eats the space before
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.post_processor = processors.RobertaProcessing(
        sep=(sep, vocabulary[sep]), cls=(cls, vocabulary[cls]), add_prefix_space=prefix_space
    )
    return tokenizer
