"""One choice of a reply while it grows: text and log-probabilities, released together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kajiya.serving.sequence import FINISHED_STOP, Output, TokenLogprob
from kajiya.serving.text import StopMatcher, TextStream


@dataclass(frozen=True)
class Entry:
    """A token of the reply with its place in the text."""

    token: int
    scored: TokenLogprob | None
    """`None` for the first token of an echoed prompt."""
    offset: int
    """Characters of the reply before this token's."""


@dataclass(frozen=True)
class Piece:
    """What outputs add to a choice."""

    text: str
    entries: tuple[Entry, ...]
    finish_reason: str | None


class Answer:
    """Turns the outputs of one request into pieces of text.

    A token is released when the first of its characters is: tokens behind a stop string, or whose text is still held
    back, are not. Without `with_entries` only text comes.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: Sequence[int],
        stops: Sequence[str] = (),
        echo: str | None = None,
        with_entries: bool = True,
    ) -> None:
        self._prompt = prompt
        self._tokenizer = tokenizer
        self._echo = echo
        self._with_entries = with_entries
        self._is_bare = not (with_entries or stops)
        """Whether nothing is wanted but the text."""
        self._stream = TextStream(tokenizer, prompt)
        self._matcher = StopMatcher(stops)
        self._n_decoded = 0
        self._n_released = 0
        self._entries: list[Entry] = []
        self._is_begun = False
        self.n_tokens = 0

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has been met; the request is to be cancelled."""
        return self._matcher.is_stopped

    def take(self, outputs: Sequence[Output]) -> Piece:
        """The piece that one or more outputs bring; it may be empty. Those behind a stop string are not looked at."""
        text = self._begin(outputs[0]) if not self._is_begun else ""
        text += self._together(outputs) if self._is_bare else self._one_by_one(outputs)
        finish_reason = outputs[-1].finish_reason
        if self.is_stopped:
            finish_reason = FINISHED_STOP
        elif finish_reason:
            text += self._matcher.flush()
        self._n_released += len(text)
        return Piece(text, self._release(is_end=finish_reason is not None), finish_reason)

    def _together(self, outputs: Sequence[Output]) -> str:
        tokens = [output.token.token for output in outputs if output.token is not None]
        self.n_tokens += len(tokens)
        # The token that ends the answer is no part of its text.
        if outputs[-1].finish_reason == FINISHED_STOP and outputs[-1].token is not None:
            tokens.pop()
        return self._stream.push_all(tokens)

    def _one_by_one(self, outputs: Sequence[Output]) -> str:
        text = ""
        for output in outputs:
            if output.token is not None and not self.is_stopped:
                self.n_tokens += 1
                if output.finish_reason != FINISHED_STOP:
                    if self._with_entries:
                        self._entries.append(Entry(output.token.token, output.token, self._n_decoded))
                    new = self._stream.push(output.token.token)
                    self._n_decoded += len(new)
                    text += self._matcher.push(new)
        return text

    def _begin(self, output: Output) -> str:
        """The echoed prompt, once."""
        self._is_begun = True
        if self._echo is None:
            return ""
        if not self._with_entries:
            return self._echo
        scored = output.prompt_logprobs or (None,) * len(self._prompt)
        stream = TextStream(self._tokenizer)
        for token, one in zip(self._prompt, scored, strict=True):
            self._entries.append(Entry(token, one, self._n_decoded))
            self._n_decoded += len(stream.push(token))
        self._n_decoded = len(self._echo)
        return self._echo

    def _release(self, is_end: bool) -> tuple[Entry, ...]:
        if not self._entries:
            return ()
        if is_end and not self.is_stopped:
            released, self._entries = self._entries, []
        else:
            n_ready = sum(entry.offset < self._n_released for entry in self._entries)
            released, self._entries = self._entries[:n_ready], self._entries[n_ready:]
        return tuple(released)
