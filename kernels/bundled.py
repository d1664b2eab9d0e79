"""Kernels that came with the package, as shared objects beside this file: in the folders that `minilpt bundle` writes.

Such a package needs neither Numba nor LLVM, and compiles nothing. Any other has no FOLDER.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "bundled"
DIGEST_BYTES = hashlib.sha256().digest_size
SOURCES = ("blocks", "elementwise", "integer", "isa")  # what `jit` compiles is in it and in these


@cache
def sources() -> bytes:
    """Everything that the kernels are compiled from."""
    here = Path(__file__).parent
    files = sorted([*here.glob("jit/*.py"), *(here / f"{name}.py" for name in SOURCES)])
    return b"".join(file.read_bytes() for file in files)


def name(part: str, rung: str) -> str:
    """A part's file for a rung: it names the sources that it was made from."""
    return f"{part}-{rung}-{hashlib.sha256(sources()).hexdigest()[:16]}.so"


@cache
def rungs() -> tuple[str, ...] | None:
    """Names of the rungs for which kernels of this package's sources are here; None in any package but a bundle's."""
    if not FOLDER.is_dir():
        return None
    there = [path.name.split("-")[:2] for path in sorted(FOLDER.glob("*.so"))]
    return tuple(dict.fromkeys(rung for part, rung in there if (FOLDER / name(part, rung)).is_file()))


def sealed(content: bytes) -> bytes:
    """A shared object with its SHA-256 behind it, where no loader looks."""
    return content + hashlib.sha256(content).digest()


def path(part: str, rung: str) -> Path:
    """The file to load. ValueError if it is not here, cut short or altered."""
    file = FOLDER / name(part, rung)
    try:
        content = file.read_bytes()
    except OSError:
        raise ValueError(f"{FOLDER}: no {part} kernels for {rung}; bundle with another --isa or --precision") from None
    if sealed(content[:-DIGEST_BYTES]) != content:
        raise ValueError(f"{file}: the compiled kernels are cut short or altered; copy the bundle anew")
    return file
