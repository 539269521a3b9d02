"""What requests can ask for beyond a continuation: biases, penalties, grammars, adapters, further models; and the bounds."""

import json
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from kajiya.config.schema import ServeConfig
from kajiya.errors import ConfigError
from kajiya.serving.api import create_app
from kajiya.serving.hosts import source_of
from kajiya.serving.server import serve

from .conftest import NAME, open_engine, running, save_adapter, slow_down

PROMPT = "def wrap(text, width):"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["city", "n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(server_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_a_bias_forbids_and_forces_tokens(
    client: openai.OpenAI, tokenizer: Any, greedy: Callable[..., list[int]]
) -> None:
    ids = tokenizer.encode(PROMPT)
    first = greedy(ids, 1)[0]
    ask: dict[str, Any] = {"model": NAME, "prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 0}
    plain = client.completions.create(**ask)
    forbidden = client.completions.create(**ask, logit_bias={str(first): -100})
    assert plain.choices[0].logprobs is not None
    assert forbidden.choices[0].logprobs is not None
    assert plain.choices[0].logprobs.tokens != forbidden.choices[0].logprobs.tokens
    word = tokenizer.encode("e")[0]
    forced = client.completions.create(**ask | {"max_tokens": 5}, logit_bias={str(word): 100})
    assert forced.choices[0].text == "eeeee"
    # Log-probabilities stay the model's own: a forced token is not certain.
    assert forced.choices[0].logprobs is not None
    assert min(forced.choices[0].logprobs.token_logprobs or [0]) < -1


def test_biases_are_bounded(server_url: str) -> None:
    body = {"model": NAME, "prompt": "x", "max_tokens": 1, "logit_bias": {str(i): 1 for i in range(1025)}}
    reply = httpx.post(f"{server_url}/v1/completions", json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "logit_bias"
    assert "1024" in reply.json()["error"]["message"]


def test_penalties_are_subtracted_for_what_the_answer_has(
    model_folder: Path, reference: Any, tokenizer: Any, client: openai.OpenAI
) -> None:
    """Against the definition, token by token, with the plain model's logits."""
    ids, answer = tokenizer.encode(PROMPT), []
    for _ in range(20):
        with torch.no_grad():
            logits = reference(torch.tensor([ids + answer])).logits[0, -1]
        for token in set(answer):
            logits[token] -= 1.5 * answer.count(token) + 0.5
        answer.append(int(logits.argmax()))
        if answer[-1] == 0:
            break
    found = client.completions.create(
        model=NAME, prompt=ids, max_tokens=20, temperature=0, frequency_penalty=1.5, presence_penalty=0.5
    )
    assert found.choices[0].text == tokenizer.decode(answer, skip_special_tokens=True)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_fulfils_its_schema(client: openai.OpenAI, temperature: float) -> None:
    reply = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": "Where?"}],
        max_tokens=120,
        temperature=temperature,
        seed=1,
        n=2,
        response_format={"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}},
    )
    for choice in reply.choices:
        assert choice.finish_reason == "stop"
        found = json.loads(choice.message.content or "")
        assert found.keys() == {"city", "n"}
        assert found["city"] in ("Oslo", "Rome")
        assert 0 <= found["n"] <= 99


def test_an_answer_is_some_json_object(client: openai.OpenAI, tokenizer: Any) -> None:
    brace = tokenizer.convert_tokens_to_ids("}")
    reply = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": "Where?"}],
        max_tokens=40,
        temperature=0,
        logit_bias={str(brace): 100},  # or a random model would add to it for ever
        response_format={"type": "json_object"},
    )
    assert isinstance(json.loads(reply.choices[0].message.content or ""), dict)
    assert reply.choices[0].finish_reason == "stop"


def test_a_schema_that_is_none_is_refused(server_url: str) -> None:
    for given in (
        {"type": "json_schema"},
        {"type": "xml"},
        {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}},
    ):
        body = {"model": NAME, "prompt": "x", "max_tokens": 3, "response_format": given}
        reply = httpx.post(f"{server_url}/v1/completions", json=body)
        assert reply.status_code == 400, reply.text
        assert reply.json()["error"]["param"] == "response_format"


def test_a_grammar_that_cannot_go_on_fails_its_request_only(server_url: str, capfd: pytest.CaptureFixture[str]) -> None:
    """More alternatives than llguidance's limit of 2,000, which it meets behind the first character of the answer."""
    members = [{"type": "object", "properties": {f"b{i}": {"const": i}}, "required": [f"b{i}"]} for i in range(2100)]
    schema = {"type": "object", "properties": {"x": {"anyOf": members}}, "required": ["x"]}
    body = {"model": NAME, "prompt": "x", "max_tokens": 60}
    bound = body | {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}
    reply = httpx.post(f"{server_url}/v1/completions", json=bound, timeout=60)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["code"] == "grammar_failed"
    assert "2000" in reply.json()["error"]["message"]
    events = httpx.post(f"{server_url}/v1/completions", json=bound | {"stream": True}, timeout=60).text
    assert "grammar_failed" in events
    assert "[DONE]" not in events
    assert httpx.post(f"{server_url}/v1/completions", json=body, timeout=60).status_code == 200
    # Nothing of an answer goes to the server's own output.
    assert "Warning" not in capfd.readouterr().err


# ---------------------------------------------------------------- models and adapters


def test_adapters_and_models_come_and_go(
    tmp_path: Path, model_folder: Path, tokenizer: Any, greedy: Callable[..., list[int]]
) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    cfg = ServeConfig(allow_loading=True, idle_unload_s=0.2)
    others = {"second": source_of("second", model_folder, open_engine)}
    ids = tokenizer.encode(PROMPT)
    expected = tokenizer.decode(greedy(ids, 8), skip_special_tokens=True)
    with (
        running(create_app(open_engine(model_folder), tokenizer, NAME, cfg, others, open_engine)) as url,
        httpx.Client(base_url=f"{url}/v1", timeout=60) as http,
    ):

        def say(model: str) -> str:
            body = {"model": model, "prompt": ids, "max_tokens": 8, "temperature": 0}
            reply = http.post("completions", json=body)
            assert reply.status_code == 200, reply.text
            assert reply.json()["model"] == model
            return str(reply.json()["choices"][0]["text"])

        def names() -> list[str]:
            return [card["id"] for card in http.get("models").json()["data"]]

        assert names() == [NAME, "second"]
        assert say("second") == say(NAME) == expected
        asked = {"lora_name": "tuned", "lora_path": str(adapter)}
        assert http.post("load_lora_adapter", json=asked).status_code == 200
        assert http.post("load_lora_adapter", json=asked).status_code == 409
        assert "tuned" in names()
        assert say("tuned") != expected
        assert say(NAME) == expected
        bad = http.post("load_lora_adapter", json={"lora_name": "bad", "lora_path": str(tmp_path)})
        assert bad.status_code == 400, bad.text
        nowhere = http.post("load_lora_adapter", json={"lora_name": "bad"})
        assert (nowhere.status_code, nowhere.json()["error"]["param"]) == (400, "lora_path")
        for name, content, words in (
            ("adapter_config.json", "{", "broken JSON"),
            ("adapter_config.json", "[]", "no JSON object"),
            ("adapter_config.json", '{"peft_type": "LORA", "r": 2}', "lora_alpha must be a number, not None"),
            ("adapter_model.safetensors", "xx", "is broken"),
            ("adapter_model.safetensors", None, "is missing"),
        ):
            broken = shutil.copytree(adapter, tmp_path / f"broken-{words.split()[-1]}")
            (broken / name).unlink()
            if content is not None:
                (broken / name).write_text(content)
            reply = http.post("load_lora_adapter", json={"lora_name": "bad", "lora_path": str(broken)})
            assert (reply.status_code, words in reply.json()["error"]["message"]) == (400, True), reply.text
        assert http.post("unload_lora_adapter", json={"lora_name": "tuned"}).status_code == 200
        assert "tuned" not in names()
        assert http.post("load_model", json={"name": "third", "folder": str(model_folder)}).status_code == 200
        assert say("third") == expected
        assert http.post("unload_model", json={"name": NAME}).status_code == 409
        assert http.post("unload_model", json={"name": "third"}).status_code == 200
        assert http.post("completions", json={"model": "third", "prompt": "x"}).status_code == 404
        # The second model has been let go meanwhile, or will be, and comes back when it is asked for.
        for _ in range(100):
            cards = {card["id"]: card for card in http.get("models").json()["data"]}
            if cards["second"].get("is_loaded") is False:
                break
            __import__("time").sleep(0.05)
        assert cards["second"].get("is_loaded") is False
        assert say("second") == expected


def test_loading_is_off_unless_allowed(server_url: str) -> None:
    reply = httpx.post(f"{server_url}/v1/load_model", json={"name": "x", "folder": "/"})
    assert reply.status_code in (404, 405)


# ---------------------------------------------------------------- bounds and the log


def open_slow_engine(model_folder: Path) -> Any:
    """An engine whose every step takes a twentieth of a second more."""
    engine = open_engine(model_folder)
    slow_down(engine, 0.05)
    return engine


def test_bounds_of_size_and_time(model_folder: Path, tokenizer: Any) -> None:
    cfg = ServeConfig(max_body_bytes=2000, request_timeout_s=0.5)
    engine = open_slow_engine(model_folder)
    with running(create_app(engine, tokenizer, NAME, cfg)) as url:
        large = httpx.post(f"{url}/v1/completions", json={"model": NAME, "prompt": "x" * 3000})
        assert large.status_code == 413
        chunked = httpx.post(f"{url}/v1/completions", content=(b"x" * 500 for _ in range(10)))
        assert chunked.status_code == 413
        body = {"model": NAME, "prompt": "x", "max_tokens": 150, "ignore_eos": True}
        slow = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        assert slow.status_code == 504
        assert slow.json()["error"]["code"] == "timeout"
        for _ in range(200):
            if httpx.get(f"{url}/health").json()["running"] == 0:
                break
        assert httpx.get(f"{url}/health").json()["running"] == 0
        # A body that does not come is waited for no longer.
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as raw:
            raw.sendall(
                f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: 50\r\n\r\n".encode() + b'{"mo'
            )
            assert raw.recv(4096).split()[1] == b"408"


def test_the_access_log_has_no_prompts_unless_asked(
    model_folder: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for asked in (False, True):
        caplog.clear()
        cfg = ServeConfig(access_log=True, log_prompts=asked)
        with (
            caplog.at_level("INFO", logger="kajiya.access"),
            running(create_app(open_engine(model_folder), tokenizer, NAME, cfg)) as url,
        ):
            httpx.post(f"{url}/v1/completions", json={"model": NAME, "prompt": "a secret", "max_tokens": 2})
        lines = [json.loads(record.message) for record in caplog.records if record.name == "kajiya.access"]
        assert [(line["path"], line["status"]) for line in lines] == [("/v1/completions", 200)]
        assert ("a secret" in json.dumps(lines)) == asked


def test_other_sites_may_call_only_where_named(model_folder: Path, tokenizer: Any, server_url: str) -> None:
    headers = {"Origin": "https://example.org"}
    assert "access-control-allow-origin" not in httpx.get(f"{server_url}/v1/models", headers=headers).headers
    cfg = ServeConfig(cors_origins=("https://example.org",))
    with running(create_app(open_engine(model_folder), tokenizer, NAME, cfg)) as url:
        allowed = httpx.get(f"{url}/v1/models", headers=headers).headers
        assert allowed["access-control-allow-origin"] == "https://example.org"
        assert httpx.get(f"{url}/ready").json() == {"status": "ready"}


def test_other_sites_may_call_with_a_key(model_folder: Path, tokenizer: Any) -> None:
    """A browser asks for leave first, without the key, and shows a page no reply without leave, refusals included."""
    origin = {"Origin": "https://example.org"}
    cfg = ServeConfig(cors_origins=("https://example.org",), api_key="key", max_body_bytes=2000)
    with running(create_app(open_engine(model_folder), tokenizer, NAME, cfg)) as url:
        url += "/v1/completions"
        asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
        leave = httpx.options(url, headers=origin | asks)
        assert leave.status_code == 200
        assert leave.headers["access-control-allow-origin"] == "https://example.org"
        assert "authorization" in leave.headers["access-control-allow-headers"]
        assert httpx.options(url, headers=asks | {"Origin": "https://another.org"}).status_code == 400
        key = {"Authorization": "Bearer key"}
        body = {"model": NAME, "prompt": "x", "max_tokens": 1}
        for headers, prompt, status in (({}, "x", 401), (key, "x" * 3000, 413), (key, "x", 200)):
            reply = httpx.post(url, headers=origin | headers, json=body | {"prompt": prompt})
            assert reply.status_code == status
            assert reply.headers["access-control-allow-origin"] == "https://example.org"


def test_keys_are_read_from_a_file(model_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first\n\n  second\n")
    cfg = ServeConfig(api_key=f"@{keys}")
    with running(create_app(open_engine(model_folder), tokenizer, NAME, cfg)) as url:
        for key, status in (("first", 200), ("second", 200), ("third", 401), (f"@{keys}", 401)):
            headers = {"Authorization": f"Bearer {key}"}
            assert httpx.get(f"{url}/v1/models", headers=headers).status_code == status
    keys.write_text("\n")
    for given, words in ((f"@{keys}", "has no keys"), (f"@{tmp_path}/none", "cannot be read"), ("", "is empty")):
        with pytest.raises(ConfigError, match=words):
            serve(ServeConfig(api_key=given), tmp_path, NAME, lambda url: None)


def test_a_server_needs_no_grammars_unless_asked(
    model_folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    with running(create_app(open_engine(model_folder), tokenizer, NAME, ServeConfig())) as url:
        body = {"model": NAME, "prompt": "x", "max_tokens": 1}
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 200
        refused = httpx.post(f"{url}/v1/completions", json=body | {"response_format": {"type": "json_object"}})
        assert refused.status_code == 400
        assert "kajiya[serve]" in refused.json()["error"]["message"]


def test_metrics_speak_of_the_cache(server_url: str) -> None:
    body = {"model": NAME, "prompt": PROMPT * 4, "max_tokens": 1}
    for _ in range(2):
        httpx.post(f"{server_url}/v1/completions", json=body)
    lines = httpx.get(f"{server_url}/metrics").text.splitlines()
    found = {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")}
    assert found["kajiya_shared_prompt_tokens_total"] > 0
    assert 0 <= found["kajiya_cache_use_ratio"] < 1


def test_a_stream_past_its_time_ends_with_an_error(model_folder: Path, tokenizer: Any) -> None:
    engine = open_slow_engine(model_folder)
    with running(create_app(engine, tokenizer, NAME, ServeConfig(request_timeout_s=0.5))) as url:
        body = {"model": NAME, "prompt": "x", "max_tokens": 150, "ignore_eos": True, "stream": True}
        lines = [line for line in httpx.post(f"{url}/v1/completions", json=body, timeout=60).text.splitlines() if line]
        assert len(lines) > 1
        assert "text_completion" in lines[0]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"


def test_the_server_bounds_answers(model_folder: Path, tokenizer: Any) -> None:
    cfg = ServeConfig(max_answer_tokens=5, default_max_tokens=50)
    with running(create_app(open_engine(model_folder), tokenizer, NAME, cfg)) as url:
        for path, prompt in (
            ("completions", {"prompt": "x"}),
            ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ):
            body = {"model": NAME, "ignore_eos": True} | prompt
            reply = httpx.post(f"{url}/v1/{path}", json=body)
            assert reply.json()["usage"]["completion_tokens"] == 5
            lengths = ["max_tokens"] if path == "completions" else ["max_tokens", "max_completion_tokens"]
            for length in lengths:
                refused = httpx.post(f"{url}/v1/{path}", json=body | {length: 6})
                assert refused.status_code == 400
                assert refused.json()["error"]["param"] == length
                assert f"{length} must be at most 5" in refused.json()["error"]["message"]
