"""Tool calls: how tools are told to a model, what its answer must look like, and how a call is read out of it."""

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from kajiya.errors import RequestError

_INTRODUCTION = (
    "You can call these tools:\n{tools}\n"
    'To call one, answer with nothing but a JSON object: {{"name": <name of the tool>, "arguments": {{…}}}}.'
)
_WRAPPED = re.compile(r"^\s*<tool_call>\s*(.*?)\s*</tool_call>\s*$", re.DOTALL)


def check_tools(tools: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The schema of each tool's arguments by the tool's name. Raises `RequestError` for what is no function tool."""
    found: dict[str, dict[str, Any]] = {}
    for place, tool in enumerate(tools):
        function = tool.get("function")
        if (
            tool.get("type") != "function"
            or not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
        ):
            raise RequestError(f"tools[{place}] must be a function with a name", param="tools")
        parameters = function.get("parameters") or {"type": "object"}
        if not isinstance(parameters, dict):
            raise RequestError(f"tools[{place}].function.parameters must be a JSON schema", param="tools")
        found[function["name"]] = parameters
    return found


def introduce(tools: Sequence[Mapping[str, Any]]) -> str:
    """What the system message says of the tools."""
    return _INTRODUCTION.format(tools="\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools))


def call_schema(schemas: Mapping[str, dict[str, Any]], choice: Any) -> str | None:
    """The JSON schema that `tool_choice` binds the answer to; `None` where the model may choose.

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
            "properties": {"name": {"const": name}, "arguments": schemas[name]},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name in names
    ]
    return json.dumps(calls[0] if len(calls) == 1 else {"anyOf": calls})


def read_call(text: str, names: Sequence[str]) -> dict[str, Any] | None:
    """The tool call that an answer is, in OpenAI's form; `None` where it is a text."""
    wrapped = _WRAPPED.match(text)
    try:
        found = json.loads(wrapped.group(1) if wrapped else text)
    except ValueError:
        return None
    if not isinstance(found, dict) or found.get("name") not in names or not isinstance(found.get("arguments"), dict):
        return None
    arguments = json.dumps(found["arguments"], ensure_ascii=False)
    function = {"name": found["name"], "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def schema_of(response_format: Mapping[str, Any] | None) -> str | None:
    """The JSON schema that `response_format` asks for, as text; `None` for free text. Raises `RequestError`."""
    kind = (response_format or {"type": "text"}).get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return json.dumps({"type": "object"})
    assert response_format is not None
    inner = response_format.get("json_schema")
    if kind != "json_schema" or not isinstance(inner, dict) or not isinstance(inner.get("schema"), dict):
        raise RequestError(
            "response_format must be of type text, json_object, or json_schema with json_schema.schema",
            param="response_format",
        )
    return json.dumps(inner["schema"])
