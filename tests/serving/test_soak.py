"""Mixed traffic for a while: every answer that ends is the reference's, nothing is stuck, nothing leaks."""

import gc
import random
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from kajiya.config.schema import ServeConfig
from kajiya.serving.api import create_app

from .conftest import CONTEXT, NAME, is_greedy, open_engine, running

N_CLIENTS = 8
N_CALLS = 60


@pytest.mark.slow
def test_mixed_traffic(model_folder: Path, tokenizer: Any, reference: Any) -> None:
    engine = open_engine(model_folder, max_batch=5, max_waiting=64)
    engine.scheduler.step_tokens = 48
    answers: list[tuple[list[int], list[str]]] = []
    statuses: list[int] = []
    failures: list[BaseException] = []

    def client(number: int, url: str) -> None:
        draw = random.Random(number)
        try:
            with httpx.Client(base_url=url, timeout=120) as http:
                for _ in range(N_CALLS):
                    _call(draw, http)
        except BaseException as error:
            failures.append(error)

    def _call(draw: random.Random, http: httpx.Client) -> None:
        prompt = [draw.randrange(1, 512) for _ in range(draw.randrange(1, 120))]
        body = {"model": NAME, "prompt": prompt, "max_tokens": draw.randrange(1, 60), "temperature": 0}
        kind = draw.randrange(7)
        if kind <= 2:
            reply = http.post("/v1/completions", json=body | {"logprobs": 0, "ignore_eos": True})
            statuses.append(reply.status_code)
            if reply.status_code == 200:
                answers.append((prompt, reply.json()["choices"][0]["logprobs"]["tokens"]))
        elif kind == 3:
            with http.stream("POST", "/v1/completions", json=body | {"stream": True, "n": 2}) as reply:
                lines = reply.iter_lines()
                for _ in range(draw.randrange(1, 12)):
                    next(lines, None)
        elif kind == 4:
            bad = draw.choice([b"{", b"\xff", b"[]", b'{"model": "tiny", "prompt": "\\ud800"}'])
            reply = http.post("/v1/completions", content=bad, headers={"content-type": "application/json"})
            assert reply.status_code == 400
        elif kind == 5:
            reply = http.post("/v1/completions", json=body | {"prompt": prompt + [1] * CONTEXT})
            assert reply.status_code == 400
        else:
            text = draw.choice(["\u202e🤦🏽‍♂️" * 5, "a\x00b", "日本語", "ﷺ" * 3])
            messages = [{"role": "user", "content": text}]
            reply = http.post(
                "/v1/chat/completions",
                json={"model": NAME, "messages": messages, "max_tokens": 20, "stop": ["e", "the "], "seed": 1},
            )
            statuses.append(reply.status_code)

    with running(create_app(engine, tokenizer, NAME, ServeConfig())) as url:
        threads = [threading.Thread(target=client, args=(i, url)) for i in range(N_CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert set(statuses) <= {200, 429}
        assert statuses.count(200) > N_CLIENTS * N_CALLS / 3
        health = httpx.get(f"{url}/health").json()
        assert health["status"] == "ok"
    assert engine.is_idle
    assert engine._active == set()
    assert engine._sampler._streams == {}
    gc.collect()
    ids_of = {text: token for token in range(512) if (text := _text(tokenizer, token)) is not None}
    checked = 0
    for prompt, tokens in answers:
        ids = [ids_of[token] for token in tokens]
        assert is_greedy(reference, prompt, ids)
        checked += 1
    assert checked > 50


def _text(tokenizer: Any, token: int) -> str | None:
    from kajiya.serving.text import byte_reader, token_text

    return token_text(byte_reader(tokenizer)(token))
