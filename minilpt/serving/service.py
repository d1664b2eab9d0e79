"""What every route does, without HTTP: check a request, make tokens of it, queue it, and shape the answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from .. import __version__
from ..api import Classifier
from ..batching import Batcher, StoppedError
from ..embeddings import read_embedding
from ..text import TextOrPair
from .contract import Cut, EmbedRequest, ExplainRequest, PredictRequest, RerankRequest, TokenizeRequest
from .metrics import Metrics
from .options import ServeOptions
from .refusals import NOT_UNDERSTOOD, RefusedError, failed, translated
from .work import Computed, Float32, Result, Text, Tokens, run

Answer = tuple[Any, dict[str, str]]  # the body, plain types; the headers
TRUNCATION = {None: None, "right": "head", "left": "tail"}  # the contract's side that is cut -> minilpt's that stays
PROBE_S = 5.0  # for the health of an engine whose last batch failed


class Service:
    """A model, its queue, and the routes. name: what /info calls the model."""

    def __init__(self, model: Classifier, options: ServeOptions, name: str):
        self.model, self.options, self.name = model, options, name
        encoder = model.text_encoder
        self._encoders = {None: encoder} | {side: encoder.cutting(side) for side in ("left", "right")}
        self._workers = model.backend.threads
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="minilpt-tokenizer")
        self._taken = self._answered = 0
        self.metrics = Metrics(lambda: self.batcher.waiting, model.config.layers)
        self.batcher: Batcher[Tokens | Text, Result] = Batcher(
            lambda items: run(model, items),
            batch_tokens=options.max_batch_tokens,
            most_requests=options.max_concurrent_requests,
            on_batch=self.metrics.on_batch,
        )

    @property
    def kind(self) -> str:
        """What the contract calls a model with so many labels."""
        return {0: "embedding", 1: "reranker"}.get(len(self.model.config.labels), "classifier")

    async def predict(self, request: PredictRequest) -> Answer:
        """Every label with its score, best first; of a batch, a list of such lists."""
        inputs = request.inputs
        batch = isinstance(inputs, list) and (not inputs or isinstance(inputs[0], list))
        with self._counted("batch" if batch else "single"):
            if self.kind == "embedding":
                raise RefusedError("Backend", "this model is an encoder without a classification head: use /embed")
            items: list[Any] = list(inputs) if batch else [inputs]
            texts = [_sequence(item) for item in items]
            computed = await self._computed("predict", texts, request)
            logits = computed.values
            scores = logits if request.raw_scores else self._scores(logits)
            ranked = [self._ranked(row) for row in _finite(scores)]
            return (ranked if batch else ranked[0]), self._told(computed)

    async def rerank(self, request: RerankRequest) -> Answer:
        """The texts' places and scores, best first."""
        with self._counted("batch"):
            if self.kind != "reranker":
                raise RefusedError("Backend", f"a reranker has one label; this model is a {self.kind}")
            computed = await self._computed("predict", [(request.query, text) for text in request.texts], request)
            logits = computed.values[:, 0]
            scores = _finite(logits if request.raw_scores else _sigmoid(logits))
            best = np.argsort(-scores, kind="stable").tolist()
            shown = [{"text": request.texts[index]} if request.return_text else {} for index in best]
            body = [
                {"index": index, **text, "score": float(scores[index])} for index, text in zip(best, shown, strict=True)
            ]
            return body, self._told(computed)

    async def embed(self, request: EmbedRequest) -> Answer:
        """A vector for every text."""
        texts = [request.inputs] if isinstance(request.inputs, str) else request.inputs
        with self._counted("single" if isinstance(request.inputs, str) else "batch"):
            computed = await self._computed("embed", texts, request)
            return _finite(computed.values).tolist(), self._told(computed)

    async def tokenize(self, request: TokenizeRequest) -> Answer:
        """Every token of every text, however long."""
        texts = [request.inputs] if isinstance(request.inputs, str) else request.inputs
        with translated(), self.batcher.place():
            self._check_count(texts)
            rows = await self._in_pool(lambda: [self._tokens(text, request.add_special_tokens) for text in texts])
            return rows, {}

    async def explain(self, request: ExplainRequest) -> Answer:
        """The label, and the layer that removed each token. Runs beside the queue, in a place of its own."""
        item: TextOrPair = request.text if request.pair is None else (request.text, request.pair)
        with translated(), self.batcher.place():
            self._check_count([item])
            if self.kind == "embedding":
                raise RefusedError("Backend", "this model is an encoder without a classification head")
            prediction, found = await self._in_pool(lambda: (self.model.predict([item])[0], self.model.explain(item)))
            ratio = prediction.executed_flops / prediction.dense_flops
            shown = {key: value for key, value in found.to_dict().items() if key != "texts"}
            return shown | {"scores": prediction.scores, "flops_ratio": ratio}, {}

    async def healthy(self) -> bool:
        """Whether requests would be answered. Where the last batch failed, a small one is tried."""
        if not self.batcher.working or not self.batcher.last_batch_failed:
            return self.batcher.working
        ids, segments = self.model.encode("a")
        probe = Text("a", True, None) if self.kind == "embedding" else Tokens(ids[0], segments[0])
        try:
            (outcome,) = await asyncio.wait_for(asyncio.wrap_future(self.batcher.submit([probe], [1])), PROBE_S)
        except (StoppedError, asyncio.TimeoutError):
            return False
        return outcome.error is None

    def info(self) -> dict[str, Any]:
        """The contract's facts about model and server."""
        model, options, labels = self.model, self.options, self.model.config.labels
        names = {str(index): label for index, label in enumerate(labels)}
        of_kind = {"id2label": names, "label2id": {label: int(index) for index, label in names.items()}}
        return {
            "model_id": self.name,
            "model_sha": model.source.commit,
            "model_dtype": model.backend.precision,
            "served_model_name": self.name,
            "model_type": {self.kind: of_kind if labels else {"pooling": read_embedding(model.folder).pooling}},
            "max_concurrent_requests": options.max_concurrent_requests,
            "max_input_length": model.max_tokens,
            "max_batch_tokens": options.max_batch_tokens,
            "max_batch_requests": None,
            "max_client_batch_size": options.max_client_batch_size,
            "auto_truncate": options.auto_truncate,
            "tokenization_workers": self._workers,
            "version": __version__,
            "sha": None,
            "docker_label": None,
        }

    def tally(self) -> str:
        """What became of the requests for inference that were taken, for the log."""
        errors = self._taken - self._answered
        return f"{self._taken} requests taken, {self._answered} answered, {errors} answered with an error"

    def close(self) -> None:
        """Stop the engine thread and the tokenizers, when no request is left."""
        self.batcher.close(self.options.grace)
        self._pool.shutdown(cancel_futures=True)

    @contextmanager
    def _counted(self, method: str) -> Iterator[None]:
        """Around one request for inference: it is counted, and so is how it ends."""
        self.metrics.count.labels(method).inc()
        try:
            with translated():
                yield
        except RefusedError as error:
            self.metrics.failure.labels(error.kind.lower()).inc()
            raise
        self.metrics.success.labels(method).inc()
        self._answered += 1

    async def _computed(self, route: str, texts: Sequence[TextOrPair], request: Cut) -> Computed:
        """Tokens, a place in the queue, results. Raises RefusedError, or what `translated` makes one of."""
        began = time.perf_counter()
        with self.batcher.place():
            self._taken += 1
            self._check_count(texts)
            self.metrics.texts[route].inc(len(texts))
            items, tokens = await self._in_pool(lambda: self._encoded(texts, request))
            encoded = time.perf_counter()
            future = asyncio.wrap_future(self.batcher.submit(items, tokens))
            outcomes = await asyncio.wait_for(future, max(0.0, began + self.options.timeout - encoded))
        for outcome in outcomes:
            if outcome.error is not None:
                raise outcome.error if isinstance(outcome.error, StoppedError) else failed(outcome.error)
        self.metrics.answered_texts[route].inc(len(texts))
        characters = sum(len(text) if isinstance(text, str) else sum(map(len, text)) for text in texts)
        return Computed(route, outcomes, tokens, characters, began, encoded - began)

    def _encoded(self, texts: Sequence[TextOrPair], request: Cut) -> tuple[list[Tokens | Text], list[int]]:
        """What the queue takes for these texts, and their tokens. Raises RefusedError for one that may not be cut."""
        side = request.truncation_direction and request.truncation_direction.lower()
        found = self._encoders[side].encode(texts)
        may = self.options.auto_truncate if request.truncate is None else request.truncate
        for index, encoded in enumerate(found):
            if encoded.n_truncated and not may:
                length, limit = len(encoded.ids) + encoded.n_truncated, self.model.max_tokens
                hint = 'shorten it or send "truncate": true'
                raise RefusedError("Validation", f"input {index} has {length} tokens, the model takes {limit}: {hint}")
        lengths = [len(encoded.ids) for encoded in found]
        if isinstance(request, EmbedRequest):
            mode = TRUNCATION[side]
            return [Text(text, request.normalize, mode) for text in texts if isinstance(text, str)], lengths
        return [Tokens(encoded.ids.tolist(), encoded.segments.tolist()) for encoded in found], lengths

    def _check_count(self, texts: Sequence[TextOrPair]) -> None:
        if not texts or not all(any(text) for text in texts):
            raise RefusedError("Empty", "there must be at least one text, and none may be empty")
        most = self.options.max_client_batch_size
        if len(texts) > most:
            raise RefusedError("Validation", f"batch size {len(texts)} > maximum allowed batch size {most}")

    async def _in_pool(self, work: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _scores(self, logits: Float32) -> Float32:
        if not self.options.tei_compat:
            return self.model.activated(logits)
        if logits.shape[1] == 1:
            return _sigmoid(logits)
        exp = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exp / exp.sum(axis=1, keepdims=True)

    def _ranked(self, scores: Float32) -> list[dict[str, Any]]:
        values = scores.tolist()
        best = sorted(range(len(values)), key=values.__getitem__, reverse=True)  # NumPy's lets other threads go first
        return [{"score": values[at], "label": self.model.config.labels[at]} for at in best]

    def _tokens(self, text: str, special: bool) -> list[dict[str, Any]]:
        def shown(number: int, token: str, part: int | None, start: int, end: int) -> dict[str, Any]:
            if part is None:
                return {"id": number, "text": token, "special": True, "start": None, "stop": None}
            return {"id": number, "text": text[start:end], "special": False, "start": start, "stop": end}

        encoder = self.model.text_encoder
        return [shown(at, p.token, p.part, p.start, p.end) for at, p in encoder.uncut(text, special=special)]

    def _told(self, computed: Computed) -> dict[str, str]:
        """The headers of an answer, counted in the metrics too."""
        self.metrics.on_answer(computed)
        return computed.headers(self.model.backend.device)


def _sequence(item: str | list[str]) -> TextOrPair:
    if isinstance(item, str):
        return item
    if len(item) == 1:
        return item[0]
    if len(item) == 2:
        return item[0], item[1]
    message = f"a list of {len(item)} strings is neither a text nor a pair; a batch of texts is [[a], [b], [c]]"
    raise RefusedError("Validation", message, NOT_UNDERSTOOD)


def _sigmoid(logits: Float32) -> Float32:
    return np.exp(-np.logaddexp(0, -logits.astype(np.float64))).astype(np.float32)


def _finite(scores: Float32) -> Float32:
    if not np.isfinite(scores).all():
        raise RefusedError("Backend", "a score is not a finite number")
    return scores
