"""A hub on loopback, as huggingface_hub speaks to one: model info, resolve with redirects and etags, ranges, refusals.

Small files are answered where they are asked for; large ones (safetensors) with a redirect to a content address, as the
real hub sends them to its storage. Faults are planned per file and happen once each.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import sys
import threading
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

Files = dict[str, bytes]
LARGE = ".safetensors"
OF_THE_LIBRARY = ("HF_", "HUGGING", "TRANSFORMERS_", "XDG_CACHE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


def files_of(folder: Path) -> Files:
    """Every file of a folder, by its path there."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@dataclass
class Repository:
    """commits: hash -> files; refs: branch or tag -> hash. token: that a reader must send. gated: refused even so."""

    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False

    def push(self, files: Files, ref: str = "main") -> str:
        """A commit with exactly these files; returns its hash."""
        content = repr(sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items()))
        commit = hashlib.sha1(content.encode()).hexdigest()
        self.commits[commit] = files
        self.refs[ref] = commit
        return commit


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    bytes_from: int  # of the Range that was asked for, 0 if none
    token: str | None


class HubServer(ThreadingHTTPServer):
    """repositories: by "owner/name". requests: all that came. faults: file name -> what goes wrong next, in order.

    A fault is a status, "truncated" (half of the body, then the end of the connection) or "stalled" (half of the body,
    then nothing more). The file name of model info is "info".
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: defaultdict[str, Repository] = defaultdict(Repository)
        self.requests: list[Request] = []
        self.faults: defaultdict[str, list[int | str]] = defaultdict(list)
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def storage(self) -> str:
        """Under another name of this machine: clients treat a redirect to another host as one to a storage."""
        return f"http://localhost:{self.server_address[1]}/storage"

    def paths(self, method: str = "GET") -> list[str]:
        """What was asked for, in order."""
        return [request.path for request in self.requests if request.method == method]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is what some tests are about."""


@contextmanager
def serving() -> Iterator[HubServer]:
    """A server on a free port, running until the end of the block."""
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a test looks at `requests`."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        wanted = (self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0]
        path = unquote(self.path.split("?")[0])
        self.server.requests.append(Request(self.command, path, int(wanted), token))
        parts = path.strip("/").split("/")
        if parts[0] == "storage":
            return self._file(parts[-1], self._stored(parts[1]), int(wanted))
        info = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if info else parts
        repository = self.server.repositories.get(f"{owner}/{name}")
        if repository is None or (repository.token and token is None):
            return self._refuse(401, "RepoNotFound")  # the hub does not tell a private one from none
        if repository.token and token != repository.token:
            return self._refuse(401, None, "Invalid credentials in Authorization header")
        revision = unquote("/".join(rest[1:])) if info else self._revision(repository, rest)
        commit = repository.refs.get(revision, revision) if revision else repository.refs["main"]
        if commit not in repository.commits:
            return self._refuse(404, "RevisionNotFound")
        files = repository.commits[commit]
        if info:
            return self._info(f"{owner}/{name}", commit, files, repository.gated)
        if repository.gated:
            return self._refuse(403, "GatedRepo")
        file = "/".join(rest[1:]).removeprefix(f"{revision}/")
        if file not in files:
            return self._refuse(404, "EntryNotFound")
        if not file.endswith(LARGE):
            return self._file(file, files[file], int(wanted), {"X-Repo-Commit": commit})
        digest = hashlib.sha256(files[file]).hexdigest()
        headers = {"X-Repo-Commit": commit, "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(files[file]))}
        self._send(302, b"", headers | {"Location": f"{self.server.storage}/{digest}/{file}"})

    def _revision(self, repository: Repository, rest: list[str]) -> str:
        """The longest known revision that "resolve/REVISION/FILE" begins with: branches may have slashes."""
        tail = "/".join(rest[1:])
        known = [revision for revision in [*repository.refs, *repository.commits] if tail.startswith(f"{revision}/")]
        return max(known, key=len, default=rest[1])

    def _stored(self, digest: str) -> bytes:
        for repository in self.server.repositories.values():
            for files in repository.commits.values():
                for data in files.values():
                    if hashlib.sha256(data).hexdigest() == digest:
                        return data
        raise KeyError(digest)

    def _info(self, name: str, commit: str, files: Files, gated: bool) -> None:
        content = {
            "_id": "0",
            "id": name,
            "modelId": name,
            "sha": commit,
            "private": False,
            "gated": "auto" if gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [{"rfilename": file} for file in files],
        }
        self._file("info", json.dumps(content).encode(), 0, {"Content-Type": "application/json"})

    def _file(self, name: str, data: bytes, begin: int, headers: dict[str, str] | None = None) -> None:
        planned = self.server.faults[name]
        fault = planned.pop(0) if planned and self.command == "GET" else None
        if isinstance(fault, int):
            return self._refuse(fault, None)
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes"} | (headers or {})
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        self._send(206 if begin else 200, data[begin:], headers, fault)

    def _refuse(self, status: int, code: str | None, message: str = "no") -> None:
        self._send(status, b"{}", {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}))

    def _send(self, status: int, body: bytes, headers: dict[str, str], fault: str | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[: len(body) // 2] if fault else body)
        self.wfile.flush()
        if fault:
            self.close_connection = True
        if fault == "stalled":
            self.server.closing.wait()


def set_environment(home: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own and this hub for the rest of the test, whatever the caller's variables say."""
    for name in [name for name in os.environ if name.upper().startswith(OF_THE_LIBRARY)]:
        monkeypatch.delenv(name)
    for name, value in {"HF_HOME": str(home), "HF_ENDPOINT": url, "NO_PROXY": "127.0.0.1,localhost"}.items():
        monkeypatch.setenv(name, value)
    forget_library()


def forget_library() -> None:
    """The next import of huggingface_hub reads the environment, as it does once in a process."""
    if "huggingface_hub.utils" in sys.modules:
        sys.modules["huggingface_hub.utils"].get_session().close()
    for name in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
        del sys.modules[name]
    logging.getLogger("huggingface_hub").handlers.clear()  # each import adds one
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves the sockets of broken downloads to the collector
        gc.collect()
