"""The store: a key for all that made an artifact, folders that are whole or absent, corruption that is seen."""

import errno
import fcntl
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kajiya.config.schema import OptimConfig
from kajiya.errors import StoreError
from kajiya.run.store import Artifact, Store, artifact_key, default_store, open_artifact, produce, remove_artifact


def write(folder: Path) -> dict[str, Any]:
    (folder / "data.bin").write_bytes(b"0123456789")
    return {"n": 10}


def make(store: Store, stage: str = "shards", code: str = "c1", config: Any = None, **parents: Artifact) -> Artifact:
    artifact, _ = produce(store, stage, code=code, config=config or {}, parents=parents, make=write)
    return artifact


def test_the_same_is_made_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    calls = []

    def count(folder: Path) -> dict[str, Any]:
        calls.append(folder)
        return write(folder)

    results = [produce(store, "shards", code="c", config={"a": 1}, parents={}, make=count) for _ in range(2)]
    assert [reused for _, reused in results] == [False, True]
    assert results[0][0] == results[1][0]
    assert len(calls) == 1
    assert results[0][0].facts == {"n": 10}
    assert store.artifacts() == [results[0][0]]


def test_the_key_depends_on_stage_code_config_and_parents(tmp_path: Path) -> None:
    store = Store(tmp_path)
    parent = make(store, "corpus")
    other = Artifact(parent.path, parent.stage, parent.key, "f" * 64, {})
    keys = [
        artifact_key("shards", "c1", OptimConfig(), {"corpus": parent}),
        artifact_key("other", "c1", OptimConfig(), {"corpus": parent}),
        artifact_key("shards", "c2", OptimConfig(), {"corpus": parent}),
        artifact_key("shards", "c1", OptimConfig(lr=1.0), {"corpus": parent}),
        artifact_key("shards", "c1", OptimConfig(), {"corpus": other}),
        artifact_key("shards", "c1", OptimConfig(), {"tokenizer": parent}),
        artifact_key("shards", "c1", OptimConfig(), {}),
    ]
    assert len(set(keys)) == len(keys)
    assert artifact_key("shards", "c1", OptimConfig(), {"corpus": parent}) == keys[0]


def test_the_key_does_not_depend_on_where_a_parent_lies(tmp_path: Path) -> None:
    parent = make(Store(tmp_path / "a"), "corpus")
    moved = make(Store(tmp_path / "b"), "corpus")
    assert artifact_key("s", "c", {}, {"p": parent}) == artifact_key("s", "c", {}, {"p": moved})


def test_a_failed_making_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def fail(folder: Path) -> dict[str, Any]:
        write(folder)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        produce(store, "shards", code="c", config={}, parents={}, make=fail)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert store.artifacts() == []


def test_a_killed_making_is_not_seen_and_is_made_again(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from kajiya.run.store import Store, produce
def make(folder):
    (folder / "data.bin").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
produce(Store(Path({str(tmp_path)!r})), "shards", code="c1", config={{}}, parents={{}}, make=make)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.rglob("data.bin")] == ["data.bin"]  # it lies there, under a hidden name
    store = Store(tmp_path)
    assert store.artifacts() == []
    artifact = make(store)
    assert (artifact.path / "data.bin").read_bytes() == b"0123456789"
    assert store.artifacts() == [artifact]


def test_a_changed_file_is_seen_when_it_is_found_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    artifact = make(store)
    (artifact.path / "data.bin").write_bytes(b"0123456780")
    with pytest.raises(StoreError, match=r"data\.bin: .*corrupt"):
        store.find("shards", artifact.key)
    assert open_artifact(artifact.path, verify=False).digest == artifact.digest


def test_a_removed_artifact_is_gone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    artifact = make(store)
    remove_artifact(artifact)
    assert store.find("shards", artifact.key) is None
    assert not artifact.path.exists()


def test_a_folder_that_is_no_artifact_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"manifest\.json: no such file"):
        open_artifact(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(StoreError, match="not the manifest of an artifact"):
        open_artifact(tmp_path)


def test_the_store_is_where_it_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KAJIYA_STORE", raising=False)
    assert default_store().root == Path(os.getcwd()) / "kajiya-store"
    monkeypatch.setenv("KAJIYA_STORE", str(tmp_path / "by-variable"))
    assert default_store().root == tmp_path / "by-variable"
    assert default_store("given").root == tmp_path / "given"


# ---------------------------------------------------------------- two processes at once


def holder(tmp_path: Path, ending: str) -> subprocess.Popen[bytes]:
    """A process that has begun to make the artifact of `make`, and goes on when the file `go` is there."""
    code = f"""
import time
from pathlib import Path
from kajiya.run.store import Store, produce
place = Path({str(tmp_path)!r})
def make(folder):
    (place / "begun").touch()
    until = time.monotonic() + 60
    while not (place / "go").exists() and time.monotonic() < until:
        time.sleep(0.01)
    (folder / "data.bin").write_bytes(b"of the first")
    {ending}
produce(Store(place / "store"), "shards", code="c1", config={{}}, parents={{}}, make=make)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def second(tmp_path: Path, on_wait: Callable[[], object]) -> tuple[bytes, bool, list[str]]:
    """The same artifact wanted meanwhile: its content, whether it was reused, and what was said."""
    said = []

    def hear(kind: str, text: str) -> None:
        said.append(f"{kind}: {text}")
        on_wait()

    store = Store(tmp_path / "store").heard_by(hear)
    artifact, reused = produce(store, "shards", code="c1", config={}, parents={}, make=write)
    assert not list(store.root.rglob(".*"))
    return (artifact.path / "data.bin").read_bytes(), reused, said


def test_who_wants_what_another_process_makes_waits_and_reuses_it(tmp_path: Path) -> None:
    first = holder(tmp_path, "return {}")
    content, reused, said = second(tmp_path, (tmp_path / "go").touch)
    assert (content, reused) == (b"of the first", True)
    assert said == [
        f"note: shards: waiting for process {first.pid} on {platform.node()}, which makes the same right now"
    ]
    assert first.wait(60) == 0


def test_a_killed_maker_lets_the_one_that_waits_make_it(tmp_path: Path) -> None:
    first = holder(tmp_path, "return {}")

    def kill() -> None:
        first.kill()
        first.wait()
        for left in (tmp_path / "store").rglob(f".*.{first.pid}"):  # what `kajiya store gc` deletes
            shutil.rmtree(left)

    content, reused, said = second(tmp_path, kill)
    assert (content, reused, len(said)) == (b"0123456789", False, 1)


def test_a_failed_maker_lets_the_one_that_waits_make_it(tmp_path: Path) -> None:
    first = holder(tmp_path, "raise RuntimeError")
    content, reused, said = second(tmp_path, (tmp_path / "go").touch)
    assert (content, reused, len(said)) == (b"0123456789", False, 1)
    assert first.wait(60) == 1


def test_many_at_once_make_it_once(tmp_path: Path) -> None:
    store, calls = Store(tmp_path).heard_by(lambda kind, text: None), []

    def count(folder: Path) -> dict[str, Any]:
        calls.append(folder)
        return write(folder)

    def one(number: int) -> bool:
        return produce(store, "shards", code="c", config={}, parents={}, make=count)[1]

    with ThreadPoolExecutor(8) as pool:
        reused = list(pool.map(one, range(8)))
    assert (len(calls), sorted(reused)) == (1, [False, *[True] * 7])
    assert not list(tmp_path.rglob(".*"))


def test_what_makes_an_artifact_may_make_others(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def outer(folder: Path) -> dict[str, Any]:
        return {"inner": make(store, "corpus").digest}

    artifact, reused = produce(store, "shards", code="c1", config={}, parents={}, make=outer)
    assert not reused
    assert artifact.facts["inner"] == make(store, "corpus").digest


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    artifact = make(Store(tmp_path))
    assert (artifact.path / "data.bin").read_bytes() == b"0123456789"
    said = capsys.readouterr().err
    assert said.startswith("shards: the file system of ")
    assert "knows no locks (No locks available)" in said
    assert not list(tmp_path.rglob(".*"))


def test_another_problem_with_the_lock_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(handle: int, operation: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", break_down)
    with pytest.raises(OSError, match="Input/output error"):
        make(Store(tmp_path))
