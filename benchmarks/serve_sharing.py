"""What sharing brings, in process: a prefix of 1,000 tokens that 32 requests have in common, and 8 adapters in one batch.

The 32 come at once to a cache that knows nothing of their prefix: reading it is part of what is timed. Without the prefix
cache, each request has a prefix of its own of the same length: nothing is found in the cache.
"""

import argparse
import os
import random
import tempfile
import time
from pathlib import Path
from statistics import mean, median

import torch

from kajiya.serving.engine import Engine
from kajiya.serving.loading import load_engine
from kajiya.serving.sequence import Request, SamplingParams
from serving_model import SHAPE, make_adapters, make_model

GREEDY = SamplingParams(max_tokens=32, temperature=0, ignore_eos=True)


def first_tokens(engine: Engine, prompts: list[list[int]], tag: str) -> list[float]:
    """Seconds from the call to the first token of each request; all come at once."""
    begun, seen = time.perf_counter(), {}
    for i, prompt in enumerate(prompts):
        engine.add(Request(f"{tag}-{i}", tuple(prompt), GREEDY))
    while not engine.is_idle:
        for output in engine.step():
            seen.setdefault(output.id, time.perf_counter() - begun)
    return [*seen.values()]


def prefix(engine: Engine, repeats: int) -> None:
    """Mean time to first token with and without the cache, and what was read."""
    draw, ratios = random.Random(0), []

    def ids(n: int) -> list[int]:
        return [draw.randrange(1, SHAPE["vocab_size"]) for _ in range(n)]

    for repeat in range(repeats):
        shared = ids(1000)
        own = [ids(1000) + ids(24) for _ in range(32)]
        without = mean(first_tokens(engine, own, f"without-{repeat}"))
        before = engine.scheduler.n_shared_tokens, engine.scheduler.n_prompt_tokens
        given = mean(first_tokens(engine, [shared + ids(24) for _ in range(32)], f"with-{repeat}"))
        found = engine.scheduler.n_shared_tokens - before[0]
        read = engine.scheduler.n_prompt_tokens - before[1] - found
        ratios.append(without / given)
        print(
            f"prefix of 1,000, 32 requests: first token after {given * 1e3:.0f} ms (mean), {without * 1e3:.0f} ms without the "
            f"cache: {ratios[-1]:.1f} x; {read} prompt tokens read of {read + found}",
            flush=True,
        )
    print(f"median: {median(ratios):.1f} x")


def adapters(engine: Engine, folders: list[Path], repeats: int) -> None:
    """Tokens a second of 16 streams: the base alone, and 8 adapters mixed."""
    for folder in folders:
        engine.load_adapter(folder.name, folder)
    draw, ratios = random.Random(1), []
    params = SamplingParams(max_tokens=128, temperature=0, ignore_eos=True)
    for repeat in range(repeats):
        rates = []
        for names in ([None] * 16, [folders[i % len(folders)].name for i in range(16)]):
            begun = time.perf_counter()
            for i, name in enumerate(names):
                ids = tuple(draw.randrange(1, SHAPE["vocab_size"]) for _ in range(64))
                engine.add(Request(f"{repeat}-{name}-{i}", ids, params, name))
            while not engine.is_idle:
                engine.step()
            rates.append(16 * 128 / (time.perf_counter() - begun))
        ratios.append(rates[1] / rates[0])
        print(
            f"16 streams: base {rates[0]:.0f} tokens/s, 8 adapters mixed {rates[1]:.0f}: {ratios[-1]:.2f} x", flush=True
        )
    print(f"median: {median(ratios):.2f} x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--scratch", type=Path, help="where the model and the adapters are kept for another run")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = args.scratch or Path(temporary)
        folder = scratch / "model"
        if not (folder / "config.json").exists():
            make_model(folder)
        folders = [scratch / f"adapter-{i}" for i in range(8)]
        if not folders[-1].exists():
            make_adapters(folder, scratch, 8)
        engine = load_engine(folder, device="cpu", precision=args.precision, max_batch=32, cache_tokens=40960)
        engine.generate([[1, 2, 3]], GREEDY)
        prefix(engine, args.repeats)
        adapters(engine, folders, args.repeats)


if __name__ == "__main__":
    main()
