"""Preparing corpora four times as large as the cap on memory, from the source to the packed rows, in a process of its own."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kajiya.config.options import StdlibSource
from kajiya.data.sources import stdlib_files

CAP_MIB = 128

PREPARED = """
import json, sys
from pathlib import Path
from kajiya.config.schema import DataConfig, SourceConfig, TokenizerConfig
from kajiya.data.corpus import build_corpus
from kajiya.data.pack import build_packing
from kajiya.data.render import Renderer
from kajiya.data.shards import Rendering, build_shards
from kajiya.data.tokenizer import build_tokenizer, load_tokenizer
from kajiya.run.store import Store
from kajiya.run.usage import peak_memory

name, files, cap, store = sys.argv[1], sys.argv[2], int(sys.argv[3]), Store(Path(sys.argv[4]))
config = DataConfig(source=SourceConfig(name, {"files": files}), memory_mib=cap)
peaks = {"imports": peak_memory() / 2**20}
corpus, _ = build_corpus(config, store)
peaks["corpus"] = peak_memory() / 2**20
tokenizer, _ = build_tokenizer(TokenizerConfig(vocab_size=2048), corpus, store, render=config.render, memory_mib=cap)
peaks["tokenizer"] = peak_memory() / 2**20
form = corpus.facts["format"]
rendering = None
if form != "text":
    rendering = Rendering(
        lambda: Renderer(load_tokenizer(tokenizer.path), config.render, form, None).render_many, 1, form, ("kajiya.data.render",)
    )
shards, _ = build_shards(config, corpus, tokenizer, store, rendering=rendering)
peaks["shards"] = peak_memory() / 2**20
packing, _ = build_packing(config, shards, store)
peaks["packing"] = peak_memory() / 2**20
print(json.dumps({
    "peaks": peaks, "bytes": corpus.facts["ledger"]["entered"]["bytes"], "documents": shards.facts["train"]["documents"],
    "trained_on": tokenizer.facts["trained_on"], "fill": packing.facts["train"]["fill"], "has_torch": "torch" in sys.modules,
}))
"""

WORD = re.compile(r"\b[a-z]{5,}\b")


def ever_new_text(n_bytes: int) -> Iterator[str]:
    """The standard library again and again, a third of its words renamed each time, so that no line need be the same."""
    texts = [path.read_text(encoding="utf-8", errors="ignore") for _, path in stdlib_files(StdlibSource())]
    turn = 0
    while True:
        for text in texts:
            new = WORD.sub(lambda found, turn=turn: found[0] + (f"_{turn}" if len(found[0]) % 3 == 0 else ""), text)  # type: ignore[misc]
            yield new
            n_bytes -= len(new.encode())
            if n_bytes <= 0:
                return
        turn += 1


def prepare(name: str, files: str, store: Path) -> dict[str, Any]:
    """Prepare the files under the cap; what came of it."""
    arguments = [name, files, str(CAP_MIB), str(store)]
    done = subprocess.run([sys.executable, "-c", PREPARED, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sys.stdout.write(done.stdout)
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


@pytest.mark.slow
def test_a_corpus_of_files_four_times_as_large_as_the_cap(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    for number, text in enumerate(ever_new_text(4 * CAP_MIB * 2**20)):
        (tmp_path / "files" / f"{number}.txt").write_text(text, encoding="utf-8")
    facts = prepare("text", str(tmp_path / "files" / "*.txt"), tmp_path / "store")
    assert facts["bytes"] >= 4 * CAP_MIB * 2**20
    assert facts["peaks"]["packing"] < CAP_MIB


@pytest.mark.slow
def test_a_corpus_of_short_rows_four_times_as_large_as_the_cap(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    with rows.open("w", encoding="utf-8") as handle:
        for text in ever_new_text(4 * CAP_MIB * 2**20):
            for start in range(0, len(text), 1500):
                handle.write(
                    json.dumps(
                        {"prompt": text[start : start + 300], "completion": text[start + 300 : start + 1500] or "."}
                    )
                    + "\n"
                )
    facts = prepare("jsonl", str(rows), tmp_path / "store")
    assert facts["bytes"] >= 3.9 * CAP_MIB * 2**20
    assert facts["peaks"]["packing"] < CAP_MIB
