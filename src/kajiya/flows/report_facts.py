"""What a report speaks of, read from a run's manifest, its event log, and the artifacts that it lists."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from kajiya.errors import StoreError
from kajiya.flows.run_history import RunHistory, read_history
from kajiya.run.folder import Run
from kajiya.run.hashing import hash_file
from kajiya.run.status import RunStatus, run_status
from kajiya.run.store import read_manifest

T = TypeVar("T")

ARTIFACTS = ("corpus", "tokenizer", "shards", "model", "baselines", "evaluation")
"""Names under which a finished run lists its artifacts."""
MERGED = "merged "
"""How the name begins under which it lists the certificate of a merge; the dtype that was written follows."""


@dataclass(frozen=True)
class Part:
    """An artifact's folder and its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def facts(self) -> dict[str, Any]:
        """The facts of the manifest."""
        facts: dict[str, Any] = self.manifest["facts"]
        return facts


@dataclass(frozen=True)
class DocumentScore:
    """One held-out document under the model."""

    name: str
    n_bytes: int
    bits: float

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs for a byte of it."""
        return self.bits / self.n_bytes


@dataclass(frozen=True)
class RunFacts:
    """One run as the report sees it; what could not be read is `None` or empty, and `problems` says why."""

    label: str
    """A short name for tables and figures: `model` alone, A, B … beside others."""
    id: str
    manifest: dict[str, Any]
    status: str
    status_words: str
    """The status as it is shown: of a silent run, since when."""
    history: RunHistory
    parts: dict[str, Part]
    evaluation: dict[str, Any] | None
    baselines: dict[str, dict[str, Any]]
    documents: list[DocumentScore]
    samples: list[dict[str, str]]
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of a model that is not judged by bits: each metric on held-out rows (`value`, `interval`, `n`)."""
    problems: list[str] = field(default_factory=list)

    @property
    def plan(self) -> dict[str, Any] | None:
        """The facts of the plan, once it was made."""
        return self.manifest.get("plan")

    @property
    def steps(self) -> int | None:
        """Steps that were trained, as far as the manifests and the log know."""
        if "model" in self.parts:
            return int(self.parts["model"].facts["steps"])
        return self.history.last_step

    @property
    def scored_by(self) -> dict[str, Any]:
        """The `eval` section that the evaluation was made with, which need not be that of a later attempt's config."""
        section: dict[str, Any] = self.parts["evaluation"].manifest["config"]["eval"]
        return section

    def digest(self, name: str) -> str | None:
        """Content digest of an artifact that the run lists."""
        entry = self.manifest["artifacts"].get(name)
        return None if entry is None else str(entry["digest"])


def gather(runs: Sequence[Run], n_others: int = 0) -> list[RunFacts]:
    """The facts of each run, labelled in the order given, beside `n_others` models that are no run's.

    Raises `StoreError` for a run without a readable manifest.
    """
    n = len(runs) + n_others
    return [gather_run(run, label_of(number, n)) for number, run in enumerate(runs)]


def label_of(number: int, n: int) -> str:
    """A short name: `model` of one alone, A, B … beside others."""
    return "model" if n == 1 else _letters(number)


def gather_run(run: Run, label: str) -> RunFacts:
    """The facts of one run."""
    manifest = run.manifest()
    problems: list[str] = []

    def attempt(read: Callable[[], T], otherwise: T) -> T:
        try:
            return read()
        except (StoreError, OSError, KeyError, TypeError, ValueError) as problem:
            problems.append(str(problem) if isinstance(problem, StoreError) else f"{type(problem).__name__}: {problem}")
            return otherwise

    history = attempt(lambda: read_history(run.folder), RunHistory())
    status = attempt(lambda: run_status(manifest, run.folder), RunStatus(str(manifest["status"])))
    listed: dict[str, dict[str, Any]] = manifest["artifacts"]
    opened = {name: attempt(partial(_open, run.store.root, entry), None) for name, entry in listed.items()}
    parts = {name: part for name, part in opened.items() if part is not None}
    evaluation: dict[str, Any] | None = None
    documents: list[DocumentScore] = []
    samples: list[dict[str, str]] = []
    scored, measured = parts.get("evaluation"), parts.get("baselines")
    figures: dict[str, dict[str, Any]] = {}
    if scored is not None and "figures" in scored.facts:
        figures = scored.facts["figures"]
    elif scored is not None:
        evaluation = attempt(partial(_json, scored, "evaluation.json"), None)
        documents = attempt(partial(_documents, scored), [])
        samples = attempt(partial(_json, scored, "samples.json"), [])
    return RunFacts(
        label=label,
        id=run.id,
        manifest=manifest,
        status=status.word,
        status_words=status.words,
        history=history,
        parts=parts,
        evaluation=evaluation,
        baselines={} if measured is None else attempt(partial(_json, measured, "baselines.json"), {}),
        documents=documents,
        samples=samples,
        figures=figures,
        problems=problems,
    )


def _open(root: Path, entry: dict[str, Any]) -> Part:
    folder = root / entry["path"]
    if not (folder / "manifest.json").is_file():
        raise StoreError(f"{entry['stage']}: the run lists it, but its folder is gone from the store ({folder})")
    manifest = read_manifest(folder)
    if manifest["digest"] != entry["digest"]:
        raise StoreError(
            f"{entry['stage']}: made anew since this run (digest {manifest['digest'][:16]}, this run's was "
            f"{entry['digest'][:16]}); left out ({folder})"
        )
    return Part(folder, manifest)


def _listed(part: Part, name: str) -> Path:
    """A file of the artifact, its bytes those that the manifest lists."""
    path = part.folder / name
    listed = part.manifest["files"].get(name)
    if listed is None:
        raise StoreError(f"{path}: the artifact's manifest lists no such file")
    if not path.is_file():
        raise StoreError(f"{path}: listed in the manifest, but missing")
    if hash_file(path) != listed["sha256"]:
        raise StoreError(f"{path}: its content is not what the manifest's hash says; left out")
    return path


def _json(part: Part, name: str) -> Any:
    return json.loads(_listed(part, name).read_text(encoding="utf-8"))


def _documents(part: Part) -> list[DocumentScore]:
    rows = [
        json.loads(line) for line in _listed(part, "documents.jsonl").read_text(encoding="utf-8").split("\n") if line
    ]
    return [DocumentScore(row["document"], row["n_bytes"], row["nats"] / math.log(2)) for row in rows]


def _letters(index: int) -> str:
    """0 → A, 25 → Z, 26 → AA."""
    return (_letters(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)
