"""A bundle's program: `handler(event)` for serverless functions, or texts on the command line for answers as JSON.

`minilpt bundle` writes it as `app.py`. Nothing imports it inside the package.
"""

import json
import sys
from base64 import b64decode
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FACTS = json.loads((HERE / "bundle.json").read_text(encoding="utf-8"))
if FACTS["python"] != "{}.{}".format(*sys.version_info):
    raise SystemExit(
        f"{HERE}: this bundle is for Python {FACTS['python']}, found {sys.version.split()[0]}: bundle anew"
    )
sys.path.insert(0, str(HERE))

import minilpt  # noqa: E402 - found beside this file

MODEL = minilpt.load(HERE / "model", **FACTS["load"])  # once for each process, before its first event


def handler(event: dict[str, Any], context: object = None) -> dict[str, Any]:
    """{"texts": [...]} to {"predictions": [...]}; a text is a string or a list of two, a pair.

    An HTTP event, which holds that JSON as its `body`, is answered with a status code: 400 where the texts are none.
    """
    if "body" not in event:
        return _answer(event)
    try:
        body = b64decode(event["body"]) if event.get("isBase64Encoded") else event["body"]
        status, answer = 200, _answer(json.loads(body))
    except (ValueError, TypeError) as error:  # minilpt.InputError is a ValueError
        status, answer = 400, {"error": str(error)}
    return {"statusCode": status, "headers": {"Content-Type": "application/json"}, "body": json.dumps(answer)}


def _answer(request: Any) -> dict[str, Any]:
    if not isinstance(request, dict) or not isinstance(request.get("texts"), list):
        raise minilpt.InputError('an object {"texts": [...]} was expected')
    texts = [tuple(text) if isinstance(text, list) else text for text in request["texts"]]
    return {"predictions": [prediction.to_dict() for prediction in MODEL.predict(texts)]}


if __name__ == "__main__":
    for found in MODEL.predict(sys.argv[1:]):
        print(json.dumps(found.to_dict()))
