"""Outputs on their way from the engine's thread to a reply: when its reader is woken, and with what."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

from kajiya.serving.generation import Generation, Prompt
from kajiya.serving.metrics import Metrics
from kajiya.serving.replies import CompletionShape
from kajiya.serving.sequence import Output, Request, SamplingParams, TokenLogprob
from kajiya.serving.text import byte_reader
from kajiya.serving.worker import Ticket


class _Worker:
    """Notes what is taken back; its tickets are filled from outside."""

    def __init__(self) -> None:
        self.cancelled: list[str] = []
        self.tickets: list[Ticket] = []
        self.engine = SimpleNamespace(scheduler=SimpleNamespace(max_batch=8, max_waiting=8))

    def cancel(self, request_ids: list[str]) -> None:
        self.cancelled += request_ids

    async def submit(self, requests: list[Request], at_once: int = 1) -> Ticket:
        self.tickets.append(Ticket(self, requests, at_once))  # type: ignore[arg-type]
        return self.tickets[-1]


def _ticket(*names: str, at_once: int = 1) -> tuple[Ticket, _Worker]:
    worker = _Worker()
    requests = [Request(name, (1,), SamplingParams()) for name in names]
    return Ticket(worker, requests, at_once), worker  # type: ignore[arg-type]


def _output(name: str, token: int = 5, **end: Any) -> Output:
    return Output(name, TokenLogprob(token, -1.0), **end)


def test_a_reader_in_no_hurry_is_woken_for_many_outputs_or_an_end() -> None:
    async def read() -> list[int]:
        ticket, _ = _ticket("a", "b", at_once=4)
        reader = asyncio.create_task(ticket.next())
        sizes = []
        for number, name in enumerate("abababab", start=1):
            ticket.put(_output(name, finish_reason="length" if number == 7 else None))
            for _ in range(3):
                await asyncio.sleep(0)
            if reader.done():
                sizes.append(len(reader.result()))
                reader = asyncio.create_task(ticket.next())
        ticket.put(_output("b", finish_reason="length"))
        sizes.append(len(await reader))
        assert await ticket.next() == []
        return sizes

    # Four; three, since one of them is an end; what is left, at the other end.
    assert asyncio.run(read()) == [4, 3, 2]


def test_what_was_taken_back_does_not_come_any_more() -> None:
    async def read() -> None:
        ticket, worker = _ticket("a", "b")
        for name in "abab":
            ticket.put(_output(name))
        ticket.cancel("a")
        assert [output.id for output in await ticket.next()] == ["b", "b"]
        ticket.close()
        assert worker.cancelled == ["a", "b"]
        assert await ticket.next() == []

    asyncio.run(read())


def test_a_long_backlog_comes_in_portions_between_which_others_run() -> None:
    async def read() -> None:
        ticket, _ = _ticket("a")
        for _ in range(1000):
            ticket.put(_output("a"))
        ticket.put(_output("a", finish_reason="length"))
        turns = []

        async def other() -> None:
            while True:
                turns.append(len(sizes))
                await asyncio.sleep(0)

        sizes: list[int] = []
        running = asyncio.create_task(other())
        while outputs := await ticket.next():
            sizes.append(len(outputs))
        running.cancel()
        assert sum(sizes) == 1001
        assert max(sizes) == 256
        # It has had a turn before each portion.
        assert {*range(len(sizes))} <= {*turns}

    asyncio.run(read())


def _generation(worker: _Worker, tokenizer: Any, is_stream: bool) -> Generation:
    shape = CompletionShape("tiny", byte_reader(tokenizer), None)
    return Generation(worker, Metrics(), shape, is_stream, with_usage=False)  # type: ignore[arg-type]


def test_what_was_said_before_an_error_of_the_same_moment_is_streamed(tokenizer: Any) -> None:
    async def stream() -> list[str]:
        worker = _Worker()
        generation = _generation(worker, tokenizer, is_stream=True)
        await generation.begin([Prompt([1])], 1, SamplingParams(), [], tokenizer)
        (name,) = generation._choices
        for token in tokenizer.encode("def"):
            worker.tickets[0].put(_output(name, token))
        worker.tickets[0].put(Output(name, finish_reason="error", error="the engine failed: of old age"))
        sent = [part async for part in generation._events()]
        assert len(sent) == 1
        return sent[0].decode().removesuffix("\n\n").split("\n\n")

    *said, error = [json.loads(event.removeprefix("data: ")) for event in asyncio.run(stream())]
    assert "".join(chunk["choices"][0]["text"] for chunk in said) == "def"
    assert {(chunk["object"], chunk["model"], *chunk["choices"][0]) for chunk in said} == {
        ("text_completion", "tiny", "index", "text", "logprobs", "finish_reason")
    }
    assert error["error"]["message"] == "the engine failed: of old age"


def test_a_choice_that_a_stop_string_has_ended_says_no_more_of_the_same_moment(tokenizer: Any) -> None:
    async def reply() -> dict[str, Any]:
        worker = _Worker()
        generation = _generation(worker, tokenizer, is_stream=False)
        await generation.begin([Prompt([1])], 1, SamplingParams(), ["f x"], tokenizer)
        (name,) = generation._choices
        ids = tokenizer.encode("def x(y): pass")
        for token in ids:
            worker.tickets[0].put(_output(name, token))
        worker.tickets[0].put(Output(name, finish_reason="error", error="too late to matter"))
        found: dict[str, Any] = json.loads((await generation._collect()).body)
        assert worker.cancelled == []
        assert found["usage"]["completion_tokens"] < len(ids)
        return found

    (choice,) = asyncio.run(reply())["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("de", "stop")
