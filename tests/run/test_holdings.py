"""What a store holds: listed, verified, pinned, and collected only when nothing refers to it."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kajiya.config.schema import Config
from kajiya.errors import StoreError
from kajiya.run import holdings
from kajiya.run.folder import Run, open_run
from kajiya.run.holdings import collect_garbage, find_artifact, name_of, pin, store_rows, unpin, verify_store
from kajiya.run.lock import locked
from kajiya.run.store import Artifact, Store, produce


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def make(store: Store, stage: str, text: str, **parents: Artifact) -> Artifact:
    def write(folder: Path) -> dict[str, Any]:
        (folder / "sub").mkdir()
        (folder / "sub" / "text").write_text(text)
        return {}

    artifact, _ = produce(store, stage, code="c", config={"text": text}, parents=parents, make=write)
    return artifact


def finished_run(store: Store, key: str, **artifacts: Artifact) -> Run:
    run = open_run(store, Config(name="tiny"), key * 10, [])
    for name, artifact in artifacts.items():
        run.record_artifact(name, artifact)
    run.record(status="finished")
    return run


def test_listing_says_size_users_and_pins(store: Store) -> None:
    corpus = make(store, "corpus", "0123456789")
    loose = make(store, "corpus", "loose")
    run = finished_run(store, "a", corpus=corpus)
    pin(store, name_of(loose.path), "for the paper")
    rows = {row.name: row for row in store_rows(store)}
    assert list(rows) == [name_of(corpus.path), name_of(loose.path)]
    assert rows[name_of(corpus.path)].bytes == 10
    assert rows[name_of(corpus.path)].runs == [run.id]
    assert rows[name_of(loose.path)].runs == []
    assert rows[name_of(loose.path)].pin == "for the paper"
    json.dumps([dataclasses.asdict(row) for row in rows.values()])


def test_verify_names_each_kind_of_harm(store: Store) -> None:
    good, changed, missing, added, listed, broken = (make(store, "corpus", f"text {n}") for n in range(6))
    (changed.path / "sub" / "text").write_text("text x")
    (missing.path / "sub" / "text").unlink()
    (added.path / "sub" / "more").write_text("more")
    manifest = json.loads((listed.path / "manifest.json").read_text())
    manifest["files"] = {}
    (listed.path / "manifest.json").write_text(json.dumps(manifest))
    (broken.path / "manifest.json").write_text("{")
    problems = {verdict.name: verdict.problem for verdict in verify_store(store)}
    assert len(problems) == 6
    assert problems[name_of(good.path)] is None
    for artifact, words in (
        (changed, "corrupt"),
        (missing, "missing"),
        (added, "sub/more is not in the manifest"),
        (listed, "not what its own digest says"),
        (broken, "broken JSON"),
    ):
        assert words in (problems[name_of(artifact.path)] or ""), words


def test_an_artifact_is_found_by_name_key_digest_and_folder(store: Store) -> None:
    one, two = make(store, "corpus", "one"), make(store, "corpus", "two")
    for name in (name_of(one.path), one.key, one.key[:12], one.digest[:12], str(one.path)):
        assert find_artifact(store, name).path == one.path
    with pytest.raises(StoreError, match="is the beginning of 2 artifacts"):
        find_artifact(store, "corpus/")
    for name in ("nothing", ""):
        with pytest.raises(StoreError, match="is no artifact"):
            find_artifact(store, name)
    assert find_artifact(store, name_of(two.path)).path == two.path


def test_garbage_is_what_nothing_refers_to(store: Store) -> None:
    ancestor = make(store, "corpus", "ancestor")
    shards = make(store, "shards", "shards", corpus=ancestor)
    used = make(store, "model", "used", shards=shards)
    pinned_parent = make(store, "corpus", "parent of a pinned one")
    pinned = make(store, "model", "pinned", corpus=pinned_parent)
    kept = make(store, "corpus", "kept by name")
    loose_parent = make(store, "corpus", "12345")
    loose = make(store, "model", "1234567890", corpus=loose_parent)
    finished_run(store, "a", model=used)  # its data are ancestors only
    pin(store, pinned.key[:16])

    would = collect_garbage(store, keep=[kept.key])

    assert would.artifacts == sorted([name_of(loose.path), name_of(loose_parent.path)])
    assert not would.is_deleted
    assert loose.path.is_dir()
    done = collect_garbage(store, keep=[kept.key], dry_run=False)
    assert done == dataclasses.replace(would, is_deleted=True)
    assert done.bytes > 15
    left = {artifact.path for artifact in store.artifacts()}
    assert left == {a.path for a in (ancestor, shards, used, pinned_parent, pinned, kept)}
    assert not loose.path.exists()
    assert all(verdict.problem is None for verdict in verify_store(store))


def test_a_pin_is_taken_away(store: Store) -> None:
    artifact = make(store, "corpus", "x")
    full = pin(store, artifact.key)
    assert collect_garbage(store).artifacts == []
    assert unpin(store, artifact.key[:10]) == full
    assert collect_garbage(store).artifacts == [full]
    with pytest.raises(StoreError, match="is not pinned"):
        unpin(store, full)


def test_nothing_is_deleted_while_a_run_is_in_progress(store: Store) -> None:
    artifact = make(store, "corpus", "not listed yet")
    run = open_run(store, Config(name="tiny"), "a" * 10, [])
    with pytest.raises(StoreError, match=f"{run.id} in progress"):
        collect_garbage(store, dry_run=False)
    assert collect_garbage(store).artifacts == [name_of(artifact.path)]
    run.record(status="failed")
    assert collect_garbage(store, dry_run=False).artifacts == [name_of(artifact.path)]


def test_what_a_killed_process_left_is_garbage_and_what_a_live_one_writes_is_not(store: Store) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stage = store.root / "artifacts" / "corpus"
    for pid in (child.pid, dead.pid):
        (stage / f".abc.{pid}").mkdir(parents=True)
        (stage / f".abc.{pid}" / "part").write_text("12345")
    try:
        garbage = collect_garbage(store, dry_run=False)
    finally:
        child.communicate()
    assert garbage.unfinished == [f"artifacts/corpus/.abc.{dead.pid}"]
    assert garbage.bytes == 5
    assert [path.name for path in stage.iterdir()] == [f".abc.{child.pid}"]


MAKER = """
import sys
from pathlib import Path
from kajiya.run.files import write_json
from kajiya.run.store import Store, produce

def make(folder):
    (folder / "half").write_text("half")
    (folder / ".half.json.1").write_text("one")
    parts = folder.with_name(folder.name.rpartition(".")[0] + ".parts")
    parts.mkdir(exist_ok=True)
    (parts / "part").write_text("a part")
    print("begun", flush=True)
    input()
    return {}

produce(Store(Path(sys.argv[1])), "shards", code="c", config={}, parents={}, make=make)
"""


def test_what_a_killed_maker_left_is_garbage_once_it_is_gone(store: Store) -> None:
    maker = subprocess.Popen(
        [sys.executable, "-c", MAKER, str(store.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert maker.stdout is not None
    try:
        assert maker.stdout.readline() == "begun\n"
        stage = store.root / "artifacts" / "shards"
        (key,) = {path.name.split(".")[1] for path in stage.iterdir()}
        names = [f".{key}.{kind}" for kind in sorted([str(maker.pid), "lock", "parts"])]
        assert sorted(path.name for path in stage.iterdir()) == names
        assert collect_garbage(store, dry_run=False).unfinished == []
        assert sorted(path.name for path in stage.iterdir()) == names
    finally:
        maker.kill()
        maker.communicate()
    lock_bytes = (stage / f".{key}.lock").stat().st_size
    would = collect_garbage(store)
    assert would.unfinished == [f"artifacts/shards/{name}" for name in names]
    assert would.unfinished_bytes == would.bytes == len("half" + "one" + "a part") + lock_bytes
    assert sorted(path.name for path in stage.iterdir()) == names
    assert collect_garbage(store, dry_run=False) == dataclasses.replace(would, is_deleted=True)
    assert list(stage.iterdir()) == []
    assert collect_garbage(store).bytes == 0


def test_what_somebody_began_to_make_meanwhile_stays(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = store.root / "artifacts" / "shards"
    (stage / ".abc.parts").mkdir(parents=True)
    (stage / ".abc.lock").touch()
    would = collect_garbage(store)
    assert would.unfinished == ["artifacts/shards/.abc.lock", "artifacts/shards/.abc.parts"]
    found = holdings._unfinished(store)
    monkeypatch.setattr(holdings, "_unfinished", lambda store: found)
    with locked(stage / ".abc.lock", "shards", lambda *_, **__: None):
        done = collect_garbage(store, dry_run=False)
        assert (done.unfinished, done.bytes) == ([], 0)
        assert (stage / ".abc.parts").is_dir()
        assert (stage / ".abc.lock").is_file()


def test_replies_that_an_evaluation_has_taken_up_meanwhile_stay(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = store.root / "replies" / "abc.jsonl"
    kept.parent.mkdir(parents=True)
    kept.write_text("reply\n")
    found = holdings._unfinished(store)
    assert found == [kept]
    monkeypatch.setattr(holdings, "_unfinished", lambda store: found)
    with locked(kept.with_name(".abc.lock"), "an evaluation", lambda *_, **__: None):
        assert collect_garbage(store, dry_run=False).unfinished == []
        assert kept.is_file()
    assert collect_garbage(store, dry_run=False).unfinished == ["replies/abc.jsonl"]
    assert list(kept.parent.iterdir()) == []


def test_what_was_moved_aside_goes_only_when_its_successor_is_there(store: Store) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    aside = store.runs / "run" / "checkpoints" / f".step-5.{dead.pid}.old"
    aside.mkdir(parents=True)
    (aside / "state").write_text("12345")
    assert collect_garbage(store).unfinished == []
    (aside.parent / "step-5").mkdir()
    assert collect_garbage(store, dry_run=False).bytes == 5
    assert [path.name for path in aside.parent.iterdir()] == ["step-5"]


def test_an_unreadable_run_stops_the_collection(store: Store) -> None:
    make(store, "corpus", "perhaps used")
    (store.runs / "broken").mkdir(parents=True)
    (store.runs / "broken" / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match="broken JSON"):
        collect_garbage(store, dry_run=False)
    assert len(store.artifacts()) == 1
