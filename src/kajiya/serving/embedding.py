"""The vector of a text, read in pieces no larger than a step's, between which what else runs goes on.

Shape letters: T tokens, D width.
"""

from collections.abc import Generator
from typing import TYPE_CHECKING

import torch

from kajiya.errors import RequestError
from kajiya.serving.scheduler import Chunk, Scheduler
from kajiya.serving.sequence import Sequence

if TYPE_CHECKING:
    from kajiya.serving.runner import Runner


def embedding(runner: "Runner", scheduler: Scheduler, sequence: Sequence) -> Generator[list[float] | None, None, None]:
    """`None` behind every piece but the last, and then the mean over tokens of the last hidden state, scaled to length 1.

    Close it where it is not read to its end: it holds blocks. Raises `RequestError`: 400 for a text that the cache can never
    hold, 429 while running requests hold the blocks that it needs, 500 when the engine has failed in between or the model's
    output is not finite.
    """
    ids, pool = sequence.tokens, scheduler.pool
    if not scheduler.fits(len(ids)):
        raise RequestError(f"input has {len(ids)} tokens, more than the cache holds", param="input")
    n_blocks = -(-len(ids) // pool.block_tokens)
    if n_blocks > pool.n_free:
        raise RequestError("The server is busy. Try again shortly.", code="queue_full", status=429)
    sequence.blocks = [pool.take() for _ in range(n_blocks)]
    n_resets = pool.n_resets
    pieces_D = []
    try:
        for start in range(0, len(ids), scheduler.step_tokens):
            if start:
                yield None
            if pool.n_resets != n_resets:
                raise RequestError("the engine failed while it read the text", code="engine_error", status=500)
            chunk = Chunk(sequence, start, tuple(ids[start : start + scheduler.step_tokens]))
            pieces_D.append(runner.hidden(chunk).sum(dim=0))
            if not pieces_D[-1].isfinite().all():
                runner.clear(sequence.blocks)
                raise RequestError("the model's output is not finite", code="engine_error", status=500)
    finally:
        # Blocks of before a failure are no longer its own.
        if pool.n_resets == n_resets:
            pool.release(sequence.blocks)
    vector: list[float] = torch.nn.functional.normalize(torch.stack(pieces_D).sum(dim=0) / len(ids), dim=0).tolist()
    yield vector
