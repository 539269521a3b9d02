"""Batches made ready ahead of the step that takes them, in a thread of their own; the time that a step waits is measured."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

AHEAD = 2
"""Batches that are made ahead; each is held in memory."""


class ReadAhead:
    """Makes things by their keys before they are asked for; a thing is a function of its key, so that nothing else changes."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: dict[tuple[int, ...], Future[Any]] = {}
        self.waited_s = 0.0
        """Time that `take` has waited for a thing that was not ready, seconds."""

    def take(self, keys: Sequence[tuple[int, ...]]) -> Any:
        """The thing of the first key; those of the others are begun, and all else that was begun is forgotten."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="kajiya-rows")
        pool, known = self._pool, self._waiting
        for key in known.keys() - set(keys):
            known.pop(key).cancel()
        self._waiting = {key: known[key] if key in known else pool.submit(self._make, *key) for key in keys}
        began = time.perf_counter()
        thing = self._waiting.pop(keys[0]).result()
        self.waited_s += time.perf_counter() - began
        return thing
