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
        assert rung or 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.2
        until = time.monotonic() + 60
        while not rung and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, every)
        signal.signal(signal.SIGALRM, before)
    assert rung == [signal.SIGALRM]


def test_a_time_that_is_up_where_the_block_ends_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes as the timer is to be taken off: nothing is raised behind the block, and the handlers are as before."""
    before, set_timer, calls = signal.getsignal(signal.SIGALRM), signal.setitimer, list[float]()

    def late(which: int, seconds: float, interval: float = 0.0) -> tuple[float, float]:
        calls.append(seconds)
        if calls == [0, 30, 0]:
            signal.raise_signal(signal.SIGALRM)
        return set_timer(which, seconds, interval)

    left, every = set_timer(signal.ITIMER_REAL, 0)  # that of the test's own limit
    monkeypatch.setattr(signal, "setitimer", late)
    try:
        with pytest.raises(LateError), time_limit(30, lambda _: ""):
            pass
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
        assert signal.getsignal(signal.SIGALRM) == before
    finally:
        set_timer(signal.ITIMER_REAL, left, every)
