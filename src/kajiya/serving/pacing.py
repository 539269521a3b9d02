"""How many steps' tokens a chunk of a stream holds: a chunk of its own for each token costs more than all else about it."""

_MANY_STREAMS = 16
"""Streams from which on chunks are put together; fewer are told of every token as it comes."""
_CHUNK_S = 0.05
"""Time between two chunks that nobody minds, seconds."""
_MOST_STEPS = 8
_WEIGHT = 0.1
"""Of the newest step in the mean."""


class Pace:
    """The steps between two chunks of a stream: `fixed`, or as many as many open streams want and a short time allows."""

    def __init__(self, fixed: int | None) -> None:
        self._fixed = fixed
        self._step_s: float | None = None

    def took(self, step_s: float) -> None:
        """A step has taken that many seconds."""
        before = step_s if self._step_s is None else self._step_s
        self._step_s = before + _WEIGHT * (step_s - before)

    def steps(self, n_streams: int) -> int:
        """Steps between two chunks while that many streams are open, at least 1."""
        if self._fixed is not None:
            return self._fixed
        if n_streams < _MANY_STREAMS or not self._step_s:
            return 1
        return max(1, min(_MOST_STEPS, int(_CHUNK_S / self._step_s)))
