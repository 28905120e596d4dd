"""Every error as JSON in the shape that OpenAI clients understand."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from bitgrain.errors import BitgrainError, ManyProblemsError, PromptTooLongError, RequestError
from bitgrain.server.fields import BadRequest
from bitgrain.server.running import ClientLeft

CLIENT_CLOSED_REQUEST = 499  # the status that proxies log for it; nobody is left to read it


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe(error: BitgrainError) -> tuple[int, dict[str, Any]]:
    """(HTTP status, body) of an error."""
    if isinstance(error, BadRequest):
        return error.status, error_body(str(error), error.status, error.param, error.code)
    if isinstance(error, PromptTooLongError):
        return 400, error_body(str(error), 400, error.where, "context_length_exceeded")
    if isinstance(error, RequestError):
        return 400, error_body(str(error), 400, error.where)
    code = "many_problems" if isinstance(error, ManyProblemsError) else type(error).__name__
    return 500, error_body(str(error), 500, code=code)


def wrong_model(name: str, known: tuple[str, ...]) -> BadRequest:
    return BadRequest(
        "model",
        f"the model {name!r} is not served here",
        f"one of {', '.join(map(repr, known))}",
        "use a listed name, or leave `model` out",
        param="model",
        status=404,
        code="model_not_found",
    )


def install(app: FastAPI) -> None:
    """Make the application answer every error in this shape."""

    @app.exception_handler(BitgrainError)
    async def on_bitgrain_error(_: HttpRequest, error: BitgrainError) -> Response:
        status, body = describe(error)
        return JSONResponse(body, status)

    @app.exception_handler(HTTPException)
    async def on_http_error(http: HttpRequest, error: HTTPException) -> Response:
        message = f"{http.method} {http.url.path}: {HTTPStatus(error.status_code).phrase}"
        if error.status_code == 404:
            routes = sorted({getattr(route, "path", "") for route in app.routes} - {""})
            message += f"\n  needed: one of {', '.join(routes)}\n  to do:  correct the path"
        elif error.status_code == 405:
            message += f"\n  needed: {(error.headers or {}).get('Allow', 'another method')}\n  to do:  use that method"
        return JSONResponse(error_body(message, error.status_code), error.status_code, headers=error.headers)

    @app.exception_handler(ClientLeft)
    async def on_client_left(_: HttpRequest, __: ClientLeft) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(Exception)
    async def on_defect(_: HttpRequest, error: Exception) -> Response:
        message = (
            f"request: an unexpected {type(error).__name__}\n  needed: a request without one\n  to do:  see the server's log, and report it"
        )
        return JSONResponse(error_body(message, 500, code="defect"), 500)
