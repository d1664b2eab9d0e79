"""Names of models: a bundled name, a folder, or an error that lists what there is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import minilpt
from minilpt.weights import resolve

import checkpoints


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with two models, one of them the default, and a folder that is no model; another current folder."""
    models = tmp_path / "models"
    for name in (resolve.DEFAULT, "a-second-one"):
        checkpoints.write_vocabulary(checkpoints.write(models / name))
    (models / "__pycache__").mkdir()
    (models / "README").write_text("no model")
    monkeypatch.setattr(resolve, "MODELS", models)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return models


def test_the_bundled_names_are_the_folders_with_a_config(bundle: Path) -> None:
    assert resolve.bundled_names() == ["a-second-one", resolve.DEFAULT]


def test_a_package_without_models_has_no_names(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "MODELS", bundle / "nowhere")
    assert resolve.bundled_names() == []


def test_no_name_is_the_default_and_a_name_its_folder(bundle: Path) -> None:
    assert resolve.resolve(None) == bundle / resolve.DEFAULT
    assert resolve.resolve("a-second-one") == bundle / "a-second-one"
    assert minilpt.load().folder == bundle / resolve.DEFAULT
    assert minilpt.load("a-second-one").predict("good")[0].n_tokens == 3


def test_a_path_is_taken_as_it_is(bundle: Path) -> None:
    other = checkpoints.write(bundle.parent / "other")
    for path in (other, str(other), os.path.relpath(other)):
        assert resolve.resolve(path).samefile(other)
    assert minilpt.load(str(other)).config.layers == 3


def test_a_bundled_name_wins_over_a_folder_of_that_name_and_a_path_object_does_not(bundle: Path) -> None:
    local = checkpoints.write(Path("a-second-one"))
    assert resolve.resolve("a-second-one") == bundle / "a-second-one"
    assert resolve.resolve("./a-second-one") == resolve.resolve(Path("a-second-one")) == local


@pytest.mark.parametrize(
    "name",
    ["no-such-model", "./user/model", "a/user/model", "a--b/model", "a-second-one/", "nul\0", "x" * 5000, "\udcff"],
    ids=["plain", "relative", "deep", "dashes", "slash", "nul", "long", "surrogate"],
)
def test_anything_else_is_an_error_that_lists_the_bundled_names(bundle: Path, name: str) -> None:
    with pytest.raises(minilpt.UnknownModelError) as caught:
        minilpt.load(name)
    assert repr(name) in str(caught.value)
    assert f"bundled: a-second-one, {resolve.DEFAULT}" in str(caught.value)


def test_a_file_is_no_model_folder(bundle: Path) -> None:
    with pytest.raises(minilpt.UnknownModelError):
        minilpt.load(bundle / resolve.DEFAULT / "config.json")


def test_an_empty_folder_is_a_model_that_lacks_its_files(bundle: Path) -> None:
    (bundle.parent / "empty").mkdir()
    with pytest.raises(minilpt.ModelFileError, match=r"config\.json: no such file"):
        minilpt.load(bundle.parent / "empty")
