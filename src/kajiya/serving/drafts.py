"""Guesses of what comes next, which the model confirms several of in one step (speculative decoding).

A guess costs little and changes nothing: the engine keeps those that the model would have said itself (Leviathan et al.
2023 for greedy decoding; here also for sampled answers, whose random numbers are looked at ahead).
"""

from collections.abc import Iterable
from typing import Protocol

from kajiya.serving.sequence import Sequence


class Drafter(Protocol):
    """Guesses what follows sequences."""

    def guess(self, sequences: list[Sequence]) -> dict[str, tuple[int, ...]]:
        """Tokens that may follow, by request id; none for a sequence without a good guess."""

    def end(self, request_id: str) -> None:
        """Forget a request."""

    def reset(self) -> None:
        """Forget everything: new weights, or a failure."""


class PromptLookup:
    """What followed the last tokens where they stood before, in the prompt or the answer (prompt lookup decoding)."""

    def __init__(self, n_guesses: int, longest: int = 3) -> None:
        self._n_guesses = n_guesses
        self._longest = longest
        # Request → n-gram → where it was last followed by something: kept up, so that a step costs no search.
        self._seen: dict[str, tuple[dict[tuple[int, ...], int], int]] = {}

    def guess(self, sequences: list[Sequence]) -> dict[str, tuple[int, ...]]:
        found = {}
        for sequence in sequences:
            tokens, request_id = sequence.tokens, sequence.request.id
            places, n_seen = self._seen.get(request_id, ({}, 0))
            for end in range(max(n_seen, 1), len(tokens)):
                for size in range(1, min(self._longest, end) + 1):
                    places[tuple(tokens[end - size : end])] = end
            self._seen[request_id] = (places, len(tokens))
            for size in range(min(self._longest, len(tokens)), 0, -1):
                place = places.get(tuple(tokens[-size:]))
                if place is not None:
                    found[request_id] = tuple(tokens[place : place + self._n_guesses])
                    break
        return found

    def end(self, request_id: str) -> None:
        self._seen.pop(request_id, None)

    def reset(self) -> None:
        self._seen.clear()


def within(guesses: dict[str, tuple[int, ...]], sequences: Iterable[Sequence]) -> dict[str, tuple[int, ...]]:
    """The guesses that their requests have room for, and whose tokens are drawn from the model's own distribution."""
    kept = {}
    for sequence in sequences:
        params = sequence.request.params
        # The step brings a token of its own behind the guesses.
        room = params.max_tokens - sequence.n_generated - 1
        guess = guesses.get(sequence.request.id, ())[: max(0, room)]
        if guess and params.is_plain:
            kept[sequence.request.id] = guess
    return kept
