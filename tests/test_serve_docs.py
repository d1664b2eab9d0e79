"""docs/serving.md: its commands, run against a server of the bundled model, print what it says they print."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import served

import minilpt

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "serving.md"
EXAMPLES = [
    (command, output)
    for block in re.findall(r"^```console\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    for command, output in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)
]
NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served(minilpt.load()) as client:
        yield f"{client.base_url.host}:{client.base_url.port}"


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl, which is not on PATH")
@pytest.mark.parametrize(("command", "output"), EXAMPLES, ids=[command[:60] for command, _ in EXAMPLES])
def test_an_example_prints_what_the_guide_says(address: str, command: str, output: str) -> None:
    wanted = command.replace("localhost:3000", address).replace("curl ", "curl --noproxy '*' ")
    found = subprocess.run(["bash", "-c", wanted], capture_output=True, text=True, check=True).stdout
    # Another instruction set differs in the last bits of a score: these are compared as numbers, the rest as text.
    assert NUMBER.sub("#", found.replace("\r", "").strip()) == NUMBER.sub("#", output.strip())
    assert [float(n) for n in NUMBER.findall(found)] == pytest.approx(
        [float(n) for n in NUMBER.findall(output)], abs=1e-4
    )
