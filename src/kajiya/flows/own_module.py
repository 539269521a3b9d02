"""What of a run is the user's own: the names of the code, and a module built again with the weights of a model artifact."""

import torch

from kajiya.config.schema import Config
from kajiya.config.tables import loss_row
from kajiya.models.build import build_model, vocabulary_of
from kajiya.run.store import Artifact


def rebuild_own_module(config: Config, model: Artifact, tokenizer: Artifact) -> torch.nn.Module | None:
    """The module of `model.name: my_pkg.mod:fn` with the artifact's weights; `None` for a model that Transformers loads."""
    if ":" not in config.model.name:
        return None
    from safetensors.torch import load_model

    from kajiya.data.tokenizer import load_tokenizer

    module = build_model(config.model, vocabulary_of(load_tokenizer(tokenizer.path)), config.seed).module
    load_model(module, model.path / "model.safetensors")
    return module.eval()


def own_names(config: Config) -> tuple[str, ...]:
    """What may be the user's own code, among what training runs."""
    return (
        config.model.name,
        config.adapter.name,
        config.optim.name,
        config.schedule.name,
        config.train.loss.name,
        *_reward_names(config),
    )


def _reward_names(config: Config) -> list[str]:
    if loss_row(config.train.loss.name).takes != "prompts":
        return []
    return [each["name"] for each in config.train.loss.options["rewards"]]
