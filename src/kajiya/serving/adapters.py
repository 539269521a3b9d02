"""LoRA adapters as PEFT saves them, read without PEFT."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kajiya.errors import ConfigError, StoreError
from kajiya.models.adapter_files import check_origin
from kajiya.models.origin import Origin
from kajiya.run.files import read_json

_PREFIX = "base_model.model."
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "bias": (None, "none"),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (None, False),
    "alora_invocation_tokens": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "lora_bias": (None, False),
    "use_qalora": (None, False),
    "use_bdlora": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    # Other beginnings (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ) were taken out of the base, which is whole here.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}
"""Settings of PEFT that the server does not compute, with the values that ask for nothing."""
_REMEDY = "Give a folder that PEFT has saved."


@dataclass(frozen=True)
class LowRank:
    """y += scale · B (A x), with A [rank, n_in] and B [n_out, rank] (Hu et al. 2021, §4.1)."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


@dataclass(frozen=True)
class LoraAdapter:
    """The low-rank parts of an adapter by the full name of the module that each changes."""

    folder: Path
    parts: Mapping[str, LowRank]
    """Module name, for example `model.layers.0.self_attn.q_proj`, → its part."""


def is_adapter(folder: Path) -> bool:
    """Whether this is a folder that PEFT has saved an adapter in."""
    return (folder / "adapter_config.json").is_file()


def read_adapter(folder: Path, shapes: Mapping[str, tuple[int, ...]], origin: Origin | None) -> LoraAdapter:
    """The adapter in `folder`; `shapes` has the model's weight names and shapes, `origin` says where the weights are from.

    Raises `ConfigError` for a folder that is none, a kind of adapter that is not plain LoRA, or one made for another model;
    also where it names other weights by digest, or was trained beside the same ones in other bits.
    """
    settings = _settings(folder)
    if settings.get("peft_type") != "LORA":
        raise ConfigError(
            "adapter",
            f"{folder}: {settings.get('peft_type')} adapters are not served",
            "Merge it into its model (kajiya merge) and serve that.",
        )
    for name, neutral in _NEUTRAL.items():
        if settings.get(name) not in neutral:
            raise ConfigError(
                "adapter",
                f"{folder}: {name}={settings[name]!r} is not served beside other adapters",
                "Merge it into its model (kajiya merge) and serve that.",
            )
    tensors = _tensors(folder)
    parts = {}
    for name in sorted(tensors):
        if not name.endswith(".lora_A.weight"):
            if not name.endswith(".lora_B.weight"):
                raise ConfigError("adapter", f"{folder}: it has {name!r}, which is no part of a plain LoRA adapter")
            continue
        module = name.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        a, b = tensors[name], tensors.get(name.replace("lora_A", "lora_B"))
        if b is None or b.shape[1] != a.shape[0]:
            raise ConfigError("adapter", f"{folder}: {name} has no lora_B of its rank, {a.shape[0]}", _REMEDY)
        expected = shapes.get(f"{module}.weight")
        if expected != (b.shape[0], a.shape[1]):
            has = "has no such module" if expected is None else f"has {list(expected)} there"
            raise ConfigError(
                "adapter",
                f"{folder}: it changes {module} of shape {[b.shape[0], a.shape[1]]}, but the model {has}",
                "Serve it with the model that it was made for.",
            )
        try:
            parts[module] = LowRank(a, b, _scale(settings, module, a.shape[0]))
        except re.error as error:
            raise ConfigError("adapter", f"{folder}: alpha_pattern has a key that is no pattern: {error}") from error
    try:
        check_origin(folder, origin)
    except StoreError as error:
        raise ConfigError("adapter", str(error)) from error
    return LoraAdapter(folder, parts)


def _settings(folder: Path) -> Mapping[str, Any]:
    if not is_adapter(folder):
        raise ConfigError("adapter", f"{str(folder)!r} has no adapter_config.json", _REMEDY)
    try:
        settings = read_json(folder / "adapter_config.json")
    except StoreError as error:
        raise ConfigError("adapter", str(error), _REMEDY) from error
    if not isinstance(settings, dict):
        raise ConfigError("adapter", f"{folder}: adapter_config.json is no JSON object", _REMEDY)
    if settings.get("peft_type") == "LORA" and not isinstance(settings.get("lora_alpha"), int | float):
        problem = f"{folder}: lora_alpha must be a number, not {settings.get('lora_alpha')!r}"
        raise ConfigError("adapter", problem, _REMEDY)
    return settings


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise ConfigError("adapter", f"{folder}: {path.name} is missing; only safetensors are loaded", _REMEDY)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ConfigError("adapter", f"{path} is broken: {error}", _REMEDY) from error


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    # Keys are regular expressions, of which the first that fits holds, as in PEFT's `get_pattern_key`.
    patterns = settings.get("alpha_pattern") or {}
    fitting = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    alpha = float(next(fitting, settings["lora_alpha"]))
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)
