"""Who is computed in the next step: admission, batching, preemption, finishing. Pure Python, free of tensors."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from kajiya.errors import RequestError
from kajiya.serving.blocks import BlockPool, Node
from kajiya.serving.sequence import Sequence

STEP_TOKENS = 512
"""Prompt tokens read in one step at most, so that a long prompt delays running answers by little at a time."""


@dataclass(frozen=True)
class Chunk:
    """Tokens at positions `start …` of a sequence, to be read by the model in this step."""

    sequence: Sequence
    start: int
    tokens: tuple[int, ...]
    n_drafts: int = 0
    """How many of the last tokens are guesses of what comes next, to be confirmed."""

    @property
    def count(self) -> int:
        return len(self.tokens)

    @property
    def is_last(self) -> bool:
        """Whether the sequence has nothing more to read, so that its next token can be drawn."""
        return self.start + len(self.tokens) - self.n_drafts == len(self.sequence.tokens)

    @property
    def outputs(self) -> range:
        """Places in the chunk behind which logits are wanted."""
        if self.sequence.wants_prompt:
            return range(self.count)
        return range(self.count - 1 - self.n_drafts, self.count) if self.is_last else range(0)


@dataclass(frozen=True)
class Copy:
    """Copy block `source` to block `target`, in every layer, before anything is computed."""

    source: int
    target: int


@dataclass(frozen=True)
class Plan:
    """One step: first the copies, in order, then the chunks, of at most one for each sequence."""

    copies: tuple[Copy, ...]
    chunks: tuple[Chunk, ...]


Drafts = Callable[[list[Sequence]], dict[str, tuple[int, ...]]]
"""Guesses of what follows each of some sequences, by request id."""


def no_drafts(_: list[Sequence]) -> dict[str, tuple[int, ...]]:
    """No guesses: every step brings one token."""
    return {}


class Scheduler:
    """First come, first served, over a pool of cache blocks.

    Call `plan`, compute its chunks, `advance` each chunk, and `finish` the sequences that are complete; in between, `add`
    and `cancel` at will. A prompt whose next block a running sequence is about to fill waits for that, so that what prompts
    have in common is read once, however many come together. When blocks run out, the sequence that came last gives its up
    and waits at the head of the queue; what it had read is read again later, what it had answered stays.
    """

    def __init__(self, pool: BlockPool, max_batch: int, max_waiting: int, step_tokens: int = STEP_TOKENS) -> None:
        self.pool = pool
        self.max_batch = max_batch
        self.max_waiting = max_waiting
        self.step_tokens = step_tokens
        self.version = 0
        self.waiting: deque[Sequence] = deque()
        self.running: dict[str, Sequence] = {}
        self.n_preemptions = 0
        self.n_prompt_tokens = 0
        self.n_shared_tokens = 0

    @property
    def n_waiting(self) -> int:
        return len(self.waiting)

    @property
    def n_running(self) -> int:
        return len(self.running)

    @property
    def n_cached_tokens(self) -> int:
        """Positions of the cache that running sequences have filled."""
        return sum(sequence.n_cached for sequence in list(self.running.values()))

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    @property
    def n_room(self) -> int:
        """Requests that would be taken now without exceeding the bound."""
        return self.max_batch - self.n_running + self.max_waiting - self.n_waiting

    def fits(self, n_tokens: int) -> bool:
        """Whether a sequence of that many tokens can ever be held."""
        return self._n_blocks(n_tokens) <= self.pool.n_blocks

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises `RequestError`: 429 when batch and queue are full, 400 for what can never fit."""
        request = sequence.request
        # The last token of an answer is never read.
        longest = max(len(request.prompt), len(request.prompt) + request.params.max_tokens - 1)
        if not self.fits(longest):
            raise RequestError(
                f"The prompt and its answer may take {longest} tokens, but this server's cache holds "
                f"{self.pool.n_blocks * self.pool.block_tokens}. Shorten the prompt or lower max_tokens.",
                code="cache_exceeded",
                param="max_tokens",
            )
        if self.n_room <= 0:
            raise RequestError(
                f"The server is busy: {self.n_running} requests run and {self.n_waiting} wait. Try again shortly.",
                code="queue_full",
                status=429,
            )
        self.waiting.append(sequence)

    # ---------------------------------------------------------------- a step

    def plan(self, drafts: Drafts = no_drafts) -> Plan:
        """Admit what fits and say what to compute; decoding comes first, the rest of the step reads prompts."""
        copies: list[Copy] = []
        guesses = drafts([each for each in self.running.values() if each.n_pending == 1])
        budget = self.step_tokens
        counts: dict[str, int] = {}
        size = self.pool.block_tokens
        by_need = sorted(self.running.values(), key=lambda each: each.n_pending > 1)
        for sequence in by_need:
            guess = guesses.get(sequence.request.id, ())
            if not guess and sequence.n_pending == 1 and sequence.n_cached < len(sequence.blocks) * size:
                counts[sequence.request.id] = 1  # as most are: one token, and room for it
                continue
            count = self._grant(sequence, len(guess), budget)
            # Who came last may have been preempted by one before it in this loop.
            if count and sequence.request.id in self.running:
                counts[sequence.request.id] = count
                budget -= count if sequence.n_pending > 1 else 0
        self._admit(budget, counts, copies)
        chunks = []
        for sequence in self.running.values():
            count = counts.get(sequence.request.id, 0)
            if not count:
                continue
            if count == 1:
                chunks.append(Chunk(sequence, sequence.n_cached, (sequence.tokens[sequence.n_cached],)))
                continue
            known = sequence.tokens[sequence.n_cached : sequence.n_cached + count]
            guess = guesses.get(sequence.request.id, ())[: count - len(known)]
            chunks.append(Chunk(sequence, sequence.n_cached, (*known, *guess), len(guess)))
        return Plan(tuple(copies), tuple(chunks))

    def advance(self, chunk: Chunk, tokens: tuple[int, ...]) -> None:
        """Record that a chunk was read and, behind the last one, which tokens were drawn.

        The first tokens drawn confirm as many guesses as they are equal to; the rest of the guesses is as if never read.
        """
        sequence = chunk.sequence
        sequence.n_cached = chunk.start + chunk.count - chunk.n_drafts + max(0, len(tokens) - 1)
        sequence.tokens.extend(tokens)
        self._remember(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Give back the blocks of a running sequence."""
        del self.running[sequence.request.id]
        self._release(sequence)

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

    def renew(self, version: int) -> None:
        """New weights: what is cached is of the old ones, so that running sequences are read again."""
        for sequence in reversed(list(self.running.values())):
            self._preempt(sequence)
        self.pool.forget_all()
        self.version = version

    def drop_all(self) -> list[Sequence]:
        """Forget every request and block, after a failure; returns what was dropped."""
        dropped = [*self.running.values(), *self.waiting]
        self.running.clear()
        self.waiting.clear()
        self.pool.reset()
        return dropped

    # ---------------------------------------------------------------- blocks

    def _n_blocks(self, n_tokens: int) -> int:
        return -(-n_tokens // self.pool.block_tokens)

    def _grant(self, sequence: Sequence, n_drafts: int, budget: int) -> int:
        """Tokens that a running sequence reads in this step, its blocks at hand."""
        if sequence.request.id not in self.running:
            return 0
        count = sequence.n_pending
        # A sequence that decodes is never held up; one token more or less of the budget is no matter.
        count = min(count, budget) if count > 1 else count + n_drafts
        while count:
            missing = self._n_blocks(sequence.n_cached + count) - len(sequence.blocks)
            if missing <= self.pool.n_free:
                sequence.blocks.extend(self.pool.take() for _ in range(missing))
                return count
            if n_drafts and sequence.n_pending == 1:
                count, n_drafts = 1, 0  # guesses are not worth another's place
                continue
            last = next(reversed(self.running.values()))
            self._preempt(last)
            if last is sequence:
                return 0
        return 0

    def _admit(self, budget: int, counts: dict[str, int], copies: list[Copy]) -> None:
        while self.waiting and budget > 0 and self.n_running < self.max_batch:
            sequence = self.waiting[0]
            # The last token is always read: its logits are what the answer begins with.
            limit = 0 if sequence.wants_prompt else len(sequence.tokens) - 1
            match = self.pool.match(self.pool.root((sequence.request.adapter, self.version)), sequence.tokens, limit)
            needed = self._n_blocks(len(sequence.tokens)) - len(match.blocks)
            # Room for all that it has to read, and a block to begin its answer with, or it would soon be preempted;
            # but a sequence that has the whole cache to itself is let in.
            is_full = needed + 1 > self.pool.n_free and (self.running or needed > self.pool.n_free)
            if is_full or self._is_being_read(
                match.node, sequence.tokens[len(match.blocks) * self.pool.block_tokens : limit]
            ):
                self.pool.release(match.blocks)
                return
            self.waiting.popleft()
            sequence.blocks = list(match.blocks)
            sequence.node, sequence.n_remembered = match.node, len(match.blocks)
            sequence.n_cached = len(match.blocks) * self.pool.block_tokens
            count = 0
            if match.partial is not None:
                source, n_same = match.partial
                sequence.blocks.append(self.pool.take())
                copies.append(Copy(source, sequence.blocks[-1]))
                sequence.n_cached += n_same
            sequence.n_shared = sequence.n_cached
            self.n_prompt_tokens += len(sequence.tokens)
            self.n_shared_tokens += sequence.n_shared
            count = min(sequence.n_pending, budget)
            missing = self._n_blocks(sequence.n_cached + count) - len(sequence.blocks)
            sequence.blocks.extend(self.pool.take() for _ in range(missing))
            self.running[sequence.request.id] = sequence
            counts[sequence.request.id] = count
            budget -= count

    def _is_being_read(self, node: Node, rest: list[int]) -> bool:
        """Whether a running sequence has yet to read the block with which `rest` goes on behind `node`: soon it will be known."""
        size = self.pool.block_tokens
        # All but one will do, since the last token of a prompt is no part of `rest`.
        if not self.pool.remembers or len(rest) < size - 1:
            return False
        for other in self.running.values():
            if other.node is node:
                block = other.tokens[other.n_remembered * size : (other.n_remembered + 1) * size]
                if len(block) == size and block[: len(rest)] == rest[:size]:
                    return True
        return False

    def _preempt(self, sequence: Sequence) -> None:
        del self.running[sequence.request.id]
        self._release(sequence)
        if not sequence.is_reported:
            sequence.prompt_logprobs = [None]
        self.waiting.appendleft(sequence)
        self.n_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.node = [], None
        sequence.n_cached = sequence.n_remembered = 0

    def _remember(self, sequence: Sequence) -> None:
        size = self.pool.block_tokens
        while (sequence.n_remembered + 1) * size <= sequence.n_cached:
            assert sequence.node is not None
            start = sequence.n_remembered * size
            tokens = tuple(sequence.tokens[start : start + size])
            sequence.node = self.pool.remember(sequence.node, tokens, sequence.blocks[sequence.n_remembered])
            sequence.n_remembered += 1
