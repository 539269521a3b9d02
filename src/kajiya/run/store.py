"""The content-addressed store: immutable folders, found by the hash of all that made them."""

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kajiya.config.digest import digest, to_plain
from kajiya.errors import StoreError
from kajiya.run.files import check_files, full_disk_said, hash_folder, new_folder, read_json, write_json
from kajiya.run.lock import locked

STORE_VARIABLE = "KAJIYA_STORE"
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Artifact:
    """An immutable folder and the manifest that says what it is and what it came from."""

    path: Path
    stage: str
    key: str
    digest: str
    facts: Mapping[str, Any]

    def reference(self) -> dict[str, str]:
        """What a child's manifest says of this parent."""
        return {"stage": self.stage, "key": self.key, "digest": self.digest}


def _on_stderr(kind: str, text: str) -> None:
    sys.stderr.write(f"{text}\n")


@dataclass(frozen=True)
class Store:
    """A folder of artifacts and runs. Layout: `artifacts/<stage>/<key>/`, `runs/<run>/`."""

    root: Path
    on_event: Callable[..., object] = field(default=_on_stderr, compare=False, repr=False)
    """Hears (`note`, `warning`: `text`) that the making of an artifact waits for another process."""

    def heard_by(self, on_event: Callable[..., object]) -> "Store":
        """The same store, whose words a flow hears among its events."""
        return replace(self, on_event=on_event)

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    def folder(self, stage: str, key: str) -> Path:
        """Where the artifact of that stage and key is, or would be."""
        return self.root / "artifacts" / stage / key[:24]

    def find(self, stage: str, key: str) -> Artifact | None:
        """The finished artifact of that key, its files verified, or `None`."""
        folder = self.folder(stage, key)
        return open_artifact(folder) if (folder / _MANIFEST).is_file() else None

    def artifacts(self) -> list[Artifact]:
        """All finished artifacts, by stage and age; files are not verified."""
        manifests = sorted(self.root.glob("artifacts/*/*/" + _MANIFEST), key=lambda path: path.stat().st_mtime)
        return [open_artifact(path.parent, verify=False) for path in manifests if not path.parent.name.startswith(".")]


def default_store(given: str | Path | None = None) -> Store:
    """The store at `given`, else at the variable KAJIYA_STORE, else `./kajiya-store`."""
    return Store(Path(given or os.environ.get(STORE_VARIABLE) or "kajiya-store").resolve())


def artifact_key(stage: str, code: str, config: Any, parents: Mapping[str, Artifact]) -> str:
    """Hash of the stage, its code revision, its own config section and its parents' content digests."""
    return digest(
        {
            "stage": stage,
            "code": code,
            "config": to_plain(config),
            "parents": {name: parent.digest for name, parent in parents.items()},
        }
    )


def produce(
    store: Store,
    stage: str,
    *,
    code: str,
    config: Any,
    parents: Mapping[str, Artifact],
    make: Callable[[Path], dict[str, Any]],
) -> tuple[Artifact, bool]:
    """The artifact of this stage, and whether it was there already.

    `make(folder)` writes the files and returns the facts for the manifest; it may produce other artifacts. The folder appears
    whole or not at all. One process at a time makes it: another that wants the same waits, and then reuses it.
    Raises `StoreError` when the disk is full.
    """
    key = artifact_key(stage, code, config, parents)
    found = store.find(stage, key)
    if found is not None:
        return found, True
    final = store.folder(stage, key)
    with locked(final.with_name(f".{final.name}.lock"), stage, store.on_event):
        found = store.find(stage, key)
        if found is not None:
            return found, True
        about = {
            "stage": stage,
            "key": key,
            "code": code,
            "config": to_plain(config),
            "parents": {name: parent.reference() for name, parent in parents.items()},
        }
        return _made(final, about, make), False


def _made(final: Path, about: Mapping[str, Any], make: Callable[[Path], dict[str, Any]]) -> Artifact:
    """The artifact that `make` writes, put in its place; `about` is what its manifest says beside."""
    started = time.time()
    with new_folder(final, keep=final / _MANIFEST) as folder:
        with full_disk_said(folder, about["stage"]):
            facts = make(folder)
        files = hash_folder(folder)
        write_json(
            folder / _MANIFEST,
            {
                **about,
                "digest": digest({name: entry["sha256"] for name, entry in files.items()}),
                "facts": facts,
                "files": files,
                "created": started,
                "seconds": time.time() - started,
            },
        )
    return open_artifact(final, verify=False)


def open_artifact(folder: Path, verify: bool = True) -> Artifact:
    """The artifact in `folder`; with `verify`, every file is checked against the manifest's hashes."""
    manifest = read_manifest(folder)
    if verify:
        try:
            check_files(folder, manifest["files"])
        except StoreError as problem:
            raise StoreError(f"{problem}.\nDelete {folder}: the next run makes it again.") from problem
    return Artifact(folder, manifest["stage"], manifest["key"], manifest["digest"], manifest["facts"])


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact."""
    manifest = read_json(folder / _MANIFEST)
    if not isinstance(manifest, dict) or "stage" not in manifest or "files" not in manifest:
        raise StoreError(f"{folder / _MANIFEST}: not the manifest of an artifact")
    return manifest


def remove_artifact(artifact: Artifact) -> None:
    """Delete an artifact; its manifest goes first, so that a half-deleted one is never found."""
    (artifact.path / _MANIFEST).unlink()
    shutil.rmtree(artifact.path)
