"""What MLflow shall know of a run's data and of where its model came from, read from the artifacts' manifests."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kajiya.run.files import read_json

_MAX_DIGEST = 36
_MAX_TAG = 5000
_CONTEXTS = {"train": "training", "heldout": "evaluation"}


def dataset_inputs(folder: Path, digest: str) -> list[Any]:
    """Both sides of a corpus as MLflow's datasets: its source, its rows and bytes, the digest of its files."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    facts = _manifest(folder).get("facts", {})
    if "source" not in facts or "ledger" not in facts:
        return []
    name = str(facts["source"].get("name", "a source"))
    return [
        DatasetInput(
            Dataset(
                name=f"{name} ({split})",
                digest=digest[:_MAX_DIGEST],
                source_type="kajiya",
                source=json.dumps(facts["source"], default=str),
                profile=json.dumps({key: facts["ledger"][split][key] for key in ("documents", "bytes")}),
            ),
            [InputTag("mlflow.data.context", context)],
        )
        for split, context in _CONTEXTS.items()
        if split in facts["ledger"]
    ]


def lineage_tags(folder: Path) -> dict[str, str]:
    """Tags of a model version: the digest of everything that the model was made from, and of the code that made it."""
    manifest = _manifest(folder)
    tags = {f"parent.{name}": str(entry["digest"]) for name, entry in manifest.get("parents", {}).items()}
    if "code" in manifest:
        tags["code"] = str(manifest["code"])
    facts = manifest.get("facts", {})
    for name in ("n_params", "steps", "tokens", "best_heldout_loss", "best_step"):
        if facts.get(name) is not None:
            tags[name] = str(facts[name])
    return tags


def run_tags(run_folder: Path, own: Mapping[str, Any]) -> dict[str, str]:
    """Tags of a run: what MLflow's own client would set, and the user's."""
    manifest = read_json(run_folder / "manifest.json")
    tags = {"mlflow.source.type": "LOCAL", "kajiya.recipe": str(manifest["name"])}
    if manifest.get("command"):
        tags["mlflow.source.name"] = " ".join(manifest["command"])[:_MAX_TAG]
    git = (manifest.get("provenance") or {}).get("git")
    if git is not None:
        tags["mlflow.source.git.commit"] = str(git["commit"])
    return tags | {name: str(value) for name, value in own.items()}


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    return read_json(path) if path.is_file() else {}
