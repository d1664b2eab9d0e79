"""The bundled model, its card and the README: every number shown comes out of the files that are committed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minilpt
from benchmarks import report
from minilpt import cli, evaluate, tasks
from minilpt.weights.recipes import model_card
from minilpt.weights.resolve import DEFAULT, MODELS, bundled_names

ROOT = Path(__file__).resolve().parents[1]
FOLDER = MODELS / DEFAULT
NLI = "minilm-l6-ltp-nli"
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS: dict[str, Any] = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))


def demo_texts() -> list[str]:
    """The sentences that `make demo` classifies."""
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").split("\ndemo:")[1].split("\n\n")[0]
    return re.findall(r'"(.*?)"', recipe)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_default_is_bundled_with_its_labels() -> None:
    assert DEFAULT in bundled_names()
    model = minilpt.load()
    assert model.classes_.tolist() == ["negative", "positive"]
    assert model.pruning is not None
    assert model.pruning.settings["score_denominator"] == "initial"
    assert 22e6 < (FOLDER / "model.safetensors").stat().st_size < 24e6


def test_a_text_keeps_its_answer_however_long_it_grows() -> None:
    """Without a limit of the score's denominator, from some 60 tokens on only the first one survived layer 1."""
    sentences = [
        "The plot makes no sense and the actors look as bored as I was .",
        "Every joke falls flat , and there are far too many of them .",
        "I kept looking at my watch and hoping that it would end .",
        "What a dull , lifeless and badly made film .",
    ]
    pruned, dense = minilpt.load(), minilpt.load(pruning=None)
    for count in (1, 4, 8, 16, 32):
        text = " ".join(sentences * 8)[: 60 * count]
        ours, theirs = pruned.predict(text)[0], dense.predict(text)[0]
        assert (ours.label, theirs.label) == ("negative", "negative")
        assert ours.score > 0.9
        assert ours.executed_flops < theirs.executed_flops


@pytest.mark.parametrize("name", bundled_names())
def test_the_card_is_made_from_the_results(name: str) -> None:
    assert (MODELS / name / "README.md").read_text(encoding="utf-8") == model_card.card(MODELS / name)


def test_the_model_of_pairs_is_bundled() -> None:
    model = minilpt.load(NLI, local_files_only=True)
    pairs = [
        ("A man is eating.", "Someone eats."),
        ("A man is eating.", "Nobody eats anything."),
        ("A man is eating.", "The man is a famous cook."),
    ]
    found = model.predict(pairs)
    assert [each.label for each in found] == ["entailment", "contradiction", "neutral"]
    assert sum(each.executed_flops for each in found) < sum(
        each.executed_flops for each in model.with_pruning(None).predict(pairs)
    )
    cheaper = model.predict(pairs, flops_ratio=0.55)
    assert sum(each.executed_flops for each in cheaper) < sum(each.executed_flops for each in found)


def test_the_readme_shows_what_the_demo_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["predict", "--format", "table", *demo_texts()]) == 0
    assert capsys.readouterr().out in blocks("text")


def test_the_readme_s_example_prints_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = blocks("python")
    exec(compile(program, "README.md", "exec"), {})
    assert capsys.readouterr().out in blocks("text")


def test_the_readme_s_table_holds_the_results() -> None:
    assert model_card.results_table(RESULTS) in README


def test_the_readme_s_ratios_are_those_of_the_peers_benchmark() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "peers.json").read_text(encoding="utf-8"))
    assert report.summary(results) in README
    assert report.latency_summary(results) in README


def test_the_readme_s_sentence_on_the_forward_pass_is_that_of_the_kernels_benchmark() -> None:
    folder = ROOT / "benchmarks" / "results"
    files = [json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("kernels", "kernels-avx2")]
    assert report.kernel_summary(*files) in " ".join(README.split())


def test_the_readme_s_words_on_long_texts_follow_from_the_results() -> None:
    """A third of the counted FLOPs removed, about half a point fewer right."""
    found = json.loads((FOLDER / "results-imdb.json").read_text(encoding="utf-8"))["variants"]
    assert 0.28 < 1 - found["pruned"]["relative_flops_counted"] < 0.38
    assert 0.4 < found["dense"]["accuracy"] - found["pruned"]["accuracy"] < 0.7


def test_the_stored_integers_have_the_accuracy_of_the_card_exactly(shared: Path) -> None:
    """The same on every machine; within a point of float32, and of 1.5 when pruned."""
    task = tasks.TASKS["sst-2"]
    examples = tasks.read_examples(shared / "data" / "glue" / "SST-2" / "dev.tsv", task)
    found = evaluate.evaluate(minilpt.load(precision="ibert"), examples, task, repeats=1)["variants"]
    expected = json.loads((FOLDER / "results-ibert.json").read_text(encoding="utf-8"))["variants"]
    for name, variant in found.items():
        for key in ("accuracy", "relative_flops_counted", "kept_tokens"):
            assert variant[key] == expected[name][key], (name, key)
    dense = RESULTS["variants"]["dense"]["accuracy"]
    assert dense - found["dense"]["accuracy"] <= 1.0
    assert dense - found["pruned"]["accuracy"] <= 1.5


def test_the_stored_file_has_the_accuracy_and_the_flops_of_its_card(shared: Path) -> None:
    """And at most 1.0 point is lost to pruning, at no less than 1.7 x fewer counted FLOPs."""
    task = tasks.TASKS["sst-2"]
    examples = tasks.read_examples(shared / "data" / "glue" / "SST-2" / "dev.tsv", task)
    found = evaluate.evaluate(minilpt.load(), examples, task, repeats=1)
    for name, expected in RESULTS["variants"].items():
        measured = found["variants"][name]
        assert measured["accuracy"] == expected["accuracy"], name
        # A token whose score lies within rounding of its threshold may fall otherwise under another BLAS.
        assert np.isclose(measured["relative_flops_counted"], expected["relative_flops_counted"], rtol=1e-4), name
        assert np.allclose(measured["kept_tokens"], expected["kept_tokens"], rtol=1e-3), name
    dense, pruned = found["variants"]["dense"], found["variants"]["pruned"]
    assert dense["accuracy"] - pruned["accuracy"] <= 1.0
    assert pruned["relative_flops_counted"] <= 1 / 1.7


def test_the_model_of_pairs_has_the_accuracy_and_the_flops_of_its_card(shared: Path) -> None:
    """On every tenth pair; on all of them at most 1.5 points are lost to pruning, at 1.4 x fewer counted FLOPs."""
    folder, task = MODELS / NLI, tasks.TASKS["mnli"]
    everything = json.loads((folder / "results.json").read_text(encoding="utf-8"))["variants"]
    examples = tasks.read_examples(shared / "data" / "glue" / "MNLI" / "dev_matched.jsonl", task)[::10]
    found = evaluate.evaluate(minilpt.load(NLI), examples, task, repeats=1)["variants"]
    for name, variant in found.items():
        assert abs(variant["accuracy"] - everything[name]["accuracy"]) < 3, name  # two standard errors of 982 pairs
        assert np.isclose(variant["relative_flops_counted"], everything[name]["relative_flops_counted"], rtol=0.02), (
            name
        )
    assert everything["dense"]["accuracy"] - everything["pruned"]["accuracy"] <= 1.5
    assert everything["pruned"]["relative_flops_counted"] <= 1 / 1.4
