"""The engine's own thread, and the asynchronous side that HTTP handlers talk to."""

import asyncio
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from kajiya.errors import RequestError
from kajiya.serving.engine import Engine
from kajiya.serving.pacing import Pace
from kajiya.serving.sequence import FINISHED_ERROR, Output, Request
from kajiya.serving.ticket import Ticket

Result = TypeVar("Result")
_log = logging.getLogger(__name__)


class StepWatcher(Protocol):
    """Told, on the engine's thread, about every step."""

    def step(self, engine: Engine, outputs: list[Output]) -> None:
        """Called when a step has brought its outputs."""


@dataclass(frozen=True)
class _Command:
    """Something to do between two steps, and what to do when the engine's thread has ended before it came to it."""

    run: Callable[[], Any]
    refuse: Callable[[], None]


class Worker:
    """Owns the engine: one thread steps it while there is work; coroutines submit requests and await their outputs.

    Requests of concurrent HTTP calls meet in the engine's batch. When a step raises, every request in the engine ends
    with an error, the engine starts afresh, and the server goes on.
    """

    def __init__(self, engine: Engine, watcher: StepWatcher, stream_interval: int | None = None) -> None:
        self.engine = engine
        self._watcher = watcher
        self._pace = Pace(stream_interval)
        self._was_silent = True
        self._commands: deque[_Command] = deque()
        self._wake = threading.Condition()
        self._is_stopping = False
        self._has_ended = False
        self._thread = threading.Thread(target=self._work, name="kajiya-engine", daemon=True)
        self._tickets: dict[str, Ticket] = {}
        self._holding: set[Ticket] = set()
        """Those that held something back when a step was last told of."""
        self._n_told = 0
        self._embedding_for: Counter[str | None] = Counter()
        """Texts that are read or wait to be, by adapter."""
        self._embedding = asyncio.Lock()
        self._events: asyncio.AbstractEventLoop | None = None

    # ---------------------------------------------------------------- on the event loop

    def start(self) -> None:
        """Start the thread; call on the event loop that will submit."""
        self._events = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after its present step; requests that still run end with an error."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive() and not self._has_ended

    @property
    def n_open(self) -> int:
        """Requests whose end has not been handed over."""
        return len(self._tickets) + self._embedding_for.total()

    def n_embedding(self, adapter: str | None) -> int:
        """Texts that are read or wait to be, with that adapter."""
        return self._embedding_for[adapter]

    async def submit(self, requests: list[Request], at_once: int = 1, is_paced: bool = False) -> Ticket:
        """Add all of the requests, or none; the ticket's reader is told of every `at_once` outputs, or at the server's pace.

        Raises the `RequestError` of the first that the engine refuses.
        """
        ticket = Ticket(self.cancel, requests, at_once, is_paced)
        self._tickets.update({request.id: ticket for request in requests})

        def add_all() -> None:
            added: list[str] = []
            try:
                for request in requests:
                    self.engine.add(request)
                    added.append(request.id)
            except BaseException:
                for request_id in added:
                    self.engine.cancel(request_id)
                raise

        try:
            # A large grammar takes a second, for which running answers must not wait.
            for schema, params in {each.params.grammar: each.params for each in requests}.items():
                if schema is not None:
                    await asyncio.to_thread(self.engine.prepare, params)
            await self.call(add_all)
        except BaseException:
            for request in requests:
                self._tickets.pop(request.id, None)
            # A handler that was cancelled while it waited here may have got its requests in after all.
            ticket.close()
            raise
        return ticket

    async def embed(self, ids: list[int], adapter: str | None) -> list[float]:
        """The vector of a text: one text at a time, and one piece of it between two steps, so that running answers go on.

        Raises what `embedding` does, and a 429 where as many wait as may.
        """
        n_embedding = self._embedding_for.total()
        if n_embedding >= self.engine.scheduler.max_waiting:
            raise RequestError(
                f"The server is busy: {n_embedding} texts wait to be read. Try again shortly.",
                code="queue_full",
                status=429,
            )
        self._embedding_for[adapter] += 1
        try:
            async with self._embedding:
                # On the engine's thread, behind an unloading of the adapter that came before.
                pieces = await self.call(lambda: self.engine.embedding(ids, adapter))
                try:
                    while (vector := await self.call(lambda: next(pieces))) is None:
                        pass
                finally:
                    # On the engine's thread, since blocks are given back.
                    self._enqueue(_Command(pieces.close, refuse=lambda: None))
                return vector
        finally:
            self._embedding_for[adapter] -= 1

    async def call(self, function: Callable[[], Result]) -> Result:
        """Run a function between two steps, on the engine's thread; its result or its exception."""
        if not self.is_alive:
            raise _stopped()
        events = asyncio.get_running_loop()
        future: asyncio.Future[Result] = events.create_future()

        def run() -> None:
            try:
                result = function()
            except Exception as error:
                events.call_soon_threadsafe(_settle, future, None, error)
            else:
                events.call_soon_threadsafe(_settle, future, result, None)

        def refuse() -> None:
            events.call_soon_threadsafe(_settle, future, None, _stopped())

        self._enqueue(_Command(run, refuse))
        return await future

    def cancel(self, request_ids: list[str]) -> None:
        """Take requests back, without waiting; unknown ones are already over."""
        for request_id in request_ids:
            self._tickets.pop(request_id, None)

        def run() -> None:
            for request_id in request_ids:
                self.engine.cancel(request_id)

        self._enqueue(_Command(run, refuse=lambda: None))

    def _enqueue(self, command: _Command) -> None:
        with self._wake:
            if not self._has_ended:
                self._commands.append(command)
                self._wake.notify()
                return
        command.refuse()

    def _deliver(self, outputs: list[Output]) -> None:
        self._n_told += 1
        interval = self._pace.steps(sum(ticket.is_paced for ticket in {*self._tickets.values()}))
        held, self._holding = self._holding, set()
        for output in outputs:
            ticket = self._tickets.get(output.id)
            if ticket is None:
                continue
            if output.finish_reason:
                del self._tickets[output.id]
            ticket.put(output, self._n_told, interval)
            if ticket.holds_back:
                self._holding.add(ticket)
        for ticket in held - self._holding:
            # What follows has not come: its sequence gave up its place, and may wait long for another.
            if ticket.holds_back:
                ticket.wake()

    def _abandon(self, reason: str) -> None:
        for request_id in list(self._tickets):
            self._deliver([Output(request_id, finish_reason=FINISHED_ERROR, error=reason)])

    # ---------------------------------------------------------------- on the engine's thread

    def _work(self) -> None:
        reason = "its model is being unloaded, or the server is stopping"
        try:
            self._loop()
        except BaseException as error:
            # Even the recovery failed (a lost device, say): nobody is left waiting, and /health says so.
            _log.exception("the engine has stopped for good")
            reason = f"the engine has stopped: {type(error).__name__}: {error}"
        with self._wake:
            self._has_ended = True
            refused = list(self._commands)
            self._commands.clear()
        for command in refused:
            command.refuse()
        assert self._events is not None
        if not self._events.is_closed():
            self._events.call_soon_threadsafe(self._abandon, reason)

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not self._commands and self.engine.is_idle and not self._is_stopping:
                    self._wake.wait()
                if self._is_stopping:
                    return
                commands = list(self._commands)
                self._commands.clear()
            for command in commands:
                command.run()
            if not self.engine.is_idle:
                self._step()

    def _step(self) -> None:
        begun = time.perf_counter()
        try:
            outputs = self.engine.step()
        except Exception as error:
            _log.exception("the engine failed; its requests end with an error")
            outputs = self.engine.fail_all(f"the engine failed: {type(error).__name__}: {error}")
        self._pace.took(time.perf_counter() - begun)
        self._watcher.step(self.engine, outputs)
        self._hand_over(outputs)

    def _hand_over(self, outputs: list[Output]) -> None:
        assert self._events is not None
        # A first step that brings nothing is told, too: what is held back waits for no other.
        if (outputs or not self._was_silent) and not self._events.is_closed():
            self._events.call_soon_threadsafe(self._deliver, outputs)
        self._was_silent = not outputs


def _stopped() -> RequestError:
    return RequestError("The engine has stopped.", code="engine_stopped", status=503)


def _settle(future: "asyncio.Future[Any]", result: Any, error: Exception | None) -> None:
    if future.cancelled():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
