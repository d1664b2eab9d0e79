"""Files are there whole, or as they were."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from minilpt.errors import InputError
from minilpt.files import whole, write_whole


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


def test_two_writers_at_once_do_not_mix(tmp_path: Path) -> None:
    """Both write their halves before either ends; the last to end wins, and one that fails leaves the other's alone."""
    path = tmp_path / "file"
    with whole(path) as first:
        first.write(b"first, ")
        with whole(path) as second:
            second.write(b"second, ")
            first.write(b"whole")
            first.flush()
            second.write(b"whole")
        assert path.read_bytes() == b"second, whole"
        with pytest.raises(KeyError), whole(path) as third:
            third.write(b"third")
            raise KeyError
    assert path.read_bytes() == b"first, whole"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_readers_among_many_writers_see_whole_files_only(tmp_path: Path) -> None:
    path, texts = tmp_path / "file", [letter * 100_000 for letter in "abcd"]
    write_whole(path, texts[0])
    done = threading.Event()

    def read() -> int:
        count = 0
        while not done.is_set():
            assert path.read_text() in texts
            count += 1
        return count

    with ThreadPoolExecutor(5) as pool:
        reader = pool.submit(read)
        list(pool.map(lambda text: [write_whole(path, text) for _ in range(20)], texts))
        done.set()
        assert reader.result() >= 0
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk that is full: the system refuses to write more."""
    resource = pytest.importorskip("resource", reason="this system has no limits on file sizes")
    path, limits = tmp_path / "file", resource.getrlimit(resource.RLIMIT_FSIZE)
    write_whole(path, "old")
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(InputError, match="cannot be written: File too large"):
            write_whole(path, "x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]
