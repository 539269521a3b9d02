"""Hashes of large files: remembered only for as long as nothing speaks against it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kajiya.data.origin import files_digest
from kajiya.errors import StoreError
from kajiya.run import hashing
from kajiya.run.files import check_files, hash_folder
from kajiya.run.hashing import hash_file, remembered_hash
from kajiya.run.holdings import verify_store
from kajiya.run.store import Store, produce

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
"""FIPS 180-2, appendix B.1"""


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read; files of 3 bytes are large, and notes lie in `cache`."""
    names: list[str] = []

    def counted(path: Path) -> str:
        names.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(hashing, "_LARGE_BYTES", 3)
    monkeypatch.setattr(hashing, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(hashing, "hash_file", counted)
    return names


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is a minute ahead: what the test has written did not change just now."""
    now = time.time_ns
    monkeypatch.setattr("kajiya.run.hashing.time.time_ns", lambda: now() + 60 * 10**9)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large"
    path.write_bytes(b"abc")
    return path


def rewrite(path: Path, content: bytes) -> None:
    """Write until the file bears another time of change: some systems tell it to a hundredth of a second only."""
    before, deadline = path.stat().st_ctime_ns, time.monotonic() + 10
    while path.stat().st_ctime_ns == before:
        assert time.monotonic() < deadline, "the file system keeps no time of change"
        path.write_bytes(content)


def notes(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "hashes").glob("*/*"))


def test_hash_is_sha256(large: Path) -> None:
    assert hash_file(large) == ABC


def test_a_large_file_is_read_once(large: Path, read: list[str], later: None) -> None:
    assert [remembered_hash(large) for _ in range(3)] == [ABC] * 3
    assert read == ["large"]
    small = large.with_name("small")
    small.write_bytes(b"ab")
    assert remembered_hash(small) == remembered_hash(small)
    assert read == ["large", "small", "small"]


def test_another_process_remembers_it_too(large: Path, read: list[str], later: None) -> None:
    remembered_hash(large)
    code = f"""
from pathlib import Path
from kajiya.run import hashing
hashing._LARGE_BYTES = 3
hashing.cache_folder = lambda: Path({str(large.parent / "cache")!r})
hashing.hash_file = None
print(hashing.remembered_hash(Path({large.name!r})))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=large.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ABC


def test_changed_bytes_are_seen(large: Path, read: list[str], later: None) -> None:
    remembered_hash(large)
    times = large.stat()
    rewrite(large, b"abd")
    # The time that a person can set says nothing; the other one is the system's.
    os.utime(large, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert remembered_hash(large) == hash_file(large) != ABC
    other = large.with_name("other")
    other.write_bytes(b"abe")
    other.replace(large)
    assert remembered_hash(large) == hash_file(large)
    assert read == ["large"] * 3


def test_a_file_that_changed_just_now_is_not_remembered(
    large: Path, read: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    just_now = large.stat().st_ctime_ns + 10**9
    monkeypatch.setattr("kajiya.run.hashing.time.time_ns", lambda: just_now)
    assert remembered_hash(large) == remembered_hash(large) == ABC
    assert read == ["large"] * 2
    assert notes(tmp_path) == []


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    large: Path, later: None, read: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def grown(path: Path) -> str:
        found = hash_file(path)
        with path.open("ab") as handle:
            handle.write(b"d")
        return found

    monkeypatch.setattr(hashing, "hash_file", grown)
    assert remembered_hash(large) == ABC
    assert notes(tmp_path) == []


@pytest.mark.parametrize(
    "harm",
    [
        lambda note: note.write_text("{"),
        lambda note: note.write_bytes(b"\xff\xfe"),
        lambda note: note.write_text("[1]"),
        lambda note: note.write_text(json.dumps(json.loads(note.read_text()) | {"sha256": None})),
        lambda note: note.write_text(json.dumps(json.loads(note.read_text()) | {"sha256": "ab"})),
        lambda note: note.write_text(json.dumps(json.loads(note.read_text()) | {"inode": 1})),
        lambda note: note.write_text(json.dumps(json.loads(note.read_text()) | {"path": "/elsewhere"})),
        lambda note: (note.unlink(), note.mkdir()),
    ],
)
def test_a_broken_note_is_as_none(
    harm: Callable[[Path], object], large: Path, read: list[str], later: None, tmp_path: Path
) -> None:
    remembered_hash(large)
    (note,) = notes(tmp_path)
    harm(note)
    assert remembered_hash(large) == ABC
    assert read == ["large"] * 2


def test_where_no_note_can_be_written_the_file_is_read(
    large: Path, read: list[str], later: None, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert [remembered_hash(large) for _ in range(2)] == [ABC] * 2
    assert read == ["large"] * 2


def test_old_notes_go_when_there_are_many(
    large: Path, read: list[str], later: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "_MAX_REMEMBERED", 4)
    remembered_hash(large)
    (note,) = notes(tmp_path)
    for number in range(4):
        old = note.with_name(f"{number}.json")
        old.write_text("{}")
        os.utime(old, (number, number))
    rewrite(large, b"abd")
    remembered_hash(large)
    assert sorted(path.name for path in notes(tmp_path)) == sorted(["2.json", "3.json", note.name])
    remembered_hash(large)
    assert read == ["large"] * 2


def test_artifacts_and_sources_are_read_once_and_verified_whole(
    read: list[str], later: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")

    def make(folder: Path) -> dict[str, str]:
        (folder / "text").write_bytes(b"abc")
        return {}

    artifact, _ = produce(store, "corpus", code="c", config={}, parents={}, make=make)
    for _ in range(3):
        assert produce(store, "corpus", code="c", config={}, parents={}, make=make) == (artifact, True)
    assert read == ["text"]
    file = artifact.path / "text"
    assert files_digest([("a", file)]) == files_digest([("a", file)])
    assert read == ["text"]

    # As a disk that loses bits, which tells nobody.
    (note,) = notes(tmp_path)
    file.write_bytes(b"abd")
    facts = hashing._facts(file, file.stat())
    note.write_text(json.dumps(facts | {"sha256": ABC}))
    assert store.find("corpus", artifact.key) == artifact
    (verdict,) = verify_store(store)
    assert verdict.problem is not None
    assert "corrupt" in verdict.problem
    files = hash_folder(artifact.path) | {"text": {"bytes": 3, "sha256": ABC}}
    check_files(artifact.path, files)
    with pytest.raises(StoreError, match="corrupt"):
        check_files(artifact.path, files, reads_all=True)
