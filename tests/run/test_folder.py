"""Runs: begun once, gone on with, found by a part of their name, worked on by one process."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kajiya.config.digest import digest
from kajiya.config.schema import Config, EvalConfig
from kajiya.errors import RunBusyError, StoreError
from kajiya.run.alive import BEAT, Beat, is_alive, process_facts
from kajiya.run.events import read_events
from kajiya.run.folder import Run, find_run, find_run_or_study, is_study, list_runs, open_run, runs_of
from kajiya.run.inspect import moved_words
from kajiya.run.store import Store, produce


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_a_run_is_begun_once_and_gone_on_with(store: Store) -> None:
    config = Config(name="tiny")
    first = open_run(store, config, "abcdef0123456789", ["train", "tiny"])
    first.record(status="interrupted", attempts=1)
    second = open_run(store, config, "abcdef0123456789", ["train", "tiny", "again"])
    assert second.id == first.id == "tiny-abcdef0123"
    manifest = second.manifest()
    assert manifest["attempts"] == 1
    assert manifest["command"] == ["train", "tiny"]
    assert manifest["config"]["train"]["micro_batch"] == 8
    assert manifest["config_digest"] == digest(config) == digest(manifest["config"])
    assert manifest["provenance"]["packages"]["torch"]
    assert [event["kind"] for event in read_events(first.folder)] == ["config", "opened", "opened"]


def test_a_later_attempt_with_other_settings_is_what_the_manifest_and_the_log_say(store: Store) -> None:
    open_run(store, Config(name="tiny"), "a" * 10, [])
    config = Config(name="tiny", eval=EvalConfig(stride_fraction=1.0))
    run = open_run(store, config, "a" * 10, [])
    manifest = run.manifest()
    assert manifest["config"]["eval"]["stride_fraction"] == 1.0
    assert manifest["config_digest"] == digest(config)
    told = [
        event["config"]["eval"]["stride_fraction"] for event in read_events(run.folder) if event["kind"] == "config"
    ]
    assert told == [EvalConfig().stride_fraction, 1.0]


def test_a_run_of_another_machine_is_busy_until_its_process_falls_silent(store: Store) -> None:
    run = open_run(store, Config(name="tiny"), "b" * 10, [])
    run.record(owner={"pid": 1, "begun": 1, "host": "elsewhere"})
    with pytest.raises(RunBusyError, match="process 1 on elsewhere"):
        open_run(store, Config(name="tiny"), "b" * 10, [])
    beat = Beat(run.folder / BEAT).start()
    assert not is_gone(run)
    beat.stop()
    assert not (run.folder / BEAT).exists()
    (run.folder / BEAT).touch()
    with pytest.raises(RunBusyError):
        open_run(store, Config(name="tiny"), "b" * 10, [])
    os.utime(run.folder / BEAT, (1.0, 1.0))
    assert is_gone(run)
    assert open_run(store, Config(name="tiny"), "b" * 10, []).manifest()["owner"]["pid"] == os.getpid()
    assert [path.name for path in run.folder.iterdir() if path.name.startswith(".")] == []


def is_gone(run: Run) -> bool:
    return not is_alive(run.manifest()["owner"], run.folder / BEAT)


def test_an_attempt_with_other_software_or_on_another_machine_is_kept(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attempt() -> dict[str, Any]:
        return open_run(store, Config(name="tiny"), "a" * 10, []).manifest()

    first = attempt()["provenance"]
    assert attempt()["later_provenance"] == []
    moved = first | {"packages": first["packages"] | {"torch": "9.9"}, "machine": first["machine"] | {"cores": 96}}
    monkeypatch.setattr("kajiya.run.folder.collect_provenance", lambda: moved)
    assert moved_words(attempt()) == (
        f"packages.torch: {first['packages']['torch']}, then 9.9; machine.cores: {first['machine']['cores']}, then 96"
    )
    again = attempt()
    assert again["provenance"] == first
    assert [each["provenance"] for each in again["later_provenance"]] == [moved], "once, not at each attempt"
    monkeypatch.setattr("kajiya.run.folder.collect_provenance", lambda: first | {"git": None, "working_directory": "/"})
    assert moved_words(attempt()) == "", "back where it was, in another folder"
    assert len(attempt()["later_provenance"]) == 2


def test_an_artifact_is_listed_and_told(store: Store) -> None:
    run = open_run(store, Config(name="tiny"), "a" * 64, [])
    artifact, _ = produce(store, "corpus", code="c", config={}, parents={}, make=lambda folder: {})
    run.record_artifact("corpus", artifact)
    entry = run.manifest()["artifacts"]["corpus"]
    assert entry == artifact.reference() | {"path": f"artifacts/corpus/{artifact.key[:24]}"}
    event = list(read_events(run.folder))[-1]
    assert (event["kind"], event["digest"], event["path"]) == ("artifact", artifact.digest, entry["path"])


def test_find_run(store: Store) -> None:
    with pytest.raises(StoreError, match=r"'latest' is no run .*\n.*none yet"):
        find_run(store, "latest")
    runs = [open_run(store, Config(name=name), key * 10, []) for name, key in (("a", "1"), ("a", "2"), ("ab", "3"))]
    assert list_runs(store) == runs
    assert find_run(store, "latest") == runs[-1]
    runs[-1].record(study="search-1")
    assert find_run(store, "latest") == runs[-2], "no trial of a search"
    assert find_run(store, runs[-1].id) == runs[-1]
    assert find_run(store, "a-1") == runs[0]
    assert find_run(store, "ab") == runs[2]
    assert find_run(store, runs[1].id) == runs[1]
    assert find_run(Store(store.root / "elsewhere"), str(runs[1].folder)) == runs[1]
    with pytest.raises(StoreError, match="'a-' is the beginning of several runs"):
        find_run(store, "a-")
    with pytest.raises(StoreError, match="'b' is no run"):
        find_run(store, "b")


def test_a_whole_id_is_found_although_it_begins_another(store: Store) -> None:
    short = open_run(store, Config(name="a"), "1234567890", [])
    (store.runs / (short.id + "-more")).mkdir()
    (store.runs / (short.id + "-more") / "manifest.json").write_bytes((short.folder / "manifest.json").read_bytes())
    assert find_run(store, short.id) == short


def test_a_run_in_progress_in_another_process_is_refused(store: Store) -> None:
    run = open_run(store, Config(name="tiny"), "a" * 10, [])
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        run.record(owner=facts_of(child.pid))
        with pytest.raises(StoreError, match=rf"in progress in process {child.pid} "):
            open_run(store, Config(name="tiny"), "a" * 10, [])
        run.record(status="failed")
        open_run(store, Config(name="tiny"), "a" * 10, [])
        run.record(status="running", owner=facts_of(child.pid))
    finally:
        child.communicate()
    open_run(store, Config(name="tiny"), "a" * 10, [])
    assert run.manifest()["owner"] == process_facts()


def facts_of(pid: int) -> dict[str, object]:
    from kajiya.run.alive import _begun

    return process_facts() | {"pid": pid, "begun": _begun(pid)}


def test_a_process_is_told_from_a_later_one_with_its_number() -> None:
    mine = process_facts()
    assert is_alive(mine)
    if mine["begun"] is not None:
        assert not is_alive(mine | {"begun": mine["begun"] - 1})
    assert is_alive(mine | {"pid": 2**22 - 1, "host": "another machine"})
    child = subprocess.Popen([sys.executable, "-c", ""])
    facts = facts_of(child.pid)
    child.wait()
    assert not is_alive(facts)


def test_a_study_is_found_beside_runs_and_has_its_own(store: Store) -> None:
    run = open_run(store, Config(name="tiny"), "a" * 10, [])
    other = open_run(store, Config(name="tiny"), "b" * 10, [])
    folder = store.root / "studies" / "tiny-search"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_bytes((run.folder / "manifest.json").read_bytes())
    study = find_run_or_study(store, "tiny-s")
    assert study.folder == folder
    assert is_study(study)
    assert find_run_or_study(store, str(folder)).folder == folder
    assert find_run_or_study(store, run.id) == run
    assert not is_study(find_run_or_study(store, "latest"))
    with pytest.raises(StoreError, match="is no run"):
        find_run(store, "tiny-s")
    with pytest.raises(StoreError, match="beginning of several"):
        find_run_or_study(store, "tiny")
    run.record(study=study.id, status="finished")
    other.record(study=study.id)  # still at work, in this process
    assert [each.id for each in runs_of(study)] == [run.id]
