"""The application: routes, the web page, and the headers that every answer carries."""

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import fastapi_offline
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi.routing import APIRoute
from prometheus_client.exposition import choose_encoder
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import __version__
from service.classifier import NOT_READY, Classifier
from service.errors import ServiceError
from service.headers import common_headers, request_id_of
from service.logs import log
from service.remote import engine_gone
from service.routes import ClassifyRoute
from service.schemas import ErrorAnswer, ModelAnswer, classify_operation, schema_components

STATIC: Final = Path(__file__).parent / "static"


def create_app(classifier: Classifier, *, listen_at_once: bool = True) -> "Service":
    """
    The service around a classifier, which is started and stopped with it.

    Args:
        listen_at_once: answer /healthz and /readyz while the classifier starts; else it first has to be ready.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        start = asyncio.create_task(classifier.start())
        if not listen_at_once:
            await start
        yield
        await start
        await classifier.stop()

    app = fastapi_offline.FastAPIOffline(
        title="ride-serving", version=__version__, lifespan=lifespan, redoc_url=None, static_url="/docs/static",
        redirect_slashes=False,  # to where? The Host header may say anything, and a proxy's https is unknown here
        description="Classifies images and decides for each how many experts it needs.",
    )  # fmt: skip
    classify = ClassifyRoute(classifier)
    app.router.routes.append(Route("/classify", classify, methods=["POST"], name="classify"))  # answers other methods
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    _add_routes(app, classifier)
    _describe_classify(app)
    for route in app.routes:  # only now, or the document would list them
        if isinstance(route, APIRoute):
            route.methods = {*(route.methods or ()), "HEAD"}
    app.add_middleware(CommonHeaders)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _failed)
    return Service(classify, app)


class Service:
    """
    FastAPI, but for the one hot route, which its layers would cost more than all of its own work.

    Attributes:
        api: everything else.
        classify: the hot route.
    """

    def __init__(self, classify: ClassifyRoute, api: FastAPI) -> None:
        self.api = api
        self.classify = classify

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "http" and scope["path"] == "/classify" and scope["method"] == "POST":
            await self.classify(scope, receive, send)
        else:
            await self.api(scope, receive, send)


class CommonHeaders:
    """
    Gives every request an id, every answer that id and the security headers, and has browsers ask each time anew.

    Nobody gets a part of a file: they are small, and Starlette would refuse a broken Range in plain text.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(scope["headers"])
        scope.setdefault("state", {})["request_id"] = request_id
        scope["headers"] = [header for header in scope["headers"] if header[0] != b"range"]
        headers = [*common_headers(request_id, scope["path"]), (b"cache-control", b"no-cache")]

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *headers]
            await send(message)

        await self._app(scope, receive, send_with_headers)


def _add_routes(app: FastAPI, classifier: Classifier) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @app.get("/healthz", summary="Whether the process lives")
    async def healthz() -> dict[str, str]:
        """200 while it does: restart it where this fails."""
        return {"status": "ok"}

    @app.get("/readyz", summary="Whether it takes work", responses={503: {"model": ErrorAnswer}})
    async def readyz(request: Request) -> Response:
        """
        200 from the warm-up's end until the service is told to stop, else 503: send traffic where this is 200.

        Of several workers all must have been ready once. One that is restarted later does not change it: the others
        answer, new connections to it wait for its successor, and a load balancer that turned away from all of them
        would only overload their neighbours. 503 again while the process that runs the graphs for all of them is
        restarted.
        """
        try:
            classifier.check_ready()
            if missing := classifier.metrics.workers_to_come():
                raise ServiceError("not_ready", f"{missing} workers are still starting; retry in 1 s", retry_after=1)
            if not classifier.metrics.ready_workers():
                raise engine_gone()
        except ServiceError as error:
            return _error(request, error)
        return JSONResponse({"status": "ready"})

    @app.get(
        "/model",
        summary="What is served, and the operating points to choose from",
        response_model=ModelAnswer,
        responses={503: {"model": ErrorAnswer}},
    )
    async def model(request: Request) -> Response:
        """503 until the engine is open, which decides on variant and provider."""
        if not classifier.provider:
            return _error(request, ServiceError("not_ready", NOT_READY, retry_after=1))
        return JSONResponse(_describe(classifier))

    @app.get("/metrics", summary="Figures for Prometheus", response_class=Response)
    async def metrics(request: Request) -> Response:
        try:
            encode, content_type = choose_encoder(request.headers.get("accept", ""))
        except (TypeError, ValueError):  # of a version that is no number
            encode, content_type = choose_encoder("")
        return Response(encode(classifier.metrics.registry), headers={"content-type": content_type})


def _describe(classifier: Classifier) -> dict[str, Any]:
    manifest = classifier.bundle.manifest
    classes = zip(manifest.classes, manifest.class_counts, manifest.splits, strict=True)
    return {
        "name": manifest.name,
        "version": manifest.version,
        "variant": classifier.variant,
        "provider": classifier.provider,
        "experts": manifest.n_experts,
        "classes": [{"label": label, "training_images": count, "split": split} for label, count, split in classes],
        "rule": classifier.operation.rule,
        "thresholds": classifier.operation.thresholds,
        "modes": classifier.operation.modes,
        "max_experts": classifier.operation.max_experts,
        "input": dataclasses.asdict(manifest.input),
        "macs": dataclasses.asdict(manifest.macs),
        "parity": dataclasses.asdict(manifest.variants[classifier.variant].parity),
        "calibration": dataclasses.asdict(manifest.calibration),
        "provenance": manifest.provenance,
    }


def _describe_classify(app: FastAPI) -> None:
    """Put POST /classify into the OpenAPI document, which the application makes once and keeps."""
    document = app.openapi()
    document["paths"]["/classify"] = {"post": classify_operation()}
    document.setdefault("components", {}).setdefault("schemas", {}).update(schema_components())


def _error(request: Request, error: ServiceError) -> Response:
    headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    content = {"request_id": request.state.request_id, "error": error.as_json()}
    return JSONResponse(content, status_code=error.status, headers=headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """404 and 405 of the router, in our shape."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = allowed = ", ".join(sorted(headers["Allow"].split(", ")))
        refusal = ServiceError("method_not_allowed", f"{request.url.path} takes {allowed}, not {request.method}")
    else:
        refusal = ServiceError("not_found", f"there is no {request.url.path[:200]}; see /docs")
    response = _error(request, refusal)
    response.headers.update(headers)
    return response


async def _failed(request: Request, error: Exception) -> Response:
    """500 in our shape; it is made outside of CommonHeaders, and uvicorn logs the error, too."""
    request_id = request.state.request_id
    log(logging.ERROR, "failed", error=error, request_id=request_id, path=request.url.path[:200])
    message = f"our failure, not yours; the log has it under request id {request_id}"
    response = _error(request, ServiceError("internal", message))
    for name, value in common_headers(request_id, request.url.path):
        response.headers[name.decode()] = value.decode()
    return response
