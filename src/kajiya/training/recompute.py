"""Activations that are computed again in the backward pass, or kept in the host's memory, instead of held."""

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from kajiya.errors import ConfigError


def recompute_activations(model: nn.Module, how: str, device: torch.device) -> None:
    """Set gradient checkpointing: off, full (only each block's input is kept), selective (its costly results too), offload.

    Offload is full with the inputs in the host's memory; only a GPU has another.
    """
    if how == "off":
        return
    if how == "offload" and device.type != "cuda":
        raise ConfigError(
            "train.gradient_checkpointing",
            f"offload moves activations from a GPU into the host's memory, and this is {device.type}",
            "Set train.gradient_checkpointing=full.",
        )
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or not model.supports_gradient_checkpointing:
        raise ConfigError("train.gradient_checkpointing", f"{type(model).__name__} does not support it")
    settings = {"use_reentrant": False} | ({"context_fn": _keep_costly()} if how == "selective" else {})
    # Transformers renamed it within version 5, and only the new one can move what it keeps.
    enable = vars(PreTrainedModel).get("activation_checkpointing_enable")
    if enable is None and how == "offload":
        raise ConfigError(
            "train.gradient_checkpointing",
            f"offload needs a newer Transformers than {version('transformers')}",
            "Install one (pip install -U transformers), or set train.gradient_checkpointing=full.",
        )
    if enable is None:
        model.gradient_checkpointing_enable(settings)
    else:
        enable(model, settings, offload=how == "offload")


def _keep_costly() -> Callable[[], Any]:
    """What selective checkpointing keeps: matrix products and attention; norms, activations and the like are made again."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    import kajiya.models.native.operators  # noqa: F401 (registers them)

    ops = torch.ops.aten
    kept = {
        ops.mm.default,
        ops.addmm.default,
        ops.bmm.default,
        ops._scaled_dot_product_flash_attention_for_cpu.default,
        ops._scaled_dot_product_flash_attention.default,
        ops._scaled_dot_product_efficient_attention.default,
        ops._scaled_dot_product_cudnn_attention.default,
        torch.ops.kajiya.attention.default,
        torch.ops.kajiya.rotary_attention.default,
    }

    def policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(create_selective_checkpoint_contexts, policy)
