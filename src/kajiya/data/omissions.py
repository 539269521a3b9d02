"""Parts of a message that a chat template may leave out without a word: each is changed, to see whether the text changes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Place = tuple[Any, ...]
"""What a template could go by when it leaves a part out; what it does is looked at once for each."""


def parts_of(message: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The parts of a message that some template leaves out, by name, each with the message in which it is another."""
    role, content, calls = message["role"], message.get("content"), message.get("tool_calls") or []
    if role in ("system", "tool"):
        yield ("system message" if role == "system" else "answers of tools"), {**message, "content": f"{content} probe"}
    if message.get("reasoning_content"):
        thought = f"{message['reasoning_content']} probe"
        yield "reasoning", {**message, "reasoning_content": thought, "thinking": thought}
    if calls and content:
        yield "words beside tool calls", {**message, "content": f"{content} probe"}
    for number, call in enumerate(calls):
        function = call["function"]
        arguments = type(function["arguments"])(function["arguments"], probe="probe")
        other = {**call, "function": {**function, "arguments": arguments}}
        name = "tool calls beside words" if content else "tool calls"
        yield name, {**message, "tool_calls": [*calls[:number], other, *calls[number + 1 :]]}


def place_of(messages: Sequence[Mapping[str, Any]], index: int) -> Place:
    """The place of a message: what it, its neighbours and the last message are like."""
    around = messages[max(0, index - 1) : index + 2]
    return (index == 0, index + 1 == len(messages), messages[-1]["role"], *map(_shape, around))


def _shape(message: Mapping[str, Any]) -> Place:
    calls = message.get("tool_calls") or []
    return message["role"], bool(message.get("content")), len(calls), bool(message.get("reasoning_content"))
