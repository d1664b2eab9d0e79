"""From process start to the first answer with the bundled model: minilpt beside ONNX Runtime int8 of the same weights.

The clock runs from before the process is made until its answer arrives on a pipe. "cold": an empty folder for Numba's
compiled kernels; "warm": the same folder afterwards. What `minilpt bundle` writes has its kernels with it, so that its
cold is warm. Nobody's files are dropped from the disk cache of the system.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from minilpt.bundling import bundle

from .compare import Bench
from .processes import peak_mb

COLD_STARTS = 2
TEXT = "a gorgeous , witty , seductive movie ."

MINILPT = """
import sys, minilpt
model = minilpt.load(precision=sys.argv[2], threads=int(sys.argv[3]))
print(model.predict(sys.argv[4])[0].label, flush=True)
sys.stdin.read()
"""
ONNX = """
import json, sys, numpy, onnxruntime, tokenizers
folder = sys.argv[1]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(sys.argv[3])
session = onnxruntime.InferenceSession(f"{folder}/{sys.argv[2]}.onnx", options, providers=["CPUExecutionProvider"])
ids = numpy.array([tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json").encode(sys.argv[4]).ids])
logits = session.run(None, {"input_ids": ids, "attention_mask": numpy.ones_like(ids)})[0]
print(json.load(open(f"{folder}/config.json"))["id2label"][str(logits[0].argmax())], flush=True)
sys.stdin.read()
"""
BUNDLE = """
import sys
sys.path.insert(0, sys.argv[1])
import minilpt
model = minilpt.load(f"{sys.argv[1]}/model", precision=sys.argv[2], threads=int(sys.argv[3]))
print(model.predict(sys.argv[4])[0].label, flush=True)
sys.stdin.read()
"""
PROGRAMS = {
    "minilpt-fp32": (MINILPT, "fp32"),
    "minilpt-int8": (MINILPT, "int8"),
    "bundle-fp32": (BUNDLE, "fp32"),
    "bundle-int8": (BUNDLE, "int8"),
    "onnxruntime-int8": (ONNX, "int8-all"),
}
LABELS = {"bundle-fp32": "minilpt fp32, bundle", "bundle-int8": "minilpt int8, bundle"}  # others are engines


def measure(bench: Bench, folder: Path) -> dict[str, Any]:
    """Seconds to the first answer and peak MB, every run of every program; the order turns from round to round."""
    found: dict[str, Any] = {name: {"cold": [], "warm": []} for name in bench.usable(PROGRAMS)}
    names = list(found)
    with tempfile.TemporaryDirectory() as scratch:
        made = bundle(None, Path(scratch) / "bundle")
        for turn in range(COLD_STARTS + bench.rounds):
            kind, cache = ("cold", turn) if turn < COLD_STARTS else ("warm", COLD_STARTS - 1)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                if "error" not in found[name]:
                    place = made if PROGRAMS[name][0] is BUNDLE else folder
                    record = _start(name, place, Path(scratch) / f"{name}-{cache}", bench.threads)
                    if "error" in record:
                        bench.say(f"  {name} does not start: {record['error']}")
                        found[name]["error"] = record["error"]
                    else:
                        found[name][kind].append(record)
    return found


def _start(name: str, folder: Path, cache: Path, threads: int) -> dict[str, Any]:
    program, which = PROGRAMS[name]
    command = [sys.executable, "-c", program, str(folder), which, str(threads), TEXT]
    environment = os.environ | {"MINILPT_CACHE_DIR": str(cache), "OMP_NUM_THREADS": str(threads)}
    began = time.perf_counter()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        assert process.stdout is not None
        answer = process.stdout.readline().strip()
        seconds = time.perf_counter() - began
        peak = peak_mb(process.pid) if answer else 0.0
        lines = process.communicate()[1].strip().splitlines()
    if not answer:
        return {"error": lines[-1] if lines else "no answer"}
    return {"seconds": seconds, "peak_mb": peak, "answer": answer}
