"""The bodies that the API takes: every field checked, nothing unknown let through, nothing ignored silently."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from kajiya.config.tables import nearest
from kajiya.errors import RequestError
from kajiya.serving.messages import MESSAGES, require_unicode
from kajiya.serving.response_format import ResponseFormat

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
    "modalities": (None, ["text"]),
    "moderation": _NOTHING,
    "prediction": _NOTHING,
    "prompt_cache_options": _NOTHING,
    "prompt_cache_retention": _NOTHING,
    "reasoning_effort": (None, "none"),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "verbosity": _NOTHING,
    "web_search_options": _NOTHING,
}
"""Parameters of OpenAI's API that are not supported here, each with the values that ask for nothing."""


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
    include_obfuscation: bool | None = None

    @model_validator(mode="after")
    def _refuse_obfuscation(self) -> "StreamOptions":
        if self.include_obfuscation:
            raise RequestError(
                "stream_options.include_obfuscation is not supported by this server",
                code="unsupported_parameter",
                param="stream_options",
            )
        return self


class _Generation(_Body):
    """What completions and chat completions have in common. `null` stands for the default."""

    model: str
    max_tokens: int | None = Field(None, ge=0, lt=_INT64)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
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
    response_format: ResponseFormat | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None

    @model_validator(mode="after")
    def _check_streaming(self) -> "_Generation":
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options goes with stream: true only", param="stream_options")
        if isinstance(self.stop, list) and len(self.stop) > _MAX_STOPS:
            raise RequestError(f"stop takes at most {_MAX_STOPS} strings, not {len(self.stop)}", param="stop")
        for stop in self.stops:
            require_unicode(stop, "stop", "stop")
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
    def schema_text(self) -> str | None:
        """The JSON schema that `response_format` asks for, as text; `None` for free text."""
        return None if self.response_format is None else self.response_format.schema_text

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
    best_of: int | None = Field(None, ge=1, le=128)

    @model_validator(mode="after")
    def _refuse_best_of(self) -> "CompletionBody":
        if self.best_of not in (None, self.n or 1):
            problem = "best_of is not supported by this server, unless it is n"
            raise RequestError(problem, code="unsupported_parameter", param="best_of")
        return self

    @model_validator(mode="before")
    @classmethod
    def _check_prompt(cls, given: Any) -> Any:
        if isinstance(given, dict):
            check_texts_or_ids(given, "prompt")
        return given


class ChatBody(_Generation):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[dict[str, Any]], WithJsonSchema(MESSAGES)]
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

    @property
    def length(self) -> str:
        """The name of that parameter."""
        return "max_completion_tokens" if self.max_tokens is None else "max_tokens"

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The tools that the answer may call."""
        return [] if self.tool_choice == "none" else self.tools or []


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
            require_unicode(item, field, field)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
