"""Add a model's answers to a data frame."""

from __future__ import annotations

import pandas as pd

from minilpt.integrations import BatchPredictor

reviews = pd.DataFrame(
    {"text": ["a gorgeous , witty , seductive movie .", "dull from start to finish"], "stars": [5, 1]}
)
answered = BatchPredictor(outputs={"label": "sentiment", "score": "confidence"})(reviews)
print(answered.to_string(index=False))
