"""Models of a hub, in the standard cache of huggingface_hub: only the files that a model is read from are fetched.

huggingface_hub is imported at the first hub name. It decides where the cache is, which token is sent and how long to
wait (HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, HF_HUB_DOWNLOAD_TIMEOUT), locks files against other
processes, resumes a download that breaks off, and gives a file its name when it is whole.
"""

from __future__ import annotations

import errno
import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DependencyError, HubError, MinilptError, MinilptWarning, ModelFileError, UnknownModelError
from . import checkpoint

# As the hub allows them, but for names without an owner: those cannot be told from a mistyped folder or bundled name.
_WORD = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"
REPOSITORY = re.compile(f"{_WORD}/{_WORD}", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
CONFIG = "config.json"
# What is read if it is there. tokenizer_config.json governs whichever tokenizer is found.
EXTRAS = (
    "tokenizer_config.json",
    "ltp.json",
    "integer.json",
    "modules.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)
TOKENIZERS = (("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt"))  # the first that is whole is read
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CONVERT = (
    'python -c "from transformers import AutoModelForSequenceClassification as M, AutoTokenizer as T; '
    "[X.from_pretrained('{0}', revision='{1}').save_pretrained('FOLDER') for X in (M, T)]\""
)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Snapshot(NamedTuple):
    """A repository's files at one commit (40 hexadecimal digits)."""

    folder: Path
    commit: str


def is_repository(name: str) -> bool:
    """Whether this can be the name of a hub's repository, "owner/name"."""
    return REPOSITORY.fullmatch(name) is not None and ".." not in name and "--" not in name


def fetch(repository: str, revision: str | None = None, *, local_files_only: bool = False) -> Snapshot:
    """The folder of a repository's model at a branch, tag or commit ("main"), downloaded as far as it is not there.

    The hub is asked what a branch or tag is now; a whole model of a full commit hash is taken from the cache unasked.
    local_files_only, and HF_HUB_OFFLINE: what the cache has, without any request. A hub that cannot be reached is a
    MinilptWarning where the cache has the model.

    Raises UnknownModelError if there is no such repository or revision, ModelFileError if it has no safetensors,
    HubError for what may go better another time or elsewhere: no access, no network, a broken download, a full disk.
    """
    hub = _library()
    wanted = revision or "main"
    cached = _cached(hub, repository, wanted)
    if cached and COMMIT.fullmatch(wanted) and _tokenizer(_names(cached.folder)):
        return cached
    if local_files_only or hub.constants.HF_HUB_OFFLINE:
        return cached or _never_downloaded(hub, repository, wanted, local_files_only)
    api = hub.HfApi(library_name="minilpt")
    try:
        found = api.model_info(repository, revision=wanted, timeout=hub.constants.HF_HUB_ETAG_TIMEOUT)
        return _downloaded(api, repository, wanted, found.sha, {sibling.rfilename for sibling in found.siblings})
    except MinilptError:
        raise
    except Exception as error:  # of requests, of httpx in later versions, of huggingface_hub, of the file system
        problem = _explained(hub, error, repository, wanted)
        if not cached or not _out_of_reach(error):
            raise problem from error
        message = f"{problem}. Taking what the cache has of {wanted}: commit {cached.commit}"
        warnings.warn(message, MinilptWarning, stacklevel=4)  # the line that calls load()
        return cached


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise DependencyError(
            "names of a hub need the huggingface_hub package: pip install huggingface_hub; a folder does not"
        ) from None
    return huggingface_hub


def _cached(hub: Any, repository: str, revision: str) -> Snapshot | None:
    """What the cache holds of this revision, if it has the weights and all of them."""
    config = hub.try_to_load_from_cache(repository, CONFIG, revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    try:
        whole = all((folder / name).is_file() for name in checkpoint.weight_files(folder))
    except ModelFileError:
        return None
    return Snapshot(folder, folder.name) if whole else None


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _tokenizer(names: Collection[str]) -> tuple[str, ...]:
    return next((group for group in TOKENIZERS if set(group) <= set(names)), ())


def _downloaded(api: Any, repository: str, revision: str, commit: str, names: set[str]) -> Snapshot:
    """Weights come last, and after them what `revision` means: a cache that knows the one has the others."""

    def fetched(name: str, at: str = commit) -> Path:
        return Path(api.hf_hub_download(repository, name, revision=at))

    weights = _weights(repository, revision, names)
    folder = fetched(CONFIG).parent
    for name in [*(name for name in EXTRAS if name in names), *_tokenizer(names), weights]:
        fetched(name)
    for name in checkpoint.weight_files(folder):  # the shards, where the index is what has been fetched
        fetched(name)
    if revision != commit:
        fetched(CONFIG, revision)
    return Snapshot(folder, commit)


def _weights(repository: str, revision: str, names: set[str]) -> str:
    """The file, or the index of several, that holds the weights. Raises ModelFileError if there is none to open."""
    if CONFIG not in names:
        raise ModelFileError(f"{repository} at {revision} has no {CONFIG}: it is not a model of transformers")
    for name in (checkpoint.SINGLE, checkpoint.INDEX):
        if name in names:
            return name
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if not pickles:
        raise ModelFileError(
            f"{repository} at {revision} has neither {checkpoint.SINGLE} nor {checkpoint.INDEX}; a model needs one"
        )
    raise ModelFileError(
        f"{repository} at {revision} has its weights as pickles only ({', '.join(pickles)}). A pickle can run code, so "
        f"minilpt never opens one. Convert it where torch and transformers are installed, then load the folder: "
        f"{CONVERT.format(repository, revision)}. Or look whether a pull request there holds {checkpoint.SINGLE}, and "
        f"give revision='refs/pr/N'"
    )


def _never_downloaded(hub: Any, repository: str, revision: str, asked: bool) -> Snapshot:
    raise HubError(
        f"{repository} at {revision} is not, or not wholly, in the cache {hub.constants.HF_HUB_CACHE}, and asking the "
        f"hub is forbidden by {'local_files_only' if asked else 'HF_HUB_OFFLINE'}. "
        f"{_elsewhere(hub, repository, revision)}"
    )


def _elsewhere(hub: Any, repository: str, revision: str) -> str:
    option = "" if revision == "main" else f" --revision {revision}"
    return (
        f"Where there is a network, run: minilpt info --model {repository}{option}; then copy the folder "
        f"models--{repository.replace('/', '--')} from that machine's cache to {hub.constants.HF_HUB_CACHE} here"
    )


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _cause(error: BaseException) -> BaseException:
    """huggingface_hub wraps what went wrong with a request in an error that tells of the cache."""
    cause = error.__cause__
    return cause if type(error).__name__ == "LocalEntryNotFoundError" and cause else error


def _out_of_reach(error: BaseException) -> bool:
    """Whether the hub gave no answer, or one that says nothing about the repository."""
    error = _cause(error)
    status = _status(error)
    if status is None:
        return not isinstance(error, ValueError) and getattr(error, "errno", None) is None
    return status >= 500 or status == 429


def _explained(hub: Any, error: BaseException, repository: str, revision: str) -> MinilptError:
    """What an error of the download means for whoever called load()."""
    error = _cause(error)
    kind, status, place = type(error).__name__, _status(error), f"{repository} at {revision}"
    at = hub.constants.ENDPOINT
    if kind == "RevisionNotFoundError":
        return UnknownModelError(f"{repository} on {at} has no branch, tag or commit {revision!r}")
    if kind == "GatedRepoError" or status == 403:
        return HubError(
            f"{place}: {at} refuses access (gated, or the token lacks rights): ask for access on the repository's "
            f"page, and set HF_TOKEN to a token that may read it"
        )
    if kind == "RepositoryNotFoundError" or status == 404:
        return UnknownModelError(
            f"{repository!r} is not a folder here, and not a repository that {at} shows: check the name; if it is "
            f"private, set HF_TOKEN to a token that may read it"
        )
    if status == 401:
        return HubError(f"{place}: {at} refuses the token: set HF_TOKEN to a valid one, or unset it")
    if isinstance(error, ValueError):
        return UnknownModelError(f"{place}: {error}")
    if isinstance(error, OSError) and error.errno in FULL:
        return HubError(
            f"{place}: no room in {hub.constants.HF_HUB_CACHE}: {error.strerror}. Free some, or set HF_HUB_CACHE to "
            f"another disk, and load again: files that are whole stay"
        )
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return HubError(f"{place}: {error.filename} cannot be written: {error.strerror}; set HF_HUB_CACHE to a folder")
    if "Timeout" in kind or "timed out" in str(error).lower():
        return HubError(
            f"{place}: {at} did not answer in time; load again (files that are whole stay), or set "
            f"HF_HUB_DOWNLOAD_TIMEOUT and HF_HUB_ETAG_TIMEOUT to more seconds"
        )
    if status is not None:
        return HubError(f"{place}: {at} answered with status {status}; try again later")
    return HubError(
        f"{place} cannot be fetched from {at}: {kind}: {str(error) or 'no details'}. Load again: files that are whole "
        f"stay. {_elsewhere(hub, repository, revision)}"
    )
