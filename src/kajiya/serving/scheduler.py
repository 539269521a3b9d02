"""Who is computed in the next step: admission, batching, finishing. Pure Python, free of tensors."""

from collections import deque
from dataclasses import dataclass

from kajiya.errors import RequestError
from kajiya.serving.sequence import Sequence
from kajiya.serving.slots import Move, Slots

PREFILL_TOKENS = 512
"""Prompt tokens read in one step at most, so that a long prompt delays running answers by little at a time."""


@dataclass(frozen=True)
class Chunk:
    """Tokens `start … start+count−1` of a sequence, to be read by the model in this step."""

    sequence: Sequence
    start: int
    count: int

    @property
    def is_last(self) -> bool:
        """Whether the sequence has nothing more to read, so that its next token can be drawn."""
        return self.start + self.count == len(self.sequence.tokens)


@dataclass(frozen=True)
class Plan:
    """One step: first the moves in the cache, in order, then the chunks, of at most one for each sequence."""

    moves: tuple[Move, ...]
    chunks: tuple[Chunk, ...]


class Scheduler:
    """First come, first served: a sequence waits for a free row, its prompt is read in chunks, then it is decoded.

    Call `plan`, compute its chunks, `advance` each chunk, and `finish` the sequences that are complete; in between, `add`
    and `cancel` at will. Rows that change place between two plans are moved by the next plan.
    """

    def __init__(self, max_batch: int, max_waiting: int, prefill_tokens: int = PREFILL_TOKENS) -> None:
        self.max_batch = max_batch
        self.max_waiting = max_waiting
        self.prefill_tokens = prefill_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: dict[str, Sequence] = {}
        self._slots = Slots(max_batch)
        self._moves: list[tuple[int, int, Sequence]] = []

    @property
    def n_waiting(self) -> int:
        return len(self.waiting)

    @property
    def n_running(self) -> int:
        return len(self.running)

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    @property
    def n_room(self) -> int:
        """Requests that would be taken now without exceeding the bound."""
        return self._slots.n_free + self.max_waiting - self.n_waiting

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises `RequestError` with status 429 when rows and queue are full."""
        if self.n_room <= 0:
            raise RequestError(
                f"The server is busy: {self.n_running} requests run and {self.n_waiting} wait. Try again shortly.",
                code="queue_full",
                status=429,
            )
        self.waiting.append(sequence)

    def plan(self) -> Plan:
        """Admit what fits and say what to compute; decoding comes first, the rest of the step reads prompts."""
        while self.waiting and self._slots.n_free:
            sequence = self.waiting.popleft()
            sequence.row = self._slots.take(sequence.request.id)
            self.running[sequence.request.id] = sequence
        budget = self.prefill_tokens
        chunks = []
        for sequence in self.running.values():
            count = sequence.n_pending
            if count > 1 or sequence.n_cached == 0:
                count = min(count, budget)
                budget -= count
            if count:
                chunks.append(Chunk(sequence, sequence.n_cached, count))
        # Lengths as they are now: a sequence may have moved before its part of the last step was recorded.
        moves = tuple(Move(source, target, mover.n_cached) for source, target, mover in self._moves)
        self._moves = []
        return Plan(moves, tuple(chunks))

    def advance(self, chunk: Chunk, token: int | None) -> None:
        """Record that a chunk was read and, behind the last one, which token was drawn."""
        chunk.sequence.n_cached = chunk.start + chunk.count
        if token is not None:
            chunk.sequence.tokens.append(token)

    def finish(self, sequence: Sequence) -> None:
        """Give back the row of a running sequence."""
        del self.running[sequence.request.id]
        assert sequence.row is not None
        row, sequence.row = sequence.row, None
        moved = self._slots.give_back(row)
        if moved is not None:
            mover = self.running[moved]
            assert mover.row is not None
            self._moves.append((mover.row, row, mover))
            mover.row = row

    def cancel(self, request_id: str) -> bool:
        """Drop a request, waiting or running; `False` when it is not here (any more)."""
        if request_id in self.running:
            self.finish(self.running[request_id])
            return True
        for sequence in self.waiting:
            if sequence.request.id == request_id:
                self.waiting.remove(sequence)
                return True
        return False

    def drop_all(self) -> list[Sequence]:
        """Forget every request and row, after a failure; returns what was dropped."""
        dropped = [*self.running.values(), *self.waiting]
        self.running.clear()
        self.waiting.clear()
        self._slots = Slots(self.max_batch)
        self._moves = []
        return dropped
