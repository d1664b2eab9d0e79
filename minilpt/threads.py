"""Threads that run compiled kernels side by side. The kernels release the GIL.

A team's work is done by threads of ours and none by the caller's: a KeyboardInterrupt comes in the main thread between
any two steps of Python, and a caller that it took out of a team would leave the others waiting at their barrier, in
memory that goes away. So a caller hands over a whole job in one step and waits. If it leaves, the job runs to its end,
and holds all that it needs.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from queue import SimpleQueue

CGROUP, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")

Run = Callable[[], object]
Part = Callable[[int, int], Run]  # (thread, threads) to what that thread runs
Work = SimpleQueue[Run | None]


class Threads:
    """`count` threads, started when first needed and again after `close` or in a forked child; safe to share."""

    def __init__(self, count: int):
        self.count = count
        self._crews: dict[str, _Crew] = {}  # one or none: a dict changes in one step
        _ALIVE.add(self)

    def each(self, tasks: Iterable[Run]) -> None:
        """Run every task once, in any order; returns when all are done, raises what the first failing one raised."""
        waiting = deque(tasks)

        def drain() -> None:
            while waiting:
                try:
                    task = waiting.popleft()
                except IndexError:  # another thread took the last one
                    return
                task()

        self.together(lambda thread, threads: drain)

    def together(self, part: Part) -> None:
        """Run what part(thread, threads) gives, for every thread of a team that may wait for each other inside.

        A team needs all its threads at once, so there is one at a time; while it runs, others have a team of one, the
        calling thread. So they have where no thread can be started. Raises what the first failing thread raised;
        nothing runs if `part` raises.
        """
        crew = self._crew() if self.count > 1 else None
        if crew is None or crew.busy():
            part(0, 1)()
            return
        job = _Job(part)
        crew.inbox.put(job)
        if crew.left.is_set() and job.taken():  # closed meanwhile: the leader has seen the job, or never will
            part(0, 1)()
            return
        error = job.ended.get()
        if error is not None:
            raise error

    def close(self) -> None:
        """End the threads, after what they are at."""
        crew = self._crews.pop("", None)
        if crew is not None:
            crew.inbox.put(None)
            crew.leader.join()

    def _crew(self) -> _Crew | None:
        """The crew, at work; None where the system gives no thread: a limit, or the interpreter's end."""
        if "" not in self._crews:
            crew = _Crew(self.count)
            try:
                crew.leader.start()
            except RuntimeError:
                return None
            self._crews.setdefault("", crew)  # of two that callers start at once, one ends with its last reference
        return self._crews.get("")


class _Job:
    """A team's work. taken(): True at the first call, for whoever runs it. ended: gets None or the exception."""

    def __init__(self, part: Part):
        self.part = part
        self.taken = partial(threading.Lock().acquire, blocking=False)
        self.ended: SimpleQueue[BaseException | None] = SimpleQueue()


class _Crew:
    """A leader, who takes jobs from the inbox until None comes, and those who follow.

    The leader starts the others, because no interrupt reaches it. No thread refers to the crew, so that all of them
    end when it goes.
    """

    def __init__(self, count: int):
        self.inbox: SimpleQueue[_Job | None] = SimpleQueue()
        self.working, self.left = threading.Event(), threading.Event()
        arguments = (count, self.inbox, self.working, self.left)
        self.leader = threading.Thread(target=_lead, args=arguments, name="minilpt-0", daemon=True)
        weakref.finalize(self, self.inbox.put, None).atexit = False

    def busy(self) -> bool:
        """Whether a job runs or waits. One that comes a moment too late to be refused waits its turn."""
        return self.working.is_set() or not self.inbox.empty()


def _lead(count: int, inbox: SimpleQueue[_Job | None], working: threading.Event, left: threading.Event) -> None:
    done: SimpleQueue[BaseException | None] = SimpleQueue()
    followers = list(_followers(count - 1, done))
    while True:
        if left.is_set() and inbox.empty():
            break
        job = inbox.get()
        if job is None:
            left.set()
        elif job.taken():
            working.set()
            error = _led(job.part, [mine for _, mine in followers], done)
            working.clear()
            job.ended.put(error)
            del error
        del job  # and with it a batch and its results
    for thread, mine in followers:
        mine.put(None)
        thread.join()


def _followers(count: int, done: SimpleQueue[BaseException | None]) -> Iterator[tuple[threading.Thread, Work]]:
    """As many as the system gives, each with the queue that it works off."""
    for number in range(1, count + 1):
        mine: Work = SimpleQueue()
        thread = threading.Thread(target=_follow, args=(mine, done), name=f"minilpt-{number}", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            return
        yield thread, mine


def _led(part: Part, others: list[Work], done: SimpleQueue[BaseException | None]) -> BaseException | None:
    """What went wrong first. All parts are made before any runs: none shall wait for one that could not be made."""
    try:
        first, *rest = [part(thread, 1 + len(others)) for thread in range(1 + len(others))]
    except BaseException as error:
        return error
    for mine, run in zip(others, rest, strict=True):
        mine.put(run)
    outcomes = [_outcome(first), *(done.get() for _ in others)]
    return next((error for error in outcomes if error is not None), None)


def _follow(mine: Work, done: SimpleQueue[BaseException | None]) -> None:
    while (run := mine.get()) is not None:
        error = _outcome(run)
        del run
        done.put(error)
        del error


def _outcome(run: Run) -> BaseException | None:
    try:
        run()
    except BaseException as error:
        return error
    return None


_ALIVE: weakref.WeakSet[Threads] = weakref.WeakSet()


def _after_fork() -> None:
    for threads in _ALIVE:
        threads._crews.clear()


def _at_exit() -> None:
    """What still runs, for a caller that was interrupted, ends before its memory goes."""
    for threads in list(_ALIVE):
        threads.close()


atexit.register(_at_exit)
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
    """CPUs that the process's cgroup and those around it grant (v2 cpu.max, v1 cfs): the least, None if no limit."""
    quotas = (
        _quota([folder / name for name in names])
        for mount, place, names in _cpu_cgroups()
        for folder in (mount, *(mount.joinpath(*place[: depth + 1]) for depth in range(len(place))))
    )
    return min((quota for quota in quotas if quota is not None), default=None)


def _cpu_cgroups() -> Iterator[tuple[Path, tuple[str, ...], tuple[str, ...]]]:
    """Hierarchies that can hold CPU limits: where each is mounted, the path to this process's group, the files.

    A container often sees its own group as the mount itself, whatever the path says.
    """
    v2, v1 = ("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    try:
        lines = OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in [*lines, "0::/", "1:cpu:/"]:
        number, controllers, place = line.split(":", 2)
        steps = tuple(step for step in place.split("/") if step not in ("", ".."))
        if number == "0":
            yield from ((mount, steps, v2) for mount in (CGROUP, CGROUP / "unified"))
        elif "cpu" in controllers.split(","):
            yield from ((CGROUP / name, steps, v1) for name in ("cpu", "cpu,cpuacct"))


def _quota(files: list[Path]) -> float | None:
    """The number of CPUs that the files grant; None if they are not there, or set no limit."""
    try:
        quota, period = " ".join(file.read_text(encoding="ascii") for file in files).split()
    except (OSError, ValueError):
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)
