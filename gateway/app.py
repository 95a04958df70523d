"""The application: doors, middleware, health, metrics and the page, put together."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from gateway import front_page, openai, sdapi
from gateway.errors import A1111, ApiError
from gateway.files import Files
from gateway.gate import Gate
from gateway.guard import Guard
from gateway.keys import KeyRing, Limits
from gateway.limits import RATE_HEADERS, Meter
from gateway.metrics import Metrics
from gateway.openai_fields import GenerationBody, check_not_served
from gateway.openapi import describe
from gateway.painting import Studio
from gateway.pool import Pool
from gateway.sdapi_fields import TextToImage
from gateway.validation import error_of

NOT_JSON = (
    "The body cannot be read: it must be JSON in UTF-8, without numbers of thousands of digits "
    "and without hundreds of nested brackets."
)
CODES = {
    400: "invalid_body", 404: "not_found", 405: "method_not_allowed", 408: "body_too_slow",
    413: "body_too_large",
}  # fmt: skip
DESCRIPTION = "OpenAI's images API and A1111's API over Twinbrush servers."


@dataclass(frozen=True)
class Settings:
    """How the gateway behaves.

    Attributes:
        keys: who may use it; without keys, everybody.
        max_body: bytes of a request's body.
        cors_origins: origins whose pages may call it from a browser.
        public_url: that clients reach it by, for URLs of pictures.
        files_bytes, files_seconds: of pictures behind URLs.
        page: whether the page is served, where Gradio is installed.
    """

    keys: KeyRing = field(default_factory=lambda: KeyRing((), Limits()))
    max_body: int = 16 << 20
    cors_origins: Sequence[str] = ()
    public_url: str | None = None
    files_bytes: int = 256 << 20
    files_seconds: float = 3600.0
    page: bool = True


def create_app(pool: Pool, settings: Settings, gate: Gate) -> FastAPI:
    """The gateway over servers. `gate` says when it drains."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await pool.start()
        yield
        await pool.close()

    app = FastAPIOffline(
        redoc_url=None, title="Twinbrush gateway", description=DESCRIPTION, lifespan=lifespan,
        swagger_ui_parameters={"validatorUrl": None},
    )  # fmt: skip
    metrics = Metrics()
    files = Files(settings.files_bytes, settings.files_seconds)
    studio = Studio(pool, Meter(), files, metrics, settings.public_url)
    app.add_middleware(
        Guard, gate=gate, keys=settings.keys, metrics=metrics, max_body=settings.max_body
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"], allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", "retry-after-ms", *RATE_HEADERS],
        )  # fmt: skip
    app.include_router(openai.router(studio))
    app.include_router(sdapi.router(studio))
    _add_health(app, pool, gate, metrics)
    _add_error_handlers(app)
    front_page.mount(app, studio, settings.keys, settings.page)
    vars(app)["openapi"] = functools.partial(describe, app, settings.keys.required)
    return app


def _add_health(app: FastAPI, pool: Pool, gate: Gate, metrics: Metrics) -> None:
    @app.get("/internal/ping", include_in_schema=False)
    async def ping() -> Response:
        """How A1111's page asks whether its server lives."""
        return JSONResponse({})

    @app.get("/health/live", tags=["operation"])
    async def live() -> Response:
        """200 while the process answers."""
        return JSONResponse({"state": "draining" if gate.draining else "live"})

    @app.get("/health/ready", tags=["operation"], responses={503: {}})
    async def ready() -> Response:
        """200 where requests are taken: a server is well, and no drain has begun."""
        servers = {backend.address: backend.healthy for backend in pool.backends}
        if gate.draining:
            return JSONResponse({"state": "draining"}, 503)
        if not pool.ready:
            return JSONResponse({"state": "no server", "servers": servers}, 503)
        return JSONResponse({"state": "ready", "servers": servers})

    @app.get(
        "/metrics", tags=["operation"], response_class=Response,
        responses={200: {"content": {"text/plain": {}}}},
    )  # fmt: skip
    async def read_metrics() -> Response:
        """Prometheus' text form."""
        metrics.outstanding.clear()
        metrics.healthy.clear()
        for backend in pool.backends:
            metrics.outstanding.labels(backend.address).set(backend.outstanding)
            metrics.healthy.labels(backend.address).set(backend.healthy)
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        return error.response(request.url.path)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> Response:
        path = request.url.path
        body = TextToImage if path.startswith(A1111) else GenerationBody
        try:
            if isinstance(error.body, dict):
                check_not_served(error.body)
            found = error_of(error.errors(), error.body, body.model_fields)
        except ApiError as refused:
            found = refused
        return found.response(path)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        text = f"{request.method} {path}: {error.detail}."
        if error.status_code == 400:
            text = NOT_JSON
        elif error.status_code == 404:
            text = (
                f"{request.method} {path} is not served; OpenAI's API is under /v1, A1111's under "
                "/sdapi/v1, and /docs lists both."
            )
        elif allowed := Headers(error.headers).get("allow"):
            text = f"{request.method} {path} is not allowed: use {allowed}."
        response = ApiError(error.status_code, text, code=CODES.get(error.status_code)).response(
            path
        )
        response.headers.update(error.headers or {})
        return response
