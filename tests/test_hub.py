"""Names of a hub: what is fetched and what is not, revisions, the cache, and what can go wrong on the way."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

import minilpt
from minilpt.weights.resolve import resolve

import checkpoints
import hub_server
from hub_server import HubServer, Repository

NAME = "some-one/a.model_1"
TEXTS = ["good film", "not bad"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with what else such repositories hold; to be read only."""
    made = checkpoints.write_vocabulary(checkpoints.write(tmp_path_factory.mktemp("hub") / "model"))
    for name in ("pytorch_model.bin", "tf_model.h5", "rust_model.ot", "README.md", "special_tokens_map.json"):
        (made / name).write_text("{}")
    (made / "onnx").mkdir()
    (made / "onnx" / "model.onnx").write_text("no")
    return made


@pytest.fixture
def repository(hub: HubServer, folder: Path) -> Repository:
    """NAME on the hub, with that model on main."""
    hub.repositories[NAME].push(hub_server.files_of(folder))
    return hub.repositories[NAME]


def cached(tmp_path: Path) -> Path:
    return tmp_path / "hf" / "hub" / f"models--{NAME.replace('/', '--')}"


def logits(model: minilpt.Classifier) -> list[list[float]]:
    return model.logits(TEXTS).tolist()


def sharded(folder: Path, target: Path) -> hub_server.Files:
    """The folder's model in two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    shards = {
        "model-00001-of-00002.safetensors": sorted(tensors)[::2],
        "model-00002-of-00002.safetensors": sorted(tensors)[1::2],
    }
    target.mkdir()
    for name, members in shards.items():
        save_file({member: tensors[member] for member in members}, target / name)
    index = {"weight_map": {member: name for name, members in shards.items() for member in members}}
    files = {name: data for name, data in hub_server.files_of(folder).items() if name != "model.safetensors"}
    return files | hub_server.files_of(target) | {"model.safetensors.index.json": json.dumps(index).encode()}


# What is fetched.


def test_a_name_gives_the_model_that_its_folder_gives(repository: Repository, folder: Path, tmp_path: Path) -> None:
    model = minilpt.load(NAME)
    assert logits(model) == logits(minilpt.load(folder))
    assert (model.source.repository, model.source.commit) == (NAME, repository.refs["main"])
    assert model.folder == cached(tmp_path) / "snapshots" / repository.refs["main"]


def test_only_the_files_that_are_read_are_fetched(repository: Repository, hub: HubServer) -> None:
    folder = minilpt.load(NAME).folder
    wanted = {"config.json", "tokenizer_config.json", "vocab.txt", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == wanted
    assert {path.rsplit("/", 1)[-1] for path in hub.paths() if not path.startswith("/api")} == wanted


def test_a_tokenizer_json_makes_the_vocabulary_needless_and_extras_come_along(
    repository: Repository, folder: Path
) -> None:
    extras = dict.fromkeys(("tokenizer.json", "integer.json", "1_Pooling/config.json"), b"{}")
    repository.push(hub_server.files_of(folder) | extras)
    found = resolve(NAME).folder
    names = {path.relative_to(found).as_posix() for path in found.rglob("*") if path.is_file()}
    assert names == {"config.json", "tokenizer_config.json", "model.safetensors", *extras}


def test_pruning_comes_with_the_repository(repository: Repository, folder: Path) -> None:
    rule = {"rule": "threshold", "score_denominator": 1, "thresholds": [0.0, 0.9, 0.9]}
    repository.push(hub_server.files_of(folder) | {"ltp.json": json.dumps(rule).encode()})
    assert logits(minilpt.load(NAME)) == logits(minilpt.load(folder, pruning=rule))


def test_shards_are_found_through_their_index(repository: Repository, folder: Path, tmp_path: Path) -> None:
    repository.push(sharded(folder, tmp_path / "shards"))
    assert logits(minilpt.load(NAME)) == logits(minilpt.load(folder))


def test_an_index_that_names_other_places_is_refused(repository: Repository, folder: Path, tmp_path: Path) -> None:
    files = sharded(folder, tmp_path / "shards")
    index = {"weight_map": {"x": "../../other.safetensors"}}
    repository.push(files | {"model.safetensors.index.json": json.dumps(index).encode()})
    with pytest.raises(minilpt.ModelFileError, match="not the plain name"):
        minilpt.load(NAME)


def test_pickles_are_not_fetched_and_the_error_says_how_to_convert(
    repository: Repository, folder: Path, hub: HubServer
) -> None:
    files = hub_server.files_of(folder)
    del files["model.safetensors"]
    repository.push(files)
    with pytest.raises(minilpt.ModelFileError, match=r"pickles only \(pytorch_model.bin\).*save_pretrained") as caught:
        minilpt.load(NAME)
    assert f"from_pretrained('{NAME}'" in str(caught.value)
    assert [path for path in hub.paths() if "/resolve/" in path] == []


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_what_is_no_model_is_said_to_be_none(repository: Repository, folder: Path, missing: str) -> None:
    keep = {"config.json", "model.safetensors", "vocab.txt"} - {missing}
    repository.push({name: data for name, data in hub_server.files_of(folder).items() if name in keep})
    with pytest.raises(minilpt.ModelFileError, match=missing.replace(".", r"\.")):
        minilpt.load(NAME)


def test_a_progress_bar_is_shown(
    repository: Repository, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    resolve(NAME)
    assert "model.safetensors: 100%" in capsys.readouterr().err


# Revisions and the cache.


def test_a_second_load_fetches_nothing_and_a_pinned_commit_asks_nothing(repository: Repository, hub: HubServer) -> None:
    commit = minilpt.load(NAME).source.commit
    hub.requests.clear()
    assert minilpt.load(NAME).source.commit == commit
    assert [path for path in hub.paths() if not path.startswith("/api/")] == []
    hub.requests.clear()
    assert minilpt.load(NAME, revision=commit).source.commit == commit
    assert hub.requests == []


def test_a_branch_a_tag_and_a_commit_are_revisions(repository: Repository, folder: Path, tmp_path: Path) -> None:
    other = checkpoints.write_vocabulary(checkpoints.write(tmp_path / "other", seed=7))
    old = repository.refs["main"]
    new = repository.push(hub_server.files_of(other), "refs/pr/1")
    repository.refs["v1"] = new
    for revision in ("refs/pr/1", "v1", new):
        model = minilpt.load(NAME, revision=revision)
        assert (model.source.commit, logits(model)) == (new, logits(minilpt.load(other)))
    assert minilpt.load(NAME, revision=old).source.commit == minilpt.load(NAME).source.commit == old


def test_main_that_moves_on_is_followed(repository: Repository, folder: Path, tmp_path: Path) -> None:
    minilpt.load(NAME)
    other = checkpoints.write_vocabulary(checkpoints.write(tmp_path / "other", seed=7))
    commit = repository.push(hub_server.files_of(other))
    model = minilpt.load(NAME)
    assert (model.source.commit, logits(model)) == (commit, logits(minilpt.load(other)))


@pytest.mark.parametrize("offline", ["argument", "variable"])
def test_offline_takes_what_the_cache_has(
    repository: Repository, hub: HubServer, monkeypatch: pytest.MonkeyPatch, offline: str
) -> None:
    before = minilpt.load(NAME)
    hub.requests.clear()
    if offline == "variable":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        hub_server.forget_library()
    model = minilpt.load(NAME, local_files_only=offline == "argument")
    assert (model.source, logits(model)) == (before.source, logits(before))
    assert hub.requests == []


@pytest.mark.parametrize("offline", ["argument", "variable"])
def test_offline_and_never_downloaded_says_what_to_run_where(
    repository: Repository, hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, offline: str
) -> None:
    if offline == "variable":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        hub_server.forget_library()
    with pytest.raises(minilpt.HubError) as caught:
        minilpt.load(NAME, revision="v1", local_files_only=offline == "argument")
    message = str(caught.value)
    assert f"minilpt info --model {NAME} --revision v1" in message
    assert f"models--{NAME.replace('/', '--')}" in message and str(tmp_path / "hf") in message
    assert {"argument": "local_files_only", "variable": "HF_HUB_OFFLINE"}[offline] in message
    assert hub.requests == []


def test_a_cache_without_the_weights_is_no_model_when_offline(
    repository: Repository, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the library's own tries
    hub.faults["model.safetensors"] = [500] * 20
    with pytest.raises(minilpt.HubError, match="status 500"):
        minilpt.load(NAME)
    with pytest.raises(minilpt.HubError, match="not wholly"):
        minilpt.load(NAME, revision=repository.refs["main"], local_files_only=True)


def test_hf_hub_cache_is_where_files_go(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    hub_server.forget_library()
    assert minilpt.load(NAME).folder.is_relative_to(tmp_path / "elsewhere")


def test_a_hub_out_of_reach_is_a_warning_where_the_cache_has_the_model(repository: Repository, hub: HubServer) -> None:
    commit = minilpt.load(NAME).source.commit
    hub.faults["info"] = [503] * 20
    with pytest.warns(minilpt.MinilptWarning, match=f"status 503.*commit {commit}") as caught:
        assert minilpt.load(NAME).source.commit == commit
    assert caught[0].filename == __file__


# Local things touch no network.


def test_folders_and_bundled_names_ask_no_hub(
    repository: Repository, hub: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    local = checkpoints.write_vocabulary(checkpoints.write(Path(NAME), seed=3))  # of the very name
    for name in (None, folder, str(folder), NAME, local):
        minilpt.load(name)
    assert hub.requests == []
    assert "huggingface_hub" not in sys.modules
    with pytest.raises(minilpt.InputError, match="revision 'v1' is for names of the hub"):
        minilpt.load(folder, revision="v1")


def test_a_path_is_never_a_name(repository: Repository, hub: HubServer) -> None:
    for path in (
        Path(NAME),
        f"./{NAME}",
        f"/{NAME}",
        f"~/{NAME}",
        f"{NAME}/",
        f"x/{NAME}",
        "a--b/c",
        "a/b..c",
        "a",
        ".a/b",
        "ä/b",
    ):
        with pytest.raises(minilpt.UnknownModelError, match="neither a folder nor"):
            minilpt.load(path)
    assert hub.requests == []


def test_without_the_library_the_error_says_what_to_install(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(minilpt.DependencyError, match="pip install huggingface_hub"):
        minilpt.load(NAME)


# Refusals.


def test_what_is_not_there_is_unknown(repository: Repository, hub: HubServer) -> None:
    with pytest.raises(minilpt.UnknownModelError, match=f"'no/such'.*{hub.url}.*HF_TOKEN"):
        minilpt.load("no/such")
    with pytest.raises(minilpt.UnknownModelError, match="no branch, tag or commit 'v9'"):
        minilpt.load(NAME, revision="v9")


def test_a_private_repository_needs_its_token(
    repository: Repository, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.token = "right"
    with pytest.raises(minilpt.UnknownModelError, match="private, set HF_TOKEN"):
        minilpt.load(NAME)
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(minilpt.HubError, match="refuses the token"):
        minilpt.load(NAME)
    monkeypatch.setenv("HF_TOKEN", "right")
    assert minilpt.load(NAME).source.commit == repository.refs["main"]
    assert {request.token for request in hub.requests if request.path.startswith("/storage")} <= {None, "right"}


def test_a_gated_repository_says_where_to_ask(repository: Repository) -> None:
    repository.gated = True
    with pytest.raises(minilpt.HubError, match=r"refuses access \(gated.*HF_TOKEN"):
        minilpt.load(NAME)


def test_a_file_that_goes_while_it_is_fetched_is_named(repository: Repository, hub: HubServer) -> None:
    hub.faults["vocab.txt"] = [404]
    with pytest.raises(minilpt.MinilptError, match=NAME):
        minilpt.load(NAME)


# Broken downloads: no half-written file is ever used, and the next try goes on.


def test_a_truncated_download_is_no_model_and_the_next_load_fetches_the_rest(
    repository: Repository, hub: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.faults["model.safetensors"] = ["truncated"] * 20
    with pytest.raises(minilpt.HubError, match="files that are whole stay"):
        minilpt.load(NAME)
    assert not list(cached(tmp_path).rglob("model.safetensors"))
    with pytest.raises(minilpt.HubError, match="not wholly"):
        minilpt.load(NAME, local_files_only=True)
    hub.faults.clear()
    hub.requests.clear()
    assert logits(minilpt.load(NAME)) == logits(minilpt.load(folder))
    assert {path.rsplit("/", 1)[-1] for path in hub.paths()[1:]} == {"model.safetensors"}


def test_a_download_that_stalls_once_is_resumed(
    repository: Repository, hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
    hub_server.forget_library()
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # the model is smaller than most
    hub.faults["model.safetensors"] = ["stalled"]
    assert logits(minilpt.load(NAME)) == logits(minilpt.load(folder))
    begins = [request.bytes_from for request in hub.requests if request.path.startswith("/storage")]
    assert begins[0] == 0 and begins[-1] > 0


def test_a_stalled_download_ends_in_time(
    repository: Repository, hub: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
    hub_server.forget_library()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.faults["model.safetensors"] = ["stalled"] * 40
    with pytest.raises(minilpt.HubError, match="HF_HUB_DOWNLOAD_TIMEOUT"):
        minilpt.load(NAME)
    assert not list(cached(tmp_path).rglob("model.safetensors"))
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "60")
    hub_server.forget_library()
    hub.faults.clear()
    assert logits(minilpt.load(NAME)) == logits(minilpt.load(folder))


def test_a_hub_that_stalls_before_it_says_anything(
    repository: Repository, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
    hub_server.forget_library()
    hub.faults["info"] = ["stalled"] * 20
    with pytest.raises(minilpt.HubError, match="HF_HUB_ETAG_TIMEOUT"):
        minilpt.load(NAME)


def test_no_hub_at_all(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the port named discard, where nothing listens
    hub_server.forget_library()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(minilpt.HubError, match=r"http://127\.0\.0\.1:9.*minilpt info --model") as caught:
        minilpt.load(NAME)
    assert "\n" not in str(caught.value)


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
import minilpt
try:
    minilpt.load(sys.argv[1])
except minilpt.HubError as error:
    print(error)
"""


def test_a_disk_that_is_full_leaves_nothing_that_looks_like_a_file(
    repository: Repository, hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    """Files may not grow beyond 20,000 bytes in this process: what the file system answers is a real refusal."""
    command = [sys.executable, "-c", LIMITED, NAME, "20000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(f"{NAME} at main: no room in {tmp_path / 'hf'}"), done.stderr
    assert not list(cached(tmp_path).rglob("model.safetensors"))
    assert logits(minilpt.load(NAME)) == logits(minilpt.load(folder))


def test_a_cache_that_cannot_be_written_is_named(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "hf").write_text("a file where a folder should be")
    with pytest.raises(minilpt.HubError, match="HF_HUB_CACHE"):
        minilpt.load(NAME)
