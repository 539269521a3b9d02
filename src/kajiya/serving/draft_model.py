"""Guesses by a smaller model with the same tokens (Leviathan et al. 2023; Chen et al. 2023), in a paged cache of its own.

The draft says what it thinks most probable, so that their rule of rejection is simple: a guess stays exactly when the
model draws it itself, with the random number that it would have used anyway. Greedy answers and seeded ones are those
without guesses; the distribution of the others is the model's.
"""

from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from kajiya.serving.blocks import BlockPool
from kajiya.serving.scheduler import STEP_TOKENS, Chunk, Plan
from kajiya.serving.sequence import Request, SamplingParams, Sequence, new_sequence

if TYPE_CHECKING:
    from kajiya.serving.runner import Runner


@dataclass
class _Shadow:
    """A sequence as the draft has read it: the answer so far and, behind it, guesses that it has read too."""

    sequence: Sequence
    n_sure: int = 0
    """Tokens that were no guess when it was last asked."""


class DraftModel:
    """Lets a smaller model write on for a few tokens, all sequences of a step together."""

    def __init__(
        self, runner: "Runner", n_guesses: int, context_tokens: int, n_tokens: int, step_tokens: int = STEP_TOKENS
    ) -> None:
        self.runner = runner
        self.pool = BlockPool(runner.n_blocks, runner.block_tokens)
        self._n_guesses = n_guesses
        self._context_tokens = context_tokens
        self._n_tokens = n_tokens
        self._step_tokens = step_tokens
        self._shadows: dict[str, _Shadow] = {}

    def guess(self, sequences: list[Sequence]) -> dict[str, tuple[int, ...]]:
        asked = {each.request.id: each for each in sequences if self._room(each) > 0}
        open_ids = self._catch_up(asked)
        found: dict[str, list[int]] = {request_id: [] for request_id in open_ids}
        while open_ids:
            chunks = [self._next_chunk(self._shadows[request_id].sequence) for request_id in open_ids]
            rows = self.runner.run(Plan((), tuple(chunks)))
            for request_id, chunk in zip(open_ids, chunks, strict=True):
                chunk.sequence.n_cached += chunk.count
                chunk.sequence.tokens.append(rows[request_id].best[-1])
                found[request_id].append(chunk.sequence.tokens[-1])
            open_ids = [each for each in open_ids if self._goes_on(each, found[each], asked[each])]
        return {request_id: tuple(takewhile(self._is_token, tokens)) for request_id, tokens in found.items()}

    def end(self, request_id: str) -> None:
        shadow = self._shadows.pop(request_id, None)
        if shadow is not None:
            self.pool.release(shadow.sequence.blocks)

    def reset(self) -> None:
        self._shadows.clear()
        self.pool.reset()
        self.runner.clear(list(range(self.runner.n_blocks)))

    def _is_token(self, token: int) -> bool:
        """Whether the model has it too: the draft's table may be padded further."""
        return token < self._n_tokens

    def _goes_on(self, request_id: str, found: list[int], sequence: Sequence) -> bool:
        return len(found) < self._room(sequence) and self._is_token(found[-1]) and self._reserve(request_id)

    def _room(self, sequence: Sequence) -> int:
        """Guesses worth making: the step brings a token of its own behind them, and the draft has a context too."""
        wanted = sequence.request.params.max_tokens - sequence.n_generated - 1
        return min(self._n_guesses, wanted, self._context_tokens - len(sequence.tokens))

    def _catch_up(self, asked: dict[str, Sequence]) -> list[str]:
        """Bring the shadows up to all but the last token; those that are there can be guessed for in this step.

        At most a step's tokens are read, so that a long prompt delays the others by little here too.
        """
        budget, ready, chunks = self._step_tokens, [], []
        for request_id, sequence in asked.items():
            shadow = self._follow(request_id, sequence)
            behind = len(sequence.tokens) - 1 - shadow.n_cached
            count = min(behind, budget)
            if not self._reserve(request_id, count + 1):
                continue
            # What lags by a guess or two is read with the last token, at no step of its own.
            if behind > self._n_guesses:
                start = shadow.n_cached
                chunks.append(Chunk(shadow, start, tuple(shadow.tokens[start : start + count])))
                budget -= count
            if count == behind:
                ready.append(request_id)
        chunks = [chunk for chunk in chunks if chunk.count]
        if chunks:
            self.runner.run(Plan((), tuple(chunks)))
            for chunk in chunks:
                chunk.sequence.n_cached += chunk.count
        return ready

    def _follow(self, request_id: str, sequence: Sequence) -> Sequence:
        """The shadow with the sequence's own tokens: of the guesses, those stay read that were confirmed."""
        if request_id not in self._shadows:
            request = Request(request_id, sequence.request.prompt, SamplingParams(max_tokens=1))
            self._shadows[request_id] = _Shadow(new_sequence(request, frozenset()))
        shadow = self._shadows[request_id]
        mine, n = shadow.sequence, min(shadow.n_sure, len(sequence.tokens))
        limit = min(mine.n_cached, len(sequence.tokens) - 1)
        while n < limit and mine.tokens[n] == sequence.tokens[n]:
            n += 1
        mine.n_cached = min(n, limit)
        mine.tokens[n:] = sequence.tokens[n:]
        shadow.n_sure = len(sequence.tokens)
        return mine

    def _next_chunk(self, mine: Sequence) -> Chunk:
        return Chunk(mine, mine.n_cached, tuple(mine.tokens[mine.n_cached :]))

    def _reserve(self, request_id: str, n_more: int = 1) -> bool:
        """Whether there are blocks for so many tokens more; without them there is no guess, which is no harm."""
        mine = self._shadows[request_id].sequence
        missing = -(-(mine.n_cached + n_more) // self.pool.block_tokens) - len(mine.blocks)
        if missing > self.pool.n_free:
            return False
        mine.blocks.extend(self.pool.take() for _ in range(missing))
        return True
