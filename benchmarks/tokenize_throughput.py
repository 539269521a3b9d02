"""Tokenize-and-shard throughput beside `datasets.map`: the same text, the same tokenizer, results on disk in both.

Run: `python benchmarks/tokenize_throughput.py [--rounds 3] [--store FOLDER]`. The contenders take turns; what is printed is
the median of each, and the ratio to the best `datasets.map` of the same round. The ids of all are compared.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np


def ours(corpus: Any, tokenizer: Any, folder: Path) -> np.ndarray:
    """Shards, with document boundaries, hashed and synced as the store has them."""
    from kajiya.config.schema import DataConfig
    from kajiya.data.shards import build_shards, open_split
    from kajiya.run.store import Store

    shards, _ = build_shards(DataConfig(), corpus, tokenizer, Store(folder))
    split = open_split(shards.path, "train")
    return split.read(0, split.n_tokens)


def mapped(batched: bool, processes: int | None) -> Any:
    """`datasets.map` over the documents with the tokenizer of Transformers."""

    def run(corpus: Any, tokenizer: Any, folder: Path) -> list[np.ndarray]:
        from datasets import Dataset, disable_progress_bars
        from transformers import AutoTokenizer

        from kajiya.data.documents import open_documents

        disable_progress_bars()
        vocabulary = AutoTokenizer.from_pretrained(tokenizer.path)
        rows = Dataset.from_dict({"text": list(open_documents(corpus.path, "train").texts())})

        def encode(row: dict[str, Any]) -> dict[str, Any]:
            ids = vocabulary(row["text"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
            return {"ids": [[0, *each, 1] for each in ids] if batched else [0, *ids, 1]}

        made = rows.map(
            encode, batched=batched, num_proc=processes, remove_columns=["text"], load_from_cache_file=False
        )
        made.save_to_disk(str(folder / "mapped"))
        return list(made.with_format("numpy")["ids"])

    return run


CONTENDERS = {
    "kajiya": ours,
    "datasets.map": mapped(batched=False, processes=None),
    "datasets.map batched": mapped(batched=True, processes=None),
    "datasets.map batched, 2 processes": mapped(batched=True, processes=2),
}


def main() -> None:
    """Print the table."""
    from kajiya.config.compose import compose
    from kajiya.data.corpus import build_corpus
    from kajiya.data.tokenizer import build_tokenizer
    from kajiya.run.store import Store

    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--store", type=Path, default=Path("kajiya-store"))
    given = arguments.parse_args()
    config = compose("stdlib-pretrain", [])
    corpus, _ = build_corpus(config.data, Store(given.store))
    tokenizer, _ = build_tokenizer(config.tokenizer, corpus, Store(given.store))
    megabytes = corpus.facts["ledger"]["train"]["bytes"] / 1e6
    speeds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    ratios = []
    for _ in range(given.rounds):
        ids = {}
        for name, run in CONTENDERS.items():
            folder = Path(tempfile.mkdtemp())
            began = time.perf_counter()
            found = run(corpus, tokenizer, folder)
            speeds[name].append(megabytes / (time.perf_counter() - began))
            ids[name] = np.concatenate([np.atleast_1d(each) for each in found]) if isinstance(found, list) else found
            shutil.rmtree(folder)
        ratios.append(speeds["kajiya"][-1] / max(each[-1] for name, each in speeds.items() if name != "kajiya"))
        assert all(np.array_equal(each, ids["kajiya"]) for each in ids.values()), "other ids"
    print(f"{megabytes:.1f} MB of training text")
    for name, each in speeds.items():
        print(f"{name:36} {median(each):6.2f} MB/s  ({min(each):.2f} to {max(each):.2f})")
    print(f"kajiya / best datasets.map: {median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})")


if __name__ == "__main__":
    main()
