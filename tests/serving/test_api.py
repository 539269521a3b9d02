"""The API over real HTTP: the official client against uvicorn, and what it answers to mistakes."""

import asyncio
import copy
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from kajiya.config.schema import RenderConfig, ServeConfig
from kajiya.data.chat import ChatTemplate, render_chat
from kajiya.data.render import Renderer
from kajiya.serving.api import create_app
from kajiya.serving.tools import prompt_ids

from .conftest import CONTEXT, NAME, open_engine, running

PROMPT = "def wrap(text, width):"


@pytest.fixture(scope="module")
def client(server_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def _greedy_text(greedy: Callable[..., list[int]], tokenizer: Any, ids: list[int], n_tokens: int) -> str:
    from kajiya.serving.text import TextStream

    stream = TextStream(tokenizer, ids)
    return "".join(stream.push(token) for token in greedy(ids, n_tokens))


# ---------------------------------------------------------------- the official client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "kajiya"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_completion_is_the_greedy_continuation(
    client: openai.OpenAI, tokenizer: Any, greedy: Callable[..., list[int]]
) -> None:
    ids = tokenizer.encode(PROMPT)
    expected = _greedy_text(greedy, tokenizer, ids, 12)
    for prompt in (PROMPT, ids):
        reply = client.completions.create(model=NAME, prompt=prompt, max_tokens=12, temperature=0)
        assert reply.choices[0].text == expected
        assert reply.choices[0].finish_reason in ("length", "stop")
        assert reply.usage is not None
        assert reply.usage.prompt_tokens == len(ids)
        assert reply.usage.completion_tokens == len(greedy(ids, 12))
    assert expected


def test_several_prompts_and_choices_in_order(client: openai.OpenAI, tokenizer: Any) -> None:
    texts = ["import", "class Wrapper:", "x"]
    ids = [tokenizer.encode(text) for text in texts]
    for prompt in (texts, ids):
        reply = client.completions.create(model=NAME, prompt=prompt, max_tokens=4, echo=True, temperature=0, n=2)
        assert [choice.index for choice in reply.choices] == list(range(6))
        for choice in reply.choices:
            assert choice.text.startswith(texts[choice.index // 2])
        assert reply.usage is not None
        assert reply.usage.prompt_tokens == sum(len(one) for one in ids)


def test_streamed_text_is_the_whole_text(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": NAME, "prompt": PROMPT, "max_tokens": 40, "seed": 3, "temperature": 1.2, "n": 3}
    whole = client.completions.create(**ask)
    texts, reasons, used = [""] * 3, [""] * 3, None
    for chunk in client.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        used = chunk.usage or used
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert used == whole.usage
    assert len(set(texts)) == 3
    assert not any("\ufffd" in text[-1:] for text in texts)


def test_chunks_of_several_steps_hold_the_whole_reply(model_folder: Path, tokenizer: Any) -> None:
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": 41, "seed": 3, "logprobs": 1, "ignore_eos": True}
    asked = body | {"stream": True, "stream_options": {"include_usage": True}}
    with running(create_app(open_engine(model_folder), tokenizer, NAME, ServeConfig(stream_interval=4))) as url:
        whole = _post(url, body).json()
        *events, end = _post(url, asked).text.strip().split("\n\n")
    assert end == "data: [DONE]"
    *chunks, used = [json.loads(event.removeprefix("data: ")) for event in events]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert 2 <= len(choices) <= 11
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    for field, values in whole["choices"][0]["logprobs"].items():
        assert [value for choice in choices for value in choice["logprobs"][field]] == values
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert used["usage"] == whole["usage"]


def test_chat_renders_the_template_and_continues_it(
    client: openai.OpenAI, tokenizer: Any, greedy: Callable[..., list[int]]
) -> None:
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Wrap this text."}]
    ids = render_chat(tokenizer, messages, add_generation_prompt=True)
    assert tokenizer.decode(ids) == "### System\nBe brief.\n\n### User\nWrap this text.\n\n### Assistant\n"
    expected = _greedy_text(greedy, tokenizer, ids, 10)
    reply = client.chat.completions.create(model=NAME, messages=messages, max_completion_tokens=10, temperature=0)
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content == expected
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(ids)
    parts: list[Any] = [{"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}, messages[1]]
    again = client.chat.completions.create(model=NAME, messages=parts, max_tokens=10, temperature=0)
    assert again.choices[0].message.content == expected
    chunks = list(
        client.chat.completions.create(
            model=NAME,
            messages=messages,
            max_tokens=10,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected
    assert chunks[-1].usage == reply.usage
    assert chunks[-1].choices == []


def test_the_server_renders_what_training_and_evaluation_render(
    client: openai.OpenAI, tokenizer: Any, greedy: Callable[..., list[int]]
) -> None:
    """One rendering: the ids of the prompt are those before the answer in the row that is trained on."""
    messages: list[Any] = [
        {"role": "user", "content": "Wrap <|eos|> this\n\n"},
        {"role": "assistant", "content": "    indented\n"},
        {"role": "user", "content": "\u00e9\u0301 again"},
    ]
    row = {"messages": [*messages, {"role": "assistant", "content": "  done"}]}
    segment = Renderer(tokenizer, RenderConfig(train_on="last"), "chat").render(json.dumps(row)).segments[0]
    before = segment.ids[: int((segment.weights > 0).argmax())].tolist()
    assert before == render_chat(tokenizer, messages, add_generation_prompt=True)
    assert before.count(tokenizer.eos_token_id) == 1
    reply = client.chat.completions.create(model=NAME, messages=messages, max_tokens=8, temperature=0)
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(before)
    assert reply.choices[0].message.content == _greedy_text(greedy, tokenizer, before, 8)


def test_echo_with_logprobs_equals_the_log_softmax_of_transformers(
    client: openai.OpenAI, tokenizer: Any, reference: Any
) -> None:
    ids = tokenizer.encode(PROMPT)
    reply = client.completions.create(model=NAME, prompt=PROMPT, echo=True, logprobs=3, max_tokens=0)
    assert reply.choices[0].text == PROMPT
    found = reply.choices[0].logprobs
    assert found is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert found.tokens == [tokenizer.decode([token]) for token in ids]
    assert found.text_offset == [len(tokenizer.decode(ids[:i])) for i in range(len(ids))]
    with torch.no_grad():
        logprobs = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert found.token_logprobs[0] is None
    assert found.top_logprobs[0] is None
    for i in range(1, len(ids)):
        assert found.token_logprobs[i] == pytest.approx(logprobs[i - 1, ids[i]].item(), abs=1e-4)
        best = logprobs[i - 1].topk(3).values.tolist()
        assert sorted(found.top_logprobs[i].values(), reverse=True)[:3] == pytest.approx(best, abs=1e-4)
        assert found.tokens[i] in found.top_logprobs[i]
    used = reply.usage
    assert used is not None
    assert (used.prompt_tokens, used.completion_tokens) == (len(ids), 0)


def test_streamed_logprobs_are_those_of_the_whole_reply(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": NAME, "prompt": PROMPT, "max_tokens": 20, "seed": 5, "logprobs": 2, "echo": True}
    whole = client.completions.create(**ask).choices[0].logprobs
    assert whole is not None
    joined: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for chunk in client.completions.create(**ask, stream=True):
        logprobs = chunk.choices[0].logprobs
        for key, values in joined.items():
            values += getattr(logprobs, key) or []
    assert joined == {key: getattr(whole, key) for key in joined}


def test_chat_logprobs_have_tokens_bytes_and_alternatives(client: openai.OpenAI, tokenizer: Any) -> None:
    ask: dict[str, Any] = {
        "model": NAME,
        "messages": [{"role": "user", "content": "日本?"}],
        "max_tokens": 12,
        "temperature": 0,
        "logprobs": True,
    }
    choice = client.chat.completions.create(**ask, top_logprobs=4).choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content
    for token in content:
        assert len(token.top_logprobs) == 4
        # Greedy: the token is the best of its alternatives.
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob)
        assert token.top_logprobs[0].bytes == token.bytes
    text = b"".join(bytes(token.bytes or []) for token in content).decode(errors="replace")
    assert text.rstrip("\ufffd") == (choice.message.content or "").rstrip("\ufffd")
    plain = client.chat.completions.create(**ask).choices[0].logprobs
    assert plain is not None
    assert plain.content is not None
    assert plain.content[0].top_logprobs == []


def test_stop_strings_across_token_boundaries(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": NAME, "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    free = client.completions.create(**ask, logprobs=0).choices[0]
    assert free.logprobs is not None
    assert free.logprobs.tokens is not None
    # A stop that begins in the middle of one token and ends in the middle of a later one.
    long_token = next(i for i, token in enumerate(free.logprobs.tokens) if i > 5 and len(token) > 2 and token.isascii())
    assert free.logprobs.text_offset is not None
    begin = free.logprobs.text_offset[long_token] + 1
    stop = free.text[begin : begin + 6]
    assert free.text.find(stop) == begin
    stopped = client.completions.create(**ask, stop=[stop, "never seen"], logprobs=0).choices[0]
    assert stopped.text == free.text[:begin]
    assert stopped.finish_reason == "stop"
    assert stopped.logprobs is not None
    assert stopped.logprobs.tokens == free.logprobs.tokens[: long_token + 1]
    pieces = [chunk.choices[0] for chunk in client.completions.create(**ask, stop=stop, stream=True)]
    assert "".join(piece.text for piece in pieces) == free.text[:begin]
    assert pieces[-1].finish_reason == "stop"


def test_seed_repeats_and_choices_differ(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": NAME, "prompt": "x =", "max_tokens": 12, "seed": 7, "n": 2, "top_p": 0.98}
    first, second = (client.completions.create(**ask, extra_body={"top_k": 100}) for _ in range(2))
    assert [choice.text for choice in first.choices] == [choice.text for choice in second.choices]
    assert first.choices[0].text != first.choices[1].text
    alone = client.completions.create(**(ask | {"n": 1}), extra_body={"top_k": 100})
    assert alone.choices[0].text == first.choices[0].text
    top = client.completions.create(model=NAME, prompt="x =", max_tokens=12, extra_body={"top_k": 1})
    greedy = client.completions.create(model=NAME, prompt="x =", max_tokens=12, temperature=0)
    assert top.choices[0].text == greedy.choices[0].text


def test_embeddings(client: openai.OpenAI, tokenizer: Any, reference: Any) -> None:
    texts = ["def f(x):", "import os"]
    reply = client.embeddings.create(model=NAME, input=texts)
    plain = client.embeddings.create(model=NAME, input=[tokenizer.encode(t) for t in texts], encoding_format="float")
    for text, packed, unpacked in zip(texts, reply.data, plain.data, strict=True):
        with torch.no_grad():
            hidden = reference.model(torch.tensor([tokenizer.encode(text)])).last_hidden_state[0].mean(0)
        expected = (hidden / hidden.norm()).tolist()
        assert packed.embedding == pytest.approx(expected, abs=1e-5)
        assert unpacked.embedding == pytest.approx(expected, abs=1e-5)
    assert reply.usage.prompt_tokens == sum(len(tokenizer.encode(text)) for text in texts)


def test_concurrent_requests_are_batched_and_answered_as_alone(
    client: openai.OpenAI, tokenizer: Any, reference: Any, server_url: str
) -> None:
    prompts = [[*tokenizer.encode(PROMPT)[: 1 + i % 7], 17 + i] for i in range(16)]

    def ask(prompt: list[int]) -> list[int]:
        reply = client.completions.create(
            model=NAME, prompt=prompt, max_tokens=30, temperature=0, logprobs=0, extra_body={"ignore_eos": True}
        )
        assert reply.choices[0].logprobs is not None
        return [round(value, 3) for value in reply.choices[0].logprobs.token_logprobs or []]

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, prompts))
    assert [len(one) for one in together] == [30] * 16
    alone = [ask(prompt) for prompt in prompts[:3]]
    assert together[0] == pytest.approx(alone[0], abs=2e-3)
    assert together[1] == pytest.approx(alone[1], abs=2e-3)
    assert together[2] == pytest.approx(alone[2], abs=2e-3)


def test_an_empty_prompt_begins_a_document(client: openai.OpenAI, greedy: Callable[..., list[int]]) -> None:
    reply = client.completions.create(model=NAME, prompt="", max_tokens=5, temperature=0)
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == 1
    assert reply.usage.completion_tokens == len(greedy([0], 5))


def test_default_length_is_the_settings_and_never_past_the_context(client: openai.OpenAI) -> None:
    free = {"ignore_eos": True}
    reply = client.completions.create(model=NAME, prompt=[5] * 10, extra_body=free)
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 16
    reply = client.completions.create(model=NAME, prompt=[5] * (CONTEXT - 3), extra_body=free)
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 3


# ---------------------------------------------------------------- mistakes


def _post(url: str, body: Any, path: str = "/v1/completions", **kwargs: Any) -> httpx.Response:
    return httpx.post(f"{url}{path}", json=body, timeout=60, **kwargs)


def _error(reply: httpx.Response, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    assert reply.json().keys() == {"error"}
    error: dict[str, Any] = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def test_the_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-9", prompt="x")
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    assert NAME in missing.value.message
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "x"}], temperature=9)
    assert wrong.value.param == "temperature"
    assert "less than or equal to 2" in wrong.value.message


def test_a_prompt_that_is_too_long_names_both_lengths(server_url: str) -> None:
    for body in (
        {"model": NAME, "prompt": [5] * (CONTEXT + 7)},
        {"model": NAME, "prompt": [5] * (CONTEXT + 7), "max_tokens": 1},
        {"model": NAME, "prompt": [5] * (CONTEXT + 7), "max_tokens": 1, "stream": True},
    ):
        error = _error(_post(server_url, body), 400)
        assert error["code"] == "context_length_exceeded"
        assert str(CONTEXT) in error["message"]
        assert str(CONTEXT + 7) in error["message"]
    error = _error(_post(server_url, {"model": NAME, "prompt": [5] * 100, "max_tokens": 100}), 400)
    assert error["param"] == "max_tokens"
    messages = [{"role": "user", "content": "word " * 300}]
    error = _error(_post(server_url, {"model": NAME, "messages": messages}, "/v1/chat/completions"), 400)
    assert error["param"] == "messages"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 100}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"seed": 2**64}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include": True}}, "stream_options"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [512]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**40]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"model": 5}, "model"),
        ({"temprature": 1}, "temprature"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"512": 1}}, "logit_bias"),
        ({"best_of": 2}, "best_of"),
        ({"n": 2, "best_of": 1}, "best_of"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format"),
        ({"response_format": {"type": "text", "json_schema": {"schema": {}}}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "nam": "x"}}}, "response_format"),
        ({"prompt": ["x"] * 69}, "prompt"),
        ({"suffix": "end"}, "suffix"),
    ],
)
def test_a_bad_parameter_is_named(server_url: str, change: dict[str, Any], param: str) -> None:
    error = _error(_post(server_url, {"model": NAME, "prompt": "x", "max_tokens": 1} | change), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_unknown_and_unsupported_parameters_are_told_apart(server_url: str) -> None:
    body = {"model": NAME, "prompt": "x", "max_tokens": 1}
    unknown = _error(_post(server_url, body | {"temprature": 1}), 400)
    assert unknown["code"] == "unknown_parameter"
    assert "did you mean 'temperature'" in unknown["message"]
    unsupported = _error(_post(server_url, body | {"best_of": 2}), 400)
    assert unsupported["code"] == "unsupported_parameter"
    neutral = {
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "best_of": 1,
        "logit_bias": {},
        "suffix": None,
        "n": None,
    }
    assert _post(server_url, body | neutral | {"user": "someone"}).status_code == 200
    unused = {"safety_identifier": "a", "prompt_cache_key": "b", "metadata": {"c": "d"}, "n": 2, "best_of": 2}
    assert _post(server_url, body | unused).status_code == 200
    stream = {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}}
    assert _post(server_url, body | stream).text.endswith("[DONE]\n\n")


def test_no_mass_at_all_leaves_the_most_probable_token(server_url: str) -> None:
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": 12}
    least = _post(server_url, body | {"top_p": 0}).json()["choices"][0]["text"]
    assert least == _post(server_url, body | {"temperature": 0}).json()["choices"][0]["text"]


def test_a_message_may_have_a_name(server_url: str, tokenizer: Any) -> None:
    """The template is given it, as in training; the packaged one does not say it."""
    messages = [{"role": "user", "content": "x", "name": "me"}]
    body = {"model": NAME, "messages": messages, "max_tokens": 1}
    reply = _post(server_url, body, "/v1/chat/completions")
    assert reply.status_code == 200, reply.text
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = "{% for each in messages %}{{ each.name }}: {{ each.content }}{% endfor %}"
    assert tokenizer.decode(prompt_ids(ChatTemplate(tokenizer), messages, [])) == "me: x"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "empty"),
        ([{"role": "robot", "content": "x"}], "robot"),
        ([{"role": "tool"}], "content"),
        ([{"role": "assistant", "tool_calls": [{}]}], "tool_calls"),
        ([{"role": "user"}], "content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "type text"),
        ([{"role": "user", "content": "x", "name": 5}], "name"),
        ([{"role": "user", "content": "x", "tool_call_id": "1"}], "tool_call_id"),
        ([{"role": "assistant", "content": "x"}], "take turns"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": "y"}], "take turns"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "last message"),
        ("hello", "list"),
        (["hello"], "dictionary"),
        ([{"role": "user", "content": "\ud800"}], "Unicode"),
    ],
)
def test_bad_messages_are_refused(server_url: str, messages: Any, words: str) -> None:
    # Spelled in ASCII: half of a surrogate pair cannot be sent otherwise.
    content = json.dumps({"model": NAME, "messages": messages})
    headers = {"content-type": "application/json"}
    reply = httpx.post(f"{server_url}/v1/chat/completions", content=content, headers=headers, timeout=60)
    error = _error(reply, 400)
    assert error["param"] == "messages"
    assert words in error["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "params": {}}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f"}, "cache": 1}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": "yes"}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 2}, "tools"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"echo": True}, "echo"),
        ({"prompt": "x"}, "prompt"),
    ],
)
def test_bad_chat_parameters_are_named(server_url: str, change: dict[str, Any], param: str) -> None:
    body = {"model": NAME, "messages": [{"role": "user", "content": "x"}]} | change
    assert _error(_post(server_url, body, "/v1/chat/completions"), 400)["param"] == param


@pytest.mark.parametrize(
    ("change", "param"),
    [({"dimensions": 5}, "dimensions"), ({"input": []}, "input"), ({"encoding_format": "zip"}, "encoding_format")],
)
def test_bad_embedding_parameters_are_named(server_url: str, change: dict[str, Any], param: str) -> None:
    assert _error(_post(server_url, {"model": NAME, "input": "x"} | change, "/v1/embeddings"), 400)["param"] == param


@pytest.mark.parametrize(
    "content",
    [b"{", b"", b"[1]", b"null", b'"x"', b'{"model": "tiny", "prompt": "x", }', b"\xff\xfe", b"[" * 100_000],
)
def test_bad_json_is_a_400(server_url: str, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    _error(httpx.post(f"{server_url}/v1/completions", content=content, headers=headers, timeout=60), 400)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b'{"prompt": "\xff"}', "can't decode byte 0xff"), (b"[" * 100_000, "recursion"), (b"{", "JSON")],
)
def test_what_is_wrong_with_a_body_is_said(server_url: str, content: bytes, words: str) -> None:
    headers = {"content-type": "application/json"}
    reply = httpx.post(f"{server_url}/v1/completions", content=content, headers=headers, timeout=60)
    error = _error(reply, 400)
    assert words in error["message"]
    assert error["code"] == "invalid_json"


def test_a_part_that_is_missing_is_named_with_its_place(server_url: str) -> None:
    asked = {"type": "json_schema", "json_schema": {"name": "x"}}
    error = _error(_post(server_url, {"model": NAME, "prompt": "x", "response_format": asked}), 400)
    assert error["message"] == "response_format.json_schema.schema is missing"
    assert (error["param"], error["code"]) == ("response_format", "missing_required_parameter")


@pytest.mark.parametrize("text", ['"\\ud800"', '["a", "\\udfff"]'])
def test_text_that_is_no_unicode_is_a_400(server_url: str, text: str) -> None:
    for path, field in (("/v1/completions", "prompt"), ("/v1/embeddings", "input")):
        content = f'{{"model": "{NAME}", "{field}": {text}}}'
        headers = {"content-type": "application/json"}
        reply = httpx.post(f"{server_url}{path}", content=content, headers=headers, timeout=60)
        assert _error(reply, 400)["param"] == field


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_a_400(server_url: str, number: str) -> None:
    content = f'{{"model": "{NAME}", "prompt": "x", "temperature": {number}}}'
    headers = {"content-type": "application/json"}
    reply = httpx.post(f"{server_url}/v1/completions", content=content, headers=headers, timeout=60)
    assert _error(reply, 400)["param"] == "temperature"


def test_addresses_and_methods_that_are_not_there(server_url: str) -> None:
    _error(httpx.get(f"{server_url}/v1/nothing"), 404)
    _error(httpx.get(f"{server_url}/v1/completions"), 405)


# ---------------------------------------------------------------- operation


def test_health_and_metrics(server_url: str) -> None:
    health = httpx.get(f"{server_url}/health").json()
    assert health.pop("engines")[NAME].startswith("native")
    assert health == {"status": "ok", "model": NAME, "running": 0, "waiting": 0}

    def read() -> dict[str, float]:
        reply = httpx.get(f"{server_url}/metrics")
        assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
        lines = [line for line in reply.text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    before = read()
    body = {"model": NAME, "prompt": [5, 6, 7], "max_tokens": 9, "temperature": 0, "n": 2, "ignore_eos": True}
    assert _post(server_url, body).status_code == 200
    _post(server_url, body | {"n": 0})
    after = read()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown("kajiya_prompt_tokens_total") == 6
    assert grown("kajiya_generated_tokens_total") == 18
    assert grown("kajiya_time_to_first_token_seconds_count") == 2
    assert grown("kajiya_inter_token_seconds_count") == 16
    assert grown('kajiya_choices_total{finish_reason="length"}') == 2
    assert grown('kajiya_http_requests_total{endpoint="/v1/completions",status="200"}') == 1
    assert grown('kajiya_http_requests_total{endpoint="/v1/completions",status="400"}') == 1
    assert after["kajiya_sequences_running"] == 0
    assert after["kajiya_cache_tokens"] == 0


def test_an_api_key_is_asked_for_before_anything_is_read(model_folder: Path, tokenizer: Any) -> None:
    cfg = ServeConfig(api_key="s3cret")
    with running(create_app(open_engine(model_folder), tokenizer, NAME, cfg)) as url:
        assert _error(httpx.get(f"{url}/v1/models"), 401)["type"] == "authentication_error"
        for key in ("Bearer wrong", "s3cret", "Bearer s3cret2", "Bearer é"):
            headers = {"authorization": key.encode()}
            _error(httpx.post(f"{url}/v1/completions", content=b"{", headers=headers), 401)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="s3cret") as client:
            assert client.models.list().data[0].id == NAME
        for path in ("/", "/health", "/ready", "/metrics"):
            assert httpx.get(url + path).status_code == 200
        for path in ("/openapi.json", "/v1", "/V1/models", "/nothing"):
            _error(httpx.get(url + path), 401)


def _until(holds: Callable[[], bool]) -> None:
    """Wait for something that must come; the limit only ends a test that has failed."""
    limit = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < limit, "it did not come"
        time.sleep(0.01)


def test_a_full_queue_is_429_with_retry_after(model_folder: Path, tokenizer: Any) -> None:
    engine = open_engine(model_folder, max_batch=1, max_waiting=1)
    real = engine.runner.run
    is_slow = True

    def slow(plan: Any) -> Any:
        time.sleep(0.05 if is_slow else 0)
        return real(plan)

    engine.runner.run = slow  # type: ignore[method-assign]
    with running(create_app(engine, tokenizer, NAME, ServeConfig())) as url, ThreadPoolExecutor(2) as pool:
        body = {"model": NAME, "prompt": "x", "max_tokens": 180, "ignore_eos": True}
        replies = [pool.submit(_post, url, body)]
        _until(lambda: engine.scheduler.n_running == 1)
        replies.append(pool.submit(_post, url, body | {"max_tokens": 2}))
        _until(lambda: engine.scheduler.n_waiting == 1)
        assert httpx.get(f"{url}/ready").status_code == 503
        assert httpx.get(f"{url}/health").status_code == 200
        for refused in (_post(url, body), _post(url, body | {"stream": True})):
            assert _error(refused, 429)["code"] == "queue_full"
            assert int(refused.headers["retry-after"]) >= 1
        # What can never fit is not told to try again.
        assert _error(_post(url, body | {"n": 3}), 400)["param"] == "n"
        is_slow = False
        assert [reply.result().status_code for reply in replies] == [200, 200]


def test_a_client_that_leaves_frees_its_rows(model_folder: Path, tokenizer: Any) -> None:
    engine = open_engine(model_folder)
    with running(create_app(engine, tokenizer, NAME, ServeConfig())) as url:
        real = engine.runner.run

        def slow(plan: Any) -> Any:
            time.sleep(0.05)
            return real(plan)

        engine.runner.run = slow  # type: ignore[method-assign]
        body = {"model": NAME, "prompt": "x", "max_tokens": 180, "ignore_eos": True, "n": 3}
        with httpx.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}, timeout=60) as reply:
            next(reply.iter_lines())
            assert engine.scheduler.n_running == 3
        _until(lambda: engine.scheduler.is_idle)
        assert engine.scheduler.pool.n_free == engine.scheduler.pool.n_blocks
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json=body, timeout=0.5)
        _until(lambda: engine.scheduler.is_idle)
        reply = httpx.get(f"{url}/metrics").text
        assert 'kajiya_choices_total{finish_reason="cancelled"} 6.0' in reply
        assert 'kajiya_choices_total{finish_reason="length"}' not in reply
        engine.runner.run = real  # type: ignore[method-assign]
        assert _post(url, body | {"max_tokens": 3}).json()["usage"]["completion_tokens"] == 9


def test_a_stop_string_frees_the_row(model_folder: Path, tokenizer: Any, server_url: str) -> None:
    engine = open_engine(model_folder)
    with running(create_app(engine, tokenizer, NAME, ServeConfig())) as url:
        body = {"model": NAME, "prompt": PROMPT, "max_tokens": 150, "temperature": 0, "ignore_eos": True}
        text = _post(url, body).json()["choices"][0]["text"]
        reply = _post(url, body | {"stop": text[2:6]}).json()
        assert reply["choices"][0]["finish_reason"] == "stop"
        assert reply["usage"]["completion_tokens"] < 20
        _until(lambda: engine.scheduler.is_idle)


def test_an_engine_failure_fails_its_requests_and_the_server_goes_on(
    model_folder: Path, tokenizer: Any, greedy: Callable[..., list[int]]
) -> None:
    engine = open_engine(model_folder)
    with running(create_app(engine, tokenizer, NAME, ServeConfig())) as url, ThreadPoolExecutor(4) as pool:
        real = engine.runner.run
        steps = 0

        def failing(plan: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps > 5:
                raise RuntimeError("out of memory, say")
            return real(plan)

        engine.runner.run = failing  # type: ignore[method-assign]
        body = {"model": NAME, "prompt": PROMPT, "max_tokens": 100, "ignore_eos": True}
        whole = pool.submit(_post, url, body)
        streamed = pool.submit(_post, url, body | {"stream": True})
        error = _error(whole.result(), 500)
        assert error["type"] == "server_error"
        assert "out of memory, say" in error["message"]
        assert streamed.result().status_code in (200, 500)
        if streamed.result().status_code == 200:
            last = streamed.result().text.strip().splitlines()[-1]
            assert "out of memory, say" in json.loads(last.removeprefix("data: "))["error"]["message"]
        engine.runner.run = real  # type: ignore[method-assign]
        ids = tokenizer.encode(PROMPT)
        assert httpx.get(f"{url}/health").json()["status"] == "ok"
        expected = _greedy_text(greedy, tokenizer, ids, 8)
        assert asyncio.run(_async_answer(url, ids)) == expected


def test_an_engine_that_cannot_recover_leaves_nobody_waiting(model_folder: Path, tokenizer: Any) -> None:
    engine = open_engine(model_folder)

    def lost(*_: Any) -> Any:
        raise RuntimeError("the device is lost")

    with running(create_app(engine, tokenizer, NAME, ServeConfig())) as url:
        engine.runner.run = lost  # type: ignore[method-assign]
        engine.fail_all = lost  # type: ignore[method-assign]
        body = {"model": NAME, "prompt": PROMPT, "max_tokens": 100}
        assert "the device is lost" in _error(_post(url, body), 500)["message"]
        assert _error(_post(url, body), 503)["code"] == "engine_stopped"
        assert _error(_post(url, {"model": NAME, "input": "x"}, "/v1/embeddings"), 503)["code"] == "engine_stopped"
        assert httpx.get(f"{url}/health").status_code == 503


def test_the_openapi_document_names_every_address(server_url: str) -> None:
    paths = httpx.get(f"{server_url}/openapi.json").json()["paths"]
    assert {"/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/health"} <= set(paths)


async def _async_answer(url: str, ids: list[int]) -> str:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        reply = await client.completions.create(model=NAME, prompt=ids, max_tokens=8, temperature=0)
        return reply.choices[0].text
