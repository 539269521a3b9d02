"""A run: its folder, its manifest, its event log."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kajiya.config.digest import digest, to_plain
from kajiya.config.schema import Config
from kajiya.errors import RunBusyError, StoreError
from kajiya.run.alive import process_facts
from kajiya.run.events import EventLog
from kajiya.run.files import read_json, write_json
from kajiya.run.provenance import collect_provenance
from kajiya.run.status import run_status
from kajiya.run.store import Artifact, Store

_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Run:
    """One run of one recipe: `<store>/runs/<name>-<key>/` with manifest.json, events.jsonl and checkpoints/."""

    folder: Path
    store: Store
    events: EventLog

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def manifest(self) -> dict[str, Any]:
        """The manifest as it stands on disk."""
        manifest = read_json(self.folder / _MANIFEST)
        if not isinstance(manifest, dict):
            raise StoreError(f"{self.folder / _MANIFEST}: not the manifest of a run")
        return manifest

    def record(self, **fields: Any) -> None:
        """Set fields of the manifest (`status`, `derived`, `timings` …) and write it whole."""
        write_json(self.folder / _MANIFEST, self.manifest() | to_plain(fields))

    def record_artifact(self, name: str, artifact: Artifact) -> None:
        """List an artifact that this run made or used under `artifacts`."""
        relative = os.path.relpath(artifact.path, self.store.root)
        entry = artifact.reference() | {"path": relative}
        self.record(artifacts=self.manifest()["artifacts"] | {name: entry})
        self.events.emit("artifact", name=name, path=relative, stage=artifact.stage, digest=artifact.digest)


def run_name(name: str, key: str) -> str:
    """Name of the run of that recipe and key: its folder's, and its id."""
    return f"{name}-{key[:10]}"


def open_run(
    store: Store, config: Config, key: str, command: list[str], process: Mapping[str, Any] | None = None
) -> Run:
    """The run of that key: begun now, or gone on with where an earlier attempt left it.

    The manifest's `owner` is this process from now on, and its `config` the one given: an attempt may have other settings
    than the one before where training does not read them. `process`: what was set in it. Raises `RunBusyError` while another
    one works on the run.
    """
    folder = store.runs / run_name(config.name, key)
    run = Run(folder, store, EventLog(folder))
    provenance = collect_provenance() | ({} if process is None else {"process": dict(process)})
    plain = to_plain(config)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / _MANIFEST).is_file():
        manifest = {
            "run": folder.name,
            "name": config.name,
            "key": key,
            "created": time.time(),
            "config": plain,
            "config_digest": digest(config),
            "command": command,
            "status": "running",
            "owner": process_facts(),
            "attempts": 0,
            "artifacts": {},
            "provenance": provenance,
        }
        # The manifest makes the run: the event is there before it, twice if a crash comes between.
        run.events.emit("config", config=plain)
        write_json(folder / _MANIFEST, manifest)
    else:
        _refuse_second(run)
        manifest = run.manifest()
        if manifest["config_digest"] != digest(config):
            run.events.emit("config", config=plain)
        later = _later_provenance(manifest, provenance)
        run.record(
            owner=process_facts(),
            status="running",
            config=plain,
            config_digest=digest(config),
            later_provenance=later,
        )
    run.events.emit("opened", pid=os.getpid())
    return run


def _later_provenance(manifest: dict[str, Any], now: dict[str, Any]) -> list[dict[str, Any]]:
    """The provenance of later attempts, with its time (Unix seconds), where it is not that of the attempt before."""
    known: list[dict[str, Any]] = manifest.get("later_provenance", [])
    latest = [manifest["provenance"], *(each["provenance"] for each in known)][-1]
    return known if now == latest else [*known, {"since": time.time(), "provenance": now}]


def _refuse_second(run: Run) -> None:
    manifest = run.manifest()
    owner = manifest["owner"]
    if owner["pid"] != os.getpid() and run_status(manifest, run.folder).word == "running":
        raise RunBusyError(
            f"Run {run.id} is in progress in process {owner['pid']} on {owner['host']}.\n"
            "Wait for it or stop it; another seed or config is another run."
        )


def find_run(store: Store, name: str) -> Run:
    """A run by its id, an unambiguous beginning of it, its folder, or `latest`, which is none of a search's."""
    return _find(store, name, ("runs",))


def find_run_or_study(store: Store, name: str) -> Run:
    """The same of runs and studies together; `latest` is a run."""
    return _find(store, name, ("runs", "studies"))


def find_study(store: Store, name: str) -> Run | None:
    """The study that `find_run_or_study` finds; `None` for a run's name, and for one that is neither's."""
    try:
        found = find_run_or_study(store, name)
    except StoreError:
        return None
    return found if is_study(found) else None


def list_runs(store: Store) -> list[Run]:
    """All runs of the store, oldest first."""
    return _list(store, "runs")


def is_study(run: Run) -> bool:
    """Whether it is a search of `kajiya tune`, whose trials are runs of their own."""
    return run.folder.parent.name == "studies"


def is_of_study(manifest: Mapping[str, Any]) -> bool:
    """Whether a run is a trial of a search or a repeat of one, which nobody asked for by itself."""
    return "study" in manifest


def runs_of(study: Run) -> list[Run]:
    """Runs that belong to a study and that no process works on, oldest first."""
    found = []
    for run in list_runs(study.store):
        manifest = run.manifest()
        if manifest.get("study") == study.id and run_status(manifest, run.folder).word != "running":
            found.append(run)
    return found


def _find(store: Store, name: str, kinds: tuple[str, ...]) -> Run:
    folder = Path(name).resolve()
    if (folder / _MANIFEST).is_file() and folder.parent.name in kinds:
        return Run(folder, Store(folder.parent.parent), EventLog(folder))
    found = [run for kind in kinds for run in _list(store, kind)]
    asked = [run for run in found if not is_study(run) and not is_of_study(run.manifest())]
    if name == "latest" and asked:
        return asked[-1]
    matches = [run for run in found if run.id.startswith(name)]
    exact = [run for run in matches if run.id == name]
    if len(exact or matches) == 1:
        return (exact or matches)[0]
    known = ", ".join(run.id for run in found[-5:]) or "none yet"
    problem = "is the beginning of several runs" if matches else "is no run"
    raise StoreError(f"{name!r} {problem} in {store.runs}.\nRuns, newest last: {known}")


def _list(store: Store, kind: str) -> list[Run]:
    runs = [Run(path.parent, store, EventLog(path.parent)) for path in store.root.glob(f"{kind}/*/{_MANIFEST}")]
    return sorted(runs, key=lambda run: (run.manifest()["created"], run.id))
