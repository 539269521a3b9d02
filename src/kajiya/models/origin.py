"""Where a model's weights came from, kept on the module: an adapter's base is compared with it."""

from dataclasses import dataclass, replace
from typing import Any

_ATTRIBUTE = "_kajiya_origin"


@dataclass(frozen=True)
class Origin:
    """The folder whose weights a model has, unchanged but for the form that they are in."""

    path: str
    """The folder, or a hub name."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    quantize: str = "none"
    """The few bits that the weights are in, or exactly stand for (`model.quantize`, and nf4-experts)."""


def origin_of(module: Any) -> Origin | None:
    """Where the weights are from; `None` where they were made anew, or changed since."""
    found = vars(module).get(_ATTRIBUTE)
    return found if isinstance(found, Origin) else None


def set_origin(module: Any, origin: Origin | None) -> None:
    """Say where the weights are from, or that they are of no folder (any more)."""
    vars(module)[_ATTRIBUTE] = origin


def set_form(module: Any, quantize: str) -> None:
    """Say in which bits the weights are now, or stand for."""
    origin = origin_of(module)
    if origin is not None:
        set_origin(module, replace(origin, quantize=quantize))
