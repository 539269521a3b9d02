"""The search: its logic with trials that cost nothing, and (slow) with real ones that crash, are killed and go on."""

import contextlib
import json
import os
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import psutil
import pytest
import yaml
from tests.conftest import Finished, small_overrides

from kajiya.config.compose import compose
from kajiya.config.options import ASHAPruner
from kajiya.config.schema import LauncherConfig, SamplerConfig, TuneConfig
from kajiya.errors import ConfigError, StoreError
from kajiya.flows import jobs, tune_jobs
from kajiya.flows.jobs import Job, TrialEnd
from kajiya.flows.launch import launch
from kajiya.flows.multirun import multirun
from kajiya.flows.tune import _n_wanted, _next_step, _tell, _Told, tune
from kajiya.flows.tune_jobs import Outcome
from kajiya.flows.tune_plan import plan_study
from kajiya.flows.tune_search import ASHA, open_study
from kajiya.flows.tune_trial import UNKNOWN_METRIC, UnknownMetricError
from kajiya.flows.tune_trial import _require_logged as require_logged
from kajiya.run.alive import BEAT
from kajiya.run.events import EventLog, read_events
from kajiya.run.files import read_json, write_json
from kajiya.run.folder import Run
from kajiya.run.store import Store
from kajiya.run.trackers.follow import follow
from kajiya.run.trackers.wandb import read_history

RECIPE = "stdlib-pretrain"
EVALS = 9


@pytest.fixture(autouse=True)
def _optuna_is_quiet() -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)


def _curve(job: Job) -> list[float]:
    """A held-out loss that is best at lr = 1e-3 and 4 layers, with a little noise by seed."""
    config = job.config
    noise = 1e-3 * np.random.default_rng(config.seed).normal()
    floor = 2 + abs(np.log10(config.optim.lr) + 3) + 0.1 * abs((config.model.n_layers or 2) - 4) + noise
    return [floor + 1 / (n + 1) for n in range(EVALS)]


class Trials:
    """In place of processes: what each job would have logged, told to the judge as a process would."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.saved: dict[str, int] = {}
        self.steps_run = 0

    def execute(self, job: Job, judge: Any) -> TrialEnd:
        self.jobs.append(job)
        curve, settings = _curve(job), str((job.config.optim.lr, job.config.model.n_layers, job.config.seed))
        if job.config.train.micro_batch == 13:
            return TrialEnd("out of memory", None, {}, "killed", 0.1, None)
        begin = self.saved.get(settings, 0)
        for n in range(begin):
            judge(n + 1, curve[n], True)
        for n in range(begin, EVALS):
            self.steps_run += 1
            self.saved[settings] = n + 1
            if not judge(n + 1, curve[n], False):
                return TrialEnd("pruned", "run", {}, None, 0.1, 0.05)
        return TrialEnd("finished", f"run-{len(self.jobs)}", dict.fromkeys(job.objectives, curve), None, 0.1, 0.05)


def _tune(own_finished: Finished, *words: str, **more: Any) -> Any:
    return tune(RECIPE, [*small_overrides(), *words], own_finished.store, **more)


LR = "optim.lr=tag(log,interval(1e-5,1e-1))"
LAYERS = "model.n_layers=choice(2,4)"


def test_a_search_finds_the_best_writes_its_recipe_and_says_whether_it_is_beyond_the_noise(
    own_finished: Finished, trials: Trials
) -> None:
    heard: list[str] = []
    done = _tune(own_finished, LR, LAYERS, "tune.trials=12", on_event=lambda kind, **_: heard.append(kind))
    assert done.counts == {"finished": 12}
    assert heard.count("trial") == 12
    best = compose(str(done.best))
    assert best.model.n_layers == 4
    assert best.name == "stdlib-pretrain-best"
    assert "tune" not in yaml.safe_load(done.best.read_text())
    confirmed = done.run.manifest()["confirmed"]
    assert confirmed["seeds"] == [1, 2, 3]
    assert {name: len(values) for name, values in confirmed["values"].items()} == {
        next(iter(confirmed["values"])): 3, list(confirmed["values"])[1]: 3, "the recipe": 3}  # fmt: skip
    assert "is better than the recipe by" in confirmed["verdicts"][1]
    assert "beyond the noise of seeds" in confirmed["verdicts"][1]
    html = done.report.read_text()
    for name in ("history", "rungs", "importance", "parallel", "contour"):
        assert f'id="figure-{name}"' in html
    # The same command has nothing left to do; more trials are added to the same study.
    n_jobs = len(trials.jobs)
    assert _tune(own_finished, LR, LAYERS, "tune.trials=12", "tune.confirm_seeds=0").counts == {"finished": 12}
    assert len(trials.jobs) == n_jobs
    more = _tune(own_finished, LR, LAYERS, "tune.trials=13", "tune.confirm_seeds=0", "tune.storage=null")
    assert more.counts == {"finished": 13}
    assert more.run.id == done.run.id


def test_a_grid_is_tried_once_each_and_failures_are_counted(own_finished: Finished, trials: Trials) -> None:
    words = ("tune.sampler.name=grid", "train.micro_batch=choice(2,13)", LAYERS, "tune.confirm_seeds=0")
    done = _tune(own_finished, *words, "tune.storage=journal")
    assert done.counts == {"finished": 2, "out of memory": 2}
    tried = sorted((job.config.train.micro_batch, job.config.model.n_layers) for job in trials.jobs)
    assert tried == [(2, 2), (2, 4), (13, 2), (13, 4)]
    assert "killed" in (done.report.parent / "report.md").read_text()
    with pytest.raises(ConfigError, match="has no grid"):
        _tune(own_finished, "tune.sampler.name=grid", LR)


@pytest.mark.slow
def test_a_grid_is_whole_unless_a_number_of_trials_is_asked_for_and_then_says_what_it_leaves_out(
    own_finished: Finished, trials: Trials
) -> None:
    said: list[str] = []

    def hear(kind: str, **fields: Any) -> None:
        if kind == "warning":
            said.append(fields["text"])

    grid = ("tune.sampler.name=grid", "optim.lr=choice(1e-3,2e-3)", f"seed=choice({','.join(map(str, range(11)))})")
    words = (*grid, "tune.confirm_seeds=0", "tune.storage=journal")
    cut = _tune(own_finished, *words, "tune.trials=2", on_event=hear)
    assert cut.counts == {"finished": 2}
    assert said == ["tune.trials=2 leaves out 20 of the grid's 22 combinations"]
    whole, cut_short, endless = (
        plan_study(RECIPE, [*small_overrides(), *more], own_finished.store, None)
        for more in (words, (*words, "tune.trials=2"), (LR,))
    )
    assert [_n_wanted(plan) for plan in (whole, cut_short, endless)] == [22, 2, 20]


def test_what_was_interrupted_goes_on_and_counts_once(
    own_finished: Finished, trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("optim.lr=tag(log,interval(1e-5,2e-1))", "tune.trials=4", "tune.confirm_seeds=0")
    real = trials.execute

    def cut(job: Job, judge: Any) -> TrialEnd:
        if len(trials.jobs) == 2:
            trials.jobs.append(job)
            raise KeyboardInterrupt
        return real(job, judge)

    monkeypatch.setattr(tune_jobs, "execute", cut)
    monkeypatch.setattr("kajiya.flows.tune.is_alive", lambda *_: False)
    with pytest.raises(KeyboardInterrupt):
        _tune(own_finished, *words)
    assert own_finished.store.root.joinpath("studies").is_dir()
    done = _tune(own_finished, *words)
    assert done.counts == {"finished": 4}
    assert trials.jobs[2].config == trials.jobs[3].config  # the same settings again, whose run goes on
    assert len(trials.jobs) == 5
    assert done.run.manifest()["attempts"] == 2


def test_halving_ends_the_worse_and_lets_a_promoted_trial_go_on_from_its_rung(
    own_finished: Finished, trials: Trials
) -> None:
    words = (LR, "tune.trials=9", "tune.confirm_seeds=0", "tune.pruner.name=asha", "tune.sampler.name=random")
    done = _tune(own_finished, *words)
    study = open_study(compose(RECIPE, list(words[1:])).tune, done.run.folder, done.run.id, 0)
    assert sum(done.counts.values()) == 9
    assert trials.steps_run < 9 * EVALS * 0.7
    promoted = [trial for trial in study.get_trials() if "continues" in trial.user_attrs]
    assert promoted
    for trial in promoted:
        before = study.get_trials()[trial.user_attrs["continues"]]
        assert before.params == trial.params
        assert set(before.intermediate_values.items()) <= set(trial.intermediate_values.items())
    # Whoever was ended is, in the end, not among the best third of its rung.
    assert isinstance(study.pruner, ASHA)
    assert study.pruner.promotable(study) == []


def test_promotion_by_hand() -> None:
    import optuna

    study = optuna.create_study()
    pruner = ASHA(ASHAPruner(min_evals=1, reduction=2))
    assert pruner.rungs(9) == [1, 2, 4, 8]

    def ended(x: float, value: float) -> None:
        trial = study.ask({"x": optuna.distributions.FloatDistribution(0, 9)})
        del x
        trial.report(value, 1)
        assert pruner.prune(study, study.get_trials()[-1]) == (value > 1.0)
        study.tell(
            trial, state=optuna.trial.TrialState.PRUNED if value > 1.0 else None, values=None if value > 1.0 else value
        )

    ended(0, 1.0)
    ended(1, 2.0)  # half of two: only the first stays
    assert pruner.promotable(study) == []
    ended(2, 3.0)
    assert pruner.promotable(study) == []
    ended(3, 4.0)  # half of four: the second is among them now
    assert [trial.number for trial in pruner.promotable(study)] == [1]


def test_conditional_spaces_and_several_objectives(
    own_finished: Finished, trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    (module := own_finished.store.root / "own_space.py").write_text(
        "def space(trial, values):\n"
        "    if values['optim'] == 'adamw':\n        return {}\n"
        "    return {'optim.options.momentum': trial.suggest_float('momentum', 0.8, 0.99)}\n"
        "def broken(trial, values):\n    return {'optim.lrr': 1.0}\n"
    )
    monkeypatch.syspath_prepend(str(module.parent))
    words = ("optim=adamw,muon", "tune.space=own_space:space", "tune.trials=6", "tune.confirm_seeds=0")
    done = _tune(
        own_finished, *words, "tune.sampler.name=nsga2", "tune.objectives=[eval/nll,'max:train/tokens_per_second']"
    )
    assert done.counts == {"finished": 6}
    for job in trials.jobs:
        assert ("momentum" in job.config.optim.options) == (job.config.optim.name == "muon")
    assert 'id="figure-front"' in done.report.read_text()
    front = open_study(trials.jobs[0].tune, done.run.folder, done.run.id, 0).best_trials
    recipes = sorted((done.run.folder / "front").glob("*.yaml"))
    assert [path.stem for path in recipes] == sorted(f"trial-{trial.number}" for trial in front)
    assert compose(str(recipes[0])).name.startswith("stdlib-pretrain-trial-")
    assert "none is the best" in done.best.read_text()
    assert "none is the best" in (done.report.parent / "report.md").read_text()
    with pytest.raises(ConfigError, match=r"optim\.lrr.*unknown key"):
        _tune(own_finished, "optim=adamw,muon", "tune.space=own_space:broken")


def test_a_space_that_raises_in_the_search_fails_its_trial_and_one_that_always_does_is_refused(
    own_finished: Finished, trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("late_space")
    module.drawn = 0  # type: ignore[attr-defined]

    def space(_trial: Any, _values: Any) -> dict[str, Any]:
        module.drawn += 1
        if module.drawn in (9, 11, 13):  # the first eight are drawn before the first trial
            raise ZeroDivisionError("not today")
        return {}

    module.space = space  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "late_space", module)
    words = (LR, "tune.space=late_space:space", "tune.trials=4", "tune.confirm_seeds=0")
    done = _tune(own_finished, *words)
    assert done.counts == {"failed": 2, "finished": 2}
    said = "tune.space: late_space:space raised ZeroDivisionError: not today"
    told = [event for event in read_events(done.run.folder) if event["kind"] == "trial" and event["problem"]]
    assert [event["problem"] for event in told] == [said] * 2
    assert "ZeroDivisionError: not today" in (done.report.parent / "report.md").read_text()
    assert module.drawn == 12
    with pytest.raises(ConfigError, match=r"tune\.space: late_space:space raised ZeroDivisionError: not today"):
        _tune(own_finished, *words)  # whose first draw, the thirteenth, is before any trial


def test_a_second_search_of_a_study_leaves_it_to_the_first(
    own_finished: Finished, trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (LR, "tune.trials=1", "tune.confirm_seeds=0", "tune.storage=journal", "optim.clip_norm=0.125")
    refused: list[str] = []

    def at_work(job: Job, judge: Any) -> TrialEnd:
        folder = own_finished.store.root / "studies" / str(job.facts["study"])
        before = (folder / "manifest.json").read_bytes()
        assert (folder / BEAT).is_file(), "by which another machine sees that it is at work"
        with pytest.raises(StoreError, match="is being searched by another process") as told:
            _tune(own_finished, *words)
        refused.append(str(told.value))
        assert (folder / "manifest.json").read_bytes() == before
        return trials.execute(job, judge)

    monkeypatch.setattr(tune_jobs, "execute", at_work)
    done = _tune(own_finished, *words)
    assert done.counts == {"finished": 1}
    assert len(refused) == 1
    assert not (done.run.folder / BEAT).exists()


def test_figures_of_trials_are_told_in_the_order_in_which_they_end(tmp_path: Path) -> None:
    run = Run(tmp_path / "studies" / "s-1", Store(tmp_path), EventLog(tmp_path / "studies" / "s-1"))
    run.folder.mkdir(parents=True)
    write_json(run.folder / "manifest.json", {"name": "s", "created": 1.7e9})
    plan = plan_study(RECIPE, [*small_overrides(), LR], Store(tmp_path), None)
    for numbers in ((1, 0), (3, 2)):  # the search was interrupted between
        told = _Told(None, _next_step(run.folder))
        for number in numbers:
            end = Outcome(number, "finished", [2.0 + number], None, None, 1.0)
            _tell(told, end, plan, run.events.emit)
    run.events.emit("ended", status="finished", error=None)
    token = follow(run.folder, "wandb", {}).token
    drawn = [(step, value) for name, step, value in read_history(run.folder, token) if name == "trial/eval/nll"]
    assert drawn == [(0, 3.0), (1, 2.0), (2, 5.0), (3, 4.0)]
    numbers = [value for name, _, value in read_history(run.folder, token) if name == "trial/number"]
    assert numbers == [1, 0, 3, 2]


def test_a_search_for_what_no_run_logs_ends_at_the_first_evaluation(
    own_finished: Finished, trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnknownMetricError, match=r"logs no eval/acc; it logs eval/loss, eval/nll\."):
        require_logged(["eval/acc"], {"eval/loss": 1.0, "eval/nll": 1.0})
    with pytest.raises(UnknownMetricError, match="logs no task/other/f1"):
        require_logged(["task/other/f1"], {"eval/loss": 1.0, "task/mine/f1": 1.0})
    require_logged(["eval/acc", "task/mine/rare", "test/x"], {"train/nll": 1.0})
    require_logged(["task/mine/rare", "train/nll"], {"eval/loss": 1.0, "task/mine/f1": 1.0})
    problem = "UnknownMetricError: tune.objectives: an evaluation of this recipe logs no eval/acc; it logs eval/loss."
    ran: list[Job] = []

    def fail(job: Job, _judge: Any) -> TrialEnd:
        ran.append(job)
        return TrialEnd(UNKNOWN_METRIC, None, {}, problem, 0.1, None)

    monkeypatch.setattr(tune_jobs, "execute", fail)
    words = (LR, "tune.trials=5", "tune.storage=journal", "optim.clip_norm=0.75")
    with pytest.raises(ConfigError, match=r"tune\.objectives: an evaluation of this recipe logs no eval/acc"):
        _tune(own_finished, *words)
    assert len(ran) == 1


def test_a_trial_that_was_ended_from_outside_goes_on_and_counts_once(
    own_finished: Finished, trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, ended = trials.execute, TrialEnd("interrupted", "run", {}, "ended by SIGTERM", 0.1, None)

    def sometimes(job: Job, judge: Any) -> TrialEnd:
        if len(trials.jobs) == 1:
            trials.jobs.append(job)
            return ended
        return real(job, judge)

    monkeypatch.setattr(tune_jobs, "execute", sometimes)
    words = (LR, "tune.trials=3", "tune.confirm_seeds=0", "tune.storage=journal", "optim.clip_norm=0.5")
    done = _tune(own_finished, *words)
    assert done.counts == {"finished": 3}
    assert len(trials.jobs) == 4
    assert trials.jobs[1].config == trials.jobs[2].config


def test_a_trial_of_another_machine_that_is_silent_is_taken_up(
    own_finished: Finished, trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (LR, "tune.trials=2", "tune.confirm_seeds=0", "tune.storage=journal", "optim.clip_norm=0.25")
    plan = plan_study(RECIPE, [*small_overrides(), *words], own_finished.store, None)
    plan.folder.mkdir(parents=True)
    study = open_study(plan.base.tune, plan.folder, plan.id, 0)
    for number in range(2):
        trial = study.ask()
        trial.suggest_float("optim.lr", 1e-5, 1e-1, log=True)
        trial.set_user_attr("owner", {"pid": 1, "begun": 1, "host": "elsewhere"})
        (beat := tune_jobs.beat_of(plan, number)).parent.mkdir(exist_ok=True)
        beat.touch()
    os.utime(tune_jobs.beat_of(plan, 0), (1.0, 1.0))
    done = _tune(own_finished, *words)
    states = [trial.state.name for trial in open_study(plan.base.tune, plan.folder, plan.id, 0).get_trials()]
    assert states == ["FAIL", "RUNNING", "COMPLETE", "COMPLETE"]
    assert done.counts == {"finished": 2, "not ended": 1}
    assert trials.jobs[0].config.optim.lr == study.get_trials()[0].params["optim.lr"]


def test_two_workers_never_promote_the_same_trial(own_finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (LR, "tune.pruner.name=asha", "tune.storage=journal", "optim.clip_norm=0.125")
    plan = plan_study(RECIPE, [*small_overrides(), *words], own_finished.store, None)
    plan.folder.mkdir(parents=True)
    study = open_study(plan.base.tune, plan.folder, plan.id, 0)
    assert isinstance(study.pruner, ASHA)
    for value in (1.0, 2.0):
        trial = study.ask()
        trial.suggest_float("optim.lr", 1e-5, 1e-1, log=True)
        trial.report(value, 1)
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    real = ASHA.promotable

    def slowly(self: ASHA, of: Any) -> Any:
        found = real(self, of)
        time.sleep(0.2)
        return found

    monkeypatch.setattr(ASHA, "promotable", slowly)
    with ThreadPoolExecutor(2) as pool:
        found = list(
            pool.map(lambda _: tune_jobs.promote(plan, open_study(plan.base.tune, plan.folder, plan.id, 0)), "ab")
        )
    assert sorted(found) == [False, True]


def test_threads_of_a_trial_are_the_cores_that_ray_reserves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "usable_cores", lambda: 8)
    monkeypatch.setattr(jobs, "default_threads", lambda: 8)
    on_ray = LauncherConfig("ray", {"cpus": 8})
    assert jobs._threads(TuneConfig(parallel=64, launcher=on_ray)) == 8
    assert jobs._threads(TuneConfig(parallel=64, launcher=LauncherConfig("ray", {"cpus": 0.5}))) == 1
    assert jobs._threads(TuneConfig(parallel=4)) == 2


NUMBERS = (LR, "optim.clip_norm=interval(0.5,2)")


@pytest.mark.parametrize("sampler", ["cmaes", "gp", "tpe"])
def test_samplers_propose_numbers_together(
    own_finished: Finished, trials: Trials, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import optuna

    kind = getattr(optuna.samplers, {"cmaes": "CmaEsSampler", "gp": "GPSampler", "tpe": "TPESampler"}[sampler])
    drawn: list[dict[str, Any]] = []
    real = kind.sample_relative

    def sample(self: Any, *words: Any) -> dict[str, Any]:
        drawn.append(real(self, *words))
        return drawn[-1]

    monkeypatch.setattr(kind, "sample_relative", sample)
    words = [f"tune.sampler.name={sampler}", "tune.sampler.options.startup_trials=3", "tune.trials=6"]
    done = _tune(own_finished, *NUMBERS, *words, "tune.confirm_seeds=0")
    assert done.counts == {"finished": 6}
    assert {"optim.lr", "optim.clip_norm"} in [set(values) for values in drawn]  # not left to chance


@pytest.mark.parametrize("pruner", ["median", "wilcoxon", "hyperband"])
def test_pruners_end_the_worse(own_finished: Finished, trials: Trials, pruner: str) -> None:
    words = (f"tune.pruner.name={pruner}", "tune.sampler.name=random", "tune.trials=9", "tune.confirm_seeds=0")
    done = _tune(own_finished, *NUMBERS, *words)
    assert sum(done.counts.values()) == 9
    assert set(done.counts) == {"finished", "pruned"}


def test_what_cannot_be_searched_is_said_before_anything_runs(own_finished: Finished, trials: Trials) -> None:
    for words, problem in (
        ((), "nothing varies"),
        (("tune.trials=2,3",), "settings of the search itself"),
        ((LR, "tune.objectives=[eval/nll,train/nll]", "tune.pruner.name=median"), "compares one figure"),
        ((LR, "tune.objectives=[eval/nlll]"), "logs eval/nll, not eval/nlll"),
        ((LR, "tune.objectives=[val_loss]"), "no metric that a run logs; their names begin with eval/, train/"),
        ((LR, "tune.objectives=['max:task/mine/f1']"), r"train\.tasks is empty"),
        ((LR, "tune.objectives=[test/bits_per_byte]", "tune.pruner.name=asha"), "comes when that is over"),
        ((LR, "tune.sampler.name=anneal"), "is not one of cmaes"),
        ((LR, LAYERS, "tune.sampler.name=cmaes"), "two or more numbers together, and 1 varies"),
        (
            ("optim=muon,schedule_free", "train.ema_decay=null,0.9", "schedule=constant", "tune.sampler.name=grid"),
            r"averages the weights by itself \(with optim=schedule_free train\.ema_decay=0\.9\)",
        ),
        ((LR, "tune.pruner.options.reduction=1", "tune.pruner.name=asha"), "out of range"),
    ):
        with pytest.raises(ConfigError, match=problem):
            _tune(own_finished, *words)
    assert trials.jobs == []


def _twice(number: int) -> tuple[int, int]:
    return 2 * number, os.getpid()


@pytest.mark.parametrize("name", ["process", "joblib"])
def test_launchers_run_every_job_in_other_processes(name: str) -> None:
    found = list(launch(LauncherConfig(name), _twice, [1, 2, 3, 4], 2))
    assert sorted(value for value, _ in found) == [2, 4, 6, 8]
    assert os.getpid() not in {pid for _, pid in found}
    assert list(launch(LauncherConfig(name), _twice, [5], 1)) == [(10, os.getpid())]


# ---------------------------------------------------------------- real trials


def _command(store: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "kajiya", "tune", RECIPE, *small_overrides(), *words, "--store", str(store)]


@pytest.mark.slow
def test_a_killed_search_goes_on_and_a_crash_is_counted(tmp_path: Path) -> None:
    words = ("optim.lr=tag(log,interval(1e-4,1e-2))", "train.steps=60", "train.eval_every=6", "tune.trials=3",
             "tune.parallel=2", "tune.confirm_seeds=0", "train.save_every=6")  # fmt: skip
    with subprocess.Popen(_command(tmp_path, *words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 240
        while not list(tmp_path.glob("runs/*/checkpoints/step-*/manifest.json")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        # The trials too, or they would come to their end without the search.
        for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    done = subprocess.run(
        [*_command(tmp_path, *words), "--json"], capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["trials"] == {"finished": 3}
    manifests = [read_json(path) for path in tmp_path.glob("runs/*/manifest.json")]
    assert len(manifests) == 3
    assert max(manifest["attempts"] for manifest in manifests) == 2  # one went on from its checkpoint
    assert {manifest["study"] for manifest in manifests} == {facts["study"]}


def test_multirun_refuses_two_members_that_are_one_training(tmp_path: Path) -> None:
    words = ("optim.lr=1e-3,2e-3", "eval.stride_fraction=0.5,1.0")
    with pytest.raises(ConfigError, match=r"(?s)one and the same training.*kajiya eval"):
        multirun(RECIPE, [*small_overrides(), *words], Store(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["process", "joblib"])
def test_multirun_trains_every_combination(tmp_path: Path, launcher: str) -> None:
    words = ("optim.lr=1e-3,2e-3", f"tune.launcher.name={launcher}", "tune.parallel=2")
    found = multirun(RECIPE, [*small_overrides(), *words], Store(tmp_path))
    assert [(member.settings["optim.lr"], member.status) for member in found] == [
        (1e-3, "finished"),
        (2e-3, "finished"),
    ]
    for member in found:
        assert (tmp_path / "runs" / str(member.run) / "report" / "report.html").is_file()


@pytest.mark.parametrize("sampler", ["random", "tpe", "cmaes", "gp", "nsga2"])
def test_a_sampler_takes_every_seed_that_a_run_does(sampler: str, tmp_path: Path) -> None:
    study = open_study(TuneConfig(sampler=SamplerConfig(sampler)), tmp_path, "own", 2**63 - 1)
    assert 0 <= study.ask().suggest_float("share", 0, 1) <= 1
