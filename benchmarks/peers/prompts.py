"""The prompts that every peer gets, token ids, the same for the same number of streams; and the clock that times them."""

import random
import time


def prompts(order: dict, n_streams: int, turn: int = 0) -> list[list[int]]:
    """One prompt a stream; others at each turn."""
    draw = random.Random(n_streams + 1000 * turn)
    return [[draw.randrange(1, order["vocab"]) for _ in range(order["prompt_tokens"])] for _ in range(n_streams)]


def seconds(order: dict) -> float:
    """Now: of the wall clock, or of the process's own time on processors, which a busy machine does not lengthen by much."""
    return time.process_time() if order["clock"] == "cpu" else time.perf_counter()
