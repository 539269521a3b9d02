"""Sharding that is killed, or runs out of disk or of memory: finished parts stay, and the end is the same."""

import errno
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kajiya.config.schema import DataConfig, SourceConfig
from kajiya.data import parts
from kajiya.data.corpus import build_corpus
from kajiya.data.documents import DocumentWriter, open_documents
from kajiya.data.encoding import RowsEncoder
from kajiya.data.examples import Example, Segment
from kajiya.data.memory import FAST, PLAIN, has_room, portions_within
from kajiya.data.progress import Progress, silent
from kajiya.data.shards import Rendering, build_shards, open_split
from kajiya.errors import DataError, StoreError
from kajiya.run.holdings import collect_garbage
from kajiya.run.store import Artifact, Store, open_artifact
from kajiya.run.usage import peak_memory

KILLED = """
import os, signal, sys
from pathlib import Path
from kajiya.config.schema import DataConfig
from kajiya.data import parts
from kajiya.data.progress import Progress, silent
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
corpus, tokenizer, store = open_artifact(Path(sys.argv[1])), open_artifact(Path(sys.argv[2])), Store(Path(sys.argv[3]))
"""
"""Behind so many parts the build that follows is killed."""
KILLED_TEXT = f"{KILLED}build_shards(DataConfig(row_tokens=64, shard_bytes=30_011), corpus, tokenizer, store)"
KILLED_ROWS = f"""{KILLED}
from tests.data.test_parts import WEIGHED
config = DataConfig(row_tokens=64, shard_bytes=1024, on_unreadable=sys.argv[5])
build_shards(config, corpus, tokenizer, store, rendering=WEIGHED)
"""


def part_folders(store: Store) -> list[Path]:
    return list(store.root.glob("artifacts/shards/.*.parts"))


def test_killed_between_parts_it_goes_on_and_ends_the_same(small, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    kept: dict[str, tuple[int, int]] = {}
    for attempt in (3, 4):
        arguments = [str(small.corpus.path), str(small.tokenizer.path), str(store.root), str(attempt)]
        killed = subprocess.run(
            [sys.executable, "-c", KILLED_TEXT, *arguments], capture_output=True, text=True, check=False
        )
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


def test_what_a_killed_tokenizing_left_is_collected(small, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    arguments = [str(small.corpus.path), str(small.tokenizer.path), str(store.root), "3"]
    killed = subprocess.run([sys.executable, "-c", KILLED_TEXT, *arguments], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    stage = store.root / "artifacts" / "shards"
    left = {path.name.rpartition(".")[2] for path in stage.iterdir()}
    assert {"lock", "parts"} < left
    n_bytes = sum(path.stat().st_size for path in stage.rglob("*") if path.is_file())
    garbage = collect_garbage(store, dry_run=False)
    assert (len(garbage.unfinished), garbage.unfinished_bytes) == (len(left), n_bytes)
    assert n_bytes > 10_000
    assert list(stage.iterdir()) == []
    shards, _ = build_shards(small.config, small.corpus, small.tokenizer, store)
    assert shards.digest == small.shards.digest


def render_weighed(rows: Iterable[tuple[str, str]]) -> Iterator[Example | str]:
    """A prompt of weight 0 and an answer of weights that differ from row to row, with a label; every fifteenth is refused."""
    for name, text in rows:
        row = json.loads(text)
        number = int(row["prompt"].split()[-1])
        ids = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)
        weights = np.where(np.arange(len(ids)) < 9, 0.0, 0.5 + number % 7 / 4).astype(np.float32)
        refused = f"{name}: no answer"
        yield refused if number % 15 == 3 else Example((Segment(ids, weights),), label=number % 3)


WEIGHED = Rendering(lambda: render_weighed, 1, {"format": "weighed"}, ("kajiya.data.examples",))


def test_killed_while_rendered_rows_are_written_it_ends_the_same_and_keeps_no_part_for_another_setting(
    small, tmp_path: Path
) -> None:
    rows = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(150)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig("jsonl", {"files": str(tmp_path / "rows.jsonl")})
    config = DataConfig(source=source, heldout_every=4, row_tokens=64, shard_bytes=1024, on_unreadable="drop")
    store = Store(tmp_path / "store")
    corpus, _ = build_corpus(config, store)
    arguments = [str(corpus.path), str(small.tokenizer.path), str(store.root), "3", "drop"]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_ROWS, *arguments], capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (folder,) = part_folders(store)
    assert len(list(folder.glob("*.json"))) == 3
    assert len(list(folder.glob("*.weights"))) == 3
    with pytest.raises(DataError, match="no answer"):
        build_shards(replace(config, on_unreadable="error"), corpus, small.tokenizer, store, rendering=WEIGHED)
    shards, _ = build_shards(config, corpus, small.tokenizer, store, rendering=WEIGHED)
    whole, _ = build_shards(config, corpus, small.tokenizer, Store(tmp_path / "other"), rendering=WEIGHED)
    assert shards.digest == whole.digest
    assert shards.facts["train"]["dropped"]["documents"] + shards.facts["heldout"]["dropped"]["documents"] == 10
    split = open_split(shards.path, "train")
    assert split.weighs
    assert len(split.files) > 3
    assert set(split.labels.tolist()) == {0, 1, 2}


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


def test_two_that_tokenize_the_same_into_one_store_take_turns(
    small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, told, said = threading.Event(), threading.Event(), []
    original = parts._encoded

    def slow(*arguments):
        if not begun.is_set():
            begun.set()
            told.wait(20)
        yield from original(*arguments)

    def hear(kind: str, text: str) -> None:
        said.append(text)
        told.set()

    monkeypatch.setattr(parts, "_encoded", slow)
    arguments = small.config, small.corpus, small.tokenizer, Store(tmp_path).heard_by(hear)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(build_shards, *arguments)
        assert begun.wait(60)
        second = pool.submit(build_shards, *arguments)
        (made, is_old), (found, is_reused) = first.result(), second.result()
    assert (is_old, is_reused, len(said)) == (False, True, 1)
    assert made.digest == found.digest == small.shards.digest


def test_the_lengths_of_a_part_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(handle, array) -> None:
        handle.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        parts._save_synced(tmp_path / "train-000000000.lengths.npy", np.zeros(3))
    assert not list(tmp_path.iterdir())


def test_the_table_of_weights_does_not_depend_on_how_the_rows_are_cut_for_the_work() -> None:
    weights = np.array([0, 1, 1, 0.5, 0, 2, 0.25], dtype=np.float32)
    whole: dict[float, int] = {}
    codes = parts._codes(weights, whole, str).tolist()
    for cut in range(1, len(weights)):
        table: dict[float, int] = {}
        assert [code for each in np.split(weights, [cut]) for code in parts._codes(each, table, str).tolist()] == codes
        assert list(table.items()) == list(whole.items())


@pytest.mark.parametrize("segments", [1, 2])
def test_the_row_with_one_weight_too_many_is_named(tmp_path: Path, segments: int) -> None:
    with DocumentWriter(tmp_path, "train") as writer:
        for number in range(400):
            writer.add(f"rows.jsonl:{number + 1}", b"{}")
        documents = writer.finish()

    def render(rows: Iterable[tuple[str, str]]) -> Iterator[Example | str]:
        for name, _ in rows:
            number = int(name.split(":")[1])
            weights = np.array([0, 1 + number / 1024, 0], dtype=np.float32)
            yield f"{name}: no answer" if number == 100 else Example((Segment(np.arange(3), weights),) * segments)

    encode = RowsEncoder(documents, render, np.dtype("<u2"), segments, drops=True)
    words = r"rows\.jsonl:257: has a message of weight=1\.25098; messages before it have 256 other weights, .*\nRound"
    with pytest.raises(DataError, match=words):
        parts.write_parts(tmp_path / "parts", documents, encode, parts.Portions(10**6, 64, 1), Progress(silent, "", ""))


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


def test_an_encoder_that_keeps_what_it_has_seen_needs_room_for_it() -> None:
    used = -(-peak_memory() // 2**20)
    kept = FAST.kept_bytes // 2**20
    assert not has_room(used + kept, FAST)
    assert has_room(used + kept + 20, FAST)
    assert has_room(used + 20, PLAIN)


def test_a_process_that_was_larger_before_prepares_within_the_cap_of_what_it_adds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DocumentWriter(tmp_path, "train") as writer:
        writer.add("a.txt", b"a" * 100_000)
        documents = writer.finish()
    monkeypatch.setattr("kajiya.data.memory.peak_memory", lambda: 5000 * 2**20)
    assert portions_within(4096, [documents], PLAIN, 10**6).chunk_bytes == 4 * 2**20
    with pytest.raises(DataError, match=r"data\.memory_mib=16"):
        portions_within(16, [documents], PLAIN, 10**6)


MEASURED = """
import sys
from pathlib import Path
from kajiya.config.schema import DataConfig
from kajiya.data.progress import Progress, silent
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
    # Beside what tests before it have taken.
    config = replace(small.config, memory_mib=8192)
    shards, _ = build_shards(config, corpus, small.tokenizer, Store(tmp_path / "store"))
    once = len(line) // 4_400_000
    assert shards.facts["train"]["bytes"] == len(line) == 4_400_000 * once > 100_000_000
    assert shards.facts["train"]["tokens"] > 4_400_000
