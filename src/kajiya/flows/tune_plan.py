"""What is searched, and how: the study that a recipe and its sweeping overrides ask for, checked before anything runs."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kajiya.config.compose import compose, find_recipe
from kajiya.config.digest import digest, to_plain
from kajiya.config.schema import Config
from kajiya.config.sweep import Dimension, Value, as_override, check_grid, check_space, grid, split_sweep
from kajiya.errors import ConfigError
from kajiya.flows.jobs import Job
from kajiya.flows.tune_search import metric_of, suggest
from kajiya.run.code import own_code
from kajiya.run.store import Store

_PROBES = 8
"""Draws of a space with a function of the user's that are composed before the first trial."""


@dataclass(frozen=True)
class StudyPlan:
    """All that a worker, on whatever machine, needs to run a trial of the study."""

    id: str
    folder: Path
    store: Path
    recipe: str
    config_dir: str | None
    fixed: tuple[str, ...]
    dimensions: tuple[Dimension, ...]
    base: Config
    """The recipe with every dimension at its first value."""
    deadline: float | None = None
    """Unix seconds after which no trial is begun."""

    @property
    def metrics(self) -> list[str]:
        """Names of the objectives' metrics."""
        return [metric_of(objective) for objective in self.base.tune.objectives]

    def job(self, config: Config, name: str, facts: dict[str, Any]) -> "Job":
        """One of the study's runs, its output in `trials/<name>.log` of the study's folder."""
        log = self.folder / "trials" / f"{name}.log"
        return Job(config, self.store, self.base.tune, log, tuple(self.metrics), {"study": self.id} | facts)


def plan_study(recipe: str, overrides: Sequence[str], store: Store, config_dir: Path | None) -> StudyPlan:
    """The study of these words, its space checked against the schema; nothing runs."""
    fixed, dimensions = split_sweep(overrides)
    base = check_space(recipe, fixed, dimensions, config_dir)
    if not dimensions and base.tune.space is None:
        raise ConfigError(
            "tune", "nothing varies", "For example: kajiya tune RECIPE 'optim.lr=tag(log,interval(1e-4,1e-2))'"
        )
    if any(each.key.startswith("tune.") for each in dimensions):
        raise ConfigError("tune", "the settings of the search itself cannot be searched")
    if base.tune.sampler.name == "grid":
        check_grid(recipe, fixed, grid_of(dimensions, base.tune.trials), config_dir)
    n_numbers = sum(not each.choices and each.low < each.high for each in dimensions)
    if base.tune.sampler.name == "cmaes" and base.tune.space is None and n_numbers < 2:
        raise ConfigError(
            "tune.sampler.name",
            f"cmaes models two or more numbers together, and {n_numbers or 'none'} varies",
            "Use tpe or gp.",
        )
    section = to_plain(base)
    asked = section.pop("tune")
    key = digest(
        {
            "recipe": section,
            "dimensions": to_plain(dimensions),
            "search": {name: asked[name] for name in ("objectives", "value", "sampler", "pruner", "space")},
            "own_code": own_code((base.tune.space,)) if base.tune.space else {},
        }
    )
    name = f"{base.name}-{key[:10]}"
    path = find_recipe(recipe, config_dir)
    plan = StudyPlan(
        id=name,
        folder=store.root / "studies" / name,
        store=store.root,
        recipe=str(path.resolve()) if recipe.endswith((".yaml", ".yml")) else recipe,
        config_dir=None if config_dir is None else str(config_dir.resolve()),
        fixed=tuple(fixed),
        dimensions=dimensions,
        base=base,
        deadline=None if base.tune.minutes is None else time.time() + 60 * base.tune.minutes,
    )
    if base.tune.space is not None:
        _probe_own_space(plan)
    return plan


def _probe_own_space(plan: StudyPlan) -> None:
    """Draw from the user's function and compose what it returns, so that its mistakes show before the first trial."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(_PROBES):
        trial_config(plan, suggest(study.ask(), plan.dimensions, plan.base.tune.space))


def grid_of(dimensions: Sequence[Dimension], trials: int | None) -> list[dict[str, Value]]:
    """The combinations that are tried: all of them, or the first `trials`."""
    return grid(dimensions)[:trials]


def trial_config(plan: StudyPlan, values: dict[str, Value]) -> Config:
    """The config of a trial: the recipe, what is fixed, its own settings; nothing in it that only a person would look at."""
    chosen = [as_override(key, value) for key, value in values.items()]
    config = compose(plan.recipe, [*plan.fixed, *chosen], plan.config_dir)
    return trimmed(config)


def trimmed(config: Config) -> Config:
    """The same training, without samples, baselines and trackers (which get the trials' event logs afterwards)."""
    return replace(
        config,
        eval=replace(config.eval, samples=0, baselines=()),
        track=replace(config.track, trackers=()),
        tune=replace(config.tune, storage=None),  # its address may hold a password, and a trial has no need of it
        serve=replace(config.serve, api_key=None),
    )
