"""Would the tests notice? Sources with one barrier or guard too few, each given to the tests in a process of its own.

    python -m cuda_rig.mutants --out FILE --command "pytest -x ..." SOURCE.cu...

The command runs once for each mutant, with CUDA_RIG_MUTANT set to a file that has the source's name and the mutant's
text; the tests must compile that one. A mutant is killed when the command fails, or takes too long.
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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

VARIABLE = "CUDA_RIG_MUTANT"
# What is done -> where, and what stands there afterwards.
MUTATIONS = {
    "no block barrier": (r"__syncthreads\(\);", ";"),
    "no warp barrier": (r"__syncwarp\(\);", ";"),
    "no early return": (r"if \([^;{}]*\) return;", ";"),
    "a bound one too high": (r"(?<=[\w\])] )< (?=[\w(])", "<= "),
    "every thread, not the first": (r"if \((?:lane|threadIdx\.x) == 0\)", "if (true)"),
    "a plain addition, not an atomic one": (r"atomicAdd\(([^,]+), ([^)]+)\)", r"(*(\1) += \2)"),
}


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
    source: str
    line: int
    mutation: str
    before: str
    after: str
    killed: bool


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


def judge(mutant: Mutant, command: Sequence[str], limit_s: float) -> Verdict:
    """Run the tests on one mutant."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, mutant.source)
        path.write_text(mutant.text, encoding="utf-8")
        try:
            environment = os.environ | {VARIABLE: str(path)}
            code = subprocess.run(command, env=environment, capture_output=True, timeout=limit_s).returncode
        except subprocess.TimeoutExpired:
            code = -1
    facts = asdict(mutant)
    del facts["text"]
    return Verdict(**facts, killed=code != 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE.cu")
    parser.add_argument("--command", required=True, help="the tests; {stem} becomes the source's name without .cu")
    parser.add_argument("--only", action="append", choices=MUTATIONS, help="these mutations; default: all")
    parser.add_argument("--limit-s", type=float, default=300)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    verdicts: list[Verdict] = []
    for source in options.sources:
        command = shlex.split(options.command.replace("{stem}", source.stem))
        for mutant in mutants(source, options.only or tuple(MUTATIONS)):
            verdicts.append(judge(mutant, command, options.limit_s))
            last = verdicts[-1]
            if not last.killed:
                print(f"survived: {last.source}:{last.line}, {last.mutation}: {last.after}", file=sys.stderr)
    survivors = [asdict(verdict) for verdict in verdicts if not verdict.killed]
    partial = options.out.with_suffix(".partial")
    compiler = subprocess.run(["g++", "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    facts = {"date": date.today().isoformat(), "machine": platform.platform(), "compiler": compiler}
    found = {"mutations": options.only or [*MUTATIONS], "mutants": len(verdicts), "survivors": survivors}
    partial.write_text(json.dumps(facts | found, indent=2) + "\n")
    os.replace(partial, options.out)
    print(f"{len(verdicts) - len(survivors)} of {len(verdicts)} mutants were killed")


if __name__ == "__main__":
    main()
