"""How far a stage is, told a few times a second to whoever listens."""

import time
from collections.abc import Callable

OnEvent = Callable[..., object]
"""Called as `on_event("progress", stage=…, done=…, total=…, unit=…)`, which is the form of `EventLog.emit`."""

_EVERY_S = 0.2


def silent(kind: str, **fields: object) -> None:
    """An `on_event` that tells nobody."""


class Progress:
    """Counts what is done and reports it at most every 0.2 s, and once at the end."""

    def __init__(self, on_event: OnEvent, stage: str, unit: str, total: int | None = None) -> None:
        self._on_event = on_event
        self._stage = stage
        self._unit = unit
        self._total = total
        self._done = 0
        self._last = 0.0

    def add(self, amount: int) -> None:
        """Count `amount` more units."""
        self._done += amount
        now = time.monotonic()
        if now - self._last >= _EVERY_S:
            self._last = now
            self._report(self._total)

    def end(self) -> None:
        """Report the final count; what was done is then the total."""
        self._report(self._done)

    def _report(self, total: int | None) -> None:
        self._on_event("progress", stage=self._stage, done=self._done, total=total, unit=self._unit)
