"""Successive halving with real processes: who is promoted goes on from the checkpoint of its rung."""

from dataclasses import replace
from pathlib import Path

import pytest
from tests.conftest import small_overrides

from kajiya.flows.jobs import everything_goes_on, execute
from kajiya.flows.tune import tune
from kajiya.flows.tune_plan import plan_study, trial_config
from kajiya.flows.tune_search import open_study
from kajiya.run.events import read_events
from kajiya.run.folder import Run, find_run
from kajiya.run.hashing import hash_file
from kajiya.run.store import Store, open_artifact

pytestmark = pytest.mark.slow

RATES = (3e-3, 1e-3, 1e-5, 1e-6)
"""Of so short a training the larger is the better, so that who is ended and who is promoted is known beforehand."""
STEPS, RUNG = 18, 12


def _weights(run: Run) -> str:
    entry = run.manifest()["artifacts"]["model"]
    return hash_file(open_artifact(run.store.root / entry["path"]).path / "model.safetensors")


def test_a_promoted_trial_ends_with_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kajiya.flows.jobs.usable_cores", lambda: 1)
    words = small_overrides(
        "optim=adamw", f"optim.lr=choice({','.join(map(str, RATES))})", f"train.steps={STEPS}", "train.eval_every=6",
        f"train.save_every={STEPS}", "train.log_every=1", "tune.sampler.name=grid", "tune.confirm_seeds=0",
        "tune.pruner.name=asha", "tune.pruner.options.min_evals=2", "tune.pruner.options.reduction=2",
    )  # fmt: skip
    store = Store(tmp_path / "store")
    done = tune("stdlib-pretrain", words, store)
    plan = plan_study("stdlib-pretrain", words, store, None)
    found = open_study(plan.base.tune, plan.folder, plan.id, 0).get_trials()
    assert [trial.state.name for trial in found] == ["COMPLETE", "PRUNED", "PRUNED", "PRUNED", "COMPLETE"]
    assert [trial.params["optim.lr"] for trial in found] == [*RATES, RATES[1]]
    assert done.counts == {"finished": 2, "pruned": 2}
    ended, promoted = found[1], found[4]
    assert promoted.user_attrs["continues"] == ended.number
    assert promoted.user_attrs["run"] == ended.user_attrs["run"]

    run = find_run(store, promoted.user_attrs["run"])
    events = list(read_events(run.folder))
    assert [event["resumed_from"] for event in events if event["kind"] == "started"] == [None, RUNG]
    assert len({event["pid"] for event in events if event["kind"] == "opened"}) == 2
    steps = [event["step"] for event in events if event["kind"] == "metrics" and "train/nll" in event["values"]]
    assert steps == list(range(1, STEPS + 1))  # none was trained twice
    assert set(ended.intermediate_values.items()) < set(promoted.intermediate_values.items())

    whole = replace(plan, store=tmp_path / "other")
    end = execute(whole.job(trial_config(plan, {"optim.lr": RATES[1]}), "whole", {}), everything_goes_on)
    assert end.status == "finished", end
    other = find_run(Store(whole.store), str(end.run))
    assert [event["resumed_from"] for event in read_events(other.folder) if event["kind"] == "started"] == [None]
    assert _weights(run) == _weights(other)
    assert end.values["eval/nll"] == [value for _, value in sorted(promoted.intermediate_values.items())]
