"""A serverless function behind an HTTP gateway: the event's body is {"text": "..."}.

Deploy the folder that `minilpt bundle MODEL --out DIR` writes, with this file in it as the function's module. The
bundle's own app.py takes many texts and pairs.
"""

from __future__ import annotations

import json
from typing import Any

import minilpt

MODEL = minilpt.load()  # in a bundle: minilpt.load(Path(__file__).with_name("model"))


def handler(event: dict[str, Any], context: object) -> dict[str, Any]:
    try:
        (prediction,) = MODEL.predict([json.loads(event["body"])["text"]])
    except (ValueError, KeyError, TypeError) as error:  # no JSON, no text, or not a string
        return {"statusCode": 400, "body": json.dumps({"error": str(error)})}
    return {"statusCode": 200, "body": json.dumps({"label": prediction.label, "score": prediction.score})}
