"""The wheel is the same from wherever it is built, and predicts in a fresh environment without torch; the lock file."""

from __future__ import annotations

import importlib.metadata as metadata
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest itself brings it there
    import tomli as tomllib

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


def test_a_commit_s_wheel_has_the_same_bytes_from_other_folders_umasks_and_time_zones(tmp_path: Path) -> None:
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("needs a git checkout: what is built is a commit")
    found = []
    for name, mask, zone, seed in (("a", 0o022, "UTC", "1"), ("another", 0o077, "Asia/Tokyo", "2")):
        (tmp_path / name).mkdir()
        settings = {"TMPDIR": str(tmp_path / name), "TZ": zone, "PYTHONHASHSEED": seed}
        command = [ROOT / ".ci" / "wheel", sys.executable, tmp_path / name / "out"]
        subprocess.run(command, cwd=ROOT, env=os.environ | settings, umask=mask, check=True, capture_output=True)
        found.append(next((tmp_path / name / "out").glob("*.whl")).read_bytes())
    assert found[0] == found[1]


def test_the_lock_file_has_every_pin_with_hashes_and_no_address() -> None:
    text = (ROOT / ".ci" / "locked.txt").read_text(encoding="utf-8")
    assert "://" not in text
    entries = re.findall(
        r"^([\w.-]+)==(\S+)[^\n]*((?:\n    --hash=sha256:[0-9a-f]{64}[ \\]*)+)$", text, flags=re.MULTILINE
    )
    assert len(entries) == sum(not line.startswith((" ", "#")) for line in text.splitlines()) > 50
    locked = {(name, version) for name, version, _ in entries}
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = content["project"]["optional-dependencies"]
    for written in [*content["build-system"]["requires"], *extras["test"], *extras["test-base"], *extras["lint"]]:
        requirement = Requirement(written)
        if requirement.name not in ("minilpt", "torch"):  # of torch each platform has another build
            assert (requirement.name, str(requirement.specifier).removeprefix("==")) in locked, written
