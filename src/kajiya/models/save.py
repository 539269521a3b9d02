"""Save a model so that plain Transformers loads it."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from kajiya.run.process import quiet_transformers


def save_model(module: nn.Module, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write weights (safetensors, shared tensors once), config, generation config and tokenizer into `folder`.

    A Transformers model loads back with `AutoModelForCausalLM.from_pretrained`; a user's own module is written as
    `model.safetensors` under its own parameter names. Floating-point weights are stored in `dtype`.
    """
    from transformers import PreTrainedModel

    quiet_transformers()
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to(dtype).contiguous() if tensor.is_floating_point() else tensor.detach()
        for name, tensor in module.state_dict().items()
    }
    if isinstance(module, PreTrainedModel):
        module.config.dtype = dtype
        use_cache = module.config.use_cache
        module.config.use_cache = True
        module.save_pretrained(folder, state_dict=weights)
        module.config.use_cache = use_cache
    else:
        from safetensors.torch import save_file

        save_file(_without_shared(module, weights), folder / "model.safetensors")
    tokenizer.save_pretrained(folder)


def _without_shared(module: nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each shared tensor under its first name only, as `safetensors` requires."""
    first: dict[int, str] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        first.setdefault(id(tensor), name)
    return {name: weights[name] for name in first.values()}
