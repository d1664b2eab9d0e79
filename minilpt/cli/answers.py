"""Commands that answer texts: predict, embed, explain, serve."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .. import records
from ..api import Prediction
from ..batches import progress_bar
from ..embeddings import POOLINGS
from ..errors import DependencyError, InputError
from ..files import whole, write_whole
from ..serving.options import ServeOptions, add_flags
from ..text import TextOrPair
from ..weights.resolve import DEFAULT
from .options import (
    add_engine_options,
    add_hub_options,
    add_model_options,
    add_text_options,
    load_model,
)
from .rows import rows_of

# Texts read, classified and printed at a time, so that a file of any length runs in bounded memory.
CHUNK = 1024
Answer = TypeVar("Answer")


def add(commands: Any) -> None:
    """Their parsers."""
    _add_predict(commands)
    _add_embed(commands)
    _add_explain(commands)
    _add_serve(commands)


def _add_predict(commands: Any) -> None:
    predict = commands.add_parser("predict", help="classify texts")
    add_text_options(predict)
    predict.add_argument("--flops-ratio", type=float, metavar="R", help="prune to this share of the dense FLOPs")
    predict.add_argument("--format", choices=("jsonl", "table"), default="jsonl", help="of the output")
    add_model_options(predict)
    predict.set_defaults(run=_predict, usage_error=predict.error)


def _add_embed(commands: Any) -> None:
    embed = commands.add_parser("embed", help="turn texts into vectors")
    add_text_options(embed)
    embed.add_argument("--pooling", choices=POOLINGS, help="default: what the model's folder says, else mean")
    embed.add_argument(
        "--normalize", action=argparse.BooleanOptionalAction, default=None, help="to length 1; default: as --pooling"
    )
    embed.add_argument("--out", metavar="FILE", help="a .npy or .jsonl file; default: JSON lines on standard output")
    add_model_options(embed)
    embed.set_defaults(run=_embed, usage_error=embed.error)


def _add_explain(commands: Any) -> None:
    explain = commands.add_parser("explain", help="show at which layer each token of a text was removed")
    explain.add_argument("text", metavar="TEXT")
    explain.add_argument("pair", nargs="?", metavar="TEXT", help="the second text of a pair")
    explain.add_argument("--html", metavar="FILE", help="write a page for a browser instead of coloured text")
    explain.add_argument("--format", choices=("ansi", "json"), default="ansi", help="of the output")
    explain.add_argument("--flops-ratio", type=float, metavar="R", help="prune to this share of the dense FLOPs")
    add_model_options(explain)
    explain.set_defaults(run=_explain)


def _add_serve(commands: Any) -> None:
    server = commands.add_parser("serve", help="serve a model over HTTP, as text-embeddings-inference does")
    server.add_argument("model", nargs="?", default=os.environ.get("MODEL_ID"), metavar="MODEL", help="($MODEL_ID)")
    add_hub_options(server)
    server.add_argument("--pruning", default="auto", metavar="auto|off|FILE", help="default: what the model holds")
    server.add_argument("--flops-ratio", type=float, metavar="R", help="prune to this share of the dense FLOPs")
    add_engine_options(server)
    add_flags(server)
    server.set_defaults(run=_serve)


def _predict(options: argparse.Namespace) -> None:
    _check_texts(options)
    model = load_model(options)
    write = _write_table if options.format == "table" else _write_jsonl
    header, cut = True, Counter[str]()
    for texts, predictions in _in_chunks(options, partial(model.predict, **_text_settings(options))):
        write(texts, predictions, header)
        sys.stdout.flush()
        lost = [prediction.n_truncated for prediction in predictions if prediction.n_truncated]
        header, cut = False, cut + Counter(texts=len(lost), tokens=sum(lost))
    if cut:
        print(f"minilpt: texts cut: {cut['texts']}, by {cut['tokens']} tokens; see --truncation", file=sys.stderr)


def _embed(options: argparse.Namespace) -> None:
    _check_texts(options)
    out = Path(options.out) if options.out else None
    if out and (out.suffix not in (".npy", ".jsonl") or not out.parent.is_dir()):
        options.usage_error(f"--out {out}: a .npy or .jsonl file in a folder that is there was expected")
    model = load_model(options)
    embed = partial(model.embed, pooling=options.pooling, normalize=options.normalize, **_text_settings(options))
    chunks = (vectors for _, vectors in _in_chunks(options, embed))
    if out and out.suffix == ".npy":
        vectors = np.concatenate([np.zeros((0, model.config.width), np.float32), *chunks])
        with whole(out) as file:
            np.save(file, vectors)
    elif out:
        with whole(out) as file:
            file.writelines(f"{line}\n".encode() for line in _json_lines(chunks))
    else:
        for line in _json_lines(chunks):
            print(line)


def _json_lines(chunks: Iterator[NDArray[np.float32]]) -> Iterator[str]:
    """One object for each vector, with its float32 values to the last bit."""
    return (json.dumps({"embedding": vector}) for vectors in chunks for vector in vectors.tolist())


def _check_texts(options: argparse.Namespace) -> None:
    if bool(options.texts) == (options.input is not None):
        options.usage_error("give texts or --input FILE, one of the two")
    if options.truncation != "windows" and (options.stride is not None or options.aggregate is not None):
        options.usage_error("--stride and --aggregate are for --truncation windows")


def _text_settings(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("batch_tokens", "truncation", "stride", "aggregate")}


def _in_chunks(
    options: argparse.Namespace, answer: Callable[[list[TextOrPair]], Answer]
) -> Iterator[tuple[list[TextOrPair], Answer]]:
    """The texts, CHUNK at a time, with their answers, and progress shown; an error counts from its chunk on."""
    wanted = options.input is not None and sys.stderr.isatty() if options.progress is None else options.progress
    done = 0
    with _texts(options) as texts, progress_bar(None, wanted) as bar:
        while chunk := list(islice(texts, CHUNK)):
            try:
                found = answer(chunk)
            except InputError as error:
                raise InputError(f"after {done} texts: {error}" if done else str(error)) from None
            yield chunk, found
            bar.update(len(chunk))
            done += len(chunk)


@contextmanager
def _texts(options: argparse.Namespace) -> Iterator[Iterator[TextOrPair]]:
    """The texts to classify, read as they are needed."""
    if options.input is None:
        yield iter(options.texts)
        return
    with rows_of(options) as rows:
        yield (records.text_of(place, row, options.text_column, options.pair_column) for place, row in rows)


def _write_jsonl(texts: Sequence[TextOrPair], predictions: Sequence[Prediction], header: bool) -> None:
    for prediction in predictions:
        print(json.dumps(prediction.to_dict(), ensure_ascii=False))


def _write_table(texts: Sequence[TextOrPair], predictions: Sequence[Prediction], header: bool) -> None:
    width = max([5, *(len(prediction.label) for prediction in predictions)])
    if header:
        print(f"{'label':<{width}}  score  tokens  kept per layer      FLOPs  text")
    for text, prediction in zip(texts, predictions, strict=True):
        kept = " ".join(str(count) for count in prediction.kept_tokens)
        share = prediction.executed_flops / prediction.dense_flops
        shown = text if isinstance(text, str) else " | ".join(text)
        print(
            f"{prediction.label:<{width}}  {prediction.score:.3f}  {prediction.n_tokens:>6}  {kept:<18}  {share:>4.0%}"
            f"  {' '.join(shown.split())}"
        )


def _explain(options: argparse.Namespace) -> None:
    text = options.text if options.pair is None else (options.text, options.pair)
    found = load_model(options).explain(text)
    if options.html:
        write_whole(Path(options.html), found.to_html())
        print(f"minilpt: wrote {options.html}", file=sys.stderr)
    else:
        print(json.dumps(found.to_dict(), ensure_ascii=False) if options.format == "json" else found.to_ansi())


def _serve(options: argparse.Namespace) -> None:
    try:
        from ..serving.server import serve
    except ImportError as error:
        raise DependencyError(f"serving needs {error.name}: pip install 'minilpt[serve]'") from None
    found = ServeOptions.of(options)
    serve(load_model(options), found, options.model or DEFAULT)
