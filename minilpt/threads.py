"""Threads that run compiled kernels side by side; the caller's own is one of them. The kernels release the GIL."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


class Threads:
    """`count` threads, started when first needed and again in a forked child; safe to share."""

    def __init__(self, count: int):
        self.count = count
        self._reset()
        _ALIVE.add(self)

    def _reset(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._starting, self._team = threading.Lock(), threading.Lock()

    def each(self, tasks: Iterable[Callable[[], None]]) -> None:
        """Run every task once, in any order; returns when all are done, raises what the first failing one raised."""
        waiting = deque(tasks)

        def drain() -> None:
            while waiting:
                try:
                    task = waiting.popleft()
                except IndexError:  # another thread took the last one
                    return
                task()

        self._beside(drain, [drain] * min(self.count - 1, len(waiting) - 1))

    def together(self, part: Callable[[int, int], None]) -> None:
        """Run part(thread, threads) for every thread of a team that may wait for each other inside.

        A team needs all its threads at once, so there is one at a time; while it runs, others have a team of one.
        """
        if self.count == 1 or not self._team.acquire(blocking=False):
            return part(0, 1)
        try:
            others = [partial(part, thread, self.count) for thread in range(1, self.count)]
            self._beside(lambda: part(0, self.count), others)
        finally:
            self._team.release()

    def _beside(self, mine: Callable[[], None], others: Sequence[Callable[[], None]]) -> None:
        futures = [self._submit(other) for other in others]
        mine()
        for future in futures:
            future.result()

    def _submit(self, task: Callable[[], None]) -> Future[None]:
        with self._starting:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(self.count - 1, thread_name_prefix="minilpt")
        return self._executor.submit(task)


_ALIVE: weakref.WeakSet[Threads] = weakref.WeakSet()


def _after_fork() -> None:
    for threads in _ALIVE:
        threads._reset()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_after_fork)


def usable_cores() -> int:
    """Cores that this process may use: its affinity mask, and no more than its cgroup's CPU quota, rounded up."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows have no affinity mask
        cores = os.cpu_count() or 1
    quota = cgroup_quota()
    return cores if quota is None else max(1, min(cores, -int(-quota // 1)))


def cgroup_quota() -> float | None:
    """CPUs that the cgroup grants (v2 cpu.max, else v1 cfs), None if it sets no limit."""
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        try:
            texts = [(CGROUP / name).read_text(encoding="ascii") for name in names]
        except OSError:
            continue
        quota, period = " ".join(texts).split()
        return None if quota in ("max", "-1") else int(quota) / int(period)
    return None
