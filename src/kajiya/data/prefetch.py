"""Rows made ready ahead of the step that takes them, in a thread of their own; the time that a step waits is measured."""

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from kajiya.data.loader import Loader


class PrefetchingLoader:
    """A `Loader` whose next batches are made while the model computes.

    A batch is a function of its position, so that reading ahead changes nothing: the state is that of the batches taken.
    """

    def __init__(self, loader: Loader, ahead: int = 2) -> None:
        self.loader = loader
        self.ahead = ahead
        """Batches made ahead; each is held in memory."""
        self.waited_s = 0.0
        """Time that `next` has waited for a batch that was not ready, seconds."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kajiya-rows")
        self._waiting: deque[tuple[int, Future[Any]]] = deque()

    @property
    def rows(self) -> Any:
        """The rows that are loaded."""
        return self.loader.rows

    @property
    def row(self) -> int:
        """Rows given out since the beginning, by all ranks."""
        return self.loader.row

    @property
    def epoch(self) -> int:
        """Passes over the data that are behind the next row."""
        return self.loader.epoch

    @property
    def rows_per_epoch(self) -> int:
        """Rows until everything has been given out."""
        return self.loader.rows_per_epoch

    def next(self) -> Any:
        """This rank's rows of the next group."""
        step = self.loader.batch * self.loader.world
        first = self.loader.row + self.loader.rank * self.loader.batch
        wanted = [first + number * step for number in range(self.ahead + 1)]
        known = {row for row, _ in self._waiting}
        self._waiting.extend((row, self._pool.submit(self.loader.at, row)) for row in wanted if row not in known)
        row, future = self._waiting.popleft()
        assert row == first, "a batch of another position"
        began = time.perf_counter()
        batch = future.result()
        self.waited_s += time.perf_counter() - began
        self.loader.row += step
        return batch

    def at(self, row: int) -> Any:
        """The batch of rows from number `row` on; the position stays."""
        return self._pool.submit(self.loader.at, row).result()

    def state(self) -> dict[str, int]:
        """The position behind the batches taken; what was read ahead is no part of it."""
        return self.loader.state()

    def load_state(self, state: dict[str, int]) -> None:
        """Go on from a `state`; what was read ahead is forgotten."""
        self.loader.load_state(state)
        self._waiting.clear()

    def close(self) -> None:
        """End the thread."""
        self._waiting.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)
