"""The laps of steps, on a device that runs behind."""

from typing import Any

import pytest
import torch

from kajiya.training.timing import Stopwatch, time_words


class Device:
    """A GPU's clock, of which the events behind `passed` are not complete."""

    def __init__(self) -> None:
        self.clock = 0.0
        self.passed = 0.0


def _event(device: Device) -> type:
    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = device.clock

        def query(self) -> bool:
            return self.at <= device.passed

        def elapsed_time(self, other: Any) -> float:
            # As CUDA does.
            if not (self.query() and other.query()):
                raise RuntimeError("Both events must be completed before calculating elapsed time.")
            return float(1000 * (other.at - self.at))

    return Event


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", _event(device))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: setattr(device, "passed", device.clock))
    return device


def test_a_lap_is_read_when_the_device_has_passed_it(device: Device) -> None:
    watch = Stopwatch(torch.device("cuda"))
    watch.begin()
    device.clock = 2.0
    watch.lap("forward")
    device.passed = 2.0
    device.clock = 5.0
    watch.lap("optimizer")
    assert watch.read() == {"forward": 2.0}
    device.clock = 7.0
    watch.begin()
    device.clock = 8.0
    watch.lap("forward")
    device.passed = 5.0
    assert watch.read() == {"optimizer": 3.0}
    assert watch.finish() == {"forward": 1.0}
    assert watch.read() == {}


def test_on_a_cpu_laps_are_read_at_once() -> None:
    watch = Stopwatch(torch.device("cpu"))
    watch.lap("data")
    watch.lap("data")
    assert watch.read().keys() == {"data"}
    assert time_words({"data": 1.0, "forward": 3.0}) == "forward 75%, data 25%"
