"""Models of a hub: the files that minilpt reads, downloaded once through huggingface_hub into its standard cache.

Its environment variables hold here too: HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and the timeouts.
"""

from __future__ import annotations

import errno
import glob
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import DependencyError, HubError, MinilptError, ModelFileError, UnknownModelError
from .checkpoint import INDEX, PICKLES, SINGLE, shards_of

CONFIG = "config.json"
# Everything else that minilpt reads; weights are chosen apart. No pickle and no code is ever fetched.
FILES = re.compile(
    r"""config\.json | ltp\.json | integer\.json
    | tokenizer\.json | tokenizer_config\.json | special_tokens_map\.json | added_tokens\.json
    | vocab\.txt | vocab\.json | merges\.txt
    | modules\.json | config_sentence_transformers\.json | \d+_Pooling/config\.json""",
    re.VERBOSE,
)
TOKENIZERS = {"tokenizer.json", "vocab.txt", "vocab.json"}  # one of them is enough
SENTENCEPIECE = {"sentencepiece.bpe.model", "spiece.model"}  # must be converted to tokenizer.json
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room on the disk, in a quota, under a limit
COMMIT = re.compile(r"[0-9a-f]{40}")
# Owner and name, as the hub allows them, in at most 96 characters.
NAME = re.compile(r"(?=.{3,96}$)(?!.*(?:--|\.\.))(?!.*\.git$)\w([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)


def snapshot(repository: str, revision: str | None = None, *, local_files_only: bool = False) -> Path:
    """The folder of one commit in the cache, named by its hash, with all that minilpt reads downloaded.

    revision: a branch, a tag or a commit hash (None: main). What the cache holds of a commit hash is taken without a
    request; of anything else, with local_files_only or HF_HUB_OFFLINE, or with a warning if the hub does not answer.

    Raises UnknownModelError for a repository or revision that is not there, ModelFileError for one without config.json
    or safetensors weights or whose only tokenizer is SentencePiece's, HubError if access is refused, the download
    fails, or a model that is not in the cache is wanted offline.
    """
    library = _library()
    offline = local_files_only or library.constants.HF_HUB_OFFLINE
    cached = _cached(library, repository, revision)
    if cached and (offline or COMMIT.fullmatch(revision or "")):
        return cached
    if offline:
        raise HubError(
            f"{repository}{_at(revision)} is not, or not wholly, in the cache {library.constants.HF_HUB_CACHE}, and "
            f"nothing may be downloaded (local_files_only or HF_HUB_OFFLINE). "
            f"{_elsewhere(library, repository, revision)}"
        )
    try:
        wanted = _wanted(library, repository, revision)
        patterns = [glob.escape(name) for name in wanted]
        return Path(library.snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except MinilptError:
        raise
    except Exception as error:  # of huggingface_hub, and of requests or httpx, as its version has it
        explained = _explained(library, error, repository, revision)
        if cached is None or isinstance(error, library.errors.RevisionNotFoundError):
            raise explained from error
        _warn_of_cached(cached, explained)
        return cached


def origin(folder: Path) -> tuple[str, str] | None:
    """(repository, commit hash) of a folder in huggingface_hub's cache; None for any other folder."""
    models, snapshots, commit = folder.absolute().parts[-3:] if len(folder.absolute().parts) > 3 else ("", "", "")
    if snapshots != "snapshots" or not models.startswith("models--") or not COMMIT.fullmatch(commit):
        return None
    return models.removeprefix("models--").replace("--", "/"), commit


def _library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise DependencyError(f"a model by its hub name needs huggingface_hub: {error}") from None
    return huggingface_hub


def _cached(library: Any, repository: str, revision: str | None) -> Path | None:
    """The snapshot in the cache if config.json and every file of the weights are there."""
    config = library.try_to_load_from_cache(repository, CONFIG, revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    weights = [SINGLE]
    if not (folder / SINGLE).is_file() and (folder / INDEX).is_file():
        weights = shards_of(folder / INDEX)
    return folder if all((folder / name).is_file() for name in weights) else None


def _wanted(library: Any, repository: str, revision: str | None) -> list[str]:
    """The repository's files that minilpt reads. The library itself would wait for this answer without an end."""
    timeout = library.constants.HF_HUB_ETAG_TIMEOUT
    info = library.HfApi().model_info(repository, revision=revision, timeout=timeout)
    there = {file.rfilename for file in info.siblings or []}
    weights = {SINGLE} if SINGLE in there else {name for name in there if re.fullmatch(r"[^/]+\.safetensors", name)}
    if CONFIG not in there:
        raise ModelFileError(f"{repository}{_at(revision)} holds no {CONFIG}, so it is no model: {_listed(there)}")
    if SINGLE not in there and INDEX not in there:
        pickles = sorted(there.intersection(PICKLES))
        found = f"only {', '.join(pickles)}; a pickle can run code, so minilpt never opens one" if pickles else "none"
        raise ModelFileError(
            f"{repository}{_at(revision)}: weights as {SINGLE} were expected, found {found}. Look for another revision "
            f"with safetensors (revision='main', or 'refs/pr/N' of a pull request), or convert it where torch is "
            f"installed: load it with transformers and call save_pretrained(FOLDER, safe_serialization=True)"
        )
    if SENTENCEPIECE & there and not TOKENIZERS & there:
        raise ModelFileError(
            f"{repository}{_at(revision)}: no tokenizer.json, only {', '.join(sorted(SENTENCEPIECE & there))}, which "
            f"minilpt does not read. Where transformers and sentencepiece are installed, load the model and "
            f"AutoTokenizer and call save_pretrained(FOLDER) of both; then load FOLDER"
        )
    return sorted({name for name in there if FILES.fullmatch(name)} | weights | ({INDEX} & there))


def _explained(library: Any, error: Exception, repository: str, revision: str | None) -> MinilptError:
    """What an exception of the library or of the network means."""
    hub, errors = library.constants.ENDPOINT, library.errors
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.RevisionNotFoundError):
        return UnknownModelError(f"{repository} on {hub} has no revision {revision!r}: see its branches, tags, commits")
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return HubError(
            f"{repository} on {hub} is gated or private: accept its conditions at {hub}/{repository}, then set "
            f"HF_TOKEN to a token of an account that may read it"
        )
    if status == 401 and not isinstance(error, errors.RepositoryNotFoundError):
        return HubError(
            f"{hub} does not accept the token given for {repository}: set HF_TOKEN to a valid one, or unset it"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return UnknownModelError(
            f"there is no folder {repository} here, and no repository of that name on {hub} that may be read without "
            f"a token: check the name or, if it is private, set HF_TOKEN"
        )
    if isinstance(error, OSError) and error.errno in FULL:
        return HubError(
            f"{repository}{_at(revision)}: no room in {library.constants.HF_HUB_CACHE}: {error.strerror}. Free some, "
            f"or set HF_HUB_CACHE to a folder on another disk; files that are whole are kept"
        )
    cause = str(error).strip().splitlines() or [""]
    return HubError(
        f"{repository}{_at(revision)} could not be downloaded from {hub}: {type(error).__name__}: {cause[0]:.300}. "
        f"Try again: what has arrived is kept. HF_ENDPOINT names another hub, HF_HUB_DOWNLOAD_TIMEOUT gives it longer. "
        f"{_elsewhere(library, repository, revision)}"
    )


def _elsewhere(library: Any, repository: str, revision: str | None) -> str:
    """What to do where there is a network, for where there is none."""
    words = ["minilpt", "info", "--model", repository, *(["--revision", revision] if revision else [])]
    place = Path(library.constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}")
    return f"Where there is a network, run: {shlex.join(words)}; then copy its cache's {place.name} to {place} here"


def _warn_of_cached(cached: Path, explained: MinilptError) -> None:
    import logging

    logging.getLogger("minilpt").warning("%s. Taking the commit %s from the cache", explained, cached.name)


def _at(revision: str | None) -> str:
    return f" at revision {revision}" if revision else ""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:8]) or "it is empty"
