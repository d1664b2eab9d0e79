"""Files that appear under their names only when they are whole."""

from __future__ import annotations

from pathlib import Path

from .errors import InputError


def write_whole(path: Path, content: str | bytes) -> None:
    """Write to a temporary neighbour, then rename: the file is there whole or as it was. Text is UTF-8.

    A link stays one, and its target is written. Raises InputError if the file cannot be written, or if something else
    than a file has its name.
    """
    target = path.resolve()
    if target.exists() and not target.is_file():
        raise InputError(f"{path}: cannot be written: it is there and is no file")
    partial = target.with_name(target.name + ".partial")
    try:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
