"""The messages of a chat request: checked, and in the form that chat templates take, which is that of the training's rows."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from kajiya.config.tables import nearest
from kajiya.errors import RequestError

_TEXT = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
                "additionalProperties": False,
            },
        },
    ]
}
MESSAGES = {
    "type": "array",
    "minItems": 1,
    "items": {
        "anyOf": [
            {
                "type": "object",
                "properties": {
                    "role": {"enum": ["system", "developer", "user", "assistant"]},
                    "content": _TEXT,
                    "name": {"type": "string"},
                },
                "required": ["role", "content"],
                "additionalProperties": False,
            },
            {
                "type": "object",
                "properties": {"role": {"const": "assistant"}, "tool_calls": {"type": "array"}},
                "required": ["role", "tool_calls"],
            },
            {
                "type": "object",
                "properties": {"role": {"const": "tool"}, "content": _TEXT, "tool_call_id": {"type": "string"}},
                "required": ["role", "content"],
                "additionalProperties": False,
            },
        ]
    },
}
"""What the OpenAPI document says of messages; they are checked by `read_messages`."""
_OWN: Mapping[str, tuple[str, ...]] = {"tool": ("tool_call_id",), "assistant": ("tool_calls",)}
"""What messages of a role may have beside role, content and a name."""


def read_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as `data` has them: texts, calls with their arguments as objects. Raises `RequestError` for what is no text."""
    if not messages:
        raise RequestError("messages is empty", param="messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def require_unicode(text: str, where: str, param: str) -> None:
    """JSON can spell half of a surrogate pair, which is no character and which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{where} is no valid Unicode text: {error.reason}", param=param) from error


def require_known(given: Mapping[str, Any], known: Collection[str], where: str, param: str) -> None:
    """Raise `RequestError` for a key that is not among the known ones."""
    for key in given:
        if key not in known:
            hint = nearest(key, known)
            message = f"unknown parameter {where}.{key}" + (f"; {hint}" if hint else "")
            raise RequestError(message, code="unknown_parameter", param=param)


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = message.get("role")
    role = "system" if role == "developer" else role
    own = _OWN.get(str(role), ())
    for key, value in message.items():
        if key not in ("role", "content", "name", *own) and value not in (None, [], ""):
            raise RequestError(f"{where}.{key} is not supported", code="unsupported_parameter", param="messages")
    if role not in ("system", "user", "assistant", "tool"):
        raise RequestError(f"{where}.role must be system, user, assistant or tool, not {role!r}", param="messages")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_text_part(part, where) for part in content)
    calls = message.get("tool_calls") if "tool_calls" in own else None
    if not isinstance(content, str) and not (calls and content is None):
        raise RequestError(f"{where}.content must be a text", code="invalid_type", param="messages")
    found: dict[str, Any] = {"role": role, "content": content}
    if calls:
        if not isinstance(calls, list):
            raise RequestError(f"{where}.tool_calls must be a list", code="invalid_type", param="messages")
        found["tool_calls"] = [_call(call, where) for call in calls]
    names = ("name", *own) if role == "tool" else ("name",)
    found |= {key: _name(message[key], f"{where}.{key}") for key in names if message.get(key) is not None}
    require_unicode(json.dumps(found, ensure_ascii=False), where, "messages")
    return found


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not all(isinstance(function.get(key), str) for key in ("name", "arguments")):
        raise RequestError(f"{where}.tool_calls: each has a function with name and arguments", param="messages")
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}.tool_calls: the arguments are no JSON: {error}", param="messages") from error
    if not isinstance(arguments, dict):
        raise RequestError(f"{where}.tool_calls: the arguments must be a JSON object", param="messages")
    found = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return found | ({"id": _name(call["id"], f"{where}.tool_calls.id")} if call.get("id") is not None else {})


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{where} must be a text", code="invalid_type", param="messages")
    return value


def _text_part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise RequestError(f"{where}.content: only parts of type text are supported", param="messages")
    text: str = part["text"]
    return text
