"""Whether the fields of a dataclass that was read from a file hold what their types say."""

import types
import typing
from dataclasses import fields, is_dataclass
from typing import Any

from kajiya.errors import ConfigError

_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def check_types(found: Any, where: str) -> None:
    """Raise `ConfigError` naming `where` and the field for the first one whose value is of another type."""
    for item in fields(found):
        value = vars(found)[item.name]
        if not _fits(value, item.type):
            remedy = (
                "Put it in quotes."
                if _fits(str(value), item.type) and not isinstance(value, (dict, list, tuple))
                else ""
            )
            raise ConfigError(f"{where}: {item.name}", f"{_plain(value)} is not {_words(item.type)}", remedy)


def _fits(value: Any, kind: Any) -> bool:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, each) for each in inner)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(each, inner[0]) for each in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind in (int, bool):
        return type(value) is kind
    return isinstance(value, kind)


def _words(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_words(each) for each in inner)
    if origin is tuple:
        return f"a list of {_words(inner[0]).removeprefix('a ')}s"
    if kind is types.NoneType:
        return "null"
    return "a mapping" if is_dataclass(kind) else _WORDS.get(kind, kind.__name__)


def _plain(value: Any) -> str:
    return repr(list(value)) if isinstance(value, tuple) else repr(value)
