"""Teams of threads: interrupts at every step, exceptions, threads that end, and the cores that may be used."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import minilpt
from minilpt import threads
from minilpt.threads import Threads

import checkpoints

pytest.importorskip("numba", reason="compiled kernels need numba")

OURS = tuple(map(str, map(Path, ("minilpt/threads.py", "minilpt/compiled_engine.py", "kernels/compiled.py"))))
ROWS = [[5, 6, 7, 8, 9] * 4, [7, 8, 9] * 5]
MANY = [[5 + (place + at) % 50 for at in range(30)] for place in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("bert"))


def ours_alive() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("minilpt-")}


class Interrupts:
    """Raises KeyboardInterrupt in this thread at the step-th opcode of our own files, then never again."""

    def __init__(self, step: int):
        self.left = step
        self.raised = False

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.endswith(OURS):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and not self.raised:
            self.left -= 1
            if self.left < 0:
                self.raised = True
                raise KeyboardInterrupt
        return self


def interrupted(call: Callable[[], Any], step: int) -> bool:
    """Run it with an interrupt at this step; False when it ended before."""
    interrupts, before = Interrupts(step), sys.gettrace()
    sys.settrace(interrupts)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return interrupts.raised


@pytest.mark.parametrize("rows", [ROWS, MANY], ids=["a team", "items"])
@pytest.mark.parametrize("started", [True, False], ids=["running threads", "first call"])
def test_an_interrupt_at_any_step_leaves_the_model_usable(folder: Path, rows: list[list[int]], started: bool) -> None:
    """At every opcode of ours in the calling thread, one by one: nobody hangs, and every later answer is right."""
    model = minilpt.load(folder, threads=2)
    expected = model.forward(rows).logits
    step = 0
    while True:
        if not started:
            model.close()
        if not interrupted(lambda: model.forward(rows), step):
            break
        assert np.array_equal(model.forward(rows).logits, expected), f"after an interrupt at step {step}"
        step += 1
    assert step > 300
    model.close()


def test_an_interrupted_caller_leaves_a_whole_team_behind(folder: Path) -> None:
    """The team runs on without its caller, and the next job waits its turn or runs alone; no slot is lost."""
    team = Threads(2)
    gate, ran = threading.Event(), []

    def part(thread: int, threads: int) -> Callable[[], None]:
        def run() -> None:
            gate.wait()
            ran.append((thread, threads))

        return run

    class LeftError(Exception):
        pass

    def leave(signum: int, frame: FrameType | None) -> None:
        raise LeftError

    old = signal.signal(signal.SIGALRM, leave)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        with pytest.raises(LeftError):
            team.together(part)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    alone: list[tuple[int, int]] = []
    team.together(lambda thread, threads: partial(alone.append, (thread, threads)))
    assert alone == [(0, 1)], "a team that is at work makes the next caller work alone"
    gate.set()
    team.close()
    assert sorted(ran) == [(0, 2), (1, 2)]
    team.together(lambda thread, threads: partial(alone.append, (thread, threads)))
    assert sorted(alone[1:]) == [(0, 2), (1, 2)]
    team.close()


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("early", [True, False], ids=["before it runs", "while it runs"])
def test_an_exception_in_one_part_reaches_the_caller_and_holds_nobody(failing: int, early: bool) -> None:
    team, ran = Threads(2), []

    def part(thread: int, threads: int) -> Callable[[], None]:
        if early and thread == failing:
            raise MemoryError(f"part {thread}")

        def run() -> None:
            if thread == failing:
                raise MemoryError(f"part {thread}")
            ran.append(thread)

        return run

    for _ in range(3):
        with pytest.raises(MemoryError, match=f"part {failing}"):
            team.together(part)
    assert ran == ([] if early else [1 - failing] * 3), "no part runs if one cannot be made"
    team.close()


def test_no_thread_outlives_close_or_the_last_reference(folder: Path) -> None:
    before = ours_alive()
    model = minilpt.load(folder, threads=3)
    expected = model.forward(ROWS).logits
    crew = model.engine._threads._crews[""]  # type: ignore[attr-defined]
    assert len(ours_alive()) >= 3
    model.close()
    assert ours_alive() == before
    assert np.array_equal(model.forward(ROWS).logits, expected), "a closed model starts its threads again"
    leader = model.engine._threads._crews[""].leader  # type: ignore[attr-defined]
    assert crew.leader is not leader
    del model, crew
    leader.join(20)
    assert not leader.is_alive()


def test_a_job_that_comes_behind_the_end_is_run_by_its_caller() -> None:
    team = Threads(2)
    team.together(lambda thread, threads: lambda: None)
    crew = team._crews[""]
    crew.inbox.put(None)
    crew.leader.join()
    found: list[tuple[int, int]] = []
    team.together(lambda thread, threads: partial(found.append, (thread, threads)))
    assert found == [(0, 1)]


def test_where_no_thread_can_be_started_the_caller_works_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = minilpt.load(folder, threads=1).forward(ROWS).logits

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert np.array_equal(minilpt.load(folder, threads=4).forward(ROWS).logits, expected)


def test_a_team_is_as_large_as_the_system_allows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, start = minilpt.load(folder, threads=1).forward(ROWS).logits, threading.Thread.start

    def sparing(thread: threading.Thread) -> None:
        if thread.name == "minilpt-2":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", sparing)
    model = minilpt.load(folder, threads=4)
    assert np.array_equal(model.forward(ROWS).logits, expected)
    model.close()


AT_THE_END = {
    "a model in use until the end": "model.forward(rows)",
    "a job left behind": (
        "import signal\n"
        "def leave(*_): raise KeyboardInterrupt\n"
        "signal.signal(signal.SIGALRM, leave)\n"
        "try:\n"
        "    signal.setitimer(signal.ITIMER_REAL, 0.01)\n"
        "    while True: model.forward(rows)\n"
        "except KeyboardInterrupt: pass"
    ),
    "daemon threads still predicting": (
        "def work():\n"
        "    while True: model.forward(rows)\n"
        "for _ in range(3): threading.Thread(target=work, daemon=True).start()\n"
        "import time; time.sleep(0.2)"
    ),
}


@pytest.mark.parametrize("what", AT_THE_END)
def test_the_interpreter_ends_cleanly(folder: Path, what: str) -> None:
    program = (
        "import sys, threading, minilpt\n"
        "model, rows = minilpt.load(sys.argv[1], threads=2), [[5, 6, 7, 8] * 9] * 40\n"
        f"model.forward(rows)\n{AT_THE_END[what]}\nprint('end')"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def group(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content + "\n")
    return folder


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(threads, "CGROUP", tmp_path / "mount")
    monkeypatch.setattr(threads, "OWN_CGROUPS", tmp_path / "own")
    return tmp_path


def test_the_least_quota_from_the_mount_down_to_the_own_group_counts(cgroups: Path) -> None:
    assert threads.cgroup_quota() is None
    mount = group(cgroups / "mount", cpu__max="max 100000")
    (cgroups / "own").write_text("0::/system.slice/app.service\n")
    group(mount / "system.slice", cpu__max="300000 100000")
    assert threads.cgroup_quota() == 3
    group(mount / "system.slice" / "app.service", cpu__max="150000 100000")
    assert threads.cgroup_quota() == 1.5
    group(mount / "system.slice" / "other.service", cpu__max="50000 100000")
    assert threads.cgroup_quota() == 1.5, "a neighbour's quota is not ours"
    group(mount, cpu__max="20000 100000")
    assert (threads.cgroup_quota(), threads.usable_cores()) == (0.2, 1)


@pytest.mark.parametrize("name", ["cpu", "cpu,cpuacct"])
def test_a_first_version_quota_is_found_too(cgroups: Path, name: str) -> None:
    """In a container whose path is the host's: the mount itself is the container's group."""
    (cgroups / "own").write_text("5:memory:/docker/0123\n4:cpu,cpuacct:/docker/0123\n1:name=systemd:/\n0::/\n")
    group(cgroups / "mount" / name, cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert threads.cgroup_quota() is None
    group(cgroups / "mount" / name, cpu__cfs_quota_us="250000")
    assert threads.cgroup_quota() == 2.5
    group(cgroups / "mount" / name / "docker" / "0123", cpu__cfs_quota_us="50000", cpu__cfs_period_us="50000")
    assert threads.cgroup_quota() == 1


def test_damaged_quota_files_set_no_limit(cgroups: Path) -> None:
    (cgroups / "own").write_text("0::/../outside\n")
    group(cgroups / "mount", cpu__max="none")
    assert threads.cgroup_quota() is None


CORES = "import minilpt.threads as t; print(t.usable_cores(), t.cgroup_quota())"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_the_affinity_mask_bounds_the_threads() -> None:
    """What taskset does, done to a child."""
    core = min(os.sched_getaffinity(0))
    done = subprocess.run(
        [sys.executable, "-c", f"import os; os.sched_setaffinity(0, [{core}])\n{CORES}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split()[0] == "1"


def test_a_real_quota_bounds_the_threads() -> None:
    """In a cgroup made for this test, of the first or the second version."""
    for mount in (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")):
        room = mount / f"minilpt-{os.getpid()}"
        try:
            room.mkdir()
        except OSError:
            continue
        try:
            if (room / "cpu.max").exists():
                (room / "cpu.max").write_text("50000 100000")
            else:
                (room / "cpu.cfs_quota_us").write_text("50000")
            program = f"import os; open({str(room / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n{CORES}"
            done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
            assert done.stdout.split() == ["1", "0.5"], done.stderr
            return
        except FileNotFoundError:
            continue  # this hierarchy has no CPU controller for groups below
        finally:
            room.rmdir()
    pytest.skip("no cgroup with a CPU quota can be made here; the tests above read files of both versions")
