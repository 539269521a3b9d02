"""A documented, range-checked field of a config section."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, field, fields, is_dataclass
from typing import Any

from kajiya.errors import ConfigError

_BOUNDS = {
    "ge": ("at least", lambda value, bound: value >= bound),
    "gt": ("more than", lambda value, bound: value > bound),
    "le": ("at most", lambda value, bound: value <= bound),
    "lt": ("less than", lambda value, bound: value < bound),
}


def setting(
    default: Any = MISSING,
    *,
    factory: Any = MISSING,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A dataclass field with the bounds or the choices that `check_bounds` holds it to."""
    bounds = {name: bound for name, bound in (("ge", ge), ("gt", gt), ("le", le), ("lt", lt)) if bound is not None}
    return field(default=default, default_factory=factory, metadata={"bounds": bounds, "choices": choices})


def with_words(given: Mapping[str, Any], section: Any) -> dict[str, Any]:
    """What a YAML file sets of a section, with `on` and `off` where a choice has these words: YAML reads them as booleans."""
    items = {item.name: item for item in fields(section)}
    said = dict(given)
    for name in items.keys() & given.keys():
        value, kind = given[name], items[name].type
        if isinstance(value, bool) and "off" in (items[name].metadata.get("choices") or ()):
            said[name] = "on" if value else "off"
        elif isinstance(value, Mapping) and is_dataclass(kind):
            said[name] = with_words(value, kind)
    return said


def bounds_words(item: Field[Any]) -> str:
    """The bounds of a field: `"at least 1, at most 8"`; empty where it has none."""
    return ", ".join(f"{_BOUNDS[name][0]} {bound}" for name, bound in item.metadata.get("bounds", {}).items())


def check_bounds(section: Any, path: str = "") -> None:
    """Raise `ConfigError` for the first field of `section`, or of one within it, past its bounds or choices, or not finite."""
    for item in fields(section):
        value = getattr(section, item.name)
        where = f"{path}.{item.name}" if path else item.name
        if is_dataclass(value):
            check_bounds(value, where)
            continue
        if value is None:
            continue
        choices = item.metadata.get("choices")
        if choices and value not in choices:
            raise ConfigError(where, f"{value!r} is not one of {', '.join(choices)}")
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, float) and not math.isfinite(part):
                raise ConfigError(where, f"{part!r} is not a finite number")
        for name, bound in item.metadata.get("bounds", {}).items():
            words, holds = _BOUNDS[name]
            if not holds(value, bound):
                raise ConfigError(where, f"{value!r} is out of range: it must be {words} {bound}")
