"""The way of outputs from the engine's thread to a reply: who is told, and when."""

import asyncio
from collections import deque
from collections.abc import Callable

from kajiya.serving.sequence import Output, Request

_MOST_AT_ONCE = 256
"""Outputs that a reader gets at a time, so that a long backlog does not hold up the event loop."""


class Ticket:
    """The outputs of requests that were submitted together, as they come. Used on the event loop only.

    The reader is woken once for all that a step brings, or, where it is in no hurry, for every `at_once` outputs. One that
    `is_paced` is woken for the first output of each request, and then once in as many steps as the worker says. The end of
    a request wakes any reader.
    """

    def __init__(
        self,
        taking_back: Callable[[list[str]], None],
        requests: list[Request],
        at_once: int = 1,
        is_paced: bool = False,
    ) -> None:
        self.is_paced = is_paced
        self._take_back = taking_back
        self._open = {request.id for request in requests}
        self._unheard = set(self._open)
        self._at_once = at_once
        self._woken_at = 0
        self._come: deque[Output] = deque()
        self._is_due = False
        """Whether the reader need not wait: there is enough, or the end of a request."""
        self._waiting: asyncio.Future[None] | None = None

    async def next(self) -> list[Output]:
        """What has come, at least one output; nothing when all of the requests have ended."""
        if self._come:
            # A reader with a backlog never waits: the loop could not tell it that its client has gone.
            await asyncio.sleep(0)
        while self._open:
            if not self._is_due:
                self._waiting = asyncio.get_running_loop().create_future()
                try:
                    await self._waiting
                finally:
                    self._waiting = None
            found = [self._come.popleft() for _ in range(min(len(self._come), _MOST_AT_ONCE))]
            self._is_due = bool(self._come)
            outputs = [output for output in found if output.id in self._open]
            self._open.difference_update(output.id for output in outputs if output.finish_reason)
            if outputs:
                return outputs
        return []

    @property
    def holds_back(self) -> bool:
        """Whether something has come that the reader is to hear of with what follows."""
        return self.is_paced and bool(self._come) and not self._is_due

    def put(self, output: Output, step: int = 0, interval: int = 1) -> None:
        """Hand over an output of one of the requests, which the `step`-th step has brought; `interval`: steps between wakings."""
        self._come.append(output)
        if self.is_paced:
            is_due = output.id in self._unheard or step - self._woken_at >= interval
            self._unheard.discard(output.id)
        else:
            is_due = len(self._come) >= self._at_once
        if is_due or output.finish_reason:
            self._woken_at = step
            self.wake()

    def wake(self) -> None:
        """Tell the reader that there is something to read."""
        self._is_due = True
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def cancel(self, request_id: str) -> None:
        """Take one request back; nothing more comes from it."""
        if request_id in self._open:
            self._open.discard(request_id)
            self._take_back([request_id])

    def close(self) -> None:
        """Take back every request that has not ended."""
        remaining, self._open = list(self._open), set()
        if remaining:
            self._take_back(remaining)
