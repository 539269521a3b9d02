"""Outputs on their way from the engine's thread to a reply: when its reader is woken, and with what."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

from kajiya.serving.generation import Generation, Prompt
from kajiya.serving.metrics import Metrics
from kajiya.serving.pacing import Pace
from kajiya.serving.replies import CompletionShape
from kajiya.serving.sequence import Output, Request, SamplingParams, TokenLogprob
from kajiya.serving.text import byte_reader
from kajiya.serving.ticket import Ticket
from kajiya.serving.worker import Worker


class _Worker:
    """Notes what is taken back; its tickets are filled from outside."""

    def __init__(self) -> None:
        self.cancelled: list[str] = []
        self.tickets: list[Ticket] = []
        self.engine = SimpleNamespace(scheduler=SimpleNamespace(max_batch=8, max_waiting=8))

    def cancel(self, request_ids: list[str]) -> None:
        self.cancelled += request_ids

    async def submit(self, requests: list[Request], at_once: int = 1, is_paced: bool = False) -> Ticket:
        self.tickets.append(Ticket(self.cancel, requests, at_once, is_paced))
        return self.tickets[-1]


def _ticket(*names: str, at_once: int = 1, is_paced: bool = False) -> tuple[Ticket, _Worker]:
    worker = _Worker()
    requests = [Request(name, (1,), SamplingParams()) for name in names]
    return Ticket(worker.cancel, requests, at_once, is_paced), worker


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


def test_a_paced_reader_hears_of_first_tokens_and_ends_at_once_and_of_all_else_in_turn() -> None:
    steps = ["a", "ab", "ab", "ab", "ab", "ab", "ab", "aB"]  # b comes a step later; a capital ends

    async def read() -> list[str]:
        ticket, _ = _ticket("a", "b", is_paced=True)
        heard = []
        reader = asyncio.create_task(ticket.next())
        for number, names in enumerate(steps, start=1):
            for name in names:
                ticket.put(_output(name.lower(), finish_reason="length" if name.isupper() else None), number, 3)
            assert ticket.holds_back == (number in (3, 4, 6, 7))
            for _ in range(3):
                await asyncio.sleep(0)
            heard.append("")
            if reader.done():
                heard[-1] = "".join(output.id for output in reader.result())
                reader = asyncio.create_task(ticket.next())
        reader.cancel()
        return heard

    assert asyncio.run(read()) == ["a", "ab", "", "", "ababab", "", "", "ababab"]


def test_the_pace_is_every_step_for_few_streams_or_slow_steps_and_what_a_short_time_holds_for_many() -> None:
    pace = Pace(None)
    assert pace.steps(1000) == 1  # nothing is known yet
    for _ in range(100):
        pace.took(0.02)
    assert [pace.steps(n) for n in (1, 15, 16, 32, 1000)] == [1, 1, 2, 2, 2]
    for step_s, expected in ((0.06, 1), (0.012, 4), (0.001, 8), (0.0, 8)):
        for _ in range(100):
            pace.took(step_s)
        assert pace.steps(32) == expected
    assert Pace(5).steps(1) == 5


class _Counting:
    """An engine whose every step brings the next token to each sequence that has its place; `gone` has lost it for the step."""

    def __init__(self, gone: dict[int, str]) -> None:
        self.scheduler = SimpleNamespace(max_batch=8, max_waiting=8)
        self._gone = gone
        self._left: dict[str, list[int]] = {}
        self._n_steps = 0

    def add(self, request: Request) -> None:
        self._left[request.id] = list(range(request.params.max_tokens))

    def cancel(self, request_id: str) -> bool:
        return self._left.pop(request_id, None) is not None

    @property
    def is_idle(self) -> bool:
        return not self._left

    def step(self) -> list[Output]:
        self._n_steps += 1
        outputs = []
        for name in [each for each in self._left if each != self._gone.get(self._n_steps)]:
            token = self._left[name].pop(0)
            outputs.append(_output(name, token, finish_reason=None if self._left[name] else "length"))
            if not self._left[name]:
                del self._left[name]
        return outputs


class _Unwatched:
    def step(self, engine: Any, outputs: list[Output]) -> None:
        pass


def test_what_a_sequence_without_its_place_has_said_is_not_held_back_till_it_returns() -> None:
    """Told step by step: the loop has read all of one before the next is begun."""
    heard: dict[str, list[list[int]]] = {"a": [], "b": []}

    async def serve() -> None:
        engine = _Counting(gone={4: "a", 5: "a"})
        worker = Worker(engine, _Unwatched(), stream_interval=4)  # type: ignore[arg-type]
        worker._events = asyncio.get_running_loop()

        async def read(ticket: Ticket, name: str) -> None:
            while outputs := await ticket.next():
                heard[name].append([output.token.token for output in outputs if output.token])

        tickets = {}
        for name in heard:
            request = Request(name, (1,), SamplingParams(max_tokens=9))
            tickets[name] = worker._tickets[name] = Ticket(worker.cancel, [request], is_paced=True)
            engine.add(request)
        readers = [asyncio.create_task(read(ticket, name)) for name, ticket in tickets.items()]
        while not engine.is_idle:
            worker._deliver(engine.step())
            for _ in range(3):
                await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.gather(*readers), 60)

    asyncio.run(serve())
    # Its second and third token come when it has lost its place, in the fourth step.
    assert heard == {"a": [[0], [1, 2], [3], [4, 5, 6, 7], [8]], "b": [[0], [1, 2, 3, 4], [5, 6, 7, 8]]}


def test_a_chunk_has_the_tokens_of_several_steps_and_a_stream_is_the_whole_reply(tokenizer: Any) -> None:
    ids = tokenizer.encode("def wrap(text, width): return 日本")

    async def stream(interval: int) -> list[dict[str, Any]]:
        worker = _Worker()
        shape = CompletionShape("tiny", byte_reader(tokenizer), 0)
        generation = Generation(worker, Metrics(), shape, True, with_usage=True)  # type: ignore[arg-type]
        await generation.begin([Prompt([1])], 1, SamplingParams(), [], tokenizer)
        (name,), chunks = generation._choices, []

        async def read() -> None:
            chunks.extend([part.decode() async for part in generation._events()])

        reading = asyncio.create_task(read())
        for step, token in enumerate(ids, start=1):
            worker.tickets[0].put(
                _output(name, token, finish_reason="length" if step == len(ids) else None), step, interval
            )
            for _ in range(5):
                await asyncio.sleep(0)
        await asyncio.wait_for(reading, 60)
        *said, end = "".join(chunks).strip().split("\n\n")
        assert end == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in said]

    *single, used = asyncio.run(stream(1))
    assert len(single) > 8
    for interval in (2, 3, 100):
        *parts, last = asyncio.run(stream(interval))
        choices = [part["choices"][0] for part in parts]
        assert len(choices[0]["logprobs"]["tokens"]) == 1
        assert max(len(choice["logprobs"]["tokens"]) for choice in choices) >= min(interval, 8)
        for field in ("tokens", "token_logprobs", "text_offset"):
            assert _joined(choices, field) == _joined([part["choices"][0] for part in single], field)
        assert "".join(choice["text"] for choice in choices) == tokenizer.decode(ids)
        assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
        assert last["usage"] == used["usage"]
        assert last["usage"]["completion_tokens"] == len(ids)


def _joined(choices: list[dict[str, Any]], field: str) -> list[Any]:
    return [value for choice in choices for value in choice["logprobs"][field]]


def test_a_stream_that_a_stop_string_may_end_is_told_of_every_step(tokenizer: Any) -> None:
    async def begin(stops: list[str]) -> bool:
        worker = _Worker()
        await _generation(worker, tokenizer, is_stream=True).begin([Prompt([1])], 1, SamplingParams(), stops, tokenizer)
        return worker.tickets[0].is_paced

    assert asyncio.run(begin([]))
    assert not asyncio.run(begin(["x"]))


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
