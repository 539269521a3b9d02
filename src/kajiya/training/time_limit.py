"""A limit on the time that code of others takes: what hangs is stopped, and where it hung is told."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_AGAIN_S = 1.0
"""Until it is stopped: what is raised where nobody hears it (a destructor) is raised anew."""
Locate = Callable[[Iterator[dict[str, Any]]], str]
"""From the local variables of the stopped functions, the innermost first, what it hung at, in words."""


class LateError(BaseException):
    """The time is up. No `Exception`, so that code that catches all of these is stopped too."""


@contextmanager
def time_limit(seconds: float, locate: Locate) -> Iterator[None]:
    """Raise `LateError`, with the words of `locate`, within the block once it has taken `seconds` of wall time.

    Python's own code is stopped, waiting and the matching of regular expressions too; a call into a library goes on up to its end.
    In other threads than the main one, which no signal reaches, there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, frame: FrameType | None) -> None:
        raise LateError(locate(_locals(frame)))

    left, every = signal.setitimer(signal.ITIMER_REAL, 0)
    began = time.monotonic()
    before = signal.signal(signal.SIGALRM, stop)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_S)
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        # Twice, since the time may be up just where the block ends: it would be raised anew outside of it.
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:  # a timer of whoever called goes on
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 1e-3), every)


def _locals(frame: FrameType | None) -> Iterator[dict[str, Any]]:
    while frame is not None:
        yield dict(frame.f_locals)
        frame = frame.f_back
