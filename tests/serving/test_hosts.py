"""The models of a server: who is loaded, how often, and what is left of those that were let go."""

import asyncio
import gc
import json
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from kajiya.config.schema import ServeConfig
from kajiya.errors import ConfigError
from kajiya.serving.api import create_app
from kajiya.serving.engine import Engine
from kajiya.serving.hosts import Source, source_of
from kajiya.serving.server import serve

from .conftest import CONTEXT, NAME, open_engine, running, save_adapter, slow_down

BODY = {"model": "other", "prompt": "x", "max_tokens": 1}


def _until(holds: Callable[[], bool]) -> None:
    limit = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.01)


class _Opener:
    """Opens the model when it may, and knows what it has opened."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.source = Source("other", self._open)
        self.opened: list[weakref.ref[Engine]] = []
        self.n_begun = 0
        self.go_on = threading.Event()
        self._folder = folder
        self._tokenizer = tokenizer

    def _open(self) -> tuple[Engine, Any]:
        self.n_begun += 1
        assert self.go_on.wait(60)
        engine = open_engine(self._folder)
        self.opened.append(weakref.ref(engine))
        return engine, self._tokenizer

    def is_gone(self) -> bool:
        gc.collect()
        return len(self.opened) == 1 and self.opened[0]() is None


@pytest.fixture
def opener(model_folder: Path, tokenizer: Any) -> _Opener:
    return _Opener(model_folder, tokenizer)


def test_nothing_is_left_of_a_model_that_was_let_go(engine: Engine, tokenizer: Any, opener: _Opener) -> None:
    opener.go_on.set()
    app = create_app(engine, tokenizer, NAME, ServeConfig(idle_unload_s=0.1), {"other": opener.source})
    with running(app) as url:
        assert httpx.post(f"{url}/v1/completions", json=BODY, timeout=60).status_code == 200
        _until(opener.is_gone)
        assert httpx.post(f"{url}/v1/completions", json=BODY, timeout=60).status_code == 200
        assert opener.n_begun == 2


def test_a_model_that_is_removed_while_it_loads_is_not_there(engine: Engine, tokenizer: Any, opener: _Opener) -> None:
    cfg = ServeConfig(allow_loading=True)
    app = create_app(engine, tokenizer, NAME, cfg, {"other": opener.source}, open_engine)
    with running(app) as url, ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(httpx.post, f"{url}/v1/completions", json=BODY, timeout=60) for _ in range(2)]
        _until(lambda: opener.n_begun == 1)
        assert httpx.post(f"{url}/v1/unload_model", json={"name": "other"}).status_code == 200
        opener.go_on.set()
        for each in asked:
            assert each.result().status_code == 404
            assert each.result().json()["error"]["code"] == "model_not_found"
        _until(opener.is_gone)
        assert [card["id"] for card in httpx.get(f"{url}/v1/models").json()["data"]] == [NAME]
        assert httpx.post(f"{url}/v1/unload_model", json={"name": "other"}).status_code == 404


def test_an_answer_of_a_model_that_is_unloaded_ends_with_an_error_that_says_so(
    model_folder: Path, engine: Engine, tokenizer: Any
) -> None:
    other = open_engine(model_folder)
    slow_down(other, 0.02)
    source = Source("other", lambda: (other, tokenizer))
    app = create_app(engine, tokenizer, NAME, ServeConfig(allow_loading=True), {"other": source}, open_engine)
    body = BODY | {"max_tokens": 150, "ignore_eos": True, "stream": True}
    with running(app) as url, httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as reply:
        lines = reply.iter_lines()
        next(lines)
        assert httpx.post(f"{url}/v1/unload_model", json={"name": "other"}).status_code == 200
        last = [line for line in lines if line][-1]
    assert "its model is being unloaded" in json.loads(last.removeprefix("data: "))["error"]["message"]


def test_a_model_is_loaded_once_though_clients_leave(engine: Engine, tokenizer: Any, opener: _Opener) -> None:
    cfg = ServeConfig(request_timeout_s=0.2)
    with running(create_app(engine, tokenizer, NAME, cfg, {"other": opener.source})) as url:
        for _ in range(2):
            assert httpx.post(f"{url}/v1/completions", json=BODY, timeout=60).status_code == 504
        opener.go_on.set()
        _until(lambda: httpx.post(f"{url}/v1/completions", json=BODY, timeout=60).status_code == 200)
    assert opener.n_begun == len(opener.opened) == 1


def test_a_model_that_does_not_load_can_be_asked_for_again(engine: Engine, tokenizer: Any, opener: _Opener) -> None:
    def fails() -> tuple[Engine, Any]:
        raise ConfigError("serve.models", "the disk is away")

    with running(create_app(engine, tokenizer, NAME, ServeConfig(), {"other": Source("other", fails)})) as url:
        for _ in range(2):
            reply = httpx.post(f"{url}/v1/completions", json=BODY)
            assert (reply.status_code, "the disk is away" in reply.text) == (400, True)


def test_an_adapter_stays_while_a_text_is_read_with_it(tmp_path: Path, engine: Engine, tokenizer: Any) -> None:
    read, begun, go_on = engine.runner.hidden, threading.Event(), threading.Event()

    def held(chunk: Any) -> Any:
        begun.set()
        assert go_on.wait(60)
        return read(chunk)

    engine.runner.hidden = held  # type: ignore[method-assign]
    engine.load_adapter("tuned", save_adapter(tmp_path / "adapter"))
    name = {"lora_name": "tuned"}
    app = create_app(engine, tokenizer, NAME, ServeConfig(allow_loading=True), {}, open_engine)
    with running(app) as url, ThreadPoolExecutor(1) as pool:
        text = pool.submit(httpx.post, f"{url}/v1/embeddings", json={"model": "tuned", "input": "x"}, timeout=60)
        assert begun.wait(60)
        refused = httpx.post(f"{url}/v1/unload_lora_adapter", json=name)
        assert (refused.status_code, refused.json()["error"]["param"]) == (409, "name")
        go_on.set()
        assert text.result().status_code == 200
        assert httpx.post(f"{url}/v1/unload_lora_adapter", json=name).status_code == 200
        assert httpx.post(f"{url}/v1/embeddings", json={"model": "tuned", "input": "x"}).status_code == 404


def test_texts_are_read_no_further_for_a_client_that_left(engine: Engine, tokenizer: Any) -> None:
    read, first, go_on, n_read = engine.runner.hidden, threading.Event(), threading.Event(), 0

    def counted(chunk: Any) -> Any:
        nonlocal n_read
        n_read += 1
        first.set()
        assert go_on.wait(60)
        return read(chunk)

    engine.runner.hidden = counted  # type: ignore[method-assign]

    async def leave(url: str) -> None:
        async with httpx.AsyncClient(timeout=60) as http:
            asking = asyncio.create_task(http.post(f"{url}/v1/embeddings", json={"model": NAME, "input": ["x"] * 50}))
            await asyncio.to_thread(first.wait, 60)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    with running(create_app(engine, tokenizer, NAME, ServeConfig())) as url:
        asyncio.run(leave(url))
        _until(lambda: 'endpoint="/v1/embeddings",status="499"' in httpx.get(f"{url}/metrics").text)
        go_on.set()
        # Whoever comes next is next.
        assert httpx.post(f"{url}/v1/embeddings", json={"model": NAME, "input": "y"}, timeout=60).status_code == 200
    assert n_read == 2


def test_the_default_length_is_what_the_cache_leaves(model_folder: Path, tokenizer: Any) -> None:
    engine = open_engine(model_folder, cache_tokens=64)
    with running(create_app(engine, tokenizer, NAME, ServeConfig(default_max_tokens=150))) as url:
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["max_model_len"] == 64 < CONTEXT
        body = {"model": NAME, "prompt": [5] * 14, "ignore_eos": True}
        reply = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        assert reply.json()["usage"]["completion_tokens"] == 50
        for length in (64, 65):
            refused = httpx.post(f"{url}/v1/completions", json=body | {"prompt": [5] * length})
            assert refused.status_code == 400
            assert (refused.json()["error"]["code"], refused.json()["error"]["param"]) == ("cache_exceeded", "prompt")


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"models": {"here": "x"}}, "serve.models.here"),
        ({"adapters": {"here": "x"}}, "serve.adapters.here"),
        ({"models": {"twice": "x"}, "adapters": {"twice": "y"}}, "serve.models.twice"),
        ({"models": {"named": "x"}, "model_name": "named"}, "serve.models.named"),
    ],
)
def test_names_are_told_apart_before_anything_is_loaded(tmp_path: Path, settings: Any, field: str) -> None:
    with pytest.raises(ConfigError, match="name of another") as caught:
        serve(ServeConfig(port=0, **settings), tmp_path, "here", lambda url: None)
    assert caught.value.field == field


def test_what_was_counted_stays_when_a_model_is_let_go(engine: Engine, tokenizer: Any, model_folder: Path) -> None:
    cfg = ServeConfig(allow_loading=True)
    app = create_app(
        engine, tokenizer, NAME, cfg, {"other": source_of("other", model_folder, open_engine)}, open_engine
    )
    with running(app) as url:

        def shared() -> float:
            lines = httpx.get(f"{url}/metrics").text.splitlines()
            assert "# TYPE kajiya_shared_prompt_tokens_total counter" in lines
            return next(
                float(line.split()[1]) for line in lines if line.startswith("kajiya_shared_prompt_tokens_total")
            )

        for _ in range(2):
            body = BODY | {"prompt": [5] * 40}
            assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
        assert shared() == 32
        assert httpx.post(f"{url}/v1/unload_model", json={"name": "other"}).status_code == 200
        assert shared() == 32
