"""A search over a recipe's settings: trials in processes of their own, a study that outlives every interruption, a verdict."""

import fcntl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kajiya.config.digest import to_plain
from kajiya.config.schema import TrackConfig
from kajiya.config.sweep import grid
from kajiya.data.progress import OnEvent, silent
from kajiya.errors import ConfigError, StoreError
from kajiya.flows.launch import launch
from kajiya.flows.report_settings import public_config, public_words
from kajiya.flows.stages import Stages
from kajiya.flows.train import prepare_data
from kajiya.flows.tune_confirm import confirm, recall
from kajiya.flows.tune_jobs import Outcome, beat_of, go_on, promote, run_ticket
from kajiya.flows.tune_plan import StudyPlan, grid_of, plan_study
from kajiya.flows.tune_report import write_study_report
from kajiya.flows.tune_results import count_trials, finished, write_best
from kajiya.flows.tune_search import open_study
from kajiya.flows.tune_trial import UNKNOWN_METRIC
from kajiya.run.alive import BEAT, Beat, is_alive, process_facts
from kajiya.run.events import EventLog, read_events
from kajiya.run.files import write_json
from kajiya.run.folder import Run, runs_of
from kajiya.run.process import quiet_torchao
from kajiya.run.provenance import collect_provenance
from kajiya.run.store import Store
from kajiya.run.trackers.dispatch import replay_all, start_trackers

if TYPE_CHECKING:
    from optuna import Study

_TRIALS = 20
"""Of a search without end, where `tune.trials` does not say."""


@dataclass(frozen=True)
class Tuned:
    """What a search leaves."""

    run: Run
    """The study's folder: manifest, event log, storage, report."""
    best: Path | None
    """The best settings as a recipe; `None` when no trial came to an end."""
    report: Path | None
    counts: dict[str, int]
    """Trials by how they ended."""


def tune(
    recipe: str,
    overrides: Sequence[str],
    store: Store,
    *,
    config_dir: Path | None = None,
    command: Sequence[str] = (),
    on_event: OnEvent = silent,
) -> Tuned:
    """Search; run again with the same recipe and overrides, it goes on where it was, with more trials if more are asked for.

    Raises `ConfigError` before the first trial for a space that the schema refuses.
    """
    quiet_torchao()
    plan = plan_study(recipe, overrides, store, config_dir)
    with _alone(plan.folder):
        return _searched(plan, store, list(command), on_event)


def _searched(plan: StudyPlan, store: Store, command: list[str], on_event: OnEvent) -> Tuned:
    """The whole study, by the one process that works on it."""
    run = _open(plan, store, command)
    hear = _teller(run, on_event)
    trackers = start_trackers(run, plan.base.track)
    status = "failed"
    try:
        prepare_data(plan.base, store, Stages(hear))
        _search(plan, hear)
        study = open_study(plan.base.tune, plan.folder, plan.id, plan.base.seed)
        best = write_best(plan, study)
        is_confirmed = best is not None and plan.base.tune.confirm_seeds and len(study.directions) == 1
        confirmed = confirm(plan, study, hear) if is_confirmed else recall(run, study)
        run.record(confirmed=confirmed)
        if confirmed is not None:
            best = write_best(plan, study, confirmed["chosen"])
        run.record(status="finished")
        report = write_study_report(run, study, plan.metrics)
        hear("report", path=str(report))
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        run.record(status=status)
        run.events.emit("ended", status=status, error=None)
        if status == "finished":
            # The followers have the trials to deliver too, each within the time that a run's tracker has.
            warnings = trackers.finish(plan.base.track.timeout_s * (1 + len(runs_of(run))))
            warnings += deliver_rest(run, plan.base.track)
        else:
            warnings = trackers.finish()
        for text in warnings:
            on_event("warning", text=text)
    return Tuned(run, best, report, count_trials(study))


# ---------------------------------------------------------------- the search


def _search(plan: StudyPlan, hear: OnEvent) -> None:
    tune = plan.base.tune
    study = open_study(tune, plan.folder, plan.id, plan.base.seed)
    _recover(study, plan)
    if tune.sampler.name == "grid":
        _queue_grid(study, plan, hear)
    n_missing = _n_wanted(plan) - _n_tried(study)
    tickets = range(max(n_missing, sum(trial.state.name == "WAITING" for trial in study.get_trials(deepcopy=False))))
    hear("stage", name="search", state="begun", seconds=0.0, text="")
    began, told = time.time(), _Told(_best_value(study), _next_step(plan.folder))
    for outcomes in launch(tune.launcher, partial(run_ticket, plan), list(tickets), tune.parallel):
        for outcome in outcomes:
            _tell(told, outcome, plan, hear)
            if outcome.status == UNKNOWN_METRIC and not finished(study):
                raise ConfigError("tune.objectives", str(outcome.problem).partition("tune.objectives: ")[2])
    while promote(plan, study):
        for outcome in run_ticket(plan, 0):
            _tell(told, outcome, plan, hear)
    words = ", ".join(f"{count} {state}" for state, count in count_trials(study).items())
    hear("stage", name="search", state="done", seconds=time.time() - began, text=words)


def _n_wanted(plan: StudyPlan) -> int:
    tune = plan.base.tune
    if tune.sampler.name == "grid":
        return len(grid_of(plan.dimensions, tune.trials))
    return _TRIALS if tune.trials is None else tune.trials


def _n_tried(study: "Study") -> int:
    """Configurations that came to an end; one that was taken up again counts once."""
    return sum(
        trial.state.is_finished()
        and trial.user_attrs.get("problem") != "interrupted"
        and trial.user_attrs.get("reason") != "promoted"
        for trial in study.get_trials(deepcopy=False)
    )


def _queue_grid(study: "Study", plan: StudyPlan, hear: OnEvent) -> None:
    n_all, wanted = len(grid(plan.dimensions)), grid_of(plan.dimensions, plan.base.tune.trials)
    if len(wanted) < n_all:
        left = n_all - len(wanted)
        hear("warning", text=f"tune.trials={len(wanted)} leaves out {left:,} of the grid's {n_all:,} combinations")
    known = [trial.user_attrs.get("grid") for trial in study.get_trials(deepcopy=False)]
    for number, values in enumerate(wanted):
        if number not in known:
            study.enqueue_trial(values, user_attrs={"grid": number})


def _recover(study: "Study", plan: StudyPlan) -> None:
    """Trials whose process is gone are queued again: their runs go on from their checkpoints."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        owner = trial.user_attrs.get("owner")
        if owner is not None and is_alive(owner, beat_of(plan, trial.number)):
            continue
        study._storage.set_trial_user_attr(trial._trial_id, "problem", "interrupted")
        study.tell(trial.number, state=TrialState.FAIL)
        go_on(study, trial, "interrupted")


@dataclass
class _Told:
    """What the study's log has been told of its trials."""

    best: float | None
    """The best figure so far."""
    step: int
    """Of the next figures: they are counted as trials end, since some trackers take no step below an earlier one."""


def _next_step(folder: Path) -> int:
    return 1 + max((event["step"] for event in read_events(folder) if event["kind"] == "metrics"), default=-1)


def _tell(told: _Told, outcome: Outcome, plan: StudyPlan, hear: OnEvent) -> None:
    """Events of one ended trial."""
    hear("trial", **to_plain(outcome))
    if outcome.values is None:
        return
    names = plan.metrics
    values = {f"trial/{name}": value for name, value in zip(names, outcome.values, strict=True)}
    values["trial/number"] = outcome.number
    if len(names) == 1:
        sign = -1 if plan.base.tune.objectives[0].startswith("max:") else 1
        if told.best is None or sign * outcome.values[0] < sign * told.best:
            told.best = outcome.values[0]
        values[f"best/{names[0]}"] = told.best
    hear("metrics", step=told.step, values=values)
    told.step += 1


def _best_value(study: "Study") -> float | None:
    done = finished(study)
    return study.best_value if done and len(study.directions) == 1 else None


# ---------------------------------------------------------------- what it leaves


def deliver_rest(run: Run, track: TrackConfig) -> list[str]:
    """Bring what the study's followers have not delivered of it and its runs into the trackers; a line for each that failed."""
    warnings = []
    for name in track.trackers:
        try:
            replay_all([each.folder for each in (run, *runs_of(run))], name, track.options.get(name) or {})
        except StoreError as problem:
            warnings.append(str(problem))
    return warnings


# ---------------------------------------------------------------- the folder


def _open(plan: StudyPlan, store: Store, command: list[str]) -> Run:
    run = Run(plan.folder, store, EventLog(plan.folder))
    config, command = public_config(to_plain(plan.base)), public_words(command)
    if not (plan.folder / "manifest.json").is_file():
        run.events.emit("config", config=config)
        write_json(
            plan.folder / "manifest.json",
            {
                "run": plan.id,
                "name": plan.base.name,
                "key": plan.id,
                "created": time.time(),
                "command": command,
                "status": "running",
                "attempts": 0,
                "artifacts": {},
                "provenance": collect_provenance(),
                "recipe": plan.recipe,
                "fixed": public_words(plan.fixed),
            },
        )
    run.record(
        config=config,
        dimensions=to_plain(plan.dimensions),
        status="running",
        owner=process_facts(),
        command=command,
        attempts=run.manifest()["attempts"] + 1,
    )
    run.events.emit("opened", pid=process_facts()["pid"])
    return run


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the study's lock, which falls with the process, and give signs of life; `StoreError` while another search has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(
                f"Study {folder.name} is being searched by another process.\nWait for it or stop it."
            ) from error
        beat = Beat(folder / BEAT).start()
        try:
            yield
        finally:
            beat.stop()


def _teller(run: Run, on_event: OnEvent) -> OnEvent:
    def hear(kind: str, **fields: Any) -> None:
        on_event(kind, **fields)
        if kind != "progress":
            run.events.emit(kind, **fields)

    return hear
