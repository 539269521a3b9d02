"""Where the time of a step goes."""

import time
from collections.abc import Mapping

import torch


class Stopwatch:
    """Laps of steps, by name. On a GPU they are measured on the device, and each is read when the device has passed it."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._laps: list[tuple[str, object, object]] = []
        self._last = self._now()

    def begin(self) -> None:
        """A step begins: what was done since the last lap is nobody's."""
        self._last = self._now()

    def lap(self, name: str) -> None:
        """What was done since the last lap was this."""
        now = self._now()
        self._laps.append((name, self._last, now))
        self._last = now

    def read(self) -> dict[str, float]:
        """Seconds by name of the laps that have ended and were not read before; the device is not waited for."""
        spent: dict[str, float] = {}
        while self._laps and self._has_passed(self._laps[0][2]):
            name, begin, end = self._laps.pop(0)
            spent[name] = spent.get(name, 0.0) + self._between(begin, end)
        return spent

    def finish(self) -> dict[str, float]:
        """As `read`, of all laps; the device is waited for."""
        if self._laps and self._on_gpu:
            torch.cuda.synchronize()
        return self.read()

    def _now(self) -> object:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.perf_counter()

    @staticmethod
    def _has_passed(moment: object) -> bool:
        return not isinstance(moment, torch.cuda.Event) or bool(moment.query())

    @staticmethod
    def _between(begin: object, end: object) -> float:
        if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            return float(begin.elapsed_time(end)) / 1000
        if isinstance(begin, float) and isinstance(end, float):
            return end - begin
        raise AssertionError("laps of one watch are of one kind")


def add_times(total: dict[str, float], spent: Mapping[str, float]) -> None:
    """Add seconds by name in place."""
    for name, seconds in spent.items():
        total[name] = total.get(name, 0.0) + seconds


def time_words(spent: Mapping[str, float]) -> str:
    """Shares of the time, largest first, for a line on the screen."""
    whole = sum(spent.values()) or 1.0
    parts = sorted(spent.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in parts if seconds / whole >= 0.005)
