"""The routes: which request goes to which part of the service, and what its errors look like."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException

from .. import __version__
from . import contract, metrics
from .refusals import NOT_UNDERSTOOD, STATUS, RefusedError
from .service import Answer, Service

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
App = Callable[[Message, Receive, Callable[[Message], Awaitable[None]]], Awaitable[None]]

PAGE = Path(__file__).with_name("page.html")
_bearer = HTTPBearer(auto_error=False, description="the server's --api-key, if it has one")


async def _service(request: Request) -> Service:  # async, or every request would visit a thread for it
    return request.app.state.service


async def _authorized(
    service: Annotated[Service, Depends(_service)],
    found: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)] = None,
) -> None:
    """Compares bytes (header text is Latin-1) in constant time: answers do not tell how much of a guess is right."""
    wanted = service.options.api_key
    if wanted is not None and not hmac.compare_digest(
        (found.credentials if found else "").encode("latin-1"), wanted.encode()
    ):
        raise RefusedError("Unauthorized", "this server wants its API key: Authorization: Bearer KEY")


Serving = Annotated[Service, Depends(_service)]
public = APIRouter()
private = APIRouter(dependencies=[Depends(_authorized)])
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": contract.ErrorBody, "description": kind} for kind, status in STATUS.items()
}


def _answered(answer: Answer) -> JSONResponse:
    body, headers = answer
    return JSONResponse(body, headers=headers)


@private.post("/predict", response_model=list[contract.Label] | list[list[contract.Label]], responses=ERRORS)
async def predict(body: contract.PredictRequest, service: Serving) -> Response:
    """Classify a text, a pair, or a batch of them: every label with its score, best first."""
    return _answered(await service.predict(body))


@private.post("/rerank", response_model=list[contract.Rank], responses=ERRORS)
async def rerank(body: contract.RerankRequest, service: Serving) -> Response:
    """Order texts by how well they answer a query, for models with one label."""
    return _answered(await service.rerank(body))


@private.post("/embed", response_model=list[list[float]], responses=ERRORS)
async def embed(body: contract.EmbedRequest, service: Serving) -> Response:
    """A vector for every text."""
    return _answered(await service.embed(body))


@private.post("/tokenize", response_model=list[list[contract.TokenOfText]], responses=ERRORS)
async def tokenize(body: contract.TokenizeRequest, service: Serving) -> Response:
    """The tokens of every text, however long."""
    return _answered(await service.tokenize(body))


@private.post("/explain", response_model=contract.Explained, responses=ERRORS)
async def explain(body: contract.ExplainRequest, service: Serving) -> Response:
    """At which layer each token of a text or pair was removed. Not part of the contract."""
    return _answered(await service.explain(body))


@private.get("/info", response_model=contract.Info)
async def info(service: Serving) -> Response:
    """The model and the server's limits."""
    return JSONResponse(service.info())


@private.get("/metrics")
async def prometheus(service: Serving) -> Response:
    """Counters and histograms in Prometheus' text format."""
    return Response(service.metrics.render(), media_type=metrics.CONTENT_TYPE)


@public.get("/health", responses={503: ERRORS[503]})
@public.get("/ping", include_in_schema=False)
async def health(service: Serving) -> Response:
    """200 while requests are answered."""
    if not await service.healthy():
        raise RefusedError("Unhealthy", "unhealthy")
    return Response()


@public.get("/", include_in_schema=False)
async def root(request: Request, service: Serving) -> Response:
    """The page, for what asks for HTML as browsers do; else the health, as the contract has it."""
    if "text/html" in request.headers.get("accept", ""):
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"vary": "accept"})
    return await health(service)


def create_app(service: Service) -> FastAPI:
    """The application; it closes the service when it ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(title="minilpt", version=__version__, lifespan=lifespan, redoc_url=None)
    app.state.service = service
    app.include_router(public)
    app.include_router(private)
    routes: dict[str, Any] = {"classifier": predict, "reranker": rerank, "embedding": embed}
    for path in ("/", "/invocations"):  # as the contract has it for SageMaker and the hosted API
        app.add_api_route(
            path, routes[service.kind], methods=["POST"], include_in_schema=False, dependencies=[Depends(_authorized)]
        )
    app.add_exception_handler(RefusedError, _refused)
    app.add_exception_handler(RequestValidationError, _not_understood)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_middleware(_PayloadLimit, limit=service.options.payload_limit)
    return app


def _error(kind: str, message: str, status: int, headers: Any = None) -> JSONResponse:
    return JSONResponse({"error": message, "error_type": kind}, status, headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    headers = {"www-authenticate": "Bearer"} if error.status == STATUS["Unauthorized"] else None
    return _error(error.kind, str(error), error.status, headers)


async def _not_understood(request: Request, error: Exception) -> Response:
    """400 for what is no JSON, 422 for JSON of another shape, as the contract's server has it."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    if any(item["type"] == "json_invalid" for item in found):
        return _error("Validation", "the body is not valid JSON", 400)
    places = [f"{'.'.join(map(str, item['loc'][1:])) or 'body'}: {item['msg']}" for item in found]
    return _error("Validation", "; ".join(dict.fromkeys(places)), NOT_UNDERSTOOD)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error("Validation", str(error.detail), error.status_code, error.headers)


class _PayloadLimit:
    """Refuses bodies of more than `limit` bytes: by their stated length at once, else when they get there."""

    def __init__(self, app: App, limit: int):
        self._app, self._limit = app, limit

    async def __call__(self, scope: Message, receive: Receive, send: Callable[[Message], Awaitable[None]]) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        message = f"the body has more than {self._limit} bytes, which is this server's limit"
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        if stated.isdigit() and int(stated) > self._limit:
            return await _error("Validation", message, STATUS["Validation"])(scope, receive, send)
        size = 0

        async def counted() -> Message:
            nonlocal size
            part = await receive()
            size += len(part.get("body", b""))
            if size > self._limit:
                raise HTTPException(STATUS["Validation"], message)
            return part

        await self._app(scope, counted, send)
