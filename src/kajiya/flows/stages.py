"""Stages told as they happen: begun, done or reused, with their seconds."""

import time
from collections.abc import Callable
from typing import TypeVar

from kajiya.data.progress import OnEvent

T = TypeVar("T")


class Stages:
    """Times each stage and tells whoever listens; `timings` go into the run's manifest."""

    def __init__(self, on_event: OnEvent) -> None:
        self.on_event = on_event
        self.timings: dict[str, float] = {}

    def produce(self, name: str, make: Callable[[], tuple[T, bool]], words: Callable[[T], str]) -> T:
        """Run `make`, which returns a result and whether it was there already; `words` describes the result."""
        self.on_event("stage", name=name, state="begun", seconds=0.0, text="")
        started = time.perf_counter()
        result, reused = make()
        seconds = time.perf_counter() - started
        if not reused:
            self.timings[name] = self.timings.get(name, 0.0) + seconds
        state = "reused" if reused else "done"
        self.on_event("stage", name=name, state=state, seconds=seconds, text=words(result))
        return result
