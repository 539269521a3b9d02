"""What a training leaves on disk: the whole model, or the adapter and the name of its base."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from kajiya.config.schema import ModelConfig
from kajiya.models.adapt import has_adapter
from kajiya.models.adapter_files import Base, hub_folder, save_adapter
from kajiya.models.save import save_model
from kajiya.models.weights_digest import weights_digest


def save_trained(
    model: ModelConfig, module: nn.Module, tokenizer: Any, folder: Path, rebuild: Callable[[], nn.Module]
) -> dict[str, Any]:
    """Write what was trained into `folder`; returns facts of it for a manifest.

    An adapter of a base without a folder of its own brings the base along in `base/`, which `rebuild()` makes again.
    """
    if not has_adapter(module):
        save_model(module, tokenizer, folder)
        return {}
    if model.path is None:
        save_model(rebuild(), tokenizer, folder / "base")
        base = Base("base", weights_digest(folder / "base"), model.quantize)
    elif Path(model.path).is_dir():
        digest = weights_digest(Path(model.path))
        base = Base(os.path.relpath(Path(model.path).resolve(), folder.resolve()), digest, model.quantize)
    else:
        base = Base(model.path, weights_digest(hub_folder(model.path, model.revision)), model.quantize)
    save_adapter(module, tokenizer, folder, base)
    return {"base": {"path": base.path, "digest": base.digest, "quantize": base.quantize}}
