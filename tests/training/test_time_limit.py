"""A limit on the time of others' code: it stops what hangs, and a timer of whoever called goes on."""

import signal
import time
from types import FrameType

import pytest

from kajiya.training.time_limit import LateError, time_limit


def test_what_hangs_is_stopped_and_told_by_its_variables() -> None:
    def hang(answer: str) -> None:
        while answer:
            time.sleep(0.01)

    with (
        pytest.raises(LateError, match="long"),
        time_limit(0.05, lambda frames: next(each["answer"] for each in frames if "answer" in each)),
    ):
        hang("long")


def test_a_timer_of_whoever_called_goes_on() -> None:
    rung: list[int] = []

    def ring(number: int, _frame: FrameType | None) -> None:
        rung.append(number)

    before = signal.signal(signal.SIGALRM, ring)
    left, every = signal.setitimer(signal.ITIMER_REAL, 0.2)  # that of the test's own limit
    try:
        with time_limit(30, lambda _: ""):
            pass
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.2
        until = time.monotonic() + 60
        while not rung and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, every)
        signal.signal(signal.SIGALRM, before)
    assert rung == [signal.SIGALRM]
