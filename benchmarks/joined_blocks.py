"""Joined blocks of each architecture beside Transformers' code: processor time of one thread, forward and backward, interleaved.

Blocks of model S (two of them, random weights) on 4 rows of 512 tokens in three segments; both sides have the attention operator.
"""

import argparse
import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kajiya.data.batch import Batch
from kajiya.models.attention import PACKED_SDPA, register_packed_sdpa
from kajiya.models.fused import fuse_blocks
from kajiya.models.hidden import last_hidden

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 128}
MODELS: dict[str, dict[str, Any]] = {"llama": {}, "qwen2": {}, "qwen3": {}, "gemma": {}, "gemma3_text": WINDOWS}
SEGMENTS = (200, 120, 192)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="rounds; the quickest of each counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    register_packed_sdpa()
    batch = make_batch()
    print(f"{'model':<14}{'dtype':<10}{'plain s':>9}{'joined s':>10}{'ratio':>7}")
    for name, fields in MODELS.items():
        for dtype in (torch.bfloat16, torch.float32):
            config = AutoConfig.for_model(name, **SIZES | fields)
            make = AutoModelForCausalLM.from_config
            plain, joined = (make(config, attn_implementation=PACKED_SDPA, dtype=dtype) for _ in range(2))
            said = fuse_blocks(joined, dtype, CPU, is_autocast=False)
            if not said.startswith("yes"):
                print(f"{name:<14}{said}")
                continue
            times: tuple[list[float], list[float]] = ([], [])
            for _ in range(options.rounds):
                for model, taken in zip((plain, joined), times, strict=True):
                    model.zero_grad()
                    began = time.process_time()
                    last_hidden(model, batch).square().mean().backward()
                    taken.append(time.process_time() - began)
            theirs, ours = (min(each) for each in times)
            kind = str(dtype).removeprefix("torch.")
            print(f"{name:<14}{kind:<10}{theirs:>9.3f}{ours:>10.3f}{theirs / ours:>7.2f}", flush=True)
    return 0


def make_batch() -> Batch:
    """Four rows of random tokens."""
    tokens = torch.randint(0, SIZES["vocab_size"], (4, sum(SEGMENTS)))
    segments = torch.cat([torch.full((n,), i) for i, n in enumerate(SEGMENTS)]).expand(4, -1).contiguous()
    positions = torch.cat([torch.arange(n) for n in SEGMENTS]).expand(4, -1).contiguous()
    return Batch(tokens, tokens, positions, segments, tokens.numel())


if __name__ == "__main__":
    raise SystemExit(main())
