"""Tools: how they are told to a model, calls that an answer is bound to or is free to make, and the conversation behind them."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from kajiya.data.chat import ChatTemplate, render_chat
from kajiya.data.conversations import messages_of, tools_of
from kajiya.serving.answer import Piece
from kajiya.serving.protocol import ChatBody
from kajiya.serving.replies import ChatShape
from kajiya.serving.tools import prompt_ids, read_calls

from .conftest import NAME

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["city", "n"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Says it.", "parameters": SCHEMA}}
HOURS = {
    "type": "object",
    "properties": {"hours": {"enum": [1, 2]}},
    "required": ["hours"],
    "additionalProperties": False,
}
OTHER_TOOL = {"type": "function", "function": {"name": "rest", "description": "Waits.", "parameters": HOURS}}


@pytest.fixture
def roomy(roomy_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{roomy_url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called(roomy: openai.OpenAI, stream: bool) -> None:
    client = roomy
    ask: dict[str, Any] = {
        "model": NAME,
        "messages": [{"role": "user", "content": "Rain?"}],
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "max_tokens": 160,
        "temperature": 0,
    }
    if stream:
        chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**ask, stream=True)]
        reason = chunks[-1].finish_reason
        call = chunks[-1].delta.tool_calls[0]
        assert not any(chunk.delta.content for chunk in chunks)
    else:
        choice = client.chat.completions.create(**ask).choices[0]
        reason, call = choice.finish_reason, choice.message.tool_calls[0]
        assert choice.message.content is None
    assert reason == "tool_calls"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments).keys() == {"city", "n"}
    # The conversation goes on with the tool's answer.
    more = [
        {"role": "assistant", "tool_calls": [call.model_dump(exclude={"index"})]},
        {"role": "tool", "tool_call_id": call.id, "content": "Sun."},
    ]
    reply = client.chat.completions.create(
        **ask | {"messages": ask["messages"] + more, "tool_choice": "auto", "max_tokens": 4}
    )
    assert reply.choices[0].finish_reason in ("length", "stop")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("are_several", [False, True])
def test_a_required_call_is_of_one_of_the_tools(roomy: openai.OpenAI, stream: bool, are_several: bool) -> None:
    ask: dict[str, Any] = {
        "model": NAME,
        "messages": [{"role": "user", "content": "Rain?"}],
        "tools": [TOOL, OTHER_TOOL],
        "tool_choice": "required",
        "parallel_tool_calls": are_several,
        "max_tokens": 1200,
        "temperature": 0,
    }
    if stream:
        chunks = [chunk.choices[0] for chunk in roomy.chat.completions.create(**ask, stream=True)]
        reason, calls = chunks[-1].finish_reason, chunks[-1].delta.tool_calls
        assert not any(chunk.delta.content for chunk in chunks)
    else:
        choice = roomy.chat.completions.create(**ask).choices[0]
        reason, calls = choice.finish_reason, choice.message.tool_calls
    assert reason == "tool_calls"
    assert calls
    assert 1 <= len(calls) <= (16 if are_several else 1)
    assert len({call.id for call in calls}) == len(calls)
    for call in calls:
        keys = {"weather": {"city", "n"}, "rest": {"hours"}}[call.function.name]
        assert json.loads(call.function.arguments).keys() == keys


def test_an_answer_is_not_bound_to_a_call_and_to_a_format(roomy_url: str) -> None:
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": "x"}],
        "tools": [TOOL],
        "tool_choice": "required",
        "response_format": {"type": "json_object"},
    }
    reply = httpx.post(f"{roomy_url}/v1/chat/completions", json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "response_format"


NESTED = {
    "type": "object",
    "properties": {"place": {"$ref": "#/$defs/Place"}},
    "required": ["place"],
    "additionalProperties": False,
    "$defs": {
        "Place": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        }
    },
}
"""As Pydantic writes a model within a model."""


def test_schemas_may_refer_to_their_own_parts(roomy: openai.OpenAI) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": NESTED}}
    ask: dict[str, Any] = {
        "model": NAME,
        "messages": [{"role": "user", "content": "Rain?"}],
        "tools": [tool, OTHER_TOOL],
        "max_tokens": 200,
        "temperature": 0,
    }
    named = {"type": "function", "function": {"name": "weather"}}
    call = roomy.chat.completions.create(**ask, tool_choice=named).choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"place": {"city": "Oslo"}}
    # Free to call or to answer as the format says: it does one of them.
    bound = {"type": "json_schema", "json_schema": {"name": "place", "schema": NESTED}}
    choice = roomy.chat.completions.create(**ask, response_format=bound).choices[0]
    if choice.finish_reason == "stop":
        assert json.loads(choice.message.content) == {"place": {"city": "Oslo"}}
    else:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.tool_calls[0].function.name in ("weather", "rest")


CALL = '{"name": "f", "arguments": {"x": 1}}'
OTHER_CALL = '{"name": "g", "parameters": {}}'


@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        (CALL, "", "f"),
        (f" <tool_call>\n{CALL}</tool_call>", "", "f"),
        (f"[{CALL}, {OTHER_CALL}]", "", "fg"),
        (f"{OTHER_CALL}\n{CALL}", "", "gf"),
        (f"Let me see.\n\n{CALL}\n", "Let me see.", "f"),
        (f"I look [twice].\n[{CALL}]", "I look [twice].", "f"),
        (f"Now:\n{{a set}}\n{CALL}", "Now:\n{a set}", "f"),
        (f"So <b> <tool_call>{CALL}</tool_call>\n<tool_call>\n{OTHER_CALL}\n</tool_call>", "So <b>", "fg"),
        ("Hello.\n", "Hello.\n", ""),
        (f"{CALL} and", f"{CALL} and", ""),
        (f"as in {CALL}", f"as in {CALL}", ""),
        (f"[{CALL}, 1]", f"[{CALL}, 1]", ""),
        (CALL.replace('"f"', '"h"'), CALL.replace('"f"', '"h"'), ""),
        ('{"name": "f"}', '{"name": "f"}', ""),
        ('{"name": [], "arguments": {}}', '{"name": [], "arguments": {}}', ""),
        ("[" * 100_000, "[" * 100_000, ""),
        ("", "", ""),
    ],
)
def test_calls_are_read_out_of_answers_whole_and_streamed(text: str, content: str, names: str) -> None:
    found, calls = read_calls(text, ["f", "g"])
    assert found == content
    assert "".join(call["function"]["name"] for call in calls) == names
    assert {call["function"]["arguments"] for call in calls} <= {'{"x": 1}', "{}"}
    assert all(len(call["id"]) == 9 and call["id"].isalnum() for call in calls)
    shape = ChatShape(NAME, lambda _: b"", False, ("f", "g"))
    step = max(1, len(text) // 50)
    pieces = [Piece(text[i : i + step], (), None) for i in range(0, len(text), step)]
    deltas = [shape.part(0, piece)["delta"] for piece in pieces] + [shape.part(0, Piece("", (), "stop"))["delta"]]
    assert "".join(delta.get("content", "") for delta in deltas) == content
    assert "".join(call["function"]["name"] for call in deltas[-1].get("tool_calls", ())) == names
    assert len(shape.whole(0, Piece(text, (), "stop"))["message"].get("tool_calls", ())) == len(names)
    first = ChatShape(NAME, lambda _: b"", False, ("f", "g"), max_calls=1).whole(0, Piece(text, (), "stop"))["message"]
    assert len(first.get("tool_calls", ())) == min(1, len(names))


def test_what_is_certainly_text_is_streamed_at_once() -> None:
    shape = ChatShape(NAME, lambda _: b"", False, ("f",))
    given = [
        shape.part(0, Piece(text, (), None))["delta"].get("content", "") for text in ("I will ", "see {x} <t", "wo>.\n")
    ]
    assert given == ["I will", " see {x}", " <two>."]


# Trained with tools: this is how Hermes and Qwen write them.
HERMES = """{%- if tools %}<|system|># Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% endif %}
{%- for message in messages %}<|{{ message.role }}|>{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}
<tool_call>{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}</tool_call>
{%- endfor %}
{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
NO_TOOLS = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}<|assistant|>"


def _ids(tokenizer: Any, template: str, body: dict[str, Any]) -> tuple[list[int], str]:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    given = ChatBody.model_validate({"model": NAME} | body)
    ids = prompt_ids(ChatTemplate(tokenizer), given.messages, given.offered)
    return ids, tokenizer.decode(ids)


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Rain?"},
    {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [
            {
                "id": f"call-{i}",
                "type": "function",
                "function": {"name": "weather", "arguments": f'{{"city": "{city}"}}'},
            }
            for i, city in enumerate(("Oslo", "Rome"))
        ],
    },
    {"role": "tool", "tool_call_id": "call-0", "content": "Sun."},
    {"role": "tool", "tool_call_id": "call-1", "content": "Rain."},
]


def test_a_template_that_knows_tools_renders_them_as_in_training(tokenizer: Any) -> None:
    ids, text = _ids(tokenizer, HERMES, {"messages": CONVERSATION, "tools": [TOOL]})
    trained = copy.deepcopy(tokenizer)
    trained.chat_template = HERMES
    assert ids == render_chat(trained, messages_of(CONVERSATION, "messages"), True, tools_of([TOOL]))
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>' in text
    assert "<|tool|>Sun." in text
    assert json.dumps(TOOL["function"]["description"]) in text
    unoffered = _ids(tokenizer, HERMES, {"messages": CONVERSATION, "tools": [TOOL], "tool_choice": "none"})[1]
    assert "# Tools" not in unoffered
    assert "<|tool|>Sun." in unoffered


def test_a_template_that_knows_no_tools_is_told_in_words(tokenizer: Any) -> None:
    text = _ids(tokenizer, NO_TOOLS, {"messages": CONVERSATION, "tools": [TOOL]})[1]
    assert text.startswith("<|system|>Be brief.\n\nYou can call these tools:\n")
    assert '"description": "Says it."' in text
    assert 'I look.\n{"name": "weather", "arguments": {"city": "Oslo"}}\n{"name": "weather"' in text
    assert "<|user|>The tool answered: Sun.\nThe tool answered: Rain.\n<|assistant|>" in text


@pytest.mark.parametrize("arguments", ["{", "[1]", '{"x": "\\ud800"}', "[" * 100_000])
def test_calls_that_are_none_are_refused(server_url: str, arguments: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
    reply = httpx.post(f"{server_url}/v1/chat/completions", json={"model": NAME, "messages": messages})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "messages"


def test_a_strict_tool_is_called_by_its_schema_or_not_at_all(roomy_url: str) -> None:
    strict = {"type": "function", "function": TOOL["function"] | {"strict": True}}  # type: ignore[operator]
    body: dict[str, Any] = {
        "model": NAME,
        "messages": [{"role": "user", "content": "Rain?"}],
        "tools": [OTHER_TOOL, strict],
        "max_tokens": 160,
        "temperature": 0,
    }
    for choice in ({}, {"tool_choice": "auto"}):
        refused = httpx.post(f"{roomy_url}/v1/chat/completions", json=body | choice, timeout=60)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "tools"
        assert "tools[1].function.strict" in refused.json()["error"]["message"]
    bound = {"type": "json_schema", "json_schema": {"name": "place", "strict": True, "schema": SCHEMA}}
    for choice in ({"tool_choice": "required"}, {"tool_choice": "none"}, {"response_format": bound}):
        reply = httpx.post(f"{roomy_url}/v1/chat/completions", json=body | choice, timeout=60)
        assert reply.status_code == 200, reply.text
