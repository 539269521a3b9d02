"""Hydra's sweep grammar over the schema: which settings vary, over what, checked before anything runs."""

import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import product
from pathlib import Path
from typing import Any

from kajiya.config.compose import compose
from kajiya.config.schema import Config
from kajiya.errors import ConfigError

Value = bool | int | float | str | None


@dataclass(frozen=True)
class Dimension:
    """One setting that varies: over `choices`, or over the numbers from `low` to `high`, both among them."""

    key: str
    choices: tuple[Value, ...] = ()
    """The alternatives; lists and mappings as the text of an override."""
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    """Distance of neighbours on a grid that begins at `low`; `None`: continuous (or every integer)."""
    is_int: bool = False
    is_log: bool = False

    @property
    def is_finite(self) -> bool:
        """Whether a grid can hold all of its values."""
        return bool(self.choices) or self.step is not None or self.is_int

    def values(self) -> list[Value]:
        """All values of a finite dimension; the two ends of a continuous one."""
        if self.choices:
            return list(self.choices)
        if not self.is_finite:
            return [self.low, self.high]
        step = self.step or 1
        numbers = [self.low + step * i for i in range(math.floor((self.high - self.low) / step + 1e-9) + 1)]
        return [round(number) if self.is_int else number for number in numbers]


def split_sweep(overrides: Sequence[str]) -> tuple[list[str], tuple[Dimension, ...]]:
    """Overrides that fix a setting, and the dimensions of those that vary one.

    `choice(a,b)` and `a,b` vary over a list, `range(1,9,2)` over numbers (its end not among them), `interval(1e-4,1e-2)` over
    all numbers between, `tag(log,…)` on a logarithmic scale. Raises `ConfigError` for anything else.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    fixed: list[str] = []
    found: dict[str, Dimension] = {}
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise ConfigError(text, "is not an override", "An override is written key=value.") from error
        if not override.is_sweep_override():
            fixed.append(text)
        elif override.key_or_group in found:
            raise ConfigError(override.key_or_group, "is swept twice")
        else:
            found[override.key_or_group] = _dimension(override)
    return fixed, tuple(found.values())


def _dimension(override: Any) -> Dimension:
    from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep

    key, sweep = override.key_or_group, override._value
    if not isinstance(sweep, (ChoiceSweep, RangeSweep, IntervalSweep)):
        raise ConfigError(
            key, f"a {type(sweep).__name__} cannot be searched", "Use choice(…), range(…) or interval(…)."
        )
    _refuse_unused_words(override, sweep)
    is_log = "log" in sweep.tags
    if isinstance(sweep, ChoiceSweep):
        return Dimension(key, choices=tuple(_plain(element, override) for element in sweep.list))
    ends = (sweep.start, sweep.stop if isinstance(sweep, RangeSweep) else sweep.end)
    if not all(math.isfinite(end or 0) for end in ends):
        raise ConfigError(key, f"from {ends[0]} to {ends[1]} is no finite range")
    if isinstance(sweep, RangeSweep):
        low, step = float(sweep.start or 0), float(sweep.step)
        count = math.ceil((float(sweep.stop or 0) - low) / step - 1e-9)
        if step <= 0 or count < 1:
            raise ConfigError(key, "the range holds no number")
        is_int = low.is_integer() and step.is_integer()
        return Dimension(key, low=low, high=low + step * (count - 1), step=step, is_int=is_int)
    low, high = float(sweep.start or 0), float(sweep.end or 0)
    if not low < high:
        raise ConfigError(key, f"the interval from {low:g} to {high:g} is empty")
    if is_log and low <= 0:
        raise ConfigError(key, f"a logarithmic scale cannot begin at {low:g}")
    is_int = (isinstance(sweep.start, int) and isinstance(sweep.end, int)) or schema_type(key) is int
    return Dimension(key, low=low, high=high, is_int=is_int, is_log=is_log)


def _refuse_unused_words(override: Any, sweep: Any) -> None:
    """What the grammar takes and no search would heed."""
    from hydra.core.override_parser.types import IntervalSweep

    key = override.key_or_group
    unknown = sorted(sweep.tags - {"log"})
    if unknown:
        raise ConfigError(key, f"the tag {unknown[0]!r} means nothing here", "There is one: tag(log,interval(…)).")
    if isinstance(sweep, IntervalSweep):
        return
    if sweep.tags:
        kind = type(sweep).__name__.removesuffix("Sweep").lower()
        raise ConfigError(key, f"tag(log,…) says nothing of a {kind}(…)", "Use tag(log,interval(…)).")
    if sweep.shuffle:
        raise ConfigError(key, "shuffle(…) changes nothing here", "Leave it out.")


def _plain(element: Any, override: Any) -> Value:
    if isinstance(element, float) and math.isnan(element):
        raise ConfigError(override.key_or_group, "nan is no value to search over", "null leaves a setting unset.")
    if element is None or isinstance(element, (bool, int, float)):
        return element
    text: str = override._get_value_element_as_str(element)
    return text


def as_override(key: str, value: Value) -> str:
    """One setting as the command line takes it."""
    if value is None or isinstance(value, bool):
        return f"{key}={ {None: 'null', True: 'true', False: 'false'}[value] }"
    return f"{key}={value!r}" if isinstance(value, (int, float)) else f"{key}={value}"


def schema_type(key: str) -> Any:
    """The type of a setting in the schema, without `None`; `None` for one that the schema does not type (options)."""
    section: Any = Config
    for part in key.split("."):
        found = {item.name: item for item in fields(section)} if is_dataclass(section) else {}
        if part not in found:
            return None
        section = found[part].type
    kinds = [kind for kind in typing.get_args(section) if kind is not type(None)]
    return kinds[0] if kinds else section


def check_space(
    recipe: str, fixed: Sequence[str], dimensions: Sequence[Dimension], config_dir: str | Path | None = None
) -> Config:
    """The recipe with every dimension at its first value, after each of the other values was tried beside these.

    Raises `ConfigError`, naming the setting, for a value that the schema refuses: before the first trial.
    """
    first = {each.key: each.values()[0] for each in dimensions}

    def at(values: Mapping[str, Value]) -> Config:
        return compose(recipe, [*fixed, *(as_override(key, value) for key, value in values.items())], config_dir)

    base = at(first)
    for each in dimensions:
        values = each.values()
        for value in values[1:] if each.choices else values[-1:]:
            try:
                at(first | {each.key: value})
            except ConfigError as error:
                raise ConfigError(
                    error.field, f"{error.problem} (with {as_override(each.key, value)} of the search)", error.remedy
                ) from error
    return base


def check_grid(
    recipe: str, fixed: Sequence[str], combinations: Sequence[Mapping[str, Value]], config_dir: str | Path | None = None
) -> list[Config]:
    """The config of every combination. Raises `ConfigError`, naming the combination, for one that the schema refuses."""
    configs = []
    for values in combinations:
        words = [as_override(key, value) for key, value in values.items()]
        try:
            configs.append(compose(recipe, [*fixed, *words], config_dir))
        except ConfigError as error:
            raise ConfigError(error.field, f"{error.problem} (with {' '.join(words)})", error.remedy) from error
    return configs


def grid(dimensions: Sequence[Dimension]) -> list[dict[str, Value]]:
    """Every combination, the last dimension fastest. Raises `ConfigError` for a continuous dimension."""
    for each in dimensions:
        if not each.is_finite:
            raise ConfigError(
                each.key,
                "an interval of real numbers has no grid",
                "Use choice(…) or range(…), or another tune.sampler.name.",
            )
    return [
        dict(zip((each.key for each in dimensions), values, strict=True))
        for values in product(*(each.values() for each in dimensions))
    ]
