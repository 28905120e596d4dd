"""The application: every route of the server."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from starlette.responses import HTMLResponse, JSONResponse, Response

import bitgrain
from bitgrain.server import failures, metrics
from bitgrain.server.chat import chat_router
from bitgrain.server.completions import completions_router
from bitgrain.server.generate import generate_router
from bitgrain.server.served import ANY_MODEL, Served


def create_app(served: Served) -> FastAPI:
    """An ASGI application around a running engine; closing the engine is the caller's."""
    # the generated documentation pages would load scripts from elsewhere
    app = FastAPI(title="bitgrain", version=bitgrain.__version__, docs_url=None, redoc_url=None, openapi_url=None)
    failures.install(app)
    for router in (generate_router(served), completions_router(served), chat_router(served)):
        app.include_router(router)
    _add_information(app, served)
    return app


def _add_information(app: FastAPI, served: Served) -> None:
    engine = served.engine
    page = files("bitgrain.server").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/")
    async def index() -> Response:
        return HTMLResponse(page)

    @app.get("/health")
    async def health() -> Response:
        alive = engine.is_alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(served, name) for name in served.names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name not in served.names:
            raise failures.wrong_model(name, (*served.names, ANY_MODEL))
        return _model(served, name)

    @app.get("/get_model_info")
    async def model_info() -> dict[str, Any]:
        return _model_info(served)

    @app.get("/plan")
    async def plan() -> dict[str, Any]:
        return dict(served.plan)

    @app.get("/metrics")
    async def metrics_text() -> Response:
        return Response(metrics.render(engine.statistics, served.name), media_type=metrics.CONTENT_TYPE)


def _model(served: Served, name: str) -> dict[str, Any]:
    limit = served.engine.model.max_context
    return {"id": name, "object": "model", "created": served.started, "owned_by": "bitgrain", "root": served.path, "max_model_len": limit}


def _model_info(served: Served) -> dict[str, Any]:
    engine = served.engine
    return {
        "model_path": served.path,
        "tokenizer_path": served.path,
        "preferred_sampling_params": engine.suggested_sampling,
        "is_generation": True,
        "served_model_name": served.name,
        "max_context": engine.model.max_context,
        "vocab_size": engine.model.vocab_size,
        "max_running_requests": engine.options.max_running_requests,
        "chunked_prefill_size": engine.options.chunked_prefill_size,
        "has_chat_template": engine.tokenizer is not None and engine.tokenizer.has_chat_template,
        "version": bitgrain.__version__,
    }
