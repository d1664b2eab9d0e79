"""Every Python block of the README and the documents runs, those of a file one after another in one namespace."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cuda_rig import simt

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(path: Path) -> Iterator[tuple[str, str, int]]:
    """(language, content, the number of its first line)."""
    text = path.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        yield found[1], found[2], text.count("\n", 0, found.start(2))


def documents() -> list[Path]:
    """Those with a Python block."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [path for path in paths if any(language == "python" for language, *_ in blocks(path))]


def test_the_documents_with_blocks_are_found() -> None:
    names = {path.name for path in documents()}
    assert {"README.md", "guide.md", "migration.md"} <= names


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_blocks_run_and_print_what_stands_below_them(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A block that prints is followed by a `text` block: its true output."""
    if path.name == "cuda-rig.md" and not simt.available():
        pytest.skip(simt.WHY_NOT)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    for language, content, line in blocks(path):
        if language == "python":
            code = compile("\n" * line + content, str(path), "exec")  # so that errors name the document's line
            exec(code, namespace)
            printed = capsys.readouterr().out
        elif language == "text" and printed:
            assert printed == content
            printed = ""
    assert not printed, "a block prints, and no text block below it shows what"
