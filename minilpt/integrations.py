"""One callable for the engines that run a function over batches of a table: Ray Data, Spark, Dask.

It holds what `load` needs and nothing else, so that it travels as a small pickle; each process loads the model when its
first batch comes, once.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .api import Classifier, Prediction, load
from .errors import InputError
from .threads import usable_cores

# Output -> its type. The last two hold a number for each label, in the order of the model's `classes_`.
OUTPUTS: Mapping[str, type] = {
    "label": np.str_,
    "score": np.float32,
    "n_tokens": np.int64,
    "n_truncated": np.int64,
    "executed_flops": np.int64,
    "dense_flops": np.int64,
    "scores": np.float32,
    "logits": np.float32,
}
BY_LABEL = ("scores", "logits")

_MODELS: dict[bytes, Classifier] = {}
_LOADING = threading.Lock()


class BatchPredictor:
    """Adds columns with a model's answers to a batch, and returns it as the kind of table that it was."""

    def __init__(
        self,
        model: str | Path | None = None,
        text_column: str = "text",
        pair_column: str | None = None,
        outputs: Sequence[str] | Mapping[str, str] = ("label", "score"),
        **load_kwargs: Any,
    ):
        """model, load_kwargs: as `load` takes them. outputs: of OUTPUTS; a mapping gives their columns other names.

        threads: if not given, what Ray or Spark allot to the task, else OMP_NUM_THREADS, else one for each usable core.
        Raises InputError for an output that there is not.
        """
        self.model, self.load_kwargs = model, load_kwargs
        self.text_column, self.pair_column = text_column, pair_column
        self.outputs = dict(outputs) if isinstance(outputs, Mapping) else {name: name for name in outputs}
        unknown = [name for name in self.outputs if name not in OUTPUTS]
        if unknown or not self.outputs:
            raise InputError(f"outputs must be some of {', '.join(OUTPUTS)}; found {', '.join(unknown) or 'none'}")

    def __call__(self, batch: Any) -> Any:
        """batch: a dict of arrays, a pandas DataFrame, or a pyarrow Table or RecordBatch; it is not changed.

        Raises InputError if a column is missing, is not text, or has an output's name already.
        """
        names = list(batch.column_names if hasattr(batch, "column_names") else batch)
        wanted = [self.text_column] + ([self.pair_column] if self.pair_column is not None else [])
        missing = [name for name in wanted if name not in names]
        if missing:
            raise InputError(f"the batch has no column {missing[0]!r}; it has {', '.join(map(str, names))}")
        taken = [column for column in self.outputs.values() if column in names]
        if taken:
            raise InputError(
                f"the batch has a column {taken[0]!r} already: give another name, as outputs={{'label': 'predicted'}}"
            )
        added = self.columns(*(batch[name] for name in wanted))
        if isinstance(batch, Mapping):
            return {**batch, **added}
        by_label = {self.outputs[name] for name in BY_LABEL if name in self.outputs}
        if hasattr(batch, "assign"):  # pandas has no columns of two dimensions
            return batch.assign(**{name: list(array) if name in by_label else array for name, array in added.items()})
        import pyarrow

        for name, array in added.items():
            kind = pyarrow.list_(pyarrow.float32()) if name in by_label else None
            batch = batch.append_column(name, pyarrow.array(list(array) if kind else array, kind))
        return batch

    def columns(self, texts: Iterable[Any], pairs: Iterable[Any] | None = None) -> dict[str, NDArray[Any]]:
        """The added columns alone, (n,) or, for BY_LABEL, (n, labels). texts, pairs: arrays or columns of strings.

        No rows need no model: where an engine asks for the shape of a result with an empty table, none is loaded.
        """
        first = _plain(texts)
        items = first if pairs is None else list(zip(first, _plain(pairs), strict=True))
        found = _model(self.model, self.load_kwargs).predict(items) if items else []
        return {column: _column(name, found) for name, column in self.outputs.items()}

    def batch_function(self) -> Callable[..., dict[str, NDArray[Any]]]:
        """`columns` with as many parameters as there are columns to read: Spark's `predict_batch_udf` counts them.

        It is given this method itself, which it calls once in each process.
        """
        if self.pair_column is None:
            return lambda texts: self.columns(texts)
        return lambda texts, pairs: self.columns(texts, pairs)


def _plain(values: Any) -> list[Any]:
    """Python objects of an array or a column of any kind."""
    return values.to_pylist() if hasattr(values, "to_pylist") else np.asarray(values, object).tolist()


def _column(name: str, found: Sequence[Prediction]) -> NDArray[Any]:
    values = [getattr(prediction, name) for prediction in found]
    if name == "scores":
        values = [list(scores.values()) for scores in values]
    if name in BY_LABEL and not values:
        return np.zeros((0, 0), OUTPUTS[name])
    return np.array(values, OUTPUTS[name])


def _model(name_or_path: str | Path | None, load_kwargs: Mapping[str, Any]) -> Classifier:
    """This process's model for these arguments, loaded once whatever the number of tasks."""
    arguments = {"threads": allotted_threads(), **load_kwargs}
    key = pickle.dumps((name_or_path, sorted(arguments.items())))
    with _LOADING:
        if key not in _MODELS:
            _MODELS[key] = load(name_or_path, **arguments)
        return _MODELS[key]


def allotted_threads() -> int:
    """Cores that the engine gives to this task: Ray's, Spark's, or OMP_NUM_THREADS; never more than are usable."""
    stated = _ray_cores() or _spark_cores() or os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    cores = usable_cores()
    return min(cores, int(stated)) if stated and str(stated).isdecimal() and int(stated) else cores


def _ray_cores() -> int | None:
    """Whole cores of this Ray task or actor, None outside of one."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized() or ray.get_runtime_context().worker.mode != ray.WORKER_MODE:
        return None
    return max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))


def _spark_cores() -> int | None:
    """`spark.task.cpus` of this task, None outside of one."""
    pyspark = sys.modules.get("pyspark")
    context = pyspark.TaskContext.get() if pyspark is not None else None
    return None if context is None else context.cpus()
