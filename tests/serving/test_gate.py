"""What every request passes: keys as they may be written, bodies that do not come, and the end of the server."""

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from kajiya.config.schema import ServeConfig
from kajiya.serving.api import create_app
from kajiya.serving.engine import Engine
from kajiya.serving.listen import bind, url_of, web_server

from .conftest import NAME, open_engine, running, slow_down


def _begun(url: str) -> socket.socket:
    """A request whose body has not come."""
    host, port = url.removeprefix("http://").split(":")
    raw = socket.create_connection((host, int(port)), timeout=60)
    raw.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: 50\r\n\r\n".encode() + b'{"mo')
    return raw


def test_a_body_that_is_broken_off_is_no_failure_of_the_server(engine: Engine, tokenizer: Any) -> None:
    with running(create_app(engine, tokenizer, NAME, ServeConfig())) as url:
        _begun(url).close()
        lines: list[str] = []
        limit = time.monotonic() + 60
        while not lines:
            assert time.monotonic() < limit
            text = httpx.get(f"{url}/metrics").text
            lines = [line for line in text.splitlines() if line.startswith('kajiya_http_requests_total{endpoint="/v1')]
    assert lines == ['kajiya_http_requests_total{endpoint="/v1/completions",status="499"} 1.0']


def test_bodies_that_do_not_come_are_bounded(model_folder: Path, tokenizer: Any) -> None:
    engine = open_engine(model_folder, max_batch=1, max_waiting=1)
    cfg = ServeConfig(max_batch=1, max_waiting=1, body_timeout_s=0.5)
    with running(create_app(engine, tokenizer, NAME, cfg)) as url, ExitStack() as stack:
        slow = [stack.enter_context(_begun(url)) for _ in range(2)]
        body = {"model": NAME, "prompt": "x", "max_tokens": 1}
        refused = httpx.post(f"{url}/v1/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert httpx.get(f"{url}/v1/models").status_code == 200
        for each in slow:
            assert each.recv(4096).split()[1] == b"408"
        # Only the body's coming is bounded by that, not the answer.
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200


def test_connections_that_say_nothing_or_half_a_head_are_closed(engine: Engine, tokenizer: Any) -> None:
    cfg = ServeConfig(body_timeout_s=0.6)
    with _served(create_app(engine, tokenizer, NAME, cfg), cfg) as (url, _), ExitStack() as stack:
        host, port = url.removeprefix("http://").split(":")
        asked = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        for before, said in ((b"", b""), (b"", b"POST /v1/comple"), (asked, b"GET /hea")):
            raw = stack.enter_context(socket.create_connection((host, int(port)), timeout=60))
            raw.sendall(before)
            heard = b""
            while before and not heard.endswith(b"}}"):
                heard += raw.recv(4096)
                assert heard.startswith(b"HTTP/1.1 200")
            raw.sendall(said)
            last = b""
            while part := raw.recv(4096):
                last += part
            assert last.split()[1] == b"408"
            assert json.loads(last.partition(b"\r\n\r\n")[2])["error"]["code"] == "timeout"
        # An answer may take as long as it does, and a connection is used again.
        slow_down(engine, 0.08)
        with httpx.Client() as client:
            body = {"model": NAME, "prompt": "x", "max_tokens": 12, "ignore_eos": True}  # 0.96 s
            for _ in range(2):
                assert client.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200


@contextmanager
def _logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What the web server logs is among the records."""
    said = logging.getLogger("uvicorn.error")
    said.addHandler(caplog.handler)
    try:
        yield
    finally:
        said.removeHandler(caplog.handler)


@contextmanager
def _served(app: Any, cfg: ServeConfig) -> Iterator[tuple[str, uvicorn.Server]]:
    """The server that `kajiya serve` has, in a thread; its URL."""
    listener = bind("127.0.0.1", 0)
    server = web_server(app, cfg)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        yield url_of(listener), server
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer key", 200),
        ("bearer key", 200),
        ("BEARER  key", 200),
        ("Basic key", 401),
        ("key", 401),
        ("Bearer", 401),
        ("Bearer keys", 401),
    ],
)
def test_the_scheme_of_a_key_has_no_case(engine: Engine, tokenizer: Any, header: str, status: int) -> None:
    with running(create_app(engine, tokenizer, NAME, ServeConfig(api_key="key"))) as url:
        assert httpx.get(f"{url}/v1/models", headers={"Authorization": header}).status_code == status


def test_a_stream_that_the_server_does_not_wait_for_ends_with_an_error(
    engine: Engine, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    slow_down(engine, 0.02)
    cfg = ServeConfig(drain_s=0)
    with _served(create_app(engine, tokenizer, NAME, cfg), cfg) as (url, server), _logged(caplog):
        body = {"model": NAME, "prompt": "x", "max_tokens": 150, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.should_exit = True
            last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "server_stopping"
    # A line says that requests were cut off; none of them is a failure with a traceback.
    assert [record.getMessage().split()[0] for record in caplog.records] == ["Cancel"]


def test_a_server_that_ends_at_once_leaves_no_engine_running(
    engine: Engine, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """As a second Ctrl-C asks: a thread in the middle of a step would be torn down with the process, which aborts."""
    others = {thread for thread in threading.enumerate() if thread.name == "kajiya-engine"}
    slow_down(engine, 0.02)
    cfg = ServeConfig()
    with _served(create_app(engine, tokenizer, NAME, cfg), cfg) as (url, server), _logged(caplog):
        body = {"model": NAME, "prompt": "x", "max_tokens": 150, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as reply:
            next(reply.iter_lines())
            server.should_exit = server.force_exit = True
    assert {thread for thread in threading.enumerate() if thread.name == "kajiya-engine"} <= others
    said_so = [record.getMessage() for record in caplog.records]
    assert [message for message in said_so if "Traceback" in message or "Exception" in message] == []
