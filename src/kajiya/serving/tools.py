"""Tool calls: how tools are told to a model that knows none, what an answer must look like, and how calls are read out of it."""

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from kajiya.data.chat import ChatTemplate
from kajiya.errors import DataError, RequestError
from kajiya.serving.messages import read_messages, require_known, require_unicode
from kajiya.serving.text import overlap

_INTRODUCTION = (
    "You can call these tools:\n{tools}\n"
    'To call one, answer with nothing but a JSON object: {{"name": <name of the tool>, "arguments": {{…}}}}.'
)
_OPEN = "<tool_call>"
_WRAPPED = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_BARE = re.compile(r"^\s*[\[{]", re.MULTILINE)
_BEGINNING = re.compile(rf"\s*{_OPEN}|{_BARE.pattern}", re.MULTILINE)
_MAX_CALLS = 16
"""Calls in an answer that is bound to several: a small model could go on for ever."""


def check_tools(tools: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The schema of each tool's arguments by the tool's name. Raises `RequestError` for what is no function tool."""
    found: dict[str, dict[str, Any]] = {}
    for place, tool in enumerate(tools):
        where, function = f"tools[{place}]", tool.get("function")
        if (
            tool.get("type") != "function"
            or not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
        ):
            raise RequestError(f"{where} must be a function with a name", param="tools")
        require_known(tool, ("type", "function"), where, "tools")
        require_known(function, ("name", "description", "parameters", "strict"), f"{where}.function", "tools")
        parameters = function.get("parameters") or {"type": "object"}
        if not isinstance(parameters, dict):
            raise RequestError(f"{where}.function.parameters must be a JSON schema", param="tools")
        if not isinstance(function.get("strict"), bool | None):
            raise RequestError(f"{where}.function.strict must be true or false", param="tools")
        require_unicode(json.dumps(function, ensure_ascii=False), where, "tools")
        if function["name"] in found:
            raise RequestError(f"{where}.function.name: {function['name']!r} is the name of two tools", param="tools")
        found[function["name"]] = parameters
    return found


def refuse_strict(tools: Sequence[Mapping[str, Any]]) -> None:
    """Raise `RequestError` for a tool whose calls are to be bound to its schema, where the answer is bound to nothing."""
    for place, tool in enumerate(tools):
        if tool["function"].get("strict"):
            raise RequestError(
                f"tools[{place}].function.strict binds an answer that must be a call: give tool_choice as required or as "
                "the function's name, or leave strict out",
                code="unsupported_parameter",
                param="tools",
            )


def prompt_ids(
    chat: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    context_tokens: int | None = None,
) -> list[int]:
    """Token ids of a request's conversation, rendered as in training; what the template does not know of tools is in words.

    Raises `RequestError` for what it cannot render, and for what is far longer than a context of so many tokens.
    """
    read, told = read_messages(messages), list(tools)
    check_tools(told)
    if told and not chat.knows_tools:
        read, told = _told_in_text(read, told), []
    read = _known_or_in_text(chat, read, told)
    if context_tokens is not None and chat.is_longer(read, context_tokens, tools=told or None):
        raise too_long(context_tokens, "messages")
    try:
        return chat.ids(read, tools=told or None, add_generation_prompt=True)
    except DataError as error:
        raise RequestError(str(error), param="messages") from error


def too_long(context_tokens: int, param: str) -> RequestError:
    """The error for a text that is far longer than the context, and is not tokenized to say by how much."""
    return RequestError(
        f"This model's context length is {context_tokens} tokens, but {param} has far more.",
        code="context_length_exceeded",
        param=param,
    )


def _told_in_text(messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages, the tools told by the system."""
    told = _INTRODUCTION.format(tools="\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools))
    if messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{messages[0]['content']}\n\n{told}"}, *messages[1:]]
    return [{"role": "system", "content": told}, *messages]


def _known_or_in_text(chat: ChatTemplate, messages: list[dict[str, Any]], tools: Any) -> list[dict[str, Any]]:
    """The messages; those with a call that the template would leave out, or the words beside it, are texts, and so are answers."""
    plain: list[dict[str, Any]] = []
    for behind, message in zip([None, *messages], messages, strict=False):
        is_about_calls = message["role"] == "tool" or bool(message.get("tool_calls"))
        content = None if message["role"] == "tool" else message["content"] or None
        if not is_about_calls or chat.knows_calls(tools, content):
            plain.append(message)
        elif behind is not None and behind["role"] == message["role"] == "tool":
            plain[-1]["content"] += f"\n{_in_text(message)['content']}"
        else:
            plain.append(_in_text(message))
    return plain


def _in_text(message: Mapping[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        # Most templates know no such role.
        return {"role": "user", "content": f"The tool answered: {message['content']}"}
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    return {"role": message["role"], "content": "\n".join([*filter(None, [message["content"]]), *calls])}


def call_schema(schemas: Mapping[str, dict[str, Any]], choice: Any, are_several: bool = False) -> str | None:
    """The JSON schema that `tool_choice` binds the answer to, of a call or of several; `None` where the model may choose.

    Raises `RequestError` for a choice that is none, or of a tool that is not there.
    """
    if choice in (None, "auto", "none"):
        return None
    names = list(schemas)
    if isinstance(choice, dict) and choice.get("type") == "function" and isinstance(choice.get("function"), dict):
        names = [choice["function"].get("name")]
    elif choice != "required":
        raise RequestError("tool_choice must be none, auto, required or a function's name", param="tool_choice")
    if not names or any(name not in schemas for name in names):
        raise RequestError(f"tool_choice names {names}, but the tools are {list(schemas)}", param="tool_choice")
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": _resource(schemas[name], f"tool-{place}")},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for place, name in enumerate(names)
    ]
    call = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return json.dumps({"type": "array", "items": call, "minItems": 1, "maxItems": _MAX_CALLS} if are_several else call)


def format_or_call(schema: str, schemas: Mapping[str, dict[str, Any]], are_several: bool) -> str:
    """The JSON schema of an answer that either is what `response_format` asks for or calls tools."""
    call = call_schema(schemas, "required", are_several)
    assert call is not None
    return json.dumps({"anyOf": [_resource(json.loads(schema), "format"), json.loads(call)]})


def _resource(schema: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The schema within another: with a name, its references start at itself (JSON Schema 2020-12, section 8.2.1)."""
    return {"$id": f"kajiya:{name}", **schema}


def read_calls(text: str, names: Sequence[str]) -> tuple[str, list[dict[str, Any]]]:
    """The text of an answer and the tool calls behind it, in OpenAI's form; none where it is a text to its end.

    A call is a JSON object, several stand in a list, behind one another, or each between `<tool_call>` and `</tool_call>`.
    """
    wrapped = _WRAPPED.findall(text)
    if wrapped:
        calls = [_calls(body, names) for body in wrapped]
        return (
            (_WRAPPED.sub("", text).rstrip(), [call for each in calls for call in each]) if all(calls) else (text, [])
        )
    for place in _BARE.finditer(text):
        found = _calls(text[place.start() :], names)
        if found:
            return text[: place.start()].rstrip(), found
    return text, []


def certain(text: str, known: int) -> int:
    """How much of an answer's beginning is text, whatever comes; that much was `known` before. A call begins behind it."""
    begun = _BEGINNING.search(text, known)
    end = len(text) - overlap(text, _OPEN) if begun is None else begun.start()
    return len(text[:end].rstrip())


def _calls(text: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """The calls that a text is from end to end; empty where it is something else."""
    found: list[Any] = []
    text, at = text.strip(), 0
    try:
        while at < len(text):
            value, at = json.JSONDecoder().raw_decode(text, at)
            found += value if isinstance(value, list) else [value]
            at += len(text[at:]) - len(text[at:].lstrip())
    except (ValueError, RecursionError):
        return []
    calls = [_call(value, names) for value in found]
    return [call for call in calls if call is not None] if all(calls) else []


def _call(value: Any, names: Sequence[str]) -> dict[str, Any] | None:
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    # Llama's own word for them is the second.
    arguments = value.get("arguments", value.get("parameters"))
    if not isinstance(arguments, dict):
        return None
    function = {"name": value["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
    # Nine letters and digits: what Mistral's template takes back.
    return {"id": uuid.uuid4().hex[:9], "type": "function", "function": function}
