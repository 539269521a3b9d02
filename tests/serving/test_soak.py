"""Mixed traffic of thousands of calls: every answer that ends is the reference's, nothing is stuck, nothing leaks, memory stays."""

import copy
import ctypes
import gc
import json
import multiprocessing
import random
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from safetensors.torch import load_file

from kajiya.config.schema import ServeConfig
from kajiya.run.process import share_heaps
from kajiya.serving.api import create_app
from kajiya.serving.sequence import SamplingParams
from kajiya.serving.text import TextStream, byte_reader, token_text

from .conftest import CONTEXT, NAME, is_greedy, open_engine, running, save_adapter

N_CLIENTS = 8
ROUNDS = 42
"""Calls of each kind by each client, of which there are 17: 5,712 together."""
MAX_GROWTH = 48 << 20
"""Bytes of the server's process between the first third of the calls and the last, 13 KiB a call; its clients live in another. What
grows, where something does, is what the allocator cannot give back: free memory between blocks in use, whose sum stays."""
SOAK_S = 360
"""Longest wait for either part of the calls."""
MAX_BODY = 400_000
TUNED = "tuned"
"""The adapter that is served beside the model."""
PENALTIES: dict[str, Any] = {"frequency_penalty": 1.5, "presence_penalty": 0.5, "logit_bias": {"7": 3}}
N_MEMBERS = 2100
"""More alternatives than llguidance takes, which it finds behind the first character of an answer."""
SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"], "additionalProperties": False}
TEMPLATE = (
    "{% for each in tools or [] %}{{ each.function.description }}\n{% endfor %}"
    "{% for each in messages %}{{ each.role }}: {{ each.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""Short, so that a tool finds room in the model's context."""
JSON = {"content-type": "application/json"}
ODD_TEXTS = ("\u202e🤦🏽‍♂️" * 5, "a\x00b", "日本語", "ﷺ" * 3, "\ufeff\u200b", "é" * 3, "🏴󠁧󠁢󠁷󠁬󠁳󠁿", "�")
BAD_BODIES = (b"{", b"\xff", b"[]", b"", b"nul", b'{"model": "tiny", "prompt": "\\ud800"}', b"[" * 5000)


@dataclass(frozen=True)
class _Heard:
    """An answer to be compared at the end."""

    prompt: list[int]
    tokens: list[str]
    text: str
    is_stream: bool = False
    model: str = NAME
    is_punished: bool = False


class _Client:
    """One of those that call; what it was told is checked at once, or kept for the end."""

    def __init__(self, number: int, url: str, texts: dict[str, str], adapter: Path) -> None:
        self.draw = random.Random(number)
        self.own = f"own-{number}"
        self.adapter = adapter
        self.url = url
        self.http = httpx.Client(base_url=url, timeout=120)
        self.texts = texts
        self.answers: list[_Heard] = []
        self.calls: Counter[str] = Counter()
        self.failure: BaseException | None = None
        self.seeded: dict[int, str] = {}

    def go_on(self, n_rounds: int) -> None:
        """In each round every kind of call once, in any order."""
        kinds: list[Callable[[], None]] = [
            self.ask,
            self.ask,
            self.follow_a_stream,
            self.leave_a_stream,
            self.leave_early,
            self.break_off,
            self.send_nonsense,
            self.send_too_much,
            self.speak_oddly,
            self.stop_at_strings,
            self.draw_with_a_seed,
            self.punish,
            self.fill_in_a_form,
            self.call_a_tool,
            self.embed,
            self.fail_a_grammar,
            self.come_and_go,
        ]
        try:
            with self.http:
                for _ in range(n_rounds):
                    for kind in self.draw.sample(kinds, len(kinds)):
                        kind()
                        self.calls[kind.__name__] += 1
        except BaseException as error:
            self.failure = error

    def body(self) -> dict[str, Any]:
        prompt = [self.draw.randrange(1, 512) for _ in range(self.draw.randrange(1, 120))]
        model = self.draw.choice((NAME, TUNED))
        return {"model": model, "prompt": prompt, "max_tokens": self.draw.randrange(1, 60), "temperature": 0}

    def ask(self) -> None:
        self.hear(is_punished=False)

    def punish(self) -> None:
        self.hear(is_punished=True)

    def hear(self, is_punished: bool, own: str | None = None) -> None:
        """An answer of the model or the adapter, which is known as `own` too."""
        body = self.body() | {"logprobs": 0, "ignore_eos": True} | (PENALTIES if is_punished else {})
        reply = self.answered("/v1/completions", body | ({"model": own} if own else {}))
        if reply is not None:
            choice = reply["choices"][0]
            tokens, text = choice["logprobs"]["tokens"], choice["text"]
            model = TUNED if own else body["model"]
            self.keep(_Heard(body["prompt"], tokens, text, model=model, is_punished=is_punished))

    def come_and_go(self) -> None:
        """An adapter that is loaded for one answer and let go."""
        asked = {"lora_name": self.own, "lora_path": str(self.adapter)}
        reply = self.http.post("/v1/load_lora_adapter", json=asked)
        assert reply.status_code == 200, reply.text
        self.hear(is_punished=False, own=self.own)
        reply = self.http.post("/v1/unload_lora_adapter", json={"lora_name": self.own})
        assert reply.status_code == 200, reply.text
        reply = self.http.post("/v1/completions", json=self.body() | {"model": self.own})
        assert reply.status_code == 404, reply.text

    def answered(self, path: str, body: dict[str, Any]) -> Any:
        """The reply; `None` where the server is busy."""
        reply = self.http.post(path, json=body)
        assert reply.status_code in (200, 429), reply.text
        return reply.json() if reply.status_code == 200 else None

    def follow_a_stream(self) -> None:
        """To its end; its pieces together are an answer like any other."""
        body = self.body() | {"logprobs": 0, "ignore_eos": True, "stream": True}
        with self.http.stream("POST", "/v1/completions", json=body) as reply:
            assert reply.status_code in (200, 429)
            events = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
        if reply.status_code == 200:
            assert events.pop() == "[DONE]"
            choices = [json.loads(event)["choices"][0] for event in events]
            assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
            tokens = [token for choice in choices for token in choice["logprobs"]["tokens"]]
            text = "".join(choice["text"] for choice in choices)
            self.keep(_Heard(body["prompt"], tokens, text, is_stream=True, model=body["model"]))

    def keep(self, heard: _Heard) -> None:
        if len(self.answers) < 60:
            self.answers.append(heard)

    def leave_a_stream(self) -> None:
        with self.http.stream("POST", "/v1/completions", json=self.body() | {"stream": True, "n": 2}) as reply:
            assert reply.status_code in (200, 429)
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
        reply = self.answered("/v1/chat/completions", body)
        if reply is not None:
            assert "e" not in reply["choices"][0]["message"]["content"]

    def stop_at_strings(self) -> None:
        """Any piece of what will be said, wherever its tokens begin."""
        prompt = self.draw.choice(list(self.texts))
        whole = self.texts[prompt]
        start = self.draw.randrange(len(whole) - 6)
        stop = whole[start : start + self.draw.randrange(1, 6)]
        body = {"model": NAME, "prompt": prompt, "max_tokens": 40, "temperature": 0, "ignore_eos": True, "stop": stop}
        reply = self.answered("/v1/completions", body)
        if reply is not None:
            choice = reply["choices"][0]
            assert (choice["text"], choice["finish_reason"]) == (whole[: whole.index(stop)], "stop")

    def draw_with_a_seed(self) -> None:
        seed = self.draw.randrange(5)
        body = {"model": NAME, "prompt": "class", "max_tokens": 20, "seed": seed, "top_p": 0.9, "ignore_eos": True}
        reply = self.answered("/v1/completions", body)
        if reply is not None:
            text = reply["choices"][0]["text"]
            assert self.seeded.setdefault(seed, text) == text

    def talk(self, **bounds: Any) -> Any:
        """The choice of an answer that is bound to something; `None` where the server is busy."""
        body = {"model": self.draw.choice((NAME, TUNED)), "messages": [{"role": "user", "content": "?"}]}
        reply = self.answered("/v1/chat/completions", body | {"max_tokens": 60} | bounds)
        return reply and reply["choices"][0]

    def fill_in_a_form(self) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": SCHEMA}}
        choice = self.talk(response_format=form)
        if choice is not None:
            assert choice["finish_reason"] == "stop"
            assert json.loads(choice["message"]["content"])["n"] in (1, 22)

    def fail_a_grammar(self) -> None:
        members = [
            {"type": "object", "properties": {f"b{i}": {"const": i}}, "required": [f"b{i}"]} for i in range(N_MEMBERS)
        ]
        schema = {"type": "object", "properties": {"x": {"anyOf": members}}, "required": ["x"]}
        form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        is_stream = self.draw.random() < 0.5
        body = {"model": NAME, "prompt": "x", "max_tokens": 60, "response_format": form, "stream": is_stream}
        reply = self.http.post("/v1/completions", json=body)
        assert reply.status_code in (200 if is_stream else 400, 429), reply.text
        assert reply.status_code == 429 or "grammar_failed" in reply.text

    def call_a_tool(self) -> None:
        tool = {
            "type": "function",
            "function": {"name": "f", "description": "Counts.", "strict": True, "parameters": SCHEMA},
        }
        choice = self.talk(tools=[tool], tool_choice="required")
        if choice is not None:
            assert choice["finish_reason"] == "tool_calls"
            call = choice["message"]["tool_calls"][0]["function"]
            assert call["name"] == "f"
            assert json.loads(call["arguments"])["n"] in (1, 22)

    def embed(self) -> None:
        body = {"model": self.draw.choice((NAME, TUNED)), "input": list(ODD_TEXTS[:3])}
        reply = self.answered("/v1/embeddings", body)
        assert reply is None or len(reply["data"]) == 3


@dataclass
class _Told:
    """What all clients of a process were told."""

    answers: list[_Heard]
    calls: Counter[str]
    failures: list[str]
    seeded: set[tuple[int, str]]

    def __add__(self, other: "_Told") -> "_Told":
        return _Told(
            self.answers + other.answers,
            self.calls + other.calls,
            self.failures + other.failures,
            self.seeded | other.seeded,
        )


def _call(url: str, texts: dict[str, str], adapter: Path, first: int, n_rounds: int) -> _Told:
    """Let every client call, each in a thread of this process; what they draw follows from their numbers, `first` and on."""
    clients = [_Client(first + i, url, texts, adapter) for i in range(N_CLIENTS)]
    threads = [threading.Thread(target=client.go_on, args=(n_rounds,)) for client in clients]
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


def _merged(reference: Any, adapter: Path) -> Any:
    """The plain model with the adapter's product added to its weights."""
    (module,) = {name.rpartition(".lora_")[0] for name in load_file(adapter / "adapter_model.safetensors")}
    tensors = load_file(adapter / "adapter_model.safetensors")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    merged = copy.deepcopy(reference)
    target = merged.get_submodule(module.removeprefix("base_model.model."))
    added = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
    target.weight.data += added * settings["lora_alpha"] / settings["r"]
    return merged


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "n_rounds"),
    [({"precision": "fp32"}, ROUNDS), ({"precision": "bf16", "runner": "native", "guesses": 4}, ROUNDS // 3)],
    ids=["fp32", "bf16, with guesses"],
)
def test_mixed_traffic(
    tmp_path: Path, model_folder: Path, tokenizer: Any, reference: Any, settings: dict[str, Any], n_rounds: int
) -> None:
    """In fp32 every plain answer is the plain model's; else what the same engine says without guesses and company."""
    share_heaps()  # as `serve` does
    alone = open_engine(model_folder, **settings | {"guesses": 0})
    adapter = save_adapter(tmp_path / "adapter")
    alone.load_adapter(TUNED, adapter)
    references = {NAME: reference, TUNED: _merged(reference, adapter)}

    def say_alone(ids: list[int], n_tokens: int, model: str = NAME, is_punished: bool = False) -> list[int]:
        params = SamplingParams(max_tokens=n_tokens, temperature=0, ignore_eos=True)
        if is_punished:
            params = replace(params, **PENALTIES | {"logit_bias": ((7, 3.0),)})
        return alone.generate([ids], params, None if model == NAME else model)[0].token_ids

    def is_right(heard: _Heard, tokens: list[int]) -> bool:
        if settings["precision"] == "fp32" and not heard.is_punished:
            return is_greedy(references[heard.model], heard.prompt, tokens)
        return tokens == say_alone(heard.prompt, len(tokens), heard.model, heard.is_punished)

    # Few blocks for so many, so that some must give theirs up.
    engine = open_engine(model_folder, max_batch=5, max_waiting=64, cache_tokens=256, **settings)
    engine.scheduler.step_tokens = 48
    engine.load_adapter(TUNED, adapter)
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    texts = {}
    for prompt in ("def wrap(text, width):", "import os", "x = ("):
        ids = tokenizer.encode(prompt)
        said = say_alone(ids, 40)
        assert is_right(_Heard(ids, [], ""), said)
        texts[prompt] = _text(tokenizer, ids, said)
    cfg = ServeConfig(max_body_bytes=MAX_BODY, allow_loading=True)
    with running(create_app(engine, tokenizer, NAME, cfg, load=lambda folder: open_engine(folder))) as url:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            told = pool.submit(_call, url, texts, adapter, 0, n_rounds // 3).result(SOAK_S)
            settled = _held()
            told += pool.submit(_call, url, texts, adapter, N_CLIENTS, n_rounds - n_rounds // 3).result(SOAK_S)
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
    assert (engine.n_drafted > 0) == ("guesses" in settings)
    # All of them were made, of `ask` two in each round.
    assert len(told.calls) == 16
    each = N_CLIENTS * n_rounds
    assert told.calls == dict.fromkeys(told.calls, each) | {"ask": 2 * each}
    assert list(engine.adapters) == [TUNED]
    # One client's seed draws what another's does.
    assert len(told.seeded) <= 5
    read = byte_reader(tokenizer)
    ids_of = {token_text(read(token)): token for token in range(512)}
    assert len(told.answers) > 3 * N_CLIENTS
    assert sum(heard.is_stream for heard in told.answers) > N_CLIENTS / 2
    assert sum(heard.is_punished for heard in told.answers) > N_CLIENTS / 2
    assert {heard.model for heard in told.answers} == {NAME, TUNED}
    for heard in told.answers:
        tokens = [ids_of[token] for token in heard.tokens]
        assert heard.text == _text(tokenizer, heard.prompt, tokens)
        assert is_right(heard, tokens)


def _text(tokenizer: Any, prompt: list[int], answer: list[int]) -> str:
    stream = TextStream(tokenizer, prompt)
    return "".join(stream.push(token) for token in answer)
