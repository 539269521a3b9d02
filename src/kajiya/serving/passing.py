"""Requests passed on to another server on this machine, and its replies, piece by piece."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from kajiya.config.schema import ServeConfig
from kajiya.serving.api import playground_page
from kajiya.serving.faults import error_reply
from kajiya.serving.gate import add_gate
from kajiya.serving.generation import unless_gone
from kajiya.serving.metrics import Metrics

_GENERATING = ("/v1/completions", "/v1/chat/completions")
_LENGTHS = ("max_tokens", "max_completion_tokens")
_OWN_HEADERS = ("host", "content-length", "authorization")
_METHODS = ["GET", "POST", "PUT", "DELETE", "OPTIONS"]


def proxy(upstream: str, cfg: ServeConfig, context_tokens: int, key: str) -> Starlette:
    """An application that passes every request on, streams included, and serves the playground page itself.

    `context_tokens` is the longest text that the model there takes, `key` the one that it asks of this server.
    """
    passing = _Passing(upstream, cfg, context_tokens, key)

    async def page(_: Request) -> Response:
        return playground_page()

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await passing.client.aclose()

    routes = [
        Route("/", page),
        Route("/ready", passing.ready),
        Route("/{path:path}", passing.forward, methods=_METHODS),
    ]
    app = Starlette(routes=routes, lifespan=lifespan)
    add_gate(app, cfg, Metrics())
    return app


class _Passing:
    """The other server, and how many requests it has from here."""

    def __init__(self, upstream: str, cfg: ServeConfig, context_tokens: int, key: str) -> None:
        # Requests are counted here; the client's own bound on connections would hold them up unseen.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
        self.client = httpx.AsyncClient(timeout=None, limits=limits)
        self._upstream = httpx.URL(upstream)
        self._key = {"authorization": f"Bearer {key}"}
        self._max_answer_tokens = cfg.max_answer_tokens
        self._default_tokens = min(cfg.default_max_tokens, context_tokens, cfg.max_answer_tokens or context_tokens)
        self._most = cfg.vllm_max_batch + cfg.max_waiting
        self._n_open = 0

    async def ready(self, _: Request) -> Response:
        """Whether a request sent now would be taken."""
        try:
            health = await self.client.get(self._at(b"/health"), timeout=5)
            is_ready = health.is_success and self._n_open < self._most
        except httpx.TransportError:
            is_ready = False
        return JSONResponse({"status": "ready" if is_ready else "busy"}, 200 if is_ready else 503)

    async def forward(self, request: Request) -> Response:
        """The other server's reply to the request."""
        path: bytes = request.scope["raw_path"]
        if not path.startswith(b"/") or path.startswith(b"//"):
            # As a URL, it would name another server or another path than the gate has seen.
            return error_reply(f"no such address: {request.url.path}", 404)
        if request.method == "POST" and self._n_open >= self._most:
            return error_reply(
                f"The server is busy: {self._n_open} requests run or wait. Try again shortly.", 429, "queue_full"
            )
        content = await request.body()
        body = _json_object(content) if request.scope["path"] in _GENERATING else None
        problem = None if body is None else self._too_long(body)
        if problem is not None:
            return problem
        self._n_open += 1
        reply: Response | None = None
        try:
            reply = await unless_gone(request, self._sent(request, self._bodies(content, body)))
            return reply
        finally:
            if not isinstance(reply, PassedOn):
                self._n_open -= 1

    async def _sent(self, request: Request, bodies: list[bytes]) -> Response:
        """The reply to the first of the bodies that is not refused, or to the last."""
        headers = {key: value for key, value in request.headers.items() if key not in _OWN_HEADERS} | self._key
        target = self._at(request.scope["raw_path"], request.scope["query_string"])
        try:
            for content in bodies:
                sent = self.client.build_request(request.method, target, headers=headers, content=content)
                reply = await self.client.send(sent, stream=True)
                if reply.status_code != 400 or content is bodies[-1]:
                    break
                await reply.aclose()
        except httpx.TransportError as error:
            return error_reply(f"The engine does not answer: {error}", 503, "engine_stopped")
        return self._passed_on(reply)

    def _passed_on(self, reply: httpx.Response) -> "PassedOn":
        async def close() -> None:
            self._n_open -= 1
            await reply.aclose()

        # Which origins may read it is this server's to say.
        kept = {
            key: value
            for key, value in reply.headers.items()
            if key not in ("content-length", "transfer-encoding") and not key.startswith("access-control-")
        }
        return PassedOn(reply.aiter_raw(), reply.status_code, kept, close)

    def _at(self, path: bytes, query: bytes = b"") -> httpx.URL:
        return self._upstream.copy_with(raw_path=path + (b"?" + query if query else b""))

    def _too_long(self, body: Mapping[str, Any]) -> Response | None:
        """What to say to a body that asks for more than `serve.max_answer_tokens`."""
        most = self._max_answer_tokens
        for name in _LENGTHS:
            asked = body.get(name)
            # vLLM would read a text or a fraction as a number, too.
            if most is not None and asked is not None and (not isinstance(asked, int) or asked > most):
                message = f"{name} must be at most {most} on this server, not {asked!r}"
                return error_reply(message, 400, "invalid_value", name)
        return None

    def _bodies(self, content: bytes, body: Mapping[str, Any] | None) -> list[bytes]:
        """What to send for a body that is `content`: where it asks for no length, one with `serve.default_max_tokens`.

        vLLM has defaults of its own. It refuses a length past what the prompt leaves; behind that comes one with a null, which
        is all that the context has left.
        """
        if body is None or any(body.get(name) is not None for name in _LENGTHS):
            return [content]
        return [json.dumps({**body, "max_tokens": length}).encode() for length in (self._default_tokens, None)]


def _json_object(content: bytes) -> dict[str, Any] | None:
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


class PassedOn(StreamingResponse):
    """Says when it is over, however it ended: a client that goes away is what makes the other server take its work back."""

    def __init__(
        self,
        pieces: AsyncIterator[bytes],
        status: int,
        headers: Mapping[str, str],
        on_close: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(pieces, status, headers)
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._on_close()
