"""Bundles: folders that run a model without Numba, LLVM or any other package of this environment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import minilpt
from minilpt import bundling, cli
from minilpt.kernels import bundled, compiled, isa, shared_object
from minilpt.weights import resolve

pytest.importorskip("numba", reason="compiled kernels need numba")

try:
    bundling._check(minilpt.load(), bundling.RUNGS)
except minilpt.BackendError as error:
    pytest.skip(str(error), allow_module_level=True)

RUNGS = tuple(dict.fromkeys((isa.usable()[0].name, isa.usable()[-1].name)))
TEXTS = ["a gorgeous , witty , seductive movie .", ("pairs are", "tuples"), "", "dull " * 90]
# Refuses every write and every import of what a bundle must not need; then {} stands for what a test asks.
PROGRAM = """
import os, sys
def watch(event, arguments):
    if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        raise AssertionError(f"opened for writing: {{arguments[0]}}")
    if event == "import" and arguments[0].split(".")[0] in ("numba", "llvmlite"):
        raise AssertionError(f"imported: {{arguments[0]}}")
sys.addaudithook(watch)
sys.path.insert(0, sys.argv[1])
import minilpt
from minilpt.kernels import isa
assert minilpt.__file__.startswith(sys.argv[1])
{}
"""
LOGITS = """
texts = {texts!r}
for precision in ("fp32", "int8", "ibert"):
    for threads in (1, 2):
        print(minilpt.load({model!r}, precision=precision, threads=threads).logits(texts).tobytes().hex())
"""


def alone(folder: Path, program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program on a bundle, without site-packages, home or any variable."""
    command = [sys.executable, "-I", "-S", "-B", "-W", "error", "-c", PROGRAM.format(program), str(folder)]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the bundled model, to be read only."""
    return bundling.bundle(None, tmp_path_factory.mktemp("bundle") / "made", rungs=RUNGS)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A bundle to break: its own minilpt, links to the rest."""
    made = tmp_path / "copy"
    made.mkdir()
    for path in folder.iterdir():
        (made / path.name).symlink_to(path)
    (made / "minilpt").unlink()
    shutil.copytree(folder / "minilpt", made / "minilpt")
    return made


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("rung", RUNGS)
def test_a_bundle_gives_the_logits_of_the_compiled_engine_bit_for_bit_and_writes_nothing(
    folder: Path, rung: str
) -> None:
    before = files(folder)
    done = alone(folder, LOGITS.format(texts=TEXTS, model=str(folder / "model")), MINILPT_ISA=rung)
    assert done.returncode == 0, done.stderr
    assert files(folder) == before
    here = "import minilpt\n" + LOGITS.format(texts=TEXTS, model=str(resolve.MODELS / resolve.DEFAULT))
    environment = os.environ | {isa.VARIABLE: rung}
    want = subprocess.run([sys.executable, "-c", here], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout == want.stdout
    assert len(set(done.stdout.split())) == 3  # one for each precision, whatever the threads


def test_its_program_answers_texts_and_events(folder: Path) -> None:
    command = [sys.executable, "-I", "-S", "-B", str(folder / "app.py"), *TEXTS[:1]]
    done = subprocess.run(command, env={}, cwd="/", check=True, capture_output=True, text=True)
    want = json.loads(json.dumps(minilpt.load().predict(TEXTS[0])[0].to_dict()))
    assert json.loads(done.stdout) == want
    program = """
import app, base64, json
texts = {"texts": ["a fine film", ["pairs are", "lists"]]}
plain = app.handler(texts)["predictions"]
encoded = base64.b64encode(json.dumps(texts).encode())
for event in ({"body": json.dumps(texts)}, {"body": encoded, "isBase64Encoded": True}):
    answer = app.handler(event, None)
    assert answer["statusCode"] == 200
    assert json.loads(answer["body"])["predictions"] == json.loads(json.dumps(plain))
for body in ("{", "[]", '{"texts": 3}', '{"texts": [3]}', None):
    answer = app.handler({"body": body})
    assert answer["statusCode"] == 400 and json.loads(answer["body"])["error"], body
print([p["label"] for p in plain])
"""
    done = alone(folder, program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("['positive', ")


def test_it_is_small_whole_and_says_what_it_is(folder: Path) -> None:
    names = files(folder)
    assert sum((folder / name).stat().st_size for name in names) < 110e6
    assert not [name for name in names if "/tests/" in name or name.endswith((".pyi", ".h"))]
    for package in ("minilpt", *bundling.CARRIED):
        licences = [str(file) for file in bundling._installed_files(package) if "licenses" in file.parts]
        assert {*licences, f"{package}-{metadata.version(package)}.dist-info/METADATA"} <= names
    facts = json.loads((folder / "bundle.json").read_text())
    assert (facts["minilpt"], facts["rungs"]) == (minilpt.__version__, list(RUNGS))
    here = str(Path(__file__).resolve().parents[1]).encode()
    assert not [name for name in names if here in (folder / name).read_bytes()]
    with zipfile.ZipFile(bundling.zipped(folder)) as archive:
        assert {name for name in archive.namelist() if not name.endswith("/")} == names


LABEL = "label = minilpt.load({model!r}).predict('a fine film')[0].label; print(isa.chosen().name, label)"


def test_a_machine_takes_the_highest_rung_that_it_has(folder: Path) -> None:
    program = "isa.features = lambda: frozenset({features})\n" + LABEL.format(model=str(folder / "model"))
    assert alone(folder, program.format(features=[])).stdout == f"{isa.LADDER[-1].name} positive\n"
    assert alone(folder, LABEL.format(model=str(folder / "model"))).stdout == f"{RUNGS[0]} positive\n"


def test_its_command_line_works_and_its_doctor_finds_no_problem(folder: Path) -> None:
    for command in (["doctor"], ["predict", "--model", str(folder / "model"), "a fine film"]):
        done = alone(folder, f"from minilpt.cli import main; sys.exit(main({command!r}))")
        assert (done.returncode, done.stderr) == (0, "")


def break_sources(folder: Path) -> None:
    with (folder / "minilpt" / "kernels" / "blocks.py").open("a") as file:
        file.write("# another version\n")


def alter(folder: Path) -> None:
    path = folder / "minilpt" / "kernels" / "bundled" / bundled.name("float", RUNGS[0])
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


def keep_what_no_cpu_has(folder: Path) -> None:
    for rung in RUNGS:
        for part in compiled.PARTS:
            path = folder / "minilpt" / "kernels" / "bundled" / bundled.name(part, rung)
            path.unlink() if rung != RUNGS[0] else path.rename(path.with_name(bundled.name(part, "avx1024")))


@pytest.mark.parametrize(
    "damage, said",
    [
        (break_sources, "this bundle holds no rung of this package's sources"),
        (alter, "the compiled kernels are cut short or altered"),
        (keep_what_no_cpu_has, "this bundle holds avx1024; this machine can execute "),
    ],
)
def test_kernels_that_do_not_fit_are_refused(copy: Path, damage: object, said: str) -> None:
    damage(copy)  # type: ignore[operator]
    done = alone(copy, LABEL.format(model=str(copy / "model")))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("minilpt.errors.BackendError: ")
    assert said in done.stderr


def test_a_rung_is_compiled_for_another_machine_as_that_machine_does(tmp_path: Path) -> None:
    rung = isa.usable()[0]
    compiled.entry("float")
    file = tmp_path / "object"
    command = [sys.executable, "-m", "minilpt.kernels.jit", rung.name, "float", str(file)]
    subprocess.run(command, check=True, env=os.environ | {"NUMBA_CPU_NAME": "nehalem", isa.VARIABLE: ""})
    assert file.read_bytes() == compiled.stored(rung, "float")


@pytest.mark.parametrize(
    "code, said",
    [
        (b"", "not an object file"),
        (b"MZ" + bytes(100), "not an object file"),
        (shared_object.IDENTITY + b"\1\0\xb7\0" + bytes(44), r"found kind and machine \(1, 183\)"),
    ],
)
def test_the_linker_refuses_other_systems_and_machines(code: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        shared_object.link(code, compiled.ENTRY)


def test_the_linker_refuses_a_relocation_that_it_does_not_know() -> None:
    compiled.entry("float")
    code = bytearray(compiled.stored(isa.chosen(), "float") or b"")
    sections = shared_object._parsed(bytes(code)).sections
    table = max(sections[sections["type"] == shared_object.RELOCATIONS], key=lambda section: int(section["size"]))
    code[int(table["offset"]) + 8] = 1
    with pytest.raises(ValueError, match="relocation 1 of "):
        shared_object.link(bytes(code), compiled.ENTRY)


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        ([resolve.DEFAULT, "--out", tmp_path], "is there already"),
        (
            [resolve.DEFAULT, "--out", tmp_path / "x", "--isa", "avx2,avx1024"],
            "some of amx, avx512vnni, avx512, avx2, portable",
        ),
        (["nowhere", "--out", tmp_path / "x"], "neither a folder nor a bundled model"),
    ):
        assert cli.main(["bundle", *map(str, arguments)]) == 1
        out, err = capsys.readouterr()
        assert (out, said in err, err.count("\n")) == ("", True, 1)
    assert not list(tmp_path.iterdir())
