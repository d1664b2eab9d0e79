"""Turn a finished training run into a model folder: int8 rows, ltp.json, a clean tokenizer, and the training log.

python -m minilpt.weights.recipes.export --base MODEL_DIR --run RUN_DIR --out FOLDER --labels negative positive
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from ...pruning import FILE_NAME, parse
from ..save import save_weights

LEARNED = "soft masks with a temperature and a penalty, then hard thresholds with weights tuned (arXiv 2107.00910, 3.3)"
TUNED = "thresholds calibrated without gradients, then weights tuned with the tokens really removed"


def export(base: Path, run: Path, out: Path, labels: list[str], stage: str = "hard") -> None:
    """Write the folder from a stage of RUN_DIR; existing files of the same names are replaced.

    Without labels the model is for regression. The dense stage has no thresholds, so its folder has no ltp.json.
    """
    out.mkdir(parents=True, exist_ok=True)
    state = torch.load(run / f"{stage}.pt", weights_only=True)
    config = json.loads((base / "config.json").read_text())
    kept = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    more = ("hidden_act", "layer_norm_eps", "max_position_embeddings", "pad_token_id", "type_vocab_size")
    _write_json(
        out / "config.json",
        {
            "architectures": ["BertForSequenceClassification"],
            "model_type": config["model_type"],
            **{key: config[key] for key in (*kept, *more)},
            **_outputs(labels),
        },
    )
    save_weights(out, {name: tensor.numpy() for name, tensor in state["params"].items()}, int8_rows=True)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    start = next(record for record in reversed(log) if record.get("event") == "start")
    method = TUNED if start["options"].get("rule") else LEARNED
    if stage != "dense":
        record = {
            "schema_version": 1,
            "rule": "threshold",
            **state["rule"],
            "thresholds": [round(value, 6) for value in state["thresholds"].tolist()],
            "method": method,
            "provenance": {
                "recipe": "minilpt.weights.recipes.train_ltp",
                "date": log[-1]["time"][:10],
                "options": _without_paths(start)["options"],
            },
        }
        parse(record, config["num_hidden_layers"], "the thresholds that were learned")
        _write_json(out / FILE_NAME, record)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    _write_json(out / "tokenizer_config.json", {k: v for k, v in settings.items() if k != "name_or_path"})
    lines = [json.dumps(_without_paths(line)) + "\n" for line in log]
    (out / "train_log.jsonl").write_text("".join(lines), encoding="utf-8")


def _outputs(labels: list[str]) -> dict[str, Any]:
    """What config.json says of the head."""
    if not labels:
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
    }


def _without_paths(record: dict[str, Any]) -> dict[str, Any]:
    """A line of the log without the names of one machine's folders: of the teachers, their number."""
    if "options" not in record:
        return record
    paths = ("base", "data", "dev", "rule", "run", "train")
    options = {key: value for key, value in record["options"].items() if key not in paths}
    return record | {"options": options | {"teachers": len(options.get("teachers", []))}}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Command line of `export`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--labels", nargs="*", default=[], help="in their order; none for regression")
    parser.add_argument("--stage", default="hard", choices=("dense", "soft", "hard"))
    options = parser.parse_args()
    export(options.base, options.run, options.out, options.labels, options.stage)


if __name__ == "__main__":
    main()
