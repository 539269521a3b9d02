"""The study's side of a trial: asks for settings, passes evaluations to the pruner, and files how it ended."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kajiya.config.digest import to_plain
from kajiya.data.progress import silent
from kajiya.errors import KajiyaError
from kajiya.flows.jobs import execute
from kajiya.flows.tune_plan import StudyPlan, trial_config
from kajiya.flows.tune_search import ASHA, open_study, suggest
from kajiya.run.alive import Beat, process_facts
from kajiya.run.lock import locked

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

_TAKEN_UP_AGAIN = 3
"""Times that a trial which was ended from outside goes on at once; after that, with the next search of the study."""


@dataclass(frozen=True)
class Outcome:
    """What a job tells the study about one trial."""

    number: int
    status: str
    values: list[float] | None
    problem: str | None
    run: str | None
    seconds: float


def run_ticket(plan: StudyPlan, ticket: int) -> list[Outcome]:
    """Run the next trial of the study, and after it every trial that successive halving has promoted meanwhile."""
    if plan.deadline is not None and time.time() > plan.deadline:
        return []
    tune = plan.base.tune
    # Tickets that begin in the same moment see the same trials, and would draw the same settings from one seed.
    study = open_study(tune, plan.folder, plan.id, plan.base.seed + 104_729 * ticket)
    outcomes = [run_trial(plan, study)]
    for _ in range(_TAKEN_UP_AGAIN):
        if outcomes[-1].status != "interrupted":
            break
        outcomes.append(run_trial(plan, study))  # which is the one that waits to go on
    while promote(plan, study):
        outcomes.append(run_trial(plan, open_study(tune, plan.folder, plan.id, plan.base.seed)))
    return outcomes


def promote(plan: StudyPlan, study: "Study") -> bool:
    """Queue a trial that successive halving lets go on, if there is one; whoever asks at the same time gets another one."""
    if not isinstance(study.pruner, ASHA):
        return False
    with locked(plan.folder / "ask.lock", "promoting a trial", silent):
        candidates = study.pruner.promotable(study)
        if candidates:
            go_on(study, candidates[0], "promoted")
    return bool(candidates)


def go_on(study: "Study", trial: "FrozenTrial", reason: str) -> None:
    """Queue the settings of a trial again: its run goes on from its checkpoint. One that was promoted stays so."""
    reason = "promoted" if trial.user_attrs.get("reason") == "promoted" else reason
    kept = {name: trial.user_attrs[name] for name in ("grid",) if name in trial.user_attrs}
    params = trial.params or trial.system_attrs.get("fixed_params")
    if params:
        study.enqueue_trial(params, user_attrs=kept | {"continues": trial.number, "reason": reason})


def beat_of(plan: StudyPlan, number: int) -> Path:
    """The file that whoever runs a trial touches."""
    return plan.folder / "trials" / f"{number:05d}.alive"


def run_trial(plan: StudyPlan, study: "Study") -> Outcome:
    """Ask for settings, run them, tell what came of it. Nothing that a trial does ends the study."""
    from optuna.trial import TrialState

    # SQLite lets two that ask at once take the same waiting trial.
    with locked(plan.folder / "ask.lock", "asking for a trial", silent):
        trial = study.ask()
        trial.set_user_attr("owner", process_facts())
    try:
        values = suggest(trial, plan.dimensions, plan.base.tune.space)
        config = trial_config(plan, values)
    except Exception as problem:  # the user's own function may raise anything
        said = str(problem) if isinstance(problem, KajiyaError) else f"{type(problem).__name__}: {problem}"
        trial.set_user_attr("problem", said.partition("\n")[0])
        study.tell(trial, state=TrialState.FAIL)
        return Outcome(trial.number, "failed", None, said, None, 0.0)
    trial.set_user_attr("settings", {key: to_plain(value) for key, value in values.items()})
    (plan.folder / "trials").mkdir(exist_ok=True)
    beat = Beat(beat_of(plan, trial.number)).start()
    try:
        end = execute(plan.job(config, f"{trial.number:05d}", {"trial": trial.number}), _Judge(study, trial))
    finally:
        beat.stop()
    for name, value in (("run", end.run), ("seconds", end.seconds), ("to_first_step", end.to_first_step)):
        trial.set_user_attr(name, value)
    if end.status == "finished":
        signs = [-1 if each.startswith("max:") else 1 for each in plan.base.tune.objectives]
        figures = end.figures(plan.metrics, plan.base.tune.value, signs)
        study.tell(trial, figures)
        return Outcome(trial.number, "finished", figures, None, end.run, end.seconds)
    if end.status == "interrupted":
        trial.set_user_attr("problem", end.status)
    elif end.problem or end.status != "pruned":
        trial.set_user_attr("problem", end.problem or end.status)
    trial.set_user_attr("status", end.status)
    study.tell(trial, state=TrialState.PRUNED if end.status == "pruned" else TrialState.FAIL)
    if end.status == "interrupted":  # by a scheduler, say, that wanted this trial's process alone
        go_on(study, study.get_trials(deepcopy=False)[trial.number], "interrupted")
    return Outcome(trial.number, end.status, None, end.problem, end.run, end.seconds)


class _Judge:
    """Tells Optuna each evaluation, under its number, and asks whether the trial goes on."""

    def __init__(self, study: "Study", trial: "Trial") -> None:
        self._trial = trial
        self._is_asked = len(study.directions) == 1
        self._seen: set[int] = set()

    def __call__(self, step: int, value: float, is_past: bool) -> bool:
        """Whether the trial goes on after this evaluation; of one that it had before, nobody is asked."""
        if step in self._seen or not self._is_asked:
            return True
        self._seen.add(step)
        if not math.isfinite(value):
            self._trial.set_user_attr("problem", f"the evaluation at step {step} is {value}")
            return False
        self._trial.report(value, len(self._seen))
        return is_past or not self._trial.should_prune()
