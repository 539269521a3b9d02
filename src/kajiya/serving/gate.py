"""What every request passes: its key, its size, the time it may take; its line in the access log and its count."""

import asyncio
import json
import logging
import secrets
import time
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kajiya.serving.faults import error_body, error_reply
from kajiya.serving.metrics import Metrics

access_log = logging.getLogger("kajiya.access")
"""One JSON line a request: time, method, path, status, seconds, bytes; prompts only where `serve.log_prompts` asks for them."""
_KNOWN = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/embeddings",
    "/v1/models",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/v1/load_model",
    "/v1/unload_model",
    "/health",
    "/ready",
    "/metrics",
    "/openapi.json",
    "/",
)


@dataclass(frozen=True)
class Limits:
    """What a request may be and take."""

    api_key: str | None
    max_body_bytes: int
    timeout_s: float | None
    logs: bool
    logs_prompts: bool


class Gate:
    """Checks the key before anything of a request is read, bounds its size and time, and counts, times and logs the reply."""

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics) -> None:
        self._app = app
        self._key = limits.api_key.encode() if limits.api_key else None
        self._limits = limits
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        status, n_bytes = 500, 0

        async def watched(message: Message) -> None:
            nonlocal status, n_bytes
            if message["type"] == "http.response.start":
                status = message["status"]
            n_bytes += len(message.get("body", b""))
            await send(message)

        body: list[bytes] = []
        try:
            if scope["path"].startswith("/v1/") and not self._has_key(scope):
                refusal = error_reply(
                    "This server needs an API key: send it as 'Authorization: Bearer <key>'.",
                    401,
                    "invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await refusal(scope, receive, watched)
            else:
                await self._bounded(scope, receive, watched, body)
        finally:
            seconds = time.perf_counter() - begun
            endpoint = scope["path"] if scope["path"] in _KNOWN else "other"
            self._metrics.requests.labels(endpoint, str(status)).inc()
            self._metrics.duration.labels(endpoint).observe(seconds)
            if self._limits.logs:
                self._log(scope, status, seconds, n_bytes, body)

    async def _bounded(self, scope: Scope, receive: Receive, send: Send, body: list[bytes]) -> None:
        most = self._limits.max_body_bytes
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > most:
            await _too_large(most)(scope, receive, send)
            return
        # Read whole before the routes see it: a body without a declared length is cut off at the same bound.
        total, more = 0, scope["method"] in ("POST", "PUT", "PATCH", "DELETE")
        chunks: list[bytes] = []
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            chunks.append(message.get("body", b""))
            total += len(chunks[-1])
            if total > most:
                await _too_large(most)(scope, receive, send)
                return
            more = message.get("more_body", False)
        whole: Message | None = {"type": "http.request", "body": b"".join(chunks), "more_body": False}
        if self._limits.logs_prompts:
            body.extend(chunks)

        async def replayed() -> Message:
            nonlocal whole
            if whole is not None:
                message, whole = whole, None
                return message
            return await receive()

        began_reply = is_stream = False

        async def noted(message: Message) -> None:
            nonlocal began_reply, is_stream
            began_reply = True
            if message["type"] == "http.response.start":
                kind = dict(message["headers"]).get(b"content-type", b"")
                is_stream = kind.startswith(b"text/event-stream")
            await send(message)

        try:
            async with asyncio.timeout(self._limits.timeout_s):
                await self._app(scope, replayed, noted)
        except TimeoutError:
            words = f"The answer took longer than this server's limit of {self._limits.timeout_s:g} s."
            if not began_reply:
                await error_reply(words, 504, "timeout")(scope, receive, send)
            elif is_stream:
                event = b"data: " + json.dumps(error_body(words, 504, "timeout")).encode() + b"\n\n"
                await send({"type": "http.response.body", "body": event, "more_body": False})

    def _has_key(self, scope: Scope) -> bool:
        if self._key is None:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return secrets.compare_digest(given, b"Bearer " + self._key)

    def _log(self, scope: Scope, status: int, seconds: float, n_bytes: int, body: list[bytes]) -> None:
        client = scope.get("client")
        line = {
            "time": round(time.time(), 3),
            "client": client[0] if client else None,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": round(seconds, 4),
            "bytes": n_bytes,
        }
        if self._limits.logs_prompts:
            line["body"] = b"".join(body).decode(errors="replace")
        access_log.info(json.dumps(line, ensure_ascii=False))


def _too_large(most: int) -> ASGIApp:
    return error_reply(f"The body is larger than this server's limit of {most} bytes.", 413, "body_too_large")
