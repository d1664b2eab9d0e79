"""Files are there whole, or as they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from minilpt.errors import InputError
from minilpt.files import write_whole


def test_text_and_bytes_are_written_and_nothing_else_is_left(tmp_path: Path) -> None:
    write_whole(tmp_path / "text", "naïve\n")
    write_whole(tmp_path / "bytes", b"\x89")
    assert (tmp_path / "text").read_bytes() == "naïve\n".encode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bytes", "text"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"


def test_what_is_no_file_is_left_alone(tmp_path: Path) -> None:
    for path in (tmp_path, Path("."), Path("/dev/null")):
        with pytest.raises(InputError, match="is there and is no file"):
            write_whole(path, "x")
    with pytest.raises(InputError, match="cannot be written"):
        write_whole(tmp_path / "none" / "file", "x")
    assert not list(tmp_path.iterdir())
