"""Commands about this machine: doctor, warmup."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from .. import backends, cuda_device
from ..doctor import examine
from ..errors import BackendError
from ..kernels import compiled
from ..kernels.cuda import Geometry
from ..kernels.cuda.float_kernels import FloatKernels
from ..kernels.cuda.integer_kernels import IntegerKernels
from .rows import aligned


def add(commands: Any) -> None:
    """Their parsers."""
    _add_doctor(commands)
    _add_warmup(commands)


def _add_doctor(commands: Any) -> None:
    doctor = commands.add_parser("doctor", help="look at this machine and installation, and say what to do")
    doctor.add_argument("--json", action="store_true", help="the findings as JSON")
    doctor.set_defaults(run=_doctor)


def _add_warmup(commands: Any) -> None:
    warmup = commands.add_parser("warmup", help="compile the kernels into the cache, as into a container image")
    warmup.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="whose kernels; default: cpu")
    warmup.set_defaults(run=_warmup)


def _doctor(options: argparse.Namespace) -> int:
    """Exit code 1 where there is a problem."""
    findings = examine()
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        print("\n".join(aligned([[finding.level, finding.about, finding.found] for finding in findings])))
        for finding in findings:
            if finding.advice:
                print(f"{finding.about}: {finding.advice}")
    return int(any(finding.level == "problem" for finding in findings))


def _warmup(options: argparse.Namespace) -> None:
    if options.device == "cuda":
        device = cuda_device.find()
        for kernels in (FloatKernels(device.cp, Geometry(), "float32"), IntegerKernels(device.cp, Geometry())):
            cuda_device.compile_kernels(kernels, device)
        print(f"sm_{device.capability}: kept by CuPy, in ~/.cupy/kernel_cache or CUPY_CACHE_DIR")
        return
    backend = backends.choose("cpu", "fp32", None)
    if backend.rung is None:
        raise BackendError(f"there is nothing to compile: {backend.reason}")
    for part in compiled.PARTS:
        path = compiled.warm_up(part)
        if not path.is_file():
            raise BackendError(
                f"{path}: the compiled kernels could not be kept; set {compiled.CACHE_VARIABLE} to a folder"
            )
        print(f"{backend.rung}: {path}")
