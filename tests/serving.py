"""Servers for the tests, on loopback: in this process, with engines that do what a test wants, or as a command."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

from minilpt.serving.app import create_app
from minilpt.serving.options import ServeOptions
from minilpt.serving.server import listening
from minilpt.serving.service import Service

PATIENCE_S = 30  # for what takes no time unless it hangs


class Altered:
    """A model with some of its methods replaced."""

    def __init__(self, model: Any, **replaced: Any):
        self._model = model
        vars(self).update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@contextmanager
def served(model: Any, **options: Any) -> Iterator[httpx.Client]:
    """A client of a server of this model, in a thread of this process."""
    chosen = ServeOptions(host="127.0.0.1", port=0, **options)
    listener = listening(chosen.host, chosen.port)
    app = create_app(Service(model, chosen, "tiny"))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    host, port = listener.getsockname()
    with httpx.Client(base_url=f"http://{host}:{port}", timeout=PATIENCE_S, trust_env=False) as client:
        client.get("/info")  # waits until it is up
        yield client
    server.should_exit = True
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


@contextmanager
def command(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`minilpt serve --port 0` with further arguments: the process, and where it listens."""
    process = subprocess.Popen(
        [sys.executable, "-m", "minilpt", "serve", "--port", "0", *arguments], stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"on (http://[\d.:]+)", line):
                yield process, found[1]
                break
        else:
            raise AssertionError(f"the server ended with status {process.wait()}")
    finally:
        process.kill()
        process.communicate()
