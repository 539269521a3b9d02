"""Rows rendered into shards by one process and by several: how fast, how much memory, and whether the shards are the same.

    python benchmarks/render_processes.py [--mib 64] [--repeats 3] [--processes 1 2] [--kinds chat instruction]

Each build is a command of its own over the same corpus and tokenizer, into a new store; the numbers of processes take turns. The
time is that of the stage, the start of the rendering processes, hashing and syncing included. One process encodes on all cores by
itself; what it does alone is the template. It needs as many idle cores as there are processes.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from kajiya.config.schema import DataConfig, SourceConfig, TokenizerConfig
from kajiya.data.corpus import build_corpus
from kajiya.data.tokenizer import build_tokenizer
from kajiya.run.store import Store
from render_throughput import conversations

BUILT = """
import json, sys, time
from functools import partial
from pathlib import Path
from kajiya.config.schema import DataConfig
from kajiya.data import render_processes
from kajiya.data.documents import open_documents
from kajiya.data.render import open_renderer
from kajiya.data.shards import Rendering, build_shards
from kajiya.run.store import Store, open_artifact

corpus, tokenizer, store, n = open_artifact(Path(sys.argv[1])), open_artifact(Path(sys.argv[2])), sys.argv[3], int(sys.argv[4])
render_processes.usable_cores = lambda: n
train = open_documents(corpus.path, "train")
# The held-out side is for one process, as ever, and the other for `n`, however small a trial it is.
render_processes._WORTH_BYTES = train.n_bytes // 2
assert render_processes.processes_for(train, DataConfig().memory_mib) == n
config, form = DataConfig(), corpus.facts["format"]
rendering = Rendering(partial(open_renderer, tokenizer.path, config.render, form), 1, form, ("kajiya.data.render",))
began = time.perf_counter()
shards, _ = build_shards(config, corpus, tokenizer, Store(Path(store)), rendering=rendering)
seconds = time.perf_counter() - began
print(json.dumps({
    "seconds": seconds, "digest": shards.digest, "peak_mib": shards.facts["peak_memory_bytes"] / 2**20,
    "tokens": shards.facts["train"]["tokens"], "encoder": shards.facts["encoder"],
}))
"""


def write_rows(path: Path, kind: str, n_bytes: int) -> None:
    """Conversations of one to four turns, or the first question and answer of each, about so many bytes."""
    with path.open("w", encoding="utf-8") as handle:
        draw = random.Random(0)
        rows = conversations(1000)
        while handle.tell() < n_bytes:
            # Every text once more with a number before it, so that no two rows are the same.
            number = draw.randrange(10**9)
            for row in rows:
                messages = [message | {"content": f"{number} {message['content']}"} for message in row]
                said = {
                    role: next(each["content"] for each in messages if each["role"] == role)
                    for role in ("user", "assistant")
                }
                chosen = {
                    "chat": {"messages": messages},
                    "instruction": {"prompt": said["user"], "completion": said["assistant"]},
                }
                handle.write(json.dumps(chosen[kind]) + "\n")


def build(corpus: Path, tokenizer: Path, n: int) -> dict[str, Any]:
    """The shards by `n` processes, in a store that is then removed."""
    with tempfile.TemporaryDirectory() as store:
        command = [sys.executable, "-c", BUILT, str(corpus), str(tokenizer), store, str(n)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    built: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return built


def main() -> None:
    """Print a line for each kind of rows and number of processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kinds", nargs="+", default=["chat", "instruction"], choices=["chat", "instruction"])
    given = parser.parse_args()
    for kind in given.kinds:
        with tempfile.TemporaryDirectory() as where:
            write_rows(Path(where) / "rows.jsonl", kind, given.mib * 2**20)
            source = SourceConfig("jsonl", {"files": f"{where}/rows.jsonl"})
            config, store = DataConfig(source=source, near_duplicate=None), Store(Path(where) / "store")
            corpus, _ = build_corpus(config, store)
            tokenizer, _ = build_tokenizer(TokenizerConfig(vocab_size=8192), corpus, store, render=config.render)
            rounds = [{n: build(corpus.path, tokenizer.path, n) for n in given.processes} for _ in range(given.repeats)]
        _say(kind, corpus.facts["ledger"]["train"], rounds)


def _say(kind: str, train: dict[str, Any], rounds: list[dict[int, dict[str, Any]]]) -> None:
    digests = {built["digest"] for each in rounds for built in each.values()}
    first = next(iter(rounds[0]))
    same = "the same shards in all" if len(digests) == 1 else f"{len(digests)} DIFFERENT SHARDS"
    print(
        f"{kind}: {train['documents']:,} rows, {train['bytes'] / 2**20:.0f} MiB; {rounds[0][first]['encoder']}; {same}"
    )
    for n in rounds[0]:
        seconds = median(each[n]["seconds"] for each in rounds)
        ratios = [each[first]["seconds"] / each[n]["seconds"] for each in rounds]
        peak = max(each[n]["peak_mib"] for each in rounds)
        print(
            f"  {n} process{'es' if n > 1 else '  '} {seconds:7.2f} s {train['bytes'] / seconds / 1e6:7.2f} MB/s, "
            f"{median(ratios):.2f} times the first ({min(ratios):.2f} to {max(ratios):.2f}), {peak:,.0f} MiB at most"
        )


if __name__ == "__main__":
    main()
