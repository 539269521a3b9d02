"""The rewards that a config names, checked."""

from collections.abc import Sequence
from typing import Any

from kajiya.config.options import RewardPart
from kajiya.config.tables import check_choice, check_options
from kajiya.errors import ConfigError


def check_rewards(given: Sequence[Any], field: str) -> list[RewardPart]:
    """Each `{name, weight, options}` with its options checked, a user's own against its signature.

    Raises `ConfigError` naming the field for what is wrong, and where there is no reward at all.
    """
    if not given:
        raise ConfigError(
            field, "names no reward: nothing says which answers are good", "For example [{name: exact_match}]."
        )
    parts = []
    for number, entry in enumerate(given):
        part = check_options(RewardPart, entry, f"{field}[{number}]")
        check_choice("reward", part.name, part.options, f"{field}[{number}]")
        parts.append(part)
    return parts
