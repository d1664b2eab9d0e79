"""The process: listen, run until a signal, then answer what was taken and refuse the rest."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import socket

import uvicorn

from ..api import Classifier
from ..errors import InputError
from .app import create_app
from .options import ServeOptions
from .service import Service

# Load balancers keep idle connections for 60 s by default; the side that closes first must not be this one, or a
# request that is just under way meets a closed door.
KEEP_ALIVE_S = 75
BACKLOG = 2048  # connections that wait to be accepted

_log = logging.getLogger("minilpt")


class _Server(uvicorn.Server):
    """Uvicorn that tells the service when to refuse, and when to give up."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        batcher, grace = self._service.batcher, self._service.options.grace
        _log.info("stopping: no more requests are taken; those that are here have %g s", grace)
        batcher.refuse()
        giving_up = asyncio.get_running_loop().call_later(grace, batcher.abandon)
        await super().shutdown(sockets)
        giving_up.cancel()


def serve(model: Classifier, options: ServeOptions, name: str) -> None:
    """Serve until SIGTERM or SIGINT. Raises InputError if the address cannot be had."""
    listener = listening(options.host, options.port)
    service = Service(model, options, name)
    config = uvicorn.Config(
        create_app(service),
        log_config=None,
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(options.grace) + 1,  # after `abandon` everything has its answer
        server_header=False,
    )
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    _log.info("serving %s on http://%s:%d, its API on /docs", name, shown, port)
    # Uvicorn raises the signal again when it has stopped; for an orderly end that is no reason to fail.
    signal.signal(signal.SIGTERM, lambda *_: None)
    _Server(config, service).run(sockets=[listener])
    _log.info("stopped: %s", service.tally())


def listening(host: str, port: int) -> socket.socket:
    """A socket on which connections wait already. Raises InputError if the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, proto=socket.IPPROTO_TCP)[0]
        made = socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        raise InputError(f"{host}:{port}: cannot listen there: {error.strerror}; set --host, --port") from None
    # With its protocol named, asyncio turns Nagle's algorithm off; else answers wait some 40 ms for a delayed ACK.
    return socket.socket(family, kind, protocol, made.detach())
