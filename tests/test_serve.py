"""The server: the contract of text-embeddings-inference, its limits and errors, and an end that loses nothing."""

from __future__ import annotations

import argparse
import asyncio
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from safetensors.numpy import load_file, save_file
from serving import PATIENCE_S, Altered, command, served

import minilpt
from minilpt import cli
from minilpt.batching import StoppedError
from minilpt.serving.contract import PredictRequest
from minilpt.serving.options import ServeOptions, add_flags
from minilpt.serving.refusals import RefusedError
from minilpt.serving.server import listening
from minilpt.serving.service import Service

import checkpoints

LONG = "good bad " * 40  # more than the 40 tokens that the tiny model takes


def tiny(folder: Path, labels: int = 3, **changes: Any) -> minilpt.Classifier:
    checkpoints.write(folder, checkpoints.config(labels=labels, **changes))
    checkpoints.write_vocabulary(folder)
    return minilpt.load(folder, threads=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> minilpt.Classifier:
    return tiny(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def client(model: minilpt.Classifier) -> Iterator[httpx.Client]:
    with served(model, max_client_batch_size=4, payload_limit=5000) as client:
        yield client


def error(reply: httpx.Response) -> tuple[int, str]:
    body = reply.json()
    assert set(body) == {"error", "error_type"} and body["error"]
    return reply.status_code, body["error_type"]


def expected(prediction: minilpt.Prediction) -> list[dict[str, Any]]:
    """Every label, best first."""
    found = sorted(prediction.scores.items(), key=lambda item: -item[1])
    return [{"score": score, "label": label} for label, score in found]


@pytest.mark.parametrize(
    ("inputs", "item"),
    [("good film", "good film"), (["good film"], "good film"), (["a", "the film"], ("a", "the film"))],
    ids=["text", "text in a list", "pair"],
)
def test_one_text_or_pair_gets_one_list(
    client: httpx.Client, model: minilpt.Classifier, inputs: Any, item: Any
) -> None:
    reply = client.post("/predict", json={"inputs": inputs})
    assert reply.json() == expected(model.predict([item])[0])


def test_a_batch_gets_a_list_for_each(client: httpx.Client, model: minilpt.Classifier) -> None:
    reply = client.post("/predict", json={"inputs": [["good"], ["a", "bad film"], ["bad"]]})
    assert reply.json() == [expected(found) for found in model.predict(["good", ("a", "bad film"), "bad"])]


def test_raw_scores_are_logits(client: httpx.Client, model: minilpt.Classifier) -> None:
    found = client.post("/predict", json={"inputs": "good", "raw_scores": True}).json()
    assert sorted(item["score"] for item in found) == sorted(model.logits("good")[0].tolist())


@pytest.mark.parametrize("path", ["/", "/invocations"])
def test_the_root_takes_predictions_too(client: httpx.Client, path: str) -> None:
    body = {"inputs": "good film"}
    assert client.post(path, json=body).json() == client.post("/predict", json=body).json()


@pytest.mark.parametrize(
    ("route", "body", "wanted"),
    [
        ("/predict", {"inputs": ["a", "b", "c"]}, (422, "Validation")),
        ("/predict", {"inputs": [["a"], ["a", "b", "c"]]}, (422, "Validation")),
        ("/predict", {"inputs": [["a"], "b"]}, (422, "Validation")),
        ("/predict", {"inputs": 5}, (422, "Validation")),
        ("/predict", {}, (422, "Validation")),
        ("/predict", {"inputs": "a", "truncation_direction": "up"}, (422, "Validation")),
        ("/predict", {"inputs": []}, (400, "Empty")),
        ("/predict", {"inputs": ""}, (400, "Empty")),
        ("/predict", {"inputs": [["a"], [""]]}, (400, "Empty")),
        ("/predict", {"inputs": [["a"]] * 5}, (413, "Validation")),
        ("/predict", {"inputs": LONG, "truncate": False}, (413, "Validation")),
        ("/tokenize", {"inputs": []}, (400, "Empty")),
        ("/tokenize", {"inputs": ["a"] * 5}, (413, "Validation")),
        ("/rerank", {"query": "a", "texts": ["b"]}, (424, "Backend")),
        ("/explain", {"text": ""}, (400, "Empty")),
        ("/nothing", {}, (404, "Validation")),
    ],
)
def test_what_is_refused(client: httpx.Client, route: str, body: Any, wanted: tuple[int, str]) -> None:
    assert error(client.post(route, json=body)) == wanted


def test_what_is_no_json_no_unicode_or_too_much(client: httpx.Client) -> None:
    headers = {"content-type": "application/json"}
    assert error(client.post("/predict", content=b'{"inputs": ', headers=headers)) == (400, "Validation")
    lone = client.post("/predict", content=rb'{"inputs": "\ud800"}', headers=headers)
    assert error(lone) == (422, "Validation")
    much = b'{"inputs": "' + b"a" * 5000 + b'"}'
    assert error(client.post("/predict", content=much, headers=headers)) == (413, "Validation")
    unstated = client.post("/predict", content=iter([much[:100], much[100:]]), headers=headers)  # sent in chunks
    assert error(unstated) == (413, "Validation")


def test_long_texts_are_cut_where_that_is_wanted(client: httpx.Client, model: minilpt.Classifier) -> None:
    def raw(text: str, **cut: Any) -> Any:
        return client.post("/predict", json={"inputs": text, "raw_scores": True, **cut}).json()

    words = ["good"] * 38 + ["bad"] * 38
    head, tail = " ".join(words[:38]), " ".join(words[38:])
    assert raw(" ".join(words)) == raw(head) == raw(" ".join(words), truncation_direction="Right", truncate=True)
    assert raw(" ".join(words), truncation_direction="left") == raw(tail) != raw(head)
    with served(model, auto_truncate=False) as strict:
        assert error(strict.post("/predict", json={"inputs": LONG})) == (413, "Validation")
        assert strict.post("/predict", json={"inputs": LONG, "truncate": True}).status_code == 200


def test_headers_tell_counts_and_times(client: httpx.Client, model: minilpt.Classifier) -> None:
    reply = client.post("/predict", json={"inputs": [["good film"], ["a", "not bad"]]})
    one, other = model.predict(["good film", ("a", "not bad")])
    told = reply.headers
    assert told["x-compute-type"] == "cpu"
    assert int(told["x-compute-characters"]) == len("good film" + "a" + "not bad")
    assert int(told["x-compute-tokens"]) == one.n_tokens + other.n_tokens
    kept = np.array(one.kept_tokens) + np.array(other.kept_tokens)
    assert told["x-minilpt-kept-tokens"] == ",".join(map(str, kept))
    ratio = (one.executed_flops + other.executed_flops) / (one.dense_flops + other.dense_flops)
    assert float(told["x-minilpt-flops-ratio"]) == pytest.approx(ratio, abs=1e-4)
    for name in ("compute", "total", "tokenization", "queue", "inference"):
        assert told[f"x-{name}-time"].isdecimal()
    assert int(told["x-total-time"]) >= int(told["x-inference-time"])


def test_tokens_are_whole_and_have_their_places(client: httpx.Client, model: minilpt.Classifier) -> None:
    (tokens,) = client.post("/tokenize", json={"inputs": "a good film"}).json()
    assert [token["id"] for token in tokens] == model.encode("a good film")[0][0]
    assert tokens[0] == {"id": 2, "text": "[CLS]", "special": True, "start": None, "stop": None}
    assert tokens[2] == {"id": 5, "text": "good", "special": False, "start": 2, "stop": 6}
    (bare,) = client.post("/tokenize", json={"inputs": "a good film", "add_special_tokens": False}).json()
    assert bare == tokens[1:-1]
    (long,) = client.post("/tokenize", json={"inputs": [LONG]}).json()
    assert len(long) == 82


def test_info_health_and_the_page(client: httpx.Client, model: minilpt.Classifier) -> None:
    facts = client.get("/info").json()
    assert facts["model_id"] == "tiny"
    assert facts["model_type"]["classifier"]["label2id"] == {"class-0": 0, "class-1": 1, "class-2": 2}
    assert (facts["max_input_length"], facts["max_client_batch_size"]) == (40, 4)
    for path in ("/health", "/ping", "/"):
        reply = client.get(path)
        assert (reply.status_code, reply.content) == (200, b"")
    page = client.get("/", headers={"accept": "text/html,*/*"})
    assert page.headers["content-type"].startswith("text/html") and "<form" in page.text
    assert "://" not in page.text  # nothing from elsewhere


def test_the_openapi_document_has_the_routes_and_their_errors(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    wanted = {"/predict", "/rerank", "/embed", "/tokenize", "/explain", "/info", "/health", "/metrics"}
    assert set(paths) == wanted
    assert {"200", "400", "413", "422", "424", "429", "503"} <= set(paths["/predict"]["post"]["responses"])
    assert client.get("/docs").status_code == 200


def test_metrics_count_requests_texts_and_failures(model: minilpt.Classifier) -> None:
    with served(model) as client:
        client.post("/predict", json={"inputs": "good"})
        client.post("/predict", json={"inputs": [["good"], ["bad"]]})
        client.post("/predict", json={"inputs": ""})
        reply = client.get("/metrics")
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(reply.text)
        for sample in family.samples
    }
    lines = reply.text.splitlines()
    assert "# TYPE te_request_count counter" in lines and 'te_request_count{method="single"} 2.0' in lines
    assert 'te_request_failure{err="empty"} 1.0' in lines and "te_predict_success 3.0" in lines
    assert samples["te_request_duration_count",] == samples["te_predict_duration_count",] == 2
    assert samples["te_queue_size",] == 0
    assert samples["minilpt_flops_total", "executed"] <= samples["minilpt_flops_total", "dense"]


def test_a_reranker_orders_texts_by_the_sigmoids_of_its_logits(tmp_path: Path) -> None:
    model = tiny(tmp_path, labels=1)
    texts = ["good film", "bad", "not a film"]
    logits = model.logits([("film", text) for text in texts])[:, 0]
    with served(model) as client:
        found = client.post("/rerank", json={"query": "film", "texts": texts}).json()
        raw = client.post("/", json={"query": "film", "texts": texts, "raw_scores": True, "return_text": True}).json()
        assert error(client.post("/rerank", json={"query": "film", "texts": []})) == (400, "Empty")
        assert set(client.get("/info").json()["model_type"]) == {"reranker"}
    order = np.argsort(-logits).tolist()
    assert [item["index"] for item in found] == order
    assert [item["score"] for item in found] == pytest.approx((1 / (1 + np.exp(-logits[order]))).tolist(), rel=1e-6)
    assert raw == [{"index": at, "text": texts[at], "score": float(logits[at])} for at in order]


def test_embeddings_are_the_models(tmp_path: Path) -> None:
    """Of an encoder without a head: cut at the side that is asked for, normalised or not, never classified."""
    checkpoints.write_vocabulary(checkpoints.write(tmp_path, checkpoints.config(architectures=["BertModel"])))
    model = minilpt.load(tmp_path, threads=1)
    long = "good " * 38 + "bad " * 38
    with served(model) as client:
        found = client.post("/embed", json={"inputs": "good film"})
        assert (
            found.json() == model.embed("good film").tolist() == client.post("/", json={"inputs": "good film"}).json()
        )
        assert "x-compute-tokens" in found.headers and "x-minilpt-kept-tokens" not in found.headers
        plain = client.post("/embed", json={"inputs": ["a", long], "normalize": False, "truncation_direction": "Left"})
        assert plain.json() == model.embed(["a", long], normalize=False, truncation="tail").tolist()
        for route, body in {"/predict": {"inputs": "a"}, "/explain": {"text": "a"}}.items():
            assert error(client.post(route, json=body)) == (424, "Backend")
        assert client.get("/info").json()["model_type"] == {"embedding": {"pooling": "mean"}}


@pytest.mark.parametrize(("compat", "total"), [(False, None), (True, 1.0)], ids=["sigmoids", "softmax"])
def test_a_multi_label_model_gets_sigmoids_unless_tei_is_wanted(
    tmp_path: Path, compat: bool, total: float | None
) -> None:
    model = tiny(tmp_path, problem_type="multi_label_classification")
    with served(model, tei_compat=compat) as client:
        found = client.post("/predict", json={"inputs": "good film"}).json()
    if compat:
        assert sum(item["score"] for item in found) == pytest.approx(total)
    else:
        assert found == expected(model.predict("good film")[0])
        assert sum(item["score"] for item in found) != pytest.approx(1.0)


def test_a_key_is_wanted_for_all_but_health_and_the_page(model: minilpt.Classifier) -> None:
    with served(model, api_key="sécret") as client:
        for headers in ({}, {"authorization": "Bearer other"}, {"authorization": "Basic c2VjcmV0"}):
            for path in ("/predict", "/", "/explain", "/tokenize"):
                reply = client.post(path, json={"inputs": "a", "text": "a"}, headers=headers)
                assert error(reply) == (401, "Unauthorized")
            assert reply.headers["www-authenticate"] == "Bearer"
            assert client.get("/metrics", headers=headers).status_code == 401
            assert client.get("/health", headers=headers).status_code == 200
        right = {"authorization": "Bearer sécret".encode()}
        assert client.post("/predict", json={"inputs": "a"}, headers=right).status_code == 200


def test_too_many_requests_at_once_are_refused_and_the_others_answered(model: minilpt.Classifier) -> None:
    began, go = threading.Semaphore(0), threading.Event()

    def forward(*tokens: Any) -> Any:
        began.release()
        assert go.wait(PATIENCE_S)
        return model.forward(*tokens)

    with served(Altered(model, forward=forward), max_concurrent_requests=1) as client, ThreadPoolExecutor() as pool:
        first = pool.submit(client.post, "/predict", json={"inputs": "good"})
        assert began.acquire(timeout=PATIENCE_S)
        assert error(client.post("/predict", json={"inputs": "bad"})) == (429, "Overloaded")
        assert error(client.post("/tokenize", json={"inputs": "bad"})) == (429, "Overloaded")
        assert client.get("/health").status_code == 200
        go.set()
        assert first.result(PATIENCE_S).json() == expected(model.predict("good")[0])
        assert client.post("/predict", json={"inputs": "bad"}).status_code == 200


def test_a_request_that_takes_too_long_is_given_up_and_gives_its_place_back(model: minilpt.Classifier) -> None:
    go = threading.Event()

    def forward(*tokens: Any) -> Any:
        assert go.wait(PATIENCE_S)
        return model.forward(*tokens)

    with served(Altered(model, forward=forward), timeout=0.2, max_concurrent_requests=1) as client:
        assert error(client.post("/predict", json={"inputs": "good"})) == (429, "Overloaded")
        assert error(client.post("/predict", json={"inputs": "good"})) == (429, "Overloaded")
        go.set()
    with served(model, timeout=PATIENCE_S) as client:
        assert client.post("/predict", json={"inputs": "good"}).status_code == 200


def test_an_engine_that_fails_is_an_error_for_its_text_and_unhealthy_until_it_works(model: minilpt.Classifier) -> None:
    broken = [True]

    def forward(*tokens: Any) -> Any:
        if broken[0]:
            raise ValueError("no luck")
        return model.forward(*tokens)

    with served(Altered(model, forward=forward)) as client:
        reply = client.post("/predict", json={"inputs": "good"})
        assert error(reply) == (424, "Backend") and "no luck" in reply.json()["error"]
        assert error(client.get("/health")) == (503, "Unhealthy")
        broken[0] = False
        assert client.get("/health").status_code == 200
        assert client.post("/predict", json={"inputs": "good"}).status_code == 200


def test_a_score_that_is_no_number_is_an_error(tmp_path: Path) -> None:
    model = tiny(tmp_path)

    def forward(*tokens: Any) -> Any:
        found = model.forward(*tokens)
        found.logits[:] = np.nan
        return found

    with served(Altered(model, forward=forward)) as client:
        assert error(client.post("/predict", json={"inputs": "good"})) == (424, "Backend")


def test_activations_that_outgrow_float32_are_an_error_of_their_text_alone(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["bert.embeddings.word_embeddings.weight"][5] *= 1e30  # of "good"
    save_file(weights, tmp_path / "model.safetensors")
    with served(minilpt.load(tmp_path, threads=1)) as client:
        reply = client.post("/predict", json={"inputs": "good"})
        assert error(reply) == (424, "Backend") and "the output of embeddings is the first" in reply.json()["error"]
        assert client.post("/predict", json={"inputs": "bad"}).json() == expected(model.predict("bad")[0])


def text_of(number: int) -> str:
    """A text whose answer is its own: no two numbers below 625 have the same words."""
    return " ".join(("good", "bad", "film", "the", "not")[number // 5**place % 5] for place in range(4))


def test_sigterm_under_load_loses_nothing_and_mixes_nothing_up(tmp_path: Path) -> None:
    """Every request that the server took has its own right answer; every other one was refused, never half answered."""
    model = tiny(tmp_path)
    wanted = {number: expected(found) for number, found in enumerate(model.predict([text_of(n) for n in range(600)]))}
    right: list[int] = []
    refused: list[str] = []
    enough = threading.Event()

    def client(numbers: range, address: str) -> None:
        with httpx.Client(base_url=address, timeout=PATIENCE_S, trust_env=False) as session:
            for number in numbers:
                try:
                    reply = session.post("/predict", json={"inputs": text_of(number), "raw_scores": False})
                except (httpx.ConnectError, httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError) as gone:
                    refused.append(type(gone).__name__)
                    return
                if reply.status_code == 503:
                    refused.append("503")
                    return
                assert reply.json() == wanted[number]
                right.append(number)
                if len(right) > 60:
                    enough.set()

    with command(str(tmp_path), "--threads", "1") as (process, address), ThreadPoolExecutor(12) as pool:
        clients = [pool.submit(client, range(first, 600, 12), address) for first in range(12)]
        assert enough.wait(PATIENCE_S)
        process.send_signal(signal.SIGTERM)
        for done in clients:
            done.result(PATIENCE_S)
        _, log = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert f"stopped: {len(right)} requests taken, {len(right)} answered, 0 answered with an error" in log
    assert len(right) == len(set(right)) < 600 and refused


def test_at_the_stop_the_queue_has_the_grace_and_then_an_error(tmp_path: Path) -> None:
    """A batch that does not end within the grace: what waits behind it is answered 503, and the process ends."""
    model, began, go = tiny(tmp_path), threading.Event(), threading.Event()

    def forward(*tokens: Any) -> Any:
        began.set()
        assert go.wait(PATIENCE_S)
        return model.forward(*tokens)

    service = Service(Altered(model, forward=forward), ServeOptions(max_batch_tokens=1), "tiny")  # type: ignore[arg-type]

    async def scenario() -> list[Any]:
        requests = [asyncio.create_task(service.predict(PredictRequest(inputs=text))) for text in ("good", "bad")]
        await asyncio.to_thread(began.wait, PATIENCE_S)
        while service.batcher.waiting < 1:
            await asyncio.sleep(0)
        service.batcher.abandon()
        go.set()
        return await asyncio.gather(*requests, return_exceptions=True)

    answers = asyncio.run(scenario())
    service.close()
    lost = [found for found in answers if isinstance(found, RefusedError)]
    assert len(lost) == 1 and lost[0].kind == "Unhealthy" and isinstance(lost[0].__cause__, StoppedError)
    assert len([found for found in answers if isinstance(found, tuple)]) == 1


def test_connections_send_small_answers_at_once() -> None:
    """Nagle's algorithm is off, or every answer would wait for the client's delayed acknowledgement."""
    found = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        found.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async def scenario() -> None:
        listener = listening("127.0.0.1", 0)
        async with await asyncio.start_server(talk, sock=listener):
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            assert await reader.read() == b""
            writer.close()

    asyncio.run(scenario())
    assert found == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "a port from 0"),
        (["--max-batch-tokens", "0"], "a positive integer"),
        (["--timeout", "soon"], "a positive number of seconds"),
    ],
)
def test_wrong_flags_are_explained(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["serve", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_taken_port_and_a_wrong_variable_are_explained(
    client: httpx.Client, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["serve", "--port", str(client.base_url.port)]) == 1
    assert "cannot listen there" in capsys.readouterr().err
    monkeypatch.setenv("AUTO_TRUNCATE", "perhaps")
    assert cli.main(["serve"]) == 1
    assert "$AUTO_TRUNCATE: true or false was expected" in capsys.readouterr().err


def test_flags_win_over_variables_and_variables_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:

    def parsed(*arguments: str) -> ServeOptions:
        parser = argparse.ArgumentParser()
        add_flags(parser)
        return ServeOptions.of(parser.parse_args(arguments))

    assert parsed() == ServeOptions()
    for name, value in {"PORT": "81", "HOSTNAME": "0.0.0.0", "AUTO_TRUNCATE": "false", "API_KEY": "k"}.items():
        monkeypatch.setenv(name, value)
    assert parsed() == ServeOptions(port=81, host="0.0.0.0", auto_truncate=False, api_key="k")
    assert parsed("--port", "82", "--auto-truncate") == ServeOptions(port=82, host="0.0.0.0", api_key="k")
    monkeypatch.setenv("HOSTNAME", "container-4711")  # a name, not an address to listen on
    assert parsed().host == ServeOptions().host


def test_without_the_extra_the_command_says_what_to_install() -> None:
    program = "import sys; sys.modules['uvicorn'] = None; from minilpt.cli import main; sys.exit(main(['serve']))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1 and "serving needs uvicorn: pip install 'minilpt[serve]'" in done.stderr
