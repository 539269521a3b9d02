"""A conversation in the terminal, on the engine that serves."""

import time
from collections.abc import Callable, Iterator
from typing import Any

from kajiya.data.chat import render_chat
from kajiya.errors import RequestError
from kajiya.serving.engine import Engine, EngineError
from kajiya.serving.sequence import Output, Request, SamplingParams
from kajiya.serving.text import TextStream


class Conversation:
    """The turns so far; each question is answered behind all of them, the shared beginning being in the cache."""

    def __init__(self, engine: Engine, tokenizer: Any, params: SamplingParams, system: str | None = None) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._params = params
        self._system = system
        self._n_asked = 0
        self.turns: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.turns = [{"role": "system", "content": self._system}] if self._system else []

    def ask(self, question: str) -> Iterator[str]:
        """Pieces of the answer as they come; when it is over, or closed early, what was said is part of the conversation."""
        self.turns.append({"role": "user", "content": question})
        ids = render_chat(self._tokenizer, self.turns, add_generation_prompt=True)
        room = self._engine.context_tokens - len(ids)
        limit = min(self._params.max_tokens, max(room, 1))
        self._n_asked += 1
        request = Request(f"turn-{self._n_asked}", tuple(ids), _limited(self._params, limit))
        said: list[str] = []
        try:
            self._engine.add(request)
        except Exception:
            self.turns.pop()
            raise
        stream = TextStream(self._tokenizer, ids)
        try:
            while not self._engine.is_idle:
                for output in self._step():
                    if output.error is not None:
                        raise EngineError(output.error)
                    if output.token is not None and output.finish_reason != "stop":
                        piece = stream.push(output.token.token)
                        said.append(piece)
                        yield piece
        finally:
            self.turns.append({"role": "assistant", "content": "".join(said)})
            self._engine.cancel(request.id)
            while not self._engine.is_idle:
                self._step()

    def _step(self) -> list[Output]:
        try:
            return self._engine.step()
        except BaseException:
            # An interrupt comes anywhere, also in the middle of a step: what is half done is of no use to the next question.
            self._engine.fail_all("the step was broken off")
            raise


def _limited(params: SamplingParams, max_tokens: int) -> SamplingParams:
    from dataclasses import replace

    return replace(params, max_tokens=max_tokens)


def converse(conversation: Conversation, read: Callable[[], str], write: Callable[[str], None]) -> None:
    """Questions and answers until the input ends or says /exit; /reset begins anew; an interrupt ends an answer."""
    while True:
        try:
            question = read().strip()
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return
        if question in ("/exit", "/quit"):
            return
        if question == "/reset":
            conversation.reset()
            write("(begun anew)\n")
            continue
        if not question:
            continue
        begun, n_pieces, first = time.perf_counter(), 0, 0.0
        pieces = conversation.ask(question)
        try:
            for piece in pieces:
                first = first or time.perf_counter() - begun
                n_pieces += 1
                write(piece)
        except KeyboardInterrupt:
            pass
        except RequestError as error:
            write(f"{error}\n/reset begins anew.\n")
            continue
        finally:
            pieces.close()  # type: ignore[attr-defined]
        seconds = time.perf_counter() - begun
        write(f"\n({n_pieces} tokens, {n_pieces / max(seconds, 1e-9):.0f} a second, first after {first:.2f} s)\n")
