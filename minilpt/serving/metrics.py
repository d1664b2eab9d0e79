"""What a server counts, under the names that text-embeddings-inference gives to the same."""

from __future__ import annotations

import re
from collections.abc import Callable

import prometheus_client as prometheus

from .work import Computed

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Seconds, from 0.25 ms in steps of 2 to 65 s; items and tokens in a batch in steps of 2.
SECONDS = tuple(0.00025 * 2**step for step in range(19))
SIZES = tuple(2**step for step in range(15))
# /rerank predicts pairs.
ROUTES = ("predict", "embed")
PARTS = {
    "": "in all",
    "tokenization_": "until its texts are tokens",
    "queue_": "in the queue, mean of its texts",
    "inference_": "in its batches, mean of its texts",
}


class Metrics:
    """Counters and histograms of one server. waiting: gives the items in the queue; layers: the model's."""

    def __init__(self, waiting: Callable[[], int], layers: int):
        self._registry = registry = prometheus.CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> prometheus.Counter:
            return prometheus.Counter(name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> prometheus.Histogram:
            return prometheus.Histogram(name, text, registry=registry, buckets=buckets)

        self.count = counter("te_request_count", "Requests for inference", "method")
        self.success = counter("te_request_success", "Requests that got their answer", "method")
        self.failure = counter("te_request_failure", "Requests that got an error", "err")
        self.texts = {route: counter(f"te_{route}_count", f"Texts for {route}") for route in ROUTES}
        self.answered_texts = {
            route: counter(f"te_{route}_success", f"Texts for {route} that have their results") for route in ROUTES
        }
        self._durations = {
            (who, part): histogram(f"te_{who}_{part}duration", f"Seconds of a request, {text}")
            for who in ("request", *ROUTES)
            for part, text in PARTS.items()
        }
        self.batch_items = histogram("te_batch_next_size", "Texts in a batch", SIZES)
        self.batch_tokens = histogram("te_batch_next_tokens", "Tokens in a batch", SIZES)
        kept_tokens = counter("minilpt_kept_tokens", "Tokens that a layer's feed-forward computed", "layer")
        flops = counter("minilpt_flops", "Of matrix products, executed and as the dense model has them", "kind")
        self._kept_tokens = [kept_tokens.labels(str(layer)) for layer in range(layers)]
        self._executed, self._dense = flops.labels("executed"), flops.labels("dense")
        prometheus.Gauge("te_queue_size", "Texts in the queue", registry=registry).set_function(waiting)

    def on_batch(self, items: int, tokens: int) -> None:
        """A batch begins."""
        self.batch_items.observe(items)
        self.batch_tokens.observe(tokens)

    def on_answer(self, computed: Computed) -> None:
        """A request has its results."""
        for part, seconds in computed.seconds().items():
            for who in ("request", computed.route):
                self._durations[who, part].observe(seconds)
        for result in computed.results:
            for layer, kept in enumerate(result.kept_tokens):
                self._kept_tokens[layer].inc(kept)
            self._executed.inc(result.executed_flops)
            self._dense.inc(result.dense_flops)

    def render(self) -> bytes:
        """Prometheus' text format.

        The client library ends every counter's name in _total, which the contract's names do not have, and tells when
        each was created, which nobody asked.
        """
        text = prometheus.generate_latest(self._registry)
        text = re.sub(rb"^(?:# (?:HELP|TYPE) )?te_\w+_created.*\n", b"", text, flags=re.MULTILINE)
        return re.sub(rb"^((?:# (?:HELP|TYPE) )?te_\w+)_total\b", rb"\1", text, flags=re.MULTILINE)
