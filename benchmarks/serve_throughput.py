"""Generated tokens a second beside the peers: one model, the same prompts, in process, interleaved, as ratios.

Each peer is a script in `peers/`, run by a Python of its own (`--peer NAME=PYTHON`), which prints one JSON line of tokens/s by
the number of streams.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
SHAPE = {
    "vocab_size": 16000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 14,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
CASES = {
    "kajiya fp32": ("serve_kajiya", {"precision": "fp32"}),
    "kajiya bf16": ("serve_kajiya", {"precision": "bf16"}),
    "kajiya int8": ("serve_kajiya", {"quantize": "int8"}),
    "kajiya int4": ("serve_kajiya", {"quantize": "int4"}),
    "transformers fp32": ("serve_transformers", {}),
    "llama.cpp f32": ("serve_llamacpp", {"type": "f32"}),
    "llama.cpp bf16": ("serve_llamacpp", {"type": "bf16"}),
    "llama.cpp Q8_0": ("serve_llamacpp", {"type": "q8_0"}),
    "llama.cpp Q4_0": ("serve_llamacpp", {"type": "q4_0"}),
}
"""Name → script and what it is told."""
PAIRS = (
    ("kajiya fp32", "transformers fp32"),
    ("kajiya fp32", "llama.cpp f32"),
    ("kajiya bf16", "llama.cpp bf16"),
    ("kajiya int8", "llama.cpp Q8_0"),
    ("kajiya int4", "llama.cpp Q4_0"),
)


def make_model(folder: Path) -> None:
    """A Llama of 53M random weights with a byte-level tokenizer, saved."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|end|>", *alphabet, *(f"{a}{b}" for a in alphabet for b in alphabet)][: SHAPE["vocab_size"]]
    merges = [(word[0], word[1]) for word in words if len(word) == 2]
    bpe = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, bos_token_id=None, eos_token_id=0, pad_token_id=None, initializer_range=0.05)
    LlamaForCausalLM(config).save_pretrained(folder)


def run(case: str, order: dict, python: str) -> dict[str, float]:
    """Tokens a second by number of streams."""
    script, settings = CASES[case]
    told = json.dumps(order | settings)
    environment = os.environ | {"OMP_NUM_THREADS": str(order["threads"])}
    done = subprocess.run(
        [python, str(HERE / "peers" / f"{script}.py"), told], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--llamacpp-python", help="a Python that has llama-cpp-python and gguf")
    parser.add_argument("--model", type=Path, help="folder of a Llama; made anew without it")
    args = parser.parse_args()
    cases = [case for case in args.cases if args.llamacpp_python or "llama.cpp" not in case]
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or Path(scratch) / "model"
        if args.model is None:
            make_model(folder)
        order = {
            "folder": str(folder),
            "scratch": scratch,
            "streams": args.streams,
            "prompt_tokens": args.prompt_tokens,
            "new_tokens": args.new_tokens,
            "threads": args.threads,
        }
        found: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
        for repeat in range(args.repeats):
            for case in cases:
                python = args.llamacpp_python if "llama.cpp" in case else sys.executable
                found[case].append(run(case, order, python))
                print(
                    f"{repeat + 1}/{args.repeats} {case}: {found[case][-1]}  load {os.getloadavg()[0]:.1f}", flush=True
                )
    print("\n| tokens/s (median) | " + " | ".join(map(str, args.streams)) + " |")
    print("|---|" + "---|" * len(args.streams))
    for case, runs in found.items():
        print(f"| {case} | " + " | ".join(f"{median(run[str(n)] for run in runs):.0f}" for n in args.streams) + " |")
    print("\n| ratio (median of pairs) | " + " | ".join(map(str, args.streams)) + " |")
    print("|---|" + "---|" * len(args.streams))
    for ours, theirs in PAIRS:
        if ours in found and theirs in found:
            ratios = [
                median(a[str(n)] / b[str(n)] for a, b in zip(found[ours], found[theirs], strict=True))
                for n in args.streams
            ]
            print(f"| {ours} / {theirs} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")


if __name__ == "__main__":
    main()
