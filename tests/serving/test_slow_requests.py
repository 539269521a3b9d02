"""What takes long before a request runs keeps nobody waiting: long conversations, many texts, large grammars."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest.mock import Mock

import httpx
import llguidance
import pytest

from kajiya.data.chat import ChatTemplate

from .conftest import NAME

TURNS = [{"role": "user" if i % 2 == 0 else "assistant", "content": "ok"} for i in range(9)]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer", "minimum": 7}}}


@contextmanager
def _stuck(owner: Any, name: str, patch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Within, a function of the owner waits until it is left; the event says that somebody is in it."""
    function: Callable[..., Any] = getattr(owner, name)
    is_in, may_go = threading.Event(), threading.Event()

    def slow(*given: Any, **named: Any) -> Any:
        is_in.set()
        assert may_go.wait(60)
        return function(*given, **named)

    patch.setattr(owner, name, slow)
    try:
        yield is_in
    finally:
        may_go.set()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": TURNS}),
        ("completions", {"prompt": ["x"] * 120}),
        ("completions", {"prompt": "x", "response_format": SCHEMA}),
    ],
    ids=["a long conversation", "many texts", "a grammar"],
)
def test_others_do_not_wait_for_what_takes_long(
    server_url: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    if "messages" in body:
        slow: tuple[Any, str] = (ChatTemplate, "ids")
    elif "response_format" in body:
        slow = (llguidance.LLMatcher, "grammar_from_json_schema")
    else:
        slow = (type(tokenizer), "__call__")
    asked = {"model": NAME, "max_tokens": 2, "temperature": 0}
    with ThreadPoolExecutor(1) as pool:
        with _stuck(*slow, monkeypatch) as is_in:
            reply = pool.submit(httpx.post, f"{server_url}/v1/{path}", json=asked | body, timeout=60)
            assert is_in.wait(30)
            assert httpx.get(f"{server_url}/health", timeout=10).status_code == 200
            other = httpx.post(f"{server_url}/v1/completions", json=asked | {"prompt": [5, 6]}, timeout=10)
            assert other.status_code == 200
            assert not reply.done()
        assert reply.result().status_code in (200, 400), reply.result().text


def test_a_conversation_far_too_long_is_refused_before_its_answers_are_looked_for(
    server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_out = Mock(wraps=ChatTemplate.lay_out)
    monkeypatch.setattr(ChatTemplate, "lay_out", lay_out)
    body = {"model": NAME, "messages": [*TURNS[:-1] * 20, TURNS[-1]]}
    reply = httpx.post(f"{server_url}/v1/chat/completions", json=body, timeout=60)
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "context_length_exceeded"
    lay_out.assert_not_called()
    for path, field in (("completions", "prompt"), ("embeddings", "input")):
        reply = httpx.post(f"{server_url}/v1/{path}", json={"model": NAME, field: " " * 13_000}, timeout=60)
        assert reply.status_code == 400
        assert reply.json()["error"]["code"] == "context_length_exceeded"
        assert "far more" in reply.json()["error"]["message"]
