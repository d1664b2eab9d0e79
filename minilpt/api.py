"""What a user holds: a Classifier, which `loading.load` gives, and the Predictions that it gives."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import backends, pruning
from .batches import Rows, checked_ids, flattened, in_batches, token_batch
from .config import ModelConfig
from .embeddings import POOLINGS, Embedding, means, normalized, read_embedding
from .engine import Engine, Forward
from .errors import (
    BackendError,
    DependencyError,
    InputError,
    MinilptWarning,
    PruningError,
    TokenizerError,
    UnsupportedModelError,
)
from .explanation import Explanation, Token
from .finite import not_finite
from .footprint import Footprint, Load, process_bytes
from .pruning import Pruning
from .ragged import TokenBatch
from .text import Encoded, TextEncoder, TextOrPair
from .truncation import Truncation
from .weights import checkpoint
from .weights.resolve import Source

Float32 = NDArray[np.float32]
Item = str | tuple[str, str] | Mapping[str, str]

# Tokens in one batch. At D = 768 its widest activation (F = 3072) takes 50 MB.
BATCH_TOKENS = 4096
# The original scripts run with --max_seq_length 128, and their score is divided by the padded length.
LTP_SCORE_DENOMINATOR = 128


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer for one text.

    label: the best one's name. score: its value in `scores`, which holds every label's probability (softmax, or
    independent sigmoids for multi-label and one-label models) or, for regression, the plain output.
    logits: the model's outputs. n_tokens: tokens that went in, special tokens included; n_truncated: tokens cut off.
    kept_tokens: per layer, how many tokens its feed-forward computed; the last layer computes the first token only.
    executed_flops: of the matrix products really run; dense_flops: of the unpruned, unpadded model, as counted in the
    paper. n_windows: 1, or more for a long text under truncation="windows": then logits are the windows' aggregated
    ones, and counts of tokens and FLOPs their sums.
    """

    label: str
    score: float
    scores: dict[str, float]
    logits: tuple[float, ...]
    n_tokens: int
    n_truncated: int
    kept_tokens: tuple[int, ...]
    executed_flops: int
    dense_flops: int
    n_windows: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for JSON."""
        return asdict(self)


class Classifier:
    """A loaded model. Immutable, so that threads may share it.

    source: where its files are and come from: `folder`, and for a hub's model `repository` and `commit`.
    """

    def __init__(
        self,
        source: Source,
        config: ModelConfig,
        engine: Engine,
        pruning: Pruning | None,
        encoder: TextEncoder | TokenizerError | DependencyError,
    ):
        self.source, self.config, self.pruning = source, config, pruning
        self._engine, self._encoder = engine, encoder

    @property
    def folder(self) -> Path:
        """Where config.json and the weights are."""
        return self.source.folder

    @property
    def engine(self) -> Engine:
        """What runs the layers."""
        return self._engine

    @property
    def commit(self) -> str | None:
        """The commit hash of a model from the hub."""
        return self.source.commit

    @property
    def classes_(self) -> NDArray[np.str_]:
        """Label names in the order of the outputs, (labels,)."""
        return np.array(self.config.labels)

    @property
    def backend(self) -> backends.Backend:
        """The kernels, device, precision and threads in use."""
        return self._engine.backend

    @property
    def max_tokens(self) -> int:
        """Longest input in tokens, special tokens included; `predict` says what becomes of longer ones."""
        return self._text_encoder().max_tokens

    @property
    def text_encoder(self) -> TextEncoder:
        """The folder's tokenizer under the model's limits. Raises TokenizerError if there is none."""
        return self._text_encoder()

    def memory(self, *, batch_tokens: int = BATCH_TOKENS, longest: int | None = None, callers: int = 1) -> Footprint:
        """The peak memory of this process, in bytes, under such a load; `Footprint.peak` is the sum.

        batch_tokens: as `predict` gets it. longest: tokens of the longest text, the model's limit if None. callers:
        threads that use the model at once. The texts and predictions that the program keeps come on top. Raises
        InputError for anything but positive integers, BackendError on a GPU.
        """
        for name, value in {"batch_tokens": batch_tokens, "longest": longest, "callers": callers}.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InputError(f"{name} must be a positive integer, found {value!r}")
        most = self.config.max_tokens
        needs = self._engine.needs(Load(batch_tokens, min(longest or most, most), callers))
        process = process_bytes(self.folder, needs.weights.memory + needs.scratch_now)
        return Footprint(*needs.weights, needs.scratch, process)

    def close(self) -> None:
        """End the model's threads and free its scratch memory, also those of models that share its weights.

        Not needed before the interpreter ends, or before the last reference goes; a model that is used again has them
        again.
        """
        self._engine.close()

    def with_pruning(self, pruning: str | Path | Mapping[str, Any] | Pruning | None) -> Classifier:
        """The same weights under another pruning, as `load(pruning=...)` means it; this model stays as it is.

        A `Pruning`, as another model of the same shape has it, is taken as it is, and no file is read.
        """
        chosen = pruning if isinstance(pruning, Pruning) else pruning_of(self.source, self.config, pruning)
        engine = self._engine.with_rule(chosen.rule if chosen else None)
        return Classifier(self.source, self.config, engine, chosen, self._encoder)

    def with_flops_ratio(self, flops_ratio: float) -> Classifier:
        """The same weights at another point of the frontier that ltp.json holds; see `predict`."""
        if not isinstance(flops_ratio, (int, float)) or not 0 <= flops_ratio <= 1:
            raise PruningError(f"flops_ratio must be a number from 0 to 1, found {flops_ratio!r}")
        if self.pruning is None:
            raise PruningError(
                "flops_ratio moves along the frontier of an ltp.json; this model is not pruned: run minilpt calibrate"
            )
        return self.with_pruning(self.pruning.at(flops_ratio))

    def predict(
        self,
        texts: Item | Iterable[Item],
        *,
        batch_tokens: int = BATCH_TOKENS,
        progress: bool = False,
        flops_ratio: float | None = None,
        truncation: str | None = None,
        stride: int | None = None,
        aggregate: str | None = None,
    ) -> list[Prediction]:
        """Classify texts, pairs `(a, b)` or `{"text": a, "text_pair": b}`, in any iterable; a list in the same order.

        batch_tokens bounds the tokens of one batch (longer texts go alone). With 1 every text runs by itself, and its
        logits are bit for bit independent of the others. progress: a bar on stderr. flops_ratio: prune as the point of
        the frontier in ltp.json that spends the most within this share of the dense counted FLOPs (a mean over the
        texts it was calibrated on); 1 is the dense model.
        truncation: what becomes of a text of more than `max_tokens` tokens. "head" keeps its first tokens, "tail" its
        last, "head_tail" a quarter from the beginning and the rest from the end; of a pair the longer text is cut
        first. "windows" runs it as several sequences that share `stride` tokens and aggregates their logits, label by
        label: "mean" (the default), "max" or "first". "error" refuses it. None is "head", or "tail" where
        tokenizer_config.json has truncation_side "left". docs/long-texts.md has the details.
        Raises InputError for anything that is not a text or a pair, or cannot be cut as wanted; TokenizerError if the
        model has no tokenizer, UnsupportedModelError if it has no classification head, PruningError if the frontier has
        no such point or there is none, NumbersError or WeightsError if an answer is not finite.
        """
        cut = Truncation(truncation, stride, aggregate)
        encoded, result = self._classified(texts, batch_tokens, progress, flops_ratio, cut)
        scores = self.activated(result.logits)
        return [self._prediction(result, index, scores[index], found) for index, found in enumerate(encoded)]

    def predict_proba(
        self,
        texts: Item | Iterable[Item],
        *,
        batch_tokens: int = BATCH_TOKENS,
        progress: bool = False,
        flops_ratio: float | None = None,
        truncation: str | None = None,
        stride: int | None = None,
        aggregate: str | None = None,
    ) -> Float32:
        """The scores of every label, (texts, labels) float32, columns as in `classes_`; options as in `predict`."""
        cut = Truncation(truncation, stride, aggregate)
        return self.activated(self._classified(texts, batch_tokens, progress, flops_ratio, cut)[1].logits)

    def logits(
        self,
        texts: Item | Iterable[Item],
        *,
        batch_tokens: int = BATCH_TOKENS,
        progress: bool = False,
        flops_ratio: float | None = None,
        truncation: str | None = None,
        stride: int | None = None,
        aggregate: str | None = None,
    ) -> Float32:
        """The model's outputs before any activation, (texts, labels) float32; options as in `predict`."""
        cut = Truncation(truncation, stride, aggregate)
        return self._classified(texts, batch_tokens, progress, flops_ratio, cut)[1].logits

    def embed(
        self,
        texts: Item | Iterable[Item],
        *,
        pooling: str | None = None,
        normalize: bool | None = None,
        batch_tokens: int = BATCH_TOKENS,
        progress: bool = False,
        truncation: str | None = None,
        stride: int | None = None,
        aggregate: str | None = None,
    ) -> Float32:
        """Embeddings, (texts, D) float32: the last layer's rows, pooled. With or without a classification head.

        pooling: "mean" of a text's rows, special tokens' too, or "cls", the first row. A pruned model's mean is over
        the rows that its last layer keeps. normalize: to length 1. Without pooling, a sentence-transformers folder's
        modules.json says both (normalize, if given, wins); else they are "mean" and True. The other options are as in
        `predict`; windows' embeddings are aggregated before they are normalised.
        Raises as `predict` does, InputError for an unknown pooling, UnsupportedModelError for a modules.json with other
        modules, BackendError where the precision has integers only.
        """
        if pooling is not None and pooling not in POOLINGS:
            raise InputError(f"pooling must be one of {', '.join(POOLINGS)}, found {pooling!r}")
        if self.backend.precision in backends.INTEGER_PRECISIONS:
            raise no_embeddings_in(self.backend)
        stated = read_embedding(self.folder) if pooling is None else Embedding(pooling)
        first_only = stated.pooling == "cls"  # whose mean is that row itself
        cut = Truncation(truncation, stride, aggregate)
        sequences, starts = flattened(self._text_encoder().sequences(text_items(texts), cut))

        def run(batch: TokenBatch) -> list[NDArray[Any]]:
            return [means(*self._engine.last_rows(batch, first_only=first_only))]

        (vectors,) = in_batches(self.config, sequences, batch_tokens, progress, run)
        self._check_finite(vectors, [each.ids for each in sequences], [each.segments for each in sequences])
        vectors = cut.aggregated(vectors, starts)
        wanted = stated.normalize if normalize is None else normalize
        return (normalized(vectors) if wanted else vectors).astype(np.float32)

    def rank(
        self,
        query: str,
        documents: Iterable[str],
        *,
        top_k: int | None = None,
        return_documents: bool = False,
        batch_tokens: int = BATCH_TOKENS,
    ) -> list[dict[str, Any]]:
        """Documents by their score for the query, best first, from a model of one label, as CrossEncoder.rank gives it.

        Each is {"corpus_id": its place in `documents`, "score": as in `predict`}, with return_documents also "text".
        Of equal scores the earlier document comes first. top_k: how many, all if None.
        Raises UnsupportedModelError if the model has several labels, InputError for anything but strings.
        """
        if len(self.config.labels) != 1:
            found = ", ".join(self.config.labels) or "none"
            raise UnsupportedModelError(f"{self.folder}: rank needs a model of one label, this one has {found}")
        texts = [documents] if isinstance(documents, str) else list(documents)
        if isinstance(documents, str) or not all(isinstance(text, str) for text in [query, *texts]):
            raise InputError("rank takes one string, the query, and a list of strings, the documents")
        if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1):
            raise InputError(f"top_k must be a positive integer or None, found {top_k!r}")
        scores = self.predict_proba([(query, text) for text in texts], batch_tokens=batch_tokens)[:, 0]
        best = np.argsort(-scores, kind="stable")[:top_k].tolist()
        shown = [{"text": texts[place]} if return_documents else {} for place in best]
        return [
            {"corpus_id": place, "score": float(scores[place]), **text} for place, text in zip(best, shown, strict=True)
        ]

    def forward(
        self,
        token_ids: Rows,
        segment_ids: Rows | None = None,
        *,
        trace: bool = False,
    ) -> Forward:
        """Run the model on B sequences of token ids as one batch, without padding.

        token_ids: non-empty sequences or (n,) arrays of integers, with their special tokens; segment_ids: of the same
        lengths, zeros if None.
        With trace every layer evaluates its pruning rule (no last-layer shortcut) and the record also holds
        attention_lengths, ffn_lengths and counted_flops. Raises InputError naming the sequence that cannot be run.
        """
        if segment_ids is not None and len(segment_ids) != len(token_ids):
            raise InputError(f"{len(token_ids)} token id sequences but {len(segment_ids)} segment id sequences")
        longest = self.config.max_tokens
        ids = checked_ids("token", token_ids, self.config.vocabulary, longest)
        if segment_ids is None:
            segments = list(map(np.zeros_like, ids))
        else:  # a family without segments still has the one segment 0
            segments = checked_ids("segment", segment_ids, max(self.config.segments, 1), longest)
        for at, (tokens, kinds) in enumerate(zip(ids, segments, strict=True)):
            if len(tokens) != len(kinds):
                raise InputError(f"sequence {at} has {len(tokens)} token ids but {len(kinds)} segment ids")
        self.require_head()
        found = self._engine.run(token_batch(self.config, ids, segments), trace=trace)
        self._check_finite(found.logits, ids, segments)
        return found

    def _check_finite(
        self, answers: NDArray[np.floating], ids: Sequence[NDArray[Any]], segments: Sequence[NDArray[Any]]
    ) -> None:
        """answers: (sequences, ...). Raises WeightsError or NumbersError, which tell the cause."""
        if not np.isfinite(answers).all():
            place = int(np.argmin(np.isfinite(answers).all(axis=1)))
            rule, precision = self._engine.rule, self.backend.precision
            tokens, kinds = (rows[place].astype(np.int32) for rows in (ids, segments))
            raise not_finite(self.folder, self.config, rule, precision, tokens, kinds)

    def explain(self, text: Item) -> Explanation:
        """One text or pair, with the layer at which each of its tokens was removed and the scores that decided it.

        Raises InputError for anything but one text, TokenizerError if the model has no tokenizer.
        """
        items = text_items([text] if isinstance(text, tuple) else text)
        if len(items) != 1:
            raise InputError(f"explain takes one text or pair, found {len(items)}")
        (prediction,) = self.predict(items)
        traced = self.forward(*self.encode(items), trace=True)
        assert traced.masses is not None and traced.kept is not None
        scores: list[list[float]] = [[] for _ in range(prediction.n_tokens)]
        live = np.arange(prediction.n_tokens)  # their rows; -1 is the one that stands for removed tokens
        for masses, kept in zip(traced.masses, traced.kept, strict=True):
            for place, mass in zip(live.tolist(), masses.tolist(), strict=True):
                if place >= 0:
                    scores[place].append(mass)
            merges = self.pruning is not None and self.pruning.rule.merge_removed and not kept.all()
            live = np.insert(live[kept], [kept.argmin()] * merges, -1)
        stays = set(live.tolist())
        pieces = self._text_encoder().pieces(items[0])
        tokens = [
            Token(**vars(piece), scores=tuple(found), removed_in=None if place in stays else len(found) - 1)
            for place, (piece, found) in enumerate(zip(pieces, scores, strict=True))
        ]
        parts = (items[0],) if isinstance(items[0], str) else items[0]
        pruning = self.pruning.name if self.pruning else None
        return Explanation(parts, tuple(tokens), prediction.label, prediction.score, self.config.layers, pruning)

    def encode(self, texts: Item | Iterable[Item]) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids and segment ids of texts or pairs, as `forward` takes them."""
        encoded = self._text_encoder().encode(text_items(texts))
        return [item.ids.tolist() for item in encoded], [item.segments.tolist() for item in encoded]

    def require_head(self) -> None:
        """Raise UnsupportedModelError if this is an encoder without a classification head."""
        if not self.config.labels:
            raise UnsupportedModelError(
                f"{self.folder}: this {self.config.model_type} encoder has no classification head: embed() is what it "
                f"is for; to classify, load a checkpoint that was fine-tuned for sequence classification"
            )

    def _text_encoder(self) -> TextEncoder:
        if isinstance(self._encoder, TextEncoder):
            return self._encoder
        raise type(self._encoder)(*self._encoder.args)  # a new one each time, or its traceback would grow

    def _classified(
        self,
        texts: Item | Iterable[Item],
        batch_tokens: int,
        progress: bool,
        flops_ratio: float | None,
        truncation: Truncation,
    ) -> tuple[list[list[Encoded]], Forward]:
        """Every text's sequences, and a record of the run with a column for each text."""
        self.require_head()
        model = self if flops_ratio is None else self.with_flops_ratio(flops_ratio)
        encoded = self._text_encoder().sequences(text_items(texts), truncation)
        sequences, starts = flattened(encoded)

        def run(batch: TokenBatch) -> list[NDArray[Any]]:
            result = model.engine.run(batch)
            return [result.logits, result.kept_tokens.T, result.executed_flops, result.dense_flops]

        logits, *counts = in_batches(self.config, sequences, batch_tokens, progress, run)
        model._check_finite(logits, [each.ids for each in sequences], [each.segments for each in sequences])
        kept, executed, dense = (np.add.reduceat(count, starts, axis=0, dtype=count.dtype) for count in counts)
        return encoded, Forward(truncation.aggregated(logits, starts), kept.T, executed, dense)

    def activated(self, logits: Float32) -> Float32:
        """The scores that `predict` gives for these logits, (B, labels) float32.

        By problem_type: regression none; multi-label, or one label: sigmoid; else softmax. What a CrossEncoder stores
        of its activation has become a problem_type in `config`.
        """
        if self.config.problem_type == "regression":
            return logits
        wide = logits.astype(np.float64)  # no difference of two float32 values overflows, no small score is lost
        if self.config.problem_type == "multi_label_classification" or len(self.config.labels) == 1:
            return np.exp(-np.logaddexp(0, -wide)).astype(np.float32)  # the sigmoid
        exp = np.exp(wide - wide.max(axis=1, keepdims=True, initial=-np.inf))
        return (exp / exp.sum(axis=1, keepdims=True)).astype(np.float32)

    def _prediction(self, result: Forward, row: int, scores: Float32, sequences: list[Encoded]) -> Prediction:
        best = int(scores.argmax())
        named = dict(zip(self.config.labels, scores.tolist(), strict=True))
        return Prediction(
            label=self.config.labels[best],
            score=float(scores[best]),
            scores=named,
            logits=tuple(result.logits[row].tolist()),
            n_tokens=sum(len(sequence.ids) for sequence in sequences),
            n_truncated=sequences[0].n_truncated,
            kept_tokens=tuple(result.kept_tokens[:, row].tolist()),
            executed_flops=int(result.executed_flops[row]),
            dense_flops=int(result.dense_flops[row]),
            n_windows=len(sequences),
        )


def no_embeddings_in(backend: backends.Backend) -> BackendError:
    return BackendError(
        f'precision "{backend.precision}" is for classifiers: it has no embeddings; take "fp32" or "int8"'
    )


def pruning_of(source: Source, config: ModelConfig, wanted: str | Path | Mapping[str, Any] | None) -> Pruning | None:
    """The pruning that `load(pruning=wanted)` means for this model."""
    if wanted is None:
        return None
    if isinstance(wanted, Mapping):
        return pruning.overridden(
            _stored_pruning(source, config, warn="score_denominator" not in wanted), wanted, config.layers
        )
    if wanted == "auto":
        return _stored_pruning(source, config, warn=True)
    if isinstance(wanted, (str, Path)):
        return pruning.read_pruning(Path(wanted), config.layers)
    raise PruningError(f'pruning must be "auto", None, a path or a dict, found {wanted!r}')


def _stored_pruning(source: Source, config: ModelConfig, warn: bool) -> Pruning | None:
    """What ltp.json, or a curated name's file, says; else what an LTP checkpoint carries in its files, else None."""
    folder = source.folder
    file = source.thresholds or folder / pruning.FILE_NAME
    if file.is_file():
        return pruning.read_pruning(file, config.layers)
    if config.ltp is None:
        return None
    if warn and config.ltp.prune_mode == "absolute_threshold":
        message = (
            f"{folder}: LTP checkpoints do not record the padded length that their score is divided by; taking "
            f"{LTP_SCORE_DENOMINATOR}. Say otherwise with pruning={{'score_denominator': ...}}"
        )
        warnings.warn(message, MinilptWarning, stacklevel=4)
    offsets = checkpoint.read_ltp_offsets(folder, config.layers)
    return pruning.from_ltp_checkpoint(config.ltp, offsets, LTP_SCORE_DENOMINATOR)


def text_items(texts: Item | Iterable[Item]) -> list[TextOrPair]:
    """One entry per text; a bare string or dict is one. Raises InputError for what is neither text nor pair."""
    if isinstance(texts, (str, Mapping)):
        texts = [texts]
    if isinstance(texts, tuple) and len(texts) == 2 and all(isinstance(part, str) for part in texts):
        raise InputError("a bare tuple of two strings is ambiguous: write [(a, b)] for one pair, [a, b] for two texts")
    if not isinstance(texts, Iterable):
        raise InputError(f"texts must be a string, a dict or an iterable of texts, found {type(texts).__name__}")
    return [_item(index, item) for index, item in enumerate(texts)]


def _item(index: int, item: object) -> TextOrPair:
    if isinstance(item, str):
        return item
    if isinstance(item, tuple) and len(item) == 2 and all(isinstance(part, str) for part in item):
        return item
    if isinstance(item, Mapping) and _is_text_record(item):
        return (item["text"], item["text_pair"]) if "text_pair" in item else item["text"]
    raise InputError(
        f'text {index} must be a string, a tuple (a, b) of two strings, or {{"text": a, "text_pair": b}}, '
        f"found {type(item).__name__} {item!r:.80}"
    )


def _is_text_record(item: Mapping[Any, Any]) -> bool:
    return set(item) in ({"text"}, {"text", "text_pair"}) and all(isinstance(part, str) for part in item.values())
