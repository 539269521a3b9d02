"""The rewards that a config names, checked."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kajiya.config.options import ExactMatchReward, RegexReward, RewardPart, UnitTestReward
from kajiya.config.schema import Config
from kajiya.config.tables import check_choice, check_options, nearest
from kajiya.errors import ConfigError

_FIELD = "train.loss.options.rewards"
COMPLETION = "completion"
PLACES = re.compile(r"\{(prompt|answer|completion|row\.[^{}]+)\}")
"""What a program of `unit_test` has put in."""
ROW = "row."
"""Before the name of a column of `data.keep`, in a program."""


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


def require_readable(config: Config, form: str) -> None:
    """Raise `ConfigError` for a reward that reads what rows of the format `form` (`auto`: not known yet) do not hold."""
    for number, part in enumerate(check_rewards(config.train.loss.options.get("rewards") or [], _FIELD)):
        field = f"{_FIELD}[{number}]"
        options = check_choice("reward", part.name, part.options, field)
        if isinstance(options, RegexReward) and None not in (options.pattern, options.column):
            raise ConfigError(f"{field}.options.column", "changes nothing beside pattern", "Set one of them.")
        for name in _READ[part.name](options) if part.name in _READ else ():
            if name == COMPLETION and form == "prompt":
                raise ConfigError(
                    f"{field}.options",
                    f"{part.name} reads the row's completion, and prompt rows have none",
                    "Name a column that it is to read, and keep that with data.keep; or set data.columns.completion.",
                )
            if name != COMPLETION and name not in config.data.keep:
                hint = nearest(name, config.data.keep)
                raise ConfigError(
                    f"{field}.options",
                    f"{part.name} reads the column {name!r}, which data.keep does not name"
                    + (f"; {hint}" if hint else ""),
                    f"Set data.keep=[{', '.join((*config.data.keep, name))}].",
                )


def _of_matching(options: ExactMatchReward | RegexReward) -> list[str]:
    has_pattern = isinstance(options, RegexReward) and options.pattern is not None
    return [] if has_pattern else [options.column or COMPLETION]


def _of_program(options: UnitTestReward) -> list[str]:
    names = [found[1] for found in PLACES.finditer(options.program)]
    return [name.removeprefix(ROW) for name in names if name == COMPLETION or name.startswith(ROW)]


_READ: Mapping[str, Callable[[Any], list[str]]] = {
    "exact_match": _of_matching,
    "regex": _of_matching,
    "unit_test": _of_program,
}
"""What a reward reads of a row, from its options: `completion`, or columns of `data.keep`."""
