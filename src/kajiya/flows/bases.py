"""The weights that a recipe starts from: a run, an artifact, a folder or a hub name; or what stands in for them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kajiya.config.schema import Config, LossConfig, ModelConfig
from kajiya.data.progress import OnEvent
from kajiya.errors import StoreError
from kajiya.flows.targets import find_model
from kajiya.run.store import Artifact, Store

_STAND_IN_WIDTH = 256
_STAND_IN_LAYERS = 2
_PARENT = "(parent)"
"""Stands for the folder of weights that an artifact's digest names."""


@dataclass(frozen=True)
class Based:
    """A config whose names of weights are folders, and the artifacts behind them."""

    config: Config
    parents: dict[str, Artifact]


def find_bases(config: Config, store: Store, tell: OnEvent) -> Based:
    """Turn `model.path`, `tokenizer.path`, the path of an adapter that is gone on with and a teacher into folders.

    A hub name stays one. Raises `StoreError` when a name is neither in the store nor a folder nor a hub name.
    """
    if config.model.stand_in:
        tell(
            "warning",
            text=f"a small random model stands in for {config.model.path}: nothing that it says means anything",
        )
        return Based(_with_stand_in(config), {})
    parents: dict[str, Artifact] = {}
    model, tokenizer, adapter = config.model, config.tokenizer, config.adapter
    if model.path is not None:
        base = _find(model.path, store)
        if tokenizer.path == model.path and base is not None:
            tokenizer = replace(tokenizer, path=str(base.path))
        if base is not None:
            parents["base"] = base
            model = replace(model, path=str(base.path))
    if tokenizer.path is not None and tokenizer is config.tokenizer:
        found = _find(tokenizer.path, store)
        tokenizer = tokenizer if found is None else replace(tokenizer, path=str(found.path))
    if adapter.name == "load":
        found = _find(adapter.options["path"], store)
        if found is None:
            raise StoreError(f"adapter.options.path={adapter.options['path']}: no such folder, run or artifact")
        parents["adapter"] = found
        adapter = replace(adapter, options=adapter.options | {"path": str(found.path)})
    train = config.train
    if _teacher(train.loss):
        found = _find(_teacher(train.loss), store)
        if found is not None:
            parents["teacher"] = found
            loss = replace(train.loss, options=train.loss.options | {"teacher": str(found.path)})
            train = replace(train, loss=loss)
    return Based(replace(config, model=model, tokenizer=tokenizer, adapter=adapter, train=train), parents)


def loss_without_place(loss: LossConfig) -> LossConfig:
    """The same without where its teacher lies: the parent's digest says which it is."""
    if not Path(_teacher(loss)).is_dir():
        return loss
    return replace(loss, options=loss.options | {"teacher": _PARENT})


def _teacher(loss: LossConfig) -> str:
    """The teacher that the loss names; empty of a loss that has none."""
    return str(loss.options["teacher"]) if loss.name == "distill" and "teacher" in loss.options else ""


def without_places(config: Config) -> dict[str, Any]:
    """The sections that name weights, without where these lie: the parents' digests say what they are."""
    model, adapter = config.model, config.adapter
    if model.path is not None and Path(model.path).is_dir():
        model = replace(model, path=_PARENT)
    if adapter.name == "load":
        adapter = replace(adapter, options=adapter.options | {"path": _PARENT})
    return {"model": model, "adapter": adapter}


def _find(name: str, store: Store) -> Artifact | None:
    """The model of that name, or `None` for one that only the hub can know."""
    try:
        return find_model(name, store, from_hub=False).model
    except StoreError:
        if Path(name).exists() or name.count("/") != 1:
            raise
        return None


def _with_stand_in(config: Config) -> Config:
    """The architecture with its own proportions of heads and widths, two blocks deep, and a tokenizer of the text."""
    return replace(config, model=stand_in(config.model), tokenizer=replace(config.tokenizer, path=None, revision=None))


def stand_in(model: ModelConfig) -> ModelConfig:
    """The shape that stands in for a model: narrow and two blocks deep, its heads and widths in proportion."""
    if model.hidden_size is None:
        raise AssertionError("validate() asks for the shape")
    n_heads = min(model.n_heads or 8, 8)
    share = (model.n_heads or n_heads) // (model.n_kv_heads or model.n_heads or n_heads)
    ffn_size = None if model.ffn_size is None else round(_STAND_IN_WIDTH * model.ffn_size / model.hidden_size / 16) * 16
    return replace(
        model,
        path=None,
        revision=None,
        n_params=None,
        hidden_size=_STAND_IN_WIDTH,
        n_layers=_STAND_IN_LAYERS,
        n_heads=n_heads,
        n_kv_heads=max(1, n_heads // share),
        ffn_size=ffn_size,
    )
