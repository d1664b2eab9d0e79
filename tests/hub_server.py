"""A server on loopback that answers as a model hub does: its paths, headers, redirects, ranges, refusals and faults."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from urllib.parse import unquote

TOKEN = "hf_loopback"  # what opens a private or gated repository
API = re.compile(r"/api/models/([^/]+/[^/]+?)(?:/revision/([^/]+))?")
FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
BLOB = re.compile(r"/cdn/([0-9a-f]{64})")


@dataclass
class Repository:
    """commits: hash -> files; refs: branch or tag -> hash. access: "public", "private" or "gated"."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    access: str = "public"

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        """A new commit, of these files alone, that the ref points to; returns its hash."""
        digest = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[digest] = files
        self.refs[ref] = digest
        return digest


class Hub(ThreadingHTTPServer):
    """repositories: by name; renamed: old name -> new name; requests: "METHOD path" of each, in order.

    faults: path -> what befalls its next requests, one each: "stall" (headers, half of the body, then silence),
    "truncate" (half of the body, then the end), "silence" (no answer at all) or a status such as "503".
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.renamed: dict[str, str] = {}
        self.requests: list[str] = []
        self.faults: dict[str, list[str]] = {}
        self.closing = Event()

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT must be."""
        return f"http://127.0.0.1:{self.server_port}"

    def publish(self, name: str, files: dict[str, bytes], access: str = "public", ref: str = "main") -> str:
        """Commit these files to a repository, made if need be; returns the commit's hash."""
        repository = self.repositories.setdefault(name, Repository(access=access))
        return repository.commit(files, ref)

    def blob(self, digest: str) -> bytes | None:
        """The content with this SHA-256, if any commit has it."""
        commits = [files for repository in self.repositories.values() for files in repository.commits.values()]
        contents = (content for files in commits for content in files.values())
        return next((content for content in contents if hashlib.sha256(content).hexdigest() == digest), None)


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    with Hub() as hub:
        Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield hub
        finally:
            hub.closing.set()
            hub.shutdown()


def files_of(folder: Path) -> dict[str, bytes]:
    """The files below a folder, as `Hub.publish` takes them."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._respond()

    def do_HEAD(self) -> None:
        self._respond()

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing on stderr."""

    def _respond(self) -> None:
        path = unquote(self.path.split("?")[0])
        self.server.requests.append(f"{self.command} {path}")
        faults = self.server.faults.get(path, [])
        self.fault = faults.pop(0) if faults and self.command == "GET" else ""
        if self.fault == "silence":
            self.server.closing.wait()
            self.close_connection = True
        elif self.fault.isdecimal():
            self._send(int(self.fault))
        elif match := API.fullmatch(path):
            self._model(match[1], match[2] or "main")
        elif match := FILE.fullmatch(path):
            self._file(*match.groups())
        elif (match := BLOB.fullmatch(path)) and (content := self.server.blob(match[1])) is not None:
            self._content(content, {"ETag": f'"{match[1]}"'})
        else:
            self._send(404)

    def _commit(self, name: str, revision: str) -> str | None:
        """The commit's hash, unless a redirect or a refusal is the answer; that is then sent."""
        if name in self.server.renamed:
            self._send(307, {"Location": self.path.replace(name, self.server.renamed[name])})
            return None
        repository = self.server.repositories.get(name)
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        if token and token != TOKEN:
            self._send(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repository is None or (repository.access == "private" and not token):
            code = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            self._send(404 if token else 401, code)
        elif repository.access == "gated" and not token:
            self._send(401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted."})
        elif (found := repository.refs.get(revision, revision)) not in repository.commits:
            self._send(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"})
        else:
            return found
        return None

    def _model(self, name: str, revision: str) -> None:
        commit = self._commit(name, revision)
        if commit is not None:
            files = self.server.repositories[name].commits[commit]
            record = {"id": name, "modelId": name, "sha": commit, "private": False, "tags": [], "downloads": 0}
            record["siblings"] = [{"rfilename": file} for file in sorted(files)]
            self._content(json.dumps(record).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str, revision: str, file: str) -> None:
        commit = self._commit(name, revision)
        if commit is None:
            return
        content = self.server.repositories[name].commits[commit].get(file)
        digest = hashlib.sha256(content or b"").hexdigest()
        headers = {"X-Repo-Commit": commit}
        if content is None:
            self._send(404, headers | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        elif file.endswith(".safetensors"):  # large files lie elsewhere
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{digest}"'}
            self._send(302, headers | {"Location": f"{self.server.endpoint}/cdn/{digest}"})
        else:
            self._content(content, headers | {"ETag": f'"{digest[:40]}"'})

    def _content(self, content: bytes, headers: dict[str, str]) -> None:
        """All of it, or from the byte on that a Range header asks for."""
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        if asked is None:
            self._send(200, headers, content)
        else:
            begin = int(asked[1])
            place = {"Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"}
            self._send(206, headers | place, content[begin:])

    def _send(self, status: int, headers: dict[str, str] | None = None, content: bytes = b"") -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        broken = self.fault in ("stall", "truncate")
        self.wfile.write(content[: len(content) // 2] if broken else content)
        if broken:
            self.wfile.flush()
            self.close_connection = True
        if self.fault == "stall":
            self.server.closing.wait()
