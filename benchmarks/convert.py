"""From a checkpoint folder to the files that each peer loads, and right answers to check every engine by.

    python -m benchmarks.convert FOLDER KIND

runs one conversion in a process of its own: each needs gigabytes, and some print a lot. `peers` calls it. Conversions
read a model folder, except "answers" and "pruning": they read a case, a folder inside the model's with `rows.json`,
the work to be timed, and `verify.json`, the part of it that is checked first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from . import files, workloads

PRUNED_ANSWERS = 8  # sequences that the slow reference answers, twice
CALIBRATION_TEXTS = 128  # that NNCF sees; 300 is its default, and the ranges of these weights settle far earlier

# ONNX Runtime's dynamic quantisation: name -> arguments of quantize_dynamic. All take the graph that its transformer
# optimiser fused, except the last. On CPUs with VNNI 7-bit weights (reduce_range) have no use but are tried.
ONNX_INT8: dict[str, dict[str, Any]] = {
    "all": {},
    "per-channel": {"per_channel": True},
    "per-channel-reduced": {"per_channel": True, "reduce_range": True},
    "attention-per-channel": {"op_types_to_quantize": ["MatMul", "Attention"], "per_channel": True},
    "matmul-per-channel": {"op_types_to_quantize": ["MatMul"], "per_channel": True},
    "unfused-per-channel": {"op_types_to_quantize": ["MatMul"], "per_channel": True},
}


def torch_model(folder: Path, attention: str = "sdpa") -> Any:
    """The checkpoint as transformers loads it, for inference."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation=attention).eval()


def _two_inputs(folder: Path, attention: str) -> Any:
    """The model as a function of token ids and mask that returns the logits."""
    import torch

    model = torch_model(folder, attention)

    class TwoInputs(torch.nn.Module):
        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return model(input_ids=input_ids, attention_mask=attention_mask).logits

    wrapped = TwoInputs().eval()
    wrapped.model = model  # registers the weights
    return wrapped


def _example() -> tuple[Any, Any]:
    import torch

    return torch.randint(1000, 2000, (2, 16)), torch.ones((2, 16), dtype=torch.int64)


def export_onnx(folder: Path) -> None:
    """`model.onnx` as exported (eager attention, which the fusions know) and `fused.onnx` as optimised."""
    import torch
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    plain, config = folder / "model.onnx", files.read_json(folder / "config.json")
    axes = {0: "batch", 1: "tokens"}
    with torch.inference_mode():
        torch.onnx.export(
            _two_inputs(folder, "eager"),
            _example(),
            plain,
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_axes={"input_ids": axes, "attention_mask": axes, "logits": {0: "batch"}},
            opset_version=17,
            dynamo=False,
        )
    fused = optimize_model(
        str(plain),
        model_type="bert",
        num_heads=config["num_attention_heads"],
        hidden_size=config["hidden_size"],
        optimization_options=FusionOptions("bert"),
        opt_level=1,
        use_gpu=False,
    )
    fused.save_model_to_file(str(folder / "fused.onnx"))
    files.write_json(folder / "fused.json", fused.get_fused_operator_statistics())


def quantize_onnx(folder: Path) -> None:
    """One int8 file for each entry of ONNX_INT8."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # Shape inference stops at the fused operators, which are not ONNX's own; everything between them is float32.
    options = {"DefaultTensorType": onnx.TensorProto.FLOAT}

    for name, settings in ONNX_INT8.items():
        source = folder / ("model.onnx" if name.startswith("unfused") else "fused.onnx")
        target = folder / f"int8-{name}.onnx"
        quantize_dynamic(source, target, weight_type=QuantType.QInt8, extra_options=options, **settings)


def convert_openvino(folder: Path) -> None:
    """`openvino-fp32.xml`, from PyTorch's own graph, and `openvino-int8.xml`, quantised by NNCF after training."""
    import nncf
    import openvino as ov
    import torch

    with torch.inference_mode():
        model = ov.convert_model(_two_inputs(folder, "sdpa"), example_input=_example())
    for node, name in zip(model.inputs, ("input_ids", "attention_mask"), strict=True):
        node.get_tensor().set_names({name})
    model.reshape({"input_ids": [-1, -1], "attention_mask": [-1, -1]})
    ov.save_model(model, folder / "openvino-fp32.xml", compress_to_fp16=False)
    rows = calibration_rows(folder)
    samples = nncf.Dataset(rows, lambda row: {"input_ids": row, "attention_mask": np.ones_like(row)})
    quantized = nncf.quantize(
        model,
        samples,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(rows),
        preset=nncf.QuantizationPreset.MIXED,
        fast_bias_correction=True,
    )
    ov.save_model(quantized, folder / "openvino-int8.xml", compress_to_fp16=False)


def calibration_rows(folder: Path) -> list[np.ndarray]:
    """Token ids to calibrate with, (1, n) int64 each, from `calibration.json`."""
    rows = files.read_json(folder / "calibration.json")[:CALIBRATION_TEXTS]
    return [np.array([row], np.int64) for row in rows]


def convert_ctranslate2(folder: Path) -> None:
    """`ctranslate2/`, float32 (quantised when it is loaded), and the head beside it, which CTranslate2 does not run."""
    from ctranslate2.converters import TransformersConverter

    config, words = files.read_json(folder / "config.json"), SimpleNamespace(unk_token="<0>")
    words.bos_token, words.eos_token = words.unk_token, words.unk_token
    words.get_vocab = lambda: {f"<{index}>": index for index in range(config["vocab_size"])}
    # BERT's loader reads the pooler; RoBERTa's classifiers have none, and a made-up one would only cost time.
    pooler = {"add_pooling_layer": False} if config["model_type"] == "roberta" else {}

    class WithoutTokenizer(TransformersConverter):
        def load_tokenizer(self, *_: Any, **__: Any) -> Any:
            return words  # token ids go in: the vocabulary only has to have the right size

        def load_model(self, model_class: Any, path: str, **settings: Any) -> Any:
            return model_class.from_pretrained(path, **pooler)

    WithoutTokenizer(str(folder)).convert(str(folder / "ctranslate2"), force=True)
    state = torch_model(folder).state_dict()
    roberta = "classifier.dense.weight" in state
    keys = ("classifier.dense", "classifier.out_proj") if roberta else ("bert.pooler.dense", "classifier")
    head = {
        f"{name}_{part}": state[f"{key}.{part}"].numpy()
        for name, key in zip(("dense", "out"), keys, strict=True)
        for part in ("weight", "bias")
    }
    np.savez(folder / "ctranslate2" / "head.npz", **head)


def write_answers(case: Path) -> None:
    """`answers.npz`: PyTorch's logits in float32 and float64 for the sequences of `verify.json`, each run alone."""
    import torch

    rows, model, found = files.read_json(case / "verify.json"), torch_model(case.parent), {}
    for name in ("float32", "float64"):
        model = model.to(getattr(torch, name))
        with torch.inference_mode():
            found[name] = np.concatenate([model(torch.tensor([row])).logits.numpy() for row in rows])
    np.savez(case / "answers.npz", **found)


def prepare_pruning(case: Path) -> None:
    """`ltp.json` where there is none, and `pruned.json`: what it counts over `rows.json`, the reference's answers."""
    rule, rows = case / "ltp.json", files.read_json(case / "rows.json")
    if not rule.is_file():
        workloads.write_thresholds(case.parent, rows, rule)
    few = files.read_json(case / "verify.json")[:PRUNED_ANSWERS]
    answers = {"answers": workloads.pruned_answers(case.parent, rule, few)}
    files.write_json(case / "pruned.json", workloads.counted(case.parent, rule, rows) | answers)


CONVERSIONS: dict[str, tuple[Callable[[Path], None], str]] = {  # what runs, and the file that it leaves last
    "answers": (write_answers, "answers.npz"),
    "pruning": (prepare_pruning, "pruned.json"),
    "onnx": (export_onnx, "fused.json"),
    "onnx-int8": (quantize_onnx, f"int8-{list(ONNX_INT8)[-1]}.onnx"),
    "openvino": (convert_openvino, "openvino-int8.bin"),
    "ctranslate2": (convert_ctranslate2, "ctranslate2/head.npz"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the conversion named on the command line."""
    folder, kind = sys.argv[1:] if arguments is None else arguments
    CONVERSIONS[kind][0](Path(folder))


if __name__ == "__main__":
    main()
