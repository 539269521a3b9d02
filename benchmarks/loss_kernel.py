"""The loss's softmax of a chunk of logits on a GPU: the Triton kernel beside torch's own operators, in one run.

Time of a chunk (medians of interleaved rounds), memory beyond the logits, and the largest difference of the two gradients.
"""

import argparse
from collections.abc import Callable
from statistics import median

import torch

from kajiya.training.cross_entropy import _ENTROPY, rows_at_once
from kajiya.training.softmax_choice import triton_problem

VOCABULARIES = (8192, 32_000, 50_257, 131_072)
WAYS = ("triton", "torch")
_TOKENS = 2048


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help="rounds that the medians are of")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("not measured: there is no CUDA device")
        return 0
    if (problem := triton_problem()) is not None:
        print(f"not measured: {problem}")
        return 0
    print(f"{torch.cuda.get_device_name()}, chunks of up to {_TOKENS:,} tokens, bf16 logits")
    print(
        f"{'vocabulary':>10}{'tokens':>8}{'triton ms':>11}{'torch ms':>10}{'ratio':>7}{'MiB':>7}{'MiB':>7}{'difference':>12}"
    )
    for n_words in VOCABULARIES:
        print(measure(n_words, options.rounds), flush=True)
    return 0


def measure(n_words: int, rounds: int) -> str:
    """One row of the table."""
    torch.manual_seed(0)
    n_tokens = rows_at_once(_TOKENS, n_words)
    logits = torch.randn(n_tokens, n_words, device="cuda").mul_(4).to(torch.bfloat16)
    targets = torch.randint(0, n_words, (n_tokens,), device="cuda")
    weights = torch.ones(n_tokens, device="cuda")

    def make(way: str) -> Callable[[], torch.Tensor | None]:
        return lambda: _ENTROPY[way](logits, targets, weights, 1e-4, 0.0, needs_grad=True)[0]

    calls = {way: make(way) for way in WAYS}
    grads, peaks = {}, {}
    for way, call in calls.items():
        call()  # the first one compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        grads[way] = call()
        torch.cuda.synchronize()
        peaks[way] = (torch.cuda.max_memory_allocated() - before) / 2**20
    difference = float((grads["triton"].float() - grads["torch"].float()).abs().max())
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times[way].append(begin.elapsed_time(end))
    ours, theirs = (median(times[way]) for way in WAYS)
    return (
        f"{n_words:>10,}{n_tokens:>8,}{ours:>11.3f}{theirs:>10.3f}{theirs / ours:>7.2f}"
        f"{peaks['triton']:>7.0f}{peaks['torch']:>7.0f}{difference:>12.1e}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
