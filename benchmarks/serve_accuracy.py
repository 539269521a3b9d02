"""What fewer bits cost: KL, top-1 agreement and perplexity of the native decoder beside fp32, on text of a trained model.

    python benchmarks/serve_accuracy.py MODEL TEXT…

The model is a folder, trained; texts are files, or folders of Python modules, that it has not been trained on. The figures are of
the same tokens in the same windows.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer

from kajiya.serving.loading import load_engine
from kajiya.serving.proof import read_logits

CASES = {
    "bf16": {"precision": "bf16"},
    "int8 cache": {"precision": "fp32", "cache_precision": "int8"},
    "int8": {"precision": "fp32", "quantize": "int8"},
    "int8, int8 cache": {"precision": "fp32", "quantize": "int8", "cache_precision": "int8"},
    "int4": {"precision": "fp32", "quantize": "int4"},
}
"""Name → settings beside plain fp32."""


def windows(model: Path, texts: list[Path], n_tokens: int, n_windows: int) -> list[list[int]]:
    """Windows of token ids, as many from each file."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    files = [file for text in texts for file in (sorted(text.rglob("*.py")) if text.is_dir() else [text])]
    found = []
    for file in files:
        ids = tokenizer(file.read_text(encoding="utf-8", errors="replace"), verbose=False)["input_ids"]
        found += [ids[start : start + n_tokens] for start in range(0, len(ids) - n_tokens + 1, n_tokens)]
    return found[:: max(1, len(found) // n_windows)][:n_windows]


def logprobs(model: Path, rows: list[list[int]], settings: dict[str, str]) -> list[torch.Tensor]:
    """Log-probabilities of all tokens behind every place [T, V], of each row."""
    runner = load_engine(model, device="cpu", max_batch=1, runner="native", **settings).runner
    return [read_logits(runner, row, [len(row)]).log_softmax(-1) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--window", type=int, default=256, help="tokens")
    parser.add_argument("--windows", type=int, default=40)
    args = parser.parse_args()
    rows = windows(args.model, args.texts, args.window, args.windows)
    exact = logprobs(args.model, rows, {"precision": "fp32"})
    print(
        f"{len(rows)} windows of {args.window} tokens\n\n| | KL, nats a token | top-1 as in fp32 | perplexity |\n|---|---|---|---|"
    )
    for case, settings in {"fp32": {"precision": "fp32"}, **CASES}.items():
        found = logprobs(args.model, rows, settings)
        pairs = [*zip(exact, found, strict=True)]
        kl = torch.cat([(mine.exp() * (mine - other)).sum(-1) for mine, other in pairs]).mean().item()
        top1 = torch.cat([mine.argmax(-1) == other.argmax(-1) for mine, other in pairs]).float().mean().item()
        nll = torch.cat(
            [
                -other[:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0]
                for other, row in zip(found, rows, strict=True)
            ]
        )
        print(f"| {case} | {kl:.1e} | {top1:.2%} | {nll.mean().exp().item():.3f} |", flush=True)


if __name__ == "__main__":
    main()
