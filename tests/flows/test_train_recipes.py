"""The packaged recipes of every kind of rows through the whole flow: data, proof, steps, evaluation, report."""

import math
from pathlib import Path
from typing import Any

import pytest
from tests.flows.test_prove_recipes import _smaller

from kajiya.config.compose import compose
from kajiya.flows.train import train
from kajiya.run.events import read_events
from kajiya.run.store import Store

STEPS = ("train.minutes=null", "train.epochs=null", "train.steps=4", "train.log_every=2", "train.eval_every=2")
QUICK = ("train.precision=fp32", "train.compile=off", "train.eval_rows=4", "train.save_every=4", "track.trackers=[]")
NAMES = ("classify", "kto", "mlm", "t5", "sft")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_and_is_evaluated(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kajiya.flows.planning._ENOUGH_S", {"by time": 0.0, "by steps": 0.0})
    monkeypatch.setattr("kajiya.run.provenance.usable_cores", lambda: 1)
    config = compose(f"stdlib-{name}", [*_smaller(f"stdlib-{name}", ""), *STEPS, *QUICK])
    done = train(config, Store(tmp_path))
    assert done.model is not None
    assert done.model.facts["steps"] == 4
    assert done.report is not None
    manifest = done.run.manifest()
    assert manifest["status"] == "finished"
    assert {"corpus", "tokenizer", "shards", "proof", "model", "evaluation"} <= set(manifest["artifacts"])
    values: dict[str, Any] = {}
    for event in read_events(done.run.folder):
        if event["kind"] == "metrics":
            values |= event["values"]
    for kind in ("train/", "eval/", "test/"):
        figures = [value for each, value in values.items() if each.startswith(kind)]
        assert figures
        assert all(map(math.isfinite, figures))
    assert values["train/data_wait_s"] >= 0
