"""Every Python block of the README and the documents runs, those of a file one after another in one namespace."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

import checkpoints
import hub_server
from cuda_rig import simt

ROOT = Path(__file__).resolve().parents[1]
HUB = "names.md"  # its blocks load from a hub
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


def run(path: Path) -> None:
    """A block that prints is followed by a `text` block: its true output."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    for language, content, line in blocks(path):
        if language == "python":
            code = compile("\n" * line + content, str(path), "exec")  # so that errors name the document's line
            with redirect_stdout(StringIO()) as output:
                exec(code, namespace)
            printed = output.getvalue()
        elif language == "text" and printed:
            assert printed == content
            printed = ""
    assert not printed, "a block prints, and no text block below it shows what"


@pytest.mark.parametrize("path", [path for path in documents() if path.name != HUB], ids=lambda path: path.name)
def test_blocks_run_and_print_what_stands_below_them(path: Path) -> None:
    if path.name == "cuda-rig.md" and not simt.available():
        pytest.skip(simt.WHY_NOT)
    run(path)


def test_blocks_about_the_hub_run_against_one_on_loopback(tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads the hub's address once."""
    with hub_server.serving() as hub:
        for name, labels, ref in (("org/name", 3, "v1.0"), ("org/reranker", 1, "main")):
            folder = checkpoints.write(tmp_path / name, checkpoints.config(labels=labels))
            hub.publish(name, hub_server.files_of(checkpoints.write_vocabulary(folder)), ref=ref)
        program = f"import test_docs; test_docs.run(test_docs.ROOT / 'docs' / {HUB!r})"
        places = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
        subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT / "tests", env=os.environ | places)
