"""Whatever goes wrong, as the error that the contract has for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ..batching import FullError, StoppedError
from ..errors import DependencyError, InputError, MinilptError, TokenizerError

# error_type -> status. Validation has two: 413 for too much (texts, tokens, bytes), 422 for what is not understood.
STATUS = {
    "Empty": 400,
    "Unauthorized": 401,
    "Validation": 413,
    "Tokenizer": 422,
    "Backend": 424,
    "Overloaded": 429,
    "Unhealthy": 503,
}
NOT_UNDERSTOOD = 422

_log = logging.getLogger("minilpt")


class RefusedError(MinilptError):
    """A request that gets an error for an answer. kind: a key of STATUS; status: another than its own."""

    def __init__(self, kind: str, message: str, status: int | None = None):
        super().__init__(message)
        self.kind, self.status = kind, status or STATUS[kind]


@contextmanager
def translated() -> Iterator[None]:
    """Every error inside as the RefusedError that a client gets for it."""
    try:
        yield
    except RefusedError:
        raise
    except Exception as error:
        raise _refusal(error) from error


def _refusal(error: Exception) -> RefusedError:
    match error:
        case FullError():
            return RefusedError("Overloaded", str(error))
        case StoppedError():
            return RefusedError("Unhealthy", str(error))
        case asyncio.TimeoutError():
            return RefusedError("Overloaded", "the request was not answered in time; try again later")
        case TokenizerError() | DependencyError():
            return RefusedError("Tokenizer", str(error))
        case InputError():
            return RefusedError("Validation", str(error), NOT_UNDERSTOOD)
    return failed(error)


def failed(error: BaseException) -> RefusedError:
    """The engine's own failure, which the log gets whole and the client in a line."""
    _log.error("a request failed in the engine: %r", error, exc_info=error)
    return RefusedError("Backend", f"inference failed: {type(error).__name__}: {error}")
