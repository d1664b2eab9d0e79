"""ltp.json, the `pruning=` argument, and what checkpoints of the original LTP code carry instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import minilpt
from minilpt import pruning
from minilpt.config import LtpSettings
from minilpt.pruning import Ramp, Relative, Threshold, TopK
from minilpt.weights import names

import checkpoints

LAYERS = 3
RECORDS: dict[str, dict[str, Any]] = {
    "threshold": {"rule": "threshold", "thresholds": [0, 0.01, 0.25], "score_denominator": "initial"},
    "ramp": {"rule": "ramp", "final_threshold": 0.3, "score_denominator": 40},
    "limited": {"rule": "ramp", "final_threshold": 0.3, "score_denominator": "live", "denominator_limit": 40},
    "relative": {"rule": "relative", "token_threshold": 0.4},
    "topk": {"rule": "topk", "token_keep_rate": 0.5},
}
STORY = {"method": "by hand", "provenance": {"texts": 192}}
BIG = 10**400


def parsed(record: dict[str, Any]) -> pruning.Pruning:
    return pruning.parse(record, LAYERS, "there/ltp.json")


# The file.


@pytest.mark.parametrize("story", [{}, STORY, {"method": "by hand"}, {"provenance": {"date": "today"}}], ids=str)
@pytest.mark.parametrize("name", RECORDS)
def test_parse_then_to_json_is_the_identity(name: str, story: dict[str, Any]) -> None:
    record = {"schema_version": 1} | RECORDS[name] | story
    found = parsed(record)
    assert found.to_json() == record
    assert parsed(json.loads(json.dumps(found.to_json()))) == found


def test_every_rule_becomes_its_object() -> None:
    assert parsed(RECORDS["threshold"]).rule == Threshold((0, 0.01, 0.25), "initial")
    assert parsed(RECORDS["ramp"]).rule == Ramp((0.0, 0.3 * 1 / 3, 0.3 * 2 / 3), 40)
    assert parsed(RECORDS["limited"]).rule == Ramp((0.0, 0.3 * 1 / 3, 0.3 * 2 / 3), "live", 40)
    assert parsed(RECORDS["relative"]).rule == Relative(0.4)
    assert parsed(RECORDS["topk"]).rule == TopK(0.5, LAYERS)


def test_every_rule_is_explained_in_the_documentation() -> None:
    text = (Path(__file__).parents[1] / "docs" / "ltp-json.md").read_text(encoding="utf-8")
    for rule, keys in pruning.RULE_KEYS.items():
        assert f"**`{rule}`**" in text
        assert all(f"`{key}`" in text for key in keys | pruning.OPTIONAL_KEYS.get(rule, frozenset()))


def without(name: str, key: str) -> dict[str, Any]:
    return {known: value for known, value in RECORDS[name].items() if known != key}


@pytest.mark.parametrize("name, key", [(name, key) for name, keys in pruning.RULE_KEYS.items() for key in sorted(keys)])
def test_a_missing_key_is_named(name: str, key: str) -> None:
    with pytest.raises(minilpt.PruningError, match=f"^there/ltp.json: rule '{name}' needs {key}$"):
        parsed(without(name, key))


@pytest.mark.parametrize(
    "record, said",
    [
        ({}, "rule None is not one of threshold, ramp, relative, topk"),
        ({"rule": "rising_threshold"}, "rule 'rising_threshold' is not one of"),
        ({"rule": ["topk"]}, "rule ['topk'] is not one of"),
        (RECORDS["topk"] | {"schema_version": 2}, "schema_version 2 is not 1"),
        (RECORDS["topk"] | {"schema_version": None}, "schema_version None is not 1"),
        (RECORDS["topk"] | {"schema_version": "1"}, "schema_version '1' is not 1"),
        (RECORDS["topk"] | {"keep_rate": 1, "a": 2}, "rule 'topk' does not know a, keep_rate"),
        (RECORDS["topk"] | {"thresholds": [0, 0, 0]}, "rule 'topk' does not know thresholds"),
        (RECORDS["topk"] | {"provenance": "me"}, "provenance must be an object"),
        (RECORDS["topk"] | {"method": 3}, "method must be a string"),
    ],
    ids=str,
)
def test_a_wrong_record_is_refused(record: dict[str, Any], said: str) -> None:
    with pytest.raises(minilpt.PruningError) as caught:
        parsed(record)
    assert str(caught.value).startswith("there/ltp.json: ")
    assert said in str(caught.value)


NO_NUMBERS = [None, "0.1", True, float("nan"), float("inf"), -float("inf"), BIG, -BIG, 1e39, [0.1]]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: str(value)[:8])
@pytest.mark.parametrize("name, key", [("ramp", "final_threshold"), ("relative", "token_threshold")])
def test_a_value_that_is_no_finite_number_is_refused(name: str, key: str, value: Any) -> None:
    with pytest.raises(minilpt.PruningError, match=f"{key} must be a finite number"):
        parsed(RECORDS[name] | {key: value})
    with pytest.raises(minilpt.PruningError, match=r"thresholds\[1\] must be a finite number"):
        parsed(RECORDS["threshold"] | {"thresholds": [0.1, value, 0.1]})


@pytest.mark.parametrize("name, key", [("relative", "token_threshold"), ("topk", "token_keep_rate")])
def test_a_rate_lies_between_zero_and_one(name: str, key: str) -> None:
    for value in (0, 1, 0.0, 1.0, 0.5):
        assert parsed(RECORDS[name] | {key: value}).settings[key] == value
    for value in (-0.001, 1.001, 2):
        with pytest.raises(minilpt.PruningError, match=f"{key} must lie between 0 and 1, found {value}"):
            parsed(RECORDS[name] | {key: value})


@pytest.mark.parametrize("value", [[0.1, 0.1], [0.1] * 4, [], 0.1, "000", None, {"0": 1, "1": 1, "2": 1}])
def test_thresholds_are_one_number_for_each_layer(value: Any) -> None:
    with pytest.raises(minilpt.PruningError, match="thresholds must be a list of 3 numbers, one per layer"):
        parsed(RECORDS["threshold"] | {"thresholds": value})
    assert parsed(RECORDS["threshold"] | {"thresholds": [0, -1, 2]}).rule == Threshold((0, -1, 2), "initial")


NO_LENGTHS = ["padded", "", 0, -1, 40.0, True, [40], 2**31, 10**30, 10**400]


@pytest.mark.parametrize("value", [*NO_LENGTHS, None], ids=lambda value: repr(value)[:8])
@pytest.mark.parametrize("name", ["threshold", "ramp"])
def test_the_score_denominator_is_named_or_a_positive_integer(name: str, value: Any) -> None:
    with pytest.raises(minilpt.PruningError, match='score_denominator must be "initial", "live" or a positive integer'):
        parsed(RECORDS[name] | {"score_denominator": value})


@pytest.mark.parametrize("value", [*NO_LENGTHS, "initial"], ids=lambda value: repr(value)[:8])
def test_the_denominator_limit_is_a_positive_integer_or_null(value: Any) -> None:
    with pytest.raises(minilpt.PruningError, match=r"denominator_limit must be a positive integer below 2\^31 or null"):
        parsed(RECORDS["limited"] | {"denominator_limit": value})
    assert parsed(RECORDS["limited"] | {"denominator_limit": 2**31 - 1})
    none = parsed(RECORDS["limited"] | {"denominator_limit": None}).rule
    assert none == parsed(without("limited", "denominator_limit")).rule


@pytest.mark.parametrize("content", ["", "[]", "{", '{"rule": NaN}'])
def test_a_file_that_is_no_record_is_an_error_naming_it(tmp_path: Path, content: str) -> None:
    path = tmp_path / "some.json"
    path.write_text(content)
    with pytest.raises(minilpt.MinilptError, match=r"some\.json: "):
        pruning.read_pruning(path, LAYERS)


def test_a_path_is_a_file_or_the_folder_that_holds_ltp_json(tmp_path: Path) -> None:
    (tmp_path / "ltp.json").write_text(json.dumps(RECORDS["topk"]))
    assert pruning.read_pruning(tmp_path, 3) == pruning.read_pruning(tmp_path / "ltp.json", 3)
    with pytest.raises(minilpt.ModelFileError, match=r"other\.json: no such file"):
        pruning.read_pruning(tmp_path / "other.json", 3)


# The argument.


@pytest.mark.parametrize("name", RECORDS)
def test_a_dict_changes_single_keys_and_forgets_the_story(name: str) -> None:
    stored = parsed(RECORDS[name] | STORY)
    changes: dict[str, Any] = {
        "threshold": {"score_denominator": "live"},
        "ramp": {"final_threshold": 0.1},
        "limited": {"denominator_limit": 9},
        "relative": {"token_threshold": 0.2},
        "topk": {"token_keep_rate": 0.9},
    }[name]
    for given_ in (changes, {"rule": RECORDS[name]["rule"]} | changes):
        found = pruning.overridden(stored, given_, LAYERS)
        assert found.to_json() == {"schema_version": 1} | RECORDS[name] | changes
    assert pruning.overridden(stored, changes | {"method": "mine"}, LAYERS).method == "mine"
    assert stored.to_json() == {"schema_version": 1} | RECORDS[name] | STORY


def test_a_dict_that_names_another_rule_replaces_everything() -> None:
    stored = parsed(RECORDS["threshold"])
    assert pruning.overridden(stored, RECORDS["topk"], LAYERS) == parsed(RECORDS["topk"])
    assert pruning.overridden(None, RECORDS["ramp"], LAYERS) == parsed(RECORDS["ramp"])
    with pytest.raises(minilpt.PruningError, match="rule 'ramp' needs final_threshold, score_denominator"):
        pruning.overridden(stored, {"rule": "ramp"}, LAYERS)
    with pytest.raises(minilpt.PruningError, match="does not know token_keep_rate"):
        pruning.overridden(stored, {"token_keep_rate": 0.5}, LAYERS)
    with pytest.raises(minilpt.PruningError, match='"rule" is needed: threshold, ramp, relative, topk'):
        pruning.overridden(None, {"score_denominator": 4}, LAYERS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoints.write(tmp_path / "model")


def test_load_takes_what_the_folder_holds_unless_told_otherwise(folder: Path, tmp_path: Path) -> None:
    assert minilpt.load(folder).pruning is None
    (folder / "ltp.json").write_text(json.dumps(RECORDS["threshold"] | STORY))
    (tmp_path / "mine.json").write_text(json.dumps(RECORDS["relative"]))
    asked: list[tuple[Any, Any]] = [
        ("auto", RECORDS["threshold"] | STORY),
        (None, None),
        (tmp_path / "mine.json", RECORDS["relative"]),
        (str(tmp_path / "mine.json"), RECORDS["relative"]),
        (folder, RECORDS["threshold"] | STORY),
        ({"score_denominator": "live"}, RECORDS["threshold"] | {"score_denominator": "live"}),
        ({}, RECORDS["threshold"]),
        (RECORDS["topk"], RECORDS["topk"]),
    ]
    for given_, wanted in asked:
        for model in (minilpt.load(folder, pruning=given_), minilpt.load(folder).with_pruning(given_)):
            assert model.pruning == (wanted and parsed(wanted)), given_
            assert model._engine.rule == (wanted and parsed(wanted).rule), given_


@pytest.mark.parametrize("wrong", [True, 0.5, ["ltp.json"], b"ltp.json"])
def test_anything_else_is_no_pruning(folder: Path, wrong: Any) -> None:
    with pytest.raises(minilpt.PruningError, match='pruning must be "auto", None, a path or a dict'):
        minilpt.load(folder, pruning=wrong)


def test_an_ltp_json_for_another_depth_is_refused_before_the_weights_are_read(folder: Path) -> None:
    (folder / "ltp.json").write_text(json.dumps(RECORDS["threshold"] | {"thresholds": [0.1] * 12}))
    (folder / "model.safetensors").unlink()
    with pytest.raises(minilpt.PruningError, match=r"ltp\.json: thresholds must be a list of 3 numbers"):
        minilpt.load(folder)


# Checkpoints of the original code.

OFFSETS = [np.float32(0), np.float32(0.003), np.float32(-0.002)]


def ltp_folder(tmp_path: Path, **settings: Any) -> Path:
    folder = checkpoints.write(tmp_path, checkpoints.config("ltp", **settings))
    stored = {names.LTP_OFFSET.format(layer): np.array(offset) for layer, offset in enumerate(OFFSETS)}
    save_file(checkpoints.tensors(folder) | stored, folder / "model.safetensors")
    return folder


def test_thresholds_of_an_ltp_checkpoint_are_offset_plus_ramp(tmp_path: Path) -> None:
    folder = ltp_folder(tmp_path, final_token_threshold=0.06)
    with pytest.warns(minilpt.MinilptWarning, match="taking 128") as caught:
        model = minilpt.load(folder)
    assert len(caught) == 1
    assert Path(caught[0].filename) == Path(__file__)
    assert model.pruning is not None
    wanted = [float(offset + np.float32(0.06 * layer / 3)) for layer, offset in enumerate(OFFSETS)]
    assert model.pruning.settings == {"thresholds": pytest.approx(wanted, rel=1e-7), "score_denominator": 128}
    assert model.pruning.method == "original LTP code"
    said = minilpt.load(folder, pruning={"score_denominator": 40})  # which warns no more
    assert said.pruning is not None
    assert said.pruning.settings == model.pruning.settings | {"score_denominator": 40}


def test_an_ltp_json_beside_an_ltp_checkpoint_wins_and_dense_asks_nothing(tmp_path: Path) -> None:
    folder = ltp_folder(tmp_path)
    assert minilpt.load(folder, pruning=None).pruning is None
    (folder / "ltp.json").write_text(json.dumps(RECORDS["topk"]))
    assert minilpt.load(folder).pruning == parsed(RECORDS["topk"])


@pytest.mark.parametrize(
    "settings, wanted",
    [
        ({"prune_mode": "threshold", "token_threshold": 0.3}, Relative(0.3)),
        ({"prune_mode": "topk", "token_keep_rate": 0.3}, TopK(0.3, LAYERS)),
        ({"prune_mode": "none"}, None),
    ],
    ids=["threshold", "topk", "none"],
)
def test_other_modes_of_ltp_checkpoints_need_no_denominator(tmp_path: Path, settings: Any, wanted: Any) -> None:
    found = minilpt.load(ltp_folder(tmp_path, **settings)).pruning
    assert (found and found.rule) == wanted


def test_a_checkpoint_whose_threshold_is_out_of_range_is_refused() -> None:
    with pytest.raises(minilpt.PruningError, match="token_keep_rate must lie between 0 and 1"):
        pruning.from_ltp_checkpoint(LtpSettings("topk", 1.5), OFFSETS, 128)
    with pytest.raises(minilpt.PruningError, match=r"thresholds\[0\] must be a finite number"):
        pruning.from_ltp_checkpoint(LtpSettings("absolute_threshold", 0), [np.float32("nan")], 128)
