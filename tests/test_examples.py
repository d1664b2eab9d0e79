"""Every program in examples/ runs, and does what it says."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import minilpt

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TEXT = "a gorgeous , witty , seductive movie ."
NEEDS = {"fastapi_app": ("fastapi", "httpx"), "pandas_column": ("pandas",), "ray_job": ("ray", "pandas", "pyarrow")}
INSTALL = {"fastapi_app": "'minilpt[test]'", "pandas_column": "'minilpt[test]'", "ray_job": "'minilpt[ray]'"}


def needs(name: str) -> None:
    missing = [package for package in NEEDS[name] if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"examples/{name}.py needs {', '.join(missing)}: pip install {INSTALL[name]}")


def run(name: str, *arguments: object, cwd: Path) -> str:
    """What the example prints."""
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def imported(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested() -> None:
    there = {path.stem for path in EXAMPLES.glob("*.py")}
    assert there == {"plain", "aws_lambda", *NEEDS}


def test_plain(tmp_path: Path) -> None:
    lines = run("plain", cwd=tmp_path).splitlines()
    assert lines[0].startswith("positive 0.99")
    assert len(lines) == 2


def test_aws_lambda() -> None:
    handler = imported("aws_lambda").handler
    answer = handler({"body": json.dumps({"text": TEXT})}, None)
    want = minilpt.load().predict(TEXT)[0]
    assert (answer["statusCode"], json.loads(answer["body"])) == (200, {"label": want.label, "score": want.score})
    for body in ("{", "{}", '{"text": 3}', "[]", None):
        assert handler({"body": body}, None)["statusCode"] == 400


def test_pandas_column(tmp_path: Path) -> None:
    needs("pandas_column")
    head, first, second = (line.split() for line in run("pandas_column", cwd=tmp_path).splitlines())
    assert head == ["text", "stars", "sentiment", "confidence"]
    assert (first[-2], second[-2]) == ("positive", "negative")


def test_fastapi_app() -> None:
    needs("fastapi_app")
    import httpx

    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(app=imported("fastapi_app").app)
        async with httpx.AsyncClient(transport=transport, base_url="http://example") as client:
            return await client.get("/classify", params={"text": TEXT})

    answer = asyncio.run(asked())
    assert answer.json() == minilpt.load().predict(TEXT)[0].scores


def test_ray_job(tmp_path: Path) -> None:
    needs("ray_job")
    import pyarrow.dataset

    rows = [{"id": row, "text": TEXT if row % 2 else "dull from start to finish"} for row in range(40)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("ray_job", tmp_path / "in.jsonl", tmp_path / "out", cwd=tmp_path)
    found = pyarrow.dataset.dataset(tmp_path / "out").to_table().to_pylist()
    found.sort(key=lambda row: row["id"])
    assert [row["id"] for row in found] == list(range(40))
    assert [row["predicted"] for row in found] == ["negative", "positive"] * 20
