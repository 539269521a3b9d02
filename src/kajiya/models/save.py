"""Save a model so that plain Transformers loads it."""

from pathlib import Path
from typing import Any

from torch import nn

from kajiya.run.process import quiet_transformers


def save_model(module: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write weights (safetensors, shared tensors once, in their own dtype), configs and tokenizer into `folder`.

    A Transformers model loads back with `AutoModelForCausalLM.from_pretrained`; a user's own module is written as
    `model.safetensors` under its own parameter names.
    """
    from transformers import PreTrainedModel

    quiet_transformers()
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(module, PreTrainedModel):
        use_cache = module.config.use_cache
        module.config.use_cache = True
        module.save_pretrained(folder)
        module.config.use_cache = use_cache
    else:
        from safetensors.torch import save_model as save_module

        save_module(module, str(folder / "model.safetensors"))
    tokenizer.save_pretrained(folder)
