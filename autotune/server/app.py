"""The app: its routes, and what every request passes through."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Response
from fastapi.openapi.utils import get_openapi
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import JSONResponse

from autotune.server import dashboard, jobs, profiles, studies
from autotune.server.auth import OPEN_PATH, Gate, Reader
from autotune.server.entry import Guest
from autotune.server.metrics import Metrics, Watch
from autotune.server.problems import Problem, handle_errors
from autotune.server.schemas import Health
from autotune.server.service import Service, Settings

__all__ = ["create_app"]

COMPRESSION = 5  # of 9: what is sent is made for one who waits


def create_app(settings: Settings, guest: Guest | None = None) -> FastAPI:
    """The service as an ASGI app; the pages alone, for one guest, where there is one.

    Raises AutotuneError for settings that cannot be.
    """
    service = Service(settings, guest)
    app = _App(
        title="BTP Autotune",
        summary="Tune image-token pruning for vision-language models, and hand the profiles out.",
        version="1",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry=None,
    )
    app.state.service, app.state.error_page = service, dashboard.error_page
    metrics = Metrics(service.submissions)
    app.add_middleware(GZipMiddleware, compresslevel=COMPRESSION)
    app.add_middleware(Gate, service=service)
    app.add_middleware(Watch, metrics=metrics)
    handle_errors(app)
    programs = () if guest else (jobs.router, studies.router, profiles.router)
    for router in (*programs, *dashboard.routers):
        app.include_router(router, max_body_size=settings.max_body_bytes)
    _add_health(app)
    if guest is None:
        _add_plain_routes(app, metrics)
    return app


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """With the one schema that no route names by its type."""
        if self.openapi_schema is None:
            schema = get_openapi(
                title=self.title, version=self.version, summary=self.summary, routes=self.routes, servers=self.servers
            )
            problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
            schema["components"]["schemas"] |= {**problem.pop("$defs"), "Problem": problem}
            for unused in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(unused, None)
            self.openapi_schema = schema
        return self.openapi_schema


def _add_health(app: FastAPI) -> None:
    @app.get(OPEN_PATH, operation_id="getHealth", tags=["service"])
    async def health() -> Health:
        """Whether this server answers; the one route that needs no key."""
        return Health()


def _add_plain_routes(app: FastAPI, metrics: Metrics) -> None:
    @app.get("/openapi.json", include_in_schema=False)
    def openapi(key: Reader) -> JSONResponse:
        return JSONResponse(app.openapi())

    @app.get("/metrics", include_in_schema=False)
    def measured(key: Reader) -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)
