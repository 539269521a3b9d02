"""Memory of preparing a corpus four times as large as `data.memory_mib`, from the source to packed rows.

The text is the standard library again and again, a third of its words renamed each time, so that hardly a line comes twice and
the distinct words grow with the text; once as files, once as short rows of JSON. Each is prepared in a process of its own,
whose highest resident memory is printed stage by stage.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kajiya.config.options import StdlibSource
from kajiya.data.sources import stdlib_files

PREPARED = """
import json, sys
from functools import partial
from pathlib import Path
from kajiya.config.schema import DataConfig, SourceConfig, TokenizerConfig
from kajiya.data.corpus import build_corpus
from kajiya.data.pack import build_packing
from kajiya.data.render import open_renderer
from kajiya.data.shards import Rendering, build_shards
from kajiya.data.tokenizer import build_tokenizer
from kajiya.run.store import Store
from kajiya.run.usage import peak_memory

name, files, cap, store = sys.argv[1], sys.argv[2], int(sys.argv[3]), Store(Path(sys.argv[4]))
config = DataConfig(source=SourceConfig(name, {"files": files}), memory_mib=cap, row_tokens=2048)
peaks = {"imports": peak_memory() / 2**20}
corpus, _ = build_corpus(config, store)
peaks["corpus"] = peak_memory() / 2**20
tokenizer, _ = build_tokenizer(TokenizerConfig(vocab_size=2048), corpus, store, render=config.render, memory_mib=cap)
peaks["tokenizer"] = peak_memory() / 2**20
form = corpus.facts["format"]
rendering = None
if form != "text":
    rendering = Rendering(partial(open_renderer, tokenizer.path, config.render, form), 1, form, ("kajiya.data.render",))
shards, _ = build_shards(config, corpus, tokenizer, store, rendering=rendering)
peaks["shards"] = shards.facts["peak_memory_bytes"] / 2**20
packing, _ = build_packing(config, shards, store)
peaks["packing"] = peak_memory() / 2**20
print(json.dumps({
    "peaks": peaks, "bytes": corpus.facts["ledger"]["entered"]["bytes"], "documents": shards.facts["train"]["documents"],
    "trained_on": tokenizer.facts["trained_on"], "fill": packing.facts["train"]["fill"], "has_torch": "torch" in sys.modules,
}))
"""

WORD = re.compile(r"\b[a-z]{5,}\b")


def ever_new_text(n_bytes: int) -> Iterator[str]:
    """The standard library again and again, words of a length that three divides renamed in each turn."""
    texts = [path.read_text(encoding="utf-8", errors="ignore") for _, path in stdlib_files(StdlibSource())]
    turn = 0
    while True:
        for text in texts:
            new = WORD.sub(lambda found, turn=turn: found[0] + (f"_{turn}" if len(found[0]) % 3 == 0 else ""), text)
            yield new
            n_bytes -= len(new.encode())
            if n_bytes <= 0:
                return
        turn += 1


def write_files(folder: Path, n_bytes: int) -> str:
    """One file a module; returns the glob."""
    for number, text in enumerate(ever_new_text(n_bytes)):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return str(folder / "*.txt")


def write_rows(folder: Path, n_bytes: int) -> str:
    """Prompts of 300 and answers of 1,200 characters; returns the file."""
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as handle:
        for text in ever_new_text(n_bytes):
            for start in range(0, len(text), 1500):
                prompt, answer = text[start : start + 300], text[start + 300 : start + 1500]
                if prompt.strip() and answer.strip():
                    handle.write(json.dumps({"prompt": prompt, "completion": answer}) + "\n")
    return str(folder / "rows.jsonl")


def prepare(source: str, files: str, cap_mib: int, store: Path) -> dict[str, Any]:
    """Prepare the files under the cap, in a process of its own."""
    arguments = [source, files, str(cap_mib), str(store)]
    done = subprocess.run([sys.executable, "-c", PREPARED, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def main() -> None:
    """Print the peaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cap-mib", type=int, default=256, help="data.memory_mib; the corpus is four times as large")
    parser.add_argument("--kinds", nargs="+", default=["text", "jsonl"], choices=["text", "jsonl"])
    given = parser.parse_args()
    for kind in given.kinds:
        with tempfile.TemporaryDirectory() as where:
            folder = Path(where) / "source"
            folder.mkdir()
            write = write_files if kind == "text" else write_rows
            files = write(folder, 4 * given.cap_mib * 2**20)
            facts = prepare(kind, files, given.cap_mib, Path(where) / "store")
        peaks = ", ".join(f"{stage} {peak:.0f}" for stage, peak in facts["peaks"].items())
        print(f"{kind}: {facts['bytes'] / 2**20:.0f} MiB in {facts['documents']:,} documents under {given.cap_mib} MiB")
        print(f"  highest memory so far, MiB: {peaks}; tokenizer trained on {facts['trained_on']}")


if __name__ == "__main__":
    main()
