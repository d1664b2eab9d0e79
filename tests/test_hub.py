"""Models of a hub, by real requests to a server on loopback, in processes with a cache and an address of their own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load, save

import minilpt
from minilpt.weights import hub as hub_files

import checkpoints
import hub_server
from hub_server import Hub

PRUNING = {"rule": "threshold", "thresholds": [0.0, 0.17, 0.2], "score_denominator": "initial"}
# Loads what each line of its input asks for and answers with a line: huggingface_hub reads its environment once.
PROGRAM = """
import json, sys, minilpt
for line in sys.stdin:
    try:
        model = minilpt.load(**json.loads(line))
        answer = {"folder": str(model.folder), "commit": model.commit, "pruned": model.pruning is not None,
                  "logits": model.logits(["good film"]).tolist()}
    except minilpt.MinilptError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(answer), flush=True)
"""


class Worker:
    """A process with this environment; called with the arguments of `load`, it gives the answer of PROGRAM."""

    def __init__(self, log: Path, **environment: str):
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        self.log = log
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=kept | {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"} | environment,
            )

    def __call__(self, name: object, **arguments: object) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        print(json.dumps({"name_or_path": str(name), **arguments}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with hub_server.serving() as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pruned checkpoint with a tokenizer, and files beside it that nobody needs."""
    made = checkpoints.write_vocabulary(checkpoints.write(tmp_path_factory.mktemp("hub") / "model"))
    (made / "ltp.json").write_text(json.dumps(PRUNING))
    (made / "pytorch_model.bin").write_bytes(b"a pickle")
    (made / "README.md").write_text("# A card")
    (made / "onnx").mkdir()
    (made / "onnx" / "model.safetensors").write_bytes(b"of another program")
    return made


@pytest.fixture(scope="module")
def files(folder: Path) -> dict[str, bytes]:
    return hub_server.files_of(folder)


@pytest.fixture(scope="module")
def start(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Worker]]:
    """Starts a worker with these variables beside the hub's address and a cache of its own."""
    workers: list[Worker] = []

    def start(**environment: str) -> Worker:
        home = tmp_path_factory.mktemp("home")
        workers.append(Worker(home / "log", **{"HF_HOME": str(home), "HF_ENDPOINT": hub.endpoint} | environment))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The HF_HOME of `ask`."""
    return tmp_path_factory.mktemp("main-home")


@pytest.fixture(scope="module")
def ask(start: Callable[..., Worker], home: Path) -> Worker:
    return start(HF_HOME=str(home))


@pytest.fixture(scope="module")
def hasty(start: Callable[..., Worker]) -> Worker:
    """With little patience."""
    return start(HF_HUB_ETAG_TIMEOUT="3", HF_HUB_DOWNLOAD_TIMEOUT="3")


def fetched(hub: Hub, name: str) -> set[str]:
    """The files of a repository that were asked for."""
    found = (hub_server.FILE.fullmatch(request.split(" ", 1)[1]) for request in hub.requests)
    return {match[3] for match in found if match and match[1] == name}


def touches(hub: Hub, name: str) -> int:
    """Requests for anything of a repository."""
    return sum(name in request for request in hub.requests)


def test_a_model_of_the_hub_is_its_files_loaded(
    hub: Hub, ask: Worker, home: Path, folder: Path, files: dict[str, bytes]
) -> None:
    commit = hub.publish("acme/first", files)
    found = ask("acme/first")
    assert found["commit"] == commit
    assert found["folder"] == str(home / "hub" / "models--acme--first" / "snapshots" / commit)
    assert found["pruned"]
    assert found["logits"] == minilpt.load(folder).logits(["good film"]).tolist()
    needed = {"config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json", "ltp.json"}
    assert fetched(hub, "acme/first") == needed
    blobs = [request for request in hub.requests if request.startswith("GET /cdn")]
    ask("acme/first")
    assert [request for request in hub.requests if request.startswith("GET /cdn")] == blobs, "downloaded twice"


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: Hub, ask: Worker, files: dict[str, bytes]) -> None:
    old = hub.publish("acme/two", files, ref="v1")
    new = hub.publish("acme/two", files | {"config.json": files["config.json"] + b"\n"})
    assert [ask("acme/two", revision=revision)["commit"] for revision in ("v1", old, None, new)] == [old, old, new, new]
    before = touches(hub, "acme/two")
    assert ask("acme/two", revision=old)["commit"] == old
    assert touches(hub, "acme/two") == before, "a commit in the cache needs no request"
    assert ask("acme/two", revision="v2")["error"] == "UnknownModelError"
    assert "no revision 'v2'" in ask("acme/two", revision="v2")["message"]
    assert "no revision" in ask("acme/two", revision="0" * 40)["message"]


def test_a_moved_branch_is_followed(hub: Hub, ask: Worker, files: dict[str, bytes]) -> None:
    for note in (b"\n", b"\n\n"):
        commit = hub.publish("acme/moving", files | {"config.json": files["config.json"] + note})
        assert ask("acme/moving")["commit"] == commit
    assert ask("acme/moving", local_files_only=True)["commit"] == commit


def test_shards_come_with_their_index(hub: Hub, ask: Worker, folder: Path) -> None:
    files = hub_server.files_of(folder)
    tensors = load(files.pop("model.safetensors"))
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        files[file] = save({name: tensors[name] for name in part})
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    hub.publish("acme/shards", files)
    assert ask("acme/shards")["logits"] == minilpt.load(folder).logits(["good film"]).tolist()


def test_a_renamed_repository_is_found(hub: Hub, ask: Worker, files: dict[str, bytes]) -> None:
    commit = hub.publish("acme/new-name", files)
    hub.renamed["acme/old-name"] = "acme/new-name"
    assert ask("acme/old-name")["commit"] == commit


def test_a_folder_here_never_touches_the_network(hub: Hub, ask: Worker, folder: Path, files: dict[str, bytes]) -> None:
    before = len(hub.requests)
    assert ask(folder)["commit"] is None
    assert "neither a folder" in ask("./acme/first")["message"]
    assert "neither a folder" in ask("no-such-name")["message"]
    assert "a revision is for" in ask(folder, revision="main")["message"]
    assert len(hub.requests) == before


def test_a_folder_wins_over_a_repository_of_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "acme" / "first")
    monkeypatch.chdir(tmp_path)
    assert minilpt.load("acme/first").folder == Path("acme/first")


def test_offline_the_cache_serves_and_what_it_lacks_is_explained(
    hub: Hub, ask: Worker, start: Callable[..., Worker], home: Path, files: dict[str, bytes]
) -> None:
    commit = hub.publish("acme/kept", files)
    hub.publish("acme/never", files)
    ask("acme/kept")
    before = len(hub.requests)
    offline = start(HF_HOME=str(home), HF_HUB_OFFLINE="1")
    assert offline("acme/kept")["commit"] == commit
    assert ask("acme/kept", local_files_only=True)["commit"] == commit
    for answer in (offline("acme/never", revision="v 1"), ask("acme/never", revision="v 1", local_files_only=True)):
        assert answer["error"] == "HubError"
        assert "run: minilpt info --model acme/never --revision 'v 1'" in answer["message"]
        assert str(home / "hub") in answer["message"]
    assert len(hub.requests) == before


def test_a_snapshot_with_files_missing_is_not_taken_for_a_model(
    hub: Hub, ask: Worker, home: Path, files: dict[str, bytes]
) -> None:
    commit = hub.publish("acme/partial", files)
    ask("acme/partial")
    (home / "hub" / "models--acme--partial" / "snapshots" / commit / "model.safetensors").unlink()
    assert "not wholly" in ask("acme/partial", local_files_only=True)["message"]
    assert ask("acme/partial", revision=commit)["commit"] == commit, "it is fetched again"


def test_a_hub_that_fails_leaves_the_cache_in_use(hub: Hub, ask: Worker, files: dict[str, bytes]) -> None:
    commit = hub.publish("acme/shaky", files)
    ask("acme/shaky")
    hub.faults["/api/models/acme/shaky"] = ["503"]
    assert ask("acme/shaky")["commit"] == commit
    assert not hub.faults["/api/models/acme/shaky"], "the fault was met"
    said = rf"503 .*Service Unavailable.* for url\W+{re.escape(hub.endpoint)}/api/models/acme/shaky"
    assert re.search(said, ask.log.read_text())  # worded by the library, and by each version in its own way
    assert f"Taking the commit {commit} from the cache" in ask.log.read_text()
    hub.faults["/api/models/acme/unlucky"] = ["503"]
    hub.publish("acme/unlucky", files)
    answer = ask("acme/unlucky")
    assert (answer["error"], "503" in answer["message"]) == ("HubError", True)


def test_what_is_not_there(hub: Hub, ask: Worker, files: dict[str, bytes]) -> None:
    answer = ask("acme/none")
    assert answer["error"] == "UnknownModelError"
    assert "no repository of that name" in answer["message"]
    assert "HF_TOKEN" in answer["message"]
    hub.publish("acme/no-config", {"README.md": b"", "model.safetensors": b""})
    assert ask("acme/no-config")["error"] == "ModelFileError"
    assert "holds no config.json, so it is no model: README.md, model.safetensors" in ask("acme/no-config")["message"]
    hub.publish("acme/empty", {})
    assert "it is empty" in ask("acme/empty")["message"]


def test_pickles_are_named_and_never_fetched(hub: Hub, ask: Worker, files: dict[str, bytes]) -> None:
    hub.publish("acme/pickles", {name: files[name] for name in ("config.json", "pytorch_model.bin")})
    answer = ask("acme/pickles")
    assert answer["error"] == "ModelFileError"
    assert "found only pytorch_model.bin; a pickle can run code" in answer["message"]
    assert fetched(hub, "acme/pickles") == set()


def test_a_sentencepiece_model_alone_is_refused_before_the_weights(
    hub: Hub, ask: Worker, files: dict[str, bytes]
) -> None:
    plain = {name: files[name] for name in ("config.json", "model.safetensors")}
    hub.publish("acme/pieces", plain | {"sentencepiece.bpe.model": b"pieces"})
    answer = ask("acme/pieces")
    assert answer["error"] == "ModelFileError"
    assert "no tokenizer.json, only sentencepiece.bpe.model" in answer["message"]
    assert fetched(hub, "acme/pieces") == set()


def test_refusals_say_what_the_token_must_be(
    hub: Hub, ask: Worker, start: Callable[..., Worker], files: dict[str, bytes]
) -> None:
    private, gated = (hub.publish(f"acme/{access}", files, access) for access in ("private", "gated"))
    assert ask("acme/private")["error"] == "UnknownModelError"
    assert "if it is private, set HF_TOKEN" in ask("acme/private")["message"]
    answer = ask("acme/gated")
    assert answer["error"] == "HubError"
    assert f"accept its conditions at {hub.endpoint}/acme/gated, then set HF_TOKEN" in answer["message"]
    trusted = start(HF_TOKEN=hub_server.TOKEN)
    assert [trusted(f"acme/{access}")["commit"] for access in ("private", "gated")] == [private, gated]
    answer = start(HF_TOKEN="hf_of_yesterday")("acme/private")
    assert (answer["error"], "does not accept the token" in answer["message"]) == ("HubError", True)
    hub.publish("acme/forbidden", files)
    hub.faults["/api/models/acme/forbidden"] = ["403"]
    assert "gated or private" in trusted("acme/forbidden")["message"]


def test_a_hub_that_nobody_answers_for(start: Callable[..., Worker]) -> None:
    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        answer = start(HF_ENDPOINT=f"http://127.0.0.1:{taken.getsockname()[1]}")("acme/first")
    assert answer["error"] == "HubError"
    assert "acme/first could not be downloaded from http://127.0.0.1" in answer["message"]


def blob_of(files: dict[str, bytes], name: str) -> str:
    """The path that a large file is redirected to."""
    return f"/cdn/{hashlib.sha256(files[name]).hexdigest()}"


def test_a_download_that_breaks_off_is_resumed(hub: Hub, ask: Worker, tmp_path: Path) -> None:
    files = hub_server.files_of(checkpoints.write_vocabulary(checkpoints.write(tmp_path, seed=5)))
    hub.publish("acme/broken", files)
    blob = blob_of(files, "model.safetensors")
    hub.faults[blob] = ["truncate"] * 10
    answer = ask("acme/broken")
    assert answer["error"] == "HubError"
    assert "Try again: what has arrived is kept" in answer["message"]
    assert "not wholly" in ask("acme/broken", local_files_only=True)["message"]
    hub.faults[blob] = []
    assert ask("acme/broken")["logits"] == minilpt.load(tmp_path).logits(["good film"]).tolist()


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files by POSIX means")
def test_a_full_disk_leaves_nothing_that_looks_like_a_file(hub: Hub, ask: Worker, home: Path, tmp_path: Path) -> None:
    """No file may grow beyond 20,000 bytes in that process: the refusal is the operating system's."""
    files = hub_server.files_of(checkpoints.write_vocabulary(checkpoints.write(tmp_path, seed=8)))
    hub.publish("acme/large", files)
    command = [sys.executable, "-c", LIMITED + PROGRAM]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": hub.endpoint}
    wanted = json.dumps({"name_or_path": "acme/large"})
    done = subprocess.run(command, input=wanted, capture_output=True, text=True, env=environment, timeout=60)
    answer = json.loads(done.stdout)
    assert answer["error"] == "HubError"
    assert answer["message"].startswith(f"acme/large: no room in {home / 'hub'}: ")
    assert not list((home / "hub" / "models--acme--large").rglob("model.safetensors"))
    assert ask("acme/large")["logits"] == minilpt.load(tmp_path).logits(["good film"]).tolist()


def test_a_stall_in_the_middle_is_overcome(hub: Hub, hasty: Worker, tmp_path: Path) -> None:
    files = hub_server.files_of(checkpoints.write_vocabulary(checkpoints.write(tmp_path, seed=6)))
    hub.publish("acme/stalling", files)
    hub.faults[blob_of(files, "model.safetensors")] = ["stall"]
    assert hasty("acme/stalling")["logits"] == minilpt.load(tmp_path).logits(["good film"]).tolist()


def test_a_hub_that_never_answers_is_given_up(hub: Hub, hasty: Worker, files: dict[str, bytes]) -> None:
    commit = hub.publish("acme/silent", files)
    hub.faults["/api/models/acme/silent"] = ["silence"]
    answer = hasty("acme/silent")
    assert answer["error"] == "HubError"
    assert "imed out" in answer["message"] or "Timeout" in answer["message"]
    assert hasty("acme/silent")["commit"] == commit
    hub.faults["/api/models/acme/silent"] = ["silence"]
    assert hasty("acme/silent")["commit"] == commit, "the cache serves"


def test_info_and_revision_on_the_command_line(hub: Hub, home: Path, files: dict[str, bytes]) -> None:
    commit = hub.publish("acme/told", files, ref="v1")
    command = [sys.executable, "-m", "minilpt", "info", "--model", "acme/told", "--revision"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": hub.endpoint}
    done = [subprocess.run([*command, name], capture_output=True, text=True, env=environment) for name in ("v1", "v2")]
    assert json.loads(done[0].stdout)["model"]["commit"] == commit
    assert done[1].returncode == 1
    assert done[1].stderr.startswith("minilpt: error: acme/told on")


def test_the_origin_of_a_folder() -> None:
    commit = "0123456789" * 4
    inside = Path("/cache/hub/models--acme--a-model/snapshots")
    assert hub_files.origin(inside / commit) == ("acme/a-model", commit)
    assert hub_files.origin(inside / "main") is None
    assert hub_files.origin(Path("/")) is None
    assert hub_files.origin(Path("/somewhere/else") / commit) is None


@pytest.mark.parametrize("name, is_one", [("a/b", True), ("a-b.c/d_e", True), ("a/b/c", False), ("a", False)])
def test_names_of_repositories(name: str, is_one: bool) -> None:
    assert bool(hub_files.NAME.fullmatch(name)) == is_one


@pytest.mark.parametrize("name", ["a/b.git", "a--b/c", "a..b/c", "/a", "a/", "./a", "a /b", "a/" + "b" * 95, "~/b"])
def test_paths_and_names_that_the_hub_forbids(name: str) -> None:
    assert not hub_files.NAME.fullmatch(name)
