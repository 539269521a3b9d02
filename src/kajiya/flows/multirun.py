"""`kajiya train … -m a=1,2 b=x,y`: every combination as a run of its own, by the launchers that a search uses."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from kajiya.config.digest import digest
from kajiya.config.schema import TRAINING_SECTIONS, Config, TuneConfig
from kajiya.config.sweep import Value, as_override, check_grid, grid, split_sweep
from kajiya.data.progress import OnEvent, silent
from kajiya.errors import ConfigError
from kajiya.flows.jobs import Job, TrialEnd, everything_goes_on, execute
from kajiya.flows.launch import launch
from kajiya.flows.stages import Stages
from kajiya.flows.train import prepare_data
from kajiya.run.store import Store


@dataclass(frozen=True)
class Member:
    """One combination and how its run ended."""

    settings: dict[str, Value]
    status: str
    """finished, interrupted, failed, out of memory, not finite, timed out."""
    run: str | None
    problem: str | None


def multirun(
    recipe: str,
    overrides: Sequence[str],
    store: Store,
    *,
    config_dir: Path | None = None,
    on_event: OnEvent = silent,
) -> list[Member]:
    """Train every combination, evaluated and reported each; all are composed and checked before the first one runs.

    Combinations already trained are found in the store. One that fails does not end the others. Raises `ConfigError` where two
    combinations are one training, and so one run, of which the second would replace the first one's evaluation.
    """
    fixed, dimensions = split_sweep(overrides)
    if not dimensions:
        raise ConfigError("-m", "nothing varies", "For example: -m optim.lr=1e-3,3e-3 seed=0,1")
    combinations = grid(dimensions)
    configs = check_grid(recipe, fixed, combinations, config_dir)
    _refuse_same_training(configs, combinations)
    prepare_data(configs[0], store, Stages(on_event))
    tune = configs[0].tune
    jobs = [_job(config, tune, store, number) for number, config in enumerate(configs)]
    on_event("stage", name="multirun", state="begun", seconds=0.0, text="")
    members: dict[int, Member] = {}
    for number, end in launch(tune.launcher, partial(_numbered, jobs), list(range(len(jobs))), tune.parallel):
        members[number] = Member(combinations[number], end.status, end.run, end.problem)
        said = ", ".join(as_override(key, value) for key, value in combinations[number].items())
        on_event("member", text=f"{said}: {end.status} {end.run or ''} {end.problem or ''}".strip())
    return [members[number] for number in range(len(jobs))]


def _refuse_same_training(configs: Sequence[Config], combinations: Sequence[dict[str, Value]]) -> None:
    known: dict[str, str] = {}
    for config, settings in zip(configs, combinations, strict=True):
        said = " ".join(as_override(key, value) for key, value in settings.items())
        trained = digest({part: getattr(config, part) for part in ("name", "seed", *TRAINING_SECTIONS)})
        if trained in known:
            raise ConfigError(
                "-m",
                f"{known[trained]} and {said} are one and the same training, and so one run",
                "Vary what is trained by, and evaluate one model in several ways with: kajiya eval",
            )
        known[trained] = said


def _job(config: Config, tune: TuneConfig, store: Store, number: int) -> Job:
    bare = replace(config, serve=replace(config.serve, api_key=None))
    return Job(bare, store.root, tune, store.root / "multirun" / f"{config.name}-{number:03d}.log", is_whole=True)


def _numbered(jobs: list[Job], number: int) -> tuple[int, TrialEnd]:
    return number, execute(jobs[number], everything_goes_on)
