"""A model, its kernels and the packages that it needs in one folder, for places without Numba, as serverless functions.

The kernels are the object files that the cache has, linked to shared objects for several rungs of instruction sets.
"""

from __future__ import annotations

import compileall
import json
import logging
import os
import platform
import py_compile
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path, PurePath

from . import __version__, pruning, weights
from .api import Classifier
from .errors import BackendError, DependencyError
from .files import whole_folder
from .kernels import bundled, compiled, isa
from .kernels.shared_object import link
from .loading import load
from .weights.resolve import Source

RUNGS = ("amx", "avx512vnni", "avx2")  # servers since 2023, since 2019, and since 2013
CARRIED = ("numpy", "safetensors", "tokenizers", "tqdm")
# Of packages: what tests them, builds on them in C or Fortran, checks types, or tells how they were installed. Licences
# stay.
UNNEEDED_FOLDERS = {"__pycache__", "_pyinstaller", "distutils", "f2py", "include", "testing", "tests"}
UNNEEDED_ENDINGS = {".a", ".h", ".pxd", ".pyc", ".pyi"}
INSTALLED = ".dist-info"
UNNEEDED_NAMES = {"INSTALLER", "RECORD", "REQUESTED", "direct_url.json"}
TEST_LIBRARIES = (
    "_multiarray_tests",
    "_operand_flag_tests",
    "_rational_tests",
    "_simd",
    "_struct_ufunc_tests",
    "_umath_tests",
)
OF_A_MODEL = ("*.json", "*.safetensors", "*.txt", "*.md", "LICENSE*", "NOTICE*")
SAMPLE = ["The folder answers as this process does.", "Bit for bit, on every rung that this machine can execute."]


def bundle(
    model: str | Path | None,
    out: Path | str,
    *,
    rungs: Sequence[str] = RUNGS,
    precision: str = "fp32",
    revision: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """Write the folder `out`, whose `app.py` classifies with this model, and return its path.

    rungs: names of `isa.LADDER` that the kernels are compiled for; this machine may lack them. The highest one that a
    machine can execute is used there. precision: what `app.py` loads the model with. revision, local_files_only: as
    `load` takes them. The folder is for this version of Python on this system, and appears only if it gives the same
    logits as this process, bit for bit.
    Raises BackendError where bundling is impossible, InputError if `out` is there, DependencyError, and as `load` does.
    """
    classifier = load(model, revision=revision, local_files_only=local_files_only, precision=precision, device="cpu")
    _check(classifier, rungs)
    source = classifier.source
    with whole_folder(Path(out)) as folder:
        _copy_packages(folder)
        _copy_model(source, folder / "model")
        _write_kernels(folder / "minilpt" / "kernels" / bundled.FOLDER.name, rungs)
        shutil.copyfile(Path(__file__).with_name("bundle_entry.py"), folder / "app.py")
        facts = {
            "minilpt": __version__,
            "model": source.card.name if source.card else source.repository or source.folder.name,
            "commit": source.commit,
            "load": {"precision": precision, "device": "cpu"},
            "rungs": list(rungs),
            "python": "{}.{}".format(*sys.version_info),
            "platform": f"{platform.system()} {platform.machine()}",
            "packages": {name: metadata.version(name) for name in CARRIED},
        }
        (folder / "bundle.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        # Times of files change on their way to where they run, and nothing can be written there.
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        compileall.compile_dir(folder, quiet=2, invalidation_mode=mode, stripdir=str(folder))
        _verify(folder, classifier, rungs)
    return Path(out)


def zipped(folder: Path) -> Path:
    """The folder's files in FOLDER.zip, which is there whole or not at all."""
    target = folder.with_name(folder.name + ".zip")
    made = shutil.make_archive(str(folder) + ".partial", "zip", folder)
    return Path(made).replace(target)


def _check(classifier: Classifier, rungs: Sequence[str]) -> None:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise BackendError(f"bundles are for Linux on x86-64, this is {platform.system()} on {platform.machine()}")
    known = [rung.name for rung in isa.LADDER]
    if not rungs or not set(rungs) <= set(known):
        raise BackendError(f"rungs to bundle must be some of {', '.join(known)}; found {', '.join(rungs) or 'none'}")
    if classifier.backend.rung is None:
        raise BackendError(f"a bundle needs compiled kernels: {classifier.backend.reason}")
    if bundled.rungs() is not None:
        raise BackendError("this is a bundle already: bundle where minilpt is installed with Numba")


def _copy_packages(folder: Path) -> None:
    """minilpt without models, cards and recipes, and CARRIED."""
    here = Path(__file__).parent
    ignored = shutil.ignore_patterns("__pycache__", "cards", "models", "recipes")
    rooms = {"": here, "kernels": Path(compiled.__file__).parent, "weights": Path(weights.__file__).parent}
    for name, room in rooms.items():
        shutil.copytree(room, folder / "minilpt" / name, ignore=ignored, dirs_exist_ok=True)
    for name in ("minilpt", *CARRIED):
        for file in _installed_files(name):
            if _needed(file) and (name != "minilpt" or file.parts[0].endswith(INSTALLED)):
                target = folder / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file.locate(), target)


def _installed_files(name: str) -> Sequence[metadata.PackagePath]:
    """A package's files as its installer lists them, the folder that names its licence among them."""
    for distribution in metadata.distributions(name=name):
        files = distribution.files or []
        if any(file.parts[0].endswith(INSTALLED) for file in files):
            return files
    raise DependencyError(f"a bundle carries the package {name}: install it with pip")


def _needed(file: PurePath) -> bool:
    """Of the files of an installed package."""
    if file.parts[0].endswith(INSTALLED):
        return file.name not in UNNEEDED_NAMES
    unneeded = UNNEEDED_FOLDERS & set(file.parts) or ".." in file.parts or file.name.startswith(TEST_LIBRARIES)
    return not unneeded and file.suffix not in UNNEEDED_ENDINGS


def _copy_model(source: Source, target: Path) -> None:
    """The files of a model's folder that loading may read, and what describes them; weights of other formats stay.

    Of a curated name, with its labels and thresholds.
    """
    target.mkdir()
    for pattern in OF_A_MODEL:
        for file in source.folder.glob(pattern):
            shutil.copyfile(file, target / file.name)
    (target / "config.json").write_text(json.dumps(source.settings(), indent=2) + "\n", encoding="utf-8")
    if source.thresholds:
        shutil.copyfile(source.thresholds, target / pruning.FILE_NAME)


def _write_kernels(folder: Path, rungs: Sequence[str]) -> None:
    folder.mkdir()
    for rung in (rung for rung in isa.LADDER if rung.name in rungs):
        for part in compiled.PARTS:
            code = compiled.stored(rung, part) or _compiled(rung, part)
            content = bundled.sealed(link(code, compiled.ENTRY))
            (folder / bundled.name(part, rung.name)).write_bytes(content)


def _compiled(rung: isa.Rung, part: str) -> bytes:
    """An object file from a process of its own, since a process compiles for one rung only."""
    logging.getLogger("minilpt").info("compiling the %s kernels for %s: some 20 seconds", part, rung.name)
    with tempfile.TemporaryDirectory() as room:
        file = Path(room, "object")
        command = [sys.executable, "-m", "minilpt.kernels.jit", rung.name, part, str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise BackendError(f"the {part} kernels do not compile for {rung.name}: {done.stderr.strip()[-500:]}")
        code = file.read_bytes()
    compiled.store(rung, part, code)
    return code


def _verify(folder: Path, classifier: Classifier, rungs: Sequence[str]) -> None:
    """Run the folder alone, without this environment's packages, on every rung of it that works here."""
    wanted = [list(prediction.logits) for prediction in classifier.predict(SAMPLE)]
    for rung in {rung.name for rung in isa.usable()} & set(rungs):
        command = [sys.executable, "-I", "-S", "-B", str(folder / "app.py"), *SAMPLE]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {isa.VARIABLE: rung})
        if done.returncode:
            raise BackendError(f"the bundle does not run on {rung}: {done.stderr.strip()[-500:]}")
        found = [json.loads(line)["logits"] for line in done.stdout.splitlines()]
        if rung == classifier.backend.rung and found != wanted:
            raise BackendError(f"the bundle gives other logits on {rung}: {found} instead of {wanted}")
