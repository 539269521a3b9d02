"""Operations of a model's training step, and how fast this machine multiplies matrices: together, the utilization."""

import time

import torch
from torch import nn

from kajiya.models.quantized import n_values
from kajiya.training.precision import Precision

_SIZE = 1024
_ENOUGH_S = 0.15


def flops_per_token(model: nn.Module, row_tokens: float) -> float:
    """Operations of forward and backward pass a token, 6 N + 4 F + 12 L H Q T (PaLM, arXiv:2204.02311, appendix B).

    N counts the trained parameters of matrix products (all but an embedding that is not the head too), F the frozen ones:
    their products with the gradient of what they read are made, those of their own gradient are not. Of a mixture's experts a
    token's own count alone: k of E. The attention term (L layers of H heads of width Q over T tokens) is left out for a
    module that is not of Transformers.
    """
    from transformers import PreTrainedModel

    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if isinstance(head, nn.Linear):
        looked_up.discard(id(head.weight))
    multiplied = [(name, each) for name, each in model.named_parameters() if id(each) not in looked_up]
    share = experts_share(model)
    products = sum(
        n_values(each) * (6 if each.requires_grad else 4) * (share if ".experts." in name else 1.0)
        for name, each in multiplied
    )
    attention = 0.0
    if isinstance(model, PreTrainedModel):
        sizes = model.config.to_dict() | {
            name: getattr(model.config, name) for name in model.config.attribute_map if name in _SIZES
        }
        if all(isinstance(sizes.get(name), int) for name in _SIZES):
            width = sizes["hidden_size"]
            if isinstance(sizes.get("head_dim"), int) and isinstance(sizes.get("num_attention_heads"), int):
                width = sizes["head_dim"] * sizes["num_attention_heads"]
            attention = 12.0 * sizes["num_hidden_layers"] * width * row_tokens
    return float(products) + attention


_SIZES = ("hidden_size", "num_hidden_layers")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_top_k")
"""What Transformers' configs call the experts of a layer, and those of them that a token goes through."""


def experts_share(model: nn.Module) -> float:
    """Share of a layer's routed experts that a token goes through; 1 where the model's config names none."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return 1.0
    sizes = model.config.get_text_config().to_dict()
    n_experts, n_chosen = (
        next((sizes[name] for name in names if isinstance(sizes.get(name), int)), None) for names in (_EXPERTS, _CHOSEN)
    )
    return n_chosen / n_experts if n_experts and n_chosen else 1.0


def matmul_peak(device: torch.device, precision: Precision) -> float:
    """Operations a second of the fastest square matrix product seen in a moment, in the precision's product dtype."""
    dtype = precision.autocast or precision.weights
    size = _SIZE if device.type == "cpu" else 8 * _SIZE
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, spent, tries = float("inf"), 0.0, 0
    while spent < _ENOUGH_S or tries < 3:
        _wait(device)
        began = time.perf_counter()
        left @ right.mT  # as a linear layer multiplies: where a CPU has no fp16 of its own, other layouts are far slower
        _wait(device)
        seconds = time.perf_counter() - began
        best, spent, tries = min(best, seconds), spent + seconds, tries + 1
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
