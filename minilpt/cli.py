"""The command line: `minilpt predict | embed | explain | serve | calibrate | quantize | eval | bundle | doctor | ...`.

Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 an error that minilpt explains, 2 wrong usage
(and 130 when interrupted).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from . import __version__, backends, cuda_device, records
from .api import BATCH_TOKENS, Classifier, Prediction, load, pruning_of
from .batches import progress_bar
from .bundling import RUNGS, bundle, zipped
from .calibration import MOST_TEXTS, Calibration, Point, calibrate
from .config import read_config
from .doctor import examine
from .embeddings import POOLINGS
from .errors import BackendError, DependencyError, InputError, MinilptError
from .evaluate import evaluate, machine
from .files import whole, write_whole
from .golden import export_golden
from .kernels import compiled, isa
from .kernels.cuda import Geometry
from .kernels.cuda.float_kernels import FloatKernels
from .kernels.cuda.integer_kernels import IntegerKernels
from .pruning import FILE_NAME
from .ranges import quantize_model
from .serving.options import ServeOptions, add_flags
from .tasks import TASKS, dev_file, read_examples
from .text import TextOrPair
from .truncation import AGGREGATES, MODES
from .weights import hub
from .weights.resolve import DEFAULT, bundled_names, is_hub_name, resolve

# Texts read, classified and printed at a time, so that a file of any length runs in bounded memory.
CHUNK = 1024
MODEL_HELP = "a bundled name, a folder, or the hub's org/name"
Answer = TypeVar("Answer")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(argv)
    with _log_on_stderr():
        return _run(options)


@contextmanager
def _log_on_stderr() -> Iterator[None]:
    """What the package tells by its logger, as that kernels are being compiled."""
    logger, handler = logging.getLogger("minilpt"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("minilpt: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _run(options: argparse.Namespace) -> int:
    if isinstance(sys.stdout, TextIOWrapper):  # JSON is UTF-8, whatever the locale says
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        code = options.run(options)
        sys.stdout.flush()
    except MinilptError as error:
        print(f"minilpt: error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    return code or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minilpt", description="BERT-family text classifiers without torch.")
    parser.add_argument("--version", action="version", version=f"minilpt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    predict = commands.add_parser("predict", help="classify texts")
    _add_text_options(predict)
    predict.add_argument("--flops-ratio", type=float, metavar="R", help="prune to this share of the dense FLOPs")
    predict.add_argument("--format", choices=("jsonl", "table"), default="jsonl", help="of the output")
    _add_model_options(predict)
    predict.set_defaults(run=_predict, usage_error=predict.error)

    embed = commands.add_parser("embed", help="turn texts into vectors")
    _add_text_options(embed)
    embed.add_argument("--pooling", choices=POOLINGS, help="default: what the model's folder says, else mean")
    embed.add_argument(
        "--normalize", action=argparse.BooleanOptionalAction, default=None, help="to length 1; default: as --pooling"
    )
    embed.add_argument("--out", metavar="FILE", help="a .npy or .jsonl file; default: JSON lines on standard output")
    _add_model_options(embed)
    embed.set_defaults(run=_embed, usage_error=embed.error)

    explain = commands.add_parser("explain", help="show at which layer each token of a text was removed")
    explain.add_argument("text", metavar="TEXT")
    explain.add_argument("pair", nargs="?", metavar="TEXT", help="the second text of a pair")
    explain.add_argument("--html", metavar="FILE", help="write a page for a browser instead of coloured text")
    explain.add_argument("--format", choices=("ansi", "json"), default="ansi", help="of the output")
    explain.add_argument("--flops-ratio", type=float, metavar="R", help="prune to this share of the dense FLOPs")
    _add_model_options(explain)
    explain.set_defaults(run=_explain)

    server = commands.add_parser("serve", help="serve a model over HTTP, as text-embeddings-inference does")
    server.add_argument("model", nargs="?", default=os.environ.get("MODEL_ID"), metavar="MODEL", help="($MODEL_ID)")
    server.add_argument("--pruning", default="auto", metavar="auto|off|FILE", help="default: what the model holds")
    server.add_argument("--flops-ratio", type=float, metavar="R", help="prune to this share of the dense FLOPs")
    _add_revision_option(server)
    _add_engine_options(server)
    add_flags(server)
    server.set_defaults(run=_serve)

    calibration = commands.add_parser("calibrate", help="find pruning thresholds for a model on texts without labels")
    calibration.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    _add_revision_option(calibration)
    calibration.add_argument("input", metavar="FILE", help="some hundred texts of the kind that the model will see")
    _add_input_options(calibration)
    calibration.add_argument("--flops-ratio", type=float, metavar="R", help="spend this share of the dense FLOPs")
    calibration.add_argument(
        "--agreement", type=float, metavar="A", help="keep the dense model's label for at least this share of texts"
    )
    calibration.add_argument(
        "--max-drop", type=float, metavar="POINTS", help="lose at most this much of the metric; needs --labels"
    )
    calibration.add_argument("--labels", metavar="COLUMN", help="read for --max-drop only")
    calibration.add_argument("--seed", type=int, default=0)
    calibration.add_argument(
        "--max-texts",
        type=_positive,
        default=MOST_TEXTS,
        metavar="N",
        help=f"sampled if more (default: {MOST_TEXTS})",
    )
    calibration.add_argument("--out", metavar="FILE", help="default: ltp.json in the model's folder, if it has none")
    calibration.add_argument("--plot", metavar="FILE", help="draw the frontier; the ending says the format")
    _add_progress_option(calibration, "on a terminal")
    _add_engine_options(calibration)
    calibration.set_defaults(run=_calibrate, usage_error=calibration.error)

    quantization = commands.add_parser("quantize", help="write a model's folder for integer-only inference")
    quantization.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    _add_revision_option(quantization)
    quantization.add_argument("input", metavar="FILE", help="some hundred texts of the kind that the model will see")
    _add_input_options(quantization)
    quantization.add_argument("--out", required=True, metavar="DIR", help="the folder to make")
    quantization.add_argument(
        "--by-channel",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="allow scales that differ by channel; a folder that has some loads in no other precision",
    )
    _add_progress_option(quantization, "on a terminal")
    quantization.add_argument("--threads", type=_positive, metavar="N", help="default: one for each usable core")
    quantization.set_defaults(run=_quantize)

    golden = commands.add_parser("export-golden", help="write every integer of a model and of its way through texts")
    golden.add_argument("model", metavar="MODEL", help="a folder that minilpt quantize wrote, or trained with I-BERT")
    golden.add_argument("texts", nargs="+", metavar="TEXT")
    golden.add_argument("--out", required=True, metavar="FILE", help="a .safetensors file")
    _add_revision_option(golden)
    golden.add_argument("--pruning", default="auto", metavar="auto|off|FILE", help="default: what the model holds")
    golden.set_defaults(run=_export_golden, threads=None, precision="ibert", device="cpu")

    commands.add_parser("models", help="list the bundled models").set_defaults(run=_models)

    info = commands.add_parser("info", help="show versions, backends and a model's facts, as JSON")
    _add_model_options(info)
    info.set_defaults(run=_info)

    bundling = commands.add_parser("bundle", help="write a folder that runs a model without Numba, as in the cloud")
    bundling.add_argument("model", metavar="MODEL", help="a bundled name or a folder")
    bundling.add_argument("--out", required=True, metavar="DIR", help="the folder to make")
    bundling.add_argument(
        "--isa",
        type=lambda text: tuple(text.split(",")),
        default=RUNGS,
        metavar="RUNG,...",
        help=f"instruction sets, of {', '.join(rung.name for rung in isa.LADDER)} (default: {','.join(RUNGS)})",
    )
    bundling.add_argument("--precision", choices=backends.PRECISIONS, default="fp32", help="default: fp32")
    bundling.add_argument("--zip", action="store_true", help="also write DIR.zip")
    bundling.set_defaults(run=_bundle)

    doctor = commands.add_parser("doctor", help="look at this machine and installation, and say what to do")
    doctor.add_argument("--json", action="store_true", help="the findings as JSON")
    doctor.set_defaults(run=_doctor)

    warmup = commands.add_parser("warmup", help="compile the kernels into the cache, as into a container image")
    warmup.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="whose kernels; default: cpu")
    warmup.set_defaults(run=_warmup)

    evaluation = commands.add_parser("eval", help="a task's metrics, FLOPs and time, dense beside pruned")
    evaluation.add_argument("task", choices=sorted(TASKS), metavar="TASK", help=", ".join(sorted(TASKS)))
    evaluation.add_argument("--data", required=True, metavar="PATH", help="a TSV, CSV or JSONL file, or GLUE's folder")
    evaluation.add_argument("--repeats", type=_positive, default=3, metavar="N", help="timed runs of each variant")
    evaluation.add_argument("--format", choices=("json", "table"), default="table", help="of the output")
    evaluation.add_argument("--out", metavar="FILE", help="also write the JSON record to this file")
    _add_model_options(evaluation)
    evaluation.set_defaults(run=_eval)
    return parser


def _add_text_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("texts", nargs="*", metavar="TEXT")
    parser.add_argument("--input", metavar="FILE", help="take the rows of a file instead; - is standard input")
    _add_input_options(parser)
    parser.add_argument("--truncation", choices=MODES, help="of long texts (default: what the tokenizer says, or head)")
    parser.add_argument("--stride", type=_count, metavar="N", help="tokens that windows share (default: 0)")
    parser.add_argument("--aggregate", choices=AGGREGATES, help="of windows (default: mean)")
    parser.add_argument("--batch-tokens", type=_positive, default=BATCH_TOKENS, metavar="N")
    _add_progress_option(parser, "with --input, on a terminal")


def _add_input_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input-format", choices=records.FORMATS, help="default: by the file's ending, else lines")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="in JSONL, CSV and TSV (default: text)")
    parser.add_argument("--pair-column", metavar="NAME", help="second texts of pairs (default: text_pair, if there)")


def _add_progress_option(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=None,
        help=f"a progress bar on stderr (default: {default})",
    )


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="MODEL", help=f"{MODEL_HELP} (default: {DEFAULT})")
    _add_revision_option(parser)
    parser.add_argument("--pruning", default="auto", metavar="auto|off|FILE", help="default: what the model holds")
    _add_engine_options(parser)


def _add_revision_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit hash of a model on the hub")


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=_positive, metavar="N", help="default: one for each usable core")
    parser.add_argument("--precision", choices=backends.PRECISIONS, default="fp32", help="default: fp32")
    parser.add_argument("--device", choices=backends.DEVICES, default="auto", help="default: a GPU if one is usable")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a positive integer was expected, found {text!r}")
    return int(text)


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _load(options: argparse.Namespace) -> Classifier:
    pruning = None if options.pruning == "off" else options.pruning
    model = load(
        options.model,
        pruning=pruning,
        threads=options.threads,
        precision=options.precision,
        device=options.device,
        revision=options.revision,
    )
    ratio = getattr(options, "flops_ratio", None)
    return model if ratio is None else model.with_flops_ratio(ratio)


def _predict(options: argparse.Namespace) -> None:
    _check_texts(options)
    model = _load(options)
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
    model = _load(options)
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
    with _rows(options) as rows:
        yield (records.text_of(place, row, options.text_column, options.pair_column) for place, row in rows)


@contextmanager
def _rows(options: argparse.Namespace) -> Iterator[Iterator[tuple[str, records.Row]]]:
    """The rows of the file, or of standard input, with their places."""
    kind = options.input_format or records.format_of(options.input)
    name = "standard input" if options.input == "-" else options.input
    with _opened(options.input) as lines:
        yield records.rows(lines, kind, name)


@contextmanager
def _opened(path: str) -> Iterator[TextIO]:
    if path == "-":
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape", newline="")  # type: ignore[union-attr]
        yield sys.stdin
        return
    with records.opened(Path(path)) as file:
        yield file


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
    found = _load(options).explain(text)
    if options.html:
        write_whole(Path(options.html), found.to_html())
        print(f"minilpt: wrote {options.html}", file=sys.stderr)
    else:
        print(json.dumps(found.to_dict(), ensure_ascii=False) if options.format == "json" else found.to_ansi())


def _serve(options: argparse.Namespace) -> None:
    try:
        from .serving.server import serve
    except ImportError as error:
        raise DependencyError(f"serving needs {error.name}: pip install 'minilpt[serve]'") from None
    found = ServeOptions.of(options)
    serve(_load(options), found, options.model or DEFAULT)


def _calibrate(options: argparse.Namespace) -> int:
    target = _where_to_save(options)
    model = load(
        options.model,
        pruning=None,
        threads=options.threads,
        precision=options.precision,
        device=options.device,
        revision=options.revision,
    )
    with _rows(options) as rows:
        read = list(rows)
    texts = [records.text_of(place, row, options.text_column, options.pair_column) for place, row in read]
    labels = options.labels and [records.value_of(place, row, options.labels) for place, row in read]
    found = calibrate(
        model,
        texts,
        flops_ratio=options.flops_ratio,
        agreement=options.agreement,
        max_drop=options.max_drop,
        labels=labels,
        seed=options.seed,
        max_texts=options.max_texts,
        progress=sys.stderr.isatty() if options.progress is None else options.progress,
    )
    path = found.save(target)
    if options.plot:
        found.plot(options.plot)
    print(_calibration_table(found))
    print(f"minilpt: wrote {path}", file=sys.stderr)
    return 130 if found.interrupted else 0


def _quantize(options: argparse.Namespace) -> None:
    model = load(options.model, pruning=None, threads=options.threads, device="cpu", revision=options.revision)
    with _rows(options) as rows:
        texts = [records.text_of(place, row, options.text_column, options.pair_column) for place, row in rows]
    wanted = sys.stderr.isatty() if options.progress is None else options.progress
    found = quantize_model(model, texts, options.out, by_channel=options.by_channel, progress=wanted)
    record = {
        "rms_of_logits": {"before": found.rms[0], "after": found.rms[1]},
        "held_out": {"before": found.held_out_rms[0], "after": found.held_out_rms[1], "agreement": found.agreement},
        "methods": dict(Counter(found.methods.values())),
        "precisions": ["ibert"] if found.scales.exponents else list(backends.PRECISIONS),
    }
    print(json.dumps(record, indent=2))
    print(f"minilpt: wrote {options.out}", file=sys.stderr)


def _export_golden(options: argparse.Namespace) -> None:
    path = export_golden(_load(options), options.texts, options.out)
    print(f"minilpt: wrote {path}", file=sys.stderr)


def _where_to_save(options: argparse.Namespace) -> Path:
    """The file or folder, looked at before the search begins."""
    if options.out:
        if not Path(options.out).parent.is_dir():
            options.usage_error(f"--out {options.out}: there is no folder {Path(options.out).parent}")
        return Path(options.out)
    if is_hub_name(options.model):
        options.usage_error(f"--out FILE is needed: {options.model} is on the hub")
    folder = resolve(options.model, revision=options.revision)
    if options.model in bundled_names():
        options.usage_error(f"--out FILE is needed: {options.model} is a bundled model")
    if (folder / FILE_NAME).exists():
        options.usage_error(f"--out FILE is needed: {folder / FILE_NAME} is there already")
    return folder


def _calibration_table(found: Calibration) -> str:
    """The frontier, with a mark at the point that was chosen, and what it was measured on."""

    def row(point: Point) -> list[str]:
        agreement = ["-" if share is None else f"{share:.3f}" for share in (point.agreement, point.agreement_lower)]
        metric = [] if point.metric is None else [f"{point.metric:.2f}"]
        ratios = f"{point.flops_ratio:.3f}", f"{point.executed_ratio:.3f}"
        return ["*" if point is found.chosen else "", *ratios, f"{point.kl:.4f}", *agreement, *metric]

    head = ["", "counted", "executed", "KL (nats)", "agreement", "at least"]
    head += [] if found.chosen.metric is None else ["metric"]
    texts = found.provenance["texts"]
    note = (
        f"FLOPs are shares of the dense model's; * is chosen. Measured on {texts['held_out']} texts that the search "
        f"(on {texts['search']} others) did not see; 'at least' holds with 95 % confidence"
    )
    return "\n".join([*_aligned([head, *map(row, found.frontier)]), note])


def _models(options: argparse.Namespace) -> None:
    for name in bundled_names():
        print(name)


def _info(options: argparse.Namespace) -> None:
    """Looks only: weights are not read and kernels not compiled."""
    backend = backends.choose(options.device, options.precision, options.threads)
    folder = resolve(options.model, revision=options.revision)
    config, origin = read_config(folder), hub.origin(folder)
    pruning = pruning_of(folder, config, None if options.pruning == "off" else options.pruning)
    facts: dict[str, Any] = {
        "minilpt": __version__,
        "machine": machine(),
        "backend": {
            "name": backend.name,
            "device": backend.device,
            "precision": backend.precision,
            "threads": backend.threads,
            "rung": backend.rung,
            "unavailable": backends.unavailable(),
            "compiled": _compiled() if backend.name == "numba" else None,
        },
        "bundled": bundled_names(),
        "model": {
            "folder": str(folder),
            "commit": origin and origin[1],
            "model_type": config.model_type,
            "layers": config.layers,
            "heads": config.heads,
            "width": config.width,
            "inner": config.inner,
            "max_tokens": config.max_tokens,
            "labels": list(config.labels),
            "problem_type": config.problem_type,
            "pruning": pruning.to_json() if pruning else None,
        },
    }
    print(json.dumps(facts, indent=2))


def _compiled() -> dict[str, Any]:
    """The instruction sets, and where the compiled kernels are kept."""
    files = [compiled.kernel_file(part) for part in compiled.PARTS]
    return {
        "rung": isa.chosen().name,
        "rungs_of_this_machine": [rung.name for rung in isa.usable()],
        "cache": {str(file): "there" if file.is_file() else "to be compiled" for file in files},
    }


def _doctor(options: argparse.Namespace) -> int:
    """Exit code 1 where there is a problem."""
    findings = examine()
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        print("\n".join(_aligned([[finding.level, finding.about, finding.found] for finding in findings])))
        for finding in findings:
            if finding.advice:
                print(f"{finding.about}: {finding.advice}")
    return int(any(finding.level == "problem" for finding in findings))


def _warmup(options: argparse.Namespace) -> None:
    if options.device == "cuda":
        device = cuda_device.find()
        for kernels in (FloatKernels(device.cp, Geometry(), "float32"), IntegerKernels(device.cp, Geometry())):
            cuda_device.compile_kernels(kernels, device)
        print(f"sm_{device.capability}: kept by CuPy, in ~/.cupy/kernel_cache or CUPY_CACHE_DIR")
        return
    backend = backends.choose("cpu", "fp32", None)
    if backend.rung is None:
        raise BackendError(f"there is nothing to compile: {backend.reason}")
    for part in compiled.PARTS:
        path = compiled.warm_up(part)
        if not path.is_file():
            raise BackendError(
                f"{path}: the compiled kernels could not be kept; set {compiled.CACHE_VARIABLE} to a folder"
            )
        print(f"{backend.rung}: {path}")


def _bundle(options: argparse.Namespace) -> None:
    folder = bundle(options.model, options.out, rungs=options.isa, precision=options.precision)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"minilpt: wrote {folder}, {size / 1e6:.0f} MB", file=sys.stderr)
    if options.zip:
        print(f"minilpt: wrote {zipped(folder)}", file=sys.stderr)


def _eval(options: argparse.Namespace) -> None:
    task = TASKS[options.task]
    path = dev_file(Path(options.data), task)
    examples = read_examples(path, task)
    model = _load(options)
    result = evaluate(model, examples, task, repeats=options.repeats)
    record = {
        "task": options.task,
        "data": path.name,
        "model": options.model or DEFAULT,
        "machine": machine() | {"backend": asdict(model.backend)},
        **result,
    }
    if options.out:
        write_whole(Path(options.out), json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2) if options.format == "json" else _eval_table(record))


def _eval_table(record: dict[str, Any]) -> str:
    """One row per variant, then the ratio of the times."""
    metrics = TASKS[record["task"]].metrics
    head = ["", *metrics, "GFLOPs counted", "executed", "of dense", "seconds", "live tokens after each layer"]
    table = [head]
    for name, row in record["variants"].items():
        kept = " ".join(f"{count:.1f}" for count in row["kept_tokens"])
        table.append(
            [
                name,
                *(f"{row[metric]:.2f}" for metric in metrics),
                f"{row['gflops_counted']:.4f}",
                f"{row['gflops_executed']:.4f}",
                f"{row['relative_flops_counted']:.3f}",
                f"{row['seconds']:.2f}",
                kept,
            ]
        )
    lines = _aligned(table)
    if "speedup" in record:
        ratio = record["speedup"]
        lines.append(
            f"time dense / pruned: median {ratio['median']:.2f}, from {ratio['min']:.2f} to {ratio['max']:.2f}"
        )
    lines.append(f"{record['texts']} texts; FLOPs are means per text, 'of dense' is the counted ratio")
    return "\n".join(lines)


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cells."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
