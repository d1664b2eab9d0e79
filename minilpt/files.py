"""Files and folders that appear under their names only when they are whole."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import InputError


def write_whole(path: Path, content: str | bytes) -> None:
    """Write all of it as `whole` does. Text is UTF-8."""
    with whole(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A temporary neighbour to write to, then renamed: the file is there whole, or as it was if anything goes wrong.

    Of several writers at once each has a neighbour of its own, and the last one's file stays. A link stays one, and its
    target is written. Raises InputError if the file cannot be written, or if something else than a file has its name.
    """
    target = path.resolve()
    if target.exists() and not target.is_file():
        raise InputError(f"{path}: cannot be written: it is there and is no file")
    partial = target.with_name(f".{target.name[:99]}-{secrets.token_hex(8)}.partial")
    try:
        with open(partial, "xb") as file:
            yield file
        partial.replace(target)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, beside its place; renamed to `target` at the end, or gone if filling it fails.

    Raises InputError if `target` is there, or if something cannot be written.
    """
    if target.exists():
        raise InputError(f"{target}: is there already; name a folder that is to be made")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as room:
            folder = Path(room, "made")
            folder.mkdir()  # with the modes that any folder has
            yield folder
            folder.rename(target)
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {error.strerror}") from None
