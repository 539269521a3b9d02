"""What every request passes: its key, its size, the time it may take; its line in the access log and its count."""

import asyncio
import json
import logging
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kajiya.config.schema import ServeConfig
from kajiya.errors import ConfigError
from kajiya.serving.faults import CLIENT_GONE, error_body, error_reply
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
_OPEN = ("/", "/health", "/ready", "/metrics")
"""What is told without a key; everything else, known or not, wants one."""


def add_gate(app: Starlette, cfg: ServeConfig, metrics: Metrics) -> None:
    """Have every request to `app` pass the gate, and the web origins of `cfg` read what comes back.

    Raises `ConfigError` for a file of keys that cannot be read.
    """
    max_batch = cfg.vllm_max_batch if cfg.engine == "vllm" else cfg.max_batch
    limits = Limits(
        read_keys(cfg.api_key),
        cfg.max_body_bytes,
        max_batch + cfg.max_waiting,
        cfg.request_timeout_s,
        cfg.body_timeout_s,
        cfg.access_log,
        cfg.log_prompts,
    )
    app.add_middleware(Gate, limits=limits, metrics=metrics)
    if cfg.cors_origins:
        # Outside the gate: a browser asks for leave without a key, and shows a page only replies that allow its origin.
        app.add_middleware(
            CORSMiddleware, allow_origins=[*cfg.cors_origins], allow_methods=["GET", "POST"], allow_headers=["*"]
        )


def read_keys(api_key: str | None) -> tuple[str, ...]:
    """The keys that requests may carry: `api_key`, or for `@file` every line of that file; none where none is asked for."""
    if api_key is None:
        return ()
    if not api_key:
        raise ConfigError("serve.api_key", "is empty", "Give a key, or null to serve without one.")
    if not api_key.startswith("@"):
        return (api_key,)
    try:
        text = Path(api_key[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("serve.api_key", f"the file {api_key[1:]!r} cannot be read: {error}") from error
    keys = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not keys:
        raise ConfigError("serve.api_key", f"the file {api_key[1:]!r} has no keys", "Write one key a line into it.")
    return keys


def log_to_stderr() -> None:
    """Write the access log's lines to the error output, as they are."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    access_log.addHandler(handler)
    access_log.setLevel(logging.INFO)
    access_log.propagate = False


@dataclass(frozen=True)
class Limits:
    """What a request may be and take."""

    api_keys: tuple[str, ...]
    max_body_bytes: int
    max_reading: int
    """Bodies that may be under way at once."""
    timeout_s: float | None
    body_timeout_s: float | None
    logs: bool
    logs_prompts: bool


class Gate:
    """Checks the key before anything of a request is read, bounds its size and time, and counts, times and logs the reply."""

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics) -> None:
        self._app = app
        self._keys = [key.encode() for key in limits.api_keys]
        self._limits = limits
        self._metrics = metrics
        self._n_reading = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        status: int | None = None
        n_bytes = 0

        async def watched(message: Message) -> None:
            nonlocal status, n_bytes
            if message["type"] == "http.response.start":
                status = message["status"]
            n_bytes += len(message.get("body", b""))
            await send(message)

        body: list[bytes] = []
        try:
            if scope["path"] not in _OPEN and not self._has_key(scope):
                refusal = error_reply(
                    "This server needs an API key: send it as 'Authorization: Bearer <key>'.",
                    401,
                    "invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await refusal(scope, receive, watched)
            else:
                await self._bounded(scope, receive, watched, body)
            if status is None:
                status = CLIENT_GONE  # in the middle of its body
        finally:
            status = status or 500
            seconds = time.perf_counter() - begun
            endpoint = scope["path"] if scope["path"] in _KNOWN else "other"
            self._metrics.requests.labels(endpoint, str(status)).inc()
            self._metrics.duration.labels(endpoint).observe(seconds)
            if self._limits.logs:
                self._log(scope, status, seconds, n_bytes, body)

    async def _bounded(self, scope: Scope, receive: Receive, send: Send, body: list[bytes]) -> None:
        is_read = began_reply = is_stream = False

        async def noted(message: Message) -> None:
            nonlocal began_reply, is_stream
            began_reply = True
            if message["type"] == "http.response.start":
                kind = dict(message["headers"]).get(b"content-type", b"")
                is_stream = kind.startswith(b"text/event-stream")
            await send(message)

        async def fail(words: str, status: int, code: str) -> None:
            if not began_reply:
                await error_reply(words, status, code)(scope, receive, send)
            elif is_stream:
                event = b"data: " + json.dumps(error_body(words, status, code)).encode() + b"\n\n"
                await send({"type": "http.response.body", "body": event, "more_body": False})

        whole, coming = asyncio.timeout(self._limits.timeout_s), asyncio.timeout(self._limits.body_timeout_s)
        try:
            async with whole:
                async with coming:
                    content = await self._read(scope, receive, noted)
                if content is None:
                    return
                is_read = True
                if self._limits.logs_prompts:
                    body.append(content)
                await self._app(scope, _replayed(content, receive), noted)
        except TimeoutError:
            if not (whole.expired() or coming.expired()):
                raise  # of the application's own
            limit_s = self._limits.timeout_s if whole.expired() else self._limits.body_timeout_s
            limit = f"this server's limit of {limit_s:g} s"
            if is_read:
                await fail(f"The answer took longer than {limit}.", 504, "timeout")
            else:
                await fail(f"The body took longer to come than {limit}.", 408, "timeout")
        except asyncio.CancelledError:
            # The server ends, and has waited as long as it does.
            await fail("The server is stopping.", 503, "server_stopping")
            raise

    async def _read(self, scope: Scope, receive: Receive, send: Send) -> bytes | None:
        """The whole body: one without a declared length is cut off at the same bound. `None` where there is no more to do."""
        most = self._limits.max_body_bytes
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > most:
            await _too_large(most)(scope, receive, send)
            return None
        if scope["method"] not in ("POST", "PUT", "PATCH", "DELETE"):
            return b""
        if self._n_reading >= self._limits.max_reading:
            words = f"The server is busy: {self._n_reading} requests are coming in. Try again shortly."
            await error_reply(words, 429, "queue_full")(scope, receive, send)
            return None
        self._n_reading += 1
        total = 0
        chunks: list[bytes] = []
        try:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                chunks.append(message.get("body", b""))
                total += len(chunks[-1])
                if total > most:
                    await _too_large(most)(scope, receive, send)
                    return None
                if not message.get("more_body", False):
                    return b"".join(chunks)
        finally:
            self._n_reading -= 1

    def _has_key(self, scope: Scope) -> bool:
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        is_bearer = scheme.lower() == b"bearer"  # in any case (RFC 9110, section 11.1)
        return not self._keys or (is_bearer and any(secrets.compare_digest(given.strip(), key) for key in self._keys))

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


def _replayed(content: bytes, receive: Receive) -> Receive:
    """What the routes read the body from, once more."""
    whole: Message | None = {"type": "http.request", "body": content, "more_body": False}

    async def replayed() -> Message:
        nonlocal whole
        if whole is not None:
            message, whole = whole, None
            return message
        return await receive()

    return replayed


def _too_large(most: int) -> ASGIApp:
    return error_reply(f"The body is larger than this server's limit of {most} bytes.", 413, "body_too_large")
