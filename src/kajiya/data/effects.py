"""Settings that change nothing for rows of some formats, or under some packings: said where they are set nevertheless."""

from collections.abc import Mapping
from typing import Any

from kajiya.config.schema import DataConfig
from kajiya.errors import ConfigError

_PAIRS = ("instruction", "preference", "feedback")
_FORMATS: Mapping[str, tuple[str, ...]] = {
    "train_on": ("chat", "instruction"),
    "prompt_style": ("prompt", *_PAIRS),
    "append_eos": ("chat", *_PAIRS),
}
"""Formats for which a setting of `data.render` has an effect; the template is saved with every tokenizer."""
_PACKINGS: Mapping[str, tuple[str, ...]] = {
    "max_tokens": ("best_fit", "bucketed"),
    "on_long": ("best_fit", "bucketed"),
    "isolate": ("concatenate",),
}
"""Packings under which a setting of `data` has an effect."""


def require_effect(config: DataConfig, form: str, packing: str) -> None:
    """Raise `ConfigError` for a setting that is not its default and changes nothing for rows of that format and packing."""
    plain = DataConfig()
    for name, formats in _FORMATS.items():
        _require(f"data.render.{name}", config.render, plain.render, f"{form} rows", is_read=form in formats)
    for name, packings in _PACKINGS.items():
        _require(f"data.{name}", config, plain, f"{form} rows with the packing {packing}", is_read=packing in packings)


def _require(field: str, given: Any, plain: Any, rows: str, *, is_read: bool) -> None:
    name = field.rpartition(".")[2]
    value, default = getattr(given, name), getattr(plain, name)
    if value != default and not is_read:
        said, left = (_said(each) for each in (value, default))
        raise ConfigError(field, f"{said} changes nothing for {rows}", f"Leave it at {left}.")


def _said(value: Any) -> str:
    return {True: "true", False: "false", None: "null"}.get(value, str(value))
