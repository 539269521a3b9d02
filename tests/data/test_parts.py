"""Sharding that is killed, or runs out of disk or of memory: finished parts stay, and the end is the same."""

import errno
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kajiya.data import parts
from kajiya.data.documents import DocumentWriter, open_documents
from kajiya.data.memory import FAST, PLAIN, portions_within
from kajiya.data.shards import build_shards
from kajiya.errors import DataError, StoreError
from kajiya.run.store import Artifact, Store, open_artifact
from kajiya.run.usage import peak_memory

KILLED = """
import os, signal, sys
from pathlib import Path
from kajiya.config.schema import DataConfig
from kajiya.data import parts
from kajiya.data.shards import build_shards
from kajiya.run.store import Store, open_artifact

made = []
whole = parts.write_json

def count(path, content):
    whole(path, content)
    made.append(path)
    if len(made) == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)

parts.write_json = count
corpus, tokenizer = (open_artifact(Path(each)) for each in sys.argv[1:3])
build_shards(DataConfig(row_tokens=64, shard_bytes=30_011), corpus, tokenizer, Store(Path(sys.argv[3])))
"""


def part_folders(store: Store) -> list[Path]:
    return list(store.root.glob("artifacts/shards/.*.parts"))


def test_killed_between_parts_it_goes_on_and_ends_the_same(small, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    kept: dict[str, tuple[int, int]] = {}
    for attempt in (3, 4):
        arguments = [str(small.corpus.path), str(small.tokenizer.path), str(store.root), str(attempt)]
        killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, check=False)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert store.artifacts() == []
        (folder,) = part_folders(store)
        finished = {path.with_suffix(".bin").name: path for path in folder.glob("*.json")}
        stamps = {name: ((folder / name).stat().st_ino, (folder / name).stat().st_mtime_ns) for name in finished}
        assert kept.items() <= stamps.items(), "a finished part was made again"
        kept = stamps
    assert len(kept) == 7
    shards, reused = build_shards(replace(small.config), small.corpus, small.tokenizer, store)
    assert not reused
    assert shards.digest == small.shards.digest
    assert {name: (shards.path / name).stat().st_ino for name in kept} == {name: ino for name, (ino, _) in kept.items()}
    assert part_folders(store) == []
    open_artifact(shards.path, verify=True)


def test_a_full_disk_is_said_and_loses_no_finished_part(small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    codes = iter([errno.ENOSPC])
    original = parts._save_synced
    calls = []

    def full(path: Path, array: np.ndarray) -> None:
        calls.append(path)
        if len(calls) == 4:
            raise OSError(next(codes), "No space left on device")
        original(path, array)

    monkeypatch.setattr(parts, "_save_synced", full)
    with pytest.raises(StoreError, match=r"the disk is full\.\nFree some space.*already tokenized are kept"):
        build_shards(small.config, small.corpus, small.tokenizer, store)
    (folder,) = part_folders(store)
    assert len(list(folder.glob("*.json"))) == 3
    assert not [path for path in folder.iterdir() if path.suffix not in (".bin", ".json", ".npy")]
    shards, _ = build_shards(small.config, small.corpus, small.tokenizer, store)
    assert shards.digest == small.shards.digest
    assert calls.count(calls[0]) == 1


def test_a_document_too_large_for_the_cap_is_refused(tmp_path: Path) -> None:
    with DocumentWriter(tmp_path, "train") as writer:
        writer.add("small.txt", b"a")
        writer.add("large.txt", b"a" * 4_000_000)
        documents = writer.finish()
    room = peak_memory() // 2**20 + 200
    with pytest.raises(DataError, match=rf"large\.txt: 3\.8 MiB of text, .*data\.memory_mib={room}\.\nRaise data"):
        portions_within(room, [documents], PLAIN, 10**6)
    portions = portions_within(room, [documents], FAST, 10**6)
    assert 2**16 <= portions.chunk_bytes * FAST.bytes_per_byte * FAST.n_ahead <= 201 * 2**20


MEASURED = """
import sys
from pathlib import Path
from kajiya.config.schema import DataConfig
from kajiya.data.shards import build_shards
from kajiya.run.store import Artifact, Store, open_artifact
from kajiya.run.usage import peak_memory

cap, corpus, tokenizer, store = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
artifact = Artifact(corpus, "corpus", "k", "d", {})
shards, _ = build_shards(DataConfig(memory_mib=cap), artifact, open_artifact(tokenizer), Store(store))
print(shards.facts["peak_memory_bytes"])
"""


@pytest.mark.slow
def test_tokenizing_a_corpus_four_times_larger_than_the_cap_stays_under_it(small, tmp_path: Path) -> None:
    cap_mib = 192
    texts = [text.encode() for text in open_documents(small.corpus.path, "train").texts()]
    folder = tmp_path / "corpus"
    folder.mkdir()
    with DocumentWriter(folder, "heldout") as heldout:
        heldout.add("held", texts[0])
        heldout.finish()
    with DocumentWriter(folder, "train") as train:
        n_bytes = number = 0
        while n_bytes < 4 * cap_mib * 2**20:
            text = texts[number % len(texts)]
            train.add(f"{number}.py", text)
            n_bytes, number = n_bytes + len(text), number + 1
        train.finish()
    arguments = [str(cap_mib), str(folder), str(small.tokenizer.path), str(tmp_path / "store")]
    done = subprocess.run([sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < cap_mib * 2**20


@pytest.mark.slow
def test_a_line_of_a_hundred_megabytes_is_tokenized_whole(small, tmp_path: Path) -> None:
    line = b"x = 'one line' + y * 2; " * 4_400_000
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split, raw in (("train", line), ("heldout", b"z = 1\n")):
        with DocumentWriter(folder, split) as writer:
            writer.add(split, raw)
            writer.finish()
    corpus = Artifact(folder, "corpus", "k", "d", {})
    shards, _ = build_shards(small.config, corpus, small.tokenizer, Store(tmp_path / "store"))
    once = len(line) // 4_400_000
    assert shards.facts["train"]["bytes"] == len(line) == 4_400_000 * once > 100_000_000
    assert shards.facts["train"]["tokens"] > 4_400_000
