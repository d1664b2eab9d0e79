"""Which work on devices is in order: within a stream, and by events and waits; by nothing else.

The stand-in does all work at once, so that a missing wait would never show in its results. Here every piece of work has
a number in its stream, memory remembers who wrote and who read it last, and an access that no order puts behind those
is an error. Stricter than CUDA in one thing: the default stream and others never wait for each other by themselves.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

_LOCK = threading.RLock()


class UnorderedError(Exception):
    """Work that may run before other work that it needs, or that needs the same memory."""


class Clock:
    """Of a stream: its number of pieces of work, and up to which the host has waited."""

    def __init__(self, name: str):
        self.name, self.started, self.waited = name, 0, 0
        self._behind: dict[Clock, int] = {}  # of other streams, up to which piece they come before this one's next

    def moment(self) -> Mapping[Clock, int]:
        """What comes before an event that is recorded now."""
        with _LOCK:
            return {**self._behind, self: self.started}

    def wait_for(self, moment: Mapping[Clock, int]) -> None:
        """Further work comes behind an event."""
        with _LOCK:
            for clock, number in moment.items():
                self._behind[clock] = max(number, self._behind.get(clock, 0))

    def knows(self, clock: Clock, number: int) -> bool:
        return clock is self or number <= max(clock.waited, self._behind.get(clock, 0))


def host_waits(moment: Mapping[Clock, int]) -> None:
    """The host waits for an event, or for all that a stream has at the moment."""
    with _LOCK:
        for clock, number in moment.items():
            clock.waited = max(clock.waited, number)


class Uses:
    """Of one allocation: its last write, and the reads since."""

    def __init__(self) -> None:
        self.writer: tuple[Clock, int] | None = None
        self.readers: dict[Clock, int] = {}


def access(clock: Clock, what: str, *, reads: Iterable[Uses] = (), writes: Iterable[Uses] = ()) -> None:
    """A piece of work in a stream. UnorderedError where other streams' work on the memory may not be done.

    what: the work's name in that message. What is written counts as read, too.
    """
    with _LOCK:
        clock.started += 1
        for uses, written in [*((uses, False) for uses in reads), *((uses, True) for uses in writes)]:
            before = [("wrote", *uses.writer)] if uses.writer else []
            before += [("reads", *reader) for reader in uses.readers.items()] if written else []
            for did, other, number in before:
                if not clock.knows(other, number):
                    raise UnorderedError(f"{what} on {clock.name} uses memory that {other.name} {did}, without a wait")
            if written:
                uses.writer, uses.readers = (clock, clock.started), {}
            else:
                uses.readers[clock] = clock.started
