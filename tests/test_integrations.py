"""The callable for batch engines, on every kind of table that they hand over. Ray and Spark have files of their own."""

from __future__ import annotations

import pickle
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import minilpt
from minilpt import integrations
from minilpt.integrations import BatchPredictor, allotted_threads
from minilpt.threads import usable_cores

TEXTS = ["a gorgeous , witty , seductive movie .", "dull from start to finish", "", "just long"]
SECOND = ["one", "two", "", "four"]
INSTALL = "pip install 'minilpt[test-engines]'"


@pytest.fixture(scope="module")
def model() -> minilpt.Classifier:
    return minilpt.load()


def test_a_dict_of_arrays_gets_columns_and_stays_as_it_was(model: minilpt.Classifier) -> None:
    batch = {"text": np.array(TEXTS, object), "id": np.arange(4)}
    answer = BatchPredictor()(batch)
    want = model.predict(TEXTS)
    assert (list(batch), list(answer)) == (["text", "id"], ["text", "id", "label", "score"])
    assert answer["label"].tolist() == [p.label for p in want]
    assert answer["score"].dtype == np.float32
    assert answer["score"].tolist() == [p.score for p in want]
    assert answer["id"] is batch["id"]


def test_every_output_under_a_name_of_its_own(model: minilpt.Classifier) -> None:
    predict = BatchPredictor(outputs={name: f"my_{name}" for name in integrations.OUTPUTS}, threads=1)
    answer = predict({"text": TEXTS, "label": [0, 1, 0, 1]})
    want = model.predict(TEXTS)
    assert answer["label"] == [0, 1, 0, 1]
    for name in integrations.OUTPUTS:
        values: list[Any] = [getattr(p, name) for p in want]
        values = [list(scores.values()) for scores in values] if name == "scores" else values
        assert answer[f"my_{name}"].tolist() == [list(v) if isinstance(v, tuple) else v for v in values], name


def test_pairs(model: minilpt.Classifier) -> None:
    answer = BatchPredictor(text_column="a", pair_column="b", outputs=["score"])({"a": TEXTS, "b": np.array(SECOND)})
    assert answer["score"].tolist() == [p.score for p in model.predict(list(zip(TEXTS, SECOND, strict=True)))]


def test_a_pickle_is_small_and_the_model_is_loaded_where_it_is_used() -> None:
    predict = BatchPredictor(outputs=["label"], precision="int8")
    predict({"text": TEXTS})
    sent = pickle.dumps(predict)
    assert len(sent) < 300
    program = (
        "import pickle, sys\npredict = pickle.loads(sys.stdin.buffer.read())\n"
        "from minilpt import integrations\nassert not integrations._MODELS\n"
        "predict({'text': []}); assert not integrations._MODELS\n"
        f"print(*predict({{'text': {TEXTS!r}}})['label'])\n"
        f"pickle.loads(pickle.dumps(predict))({{'text': {TEXTS!r}}})\nprint(len(integrations._MODELS))"
    )
    done = subprocess.run([sys.executable, "-c", program], input=sent, capture_output=True, check=True)
    assert done.stdout.decode().split() == [*predict({"text": TEXTS})["label"].tolist(), "1"]


@pytest.mark.parametrize("indexed", [False, True])
def test_a_data_frame(model: minilpt.Classifier, indexed: bool) -> None:
    pandas = pytest.importorskip("pandas", reason=f"needs pandas: {INSTALL}")
    frame = pandas.DataFrame({"text": TEXTS}, index=[3, 1, 2, 0] if indexed else None)
    answer = BatchPredictor(outputs=("label", "scores"))(frame)
    assert list(frame) == ["text"]
    assert answer["label"].tolist() == [p.label for p in model.predict(TEXTS)]
    assert answer.index.equals(frame.index)
    assert answer["scores"].iloc[1].tolist() == list(model.predict(TEXTS)[1].scores.values())
    assert list(BatchPredictor()(frame.iloc[:0])) == ["text", "label", "score"]
    with pytest.raises(minilpt.InputError, match="text 1 must be a string"):
        BatchPredictor()(pandas.DataFrame({"text": ["a", None]}))


@pytest.mark.parametrize("kind", ["Table", "RecordBatch"])
def test_an_arrow_table(model: minilpt.Classifier, kind: str) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason=f"needs pyarrow: {INSTALL}")
    table = getattr(pyarrow, kind).from_pydict({"text": TEXTS})
    predict = BatchPredictor(outputs=("label", "score", "scores"))
    answer = predict(table)
    assert type(answer) is type(table)
    want = model.predict(TEXTS)
    assert answer["label"].to_pylist() == [p.label for p in want]
    assert answer["scores"].to_pylist() == [list(p.scores.values()) for p in want]
    assert predict(table.slice(0, 0)).schema == answer.schema


def test_dask_partitions(model: minilpt.Classifier) -> None:
    pandas = pytest.importorskip("pandas", reason=f"needs pandas: {INSTALL}")
    dask = pytest.importorskip("dask.dataframe", reason=f"needs dask[dataframe]: {INSTALL}")
    frame = dask.from_pandas(pandas.DataFrame({"text": TEXTS * 5}), npartitions=4)
    predict = BatchPredictor()
    answer = frame.map_partitions(predict, meta=predict(frame._meta)).compute(scheduler="threads")
    assert answer["label"].tolist() == [p.label for p in model.predict(TEXTS)] * 5


@pytest.mark.parametrize(
    "batch, options, said",
    [
        ({"body": TEXTS}, {}, "no column 'text'; it has body"),
        ({"text": TEXTS, "score": TEXTS}, {}, "has a column 'score' already: give another name"),
        ({"text": TEXTS}, {"pair_column": "b"}, "no column 'b'"),
        ({"text": [1.5]}, {}, "text 0 must be a string"),
        ({}, {"outputs": ["labels"]}, "outputs must be some of label, score, .*; found labels"),
        ({}, {"outputs": []}, "found none"),
    ],
)
def test_what_cannot_be_done_is_said(batch: dict[str, Any], options: dict[str, Any], said: str) -> None:
    with pytest.raises(minilpt.InputError, match=said):
        BatchPredictor(**options)(batch)


def test_threads_are_what_the_engine_allots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert allotted_threads() == usable_cores()
    monkeypatch.setattr(integrations, "usable_cores", lambda: 8)
    for stated, wanted in (("3", 3), ("2,1", 2), ("64", 8), ("0", 8), ("many", 8)):
        monkeypatch.setenv("OMP_NUM_THREADS", stated)
        assert allotted_threads() == wanted
    task = SimpleNamespace(cpus=lambda: 4)
    monkeypatch.setitem(sys.modules, "pyspark", SimpleNamespace(TaskContext=SimpleNamespace(get=lambda: task)))
    assert allotted_threads() == 4
    context = SimpleNamespace(worker=SimpleNamespace(mode=1), get_assigned_resources=lambda: {"CPU": 5.0})
    ray = SimpleNamespace(is_initialized=lambda: True, get_runtime_context=lambda: context, WORKER_MODE=1)
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert allotted_threads() == 5
    context.worker.mode = 0  # the driver, which Ray gives nothing
    assert allotted_threads() == 4
