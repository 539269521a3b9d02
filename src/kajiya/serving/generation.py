"""From a checked body to a reply: prompts to requests, outputs to JSON or server-sent events."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from kajiya.errors import RequestError
from kajiya.serving.answer import Answer, Piece
from kajiya.serving.faults import CLIENT_GONE, error_body
from kajiya.serving.metrics import Metrics
from kajiya.serving.replies import Shape, joined, usage
from kajiya.serving.sequence import FINISHED_ERROR, Output, Request, SamplingParams, derive_seed
from kajiya.serving.ticket import Ticket
from kajiya.serving.worker import Worker

_AT_ONCE = 32
"""Tokens that are put together at a time for a reply that nobody reads before it is whole."""
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_NO_CHOICES = b'"choices":[]'


@dataclass(frozen=True)
class Prompt:
    """A prompt in token ids, with the text that is echoed, if it is."""

    ids: list[int]
    echo: str | None = None
    adapter: str | None = None


@dataclass
class _Choice:
    index: int
    answer: Answer
    is_open: bool = True


class Generation:
    """One HTTP call: its choices, the ticket of their requests, and the shape of the reply."""

    def __init__(self, worker: Worker, metrics: Metrics, shape: Shape, is_stream: bool, with_usage: bool) -> None:
        self._is_stream = is_stream
        self._worker = worker
        self._metrics = metrics
        self._shape = shape
        self._with_usage = with_usage
        self._choices: dict[str, _Choice] = {}
        self._n_prompt = 0
        self._ticket: Ticket | None = None

    async def begin(
        self, prompts: list[Prompt], n: int, params: SamplingParams, stops: list[str], tokenizer: Any
    ) -> None:
        """Submit `n` requests for each prompt. Raises the engine's `RequestError`; nothing is left running then."""
        most = self._worker.engine.scheduler.max_batch + self._worker.engine.scheduler.max_waiting
        if len(prompts) * n > most:
            raise RequestError(
                f"{len(prompts)} prompts × n = {n} are {len(prompts) * n} sequences; this server holds {most} at most",
                param="n" if len(prompts) <= most else "prompt",
            )
        requests: list[Request] = []
        for prompt in prompts:
            self._n_prompt += len(prompt.ids)
            for _ in range(n):
                index = len(requests)
                seeded = replace(params, seed=derive_seed(params.seed, index % n))
                request = Request(f"{uuid.uuid4().hex}-{index}", tuple(prompt.ids), seeded, prompt.adapter)
                answer = Answer(tokenizer, prompt.ids, stops, prompt.echo, self._shape.with_logprobs)
                self._choices[request.id] = _Choice(index, answer)
                requests.append(request)
        # Before the engine sees them: its first token may come before this coroutine goes on.
        for request in requests:
            self._metrics.begin(request.id)
        # A whole reply is put together by the way and a stream's chunks at the server's pace, unless a stop string may end
        # them at any token: the engine would go on past it meanwhile.
        at_once = 1 if stops or self._is_stream else _AT_ONCE
        try:
            self._ticket = await self._worker.submit(requests, at_once, is_paced=self._is_stream and not stops)
        except BaseException:
            for request in requests:
                self._metrics.forget(request.id)
            raise
        self._metrics.prompt_tokens.inc(sum(len(request.prompt) for request in requests))

    async def reply(self, http: HttpRequest) -> Response:
        """The whole reply; the requests are taken back when the client goes away first."""
        try:
            return await unless_gone(http, self._collect())
        finally:
            self.close()

    def stream(self) -> Response:
        """Server-sent events; the requests are taken back when the client goes away."""
        return _EventStream(self._events(), on_close=self.close)

    def close(self) -> None:
        """Take back what still runs."""
        if self._ticket is not None:
            self._ticket.close()
        for choice in self._choices.values():
            if choice.is_open:
                self._end(choice, "cancelled")

    async def _next(self) -> list[Output]:
        assert self._ticket is not None
        return await self._ticket.next()

    def _pieces(self, outputs: list[Output]) -> Iterator[tuple[int, Piece]]:
        """The piece that outputs bring to each choice; behind them, raises the `RequestError` of what went wrong."""
        assert self._ticket is not None
        failures: list[Output] = []
        came: dict[str, list[Output]] = {}
        for output in outputs:
            if output.finish_reason == FINISHED_ERROR:
                failures.append(output)
            else:
                came.setdefault(output.id, []).append(output)
        for name, mine in came.items():
            choice = self._choices[name]
            if not choice.is_open:
                continue  # a stop string has ended it
            piece = choice.answer.take(mine)
            if choice.answer.is_stopped:
                self._ticket.cancel(name)
            if piece.finish_reason:
                self._end(choice, piece.finish_reason)
            if piece.text or piece.entries or piece.finish_reason:
                yield choice.index, piece
        for output in failures:
            choice = self._choices[output.id]
            if choice.is_open:
                self._end(choice, "error")
                if output.is_refused:
                    raise RequestError(output.error or "", code="grammar_failed", param="response_format")
                raise RequestError(output.error or "the engine failed", code="engine_error", status=500)

    async def _collect(self) -> Response:
        pieces: dict[int, list[Piece]] = {choice.index: [] for choice in self._choices.values()}
        while outputs := await self._next():
            for index, piece in self._pieces(outputs):
                pieces[index].append(piece)
        choices = [self._shape.whole(index, joined(found)) for index, found in pieces.items()]
        return JSONResponse(self._shape.envelope(choices, self._usage(), is_stream=False))

    async def _events(self) -> AsyncIterator[bytes]:
        """Events: one for all that has come of a choice, and those of several choices together."""
        for choice in self._choices.values():
            opening = self._shape.opening(choice.index)
            if opening is not None:
                yield self._event(opening)
        while outputs := await self._next():
            events = []
            try:
                for index, piece in self._pieces(outputs):
                    events.append(self._event(self._shape.part(index, piece)))
            except RequestError as error:
                yield b"".join(events) + _data(error_body(str(error), error.status, error.code, error.param))
                return
            if events:
                yield b"".join(events)
        if self._with_usage:
            yield _data(self._shape.envelope([], self._usage(), is_stream=True))
        yield b"data: [DONE]\n\n"

    def _event(self, choice: dict[str, Any]) -> bytes:
        before, behind = self._around
        return before + _json(choice) + behind

    @cached_property
    def _around(self) -> tuple[bytes, bytes]:
        """What every chunk of a stream begins and ends with."""
        chunk = self._shape.envelope([], None, is_stream=True)
        if not self._with_usage:
            del chunk["usage"]
        before, found, behind = _data(chunk).partition(_NO_CHOICES)
        assert found
        return before + _NO_CHOICES[:-1], b"]" + behind

    def _usage(self) -> dict[str, int]:
        return usage(self._n_prompt, sum(choice.answer.n_tokens for choice in self._choices.values()))

    def _end(self, choice: _Choice, reason: str) -> None:
        choice.is_open = False
        self._metrics.choices.labels(reason).inc()


class _EventStream(StreamingResponse):
    """A stream of events that says when it is over, however it ended."""

    def __init__(self, events: AsyncIterator[bytes], on_close: Callable[[], None]) -> None:
        super().__init__(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()


async def unless_gone(http: HttpRequest, work: Coroutine[Any, Any, Response]) -> Response:
    """The reply that `work` makes; when the client disconnects first, `work` is cancelled and nobody hears this reply."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else Response(status_code=CLIENT_GONE)
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _data(content: dict[str, Any]) -> bytes:
    return b"data: " + _json(content) + b"\n\n"


def _json(content: dict[str, Any]) -> bytes:
    return _ENCODER.encode(content).encode()
