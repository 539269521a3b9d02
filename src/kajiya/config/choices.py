"""Options belong to the choice beside which they were set: where an override makes another choice, they go with the old one."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

Composed = Callable[[dict[str, Any], Sequence[str]], "DictConfig"]
"""The config of a recipe's content and overrides, not yet checked."""


def drop_options(
    body: dict[str, Any], overrides: Sequence[str], keys: Iterable[str], groups: Iterable[str], composed: Composed
) -> tuple[dict[str, Any], list[str]]:
    """The recipe's content and the overrides, without the options of choices that the overrides replace.

    `keys` are all settings; each `<section>.name` beside `<section>.options` is a choice. An override replaces it as
    `<section>.name=…` or through a group, whose own options stay.
    """
    known = set(keys)
    sections = sorted(key.removesuffix(".name") for key in known if key.endswith(".name"))
    sections = [section for section in sections if f"{section}.options" in known]
    chosen = {section: name for section in sections if (name := _named(section, overrides)) is not None}
    by_group = [text for text in overrides if _key(text) in set(groups)]
    if not chosen and not by_group:
        return body, list(overrides)
    bare = copy.deepcopy(body)
    for section in sections:
        _delete(bare, section)
    before, after = composed(bare, []), composed(bare, by_group)
    kept, taken = copy.deepcopy(body), []
    others = list(overrides)
    for section in sections:
        name, options = _choice(after, section)
        final = chosen.get(section, name)
        if final == _choice(before, section)[0]:
            continue
        _delete(kept, section)
        if final != name:
            taken += [f"~{section}.options.{key}" for key in options]
            options = {}
        # What an override would take away may be gone already.
        others = [text for text in others if not _takes_away_nothing(text, section, options)]
    return kept, [*taken, *others]


def _key(text: str) -> str:
    return text.lstrip("+~").partition("=")[0]


def _named(section: str, overrides: Sequence[str]) -> Any:
    """The name that the last override of it gives the section; `None`: there is none."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    found = [text for text in overrides if _key(text) == f"{section}.name" and not text.startswith("~")]
    return OverridesParser.create().parse_override(found[-1]).value() if found else None


def _choice(config: "DictConfig", section: str) -> tuple[Any, Mapping[str, Any]]:
    """Name and options of a section."""
    from omegaconf import OmegaConf

    found = OmegaConf.select(config, section)
    return found.name, found.options or {}


def _delete(body: dict[str, Any], section: str) -> None:
    """Take the section's options out, where it is written with any."""
    inner: Any = body
    for part in section.split("."):
        inner = inner.get(part) if isinstance(inner, dict) else None
    if isinstance(inner, dict):
        inner.pop("options", None)


def _takes_away_nothing(text: str, section: str, options: Mapping[str, Any]) -> bool:
    begin = f"~{section}.options."
    return text.startswith(begin) and _key(text).removeprefix(begin[1:]).partition(".")[0] not in options
