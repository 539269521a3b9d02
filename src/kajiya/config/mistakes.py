"""Which of the settings that were given does not fit the schema, and the words for it."""

import types
import typing
from collections.abc import Iterable
from dataclasses import Field, dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from kajiya.config.schema import Config
from kajiya.config.setting import bounds_words
from kajiya.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    dict: "a mapping, for example {a: b}",
    tuple: "a list",
    types.NoneType: "null",
}
_SECTIONS = {item.name for item in fields(Config) if is_dataclass(item.type)}
_LISTS = {str: "a list of texts, for example [a, b]", float: "a list of numbers, for example [0.25, 0.5]"}


@dataclass(frozen=True)
class Given:
    """A setting as a file or an override gives it."""

    key: str
    value: Any
    file: str | None = None
    """`None`: an override."""

    @property
    def where(self) -> str:
        return "in the overrides" if self.file is None else f"in {self.file}"


def find_mistake(given: Iterable[Given], schema: "DictConfig") -> ConfigError | None:
    """The error for the first setting whose value is not what the schema takes there: what it is, and what it should be."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for each in given:
        nested = each.value
        for part in reversed(each.key.split(".")):
            nested = {part: nested}
        try:
            OmegaConf.merge(schema, nested)
        except OmegaConfBaseException:
            shown = "null" if each.value is None else repr(each.value)
            said = shown if each.file is None else f"{shown} {each.where}"
            is_group = each.file is not None and isinstance(each.value, str) and each.key in _SECTIONS
            remedy = f"A group is chosen by name under `defaults`: `- {each.key}: {each.value}`." if is_group else ""
            return ConfigError(each.key, f"{said} is not {_expected(each.key)}", remedy)
    return None


def _expected(key: str) -> str:
    item = _field(key)
    if is_dataclass(item.type):
        first = next(each.name for each in fields(item.type) if not is_dataclass(each.type))
        return f"a section of settings, for example {key}.{first}"
    if item.metadata.get("choices"):
        words = [f"one of {', '.join(item.metadata['choices'])}"]
    else:
        kinds = typing.get_args(item.type) if isinstance(item.type, types.UnionType) else (item.type,)
        bounds = bounds_words(item)
        words = [_kind_words(kind) + (f", {bounds}" if bounds and kind in (int, float) else "") for kind in kinds]
    return " or ".join(words)


def _kind_words(kind: Any) -> str:
    origin = typing.get_origin(kind)
    return _LISTS[typing.get_args(kind)[0]] if origin is tuple else _KINDS[origin or kind]


def _field(key: str) -> Field[Any]:
    """The field of that dotted path, which `_check_key` has found."""
    section: Any = Config
    for part in key.split("."):
        found = {item.name: item for item in fields(section)}[part]
        section = found.type
    return found
