"""What a store holds: listed with sizes, verified, pinned, and rid of what nothing refers to."""

import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kajiya.config.digest import digest
from kajiya.errors import StoreError
from kajiya.run.alive import is_running
from kajiya.run.files import check_files, list_files, read_json, write_json
from kajiya.run.lock import is_free, locked_if_free
from kajiya.run.status import run_status
from kajiya.run.store import Artifact, Store, read_manifest, remove_artifact

_PINS = "pins.json"
_UNFINISHED = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)(?P<aside>\.old)?")
"""Written beside `<name>`, or moved aside from it, by that process."""
_MAKERS = re.compile(r"\.(?P<key>[^.]+)\.(lock|parts)")
"""Beside an artifact: what only its maker has, who holds the lock."""


@dataclass(frozen=True)
class ArtifactRow:
    """One line of `kajiya store list`."""

    name: str
    """`<stage>/<key>`, which `pin` takes, and the beginning of the key too."""
    digest: str
    created: float
    seconds: float
    """Time that it took to make."""
    bytes: int
    runs: list[str]
    """Runs that made or used it."""
    pin: str | None
    """Why it is pinned, or null."""


@dataclass(frozen=True)
class Verdict:
    """Whether an artifact is what its manifest says."""

    name: str
    bytes: int
    """Bytes listed in the manifest and hashed; 0 where the manifest cannot be read."""
    problem: str | None


@dataclass(frozen=True)
class Garbage:
    """What was, or would be, deleted."""

    artifacts: list[str]
    unfinished: list[str]
    """Folders and files that killed processes left: half-written, the shards of a tokenizing that was broken off, locks."""
    bytes: int
    unfinished_bytes: int
    """Of these, those of `unfinished`."""
    is_deleted: bool


def store_rows(store: Store) -> list[ArtifactRow]:
    """Every finished artifact, oldest first; raises `StoreError` for a manifest that cannot be read."""
    users = _users(store)
    pins = _read_pins(store)
    rows = []
    for artifact in store.artifacts():
        manifest = read_manifest(artifact.path)
        name = name_of(artifact.path)
        rows.append(
            ArtifactRow(
                name=name,
                digest=artifact.digest,
                created=manifest["created"],
                seconds=manifest["seconds"],
                bytes=sum(entry["bytes"] for entry in manifest["files"].values()),
                runs=users.get(name, []),
                pin=pins[name]["reason"] if name in pins else None,
            )
        )
    return sorted(rows, key=lambda row: (row.created, row.name))


def verify_store(store: Store) -> list[Verdict]:
    """Read and hash every file of every artifact; a verdict with a `problem` names the first thing that is wrong."""
    return [_verify(path.parent) for path in _manifests(store)]


def _verify(folder: Path) -> Verdict:
    n_bytes = 0
    try:
        manifest = read_manifest(folder)
        files = manifest["files"]
        n_bytes = sum(entry["bytes"] for entry in files.values())
        if digest({name: entry["sha256"] for name, entry in files.items()}) != manifest["digest"]:
            raise StoreError(f"{folder}: the manifest's list of files is not what its own digest says")
        check_files(folder, files, reads_all=True)
        present = {path.relative_to(folder).as_posix() for path in list_files(folder)} - {"manifest.json"}
        if present != set(files):
            raise StoreError(f"{folder}: {min(present - set(files))} is not in the manifest")
    except StoreError as error:
        return Verdict(name_of(folder), n_bytes, str(error))
    return Verdict(name_of(folder), n_bytes, None)


def find_artifact(store: Store, name: str) -> Artifact:
    """An artifact by `<stage>/<key>`, the beginning of its key or digest, or its folder; not verified."""
    known = store.artifacts()
    folder = Path(name).resolve()
    matches = [artifact for artifact in known if artifact.path == folder or name_of(artifact.path) == name]
    if not matches and name:
        matches = [
            artifact
            for artifact in known
            if name_of(artifact.path).startswith(name)
            or artifact.key.startswith(name)
            or artifact.digest.startswith(name)
        ]
    if len(matches) == 1:
        return matches[0]
    problem = f"is the beginning of {len(matches)} artifacts" if matches else "is no artifact"
    newest = ", ".join(name_of(artifact.path) for artifact in (matches or known)[-5:]) or "none yet"
    raise StoreError(f"{name!r} {problem} in {store.root}.\nArtifacts, newest last: {newest}")


def pin(store: Store, name: str, reason: str = "pinned") -> str:
    """Keep an artifact, and what it came from, through every `collect_garbage`; returns its full name."""
    full = name_of(find_artifact(store, name).path)
    write_json(store.root / _PINS, _read_pins(store) | {full: {"reason": reason, "t": time.time()}})
    return full


def unpin(store: Store, name: str) -> str:
    """Take a pin away; returns the artifact's full name. Raises `StoreError` if it had none."""
    pins = _read_pins(store)
    full = name if name in pins else name_of(find_artifact(store, name).path)
    if full not in pins:
        raise StoreError(f"{full} is not pinned.\nPinned: {', '.join(sorted(pins)) or 'nothing'}")
    write_json(store.root / _PINS, {kept: entry for kept, entry in pins.items() if kept != full})
    return full


def collect_garbage(store: Store, keep: Iterable[str] = (), dry_run: bool = True) -> Garbage:
    """Delete the artifacts that no run, no pin and nothing in `keep` refers to, directly or as an ancestor.

    What processes that are gone have left half-made goes too. With `dry_run`, only say which. Raises `StoreError` while a run
    is in progress, whose artifacts may not be listed yet, or when a manifest that could refer to something cannot be read.
    """
    live = [
        path.parent.name for path in _run_manifests(store) if run_status(read_json(path), path.parent).word == "running"
    ]
    if live and not dry_run:
        raise StoreError(f"{', '.join(live)} in progress: what it has made may not be listed yet.\nTry again after it.")
    artifacts = {name_of(artifact.path): artifact for artifact in store.artifacts()}
    kept = set(_users(store)) | set(_read_pins(store)) | {name_of(find_artifact(store, name).path) for name in keep}
    waiting = [name for name in kept if name in artifacts]
    while waiting:
        for parent in read_manifest(artifacts[waiting.pop()].path)["parents"].values():
            name = name_of(store.folder(parent["stage"], parent["key"]))
            if name in artifacts and name not in kept:
                kept.add(name)
                waiting.append(name)
    unused = {name: artifact for name, artifact in artifacts.items() if name not in kept}
    sizes = {path: _size(path) for path in _unfinished(store)}
    freed = sum(_size(artifact.path) for artifact in unused.values())
    if not dry_run:
        for artifact in unused.values():
            remove_artifact(artifact)
        sizes = {path: size for path, size in sizes.items() if _remove_unfinished(path)}
    names = [str(path.relative_to(store.root)) for path in sizes]
    left = sum(sizes.values())
    return Garbage(sorted(unused), names, freed + left, left, not dry_run)


def name_of(folder: Path) -> str:
    """`<stage>/<key>` of an artifact's folder."""
    return f"{folder.parent.name}/{folder.name}"


def _users(store: Store) -> dict[str, list[str]]:
    """Runs that list each artifact, by the artifact's name."""
    users: dict[str, list[str]] = {}
    for path in _run_manifests(store):
        for entry in read_json(path)["artifacts"].values():
            users.setdefault(name_of(store.folder(entry["stage"], entry["key"])), []).append(path.parent.name)
    return users


def _run_manifests(store: Store) -> list[Path]:
    return sorted(store.runs.glob("*/manifest.json"))


def _manifests(store: Store) -> list[Path]:
    return sorted(
        path for path in store.root.glob("artifacts/*/*/manifest.json") if not path.parent.name.startswith(".")
    )


def _unfinished(store: Store) -> list[Path]:
    """What processes that are gone have left beside its final place, and what endpoints answered to evaluations that broke off."""
    places = [*store.root.glob("artifacts/*/*/.*"), *store.root.glob("runs/*/.*")]
    places += [*store.root.glob("runs/*/*/.*"), *store.root.glob(".*")]
    beside = [path for path in store.root.glob("artifacts/*/.*") if is_free(_lock_of(path))]
    left = [path for path in beside if _MAKERS.fullmatch(path.name)]
    left += [path for path in [*places, *beside] if _is_left(path)]
    left += [path for path in store.root.glob("replies/*") if is_free(_lock_of(path))]
    return sorted(path for path in left if path.parent not in left)


def _is_left(path: Path) -> bool:
    found = _UNFINISHED.fullmatch(path.name)
    if found is None or is_running(int(found["pid"])):
        return False
    # Moved aside for one that never came to its place: perhaps all that there is.
    return found["aside"] is None or path.with_name(found["name"]).exists()


def _lock_of(path: Path) -> Path:
    """The lock of what `.<key>.…` or `<key>.…` belongs to."""
    return path.with_name(f".{path.name.removeprefix('.').partition('.')[0]}.lock")


def _remove_unfinished(path: Path) -> bool:
    """Delete what is left, unless a process has begun to make the same meanwhile; returns whether."""
    if path.parent.parent.name != "artifacts" and path.parent.name != "replies":
        _remove(path)
        return True
    lock = _lock_of(path)
    with locked_if_free(lock) as is_mine:
        if is_mine and path != lock:
            _remove(path)
        return is_mine


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in list_files(path)) if path.is_dir() else path.stat().st_size


def _read_pins(store: Store) -> dict[str, Any]:
    path = store.root / _PINS
    return dict(read_json(path)) if path.is_file() else {}
