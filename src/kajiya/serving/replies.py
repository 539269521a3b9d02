"""The objects of OpenAI's two generation APIs, whole and streamed."""

import math
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from kajiya.serving.answer import Entry, Piece
from kajiya.serving.sequence import FINISHED_STOP
from kajiya.serving.text import token_text
from kajiya.serving.tools import certain, read_calls

_LOWEST_LOGPROB = -9999.0
"""Stands for −∞, which JSON has no number for; OpenAI's own sign for it."""


class Shape(Protocol):
    """How one of the APIs words its replies."""

    @property
    def with_logprobs(self) -> bool:
        """Whether tokens are told, with their log-probabilities, beside the text."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """The choice of a stream's first chunk, if it has one before any text."""

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        """A choice of a stream's chunk."""

    def whole(self, index: int, piece: Piece) -> dict[str, Any]:
        """A choice of a reply that is not streamed."""

    def envelope(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None, is_stream: bool) -> dict[str, Any]:
        """The object around the choices."""


class CompletionShape:
    """`text_completion` objects."""

    def __init__(self, model: str, read_bytes: Callable[[int], bytes], n_top: int | None) -> None:
        self._head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        self._model = model
        self._read_bytes = read_bytes
        self._n_top = n_top
        self.with_logprobs = n_top is not None

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        return {
            "index": index,
            "text": piece.text,
            "logprobs": None if self._n_top is None else self._logprobs(piece.entries, self._n_top),
            "finish_reason": piece.finish_reason,
        }

    def whole(self, index: int, piece: Piece) -> dict[str, Any]:
        return self.part(index, piece)

    def envelope(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None, is_stream: bool) -> dict[str, Any]:
        return {**self._head, "model": self._model, "choices": choices, "usage": usage}

    def _logprobs(self, entries: Sequence[Entry], n_top: int) -> dict[str, Any]:
        return {
            "tokens": [self._text(entry.token) for entry in entries],
            "token_logprobs": [entry.scored and _finite(entry.scored.logprob) for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries] if n_top else None,
            "text_offset": [entry.offset for entry in entries],
        }

    def _top(self, entry: Entry) -> dict[str, float] | None:
        if entry.scored is None:
            return None
        found: dict[str, float] = {}
        # The token itself is always among them, as in OpenAI's replies: there may be one more than was asked for.
        for token, logprob in (*entry.scored.top, (entry.token, entry.scored.logprob)):
            found.setdefault(self._text(token), _finite(logprob))
        return found

    def _text(self, token: int) -> str:
        return token_text(self._read_bytes(token))


class ChatShape:
    """`chat.completion` and `chat.completion.chunk` objects."""

    def __init__(
        self,
        model: str,
        read_bytes: Callable[[int], bytes],
        with_logprobs: bool,
        tools: Sequence[str] = (),
        max_calls: int | None = None,
    ) -> None:
        self._tools = tools
        self._max_calls = max_calls
        # What may be the beginning of a tool call in a streamed answer is held back until it is known whether it is one:
        # the text of each choice, and how much of it was given.
        self._texts: dict[int, tuple[str, int]] = {}
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._read_bytes = read_bytes
        self.with_logprobs = with_logprobs

    def opening(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        calls: list[dict[str, Any]] = []
        text, reason = piece.text, piece.finish_reason
        if self._tools:
            said, n_given = self._texts.get(index, ("", 0))
            said += text
            answer, calls, reason = self._read(said, reason)
            n_certain = len(answer) if reason else certain(said, n_given)
            text = answer[n_given:n_certain]
            self._texts[index] = said, n_certain
        delta: dict[str, Any] = {"content": text} if text else {}
        if calls:
            delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(calls)]
        return {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(piece.entries) if piece.entries else None,
            "finish_reason": reason,
        }

    def whole(self, index: int, piece: Piece) -> dict[str, Any]:
        text, calls, reason = self._read(piece.text, piece.finish_reason)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(piece.entries),
            "finish_reason": reason,
        }

    def _read(self, text: str, reason: str | None) -> tuple[str, list[dict[str, Any]], str | None]:
        """An answer's text, its tool calls, and why it ended."""
        if not self._tools or reason != FINISHED_STOP:
            return text, [], reason
        text, calls = read_calls(text, self._tools)
        return text, calls[: self._max_calls], "tool_calls" if calls else reason

    def envelope(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None, is_stream: bool) -> dict[str, Any]:
        kind = "chat.completion.chunk" if is_stream else "chat.completion"
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
            "usage": usage,
        }

    def _logprobs(self, entries: Sequence[Entry]) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        content = []
        for entry in entries:
            assert entry.scored is not None
            top = [self._token(token, logprob) for token, logprob in entry.scored.top]
            content.append(self._token(entry.token, entry.scored.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._read_bytes(token)
        return {"token": token_text(raw), "logprob": _finite(logprob), "bytes": list(raw)}


def usage(n_prompt: int, n_generated: int) -> dict[str, int]:
    """The usage object, tokens."""
    return {"prompt_tokens": n_prompt, "completion_tokens": n_generated, "total_tokens": n_prompt + n_generated}


def joined(pieces: Sequence[Piece]) -> Piece:
    """All pieces of a choice as one."""
    entries = tuple(entry for piece in pieces for entry in piece.entries)
    return Piece("".join(piece.text for piece in pieces), entries, pieces[-1].finish_reason)


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LOWEST_LOGPROB
