"""Processes that fork, are forked or are interrupted: every one answers, bit for bit, and every one ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import checkpoints

pytest.importorskip("numba", reason="compiled kernels need numba")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither fork nor SIGINT for one process")

START = """
import multiprocessing, os, signal, sys, threading
import minilpt

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without
FOLDER, *ARGUMENTS = sys.argv[1:]
TEXTS = ["good film", ("not a bad film", "the film !"), "a film " * 30] * 16
model = minilpt.load(FOLDER, threads=2)

def answers(_=None):
    return model.logits(TEXTS).tobytes(), model.logits(TEXTS[2]).tobytes()  # split among threads, and by a team
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = checkpoints.write(tmp_path_factory.mktemp("bert"), checkpoints.config(max_position_embeddings=200))
    return checkpoints.write_vocabulary(folder)


def start(program: str, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    file = folder.parent / f"{folder.name}-program.py"  # spawned processes import it again
    file.write_text(START + program)
    command = [sys.executable, str(file), str(folder), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def output(process: subprocess.Popen[str]) -> str:
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return out


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_pool_of_processes_answers_as_its_parent(folder: Path, method: str, when: str) -> None:
    """Forked ones take the parent's model over; the others load their own. when: the parent's first prediction."""
    program = """
if __name__ == "__main__":
    method, when = ARGUMENTS
    early = answers() if when == "after" else None
    with multiprocessing.get_context(method).Pool(2) as pool:
        found = pool.map(answers, range(4), chunksize=1)
    expected = early or answers()
    print([each == expected for each in found], answers() == expected)
"""
    assert output(start(program, folder, method, when)) == f"{[True] * 4} True\n"


def test_prefork_workers_answer_even_if_forked_in_the_middle_of_predictions(folder: Path) -> None:
    """As an application server does it: load, warm up, fork; a worker that ended is replaced, while threads predict."""
    program = """
expected, going = answers(), True

def predict():
    while going:
        answers()

def forked():
    child = os.fork()
    if child:
        return child
    for _ in range(5):
        if answers() != expected:
            os._exit(3)
    model.close()
    os._exit(4 if any(thread.name.startswith("minilpt-") for thread in threading.enumerate()) else 0)

busy = [threading.Thread(target=predict) for _ in range(2)]
for thread in busy:
    thread.start()
ended = []
for _ in range(6):  # two at a time
    workers = [forked(), forked()]
    ended += [os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) for worker in workers]
going = False
for thread in busy:
    thread.join()
print(ended, answers() == expected)
"""
    assert output(start(program, folder)) == f"{[0] * 12} True\n"


def test_ctrl_c_at_any_moment_of_predict_leaves_the_model_usable(folder: Path) -> None:
    """SIGINT at sixty moments spread over two predictions; whichever code it stops, the next answer is right."""
    program = """
import time
expected = answers()
began = time.perf_counter()
answers()
whole_s = time.perf_counter() - began
caught = wrong = 0
for moment in range(60):
    timer = threading.Timer(2 * whole_s * moment / 60, os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        while timer.is_alive():
            answers()
        timer.join()
    except KeyboardInterrupt:
        caught += 1
    wrong += answers() != expected
model.close()
print(caught, wrong, [thread.name for thread in threading.enumerate() if thread.name.startswith("minilpt-")])
"""
    caught, rest = output(start(program, folder)).split(" ", 1)
    assert rest == "0 []\n"
    assert int(caught) > 40  # one that lands in a finaliser or a weak reference's callback is dropped by Python


def test_ctrl_c_ends_a_program_that_does_not_catch_it(folder: Path) -> None:
    process = start("print('ready', flush=True)\nwhile True:\n    answers()\n", folder)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err.strip().splitlines()[-1]) == (-signal.SIGINT, "KeyboardInterrupt")
