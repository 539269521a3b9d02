"""Bad input, from the file to the message: it names file, line and remedy, and leaves nothing half-made."""

import errno
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kajiya.config.schema import DataConfig, SourceConfig
from kajiya.data import sources
from kajiya.data.corpus import build_corpus
from kajiya.data.documents import DocumentWriter
from kajiya.data.ledger import data_ledger, require_kept
from kajiya.errors import ConfigError, DataError, KajiyaError, StoreError
from kajiya.run.store import Store

GOOD = [json.dumps({"text": f"row {number}"}) for number in range(40)]


def lines(path: Path, *more: str | bytes, at: int = 20) -> DataConfig:
    """A jsonl file of good lines with these in its middle, beginning on line `at` + 1."""
    rows = [each.encode() if isinstance(each, str) else each for each in (*GOOD[:at], *more, *GOOD[at:])]
    path.write_bytes(b"\n".join(rows) + b"\n")
    return DataConfig(source=SourceConfig("jsonl", {"files": str(path)}), heldout_every=5)


def refusal(config: DataConfig, root: Path) -> str:
    store = Store(root / "store")
    with pytest.raises(KajiyaError) as caught:
        build_corpus(config, store)
    assert store.artifacts() == []
    assert not [path for path in store.root.rglob("*") if path.is_file()]
    return str(caught.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "cut off', "is no JSON: Unterminated string"),
        ('["a", "list"]', "is a JSON list"),
        (b'{"text": "caf\xe9"}', "is not utf-8: byte 0xe9"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str | bytes, words: str) -> None:
    said = refusal(lines(tmp_path / "rows.jsonl", line), tmp_path)
    assert said.startswith("rows.jsonl:21: ")
    assert words in said
    assert "\nMend or remove it, or set data.on_unreadable=drop" in said


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    said = refusal(lines(tmp_path / "rows.jsonl", '{"question": "?"}'), tmp_path)
    assert said.startswith("rows.jsonl:21: ")
    assert "question" in said
    assert "text" in said


def test_broken_rows_are_counted_when_they_may_be_dropped(tmp_path: Path) -> None:
    config = lines(tmp_path / "rows.jsonl", "{", '{"text": null}', b"\xff")
    config = DataConfig(source=config.source, heldout_every=5, on_unreadable="drop")
    corpus, _ = build_corpus(config, Store(tmp_path / "store"))
    ledger = corpus.facts["ledger"]
    assert ledger["entered"]["documents"] == len(GOOD) + 3
    assert ledger["train"]["documents"] + ledger["heldout"]["documents"] == len(GOOD)
    assert ledger["dropped"]["unreadable"]["documents"] == 3
    assert [name.partition(": ")[0] for name in ledger["dropped"]["unreadable"]["examples"]] == [
        f"rows.jsonl:{line}" for line in (21, 22, 23)
    ]


def test_a_name_that_no_file_can_hold_is_counted_like_any(tmp_path: Path) -> None:
    config = lines(tmp_path / "rows.jsonl", '{"\\ud800": 1}', '{"text": "a", "\\udfff": 1}')
    corpus, _ = build_corpus(replace(config, on_unreadable="drop"), Store(tmp_path / "store"))
    dropped = corpus.facts["ledger"]["dropped"]["unreadable"]
    assert dropped["examples"] == ["rows.jsonl:21: has no column 'text' (it has: \\ud800)"]
    said = refusal(config, tmp_path / "other")
    assert said.startswith("rows.jsonl:21: has no column 'text' (it has: \\ud800)\n")
    (tmp_path / "rows.jsonl").write_text('{"\\ud800": 1}\n')
    with pytest.raises(ConfigError, match=r"columns \\ud800 make no kind of rows .*\n.*data.columns.text=\\ud800"):
        build_corpus(config, Store(tmp_path / "other"))


def test_a_file_that_vanishes_before_it_is_read(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_text(f"text {number}")
    config = DataConfig(source=SourceConfig("text", {"files": f"{tmp_path}/*.txt"}), heldout_every=5)

    def vanish(kind: str, **fields: Any) -> None:
        (tmp_path / "39.txt").unlink(missing_ok=True)

    store = Store(tmp_path / "store")
    with pytest.raises(DataError, match=r"39.txt: vanished: it was listed and is no longer there\nMend or remove it"):
        build_corpus(config, store, vanish)
    assert store.artifacts() == []


def test_a_full_disk_is_said_and_leaves_what_was_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "store")
    finished, _ = build_corpus(lines(tmp_path / "rows.jsonl"), store)
    add, n_added = DocumentWriter.add, 0

    def full(self: DocumentWriter, name: str, raw: bytes) -> None:
        nonlocal n_added
        n_added += 1
        if n_added == 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, name, raw)

    changed = lines(tmp_path / "rows.jsonl", json.dumps({"text": "one more"}))
    monkeypatch.setattr(DocumentWriter, "add", full)
    with pytest.raises(
        StoreError, match=r"corpus: the disk of .* is full \(No space left on device; \d+ MiB free\).*\nFree"
    ):
        build_corpus(changed, store)
    monkeypatch.undo()
    assert store.artifacts() == [finished]
    assert not list(store.root.rglob(".*"))
    assert build_corpus(changed, store)[0].facts["ledger"]["entered"]["documents"] == len(GOOD) + 1


@pytest.mark.slow
def test_a_really_full_disk(tmp_path: Path) -> None:
    """A file system of 256 KiB, where this process may make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small file system here")
    try:
        config = lines(tmp_path / "rows.jsonl", json.dumps({"text": "long " * 100_000}))
        store = Store(disk / "store")
        with pytest.raises(StoreError, match=r"corpus: the disk of .* is full"):
            build_corpus(config, store)
        assert not [path for path in disk.rglob("*") if path.is_file()]
        assert build_corpus(lines(tmp_path / "rows.jsonl"), store)[0].facts["ledger"]["train"]["documents"] > 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_quote_that_is_never_closed_loses_all_the_bytes_behind_it(tmp_path: Path) -> None:
    rows = [f"{number},row {number}" for number in range(1000)]
    rows[100] = '100,"never closed'
    (tmp_path / "rows.csv").write_text("\n".join(["id,text", *rows]))
    source = SourceConfig("csv", {"files": str(tmp_path / "rows.csv")})
    corpus, _ = build_corpus(
        DataConfig(source=source, heldout_every=5, on_unreadable="drop"), Store(tmp_path / "store")
    )
    with pytest.raises(DataError, match=r"9\d\.\d+% of the bytes are lost .*the rest of the file with it"):
        require_kept(data_ledger(corpus.facts), 0.01)


def test_a_file_that_vanishes_while_it_is_read_stops_the_work_in_any_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        (tmp_path / f"{number:02d}.txt").write_text(f"text {number}\n")
    read = sources._read_text

    def read_and_remove(name: str, path: Path, encoding: str) -> Any:
        if name == "05.txt":
            (tmp_path / "10.txt").unlink(missing_ok=True)
        return read(name, path, encoding)

    monkeypatch.setattr(sources, "_read_text", read_and_remove)
    source = SourceConfig("text", {"files": f"{tmp_path}/*.txt"})
    with pytest.raises(DataError, match=r"data\.source: its content changed while it was read"):
        build_corpus(DataConfig(source=source, heldout_every=5, on_unreadable="drop"), Store(tmp_path / "store"))


READ = """
import sys
from kajiya.config.options import LinesSource
from kajiya.data.sources import jsonl
from kajiya.run.usage import peak_memory

before = peak_memory()
for found in jsonl(LinesSource(sys.argv[1], max_row_bytes=int(sys.argv[2]))):
    print(type(found).__name__, found.n_bytes)
print((peak_memory() - before) // 2**20)
"""


@pytest.mark.slow
def test_a_line_of_a_hundred_megabytes_is_read_whole_or_passed_over_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("w") as handle:
        handle.write('{"text": "before"}\n{"text": "' + "x" * 100_000_000 + '"}\n{"text": "behind"}\n')

    def read(limit: int) -> tuple[list[list[str]], int]:
        command = [sys.executable, "-c", READ, str(path), str(limit)]
        *rows, grown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        return [row.split() for row in rows], int(grown)

    rows, grown = read(2**28)
    assert [kind for kind, _ in rows] == ["Row"] * 3
    assert grown < 500
    rows, grown = read(2**20)
    assert [kind for kind, _ in rows] == ["Row", "Unreadable", "Row"]
    assert int(rows[1][1]) > 100_000_000
    assert grown < 20
