"""Load weights that Transformers knows, from a folder or the hub; safetensors only."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from kajiya.errors import ConfigError, StoreError
from kajiya.models.attention import attention_name
from kajiya.models.origin import Origin, set_origin
from kajiya.models.quantized import form_of, quantize
from kajiya.models.quantized_loading import while_reading
from kajiya.models.stored_bits import as_plain, require_read, stored_by
from kajiya.models.tasks import CAUSAL, Task, auto_class, require_architecture
from kajiya.run.process import import_transformers, quiet_transformers
from kajiya.run.tensor_headers import read_header

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of weights, by the names that settings have for them."""


def load_model(
    path: str | Path,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    trust_remote_code: bool = False,
    task: Task = CAUSAL,
    needs_head: bool = False,
    quantized: str = "none",
) -> Any:
    """A model with the task's head, in `dtype` on the CPU, in evaluation mode, from a folder or a hub name.

    With `quantized` (`model.quantize`) each weight is quantized as soon as it is read. Weights that bitsandbytes has stored in few
    bits become the plain ones that they stand for.

    A head over a whole text that the weights lack begins at random, from torch's generator, unless `needs_head`. Raises
    `ConfigError` when there is no such model or head, or it is stored in few bits otherwise, `StoreError` when its weights are
    not safetensors or do not fit.
    """
    folder = Path(path)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        found = ", ".join(sorted(p.name for p in folder.glob("*.bin"))) or "no weights"
        raise StoreError(f"{folder}: has {found}; only safetensors are loaded, since a pickle can run code")
    import_transformers()
    from safetensors import SafetensorError

    quiet_transformers()
    architecture = read_architecture(path, revision, trust_remote_code)
    if not trust_remote_code:
        require_architecture(task, architecture, "model.path")
    if quantized != "none" and "quantization_config" in vars(architecture):
        raise ConfigError(
            "model.quantize",
            f"is {quantized}, and the weights of {str(path)!r} are stored in few bits already",
            "Set model.quantize=none, or name the weights that they were made of.",
        )
    method = stored_by(architecture)
    if method is not None:
        require_read(method, path)
    try:
        loaded: Any = auto_class(task).from_pretrained(
            path,
            **_head_fields(task, architecture),
            revision=revision or "main",
            dtype=dtype,
            attn_implementation=attention_name(attention, architecture, task),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            # They are in the report, and an error below.
            ignore_mismatched_sizes=True,
            # Said at all, even as `None`, it takes the place of what the checkpoint's own config says of its few bits.
            **({} if quantized == "none" else {"quantization_config": while_reading(quantized)}),
            **({} if method is None else {"device_map": "cpu"}),
        )
    except (OSError, SafetensorError) as error:
        raise _not_loaded(path, error) from error
    model, report = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in report[kind])
        if task.has_new_head:
            # Of a model of text, what lies outside its body is the old head or the new one.
            heads = [name for name in names if not name.startswith(f"{model.base_model_prefix}.")]
            if needs_head and heads and kind != "unexpected_keys":
                raise ConfigError(
                    "model.path",
                    f"{str(path)!r} has no such head over a whole text: no {heads[0]} that fits is in its weights",
                )
            heads = heads if kind != "mismatched_keys" else []
            names = [name for name in names if name not in heads and ".pooler." not in name]
        if names:
            listed = ", ".join(names[:3])
            raise StoreError(
                f"{path}: the weights do not fit the config: {len(names)} {kind.replace('_', ' ')} ({listed} …)"
            )
    if method is not None:
        model = as_plain(model, dtype)
    set_origin(model, Origin(str(folder.resolve()) if folder.is_dir() else str(path), revision))
    return quantize(model, form_of(model, quantized)).eval()


def read_architecture(path: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The config of the model at a folder or a hub name. Raises `ConfigError` where Transformers cannot read one."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, revision=revision or "main", trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise _not_loaded(path, error) from error


def _not_loaded(path: str | Path, error: Exception) -> ConfigError:
    first = str(error).splitlines()[0]
    return ConfigError("model.path", f"{str(path)!r} cannot be loaded: {first}", "Give a folder or a hub name.")


def _head_fields(task: Task, architecture: Any) -> dict[str, Any]:
    """Fields of the head that are set over the folder's own: those of a folder that has such a head already are kept."""
    saved = architecture.architectures or []
    if task.name == "classes" and not task.labels:
        return {}
    is_same = any(name.endswith("ForSequenceClassification") for name in saved)
    if is_same and task.name == "classes" and len(task.labels) == architecture.num_labels:
        return {}
    return task.config_fields()


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of most of the weights in `folder`, as its files say it, whatever its config does.

    Raises `StoreError` for one that Kajiya does not compute in (8 bits, float64).
    """
    counts: Counter[str] = Counter()
    for path in folder.glob("*.safetensors"):
        for entry in read_header(path)[1].values():
            counts[entry["dtype"]] += math.prod(entry["shape"])
    if not counts:
        raise StoreError(f"{folder}: has no weights; only safetensors are loaded")
    most = counts.most_common(1)[0][0]
    if most not in _DTYPES:
        raise StoreError(
            f"{folder}: its weights are stored as {most}, not one of {', '.join(_DTYPES)}.\n"
            "Load them with Transformers and save them in one of these."
        )
    return _DTYPES[most]


_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""By the names that safetensors files give them."""
