"""The prompts that every peer gets, token ids, the same for the same number of streams; and how its answers are timed."""

import json
import random
import time
from collections.abc import Callable


def prompts(order: dict, n_streams: int, turn: int = 0) -> list[list[int]]:
    """One prompt a stream; others at each turn."""
    draw = random.Random(n_streams + 1000 * turn)
    return [[draw.randrange(1, order["vocab"]) for _ in range(order["prompt_tokens"])] for _ in range(n_streams)]


def seconds(order: dict) -> float:
    """Now: of the wall clock, or of the process's own time on processors, which a busy machine does not lengthen by much."""
    return time.process_time() if order["clock"] == "cpu" else time.perf_counter()


def tell(order: dict, answer: Callable[[list[list[int]]], int], is_warmed: bool = False) -> None:
    """Print tokens a second by number of streams as JSON; `answer` continues the prompts and returns the number of new tokens.

    `is_warmed`: as many prompts are answered before those that are timed, for engines that prepare themselves for a shape.
    """
    found = {}
    for n in order["streams"]:
        if is_warmed:
            answer(prompts(order, n, 1))
        given = prompts(order, n)
        begun = seconds(order)
        n_tokens = answer(given)
        found[n] = n_tokens / (seconds(order) - begun)
        assert n_tokens == n * order["new_tokens"], n_tokens
    print(json.dumps(found))
