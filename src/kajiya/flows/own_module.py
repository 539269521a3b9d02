"""A user's own module, built again from its config with the weights of a model artifact."""

import torch

from kajiya.config.schema import Config
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
