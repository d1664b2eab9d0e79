"""The file of compiled kernels: found, made anew where it is broken, and done without where it cannot be kept."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from minilpt.kernels import compiled, isa
from minilpt.threads import usable_cores

pytest.importorskip("numba", reason="compiled kernels need numba")

PREDICT = """
import sys, warnings, minilpt
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    label = minilpt.load(threads=1).predict("a gorgeous , witty , seductive movie .")[0].label
print(label, "numba" in sys.modules, [str(w.message) for w in caught if w.category is UserWarning])
"""


def start(program: str, *arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {compiled.CACHE_VARIABLE: str(cache)}
    return subprocess.run(
        [sys.executable, *(["-c", program] if program else []), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that `minilpt warmup` has filled."""
    cache = tmp_path_factory.mktemp("warm") / "below" / "kernels"
    done = start("", "-m", "minilpt", "warmup", cache=cache)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("minilpt: compiling the ") == len(compiled.PARTS)
    files = [compiled.cache_file(isa.chosen(), part).name for part in compiled.PARTS]
    assert sorted(path.name for path in cache.iterdir()) == sorted(files)
    assert done.stdout == "".join(f"{isa.chosen().name}: {cache / name}\n" for name in files)
    return cache


def float_part(cache: Path) -> Path:
    """The file that fp32 and int8 need."""
    return cache / compiled.cache_file(isa.chosen()).name


def test_a_process_that_finds_the_kernels_does_not_load_numba(warm: Path) -> None:
    before = sorted(warm.iterdir())
    assert start(PREDICT, cache=warm).stdout == "positive False []\n"
    assert sorted(warm.iterdir()) == before


def test_info_tells_rung_threads_and_cache(warm: Path) -> None:
    backend = json.loads(start("", "-m", "minilpt", "info", cache=warm).stdout)["backend"]
    assert backend["name"] == "numba"
    assert backend["threads"] == usable_cores()
    assert backend["compiled"]["rung"] == isa.chosen().name
    assert backend["compiled"]["cache"] == {str(path): "there" for path in warm.iterdir()}


def test_a_read_only_cache_that_is_full_is_enough(warm: Path) -> None:
    modes = {path: path.stat().st_mode for path in (warm, float_part(warm))}
    for path in modes:
        path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert start(PREDICT, cache=warm).stdout == "positive False []\n"
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


MEET = """
import time
from pathlib import Path
from minilpt.kernels import compiled
from minilpt.kernels.jit import build
code, meeting = sys.argv[1:]
def built(part):
    (Path(meeting) / str(os.getpid())).touch()
    while len(list(Path(meeting).iterdir())) < 4:
        time.sleep(0.01)
    return Path(code).read_bytes()[compiled.bundled.DIGEST_BYTES :]
build.build = built
"""


def test_processes_that_fill_the_cache_at_once_leave_one_whole_file(warm: Path, tmp_path: Path) -> None:
    """Four that have found nothing and compiled: they wait for each other there, and so write at the same time."""
    meeting, cache = tmp_path / "meeting", tmp_path / "cache"
    meeting.mkdir()
    program = PREDICT.replace("import sys,", "import os, sys,").replace("with warnings", MEET + "with warnings", 1)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(start, program, str(float_part(warm)), str(meeting), cache=cache) for _ in range(4)]
    assert [job.result().stdout for job in jobs] == ["positive True []\n"] * 4, jobs[0].result().stderr
    assert list(cache.iterdir()) == [float_part(cache)]
    assert float_part(cache).read_bytes() == float_part(warm).read_bytes()
    assert start(PREDICT, cache=cache).stdout == "positive False []\n"


@pytest.mark.parametrize("damage", [lambda code: code[:-100], lambda code: code[:40] + b"\xff" * 64 + code[104:]])
def test_a_damaged_file_is_compiled_anew(warm: Path, tmp_path: Path, damage: object) -> None:
    file = float_part(warm)
    damaged = tmp_path / file.name
    damaged.write_bytes(damage(file.read_bytes()))  # type: ignore[operator]
    assert start(PREDICT, cache=tmp_path).stdout == "positive True []\n"
    assert damaged.stat().st_size == file.stat().st_size
    assert start(PREDICT, cache=tmp_path).stdout == "positive False []\n"


def test_where_nothing_can_be_kept_it_compiles_and_says_so_once(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    done = start(PREDICT, cache=blocked)
    assert done.stdout.startswith("positive True ["), done.stderr
    assert done.stdout.count("compiled kernels cannot be kept here") == 1
    warmup = start("", "-m", "minilpt", "warmup", cache=blocked)
    assert (warmup.returncode, "could not be kept; set MINILPT_CACHE_DIR" in warmup.stderr) == (1, True)


def test_the_cache_lies_where_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(compiled.CACHE_VARIABLE, str(tmp_path))
    assert compiled.cache_folder() == tmp_path
    monkeypatch.delenv(compiled.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiled.cache_folder() == tmp_path / "minilpt"
