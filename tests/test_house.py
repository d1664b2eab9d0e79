"""The shape of the house: who may import whom, what an import loads, and what is packaged."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest itself brings it there
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"minilpt": ROOT / "minilpt", "minilpt.kernels": ROOT / "kernels", "minilpt.weights": ROOT / "weights"}

# From the ground up. A module imports only from rows before its own.
FLOORS = (
    ("errors",),
    tuple("batching config cuda_device explanation files footprint kernels quantize ragged threads truncation".split()),
    ("weights", "pruning", "text", "embeddings"),
    ("backends", "batches", "reference", "records", "scales", "integer_rules"),
    ("tasks", "integer_model", "finite"),
    ("engine", "integer_reference"),
    ("numpy_engine", "compiled_engine", "cuda_engine"),
    ("float_program", "integer_program", "cuda_float", "cuda_integer"),
    ("api", "plots", "threshold_search"),
    ("evaluate",),
    ("calibration", "ranges", "golden", "serving"),
    ("curated",),
    ("loading",),
    ("bundling", "doctor"),
    ("bundle_entry", "cli", "integrations", "recipes"),
)
FLOOR = {module: number for number, row in enumerate(FLOORS) for module in row}
SOURCES = sorted(path for room in ROOMS.values() for path in room.rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Absolute names of everything that a source file imports, at any depth."""
    package = next(name for name, room in ROOMS.items() if path.is_relative_to(room))
    package = ".".join([package, *path.relative_to(ROOMS[package]).parent.parts])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room_of(path: Path) -> str:
    """The module or package on whose floor a source file lives. Recipes are programs, like the command line."""
    if path.is_relative_to(ROOT / "weights" / "recipes"):
        return "recipes"
    for name, room in {
        "kernels": "kernels",
        "weights": "weights",
        "serving": "minilpt/serving",
        "cli": "minilpt/cli",
    }.items():
        if path.is_relative_to(ROOT / room):
            return name
    return path.stem


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards_only(path: Path) -> None:
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "minilpt" and len(parts) > 1 and parts[1] in FLOOR and parts[1] != room:
            assert FLOOR[parts[1]] < FLOOR[room], f"{room} imports {name} from its own floor or above"


def test_kernels_import_numpy_and_the_standard_library_and_where_they_are_compiled_numba() -> None:
    """`compiled` and `isa` need llvmlite, at a call, to load machine code and to know the CPU."""
    for path in (ROOT / "kernels").rglob("*.py"):
        allowed = {"numpy", "__future__"}
        if path.parent.name == "jit":
            allowed |= {"numba", "llvmlite"}
        elif path.name in ("compiled.py", "isa.py"):
            allowed |= {"llvmlite"}
        for name in imported(path):
            top = name.split(".")[0]
            assert top in allowed or top in sys.stdlib_module_names or name.startswith("minilpt.kernels"), name


def test_torch_and_transformers_appear_in_recipes_only() -> None:
    for path in SOURCES:
        if not path.is_relative_to(ROOT / "weights" / "recipes"):
            assert not {name.split(".")[0] for name in imported(path)} & {"torch", "transformers"}, path


def test_importing_minilpt_loads_numpy_and_the_standard_library_only() -> None:
    program = (
        "import sys; before = set(sys.modules); import minilpt\n"
        "tops = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(tops - set(sys.stdlib_module_names)))"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert set(output.split()) == {"minilpt", "numpy"}


def test_the_package_list_names_every_package() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    there = {
        ".".join([name, *init.parent.relative_to(room).parts])
        for name, room in ROOMS.items()
        for init in room.rglob("__init__.py")
    }
    assert set(setuptools["packages"]) == there


def test_no_machine_path_and_no_registry_host_in_the_repository() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs a git checkout: the files to look at are those that git lists")
    unwanted = ("py" + "pi.org", "/" + "work/", "/" + "root/", "/" + "tmp/")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".safetensors", ".npz", ".png") or path.name in ("tokenizer.json", "vocab.txt"):
            continue
        found = [word for word in unwanted if word in path.read_text(encoding="utf-8")]
        assert not found, f"{name} holds {found}"


def test_the_batching_core_and_the_service_know_no_http() -> None:
    web = {"fastapi", "starlette", "uvicorn"}
    assert all(not name.startswith("minilpt.") or "errors" in name for name in imported(ROOT / "minilpt/batching.py"))
    for name in ("service", "work", "refusals", "metrics", "options"):
        assert not {found.split(".")[0] for found in imported(ROOT / f"minilpt/serving/{name}.py")} & web, name
