"""Mixed traffic for minutes: every answer that ends is the reference's, nothing is stuck, nothing leaks, memory stays."""

import ctypes
import gc
import multiprocessing
import random
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from kajiya.config.schema import ServeConfig
from kajiya.serving.api import create_app
from kajiya.serving.text import TextStream, byte_reader, token_text

from .conftest import CONTEXT, NAME, is_greedy, open_engine, running

N_CLIENTS = 8
SOAK_S = 120
MAX_GROWTH = 32 << 20
"""Bytes of the server's process between the first third and the end; its clients live in another."""
MAX_BODY = 400_000
JSON = {"content-type": "application/json"}
ODD_TEXTS = ("\u202e🤦🏽‍♂️" * 5, "a\x00b", "日本語", "ﷺ" * 3, "\ufeff\u200b", "é" * 3, "🏴󠁧󠁢󠁷󠁬󠁳󠁿", "�")
BAD_BODIES = (b"{", b"\xff", b"[]", b"", b"nul", b'{"model": "tiny", "prompt": "\\ud800"}', b"[" * 5000)


class _Client:
    """One of those that call; what it was told is checked at once, or kept for the end."""

    def __init__(self, number: int, url: str, texts: dict[str, str]) -> None:
        self.draw = random.Random(number)
        self.url = url
        self.http = httpx.Client(base_url=url, timeout=120)
        self.texts = texts
        self.answers: list[tuple[list[int], list[str]]] = []
        self.calls: Counter[str] = Counter()
        self.failure: BaseException | None = None
        self.seeded: dict[int, str] = {}

    def go_on(self, end: float) -> None:
        kinds: list[Callable[[], None]] = [
            self.ask,
            self.ask,
            self.leave_a_stream,
            self.leave_early,
            self.break_off,
            self.send_nonsense,
            self.send_too_much,
            self.speak_oddly,
            self.stop_at_strings,
            self.draw_with_a_seed,
            self.embed,
        ]
        try:
            with self.http:
                while time.monotonic() < end:
                    kind = self.draw.choice(kinds)
                    kind()
                    self.calls[kind.__name__] += 1
        except BaseException as error:
            self.failure = error

    def body(self) -> dict[str, Any]:
        prompt = [self.draw.randrange(1, 512) for _ in range(self.draw.randrange(1, 120))]
        return {"model": NAME, "prompt": prompt, "max_tokens": self.draw.randrange(1, 60), "temperature": 0}

    def ask(self) -> None:
        body = self.body() | {"logprobs": 0, "ignore_eos": True}
        reply = self.http.post("/v1/completions", json=body)
        assert reply.status_code in (200, 429)
        if reply.status_code == 200 and len(self.answers) < 60:
            self.answers.append((body["prompt"], reply.json()["choices"][0]["logprobs"]["tokens"]))

    def leave_a_stream(self) -> None:
        with self.http.stream("POST", "/v1/completions", json=self.body() | {"stream": True, "n": 2}) as reply:
            lines = reply.iter_lines()
            for _ in range(self.draw.randrange(1, 12)):
                next(lines, None)

    def leave_early(self) -> None:
        with pytest.raises(httpx.TimeoutException):
            # So soon that no answer can have come.
            self.http.post("/v1/completions", json=self.body() | {"n": 3, "max_tokens": 60}, timeout=0.001)

    def break_off(self) -> None:
        """Half a body, and the connection is cut."""
        host, port = self.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as raw:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: 500\r\n\r\n"
            raw.sendall(head.encode() + b'{"model": "ti')

    def send_nonsense(self) -> None:
        reply = self.http.post("/v1/completions", content=self.draw.choice(BAD_BODIES), headers=JSON)
        assert reply.status_code == 400

    def send_too_much(self) -> None:
        body = self.body()
        if self.draw.random() < 0.5:
            reply = self.http.post("/v1/completions", json=body | {"prompt": "word " * 60_000})
            assert reply.json()["error"]["code"] == "context_length_exceeded"
            reply = self.http.post("/v1/completions", json=body | {"prompt": [1] * (CONTEXT + 1)})
            assert reply.status_code == 400
        else:
            reply = self.http.post("/v1/completions", json=body | {"prompt": "x" * MAX_BODY})
            assert reply.status_code == 413

    def speak_oddly(self) -> None:
        messages = [{"role": "user", "content": self.draw.choice(ODD_TEXTS)}]
        body = {"model": NAME, "messages": messages, "max_tokens": 20, "stop": ["e", "the "], "seed": 1}
        reply = self.http.post("/v1/chat/completions", json=body)
        assert reply.status_code in (200, 429)
        if reply.status_code == 200:
            assert "e" not in reply.json()["choices"][0]["message"]["content"]

    def stop_at_strings(self) -> None:
        """Any piece of what will be said, wherever its tokens begin."""
        prompt = self.draw.choice(list(self.texts))
        whole = self.texts[prompt]
        start = self.draw.randrange(len(whole) - 6)
        stop = whole[start : start + self.draw.randrange(1, 6)]
        body = {"model": NAME, "prompt": prompt, "max_tokens": 40, "temperature": 0, "ignore_eos": True, "stop": stop}
        reply = self.http.post("/v1/completions", json=body)
        if reply.status_code == 200:
            choice = reply.json()["choices"][0]
            assert (choice["text"], choice["finish_reason"]) == (whole[: whole.index(stop)], "stop")

    def draw_with_a_seed(self) -> None:
        seed = self.draw.randrange(5)
        body = {"model": NAME, "prompt": "class", "max_tokens": 20, "seed": seed, "top_p": 0.9, "ignore_eos": True}
        reply = self.http.post("/v1/completions", json=body)
        if reply.status_code == 200:
            text = reply.json()["choices"][0]["text"]
            assert self.seeded.setdefault(seed, text) == text

    def embed(self) -> None:
        reply = self.http.post("/v1/embeddings", json={"model": NAME, "input": list(ODD_TEXTS[:3])})
        assert reply.status_code in (200, 429)


@dataclass
class _Told:
    """What all clients of a process were told."""

    answers: list[tuple[list[int], list[str]]]
    calls: Counter[str]
    failures: list[str]
    seeded: set[tuple[int, str]]


def _call_for(url: str, texts: dict[str, str], seconds: float) -> _Told:
    """Let every client call, each in a thread of this process."""
    end = time.monotonic() + seconds
    clients = [_Client(i, url, texts) for i in range(N_CLIENTS)]
    threads = [threading.Thread(target=client.go_on, args=(end,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return _Told(
        answers=[answer for client in clients for answer in client.answers],
        calls=sum((client.calls for client in clients), Counter()),
        failures=[repr(client.failure) for client in clients if client.failure],
        seeded={(seed, text) for client in clients for seed, text in client.seeded.items()},
    )


def _held() -> int:
    """Bytes of this process, without those that the allocator keeps for later."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


@pytest.mark.slow
def test_mixed_traffic(model_folder: Path, tokenizer: Any, reference: Any, greedy: Callable[..., list[int]]) -> None:
    # Few blocks for so many, so that some must give theirs up.
    engine = open_engine(model_folder, max_batch=5, max_waiting=64, cache_tokens=256)
    engine.scheduler.step_tokens = 48
    texts = {}
    for prompt in ("def wrap(text, width):", "import os", "x = ("):
        ids = tokenizer.encode(prompt)
        stream = TextStream(tokenizer, ids)
        texts[prompt] = "".join(stream.push(token) for token in greedy(ids, 40, eos=None))
    with running(create_app(engine, tokenizer, NAME, ServeConfig(max_body_bytes=MAX_BODY))) as url:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            calling = pool.submit(_call_for, url, texts, SOAK_S)
            time.sleep(SOAK_S / 3)
            settled = _held()
            told = calling.result()
        grown = _held() - settled
        assert told.failures == []
        assert httpx.get(f"{url}/health").json() | {"engines": {}} == {
            "status": "ok",
            "model": NAME,
            "running": 0,
            "waiting": 0,
            "engines": {},
        }
    assert grown < MAX_GROWTH, f"{grown / 2**20:.1f} MiB"
    assert engine.is_idle
    assert engine._active == set()
    assert engine._sampler._streams == {}
    assert engine.scheduler.pool.n_free == engine.scheduler.pool.n_blocks
    assert engine.scheduler.n_preemptions > 0
    assert len(told.calls) == 10
    assert min(told.calls.values()) > 20, told.calls
    # One client's seed draws what another's does.
    assert len(told.seeded) <= 5
    read = byte_reader(tokenizer)
    ids_of = {token_text(read(token)): token for token in range(512)}
    assert len(told.answers) > 100
    for prompt, tokens in told.answers:
        assert is_greedy(reference, prompt, [ids_of[token] for token in tokens])
