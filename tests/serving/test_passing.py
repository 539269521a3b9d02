"""What stands before another server: nothing gets past the key, and what is passed on arrives as it was sent."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from kajiya.config.schema import ServeConfig
from kajiya.serving.passing import proxy

from .conftest import running

KEY = {"Authorization": "Bearer key"}
ITS_KEY = "the other's"
ROOM = 30
"""What a prompt leaves there for its answer, tokens."""


@dataclass
class _There:
    """The other server: what came to it."""

    heard: list[tuple[str, str, bytes]] = field(default_factory=list)
    """Method, path with query as sent, body."""
    keys: set[str | None] = field(default_factory=set)
    is_waiting: threading.Event = field(default_factory=threading.Event)
    is_left: threading.Event = field(default_factory=threading.Event)

    async def answer(self, request: Request) -> Response:
        path, query = request.scope["raw_path"].decode(), request.scope["query_string"].decode()
        body = await request.body()
        self.heard.append((request.method, path + (f"?{query}" if query else ""), body))
        self.keys.add(request.headers.get("authorization"))
        if b"silent" in body:
            return await self._wait_for_its_end(request)
        if b"exact" in body and (json.loads(body)["max_tokens"] or 0) > ROOM:
            return JSONResponse({"error": {"message": f"there is room for {ROOM} tokens"}}, 400)
        if b"wrong" in body:
            return JSONResponse({"error": {"message": "wrong"}}, 400)
        if b"slow" in body:
            return StreamingResponse(self._slowly(), media_type="text/event-stream")
        return JSONResponse({"ok": True}, headers={"access-control-allow-origin": "*"})

    async def _wait_for_its_end(self, request: Request) -> Response:
        self.is_waiting.set()
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.is_left.set()
        return Response()

    async def _slowly(self) -> AsyncIterator[bytes]:
        while True:
            yield b"data: more\n\n"
            await asyncio.sleep(0.5)


@contextmanager
def _behind(cfg: ServeConfig, context_tokens: int = 192) -> Iterator[tuple[str, _There]]:
    there = _There()
    methods = ["GET", "POST", "PUT", "DELETE", "OPTIONS"]
    other = Starlette(routes=[Route("/{path:path}", there.answer, methods=methods)])
    with running(other) as upstream, running(proxy(upstream, cfg, context_tokens, ITS_KEY)) as url:
        yield url, there


def _raw(url: str, target: str, *headers: str) -> int:
    """The status of a POST to `target`, which stands in the request as it is written here."""
    host, port = url.removeprefix("http://").split(":")
    head = [f"POST {target} HTTP/1.1", f"Host: {host}", "Content-Length: 2", "Connection: close", *headers]
    with socket.create_connection((host, int(port)), timeout=30) as raw:
        raw.sendall("\r\n".join([*head, "", "{}"]).encode())
        return int(raw.recv(4096).split()[1])


ROUNDABOUT = [
    "//x/v1/completions",
    "//x//v1/completions",
    "///v1/completions",
    "http://x/v1/completions",
    "/%2fx/v1/completions",
    "/health/../v1/completions",
    "/health%2f..%2fv1/completions",
    "/./v1/completions",
]


@pytest.mark.parametrize("target", ROUNDABOUT)
def test_no_spelling_of_an_address_gets_past_the_key(target: str) -> None:
    with _behind(ServeConfig(api_key="key")) as (url, there):
        assert _raw(url, target) == 401
        assert there.heard == []
        # With the key none of them comes to another path than the one that was asked for.
        # With the key, none of them is taken for an address on another server.
        assert _raw(url, target, "Authorization: Bearer key") in (200, 404)


def test_only_what_watches_a_server_is_told_without_a_key() -> None:
    with _behind(ServeConfig(api_key="key")) as (url, there):
        for path in ("/", "/health", "/metrics", "/ready"):
            assert httpx.get(url + path).status_code == 200
        there.heard.clear()
        there.keys.clear()
        for path in ("/tokenize", "/invocations", "/v1/models", "/openapi.json", "/pooling", "/version"):
            assert httpx.get(url + path).status_code == 401
            assert httpx.post(url + path, json={}).status_code == 401
        assert there.heard == []
        assert httpx.post(f"{url}/tokenize?a=%2F&b", json={"prompt": "é"}, headers=KEY).json() == {"ok": True}
        assert there.heard == [("POST", "/tokenize?a=%2F&b", '{"prompt":"é"}'.encode())]
        # The other server wants its own key, and is not told this one's.
        assert there.keys == {f"Bearer {ITS_KEY}"}


def test_an_answer_has_the_length_that_is_asked_for_here() -> None:
    with _behind(ServeConfig(default_max_tokens=50), context_tokens=40) as (url, there):

        def sent(path: str, body: Any) -> Any:
            httpx.post(url + path, json=body)
            return json.loads(there.heard.pop()[2])

        for path, body in (("/v1/completions", {"prompt": "é"}), ("/v1/chat/completions", {"messages": []})):
            assert sent(path, body) == body | {"max_tokens": 40}
            assert sent(path, body | {"max_tokens": None}) == body | {"max_tokens": 40}
            for name in ("max_tokens", "max_completion_tokens"):
                assert sent(path, body | {name: 30}) == body | {name: 30}
        assert sent("/v1/completions", [1]) == [1]
        assert sent("/v1/embeddings", {"input": "x"}) == {"input": "x"}
        httpx.post(f"{url}/v1/completions", content=b"{")
        assert there.heard.pop()[2] == b"{"


def test_a_prompt_that_leaves_less_than_the_default_is_answered() -> None:
    with _behind(ServeConfig(default_max_tokens=50)) as (url, there):

        def sent(body: Any) -> tuple[int, list[Any]]:
            status = httpx.post(f"{url}/v1/completions", json=body).status_code
            lengths = [json.loads(heard)["max_tokens"] for _, _, heard in there.heard]
            there.heard.clear()
            return status, lengths

        assert sent({"prompt": "exact"}) == (200, [50, None])
        # What was asked for is never changed, and what is wrong besides stays wrong.
        assert sent({"prompt": "exact", "max_tokens": 50}) == (400, [50])
        assert sent({"prompt": "wrong"}) == (400, [50, None])


def test_no_answer_is_longer_than_the_server_allows() -> None:
    with _behind(ServeConfig(default_max_tokens=50, max_answer_tokens=20)) as (url, there):
        for name in ("max_tokens", "max_completion_tokens"):
            for asked in (21, "21", 20.5):
                refused = httpx.post(f"{url}/v1/chat/completions", json={"messages": [], name: asked})
                assert (refused.status_code, refused.json()["error"]["param"]) == (400, name)
                assert "at most 20" in refused.json()["error"]["message"]
            assert httpx.post(f"{url}/v1/chat/completions", json={"messages": [], name: 20}).status_code == 200
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "x"}).status_code == 200
        assert [json.loads(body).get("max_tokens") for _, _, body in there.heard] == [20, None, 20]


def test_a_client_that_leaves_before_anything_came_is_noticed() -> None:
    async def leave(url: str, there: _There) -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            asking = asyncio.create_task(client.post(f"{url}/v1/completions", json={"prompt": "silent"}))
            assert await asyncio.to_thread(there.is_waiting.wait, 60)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            assert await asyncio.to_thread(there.is_left.wait, 60)

    with _behind(ServeConfig(vllm_max_batch=1, max_waiting=1)) as (url, there):
        for _ in range(3):  # and its place is free again
            there.is_waiting.clear()
            there.is_left.clear()
            asyncio.run(leave(url, there))


def test_other_sites_read_what_the_settings_let_them() -> None:
    headers = {"Origin": "https://example.org"}
    with _behind(ServeConfig()) as (url, _):
        # What the other server allows is not this one's word.
        assert "access-control-allow-origin" not in httpx.get(f"{url}/v1/models", headers=headers).headers
    with _behind(ServeConfig(cors_origins=("https://example.org",))) as (url, _):
        reply = httpx.get(f"{url}/v1/models", headers=headers)
        assert reply.headers.get_list("access-control-allow-origin") == ["https://example.org"]


def test_as_many_are_passed_on_as_are_let_in() -> None:
    """More than the 100 connections that an HTTP client opens by itself."""

    async def crowd(url: str) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(limits=limits, timeout=60) as client, AsyncExitStack() as stack:
            kept = []  # an iterator that is let go of closes its reply
            for _ in range(110):
                slow = client.stream("POST", f"{url}/v1/completions", json={"prompt": "slow"})
                kept.append((await stack.enter_async_context(slow)).aiter_lines())
                assert await anext(kept[-1]) == "data: more"
            refused = await client.post(f"{url}/v1/completions", json={"prompt": "x"})
            assert refused.status_code == 429
            assert (await client.get(f"{url}/ready")).status_code == 503

    with _behind(ServeConfig(vllm_max_batch=100, max_waiting=10)) as (url, there):
        asyncio.run(crowd(url))
        assert [method for method, _, _ in there.heard].count("POST") == 110


def test_a_server_that_is_gone_is_said() -> None:
    with running(proxy("http://127.0.0.1:9", ServeConfig(), 192, ITS_KEY)) as url:
        reply = httpx.post(f"{url}/v1/completions", json={"prompt": "x"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_stopped")
        assert httpx.get(f"{url}/ready").status_code == 503
