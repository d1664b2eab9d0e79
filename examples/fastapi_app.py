"""A classifier as a FastAPI dependency: `uvicorn fastapi_app:app`.

The model may be shared by all requests: it is immutable, and its kernels release the GIL, so that a plain `def`
endpoint, which FastAPI runs on a thread, keeps the event loop free.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated

from fastapi import Depends, FastAPI

import minilpt

app = FastAPI()


@lru_cache(maxsize=1)
def classifier() -> minilpt.Classifier:
    return minilpt.load(threads=1)


@app.get("/classify")
def classify(text: str, model: Annotated[minilpt.Classifier, Depends(classifier)]) -> dict[str, float]:
    return model.predict(text)[0].scores
