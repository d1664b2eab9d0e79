"""The command line: data on stdout and nothing else, everything else on stderr, exit codes 0, 1 and 2."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minilpt
from minilpt import calibration, cli
from minilpt.weights import resolve

import checkpoints

PRUNING = {"rule": "threshold", "thresholds": [0.0, 0.17, 0.2], "score_denominator": "initial"}
ROWS = [("good film", "bad"), ("", "the film !"), ('"quoted, not"', "a\tb"), ("naïve 中文", "x")]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pruned sentiment model; to be read only."""
    made = tmp_path_factory.mktemp("cli") / "model"
    checkpoints.write_vocabulary(
        checkpoints.write(made, checkpoints.config(id2label={"0": "negative", "1": "positive"}))
    )
    (made / "ltp.json").write_text(json.dumps(PRUNING))
    return made


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """main() in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="ascii"))
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:  # how argparse leaves
            code = int(str(stop.code))
        out, err = capsys.readouterr()
        return code, out, err

    return run


def process(*arguments: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """`python -m minilpt` in a process of its own, warnings shown as a user sees them."""
    command = [sys.executable, "-m", "minilpt", *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, env=os.environ | environment, timeout=60)


def answers(model: minilpt.Classifier, texts: list[Any]) -> list[dict[str, Any]]:
    """What `predict` prints for these texts."""
    return [json.loads(json.dumps(prediction.to_dict())) for prediction in model.predict(texts)]


def parsed(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


# predict.


def test_texts_give_one_json_object_a_line(run: Run, folder: Path) -> None:
    texts = ["good film", "", "--not bad", "a\nb"]
    code, out, err = run("predict", "--model", folder, "--", *texts)
    assert (code, err) == (0, "")
    assert parsed(out) == answers(minilpt.load(folder), texts)


CONTENTS = {
    "rows.txt": "".join(f"{a}\n" for a, _ in ROWS),
    "rows.jsonl": "".join(json.dumps({"text": a, "b": b}, ensure_ascii=False) + "\n" for a, b in ROWS),
    "rows.csv": "b,text\n" + "".join(f'"{b}","{a}"\n'.replace('""quoted, not""', '"""quoted, not"""') for a, b in ROWS),
    "rows.tsv": "text\tn\n" + "".join(f"{a}\t1\n" for a, _ in ROWS),
}


@pytest.mark.parametrize("source", ["file", "stdin"])
@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "BOM"])
def test_a_file_or_standard_input_in_every_format(
    run: Run, folder: Path, tmp_path: Path, name: str, source: str, mark: str
) -> None:
    content = (mark + CONTENTS[name]).encode()
    path = tmp_path / name
    path.write_bytes(content)
    kind = {"txt": "lines"}.get(name[5:], name[5:])
    options = ("--input", path) if source == "file" else ("--input", "-", "--input-format", kind)
    code, out, err = run("predict", "--model", folder, *options, stdin=content)
    assert (code, err) == (0, "")
    assert parsed(out) == answers(minilpt.load(folder), [a for a, _ in ROWS])


def test_columns_make_pairs(run: Run, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(CONTENTS["rows.csv"], encoding="utf-8")
    columns = ("--text-column", "b", "--pair-column", "text")
    code, out, _ = run("predict", "--model", folder, "--input", path, *columns)
    assert code == 0
    assert parsed(out) == answers(minilpt.load(folder), [(b, a) for a, b in ROWS])


def test_a_column_text_pair_makes_pairs_unasked(run: Run, folder: Path, tmp_path: Path) -> None:
    """As the dict of the Python API does."""
    record = {"text": "good film", "text_pair": "bad"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(record))
    code, out, _ = run("predict", "--model", folder, "--input", tmp_path / "rows.jsonl")
    assert code == 0
    assert parsed(out) == answers(minilpt.load(folder), [record])


def test_a_text_pair_of_null_is_no_pair(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "good film", "text_pair": null}')
    code, out, _ = run("predict", "--model", folder, "--input", tmp_path / "rows.jsonl")
    assert code == 0
    assert parsed(out) == answers(minilpt.load(folder), ["good film"])


def test_the_format_of_standard_input_is_lines_unless_said(run: Run, folder: Path) -> None:
    code, out, _ = run("predict", "--model", folder, "--input", "-", stdin=b"text,label\ngood,1\n")
    assert (code, len(parsed(out))) == (0, 2)


def test_an_empty_file_gives_no_output(run: Run, folder: Path) -> None:
    for options in ([], ["--input-format", "csv"], ["--format", "table"]):
        assert run("predict", "--model", folder, "--input", "-", *options) == (0, "", "")


def test_the_table_has_one_header_and_one_line_a_text(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.answers, "CHUNK", 2)
    texts = ["good film", "two\nlines", "", "not bad", "a"]
    code, out, err = run("predict", "--model", folder, "--format", "table", *texts)
    head, *rows = out.splitlines()
    assert (code, err) == (0, "")
    assert head.split() == "label score tokens kept per layer FLOPs text".split()
    for prediction, text, row in zip(minilpt.load(folder).predict(texts), texts, rows, strict=True):
        label, score, tokens, *rest = row.split()
        assert (label, score, int(tokens)) == (prediction.label, f"{prediction.score:.3f}", prediction.n_tokens)
        assert tuple(int(count) for count in rest[:3]) == prediction.kept_tokens
        assert rest[3] == f"{prediction.executed_flops / prediction.dense_flops:.0%}"
        assert rest[4:] == text.split()


def test_a_pair_stands_in_the_table_with_a_bar_between(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "good", "b": "bad"}')
    _, out, _ = run(
        "predict", "--model", folder, "--format", "table", "--input", tmp_path / "rows.jsonl", "--pair-column", "b"
    )
    assert out.endswith("  good | bad\n")


def test_a_large_file_runs_in_chunks_and_gives_the_same(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = b"".join(b"film " * (n % 7) + b"\n" for n in range(23))
    options = ("predict", "--model", folder, "--input", "-", "--batch-tokens", "1")
    whole = run(*options, stdin=lines)
    monkeypatch.setattr(cli.answers, "CHUNK", 4)
    assert run(*options, stdin=lines) == whole
    assert len(parsed(whole[1])) == 23


def test_answers_before_a_broken_row_are_printed(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.answers, "CHUNK", 1)
    stdin = b'{"text": "good"}\n{"text": "bad"}\n{"text": 3}\n'
    code, out, err = run("predict", "--model", folder, "--input", "-", "--input-format", "jsonl", stdin=stdin)
    assert code == 1
    assert parsed(out) == [answers(minilpt.load(folder), [text])[0] for text in ("good", "bad")]
    assert err == "minilpt: error: standard input, line 3: column 'text' must hold text, found 3\n"


def test_the_progress_bar_is_on_stderr_where_wanted(run: Run, folder: Path) -> None:
    code, out, err = run("predict", "--model", folder, "--progress", "good", "bad")
    assert code == 0
    assert len(parsed(out)) == 2
    assert "2text" in err
    assert run("predict", "--model", folder, "--no-progress", "good")[2] == ""
    assert run("predict", "--model", folder, "--input", "-", stdin=b"good")[2] == ""  # stderr is no terminal here


def test_pruning_is_the_folder_s_off_or_a_file_s(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(PRUNING | {"thresholds": [1, 1, 1]}))
    kept = {
        given: parsed(run("predict", "--model", folder, "--pruning", given, "not a bad film")[1])[0]["kept_tokens"]
        for given in ("auto", "off", str(tmp_path / "mine.json"))
    }
    assert kept["off"] == [6, 6, 1]
    assert kept[str(tmp_path / "mine.json")] == [1, 1, 1]
    assert kept["auto"][0] == 6 > kept["auto"][1]


@pytest.mark.parametrize("form", ["jsonl", "table"])
def test_output_is_utf_8_whatever_the_locale_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    content = checkpoints.config(id2label={"0": "schön \ud800", "1": "schön \ud801"})
    folder = checkpoints.write_vocabulary(checkpoints.write(tmp_path, content))
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert cli.main(["predict", "--model", str(folder), "--format", form, "中文"]) == 0
    out = written.getvalue().decode("utf-8")
    assert "schön \\ud80" in out
    assert ("中文" in out) == (form == "table")


LONG = ["film " * 90, "good", "bad " * 50]


def test_long_texts_are_cut_as_asked_and_a_line_on_stderr_says_so(run: Run, folder: Path) -> None:
    model = minilpt.load(folder)
    for options in ({}, {"truncation": "tail"}, {"truncation": "windows", "stride": 0, "aggregate": "max"}):
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        code, out, err = run("predict", "--model", folder, *arguments, *LONG)
        assert code == 0
        assert parsed(out) == [json.loads(json.dumps(each.to_dict())) for each in model.predict(LONG, **options)]
        windows = options.get("truncation") == "windows"
        assert err == ("" if windows else "minilpt: texts cut: 2, by 64 tokens; see --truncation\n")


def test_a_text_that_is_too_long_is_counted_from_the_rows_answered_before(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.answers, "CHUNK", 2)
    (tmp_path / "rows.txt").write_text("\n".join(["good", "bad", "good", LONG[0]]))
    code, out, err = run("predict", "--model", folder, "--truncation", "error", "--input", tmp_path / "rows.txt")
    assert (code, len(parsed(out))) == (1, 2)
    assert err.startswith("minilpt: error: after 2 texts: text 1 ('film film")
    assert err.endswith("has 90 tokens, 38 is the most; shorten it, or give another truncation=\n")


# embed.


@pytest.mark.parametrize("options", [{}, {"pooling": "cls", "normalize": False, "truncation": "tail"}], ids=str)
def test_embeddings_are_json_lines_or_a_file(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(cli.answers, "CHUNK", 2)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in LONG))
    wanted = minilpt.load(folder).embed(LONG, **options)
    arguments = ["--pooling", "cls", "--no-normalize", "--truncation", "tail"] if options else []
    command = ("embed", "--model", folder, "--input", tmp_path / "rows.jsonl", *arguments)
    code, out, err = run(*command)
    assert (code, err) == (0, "")
    assert [row["embedding"] for row in parsed(out)] == wanted.tolist()
    assert run(*command, "--out", tmp_path / "e.jsonl") == (0, "", "")
    assert (tmp_path / "e.jsonl").read_text() == out
    assert run(*command, "--out", tmp_path / "e.npy") == (0, "", "")
    found = np.load(tmp_path / "e.npy")
    assert found.dtype == np.float32
    assert np.array_equal(found, wanted)


def test_no_texts_give_an_array_without_rows(run: Run, folder: Path, tmp_path: Path) -> None:
    assert run("embed", "--model", folder, "--input", "-", "--out", tmp_path / "e.npy") == (0, "", "")
    assert np.load(tmp_path / "e.npy").shape == (0, 32)


@pytest.mark.parametrize("name", ["e.npy", "e.jsonl"])
def test_an_error_leaves_the_file_as_it_was(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(cli.answers, "CHUNK", 2)
    (tmp_path / name).write_text("old")
    code, out, err = run(
        "embed", "--model", folder, "--truncation", "error", "--out", tmp_path / name, *["a"] * 4, *LONG
    )
    assert (code, out) == (1, "")
    assert err.startswith("minilpt: error: after 4 texts: text 0 (")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "old")]


# models, info, eval.


@pytest.fixture
def bundle(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model as the bundled default."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / resolve.DEFAULT).symlink_to(folder)
    monkeypatch.setattr(resolve, "MODELS", tmp_path / "models")


@pytest.fixture
def plain(folder: Path, tmp_path: Path) -> Path:
    """The model without an ltp.json, and a file of texts with labels beside it."""
    made = shutil.copytree(folder, tmp_path / "plain")
    (made / "ltp.json").unlink()
    draw = random.Random(1)
    texts = [" ".join(draw.choices(["good", "bad", "film", "not", "the"], k=draw.randint(3, 20))) for _ in range(140)]
    rows = [{"text": text, "gold": row % 2} for row, text in enumerate(texts)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def test_calibrate_writes_the_folder_s_ltp_json_and_prints_the_frontier(run: Run, plain: Path) -> None:
    texts = plain.parent / "texts.jsonl"
    code, out, err = run("calibrate", plain, texts, "--flops-ratio", 0.6, "--plot", plain.parent / "frontier.png")
    assert (code, err) == (0, f"minilpt: wrote {plain / 'ltp.json'}\n")
    record = json.loads((plain / "ltp.json").read_text())
    head, *rows, note = out.splitlines()
    assert head.split() == ["counted", "executed", "KL", "(nats)", "agreement", "at", "least"]
    assert len(rows) == len(record["frontier"])
    (chosen,) = (row.split() for row in rows if row.startswith("*"))
    assert float(chosen[1]) <= 0.6
    assert "70 texts that the search (on 70 others) did not see" in note
    assert (plain.parent / "frontier.png").is_file()
    model = minilpt.load(plain)
    assert model.pruning is not None
    assert list(model.pruning.settings["thresholds"]) == record["thresholds"]
    lines = run("predict", "--model", plain, "--flops-ratio", 1, "good film")[1].splitlines()
    assert json.loads(lines[0])["kept_tokens"] == [4, 4, 1]
    code, _, err = run("calibrate", plain, texts, "--flops-ratio", 0.6)
    assert code == 2
    assert f"--out FILE is needed: {plain / 'ltp.json'} is there already" in err
    code, _, err = run("calibrate", plain, texts, "--flops-ratio", 0.6, "--out", plain / "none" / "ltp.json")
    assert (code, f"there is no folder {plain / 'none'}" in err) == (2, True)
    code, _, err = run("calibrate", "my-modle", texts, "--flops-ratio", 0.6)
    assert (code, "my-modle" in err) == (1, True)
    labelled = ["--max-drop", 50, "--labels", "gold", "--out", plain.parent / "labelled.json"]
    code, out, _ = run("calibrate", plain, texts, *labelled)
    assert code == 0
    assert out.split("\n", 1)[0].endswith("metric")


def test_quantize_makes_a_folder_whose_integers_a_golden_file_holds(run: Run, plain: Path) -> None:
    texts, target = plain.parent / "texts.jsonl", plain.parent / "integer"
    code, out, err = run("quantize", plain, texts, "--out", target, "--no-by-channel")
    assert (code, err) == (0, f"minilpt: wrote {target}\n")
    record = json.loads(out)
    assert set(record) == {"rms_of_logits", "held_out", "methods", "precisions"}
    assert "channels" not in record["methods"]
    assert run("quantize", plain, texts, "--out", target)[0] == 1
    (line,) = run("predict", "--model", target, "--precision", "ibert", "good film")[1].splitlines()
    assert json.loads(line)["label"] in ("negative", "positive")
    golden = plain.parent / "golden.safetensors"
    assert run("export-golden", target, "good film", "bad", "--out", golden)[::2] == (0, f"minilpt: wrote {golden}\n")
    assert golden.is_file()
    code, _, err = run("export-golden", plain, "good film", "--out", golden)
    assert (code, "minilpt quantize" in err) == (1, True)


def test_an_interrupted_calibration_is_written_and_exit_code_130(
    run: Run, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, left = calibration._Half.measure, iter(range(40))

    def stopping(self: Any, thresholds: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return measure(self, thresholds)

    monkeypatch.setattr(calibration._Half, "measure", stopping)
    with pytest.warns(minilpt.MinilptWarning, match="interrupted"):
        code, _, _ = run("calibrate", plain, plain.parent / "texts.jsonl", "--flops-ratio", 0.5)
    assert code == 130
    assert json.loads((plain / "ltp.json").read_text())["frontier"][-1]["flops_ratio"] > 0.5


def test_explain_writes_text_json_or_a_page(run: Run, folder: Path, tmp_path: Path) -> None:
    want = minilpt.load(folder).explain(("good film", "bad"))
    code, out, _ = run("explain", "good film", "bad", "--model", folder)
    assert (code, out) == (0, want.to_ansi() + "\n")
    code, out, _ = run("explain", "good film", "bad", "--model", folder, "--format", "json")
    assert json.loads(out)["label"] == want.label
    code, out, err = run("explain", "good film", "bad", "--model", folder, "--html", tmp_path / "page.html")
    assert (code, out, err) == (0, "", f"minilpt: wrote {tmp_path / 'page.html'}\n")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == want.to_html()


@pytest.mark.usefixtures("bundle")
def test_models_lists_the_bundled_names_and_the_first_is_the_default(run: Run) -> None:
    code, out, err = run("models")
    assert (code, out.splitlines()[0].split()) == (0, [resolve.DEFAULT, "bundled"])
    assert err.startswith("minilpt: a curated name is")
    assert run("predict", "good") == run("predict", "--model", resolve.DEFAULT, "good")
    assert run("predict", "good")[0] == 0


@pytest.mark.usefixtures("bundle")
@pytest.mark.parametrize("pruning, wanted", [("auto", PRUNING | {"schema_version": 1}), ("off", None)])
def test_info_is_one_json_object_with_the_model_s_facts(run: Run, folder: Path, pruning: str, wanted: Any) -> None:
    code, out, err = run("info", "--model", folder, "--pruning", pruning)
    facts = json.loads(out)
    assert (code, err) == (0, "")
    assert facts["minilpt"] == minilpt.__version__
    assert facts["bundled"] == [resolve.DEFAULT]
    assert facts["backend"]["device"] == "cpu"
    assert "CuPy" in facts["backend"]["unavailable"]["cuda"]
    assert facts["machine"]["cores"] >= 1
    model = facts["model"]
    assert (model["layers"], model["max_tokens"], model["labels"]) == (3, 40, ["negative", "positive"])
    assert model["pruning"] == wanted


SENTENCES = ["good film", "bad", "not good", "the film films", "a bad film !", "good , not bad"] * 2


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    """A little dev set as GLUE writes it."""
    path = tmp_path / "dev.tsv"
    path.write_text("sentence\tlabel\n" + "".join(f"{text}\t{n % 2}\n" for n, text in enumerate(SENTENCES)))
    return path


def test_eval_reports_metrics_flops_and_time_dense_beside_pruned(run: Run, folder: Path, dev: Path) -> None:
    out_path = dev.parent / "record.json"
    options = ("--data", dev, "--model", folder, "--repeats", "2")
    code, out, err = run("eval", "sst-2", *options, "--format", "json", "--out", out_path)
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert json.loads(out_path.read_text()) == record
    assert (record["task"], record["data"], record["texts"]) == ("sst-2", "dev.tsv", len(SENTENCES))
    model = minilpt.load(folder)
    for name, variant in (("dense", model.with_pruning(None)), ("pruned", model)):
        row = record["variants"][name]
        right = [variant.classes_[n % 2] == p.label for n, p in enumerate(variant.predict(SENTENCES))]
        assert row["accuracy"] == pytest.approx(100 * sum(right) / len(right))
        traced = variant.forward(*variant.encode(SENTENCES), trace=True)
        assert traced.counted_flops is not None and traced.ffn_lengths is not None
        assert row["gflops_counted"] == pytest.approx(traced.counted_flops.mean() / 1e9)
        assert row["kept_tokens"] == pytest.approx(traced.ffn_lengths.mean(axis=1).tolist())
        assert row["seconds"] > 0
    assert record["variants"]["dense"]["relative_flops_counted"] == 1
    assert record["variants"]["pruned"]["relative_flops_counted"] < 1
    assert record["speedup"]["min"] <= record["speedup"]["median"] <= record["speedup"]["max"]


def test_eval_prints_a_table_and_a_dense_model_has_one_row(run: Run, folder: Path, dev: Path) -> None:
    options = ("--data", dev, "--model", folder, "--repeats", "1")
    code, out, err = run("eval", "sst-2", *options)
    assert (code, err) == (0, "")
    head, *rows = out.splitlines()
    assert "accuracy" in head
    assert [row.split()[0] for row in rows] == ["dense", "pruned", "time", str(len(SENTENCES))]
    code, out, _ = run("eval", "sst-2", *options, "--pruning", "off", "--format", "json")
    assert list(json.loads(out)["variants"]) == ["dense"]
    assert "speedup" not in json.loads(out)


# What goes wrong.

ERRORS: dict[str, tuple[list[str], str]] = {
    "no such model": (
        ["predict", "--model", "nowhere", "good"],
        "'nowhere' is neither a folder nor a bundled model",
    ),
    "no such file": (["predict", "--model", "MODEL", "--input", "nowhere.csv"], "nowhere.csv: cannot be read"),
    "a folder": (["predict", "--model", "MODEL", "--input", "."], ".: cannot be read"),
    "no column": (["predict", "--model", "MODEL", "--input", "DEV", "--text-column", "x"], "line 2: no column 'x'"),
    "no ltp.json": (["predict", "--model", "MODEL", "--pruning", "x.json", "good"], "x.json: no such file"),
    "surrogate": (["predict", "--model", "MODEL", "good", "\udcff"], "text 1 is not valid Unicode"),
    "wrong task": (["eval", "mnli", "--data", "DEV", "--model", "MODEL"], "line 2: no column 'premise'"),
    "no data": (["eval", "sst-2", "--data", "nowhere.tsv", "--model", "MODEL"], "nowhere.tsv: cannot be read"),
    "out nowhere": (
        ["eval", "sst-2", "--data", "DEV", "--model", "MODEL", "--repeats", "1", "--out", "no/where.json"],
        "where.json: cannot be written",
    ),
    "stride": (
        ["predict", "--model", "MODEL", "--truncation", "windows", "--stride", "38", "good"],
        "stride 38 is not less than the 38 tokens of a window",
    ),
    "info": (["info", "--model", "nowhere"], "'nowhere' is neither"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_one_line_on_stderr_and_exit_code_1(
    run: Run, folder: Path, dev: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(dev.parent)
    arguments, said = ERRORS[case]
    stand_ins = {"MODEL": str(folder), "DEV": str(dev)}
    code, out, err = run(*(stand_ins.get(argument, argument) for argument in arguments))
    assert (code, out) == (1, "")
    assert err.startswith("minilpt: error: ")
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["classify"],
        ["predict"],
        ["predict", "good", "--input", "-"],
        ["predict", "good", "--format", "xml"],
        ["predict", "--input", "-", "--input-format", "parquet"],
        ["predict", "good", "--threads", "0"],
        ["predict", "good", "--batch-tokens", "many"],
        ["predict", "good", "--unknown"],
        ["predict", "good", "--truncation", "middle"],
        ["predict", "good", "--truncation", "windows", "--stride", "-1"],
        ["predict", "good", "--truncation", "windows", "--aggregate", "median"],
        ["predict", "good", "--stride", "5"],
        ["predict", "good", "--truncation", "tail", "--aggregate", "max"],
        ["embed"],
        ["embed", "good", "--pooling", "max"],
        ["embed", "good", "--out", "e.bin"],
        ["embed", "good", "--out", "no/where.npy"],
        ["eval", "sst-2"],
        ["eval", "squad", "--data", "x"],
        ["models", "extra"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(run: Run, arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "usage: minilpt" in err
    assert "error:" in err


def test_help_and_version_are_data(run: Run) -> None:
    assert run("--version") == (0, f"minilpt {minilpt.__version__}\n", "")
    commands = "predict", "explain", "calibrate", "quantize", "export-golden", "eval", "models", "info", "warmup"
    for command in commands:
        code, out, err = run(command, "--help")
        assert (code, err) == (0, "")
        assert out.startswith(f"usage: minilpt {command}")


def test_an_interrupt_is_exit_code_130_without_a_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.options, "load", interrupted)
    assert run("predict", "good")[:2] == (130, "")


# In a process of its own.


def test_the_module_runs_as_a_command(folder: Path, tmp_path: Path) -> None:
    done = process("predict", "--model", folder, "--threads", "1", "good film", "naïve")
    assert (done.returncode, done.stderr) == (0, b"")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [prediction["n_tokens"] for prediction in found] == [4, 3]
    done = process("predict", "--model", tmp_path, "good")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"config.json: no such file" in done.stderr
    assert b"Traceback" not in done.stderr


def test_warnings_go_to_stderr(tmp_path: Path) -> None:
    folder = checkpoints.write_vocabulary(checkpoints.write(tmp_path, checkpoints.config("ltp")))
    done = process("predict", "--model", folder, "good")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1
    assert b"MinilptWarning" in done.stderr


def test_a_reader_that_leaves_early_is_no_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "many.txt").write_text("good film\n" * 1100)
    command = [sys.executable, "-m", "minilpt", "predict", "--model", folder, "--input", tmp_path / "many.txt"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None and running.stderr is not None
        assert json.loads(running.stdout.readline())["n_tokens"] == 4
        running.stdout.close()
        assert running.stderr.read() == b""
        assert running.wait(timeout=60) == 0
