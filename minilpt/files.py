"""Files that appear under their names only when they are whole."""

from __future__ import annotations

from pathlib import Path

from .errors import InputError


def write_whole(path: Path, content: str | bytes) -> None:
    """Write to a temporary neighbour, then rename: the file is there whole or as it was. Text is UTF-8.

    Raises InputError if it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
