"""What a training leaves on disk: the whole model, or the adapter and the name of its base."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from kajiya.config.schema import ModelConfig
from kajiya.models.adapt import has_adapter
from kajiya.models.adapter_files import Base, hub_folder, save_adapter
from kajiya.models.origin import origin_of
from kajiya.models.quantized import form_of
from kajiya.models.save import save_model
from kajiya.models.weights_digest import weights_digest


def save_trained(
    model: ModelConfig,
    module: nn.Module,
    tokenizer: Any,
    folder: Path,
    rebuild: Callable[[], nn.Module],
    n_added: int = 0,
) -> dict[str, Any]:
    """Write what was trained into `folder`; returns facts of it for a manifest.

    An adapter of a base without a folder of its own brings the base along in `base/`, which `rebuild()` makes again. `n_added`
    tokens, the last of the tokenizer, are not the base's.
    """
    if not has_adapter(module):
        save_model(module, tokenizer, folder)
        return {}
    if model.path is None:
        save_model(rebuild(), tokenizer, folder / "base")
        path, weights = "base", folder / "base"
    elif Path(model.path).is_dir():
        weights = Path(model.path)
        path = os.path.relpath(weights.resolve(), folder.resolve())
    else:
        path, weights = model.path, hub_folder(model.path, model.revision)
    # A base made here has rows for all tokens.
    grown = (len(tokenizer), n_added) if n_added and model.path is not None else (None, 0)
    origin = origin_of(module)
    form = form_of(module, model.quantize) if origin is None else origin.quantize
    base = Base(path, weights_digest(weights), form, _labels(module), *grown)
    save_adapter(module, tokenizer, folder, base)
    return {"base": {"path": base.path, "digest": base.digest, "quantize": base.quantize}}


def _labels(module: nn.Module) -> tuple[str, ...]:
    """Names of the classes that a head over whole texts tells apart; none for every other head."""
    from transformers import PreTrainedModel

    if not isinstance(module, PreTrainedModel) or not type(module).__name__.endswith("ForSequenceClassification"):
        return ()
    config: Any = module.config
    return tuple(str(config.id2label[number]) for number in range(config.num_labels)) if config.num_labels > 1 else ()
