"""The study's side of a trial: starts its process, passes its evaluations to the pruner, and files how it ended."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kajiya.config.compose import compose
from kajiya.config.digest import to_plain
from kajiya.config.schema import Config, TuneConfig
from kajiya.config.sweep import Dimension, Value, as_override
from kajiya.config.tables import resolve
from kajiya.data.progress import silent
from kajiya.errors import KajiyaError
from kajiya.flows.tune_search import ASHA, metric_of, open_study, suggest
from kajiya.run.alive import Beat, process_facts
from kajiya.run.forks import Fork, forked
from kajiya.run.lock import locked
from kajiya.run.process import default_threads
from kajiya.run.provenance import usable_cores
from kajiya.run.usage import oom_kills

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

_TAKEN_UP_AGAIN = 3
"""Times that a trial which was ended from outside goes on at once; after that, with the next search of the study."""
_PROGRAM = ("-P", "-m", "kajiya.flows.tune_trial")


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


@dataclass(frozen=True)
class TrialEnd:
    """How a trial's process ended."""

    status: str
    """finished, pruned, interrupted, failed, out of memory, not finite, timed out."""
    run: str | None
    values: dict[str, list[float]]
    """Every value of each objective, in order of steps."""
    problem: str | None
    seconds: float
    to_first_step: float | None
    """From the start of the process to the start of its training loop, seconds."""

    def figures(self, names: Sequence[str], which: str, signs: Sequence[int]) -> list[float]:
        """The figure of each objective: the last value, or the best."""
        pick = {"last": lambda values, _: values[-1], "best": lambda values, s: s * min(s * v for v in values)}[which]
        return [pick(self.values[name], sign) for name, sign in zip(names, signs, strict=True)]


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


def everything_goes_on(_step: int, _value: float, _is_past: bool) -> bool:
    """A judge that ends no run."""
    return True


# ---------------------------------------------------------------- the process


@dataclass(frozen=True)
class Job:
    """A config to be run in a process of its own."""

    config: Config
    store: Path
    tune: TuneConfig
    """How many share the machine, and how much time and memory each may take."""
    log: Path
    """File for what the process prints."""
    objectives: tuple[str, ...] = ()
    """Metrics whose values are wanted; the judge hears the first one's as they come."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the run's manifest says of where it belongs."""
    is_whole: bool = False
    """Evaluate and report, as a run that a person asked for."""


def execute(job: Job, judge: Callable[[int, float, bool], bool]) -> TrialEnd:
    """Run a job; however it ends is the result."""
    tune, log = job.tune, job.log
    order = {
        "config": to_plain(job.config),
        "store": str(job.store),
        "objectives": list(job.objectives),
        "command": [],
        "threads": _threads(tune),
        "memory_bytes": None if tune.trial_memory_gb is None else int(tune.trial_memory_gb * 2**30),
        "facts": dict(job.facts),
        "is_whole": job.is_whole,
    }
    began, n_oom = time.time(), oom_kills()
    told: dict[str, Any] = {}
    with forked(_PROGRAM, order, log) as trial, _limit(trial, tune.trial_minutes) as expired:
        for said in trial.lines():
            told |= said
            for step, value in said.get("history", []):
                judge(step, float(value), True)
            if "step" in said:
                trial.say("go" if judge(said["step"], float(said["value"]), False) else "prune")
    seconds = time.time() - began
    status, problem = told.get("status"), told.get("problem")
    if status is None and expired.is_set():
        status, problem = "timed out", f"not done after {tune.trial_minutes:g} min"
    elif status is None:
        status, problem = _unsaid(trial.exit_code or 0, log, n_oom)
    started = told.get("started")
    return TrialEnd(
        str(status), told.get("run"), told.get("values") or {}, problem, seconds, started and started - began
    )


def _threads(tune: TuneConfig) -> int:
    """Threads of a trial: the cores that Ray has reserved for it, or its share of this machine's."""
    if tune.launcher.name == "ray":
        _, options = resolve("launcher", "ray", tune.launcher.options, "tune.launcher")
        return max(1, int(options.cpus))
    return max(1, min(default_threads(), usable_cores() // tune.parallel))


@contextmanager
def _limit(trial: Fork, minutes: float | None) -> Iterator[threading.Event]:
    """An event that is set when the trial was killed because its time was up."""
    expired = threading.Event()

    def end() -> None:
        expired.set()
        trial.kill()

    timer = threading.Timer(minutes * 60, end) if minutes is not None else None
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        yield expired
    finally:
        if timer is not None:
            timer.cancel()


def _unsaid(code: int, log: Path, n_oom_before: int | None) -> tuple[str, str]:
    """Of a process that ended without a last word: what it seems to have died of.

    `n_oom_before`: what `oom_kills` said when it began.
    """
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = lines[-1] if lines else "it said nothing"
    if code == -signal.SIGTERM:
        return "interrupted", "ended by SIGTERM"
    if code == -signal.SIGKILL:
        return _killed(n_oom_before, oom_kills())
    if code < 0:
        return "failed", f"killed by {signal.Signals(-code).name}: {last}"
    return "failed", f"exit status {code}: {last}"


def _killed(n_oom_before: int | None, n_oom: int | None) -> tuple[str, str]:
    """SIGKILL comes from a person, a scheduler, or the kernel when memory runs out; the kernel counts its own."""
    if n_oom_before is None or n_oom is None:
        return "failed", "killed by SIGKILL; this machine does not say whether for lack of memory"
    if n_oom > n_oom_before:
        return "out of memory", "killed by the kernel, whose memory ran out"
    return "failed", "killed by SIGKILL, not for lack of memory"
