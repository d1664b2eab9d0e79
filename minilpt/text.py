"""From texts to token ids: the folder's tokenizer, pairs, and truncation that is reported, never silent.

The tokenizer is configured once, at load, and never again: changing truncation or padding while another thread
encodes is what raises "Already borrowed" elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .config import ModelConfig, read_json
from .errors import DependencyError, InputError, TokenizerError
from .truncation import Places, Truncation

if TYPE_CHECKING:
    import tokenizers

Int32 = NDArray[np.int32]
TextOrPair = str | tuple[str, str]

# A batch this small is encoded on the calling thread: the tokenizers package then starts no threads of its own, and
# a later fork gives no warning.
_SERIAL_BATCH = 16


@dataclass(frozen=True)
class Encoded:
    """One sequence of a text. ids, segments: (n,) int32, special tokens included.

    n_truncated: tokens of the text that are in none of its sequences, 0 if none.
    """

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
        self._own = Truncation("head" if truncation_side == "right" else "tail")

    @classmethod
    def from_folder(cls, folder: Path, config: ModelConfig) -> TextEncoder:
        """Build from tokenizer.json, else vocab.txt, else vocab.json + merges.txt.

        The settings of tokenizer_config.json apply to each, and those of sentence-transformers. Raises TokenizerError
        if none is there, or it cannot be read.
        """
        settings_path = folder / "tokenizer_config.json"
        settings = read_json(settings_path) if settings_path.is_file() else {}
        tokenizer = _build(folder, settings)
        # sentence_bert_config.json, sentence_roberta_config.json, and so on: at most one is there.
        sentence = {
            key: value for path in folder.glob("sentence_*_config.json") for key, value in read_json(path).items()
        }
        if sentence.get("do_lower_case"):
            tokenizer.normalizer = _lowercasing(tokenizer.normalizer)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        stated = settings.get("model_max_length"), sentence.get("max_seq_length")
        limit, side = _limit(stated, config), settings.get("truncation_side", "right")
        if tokenizer.num_special_tokens_to_add(True) >= limit:
            raise TokenizerError(f"{folder}: a limit of {limit} tokens leaves no room for text")
        if side not in ("left", "right"):
            raise TokenizerError(f'{settings_path}: truncation_side must be "left" or "right", found {side!r}')
        return cls(tokenizer, config, limit, side)

    def encode(self, texts: Sequence[TextOrPair]) -> list[Encoded]:
        """Token ids of every text or pair, cut to max_tokens as Hugging Face's "longest_first" cuts.

        Raises as `sequences` does.
        """
        return [only for (only,) in self.sequences(texts, self._own)]

    def sequences(self, texts: Sequence[TextOrPair], truncation: Truncation) -> list[list[Encoded]]:
        """Of every text or pair, the sequences of at most max_tokens that stand for it: one, but for windows.

        Raises InputError naming the text if it is not valid Unicode (a lone surrogate) or cannot be cut as wanted,
        TokenizerError if the tokenizer gives an id that the model has no row for.
        """
        chosen = self._own if truncation.mode is None else truncation
        chosen.check(self.max_tokens - self._tokenizer.num_special_tokens_to_add(False))
        try:
            if len(texts) < _SERIAL_BATCH:
                encodings = [self._encode_one(text) for text in texts]
            else:
                encodings = self._tokenizer.encode_batch_fast(list(texts))
        except (UnicodeEncodeError, TypeError):
            raise self._blamed(texts) from None
        numbered = enumerate(zip(texts, encodings, strict=True))
        return [self._fitted(f"text {index} ({text!r:.80})", encoding, chosen) for index, (text, encoding) in numbered]

    def pieces(self, text: TextOrPair) -> list[Piece]:
        """The tokens behind the ids that `encode` gives for this text or pair. Raises as it does."""
        self.encode([text])
        encoding = self._encode_one(text)
        rows = list(zip(encoding.tokens, encoding.sequence_ids, encoding.offsets, strict=True))
        (kept,) = self._kept(encoding, self._own)
        return [Piece(token, part, *place) for token, part, place in (rows[index] for index in kept)]

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

    def _fitted(self, name: str, encoding: tokenizers.Encoding, truncation: Truncation) -> list[Encoded]:
        """The sequences of one text or pair, which errors call `name`."""
        ids, segments = np.array(encoding.ids, np.int32), np.array(encoding.type_ids, np.int32)
        if not len(ids):
            raise InputError(f"{name}: the tokenizer makes no token of it, not even a special one")
        try:
            kept = self._kept(encoding, truncation)
        except InputError as error:
            raise InputError(f"{name} {error}") from None
        n_truncated = len(ids) - len(kept[0]) if len(kept) == 1 else 0  # windows leave nothing out
        return [Encoded(*self._checked(ids[places], segments[places]), n_truncated) for places in kept]

    def _checked(self, ids: Int32, segments: Int32) -> tuple[Int32, Int32]:
        """ids and segments, of which the model must have rows."""
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
        return ids, segments

    def _kept(self, encoding: tokenizers.Encoding, truncation: Truncation) -> list[Places]:
        """The places of the tokens that make each sequence, in order: the special ones are in all of them."""
        if len(encoding.ids) <= self.max_tokens:
            return [np.arange(len(encoding.ids))]
        part = np.array([-1 if part is None else part for part in encoding.sequence_ids])  # -1: a special token
        special, first, second = (np.flatnonzero(part == number) for number in (-1, 0, 1))
        cuts = truncation.cuts((len(first), len(second)), self.max_tokens - len(special))
        return [np.sort(np.concatenate([special, first[a], second[b]])) for a, b in cuts]


def _limit(stated: Iterable[Any], config: ModelConfig) -> int:
    """The model's positions, or fewer where a file says so (1e30 in tokenizer_config.json means "not set")."""
    numbers = [value for value in stated if isinstance(value, (int, float)) and not isinstance(value, bool)]
    return int(min([config.max_tokens, *(number for number in numbers if 0 < number < math.inf)]))


def _lowercasing(normalizer: Any) -> Any:
    """The normaliser behind one that makes all letters small."""
    from tokenizers import normalizers

    return normalizers.Sequence([normalizers.Lowercase(), *([normalizer] if normalizer is not None else [])])


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
    ends = ((sep, vocabulary[sep]), (cls, vocabulary[cls]))  # by place: tokenizers 0.23 renamed the second
    tokenizer.post_processor = processors.RobertaProcessing(*ends, add_prefix_space=prefix_space)
    return tokenizer
