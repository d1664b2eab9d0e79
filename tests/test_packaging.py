"""The wheel, installed in a fresh environment without torch, predicts."""

from __future__ import annotations

import importlib.metadata as metadata
import json
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


def closure(name: str, seen: set[str] | None = None) -> set[str]:
    """Names of the distributions that `name` needs at run time, extras left out, as installed here."""
    seen = set() if seen is None else seen
    for text in metadata.requires(name) or []:
        requirement = Requirement(text)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and requirement.name.lower() not in seen:
            seen.add(requirement.name.lower())
            closure(requirement.name, seen)
    return seen


def top_level(name: str) -> Iterator[Path]:
    """Files and folders that a distribution put directly into site-packages."""
    distribution = metadata.distribution(name)
    site = Path(str(distribution.locate_file("")))
    tops = {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}
    yield from (site / top for top in sorted(tops))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that nothing is left in the working tree."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("minilpt", "kernels", "weights"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", out, source]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def fresh_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and its declared dependencies, linked from here so that no network is used."""
    home = tmp_path_factory.mktemp("fresh")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    for name in closure("minilpt"):
        for path in top_level(name):
            if not (site / path.name).exists():
                (site / path.name).symlink_to(path)
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel]
    subprocess.run(install, check=True, capture_output=True)
    return python


def run(python: Path, *arguments: str, cwd: Path) -> str:
    """Standard output of one command far from the repository."""
    done = subprocess.run([python, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_is_pure_python_and_whole(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    sources = {"minilpt": "minilpt", "kernels": "minilpt/kernels", "weights": "minilpt/weights"}
    for folder, inside in sources.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert f"{inside}/{path.relative_to(ROOT / folder).as_posix()}" in names
    assert not [
        name for name in names if name.split("/")[0] not in ("minilpt", wheel.name.split("-py3")[0] + ".dist-info")
    ]


def test_a_fresh_environment_without_torch_predicts(fresh_python: Path, tmp_path: Path) -> None:
    absent = "import importlib.util as u; print([n for n in ('torch', 'transformers', 'scipy') if u.find_spec(n)])"
    assert run(fresh_python, "-c", absent, cwd=tmp_path).strip() == "[]"
    program = "import minilpt; print(minilpt.load().predict('A gorgeous, witty, seductive movie.')[0].label)"
    assert run(fresh_python, "-W", "error", "-c", program, cwd=tmp_path).strip() == "positive"


def test_the_installed_command_predicts(fresh_python: Path, tmp_path: Path) -> None:
    command = str(fresh_python.parent / "minilpt")
    output = run(fresh_python, command, "predict", "Dull from start to finish.", cwd=tmp_path)
    assert json.loads(output)["label"] == "negative"
