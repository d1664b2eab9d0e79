"""Spark on this machine: the same answers from `mapInPandas` and from `predict_batch_udf` as from a plain run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import minilpt

for package in ("pyspark", "pandas", "pyarrow"):
    pytest.importorskip(package, reason="needs PySpark, pandas and pyarrow: pip install 'minilpt[test-engines]'")
if shutil.which("java") is None:
    pytest.skip("Spark needs Java 17 or later: there is no java on the path", allow_module_level=True)

TEXTS = 60
PROGRAM = """
import json
from pyspark.ml.functions import predict_batch_udf
from pyspark.sql import SparkSession
from pyspark.sql.types import StructType
from minilpt.integrations import BatchPredictor

local = {"spark.ui.enabled": "false", "spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}
spark = SparkSession.builder.master("local[2]").config(map=local).getOrCreate()
table = spark.createDataFrame(list(enumerate(json.load(open("texts.json")))), "row long, text string").repartition(3)
predict = BatchPredictor()

mapped = table.mapInPandas(lambda batches: map(predict, batches), "row long, text string, label string, score float")
kinds = StructType().add("label", "string").add("score", "float")
answer = predict_batch_udf(predict.batch_function, return_type=kinds, batch_size=8)
added = table.withColumn("answer", answer("text")).select("row", "answer.label", "answer.score")
print(json.dumps([list(map(list, frame.select("row", "label", "score").collect())) for frame in (mapped, added)]))
spark.stop()
"""


def test_both_ways_to_run_a_model_on_spark_answer_every_row_once(shared: Path, tmp_path: Path) -> None:
    lines = (shared / "data" / "long" / "imdb_dev_2000.jsonl").read_text(encoding="utf-8").split("\n")
    texts = [json.loads(line)["text"] for line in lines[:TEXTS]]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    environment = os.environ | {"PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    want = [[row, p.label, p.score] for row, p in enumerate(minilpt.load(threads=1).predict(texts))]
    for found in json.loads(done.stdout.splitlines()[-1]):
        assert sorted(found) == want
