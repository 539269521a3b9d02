"""Prefix and prompt tuning: tokens that are not there, seen by every document and trained alone, a new head beside them.

PEFT's own forward pass of these two drops positions and masks, and so mixes the documents of a packed row. Here every document sees
the virtual tokens right before its first token, at the positions that PEFT gives them, and nothing of the others; a document alone
in its row gives what `PeftModel` gives. Whole texts for a head, and the pairs of an encoder–decoder, are padded as PEFT's are; of
the latter a prompt stands before the encoder's text, a prefix before the decoder's.

Shape letters: B rows, T tokens, S texts, N tokens of the longest, P virtual tokens, L layers, K key heads, H head width, D hidden
width.
"""

import inspect
from typing import Any

import torch
from torch import nn

from kajiya.errors import ConfigError
from kajiya.models.attention import PACKED_SDPA

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

    def padded_inputs(self, model: Any, tokens: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
        """The arguments of a forward pass over texts of their own, int64 [S, N], padded on the right where `mask` is false."""
        if not self.is_prefix:
            return self._prompted(model, tokens, mask) | {"use_cache": False}
        cache = self._cache(model, len(tokens))
        return {
            "input_ids": tokens,
            "attention_mask": self._longer(mask),
            cache_argument(model): cache,
            "use_cache": False,
        }

    def paired_inputs(self, model: Any, tokens: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
        """Those of an encoder–decoder for its encoder's texts, and for its decoder what comes before its first token."""
        from transformers import DynamicCache, EncoderDecoderCache

        if not self.is_prefix:
            return self._prompted(model, tokens, mask)
        cache = EncoderDecoderCache(self._cache(model, len(tokens)), DynamicCache())
        return {"input_ids": tokens, "attention_mask": mask.long(), cache_argument(model): cache}

    def _prompted(self, model: Any, tokens: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
        embeddings = model.get_input_embeddings()(tokens)
        # PEFT's own config for an encoder–decoder has twice as many, and uses the first half.
        prompt = self.embedding.weight[: self.count].to(embeddings.dtype).expand(len(tokens), -1, -1)
        return {"inputs_embeds": torch.cat([prompt, embeddings], dim=1), "attention_mask": self._longer(mask)}

    def _longer(self, mask: torch.Tensor) -> torch.Tensor:
        return torch.cat([mask.new_ones(len(mask), self.count), mask], dim=1).long()

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
            # PEFT deals its numbers out to an encoder–decoder's two kinds of attention in turns, and the decoder gets every other.
            place = layer * config.num_transformer_submodules % config.num_layers
            key, value = (parts[2 * place + side].expand(n_rows, -1, -1, -1) for side in (0, 1))
            cache.update(key, value, layer)
        return cache


def cache_argument(model: Any) -> str:
    """The name under which the model's forward pass takes keys and values: `cache`, or in older Transformers `past_key_values`."""
    return "cache" if "cache" in inspect.signature(model.base_model.forward).parameters else "past_key_values"


def virtual_tokens(model: nn.Module) -> VirtualTokens | None:
    """The virtual tokens in force, or `None`."""
    found = model._modules.get(ATTRIBUTE)
    return found if isinstance(found, VirtualTokens) and not found.is_off else None


def attach(model: Any, config: Any, weight: torch.Tensor, name: str = "default") -> None:
    """Freeze the model and give it virtual tokens, and heads of their own where the config has `modules_to_save`.

    `config` is PEFT's, filled in for the model; `name` that of the adapter.
    """
    from peft.utils import set_additional_trainable_modules

    model.requires_grad_(False)
    model.add_module(ATTRIBUTE, VirtualTokens(config, weight))
    model.peft_config = {name: config}
    set_additional_trainable_modules(model, config, None, name)


def begin_as(model: Any, ids: list[int], field: str) -> None:
    """Give a prompt's tokens the embeddings of these, from the first again where they are fewer, as PEFT does.

    Raises `ConfigError` naming `field` where there is none.
    """
    if not ids:
        raise ConfigError(field, "has no token that virtual ones could begin as", "Give it a text, or leave it out.")
    weight = model._modules[ATTRIBUTE].embedding.weight
    weight.data.copy_(embeddings(model, torch.tensor(ids).repeat(-(-len(weight) // len(ids)))[: len(weight)]))


def embeddings(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What the model's blocks read of those tokens, float32 [n, D]: of some architectures the table's rows times √D."""
    with torch.no_grad():
        found: torch.Tensor = model.get_input_embeddings()(ids)
    return found.float().clone()


def heads(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """What the adapter of that name trains whole beside its virtual tokens, as PEFT names it in its files."""
    return {
        f"base_model.{path}.{key}": tensor
        for path, part in model.named_modules()
        if "modules_to_save" in part._modules
        for key, tensor in part.modules_to_save[name].state_dict().items()  # type: ignore[index,operator,union-attr]
    }


def take_heads(model: nn.Module, tensors: dict[str, torch.Tensor], name: str) -> None:
    """Give them other values, by the same names."""
    with torch.no_grad():
        for key, tensor in heads(model, name).items():
            tensor.copy_(tensors[key])


def require_place(module: Any, name: str, task: str | None) -> None:
    """Raise `ConfigError` for a model in which virtual tokens have no place; `task` is what PEFT calls its use."""
    from transformers import PreTrainedModel

    is_known = isinstance(module, PreTrainedModel)
    if is_known and task == "SEQ_2_SEQ_LM":
        return
    if is_known and task == "SEQ_CLS" and "score" in module._modules and not module.config.is_encoder_decoder:
        return
    if not is_known or task != "CAUSAL_LM":
        raise ConfigError(
            "adapter.name",
            f"{name} puts tokens before a text that is read from left to right, and {type(module).__name__} is no causal model of "
            "Transformers, none with a head over its last token, and no encoder–decoder",
            "Set adapter.name=lora.",
        )
    attention = module.config._attn_implementation
    if attention != PACKED_SDPA:
        raise ConfigError(
            "adapter.name",
            f"{name} needs attention by sdpa, and {type(module).__name__} is computed by {attention}",
            "Set model.attention=sdpa; an architecture that has none of it takes adapter.name=lora.",
        )


def filled_config(model: Any, config: Any) -> Any:
    """PEFT's config with the model's own sizes."""
    from peft.utils.other import _prepare_prompt_learning_config

    if model.config.is_encoder_decoder:
        _take_decoder_sizes(model.config, config)
    filled = _prepare_prompt_learning_config(config, model.config)
    filled.num_transformer_submodules = filled.num_transformer_submodules or (
        2 if config.task_type == "SEQ_2_SEQ_LM" else 1
    )
    return filled


def _take_decoder_sizes(architecture: Any, config: Any) -> None:
    """Fill a prefix's sizes with those of the decoder, before whose text it stands: PEFT takes the encoder's, and D / K for H."""
    if config.peft_type.value != "PREFIX_TUNING" or config.token_dim is not None:
        return
    named = vars(architecture)
    if "d_kv" in named:
        config.num_layers, config.num_attention_heads = architecture.num_decoder_layers, architecture.num_heads
        config.token_dim = architecture.num_heads * architecture.d_kv
    elif "decoder_layers" in named:
        config.num_layers, config.num_attention_heads = (
            architecture.decoder_layers,
            architecture.decoder_attention_heads,
        )
        config.token_dim = architecture.d_model
    else:
        raise ConfigError(
            "adapter.name",
            f"prefix does not know the sizes of the decoder of {architecture.model_type}",
            "Set adapter.name=prompt or lora.",
        )
