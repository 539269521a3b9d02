"""Prefix and prompt tuning on packed rows: tokens that are not there, seen by every document of a row and trained alone.

PEFT's own forward pass of these two drops positions and masks, and so mixes the documents of a row. Here every document sees the
virtual tokens right before its first token, at the positions that PEFT gives them, and nothing of the others; a document alone in
its row gives what `PeftModel` gives.

Shape letters: B rows, T tokens, P virtual tokens, L layers, K key heads, H head width, D hidden width.
"""

import inspect
from typing import Any

import torch
from torch import nn

ATTRIBUTE = "virtual_tokens"
"""Name of the module under which a model has its virtual tokens."""


class VirtualTokens(nn.Module):
    """The trained numbers: keys and values of each layer (prefix, [P, 2·L·K·H]) or embeddings (prompt, [P, D])."""

    def __init__(self, config: Any, weight: torch.Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding(weight.shape[0], weight.shape[1], _weight=weight)
        self.config = config
        self.is_off = False

    @property
    def is_prefix(self) -> bool:
        return str(self.config.peft_type.value) == "PREFIX_TUNING"

    @property
    def count(self) -> int:
        """P."""
        return int(self.config.num_virtual_tokens)

    def inputs(self, model: Any, given: dict[str, Any], mask: torch.Tensor) -> dict[str, Any]:
        """The keyword arguments `given` of a forward pass with the virtual tokens in front.

        `mask` is boolean [B, 1, T, T], true where a token may look.
        """
        n_rows, _, n_tokens, _ = mask.shape
        seen = torch.ones(n_rows, 1, n_tokens, self.count, dtype=torch.bool, device=mask.device)
        mask = torch.cat([seen, mask], dim=3)
        inputs = given | {"position_ids": given["position_ids"] + self.count}
        if self.is_prefix:
            return inputs | {cache_argument(model): self._cache(model, n_rows), "attention_mask": mask}
        embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
        prompt = self.embedding.weight.to(embeddings.dtype).expand(n_rows, -1, -1)
        own = torch.ones(self.count, self.count, dtype=torch.bool, device=mask.device).tril()
        above = torch.zeros(self.count, n_tokens, dtype=torch.bool, device=mask.device)
        top = torch.cat([own, above], dim=1).expand(n_rows, 1, -1, -1)
        places = torch.arange(self.count, device=mask.device).expand(n_rows, -1)
        return inputs | {
            "inputs_embeds": torch.cat([prompt, embeddings], dim=1),
            "position_ids": torch.cat([places, inputs["position_ids"]], dim=1),
            "attention_mask": torch.cat([top, mask], dim=2),
        }

    def strip(self, outputs: torch.Tensor) -> torch.Tensor:
        """Outputs [B, T, …] of the tokens that are there."""
        return outputs if self.is_prefix else outputs[:, self.count :]

    def _cache(self, model: Any, n_rows: int) -> Any:
        from transformers import DynamicCache

        config = self.config
        width = config.token_dim // config.num_attention_heads
        shape = (self.count, config.num_layers * 2, config.num_attention_heads, width)
        parts = self.embedding.weight.to(model.dtype).view(shape).permute(1, 2, 0, 3)
        cache = DynamicCache()
        for layer in range(config.num_layers):
            key, value = (parts[2 * layer + side].expand(n_rows, -1, -1, -1) for side in (0, 1))
            cache.update(key, value, layer)
        return cache


def cache_argument(model: Any) -> str:
    """The name under which the model's forward pass takes keys and values: `cache`, or in older Transformers `past_key_values`."""
    return "cache" if "cache" in inspect.signature(model.base_model.forward).parameters else "past_key_values"


def virtual_tokens(model: nn.Module) -> VirtualTokens | None:
    """The virtual tokens in force, or `None`."""
    found = model._modules.get(ATTRIBUTE)
    return found if isinstance(found, VirtualTokens) and not found.is_off else None


def attach(model: Any, config: Any, weight: torch.Tensor) -> None:
    """Freeze the model and give it virtual tokens; `config` is PEFT's, filled in for the model."""
    model.requires_grad_(False)
    model.add_module(ATTRIBUTE, VirtualTokens(config, weight))


def filled_config(model: Any, config: Any) -> Any:
    """PEFT's config with the model's own sizes."""
    from peft.utils.other import _prepare_prompt_learning_config

    filled = _prepare_prompt_learning_config(config, model.config)
    filled.num_transformer_submodules = filled.num_transformer_submodules or 1
    return filled
