"""What every request passes: keys as they may be written, bodies that do not come, and the end of the server."""

import asyncio
import json
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from kajiya.config.schema import ServeConfig
from kajiya.serving.api import create_app
from kajiya.serving.engine import Engine
from kajiya.serving.listen import bind, url_of, web_server

from .conftest import NAME, open_engine, running


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


def test_a_stream_that_the_server_does_not_wait_for_ends_with_an_error(engine: Engine, tokenizer: Any) -> None:
    real = engine.runner.run

    def slow(plan: Any) -> Any:
        time.sleep(0.02)
        return real(plan)

    engine.runner.run = slow  # type: ignore[method-assign]
    listener = bind("127.0.0.1", 0)
    cfg = ServeConfig(drain_s=0)
    server = web_server(create_app(engine, tokenizer, NAME, cfg), cfg)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        body = {"model": NAME, "prompt": "x", "max_tokens": 150, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url_of(listener)}/v1/completions", json=body, timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.should_exit = True
            last = [line for line in lines if line][-1]
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "server_stopping"
