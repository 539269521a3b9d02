"""The bodies that the API takes: every field checked, nothing unknown let through, nothing ignored silently."""

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from kajiya.config.tables import nearest
from kajiya.errors import RequestError
from kajiya.serving.tools import check_tools, introduce

MAX_LOGPROBS = 20
"""Most alternatives that a request may ask for with each token."""
_MAX_STOPS = 16
_INT64 = 2**63

_NOTHING: tuple[Any, ...] = (None,)
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "audio": _NOTHING,
    "best_of": (None, 1),
    "dimensions": _NOTHING,
    "function_call": (None, "none"),
    "functions": (None, []),
    "metadata": (None, {}),
    "modalities": (None, ["text"]),
    "moderation": _NOTHING,
    "prediction": _NOTHING,
    "prompt_cache_key": _NOTHING,
    "prompt_cache_options": _NOTHING,
    "prompt_cache_retention": _NOTHING,
    "reasoning_effort": (None, "none"),
    "safety_identifier": _NOTHING,
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "verbosity": _NOTHING,
    "web_search_options": _NOTHING,
}
"""Parameters of OpenAI's API that are not supported here, each with the values that ask for nothing."""


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
_MESSAGES = {
    "type": "array",
    "minItems": 1,
    "items": {
        "anyOf": [
            {
                "type": "object",
                "properties": {"role": {"enum": ["system", "developer", "user", "assistant"]}, "content": _TEXT},
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
"""What the OpenAPI document says of messages; they are checked by `ChatBody.plain_messages`."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            raise RequestError("the body must be a JSON object", code="invalid_type")
        kept = {}
        for key, value in given.items():
            if key in cls.model_fields:
                kept[key] = value
            elif key not in _UNSUPPORTED:
                hint = nearest(key, cls.model_fields)
                message = f"unknown parameter {key!r}" + (f"; {hint}" if hint else "")
                raise RequestError(message, code="unknown_parameter", param=key)
            elif not any(_asks_same(value, neutral) for neutral in _UNSUPPORTED[key]):
                raise RequestError(f"{key} is not supported by this server", code="unsupported_parameter", param=key)
        return kept


def _asks_same(value: Any, neutral: Any) -> bool:
    """Equal, where 0 and 0.0 are the same and 1 and true are not."""
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


class StreamOptions(BaseModel):
    """What a stream carries beside its pieces."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool | None = None


class _Generation(_Body):
    """What completions and chat completions have in common. `null` stands for the default."""

    model: str
    max_tokens: int | None = Field(None, ge=0, lt=_INT64)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1, lt=_INT64)
    n: int | None = Field(None, ge=1, le=128)
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _check_streaming(self) -> "_Generation":
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options goes with stream: true only", param="stream_options")
        if isinstance(self.stop, list) and len(self.stop) > _MAX_STOPS:
            raise RequestError(f"stop takes at most {_MAX_STOPS} strings, not {len(self.stop)}", param="stop")
        for stop in self.stops:
            _require_unicode(stop, "stop", "stop")
        if any(not stop for stop in self.stops):
            raise RequestError("stop must not be empty", param="stop")
        return self

    def biases(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias` as token ids and numbers. Raises `RequestError` for what is none."""
        found = []
        for key, value in (self.logit_bias or {}).items():
            # Not `isdecimal`: it takes digits of other scripts, and signs are no token's.
            if not (key.isascii() and key.isdigit() and len(key) < 19):
                raise RequestError(f"logit_bias: {key!r} is no token id", param="logit_bias")
            if not -100 <= value <= 100:
                raise RequestError(f"logit_bias: {key} must be from -100 to 100, not {value}", param="logit_bias")
            found.append((int(key), value))
        return tuple(found)

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def with_usage(self) -> bool:
        """Whether the stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionBody(_Generation):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="before")
    @classmethod
    def _check_prompt(cls, given: Any) -> Any:
        if isinstance(given, dict):
            check_texts_or_ids(given, "prompt")
        return given


class ChatBody(_Generation):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[dict[str, Any]], WithJsonSchema(_MESSAGES)]
    max_completion_tokens: int | None = Field(None, ge=1, lt=_INT64)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs goes with logprobs: true only", param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise RequestError("give max_completion_tokens or max_tokens, not both", param="max_tokens")
        if self.max_tokens == 0:
            raise RequestError("max_tokens must be at least 1, not 0", param="max_tokens")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise RequestError("tool_choice goes with tools only", param="tool_choice")
        return self

    @property
    def answer_tokens(self) -> int | None:
        """Longest answer, tokens, under its newer or its older name."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    def plain_messages(self) -> list[dict[str, str]]:
        """The messages as role and text. Raises `RequestError` for what is no text."""
        if not self.messages:
            raise RequestError("messages is empty", param="messages")
        plain = [_plain_message(message, f"messages[{i}]") for i, message in enumerate(self.messages)]
        if not self.tools or self.tool_choice == "none":
            return plain
        check_tools(self.tools)
        told = introduce(self.tools)
        if plain[0]["role"] == "system":
            return [{"role": "system", "content": f"{plain[0]['content']}\n\n{told}"}, *plain[1:]]
        return [{"role": "system", "content": told}, *plain]


class EmbeddingBody(_Body):
    """`POST /v1/embeddings`."""

    model: str
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: str | None = Field(None, pattern="^(float|base64)$")
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_input(cls, given: Any) -> Any:
        if isinstance(given, dict):
            check_texts_or_ids(given, "input")
        return given


class AdapterBody(_Body):
    """`POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`, in vLLM's words."""

    lora_name: str = Field(min_length=1, max_length=200)
    lora_path: str = ""
    model: str | None = None


class ModelBody(_Body):
    """`POST /v1/load_model`."""

    name: str = Field(min_length=1, max_length=200)
    folder: str


class NameBody(_Body):
    """`POST /v1/unload_model`."""

    name: str


def check_texts_or_ids(given: Mapping[str, Any], field: str) -> None:
    """Raise `RequestError` unless `given[field]` is a text, texts, token ids, or lists of token ids."""
    if field not in given:
        raise RequestError(f"{field} is missing", code="missing_required_parameter", param=field)
    value = given[field]
    items = value if isinstance(value, list) else [value]
    is_texts = all(isinstance(item, str) for item in items)
    is_ids = isinstance(value, list) and all(_is_id(item) for item in items)
    is_id_lists = all(isinstance(item, list) and item and all(_is_id(one) for one in item) for item in items)
    if not items or not (is_texts or is_ids or is_id_lists):
        raise RequestError(
            f"{field} must be a string, a list of strings, a list of token ids or a list of those, and not empty",
            code="invalid_type",
            param=field,
        )
    if is_texts:
        for item in items:
            _require_unicode(item, field, field)


def _require_unicode(text: str, where: str, param: str) -> None:
    """JSON can spell half of a surrogate pair, which is no character and which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{where} is no valid Unicode text: {error.reason}", param=param) from error


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _plain_message(message: dict[str, Any], where: str) -> dict[str, str]:
    mine = {"tool": ("tool_call_id", "name"), "assistant": ("tool_calls",)}.get(str(message.get("role")), ())
    for key, value in message.items():
        if key not in ("role", "content", *mine) and value not in (None, [], ""):
            raise RequestError(f"{where}.{key} is not supported", code="unsupported_parameter", param="messages")
    role = message.get("role")
    role = "system" if role == "developer" else role
    if role not in ("system", "user", "assistant", "tool"):
        raise RequestError(f"{where}.role must be system, user, assistant or tool, not {role!r}", param="messages")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_text_part(part, where) for part in content)
    calls = message.get("tool_calls")
    if calls and content in (None, ""):
        content = "\n".join(_call_text(call, where) for call in calls) if isinstance(calls, list) else None
    elif calls:
        raise RequestError(f"{where}.tool_calls goes with an assistant's message without content", param="messages")
    if not isinstance(content, str):
        raise RequestError(f"{where}.content must be a text", code="invalid_type", param="messages")
    _require_unicode(content, f"{where}.content", "messages")
    if role == "tool":
        # Most templates know no such role.
        return {"role": "user", "content": f"The tool answered: {content}"}
    return {"role": role, "content": content}


def _call_text(call: Any, where: str) -> str:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not all(isinstance(function.get(key), str) for key in ("name", "arguments")):
        raise RequestError(f"{where}.tool_calls: each has a function with name and arguments", param="messages")
    return f'{{"name": {json.dumps(function["name"])}, "arguments": {function["arguments"]}}}'


def _text_part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise RequestError(f"{where}.content: only parts of type text are supported", param="messages")
    text: str = part["text"]
    return text
