"""Errors in the API's own format: `{"error": {"message", "type", "param", "code"}}`."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from kajiya.errors import ConfigError, KajiyaError, RequestError

CLIENT_GONE = 499
"""Status in log and metrics of a reply that nobody waits for any more (nginx's convention)."""
RETRY_AFTER_S = 1
"""What a client is told to wait when the queue is full."""


def error_body(message: str, status: int, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The error object of a reply or of a stream."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_reply(
    message: str, status: int, code: str | None = None, param: str | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    """A reply that says what was wrong."""
    if status == 429:
        headers = {"Retry-After": str(RETRY_AFTER_S)} | (headers or {})
    return JSONResponse(error_body(message, status, code, param), status, headers)


def add_error_handlers(app: FastAPI) -> None:
    """Answer every exception in the API's own format."""

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
        return error_reply(str(error), error.status, error.code, error.param, headers)

    @app.exception_handler(ConfigError)
    async def misnamed(_: Request, error: ConfigError) -> JSONResponse:
        return error_reply(str(error), 400, "invalid_value")

    @app.exception_handler(KajiyaError)
    async def failed(_: Request, error: KajiyaError) -> JSONResponse:
        return error_reply(str(error), 500, "engine_error")

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return error_reply(f"the body is not valid JSON: {first['ctx']['error']}", 400, "invalid_json")
        place = [part for part in first["loc"] if part != "body"]
        param = str(place[0]) if place else None
        if first["type"] == "missing" and param:
            field = ".".join(str(part) for part in place)
            return error_reply(f"{field} is missing", 400, "missing_required_parameter", param)
        given = repr(first.get("input"))
        given = given if len(given) <= 60 else given[:57] + "..."
        problem = first["msg"][:1].lower() + first["msg"][1:]
        if param is None:
            return error_reply(
                f"the body must be a JSON object sent as application/json: {problem}", 400, "invalid_json"
            )
        return error_reply(f"{param}: {problem}, not {given}", 400, "invalid_value", param)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 400 and error.__cause__ is not None:  # bytes that are no UTF-8, or too deep a nesting
            return error_reply(f"the body is not valid JSON: {error.__cause__}", 400, "invalid_json")
        message = {404: f"no such address: {request.url.path}", 405: f"{request.method} is not allowed here"}
        return error_reply(
            message.get(error.status_code, str(error.detail)), error.status_code, headers=dict(error.headers or {})
        )

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> JSONResponse:
        return error_reply("The server failed to answer; its log says why.", 500, type(error).__name__)
