"""Optuna's side of a study: storage, samplers, pruners, and successive halving whose losers may come back."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from kajiya.config import options as o
from kajiya.config.schema import TuneConfig
from kajiya.config.sweep import Dimension, Value
from kajiya.config.tables import is_options, resolve
from kajiya.errors import MissingExtraError, StoreError

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

_LOCK_S = 60
"""Longest wait for another process's write to SQLite, seconds."""


def open_study(tune: TuneConfig, folder: Path, name: str, seed: int) -> "Study":
    """The study of that name, made where there is none.

    Raises `MissingExtraError` without Optuna, `StoreError` for a storage that cannot be opened.
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise MissingExtraError("optuna", "tune", "kajiya tune") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    storage = _storage(tune.storage, folder)
    known = 0
    if name in optuna.study.get_all_study_names(storage):
        known = len(optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False))
    # Each trial has a sampler of its own, so each needs a seed of its own, within NumPy's 32 bits.
    return optuna.create_study(
        study_name=name,
        storage=storage,
        load_if_exists=True,
        sampler=_sampler(tune, (seed + 7919 * known) % 2**32),
        pruner=_pruner(tune),
        directions=[direction(objective) for objective in tune.objectives],
    )


def direction(objective: str) -> Literal["minimize", "maximize"]:
    """minimize, or maximize for `max:…`."""
    return "maximize" if objective.startswith("max:") else "minimize"


def metric_of(objective: str) -> str:
    """The metric's name without `min:` or `max:`."""
    return objective.removeprefix("min:").removeprefix("max:")


def _storage(where: str | None, folder: Path) -> "BaseStorage":
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend
    from sqlalchemy import NullPool
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError

    if where == "journal":
        return JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    url = _with_driver(where or f"sqlite:///{folder / 'study.db'}")
    # Every trial opens the study for itself: with a pool of its own each would keep a server's connection open.
    arguments: dict[str, Any] = {"poolclass": NullPool}
    if url.startswith("sqlite"):
        arguments = {"connect_args": {"timeout": _LOCK_S}}
    try:
        return RDBStorage(url, engine_kwargs=arguments)
    except (OperationalError, ArgumentError, NoSuchModuleError, ImportError, ModuleNotFoundError) as error:
        raise StoreError(f"tune.storage: cannot be opened: {str(error).splitlines()[0]}") from error


def _with_driver(url: str) -> str:
    """A PostgreSQL address with the driver that the extra brings, where it names none."""
    scheme, _, rest = url.partition("://")
    if scheme not in ("postgres", "postgresql", "postgresql+psycopg"):
        return url
    import importlib.util

    if importlib.util.find_spec("psycopg") is None:
        raise MissingExtraError("psycopg", "postgres", "A study in PostgreSQL")
    return f"postgresql+psycopg://{rest}"


def _sampler(tune: TuneConfig, seed: int) -> "BaseSampler":
    made, options = resolve("sampler", tune.sampler.name, tune.sampler.options, "tune.sampler")
    sampler: BaseSampler = made(options, seed) if is_options(options) else made(seed=seed, **options)
    return sampler


def _pruner(tune: TuneConfig) -> "BasePruner":
    made, options = resolve("pruner", tune.pruner.name, tune.pruner.options, "tune.pruner")
    pruner: BasePruner = made(options) if is_options(options) else made(**options)
    return pruner


# ---------------------------------------------------------------- samplers


def random(_options: o.NoOptions, seed: int) -> "BaseSampler":
    """Independent draws; a grid is queued as a whole and needs no draws at all."""
    from optuna.samplers import RandomSampler

    return RandomSampler(seed=seed)


def tpe(options: o.TPEOptions, seed: int) -> "BaseSampler":
    """Tree-structured Parzen estimator; settings that only some trials have are modelled in groups."""
    from optuna.samplers import TPESampler

    joint = options.multivariate
    return TPESampler(n_startup_trials=options.startup_trials, multivariate=joint, group=joint, seed=seed)


def cmaes(options: o.CMAESOptions, seed: int) -> "BaseSampler":
    """CMA-ES; what it does not model (choices, single values) is drawn at random."""
    import importlib.util

    from optuna.samplers import CmaEsSampler

    if importlib.util.find_spec("cmaes") is None:
        raise MissingExtraError("cmaes", "tune", "The sampler cmaes")
    return CmaEsSampler(n_startup_trials=options.startup_trials, seed=seed, warn_independent_sampling=False)


def gp(options: o.GPOptions, seed: int) -> "BaseSampler":
    """Gaussian process."""
    from optuna.samplers import GPSampler

    return GPSampler(n_startup_trials=options.startup_trials, seed=seed)


def nsga2(options: o.NSGA2Options, seed: int) -> "BaseSampler":
    """NSGA-II."""
    from optuna.samplers import NSGAIISampler

    return NSGAIISampler(population_size=options.population, seed=seed)


# ---------------------------------------------------------------- pruners


def no_pruner(_options: o.NoOptions) -> "BasePruner":
    """Every trial runs to its end."""
    from optuna.pruners import NopPruner

    return NopPruner()


def median(options: o.MedianPruner) -> "BasePruner":
    """Worse than the median."""
    from optuna.pruners import MedianPruner

    return MedianPruner(n_startup_trials=options.startup_trials, n_warmup_steps=options.warmup_evals)


def hyperband(options: o.HyperbandPruner) -> "BasePruner":
    """Brackets of successive halving."""
    from optuna.pruners import HyperbandPruner

    most = "auto" if options.max_evals is None else options.max_evals
    return HyperbandPruner(min_resource=options.min_evals, max_resource=most, reduction_factor=options.reduction)


def wilcoxon(options: o.WilcoxonPruner) -> "BasePruner":
    """Signed ranks against the best trial, paired by evaluation."""
    from optuna.pruners import WilcoxonPruner

    return WilcoxonPruner(p_threshold=options.p_threshold, n_startup_steps=options.warmup_evals)


class ASHA:
    """Successive halving over the values that trials reported at the rungs, and who may come back to go on."""

    def __init__(self, options: o.ASHAPruner) -> None:
        self.options = options

    def rungs(self, last: int) -> list[int]:
        """Evaluations at which a trial is judged, up to `last`."""
        found, rung = [], self.options.min_evals
        while rung <= last:
            found.append(rung)
            rung *= self.options.reduction
        return found

    def prune(self, study: "Study", trial: "FrozenTrial") -> bool:
        """Whether the trial, which has just been evaluated, ends here."""
        at = trial.last_step
        if at is None or at not in self.rungs(at):
            return False
        return not self._is_among_best(study, trial, at)

    def promotable(self, study: "Study") -> "list[FrozenTrial]":
        """Trials that were ended at their rung, have not gone on since, and are among its best by now."""
        from optuna.trial import TrialState

        trials = study.get_trials(deepcopy=False)
        gone_on = {trial.user_attrs.get("continues") for trial in trials}
        ended = [
            trial
            for trial in trials
            if trial.state == TrialState.PRUNED and trial.number not in gone_on and "problem" not in trial.user_attrs
        ]
        return [t for t in ended if t.last_step is not None and self._is_among_best(study, t, t.last_step)]

    def _is_among_best(self, study: "Study", trial: "FrozenTrial", at: int) -> bool:
        sign = -1.0 if study.direction.name == "MAXIMIZE" else 1.0
        seen = {
            str(each.params): sign * each.intermediate_values[at]  # a trial that went on counts once
            for each in study.get_trials(deepcopy=False)
            if at in each.intermediate_values
        }
        own = sign * trial.intermediate_values[at]
        seen[str(trial.params)] = own
        n_stay = max(1, len(seen) // self.options.reduction)
        return own <= sorted(seen.values())[n_stay - 1]


def asha(options: o.ASHAPruner) -> "BasePruner":
    """Asynchronous successive halving with promotion."""
    from typing import cast

    return cast("BasePruner", ASHA(options))


# ---------------------------------------------------------------- proposals


def suggest(trial: "Trial", dimensions: tuple[Dimension, ...], space: str | None) -> dict[str, Value]:
    """The settings of a trial: each dimension's, and what the user's own function adds to them."""
    values: dict[str, Value] = {each.key: _suggest_one(trial, each) for each in dimensions}
    if space is not None:
        values |= _own_values(trial, values, space)
    return values


def _suggest_one(trial: "Trial", dimension: Dimension) -> Value:
    key, low, high = dimension.key, dimension.low, dimension.high
    if dimension.choices:
        return trial.suggest_categorical(key, dimension.choices)
    if dimension.is_int:
        return trial.suggest_int(key, round(low), round(high), step=round(dimension.step or 1), log=dimension.is_log)
    return trial.suggest_float(key, low, high, step=dimension.step, log=dimension.is_log)


def _own_values(trial: "Trial", values: Mapping[str, Value], space: str) -> dict[str, Value]:
    from kajiya.config.tables import import_target
    from kajiya.errors import ConfigError

    function = import_target(space, "tune.space")
    try:
        given = function(trial, dict(values))
    except Exception as problem:
        raise ConfigError("tune.space", f"{space} raised {type(problem).__name__}: {problem}") from problem
    if not isinstance(given, Mapping):
        raise ConfigError("tune.space", f"{space} returned {type(given).__name__}, not a mapping of settings")
    return {key: value.item() if isinstance(value, np.generic) else value for key, value in given.items()}
