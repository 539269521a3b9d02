"""Load weights that Transformers knows, from a folder or the hub; safetensors only."""

from pathlib import Path
from typing import Any

import torch

from kajiya.errors import ConfigError, StoreError
from kajiya.models.attention import attention_name
from kajiya.run.process import quiet_transformers


def load_model(
    path: str | Path,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    trust_remote_code: bool = False,
) -> Any:
    """A causal language model in `dtype` on the CPU, in evaluation mode, from a folder or a hub name.

    Raises `ConfigError` when there is no such model, `StoreError` when its weights are not safetensors or do not fit.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(path)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        found = ", ".join(sorted(p.name for p in folder.glob("*.bin"))) or "no weights"
        raise StoreError(f"{folder}: has {found}; only safetensors are loaded, since a pickle can run code")
    quiet_transformers()
    try:
        architecture = AutoConfig.from_pretrained(
            path, revision=revision or "main", trust_remote_code=trust_remote_code
        )
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            revision=revision or "main",
            dtype=dtype,
            attn_implementation=attention_name(attention, architecture),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except OSError as error:
        first = str(error).splitlines()[0]
        raise ConfigError(
            "model.path", f"{str(path)!r} cannot be loaded: {first}", "Give a folder or a hub name."
        ) from error
    model, report = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            names = ", ".join(sorted(str(name) for name in report[kind])[:3])
            raise StoreError(
                f"{path}: the weights do not fit the config: {len(report[kind])} {kind.replace('_', ' ')} ({names} …)"
            )
    return model.eval()


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that the folder's config says its weights are stored in; float32 where it says nothing."""
    from kajiya.run.files import read_json

    name = read_json(folder / "config.json").get("dtype") or "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
