"""The batching core alone: every request gets its own answers exactly once, whatever fails, is cancelled or stops."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, wait

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilpt.batching import Batcher, FullError, Outcome, StoppedError

PATIENCE_S = 10  # for what takes no time unless it hangs


class Engine:
    """Doubles numbers, raises for negative ones; runs a batch for every permit. Records what it was given."""

    def __init__(self, permits: int = 0):
        self.permits = threading.Semaphore(permits)
        self.began = threading.Semaphore(0)
        self.batches: list[list[int]] = []

    def __call__(self, items: list[int]) -> list[int]:
        self.began.release()
        assert self.permits.acquire(timeout=PATIENCE_S)
        self.batches.append(list(items))
        if any(item < 0 for item in items):
            raise ValueError(f"{min(items)} is negative")
        return [2 * item for item in items]


def batcher(engine: Engine, batch_tokens: int = 4, most_requests: int = 100) -> Batcher[int, int]:
    return Batcher(engine, batch_tokens=batch_tokens, most_requests=most_requests)


def settled(futures: Sequence[Future[list[Outcome[int]]]]) -> None:
    assert not wait(futures, timeout=PATIENCE_S).not_done


def check(items: Sequence[int], outcomes: Sequence[Outcome[int]]) -> None:
    """Each item has its own answer, or its own failure, or was given up at the stop."""
    assert len(outcomes) == len(items)
    for item, found in zip(items, outcomes, strict=True):
        if isinstance(found.error, StoppedError):
            continue
        if item < 0:
            assert isinstance(found.error, ValueError) and str(item) in str(found.error)
        else:
            assert found.value == 2 * item and found.error is None


# A request: its numbers (negative ones fail), and whether it is cancelled at once. Numbers are made unique below.
REQUESTS = st.lists(st.tuples(st.lists(st.booleans(), max_size=5), st.booleans()), max_size=12)


@settings(max_examples=60)
@given(requests=REQUESTS, batch_tokens=st.integers(1, 6), permits=st.integers(0, 20), abandon=st.booleans())
def test_every_request_gets_its_own_answers_exactly_once(
    requests: list[tuple[list[bool], bool]], batch_tokens: int, permits: int, abandon: bool
) -> None:
    engine, number = Engine(permits), 0
    core, sent = batcher(engine, batch_tokens), []
    for fails, cancelled in requests:
        items = [-(number + at) - 1 if bad else number + at + 1 for at, bad in enumerate(fails)]
        number += len(items)
        future = core.submit(items, [1] * len(items))
        if cancelled:
            future.cancel()
        sent.append((items, future))
    if abandon:
        core.abandon()
    engine.permits.release(1000)
    core.close(PATIENCE_S)
    settled([future for _, future in sent])
    for items, future in sent:
        if not future.cancelled():
            check(items, future.result())
            assert abandon or not [found for found in future.result() if isinstance(found.error, StoppedError)]
    assert all(1 <= len(batch) <= batch_tokens for batch in engine.batches)
    succeeded = [item for batch in engine.batches if min(batch) > 0 for item in batch]
    assert len(succeeded) == len(set(succeeded))  # what worked never ran twice


@settings(max_examples=20)
@given(counts=st.lists(st.lists(st.integers(1, 4), min_size=4, max_size=4), min_size=2, max_size=4))
def test_threads_that_submit_at_once_get_their_own_answers(counts: list[list[int]]) -> None:
    engine = Engine(1000)
    core, wrong = batcher(engine), []

    def client(base: int, sizes: list[int]) -> None:
        for turn, size in enumerate(sizes):
            items = [base + 10 * turn + at for at in range(size)]
            with core.place():
                found = core.submit(items, [1] * size).result(PATIENCE_S)
            if [outcome.value for outcome in found] != [2 * item for item in items]:
                wrong.append((items, found))

    threads = [threading.Thread(target=client, args=(1000 * at, sizes)) for at, sizes in enumerate(counts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    core.close(PATIENCE_S)
    assert not wrong
    assert sorted(item for batch in engine.batches for item in batch) == sorted(
        1000 * at + 10 * turn + place
        for at, sizes in enumerate(counts)
        for turn, size in enumerate(sizes)
        for place in range(size)
    )


def test_what_waits_is_the_next_batch_as_far_as_it_fits() -> None:
    engine = Engine()
    core = batcher(engine, batch_tokens=10)
    first = core.submit([1], [3])
    assert engine.began.acquire(timeout=PATIENCE_S)
    rest = [core.submit([item], [tokens]) for item, tokens in ((2, 4), (3, 4), (4, 4), (5, 50), (6, 1))]
    assert core.waiting == 5
    engine.permits.release(10)
    settled([first, *rest])
    assert engine.batches == [[1], [2, 3], [4], [5], [6]]
    core.close(PATIENCE_S)


def test_an_item_that_fails_does_not_fail_its_neighbours() -> None:
    engine = Engine()
    core = batcher(engine)
    first = core.submit([9], [1])
    assert engine.began.acquire(timeout=PATIENCE_S)
    good, bad = core.submit([1, 2], [1, 1]), core.submit([-3], [1])
    engine.permits.release(10)
    settled([first, good, bad])
    check([1, 2], good.result())
    check([-3], bad.result())
    assert engine.batches == [[9], [1, 2, -3], [1], [2], [-3]]
    core.close(PATIENCE_S)


def test_whether_the_last_batch_failed_is_known() -> None:
    core = batcher(Engine(10))
    settled([core.submit([-1], [1])])
    core.close(PATIENCE_S)
    assert core.last_batch_failed
    core = batcher(Engine(10))
    settled([core.submit([-1], [1])])
    settled([core.submit([1], [1])])
    core.close(PATIENCE_S)
    assert not core.last_batch_failed


@pytest.mark.parametrize("raised", [SystemExit(1), MemoryError()], ids=["exit", "memory"])
def test_the_engine_thread_outlives_whatever_is_raised(raised: BaseException) -> None:
    def run(items: list[int]) -> list[int]:
        if 0 in items:
            raise raised
        return items

    core = Batcher(run, batch_tokens=1, most_requests=1)
    assert core.submit([0], [1]).result(PATIENCE_S)[0].error is raised
    assert core.submit([1], [1]).result(PATIENCE_S)[0].value == 1
    core.close(PATIENCE_S)


def test_too_few_results_are_an_error_not_a_mix_up() -> None:
    core: Batcher[int, int] = Batcher(lambda items: items[1:], batch_tokens=9, most_requests=1)
    (found,) = core.submit([1], [1]).result(PATIENCE_S)
    assert isinstance(found.error, RuntimeError)
    core.close(PATIENCE_S)


def test_a_cancelled_request_leaves_the_queue_unrun() -> None:
    engine = Engine()
    core = batcher(engine, batch_tokens=1)
    first = core.submit([1], [1])
    assert engine.began.acquire(timeout=PATIENCE_S)
    cancelled, last = core.submit([2, 3], [1, 1]), core.submit([4], [1])
    assert cancelled.cancel()
    engine.permits.release(10)
    settled([first, last])
    assert engine.batches == [[1], [4]]
    with pytest.raises(CancelledError):
        cancelled.result()
    core.close(PATIENCE_S)


def test_places_are_limited_given_back_and_refused_at_the_stop() -> None:
    core = batcher(Engine(), most_requests=2)
    with core.place():
        with core.place(), pytest.raises(FullError, match="2 requests are being worked on"), core.place():
            pass
        with core.place():
            pass
        core.refuse()
        with pytest.raises(StoppedError), core.place():
            pass
        assert not core.working
    core.close(PATIENCE_S)
    with pytest.raises(StoppedError):
        core.submit([1], [1])


def test_close_runs_what_is_queued_and_abandons_what_does_not_fit_the_grace() -> None:
    engine = Engine(1)
    core = batcher(engine, batch_tokens=1)
    first, second, third = (core.submit([item], [1]) for item in (1, 2, 3))
    settled([first])
    core.close(0.01)  # the engine waits for a permit, so the second cannot end within the grace
    assert isinstance(third.result(PATIENCE_S)[0].error, StoppedError)
    engine.permits.release(1)  # what had begun is answered nevertheless
    check([2], second.result(PATIENCE_S))


def test_no_items_are_answered_at_once() -> None:
    core = batcher(Engine())
    assert core.submit([], []).result(0) == []
    core.close(PATIENCE_S)
