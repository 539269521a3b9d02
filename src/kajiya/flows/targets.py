"""What a person points at (a run, an artifact, a folder, a hub name) as a model on disk."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kajiya.config.digest import digest
from kajiya.config.schema import ServeConfig
from kajiya.config.tables import loss_row
from kajiya.errors import ConfigError, StoreError
from kajiya.run.files import hash_folder, read_json
from kajiya.run.folder import Run, find_run, is_of_study, list_runs
from kajiya.run.store import Artifact, Store, open_artifact

DEFAULT_RECIPE = "stdlib-pretrain"
"""Whose held-out text stands in where a model has none of its own."""


@dataclass(frozen=True)
class Target:
    """A model on disk, the run that made it where there is one, and a name to call it by."""

    model: Artifact
    name: str
    run: Run | None


def is_endpoint(target: str) -> bool:
    """Whether a target is the address of an API."""
    return target.startswith(("http://", "https://"))


def find_model(target: str, store: Store, *, from_hub: bool = True) -> Target:
    """The model of a run (its id, a beginning of it, or `latest`), of a recipe's newest finished run, an artifact or its folder,
    any folder with a model or an adapter, or a hub name.

    Raises `StoreError` that says what was looked for when there is none, or when the run has no model yet.
    """
    folder = Path(target)
    holds_model = (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()
    if (folder / "manifest.json").is_file() and holds_model:
        return Target(open_artifact(folder.resolve()), folder.resolve().name, None)
    if holds_model:
        return Target(_adopted(folder.resolve(), folder.resolve().name), folder.resolve().name, None)
    try:
        run = _newest_of_recipe(target, store) or find_run(store, target)
    except StoreError as problem:
        artifact = _artifact(target, store)
        if artifact is not None:
            return Target(artifact, artifact.key[:10], None)
        if from_hub and "/" in target and not folder.exists():
            return Target(_from_hub(target), target, None)
        raise StoreError(
            f"{target!r} is no run or model of {store.root}, no folder with a model, and no hub name (owner/name).\n"
            "`kajiya runs` and `kajiya store list` list what there is."
        ) from problem
    entry = run.manifest()["artifacts"].get("model")
    if entry is None:
        raise StoreError(f"{run.id} has no finished model.\nGo on with its training: the same command continues it.")
    return Target(open_artifact(store.root / entry["path"]), str(run.manifest()["name"]), run)


def run_of(target: str, store: Store) -> Run | None:
    """The run that a target names; `None` of a model that is no run's, and where there is none."""
    if is_endpoint(target):
        return None
    try:
        return find_model(target, store, from_hub=False).run
    except StoreError:
        return None


def writes_text(found: Target) -> bool:
    """Whether the model's head says the next token of a text."""
    return _head(found) is None


def require_text(found: Target, field: str) -> None:
    """Raise `ConfigError` naming the field where the model's head says something else than the next token of a text."""
    said = _head(found)
    if said is None:
        return
    remedy = (
        f"`kajiya eval {found.name}` judges the model on its run's held-out rows."
        if found.run is not None
        else "`kajiya eval` judges it by the run that trained it, on that run's held-out rows."
    )
    raise ConfigError(field, f"{found.name} {said}: it writes no text and has no log-probability of one", remedy)


def _head(found: Target) -> str | None:
    """What a model says that is no model of text; `None` of one that is."""
    if found.run is not None:
        task = loss_row(found.run.manifest()["config"]["train"]["loss"]["name"]).task
        return _HEADS.get(task)
    folder = found.model.path
    if (folder / "adapter_config.json").is_file():
        from kajiya.models.adapter_files import adapter_task

        # What its own config calls its use: its base need not be at hand.
        return _HEADS.get(adapter_task(folder, folder).name)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    names = " ".join(config["architectures"] or ()) if "architectures" in config else ""
    kinds = {"ForSequenceClassification": "classes", "ForMaskedLM": "masked"}
    is_pair = "is_encoder_decoder" in config and config["is_encoder_decoder"]
    task = "seq2seq" if is_pair else next((kind for name, kind in kinds.items() if name in names), "causal")
    return _HEADS.get(task)


_HEADS = {
    "classes": "is a classifier",
    "score": "is a regressor or a reward model",
    "masked": "is a masked language model",
    "seq2seq": "is an encoder-decoder",
}


def with_folders(cfg: ServeConfig, store: Store) -> ServeConfig:
    """The server's settings with the folders of the further models, the adapters and the draft that they name.

    Raises `StoreError` as `find_model` does.
    """

    def folder(name: str) -> str:
        return name if Path(name).is_dir() else str(find_model(name, store).model.path)

    models = {name: folder(target) for name, target in cfg.models.items()}
    adapters = {name: folder(target) for name, target in cfg.adapters.items()}
    return replace(cfg, models=models, adapters=adapters, draft=cfg.draft and folder(cfg.draft))


def _newest_of_recipe(name: str, store: Store) -> Run | None:
    """The newest run of the recipe of that name that has a model and is none of a search's."""
    runs = [
        run
        for run in list_runs(store)
        if (manifest := run.manifest())["name"] == name
        and "model" in manifest["artifacts"]
        and not is_of_study(manifest)
    ]
    return runs[-1] if runs else None


def _artifact(name: str, store: Store) -> Artifact | None:
    """The artifact that `kajiya store list` calls so, if it is a model."""
    from kajiya.run.holdings import find_artifact

    try:
        artifact = find_artifact(store, name)
    except StoreError:
        return None
    return open_artifact(artifact.path) if artifact.stage == "model" else None


def _adopted(folder: Path, name: str) -> Artifact:
    """A folder that this store did not make, with the digest of its files."""
    files: dict[str, dict[str, Any]] = hash_folder(folder)
    content = digest({path: entry["sha256"] for path, entry in files.items()})
    return Artifact(folder, "adopted", content, content, {"name": name})


def _from_hub(name: str) -> Artifact:
    from kajiya.models.adapter_files import hub_folder

    return _adopted(hub_folder(name), name)
