"""The parent's side of the workers: requests, idle time, and conversions in processes of their own."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 120  # the longest request, one round of RoBERTa-base, takes some 30 s
TICK = os.sysconf("SC_CLK_TCK")


def peak_mb(pid: int) -> float:
    """Peak resident memory of a running process, in MB (10^6 bytes).

    From /proc, because what `wait` reports is never less than the size of the process that started it.
    """
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) * 1024 / 1e6


class EngineError(Exception):
    """An engine could not do what it was asked; the message is its own."""


class Worker:
    """A worker process that holds one engine. Raises EngineError for whatever goes wrong inside."""

    def __init__(self, engine: str, folder: Path, settings: Mapping[str, Any], threads: int, log: Path):
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"HF_HUB_OFFLINE": "1"}
        self.name = engine
        self._log = log.open("a")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            bufsize=1,
        )
        self.ask("open", engine=engine, folder=str(folder), settings=dict(settings), threads=threads)

    def peak_mb(self) -> float:
        """Its peak resident memory so far."""
        return peak_mb(self._process.pid)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE_S)
            if not ready:  # seen once: an engine that slept for 15 minutes, all its threads waiting for a lock
                self._process.kill()
                raise EngineError(f"{self.name}, {do}: no answer within {PATIENCE_S} s")
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"error": f"the process ended with status {self._process.wait()}"}
        if "error" in answer:
            self.close()
            raise EngineError(f"{self.name}, {do}: {answer['error']}")
        return answer

    def cpu_seconds(self) -> float:
        """Processor time that the process has used so far, all threads."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def settle(self, most: float = 2.0) -> float:
        """Wait until the process has stopped spinning after its work. Returns the seconds that it took."""
        began, before = time.perf_counter(), self.cpu_seconds()
        while time.perf_counter() - began < most:
            time.sleep(0.05)
            now = self.cpu_seconds()
            if now == before:
                break
            before = now
        return time.perf_counter() - began

    def close(self) -> None:
        """End the process and wait for it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=20)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.close()


def convert(folder: Path, kind: str, log: Path) -> None:
    """Run one conversion of `convert` in its own process. Raises EngineError with its last line."""
    command = [sys.executable, "-m", "benchmarks.convert", str(folder), kind]
    with log.open("a") as file:
        done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.PIPE, text=True)
        file.write(done.stderr)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise EngineError(f"conversion {kind} of {folder.name}: {lines[-1]}")
