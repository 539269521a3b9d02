"""Conversations in one form: roles, texts and tool calls as the chat templates of Transformers read them.

A message is `{"role": system, user, assistant or tool; "content": text}`; an assistant's may have `tool_calls` (its content
is then a text or null) and `reasoning_content`, a tool's `name` and `tool_call_id`; any may have a `weight`.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from kajiya.data.values import RowError, json_of, list_of, objects_of, require_unicode, text_of

Message = dict[str, Any]

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "ipython": "tool",
}
"""Names of roles, those of ShareGPT among them."""
_BEHIND = {
    "system": (),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""Which message may stand before one of each role, a system message at the head aside."""
KEYS = frozenset(
    {"role", "from", "content", "value", "tool_calls", "tool_call_id", "name", "weight", "train"}
    | {"reasoning_content", "reasoning", "thinking"}
)
"""What a message may hold, `from` and `value` being ShareGPT's names of role and content."""
_REASONING = ("reasoning_content", "reasoning", "thinking")


def messages_of(value: Any, where: str, *, system: Any = None) -> list[Message]:
    """A conversation in the canonical form; `system` is the text of a column of its own. Raises `RowError`."""
    found = [_message(item, f"{where}[{index}]") for index, item in enumerate(objects_of(value, where))]
    if not found:
        raise RowError(f"holds no message under {where!r}")
    if system is not None and (words := text_of(system, "system", is_empty_allowed=True)).strip():
        if found[0]["role"] == "system":
            raise RowError(f"has a system message under 'system' and under {where!r}")
        found.insert(0, {"role": "system", "content": words})
    return found


def with_keys(value: Any, keys: Mapping[str, str]) -> Any:
    """Messages, or their JSON text, with our names of their keys (`keys`: ours → theirs) and no others; else as it is."""
    if not keys:
        return value
    try:
        found = json_of(value, "messages")
    except RowError:
        return value
    if not isinstance(found, list) or not all(isinstance(item, Mapping) for item in found):
        return value
    if found is not value and not any(theirs in item for item in found for theirs in keys.values()):
        return value
    return [{ours: item[theirs] for ours, theirs in keys.items() if theirs in item} for item in found]


def require_order(messages: Sequence[Mapping[str, Any]], where: str) -> None:
    """Raise `RowError` unless an optional system message, then user and assistant (with tools behind it) take turns."""
    start = 1 if messages[0]["role"] == "system" else 0
    if start == len(messages):
        raise RowError(f"has nothing but a system message under {where!r}")
    for index in range(start, len(messages)):
        role, behind = messages[index]["role"], messages[index - 1]["role"] if index > start else None
        if role == "user" and behind is None:
            continue
        if behind not in _BEHIND[role]:
            place = f"behind one of the {behind}" if behind else "at the head"
            raise RowError(
                f"has a message of the {role} {place} ({where}[{index}]); user and assistant take turns, the user first"
            )
        if role == "tool" and behind == "assistant" and not messages[index - 1].get("tool_calls"):
            raise RowError(f"has a tool's answer that no tool call stands before ({where}[{index}])")


def tools_of(value: Any, where: str = "tools") -> list[dict[str, Any]] | None:
    """Descriptions of tools (JSON schemas of functions), or their JSON text; `None` where there are none."""
    tools = [_tool(tool, f"{where}[{index}]") for index, tool in enumerate(list_of(value, where))]
    require_unicode(tools, where)
    return tools or None


def _tool(given: Any, where: str) -> dict[str, Any]:
    """The description of a tool, which some data sets hold as a text."""
    tool = _described(json_of(given, where), where)
    if "function" not in tool:
        return {"type": "function", "function": tool}
    return tool | {"function": _described(tool["function"], f"{where}.function")}


def _described(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowError(f"holds a {type(value).__name__} under {where!r}, not the description of a tool")
    return value


def message_text(message: Mapping[str, Any]) -> str:
    """All that a message says, its reasoning and tool calls included."""
    parts = [message.get("reasoning_content"), message.get("content")]
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", [])]
    return "\n".join(part for part in [*parts, *calls] if part)


def _message(item: Mapping[str, Any], where: str) -> Message:
    for key, value in item.items():
        if key not in KEYS and value not in (None, "", [], {}):
            raise RowError(
                f"has an unknown key {key!r} in {where} (known: {', '.join(sorted(KEYS))}); to leave such keys out, name those "
                "to read: data.columns={message.role: role, message.content: content}"
            )
    given = item.get("role", item.get("from"))
    if not isinstance(given, str) or given not in _ROLES:
        raise RowError(f"has the role {given!r:.100} in {where}, which is none of {', '.join(_ROLES)}")
    message: Message = {"role": _ROLES[given]}
    content = item.get("content", item.get("value"))
    if given == "function_call":
        message["content"], calls = None, json_of(content, f"{where}.value")
        calls = calls if isinstance(calls, list) else [calls]
    else:
        calls = list_of(item.get("tool_calls"), f"{where}.tool_calls")
        message["content"] = _content(content, where, message["role"], has_calls=bool(calls))
    if calls:
        if message["role"] != "assistant":
            raise RowError(f"has tool calls in {where}, a message of the {message['role']}")
        message["tool_calls"] = [_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    reasoning = next((item[key] for key in _REASONING if item.get(key)), None)
    if reasoning is not None:
        message["reasoning_content"] = text_of(reasoning, f"{where}.reasoning_content")
    for key in ("name", "tool_call_id"):
        if item.get(key) is not None:
            message[key] = text_of(item[key], f"{where}.{key}")
    weight = _weight(item, where)
    return message if weight is None else message | {"weight": weight}


def _content(content: Any, where: str, role: str, *, has_calls: bool) -> str | None:
    if content is None and has_calls:
        return None
    if isinstance(content, list):
        for index, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") != "text":
                raise RowError(f"holds something else than text under '{where}.content[{index}]'")
        content = "".join(text_of(part.get("text"), f"{where}.content", is_empty_allowed=True) for part in content)
    # A tool may well answer nothing.
    return text_of(content, f"{where}.content", is_empty_allowed=has_calls or role == "tool")


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    call = json_of(call, where)
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(f"holds no tool call under {where!r}: it needs a function with name and arguments")
    arguments = json_of(function.get("arguments", function.get("parameters", {})) or {}, f"{where}.arguments")
    if not isinstance(arguments, dict):
        raise RowError(f"holds a {type(arguments).__name__} under '{where}.arguments', not an object")
    made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    require_unicode(made, where)
    return made | ({"id": text_of(call["id"], f"{where}.id")} if call.get("id") is not None else {})


def _weight(item: Mapping[str, Any], where: str) -> float | None:
    weight, train = item.get("weight"), item.get("train")
    if weight is not None and train is not None:
        raise RowError(f"has both weight and train in {where}")
    if train is not None and not isinstance(train, bool):
        raise RowError(f"has train={train!r} in {where}, which is neither true nor false")
    value = weight if train is None else train
    if value is None:
        return None
    if not isinstance(value, (int, float)) or not 0 <= value <= sys.float_info.max:
        raise RowError(f"has weight={value!r} in {where}, which is no number from 0 up")
    return float(value)
