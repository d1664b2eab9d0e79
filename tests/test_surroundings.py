"""A process whose surroundings lack what most have: it predicts all the same, or says in one sentence what it needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import minilpt
from minilpt.kernels import compiled, isa

pytest.importorskip("numba", reason="compiled kernels need numba")

HERE = Path(minilpt.__file__).resolve().parents[1]
# What compiles gives the code that the test run has made already: here only the way to it is of interest.
PREDICT = """
import sys, types, warnings
from pathlib import Path
code = Path(sys.argv[1]).read_bytes()
sys.modules["minilpt.kernels.jit.build"] = types.SimpleNamespace(build=lambda part: code)
import minilpt
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(minilpt.load(threads=2).predict(["a gorgeous , witty , seductive movie ."] * 100)[0].label)
print([str(each.message) for each in caught if each.category is UserWarning])
"""
WRITE = """
from pathlib import Path
from minilpt import InputError, files
try:
    files.write_whole(Path("file"), bytes(1_000_000))
except InputError as error:
    print(error)
try:
    with files.whole_folder(Path("folder")) as folder:
        (folder / "part").write_bytes(bytes(1_000_000))
except InputError as error:
    print(error)
"""
KEPT = "positive\n[]\n"


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels' object code."""
    compiled.warm_up()
    file, content = tmp_path_factory.mktemp("code") / "float", compiled.stored(isa.chosen(), "float")
    assert content is not None
    file.write_bytes(content)
    return file


def predict(
    code: Path, *prefix: str, work: Path | None = None, **variables: str | None
) -> subprocess.CompletedProcess[str]:
    """Run PREDICT behind the prefix, in the folder `work`, with variables set, or taken away where None."""
    without = {compiled.CACHE_VARIABLE, "XDG_CACHE_HOME", "LOCALAPPDATA", *variables}
    environment = {name: value for name, value in os.environ.items() if name not in without}
    environment |= {name: value for name, value in variables.items() if value is not None}
    command = [*prefix, sys.executable, "-B", "-c", PREDICT, str(code)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=work)


@pytest.fixture(scope="module")
def mounts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The start of a command in a mount namespace of its own: a shell script, its arguments and $@ follow."""
    start = ["unshare", *(() if os.geteuid() == 0 else ("--map-root-user",)), "--mount", "sh", "-ec"]
    try:
        script = f"mount -t tmpfs none /mnt\n{read_only(tmp_path_factory.mktemp('probe'))}"
        probe = subprocess.run([*start, script, "sh", "true"], capture_output=True, text=True, timeout=60)
    except OSError as error:
        pytest.skip(f"no mount namespaces: {error}")
    if probe.returncode:
        pytest.skip(f"nothing can be mounted here: {probe.stderr.strip()}")
    return start


def read_only(*folders: Path) -> str:
    """A script that makes them so, then runs its arguments."""
    each = "".join(f"mount --bind '{path}' '{path}'; mount -o remount,bind,ro '{path}'\n" for path in folders)
    refused = "".join(f"! touch '{path}/probe' 2>/dev/null || exit 99\n" for path in folders)
    return f'{each}{refused}exec "$@"'


def test_a_read_only_home_is_named_once(mounts: list[str], code: Path, tmp_path: Path) -> None:
    done = predict(code, *mounts, read_only(tmp_path), "sh", HOME=str(tmp_path))
    assert done.stdout.startswith("positive\n"), done.stderr
    assert done.stdout.count("compiled kernels cannot be kept here (Read-only file system)") == 1
    assert compiled.CACHE_VARIABLE in done.stdout


def test_a_home_that_became_read_only_is_enough(mounts: list[str], code: Path, tmp_path: Path) -> None:
    assert predict(code, HOME=str(tmp_path)).stdout == KEPT
    done = predict(code, *mounts, read_only(tmp_path), "sh", HOME=str(tmp_path))
    assert done.stdout == KEPT, done.stderr


def test_a_read_only_package_folder_is_enough(mounts: list[str], code: Path, tmp_path: Path) -> None:
    script = read_only(*(HERE / name for name in ("minilpt", "kernels", "weights")), Path(sys.prefix))
    done = predict(code, *mounts, script, "sh", HOME=str(tmp_path))
    assert done.stdout == KEPT, done.stderr


def test_no_shared_memory_is_needed(mounts: list[str], code: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    script = f"mount --bind '{tmp_path / 'empty'}' /dev/shm; mount -o remount,bind,ro /dev/shm\nexec \"$@\""
    done = predict(code, *mounts, script, "sh", HOME=str(tmp_path))
    assert done.stdout == KEPT, done.stderr


def test_a_full_disk_is_named_and_keeps_no_half_file(mounts: list[str], code: Path, tmp_path: Path) -> None:
    script = f"mount -t tmpfs -o size=64k none '{tmp_path}'\n\"$@\"\nfind '{tmp_path}' -type f"
    done = predict(code, *mounts, script, "sh", HOME=str(tmp_path))
    answer, warning = done.stdout.splitlines()  # and no file that find has seen
    assert answer == "positive", done.stderr
    assert warning.count("compiled kernels cannot be kept here (No space left on device)") == 1


def test_what_does_not_fit_on_the_disk_leaves_nothing(mounts: list[str], tmp_path: Path) -> None:
    """Files and folders, through the two functions that every command writes with."""
    script = f"cd '{tmp_path}'\nmount -t tmpfs -o size=64k none .\ncd '{tmp_path}'\n\"$@\"\nfind . -mindepth 1"
    done = subprocess.run(
        [*mounts, script, "sh", sys.executable, "-c", WRITE], capture_output=True, text=True, timeout=60
    )
    full = "cannot be written: No space left on device"
    assert done.stdout.splitlines() == [f"file: {full}", f"folder: {full}"], done.stderr


def test_a_user_without_a_home_gets_no_folder_of_that_name(code: Path, tmp_path: Path) -> None:
    """As a container's number has none: no variable, and no entry in the list of users."""
    become = ["unshare", "--user", "--map-user=54321"]
    try:
        probe = subprocess.run([*become, "true"], capture_output=True, text=True, timeout=60)
    except OSError as error:
        pytest.skip(f"no user namespaces: {error}")
    if probe.returncode:
        pytest.skip(f"no other user can be had here: {probe.stderr.strip()}")
    done = predict(code, *become, work=tmp_path, HOME=None)
    assert done.stdout.startswith("positive\n"), done.stderr
    assert done.stdout.count("no home/minilpt: compiled kernels cannot be kept here") == 1
    assert list(tmp_path.iterdir()) == []
