"""Classify texts with the bundled model, and see what pruning saved."""

from __future__ import annotations

import minilpt

model = minilpt.load()
for prediction in model.predict(["a gorgeous , witty , seductive movie .", ("pairs are", "tuples")]):
    share = prediction.executed_flops / prediction.dense_flops
    print(f"{prediction.label} {prediction.score:.3f}, {share:.0%} of the unpruned model's FLOPs")
