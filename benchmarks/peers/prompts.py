"""The prompts that every peer gets: token ids, the same for the same number of streams."""

import random


def prompts(order: dict, n_streams: int) -> list[list[int]]:
    """One prompt a stream."""
    draw = random.Random(n_streams)
    return [[draw.randrange(1, order["vocab"]) for _ in range(order["prompt_tokens"])] for _ in range(n_streams)]
