"""Items of many requests in one queue, run in batches of a token budget by one engine thread. No HTTP, no model.

While a batch runs, what arrives waits, and all of it that fits the budget is the next batch: an idle engine never waits
for company, and a busy one finds its batches ready.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from .errors import MinilptError

T = TypeVar("T")
R = TypeVar("R")


class FullError(MinilptError):
    """As many requests as may be are being worked on."""


class StoppedError(MinilptError):
    """The batcher takes no more requests, or gave up those that it had taken."""


@dataclass(frozen=True)
class Outcome(Generic[R]):
    """What became of one item: its value, or the error that it alone gave; seconds in the queue and in its batch."""

    value: R | None
    error: BaseException | None
    queue_s: float
    run_s: float


class _Request(Generic[R]):
    """The items of one request: outcomes as they come, and the future that gets them all."""

    def __init__(self, count: int):
        self.future: Future[list[Outcome[R]]] = Future()
        self.outcomes: list[Outcome[R] | None] = [None] * count
        self.missing = count


@dataclass(frozen=True)
class _Entry(Generic[T, R]):
    request: _Request[R]
    index: int
    item: T
    tokens: int
    since: float


class Batcher(Generic[T, R]):
    """A queue in front of `run`, which takes a list of items and gives as many results, in order.

    batch_tokens: of one batch; an item of more goes alone. most_requests: that may hold a place at a time. on_batch is
    told the items and tokens of every batch. Every method may be called from any thread.
    """

    def __init__(
        self,
        run: Callable[[list[T]], Sequence[R]],
        *,
        batch_tokens: int,
        most_requests: int,
        on_batch: Callable[[int, int], None] = lambda items, tokens: None,
    ):
        self._run, self._on_batch = run, on_batch
        self._batch_tokens, self._most_requests = batch_tokens, most_requests
        self._queue: deque[_Entry[T, R]] = deque()
        self._changed = threading.Condition()  # its lock may be taken again by the thread that holds it
        self._places, self._refusing, self._ending = 0, False, False
        self.last_batch_failed = False
        self._thread = threading.Thread(target=self._work, name="minilpt-batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Items in the queue."""
        return len(self._queue)

    @property
    def working(self) -> bool:
        """Whether requests are taken and the engine thread lives."""
        return self._thread.is_alive() and not self._refusing

    @contextmanager
    def place(self) -> Iterator[None]:
        """One request's permission to submit, held until it is answered. Raises FullError or StoppedError."""
        with self._changed:
            if self._refusing:
                raise StoppedError("the server is stopping and takes no more requests")
            if self._places >= self._most_requests:
                raise FullError(f"{self._places} requests are being worked on, which is the limit; try again later")
            self._places += 1
        try:
            yield
        finally:
            with self._changed:
                self._places -= 1

    def submit(self, items: Sequence[T], tokens: Sequence[int]) -> Future[list[Outcome[R]]]:
        """Queue the items of one request; its future gives an outcome for each, in order.

        Cancelling the future takes out of the queue what has not run. Raises StoppedError after `close` or `abandon`.
        """
        request: _Request[R] = _Request(len(items))
        if not items:
            request.future.set_result([])
            return request.future
        now = time.perf_counter()
        with self._changed:
            if self._ending:
                raise StoppedError("the server has stopped")
            for index, (item, count) in enumerate(zip(items, tokens, strict=True)):
                self._queue.append(_Entry(request, index, item, count, now))
            self._changed.notify()
        return request.future

    def refuse(self) -> None:
        """Give no more places; requests that hold one may go on."""
        self._refusing = True

    def abandon(self) -> None:
        """Refuse everything new, and answer what is still in the queue with StoppedError."""
        with self._changed:
            self._refusing = self._ending = True
            left, self._queue = self._queue, deque()
            self._changed.notify()
        for entry in left:
            error = StoppedError("the server stopped before this request had its turn")
            self._finish(entry, Outcome(None, error, time.perf_counter() - entry.since, 0.0))

    def close(self, grace_s: float) -> None:
        """Refuse everything new, run what is queued for at most grace_s, then abandon the rest."""
        with self._changed:
            self._refusing = self._ending = True
            self._changed.notify()
        self._thread.join(grace_s)
        self.abandon()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._ending)
                if not self._queue:
                    return
                batch = self._next_batch()
            if batch:
                self._run_batch(batch)

    def _next_batch(self) -> list[_Entry[T, R]]:
        """From the head of the queue, what fits the budget; items of cancelled requests fall away."""
        batch: list[_Entry[T, R]] = []
        total = 0
        while self._queue:
            entry = self._queue[0]
            if entry.request.future.cancelled():
                self._finish(entry, Outcome(None, CancelledError(), 0.0, 0.0))  # whoever waits for it is told
            elif batch and total + entry.tokens > self._batch_tokens:
                break
            else:
                batch.append(entry)
                total += entry.tokens
            self._queue.popleft()
        return batch

    def _run_batch(self, batch: list[_Entry[T, R]]) -> None:
        self._on_batch(len(batch), sum(entry.tokens for entry in batch))
        began = time.perf_counter()
        results = self._results([entry.item for entry in batch])
        took = time.perf_counter() - began
        self.last_batch_failed = all(error is not None for _, error in results)
        for entry, (value, error) in zip(batch, results, strict=True):
            self._finish(entry, Outcome(value, error, began - entry.since, took))

    def _results(self, items: list[T]) -> list[tuple[R | None, BaseException | None]]:
        """(value, error) of every item. After a failure each runs alone, so that none fails with its neighbour."""
        try:
            values = self._run(items)
            if len(values) != len(items):
                raise RuntimeError(f"the engine gave {len(values)} results for {len(items)} items")
        except BaseException as error:  # whatever it is, this thread must live on and its requests be answered
            return [(None, error)] if len(items) == 1 else [self._results([item])[0] for item in items]
        return [(value, None) for value in values]

    def _finish(self, entry: _Entry[T, R], outcome: Outcome[R]) -> None:
        request = entry.request
        with self._changed:  # `abandon` may finish other items of the same request
            request.outcomes[entry.index] = outcome
            request.missing -= 1
            whole = request.missing == 0
        if whole and request.future.set_running_or_notify_cancel():
            request.future.set_result([found for found in request.outcomes if found is not None])
