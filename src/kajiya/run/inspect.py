"""Facts about runs, read from their manifests and event logs: for `kajiya runs`, `show` and `diff`."""

from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from kajiya.errors import StoreError
from kajiya.run.events import Event, read_events
from kajiya.run.files import list_files, read_json
from kajiya.run.flatten import flatten
from kajiya.run.folder import Run
from kajiya.run.status import RunStatus, run_status
from kajiya.run.store import Store
from kajiya.run.trackers.position import load_position


@dataclass(frozen=True)
class RunRow:
    """One line of `kajiya runs`."""

    id: str
    name: str
    status: str
    """One of `STATUSES`, or unreadable."""
    created: float
    """Unix seconds."""
    step: int | None
    """Last step that was logged."""
    metrics: dict[str, Any]
    """Last value of each metric."""
    since: float | None = None
    """Of a silent run, when it was last heard of, Unix seconds."""
    study: str | None = None
    """The search of `kajiya tune` that it belongs to."""
    problem: str | None = None
    """Why the run is unreadable."""

    @property
    def words(self) -> str:
        """The status as it is shown, or why there is none."""
        return self.problem or RunStatus(self.status, self.since).words


@dataclass(frozen=True)
class History:
    """What an event log comes to."""

    step: int | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    """Last value of each metric."""
    curves: dict[str, list[tuple[int, Any]]] = field(default_factory=dict)
    """Step and value of each metric, in order of steps; of a step logged twice, the later one."""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`{name: {state, seconds, text}}`, last state of each."""
    warnings: list[str] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    """Time from the first to the last event of each attempt, together."""
    error: str | None = None
    """What ended the last attempt, if an error did."""


@dataclass(frozen=True)
class RunFacts:
    """All that `kajiya show` says of a run."""

    id: str
    name: str
    status: str
    since: float | None
    """Of a silent run, when it was last heard of, Unix seconds."""
    created: float
    folder: str
    bytes: int
    """Size of the run's folder, checkpoints included."""
    attempts: int
    command: list[str]
    history: History
    timings: dict[str, float]
    """Seconds of each stage over all attempts."""
    derived: dict[str, Any]
    """Settings that were `auto`."""
    artifacts: dict[str, dict[str, Any]]
    trackers: dict[str, dict[str, Any]]
    """`{name: {status, n_events, problem}}`."""
    config: dict[str, Any]
    provenance: dict[str, Any]
    later_provenance: list[dict[str, Any]]
    """`since` (Unix seconds) and `provenance` of later attempts, where it is not that of the one before."""


@dataclass(frozen=True)
class RunDiff:
    """What differs between two runs; each difference is `{name: [first, second]}`, with null where one has none."""

    first: str
    second: str
    config: dict[str, list[Any]]
    artifacts: dict[str, list[Any]]
    """Content digests of the artifacts that differ: data, tokenizer, model, evaluation."""
    code: dict[str, list[Any]]
    """Code revisions of the artifacts' stages."""
    environment: dict[str, list[Any]]
    """Packages, interpreter, machine, git state, what was set in the process; of several attempts `first, then later`."""
    metrics: dict[str, dict[str, Any]]
    """Last values, equal ones too: `{name: {first, second, difference}}`."""


def run_rows(store: Store) -> list[RunRow]:
    """Every run of the store, oldest first; one that cannot be read has the status `unreadable`, and says why."""
    rows = []
    for path in store.runs.glob("*/manifest.json"):
        run_id = path.parent.name
        try:
            manifest = read_json(path)
            history, status = summarize(path.parent), run_status(manifest, path.parent)
            about = (run_id, manifest["name"], status.word, manifest["created"])
            rows.append(RunRow(*about, history.step, history.metrics, status.since, manifest.get("study")))
        except (StoreError, KeyError, TypeError) as error:
            problem = f"{type(error).__name__}: {error}"
            rows.append(RunRow(run_id, run_id, "unreadable", path.stat().st_mtime, None, {}, problem=problem))
    return sorted(rows, key=lambda row: (row.created, row.id))


def summarize(folder: Path) -> History:
    """The event log of a run folder as last values, curves, stages and times."""
    kinds: dict[str, list[Event]] = {}
    seconds, begun, latest = 0.0, None, 0.0
    for event in read_events(folder):
        kinds.setdefault(event["kind"], []).append(event)
        if event["kind"] == "opened" or begun is None:
            # A killed attempt has no end of its own: it lasted until its last event, not until the next attempt.
            seconds += 0.0 if begun is None else latest - begun
            begun = event["t"]
        latest = event["t"]
    metrics = kinds.get("metrics", [])
    curves: dict[str, dict[int, Any]] = {}
    for event in metrics:
        for name, value in event["values"].items():
            curves.setdefault(name, {})[event["step"]] = value
    return History(
        step=metrics[-1]["step"] if metrics else None,
        metrics={name: value for event in metrics for name, value in event["values"].items()},
        curves={name: sorted(points.items()) for name, points in curves.items()},
        stages={event["name"]: _part(event, "state", "seconds", "text") for event in kinds.get("stage", [])},
        warnings=[event["text"] for event in kinds.get("warning", [])],
        checkpoints=[_part(event, "step", "path", "bytes") for event in kinds.get("checkpoint", [])],
        seconds=seconds + (latest - begun if begun is not None else 0.0),
        error=kinds["ended"][-1]["error"] if "ended" in kinds else None,
    )


def _part(event: Event, *names: str) -> dict[str, Any]:
    return {name: event[name] for name in names}


def run_facts(run: Run) -> RunFacts:
    """Everything that the run's folder says."""
    manifest = run.manifest()
    status = run_status(manifest, run.folder)
    trackers = {}
    for path in sorted((run.folder / "trackers").glob("*.json")):
        position = load_position(path)
        trackers[path.stem] = {
            "status": position.status if position.closed else "behind",
            "n_events": position.n_events,
            "problem": position.problem,
        }
    return RunFacts(
        id=run.id,
        name=manifest["name"],
        status=status.word,
        since=status.since,
        created=manifest["created"],
        folder=str(run.folder),
        bytes=sum(path.stat().st_size for path in list_files(run.folder)),
        attempts=manifest["attempts"],
        command=manifest["command"],
        history=summarize(run.folder),
        timings=_recorded(manifest, "timings"),
        derived=_recorded(manifest, "derived"),
        artifacts=manifest["artifacts"],
        trackers=trackers,
        config=manifest["config"],
        provenance=manifest["provenance"],
        later_provenance=manifest.get("later_provenance", []),
    )


def run_diff(first: Run, second: Run) -> RunDiff:
    """What made the two runs different, and how far apart they came out."""
    a, b = first.manifest(), second.manifest()
    metrics_a, metrics_b = summarize(first.folder).metrics, summarize(second.folder).metrics
    return RunDiff(
        first=first.id,
        second=second.id,
        config=differences(flatten(a["config"]), flatten(b["config"])),
        artifacts=differences(_of_artifacts(a, "digest"), _of_artifacts(b, "digest")),
        code=differences(_codes(first, a), _codes(second, b)),
        environment=differences(_environment(a), _environment(b)),
        metrics={name: _compared(metrics_a, metrics_b, name) for name in dict.fromkeys([*metrics_a, *metrics_b])},
    )


def moved_words(manifest: dict[str, Any]) -> str:
    """What the latest attempt has otherwise than the first: packages, interpreter, machine, process; empty where nothing."""
    later = manifest.get("later_provenance", [])
    if not later:
        return ""
    known = (manifest["provenance"], later[-1]["provenance"])
    # A manifest of an older Kajiya has the process apart.
    parts = [name for name in ("python", "packages", "machine", "process") if all(name in each for each in known)]
    first, now = ({name: each[name] for name in parts} for each in known)
    changed = differences(flatten(first), flatten(now))
    return "; ".join(f"{name}: {pair[0] or 'none'}, then {pair[1] or 'none'}" for name, pair in changed.items())


def differences(a: dict[str, Any], b: dict[str, Any]) -> dict[str, list[Any]]:
    """`{name: [value in a, value in b]}` of the names whose values are not equal; a missing one is null."""
    pairs = {name: [a.get(name), b.get(name)] for name in dict.fromkeys([*a, *b])}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1] or (name in a) != (name in b)}


def _compared(a: dict[str, Any], b: dict[str, Any], name: str) -> dict[str, Any]:
    pair = {"first": a.get(name), "second": b.get(name)}
    is_number = all(isinstance(value, (int, float)) for value in pair.values())
    return pair | {"difference": b[name] - a[name] if is_number else None}


def _recorded(manifest: dict[str, Any], name: str) -> dict[str, Any]:
    """A part of the manifest that an early attempt has not written yet."""
    return dict(manifest[name]) if name in manifest else {}


def _of_artifacts(manifest: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: entry[key] for name, entry in manifest["artifacts"].items()}


def _environment(manifest: dict[str, Any]) -> dict[str, Any]:
    """Name by name what the attempts had; where a later one had another value, all of them in their order."""
    older = {"process": manifest["process"]} if "process" in manifest else {}
    attempts = [older | manifest["provenance"], *(each["provenance"] for each in manifest.get("later_provenance", []))]
    flats = [flatten(each) for each in attempts]
    found = {}
    for name in dict.fromkeys(name for flat in flats for name in flat):
        values = [value for value, _ in groupby(flat.get(name) for flat in flats)]
        found[name] = values[0] if len(values) == 1 else ", then ".join(map(str, values))
    # The seed is a setting, and stands among them.
    return {name: value for name, value in found.items() if name != "process.seed"}


def _codes(run: Run, manifest: dict[str, Any]) -> dict[str, Any]:
    """Code revision of each artifact, from its own manifest; `removed` where the store has it no more."""
    codes = {}
    for name, entry in manifest["artifacts"].items():
        path = run.store.root / entry["path"] / "manifest.json"
        codes[name] = read_json(path)["code"] if path.is_file() else "removed"
    return codes
