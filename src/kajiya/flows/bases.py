"""The weights that a recipe starts from: a run, an artifact, a folder or a hub name; or what stands in for them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kajiya.config.rewards import check_rewards
from kajiya.config.schema import Config, LossConfig, ModelConfig
from kajiya.data.origin import resolve_commit
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
    """Turn `model.path`, `tokenizer.path`, the path of an adapter that is gone on with, a teacher and reward models into folders.

    A hub name stays one; that of the model is pinned to its commit. Raises `StoreError` when a name is neither in the store nor
    a folder nor a hub name, `DataError` when the hub does not know the model's or cannot be reached.
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
        if base is None:
            model = replace(model, revision=resolve_commit(model.path, model.revision, "model"))
        else:
            if tokenizer.path == model.path:
                tokenizer = replace(tokenizer, path=str(base.path))
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
    places = {}
    for name, path in _named(config.train.loss).items():
        found = _find(path, store)
        if found is not None:
            parents[name] = found
            places[name] = str(found.path)
    train = replace(config.train, loss=_with_places(config.train.loss, places))
    return Based(replace(config, model=model, tokenizer=tokenizer, adapter=adapter, train=train), parents)


def loss_without_place(loss: LossConfig) -> LossConfig:
    """The same without where its teacher or its reward models lie: the parents' digests say which they are."""
    return _with_places(loss, {name: _PARENT for name, path in _named(loss).items() if Path(path).is_dir()})


def _named(loss: LossConfig) -> dict[str, str]:
    """The weights that the loss names beside the model's own, by the name that they have among the parents."""
    if loss.name == "distill":
        return {"teacher": str(loss.options["teacher"])} if loss.options.get("teacher") else {}
    if loss.name != "grpo":
        return {}
    rewards = check_rewards(loss.options["rewards"], "train.loss.options.rewards")
    return {_reward(number): part.options["path"] for number, part in enumerate(rewards) if part.name == "model"}


def _with_places(loss: LossConfig, places: dict[str, str]) -> LossConfig:
    """The loss with other paths for some of what it names."""
    options = dict(loss.options)
    if "teacher" in places:
        options["teacher"] = places["teacher"]
    if loss.name == "grpo":
        options["rewards"] = [
            given | {"options": given["options"] | {"path": places[_reward(number)]}}
            if _reward(number) in places
            else given
            for number, given in enumerate(options["rewards"])
        ]
    return replace(loss, options=options)


def _reward(number: int) -> str:
    return f"reward_{number}"


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
