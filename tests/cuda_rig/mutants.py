"""Would the tests notice? Sources with one barrier or guard too few, each given to the tests in a process of its own.

    python -m cuda_rig.mutants --out FILE --command "pytest -x ..." SOURCE.cu...

The command runs once for each mutant, with CUDA_RIG_MUTANT set to a file that has the source's name and the mutant's
text; the tests must compile that one. First the command has to pass on the source as it is, or everything would count
as killed. A mutant is killed by a report of the checker, by a failed assertion, by a crash or by an endless loop. The
result counts these apart, and lists those that died of anything else: that may be an error of the tests, no verdict.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from . import simt

VARIABLE = "CUDA_RIG_MUTANT"
# What is done -> where, and what stands there afterwards.
MUTATIONS = {
    "no block barrier": (r"__syncthreads\(\);", ";"),
    "no warp barrier": (r"__syncwarp\(\);", ";"),
    "no early return": (r"if \([^;{}]*\) return;", ";"),
    "no guard": (r"if \([^()]*<[^()]*\)(?! return)", "if (true)"),
    "a bound one too high": (r"(?<=[\w\])] )< (?=[\w(])", "<= "),
    "every thread, not the first": (r"if \((?:lane|threadIdx\.x) == 0\)", "if (true)"),
    "a plain addition, not an atomic one": (r"atomicAdd\(([^,]+), ([^)]+)\)", r"(*(\1) += \2)"),
}

SURVIVED, INVALID = "survived", "does not compile"
# Of a command that failed: outcome -> what its output holds, the first that fits.
EVIDENCE = {"the checker's report": r"the checker found", "a failed assertion": r"AssertionError"}
CRASH, TOO_LONG, OTHER = "a crash", "too long", "another error"


@dataclass(frozen=True)
class Mutant:
    """line: 1-based; before, after: that line."""

    source: str
    line: int
    mutation: str
    before: str
    after: str
    text: str


@dataclass(frozen=True)
class Verdict:
    """outcome: SURVIVED, INVALID, or what killed it; said: the end of the output of those that another error killed."""

    source: str
    line: int
    mutation: str
    before: str
    after: str
    outcome: str
    said: str = ""


def mutants(source: Path, mutations: Sequence[str] = tuple(MUTATIONS)) -> Iterator[Mutant]:
    """Every mutation in every place of the code, comments, template headers and preprocessor lines left alone."""
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines):
        code = line.split("//")[0]
        if code.lstrip().startswith(("#", "template")):
            continue
        for mutation in mutations:
            pattern, replacement = MUTATIONS[mutation]
            for place in re.finditer(pattern, code):
                changed = code[: place.start()] + place.expand(replacement) + code[place.end() :]
                text = "".join([*lines[:number], changed.rstrip() + "\n", *lines[number + 1 :]])
                yield Mutant(source.name, number + 1, mutation, code.strip(), changed.strip(), text)


def unchanged(source: Path) -> Mutant:
    return Mutant(source.name, 0, "nothing", "", "", source.read_text(encoding="utf-8"))


def judge(mutant: Mutant, command: Sequence[str], limit_s: float) -> Verdict:
    """Run the tests on one mutant. SystemExit where it is the command that went wrong."""
    facts = asdict(mutant)
    del facts["text"]
    try:
        simt.compile(mutant.text, checked=True)
    except simt.RigError:
        return Verdict(**facts, outcome=INVALID)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, mutant.source)
        path.write_text(mutant.text, encoding="utf-8")
        environment = os.environ | {VARIABLE: str(path)}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit_s)
        except subprocess.TimeoutExpired:
            return Verdict(**facts, outcome=TOO_LONG)
    if done.returncode > 1:  # pytest's 2 to 5: nothing collected, or an import that failed
        raise SystemExit(f"{shlex.join(command)} gave {done.returncode}, which is no verdict:\n{done.stdout[-2000:]}")
    outcome = _outcome(done)
    return Verdict(**facts, outcome=outcome, said=done.stdout[-400:] if outcome == OTHER else "")


def _outcome(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode == 0:
        return SURVIVED
    if done.returncode < 0:
        return CRASH
    return next((name for name, pattern in EVIDENCE.items() if re.search(pattern, done.stdout)), OTHER)


def result(verdicts: Sequence[Verdict], mutations: Sequence[str]) -> dict[str, Any]:
    """What is written down: how many died of what, and each of those that lived or died of another error."""
    compiler = subprocess.run(["g++", "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    valid = [verdict for verdict in verdicts if verdict.outcome != INVALID]
    return {
        "date": date.today().isoformat(),
        "machine": platform.platform(),
        "compiler": compiler,
        "mutations": list(mutations),
        "mutants": len(valid),
        "not compiling": len(verdicts) - len(valid),
        "outcomes": dict(sorted(Counter(verdict.outcome for verdict in valid).items())),
        "survivors": [asdict(verdict) for verdict in valid if verdict.outcome == SURVIVED],
        "other errors": [asdict(verdict) for verdict in valid if verdict.outcome == OTHER],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE.cu")
    parser.add_argument("--command", required=True, help="the tests; {stem} becomes the source's name without .cu")
    parser.add_argument("--only", action="append", choices=MUTATIONS, help="these mutations; default: all")
    parser.add_argument("--limit-s", type=float, default=300)
    parser.add_argument("--jobs", type=int, default=2, help="so many at a time")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    verdicts: list[Verdict] = []
    mutations, pool = options.only or [*MUTATIONS], ThreadPoolExecutor(options.jobs)
    for source in options.sources:
        command = shlex.split(options.command.replace("{stem}", source.stem))
        if judge(unchanged(source), command, options.limit_s).outcome != SURVIVED:
            raise SystemExit(
                f"{source}: the tests fail or select nothing before anything is changed: {shlex.join(command)}"
            )
        judging = partial(judge, command=command, limit_s=options.limit_s)
        for last in pool.map(judging, mutants(source, mutations)):
            verdicts.append(last)
            print(f"{last.outcome}: {last.source}:{last.line}, {last.mutation}: {last.after}", file=sys.stderr)
    found, unfinished = result(verdicts, mutations), options.out.with_suffix(".partial")
    unfinished.write_text(json.dumps(found, indent=2) + "\n")
    os.replace(unfinished, options.out)
    print(f"{found['mutants'] - len(found['survivors'])} of {found['mutants']} mutants were killed")


if __name__ == "__main__":
    main()
