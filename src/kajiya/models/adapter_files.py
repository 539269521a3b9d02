"""Adapter folders: as PEFT's own, and beside its two files the digest of the weights that the adapter belongs to."""

import copy
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kajiya.errors import ConfigError, StoreError
from kajiya.models.injection import BEGINNING, inject, takes_from_base
from kajiya.models.origin import Origin, origin_of
from kajiya.models.tasks import CAUSAL, CLASS_HEADS, Task
from kajiya.models.virtual_tokens import ATTRIBUTE, attach, filled_config, heads, take_heads
from kajiya.models.weights_digest import weights_digest
from kajiya.run.files import read_json, write_json
from kajiya.run.tensor_headers import read_header

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_BASE = "base.json"
_WHOLE = ("embed_tokens", "embed_tokens.base_layer", "lm_head", "lm_head.base_layer", "wte", "wte.base_layer")
"""Ends of the names of embeddings and heads in PEFT's files."""
_SHARING = ("VERA", "PVERA", "VBLORA", "TINYLORA", "UNILORA", "FROD")
"""Kinds of PEFT whose layers share matrices that are kept beside the model and not in it."""
_PREFIX = "base_model.model."
"""What PEFT puts before the names of the model's own modules."""


@dataclass(frozen=True)
class Base:
    """The weights that an adapter belongs to."""

    path: str
    """Their folder, relative to the adapter's or absolute, or a hub name."""
    digest: str
    """`weights_digest` of them."""
    quantize: str
    """In which form they were trained beside (`model.quantize`; nf4-experts: nf4 with a mixture's experts)."""
    labels: tuple[str, ...] = ()
    """Names of the classes that the adapter's head tells apart; the base knows none of them."""
    n_tokens: int | None = None
    """Tokens of the adapter's tokenizer, where some were added to the base's: the base's embedding grows to as many rows."""
    n_added: int = 0
    """How many were added: the last of them."""


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter, and no whole model."""
    return (folder / ADAPTER_CONFIG).is_file()


def is_mergeable(folder: Path) -> bool:
    """Whether the adapter in the folder is a change of weights; virtual tokens are none."""
    return read_json(folder / ADAPTER_CONFIG)["peft_type"] not in ("PREFIX_TUNING", "PROMPT_TUNING")


def save_adapter(module: Any, tokenizer: Any, folder: Path, base: Base, name: str = "default") -> None:
    """Write the adapter so that plain `PeftModel.from_pretrained` loads it onto the base; the base's own weights are not in it."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(module.peft_config[name])
    tensors = _tensors(module, name)
    if takes_from_base(config):
        tensors = _beside_the_whole_base(module, config, tensors)
    config.inference_mode = True
    config.base_model_name_or_path = str((folder / base.path).resolve()) if _is_path(base.path) else base.path
    config.save_pretrained(str(folder))
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    write_json(folder / _BASE, asdict(base))
    tokenizer.save_pretrained(folder)


def read_base(folder: Path) -> Base | None:
    """The base that the adapter names by digest; `None` for one that another tool made."""
    if not (folder / _BASE).is_file():
        return None
    listed = read_json(folder / _BASE)
    return Base(**listed | {"labels": tuple(listed.get("labels", ()))})


def adapter_task(folder: Path, base: Path) -> Task:
    """The head that the adapter in `folder` was trained with: what its config calls its use, or what its base has."""
    kind = read_json(folder / ADAPTER_CONFIG).get("task_type")
    if kind is None and (base / "config.json").is_file():
        saved = read_json(base / "config.json").get("architectures") or []
        return Task("masked") if any(name.endswith("ForMaskedLM") for name in saved) else CAUSAL
    if kind == "SEQ_CLS":
        n_outputs = _n_outputs(folder)
        if n_outputs == 1:
            return Task("score")
        named = read_base(folder)
        labels = named.labels if named is not None else ()
        # As Transformers calls classes that nobody has named; of a head that is the base's own, the base names them.
        return Task("classes", labels or tuple(f"LABEL_{number}" for number in range(n_outputs)))
    return Task("seq2seq") if kind == "SEQ_2_SEQ_LM" else CAUSAL


def brings_head(folder: Path) -> bool:
    """Whether the adapter's own tensors hold a head over whole texts."""
    return _n_outputs(folder) > 0


def _n_outputs(folder: Path) -> int:
    """Outputs of the head over whole texts that the adapter brings along; 0 where it brings none."""
    heads = [
        entry["shape"][0]
        for name, entry in read_header(folder / _WEIGHTS)[1].items()
        if name.endswith(".weight") and set(CLASS_HEADS) & set(name.split("."))
    ]
    # Of a head of several layers the last is the narrowest.
    return min(heads, default=0)


def base_folder(folder: Path, given: str | None = None) -> Path:
    """Folder of the adapter's base (for a hub name that of the hub's cache), checked against its digest.

    `given` is one to use in the place of that which the adapter names.

    Raises `StoreError` when it is not there, or is another than the adapter was trained on.
    """
    base = read_base(folder)
    path = given or (base.path if base else read_json(folder / ADAPTER_CONFIG)["base_model_name_or_path"])
    if not path:
        raise StoreError(f"{folder}: the adapter does not say which model it belongs to.\nName it with --base.")
    found = Path(os.path.normpath(folder / path)) if given is None and (folder / path).is_dir() else Path(path)
    if not found.is_dir():
        if _is_path(str(path)):
            raise StoreError(f"{folder}: its base {path} is not there.\nPut it back, or name it with --base.")
        found = hub_folder(str(path))
    check_base(folder, found)
    return found


def hub_folder(name: str, revision: str | None = None) -> Path:
    """The weights of that hub name in the hub's cache, fetched where they are not in it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise StoreError(f"{name!r} cannot be had from the hub: {str(error).splitlines()[0]}") from error


def check_base(folder: Path, base: Path) -> None:
    """Raise `StoreError` when the weights in `base` are not those that the adapter in `folder` names."""
    named = read_base(folder)
    if named is None:
        return
    found = weights_digest(base)
    if found != named.digest:
        raise StoreError(
            f"{folder}: this adapter belongs to weights of digest {named.digest[:12]}, and those in {base} have {found[:12]}.\n"
            "On another base it would compute nonsense without a sign."
        )


def check_origin(folder: Path, origin: Origin | None) -> None:
    """Raise `StoreError` when the adapter in `folder` was trained beside other weights than those of that origin, or beside the
    same ones in other bits; and when it cannot be told, as the weights are of no folder.

    The weights are hashed here alone, once a process, and not at all for an adapter of another tool, which names no base.
    """
    named = read_base(folder)
    if named is None:
        return
    if origin is None:
        raise StoreError(
            f"{folder}: this adapter belongs to weights of digest {named.digest[:12]}, and those of the model are of no "
            f"folder that could be compared.\nOpen the base that it names: {named.path}."
        )
    found = Path(origin.path)
    check_base(folder, found if found.is_dir() else hub_folder(origin.path, origin.revision))
    if (origin.quantize, named.quantize) == ("nf4-experts", "nf4"):
        raise StoreError(
            f"{folder}: this adapter was trained beside experts that were not in 4 bits (model.quantize=nf4 left them whole then), "
            "and the model's are: other numbers, beside which it would compute something else.\n"
            "Merge it (kajiya merge, which opens it beside whole ones) and begin from the result, or set model.quantize=none."
        )
    if origin.quantize != named.quantize:
        raise StoreError(
            f"{folder}: this adapter was trained with model.quantize={named.quantize}, and the model's weights are with "
            f"model.quantize={origin.quantize}: other numbers, beside which it would compute something else.\n"
            "Merge it into those that it was trained beside (kajiya merge), or serve it as a model of its own; to train on, "
            f"set model.quantize={named.quantize.removesuffix('-experts')}."
        )


def load_adapter(module: Any, folder: Path, name: str = "default", *, is_trained: bool = False) -> None:
    """Put the adapter in `folder` beside the weights of `module`, under `name`; made by any tool that writes PEFT's files.

    Raises `StoreError` where its tensors do not fit, or where it names another base than the weights of `module`; `ConfigError`
    for a kind whose layers share matrices (VeRA).
    """
    from peft import PeftConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    if not is_adapter(folder) or not (folder / _WEIGHTS).is_file():
        if (folder / _PICKLE).is_file():
            raise StoreError(
                f"{folder}: its weights are in {_PICKLE} alone; only safetensors are loaded, since a pickle can run code.\n"
                'Where you trust it, let PEFT write it anew: python -c "from peft import AutoPeftModelForCausalLM as A; '
                f"A.from_pretrained('{folder}').save_pretrained('{folder}')\""
            )
        raise StoreError(f"{folder}: no adapter is there ({ADAPTER_CONFIG} and {_WEIGHTS})")
    check_origin(folder, origin_of(module))
    config = PeftConfig.from_pretrained(str(folder))
    _require_own_matrices(folder, config)
    config.inference_mode = not is_trained
    tensors = {key.removeprefix(_PREFIX): tensor for key, tensor in load_file(folder / _WEIGHTS).items()}
    if config.is_prompt_learning:
        attach(module, filled_config(module, config), tensors["prompt_embeddings"].float(), name)
        module._modules[ATTRIBUTE].requires_grad_(is_trained)
        del tensors["prompt_embeddings"]
        if heads(module, name).keys() != tensors.keys():
            odd = sorted(heads(module, name).keys() ^ tensors.keys())[0]
            raise StoreError(
                f"{folder}: the tensor {odd!r} is in the adapter or among the model's heads, but not in both"
            )
        take_heads(module, tensors, name)
        return
    # Where head and embedding are trained as one, both are the adapter's under either name.
    is_tied = bool(vars(config).get("ensure_weight_tying"))
    embeddings = {} if is_tied else _embeddings(tensors, tuple(config.modules_to_save or ()))
    if embeddings:
        _take_embeddings(module, embeddings, folder, is_alone=not is_trained and "peft_config" not in vars(module))
    inject(module, config, name)
    expected = set(_tensors(module, name, with_prefix=False))
    tensors = {key: tensor for key, tensor in tensors.items() if key in expected or key not in embeddings}
    if expected != tensors.keys():
        odd = sorted(expected ^ tensors.keys())[0]
        raise StoreError(
            f"{folder}: the tensor {odd!r} is in the adapter or in the model's layers for it, but not in both"
        )
    set_peft_model_state_dict(module, tensors, name)


def _require_own_matrices(folder: Path, config: Any) -> None:
    """Raise `ConfigError` for an adapter whose layers share matrices, which PEFT keeps in a model of its own around this one."""
    if config.peft_type.value not in _SHARING:
        return
    raise ConfigError(
        "adapter",
        f"{folder}: it is of the kind {config.peft_type.value}, whose layers all share matrices; such are not computed here",
        'Merge it with PEFT first: python -c "from peft import AutoPeftModelForCausalLM as A; '
        f"A.from_pretrained('{folder}').merge_and_unload().save_pretrained('{folder}-merged')\""
        " and give the folder that this writes (with the tokenizer of the base in it).",
    )


def _embeddings(tensors: dict[str, torch.Tensor], trained: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Whole embeddings and heads among an adapter's tensors, which PEFT saves along where it adapts or has resized them; not those
    that the adapter has `trained` whole."""
    named = {key: key.removesuffix(".weight") for key in tensors}
    return {key: tensors[key] for key, path in named.items() if path.endswith(_WHOLE) and not path.endswith(trained)}


def _take_embeddings(module: Any, found: dict[str, torch.Tensor], folder: Path, *, is_alone: bool) -> None:
    """Give the model's own embedding and head the values of those in the adapter's file, and as many rows.

    Those that it has already are nothing new. Others make it another base, which no second adapter may stand beside and none
    that is trained on: `StoreError`, unless `is_alone`.
    """
    for key, tensor in found.items():
        path = key.removesuffix(".weight").removesuffix(".base_layer")
        layers = {name: part for name, part in module.named_modules() if name == path}
        if not layers:
            continue  # named as what is in one of the two alone
        part: Any = layers[path]
        own = part.get_base_layer().weight if "base_layer" in part._modules else part.weight
        if own.shape == tensor.shape and torch.equal(own.detach().cpu(), tensor.to(own.dtype)):
            continue
        if not is_alone:
            raise StoreError(
                f"{folder}: it brings an embedding or head of its own ({key}, {len(tensor)} rows beside {len(own)}), and so "
                "another base.\nMake one model of both first (kajiya merge), and train or serve that."
            )
        if len(own) != len(tensor):
            module.resize_token_embeddings(len(tensor), mean_resizing=False)
        with torch.no_grad():
            module.get_submodule(path).weight.copy_(tensor)


def _tensors(module: Any, name: str, *, with_prefix: bool = True) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the names that PEFT's files give them."""
    from peft import get_peft_model_state_dict

    if ATTRIBUTE in module._modules:
        virtual = {"prompt_embeddings": module._modules[ATTRIBUTE].embedding.weight}
        return virtual | heads(module, name)
    # Whether the embedding is saved is the config's word (modules_to_save), not a look at the hub.
    own = get_peft_model_state_dict(module, adapter_name=name, save_embedding_layers=False)
    prefix = _PREFIX if with_prefix else ""
    return {f"{prefix}{key}": tensor for key, tensor in own.items() if not key.endswith(BEGINNING)}


def _beside_the_whole_base(module: nn.Module, config: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same change as matrices of twice the rank beside weights that nothing was taken out of: BA − B₀A₀.

    As PEFT converts PiSSA and OLoRA (arXiv:2404.02948, section 3 and appendix).
    """
    converted = dict(tensors)
    for path, part in module.named_modules():
        if BEGINNING[0] not in part._buffers:
            continue
        first, second = (f"{_PREFIX}{path}.lora_{side}.weight" for side in "AB")
        converted[first] = torch.cat([tensors[first], part._buffers[BEGINNING[0]]], dim=0)
        converted[second] = torch.cat([tensors[second], -part._buffers[BEGINNING[1]]], dim=1)
    config.init_lora_weights = True
    # The scale stays: alpha / r, or alpha / √r.
    config.lora_alpha *= 2**0.5 if config.use_rslora else 2
    config.r *= 2
    return converted


def _is_path(name: str) -> bool:
    return name.startswith((".", "/")) or name.count("/") != 1
